"""Checks of answers: python -m pytest tests/test_evaluate.py"""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import evaluate


@pytest.mark.parametrize(
    "response, answer, verdict",
    [
        ("The answer is 72.", "... #### 72", True),
        ("#### 1,234", "#### 1234", True),
        ("so $18.00 a day", "9 * 2 = <<9*2=18>>18\n#### 18", True),
        ("first 5, then \\boxed{-3}", "\\boxed{-3}", True),
        ("12 apples and 7", "12", False),
        ("no number", "12", False),
        ("anything", "no number either", None),
        ("3/4", "\\boxed{\\frac{3}{4}}", None),  # not one number: not to be judged by its last digit
        ("72", "72 apples", None),
        ("72", None, None),
    ],
)
def test_number_check(response, answer, verdict):
    assert evaluate.check("number", response, answer) is verdict


def test_exact_and_no_check():
    assert evaluate.check("exact", " abc\n", "abc") is True
    assert evaluate.check("exact", "abd", "abc") is False
    assert evaluate.check("exact", "abc", ["x", " abc"]) is True and evaluate.check("exact", "abc", ["x", "y"]) is False
    assert evaluate.check("number", "so 7", ["x", "7"]) is True and evaluate.check("number", "7", ["x", "8"]) is None
    assert evaluate.check("none", "abc", "abc") is None
    with pytest.raises(ValueError, match="check 'fuzzy' is none of"):
        evaluate.check("fuzzy", "a", "a")


@settings(deadline=None)
@given(
    st.integers(-(10**9), 10**9),
    st.sampled_from(["{}", "{:,}", "so it is {:,}.", "#### {:,}", "\\boxed{{{}}}", "${:,}"]),
)
def test_a_number_is_found_however_it_is_written(n, form):
    if n < 0 and form.startswith("$"):
        return  # $-5 is not how anyone writes it
    assert evaluate.final_number(form.format(n)) == n
