"""reach.py: where the two objectives have their loss: python -m pytest tests/test_reach.py"""

import pytest
import torch
from test_claims import Counter

from experiments import reach

STEPS = 31


def batch_of(rows, seed=0):
    order = torch.stack([torch.randperm(STEPS, generator=torch.Generator().manual_seed(seed + i)) for i in range(rows)])
    ones = torch.ones(rows, STEPS, dtype=torch.long)
    prompt = torch.ones(rows, 2, dtype=torch.long)
    return dict(
        prompt_ids=prompt, prompt_mask=prompt, response_ids=ones, order=order, length=torch.full((rows,), STEPS)
    )


class Surprise:
    """A model that is surprised by the tokens of one decode step alone, so that a loss is that step's weight."""

    def __init__(self, batch, step):
        self.at, self.config = (batch["order"] == step).nonzero()[:, 1], Counter().config

    def __call__(self, ids, attention_mask=None, positions=None):
        logits = torch.zeros(*positions.shape, 24)
        logits[..., 1] = 100.0  # the right token: no loss
        hit = positions - 2 == self.at[:, None]
        logits[..., 1] = torch.where(hit, torch.zeros(()), logits[..., 1])
        logits[..., 2:] = torch.where(hit[..., None], torch.full((), -1e9), logits[..., 2:])
        logits[..., 0] = torch.where(hit, torch.zeros(()), torch.full((), -1e9))  # log 2 of surprise there
        return logits


@pytest.mark.parametrize(
    "loss, weights",
    [(reach.balanced, reach.weights_of_traj), (reach.reach, reach.weights_of_reach)],
)
def test_on_average_each_step_weighs_what_is_said(loss, weights):
    batch, expected = batch_of(4000), weights(STEPS).tolist()
    for step in (0, 5, 15, 25, 30):
        found = loss(Surprise(batch, step), batch, generator=torch.Generator().manual_seed(step))["loss"].item()
        assert found / torch.log(torch.tensor(2.0)).item() == pytest.approx(expected[step], rel=0.15)


def test_the_last_eight_steps_have_the_shares_that_were_registered():
    window, traj, stretch = reach.weights_of_window(31, 8), reach.weights_of_traj(31), reach.weights_of_reach(31)
    shares = [round(weights[-8:].sum().item(), 2) for weights in (window, traj, stretch)]
    assert shares == [0.19, 0.60, 0.39]
    for weights in (window, traj, stretch):
        assert weights.sum().item() == pytest.approx(1) and weights.min() > 0
