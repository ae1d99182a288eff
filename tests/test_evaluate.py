"""Checks of answers, and TDS against a naive double loop: python -m pytest tests/test_evaluate.py"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import evaluate
import model
import objectives

GOLDEN = "tests/golden/"


@pytest.mark.parametrize(
    "response, answer, verdict",
    [
        ("The answer is 72.", "... #### 72", True),
        ("#### 1,234", "#### 1234", True),
        ("so $18.00 a day", "9 * 2 = <<9*2=18>>18\n#### 18", True),
        ("first 5, then \\boxed{-3}", "\\boxed{-3}", True),
        ("12 apples and 7", "12", False),
        ("no number", "12", False),
        ("anything", "no number either", None),
        ("3/4", "\\boxed{\\frac{3}{4}}", None),  # not one number: not to be judged by its last digit
        ("72", "72 apples", None),
        ("72", None, None),
    ],
)
def test_number_check(response, answer, verdict):
    assert evaluate.check("number", response, answer) is verdict


def test_exact_and_no_check():
    assert evaluate.check("exact", " abc\n", "abc") is True
    assert evaluate.check("exact", "abd", "abc") is False
    assert evaluate.check("exact", "abc", ["x", " abc"]) is True and evaluate.check("exact", "abc", ["x", "y"]) is False
    assert evaluate.check("number", "so 7", ["x", "7"]) is True and evaluate.check("number", "7", ["x", "8"]) is None
    assert evaluate.check("none", "abc", "abc") is None
    with pytest.raises(ValueError, match="check 'fuzzy' is none of"):
        evaluate.check("fuzzy", "a", "a")


@settings(deadline=None)
@given(
    st.integers(-(10**9), 10**9),
    st.sampled_from(["{}", "{:,}", "so it is {:,}.", "#### {:,}", "\\boxed{{{}}}", "${:,}"]),
)
def test_a_number_is_found_however_it_is_written(n, form):
    if n < 0 and form.startswith("$"):
        return  # $-5 is not how anyone writes it
    assert evaluate.final_number(form.format(n)) == n


def make_batch():
    """Three rows: an EOS inside the response, a padded prompt, a shorter response."""
    g = torch.Generator().manual_seed(0)
    response = torch.randint(0, 290, (3, 7), generator=g)
    return dict(
        prompt_ids=torch.randint(0, 290, (3, 4), generator=g),
        prompt_mask=torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1], [1, 1, 1, 1]]),
        response_ids=response,
        order=torch.stack([torch.randperm(7, generator=g), torch.randperm(7, generator=g), torch.arange(7)]),
        length=torch.tensor([7, 7, 5]),
    )


def naive_log_p(m, batch, b, visible):
    """log p of row b given the positions in visible, without padding: [n, V] in float64."""
    prompt = batch["prompt_ids"][b][batch["prompt_mask"][b].bool()].tolist()
    response = batch["response_ids"][b, : batch["length"][b]].tolist()
    ids = prompt + [x if r in visible else m.config.mask_id for r, x in enumerate(response)]
    with torch.no_grad():
        return m(torch.tensor([ids]))[0, len(prompt) :].double().log_softmax(-1)


def naive_replay(m, batch, b):
    """Entropies of row b by (step, rank in the decode order), one forward pass for each step."""
    order = batch["order"][b, : batch["length"][b]].tolist()
    h = {}
    for t in range(len(order)):
        logp = naive_log_p(m, batch, b, {r for r, k in enumerate(order) if k < t})
        h |= {(t, k): -sum(math.exp(q) * q for q in logp[r].tolist()) for r, k in enumerate(order) if k >= t}
    return h


def naive_tds(m, batch, eos_id):
    """Eq. 10 and 11 as loops over trajectories, steps and positions."""
    of_trajectory = []
    for b, length in enumerate(batch["length"].tolist()):
        response, order = (batch[k][b, :length].tolist() for k in ("response_ids", "order"))
        end = response.index(eos_id) if eos_id in response else length
        entropy, of_step = naive_replay(m, batch, b), []
        for t in range(length):
            h = [entropy[t, order[r]] for r in range(end) if order[r] >= t]
            if h:
                mean = sum(h) / len(h)
                of_step.append(sum((x - mean) ** 2 for x in h) / len(h))
        of_trajectory.append(sum(of_step) / len(of_step))
    return sum(of_trajectory) / len(of_trajectory), of_trajectory


@pytest.fixture(params=["llada-tiny", "dream-tiny"])
def m(request):
    return model.load(request.config.rootpath / GOLDEN / request.param)


def test_tds_equals_the_double_loop(m):
    batch = make_batch()
    batch["response_ids"][1, 4] = m.config.eos_id  # what comes after it does not count
    value, rows = naive_tds(m, batch, m.config.eos_id)
    found = objectives.tds(m, batch, m.config.eos_id)
    assert found["tds"] == pytest.approx(value, rel=1e-4)
    assert found["rows"] == pytest.approx(rows, rel=1e-4)
    assert len(found["per_step"]) == 7


def test_replay_equals_the_loop(m):
    batch = make_batch()
    h = objectives.replay(m, batch)
    assert h.shape == (3, 7, 7)
    for b in range(3):
        expected = naive_replay(m, batch, b)
        for t in range(7):
            for k in range(7):
                if (t, k) in expected:
                    assert h[b, t, k] == pytest.approx(expected[t, k], abs=1e-4)
                else:
                    assert h[b, t, k].isnan()


lists = st.lists(st.lists(st.one_of(st.integers(0, 3), st.just(math.nan)), min_size=5, max_size=5), min_size=1)


@settings(deadline=None)
@given(lists)
def test_inversions_equal_the_loop(rows):
    found = objectives.inversions(torch.tensor(rows, dtype=torch.float32))
    for d in range(1, 5):
        pairs = [(row[k], row[k + d]) for row in rows for k in range(5 - d)]
        pairs = [(a, b) for a, b in pairs if not math.isnan(a) and not math.isnan(b)]
        assert found["pairs"][d - 1] == len(pairs)
        assert found["inverted"][d - 1] == sum(a > b for a, b in pairs)


def test_inversions_of_one_token_are_none():
    assert all(len(x) == 0 for x in objectives.inversions(torch.zeros(3, 1)).values())


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(1, 9), st.integers(0, 5))
def test_windows_of_a_replay(length, window, spare):
    N = length + spare
    h = torch.arange(N * N, dtype=torch.float32).reshape(1, N, N)
    found = objectives.by_window(h, window, torch.tensor([length]))[0]
    W = min(window, N)
    assert found.shape == (N, W)
    for t in range(N):
        for i in range(W):
            if t <= max(length - W, 0) and t + i < N:
                assert found[t, i] == h[0, t, t + i]
            else:
                assert found[t, i].isnan()


def test_loss_at_a_mask_ratio(m):
    batch = make_batch()
    generators = [torch.Generator().manual_seed(b) for b in range(3)]
    everything = objectives.loss_at(m, batch, 1.0, generators)
    for b, n in enumerate(batch["length"].tolist()):
        logp = naive_log_p(m, batch, b, set())
        expected = -sum(float(logp[r, batch["response_ids"][b, r]]) for r in range(n)) / n
        assert everything[b] == pytest.approx(expected, abs=1e-4)
    few = [objectives.loss_at(m, batch, 0.01, [torch.Generator().manual_seed(s)] * 3)[2] for s in range(60)]
    alone = [-naive_log_p(m, batch, 2, set(range(5)) - {r})[r, batch["response_ids"][2, r]].float() for r in range(5)]
    near = (torch.stack(few)[:, None] - torch.stack(alone)).abs() < 1e-4
    assert near.any(1).all() and near.any(0).all()  # each of the five tokens alone, given the four others
