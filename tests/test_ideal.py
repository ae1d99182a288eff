"""Eq. 4 in baselines/ideal.py by enumeration of the states of a trajectory, its gradient in double precision, and the
masks of both readings of Eq. 1.

python -m pytest tests/test_ideal.py
"""

import itertools
import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_baselines import naive_nelbo
from test_objectives import before, close, fits, generators, make_batch, mean, number, quick, single

import baselines
import lora
import objectives

# ------------------------------------------------------------------------------------------------------------- Eq. 4


def log_p(m, row, visible):
    """log p(. | U) at every position of a row without padding, in the model's precision and with its graph: [N, V]."""
    prompt, response = row["prompt_ids"][0].tolist(), row["response_ids"][0].tolist()
    ids = prompt + [x if r in visible else m.config.mask_id for r, x in enumerate(response)]
    return m(torch.tensor([ids]))[0, len(prompt) :].log_softmax(-1)


def own_entropies(m, row, first, size):
    """h of each token of a window at its own step, in decode order; and the base model's: two tensors [W]."""
    order, h, base = row["order"][0].tolist(), [], []
    for step in range(first, first + size):
        r = order.index(step)
        logp = log_p(m, row, before(order, step))[r]
        h.append(-(logp.exp() * logp).sum())
        base.append(row["entropy"][0, r])
    return torch.stack(h), torch.stack(base)


def enumerated_kl(base, h, beta):
    """Eq. 6 by its definition: over all 2^W sets U, with Eq. 3 and 5."""
    sets = torch.tensor(list(itertools.product((0.0, 1.0), repeat=len(h))), dtype=h.dtype)  # [2^W, W]
    log_q, log_p_ = ((-beta * sets @ x.to(h.dtype)).log_softmax(0) for x in (base, h))
    return (log_q.exp() * (log_q - log_p_)).sum()


def naive_ideal(m, row, mask, first, size, weight, beta):
    """Eq. 4 for one row, with a mask of its own."""
    h, base = own_entropies(m, row, first, size)
    ce, kl = naive_nelbo(m, row, mask), enumerated_kl(base, h.double(), beta)
    return dict(loss=ce + weight * kl, ce=ce, kl=kl, entropy=h.mean())


def mask_of(m, batch, b):
    """What the first call of a model hid of a row."""
    P, n = batch["prompt_ids"].shape[1], int(batch["length"][b])
    return (m.calls[0][0][b, P : P + n] == m.config.mask_id).tolist()


small_batches = st.tuples(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.integers(0, 999))


@quick
@given(small_batches, st.none() | st.integers(2, 5), st.floats(0, 2), st.floats(0, 2))
def test_ideal_is_eq_4_by_enumeration_of_all_sets(toy, spec, window, weight, beta):
    """Rows of unequal lengths, the whole trajectory or a window of it."""
    lengths, seed = spec
    batch, m = make_batch(lengths, seed), toy(scale=0.5)
    first, size = torch.zeros_like(batch["length"]), batch["length"]
    if window:
        first, size = objectives.draw_windows(batch, window, generator=generators(seed)[0])
    options = dict(window=window, weight=weight, beta=beta, start=first)
    out = baselines.ideal(m, batch, generator=generators(seed)[0], **options)
    rows = []
    for b, (t, W) in enumerate(zip(first.tolist(), size.tolist())):
        rows.append(naive_ideal(toy(scale=0.5), single(batch, b), mask_of(m, batch, b), t, W, weight, beta))
    close(out, mean(rows))


@pytest.mark.parametrize("window", [None, 4, "global"])
def test_a_row_is_the_same_in_a_batch_and_alone(toy, window):
    batch, alone = make_batch([9, 1, 5]), []
    together = baselines.ideal(toy(scale=0.5), batch, window=window, generator=generators(1, 2, 3))
    for b, g in enumerate(generators(1, 2, 3)):
        alone.append(baselines.ideal(toy(scale=0.5), single(batch, b), window=window, generator=g))
    close(together, mean(alone), 1e-5)


@pytest.mark.parametrize("window", [None, 3])
def test_its_gradient_is_that_of_the_enumeration_in_double_precision(golden, window):
    m, slow = (golden.load().requires_grad_() for _ in range(2))
    slow.double()
    batch, weight, beta = make_batch([6, 3, 5], vocab=300), 0.7, 1.3
    first, size = torch.zeros(3, dtype=torch.long), batch["length"]
    if window:
        first, size = torch.tensor([2, 0, 1]), torch.tensor([3, 3, 3])
    mask = torch.tensor([[1, 0, 1, 1, 0, 0], [0, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 0]]).bool()
    out = baselines.ideal(m, batch, window=window, start=first, mask=mask, weight=weight, beta=beta)
    out["loss"].backward()
    total = 0.0
    for b in range(3):
        row, hidden = single(batch, b), mask[b].nonzero()[:, 0].tolist()
        visible = set(range(int(batch["length"][b]))) - set(hidden)
        surprise = -log_p(slow, row, visible)[hidden, row["response_ids"][0, hidden]]
        h, base = own_entropies(slow, row, int(first[b]), int(size[b]))
        total = total + (surprise.mean() + weight * enumerated_kl(base, h, beta)) / 3
    assert total.dtype == torch.float64
    total.backward()
    assert number(out["loss"]) == pytest.approx(number(total), rel=1e-5)
    for (name, p), q in zip(m.named_parameters(), slow.parameters()):
        assert q.grad.dtype == torch.float64 and q.grad.any(), name
        assert (p.grad - q.grad).norm() <= 1e-4 * q.grad.norm(), name


def test_at_the_base_model_only_eq_1_has_a_gradient(golden):
    m = lora.inject(golden.load(), rank=4, alpha=8, generator=generators(0)[0])
    batch = make_batch([7, 4], vocab=300)
    own = baselines.entropies_when_decoded(objectives.replay(m, batch), batch)  # by decode order
    batch["entropy"] = own.gather(1, objectives.decode_places(batch).argsort(1)).nan_to_num()
    gradients = []
    for weight in (0.0, 5.0):
        m.zero_grad()
        out = baselines.ideal(m, batch, weight=weight, generator=generators(1, 2))
        out["loss"].backward()
        assert abs(number(out["kl"])) < 1e-6
        gradients.append([p.grad.clone() for p in lora.tensors(m).values()])
    for one, two in zip(*gradients):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-4)


def test_one_pass_for_eq_1_and_one_for_each_step(toy):
    for window, passes in ((None, 9), (4, 4)):
        m = toy()
        baselines.ideal(m, make_batch([9]), window=window, generator=generators(0))
        assert len(m.calls) == 1 + passes


def test_ideal_refuses(toy):
    batch = make_batch([8, 5])
    with pytest.raises(ValueError, match="window 1: needs at least 2"):
        baselines.ideal(toy(), batch, window=1)
    with pytest.raises(ValueError, match="masks 'all' is none of ratio, subset"):
        baselines.ideal(toy(), batch, masks="all")
    with pytest.raises(ValueError, match=r"\[-1, 0\] of \[4, 4\] steps leave"):
        baselines.ideal(toy(), batch, window=4, start=torch.tensor([-1, 0]))
    del batch["entropy"]
    with pytest.raises(ValueError, match=r"ideal needs batch\['entropy'\]"):
        baselines.ideal(toy(), batch)


# --------------------------------------------------------------------------------------------------- the masks of Eq. 1

LOSSES = dict(nelbo=baselines.nelbo, ideal=baselines.ideal)
both = pytest.mark.parametrize("name", LOSSES)


def drawn(name, toy, lengths, masks, seeds):
    """What a loss hid of each row, by masks: bool [rows, N]."""
    m, batch = toy(), make_batch(lengths)
    for seed in seeds:
        LOSSES[name](m, batch, generator=generators(seed)[0], masks=masks)
    P, N = batch["prompt_ids"].shape[1], batch["response_ids"].shape[1]
    first = [ids for ids, *_ in m.calls][:: len(m.calls) // len(seeds)]  # the pass of Eq. 1
    return torch.cat([ids[:, P : P + N] == m.config.mask_id for ids in first])


@both
def test_every_subset_is_equally_likely(toy, name):
    hidden = drawn(name, toy, [5] * 1000, "subset", range(4))
    outcomes = [mask for mask in itertools.product([False, True], repeat=5) if any(mask)]
    assert fits(Counter(map(tuple, hidden.tolist())), outcomes, 4000)


@both
def test_the_number_of_masks_of_both_readings(toy, name):
    """Of 5 tokens: uniform in 1..5, or binomial and not 0."""
    expected = dict(ratio=[1 / 5] * 5, subset=[math.comb(5, k) / 31 for k in range(1, 6)])
    for masks, shares in expected.items():
        counts = Counter(drawn(name, toy, [5] * 1000, masks, range(4)).sum(1).tolist())
        assert set(counts) == {1, 2, 3, 4, 5}
        statistic = sum((counts[k] - 4000 * p) ** 2 / (4000 * p) for k, p in enumerate(shares, 1))
        assert statistic < 23.5  # chi-square of 4 degrees of freedom: 1 in 10,000


def test_the_moments_of_the_number_of_masks(toy):
    """Of 40 tokens: mean 20.5 and variance 133.25, or 20 and 10."""
    for masks, center, variance in (("ratio", 20.5, (40**2 - 1) / 12), ("subset", 20.0, 10.0)):
        counts = drawn("nelbo", toy, [40] * 1000, masks, range(4)).sum(1).double()
        assert float(counts.mean()) == pytest.approx(center, abs=4 * math.sqrt(variance / 4000))
        assert float(counts.var()) == pytest.approx(variance, rel=0.1)


def test_subsets_are_of_decoded_tokens_and_each_row_has_its_own(toy):
    batch = make_batch([9, 1, 6])
    batch["order"][0, 2:5] = -1
    mask = baselines.weighted.draw_subset(batch, generators(1, 2, 3))
    assert mask.any(1).all() and not mask[0, 2:5].any() and not mask[1, 1:].any() and not mask[2, 6:].any()
    for b, g in enumerate(generators(1, 2, 3)):
        n = int(batch["length"][b])
        assert torch.equal(baselines.weighted.draw_subset(single(batch, b), g)[0], mask[b, :n])
    batch["order"][1] = -1  # nothing to mask: no endless search
    assert not baselines.weighted.draw_subset(batch)[1].any()
    with pytest.raises(ValueError, match="every row needs a masked position"):
        baselines.nelbo(toy(), batch, masks="subset")


def test_masks_are_idle_beside_another_weighting():
    check = objectives.OBJECTIVES["nelbo"].check
    assert check(dict(weighting="mean")) == ("norm",) and check(dict(weighting="uniform")) == ("masks",)
