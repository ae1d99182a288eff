"""The check command: what passes, what fails, what is skipped, and that it says so.

python -m pytest tests/test_check.py"""

import math
import warnings
from pathlib import Path

import pytest
import torch
from helpers import ROOT, fails, flags, last_json, run

import decode
import lora
import model
import objectives
import tabom
from runs import torchrun
from tools import check, checks

CPU = torch.device("cpu")


def rows(result, name):
    return [row for row in result["rows"] if row["check"] == name]


def test_every_check_is_in_the_docs():
    text = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    for name in check.CHECKS:
        assert f"\n| {name} | " in text, name


def test_what_a_cpu_can_check_passes(capsys):
    only = "environment,logits,attention,batches,losses,waits"
    result, _ = run(capsys, "check", only=only, device="cpu")
    assert result["device"] == "cpu" and result["failed"] == 0
    assert result["passed"] + result["skipped"] + result["shown"] == len(result["rows"]) > 50
    assert [row["reason"] for row in result["rows"] if row["verdict"] == "skipped"] == [
        "the other objectives are compared with the CPU, and this is it",
        "torch counts waits on CUDA alone; on a CPU tests/test_device.py counts them",
    ]
    kernels = [row["ours"] for row in rows(result, "attention") if row["name"].endswith("kernel")]
    assert len(kernels) == 5 and all(kernels)
    for row in rows(result, "logits"):
        assert (row["ours"] if row["off"] is None else row["off"]) <= row["limit"] and row["reference"] > 0


@pytest.mark.parametrize("name", ["decoding", "training"])
def test_the_longer_checks_pass_too(capsys, name):
    result, _ = run(capsys, "check", only=name, device="cpu")
    assert (result["failed"], result["skipped"]) == (0, 0) and result["passed"] == len(result["rows"]) > 2
    assert all(row["limit"] == 0 for row in result["rows"])  # not a bit may differ


def test_a_wrong_network_fails(capsys, monkeypatch):
    """And the result is there nevertheless, with the status 1."""
    monkeypatch.setattr(model, "rotate", lambda x, cos, sin: x)
    assert tabom.main(["check", "--only", "logits,environment"]) == 1
    printed = capsys.readouterr().out
    result = last_json(printed)
    assert result["failed"] > 10
    assert {row["verdict"] for row in rows(result, "environment")} <= {"passed", "shown"}
    assert printed.count("| failed |\n") == result["failed"]


def test_wrong_tokens_fail(monkeypatch):
    monkeypatch.setattr(decode.LLaDA, "share", lambda self, i, count: count.clamp(max=2))
    failed = [row.name for row in checks.decoding(CPU) if not row.passed]
    assert failed and all(name.startswith(("llada", "sdar")) for name in failed)


def test_a_check_that_breaks_is_a_failed_row(capsys, monkeypatch):
    def broken(c, processes):
        yield checks.Row("first", 1)
        raise RuntimeError("no kernel image\nis available")

    monkeypatch.delenv("TABOM_DEBUG", raising=False)
    monkeypatch.setitem(check.CHECKS, "logits", broken)
    assert tabom.main(["check", "--only", "logits,environment"]) == 1
    result = last_json(capsys.readouterr().out)
    assert [(row["verdict"], row["reason"]) for row in rows(result, "logits")] == [
        ("shown", ""),
        ("failed", "RuntimeError no kernel image is available"),
    ]
    assert len(rows(result, "environment")) >= 4


def test_without_a_clone_what_needs_its_files_is_skipped(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(checks, "GOLDEN", tmp_path / "golden")
    monkeypatch.setattr(check, "TINY", tmp_path / "tiny")
    only = "logits,decoding,batches,losses,compile,training,processes"
    result, _ = run(capsys, "check", only=only, device="cpu")
    assert (result["passed"], result["failed"], result["skipped"]) == (0, 0, 7)
    assert all("comes with a clone" in row["reason"] or "come with a clone" in row["reason"] for row in result["rows"])


def test_several_processes_need_several_gpus(monkeypatch):
    processes = torchrun.Processes("cpu")
    for device, reason in (("cuda", "one GPU is visible"), ("mps", "cannot share mps")):
        processes.device = torch.device(device)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        with pytest.raises(checks.Skip, match=reason):
            list(check.processes_together(None, processes))


def test_bad_options_are_one_line(capsys):
    fails(capsys, "--only nothing: there are environment, logits, ", "check", only="logits,nothing")
    fails(capsys, "--adapter is checked on its base: give --model", "check", adapter="out/A")


# ------------------------------------------------------------------------------------------------------------- the rows


def test_what_passes():
    assert checks.equal("a", 1.0, 1.5, 0.5).passed and not checks.equal("a", 1.0, 1.6, 0.5).passed
    row = checks.equal("a", torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5]), 0.4)
    assert (row.off, row.passed) == (0.5, False) and row.ours == pytest.approx(math.sqrt(12.5))
    assert not checks.equal("a", torch.tensor([math.nan]), torch.tensor([1.0]), 9.0).passed
    assert checks.same("a", torch.tensor([1, 2]), torch.tensor([1, 2])).passed
    assert not checks.same("a", torch.tensor([1, 2]), torch.tensor([1, 3])).passed
    assert checks.Row("a", 3, limit=3).passed and not checks.Row("a", 4, limit=3).passed
    assert checks.Row("a", "a text").passed
    assert [check.finite(x) for x in (math.nan, math.inf, 1.0, "x", None)] == [None, None, 1.0, "x", None]


@pytest.mark.parametrize("name", objectives.OBJECTIVES)
@pytest.mark.parametrize("family", ["llada", "sdar"])
def test_every_objective_has_a_loss_and_a_gradient_to_compare(family, name):
    golden = checks.Golden(family)
    loss, gradient = checks.loss_and_gradient(*checks.trainable(golden, CPU), name)
    again, twice = checks.loss_and_gradient(*checks.trainable(golden, CPU), name)
    assert math.isfinite(loss) and gradient.abs().max() > 1e-6
    assert loss == again and torch.equal(gradient, twice)


def test_waits_are_counted_by_torchs_warnings(monkeypatch):
    """The first step is left out: caches and shapes are new there."""
    modes, advance = [], decode.Run.advance

    def waiting(self):
        for _ in range(3):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        return advance(self)

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    monkeypatch.setattr(decode.Run, "advance", waiting)
    found = checks.waits_of_steps(checks.Golden("dream"), CPU, 2)
    assert found == [3] * len(found) and len(found) > 10
    assert modes == ["warn", "default"]


def test_speed_is_measured(monkeypatch):
    monkeypatch.setattr(checks.speed, "SIZES", {"b": dict(llada=1100, dream=1100)})
    monkeypatch.setattr(checks.speed, "LAYERS", 1)
    found = list(checks.speeds(CPU))
    assert [row.name.split(",")[0] for row in found] == ["decode", "decode", "train", "train"]
    assert all(row.ours >= 0 and row.limit is None for row in found)


# ------------------------------------------------------------------------------------------------------- a user's model


def test_a_model_of_ones_own(bytes_model, tmp_path, capsys):
    lora.save(lora.inject(model.load(bytes_model), rank=2), tmp_path / "A")
    result, _ = run(capsys, "check", only="own", model=bytes_model, adapter=tmp_path / "A", device="cpu")
    found = {row["name"]: row["ours"] for row in rows(result, "own")}
    assert result["failed"] == 0
    assert found["family, parameters"].startswith("llada, ")
    assert all(found[prompt].startswith(("'", '"')) for prompt in check.PROMPTS)
    estimates = [name for name in found if name.startswith("a full run, estimated: ")]
    assert any("distillation on 8 GPUs" in name for name in estimates)
    assert any("memory: weights" in name for name in estimates)


def test_a_model_that_does_not_load_is_a_failed_row(capsys, tmp_path, monkeypatch):
    monkeypatch.delenv("TABOM_DEBUG", raising=False)
    assert tabom.main(["check", *flags(only="own", model=tmp_path / "none", device="cpu")]) == 1
    (row,) = last_json(capsys.readouterr().out)["rows"]
    assert row["verdict"] == "failed" and str(tmp_path / "none") in row["reason"]


# ------------------------------------------------------------------------------------------------------------ processes


@pytest.mark.slow
def test_processes_together(tmp_path):
    """On a CPU, what the command itself leaves to GPUs too."""
    processes, folder = torchrun.Processes("cpu", alone=True), Path(tmp_path)
    with pytest.raises(checks.Skip):
        for row in check.processes_together(None, processes):
            assert row.passed and row.reference > 0
    assert check.distilled(processes, folder) == 6
    alone = check.trained(processes, folder, "1", epochs=2)["loss"]
    spread = check.trained(processes, folder, "2", count=2, epochs=2, shard=True)["loss"]
    assert spread == pytest.approx(alone, abs=1e-6)
    assert 0 < check.seconds_to_the_end(processes, folder) < check.ENDS


@pytest.mark.slow
def test_compiled(capsys):
    result, _ = run(capsys, "check", only="compile", device="cpu")
    assert result["failed"] == 0
