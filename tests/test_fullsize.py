"""A model of full size with random weights: it loads, decodes and trains a step within its own memory.

python -m pytest -m exhaustive tests/test_fullsize.py      # writes 16 GB into a temporary folder, needs 20 GB of memory
"""

import json
import os
import shutil
import subprocess
import sys
import time

import pytest
import torch
from helpers import ROOT
from safetensors.torch import save_file

import decode
import lora
import model
import objectives
from experiments import cost, speed


def write_random(m, raw, folder):
    """A shard for each layer and one for the rest; every tensor a piece of the same random numbers."""
    noise = torch.empty(2**24).normal_(std=0.02, generator=torch.Generator().manual_seed(0)).bfloat16()
    shards, index = {}, {}
    for name, p in m.named_parameters():
        parts = name.split(".")
        shards.setdefault(f"model-{parts[1] if parts[0] == 'layers' else 'rest'}.safetensors", []).append((name, p))
    for file, members in shards.items():
        tensors = {}
        for name, p in members:
            repeats = -(-p.numel() // len(noise))
            random = noise.roll(len(index)).repeat(repeats)[: p.numel()].view(p.shape).clone()
            tensors[m.checkpoint_name(name)] = torch.ones_like(random) if p.ndim == 1 else random
            index[m.checkpoint_name(name)] = file
        save_file(tensors, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps(dict(metadata={}, weight_map=index)))
    (folder / "config.json").write_text(json.dumps(raw))


def use(folder, size):
    """Load a checkpoint, decode one step and train one step of TABOM at a short length -> times and peak memory."""
    times, begun = {}, time.perf_counter()

    def lap(name):
        nonlocal begun
        times[name] = round(time.perf_counter() - begun, 1)
        begun = time.perf_counter()

    speed.resident()
    m = model.load(folder, dtype=torch.bfloat16)
    lap("load_s")
    loaded = speed.peak_resident()
    prompt = torch.arange(16)[None]
    t = decode.generate(m, prompt, max_new_tokens=16, steps=1)
    lap("decode_step_s")
    lora.inject(m)
    weights = [p for p in m.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-4)
    batch = dict(prompt_ids=prompt, prompt_mask=torch.ones_like(prompt), response_ids=t.response, order=t.order)
    out = objectives.tabom(m, batch | dict(length=torch.tensor([16])), window=8)
    out["loss"].backward()
    optimizer.step()
    lap("train_step_s")
    peak = speed.peak_resident()
    return dict(
        size_gb=round(size / 1e9, 2),
        load_peak_gb=round(loaded / 1e9, 2),
        load_peak_ratio=round(loaded / size, 3),
        peak_gb=round(peak / 1e9, 2),
        **times,
        loss=out["loss"].item(),
    )


def in_a_fresh_process(folder, size):
    """use() where nothing else has been loaded before, so that the peak is the model's."""
    command = [sys.executable, __file__, str(folder), str(size)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=env, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_a_random_checkpoint_loads(golden, tmp_path):
    raw = json.loads((golden.folder / "config.json").read_text())
    write_random(model.empty(model.parse_config(raw)), raw, tmp_path)
    m = model.load(tmp_path, dtype=None)
    assert {p.dtype for p in m.parameters()} == {torch.bfloat16}
    assert 0.015 < m.head.weight.float().std() < 0.025
    assert not torch.equal(m.layers[0].attn.q_proj.weight, m.layers[1].attn.q_proj.weight)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["llada-8b", "dream-7b"])
def test_full_size(name, tmp_path):
    raw = cost.FULL[name]
    m = model.empty(model.parse_config(raw))
    size = 2 * sum(p.numel() for p in m.parameters())
    if shutil.disk_usage(tmp_path).free < 1.1 * size:
        pytest.skip(f"{size / 1e9:.1f} GB of disk are needed")
    try:
        write_random(m, raw, tmp_path)
        found = in_a_fresh_process(tmp_path, size)
    finally:
        shutil.rmtree(tmp_path)
    print(found)
    assert found["load_peak_ratio"] < 1.15
    assert found["loss"] > 0


if __name__ == "__main__":  # the fresh process
    print(json.dumps(use(sys.argv[1], int(sys.argv[2]))))
