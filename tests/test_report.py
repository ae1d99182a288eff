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
    tests, answers = [], {}
    for name in report.DOMAINS:
        scores = dict(accuracy=right, tds=0.1, tds_final=0.2, ranking=0.2, ranking_least=0.05, per_step=[0.1, 0.3])
        scores.update(inversions_step=inside, inversions_window=0.1)
        tests.append(dict(source=f"x/test_{name}.jsonl", tokens_per_step=1, scores=scores))
        tests.append(dict(source=f"x/test_{name}.jsonl", tokens_per_step=2, scores=dict(accuracy=right / 2)))
        answers[name] = dict(foreign=0.25, ends_right=0.75)
    thirds = [[0.1, right / 2, 0.25], [0.5, right, 0.5], [0.9, right, 0.75]]
    changed = dict(correlation=inside, thirds=thirds, kl=0.1, entropy=0.3, entropy_before=0.2)
    common = dict(row=row, base=base, tests=tests, chosen={}, answers=answers, mechanism=changed)
    if row == "base":
        more = dict(settings=dict(objective="base"), seed=seed, epochs=8, puzzles=9, kept=5, early_eos=0.5)
        return {("base", base, None): dict(common, **more)}
    return {(row, base, seed): dict(common, steps=7, settings=dict(seed=seed))}


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
    text = report.markdown(found, {})
    assert "| TABOM | 4 | 68.5 [5.0, 132.0] | 63.5 73.5 | +13.5 | +3.5 | - |" in text
    titles = [line for line in text.splitlines() if line.startswith("### ")]
    assert len(titles) == 2 + 3 + 4 + 4 + 6 + 3 + 2  # no learning rates
    assert rows["TABOM"]["measures"]["in-domain, lost with 2 a step"]["mean"] == pytest.approx(68.5 / 2)
    assert rows["TABOM"]["measures"]["ranking loss above its least"]["mean"] == pytest.approx(0.15)
    assert rows["TABOM"]["measures"]["far, in foreign style %"]["mean"] == 25
    assert rows["TABOM"]["measures"]["in-domain, ends in the right place %"]["mean"] == 75
    assert "| base-0 | None | 8 | 50.0 | 50.0 | 50.0 | 9 | 5 | 50 | 7 |" in text
    # SFT-SD over both base models and seeds: a quarter and a half of the moved and other puzzles' accuracy
    assert "| SFT-SD | 0.10: 32.5 (+7.5) | 0.50: 65.0 (+15.0) | 0.90: 65.0 (-10.0) |" in text


def test_a_verdict_needs_an_interval_on_one_side_of_zero_or_close_around_it():
    def of(low, high, label="in-domain %", sign=1, bases=3):
        return report.verdict(dict(low=low, high=high, bases=dict.fromkeys(range(bases))), label, sign)

    assert of(0.1, 9.0) == "confirmed" == of(-9.0, -0.1, sign=-1)
    assert of(-9.0, -0.1) == "not on these puzzles" == of(0.1, 9.0, sign=-1)
    assert of(-1.9, 1.5) == "not seen" == of(-0.004, 0.005, "TDS")
    assert of(-2.1, 1.5) == "not resolved" == of(-0.004, 0.006, "TDS") == of(-1.0, 2.1, sign=-1)
    assert of(0.4, 0.5, bases=2) == "not resolved"
    assert of(None, None) == "not measured" == report.verdict(None, "TDS", 1)


def test_the_claims_come_with_the_difference_and_its_verdict():
    found = {}
    for i, base in enumerate(("base-1", "base-2", "base-10")):
        found.update(result("base", base, None, 0.5))
        found.update(result("SFT-SD", base, 0, 0.6))
        found.update(result("TABOM", base, 0, 0.64 + 0.01 * i))
    text = report.markdown(found, dict(TABOM={"0.001": 0.5, "0.003": 0.25}))
    primary = "| gains in-domain over SFT-SD (primary) | confirmed | TABOM - SFT-SD, in-domain | +5.0 [+2.5, +7.5]"
    assert primary in text
    assert text.count("not measured") == sum({"SFT-GT"} & {c[1]} != set() for c in report.CLAIMS) + sum(
        c[2] not in ("base", "SFT-SD") or c[1] == "TABOM, no ranking" for c in report.CLAIMS
    ) + sum(c[3] == "TDS" for c in report.CLAIMS)  # the same TDS everywhere has no interval
    assert "| TABOM | 3 | 65.0 [62.5, 67.5] | 64.0 65.0 66.0 |" in text  # base-10 comes last
    assert "| TABOM | 50.0 | 25.0 |" in text
    assert "| base-1 to base-6 | +4.5 [-1.9, +10.9], p 0.070 (+4.0 +5.0) |\n| later ones | +6.0 |" in text


def test_a_relation_is_over_the_rows_of_a_base_model():
    found = {}
    for base, shift in (("base-0", 0.0), ("base-1", 0.4)):  # between the models it is the other way round
        found.update(result("SFT-GT", base, 0, 0.9, 0.9))  # trains on something else
        for row, (right, inside) in zip(("SFT-SD", "TABOM", "T3D"), [(0.1, 0.5), (0.2, 0.4), (0.4, 0.3)]):
            found.update(result(row, base, 0, right + shift - 0.1, inside + shift))
            found.update(result(row, base, 1, right + shift + 0.1, inside + shift))
    r = report.relation(report.measured(found), "pairs out of order, own step %")
    expected = scipy_stats.pearsonr([0.5, 0.4, 0.3], [0.1, 0.2, 0.4]).statistic
    assert r["bases"] == pytest.approx({"base-0": expected, "base-1": expected}) and expected < -0.9
    assert report.relation(report.measured(found), "TDS") is None  # the same in all rows
    found.update(result("dInfer", "base-0", 0, 0.9, 0.9))  # not on every base model
    again = report.relation(report.measured(found), "pairs out of order, own step %")
    assert again["bases"] == pytest.approx(r["bases"])


def test_a_model_that_has_nothing_to_say_is_in_the_tables():
    found = {**result("base", "base-0", None, 0.5), **result("SFT-SD", "base-0", 0, 0.5)}
    silent = result("TABOM", "base-0", 0, 0.0, 0.5)
    for one in silent["TABOM", "base-0", 0]["tests"]:
        one["scores"].update(tds=None, tds_final=None, ranking=None, inversions_window=None, per_step=[])
    found.update(silent)
    assert report.summarise(report.measured(found))["TABOM"]["measures"]["TDS"] is None
    assert "| TABOM | 1 | - | - | - | - | - |" in report.markdown(found, {})


def test_the_pictures_show_what_the_tables_say():
    found = {}
    for i, base in enumerate(("base-1", "base-2")):
        found.update(result("base", base, None, 0.5))
        found.update(result("SFT-SD", base, 0, 0.6, 0.8))
        found.update(result("TABOM", base, 0, 0.64 + 0.01 * i, 0.9))
    values = report.measured(found)
    drawn = report.forest(report.summarise(values))
    assert [(r["row"], r["measure"]) for r in drawn] == [("TABOM", label) for label in report.SOLVED]
    assert drawn[0]["mean"] == pytest.approx(4.5)  # base - SFT-SD is the same on both, and has no interval
    points = report.scatter(values)
    assert points[0] == dict(row="SFT-SD", x=0.8, y=pytest.approx(10))
    assert [p["y"] for p in points[1::2]] == pytest.approx([14, 15])


# ----------------------------------------------------------------------------------------------------------- a folder


def small_experiment():
    found = {}
    for base in ("base-1", "base-2"):
        found.update(result("base", base, None, 0.5))
        found.update(result("SFT-SD", base, 0, 0.6))
        found.update(result("TABOM", base, 0, 0.6123456789))
    for one in found.values():
        one.update(name="seed-0", checkpoints=[one["chosen"]])
    return found


def test_a_folder_stores_the_runs_and_makes_the_rest_from_them_again(tmp_path, capsys):
    folder = tmp_path / "results"
    about = dict(sizes=dict(test=9), tried=dict(TABOM={"0.001": 0.5}))
    report.write_report(folder, small_experiment(), about)
    saved = json.loads((folder / "results.json").read_text())
    assert set(saved) == {"sizes", "tried", "versions", "runs"}
    assert len(saved["runs"]) == 6 and not any("name" in r or "checkpoints" in r for r in saved["runs"])
    assert saved["runs"][2]["tests"][0]["scores"]["accuracy"] == 0.612346
    files = {}
    for file in folder.iterdir():
        files[file.name] = file.read_bytes()
    pictures = {"tds.png", "tds.pdf", "order.png", "order.pdf", "accuracy.png", "accuracy.pdf"}
    assert set(files) == {"results.json", "tables.md"} | pictures
    for name in set(files) - {"results.json"}:
        (folder / name).unlink()
    assert report.main([str(folder)]) == 0
    for name, content in files.items():
        assert (folder / name).read_bytes() == content, name
    tables = files["tables.md"].decode()
    assert "### Learning rates" in tables and "| TABOM | 50.0 |" in tables
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
    assert (RESULTS / "results.json").stat().st_size < 500_000


@pytest.mark.slow
def test_the_committed_folder_can_be_made_again_from_the_command_line(tmp_path):
    folder = tmp_path / "results"
    folder.mkdir()
    shutil.copyfile(RESULTS / "results.json", folder / "results.json")
    command = [sys.executable, "-m", "experiments.report", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (folder / "tables.md").read_text() == (RESULTS / "tables.md").read_text()
