"""MBPP: prompts, settings and the programs made of responses: python -m pytest tests/test_mbpp.py

The benchmark is read from the folder that TABOM_DATA names, and skipped without it.
"""

import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import check_lengths, check_prompts, emptied, fenced, golden, judge, needs_data, off_by_one, rows

from benchmarks import execute, mbpp

LLADA = dict(family="llada", protocol="official")
SAMPLE = 10  # records in the quick test


def cases(data, **how):
    """(right or not, name, job) of programs made from the reference solutions."""
    for row in data:
        code = row["code"]
        for text in (fenced(code), f"[BEGIN]\n '{code}' \n[DONE] \n\n " if how else code):
            yield True, row["task_id"], mbpp.program(row, text, **how)
        for text in (off_by_one(code), emptied(code, "pass"), emptied(code, "'''Nothing.'''"), ""):
            yield False, row["task_id"], mbpp.program(row, fenced(text), **how)


@needs_data
def test_prompts_are_the_harnesss():
    check_prompts(mbpp)


@needs_data
def test_prompts_of_opencompass():
    records = mbpp.rows(rows("mbpp"))
    for record, row in zip(records, golden("prompts_llada_mbpp_opencompass")):
        assert mbpp.ask(record, "llada", "official") == (row["opencompass"], "")


def test_settings_are_those_of_table_8():
    check_lengths(
        mbpp, dream_paper=(1024, None), dream_release=(512, None), dream_official=(1024, None),
        llada_paper=(256, 256), llada_release=(256, 256), llada_official=(256, 256),
    )  # fmt: skip
    assert mbpp.settings("llada")["eos_last"] == "eos" and "eos_last" not in mbpp.settings("dream")
    assert mbpp.settings("llada", "official")["eos_last"] is True  # the end of a turn too


def test_responses_end_at_the_first_stop():
    assert mbpp.trim("a = 1\n```\nmore ```") == "a = 1\n"
    assert mbpp.trim("a = 1\n```", "llada", "official") == "a = 1\n```"


def test_the_release_checks_three_asserts_without_set_up_code():
    record = dict(TASK, test_list=["assert 1", "assert 2", "assert 3", "assert 4"], test_setup_code="x = 1")
    assert mbpp.program(record, "")[1] == "x = 1\nassert 1\nassert 2\nassert 3\nassert 4"
    assert mbpp.program(record, "", protocol="release")[1] == "assert 1\nassert 2\nassert 3"


@pytest.mark.slow
@needs_data
@pytest.mark.parametrize("protocol", ["paper", "release"])
def test_verdicts_are_the_harnesss(protocol):
    records = {row["task_id"]: row for row in rows("mbpp")}
    data, jobs = golden("mbpp"), []
    for row in data:
        jobs.append(mbpp.program(records[row["task_id"]], mbpp.trim(row["response"]), protocol=protocol))
    differ = 0
    for row, result in zip(data, execute.run_many(jobs, workers=2, timeout=4)):
        if result["passed"] != row["fork"]:
            differ += 1
            needs_setup = row["task_id"] == 367 and protocol == "paper"  # the harness leaves its set-up code out
            assert row["kind"] == "cheat eq" or needs_setup, (row, result)
    assert differ <= 0.025 * len(data)


@needs_data
def test_a_module_of_the_checks_is_not_the_programs():
    (record,) = [row for row in rows("mbpp") if row["task_id"] == 596]
    cheat = "class sys:\n    getsizeof = staticmethod(lambda x: 0)\ndef tuple_size(x):\n    return 0\n"
    assert not execute.run(*mbpp.program(record, cheat))["passed"]
    assert execute.run(*mbpp.program(record, record["code"]))["passed"]


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


def slow_marked_code(text):
    """By regular expressions, two of which take time that grows with the square of the text."""
    marked = re.search(r"BEGIN\]?(.*?)\[?DONE", text, re.DOTALL)
    inner = marked[1] if marked else text
    block = re.search(r"```(?:\w*\n)?(.*?)(?:```|$)", inner, re.DOTALL)
    code = block[1] if block else re.split(r"\[?BEGIN\]?", inner, maxsplit=1)[-1]
    code = re.split(r"'?\s*\[?DONE\]?", code)[0].replace("\\_", "_").strip()
    return code if mbpp.parsed(code) else code.removeprefix("'").removesuffix("'")


pieces = st.sampled_from(
    ["[BEGIN]", "BEGIN", "[DONE]", "DONE", "```", "python\n", "'", " ", "\n", "x = 1", "[", "]", "\\_"]
)


@settings(max_examples=300)
@given(st.lists(pieces, max_size=12).map("".join))
def test_marked_code_is_what_the_expressions_find(text):
    assert mbpp.marked_code(text) == slow_marked_code(text)


@pytest.mark.parametrize("text", ["[BEGIN]" * 20000, "[BEGIN]" * 9000 + "[DONE]" * 9000, "x" + " " * 200000, "\ud800"])
def test_no_text_takes_the_grader_down(text):
    for how in ({}, LLADA):
        assert isinstance(mbpp.program(TASK, text, **how)[0], str)
