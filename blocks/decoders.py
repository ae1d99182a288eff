"""The decoders of SDAR and A2D, which finish one block after the other.

    t = decode.generate(m, prompt_ids, prompt_mask, **blocks.decoders.DECODERS["sdar"])  # or "a2d"

Blocks are those of the model's attention (m.config.block_length), where that is block-causal. Keys and
values of finished blocks are then kept (m.new_cache), which is exact: a step computes one block. Any
other callable computes all tokens at every step, and decodes the same.

"sdar" counts blocks from the first token of a prompt, whose end may share one with the response, and
decodes the last one whole before it is cut. "a2d" counts them from the end of the prompt.

Sources: JetAstra/SDAR generate.py and its OpenCompass wrapper, but for their overwriting of prompts;
ZHZisZZ/dllm (A2D: the MDLM and BD3LM samplers). Their tokens and steps are reproduced exactly at
temperature 0.

Dimensions: those of decode.py: B batch, P columns of the prompts, N response, W positions after the
prompt, R rows that take a step.
"""

import torch

import decode

# How each family decodes where nothing else is said, as in SDAR's and dllm's evaluation. Blocks of the
# model's attention, where it has some, take the place of block_length.
DECODERS = {
    "sdar": dict(strategy="confidence", schedule="sdar", temperature=0.0, max_new_tokens=256),
    "a2d": dict(strategy="confidence", schedule="a2d", temperature=0.0, block_length=32, max_new_tokens=256),
}


def attention_blocks(m):
    """The block length of a model's attention; None = it sees everything, or nothing is known."""
    return getattr(getattr(m, "config", None), "block_length", None)


# ------------------------------------------------------------------------------------------ the exact cache


class BlockRun(decode.Run):
    """Rows whose finished blocks are computed once, if attention is block-causal and m has new_cache().

    known [B], on the host: the columns of each row whose keys and values are final; -1 = a new prompt."""

    def __init__(self, m, rows, *more):
        super().__init__(m, rows, *more)
        self.causal, self.cache = attention_blocks(m) is not None, None
        self.known = torch.full((rows,), -1)

    def fit(self, P):
        old = self.P
        super().fit(P)
        if old != self.P and self.causal and hasattr(self.m, "new_cache"):
            self.cache = self.m.new_cache(len(self.ids), self.P + self.W)
            self.known.fill_(-1)

    def put(self, row, prompt, generator=None):
        super().put(row, prompt, generator)
        self.known[row] = -1

    def ready(self, best):
        """New prompts go first: their step is longer than that of the others, which wait."""
        ready = super().ready(best)
        if self.cache is not None and (self.known[best > 0] < 0).any():
            ready &= self.known < 0
        return ready

    def inputs(self, rows, host):
        end, more = self.P + self.W, dict(attention_mask=None)
        if self.cache is not None:
            # The first step of a block computes the one before it as well: its last tokens were
            # masks when they were decoded. Each row is at a block, and so at columns, of its own.
            begin = self.P + self.block_starts()[host]  # [R]
            ends = (begin + self.settings.length).clamp(max=end)
            n, end = int((ends - self.known[host].clamp(min=0)).max()), int(ends.max())
            first = (ends - n).clamp(min=0)  # [R]
            if (first == first[0]).all():
                first = int(first[0])
            more.update(cache=self.cache.of(rows, first, n))
            self.known[host] = begin
        if self.padded:
            more["attention_mask"] = self.attention_mask[rows, :end]
        return self.ids[rows, :end], more


class RunFromFirstToken(BlockRun):
    """Blocks are counted from the first token of the prompt."""

    def block_starts(self):
        return super().block_starts() - self.length % self.settings.length


class RunFromPrompt(BlockRun):
    """Blocks are counted from the end of the prompt."""

    def inputs(self, rows, host):
        ids, more = super().inputs(rows, host)
        if self.causal:
            # Counted where it is needed: a GPU would wait for a copy of self.length
            more["origin"] = self.attention_mask[rows, : self.P].sum(1) if self.padded else self.P
        return ids, more


# ---------------------------------------------------------------------------------------------- the schedules


class Blockwise(decode.LLaDA):
    """Each block has steps / blocks, rounded up; None = as many as it has tokens. Any length of blocks and
    number of steps will do: the last block may be shorter, or is cut."""

    finishes_blocks = True
    Rows = BlockRun

    @classmethod
    def start(cls, m, rows, mask_id, device, settings):
        """Raises ValueError for blocks that are not those of the model's attention."""
        theirs = attention_blocks(m)
        if settings.get("block_length") is None:
            settings = dict(settings, block_length=theirs)
        s = cls(**settings)
        if theirs not in (None, s.length):
            raise ValueError(
                f"block_length {s.length}, but the model's attention has {theirs}: set m.config.block_length"
            )
        return cls.Rows(m, rows, mask_id, s, device)

    def plan(self):
        N = self.columns = self.max_new_tokens
        self.length = self.block_length or N
        self.blocks = -(-N // self.length)
        self.steps_per_block = self.length
        if self.steps is not None:
            self.steps_per_block = -(-self.steps // self.blocks)
        self.max_steps = self.steps_per_block * self.blocks
        self.lockstep = False


class SDAR(Blockwise):
    """SDAR's generate.py: LLaDA's number of tokens a step, scored after temperature, top_k and top_p.

    A threshold adds to it (low_confidence_dynamic): all tokens of a higher score, and the scheduled number
    at least. Beside the entropy it is in nats (entropy_bounded), with no scheduled number: the tokens of
    least entropy whose entropies sum to less, and one at least."""

    scores_untempered = False
    top_p_after_top_k = True
    Rows = RunFromFirstToken

    @property
    def summed_entropy(self):
        return self.strategy == "entropy" and self.threshold is not None

    @property
    def threshold_adds(self):
        return not self.summed_entropy

    def plan(self):
        if self.block_length is None:
            raise ValueError("schedule 'sdar' needs a block_length: that of the model's training, such as 4")
        super().plan()
        if self.summed_entropy:
            self.steps_per_block = self.length
        self.blocks += 1  # at most: the prompt may fill most of the first
        self.columns += self.length - 1
        self.max_steps = self.steps_per_block * self.blocks

    def reached(self, score, nth):
        if self.summed_entropy:  # entropies, the least first, of this position and those before it
            total = -score.sort(dim=1, descending=True).values.cumsum(1)
            return total.gather(1, nth) < self.threshold
        return score > self.threshold


class A2D(Blockwise):
    """dllm's samplers: an even share of what is left, rounded; a step without any is left out, and not counted."""

    Rows = RunFromPrompt

    def share(self, i, count):
        # In float32, as the official code: its rounding decides which way a half falls.
        steps = self.steps_per_block
        now, later = (1 - (1 - (steps - at).float() / steps) for at in (i, i + 1))
        return (count.float() * (1 - later / now)).round().long()


decode.SCHEDULES.update(sdar=SDAR, a2d=A2D)
