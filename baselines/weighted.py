"""Eq. 1 weighted by the mask ratio of each row, as SDAR and A2D were trained, and on the masks of the paper's words.

    baselines.nelbo(m, batch, weighting="scheduler", norm="token")["loss"].backward()
    baselines.nelbo(m, batch, masks="subset")             # U uniform among all subsets
    baselines.nelbo(m, batch)                             # objectives.nelbo

Sources: the TABOM paper (arXiv 2605.11854, Eq. 1); JetAstra/SDAR and ZHZisZZ/dllm. Dimensions: B batch, N response.
"""

import torch

import objectives
from baselines.common import bernoulli
from objectives import Objective, Option, device_of, draw_mask, masked_nll, per_row, was_decoded

WEIGHTINGS = ("mean", "scheduler", "uniform")
NORMS = ("token", "sequence", "batch")


def nelbo(
    m, batch, mask=None, generator=None, mask_id=None, weighting="mean", norm="token", ratio=None, targets=None,
    masks="ratio",
):  # fmt: skip
    """Eq. 1, or the sum of -log p(x0 | U) over the masked positions of a row in its place -> dict(loss, ce, masked).

    weighting: "mean": objectives.nelbo. "scheduler": a row has a mask ratio 0.999 t + 0.001, where t ~ U(0, 1), each
        token is masked with this probability, and the row's sum is divided by it. "uniform": without the division.
    masks: of "mean": "ratio": every number of masked tokens is equally likely. "subset": every subset of the tokens.
    norm: of the last two: the sums are divided by the tokens of a row: "token": of all rows together (a long row counts
        more), "sequence": of each row; or not at all: "batch".
    ratio [B]: the mask ratio that a given mask [B, N] was drawn with. targets: the tokens of a row to divide by with
        "token", where this batch is a part of one: the mean over all its rows.
    masked: the share of masked positions. Raises ValueError for unknown choices, and a weighting without its ratio. A
    row without a masked position has the loss 0."""
    for name, value, known in (("weighting", weighting, WEIGHTINGS), ("norm", norm, NORMS), ("masks", masks, MASKS)):
        if value not in known:
            raise ValueError(f"{name} {value!r} is none of {', '.join(known)}")
    if weighting == "mean":
        if mask is None and masks != "ratio":
            mask = MASKS[masks](batch, generator)
        return objectives.nelbo(m, batch, mask, generator, mask_id)
    if weighting == "scheduler" and mask is not None and ratio is None:
        raise ValueError("weighting 'scheduler' divides by the ratio that the mask was drawn with: give it")

    # 1. what is masked
    if mask is None:
        ratio, mask = draw_ratio_mask(batch, generator)  # [B], [B, N]
    decoded = was_decoded(batch)  # [B, N]
    mask = mask & decoded
    masked, tokens = mask.sum(1), decoded.sum(1).clamp(min=1)  # [B]

    # 2. its cross-entropy; kernels need not know what to do where nothing is asked, so one position always is
    asked = mask
    if not mask.any():
        asked = torch.zeros_like(mask)
        asked[:, 0] = True
    ce = torch.where(masked > 0, masked_nll(m, batch, asked, mask_id), 0.0)  # [B]

    # 3. the sum over a row's masked tokens, weighted
    loss = ce * masked
    if weighting == "scheduler":
        loss = loss / ratio
    if norm == "token":
        loss = loss / (targets or tokens.float().mean())
    elif norm == "sequence":
        loss = loss / tokens
    return dict(loss=loss.mean(), ce=ce.detach().mean(), masked=(masked / tokens).mean())


def draw_subset(batch, generator=None):
    """Random masked positions, every subset of a row's tokens but the empty one equally likely: bool [B, N]."""
    decoded = was_decoded(batch)  # [B, N]
    mask = torch.zeros_like(decoded)
    for row, can_mask, n, g in zip(mask, decoded, batch["length"].tolist(), per_row(generator, len(mask))):
        while can_mask.any() and not row.any():  # the empty one, of 2^N: again
            row[:n] = bernoulli(n, 0.5, g).to(row.device) & can_mask[:n]
    return mask


MASKS = dict(ratio=draw_mask, subset=draw_subset)  # (batch, generator) -> what Eq. 1 masks, bool [B, N]
MASKS_OPTION = dict(
    masks=Option(
        "what is equally likely: every number of masked tokens (ratio, as the authors draw), or every subset of the "
        "tokens (subset, the paper's words), which nearly always masks about half",
        choices=tuple(MASKS),
    ),
)


def draw_ratio_mask(batch, generator=None):
    """A mask ratio 0.999 t + 0.001, t ~ U(0, 1), of each row, and a mask that hides each of its
    tokens with this probability, perhaps none: float [B] and bool [B, N]."""
    decoded, ratios = was_decoded(batch), []
    mask = torch.zeros_like(decoded)
    for row, n, g in zip(mask, batch["length"].tolist(), per_row(generator, len(mask))):
        t = torch.rand((), generator=g, device=device_of(g)).item()
        ratios.append(0.999 * t + 0.001)
        row[:n] = bernoulli(n, ratios[-1], g).to(row.device)
    return torch.tensor(ratios, device=mask.device), mask & decoded


def mean_tokens(batch, parameters, generators):
    """See Objective.normaliser: the tokens of a row, where the loss is divided by them."""
    if parameters["weighting"] == "mean" or parameters["norm"] != "token":
        return {}
    return dict(targets=was_decoded(batch).sum(1).float().mean().item())


NELBO = Objective(
    loss=nelbo,
    source="Eq. 1",
    normaliser=mean_tokens,
    needs=lambda parameters: (),
    check=lambda parameters: ("norm",) if parameters["weighting"] == "mean" else ("masks",),
    options=dict(
        weighting=Option(
            "of a row's masked tokens: their mean; or, as SDAR and A2D are trained, each divided by the row's mask "
            "ratio (scheduler), or not (uniform)",
            choices=WEIGHTINGS,
        ),
        norm=Option(
            "with --weighting scheduler or uniform: divide by the tokens of all rows, or of each row, or only by the "
            "rows",
            choices=NORMS,
        ),
        **MASKS_OPTION,
    ),
)
