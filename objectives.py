"""The training objectives of the TABOM paper, and its measures of how a model decodes.

    out = objectives.tabom(m, batch, window=32, margin=0.2, weight=1.0)
    out["loss"].backward()                             # out["ce"], out["ranking"], ... for the log
    objectives.tds(m, batch, eos_id)["tds"]            # Trajectory Discrimination Score
    h = objectives.replay(m, batch)                    # entropies at every step of trajectories

batch: a dict of tensors
    prompt_ids, prompt_mask [B, P]   left-padded prompts, mask 1 = real token
    response_ids, order [B, N]       right-padded; order[r] = the decode step of position r, from 0:
                                     the decode rank, where each step decoded one token; equal
                                     numbers: decoded together; -1: never, so masked and no target
    length [B]                       real tokens of each response
    entropy, non_ltr [B, N]          only for ranking="kl" and starts="non-ltr", see `tabom`
    origin [B], or an int            only for block-causal attention: the place in its row, counted
                                     over real tokens, at which a block begins (0 where not given)
`m` is any callable m(ids, attention_mask=None, positions=None) -> logits [B, K, V] at those
positions, where the logits at a position predict the token at that position.

Block-causal attention (m.config.block_length is not None; SDAR, BD3LM): what is masked is a noisy
copy of the row, and every block sees the clean copy of the blocks before it, as in decoding:
m(ids, ..., origin=, start=, clean=) of model.py. Without that copy a later block would see the masks
of earlier ones, which it never does when it is decoded. So a state of the response is a state of
each of its blocks: a window, or what is masked after a random step, may span blocks, and each token
has the clean past of earlier blocks and what of its own block was decoded before the state.

Every objective asks for the logits at some positions, given that some tokens are visible; they
differ in which positions and which tokens. All return a dict whose "loss", float32 whatever the
model's dtype, is the mean over the rows of the batch: the loss of a larger batch is the weighted
mean of its parts (of tabom with `share_with_pairs`). Random draws come from `generator`: one
torch.Generator, or a list of one for each row, whose draws then do not depend on other rows.

Sources: the TABOM paper (arXiv 2605.11854, Eq. 1 to 11); dInfer (arXiv 2510.08666), T3D (arXiv
2602.12262) and dParallel (arXiv 2509.26488); the authors' release for steps, starts and the TDS; for
blocks JetAstra/SDAR, Tyrion58/T3D and ZHZisZZ/dllm.

Dimensions: B batch, P prompt, N response, S decode steps, W steps of a window, K positions asked
for, V vocabulary.
"""

import torch
import torch.nn.functional as F

NEVER = torch.iinfo(torch.int64).max  # a step that is not reached

# ------------------------------------------------------------------------------------------ TABOM


def tabom(
    m,
    batch,
    window=32,
    margin=0.2,
    weight=1.0,
    start=None,
    generator=None,
    entropy_context=None,
    ce_weight=1.0,
    mask_id=None,
    starts="uniform",
    ranking="margin",
    beta=1.0,
    pair_share=None,
):
    """Eq. 9: reconstruct a window of W consecutive decode steps from the context that decoding had,
    and rank its entropies -> dict(loss, ce, ranking, in_order, entropy);
    loss = ce_weight * ce + weight * ranking.

    window, start, starts: see `draw_windows`. margin: gamma of Eq. 8, nats. weight: lambda. With
        block-causal attention a window may span blocks; U_t of a token is then what was decoded
        before the window in its own block, and all of the blocks before it.
    ranking: "margin", Eq. 8; "listwise", see `listwise_loss`; "kl", Eq. 6 (`boltzmann_kl`), against
        batch["entropy"], the base model's at each token's own step. beta: of these two.
    entropy_context: "window": all h given U_t, what was decoded before the window, from the pass of
        the cross-entropy. "step": each given what was decoded before its own step (Eq. 5), W passes.
        None: "step" for "kl", which allows no other, and "window" otherwise.
    pair_share: see `share_with_pairs`. ranking and in_order (share of pairs with h(r) < h(s)) are
    means over the rows that have a pair; ce and entropy (nats) over all rows.
    Raises ValueError for an impossible window, start or choice, and "kl" without entropies."""
    context = entropy_context or {"kl": "step"}.get(ranking, "window")
    check_ranking(ranking, context, batch)

    # 1. the window [B, K] in decode order, and what was decoded before it, U_t [B, N]
    first, size = draw_windows(batch, window, start, starts, generator)
    visible, positions, real = context_and_targets(batch, first, size)

    # 2. reconstruct it from U_t
    surprise, h = nll_and_entropy(m, batch, visible, positions, mask_id)  # [B, K]
    ce = masked_mean(surprise, real)  # [B]

    # 3. its entropies
    if context == "step":
        h = own_step_entropies(m, batch, first, size, positions, real, h, mask_id)

    # 4. rank them
    ranked, in_order = ranking_rows(h, margin, real)  # [B]
    if ranking == "listwise":
        ranked = listwise_loss(h, beta, real)
    elif ranking == "kl":
        ranked = boltzmann_kl(h, batch["entropy"].gather(1, positions), beta, real)

    # 5. the means over rows
    ranked = mean_with_pairs(ranked, real, pair_share)
    in_order = mean_with_pairs(in_order, real, pair_share)
    loss, h = ce_weight * ce.mean() + weight * ranked, masked_mean(h.detach(), real)
    return dict(loss=loss, ce=ce.mean(), ranking=ranked, in_order=in_order, entropy=h.mean())


def check_ranking(ranking, context, batch):
    """Raises ValueError for unknown choices, and for "kl" without the base model's entropies."""
    if context not in ("window", "step"):
        raise ValueError(f"entropy_context {context!r} is neither 'window' nor 'step'")
    if ranking not in ("margin", "listwise", "kl"):
        raise ValueError(f"ranking {ranking!r} is not 'margin', 'listwise' or 'kl'")
    if ranking == "kl" and context != "step":
        raise ValueError("ranking 'kl' needs entropy_context 'step', each token's own, as was logged")
    if ranking == "kl" and "entropy" not in batch:
        raise ValueError("ranking 'kl' needs batch['entropy'], which the base model's decoding logged")


def ranking_loss(entropy, margin, real=None):
    """Eq. 8: mean over pairs, r decoded before s, of max(0, h(r) - h(s) + margin) -> scalar.

    entropy [..., W] in decode order, in nats; leading dimensions are averaged, over the rows that
    have a pair. real [..., W]: False entries take no part. Without any pair the loss is 0."""
    if real is None:
        real = torch.ones_like(entropy, dtype=torch.bool)
    return mean_with_pairs(ranking_rows(entropy, margin, real)[0], real)


def ranking_rows(entropy, margin, real):
    """The ranking loss of each row, and its share of pairs in order (h(r) < h(s)): two [...]."""
    W = entropy.shape[-1]
    earlier_first = torch.ones(W, W, dtype=torch.bool, device=entropy.device).triu(1)
    pair = earlier_first & real[..., :, None] & real[..., None, :]  # [..., W, W]; row r, column s
    gap = entropy[..., :, None] - entropy[..., None, :]  # h(r) - h(s)
    count = pair.sum((-2, -1)).clamp(min=1)
    loss = torch.where(pair, (gap + margin).clamp(min=0), 0.0).sum((-2, -1)) / count
    return loss, (pair & (gap < 0)).sum((-2, -1)) / count


def listwise_loss(entropy, beta=1.0, real=None):
    """-log of the probability of a decode order in the Plackett-Luce model -> [...]. The model draws
    each next token among those not yet decoded with probability softmax(-beta h); exp(-loss) sums
    to 1 over all W! orders. entropy [..., W] in decode order, nats; real as in `ranking_loss`."""
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
    """Eq. 6, exactly: KL(q* || p) over the states U, what is visible so far (Eq. 3 and 5), where
    p(U) = exp(-beta * sum of h over U) / Z, and q* has the base model's own entropies -> [...].

    The energy is a sum over U's members: Z = prod (1 + exp(-beta h)), each token is in U on its own
    with probability sigmoid(-beta h), and the KL is a sum of W terms. It is 0, with gradient 0,
    where h is the base model's. entropy, base_entropy [..., W] in nats; real as in `ranking_loss`."""
    if real is None:
        real = torch.ones_like(entropy, dtype=torch.bool)
    # Entries that are not real may be NaN in a log, and must not reach the gradient.
    x, x_base = -beta * entropy, -beta * torch.where(real, base_entropy, 0.0)
    q = x_base.sigmoid()
    inside = q * (F.logsigmoid(x_base) - F.logsigmoid(x))
    outside = (1 - q) * (F.logsigmoid(-x_base) - F.logsigmoid(-x))  # 1 - sigmoid(x) = sigmoid(-x)
    return torch.where(real, inside + outside, 0.0).sum(-1)


def mean_with_pairs(x, real, pair_share=None):
    """Mean of x [...] over the rows with at least two real tokens [..., W], which have a pair; 0
    without such a row. pair_share: the share of such rows to count with, instead of their own."""
    has_pair = real.sum(-1) >= 2
    rows = has_pair.sum()
    if pair_share is not None:
        rows = pair_share * rows.new_tensor(has_pair.numel(), dtype=torch.float32)
    return torch.where(has_pair, x, 0.0).sum() / rows.masked_fill(rows == 0, 1)


def share_with_pairs(batch, window=32, start=None, starts="uniform", generator=None):
    """The share of rows whose window has a pair to rank, in the windows that `tabom` will draw with
    the same arguments: float. Runs no model, and leaves the generators as they are.

    A batch that is trained in parts (micro-batches, processes) has one share, the mean of theirs
    weighted with their rows. With it as the pair_share of tabom in every part, the mean of the
    parts' losses, weighted in the same way, is the loss of the whole batch.
    Raises ValueError without start and generator: the windows could not be drawn again."""
    generators = per_row(generator, len(batch["length"]))
    if start is None and None in generators:
        raise ValueError("share_with_pairs needs the start or the generator that tabom is given")
    before = [(g, g.get_state()) for g in generators if g is not None]
    first, size = draw_windows(batch, window, start, starts, generator)
    for g, state in before:
        g.set_state(state)
    _, _, real = context_and_targets(batch, first, size)
    return (real.sum(1) >= 2).float().mean().item()


def own_step_entropies(m, batch, first, size, positions, real, h, mask_id=None):
    """Eq. 5: h of each window token given everything decoded before its own step, [B, K]. Those of
    the first step keep h [B, K], from the window's start; one forward pass for each other step."""
    step = batch["order"].gather(1, positions) - first[:, None]  # [B, K], from the window's start
    for s in range(1, int(size.max())):
        column, kept = select(real & (step == s), step)  # [B, k]: where the window has this step
        if column.shape[1] == 0:
            continue  # no row decoded anything in this step
        visible = decoded_before(batch, first + s)  # U_t and the first s steps of the window
        _, found = nll_and_entropy(m, batch, visible, positions.gather(1, column), mask_id)
        h = h.scatter(1, column, torch.where(kept, found, h.gather(1, column)))
    return h


def draw_windows(batch, window, start=None, starts="uniform", generator=None):
    """The first step and the size, in steps, of a window in each trajectory: two int64 tensors [B].

    window W: min(W, S) of a row's S steps, from a start uniform in 0..S - W. starts "non-ltr":
    uniform among the steps of the positions marked in batch["non_ltr"] (bool [B, N]) that lie in
    0..S - 1 - W, if there are any (the release's rule); a batch without marks gets them for the
    positions that were not decoded right after their left neighbour. window "global": between two
    random timesteps, uniform over all pairs of different ones (dInfer; Table 5).
    start, if given: the start [B] for W, start and end [B, 2] for "global".
    Raises ValueError for a window below 2, unknown starts, a start that leaves the trajectory."""
    if window != "global" and (not isinstance(window, int) or window < 2):
        raise ValueError(f"window {window!r}: needs 2 steps or more (one has no pair), or 'global'")
    if starts not in ("uniform", "non-ltr") or (starts == "non-ltr" and window == "global"):
        raise ValueError(f"starts {starts!r}, window {window!r}: 'uniform', or 'non-ltr' and a number")
    steps = decode_steps(batch)  # [B]
    if start is None:
        generators, candidates = per_row(generator, len(steps)), [()] * len(steps)
        if starts == "non-ltr":
            candidates = non_ltr_steps(batch)
        rows = zip(steps.tolist(), candidates, generators)
        start = [draw_start(S, window, marked, g) for S, marked, g in rows]
    start = torch.as_tensor(start).to(steps.device)
    if window == "global":
        first, size = start[:, 0], start[:, 1] - start[:, 0]
    else:
        first, size = start, steps.clamp(max=window)  # a shorter trajectory is a window as a whole
    if (first < 0).any() or (size < 1).any() or (first + size > steps).any():
        drawn = f"windows from {first.tolist()} of {size.tolist()} steps"
        raise ValueError(f"{drawn} leave trajectories of {steps.tolist()} steps")
    return first, size


def draw_start(S, window, marked, generator):
    """The start of a window in a trajectory of S steps, or the start and end of a global one."""
    if window == "global":
        a = uniform_int(0, S, generator)
        b = uniform_int(0, S - 1, generator)
        b += b >= a  # another timestep of 0..S
        return min(a, b), max(a, b)
    inside = [step for step in marked if step <= S - 1 - window]
    if inside:
        return inside[uniform_int(0, len(inside) - 1, generator)]
    return uniform_int(0, max(S - window, 0), generator)


def non_ltr_steps(batch):
    """The steps that decoded out of left-to-right order, ascending: a list for each row."""
    marks, order = batch.get("non_ltr"), batch["order"]
    if marks is None:
        # The prompt, left of the first position, counts as decoded at step -1.
        left = F.pad(order, (1, 0), value=-1)[:, :-1]  # [B, N]
        after_left = order - left == 1
        after_left[:, 1:] &= left[:, 1:] >= 0  # a neighbour that was never decoded
        marks = ~after_left
    marks = marks.bool() & was_decoded(batch)
    return [row[marked].unique().tolist() for row, marked in zip(order, marks)]


# ----------------------------------------------------------- other objectives along a trajectory


def transition(m, batch, start=None, generator=None, mask_id=None):
    """dInfer: cross-entropy on what was decoded between two random timesteps given what was decoded
    before -> dict(loss, ce, ...) as of tabom. start [B, 2]: the two timesteps, the lower one first.

    It is TABOM with the global window; the ranking is only measured."""
    return tabom(m, batch, "global", weight=0.0, start=start, generator=generator, mask_id=mask_id)


def traj(m, batch, start=None, generator=None, mask_id=None):
    """Naive trajectory distillation, a baseline of the T3D paper: cross-entropy on every token that
    is still masked at a random state -> dict(loss, ce, ...) as of tabom. start [B]: steps made
    before that state. It is a transition whose later timestep is the end."""
    steps = decode_steps(batch)
    ends = torch.stack((draw_state(steps, start, generator), steps), dim=1)  # [B, 2]
    return transition(m, batch, start=ends, mask_id=mask_id)


def draw_state(steps, start=None, generator=None):
    """How many of a trajectory's steps [B] were made before a random state: uniform in
    0..steps - 1, int64 [B], or the given start [B]. Raises ValueError for a start outside them."""
    if start is None:
        rows = zip(steps.tolist(), per_row(generator, len(steps)))
        start = [uniform_int(0, S - 1, g) for S, g in rows]
    start = torch.as_tensor(start).to(steps.device)
    if (start < 0).any() or (start >= steps).any():
        raise ValueError(f"states after {start.tolist()} of {steps.tolist()} steps leave no target")
    return start


def t3d(
    m, batch, alpha=0.5, beta=0.1, path_weight=0.2, random_tokens=0.1, reference=None, start=None,
    generator=None, mask_id=None, masked="later", path="linear", path_k=4, mask=None, noise=None,
):  # fmt: skip
    """T3D: at all positions still masked in a random state, prefer the trajectory's tokens over
    those that a reference model would choose (DDO), and stay consistent with the path
    -> dict(loss, ddo, path, ce); loss = ddo + path_weight * path.

        d    = mean over the targets of log p - log p_ref: d_real on the trajectory's tokens, d_fake
               on the argmaxes of the reference
        ddo  = -log sigmoid(beta d_real) - alpha log(1 - sigmoid(beta d_fake))
        path = "linear", the paper's: mean over the targets of -w log p(x0), w = (S - order) / S, early
               ones count more; "levels", the official code's: see `path_by_levels`, also for path_k

    reference: a callable like m, the student some optimizer steps ago; it gets no gradient.
    random_tokens: share of the masked positions that show a random token instead of the mask, to
        both models, only while m.training. noise [B, N]: the ids to show there instead.
    start [B]: steps made before the state. mask [B, N]: what the state masks, instead of a random
        one; all else is visible, also what was never decoded. masked: see `draw_block_mask`.
    Block-causal attention: the random state masks a share of every block; S and order in w are those
        of a token's own block; of a row's masked EOS and padding tokens two are targets (`t3d_state`).

    Source: the T3D paper (traj-DDO, path consistency); for blocks Tyrion58/T3D. Our reading: d is a
    mean over a row's targets before the sigmoid; random tokens are uniform over the vocabulary and
    stay targets. Raises ValueError without a reference, and for unknown choices."""
    if reference is None:
        raise ValueError("t3d needs a reference: a callable like m, such as lora.Reference(m)")
    if path not in ("linear", "levels"):
        raise ValueError(f"path {path!r} is neither 'linear' nor 'levels'")
    mask_id = m.config.mask_id if mask_id is None else mask_id
    mask, target = t3d_state(m, batch, start, mask, masked, generator)  # [B, N]
    if noise is None and random_tokens and getattr(m, "training", False):
        noise = disturb(m, batch, random_tokens, generator, mask_id)

    asked = was_decoded(batch) if path == "levels" else target  # levels count visible tokens, too
    positions, real = select(asked, batch["order"])  # [B, K]
    visible, target = valid(batch) & ~mask, target.gather(1, positions) & real
    logp = log_probs(m, batch, visible, positions, mask_id, noise)  # [B, K, V]
    with torch.no_grad():
        in_blocks = block_length_of(m) is not None  # a reference may have no config
        logp_ref = log_probs(reference, batch, visible, positions, mask_id, noise, in_blocks)
        chosen = logp_ref.argmax(-1)  # [B, K]
        ref_fake = pick_token(logp_ref, chosen)
        ref_real = -nll(logp_ref, batch, positions)
    loss_real = nll(logp, batch, positions)  # [B, K]
    d_real = masked_mean(-loss_real - ref_real, target)  # [B]
    d_fake = masked_mean(pick_token(logp, chosen) - ref_fake, target)
    ddo = -F.logsigmoid(beta * d_real) - alpha * F.logsigmoid(-beta * d_fake)

    if path == "levels":
        along = path_by_levels(m, batch, loss_real, positions, real, path_k)  # [B]
    else:
        along = masked_mean(path_weights(m, batch).gather(1, positions) * loss_real, target)
    loss = ddo + path_weight * along
    ce = masked_mean(loss_real.detach(), target)
    return dict(loss=loss.mean(), ddo=ddo.mean(), path=along.mean(), ce=ce.mean())


def t3d_state(m, batch, start=None, mask=None, masked="later", generator=None):
    """What T3D masks, and which of it are targets: two bool tensors [B, N]; see `t3d`.

    Never decoded tokens are no targets. Where attention is block-causal, a state without start and
    mask is one of `draw_block_mask`, and of a row's masked EOS and padding tokens the first two are
    targets (T3D's post_num): what follows an EOS in its block would outweigh the rest."""
    block_length = block_length_of(m)
    if mask is None and (start is not None or block_length is None):
        mask = ~decoded_before(batch, draw_state(decode_steps(batch), start, generator))
    elif mask is None:
        mask = draw_block_mask(batch, block_length, masked, generator)
    target = mask & was_decoded(batch)
    if block_length is not None:
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
    place, count = places_in_block(batch, block_length)  # [B, N]
    if ratio is None:
        ratios, drawn = torch.tensor([1, 0.75, 0.5, 0.25]), []
        for g in per_row(generator, len(place)):
            drawn.append(torch.multinomial((ratios**8).to(device_of(g)), 1, generator=g).item())
        ratio = ratios[drawn]
    n = (count * ratio.to(place.device)[:, None]).long()  # [B, N], of a token's block
    mask = was_decoded(batch) & (place < n if masked == "earlier" else place >= count - n)
    return torch.where(mask.any(1, keepdim=True), mask, was_decoded(batch))


def path_weights(m, batch):
    """w = (S - order) / S of T3D's path consistency (its Eq. 9), [B, N]; where attention is
    block-causal, of the order inside a token's own block, which decoding finishes first."""
    block_length = block_length_of(m)
    if block_length is None:
        return 1 - batch["order"] / decode_steps(batch)[:, None]
    place, count = places_in_block(batch, block_length)
    return 1 - place / count.clamp(min=1)


def path_by_levels(m, batch, ce, positions, real, k=4):
    """T3D's path consistency as its code has it: [B]. Level g is the mean cross-entropy of the
    tokens that are among the first (g + 1) k decoded of their block, and the path the mean over the
    levels that have a token: a token's weight falls with its level, harmonically. Visible tokens
    count, EOS and padding do not. Without block-causal attention the response is one block.

    ce, positions, real [B, K]: at all decoded tokens."""
    block_length = block_length_of(m)
    place, count = places_in_block(batch, block_length)  # [B, N]
    size = count.amax(1)  # [B], of a block
    if block_length is not None:
        size.fill_(block_length)
    place = place.gather(1, positions)  # [B, K]
    counted = real & ~is_end(m, batch["response_ids"].gather(1, positions))
    means, has_token = [], []
    for before in range(0, int(size.max()), k):
        level = counted & (place < before + k)
        means.append(masked_mean(ce, level))
        has_token.append(level.any(1) & (before < size))
    return masked_mean(torch.stack(means, dim=1), torch.stack(has_token, dim=1))


def disturb(m, batch, share, generator, mask_id):
    """The ids that masked positions show: a random share of them a token uniform over the
    vocabulary, the others the mask: int64 [B, N]."""
    noise = torch.full_like(batch["response_ids"], mask_id)
    for row, n, g in zip(noise, batch["length"].tolist(), per_row(generator, len(noise))):
        place = bernoulli(n, share, g)
        token = torch.randint(0, m.config.vocab_size, (n,), generator=g, device=place.device)
        row[:n] = torch.where(place, token, mask_id).to(row.device)
    return noise


# ------------------------------------------------------------------ objectives without an order


def nelbo(
    m, batch, mask=None, generator=None, mask_id=None, weighting="mean", norm="token", ratio=None,
    targets=None,
):  # fmt: skip
    """Eq. 1: mean over the masked positions of -log p(x0 | U), U uniform -> dict(loss, ce, masked):
    SFT-GT on a dataset's answers, SFT-SD on the model's own responses.

    The authors draw t ~ U(0, 1) and mask every position with probability t. Given that at least one
    is masked, their number is uniform in 1..N and their places are uniform: so they are drawn here,
    without t. mask [B, N]: the masked positions, instead of random ones. masked: their share.

    weighting "scheduler": as SDAR and A2D were trained: a row has a mask ratio 0.999 t + 0.001,
        each token is masked with this probability, and its loss divided by it; "uniform": without the
        division. Their sum is divided by the tokens of a row: "token": of all rows together (a long
        row counts more), "sequence": of each row; or not at all: "batch" (norm).
    ratio [B]: the mask ratio that a given mask was drawn with. targets: the tokens of a row to divide
        by with "token", where this batch is a part of one: the mean over all its rows.
    Raises ValueError for unknown choices, a weighting without its ratio, and, with "mean", for a row
    without a masked position; with the others such a row has the loss 0."""
    known = dict(weighting=("mean", "scheduler", "uniform"), norm=("token", "sequence", "batch"))
    for name, value in dict(weighting=weighting, norm=norm).items():
        if value not in known[name]:
            raise ValueError(f"{name} {value!r} is none of {', '.join(known[name])}")
    if weighting == "scheduler" and mask is not None and ratio is None:
        raise ValueError("weighting 'scheduler' divides by the ratio that the mask was drawn with: give it")
    if mask is None and weighting == "mean":
        mask = draw_mask(batch, generator)
    elif mask is None:
        ratio, mask = draw_ratio_mask(batch, generator)
    decoded = was_decoded(batch)
    mask = mask & decoded
    masked, tokens = mask.sum(1), decoded.sum(1).clamp(min=1)  # [B]
    ce = masked_nll(m, batch, mask, mask_id)  # [B]
    loss = ce
    if weighting == "mean":
        if not mask.any(1).all():
            raise ValueError("mask: every row needs a masked position")
    else:
        loss = loss * masked  # the sum over a row's masked tokens
        if weighting == "scheduler":
            loss = loss / ratio
        if norm == "token":
            loss = loss / (targets or tokens.float().mean())
        elif norm == "sequence":
            loss = loss / tokens
    return dict(loss=loss.mean(), ce=ce.detach().mean(), masked=(masked / tokens).mean())


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


def draw_mask(batch, generator, ratio=None):
    """Random masked positions, bool [B, N]: ratio of the tokens of each row, rounded and at least
    one, or a uniform number of them."""
    mask = torch.zeros_like(was_decoded(batch))
    for row, can_mask, g in zip(mask, was_decoded(batch), per_row(generator, len(mask))):
        place = can_mask.nonzero()[:, 0]
        n = len(place)
        if n:
            count = uniform_int(1, n, g) if ratio is None else max(1, round(ratio * n))
            chosen = torch.randperm(n, generator=g, device=device_of(g))[:count]
            row[place[chosen.to(place.device)]] = True
    return mask


def masked_nll(m, batch, mask, mask_id=None):
    """Mean of -log p(x0) over the masked positions [B, N] of each row, given the others: [B]."""
    positions, asked = select(mask, place_of(mask))  # [B, K]
    if positions.shape[1] == 0:  # kernels need not know what to do without a query
        positions, asked = place_of(mask)[:, :1], mask[:, :1]
    surprise, _ = nll_and_entropy(m, batch, was_decoded(batch) & ~mask, positions, mask_id)  # [B, K]
    return masked_mean(surprise, asked)


def dparallel(
    m, batch, block_length=32, weight=2.0, temperature=0.5, block=None, mask=None,
    generator=None, mask_id=None,
):  # fmt: skip
    """dParallel: certainty forcing. In a random block of the response each position is masked with
    probability 1/2, in a second pass the others; all before the block is visible, all after it
    masked -> dict(loss, ce, certainty, right); the loss of a pass is ce + weight * certainty, of a
    row the mean of its passes.

        ce        = mean over the block's masked positions of -log p(x0)
        certainty = mean entropy, nats at this temperature, over those whose argmax is right

    block [B]: the block's number from 0. mask [B, N]: what the first pass masks inside the block.
    right: share of the masked positions whose argmax is right.

    Source: the dParallel paper. Our reading: a pass that masks nothing (a short last block) does
    not count. Raises ValueError for a block beyond the response."""
    n, real = batch["length"], was_decoded(batch)
    generators = per_row(generator, len(n))
    if block is None:
        rows = zip(n.tolist(), generators)
        block = [uniform_int(0, (length - 1) // block_length, g) for length, g in rows]
    begin = torch.as_tensor(block).to(n.device)[:, None] * block_length  # [B, 1]
    if (begin[:, 0] >= n).any():
        blocks = f"blocks {begin[:, 0].tolist()} of {block_length}"
        raise ValueError(f"{blocks} begin beyond the end of responses of {n.tolist()} tokens")
    place = place_of(real)  # [B, N]
    inside = (place >= begin) & (place < begin + block_length) & real
    if mask is None:
        mask = torch.zeros_like(inside)
        for row, length, g in zip(mask, n.tolist(), generators):
            row[:length] = bernoulli(length, 0.5, g).to(row.device)

    passes, counts = [], []
    for masked in (inside & mask, inside & ~mask):
        positions, asked = select(masked, place)  # [B, K]
        visible = real & ((place < begin) | (inside & ~masked))
        logp = log_probs(m, batch, visible, positions, mask_id)
        right = (logp.argmax(-1) == batch["response_ids"].gather(1, positions)) & asked
        ce = masked_mean(nll(logp, batch, positions), asked)
        certainty = masked_mean(entropy(logp / temperature), right)
        passes.append(torch.stack((ce, certainty, masked_mean(right.float(), asked))))
        counts.append(asked.any(1))
    # [3, B, 2] and [B, 2] -> [3, B]: the mean over the passes that mask something
    ce, certainty, right = masked_mean(torch.stack(passes, dim=-1), torch.stack(counts, dim=-1))
    loss = ce + weight * certainty
    return dict(loss=loss.mean(), ce=ce.mean(), certainty=certainty.mean(), right=right.mean())


# What --objective offers, and where each comes from.
OBJECTIVES = {f.__name__: f for f in (tabom, nelbo, transition, traj, t3d, dparallel)}
SOURCES = dict(
    tabom="Eq. 9",
    nelbo="Eq. 1",
    transition="dInfer",
    traj="naive trajectory distillation",
    t3d="T3D",
    dparallel="dParallel",
)

# ---------------------------------------------------------------------------- how a model decodes


def tds(m, batch, eos_id, eos="so-far", mask_id=None, h=None):
    """Trajectory Discrimination Score (Eq. 10, 11): the variance of the entropies in nats over the
    positions still masked at each decode step, averaged over the steps and then the trajectories
    -> dict(tds: float, rows: one value a trajectory, per_step: one a step, curves: of each row).

    eos "so-far", the release's: at each step the positions left of the leftmost EOS that stands
    there at that moment; a step with fewer than two has no value (None); per_step and curves end with the
    step that decoded the leftmost EOS of the final response (Figure 2). "final": at every step the
    positions before the final response's first EOS; one alone has the variance 0.
    h: a replay [B, S, N] of all positions, if made already; else one forward pass a step."""
    if h is None:
        h = replay(m, batch, counted_until(batch, eos_id, eos), mask_id)
    variance = variance_by_step(h, batch, eos_id, eos)  # [B, S]
    shown = variance
    if eos == "so-far":
        after = torch.arange(h.shape[1], device=h.device) > first_eos_step(batch, eos_id)[:, None]
        shown = variance.masked_fill(after, torch.nan)
    rows, per_step = variance.nanmean(1), shown.nanmean(0)
    return dict(
        tds=rows.nanmean().item(),
        rows=rows.tolist(),
        per_step=until_last_value(per_step),
        curves=list(map(until_last_value, shown)),
    )


def until_last_value(x):
    """The numbers of x [S] up to the last that is not NaN; None for a NaN between them."""
    known = (~x.isnan()).nonzero()[:, 0].tolist()
    values = [None] * (known[-1] + 1 if known else 0)
    for step in known:
        values[step] = x[step].item()
    return values


def variance_by_step(h, batch, eos_id, eos="so-far"):
    """Eq. 11 at each step of a replay [B, S, N], over what counts: [B, S]; see `tds`."""
    until = in_decode_order(counted_until(batch, eos_id, eos), batch)  # [B, N]
    step = torch.arange(h.shape[1], device=h.device)[:, None]  # [S, 1]
    counted = h.masked_fill(until[:, None] < step, torch.nan)
    return entropy_variance(counted, least={"so-far": 2, "final": 1}[eos])


def entropy_variance(h, least=2):
    """Population variance of the entropies [..., K] that are not NaN; NaN for fewer than `least`."""
    variance = (h - h.nanmean(-1, keepdim=True)).square().nanmean(-1)
    return variance.masked_fill((~h.isnan()).sum(-1) < least, torch.nan)


@torch.no_grad()
def replay(m, batch, until=None, mask_id=None):
    """The entropies that a model has at every step of a trajectory: h [B, S, N] in nats. h[b, t, k]
    belongs to the k-th token in decode order (equal steps by position, never decoded ones last),
    given all tokens of the steps before t; NaN once it is decoded. Where each step decoded one
    token, S = N and the diagonal holds each token's own step. Block-causal attention: tokens of later
    blocks see the masks of earlier ones; decoding block by block never asks for them, and at each
    token's own step h is what it logged, but for a last block that was cut at N.

    until [B, N]: the last step at which each position is wanted (see `counted_until`), instead of
    the step that decodes it. One forward pass a step, with the output head on those masked positions only."""
    order, rank = batch["order"], decode_index(batch).argsort(1)  # [B, N]
    until = masked_until(batch) if until is None else torch.minimum(until, masked_until(batch))
    S = int(decode_steps(batch).max())
    h = torch.full((len(order), S, order.shape[1]), torch.nan, device=order.device)
    for t in range(S):
        positions, kept = select(until >= t, place_of(order))  # [B, K]
        if positions.shape[1] == 0:
            break
        visible = decoded_before(batch, t)
        _, found = nll_and_entropy(m, batch, visible, positions, mask_id, clean=False)  # [B, K]
        h[:, t].scatter_(1, rank.gather(1, positions), found.masked_fill(~kept, torch.nan))
    return h


def entropies_when_decoded(h, batch):
    """Of a replay [B, S, N], each token's entropy at its own step, in decode order: [B, N]."""
    step = in_decode_order(masked_until(batch), batch)  # [B, N]
    own = h.gather(1, step.clamp(min=0)[:, None])[:, 0]
    return own.masked_fill(~in_decode_order(was_decoded(batch), batch), torch.nan)


def windows_of_replay(h, batch, window):
    """A replay [B, S, N] as the windows that TABOM ranks: [B, S, K], [b, t] = h given U_t of the
    tokens decoded in the W steps from t on, in decode order. NaN after them, and where no window
    starts at t (they start at 0..S - W of the row, or at 0 alone in a shorter one)."""
    (B, S, N), steps = h.shape, decode_steps(batch)[:, None]
    start = torch.arange(S, device=h.device).expand(B, S).contiguous()
    step = torch.where(was_decoded(batch), batch["order"], NEVER).sort(1).values  # [B, N]
    begin = torch.searchsorted(step, start)  # [B, S]: tokens decoded before t
    count = torch.searchsorted(step, start + window) - begin
    count = torch.where(start <= (steps - window).clamp(min=0), count, 0)
    place = torch.arange(int(count.max()), device=h.device)  # [K]
    found = h.gather(-1, (begin[..., None] + place).clamp(max=N - 1))
    return found.masked_fill(place >= count[..., None], torch.nan)


def inversions(h):
    """How often an earlier token is less certain than a later one. h [..., K]: entropies in decode
    order, such as those of `entropies_when_decoded` or `windows_of_replay`; NaN takes no part.

    -> dict(inverted, pairs), int64 [K - 1]: of the pairs at distance 1, 2, ... in decode order, how
    many have h(earlier) > h(later), and how many there are."""
    counts = torch.zeros(2, max(h.shape[-1] - 1, 0), dtype=torch.int64)
    for i in range(counts.shape[1]):
        gap = h[..., : -i - 1] - h[..., i + 1 :]  # at distance i + 1
        counts[0, i] = (gap > 0).sum()
        counts[1, i] = (~gap.isnan()).sum()
    return dict(inverted=counts[0], pairs=counts[1])


@torch.no_grad()
def masked_loss(m, batch, mask_ratio, generators, mask_id=None):
    """Cross-entropy at a mask ratio (Figure 3): [B], the mean of -log p(x0) in nats over random masked
    tokens of each response, mask_ratio of them (rounded, at least one), given the others; where
    attention is block-causal, given those of its block and all tokens of the blocks before."""
    return masked_nll(m, batch, draw_mask(batch, generators, mask_ratio), mask_id)


# ------------------------------------------------------------------- what the order of a batch says


def valid(batch):
    """True at the real tokens of each response, False at its padding: bool [B, N]."""
    return place_of(batch["response_ids"]) < batch["length"][:, None]


def was_decoded(batch):
    """True at the tokens that were decoded, which can be visible or a target: bool [B, N]."""
    return valid(batch) & (batch["order"] >= 0)


def decode_steps(batch):
    """S of each trajectory, int64 [B]. Raises ValueError for one in which nothing was decoded."""
    steps = torch.where(was_decoded(batch), batch["order"], -1).amax(1) + 1
    if (steps == 0).any():
        rows = (steps == 0).nonzero()[:, 0].tolist()
        raise ValueError(f"order: nothing was decoded (all -1) in rows {rows}: leave them out")
    return steps


def decoded_before(batch, step):
    """U: the response tokens decoded before a step (one number, or [B]), bool [B, N]."""
    step = torch.as_tensor(step, device=batch["order"].device)
    return was_decoded(batch) & (batch["order"] < step[..., None])


def context_and_targets(batch, first, size):
    """What a decoder saw before step first [B] (bool [B, N]); the positions that it decoded in the
    `size` [B] steps from there on, in decode order, equal steps by position: [B, K]; and which of
    them are real."""
    since = batch["order"] - first[:, None]  # [B, N], steps since the state
    following = (since >= 0) & (since < size[:, None]) & was_decoded(batch)
    return decoded_before(batch, first), *select(following, batch["order"])


def masked_until(batch):
    """The last step at which each position is masked: its own; the row's last if it is never
    decoded; -1: padding."""
    last = (decode_steps(batch) - 1)[:, None]
    until = torch.where(batch["order"] >= 0, batch["order"], last)
    return torch.where(valid(batch), until, -1)


def counted_until(batch, eos_id, eos):
    """The last step at which each position counts for the TDS, int64 [B, N], -1 = at none; see
    `tds`. Raises ValueError for an eos other than "so-far" and "final"."""
    until, is_eos = masked_until(batch), was_decoded(batch) & (batch["response_ids"] == eos_id)
    if eos == "final":
        return torch.where(is_eos.cumsum(1) == 0, until, -1)
    if eos != "so-far":
        raise ValueError(f"eos {eos!r} is neither 'so-far' nor 'final'")
    # After this step an EOS stands at the position itself or left of it.
    standing = torch.where(is_eos, until, NEVER).cummin(1).values  # [B, N]
    return torch.minimum(until, standing)


def first_eos_step(batch, eos_id):
    """The step that decoded the leftmost EOS of the final response, or NEVER: int64 [B]."""
    is_eos = was_decoded(batch) & (batch["response_ids"] == eos_id)
    leftmost = is_eos.int().argmax(1, keepdim=True)  # [B, 1]
    return torch.where(is_eos.any(1), batch["order"].gather(1, leftmost)[:, 0], NEVER)


def decode_index(batch):
    """The positions in decode order, equal steps by position, never decoded next, padding last."""
    key = torch.where(batch["order"] >= 0, batch["order"], NEVER - 1)
    return torch.where(valid(batch), key, NEVER).argsort(dim=1, stable=True)


def in_decode_order(x, batch):
    """x [B, N] by position -> by decode order."""
    return x.gather(1, decode_index(batch))


def places_in_block(batch, block_length=None):
    """The place of each token in the decode order of its own block, from 0, and how many tokens of
    that block were decoded: two int64 tensors [B, N]. None: the response is one block."""
    decoded, rank = was_decoded(batch), decode_index(batch).argsort(1)  # [B, N]
    block = torch.zeros_like(rank)
    if block_length is not None:
        origin = torch.as_tensor(batch.get("origin", 0), device=rank.device)
        begin = batch["prompt_mask"].long().sum(1) - origin  # [B], of the response
        block = (begin[:, None] + place_of(rank)) // block_length
    same = (block[:, :, None] == block[:, None, :]) & decoded[:, None, :]  # [B, N, N]
    earlier = rank[:, None, :] < rank[:, :, None]
    return (same & earlier).sum(-1), same.sum(-1)


# ------------------------------------------------------------------- the model, sums, random draws


def nll_and_entropy(m, batch, visible, positions, mask_id=None, clean=None):
    """-log p(x0 | U) and h, the entropy given U, at some response positions, in nats: two [B, K]. The
    arguments are those of `logits_at`."""
    logits = logits_at(m, batch, visible, positions, mask_id, clean=clean)
    return NllAndEntropy.apply(logits, batch["response_ids"].gather(1, positions))


def log_probs(*state, **options):
    """log p(. | U) at some response positions: [B, K, V], float32. The arguments are those of `logits_at`."""
    return logits_at(*state, **options).log_softmax(-1)


def logits_at(m, batch, visible, positions, mask_id=None, noise=None, clean=None):
    """The logits of a model that sees U, at some response positions: [B, K, V], float32.

    visible [B, N]: U, the response tokens that the model sees; every other one is masked.
    positions [B, K]: where to predict, counted from the start of the response. noise [B, N]: ids to
    show instead of the mask (see `disturb`). clean: whether earlier blocks are those of the whole
    response, whatever U says; None = where attention is block-causal."""
    block_length = block_length_of(m)
    if noise is None:
        mask_id = m.config.mask_id if mask_id is None else mask_id
        noise = torch.full_like(batch["response_ids"], mask_id)
    response = torch.where(visible, batch["response_ids"], noise)
    ids = torch.cat((batch["prompt_ids"], response), dim=1)  # [B, P + N]
    attention_mask = torch.cat((batch["prompt_mask"].bool(), valid(batch)), dim=1)  # [B, P + N]
    P, more = batch["prompt_ids"].shape[1], {}
    if clean or block_length is not None:
        more["origin"] = batch.get("origin", 0)
    if clean or (clean is None and block_length is not None):
        more["clean"] = torch.cat((batch["prompt_ids"], batch["response_ids"]), dim=1)
        if block_length is not None:  # the noisy copy begins where the response's first block may
            more["start"] = max(0, P - block_length + 1)
    return m(ids, attention_mask=attention_mask, positions=P + positions, **more).float()


def block_length_of(m):
    """The block length of a model whose attention is block-causal, or None."""
    return getattr(getattr(m, "config", None), "block_length", None)


def is_end(m, ids):
    """Which of the ids are the model's EOS or padding token: bool, in the shape of ids."""
    return (ids == m.config.eos_id) | (ids == m.config.pad_id)


def pick_token(logp, token):
    """log p of the tokens [B, K]: [B, K, V] -> [B, K]."""
    return logp.gather(-1, token[..., None])[..., 0]


def nll(logp, batch, positions):
    """-log p(x0) at the positions: [B, K]."""
    return -pick_token(logp, batch["response_ids"].gather(1, positions))


class NllAndEntropy(torch.autograd.Function):
    """-log p(token) and the entropy h of p = softmax(logits), [..., V] and [...] -> two [...]. Of the size of
    the logits there are only these and one gradient, made a few positions at a time:

        d nll / d logits = p - onehot(token),    d h / d logits = -p (log p + h)"""

    AT_ONCE = 2**20  # logits, which a CPU's cache holds

    @staticmethod
    def parts(logits, *more):
        """Tensors [R, ...] as parts of a few rows each. logits [R, V]."""
        rows = max(1, NllAndEntropy.AT_ONCE // logits.shape[-1])
        return zip(*(tensor.split(rows) for tensor in (logits, *more)))

    @staticmethod
    def forward(ctx, logits, token):
        flat, found = logits.reshape(-1, logits.shape[-1]), []
        lowest = torch.finfo(logits.dtype).min  # in place of -inf, because 0 * -inf is NaN
        for x, t in NllAndEntropy.parts(flat, token.reshape(-1, 1)):
            log_z = x.logsumexp(-1, keepdim=True)
            logp = x - log_z
            nll = -logp.gather(-1, t)
            h = -logp.exp().mul_(logp.clamp_(min=lowest)).sum(-1, keepdim=True)
            found.append(torch.cat((nll, h, log_z), dim=1))
        nll, h, log_z = torch.cat(found).view(*token.shape, 3).unbind(-1)
        ctx.save_for_backward(logits, token, h, log_z)
        return nll.clone(), h.clone()

    @staticmethod
    def backward(ctx, grad_nll, grad_h):
        logits, *saved = ctx.saved_tensors
        grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
        lowest = torch.finfo(logits.dtype).min
        flat, found = logits.reshape(-1, logits.shape[-1]), grad.view(-1, logits.shape[-1])
        columns = (each.reshape(-1, 1) for each in (*saved, grad_nll, grad_h))
        for x, out, t, h, log_z, g_nll, g_h in NllAndEntropy.parts(flat, found, *columns):
            logp = x - log_z
            p = logp.exp()
            torch.mul(p, logp.clamp_(min=lowest).add_(h), out=out).mul_(-g_h)
            out.addcmul_(p, g_nll).scatter_add_(-1, t, -g_nll)
        return grad, None


def entropy(logits):
    """h = -sum p log p of p = softmax(logits), in nats: [..., V] -> [...]."""
    return NllAndEntropy.apply(logits, torch.zeros(logits.shape[:-1], dtype=torch.long, device=logits.device))[1]


def place_of(x):
    """The index of each position, from the left: x [B, N] -> int64 [B, N]."""
    return torch.arange(x.shape[1], device=x.device).expand_as(x)


def select(chosen, key):
    """Positions [B, K] of the True entries of chosen [B, N], by rising key, and which are real."""
    count = chosen.sum(1)
    K = int(count.max())
    index = torch.where(chosen, key, NEVER).argsort(dim=1, stable=True)[:, :K]
    return index, torch.arange(K, device=chosen.device) < count[:, None]


def masked_mean(x, real):
    """Mean of x over the real entries of each row, [..., K] -> [...]; 0 for a row without any."""
    return torch.where(real, x, 0.0).sum(-1) / real.sum(-1).clamp(min=1)


def per_row(generator, B):
    """A generator for every row: the list given, or one shared by all."""
    if not isinstance(generator, (list, tuple)):
        return [generator] * B
    if len(generator) != B:
        raise ValueError(f"{len(generator)} generators for {B} rows: give one, or one for each")
    return list(generator)


def device_of(generator):
    return "cpu" if generator is None else generator.device


def uniform_int(low, high, generator):
    """One whole number, uniform in low..high, both included."""
    return int(torch.randint(low, high + 1, (), generator=generator, device=device_of(generator)))


def bernoulli(n, share, generator):
    """True with probability share, n times: bool [n]. n is a row's own length, so that its draws do
    not depend on the padding."""
    return torch.rand(n, generator=generator, device=device_of(generator)) < share
