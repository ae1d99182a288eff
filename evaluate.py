"""Step 3: answer questions and grade the answers; and what every command uses that lets a model answer.

    torchrun --nproc_per_node 8 tabom.py evaluate --model M --adapter out/R/epoch-5 --tasks gsm8k,math500 --out out/E
    python tabom.py grade --task gsm8k --responses R.jsonl --out V.jsonl

    texts, records = evaluate.answer(m, tok, prompts, settings, seed=0)    # settings: arguments of decode.generate
    evaluate.check("number", response, reference_answer)                   # True, False, or None: cannot be told

A benchmark is a file of benchmarks/ (docs/extending.md lists what it holds). Protocols: "paper" asks both families as
lm-evaluation-harness does, zero-shot, with Table 8's lengths; "release" has the lengths of the authors' published code;
"official" is each model's own evaluation, with the earlier turns that --shots takes from a file.
"""

import functools
import hashlib
import json
import re
import time
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path

from tqdm import tqdm

import data
import decode
import runs
from benchmarks import execute, gsm8k, humaneval, ifeval, math500, mbpp
from options import name_list, opt

TASKS = {task.NAME: task for task in (gsm8k, math500, humaneval, mbpp, ifeval)}
PROTOCOLS = ("paper", "release", "official")

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
    records = answer_batch(runs.Loaded(m, tok, None), examples, settings, seed, next(m.parameters()).device)
    return [r["text"] for r in records], records


def answer_batch(loaded, examples, settings, seed, device, on_step=None):
    """Decode a few examples (dicts of id and prompt_ids, perhaps prompt and answer) -> their trajectory records.

    on_step: called after each decoding step, see decode.generate."""
    m, tok, _ = loaded
    ids, mask = (x.to(device) for x in data.pad_left([e["prompt_ids"] for e in examples], m.config.pad_id))
    generators = [data.generator(seed, "decode", e["id"], device=device) for e in examples]
    t = decode.generate(m, ids, mask, generator=generators, on_step=on_step, **with_eos_rules(settings, loaded))
    if not t.entropy.isfinite().all():
        raise ValueError("the model's predictions are not finite: NaN weights, or an overflow of its dtype")
    records = []
    for e, response, step, order, entropy, confidence in zip(examples, *(x.tolist() for x in t)):
        record = dict(id=e["id"], prompt=e.get("prompt"), answer=e.get("answer"), prompt_ids=e["prompt_ids"])
        record.update(response_ids=response, order=order, step=step)
        record.update(entropy=[round(h, 6) for h in entropy], confidence=[round(p, 6) for p in confidence])
        record.update(text=tok.response_text(response), finished=m.config.eos_id in response)
        records.append(record)
    return records


def with_eos_rules(settings, loaded):
    """Settings with the ids that no response may hold, and with EOS where suppress_eos and eos_last speak of it."""
    settings, eos = dict(settings), loaded.m.config.eos_id
    settings["suppress"] = loaded.never_chosen
    if settings.pop("suppress_eos", False):
        settings["suppress"].append(eos)
    if settings.pop("eos_last", False):
        settings["last"] = [eos]
    return settings


def answer_all(c, processes, loaded, examples, settings, out, judge):
    """Answer the examples that the folder out does not hold yet, shared over the processes -> how many those were.

    c: options with seed and batch_size. examples: dicts of id, prompt, answer and prompt_ids. judge(examples, records)
    gives each record its verdict: a dict of correct (True, False or None) and whatever else is worth keeping."""
    if processes.first:
        for file in data.trajectory_files(out):
            runs.drop_torn_line(file)
    processes.barrier()
    done = set()
    if data.trajectory_files(out):
        done = {json.dumps(r["id"]) for r in data.read_trajectories(out)}
    processes.barrier()  # nobody writes before everybody has read

    todo = [e for e in examples if json.dumps(e["id"]) not in done]
    todo.sort(key=lambda e: -len(e["prompt_ids"]))  # little padding, and the batch that needs most memory first
    starts = range(0, len(todo), c.batch_size)[processes.index :: processes.count]
    mine = sum(len(todo[i : i + c.batch_size]) for i in starts)
    with (
        open(out / f"trajectories-{processes.index:05d}.jsonl", "a", encoding="utf-8") as f,
        tqdm(total=mine, desc=out.name, unit="prompt", disable=not processes.shows) as bar,
    ):
        seen = kept = tokens = 0
        begun = time.time()
        for i in starts:
            batch = todo[i : i + c.batch_size]
            on_step = functools.partial(show_share, bar, seen, len(batch), settings["steps"])
            records = answer_batch(loaded, batch, settings, c.seed, processes.device, on_step)
            for record, verdict in zip(records, judge(batch, records)):
                record.update(verdict)
                f.write(json.dumps(record, ensure_ascii=False) + "\n")
                kept += data.usable(record)
                tokens += len(record["response_ids"])
            f.flush()
            seen += len(batch)
            bar.update(seen - bar.n)
            bar.set_postfix_str(f"{tokens / (time.time() - begun):.0f} tokens/s, kept {kept / seen:.0%}")
    processes.barrier()
    return len(todo)


def show_share(bar, seen, count, steps, step, *_):
    """Move a bar to `seen` prompts and the share of the next `count` that their decoding has made after a step."""
    bar.update(seen + count * min(step + 1, steps) // steps - bar.n)


# ------------------------------------------------------------------------------------------------ answers in general

CHECKS = ("none", "number", "exact")
NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?|-?\$?\.\d+")


def check(kind, response, answer):
    """Whether a response agrees with the reference answer, or with one of a list of them: True, False, or None where
    that cannot be told.

    "number": the final number of the response against that of the answer (see final_number); None for an answer that
    ends in anything but one number. "exact": the same text, but for space around it. "none": None.
    Raises ValueError for another kind."""
    if kind not in CHECKS:
        raise ValueError(f"check {kind!r} is none of {', '.join(CHECKS)}")
    if kind == "none" or answer is None:
        return None
    if isinstance(answer, list):
        verdicts = [check(kind, response, one) for one in answer]
        return any(verdicts) if any(verdicts) or None not in verdicts else None
    if kind == "exact":
        return response.strip() == answer.strip()
    gold = final_number(answer, only=True)
    return None if gold is None else final_number(response) == gold


def final_number(text, only=False):
    """The number after the last ####, else in the last \\boxed{}, else the last number of the text: Decimal or None.
    only: the text, or what is marked, must be the number and nothing else (72 apples, 3/4 and 2x are none)."""
    if "####" in text:
        text = text.rsplit("####", 1)[1]
    elif "\\boxed{" in text:
        text = text.rsplit("\\boxed{", 1)[1].split("}")[0]
    found = NUMBER.findall(text)
    if not found or (only and found[-1] != text.strip().removesuffix(".")):
        return None
    try:
        return Decimal(found[-1].replace(",", "").replace("$", ""))
    except InvalidOperation:
        return None


# ------------------------------------------------------------------------------------------------------- benchmarks


@dataclass
class EvaluateOptions(runs.ModelOptions, runs.DecodeOptions):
    """what is asked"""

    tasks: tuple = opt(("gsm8k",), f"{', '.join(TASKS)}, comma-separated", parse=name_list)
    protocol: str = opt(
        "paper",
        "prompts and settings: lm-evaluation-harness's with the paper's lengths, with those of the authors' release, "
        "or each model's own evaluation",
        choices=PROTOCOLS,
    )
    out: str | None = opt(None, "folder for responses and results, continued if unfinished (out/evaluate-MODELHASH)")
    data: str | None = opt(None, "folder with the benchmarks' files; without it they come from the Hub")
    adapter: str | None = opt(None, "adapter folder")
    shots: str | None = opt(None, "JSON file of earlier turns: a list of chat messages, or one list for each task")
    limit: int | None = opt(None, "only the first so many questions of each task", low=1)
    batch_size: int = opt(16, "questions decoded together on each process", low=1)


def evaluate(c, processes=None, loaded=None):
    """Answer the questions of benchmarks and grade the answers -> a score with its interval for each.

    out/TASK/ holds the trajectories of the answers with their verdicts; out/results.json the scores and settings.
    loaded: a runs.Loaded that answers, instead of loading c.model and c.adapter; it must be what they name."""
    unknown = [task for task in c.tasks if task not in TASKS]
    if unknown:
        raise ValueError(f"--tasks {','.join(unknown)}: known are {', '.join(TASKS)}")
    processes = processes or runs.Processes(c.device)
    questions = {task: read_questions(task, c.data) for task in c.tasks}
    shots = {task: read_shots(c.shots, task) for task in c.tasks}
    if loaded is None:
        loaded = runs.load_model(c, processes, c.adapter)
    identity = runs.identity(loaded.folder, c.adapter)
    out = Path(c.out or f"out/evaluate-{digest(identity)[:8]}")
    settings = {task: task_settings(c, task, loaded) for task in c.tasks}  # before anything is decoded
    scores = []
    for task in c.tasks:
        about = dict(identity, decoder=settings[task])
        scores.append(run_task(c, processes, loaded, task, questions[task], shots[task], about, out / task))
    if processes.first:
        shown = dict(command=vars(c) | dict(tasks=list(c.tasks)), scores=scores, versions=runs.versions())
        with runs.atomic_file(out / "results.json") as f:
            f.write(json.dumps(shown, indent=2) + "\n")
        if processes.shows:
            print(score_table(scores))
    return dict(out=str(out), scores=scores)


def task_settings(c, task, loaded):
    """A benchmark's decoder settings, with what the command line changes. Its steps are as many as its tokens, also
    where --max-new-tokens gives another number."""
    preset = TASKS[task].settings(loaded.m.config.family, c.protocol)
    if c.max_new_tokens:
        preset.update(max_new_tokens=c.max_new_tokens, steps=c.max_new_tokens)
    return runs.decoder_settings(c, loaded, preset)


def run_task(c, processes, loaded, task, questions, shots, about, out):
    """Answer and grade the questions of one benchmark -> its score. about: model, adapter and decoder settings."""
    family, questions = loaded.m.config.family, questions[: c.limit]
    examples = []
    for i, record in enumerate(questions):
        text, ids = prompt_of(c, loaded, task, record, shots)
        examples.append(dict(id=i, prompt=text, answer=record.get("answer"), prompt_ids=ids, record=record))
    meta = dict(
        command="evaluate",
        task=task,
        protocol=c.protocol,
        **about,
        dtype=runs.resolve_dtype(c, processes),
        seed=c.seed,
        limit=c.limit,
        shots=len(shots),
        questions_sha256=digest(questions),
        shots_sha256=digest(shots),
        versions=runs.versions(),
    )
    out = runs.open_run(out, meta, processes, free=("limit", "questions_sha256"))

    def judge(batch, records):
        texts = [TASKS[task].trim(graded_text(c, loaded, r), family, c.protocol) for r in records]
        found = verdicts(task, [e["record"] for e in batch], texts, family, c.protocol)
        return [dict(v, response=text) for v, text in zip(found, texts)]

    answer_all(c, processes, loaded, examples, about["decoder"], out, judge)
    found = data.read_trajectories(out)[: len(questions)]
    finished = round(100 * sum(r["finished"] for r in found) / len(found), 2)
    more = dict(finished=finished, shots=len(shots), protocol=c.protocol, decoder=about["decoder"], seed=c.seed)
    return dict(score(task, found), **more)


def prompt_of(c, loaded, task, record, shots):
    """(user's turn, token ids of the prompt) of a question, cut on the left to the benchmark's length."""
    family = loaded.m.config.family
    text, start = TASKS[task].ask(record, family, c.protocol)
    ids = loaded.tok.encode(loaded.tok.chat([*shots, {"role": "user", "content": text}]) + start)
    whole = family == "llada" and c.protocol == "official"  # OpenCompass does not cut
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
                f"{task}: no download of {repo} from the Hub ({type(e).__name__}); use --data"
            ) from e
    wanted = {**benchmark.FIELDS, **benchmark.ASKED}
    found = [checked_row(row, where, task, wanted) for where, row in data.read_rows(path)]
    found = benchmark.rows(found) if hasattr(benchmark, "rows") else found
    if not found:
        raise ValueError(f"{path}: no questions of {task}")
    return found


def checked_row(row, where, task, wanted):
    """The row, if it has the wanted fields. Raises ValueError with its place and what is missing."""
    wrong = [name for name, kind in wanted.items() if not isinstance(row, dict) or not fits(row.get(name), kind)]
    if wrong:
        raise ValueError(f"{where}: {', '.join(wrong)} missing or of another type; {task} needs {', '.join(wanted)}")
    return row


def fits(value, kind):
    """Whether a value is of a type; a list of a type in brackets stands for lists of it that are not empty."""
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
    turns = turns.get(task, []) if isinstance(turns, dict) else turns
    if not isinstance(turns, list) or not all(isinstance(t, dict) and {"role", "content"} <= t.keys() for t in turns):
        raise ValueError(f"{path}: the earlier turns must be a list of messages with a role and a content")
    return turns


def digest(rows):
    return hashlib.sha256(json.dumps(rows, default=str).encode()).hexdigest()


# ---------------------------------------------------------------------------------------------------------- grading


@dataclass
class GradeOptions:
    """what is graded"""

    task: str = opt(None, ", ".join(TASKS), required=True, choices=tuple(TASKS))
    responses: str = opt(None, "JSON Lines of the benchmark's fields and a response", required=True)
    out: str = opt(None, "file for the same lines with their verdicts", required=True)
    family: str = opt("dream", "whose prompt the code answers", choices=tuple(runs.DECODERS))
    protocol: str = opt("paper", "whose grader: see evaluate --protocol", choices=PROTOCOLS)


def grade(c):
    """Grade responses that were made elsewhere -> the score; every line is written back with its verdict."""
    rows = []
    for where, row in data.read_rows(c.responses):
        rows.append(checked_row(row, where, c.task, dict(TASKS[c.task].FIELDS, response=str)))
    if not rows:
        raise ValueError(f"{c.responses}: no responses to grade")
    found = verdicts(c.task, rows, [row["response"] for row in rows], c.family, c.protocol)
    out = Path(c.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with runs.atomic_file(out) as f:
        f.writelines(json.dumps({**row, **v}, ensure_ascii=False) + "\n" for row, v in zip(rows, found))
    return dict(score(c.task, found), out=str(out))


def verdicts(task, records, responses, family="dream", protocol="paper"):
    """A dict with correct and reason (IFEval: strict and loose, a boolean for each instruction) for every response."""
    benchmark = TASKS[task]
    work = benchmark.program if hasattr(benchmark, "program") else benchmark.grade
    found = []
    for record, response in zip(records, responses):
        try:
            found.append(work(record, response, family, protocol))
        except (TypeError, AttributeError, KeyError, SyntaxError) as e:
            raise ValueError(f"{task}: no sense in a record ({type(e).__name__}: {e}): {record!r:.200}") from e
    if not hasattr(benchmark, "program"):
        return found
    results = execute.run_many(found)  # all at once: on as many processes as there are cores
    return [dict(correct=r["passed"], reason=r["reason"]) for r in results]


def score(task, found):
    """Accuracy in percent with its 95 % Wilson interval; for IFEval (prompt level, strict) also its other three."""
    right, n = sum(v["correct"] is True for v in found), len(found)
    result = dict(task=task, n=n, correct=right, score=round(100 * right / n, 2), interval=wilson(right, n))
    if task == "ifeval":
        strict, loose = [], []
        for v in found:
            strict += v["strict"]
            loose += v["loose"]
        result["prompt_loose"] = round(100 * sum(all(v["loose"]) for v in found) / n, 2)
        result["instruction_strict"] = round(100 * sum(strict) / len(strict), 2)
        result["instruction_loose"] = round(100 * sum(loose) / len(loose), 2)
    return result


def wilson(right, n, z=1.96):
    """The 95 % Wilson interval of a share, right of n: (low, high)."""
    if n == 0:
        return 0.0, 1.0
    p, d = right / n, 1 + z * z / n
    middle, half = (p + z * z / (2 * n)) / d, z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5 / d
    return max(0.0, middle - half), min(1.0, middle + half)


def score_table(scores):
    lines = ["| task | n | score % | 95 % interval | finished % | tokens, steps, block | protocol | shots |"]
    lines.append("| --- " * 8 + "|")
    for r in scores:
        low, high = (f"{100 * x:.1f}" for x in r["interval"])
        d = r["decoder"]
        decoding = f"{d['max_new_tokens']}, {d['steps']}, {d['block_length'] or '-'}"
        cells = [r["task"], r["n"], r["score"], f"{low} to {high}", r["finished"], decoding, r["protocol"], r["shots"]]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)
