"""tabom.py sweep: the grid, the choice of a checkpoint, the table, and what a second start does.

python -m pytest tests/test_sweep.py"""

import gzip
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import ROOT, flags, last_json, shell, write_lines

import distill
import evaluate
import lora
import model
import objectives
import tabom
from experiments import jobs, sweep, table
from runs import torchrun

SMALL = dict(check="exact", keep="all", epochs=2, global_batch=6, batch_size=6, lr=1e-2, warmup=0, decode_batch=16)


def sweep_options(**changes):
    return sweep.SweepOptions(**{**dict(model="M", data="D", out="O"), **changes})


def words(over, **options):
    return ["sweep", "--over", *over, *flags(**options)]


# ------------------------------------------------------------------------------------------------------------- grid


def test_the_default_grid_is_every_objective_but_the_ideal_one_with_three_seeds():
    grid, names = sweep.expand(sweep_options()), set(objectives.OBJECTIVES) - {"ideal"}
    assert len(grid) == 3 * len(names)
    assert {s["objective"] for s in grid.values()} == names
    assert {s["seed"] for s in grid.values()} == {0, 1, 2}


def test_a_grid_is_the_product_of_what_each_objective_uses():
    over = ("objective=tabom,nelbo", "window=8,global", "margin=0.1,0.3", "lr=1e-3,1e-2")
    grid = sweep.expand(sweep_options(over=over))
    assert len(grid) == 2 * 2 * 2 + 2
    tabom_runs = [s for s in grid.values() if s["objective"] == "tabom"]
    assert {(s["window"], s["margin"], s["lr"]) for s in tabom_runs} == {
        (w, margin, lr) for w in (8, "global") for margin in (0.1, 0.3) for lr in (1e-3, 1e-2)
    }
    assert [set(s) for s in grid.values() if s["objective"] == "nelbo"] == [{"objective", "lr"}] * 2
    assert "objective=tabom+window=8+margin=0.3+lr=0.001" in grid


def test_one_objective_with_its_own_grid():
    grid = sweep.expand(sweep_options(objective="t3d", over=("beta=0.1,1",)))
    assert list(grid) == ["objective=t3d+beta=0.1", "objective=t3d+beta=1.0"]


def test_what_an_objective_does_not_use_makes_no_run():
    over = ("objective=tabom,sft-gt,t3d", "reference_steps=5,10", "keep=all,finished")
    assert list(sweep.expand(sweep_options(over=over))) == [
        "objective=tabom+keep=all",
        "objective=tabom+keep=finished",
        "objective=sft-gt",
        *(f"objective=t3d+reference_steps={n}+keep={k}" for n in (5, 10) for k in ("all", "finished")),
    ]


@pytest.mark.parametrize(
    "over, message",
    [
        ("windw=8", "--over windw=8: train has no option --windw; did you mean window?"),
        ("xyzzy=8", "train has no option --xyzzy; a grid takes seed, objective, window, "),
        ("window", "--over window: expected OPTION=VALUE,VALUE"),
        ("model=a,b", "--over model=a,b: --model is the same in all runs of a sweep; a grid takes "),
        ("lora-targets=q_proj", "--lora-targets is the same in all runs"),
        ("cut_eos=true", "--cut-eos is the same in all runs"),
        ("recipe=dream-prm12k", "--recipe is the same in all runs"),
        ("decode_batch=8", "--decode-batch is an option of the sweep, not of its runs"),
        ("window=8,x", "--window 'x': must be"),
        ("seed=0,", "--seed '': must be int"),
        ("margin=-1", "--margin -1.0: must be a number of at least 0"),
        ("margin=nan", "--margin nan: must be"),
        ("window=1", "--window 1: needs at least 2"),
        ("objective=tabmo", "'tabmo': must be one of tabom, nelbo, .*, sft-gt"),
        ("keep=good", "--keep 'good': must be one of"),
    ],
)
def test_a_grid_refuses(over, message):
    with pytest.raises(ValueError, match=message):
        sweep.expand(sweep_options(over=(over,)))


def test_an_option_is_in_a_grid_once():
    with pytest.raises(ValueError, match="--over seed=1: seed is given twice"):
        sweep.expand(sweep_options(over=("seed=0", "seed=1")))


# -------------------------------------------------------------------------------------------------- choice and table


def test_the_best_checkpoint_is_the_first_of_the_highest_metric():
    found = [dict(epoch=1, accuracy=0.5, tds=3), dict(epoch=2, accuracy=0.7, tds=1), dict(epoch=3, accuracy=0.7, tds=2)]
    assert sweep.choose(sweep_options(metric="accuracy"), found)["epoch"] == 2
    assert sweep.choose(sweep_options(metric="tds"), found)["epoch"] == 1
    assert sweep.choose(sweep_options(metric="tds"), [dict(epoch=1, tds=None), found[1]])["epoch"] == 2


def test_the_checkpoint_is_that_of_the_epoch_that_is_asked_for():
    rounds = [dict(round=number, epoch=epoch) for number in (1, 2) for epoch in (1, 2, 3)]
    assert sweep.choose(sweep_options(epoch="last"), rounds) == dict(round=2, epoch=3)
    assert sweep.choose(sweep_options(epoch=2), rounds) == dict(round=2, epoch=2)
    assert list(map(sweep.which_epoch, ("best", "last", "3"))) == ["best", "last", 3]
    for text in ("0", "-1", "first", "1.5", ""):
        with pytest.raises(ValueError, match="must be best, last, or the number of an epoch"):
            sweep.which_epoch(text)


def test_the_table_has_mean_and_standard_deviation_over_seeds():
    def result(accuracy, tds, **settings):
        tests = [dict(source="a/x.jsonl", tokens_per_step=1, scores=dict(accuracy=accuracy, questions=10, tds=tds))]
        tests.append(dict(source="a/x.jsonl", tokens_per_step=2, scores=dict(accuracy=accuracy / 4, questions=10)))
        return dict(settings=settings, chosen=dict(accuracy=accuracy / 2), tests=tests)

    found = [
        result(0.5, 0.25, objective="base"),
        result(0.6, 0.2, objective="tabom", window=8, seed=0),
        result(0.8, 0.4, objective="tabom", window=8, seed=1),
        result(0.1, None, objective="nelbo", seed=0),
    ]
    rows = table.over_seeds(found)
    assert table.sweep_table(rows).splitlines() == [
        "| row | window | runs | validation % | x % | x, 2 a step % | TDS |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| No-SFT |  | 1 | 25.0 | 50.0 | 12.5 | 0.250 |",
        "| TABOM | 8 | 2 | 35.0 ± 7.1 (+10.0) | 70.0 ± 14.1 (+20.0) | 17.5 ± 3.5 (+5.0) | 0.300 ± 0.141 (+0.050) |",
        "| SFT-SD |  | 1 | 5.0 (-20.0) | 10.0 (-40.0) | 2.5 (-10.0) | - |",
    ]
    (_, _, second, _) = rows[1]["scores"]
    assert second["source"] == "a/x.jsonl" and second["tokens_per_step"] == 2 and second["values"] == [15.0, 20.0]


def test_domains_have_means_and_gains_over_the_model_before_training():
    """The paper's Table 3, Dream before training and TABOM: averages 60.61 and 62.71 in-domain, 55.74 and 57.98 OOD."""
    names, paper = ("gsm8k", "math500", "humaneval", "mbpp", "ifeval"), {}
    paper["base"] = (81.41, 39.80, 52.66, 58.00, 56.56)
    paper["tabom"] = (84.31, 41.10, 58.54, 59.20, 56.19)
    found = []
    for objective, scores in paper.items():
        tests = []
        for source, score in zip(names, scores):
            tests.append(dict(source=source, tokens_per_step=1, scores=dict(accuracy=score / 100, tds=None)))
        found.append(dict(settings=dict(objective=objective), chosen={}, tests=tests))
    base, ours = table.over_seeds(found, ("gsm8k", "math500"))
    means = {one["measure"]: one for one in ours["scores"] if one["measure"] in ("in-domain %", "OOD %")}
    assert means["in-domain %"]["mean"] == pytest.approx(62.705) and means["OOD %"]["mean"] == pytest.approx(
        57.9767, 1e-5
    )
    assert means["in-domain %"]["gain"] == pytest.approx(2.1) and means["OOD %"]["gain"] == pytest.approx(2.2367, 1e-4)
    head, _, *_, last = table.sweep_table([base, ours]).splitlines()
    assert head == "| row | runs | gsm8k % | math500 % | humaneval % | mbpp % | ifeval % | in-domain % | OOD % | TDS |"
    assert last.startswith("| TABOM | 1 | 84.3 (+2.9) | 41.1 (+1.3) |") and last.endswith(
        "| 62.7 (+2.1) | 58.0 (+2.2) | - |"
    )
    assert not [one for one in table.over_seeds(found)[1]["scores"] if one["measure"] in means]  # none were named


@pytest.mark.parametrize("name", ["test", "validation", "ground_truth"])
def test_a_dataset_that_is_not_there_is_found_before_anything_is_made(name, tiny, puzzles, tmp_path, capsys):
    words = {"model": tiny, "data": puzzles, "test": puzzles, name: tmp_path / "none.jsonl", "out": tmp_path / "S"}
    assert tabom.main(["sweep", *flags(**words, epoch="last")]) == 1
    assert "none.jsonl" in capsys.readouterr().err and not (tmp_path / "S").exists()


def test_models_are_tested_with_the_attention_that_they_are_trained_with():
    c = sweep_options(block_causal=4)
    for options in (sweep.decoding(c, None, "D", "out", 0, None), sweep.training(c, dict(objective="tabom"))):
        assert options.block_causal == 4
    assert sweep.machine_of(c)["block_causal"] == 4  # with which benchmarks are answered, too


def test_rounds_need_an_adapter_in_every_run(puzzles):
    c = sweep_options(data=str(puzzles), test=(str(puzzles),), epoch="last", rounds=2, over=("lora_rank=0,4",))
    with pytest.raises(ValueError, match="--rounds needs an adapter"):
        sweep.check_sweep(c, sweep.expand(c))


def test_rows_are_a_grid():
    rows_of_paper = ("No-SFT", "SFT-SD", "SFT-GT", "TABOM, no ranking")
    grid = sweep.expand(sweep_options(rows=rows_of_paper, over=("seed=0,1", "window=8,16")))
    assert list(grid) == [
        *(f"{row}+seed={seed}" for row in ("SFT-SD", "SFT-GT") for seed in (0, 1)),
        *(f"TABOM, no ranking+seed={seed}+window={w}" for seed in (0, 1) for w in (8, 16)),
    ]
    assert grid["TABOM, no ranking+seed=1+window=16"] == dict(objective="tabom", weight=0.0, seed=1, window=16)
    assert set(sweep.expand(sweep_options(rows=("T3D",)))) == {f"T3D+seed={seed}" for seed in (0, 1, 2)}
    assert set(sweep.expand(sweep_options(rows=("T3D",), over=()))) == {"T3D"}
    assert sweep.expand(sweep_options(rows=("No-SFT",))) == {}
    with pytest.raises(ValueError, match="--rows tabom: none of No-SFT; SFT-GT; "):
        sweep.expand(sweep_options(rows=("tabom",)))
    for text in ("weight=1,2", "objective=nelbo"):
        name = text.partition("=")[0]
        with pytest.raises(ValueError, match=f"--over {text}: --rows TABOM, no ranking sets {name} itself"):
            sweep.expand(sweep_options(rows=("TABOM, no ranking",), over=(text,)))


def test_unchecked_answers_stand_beside_the_score():
    def result(accuracy, unchecked, seed):
        scores = dict(accuracy=accuracy, questions=20, unchecked=unchecked, tds=0.25)
        tests = [dict(source="x.jsonl", tokens_per_step=1, scores=scores)]
        chosen = dict(accuracy=accuracy, questions=20, unchecked=0)
        return dict(settings=dict(objective="tabom", seed=seed), chosen=chosen, tests=tests)

    rows = table.over_seeds([result(0.5, 4, 0), result(0.6, 5, 1)])
    *_, row = table.sweep_table(rows).splitlines()
    assert row == "| TABOM | 2 | 55.0 ± 7.1 | 55.0 ± 7.1 (22.5 % unchecked) | 0.250 ± 0.000 |"
    without = result(0.5, 0, 2)
    without["tests"][0]["scores"]["tds"] = None  # answers of EOS alone
    *_, row = table.sweep_table(table.over_seeds([result(0.5, 0, 0), without])).splitlines()
    assert row == "| TABOM | 2 | 50.0 ± 0.0 | 50.0 ± 0.0 | 0.250 (of 1) |"


def test_an_accuracy_is_over_all_questions(monkeypatch, tiny, tmp_path):
    """Lists of answers with prose in them gave no verdict where none was right, and so 100 %."""
    rows = []
    for i, answer in enumerate((["12", "a dozen"], ["7", "seven"], "a long walk", "8")):
        rows.append(dict(id=i, prompt=f"L{i + 1}", answer=answer))
    source = write_lines(tmp_path / "lists.jsonl", rows)
    texts = {"L1": "12", "L2": "9", "L3": "no", "L4": "9"}
    record_of = distill.record_of

    def says(e, *more):
        return dict(record_of(e, *more), text=texts[e["prompt"]], finished=True)

    monkeypatch.setattr(distill, "record_of", says)
    c = sweep_options(model=str(tiny), test=(str(source),), device="cpu")
    bench = sweep.Workbench(c, torchrun.Processes("cpu", alone=True))
    found = sweep.answer_set(bench, None, source, tmp_path / "out", 0)
    assert found == dict(accuracy=0.25, questions=4, unchecked=1)
    benchmark = dict(correct=3, n=12, not_graded=2)
    monkeypatch.setattr(evaluate, "evaluate", lambda *_: dict(scores=[benchmark]))
    assert sweep.answer_set(bench, None, "gsm8k", tmp_path / "b", 0) == dict(accuracy=0.25, questions=12, unchecked=2)


# --------------------------------------------------------------------------------------------------- one loaded model


@pytest.fixture
def loads(monkeypatch):
    """The names of the models that are loaded."""
    names, load = [], model.load

    def counted(folder, **options):
        names.append(Path(folder).name)
        return load(folder, **options)

    monkeypatch.setattr(model, "load", counted)
    return names


def bench_options(tiny, puzzles, trajectories, **changes):
    settings = dict(SMALL, over=("seed=0",), device="cpu", test_limit=3, metric="tds")
    settings.update(model=str(tiny), data=str(trajectories), validation=str(puzzles), test=(str(puzzles),), out="O")
    return sweep.SweepOptions(**{**settings, **changes})


def test_a_run_loads_the_base_model_once_and_scores_as_if_each_step_had_loaded_it(
    tiny, puzzles, trajectories, tmp_path, loads
):
    c = bench_options(tiny, puzzles, trajectories)
    bench = sweep.Workbench(c, torchrun.Processes("cpu", alone=True))
    result = sweep.one_run(bench, dict(objective="tabom", window=4, seed=0), trajectories, tmp_path / "run")
    assert loads == ["tiny"] and len(result["checkpoints"]) == 2
    checkpoint = result["chosen"]["checkpoint"]
    again = distill.distill(sweep.decoding(c, checkpoint, puzzles, tmp_path / "again", 0, 3), bench.processes)
    assert again["correct"] / 3 == result["tests"][0]["scores"]["accuracy"]
    written = {}
    for name in ("run/test-train", "again"):
        (file,) = (tmp_path / name).glob("trajectories-*")
        written[name] = file.read_text()
    assert written["again"] == written["run/test-train"]
    assert loads == ["tiny"] * 2


def test_training_of_all_weights_loads_each_checkpoint_once(tiny, puzzles, trajectories, tmp_path, loads):
    c = bench_options(tiny, puzzles, trajectories, lora_rank=0, epochs=1)
    bench = sweep.Workbench(c, torchrun.Processes("cpu", alone=True))
    sweep.one_run(bench, dict(objective="nelbo", seed=0), trajectories, tmp_path / "run")
    assert loads == ["tiny", "epoch-1"]


def test_the_base_model_is_not_had_with_an_adapter_on_it(tiny, puzzles, trajectories, tmp_path):
    lora.save(lora.inject(model.load(tiny), rank=4), tmp_path / "adapter")
    bench = sweep.Workbench(bench_options(tiny, puzzles, trajectories), torchrun.Processes("cpu", alone=True))
    before = bench.at(None)
    adapted = bench.at(str(tmp_path / "adapter"))
    assert adapted is before and lora.layers(adapted.m)
    with pytest.raises(ValueError, match="has an adapter on it"):
        bench.at(None)
    bench.clear()
    assert not lora.layers(bench.at(None).m)


def test_the_order_is_measured_alike_with_the_window_of_the_sweep():
    for options, expected in [
        (dict(), (32, 0.2)),
        (dict(window=16, margin=0.0), (16, 0.0)),
        (dict(window="global"), (32, 0.2)),  # the windows of a ranking loss have a size
        (dict(over=("window=4,16",)), (32, 0.2)),
    ]:
        bench = sweep.Workbench(sweep_options(**options), None)
        assert (bench.window, bench.margin) == expected
    bench = sweep.Workbench(sweep_options(window=16), None, window=8, margin=0.1)
    assert (bench.window, bench.margin) == (8, 0.1)


# ------------------------------------------------------------------------------------------------------- end to end


@pytest.fixture(scope="module")
def swept(tiny, puzzles, tmp_path_factory):
    """A sweep of two objectives and two seeds: its folder and its last line."""
    out = tmp_path_factory.mktemp("S") / "S"
    over = ["objective=tabom,sft-gt", "seed=0,1"]
    line = words(over, model=tiny, data=puzzles, validation=puzzles, test=puzzles, test_limit=4, out=out, **SMALL)
    done = shell(*line)
    assert done.returncode == 0, done.stderr
    return out, line, last_json(done.stdout)


def results(out):
    return {p.parent.name: json.loads(p.read_text()) for p in (out / "runs").glob("*/result.json")}


@pytest.mark.slow
def test_a_sweep_trains_every_run_and_tests_its_best_checkpoint(tiny, swept):
    out, _, result = swept
    runs = {"base", *(f"objective={o}+seed={s}" for o in ("tabom", "sft-gt") for s in (0, 1))}
    assert set(results(out)) == runs and result["runs"] == 5
    assert [(row["objective"], row["runs"]) for row in result["rows"]] == [("base", 1), ("tabom", 2), ("sft-gt", 2)]
    for name in runs - {"base"}:
        run = results(out)[name]
        meta = json.loads((out / "runs" / name / "R-1" / "meta.json").read_text())
        assert meta["seed"] == run["settings"]["seed"]
        assert meta["objective"] == run["settings"]["objective"].replace("sft-gt", "nelbo")
        accuracies = [checkpoint["accuracy"] for checkpoint in run["checkpoints"]]
        assert run["chosen"]["accuracy"] == max(accuracies) and len(accuracies) == 2
        (tested,) = run["tests"]
        assert tested["tokens_per_step"] == 1
        assert tested["scores"]["questions"] == 4 and tested["scores"]["tds"] > 0
        loaded = lora.load(model.load(tiny), run["chosen"]["checkpoint"])
        answered = (out / "runs" / name / "test-train" / "meta.json").read_text()
        assert json.loads(answered)["adapter"] == run["chosen"]["checkpoint"] and lora.layers(loaded)
    written = json.loads((out / "results.json").read_text())
    assert written["rows"] == result["rows"] and len(written["runs"]) == 5
    assert (out / "table.md").read_text().startswith("| row | runs | validation % | train % | TDS |")


@pytest.mark.slow
def test_a_second_start_makes_only_what_is_missing(swept, tmp_path):
    out, line, result = swept
    again = tmp_path / "S"
    shutil.copytree(out, again)
    lost = again / "runs" / "objective=tabom+seed=1"
    before = (lost / "result.json").read_text().replace(str(out), str(again))
    shutil.rmtree(lost)
    kept = {f: f.stat().st_mtime_ns for f in again.rglob("result.json")}
    done = shell(*[str(again) if word == str(out) else word for word in line])
    assert done.returncode == 0, done.stderr
    assert last_json(done.stdout)["rows"] == result["rows"]
    assert (lost / "result.json").read_text() == before
    assert all(f.stat().st_mtime_ns == t for f, t in kept.items())


@pytest.mark.slow
def test_what_another_process_holds_is_left_alone_until_it_is_free(tmp_path):
    lock = "p = torchrun.Processes('cpu'); p.lock(sys.argv[1]); print('held', flush=True); input()"
    other = f"import sys; from runs import torchrun; {lock}"
    held, done = tmp_path / "held", []
    held.mkdir()

    def work(folder):
        done.append(folder.name)
        if folder.name == "free":  # meanwhile the other process ends, and its job is not done
            process.communicate("\n")
        return dict(number=len(done))

    process = subprocess.Popen(
        [sys.executable, "-c", other, held], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout.readline() == "held\n"
    work_of = {tmp_path / name: work for name in ("held", "free", "last")}
    alone = torchrun.Processes("cpu", alone=True)
    found = jobs.share(work_of, torchrun.Processes("cpu"), alone)
    assert done == ["free", "last", "held"]
    assert found == [dict(name="held", number=3), dict(name="free", number=1), dict(name="last", number=2)]
    assert not alone.locks


def test_without_locks_each_process_keeps_to_its_own_jobs(tmp_path):
    done = []
    names = [tmp_path / name for name in "abcd"]

    def work(folder):
        done.append(folder.name)
        if folder.name == "d":  # the other process has been at its own
            for other in names[::2]:
                other.mkdir(exist_ok=True)
                (other / "result.json").write_text('{"theirs": 1}')
        return {}

    second = SimpleNamespace(index=1, count=2, first=False)
    without_locks = SimpleNamespace(lock=lambda folder: False, unlock=lambda: None)
    assert jobs.share(dict.fromkeys(names, work), second, without_locks) is None
    assert done == ["b", "d"]


@pytest.mark.slow
def test_two_processes_share_the_runs(swept, tmp_path):
    out, line, result = swept
    done = shell(*[str(tmp_path / "S") if word == str(out) else word for word in line], processes=2)
    assert done.returncode == 0, done.stderr
    for row, expected in zip(last_json(done.stdout)["rows"], result["rows"]):
        assert row["objective"] == expected["objective"]
        for score, other in zip(row["scores"], expected["scores"]):
            assert score["measure"] == other["measure"]
            assert score["values"] == pytest.approx(other["values"], rel=1e-3)


@pytest.mark.slow
def test_rounds_distill_again_with_what_the_model_has_become(tiny, puzzles, tmp_path):
    settings = dict(model=tiny, data=puzzles, test=puzzles, epoch="last", rounds=2, limit=6, **SMALL)
    assert tabom.main(words(["objective=nelbo"], out=tmp_path / "S", **settings)) == 0
    folder = tmp_path / "S" / "runs" / "objective=nelbo"
    first, second = (folder / f"R-{number}" / "epoch-2" for number in (1, 2))
    redistilled = json.loads((folder / "T-2" / "meta.json").read_text())
    assert redistilled["adapter"] == str(first) and redistilled["limit"] == 6
    trained = json.loads((folder / "R-2" / "meta.json").read_text())
    assert trained["adapter"] == str(first) and trained["data"] == str(folder / "T-2")
    run = json.loads((folder / "result.json").read_text())
    assert run["chosen"]["checkpoint"] == str(second) and [c["round"] for c in run["checkpoints"]] == [1, 2]


@pytest.mark.slow
def test_the_number_of_epochs_may_be_in_the_grid(tiny, puzzles, trajectories, tmp_path):
    settings = dict(model=tiny, data=trajectories, test=puzzles, test_limit=2, epoch="last", **SMALL)
    assert tabom.main(words(["epochs=1,3"], objective="nelbo", out=tmp_path / "S", **settings)) == 0
    for epochs in (1, 3):
        chosen = results(tmp_path / "S")[f"objective=nelbo+epochs={epochs}"]["chosen"]
        assert chosen["epoch"] == epochs and chosen["checkpoint"].endswith(f"epoch-{epochs}")


@pytest.mark.slow
@pytest.mark.parametrize("validated", [False, True])
def test_every_epoch_is_scored_beside_the_one_that_is_tested(tiny, puzzles, trajectories, tmp_path, capsys, validated):
    settings = dict(SMALL, model=tiny, data=trajectories, test=puzzles, epoch=2, epochs=3, best_of_epochs=puzzles)
    if validated:
        settings.update(validation=puzzles)
    line = ["sweep", "--over", "seed=0", *flags(rows="SFT-SD", tokens_per_step="2,1", out=tmp_path / "S", **settings)]
    assert tabom.main(line) == 0
    shown = capsys.readouterr().out
    folder = tmp_path / "S" / "runs" / "SFT-SD+seed=0"
    run = json.loads((folder / "result.json").read_text())
    assert run["chosen"]["epoch"] == 2 and run["chosen"]["checkpoint"].endswith("epoch-2")
    asked = {p.name for p in folder.glob("test-*")}
    assert asked == {"test-train", "test-train-2", "test-train-2-epoch-1", "test-train-2-epoch-3"}
    (found,) = run["epochs"].values()
    assert found["scores"]["2"] == pytest.approx(100 * run["tests"][0]["scores"]["accuracy"])
    for epoch, name in (("1", "test-train-2-epoch-1"), ("2", "test-train-2"), ("3", "test-train-2-epoch-3")):
        right = [one["correct"] is True for one in distill.read_verdicts(folder / name)]
        assert found["scores"][epoch] == pytest.approx(100 * sum(right) / 12)
    assert found["best"]["score"] == pytest.approx(max(found["scores"].values()), abs=0.01)
    assert found["last"]["score"] == pytest.approx(found["scores"]["3"], abs=0.01)
    if validated:
        accuracies = [one["accuracy"] for one in run["checkpoints"]]
        assert found["honest"]["epochs"] == [1 + accuracies.index(max(accuracies))]
    else:
        assert found["honest"]["chosen_on"] == "the other half of 12 questions"
    (row,) = [line for line in shown.splitlines() if line.startswith("| SFT-SD+seed=0 | train |")]
    assert f"{found['last']['score']} (epoch 3)" in row and row.endswith("| 12 |")
    assert (tmp_path / "S" / "table.md").read_text() in shown


@pytest.mark.slow
def test_the_epochs_of_a_benchmark(bytes_model, tmp_path, capsys):
    """Its answers lie one folder deeper than a dataset's; diagnose replays them, as for Table 6."""
    questions = [dict(question=f"{i} + {i}?", answer=f"#### {2 * i}") for i in range(3)]
    with gzip.open(tmp_path / "gsm8k_test.jsonl.gz", "wt") as f:
        f.writelines(json.dumps(row) + "\n" for row in questions)
    rows_given = [dict(prompt=f"{i}", answer=f"{i}") for i in range(4)]
    settings = dict(SMALL, model=bytes_model, data=write_lines(tmp_path / "D.jsonl", rows_given), max_answer_tokens=30)
    settings.update(test="gsm8k", benchmarks=tmp_path, epoch=1, best_of_epochs="gsm8k", device="cpu")
    line = ["sweep", "--over", "seed=0", *flags(rows="No-SFT;SFT-GT", out=tmp_path / "S", **settings)]
    assert tabom.main(line) == 0
    folder = tmp_path / "S" / "runs" / "SFT-GT+seed=0"
    report = json.loads((folder / "result.json").read_text())["epochs"]["gsm8k"]
    assert report["questions"] == report["last"]["n"] == 3 and list(report["scores"]) == ["1", "2"]
    assert "| SFT-GT+seed=0 | gsm8k |" in capsys.readouterr().out
    at = dict(model=bytes_model, checkpoints=folder / "R-1" / "epoch-1", data=folder / "test-gsm8k" / "gsm8k")
    assert tabom.main(["diagnose", *flags(**at, out=tmp_path / "D")]) == 0
    assert [one["trajectories"] for one in last_json(capsys.readouterr().out)["models"]] == [3, 3]


@pytest.mark.slow
def test_full_fine_tuning_and_tds_as_the_metric(tiny, puzzles, trajectories, tmp_path):
    settings = dict(model=tiny, data=trajectories, validation=puzzles, metric="tds", test_limit=3, **SMALL)
    assert tabom.main(words(["objective=traj"], out=tmp_path / "S", lora_rank=0, **settings)) == 0
    run = results(tmp_path / "S")["objective=traj"]
    values = [checkpoint["tds"] for checkpoint in run["checkpoints"]]
    assert run["chosen"]["tds"] == max(values) and len(set(values)) == 2
    assert not (tmp_path / "S" / "T").exists()  # the trajectories were there already


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(), "--validation or --test"),
        (dict(test="P"), "--epoch best needs --validation"),
        (dict(test="P", epoch="3"), "--epoch 3: --epochs of objective=tabom.seed=0 is 2"),
        (dict(test="P", epoch="1", best_of_epochs="gsm8k"), "--best-of-epochs gsm8k: none of --test "),
        (dict(test="P", epoch="1", in_domain="P,gsm8k"), "--in-domain gsm8k: none of --test "),
        (dict(test="P,sub/P", epoch="last"), "--test has two sets called"),
        (dict(test="P", epoch="last", rounds=2, lora_rank=0), "--rounds needs an adapter"),
        (dict(test="P,gsm8k", epoch="last", benchmarks="nowhere"), "no dataset file nowhere/gsm8k"),
        (dict(test="N", epoch="last"), "no row has an answer to compare with"),
        (dict(test="P", epoch="last", rounds=2, data="T"), "--rounds needs the dataset, and sft-gt one with"),
        (dict(test="P", epoch="last", data="nowhere.jsonl"), "no dataset file nowhere.jsonl"),
        (dict(test="P", epoch="last", check="none"), "no answer that --check none could compare with"),
    ],
    ids=str,
)
def test_bad_input_is_one_line(tiny, puzzles, trajectories, tmp_path, capsys, changes, message):
    places = {"P": str(puzzles), "T": str(trajectories), "P,sub/P": f"{puzzles},sub/{puzzles.name}"}
    places.update({"P,gsm8k": f"{puzzles},gsm8k", "N": str(tmp_path / "N.jsonl")})
    (tmp_path / "N.jsonl").write_text(json.dumps(dict(prompt="a")) + "\n")
    settings = {**SMALL, "data": puzzles, **{k: places.get(v, v) for k, v in changes.items()}}
    assert tabom.main(words(["seed=0"], model=tiny, out=tmp_path / "S", **settings)) == 1
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error")]
    assert re.search(message, line), line


def test_a_test_set_may_have_several_right_answers(tiny, trajectories, tmp_path, capsys):
    rows = [dict(prompt="L12", answer=["3", "4"])] * 2
    test = write_lines(tmp_path / "q.jsonl", rows)
    settings = dict(SMALL, data=trajectories, test=test, epoch="last", epochs=1)
    assert tabom.main(words(["seed=0"], model=tiny, out=tmp_path / "S", objective="traj", **settings)) == 0
    assert "\nquestions: q 2\n" in capsys.readouterr().out


@pytest.mark.slow
def test_another_sweep_in_the_folder_is_refused(swept, capsys):
    out, line, _ = swept
    assert tabom.main([*line, "--lr", "0.5"]) == 1
    assert "holds another run: lr was 0.01 and is now 0.5" in capsys.readouterr().err
    assert tabom.main([*line, "--epoch", "last"]) == 1
    assert "epoch was 'best' and is now 'last'" in capsys.readouterr().err


@pytest.mark.slow
def test_a_changed_test_set_is_noticed(tiny, puzzles, tmp_path, capsys):
    questions = tmp_path / "q.jsonl"
    shutil.copyfile(puzzles, questions)
    line = words(["seed=0"], model=tiny, data=puzzles, test=questions, epoch="last", out=tmp_path / "S", **SMALL)
    line += flags(limit=2, test_limit=2)
    assert tabom.main(line) == 0
    questions.write_text("".join(questions.read_text().splitlines(keepends=True)[::-1]))
    assert tabom.main(line) == 1
    assert "holds another run: contents was" in capsys.readouterr().err
