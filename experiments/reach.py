"""Two objectives of the experiments, which ask why naive trajectory distillation leads: whether by how far ahead it
predicts, or by how much the last decode steps weigh in its loss. offered() adds them to the table of objectives.

    reach.reach(m, batch)             # a stretch of random reach, in place of a window of W steps
    reach.balanced(m, batch)          # windows of 8 steps, each step with the weight that it has in naive TD

The batch, m and the dimensions are those of objectives.py. Every row of a batch has the same number of steps.
"""

import contextlib

import torch

import objectives
from baselines import draw_state, transition
from objectives import Objective, context_and_targets, decode_steps, draw_windows, masked_mean, nll_and_entropy

WINDOW = 8


def reach(m, batch, generator=None):
    """Cross-entropy on what was decoded from a random state on, in a random number of steps: of S steps the state is
    uniform in 0..S-1, as in naive TD, and the number uniform among those that are left -> dict(loss, ...) as tabom."""
    steps = decode_steps(batch, "cpu")  # [B]
    first = draw_state(steps, None, generator)
    end = steps.clone()
    for i, g in enumerate(objectives.per_row(generator, len(steps))):
        end[i] = objectives.uniform_int(int(first[i]) + 1, int(steps[i]), g)
    return transition(m, batch, start=torch.stack((first, end), dim=1))


def balanced(m, batch, generator=None):
    """Cross-entropy on a window of WINDOW decode steps, a step weighted so that on average over windows it counts as
    much as in naive TD -> dict(loss, ce)."""
    first, size = draw_windows(batch, WINDOW, generator=generator)  # [B]
    visible, positions, real = context_and_targets(batch, first, size)  # [B, K]
    nll, _ = nll_and_entropy(m, batch, visible, positions)
    S = decode_steps(batch).max().item()
    weight = weights_of_traj(S) / weights_of_window(S, WINDOW)  # [S]
    step = batch["order"].gather(1, positions).clamp(min=0)
    ce = masked_mean(nll * weight.to(nll)[step], real).mean()
    return dict(loss=ce, ce=masked_mean(nll.detach(), real).mean())


def weights_of_traj(S):
    """The share of each of S decode steps in the loss of naive TD: state t of 0..S-1 asks for steps t.., each with
    1 / (S - t)."""
    return (1 / torch.arange(S, 0, -1)).cumsum(0) / S


def weights_of_window(S, W):
    """The share of each of S steps in the loss of windows of W from a uniform start."""
    found = torch.zeros(S)
    for start in range(S - W + 1):
        found[start : start + W] += 1 / W
    return found / (S - W + 1)


def weights_of_reach(S):
    """The same for `reach`: from state t, a reach of r steps with probability 1 / (S - t), each with 1 / r."""
    found = torch.zeros(S)
    for t in range(S):
        for r in range(1, S - t + 1):
            found[t : t + r] += 1 / ((S - t) * r)
    return found / S


OBJECTIVES = {
    "reach": Objective(reach, "naive TD with a random end"),
    "balanced": Objective(balanced, "windows with naive TD's weights"),
}


@contextlib.contextmanager
def offered():
    """In this context objectives.OBJECTIVES has these two as well: no command offers them."""
    objectives.OBJECTIVES.update(OBJECTIVES)
    try:
        yield
    finally:
        for name in OBJECTIVES:
            del objectives.OBJECTIVES[name]
