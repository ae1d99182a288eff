"""The plan of a full run follows from the config of a model: python -m pytest tests/test_cost.py"""

import dataclasses
import json
import re

import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT

import model
from experiments import cost

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


@pytest.mark.parametrize("option", ["--gpus", "--tflops", "--queries", "--batch", "--epochs"])
def test_a_plan_with_nothing_is_refused(option, capsys):
    assert cost.main(["llada-8b", option, "0"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {option} 0")


def test_the_plan_of_a_folder(golden, capsys):
    _, result = planned(capsys, str(golden.folder), "--queries", "10", "--new-tokens", "4")
    assert result["forward_passes"] == 40
    assert cost.main(["nowhere"]) == 1
    assert "nowhere" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------- activations


def test_attention_keeps_its_inputs_and_its_output():
    q, k, v = (torch.empty(2, 4, 10, 8, device="meta", requires_grad=True) for _ in range(3))
    size = 2 * 4 * 10 * 8 * 4  # bytes
    assert cost.kept_bytes(lambda: F.scaled_dot_product_attention(q, k, v)) == 4 * size
    few = torch.empty(2, 1, 10, 8, device="meta", requires_grad=True)  # one key head for four query heads
    grouped = cost.kept_bytes(lambda: F.scaled_dot_product_attention(q, few, few, enable_gqa=True))
    assert grouped == 2 * size + size / 4
    assert cost.kept_bytes(lambda: (q * k).exp(), [k]) == size + size  # q, and the result; k is left out


def test_a_block_keeps_what_a_count_by_hand_says():
    """The difference of three blocks and two is one in the middle, in bytes: bfloat16 has 2, float32 4."""
    B, L, D, M, r, W = 3, 14, 32, 48, 5, 4
    three, two = (cost.activations(model.parse_config(TINY | dict(n_layers=n)), B, L, W, rank=r) for n in (3, 2))
    norm = 4 * D + 4  # of each token: its input in float32, and the inverse of its length
    adapter = 4 * D + 4 * r  # its input in float32, and the product with lora_A
    attention = 4 * 2 * D  # q, k, v and the output
    mlp = 3 * 2 * M  # the gate, silu of it, and what it is multiplied with
    assert three - two == B * L * (2 * norm + 2 * adapter + attention + mlp)


def test_no_weights_of_attention_are_counted():
    """Twice the heads have twice the [L, L] weights, and the same activations otherwise."""
    many, few = (cost.activations(model.parse_config(TINY | dict(n_heads=n, n_kv_heads=n)), 2, 40, 8) for n in (8, 4))
    assert many <= few  # fewer cosines


def test_activations_grow_with_the_batch_and_shrink_with_checkpointing(golden):
    config = model.parse_config(json.loads((golden.folder / "config.json").read_text()))
    one, two = (cost.activations(config, batch, 40, 8) for batch in (1, 2))
    assert 1.9 < two / one < 2.01
    assert cost.activations(config, 2, 40, 8, checkpointing=True) < two / 1.5


def test_attention_is_as_before_afterwards():
    cost.activations(model.parse_config(TINY), 1, 8, 2)
    q = torch.randn(1, 2, 3, 4)
    weights = (q @ q.transpose(2, 3) / 2).softmax(-1)
    torch.testing.assert_close(F.scaled_dot_product_attention(q, q, q), weights @ q)


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
    plain = cost.activations(config, 1, 64, 8)
    blocks = cost.activations(dataclasses.replace(config, block_length=8), 1, 64, 8, start=32)
    assert 1.3 < blocks / plain < 1.6  # 96 tokens in place of 64


PAGES = []  # (page, arguments, table)
for page in ("small-model", "t3d"):
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    for words, table in re.findall(r"```bash\npython -m experiments\.cost (.*)\n```\n\n((?:\|.*\n)+)", text):
        PAGES.append((page, words, table))


@pytest.mark.parametrize("page, words, table", PAGES, ids=lambda x: x.splitlines()[0])
def test_the_tables_of_the_pages_are_what_the_commands_print(page, words, table, capsys):
    out, _ = planned(capsys, *words.split())
    assert out.rsplit("\n", 2)[0] + "\n" == table


def test_the_pages_have_their_tables():
    assert [page for page, _, _ in PAGES] == ["small-model", "small-model", "t3d"]
