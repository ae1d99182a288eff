"""Logs besides metrics.jsonl go on where a run continues. Stand-ins note what they are given.

python -m pytest tests/test_logs.py"""

import sys
from types import SimpleNamespace

import pytest

from runs import logs


def test_tensorboard_shows_no_step_twice(tmp_path, monkeypatch):
    started, lines = [], []
    writer = SimpleNamespace(add_scalar=lambda *line: lines.append(line), flush=lambda: None)

    def make(folder, purge_step):
        started.append((folder, purge_step))
        return writer

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=make))
    logs.opened("tensorboard", tmp_path, {})(dict(step=1, loss=0.5, sample="a text"))
    logs.opened("tensorboard", tmp_path, {}, done=15)(dict(step=16, loss=0.25))
    # All from step 16 on is forgotten: it was logged by a run that was killed behind its last checkpoint.
    assert started == [(tmp_path / "tensorboard", None), (tmp_path / "tensorboard", 16)]
    (tmp_path / "tensorboard").mkdir()  # by a run that was killed before its first checkpoint
    logs.opened("tensorboard", tmp_path, {})
    assert started[-1] == (tmp_path / "tensorboard", 1)
    assert lines == [("step", 1, 1), ("loss", 0.5, 1), ("step", 16, 16), ("loss", 0.25, 16)]


def test_wandb_continues_the_same_run(tmp_path, monkeypatch):
    started, lines = [], []
    wandb = SimpleNamespace(init=lambda **more: started.append(more), log=lambda line, step: lines.append((line, step)))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for done in (0, 15):
        logs.opened("wandb", tmp_path, dict(lr=0.1), done)(dict(step=done + 1))
    first, second = started
    assert first == second
    assert first["resume"] == "allow" and len(first["id"]) == 8 and first["config"] == dict(lr=0.1)
    assert [step for _, step in lines] == [1, 16]
    other = tmp_path / "other"
    other.mkdir()
    logs.opened("wandb", other, {})
    assert started[2]["id"] != first["id"]


def test_no_log_takes_everything():
    logs.check(None)
    assert logs.opened(None, None, {})(dict(step=1)) is None


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match="--log wandb needs a package that is not here: pip install wandb"):
        logs.check("wandb")
