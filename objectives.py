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
import torch.nn.functional as F

# ---------------------------------------------------------------------------------------------------- the primitive


def log_probs(m, batch, visible, positions, mask_id=None, noise=None):
    """log p(. | U) at some response positions: [B, K, V], float32.

    visible [B, N]: U, the response tokens that the model sees; every other one is masked, and so is nothing of the
    prompt. positions [B, K]: where to predict, counted from the start of the response. noise [B, N]: ids to show
    instead of the mask (see `disturb`)."""
    mask_id = m.config.mask_id if mask_id is None else mask_id
    P, real = batch["prompt_ids"].shape[1], valid(batch)  # [B, N]
    hidden = torch.full_like(batch["response_ids"], mask_id) if noise is None else noise
    ids = torch.cat((batch["prompt_ids"], torch.where(visible, batch["response_ids"], hidden)), dim=1)
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
    return Entropy.apply(logp)


class Entropy(torch.autograd.Function):
    """-(logp.exp() * logp).sum(-1), with less memory: p is computed again for the gradient, -p (1 + log p), instead of
    being kept, and for a few positions at a time."""

    FEW = 32

    @staticmethod
    def forward(ctx, logp):
        ctx.save_for_backward(logp)
        parts = logp.reshape(-1, logp.shape[-1]).split(Entropy.FEW)
        lowest = torch.finfo(logp.dtype).min  # for -inf, which times p = 0 is no number
        return torch.cat([-x.exp().mul_(x.clamp(min=lowest)).sum(-1) for x in parts]).view(logp.shape[:-1])

    @staticmethod
    def backward(ctx, grad):
        (logp,) = ctx.saved_tensors
        found = torch.empty_like(logp, memory_format=torch.contiguous_format)
        flat = (
            x.split(Entropy.FEW)
            for x in (found.view(-1, logp.shape[-1]), logp.reshape(-1, logp.shape[-1]), grad.reshape(-1, 1))
        )
        for out, x, g in zip(*flat):
            torch.mul(x.exp(), x.clamp(min=torch.finfo(x.dtype).min).add_(1), out=out).mul_(-g)
        return found


def at(logp, token):
    """log p of the tokens [B, K]: [B, K, V] -> [B, K]."""
    return logp.gather(-1, token[..., None])[..., 0]


def nll(logp, batch, positions):
    """-log p(x0) at the positions: [B, K]."""
    return -at(logp, batch["response_ids"].gather(1, positions))


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


def coins(n, share, generator):
    """True with probability share, n times: bool [n]. (Not more than n are drawn: a row's randomness is its own.)"""
    return torch.rand(n, generator=generator, device="cpu" if generator is None else generator.device) < share


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


def decoded(batch, first, size):
    """What a decoder saw and what it decoded next: the tokens of rank below first [B] (bool [B, N]), and the positions
    of the `size` [B] tokens from there on in decode order, [B, K], with which of them are real."""
    rank = batch["order"] - first[:, None]  # [B, N] rank after the state
    following = (rank >= 0) & (rank < size[:, None]) & valid(batch)
    return (rank < 0) & valid(batch), *select(following, batch["order"])


def tabom(
    m,
    batch,
    window=32,
    margin=0.2,
    weight=1.0,
    start=None,
    generator=None,
    entropy_context="window",
    ce_weight=1.0,
    mask_id=None,
):
    """Eq. 9: reconstruct a window of W consecutively decoded tokens from the context that decoding had, and rank their
    entropies -> dict(loss, ce, rank, in_order, entropy); loss = ce_weight * ce + weight * rank.

    window: W, or "global" (see `windows`, also for start [B]). margin: gamma of Eq. 8, nats. weight: lambda; 0 leaves
    the masking along the trajectory alone. ce_weight: 1 in the paper; 0 leaves the ranking alone.
    generator: a torch.Generator, or a list of one for each row.
    entropy_context: where the entropies of Eq. 8 come from. "window": all from the window's start U_t, in the same
        forward pass as the cross-entropy. "step": each from the context of its own step (Eq. 5): W forward passes,
        and the activations of W passes at once.
    in_order (share of the window's pairs with h(r) < h(s)) and entropy (mean, nats) are for the log.

    Sources: section 4 of the paper; a response shorter than W is a window as a whole (our reading)."""
    # 1. the window in the decode order, and what was decoded before it
    first, size = windows(batch["length"], window, start, generator)
    visible, positions, real = decoded(batch, first, size)  # U_t [B, N]; the window [B, W] in decode order

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
    loss = ce_weight * ce + weight * rank_loss
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


# ------------------------------------------------------------------------------- other objectives along a trajectory


def transition(m, batch, start=None, generator=None, mask_id=None):
    """dInfer: two random timesteps, cross-entropy on what was decoded between them given what was decoded before
    -> dict(loss, ce, ...) as of tabom. start [B, 2]: the two timesteps, the lower one first.

    It is TABOM with the global window and without ranking, which is here measured and not trained."""
    return tabom(m, batch, window="global", weight=0.0, start=start, generator=generator, mask_id=mask_id)


def states(length, start=None, generator=None):
    """How many tokens are decoded in a random state of each trajectory: uniform in 0..length - 1, int64 [B].

    start [B], if given, instead. Raises ValueError for a start outside the response, or one that leaves nothing."""
    lengths = length.tolist()
    if start is None:
        start = [randint(0, n - 1, g) for n, g in zip(lengths, per_row(generator, len(lengths)))]
    start = torch.as_tensor(start).to(length.device)
    if (start < 0).any() or (start >= length).any():
        raise ValueError(f"states of {start.tolist()} decoded tokens leave nothing of responses of {lengths} tokens")
    return start


def traj(m, batch, start=None, generator=None, mask_id=None):
    """Naive trajectory distillation: cross-entropy on every token that is still masked at a random state of the
    trajectory -> dict(loss, ce, ...) as of tabom. start [B]: tokens decoded in that state.

    Source: the baseline of the T3D paper. A transition whose later timestep is the end."""
    first = states(batch["length"], start, generator)
    ends = torch.stack((first, batch["length"]), dim=1)
    return transition(m, batch, start=ends, mask_id=mask_id)


def t3d(
    m,
    batch,
    alpha=0.5,
    beta=0.1,
    path_weight=0.2,
    random_tokens=0.1,
    reference=None,
    start=None,
    generator=None,
    mask_id=None,
):
    """T3D: prefer the trajectory's tokens over those that a reference model would choose, at all positions still masked
    in a random state, and stay consistent with the path -> dict(loss, ddo, path, ce); loss = ddo + path_weight * path.

        d    = mean over the targets of log p - log p_ref: d_real on the trajectory's tokens, d_fake on the argmaxes of
               the reference
        ddo  = -log sigmoid(beta d_real) - alpha log(1 - sigmoid(beta d_fake))
        path = mean over the targets of -w log p(x0), w = (N - order) / N: what was decoded early counts more

    reference: a callable like m, the student as it was some optimizer steps ago; no gradient goes through it.
    random_tokens: share of the masked positions that show the model and the reference a random token instead of the
        mask. Only while m.training, as dropout.  start [B]: tokens decoded in the state.

    Source: the T3D paper (traj-DDO, path consistency). Our reading: d is a mean over a row's targets before the
    sigmoid, random tokens are uniform over the vocabulary and stay targets."""
    if reference is None:
        raise ValueError("t3d needs a reference: a callable like m, such as the model with its adapter disabled")
    first = states(batch["length"], start, generator)
    visible, positions, real = decoded(batch, first, batch["length"] - first)  # positions [B, K]
    noise = None
    if random_tokens and getattr(m, "training", False):
        noise = disturb(m, batch, random_tokens, generator, mask_id)

    logp = log_probs(m, batch, visible, positions, mask_id, noise)  # [B, K, V]
    with torch.no_grad():
        logp_ref = log_probs(
            reference, batch, visible, positions, m.config.mask_id if mask_id is None else mask_id, noise
        )
        chosen = logp_ref.argmax(-1)  # [B, K]
        ref_fake = at(logp_ref, chosen)
        ref_real = -nll(logp_ref, batch, positions)
    loss_real = nll(logp, batch, positions)  # [B, K]
    d_real = row_mean(-loss_real - ref_real, real)  # [B]
    d_fake = row_mean(at(logp, chosen) - ref_fake, real)
    ddo = -F.logsigmoid(beta * d_real) - alpha * F.logsigmoid(-beta * d_fake)  # 1 - sigmoid(x) = sigmoid(-x)

    N = batch["length"][:, None]
    w = (N - batch["order"].gather(1, positions)) / N  # [B, K]
    path = row_mean(w * loss_real, real)
    loss = ddo + path_weight * path
    ce = row_mean(loss_real.detach(), real)
    return dict(loss=loss.mean(), ddo=ddo.mean(), path=path.mean(), ce=ce.mean())


def disturb(m, batch, share, generator, mask_id=None):
    """The ids that masked positions show: the mask token, and in a random share of the places a token uniform over the
    vocabulary: int64 [B, N]."""
    mask_id = m.config.mask_id if mask_id is None else mask_id
    noise = torch.full_like(batch["response_ids"], mask_id)
    for row, n, g in zip(noise, batch["length"].tolist(), per_row(generator, len(noise))):
        place = coins(n, share, g)
        token = torch.randint(0, m.config.vocab_size, (n,), generator=g, device=place.device)
        row[:n] = torch.where(place, token, mask_id).to(row.device)
    return noise


# ----------------------------------------------------------------------------------------- without an order


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


def dparallel(
    m,
    batch,
    block_length=32,
    weight=2.0,
    temperature=0.5,
    block=None,
    mask=None,
    generator=None,
    mask_id=None,
):
    """dParallel: certainty forcing. In a random block of the response each position is masked with probability 1/2, in
    a second pass the others; all before the block is visible, all after it masked
    -> dict(loss, ce, certainty, right); the loss of a pass is ce + weight * certainty, of a row the mean of its passes.

        ce        = mean over the block's masked positions of -log p(x0)
        certainty = mean entropy, in nats at a lower temperature, over those of them whose argmax is right

    block [B]: the block's number from 0. mask [B, N]: what the first pass masks inside the block. right: share of the
    masked positions whose argmax is right.

    Source: the dParallel paper. Our reading: a pass that masks nothing (a short last block) does not count."""
    n, B = batch["length"], len(batch["length"])
    generators = per_row(generator, B)
    if block is None:
        block = [randint(0, (length - 1) // block_length, g) for length, g in zip(n.tolist(), generators)]
    begin = torch.as_tensor(block).to(n.device)[:, None] * block_length  # [B, 1]
    place = torch.arange(batch["response_ids"].shape[1], device=n.device)
    inside = (place >= begin) & (place < begin + block_length) & valid(batch)  # [B, N]
    if not inside.any(1).all():
        raise ValueError(
            f"blocks {begin[:, 0].tolist()} of {block_length} begin behind responses of {n.tolist()} tokens"
        )
    if mask is None:
        mask = torch.zeros_like(inside)
        for row, length, g in zip(mask, n.tolist(), generators):
            row[:length] = coins(length, 0.5, g).to(row.device)

    passes = []
    for masked in (inside & mask, inside & ~mask):
        positions, asked = select(masked, place.expand_as(masked))  # [B, K]
        visible = (place < begin) | (inside & ~masked)
        logp = log_probs(m, batch, visible & valid(batch), positions, mask_id)
        right = (logp.argmax(-1) == batch["response_ids"].gather(1, positions)) & asked
        ce = row_mean(nll(logp, batch, positions), asked)
        certainty = row_mean(entropy((logp / temperature).log_softmax(-1)), right)
        passes.append((ce, certainty, row_mean(right.float(), asked), asked.any(1)))
    ce, certainty, right, counts = (torch.stack(x, dim=-1) for x in zip(*passes))  # each [B, 2]
    ce, certainty, right = (row_mean(x, counts) for x in (ce, certainty, right))
    loss = ce + weight * certainty
    return dict(loss=loss.mean(), ce=ce.mean(), certainty=certainty.mean(), right=right.mean())


# -------------------------------------------------------------------------------------------- how a model decodes


def before_eos(batch, eos_id):
    """True at the tokens of each response before its first EOS: bool [B, N]."""
    return valid(batch) & ((batch["response_ids"] == eos_id).cumsum(1) == 0)


def leftmost(chosen):
    """Positions [B, K] of the True entries of chosen [B, N] from left to right, and which of them are no filler."""
    count = chosen.sum(1, keepdim=True)  # [B, 1]
    K = int(count.max())
    index = chosen.int().argsort(dim=1, descending=True, stable=True)[:, :K]
    return index, torch.arange(K, device=chosen.device) < count


@torch.no_grad()
def replay(m, batch, asked=None, mask_id=None):
    """The entropies that a model has at every step of a trajectory: h [B, N, N] in nats. h[b, t, k] belongs to the
    token decoded k-th (from 0), given the t tokens decoded before step t; NaN for k < t.

    asked [B, N]: the positions to look at, NaN for all others; without it every real token. One forward pass a step, as
    long as an asked token is masked. A trajectory that decoded several tokens a step is replayed one by one."""
    order, asked = batch["order"], valid(batch) if asked is None else asked
    B, N = order.shape
    h = torch.full((B, N, N), float("nan"), device=order.device)
    for t in range(N):
        masked = asked & (order >= t)
        if not masked.any():
            break
        positions, kept = leftmost(masked)  # [B, K]
        logp = log_probs(m, batch, valid(batch) & (order < t), positions, mask_id)
        h_now = torch.special.entr(logp.exp()).sum(-1)  # [B, K]
        h[:, t].scatter_(1, order.gather(1, positions), h_now.masked_fill(~kept, float("nan")))
    return h


def tds(m, batch, eos_id, mask_id=None):
    """The Trajectory Discrimination Score (Eq. 10, 11): the variance, over the positions before the first EOS that are
    still masked, of the entropies in nats at each decoding step; averaged over the steps, then over the trajectories.

    -> dict(tds: float, rows: one value for each trajectory, per_step: one for each step, over the trajectories that
    still have such a position). One forward pass a step: see replay."""
    variance = separability(replay(m, batch, before_eos(batch, eos_id), mask_id))  # [B, N]
    rows, per_step = variance.nanmean(1), variance.nanmean(0)
    return dict(tds=rows.nanmean().item(), rows=rows.tolist(), per_step=per_step[~per_step.isnan()].tolist())


def separability(h):
    """Eq. 10: the variance of the entropies at each step of a replay [..., K] -> [...], NaN where nothing was asked."""
    return (h - h.nanmean(-1, keepdim=True)).square().nanmean(-1)


def by_window(h, window, length):
    """A replay [B, N, N] as the windows that TABOM ranks: [B, N, W], [b, t, i] = h of the token decoded i-th after step
    t given U_t. NaN where t is no start of a window (0..length - W, or 0 alone in a shorter response)."""
    B, N, _ = h.shape
    W = min(window, N)
    start = torch.arange(N, device=h.device)
    rank = start[:, None] + torch.arange(W, device=h.device)  # [N, W]
    found = h.gather(-1, rank.clamp(max=N - 1).expand(B, N, W))
    outside = (start > (length[:, None] - W).clamp(min=0))[..., None] | (rank >= N)  # [B, N, W]
    return found.masked_fill(outside, float("nan"))


def inversions(h):
    """How often an earlier token is less certain than a later one. h [..., K]: entropies in decode order, NaN takes no
    part, such as the diagonal of a replay (each token's own step) or its windows.

    -> dict(inverted, pairs), int64 tensors [K - 1]: of the pairs at distance 1, 2, ... in decode order, how many have
    h(earlier) > h(later), and how many there are."""
    gaps = [h[..., :-d] - h[..., d:] for d in range(1, h.shape[-1])]
    count = [((gap > 0).sum(), (~gap.isnan()).sum()) for gap in gaps]
    inverted, pairs = torch.tensor(count, dtype=torch.int64).reshape(-1, 2).T
    return dict(inverted=inverted, pairs=pairs)


@torch.no_grad()
def loss_at(m, batch, mask_ratio, generators, mask_id=None):
    """Cross-entropy at a mask ratio (Figure 3): the mean of -log p(x0) in nats over a random share mask_ratio of each
    response's tokens, rounded and at least one, given the rest: [B].

    generators: one CPU torch.Generator for each row."""
    mask = torch.zeros_like(valid(batch))
    for row, n, g in zip(mask, batch["length"].tolist(), generators):
        row[torch.randperm(n, generator=g)[: max(1, round(mask_ratio * n))].to(row.device)] = True
    positions, kept = leftmost(mask)  # [B, K]
    logp = log_probs(m, batch, valid(batch) & ~mask, positions, mask_id)
    nll = -logp.gather(-1, batch["response_ids"].gather(1, positions)[..., None])[..., 0]
    return torch.where(kept, nll, 0.0).sum(1) / kept.sum(1)


# What --objective offers. The first words of a docstring, up to the colon, say where an objective comes from.
OBJECTIVES = {f.__name__: f for f in (tabom, nelbo, transition, traj, t3d, dparallel)}
