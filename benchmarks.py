"""The five benchmarks of the TABOM paper: their prompts, settings, grading and scores.

    torchrun --nproc_per_node 8 tabom.py evaluate --model M --tasks gsm8k,math500 --out out/E    # run() below
    python tabom.py grade --task gsm8k --responses R.jsonl --out V.jsonl                        # grade() below

Prompts and settings are those of the official evaluations: Dream's fork of lm-evaluation-harness (zero-shot), and
OpenCompass for LLaDA, whose earlier turns for GSM8K and MBPP are not ours to ship (--shots takes them from a file).
"""

import hashlib
import json
from pathlib import Path

import data
import evaluate
import options
import runs
import tabom

# ------------------------------------------------------------------------------------------------ data and settings

SOURCES = {  # task -> the file in --data; the dataset on the Hub and the file there
    "gsm8k": ("gsm8k_test.jsonl.gz", "openai/gsm8k", "main/test-00000-of-00001.parquet"),
    "math500": ("math500.jsonl.gz", "HuggingFaceH4/MATH-500", "test.jsonl"),
    "humaneval": ("HumanEval.jsonl.gz", "openai/openai_humaneval", "openai_humaneval/test-00000-of-00001.parquet"),
    "mbpp": ("mbpp.jsonl.gz", "google-research-datasets/mbpp", "full/test-00000-of-00001.parquet"),
    "ifeval": ("ifeval.jsonl.gz", "google/IFEval", "ifeval_input_data.jsonl"),
}
FIELDS = {  # what a record needs to be graded: types, and lists, not empty, of a type
    "gsm8k": dict(answer=str),
    "math500": dict(answer=str),
    "humaneval": dict(prompt=str, entry_point=str, test=str),
    "mbpp": dict(test_list=[str]),
    "ifeval": dict(instruction_id_list=[str], kwargs=[(dict, type(None))]),
}
ASKED = {  # what it needs besides to be asked
    "gsm8k": dict(question=str),
    "math500": dict(problem=str),
    "humaneval": {},
    "mbpp": dict(text=str, task_id=int),
    "ifeval": dict(prompt=str),
}
# Table 8 of the paper: new tokens, which are also the steps; LLaDA decodes in blocks.
TOKENS = {
    "dream": dict(gsm8k=256, math500=512, humaneval=768, mbpp=1024, ifeval=1280),
    "llada": dict(gsm8k=512, math500=512, humaneval=512, mbpp=256, ifeval=512),
}
BLOCKS = {
    "dream": dict.fromkeys(options.TASKS),
    "llada": dict(gsm8k=8, math500=64, humaneval=512, mbpp=256, ifeval=512),
}
LONGEST_PROMPT = 1024  # tokens; Dream's evaluation cuts longer ones on the left


def read_records(task, folder=None):
    """The rows of a benchmark from a folder of its files, else from the Hub. MBPP: its test split, task 11 to 510."""
    name, repo, file = SOURCES[task]
    if folder is not None:
        path = Path(folder) / name
    else:
        from huggingface_hub import hf_hub_download

        try:
            path = Path(hf_hub_download(repo, file, repo_type="dataset"))
        except Exception as e:  # the hub library raises its own, requests' and httpx's errors
            raise FileNotFoundError(
                f"{task}: no download of {repo} from the Hub ({type(e).__name__}); use --data"
            ) from e
    wanted = {**FIELDS[task], **ASKED[task]}
    rows = [checked(row, where, task, wanted) for where, row in data.read_rows(path)]
    rows = [r for r in rows if 11 <= r["task_id"] <= 510] if task == "mbpp" else rows
    if not rows:
        raise ValueError(f"{path}: no questions of {task}")
    return rows


def checked(row, where, task, wanted):
    """The row, if it has the wanted fields. Raises ValueError with its place and what is missing."""

    def fits(value, kind):
        if not isinstance(kind, list):
            return isinstance(value, kind)
        return isinstance(value, list) and bool(value) and all(isinstance(one, kind[0]) for one in value)

    wrong = [k for k, kind in wanted.items() if not isinstance(row, dict) or not fits(row.get(k), kind)]
    if wrong:
        raise ValueError(f"{where}: {', '.join(wrong)} missing or of another type; {task} needs {', '.join(wanted)}")
    return row


def read_shots(path, task):
    """The earlier turns of a task: a JSON list of chat messages, or an object with such a list for each task."""
    if path is None:
        return []
    try:
        turns = json.loads(Path(path).read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as e:
        raise ValueError(f"{path}: not valid JSON ({e})") from e
    turns = turns.get(task, []) if isinstance(turns, dict) else turns
    if not isinstance(turns, list) or not all(isinstance(t, dict) and {"role", "content"} <= t.keys() for t in turns):
        raise ValueError(f"{path}: the earlier turns must be a list of messages with a role and a content")
    return turns


# ---------------------------------------------------------------------------------------------------------- prompts

MBPP = "You are an expert Python programmer, and here is your task: {text} Your code should pass these tests:\n\n"
COMPLETED = "Here is the completed function:\n```python\n"


def ask(task, family, r):
    """(user turn, start of the answer): the question of a record, and text that the assistant's turn already holds."""
    if task == "ifeval":
        return r["prompt"], ""
    if family == "llada":
        return ask_llada(task, r), ""
    if task == "gsm8k":
        return f"Q: {r['question']}\nA:", ""
    if task == "math500":
        return f"Problem:\n{r['problem']}\n\nSolution:", ""
    if task == "humaneval":
        text = "Write a solution to the following problem and make sure that it passes the tests:\n```"
        return text + r["prompt"], f"{COMPLETED}{r['prompt']}\n"
    return MBPP.format(text=r["text"]) + "\n".join(r["test_list"][:3]), COMPLETED


def ask_llada(task, r):
    if task == "gsm8k":
        return f"Question: {r['question']}\nLet's think step by step\nAnswer:"
    if task == "math500":
        return f"{r['problem']}\nPlease reason step by step, and put your final answer within \\boxed{{}}."
    if task == "humaneval":
        return f"Complete the following python code:\n{r['prompt']}"
    return MBPP.format(text=r["text"]) + f" {r['test_list']}  \n"


STOPS = dict(  # Dream's evaluation ends a response at the first of these; LLaDA's takes it whole
    gsm8k=("Q:", "</s>", "<|im_end|>"),
    math500=("Problem:",),
    humaneval=("\nclass", "\ndef", "\n#", "\nif", "\nprint"),
    mbpp=("```",),
    ifeval=(),
)


def trim(task, family, text):
    """The text up to the first stop of its benchmark."""
    ends = [text.find(stop) for stop in STOPS[task] if stop in text] if family == "dream" else []
    return text[: min(ends, default=None)]


# ---------------------------------------------------------------------------------------------------------- grading


def verdicts(task, family, records, responses):
    """A dict with correct and reason (IFEval: strict and loose, a boolean for each instruction) for every response.
    Raises ValueError for a record that makes no sense, such as a test that is no Python."""

    def each(work, *more):
        found = []
        for record, response in zip(records, responses):
            try:
                found.append(work(record, response, *more))
            except (TypeError, AttributeError, KeyError, SyntaxError) as e:
                raise ValueError(f"{task}: no sense in a record ({type(e).__name__}: {e}): {record!r:.200}") from e
        return found

    if task == "ifeval":
        import ifeval

        return [dict(correct=all(v["strict"]), **v) for v in each(ifeval.grade)]
    if task in ("humaneval", "mbpp"):
        import execute

        results = execute.run_many(each(evaluate.humaneval_job if task == "humaneval" else evaluate.mbpp_job, family))
        return [dict(correct=r["passed"], reason=r["reason"]) for r in results]
    return each(evaluate.gsm8k if task == "gsm8k" else evaluate.math500)


def score(task, found):
    """Accuracy in percent with its 95 % Wilson interval; for IFEval (prompt level, strict) also its other three."""
    right, n = sum(v["correct"] is True for v in found), len(found)
    result = dict(task=task, n=n, correct=right, score=round(100 * right / n, 2), interval=evaluate.wilson(right, n))
    if task == "ifeval":
        strict, loose = ([x for v in found for x in v[kind]] for kind in ("strict", "loose"))
        result["prompt_loose"] = round(100 * sum(all(v["loose"]) for v in found) / n, 2)
        result["instruction_strict"] = round(100 * sum(strict) / len(strict), 2)
        result["instruction_loose"] = round(100 * sum(loose) / len(loose), 2)
    return result


def grade(c):
    """Grade the responses of a file and write each line back with its verdict -> the score. c: options.GradeOptions."""
    rows = []
    for where, row in data.read_rows(c.responses):
        rows.append(checked(row, where, c.task, dict(FIELDS[c.task], response=str)))
    if not rows:
        raise ValueError(f"{c.responses}: no responses to grade")
    found = verdicts(c.task, c.family, rows, [row["response"] for row in rows])
    out = Path(c.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with runs.atomic_file(out) as f:
        f.writelines(json.dumps({**row, **v}, ensure_ascii=False) + "\n" for row, v in zip(rows, found))
    return dict(score(c.task, found), out=str(out))


# -------------------------------------------------------------------------------------------------------------- run


def run(c, ranks=None):
    """Answer and grade the questions of every task -> the scores. c: options.EvaluateOptions.

    out/TASK/ holds the trajectories of the answers with their verdicts; out/results.json the scores and settings."""
    unknown = [t for t in c.tasks if t not in options.TASKS]
    if unknown:
        raise ValueError(f"--tasks {','.join(unknown)}: known are {', '.join(options.TASKS)}")
    ranks = ranks or runs.Ranks(c.device)
    questions = {task: read_records(task, c.data) for task in c.tasks}
    shots = {task: read_shots(c.shots, task) for task in c.tasks}
    m, tok, folder = runs.load_model(c, ranks, c.adapter)
    identity = runs.identity(c, folder, c.adapter)
    out = Path(c.out or f"out/evaluate-{digest(identity)[:8]}")
    results = []
    for task, rows in questions.items():
        settings = decoder(c, task, m.config.family, folder)
        results.append(run_task(c, ranks, m, tok, identity, task, rows, shots[task], settings, out / task))
    if ranks.first:
        shown = dict(command=vars(c) | dict(tasks=list(c.tasks)), scores=results, versions=runs.versions())
        with runs.atomic_file(out / "results.json") as f:
            f.write(json.dumps(shown, indent=2) + "\n")
        if ranks.shows:
            print(table(results))
    return dict(out=str(out), scores=results)


def decoder(c, task, family, folder):
    """Table 8's settings of a task, with what the command line changes."""
    tokens = c.max_new_tokens or TOKENS[family][task]
    preset = dict(max_new_tokens=tokens, steps=tokens, block_length=BLOCKS[family][task])
    return options.decoder(c, family, folder, preset)


def run_task(c, ranks, m, tok, identity, task, questions, shots, settings, out):
    family, examples, records = m.config.family, [], questions[: c.limit]
    for i, record in enumerate(records):
        text, start = ask(task, family, record)
        ids = tok.encode(tok.chat([*shots, {"role": "user", "content": text}]) + start)
        ids = ids[-LONGEST_PROMPT:] if family == "dream" else ids
        examples.append(dict(id=i, prompt=text, answer=record.get("answer"), prompt_ids=ids, record=record))
    meta = dict(
        command="evaluate",
        task=task,
        **identity,
        decoder=settings,
        dtype=runs.resolve_dtype(c, ranks),
        seed=c.seed,
        limit=c.limit,
        shots=len(shots),
        questions_sha256=digest(questions),
        shots_sha256=digest(shots),
        versions=runs.versions(),
    )
    out = runs.open_run(out, meta, ranks, free=("limit",))

    def judge(batch, texts):
        texts = [trim(task, family, text) for text in texts]
        found = verdicts(task, family, [e["record"] for e in batch], texts)
        return [dict(v, response=text) for v, text in zip(found, texts)]

    tabom.decode_all(c, ranks, m, tok, examples, settings, out, judge)
    found = data.read_trajectories(out)[: len(records)]
    finished = round(100 * sum(r["finished"] for r in found) / len(found), 2)
    return dict(score(task, found), finished=finished, shots=len(shots), decoder=settings, seed=c.seed)


def digest(rows):
    return hashlib.sha256(json.dumps(rows, default=str).encode()).hexdigest()


def table(results):
    lines = ["| task | n | score % | 95 % interval | finished % | tokens, steps, block | shots |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")
    for r in results:
        low, high = (f"{100 * x:.1f}" for x in r["interval"])
        d = r["decoder"]
        decoding = f"{d['max_new_tokens']}, {d['steps']}, {d['block_length'] or '-'}"
        lines.append(
            f"| {r['task']} | {r['n']} | {r['score']} | {low} to {high} | {r['finished']} | {decoding} | {r['shots']} |"
        )
    return "\n".join(lines)
