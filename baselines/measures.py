"""Measures of trajectories that only experiments ask for.

    h = objectives.replay(m, batch)                         # entropies at every step of trajectories
    baselines.inversions(baselines.entropies_when_decoded(h, batch))
    baselines.masked_loss(m, batch, 0.5, generators)        # Figure 3 of the TABOM paper

Dimensions: B batch, N response, S decode steps, K positions.
"""

import torch

from objectives import (
    NEVER,
    decode_steps,
    draw_mask,
    in_decode_order,
    masked_nll,
    masked_until,
    was_decoded,
)


def entropies_when_decoded(h, batch):
    """Of a replay [B, S, N], each token's entropy at its own step, in decode order: [B, N]."""
    step = in_decode_order(masked_until(batch), batch)  # [B, N]
    own = h.gather(1, step.clamp(min=0)[:, None])[:, 0]
    return own.masked_fill(~in_decode_order(was_decoded(batch), batch), torch.nan)


def windows_of_replay(h, batch, window):
    """A replay [B, S, N] as the windows that TABOM ranks: [B, S, K], [b, t] = h given U_t of the
    tokens decoded in the W steps from t on, in decode order. NaN after them, and where no window
    starts at t (they start at 0..S - W of the row, or at 0 alone in a shorter one)."""
    (B, S, N), steps = h.shape, decode_steps(batch)[:, None]
    start = torch.arange(S, device=h.device).expand(B, S).contiguous()
    step = torch.where(was_decoded(batch), batch["order"], NEVER).sort(1).values  # [B, N]
    begin = torch.searchsorted(step, start)  # [B, S]: tokens decoded before t
    count = torch.searchsorted(step, start + window) - begin
    count = torch.where(start <= (steps - window).clamp(min=0), count, 0)
    place = torch.arange(int(count.max()), device=h.device)  # [K]
    found = h.gather(-1, (begin[..., None] + place).clamp(max=N - 1))
    return found.masked_fill(place >= count[..., None], torch.nan)


def inversions(h):
    """How often an earlier token is less certain than a later one. h [..., K]: entropies in decode
    order, such as those of `entropies_when_decoded` or `windows_of_replay`; NaN takes no part.

    -> dict(inverted, pairs), int64 [K - 1]: of the pairs at distance 1, 2, ... in decode order, how
    many have h(earlier) > h(later), and how many there are."""
    counts = torch.zeros(2, max(h.shape[-1] - 1, 0), dtype=torch.int64, device=h.device)
    for i in range(counts.shape[1]):
        gap = h[..., : -i - 1] - h[..., i + 1 :]  # at distance i + 1
        counts[0, i] = (gap > 0).sum()
        counts[1, i] = (~gap.isnan()).sum()
    inverted, pairs = counts.cpu()
    return dict(inverted=inverted, pairs=pairs)


@torch.no_grad()
def masked_loss(m, batch, mask_ratio, generators, mask_id=None):
    """Cross-entropy at a mask ratio (Figure 3): [B], the mean of -log p(x0) in nats over random masked
    tokens of each response, mask_ratio of them (rounded, at least one), given the others; where
    attention is block-causal, given those of its block and all tokens of the blocks before."""
    mask = draw_mask(batch, generators, mask_ratio).to(batch["order"].device)
    return masked_nll(m, batch, mask, mask_id)
