"""The ideal objective, Eq. 4 as the paper has it: Eq. 1 on random masks, and the KL of Eq. 6 as a regulariser.

    baselines.ideal(m, batch)["loss"].backward()          # batch["entropy"]: the base model's, from a trajectory
    baselines.ideal(m, batch, window=32)                  # the KL of a window of the trajectory

The paper calls the KL intractable, and trains Eq. 9 in its place. It is exact here: see `boltzmann_kl`. It takes one
forward pass for each decode step of the trajectory or window, and all their activations are held until the backward.

Source: the TABOM paper (arXiv 2605.11854, Eq. 1, 3 to 6). Dimensions: B batch, N response, K positions of the windows.
"""

import torch

from baselines.exact import boltzmann_kl, entropies_by_step
from baselines.weighted import MASKS_OPTION, nelbo
from objectives import (
    Objective,
    Option,
    check_window,
    context_and_targets,
    decode_steps,
    draw_windows,
    masked_mean,
    window_size,
)


def ideal(
    m, batch, window=None, weight=1.0, beta=1.0, masks="ratio", mask=None, start=None, generator=None, mask_id=None
):  # fmt: skip
    """Eq. 4: loss = ce + weight * kl -> dict(loss, ce, masked, kl, entropy).

    ce, masked: of Eq. 1, on random masks (masks, mask: see `nelbo`).
    kl: KL(q* || p) over the states of the trajectory, a sum over its tokens, each with its entropy h at its own step.
    entropy: their mean h. Both in nats.
    window: None, the whole trajectory; or, with start, as in `objectives.draw_windows`: the states of that window.
    weight: lambda. beta: the inverse temperature of q* and p.
    Raises ValueError for an impossible window or start, and for a batch without the base model's entropies."""
    if "entropy" not in batch:
        raise ValueError("ideal needs batch['entropy'], which the base model's decoding logged")

    # 1. Eq. 1 on random masks
    plain = nelbo(m, batch, mask, generator, mask_id, masks=masks)

    # 2. the tokens of the trajectory, or of a window of it, in decode order: [B, K]
    size = decode_steps(batch)  # [B]
    first = torch.zeros_like(size)
    if window is not None:
        first, size = draw_windows(batch, window, start, generator=generator)
    _, positions, real = context_and_targets(batch, first, size)

    # 3. the entropy of each at its own step. Counted from the step before the first, all are later: no 0 stays.
    h = torch.zeros(positions.shape, device=positions.device)
    h = entropies_by_step(h, m, batch, first - 1, size, positions, real, mask_id)

    # 4. Eq. 6, and the means over rows
    kl = boltzmann_kl(h, batch["entropy"].gather(1, positions), beta, real).mean()
    log = dict(ce=plain["ce"], masked=plain["masked"], kl=kl.detach(), entropy=masked_mean(h.detach(), real).mean())
    return dict(loss=plain["loss"] + weight * kl, **log)


def check_ideal(parameters):
    """See Objective.check."""
    if parameters["window"] is not None:
        check_window(parameters["window"], "uniform")


IDEAL = Objective(
    loss=ideal,
    source="Eq. 4",
    needs=lambda parameters: ("order", "entropy"),
    check=check_ideal,
    lockstep=lambda parameters: False,  # a forward pass for each step of the batch's trajectories
    options=dict(
        window=Option("W of the KL, a forward pass for each (default: the whole trajectory)", window_size),
        weight=Option("lambda, the weight of the KL", low=0),
        beta=Option("inverse temperature of Eq. 3 and 5", low=0),
        **MASKS_OPTION,
    ),
)
