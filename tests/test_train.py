"""train.py: the loop, its gradients on one process and on many, checkpoints, every objective, the authors' recipes.

python -m pytest tests/test_train.py"""

import dataclasses
import functools
import json
import re
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import (
    FOLDER,
    TRAIN,
    changed_model,
    edit_json,
    fails,
    flags,
    last_json,
    locked_by_another,
    meta,
    metrics,
    run,
    run_train,
    shell,
    weights,
    write_lines,
)  # fmt: skip
from safetensors.torch import load_file, save_file

import baselines
import data
import distill
import lora
import model
import objectives
import tabom
import tokenizer
import train
from experiments import tiny as tiny_model
from release import recipes
from release.files import to_release_format
from runs import card, loading, objective_options, records, resume, torchrun

# --------------------------------------------------------------------------------------------------------- the loop


def test_adapters_and_metrics_are_written(tiny, trained):
    log = metrics(trained)
    assert [line["step"] for line in log] == [1, 2, 3, 4, 5, 6]  # 12 examples in batches of 5, twice
    assert [line["epoch"] for line in log] == [1, 1, 1, 2, 2, 2]
    assert set(log[0]) == {"loss", "ce", "ranking", "in_order", "entropy", "grad_norm", "lr", "step", "epoch"}
    for line in log:
        assert line["loss"] == pytest.approx(line["ce"] + line["ranking"], abs=1e-5)
    m = lora.load(model.load(tiny), trained / "epoch-2")
    assert {p.dtype for p in lora.tensors(m).values()} == {torch.float32}
    for name, p in lora.tensors(m).items():
        assert p.abs().max() > 0, name


def test_the_first_step_has_no_learning_rate_and_the_last_one_little(trained):
    rates = [line["lr"] for line in metrics(trained)]
    assert rates[:3] == pytest.approx([0, 5e-3, 1e-2])  # warm-up of 2 steps from 0
    assert 0 < rates[-1] < 2e-3


def test_learning_rate_warms_up_and_falls_to_the_final_one():
    c = train.TrainOptions(lr=1.0, final_lr=0.1, warmup=4)
    rates = [train.learning_rate(step, 12, c) for step in range(13)]
    assert rates[:5] == pytest.approx([0, 0.25, 0.5, 0.75, 1.0])
    assert rates[8] == pytest.approx(0.55)
    assert rates[12] == pytest.approx(0.1)
    assert rates[4:] == sorted(rates[4:], reverse=True)


def test_without_warmup_the_first_step_has_the_peak():
    assert train.learning_rate(0, 12, train.TrainOptions(lr=1.0, warmup=0)) == 1.0


def test_more_warmup_than_steps_is_named(tiny, trajectories, tmp_path, capsys):
    options = {**TRAIN, "epochs": 1, "warmup": 3}
    err = run(capsys, "train", model=tiny, data=trajectories, out=tmp_path / "R", **options)[1]
    assert "warning: 3 warm-up steps, but 3 in all: the peak --lr is never reached" in err


PADDED = [([(3, 4), (3, 4)], False), ([(3, 4)], False), ([(2, 4), (3, 4)], True), ([(3, 4), (3, 2)], True)]


@pytest.mark.parametrize("sizes, padded", PADDED, ids=str)
def test_a_model_is_told_of_padding_where_there_is_any(toy, sizes, padded):
    """Of prompts or responses: (P, N) of each row. Elsewhere the mask would make no difference."""
    records = [dict(prompt_ids=[1] * P, response_ids=[2] * N, order=list(range(N))) for P, N in sizes]
    m = toy()
    m.config.pad_id = 0
    batch = loading.batch_of(records, SimpleNamespace(m=m), SimpleNamespace(device="cpu"))
    loss = objectives.nelbo(m, batch, generator=torch.Generator().manual_seed(0))["loss"]
    mask = m.calls[0][1]
    assert (mask is not None) == padded and (mask is None or not mask.all())
    del batch["padded"]
    assert torch.equal(loss, objectives.nelbo(m, batch, generator=torch.Generator().manual_seed(0))["loss"])


def test_the_first_step_is_the_mean_gradient_of_the_global_batch(tiny, trajectories, trained):
    """The slow way: one batch, no accumulation."""
    m = lora.inject(model.load(tiny), generator=data.generator(0, "lora"))
    rows = data.read_trajectories(trajectories)
    rows = [rows[k] for k in data.epoch_order(12, 0, 0)[:5]]
    generators = [data.generator(0, 0, r["id"]) for r in rows]
    out = objectives.tabom(m, data.collate(rows, m.config.pad_id), window=8, generator=generators)
    out["loss"].backward()
    norm = torch.stack([p.grad.norm() for p in lora.tensors(m).values()]).norm()
    first = metrics(trained)[0]
    assert first["loss"] == pytest.approx(out["loss"].item(), abs=1e-5)
    assert first["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)


def test_training_lowers_the_loss(tiny, trajectories, tmp_path, capsys):
    out = tmp_path / "R"
    run_train(capsys, model=tiny, data=trajectories, out=out, epochs=12, global_batch=12, batch_size=12, lr=3e-2)
    losses = [line["loss"] for line in metrics(out)]
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])


def test_an_objective_of_ones_own_reports_terms_of_its_own(tiny, trajectories, tmp_path, capsys, monkeypatch):
    def shortest(m, batch, generator=None, mask_id=None):
        found = objectives.nelbo(m, batch, generator=generator, mask_id=mask_id)
        return dict(found, shortest=batch["length"].min().float())

    monkeypatch.setitem(objectives.OBJECTIVES, "traj", objectives.Objective(shortest, "ours"))
    run_train(capsys, model=tiny, data=trajectories, out=tmp_path / "R", objective="traj", epochs=1)
    for line in metrics(tmp_path / "R"):
        assert line["shortest"] == tiny_model.WHOLE.answer


# -------------------------------------------------------------------------- micro-batches and processes: one gradient


class OneOf(torchrun.Processes):
    """One of several processes, without the others: what it would send to them is kept instead."""

    def __init__(self, index, count):
        super().__init__("cpu", alone=True)
        self.index, self.count, self.gradients = index, count, None

    def barrier(self):
        pass

    def sum(self, values):
        return values

    def gather(self, items):
        return list(items)

    def must_share(self, folder):
        pass


@pytest.fixture(autouse=True)
def gradients_are_kept(monkeypatch):
    """OneOf's, instead of a sum over processes that are not there."""
    summed = train.sum_gradients

    def keep(parameters, processes):
        if not isinstance(processes, OneOf):
            return summed(parameters, processes)
        processes.gradients = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]
        return None

    monkeypatch.setattr(train, "sum_gradients", keep)


@pytest.fixture(scope="module")
def uneven(trajectories, tmp_path_factory):
    """A file of seven trajectories of different lengths, two of them of one token: they have no pair to rank."""
    rows = []
    for record, n in zip(data.read_trajectories(trajectories), (37, 1, 20, 2, 1, 9, 30)):
        kept = sorted(record["order"][:n])
        rank = dict(zip(kept, range(n)))
        order = [rank[k] for k in record["order"][:n]]
        row = dict(id=record["id"], prompt_ids=record["prompt_ids"][n // 2 :], order=order, finished=True)
        row.update(response_ids=record["response_ids"][:n], entropy=record["entropy"][:n])
        rows.append(row)
    return write_lines(tmp_path_factory.mktemp("uneven") / "trajectories.jsonl", rows)


def first_gradients(c, index=0, count=1):
    """(the gradients of the first step on one of several processes, its share of the loss)"""
    processes = OneOf(index, count)
    prepared = train.prepare(c, processes)
    lines = train.train_step(prepared, 0, 0, train.global_batch_of(prepared, 0, 0))
    processes.unlock()
    return processes.gradients, lines["loss"]


LOSSES = [dict(), dict(starts="non-ltr", window=4), dict(ranking="listwise"), dict(ranking="kl", window=3)]
LOSSES += [dict(objective="nelbo"), dict(objective="t3d"), dict(objective="ideal", masks="subset")]
LOSSES += [dict(objective="t3d", fake="sample", reduction="sum"), dict(objective="t3d", preference="none")]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: "-".join(map(str, loss.values())) or "tabom")
def test_micro_batches_and_processes_give_one_gradient(tiny, uneven, tmp_path, loss):
    """The slow way is one forward pass of the whole global batch. Rows without a pair are no part of the ranking's
    mean, wherever they end up."""

    def options(name, batch_size):
        out = str(tmp_path / name)
        small = dict(lora_rank=4, lora_alpha=4, lr=1e-3, keep="all", global_batch=7)
        return train.TrainOptions(
            model=str(tiny), data=str(uneven), out=out, batch_size=batch_size, **{**small, "window": 8, **loss}
        )

    if "objective" in loss:
        loss = dict(loss, window=None)
    whole, value = first_gradients(options("whole", 7))
    assert max(g.abs().max() for g in whole) > 1e-4
    for name, batch_size, count in (("micro", 1, 1), ("processes", 2, 2)):
        parts, values = [], []
        for index in range(count):
            gradients, share = first_gradients(options(name, batch_size), index, count)
            parts.append(gradients)
            values.append(share)
        assert sum(values) == pytest.approx(value, abs=1e-5)
        for expected, *found in zip(whole, *parts):
            torch.testing.assert_close(sum(found), expected, rtol=1e-3, atol=1e-6)


def same_adapter(folder, other):
    """Whether two runs trained one adapter but for rounding: AdamW divides a gradient by its size, so that a number
    whose gradient is all rounding may go anywhere, and only the tensors as a whole compare."""
    for name, w in weights(folder).items():
        difference, size = (w - weights(other)[name]).norm(), weights(other)[name].norm()
        assert difference <= 1e-3 * size, f"{name}: {difference} of {size}"


def test_batch_size_only_splits_the_global_batch(tiny, trajectories, trained, tmp_path, capsys):
    run_train(capsys, model=tiny, data=trajectories, out=tmp_path / "R", batch_size=5)
    same_adapter(tmp_path / "R" / "epoch-2", trained / "epoch-2")


def test_two_real_processes_train_the_same_adapter(tiny, trajectories, trained, tmp_path):
    out = tmp_path / "R"
    done = shell("train", *flags(model=tiny, data=trajectories, out=out, **TRAIN), processes=2)
    assert done.returncode == 0, done.stderr
    for a, b in zip(metrics(out), metrics(trained), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-4)
    same_adapter(out / "epoch-2", trained / "epoch-2")


# ------------------------------------------------------------------------------------------------------ checkpoints


def test_a_run_killed_after_an_epoch_continues_bit_for_bit(tiny, trajectories, trained, tmp_path, capsys):
    """The folder as a kill inside epoch 2 leaves it: one checkpoint, half of another, and too many lines of metrics."""
    out = tmp_path / "R"
    shutil.copytree(trained, out)
    shutil.move(out / "epoch-2", out / "epoch-2.tmp")
    (out / "epoch-2.tmp" / "adapter_model.safetensors").write_bytes(b"torn")
    result = run_train(capsys, model=tiny, data=trajectories, out=out)
    assert result["step"] == 6
    assert result["checkpoint"].endswith("epoch-2")
    for file in ("adapter_model.safetensors", "optimizer.safetensors"):
        assert (out / "epoch-2" / file).read_bytes() == (trained / "epoch-2" / file).read_bytes()
    assert metrics(out) == metrics(trained)


def test_a_run_that_stops_early_is_the_beginning_of_the_whole_run(tiny, trajectories, trained, tmp_path, capsys):
    options = dict(model=tiny, data=trajectories, out=tmp_path / "R")
    for _ in range(2):  # the second start has nothing to do
        result = run_train(capsys, **options, stop_after=1)
        assert result["step"] == result["steps"] == 3
        assert result["checkpoint"].endswith("epoch-1")
        assert not (tmp_path / "R" / "epoch-2").exists()
    assert metrics(tmp_path / "R") == metrics(trained)[:3]
    assert run_train(capsys, **options)["step"] == 6
    for epoch in ("epoch-1", "epoch-2"):
        name = f"{epoch}/adapter_model.safetensors"
        assert (tmp_path / "R" / name).read_bytes() == (trained / name).read_bytes()


def test_a_finished_run_is_left_alone(tiny, trajectories, trained, capsys):
    before = {file: file.stat().st_mtime_ns for file in trained.rglob("*.safetensors")}
    result = run_train(capsys, model=tiny, data=trajectories, out=trained)
    assert result["loss"] == metrics(trained)[-1]["loss"]  # the last metrics are known
    assert before == {file: file.stat().st_mtime_ns for file in trained.rglob("*.safetensors")}


def test_only_the_last_checkpoints_between_epochs_are_kept(tiny, trajectories, trained, tmp_path, capsys):
    out = tmp_path / "R"
    run_train(capsys, model=tiny, data=trajectories, out=out, save_every=1, keep_last=2)
    assert sorted(p.name for p in out.iterdir() if p.is_dir()) == ["epoch-1", "epoch-2", "step-4", "step-5"]
    assert metrics(out) == metrics(trained)


def test_t3d_continues_with_the_reference_that_it_had(tiny, trajectories, tmp_path, capsys):
    setting = dict(model=tiny, data=trajectories, objective="t3d", beta=5, reference_steps=2)
    once, again, base = (tmp_path / name for name in ("once", "again", "base"))
    result = run_train(capsys, out=once, **setting)
    shutil.copytree(once, again)
    shutil.rmtree(again / "epoch-2")
    assert run_train(capsys, out=again, **setting)["loss"] == result["loss"]
    for file in ("adapter_model.safetensors", "optimizer.safetensors", "reference.safetensors"):
        assert (again / "epoch-2" / file).read_bytes() == (once / "epoch-2" / file).read_bytes()
    # After 3 steps the reference is the student of step 2, and it makes a difference.
    student = weights(once / "epoch-1")
    reference = load_file(once / "epoch-1" / "reference.safetensors")
    assert len(student) == len(reference)
    for ours, theirs in zip(student.values(), reference.values()):
        assert not torch.equal(ours, theirs)
    assert run_train(capsys, out=base, **{**setting, "reference_steps": 100})["loss"] != result["loss"]
    assert not (base / "epoch-2" / "reference.safetensors").exists()


@pytest.mark.parametrize("steps", [1, 2])
def test_t3d_of_all_weights_continues_with_the_reference_that_it_had(tiny, trajectories, tmp_path, capsys, steps):
    setting = dict(model=tiny, data=trajectories, objective="t3d", beta=5, lora_rank=0, lr=1e-3, warmup=0)
    setting.update(reference_steps=2 * steps)  # at the kill after 3 steps the reference is of step 2, or as loaded
    once, again = tmp_path / "once", tmp_path / "again"
    result = run_train(capsys, out=once, **setting)
    shutil.copytree(once, again)
    shutil.rmtree(again / "epoch-2")
    assert run_train(capsys, out=again, **setting)["loss"] == result["loss"]
    for file in ("model.safetensors", "optimizer.safetensors", "reference.safetensors"):
        assert (again / "epoch-2" / file).read_bytes() == (once / "epoch-2" / file).read_bytes()
    assert (once / "epoch-1" / "reference.safetensors").exists() == (steps == 1)
    never = run_train(capsys, out=tmp_path / "never", **{**setting, "reference_steps": 100})
    assert never["loss"] != result["loss"] and not (tmp_path / "never/epoch-2/reference.safetensors").exists()


def test_full_fine_tuning_on_reference_answers(tiny, puzzles, tmp_path, capsys):
    out = tmp_path / "R"
    options = dict(model=tiny, data=puzzles, out=out, objective="nelbo", lora_rank=0, lr=3e-3)
    run_train(capsys, **options)
    before, after = load_file(tiny / "model.safetensors"), load_file(out / "epoch-2" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, w in before.items():
        assert not torch.equal(w, after[name]), name
    tokenizer.load(out / "epoch-2")  # the checkpoint is a model folder of its own
    shutil.rmtree(out / "epoch-2")
    _, err = run(capsys, "train", **{**TRAIN, **options})
    assert "no effect" not in err
    _, err = run(capsys, "train", **{**TRAIN, **options, "out": tmp_path / "S"}, lora_alpha=3, stop_after=1)
    assert "--lora-alpha has no effect with --lora-rank 0" in err
    again = load_file(out / "epoch-2" / "model.safetensors")
    for name, w in after.items():
        assert torch.equal(w, again[name]), name


def test_long_answers_are_left_out_and_counted(tiny, tmp_path, capsys):
    rows = [dict(id=i, prompt="L1", answer="12" * n) for i, n in enumerate((1, 2, 3, 40))]
    settings = dict(TRAIN, model=tiny, data=write_lines(tmp_path / "d.jsonl", rows), objective="nelbo")
    result, err = run(capsys, "train", **settings, out=tmp_path / "R", max_answer_tokens=7)
    assert result["examples"] == 3  # 6 tokens and the EOS
    assert "1 of 4 answers are left out: they have more than --max-answer-tokens 7, up to 81" in err
    assert meta(tmp_path / "R")["max_answer_tokens"] == 7
    result, err = run(capsys, "train", **settings, out=tmp_path / "all", max_answer_tokens=81, cut_eos=True)
    assert result["examples"] == 4 and "left out" not in err and "--cut-eos acts on trajectories" in err
    few = dict(settings, out=tmp_path / "none", max_answer_tokens=2)
    fails(capsys, "--max-answer-tokens 2 leaves none; the shortest answer has 3 tokens", "train", **few)


@pytest.mark.skipif(sys.platform == "win32", reason="there is no limit to set")
def test_a_full_disk_at_a_checkpoint_leaves_the_last_good_one(
    tiny, trajectories, trained, tmp_path, capsys, monkeypatch
):
    """The kernel refuses files above 20 kB from the second checkpoint on, as a full disk would."""
    import resource  # not on Windows

    out, write, calls = tmp_path / "R", resume.write_checkpoint, []
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, unlimited[1]))
        try:
            write(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)

    monkeypatch.setattr(resume, "write_checkpoint", limited)
    fails(capsys, "too large|No space", "train", model=tiny, data=trajectories, out=out, **TRAIN)
    assert sorted(p.name for p in out.iterdir()) == ["epoch-1", "lock", "meta.json", "metrics.jsonl"]
    good = (trained / "epoch-1" / "adapter_model.safetensors").read_bytes()
    assert (out / "epoch-1" / "adapter_model.safetensors").read_bytes() == good


# ---------------------------------------------------------------------------------------------- objectives, switches

SWITCHES = [dict(objective=name) for name in objectives.OBJECTIVES]
SWITCHES += [
    dict(objective="t3d", reference_steps=1, random_tokens=0.5, alpha=1, beta=1, path_weight=0),
    dict(objective="t3d", preference="none", reduction="sum", random_tokens=0.5, draw_once=True),
    dict(objective="t3d", fake="sample", reduction="sum", alpha=1, beta=1),
    dict(objective="ideal", window=4, weight=2.0, beta=0.5, masks="subset"),
    dict(objective="nelbo", masks="subset"),
    dict(objective="dparallel", block_length=4, weight=1, temperature=0.1),
    dict(window="global"),
    dict(ce_weight=0),
    dict(weight=0.0),
    dict(entropy_context="step", window=4),
    dict(starts="non-ltr", window=4),
    dict(ranking="listwise", beta=2.0),
    dict(ranking="kl", window=4),
    dict(cut_eos=True),
    dict(lora_dropout=0.1, lora_rank=2, lora_alpha=4, lora_targets="q_proj,ff_proj", gradient_checkpointing=True),
]


@pytest.mark.parametrize("options", SWITCHES, ids=lambda options: "-".join(map(str, options)))
def test_every_objective_and_switch_trains(tiny, trajectories, tmp_path, capsys, options):
    out, always = tmp_path / "R", dict(epochs=1, global_batch=12, batch_size=12, warmup=0)
    if options.get("objective", "tabom") != "tabom":
        always["window"] = 8  # has no effect, and does no harm
    result = run_train(capsys, model=tiny, data=trajectories, out=out, **{**always, **options})
    assert result["loss"] > 0
    assert weights(out / "epoch-1")
    written = meta(out)
    for name, value in options.items():
        if name not in ("lora_targets", "gradient_checkpointing"):
            assert written[name] == value
    assert ("window" in written) == (written["objective"] in ("tabom", "ideal"))  # only what had an effect


@pytest.mark.parametrize("draw_once", [True, False])
def test_windows_are_drawn_once_or_anew(tiny, trajectories, tmp_path, capsys, draw_once):
    """At a learning rate of 0 two epochs differ in what they draw alone."""
    options = dict(model=tiny, data=trajectories, out=tmp_path / "R", global_batch=12, lr=0)
    run_train(capsys, **options, **({"draw_once": True} if draw_once else {}))
    first, second = (line["loss"] for line in metrics(tmp_path / "R"))
    assert (first == pytest.approx(second, rel=1e-6)) == draw_once


def test_without_preference_t3d_goes_on_from_an_adapter(tiny, trajectories, trained, tmp_path, capsys):
    options = dict(model=tiny, data=trajectories, adapter=trained / "epoch-2", out=tmp_path / "R", epochs=1)
    err = run(capsys, "train", objective="t3d", preference="none", beta=0.2, keep="all", **options)[1]
    assert "warning: --beta: not used by --objective t3d" in err
    assert not list((tmp_path / "R/epoch-1").glob("*reference*"))


def test_a_sum_over_means_is_refused(tiny, trajectories, tmp_path, capsys):
    options = dict(model=tiny, data=trajectories, out=tmp_path / "R", objective="t3d", **TRAIN)
    fails(capsys, "--reduction sum needs --path linear", "train", reduction="sum", path="levels", **options)


def test_options_without_effect_are_named(tiny, trajectories, tmp_path, capsys):
    unused = dict(objective="nelbo", window=8, weight=2, reference_steps=3, epochs=1, keep="all", lr=0)
    err = run(capsys, "train", model=tiny, data=trajectories, out=tmp_path / "R", **unused)[1]
    assert "warning: --window, --weight, --reference-steps: not used by --objective nelbo" in err
    assert not {"window", "weight"} & meta(tmp_path / "R").keys()


def test_a_loss_without_terms_is_refused(tiny, trajectories, tmp_path, capsys):
    options = dict(model=tiny, data=trajectories, out=tmp_path / "R", **TRAIN)
    fails(capsys, "--weight 0 and --ce-weight 0 train nothing", "train", weight=0, ce_weight=0, **options)
    assert not (tmp_path / "R").exists()


@pytest.mark.parametrize("window", [0, 1, -3])
def test_a_window_without_pairs_is_refused(tiny, trajectories, tmp_path, capsys, window):
    options = {**TRAIN, "window": window}
    message = f"--window {window}: needs at least 2"
    fails(capsys, message, "train", model=tiny, data=trajectories, out=tmp_path / "R", **options)


@pytest.mark.parametrize(
    "option, value, message",
    [
        ("limit", -5, "--limit -5: must be"),
        ("lr", "nan", "--lr nan: must be a number"),
        ("clip", -1, "--clip -1.0: must be"),
        ("global_batch", 0, "--global-batch 0: must be"),
        ("random_tokens", 1.5, "--random-tokens 1.5: must be at most 1"),
        ("lora_targets", "foo", "no linear layer is called foo"),
    ],
)
def test_values_out_of_range_are_refused_and_leave_no_trace(
    tiny, trajectories, tmp_path, capsys, option, value, message
):
    options = {**TRAIN, option: value}
    fails(capsys, message, "train", model=tiny, data=trajectories, out=tmp_path / "R", **options)
    assert not (tmp_path / "R").exists()


@pytest.mark.parametrize("asked", [dict(ranking="kl"), dict(objective="ideal")])
def test_the_kl_needs_logged_entropies(tiny, uneven, tmp_path, capsys, asked):
    rows = [row for _, row in data.read_rows(uneven)]
    del rows[2]["entropy"]
    bare = write_lines(tmp_path / "bare.jsonl", rows)
    options = dict(model=tiny, data=bare, out=tmp_path / "R", **TRAIN, **asked)
    fails(capsys, "--ranking kl and --objective ideal need the entropies that distill logs", "train", **options)


# ------------------------------------------------------------------------------------------------------- adapters


def test_training_starts_from_an_adapter(tiny, trajectories, trained, tmp_path, capsys):
    options = dict(model=tiny, data=trajectories, adapter=trained / "epoch-2", out=tmp_path / "R", epochs=1, lr=0)
    run_train(capsys, **options)
    before = weights(trained / "epoch-2")
    for name, w in weights(tmp_path / "R" / "epoch-1").items():
        assert torch.equal(w, before[name]), name


def test_an_adapter_brings_its_rank_alpha_and_targets(tiny, trajectories, tmp_path, capsys):
    shape = dict(lora_rank=3, lora_alpha=5.0, lora_targets="ff_proj,q_proj", lr=0, epochs=1)
    run_train(capsys, model=tiny, data=trajectories, out=tmp_path / "A", **shape)
    start = dict(model=tiny, data=trajectories, adapter=tmp_path / "A" / "epoch-1", epochs=1)
    run_train(capsys, out=tmp_path / "B", **start)
    written, stored = meta(tmp_path / "B"), lora.settings(tmp_path / "B" / "epoch-1")
    assert (written["lora_rank"], written["lora_alpha"]) == (3, 5.0)
    assert (stored.rank, stored.alpha) == (3, 5.0)
    assert sorted(stored.targets) == sorted(written["lora_targets"]) == ["ff_proj", "q_proj"]


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(lora_rank=4), "--lora-rank 4: .* has 16; leave the flag out"),
        (dict(lora_alpha=8), "--lora-alpha 8.*: .* has 16; leave the flag out"),
        (dict(lora_rank=0), "--lora-rank 0 trains no adapter, and --adapter needs one"),
    ],
)
def test_flags_that_contradict_the_adapter_are_refused(tiny, trajectories, trained, tmp_path, capsys, changes, message):
    options = dict(model=tiny, data=trajectories, adapter=trained / "epoch-2", out=tmp_path / "R", **TRAIN)
    fails(capsys, message, "train", **options, **changes)
    assert not (tmp_path / "R").exists()


# --------------------------------------------------------------------------------------------------------- recipes

# DESIGN.md, section 6: data (rows by method), margin, weight, peak learning rate, global batch, starts.
TABLE = {
    "dream-prm12k": (("entropy",), 0.1, 1.0, 2e-5, 8 * 4, "uniform"),
    "dream-ling-coder": (("all",), 0.1, 2.0, 1e-4, 8 * 8, "non-ltr"),
    "llada-prm12k": (("entropy", "default", "credit"), 0.2, 1.0, 2e-5, 8 * 4, "uniform"),
    "llada-ling-coder": (("default",), 0.3, 1.0, 2e-5, 8 * 4, "uniform"),
}


@pytest.fixture(scope="module")
def release(tiny, trajectories, tmp_path_factory):
    """A file in the authors' format: twelve trajectories, four of each of three methods, padded to 256 tokens."""
    rows = []
    for i, record in enumerate(data.read_trajectories(trajectories)):
        rows.append(to_release_format(record, 2, ("entropy", "default", "topk_margin")[i % 3]))
    return write_lines(tmp_path_factory.mktemp("release") / "theirs.jsonl", rows)


def test_the_table_has_every_recipe():
    assert set(recipes.RECIPES) == set(TABLE)


@pytest.mark.parametrize("name", TABLE)
def test_a_recipe_sets_the_whole_table(name):
    c = train.TrainOptions(model="M", data="D", out="O", recipe=name)
    assert (c.methods, c.margin, c.weight, c.lr, c.global_batch, c.starts) == TABLE[name]
    assert (c.window, c.epochs, c.warmup, c.max_prompt_tokens) == (32, 5, 50, 256)
    assert (c.lora_rank, c.lora_alpha, c.lora_targets) == (16, 16, ("q_proj", "v_proj"))
    assert (c.weight_decay, c.clip, c.final_lr, c.keep) == (0.01, 1.0, 0.0, "all")
    assert (c.objective, c.cut_eos) == ("tabom", False)


@pytest.mark.parametrize(
    "objective, wanted", [("dparallel", dict(weight=2.0)), ("ideal", dict(window=None)), ("t3d", {})]
)
def test_what_is_tabom_s_of_a_recipe_is_no_other_objective_s(objective, wanted):
    """Although it has options of these names."""
    c = train.TrainOptions(recipe="llada-prm12k", objective=objective)
    parameters, unused = objective_options.chosen(c)
    assert wanted.items() <= parameters.items() and unused == [] and (c.lr, c.global_batch) == (2e-5, 32)
    assert "changed_from_recipe" not in resume.identity(c, [])
    assert not any(word in card.command(c, dict(global_batch=32), ()) for word in ("--weight", "--window", "--margin"))


def test_the_other_rankings_say_that_they_have_no_margin():
    cases = (dict(beta=2.0), ["beta"]), (dict(ranking="listwise", margin=0.2), ["margin"])
    for given, unused in (*cases, (dict(ranking="listwise", recipe="dream-prm12k"), [])):
        assert objective_options.chosen(train.TrainOptions(**given))[1] == unused


def test_training_continues_with_the_adapters_dropout_and_leaves_the_model_without(tiny, trajectories, tmp_path):
    options = dict(model=str(tiny), data=str(trajectories), keep="all", epochs=1, warmup=0, device="cpu")
    train.train(train.TrainOptions(out=str(tmp_path / "A"), lora_dropout=0.5, **options))
    for given, dropout in ((None, 0.5), (0.25, 0.25)):
        c = train.TrainOptions(
            out=str(tmp_path / f"B{given}"), adapter=str(tmp_path / "A" / "epoch-1"), lora_dropout=given, **options
        )
        loaded = loading.load_model(c, torchrun.Processes("cpu"))
        train.train(c, loaded=loaded)
        assert not loaded.m.training
        assert lora.settings(tmp_path / f"B{given}" / "epoch-1").dropout == dropout


def test_a_recipe_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match="--recipe dream: must be one of dream-prm12k, "):
        train.TrainOptions(recipe="dream")


def test_options_that_are_made_of_options_keep_every_value():
    """Also one that is the default, where the recipe has another."""
    c = train.TrainOptions(recipe="dream-ling-coder", lr=2e-5)
    assert (c.lr, c.margin) == (2e-5, 0.1)
    assert dataclasses.replace(c, epochs=1) == train.TrainOptions(recipe="dream-ling-coder", lr=2e-5, epochs=1)


def test_a_recipe_and_an_adapter_of_another_shape(tiny, release, tmp_path, capsys):
    """The error names the recipe, and its way out works."""
    quick = dict(lr=0.0, epochs=1, keep="all")
    run_train(capsys, model=tiny, data=release, out=tmp_path / "A", lora_rank=3, lora_targets="q_proj", **quick)
    start = dict(model=tiny, data=release, recipe="llada-ling-coder", adapter=tmp_path / "A" / "epoch-1", methods="all")
    message = "--lora-rank 16: .* has 3; --recipe llada-ling-coder asks for it: add --lora-rank 3, or start"
    fails(capsys, message, "train", out=tmp_path / "R", **start)
    message = "--lora-targets .*: add --lora-targets q_proj,"
    fails(capsys, message, "train", out=tmp_path / "R", lora_rank=3, **start)
    shape = dict(lora_rank=3, lora_targets="q_proj", epochs=1)
    run(capsys, "train", out=tmp_path / "R", **start, **shape)
    assert meta(tmp_path / "R")["changed_from_recipe"]["lora_rank"] == 3


@pytest.mark.parametrize("pattern, fits", [(r".*\.(q|v)_proj", True), (r".*\.q_proj", False)])
def test_a_recipe_continues_from_an_adapter_whose_layers_are_a_pattern(
    tiny, release, tmp_path, capsys, pattern, fits
):  # fmt: skip
    """As PEFT may write it. What counts are the layers, not how they are named."""
    m = lora.inject(model.load(tiny), 16, 16, pattern, generator=torch.Generator().manual_seed(0))
    lora.save(m, tmp_path / "A")
    edit_json(tmp_path / "A" / "adapter_config.json", target_modules=pattern)
    options = dict(model=tiny, data=release, recipe="llada-ling-coder", adapter=tmp_path / "A", methods="all")
    options.update(lr=0.0, epochs=1, keep="all", out=tmp_path / "R")
    if fits:
        run(capsys, "train", **options)
        assert weights(tmp_path / "R" / "epoch-1").keys() == weights(tmp_path / "A").keys()
    else:
        message = "--lora-targets q_proj,v_proj: .*A has other layers; leave --recipe llada-ling-coder out"
        fails(capsys, message, "train", **options)
        assert not (tmp_path / "R").exists()


def test_flags_win_over_the_recipe_and_stand_in_meta(tiny, release, tmp_path, capsys):
    """The methods of the recipe choose the rows: the eight of entropy and default."""
    short = dict(window=8, epochs=1, warmup=0, global_batch=8)
    options = dict(model=tiny, data=release, recipe="llada-prm12k", batch_size=8, **short)
    result, _ = run(capsys, "train", out=tmp_path / "R", **options)
    written = meta(tmp_path / "R")
    assert result["examples"] == written["examples"] == 8
    assert written["recipe"] == "llada-prm12k"
    assert written["changed_from_recipe"] == short
    assert (written["margin"], written["lr"], written["max_prompt_tokens"]) == (0.2, 2e-5, 256)


def test_only_what_was_changed_of_a_recipe_is_written_down():
    followed = train.TrainOptions(recipe="dream-prm12k", margin=0.1, batch_size=1)
    changed = train.TrainOptions(recipe="dream-prm12k", margin=0.3, batch_size=1)
    without = train.TrainOptions(margin=0.3)
    assert "changed_from_recipe" not in resume.identity(followed, [])
    assert resume.identity(changed, [])["changed_from_recipe"] == dict(margin=0.3)
    assert "changed_from_recipe" not in resume.identity(without, [])


# -------------------------------------------------------------------------------------------------- what is trained on


def prepared_records(tmp_path, **options):
    """The records that a run of these options trains on."""
    c = train.TrainOptions(keep="all", out=str(tmp_path / "R"), **options)
    loaded = loading.load_model(c, torchrun.Processes("cpu"))
    parameters, _ = objective_options.chosen(c)
    return records.training_records(c, loaded, parameters, torchrun.Processes("cpu"))


def test_steps_in_which_nothing_was_decoded_are_counted_and_train_on_nothing(tiny, trajectories, tmp_path, capsys):
    """Most windows of 2 steps are empty where every tenth step decoded a token: their loss is 0, and no NaN."""
    rows = []
    for i, record in enumerate(data.read_trajectories(trajectories)):
        far = [10 * step for step in record["order"]] if i < 5 else record["order"]
        rows.append(dict(record, order=far))
    file = write_lines(tmp_path / "gaps.jsonl", rows)
    options = dict(model=tiny, data=file, keep="all", global_batch=2, batch_size=1, epochs=1, warmup=0)
    _, err = run(capsys, "train", out=tmp_path / "R", window=2, **options)
    assert "warning: 5 of 12 trajectories have steps in which nothing was decoded" in err
    for line in metrics(tmp_path / "R"):
        for name in ("loss", "ce", "ranking", "grad_norm"):
            assert line[name] >= 0  # a NaN is not
    _, err = run(capsys, "train", out=tmp_path / "N", objective="nelbo", lr=0, **options)
    assert "nothing was decoded" not in err
    assert "warning: --lr 0 trains nothing" in err


def test_entropies_at_their_own_step_see_what_decoding_saw(tiny, puzzles, tmp_path, capsys):
    """Two tokens a step: by ranks the second would see the first. The base model is at no distance from itself."""
    run(capsys, "distill", model=tiny, data=puzzles, out=tmp_path / "T", tokens_per_step=2, dtype="float32", limit=4)
    by_step = prepared_records(tmp_path, model=str(tiny), data=str(tmp_path / "T"), ranking="kl")
    by_rank = data.read_trajectories(tmp_path / "T")
    assert prepared_records(tmp_path, model=str(tiny), data=str(tmp_path / "T"))[0]["order"] == by_rank[0]["order"]
    m, found = model.load(tiny), []
    for rows in (by_step, by_rank):
        batch = data.collate(rows, m.config.pad_id)
        found.append(baselines.ideal(m, batch, mask=torch.ones_like(batch["response_ids"], dtype=torch.bool))["kl"])
    assert 20 * abs(found[0]) < found[1], found


@pytest.mark.parametrize("ranking", ["margin", "listwise", "kl"])
def test_a_batch_of_empty_windows_has_the_loss_0(tiny, ranking):
    m = lora.inject(model.load(tiny), rank=2)
    batch = dict(prompt_ids=torch.tensor([[3, 4]] * 2), prompt_mask=torch.ones(2, 2, dtype=torch.long))
    batch.update(response_ids=torch.tensor([[5, 6, 7]] * 2), order=torch.tensor([[0, 9, 19]] * 2))
    batch.update(length=torch.tensor([3, 3]), entropy=torch.ones(2, 3))
    out = objectives.tabom(m, batch, window=4, ranking=ranking, start=torch.tensor([2, 12]))
    out["loss"].backward()
    assert out["loss"].item() == out["ce"].item() == out["ranking"].item() == 0
    for name, p in lora.tensors(m).items():
        assert p.grad is None or (p.grad == 0).all(), name


def test_methods_choose_rows_of_the_authors_files(tiny, release, tmp_path):
    choose = functools.partial(prepared_records, tmp_path, model=str(tiny), data=str(release))
    assert len(choose()) == len(choose(methods=("all",))) == 12
    assert len(choose(methods=("topk_margin",))) == 4
    assert len(choose(methods=("entropy", "default"))) == 8
    rows = choose(starts="non-ltr", methods=("entropy",))
    for row in rows:
        assert len(row["response_ids"]) == 256  # kept to the end
        assert row["order"][tiny_model.WHOLE.answer :] == [-1] * (256 - tiny_model.WHOLE.answer)
        assert row["non_ltr"] == data.non_ltr_positions(row["order"])


def test_rows_of_the_authors_files_are_read_as_their_loader_reads_them(bytes_model, tmp_path):
    """What it reads of these rows is in tests/golden/release/loader.json: here the rows of "entropy"."""
    golden = json.loads((FOLDER / "release" / "loader.json").read_text())
    items = golden["cases"][0]["items"]
    file, tok = write_lines(tmp_path / "theirs.jsonl", golden["rows"]), tokenizer.load(bytes_model)
    found = prepared_records(tmp_path, model=str(bytes_model), data=str(file), methods=("entropy",))
    assert len(found) == len(items) == 4
    for record, (prompt, response, ids, _, order, _) in zip(found, items):
        assert tok.decode(record["prompt_ids"]) == f"user: {prompt}\n"
        if ids is None:
            assert tok.response_text(record["response_ids"]).split()[-1] == response
            assert record["order"] == list(range(len(record["response_ids"])))  # from left to right
        else:
            assert (record["response_ids"], record["order"]) == (ids, order)


def test_raw_takes_the_prompts_of_the_authors_files_as_they_are(bytes_model, tmp_path):
    file, tok = (
        write_lines(tmp_path / "theirs.jsonl", [dict(question="2 + 2?", gen_text="4")]),
        tokenizer.load(bytes_model),
    )
    (record,) = prepared_records(tmp_path, model=str(bytes_model), data=str(file), raw=True)
    assert tok.decode(record["prompt_ids"]) == "2 + 2?" and tok.decode(record["response_ids"][:-1]) == "4"


@pytest.mark.parametrize("tokens", [5, 20])
def test_max_prompt_tokens_cuts_the_users_text_on_the_right(tiny, release, puzzles, tmp_path, tokens):
    whole = prepared_records(tmp_path, model=str(tiny), data=str(release))
    cut = prepared_records(tmp_path, model=str(tiny), data=str(release), max_prompt_tokens=tokens)
    for long, short in zip(whole, cut):
        n = len(short["prompt_ids"])
        assert n in (tokens, tokens - 1)  # the release leaves one token of room
        assert short["prompt_ids"] == long["prompt_ids"][:n]
        assert short["response_ids"] == long["response_ids"]
    dataset = dict(model=str(tiny), data=str(puzzles), objective="nelbo", max_prompt_tokens=tokens)
    for record in prepared_records(tmp_path, **dataset):
        assert len(record["prompt_ids"]) <= tokens


def test_cut_eos_drops_what_stands_behind_the_first_eos(tiny, trajectories, tmp_path):
    rows = data.read_trajectories(trajectories)
    ends = []
    for row in rows:
        row["response_ids"][6] = 1  # EOS
        ends.append(row["response_ids"].index(1) + 1)
    file = write_lines(tmp_path / "T.jsonl", rows)
    options = dict(model=str(tiny), data=str(file))
    kept = prepared_records(tmp_path, **options)
    cut = prepared_records(tmp_path, cut_eos=True, **options)
    assert [len(r["response_ids"]) for r in kept] == [tiny_model.WHOLE.answer] * 12
    for record, n in zip(cut, ends):
        stops = [i for i, token in enumerate(record["response_ids"]) if token in (1, 2)]  # EOS and padding end it
        assert stops == [len(record["response_ids"]) - 1]
        assert len(record["response_ids"]) <= n
        assert sorted(record["order"]) == list(range(len(record["order"])))


def test_trajectories_of_another_model_are_refused(tiny, trajectories, tmp_path, capsys):
    other = changed_model(tmp_path, tiny)
    model.save(model.create({**tiny_model.config(), "vocab_size": 20, "embedding_size": 20}), other)
    message = "made with a vocabulary of 18; .* has 20"
    fails(capsys, message, "train", model=other, data=trajectories, out=tmp_path / "R", **TRAIN)
    high = write_lines(tmp_path / "high.jsonl", [dict(id=0, prompt_ids=[3], response_ids=[500, 4], order=[1, 0])])
    fails(capsys, "token id 500, but the model has 18", "train", model=tiny, data=high, out=tmp_path / "R", **TRAIN)


def test_nothing_to_train_on_is_one_line(tiny, trajectories, puzzles, tmp_path, capsys):
    options = dict(model=tiny, out=tmp_path / "R", window=8)
    fails(capsys, "--keep correct keeps none of 12", "train", data=trajectories, **options)
    fails(capsys, "no trajectories, and tabom needs them", "train", data=puzzles, **options)
    fails(capsys, "no dataset file", "train", data=tmp_path / "none", **options)
    bare = write_lines(tmp_path / "bare.jsonl", [dict(prompt="L1")])
    message = "bare.jsonl:1: the row has no answer to train on"
    fails(capsys, message, "train", data=bare, objective="nelbo", **options)


@pytest.fixture
def unfinished(trajectories, tmp_path):
    """A distillation that was stopped after 10 of its 12 prompts."""
    shutil.copytree(trajectories, tmp_path / "T")
    file = tmp_path / "T" / "trajectories-00000.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:10]))
    return tmp_path / "T"


def test_an_unfinished_distillation_is_refused_unless_it_is_meant(tiny, unfinished, tmp_path, capsys):
    options = dict(model=tiny, data=unfinished, out=tmp_path / "R", **{**TRAIN, "epochs": 1})
    fails(capsys, "10 of 12 prompts are answered: .*--unfinished trains on what is there", "train", **options)
    assert not (tmp_path / "R").exists()
    fails(capsys, "10 of 11 prompts are answered", "train", limit=11, **options)
    with open(data.trajectory_files(unfinished)[0], "a") as f:
        f.write('{"id": "torn", "prompt_ids": [3, 4')  # by a kill: it is as if it were not there
    result, _ = run(capsys, "train", unfinished=True, **options)
    assert result["examples"] == 10


def test_what_is_left_out_is_said(tiny, trajectories, release, tmp_path, capsys):
    rows = [dict(r, correct=i > 2, finished=i > 0) for i, r in enumerate(data.read_trajectories(trajectories))]
    file = write_lines(tmp_path / "some.jsonl", rows)
    options = {**TRAIN, "epochs": 1, "keep": "correct", "model": tiny}
    run_of = functools.partial(run, capsys, "train", **options)
    result, err = run_of(data=file, out=tmp_path / "R")
    assert result["examples"] == 9
    assert "--keep correct trains on 9 of 12 trajectories (11 finished, 3 wrong)" in err
    bare = [{name: r[name] for name in ("id", "prompt_ids", "response_ids", "order")} for r in rows]
    options["data"] = write_lines(tmp_path / "bare.jsonl", bare)
    fails(capsys, "no row says `finished`: take --keep all", "train", out=tmp_path / "S", **options)
    theirs = [json.loads(line) for line in release.read_text().splitlines()]
    theirs[0]["decoding_order"].pop()
    file = write_lines(tmp_path / "theirs.jsonl", theirs)
    options["keep"] = "all"
    _, err = run(capsys, "train", methods="entropy", out=tmp_path / "U", **dict(options, data=file))
    assert "8 rows of other methods are left out (default 4, topk_margin 4): --methods all" in err
    assert "1 of 4 rows have no step for each token, and count as decoded from left to right" in err
    options.update(data=file, methods="credit")
    fails(capsys, "no row is of the methods credit .*--methods all takes them", "train", out=tmp_path / "V", **options)


def test_that_the_first_of_several_answers_is_trained_on_is_said(tiny, tmp_path, capsys):
    rows = [dict(prompt="L1", answer=["2", "3"]), dict(prompt="L2", answer="3")]
    options = dict(model=tiny, data=write_lines(tmp_path / "d.jsonl", rows), objective="nelbo", out=tmp_path / "R")
    _, err = run(capsys, "train", **{**TRAIN, **options})
    assert "1 of 2 rows have several answers: the first of each is trained on" in err


def test_each_of_several_folders_has_to_be_finished(tiny, trajectories, unfinished, tmp_path, capsys):
    for line in data.trajectory_files(unfinished):  # other ids, or the two could not be read together
        rows = [dict(json.loads(text), id=f"b{i}") for i, text in enumerate(line.read_text().splitlines())]
        write_lines(line, rows)
    options = dict(model=tiny, data=f"{trajectories},{unfinished}", out=tmp_path / "R", **{**TRAIN, "epochs": 1})
    fails(capsys, "10 of 12 prompts are answered: .*--unfinished trains on what is there", "train", **options)
    edit_json(unfinished / "meta.json", prompts=10, vocab_size=7)
    fails(capsys, "made with a vocabulary of 7", "train", **options)
    edit_json(unfinished / "meta.json", vocab_size=meta(trajectories)["vocab_size"])
    result, _ = run(capsys, "train", **options)
    assert result["examples"] == 22


def test_a_limit_that_is_answered_is_finished(tiny, unfinished, tmp_path, capsys):
    options = dict(model=tiny, data=unfinished, out=tmp_path / "R", **{**TRAIN, "epochs": 1})
    result, said = run(capsys, "train", limit=10, **options)
    assert result["examples"] == 10 and "10 of 12 prompts are answered, the longest first" in said


def test_a_distillation_without_an_answer_is_refused(tiny, unfinished, tmp_path, capsys):
    data.trajectory_files(unfinished)[0].unlink()
    fails(capsys, "T: no prompt is answered yet", "train", model=tiny, data=unfinished, out=tmp_path / "R")


@pytest.mark.skipif(sys.platform == "win32", reason="there are no locks")
def test_a_distillation_that_is_still_running_is_refused(tiny, trajectories, tmp_path, capsys):
    folder = tmp_path / "T"
    shutil.copytree(trajectories, folder)
    options = dict(model=tiny, data=folder, out=tmp_path / "R", **{**TRAIN, "epochs": 1})
    with locked_by_another(folder):
        fails(capsys, "distill is still writing into it: wait for it", "train", **options)
        fails(capsys, "distill is still writing into it", "train", unfinished=True, **options)
    assert run(capsys, "train", **options)[0]["examples"] == 12  # and nothing of ours holds it


def test_the_order_of_trajectory_lines_does_not_matter(tiny, trajectories, trained, tmp_path, capsys):
    lines = (trajectories / "trajectories-00000.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "T").mkdir()
    (tmp_path / "T" / "trajectories-00000.jsonl").write_text("".join(lines[::-2]))
    (tmp_path / "T" / "trajectories-00001.jsonl").write_text("".join(lines[-2::-2]))
    run_train(capsys, model=tiny, data=tmp_path / "T", out=tmp_path / "R", stop_after=1)
    assert metrics(tmp_path / "R") == metrics(trained)[:3]


def test_a_folder_with_another_run_is_refused(tiny, trajectories, trained, capsys):
    options = dict(model=tiny, data=trajectories, out=trained)
    fails(capsys, "holds another run: lr was 0.01 and is now 1.0", "train", **options, **{**TRAIN, "lr": 1.0})
    fails(capsys, "lora_rank was 16 and is now 8", "train", **options, **TRAIN, lora_rank=8)
    fails(capsys, "lora_alpha was", "train", **options, **TRAIN, lora_alpha=2)


# ----------------------------------------------------------------------------------------------- losses gone wrong


def test_an_infinite_loss_stops_the_run(tiny, trajectories, tmp_path, capsys):
    def blow_up(folder):
        tensors = load_file(folder / "model.safetensors")
        tensors["model.transformer.ln_f.weight"].fill_(3e38)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    broken = changed_model(tmp_path, tiny, blow_up)
    assert tabom.main(["train", *flags(model=broken, data=trajectories, out=tmp_path / "R", **TRAIN)]) == 1
    assert re.search(r"error: loss nan .* at step 1, examples \[.*train-.*\]; last", capsys.readouterr().err)


def test_a_step_that_is_not_finite_is_dropped_on_demand(tiny, trajectories, tmp_path, capsys):
    """Also where the run is continued, and none of its steps was ever made."""
    options = dict(TRAIN, model=tiny, data=trajectories, out=tmp_path / "R", skip_nonfinite=True)
    options.update(weight=1e38, margin=1e38)
    result, err = run(capsys, "train", stop_after=1, **options)
    assert err.count("the step is dropped") == 3
    assert result["loss"] is None  # JSON has no infinity
    assert run(capsys, "train", **options)[0]["step"] == 6
    for line in (tmp_path / "R" / "metrics.jsonl").read_text().splitlines():
        assert json.loads(line)["loss"] is None


def test_a_model_whose_config_and_tokenizer_disagree_is_named(tiny, trajectories, tmp_path, capsys):
    other = changed_model(tmp_path, tiny, lambda f: edit_json(f / "config.json", eos_token_id=3))
    options = {**TRAIN, "epochs": 1}
    err = run(capsys, "train", model=other, data=trajectories, out=tmp_path / "R", **options)[1]
    assert "eos_token_id is 3 in config.json, the tokenizer has 1 (<|endoftext|>)" in err


# -------------------------------------------------------------------------------------------------------- compiled


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_blocks_train_the_same(tiny, trajectories, trained, tmp_path):
    out = tmp_path / "R"
    done = shell("train", *flags(model=tiny, data=trajectories, out=out, compile=True, **{**TRAIN, "epochs": 1}))
    assert done.returncode == 0, done.stderr
    assert metrics(out)[0]["loss"] == pytest.approx(metrics(trained)[0]["loss"], abs=1e-4)
    assert metrics(out)[0]["grad_norm"] == pytest.approx(metrics(trained)[0]["grad_norm"], rel=1e-3)


# ------------------------------------------------------------------------------------------------ while it runs


def test_held_out_records_are_not_trained_on_and_their_loss_is_logged(tiny, trajectories, tmp_path, capsys):
    out = tmp_path / "R"
    run_train(capsys, model=tiny, data=trajectories, out=out, held_out=4)
    lines = metrics(out)
    assert meta(out)["held_out"] == 4
    assert [line["step"] for line in lines if "held_out_loss" in line] == [2, 4]  # 8 records in batches of 5
    for line in lines:
        if "held_out_loss" in line:
            assert line["held_out_loss"] > 0
            assert isinstance(line["sample"], str)
    again = tmp_path / "again"
    run_train(capsys, model=tiny, data=trajectories, out=again, held_out=4, batch_size=1)
    assert metrics(again)[-1]["held_out_loss"] == pytest.approx(lines[-1]["held_out_loss"], rel=1e-3)
    records = data.read_trajectories(trajectories)  # what is held out is a part of what the run is
    record = records[data.epoch_order(len(records), TRAIN.get("seed", 0), "held out")[0]]
    record["response_ids"][0], record["response_ids"][1] = record["response_ids"][1], record["response_ids"][0]
    (tmp_path / "T").mkdir()
    write_lines(tmp_path / "T" / "trajectories-00000.jsonl", records)
    changed = dict(TRAIN, model=tiny, data=tmp_path / "T", out=again, held_out=4, batch_size=1)
    fails(capsys, "holds another run: data_sha256 was", "train", **changed)
    options = dict(model=tiny, data=trajectories, keep="all", out=tmp_path / "S")
    fails(capsys, "--held-out 12: there are 12 records", "train", held_out=12, **options)


@pytest.mark.parametrize("loss", [dict(), dict(starts="non-ltr", window=4), dict(objective="nelbo", window=None)])
def test_the_held_out_loss_is_one_mean_over_rows(tiny, uneven, tmp_path, monkeypatch, loss):
    """Whatever the batch size and the number of processes, also where rows have no pair."""
    monkeypatch.setattr(distill, "answer_batch", lambda *arguments: [dict(text="")])
    small = dict(model=str(tiny), data=str(uneven), keep="all", held_out=6, lora_rank=2, **{"window": 8, **loss})

    def held_out_loss(batch_size, index=0, count=1):
        c = train.TrainOptions(out=str(tmp_path / "R"), batch_size=batch_size, global_batch=1, **small)
        processes = OneOf(index, count)
        found = train.on_held_out(train.prepare(c, processes))["held_out_loss"]
        processes.unlock()
        return found

    whole = held_out_loss(6)
    assert held_out_loss(1) == pytest.approx(whole, rel=1e-5)
    assert held_out_loss(2, 0, 2) + held_out_loss(2, 1, 2) == pytest.approx(whole, rel=1e-5)


def test_held_out_and_trained_on_are_all_records():
    records = [dict(id=i) for i in range(10)]
    held_out, rest = train.split_held_out(records, train.TrainOptions(held_out=3, seed=1))
    assert len(held_out) == 3
    assert sorted(r["id"] for r in held_out + rest) == list(range(10))
    assert train.split_held_out(records, train.TrainOptions(held_out=3, seed=1)) == (held_out, rest)
    assert train.split_held_out(records, train.TrainOptions(held_out=3, seed=2))[0] != held_out


def test_a_finished_run_goes_on_with_more_epochs(tiny, trajectories, trained, tmp_path, capsys):
    out = tmp_path / "R"
    shutil.copytree(trained, out)
    words = ["train", *flags(model=tiny, data=trajectories, out=out, **{**TRAIN, "epochs": 3})]
    assert tabom.main(words) == 0
    found, errors = capsys.readouterr()
    assert last_json(found)["step"] == 9
    assert "--epochs 3, and the run was started with 2" in errors
    assert "continuing at step 6 of 9" in errors
    assert [line["step"] for line in metrics(out)] == list(range(1, 10))
    options = dict(model=tiny, data=trajectories, out=out, **TRAIN)
    fails(capsys, "holds another run: epochs was 3 and is now 2", "train", **options)


def test_metrics_go_to_other_libraries_too(tiny, trajectories, tmp_path, capsys, monkeypatch):
    """Stand-ins for tensorboard and wandb note what they are given."""
    given = []

    class Writer:
        def __init__(self, folder, purge_step):
            assert (folder, purge_step) == (tmp_path / "tensorboard" / "tensorboard", None)

        def add_scalar(self, name, value, step):
            given.append((name, value, step))

        def flush(self):
            pass

    wandb = SimpleNamespace(init=lambda **settings: given.append(settings["config"]["lr"]))
    wandb.log = lambda line, step: given.append((line["loss"], step))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    losses = {}
    for log in ("tensorboard", "wandb"):
        given.clear()
        run_train(capsys, model=tiny, data=trajectories, out=tmp_path / log, log=log, epochs=1)
        losses[log] = list(given)
    lines = metrics(tmp_path / "wandb")
    assert losses["wandb"] == [TRAIN["lr"]] + [(line["loss"], line["step"]) for line in lines]
    for line in lines:
        assert ("loss", line["loss"], line["step"]) in losses["tensorboard"]


def test_wrong_answers_that_are_trained_on_are_named(tiny, trajectories, tmp_path, capsys):
    options = dict(TRAIN, epochs=1, model=tiny, data=trajectories, out=tmp_path / "R")
    err = run(capsys, "train", **options)[1]
    assert "12 of 12 trajectories are wrong and are trained on: --keep correct leaves them out" in err


def test_a_log_library_that_is_missing_is_one_line(tiny, trajectories, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    fails(capsys, "wandb", "train", model=tiny, data=trajectories, out=tmp_path / "R", log="wandb", **TRAIN)
