"""Decoders of masked diffusion language models, with a log of when and how surely each token was decoded.

    t = decode.generate(m, prompt_ids, prompt_mask, max_new_tokens=256, steps=256)                       # Dream
    t = decode.generate(m, prompt_ids, prompt_mask, max_new_tokens=256, steps=256, strategy="confidence",
                        schedule="llada", block_length=32)                                              # LLaDA
    t.response, t.step, t.order, t.entropy, t.confidence                                                # each [B, N]

The response starts as N mask tokens. Each step runs the model once, gives every masked position a token and a score,
and keeps the tokens of the best scores (Eq. 2 of the TABOM paper, with the entropy as score).

Sources: DreamLM/Dream generation_utils.py (`_sample`, `sample_tokens`), ML-GSAI/LLaDA generate.py, Fast-dLLM
(arXiv 2505.22618) for the threshold. Reproduced token for token and step for step at temperature 0. `m` is any callable
m(ids [B, L], attention_mask=None, positions=None) -> logits [B, L or P, V] where logits[:, i] predicts token i.

Dimensions: B batch, P prompt, N response, K candidates of a step, V vocabulary.
"""

from typing import NamedTuple

import torch

STRATEGIES = ("entropy", "confidence", "margin", "random")
SCHEDULES = ("dream", "llada")
CACHES = ("prefix", "dual")


class Trajectory(NamedTuple):
    """What was decoded, and how. Every field is a tensor [B, N]."""

    response: torch.Tensor  # token ids
    step: torch.Tensor  # the step that decoded the token, from 0; where none did, `steps`, or N with a threshold
    order: torch.Tensor  # rank in the decode order, 0 = first; ties inside a step broken by entropy, then position
    entropy: torch.Tensor  # nats, of the model's whole distribution at temperature 1, at that step
    confidence: torch.Tensor  # probability that the same distribution gave to the token


@torch.no_grad()
def generate(
    m,
    prompt_ids,
    prompt_mask=None,
    *,
    mask_id=None,
    max_new_tokens,
    steps,
    strategy="entropy",
    schedule="dream",
    block_length=None,
    temperature=0.0,
    top_p=None,
    top_k=None,
    threshold=None,
    approximate_cache=None,
    generator=None,
    suppress=None,
    on_step=None,
):
    """Decode a response of N = max_new_tokens to every prompt -> Trajectory.

    prompt_ids [B, P], left-padded where prompt_mask [B, P] is 0.
    strategy: what makes a token one of the next to be decoded: low entropy, a high probability of the token, a large
        margin between the two most probable tokens, or chance.
    schedule: "dream" unmasks int(n (1 - s/t)) of the n masked tokens, t and s neighbours in linspace(1, 1e-3,
        steps + 1), and all at the last step; its scores see temperature, top_p and top_k. "llada" unmasks N // steps
        a step, one more in the first N % steps; its scores are untempered.
    block_length: decode blocks of this many tokens from left to right, steps / blocks steps each; None = one block.
    temperature, top_p, top_k: how the token itself is chosen; 0 = the most probable one.
    threshold: instead of the schedule, every token more probable than this, and at least one, each step ("dynamic").
    approximate_cache: with blocks, reuse keys and values that the first step of a block computed: "prefix" those of
        everything before the block, "dual" also those of everything after it. Faster, and not the same result: the
        model no longer sees there what the block has become. Needs a model that takes cache and span, as model.py's.
    generator: a torch.Generator, or a list of one for each row, which makes each row independent of its batch.
    suppress: token ids that are never chosen, such as ids that the tokenizer does not have. Without it the official
        behaviour holds for the mask token too: a position that is given the mask token stays masked.
    on_step: called after each step as on_step(step, response [B, N], entropy [B, N]).

    Raises ValueError for settings that do not fit together.
    """
    B, P = prompt_ids.shape
    N, L = max_new_tokens, max_new_tokens if block_length is None else block_length
    mask_id = m.config.mask_id if mask_id is None else mask_id
    check(N, steps, block_length, strategy, schedule, temperature, top_p, top_k, threshold, approximate_cache)
    if prompt_mask is not None:
        check_padding(prompt_ids, prompt_mask)
    if suppress is not None:
        suppress = torch.as_tensor(suppress, dtype=torch.int64, device=prompt_ids.device)
    generators = generator if isinstance(generator, (list, tuple)) else [generator] * B
    if len(generators) != B:
        raise ValueError(f"{len(generators)} generators for {B} prompts: give one, or one for each")

    device = prompt_ids.device
    ids = torch.cat((prompt_ids, prompt_ids.new_full((B, N), mask_id)), dim=1)  # [B, P + N]
    response = ids[:, P:]  # a view: decoding writes into ids
    attention_mask = None
    if prompt_mask is not None and not prompt_mask.bool().all():
        attention_mask = torch.cat((prompt_mask, prompt_mask.new_ones(B, N)), dim=1)
    never = steps if threshold is None else N  # dynamic decoding takes N steps at most
    decoded_at = torch.full((B, N), never, device=device)
    entropy = torch.full((B, N), float("nan"), device=device)
    confidence = entropy.clone()

    steps_per_block = L if threshold is not None else steps // (N // L)
    step = [0] * B
    for end in range(L, N + 1, L):  # one block after the other; an earlier block's leftovers stay candidates
        cached = None  # the rows that the cache holds
        for i in range(steps_per_block):
            masked = response == mask_id
            masked[:, end:] = False
            if approximate_cache is not None:
                masked[:, : end - L] = False
            count = masked.sum(1).tolist()  # [B]: what the host must know of each step
            rows = [b for b, n in enumerate(count) if n]
            quota = step_quota(schedule, i, steps_per_block, count, L) if threshold is None else count
            if not rows:
                step = [s + (steps_per_block - i if threshold is None else 0) for s in step]
                break
            if not any(quota):
                step = [s + 1 for s in step]
                continue

            # 1. the logits of the candidates: in rows that have any, the masked positions from left to right
            every = len(rows) == B
            row, n = torch.tensor(rows, device=device), [count[b] for b in rows]  # [R]
            index = masked[row].int().argsort(dim=1, descending=True, stable=True)[:, : max(n)]  # [R, K]
            filler = torch.arange(max(n), device=device) >= torch.tensor(n, device=device)[:, None]
            asked = P + torch.where(filler, index[:, :1], index)  # rows with fewer candidates ask for one again
            mask = attention_mask if every or attention_mask is None else attention_mask[row]
            more = {}
            if approximate_cache is not None:
                if cached is None:  # the first step of a block computes everything, later ones only a span
                    cache, span = m.new_cache(), None
                else:
                    if cached != rows:
                        cache.keep([cached.index(b) for b in rows])
                    span = (P + end - L, P + (end if approximate_cache == "dual" else N))
                cached, more = rows, dict(cache=cache, span=span)
            logits = m(ids if every else ids[row], attention_mask=mask, positions=asked, **more)  # [R, K, V]

            # 2. a token and a score for each, and the best of them
            own = [generators[b] for b in rows]
            token, probability, score = choose(logits, n, strategy, schedule, temperature, top_p, top_k, own, suppress)
            best, taken = pick(score, probability, n, [quota[b] for b in rows], threshold)  # [R, Q]

            # 3. write them down, with what the whole untempered distribution said
            at = (row[:, None], index.gather(1, best))
            token = token.gather(1, best)
            logp = logits.gather(1, best[..., None].expand(-1, -1, logits.shape[-1])).float().log_softmax(-1)
            logp.clamp_(min=torch.finfo(logp.dtype).min)  # -inf times p = 0 is no number
            now = torch.tensor([step[b] for b in rows], device=device)[:, None]
            response[at] = torch.where(taken, token, response[at])
            decoded_at[at] = torch.where(taken, now, decoded_at[at])
            entropy[at] = torch.where(taken, -(logp.exp() * logp).sum(-1), entropy[at])
            confidence[at] = torch.where(taken, logp.gather(-1, token[..., None])[..., 0].exp(), confidence[at])
            if on_step is not None:
                on_step(max(step), response, entropy)
            step = [s + (1 if threshold is None or count[b] else 0) for b, s in enumerate(step)]
    decoded_at[response == mask_id] = never
    return Trajectory(response.clone(), decoded_at, decode_order(decoded_at, entropy), entropy, confidence)


def step_quota(schedule, i, steps, count, block):
    """Tokens that step i of `steps` unmasks in each row, a list; count are masked now, `block` were at the start."""
    if schedule == "llada":
        return [block // steps + (i < block % steps)] * len(count)
    if i == steps - 1:
        return count
    t, s = torch.linspace(1, 1e-3, steps + 1)[i : i + 2]  # float32, as the official code; int() cuts off its rounding
    return (torch.tensor(count, dtype=torch.float32) * (1 - s / t)).long().tolist()


def pick(score, probability, count, quota, threshold):
    """Which of the K candidates of each row are unmasked: places [R, Q] among them, best first, and which of these are
    no filler, bool [R, Q].

    score, probability [R, K]; the first count[r] of a row are real. quota: how many in each row; or, with a threshold,
    all that are more probable, and at least the best one."""
    n = torch.tensor(count, device=score.device)[:, None]  # [R, 1]
    place = torch.arange(score.shape[1], device=score.device)
    best = score.masked_fill(place >= n, -torch.inf).sort(dim=1, descending=True, stable=True).indices  # leftmost first
    if threshold is None:
        Q, taken = max(quota), place < torch.tensor(quota, device=score.device)[:, None]
        taken &= best < n
    else:
        taken = (probability.gather(1, best) > threshold) | (place == 0)
        taken &= best < n
        taken, first = taken.sort(dim=1, descending=True, stable=True)
        best, Q = best.gather(1, first), int(taken.sum(1).max())
    return best[:, :Q], taken[:, :Q]


SLAB = 2**23  # logits that are looked at together, which bounds the memory for temporary copies of them


def choose(logits, count, strategy, schedule, temperature, top_p, top_k, generators, suppress):
    """A token, its probability and its score (higher = decoded sooner) for each of K positions in R rows: three tensors
    [R, K].

    logits [R, K, V], of which the first count[r] positions of a row are real. generators: one for each row."""
    R, K, V = logits.shape
    few = (
        top_p is not None and top_p < 1
    ) or top_k is not None  # tokens to draw from: those that top_p and top_k leave
    draw = uniform(R, K, count, generators, logits.device) if few and temperature > 0 else None
    chance = uniform(R, K, count, generators, logits.device) if strategy == "random" else None
    flat, found = logits.flatten(0, 1), []
    slab = K if temperature > 0 and not few else max(1, SLAB // V)  # a row's noise over the vocabulary is its own
    for a in range(0, R * K, slab):
        part, r = slice(a, a + slab), a // K
        x = flat[part]
        if suppress is not None:
            x = x.index_fill(-1, suppress, torch.finfo(x.dtype).min)
        if few:
            p, index = nucleus(x, temperature or 1.0, top_p, top_k)
        else:
            tempered = x if temperature == 0 else (x if schedule == "dream" else wide(x)) / temperature
            p, index = tempered.softmax(-1), None  # in the model's dtype, as the official code
        if temperature == 0:
            token = at = x.argmax(-1)
            at = at if index is None else torch.zeros_like(at)
        elif index is None:
            token = at = gumbel_max(tempered, count[r], generators[r])
        else:  # invert the cumulated probabilities of the few tokens left
            u = draw[part, None] * p.sum(-1, keepdim=True)
            at = (p.cumsum(-1) <= u).sum(-1).clamp(max=p.shape[-1] - 1)
            token = index.gather(-1, at[:, None])[:, 0]
        if schedule == "llada" and (temperature > 0 or index is not None):  # the model's own distribution is scored
            p, at = x.softmax(-1), token
        probability = p.gather(-1, at[:, None])[:, 0]
        found.append((token, probability, chance[part] if strategy == "random" else rate(strategy, p, probability)))
    return tuple(torch.cat(x).view(R, K) for x in zip(*found))


def rate(strategy, p, probability):
    """The score of K positions with the distributions p [K, V] and the probabilities [K] of their tokens: [K]."""
    if strategy == "entropy":
        return (p * torch.log(p + 1e-10)).sum(-1)  # minus the entropy; the constant is Dream's
    if strategy == "confidence":
        return probability
    best = p.topk(min(2, p.shape[-1]), dim=-1).values
    return best[:, 0] - (best[:, 1] if best.shape[-1] > 1 else 0)


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
        best, index = logits.topk(n, dim=-1)  # [K, n]
        p = ((best - most) / temperature).exp() / total
        keep = p.cumsum(-1) - p <= (1 if top_p is None else top_p)  # the sum before the token
        keep[:, 0] = True
        if n == limit or not keep[:, -1].any():
            p = p.masked_fill(~keep, 0.0)
            return p / p.sum(-1, keepdim=True), index
        n = min(32 * n, limit)


def gumbel_max(logits, count, generator):
    """A sample of softmax(logits) at each of K positions: the argmax of logits - log(exponential noise). int64 [K].

    In float64, as LLaDA's, in one buffer of [count, V]; the positions from count on are filler."""
    device = logits.device if generator is None else generator.device
    noise = wide(torch.empty(0, device=device)).new_empty((count, logits.shape[-1])).exponential_(generator=generator)
    noise = noise.clamp_(min=torch.finfo(noise.dtype).tiny).log_().neg_().to(logits.device)
    token = noise.add_(logits[:count]).argmax(-1)
    return torch.cat((token, token.new_zeros(len(logits) - count)))


def wide(x):
    """In float64, or float32 on Apple's GPUs, which have nothing wider."""
    return x.float() if x.device.type == "mps" else x.double()


def uniform(R, K, count, generators, device):
    """Uniform noise in [0, 1) for K positions of R rows, [R * K]; the first count[r] of a row are generators[r]'s."""
    noise = torch.zeros(R, K, device=device)
    for row, n, g in zip(noise, count, generators):
        row[:n] = torch.rand(n, generator=g, device=device if g is None else g.device)
    return noise.flatten()


def decode_order(step, entropy):
    """Rank of every position by (step, entropy, position): int64 [B, N], 0 = decoded first."""
    by_entropy = entropy.nan_to_num(torch.inf).argsort(dim=1, stable=True)
    by_both = by_entropy.gather(1, step.gather(1, by_entropy).argsort(dim=1, stable=True))
    return by_both.argsort(dim=1)


def check(
    max_new_tokens,
    steps,
    block_length=None,
    strategy="entropy",
    schedule="dream",
    temperature=0.0,
    top_p=None,
    top_k=None,
    threshold=None,
    approximate_cache=None,
):
    """Raises ValueError for settings of generate() that do not fit together."""
    N, L = max_new_tokens, max_new_tokens if block_length is None else block_length
    if N < 1 or steps < 1 or L < 1:
        raise ValueError(f"max_new_tokens {N}, steps {steps} and block_length {L} must be at least 1")
    if N % L:
        raise ValueError(f"block_length {L} does not divide max_new_tokens {N}; nearest below: {divisor_below(N, L)}")
    if threshold is None and steps % (N // L):
        raise ValueError(f"steps {steps} do not divide by the {N // L} blocks of {L} tokens; give a multiple")
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy {strategy!r} is none of {', '.join(STRATEGIES)}")
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule {schedule!r} is none of {', '.join(SCHEDULES)}")
    if (
        not 0 <= temperature < float("inf")
        or (top_p is not None and not 0 < top_p <= 1)
        or (top_k is not None and top_k < 1)
    ):
        raise ValueError(f"temperature {temperature} must be >= 0, top_p {top_p} in (0, 1], top_k {top_k} >= 1")
    if approximate_cache not in (None, *CACHES):
        raise ValueError(f"approximate_cache {approximate_cache!r} is none of {', '.join(CACHES)}")
    if threshold is not None and not 0 <= threshold <= 1:
        raise ValueError(f"threshold {threshold} must be a probability between 0 and 1")


def check_padding(prompt_ids, prompt_mask):
    """Raises ValueError for a mask of another shape, or one that pads on the right."""
    if prompt_mask.shape != prompt_ids.shape:
        raise ValueError(f"prompt_mask is {[*prompt_mask.shape]}, prompt_ids is {[*prompt_ids.shape]}")
    if (prompt_mask.int().diff(dim=1) < 0).any():
        raise ValueError("prompts must be padded on the left: prompt_mask has a 0 after a 1")


def divisor_below(n, k):
    return next(d for d in range(min(n, k), 0, -1) if n % d == 0)
