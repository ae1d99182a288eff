"""The graders against the verdicts of the reference graders, and against programs that are right or wrong by making.

python -m pytest tests/test_graders.py
"""

import ast
import gzip
import json
import os
import random
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import evaluate
import execute

REAL = Path(os.environ.get("TABOM_DATA", "no-such-folder"))
needs_data = pytest.mark.skipif(not REAL.is_dir(), reason="TABOM_DATA names no folder")
SAMPLE = 40  # programs of each benchmark in the quick test


def rows(name):
    with gzip.open(REAL / f"{name}.jsonl.gz", "rt", encoding="utf-8") as f:
        return [json.loads(line) for line in f]


# -------------------------------------------------------------------------------------------------------------- GSM8K


@needs_data
def test_gsm8k_agrees_with_the_reference():
    for row in rows("gsm8k_llada8b_graded"):
        verdict = evaluate.gsm8k(row, row["response"])
        assert verdict["correct"] == row["flexible_correct"], (verdict, row["flexible"])
        assert verdict["extracted"] == evaluate.plain_number(row["flexible"])


@needs_data
def test_gsm8k_references_are_right_about_themselves():
    for row in rows("gsm8k_test"):
        assert evaluate.gsm8k(row, row["answer"])["correct"]
        assert evaluate.gsm8k(row, row["answer"], strict=True)["correct"]


numbers = st.integers(-(10**12), 10**12)


@given(numbers, st.sampled_from(["", "."]), st.sampled_from(["", "$"]), st.booleans(), st.sampled_from([" ", "\n", ""]))
def test_the_last_number_counts_however_it_is_written(n, point, currency, commas, end):
    written = f"{n:,}" if commas else str(n)
    written = written.replace("-", "-" + currency) if n < 0 else currency + written
    text = f"First 12, then 3.5 apples; so it is {written}{point}{end}"
    assert evaluate.flexible_number(text) == str(n)
    assert evaluate.gsm8k({"answer": f"#### {n:,}"}, text)["correct"]
    assert not evaluate.gsm8k({"answer": f"#### {n + 1}"}, text)["correct"]


@given(st.text())
def test_any_text_has_a_verdict(text):
    verdict = evaluate.gsm8k({"answer": "#### 7"}, text)
    assert verdict["correct"] == (verdict["extracted"] == "7")
    assert set(evaluate.gsm8k({"answer": "7"}, text, strict=True)) == {"correct", "reason", "extracted"}


@pytest.mark.parametrize(
    "text, number",
    [
        ("It costs $1,234.50", "1234.50"), ("18.00", "18.00"), ("about -5", "-5"), ("3/4", "4"), ("so 5 - 3", "3"),
        ("7 dollars. OK.", "7"), ("x=-$3.", "-3"), ("none", None), ("", None), ("wait...", ".."),
        ("12 and, then", "12"), ("1.5.", "1.5"), ("٣", None), ("\\boxed{42}", "42"),
    ],
)  # fmt: skip
def test_flexible_extract_is_the_references_to_the_letter(text, number):
    assert evaluate.flexible_number(text) == number


@pytest.mark.parametrize(
    "text, number",
    [
        ("#### 18", "18"), ("5 then #### -1,234.", "-1234"), ("The answer is 18.", "18"), ("The answer is 18", "18"),
        ("The answer is 3.\n#### 4", "4"), ("#### 4\n#### 5", "4"), ("the result: 18", None), ("####18", None),
    ],
)  # fmt: skip
def test_strict_needs_a_mark(text, number):
    assert evaluate.strict_number(text) == number


# ------------------------------------------------------------------------------------------------------------ MATH500


@needs_data
def test_math500_agrees_with_the_reference():
    pytest.importorskip("math_verify")
    data = rows("math500_llada8b_graded")
    wrong = [row for row in data if evaluate.math500(row, row["response"])["correct"] != row["math_verify"]]
    assert len(wrong) <= 0.005 * len(data), [(row["answer"], row["response"][-100:]) for row in wrong]


@pytest.mark.exhaustive
@needs_data
def test_math500_solutions_are_right():
    pytest.importorskip("math_verify")
    for row in rows("math500"):
        assert evaluate.math500(row, row["solution"])["correct"], row["answer"]


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
    assert evaluate.math500({"answer": gold}, text)["correct"] is correct


def test_math500_has_a_time_limit_and_recovers():
    pytest.importorskip("math_verify")
    judge = evaluate.MathJudge()
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
    return evaluate.math500({"answer": str(n)}, f"\\boxed{{{n + n % 2}}}")["correct"]


def test_math500_says_what_to_install(monkeypatch):
    monkeypatch.setattr(evaluate.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install math-verify"):
        evaluate.MathJudge()("$1$", ["$1$"], 1)


@given(st.text("\\boxed{} 12", max_size=40))
def test_last_boxed_is_a_balanced_box_of_the_text(text):
    found = evaluate.last_boxed(text)
    if found is not None:
        assert found in text and found.startswith("\\boxed") and found.endswith("}")
        assert found.count("{") - found.count("\\{") == found.count("}") - found.count("\\}")


# ------------------------------------------------------------------------------------------------- HumanEval and MBPP


class OffByOne(ast.NodeTransformer):
    def visit_Return(self, node):
        return ast.Return(ast.BinOp(node.value or ast.Constant(None), ast.Add(), ast.Constant(1)))


def off_by_one(code):
    return ast.unparse(ast.fix_missing_locations(OffByOne().visit(ast.parse(code))))


def emptied(code, body):
    tree = ast.parse(code)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            node.body = ast.parse(body).body
    return ast.unparse(tree)


def fenced(code):
    return f"Here is the completed function:\n```python\n{code}\n```\nIt works."


def humaneval_cases(data, family):
    for row in data:
        code = row["prompt"] + row["canonical_solution"]
        for text in (code, row["canonical_solution"]):
            yield True, row["task_id"], evaluate.humaneval_job(row, fenced(text), family)
        for text in (off_by_one(code), row["prompt"] + "    pass\n", emptied(code, "'''Nothing.'''"), ""):
            yield False, row["task_id"], evaluate.humaneval_job(row, fenced(text), family)


def mbpp_cases(data, family):
    for row in data:
        code, texts = row["code"], [fenced(row["code"])]
        texts += [code] if family == "dream" else [f"[BEGIN]\n '{code}' \n[DONE] \n\n "]
        for text in texts:
            yield True, row["task_id"], evaluate.mbpp_job(row, text, family)
        for text in (off_by_one(code), emptied(code, "pass"), emptied(code, "'''Nothing.'''"), ""):
            yield False, row["task_id"], evaluate.mbpp_job(row, fenced(text), family)


def mbpp_test_split():
    return [row for row in rows("mbpp") if 11 <= row["task_id"] <= 510]


def judge(cases):
    """Runs the cases; each distinct program once."""
    cases = [(right, name, (program, tests, tuple(names))) for right, name, (program, tests, names) in cases]
    jobs = list(dict.fromkeys(job for _, _, job in cases))
    results = dict(zip(jobs, execute.run_many(jobs, workers=2)))
    wrong = [(name, right, results[job]) for right, name, job in cases if results[job]["passed"] != right]
    assert not wrong, wrong


@needs_data
def test_a_sample_of_right_and_wrong_programs():
    cases = []
    for k, (data, make) in enumerate([(rows("HumanEval"), humaneval_cases), (mbpp_test_split(), mbpp_cases)]):
        sample = random.Random(k).sample(data, SAMPLE)
        odd = [row for row in data if row["task_id"] in ("HumanEval/32", "HumanEval/38", "HumanEval/50", 126, 367)]
        for n, row in enumerate(odd + sample):  # right in the one family, wrong one way in the other
            right, *wrong = make([row], ("dream", "llada")[n % 2])
            cases += [right, wrong[1 + n % (len(wrong) - 1)]]
    judge(cases)


@pytest.mark.exhaustive
@needs_data
@pytest.mark.parametrize("family", ["dream", "llada"])
def test_all_right_and_wrong_programs(family):
    judge([*humaneval_cases(rows("HumanEval"), family), *mbpp_cases(mbpp_test_split(), family)])


@pytest.mark.exhaustive
@needs_data
def test_two_hundred_programs_in_a_minute():
    jobs = [evaluate.humaneval_job(row, row["canonical_solution"]) for row in rows("HumanEval")]
    start = time.monotonic()
    execute.run_many((2 * jobs)[:200], workers=2)
    assert time.monotonic() - start < 60


PROMPT = 'from typing import List\n\n\ndef f(x: int) -> int:\n    """ Twice x. """\n'
ROW = dict(prompt=PROMPT, entry_point="f", test="def check(candidate):\n    assert candidate(2) == 4\n")
TASK = dict(text="Twice x.", code="def f(x):\n    return 2 * x", test_list=["assert f(2) == 4"], test_setup_code="")


@pytest.mark.parametrize(
    "family, text, correct",
    [
        ("dream", "    return 2 * x", True),
        ("dream", "    return 2 * x\n```\nThis doubles.", True),
        ("dream", "Sure!\n```python\n    return 2 * x\n```", True),
        ("dream", PROMPT + "    return 2 * x\n", True),
        ("dream", "    return g(x)\n\ndef g(x):\n    return 2 * x\n\nprint(f(3)", True),  # the last line does not parse
        ("dream", "    return 2 * x\n\nraise SystemExit\n", True),  # what f does not need is dropped
        ("dream", "\treturn 2 * x", True),
        ("dream", "    pass", False),
        ("dream", "", False),
        ("llada", "```python\n" + PROMPT + "    return 2 * x\n```\nand\n```python\ndef f(x): return 0\n```", True),
        ("llada", "Here:\n\n```\ndef f(x):\n    return 2 * x\n```", True),
        ("llada", "```python\n    return 2 * x\n```", True),
        ("llada", "def f(x):\n    return 2 * x", True),
        ("llada", "    return 2 * x", True),
        ("llada", "```python\ndef f(x):\n    return 2 * x", False),  # an open fence is no block
        ("llada", "```python\ndef f(x): return 0\n```\n```python\ndef f(x): return 2 * x\n```", False),
    ],
)
def test_humaneval_extraction(family, text, correct):
    verdict = evaluate.humaneval(ROW, text, execute.run, family)
    assert verdict["correct"] is correct, verdict


@pytest.mark.parametrize(
    "family, text, correct",
    [
        ("dream", "def f(x):\n    return 2 * x\n", True),
        ("dream", "def f(x):\n    return 2 * x\n```\nThis doubles.", True),
        ("dream", "Here:\n```python\ndef f(x):\n    return 2 * x\n```", True),
        ("dream", "I cannot.", False),
        ("llada", "[BEGIN]\n 'def f(x):\r\n  return 2 * x' \n[DONE] \n\n ", True),
        ("llada", "[BEGIN]\ndef f(x):\n    return 2 * x\n[DONE]", True),
        ("llada", "[BEGIN]\n```python\ndef f(x):\n    return 2 * x\n```\n[DONE]", True),
        ("llada", "[BEGIN]\ndef f(x):\n    return 2 * x", True),
        ("llada", "def f(x):\n    return 2 * x\n[DONE]", True),
        ("llada", "Here:\n```python\ndef f(x):\n    return 2 * x\n```\n```python\ndef f(x): return 0\n```", True),
        ("llada", "```\ndef f(x):\n    return 2 * x\n```", True),
        ("llada", "def f\\_g(x): return 2 * x\nf = f\\_g", True),
        ("llada", "[BEGIN]\n 'def f(x): return 0' \n[DONE]\n[BEGIN]\n 'def f(x): return 2 * x' \n[DONE]", False),
    ],
)
def test_mbpp_extraction(family, text, correct):
    verdict = evaluate.mbpp(TASK, text, execute.run, family)
    assert verdict["correct"] is correct, verdict


def test_an_unknown_family_is_an_error():
    with pytest.raises(ValueError, match="'drem'"):
        evaluate.humaneval_job(ROW, "", "drem")


def slow_longest(lines):
    """The official loops."""
    best, most = "", 0
    for i in range(len(lines)):
        for j in range(i, len(lines)):
            code = "\n".join(lines[i : j + 1])
            n = sum(1 for line in lines[i : j + 1] if line.strip())
            if evaluate.parses(code) and n > most:
                best, most = code, n
    return best


pieces = st.sampled_from(
    ["def f(x):", "    return x", "", "  ", "x = 1", "if x:", "    y = (", "    )", "no code here", "#"]
)


@settings(max_examples=60, deadline=None)
@given(st.lists(pieces, max_size=9))
def test_the_longest_span_is_that_of_the_official_loops(lines):
    assert evaluate.longest_parsable(lines) == slow_longest(lines)


@settings(deadline=None)
@given(st.text(), st.sampled_from(["dream", "llada"]))
def test_any_text_becomes_a_program(text, family):
    for program, tests, names in (evaluate.humaneval_job(ROW, text, family), evaluate.mbpp_job(TASK, text, family)):
        assert isinstance(program, str) and evaluate.parses(tests) and names == ["f"]
