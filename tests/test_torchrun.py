"""How processes begin and end: what a GPU would be asked for, and that all end after one fails.

python -m pytest tests/test_torchrun.py"""

import sys

import pytest
import torch
from helpers import HUNG, start

from runs import torchrun


@pytest.fixture
def asked(monkeypatch):
    """What the second of two processes of a node asks of torch, on a machine that seems to have GPUs."""
    found = {}
    for name, value in dict(RANK=1, WORLD_SIZE=2, LOCAL_RANK=1, MASTER_ADDR="localhost").items():
        monkeypatch.setenv(name, str(value))
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, device: empty(*size))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: found.update(set_device=str(device)))
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", lambda on: found.update(cudnn=on))
    monkeypatch.setattr(
        torchrun.dist, "init_process_group", lambda backend, **more: found.update(backend=backend, **more)
    )
    return found


@pytest.mark.parametrize("visible, card", [(8, "cuda:1"), (1, "cuda:0")])
@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_the_gpu_of_a_process(asked, monkeypatch, device, visible, card):
    """SLURM may let each process see its own GPU alone, which is cuda:0 whatever its LOCAL_RANK."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    processes = torchrun.Processes(device)
    assert str(processes.device) == asked["set_device"] == card
    assert asked["backend"] == "cpu:gloo,cuda:nccl"  # objects and barriers do not go over the GPU
    assert asked["device_id"] == processes.device
    assert asked["cudnn"] is False  # its attention makes a plan for each shape
    assert asked["timeout"].total_seconds() == 2 * 3600


def test_without_a_gpu_the_processes_speak_gloo(asked):
    assert torchrun.Processes("cpu").device.type == "cpu"
    assert asked.keys() == {"backend", "timeout"} and asked["backend"] == "gloo"


def test_numbers_and_barriers_stay_on_the_host(asked, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    summed = []
    monkeypatch.setattr(
        torchrun.dist, "all_reduce", lambda tensor: summed.append((tensor.device.type, tensor.tolist()))
    )
    monkeypatch.setattr(torchrun.dist, "barrier", lambda *a, **k: pytest.fail("torch's barrier waits for the GPU"))
    processes = torchrun.Processes("cuda")
    assert processes.sum([1.0, 2.5]) == [1.0, 2.5]
    processes.barrier()
    assert summed == [("cpu", [1.0, 2.5]), ("cpu", [0.0])]


@pytest.mark.parametrize("status", [0, 1, 130])
def test_groups_are_taken_down_after_a_success_alone(monkeypatch, status):
    """After an error others may wait in a collective, and under NCCL taking the group down would wait with them."""
    done = []
    monkeypatch.setattr(torchrun.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(torchrun.dist, "destroy_process_group", lambda: done.append("destroyed"))
    monkeypatch.setattr(torchrun.atexit, "_run_exitfuncs", lambda: done.append("registered"))
    monkeypatch.setattr(torchrun.os, "_exit", lambda status: done.append(status))
    torchrun.leave(status)
    assert done == ["destroyed"] * (status == 0) + ["registered", status]


def test_a_process_alone_leaves_as_any_other():
    with pytest.raises(SystemExit) as found:
        torchrun.leave(3)
    assert found.value.code == 3


FAILS = """
import os, signal, sys
from runs import torchrun
signal.signal(signal.SIGTERM, signal.SIG_IGN)  # only what the group itself does ends the other process
processes = torchrun.Processes("cpu")
try:
    processes.barrier()
    if processes.index == int(sys.argv[1]):
        raise ValueError("a bad thing")
    processes.gather(["never"])
    status = 0
except (ValueError, RuntimeError) as e:
    status = torchrun.tell(e)
torchrun.leave(status)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="torchrun")
@pytest.mark.parametrize("process", ["0", "1"])
def test_all_end_after_one_has_failed(tmp_path, process):
    program = tmp_path / "program.py"
    program.write_text(FAILS)
    running = start(process, program=program, processes=2)
    out, err = running.communicate(timeout=HUNG)
    assert running.returncode != 0 and out == ""
    assert [line for line in err.splitlines() if line.startswith("error: ")] == ["error: a bad thing"]
