"""dParallel: certainty forcing.

    baselines.dparallel(m, batch)["loss"].backward()

Source: the dParallel paper (arXiv 2509.26488). Dimensions: B batch, N response, K positions asked for, V vocabulary.
"""

import torch

from baselines.common import begin_in_grid, bernoulli, block_length_of, nll
from objectives import (
    Objective,
    Option,
    entropy,
    log_probs,
    masked_mean,
    per_row,
    place_of,
    select,
    uniform_int,
    was_decoded,
)


def dparallel(
    m, batch, block_length=32, weight=2.0, temperature=0.5, block=None, mask=None, generator=None, mask_id=None
):  # fmt: skip
    """In a random block of the response each position is masked with probability 1/2, in a second pass the others; all
    before the block is visible, all after it masked -> dict(loss, ce, certainty, right); the loss of a pass is
    ce + weight * certainty, of a row the mean of its passes.

        ce        = mean over the block's masked positions of -log p(x0)
        certainty = mean entropy, nats at this temperature, over those whose argmax is right

    block_length: at most the attention's counts; where it divides the attention's, blocks are those of its grid.
    block [B]: the block's number from 0. mask [B, N]: what the first pass masks inside the block.
    right: share of the masked positions whose argmax is right.

    Our reading of the paper: a pass that masks nothing (a short last block) does not count. Raises ValueError for a
    block beyond the response. A block_length that does not divide the attention's lets a token see what is masked: all
    of the attention's blocks before its own are visible."""
    # 1. a block of each row, and what its first pass masks
    place, real, generators = place_of(batch["order"]), was_decoded(batch), per_row(generator, len(batch["length"]))
    length = batch["length"].cpu()  # a GPU waits here, once
    blocks, offset = block_length_of(m), torch.zeros_like(length)
    block_length = min(block_length, blocks or block_length)
    if blocks is not None and blocks % block_length == 0:
        offset = begin_in_grid(batch).cpu() % block_length
    begin = begin_of_blocks(length, block_length, block, generators, offset).to(place.device)[:, None]  # [B, 1]
    inside = (place >= begin) & (place < begin + block_length) & real  # [B, N]
    if mask is None:
        mask = draw_halves(length, place.shape[1], generators).to(place.device)  # [B, N]

    passes, counts = [], []
    for masked in (inside & mask, inside & ~mask):
        # 2. the model on the block's visible half and all before it
        positions, asked = select(masked, place)  # [B, K]
        visible = real & ((place < begin) | (inside & ~masked))
        logp = log_probs(m, batch, visible, positions, mask_id)  # [B, K, V]

        # 3. its cross-entropy on the other half, and its entropy where it is right
        right = (logp.argmax(-1) == batch["response_ids"].gather(1, positions)) & asked
        ce = masked_mean(nll(logp, batch, positions), asked)  # [B]
        certainty = masked_mean(entropy(logp / temperature), right)
        passes.append(torch.stack((ce, certainty, masked_mean(right.float(), asked))))
        counts.append(asked.any(1))

    # 4. the mean over the passes that mask something: [3, B, 2] and [B, 2] -> [3, B], and over the rows
    ce, certainty, right = masked_mean(torch.stack(passes, dim=-1), torch.stack(counts, dim=-1)).mean(1)
    loss = ce + weight * certainty
    return dict(loss=loss, ce=ce.detach(), certainty=certainty.detach(), right=right.detach())


def begin_of_blocks(length, block_length, block, generators, offset):
    """Where a block of each response of so many tokens begins, the given or a random one: int64 [B], on the host.
    offset [B]: how many tokens of the first block are of the prompt."""
    if block is None:
        last = (length - 1 + offset) // block_length
        block = [uniform_int(0, n, g) for n, g in zip(last.tolist(), generators)]
    begin = torch.as_tensor(block).cpu() * block_length - offset
    if (begin >= length).any():
        blocks = f"blocks {begin.tolist()} of {block_length}"
        raise ValueError(f"{blocks} begin beyond the end of responses of {length.tolist()} tokens")
    return begin


def draw_halves(length, N, generators):
    """True with probability 1/2 at each token of responses of so many tokens: bool [B, N]. All on the host."""
    mask = torch.zeros(len(length), N, dtype=torch.bool)
    for row, n, g in zip(mask, length.tolist(), generators):
        row[:n] = bernoulli(n, 0.5, g).cpu()
    return mask


DPARALLEL = Objective(
    loss=dparallel,
    source="dParallel",
    options=dict(
        block_length=Option("block length in tokens; at most the attention's", kind=int, low=1),
        weight=Option("weight of the certainty", low=0),
        temperature=Option("temperature at which the certainty is taken", low=0.01),
    ),
)
