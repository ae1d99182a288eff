"""stats.py: means, errors, intervals, paired differences: python -m pytest tests/test_stats.py"""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from experiments import stats


def test_an_interval_is_students_over_the_base_models():
    values = {("a", 0): 0.5, ("a", 1): 1.5, ("b", 0): 2.0, ("b", 1): None, ("c", 0): 6.0}
    found = stats.interval(values)
    half = 4.302653 * math.sqrt(7.0 / 3)  # the 97.5 % point of t with 2 degrees of freedom, and the standard error
    assert found["mean"] == 3 and found["bases"] == dict(a=1.0, b=2.0, c=6.0)
    assert found["low"] == pytest.approx(3 - half, rel=1e-5) and found["high"] == pytest.approx(3 + half, rel=1e-5)
    assert stats.interval({("a", 0): 0.5, ("a", 1): 0.7})["low"] is None
    assert stats.interval({("a", 0): None}) is None


def test_a_paired_difference_takes_the_runs_that_both_have():
    ours = {("a", 0): 1.0, ("a", 1): 3.0, ("b", 0): 5.5, ("c", 0): 9.0, ("e", 0): None}
    theirs = {("a", 0): 0.0, ("a", 1): 1.0, ("b", 0): 2.0, ("d", 0): 70.0, ("e", 0): 1.0}
    found = stats.paired(ours, theirs)
    assert found["bases"] == dict(a=1.5, b=3.5) and found["mean"] == 2.5
    expected = scipy_stats.ttest_rel([2.0, 5.5], [0.5, 2.0]).confidence_interval()
    assert (found["low"], found["high"]) == pytest.approx((expected.low, expected.high))
    assert found["p"] == pytest.approx(scipy_stats.ttest_rel([2.0, 5.5], [0.5, 2.0]).pvalue)
    assert stats.paired(ours, {("z", 0): 1.0}) is None
    assert stats.paired(ours, {("a", 0): 0.5})["p"] is None


def test_the_model_before_training_is_compared_with_every_run_on_it():
    ours = {("a", 0): 1.0, ("a", 1): 4.0, ("b", 0): 5.5}
    before = {("a", None): 0.5, ("b", None): 1.0, ("c", None): 9.0}
    assert stats.paired(ours, before)["bases"] == dict(a=2.0, b=4.5)
    assert stats.paired(before, ours)["bases"] == dict(a=-2.0, b=-4.5)


def test_means_leave_out_what_is_not_there():
    assert stats.mean_and_error("x", [1.0, None, 3.0]) == dict(x=2.0, x_se=pytest.approx(1.0))
    assert stats.mean_and_error("x", [2.0, None]) == dict(x=2.0, x_se=None)
    assert stats.mean_and_error("x", [None]) == dict(x=None, x_se=None)
    assert stats.mean_and_spread([1.0, None, 3.0]) == dict(mean=2.0, sd=pytest.approx(2**0.5), values=[1.0, None, 3.0])
    assert stats.mean_and_spread([]) == dict(mean=None, sd=None, values=[])


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=20))
def test_the_error_of_a_mean_is_its_spread_over_the_root_of_n(values):
    error = stats.mean_and_error("x", values)["x_se"]
    spread = stats.mean_and_spread(values)["sd"]
    assert error == pytest.approx(spread / math.sqrt(len(values)), rel=1e-6, abs=1e-6)


def test_a_table_of_markdown():
    table = stats.markdown_table(["a", "b"], [["1", "2"], ["3", ""]])
    assert table == "| a | b |\n| --- | --- |\n| 1 | 2 |\n| 3 |  |"
