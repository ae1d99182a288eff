"""Peaks of memory on a GPU that is none, beside the arithmetic of experiments/memory.py, one JSON object a line.

    python tests/peaks.py FOLDER_OF_FAKEGPU decode|train

Attention is that of a fused kernel: it keeps q, k, v, its output and a sum for each query."""

import functools
import json
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
P, N = 40, 48  # tokens of a prompt, of a response
SPECIAL = dict(mask_token_id=2047, eos_token_id=2046, pad_token_id=2046)
SHAPES = {  # layers, D, heads, key heads of Dream, M, V
    "deep": (6, 64, 4, 2, 192, 2048),
    "wide": (3, 160, 5, 1, 480, 4096),
}


def config(family, shape):
    L, D, H, KV, M, V = SHAPES[shape]
    if family == "llada":
        sizes = dict(d_model=D, n_layers=L, n_heads=H, n_kv_heads=H, mlp_hidden_size=M)
        return cost.LLADA | SPECIAL | sizes | dict(vocab_size=V, embedding_size=V)
    sizes = dict(hidden_size=D, num_hidden_layers=L, num_attention_heads=H, num_key_value_heads=KV)
    return cost.DREAM | SPECIAL | sizes | dict(intermediate_size=M, vocab_size=V)


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
    return m


def report(**found):
    print(json.dumps(found), flush=True)


# ------------------------------------------------------------------------------------------------- decoding


class Enough(Exception):
    """Some steps were seen."""


def decode_cases():
    for family in ("llada", "dream"):
        for shape in SHAPES:
            for dtype in ("float32", "bfloat16"):
                with WATCH:
                    m = small_model(family, shape, dtype)
                for batch, held in ((1, 2**26), (8, 2**26), (8, 2**19)):
                    measure_decoding(m, family, shape, dtype, batch, held)


def measure_decoding(m, family, shape, dtype, batch, held):
    decode.HELD, steps = held, []

    def on_step(*_):
        steps.append(0)
        if len(steps) == 2:
            raise Enough

    settings = loading.DECODERS[family] | dict(max_new_tokens=N, block_length=None, suppress=[1, 2])
    with WATCH:
        prompts = torch.randint(0, 50, (batch, P)).to("cuda")
        generators = [data.generator(0, i, device=torch.device("cuda:0")) for i in range(batch)]
        WATCH.reset()
        before = WATCH.now
        try:
            decode.generate(m, prompts, generator=generators, on_step=on_step, **settings)
        except Enough:
            pass
        peak = WATCH.peak
    mine = memory.decode_peak(m.config, batch, P, N, dtype, block=None)
    weights = memory.BYTES[dtype] * memory.count_weights(m.config)
    report(
        case=[family, shape, dtype, batch, held], measured=peak, arithmetic=mine, weights=weights, before=before,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------- training

LOSSES = {
    "tabom": lambda m, reference: dict(window=16),
    "nelbo": lambda m, reference: dict(mask=torch.ones(4, N, dtype=torch.bool, device="cuda")),
    "t3d": lambda m, reference: dict(start=torch.zeros(4, dtype=torch.long), reference=reference),
}


def train_cases():
    objectives.NllAndEntropy.AT_ONCE = 2**18 // memory.ON_GPU
    for family in ("llada", "dream"):
        for shape in SHAPES:
            for dtype in ("float32", "bfloat16"):
                for name in LOSSES:
                    for checkpointing in (False, True):
                        measure_training(family, shape, dtype, name, checkpointing, rank=8)
            measure_training(family, shape, "float32", "tabom", False, rank=0)
            measure_training(family, shape, "float32", "t3d", True, rank=0)


def measure_training(family, shape, dtype, name, checkpointing, rank, batch=4):
    g = torch.Generator().manual_seed(0)
    records = []
    for i in range(2 * batch):
        ids, order = torch.randint(0, 50, (N,), generator=g).tolist(), torch.randperm(N, generator=g).tolist()
        records.append(dict(id=i, prompt_ids=[1] * P, response_ids=ids, order=order))
    c = train.TrainOptions(model="", data="", out="", batch_size=batch, gradient_checkpointing=checkpointing)
    with WATCH:
        m = small_model(family, shape, dtype)
        again = None
        if rank:
            lora.inject(m, rank)
        else:
            again = functools.partial(small_model, family, shape, dtype)
        m.train()
        m.gradient_checkpointing = checkpointing
        weights = {name: p for name, p in m.named_parameters() if p.requires_grad}
        reference = None
        if name == "t3d":
            reference = baselines.Reference(m, again)
            reference.update()
        objective = functools.partial(objectives.OBJECTIVES[name].loss, **LOSSES[name](m, reference))
        optimizer = torch.optim.AdamW(weights.values(), lr=1e-5, fused=True)
        run = train.TrainingRun(
            c, torchrun.Processes("cuda"), loading.Loaded(m, None, None), records, [], {}, objective, None, reference,
            weights, optimizer, None, None, len(records), 1,
        )  # fmt: skip
        train.train_step(run, 0, 0, records)
        WATCH.reset()
        before = WATCH.now
        train.train_step(run, 1, 0, records)
        peak = WATCH.peak
    more = dict(objective=name, dtype=dtype, rank=rank, checkpointing=checkpointing)
    mine = memory.train_peak(m.config, batch, P, N, window=16, **more)
    size = memory.BYTES[dtype] * memory.count_weights(m.config)
    report(
        case=[family, shape, dtype, name, checkpointing, rank], measured=peak, arithmetic=mine, weights=size,
        before=before,
    )  # fmt: skip


if __name__ == "__main__":
    dict(decode=decode_cases, train=train_cases)[sys.argv[2]]()
