"""tabom.py claims: what its rows are, and one small experiment from end to end.

python -m pytest tests/test_claims.py"""

import json

import pytest
from helpers import last_json, shell

import data
import tabom
import train
from experiments import claims, report, sweep
from experiments import puzzles as puzzle_tasks


@pytest.mark.parametrize("name", claims.ROWS)
def test_a_row_is_a_training_run_that_uses_all_it_sets(name, tmp_path):
    settings = claims.settings_of(name, 3)
    made = sweep.training(claims.of_base(claims.ClaimsOptions(), tmp_path), settings)
    parameters, unused = train.objective_parameters(made)
    assert not unused
    assert all(parameters[k] == v for k, v in settings.items() if k not in ("objective", "seed"))
    assert made.seed == 3
    assert (made.epochs, made.lr) == (claims.TRAINING["epochs"], claims.TRAINING["lr"])


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    out = tmp_path_factory.mktemp("F") / "F"
    line = ["claims", "--quick", "--bases", "1", "--seeds", "1", "--rows", "SFT-GT; SFT-SD", "--out", out]
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
            assert report.test(r, stem, at_once)["accuracy"] == right / 6 and len(records) == 6
            assert max(max(x["step"]) for x in records) == (36 if at_once == 1 else 18)
            styles = [set(x["text"]) <= set("abcdef" if stem == "test_in" else "123456") for x in records]
            assert r["styles"][stem]["foreign"] == pytest.approx(sum(styles) / 6)
        assert str(out) not in json.dumps(r)
    steps = {r["steps"] for r in saved["runs"] if "steps" in r}
    assert len(steps) == 1
    commands = [entry["options"]["rows"] for entry in saved["commands"]]
    assert commands[0] == ["SFT-GT", "SFT-SD"] and saved["runs"][-1]["versions"] == saved["versions"]
    row = saved["rows"]["SFT-SD"]["measures"]["in-domain %"]
    tables = (out / "results" / "tables.md").read_text()
    assert f"| SFT-SD | 1 | {row['mean']:.1f} | {row['mean']:.1f} |" in tables in done.stdout
    assert all((out / "results" / f"{k}.png").stat().st_size > 5000 for k in ("tds", "loss", "accuracy"))


def test_the_last_checkpoint_is_tested_and_every_epoch_of_the_first_seed_validated(small):
    run = sweep.result_of(small[0] / "base-0" / "runs" / "SFT-SD" / "seed-0")
    assert run["chosen"]["epoch"] == claims.TRAINING["epochs"] == len(run["curve"])
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
    monkeypatch.setitem(claims.ROWS, "SFT-SD", dict(objective="nelbo", lr=0.5))
    assert tabom.main([str(word) for word in small[1]]) == 1
    assert "seed-0 was made with {'objective': 'nelbo'" in capsys.readouterr().err


def test_an_unknown_row_is_one_line(tmp_path):
    done = shell("claims", "--rows", "TABOM;Tabom", "--out", tmp_path / "F")
    assert done.returncode == 1 and not (tmp_path / "F").exists()
    assert "error: --rows Tabom: none of SFT-GT; SFT-SD; TABOM;" in done.stderr and "Traceback" not in done.stderr


def test_foreign_answers_are_the_same_squares_in_other_letters(tmp_path):
    file = puzzle_tasks.write_puzzles(tmp_path / "p.jsonl", ["latin", "shear"], 40, False, 0, foreign=0.5)
    own = puzzle_tasks.write_puzzles(tmp_path / "q" / "p.jsonl", ["latin", "shear"], 2, False, 0)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    styles = set()
    for row in rows:
        task = next(t for t in puzzle_tasks.TASKS.values() if t.tag == row["prompt"][0])
        style = next(s for s in (task.symbols, task.foreign) if set(row["answer"]) <= set(s))
        styles.add((task.tag, style == task.symbols))
        clues = row["prompt"][1:].translate(str.maketrans(task.symbols, style))
        assert all(a in (".", b) for a, b in zip(clues, row["answer"]))
    assert len(styles) == 4
    both = puzzle_tasks.write_puzzles(tmp_path / "r" / "p.jsonl", ["latin", "shear"], 2, False, 0, both=True)
    plain = [json.loads(line)["answer"] for line in own.read_text().splitlines()]
    for answer, (first, second) in zip(plain, (json.loads(x)["answer"] for x in both.read_text().splitlines())):
        assert first == answer and len(set(zip(first, second))) == 6 and not set(first) & set(second)
