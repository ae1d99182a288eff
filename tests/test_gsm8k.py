"""GSM8K: prompts, settings and the grader: python -m pytest tests/test_gsm8k.py

Real answers with the reference verdicts are read from the folder that TABOM_DATA names, and skipped
without it.
"""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from programs import check_lengths, check_prompts, needs_data, rows

from benchmarks import gsm8k


@needs_data
def test_prompts_are_the_harnesss():
    check_prompts(gsm8k)


def test_prompts_of_opencompass():
    text = gsm8k.ask(dict(question="How many?"), "llada", "official")[0]
    assert text == "Question: How many?\nLet's think step by step\nAnswer:"


def test_settings_are_those_of_table_8():
    check_lengths(
        gsm8k, dream_paper=(256, None), dream_release=(256, None), dream_official=(256, None),
        llada_paper=(512, 8), llada_release=(256, 8), llada_official=(512, 8),
    )  # fmt: skip


def test_responses_end_at_the_first_stop():
    assert gsm8k.trim(" 5<|im_end|>\nQ: next") == " 5"
    assert gsm8k.trim(" 5\nQ: next", "llada", "release") == " 5\n"
    assert gsm8k.trim(" 5\nQ: next", "llada", "official") == " 5\nQ: next"


@needs_data
def test_gsm8k_agrees_with_the_reference():
    for row in rows("gsm8k_llada8b_graded"):
        verdict = gsm8k.grade(row, row["response"])
        assert verdict["correct"] == row["flexible_correct"], (verdict, row["flexible"])
        assert verdict["extracted"] == gsm8k.plain_number(row["flexible"])


@needs_data
def test_gsm8k_references_are_right_about_themselves():
    for row in rows("gsm8k_test"):
        assert gsm8k.grade(row, row["answer"])["correct"]
        assert gsm8k.grade(row, row["answer"], strict=True)["correct"]


numbers = st.integers(-(10**12), 10**12)


@given(numbers, st.sampled_from(["", "."]), st.sampled_from(["", "$"]), st.booleans(), st.sampled_from([" ", "\n", ""]))
def test_the_last_number_counts_however_it_is_written(n, point, currency, commas, end):
    written = f"{n:,}" if commas else str(n)
    written = written.replace("-", "-" + currency) if n < 0 else currency + written
    text = f"First 12, then 3.5 apples; so it is {written}{point}{end}"
    assert gsm8k.flexible_number(text) == str(n)
    assert gsm8k.grade({"answer": f"#### {n:,}"}, text)["correct"]
    assert not gsm8k.grade({"answer": f"#### {n + 1}"}, text)["correct"]


@given(st.text())
def test_any_text_has_a_verdict(text):
    verdict = gsm8k.grade({"answer": "#### 7"}, text)
    assert verdict["correct"] == (verdict["extracted"] == "7")
    assert set(gsm8k.grade({"answer": "7"}, text, strict=True)) == {"correct", "reason", "extracted"}


@pytest.mark.parametrize(
    "text, number",
    [
        ("It costs $1,234.50", "1234.50"), ("18.00", "18.00"), ("about -5", "-5"), ("3/4", "4"), ("so 5 - 3", "3"),
        ("7 dollars. OK.", "7"), ("x=-$3.", "-3"), ("none", None), ("", None), ("wait...", ".."),
        ("12 and, then", "12"), ("1.5.", "1.5"), ("٣", None), ("\\boxed{42}", "42"),
    ],
)  # fmt: skip
def test_flexible_extract_is_the_references_to_the_letter(text, number):
    assert gsm8k.flexible_number(text) == number


@pytest.mark.parametrize(
    "text, number",
    [
        ("#### 18", "18"), ("5 then #### -1,234.", "-1234"), ("The answer is 18.", "18"), ("The answer is 18", "18"),
        ("The answer is 3.\n#### 4", "4"), ("#### 4\n#### 5", "4"), ("the result: 18", None), ("####18", None),
    ],
)  # fmt: skip
def test_strict_needs_a_mark(text, number):
    assert gsm8k.strict_number(text) == number
