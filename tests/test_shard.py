"""A model spread over processes trains as a whole one does. python -m pytest -m slow tests/test_shard.py"""

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from helpers import HUNG, fails, flags, interpreter, meta, metrics, run, run_train, shell, start, wait_for
from safetensors.torch import load_file, save_file

import model
from experiments import cost
from runs import resume, shard

# Three steps an epoch of 12 records: the last global batch has two, which leaves some of four processes without any.
OPTIONS = dict(keep="all", window=8, epochs=2, global_batch=5, batch_size=2, warmup=2, lr=2e-5, held_out=0)
ALL_WEIGHTS = dict(OPTIONS, lora_rank=0)
T3D = dict(ALL_WEIGHTS, objective="t3d", reference_steps=2, beta=5)


def train(out, processes, **options):
    done = shell("train", *flags(out=out, **options), processes=processes)
    assert done.returncode == 0, done.stderr
    return done


def model_file(checkpoint):
    """The weights that were trained: of the whole model, or of its adapter."""
    names = ("model.safetensors", "adapter_model.safetensors")
    (file,) = [checkpoint / name for name in names if (checkpoint / name).is_file()]
    return file


def assert_close(out, other, tolerance=1e-6, steps=slice(None)):
    for line, expected in zip(metrics(out)[steps], metrics(other)[steps], strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], abs=tolerance)
        assert line["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
    last = f"epoch-{metrics(other)[-1]['epoch']}"
    found, expected = (load_file(model_file(folder / last)) for folder in (out, other))
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize(
    "processes, options",
    [
        (2, dict(ALL_WEIGHTS, gradient_checkpointing=True)),
        (4, dict(ALL_WEIGHTS, epochs=7)),  # 21 steps
        (4, dict(OPTIONS, epochs=7)),
        (2, dict(OPTIONS, objective="t3d", reference_steps=2, beta=5)),
        (2, T3D),
        (2, dict(ALL_WEIGHTS, objective="dparallel")),
        (2, dict(ALL_WEIGHTS, held_out=3)),
    ],
)
def test_a_spread_model_trains_as_a_whole_one(tiny, trajectories, tmp_path, capsys, processes, options):
    options = dict(options, model=tiny, data=trajectories)
    run_train(capsys, out=tmp_path / "whole", **options)
    train(tmp_path / "R", processes, shard=True, **options)
    assert_close(tmp_path / "R", tmp_path / "whole")
    if options["held_out"]:
        found, expected = metrics(tmp_path / "R")[-1], metrics(tmp_path / "whole")[-1]
        assert found["held_out_loss"] == pytest.approx(expected["held_out_loss"], abs=1e-5)
        assert found["sample"] == expected["sample"]


@pytest.mark.slow
def test_with_dtype_bfloat16_the_weights_stay_float32(tiny, trajectories, tmp_path):
    """And a run does not change what it computes in when it is continued without --shard."""
    options = dict(ALL_WEIGHTS, model=tiny, data=trajectories, out=tmp_path / "R", dtype="bfloat16", stop_after=1)
    train(processes=2, shard=True, **options)
    assert (meta(tmp_path / "R")["dtype"], meta(tmp_path / "R")["compute"]) == ("float32", "bfloat16")
    weights = load_file(tmp_path / "R" / "epoch-1" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    start = load_file(tiny / "model.safetensors")
    moved = max((weights[name] - start[name]).abs().max() for name in weights)
    assert 0 < moved < 1e-3  # less than bfloat16 can tell apart near the largest weights
    done = shell("train", *flags(**options))
    assert done.returncode == 1 and "compute was 'bfloat16' and is now None" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "options, count",
    [(T3D, 3), (dict(OPTIONS, lora_dropout=0.1), 2)],  # all weights: a file of state for each process
    ids=["all weights", "an adapter"],
)
def test_a_killed_run_continues_bit_for_bit(tiny, trajectories, tmp_path, options, count):
    once, again = tmp_path / "once", tmp_path / "again"
    options = dict(options, model=tiny, data=trajectories, shard=True, save_every=1, keep_last=9)
    train(once, 2, **options)
    process = start("train", *flags(out=again, **options), processes=2)
    wait_for(process, lambda: (again / "step-2" / "manifest.json").is_file())
    for number in list(processes_of(again)):
        os.kill(number, signal.SIGKILL)
    process.communicate(timeout=HUNG)
    train(again, 2, **options)
    assert metrics(again) == metrics(once)
    files = sorted(file.relative_to(once) for file in (once / "epoch-2").rglob("*.safetensors"))
    assert len(files) == count
    for file in files:
        expected, found = load_file(once / file), load_file(again / file)
        assert found.keys() == expected.keys()
        for name, tensor in found.items():  # torch writes them in any order
            assert torch.equal(tensor, expected[name])


def processes_of(out):
    """The numbers of the processes that train into a folder."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words, environment = (folder / "cmdline").read_bytes(), (folder / "environ").read_bytes()
        except OSError:
            continue
        if str(out).encode() in words and b"\0RANK=" in environment:
            yield int(folder.name)


@pytest.mark.slow
def test_a_run_continues_on_another_number_of_processes(tiny, trajectories, tmp_path, capsys):
    options = dict(T3D, model=tiny, data=trajectories)
    run_train(capsys, out=tmp_path / "whole", **options)
    train(tmp_path / "four", 4, shard=True, **options)
    for name, processes, more in (("two", 2, dict(shard=True)), ("one", 1, {}), ("back", 2, dict(shard=True))):
        source = tmp_path / ("whole" if name == "back" else "four")
        shutil.copytree(source, tmp_path / name)
        shutil.rmtree(tmp_path / name / "epoch-2")
        train(tmp_path / name, processes, **options, **more)
        assert_close(tmp_path / name, tmp_path / "whole")


@pytest.mark.slow
def test_a_full_disk_leaves_the_checkpoint_before(tiny, trajectories, tmp_path):
    """Of the second epoch's checkpoint nothing fits: each of its files is larger than a file may be by then."""
    out = tmp_path / "R"
    options = dict(ALL_WEIGHTS, model=tiny, data=trajectories, shard=True)
    train(out, 2, **dict(options, stop_after=1))
    process = start("train", *flags(out=out, **options), processes=2, largest_file=300_000)
    _, errors = process.communicate(timeout=HUNG)
    assert process.returncode != 0
    (said,) = (line for line in errors.splitlines() if line.startswith("error: "))
    assert re.search("File too large|I/O error", said)
    assert resume.last_checkpoint(out) == out / "epoch-1" and not (out / "epoch-2").exists()
    train(out, 2, **options)
    assert resume.last_checkpoint(out) == out / "epoch-2"


@pytest.mark.slow
def test_more_processes_than_records(tiny, trajectories, tmp_path, capsys):
    options = dict(ALL_WEIGHTS, model=tiny, data=trajectories, limit=1)
    run_train(capsys, out=tmp_path / "whole", **options)
    train(tmp_path / "R", 2, shard=True, **options)
    assert_close(tmp_path / "R", tmp_path / "whole")


MEMORY = """
import functools, json, sys
import torch
import model
from runs import resume, torchrun, shard
from experiments import speed
processes = torchrun.Processes("cpu")
spread = None
if processes.count > 1:
    spread = functools.partial(shard.spread, device="cpu")
before = speed.resident()
m = model.load(sys.argv[1], spread=spread, fill=shard.fill)
found = processes.gather([speed.peak_resident() - before])
if processes.first:
    print(json.dumps(found))
torchrun.leave(0)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures memory as Linux does")
def test_no_process_holds_the_whole_model_while_it_loads(tmp_path):
    """Prints the most that each process held above what it had before, as docs/speed.md has it."""
    V = 16_000
    raw = dict(cost.LLADA, d_model=768, n_layers=16, n_heads=12, n_kv_heads=12, mlp_hidden_size=2048, vocab_size=V)
    raw.update(embedding_size=V, mask_token_id=1, eos_token_id=2, pad_token_id=2)
    m = model.create(raw)
    size = sum(p.numel() * 4 for p in m.parameters())
    model.save(m, tmp_path / "M")
    (tmp_path / "program.py").write_text(MEMORY)
    peaks = {}
    for processes in (1, 2, 4):
        command, env = interpreter(tmp_path / "program.py", processes)
        done = subprocess.run([*command, str(tmp_path / "M")], capture_output=True, text=True, env=env, timeout=HUNG)
        assert done.returncode == 0, done.stderr
        peaks[processes] = [peak / size for peak in json.loads(done.stdout.splitlines()[-1])]
        print(f"{size / 1e6:.0f} MB, {processes} processes:", " ".join(f"{peak:.2f}" for peak in peaks[processes]))
    largest = max(p.numel() * 4 for p in m.parameters()) / size
    for processes in (2, 4):
        assert max(peaks[processes]) < 1 / processes + largest + 0.15
    assert 1 <= peaks[1][0] < 1 + largest + 0.15


BUSY = """
import atexit
import sys
import torch
import torch.distributed as dist
import model
from runs import resume, torchrun, shard
processes = torchrun.Processes("cpu")
m = shard.spread(model.load(sys.argv[1]))
processes.barrier()
for _ in range(300):
    dist.all_reduce(torch.ones(200_000), async_op=True)
atexit.register(print, "all is sent")
torchrun.leave(0)
"""


@pytest.mark.slow
def test_processes_end_while_their_groups_still_work(tiny, tmp_path):
    """Without torchrun.leave: "terminate called without an active exception", on every run."""
    (tmp_path / "program.py").write_text(BUSY)
    command, env = interpreter(tmp_path / "program.py", 2)
    done = subprocess.run([*command, str(tiny)], capture_output=True, text=True, env=env, timeout=HUNG)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("all is sent") == 2


def test_one_process_alone_says_what_sharding_is_for(tiny, trajectories, tmp_path, capsys):
    options = dict(OPTIONS, model=tiny, data=trajectories)
    _, said = run(capsys, "train", out=tmp_path / "R", shard=True, **options)
    assert "--shard spreads a model over the processes of torchrun, and the only one here holds it whole" in said
    run_train(capsys, out=tmp_path / "whole", **options)
    assert model_file(tmp_path / "R/epoch-2").read_bytes() == model_file(tmp_path / "whole/epoch-2").read_bytes()


@pytest.mark.parametrize("options", [dict(entropy_context="step"), dict(ranking="kl"), dict(objective="ideal")])
def test_objectives_whose_passes_depend_on_the_records_are_refused(tiny, trajectories, tmp_path, capsys, options):
    options = dict(OPTIONS, model=tiny, data=trajectories, out=tmp_path / "R", shard=True, **options)
    fails(capsys, "--shard needs equally many forward passes on all processes", "train", **options)
    assert not (tmp_path / "R").exists()


def test_state_is_stored_and_read_without_other_processes(tmp_path):
    state = dict(zip("abc", itertools.starmap(torch.full, (((3, 2), 1.5), ((), 7.0), ((5,), -1.0)))))
    shard.save(state, tmp_path / "state")
    found = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    shard.load(found, tmp_path / "state")
    for name, tensor in state.items():
        assert torch.equal(found[name], tensor)
    with pytest.raises(OSError, match="nowhere"):
        shard.load(found, tmp_path / "nowhere")


TIED = """
import functools, sys
import torch
import model
from runs import shard, torchrun
processes = torchrun.Processes("cpu")
m = model.load(sys.argv[1], spread=functools.partial(shard.spread, device="cpu"), fill=shard.fill)
assert torch.equal(shard.whole(m.embed.weight), model.load(sys.argv[1]).embed.weight)
print("loaded")
torchrun.leave(0)
"""


@pytest.mark.slow
def test_a_stored_copy_of_a_tied_head_is_compared_part_by_part(tmp_path):
    raw = dict(cost.LLADA, d_model=32, n_layers=1, n_heads=2, mlp_hidden_size=32, vocab_size=33, weight_tying=True)
    m = model.create(raw | dict(mask_token_id=1, eos_token_id=2))
    model.save(m, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors[m.checkpoint_name("head.weight")] = m.embed.weight.detach().clone()
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "program.py").write_text(TIED)
    command, env = interpreter(tmp_path / "program.py", 2)
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, env=env, timeout=HUNG)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("loaded") == 2
