"""Decoders of masked diffusion language models. They log when and how surely each token was decoded.

    t = decode.generate(m, prompt_ids, prompt_mask, max_new_tokens=256)  # Dream
    t = decode.generate(m, prompt_ids, prompt_mask, max_new_tokens=256, schedule="llada",
                        strategy="confidence", block_length=32)  # LLaDA
    t = decode.generate(m, prompt_ids, prompt_mask, max_new_tokens=256, tokens_per_step=2)  # faster
    t.response, t.step, t.order, t.entropy, t.confidence  # each [B, N]

The response starts as N mask tokens. Each step runs the model once, gives every masked position a
token and a score, and keeps the tokens of the best scores (Eq. 2 of the TABOM paper, with the
entropy as the score). To read: generate(), Run.advance() and Run.step(), in this order.

Sources: DreamLM/Dream generation_utils.py (`_sample`, `sample_tokens`); ML-GSAI/LLaDA generate.py;
tonyckc/TABOM (`ExtendedDreamModel._sample`, `llada_generate_with_tracking`); Fast-dLLM (arXiv
2505.22618) for thresholds. Their tokens and steps are reproduced exactly at temperature 0, and with
greedy at any temperature; with top_p or top_k in float32 (they filter in the model's dtype).

`m` is any callable m(ids [B, L], attention_mask=None, positions=None) -> logits [B, L, V], or those
at positions [B, P] alone, [B, P, V], in which logits[:, i] predicts token i. One that has the class
attribute `splits_head = True` also takes head=False, which returns [B, P, D], what its output head
gets; m.unembed(x) makes logits of it, and is called for as many rows at a time as memory allows.

Dimensions: B batch, P prompt, N response, V vocabulary, D width, W positions after the prompt: N, or
more where a last block may end beyond N; in one step R rows that take it, K masked positions of the
row that has most of them, Q tokens decoded.
"""

import dataclasses
import functools
import importlib
from typing import NamedTuple

import torch
import torch.nn.functional as F

STRATEGIES = ("entropy", "confidence", "margin", "random", "left")
SPARE = 32  # columns of padding that no prompt needs, before they are cut off
COLDEST = 1e-6  # temperature: logits divided by less leave float32
# Numbers of logits, which bound the memory that a step needs.
HELD = 2**26  # that the output head makes at once, but those of one row at least
CACHED = 2**20  # of those, that a CPU looks at together: its caches hold so many
GROUP = 64  # neighbours in the vocabulary, of which best_of() first looks at the best


class Trajectory(NamedTuple):
    """What was decoded, and how. Every field is a tensor [B, N]."""

    response: torch.Tensor  # token ids; the mask token where nothing was decoded
    step: torch.Tensor  # the step that decoded the token, from 0; Settings.max_steps where none did
    order: torch.Tensor  # decode rank, 0 = first; ties inside a step by entropy, then by position
    entropy: torch.Tensor  # nats, of the model's whole distribution at temperature 1, at that step
    confidence: torch.Tensor  # probability that the same distribution gave to the token


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
    a threshold, or where a schedule finishes its blocks.
    Raises ValueError for settings, prompts or generators that do not fit together or not the model,
    and for a model that returns something else than logits; TypeError for settings that do not exist.
    """
    generators, lengths = check_inputs(prompt_ids, prompt_mask, generator)
    run = start(m, len(prompt_ids), mask_id, prompt_ids.device, **settings)
    run.fit(max(lengths, default=0))
    for row, (ids, n) in enumerate(zip(prompt_ids, lengths)):
        run.put(row, ids[len(ids) - n :], generators[row])
    while not run.done.all():
        steps = run.advance()
        if on_step is not None and len(steps):
            on_step(int(steps.max()), *run.so_far())
    return run.trajectory(list(range(len(prompt_ids))))


def start(m, rows, mask_id, device, **settings):
    """A Run of so many rows, which wait for a prompt: Run.fit(), Run.put(), then Run.advance()."""
    if "last" in settings and "decode_last" not in settings:  # its old name
        settings["decode_last"] = settings.pop("last")
    return find_schedule(settings.get("schedule", "dream")).start(m, rows, mask_id, device, settings)


# ------------------------------------------------------------------------------- settings, schedules


@dataclasses.dataclass
class Settings:
    """How to decode: the keyword arguments of generate(). Raises ValueError for what does not fit.

    A schedule is a subclass, and Settings(schedule="llada", ...) makes one of it: it says in share()
    how many tokens a step decodes, and by the attributes below whatever else hangs on it.

    A threshold takes the place of the schedule: a step decodes all positions that reach it, or else
    the best one. "dream" compares the largest probability of each position with it, whatever
    strategy, temperature, top_p and top_k are; "llada" the strategy's score (the probability, the
    margin, or minus the entropy, which can only reach 0). steps are then the most that are taken: N
    where not given, as with tokens_per_step."""

    max_new_tokens: int  # N, the length of every response
    steps: int | None = None  # for the whole response, the same number for each block; None = N
    strategy: str = "entropy"  # first: low entropy, high confidence, large margin, random, or left
    schedule: str = "dream"  # how many tokens each step decodes: a name of SCHEDULES or ELSEWHERE
    block_length: int | None = None  # decode so many tokens, then the next; None = one block, or the model's
    tokens_per_step: int | None = None  # exactly so many each step, from the first step on
    temperature: float = 0.0  # of drawing a token; 0 = the most probable one
    top_p: float | None = None  # draw from the most probable tokens whose sum just exceeds this
    top_k: int | None = None  # draw from so many of the most probable tokens
    greedy: bool = False  # the most probable token at any temperature; the scores do not change
    threshold: float | None = None  # all tokens with at least this probability, or else the best one
    suppress: tuple | None = None  # ids that are never chosen, such as those of no real token
    decode_last: tuple | None = None  # ids whose positions come last, scored as if the ids did not exist
    stop: tuple | None = None  # ids that end a row after the block that holds one

    # What a schedule decides beside share()
    scores_untempered = False  # scores are of the model's raw distribution, not the one that is drawn from
    by_score = ()  # strategies whose score a threshold is compared with; the largest probability for others
    threshold_adds = False  # a threshold adds to share(), and does not take its place
    summed_entropy = False  # the threshold is one of summed entropy, in nats
    top_p_after_top_k = False  # top_p is a share of what top_k leaves, not of the whole
    finishes_blocks = False  # a block is finished before the next one begins, however long that takes

    def __new__(cls, *values, schedule="dream", **others):
        return object.__new__(find_schedule(schedule) if cls is Settings else cls)

    def __post_init__(self):
        for name in ("max_new_tokens", "steps", "block_length", "tokens_per_step", "top_k"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} {value} must be at least 1")
        if self.strategy not in STRATEGIES:
            raise ValueError(f"strategy {self.strategy!r} is unknown; choose one of {', '.join(STRATEGIES)}")
        if not (self.temperature == 0 or COLDEST <= self.temperature < float("inf")):
            raise ValueError(f"temperature {self.temperature} must be 0, or a number of at least {COLDEST}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p} must be above 0 and at most 1")
        highest = float("inf") if self.summed_entropy else 1
        if self.threshold is not None and not 0 <= self.threshold <= highest:
            raise ValueError(f"threshold {self.threshold} must be a probability between 0 and 1")
        for other in ("steps", "threshold"):
            n, value = self.tokens_per_step, getattr(self, other)
            if n is not None and value is not None:
                raise ValueError(f"tokens_per_step {n} and {other} {value}: give one of them")
        for name in ("suppress", "decode_last", "stop"):
            if getattr(self, name) is not None:  # any collection of ids; a tuple can be compared
                ids = tuple(map(int, getattr(self, name)))
                if ids and min(ids) < 0:
                    raise ValueError(f"{name} holds {min(ids)}: token ids begin at 0")
                setattr(self, name, ids)
        self.draws = self.temperature > 0 and not self.greedy  # tokens are drawn by chance
        # What positions are compared by: "largest" is the largest probability
        self.score = self.strategy if self.threshold is None or self.strategy in self.by_score else "largest"
        self.narrows = self.top_k is not None or (self.top_p is not None and self.top_p < 1)
        self.plan()

    def plan(self):
        """Lay out the blocks. Raises ValueError where they do not divide the response, or the steps."""
        N, L = self.max_new_tokens, self.block_length or self.max_new_tokens
        if N % L:
            below = next(d for d in range(min(N, L), 0, -1) if N % d == 0)
            raise ValueError(f"block_length {L} does not divide max_new_tokens {N}; nearest below: {below}")
        self.length, self.blocks = L, N // L  # tokens of a block, and how many there are at most
        self.columns = N  # W, positions after the prompt
        self.max_steps = self.steps or N  # that decoding can take
        self.steps_per_block = self.max_steps // self.blocks  # at most
        # Each block begins at a fixed step, rather than as soon as the one before is done
        self.lockstep = self.threshold is None and self.tokens_per_step is None
        if self.max_steps < self.blocks or (self.lockstep and self.max_steps % self.blocks):
            raise ValueError(f"steps {self.max_steps} do not divide by the {self.blocks} blocks of {L}")

    @classmethod
    def start(cls, m, rows, mask_id, device, settings):
        """start() for this schedule, which may take something from the model, or need another Run."""
        return Run(m, rows, mask_id, cls(**settings), device)

    def quota(self, i, count):
        """How many tokens step i [B] of a block decodes in rows of `count` [B] masked: int64 [B]."""
        if self.threshold is not None and not self.threshold_adds:
            return count.clamp(max=1)  # and all that reach the threshold
        if self.tokens_per_step is not None:
            return count.clamp(max=self.tokens_per_step)
        return self.share(i, count)

    def reached(self, score, nth):
        """Which positions reach the threshold, of those with a score, which is the nth: bool [R, W]."""
        return score >= self.threshold


class Dream(Settings):
    """int(n (1 - later/now)) of n, with now and later neighbours in linspace(1, 1e-3, steps + 1), and
    all of them at the last step."""

    def share(self, i, count):
        # In float32, as the official code: its rounding decides what int() cuts off.
        time = torch.linspace(1, 1e-3, self.steps_per_block + 1)
        some = (count.float() * (1 - time[i + 1] / time[i])).long()
        return count.where(i == self.steps_per_block - 1, some)


class LLaDA(Settings):
    """L // steps of a block of L tokens, and one more in the first L % steps."""

    scores_untempered = True
    by_score = ("entropy", "confidence", "margin")

    def share(self, i, count):
        L, steps = self.length, self.steps_per_block
        return count.minimum(L // steps + (i < L % steps).long())


SCHEDULES = {"dream": Dream, "llada": LLaDA}
ELSEWHERE = {"sdar": "blocks", "a2d": "blocks", "credit": "release"}  # schedules that a folder beside this file adds


def find_schedule(name):
    """The class of a schedule. Raises ValueError for one that is unknown, or whose folder is missing."""
    if name not in SCHEDULES and name in ELSEWHERE:
        try:
            importlib.import_module(ELSEWHERE[name])
        except ModuleNotFoundError as e:
            raise ValueError(f"schedule {name!r} needs the folder {ELSEWHERE[name]} beside decode.py ({e})") from e
    if name not in SCHEDULES:
        raise ValueError(f"schedule {name!r} is unknown; choose one of {', '.join(SCHEDULES | ELSEWHERE)}")
    return SCHEDULES[name]


# ---------------------------------------------------------------------------------------- one step


class Run:
    """The rows that are decoded together: their tokens, the log, and the step that decodes some more.

    Rows share nothing but the step. Each has a prompt and two clocks: the steps of the schedule that
    are over, `planned`, of which every block has steps_per_block, and the steps that it took, `taken`.
    A block that is done early, or a step without a token, leaves the second behind the first."""

    def __init__(self, m, rows, mask_id, settings, device):
        B, self.N, self.W, self.P = rows, settings.max_new_tokens, settings.columns, 0
        self.m, self.settings = m, settings
        self.mask_id = m.config.mask_id if mask_id is None else mask_id
        self.ids = torch.full((B, self.W), self.mask_id, device=device)  # [B, P + W]
        self.attention_mask = torch.ones_like(self.ids)
        self.padded = False  # whether the mask is needed: models are faster without
        self.decoded_at = torch.full_like(self.ids, settings.max_steps)
        self.entropy = torch.full((B, self.W), float("nan"), device=device)
        self.confidence = self.entropy.clone()
        self.generators = [None] * B
        # [B] each, on the host: the tokens of the prompt, and the two clocks. A new row is done.
        self.length, self.taken = torch.zeros(2, B, dtype=torch.long)
        self.end = settings.blocks * settings.steps_per_block
        self.planned = torch.full((B,), self.end)
        self.now = self.planned if settings.lockstep else self.taken  # the clock of the log: the same tensor

    @property
    def response(self):
        """[B, W], a view: decoding writes into ids [B, P + W]."""
        return self.ids[:, self.P :]

    @property
    def done(self):
        """Which rows are past their last block, bool [B]."""
        return self.planned == self.end

    def fit(self, P):
        """Make room for prompts of up to P tokens; seldom less than before, for a shape costs time."""
        if self.P - SPARE < P <= self.P:
            return
        self.ids = F.pad(self.ids, (P - self.P, 0), value=self.mask_id)
        self.attention_mask = F.pad(self.attention_mask, (P - self.P, 0))
        self.P = P
        self.padded = bool((self.length < P)[~self.done].any())

    def put(self, row, prompt, generator=None):
        """Begin with a prompt [n] in a row, for which fit() has made room."""
        n = len(prompt)
        self.ids[row] = self.mask_id
        self.ids[row, self.P - n : self.P] = prompt
        self.attention_mask[row] = 1
        self.attention_mask[row, : self.P - n] = 0
        self.decoded_at[row] = self.settings.max_steps
        self.entropy[row] = self.confidence[row] = float("nan")
        self.planned[row] = self.taken[row] = 0
        self.length[row], self.generators[row] = n, generator
        # Once there is a mask it stays, until prompts are far shorter: a compiled model is slow to change
        self.padded |= n < self.P

    def advance(self):
        """End the blocks in which nothing is masked, then take a step in every row that is not done.

        -> the numbers of the step in the rows that took it, [R] on the host: none where a row has been
        found to be done, so that it may be filled first."""
        s = self.settings
        while True:
            masked = self.candidates()  # [B, W]
            count = masked.sum(1).cpu()  # [B], all that the host has to know of a step
            over = ~self.done & (count == 0)
            if not over.any():
                break
            self.end_block(over)
            if self.done[over].any():
                return self.now[:0]
        i = self.planned % s.steps_per_block  # the step in the block, [B]
        best = s.quota(i, count).clamp(min=0).minimum(count)  # step() takes exactly so many
        ready = self.ready(best)
        best = best * ready
        now = self.now[best > 0]
        if len(now):  # Dream's first step often decodes nothing, and then needs no model
            self.step(masked, count, best)
        self.taken += best > 0
        last = ready & (i == s.steps_per_block - 1)
        self.planned += ready & ~last
        self.end_block(last)
        return now

    def candidates(self):
        """Which positions may be decoded now, in the block of each row: bool [B, W]."""
        s, at = self.settings, torch.arange(self.W, device=self.ids.device)
        begin = self.block_starts()[:, None].to(at.device)  # [B, 1]
        masked = (self.response == self.mask_id) & (at < begin + s.length) & (begin < self.N)
        if s.finishes_blocks or s.threshold is not None:
            masked &= at >= begin
        return masked

    def block_starts(self):
        """The position at which the block of each row begins, [B]; N or more where it is done."""
        return self.planned // self.settings.steps_per_block * self.settings.length

    def end_block(self, over):
        """Rows, over [B] bool, go on to their next block; those with a stop token are done."""
        s = self.settings
        self.planned[over] = (self.planned[over] // s.steps_per_block + 1) * s.steps_per_block
        if s.stop is not None and over.any():
            self.planned[over & member(self.response, s.stop).any(1).cpu()] = self.end

    def ready(self, best):
        """Which rows go on in their schedule now, bool [B]; best [B]: how many tokens they would decode."""
        return ~self.done

    def step(self, masked, count, best):
        """Run the model once, and decode the best [B] so many of the masked positions [B, W].

        count [B]: how many positions are masked. count and best are on the host; what it sends to a GPU goes in one
        copy, for it waits after each."""
        s, host = self.settings, best.nonzero()[:, 0]  # [R]; rows that are done cost nothing, nor do rows that wait
        K, Q = int(count[host].max()), int(best.sum())
        rows, best, now = torch.stack((host, best[host], self.now[host])).to(masked.device)  # [R] each
        masked = masked[rows]
        place, number = numbered(masked, K)  # [R, K], [R, W]
        ids, more = self.inputs(rows, host)
        head = self.m.unembed if getattr(self.m, "splits_head", False) else None
        if head:
            more["head"] = False
        x = self.m(ids, positions=self.P + place, **more)  # [R, K, D], or logits [R, K, V]
        check_output(x, len(rows), K)
        V = self.m.config.vocab_size if head else x.shape[-1]
        if head and len(rows) * K * V <= HELD:  # few enough to be held until the end
            x, head = head(x), None

        # 1. Choose a token and a score (higher = sooner) for every masked position. From here on
        #    everything is [R, W], and means nothing where it is not masked.
        noise = self.noise(host).gather(1, place) if s.draws else torch.zeros(place.shape, device=place.device)
        token, score = self.choose(x, head, V, noise, rows, place)  # [R, K]
        score = score.gather(1, number)  # [R, W]
        if s.score == "random":
            score = self.noise(host)
        elif s.score == "left":
            score = -torch.arange(float(self.W), device=score.device).expand(len(rows), -1)

        # 2. Pick the best ones. The sort is stable: of equal scores the leftmost comes first.
        score = score.masked_fill(~masked, -torch.inf)
        ranked = score.nan_to_num(torch.inf, neginf=-torch.inf)  # NaN first on every device: never what is not masked
        nth = ranked.argsort(dim=1, descending=True, stable=True).argsort(dim=1)  # 0 = the best
        picked = nth < best[:, None]
        if s.threshold is not None:
            picked = (picked | s.reached(score, nth)) & masked
            Q = int(picked.sum())
        first = picked.flatten().int().argsort(descending=True, stable=True)[:Q]  # nonzero(), but for its wait
        r, n = first // self.W, first % self.W  # [Q]

        # 3. Write them down, with what the model's whole untempered distribution said.
        k, at = number[r, n], (rows[r], n)
        self.response[at], self.decoded_at[at] = token[r, k], now[r]
        self.entropy[at], self.confidence[at] = describe(x, head, V, r, k, token[r, k])

    def inputs(self, rows, host):
        """The ids of rows [R], and the arguments of the model beside them. host: the same rows, on the host."""
        return self.ids[rows], dict(attention_mask=self.attention_mask[rows] if self.padded else None)

    def choose(self, x, head, V, noise, rows, place):
        """choose() for these rows [R], at place [R, K]."""
        return choose(x, head, V, noise, self.settings)

    def noise(self, host):
        """Noise in [0, 1) for the response of each row of `host` [R], from the generator of that row: [R, W]."""
        generators, device = [self.generators[b] for b in host.tolist()], self.ids.device
        theirs = next((g.device for g in generators if g is not None), device)  # it may be another
        return torch.stack([torch.rand(self.W, generator=g, device=theirs) for g in generators]).to(device)

    def so_far(self):
        """The responses, and the entropies of what is decoded, [B, N] each."""
        return self.response[:, : self.N], self.entropy[:, : self.N]

    def trajectory(self, rows):
        """The Trajectory of some rows, a list."""
        logs = (self.response, self.decoded_at, self.entropy, self.confidence)
        response, step, entropy, confidence = (x[on_device(tuple(rows), x.device), : self.N] for x in logs)
        step = step.masked_fill(response == self.mask_id, self.settings.max_steps)
        return Trajectory(response, step, decode_order(step, entropy), entropy, confidence)


def numbered(masked, K):
    """Number the masked positions [R, W] of each row from left to right, at most K of them.

    -> the position of each number, [R, K], a row's first one again where it has fewer than K; and the
    number of each position, [R, W], which means nothing where it is not masked."""
    number = (masked.cumsum(1) - 1).clamp(min=0)
    place = masked.int().argsort(dim=1, descending=True, stable=True)[:, :K]
    return torch.where(masked.gather(1, place), place, place[:, :1]), number


def check_output(x, R, K):
    """Raises ValueError for what a model returned in place of a number or vector for each of K positions of R rows."""
    shape = list(getattr(x, "shape", ()))
    if len(shape) != 3 or shape[:2] != [R, K]:
        raise ValueError(f"the model returned {type(x).__name__} {shape} for positions [{R}, {K}], not [{R}, {K}, V]")


def pieces(x, head, V, column):
    """Logits [n, V] and a column [R, K] of the same places, [n], as many at a time as memory allows.

    x [R, K, D], of which head makes logits; or logits [R, K, V], with head None."""
    rows = max(1, HELD // (x.shape[1] * V))
    for part, values in zip(x.split(rows), column.split(rows)):
        logits = part if head is None else head(part)  # [r, K, V]
        n = max(1, CACHED // V) if x.device.type == "cpu" else values.numel()
        yield from zip(logits.flatten(0, 1).split(n), values.flatten().split(n))


def copies(x, head, V, n):
    """Slices of n places of x [R, K, D or V]: as many as to copy at once. head: see pieces()."""
    size = n if head else max(1, (CACHED if x.device.type == "cpu" else HELD) // V)
    return [slice(first, first + size) for first in range(0, n, size or 1)]


def describe(x, head, V, r, k, token):
    """Entropy in nats, and probability of the token [Q], at r, k [Q] of x: two [Q]. x, head: see pieces()."""
    found = []
    for part in copies(x, head, V, len(r)):
        for logits, chosen in pieces(x[r[part], k[part], None], head, V, token[part, None]):
            logp = logits.float().log_softmax(-1).clamp_(min=torch.finfo(torch.float32).min)  # -inf times 0 is NaN
            found.append((-(logp.exp() * logp).sum(-1), logp.gather(-1, chosen[:, None])[:, 0].exp()))
    return map(torch.cat, zip(*found))


# ---------------------------------------------------------------------------------------- choosing


def choose(x, head, V, noise, s, n=64):
    """A token and a score for each place of x [R, K, D or V], by noise [R, K]: two [R, K]. head: see pieces().

    Where the best n tokens are not all that top_p leaves, those places are looked at again. The host waits to learn
    whether there are any: once, if there are none."""
    found = [choose_among(logits, u, s, n) for logits, u in pieces(x, head, V, noise)]
    token, score, short = (torch.cat(each).view(noise.shape) for each in zip(*found))
    r, k = short.nonzero(as_tuple=True) if s.narrows else ((), ())
    for part in copies(x, head, V, len(r)):
        at = r[part], k[part]
        again = choose(x[at][:, None], head, V, noise[at][:, None], s, 32 * n)
        token[at], score[at] = (each[:, 0] for each in again)
    return token, score


def choose_among(logits, noise, s, n):
    """choose() for logits [K, V] and noise [K], and where n tokens were too few: three [K]."""
    logits, short = without(logits, s.suppress), torch.zeros_like(noise, dtype=torch.bool)
    if s.draws:
        p, ids = filtered(logits, s, n, short)  # [K, n]
        token = draw(p, ids, noise)
    else:
        token = argmax(logits)
    if s.score in ("random", "left"):
        return token, noise, short  # the distribution does not matter

    # "dream" scores the distribution that tokens are drawn from, "llada" the model's raw one.
    if s.scores_untempered or s.score == "largest":
        p, ids = without(logits, s.decode_last).softmax(-1), None  # in the model's dtype, as officially
    elif s.decode_last is not None or not s.draws:
        p, ids = filtered(without(logits, s.decode_last), s, n, short)
    score = rate(s.score, p, ids, token)
    if s.decode_last is not None:
        # Of the entropy, 0 would be the best.
        worst = torch.finfo(score.dtype).min if s.score == "entropy" else 0.0
        score = score.masked_fill(member(token, s.decode_last), worst)
    return token, score, short


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


def filtered(logits, s, n=None, short=None):
    """What temperature, top_p and top_k leave of logits [K, V]: p and ids [K, n]; ids None = all. See nucleus()."""
    temperature = s.temperature or 1.0  # 0 is for the token only
    if s.narrows:
        return nucleus(logits, temperature, s, n, short)
    if s.scores_untempered:
        logits = logits.float()  # Dream draws in the model's dtype, LLaDA in a wider one
    return (logits / temperature).softmax(-1), None


def nucleus(logits, temperature, s, n=None, short=None):
    """The tokens that top_p and top_k leave of softmax(logits / temperature), best first.

    -> probabilities (0 where removed) and ids, [K, n] each. top_p removes what lies beyond the best
    tokens whose sum exceeds it; the token that crosses it stays, and so does what equals the top_k-th.
    The vocabulary is not sorted: only the best n (None = all) are looked at, and short [K] is set where
    more may be left."""
    whole, V = logits.float(), logits.shape[-1]
    least = best_of(whole, min(s.top_k, V))[0][:, -1:] if s.top_k else -torch.inf
    if s.top_p_after_top_k:
        whole = whole.masked_fill(whole < least, -torch.inf)
    best, ids = best_of(whole, min(n or V, V))  # [K, n]
    p = ((best - best[:, :1]) / temperature).exp()
    total = p.sum(-1, keepdim=True)
    # Where so many as the last of these would not change a float32, nor do the others. A GPU would have to be asked.
    if logits.device.type != "cpu" or (p[:, -1:] * V > total * 2**-24).any():
        # Less than exp(-80) adds nothing, and numbers that underflow are slow on CPUs.
        total = (whole - best[:, :1]).div_(temperature).clamp_(min=-80).exp_().sum(-1, keepdim=True)
    p /= total
    keep = p.cumsum(-1) - p <= (s.top_p or 1)  # the sum before the token
    keep[:, 0] = True
    keep &= best >= least
    if ids.shape[-1] < V:
        short |= keep[:, -1]
    p = p.masked_fill(~keep, 0.0)
    return p / p.sum(-1, keepdim=True), ids


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
        raise ValueError(f"suppress or decode_last holds {max(ids)}; the model has {logits.shape[-1]} tokens")
    return logits.index_fill(-1, on_device(ids, logits.device), torch.finfo(logits.dtype).min)


def member(tokens, ids):
    """Which of the tokens are among the ids: bool, in the shape of tokens."""
    return torch.isin(tokens, on_device(ids, tokens.device))


# A tuple of ids, or of rows, as a tensor. It is kept: a GPU waits for each copy to it.
on_device = functools.lru_cache(lambda ids, device: torch.tensor(ids, dtype=torch.long, device=device))


# ---------------------------------------------------------------------------------------- the rest


def decode_order(step, entropy):
    """The decode rank of every position, by (step, entropy, position): int64 [B, N], from 0."""
    by_entropy = entropy.nan_to_num(torch.inf).argsort(dim=1, stable=True)
    by_both = by_entropy.gather(1, step.gather(1, by_entropy).argsort(dim=1, stable=True))
    return by_both.argsort(dim=1)


def check_inputs(prompt_ids, prompt_mask, generator):
    """The generators, one for each row, and the number of tokens of each prompt.

    Raises ValueError for another number of them, and for a mask that is not one of left padding."""
    B, generators = len(prompt_ids), generator
    if not isinstance(generator, (list, tuple)):
        generators = [generator] * B
    if len(generators) != B:
        raise ValueError(f"{len(generators)} generators for {B} prompts: give one, or one for each")
    lengths = [prompt_ids.shape[1]] * B
    if prompt_mask is not None:
        if prompt_mask.shape != prompt_ids.shape:
            raise ValueError(f"prompt_mask is {[*prompt_mask.shape]}, prompt_ids is {[*prompt_ids.shape]}")
        if (prompt_mask.int().diff(dim=1) < 0).any():
            raise ValueError("prompts must be padded on the left: prompt_mask has a 0 after a 1")
        lengths = prompt_mask.bool().sum(1).tolist()
    return generators, lengths
