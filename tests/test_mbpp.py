"""MBPP: prompts, settings and the programs made of responses: python -m pytest tests/test_mbpp.py

The benchmark is read from the folder that TABOM_DATA names, and skipped without it.
"""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import emptied, fenced, judge, needs_data, off_by_one, rows

from benchmarks import execute, mbpp

LLADA = dict(family="llada", protocol="official")
SAMPLE = 20  # records in the quick test


def cases(data, **how):
    """(right or not, name, job) of programs made from the reference solutions."""
    for row in data:
        code = row["code"]
        for text in (fenced(code), f"[BEGIN]\n '{code}' \n[DONE] \n\n " if how else code):
            yield True, row["task_id"], mbpp.program(row, text, **how)
        for text in (off_by_one(code), emptied(code, "pass"), emptied(code, "'''Nothing.'''"), ""):
            yield False, row["task_id"], mbpp.program(row, fenced(text), **how)


@needs_data
def test_a_sample_of_right_and_wrong_programs():
    data = mbpp.rows(rows("mbpp"))
    assert len(data) == 500
    odd = [row for row in data if row["task_id"] in (126, 367)]
    found = []
    for n, row in enumerate(odd + random.Random(0).sample(data, SAMPLE)):  # wrong in one of four ways
        right, _, *wrong = cases([row], **(LLADA if n % 2 else {}))
        found += [right, wrong[n % len(wrong)]]
    judge(found)


@pytest.mark.exhaustive
@needs_data
@pytest.mark.parametrize("how", [{}, LLADA], ids=["harness", "opencompass"])
def test_all_right_and_wrong_programs(how):
    judge(cases(mbpp.rows(rows("mbpp")), **how))


TASK = dict(text="Twice x.", code="def f(x):\n    return 2 * x", test_list=["assert f(2) == 4"], test_setup_code="")


@pytest.mark.parametrize(
    "how, text, correct",
    [
        ({}, "def f(x):\n    return 2 * x\n", True),
        ({}, "def f(x):\n    return 2 * x\n```\nThis doubles.", True),
        ({}, "Here:\n```python\ndef f(x):\n    return 2 * x\n```", True),
        ({}, "I cannot.", False),
        (LLADA, "[BEGIN]\n 'def f(x):\r\n  return 2 * x' \n[DONE] \n\n ", True),
        (LLADA, "[BEGIN]\ndef f(x):\n    return 2 * x\n[DONE]", True),
        (LLADA, "[BEGIN]\n```python\ndef f(x):\n    return 2 * x\n```\n[DONE]", True),
        (LLADA, "[BEGIN]\ndef f(x):\n    return 2 * x", True),
        (LLADA, "def f(x):\n    return 2 * x\n[DONE]", True),
        (LLADA, "Here:\n```python\ndef f(x):\n    return 2 * x\n```\n```python\ndef f(x): return 0\n```", True),
        (LLADA, "```\ndef f(x):\n    return 2 * x\n```", True),
        (LLADA, "def f\\_g(x): return 2 * x\nf = f\\_g", True),
        (LLADA, "[BEGIN]\n 'def f(x): return 0' \n[DONE]\n[BEGIN]\n 'def f(x): return 2 * x' \n[DONE]", False),
    ],
)
def test_which_part_of_a_response_is_the_program(how, text, correct):
    result = execute.run(*mbpp.program(TASK, text, **how))
    assert result["passed"] is correct, result


@settings(deadline=None, max_examples=60)
@given(st.text(), st.sampled_from([{}, LLADA]))
def test_any_text_becomes_a_program(text, how):
    program, tests, names = mbpp.program(TASK, text, **how)
    assert isinstance(program, str) and mbpp.parsed(tests) and names == ["f"]
