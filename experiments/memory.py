"""The most memory that decoding and training take at once on a GPU: arithmetic from a model's config.

    memory.decode_peak(config, batch=16, prompt=256, new=256)                         # bytes
    memory.train_peak(config, batch=4, prompt=256, new=256, window=32, objective="tabom")

Counted are the tensors that are alive together at the worst moment of a step: weights, gradients, optimizer, what
training keeps of activations, logits, and what an operation makes beside its input. Attention is a fused kernel's,
and keeps no [L, L] weights. Not counted are what a kernel takes inside (its workspace), the CUDA context, and what
the allocator reserves and cannot use: leave a few percent.
Source: decode.py, model.py, lora.py and objectives.py of this project; tests/test_cost.py holds this to measurements.

Dimensions: B batch, n tokens that a pass computes, K positions asked for of a row, V vocabulary, D width, M width of
the MLP, Q and KV widths of all query and of all key heads; s bytes of a number in the model's dtype.
"""

from typing import NamedTuple

import decode
import objectives
from runs import loading

BYTES = dict(float32=4, bfloat16=2)
FLOAT = 4  # bytes of what is float32 whatever the model's dtype
ON_GPU = 16  # times AT_ONCE, see objectives.NllAndEntropy.parts
OBJECTIVES = ("tabom", "nelbo", "transition", "traj", "t3d")


class Widths(NamedTuple):
    """Numbers of a token in each place of a block."""

    D: int
    M: int
    Q: int
    KV: int
    heads: int


def widths(c):
    """The Widths of a model.Config."""
    return Widths(c.width, c.mlp_width, c.heads * c.head_width, c.kv_heads * c.head_width, c.heads)


def count_weights(c):
    """Parameters of a model.Config: all of them."""
    D, M, Q, KV, _ = widths(c)
    block = 2 * D * Q + 2 * D * KV + 3 * D * M + 2 * D
    block += c.qkv_bias * (Q + 2 * KV) + c.qk_norm * 2 * c.head_width
    return c.layers * block + (2 - c.tied) * c.vocab_size * D + D


def count_adapter(c, rank):
    """Parameters of an adapter on q_proj and v_proj."""
    D, _, Q, KV, _ = widths(c)
    return c.layers * rank * (2 * D + Q + KV)


# ------------------------------------------------------------------------------------------------------------ decoding


def decode_peak(c, batch, prompt, new, dtype="bfloat16", block="auto", per_step=1, rank=0, suppress=True):
    """Bytes of decoding with the family's decoder, of the model.Config c.

    prompt, new: tokens of the longest prompt and of a response. block: the decoder's block length, None for one block;
    auto: the family's. per_step: tokens that a step decodes in a row. rank: of an adapter that is not merged. suppress:
    whether ids are suppressed, as the commands do. Where Dream's best 64 tokens are not all that top_p leaves, the
    logits of those positions are copied once more."""
    s, settings = BYTES[dtype], loading.DECODERS[c.family]
    if block == "auto":
        block = c.block_length or settings.get("block_length")
    K = min(block or new, new)
    weights = s * count_weights(c) + FLOAT * count_adapter(c, rank)
    logs = batch * (2 * 8 * (prompt + new) + (8 + 2 * FLOAT) * new)  # ids and mask; steps, entropy, confidence
    computed = prompt + new
    if c.block_length is not None:  # the first step of a row is its longest: the prompt and a block
        logs += c.layers * batch * (prompt + new) * 2 * s * widths(c).KV
        computed = prompt + K
    body = batch * computed * forward_bytes(c, s, rank)
    return weights + logs + max(body, choosing_bytes(c, settings, s, batch, K, per_step, suppress))


def forward_bytes(c, s, rank=0):
    """Bytes of a token inside a block, without gradients: the most of its three parts."""
    D, M, Q, KV, _ = widths(c)
    x = s * D  # the hidden states: each name below is a tensor of this size
    wide = FLOAT if c.rope_float32 else s
    rotating = (s + 3 * wide + (wide > s) * wide) * Q  # q, what is multiplied and added; q in another dtype
    adapting = (rank > 0) * (s * Q + 2 * FLOAT * Q + (s < FLOAT) * FLOAT * D)  # W x, s B A x, their sum; x in float32
    normalising = c.qk_norm * (s + 2 * FLOAT) * Q
    attention = 2 * x + 2 * s * KV + max(rotating, adapting, normalising)  # input, its norm; k, v; what makes q
    mlp = 4 * x + 3 * s * M  # input, attention, their sum, its norm; silu(gate), up, their product
    norm = 3 * x + 2 * FLOAT * D  # the first three; twice in float32
    return max(attention, mlp, norm)


def choosing_bytes(c, settings, s, batch, K, per_step, suppress):
    """Bytes of the output head and of choosing tokens at K positions of each row."""
    V = c.vocab_size
    held = batch * K * V <= decode.HELD  # the logits until the end of the step; else the head's input, and some logits
    together = batch * K if held else min(batch, max(1, decode.HELD // (K * V))) * K  # positions
    beside = (not held) * batch * K * c.width * s
    if settings.get("top_p") is not None:  # in float32; and minus their maximum
        copies = (s < FLOAT) * FLOAT + FLOAT
    elif decode.find_schedule(settings["schedule"]).scores_untempered:
        copies = s  # the probabilities
    else:
        copies = 2 * s  # logits / temperature, and the probabilities
    choosing = together * V * (s + suppress * s + copies)
    chosen = min(batch * per_step, batch * K)  # their logits, log p, p and the product
    logging = chosen * V * (s + 3 * FLOAT) + held * together * V * s
    return beside + max(choosing, logging)


# ------------------------------------------------------------------------------------------------------------ training


def train_peak(
    c, batch, prompt, new, window=32, objective="tabom", dtype="bfloat16", rank=16, checkpointing=False, padded=True
):  # fmt: skip
    """Bytes of an optimizer step of the model.Config c with `batch` examples in a forward pass.

    prompt, new: tokens of the longest prompt and response. window: of tabom, in tokens; the other objectives may ask
    for every token of a response. rank: of the adapter on q_proj and v_proj; 0 = all weights are trained, which are in
    this dtype then (train's are float32). padded: the rows of a batch have different lengths, as they do but by chance.
    The gradients of an earlier forward pass of the step are counted."""
    s, V = BYTES[dtype], c.vocab_size
    K = min(window, new) if objective == "tabom" else new
    n, weights = batch * tokens_of_pass(c, prompt, new), count_weights(c)
    # 1. what stays: weights, gradients and AdamW's two means; T3D's reference
    trained, size = (count_adapter(c, rank), FLOAT) if rank else (weights, s)
    stays = s * weights + (3 + (rank > 0) + (objective == "t3d")) * size * trained
    # 2. what the backward pass needs; with checkpointing the inputs of the blocks, and all of one block at a time
    inner, last, tail = kept_bytes(c, s, n, batch * K, rank, padded)
    again = 0
    if checkpointing:
        inner, last, again = n * s * c.width, n * s * c.width, inner
    blocks = (c.layers - 1) * inner
    # 3. the worst moment: at the logits, or in the block before the last, where nearly all is still kept
    logits = logits_bytes(objective, s, batch * K, V)
    if not rank:
        logits = max(logits, batch * K * V * s + s * V * c.width)  # their gradient and the head's
    at_logits = blocks + last + tail + logits
    at_block = blocks + again + n * s * (2 * c.width + 3 * c.mlp_width)  # gradients of x; of silu(gate), up, product
    return stays + max(at_logits, at_block)


def activations(c, batch, prompt, new, window, dtype="bfloat16", rank=16, checkpointing=False):
    """Bytes that the forward pass of a TABOM step keeps for the backward pass, its logits among them. checkpointing:
    the inputs of the blocks, and all of the one block that is computed again at a time."""
    s, asked = BYTES[dtype], batch * min(window, new)
    n = batch * tokens_of_pass(c, prompt, new)
    inner, last, tail = kept_bytes(c, s, n, asked, rank)
    tail += asked * c.vocab_size * s
    if checkpointing:
        return c.layers * n * s * c.width + tail + inner
    return (c.layers - 1) * inner + last + tail


def tokens_of_pass(c, prompt, new):
    """Tokens of a row of a training pass: block-causal attention has the response twice, see BlockTransformer."""
    if c.block_length is None:
        return prompt + new
    return 2 * (prompt + new) - max(0, prompt - c.block_length + 1)


def kept_bytes(c, s, n, asked, rank, padded=True):
    """Bytes that the backward pass needs of a block, of the last one, where only so many tokens are asked for, and of
    what follows, up to the logits."""
    D, M, Q, KV, heads = widths(c)
    full = not rank
    norm = FLOAT * D + FLOAT + full * s * D  # its input, the inverse of its length; for its weight its output
    if padded or c.block_length is not None:  # attention with a mask: a key head for each of the queries
        KV = Q
    every = norm + 2 * s * KV  # k and v
    wanted = norm + 2 * s * Q + FLOAT * heads + 3 * s * M  # q, output, sums of the softmax; gate, silu, up
    if c.qk_norm:
        every += (FLOAT + full * s) * widths(c).KV
        wanted += (FLOAT + full * s) * Q
    if full:
        every += s * D  # the input of q, k and v
        wanted += s * D + s * M  # of gate and up, and of down
    else:
        every += FLOAT * (D + rank)  # the adapter's input in float32, and its product with A
        wanted += FLOAT * ((s < FLOAT) * D + rank)  # of q the same; in float32 it is the same tensor
    again = (full or s == FLOAT) * asked * D * s  # what q gets in the last block is a copy
    tail = asked * (FLOAT * D + FLOAT + full * 2 * s * D)  # the last norm; its output, and the head's input
    return n * (every + wanted), n * every + asked * wanted + again, tail


def logits_bytes(objective, s, positions, V):
    """Bytes of the size of the logits, at the worst moment of the forward or backward pass of a loss."""
    if objective == "t3d":  # log p, and its gradients from the three places where it is used
        return positions * V * 4 * FLOAT
    rows = min(positions, max(1, objectives.NllAndEntropy.AT_ONCE * ON_GPU // V))  # of a part
    following = min(rows, positions - rows)  # of the next one: its tensors replace those before one by one
    parts = rows + following  # p; log p is made where the gradient will be
    if s < FLOAT:  # logits, log p and p in float32
        parts = 2 * rows + max(rows + following, 3 * following)
    return positions * V * 2 * s + parts * FLOAT * V
