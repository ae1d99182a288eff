"""decode.py: the official trajectories, and a decoder in plain loops over the whole matrix of options.

python -m pytest tests/test_decode.py
"""

import itertools
import json
import math
import subprocess
import sys

import pytest
import torch
from helpers import FOLDER, ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import decode

PROMPT = torch.tensor([1, 5, 2, 7, 3])
SCHEDULES = ("dream", "llada")  # the others: test_sdar.py
OFFICIAL, RELEASE = [], []  # (family, number) of every case of the official decoders, and of the authors' release
for family in ("llada", "dream"):
    cases = json.loads((FOLDER / f"{family}-tiny" / "expected.json").read_text())["cases"]
    OFFICIAL += itertools.product([family], range(len(cases)))
    cases = json.loads((FOLDER / "release" / f"decode-{family}.json").read_text())
    RELEASE += itertools.product([family], range(len(cases)))
# The release counts the passes of a batch, also those in which a row has nothing to decode. That shows where rows need
# different numbers of passes for a block: in a batch with a threshold and several blocks.
COUNTED_FOR_THE_BATCH = [("llada", 16)]


def seeds(*numbers):
    return [torch.Generator().manual_seed(n) for n in numbers]


def one_row(t, b):
    """The trajectory of row b alone."""
    return decode.Trajectory(*(x[b : b + 1] for x in t))


def equal(a, b, fields=("response", "step", "order"), tolerance=1e-4):
    for name in fields:
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    for name in ("entropy", "confidence"):
        close = torch.allclose(getattr(a, name), getattr(b, name), rtol=0, atol=tolerance, equal_nan=True)
        assert close, name


# ------------------------------------------------------------------------------------------------ the plain decoder


def kept(logits, temperature, top_p, top_k):
    """logits [V] of one position after temperature, top_p and top_k, token by token."""
    logits = logits.clone()
    if temperature > 0:
        logits = logits / temperature
    if top_p is not None:
        total, remove = 0.0, False
        p = logits.softmax(-1).tolist()
        for token in sorted(range(len(p)), key=lambda v: -p[v]):
            if remove:
                logits[token] = torch.finfo(logits.dtype).min
            total += p[token]
            remove = total > top_p  # the token that crosses it stays
    if top_k is not None:
        least = sorted(logits.tolist())[-top_k]  # what equals it stays too
        logits[logits < least] = torch.finfo(logits.dtype).min
    return logits


def plain_choice(raw, r, s, given):
    """The token and the score of position r with the logits raw [V]; given: the token to take, or None."""
    raw = raw.clone()
    raw[list(s.suppress or ())] = -torch.inf
    token = int(kept(raw, s.temperature, s.top_p, s.top_k).argmax()) if given is None else int(given)
    raw[list(s.decode_last or ())] = -torch.inf
    p = raw.softmax(-1)
    largest = s.threshold is not None and (s.schedule == "dream" or s.strategy == "left")
    if largest:
        score = float(p.max())
    else:
        if s.schedule == "dream":
            p = kept(raw, s.temperature, s.top_p, s.top_k).softmax(-1)
        most = p.sort(descending=True).values
        of = dict(entropy=(p * torch.log(p + 1e-10)).sum(), confidence=p[token], margin=most[0] - most[1], left=-r)
        score = float(of[s.strategy])
    if token in (s.decode_last or ()) and (largest or s.strategy != "left"):
        score = -math.inf if s.strategy == "entropy" and not largest else 0.0
    return token, score


def plain_quota(s, i, each, masked):
    """How many of the masked positions step i of a block's steps decodes."""
    L = s.block_length or s.max_new_tokens
    if s.threshold is not None:
        return 1
    if s.tokens_per_step is not None:
        return s.tokens_per_step
    if s.schedule == "llada":
        return L // each + (i < L % each)
    if i == each - 1:
        return len(masked)
    t = torch.linspace(1, 1e-3, each + 1)
    return int(len(masked) * (1 - t[i + 1] / t[i]))


def naive(m, prompt, response=None, **options):
    """Decode one prompt [P] with all logits at every step. response: the tokens to take, instead of the best ones."""
    s = decode.Settings(**options)  # for its defaults
    P, N, mask_id = len(prompt), s.max_new_tokens, m.config.mask_id
    L, steps = s.block_length or N, s.steps or N
    each = steps // (N // L)
    ids = torch.cat((prompt, torch.full((N,), mask_id)))
    step_of, entropy, confidence = [steps] * N, [math.nan] * N, [math.nan] * N
    step = 0
    for block in range(N // L):
        if set(ids[P:].tolist()) & set(s.stop or ()):
            break
        for i in range(each):
            first = block * L if s.threshold is not None else 0
            masked = [r for r in range(first, (block + 1) * L) if ids[P + r] == mask_id]
            if not masked and (s.threshold is not None or s.tokens_per_step is not None):
                break  # the next block begins at once
            logits, candidates = m(ids[None])[0, P:].float(), []
            for r in masked:
                token, score = plain_choice(logits[r], r, s, None if response is None else response[r])
                candidates.append((-score, r, token))
            candidates.sort()  # ties: the leftmost first
            for place, (score, r, token) in enumerate(candidates):
                if place < plain_quota(s, i, each, masked) or (s.threshold is not None and -score >= s.threshold):
                    ids[P + r], step_of[r] = token, step
                    p = logits[r].softmax(-1)
                    entropy[r] = -sum(x * math.log(x) for x in p.tolist() if x > 0)
                    confidence[r] = float(p[token])
            step += 1
    ranked = sorted(range(N), key=lambda r: (step_of[r], math.inf if math.isnan(entropy[r]) else entropy[r], r))
    order = [ranked.index(r) for r in range(N)]
    return decode.Trajectory(ids[None, P:], *(torch.tensor([x]) for x in (step_of, order, entropy, confidence)))


# -------------------------------------------------------------------------------------------------- the trajectories


@pytest.mark.parametrize("golden, k", OFFICIAL, indirect=["golden"])
def test_official_trajectories(golden, k):
    case = golden.decode_cases[k]
    official = {name: golden.expected.get(f"decode.{k}.{name}") for name in ("prompt", "prompt_mask")}
    if golden.family == "llada":
        options = dict(strategy="confidence", schedule="llada", block_length=case["block"])
    else:
        names = dict(maskgit_plus="confidence", topk_margin="margin", entropy="entropy")
        options = dict(strategy=names[case["alg"]], top_p=case.get("top_p"))
    t = decode.generate(golden.load(), *official.values(), max_new_tokens=case["new"], steps=case["steps"], **options)
    equal(t, decode.Trajectory(*(golden.expected[f"decode.{k}.{name}"] for name in t._fields)))


@pytest.mark.parametrize("golden, k", RELEASE, indirect=["golden"])
def test_trajectories_of_the_release(golden, k):
    case = json.loads((FOLDER / "release" / f"decode-{golden.family}.json").read_text())[k]
    file = load_file(FOLDER / "release" / f"decode-{golden.family}.safetensors")
    prompt, mask = file[f"decode.{k}.prompt"], file.get(f"decode.{k}.prompt_mask")
    response, step = file[f"decode.{k}.response"], file[f"decode.{k}.step"]

    names = dict(maskgit_plus="confidence", llada_original="confidence", topk_margin="margin", entropy="entropy")
    names["credit"] = "confidence"
    threshold = case.get("threshold")
    if case.get("threshold_is_a_probability"):  # whose last bits differ between processors; equality has its own test
        threshold *= 1 - 1e-6
    options = dict(max_new_tokens=case["new"], strategy=names[case["alg"]], threshold=threshold)
    fixed = case.get("fixed", case.get("topk"))
    options |= dict(steps=case["steps"]) if fixed is None else dict(tokens_per_step=fixed)
    if golden.family == "dream":
        options |= dict(temperature=case["temperature"], top_p=case["top_p"], top_k=case.get("top_k"), greedy=True)
    else:
        options |= dict(schedule="credit" if case["alg"] == "credit" else "llada", block_length=case["block"])
        options |= dict(suppress=[case["eos"]]) if case.get("logits_eos_inf") else {}
        options |= dict(decode_last=[case["eos"]]) if case.get("confidence_eos_eot_inf") else {}
    t = decode.generate(golden.load(), prompt, mask, **options)

    assert torch.equal(t.response, response)
    ours = t.step.masked_fill(t.step == case["steps"], -1)  # -1 = never decoded
    waits = len(prompt) > 1 and case.get("threshold") and case.get("block", case["new"]) < case["new"]
    assert bool(waits) == ((golden.family, k) in COUNTED_FOR_THE_BATCH)
    if not waits:
        assert torch.equal(ours, step)
        return
    # A row that is done with a block waits for the others there. The release's step then depends on the other rows of
    # the batch; ours counts the row's own passes, each of which decodes something: the release's without the gaps.
    assert not torch.equal(ours, step)
    for b, official in enumerate(step):
        assert torch.equal(ours[b], official.unique(return_inverse=True)[1])
        own_mask = None if mask is None else mask[b : b + 1]
        alone = decode.generate(golden.load(), prompt[b : b + 1], own_mask, **options)
        assert torch.equal(ours[b], alone.step[0])


MATRIX = [
    dict(strategy=strategy, schedule=schedule, steps=steps, block_length=block, **chosen)
    for strategy, schedule, (steps, block), chosen in itertools.product(
        ("entropy", "confidence", "margin"),
        ("dream", "llada"),
        ((12, None), (6, 4), (3, 4), (5, None), (24, 4)),
        (dict(), dict(top_p=0.7), dict(top_p=0.9, top_k=3), dict(threshold=0.4)),
    )
]
MORE = [
    dict(strategy=strategy, schedule=schedule, block_length=block, **chosen)
    for strategy, schedule, block, chosen in itertools.product(
        ("entropy", "confidence", "margin", "left"),
        ("dream", "llada"),
        (None, 4),
        (
            dict(tokens_per_step=3),
            dict(tokens_per_step=1, temperature=0.7, top_p=0.9, greedy=True),
            dict(steps=9, temperature=0.7, top_k=4, greedy=True),
            dict(temperature=1.5, greedy=True, suppress=[0, 3, 7, 12]),
            dict(decode_last=[1, 4, 5, 8]),
            dict(decode_last=[1, 4, 5, 8], temperature=0.5, top_p=0.8, greedy=True, tokens_per_step=2),
            dict(threshold=0.3),
            dict(threshold=0.3, steps=6, decode_last=[1, 4], suppress=[12]),
            dict(stop=[1, 4, 5, 8]),
        ),
    )
]


def named(options):
    return "-".join(f"{k}={v}" for k, v in options.items())


EVERY = []  # one of five, spread over the matrix, runs always
for i, options in enumerate(MATRIX + MORE):
    EVERY.append(pytest.param(options, id=named(options), marks=[pytest.mark.slow] if i % 5 else []))


@pytest.mark.parametrize("options", EVERY)
def test_equals_the_plain_decoder(toy, options):
    m = toy()
    fast = decode.generate(m, PROMPT[None], max_new_tokens=12, **options)
    equal(fast, naive(m, PROMPT, max_new_tokens=12, **options))
    if "threshold" not in options and "stop" not in options:
        assert (fast.response != m.config.mask_id).all()


@pytest.mark.parametrize("top_p", [0.3, 0.95, 0.9999])
def test_top_p_over_a_large_flat_vocabulary(toy, top_p):
    m = toy(vocab=300, scale=0.3)  # far more tokens stay than a short list of the best ones holds
    options = dict(steps=4, top_p=top_p, temperature=0.9)
    t = decode.generate(m, PROMPT[None], max_new_tokens=6, generator=seeds(1)[0], **options)
    equal(t, naive(m, PROMPT, max_new_tokens=6, response=t.response[0], **options))


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("top_p", [None, 0.7])
@pytest.mark.parametrize("V", [10, 8192])
def test_what_equals_the_top_k_th_logit_stays(V, top_p, after, monkeypatch):
    """More equal ones than the best few that are looked at first, too: those places are looked at again."""
    monkeypatch.setattr(decode.Settings, "top_p_after_top_k", after)
    logits = torch.zeros(2, V)
    logits[:, :4], logits[1, 4:] = torch.tensor([3.0, 2.0, 2.0, 1.0]), -5.0
    s = decode.Settings(max_new_tokens=4, temperature=1.0, top_k=2 if top_p else 5, top_p=top_p)
    short = torch.zeros(2, dtype=torch.bool)
    decode.nucleus(logits, 1.0, s, 6, short)
    p, ids = decode.nucleus(logits, 1.0, s, None, torch.zeros_like(short))
    found = torch.zeros_like(logits).scatter(1, ids, p)
    wanted = logits.clone()
    if top_p and not after:  # a share of the whole vocabulary: of 8192 the best three are less than 0.7
        wanted = torch.stack([kept(row, 1.0, top_p, None) for row in logits])
    wanted = torch.stack([kept(row, 1.0, None, s.top_k) for row in wanted])
    if top_p and after:
        wanted = torch.stack([kept(row, 1.0, top_p, None) for row in wanted])
    torch.testing.assert_close(found, wanted.softmax(-1))
    assert short.tolist() == [not top_p, not top_p]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("strategy", ["entropy", "confidence", "margin"])
@pytest.mark.parametrize("chosen", [dict(top_p=0.8), dict(top_k=4), dict(top_p=0.9, top_k=3)], ids=str)
def test_scores_at_a_temperature(toy, strategy, schedule, chosen):
    """Dream's scores see temperature, top_p and top_k, LLaDA's do not; given the tokens, the order has to be the same.
    The confidence of a token that is not drawn yet is unknown: there the most probable token has to be the only one."""
    chosen = chosen if strategy != "confidence" else dict(top_k=1)
    options = dict(max_new_tokens=12, steps=8, strategy=strategy, schedule=schedule, temperature=0.7, **chosen)
    m = toy(seed=3)
    t = decode.generate(m, PROMPT[None], generator=seeds(7)[0], **options)
    equal(t, naive(m, PROMPT, response=t.response[0], **options))


@torch.no_grad()
def test_a_real_model_equals_the_plain_decoder(golden):
    m, prompt = golden.load(), golden.expected["decode.0.prompt"]
    for options in (dict(steps=8, block_length=8), dict(steps=16, threshold=0.02, schedule="llada")):
        fast = decode.generate(m, prompt, max_new_tokens=16, strategy="confidence", **options)
        equal(fast, naive(m, prompt[0], max_new_tokens=16, strategy="confidence", **options))


# ---------------------------------------------------------------------------------------------------------- batches

ROWS = [
    dict(),
    dict(strategy="confidence", schedule="llada", block_length=4),
    dict(temperature=0.8, top_p=0.9),
    dict(temperature=1.0, top_k=5, strategy="margin", schedule="llada"),
    dict(strategy="random", temperature=0.5),
    dict(threshold=0.02, strategy="confidence"),
    dict(threshold=0.02, strategy="confidence", block_length=4, temperature=0.9),
    dict(temperature=0.7),
    dict(strategy="left", temperature=1.0, top_p=0.95),
    dict(temperature=0.1, top_p=0.9, greedy=True, decode_last=[5, 301]),
]


@pytest.mark.parametrize("options", ROWS, ids=lambda o: "-".join(map(str, o.values())) or "default")
def test_each_row_of_a_padded_batch_equals_its_single_run(golden, options):
    m = golden.load()
    prompts = [golden.expected["logits.ids"][b, :n] for b, n in ((0, 11), (1, 4), (0, 7))]
    ids, mask = torch.full((3, 11), m.config.pad_id), torch.zeros(3, 11, dtype=torch.long)
    for b, prompt in enumerate(prompts):
        ids[b, 11 - len(prompt) :], mask[b, 11 - len(prompt) :] = prompt, 1
    options = dict(max_new_tokens=12, steps=9, **options)
    if options.get("block_length"):
        options["steps"] = 6
    batch = decode.generate(m, ids, mask, generator=seeds(4, 5, 6), **options)
    for b, prompt in enumerate(prompts):
        single = decode.generate(m, prompt[None], generator=seeds(4 + b), **options)
        equal(one_row(batch, b), single)


def test_padding_that_is_not_there_is_no_padding(toy):
    m = toy()
    ids = torch.stack((PROMPT, PROMPT.flip(0)))
    a = decode.generate(m, ids, max_new_tokens=6, steps=6)
    equal(a, decode.generate(m, ids, torch.ones_like(ids).bool(), max_new_tokens=6, steps=6))
    assert all(mask is None for _, mask, _ in m.calls)


# ------------------------------------------------------------------------------------------------------- the schedule


def per_step(t, steps):
    return torch.bincount(t.step[0], minlength=steps).tolist()


@pytest.mark.parametrize(
    "tokens, steps, first, middle, last",
    [
        (256, 256, [0], 1, [2]),
        (512, 512, [0], 1, [2]),
        (768, 768, [0], 1, [2]),
        (1024, 1024, [0, 0], 1, [3]),
        (1280, 1280, [0, 0], 1, [3]),
        (256, 128, [1], 2, [3]),
    ],
)
def test_tokens_per_step_of_dream(toy, tokens, steps, first, middle, last):
    count, expected = torch.tensor([tokens]), first + [middle] * (steps - len(first) - 1) + last
    for i, n in enumerate(expected):
        assert decode.Settings(tokens, steps).quota(torch.tensor([i]), count).tolist() == [n], i
        count = count - n
    assert count == 0
    if tokens <= 256:  # the whole loop, once
        m = fixed(torch.tensor([1.0, 0.0, -50.0]).expand(tokens, 3))
        t = decode.generate(m, PROMPT[None, :1], mask_id=2, max_new_tokens=tokens, steps=steps)
        assert per_step(t, steps) == expected


@pytest.mark.parametrize(
    "tokens, steps, block, expected",
    [
        (24, 15, 8, [2, 2, 2, 1, 1] * 3),
        (8, 3, None, [3, 3, 2]),
        (8, 8, 4, [1] * 8),
        (4, 10, None, [1] * 4 + [0] * 6),
    ],
)
def test_tokens_per_step_of_llada(toy, tokens, steps, block, expected):
    t = decode.generate(toy(), PROMPT[None], max_new_tokens=tokens, steps=steps, schedule="llada", block_length=block)
    assert per_step(t, steps) == expected


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("threshold, expected", [(1.0, [1] * 12), (0.0, [4] * 3)])
def test_threshold_at_its_ends(toy, schedule, threshold, expected):
    options = dict(max_new_tokens=12, block_length=4, strategy="confidence", schedule=schedule, threshold=threshold)
    assert per_step(decode.generate(toy(), PROMPT[None], **options), 1) == expected


def test_with_a_threshold_steps_are_the_most_that_are_taken(toy):
    options = dict(max_new_tokens=12, steps=6, block_length=4, threshold=1.0)
    t = decode.generate(toy(), PROMPT[None], **options)
    assert per_step(t, 6) == [1] * 6 + [6]  # the other six are never decoded
    assert (t.response == toy().config.mask_id).sum(1).tolist() == [6]
    for block in t.step[0].view(3, 4):
        assert (block < 6).sum() == 2  # no later block decodes what one has left


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_probability_equal_to_the_threshold_reaches_it(schedule):
    m = fixed(torch.tensor([[0.0, 0.0, -torch.inf], [0.0, -0.1, -torch.inf], [0.0, 0.0, -torch.inf]]))
    options = dict(max_new_tokens=3, strategy="confidence", schedule=schedule, threshold=0.5)
    assert decode.generate(m, PROMPT[None, :1], mask_id=2, **options).step.tolist() == [[0, 0, 0]]


def test_dream_ignores_the_strategy_beside_a_threshold_and_llada_compares_its_score(toy):
    options = dict(max_new_tokens=12, threshold=0.3)
    one, *others = (decode.generate(toy(), PROMPT[None], strategy=x, **options) for x in decode.STRATEGIES)
    for other in others:
        equal(one, other)
    options |= dict(schedule="llada")
    entropy, margin = (decode.generate(toy(), PROMPT[None], strategy=x, **options) for x in ("entropy", "margin"))
    assert per_step(entropy, 1) == [1] * 12  # minus an entropy is never positive
    assert len(per_step(margin, 1)) < 12


@pytest.mark.parametrize(
    "tokens, block, each, expected",
    [
        (12, None, 2, [2] * 6),
        (12, None, 5, [5, 5, 2]),
        (12, 4, 3, [3, 1] * 3),  # a block ends before the next one begins
        (12, 4, 9, [4] * 3),
    ],
)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_exactly_so_many_tokens_each_step(toy, schedule, tokens, block, each, expected):
    m = toy()
    options = dict(max_new_tokens=tokens, block_length=block, tokens_per_step=each, schedule=schedule)
    assert per_step(decode.generate(m, PROMPT[None], **options), 1) == expected
    assert len(m.calls) == len(expected)


def test_left_decodes_from_left_to_right(toy):
    t = decode.generate(toy(), PROMPT[None], max_new_tokens=6, strategy="left", schedule="llada")
    assert t.step.tolist() == [[0, 1, 2, 3, 4, 5]]
    t = decode.generate(toy(), PROMPT[None], max_new_tokens=6, strategy="left", tokens_per_step=2)
    assert t.step.tolist() == [[0, 0, 1, 1, 2, 2]]


@pytest.mark.parametrize("strategy", ["entropy", "confidence", "margin"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_positions_of_the_last_tokens_are_decoded_last(strategy, schedule):
    logits = torch.tensor([9.0, 0.0, 0.0, -50.0]).repeat(6, 1)
    logits[[1, 4]] = torch.tensor([0.0, 1.0, 0.5, -50.0])  # unsure, but of something else than token 0
    options = dict(max_new_tokens=6, mask_id=3, strategy=strategy, schedule=schedule, tokens_per_step=1)
    t = decode.generate(fixed(logits), PROMPT[None, :1], decode_last=[0], **options)
    assert t.response.tolist() == [[0, 1, 0, 0, 1, 0]]  # they are still what the positions are given
    assert t.step.tolist() == [[2, 0, 3, 4, 1, 5]]
    t = decode.generate(fixed(logits), PROMPT[None, :1], **options)
    assert t.step.tolist() == [[0, 4, 1, 2, 5, 3]]


def test_a_row_stops_after_the_block_that_holds_a_stop_token():
    logits = torch.zeros(9, 5)
    logits[:, 1], logits[4, 2], logits[:, 4] = 3.0, 9.0, -50.0  # token 2 is in the second block of three
    options = dict(max_new_tokens=9, mask_id=4, block_length=3)
    t = decode.generate(fixed(logits), PROMPT[None, :1], stop=[2, 3], **options)
    assert t.response.tolist() == [[1, 1, 1, 1, 2, 1, 4, 4, 4]]
    assert (t.step[0, 6:] == 9).all() and t.entropy[0, 6:].isnan().all()
    for other in (dict(stop=[3]), dict(stop=()), dict()):
        assert decode.generate(fixed(logits), PROMPT[None, :1], **other, **options).response.tolist()[0][6:] == [1] * 3


@pytest.mark.parametrize("more", [dict(), dict(temperature=0.8), dict(strategy="random")], ids=str)
def test_rows_stop_each_for_itself(toy, more):
    """Rows that go on keep their own generators."""
    prompts = torch.stack([PROMPT, PROMPT.flip(0), PROMPT + 1])
    options = dict(max_new_tokens=12, block_length=3, stop=[8, 11], tokens_per_step=1, **more)
    t = decode.generate(toy(), prompts, generator=seeds(1, 2, 3), **options)
    decoded = (t.step < 12).sum(1)
    assert decoded[0] < decoded[1:].max()
    for b in range(3):
        equal(decode.generate(toy(), prompts[b : b + 1], generator=seeds(1 + b), **options), one_row(t, b))


def test_greedy_at_a_temperature_takes_the_best_token_and_ranks_by_the_tempered_score(toy):
    warm = dict(max_new_tokens=12, temperature=0.7, top_p=0.8)
    a = decode.generate(toy(), PROMPT[None], greedy=True, generator=seeds(1)[0], **warm)
    equal(a, decode.generate(toy(), PROMPT[None], greedy=True, generator=seeds(2)[0], **warm))
    # LLaDA's score is untempered: greedy is temperature 0
    cold = dict(max_new_tokens=12, schedule="llada", strategy="confidence")
    equal(
        decode.generate(toy(), PROMPT[None], greedy=True, temperature=2.0, **cold),
        decode.generate(toy(), PROMPT[None], **cold),
    )


def test_parts_of_a_step_change_nothing(toy, monkeypatch):
    prompts = torch.stack([PROMPT, PROMPT.flip(0)])
    for options in (dict(), dict(temperature=0.8), dict(temperature=0.8, top_p=0.9), dict(threshold=0.3)):
        run = dict(max_new_tokens=12, steps=8, **options)
        whole = decode.generate(toy(), prompts, generator=seeds(1, 2), **run)
        with monkeypatch.context() as patch:
            patch.setattr(decode, "CACHED", 3 * 13)  # three positions at a time
            equal(decode.generate(toy(), prompts, generator=seeds(1, 2), **run), whole)


def test_few_logits_are_copied_at_once(monkeypatch):
    """Of a model without a head of its own, whose logits are all there, however many are looked at again or decoded."""
    logits, copied, pieces = torch.randn(24, 200, generator=seeds(0)[0]) * 0.1, [], decode.pieces

    def spy(x, *more):
        copied.append(len(x) * (x.shape[1] == 1))  # places; those of all rows are no copy
        return pieces(x, *more)

    run = dict(mask_id=199, max_new_tokens=24, steps=1, temperature=1.0, top_p=0.95, suppress=[199])
    whole = decode.generate(fixed(logits), PROMPT[None, :1], generator=seeds(1)[0], **run)
    monkeypatch.setattr(decode, "CACHED", 3 * 200)
    monkeypatch.setattr(decode, "pieces", spy)
    equal(decode.generate(fixed(logits), PROMPT[None, :1], generator=seeds(1)[0], **run), whole)
    assert copied == [0] + [3] * 16  # 24 that need more than 64 tokens, and 24 for the log


def test_logits_of_some_rows_at_a_time_change_nothing(golden, monkeypatch):
    m, prompts, rows = golden.load(), torch.arange(10, 25).reshape(3, 5), []
    m.norm.register_forward_hook(lambda _, inputs, output: rows.append(len(output)))
    whole_head = m.unembed

    def unembed(x):
        rows.append(len(x))
        return whole_head(x)

    for options in (dict(strategy="margin"), dict(temperature=0.8, top_p=0.9), dict(threshold=0.01, steps=None)):
        run = dict(dict(max_new_tokens=12, steps=8), **options)
        whole = decode.generate(m, prompts, generator=seeds(1, 2, 3), **run)
        with monkeypatch.context() as patch:
            patch.setattr(decode, "HELD", 1)  # one row at a time
            patch.setattr(m, "unembed", unembed)
            rows.clear()
            found = decode.generate(m, prompts, generator=seeds(1, 2, 3), **run)
        assert rows[:4] == [3, 1, 1, 1]  # the body of all rows, then the head row by row
        assert torch.equal(found.response, whole.response) and torch.equal(found.step, whole.step)
        torch.testing.assert_close(found.entropy, whole.entropy)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 99), V=st.sampled_from([4096, 8192, 8200, 100]), n=st.sampled_from([1, 7, 64]))
def test_the_best_tokens_are_found_by_groups(seed, V, n):
    g = seeds(seed)[0]
    x = torch.randn(3, V, generator=g)
    x[0].round_()  # many ties
    x[1, :70] += 9  # most of the best are neighbours
    values, ids = decode.best_of(x, n)
    assert torch.equal(values, x.topk(n).values)
    assert torch.equal(x.gather(1, ids), values)
    assert all(len(set(row)) == n for row in ids.tolist())
    assert torch.equal(decode.argmax(x), x.argmax(-1))


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 99), scale=st.sampled_from([0.1, 1.0, 10.0]), temperature=st.sampled_from([0.1, 1.0]),
    first=st.sampled_from([2, 64, None]),
)  # fmt: skip
def test_top_p_of_a_large_vocabulary(seed, scale, temperature, first):
    """Whatever is left out of its sums, the distribution is that of a sort, or it is said to be short."""
    x, short = torch.randn(4, 8192, generator=seeds(seed)[0]) * scale, torch.zeros(4, dtype=torch.bool)
    s = decode.Settings(4, temperature=temperature, top_p=0.9)
    p, ids = decode.nucleus(x, temperature, s, first, short)
    assert not (first is None and short.any())
    x, ids, p = x[~short], ids[~short], p[~short]
    found = torch.zeros_like(x).scatter(1, ids, p)
    best, order = (x.double() / temperature).softmax(-1).sort(descending=True)
    before = best.cumsum(-1) - best
    expected = best * (before <= 0.9)
    expected = (expected / expected.sum(-1, keepdim=True)).float()
    clear = (before - 0.9).abs() > 1e-4  # in float32, a token whose sum is as close as this may fall either way
    found = found.gather(1, order)
    torch.testing.assert_close(found[clear], expected[clear], atol=1e-6, rtol=1e-3)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 99), last=st.sampled_from([None, (3, 4095)]), first=st.sampled_from([1, 5, 64]))
def test_places_that_need_more_tokens_are_looked_at_again(seed, last, first):
    """Some places have a flat distribution and others a steep one; what is drawn is what all tokens at once give."""
    x = torch.randn(2, 3, 4096, generator=seeds(seed)[0]) * torch.tensor([0.1, 1.0, 20.0])[:, None]
    noise = torch.rand(2, 3, generator=seeds(seed + 1)[0])
    s = decode.Settings(4, temperature=0.7, top_p=0.9, decode_last=last)
    token, score = decode.choose(x, None, 4096, noise, s, first)
    all_at_once, expected = decode.choose(x, None, 4096, noise, s, 4096)
    assert torch.equal(token, all_at_once)
    torch.testing.assert_close(score, expected)


def test_threshold_unmasks_all_above_it_and_the_best_below_it():
    probability = torch.tensor([0.55, 0.9, 0.6, 0.95, 0.5001, 0.8])
    logits = torch.stack((probability.log(), (1 - probability).log(), torch.full((6,), -50.0)), dim=-1)
    m = fixed(logits)
    t = decode.generate(m, PROMPT[None, :1], mask_id=2, max_new_tokens=6, steps=6, strategy="confidence", threshold=0.7)
    assert t.step.tolist() == [[2, 0, 1, 0, 3, 0]]
    assert t.order.tolist() == [[4, 1, 3, 0, 5, 2]]
    torch.testing.assert_close(t.confidence[0], probability)


# ------------------------------------------------------------------------------------------- what a trajectory means


def fixed(logits, P=1):
    """A model of the logits [N, V] of a response after a prompt of P tokens, whatever the response is."""

    def m(ids, attention_mask=None, positions=None):
        return logits[positions - P]

    return m


def test_ties_go_to_the_leftmost():
    m = fixed(torch.tensor([1.0, 0.0, -50.0]).expand(8, 3))
    for strategy in ("entropy", "confidence", "margin"):
        t = decode.generate(
            m, PROMPT[None, :1], mask_id=2, max_new_tokens=8, steps=4, strategy=strategy, schedule="llada"
        )
        assert t.step.tolist() == [[0, 0, 1, 1, 2, 2, 3, 3]]
        assert t.order.tolist() == [list(range(8))]
        assert t.response.tolist() == [[0] * 8]


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 99),
    strategy=st.sampled_from(decode.STRATEGIES),
    schedule=st.sampled_from(SCHEDULES),
    blocks=st.sampled_from([1, 2, 3]),
    steps=st.integers(1, 5),
    threshold=st.none() | st.floats(0, 1),
    temperature=st.sampled_from([0.0, 0.1, 1.0]),
    top_p=st.none() | st.floats(0.01, 1),
    mask_logit=st.sampled_from([-30.0, 2.0]),
)
def test_order_is_a_permutation_by_step_and_entropy(
    toy, seed, strategy, schedule, blocks, steps, threshold, temperature, top_p, mask_logit
):
    m = toy(seed=seed, mask_logit=mask_logit)  # a high mask_logit: some positions stay masked
    t = decode.generate(
        m, torch.stack((PROMPT, PROMPT.flip(0))), max_new_tokens=12, steps=steps * blocks, strategy=strategy,
        schedule=schedule, block_length=12 // blocks, threshold=threshold, temperature=temperature, top_p=top_p,
        generator=seeds(seed, seed + 1),
    )  # fmt: skip
    for response, step, order, entropy, confidence in zip(*(x.tolist() for x in t)):
        done = [r for r in range(12) if response[r] != m.config.mask_id]
        ranked = sorted(done, key=lambda r: (step[r], entropy[r], r))
        assert [order[r] for r in ranked] == list(range(len(done)))  # what is still masked comes last
        assert sorted(order) == list(range(12))
        assert all(0 <= entropy[r] <= math.log(13) + 1e-5 and 0 < confidence[r] <= 1 for r in done)
        end = max((step[r] for r in done), default=-1)
        assert end < steps * blocks  # with a threshold too: a position that is given the mask token takes a step
        assert all(step[r] > end for r in range(12) if r not in done)  # never decoded: later than every step


def test_positions_given_the_mask_token_stay_masked_unless_suppressed(toy):
    for options in (dict(), dict(schedule="llada"), dict(threshold=0.3, block_length=3)):
        m = toy(mask_logit=30.0)
        options = dict(max_new_tokens=6, steps=6, **options)
        t = decode.generate(m, PROMPT[None], **options)
        assert (t.response == m.config.mask_id).all() and len(m.calls) <= 6
        assert sorted(t.order[0].tolist()) == list(range(6))
        suppressed = [m.config.mask_id, 0, 4, 6]
        for temperature in (0.0, 2.0):
            t = decode.generate(m, PROMPT[None], suppress=suppressed, temperature=temperature, **options)
            assert not torch.isin(t.response, torch.tensor(suppressed)).any()


def test_a_row_that_waits_in_a_step_runs_no_model_and_draws_nothing(toy):
    """Otherwise its tokens would depend on the rows beside it, which may have more to decode."""
    m, generators = toy(), seeds(1, 2)
    before = generators[1].get_state()
    run = decode.Run(m, 2, 12, decode.Settings(6, temperature=1.0), PROMPT.device)
    run.fit(5)
    for row in range(2):
        run.put(row, PROMPT, generators[row])
    run.step(run.candidates(), torch.tensor([6, 6]), torch.tensor([2, 0]))
    assert (run.response != 12).sum(1).tolist() == [2, 0]
    assert [len(ids) for ids, _, _ in m.calls] == [1]
    assert torch.equal(generators[1].get_state(), before)


def test_suppressing_nothing_is_allowed(toy):
    for nothing in ([], (), range(5, 5), torch.tensor([], dtype=torch.long)):
        equal(
            decode.generate(toy(), PROMPT[None], max_new_tokens=4, steps=4, suppress=nothing),
            decode.generate(toy(), PROMPT[None], max_new_tokens=4, steps=4),
        )


def test_the_log_is_untempered_and_over_the_whole_vocabulary(toy):
    """Whatever the sampling options, entropy and confidence are those of the model's own distribution."""
    m = toy(seed=5)
    t = decode.generate(
        m, PROMPT[None], max_new_tokens=1, steps=1, temperature=0.1, top_p=0.5, top_k=2, suppress=[12, 3]
    )
    p = m(torch.cat((PROMPT, torch.tensor([12])))[None])[0, -1].softmax(-1)
    assert float(t.entropy) == pytest.approx(-float((p * p.log()).sum()), abs=1e-5)
    assert float(t.confidence) == pytest.approx(float(p[t.response]), abs=1e-5)


def test_the_prompt_never_changes_even_if_it_holds_the_mask_token(toy):
    m = toy()
    ids = torch.tensor([[1, m.config.mask_id, 2], [m.config.mask_id, 3, m.config.mask_id]])
    before = ids.clone()
    t = decode.generate(m, ids, max_new_tokens=6, steps=6, temperature=1.0)
    assert torch.equal(ids, before)
    assert all(torch.equal(seen[:, :3], before) for seen, _, _ in m.calls)
    assert (t.response != m.config.mask_id).all()


@pytest.mark.parametrize("options", [dict(), dict(schedule="llada", steps=40), dict(threshold=0.2)], ids=str)
def test_one_call_for_every_step_that_unmasks_and_none_after_the_last(toy, options):
    m, seen = toy(), []
    options = dict(max_new_tokens=10, steps=10) | options
    t = decode.generate(
        m, PROMPT[None], on_step=lambda *step: seen.append([step[0], step[1].clone(), step[2].clone()]), **options
    )
    assert [step for step, _, _ in seen] == sorted(set(t.step[0].tolist()))
    assert len(m.calls) == len(seen)
    for step, response, entropy in seen:
        done = t.step <= step
        assert torch.equal(response, t.response.where(done, m.config.mask_id))
        assert torch.equal(entropy[done], t.entropy[done]) and entropy[~done].isnan().all()
    for ids, _, positions in m.calls:  # the output head is asked for what is masked, and for nothing else
        assert torch.equal(positions[0], (ids[0] == m.config.mask_id).nonzero()[:, 0])


def test_generate_leaves_no_graph(golden):
    t = decode.generate(golden.load(), golden.expected["decode.0.prompt"], max_new_tokens=2, steps=2)
    assert not t.entropy.requires_grad


# --------------------------------------------------------------------------------------------------------- sampling


def chi_square(counts, p):
    """Pearson's statistic over the tokens that can occur; the others must not."""
    expected = p * counts.sum()
    assert counts[p == 0].sum() == 0
    return float(((counts - expected)[p > 0] ** 2 / expected[p > 0]).sum())


LOGITS = torch.tensor([2.0, 1.5, 1.0, 0.0, -0.5, -1.0, -9.0])


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    "options, tokens",
    [
        (dict(temperature=1.0), 7),
        (dict(temperature=0.5), 7),
        (dict(temperature=2.0, top_k=3), 3),
        (dict(temperature=1.0, top_p=0.8), 3),  # 0.47 + 0.28 < 0.8 < 0.47 + 0.28 + 0.17: the third one crosses it
        (dict(temperature=1.0, top_p=0.4), 1),
        (dict(temperature=1.0, top_p=1.0), 7),
    ],
    ids=str,
)
def test_tokens_are_drawn_from_the_tempered_distribution(schedule, options, tokens):
    m = fixed(LOGITS.expand(4000, 7))
    t = decode.generate(
        m, PROMPT[None, :1], mask_id=99, max_new_tokens=4000, steps=1, schedule=schedule, generator=seeds(1)[0],
        **options,
    )  # fmt: skip
    p = torch.zeros(7)
    p[:tokens] = (LOGITS / options["temperature"])[:tokens].softmax(-1)
    assert chi_square(torch.bincount(t.response[0], minlength=7), p) < 25  # 6 degrees of freedom: p = 0.0003


def test_random_strategy_is_uniform_and_greedy(toy):
    m = fixed(LOGITS.expand(2, 7))
    first = [
        int(
            decode.generate(
                m, PROMPT[None, :1], mask_id=99, max_new_tokens=2, steps=2, strategy="random", schedule="llada",
                generator=seeds(seed)[0],
            ).step[0, 0]
        )
        for seed in range(200)
    ]  # fmt: skip
    assert abs(sum(first) - 100) < 28  # four standard deviations
    t = decode.generate(toy(), PROMPT[None], max_new_tokens=1, steps=1, strategy="random")
    assert torch.equal(t.response, naive(toy(), PROMPT, max_new_tokens=1).response)


@pytest.mark.parametrize("options", [dict(temperature=1.0), dict(strategy="random")], ids=str)
def test_chance_comes_from_the_generator_alone(toy, options):
    def run(generator, noise):
        torch.manual_seed(noise)
        return decode.generate(
            toy(), PROMPT[None], max_new_tokens=12, steps=12, schedule="llada", generator=generator, **options
        )

    a = run(seeds(1)[0], 0)
    equal(a, run(seeds(1)[0], 9))
    assert not torch.equal(a.step, run(seeds(2)[0], 0).step)


# ----------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(max_new_tokens=0), "^max_new_tokens 0 must be at least 1$"),
        (dict(steps=0), "^steps 0 must be at least 1$"),
        (dict(block_length=0), "^block_length 0 must"),
        (dict(block_length=-4), "^block_length -4 must"),
        (dict(block_length=5), "block_length 5 .* 12; nearest below: 4"),
        (dict(block_length=24), "block_length 24 .* 12; nearest below: 12"),
        (dict(block_length=4, steps=8), "steps 8 .* 3 blocks of 4"),
        (dict(block_length=4, steps=2, threshold=0.5), "steps 2 .* 3 blocks of 4"),
        (dict(strategy="entrpy"), "entrpy.*entropy, confidence, margin, random, left"),
        (dict(schedule="cosine"), "cosine.*dream, llada"),
        (dict(temperature=-1.0), "^temperature -1.0 must be 0, or a number of at least 1e-06$"),
        (dict(temperature=1e-38), "^temperature 1e-38 must be 0, or"),
        (dict(temperature=math.nan), "^temperature nan must"),
        (dict(top_p=0.0), "^top_p 0.0 must be above 0 and at most 1$"),
        (dict(top_p=1.5), "^top_p 1.5 must"),
        (dict(top_k=0), "^top_k 0 must be at least 1$"),
        (dict(threshold=1.1), "threshold 1.1"),
        (dict(suppress=[3, -1]), "^suppress holds -1"),
        (dict(steps=None, tokens_per_step=0), "^tokens_per_step 0 must be at least 1$"),
        (dict(tokens_per_step=2), "^tokens_per_step 2 and steps 12: give one of them$"),
        (dict(steps=None, tokens_per_step=2, threshold=0.5), "^tokens_per_step 2 and threshold 0.5: give one of them$"),
        (dict(prompt_mask=torch.ones(1, 4)), r"\[1, 4\].*\[1, 5\]"),
        (dict(prompt_mask=torch.tensor([[1, 1, 1, 0, 0]])), "left"),
        (dict(generator=[None, None]), "generator"),
        (dict(generator=[]), "generator"),
    ],
    ids=lambda x: None if isinstance(x, str) else "-".join(x),
)
def test_settings_that_do_not_fit_together(toy, options, message):
    m = toy()
    with pytest.raises(ValueError, match=message):
        decode.generate(m, PROMPT[None], **(dict(max_new_tokens=12, steps=12) | options))
    assert not m.calls


@pytest.mark.parametrize("name", ["suppress", "decode_last"])
def test_ids_beyond_the_vocabulary(toy, name):
    with pytest.raises(ValueError, match="holds 13; the model has 13 tokens"):
        decode.generate(toy(), PROMPT[None], max_new_tokens=4, **{name: [2, 13]})


@pytest.mark.parametrize(
    "answer, got",
    [
        (lambda ids, positions: torch.zeros(*ids.shape, 13), r"Tensor \[2, 17, 13\]"),  # positions are ignored
        (lambda ids, positions: torch.zeros(len(ids), 13), r"Tensor \[2, 13\]"),
        (lambda ids, positions: dict(logits=None), r"dict \[\]"),
    ],
)
def test_a_model_that_returns_something_else(answer, got):
    with pytest.raises(ValueError, match=rf"^the model returned {got} for positions \[2, 12\], not \[2, 12, V\]$"):
        decode.generate(
            lambda ids, attention_mask=None, positions=None: answer(ids, positions),
            torch.stack((PROMPT, PROMPT)), mask_id=12, max_new_tokens=12, tokens_per_step=2,
        )  # fmt: skip


def test_a_method_called_unembed_is_no_contract(toy):
    class Stranger(toy):
        def unembed(self, x):
            raise AssertionError("nobody asked for it")

    options = dict(max_new_tokens=6, steps=6)
    equal(decode.generate(Stranger(), PROMPT[None], **options), decode.generate(toy(), PROMPT[None], **options))


def test_last_is_the_old_name_of_decode_last(toy):
    ids, options = [1, 4, 5, 8], dict(max_new_tokens=12, tokens_per_step=2)
    new, old = (decode.generate(toy(), PROMPT[None], **{name: ids}, **options) for name in ("decode_last", "last"))
    equal(new, old)
    assert not torch.equal(new.step, decode.generate(toy(), PROMPT[None], **options).step)
    with pytest.raises(TypeError, match="'last'"):
        decode.generate(toy(), PROMPT[None], decode_last=ids, last=ids, **options)


def test_a_schedule_is_a_class_of_settings(toy, monkeypatch):
    class Halves(decode.LLaDA):
        def share(self, i, count):
            return (count + 1) // 2

    monkeypatch.setitem(decode.SCHEDULES, "halves", Halves)
    assert type(decode.Settings(12, schedule="halves")) is Halves
    assert per_step(decode.generate(toy(), PROMPT[None], max_new_tokens=12, schedule="halves"), 1) == [6, 3, 2, 1]


def test_a_share_is_cut_to_what_is_masked(toy, monkeypatch):
    """Whatever a schedule asks for, only masked positions are written, and a row's share is no other's."""

    class Odd(decode.LLaDA):
        def share(self, i, count):
            return torch.tensor([4, -1, 2])

    monkeypatch.setitem(decode.SCHEDULES, "odd", Odd)
    seen, prompts = [], torch.stack([PROMPT, PROMPT.flip(0), PROMPT + 1])
    options = dict(max_new_tokens=10, steps=10, block_length=5, schedule="odd")
    t = decode.generate(toy(), prompts, on_step=lambda step, response, _: seen.append(response.clone()), **options)
    assert [torch.bincount(row, minlength=8).tolist()[:8] for row in t.step] == [
        [4, 1, 0, 0, 0, 4, 1, 0], [0] * 8, [2, 2, 1, 0, 0, 2, 2, 1],
    ]  # fmt: skip
    for before, after in zip(seen, seen[1:]):
        assert (after == before)[before != 12].all()


def test_a_schedule_of_another_folder_is_found_or_missed_by_name(monkeypatch):
    monkeypatch.setitem(decode.ELSEWHERE, "other", "no_such_folder")
    with pytest.raises(ValueError, match="^schedule 'other' needs the folder no_such_folder beside decode.py"):
        decode.Settings(12, schedule="other")
    code = "import sys, decode; assert 'blocks' not in sys.modules; print(decode.Settings(8, schedule='a2d').max_steps)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "8\n", done.stderr


def test_settings_check_themselves_without_a_model():
    assert decode.Settings(max_new_tokens=12, suppress=torch.tensor([3, 1])).suppress == (3, 1)
    assert decode.Settings(12, decode_last=range(2)) == decode.Settings(12, decode_last=[0, 1])
    with pytest.raises(ValueError, match="top_k 0"):
        decode.Settings(max_new_tokens=12, top_k=0)
    for call in (decode.Settings, lambda **options: decode.generate(None, PROMPT[None], **options)):
        with pytest.raises(TypeError, match="temperatur"):
            call(max_new_tokens=12, temperatur=1.0)
        with pytest.raises(TypeError, match="max_new_tokens"):
            call(steps=12)


def test_rows_that_are_done_leave_the_batch(toy):
    sizes = []

    class Counting(toy):
        def __call__(self, ids, attention_mask=None, positions=None):
            sizes.append(len(ids))
            return super().__call__(ids, attention_mask, positions)

    prompts = torch.stack([PROMPT, PROMPT.flip(0), PROMPT + 1])
    options = dict(max_new_tokens=12, steps=12, threshold=0.6, block_length=6)
    t = decode.generate(Counting(), prompts, **options)
    assert len(set(sizes)) > 1 and sum(sizes) == sum(int(row.max()) + 1 for row in t.step)  # no pass that is not needed
    for b in range(3):
        equal(decode.generate(toy(), prompts[b : b + 1], **options), one_row(t, b))


def test_a_model_that_forbids_a_token_has_an_entropy(toy):
    """Other people's models say -inf for it."""
    prompt, options = torch.tensor([[1, 2]]), dict(max_new_tokens=6, steps=6, schedule="llada")
    low, never = (decode.generate(toy(mask_logit=x), prompt, **options) for x in (-1e4, -torch.inf))
    assert never.entropy.isfinite().all()
    for a, b in zip(low, never):
        torch.testing.assert_close(a, b)
