"""runs/card.py: the README.md of a checkpoint, as the Hub reads it.

python -m pytest tests/test_card.py"""

import fnmatch
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from helpers import ROOT, TRAIN, metrics, run, run_train
from huggingface_hub import ModelCard

import tabom
import train
from runs import card, resume
from runs.options import parse


def card_of(checkpoint):
    return ModelCard((checkpoint / "README.md").read_text(encoding="utf-8"))


def cells(content):
    """{name: value} of the lines of two cells."""
    return dict(re.findall(r"^\| (.+?) \| (.*) \|$", content, re.MULTILINE))


def test_every_checkpoint_of_an_adapter_has_a_card(tiny, trajectories, trained):
    for epoch in (1, 2):
        shown = card_of(trained / f"epoch-{epoch}")
        assert (shown.data.base_model, shown.data.library_name) == (tiny.name, "peft")
        assert shown.data.tags == ["tabom", "masked-diffusion"]
        values = cells(shown.content)
        assert (values["objective"], values["window"], values["examples"]) == ("tabom", "8", "12")
        assert (values["step"], values["epoch"], values["data"]) == (str(3 * epoch), str(epoch), str(trajectories))
        of_epoch = [line for line in metrics(trained) if line["epoch"] == epoch]
        for name in ("loss", "ce", "ranking"):
            assert float(values[name]) == pytest.approx(sum(line[name] for line in of_epoch) / 3, rel=1e-5)
        assert "tokens_per_second" not in shown.content and "sample" not in values


def test_the_command_of_a_card_makes_the_same_run(tiny, trajectories, tmp_path, capsys, monkeypatch):
    given = dict(
        recipe="dream-prm12k", margin=0.3, cut_eos=True, held_out=2, lora_targets="q_proj", weight=0, batch_size=4
    )
    run_train(capsys, model=tiny, data=trajectories, out=tmp_path / "R", **given)
    content = card_of(tmp_path / "R" / "epoch-2").content
    (line,) = re.findall(r"^python tabom.py (train .*)$", content, re.MULTILINE)
    assert " --cut-eos " in line and " --recipe dream-prm12k " in line and " --weight 0.0 " in line
    assert "--batch-size" not in line and "--warmup 2" in line
    assert float(cells(content)["held_out_loss"]) > 0
    words = shlex.split(line)
    words[words.index("RUN")] = str(tmp_path / "again")
    assert tabom.main(words) == 0
    for name in ("README.md", "adapter_model.safetensors"):
        assert (tmp_path / "again/epoch-2" / name).read_bytes() == (tmp_path / "R/epoch-2" / name).read_bytes()


def test_a_continued_run_writes_the_same_card_and_edits_are_no_damage(tiny, trajectories, trained, tmp_path, capsys):
    settings = dict(model=tiny, data=trajectories, out=tmp_path / "R", save_every=2)
    run_train(capsys, **settings, stop_after=1)
    run(capsys, "train", **TRAIN, **settings)
    card_of_run = tmp_path / "R" / "epoch-2" / "README.md"
    assert card_of_run.read_bytes() == (trained / "epoch-2" / "README.md").read_bytes()
    card_of_run.write_text("mine")
    assert resume.last_checkpoint(tmp_path / "R").name == "epoch-2"


def test_a_checkpoint_of_all_weights_has_its_own_card_and_not_the_base_models(tiny, trajectories, tmp_path, capsys):
    base = tmp_path / "Base-7B"
    shutil.copytree(tiny, base)
    (base / "README.md").write_text("the card of the base model")
    run_train(capsys, model=base, data=trajectories, out=tmp_path / "R", **dict(lora_rank=0, epochs=1))
    shown = card_of(tmp_path / "R" / "epoch-1")
    assert shown.data.base_model == "Base-7B" and shown.data.library_name is None
    assert "A model trained from Base-7B" in shown.content and "the card of the base model" not in shown.content


def test_what_is_uploaded_is_the_adapter_and_its_card(trained):
    """docs/recipes.md leaves the optimizer's state at home."""
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"^hf upload .*$", text, re.MULTILINE)
    words = shlex.split(line)
    chosen = fnmatch.filter(
        (file.name for file in (trained / "epoch-1").iterdir()), words[words.index("--include") + 1]
    )
    assert set(chosen) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert words[4] == "."  # else the files lie in a folder of the repository


@pytest.mark.parametrize("name", ["org/model", 'a "b": #c', "- x", "{a: b}", "ünï☃", "a\nb: 1", "\x7f\udc80`", "true"])
def test_any_name_is_read_back(name, tmp_path):
    """As YAML, and no name ends a line, a cell or a block."""
    (tmp_path / "meta.json").write_text(json.dumps(dict(objective="tabom", data="x|y", global_batch=4)))
    text = card.text(train.TrainOptions(model=name, data="x|y", lora_rank=4), tmp_path, ("out",))
    shown = ModelCard(text.encode().decode())
    expected = "".join(c if c.isprintable() and c != "`" else "?" for c in name)
    assert shown.data.base_model == expected and shown.data.to_dict().keys() == {"base_model", "library_name", "tags"}
    assert cells(shown.content)["data"] == "x?y" and text.count("```") == 2
    (line,) = re.findall(r"^python tabom.py (train .*)$", text, re.MULTILINE)
    given = parse(tabom.COMMANDS, "", argv=shlex.split(line))[3]
    assert given["model"] == expected


@pytest.mark.parametrize("log", [None, "", "no json\n", '{"epoch": 1, "step": 1, "loss": null}\n'])
def test_a_log_that_says_nothing_costs_no_checkpoint(log, tmp_path):
    (tmp_path / "meta.json").write_text(json.dumps(dict(objective="tabom", global_batch=4)))
    if log is not None:
        (tmp_path / "metrics.jsonl").write_text(log)
    text = card.text(train.TrainOptions(model="org/model", data="T"), tmp_path, ())
    assert "loss |" not in text and ModelCard(text).data.base_model == "org/model"


def test_a_folder_is_named_and_not_its_path(tmp_path, monkeypatch):
    (tmp_path / "meta.json").write_text(json.dumps(dict(objective="tabom", global_batch=4)))
    (tmp_path / "models" / "LLaDA").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for given in ("models/LLaDA", "./models/LLaDA/"):
        text = card.text(train.TrainOptions(model=given, data="T"), tmp_path, ())
        assert 'base_model: "LLaDA"' in text and "before you upload" in text
        assert str(Path(tmp_path)) not in text
    assert "before you upload" not in card.text(train.TrainOptions(model="org/name", data="T"), tmp_path, ())
