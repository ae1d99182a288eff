"""The rankings of a window in objectives.py, as functions of its entropies: Eq. 8 by a double loop, Eq. 3 to 6 by
enumeration of all 2^W sets, Plackett and Luce by enumeration of all W! orders.

python -m pytest tests/test_ranking.py
"""

import itertools
import math
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import baselines
import objectives

quick = settings(max_examples=50, deadline=None)
entropies = st.lists(st.floats(0, 12, width=32), min_size=2, max_size=40).map(torch.tensor)
few = st.lists(st.floats(0, 6, width=32), min_size=1, max_size=6)


def naive_ranking(h, margin):
    """Eq. 8: the mean over pairs."""
    total, pairs = 0.0, 0
    for r, s in itertools.combinations([float(x) for x in h], 2):
        total, pairs = total + max(0.0, r - s + margin), pairs + 1
    return total / pairs


# ------------------------------------------------------------------------------------------------ the entropies


@quick
@given(st.sampled_from([(9,), (3, 9), (2, 3, 9), (2, 40, 9), (0, 3, 9)]), st.integers(0, 99))
def test_nll_and_entropy_and_their_gradients_are_the_formulas(shape, seed):
    g = torch.Generator().manual_seed(seed)
    x = (torch.randn(shape, generator=g) * 3).double()
    token = torch.randint(0, 9, shape[:-1], generator=g)
    ours, plain = x.clone().requires_grad_(), x.clone().requires_grad_()
    logp = plain.log_softmax(-1)
    expected = -logp.gather(-1, token[..., None])[..., 0], -(logp.exp() * logp).sum(-1)
    weight = torch.randn(2, *token.shape, generator=g).double()
    (torch.stack(expected) * weight).sum().backward()
    with mock.patch.object(objectives.NllAndEntropy, "AT_ONCE", 30):  # three rows
        found = objectives.NllAndEntropy.apply(ours, token)
        (torch.stack(found) * weight).sum().backward()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(ours.grad, plain.grad)
    torch.testing.assert_close(objectives.entropy(x), expected[1].detach())


def test_logits_need_not_lie_in_a_row():
    """Other people's models may put the sequence first."""
    x = torch.randn(5, 3, 18, generator=torch.Generator().manual_seed(0)).requires_grad_()
    token = torch.arange(15).view(3, 5)
    nll, h = objectives.NllAndEntropy.apply(x.transpose(0, 1), token)
    (grad,) = torch.autograd.grad((nll + h).sum(), x)
    y = x.detach().transpose(0, 1).contiguous().requires_grad_()
    nll, h = objectives.NllAndEntropy.apply(y, token)
    (expected,) = torch.autograd.grad((nll + h).sum(), y)
    torch.testing.assert_close(grad.transpose(0, 1), expected)


def test_a_token_that_a_model_forbids_adds_nothing_to_the_entropy(toy):
    """Other people's models say -inf for it."""
    x = torch.tensor([[0.5, -torch.inf, 1.0, -torch.inf]], requires_grad=True)
    found = objectives.entropy(x)
    rest = x.detach()[:, ::2].log_softmax(-1)
    torch.testing.assert_close(found, -(rest.exp() * rest).sum(-1))
    found.sum().backward()
    assert x.grad.isfinite().all() and (x.grad[:, 1::2] == 0).all() and x.grad[0, 0] != 0


# ------------------------------------------------------------------------------------------------ Eq. 8, the ranking


@quick
@given(entropies, st.floats(0, 2))
def test_ranking_loss_is_the_double_loop(h, margin):
    assert float(objectives.ranking_loss(h, margin)) == pytest.approx(naive_ranking(h, margin), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("W", [2, 3, 7, 32, 100])
def test_every_pair_counts_once(W):
    assert float(objectives.ranking_loss(torch.zeros(W), 0.2)) == pytest.approx(0.2)
    h = torch.zeros(W, requires_grad=True)
    objectives.ranking_loss(h, 5.0).backward()  # each pair pulls its first entropy down and its second one up
    pulls = h.grad * W * (W - 1) / 2
    torch.testing.assert_close(pulls, torch.tensor([W - 1.0 - 2 * k for k in range(W)]))


@quick
@given(entropies, st.floats(0, 2))
def test_ranking_loss_is_zero_where_every_pair_is_in_order_by_the_margin(h, margin):
    loss = float(objectives.ranking_loss(h, margin))
    assert (loss == 0) == all(float((r - s) + margin) <= 0 for r, s in itertools.combinations(h, 2))
    sorted_by_margin = torch.arange(len(h)) * (margin + 0.01)
    assert float(objectives.ranking_loss(sorted_by_margin, margin)) == 0


@quick
@given(entropies, st.floats(0, 2), st.floats(0, 2), st.floats(-5, 5))
def test_ranking_loss_ignores_a_constant_and_grows_with_the_margin(h, margin, more, constant):
    loss = objectives.ranking_loss(h, margin)
    torch.testing.assert_close(objectives.ranking_loss(h + constant, margin), loss, rtol=1e-3, atol=1e-4)
    larger = objectives.ranking_loss(h, margin + more)
    assert loss - 1e-5 <= larger <= loss + more + 1e-5


@quick
@given(st.permutations(range(5)), st.integers(0, 99))
def test_ranking_loss_ignores_the_order_of_rows_and_what_is_not_real(rows, seed):
    g = torch.Generator().manual_seed(seed)
    h, lengths = torch.rand(5, 9, generator=g) * 3, torch.randint(1, 10, (5,), generator=g)
    real = torch.arange(9) < lengths[:, None]
    loss = objectives.ranking_loss(h, 0.3, real)
    rows_with_a_pair = [naive_ranking(x[:n], 0.3) for x, n in zip(h, lengths) if n > 1]
    assert float(loss) == pytest.approx(sum(rows_with_a_pair) / max(len(rows_with_a_pair), 1), abs=1e-5)
    torch.testing.assert_close(objectives.ranking_loss(h[rows], 0.3, real[rows]), loss)
    torch.testing.assert_close(objectives.ranking_loss(h.where(real, 1e6), 0.3, real), loss)


def test_one_token_has_no_pair():
    assert float(objectives.ranking_loss(torch.ones(3, 1), 0.5)) == 0


# ------------------------------------------------------------------------------------ Eq. 3 to 6, by enumeration


def sets(W):
    return itertools.product([0, 1], repeat=W)


def boltzmann(h, beta):
    """Eq. 3 by its definition: the probability of every set U, exp(-beta * sum over U) over the sum of all of them."""
    weights = {}
    for U in sets(len(h)):
        energy = sum(x for x, inside in zip(h, U) if inside)
        weights[U] = math.exp(-beta * energy)
    Z = sum(weights.values())
    return {U: w / Z for U, w in weights.items()}, Z


@quick
@given(few, st.floats(0.1, 3))
def test_the_partition_function_and_the_sets_factorise(h, beta):
    p, Z = boltzmann(h, beta)
    product = 1.0
    for x in h:
        product *= 1 + math.exp(-beta * x)
    assert product == pytest.approx(Z, rel=1e-9)
    for U, value in p.items():
        product = 1.0
        for x, inside in zip(h, U):
            one = 1 / (1 + math.exp(beta * x))  # sigmoid(-beta h)
            product *= one if inside else 1 - one
        assert value == pytest.approx(product, rel=1e-9)


@quick
@given(few, st.floats(0.1, 3), st.integers(0, 99))
def test_boltzmann_kl_is_the_sum_over_all_sets(h, beta, seed):
    base = (torch.rand(len(h), generator=torch.Generator().manual_seed(seed)) * 6).tolist()
    p, q = boltzmann(h, beta)[0], boltzmann(base, beta)[0]
    expected = sum(q[U] * math.log(q[U] / p[U]) for U in q)
    found = baselines.boltzmann_kl(torch.tensor(h, dtype=torch.float64), torch.tensor(base).double(), beta)
    assert float(found) == pytest.approx(expected, abs=1e-7)
    assert float(found) >= 0


@quick
@given(few, st.floats(0.1, 3))
def test_boltzmann_kl_is_least_at_the_base_model(h, beta):
    base = torch.tensor(h, dtype=torch.float64)
    here = base.clone().requires_grad_()
    loss = baselines.boltzmann_kl(here, base, beta)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0, abs=1e-12)
    assert here.grad.abs().max() < 1e-12
    assert float(baselines.boltzmann_kl(base + 0.3, base, beta)) > 0


def test_boltzmann_kl_of_large_entropies_is_finite():
    h = torch.tensor([0.0, 12.0, 200.0], requires_grad=True)
    loss = baselines.boltzmann_kl(h, torch.tensor([200.0, 0.0, 12.0]))
    loss.backward()
    assert loss.isfinite() and h.grad.isfinite().all()


def naive_listwise(h, beta):
    """The log likelihood of Plackett and Luce in a loop: each token against those that are left."""
    total = 0.0
    for k in range(len(h)):
        left = sum(math.exp(-beta * x) for x in h[k:])
        total += math.log(math.exp(-beta * h[k]) / left)
    return -total


@quick
@given(few, st.floats(0.1, 3))
def test_listwise_loss_is_the_loop(h, beta):
    found = baselines.listwise_loss(torch.tensor(h, dtype=torch.float64), beta)
    assert float(found) == pytest.approx(naive_listwise(h, beta), abs=1e-9)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.floats(0, 6, width=32), min_size=1, max_size=5), st.floats(0.1, 3))
def test_the_likelihoods_of_all_orders_sum_to_one(h, beta):
    orders = torch.tensor(list(itertools.permutations(h)), dtype=torch.float64)  # [W!, W]
    assert len(orders) == math.factorial(len(h))
    likelihood = (-baselines.listwise_loss(orders, beta)).exp()
    assert float(likelihood.sum()) == pytest.approx(1)
    rising = sorted(h)  # no order is likelier than from certain to uncertain
    best = (-baselines.listwise_loss(torch.tensor(rising, dtype=torch.float64), beta)).exp()
    assert float(likelihood.max()) == pytest.approx(float(best))


@quick
@given(st.integers(0, 99), st.floats(0.1, 3))
def test_what_is_not_real_takes_no_part(seed, beta):
    g = torch.Generator().manual_seed(seed)
    h, lengths = torch.rand(5, 7, generator=g) * 3, torch.randint(1, 8, (5,), generator=g)
    real = torch.arange(7) < lengths[:, None]
    filled = h.where(real, 1e6).requires_grad_()
    ranked = baselines.listwise_loss(filled, beta, real)
    anchored = baselines.boltzmann_kl(filled, h.where(real, math.nan), beta, real)
    for b, n in enumerate(lengths.tolist()):
        assert float(ranked[b].detach()) == pytest.approx(naive_listwise(h[b, :n].tolist(), beta), abs=1e-4)
        assert float(anchored[b].detach()) == pytest.approx(0, abs=1e-6)
    (ranked + anchored).sum().backward()
    assert filled.grad.isfinite().all()
    assert (filled.grad[~real] == 0).all()
