"""The plain and the release's ways of the speed bench give what ours give: python -m pytest tests/test_speed.py"""

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


def test_the_release_decodes_the_same_tokens(golden):
    m, prompt = golden.load(), torch.arange(10, 20).reshape(2, 5)
    own = dict(max_new_tokens=12, steps=6)
    release = speed.release_llada(m, prompt, new=12, steps=6, block_length=4)
    t = decode.generate(m, prompt, block_length=4, strategy="confidence", schedule="llada", **own)
    assert torch.equal(release, t.response)
    for top_p in (0.9, 0.5):
        release = speed.release_dream(m, prompt, new=12, steps=6, temperature=0.3, top_p=top_p)
        t = decode.generate(m, prompt, temperature=0.3, top_p=top_p, greedy=True, **own)
        assert torch.equal(release, t.response)


def test_the_training_step_of_the_release_is_ours(golden):
    """The same loss, and the same gradients of the same adapter."""
    get = {k: golden.objective[f"tabom.0.{k}"] for k in ("prompt", "response", "order", "start")}
    batch = dict(prompt_ids=get["prompt"], response_ids=get["response"], order=get["order"])
    batch |= dict(prompt_mask=torch.ones_like(get["prompt"]), length=torch.tensor([get["response"].shape[1]] * 2))
    m, theirs = lora.inject(golden.load(), rank=4, alpha=8), golden.load()
    speed.plain_adapters(theirs, rank=4, alpha=8)
    g = torch.Generator().manual_seed(0)
    trained = [[p for p in x.parameters() if p.requires_grad] for x in (m, theirs)]
    for mine, plain in zip(*trained, strict=True):
        mine.data.normal_(std=0.1, generator=g)
        plain.data.copy_(mine.data)
    ours = objectives.tabom(m, batch, start=get["start"], window=8)["loss"]
    release = speed.release_tabom(theirs, batch, get["start"], window=8)
    assert release.item() == pytest.approx(ours.item(), abs=1e-4)
    ours.backward()
    release.backward()
    for mine, plain in zip(*trained):
        assert mine.grad.abs().max() > 0
        torch.testing.assert_close(plain.grad, mine.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "kind, family, way",
    [
        ("decode", "dream", "ours"),
        ("decode", "dream", "ours, greedy"),
        ("decode", "llada", "release"),
        ("decode", "dream", "release"),
        ("train", "llada", "plain"),
        ("train", "dream", "release"),
    ],
)
def test_a_measurement(kind, family, way, monkeypatch):
    monkeypatch.setattr(speed, "SIZES", {"a": dict(llada=1100, dream=1100)})
    monkeypatch.setattr(speed, "LAYERS", 1)
    found = speed.measure(kind, family, "a", way, "cpu", "float32", steps=4, batch_size=2, new=64, repeat=1)
    assert found["seconds"] > 0 and found["tokens_per_second"] > 0 and found["memory"] >= 0
    if kind == "train":
        assert found["outside"] is None and found["response"] is None
        assert found["tokens_per_second"] == pytest.approx(2 * (64 + 64) / found["seconds"])
    else:
        assert 0 < found["outside"] < 1
        assert found["tokens_per_second"] == pytest.approx(2 * 64 / (4 * found["seconds"]))
        assert torch.tensor(found["response"]).shape == (2, 64)


def test_the_ratios_are_what_the_docstring_says():
    def measurement(seconds, memory, outside=None, response=None):
        return dict(seconds=seconds, memory=memory, outside=outside, response=response)

    found = {
        ("decode", "llada", "a", "ours"): measurement(1, 1, 0.03),
        ("decode", "dream", "a", "ours"): measurement(1, 1, 0.07),
        ("decode", "llada", "b", "ours"): measurement(2, 10, response=[[1, 2], [3, 4]]),
        ("decode", "llada", "b", "plain"): measurement(6, 100),
        ("decode", "dream", "b", "ours"): measurement(1, 30),
        ("decode", "dream", "b", "plain"): measurement(7, 100),
        ("train", "llada", "b", "ours"): measurement(1, 25),
        ("train", "llada", "b", "plain"): measurement(2, 100),
        ("train", "dream", "b", "ours"): measurement(1, 20),
        ("train", "dream", "b", "plain"): measurement(3, 100),
        ("decode", "llada", "b", "release"): measurement(8, 200, response=[[1, 2], [3, 5]]),
        ("decode", "dream", "b", "ours, greedy"): measurement(2, 20, response=[[1, 2]]),
        ("decode", "dream", "b", "release"): measurement(10, 200, response=[[1, 2]]),
        ("train", "llada", "b", "release"): measurement(4, 250),
        ("train", "dream", "b", "release"): measurement(5, 400),
    }
    assert speed.ratios(found) == dict(
        outside_body_llada=0.03,
        outside_body_dream=0.07,
        decode_speedup_llada=3,
        decode_speedup_dream=7,
        decode_memory_ratio=0.3,  # the larger
        train_speedup=2,  # the smaller
        train_memory_ratio=0.25,
        decode_speedup_release_llada=4,
        decode_speedup_release_dream=5,  # ours, greedy
        decode_memory_ratio_release_llada=0.05,
        decode_memory_ratio_release_dream=0.1,
        same_tokens_llada=0.75,
        same_tokens_dream=1,
        train_speedup_release_llada=4,
        train_speedup_release_dream=5,
        train_memory_ratio_release_llada=0.1,
        train_memory_ratio_release_dream=0.05,
    )


def test_with_release_nothing_else_is_measured(monkeypatch, capsys):
    one = dict(seconds=1.0, outside=None, tokens_per_second=1.0, memory=1, response=[[1]])
    monkeypatch.setattr(speed, "worker", lambda c, *case: one)
    found = speed.bench(speed.command_line().parse_args(["--release"]))
    assert len(found) == 10 and all("release" in name or "same_tokens" in name for name in found)
    cells = [line.split("|")[1:4] for line in capsys.readouterr().out.splitlines()[2:]]
    kinds = "decode, llada", "decode, dream", "train, llada", "train, dream"
    ways = ("ours", "release"), ("release", "ours, greedy"), ("ours", "release"), ("ours", "release")
    assert [(kind.strip(), way.strip()) for kind, _, way in cells] == [
        (kind, way) for kind, both in zip(kinds, ways) for way in both
    ]


def test_the_fastest_of_all_repeats_counts(monkeypatch):
    now = iter([0.0, 8.0, 10.0, 14.0, 20.0, 26.0])  # begun and ended, three times
    monkeypatch.setattr(speed.time, "perf_counter", lambda: next(now))
    m = torch.nn.Module()
    m.norm = torch.nn.Identity()
    found = speed.fastest(m, "cpu", 3, lambda: "a response", calls=2)
    assert found["seconds"] == 2.0
    assert found["response"] == "a response"


@pytest.mark.parametrize("option", ["--steps", "--repeat", "--threads"])
def test_bad_options_are_one_line(option, capsys):
    assert speed.main([option, "0"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"error: {option} 0: must be above 0"


@pytest.mark.slow
def test_a_measurement_in_a_process_of_its_own(capsys):
    c = speed.command_line().parse_args(["--steps", "2", "--repeat", "1", "--threads", "1"])
    found = speed.worker(c, "decode", "llada", "a", "ours", steps=4)
    assert found["seconds"] > 0
    assert "decode llada a ours" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="no-such-device"):
        speed.worker(c, "decode", "llada", "a", "ours", device="no-such-device")
