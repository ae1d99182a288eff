"""One bidirectional transformer for masked diffusion language models: LLaDA, Dream, SDAR and A2D.

    # a folder or a Hub repo id
    m = model.load("GSAI-ML/LLaDA-8B-Instruct", dtype=torch.bfloat16, device="cuda")
    logits = m(ids, attention_mask=None, positions=None)         # [B, L] -> [B, L or P, V]
    model.save(m, "out/model")                                   # the layout it was loaded from

logits[b, i] always predicts token i. Checkpoints are Hugging Face folders (config.json, *.safetensors)
and are read without the transformers library; nothing in a checkpoint is executed.

Sources: ML-GSAI/LLaDA (modeling_llada.py: an OLMo / Llama block without a causal mask), DreamLM/Dream
(modeling_dream.py: Qwen2 without one), JetAstra/SDAR (modeling_sdar.py: Qwen3, causal from block to
block) and ZHZisZZ/dllm (A2D, modeling_qwen3.py: Qwen3 without a causal mask). The families differ in
these points, each a field of `Config`:

                      LLaDA-8B       Dream-7B             SDAR                 A2D
    biases            none           on q, k and v        none                 none
    norms of q and k  none           none                 per head             per head
    RMSNorm           cast, weight   cast, weight         weight, cast         cast, weight
    key-value heads   all            4 for 28 of q        8 for 16 or 32       8 for 16
    RoPE rotates in   float32        the model's dtype    the model's dtype    the model's dtype
    padding           is counted     positions skip it    positions skip it    positions skip it
    attention         everything     everything           block-causal         either of the two
    output at i       token i        token i + 1          token i              token i

Dimensions: B batch, L length, P positions asked for, V vocabulary, D width, H query heads,
K key-value heads, E width of a head.
"""

import contextlib
import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class Config:
    """What the network computes. `parse_config` makes one from a config.json."""

    family: str  # "llada", "dream", "sdar" or "a2d"
    vocab_size: int  # rows of the embedding and of the output head; may exceed the tokenizer's ids
    mask_id: int  # the mask token
    eos_id: int  # ends a response
    pad_id: int  # fills up a batch
    width: int
    layers: int
    heads: int  # query heads
    kv_heads: int  # key-value heads, a divisor of heads
    head_width: int  # an even number; heads * head_width may differ from width
    mlp_width: int
    rope_theta: float
    norm_eps: float
    qkv_bias: bool
    tied: bool  # the output head is the embedding
    rope_float32: bool = False  # rotate q and k in float32, then cast back; otherwise in the model's dtype
    qk_norm: bool = False  # normalise each head of q and k before it is rotated
    weight_first: bool = False  # RMSNorm multiplies by its weight before the cast to the model's dtype
    skip_padding: bool = False  # positions count real tokens only
    shifted: bool = False  # position i of the network predicts token i + 1
    block_length: int | None = None  # attention is causal from block to block; None = not at all
    max_length: int | None = None  # the longest context in tokens; callers warn beyond it
    # config.json as read, and as save() writes it
    raw: dict = dataclasses.field(default_factory=dict, repr=False)


# ------------------------------------------------------------------------------------- transformer


class RMSNorm(nn.Module):
    """Normalised in float32, then scaled by the weight and cast, in the family's order: the wrong
    one costs as much as bfloat16's own error."""

    def __init__(self, width, eps, weight_first):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps, self.weight_first = eps, weight_first

    def forward(self, x):
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        if self.weight_first:
            return (self.weight * y).to(x.dtype)
        return self.weight * y.to(x.dtype)


def rotate(x, cos, sin):
    """Rotary position embedding of x [B, H, L, E], halves (not pairs) rotated, in the dtype of cos
    and sin."""
    dtype, x = x.dtype, x.to(cos.dtype)
    a, b = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-b, a), dim=-1) * sin).to(dtype)


def pick(x, at):
    """x [B, L, D] at the places at [B, P] -> [B, P, D]."""
    return x.gather(1, at[..., None].expand(-1, -1, x.shape[-1]))


def pick_rows(x, at):
    """x [1 or B, 1, L, E], the same for all heads, at the places at [B, P] -> [B, 1, P, E]."""
    return pick(x[:, 0].expand(len(at), -1, -1), at)[:, None]


def pick_columns(x, columns):
    """The columns [B, n] (None = all) of x [1 or B, L]: [B, n], or x."""
    if columns is None:
        return x
    return x.expand(len(columns), -1).gather(1, columns)


def attend(q, k, v, mask):
    """Attention of q [B, H, P, E] over k and v [B, K, L, E] where mask is True (None = everywhere)
    -> [B, H, P, E]."""
    groups = q.shape[1] // k.shape[1]
    # No fused CUDA kernel takes both a mask and fewer keys than queries
    if groups > 1 and mask is not None:
        k, v, groups = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1), 1
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=groups > 1)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.head_width = c.head_width
        self.q_proj = nn.Linear(c.width, c.heads * c.head_width, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.width, c.kv_heads * c.head_width, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.width, c.kv_heads * c.head_width, bias=c.qkv_bias)
        self.o_proj = nn.Linear(c.heads * c.head_width, c.width, bias=False)
        if c.qk_norm:
            self.q_norm = RMSNorm(c.head_width, c.norm_eps, c.weight_first)
            self.k_norm = RMSNorm(c.head_width, c.norm_eps, c.weight_first)
        self.qk_norm = c.qk_norm
        # What measures or replaces the kernel sets another function here, on one instance
        self.attend = attend

    def forward(self, x, cos, sin, mask, cache=None, at=None):
        """x [B, L, D] -> [B, L, D], or [B, P, D] where `at` [B, P] names the places whose queries
        are wanted."""
        k, v = self.split(self.k_proj(x)), self.split(self.v_proj(x))  # [B, K, L, E]
        if self.qk_norm:
            k = self.k_norm(k)
        k = rotate(k, cos, sin)
        if at is not None:
            x, cos, sin = pick(x, at), pick_rows(cos, at), pick_rows(sin, at)
            if mask is not None and mask.shape[2] > 1:  # it has a row for each query
                mask = pick_rows(mask, at)
        q = self.split(self.q_proj(x))  # [B, H, P, E]
        if self.qk_norm:
            q = self.q_norm(q)
        q = rotate(q, cos, sin)
        if cache is not None:
            k, v = put(cache, k, v)
        return self.o_proj(self.attend(q, k, v, mask).transpose(1, 2).flatten(2))

    def split(self, x):
        """[B, L, heads * E] -> [B, heads, L, E]"""
        return x.view(*x.shape[:2], x.shape[2] // self.head_width, self.head_width).transpose(1, 2)


class MLP(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate_proj = nn.Linear(c.width, c.mlp_width, bias=False)
        self.up_proj = nn.Linear(c.width, c.mlp_width, bias=False)
        self.down_proj = nn.Linear(c.mlp_width, c.width, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.attn_norm = RMSNorm(c.width, c.norm_eps, c.weight_first)
        self.attn = Attention(c)
        self.mlp_norm = RMSNorm(c.width, c.norm_eps, c.weight_first)
        self.mlp = MLP(c)

    # block.q_proj and so on: the names that checkpoints and adapters know, without our two groups
    q_proj = property(lambda block: block.attn.q_proj)
    k_proj = property(lambda block: block.attn.k_proj)
    v_proj = property(lambda block: block.attn.v_proj)
    o_proj = property(lambda block: block.attn.o_proj)
    gate_proj = property(lambda block: block.mlp.gate_proj)
    up_proj = property(lambda block: block.mlp.up_proj)
    down_proj = property(lambda block: block.mlp.down_proj)

    def forward(self, x, cos, sin, mask, cache=None, at=None):
        """x [B, L, D] -> [B, L, D], or [B, P, D] at the places at [B, P]: all that the last block
        has to compute."""
        y = self.attn(self.attn_norm(x), cos, sin, mask, cache, at)
        if at is not None:
            x = pick(x, at)
        x = x + y
        return x + self.mlp(self.mlp_norm(x))


class Cache:
    """Keys and values of every block of the network for the tokens of one batch, [B, K, L, E] each.

    Where attention is block-causal, those of a finished block of tokens never change: a call then
    computes only what comes after them."""

    def __init__(self, kept):
        self.kept = kept  # a pair for each block of the network
        self.rows = self.columns = self.first = None  # what of() sets

    def of(self, rows, first, n):
        """This cache for a call with only the rows [R] of the batch, none of them twice, that computes
        only n columns of each, from `first` on: an int, or of each row [R]."""
        part = Cache(self.kept)  # the same storage
        if len(rows) < len(self.kept[0][0]):
            part.rows = rows
        start = torch.as_tensor(first, device=self.kept[0][0].device).expand(len(rows))
        part.first, part.columns = first, start[:, None] + torch.arange(n, device=start.device)  # [R, n]
        return part

    def layers(self, length):
        """What each block of the network hands to put(): keys and values of so many tokens, rows, columns."""
        return [(k[:, :, :length], v[:, :, :length], self.rows, self.columns) for k, v in self.kept]


def put(cache, k, v):
    """Store k and v [R, K, n, E] of the columns -> keys and values of all tokens, [R, K, L, E] each."""
    *kept, rows, columns = cache
    at = torch.arange(len(k), device=k.device) if rows is None else rows
    found = []
    for every, new in zip(kept, (k, v)):
        every[at[:, None], :, columns] = new.transpose(1, 2)
        found.append(every if rows is None else every[rows])  # the price of leaving rows out is a copy
    return found


class Transformer(nn.Module):
    """The network. Set `gradient_checkpointing = True` to recompute each block in the backward
    pass instead of keeping its activations, and `config.block_length` to make attention
    block-causal."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width, config.norm_eps, config.weight_first)
        if not config.tied:
            self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.gradient_checkpointing = False
        self.files = {}  # official tensor name -> the file of the checkpoint that holds it

    def forward(
        self, ids, attention_mask=None, positions=None, origin=0, cache=None, clean=None, start=0, head=True
    ):  # fmt: skip
        """ids [B, L] -> logits [B, L, V]; logits[:, i] predicts token i, for every family.

        attention_mask [B, L]: 1 = real token, 0 = padding, on either side. Rows of padding have no
        meaning, nor has Dream's first real token after left padding (its logits come from the
        padding before it).
        positions [B, P]: the output head runs only there, and the result is [B, P, V].
        origin: the place in its row, an int or [B], at which a block of block-causal attention
            begins; the blocks before and after follow from it.
        cache: of new_cache().of(rows, first, n), for decoding. Only these n columns are computed, and
            logits are [B, n, V] without positions. Keys and values of the tokens before come from
            earlier calls, in which their blocks had to be finished.
        clean [B, L]: the same rows without masks, for training where attention is block-causal. The
            network runs on both copies: a token of ids sees its own block in ids, and earlier blocks
            in clean; one of clean sees clean alone. Logits are those of ids, from column `start` on:
            the blocks of all positions asked for have to begin there or later. No cache.
        head: False = what the output head gets, [B, L or P, D], for unembed() of some at a time.
        Raises ValueError for a clean copy where attention is not block-causal, or outputs are shifted.
        """
        c, (B, L) = self.config, ids.shape
        if clean is not None and (c.block_length is None or c.shifted):
            raise ValueError(f"no clean copy for {c.family} without blocks: set config.block_length")
        index = self.index(ids, attention_mask)  # [1 or B, L]
        columns, first, kept = None, start, [None] * c.layers
        if cache is not None:
            columns, first, kept = cache.columns, cache.first, cache.layers(L)
        mask = self.visible(index, attention_mask, origin, first, columns, clean is not None)
        if positions is None and (c.shifted or clean is not None):
            positions = torch.arange(start, L, device=ids.device).expand(B, -1)
        if clean is None:
            ids, place = pick_columns(ids, columns), pick_columns(index, columns)
        else:  # one row of both copies, with the same places
            ids, place = torch.cat((ids[:, start:], clean), dim=1), torch.cat((index[:, start:], index), dim=1)
        cos, sin = self.rope(place, self.embed.weight.dtype)  # [1 or B, 1, n, E]
        x = self.embed(ids)  # [B, n, D]
        if c.shifted:
            # Dream was adapted from an autoregressive model: token i is predicted at i - 1.
            positions = (positions - 1).clamp(min=0)
        at = positions
        if at is not None:
            at = at - (start if columns is None else columns[:, :1])
        for block, own in zip(self.layers, kept):
            # The last block computes only the places where the head runs.
            last = at if block is self.layers[-1] else None
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, cos, sin, mask, own, last, use_reentrant=False)
            else:
                x = block(x, cos, sin, mask, own, last)
        x = self.norm(x)
        return self.unembed(x) if head else x

    def unembed(self, x):
        """The output head: [..., D] -> logits [..., V]."""
        if self.config.tied:
            return F.linear(x, self.embed.weight)
        return self.head(x)

    def new_cache(self, rows, length):
        """An empty Cache for a batch of so many rows of so many tokens.

        Raises ValueError where it could not be exact: keys change, or a token is predicted from the
        block before its own."""
        if self.config.block_length is None or self.config.shifted:
            raise ValueError(f"no exact cache for {self.config.family} without blocks: set config.block_length")
        c, zero = self.config, self.embed.weight.new_zeros
        shape = (rows, c.kv_heads, length, c.head_width)
        return Cache([(zero(shape), zero(shape)) for _ in self.layers])

    def index(self, ids, attention_mask):
        """The place of each token in its row, [1 or B, L]."""
        if attention_mask is None or not self.config.skip_padding:
            return torch.arange(ids.shape[1], device=ids.device)[None]
        return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)

    def arguments(self, batch, clean=True):
        """What objectives.logits_at calls the model with beside ids: {} without blocks; else origin, and with clean the
        clean copy of the rows and where the noisy one begins."""
        c = self.config
        if c.block_length is None:
            return {}
        origin = batch.get("origin", 0)
        if "origin" not in batch and getattr(c, "grid", None) == "prompt":
            origin = batch["prompt_mask"].sum(1)
        if not clean:
            return dict(origin=origin)
        start = max(0, batch["prompt_ids"].shape[1] - c.block_length + 1)
        both = torch.cat((batch["prompt_ids"], batch["response_ids"]), dim=1)
        return dict(origin=origin, clean=both, start=start)

    def visible(self, index, attention_mask, origin=0, first=0, columns=None, clean=False):
        """Which keys the queries at these columns see, the first of a row: None for all, [B, 1, 1, L]
        the real ones, [1 or B, 1, n, L] where blocks count; with a clean copy see visible_copies()."""
        # Padding is hidden as a key only. As a query it sees real tokens too: softmax over an
        # empty row is NaN.
        real = None if attention_mask is None else attention_mask.bool()[:, None, None, :]
        if self.config.block_length is None:
            return real
        if isinstance(origin, torch.Tensor):
            origin = origin[:, None]
        elif real is None and isinstance(first, int) and not clean:
            # Without padding a token's place is its column. Queries that are all in the last block
            # see everything, and attention is faster without a mask.
            last = index.shape[1] - 1
            if (first - origin) // self.config.block_length == (last - origin) // self.config.block_length:
                return None
        block = (index - origin) // self.config.block_length  # [1 or B, L]; below 0 before the origin
        if clean:
            return self.visible_copies(block, real, first)
        # A query sees its own block and those before it.
        past = block[:, None, None, :] <= pick_columns(block, columns)[:, None, :, None]
        return past if real is None else past & real

    def visible_copies(self, block, real, start):
        """visible() for the noisy tokens from `start` on and, behind them, the clean copy of all L
        tokens, [1 or B, 1, n, n]: earlier blocks of the clean copy, and the own block of the same copy.

        block [1 or B, L]: of each token; real [B, 1, 1, L], or None."""
        L = block.shape[1]
        both = torch.cat((block[:, start:], block), dim=1)[:, None]  # [1 or B, 1, n]
        copy = torch.arange(start, 2 * L, device=block.device) >= L  # [n], True = clean
        key, query = both[:, :, None, :], both[:, :, :, None]
        past = (key < query) & copy | (key == query) & (copy == copy[:, None])
        return past if real is None else past & torch.cat((real[..., start:], real), dim=-1)

    def rope(self, index, dtype):
        """cos and sin [1 or B, 1, L, E] for the places index [1 or B, L], in the dtype that the
        family rotates in."""
        c = self.config
        even = torch.arange(0, c.head_width, 2, device=index.device, dtype=torch.float32)
        frequency = 1.0 / c.rope_theta ** (even / c.head_width)
        # Angles are float32 even for a bfloat16 model: bfloat16 cannot tell place 257 from 256.
        angle = index[..., None].float() * frequency  # [1 or B, L, E / 2]
        angle = torch.cat((angle, angle), dim=-1)[:, None]  # [1 or B, 1, L, E]
        if c.rope_float32:
            dtype = torch.float32
        return angle.cos().to(dtype), angle.sin().to(dtype)

    def checkpoint_name(self, name):
        """The official name of a parameter or module of ours: layers.0.attn.o_proj of a LLaDA ->
        model.transformer.blocks.0.attn_out. The groups attn and mlp may be left out:
        layers.0.o_proj."""
        names = NAMES[self.config.family]
        first, *rest = name.split(".")
        official = [names[first]]
        for part in rest:
            # Our two groups go: where a family has groups of its own, NAMES has them.
            if part not in ("attn", "mlp"):
                official.append(names.get(part, part))
        return ".".join(official)


# Our names -> those of the official classes, where they differ.
# fmt: off
LLADA_NAMES = dict(
    embed="model.transformer.wte", norm="model.transformer.ln_f", head="model.transformer.ff_out",
    layers="model.transformer.blocks", o_proj="attn_out", mlp_norm="ff_norm", gate_proj="ff_proj",
    down_proj="ff_out",  # the same last name as the output head
)
QWEN_NAMES = dict(
    embed="model.embed_tokens", norm="model.norm", head="lm_head", layers="model.layers",
    attn_norm="input_layernorm", mlp_norm="post_attention_layernorm",
    q_proj="self_attn.q_proj", k_proj="self_attn.k_proj", v_proj="self_attn.v_proj", o_proj="self_attn.o_proj",
    q_norm="self_attn.q_norm", k_norm="self_attn.k_norm",
    gate_proj="mlp.gate_proj", up_proj="mlp.up_proj", down_proj="mlp.down_proj",
)
# fmt: on
NAMES = dict(llada=LLADA_NAMES, dream=QWEN_NAMES, sdar=QWEN_NAMES, a2d=QWEN_NAMES)

# ------------------------------------------------------------------------------------------ config

# What a config.json may say, per family. READ: our field -> their key. START: what every model of
# the family does, and what holds where a published file leaves a key out. REQUIRED: the values
# that this code computes; anything else is a different network. IGNORED: keys that do not change
# what the network computes.
IDS = dict(mask_id="mask_token_id", eos_id="eos_token_id", pad_id="pad_token_id")
# fmt: off
LLADA = IDS | dict(
    width="d_model", layers="n_layers", heads="n_heads", rope_theta="rope_theta", rope_float32="rope_full_precision",
    norm_eps="rms_norm_eps", tied="weight_tying", max_length="max_sequence_length",
)
QWEN = IDS | dict(
    vocab_size="vocab_size", width="hidden_size", layers="num_hidden_layers", heads="num_attention_heads",
    kv_heads="num_key_value_heads", mlp_width="intermediate_size", rope_theta="rope_theta", norm_eps="rms_norm_eps",
    tied="tie_word_embeddings", max_length="max_position_embeddings",
)
READ = {
    "llada": LLADA,
    "dream": QWEN,
    "sdar": QWEN | dict(head_width="head_dim", block_length="block_size"),
    "a2d": QWEN | dict(head_width="head_dim"),
}
START = {
    "llada": dict(rope_float32=True),
    "dream": dict(qkv_bias=True, shifted=True, skip_padding=True),
    "sdar": dict(
        qkv_bias=False, skip_padding=True, qk_norm=True, weight_first=True,
        mask_id=151669, head_width=128, block_length=4,
    ),
    "a2d": dict(qkv_bias=False, skip_padding=True, qk_norm=True, mask_id=151669, pad_id=151643, head_width=128),
}
# fmt: on
OFF, ZERO = (False, None), (0, None)
QWEN_REQUIRED = dict(hidden_act=("silu",), attention_dropout=ZERO, use_mrope=OFF, use_sliding_window=OFF)
QWEN3_REQUIRED = QWEN_REQUIRED | dict(attention_bias=OFF)
REQUIRED = {
    "llada": dict(
        activation_type=("silu",),
        block_type=("llama",),
        block_group_size=(1,),
        layer_norm_type=("rms",),
        layer_norm_with_affine=(True,),
        rope=(True,),
        **dict.fromkeys("attention_dropout embedding_dropout residual_dropout".split(), ZERO),
        **dict.fromkeys("alibi attention_layer_norm bias_for_layer_norm include_bias input_emb_norm".split(), OFF),
        **dict.fromkeys("multi_query_attention scale_logits".split(), OFF),
    ),
    "dream": QWEN_REQUIRED,
    "sdar": QWEN3_REQUIRED,
    "a2d": QWEN3_REQUIRED,
}
# Of LLaDA's, Dream's and SDAR's own keys: initialisation, kernels, and how they were trained.
# Whether LLaDA's and Dream's q, k and v have biases is not read from attention_bias by their code
# either.
IGNORED = set(
    """
    alibi_bias_max attention_layer_norm_with_affine flash_attention init_cutoff_factor
    init_device init_fn init_std initializer_range max_position_embeddings max_sequence_length
    max_window_layers precision sliding_window train_max_sequence_length attention_bias
    block_size debug ep_size fuse_cross_entropy micro_forward skip_checkpoint use_deepep
    tie_word_embeddings
    """.split()
)
# What transformers writes for every model: its class, labels, dtype, outputs, and settings of
# generation.
IGNORED |= set(
    """
    architectures auto_map model_type dtype torch_dtype tokenizer_class attn_implementation
    use_cache return_dict output_attentions output_hidden_states output_scores torchscript
    use_bfloat16 tf_legacy_loss chunk_size_feed_forward gradient_checkpointing finetuning_task
    task_specific_params problem_type prefix id2label label2id num_labels max_length min_length
    max_new_tokens do_sample early_stopping num_beams num_beam_groups num_return_sequences
    diversity_penalty temperature top_k top_p min_p typical_p repetition_penalty length_penalty
    no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids suppress_tokens
    begin_suppress_tokens return_dict_in_generate remove_invalid_values
    exponential_decay_length_penalty
    """.split()
)
# Private to transformers; further tokens; who wrote the file.
IGNORED_KINDS = re.compile(r"_.*|.*_token_id|.*_version")
CHECKED = set(  # by functions of their own
    """
    rope_parameters rope_scaling layer_types head_dim vocab_size embedding_size n_kv_heads
    mlp_hidden_size mlp_ratio include_qkv_bias
    """.split()
)
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
LARGEST = dict(layers=1024)  # and 2**31 of anything: more is an accident or an attack


def parse_config(raw, where="config.json"):
    """Config from the content of a config.json.

    Raises ValueError: one line with every missing, unsupported and unknown key, that begins with
    `where`."""
    for key in EXPERTS:
        if raw.get(key):
            raise ValueError(f"{where}: {key}: a mixture of experts is not supported")
    kind = str(raw.get("model_type")).lower()
    if kind.endswith("_moe"):
        raise ValueError(f"{where}: model_type {kind}: a mixture of experts is not supported")
    family = {"a2d-qwen3": "a2d", "a2d": None}.get(kind, kind)
    if family not in READ:
        known = "'llada', 'Dream', 'sdar' and 'a2d-qwen3'"
        raise ValueError(f"{where}: model_type is {raw.get('model_type')!r}; this code knows {known}")
    values = read_values(raw, family)
    values["rope_theta"], wrong = read_rope(raw)
    wrong += check_config_values(values, family) + check_keys(raw, family)
    if not wrong:
        wrong = check_together(values, raw, family)
    if wrong:
        raise ValueError(f"{where}: {'; '.join(wrong)}. Correct the file, or remove a key that changes no computation")
    return Config(family=family, raw=dict(raw), **values)


def read_values(raw, family):
    """The fields of Config, unchecked; those that the file does not give are missing or None."""
    values = dict(START[family])
    for ours, key in READ[family].items():
        if raw.get(key) is not None or ours not in values:
            values[ours] = raw.get(key)
    if isinstance(values["eos_id"], list) and values["eos_id"]:
        values["eos_id"] = values["eos_id"][0]  # of several ends; `raw` keeps the others
    if family == "llada":
        values["vocab_size"] = raw.get("embedding_size") or raw.get("vocab_size")
        values["kv_heads"] = raw.get("n_kv_heads") or values["heads"]
        values["qkv_bias"] = bool(raw.get("include_qkv_bias"))
        values["mlp_width"], ratio = raw.get("mlp_hidden_size"), raw.get("mlp_ratio", 4)
        if not values["mlp_width"] and type(values["width"]) is type(ratio) is int:
            values["mlp_width"] = values["width"] * ratio
    if family == "sdar" and values["pad_id"] is None:
        values["pad_id"] = values["eos_id"]  # as Qwen3's base models, which SDAR is trained from
    width, heads = values["width"], values["heads"]
    if "head_width" not in values and type(width) is type(heads) is int and heads > 0:
        values["head_width"] = width // heads
    return values


def read_rope(raw):
    """rope_theta, and what is wrong with it: since transformers 5 it stands in rope_parameters,
    beside a type of which only the plain one is computed here. rope_scaling is the older name of
    the same."""
    theta, wrong = raw.get("rope_theta"), []
    for key in ("rope_parameters", "rope_scaling"):
        settings = raw.get(key) or {}
        # Newer files have one entry per type of layer.
        if isinstance(settings, dict) and settings.keys() == {"full_attention"}:
            settings = settings["full_attention"]
        if not isinstance(settings, dict):
            wrong.append(f"{key} is {raw[key]!r}, not an object")
            continue
        here = settings.get("rope_theta")
        plain = dict(rope_type="default", type="default", partial_rotary_factor=1, rope_theta=here)
        for name, value in settings.items():
            if value is not None and value != plain.get(name):
                wrong.append(f"{key} has {name} = {value!r}: only plain rotary embeddings are computed")
        if theta is not None and here is not None and here != theta:
            wrong.append(f"rope_theta is {theta!r}, and {here!r} in {key}")
        if theta is None:
            theta = here
    return theta, wrong


def check_config_values(values, family):
    """What is wrong with the single fields: missing, of another type, or of no sensible size."""
    wrong = []
    for f in dataclasses.fields(Config):
        value, key = values.get(f.name), READ[family].get(f.name, f.name)
        if f.name in ("family", "raw"):
            continue
        if value is None:
            if f.default is dataclasses.MISSING:
                wrong.append(f"{key} is missing")
        elif f.type in (int, int | None):
            least = int(f.type is not int)  # a length of 0 has no meaning, an id of 0 has
            if type(value) is not int or value < least:
                wrong.append(f"{key} is {value!r}, not a whole number{' above 0' * least}")
            elif value > LARGEST.get(f.name, 2**31):
                wrong.append(f"{key} is {value!r}, more than any model has")
        elif f.type is float and (type(value) not in (int, float) or not 0 < value < float("inf")):
            wrong.append(f"{key} is {value!r}, not a positive number")
        elif f.type is bool and type(value) is not bool:
            wrong.append(f"{key} is {value!r}, not true or false")
    return wrong


def check_keys(raw, family):
    """What is wrong with the keys that are no fields of Config: values that this code does not
    compute, and keys that nobody here has heard of, which may ask for anything."""
    wrong = []
    for key, allowed in REQUIRED[family].items():
        if key in raw and raw[key] not in allowed:
            wrong.append(f"{key} is {raw[key]!r}, supported is {allowed[0]!r}")
    kinds = raw.get("layer_types") or []
    if not isinstance(kinds, list) or kinds.count("full_attention") < len(kinds):
        wrong.append(f"layer_types is {kinds!r}, supported is 'full_attention' for every layer")
    known = {*READ[family].values(), *REQUIRED[family], *IGNORED, *CHECKED}
    for key, value in raw.items():
        if key in known or IGNORED_KINDS.fullmatch(key):
            continue
        if value not in (None, False, "", [], {}):  # a key that is not set asks for nothing
            wrong.append(f"unknown key {key} = {value!r}")
    return wrong


def check_together(values, raw, family):
    """What is wrong between fields that are right in themselves."""
    wrong, width, heads, kv_heads = [], values["width"], values["heads"], values["kv_heads"]
    E = values.get("head_width", 0)
    if "head_width" not in READ[family] and (heads < 1 or width % heads):
        wrong.append(f"width {width} is not a multiple of {heads} heads")
    elif E < 2 or E % 2:
        wrong.append(f"heads of width {E} ({heads} heads in {width}) cannot be rotated: it must be an even number")
    elif raw.get("head_dim") not in (None, E):
        wrong.append(f"head_dim is {raw['head_dim']!r}, but a {family} model has {width} / {heads} = {E}")
    if not kv_heads or heads % kv_heads:
        wrong.append(f"{heads} heads are not a multiple of {kv_heads} key-value heads")
    for key in ("mask_id", "eos_id", "pad_id"):
        if values[key] >= values["vocab_size"]:
            name = READ[family][key]
            wrong.append(f"{name} {values[key]} is outside the vocabulary of {values['vocab_size']}")
    return wrong


# ----------------------------------------------------------------------------------- load and save


def create(raw, generator=None, dtype=torch.float32, device="cpu"):
    """A model with random weights from the content of a config.json: normal, with the config's own
    standard deviation (init_std or initializer_range, else 0.02), and smaller by sqrt(2 layers)
    where a block adds to its input."""
    m = empty(parse_config(raw)).to_empty(device=device).to(dtype)
    std = raw.get("init_std") or raw.get("initializer_range") or 0.02
    for name, p in m.named_parameters():
        if p.ndim == 1:
            nn.init.constant_(p, float(not name.endswith("bias")))
        else:
            width = std
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                width = std / (2 * m.config.layers) ** 0.5
            nn.init.normal_(p, std=width, generator=generator)
    return m.eval()


def empty(config):
    """The modules without storage: no time and no memory is spent on weights that are about to be
    replaced."""
    with torch.device("meta"):
        return Transformer(config)


def resolve(path):
    """A local folder for a folder or a Hub repo id ("GSAI-ML/LLaDA-8B-Instruct", downloaded if
    need be).

    Raises FileNotFoundError when it is neither, or a folder without a config.json."""
    folder = Path(path)
    if folder.is_dir():
        if (folder / "config.json").is_file():
            return folder
        if (folder / "adapter_config.json").is_file():
            raise FileNotFoundError(
                f"{folder} is an adapter, not a model: load the model that it was made for, then it"
            )
        raise FileNotFoundError(f"no config.json in {folder}: not a Hugging Face model folder")
    if folder.exists() or not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", str(path)):
        raise FileNotFoundError(
            f"no model folder {path}: give a folder with config.json, or a Hub repo id (owner/name)"
        )
    # Imported for a Hub id only: everything else works without the package.
    from huggingface_hub import snapshot_download

    # No pickles. Code is never run here; a merged model is written with it, for those who load it
    # with transformers.
    wanted = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.py"]
    try:
        return Path(snapshot_download(str(path), allow_patterns=wanted))
    except Exception as e:  # the hub library raises its own, requests' and httpx's errors
        reason = str(e).strip().split("\n")[0]
        raise FileNotFoundError(f"no folder {path}, and no download from the Hub: {type(e).__name__}: {reason}") from e


def load(path, dtype=torch.float32, device="cpu", place=None):
    """Transformer in eval mode from a Hugging Face folder or Hub repo id, one tensor at a time;
    dtype None keeps the dtype of each stored tensor.

    place: a function that spreads the model, still without storage, over several processes
    (FSDP2's fully_shard); each process then reads its own rows of every tensor.

    Memory peaks at the model's own size plus one tensor: modules are made on the meta device, and
    each tensor is read through a mapping of its own that is given back at once. Nothing refers to
    the files afterwards. Raises FileNotFoundError or ValueError; one error lists every missing,
    unexpected or misshapen tensor. Values that are not finite, and files that a manifest.json
    knows with another hash, are errors too.
    """
    folder = resolve(path)
    config_file = folder / "config.json"
    m = empty(parse_config(read_json(config_file), config_file))
    if place is not None:
        m = place(m.to(dtype)).to_empty(device=device)
    m.files = find_tensors(folder)
    check_manifest(folder, ["config.json", *sorted(set(m.files.values()))])
    names = {}  # official name -> ours
    for name, _ in m.named_parameters():
        names[m.checkpoint_name(name)] = name
    copy = m.checkpoint_name("head.weight")
    if m.config.tied and copy in m.files:  # some tools write a tied head as well
        names[copy] = None
    wrong = [f"missing {name}" for name in names if name not in m.files]
    wrong += [f"unexpected {name}" for name in m.files if name not in names]
    # A stored copy comes last: it is compared with the embedding.
    for official in sorted(m.files.keys() & names.keys(), key=lambda name: names[name] is None):
        wrong += read_tensor(m, folder, official, names[official], dtype, device, check_only=bool(wrong))
    if wrong:
        more = f"; and {len(wrong) - 20} more" if len(wrong) > 20 else ""
        raise ValueError(f"{folder}: {'; '.join(wrong[:20])}{more}")
    return m.eval()


def read_tensor(m, folder, official, name, dtype, device, check_only):
    """Fill the parameter `name` of m, or compare the embedding with a stored copy (name None) -> a
    list of errors. Of one that is spread over processes only the rows of this process are read.
    check_only: look at the header only, because the model is not going to be used."""
    file, target = folder / m.files[official], m.get_parameter(name or "embed.weight")
    try:
        with safe_open(file, framework="pt") as f:
            header = f.get_slice(official)
            if header.get_shape() != list(target.shape):
                return [f"{official} is {header.get_shape()}, the config wants {list(target.shape)}"]
            if header.get_dtype() not in ("F64", "F32", "F16", "BF16"):
                kind = header.get_dtype()
                return [f"{official} in {file.name} is {kind}: quantized weights are not supported"]
            if check_only:
                return []
            tensor = own_rows(f, official, target).to(device=device, dtype=dtype, copy=True)
    except SafetensorError as e:
        return [f"{official} cannot be read from {file.name} ({e})"]
    own = target.to_local() if isinstance(target, DTensor) else target
    if name is None:
        if torch.equal(tensor.to(own.dtype), own):
            return []
        return [f"{official} differs from the embedding, but the config says that they are tied"]
    # The extremes are NaN or infinite if any value is, and take no memory: isfinite() would double
    # the largest tensor.
    if tensor.numel() and not torch.stack(torch.aminmax(tensor)).isfinite().all():
        return [f"{official} in {file.name} has values that are not finite: the file is damaged"]
    if own is not target:
        own.detach().copy_(tensor)
        return []
    parent, _, leaf = name.rpartition(".")
    setattr(m.get_submodule(parent), leaf, nn.Parameter(tensor))
    return []


def own_rows(f, official, target):
    """A tensor of an open file; of a target that is spread over processes the rows of this one."""
    if not isinstance(target, DTensor):
        return f.get_tensor(official)
    each = -(-len(target) // target.device_mesh.size())  # FSDP2 cuts rows as torch.chunk does
    start = min(each * target.device_mesh.get_local_rank(), len(target))
    return f.get_slice(official)[start : start + len(target.to_local())]


def find_tensors(folder):
    """Official tensor name -> file name, from the headers of model.safetensors or of the shards in
    the index."""
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.is_file():
        listed = read_json(index).get("weight_map")
        for file in listed.values() if isinstance(listed, dict) else [None]:
            if not isinstance(file, str) or Path(file).name != file:
                raise ValueError(f"{index}: weight_map must map tensor names to file names in this folder")
        files = sorted(set(listed.values()))
        missing = [f for f in files if not (folder / f).is_file()]
        if missing:
            raise FileNotFoundError(f"{folder}: missing {', '.join(missing)}, named in {index.name}; download again")
    elif single.is_file():
        files, listed = [single.name], {}
    else:
        raise FileNotFoundError(f"no model.safetensors and no model.safetensors.index.json in {folder}")
    found = {}
    for file in files:
        try:
            with safe_open(folder / file, framework="pt") as f:
                for name in f.keys():  # noqa: SIM118 - not a dict
                    if listed.get(name, file) == file:
                        found[name] = file
        except SafetensorError as e:
            raise ValueError(f"{folder / file}: truncated or not a safetensors file ({e}); download it again") from e
    return found


def check_manifest(folder, files):
    """Raises ValueError for a file whose SHA-256 is not the one in manifest.json, where there is
    one that has it: a checkpoint of training has."""
    manifest = folder / "manifest.json"
    hashes = read_json(manifest) if manifest.is_file() else {}
    for file in files:
        if file in hashes and (folder / file).is_file():
            digest = hashlib.sha256()
            with open(folder / file, "rb") as f:
                while piece := f.read(2**20):
                    digest.update(piece)
            if digest.hexdigest() != hashes[file]:
                raise ValueError(f"{folder / file} was damaged or changed: not the SHA-256 of {manifest.name}")


def read_json(file):
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as e:
        raise ValueError(f"{file}: not valid JSON ({e})") from e
    if not isinstance(content, dict):
        raise ValueError(f"{file}: expected a JSON object, found {type(content).__name__}")
    return content


def save(m, path, whole=torch.detach, write=True):
    """Write config.json and the safetensors files in the layout, names and shards that m was
    loaded from. Weights and an index that were in the folder before are removed.

    whole: a function that makes a parameter the tensor to write: gathered, where it is spread over
    processes. All of them then call this together, and one of them with write; it holds the
    tensors of one file at a time.

    Raises ValueError while an adapter is attached: lora.merge(m) first, or save the adapter alone
    with lora.save."""
    known = {name for name, _ in empty(m.config).named_parameters()}
    extra = [name for name, _ in m.named_parameters() if name not in known]
    if extra:
        names = ", ".join(extra[:4])
        raise ValueError(f"not part of a {m.config.family} checkpoint: {names}, ...; merge the adapter first")
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    files, where, size = {}, {}, 0  # file -> {official name: tensor}; official name -> file; bytes
    for name, p in m.named_parameters():
        official = m.checkpoint_name(name)
        where[official] = m.files.get(official, "model.safetensors")
        files.setdefault(where[official], {})[official] = p
        size += p.numel() * p.element_size()
    texts = {"config.json": m.config.raw}
    if set(files) != {"model.safetensors"}:
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(where.items()))}
        texts = {"model.safetensors.index.json": index, **texts}

    # All is written beside its place before anything old goes. Killed in between, the folder is
    # without a config.json: it cannot be loaded, and never are old and new weights mixed.
    for file, parameters in files.items():
        tensors = {}
        for official, p in parameters.items():
            tensor = whole(p)
            if write:
                tensors[official] = tensor.contiguous()
        if write:
            save_tensors(tensors, path / f"{file}.tmp")
    if not write:
        return
    for file, content in texts.items():
        (path / f"{file}.tmp").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for file in ("config.json", *old_weights(path)):
        (path / file).unlink(missing_ok=True)
    for file in (*files, *texts):
        (path / f"{file}.tmp").replace(path / file)


def old_weights(folder):
    """The names of the files that hold a model's weights in a folder: the usual names, and those
    in its index."""
    found = {"model.safetensors", "model.safetensors.index.json"}
    found.update(file.name for file in folder.glob("model-*-of-*.safetensors"))
    # An index that cannot be read is removed all the same.
    with contextlib.suppress(ValueError, OSError):
        found.update(file for file in find_tensors(folder).values() if file.endswith(".safetensors"))
    return found


def save_tensors(tensors, file):
    """A safetensors file that others can read: the library makes it private (mode 600), whatever
    the umask."""
    file.unlink(missing_ok=True)
    file.touch()  # made the usual way, it has the mode that the umask gives
    mode = file.stat().st_mode
    save_file(tensors, file, metadata={"format": "pt"})
    file.chmod(mode)
