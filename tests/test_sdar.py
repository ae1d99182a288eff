"""Decoding in blocks, SDAR's and A2D's ways: the official trajectories, a plain decoder, and the exact cache.

python -m pytest tests/test_sdar.py
"""

import dataclasses
import itertools
import json
import math

import pytest
import torch
from helpers import FOLDER
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import decode
import model

EXPECTED = {}  # family -> expected.json
for family in ("sdar", "a2d"):
    EXPECTED[family] = json.loads((FOLDER / f"{family}-tiny" / "expected.json").read_text())
CASES = []  # (family, list in expected.json, number, cached)
for family, part in (("sdar", "cases"), ("a2d", "cases"), ("a2d", "rounded"), ("a2d", "bd3lm")):
    CASES += itertools.product([family], [part], range(len(EXPECTED[family][part])))


@pytest.fixture(scope="module")
def qwen3():
    """family -> a tiny model; and what the official decoders did with it."""
    found = {}
    for family in EXPECTED:
        folder = FOLDER / f"{family}-tiny"
        found[family] = model.load(folder), load_file(folder / "expected.safetensors")
    return found


def uncached(m):
    """The same model for a decoder that finds no cache in it."""

    def plain(ids, **more):
        return m(ids, **more)

    plain.config = m.config
    return plain


def in_blocks(m, block):
    m.config = dataclasses.replace(m.config, block_length=block)
    return m


def seeds(*numbers):
    return [torch.Generator().manual_seed(n) for n in numbers]


def same(a, b, tolerance=1e-4):
    for name in ("response", "step", "order"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    for name in ("entropy", "confidence"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=0, atol=tolerance, equal_nan=True)


# ------------------------------------------------------------------------------------------------ official trajectories

STRATEGIES = dict(static="confidence", dynamic="confidence", sequential="left", entropy_bounded="entropy")


def options_of(family, part, case):
    """The arguments of decode.generate for a case of expected.json."""
    new, block, steps = case["new"], case["block"], case["steps"]
    if family == "a2d":
        own = dict(schedule="a2d", strategy="confidence")
    else:
        own = dict(schedule="sdar", strategy=STRATEGIES[case["strategy"]])
        own["threshold"] = case.get("threshold", case.get("eb_threshold"))
        steps *= math.ceil(new / block)  # of a block there, of the response here
    return dict(own, max_new_tokens=new, block_length=block, steps=steps, stop=case.get("stop"))


@pytest.mark.parametrize("cached", [True, False], ids=["cached", "uncached"])
@pytest.mark.parametrize("family, part, k", CASES)
def test_official_trajectories(qwen3, family, part, k, cached):
    case, name = EXPECTED[family][part][k], "decode" if part == "cases" else part
    m, e = qwen3[family]
    in_blocks(m, case["block"] if family == "sdar" or part == "bd3lm" else None)
    official = {x: e.get(f"{name}.{k}.{x}") for x in ("prompt", "prompt_mask", *decode.Trajectory._fields)}
    prompt, mask = official["prompt"], official["prompt_mask"]
    options = options_of(family, part, case)
    t = decode.generate(m if cached else uncached(m), prompt, mask, **options)
    decoded = official["step"] >= 0
    assert torch.equal(t.response, official["response"])
    assert torch.equal(t.step[decoded], official["step"][decoded])
    assert (t.step[~decoded] == decode.Settings(**options).max_steps).all()
    assert torch.equal(t.order[decoded], official["order"][decoded])
    torch.testing.assert_close(t.entropy[decoded], official["entropy"][decoded], rtol=0, atol=1e-4)
    torch.testing.assert_close(t.confidence[decoded], official["confidence"][decoded], rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", EXPECTED["a2d"]["schedule"], ids=lambda c: f"{c['masks']}-{c['steps']}")
def test_official_quotas_of_a2d(case):
    s = decode.Settings(case["masks"], case["steps"], schedule="a2d", block_length=case["masks"])
    left, quotas = torch.tensor([case["masks"]]), []
    for i in range(case["steps"]):
        quotas.append(int(s.quota(torch.tensor([i]), left)))
        left -= quotas[-1]
    assert [n for n in quotas if n] == case["quotas"]


@pytest.mark.parametrize("k", range(len(EXPECTED["sdar"]["sample"])))
def test_official_distributions_that_sdar_draws_from(qwen3, k):
    e, case = qwen3["sdar"][1], EXPECTED["sdar"]["sample"][k]
    s = decode.Settings(4, schedule="sdar", block_length=4, **case)
    p, ids = decode.filtered(e["sample.logits"], s)
    if ids is not None:
        p = torch.zeros_like(e["sample.logits"]).scatter_(1, ids, p)
    torch.testing.assert_close(p, e[f"sample.{k}.probs"], rtol=0, atol=1e-5)


# ---------------------------------------------------------------------------------------------------- the plain decoder


def distribution(logits, s):
    """What SDAR draws from and scores by, and A2D's plain softmax, for logits [V]."""
    logits = logits.clone()
    logits[list(s.suppress or ())] = -torch.inf
    token = int(logits.argmax())
    if s.schedule == "a2d":
        return token, logits.softmax(-1)
    logits /= s.temperature or 1.0
    if s.top_k is not None:
        logits[logits < logits.sort().values[-s.top_k]] = -torch.inf
    p, total = logits.softmax(-1), 0.0
    for v in p.argsort(descending=True).tolist():
        if s.top_p is not None and total > s.top_p:
            logits[v] = -torch.inf
        total += float(p[v])
    return token, logits.softmax(-1)


def plain(m, prompt, **options):
    """Decode one prompt [P] with all logits at every step -> response, step, and the number of steps."""
    s = decode.Settings(**options)
    P, N, L = len(prompt), s.max_new_tokens, s.length
    tail, room = (P % L, L - 1) if s.schedule == "sdar" else (0, 0)
    each = L if s.steps is None or s.summed_entropy else math.ceil(s.steps / math.ceil(N / L))
    ids, step_of, step = torch.cat((prompt, torch.full((N + room,), m.config.mask_id))), {}, 0
    for begin in range(-tail, N, L):
        if set(ids[P:].tolist()) & set(s.stop or ()):
            break
        for i in range(each):
            block = range(max(begin, 0), min(begin + L, N + room))
            masked = [r for r in block if ids[P + r] == m.config.mask_id]
            if not masked:
                break
            logits, candidates, total = m(ids[None])[0, P:], [], 0.0
            for r in masked:
                token, p = distribution(logits[r], s)
                entropy = -sum(x * math.log(x) for x in p.tolist() if x > 0)
                score = dict(confidence=float(p[token]), entropy=-entropy, left=-r)[s.strategy]
                candidates.append((-score, r, token))
            quota = int(s.quota(torch.tensor([i]), torch.tensor([len(masked)])))
            for place, (score, r, token) in enumerate(sorted(candidates)):
                total += score
                reached = s.threshold is not None and -score > s.threshold
                if s.summed_entropy:
                    reached = total < s.threshold
                if place < quota or reached:
                    ids[P + r], step_of[r] = token, step
            step += quota > 0
    return ids[P : P + N].tolist(), [step_of.get(r, s.max_steps) for r in range(N)], step


PLAIN = [
    dict(strategy=strategy, schedule=schedule, block_length=block, **chosen)
    for strategy, schedule, block, chosen in itertools.product(
        ("confidence", "entropy", "left"),
        ("sdar", "a2d"),
        (1, 4, 16),
        (
            dict(),
            dict(steps=6),
            dict(steps=5, suppress=[0, 3, 7, 12]),
            dict(temperature=0.7, top_k=5, top_p=0.9, greedy=True),
            dict(steps=6, threshold=0.3),
            dict(stop=[1, 4]),
            dict(tokens_per_step=3),
        ),
    )
    if strategy != "left" or "threshold" not in chosen  # a threshold takes the largest probability as the score
]


@pytest.mark.parametrize("options", PLAIN, ids=lambda o: "-".join(map(str, o.values())))
def test_equals_the_plain_decoder(toy, options):
    for P, N in ((5, 10), (8, 16)):
        m, prompt = toy(seed=P), torch.arange(P) % 12
        t = decode.generate(m, prompt[None], max_new_tokens=N, **options)
        calls = len(m.calls)
        response, step, steps = plain(m, prompt, max_new_tokens=N, **options)
        assert (t.response[0].tolist(), t.step[0].tolist()) == (response, step)
        assert calls == steps  # no pass that is not needed
        assert all(torch.equal(ids[0, :P], prompt) for ids, _, _ in m.calls)


def test_a_threshold_of_sdar_has_to_be_exceeded(toy):
    m = toy(scale=0.0, vocab=3, mask_logit=-torch.inf)  # probabilities 1/2, 1/2, 0
    options = dict(max_new_tokens=4, block_length=4, strategy="confidence", threshold=0.5, suppress=[2])
    prompt = torch.tensor([[0, 1, 0, 1]])
    assert decode.generate(m, prompt, schedule="sdar", **options).step.tolist() == [[0, 1, 2, 3]]
    assert decode.generate(m, prompt, schedule="a2d", **options).step.tolist() == [[0, 0, 0, 0]]


# ------------------------------------------------------------------------------------------------------ the exact cache


def padded(m, lengths):
    """Random prompts of these lengths, padded on the left."""
    P, g = max(lengths), torch.Generator().manual_seed(sum(lengths))
    ids, mask = torch.full((len(lengths), P), m.config.pad_id), torch.zeros(len(lengths), P, dtype=torch.long)
    for b, n in enumerate(lengths):
        ids[b, P - n :], mask[b, P - n :] = torch.randint(0, 290, (n,), generator=g), 1
    return ids, mask


DRAWN = dict(
    family=st.sampled_from(["sdar", "a2d"]),
    schedule=st.sampled_from(["sdar", "a2d"]),
    strategy=st.sampled_from(["confidence", "entropy", "left", "random"]),
    lengths=st.lists(st.integers(1, 11), min_size=1, max_size=3),
    block=st.sampled_from([1, 3, 4, 8]),
    new=st.integers(1, 13),
    steps=st.none() | st.integers(1, 13),
    threshold=st.none() | st.sampled_from([0.2, 0.6, 1.0]),
    temperature=st.sampled_from([0.0, 1.0]),
    stop=st.none() | st.just(tuple(range(60))),
    suppress=st.sampled_from([None, (305,)]),
)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(**DRAWN)
def test_the_cache_changes_nothing(qwen3, family, lengths, block, new, **options):
    m = in_blocks(qwen3[family][0], block)
    ids, mask = padded(m, lengths)
    found = []
    for one in (m, uncached(m)):
        g = seeds(*range(len(lengths)))
        found.append(decode.generate(one, ids, mask, max_new_tokens=new, generator=g, **options))
    same(*found)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(**DRAWN)
def test_each_row_of_a_batch_equals_its_single_run(qwen3, family, lengths, block, new, **options):
    m = in_blocks(qwen3[family][0], block)
    ids, mask = padded(m, lengths)
    t = decode.generate(m, ids, mask, max_new_tokens=new, generator=seeds(*range(len(lengths))), **options)
    for b, n in enumerate(lengths):
        alone = decode.generate(m, ids[b : b + 1, -n:], max_new_tokens=new, generator=seeds(b), **options)
        same(decode.Trajectory(*(x[b : b + 1] for x in t)), alone)


@pytest.mark.parametrize(
    "schedule, prompt, computed",
    [
        ("sdar", 6, [8, 4, 8, 4, 4, 4, 8, 4, 4, 4]),  # 2 masks beside the prompt's end, then two blocks of 4, one cut
        ("sdar", 8, [12, 4, 4, 4, 8, 4, 4, 4]),
        ("a2d", 6, [10, 4, 4, 4, 8, 4, 4, 4]),
    ],
)
def test_a_step_computes_one_block_and_its_first_one_two(qwen3, schedule, prompt, computed):
    m, lengths = in_blocks(qwen3["sdar"][0], 4), []
    hook = m.layers[0].register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
    ids, _ = padded(m, [prompt])
    decode.generate(m, ids, max_new_tokens=8, schedule=schedule, strategy="confidence", suppress=[305])
    hook.remove()
    assert lengths == computed


def test_blocks_of_one_token_are_a_causal_model(qwen3):
    m = in_blocks(qwen3["sdar"][0], 1)
    ids, _ = padded(m, [7])
    t = decode.generate(m, ids, max_new_tokens=6, schedule="sdar", suppress=range(305, 320))
    for r in range(6):
        ids = torch.cat((ids, torch.tensor([[m.config.mask_id]])), dim=1)
        ids[0, -1] = m(ids)[0, -1, :305].argmax()
        assert (int(t.response[0, r]), int(t.step[0, r])) == (int(ids[0, -1]), r)


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(schedule="sdar", block_length=8), "block_length 8, but .* has 4: set m.config.block_length"),
        (dict(schedule="a2d", block_length=2), "block_length 2, but .* has 4"),
        (dict(schedule="sdar", strategy="confidence", threshold=1.5), "threshold 1.5"),
        (dict(schedule="sdar", strategy="entropy", threshold=-1.0), "threshold -1.0"),
        (dict(schedule="sdar", tokens_per_step=2, steps=4), "tokens_per_step 2 and steps 4"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_together(qwen3, options, message):
    with pytest.raises(ValueError, match=message):
        decode.generate(in_blocks(qwen3["sdar"][0], 4), torch.tensor([[1, 2]]), max_new_tokens=8, **options)


def test_blocks_that_nobody_names(toy):
    with pytest.raises(ValueError, match="'sdar' needs a block_length"):
        decode.generate(toy(), torch.tensor([[1, 2]]), max_new_tokens=8, schedule="sdar")
