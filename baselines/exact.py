"""The ranking of a window without the paper's approximations: the KL of Eq. 6, the likelihood of its decode order, and
entropies in the context of Eq. 5.

    objectives.tabom(m, batch, ranking="kl")              # batch["entropy"]: the base model's, from a trajectory
    objectives.tabom(m, batch, ranking="listwise", entropy_context="step")
    baselines.boltzmann_kl(h, base_h, beta=1.0)           # [..., W] in decode order -> [...]

Source: the TABOM paper (arXiv 2605.11854); Plackett 1975 for the likelihood. Dimensions: B batch, N response, W window,
K positions of the windows.
"""

import torch
import torch.nn.functional as F

from objectives import CONTEXTS, RANKINGS, Ranking, decoded_before, nll_and_entropy, select


def listwise_loss(entropy, beta=1.0, real=None):
    """-log of the probability of a decode order in the Plackett-Luce model -> [...]. The model draws
    each next token among those not yet decoded with probability softmax(-beta h); exp(-loss) sums
    to 1 over all W! orders. entropy [..., W] in decode order, nats; real as in objectives.ranking_loss."""
    W = entropy.shape[-1]
    if real is None:
        real = torch.ones_like(entropy, dtype=torch.bool)
    itself = torch.eye(W, dtype=torch.bool, device=entropy.device)  # so that no row is empty
    later = torch.ones_like(itself).triu(1)
    left = itself | (later & real[..., None, :])  # [..., W, W]; row k: not yet decoded when k is
    score = (-beta * entropy)[..., None, :].expand(left.shape)
    logp = score.masked_fill(~left, -torch.inf).log_softmax(-1).diagonal(dim1=-2, dim2=-1)
    return -torch.where(real, logp, 0.0).sum(-1)


def boltzmann_kl(entropy, base_entropy, beta=1.0, real=None):
    """Eq. 6, exactly: KL(q* || p) over the sets U of tokens decoded next, where p(U) = exp(-beta * sum of h over U) / Z
    (Eq. 5), and q* is the same with the base model's entropies (Eq. 3) -> [...].

    The energy is a sum over U's members: Z = prod (1 + exp(-beta h)), each token is in U on its own
    with probability sigmoid(-beta h), and the KL is a sum of W terms. It is 0, with gradient 0,
    where h is the base model's. entropy, base_entropy [..., W] in nats; real as in objectives.ranking_loss."""
    if real is None:
        real = torch.ones_like(entropy, dtype=torch.bool)
    # Entries that are not real may be NaN in a log, and must not reach the gradient.
    x, x_base = -beta * entropy, -beta * torch.where(real, base_entropy, 0.0)
    q = x_base.sigmoid()
    inside = q * (F.logsigmoid(x_base) - F.logsigmoid(x))
    outside = (1 - q) * (F.logsigmoid(-x_base) - F.logsigmoid(-x))  # 1 - sigmoid(x) = sigmoid(-x)
    return torch.where(real, inside + outside, 0.0).sum(-1)


def entropies_by_step(h, m, batch, first, size, positions, real, mask_id=None):
    """h of each window token given everything that was decoded before its step, as in Eq. 5: [B, K]. Those of the first
    step keep h [B, K], from the window's start; one forward pass for each other step. The rest is as in `tabom`: first,
    size [B], positions, real [B, K]."""
    step = batch["order"].gather(1, positions) - first[:, None]  # [B, K], from the window's start
    for s in step[real & (step > 0)].unique():  # a step in which no row decoded anything costs nothing
        column, kept = select(real & (step == s), step)  # [B, k]: where the window has this step
        visible = decoded_before(batch, first + s)  # U_t and the first s steps of the window
        _, found = nll_and_entropy(m, batch, visible, positions.gather(1, column), mask_id)
        h = h.scatter(1, column, torch.where(kept, found, h.gather(1, column)))
    return h


def kl_ranking(h, real, margin, beta, entropy):
    """`boltzmann_kl` as tabom calls it. entropy [B, K]: the base model's."""
    return boltzmann_kl(h, entropy, beta, real)


def listwise_ranking(h, real, margin, beta):
    """`listwise_loss` as tabom calls it."""
    return listwise_loss(h, beta, real)


# The base model's entropies were logged at each token's step: the KL compares with the same.
RANKINGS.update(listwise=Ranking(listwise_ranking), kl=Ranking(kl_ranking, contexts=("step",), needs=("entropy",)))
CONTEXTS.update(step=entropies_by_step)
