"""The plan of a full run follows from the config of a model: python -m pytest tests/test_cost.py"""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import HUNG, ROOT
from torch.overrides import TorchFunctionMode

import lora
import model
import objectives
from experiments import cost, memory

TINY = cost.LLADA | dict(
    d_model=32, n_layers=2, n_heads=4, n_kv_heads=4, mlp_hidden_size=48, vocab_size=50, embedding_size=50,
    mask_token_id=49, eos_token_id=48, pad_token_id=48,
)  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """A model folder with the config above, all that a plan reads."""
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    return str(tmp_path)


def planned(capsys, *words):
    assert cost.main(list(words)) == 0
    out = capsys.readouterr().out
    return out, json.loads(out.splitlines()[-1])


@pytest.mark.parametrize("name, billions", [("llada-8b", 8.02), ("dream-7b", 7.62)])
def test_the_plan_follows_from_the_published_configurations(name, billions, capsys):
    out, result = planned(capsys, name)
    assert f"{billions} billion" in out
    assert result["forward_passes"] == 12_000 * 256
    config = model.parse_config(cost.FULL[name])
    widths = [config.width, config.width, config.width, config.kv_heads * config.width // config.heads]
    assert result["adapter_parameters"] == 16 * config.layers * sum(widths)


def test_flops_by_hand(folder, capsys):
    words = ("--queries", "3", "--prompt-tokens", "6", "--new-tokens", "4", "--window", "2", "--epochs", "2")
    _, result = planned(capsys, folder, *words)
    D, M, V, layers, L = 32, 48, 50, 2, 10
    block = 4 * D * D + 3 * D * M + 2 * D  # the linear layers and two norms
    forward = L * (2 * layers * block + layers * 4 * L * D)
    head = 2 * V * D
    assert result["distill_flops"] == 3 * 4 * (forward + 2.5 * head)  # 4, 3, 2 and 1 masked positions: 2.5 on average
    backward = L * (2 * layers * block + 2 * layers * 4 * L * D) + 2 * head
    assert result["train_flops"] == 3 * 2 * (forward + backward + 2 * head)


def test_hours_are_given_for_each_number_of_gpus(folder, capsys):
    out, both = planned(capsys, folder, "--tflops", "4e-6")
    assert list(both["hours"]) == ["4", "8"]
    for step in ("distill", "train"):
        assert both["hours"]["4"][step] == pytest.approx(2 * both["hours"]["8"][step])
    assert both["hours"]["8"]["distill"] == pytest.approx(both["distill_flops"] / (8 * 4e6) / 3600)
    assert both["hours"]["8"]["steps"] == 375 * 5
    assert f"| distillation on 4 GPUs at 4e-06 TFLOP/s each | {both['hours']['4']['distill']:.2f} hours |" in out

    _, one = planned(capsys, folder, "--gpus", "2", "--tflops", "1e-6", "--epochs", "3", "--batch", "8")
    assert list(one["hours"]) == ["2"]
    assert one["hours"]["2"]["distill"] == pytest.approx(16 * both["hours"]["8"]["distill"])
    assert one["hours"]["2"]["train"] == pytest.approx(16 * 3 / 5 * both["hours"]["8"]["train"])
    assert one["hours"]["2"]["steps"] == 750 * 3


@pytest.mark.parametrize("option", ["--gpus", "--tflops", "--queries", "--batch", "--epochs", "--batch-size"])
def test_a_plan_with_nothing_is_refused(option, capsys):
    assert cost.main(["llada-8b", option, "0"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {option} 0")


def test_the_plan_of_a_folder(golden, capsys):
    _, result = planned(capsys, str(golden.folder), "--queries", "10", "--new-tokens", "4")
    assert result["forward_passes"] == 40
    assert cost.main(["nowhere"]) == 1
    assert "nowhere" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------- peaks of memory


class Flash(torch.autograd.Function):
    """Attention as a fused kernel keeps it for the backward pass: q, k, v, the output and a float32 for each query."""

    @staticmethod
    def forward(ctx, q, k, v):
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, torch.empty(q.shape[:3], device=q.device))
        return out


class FusedAttention(TorchFunctionMode):
    """Inside `with FusedAttention():` attention keeps what a fused kernel keeps: the meta device has none."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            return Flash.apply(*args[:3])
        return function(*args, **(kwargs or {}))


def kept_by_autograd(config, batch, prompt, new, window, dtype="bfloat16", rank=16, checkpointing=False, padded=True):
    """What memory.activations() counts: the storages that a forward pass on the meta device saves, no parameters."""
    m = model.empty(config).to(model.DTYPES[dtype])
    if rank:
        lora.inject(m, rank=rank)
    m.gradient_checkpointing = checkpointing
    length = prompt + new
    ids = torch.zeros(batch, length, dtype=torch.long, device="meta")
    positions = torch.zeros(batch, window, dtype=torch.long, device="meta")
    copies = {}
    if config.block_length is not None:
        copies = dict(clean=ids, start=max(0, prompt - config.block_length + 1))
    known = {p.untyped_storage()._cdata for p in m.parameters()}
    kept = {}  # address of a storage -> (bytes, a tensor that keeps others from that address)

    def pack(x):
        storage = x.untyped_storage()
        if storage._cdata not in known and x.is_floating_point():
            kept[storage._cdata] = (storage.nbytes(), x)
        return x

    with FusedAttention(), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        mask = torch.ones_like(ids) if padded else None
        logits = m(ids, attention_mask=mask, positions=positions, **copies)
        objectives.NllAndEntropy.apply(logits, positions)
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("rank, dtype", [(16, "bfloat16"), (16, "float32"), (0, "float32")])
@pytest.mark.parametrize("name", ["llada-8b", "dream-7b", "a2d-0.6b", "sdar-1.7b"])
def test_activations_are_what_autograd_keeps(name, rank, dtype):
    config = model.parse_config(cost.FULL[name] | dict(num_hidden_layers=5, n_layers=5))
    for block in {None, config.block_length, 32 if config.grid else None}:
        sizes = dataclasses.replace(config, block_length=block), 3, 250, 130, 20
        found = memory.activations(*sizes, dtype=dtype, rank=rank)
        # Not in the arithmetic: cosines, and the bias of a mask
        assert found == pytest.approx(kept_by_autograd(*sizes, dtype=dtype, rank=rank), rel=0.02)


def test_a_block_keeps_what_a_count_by_hand_says():
    """The difference of three blocks and two is one in the middle, in bytes: bfloat16 has 2, float32 4."""
    B, L, D, M, H, r, W = 3, 14, 32, 48, 4, 5, 4
    three, two = (
        memory.activations(model.parse_config(TINY | dict(n_layers=n)), B, L - 6, 6, W, rank=r) for n in (3, 2)
    )
    norm = 4 * D + 4  # of each token: its input in float32, and the inverse of its length
    adapter = 4 * D + 4 * r  # its input in float32, and the product with lora_A
    attention = 4 * 2 * D + 4 * H  # q, k, v and the output; of each head the sum of the softmax
    mlp = 3 * 2 * M  # the gate, silu of it, and what it is multiplied with
    assert three - two == B * L * (2 * norm + 2 * adapter + attention + mlp)


def test_activations_grow_with_the_batch_and_shrink_with_checkpointing(golden):
    config = model.parse_config(json.loads((golden.folder / "config.json").read_text()))
    one, two = (memory.activations(config, batch, 20, 20, 8) for batch in (1, 2))
    assert two == 2 * one
    assert memory.activations(config, 2, 20, 20, 8, checkpointing=True) < two / 1.3


@pytest.mark.parametrize("name", cost.FULL)
def test_the_arithmetic_counts_the_parameters_of_the_network(name):
    config = model.parse_config(cost.FULL[name])
    found = cost.count_parameters(config)
    assert memory.count_weights(config) == found["all"]
    assert memory.count_adapter(config, cost.RANK) == found["adapter"]


FAKEGPU = Path(os.environ.get("TABOM_DATA", "no-such-folder")).parent / "fakegpu"


@pytest.mark.skipif(not (FAKEGPU / "fakegpu.py").is_file(), reason="TABOM_DATA has no fakegpu beside it")
@pytest.mark.skipif(shutil.which("g++") is None, reason="fakegpu compiles a device guard")
@pytest.mark.parametrize("what, cases", [("decode", 36), ("train", 28)])
def test_the_peaks_are_those_of_a_device(what, cases):
    """Without the weights and all else that stays between two steps: as a share of the whole the error is smaller."""
    command = [sys.executable, str(ROOT / "tests" / "peaks.py"), str(FAKEGPU), what]
    done = subprocess.run(command, capture_output=True, text=True, timeout=HUNG)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == cases
    wrong = []
    for row in rows:
        ratio = (row["arithmetic"] - row["stays"]) / (row["measured"] - row["stays"])
        if not 0.9 < ratio < 1.1:
            wrong.append((row, ratio))
    assert not wrong


def test_what_fits_is_the_largest_batch(folder, capsys):
    out, result = planned(capsys, "llada-8b", "--batch-size", "2,3", "--objective", "nelbo")
    config = model.parse_config(cost.FULL["llada-8b"])
    peak = memory.train_peak(config, 2, 256, 256, objective="nelbo")
    assert result["peak_gb"]["training"]["2"] == round(peak / 1e9, 2)
    decoding, training = (result["peak_gb"][name]["2"] for name in ("decoding", "training"))
    assert f"| --batch-size 2 | {decoding:.1f} GB | {training:.1f} GB |" in out
    for card in cost.CARDS:
        batch = result["fits"]["training"][str(card)]
        for size, fits in ((batch, True), (batch + 1, False)):
            assert (memory.train_peak(config, size, 256, 256, objective="nelbo") <= card * 1e9) == fits
    assert "| fits on 24 GB |" in out and out.count(" none |") == 3  # all weights take 128 GB
    assert cost.largest_batch(lambda batch: batch, 0.5) == 0 and cost.largest_batch(lambda batch: 0, 1) == 4096


def test_objectives_and_lengths_change_the_peak():
    config = model.parse_config(cost.FULL["dream-7b"])
    tabom, nelbo, t3d = (memory.train_peak(config, 4, 256, 256, objective=name) for name in ("tabom", "nelbo", "t3d"))
    assert tabom < nelbo < t3d
    assert memory.train_peak(config, 4, 256, 256, window=64) > tabom > memory.train_peak(config, 4, 256, 128)
    # More logits than decode.HELD are not all there at once: twice as many rows take little more than their activations
    many, more = (memory.decode_peak(config, batch, 256, 256, block=None) for batch in (16, 32))
    assert more - many < 1.2 * 16 * 512 * memory.forward_bytes(config, 2)


# ------------------------------------------------------------------------------------------------------ Qwen3 families

NUMBERS = {"sdar-1.7b": 4_063_479_808 // 2, "sdar-4b": 8_822_848_512 // 2, "sdar-8b": 16_381_470_720 // 2}
NUMBERS["a2d-0.6b"] = 596_049_920  # with a head that is the embedding


@pytest.mark.parametrize("name", NUMBERS)
def test_parameters_are_those_of_the_published_files(name):
    config = model.parse_config(cost.FULL[name])
    assert cost.count_parameters(config)["all"] == NUMBERS[name]
    assert config.block_length == (None if name == "a2d-0.6b" else 4)


def test_flops_in_blocks_by_hand(tmp_path, capsys):
    """The prompt and the first block, then one block a step, and the one before it too where a block begins."""
    raw = cost.FULL["a2d-0.6b"] | dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, head_dim=16)
    raw |= dict(num_key_value_heads=2, intermediate_size=48, vocab_size=50, mask_token_id=49)
    raw |= dict(eos_token_id=48, pad_token_id=48)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    words = ("--queries", "3", "--prompt-tokens", "6", "--new-tokens", "8", "--window", "2", "--epochs", "2")
    _, result = planned(capsys, str(tmp_path), *words, "--block-causal", "4")
    D, M, V, layers, P, N, wide, narrow = 32, 48, 50, 2, 6, 8, 4 * 16, 2 * 16
    body = 2 * D * wide + 2 * D * narrow + 3 * D * M + 2 * D + 2 * 16  # the linear layers and four norms
    computed = [P + 4, 4, 4, 4, 4 + 4, 4, 4, 4]  # of each step
    tokens = sum(computed) + 4  # the block after the last would begin with the last: counted, and negligible
    forward = tokens * layers * (2 * body + 4 * wide * (P + N / 2))
    assert result["distill_flops"] == pytest.approx(3 * (forward + N * 2.5 * 2 * V * D))
    n = P + N + N  # the clean row, and the response with its masks
    backward = 2 * n * layers * (2 * 2 * body + 3 * 4 * wide * n)
    assert result["train_flops"] == 3 * (backward + 2 * 2 * 2 * 2 * V * D)


def test_more_memory_with_two_copies_and_without_adapters(capsys):
    out, _ = planned(capsys, "a2d-0.6b", "--gpus", "1,4")
    assert f"weights, gradients and AdamW in float32 | {16 * 0.59604992:.1f} GB |" in out
    assert f"| the same on each GPU, sharded over 4 | {4 * 0.59604992:.1f} GB |" in out and "sharded over 1" not in out
    config = model.parse_config(cost.FULL["a2d-0.6b"] | dict(num_hidden_layers=2))
    plain = memory.activations(config, 1, 32, 32, 8)
    blocks = memory.activations(dataclasses.replace(config, block_length=8), 1, 32, 32, 8)
    assert 1.3 < blocks / plain < 1.7  # 103 tokens in place of 64


PAGES = []  # (page, arguments, table)
for page in ("small-model", "t3d", "speed"):
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    for words, table in re.findall(r"```bash\npython -m experiments\.cost (.*)\n```\n\n((?:\|.*\n)+)", text):
        PAGES.append((page, words, table))


@pytest.mark.parametrize("page, words, table", PAGES, ids=lambda x: x.splitlines()[0])
def test_the_tables_of_the_pages_are_what_the_commands_print(page, words, table, capsys):
    out, _ = planned(capsys, *words.split())
    assert f"\n{table}" in f"\n{out}"


def test_the_pages_have_their_tables():
    assert [page for page, _, _ in PAGES] == ["small-model", "small-model", "t3d", "speed", "speed"]
