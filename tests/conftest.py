"""Fixtures that several test files share."""

import json
import os

import pytest
import torch
from helpers import BYTES_CONFIG, TRAIN, Golden, Toy, flags

import model
import tabom
from experiments import puzzles as puzzle_tasks
from experiments import tiny as tiny_model

if "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(1)  # small models are fastest on one thread, and others use the machine too


def pytest_collection_modifyitems(config, items):
    """Exhaustive tests take many minutes and 16 GB of disk: only an -m that names them runs them."""
    if "exhaustive" in config.option.markexpr:
        return
    kept, left_out = [], []
    for item in items:
        (left_out if item.get_closest_marker("exhaustive") else kept).append(item)
    config.hook.pytest_deselected(items=left_out)
    items[:] = kept


@pytest.fixture(scope="session", params=["llada", "dream"])
def golden(request):
    return Golden(request.param)


@pytest.fixture(scope="session")
def toy():
    """The class: toy(vocab, seed) makes one."""
    return Toy


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A model folder with random weights, and a tokenizer of one token a character."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_model.write_start(folder, 0)
    return folder


@pytest.fixture(scope="session")
def puzzles(tmp_path_factory):
    return puzzle_tasks.write_puzzles(tmp_path_factory.mktemp("data") / "train.jsonl", ["latin"], 12, False, 0)


@pytest.fixture(scope="session")
def trajectories(tiny, puzzles, tmp_path_factory):
    out = tmp_path_factory.mktemp("T") / "T"
    assert tabom.main(["distill", *flags(model=tiny, data=puzzles, out=out, check="exact")]) == 0
    return out


@pytest.fixture(scope="session")
def trained(tiny, trajectories, tmp_path_factory):
    """A run of TRAIN: 6 steps, 2 epochs. Tests copy it before they change it."""
    out = tmp_path_factory.mktemp("R") / "R"
    assert tabom.main(["train", *flags(model=tiny, data=trajectories, out=out, **TRAIN)]) == 0
    return out


@pytest.fixture(scope="session")
def bytes_model(tmp_path_factory):
    """A random model whose tokens are bytes, so that it can be asked and can answer anything."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("bytes")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<eos>", "<mask>"])
    backend.save(str(folder / "tokenizer.json"))
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps(dict(eos_token="<eos>", chat_template=template)))
    model.save(model.create(BYTES_CONFIG, torch.Generator().manual_seed(0)), folder)
    return folder
