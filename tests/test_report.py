"""report.py: intervals, differences, tables: python -m pytest tests/test_report.py"""

import math

import pytest
from scipy import stats as scipy_stats

from experiments import report, stats


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


def test_a_cell_shows_its_interval():
    value = dict(mean=-1.234, low=-2.0, high=0.5, bases=dict(a=-1.5, b=-1.0))
    assert report.shown(value) == "-1.2 [-2.0, 0.5]"
    assert report.shown(dict(value, p=0.0314), 2, "+") == "-1.23 [-2.00, +0.50], p 0.031 (-1.50 -1.00)"
    assert report.shown(dict(mean=3.0, low=None, high=None, bases=dict(a=3.0), p=None)) == "3.0"
    assert report.shown(None) == "-"


def result(row, base, seed, right, inside=0.5):
    scores = dict(accuracy=right, tds=0.1, rank=0.2, rank_least=0.05, inversions_step=inside, inversions_window=0.1)
    scores.update(per_step=[0.1, 0.3])
    names = [f"x/{k}.jsonl{more}" for k in ("test_in", "test_out") for more in ("", ", 2 a step")]
    tests = {name: dict(scores, accuracy=right / 2 if "2 a" in name else right) for name in names}
    styles = dict(test_in=dict(foreign=0.25, own_right=right), test_out=dict(foreign=1.0, own_right=None))
    common = dict(row=row, base=base, tests=tests, chosen=dict(accuracy=right), styles=styles)
    if row == "base":
        return {("base", base, None): dict(common, seed=seed, puzzles=9, kept=5)}
    more = dict(steps=7, settings=dict(seed=seed))
    return {(row, base, seed): dict(common, **more)}


def test_every_run_is_compared_with_the_baseline_of_its_base_and_seed():
    found = {}
    for base, shift in (("base-0", 0.0), ("base-1", 0.1)):
        found.update(result("base", base, None, 0.5 + shift))
        for seed in (0, 1):
            found.update(result("SFT-SD", base, seed, 0.6 + shift))
            found.update(result("TABOM", base, seed, 0.63 + shift + 0.01 * seed))
    rows = report.summarise(found)
    ours = rows["TABOM"]["differences"]["SFT-SD"]["in-domain %"]
    assert ours["mean"] == pytest.approx(3.5) and ours["bases"] == pytest.approx({"base-0": 3.5, "base-1": 3.5})
    assert rows["base"]["differences"]["SFT-SD"]["in-domain %"]["mean"] == pytest.approx(-10)
    assert rows["TABOM"]["differences"]["base"]["in-domain %"]["mean"] == pytest.approx(13.5)
    assert rows["base"]["measures"]["in-domain %"]["bases"] == {"base-0": 50.0, "base-1": 60.0}
    assert set(rows["SFT-SD"]["differences"]) == {"base", "TABOM"}
    text = report.markdown(found, rows)
    assert "| TABOM | 4 | 68.5 [5.0, 132.0] | 63.5 73.5 | +13.5 | +3.5 | - |" in text
    titles = [line for line in text.splitlines() if line.startswith("### ")]
    assert len(titles) == 2 + 2 + 4 + 3 + 5 + 1  # no row for Tables 5 to 7 and 9, no cross-entropy
    assert rows["TABOM"]["measures"]["in-domain, lost with 2 a step"]["mean"] == pytest.approx(68.5 / 2)
    assert rows["TABOM"]["measures"]["ranking loss above its least"]["mean"] == pytest.approx(0.15)
    assert rows["TABOM"]["measures"]["out-of-domain, in foreign style %"]["mean"] == 100
    assert rows["TABOM"]["measures"]["out-of-domain, right of those in own style %"] is None


def test_rows_of_the_grid_are_compared_where_all_of_them_are():
    found = {}
    for i, base in enumerate(("base-0", "base-1", "base-3")):
        found.update(result("base", base, None, 0.5))
        found.update(result("SFT-SD", base, 0, 0.6))
        found.update(result("TABOM", base, 0, 0.6 + 0.01 * i**2))
    for name in ("TABOM, window 4", "TABOM, window 16"):
        found.update(result(name, "base-1", 0, 0.7))
    found.update(result("T3D", "base-1", 0, 0.3))
    rows, grid = report.summarise(found), ["TABOM, window 4", "TABOM, window 16"]
    text = report.markdown(found, rows, grid=grid)
    table9 = text[text.index("(Table 9): in-domain %") :].split("###")[0]
    assert "| TABOM | 1 | 61.0 | 61.0 | +11.0 | +1.0 | - |" in table9
    assert "| TABOM, window 4 | 1 | 70.0 | 70.0 | +20.0 | +10.0 | +9.0 |" in table9
    assert "| T3D | 1 | 30.0 | - 30.0 - | -20.0 | -30.0 | -31.0 |" in text  # which of the base models it is
    subsets = report.primary(found)
    assert [round(value["mean"], 3) for value in subsets.values()] == [1.667, 2.5, 4]
    assert [list(value["bases"]) for value in subsets.values()][1:] == [["base-1", "base-3"], ["base-3"]]


def test_a_relation_is_over_the_rows_of_a_base_model():
    found = {}
    for base, shift in (("base-0", 0.0), ("base-1", 0.4)):  # between the models it is the other way round
        found.update(result("SFT-GT", base, 0, 0.9, 0.9))  # trains on something else
        for row, (right, inside) in zip(("SFT-SD", "TABOM", "T3D"), [(0.1, 0.5), (0.2, 0.4), (0.4, 0.3)]):
            found.update(result(row, base, 0, right + shift - 0.1, inside + shift))
            found.update(result(row, base, 1, right + shift + 0.1, inside + shift))
    r = report.relation(found, "inversions, own step %")
    expected = stats.pearsonr([0.5, 0.4, 0.3], [0.1, 0.2, 0.4]).statistic
    assert r["bases"] == pytest.approx({"base-0": expected, "base-1": expected}) and expected < -0.9
    assert report.relation(found, "TDS") is None  # the same in all rows
    found.update(result("dInfer", "base-0", 0, 0.9, 0.9))  # not on every base model
    assert report.relation(found, "inversions, own step %")["bases"] == pytest.approx(r["bases"])


def test_a_model_that_has_nothing_to_say_is_in_the_tables():
    found = {**result("base", "base-0", None, 0.5), **result("SFT-SD", "base-0", 0, 0.5)}
    silent = result("TABOM", "base-0", 0, 0.0, None)
    for scores in silent["TABOM", "base-0", 0]["tests"].values():
        scores.update(tds=None, rank=None, inversions_window=None, per_step=[])
    rows = report.summarise({**found, **silent})
    assert rows["TABOM"]["measures"]["TDS"] is None
    assert "| TABOM | 1 | - | - | - | - | - |" in report.markdown({**found, **silent}, rows)
