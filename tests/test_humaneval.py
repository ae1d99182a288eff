"""HumanEval: prompts, settings and the programs made of responses: python -m pytest tests/test_humaneval.py

The benchmark is read from the folder that TABOM_DATA names, and skipped without it.
"""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import emptied, fenced, judge, needs_data, off_by_one, rows

from benchmarks import execute, humaneval

LLADA = dict(family="llada", protocol="official")
SAMPLE = 20  # records in the quick test


def cases(data, **how):
    """(right or not, name, job) of programs made from the reference solutions."""
    for row in data:
        code = row["prompt"] + row["canonical_solution"]
        for text in (code, row["canonical_solution"]):
            yield True, row["task_id"], humaneval.program(row, fenced(text), **how)
        for text in (off_by_one(code), row["prompt"] + "    pass\n", emptied(code, "'''Nothing.'''"), ""):
            yield False, row["task_id"], humaneval.program(row, fenced(text), **how)


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
