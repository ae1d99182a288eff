"""The training objective of the TABOM paper, what it is compared with first (Eq. 1), and how a model decodes (the TDS).

    out = objectives.tabom(m, batch, window=32, margin=0.2, weight=1.0)
    out["loss"].backward()                             # out["ce"], out["ranking"], ... for the log
    objectives.tds(m, batch, eos_id)["tds"]            # Trajectory Discrimination Score
    h = objectives.replay(m, batch)                    # entropies at every step of trajectories

batch: a dict of tensors
    prompt_ids, prompt_mask [B, P]   left-padded prompts, mask 1 = real token
    response_ids, order [B, N]       right-padded; order[r] = the step that decoded position r, from 0. For the tokens
                                     A B C D, order 0 2 1 -1 says: A first, then C, then B; D never, so it is masked
                                     and no target. Equal numbers were decoded together.
    length [B]                       real tokens of each response
    entropy, non_ltr [B, N]          only for a ranking that needs them, and for starts="non-ltr"
    padded                           may be there, no tensor: False where nothing is padded, and attention needs no mask
m is any callable m(ids, attention_mask=None, positions=None) -> logits [B, K, V] at those positions, where the logits
at a position predict the token at that position. What else a model is called with is what its method `arguments` gives,
if it has one (see `logits_at`).

Every objective asks for the logits at some positions, given that some tokens are visible (U); they differ in which
positions and which tokens. All return a dict: "loss", float32 whatever the model's dtype, is the mean over the rows of
the batch; the others are for the log and carry no graph. A batch may be trained in parts: with what an objective's
`normaliser` says of the whole, the mean of the parts, weighted with their rows, is the whole's. Random draws come from
`generator`: one torch.Generator, or a list of one for each row, whose draws then do not depend on other rows.

OBJECTIVES, RANKINGS, CONTEXTS and STARTS are tables that may be added to; `import baselines` does.

Sources: the TABOM paper (arXiv 2605.11854, Eq. 1 to 11); the authors' code for steps, starts and the TDS.

Dimensions: B batch, P prompt, N response, S decode steps, W steps of a window, K positions asked for, V vocabulary.
"""

import copy
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

NEVER = torch.iinfo(torch.int64).max  # a step that is not reached

# ------------------------------------------------------------------------------------------ Eq. 9


def tabom(
    m, batch, window=32, margin=0.2, weight=1.0, start=None, generator=None, entropy_context=None, ce_weight=1.0,
    mask_id=None, starts="uniform", ranking="margin", beta=1.0, pair_share=None,
):  # fmt: skip
    """Eq. 9: reconstruct a window of W consecutive decode steps from the context that decoding had, and rank its
    entropies -> dict(loss, ce, ranking, in_order, entropy); loss = ce_weight * ce + weight * ranking.

    window, start, starts: see `draw_windows`. margin: gamma of Eq. 8, nats. weight: lambda.
    ranking: "margin", Eq. 8, or another of RANKINGS. beta: inverse temperature, of those that have one.
    entropy_context: where h is taken, one of CONTEXTS. "window": all given U_t, what was decoded before the window, in
        the pass of the cross-entropy. "step": each given what was decoded before its step (Eq. 5). None: the ranking's.
    pair_share: see `share_with_pairs`. ranking and in_order (share of pairs with h(r) < h(s)) are means over the rows
        that have a pair; ce and entropy (nats) over all rows.
    Raises ValueError for an impossible window, start or choice, and where the batch lacks what a ranking needs."""
    rank, entropies_in_context = ranking_and_context(ranking, entropy_context, batch)

    # 1. the window [B, K] in decode order, and what was decoded before it, U_t [B, N]
    first, size = draw_windows(batch, window, start, starts, generator)  # [B]
    visible, positions, real = context_and_targets(batch, first, size)

    # 2. reconstruct it from U_t: -log p(x0_k | U_t)
    surprise, h = nll_and_entropy(m, batch, visible, positions, mask_id)  # [B, K]
    ce = masked_mean(surprise, real)  # [B]

    # 3. its entropies: those of the same pass, or of further passes
    h = entropies_in_context(h, m, batch, first, size, positions, real, mask_id)  # [B, K]

    # 4. rank them
    logged = {name: batch[name].gather(1, positions) for name in rank.needs}  # [B, K]
    ranked = rank.loss(h, real, margin=margin, beta=beta, **logged)  # [B]
    _, in_order = ranking_rows(h, margin, real)  # [B]

    # 5. the means over rows; those of a ranking over rows that have a pair
    ce, h = ce.mean(), masked_mean(h.detach(), real).mean()
    ranked, in_order = (mean_with_pairs(x, real, pair_share) for x in (ranked, in_order))
    loss = ce_weight * ce + weight * ranked
    return dict(loss=loss, ce=ce.detach(), ranking=ranked.detach(), in_order=in_order, entropy=h)


def ranking_loss(entropy, margin, real=None):
    """Eq. 8: mean over pairs, r decoded before s, of max(0, h(r) - h(s) + margin) -> scalar.

    entropy [..., W] in decode order, in nats; leading dimensions are averaged, over the rows that have a pair.
    real [..., W]: False entries take no part. Without any pair the loss is 0."""
    real = torch.ones_like(entropy, dtype=torch.bool) if real is None else real
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


def mean_with_pairs(x, real, pair_share=None):
    """Mean of x [...] over the rows with at least two real tokens [..., W], which have a pair; 0
    without such a row. pair_share: the share of such rows in a larger batch, to count with instead."""
    has_pair = real.sum(-1) >= 2
    rows = has_pair.sum().clamp(min=1) if pair_share is None else (pair_share * has_pair.numel() or 1)
    return torch.where(has_pair, x, 0.0).sum() / rows


def share_with_pairs(batch, window=32, start=None, starts="uniform", generator=None):
    """The share of rows whose window has a pair to rank, in the windows that `tabom` will draw with
    the same arguments: float. Runs no model, and leaves the generators as they are.

    A batch that is trained in parts (micro-batches, processes) has one share, the mean of theirs
    weighted with their rows. With it as the pair_share of tabom in every part, the mean of the
    parts' losses, weighted in the same way, is the loss of the whole batch.
    Raises ValueError without start and generator: the windows could not be drawn again."""
    if start is None and None in per_row(generator, len(batch["length"])):
        raise ValueError("share_with_pairs needs the start or the generator that tabom is given")
    _, _, real = context_and_targets(batch, *draw_windows(batch, window, start, starts, copy.deepcopy(generator)))
    return (real.sum(1) >= 2).float().mean().item()


# ---------------------------------------------------------------------- rankings, contexts, starts


class Ranking(NamedTuple):
    """A ranking loss of `tabom`."""

    loss: Callable  # (h [B, K], real [B, K], margin=, beta=, **needs [B, K]) -> [B]; h in decode order, in nats
    contexts: tuple = ("window", "step")  # which of CONTEXTS h may come from; the first unless one is asked for
    needs: tuple = ()  # fields of the batch, [B, N], whose values in the window it gets


RANKINGS = {"margin": Ranking(lambda h, real, margin, beta: ranking_rows(h, margin, real)[0])}

# name -> (h of the cross-entropy's pass, m, batch, first, size, positions, real, mask_id) -> h [B, K]
CONTEXTS = {"window": lambda h, *_: h}

ELSEWHERE = {"kl": "baselines", "listwise": "baselines", "step": "baselines"}  # the package that adds it when imported


def entry(table, what, name):
    """The entry of a table under this name. Raises ValueError for one that it does not have."""
    if name not in table:
        hint = f"import {ELSEWHERE[name]} first" if name in ELSEWHERE else f"there are {', '.join(table)}"
        raise ValueError(f"{what} {name!r} is not known here: {hint}")
    return table[name]


def ranking_and_context(ranking, context, batch=None):
    """The entries of RANKINGS and CONTEXTS. Raises ValueError for unknown ones, for two that do not
    fit together, and for a batch without what the ranking needs."""
    rank = entry(RANKINGS, "ranking", ranking)
    context = rank.contexts[0] if context is None else context
    if context not in rank.contexts:
        raise ValueError(f"entropy_context {context!r}: ranking {ranking!r} needs {' or '.join(rank.contexts)}")
    for name in rank.needs:
        if batch is not None and name not in batch:
            raise ValueError(f"ranking {ranking!r} needs batch[{name!r}], which the base model's decoding logged")
    return rank, entry(CONTEXTS, "entropy_context", context)


def draw_windows(batch, window, start=None, starts="uniform", generator=None):
    """The first step and the size, in steps, of a window in each trajectory: two int64 tensors [B].

    window W: min(W, S) of a row's S steps, from a start by one of STARTS. window "global": between two random
    timesteps, uniform over all pairs of different ones (Table 5).
    start, if given: the start [B] for W, start and end [B, 2] for "global".
    Raises ValueError for a window below 2, unknown starts, a start that leaves the trajectory."""
    check_window(window, starts)
    rule = "global" if window == "global" else starts
    draw, steps = entry(STARTS, "starts", rule), decode_steps(batch, "cpu")  # [B]; all here is on the host
    if start is None:
        start = draw(batch, steps.tolist(), window, per_row(generator, len(steps)))
    start = torch.as_tensor(start).cpu()
    if window != "global":  # a shorter trajectory is a window as a whole
        start = torch.stack((start, start + steps.clamp(max=window)), dim=1)
    first, end = start.unbind(1)
    if (first < 0).any() or (first >= end).any() or (end > steps).any():
        drawn = f"windows from {first.tolist()} of {(end - first).tolist()} steps"
        raise ValueError(f"{drawn} leave trajectories of {steps.tolist()} steps")
    return torch.stack((first, end - first)).to(batch["order"].device).unbind()


def check_window(window, starts):
    """Raises ValueError for a window that has no pair, and for starts that it cannot have."""
    if window != "global" and (not isinstance(window, int) or window < 2):
        raise ValueError(f"window {window!r}: needs at least 2 steps, or 'global'")
    if starts == "global" or (starts != "uniform" and window == "global"):
        raise ValueError(f"starts {starts!r}, window {window!r}: a global window has uniform starts and no others")


def uniform_starts(batch, steps, window, generators):
    """Uniform in 0..S - W: a list [B]."""
    return [uniform_int(0, max(S - window, 0), g) for S, g in zip(steps, generators)]


def non_ltr_starts(batch, steps, window, generators):
    """Uniform among the steps of the positions marked in batch["non_ltr"] (bool [B, N]) that lie in 0..S - 1 - W, if
    there are any (the authors' rule): a list [B]. A batch without marks gets them for the positions that were not
    decoded right after their left neighbour."""
    drawn = []
    for S, marked, g in zip(steps, non_ltr_steps(batch), generators):
        inside = [step for step in marked if step <= S - 1 - window] or range(max(S - window, 0) + 1)
        drawn.append(inside[uniform_int(0, len(inside) - 1, g)])
    return drawn


def global_starts(batch, steps, window, generators):
    """Two different timesteps of 0..S, uniform over all pairs, the lower one first: a list [B, 2]."""
    pairs = [(uniform_int(0, S, g), uniform_int(0, S - 1, g)) for S, g in zip(steps, generators)]
    return [sorted((a, b + (b >= a))) for a, b in pairs]


def non_ltr_steps(batch):
    """The steps that decoded out of left-to-right order, ascending: a list for each row."""
    marks, order = batch.get("non_ltr"), batch["order"]
    if marks is None:
        # The prompt, left of the first position, counts as decoded at step -1; what was never decoded is next to none.
        left = torch.nn.functional.pad(torch.where(order >= 0, order, NEVER), (1, 0), value=-1)[:, :-1]  # [B, N]
        marks = order - left != 1
    marks = marks.bool() & was_decoded(batch)
    return [row[marked].unique().tolist() for row, marked in zip(order, marks)]


# name -> (batch, S of each row, window, a generator for each row) -> starts [B], or starts and ends [B, 2]
STARTS = {"uniform": uniform_starts, "non-ltr": non_ltr_starts, "global": global_starts}

# ------------------------------------------------------------------------------------------ Eq. 1


def nelbo(m, batch, mask=None, generator=None, mask_id=None):
    """Eq. 1: mean over the masked positions of -log p(x0 | U), U uniform -> dict(loss, ce, masked): SFT-GT on a
    dataset's answers, SFT-SD on the model's responses.

    The authors draw t ~ U(0, 1) and mask every position with probability t. Given that at least one is masked, their
    number is uniform in 1..N and their places are uniform: so they are drawn here, without t. mask [B, N]: the masked
    positions, instead of random ones. masked: their share. Raises ValueError for a row without a masked position."""
    can_mask = was_decoded(batch)  # [B, N]
    mask = draw_mask(batch, generator) if mask is None else mask.to(can_mask.device) & can_mask
    if not mask.any(1).all():
        raise ValueError("mask: every row needs a masked position")
    loss = masked_nll(m, batch, mask.to(can_mask.device), mask_id).mean()
    return dict(loss=loss, ce=loss.detach(), masked=(mask.sum(1).to(can_mask.device) / can_mask.sum(1)).mean())


def draw_mask(batch, generator, ratio=None):
    """Random masked positions, bool [B, N] on the host: ratio of the tokens of each row, rounded and at least
    one, or a uniform number of them."""
    mask = torch.zeros(batch["order"].shape, dtype=torch.bool)
    for row, can_mask, g in zip(mask, was_decoded(batch).cpu(), per_row(generator, len(mask))):
        place = can_mask.nonzero()[:, 0]
        if n := len(place):
            count = uniform_int(1, n, g) if ratio is None else max(1, round(ratio * n))
            chosen = torch.randperm(n, generator=g, device=device_of(g))[:count]
            row[place[chosen.cpu()]] = True
    return mask


def masked_nll(m, batch, mask, mask_id=None):
    """Mean of -log p(x0) over the masked positions [B, N] of each row, given the others: [B]."""
    positions, asked = select(mask, place_of(mask))  # [B, K]
    return masked_mean(nll_and_entropy(m, batch, was_decoded(batch) & ~mask, positions, mask_id)[0], asked)


# ------------------------------------------------------------------------- the table of objectives


class Option(NamedTuple):
    """A parameter of an objective that the command line offers. Its default stands in the signature of the loss."""

    help: str
    kind: Callable = float  # text -> value; ValueError says what the text must be
    low: float | None = None
    high: float | None = None
    choices: Iterable | None = None  # a table, whose later entries count too


class Objective(NamedTuple):
    """What --objective offers under a name."""

    loss: Callable  # (m, batch, generator=, **parameters) -> dict(loss, ...)
    source: str  # where it comes from
    options: dict = {}  # name -> Option
    # (batch, parameters, generators seeded as for the loss, which it may use up) -> arguments with which the loss of a
    # part of this batch is its share of the whole batch's
    normaliser: Callable | None = None
    # parameters -> fields that each record must have beside its tokens; without "order" a dataset's answers do
    needs: Callable = lambda parameters: ("order",)
    # (m, a function that loads m once more, parameters) -> the argument `reference` of the loss: called like m; with
    # step_done(step) after each optimizer step, update(), and kept and restore(kept) for checkpoints
    reference: Callable | None = None
    # parameters -> names of options without effect, or None; ValueError for those that exclude each other
    check: Callable = lambda parameters: None
    lockstep: Callable = lambda parameters: True  # whether every batch takes equally many forward passes


def window_size(text):
    """ "32" -> 32, "global" -> "global"; raises ValueError for anything else."""
    if text != "global" and not text.removeprefix("-").isdecimal():
        raise ValueError("must be a whole number, or global")
    return text if text == "global" else int(text)


def check_tabom(parameters):
    """See Objective.check."""
    check_window(parameters["window"], parameters["starts"])
    ranking_and_context(parameters["ranking"], parameters["entropy_context"])
    if parameters["weight"] == 0 and parameters["ce_weight"] == 0:
        raise ValueError("weight 0 and ce_weight 0 train nothing: leave one of them above 0")
    return ("beta",) if parameters["ranking"] == "margin" else ("margin",)


TABOM_OPTIONS = dict(
    window=Option("W, in decode steps; global: between two random steps", window_size),
    margin=Option("gamma of the ranking loss, nats", low=0),
    weight=Option("lambda, the weight of the ranking loss", low=0),
    ce_weight=Option("weight of the cross-entropy; 0 = ranking alone", low=0),
    entropy_context=Option("where the ranked entropies are taken: all at the window's start, or each at its token's "
        "own step (default: window; step with --ranking kl)", choices=CONTEXTS),
    starts=Option("windows begin at any step, or at tokens not decoded left to right", choices=("uniform", "non-ltr")),
    ranking=Option("ranking loss: Eq. 8, Plackett-Luce, or the KL of Eq. 6", choices=RANKINGS),
    beta=Option("inverse temperature of Eq. 5, of --ranking listwise and kl", low=0),
)  # fmt: skip
OBJECTIVES = {
    "tabom": Objective(tabom, "Eq. 9", TABOM_OPTIONS, check=check_tabom,
        normaliser=lambda batch, p, g: dict(pair_share=share_with_pairs(batch, p["window"], None, p["starts"], g)),
        needs=lambda p: ("order", *RANKINGS[p["ranking"]].needs, *["non_ltr"] * (p["starts"] == "non-ltr")),
        lockstep=lambda p: (p["entropy_context"] or RANKINGS[p["ranking"]].contexts[0]) == "window"),
    "nelbo": Objective(nelbo, "Eq. 1", needs=lambda p: ()),
}  # fmt: skip

# ---------------------------------------------------------------------------- how a model decodes


def tds(m, batch, eos_id, eos="so-far", mask_id=None, h=None):
    """Trajectory Discrimination Score (Eq. 10, 11): the variance of the entropies in nats over the
    positions still masked at each decode step, averaged over the steps and then the trajectories
    -> dict(tds: float, rows: one value a trajectory, per_step: one a step, curves: of each row).

    eos "so-far", the authors': at each step the positions left of the leftmost EOS that stands
    there at that moment; a step with fewer than two has no value (None); per_step and curves end with the
    step that decoded the leftmost EOS of the final response (Figure 2). "final": at every step the
    positions before the final response's first EOS; one alone has the variance 0.
    h: a replay [B, S, N] of all positions, if made already; else one forward pass a step."""
    if h is None:
        h = replay(m, batch, counted_until(batch, eos_id, eos), mask_id)
    variance = variance_by_step(h, batch, eos_id, eos)  # [B, S]
    after = torch.arange(h.shape[1], device=h.device) > first_eos_step(batch, eos_id)[:, None]
    shown = variance.masked_fill(after & (eos == "so-far"), torch.nan)
    rows, per_step = variance.nanmean(1), until_last_value(shown.nanmean(0))
    return dict(
        tds=rows.nanmean().item(), rows=rows.tolist(), per_step=per_step, curves=[*map(until_last_value, shown)]
    )


def until_last_value(x):
    """The numbers of x [S] up to the last that is not NaN; None for a NaN between them."""
    values = [None if value != value else value for value in x.tolist()]  # a NaN is not itself
    while values and values[-1] is None:
        values.pop()
    return values


def variance_by_step(h, batch, eos_id, eos="so-far"):
    """Eq. 11 at each step of a replay [B, S, N], over what counts: [B, S]; see `tds`."""
    until = in_decode_order(counted_until(batch, eos_id, eos), batch)  # [B, N]
    step = torch.arange(h.shape[1], device=h.device)  # [S]
    return entropy_variance(h.masked_fill(until[:, None] < step[:, None], torch.nan), {"so-far": 2, "final": 1}[eos])


def entropy_variance(h, least=2):
    """Population variance of the entropies [..., K] that are not NaN; NaN for fewer than `least`."""
    variance = (h - h.nanmean(-1, keepdim=True)).square().nanmean(-1)
    return variance.masked_fill((~h.isnan()).sum(-1) < least, torch.nan)


@torch.no_grad()
def replay(m, batch, until=None, mask_id=None):
    """The entropies that a model has at every step of a trajectory: h [B, S, N] in nats. h[b, t, k]
    belongs to the k-th token in decode order (equal steps by position, never decoded ones last),
    given all tokens of the steps before t; NaN once it is decoded. Where each step decoded one
    token, S = N and the diagonal holds each token's entropy at the step that decoded it.

    until [B, N]: the last step at which each position is wanted (see `counted_until`), instead of
    the step that decodes it. One forward pass for each step that decodes something, with the output head on those
    masked positions only: before a step that decodes nothing the state is the same."""
    order, rank = batch["order"], decode_places(batch).argsort(1)  # [B, N]
    until = masked_until(batch) if until is None else torch.minimum(until, masked_until(batch))
    states = [0, *(order[was_decoded(batch)].unique() + 1).tolist()]  # the first step of each, rising; the last is S
    h = torch.full((len(order), states[-1], order.shape[1]), torch.nan, device=order.device)
    for t, end in zip(states, states[1:]):
        positions, kept = select(until >= t, place_of(order))  # [B, K]
        if positions.shape[1] == 0:
            break
        visible = decoded_before(batch, t)
        _, found = nll_and_entropy(m, batch, visible, positions, mask_id, clean=False)  # [B, K]
        h[:, t].scatter_(1, rank.gather(1, positions), found.masked_fill(~kept, torch.nan))
        h[:, t + 1 : end] = h[:, t : t + 1]
    return h


# ------------------------------------------------------------------- what the order of a batch says


def valid(batch):
    """True at the real tokens of each response, False at its padding: bool [B, N]."""
    return place_of(batch["response_ids"]) < batch["length"][:, None]


def was_decoded(batch):
    """True at the tokens that were decoded, which can be visible or a target: bool [B, N]."""
    return valid(batch) & (batch["order"] >= 0)


def decode_steps(batch, device=None):
    """S of each trajectory, int64 [B], on a device (None = the batch's). Raises ValueError for one in which nothing was
    decoded."""
    steps = (torch.where(was_decoded(batch), batch["order"], -1).amax(1) + 1).cpu()  # a GPU waits here, once
    if empty := (steps == 0).nonzero()[:, 0].tolist():
        raise ValueError(f"order: nothing was decoded (all -1) in rows {empty}: leave them out")
    return steps.to(device or batch["order"].device)


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
    """The last step at which each position is masked: the one that decodes it; the row's last if it is never
    decoded; -1: padding."""
    until = torch.where(batch["order"] >= 0, batch["order"], decode_steps(batch)[:, None] - 1)
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
    return torch.minimum(until, torch.where(is_eos, until, NEVER).cummin(1).values)


def first_eos_step(batch, eos_id):
    """The step that decoded the leftmost EOS of the final response, or NEVER: int64 [B]."""
    is_eos = was_decoded(batch) & (batch["response_ids"] == eos_id)
    return torch.where(is_eos & (is_eos.cumsum(1) == 1), batch["order"], NEVER).amin(1)


def decode_places(batch):
    """The positions in decode order, equal steps by position, never decoded next, padding last."""
    key = torch.where(batch["order"] >= 0, batch["order"], NEVER - 1)
    return torch.where(valid(batch), key, NEVER).argsort(dim=1, stable=True)


def in_decode_order(x, batch):
    """x [B, N] by position -> by decode order."""
    return x.gather(1, decode_places(batch))


# ------------------------------------------------------------------- the model, sums, random draws


def nll_and_entropy(m, batch, visible, positions, mask_id=None, clean=True):
    """-log p(x0 | U) and h, the entropy given U, at some response positions, in nats: two [B, K], float32. The
    arguments are those of `logits_at`."""
    logits = logits_at(m, batch, visible, positions, mask_id, clean)
    return [x.float() for x in NllAndEntropy.apply(logits, batch["response_ids"].gather(1, positions))]


def log_probs(*state, **options):
    """log p(. | U) at some response positions: [B, K, V], float32. The arguments are those of `logits_at`."""
    return logits_at(*state, **options).log_softmax(-1, dtype=torch.float32)


def logits_at(m, batch, visible, positions, mask_id=None, clean=True):
    """The logits of a model that sees U, at some response positions: [B, K, V], in the model's dtype.

    visible [B, N]: U, the response tokens that the model sees; every other one is masked.
    positions [B, K]: where to predict, counted from the start of the response. mask_id: what masked positions show, one
    id or one for each of them [B, N]; None = m.config.mask_id. clean: whether the model may be told the whole response,
    as training can; a method m.arguments(batch, clean=) -> dict says what else the model is called with.
    Raises ValueError for a model that returns another shape, as one does that ignores positions."""
    mask_id = m.config.mask_id if mask_id is None else mask_id
    more = m.arguments(batch, clean=clean) if hasattr(m, "arguments") else {}
    ids = torch.cat((batch["prompt_ids"], torch.where(visible, batch["response_ids"], mask_id)), dim=1)  # [B, P + N]
    real = torch.cat((batch["prompt_mask"].bool(), valid(batch)), dim=1)  # [B, P + N]
    positions = batch["prompt_ids"].shape[1] + positions
    logits = m(ids, attention_mask=real if batch.get("padded", True) else None, positions=positions, **more)
    if (shape := getattr(logits, "shape", ()))[:-1] != positions.shape:
        raise ValueError(f"the model returned {type(logits).__name__} {[*shape]} for positions {[*positions.shape]}")
    return logits


class NllAndEntropy(torch.autograd.Function):
    """-log p(token) and the entropy h of p = softmax(logits), [..., V] and [...] -> two [...], float32 or wider. Of the
    size of the logits there are only these and one gradient, in their dtype; float32 are a few positions at a time:

        d nll / d logits = p - onehot(token),    d h / d logits = -p (log p + h)"""

    AT_ONCE = 2**20  # logits, which a CPU's cache holds; a GPU takes 16 times as many
    LOWEST = -1e4  # in place of -inf, because 0 * -inf is NaN

    @staticmethod
    def parts(logits, *more):
        """Tensors [R, ...] as parts of a few rows each. logits [R, V]; their parts are float32, or wider."""
        rows = max(1, NllAndEntropy.AT_ONCE * (1 if logits.device.type == "cpu" else 16) // logits.shape[-1])
        for x, *others in zip(*(tensor.split(rows) for tensor in (logits, *more))):
            yield x if x.dtype.itemsize >= 4 else x.float(), *others

    @staticmethod
    def forward(ctx, logits, token):
        flat, found = logits.reshape(-1, logits.shape[-1]), []
        for x, t in NllAndEntropy.parts(flat, token.reshape(-1, 1)):
            log_z = x.logsumexp(-1, keepdim=True)
            logp = x - log_z
            nll = -logp.gather(-1, t)
            h = -logp.exp().mul_(logp.clamp_(min=NllAndEntropy.LOWEST)).sum(-1, keepdim=True)
            found.append(torch.cat((nll, h, log_z), dim=1))
        nll, h, log_z = torch.cat(found).view(*token.shape, 3).unbind(-1)
        ctx.save_for_backward(logits, token, h, log_z)
        return nll.clone(), h.clone()

    @staticmethod
    def backward(ctx, grad_nll, grad_h):
        logits, *saved = ctx.saved_tensors
        grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
        flat, found = logits.reshape(-1, logits.shape[-1]), grad.view(-1, logits.shape[-1])
        columns = (each.reshape(-1, 1) for each in (*saved, grad_nll, grad_h))
        for x, out, t, h, log_z, g_nll, g_h in NllAndEntropy.parts(flat, found, *columns):
            logp = torch.sub(x, log_z, out=out if out.dtype == x.dtype else None)
            p = logp.exp()
            logp.clamp_(min=NllAndEntropy.LOWEST).add_(h).mul_(-g_h).add_(g_nll).mul_(p).scatter_add_(-1, t, -g_nll)
            out.copy_(logp)  # nothing is left to do where they are one
        return grad, None


def entropy(logits):
    """h = -sum p log p of p = softmax(logits), in nats: [..., V] -> [...]."""
    return NllAndEntropy.apply(logits, torch.zeros(logits.shape[:-1], dtype=torch.long, device=logits.device))[1]


def place_of(x):
    """The place (column) of each entry: x [B, N] -> int64 [B, N]."""
    return torch.arange(x.shape[1], device=x.device).expand_as(x)


def select(chosen, key):
    """Positions [B, K] of the True entries of chosen [B, N], by rising key, and which are real."""
    count = chosen.sum(1)
    places = torch.where(chosen, key, NEVER).argsort(dim=1, stable=True)[:, : int(count.max())]
    return places, place_of(places) < count[:, None]


def masked_mean(x, real):
    """Mean of x over the real entries of each row, [..., K] -> [...]; 0 for a row without any."""
    return torch.where(real, x, 0.0).sum(-1) / real.sum(-1).clamp(min=1)


def per_row(generator, B):
    """A generator for every row: the list given, or one shared by all."""
    rows = list(generator) if isinstance(generator, (list, tuple)) else [generator] * B
    if len(rows) != B:
        raise ValueError(f"{len(rows)} generators for {B} rows: give one, or one for each")
    return rows


def device_of(generator):
    return "cpu" if generator is None else generator.device


def uniform_int(low, high, generator):
    """One whole number, uniform in low..high, both included."""
    return int(torch.randint(low, high + 1, (), generator=generator, device=device_of(generator)))
