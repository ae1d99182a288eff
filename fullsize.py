"""What a full-size run costs: a plan from the model's config, and one step with random weights of that size.

python bench.py --plan llada-8b                   # forward passes, FLOPs and memory of the paper's experiment
python bench.py --synthetic llada-8b --out BIG    # writes, uses and removes a random checkpoint of full size
"""

import json
import math
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

import decode
import lora
import model
import objectives

LLADA = dict(model_type="llada", block_type="llama", activation_type="silu", layer_norm_type="rms", rope=True)
LLADA.update(rope_full_precision=True, include_bias=False, include_qkv_bias=False, weight_tying=False)
LLADA.update(rms_norm_eps=1e-5, rope_theta=500000.0)
DREAM = dict(model_type="Dream", hidden_act="silu", rms_norm_eps=1e-6, rope_theta=1000000.0, tie_word_embeddings=False)
FULL = {  # the configurations of the published checkpoints
    "llada-8b": LLADA
    | dict(d_model=4096, n_layers=32, n_heads=32, n_kv_heads=32, mlp_hidden_size=12288, max_sequence_length=4096)
    | dict(vocab_size=126464, embedding_size=126464, mask_token_id=126336, eos_token_id=126081, pad_token_id=126081),
    "dream-7b": DREAM
    | dict(hidden_size=3584, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4)
    | dict(intermediate_size=18944, vocab_size=152064, mask_token_id=151666, eos_token_id=151643, pad_token_id=151643),
}


# ------------------------------------------------------------------------------------------------------------- a plan


class Flash(torch.autograd.Function):
    """Attention as a fused kernel keeps it for the backward pass: inputs and output, not the [L, L] weights."""

    @staticmethod
    def forward(ctx, q, k, v):
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out)
        return out


def activations(raw, batch, length, window, rank=16, checkpointing=False):
    """Bytes that the forward pass of a TABOM step keeps for the backward pass, in bfloat16: counted on the meta device,
    which runs the real code on shapes."""
    m = lora.inject(model.empty(model.parse_config(raw)).to(torch.bfloat16), rank=rank)
    m.gradient_checkpointing = checkpointing
    weights, kept = {p.untyped_storage()._cdata for p in m.parameters()}, {}

    def pack(x):
        if x.untyped_storage()._cdata not in weights:
            kept[x.untyped_storage()._cdata] = (x.untyped_storage().nbytes(), x)
        return x

    ids = torch.zeros(batch, length, dtype=torch.long, device="meta")
    positions = torch.zeros(batch, window, dtype=torch.long, device="meta")
    attention, model.F.scaled_dot_product_attention = (
        model.F.scaled_dot_product_attention,
        lambda q, k, v, **_: Flash.apply(q, k, v),
    )
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            logp = m(ids, positions=positions).float().log_softmax(-1)
            objectives.entropy(logp)
    finally:
        model.F.scaled_dot_product_attention = attention
    return sum(size for size, _ in kept.values())


def plan(c):
    """What the paper's experiment costs on a model: every figure from its config."""
    raw = FULL[c.plan] if c.plan in FULL else model.read_json(model.resolve(c.plan) / "config.json")
    config = model.parse_config(raw)
    m = model.empty(config)
    parameters = {name: p.numel() for name, p in m.named_parameters()}
    head = config.vocab_size * config.width
    body = sum(n for name, n in parameters.items() if name.startswith("layers."))
    adapter = sum(p.numel() for p in lora.inject(m).parameters() if p.requires_grad)
    L = c.prompt_tokens + c.new_tokens
    attention = 4 * L * config.width * config.layers  # per token: q k^T and the weighted sum of v
    per_token = 2 * body + attention
    asked = (
        (min(32, c.new_tokens) + 1) / 2 if config.family == "llada" else (c.new_tokens + 1) / 2
    )  # masked, on average
    forward = L * per_token + asked * 2 * head
    passes = c.queries * c.new_tokens
    distill = passes * forward
    steps = math.ceil(c.queries / (4 * c.gpus)) * c.epochs
    # training: forward, and backward to the activations, which costs attention twice and a frozen weight once
    train = c.queries * c.epochs * (L * (2 * 2 * body + 3 * attention) + 2 * 32 * 2 * head)
    rate = c.gpus * c.tflops * 1e12
    kept = activations(raw, 4, L, 32)
    recomputed = activations(raw, 4, L, 32, checkpointing=True) + kept / config.layers  # one block at a time
    GB = 1e9
    rows = [
        ("parameters", f"{sum(parameters.values()) / 1e9:.2f} billion, {head / 1e9:.2f} in the output head"),
        ("adapter, rank 16 on q_proj and v_proj", f"{adapter / 1e6:.1f} million parameters"),
        (
            "distillation: forward passes",
            f"{passes:,} of {L} tokens ({c.queries:,} queries, {c.new_tokens} tokens each)",
        ),
        ("distillation: FLOPs", f"{forward / 1e12:.2f} T a pass, {distill / 1e18:.1f} E in all"),
        ("distillation: time", f"{distill / rate / 3600:.1f} hours on {c.gpus} GPUs at {c.tflops:g} TFLOP/s each"),
        ("training: optimizer steps", f"{steps:,} of {4 * c.gpus} examples, {c.epochs} epochs"),
        (
            "training: FLOPs",
            f"{train / 1e18:.2f} E in all: forward, and backward without gradients of the base weights",
        ),
        ("training: time", f"{train / rate / 3600:.2f} hours on {c.gpus} GPUs at {c.tflops:g} TFLOP/s each"),
        ("memory: weights in bfloat16", f"{2 * sum(parameters.values()) / GB:.1f} GB"),
        ("memory: adapter, gradients and AdamW in float32", f"{16 * adapter / GB:.2f} GB"),
        ("memory: activations at batch 4", f"{kept / GB:.1f} GB"),
        ("the same with --gradient-checkpointing", f"{recomputed / GB:.1f} GB"),
    ]
    print("\n".join([f"| {c.plan} | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows)]))
    return dict(
        model=c.plan, forward_passes=passes, distill_flops=distill, train_flops=train, adapter_parameters=adapter
    )


# ------------------------------------------------------------------------------------------- a checkpoint of full size


def synthetic(c):
    """Write a random bfloat16 checkpoint of full size, load and use it in a fresh process, and remove it."""
    folder = Path(c.out or f"out/{c.synthetic}")
    if folder.exists():
        raise FileExistsError(f"{folder} is there already: choose another --out")
    raw = FULL[c.synthetic]
    m = model.empty(model.parse_config(raw))
    size = 2 * sum(p.numel() for p in m.parameters())
    folder.mkdir(parents=True)
    try:
        free = shutil.disk_usage(folder).free
        if free < 1.1 * size:
            raise OSError(f"{folder}: {free / 1e9:.1f} GB free, and the checkpoint has {size / 1e9:.1f} GB")
        print(f"writing {size / 1e9:.1f} GB to {folder}", file=sys.stderr)
        write_random(m, raw, folder)
        env = {**os.environ, "OMP_NUM_THREADS": str(c.threads)}
        done = subprocess.run([sys.executable, __file__, folder, str(size)], stdout=subprocess.PIPE, text=True, env=env)
        if done.returncode:
            raise RuntimeError(f"the process that loads it ended with status {done.returncode}")
        return dict(model=c.synthetic, **json.loads(done.stdout.splitlines()[-1]))
    finally:
        shutil.rmtree(folder)


def write_random(m, raw, folder):
    """A shard for each layer and one for the rest; every tensor a piece of the same random numbers."""
    noise = torch.empty(2**24).normal_(std=0.02, generator=torch.Generator().manual_seed(0)).bfloat16()
    shards, index = {}, {}
    for name, p in m.named_parameters():
        parts = name.split(".")
        shards.setdefault(f"model-{parts[1] if parts[0] == 'layers' else 'rest'}.safetensors", []).append((name, p))
    for file, members in shards.items():
        tensors = {}
        for name, p in members:
            repeats = -(-p.numel() // len(noise))
            random = noise.roll(len(index)).repeat(repeats)[: p.numel()].view(p.shape).clone()
            tensors[m.checkpoint_name(name)] = torch.ones_like(random) if p.ndim == 1 else random
            index[m.checkpoint_name(name)] = file
        save_file(tensors, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps(dict(metadata={}, weight_map=index)))
    (folder / "config.json").write_text(json.dumps(raw))


def use(folder, size):
    """Load a checkpoint, decode one step and train one step of TABOM at a short length -> times and peak memory."""
    times, begun = {}, time.perf_counter()

    def lap(name):
        nonlocal begun
        times[name] = round(time.perf_counter() - begun, 1)
        begun = time.perf_counter()

    resident()
    m = model.load(folder, dtype=torch.bfloat16)
    lap("load_s")
    loaded = peak_resident()
    prompt = torch.arange(16)[None]
    t = decode.generate(m, prompt, max_new_tokens=16, steps=1)
    lap("decode_step_s")
    lora.inject(m)
    weights = [p for p in m.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-4)
    batch = dict(prompt_ids=prompt, prompt_mask=torch.ones_like(prompt), response_ids=t.response, order=t.order)
    out = objectives.tabom(m, batch | dict(length=torch.tensor([16])), window=8)
    out["loss"].backward()
    optimizer.step()
    lap("train_step_s")
    peak = peak_resident()
    return dict(
        size_gb=round(size / 1e9, 2),
        load_peak_gb=round(loaded / 1e9, 2),
        load_peak_ratio=round(loaded / size, 3),
        peak_gb=round(peak / 1e9, 2),
        **times,
        loss=out["loss"].item(),
    )


def resident():
    """Bytes that this process holds now; from here on the peak counts anew where the kernel allows it (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return peak_resident()


def peak_resident():
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":  # the fresh process of synthetic()
    print(json.dumps(use(sys.argv[1], int(sys.argv[2]))))
