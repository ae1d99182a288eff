"""The plan of a full run follows from the config of a model: python -m pytest tests/test_cost.py"""

import json

import pytest
import torch

import model
from experiments import cost


@pytest.mark.parametrize("name, billions", [("llada-8b", 8.02), ("dream-7b", 7.62)])
def test_the_plan_follows_from_the_published_configurations(name, billions, capsys):
    assert cost.main([name]) == 0
    out = capsys.readouterr().out
    assert f"{billions} billion" in out
    result = json.loads(out.splitlines()[-1])
    assert result["forward_passes"] == 12_000 * 256
    config = model.parse_config(cost.FULL[name])
    widths = [config.width, config.width, config.width, config.kv_heads * config.width // config.heads]
    assert result["adapter_parameters"] == 16 * config.layers * sum(widths)


@pytest.mark.parametrize("option", ["--gpus", "--tflops", "--queries"])
def test_a_plan_with_nothing_is_refused(option, capsys):
    assert cost.main(["llada-8b", option, "0"]) == 1
    assert f"error: {option} 0" in capsys.readouterr().err


def test_the_plan_of_a_folder(golden, capsys):
    assert cost.main([str(golden.folder), "--queries", "10", "--new-tokens", "4"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["forward_passes"] == 40
    assert cost.main(["nowhere"]) == 1
    assert "nowhere" in capsys.readouterr().err


def test_activations_grow_with_the_batch_and_shrink_with_checkpointing(golden):
    raw = json.loads((golden.folder / "config.json").read_text())
    one, two = (cost.activations(raw, batch, 40, 8) for batch in (1, 2))
    assert 1.9 < two / one < 2.01
    assert cost.activations(raw, 2, 40, 8, checkpointing=True) < two / 1.5
    assert torch.nn.functional.scaled_dot_product_attention is model.F.scaled_dot_product_attention  # put back
