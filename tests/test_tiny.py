"""The tiny model: python -m pytest tests/test_tiny.py"""

import dataclasses
import random
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import data
import decode
import model
import tokenizer
from experiments import puzzles as puzzle_tasks
from experiments import tiny as tiny_model
from runs import loading


def test_the_tiny_model_is_small_and_of_the_configuration_that_retrain_builds():
    m, tok = model.load(tiny_model.TINY), tokenizer.load(tiny_model.TINY)
    assert (tiny_model.TINY / "model.safetensors").stat().st_size < 4e6
    assert m.config.raw == tiny_model.config()
    assert tok.size == m.config.vocab_size == len(tiny_model.vocabulary())
    assert (tok.eos_id, tok.ids[tiny_model.MASK]) == (m.config.eos_id, m.config.mask_id)


def test_the_tiny_model_solves_what_it_was_trained_on():
    """Easy puzzles with few blanks: most are right, whatever the processor's rounding."""
    m, tok = model.load(tiny_model.TINY), tokenizer.load(tiny_model.TINY)
    rng, right = random.Random(3), 0
    for _ in range(10):
        prompt, answer = puzzle_tasks.make(puzzle_tasks.TASKS["latin"], rng, False)
        shown = "".join(a if c == puzzle_tasks.BLANK and rng.random() < 0.6 else c for c, a in zip(prompt[1:], answer))
        settings = loading.decoder_settings(loading.DecodeOptions(), loading.Loaded(m, tok, tiny_model.TINY))
        t = decode.generate(m, torch.tensor([tok.encode("L" + shown)]), **settings)
        right += tok.response_text(t.response[0].tolist()) == answer
    assert right >= 8


def test_the_model_of_the_demo_is_half_trained_and_of_the_configuration_that_retrain_builds():
    m, tok = model.load(tiny_model.TINY5), tokenizer.load(tiny_model.TINY5)
    assert (tiny_model.TINY5 / "model.safetensors").stat().st_size < 1e6
    assert m.config.raw == tiny_model.config(tiny_model.SHORT)
    assert sum(p.numel() for p in m.parameters()) == 167_232
    assert tok.size == m.config.vocab_size == len(tiny_model.vocabulary(tiny_model.SHORT))
    rng, right = random.Random(3), 0
    for _ in range(30):
        prompt, answer = puzzle_tasks.make(puzzle_tasks.TASKS["short-latin"], rng, True)
        settings = loading.decoder_settings(loading.DecodeOptions(), loading.Loaded(m, tok, tiny_model.TINY5))
        t = decode.generate(m, torch.tensor([tok.encode(prompt)]), **settings)
        right += tok.response_text(t.response[0].tolist()) == answer
    assert 6 <= right <= 24  # there is something to gain


def test_the_demo_has_a_command_for_its_base_model(tmp_path, capsys, monkeypatch):
    kind = dataclasses.replace(tiny_model.SHORT, count=64, epochs=3)
    monkeypatch.setattr(tiny_model, "SHORT", kind)
    monkeypatch.setattr(tiny_model, "DEMO_EPOCHS", 2)
    assert tiny_model.main([str(tmp_path), "--demo"]) == 0
    assert '"epoch": 2' in capsys.readouterr().out
    assert {f.name for f in (tmp_path / "tiny").iterdir()} == {f.name for f in tiny_model.TINY5.iterdir()}
    assert not (tmp_path / "run" / "epoch-3").exists()


def test_retrain_builds_a_model_folder(tmp_path):
    result = tiny_model.retrain(tmp_path, kind=dataclasses.replace(tiny_model.WHOLE, count=128, epochs=1))
    folder = Path(result["tiny"])
    assert {f.name for f in folder.iterdir()} == {f.name for f in tiny_model.TINY.iterdir()}
    with (
        safe_open(folder / "model.safetensors", "pt") as ours,
        safe_open(tiny_model.TINY / "model.safetensors", "pt") as tiny,
    ):
        assert set(ours.keys()) == set(tiny.keys())
    assert result["steps"] == 2


def test_the_model_may_be_an_earlier_checkpoint(tmp_path):
    asked = []

    def enough(checkpoint, epoch):
        asked.append((checkpoint.name, (checkpoint / "config.json").is_file(), epoch))
        return epoch == 2

    kind = dataclasses.replace(tiny_model.SHORT, count=64, epochs=4)
    result = tiny_model.retrain(tmp_path, kind=kind, enough=enough)
    assert asked == [("epoch-1", True, 1), ("epoch-2", True, 2)]
    weights = Path(result["tiny"]) / "model.safetensors"
    assert weights.read_bytes() == (tmp_path / "run" / "epoch-2" / "model.safetensors").read_bytes()
    assert result["steps"] == 2 and not (tmp_path / "run" / "epoch-3").exists()
    rows = data.read_trajectories(tmp_path / "pretrain.jsonl")
    tok = tokenizer.load(tmp_path / "start")
    for row in rows:  # every answer is followed by EOS to the budget
        ids = row["response_ids"]
        assert len(ids) == 31 and set(ids[ids.index(tok.eos_id) :]) == {tok.eos_id}
        assert ids.index(tok.eos_id) in (5, 10, 15, 20, 25) and row["order"] == list(range(31))
    assert sum(p.numel() for p in model.load(tmp_path / "tiny").parameters()) == 167_232


def test_the_start_follows_from_the_seed(tmp_path):
    weights = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        tiny_model.write_start(tmp_path / name, seed)
        weights.append((tmp_path / name / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]
    assert weights[0] != weights[2]


def test_a_start_that_is_there_stays_and_a_stranger_is_refused(tmp_path):
    tiny_model.write_start(tmp_path / "start", 0)
    before = (tmp_path / "start" / "model.safetensors").stat().st_mtime_ns
    tiny_model.write_start(tmp_path / "start", 0)
    assert (tmp_path / "start" / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(FileExistsError, match="holds another model.safetensors"):
        tiny_model.write_start(tmp_path / "start", 1)

    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty"):
        tiny_model.write_start(tmp_path / "theirs", 0)
    assert [file.name for file in (tmp_path / "theirs").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("name", ["tiny/notes.txt", "start/config.json", "pretrain.jsonl", "run/notes.txt"])
def test_training_refuses_the_folder_of_a_stranger(name, tmp_path):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("{}")
    with pytest.raises(FileExistsError):
        tiny_model.retrain(tmp_path, kind=dataclasses.replace(tiny_model.WHOLE, count=2, epochs=1))
    assert (tmp_path / name).read_text() == "{}"


def test_the_command_says_what_is_wrong_in_one_line(tmp_path, capsys):
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text("{}")
    assert tiny_model.main([str(tmp_path)]) == 1
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ") and "is there already" in line
    assert captured.out == ""


def test_random_weights_under_a_real_tokenizer(tmp_path, capsys):
    words = ["--tokenizer", str(tiny_model.TINY), "--seed", "3"]
    assert tiny_model.main([str(tmp_path / "random"), *words]) == 0
    m, tok = model.load(tmp_path / "random"), tokenizer.load(tmp_path / "random")
    assert (m.config.family, m.config.mask_id) == ("dream", tok.mask_id)
    assert tok.size <= m.config.vocab_size
    assert tok.template == tokenizer.load(tiny_model.TINY).template
    assert tiny_model.main([str(tmp_path / "random"), *words]) == 1
    assert "is there already" in capsys.readouterr().err
