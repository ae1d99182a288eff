"""Decoders of masked diffusion language models, with a log of when and how surely each token was decoded.

    t = decode.generate(m, prompt_ids, prompt_mask, max_new_tokens=256)                                   # Dream
    t = decode.generate(m, prompt_ids, prompt_mask, max_new_tokens=256, strategy="confidence", schedule="llada",
                        block_length=32)                                                                  # LLaDA
    t = decode.generate(m, prompt_ids, prompt_mask, max_new_tokens=256, tokens_per_step=2)                # few steps
    t.response, t.step, t.order, t.entropy, t.confidence                                                  # each [B, N]

The response starts as N mask tokens. Each step runs the model once, gives every masked position a token and a score,
and keeps the tokens of the best scores (Eq. 2 of the TABOM paper, with the entropy as the score).

Sources: DreamLM/Dream generation_utils.py (`_sample`, `sample_tokens`); ML-GSAI/LLaDA generate.py; tonyckc/TABOM (its
`ExtendedDreamModel._sample` and `llada_generate_with_tracking`), but for its credit fusion, which is left out;
Fast-dLLM (arXiv 2505.22618) for thresholds and approximate caches. At temperature 0, and with greedy at any
temperature, their tokens and steps are reproduced exactly.

`m` is any callable m(ids [B, L], attention_mask=None, positions=None) -> logits [B, L or P, V] in which logits[:, i]
predicts token i.

Dimensions: B batch, P prompt, N response, V vocabulary; in one step R rows that are not done, K masked positions of the
row that has most of them, Q tokens decoded.
"""

import dataclasses
from typing import NamedTuple

import torch

STRATEGIES = ("entropy", "confidence", "margin", "random", "left")
SCHEDULES = ("dream", "llada")
CACHES = ("prefix", "dual")
SLAB = 2**23  # logits that are copied at once: bounds the memory of a step, however many positions are masked


class Trajectory(NamedTuple):
    """What was decoded, and how. Every field is a tensor [B, N]."""

    response: torch.Tensor  # token ids; the mask token where nothing was decoded
    step: torch.Tensor  # the step that decoded the token, from 0; Settings.limit where none did
    order: torch.Tensor  # rank in the decode order, 0 = first; ties inside a step broken by entropy, then position
    entropy: torch.Tensor  # nats, of the model's whole distribution at temperature 1, at that step
    confidence: torch.Tensor  # probability that the same distribution gave to the token


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to decode: the keyword arguments of generate(). Raises ValueError for settings that do not fit together."""

    max_new_tokens: int  # N, the length of every response
    steps: int | None = None  # of the whole response, shared equally by its blocks; None = N
    strategy: str = "entropy"  # decode first: low entropy, high probability, large margin of the two best, chance, left
    schedule: str = "dream"  # how many tokens each step decodes (see quota), and of which distribution scores are taken
    block_length: int | None = None  # decode blocks of so many tokens from left to right; None = one block
    tokens_per_step: int | None = None  # exactly so many tokens each step, from the first one on, instead of steps
    temperature: float = (
        0.0  # of the token; 0 = the most probable one. "dream" takes its scores at it too, "llada" at 1
    )
    top_p: float | None = None  # keep the most probable tokens up to the one at which their sum exceeds this
    top_k: int | None = None  # keep so many of the most probable tokens
    greedy: bool = False  # the most probable token at any temperature; scores as without
    threshold: float | None = None  # every token as probable as this, at least the best one, instead of the schedule
    suppress: tuple | None = None  # token ids that are never chosen, such as rows of the network that are no token
    last: tuple | None = None  # token ids that are decoded last: such as EOS, which is easy to predict
    stop: tuple | None = None  # token ids: a row ends after the block that holds one
    approximate_cache: str | None = (
        None  # reuse a block's first keys and values: "prefix" before it, "dual" after it too
    )

    def __post_init__(self):
        for name in ("max_new_tokens", "steps", "block_length", "tokens_per_step", "top_k"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} {value} must be at least 1")
        for name, known in (("strategy", STRATEGIES), ("schedule", SCHEDULES), ("approximate_cache", (None, *CACHES))):
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"{name} {value!r} is unknown; choose one of {', '.join(filter(None, known))}")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature {self.temperature} must be a number of at least 0")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p} must be above 0 and at most 1")
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold {self.threshold} must be a probability between 0 and 1")
        for other in ("steps", "threshold"):
            if self.tokens_per_step is not None and getattr(self, other) is not None:
                raise ValueError(
                    f"tokens_per_step {self.tokens_per_step} and {other} {getattr(self, other)}: give one of them"
                )
        for name in ("suppress", "last", "stop"):
            if getattr(self, name) is not None:  # any collection of ids; a tuple can be compared and hashed
                object.__setattr__(self, name, tuple(map(int, getattr(self, name))))
        self.check_blocks()

    def check_blocks(self):
        N, L = self.max_new_tokens, self.length
        if N % L:
            raise ValueError(
                f"block_length {L} does not divide max_new_tokens {N}; nearest below: {divisor_below(N, L)}"
            )
        if self.limit < self.blocks or (self.fixed and self.limit % self.blocks):
            raise ValueError(f"steps {self.limit} do not divide by the {self.blocks} blocks of {L} tokens")

    @property
    def length(self):
        """Tokens of a block."""
        return self.max_new_tokens if self.block_length is None else self.block_length

    @property
    def blocks(self):
        return self.max_new_tokens // self.length

    @property
    def limit(self):
        """The most steps that decoding can take."""
        return self.max_new_tokens if self.steps is None else self.steps

    @property
    def fixed(self):
        """Whether a schedule fixes the step at which each block begins, rather than how fast a row is decoded."""
        return self.threshold is None and self.tokens_per_step is None

    @property
    def draws(self):
        """Whether tokens are drawn by chance."""
        return self.temperature > 0 and not self.greedy

    @property
    def score(self):
        """What the positions are compared by: the strategy, or "largest", the largest untempered probability.

        With a threshold Dream's decoder looks at nothing else; LLaDA's compares the strategy's own score with it."""
        own = self.threshold is None or (self.schedule == "llada" and self.strategy not in ("random", "left"))
        return self.strategy if own else "largest"


@torch.no_grad()
def generate(m, prompt_ids, prompt_mask=None, *, mask_id=None, generator=None, on_step=None, **settings):
    """Decode a response of N = max_new_tokens to every prompt -> Trajectory.

    prompt_ids [B, P], left-padded where prompt_mask [B, P] is 0.
    mask_id: the mask token; None = m.config.mask_id.
    generator: a torch.Generator, or a list of one for each row, which makes each row independent of its batch.
    on_step: called after each step as on_step(step, response [B, N], entropy [B, N]).
    settings: the fields of Settings. An approximate cache is faster, and not the same result: the model no longer sees
        outside the block what the block has become. It needs a model that takes cache and span, as model.py's does.

    A position that is given the mask token stays masked, as in the official decoders; suppress the token to prevent it.
    What a block leaves masked is decoded in the next ones, but not with a threshold or an approximate cache.
    Raises ValueError for settings, prompts or generators that do not fit together, and TypeError for unknown settings.
    """
    s = Settings(**settings)
    generators = check_inputs(prompt_ids, prompt_mask, generator)
    mask_id = m.config.mask_id if mask_id is None else mask_id
    run = Run(m, prompt_ids, prompt_mask, mask_id, generators, s)
    each = s.limit // s.blocks
    for block in range(s.blocks):
        start, end = block * s.length, (block + 1) * s.length
        reuse = Reuse(m, s.approximate_cache, prompt_ids.shape[1], start, end, s.max_new_tokens)
        for i in range(each):
            masked = run.candidates(start, end)  # [B, N]
            count = masked.sum(1).cpu()  # [B], all that the host has to know of a step
            if not count.any():
                break
            if s.fixed:
                run.now.fill_(block * each + i)
            best = quota(s, i, each, count)  # [B]
            if best.any():  # Dream's first step often decodes nothing, and needs no model for it
                run.step(masked, count, best, reuse)
                if on_step is not None:
                    on_step(int(run.now.max()), run.response, run.entropy)
            run.now += count.gt(0).to(run.now.device)
        if s.stop is not None:
            run.stopped |= member(run.response[:, :end], s.stop).any(1)
    return run.trajectory()


def quota(s, i, steps, count):
    """How many tokens step i of a block's `steps` decodes in rows with `count` [B] masked ones: int64 [B].

    "dream": int(n (1 - s/t)) of n, t and s neighbours in linspace(1, 1e-3, steps + 1), and all at the last step.
    "llada": L // steps of a block of L, one more in the first L % steps. With a threshold at least one."""
    if s.threshold is not None or s.tokens_per_step is not None:
        return count.clamp(max=s.tokens_per_step or 1)
    if s.schedule == "llada":
        return count.clamp(max=s.length // steps + (i < s.length % steps))
    if i == steps - 1:
        return count
    now, later = torch.linspace(1, 1e-3, steps + 1)[i : i + 2]  # float32, as the official code: int() cuts its rounding
    return (count.float() * (1 - later / now)).long()


# --------------------------------------------------------------------------------------------------------- one step


class Run:
    """One call of generate(): the tokens, which of them are decoded, and the log. Its tensors are written in place."""

    def __init__(self, m, prompt_ids, prompt_mask, mask_id, generators, settings):
        (B, P), N, device = prompt_ids.shape, settings.max_new_tokens, prompt_ids.device
        self.m, self.mask_id, self.generators, self.settings, self.P = m, mask_id, generators, settings, P
        self.ids = torch.cat((prompt_ids, prompt_ids.new_full((B, N), mask_id)), dim=1)  # [B, P + N]
        self.response = self.ids[:, P:]  # a view: decoding writes into ids
        self.attention_mask = None  # models are faster without one
        if prompt_mask is not None and not prompt_mask.bool().all():
            self.attention_mask = torch.cat((prompt_mask, prompt_mask.new_ones(B, N)), dim=1)
        self.decoded_at = torch.full((B, N), settings.limit, device=device)
        self.entropy = torch.full((B, N), float("nan"), device=device)
        self.confidence = self.entropy.clone()
        self.now = torch.zeros(B, dtype=torch.long, device=device)  # the step that each row is at
        self.stopped = torch.zeros(B, dtype=torch.bool, device=device)  # a stop token ended the row

    def candidates(self, start, end):
        """Which positions may be decoded now, in the block from start to end: bool [B, N]."""
        masked = (self.response == self.mask_id) & ~self.stopped[:, None]
        masked[:, end:] = False
        if self.settings.threshold is not None or self.settings.approximate_cache is not None:
            masked[:, :start] = False
        return masked

    def step(self, masked, count, best, reuse):
        """Run the model once, and decode the `best` [B] many of the masked positions [B, N], count [B] in each row."""
        s, rows = self.settings, count.nonzero()[:, 0].to(masked.device)  # [R]: rows that are done cost nothing
        masked, best = masked[rows], best.to(masked.device)[rows]
        place, number = numbered(masked, int(count.max()))  # [R, K], [R, N]
        attention_mask = None if self.attention_mask is None else self.attention_mask[rows]
        logits = self.m(  # [R, K, V]
            self.ids[rows], attention_mask=attention_mask, positions=self.P + place, **reuse.arguments(rows)
        )

        # 1. Choose a token and a score (higher = sooner) for every masked position. Elsewhere they mean nothing.
        noise = self.noise(rows).gather(1, place) if s.draws else None
        token, score = choose(logits, noise, s)  # [R, K]
        token, score = token.gather(1, number), score.gather(1, number)  # [R, N]
        if s.score == "random":
            score = self.noise(rows)
        elif s.score == "left":
            score = -torch.arange(s.max_new_tokens, device=score.device).expand(len(rows), -1).float()

        # 2. Pick the best ones. The sort is stable: of equal scores the leftmost is decoded.
        score = score.masked_fill(~masked, -torch.inf)
        nth = score.argsort(dim=1, descending=True, stable=True).argsort(dim=1)  # [R, N], 0 = the best
        taken = masked & (nth < best[:, None])
        if s.threshold is not None:
            taken |= masked & (score >= s.threshold)

        # 3. Write them down, with what the model's whole untempered distribution said.
        r, n = taken.nonzero(as_tuple=True)  # [Q]
        at = (rows[r], n)
        self.response[at] = token[r, n]
        self.decoded_at[at] = self.now[rows[r]]
        self.entropy[at], self.confidence[at] = describe(logits, r, number[r, n], token[r, n])

    def noise(self, rows):
        """Uniform noise in [0, 1) for the whole response of each row, from the row's own generator: [R, N]."""
        noise = torch.empty(len(rows), self.settings.max_new_tokens, device=rows.device)
        for row, b in zip(noise, rows.tolist()):
            g = self.generators[b]
            row.copy_(torch.rand(len(row), generator=g, device=row.device if g is None else g.device))
        return noise

    def trajectory(self):
        self.decoded_at[self.response == self.mask_id] = self.settings.limit
        order = decode_order(self.decoded_at, self.entropy)
        return Trajectory(self.response.clone(), self.decoded_at, order, self.entropy, self.confidence)


def numbered(masked, K):
    """Number the masked positions [R, N] of each row from left to right, at most K of them.

    -> the position of each number, [R, K], a row's first one again where it has fewer than K; and the number of each
    position, [R, N], which means nothing where it is not masked."""
    number = (masked.cumsum(1) - 1).clamp(min=0)
    place = masked.int().argsort(dim=1, descending=True, stable=True)[:, :K]
    return torch.where(masked.gather(1, place), place, place[:, :1]), number


def describe(logits, row, number, token):
    """Entropy in nats, and the probability of the token, of Q of the positions of logits [R, K, V]: two [Q]."""
    entropy, confidence = [], []
    size = max(1, SLAB // logits.shape[-1])
    for r, k, chosen in zip(row.split(size), number.split(size), token.split(size)):
        logp = logits[r, k].float().log_softmax(-1)  # [q, V]
        logp.clamp_(min=torch.finfo(logp.dtype).min)  # -inf times p = 0 is no number
        entropy.append(-(logp.exp() * logp).sum(-1))
        confidence.append(logp.gather(-1, chosen[:, None])[:, 0].exp())
    return torch.cat(entropy), torch.cat(confidence)


class Reuse:
    """The keyword arguments for the model in the steps of one block: none, or those of an approximate cache.

    The first step computes everything; the later ones compute only a span, and take what they need of the rest from the
    first: the block and all after it with "prefix", the block alone with "dual"."""

    def __init__(self, m, kind, P, start, end, N):
        self.m, self.kind, self.cache, self.rows = m, kind, None, None
        self.span = (P + start, P + (end if kind == "dual" else N))

    def arguments(self, rows):
        if self.kind is None:
            return {}
        rows, before = rows.tolist(), self.rows
        self.rows = rows
        if self.cache is None:
            self.cache = self.m.new_cache()
            return dict(cache=self.cache, span=None)
        if rows != before:  # rows that are done leave the cache
            self.cache.keep(list(map(before.index, rows)))
        return dict(cache=self.cache, span=self.span)


# ---------------------------------------------------------------------------------------------------------- choosing


def choose(logits, noise, s):
    """A token and a score for each of the positions of logits [R, K, V]: two tensors [R, K].

    noise [R, K] in [0, 1) decides which token is drawn, where s draws. Slab by slab, which bounds the memory."""
    R, K, V = logits.shape
    noise = torch.zeros(R, K, device=logits.device) if noise is None else noise
    tokens, scores = [], []
    size = max(1, SLAB // V)
    for x, u in zip(logits.flatten(0, 1).split(size), noise.flatten().split(size)):
        token, score = choose_slab(x, u, s)
        tokens.append(token)
        scores.append(score)
    return torch.cat(tokens).view(R, K), torch.cat(scores).view(R, K)


def choose_slab(logits, noise, s):
    """choose() for logits [K, V] and noise [K]: two tensors [K]."""
    logits = without(logits, s.suppress)
    p = ids = None
    if s.draws:
        p, ids = filtered(logits, s)  # [K, n]
        token = draw(p, ids, noise)
    else:
        token = logits.argmax(-1)
    if s.score in ("random", "left"):
        return token, torch.zeros_like(noise)  # no need to look at the distribution

    # The score: "dream" takes it from the distribution that tokens are drawn from, "llada" from the model's own.
    if s.schedule == "llada" or s.score == "largest":
        p, ids = without(logits, s.last).softmax(-1), None  # in the model's dtype, as the official code
    elif s.last is not None or not s.draws:
        p, ids = filtered(without(logits, s.last), s)
    score = rate(s.score, p, ids, token)
    if s.last is not None:
        worst = torch.finfo(score.dtype).min if s.score == "entropy" else 0.0
        score = score.masked_fill(member(token, s.last), worst)
    return token, score


def rate(score, p, ids, token):
    """The score of K positions with the distributions p [K, n] over ids [K, n], None = all tokens, and the tokens [K]
    that were chosen: [K]."""
    if score == "entropy":
        return (p * torch.log(p + 1e-10)).sum(-1)  # minus the entropy; the constant is Dream's
    if score == "largest":
        return p.amax(-1)
    if score == "confidence":
        if ids is None:
            return p.gather(-1, token[:, None])[:, 0]
        return (p * (ids == token[:, None])).sum(-1)
    best = p.topk(min(2, p.shape[-1]), dim=-1).values
    return best[:, 0] - best[:, 1:].sum(-1)  # top_k may leave a single one


def filtered(logits, s):
    """What temperature, top_p and top_k leave of logits [K, V]: probabilities, and ids or None = all: two [K, n]."""
    temperature = s.temperature or 1.0
    if s.top_k is not None or (s.top_p is not None and s.top_p < 1):
        return nucleus(logits, temperature, s.top_p, s.top_k)
    if s.schedule == "llada":
        logits = logits.float()  # Dream draws in the model's dtype, LLaDA in a wider one
    return (logits / temperature).softmax(-1), None


def nucleus(logits, temperature, top_p, top_k):
    """The tokens that top_p and top_k leave of softmax(logits / temperature), best first: probabilities (0 where
    removed) and ids, two [K, n].

    top_p removes what lies beyond the best tokens whose sum exceeds it; the token that crosses it stays. The vocabulary
    is not sorted: the best 64 are enough as a rule, and more are taken until every position has crossed."""
    logits, V = logits.float(), logits.shape[-1]
    limit = V if top_k is None else min(top_k, V)
    most = logits.amax(-1, keepdim=True)
    z = (logits - most).div_(temperature).clamp_(min=-80)  # exp(-80) adds nothing, and what underflows is slow on CPUs
    total = z.exp_().sum(-1, keepdim=True)
    n = min(64, limit)
    while True:
        best, ids = logits.topk(n, dim=-1)  # [K, n]
        p = ((best - most) / temperature).exp() / total
        keep = p.cumsum(-1) - p <= (1 if top_p is None else top_p)  # the sum before the token
        keep[:, 0] = True
        if n == limit or not keep[:, -1].any():
            p = p.masked_fill(~keep, 0.0)
            return p / p.sum(-1, keepdim=True), ids
        n = min(32 * n, limit)


def draw(p, ids, noise):
    """A token for each of K distributions p [K, n] over ids, by uniform noise [K]: inverts the cumulated sum. [K]"""
    wide = torch.float32 if p.device.type == "mps" else torch.float64  # Apple's GPUs have nothing wider
    total = p.cumsum(-1, dtype=wide)
    at = torch.searchsorted(total, noise[:, None].to(wide) * total[:, -1:], right=True).clamp(max=p.shape[-1] - 1)
    return (at if ids is None else ids.gather(-1, at))[:, 0]


def without(logits, ids):
    """logits [K, V] in which the tokens of these ids, or of None, have no probability."""
    if not ids:
        return logits
    return logits.index_fill(-1, torch.tensor(ids, device=logits.device), torch.finfo(logits.dtype).min)


def member(tokens, ids):
    """Which of the tokens are among the ids: bool, in the shape of tokens."""
    return torch.isin(tokens, torch.tensor(ids, dtype=torch.long, device=tokens.device))


# ------------------------------------------------------------------------------------------------------------ the rest


def decode_order(step, entropy):
    """The decode rank of every position, by (step, entropy, position): int64 [B, N], 0 = decoded first."""
    by_entropy = entropy.nan_to_num(torch.inf).argsort(dim=1, stable=True)
    by_both = by_entropy.gather(1, step.gather(1, by_entropy).argsort(dim=1, stable=True))
    return by_both.argsort(dim=1)


def check_inputs(prompt_ids, prompt_mask, generator):
    """The generators, one for each row. Raises ValueError for too few, and for a mask that pads on the right."""
    if prompt_mask is not None:
        if prompt_mask.shape != prompt_ids.shape:
            raise ValueError(f"prompt_mask is {[*prompt_mask.shape]}, prompt_ids is {[*prompt_ids.shape]}")
        if (prompt_mask.int().diff(dim=1) < 0).any():
            raise ValueError("prompts must be padded on the left: prompt_mask has a 0 after a 1")
    B = len(prompt_ids)
    generators = list(generator) if isinstance(generator, (list, tuple)) else [generator] * B
    if len(generators) != B:
        raise ValueError(f"{len(generators)} generators for {B} prompts: give one, or one for each")
    return generators


def divisor_below(n, k):
    return next(d for d in range(min(n, k), 0, -1) if n % d == 0)
