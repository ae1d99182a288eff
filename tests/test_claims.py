"""tabom.py claims: what its rows are, and one small experiment from end to end.

python -m pytest tests/test_claims.py"""

import itertools
import json
import random
from pathlib import Path

import pytest
import torch
from helpers import flags, last_json, shell, write_lines

import data
import objectives
import tabom
import tokenizer
from experiments import claims, puzzles, report, sweep, tiny
from release.files import to_release_format
from runs import objective_options


@pytest.mark.parametrize("name", claims.ROWS)
def test_a_row_is_a_training_run_that_uses_all_it_sets(name, tmp_path):
    settings = claims.settings_of(name, 3, 0.01)
    draws = claims.draws_of(settings)
    made = sweep.training(claims.of_base(claims.ClaimsOptions(), tmp_path, draws), settings)
    parameters, unused = objective_options.chosen(made)
    assert not unused
    for k, v in settings.items():
        assert parameters.get(k, v) == v and (k == "objective" or getattr(made, k) == v)
    assert (made.seed, made.lr, made.weight_decay) == (3, 0.01, 0)
    assert made.epochs == claims.TRAINING["epochs"] and made.global_batch == claims.EXAMPLES * draws
    assert made.cut_eos == (name == "TABOM, padding cut")


class Counter:
    """A model that counts the positions whose logits are asked for."""

    def __init__(self):
        self.asked, self.config = [], tiny_config()

    def __call__(self, ids, attention_mask=None, positions=None):
        self.asked.append(positions.shape[1])
        return torch.zeros(*positions.shape, 24)


def tiny_config():
    class Config:
        mask_id, vocab_size = 0, 24

    return Config


@pytest.mark.parametrize("name", claims.ROWS)
def test_a_step_has_the_same_number_of_supervised_tokens_in_every_row(name):
    settings = claims.settings_of(name, 0)
    made = sweep.training(claims.of_base(claims.ClaimsOptions(), Path("x")), settings)
    parameters, _ = objective_options.chosen(made)
    more = {}
    if made.objective == "t3d":
        more["reference"] = Counter()
    n, draws, counts = tiny.SHORT.answer, claims.draws_of(settings), 0
    for i in range(400):
        order = list(range(n))
        random.Random(i).shuffle(order)
        batch = dict(prompt_ids=torch.ones(1, 2).long(), prompt_mask=torch.ones(1, 2).long())
        batch.update(response_ids=torch.ones(1, n).long(), order=torch.tensor([order]), length=torch.tensor([n]))
        batch["entropy"] = torch.zeros(1, n)
        m = Counter()
        generator = [torch.Generator().manual_seed(i)]
        objectives.OBJECTIVES[made.objective].loss(m, batch, generator=generator, **parameters, **more)
        # TABOM's first pass has the cross-entropy; those after it are each token's own step.
        counts += sum(m.asked) if made.objective == "dparallel" else m.asked[0]
    assert draws * counts / 400 == pytest.approx(claims.TARGETS, rel=0.1)
    assert draws * claims.targets_of(settings) == pytest.approx(claims.TARGETS, rel=0.05)


def test_a_row_with_more_supervised_tokens_is_refused(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(claims.ROWS, "TABOM, window 13", dict(objective="tabom", window=13))
    assert tabom.main(["claims", "--rows", "TABOM, window 13", "--out", str(tmp_path / "F")]) == 1
    assert "26.0 supervised tokens per example and step, the rows have 32" in capsys.readouterr().err
    assert not (tmp_path / "F").exists()


def test_the_order_is_measured_alike_in_every_row(tmp_path):
    bench = claims.bench_of(claims.ClaimsOptions(), None, tmp_path)
    assert (bench.window, bench.margin) == (8, 0.2)
    assert claims.settings_of("TABOM, no ranking", 0) == dict(
        objective="tabom", window=8, margin=0.2, weight=0.0, seed=0
    )
    assert claims.settings_of("SFT-SD", 4, 0.1) == dict(objective="nelbo", seed=4, lr=0.1)


def test_a_recipe_sets_the_rows_on_given_trajectories(monkeypatch):
    asked = []
    monkeypatch.setattr(sweep, "sweep", asked.append)
    given = dict(data="T", model="M", test=("gsm8k",), recipe="dream-ling-coder", seeds=2, seed=3)
    claims.claims(claims.ClaimsOptions(**given))
    claims.claims(claims.ClaimsOptions(**given, ground_truth="D", methods=("entropy",), epoch=3))
    claims.claims(claims.ClaimsOptions(**given, check="math", keep="finished", rows=("No-SFT", "SFT-SD")))
    c, with_truth, chosen = asked
    grid, longer = map(sweep.expand, (c, with_truth))
    assert (c.lr, c.margin, c.methods, c.keep, c.epoch) == (1e-4, 0.1, ("all",), "all", "last")
    assert with_truth.methods == ("entropy",) and with_truth.check == "auto" and with_truth.epoch == 3
    assert (chosen.check, chosen.keep) == ("math", "finished")
    assert list(sweep.expand(chosen)) == ["SFT-SD+seed=3", "SFT-SD+seed=4"]
    assert len(grid) == 2 * 13 and set(longer) - set(grid) == {"SFT-GT+seed=3", "SFT-GT+seed=4"}
    parameters = {name: objective_options.chosen(sweep.training(c, settings))[0] for name, settings in grid.items()}
    tabom_row, no_ranking = parameters["TABOM+seed=3"], parameters["TABOM, no ranking+seed=4"]
    assert (tabom_row["window"], tabom_row["weight"], tabom_row["starts"]) == (32, 2.0, "non-ltr")
    assert no_ranking == dict(tabom_row, weight=0.0)
    assert parameters["TABOM, global window+seed=3"]["starts"] == "uniform"
    assert parameters["dParallel+seed=3"]["block_length"] == 32


@pytest.mark.slow
def test_rows_on_the_authors_trajectories(tiny, trajectories, puzzles, tmp_path, capsys):
    """A file in the authors' format, as it is: --methods chooses its rows, and all runs train on the same ones."""
    rows = []
    for i, record in enumerate(data.read_trajectories(trajectories)):
        rows.append(to_release_format(record, 2, ("entropy", "credit", "topk_margin")[i % 3]))
    write_lines(tmp_path / "theirs.jsonl", rows)
    words = flags(model=tiny, data=tmp_path / "theirs.jsonl", test=puzzles, recipe="llada-prm12k", seeds=1)
    words += flags(methods="entropy,credit", rows="SFT-SD;TABOM", out=tmp_path / "C")
    assert tabom.main(["claims", *words]) == 0
    out = capsys.readouterr().out
    assert last_json(out)["runs"] == 3 and "| row |" in out
    for name in ("SFT-SD", "TABOM"):
        folder = tmp_path / "C" / "runs" / f"{name}+seed=0"
        made = json.loads((folder / "R-1" / "meta.json").read_text())
        assert (made["recipe"], made["examples"]) == ("llada-prm12k", 8)
        assert [one["tokens_per_step"] for one in sweep.result_of(folder)["tests"]] == [1, 2]


def test_trajectories_need_a_model_and_something_to_answer(tmp_path):
    with pytest.raises(ValueError, match="--data, --model and --test: claims needs all three, or none for its puzzles"):
        claims.claims(claims.ClaimsOptions(data="T", model="M", out=str(tmp_path / "C")))
    with pytest.raises(ValueError, match="--quick is for the puzzles"):
        claims.claims(claims.ClaimsOptions(data="T", model="M", test=("gsm8k",), quick=True))


@pytest.mark.parametrize(
    "given",
    [dict(check="math"), dict(keep="all"), dict(epoch=3), dict(methods=("all",)), dict(recipe="llada-prm12k")],
)
def test_puzzles_have_their_own_check_and_say_so(given, tmp_path):
    with pytest.raises(ValueError, match="is for --data: puzzles are compared exactly"):
        claims.claims(claims.ClaimsOptions(out=str(tmp_path / "C"), **given))
    assert not (tmp_path / "C").exists()


def test_the_best_rate_is_that_of_the_highest_validation_accuracy_and_the_lowest_of_equal_ones(tmp_path):
    folders = []
    for lr, accuracy in ((0.3, 0.5), (0.1, 0.5), (0.01, 0.4)):
        folders.append(tmp_path / str(lr))
        folders[-1].mkdir()
        (folders[-1] / "result.json").write_text(json.dumps(dict(settings=dict(lr=lr), chosen=dict(accuracy=accuracy))))
    assert claims.best_rate(folders) == 0.1


def test_base_0_has_no_run_in_the_results_and_every_row_waits_for_its_rates(tmp_path):
    c = claims.ClaimsOptions(bases=2)
    jobs, needs = claims.jobs_of(c, None, tmp_path, ["TABOM", "TABOM, kl"])
    order = [str(folder.relative_to(tmp_path)) for folder in jobs]
    rates = [f"base-0/rates/TABOM/{lr}" for lr in claims.RATES]
    assert order[:3] == ["base-0", *rates]
    assert order[3:7] == ["base-1", "base-1/runs/base", "base-1/runs/TABOM/seed-0", "base-1/reported/1"]
    assert order.index("base-2/reported/1") < order.index("base-1/runs/TABOM, kl/seed-0")
    assert needs[tmp_path / "base-1/runs/TABOM, kl/seed-0"] == [
        tmp_path / name for name in ["base-1/runs/base", *rates]
    ]  # it takes TABOM's
    assert not any(name.startswith("base-0/runs") for name in order)
    needed = needs[tmp_path / "base-2/runs/TABOM/seed-0"]
    assert needed == [tmp_path / name for name in ["base-2/runs/base", *rates]]


# --------------------------------------------------------------------------------------------------------- end to end

ROWS = ("SFT-GT", "TABOM")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    out = tmp_path_factory.mktemp("F") / "F"
    line = ["claims", "--quick", "--bases", "1", "--rows", "; ".join(ROWS), "--out", out]
    done = shell(*line)
    assert done.returncode == 0, done.stderr
    return out, line, done


@pytest.mark.slow
def test_no_puzzle_is_in_two_datasets_and_sft_gt_trains_on_what_was_distilled(small):
    base = small[0] / "base-1"
    prompts = []
    for name in claims.SIZES:
        for r in data.read_examples(base / "data" / f"{name}.jsonl"):
            prompts.append(r["prompt"])
    assert len(prompts) == len(set(prompts)) == 24 + 6 * 6
    tok, task = tokenizer.load(base / "tiny"), puzzles.TASKS["short-latin"]
    answers = {r["id"]: r["answer"] for r in data.read_trajectories(base / "T")}
    for draws in (2, 4):
        copies = data.read_trajectories(base / f"kept-{draws}.jsonl")
        truth = data.read_trajectories(base / f"truth-{draws}.jsonl")
        assert [r["id"] for r in copies] == [r["id"] for r in truth] and len(truth) == draws * 24
        for r in truth:
            answer = puzzles.restyled(answers[r["id"].rpartition("-")[0]], task)
            ids = tok.encode(answer)
            assert r["response_ids"] == ids + [tok.eos_id] * (31 - len(ids))


@pytest.mark.slow
def test_the_tables_hold_what_the_trajectories_say(small):
    out, _, done = small
    saved = json.loads((out / "results" / "results.json").read_text())
    assert {r["row"] for r in saved["runs"]} == {"base", *ROWS} and {r["base"] for r in saved["runs"]} == {"base-1"}
    for r in saved["runs"]:
        folder = out / "base-1" / "runs" / r["row"] / ("" if r["row"] == "base" else "seed-0")
        for name, at_once in (("in", 1), ("in", 2), ("near", 1), ("far", 2)):
            records = data.read_trajectories(folder / f"test-test_{name}{'' if at_once == 1 else '-2'}")
            right = sum(x["correct"] for x in records)
            assert report.scores_of(r, f"test_{name}", at_once)["accuracy"] == pytest.approx(right / 6, abs=1e-5)
            assert len(records) == 6 and max(max(x["step"]) for x in records) == (30 if at_once == 1 else 15)
        ends = [len(x["text"]) == len(x["answer"][0]) and x["finished"] for x in records]
        assert 0 <= r["answers"]["far"]["ends_right"] <= 1 and len(ends) == 6
        assert len(r["mechanism"]["thirds"]) == 3 and -1 <= r["mechanism"]["correlation"] <= 1
        assert str(out) not in json.dumps(r)
    base = next(r for r in saved["runs"] if r["row"] == "base")
    assert base["mechanism"]["correlation"] == 1 and base["mechanism"]["kl"] == pytest.approx(0, abs=1e-5)
    assert base["mechanism"]["entropy"] == pytest.approx(base["mechanism"]["entropy_before"], rel=1e-4)
    assert len({r["steps"] for r in saved["runs"] if "steps" in r}) == 1
    assert set(saved["tried"]) == set(ROWS) and set(saved["tried"]["TABOM"]) == {str(lr) for lr in claims.RATES}
    tables = (out / "results" / "tables.md").read_text()
    assert tables in done.stdout
    for name in ("tds", "order", "accuracy"):
        assert (out / "results" / f"{name}.png").stat().st_size > 3000


@pytest.mark.slow
def test_a_second_start_adds_rows_and_makes_nothing_again(small):
    out, line, _ = small
    before = {p: p.stat().st_mtime_ns for p in out.rglob("result.json")}
    line = [part if part != "; ".join(ROWS) else "SFT-SD" for part in line]
    done = shell(*line)
    assert done.returncode == 0, done.stderr
    assert last_json(done.stdout)["rows"] == 4
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert len(list(out.rglob("result.json"))) == len(before) + len(claims.RATES) + 1


@pytest.mark.slow
def test_a_row_that_means_something_else_now_is_refused(small, monkeypatch, capsys):
    monkeypatch.setitem(claims.ROWS, "TABOM", dict(objective="tabom", margin=0.5))
    assert tabom.main([str(word) for word in small[1]]) == 1
    assert "seed-0 was made with {'window': 8, 'margin': 0.2" in capsys.readouterr().err


def test_every_row_has_its_turn():
    assert sorted(itertools.chain(*claims.TURNS)) == sorted(claims.ROWS)


def test_an_unknown_row_is_one_line(tmp_path, capsys):
    assert tabom.main(["claims", "--rows", "TABOM;Tabom", "--out", str(tmp_path / "F")]) == 1
    assert not (tmp_path / "F").exists()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --rows Tabom: none of SFT-GT; SFT-SD; TABOM;")


@pytest.mark.parametrize("tasks", [["latin", "shear"], ["short-latin", "short-shear", "short-far"]])
def test_foreign_answers_are_the_same_squares_in_other_symbols(tasks, tmp_path):
    file = puzzles.write_puzzles(tmp_path / "p.jsonl", tasks, 60, False, 0, foreign=0.5)
    own = puzzles.write_puzzles(tmp_path / "q" / "p.jsonl", tasks, 3, False, 0)
    rows, styles = [json.loads(line) for line in file.read_text().splitlines()], set()
    for row in rows:
        task = next(puzzles.TASKS[t] for t in tasks if puzzles.TASKS[t].tag == row["prompt"][0])
        style = next(s for s in (task.symbols, task.foreign) if set(row["answer"]) <= set(s))
        styles.add((task.tag, style == task.symbols))
        clues = row["prompt"][1:].translate(str.maketrans(task.symbols, style))
        assert all(a in (".", b) for a, b in zip(clues, row["answer"]))
    assert len(styles) == 2 * len(tasks)
    both = puzzles.write_puzzles(tmp_path / "r" / "p.jsonl", tasks, 3, False, 0, both=True)
    plain = [json.loads(line)["answer"] for line in own.read_text().splitlines()]
    for answer, (first, second) in zip(plain, (json.loads(x)["answer"] for x in both.read_text().splitlines())):
        assert first == answer and len(set(zip(first, second))) >= 5 and not set(first) & set(second)
