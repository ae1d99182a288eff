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
