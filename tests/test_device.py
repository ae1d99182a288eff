"""How often the host waits for the device, and that nothing mixes the two: python -m pytest tests/test_device.py

Two recorders count. tests/waits.py is a device made of Python, which is always there. fakegpu makes torch believe in
CUDA, so that it also takes a GPU's branches; it lies beside TABOM_DATA and needs g++, and its tests skip without."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import FOLDER, HUNG, ROOT, TRAIN, flags, last_json, start
from waits import DEVICE, Recorder

import data
import decode
import model
import objectives
import train
from runs import loading, queue, torchrun

# The most that a decoding step on fakegpu, a micro-batch of training and a step of a replay take: (waits, copies).
STEP, BATCH, REPLAY = (4, 4), (3, 8), (2, 2)


def within(found, limit, name):
    """waits and copies are within a limit."""
    assert found[0] <= limit[0] and found[1] <= limit[1], f"{name}: waits, copies {found}, at most {limit}"


# ------------------------------------------------------------------------------------------------- the recorder itself


def test_what_is_counted():
    with Recorder() as r:
        x = r.put(torch.arange(6.0))
        assert (float(x.sum()), x.tolist(), bool((x > 4).any())) == (15.0, [0, 1, 2, 3, 4, 5], True)
        assert (r.waits, r.copies) == (3, 0)
        assert x[x > 3].cpu().tolist() == [4, 5]  # the size of the result, and the result
        assert (r.waits, r.copies) == (5, 0)
        y = torch.zeros(2, 3, device=x.device)
        y[torch.tensor([1]), torch.tensor([2])] = 7.0
        y += torch.tensor([1.0, 2.0, 3.0], device=y.device) + torch.tensor(1.0)
        assert (r.waits, r.copies) == (5, 3)
        assert y.cpu().tolist() == [[2, 3, 4], [2, 3, 11]]
        with pytest.raises(RuntimeError, match="beside the device's"):
            x + torch.arange(6.0)
        with pytest.raises(RuntimeError, match="for a tensor of the CPU"):
            torch.arange(6.0)[x.long()]
        r.reset()
        assert (r.waits, r.copies, dict(r.places)) == (0, 0, {})
    assert torch.tensor([1]).tolist() == [1]


def test_a_model_computes_the_same_there(golden):
    ids, m = golden.expected["logits.ids"], golden.load()
    expected = m(ids)
    with Recorder() as r, torch.no_grad():
        found = r.model(m)(r.put(ids))
        assert (r.waits, r.copies) == (0, 0)
        torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=1e-4)


# ------------------------------------------------------------------------------------------------------------ decoding

NUCLEUS = dict(strategy="entropy", temperature=0.1, top_p=0.9)
LLADA = dict(strategy="confidence", schedule="llada", block_length=32)
IN_BLOCKS = dict(strategy="confidence", block_length=4, stop=[7])
DECODERS = {  # name -> (family, rows at a time, the most waits and copies of a step, settings)
    "llada": ("llada", 1, (1, 2), dict(LLADA, max_new_tokens=64)),
    "llada, 16 rows": ("llada", 16, (1, 2), dict(LLADA, max_new_tokens=64)),
    "llada, threshold": ("llada", 16, (2, 2), dict(LLADA, max_new_tokens=64, threshold=0.9)),
    "llada, credit": ("llada", 16, (1, 3), dict(LLADA, schedule="credit", max_new_tokens=64)),
    "dream": ("dream", 1, (2.5, 2), dict(NUCLEUS, max_new_tokens=64)),
    "dream, 16 rows": ("dream", 16, (2.5, 2), dict(NUCLEUS, max_new_tokens=64)),
    "sdar, 16 rows": ("sdar", 16, (2.5, 4), dict(IN_BLOCKS, schedule="sdar", max_new_tokens=24)),
    "sdar, threshold": ("sdar", 16, (3, 4), dict(IN_BLOCKS, schedule="sdar", max_new_tokens=24, threshold=0.9)),
    "a2d, 16 rows": ("a2d", 16, (2.5, 4), dict(IN_BLOCKS, schedule="a2d", max_new_tokens=24)),
}
REAL = 152064  # ids of Dream's vocabulary: parts are as many as there


@pytest.mark.parametrize("name", DECODERS)
def test_the_waits_of_a_decoding_step(name, monkeypatch):
    family, B, limit, how = DECODERS[name]
    m, at = model.load(FOLDER / f"{family}-tiny"), []
    if "stop" in how:
        m.config.block_length = how["block_length"]
    monkeypatch.setattr(decode, "HELD", decode.HELD * m.config.vocab_size // REAL)
    with Recorder() as r:
        r.model(m)
        prompts = [r.put(torch.arange(5 + i % 3)) for i in range(B)]
        suppress = [m.config.mask_id, 1]
        for _ in queue.stream(
            m, prompts, B, on_step=lambda *_: at.append((r.waits, r.copies)), suppress=suppress, **how
        ):
            pass
    assert len(at) > 8
    found = tuple(round((at[-1][kind] - at[1][kind]) / (len(at) - 2), 2) for kind in (0, 1))
    within(found, limit, name)


# ------------------------------------------------------------------------------------------------------------ training


# ideal makes a pass for each token, and each has a wait
@pytest.mark.parametrize("name", [name for name in objectives.OBJECTIVES if name != "ideal"])
def test_the_waits_of_a_micro_batch(tiny, trajectories, tmp_path, name):
    """Of an optimizer step in four micro-batches, less one in two: what each costs."""
    counts = []
    for size in (2, 4):
        options = dict(model=str(tiny), data=str(trajectories), keep="all", objective=name, global_batch=8)
        c = train.TrainOptions(**options, batch_size=size, out=str(tmp_path / str(size)))
        processes = torchrun.Processes("cpu", alone=True)
        loaded = loading.load_model(c, processes)
        with Recorder() as r:
            r.model(loaded.m)
            processes.device = DEVICE
            run = train.prepare(c, processes, loaded)
            chosen = run.records[:8]
            r.reset()
            train.train_step(run, 0, 0, chosen)
            counts.append((r.waits, r.copies))
        processes.unlock()
    found = tuple((four - two) / 2 for four, two in zip(*counts))
    within(found, BATCH, name)


@pytest.mark.parametrize("family", ["llada", "sdar"])
def test_the_waits_of_a_replay(family):
    m, g = model.load(FOLDER / f"{family}-tiny"), torch.Generator().manual_seed(0)
    records = []
    for N in (24, 24, 20):
        order = torch.randperm(N, generator=g).tolist()
        records.append(dict(prompt_ids=[1, 2, 3], response_ids=list(range(N)), order=order))
    batch = data.collate(records, m.config.pad_id)
    with Recorder() as r, torch.no_grad():
        r.model(m)
        objectives.replay(m, {name: r.put(x) for name, x in batch.items()})
        within((r.waits / 24, r.copies / 24), REPLAY, f"replay, {family}")


# ------------------------------------------------------------------------------------------------------------- fakegpu

FAKEGPU = Path(os.environ.get("TABOM_DATA", "no-such-folder")).parent / "fakegpu"
# Runs a program of fakegpu, which knows some things by the names of other modules. It leaves without taking the
# interpreter down: once the process aborted there ("terminate called without an active exception"), its work done.
CHILD = """
import os, runpy, sys
from pathlib import Path

program, root = sys.argv[1:3]
sys.path[:0] = [str(Path(program).parent), root]
import fakegpu  # before torch
import baselines, decode, lora, objectives, runs
from baselines import measures
from runs import queue, torchrun

decode.stream, decode.BLOCKWISE = queue.stream, ("sdar", "a2d")
lora.Reference, runs.leave = baselines.Reference, torchrun.leave
class Called(objectives.Objective):
    def __call__(self, *arguments, **more):
        return self.loss(*arguments, **more)


objectives.OBJECTIVES.update({name: Called(*entry) for name, entry in objectives.OBJECTIVES.items()})
for name in set(vars(measures)) - set(vars(objectives)):
    setattr(objectives, name, getattr(measures, name))
sys.argv[:] = [program, root, *sys.argv[3:]]
status = 0
try:
    runpy.run_path(program, run_name="__main__")
except SystemExit as e:
    status = e.code
sys.stdout.flush()
os._exit(status or 0)
"""


def on_fakegpu(tmp_path, program, *words):
    """What a program of fakegpu prints about this project."""
    if not (FAKEGPU / program).is_file() or shutil.which("g++") is None:
        pytest.skip("fakegpu beside TABOM_DATA, and g++")
    (tmp_path / "child.py").write_text(CHILD)
    command = [sys.executable, tmp_path / "child.py", FAKEGPU / program, ROOT, *words]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=env, timeout=HUNG)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def all_within(text, pattern, count, limit):
    """Each of so many lines (name, waits, copies) that a program prints is within a limit."""
    found = re.findall(pattern, text, re.MULTILINE)
    assert len(found) == count
    for name, waits, copies in found:
        within((float(waits), float(copies)), limit, name)


@pytest.mark.slow
def test_the_waits_of_a_decoding_step_on_fakegpu(tmp_path):
    text = on_fakegpu(tmp_path, "counts.py")
    # A row that ends in the few steps that it counts costs a copy more
    all_within(text, r"^## (.*): per step: ([\d.]+) sync, ([\d.]+) h2d", 9, (STEP[0], STEP[1] + 0.5))


@pytest.mark.slow
def test_the_waits_of_training_on_fakegpu(tmp_path):
    text = on_fakegpu(tmp_path, "train_counts.py")
    all_within(text, r"^## (\w+): forward (\d+) sync (\d+) h2d", 5, BATCH)
    (table,) = re.findall(r"^## replay, 48 steps\n(.*?)^##", text, re.MULTILINE | re.DOTALL)
    waits, copies = (sum(map(float, re.findall(rf"([\d.]+)  {kind} ", table))) / 48 for kind in ("sync", "h2d"))
    assert waits > 0
    within((waits, copies), REPLAY, "replay")


@pytest.mark.slow
@pytest.mark.parametrize("section", ["forward", "lora"])  # "decoding" and "objectives" take minutes
def test_nothing_mixes_devices_on_fakegpu(tmp_path, section):
    """Every path on "cuda:0" against the CPU; what CUDA would refuse is an error there."""
    assert re.search(r"^[1-9]\d* agree, 0 do not$", on_fakegpu(tmp_path, "paths.py", section), re.MULTILINE)


@pytest.mark.slow
def test_only_gradients_go_from_gpu_to_gpu(tiny, trajectories, tmp_path):
    """two.py says what one of two processes asks of torch.distributed: where, and with what."""
    if not (FAKEGPU / "two.py").is_file() or shutil.which("g++") is None:
        pytest.skip("fakegpu beside TABOM_DATA, and g++")
    (tmp_path / "child.py").write_text(CHILD)
    words = ["train", *flags(model=tiny, data=trajectories, out=tmp_path / "R", device="cuda", **TRAIN)]
    running = start(FAKEGPU / "two.py", ROOT, *words, program=tmp_path / "child.py", processes=2)
    out, err = running.communicate(timeout=HUNG)
    assert running.returncode == 0, err[-3000:]
    assert "('init_process_group', 'cpu:gloo,cuda:nccl', {'device_id': device(type='cuda', index=1)}" in err
    reduced = re.findall(r"^\('all_reduce', \((\d+),\), '[\w.]+', '([\w:]+)', '(\w+)", err, re.MULTILINE)
    assert {device for _, device, _ in reduced} == {"cpu", "cuda:1"}
    assert all((device == "cuda:1") == (file == "train") for _, device, file in reduced)
    assert "('barrier'" not in err


CHECKS_ON_FAKEGPU = """
import os, sys

sys.path[:0] = sys.argv[1:3]
import fakegpu  # before torch
import tabom

with fakegpu.Watch(sys.argv[2]):
    status = tabom.main(["check", "--device", "cuda", "--only", "logits,batches,training"])
sys.stdout.flush()
os._exit(status)
"""


@pytest.mark.slow
def test_the_check_command_on_fakegpu(tmp_path):
    """What it compares is equal there, and none of its own lines mixes devices."""
    if not FAKEGPU.is_dir() or shutil.which("g++") is None:
        pytest.skip("fakegpu beside TABOM_DATA, and g++")
    command = [sys.executable, "-c", CHECKS_ON_FAKEGPU, str(FAKEGPU), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HUNG)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    result = last_json(done.stdout)
    assert (result["device"], result["failed"], result["skipped"]) == ("cuda:0", 0, 0) and result["passed"] > 20
