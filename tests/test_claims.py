"""tabom.py claims: what its rows are, and one small experiment from end to end.

python -m pytest tests/test_claims.py"""

import itertools
import json
import random

import pytest
import torch
from helpers import flags, last_json, shell, write_lines

import data
import distill
import objectives
import tabom
import tokenizer
import train
from experiments import claims, jobs, looks, puzzles, reach, report, sweep, tiny
from release.files import to_release_format
from runs import loading, objective_options

MADE = sorted({row for row, _, _ in itertools.chain(*claims.runs_of(claims.ClaimsOptions(), 1))})


@pytest.mark.parametrize("name", MADE)
def test_a_row_is_a_training_run_that_uses_all_it_sets(name, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(claims.train, "train", lambda made, *_: asked.append(made) or dict(steps=1, ce=0.5))
    monkeypatch.setattr(claims.lora, "load", lambda *_: None)
    monkeypatch.setattr(claims, "test", lambda base, task, folder, whole: dict(whole=whole))
    monkeypatch.setattr(claims, "trained_on", lambda base, task, draws, truth: f"{task} {draws} {truth}")
    base = claims.Base(tmp_path, 5, None, loading.Loaded(None, None, None), distilling(), {}, {}, {}, {})
    run = claims.one_run(base, name, 3e-4, "in")
    assert [one["whole"] for one in run["epochs"]] == [False, False, True]
    (made,), settings = asked, claims.settings_of(name)
    with reach.offered():
        parameters, unused = objective_options.chosen(made)
    assert not unused and (made.seed, made.lr, made.weight_decay) == (5, 3e-4, 0)
    for k, v in settings.items():
        if k == "objective":
            assert made.objective == ("nelbo" if name == "SFT-GT" else v)
        else:
            assert parameters.get(k, v) == v and getattr(made, k) == v
    draws = claims.draws_of(settings)
    assert made.epochs == claims.TRAINING["epochs"] and made.global_batch == claims.EXAMPLES * draws
    assert made.data == f"in {draws} {name == 'SFT-GT'}" and made.adapter == str(tmp_path / "adapter")


def distilling():
    return distill.DistillOptions(model="M", data="D", out="T", device="cpu")


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


@pytest.mark.parametrize("name", MADE)
def test_a_step_has_the_same_number_of_supervised_tokens_in_every_row(name):
    settings = dict(claims.settings_of(name))
    if settings["objective"] == sweep.GROUND_TRUTH:
        settings["objective"] = "nelbo"
    made = train.TrainOptions(model="M", data="D", out="R", **settings)
    with reach.offered():
        parameters, _ = objective_options.chosen(made)
        loss = objectives.OBJECTIVES[made.objective].loss
    assert "reach" not in objectives.OBJECTIVES
    more = {}
    if made.objective == "t3d":
        more["reference"] = Counter()
    n, draws, counts = tiny.SHORT.answer, claims.draws_of(claims.settings_of(name)), 0
    for i in range(400):
        order = list(range(n))
        random.Random(i).shuffle(order)
        batch = dict(prompt_ids=torch.ones(1, 2).long(), prompt_mask=torch.ones(1, 2).long())
        batch.update(response_ids=torch.ones(1, n).long(), order=torch.tensor([order]), length=torch.tensor([n]))
        batch["entropy"] = torch.zeros(1, n)
        m = Counter()
        generator = [torch.Generator().manual_seed(i)]
        loss(m, batch, generator=generator, **parameters, **more)
        # TABOM's first pass has the cross-entropy; those after it are each token's own step.
        counts += sum(m.asked) if made.objective == "dparallel" else m.asked[0]
    assert draws * counts / 400 == pytest.approx(claims.TARGETS, rel=0.1)
    assert draws * claims.targets_of(claims.settings_of(name)) == pytest.approx(claims.TARGETS, rel=0.1)


def test_a_row_with_more_supervised_tokens_is_refused(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(claims.ROWS, "TABOM, window 13", dict(objective="tabom", window=13))
    assert tabom.main(["claims", "--rows", "TABOM, window 13", "--out", str(tmp_path / "F")]) == 1
    assert "26.0 supervised tokens per example and step, the rows have 32" in capsys.readouterr().err
    assert not (tmp_path / "F").exists()


def test_a_row_of_ones_own_is_made_on_all_base_models(monkeypatch):
    monkeypatch.setitem(claims.ROWS, "TABOM, window 16", dict(objective="tabom", window=16))
    c = claims.ClaimsOptions(rows=("TABOM, window 16",))
    own = [("TABOM, window 16", 3e-4, "in"), ("TABOM, window 16", 1e-3, "in")]
    assert [list(filter(None, claims.runs_of(c, number))) for number in (1, 2)] == [[own], [own]]
    claims.check_targets("TABOM, window 16")


def test_the_runs_are_those_that_were_registered():
    c = claims.ClaimsOptions()
    even, odd = claims.runs_of(c, 2), claims.runs_of(c, 1)
    assert list(map(len, even)) == [4, 0, 0, 0, 0, 0] and list(map(len, odd)) == [6, 2, 4, 5, 6, 0]
    assert sum(run[2] == claims.SEVERAL for run in odd[4]) == 4
    for number, stages in ((1, odd), (2, even)):  # what the looks need comes first
        assert set(map(claims.key_of, stages[0])) == looks.needed(number)
    assert claims.key_of(("TABOM", 1e-4, "in")) in looks.needed(1)
    only = claims.ClaimsOptions(rows=("TABOM", "SFT-GT"), rates=claims.rate_list("1e-4, 0.0003"))
    assert sum(claims.runs_of(only, 2), []) == [("TABOM", 3e-4, "in")]
    names = ["TABOM 0.0003", "TABOM 0.0001", "SFT-GT 0.0003", "TABOM 0.0003 several"]
    assert list(map(claims.key_of, sum(claims.runs_of(only, 1), []))) == names
    several = claims.ClaimsOptions(tasks=claims.task_list("several"))
    assert sum(claims.runs_of(several, 1), []) == odd[4][2:] and not any(claims.runs_of(several, 2))
    with pytest.raises(ValueError, match="must be in, several or both"):
        claims.task_list("near")
    assert claims.key_of(("base", 0, "in")) == "base" and claims.key_of(("base", 0, "several")) == "base several"


def test_a_stage_is_made_on_all_base_models_before_the_next():
    order = list(claims.order_of_work(claims.ClaimsOptions(bases=3)))
    assert [number for number, _ in order] == [1, 2, 3] * 6 + [0]
    assert [len(runs) for _, runs in order] == [6, 4, 6, 2, 0, 2, 4, 0, 4, 5, 0, 5, 6, 0, 6, 0, 0, 0, 4]


def test_an_early_epoch_is_tested_on_the_first_puzzles_and_two_tokens_after_the_first_look(monkeypatch, tmp_path):
    asked = []

    def solve(base, these, tokens_per_step=1):
        asked.append((these[0]["task"], len(these), tokens_per_step))
        return [dict(correct=i % 2 == 0) for i in range(len(these))]

    monkeypatch.setattr(claims, "solve", solve)
    monkeypatch.setattr(claims.diagnose, "own_order", lambda *_: dict(tds=0.5))
    monkeypatch.setattr(claims.mechanism, "against_base", lambda *_: dict(correlation=0.5))
    tests = {task: [dict(task=task)] * claims.SIZES[task] for task in ("in", "near", "far")}
    for number, whole, expected in (
        (1, False, [("in", 500, 1), ("near", 250, 1), ("far", 250, 1)]),
        (1, True, [("in", 1500, 1), ("near", 500, 1), ("far", 500, 1)]),
        (13, True, [("in", 1500, 1), ("near", 500, 1), ("far", 500, 1), ("in", 1500, 2)]),
    ):
        asked.clear()
        base = claims.Base(tmp_path, number, None, None, distilling(), tests, {}, {}, {})
        found = claims.test(base, "in", tmp_path / "R", whole)
        assert asked == expected and ("order" in found) == whole
        assert found["right"]["near"][0] == expected[1][1] and ("in-2" in found["right"]) == (len(expected) == 4)


def test_what_is_kept_has_a_line_for_each_run():
    found = dict(number=3, tried=[[3, 2 / 3]], runs={"base": dict(epochs=[dict(kl=0.1234567890)]), "TABOM 0.0003": {}})
    text = claims.as_lines(found)
    assert json.loads(text) == dict(
        found, tried=[[3, 0.666667]], runs={"base": {"epochs": [{"kl": 0.123457}]}, "TABOM 0.0003": {}}
    )
    assert sum("epochs" in line or "TABOM" in line for line in text.splitlines()) == 2


def test_a_base_model_that_is_made_again_the_same_goes_on(monkeypatch, tmp_path):
    """Also where what is told of it has more digits than its file."""
    about = dict(tried=[(3, 2 / 3)], model="abc")
    monkeypatch.setattr(claims, "make_base", lambda *_: (None, dict(about)))
    monkeypatch.setattr(claims, "one_run", lambda base, row, lr, task: dict(epochs=[], lr=lr))
    warned = []
    monkeypatch.setattr(claims.torchrun, "warner", lambda _: warned.append)
    for rates, model in (((3e-4,), "abc"), ((1e-3,), "abc"), ((3e-3,), "another")):
        about["model"] = model
        runs = [("TABOM", lr, "in") for lr in rates]
        claims.one_base(None, None, 3, runs, tmp_path, tmp_path / "base-3")
    assert set(claims.known(tmp_path, 3)["runs"]) == {"base", "TABOM 0.0003", "TABOM 0.001"}
    assert len(warned) == 1 and "base-3 has model abc, made again it has another" in warned[0]


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
        assert [one["tokens_per_step"] for one in jobs.result_of(folder)["tests"]] == [1, 2]


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
    with pytest.raises(ValueError, match="is for --data: puzzles have their own check"):
        claims.claims(claims.ClaimsOptions(out=str(tmp_path / "C"), **given))
    assert not (tmp_path / "C").exists()


# --------------------------------------------------------------------------------------------------------- end to end


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    out = tmp_path_factory.mktemp("F") / "F"
    line = ["claims", "--quick", "--bases", "1", "--rows", "SFT-GT;TABOM", "--rates", "3e-4", "--out", out]
    done = shell(*line)
    assert done.returncode == 0, done.stderr
    return out, line, done


@pytest.mark.slow
def test_no_puzzle_is_in_two_datasets_and_sft_gt_trains_on_what_was_distilled(small):
    place = small[0] / "base-1" / "seed-1"
    loaded = loading.Loaded(None, tokenizer.load(place / "tiny"), place / "tiny")
    base = claims.Base(place, 1, None, loaded, distilling(), {}, {}, {}, {})
    prompts = []
    for name, task, count in (
        ("train", "in", 24),
        ("validation", "in", 6),
        *((f"test_{t}", t, 6) for t in claims.TASKS),
    ):
        prompts += [e["prompt"] for e in claims.puzzles_of(base, name, task, count)]
    assert len(prompts) == len(set(prompts)) == 24 + 6 + 4 * 6
    task = puzzles.TASKS["short-latin"]
    answers = {e["id"]: e["answer"][0] for e in claims.puzzles_of(base, "train", "in", 24)}
    copies = data.read_trajectories(place / "kept-in-4.jsonl")  # TABOM's windows, and SFT's masks
    truth = data.read_trajectories(place / "truth-in-2.jsonl")
    assert (len(copies), len(truth)) == (4 * 24, 2 * 24) and {r["id"] for r in truth} < {r["id"] for r in copies}
    for r in truth:
        ids = loaded.tok.encode(puzzles.restyled(answers[r["id"].rpartition("-")[0]], task))
        assert r["response_ids"] == ids + [loaded.tok.eos_id] * (31 - len(ids))


@pytest.mark.slow
def test_what_is_kept_is_what_the_answers_say(small):
    out, _, done = small
    bases = report.read(out / "results")
    assert set(bases) == {0, 1} and set(bases[0]["runs"]) == {"base", "TABOM 0.0003"}
    runs = bases[1]["runs"]
    assert set(runs) == {"base", "base several", "TABOM 0.0003", "TABOM 0.0003 several", "SFT-GT 0.0003"}
    for key, run in runs.items():
        task = "several" if key.endswith("several") else "in"
        assert len(run["epochs"]) == (1 if key.startswith("base") else 3)
        last = run["epochs"][-1]
        two_a_step = [f"{task}-2"] * (task == "several")
        assert set(last["right"]) == {task, "near", "far", *two_a_step}
        records = data.read_trajectories(out / "base-1" / "seed-1" / "runs" / key / "answers.jsonl")
        assert looks.unpack(last["right"][task]).tolist() == [r["correct"] for r in records] and len(records) == 6
        for r in records:
            right = r["finished"] and puzzles.solves(puzzles.TASKS[claims.TASKS[task]], r["prompt"], r["text"])
            assert r["correct"] == right and max(r["step"]) == 30
        assert last["order"]["correlation"] <= 1
    assert (
        runs["base"]["epochs"][0]["kl"] == dict(near=0, far=0)
        and runs["base"]["epochs"][0]["order"]["correlation"] == 1
    )
    assert all(value > 0 for value in runs["TABOM 0.0003"]["epochs"][-1]["kl"].values())
    tables = (out / "results" / "tables.md").read_text()
    assert tables in done.stdout and "Differences are shown at 12 and 24" in tables


@pytest.mark.slow
def test_a_second_start_adds_rows_and_makes_nothing_again(small, monkeypatch):
    out, line, _ = small
    before = report.read(out / "results")
    line = [str(part) if part != "SFT-GT;TABOM" else "TABOM;naive TD" for part in line]
    trained, real = [], claims.train.train
    monkeypatch.setattr(claims.train, "train", lambda made, *more: trained.append(made.objective) or real(made, *more))
    assert tabom.main(line) == 0
    assert trained == ["traj"]
    after = report.read(out / "results")
    assert after[1]["runs"].pop("naive TD 0.0003") and after[1].pop("minutes") >= before[1].pop("minutes")
    assert after[1]["runs"] == before[1]["runs"] and after[0] == before[0]


@pytest.mark.slow
def test_runs_of_another_base_model_are_not_added_to(small, monkeypatch, capsys):
    out, line, _ = small
    file = out / "results" / "bases" / "base-1.json"
    kept = file.read_text()
    try:
        file.write_text(kept.replace(json.loads(kept)["model"], "0" * 64))
        line = [str(part) if part != "SFT-GT;TABOM" else "dInfer" for part in line]
        assert tabom.main(line) == 0
        assert "base-1 has model 0000" in capsys.readouterr().err
        assert "dInfer" not in file.read_text()
    finally:
        file.write_text(kept)


def test_runs_that_no_base_model_has_are_one_line(tmp_path, capsys):
    assert tabom.main(["claims", "--rows", "T3D", "--rates", "3e-3", "--out", str(tmp_path / "F")]) == 1
    assert capsys.readouterr().err == "error: --rows T3D --rates (0.003,): no base model has such a run\n"
    assert not (tmp_path / "F").exists()


def test_a_rate_that_is_no_number_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit):
        tabom.main(["claims", "--rates", "3e-4,fast", "--out", str(tmp_path / "F")])
    assert "--rates" in capsys.readouterr().err and not (tmp_path / "F").exists()


def test_an_unknown_row_is_one_line(tmp_path, capsys):
    assert tabom.main(["claims", "--rows", "TABOM;Tabom", "--out", str(tmp_path / "F")]) == 1
    assert not (tmp_path / "F").exists()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --rows Tabom: none of No-SFT; SFT-GT; SFT-SD; TABOM;")


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
