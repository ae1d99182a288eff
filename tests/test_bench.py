"""bench.py and fullsize.py: the plain way gives what ours gives, the plan follows from the config, the full-size run
works when small.

python -m pytest tests/test_bench.py"""

import json

import pytest
import torch

import bench
import decode
import fullsize
import lora
import model
import objectives


def test_the_plain_llada_decoder_decodes_the_same(golden):
    m, prompt = golden.load(), torch.arange(10, 20).reshape(2, 5)
    plain = bench.plain_llada(m, prompt, new=12, steps=6, block_length=4)
    options = dict(max_new_tokens=12, steps=6, block_length=4, strategy="confidence", schedule="llada")
    assert torch.equal(plain, decode.generate(m, prompt, **options).response)


def test_the_plain_dream_decoder_decodes_the_same(golden):
    """top_k = 1 leaves no chance, and top_p close to 0 the same; entropies then tie, and all is taken at once."""
    m, prompt = golden.load(), torch.arange(10, 20).reshape(2, 5)
    plain = bench.plain_dream(m, prompt, new=8, steps=1, temperature=0.5, top_p=1e-6)
    assert torch.equal(plain, decode.generate(m, prompt, max_new_tokens=8, steps=1).response)
    masks = []
    m.register_forward_pre_hook(lambda _, inputs: masks.append(int((inputs[0] == m.config.mask_id).sum())))
    bench.plain_dream(m, prompt, new=8, steps=5, temperature=0.5, top_p=1e-6)
    t = decode.generate(m, prompt, max_new_tokens=8, steps=5, suppress=[m.config.mask_id])
    assert masks[:5] == [16 - int((t.step < i).sum()) for i in range(5)]  # the same number of tokens at each step


def test_the_plain_training_loss_is_ours(golden):
    m = lora.load(golden.load(), golden.folder / "adapter")
    get = {k: golden.objective[f"tabom.0.{k}"] for k in ("prompt", "response", "order", "start")}
    batch = dict(prompt_ids=get["prompt"], response_ids=get["response"], order=get["order"])
    batch |= dict(prompt_mask=torch.ones_like(get["prompt"]), length=torch.tensor([get["response"].shape[1]] * 2))
    plain = bench.plain_tabom(m, batch, get["start"], window=8)
    ours = objectives.tabom(m, batch, start=get["start"], window=8)["loss"]
    assert plain.item() == pytest.approx(ours.item(), abs=1e-5)


@pytest.mark.parametrize("kind, family, way", [("decode", "dream", "ours"), ("train", "llada", "plain")])
def test_a_measurement(kind, family, way, monkeypatch):
    monkeypatch.setattr(bench, "SIZES", {"a": dict(llada=1100, dream=1100)})
    monkeypatch.setattr(bench, "LAYERS", 1)
    found = bench.measure(kind, family, "a", way, "cpu", "float32", steps=2, batch_size=1, repeat=1)
    assert found["seconds"] > 0 and found["tokens_per_second"] > 0 and found["memory"] >= 0
    assert found["outside"] is None if kind == "train" else 0 < found["outside"] < 1


def small_config(monkeypatch, golden):
    raw = json.loads((golden.folder / "config.json").read_text())
    monkeypatch.setitem(fullsize.FULL, "llada-8b", raw)
    return raw


def test_a_synthetic_checkpoint_is_written_used_and_removed(golden, monkeypatch, tmp_path, capfd):
    raw = small_config(monkeypatch, golden)
    assert bench.main(["--synthetic", "llada-8b", "--out", str(tmp_path / "big")]) == 0
    result = json.loads(capfd.readouterr().out.splitlines()[-1])
    size = sum(p.numel() for p in model.create(raw).parameters())
    assert result["size_gb"] == round(2 * size / 1e9, 2)
    assert {"load_s", "decode_step_s", "train_step_s", "load_peak_ratio", "peak_gb"} <= result.keys()
    assert not (tmp_path / "big").exists()


def test_a_random_checkpoint_loads(golden, tmp_path):
    raw = json.loads((golden.folder / "config.json").read_text())
    fullsize.write_random(model.empty(model.parse_config(raw)), raw, tmp_path)
    m = model.load(tmp_path, dtype=None)
    assert {p.dtype for p in m.parameters()} == {torch.bfloat16}
    assert 0.015 < m.head.weight.float().std() < 0.025
    assert not torch.equal(m.layers[0].q_proj.weight, m.layers[1].q_proj.weight)


def test_the_folder_of_a_synthetic_checkpoint_must_be_free(tmp_path, capsys):
    assert bench.main(["--synthetic", "dream-7b", "--out", str(tmp_path)]) == 1
    assert "is there already" in capsys.readouterr().err and tmp_path.is_dir()


@pytest.mark.parametrize("name, billions", [("llada-8b", 8.02), ("dream-7b", 7.62)])
def test_the_plan_follows_from_the_published_configurations(name, billions, capsys):
    assert bench.main(["--plan", name]) == 0
    out = capsys.readouterr().out
    assert f"{billions} billion" in out
    result = json.loads(out.splitlines()[-1])
    assert result["forward_passes"] == 12_000 * 256
    config = model.parse_config(fullsize.FULL[name])
    widths = [config.width, config.width, config.width, config.kv_heads * config.width // config.heads]
    assert result["adapter_parameters"] == 16 * config.layers * sum(widths)


@pytest.mark.parametrize("option", ["--gpus", "--tflops", "--queries"])
def test_a_plan_with_nothing_is_refused(option, capsys):
    assert bench.main(["--plan", "llada-8b", option, "0"]) == 1
    assert f"error: {option} 0" in capsys.readouterr().err


def test_the_plan_of_a_folder(golden, capsys):
    assert bench.main(["--plan", str(golden.folder), "--queries", "10", "--new-tokens", "4"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["forward_passes"] == 40
    assert bench.main(["--plan", "nowhere"]) == 1
    assert "nowhere" in capsys.readouterr().err


def test_activations_grow_with_the_batch_and_shrink_with_checkpointing(golden):
    raw = json.loads((golden.folder / "config.json").read_text())
    one, two = (fullsize.activations(raw, batch, 40, 8) for batch in (1, 2))
    assert 1.9 < two / one < 2.01
    assert fullsize.activations(raw, 2, 40, 8, checkpointing=True) < two / 1.5
    assert torch.nn.functional.scaled_dot_product_attention is model.F.scaled_dot_product_attention  # put back
