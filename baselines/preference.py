"""T3D: prefer the trajectory's tokens over those that a reference model would choose (traj-DDO), and stay consistent
with the path.

    reference = baselines.Reference(m)
    baselines.t3d(m, batch, reference=reference)["loss"].backward()

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

from baselines.common import bernoulli, nll, pick_token
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
):  # fmt: skip
    """At all positions still masked in a random state of the trajectory -> dict(loss, ddo, path, ce);
    loss = ddo + path_weight * path.

        d    = mean over the targets of log p - log p_ref: d_real on the trajectory's tokens, d_fake
               on the argmaxes of the reference
        ddo  = -log sigmoid(beta d_real) - alpha log(1 - sigmoid(beta d_fake))
        path = "linear", the paper's: mean over the targets of -w log p(x0), w = (S - order) / S, early
               ones count more; "levels", the official code's: see `path_by_levels`, also for path_k

    reference: a callable like m, the student some optimizer steps ago (see Reference); it gets no gradient, and is
        called with whatever else m is called with. reference_steps: of Reference; the loss makes no use of it.
    random_tokens: share of the masked positions that show a random token instead of the mask, to both models, only
        while m.training; needs m.config.vocab_size. noise [B, N]: the ids to show at masked positions instead.
    start, mask, masked: the state, see `t3d_state`.

    Our reading: d is a mean over a row's targets before the sigmoid; random tokens are uniform over the vocabulary and
    stay targets. Raises ValueError without a reference, and for unknown choices."""
    if reference is None:
        raise ValueError("t3d needs a reference: a callable like m, such as baselines.Reference(m)")
    if path not in PATHS:
        raise ValueError(f"path {path!r} is neither {' nor '.join(map(repr, PATHS))}")

    more = m.arguments(batch) if hasattr(m, "arguments") else {}  # the reference may have no such method
    batch = dict(batch, origin=more.get("origin", batch.get("origin", 0)))

    # 1. a state of the trajectory: what is masked, which of it are targets [B, N], and what masked positions show
    mask, target = t3d_state(m, batch, start, mask, masked, generator)
    shown = m.config.mask_id if mask_id is None else mask_id
    if noise is not None:
        shown = noise
    elif random_tokens and getattr(m, "training", False):
        shown = disturb(m, batch, random_tokens, generator, shown)

    # 2. log p and log p_ref in this state, of the trajectory's tokens (real) and of the reference's argmaxes (fake)
    asked = was_decoded(batch) if path == "levels" else target  # levels count visible tokens, too
    positions, real = select(asked, batch["order"])  # [B, K]
    visible, target = valid(batch) & ~mask, target.gather(1, positions) & real
    logp = log_probs(m, batch, visible, positions, shown)  # [B, K, V]
    with torch.no_grad():
        logp_ref = log_probs(functools.partial(reference, **more), batch, visible, positions, shown)
        chosen = logp_ref.argmax(-1)  # [B, K]
        ref_real, ref_fake = -nll(logp_ref, batch, positions), pick_token(logp_ref, chosen)
    ce, fake = nll(logp, batch, positions), pick_token(logp, chosen)  # [B, K]

    # 3. the preference
    d_real = masked_mean(-ce - ref_real, target)  # [B]
    d_fake = masked_mean(fake - ref_fake, target)
    ddo = -F.logsigmoid(beta * d_real) - alpha * F.logsigmoid(-beta * d_fake)  # 1 - sigmoid(x) = sigmoid(-x)

    # 4. the path, and the means over rows
    if path == "levels":
        along = path_by_levels(m, batch, ce, positions, real, path_k)  # [B]
    else:
        along = masked_mean(path_weights(m, batch).gather(1, positions) * ce, target)
    ddo, along, ce = ddo.mean(), along.mean(), masked_mean(ce.detach(), target).mean()
    return dict(loss=ddo + path_weight * along, ddo=ddo.detach(), path=along.detach(), ce=ce)


# ------------------------------------------------------------------------------------------ states


def t3d_state(m, batch, start=None, mask=None, masked="later", generator=None):
    """What T3D masks, and which of it are targets: two bool tensors [B, N].

    start [B]: steps made before the state. mask [B, N]: what the state masks, instead of a random one; all else is
    visible, also what was never decoded. Without both, a random number of steps was made; where attention is
    block-causal, the state is one of `draw_block_mask` (also for `masked`)."""
    # 1. what is masked
    block_length = block_length_of(m)
    if mask is None and (start is not None or block_length is None):
        mask = ~decoded_before(batch, draw_state(decode_steps(batch), start, generator))
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
        origin = torch.as_tensor(batch.get("origin", 0), device=rank.device)
        begin = batch["prompt_mask"].long().sum(1) - origin  # [B], of the response
        block = (begin[:, None] + place_of(rank)) // block_length
    same = (block[:, :, None] == block[:, None, :]) & decoded[:, None, :]  # [B, N, N]
    earlier = rank[:, None, :] < rank[:, :, None]
    return (same & earlier).sum(-1), same.sum(-1)


def disturb(m, batch, share, generator, mask_id):
    """The ids that masked positions show: a random share of them a token uniform over the
    vocabulary, the others the mask: int64 [B, N]."""
    if not hasattr(getattr(m, "config", None), "vocab_size"):
        raise ValueError(f"random_tokens {share} needs m.config.vocab_size: give m one, or random_tokens=0")
    noise = torch.full_like(batch["response_ids"], mask_id)
    for row, n, g in zip(noise, batch["length"].tolist(), per_row(generator, len(noise))):
        place = bernoulli(n, share, g)
        token = torch.randint(0, m.config.vocab_size, (n,), generator=g, device=place.device)
        row[:n] = torch.where(place, token, mask_id).to(row.device)
    return noise


# ------------------------------------------------------------------------------------------ the path

PATHS = ("linear", "levels")


def path_weights(m, batch):
    """w = (S - order) / S of T3D's path consistency (its Eq. 9), [B, N]; where attention is
    block-causal, of the order inside a token's block, which decoding finishes first."""
    block_length = block_length_of(m)
    if block_length is None:
        return 1 - batch["order"] / decode_steps(batch)[:, None]
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


# ------------------------------------------------------------------------------------------ the model


def block_length_of(m):
    """The block length of a model whose attention is block-causal, or None."""
    return getattr(getattr(m, "config", None), "block_length", None)


def is_end(m, ids):
    """Which of the ids are the model's EOS or padding token: bool, in the shape of ids. None is where m names none."""
    config, ends = getattr(m, "config", None), torch.zeros_like(ids, dtype=torch.bool)
    for name in ("eos_id", "pad_id"):
        if getattr(config, name, None) is not None:
            ends |= ids == getattr(config, name)
    return ends


T3D = Objective(
    loss=t3d,
    source="T3D",
    reference=lambda m, load, parameters: Reference(m, load, parameters["reference_steps"]),
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
    ),
)
