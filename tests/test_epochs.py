"""release/epochs.py: which epoch a table shows, and how much the choice flatters.

python -m pytest tests/test_epochs.py"""

import json
import math

import pytest

from release import epochs

# Four questions, three epochs: 2, 3 and 3 right.
VERDICTS = {1: [True, True, False, False], 2: [True, True, True, False], 3: [False, True, True, True]}


def test_the_best_is_the_first_of_the_highest_on_the_task_and_the_last_is_the_last():
    found = epochs.report(VERDICTS)
    assert epochs.report(VERDICTS, seed=-1)["last"] == found["last"]  # as --seed -1 of a sweep
    assert found["questions"] == 4
    assert found["best"] == dict(epochs=[2], correct=3, n=4, score=75.0, chosen_on="the best of 3 on the test task")
    assert found["last"] == dict(epochs=[3], correct=3, n=4, score=75.0, chosen_on="nothing")


@pytest.mark.parametrize("seed", range(6))
def test_each_half_chooses_for_the_other(seed):
    """Two epochs that know different questions: no half may be scored by the epoch that it chose."""
    n = 40
    verdicts = {1: [q % 2 == 0 for q in range(n)], 5: [q % 2 == 1 for q in range(n)]}
    found = epochs.report(verdicts, seed=seed)["honest"]
    assert found["chosen_on"] == f"the other half of {n} questions" and found["n"] == n
    assert found["correct"] <= n / 2 < n  # the epoch with more right in one half has fewer in the other
    assert epochs.report(verdicts, seed=seed)["honest"] == found


def test_the_better_epoch_is_chosen_by_both_halves():
    verdicts = {1: [False] * 30, 2: [True] * 29 + [False], 3: [False] * 30}
    found = epochs.report(verdicts)["honest"]
    assert (found["epochs"], found["correct"], found["score"]) == ([2, 2], 29, 96.67)


def test_validation_questions_choose_where_there_are_some():
    validation = {1: [True, True], 2: [True, False], 3: [False, False]}
    found = epochs.report(VERDICTS, validation)
    assert found["honest"] == dict(epochs=[1], correct=2, n=4, score=50.0, chosen_on="2 other questions")
    with pytest.raises(ValueError, match=r"validation has the epochs \[1, 2\], the task has \[1, 2, 3\]"):
        epochs.report(VERDICTS, {1: [True], 2: [True]})


@pytest.mark.parametrize("verdicts", [{}, {1: []}, {1: [True], 2: [True, False]}])
def test_other_verdicts_are_refused(verdicts):
    with pytest.raises(ValueError, match="verdicts of the same questions are needed for each epoch; there are"):
        epochs.report(verdicts)


def test_the_maximum_of_two_is_the_known_one():
    """Two normal scores, independent: their maximum is 1 / sqrt(pi) standard deviations above the mean."""
    off = epochs.simulate(2, 2000, accuracy=0.5, runs=40000)
    assert off["error"] == pytest.approx(100 * 0.5 / math.sqrt(2000))
    assert off["best"] == pytest.approx(off["error"] / math.sqrt(math.pi), rel=0.03)
    assert off["honest"] == pytest.approx(0, abs=0.03)
    correlated = epochs.simulate(2, 2000, accuracy=0.5, correlation=0.75, runs=40000)
    assert correlated["best"] == pytest.approx(off["best"] / 2, rel=0.05)  # sqrt(1 - 0.75)


def test_one_epoch_and_equal_epochs_flatter_nothing():
    assert epochs.simulate(1, 100)["best"] == pytest.approx(0, abs=0.1)
    assert epochs.simulate(5, 100, correlation=1.0)["best"] == pytest.approx(0, abs=0.1)


def test_the_simulation_is_what_report_does_to_drawn_verdicts():
    """The counts are drawn; here every verdict is, and report() chooses."""
    import numpy as np

    random, n, runs = np.random.default_rng(1), 60, 3000
    off = dict(best=0.0, honest=0.0)
    for _ in range(runs):
        shared, own = random.random(n) < 0.6, random.random((4, n)) < 0.6
        drawn = np.where(random.random((4, n)) < math.sqrt(0.5), shared, own)
        found = epochs.report(dict(enumerate(drawn.tolist())))
        for name in off:
            off[name] += (100 * found[name]["correct"] / n - 60) / runs
    expected = epochs.simulate(4, n, accuracy=0.6, correlation=0.5)
    for name in off:
        assert off[name] == pytest.approx(expected[name], abs=0.5)


def test_the_command_prints_a_line_for_each_case(capsys):
    assert epochs.main(["--questions", "20,50", "--correlation", "0,0.5", "--runs", "200", "--epochs", "3"]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    assert "best of 3" in table[0] and len(table) == 2 + 4
    found = json.loads(last)["found"]
    assert [(one["questions"], one["correlation"]) for one in found] == [(20, 0), (20, 0.5), (50, 0), (50, 0.5)]
    assert all(one["best"] > 0 for one in found)


@pytest.mark.parametrize(
    "words, message",
    [("--epochs 0", "--epochs 0: must be at least 1"), ("--questions 100,1", "--questions 1: must be")],
)
def test_bad_numbers_are_one_line(words, message, capsys):
    assert epochs.main(words.split()) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {message}")


def test_a_correlation_beyond_one_is_refused(capsys):
    with pytest.raises(SystemExit):
        epochs.main(["--correlation", "0,1.5"])
    assert "must be shares from 0 to 1" in capsys.readouterr().err
