"""Step 3: answer benchmark questions and grade the answers.

    torchrun --nproc_per_node 8 tabom.py evaluate --model M --adapter out/R/epoch-5 --tasks gsm8k,math500 --out out/E

A benchmark is a file of benchmarks/ (docs/extending.md lists what it holds). A protocol says how its questions are
asked and graded: PROTOCOLS lists them, docs/choices.md compares them.
"""

import ast
import collections
import contextlib
import hashlib
import importlib
import importlib.metadata
import itertools
import json
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import data
import distill
import tokenizer
from benchmarks import execute, gsm8k, humaneval, ifeval, math500, mbpp
from benchmarks.answers import check  # noqa: F401 - evaluate.check
from formats import talks
from runs import disk, loading, pace, torchrun
from runs.options import name_list, opt

TASKS = {task.NAME: task for task in (gsm8k, math500, humaneval, mbpp, ifeval)}
PROTOCOLS = {  # name -> (how questions are asked and graded, the module that knows more of it)
    "paper": ("prompts of lm-evaluation-harness, zero-shot, with the lengths of Table 8", "release.published"),
    "release": ("the same prompts, the lengths and graders of the authors' code", "release.published"),
    "official": ("each model's own evaluation, with the turns of --shots", None),
}
ABOUT = "; ".join(f"{name}: {about}" for name, (about, _) in PROTOCOLS.items())
WHOLE_PROMPTS = ("llada", "sdar")  # families whose official evaluation cuts no prompt


@dataclass
class EvaluateOptions(loading.ModelOptions, loading.DecodeOptions):
    """what is asked"""

    tasks: tuple = opt(("gsm8k",), f"{', '.join(TASKS)}, comma-separated", parse=name_list)
    protocol: str = opt("paper", ABOUT, choices=tuple(PROTOCOLS))
    out: str | None = opt(None, "folder for responses and results, continued if unfinished (out/evaluate-HASH)")
    data: str | None = opt(None, "folder with the benchmarks' files; without it they come from the Hub")
    adapter: str | None = opt(None, "adapter folder")
    shots: str | None = opt(
        None, "JSON file of turns put before each question: a list of chat messages, or an object with a list per task"
    )
    prompt_tokens: int | None = opt(
        None,
        "longer prompts are cut on the left to this many tokens (1024; LLaDA with --protocol official: all)",
        low=1,
    )
    raw: bool = opt(False, "questions as they are, without the chat template: for base models, without --shots")
    limit: int | None = opt(None, "use only the first LIMIT questions of each task", low=1)
    batch_size: int = opt(16, "questions decoded together on each process", low=1)


def evaluate(c, processes=None, loaded=None):
    """Answer the questions of benchmarks and grade the answers -> a score with its interval for each.

    out/TASK/ holds the trajectories of the answers with their verdicts; out/results.json the scores and settings.
    loaded: a loading.Loaded that answers, instead of loading c.model and c.adapter; it must be what they name.
    Raises ValueError or FileNotFoundError before anything is decoded."""
    unknown = [task for task in c.tasks if task not in TASKS]
    if unknown:
        raise ValueError(f"--tasks {','.join(unknown)}: unknown; choose among {', '.join(TASKS)}")
    if c.raw and c.shots:
        raise ValueError("--raw asks each question alone: no --shots, which are turns of a chat")
    processes = processes or torchrun.Processes(c.device)
    tasks = list(dict.fromkeys(c.tasks))  # one that is named twice is answered once
    questions = {task: read_questions(task, c.data) for task in tasks}
    shots = {task: read_shots(c.shots, task) for task in tasks}
    loaded = loaded or loading.load_model(c, processes, c.adapter)
    if room(c):
        room(c).check_model(c, loaded, torchrun.warner(processes))
    settings = {task: task_settings(c, task, loaded) for task in tasks}  # before anything is decoded
    same = loading.identity(c, processes, loaded)
    out = Path(c.out or f"out/evaluate-{digest({name: same[name] for name in ('model_sha256', 'adapter_sha256')})[:8]}")
    if (out / "meta.json").is_file():
        command = data.read_json(out / "meta.json").get("command")
        raise FileExistsError(f"{out} holds a run of {command}: choose another --out")
    scores = []
    for task in tasks:
        about = dict(same, decoder=settings[task])
        scores.append(run_task(c, processes, loaded, task, questions[task], shots[task], about, out / task))
    if processes.first:
        command, versions = vars(c) | dict(tasks=tasks), versions_of(out, scores)
        shown = dict(command=command, shape=loading.shape(loaded.m.config), scores=scores, versions=versions)
        with disk.atomic_file(out / "results.json") as f:
            f.write(json.dumps(shown, indent=2) + "\n")
        if processes.shows:
            print(score_table(scores))
            print(", ".join(f"{name} {version}" for name, version in versions.items()))
    return dict(out=str(out), scores=scores)


def room(c):
    """The module with what else a protocol decides, or None."""
    module = PROTOCOLS[c.protocol][1]
    return module and importlib.import_module(module)


def task_settings(c, task, loaded):
    """A benchmark's decoder settings, with the command line's changes. There are as many steps as tokens, also where
    --max-new-tokens changes the number of tokens."""
    preset = TASKS[task].settings(loaded.m.config.family, c.protocol)
    if getattr(loaded.m.config, "block_length", None) is not None:
        preset.pop("block_length", None)  # the attention's blocks, unless flags say others
    if c.max_new_tokens:
        preset.update(max_new_tokens=c.max_new_tokens, steps=c.max_new_tokens)
    return loading.decoder_settings(c, loaded, preset)


def run_task(c, processes, loaded, task, questions, shots, about, out):
    """Answer and grade the questions of one benchmark -> its score. about: model, adapter and decoder settings."""
    family, examples = loaded.m.config.family, encode_questions(c, processes, loaded, task, questions, shots)
    meta = dict(
        command="evaluate",
        task=task,
        protocol=c.protocol,
        **about,
        limit=c.limit,
        prompt_tokens=c.prompt_tokens,
        raw=c.raw,
        shots=examples_of(shots),
        questions_sha256=digest(questions),
        shots_sha256=digest(shots),
    )
    out = disk.open_run(out, meta, processes, may_change=("limit",))

    watch = pace.Stopwatch(loaded.tok.stop_ids)

    def judge(batch, records):
        watch.stop(records)
        texts, asked = [], []
        for example, record in zip(batch, records):
            text = room(c).graded_text(c, loaded, record) if room(c) else record["text"]
            texts.append(TASKS[task].trim(text, family, c.protocol))
            asked.append(example["record"])
        found = verdicts(task, asked, texts, family, c.protocol)
        watch.go_on()
        return [dict(verdict, response=text) for verdict, text in zip(found, texts)]

    distill.answer_all(c, processes, loaded, examples, about["decoder"], out, judge)
    found = distill.read_verdicts(out, ("strict", "loose") if task == "ifeval" else ())[: len(examples)]
    finished = round(100 * sum(r["finished"] for r in found) / len(found), 2)
    more = dict(finished=finished, shots=meta["shots"], protocol=c.protocol, decoder=about["decoder"], seed=c.seed)
    more |= pace.pace(found, loaded.tok.stop_ids) | watch.speed(processes)
    return dict(score(task, found), **more, **paper_scores(c, loaded, task, about["decoder"], len(found)))


def paper_scores(c, loaded, task, settings, n):
    """What to show beside a score on n questions: the paper's, where everything is as in the paper; else nothing."""
    of_protocol = task_settings(EvaluateOptions(protocol=c.protocol), task, loaded)
    other_prompts = c.raw or c.shots is not None or c.prompt_tokens is not None
    if not room(c) or settings != of_protocol or other_prompts:
        return {}
    return room(c).published(c, loaded.m.config, task, n)


def encode_questions(c, processes, loaded, task, questions, shots):
    """The questions as examples of distill.answer_all: dicts of id, prompt, answer, prompt_ids and record. Prompts that
    are longer than --prompt-tokens, or without it PROMPT_TOKENS of the task, are cut on the left, with a warning."""
    family, examples = loaded.m.config.family, []
    most = c.prompt_tokens or TASKS[task].PROMPT_TOKENS
    if c.prompt_tokens is None and c.protocol == "official" and family in WHOLE_PROMPTS:
        most = None
    for i, record in enumerate(questions[: c.limit]):
        text, start = TASKS[task].ask(record, family, c.protocol)
        try:
            ids = tokenizer.encode_prompt(loaded.tok, [*shots, {"role": "user", "content": text}], c.raw, start)
        except ValueError as e:
            raise ValueError(f"question {i} of {task}, counted from 0: {e}") from e
        examples.append(dict(id=i, prompt=text, answer=record.get("answer"), prompt_ids=ids, record=record))
    distill.cut_prompts(examples, most, torchrun.warner(processes), task)
    return examples


def examples_of(shots):
    """How many worked examples the turns before a question are: the answers among them."""
    return sum(turn["role"] == "assistant" for turn in shots)


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
        except Exception as e:  # the hub library raises errors of its classes, requests' and httpx's
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
    return talks.to_messages(turns, f"{path}: an earlier turn must have a role and a text content")


def grader_versions():
    """Versions that can change a score: of Python, torch, and the libraries that read mathematics and languages."""
    found = disk.versions()
    for name in ("math-verify", "latex2sympy2_extended", "antlr4-python3-runtime", "langdetect"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def versions_of(out, scores):
    """The versions that a folder's verdicts are of: where some are of an earlier call, that call's too."""
    versions = grader_versions()
    before = data.read_json(out / "results.json", missing={}).get("versions", {})
    for r, (name, version) in itertools.product(scores, before.items()):
        if r["timed"] != r["n"] and version not in str(versions.get(name)).split("; "):
            versions[name] = f"{version}; {versions.get(name)}"
    return versions


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
        result["instructions"] = int(instructions)  # that the next two are shares of
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
    titles += ["shots", "seed", "mean length", "mean steps", "tokens per pass", "tokens/s"]
    lines = [f"| {' | '.join(titles)} |", "| --- " * len(titles) + "|"]
    for r in scores:
        low, high = (f"{x:.1f}" for x in r["interval"])
        d = r["decoder"]
        if d.get("threshold") is not None:
            pace = f"threshold {d['threshold']:g}"
        else:
            pace = d.get("steps") or f"{d['tokens_per_step']} a step"
        decoding = f"{d['max_new_tokens']}, {pace}, {d['block_length'] or '-'}"
        if d.get("temperature") and not d.get("greedy"):
            decoding += ", sampled"
        paper = " / ".join(f"{x:.1f}" for x in r.get("paper", {}).values()) or "-"
        cells = [r["task"], r["n"], r["score"], f"{low} to {high}", paper, r["finished"], decoding]
        cells += [r["protocol"], r["shots"], r["seed"]]
        for name in ("mean_length", "mean_steps", "tokens_per_pass", "tokens_per_second"):
            cells.append("-" if r.get(name) is None else r[name])
        lines.append(f"| {' | '.join(map(str, cells))} |")
    for r in scores:
        if r.get("not_graded"):
            lines.append(f"{r['task']}: {r['not_graded']} of {r['n']} answers could not be graded and count as wrong")
        if r.get("timed", r["n"]) != r["n"]:
            lines.append(f"{r['task']}: tokens/s is of the {r['timed']} of {r['n']} answers that this call decoded")
    for line in dict.fromkeys(r["paper_about"] for r in scores if "paper" in r):
        lines.append(line)
    return "\n".join(lines)
