"""MATH500: prompts, settings and the grader: python -m pytest tests/test_math500.py

Real answers with the reference verdicts are read from the folder that TABOM_DATA names, and skipped without it.
"""

import gzip
import json
import os
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import math500

REAL = Path(os.environ.get("TABOM_DATA", "no-such-folder"))
needs_data = pytest.mark.skipif(not REAL.is_dir(), reason="TABOM_DATA names no folder")


def rows(name):
    with gzip.open(REAL / f"{name}.jsonl.gz", "rt", encoding="utf-8") as f:
        return [json.loads(line) for line in f]


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
        start = time.monotonic()
        with pytest.raises(TimeoutError):
            judge("$5$", ["\\boxed{9^{9^{9^{9}}}}"], 1)
        assert time.monotonic() - start < 5
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
