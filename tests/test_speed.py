"""The plain ways of the speed bench give what ours give: python -m pytest tests/test_speed.py"""

import pytest
import torch

import decode
import lora
import objectives
from experiments import speed


def test_the_plain_llada_decoder_decodes_the_same(golden):
    m, prompt = golden.load(), torch.arange(10, 20).reshape(2, 5)
    plain = speed.plain_llada(m, prompt, new=12, steps=6, block_length=4)
    options = dict(max_new_tokens=12, steps=6, block_length=4, strategy="confidence", schedule="llada")
    assert torch.equal(plain, decode.generate(m, prompt, **options).response)


def test_the_plain_dream_decoder_decodes_the_same(golden):
    """top_k = 1 leaves no chance, and top_p close to 0 the same; entropies then tie, and all is taken at once."""
    m, prompt = golden.load(), torch.arange(10, 20).reshape(2, 5)
    plain = speed.plain_dream(m, prompt, new=8, steps=1, temperature=0.5, top_p=1e-6)
    assert torch.equal(plain, decode.generate(m, prompt, max_new_tokens=8, steps=1).response)
    masks = []
    m.register_forward_pre_hook(lambda _, inputs: masks.append(int((inputs[0] == m.config.mask_id).sum())))
    speed.plain_dream(m, prompt, new=8, steps=5, temperature=0.5, top_p=1e-6)
    t = decode.generate(m, prompt, max_new_tokens=8, steps=5, suppress=[m.config.mask_id])
    assert masks[:5] == [16 - int((t.step < i).sum()) for i in range(5)]  # the same number of tokens at each step


def test_the_plain_training_loss_is_ours(golden):
    m = lora.load(golden.load(), golden.folder / "adapter")
    get = {k: golden.objective[f"tabom.0.{k}"] for k in ("prompt", "response", "order", "start")}
    batch = dict(prompt_ids=get["prompt"], response_ids=get["response"], order=get["order"])
    batch |= dict(prompt_mask=torch.ones_like(get["prompt"]), length=torch.tensor([get["response"].shape[1]] * 2))
    plain = speed.plain_tabom(m, batch, get["start"], window=8)
    ours = objectives.tabom(m, batch, start=get["start"], window=8)["loss"]
    assert plain.item() == pytest.approx(ours.item(), abs=1e-5)


@pytest.mark.parametrize("kind, family, way", [("decode", "dream", "ours"), ("train", "llada", "plain")])
def test_a_measurement(kind, family, way, monkeypatch):
    monkeypatch.setattr(speed, "SIZES", {"a": dict(llada=1100, dream=1100)})
    monkeypatch.setattr(speed, "LAYERS", 1)
    found = speed.measure(kind, family, "a", way, "cpu", "float32", steps=2, batch_size=1, repeat=1)
    assert found["seconds"] > 0 and found["tokens_per_second"] > 0 and found["memory"] >= 0
    assert found["outside"] is None if kind == "train" else 0 < found["outside"] < 1
