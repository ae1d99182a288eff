"""Small parts that several baselines share. Dimensions: B batch, N response, K positions asked for, V vocabulary."""

import torch

from objectives import device_of


def pick_token(logp, token):
    """log p of the tokens [B, K]: [B, K, V] -> [B, K]."""
    return logp.gather(-1, token[..., None])[..., 0]


def nll(logp, batch, positions):
    """-log p(x0) at the positions: [B, K]."""
    return -pick_token(logp, batch["response_ids"].gather(1, positions))


def bernoulli(n, share, generator):
    """True with probability share, n times: bool [n]. n is a row's own length, so that its draws do
    not depend on the padding."""
    return torch.rand(n, generator=generator, device=device_of(generator)) < share


def block_length_of(m):
    """The block length of a model whose attention is block-causal, or None."""
    return getattr(getattr(m, "config", None), "block_length", None)


def begin_in_grid(batch):
    """How far from the start of a grid of blocks each response begins: int64 [B]."""
    begin = batch["prompt_mask"].long().sum(1)
    return begin - torch.as_tensor(batch.get("origin", 0), device=begin.device)
