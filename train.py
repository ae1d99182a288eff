"""Step 2: the training loop, on one process or many. It trains an adapter (or all weights) along trajectories.

    torchrun --nproc_per_node 8 tabom.py train --model GSAI-ML/LLaDA-8B-Instruct --data out/T --out out/R

Section 4 and the appendices of the paper: LoRA on q_proj and v_proj, AdamW, linear warm-up, cosine decay, a checkpoint
per epoch. What is minimised is an entry of objectives.OBJECTIVES. To read: train(), train_step(), prepare().

One optimizer step sees the same examples, windows and gradient whatever the number of processes: each takes every
count-th example of the global batch, sums its share of the mean loss, and the gradients are added up. (The noise of
dropout is the exception: it differs with the split.) A run that is killed continues from its last checkpoint with the
same batches, bit for bit on a CPU.
"""

import contextlib
import dataclasses
import functools
import json
import math
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

import data
import distill
import model
import objectives
from release import recipes
from runs import adapters, disk, loading, logs, objective_options, resume, shard, torchrun
from runs.options import flag, name_list, opt
from runs.records import training_records


@dataclass
class TrainOptions(
    loading.GridOptions, objective_options.ObjectiveOptions, loading.ModelOptions, loading.DatasetOptions
):
    """training"""

    data: str = opt(None, "trajectories from distill; for nelbo also a dataset with answers (SFT-GT)", required=True)
    out: str = opt(None, "folder for checkpoints and metrics; an unfinished run is continued", required=True)
    adapter: str | None = opt(None, "adapter folder to start from, instead of a new adapter")
    recipe: str | None = opt(
        None,
        f"settings of one of the authors' recipes; flags on the command line win: {recipes.help()}",
        choices=tuple(recipes.RECIPES),
    )
    keep: str | None = opt(
        None,
        "trajectories to train on; correct: finished, and not judged wrong",
        choices=("correct", "finished", "all"),
        otherwise="correct",
    )
    methods: tuple | None = opt(
        None, "in files from the authors: use only rows of these decoding methods, or all", parse=name_list
    )
    max_prompt_tokens: int | None = opt(
        None, "prompts longer than this lose the end of the user's text; the template stays whole", low=1
    )
    max_answer_tokens: int | None = opt(None, "SFT-GT: leave out rows whose answer has more tokens", low=1)
    unfinished: bool = opt(False, "accept a distill folder in which some prompts are not answered yet")
    cut_eos: bool = opt(False, "drop the tokens after the first EOS")
    lora_rank: int | None = opt(None, "0 = train all weights (16, or as --adapter has it)", low=0)
    lora_alpha: float | None = opt(None, "the adapter is scaled by alpha / rank (16, or as --adapter has it)", low=0)
    lora_dropout: float | None = opt(None, "dropout before the adapter (0, or as --adapter has it)", low=0)
    lora_targets: tuple | None = opt(
        None, "layers with an adapter, comma-separated (q_proj,v_proj, or as --adapter has it)", parse=name_list
    )
    epochs: int | None = opt(None, "passes over the data; a checkpoint after each", low=1, otherwise=5)
    stop_after: int | None = opt(
        None, "stop after this many epochs; the learning rate still follows the cosine over --epochs", low=1
    )
    draw_once: bool = opt(False, "draw an example's window or state once, for all epochs, instead of anew in each")
    save_every: int = opt(200, "optimizer steps between checkpoints inside an epoch; 0 = none", low=0)
    keep_last: int = opt(
        1, "how many of the latest checkpoints inside epochs are kept; those of epochs always are", low=1,
        idle=dict(save_every=0),
    )  # fmt: skip
    held_out: int = opt(
        0, "records kept out of training; after each epoch their loss and an answer to the first are logged", low=0
    )
    log: str | None = opt(None, "also log to tensorboard (in --out) or wandb", choices=("tensorboard", "wandb"))
    skip_nonfinite: bool = opt(False, "skip a step whose loss or gradient is not finite, instead of stopping")
    global_batch: int | None = opt(None, "examples per optimizer step, over all processes (4 per process)", low=1)
    batch_size: int = opt(4, "examples per forward pass on each process; gradients accumulate to --global-batch", low=1)
    lr: float | None = opt(None, "peak learning rate", low=0, otherwise=2e-5)
    final_lr: float = opt(0.0, "learning rate at the end of the cosine", low=0)
    warmup: int | None = opt(None, "steps of linear warm-up", low=0, otherwise=50)
    weight_decay: float | None = opt(None, "weight decay of AdamW", low=0, otherwise=0.01)
    clip: float | None = opt(None, "largest gradient norm; 0 = no clipping", low=0, otherwise=1.0)
    gradient_checkpointing: bool = opt(False, "recompute activations: less memory, more time")
    shard: bool = opt(
        False, "spread weights, gradients and optimizer over the processes (FSDP2), instead of a whole model on each"
    )

    def __post_init__(self):
        """What no flag gives is the recipe's, or else our default. Raises ValueError for a recipe that there is not."""
        recipe = recipes.of(self)
        for f in dataclasses.fields(self):
            if getattr(self, f.name) is None:
                setattr(self, f.name, recipe.get(f.name, f.metadata.get("otherwise")))


# --------------------------------------------------------------------------------------------------------- the loop


@dataclass
class TrainingRun:
    """A training run between two of its steps."""

    c: TrainOptions
    processes: torchrun.Processes
    loaded: loading.Loaded
    records: list  # what to train on, sorted by id
    held_out: list  # never trained on; their loss is taken after each epoch
    sampling: dict  # decoder settings of the answer to the first of those
    objective: Any  # (m, batch, generator=) -> dict(loss, ...)
    normaliser: Any  # see objectives.Objective
    reference: Any  # what the objective compares the model with, or None
    weights: dict  # name -> parameter that is trained
    optimizer: torch.optim.Optimizer
    out: Path
    last: Path | None  # the latest checkpoint
    global_batch: int  # examples of an optimizer step
    steps_per_epoch: int
    done: int = 0  # steps made before this call, as the last checkpoint has them

    @property
    def total(self):
        """Optimizer steps of all epochs, over which the learning rate falls."""
        return self.c.epochs * self.steps_per_epoch

    @property
    def end(self):
        """The step after which this call stops."""
        return min(self.total, (self.c.stop_after or self.c.epochs) * self.steps_per_epoch)

    @property
    def spread(self):
        """Whether the model is spread over the processes, see --shard: an adapter on it may be whole on each."""
        return shard.is_spread(self.loaded.m.parameters())


def train(c, processes=None, loaded=None):
    """Train an adapter (or, with --lora-rank 0, all weights) -> the last metrics and the last checkpoint.

    The same command continues a run that was stopped. c: TrainOptions. loaded: a loading.Loaded of c.model that gets
    the adapter, or has one that --adapter or a checkpoint overwrites; all weights are always loaded anew. Raises
    ValueError for data that cannot be trained on, and where a loss is not finite; FileExistsError for a folder that
    holds another run."""
    # All that can fail on account of the user's input is in prepare(): from here on there are only steps.
    run = prepare(c, processes or torchrun.Processes(c.device), loaded)
    first, metrics = run.processes.first, last_metrics(run)
    also_log = logs.opened(c.log if first else None, run.out, data.read_json(run.out / "meta.json"), run.done)
    with (
        open(run.out / "metrics.jsonl", "a", 1, "utf-8") if first else contextlib.nullcontext() as log,  # by lines
        tqdm(total=run.end, initial=run.done, desc="train", unit="step", disable=not run.processes.shows) as bar,
        resume.stop_signals() as signals,
    ):
        for step in range(run.done, run.end):
            epoch, i = divmod(step, run.steps_per_epoch)
            metrics = train_step(run, step, epoch, global_batch_of(run, epoch, i))
            if run.reference is not None:
                run.reference.step_done(step + 1)
            whole = i == run.steps_per_epoch - 1
            if whole and run.held_out:
                metrics.update(on_held_out(run))
            if first:
                log.write(json.dumps(metrics) + "\n")
                also_log(metrics)
                show(bar, metrics)
            stop = run.processes.sum([len(signals)])[0] > 0  # one process was asked to stop: all do, after this step
            if whole or stop or (c.save_every and (step + 1) % c.save_every == 0):
                save_checkpoint(run, step + 1, f"epoch-{epoch + 1}" if whole else f"step-{step + 1}")
            if stop and step + 1 < run.end:
                raise KeyboardInterrupt
    run.loaded.m.eval()  # as it was given
    steps = max(run.done, run.end)
    return dict(out=str(run.out), checkpoint=str(run.last), steps=steps, examples=len(run.records), **metrics)


epoch_order = functools.lru_cache(maxsize=1)(data.epoch_order)


def global_batch_of(run, epoch, i):
    """The records of the i-th global batch of an epoch: the same whatever the number of processes."""
    order = epoch_order(len(run.records), run.c.seed, epoch)
    return [run.records[k] for k in order[i * run.global_batch : (i + 1) * run.global_batch]]


def train_step(run, step, epoch, chosen):
    """One optimizer step on the records of a global batch -> its line of metrics.jsonl."""
    begun, c, processes = time.perf_counter(), run.c, run.processes
    # Only dropout draws from the global state: all else has a generator that depends on the example alone.
    torch.manual_seed(data.generator(c.seed, step, processes.index, "dropout").initial_seed())

    # 1. this process's share of the mean loss over the global batch, and its gradient
    totals, losses, tokens = 0.0, {}, 0
    for records, share, losses in losses_of_parts(run, chosen, "once" if c.draw_once else epoch):
        # Backward adds to the gradients that are there, so that no forward pass has to hold the whole batch.
        (losses["loss"] * share).backward()
        totals = totals + share * torch.stack([value.detach().float() for value in losses.values()])
        tokens += sum(map(length, records))
    sums = dict(zip(losses, totals.tolist())) if losses else {}  # read once: a GPU waits

    # 2. the sums over all processes
    names = dict.fromkeys(processes.gather(sums))  # a process without an example knows no names
    *means, tokens = processes.sum([*(sums.get(name, 0.0) for name in names), tokens])
    weights = list(run.weights.values())
    if not shard.is_spread(weights):  # backward has added up the others already
        sum_gradients(weights, processes)  # a sum, not a mean: each process's part has its share in it already

    # 3. the step
    lr = learning_rate(step, run.total, c)
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    norm = shard.whole(torch.nn.utils.clip_grad_norm_(weights, c.clip or math.inf)).item()  # of the whole gradient
    metrics = dict(step=step + 1, epoch=epoch + 1, **dict(zip(names, means)), grad_norm=norm, lr=lr)
    metrics["tokens_per_second"] = round(torchrun.per_second(tokens, begun), 1)
    if math.isfinite(metrics["loss"] + norm):  # the same on every process: the sums are
        run.optimizer.step()
    else:
        metrics = without_step(run, metrics, chosen)
    run.optimizer.zero_grad(set_to_none=True)  # a dropped step must not leave its gradient to the next one
    return metrics


def losses_of_parts(run, chosen, when):
    """Run the objective on this process's part of the chosen records, some at a time -> yields (records, their share of
    the chosen, losses). when: the epoch, or "held out"; with a record's id it decides what is drawn for it."""
    c, processes = run.c, run.processes
    more = normaliser(run, chosen, when)
    mine = sorted(chosen[processes.index :: processes.count], key=length)  # little padding in a forward pass
    parts = [mine[i : i + c.batch_size] for i in range(0, len(mine), c.batch_size)]
    if run.spread:  # every process makes each pass with the others: one with fewer records on some that do not count
        most = math.ceil(math.ceil(len(chosen) / processes.count) / c.batch_size)
        parts += [[]] * (most - len(parts))
    for records in parts:
        shown = records or chosen[:1]
        generators = [data.generator(c.seed, when, r["id"]) for r in shown]
        batch = loading.batch_of(shown, run.loaded, processes)
        # The loss of the global batch is the mean over its rows; theirs has this share in it.
        losses = run.objective(run.loaded.m, batch, generator=generators, **more)
        yield records, len(records) / len(chosen), losses


def normaliser(run, chosen, when):
    """The arguments with which the loss of a part of a batch is its share of the whole batch's (Objective.normaliser).
    chosen: the records of the whole batch. when: the epoch, or "held out"."""
    if run.normaliser is None:
        return {}
    # The same keys as for the loss, so the same draws: of all rows, not only of this process's.
    generators = [data.generator(run.c.seed, when, r["id"]) for r in chosen]
    batch = data.collate(chosen, run.loaded.m.config.pad_id)
    return run.normaliser(batch, run.objective.keywords, generators)


def length(record):
    """Tokens of a record's prompt and response."""
    return len(record["prompt_ids"]) + len(record["response_ids"])


def sum_gradients(parameters, processes):
    """Add up the gradients of all processes, in one message of float32 for each 64 MiB.

    Not DistributedDataParallel, which takes the mean over processes and needs rows on each of them: a process's share
    of the loss has its weight already, and the last batch may leave some without a row. It takes as long within a few
    percent (docs/speed.md)."""
    if processes.count == 1:
        return
    bucket, size = [], 0
    for i, p in enumerate(parameters, 1):
        if p.grad is None:  # a process without an example has no gradient
            p.grad = torch.zeros_like(p)
        bucket.append(p.grad)
        size += p.numel()
        if size >= 2**24 or i == len(parameters):
            sum_together(bucket)
            bucket, size = [], 0


def sum_together(gradients):
    """Add up some gradients over all processes, in place, in one message."""
    flat = torch.cat([g.float().flatten() for g in gradients])
    dist.all_reduce(flat)
    start = 0
    for g in gradients:
        g.copy_(flat[start : start + g.numel()].view_as(g))
        start += g.numel()


def learning_rate(step, total, c):
    """Linear warm-up from 0 to the peak, then a cosine to the final rate; step counts from 0."""
    if step < c.warmup:  # the first step has the rate 0, as in the authors' code
        return c.lr * step / c.warmup
    done = (step - c.warmup) / max(total - c.warmup, 1)
    return c.final_lr + (c.lr - c.final_lr) * (1 + math.cos(math.pi * done)) / 2


def without_step(run, metrics, chosen):
    """The metrics of a step that is skipped because its loss or gradient is not finite; None for each such value.

    Raises ValueError without --skip-nonfinite."""
    what = f"loss {metrics['loss']} and gradient norm {metrics['grad_norm']} at step {metrics['step']}"
    what = f"{what}, examples {[r['id'] for r in chosen]}"
    if not run.c.skip_nonfinite:
        raise ValueError(f"{what}; last good checkpoint: {run.last}; --skip-nonfinite leaves out such steps")
    if run.processes.first:
        tqdm.write(f"warning: {what}: the step is dropped", sys.stderr)
    return {k: v if math.isfinite(v) else None for k, v in metrics.items()}


@torch.no_grad()
def on_held_out(run):
    """The objective's mean loss on the held-out records, shared over the processes, and an answer to the first.

    The same windows are drawn after every epoch, so that the losses compare."""
    c, processes, m = run.c, run.processes, run.loaded.m
    m.eval()
    # Without a gradient there is nothing to add up but the loss itself: a mean over rows, whoever has them.
    total = 0.0
    for _, share, losses in losses_of_parts(run, run.held_out, "held out"):
        total = total + losses["loss"] * share
    mean = processes.sum([float(total)])[0]
    found = dict(held_out_loss=round(mean, 6) if math.isfinite(mean) else None, sample="")  # JSON has no NaN
    if processes.first or run.spread:  # a model that is spread answers on all processes, or not at all
        example = [dict(id="sample", prompt_ids=run.held_out[0]["prompt_ids"])]
        found["sample"] = distill.answer_batch(run.loaded, example, run.sampling, c.seed, processes.device)[0]["text"]
    m.train()
    return found


def show(bar, metrics):
    loss = "none" if metrics["loss"] is None else f"{metrics['loss']:.3f}"
    if "held_out_loss" in metrics:
        bar.write(f"epoch {metrics['epoch']}: held-out loss {metrics['held_out_loss']}", sys.stderr)
        bar.write(f"  answers: {metrics['sample'][:200]!r}", sys.stderr)
    bar.set_postfix_str(f"loss {loss}, {metrics['tokens_per_second']:.0f} tokens/s")
    bar.update()


def save_checkpoint(run, step, name):
    """Write a checkpoint of the run after `step` steps, and forget old ones between epochs."""
    run.last = run.out / name
    first, together = run.processes.first, shard.is_spread(run.weights.values())
    if first:
        shutil.rmtree(run.last, ignore_errors=True)  # it can only be a damaged one
    if first or together:
        # A kill leaves the checkpoint before it whole.
        with disk.atomic_folder(run.last, run.processes if together else None) as beside:
            resume.write_checkpoint(beside, run.loaded, run.c, run.weights, run.optimizer, step, run.reference, first)
    if first:
        resume.prune(run.out, run.c.keep_last, step)
    run.processes.barrier()


def last_metrics(run):
    """The last line of the log of a run that has nothing left to do; empty for another run, or without a log."""
    last, file = {}, run.out / "metrics.jsonl"
    if run.done >= run.end and file.is_file():
        for _, row in data.read_rows(file):
            last = row
    return last


# ------------------------------------------------------------------------------------------------------- preparation


def prepare(c, processes, loaded=None):
    """The TrainingRun that c describes, new or as its last checkpoint left it. All that can be wrong with the input is
    found before anything is written."""
    # 1. the options
    c, say = adapters.with_adapter(c, processes), torchrun.warner(processes)
    logs.check(c.log)
    parameters, unused = objective_options.chosen(c)
    entry = objectives.OBJECTIVES[c.objective]
    check_options(c, entry, parameters)

    # 2. the model. Where all weights are trained they are float32, for bfloat16 is too coarse for AdamW's small steps.
    last, spread = resume.where_to_continue(Path(c.out), processes), spreading(c, processes)
    full, prefer = c.lora_rank == 0, "float32" if c.lora_rank == 0 else "auto"
    stored = dataclasses.replace(c, dtype=prefer) if full and spread else c  # with --shard, --dtype is what computes
    load = functools.partial(loading.load_model, stored, processes, dtype=prefer, spread=spread)
    if loaded is None or full or spread:
        loaded = load(weights=last if full else None)
    loading.set_grid(c, loaded.m)

    # 3. what to train on
    records = training_records(c, loaded, parameters, processes)
    distill.check_context(records, None, loaded.m.config, say)
    held_out, records = split_held_out(records, c)
    blocks = loaded.m.config.block_length
    sampling = loading.decoder_settings(loading.DecodeOptions(block_length=blocks), loaded) if held_out else {}
    global_batch = c.global_batch or 4 * processes.count
    steps_per_epoch = math.ceil(len(records) / global_batch)

    # 4. which run it is: the one in --out, if there is one
    meta = dict(resume.identity(c, records, held_out), **parameters, **disk.content_hashes(loaded.folder, c.adapter))
    meta.update(dtype=loading.resolve_dtype(stored, processes, prefer), global_batch=global_batch)
    meta.update(grid=blocks and loaded.m.config.grid)
    if stored is not c and loading.resolve_dtype(c, processes) != meta["dtype"]:
        meta["compute"] = loading.resolve_dtype(c, processes)
    may_change = [*resume.MAY_MOVE, *resume.longer_epochs(c, say)]
    disk.same_run(c.out, meta, may_change)  # before a checkpoint is read that need not fit

    # 5. what is trained, and what for
    weights = adapters.trainable(c, loaded.m, last)
    objective, reference = functools.partial(entry.loss, **parameters), None
    if entry.reference is not None:
        reference = entry.reference(loaded.m, lambda: load().m, parameters)
        if c.adapter and reference is not None:  # else a new adapter, which changes nothing yet
            reference.update()
        objective = functools.partial(objective, reference=reference)
    fused = processes.device.type == "cuda"  # one kernel for all weights; elsewhere it has no advantage
    optimizer = torch.optim.AdamW(weights.values(), lr=c.lr, weight_decay=c.weight_decay, fused=fused)

    # 6. the folder: from here on something is written
    out = disk.open_run(c.out, meta, processes, may_change)
    run = TrainingRun(
        c, processes, loaded, records, held_out, sampling, objective, entry.normaliser, reference, weights, optimizer,
        out, last, global_batch, steps_per_epoch,
    )  # fmt: skip
    start(run, unused)
    return run


def start(run, unused):
    """Bring a run to where its last checkpoint left it, or to its first step. unused: options without effect."""
    c, m, say = run.c, run.loaded.m, torchrun.warner(run.processes)
    if c.warmup >= run.total:
        say(f"{c.warmup} warm-up steps, but {run.total} in all: the peak --lr is never reached")
    if c.lr == c.final_lr == 0:
        say("--lr 0 trains nothing: the weights stay as they are")
    if unused:
        say(f"{', '.join(map(flag, unused))}: not used by --objective {c.objective} with these options")
    m.train()  # for dropout, and whatever else an objective does in training alone
    m.gradient_checkpointing = c.gradient_checkpointing
    if run.last is not None:
        run.done = resume.restore(run.last, run.weights, run.optimizer, run.reference)
    if run.processes.first:
        disk.keep_lines(run.out / "metrics.jsonl", run.done)  # a kill may leave lines of steps that are made again
        if 0 < run.done < run.total:
            tqdm.write(f"continuing at step {run.done} of {run.total}", sys.stderr)
    run.processes.barrier()


def check_options(c, entry, parameters):
    """Raises ValueError for options that exclude each other. entry: of objectives.OBJECTIVES."""
    if c.shard and not entry.lockstep(parameters):
        raise ValueError(
            "--shard needs equally many forward passes on all processes: no --entropy-context step, --ranking kl, ideal"
        )
    if c.lora_rank == 0 and c.adapter:
        raise ValueError("--lora-rank 0 trains no adapter, and --adapter needs one: give --lora-rank above 0")


def spreading(c, processes):
    """What spreads a model over the processes for --shard; None without it, or where there is one process alone."""
    if c.shard and processes.count == 1:
        line = "--shard spreads a model over the processes of torchrun, and the only one here holds it whole"
        torchrun.warner(processes)(line)
    if not c.shard or processes.count == 1:
        return None
    compute = None
    if c.lora_rank == 0:  # the weights stay float32, for AdamW
        compute = model.DTYPES[loading.resolve_dtype(c, processes)]
    return functools.partial(shard.spread, device=processes.device, compute=compute)


def split_held_out(records, c):
    """(held out, to train on): --held-out records, the same for the same seed, and the rest.

    Raises ValueError where nothing would be left to train on."""
    if c.held_out >= len(records):
        raise ValueError(f"--held-out {c.held_out}: there are {len(records)} records, and none would be trained on")
    chosen = set(data.epoch_order(len(records), c.seed, "held out")[: c.held_out])
    parts = [], []
    for i, record in enumerate(records):
        parts[i not in chosen].append(record)
    return parts
