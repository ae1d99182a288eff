"""Cross-entropy between two timesteps of a trajectory: dInfer, and naive trajectory distillation.

    baselines.transition(m, batch)["loss"].backward()
    baselines.traj(m, batch)["loss"].backward()

Sources: dInfer (arXiv 2510.08666); the baseline "naive TD" of T3D (arXiv 2602.12262). Dimensions: B batch.
"""

import torch

from objectives import Objective, decode_steps, per_row, share_with_pairs, tabom, uniform_int


def transition(m, batch, start=None, generator=None, mask_id=None, pair_share=None):
    """dInfer: cross-entropy on what was decoded between two random timesteps given what was decoded before
    -> dict(loss, ce, ...) as of tabom. start [B, 2]: the two timesteps, the lower one first.

    It is TABOM with the global window; the ranking is only measured. pair_share: see objectives.share_with_pairs."""
    options = dict(start=start, generator=generator, mask_id=mask_id, pair_share=pair_share)
    return tabom(m, batch, "global", weight=0.0, **options)


def traj(m, batch, start=None, generator=None, mask_id=None, pair_share=None):
    """Naive trajectory distillation: cross-entropy on every token that is still masked at a random state
    -> dict(loss, ce, ...) as of tabom. start [B]: steps made before that state. It is a transition whose later
    timestep is the end."""
    ends = from_state_to_end(batch, start, generator)
    return transition(m, batch, start=ends, mask_id=mask_id, pair_share=pair_share)


def from_state_to_end(batch, start=None, generator=None):
    """A random state (see `draw_state`) and the end of each trajectory, in steps: int64 [B, 2], on the host."""
    steps = decode_steps(batch, "cpu")  # [B]
    return torch.stack((draw_state(steps, start, generator), steps), dim=1)


def draw_state(steps, start=None, generator=None):
    """How many of a trajectory's steps [B] were made before a random state: uniform in
    0..steps - 1, int64 [B], or the given start [B]. Raises ValueError for a start outside them."""
    if start is None:
        rows = zip(steps.tolist(), per_row(generator, len(steps)))
        start = [uniform_int(0, S - 1, g) for S, g in rows]
    start = torch.as_tensor(start).to(steps.device)
    if (start < 0).any() or (start >= steps).any():
        raise ValueError(f"states after {start.tolist()} of {steps.tolist()} steps leave no target")
    return start


def share_of_transition(batch, parameters, generators):
    """See Objective.normaliser: the share of rows with a pair in the windows of `transition`."""
    return dict(pair_share=share_with_pairs(batch, "global", generator=generators))


def share_of_traj(batch, parameters, generators):
    """The same in those of `traj`."""
    ends = from_state_to_end(batch, None, generators)
    return dict(pair_share=share_with_pairs(batch, "global", start=ends))


TRANSITION = Objective(transition, "dInfer", normaliser=share_of_transition)
TRAJ = Objective(traj, "naive trajectory distillation", normaliser=share_of_traj)
