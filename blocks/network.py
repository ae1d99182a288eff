"""The network of SDAR and A2D: the transformer of model.py with block-causal attention and an exact cache.

    m = model.load("JetLM/SDAR-4B-Chat")                   # model.py imports this file by the model_type
    m.config.block_length = 8                              # settable; None = every token sees everything
    logits = m(ids, attention_mask, positions, origin=prompt_lengths)
    logits = m(ids, ..., **m.arguments(batch))             # in training, see BlockTransformer.arguments
    cache = m.new_cache(rows, length)                      # in decoding
    logits = m(ids, ..., cache=cache.of(rows, first, n))   # [R, n, V]: only the columns from `first` on

A token sees its own block, all of it, and all blocks before. Blocks are counted over real tokens from an origin.

Sources: JetAstra/SDAR (modeling_sdar.py: Qwen3, causal from block to block) and ZHZisZZ/dllm (A2D,
modeling_qwen3.py and modeling_qwen2.py: Qwen3 and Qwen2 without a causal mask, or in blocks, as BD3LM is).
They differ in fields of model.Config:

                      SDAR                 A2D, Qwen3                      A2D, Qwen2
    norms of q and k  per head             per head                        none
    biases            none                 none                            on q, k and v
    RMSNorm           weight, cast         cast, weight                    cast, weight
    key-value heads   8 for 16 or 32       8 for 16                        2 for 14
    attention         block-causal         everything, or block-causal     the same
    blocks count from the start of a row   the end of its prompt           the same

Dimensions: B batch, L length, P positions asked for (of a batch: tokens of the longest prompt), V vocabulary, D width,
K key-value heads, E width of a head; R rows of a batch that a call computes, n columns of each.
"""

from typing import NamedTuple

import torch

import model
from blocks.data import whole_blocks


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
        columns = torch.arange(n, device=self.kept[0][0].device)
        if isinstance(first, torch.Tensor):  # from the host, mostly: a GPU waits for the copy, so one number is none
            first = first.to(columns.device)
            columns = first[:, None] + columns
        else:
            columns = columns.expand(len(rows), -1) + first
        part.first, part.columns = first, columns  # [R, n]
        return part

    def layers(self, length):
        """What each block of the network gets, for tokens that are so many in a row."""
        return [Layer(k[:, :, :length], v[:, :, :length], self.rows, self.columns) for k, v in self.kept]


class Layer(NamedTuple):
    """The cache of one block of the network, in a call for some rows and columns."""

    keys: torch.Tensor  # [B, K, L, E]
    values: torch.Tensor  # [B, K, L, E]
    rows: torch.Tensor | None  # [R]; None = all
    columns: torch.Tensor  # [R, n]

    def put(self, k, v):
        """Store k and v [R, K, n, E] of the columns -> keys and values of all tokens, [R, K, L, E] each."""
        at = torch.arange(len(k), device=k.device) if self.rows is None else self.rows
        found = []
        for every, new in ((self.keys, k), (self.values, v)):
            every[at[:, None], :, self.columns] = new.transpose(1, 2)
            found.append(every if self.rows is None else every[self.rows])  # the price of leaving rows out is a copy
        return found


def pick_columns(x, columns):
    """The columns [B, n] (None = all) of x [1 or B, L]: [B, n], or x."""
    return x if columns is None else x.expand(len(columns), -1).gather(1, columns)


class BlockTransformer(model.Transformer):
    """A Transformer whose attention is block-causal where config.block_length is not None."""

    def forward(
        self, ids, attention_mask=None, positions=None, head=True, origin=0, cache=None, clean=None, start=0
    ):  # fmt: skip
        """Transformer.forward, and

        origin: the position in its row, an int or [B], at which a block begins; the blocks before and after
            follow from it.
        cache: of new_cache().of(rows, first, n), for decoding. Only these n columns are computed, and
            logits are [B, n, V] without positions. Keys and values of the tokens before come from
            earlier calls, in which their blocks had to be finished.
        clean [B, L]: the same rows without masks, for training. The network runs on both copies: a token
            of ids sees its own block in ids, and earlier blocks in clean; one of clean sees clean alone.
            Logits are those of ids, from column `start` on: the blocks of all positions asked for have to
            begin there or later. No cache.
        Raises ValueError for a clean copy where attention is not block-causal."""
        if clean is not None and self.config.block_length is None:
            raise ValueError(f"no clean copy for {self.config.family} without blocks: set config.block_length")
        pos = self.pos_of(ids, attention_mask)  # [1 or B, L]
        columns, first, layers = None, start, None
        if cache is not None:
            columns, first, layers = cache.columns, cache.first, cache.layers(ids.shape[1])
        mask = self.visible(attention_mask, pos, origin, first, columns, clean is not None)
        at = positions
        if clean is not None:  # one row of both copies, at the same positions
            # Attention adds a bias in place of a mask: made here, once, and not by each block of the network.
            dtype = self.embed.weight.dtype
            mask = torch.zeros(mask.shape, dtype=dtype, device=ids.device).masked_fill(~mask, -torch.inf)
            if at is None:
                at = torch.arange(start, ids.shape[1], device=ids.device).expand(len(ids), -1)
            ids, pos = torch.cat((ids[:, start:], clean), dim=1), torch.cat((pos[:, start:], pos), dim=1)
            at = at - start
        elif cache is not None:
            ids, pos = pick_columns(ids, columns), pick_columns(pos, columns)
            at = None if at is None else at - columns[:, :1]
        x = self.hidden(ids, pos, mask, at, layers)  # [B, n or P, D]
        return self.unembed(x) if head else x

    def visible(self, attention_mask, pos, origin=0, first=0, columns=None, clean=False):
        """Which keys the queries at these columns see, the first of a row: None for all, [B, 1, 1, L]
        the real ones, [1 or B, 1, n, L] where blocks count; with a clean copy see visible_copies().

        pos [1 or B, L]: of each token in its row, see pos_of()."""
        real, block_length = super().visible(attention_mask), self.config.block_length
        if block_length is None:
            return real
        if isinstance(origin, torch.Tensor):
            origin = origin[:, None]
        elif real is None and isinstance(first, int) and not clean:
            # Without padding a token's position is its column. Queries that are all in the last block
            # see everything, and attention is faster without a mask.
            last = pos.shape[1] - 1
            if (first - origin) // block_length == (last - origin) // block_length:
                return None
        block = (pos - origin) // block_length  # [1 or B, L]; below 0 before the origin
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

    def new_cache(self, rows, length):
        """An empty Cache for a batch of so many rows of so many tokens.

        Raises ValueError where it could not be exact, because keys change."""
        c, zeros = self.config, self.embed.weight.new_zeros
        if c.block_length is None:
            raise ValueError(f"no exact cache for {c.family} without blocks: set config.block_length")
        shape = (rows, c.kv_heads, length, c.head_width)
        return Cache([(zeros(shape), zeros(shape)) for _ in self.layers])

    def complete(self, record):
        """A record to train on, whose last block is whole: see whole_blocks()."""
        c = self.config
        return record if c.block_length is None else whole_blocks(record, c.block_length, c.grid, c.eos_id)

    def arguments(self, batch, clean=True):
        """What forward() needs of a batch of objectives.py beside ids, attention_mask and positions: a dict.

        With blocks: origin, batch["origin"] or 0, the start of a row. With `clean`, whatever ids show: the rows without
        masks, [B, P + N], and the first column where a block of the response may begin. It is left out for a state as
        decoding had it, with the masks of earlier blocks."""
        if self.config.block_length is None:
            return {}
        origin = dict(origin=batch.get("origin", 0))
        if not clean:
            return origin
        whole = torch.cat((batch["prompt_ids"], batch["response_ids"]), dim=1)  # [B, P + N]
        start = max(0, batch["prompt_ids"].shape[1] - self.config.block_length + 1)
        return dict(origin, clean=whole, start=start)


# SDAR's and A2D's config.json and tensors are Qwen2's, as Dream's are, with norms of q and k.
NAMES = model.DREAM.names
REQUIRED = dict(hidden_act="silu", attention_dropout=0, use_mrope=False, use_sliding_window=False)
NO_BIAS = dict(attention_bias=False)
DEFAULTS = dict(skip_padding=True, qk_norm=True, mask_id=151669, head_width=128)

model.FAMILIES["sdar"] = model.Family(
    "sdar",
    names=NAMES,
    defaults=DEFAULTS | dict(weight_first=True, block_length=4, grid="start"),
    required=REQUIRED | NO_BIAS,
    network=BlockTransformer,
)
model.FAMILIES["a2d"] = model.Family(
    "a2d-qwen3",
    names=NAMES,
    defaults=DEFAULTS | dict(pad_id=151643, grid="prompt"),
    required=REQUIRED | NO_BIAS,
    network=BlockTransformer,
)
# The same family with Qwen2's attention: Config.family is "a2d", so that all else of it holds. Whether there are biases
# is not read from the config by the official code either.
model.FAMILIES["a2d-qwen2"] = model.Family(
    "a2d-qwen2",
    names=NAMES,
    defaults=dict(family="a2d", qkv_bias=True, skip_padding=True, mask_id=151665, pad_id=151643, grid="prompt"),
    required=REQUIRED,
    network=BlockTransformer,
)
