"""The measures of objectives.py against naive loops over trajectories, steps and positions.

python -m pytest tests/test_measures.py
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import baselines
import model
import objectives

GOLDEN = "tests/golden/"
EOS = 301


@pytest.fixture(params=["llada-tiny", "dream-tiny"])
def m(request):
    return model.load(request.config.rootpath / GOLDEN / request.param)


def make_batch():
    """Three rows: an EOS inside the response, a padded prompt, a shorter response."""
    g = torch.Generator().manual_seed(0)
    return dict(
        prompt_ids=torch.randint(0, 290, (3, 4), generator=g),
        prompt_mask=torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1], [1, 1, 1, 1]]),
        response_ids=torch.randint(0, 290, (3, 7), generator=g),
        order=torch.stack([torch.randperm(7, generator=g), torch.randperm(7, generator=g), torch.arange(7)]),
        length=torch.tensor([7, 7, 5]),
    )


def stepped_batch(seed=0):
    """The same, decoded several tokens a step: ties, a step that decodes nothing, tokens that are never decoded, and
    more than one EOS."""
    batch, g = make_batch(), torch.Generator().manual_seed(seed)
    batch["order"] = torch.randint(-1, 4, (3, 7), generator=g)
    batch["order"][:, 2] = torch.tensor([4, 5, 2])  # something is decoded in every row
    batch["order"][batch["order"] == 1] = 0  # step 1 decodes nothing
    batch["response_ids"][torch.rand(3, 7, generator=g) < 0.2] = EOS
    return batch


def random_order(seed):
    """One token a step, with more than one EOS."""
    batch, g = make_batch(), torch.Generator().manual_seed(seed)
    for b, n in enumerate(batch["length"].tolist()):
        batch["order"][b, :n] = torch.randperm(n, generator=g)
    batch["response_ids"][torch.rand(3, 7, generator=g) < 0.2] = EOS
    return batch


BATCHES = {
    "one a step": make_batch(),
    "one a step, EOS": random_order(0),
    "several a step": stepped_batch(6),
    "several a step, EOS": stepped_batch(8),
}


# ---------------------------------------------------------------------------------------------- the slow versions


def row_of(batch, b):
    """Response and order of row b, without padding."""
    length = int(batch["length"][b])
    return batch["response_ids"][b, :length].tolist(), batch["order"][b, :length].tolist()


def naive_log_p(m, batch, b, visible):
    """log p of row b given the positions in visible, without padding: [n, V] in float64."""
    prompt = batch["prompt_ids"][b][batch["prompt_mask"][b].bool()].tolist()
    response, _ = row_of(batch, b)
    ids = prompt + [x if r in visible else m.config.mask_id for r, x in enumerate(response)]
    with torch.no_grad():
        return m(torch.tensor([ids]))[0, len(prompt) :].double().log_softmax(-1)


def masked_at(order, t):
    """Positions that are masked at step t, from left to right."""
    return [r for r, step in enumerate(order) if step < 0 or step >= t]


def naive_replay(m, batch, b):
    """Entropies of row b by (step, position), one forward pass for each step."""
    _, order = row_of(batch, b)
    h = {}
    for t in range(max(order) + 1):
        masked = masked_at(order, t)
        logp = naive_log_p(m, batch, b, set(range(len(order))) - set(masked))
        for r in masked:
            h[t, r] = -float((logp[r].exp() * logp[r]).sum())
    return h


def decode_order(order):
    """Positions in decode order: equal steps by position, those never decoded last."""
    decoded = [r for r in range(len(order)) if order[r] >= 0]
    return sorted(decoded, key=lambda r: order[r]) + [r for r in range(len(order)) if order[r] < 0]


def counts(response, order, t, eos_id, eos):
    """The positions that count for the TDS at step t."""
    if eos == "final":
        standing = [r for r, x in enumerate(response) if x == eos_id and order[r] >= 0]
        end = min(standing, default=len(response))
    else:
        end = len(response)
        for r in reversed(range(len(response))):
            if response[r] == eos_id and 0 <= order[r] < t:
                end = r  # it stands there by now
    return [r for r in masked_at(order, t) if r < end]


def variance(values):
    mean = sum(values) / len(values)
    return sum((x - mean) ** 2 for x in values) / len(values)


def naive_tds(m, batch, eos_id, eos):
    """Eq. 10 and 11 as loops -> the value, that of each trajectory, and each one's steps up to its first EOS."""
    of_trajectory, curves = [], []
    for b in range(len(batch["length"])):
        response, order = row_of(batch, b)
        entropy, of_step = naive_replay(m, batch, b), {}
        for t in range(max(order) + 1):
            counted = counts(response, order, t, eos_id, eos)
            if len(counted) >= (1 if eos == "final" else 2):
                of_step[t] = variance([entropy[t, r] for r in counted])
        standing = [r for r, x in enumerate(response) if x == eos_id and order[r] >= 0]
        last = order[standing[0]] if standing and eos == "so-far" else math.inf
        curves.append({t: v for t, v in of_step.items() if t <= last})
        if of_step:
            of_trajectory.append(sum(of_step.values()) / len(of_step))
        else:
            of_trajectory.append(math.nan)
    kept = [x for x in of_trajectory if not math.isnan(x)]
    assert len(kept) > 1  # or else the batch is no use
    return sum(kept) / len(kept), of_trajectory, curves


# ------------------------------------------------------------------------------------------------------------- TDS


@pytest.mark.parametrize("eos", ["so-far", "final"])
@pytest.mark.parametrize("name", BATCHES)
def test_tds_equals_the_double_loop(m, name, eos):
    batch = BATCHES[name]
    value, rows, curves = naive_tds(m, batch, EOS, eos)
    found = objectives.tds(m, batch, EOS, eos)
    assert found["tds"] == pytest.approx(value, rel=1e-4)
    assert found["rows"] == pytest.approx(rows, rel=1e-4, nan_ok=True)
    for curve, expected in zip(found["curves"], curves):
        assert curve == pytest.approx(list(expected.values()), rel=1e-4, abs=1e-7)
    per_step = []
    for t in range(int(batch["order"].max()) + 1):
        values = [curve[t] for curve in curves if t in curve]
        per_step += [sum(values) / len(values)] if values else []
    assert found["per_step"] == pytest.approx(per_step, rel=1e-4, abs=1e-7)


def test_tds_by_default_takes_the_eos_that_stands_so_far(m):
    """An EOS at the third place that is decoded last: until then everything counts."""
    batch = make_batch()
    batch["order"][0] = torch.tensor([5, 4, 6, 0, 1, 2, 3])
    batch["response_ids"][0, 2] = EOS
    one = {key: value[:1] for key, value in batch.items()}
    found = objectives.tds(m, one, EOS)
    assert len(found["curves"][0]) == 6  # at the last step one token is masked: no value
    final = objectives.tds(m, one, EOS, eos="final")
    assert len(final["curves"][0]) == 6  # the two positions before it are decoded at steps 4 and 5
    assert final["curves"][0][5] == 0  # one alone has the variance 0
    assert found["tds"] != pytest.approx(final["tds"], rel=1e-3)


def test_steps_after_the_first_eos_are_left_out_of_the_curve_alone(m):
    batch = make_batch()
    batch["order"][0] = torch.arange(7)
    batch["order"][0, 5], batch["order"][0, 2] = 2, 5
    batch["response_ids"][0, 5] = EOS
    one = {key: value[:1] for key, value in batch.items()}
    found = objectives.tds(m, one, EOS)
    assert len(found["per_step"]) == 3  # 0, 1, and 2, which decodes it
    whole = objectives.variance_by_step(objectives.replay(m, one), one, EOS)[0]
    assert int((~whole.isnan()).sum()) == 5  # step 3 still has positions 2, 3 and 4 before it, step 4 has 2 and 4
    assert found["rows"][0] == pytest.approx(float(whole.nanmean()), rel=1e-5)


def test_tds_of_a_replay_that_was_made_already(m):
    batch = BATCHES["several a step, EOS"]
    h = objectives.replay(m, batch)
    for eos in ("so-far", "final"):
        again, found = objectives.tds(m, batch, EOS, eos), objectives.tds(None, batch, EOS, eos, h=h)
        assert found["tds"] == pytest.approx(again["tds"], rel=1e-5)
        assert found["rows"] == pytest.approx(again["rows"], rel=1e-4, nan_ok=True)


@pytest.mark.parametrize("name", BATCHES)
def test_the_tds_of_a_row_does_not_depend_on_its_batch(m, name):
    batch = BATCHES[name]
    whole = objectives.tds(m, batch, EOS)
    for b in range(3):
        alone = objectives.tds(m, {key: value[b : b + 1] for key, value in batch.items()}, EOS)
        assert alone["rows"] == pytest.approx(whole["rows"][b : b + 1], rel=1e-4, nan_ok=True)
        assert alone["curves"][0] == pytest.approx(whole["curves"][b], rel=1e-4, abs=1e-7)


def test_tds_refuses_another_eos(m):
    with pytest.raises(ValueError, match="eos 'first' is neither 'so-far' nor 'final'"):
        objectives.tds(m, make_batch(), EOS, eos="first")


def test_variances_need_two_entropies():
    h = torch.tensor([[1.0, math.nan, 3.0], [2.0, math.nan, math.nan], [math.nan] * 3])
    assert objectives.entropy_variance(h).tolist() == pytest.approx([1.0, math.nan, math.nan], nan_ok=True)
    assert objectives.entropy_variance(h, least=1).tolist() == pytest.approx([1.0, 0.0, math.nan], nan_ok=True)


# --------------------------------------------------------------------------------------------------------- replays


@pytest.mark.parametrize("name", BATCHES)
def test_replay_equals_the_loop(m, name):
    batch = BATCHES[name]
    h = objectives.replay(m, batch)
    steps = int(torch.where(objectives.was_decoded(batch), batch["order"], -1).max()) + 1
    assert h.shape == (3, steps, 7)
    for b in range(3):
        _, order = row_of(batch, b)
        expected = naive_replay(m, batch, b)
        for k, r in enumerate(decode_order(order)):
            for t in range(max(order) + 1):
                if (t, r) in expected:
                    assert h[b, t, k] == pytest.approx(expected[t, r], abs=1e-4)
                else:
                    assert h[b, t, k].isnan()
        assert h[b, :, len(order) :].isnan().all()  # padding


def test_replay_runs_once_a_state_and_the_head_on_masked_positions_only(toy):
    batch, m = stepped_batch(4), toy(vocab=302)
    objectives.replay(m, batch)
    states = [0, *sorted({step + 1 for step in batch["order"][objectives.was_decoded(batch)].tolist()})][:-1]
    assert len(m.calls) == len(states) > 3
    for t, (_, _, positions) in zip(states, m.calls):
        most = max(len(masked_at(row_of(batch, b)[1], t)) for b in range(3))
        assert positions.shape == (3, most)


def test_empty_steps_cost_nothing(toy):
    """A record of four tokens, one of them at step 300,000: four states, and each step has the one that it saw."""
    m, late = toy(), 300_000
    batch = dict(prompt_ids=torch.ones(1, 2, dtype=torch.long), prompt_mask=torch.ones(1, 2, dtype=torch.long))
    batch.update(response_ids=torch.tensor([[3, 4, 5, 6]]), order=torch.tensor([[0, 2, late, 5]]))
    batch["length"] = torch.tensor([4])
    h = objectives.replay(m, batch)
    assert len(m.calls) == 4 and h.shape == (1, late + 1, 4)
    near = {**batch, "order": torch.tensor([[0, 1, 3, 2]])}
    state_of = [0, 1, 1, 2, 2, 2] + [3] * (late - 5)  # of each step
    torch.testing.assert_close(h, objectives.replay(toy(), near)[:, state_of], equal_nan=True)
    m.calls.clear()
    assert objectives.tds(m, batch, eos_id=12)["tds"] >= 0 and len(m.calls) == 4
    m.calls.clear()
    objectives.tabom(m, batch, window="global", entropy_context="step", start=torch.tensor([[0, late + 1]]))
    assert len(m.calls) == 4


def test_replay_looks_no_longer_than_it_is_asked(toy):
    batch, m = make_batch(), toy(vocab=302)
    until = torch.where(batch["order"] < 3, batch["order"], -1)  # only the first three tokens of each row
    h = objectives.replay(m, batch, until)
    assert len(m.calls) == 3 and m.calls[0][2].shape == (3, 3)
    whole = objectives.replay(toy(vocab=302), batch)
    torch.testing.assert_close(h[:, :3, :3], whole[:, :3, :3], equal_nan=True)
    assert h[:, :, 3:].isnan().all() and h[:, 3:].isnan().all()


@pytest.mark.parametrize("name", BATCHES)
def test_entropies_when_decoded(m, name):
    batch = BATCHES[name]
    h = objectives.replay(m, batch)
    own = baselines.entropies_when_decoded(h, batch)
    assert own.shape == (3, 7)
    for b in range(3):
        _, order = row_of(batch, b)
        expected = naive_replay(m, batch, b)
        for k, r in enumerate(decode_order(order)):
            if order[r] >= 0:
                assert own[b, k] == pytest.approx(expected[order[r], r], abs=1e-4)
            else:
                assert own[b, k].isnan()
        assert own[b, len(order) :].isnan().all()
    if name == "one a step":
        torch.testing.assert_close(own, h.diagonal(dim1=1, dim2=2), equal_nan=True)


def batch_of_order(order, spare):
    """One row with this order and some padding."""
    N = len(order) + spare
    return dict(
        response_ids=torch.zeros(1, N, dtype=torch.long),
        order=torch.tensor([order + [3] * spare]),
        length=torch.tensor([len(order)]),
    )


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(1, 9), st.integers(0, 5))
def test_windows_of_a_replay(length, window, spare):
    """One token a step: the W next entropies on the diagonal band."""
    N = length + spare
    h = torch.arange(length * N, dtype=torch.float32).reshape(1, length, N)
    found = baselines.windows_of_replay(h, batch_of_order(list(range(length)), spare), window)[0]
    W = min(window, length)
    assert found.shape == (length, W)
    for t in range(length):
        for i in range(W):
            if t <= max(length - window, 0):
                assert found[t, i] == h[0, t, t + i]
            else:
                assert found[t, i].isnan()


@settings(deadline=None)
@given(st.lists(st.integers(-1, 4), min_size=1, max_size=7), st.integers(1, 6), st.integers(0, 3))
def test_windows_of_a_replay_by_steps(order, window, spare):
    order[0] = max(order[0], 0)
    S, N = max(order) + 1, len(order) + spare
    h = torch.arange(S * N, dtype=torch.float32).reshape(1, S, N)
    found = baselines.windows_of_replay(h, batch_of_order(order, spare), window)[0]
    in_order = decode_order(order)
    for t in range(S):
        expected = []
        if t <= max(S - window, 0):
            expected = [float(h[0, t, k]) for k, r in enumerate(in_order) if t <= order[r] < t + window]
        assert found[t, : len(expected)].tolist() == expected
        assert found[t, len(expected) :].isnan().all()


lists = st.lists(st.lists(st.one_of(st.integers(0, 3), st.just(math.nan)), min_size=5, max_size=5), min_size=1)


@settings(deadline=None)
@given(lists)
def test_inversions_equal_the_loop(rows):
    found = baselines.inversions(torch.tensor(rows, dtype=torch.float32))
    for d in range(1, 5):
        inverted, pairs = 0, 0
        for row in rows:
            for a, b in zip(row, row[d:]):
                pairs += not math.isnan(a) and not math.isnan(b)
                inverted += a > b
        assert found["pairs"][d - 1] == pairs
        assert found["inverted"][d - 1] == inverted


def test_inversions_of_one_token_are_none():
    assert all(len(x) == 0 for x in baselines.inversions(torch.zeros(3, 1)).values())


# ---------------------------------------------------------------------------------------------- loss at a mask ratio


def test_loss_at_a_mask_ratio(m):
    batch = make_batch()
    generators = [torch.Generator().manual_seed(b) for b in range(3)]
    everything = baselines.masked_loss(m, batch, 1.0, generators)
    for b, n in enumerate(batch["length"].tolist()):
        logp = naive_log_p(m, batch, b, set())
        expected = 0.0
        for r in range(n):
            expected -= float(logp[r, batch["response_ids"][b, r]]) / n
        assert everything[b] == pytest.approx(expected, abs=1e-4)


def test_a_small_mask_ratio_masks_one_token(m):
    batch, few, alone = make_batch(), [], []
    for seed in range(60):
        few.append(baselines.masked_loss(m, batch, 0.01, [torch.Generator().manual_seed(seed)] * 3)[2])
    for r in range(5):
        logp = naive_log_p(m, batch, 2, set(range(5)) - {r})
        alone.append(-logp[r, batch["response_ids"][2, r]].float())
    near = (torch.stack(few)[:, None] - torch.stack(alone)).abs() < 1e-4
    assert near.any(1).all()  # one of the five tokens alone, given the four others
    assert near.any(0).all()  # and each of them some time
