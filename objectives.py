"""The training objectives of the TABOM paper, side by side, on one batch format and one primitive.

    out = objectives.tabom(m, batch, window=32, margin=0.2, weight=1.0)
    out["loss"].backward()                                     # and out["ce"], out["rank"], ... for the log

batch: a dict of tensors
    prompt_ids, prompt_mask [B, P]    left-padded prompts, mask 1 = real token
    response_ids, order [B, N]        right-padded; order[r] = rank of position r in the decode order, 0 = first
    length [B]                        real tokens of each response
`m` is any callable m(ids, attention_mask=None, positions=None) -> logits [B, K, V] at those positions, where the logits
at a position predict the token at that position.

Every objective asks the same thing, "the logits at these positions, given that these tokens are visible", and differs
only in which. All return a dict whose "loss" is the mean over the rows of the batch of a row's own loss, so the loss of
a larger batch is the weighted mean of its parts. Losses are float32 whatever the model's dtype.

Dimensions: B batch, P prompt, N response, W window, K positions asked for, V vocabulary.
"""

import torch

# ---------------------------------------------------------------------------------------------------- the primitive


def log_probs(m, batch, visible, positions, mask_id=None):
    """log p(. | U) at some response positions: [B, K, V], float32.

    visible [B, N]: U, the response tokens that the model sees; every other one is masked, and so is nothing of the
    prompt. positions [B, K]: where to predict, counted from the start of the response."""
    mask_id = m.config.mask_id if mask_id is None else mask_id
    P, real = batch["prompt_ids"].shape[1], valid(batch)  # [B, N]
    ids = torch.cat((batch["prompt_ids"], batch["response_ids"].masked_fill(~visible, mask_id)), dim=1)
    attention_mask = torch.cat((batch["prompt_mask"].bool(), real), dim=1)  # [B, P + N]
    logits = m(ids, attention_mask=attention_mask, positions=P + positions)
    return logits.float().log_softmax(-1)


def valid(batch):
    """True at the real tokens of each response, False at its padding: bool [B, N]."""
    N = batch["response_ids"].shape[1]
    return torch.arange(N, device=batch["length"].device) < batch["length"][:, None]


def select(chosen, key):
    """Positions [B, K] of the True entries of chosen [B, N], by rising key, and which are real: bool [B, K]."""
    count = chosen.sum(1)
    K = int(count.max())
    index = torch.where(chosen, key, torch.iinfo(torch.int64).max).argsort(dim=1, stable=True)[:, :K]
    return index, torch.arange(K, device=chosen.device) < count[:, None]


def row_mean(x, real):
    """Mean of x over the real entries of each row, [B]; 0 for a row without any."""
    return torch.where(real, x, 0.0).sum(-1) / real.sum(-1).clamp(min=1)


def entropy(logp):
    """h = -sum p log p in nats over the whole vocabulary: [..., V] -> [...]."""
    return -(logp.exp() * logp).sum(-1)


def nll(logp, batch, positions):
    """-log p(x0) at the positions: [B, K]."""
    target = batch["response_ids"].gather(1, positions)
    return -logp.gather(-1, target[..., None])[..., 0]


def per_row(generator, B):
    """A generator for every row: the list given, or one shared by all."""
    found = list(generator) if isinstance(generator, (list, tuple)) else [generator] * B
    if len(found) != B:
        raise ValueError(f"{len(found)} generators for {B} rows: give one, or one for each")
    return found


def randint(low, high, generator):
    """One whole number, uniform in low..high, both included."""
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(low, high + 1, (), generator=generator, device=device))


# ------------------------------------------------------------------------------------------------------------ TABOM


def ranking_loss(entropy, margin, real=None):
    """Eq. 8: mean over the W(W-1)/2 pairs, r decoded before s, of max(0, h(r) - h(s) + margin) -> scalar.

    entropy [..., W] in decode order, in nats; leading dimensions are averaged. real [..., W]: False entries take no
    part. One token has no pair, and no loss."""
    if real is None:
        real = torch.ones_like(entropy, dtype=torch.bool)
    return rank_rows(entropy, margin, real)[0].mean()


def rank_rows(entropy, margin, real):
    """The ranking loss of each row, and the share of its pairs that are in order (h(r) < h(s)): two tensors [...]."""
    W = entropy.shape[-1]
    earlier_first = torch.ones(W, W, dtype=torch.bool, device=entropy.device).triu(1)
    pair = earlier_first & real[..., :, None] & real[..., None, :]  # [..., W, W]; r is the row, s the column
    gap = entropy[..., :, None] - entropy[..., None, :]  # h(r) - h(s)
    count = pair.sum((-2, -1)).clamp(min=1)
    loss = torch.where(pair, (gap + margin).clamp(min=0), 0.0).sum((-2, -1)) / count
    return loss, (pair & (gap < 0)).sum((-2, -1)) / count


def windows(length, window, start=None, generator=None):
    """The first rank and the size of a window in the decode order of each row: two int64 tensors [B].

    window W: min(W, length) consecutive ranks from a start uniform in 0..length - W. window "global": between two
    random timesteps, uniform over all pairs of different ones (dInfer; Table 5 of the paper).
    start, if given: the start [B] for W, start and end [B, 2] for "global".
    Raises ValueError for a window below 2 and for a start outside the response."""
    lengths = length.tolist()
    generators = per_row(generator, len(lengths))
    if window == "global":
        if start is None:
            ends = []
            for n, g in zip(lengths, generators):
                a = randint(0, n, g)
                b = randint(0, n - 1, g)
                b += b >= a  # two different timesteps of 0..n
                ends.append((min(a, b), max(a, b)))
            start = ends
        start = torch.as_tensor(start)
        first, size = start[:, 0], start[:, 1] - start[:, 0]
    else:
        if not isinstance(window, int) or window < 2:
            raise ValueError(f"window {window!r}: needs at least 2 tokens (one has no pair to rank), or 'global'")
        size = torch.tensor([min(window, n) for n in lengths])
        if start is None:
            start = torch.tensor([randint(0, n - int(w), g) for n, w, g in zip(lengths, size, generators)])
        first = torch.as_tensor(start)
    first, size = first.to(length.device), size.to(length.device)
    if (first < 0).any() or (size < 1).any() or (first + size > length).any():
        raise ValueError(f"windows from {first.tolist()} of {size.tolist()} tokens leave responses of {lengths} tokens")
    return first, size


def tabom(
    m,
    batch,
    window=32,
    margin=0.2,
    weight=1.0,
    start=None,
    generator=None,
    entropy_context="window",
    mask_id=None,
):
    """Eq. 9: reconstruct a window of W consecutively decoded tokens from the context that decoding had, and rank their
    entropies -> dict(loss, ce, rank, in_order, entropy); loss = ce + weight * rank.

    window: W, or "global" (see `windows`, also for start [B]). margin: gamma of Eq. 8, nats. weight: lambda.
    generator: a torch.Generator, or a list of one for each row.
    entropy_context: where the entropies of Eq. 8 come from. "window": all from the window's start U_t, in the same
        forward pass as the cross-entropy. "step": each from the context of its own step (Eq. 5): W forward passes,
        and the activations of W passes at once.
    in_order (share of the window's pairs with h(r) < h(s)) and entropy (mean, nats) are for the log.

    Sources: section 4 of the paper; a response shorter than W is a window as a whole (our reading)."""
    # 1. the window in the decode order, and what was decoded before it
    first, size = windows(batch["length"], window, start, generator)
    rank = batch["order"] - first[:, None]  # [B, N] rank inside the window
    in_window = (rank >= 0) & (rank < size[:, None]) & valid(batch)
    visible = (rank < 0) & valid(batch)  # U_t
    positions, real = select(in_window, batch["order"])  # [B, W] in decode order

    # 2. reconstruct it from U_t
    logp = log_probs(m, batch, visible, positions, mask_id)  # [B, W, V]
    ce = row_mean(nll(logp, batch, positions), real)  # [B]

    # 3. its entropies
    if entropy_context == "window":
        h = entropy(logp)  # [B, W]
    elif entropy_context == "step":
        h = own_step_entropy(m, batch, first, positions, entropy(logp[:, :1]), mask_id)
    else:
        raise ValueError(f"entropy_context {entropy_context!r} is neither 'window' nor 'step'")

    # 4. rank them
    rank_loss, in_order = rank_rows(h, margin, real)  # [B]
    loss = ce + weight * rank_loss
    return dict(
        loss=loss.mean(),
        ce=ce.mean(),
        rank=rank_loss.mean(),
        in_order=in_order.mean(),
        entropy=row_mean(h.detach(), real).mean(),
    )


def own_step_entropy(m, batch, first, positions, h_first, mask_id=None):
    """Eq. 5: h of the k-th window token given everything decoded before it, [B, W]. The first one is known already."""
    h = [h_first]
    for k in range(1, positions.shape[1]):
        visible = (batch["order"] < first[:, None] + k) & valid(batch)  # U_t and the first k tokens of the window
        h.append(entropy(log_probs(m, batch, visible, positions[:, k : k + 1], mask_id)))
    return torch.cat(h, dim=1)


# -------------------------------------------------------------------------------------------- without a trajectory


def nelbo(m, batch, mask=None, generator=None, mask_id=None):
    """Eq. 1: mean over the masked positions of -log p(x0 | U), U uniform -> dict(loss, ce, masked).

    SFT-GT on answers of a dataset, SFT-SD on the model's own. t ~ U(0, 1) and every position masked with probability t,
    given that one is masked at least, makes the number of masked positions uniform in 1..N and their place uniform: it
    is drawn in that way, without t. mask [B, N]: the masked positions, instead of random ones. masked: their share."""
    real = valid(batch)
    if mask is None:
        mask = torch.zeros_like(real)
        for row, n, g in zip(mask, batch["length"].tolist(), per_row(generator, len(mask))):
            count = randint(1, n, g)
            device = "cpu" if g is None else g.device
            row[torch.randperm(n, generator=g, device=device)[:count].to(row.device)] = True
    mask = mask & real
    if not mask.any(1).all():
        raise ValueError("mask: every row needs a masked position")
    positions, asked = select(mask, torch.arange(mask.shape[1], device=mask.device).expand_as(mask))
    logp = log_probs(m, batch, real & ~mask, positions, mask_id)  # [B, K, V]
    loss = row_mean(nll(logp, batch, positions), asked).mean()
    return dict(loss=loss, ce=loss.detach(), masked=(mask.sum(1) / batch["length"]).mean())


# ------------------------------------------------------------------------------------------------ other objectives


def transition(m, batch, start=None, generator=None, mask_id=None):
    """dInfer: two random timesteps, cross-entropy on what was decoded between them given what was decoded before
    -> dict(loss, ce, ...). TABOM with the global window and without ranking. start [B, 2]: the two timesteps."""
    return tabom(m, batch, window="global", weight=0.0, start=start, generator=generator, mask_id=mask_id)


OBJECTIVES = {"tabom": tabom, "nelbo": nelbo, "transition": transition}
