"""Greedy decoders of masked diffusion language models, with a log of when and how surely each token was decoded.

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


class Trajectory(NamedTuple):
    """What was decoded, and how. Every field is a tensor [B, N]."""

    response: torch.Tensor  # token ids
    step: torch.Tensor  # the step that decoded the token, from 0; `steps` where none did
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
    generator: a torch.Generator, or a list of one for each row, which makes each row independent of its batch.
    suppress: token ids that are never chosen, such as ids that the tokenizer does not have. Without it the official
        behaviour holds for the mask token too: a position that is given the mask token stays masked.
    on_step: called after each step as on_step(step, response [B, N], entropy [B, N]).

    Raises ValueError for settings that do not fit together.
    """
    B, P = prompt_ids.shape
    N, L = max_new_tokens, max_new_tokens if block_length is None else block_length
    mask_id = m.config.mask_id if mask_id is None else mask_id
    check(N, steps, block_length, strategy, schedule, temperature, top_p, top_k, threshold)
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
    step = torch.zeros(B, dtype=torch.long, device=device)
    for end in range(L, N + 1, L):  # one block after the other; an earlier block's leftovers stay candidates
        for i in range(steps_per_block):
            masked = response == mask_id
            masked[:, end:] = False
            count = masked.sum(1)  # [B]
            K = int(count.max())
            if K == 0:
                step += 0 if threshold is not None else steps_per_block - i
                break
            quota = step_quota(schedule, i, steps_per_block, count, L)
            if threshold is None and not quota.any():
                step += 1
                continue
            index = masked.int().argsort(dim=1, descending=True, stable=True)[:, :K]  # [B, K], left to right
            logits = m(ids, attention_mask=attention_mask, positions=P + index)  # [B, K, V]
            token = index.new_full((B, K), mask_id)
            probability = torch.zeros(B, K, device=device)
            score = torch.full((B, K), -torch.inf, device=device)  # rows with fewer candidates end in filler
            for b, n in enumerate(count.tolist()):
                token[b, :n], probability[b, :n], score[b, :n] = choose(
                    logits[b, :n], strategy, schedule, temperature, top_p, top_k, generators[b], suppress
                )
            is_candidate = torch.arange(K, device=device) < count[:, None]
            place = score.sort(dim=1, descending=True, stable=True).indices.argsort(dim=1)  # ties: the leftmost first
            if threshold is None:
                chosen = (place < quota[:, None]) & is_candidate
            else:
                chosen = ((probability > threshold) | (place == 0)) & is_candidate

            row, k = chosen.nonzero(as_tuple=True)
            at = (row, index[row, k])
            response[at] = token[row, k]
            decoded_at[at] = step[row]
            logp = logits[row, k].float().log_softmax(-1)  # untempered, over the whole vocabulary
            entropy[at] = -(logp.exp() * logp).sum(-1)
            confidence[at] = logp.gather(-1, token[row, k, None])[:, 0].exp()
            if on_step is not None:
                on_step(int(step.max()), response, entropy)
            step += 1 if threshold is None else (count > 0).long()
    decoded_at[response == mask_id] = never
    return Trajectory(response.clone(), decoded_at, decode_order(decoded_at, entropy), entropy, confidence)


def step_quota(schedule, i, steps, count, block):
    """Tokens that step i of `steps` unmasks in each row, [B]; count [B] are masked now, `block` were at the start."""
    if schedule == "llada":
        return torch.full_like(count, block // steps + (i < block % steps))
    if i == steps - 1:
        return count
    t, s = torch.linspace(1, 1e-3, steps + 1)[i : i + 2]  # float32, as the official code; int() cuts off its rounding
    return (count.float() * (1 - s / t).to(count.device)).long()


def choose(logits, strategy, schedule, temperature, top_p, top_k, generator, suppress):
    """A token, its probability and its score (higher = decoded sooner) for each of K positions: three tensors [K].

    logits [K, V]. "dream" scores the distribution that tokens are drawn from, "llada" the model's own."""
    if suppress is not None:
        logits = logits.index_fill(-1, suppress, torch.finfo(logits.dtype).min)
    tempered = logits if temperature == 0 else (logits if schedule == "dream" else wide(logits)) / temperature
    if (top_p is not None and top_p < 1) or top_k is not None:
        p, index = nucleus(tempered, top_p, top_k)
    else:
        p, index = tempered.softmax(-1), None  # in the model's dtype, as the official code

    if temperature == 0:
        token = at = logits.argmax(-1)
        at = at if index is None else torch.zeros_like(at)
    elif index is None:  # Gumbel-max: the argmax of log p - log(Exponential noise) is a sample of p
        at = token = (wide(tempered) - exponential(tempered, generator).log()).argmax(-1)
    else:  # invert the cumulated probabilities of the few tokens left
        u = uniform(p, generator)[:, None]  # [K, 1]
        at = (p.cumsum(-1) <= u * p.sum(-1, keepdim=True)).sum(-1).clamp(max=p.shape[-1] - 1)
        token = index.gather(-1, at[:, None])[:, 0]

    if schedule == "llada" and (temperature > 0 or index is not None):
        p, at = logits.softmax(-1), token
    probability = p.gather(-1, at[:, None])[:, 0]
    if strategy == "entropy":
        score = (p * torch.log(p + 1e-10)).sum(-1)  # minus the entropy; the constant is Dream's
    elif strategy == "confidence":
        score = probability
    elif strategy == "margin":
        best = p.topk(min(2, p.shape[-1]), dim=-1).values
        score = best[:, 0] - (best[:, 1] if best.shape[-1] > 1 else 0)
    else:
        score = uniform(p, generator)
    return token, probability, score


def nucleus(logits, top_p, top_k):
    """The tokens that top_p and top_k leave, best first: probabilities (0 where removed) and ids, two [K, n].

    top_p removes what lies beyond the best tokens whose sum exceeds it; the token that crosses it stays. The vocabulary
    is not sorted: the best 64 are enough as a rule, and more are taken until every row has crossed."""
    logits, V = logits.float(), logits.shape[-1]
    limit = V if top_k is None else min(top_k, V)
    total = logits.logsumexp(-1, keepdim=True)
    n = min(64, limit)
    while True:
        best, index = logits.topk(n, dim=-1)  # [K, n]
        p = (best - total).exp()
        keep = p.cumsum(-1) - p <= (1 if top_p is None else top_p)  # the sum before the token
        keep[:, 0] = True
        if n == limit or not keep[:, -1].any():
            return best.masked_fill(~keep, -torch.inf).softmax(-1), index
        n = min(32 * n, limit)


def wide(x):
    """In float64, or float32 on Apple's GPUs, which have nothing wider."""
    return x.float() if x.device.type == "mps" else x.double()


def exponential(like, generator):
    """Exponential noise in float64, in the shape and on the device of like; above 0, so that it has a logarithm."""
    device = like.device if generator is None else generator.device
    noise = torch.empty(like.shape, dtype=wide(torch.empty(0, device=device)).dtype, device=device)
    noise = noise.exponential_(generator=generator)
    return noise.clamp_(min=torch.finfo(noise.dtype).tiny).to(like.device)


def uniform(like, generator):
    """Uniform noise in [0, 1), one number for each row of like [K, ...]."""
    device = like.device if generator is None else generator.device
    return torch.rand(len(like), generator=generator, device=device).to(like.device)


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
