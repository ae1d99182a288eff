"""What the paper's experiment costs on a model: passes, FLOPs, hours and memory, from its config.

    python -m experiments.cost llada-8b                    # or dream-7b, a model folder, a Hub repo id
    python -m experiments.cost dream-7b --gpus 4 --tflops 300 --epochs 3 --batch 8
    python -m experiments.cost a2d-0.6b --block-causal 32 --gpus 1 --tflops 40

    python -m experiments.cost dream-7b --batch-size 1,4,16 --objective t3d

Nothing is run: parameters are counted on torch's meta device, which has shapes and no storage, and
memory is arithmetic (experiments/memory.py). --tflops is an assumption about the GPU and not a
measurement; so are the hours that follow from it. The second table has the peaks of memory by
--batch-size, the number of rows in a forward pass, and the most rows that fit on a card. It does not
have what a kernel takes inside, nor the CUDA context: a card of 24 GB has 24 GiB, 7 % more than the
24 GB of this table, and that is left to them.

Dimensions: L length (prompt and response), n tokens of a training pass.
"""

import argparse
import dataclasses
import functools
import json
import math
import sys

import data
import lora
import model
from experiments import memory
from runs import loading
from runs.options import number_list

LLADA = dict(model_type="llada", block_type="llama", activation_type="silu", layer_norm_type="rms")
LLADA.update(rms_norm_eps=1e-5, rope=True, rope_full_precision=True, rope_theta=500000.0)
LLADA.update(include_bias=False, include_qkv_bias=False, weight_tying=False)
DREAM = dict(model_type="Dream", hidden_act="silu", rms_norm_eps=1e-6, rope_theta=1000000.0)
DREAM.update(tie_word_embeddings=False)
QWEN3 = dict(hidden_act="silu", rms_norm_eps=1e-6, rope_theta=1000000, head_dim=128, num_key_value_heads=8)
QWEN3.update(vocab_size=151936)
SDAR = QWEN3 | dict(model_type="sdar", tie_word_embeddings=False, eos_token_id=151643)
FULL = {  # the configurations of the published checkpoints
    "llada-8b": LLADA
    | dict(d_model=4096, n_layers=32, n_heads=32, n_kv_heads=32, mlp_hidden_size=12288)
    | dict(vocab_size=126464, embedding_size=126464, max_sequence_length=4096)
    | dict(mask_token_id=126336, eos_token_id=126081, pad_token_id=126081),
    "dream-7b": DREAM
    | dict(hidden_size=3584, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4)
    | dict(intermediate_size=18944, vocab_size=152064)
    | dict(mask_token_id=151666, eos_token_id=151643, pad_token_id=151643),
    "a2d-0.6b": QWEN3
    | dict(model_type="a2d-qwen3", tie_word_embeddings=True, eos_token_id=151645, pad_token_id=151643)
    | dict(hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16),
    "sdar-1.7b": SDAR | dict(hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16),
    "sdar-4b": SDAR | dict(hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32),
    "sdar-8b": SDAR | dict(hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32),
}
RANK = 16  # of the adapter (Section 4 of the paper)
CARDS = (24, 40, 80)  # GB of memory

# -------------------------------------------------------------------------------------------- FLOPs


def count_parameters(config):
    """Parameters: dict(all, body: in the blocks, head, adapter: on q_proj and v_proj)."""
    m = model.empty(config)
    body = everything = 0
    for name, p in m.named_parameters():
        everything += p.numel()
        if name.startswith("layers."):
            body += p.numel()
    adapter = sum(p.numel() for p in lora.inject(m, rank=RANK).parameters() if p.requires_grad)
    return {"all": everything, "body": body, "head": config.vocab_size * config.width, "adapter": adapter}


def count_work(c, config, parameters):
    """Passes of the distillation, and FLOPs: dict(passes, per_pass, distill, train)."""
    L, body = c.prompt_tokens + c.new_tokens, 2 * parameters["body"]
    # Of each token, layer and key: q k^T and weights v, 2 FLOPs for each of H E numbers.
    per_key = 2 * 2 * model.empty(config).layers[0].attn.q_proj.out_features * config.layers

    # 1. Distillation, one token a step: the head runs on what is masked, on average half of a block.
    block = config.block_length or loading.DECODERS.get(config.family, {}).get("block_length") or c.new_tokens
    block = min(block, c.new_tokens)
    passes = c.queries * c.new_tokens
    if config.block_length is None:
        computed = L * (body + L * per_key)  # all tokens see all
    else:
        # Finished blocks are in the cache: a step computes its block, and the first of a block the
        # one before it too (the first of all the prompt). On average they see half of the response.
        tokens = block + 1 + c.prompt_tokens / c.new_tokens
        computed = tokens * (body + (c.prompt_tokens + c.new_tokens / 2) * per_key)
    per_pass = computed + (block + 1) / 2 * 2 * parameters["head"]

    # 2. Training: forward, and backward to the activations: attention twice, a frozen weight once.
    # Block-causal attention has the response twice, with masks and without.
    n = L if config.block_length is None else L + c.new_tokens
    per_example = n * (2 * body + 3 * n * per_key)
    per_example += c.window * 2 * 2 * parameters["head"]
    train = c.queries * c.epochs * per_example
    return dict(passes=passes, per_pass=per_pass, distill=passes * per_pass, train=train)


def count_hours(c, work, gpus):
    """Hours of both steps on so many GPUs, and the optimizer steps: dict(distill, train, steps)."""
    rate = gpus * c.tflops * 1e12 * 3600  # FLOPs an hour
    steps = math.ceil(c.queries / (c.batch * gpus)) * c.epochs
    return dict(distill=work["distill"] / rate, train=work["train"] / rate, steps=steps)


# ----------------------------------------------------------------------------------------- the plan


def plan(c):
    """What the paper's experiment costs on a model: prints a table -> the same figures. c: see
    command_line.

    Raises ValueError for a config that model.py does not read, FileNotFoundError for no model."""
    raw = FULL.get(c.model)
    if raw is None:
        raw = data.read_json(model.resolve(c.model) / "config.json")
    config = model.parse_config(raw)
    if c.block_causal is not None:
        if config.grid is None:
            raise ValueError(f"--block-causal {c.block_causal}: {config.family} models see everything; leave it out")
        config = dataclasses.replace(config, block_length=c.block_causal)
    parameters = count_parameters(config)
    work = count_work(c, config, parameters)
    L = c.prompt_tokens + c.new_tokens
    sizes = (config, c.batch, c.prompt_tokens, c.new_tokens, c.window)
    kept, recomputed = memory.activations(*sizes), memory.activations(*sizes, checkpointing=True)
    hours = {}
    for gpus in c.gpus:
        hours[str(gpus)] = count_hours(c, work, gpus)

    whole, head, adapter = parameters["all"], parameters["head"], parameters["adapter"]
    queries = f"{c.queries:,} queries, {c.new_tokens} tokens each"
    tera, exa = work["per_pass"] / 1e12, work["distill"] / 1e18
    epochs = f"{c.epochs} epochs, without gradients of the base weights"
    rows = {
        "parameters": f"{whole / 1e9:.2f} billion, {head / 1e9:.2f} in the output head",
        f"adapter, rank {RANK} on q_proj and v_proj": f"{adapter / 1e6:.1f} million parameters",
        "distillation: forward passes": f"{work['passes']:,} of {L} tokens ({queries})",
        "distillation: FLOPs": f"{tera:.2f} T a pass, {exa:.1f} E in all",
        "training: FLOPs": f"{work['train'] / 1e18:.2f} E in {epochs}",
    }
    for gpus, h in hours.items():
        place = f"on {gpus} GPUs at {c.tflops:g} TFLOP/s each"
        rows[f"distillation {place}"] = f"{h['distill']:.2f} hours"
        steps = f"{h['steps']:,} optimizer steps of {c.batch * int(gpus)} examples"
        rows[f"training {place}"] = f"{h['train']:.2f} hours, {steps}"
    rows["memory: weights in bfloat16"] = f"{2 * whole / 1e9:.1f} GB"
    rows["memory: adapter, gradients and AdamW in float32"] = f"{16 * adapter / 1e9:.2f} GB"
    rows[f"memory: activations at batch {c.batch}"] = f"{kept / 1e9:.1f} GB"
    rows["the same with --gradient-checkpointing"] = f"{recomputed / 1e9:.1f} GB"
    rows["memory: full fine-tuning instead, weights, gradients and AdamW in float32"] = f"{16 * whole / 1e9:.1f} GB"
    for gpus in c.gpus:
        if gpus > 1:
            rows[f"the same on each GPU, sharded over {gpus}"] = f"{16 * whole / 1e9 / gpus:.1f} GB"
    print(f"| {c.model} | |\n| --- | --- |")
    for name, value in rows.items():
        print(f"| {name} | {value} |")
    peaks, fits = print_peaks(c, config)
    return dict(
        model=c.model,
        forward_passes=work["passes"],
        distill_flops=work["distill"],
        train_flops=work["train"],
        adapter_parameters=parameters["adapter"],
        hours=hours,
        peak_gb=peaks,
        fits=fits,
    )


def peak_functions(c, config):
    """What takes memory -> a function of the batch size, in bytes."""
    sizes = dict(prompt=c.prompt_tokens, new=c.new_tokens)
    train = functools.partial(memory.train_peak, config, **sizes, window=c.window, objective=c.objective)
    return {
        "decoding": functools.partial(memory.decode_peak, config, **sizes),
        "training": functools.partial(train, rank=RANK),
        "with --gradient-checkpointing": functools.partial(train, rank=RANK, checkpointing=True),
        "all weights, in float32, with it": functools.partial(train, rank=0, dtype="float32", checkpointing=True),
    }


def print_peaks(c, config):
    """A table of the peaks of memory, by batch size, and of what fits on a card -> both: name -> number -> GB, and
    name -> GB of the card -> rows of a forward pass."""
    functions, peaks, fits = peak_functions(c, config), {}, {}
    for name, peak in functions.items():
        peaks[name] = {str(batch): round(peak(batch) / 1e9, 2) for batch in c.batch_size}
        fits[name] = {str(card): largest_batch(peak, card * 1e9) for card in CARDS}
    print(f"\n| peak memory, {c.objective} | {' | '.join(functions)} |\n| --- |{' --- |' * len(functions)}")
    for batch in map(str, c.batch_size):
        print(f"| --batch-size {batch} | {' | '.join(f'{peaks[name][batch]:.1f} GB' for name in functions)} |")
    for card in map(str, CARDS):
        print(f"| fits on {card} GB | {' | '.join(str(fits[name][card] or 'none') for name in functions)} |")
    return peaks, fits


def largest_batch(peak, limit, most=4096):
    """The largest batch size up to `most` whose peak is within the limit, bytes; 0 = none is."""
    low, high = 0, most + 1  # what fits, and what does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if peak(middle) <= limit else (low, middle)
    return low


# ------------------------------------------------------------------------------------- command line


def command_line():
    """The parser of this command."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.cost", description=__doc__.split("\n")[0], allow_abbrev=False
    )
    parser.add_argument("model", help=f"{', '.join(FULL)}, a model folder, or a Hub repo id")
    number = functools.partial(parser.add_argument, type=int)
    number("--queries", default=12000, help="prompts distilled and trained on (12000)")
    number("--prompt-tokens", default=256, help="of a prompt (256)")
    number("--new-tokens", default=256, help="of a response, which are its decoding steps (256)")
    number("--window", default=32, help="W of the training (32)")
    number("--epochs", default=5, help="of the training (5)")
    blocks = "block length of block-causal attention (the model's own; A2D's BD3LM models need it)"
    number("--block-causal", help=blocks)
    number("--batch", default=4, help="examples of an optimizer step on each GPU (4)")
    sizes = "rows of a forward pass, whose peaks of memory are asked for, comma-separated (1,4,16,64)"
    parser.add_argument("--batch-size", type=number_list, default=(1, 4, 16, 64), help=sizes)
    parser.add_argument("--objective", choices=memory.OBJECTIVES, default="tabom", help="of the peaks (tabom)")
    gpus = "numbers of GPUs, comma-separated (4,8)"
    parser.add_argument("--gpus", type=number_list, default=(4, 8), help=gpus)
    tflops = "what a GPU really reaches, an assumption (400)"
    parser.add_argument("--tflops", type=float, default=400.0, help=tflops)
    return parser


def check_positive(c):
    """Raises ValueError for a number that is not above 0 or not finite."""
    for name, given in vars(c).items():
        for value in given if isinstance(given, tuple) else (given,):
            if isinstance(value, (int, float)) and not 0 < value < math.inf:
                raise ValueError(f"--{name.replace('_', '-')} {value}: must be a number above 0")


def main(argv=None):
    """The command line -> exit status."""
    c = command_line().parse_args(argv)
    try:
        check_positive(c)
        result = plan(c)
    except (ValueError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
