"""T3D: prefer the trajectory's tokens over those that a reference model would choose (traj-DDO), and stay consistent
with the path.

    reference = baselines.Reference(m)
    baselines.t3d(m, batch, reference=reference)["loss"].backward()
    baselines.t3d(m, batch, alpha=1, beta=1, fake="sample", reduction="sum", reference=reference)  # as the paper has it
    baselines.t3d(m, batch, preference="none")              # naive trajectory distillation, with a path

Block-causal attention (m.config.block_length is not None): the random state masks a share of every block, the order
that weighs the path is that inside a token's block, and of a row's masked EOS and padding tokens two are targets.
batch["origin"], an int or [B]: the place in its row, counted over real tokens, at which a block begins (0 where not
given).

Sources: the T3D paper (arXiv 2602.12262); for blocks Tyrion58/T3D. Dimensions: B batch, N response, S decode steps,
K positions asked for, V vocabulary.
"""

import functools

import torch
import torch.nn.functional as F

from baselines.common import begin_in_grid, bernoulli, block_length_of, nll, pick_token
from baselines.reference import Reference
from baselines.timesteps import draw_state
from objectives import (
    Objective,
    Option,
    decode_places,
    decode_steps,
    decoded_before,
    device_of,
    log_probs,
    masked_mean,
    per_row,
    place_of,
    select,
    valid,
    was_decoded,
)


def t3d(
    m, batch, alpha=0.5, beta=0.1, path_weight=0.2, random_tokens=0.1, reference=None, start=None, generator=None,
    mask_id=None, masked="later", path="linear", path_k=4, mask=None, noise=None, reference_steps=10,
    preference="ddo", fake="argmax", reduction="mean",
):  # fmt: skip
    """At all positions still masked in a random state of the trajectory -> dict(loss, ddo, path, ce);
    loss = ddo + path_weight * path.

        d    = mean over the targets of log p - log p_ref: d_real on the trajectory's tokens, d_fake
               on the argmaxes of the reference, or on its samples (fake)
        ddo  = -log sigmoid(beta d_real) - alpha log(1 - sigmoid(beta d_fake))
        path = "linear", the paper's: mean over the targets of -w log p(x0), w = (S - order) / S, early
               ones count more; "levels", the official code's: see `path_by_levels`, also for path_k

    reference: a callable like m, the student some optimizer steps ago (see Reference); it gets no gradient, and is
        called with whatever else m is called with. reference_steps: of Reference; the loss makes no use of it.
    random_tokens: share of the masked positions that show a random token instead of the mask, to both models, only
        while m.training; needs m.config.vocab_size. noise [B, N]: the ids to show at masked positions instead.
    preference "none": the cross-entropy of the targets in place of ddo, and no reference: naive trajectory
        distillation, with a path and random tokens. reduction "sum", the paper's, in place of all means over targets
        but that of the logged ce.
    start, mask, masked: the state, see `t3d_state`.

    Random tokens stay targets. Raises ValueError for a missing reference and unknown choices."""
    check_t3d(dict(path=path, preference=preference, fake=fake, reduction=reduction))
    if reference is None and preference == "ddo":
        raise ValueError("t3d needs a reference: a callable like m, such as baselines.Reference(m)")

    more = m.arguments(batch) if hasattr(m, "arguments") else {}  # the reference may have no such method
    batch = dict(batch, origin=more.get("origin", batch.get("origin", 0)))

    # 1. a state of the trajectory: what is masked, which of it are targets [B, N], and what masked positions show
    mask, target = t3d_state(m, batch, start, mask, masked, generator)
    shown = shown_at_masks(m, batch, random_tokens, generator, mask_id) if noise is None else noise

    # 2. log p in this state
    asked = was_decoded(batch) if path == "levels" else target  # levels count visible tokens, too
    positions, real = select(asked, batch["order"])  # [B, K]
    visible, target = valid(batch) & ~mask, target.gather(1, positions) & real
    logp, over = log_probs(m, batch, visible, positions, shown), REDUCTIONS[reduction]  # [B, K, V]
    ce = nll(logp, batch, positions)  # [B, K]

    # 3. the preference, or the cross-entropy in its place
    log = {}
    if preference == "none":
        term = over(ce, target).mean()
    else:
        with torch.no_grad():
            logp_ref = log_probs(functools.partial(reference, **more), batch, visible, positions, shown)
            chosen = FAKES[fake](logp_ref, real, generator)  # [B, K]
        term = ddo(logp, logp_ref, batch, positions, chosen, alpha, beta, lambda d: over(d, target)).mean()
        log["ddo"] = term.detach()

    # 4. the path, and the means over rows
    if path == "levels":
        along = path_by_levels(m, batch, ce, positions, real, path_k)  # [B]
    else:
        along = over(path_weights(m, batch).gather(1, positions) * ce, target)
    along, ce = along.mean(), masked_mean(ce.detach(), target).mean()
    return dict(loss=term + path_weight * along, **log, path=along.detach(), ce=ce)


def ddo(logp, logp_ref, batch, positions, chosen, alpha, beta, over):
    """The preference of every row: [B]. logp, logp_ref [B, K, V]; chosen [B, K]: the tokens that it holds against the
    trajectory's; over: [B, K] -> [B], over the targets."""
    d_real = over(nll(logp_ref, batch, positions) - nll(logp, batch, positions))  # [B]
    d_fake = over(pick_token(logp, chosen) - pick_token(logp_ref, chosen))
    return -F.logsigmoid(beta * d_real) - alpha * F.logsigmoid(-beta * d_fake)  # 1 - sigmoid(x) = sigmoid(-x)


def draw_tokens(logp, real, generator=None):
    """A token of p at each real position [B, K], 0 elsewhere: [B, K, V] -> int64 [B, K]."""
    token = torch.zeros_like(real, dtype=torch.long)
    for b, (n, g) in enumerate(zip(real.sum(1).tolist(), per_row(generator, len(real)))):
        below = logp[b, :n].double().exp().cumsum(-1)  # [n, V], of one row at a time: it is large
        u = torch.rand(n, 1, generator=g, device=device_of(g), dtype=torch.float64).to(below.device)
        token[b, :n] = torch.searchsorted(below, u * below[:, -1:], right=True)[:, 0]
    return token


# ------------------------------------------------------------------------------------------ states


def t3d_state(m, batch, start=None, mask=None, masked="later", generator=None):
    """What T3D masks, and which of it are targets: two bool tensors [B, N].

    start [B]: steps made before the state. mask [B, N]: what the state masks, instead of a random one; all else is
    visible, also what was never decoded. Without both, a random number of steps was made; where attention is
    block-causal, the state is one of `draw_block_mask` (also for `masked`)."""
    # 1. what is masked
    block_length = block_length_of(m)
    if mask is None and (start is not None or block_length is None):
        mask = ~decoded_before(batch, draw_state(decode_steps(batch, "cpu"), start, generator))
    elif mask is None:
        mask = draw_block_mask(batch, block_length, masked, generator)

    # 2. its targets: never what was not decoded
    target = mask & was_decoded(batch)
    if block_length is not None:
        # Two of a row's masked EOS and padding tokens (T3D's post_num): what follows an EOS in its block would outweigh
        # the rest.
        end = target & is_end(m, batch["response_ids"])
        target &= ~end | (end.cumsum(1) <= 2)
    return mask, target


def draw_block_mask(batch, block_length, masked="later", generator=None, ratio=None):
    """T3D's state where attention is block-causal: of the n decoded tokens in every block of the
    response int(n * ratio) are masked: bool [B, N]. The ratio of a row is 1, 3/4, 1/2 or 1/4 with
    probability proportional to ratio ** 8 (nine of ten states mask everything), or given: [B].

    masked: "later": those that decoding chose later, so that the others are what it saw (the T3D
    paper). "earlier": those that it chose first (its code). A row of blocks so short that nothing
    would be masked is masked as a whole. Raises ValueError for another choice."""
    if masked not in ("later", "earlier"):
        raise ValueError(f"masked {masked!r} is neither 'later' nor 'earlier'")
    rank, count = ranks_in_block(batch, block_length)  # [B, N]
    if ratio is None:
        ratios, drawn = torch.tensor([1, 0.75, 0.5, 0.25]), []
        for g in per_row(generator, len(rank)):
            drawn.append(torch.multinomial((ratios**8).to(device_of(g)), 1, generator=g).item())
        ratio = ratios[drawn]
    n = (count * ratio.to(rank.device)[:, None]).long()  # [B, N], of a token's block
    mask = was_decoded(batch) & (rank < n if masked == "earlier" else rank >= count - n)
    return torch.where(mask.any(1, keepdim=True), mask, was_decoded(batch))


def ranks_in_block(batch, block_length=None):
    """The place of each token in the decode order of its block, from 0, and how many tokens of that
    block were decoded: two int64 tensors [B, N]. None: the response is one block."""
    decoded, rank = was_decoded(batch), decode_places(batch).argsort(1)  # [B, N]
    block = torch.zeros_like(rank)
    if block_length is not None:
        block = (begin_in_grid(batch).to(rank.device)[:, None] + place_of(rank)) // block_length
    same = (block[:, :, None] == block[:, None, :]) & decoded[:, None, :]  # [B, N, N]
    earlier = rank[:, None, :] < rank[:, :, None]
    return (same & earlier).sum(-1), same.sum(-1)


def shown_at_masks(m, batch, share, generator=None, mask_id=None):
    """What masked positions show: the mask, an int; in training a random share of them a token uniform over the
    vocabulary, and the others the mask: int64 [B, N]."""
    mask_id = m.config.mask_id if mask_id is None else mask_id
    if not share or not getattr(m, "training", False):
        return mask_id
    if not hasattr(getattr(m, "config", None), "vocab_size"):
        raise ValueError(f"random_tokens {share} needs m.config.vocab_size: give m one, or random_tokens=0")
    noise = torch.full(batch["response_ids"].shape, mask_id)  # on the host: a GPU would wait for each row
    for row, n, g in zip(noise, batch["length"].tolist(), per_row(generator, len(noise))):
        place = bernoulli(n, share, g)
        token = torch.randint(0, m.config.vocab_size, (n,), generator=g, device=place.device)
        row[:n] = torch.where(place, token, mask_id).cpu()
    return noise.to(batch["response_ids"].device)


# ------------------------------------------------------------------------------------------ the path

PATHS = ("linear", "levels")


def path_weights(m, batch):
    """w = (S - order) / S of T3D's path consistency (its Eq. 9), [B, N]; where attention is
    block-causal, of the order inside a token's block, which decoding finishes first."""
    block_length = block_length_of(m)
    if block_length is None:
        last = torch.where(was_decoded(batch), batch["order"], -1).amax(1, keepdim=True)  # [B, 1]; no wait for it
        return 1 - batch["order"] / (last + 1).clamp(min=1)  # a row without any has no target
    rank, count = ranks_in_block(batch, block_length)
    return 1 - rank / count.clamp(min=1)


def path_by_levels(m, batch, ce, positions, real, k=4):
    """T3D's path consistency as its code has it: [B]. Level g is the mean cross-entropy of the
    tokens that are among the first (g + 1) k decoded of their block, and the path the mean over the
    levels that have a token: a token's weight falls with its level, harmonically. Visible tokens
    count, EOS and padding do not. Without block-causal attention the response is one block.

    ce, positions, real [B, K]: at all decoded tokens."""
    block_length = block_length_of(m)
    rank, count = ranks_in_block(batch, block_length)  # [B, N]
    size = count.amax(1)  # [B], of a block
    if block_length is not None:
        size.fill_(block_length)
    rank = rank.gather(1, positions)  # [B, K]
    counted = real & ~is_end(m, batch["response_ids"].gather(1, positions))
    means, has_token = [], []
    for before in range(0, int(size.max()), k):
        level = counted & (rank < before + k)
        means.append(masked_mean(ce, level))
        has_token.append(level.any(1) & (before < size))
    return masked_mean(torch.stack(means, dim=1), torch.stack(has_token, dim=1))


# ------------------------------------------------------------------------------------------ the model and the table


def is_end(m, ids):
    """Which of the ids are the model's EOS or padding token: bool, in the shape of ids. None is where m names none."""
    config, ends = getattr(m, "config", None), torch.zeros_like(ids, dtype=torch.bool)
    for name in ("eos_id", "pad_id"):
        if getattr(config, name, None) is not None:
            ends |= ids == getattr(config, name)
    return ends


FAKES = dict(argmax=lambda logp, *_: logp.argmax(-1), sample=draw_tokens)  # (logp [B, K, V], real, generator) -> [B, K]
REDUCTIONS = dict(mean=masked_mean, sum=lambda x, real: torch.where(real, x, 0.0).sum(-1))  # [B, K], [B, K] -> [B]
CHOICES = dict(path=PATHS, preference=("ddo", "none"), fake=tuple(FAKES), reduction=tuple(REDUCTIONS))


def check_t3d(parameters):
    """See Objective.check. Raises ValueError for unknown choices, and a sum where there is none."""
    for name, known in CHOICES.items():
        if parameters[name] not in known:
            raise ValueError(f"{name} {parameters[name]!r} is neither {' nor '.join(map(repr, known))}")
    if parameters["reduction"] == "sum" and parameters["path"] == "levels":
        raise ValueError("reduction 'sum' needs path 'linear': the levels are means")
    return ("alpha", "beta", "fake", "reference_steps") if parameters["preference"] == "none" else ()


def make_reference(m, load, parameters):
    """See Objective.reference: none where nothing is compared with it."""
    return None if parameters["preference"] == "none" else Reference(m, load, parameters["reference_steps"])


T3D = Objective(
    loss=t3d,
    source="T3D",
    reference=make_reference,
    check=check_t3d,
    options=dict(
        alpha=Option("weight of the term on the tokens that the reference prefers", low=0),
        beta=Option("scale of the log-ratios", low=0),
        path_weight=Option("weight of the path consistency term", low=0),
        random_tokens=Option("share of masked positions that show a random token instead of the mask", low=0, high=1),
        path=Option(
            "weights of the path consistency term: linear in the decode order, or T3D's code's levels of 4 tokens",
            choices=PATHS,
        ),
        masked=Option(
            "block-causal models: a state masks the tokens of a block that decoding chose later (T3D's paper), or "
            "earlier (its code)",
            choices=("later", "earlier"),
        ),
        reference_steps=Option("optimizer steps after which the student becomes the reference again", kind=int, low=1),
        preference=Option(
            "ddo: the trajectory's tokens over the reference's; none: the cross-entropy of the trajectory's in its "
            "place, which is naive trajectory distillation",
            choices=CHOICES["preference"],
        ),
        fake=Option(
            "tokens of the reference that ddo holds against the trajectory's: the most probable ones (T3D's code), or "
            "samples (its paper)",
            choices=CHOICES["fake"],
        ),
        reduction=Option(
            "over the tokens of a row: a mean (T3D's code), or a sum (its paper)", choices=CHOICES["reduction"]
        ),
    ),
)
