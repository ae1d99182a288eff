"""Checks of answers, and TDS against a naive double loop: python -m pytest tests/test_evaluate.py"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import evaluate
import model

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


def naive_tds(m, batch, eos_id):
    """Eq. 10 and 11 as loops over trajectories, steps and positions, one unpadded forward pass for each."""
    of_trajectory = []
    for b, length in enumerate(batch["length"].tolist()):
        prompt = batch["prompt_ids"][b][batch["prompt_mask"][b].bool()].tolist()
        response, order = (batch[k][b, :length].tolist() for k in ("response_ids", "order"))
        end = response.index(eos_id) if eos_id in response else length
        of_step = []
        for t in range(length):
            ids = prompt + [x if order[r] < t else m.config.mask_id for r, x in enumerate(response)]
            p = m(torch.tensor([ids]))[0].double().softmax(-1)
            h = [-sum(q * math.log(q) for q in p[len(prompt) + r].tolist()) for r in range(end) if order[r] >= t]
            if h:
                mean = sum(h) / len(h)
                of_step.append(sum((x - mean) ** 2 for x in h) / len(h))
        of_trajectory.append(sum(of_step) / len(of_step))
    return sum(of_trajectory) / len(of_trajectory), of_trajectory


@pytest.mark.parametrize("family", ["llada-tiny", "dream-tiny"])
def test_tds_equals_the_double_loop(family, request):
    m = model.load(request.config.rootpath / GOLDEN / family)
    g = torch.Generator().manual_seed(0)
    response = torch.randint(0, 290, (3, 7), generator=g)
    response[1, 4] = m.config.eos_id  # what comes after it does not count
    batch = dict(
        prompt_ids=torch.randint(0, 290, (3, 4), generator=g),
        prompt_mask=torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1], [1, 1, 1, 1]]),
        response_ids=response,
        order=torch.stack([torch.randperm(7, generator=g), torch.randperm(7, generator=g), torch.arange(7)]),
        length=torch.tensor([7, 7, 5]),
    )
    with torch.no_grad():
        value, rows = naive_tds(m, batch, m.config.eos_id)
    found = evaluate.tds(m, batch, m.config.eos_id)
    assert found["tds"] == pytest.approx(value, rel=1e-4)
    assert found["rows"] == pytest.approx(rows, rel=1e-4)
    assert len(found["per_step"]) == 7
