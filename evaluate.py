"""Is a response right, and does a model decode from easy to hard: checks of answers, and the TDS of the TABOM paper.

    evaluate.check("number", response_text, reference_answer)      # True, False, or None where nothing can be checked
    evaluate.tds(m, batch, eos_id)                                 # {"tds": 0.21, "per_step": [...]}

`m` and batch are those of objectives.py: a callable m(ids, attention_mask=None, positions=None) -> logits, and a dict
of prompt_ids, prompt_mask [B, P], response_ids, order [B, N], length [B].
"""

import re
from decimal import Decimal, InvalidOperation

import torch

CHECKS = ("none", "number", "exact")
NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?|-?\$?\.\d+")


def check(kind, response, answer):
    """Whether a response agrees with the reference answer: True, False, or None where that cannot be told.

    "number": the final number of the response against that of the answer (see final_number); None for an answer that
    ends in anything but one number. "exact": the same text, but for space around it. "none": None.
    Raises ValueError for another kind."""
    if kind not in CHECKS:
        raise ValueError(f"check {kind!r} is none of {', '.join(CHECKS)}")
    if kind == "none" or answer is None:
        return None
    if kind == "exact":
        return response.strip() == answer.strip()
    gold = final_number(answer, only=True)
    return None if gold is None else final_number(response) == gold


def final_number(text, only=False):
    """The number after the last ####, else in the last \\boxed{}, else the last number of the text: Decimal or None.
    only: the text, or what is marked, must be the number and nothing else (72 apples, 3/4 and 2x are none)."""
    if "####" in text:
        text = text.rsplit("####", 1)[1]
    elif "\\boxed{" in text:
        text = text.rsplit("\\boxed{", 1)[1].split("}")[0]
    found = NUMBER.findall(text)
    if not found or (only and found[-1] != text.strip().removesuffix(".")):
        return None
    try:
        return Decimal(found[-1].replace(",", "").replace("$", ""))
    except InvalidOperation:
        return None


@torch.no_grad()
def tds(m, batch, eos_id, mask_id=None):
    """Trajectory decoding separability (Eq. 10, 11): the variance, over the positions before the first EOS that are
    still masked, of the entropies in nats at each decoding step; averaged over the steps, then over the trajectories.

    The batch is replayed in its decode order, one forward pass a step. -> dict(tds: float, rows: one value for each
    trajectory, per_step: one for each step, over the trajectories that still have such a position)."""
    mask_id = m.config.mask_id if mask_id is None else mask_id
    response, order, length = batch["response_ids"], batch["order"], batch["length"]
    P, (B, N) = batch["prompt_ids"].shape[1], response.shape
    place = torch.arange(N, device=response.device)
    real = place < length[:, None]  # [B, N]
    attention_mask = torch.cat((batch["prompt_mask"].bool(), real), dim=1)
    end = torch.where(response == eos_id, place, N).min(dim=1, keepdim=True).values  # [B, 1] the first EOS
    content = real & (place < end)  # [B, N]
    variance = torch.full((N, B), float("nan"), device=response.device)
    for t in range(N):
        asked = content & (order >= t)  # still masked before step t
        if not asked.any():
            break
        ids = torch.cat((batch["prompt_ids"], response.masked_fill(order >= t, mask_id)), dim=1)
        K = int(asked.sum(1).max())
        index = asked.int().argsort(dim=1, descending=True, stable=True)[:, :K]  # [B, K]
        logp = m(ids, attention_mask=attention_mask, positions=P + index).float().log_softmax(-1)
        h = -(logp.exp() * logp).sum(-1).masked_fill(~asked.gather(1, index), float("nan"))  # [B, K]
        variance[t] = (h - h.nanmean(1, keepdim=True)).square().nanmean(1)
    rows = variance.nanmean(0)
    per_step = variance.nanmean(1)
    return dict(tds=rows.nanmean().item(), rows=rows.tolist(), per_step=per_step[~per_step.isnan()].tolist())
