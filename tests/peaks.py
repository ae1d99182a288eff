"""Peaks of memory on a GPU that is none, beside the arithmetic of experiments/memory.py, one JSON object a line.

    python tests/peaks.py FOLDER_OF_FAKEGPU decode|train

Attention is that of a fused kernel: it keeps q, k, v, its output and a sum for each query."""

import contextlib
import functools
import itertools
import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [sys.argv[1], str(ROOT)]

import fakegpu  # noqa: E402  before torch
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

import baselines  # noqa: E402
import data  # noqa: E402
import decode  # noqa: E402
import lora  # noqa: E402
import model  # noqa: E402
import objectives  # noqa: E402
import train  # noqa: E402
from experiments import cost, memory  # noqa: E402
from runs import loading, torchrun  # noqa: E402

torch.set_num_threads(1)
WATCH = fakegpu.Watch(ROOT)
P, N = 24, 32  # tokens of a prompt, of a response
SPECIAL = dict(mask_token_id=2047, eos_token_id=2046, pad_token_id=2046)
SHAPES = {  # layers, D, heads, key heads of Dream, M, V
    "deep": (5, 64, 4, 2, 192, 2048),
    "wide": (3, 160, 5, 1, 480, 4096),
}


def config(family, shape):
    L, D, H, KV, M, V = SHAPES[shape]
    if family == "llada":
        sizes = dict(d_model=D, n_layers=L, n_heads=H, n_kv_heads=H, mlp_hidden_size=M)
        return cost.LLADA | SPECIAL | sizes | dict(vocab_size=V, embedding_size=V)
    sizes = dict(hidden_size=D, num_hidden_layers=L, num_attention_heads=H, num_key_value_heads=KV)
    sizes.update(intermediate_size=M, vocab_size=V, tie_word_embeddings=False)
    if family == "dream":
        return cost.DREAM | SPECIAL | sizes
    return cost.QWEN3 | SPECIAL | sizes | dict(model_type="a2d-qwen3", head_dim=32)


# ------------------------------------------------------------------------------------------------ attention


class Fused(torch.autograd.Function):
    """Attention by the CPU's kernel, whose inside the watch does not see."""

    @staticmethod
    def forward(ctx, q, k, v, mask):
        out = WATCH.wrap(attention(q, k, v, mask), q.device)
        sums = torch.empty(q.shape[:3], device=q.device)
        ctx.save_for_backward(q, k, v, out, sums)
        ctx.mask = mask
        return out

    @staticmethod
    def backward(ctx, grad):
        *inputs, out, _ = ctx.saved_tensors
        with torch.enable_grad():
            bare = [x.elem.detach().requires_grad_() for x in inputs]
            found = torch.autograd.grad(attention(*bare, ctx.mask), bare, grad.elem)
        return *(WATCH.wrap(x.clone(), out.device) for x in found), None


class Silu(torch.autograd.Function):
    """F.silu, whose gradient a build of torch without CUDA has for GPUs only as six operations, each with a result."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.ops.aten.silu(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return WATCH.wrap(torch.ops.aten.silu_backward(grad.elem, x.elem), x.device)


F.silu = Silu.apply


def attention(q, k, v, mask):
    q, k, v, mask = (getattr(x, "elem", x) for x in (q, k, v, mask))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])


def attend(q, k, v, mask):
    groups = q.shape[1] // k.shape[1]
    if groups > 1 and mask is not None:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    return Fused.apply(q, k, v, mask)


def small_model(family, shape, dtype):
    """A random model on the device, whose logits are far apart, as those of a trained one are."""
    m = model.create(config(family, shape), dtype=model.DTYPES[dtype])
    m.head.weight.data.mul_(40)
    for name, p in list(m.named_parameters()):
        parent, _, leaf = name.rpartition(".")
        setattr(m.get_submodule(parent), leaf, torch.nn.Parameter(p.detach().to("cuda")))
    for block in m.layers:
        block.attn.attend = attend
    if family == "a2d":  # block-causal, as BD3LM is
        m.config.block_length = 8
    return m


# ------------------------------------------------------------------------------------------------- decoding


class Enough(Exception):
    """Some steps were seen."""


def decode_cases():
    for family, shape, dtype in itertools.product(("llada", "dream", "a2d"), SHAPES, ("float32", "bfloat16")):
        with WATCH:
            m = small_model(family, shape, dtype)
        for batch, held in ((1, 2**26), (8, 2**26), (8, 2**18)):
            measure_decoding(m, [family, shape, dtype, batch, held], dtype, batch, held)


def measure_decoding(m, case, dtype, batch, held):
    """The first two steps, with all of the response or of a block masked. All prompts but one are padded."""
    decode.HELD, steps, block = held, [], m.config.block_length

    def on_step(*_):
        steps.append(0)
        if len(steps) == 2:
            raise Enough

    settings = loading.DECODERS[m.config.family] | dict(max_new_tokens=N, block_length=block, suppress=[1, 2])
    with WATCH:
        prompts = torch.randint(0, 50, (batch, P)).to("cuda")
        real = torch.ones_like(prompts)
        real[1:, 0] = 0
        generators = [data.generator(0, i, device=torch.device("cuda:0")) for i in range(batch)]
        WATCH.reset()
        stays = WATCH.now
        with contextlib.suppress(Enough):
            decode.generate(m, prompts, real, generator=generators, on_step=on_step, **settings)
        found = memory.decode_peak(m.config, batch, P, N, dtype, block=block)
    print(json.dumps(dict(case=case, measured=WATCH.peak, arithmetic=found, stays=stays)), flush=True)


# ------------------------------------------------------------------------------------------------- training

B = 4  # rows of a forward pass
LOSSES = {  # each asks for every token of the response, but the first
    "tabom": lambda: dict(window=16),
    "nelbo": lambda: dict(mask=torch.ones(B, N, dtype=torch.bool, device="cuda")),
    "t3d": lambda: dict(start=torch.zeros(B, dtype=torch.long)),
}


def train_cases():
    objectives.NllAndEntropy.AT_ONCE = 2**18 // memory.ON_GPU
    for family, name in itertools.product(("llada", "dream"), LOSSES):
        for shape, padded in zip(SHAPES, (False, True)):
            for dtype, checkpointing in (("float32", padded), ("bfloat16", not padded)):
                measure_training(family, shape, dtype, name, checkpointing, 8, padded)
    measure_training("a2d", "deep", "bfloat16", "tabom", False, 8, True)
    measure_training("a2d", "wide", "float32", "nelbo", True, 8, True)
    measure_training("llada", "wide", "float32", "tabom", False, 0, True)
    measure_training("dream", "deep", "float32", "t3d", True, 0, False)


def measure_training(family, shape, dtype, name, checkpointing, rank, padded):
    """An optimizer step of two forward passes."""
    records, g = [], torch.Generator().manual_seed(0)
    for i in range(2 * B):
        ids, order = torch.randint(0, 50, (N,), generator=g).tolist(), torch.randperm(N, generator=g).tolist()
        records.append(dict(id=i, prompt_ids=[1] * (P - padded * (i % 4)), response_ids=ids, order=order))
    c = train.TrainOptions(model="", data="", out="", batch_size=B)
    with WATCH:
        m = small_model(family, shape, dtype)
        if rank:
            lora.inject(m, rank)
        m.train()
        m.gradient_checkpointing = checkpointing
        weights = {name: p for name, p in m.named_parameters() if p.requires_grad}
        more, reference = LOSSES[name](), None
        if name == "t3d":
            more["reference"] = reference = baselines.Reference(m, lambda: small_model(family, shape, dtype))
            reference.update()
        objective = functools.partial(objectives.OBJECTIVES[name].loss, **more)
        optimizer = torch.optim.AdamW(weights.values(), lr=1e-5, fused=True)
        run = train.TrainingRun(
            c, torchrun.Processes("cuda"), loading.Loaded(m, None, None), records, [], {}, objective, None, reference,
            weights, optimizer, None, None, len(records), 1,
        )  # fmt: skip
        for p in weights.values():
            p.grad = torch.zeros_like(p)
        optimizer.step()  # which makes its state
        optimizer.zero_grad()
        WATCH.reset()
        stays = WATCH.now
        train.train_step(run, 1, 0, records)
    options = dict(objective=name, dtype=dtype, rank=rank, checkpointing=checkpointing, padded=padded)
    found = memory.train_peak(m.config, B, P, N, window=16, **options)
    case = [family, shape, *options.values()]
    print(json.dumps(dict(case=case, measured=WATCH.peak, arithmetic=found, stays=stays)), flush=True)


if __name__ == "__main__":
    dict(decode=decode_cases, train=train_cases)[sys.argv[2]]()
    os._exit(0)  # taking the interpreter down may abort: see test_device.py
