"""HumanEval: prompts, settings and the programs made of responses: python -m pytest
tests/test_humaneval.py

The benchmark is read from the folder that TABOM_DATA names, and skipped without it.
"""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import check_lengths, check_prompts, emptied, fenced, golden, judge, needs_data, off_by_one, rows

from benchmarks import execute, humaneval

LLADA = dict(family="llada", protocol="official")
SAMPLE = 10  # records in the quick test


def cases(data, **how):
    """(right or not, name, job) of programs made from the reference solutions."""
    for row in data:
        code = row["prompt"] + row["canonical_solution"]
        for text in (code, row["canonical_solution"]):
            yield True, row["task_id"], humaneval.program(row, fenced(text), **how)
        for text in (off_by_one(code), row["prompt"] + "    pass\n", emptied(code, "'''Nothing.'''"), ""):
            yield False, row["task_id"], humaneval.program(row, fenced(text), **how)


@needs_data
def test_prompts_are_the_harnesss():
    check_prompts(humaneval)


def test_prompts_of_opencompass():
    assert humaneval.ask(ROW, "llada", "official") == (f"Complete the following python code:\n{PROMPT}", "")


def test_settings_are_those_of_table_8():
    check_lengths(
        humaneval, dream_paper=(768, None), dream_release=(768, None), dream_official=(768, None),
        llada_paper=(512, 512), llada_release=(512, 512), llada_official=(512, 512),
    )  # fmt: skip
    assert humaneval.settings("llada")["suppress_eos"] == "eos" and "suppress_eos" not in humaneval.settings("dream")


def test_responses_end_at_the_first_stop():
    assert humaneval.trim("  return 1\ndef g():\nprint") == "  return 1"
    assert humaneval.trim("  return 1\nprint(1)\ndef g():") == "  return 1"
    assert humaneval.trim("  return 1\ndef g():", "llada", "official") == "  return 1\ndef g():"


MEANT = ("cheat eq", "HumanEval/50")  # an object whose __eq__ is always true; a helper that the harness drops


@pytest.mark.slow
@needs_data
def test_verdicts_are_the_harnesss():
    records = {row["task_id"]: row for row in rows("HumanEval")}
    data, jobs = golden("humaneval"), []
    for row in data:
        jobs.append(humaneval.program(records[row["task_id"]], humaneval.trim(row["response"])))
    differ = 0
    for row, result in zip(data, execute.run_many(jobs, workers=2, timeout=4)):
        if result["passed"] != row["fork"]:
            differ += 1
            assert row["kind"] in MEANT or row["task_id"] in MEANT, (row, result)
    assert differ <= 0.02 * len(data)


@needs_data
@pytest.mark.parametrize(
    "task, cheat",
    [
        (32, "def poly(xs, x):\n    return 0.0\n\ndef find_zero(xs):\n    return 0.0\n"),
        (38, "def encode_cyclic(s):\n    return s\n\ndef decode_cyclic(s):\n    return s\n"),
        (50, "def encode_shift(s):\n    return s\n\ndef decode_shift(s):\n    return s\n"),
    ],
)
def test_a_program_cannot_define_the_helpers_of_its_checks(task, cheat):
    record = rows("HumanEval")[task]
    for how in ({}, LLADA):
        assert not execute.run(*humaneval.program(record, fenced(cheat), **how))["passed"]
        assert execute.run(*humaneval.program(record, fenced(record["canonical_solution"]), **how))["passed"]


@needs_data
def test_a_sample_of_right_and_wrong_programs():
    data = rows("HumanEval")
    odd = [row for row in data if row["task_id"] in ("HumanEval/32", "HumanEval/38", "HumanEval/50")]
    found = []
    for n, row in enumerate(odd + random.Random(0).sample(data, SAMPLE)):  # wrong in one of four ways
        right, _, *wrong = cases([row], **(LLADA if n % 2 else {}))
        found += [right, wrong[n % len(wrong)]]
    judge(found)


@pytest.mark.exhaustive
@needs_data
@pytest.mark.parametrize("how", [{}, LLADA], ids=["harness", "opencompass"])
def test_all_right_and_wrong_programs(how):
    judge(cases(rows("HumanEval"), **how))


PROMPT = 'from typing import List\n\n\ndef f(x: int) -> int:\n    """ Twice x. """\n'
ROW = dict(prompt=PROMPT, entry_point="f", test="def check(candidate):\n    assert candidate(2) == 4\n")


@pytest.mark.parametrize(
    "how, text, correct",
    [
        ({}, "    return 2 * x", True),
        ({}, "    return 2 * x\n```\nThis doubles.", True),
        ({}, "Sure!\n```python\n    return 2 * x\n```", True),
        ({}, PROMPT + "    return 2 * x\n", True),
        ({}, "    return g(x)\n\ndef g(x):\n    return 2 * x\n\nprint(f(3)", True),  # the last line does not parse
        ({}, "    return 2 * x\n\nraise SystemExit\n", True),  # what f does not need is dropped
        ({}, "\treturn 2 * x", True),
        ({}, "    pass", False),
        ({}, "", False),
        (LLADA, "```python\n" + PROMPT + "    return 2 * x\n```\nand\n```python\ndef f(x): return 0\n```", True),
        (LLADA, "Here:\n\n```\ndef f(x):\n    return 2 * x\n```", True),
        (LLADA, "```python\n    return 2 * x\n```", True),
        (LLADA, "def f(x):\n    return 2 * x", True),
        (LLADA, "    return 2 * x", True),
        (LLADA, "```python\ndef f(x):\n    return 2 * x", False),  # an open fence is no block
        (LLADA, "```python\ndef f(x): return 0\n```\n```python\ndef f(x): return 2 * x\n```", False),
    ],
)
def test_which_part_of_a_response_is_the_program(how, text, correct):
    result = execute.run(*humaneval.program(ROW, text, **how))
    assert result["passed"] is correct, result


def slow_longest(lines):
    """The official loops."""
    best, most = "", 0
    for i in range(len(lines)):
        for j in range(i, len(lines)):
            code = "\n".join(lines[i : j + 1])
            n = sum(1 for line in lines[i : j + 1] if line.strip())
            if humaneval.parsed(code) and n > most:
                best, most = code, n
    return best


pieces = st.sampled_from(
    ["def f(x):", "    return x", "", "  ", "x = 1", "if x:", "    y = (", "    )", "no code here", "#"]
)


@settings(max_examples=60, deadline=None)
@given(st.lists(pieces, max_size=9))
def test_the_longest_span_is_that_of_the_official_loops(lines):
    assert humaneval.longest_parsable(lines) == slow_longest(lines)


@settings(deadline=None, max_examples=60)
@given(st.text(), st.sampled_from([{}, LLADA]))
def test_any_text_becomes_a_program(text, how):
    program, tests, names = humaneval.program(ROW, text, **how)
    assert isinstance(program, str) and humaneval.parsed(tests) and names == ["f"]


@pytest.mark.parametrize(
    "body",
    [
        "    return 2 * x" + " + 0" * 400,
        "    return " + "-" * 400 + "(2 * x)",
        "    y = ''" + ".strip()" * 400 + "\n    return 2 * x",
        "    y = [x]; return 2 * x  # \u2028 \x0c é\n",
        "    return double(x)\n\n@lambda f: f\ndef double(x): return 2 * x; \n",
    ],
)
def test_deep_programs_are_run_as_they_are(body):
    result = execute.run(*humaneval.program(ROW, body))
    assert result["passed"], result


HARD = ["-" * 100000 + "1", "(" * 100000, "a" + ".a" * 50000, "1" + " + 1" * 50000, "```\n" * 30000, "\ud800 = 1", "\0"]


@pytest.mark.parametrize("how", [{}, LLADA], ids=["harness", "opencompass"])
def test_no_text_takes_the_grader_down(how):
    for text in HARD:
        program, _, _ = humaneval.program(ROW, "    return " + text, **how)
        assert isinstance(program, str)
