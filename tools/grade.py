"""Verdicts on responses that were made elsewhere.

python tabom.py grade --task gsm8k --responses R.jsonl --out V.jsonl

A line has the benchmark's fields and "response", or is of lm-evaluation-harness's --log_samples files. That harness
writes a question once for each filter, and all its repeats into one line: one filter is graded, every repeat is, and
each question counts once. A program is taken whole where a response holds the asked function itself (HumanEval, MBPP);
any other response continues the prompt, and is cut as in evaluate.
"""

import contextlib
import json
import re
import sys
import textwrap
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import data
import evaluate
from benchmarks import humaneval
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
    filter: str | None = opt(
        None,
        "of lm-evaluation-harness's files: the filter whose lines are graded (GSM8K: flexible-extract; else the first)",
    )
    math_gold: str | None = opt(
        None, "hand MATH500's reference answer to math-verify between dollar signs, or raw", choices=("latex", "raw")
    )


class Response(NamedTuple):
    """One response to a question."""

    row: dict  # the line of the file
    record: dict  # the benchmark's fields
    text: str
    question: str  # equal for all responses to a question


def grade(c):
    """Grade responses that were made elsewhere -> the score; every line of the filter that is graded is written back
    with its verdict, once for each of its responses.

    Raises ValueError for a line that is neither the benchmark's nor the harness's, or for a filter that the file lacks,
    FileExistsError for an --out that is the input."""
    out, source = Path(c.out), Path(c.responses)
    if out.exists() and source.exists() and out.samefile(source):
        raise FileExistsError(f"--out {out} is the file with the responses: choose another")
    rows = list(data.read_rows(source))
    if not rows:
        raise ValueError(f"{source}: no responses to grade")
    chosen = choose_filter(c, source, [row for _, row in rows])
    responses = []
    for where, row in rows:
        if chosen is None or filter_of(row) in (None, chosen):
            responses += responses_of(c.task, where, row)
    questions = [r.question for r in responses]
    say_what_was_read(source, len(rows), questions, chosen)
    out.parent.mkdir(parents=True, exist_ok=True)
    with disk.atomic_file(out) as f:  # opened before the work: a place that cannot be written to costs nothing
        found, programs = judge(c, responses, chosen)
        times, seen = Counter(questions), Counter()
        for r, verdict in zip(responses, found):
            repeat = dict(repeat=seen[r.question]) if times[r.question] > 1 else {}
            seen[r.question] += 1
            f.write(disk.json_line({**r.row, **repeat, **verdict}))
    result = dict(evaluate.score(c.task, found, questions), **programs)
    if len(responses) > result["n"]:
        result["responses"] = len(responses)
    if chosen is not None:
        result["filter"] = chosen
    return dict(result, protocol=c.protocol, out=str(out))


def judge(c, responses, chosen):
    """The verdicts on responses, and counts: whole programs, and responses that the cut left without a function."""
    benchmark, found, lost = evaluate.TASKS[c.task], [None] * len(responses), 0
    more = {}
    if c.task == "math500":
        more = dict(gold=c.math_gold)
    elif c.task == "gsm8k":
        more = dict(strict=chosen == "strict-match")
    whole, rest = {}, {}  # number of a response -> what is graded of it
    for i, r in enumerate(responses):
        text = r.text
        if hasattr(benchmark, "defines"):
            text = ended(text)
            program = None
            with contextlib.suppress(*evaluate.FAULTS):  # of a record, of which verdicts() tells
                program = whole_program(benchmark, r.record, text)
            if program is not None:
                whole[i] = program
                continue
        rest[i] = text if c.as_is else benchmark.trim(text, c.family, c.protocol)
    for texts, how in ((whole, dict(whole=True)), (rest, more)):
        records = [responses[i].record for i in texts]
        judged = evaluate.verdicts(c.task, records, list(texts.values()), c.family, c.protocol, **how)
        for i, verdict in zip(texts, judged):
            found[i] = verdict
    if not hasattr(benchmark, "defines"):
        return found, {}
    for i, text in rest.items():
        lost += text != ended(responses[i].text) and without_function(text, found[i])
    if lost:
        what = f"of {lost} of {len(responses)} responses the cut at a stop text leaves nothing, or no function"
        say(f"{what}: they count as wrong; --as-is grades all of a response")
    return found, dict(whole_programs=len(whole), cut_to_nothing=lost)


def say(line):
    print(f"grade: {line}", file=sys.stderr)


# ---------------------------------------------------------------------------------------------------- what is read


def filter_of(row):
    """The harness's filter that a line is of, or None."""
    name = row.get("filter") if isinstance(row, dict) and "doc_id" in row else None
    return name if name is None or isinstance(name, str) else json.dumps(name)


def choose_filter(c, source, rows):
    """The filter whose lines are graded: the one asked for, else the one that GSM8K's grader is, else the first. None
    for a file without filters. Raises ValueError for a filter that the file lacks."""
    names = list(dict.fromkeys(filter_of(row) for row in rows if filter_of(row) is not None))
    if c.filter is not None and c.filter not in names:
        raise ValueError(f"--filter {c.filter}: {source} has {', '.join(map(str, names)) or 'no filters'}")
    if not names or c.filter is not None:
        return c.filter
    return "flexible-extract" if "flexible-extract" in names else names[0]


def responses_of(task, where, row):
    """The responses of a line: one, or the repeats of a harness's line or of a list. Raises ValueError with its place
    for a line that lacks something."""
    fields = dict(evaluate.TASKS[task].FIELDS, response=[str])
    record = evaluate.checked_row(with_responses(row), where, task, fields)
    question = where
    if "doc_id" in row:
        question = json.dumps([row["doc_id"], [record[name] for name in evaluate.TASKS[task].FIELDS]], default=str)
    return [Response(row, record, text, question) for text in record["response"]]


def with_responses(row):
    """A line as the benchmark's fields and a list of responses; one that has none as it is."""
    if not isinstance(row, dict):
        return row
    if "response" in row or not isinstance(row.get("doc"), dict):
        response = row.get("response")
        return dict(row, response=[response] if isinstance(response, str) else response)
    return dict(row["doc"], response=flat(row.get("resps")))  # [["text", "text"]]: requests, and the answers to each


def flat(value):
    """The entries of nested lists, in order."""
    found, stack = [], [value]
    while stack:
        one = stack.pop()
        if isinstance(one, list):
            stack += reversed(one)
        else:
            found.append(one)
    return found


def say_what_was_read(source, lines, questions, chosen):
    times = Counter(questions)
    repeats = sorted(set(times.values()))
    what = f"{source}: {lines} lines, {len(times)} questions"
    if repeats != [1]:
        what += f", {len(questions)} responses ({repeats[0]} to {repeats[-1]} a question, which count by their mean)"
    if chosen is not None:
        what += f", filter {chosen}"
    say(what)


# ---------------------------------------------------------------------------------------------------- whole programs

ENDS = re.compile(r"<\|(?:endoftext|im_end|eot_id|end_of_text|eom_id|eos|end|role_end|end_of_turn)\|>.*", re.DOTALL)
LAST = re.compile(r"(?:(?:</s>|<eos>|<end_of_turn>)\s*)+\Z")  # which a program may hold as text before its end


def ended(text):
    """A response up to the token that ends it, with plain line ends."""
    return LAST.sub("", ENDS.sub("", text.replace("\r\n", "\n")))


def whole_program(benchmark, record, text):
    """The program of a response that holds the asked function itself: all of it, its first fenced block with the
    function, or the lines of it that are Python. None for one that continues the prompt, and where the function is
    missing."""
    if benchmark.defines(record, text):
        return text
    if benchmark.continues(text):
        return None
    for code in fenced_blocks(text):
        if benchmark.defines(record, code):
            return code
    if "def " not in text:
        return None
    code = humaneval.longest_parsable(text.split("\n")[: humaneval.MAX_LINES])
    return code if benchmark.defines(record, code) else None


def fenced_blocks(text):
    """The blocks between lines of ``` or ~~~, whatever name they have; the last one may be open."""
    blocks, fence = [], None
    for line in text.split("\n"):
        opens = re.match(r"\s*(```|~~~)", line)
        if fence is None:
            if opens:
                fence = opens[1]
                blocks.append([])
            continue
        code, closes, _ = line.partition(fence)
        if code.strip() or not closes:
            blocks[-1].append(code)
        if closes:
            fence = None
    return [textwrap.dedent("\n".join(block)) for block in blocks]


def without_function(text, verdict):
    """Whether what was graded of a response has no function to be called."""
    missing = ("NameError: name", "SyntaxError", "IndentationError")
    return not text.strip() or verdict["reason"].startswith(missing)
