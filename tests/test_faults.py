"""Runs that are killed, stopped, damaged or started twice: python -m pytest tests/test_faults.py"""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, flags, last_json, shell

import data
import runs
import tabom

TRAIN = dict(keep="all", window=8, epochs=3, global_batch=4, batch_size=4, lr=1e-2, warmup=2)
FILES = ("adapter_model.safetensors", "optimizer.safetensors", "trainer.json", "adapter_config.json")


def start(*words):
    """tabom.py in a process that a test may kill."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tabom.py"), *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def untimed(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in lines]


@pytest.fixture(scope="module")
def whole(tiny, trajectories, tmp_path_factory):
    """A run of 9 steps that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole") / "R"
    assert tabom.main(["train", *flags(model=tiny, data=trajectories, out=out, **TRAIN)]) == 0
    return out


def same(out, whole):
    for file in FILES:
        assert (out / "epoch-3" / file).read_bytes() == (whole / "epoch-3" / file).read_bytes(), file
    assert untimed(out) == untimed(whole)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_training_killed_at_any_moment_ends_bit_equal(tiny, trajectories, whole, tmp_path, seed):
    chance, out = random.Random(seed), tmp_path / "R"
    words = ["train", *flags(model=tiny, data=trajectories, out=out, save_every=chance.choice([1, 2]), **TRAIN)]
    process = start(*words)
    while process.poll() is None and not (out / "metrics.jsonl").is_file():
        time.sleep(0.02)
    time.sleep(chance.uniform(0, 1.0))
    process.kill()
    process.communicate()
    assert tabom.main(words) == 0
    same(out, whole)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_writes_a_checkpoint_before_the_process_leaves(tiny, trajectories, whole, tmp_path, number):
    out = tmp_path / "R"
    words = ["train", *flags(model=tiny, data=trajectories, out=out, **TRAIN)]
    process = start(*words)
    while process.poll() is None and not ((out / "metrics.jsonl").is_file() and untimed(out)):
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "the same command continues" in errors
    done = len(untimed(out))
    assert done < 9 and runs.checkpoints(out)[-1][0] == done  # not a step is lost
    assert tabom.main(words) == 0
    same(out, whole)


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest"])
def test_a_damaged_checkpoint_is_skipped(tiny, trajectories, whole, tmp_path, capsys, damage):
    out = tmp_path / "R"
    words = ["train", *flags(model=tiny, data=trajectories, out=out, **TRAIN)]
    assert tabom.main(words) == 0
    file = out / "epoch-3" / ("manifest.json" if damage == "manifest" else "optimizer.safetensors")
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
    file.write_bytes(content[: len(content) // 2] if damage in ("truncate", "manifest") else content)
    if damage == "remove":
        file.unlink()
    assert runs.last_checkpoint(out) == out / "epoch-2"
    assert tabom.main(words) == 0
    assert f"{out / 'epoch-3'} is damaged" in capsys.readouterr().err
    same(out, whole)


def test_only_the_last_checkpoints_between_epochs_are_kept(tiny, trajectories, whole, tmp_path):
    out = tmp_path / "R"
    options = dict(model=tiny, data=trajectories, out=out, save_every=1, keep_last=2)
    assert tabom.main(["train", *flags(**options, **TRAIN)]) == 0
    names = sorted(p.name for p in out.iterdir() if p.is_dir())
    assert names == ["epoch-1", "epoch-2", "epoch-3", "step-7", "step-8"]
    same(out, whole)


def test_a_second_process_in_the_same_folder_is_refused(tiny, puzzles, tmp_path):
    out = tmp_path / "T"
    words = ["distill", *flags(model=tiny, data=puzzles, out=out, check="exact", batch_size=1)]
    first = start(*words)
    while first.poll() is None and not (out / "meta.json").is_file():
        time.sleep(0.01)
    second = shell(*words)
    alive = first.poll() is None
    first.communicate(timeout=120)
    assert first.returncode == 0 and len(data.read_trajectories(out)) == 12
    if alive or second.returncode:  # else the first was done before the second began
        assert second.returncode == 1 and "another process is writing into" in second.stderr


def test_a_step_that_is_not_finite_is_dropped_on_demand(tiny, trajectories, tmp_path, capsys):
    options = dict(model=tiny, data=trajectories, out=tmp_path / "R", skip_nonfinite=True)
    assert tabom.main(["train", *flags(**options, **{**TRAIN, "epochs": 1, "weight": 1e38, "margin": 1e38})]) == 0
    captured = capsys.readouterr()
    assert captured.err.count("the step is dropped") == 3
    assert last_json(captured.out)["loss"] is None  # JSON has no infinity
    assert all(line["loss"] is None for line in untimed(tmp_path / "R"))
