"""Verdicts on responses that were made elsewhere.

python tabom.py grade --task gsm8k --responses R.jsonl --out V.jsonl
"""

from dataclasses import dataclass
from pathlib import Path

import data
import evaluate
from runs import disk, loading
from runs.options import opt


@dataclass
class GradeOptions:
    """what is graded"""

    task: str = opt(None, "the benchmark that was answered", required=True, choices=tuple(evaluate.TASKS))
    responses: str = opt(None, "JSON Lines file; each line has the benchmark's fields and a response", required=True)
    out: str = opt(None, "file for the same lines with their verdicts", required=True)
    family: str = opt("dream", "the model family whose prompts were answered", choices=tuple(loading.DECODERS))
    protocol: str = opt("paper", "whose grader judges: see evaluate --protocol", choices=evaluate.PROTOCOLS)
    as_is: bool = opt(False, "grade the whole response; without it, cut at the protocol's stop texts as in evaluate")
    math_gold: str | None = opt(
        None, "hand MATH500's reference answer to math-verify between dollar signs, or raw", choices=("latex", "raw")
    )


def grade(c):
    """Grade responses that were made elsewhere -> the score; every line is written back with its verdict.

    A line has the benchmark's fields and "response", or is of lm-evaluation-harness's --log_samples files ("doc" and
    "resps"). Raises ValueError for a line that is neither, FileExistsError for an --out that is the input."""
    out, source = Path(c.out), Path(c.responses)
    if out.exists() and source.exists() and out.samefile(source):
        raise FileExistsError(f"--out {out} is the file with the responses: choose another")
    benchmark, rows, records = evaluate.TASKS[c.task], [], []
    for where, row in data.read_rows(source):
        records.append(evaluate.checked_row(from_harness(row), where, c.task, dict(benchmark.FIELDS, response=str)))
        rows.append(row)
    if not rows:
        raise ValueError(f"{source}: no responses to grade")
    out.parent.mkdir(parents=True, exist_ok=True)
    with disk.atomic_file(out) as f:  # opened before the work: a place that cannot be written to costs nothing
        texts = []
        for record in records:
            whole = record["response"]
            texts.append(whole if c.as_is else benchmark.trim(whole, c.family, c.protocol))
        found = evaluate.verdicts(c.task, records, texts, c.family, c.protocol, c.math_gold)
        for row, verdict in zip(rows, found):
            f.write(disk.json_line({**row, **verdict}))
    return dict(evaluate.score(c.task, found), protocol=c.protocol, out=str(out))


def from_harness(row):
    """A row of a --log_samples file as the benchmark's fields and a response; any other row as it is."""
    if not isinstance(row, dict) or "response" in row or not isinstance(row.get("doc"), dict):
        return row
    response = row.get("resps")
    while isinstance(response, list) and response:  # [["text"]]: a list of requests, and one of the answers to each
        response = response[0]
    return dict(row["doc"], response=response)
