"""Step 3: answer benchmark questions and grade the answers. Other commands decode and check with this file too.

    torchrun --nproc_per_node 8 tabom.py evaluate --model M --adapter out/R/epoch-5 --tasks gsm8k,math500 --out out/E

    texts, records = evaluate.answer(m, tok, prompts, settings, seed=0)    # settings: arguments of decode.generate
    evaluate.check("number", response, reference_answer)                   # True, False, or None: cannot be told

A benchmark is a file of benchmarks/ (docs/extending.md lists what it holds). Protocols: "paper" asks both families as
lm-evaluation-harness does, zero-shot, with Table 8's lengths; "release" has the lengths of the authors' published code;
"official" is each model's own evaluation, with the earlier turns that --shots takes from a file.
"""

import ast
import collections
import contextlib
import hashlib
import importlib.metadata
import json
import time
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch
from tqdm import tqdm

import data
import decode
from benchmarks import execute, gsm8k, humaneval, ifeval, math500, mbpp
from benchmarks.answers import CHECKS, check  # noqa: F401  (evaluate.check: part of the interface)
from runs import disk, loading, torchrun
from runs.options import name_list, opt

TASKS = {task.NAME: task for task in (gsm8k, math500, humaneval, mbpp, ifeval)}
PROTOCOLS = ("paper", "release", "official")

# Tables 2 and 3, in percent, from the authors' project page (docs/recipes.md has the other rows): before training, and
# TABOM trained on PRM12K and on Ling-Coder.
PAPER = {
    ("dream", "gsm8k"): (81.41, 84.31, 81.73),
    ("dream", "math500"): (39.80, 41.10, 42.40),
    ("dream", "humaneval"): (52.66, 58.54, 60.36),
    ("dream", "mbpp"): (58.00, 59.20, 60.60),
    ("dream", "ifeval"): (56.56, 56.19, 55.45),
    ("llada", "gsm8k"): (76.12, 78.62, 77.33),
    ("llada", "math500"): (36.20, 36.80, 38.20),
    ("llada", "humaneval"): (36.01, 40.30, 42.68),
    ("llada", "mbpp"): (39.20, 40.10, 40.00),
    ("llada", "ifeval"): (33.08, 32.98, 34.19),
}
PAPER_VOCABULARY = 100_000  # both of the paper's models have more tokens; no row of it belongs beside a smaller one

# -------------------------------------------------------------------------------------------------------- answering


def answer(m, tok, prompts, settings, seed=0):
    """Answer prompts in one batch -> (texts, records), one of each per prompt.

    prompts: texts as the model reads them (tok.chat renders one), or lists of token ids. settings: arguments of
    decode.generate. seed: with the number of the prompt it decides every random choice. A record is a line of a
    trajectory file (docs/formats.md). Raises ValueError for predictions that are not finite."""
    examples = []
    for i, prompt in enumerate(prompts):
        ids = tok.encode(prompt) if isinstance(prompt, str) else list(prompt)
        examples.append(dict(id=i, prompt=prompt, answer=None, prompt_ids=ids))
    records = answer_batch(loading.Loaded(m, tok, None), examples, settings, seed, next(m.parameters()).device)
    return [r["text"] for r in records], records


def answer_batch(loaded, examples, settings, seed, device):
    """Decode a few examples (dicts of id and prompt_ids, perhaps prompt and answer) together -> their trajectory
    records."""
    records = {}
    for numbers, found in answers(loaded, examples, settings, seed, device):
        records.update(zip(numbers, found))
    return [records[i] for i in range(len(examples))]


def answers(loaded, examples, settings, seed, device, batch_size=None, on_step=None):
    """Decode examples, batch_size at a time -> yields (their numbers, their trajectory records) as they finish.

    on_step: called after each decoding step, see decode.stream."""
    m, prompts = loaded.m, [torch.tensor(e["prompt_ids"], device=device) for e in examples]

    def generator(i):
        return data.generator(seed, "decode", examples[i]["id"], device=device)

    own = dict(generator=generator, on_step=on_step, **with_eos_rules(settings, loaded))
    for numbers, t in decode.stream(m, prompts, batch_size, **own):
        decoded = t.response != m.config.mask_id  # [R, N]; --threshold with few --steps may leave masks
        if not t.entropy[decoded].isfinite().all():
            raise ValueError("the model's predictions are not finite: NaN weights, or an overflow of its dtype")
        t = t._replace(order=t.order.masked_fill(~decoded, -1))
        t = t._replace(entropy=t.entropy.where(decoded, 0.0), confidence=t.confidence.where(decoded, 0.0))
        rows = zip(*(field.tolist() for field in t))
        yield numbers, [record_of(examples[i], loaded.tok, *row) for i, row in zip(numbers, rows)]


def record_of(e, tok, response, step, order, entropy, confidence):
    """The trajectory record of an example and of a row of decode.Trajectory, as lists."""
    record = dict(id=e["id"], prompt=e.get("prompt"), answer=e.get("answer"), prompt_ids=e["prompt_ids"])
    record.update(response_ids=response, order=order, step=step)
    record.update(entropy=[round(h, 6) for h in entropy], confidence=[round(p, 6) for p in confidence])
    record["text"] = tok.response_text(response)
    record["finished"] = data.first_end(response, tok.stop_ids) < len(response)
    return record


def with_eos_rules(settings, loaded):
    """Arguments of decode.generate: the settings, the ids that no response may hold, and the EOS id in place of
    suppress_eos and eos_last."""
    settings, eos = dict(settings), loaded.m.config.eos_id
    settings["suppress"] = loaded.never_chosen
    if settings.pop("suppress_eos", False):
        settings["suppress"].append(eos)
    if settings.pop("eos_last", False):
        settings["last"] = [eos]
    if settings.get("schedule") in decode.BLOCKWISE and loaded.m.config.block_length is not None:
        settings["stop"] = sorted(loaded.tok.stop_ids)  # what a finished block ends, later blocks cannot change
    return settings


def check_context(examples, settings, config, warn):
    """Warn of prompts that, with their response, are longer than the context that the model was trained with."""
    if config.max_length is None:
        return
    longest = max(len(e["prompt_ids"]) for e in examples) + settings["max_new_tokens"]
    if longest > config.max_length:
        warn(f"prompt and response have up to {longest} tokens; the model was trained with {config.max_length}")


def answer_all(c, processes, loaded, examples, settings, out, judge):
    """Answer the examples whose answers the folder out lacks, split over the processes -> their number.

    c: options with seed and batch_size. examples: dicts of id, prompt, answer and prompt_ids. judge(examples, records)
    gives each record its verdict: a dict of correct (True, False or None) and whatever else is worth keeping."""
    if processes.first:
        for file in data.trajectory_files(out):
            disk.drop_torn_line(file)
    processes.barrier()
    done = {}
    if data.trajectory_files(out):
        done = {json.dumps(r["id"]): r["prompt_ids"] for r in read_verdicts(out)}
        check_answered(out, examples, done)
    processes.barrier()  # nobody writes before everybody has read

    todo = [e for e in examples if json.dumps(e["id"]) not in done]
    todo.sort(key=lambda e: -len(e["prompt_ids"]))  # little padding, and the batch that needs most memory first
    mine = todo[processes.index :: processes.count]
    with (
        open(out / f"trajectories-{processes.index:05d}.jsonl", "a", encoding="utf-8") as f,
        tqdm(total=len(mine), desc=out.name, unit="prompt", disable=not processes.shows) as bar,
    ):
        progress = Progress(bar, settings)
        for numbers, records in answers(
            loaded, mine, settings, c.seed, processes.device, c.batch_size, progress.decoded
        ):
            for record, verdict in zip(records, judge([mine[i] for i in numbers], records)):
                record.update(verdict)
                f.write(disk.json_line(record))
                progress.kept += data.usable(record)
            f.flush()
            progress.seen += len(records)
    processes.barrier()
    return len(todo)


def check_answered(out, examples, known):
    """Raises ValueError where the answers of a folder, id -> tokens of its prompt, are not to these prompts: with
    another --limit, rows may have ids of their own or be numbered."""
    asked = {json.dumps(e["id"]): e["prompt_ids"] for e in examples}
    prompts, others = set(map(tuple, asked.values())), []
    for key, prompt in known.items():
        under_another = key not in asked and tuple(prompt) in prompts
        if asked.get(key, prompt) != prompt or under_another:
            others.append(key)
    if others and not asked.keys() <= known.keys():
        what = f"{len(others)} of its answers are to other prompts, or under other ids, such as {others[0]}"
        raise ValueError(f"{out}: {what}; give the same --limit as before, or another --out")


def read_verdicts(out, more=()):
    """The records of a run folder with their verdicts. Raises ValueError for one that lacks any."""
    records = data.read_trajectories(out)
    for r in records:
        for name in ("finished", "correct", *more):
            if name not in r:
                raise ValueError(f"{out}: the line of id {r['id']} has no {name}: remove it, and it is made again")
    return records


class Progress:
    """Moves a bar of prompts, also while they are being answered, and says the speed and how long all will take."""

    def __init__(self, bar, settings):
        self.bar, self.seen, self.kept, self.begun = bar, 0, 0, time.time()
        self.tokens = settings["max_new_tokens"]
        self.steps = settings.get("steps") or -(-self.tokens // settings["tokens_per_step"])

    def decoded(self, now, *_):
        """After a step: the number of the step, in each row that took one."""
        done = self.seen + float(((now + 1) / self.steps).clamp(max=1).sum())  # prompts, and shares of some
        each = (time.time() - self.begun) / done  # seconds
        shown = f"{self.tokens / each:.0f} tokens/s, {tqdm.format_interval(each * self.bar.total)} in all"
        if self.seen:
            shown += f", kept {self.kept / self.seen:.0%}"
        self.bar.set_postfix_str(shown, refresh=False)
        self.bar.update(int(done) - self.bar.n)


# ------------------------------------------------------------------------------------------------------- benchmarks


@dataclass
class EvaluateOptions(loading.ModelOptions, loading.DecodeOptions):
    """what is asked"""

    tasks: tuple = opt(("gsm8k",), f"{', '.join(TASKS)}, comma-separated", parse=name_list)
    protocol: str = opt(
        "paper",
        "paper: prompts of lm-evaluation-harness, the paper's response lengths; release: the same prompts, lengths and "
        "graders of the authors' code; official: each model's own evaluation",
        choices=PROTOCOLS,
    )
    out: str | None = opt(None, "folder for responses and results, continued if unfinished (out/evaluate-HASH)")
    data: str | None = opt(None, "folder with the benchmarks' files; without it they come from the Hub")
    adapter: str | None = opt(None, "adapter folder")
    shots: str | None = opt(
        None, "JSON file of turns put before each question: a list of chat messages, or an object with a list per task"
    )
    limit: int | None = opt(None, "use only the first LIMIT questions of each task", low=1)
    batch_size: int = opt(16, "questions decoded together on each process", low=1)


def evaluate(c, processes=None, loaded=None):
    """Answer the questions of benchmarks and grade the answers -> a score with its interval for each.

    out/TASK/ holds the trajectories of the answers with their verdicts; out/results.json the scores and settings.
    loaded: a loading.Loaded that answers, instead of loading c.model and c.adapter; it must be what they name."""
    unknown = [task for task in c.tasks if task not in TASKS]
    if unknown:
        raise ValueError(f"--tasks {','.join(unknown)}: unknown; choose among {', '.join(TASKS)}")
    processes = processes or torchrun.Processes(c.device)
    tasks = list(dict.fromkeys(c.tasks))  # one that is named twice is answered once
    questions = {task: read_questions(task, c.data) for task in tasks}
    shots = {task: read_shots(c.shots, task) for task in tasks}
    if loaded is None:
        loaded = loading.load_model(c, processes, c.adapter)
    identity = disk.content_hashes(loaded.folder, c.adapter)
    out = Path(c.out or f"out/evaluate-{digest(identity)[:8]}")
    settings = {task: task_settings(c, task, loaded) for task in tasks}  # before anything is decoded
    if (out / "meta.json").is_file():
        command = data.read_json(out / "meta.json").get("command")
        raise FileExistsError(f"{out} holds a run of {command}: choose another --out")
    scores = []
    for task in tasks:
        about = dict(identity, decoder=settings[task])
        scores.append(run_task(c, processes, loaded, task, questions[task], shots[task], about, out / task))
    if processes.first:
        shown = dict(command=vars(c) | dict(tasks=tasks), scores=scores, versions=grader_versions())
        with disk.atomic_file(out / "results.json") as f:
            f.write(json.dumps(shown, indent=2) + "\n")
        if processes.shows:
            print(score_table(scores))
            print(", ".join(f"{name} {version}" for name, version in shown["versions"].items()))
    return dict(out=str(out), scores=scores)


def task_settings(c, task, loaded):
    """A benchmark's decoder settings, with the command line's changes. There are as many steps as tokens, also where
    --max-new-tokens changes the number of tokens. Raises ValueError for a protocol that does not know the family."""
    family = loaded.m.config.family
    if c.protocol == "release" and family not in ("llada", "dream"):
        raise ValueError(
            f"--protocol release: the authors' code has LLaDA and Dream, not {family}; use paper or official"
        )
    preset = TASKS[task].settings(family, c.protocol)
    if (
        getattr(loaded.m.config, "block_length", None) is not None
    ):  # the attention's own blocks, unless flags say others
        preset.pop("block_length", None)
    if c.max_new_tokens:
        preset.update(max_new_tokens=c.max_new_tokens, steps=c.max_new_tokens)
    return loading.decoder_settings(c, loaded, preset)


def run_task(c, processes, loaded, task, questions, shots, about, out):
    """Answer and grade the questions of one benchmark -> its score. about: model, adapter and decoder settings."""
    family, examples = loaded.m.config.family, []
    for i, record in enumerate(questions[: c.limit]):
        try:
            text, ids = prompt_of(c, loaded, task, record, shots)
        except ValueError as e:
            raise ValueError(f"question {i} of {task}, counted from 0: {e}") from e
        examples.append(dict(id=i, prompt=text, answer=record.get("answer"), prompt_ids=ids, record=record))
    meta = dict(
        command="evaluate",
        task=task,
        protocol=c.protocol,
        block_causal=c.block_causal,
        **about,
        dtype=loading.resolve_dtype(c, processes),
        seed=c.seed,
        limit=c.limit,
        shots=len(shots),
        questions_sha256=digest(questions),
        shots_sha256=digest(shots),
        versions=disk.versions(),
    )
    out = disk.open_run(out, meta, processes, free=("limit",))

    def judge(batch, records):
        texts, asked = [], []
        for example, record in zip(batch, records):
            texts.append(TASKS[task].trim(graded_text(c, loaded, record), family, c.protocol))
            asked.append(example["record"])
        found = verdicts(task, asked, texts, family, c.protocol)
        return [dict(verdict, response=text) for verdict, text in zip(found, texts)]

    answer_all(c, processes, loaded, examples, about["decoder"], out, judge)
    found = read_verdicts(out, ("strict", "loose") if task == "ifeval" else ())[: len(examples)]
    finished = round(100 * sum(r["finished"] for r in found) / len(found), 2)
    more = dict(finished=finished, shots=len(shots), protocol=c.protocol, decoder=about["decoder"], seed=c.seed)
    return dict(score(task, found), **more, **paper_scores(c, loaded, task))


def paper_scores(c, loaded, task):
    """dict(paper=dict(base, prm12k, ling_coder)): the paper's scores in percent, before training and after TABOM on
    either dataset. Empty where model, questions, prompts or decoder are not the paper's or the release's."""
    config = loaded.m.config
    own = task_settings(EvaluateOptions(protocol=c.protocol), task, loaded)
    same = c.limit is None and c.shots is None and c.protocol != "official" and task_settings(c, task, loaded) == own
    if not same or config.vocab_size < PAPER_VOCABULARY or (config.family, task) not in PAPER:
        return {}
    return dict(paper=dict(zip(("base", "prm12k", "ling_coder"), PAPER[config.family, task])))


def prompt_of(c, loaded, task, record, shots):
    """(user's turn, token ids of the prompt) of a question, cut on the left to the benchmark's length."""
    family = loaded.m.config.family
    text, start = TASKS[task].ask(record, family, c.protocol)
    ids = data.encode_prompt(loaded.tok, [*shots, {"role": "user", "content": text}], prefix=start)
    whole = family in ("llada", "sdar") and c.protocol == "official"  # OpenCompass and T3D do not cut
    return text, ids if whole else ids[-TASKS[task].PROMPT_TOKENS :]


def graded_text(c, loaded, record):
    """The text of a response that is graded. The release cuts LLaDA's at the EOS alone: an end of turn stays in it."""
    if c.protocol != "release" or loaded.m.config.family != "llada":
        return record["text"]
    ids, eos = record["response_ids"], loaded.m.config.eos_id
    return loaded.tok.decode(ids[: ids.index(eos)] if eos in ids else ids)


def read_questions(task, folder=None):
    """The rows of a benchmark from a folder of its files, else from the Hub.

    Raises FileNotFoundError, or ValueError with the place of a row that lacks something."""
    benchmark = TASKS[task]
    if folder is not None:
        path = Path(folder) / benchmark.FILE
    else:
        from huggingface_hub import hf_hub_download  # slow to import, and only for this

        repo, file = benchmark.HUB
        try:
            path = Path(hf_hub_download(repo, file, repo_type="dataset"))
        except Exception as e:  # the hub library raises its own, requests' and httpx's errors
            raise FileNotFoundError(
                f"{task}: {repo} cannot be downloaded from the Hub ({type(e).__name__}); give its file with --data"
            ) from e
    wanted = {**benchmark.FIELDS, **benchmark.ASKED}
    found = [checked_row(row, where, task, wanted) for where, row in data.read_rows(path)]
    found = benchmark.rows(found) if hasattr(benchmark, "rows") else found
    if not found:
        raise ValueError(f"{path}: no questions of {task}")
    return found


def checked_row(row, where, task, wanted):
    """The row, if it has the wanted fields. Raises ValueError with its place and what is missing."""
    wrong = []
    for name, kind in wanted.items():
        if not isinstance(row, dict) or not fits(row.get(name), kind):
            wrong.append(name)
    if wrong:
        raise ValueError(f"{where}: {', '.join(wrong)} missing or of another type; {task} needs {', '.join(wanted)}")
    return row


def fits(value, kind):
    """Whether a value is of a type; [str] stands for a list of texts that is not empty."""
    if not isinstance(kind, list):
        return isinstance(value, kind)
    return isinstance(value, list) and bool(value) and all(isinstance(one, kind[0]) for one in value)


def read_shots(path, task):
    """The earlier turns of a task: a JSON list of chat messages, or an object with such a list for each task."""
    if path is None:
        return []
    try:
        turns = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (UnicodeDecodeError, json.JSONDecodeError) as e:
        raise ValueError(f"{path}: not valid JSON ({e})") from e
    if isinstance(turns, dict):
        if task not in turns:
            raise ValueError(
                f"{path}: no turns for {task}, only for {', '.join(turns)}; give {task} an empty list for none"
            )
        turns = turns[task]
    if not isinstance(turns, list):
        raise ValueError(f"{path}: the earlier turns must be a list of messages, found {type(turns).__name__}")
    return data.to_messages(turns, f"{path}: an earlier turn must have a role and a text content")


def grader_versions():
    """Versions that can change a score: of Python, torch, and the libraries that read mathematics and languages."""
    found = disk.versions()
    for name in ("math-verify", "latex2sympy2_extended", "antlr4-python3-runtime", "langdetect"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def digest(rows):
    return hashlib.sha256(json.dumps(rows, default=str).encode()).hexdigest()


# ---------------------------------------------------------------------------------------------------------- grading


# What a malformed record, or a response made to break its grader, may raise.
FAULTS = (ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, SyntaxError, TypeError, ValueError)


def verdicts(task, records, responses, family="dream", protocol="paper", **more):
    """A dict with correct and reason (IFEval: strict and loose, a boolean for each instruction) for every response.

    A record that cannot be graded counts as wrong, with the fault as its reason; the others are graded all the same.
    more: further arguments of the benchmark's grade or program: gold of math500, strict of gsm8k, whole of programs."""
    benchmark = TASKS[task]
    runs_programs = hasattr(benchmark, "program")
    work = benchmark.program if runs_programs else benchmark.grade
    found, jobs = [], []
    for record, response in zip(records, responses):
        try:
            result = work(record, response, family, protocol, **more)
            if runs_programs:
                ast.parse(result[1])  # tests that are not Python are the record's fault
                jobs.append((len(found), result))
            found.append(result)
        except FAULTS as e:
            found.append(not_graded(record, e))
    results = execute.run_many([job for _, job in jobs])  # all at once: on as many processes as there are cores
    for (place, _), result in zip(jobs, results):
        found[place] = dict(correct=result["passed"], reason=result["reason"])
    return found


def not_graded(record, fault):
    """The verdict on a record whose grading failed."""
    verdict = dict(correct=False, reason=f"not graded ({type(fault).__name__}: {fault})"[:300])
    if isinstance(record.get("instruction_id_list"), list):  # IFEval's score counts instructions
        verdict.update(strict=[False] * len(record["instruction_id_list"]))
        verdict.update(loose=verdict["strict"])
    return verdict


def score(task, found, questions=None):
    """Accuracy over all questions and its 95 % Wilson interval, in percent; for IFEval (prompt level, strict) also its
    other three.

    found: the verdicts. A response without one is no right one, and not_graded says how many there are. questions: of
    each verdict, which question it is of, where some are answered more than once: such a question counts once, with
    the mean of its responses."""
    if questions is None:
        questions = range(len(found))
    times, right, not_judged = collections.Counter(questions), 0, 0
    strict, loose, instructions, prompts_loose = 0, 0, 0, 0
    for question, verdict in zip(questions, found):
        share = Fraction(1, times[question])
        right += share * (verdict["correct"] is True)
        not_judged += str(verdict.get("reason", "")).startswith("not graded")
        if task == "ifeval":
            strict += share * sum(verdict["strict"])
            loose += share * sum(verdict["loose"])
            instructions += share * len(verdict["strict"])
            prompts_loose += share * all(verdict["loose"])
    n = len(times)
    interval = [round(100 * share, 2) for share in wilson(float(right), n)]
    correct = int(right) if right == int(right) else round(float(right), 2)
    result = dict(task=task, n=n, correct=correct, score=percent(right, n), interval=interval)
    if not_judged:
        result["not_graded"] = not_judged
    if task == "ifeval":
        result["prompt_loose"] = percent(prompts_loose, n)
        result["instruction_strict"] = percent(strict, instructions)
        result["instruction_loose"] = percent(loose, instructions)
    return result


def percent(part, whole):
    return round(float(100 * part / whole), 2)


def wilson(right, n, z=1.96):
    """The 95 % Wilson interval of a share, right of n: (low, high)."""
    if n == 0:
        return 0.0, 1.0
    p, d = right / n, 1 + z * z / n
    middle, half = (p + z * z / (2 * n)) / d, z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5 / d
    return max(0.0, middle - half), min(1.0, middle + half)


def score_table(scores):
    """A line for each score, with the paper's beside it where there is one."""
    titles = ["task", "n", "score %", "95 % interval", "paper %", "finished %", "tokens, steps, block", "protocol"]
    titles += ["shots", "seed"]
    lines = [f"| {' | '.join(titles)} |", "| --- " * len(titles) + "|"]
    for r in scores:
        low, high = (f"{x:.1f}" for x in r["interval"])
        d = r["decoder"]
        pace = d.get("steps") or f"{d['tokens_per_step']} a step"
        decoding = f"{d['max_new_tokens']}, {pace}, {d['block_length'] or '-'}"
        paper = " / ".join(f"{x:.1f}" for x in r.get("paper", {}).values()) or "-"
        cells = [r["task"], r["n"], r["score"], f"{low} to {high}", paper, r["finished"], decoding]
        cells += [r["protocol"], r["shots"], r["seed"]]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    for r in scores:
        if r.get("not_graded"):
            lines.append(f"{r['task']}: {r['not_graded']} of {r['n']} answers could not be graded and count as wrong")
    if any("paper" in r for r in scores):
        lines.append("paper %: before training / TABOM on PRM12K / TABOM on Ling-Coder")
    return "\n".join(lines)
