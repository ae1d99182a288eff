"""Decoders of masked diffusion language models. They log when and how surely each token was decoded.

    t = decode.generate(m, prompt_ids, prompt_mask, max_new_tokens=256)  # Dream
    t = decode.generate(m, prompt_ids, prompt_mask, max_new_tokens=256, schedule="llada",
                        strategy="confidence", block_length=32)  # LLaDA
    # SDAR, or A2D with "a2d": blocks of m.config.block_length
    t = decode.generate(m, prompt_ids, prompt_mask, max_new_tokens=256, schedule="sdar", strategy="confidence")
    t = decode.generate(m, prompt_ids, prompt_mask, max_new_tokens=256, tokens_per_step=2)  # faster
    t.response, t.step, t.order, t.entropy, t.confidence  # each [B, N]
    for numbers, t in decode.stream(m, prompts, 16, max_new_tokens=256): ...  # many prompts, 16 at a time

The response starts as N mask tokens. Each step runs the model once, gives every masked position a
token and a score, and keeps the tokens of the best scores (Eq. 2 of the TABOM paper, with the
entropy as the score).

Sources: DreamLM/Dream generation_utils.py (`_sample`, `sample_tokens`); ML-GSAI/LLaDA generate.py;
tonyckc/TABOM (`ExtendedDreamModel._sample`, `llada_generate_with_tracking`), but for its credit
fusion, which is left out; Fast-dLLM (arXiv 2505.22618) for thresholds; JetAstra/SDAR generate.py and
its OpenCompass wrapper, but for their overwriting of prompts; ZHZisZZ/dllm (A2D: the MDLM and BD3LM
samplers). Their tokens and steps are reproduced exactly at temperature 0, and with greedy at any
temperature.

`m` is any callable m(ids [B, L], attention_mask=None, positions=None) -> logits [B, L or P, V] in
which logits[:, i] predicts token i. Where attention is block-causal (m.config.block_length), "sdar"
and "a2d" keep keys and values of finished blocks (m.new_cache), which is exact: a step computes one.

Dimensions: B batch, P prompt, N response, V vocabulary, W positions after the prompt: N, or with
"sdar" room for a last block that ends beyond N; in one step R rows that are not done, K masked
positions of the row that has most of them, Q tokens decoded.
"""

import dataclasses
from typing import NamedTuple

import torch
import torch.nn.functional as F

STRATEGIES = ("entropy", "confidence", "margin", "random", "left")
SCHEDULES = ("dream", "llada", "sdar", "a2d")
BLOCKWISE = ("sdar", "a2d")  # those that finish a block before the next one begins
SPARE = 32  # columns of padding that no prompt needs, before they are cut off
COLDEST = 1e-6  # temperature: logits divided by less leave float32
# Numbers of logits, which bound the memory that a step needs.
HELD = 2**25  # that the output head makes at once, but those of one row at least
SLAB = 2**23  # of those, that are copied at once
CACHED = 2**20  # the same on a CPU, whose caches hold so many
GROUP = 64  # neighbours in the vocabulary, of which best_of() first looks at the best


class Trajectory(NamedTuple):
    """What was decoded, and how. Every field is a tensor [B, N]."""

    response: torch.Tensor  # token ids; the mask token where nothing was decoded
    step: torch.Tensor  # the step that decoded the token, from 0; Settings.limit where none did
    order: torch.Tensor  # decode rank, 0 = first; ties inside a step by entropy, then by position
    entropy: torch.Tensor  # nats, of the model's whole distribution at temperature 1, at that step
    confidence: torch.Tensor  # probability that the same distribution gave to the token


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to decode: the keyword arguments of generate(). Raises ValueError for what does not fit.

    A threshold takes the place of the schedule. "dream" compares the largest probability of each
    position with it, whatever strategy, temperature, top_p and top_k are; the others the strategy's
    score (the probability, the margin, or minus the entropy, which can only reach 0). If none
    reaches it, the best one is decoded. steps are then the most that are taken: N where not given,
    as with tokens_per_step. With "sdar" it adds to the schedule: all tokens of a higher score, and the
    scheduled number at least; but for the entropy, where it is in nats: the tokens of least entropy
    whose entropies sum to less.

    "sdar" counts blocks from the first token of a prompt, whose end may share one with the response,
    and decodes the last one whole before it is cut. "a2d" counts from the end of the prompt. With
    both, each block has steps / blocks, rounded up; None = as many as it has tokens."""

    max_new_tokens: int  # N, the length of every response
    steps: int | None = None  # for the whole response, the same number for each block; None = N
    strategy: str = "entropy"  # first: low entropy, high confidence, large margin, random, or left
    schedule: str = "dream"  # see quota(); "dream" and "sdar" score after temperature and so on
    block_length: int | None = None  # decode so many tokens, then the next; None = one block, or the model's
    tokens_per_step: int | None = None  # exactly so many each step, from the first step on
    temperature: float = 0.0  # of drawing a token; 0 = the most probable one
    top_p: float | None = None  # draw from the most probable tokens whose sum just exceeds this
    top_k: int | None = None  # draw from so many of the most probable tokens
    greedy: bool = False  # the most probable token at any temperature; the scores do not change
    threshold: float | None = None  # all tokens with at least this probability, or else the best one
    suppress: tuple | None = None  # ids that are never chosen, such as those of no real token
    last: tuple | None = None  # ids whose positions come last, scored as if the ids did not exist
    stop: tuple | None = None  # ids that end a row after the block that holds one

    def __post_init__(self):
        for name in ("max_new_tokens", "steps", "block_length", "tokens_per_step", "top_k"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} {value} must be at least 1")
        for name, known in (("strategy", STRATEGIES), ("schedule", SCHEDULES)):
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"{name} {value!r} is unknown; choose one of {', '.join(known)}")
        if not (self.temperature == 0 or COLDEST <= self.temperature < float("inf")):
            raise ValueError(f"temperature {self.temperature} must be 0, or a number of at least {COLDEST}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p} must be above 0 and at most 1")
        if self.threshold is not None and not 0 <= self.threshold <= (float("inf") if self.bounded else 1):
            raise ValueError(f"threshold {self.threshold} must be a probability between 0 and 1")
        for other in ("steps", "threshold"):
            n, value = self.tokens_per_step, getattr(self, other)
            if n is not None and value is not None:
                raise ValueError(f"tokens_per_step {n} and {other} {value}: give one of them")
        for name in ("suppress", "last", "stop"):
            if getattr(self, name) is not None:  # any collection of ids; a tuple can be compared
                ids = tuple(map(int, getattr(self, name)))
                if ids and min(ids) < 0:
                    raise ValueError(f"{name} holds {min(ids)}: token ids begin at 0")
                object.__setattr__(self, name, ids)
        self.check_blocks()

    def check_blocks(self):
        """Raises ValueError for blocks that do not divide the response, or the steps."""
        N, L = self.max_new_tokens, self.length
        if self.schedule == "sdar" and self.block_length is None:
            raise ValueError("schedule 'sdar' needs a block_length: that of the model's training, such as 4")
        if self.schedule in BLOCKWISE:  # any length and number of steps will do
            return
        if N % L:
            raise ValueError(
                f"block_length {L} does not divide max_new_tokens {N}; nearest below: {divisor_below(N, L)}"
            )
        if self.limit < self.blocks or (self.fixed and self.limit % self.blocks):
            raise ValueError(f"steps {self.limit} do not divide by the {self.blocks} blocks of {L}")

    @property
    def length(self):
        """Tokens of a block."""
        return self.block_length or self.max_new_tokens

    @property
    def blocks(self):
        """Number of blocks, at most: with "sdar" a prompt may fill most of the first."""
        return -(-self.max_new_tokens // self.length) + (self.schedule == "sdar")

    @property
    def each(self):
        """The most steps of a block."""
        if self.schedule not in BLOCKWISE:
            return self.limit // self.blocks
        if self.steps is None or self.bounded:
            return self.length
        return -(-self.steps // -(-self.max_new_tokens // self.length))

    @property
    def limit(self):
        """The most steps that decoding can take."""
        if self.schedule in BLOCKWISE:
            return self.each * self.blocks
        return self.steps or self.max_new_tokens

    @property
    def fixed(self):
        """Whether each block begins at a fixed step, rather than as soon as the one before is done."""
        paced = self.threshold is not None or self.tokens_per_step is not None
        return not paced and self.schedule not in BLOCKWISE

    @property
    def bounded(self):
        """Whether the threshold is one of cumulated entropy, in nats."""
        return self.schedule == "sdar" and self.strategy == "entropy" and self.threshold is not None

    @property
    def raw(self):
        """Whether scores are of the model's own distribution, not the one that is drawn from."""
        return self.schedule in ("llada", "a2d")

    @property
    def draws(self):
        """Whether tokens are drawn by chance."""
        return self.temperature > 0 and not self.greedy

    @property
    def score(self):
        """What positions are compared by: the strategy, or "largest", the largest probability."""
        if self.threshold is None:
            return self.strategy
        if self.schedule != "dream" and self.strategy in ("entropy", "confidence", "margin"):
            return self.strategy
        return "largest"


@torch.no_grad()
def generate(m, prompt_ids, prompt_mask=None, *, mask_id=None, generator=None, on_step=None, **settings):
    """Decode a response of N = max_new_tokens to every prompt, all together -> Trajectory.

    prompt_ids [B, P], left-padded where prompt_mask [B, P] is 0.
    mask_id: the mask token; None = m.config.mask_id.
    generator: a torch.Generator, or a list of one for each row, which makes each row independent of
        its batch.
    on_step: called after each step as on_step(step, response [B, N], entropy [B, N]).
    settings: the fields of Settings.

    A position that is given the mask token stays masked, as in the official decoders; suppress the
    token to prevent it. What a block leaves masked stays a candidate in the next ones, but not with
    a threshold, "sdar" or "a2d".
    Raises ValueError for settings, prompts or generators that do not fit together, or blocks that are
    not the model's, TypeError for settings that do not exist.
    """
    generators, lengths = check_inputs(prompt_ids, prompt_mask, generator)
    prompts = [row[len(row) - n :] for row, n in zip(prompt_ids, lengths)]
    watch = None
    if on_step is not None:

        def watch(now, *seen):
            on_step(int(now.max()), *seen)

    own = dict(mask_id=mask_id, generator=generators.__getitem__, on_step=watch)
    places, parts = [], []
    for finished, t in stream(m, prompts, **own, **settings):
        places += finished
        parts.append(t)
    back = torch.tensor(places, device=prompt_ids.device).argsort()
    return Trajectory(*(torch.cat(field)[back] for field in zip(*parts)))


@torch.no_grad()
def stream(m, prompts, batch_size=None, *, mask_id=None, generator=None, on_step=None, **settings):
    """Decode prompts, batch_size rows at a time -> yields (their numbers, Trajectory) as rows finish.

    A row that is done is given the next prompt at once: the batch stays full while there are any.
    Each row is what it is in a batch of its own, but for the rounding of the model.

    prompts: token ids [P] each, of any lengths; the longest first need the least padding.
    batch_size: None = all prompts together.
    generator: a function of a prompt's number that makes its torch.Generator; None = torch's own.
    on_step: called after each step as on_step(now, response [B, N], entropy [B, N]), where now [R] is
        the number of the step, in each row that took one, on the host.
    The rest is as in generate().
    """
    # The blocks of the model's attention, where that is block-causal
    own = getattr(getattr(m, "config", None), "block_length", None)
    if settings.get("schedule") in BLOCKWISE and settings.get("block_length") is None:
        settings["block_length"] = own
    s = Settings(**settings)
    if s.schedule in BLOCKWISE and own not in (None, s.length):
        raise ValueError(f"block_length {s.length}, but the model's attention has {own}: set m.config.block_length")
    if mask_id is None:
        mask_id = m.config.mask_id
    waiting, held = list(reversed(range(len(prompts)))), {}  # numbers of prompts; row -> that of its prompt
    if not waiting:
        return
    run = Run(m, min(batch_size or len(prompts), len(prompts)), mask_id, s, prompts[0].device, own)
    while True:
        free = (run.block == s.blocks).nonzero()[:, 0].tolist()
        done = [row for row in free if row in held]
        if done:
            yield [held.pop(row) for row in done], run.trajectory(done)
        new = free[: len(waiting)]
        for row in new:
            held[row] = waiting.pop()
        if not held:
            return
        if new:
            run.fit(max(len(prompts[i]) for i in held.values()))
        for row in new:
            run.put(row, prompts[held[row]], generator and generator(held[row]))
        run.advance(on_step)


def quota(s, i, steps, count):
    """How many tokens step i [B] of a block's `steps` decodes in rows of `count` [B] masked: int64 [B].

    "dream": int(n (1 - later/now)) of n, with now and later neighbours in linspace(1, 1e-3,
    steps + 1), and all of them at the last step. "llada", "sdar": L // steps of a block of L, and one
    more in the first L % steps. "a2d": an even share of what is left, rounded; a step without any is
    left out and not counted. With a threshold: one, or with "sdar" as without."""
    if s.threshold is not None and (s.bounded or s.schedule != "sdar"):
        return count.clamp(max=1)
    if s.tokens_per_step is not None:
        return count.clamp(max=s.tokens_per_step)
    if s.schedule in ("llada", "sdar"):
        return count.minimum(s.length // steps + (i < s.length % steps).long())
    # In float32, as the official code: the rounding decides which way a half falls, and what int()
    # cuts off.
    if s.schedule == "a2d":
        later, now = (1 - (1 - (steps - at).float() / steps) for at in (i + 1, i))
        return (count.float() * (1 - later / now)).round().long()
    time = torch.linspace(1, 1e-3, steps + 1)
    share = (count.float() * (1 - time[i + 1] / time[i])).long()
    return count.where(i == steps - 1, share)


# ---------------------------------------------------------------------------------------- one step


class Run:
    """The rows that are decoded together: their tokens, the log, and the step that decodes some more.

    Rows share nothing but the step: each has a prompt, a block that it is at and a count of steps of
    its own. block_length: that of the model's attention, or None."""

    def __init__(self, m, rows, mask_id, settings, device, block_length=None):
        B, N = rows, settings.max_new_tokens
        self.m, self.mask_id, self.settings = m, mask_id, settings
        self.P, self.N, self.W = 0, N, N
        if settings.schedule == "sdar":
            self.W += settings.length - 1
        self.ids = torch.full((B, self.W), mask_id, device=device)  # [B, P + W]
        self.attention_mask = torch.ones_like(self.ids)
        self.decoded_at = torch.full_like(self.ids, settings.limit)
        self.entropy = torch.full((B, self.W), float("nan"), device=device)
        self.confidence = self.entropy.clone()
        self.generators = [None] * B
        # [B] each, on the host: which block a row is at (past the last: it is done), the step in it, all
        # steps before; tokens of its prompt, and of those the ones in the first block; columns whose
        # keys and values are final, -1 for a prompt that is new
        self.block = torch.full((B,), settings.blocks)
        self.i, self.now, self.length, self.tail, self.known = torch.zeros(5, B, dtype=torch.long)
        self.blockwise = block_length is not None and settings.schedule in BLOCKWISE
        self.cache = None

    @property
    def response(self):
        """[B, W], a view: decoding writes into ids [B, P + W]."""
        return self.ids[:, self.P :]

    def fit(self, P):
        """Make room for prompts of up to P tokens; seldom less than before, for a shape costs time."""
        if self.P - SPARE < P <= self.P:
            return
        self.ids = F.pad(self.ids, (P - self.P, 0), value=self.mask_id)
        self.attention_mask = F.pad(self.attention_mask, (P - self.P, 0))
        self.P, self.padded = P, False
        if self.blockwise and hasattr(self.m, "new_cache"):  # any other model computes all tokens at every step
            self.cache = self.m.new_cache(len(self.ids), P + self.W)
            self.known.fill_(-1)

    def put(self, row, prompt, generator):
        """Begin with a prompt [n] in a row."""
        n = len(prompt)
        self.ids[row] = self.mask_id
        self.ids[row, self.P - n : self.P] = prompt
        self.attention_mask[row] = 1
        self.attention_mask[row, : self.P - n] = 0
        self.decoded_at[row] = self.settings.limit
        self.entropy[row] = self.confidence[row] = float("nan")
        self.block[row] = self.i[row] = self.now[row] = 0
        self.length[row], self.known[row] = n, -1
        if self.settings.schedule == "sdar":
            self.tail[row] = n % self.settings.length
        self.generators[row] = generator
        # Once there is a mask it stays, until prompts are far shorter: a compiled model is slow to change
        self.padded |= bool((self.length < self.P)[self.block < self.settings.blocks].any())

    def advance(self, on_step=None):
        """Take one step in every row that is not done; none where one more is found to be done."""
        s = self.settings
        while True:
            masked = self.candidates()  # [B, W]
            count = masked.sum(1).cpu()  # [B], all that the host has to know of a step
            over = (self.block < s.blocks) & ((count == 0) | (self.i == s.each))
            if not over.any():
                break
            self.block[over] += 1
            self.i[over] = 0
            if s.stop is not None:
                self.block[over & member(self.response, s.stop).any(1).cpu()] = s.blocks
            if (self.block[over] == s.blocks).any():
                return  # a row is free: it may be filled before the step
        if s.fixed:
            self.now = self.block * s.each + self.i
        best = quota(s, self.i, s.each, count)  # [B]
        turn = torch.ones_like(best, dtype=torch.bool)
        if self.cache is not None and (self.known[best > 0] < 0).any():
            turn = self.known < 0  # new prompts first: their step is longer than that of the others
            best *= turn
        if best.any():  # Dream's first step often decodes nothing, and then needs no model
            self.step(masked, count, best)
            if on_step is not None:
                on_step(self.now[best > 0], self.response[:, : self.N], self.entropy[:, : self.N])
        self.now += best > 0
        self.i += turn & (self.block < s.blocks)

    def candidates(self):
        """Which positions may be decoded now, in the block of each row: bool [B, W]."""
        s, at = self.settings, torch.arange(self.W, device=self.ids.device)
        start, last = self.block * s.length - self.tail, (self.block < s.blocks).long()
        start, last = torch.stack((start, last))[..., None].to(at.device)  # [B, 1] each
        masked = (self.response == self.mask_id) & (last > 0) & (at < start + s.length)
        if s.schedule in BLOCKWISE or s.threshold is not None:
            masked &= (at >= start) & (start < self.N)
        return masked

    def inputs(self, rows, host):
        """The ids, and the arguments beside them, for a step of rows [R].

        host: the same rows, on the host."""
        end, more = self.P + self.W, dict(attention_mask=None)
        if self.cache is not None:
            # The first step of a block computes the one before it as well: its last tokens were
            # masks when they were decoded. Each row is at a block, and so at columns, of its own.
            begin = self.P + self.block[host] * self.settings.length - self.tail[host]  # [R]
            ends = (begin + self.settings.length).clamp(max=end)
            n, end = int((ends - self.known[host].clamp(min=0)).max()), int(ends.max())
            first = (ends - n).clamp(min=0)  # [R]
            if (first == first[0]).all():
                first = int(first[0])
            more.update(cache=self.cache.of(rows, first, n))
            self.known[host] = begin
        if self.padded:  # models are faster without a mask
            more["attention_mask"] = self.attention_mask[rows, :end]
        if self.blockwise and self.settings.schedule == "a2d":
            more["origin"] = self.length[host].to(rows.device) if self.padded else self.P
        return self.ids[rows, :end], more

    def step(self, masked, count, best):
        """Run the model once, and decode the best [B] so many of the masked positions [B, W].

        count [B]: how many positions are masked."""
        host = best.nonzero()[:, 0]  # [R]; rows that are done cost nothing, nor do rows that wait
        K, rows = int(count[host].max()), host.to(masked.device)
        masked, best = masked[rows], best.to(masked.device)[rows]
        place, number = numbered(masked, K)  # [R, K], [R, W]
        ids, more = self.inputs(rows, host)
        split = hasattr(self.m, "unembed")  # any other model makes all logits at once
        if split:
            more["head"] = False
        x = self.m(ids, positions=self.P + place, **more)  # [R, K, D], or logits [R, K, V]
        size = len(x)
        if split:
            size = max(1, HELD // (K * self.m.config.vocab_size))
        parts = zip(*(each.split(size) for each in (x, rows, masked, best, place, number)))
        for x, *part in parts:
            self.unmask(self.m.unembed(x) if split else x, *part)

    def unmask(self, logits, rows, masked, best, place, number):
        """Decode the best [R] so many of the masked positions [R, W] of these rows [R], of whose masked
        positions, place [R, K], these are the logits [R, K, V]. number [R, W]: see numbered()."""
        s = self.settings

        # 1. Choose a token and a score (higher = sooner) for every masked position. From here on
        #    everything is [R, W], and means nothing where it is not masked.
        noise = torch.zeros_like(place, dtype=torch.float32)
        if s.draws:
            noise = self.noise(rows).gather(1, place)
        token, score = choose(logits, noise, s)  # [R, K]
        token, score = token.gather(1, number), score.gather(1, number)  # [R, W]
        if s.score == "random":
            score = self.noise(rows)
        elif s.score == "left":
            score = -torch.arange(float(self.W), device=score.device).expand(len(rows), -1)

        # 2. Pick the best ones. The sort is stable: of equal scores the leftmost comes first.
        score = score.masked_fill(~masked, -torch.inf)
        nth = score.argsort(dim=1, descending=True, stable=True).argsort(dim=1)  # 0 = the best
        picked = nth < best[:, None]
        if s.threshold is not None:
            picked |= self.reached(score, nth)
        r, n = (picked & masked).nonzero(as_tuple=True)  # [Q]

        # 3. Write them down, with what the model's whole untempered distribution said.
        at = (rows[r], n)
        self.response[at] = token[r, n]
        self.decoded_at[at] = self.now.to(rows.device)[rows[r]]
        self.entropy[at], self.confidence[at] = describe(logits, r, number[r, n], token[r, n])

    def reached(self, score, nth):
        """Which positions reach the threshold, of those with a score, which is the nth: bool [R, W]."""
        s = self.settings
        if s.bounded:  # entropies, the least first, of this position and those before it
            total = -score.sort(dim=1, descending=True).values.cumsum(1)
            return total.gather(1, nth) < s.threshold
        if s.schedule == "sdar":
            return score > s.threshold
        return score >= s.threshold

    def noise(self, rows):
        """Noise in [0, 1) for the response of each row, from the row's own generator: [R, W]."""
        noise = torch.empty(len(rows), self.W, device=rows.device)
        for row, b in zip(noise, rows.tolist()):
            g = self.generators[b]
            if g is None:
                row.uniform_()
            else:  # it may be on another device
                row.copy_(torch.rand(self.W, generator=g, device=g.device))
        return noise

    def trajectory(self, rows):
        """The Trajectory of some rows, a list."""
        logs = (self.response, self.decoded_at, self.entropy, self.confidence)
        response, step, entropy, confidence = (x[rows, : self.N] for x in logs)
        step = step.masked_fill(response == self.mask_id, self.settings.limit)
        return Trajectory(response, step, decode_order(step, entropy), entropy, confidence)


def numbered(masked, K):
    """Number the masked positions [R, W] of each row from left to right, at most K of them.

    -> the position of each number, [R, K], a row's first one again where it has fewer than K; and the
    number of each position, [R, W], which means nothing where it is not masked."""
    number = (masked.cumsum(1) - 1).clamp(min=0)
    place = masked.int().argsort(dim=1, descending=True, stable=True)[:, :K]
    return torch.where(masked.gather(1, place), place, place[:, :1]), number


def describe(logits, row, number, token):
    """Entropy in nats, and probability of the token, of Q positions of logits [R, K, V]: two [Q].

    row, number, token [Q]: where in R and K, and what was decoded there."""
    entropy, confidence = [], []
    size = slab(logits)
    for r, k, chosen in zip(row.split(size), number.split(size), token.split(size)):
        logp = logits[r, k].float().log_softmax(-1)  # [q, V]
        logp.clamp_(min=torch.finfo(logp.dtype).min)  # -inf times p = 0 is no number
        entropy.append(-(logp.exp() * logp).sum(-1))
        confidence.append(logp.gather(-1, chosen[:, None])[:, 0].exp())
    return torch.cat(entropy), torch.cat(confidence)


# ---------------------------------------------------------------------------------------- choosing


def choose(logits, noise, s):
    """A token and a score for each position of logits [R, K, V] by noise [R, K]: two [R, K].

    Slab by slab: the memory for copies of the logits is bounded, however many are masked."""
    R, K, _ = logits.shape
    tokens, scores = [], []
    size = slab(logits)
    for x, u in zip(logits.flatten(0, 1).split(size), noise.flatten().split(size)):
        token, score = choose_slab(x, u, s)
        tokens.append(token)
        scores.append(score)
    return torch.cat(tokens).view(R, K), torch.cat(scores).view(R, K)


def slab(logits):
    """How many positions of logits [..., V] to copy at once."""
    return max(1, (CACHED if logits.device.type == "cpu" else SLAB) // logits.shape[-1])


def choose_slab(logits, noise, s):
    """choose() for logits [K, V] and noise [K]: two [K]."""
    logits = without(logits, s.suppress)
    if s.draws:
        p, ids = filtered(logits, s)  # [K, n]
        token = draw(p, ids, noise)
    else:
        token = argmax(logits)
    if s.score in ("random", "left"):
        return token, noise  # the distribution does not matter

    # "dream" and "sdar" score the distribution that tokens are drawn from, the others the model's own.
    if s.raw or s.score == "largest":
        p, ids = without(logits, s.last).softmax(-1), None  # in the model's dtype, as officially
    elif s.last is not None or not s.draws:
        p, ids = filtered(without(logits, s.last), s)
    score = rate(s.score, p, ids, token)
    if s.last is not None:
        # Of the entropy, 0 would be the best.
        worst = torch.finfo(score.dtype).min if s.score == "entropy" else 0.0
        score = score.masked_fill(member(token, s.last), worst)
    return token, score


def rate(score, p, ids, token):
    """The score of K positions, [K].

    p, ids [K, n]: the distribution; ids None = over the whole vocabulary. token [K]: those chosen."""
    if score == "entropy":
        return (p * torch.log(p + 1e-10)).sum(-1)  # minus the entropy; the constant is Dream's
    if score == "largest":
        return p.amax(-1)
    if score == "confidence" and ids is None:
        return p.gather(-1, token[:, None])[:, 0]
    if score == "confidence":
        return (p * (ids == token[:, None])).sum(-1)
    best = p.topk(min(2, p.shape[-1]), dim=-1).values
    return best[:, 0] - best[:, 1:].sum(-1)  # top_k = 1 leaves a single one


def filtered(logits, s):
    """What temperature, top_p and top_k leave of logits [K, V]: p and ids [K, n]; ids None = all."""
    temperature = s.temperature or 1.0  # 0 is for the token only
    if s.top_k is not None or (s.top_p is not None and s.top_p < 1):
        return nucleus(logits, temperature, s)
    if s.raw:
        logits = logits.float()  # Dream draws in the model's dtype, LLaDA in a wider one
    return (logits / temperature).softmax(-1), None


def nucleus(logits, temperature, s):
    """The tokens that top_p and top_k leave of softmax(logits / temperature), best first.

    -> probabilities (0 where removed) and ids, [K, n] each. top_p removes what lies beyond the best
    tokens whose sum exceeds it; the token that crosses it stays. The vocabulary is not sorted: the
    best 64 are enough as a rule, and more are taken until every position has crossed."""
    logits = logits.float()
    limit = min(s.top_k or logits.shape[-1], logits.shape[-1])
    whole = logits
    if s.schedule == "sdar" and limit < logits.shape[-1]:  # top_p is a share of what top_k leaves
        whole = logits.topk(limit, dim=-1).values
    n, total = min(64, limit), None
    while True:
        best, ids = best_of(logits, n)  # [K, n]
        p = ((best - best[:, :1]) / temperature).exp()
        if total is None:
            total = p.sum(-1, keepdim=True)
            # Where so many as the last of these would not change a float32, nor do the others.
            if (p[:, -1:] * whole.shape[-1] > total * 2**-24).any():
                # Less than exp(-80) adds nothing, and numbers that underflow are slow on CPUs.
                total = (whole - best[:, :1]).div_(temperature).clamp_(min=-80).exp_().sum(-1, keepdim=True)
        p /= total
        keep = p.cumsum(-1) - p <= (s.top_p or 1)  # the sum before the token
        keep[:, 0] = True
        if n == limit or not keep[:, -1].any():
            p = p.masked_fill(~keep, 0.0)
            return p / p.sum(-1, keepdim=True), ids
        n = min(32 * n, limit)


def grouped(logits):
    """Logits [K, V] as groups of neighbours [K, V / GROUP, GROUP], if that is possible; or None."""
    if logits.shape[-1] % GROUP or logits.shape[-1] < GROUP**2:
        return None
    return logits.unflatten(-1, (-1, GROUP))


def argmax(logits):
    """logits.argmax(-1) of [K, V], the leftmost of equal ones, in a quarter of its time on a CPU: [K]."""
    groups = grouped(logits)
    if groups is None:
        return logits.argmax(-1)
    first = groups.amax(-1).argmax(-1)  # [K], the group
    inside = groups.gather(1, first[:, None, None].expand(-1, 1, GROUP))[:, 0]  # [K, GROUP]
    return first * GROUP + inside.argmax(-1)


def best_of(logits, n):
    """logits.topk(n) of [K, V], in a third of its time on a CPU: values and ids, [K, n] each. The n
    best tokens are in the n groups with the best maxima: only there is looked any further."""
    groups = grouped(logits)
    if groups is None or n > groups.shape[1] // 8:  # with so many groups nothing is gained
        return logits.topk(n, dim=-1)
    chosen = groups.amax(-1).topk(n, dim=-1).indices  # [K, n]
    inside = groups.gather(1, chosen[..., None].expand(-1, -1, GROUP)).flatten(1)  # [K, n * GROUP]
    best, at = inside.topk(n, dim=-1)
    return best, chosen.gather(1, at // GROUP) * GROUP + at % GROUP


def draw(p, ids, noise):
    """A token of each of K distributions p, ids [K, n], by noise [K] in [0, 1): [K].

    The first one at which the cumulated sum exceeds the noise."""
    # Apple's GPUs have nothing wider than float32
    wide = torch.float32 if p.device.type == "mps" else torch.float64
    total = p.cumsum(-1, dtype=wide)
    at = torch.searchsorted(total, noise[:, None].to(wide) * total[:, -1:], right=True)  # [K, 1]
    at = at.clamp(max=p.shape[-1] - 1)
    if ids is not None:
        at = ids.gather(-1, at)
    return at[:, 0]


def without(logits, ids):
    """logits [K, V] in which the tokens of these ids (None: of none) have no probability."""
    if not ids:
        return logits
    if max(ids) >= logits.shape[-1]:
        raise ValueError(f"suppress or last holds {max(ids)}; the model has {logits.shape[-1]} tokens")
    index = torch.tensor(ids, device=logits.device)
    return logits.index_fill(-1, index, torch.finfo(logits.dtype).min)


def member(tokens, ids):
    """Which of the tokens are among the ids: bool, in the shape of tokens."""
    return torch.isin(tokens, torch.tensor(ids, dtype=torch.long, device=tokens.device))


# ---------------------------------------------------------------------------------------- the rest


def decode_order(step, entropy):
    """The decode rank of every position, by (step, entropy, position): int64 [B, N], from 0."""
    by_entropy = entropy.nan_to_num(torch.inf).argsort(dim=1, stable=True)
    by_both = by_entropy.gather(1, step.gather(1, by_entropy).argsort(dim=1, stable=True))
    return by_both.argsort(dim=1)


def check_inputs(prompt_ids, prompt_mask, generator):
    """The generators, one for each row, and the number of tokens of each prompt.

    Raises ValueError for another number of them, and for a mask that is not one of left padding."""
    if prompt_mask is not None:
        if prompt_mask.shape != prompt_ids.shape:
            raise ValueError(f"prompt_mask is {[*prompt_mask.shape]}, prompt_ids is {[*prompt_ids.shape]}")
        if (prompt_mask.int().diff(dim=1) < 0).any():
            raise ValueError("prompts must be padded on the left: prompt_mask has a 0 after a 1")
    B, generators = len(prompt_ids), generator
    if not isinstance(generator, (list, tuple)):
        generators = [generator] * B
    if len(generators) != B:
        raise ValueError(f"{len(generators)} generators for {B} prompts: give one, or one for each")
    lengths = [prompt_ids.shape[1]] * B
    if prompt_mask is not None:
        lengths = prompt_mask.bool().sum(1).tolist()
    return generators, lengths


def divisor_below(n, k):
    """The largest divisor of n that is at most k."""
    return next(d for d in range(min(n, k), 0, -1) if n % d == 0)
