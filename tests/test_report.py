"""report.py: differences, tables, and the committed results: python -m pytest tests/test_report.py"""

import json
import shutil
import subprocess
import sys

import pytest
from helpers import ROOT
from scipy import stats as scipy_stats

from experiments import report

RESULTS = ROOT / "experiments" / "results"


def test_a_cell_shows_its_interval():
    value = dict(mean=-1.234, low=-2.0, high=0.5, bases=dict(a=-1.5, b=-1.0))
    assert report.shown(value) == "-1.2 [-2.0, 0.5]"
    assert report.shown(dict(value, p=0.0314), 2, "+") == "-1.23 [-2.00, +0.50], p 0.031 (-1.50 -1.00)"
    assert report.shown(dict(mean=3.0, low=None, high=None, bases=dict(a=3.0), p=None)) == "3.0"
    assert report.shown(None) == "-"


def result(row, base, seed, right, inside=0.5):
    """A run with the share `right` of its answers right, half as many with two tokens a step."""
    tests = []
    for source in ("x/test_in.jsonl", "x/test_out.jsonl"):
        scores = dict(accuracy=right, tds=0.1, ranking=0.2, ranking_least=0.05, per_step=[0.1, 0.3])
        scores.update(inversions_step=inside, inversions_window=0.1)
        tests.append(dict(source=source, tokens_per_step=1, scores=scores))
        tests.append(dict(source=source, tokens_per_step=2, scores=dict(accuracy=right / 2)))
    styles = dict(test_in=dict(foreign=0.25, own_right=right), test_out=dict(foreign=1.0, own_right=None))
    common = dict(row=row, base=base, tests=tests, chosen=dict(accuracy=right), styles=styles)
    if row == "base":
        settings = dict(objective="base")
        return {("base", base, None): dict(common, settings=settings, seed=seed, puzzles=9, kept=5)}
    more = dict(steps=7, settings=dict(seed=seed), curve=[right / 2, right])
    return {(row, base, seed): dict(common, **more)}


def test_every_run_is_compared_with_the_baseline_of_its_base_and_seed():
    found = {}
    for base, shift in (("base-0", 0.0), ("base-1", 0.1)):
        found.update(result("base", base, None, 0.5 + shift))
        for seed in (0, 1):
            found.update(result("SFT-SD", base, seed, 0.6 + shift))
            found.update(result("TABOM", base, seed, 0.63 + shift + 0.01 * seed))
    rows = report.summarise(report.measured(found))
    ours = rows["TABOM"]["differences"]["SFT-SD"]["in-domain %"]
    assert ours["mean"] == pytest.approx(3.5) and ours["bases"] == pytest.approx({"base-0": 3.5, "base-1": 3.5})
    assert rows["base"]["differences"]["SFT-SD"]["in-domain %"]["mean"] == pytest.approx(-10)
    assert rows["TABOM"]["differences"]["base"]["in-domain %"]["mean"] == pytest.approx(13.5)
    assert rows["base"]["measures"]["in-domain %"]["bases"] == {"base-0": 50.0, "base-1": 60.0}
    assert set(rows["SFT-SD"]["differences"]) == {"base", "TABOM"}
    text = report.markdown(found)
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
    text = report.markdown(found, grid=["TABOM, window 4", "TABOM, window 16", "TABOM, margin 0.1"])
    table9 = text[text.index("(Table 9): in-domain %") :].split("###")[0]
    assert "| TABOM | 1 | 61.0 | 61.0 | +11.0 | +1.0 | - |" in table9
    assert "| TABOM, window 4 | 1 | 70.0 | 70.0 | +20.0 | +10.0 | +9.0 |" in table9
    assert "| T3D | 1 | 30.0 | - 30.0 - | -20.0 | -30.0 | -31.0 |" in text  # which of the base models it is
    subsets = report.primary(report.measured(found))
    assert [round(value["mean"], 3) for value in subsets.values()] == [1.667, 2.5, 4]
    assert [list(value["bases"]) for value in subsets.values()][1:] == [["base-1", "base-3"], ["base-3"]]


def test_a_relation_is_over_the_rows_of_a_base_model():
    found = {}
    for base, shift in (("base-0", 0.0), ("base-1", 0.4)):  # between the models it is the other way round
        found.update(result("SFT-GT", base, 0, 0.9, 0.9))  # trains on something else
        for row, (right, inside) in zip(("SFT-SD", "TABOM", "T3D"), [(0.1, 0.5), (0.2, 0.4), (0.4, 0.3)]):
            found.update(result(row, base, 0, right + shift - 0.1, inside + shift))
            found.update(result(row, base, 1, right + shift + 0.1, inside + shift))
    r = report.relation(report.measured(found), "inversions, own step %")
    expected = scipy_stats.pearsonr([0.5, 0.4, 0.3], [0.1, 0.2, 0.4]).statistic
    assert r["bases"] == pytest.approx({"base-0": expected, "base-1": expected}) and expected < -0.9
    assert report.relation(report.measured(found), "TDS") is None  # the same in all rows
    found.update(result("dInfer", "base-0", 0, 0.9, 0.9))  # not on every base model
    again = report.relation(report.measured(found), "inversions, own step %")
    assert again["bases"] == pytest.approx(r["bases"])


def test_a_model_that_has_nothing_to_say_is_in_the_tables():
    found = {**result("base", "base-0", None, 0.5), **result("SFT-SD", "base-0", 0, 0.5)}
    silent = result("TABOM", "base-0", 0, 0.0, None)
    for one in silent["TABOM", "base-0", 0]["tests"]:
        one["scores"].update(tds=None, ranking=None, inversions_window=None, per_step=[])
    found.update(silent)
    assert report.summarise(report.measured(found))["TABOM"]["measures"]["TDS"] is None
    assert "| TABOM | 1 | - | - | - | - | - |" in report.markdown(found)


def test_accuracy_is_drawn_as_a_gain_over_the_base_models_that_every_row_has():
    found = {}
    for i, base in enumerate(("base-0", "base-1", "base-2")):
        found.update(result("base", base, None, 0.4))
        found.update(result("TABOM", base, 0, 0.5 + 0.1 * i))
    found.update(result("SFT-SD", "base-0", 0, 0.6))
    found.update(result("SFT-SD", "base-1", 0, 0.6))
    rows = report.accuracy_curves(found, ["base", "TABOM", "SFT-SD"])
    assert [(r["model"], r["epoch"]) for r in rows] == [(n, e) for n in ("TABOM", "SFT-SD") for e in range(3)]
    assert {r["base_models"] for r in rows} == {2}
    assert [r["gain"] for r in rows[:3]] == pytest.approx([0, -12.5, 15])


# ----------------------------------------------------------------------------------------------------------- a folder


def small_experiment():
    found = {}
    for base in ("base-0", "base-1"):
        found.update(result("base", base, None, 0.5))
        found.update(result("SFT-SD", base, 0, 0.6))
        found.update(result("TABOM", base, 0, 0.6123456789))
        found.update(result("TABOM, window 4", base, 0, 0.62))
    for one in found.values():
        one.update(name="seed-0", checkpoints=[one["chosen"]])
    return found


def test_a_folder_stores_the_runs_and_makes_the_rest_from_them_again(tmp_path, capsys):
    losses = []
    for ratio in (0.5, 1.0):
        losses.append(dict(model="base", data="ground truth", mask_ratio=ratio, base_models=2, loss=ratio, loss_se=0.1))
    folder = tmp_path / "results"
    report.write_report(folder, small_experiment(), losses, ["TABOM, window 4"], dict(sizes=dict(test=9)))
    saved = json.loads((folder / "results.json").read_text())
    assert set(saved) == {"sizes", "versions", "grid", "losses", "runs"}
    assert len(saved["runs"]) == 8 and not any("name" in r or "checkpoints" in r for r in saved["runs"])
    assert saved["runs"][2]["chosen"]["accuracy"] == 0.61234568
    files = {}
    for file in folder.iterdir():
        files[file.name] = file.read_bytes()
    pictures = {"tds.png", "tds.pdf", "loss.png", "loss.pdf", "accuracy.png", "accuracy.pdf"}
    assert set(files) == {"results.json", "tables.md"} | pictures
    for name in set(files) - {"results.json"}:
        (folder / name).unlink()
    assert report.main([str(folder)]) == 0
    for name, content in files.items():
        assert (folder / name).read_bytes() == content, name
    tables = files["tables.md"].decode()
    assert "Table 9" in tables and "| ground truth | 0.5000 ± 0.1000 | 1.0000" in tables
    assert capsys.readouterr().out.strip().endswith(json.dumps(dict(out=str(folder))))


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "no results.json in"),
        ("{}", "results.json: these are not the results of an experiment of claims"),
        ('{"runs": [{"settings": {}}]}', "these are not the results of an experiment of claims"),
        ("{", "results.json"),
    ],
)
def test_another_folder_is_one_line(tmp_path, capsys, content, message):
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    assert report.main([str(tmp_path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line


def test_the_committed_tables_are_those_of_the_committed_runs():
    results = report.read(RESULTS)
    assert report.markdown(*results) + "\n" == (RESULTS / "tables.md").read_text()
    assert (RESULTS / "results.json").stat().st_size < 120_000


@pytest.mark.slow
def test_the_committed_folder_can_be_made_again_from_the_command_line(tmp_path):
    folder = tmp_path / "results"
    folder.mkdir()
    shutil.copyfile(RESULTS / "results.json", folder / "results.json")
    command = [sys.executable, "-m", "experiments.report", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (folder / "tables.md").read_text() == (RESULTS / "tables.md").read_text()
