"""Step 2: the training loop, on one process or many. It trains an adapter (or all weights) along trajectories.

    torchrun --nproc_per_node 8 tabom.py train --model GSAI-ML/LLaDA-8B-Instruct --data out/T --out out/R

Section 4 and the appendices of the paper: LoRA on q_proj and v_proj, AdamW, linear warm-up, cosine decay, a checkpoint
per epoch. What is minimised is one of objectives.py.

One optimizer step sees the same examples, windows and gradient whatever the number of processes: each takes every
count-th example of the global batch, sums its share of the mean loss, and the gradients are added up. (The noise of
dropout is the exception: it differs with the split.) A run that is killed continues from its last checkpoint with the
same batches, bit for bit on a CPU.
"""

import contextlib
import dataclasses
import functools
import hashlib
import inspect
import json
import math
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import data
import lora
import objectives
import runs
from options import flag, name_list, opt

# ---------------------------------------------------------------------------------------------------------- options


def of_some(name, help, **more):
    """The option for a parameter of some objectives: None = each objective's own default, which the help shows."""
    own = []
    for objective, function in objectives.OBJECTIVES.items():
        parameters = inspect.signature(function).parameters
        if name in parameters:
            own.append(f"{objective} {parameters[name].default}")
    return opt(None, f"{help} (default: {', '.join(own)})", own_default=True, **more)


def window_size(text):
    return text if text == "global" else int(text)


SOURCES = ", ".join(f"{k} ({inspect.getdoc(f).split(':')[0]})" for k, f in objectives.OBJECTIVES.items())


@dataclass
class TrainOptions(runs.ModelOptions, runs.DatasetOptions):
    """training"""

    data: str = opt(None, "trajectories from distill; for nelbo also a dataset with answers (SFT-GT)", required=True)
    out: str = opt(None, "folder for checkpoints and metrics; an unfinished run is continued", required=True)
    adapter: str | None = opt(None, "adapter folder to start from, instead of a new adapter")
    objective: str = opt("tabom", f"what to train: {SOURCES}", choices=tuple(objectives.OBJECTIVES))
    window: int | str | None = of_some("window", "W: consecutively decoded tokens, or global", parse=window_size)
    margin: float | None = of_some("margin", "gamma of the ranking loss, nats", low=0)
    weight: float | None = of_some("weight", "lambda: weight of the ranking loss, or of the certainty", low=0)
    ce_weight: float | None = of_some("ce_weight", "weight of the cross-entropy; 0 = ranking alone", low=0)
    entropy_context: str | None = of_some(
        "entropy_context", "entropies given the window's start, or each token's own step", choices=("window", "step")
    )
    alpha: float | None = of_some("alpha", "weight of the reference's own tokens", low=0)
    beta: float | None = of_some("beta", "sharpness of the preference", low=0)
    path_weight: float | None = of_some("path_weight", "weight of the path consistency", low=0)
    random_tokens: float | None = of_some("random_tokens", "share of the masks that show a random token", low=0, high=1)
    reference_steps: int = opt(10, "t3d: the student becomes the reference every so many steps", low=1)
    block_length: int | None = of_some("block_length", "tokens of a block", low=1)
    temperature: float | None = of_some("temperature", "of the entropy that is the certainty", low=0.01)
    keep: str = opt(
        "correct", "trajectories to train on (correct: or not checkable)", choices=("correct", "finished", "all")
    )
    keep_eos: bool = opt(False, "keep the tokens after the first EOS")
    lora_rank: int = opt(16, "0 = train all weights", low=0)
    lora_alpha: int = opt(16, "the adapter counts alpha / rank times", low=0)
    lora_dropout: float = opt(0.0, "dropout before the adapter", low=0)
    lora_targets: tuple = opt(("q_proj", "v_proj"), "layers with an adapter, comma-separated", parse=name_list)
    epochs: int = opt(5, "passes over the data; a checkpoint after each", low=1)
    stop_after: int | None = opt(None, "stop after so many of the epochs; the learning rate falls over all", low=1)
    save_every: int = opt(0, "optimizer steps between further checkpoints; 0 = none", low=0)
    keep_last: int = opt(1, "keep so many of those; those of epochs are always kept", low=1)
    skip_nonfinite: bool = opt(False, "drop a step whose loss is not finite, instead of stopping")
    global_batch: int | None = opt(None, "examples per optimizer step, over all processes (4 per process)", low=1)
    batch_size: int = opt(4, "examples per forward pass on each process; the rest accumulates", low=1)
    lr: float = opt(2e-5, "peak learning rate", low=0)
    final_lr: float = opt(0.0, "learning rate at the end of the cosine", low=0)
    warmup: int = opt(50, "steps of linear warm-up", low=0)
    weight_decay: float = opt(0.0, "of AdamW", low=0)
    clip: float = opt(1.0, "largest gradient norm; 0 = no clipping", low=0)
    gradient_checkpointing: bool = opt(False, "recompute activations: less memory, more time")


def objective_parameters(c):
    """The parameters of the objective that c (TrainOptions) names: those given and its own defaults; and the names of
    the options that are given and not used.

    Raises ValueError for a window without pairs, or without an adapter where one is needed."""
    parameters = inspect.signature(objectives.OBJECTIVES[c.objective]).parameters
    used, unused = {}, []
    for f in dataclasses.fields(TrainOptions):
        given = getattr(c, f.name)
        if "own_default" not in f.metadata:
            continue
        if f.name in parameters:
            used[f.name] = parameters[f.name].default if given is None else given
        elif given is not None:
            unused.append(f.name)
    if c.objective != "t3d" and c.reference_steps != TrainOptions.reference_steps:
        unused.append("reference_steps")
    window = used.get("window", "global")
    if window != "global" and window < 2:
        raise ValueError(f"--window {window}: needs at least 2 tokens (one has no pair to rank), or global")
    if c.lora_rank == 0 and (c.objective == "t3d" or c.adapter):
        needs = "--adapter" if c.adapter else "t3d"
        raise ValueError(f"--lora-rank 0 trains no adapter, and {needs} needs one: give --lora-rank above 0")
    return used, unused


# --------------------------------------------------------------------------------------------------------- the loop


@dataclass
class Run:
    """A training run between two of its steps."""

    c: TrainOptions
    processes: runs.Processes
    loaded: runs.Loaded
    records: list  # what to train on, sorted by id
    objective: Any  # a function of the model, a batch and generators
    weights: dict  # name -> parameter that is trained
    optimizer: torch.optim.Optimizer
    reference: Any  # T3D's, else None
    out: Path
    last: Path | None  # the latest checkpoint
    global_batch: int  # examples of an optimizer step
    steps_per_epoch: int
    total: int  # optimizer steps of all epochs, over which the learning rate falls
    end: int  # the step after which this call stops
    done: int = 0  # steps that the checkpoint knows


def train(c, processes=None, loaded=None):
    """Train an adapter (or, with --lora-rank 0, all weights) -> the last metrics and the last checkpoint.

    The same command continues a run that was stopped. c: TrainOptions. loaded: a runs.Loaded of c.model that gets the
    adapter, or has one that --adapter or a checkpoint overwrites; all weights are always loaded anew. Raises ValueError
    for data that cannot be trained on, and where a loss is not finite; FileExistsError for a folder that holds another
    run."""
    run = prepare(c, processes or runs.Processes(c.device), loaded)
    first, metrics = run.processes.first, last_metrics(run)
    with (
        open(run.out / "metrics.jsonl", "a", encoding="utf-8") if first else contextlib.nullcontext() as log,
        tqdm(total=run.end, initial=run.done, desc="train", unit="step", disable=not run.processes.shows) as bar,
        runs.stop_signals() as signals,
    ):
        for step in range(run.done, run.end):
            epoch, i = divmod(step, run.steps_per_epoch)
            metrics = train_step(run, step, epoch, global_batch_of(run, epoch, i))
            if run.reference is not None and (step + 1) % c.reference_steps == 0:
                run.reference.update()
            if first:
                log.write(json.dumps(metrics) + "\n")
                log.flush()
                show(bar, metrics)
            stop = run.processes.sum([len(signals)])[0] > 0  # one process was asked to stop: all do, after this step
            whole = i == run.steps_per_epoch - 1
            if whole or stop or (c.save_every and (step + 1) % c.save_every == 0):
                save(run, step + 1, f"epoch-{epoch + 1}" if whole else f"step-{step + 1}")
            if stop and step + 1 < run.end:
                raise KeyboardInterrupt
    steps = max(run.done, run.end)
    return dict(out=str(run.out), checkpoint=str(run.last), steps=steps, examples=len(run.records), **metrics)


def prepare(c, processes, loaded=None):
    """The Run that c describes, new or as its last checkpoint left it. Writes nothing before all is checked."""
    parameters, unused = objective_parameters(c)
    last = runs.last_checkpoint(Path(c.out))
    full = c.lora_rank == 0
    prefer = "float32" if full else "auto"  # bfloat16 is too coarse for AdamW's small steps
    if loaded is None or full:
        loaded = runs.load_model(c, processes, weights=last if full else None, dtype=prefer)
    records = training_records(c, loaded)
    global_batch = c.global_batch or 4 * processes.count
    steps_per_epoch = math.ceil(len(records) / global_batch)
    total = c.epochs * steps_per_epoch

    meta = dict(identity(c, records), **parameters, **runs.identity(loaded.folder, c.adapter))
    meta.update(dtype=runs.resolve_dtype(c, processes, prefer), global_batch=global_batch)
    by_content = ("model", "data", "adapter")  # these may be elsewhere, if they are the same
    runs.same_run(c.out, meta, by_content)  # before a checkpoint is read that need not fit
    weights = trainable(c, loaded.m, last)
    objective = functools.partial(objectives.OBJECTIVES[c.objective], **parameters)
    reference = None
    if c.objective == "t3d":  # the student as it was: as it starts, then as of every reference_steps-th step
        reference = lora.Reference(loaded.m)
        objective = functools.partial(objective, reference=reference)
        if c.adapter:
            reference.update()
    fused = processes.device.type == "cuda"
    optimizer = torch.optim.AdamW(weights.values(), lr=c.lr, weight_decay=c.weight_decay, fused=fused)

    out = runs.open_run(c.out, meta, processes, by_content)
    if processes.first:
        warn(c, total, unused)
    loaded.m.train()
    loaded.m.gradient_checkpointing = c.gradient_checkpointing
    done = 0 if last is None else runs.restore(last, weights, optimizer, reference)
    if processes.first:
        runs.keep_lines(out / "metrics.jsonl", done)  # a kill may have left lines of steps that are made again
    processes.barrier()
    end = min(total, (c.stop_after or c.epochs) * steps_per_epoch)
    return Run(
        c, processes, loaded, records, objective, weights, optimizer, reference, out, last, global_batch,
        steps_per_epoch, total, end, done,
    )  # fmt: skip


def trainable(c, m, last):
    """The weights to train, by name: all of them, or those of an adapter, new or as in a checkpoint."""
    if c.lora_rank == 0:
        m.requires_grad_(True)
    else:
        overwritten = lora.layers(m) and (last or c.adapter)
        if not overwritten:
            start = data.generator(c.seed, "lora")
            lora.inject(m, c.lora_rank, c.lora_alpha, c.lora_targets, c.lora_dropout, start)
        if last or c.adapter:
            lora.load(m, last or c.adapter)
        if any(layer.alpha != c.lora_alpha for layer in lora.layers(m).values()):
            raise ValueError(f"{c.adapter}: its lora_alpha differs from --lora-alpha {c.lora_alpha}")
    return {name: p for name, p in m.named_parameters() if p.requires_grad}


# What changes nothing in what a run computes, and may differ when it is continued.
FREE = ("out", "device", "batch_size", "gradient_checkpointing", "compile", "save_every", "keep_last", "stop_after")


def identity(c, records):
    """What a training run is, for its meta.json: its options, but for FREE and those of its objective, and the data by
    their content."""
    settings = {}
    for f in dataclasses.fields(c):
        if f.name not in FREE and "own_default" not in f.metadata:
            settings[f.name] = getattr(c, f.name)
    sha256 = hashlib.sha256(json.dumps(records).encode()).hexdigest()
    return dict(command="train", **settings, examples=len(records), data_sha256=sha256, versions=runs.versions())


def warn(c, total, unused):
    if c.warmup >= total:
        tqdm.write(f"warning: {c.warmup} warm-up steps, but {total} in all: the peak --lr is never reached", sys.stderr)
    if unused:
        flags = ", ".join(map(flag, unused))
        tqdm.write(f"warning: {flags}: not used by --objective {c.objective}", sys.stderr)


def last_metrics(run):
    """The last line of a run that has nothing left to do; else empty."""
    if run.done < run.end:
        return {}
    for _, row in data.read_rows(run.out / "metrics.jsonl"):
        last = row
    return last


def show(bar, metrics):
    loss = "none" if metrics["loss"] is None else f"{metrics['loss']:.3f}"
    bar.set_postfix_str(f"loss {loss}, {metrics['tokens_per_second']:.0f} tokens/s")
    bar.update()


def save(run, step, name):
    """Write a checkpoint of the run after `step` steps, and forget old ones between epochs."""
    run.last = run.out / name
    if run.processes.first:
        shutil.rmtree(run.last, ignore_errors=True)  # it can only be a damaged one
        with runs.atomic_folder(run.last) as beside:
            runs.write_checkpoint(beside, run.loaded, run.c.model, run.weights, run.optimizer, step, run.reference)
        runs.prune(run.out, run.c.keep_last)
    run.processes.barrier()


# ------------------------------------------------------------------------------------------------------------- steps


epoch_order = functools.lru_cache(maxsize=1)(data.epoch_order)


def global_batch_of(run, epoch, i):
    """The records of the i-th global batch of an epoch: the same whatever the number of processes."""
    order = epoch_order(len(run.records), run.c.seed, epoch)
    return [run.records[k] for k in order[i * run.global_batch : (i + 1) * run.global_batch]]


def train_step(run, step, epoch, chosen):
    """One optimizer step on the records of a global batch -> its line of metrics.jsonl."""
    begun, c, processes = time.time(), run.c, run.processes
    torch.manual_seed(data.generator(c.seed, step, processes.index, "dropout").initial_seed())

    # 1. this process's share of the mean loss over the global batch, and its gradient
    sums, tokens = {}, 0
    mine = sorted(chosen[processes.index :: processes.count], key=length)  # little padding in a forward pass
    for i in range(0, len(mine), c.batch_size):
        records = mine[i : i + c.batch_size]
        generators = [data.generator(c.seed, epoch, r["id"]) for r in records]
        losses = run.objective(run.loaded.m, runs.batch_of(records, run.loaded, processes), generator=generators)
        share = len(records) / len(chosen)
        (losses["loss"] * share).backward()
        for name, value in losses.items():
            sums[name] = sums.get(name, 0.0) + value.item() * share
        tokens += sum(map(length, records))

    # 2. the sums over all processes
    names = dict.fromkeys(processes.gather(sums))  # a process without an example knows no names
    *means, tokens = processes.sum([*(sums.get(name, 0.0) for name in names), tokens])
    weights = list(run.weights.values())
    processes.sum_gradients(weights)

    # 3. the step
    lr = learning_rate(step, run.total, c)
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    norm = torch.nn.utils.clip_grad_norm_(weights, c.clip or math.inf).item()
    metrics = dict(step=step + 1, epoch=epoch + 1, **dict(zip(names, means)), grad_norm=norm, lr=lr)
    metrics["tokens_per_second"] = round(tokens / (time.time() - begun), 1)
    if math.isfinite(metrics["loss"] + norm):
        run.optimizer.step()
    else:
        metrics = without_step(run, metrics, chosen)
    run.optimizer.zero_grad(set_to_none=True)
    return metrics


def length(record):
    return len(record["prompt_ids"]) + len(record["response_ids"])


def without_step(run, metrics, chosen):
    """The metrics of a step whose loss or gradient is not finite and which is left out, None for what is not finite.

    Raises ValueError without --skip-nonfinite."""
    what = f"loss {metrics['loss']} and gradient norm {metrics['grad_norm']} at step {metrics['step']}"
    what = f"{what}, examples {[r['id'] for r in chosen]}"
    if not run.c.skip_nonfinite:
        raise ValueError(f"{what}; last good checkpoint: {run.last}")
    if run.processes.first:
        tqdm.write(f"warning: {what}: the step is dropped", sys.stderr)
    return {k: v if math.isfinite(v) else None for k, v in metrics.items()}


def learning_rate(step, total, c):
    """Linear warm-up to the peak, then a cosine to the final rate; step counts from 0."""
    if step < c.warmup:
        return c.lr * (step + 1) / c.warmup
    done = (step - c.warmup) / max(total - c.warmup, 1)
    return c.final_lr + (c.lr - c.final_lr) * (1 + math.cos(math.pi * done)) / 2


# -------------------------------------------------------------------------------------------------- what to train on


def training_records(c, loaded):
    """What to train on, sorted by id: the usable trajectories, cut at their first EOS, or a dataset's prompts with
    their answers, as dicts of id, prompt_ids, response_ids and order (None for an answer)."""
    path = Path(c.data)
    if data.holds_trajectories(path):
        kept = usable_trajectories(c, path, loaded.m.config)
    elif c.objective == "nelbo":
        kept = reference_answers(c, path, loaded.tok)
    else:
        raise ValueError(f"{path} has no trajectories, and {c.objective} needs them: distill, or --objective nelbo")
    return [{k: r.get(k) for k in ("id", "prompt_ids", "response_ids", "order")} for r in kept]


def usable_trajectories(c, path, config):
    """The trajectories that --keep lets through. Raises ValueError where none is left, or for another vocabulary."""
    rows = config.vocab_size
    records = data.read_trajectories(path, rows)[: c.limit]
    meta = data.read_json(path / "meta.json") if (path / "meta.json").is_file() else {}
    if meta.get("vocab_size", rows) != rows:
        raise ValueError(f"{path}: made with a vocabulary of {meta['vocab_size']}; {c.model} has {rows}")
    kept = [r for r in records if data.usable(r, c.keep)]
    if not kept:
        finished = sum(bool(r.get("finished")) for r in records)
        wrong = sum(r.get("correct") is False for r in records)
        raise ValueError(f"{path}: --keep {c.keep} keeps none of {len(records)} ({finished} finished, {wrong} wrong)")
    return kept if c.keep_eos else [data.cut_at_eos(r, config.eos_id) for r in kept]


def reference_answers(c, path, tok):
    """The prompts and answers of a dataset as records to train on, without an order. Of several right answers the first
    is taken. Raises ValueError for a row without an answer."""
    examples = data.read_examples(path, c.prompt_field, c.answer_field, c.limit)
    bare = [e["id"] for e in examples if e["answer"] is None]
    if bare:
        raise ValueError(f"{path}: {len(bare)} rows have no answer to train on, the first is id {bare[0]}")
    for e in examples:
        e["prompt_ids"] = data.encode_prompt(tok, e["messages"], c.raw)
        answer = e["answer"][0] if isinstance(e["answer"], list) else e["answer"]
        e["response_ids"] = data.encode_answer(tok, e["messages"], answer, c.raw)
    return examples
