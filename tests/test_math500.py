"""MATH500: prompts, settings and the grader: python -m pytest tests/test_math500.py

Real answers with the reference verdicts are read from the folder that TABOM_DATA names, and skipped
without it.
"""

import re
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import check_lengths, check_prompts, golden, needs_data, rows

from benchmarks import math500


@needs_data
def test_prompts_are_the_harnesss():
    check_prompts(math500)


def test_prompts_of_opencompass():
    text = math500.ask(dict(problem="1+1"), "llada", "official")[0]
    assert text == "1+1\nPlease reason step by step, and put your final answer within \\boxed{}."


def test_settings_are_those_of_table_8():
    check_lengths(
        math500, dream_paper=(512, None), dream_release=(512, None), dream_official=(512, None),
        llada_paper=(512, 64), llada_release=(512, 64), llada_official=(512, 64),
    )  # fmt: skip


def test_responses_end_at_the_first_stop():
    assert math500.trim("5 Problem: 2") == "5 "
    assert math500.trim("5 Problem: 2", "llada", "official") == "5 Problem: 2"


@pytest.mark.slow
@pytest.mark.parametrize("gold, key, share", [("latex", "harness", 0), ("raw", "fork", 0.01)])
def test_verdicts_are_the_harnesss(gold, key, share):
    """But for what we mean to do otherwise, the last of several boxes; and for "%", "$" and commas,
    which differ from version to version of what math-verify stands on."""
    pytest.importorskip("math_verify")
    compared, differ = 0, []
    for row in golden("math500"):
        text = row["answer"] + row["response"]
        if row["kind"] != "two boxed, last right" and not re.search(r"%|\\\$|\d,", text):
            compared += 1
            verdict = math500.grade(row, row["response"], gold=gold)
            if verdict["correct"] != row[key]:
                differ.append((row, verdict))
    assert compared > 650
    assert len(differ) <= share * compared, differ


def test_the_release_hands_over_the_gold_answer_raw():
    pytest.importorskip("math_verify")
    row = dict(answer="\\sqrt{2}")  # without "$" its only number is read: 2
    assert math500.grade(row, "\\boxed{\\sqrt{2}}")["correct"]
    assert not math500.grade(row, "\\boxed{\\sqrt{2}}", protocol="release")["correct"]
    assert math500.grade(row, "\\boxed{\\sqrt{2}}", protocol="release", gold="latex")["correct"]
    with pytest.raises(ValueError, match="gold 'LaTeX' is neither"):
        math500.grade(row, "", gold="LaTeX")


@needs_data
def test_math500_agrees_with_the_reference():
    pytest.importorskip("math_verify")
    data = rows("math500_llada8b_graded")
    wrong = [row for row in data if math500.grade(row, row["response"])["correct"] != row["math_verify"]]
    assert len(wrong) <= 0.005 * len(data), [(row["answer"], row["response"][-100:]) for row in wrong]


@pytest.mark.exhaustive
@needs_data
def test_math500_solutions_are_right():
    pytest.importorskip("math_verify")
    for row in rows("math500"):
        assert math500.grade(row, row["solution"])["correct"], row["answer"]


@pytest.mark.parametrize(
    "gold, text, correct",
    [
        ("\\frac{1}{2}", "so \\boxed{0.5}", True), ("2", "\\boxed{1}, no: \\boxed{2}", True),
        ("1", "\\boxed{1}, no: \\boxed{2}", False), ("1,2", "$\\boxed{1}$ and $\\boxed{2}$", True),
        ("\\pi", "it is $\\pi$: \\boxed{}", True), ("3", "it is $3$", True), ("3", "", False), ("3", "none", False),
        ("2", "\\boxed{2} and \\boxed{3", True),
    ],
)  # fmt: skip
def test_math500_takes_the_last_box_or_else_the_text(gold, text, correct):
    pytest.importorskip("math_verify")
    assert math500.grade({"answer": gold}, text)["correct"] is correct


def test_math500_has_a_time_limit_and_recovers():
    pytest.importorskip("math_verify")
    judge = math500.MathJudge()
    try:
        assert judge("$3$", ["$3$"], 20) == [True, "3"]
        with pytest.raises(TimeoutError):
            judge("$5$", ["\\boxed{9^{9^{9^{9}}}}"], 1)
        assert judge("$3$", ["$4$"], 20) == [False, "4"]
        judge.process.kill()
        with pytest.raises((ChildProcessError, BrokenPipeError)):
            judge("$3$", ["$3$"], 20)
        assert judge("$3$", ["$3$"], 20)[0]
    finally:
        judge.close()


def test_math500_works_in_threads():
    pytest.importorskip("math_verify")
    found = []
    work = [threading.Thread(target=lambda n=n: found.append((n, grade(n)))) for n in range(8)]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    assert sorted(found) == [(n, n % 2 == 0) for n in range(8)]


def grade(n):
    return math500.grade({"answer": str(n)}, f"\\boxed{{{n + n % 2}}}")["correct"]


def test_a_reference_that_math_verify_cannot_read_has_no_verdict():
    pytest.importorskip("math_verify")
    verdict = math500.grade(dict(answer="\u043d\u0435\u0442"), "\\boxed{5}")
    assert verdict["correct"] is None and verdict["reason"].startswith("not graded (math-verify cannot read")
    assert math500.grade(dict(answer="\u043d\u0435\u0442"), "\\boxed{5}", protocol="release")["correct"] is False
    assert math500.grade(dict(answer="5"), "\u043d\u0435\u0442")["correct"] is False


def test_math500_says_what_to_install(monkeypatch):
    monkeypatch.setattr(math500.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install math-verify"):
        math500.MathJudge()("$1$", ["$1$"], 1)


@given(st.text("\\boxed{} 12", max_size=40))
def test_last_boxed_is_a_balanced_box_of_the_text(text):
    found = math500.last_boxed(text)
    if found is not None:
        assert found in text and found.startswith("\\boxed") and found.endswith("}")
        assert found.count("{") - found.count("\\{") == found.count("}") - found.count("\\}")


def slow_last_boxed(text):
    """Each box by counting the braces after it."""
    spans = []
    for start in re.finditer(r"\\boxed\s*\{", text):
        depth = 0
        for brace in re.finditer(r"(?<!\\)[{}]", text[start.start() :]):
            depth += 1 if brace[0] == "{" else -1
            if depth == 0:
                spans.append((start.start(), start.start() + brace.end()))
                break
    if not spans:
        return None
    first, end = spans[-1]
    for before in reversed(spans[:-1]):
        if re.fullmatch(r"[\s$]*(,|,?\s*and|,?\s*or)[\s$]*", text[before[1] : first]):
            first = before[0]
    return text[first:end]


pieces = st.sampled_from(["\\boxed{", "\\boxed ", "{", "}", "\\{", "\\}", "1", ",", " and ", " or ", "$", "\n", "so"])


@settings(max_examples=300)
@given(st.lists(pieces, max_size=14).map("".join))
def test_last_boxed_is_what_counting_finds(text):
    assert math500.last_boxed(text) == slow_last_boxed(text)


@pytest.mark.parametrize(
    "text", ["\\boxed{" * 6000 + "3" + "}" * 6000, "\\boxed{" * 6000 + "3", "\\boxed{\ud800}", "\\boxed{1} " * 9000]
)
def test_no_text_takes_the_grader_down(text):
    """Nested boxes took minutes, and a lone surrogate cannot be written to a file."""
    pytest.importorskip("math_verify")
    verdict = math500.grade(dict(answer="3"), text)
    assert verdict["correct"] in (True, False)
    assert str(verdict).encode()
