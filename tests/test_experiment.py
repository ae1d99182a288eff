"""tabom.py demo --full: the statistics, and one small experiment from end to end.

python -m pytest tests/test_experiment.py"""

import json
import math

import pytest
from conftest import last_json, shell
from scipy import stats

import data
import demo
import experiment
import options
import sweep
import tabom


def test_an_interval_is_students_over_the_base_models():
    values = {("a", 0): 0.5, ("a", 1): 1.5, ("b", 0): 2.0, ("b", 1): None, ("c", 0): 6.0}
    found = experiment.interval(values)
    half = 4.302653 * math.sqrt(7.0 / 3)  # the 97.5 % point of t with 2 degrees of freedom, and the standard error
    assert found["mean"] == 3 and found["bases"] == dict(a=1.0, b=2.0, c=6.0)
    assert found["low"] == pytest.approx(3 - half, rel=1e-5) and found["high"] == pytest.approx(3 + half, rel=1e-5)
    assert experiment.interval({("a", 0): 0.5, ("a", 1): 0.7})["low"] is None
    assert experiment.interval({("a", 0): None}) is None


def test_a_paired_difference_takes_the_runs_that_both_have():
    ours = {("a", 0): 1.0, ("a", 1): 3.0, ("b", 0): 5.5, ("c", 0): 9.0, ("e", 0): None}
    theirs = {("a", 0): 0.0, ("a", 1): 1.0, ("b", 0): 2.0, ("d", 0): 70.0, ("e", 0): 1.0}
    found = experiment.paired(ours, theirs)
    assert found["bases"] == dict(a=1.5, b=3.5) and found["mean"] == 2.5
    expected = stats.ttest_rel([2.0, 5.5], [0.5, 2.0]).confidence_interval()
    assert (found["low"], found["high"]) == pytest.approx((expected.low, expected.high))
    assert found["p"] == pytest.approx(stats.ttest_rel([2.0, 5.5], [0.5, 2.0]).pvalue)
    assert experiment.paired(ours, {("z", 0): 1.0}) is None
    assert experiment.paired(ours, {("a", 0): 0.5})["p"] is None


def test_the_model_before_training_is_compared_with_every_run_on_it():
    ours = {("a", 0): 1.0, ("a", 1): 4.0, ("b", 0): 5.5}
    before = {("a", None): 0.5, ("b", None): 1.0, ("c", None): 9.0}
    assert experiment.paired(ours, before)["bases"] == dict(a=2.0, b=4.5)
    assert experiment.paired(before, ours)["bases"] == dict(a=-2.0, b=-4.5)


def test_a_cell_shows_its_interval():
    value = dict(mean=-1.234, low=-2.0, high=0.5, bases=dict(a=-1.5, b=-1.0))
    assert experiment.shown(value) == "-1.2 [-2.0, 0.5]"
    assert experiment.shown(dict(value, p=0.0314), 2, "+") == "-1.23 [-2.00, +0.50], p 0.031"
    assert experiment.shown(dict(mean=3.0, low=None, high=None, bases=dict(a=3.0), p=None)) == "3.0"
    assert experiment.shown(None) == "-"


def result(row, base, seed, right, inside=0.5):
    scores = dict(accuracy=right, tds=0.1, rank=0.2, inversions_step=inside, inversions_window=0.1, per_step=[0.1, 0.3])
    names = [f"x/{k}.jsonl{more}" for k in ("test_in", "test_out") for more in ("", ", 2 a step")]
    common = dict(row=row, base=base, tests=dict.fromkeys(names, scores), chosen=dict(accuracy=right))
    if row == "base":
        return {("base", base, None): dict(common, seed=seed, puzzles=9, kept=5)}
    more = dict(steps=7, foreign=0.25, settings=dict(seed=seed))
    return {(row, base, seed): dict(common, **more)}


def test_every_run_is_compared_with_the_baseline_of_its_base_and_seed():
    found = {}
    for base, shift in (("base-0", 0.0), ("base-1", 0.1)):
        found.update(result("base", base, None, 0.5 + shift))
        for seed in (0, 1):
            found.update(result("SFT-SD", base, seed, 0.6 + shift))
            found.update(result("TABOM", base, seed, 0.63 + shift + 0.01 * seed))
    rows = experiment.summarise(found)
    ours = rows["TABOM"]["differences"]["SFT-SD"]["in-domain %"]
    assert ours["mean"] == pytest.approx(3.5) and ours["bases"] == pytest.approx({"base-0": 3.5, "base-1": 3.5})
    assert rows["base"]["differences"]["SFT-SD"]["in-domain %"]["mean"] == pytest.approx(-10)
    assert rows["TABOM"]["differences"]["base"]["in-domain %"]["mean"] == pytest.approx(13.5)
    assert rows["base"]["measures"]["in-domain %"]["bases"] == {"base-0": 50.0, "base-1": 60.0}
    assert set(rows["SFT-SD"]["differences"]) == {"base", "TABOM"}
    text = experiment.markdown(found, rows)
    assert "| TABOM | 4 | 68.5 [5.0, 132.0] | 63.5 73.5 | +13.5 | +3.5 | - |" in text
    titles = [line for line in text.splitlines() if line.startswith("### ")]
    assert len(titles) == 2 + 2 + 2 + 4 + 1  # no row for Tables 5 to 7 and 9, no cross-entropy


def test_a_relation_is_over_the_rows_of_a_base_model():
    found = {}
    for base, shift in (("base-0", 0.0), ("base-1", 0.4)):  # between the models it is the other way round
        found.update(result("SFT-GT", base, 0, 0.9, 0.9))  # trains on something else
        for row, (right, inside) in zip(("SFT-SD", "TABOM", "T3D"), [(0.1, 0.5), (0.2, 0.4), (0.4, 0.3)]):
            found.update(result(row, base, 0, right + shift - 0.1, inside + shift))
            found.update(result(row, base, 1, right + shift + 0.1, inside + shift))
    r = experiment.relation(found, "inversions, own step %")
    expected = stats.pearsonr([0.5, 0.4, 0.3], [0.1, 0.2, 0.4]).statistic
    assert r == pytest.approx({"base-0": expected, "base-1": expected}) and expected < -0.9
    assert experiment.relation(found, "TDS") == {}  # the same in all rows


def test_a_model_that_has_nothing_to_say_is_in_the_tables():
    found = {**result("base", "base-0", None, 0.5), **result("SFT-SD", "base-0", 0, 0.5)}
    silent = result("TABOM", "base-0", 0, 0.0, None)
    for scores in silent["TABOM", "base-0", 0]["tests"].values():
        scores.update(tds=None, rank=None, inversions_window=None, per_step=[])
    rows = experiment.summarise({**found, **silent})
    assert rows["TABOM"]["measures"]["TDS"] is None
    assert "| TABOM | 1 | - | - | - | - | - |" in experiment.markdown({**found, **silent}, rows)


@pytest.mark.parametrize("name", experiment.ROWS)
def test_a_row_is_a_training_run_that_uses_all_it_sets(name, tmp_path):
    settings = experiment.settings_of(name, 3)
    made = sweep.training(experiment.of_base(options.DemoOptions(), tmp_path), settings)
    parameters, unused = options.of_objective(made)
    assert not unused
    assert all(parameters[k] == v for k, v in settings.items() if k not in ("objective", "seed"))
    assert made.seed == 3
    assert (made.epochs, made.lr) == (experiment.TRAINING["epochs"], experiment.TRAINING["lr"])


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    out = tmp_path_factory.mktemp("F") / "F"
    line = ["demo", "--full", "--quick", "--bases", "1", "--seeds", "1", "--rows", "SFT-GT; SFT-SD", "--out", out]
    done = shell(*line)
    assert done.returncode == 0, done.stderr
    return out, line, done


def test_no_puzzle_is_in_two_datasets_and_sft_gt_trains_on_what_was_kept(small):
    base = small[0] / "base-0"
    names = ("train", "validation", "test_in", "test_out")
    prompts = [r["prompt"] for k in names for r in data.read_examples(base / "data" / f"{k}.jsonl")]
    assert len(prompts) == len(set(prompts)) == 24 + 6 + 6 + 6
    kept = {r["id"]: r for r in data.read_trajectories(base / "T") if data.usable(r)}
    truth = data.read_examples(base / "truth.jsonl")
    assert {e["id"] for e in truth} == set(kept) and kept
    for e in truth:
        assert e["answer"] == kept[e["id"]]["text"].translate(str.maketrans("123456", "abcdef"))


def test_the_tables_hold_what_the_trajectories_say(small):
    out, _, done = small
    saved = json.loads((out / "results" / "results.json").read_text())
    assert {r["row"] for r in saved["runs"]} == {"base", "SFT-GT", "SFT-SD"} == set(saved["rows"])
    for r in saved["runs"]:
        folder = out / "base-0" / "runs" / r["row"] / ("" if r["row"] == "base" else "seed-0")
        for stem, at_once in (("test_in", 1), ("test_in", 2), ("test_out", 1), ("test_out", 2)):
            records = data.read_trajectories(folder / f"test-{stem}{'' if at_once == 1 else '-2'}")
            right = sum(x["correct"] for x in records)
            assert experiment.test(r, stem, at_once)["accuracy"] == right / 6 and len(records) == 6
            assert max(max(x["step"]) for x in records) == (36 if at_once == 1 else 18)
        assert str(out) not in json.dumps(r)
    steps = {r["steps"] for r in saved["runs"] if "steps" in r}
    assert len(steps) == 1
    row = saved["rows"]["SFT-SD"]["measures"]["in-domain %"]
    tables = (out / "results" / "tables.md").read_text()
    assert f"| SFT-SD | 1 | {row['mean']:.1f} | {row['mean']:.1f} |" in tables in done.stdout
    assert all((out / "results" / f"{k}.png").stat().st_size > 5000 for k in ("tds", "loss", "accuracy"))


def test_the_last_checkpoint_is_tested_and_every_epoch_of_the_first_seed_validated(small):
    run = sweep.result_of(small[0] / "base-0" / "runs" / "SFT-SD" / "seed-0")
    assert run["chosen"]["epoch"] == experiment.TRAINING["epochs"] == len(run["curve"])
    assert run["chosen"]["accuracy"] == run["curve"][-1]
    for name in ("test-test_in", "test-test_out-2"):
        meta = json.loads((small[0] / "base-0" / "runs" / "SFT-SD" / "seed-0" / name / "meta.json").read_text())
        assert meta["adapter"] == run["chosen"]["checkpoint"]


def test_a_second_start_adds_rows_and_makes_nothing_again(small):
    out, line, _ = small
    before = {p: p.stat().st_mtime_ns for p in out.rglob("result.json")}
    line = [part if part != "SFT-GT; SFT-SD" else "TABOM" for part in line]
    done = shell(*line)
    assert done.returncode == 0, done.stderr
    assert last_json(done.stdout)["rows"] == 4
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert len(list(out.rglob("result.json"))) == len(before) + 1


def test_a_row_that_means_something_else_now_is_refused(small, monkeypatch, capsys):
    monkeypatch.setitem(experiment.ROWS, "SFT-SD", dict(objective="nelbo", lr=0.5))
    assert tabom.main([str(word) for word in small[1]]) == 1
    assert "seed-0 was made with {'objective': 'nelbo'" in capsys.readouterr().err


def test_an_unknown_row_is_one_line(tmp_path):
    done = shell("demo", "--full", "--rows", "TABOM;Tabom", "--out", tmp_path / "F")
    assert done.returncode == 1 and not (tmp_path / "F").exists()
    assert "error: --rows Tabom: none of SFT-GT; SFT-SD; TABOM;" in done.stderr and "Traceback" not in done.stderr


def test_foreign_answers_are_the_same_squares_in_other_letters(tmp_path):
    file = demo.write_puzzles(tmp_path / "p.jsonl", ["latin", "shear"], 40, False, 0, foreign=0.5)
    own = demo.write_puzzles(tmp_path / "q" / "p.jsonl", ["latin", "shear"], 2, False, 0)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    styles = set()
    for row in rows:
        task = next(t for t in demo.TASKS.values() if t.tag == row["prompt"][0])
        style = next(s for s in (task.symbols, task.foreign) if set(row["answer"]) <= set(s))
        styles.add((task.tag, style == task.symbols))
        clues = row["prompt"][1:].translate(str.maketrans(task.symbols, style))
        assert all(a in (".", b) for a, b in zip(clues, row["answer"]))
    assert len(styles) == 4
    both = demo.write_puzzles(tmp_path / "r" / "p.jsonl", ["latin", "shear"], 2, False, 0, both=True)
    plain = [json.loads(line)["answer"] for line in own.read_text().splitlines()]
    for answer, (first, second) in zip(plain, (json.loads(x)["answer"] for x in both.read_text().splitlines())):
        assert first == answer and len(set(zip(first, second))) == 6 and not set(first) & set(second)
