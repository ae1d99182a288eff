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
    N, L = max_new_tokens, block_length or max_new_tokens
    mask_id = m.config.mask_id if mask_id is None else mask_id
    check(N, steps, L, strategy, schedule, temperature, top_p, top_k, threshold, prompt_ids, prompt_mask)
    generators = generator if isinstance(generator, (list, tuple)) else [generator] * B

    device = prompt_ids.device
    ids = torch.cat((prompt_ids, prompt_ids.new_full((B, N), mask_id)), dim=1)  # [B, P + N]
    response = ids[:, P:]  # a view: decoding writes into ids
    attention_mask = None
    if prompt_mask is not None and not prompt_mask.bool().all():
        attention_mask = torch.cat((prompt_mask, prompt_mask.new_ones(B, N)), dim=1)
    decoded_at = torch.full((B, N), steps, device=device)
    entropy = torch.full((B, N), float("nan"), device=device)
    confidence = entropy.clone()

    steps_per_block = L if threshold is not None else steps // (N // L)
    step = 0
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
            is_candidate = torch.arange(K, device=device) < count[:, None]  # rows with fewer end in filler
            logits = m(ids, attention_mask=attention_mask, positions=P + index)  # [B, K, V]
            token, probability, score = choose(
                logits, count, strategy, schedule, temperature, top_p, top_k, generators, suppress
            )
            score = score.masked_fill(~is_candidate, -torch.inf)
            place = score.sort(dim=1, descending=True, stable=True).indices.argsort(dim=1)  # ties: the leftmost first
            if threshold is None:
                chosen = (place < quota[:, None]) & is_candidate
            else:
                chosen = ((probability > threshold) | (place == 0)) & is_candidate

            row, k = chosen.nonzero(as_tuple=True)
            at = (row, index[row, k])
            response[at] = token[row, k]
            decoded_at[at] = step
            logp = logits[row, k].float().log_softmax(-1)  # untempered, over the whole vocabulary
            entropy[at] = -(logp.exp() * logp).sum(-1)
            confidence[at] = logp.gather(-1, token[row, k, None])[:, 0].exp()
            if on_step is not None:
                on_step(step, response, entropy)
            step += 1
    return Trajectory(response.clone(), decoded_at, decode_order(decoded_at, entropy), entropy, confidence)


def step_quota(schedule, i, steps, count, block):
    """Tokens that step i of `steps` unmasks in each row, [B]; count [B] are masked now, `block` were at the start."""
    if schedule == "llada":
        return torch.full_like(count, block // steps + (i < block % steps))
    if i == steps - 1:
        return count
    t, s = torch.linspace(1, 1e-3, steps + 1)[i : i + 2]  # float32, as the official code; int() cuts off its rounding
    return (count.float() * (1 - s / t).to(count.device)).long()


def choose(logits, count, strategy, schedule, temperature, top_p, top_k, generators, suppress):
    """A token, its probability and its score (higher = decoded sooner) for every candidate: three tensors [B, K].

    logits [B, K, V], of which the first count [B] are real.
    Arithmetic stays in the logits' dtype, as in the official code."""
    if suppress is not None:
        logits = logits.index_fill(-1, torch.as_tensor(suppress, device=logits.device), torch.finfo(logits.dtype).min)
    tempered = logits if schedule == "dream" or temperature == 0 else logits.double()
    if temperature > 0:
        tempered = tempered / temperature
    if top_p is not None and top_p < 1:
        tempered = keep_top_p(tempered, top_p)
    if top_k is not None:
        tempered = keep_top_k(tempered, top_k)
    if temperature > 0:  # Gumbel-max: the argmax of log p - log(Exponential noise) is a sample of p, in float64
        token = (tempered.double() - exponential(tempered, count, generators).log()).argmax(-1)
    else:
        token = tempered.argmax(-1)

    p = (tempered if schedule == "dream" else logits).softmax(-1)
    probability = p.gather(-1, token[..., None])[..., 0]
    if strategy == "entropy":
        score = (p * torch.log(p + 1e-10)).sum(-1)  # minus the entropy; the constant is Dream's
    elif strategy == "confidence":
        score = probability
    elif strategy == "margin":
        first, second = p.topk(2, dim=-1).values.unbind(-1)
        score = first - second
    else:
        score = uniform(probability, count, generators)
    return token, probability, score


def keep_top_p(logits, top_p):
    """Remove what lies beyond the most probable tokens whose sum exceeds top_p; the token that crosses it stays."""
    ranked, index = logits.sort(dim=-1, descending=True)
    beyond = ranked.softmax(-1).cumsum(-1) > top_p
    beyond = torch.cat((torch.zeros_like(beyond[..., :1]), beyond[..., :-1]), dim=-1)
    beyond = torch.zeros_like(beyond).scatter(-1, index, beyond)
    return logits.masked_fill(beyond, torch.finfo(logits.dtype).min)


def keep_top_k(logits, top_k):
    least = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[..., -1:]
    return logits.masked_fill(logits < least, torch.finfo(logits.dtype).min)


def exponential(like, count, generators):
    """Exponential noise, float64, in the shape of like [B, K, V]; row b draws from its generator for its candidates."""
    noise = torch.ones(like.shape, dtype=torch.float64, device=like.device)
    for row, n, g in zip(noise, count.tolist(), generators):
        source = row.device if g is None else g.device
        draw = torch.empty(row[:n].shape, dtype=row.dtype, device=source).exponential_(generator=g)
        row[:n] = draw.clamp_(min=torch.finfo(row.dtype).tiny)  # log(0) would choose a removed token
    return noise


def uniform(like, count, generators):
    """Uniform noise in [0, 1) in the shape of like [B, K]; row b draws from its generator for its candidates."""
    noise = torch.zeros(like.shape, device=like.device)
    for row, n, g in zip(noise, count.tolist(), generators):
        row[:n] = torch.rand(n, generator=g, device=row.device if g is None else g.device)
    return noise


def decode_order(step, entropy):
    """Rank of every position by (step, entropy, position): int64 [B, N], 0 = decoded first."""
    by_entropy = entropy.nan_to_num(torch.inf).argsort(dim=1, stable=True)
    by_both = by_entropy.gather(1, step.gather(1, by_entropy).argsort(dim=1, stable=True))
    return by_both.argsort(dim=1)


def check(N, steps, L, strategy, schedule, temperature, top_p, top_k, threshold, prompt_ids, prompt_mask):
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
    if temperature < 0 or (top_p is not None and not 0 < top_p <= 1) or (top_k is not None and top_k < 1):
        raise ValueError(f"temperature {temperature} must be >= 0, top_p {top_p} in (0, 1], top_k {top_k} >= 1")
    if threshold is not None and not 0 <= threshold <= 1:
        raise ValueError(f"threshold {threshold} must be a probability between 0 and 1")
    if prompt_mask is not None:
        if prompt_mask.shape != prompt_ids.shape:
            raise ValueError(f"prompt_mask is {[*prompt_mask.shape]}, prompt_ids is {[*prompt_ids.shape]}")
        if (prompt_mask.int().diff(dim=1) < 0).any():
            raise ValueError("prompts must be padded on the left: prompt_mask has a 0 after a 1")


def divisor_below(n, k):
    return next(d for d in range(min(n, k), 0, -1) if n % d == 0)
