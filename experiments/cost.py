"""What the paper's experiment costs on a model: forward passes, FLOPs, hours and memory, derived from its config.

    python -m experiments.cost llada-8b                    # or dream-7b, a model folder, a Hub repo id
    python -m experiments.cost dream-7b --gpus 4 --tflops 300

--tflops is an assumption about the GPU and not a measurement.
"""

import argparse
import json
import math
import sys

import torch

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
    raw = FULL[c.model] if c.model in FULL else model.read_json(model.resolve(c.model) / "config.json")
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
    print("\n".join([f"| {c.model} | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows)]))
    return dict(
        model=c.model, forward_passes=passes, distill_flops=distill, train_flops=train, adapter_parameters=adapter
    )


# ------------------------------------------------------------------------------------------------------- command line


def command_line():
    parser = argparse.ArgumentParser(prog="python -m experiments.cost", description=__doc__.split("\n")[0])
    parser.add_argument("model", help=f"{', '.join(FULL)}, a model folder, or a Hub repo id")
    parser.add_argument("--queries", type=int, default=12000, help="prompts distilled and trained on")
    parser.add_argument("--prompt-tokens", type=int, default=256, help="of a prompt")
    parser.add_argument("--new-tokens", type=int, default=256, help="of a response, which are also its decoding steps")
    parser.add_argument("--epochs", type=int, default=5, help="of the training")
    parser.add_argument("--gpus", type=int, default=8)
    parser.add_argument("--tflops", type=float, default=400.0, help="what one GPU really reaches: an assumption")
    return parser


def main(argv=None):
    c = command_line().parse_args(argv)
    try:
        for name, value in vars(c).items():
            if isinstance(value, (int, float)) and not value > 0:
                raise ValueError(f"--{name.replace('_', '-')} {value}: must be above 0")
        print(json.dumps(plan(c)))
    except (ValueError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
