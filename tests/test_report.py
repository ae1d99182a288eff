"""report.py: the primary measures, frontiers, tables and looks: python -m pytest tests/test_report.py"""

import json
import random

import numpy as np
import pytest
from helpers import ROOT
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from experiments import claims, looks, report

RESULTS = ROOT / "experiments" / "results"
PUZZLES = 200


def an_epoch(right, near=0.5, far=0.5, whole=True, kl=0.01, two=0.25, name="in"):
    """One epoch with these shares of right answers."""

    def verdicts(share, count=PUZZLES):
        return claims.pack([int((i + 1) * share + 1e-9) > int(i * share + 1e-9) for i in range(count)])

    found = dict(right={name: verdicts(right, PUZZLES if whole else PUZZLES // 2)}, kl=dict(near=kl, far=3 * kl))
    elsewhere = PUZZLES if whole else PUZZLES // 4
    found["right"].update(near=verdicts(near, elsewhere), far=verdicts(far, elsewhere))
    if whole:
        found["right"][f"{name}-2"] = verdicts(two)
        found["order"] = dict(tds=0.1, correlation=0.9, per_step=[0.1, 0.2])
    return found


def a_base(number, gains, before=0.5, **more):
    """What is kept of a base model on which runs (name with rate) gain so much in each of three epochs."""
    runs = {"base": dict(epochs=[an_epoch(before)])}
    for key, (gain, loss) in gains.items():
        epochs = [an_epoch(before + gain * e / 3, 0.5 - loss * e / 3, whole=e == 3, kl=loss * e / 3) for e in (1, 2, 3)]
        runs[key] = dict(epochs=epochs, steps=9)
    about = {"kept in": [7, 9], "early EOS in": 0.9, "minutes": 3.2, "tried": [[number, 0.7]]}
    return dict(number=number, **about, runs=runs, **more)


def many(count, ahead=0.03, cost=0.0, seed=0):
    """Base models on which TABOM gains `ahead` more than SFT-SD, give or take."""
    random.seed(seed)
    bases = {}
    for i in range(1, count + 1):
        gains = {}
        for rate, more in (("0.0003", 1), ("0.001", 2)):
            gains[f"SFT-SD {rate}"] = (0.06 * more, 0.01 * more)
            gains[f"TABOM {rate}"] = (0.06 * more + ahead + random.choice((-0.01, 0, 0.01)), 0.01 * more + cost)
        if i % 2:
            low = 0.02 + i % 3 / 50
            gains.update({"TABOM 0.0001": (low + ahead / 2, 0.0), "SFT-SD 0.0001": (low, 0.0)})
        bases[i] = a_base(i, gains)
    return bases


@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_verdicts_are_packed_and_unpacked(verdicts):
    packed = json.loads(json.dumps(claims.pack(verdicts)))
    assert looks.unpack(packed).tolist() == verdicts


def test_an_epoch_is_compared_with_the_base_model_on_its_own_puzzles():
    base = a_base(1, {"TABOM 0.0003": (0.12, 0.03)})
    points = looks.points_of(base, "TABOM")
    before = looks.unpack(base["runs"]["base"]["epochs"][0]["right"]["in"])
    first = looks.unpack(base["runs"]["TABOM 0.0003"]["epochs"][0]["right"]["in"])
    assert len(first) == PUZZLES / 2 and set(points) == {("0.0003", e) for e in (1, 2, 3)}
    assert points["0.0003", 1][0] == pytest.approx(100 * (first.mean() - before[: PUZZLES // 2].mean()))
    near, first = (looks.unpack(base["runs"][key]["epochs"][0]["right"]["near"]) for key in ("base", "TABOM 0.0003"))
    loss = (near[: PUZZLES // 4].mean() - first.mean()) / 2  # far loses nothing
    assert len(first) == PUZZLES / 4 and points["0.0003", 1][1] == pytest.approx(100 * loss)
    assert points["0.0003", 3] == pytest.approx((12.0, 1.5))  # far loses nothing
    assert looks.points_of(base, "TABOM", loss="kl")["0.0003", 3][1] == pytest.approx(2 * 0.03 - 2 * 0.01)
    assert looks.points_of(base, "SFT-SD") == {}


def test_a_frontier_is_straight_between_its_points_and_begins_at_zero():
    points = [(4.0, 2.0), (2.0, 0.0), (4.0, 4.0)]
    assert [looks.loss_at(points, gain) for gain in (0, 1, 2, 3, 4, 9)] == [0, 0, 0, 1.5, 3, 3]
    assert looks.loss_at([(-1.0, 1.0), (3.0, 3.0)], 1.5) == 1.5
    assert looks.loss_at([(100 * (6 / 500), 0.0), (100 * (0.8 + 18 / 1500) - 80, 4.0)], 1.2) == 2.0


def test_forgetting_is_compared_at_the_smaller_of_the_largest_gains():
    good, bad, dear = (0.12, 0.06), (-0.06, 0.06), (0.06, 0.06)  # gain and loss, at both rates
    bases = {}
    for i, (ours, theirs) in enumerate([(dear, good), (bad, good), (dear, None)], 1):
        gains = {f"TABOM {rate}": ours for rate in looks.FRONTIER_RATES}
        gains |= {f"SFT-SD {rate}": theirs for rate in looks.FRONTIER_RATES if theirs}
        bases[i] = a_base(i, gains)
    found, without = looks.loss_at_equal_gain(bases, "TABOM", "SFT-SD")
    assert without == "base-2" and set(found["bases"]) == {1}
    ours, theirs = (list(looks.points_of(bases[1], row).values()) for row in ("TABOM", "SFT-SD"))
    assert found["mean"] == pytest.approx(3.0 - looks.loss_at(theirs, max(x for x, _ in ours)))
    assert found["mean"] > 1  # SFT-SD pays as much for twice the gain


def test_nothing_is_compared_between_two_looks():
    bases = many(13)
    assert looks.looked_at({i: bases[i] for i in range(1, 12)}) == {}
    text = report.markdown({i: bases[i] for i in range(1, 12)})
    assert "Differences are shown at 12 and 24 base models;" in text and "SFT-SD" not in text
    assert list(looks.looked_at(bases)) == list(range(1, 13))
    assert list(looks.looked_at(bases | {0: bases[1]})) == list(range(1, 13))  # base-0 has no part
    assert (
        report.markdown(bases).split("###")[2:] == report.markdown({i: bases[i] for i in range(1, 13)}).split("###")[2:]
    )
    del bases[5]["runs"]["TABOM 0.001"]  # not finished, and the thirteenth does not take its place
    assert looks.looked_at(bases) == {} and len(looks.looked_at(many(30))) == 24


def test_at_the_second_look_the_first_stays():
    first, second = many(12), many(12, ahead=0.3, seed=1)
    bases = first | {number + 12: base for number, base in second.items()}
    text = report.markdown(bases)
    assert report.primary_table(first) in text and text.count("| P1: ") == 2 == text.count("the look at ")


def test_the_primary_measures_have_the_level_of_their_look_after_holm():
    bases = many(12)
    (name, found, level, said, note), second = looks.primary(bases)
    differences = [looks.measure(b["runs"]["TABOM 0.0003"], "in") for b in bases.values()]
    differences = np.array(differences) - [looks.measure(b["runs"]["SFT-SD 0.0003"], "in") for b in bases.values()]
    low, high = scipy_stats.t.interval(1 - level, 11, differences.mean(), scipy_stats.sem(differences))
    assert said == "confirmed" and ": valid" in note and name.startswith("P1")
    assert (found["low"], found["high"]) == pytest.approx((low, high))
    # The smaller p has half of the level; the other, once that holds, has all of it.
    assert sorted((level, second[2])) == [0.0026, 0.0052] and (level < second[2]) == (found["p"] < second[1]["p"])
    assert [one[2] for one in looks.primary(many(24, ahead=0.0))] == [0.024, 0.024]  # none holds


def test_where_both_rows_lose_much_p1_takes_the_lower_rate():
    bases = many(12, cost=0.2)
    for base in bases.values():
        for row, gain in (("SFT-SD", 0.02), ("TABOM", 0.03)):
            base["runs"][f"{row} 0.0001"] = a_base(1, {"x": (gain, 0.0)})["runs"]["x"]
    (_, found, _, _, note), _ = looks.primary(bases)
    assert "rate 0.0001" in note and "TABOM -10.5" in note and "not valid there" in note
    assert found["mean"] == pytest.approx(1.0)


def test_a_verdict_needs_an_interval_on_one_side_of_zero_or_close_around_it():
    def of(low, high, name="in", sign=1, bases=3):
        return looks.verdict(dict(low=low, high=high, bases=dict.fromkeys(range(bases))), name, sign)

    assert of(0.1, 9.0) == "confirmed" == of(-9.0, -0.1, sign=-1)
    assert of(-9.0, -0.1) == "contradicted" == of(0.1, 9.0, sign=-1)
    assert of(-1.4, 1.5) == "not seen" == of(-0.004, 0.005, "tds")
    assert of(-1.6, 1.5) == "not resolved" == of(-0.004, 0.006, "tds") == of(-1.0, 1.6, sign=-1)
    assert of(0.4, 0.5, bases=2) == "not resolved"
    assert of(None, None) == "not measured" == looks.verdict(None, "tds", 1)


def test_the_best_epoch_is_above_the_last_and_one_chosen_on_others():
    bases = many(12)
    (line,) = [x for x in report.best_table(bases).splitlines() if x.startswith("| TABOM | 0.001 ")]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[2:4] == [str(PUZZLES // 2), "12"] and float(cells[4].split()[0]) >= 0


def test_the_tables_hold_every_row_at_every_rate():
    bases = many(12)
    for i in range(1, 13):
        bases[i]["runs"]["naive TD 0.0003"] = a_base(1, {"x": (0.3 + i / 100, 0.0)})["runs"]["x"]
    text = report.markdown(bases)
    rows = [line.split(" | ")[:3] for line in text.splitlines() if line.startswith(("| TABOM |", "| naive TD |"))]
    assert ["| TABOM", "0.0003", "12"] in rows and ["| naive TD", "0.0003", "12"] in rows
    assert "| better than naive trajectory distillation | TABOM - naive TD, in-domain | - | contradicted: " in text
    assert "| base-3 | seed 3: 70.0 | 50.0 | 50.0 | 50.0 | 25.0 | - | - | 7 of 9 | 90 | 9 | 8 | 3 |" in text
    titles = [line for line in text.splitlines() if line.startswith("### ")]
    assert len(titles) == len(set(titles)) == 10


def test_a_row_is_shown_when_all_base_models_that_get_it_have_it():
    """Or each call of the report while rows are made would be one more look."""
    bases, run = many(12), a_base(1, {"x": (0.3, 0.0)})["runs"]["x"]
    for key, numbers, seen in (
        ("naive TD 0.0003", (1, 2, 3), False),
        ("naive TD 0.0003", range(1, 13), True),
        ("T3D 0.0003", (1, 3, 5, 7, 9), False),
        ("T3D 0.0003", (1, 3, 5, 7, 9, 11), True),
        ("dInfer 0.0003", (1, 2, 3, 5, 7, 9, 11), False),
    ):
        for number in numbers:
            bases[number]["runs"][key] = run
        looked = looks.looked_at(bases)
        assert [key in base["runs"] for base in looked.values()].count(True) == (len(numbers) if seen else 0)
    text = report.markdown(bases)
    assert (
        "### in-domain: not shown until all of these base models have it (how many do)\n\ndInfer 0.0003 (7)\n" in text
    )
    del bases[11]["runs"]["SFT-SD 0.0001"]
    assert looks.looked_at(bases) == {}  # P1 may have to be read there


def of_several(count):
    """Base models with runs on the task with several right answers alone."""
    bases = {}
    for i in range(1, 2 * count, 2):
        runs = {}
        for key, run in many(i)[i]["runs"].items():
            if not key.endswith("0.0001"):
                epochs = []
                for epoch in run["epochs"]:
                    right = {name.replace("in", "several"): x for name, x in epoch["right"].items()}
                    epochs.append(dict(epoch, right=right))
                runs[f"{key} several"] = dict(run, epochs=epochs)
        about = {"kept several": [5, 9], "early EOS several": 0.8, "minutes": 3.2, "tried": [[i, 0.7]]}
        bases[i] = dict(number=i, **about, runs=runs)
    return bases


def test_a_task_is_measured_as_in_domain():
    several, in_domain = of_several(1)[1], many(1)[1]
    del in_domain["runs"]["TABOM 0.0001"], in_domain["runs"]["SFT-SD 0.0001"]
    both = dict(in_domain, runs=in_domain["runs"] | several["runs"])
    for task in ("in", "several"):
        (found,) = looks.on_task({1: both}, task).values()
        assert found["runs"] == in_domain["runs"]  # which have the same verdicts
    assert looks.on_task({1: several}, "in") == {} == looks.on_task({1: in_domain}, "several")


def test_on_odd_base_models_alone_a_row_is_shown_when_all_have_it(tmp_path):
    bases = of_several(12)
    for missing in ("TABOM 0.001 several", "SFT-SD 0.0003 several"):
        kept = bases[23]["runs"].pop(missing)
        text = report.markdown(bases)
        shown = [row in text for row in ("| TABOM | 0.0003 |", "| TABOM | 0.001 |", "| SFT-SD | 0.0003 |")]
        assert shown == [row not in missing for row in ("TABOM 0.0003", "TABOM 0.001", "SFT-SD 0.0003")]
        assert f"(how many do)\n\n{missing.removesuffix(' several')} (11)\n" in text and "the look at" not in text
        bases[23]["runs"][missing] = kept
    text = report.markdown({number: bases[number] for number in range(1, 23, 2)})
    assert "of odd ones alone once all have a row." in text and "SFT-SD" not in text
    text = report.markdown(bases)
    gains = [looks.measure(base["runs"]["TABOM 0.0003"], "in") for base in looks.on_task(bases, "several").values()]
    (line,) = [x for x in text.splitlines() if x.startswith("| TABOM | 0.0003 | 12 |")]
    assert f"| TABOM | 0.0003 | 12 | {np.mean(gains) - 50:+.1f} [" in line
    assert "several, 2 a step" in text and "in-domain -" not in text and "in-domain, 2" not in text
    assert "| base-3 | seed 3: 70.0 | - | 50.0 | 50.0 | - | 50.0 | 25.0 | 5 of 9 | 80 |" in text
    (line,) = [x for x in text.splitlines() if x.startswith("| TABOM - SFT-SD | 0.0003 | ")]
    assert line.count(" | ") == 7 and line.count("| +0.0") == 5  # two tokens a step, elsewhere, KL, TDS, order
    write(tmp_path, bases)
    assert report.write_report(tmp_path)["bases"] == 12
    assert (tmp_path / "tables.md").read_text() == text + "\n"
    for base in bases.values():
        base["runs"].update(
            {"base": base["runs"]["base several"], "naive TD 0.001": base["runs"]["TABOM 0.001 several"]}
        )
    text = report.markdown(bases)
    assert "in-domain: all rows" in text and "several: all rows" in text
    assert report.read(tmp_path).keys() == bases.keys()


# ----------------------------------------------------------------------------------------------------------- a folder


def test_a_file_of_another_base_model_or_without_its_tests_is_one_line(tmp_path, capsys):
    write(tmp_path, many(1))
    file, damaged = tmp_path / "bases" / "base-1.json", many(1)[1]
    file.rename(file.with_name("base-2.json"))
    assert report.main([str(tmp_path)]) == 1
    assert "base-2.json: it is of base-1" in capsys.readouterr().err
    damaged["runs"]["base"]["epochs"] = []
    write(tmp_path / "D", {1: damaged})
    assert report.main([str(tmp_path / "D")]) == 1
    assert "base-1.json: this is not what claims keeps of a base model" in capsys.readouterr().err


def write(folder, bases):
    (folder / "bases").mkdir(parents=True)
    for number, base in bases.items():
        (folder / "bases" / f"base-{number}.json").write_text(claims.as_lines(base))


def test_a_folder_is_made_again_from_its_base_models(tmp_path, capsys):
    bases = many(13)
    write(tmp_path / "few", {i: bases[i] for i in range(1, 12)})
    report.write_report(tmp_path / "few")
    assert {file.name for file in (tmp_path / "few").iterdir()} == {"bases", "tables.md"}
    write(tmp_path / "twelve", many(12))
    report.write_report(tmp_path / "twelve")
    write(tmp_path, bases)
    assert report.main([str(tmp_path)]) == 0
    assert (tmp_path / "frontier.png").read_bytes() == (tmp_path / "twelve" / "frontier.png").read_bytes()
    first = {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.is_file()}
    assert set(first) == {"tables.md"} | {f"{n}.{kind}" for n in ("frontier", "tds") for kind in ("png", "pdf")}
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["looked_at"] == 12
    for name in first:
        (tmp_path / name).unlink()
    report.write_report(tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in first} == first


@pytest.mark.parametrize("content", [None, "{}", "{", '{"number": 1, "tried": [], "runs": {}}'])
def test_another_folder_is_one_line(tmp_path, capsys, content):
    if content is not None:
        (tmp_path / "bases").mkdir()
        (tmp_path / "bases" / "base-1.json").write_text(content)
    assert report.main([str(tmp_path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "bases" in line


@pytest.mark.parametrize(("folder", "task"), [(RESULTS, "in"), (RESULTS / "avx512", "several")])
def test_the_committed_tables_are_those_of_the_committed_base_models(folder, task):
    bases = report.read(folder)
    assert report.markdown(bases) + "\n" == (folder / "tables.md").read_text()
    for number, base in bases.items():
        before = base["runs"][looks.key_of("base", 0) if task == "in" else "base several"]
        assert before["epochs"][-1]["right"][task][0] == claims.SIZES[task]
        assert claims.KEPT[0] <= base["tried"][-1][1] <= claims.KEPT[1], number
    assert sum(file.stat().st_size for file in folder.glob("bases/*")) < 3_000_000


def test_the_picture_has_the_rows_that_are_compared_at_the_rates_of_frontiers():
    rows = ("TABOM", "SFT-SD", "naive TD", "T3D", "SFT-GT")
    drawn = [row for row in rows if report.is_drawn(dict(row=row, rate="0.0003"))]
    assert drawn == ["TABOM", "SFT-SD", "naive TD"]
    assert not report.is_drawn(dict(row="TABOM", rate="0.003"))
