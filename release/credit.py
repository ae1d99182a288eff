"""Credit fusion, the third of LLaDA's decoders in the authors' code (tonyckc/TABOM, `apply_credit_fusion`).

    t = decode.generate(m, prompt_ids, prompt_mask, max_new_tokens=256, schedule="credit", strategy="confidence",
                        block_length=32)

A token that was the most probable one at a position in earlier steps of the block has credit there, which raises its
logit. With z the logits and p = softmax(z), each step does at every masked position

    C <- 0.8 C,  C[argmax p] += (max p) ** 0.2,  z' = z + 0.7 log(C + 1)

with C = 0 when a block begins. Tokens and scores are of z'; the rest is LLaDA's decoder, token for token and step for
step. What is logged is of z, the model's own distribution.

Dimensions: those of decode.py; T steps of a block.
"""

import torch

import decode

DECAY, POWER, WEIGHT = 0.8, 0.2, 0.7


class CreditRun(decode.Run):
    """Rows whose masked positions have credit. At most one token a step gets some, so that few have any:
    tokens [B, W, T] are those of each position, -1 = none, and credit [B, W, T] is what they have."""

    def __init__(self, m, rows, *more):
        super().__init__(m, rows, *more)
        shape = (rows, self.W, self.settings.steps_per_block)
        self.tokens = torch.full(shape, -1, device=self.ids.device)
        self.credit = torch.zeros(shape, device=self.ids.device)

    def choose(self, x, head, V, noise, rows, place):
        """Of z'; what is logged is of z, as everywhere."""
        K, found = place.shape[1], []
        at = (rows.repeat_interleave(K), place.flatten())  # [R K]; a row with fewer than K has its first place again
        tokens, credit = self.tokens[at], self.credit[at]  # [R K, T], all before any is changed
        step = (self.planned % self.settings.steps_per_block).to(x.device)[at[0], None]  # [R K, 1], of the block
        for logits, k in decode.pieces(x, head, V, torch.arange(place.numel(), device=x.device).view_as(place)):
            fused, tokens[k], credit[k] = self.fuse(logits, tokens[k], credit[k], step[k])
            found.append(decode.choose_among(fused, noise.flatten()[k], self.settings, V)[:2])
        self.tokens[at], self.credit[at] = tokens, credit
        return (torch.cat(each).view_as(place) for each in zip(*found))

    def fuse(self, logits, tokens, credit, i):
        """z' of logits [n, V] in step i [n, 1] of the block, with the tokens and credit [n, T] before it and after."""
        logits = decode.without(logits, self.settings.suppress)
        p, token = logits.softmax(-1).max(-1, keepdim=True)  # [n, 1]; in the model's dtype, as officially
        tokens = tokens.masked_fill(i == 0, -1)
        credit = DECAY * credit.to(p.dtype).masked_fill(i == 0, 0.0)
        same = tokens == token
        slot = same.int().argmax(-1, keepdim=True).where(same.any(-1, keepdim=True), i)  # [n, 1]
        tokens = tokens.scatter(-1, slot, token)
        credit = credit.scatter_add(-1, slot, p**POWER)
        fused = logits.scatter_add(-1, tokens.clamp(min=0), WEIGHT * torch.log(credit + 1))  # none adds 0
        return fused, tokens, credit.float()


class Credit(decode.LLaDA):
    """As many tokens a step as LLaDA's decoder, of logits with credit."""

    @classmethod
    def start(cls, m, rows, mask_id, device, settings):
        return CreditRun(m, rows, mask_id, cls(**settings), device)


decode.SCHEDULES["credit"] = Credit
