"""tabom.py claims: what its rows are, and one small experiment from end to end.

python -m pytest tests/test_claims.py"""

import json

import pytest
from helpers import flags, last_json, shell

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
    assert made.weight_decay == 0 and made.cut_eos  # as the committed results were made
    assert (made.epochs, made.lr) == (claims.TRAINING["epochs"], claims.TRAINING["lr"])


def test_the_order_is_measured_alike_in_every_row(tmp_path):
    bench = claims.bench_of(claims.ClaimsOptions(), None, tmp_path)
    assert (bench.window, bench.margin) == (8, 0.2)
    assert claims.settings_of("TABOM, window 16", 0)["window"] == 16
    assert claims.settings_of("TABOM, margin 0.3", 0) == dict(
        objective="tabom", window=8, margin=0.3, weight=1.0, seed=0
    )
    assert claims.settings_of("SFT-SD", 4) == dict(objective="nelbo", seed=4)


def test_a_recipe_sets_the_rows_on_given_trajectories(monkeypatch):
    asked = []
    monkeypatch.setattr(sweep, "sweep", lambda c, grid: asked.append((c, grid)))
    given = dict(data="T", model="M", test=("gsm8k",), recipe="dream-ling-coder", seeds=2, seed=3)
    claims.claims(claims.ClaimsOptions(**given))
    claims.claims(claims.ClaimsOptions(**given, ground_truth="D", methods=("entropy",)))
    (c, grid), (with_truth, longer) = asked
    assert (c.lr, c.margin, c.methods, c.keep, c.metric) == (1e-4, 0.1, ("all",), "all", "last")
    assert with_truth.methods == ("entropy",)
    assert len(grid) == 2 * 10 and set(longer) - set(grid) == {"SFT-GT/seed-3", "SFT-GT/seed-4"}
    parameters = {name: train.objective_parameters(sweep.training(c, settings))[0] for name, settings in grid.items()}
    tabom_row, no_ranking = parameters["TABOM/seed-3"], parameters["TABOM, no ranking/seed-4"]
    assert (tabom_row["window"], tabom_row["weight"], tabom_row["starts"]) == (32, 2.0, "non-ltr")
    assert no_ranking == dict(tabom_row, weight=0.0)
    assert parameters["TABOM, global window/seed-3"]["starts"] == "uniform"
    assert parameters["dParallel/seed-3"]["block_length"] == 32


@pytest.mark.slow
def test_rows_on_the_authors_trajectories(tiny, trajectories, puzzles, tmp_path, capsys):
    """A file in the authors' format, as it is: --methods chooses its rows, and all runs train on the same ones."""
    rows = []
    for i, record in enumerate(data.read_trajectories(trajectories)):
        rows.append(data.to_release_format(record, 2, ("entropy", "credit", "topk_margin")[i % 3]))
    claims.write_rows(tmp_path / "theirs.jsonl", rows)
    words = flags(model=tiny, data=tmp_path / "theirs.jsonl", test=puzzles, recipe="llada-prm12k", seeds=1)
    words += flags(methods="entropy,credit", rows="SFT-SD;TABOM", out=tmp_path / "C")
    assert tabom.main(["claims", *words]) == 0
    out = capsys.readouterr().out
    assert last_json(out)["runs"] == 3 and "| objective |" in out
    for name in ("SFT-SD", "TABOM"):
        folder = tmp_path / "C" / "runs" / name / "seed-0"
        made = json.loads((folder / "R-1" / "meta.json").read_text())
        assert (made["recipe"], made["examples"]) == ("llada-prm12k", 8)
        assert [one["tokens_per_step"] for one in sweep.result_of(folder)["tests"]] == [1, 2]


def test_trajectories_need_a_model_and_something_to_answer(tmp_path):
    with pytest.raises(ValueError, match="--data, --model and --test: claims needs all three, or none for its puzzles"):
        claims.claims(claims.ClaimsOptions(data="T", model="M", out=str(tmp_path / "C")))
    with pytest.raises(ValueError, match="--quick is for the puzzles"):
        claims.claims(claims.ClaimsOptions(data="T", model="M", test=("gsm8k",), quick=True))


def write_old_run(folder, right, **more):
    """A finished run as an earlier version left it: tests named by texts, and a ranking loss called rank."""
    scores = dict(accuracy=right, questions=2, tds=0.1, rank=0.2, rank_least=0.05, per_step=[0.1, 0.3])
    scores.update(inversions_step=0.5, inversions_window=0.25)
    tests = {}
    for name in ("test_in", "test_out"):
        source = f"data/{name}.jsonl"
        tests[source] = scores
        tests[f"{source}, 2 a step"] = dict(accuracy=right / 2, questions=2)
        rows = [dict(id=0, text="123456", correct=True), dict(id=1, text="abcdef", correct=False)]
        (folder / f"test-{name}").mkdir(parents=True)
        claims.write_rows(folder / f"test-{name}" / "trajectories-00000.jsonl", rows)
    result = dict(name=folder.name, chosen=dict(accuracy=right, questions=2), tests=tests, **more)
    (folder / "result.json").write_text(json.dumps(result))


def test_a_finished_experiment_of_an_old_version_is_read(tmp_path):
    base = tmp_path / "base-0"
    settings = dict(objective="nelbo", seed=0)
    training = dict(loss=1.0, ce=1.0, rank=0.5)
    write_old_run(base / "runs" / "base", 0.25, settings=dict(objective="base"))
    write_old_run(base / "runs" / "SFT-SD" / "seed-0", 0.5, settings=settings, steps=7, training=training, curve=[0.5])
    (base / "result.json").write_text(json.dumps(dict(name="base-0", seed=3, puzzles=9, kept=5)))
    (base / "D").mkdir()
    losses = []
    for source, loss in (("kept.jsonl (decoded)", 0.5), ("truth.jsonl", 2.0)):
        losses.append(dict(model="base", data=source, mask_ratio=1.0, loss=loss))
    claims.write_rows(base / "D" / "loss.jsonl", losses)

    found = claims.collect(tmp_path)
    assert list(found) == [("base", "base-0", None), ("SFT-SD", "base-0", 0)]
    run = found["SFT-SD", "base-0", 0]
    assert run["training"] == dict(loss=1.0, ce=1.0, ranking=0.5)
    assert report.scores_of(run, "test_in")["ranking_least"] == 0.05
    assert report.scores_of(run, "test_out", 2) == dict(accuracy=0.25, questions=2)
    assert run["styles"]["test_in"] == dict(foreign=0.5, own_right=1.0)
    assert run["styles"]["test_out"] == dict(foreign=0.5, own_right=0.0)
    text = report.markdown(found, claims.loss_curves(tmp_path), list(claims.GRID))
    assert "| base-0 | 3 | 25.0 | 25.0 | 9 | 5 | 7 |" in text
    assert "| SFT-SD | 1 | 50.0 | 50.0 | +25.0 | - | - |" in text
    assert "| ground truth | 2.0000 |" in text and "| self-distilled | 0.5000 |" in text
    claims.check_row_settings(base / "runs" / "SFT-SD" / "seed-0", settings)
    with pytest.raises(ValueError, match="was made with .*remove it"):
        claims.check_row_settings(base / "runs" / "SFT-SD" / "seed-0", dict(settings, lr=0.5))


# --------------------------------------------------------------------------------------------------------- end to end


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    out = tmp_path_factory.mktemp("F") / "F"
    line = ["claims", "--quick", "--bases", "1", "--seeds", "1", "--rows", "SFT-GT; SFT-SD", "--out", out]
    done = shell(*line)
    assert done.returncode == 0, done.stderr
    return out, line, done


@pytest.mark.slow
def test_no_puzzle_is_in_two_datasets_and_sft_gt_trains_on_what_was_kept(small):
    base = small[0] / "base-0"
    prompts = []
    for name in ("train", "validation", "test_in", "test_out"):
        for r in data.read_examples(base / "data" / f"{name}.jsonl"):
            prompts.append(r["prompt"])
    assert len(prompts) == len(set(prompts)) == 24 + 6 + 6 + 6
    kept = {r["id"]: r for r in data.read_trajectories(base / "T") if data.usable(r)}
    truth = data.read_examples(base / "truth.jsonl")
    assert {e["id"] for e in truth} == set(kept) and kept
    for e in truth:
        assert e["answer"] == kept[e["id"]]["text"].translate(str.maketrans("123456", "abcdef"))


@pytest.mark.slow
def test_the_tables_hold_what_the_trajectories_say(small):
    out, _, done = small
    saved = json.loads((out / "results" / "results.json").read_text())
    assert {r["row"] for r in saved["runs"]} == {"base", "SFT-GT", "SFT-SD"}
    assert saved["grid"] == list(claims.GRID) and len(saved["losses"]) == 20
    for r in saved["runs"]:
        folder = out / "base-0" / "runs" / r["row"] / ("" if r["row"] == "base" else "seed-0")
        for stem, at_once in (("test_in", 1), ("test_in", 2), ("test_out", 1), ("test_out", 2)):
            records = data.read_trajectories(folder / f"test-{stem}{'' if at_once == 1 else '-2'}")
            right = sum(x["correct"] for x in records)
            assert report.scores_of(r, stem, at_once)["accuracy"] == pytest.approx(right / 6)
            assert len(records) == 6
            assert max(max(x["step"]) for x in records) == (36 if at_once == 1 else 18)
            styles = [set(x["text"]) <= set("abcdef" if stem == "test_in" else "123456") for x in records]
            assert r["styles"][stem]["foreign"] == pytest.approx(sum(styles) / 6)
        assert str(out) not in json.dumps(r)
    steps = {r["steps"] for r in saved["runs"] if "steps" in r}
    assert len(steps) == 1
    commands = [entry["options"]["rows"] for entry in saved["commands"]]
    assert commands[0] == ["SFT-GT", "SFT-SD"] and saved["runs"][-1]["versions"] == saved["versions"]
    right = 100 * report.scores_of(saved["runs"][-1], "test_in")["accuracy"]
    tables = (out / "results" / "tables.md").read_text()
    assert f"| SFT-SD | 1 | {right:.1f} | {right:.1f} |" in tables
    assert tables in done.stdout
    for name in ("tds", "loss", "accuracy"):
        assert (out / "results" / f"{name}.png").stat().st_size > 5000
        assert (out / "results" / f"{name}.pdf").stat().st_size > 5000


@pytest.mark.slow
def test_the_last_checkpoint_is_tested_and_every_epoch_of_the_first_seed_validated(small):
    run = sweep.result_of(small[0] / "base-0" / "runs" / "SFT-SD" / "seed-0")
    assert run["chosen"]["epoch"] == claims.TRAINING["epochs"] == len(run["curve"])
    assert run["chosen"]["accuracy"] == run["curve"][-1]
    for name in ("test-test_in", "test-test_out-2"):
        meta = json.loads((small[0] / "base-0" / "runs" / "SFT-SD" / "seed-0" / name / "meta.json").read_text())
        assert meta["adapter"] == run["chosen"]["checkpoint"]


@pytest.mark.slow
def test_a_second_start_adds_rows_and_makes_nothing_again(small):
    out, line, _ = small
    before = {p: p.stat().st_mtime_ns for p in out.rglob("result.json")}
    line = [part if part != "SFT-GT; SFT-SD" else "TABOM" for part in line]
    done = shell(*line)
    assert done.returncode == 0, done.stderr
    assert last_json(done.stdout)["rows"] == 4
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert len(list(out.rglob("result.json"))) == len(before) + 1


@pytest.mark.slow
def test_a_row_that_means_something_else_now_is_refused(small, monkeypatch, capsys):
    monkeypatch.setitem(claims.ROWS, "SFT-SD", dict(objective="nelbo", lr=0.5))
    assert tabom.main([str(word) for word in small[1]]) == 1
    assert "seed-0 was made with {'objective': 'nelbo'" in capsys.readouterr().err


def test_an_unknown_row_is_one_line(tmp_path, capsys):
    assert tabom.main(["claims", "--rows", "TABOM;Tabom", "--out", str(tmp_path / "F")]) == 1
    assert not (tmp_path / "F").exists()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --rows Tabom: none of SFT-GT; SFT-SD; TABOM;")


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
