"""Step 2: the training loop, on one process or many. It trains an adapter (or all weights) along trajectories.

    torchrun --nproc_per_node 8 tabom.py train --model GSAI-ML/LLaDA-8B-Instruct --data out/T --out out/R
    torchrun --nproc_per_node 8 tabom.py train --recipe llada-prm12k --model M --data theirs.jsonl --out out/R

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
import distill
import lora
import model
import objectives
from release import recipes
from runs import disk, loading, logs, resume, shard, torchrun
from runs.options import flag, name_list, opt
from runs.records import check_context, training_records

# ---------------------------------------------------------------------------------------------------------- options


def of_some(name, help, **more):
    """The option for a parameter of some objectives: None = each objective's own default, which the help shows."""
    own = []
    for objective, function in objectives.OBJECTIVES.items():
        parameters = inspect.signature(function).parameters
        if name in parameters and parameters[name].default is not None:  # None: the help says what it means
            own.append(f"{objective} {parameters[name].default}")
    if own:
        help = f"{help} (default: {', '.join(own)})"
    return opt(None, help, own_default=True, **more)


def window_size(text):
    """ "32" -> 32, "global" -> "global"; raises ValueError for anything else."""
    try:
        return text if text == "global" else int(text)
    except ValueError as e:
        raise ValueError("must be a whole number, or global") from e


SOURCES = ", ".join(f"{name} ({source})" for name, source in objectives.SOURCES.items())


@dataclass
class TrainOptions(loading.ModelOptions, loading.DatasetOptions):
    """training"""

    data: str = opt(None, "trajectories from distill; for nelbo also a dataset with answers (SFT-GT)", required=True)
    out: str = opt(None, "folder for checkpoints and metrics; an unfinished run is continued", required=True)
    adapter: str | None = opt(None, "adapter folder to start from, instead of a new adapter")
    recipe: str | None = opt(
        None,
        f"settings of one of the authors' recipes; flags on the command line win: {recipes.help()}",
        choices=tuple(recipes.RECIPES),
    )
    objective: str = opt("tabom", f"what to train: {SOURCES}", choices=tuple(objectives.OBJECTIVES))
    window: int | str | None = of_some(
        "window", "W, in decode steps; global: between two random steps", parse=window_size
    )
    margin: float | None = of_some("margin", "gamma of the ranking loss, nats", low=0)
    weight: float | None = of_some("weight", "lambda: weight of the ranking loss; dparallel: of the certainty", low=0)
    ce_weight: float | None = of_some("ce_weight", "weight of the cross-entropy; 0 = ranking alone", low=0)
    entropy_context: str | None = of_some(
        "entropy_context",
        "where the ranked entropies are taken: all at the window's start, or each at its token's own step "
        "(default: window; step with --ranking kl)",
        choices=("window", "step"),
    )
    starts: str | None = of_some(
        "starts",
        "windows begin at any step, or at tokens not decoded from left to right",
        choices=("uniform", "non-ltr"),
    )
    ranking: str | None = of_some(
        "ranking", "ranking loss: Eq. 8, Plackett-Luce, or the exact KL of Eq. 6", choices=("margin", "listwise", "kl")
    )
    alpha: float | None = of_some("alpha", "weight of the term on the tokens that the reference prefers", low=0)
    beta: float | None = of_some("beta", "tabom: inverse temperature of Eq. 5; t3d: scale of the log-ratios", low=0)
    path_weight: float | None = of_some("path_weight", "weight of the path consistency term", low=0)
    random_tokens: float | None = of_some(
        "random_tokens", "share of masked positions that show a random token instead of the mask", low=0, high=1
    )
    path: str | None = of_some(
        "path",
        "weights of the path consistency term: linear in the decode order, or T3D's code's levels of 4 tokens",
        choices=("linear", "levels"),
    )
    masked: str | None = of_some(
        "masked",
        "block-causal models: a state masks the tokens of a block that decoding chose later (T3D's paper), or earlier "
        "(its code)",
        choices=("later", "earlier"),
    )
    reference_steps: int = opt(10, "t3d: optimizer steps after which the student becomes the reference again", low=1)
    block_length: int | None = of_some("block_length", "block length in tokens", low=1)
    temperature: float | None = of_some("temperature", "temperature at which the certainty is taken", low=0.01)
    weighting: str | None = of_some(
        "weighting",
        "of a row's masked tokens: their mean; or, as SDAR and A2D are trained, each divided by the row's mask ratio "
        "(scheduler), or not (uniform)",
        choices=("mean", "scheduler", "uniform"),
    )
    norm: str | None = of_some(
        "norm",
        "with --weighting scheduler or uniform: divide by the tokens of all rows, or of each row, or only by the rows",
        choices=("token", "sequence", "batch"),
    )
    grid: str | None = opt(
        None,
        "block-causal models: where blocks are counted from, the start of the row or the end of its prompt (as the "
        "model's decoder: SDAR start, A2D prompt)",
        choices=loading.GRIDS,
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
    unfinished: bool = opt(False, "accept a distill folder in which some prompts are not answered yet")
    cut_eos: bool = opt(False, "drop the tokens after the first EOS")
    lora_rank: int | None = opt(None, "0 = train all weights (16, or as --adapter has it)", low=0)
    lora_alpha: float | None = opt(None, "the adapter is scaled by alpha / rank (16, or as --adapter has it)", low=0)
    lora_dropout: float = opt(0.0, "dropout before the adapter", low=0)
    lora_targets: tuple | None = opt(
        None, "layers with an adapter, comma-separated (q_proj,v_proj, or as --adapter has it)", parse=name_list
    )
    epochs: int | None = opt(None, "passes over the data; a checkpoint after each", low=1, otherwise=5)
    stop_after: int | None = opt(
        None, "stop after this many epochs; the learning rate still follows the cosine over --epochs", low=1
    )
    save_every: int = opt(200, "optimizer steps between checkpoints inside an epoch; 0 = none", low=0)
    keep_last: int = opt(
        1, "how many of the latest checkpoints inside epochs are kept; those of epochs always are", low=1
    )
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
        recipe = recipes.settings(self.recipe)
        for f in dataclasses.fields(self):
            if getattr(self, f.name) is None:
                setattr(self, f.name, recipe.get(f.name, f.metadata.get("otherwise")))


def objective_parameters(c):
    """The parameters of the objective that c (TrainOptions) names: those given and its own defaults; and the names of
    the options that are given and not used.

    Raises ValueError for a window without pairs, for options that exclude each other, and without an adapter where
    one is needed."""
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
    if used.get("weighting") == "mean" and c.norm is not None:
        unused.append("norm")
    window = used.get("window", "global")
    if window != "global" and window < 2:
        raise ValueError(f"--window {window}: needs at least 2 tokens (one has no pair to rank), or global")
    if window == "global" and used.get("starts") == "non-ltr":
        raise ValueError("--starts non-ltr: needs a --window of a number of steps, and not global")
    if used.get("ranking") == "kl" and used.get("entropy_context") == "window":
        raise ValueError("--ranking kl compares with entropies at each token's own step: no --entropy-context window")
    if c.shard and "step" in (used.get("entropy_context"), {"kl": "step"}.get(used.get("ranking"))):
        raise ValueError(
            "--shard needs equally many forward passes on all processes: no --entropy-context step or --ranking kl"
        )
    if used.get("weight") == 0 and used.get("ce_weight") == 0:
        raise ValueError("--weight 0 and --ce-weight 0 train nothing: leave one of them above 0")
    if c.lora_rank == 0 and c.adapter:
        raise ValueError("--lora-rank 0 trains no adapter, and --adapter needs one: give --lora-rank above 0")
    return used, unused


def with_adapter(c):
    """c with the rank, alpha and targets of its adapter: of --adapter where no flag says otherwise, else 16, 16 and
    q_proj, v_proj. Raises ValueError for a flag that contradicts the adapter."""
    known = dict(lora_rank=16, lora_alpha=16, lora_targets=("q_proj", "v_proj"))
    if c.adapter is not None and c.lora_rank != 0:
        stored = lora.settings(c.adapter)
        known = dict(lora_rank=stored.rank, lora_alpha=stored.alpha, lora_targets=stored.targets)
        for name, value in known.items():
            given = getattr(c, name)
            if given in (None, value) or (name == "lora_targets" and set(given) == set(value)):
                continue
            way_out = "leave the flag out"
            if recipes.settings(c.recipe).get(name) == given:  # nobody gave the flag
                as_flag = ",".join(value) if name == "lora_targets" else value
                way_out = f"--recipe {c.recipe} asks for it: add {flag(name)} {as_flag}, or start from another adapter"
            raise ValueError(f"{flag(name)} {given}: {c.adapter} has {value}; {way_out}")
    changes = {}
    for name, value in known.items():
        if getattr(c, name) is None:
            changes[name] = value
    return dataclasses.replace(c, **changes)


# --------------------------------------------------------------------------------------------------------- the loop


@dataclass
class TrainingRun:
    """A training run between two of its steps."""

    c: TrainOptions
    processes: torchrun.Processes
    loaded: loading.Loaded
    grid: str | None  # of block-causal attention, see --grid
    records: list  # what to train on, sorted by id
    held_out: list  # never trained on; their loss is taken after each epoch
    sampling: dict  # decoder settings of the answer to the first of those
    objective: Any  # a function of the model, a batch and generators
    weights: dict  # name -> parameter that is trained
    optimizer: torch.optim.Optimizer
    reference: Any  # T3D's, else None
    spread: bool  # whether the model is spread over the processes, see --shard
    out: Path
    last: Path | None  # the latest checkpoint
    global_batch: int  # examples of an optimizer step
    steps_per_epoch: int
    total: int  # optimizer steps of all epochs, over which the learning rate falls
    end: int  # the step after which this call stops, see --stop-after
    done: int = 0  # steps made before this call, as the last checkpoint has them


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
        open(run.out / "metrics.jsonl", "a", encoding="utf-8") if first else contextlib.nullcontext() as log,
        tqdm(total=run.end, initial=run.done, desc="train", unit="step", disable=not run.processes.shows) as bar,
        resume.stop_signals() as signals,
    ):
        for step in range(run.done, run.end):
            epoch, i = divmod(step, run.steps_per_epoch)
            metrics = train_step(run, step, epoch, global_batch_of(run, epoch, i))
            if run.reference is not None and (step + 1) % c.reference_steps == 0:
                run.reference.update()
            whole = i == run.steps_per_epoch - 1
            if whole and run.held_out:
                metrics.update(on_held_out(run))
            if first:
                log.write(json.dumps(metrics) + "\n")
                log.flush()
                also_log(metrics)
                show(bar, metrics)
            stop = run.processes.sum([len(signals)])[0] > 0  # one process was asked to stop: all do, after this step
            if whole or stop or (c.save_every and (step + 1) % c.save_every == 0):
                save_checkpoint(run, step + 1, f"epoch-{epoch + 1}" if whole else f"step-{step + 1}")
            if stop and step + 1 < run.end:
                raise KeyboardInterrupt
    steps = max(run.done, run.end)
    return dict(out=str(run.out), checkpoint=str(run.last), steps=steps, examples=len(run.records), **metrics)


def prepare(c, processes, loaded=None):
    """The TrainingRun that c describes, new or as its last checkpoint left it. Writes nothing before all is checked."""
    c = with_adapter(c)
    logs.check(c.log)
    parameters, unused = objective_parameters(c)
    last = resume.last_checkpoint(Path(c.out), torchrun.warner(processes))
    full, place = c.lora_rank == 0, spreading(c, processes)
    prefer = "float32" if full else "auto"  # bfloat16 is too coarse for AdamW's small steps
    stored = dataclasses.replace(c, dtype=prefer) if full and place else c  # with --shard, --dtype is what computes
    if loaded is None or full or place:
        loaded = loading.load_model(stored, processes, weights=last if full else None, dtype=prefer, place=place)
    grid, blocks = c.grid or loading.decoding_grid(loaded.m.config), loaded.m.config.block_length
    records = training_records(c, loaded, parameters, processes, grid)
    check_context(records, loaded, processes)
    held_out, records = split_off(records, c)
    sampling = loading.decoder_settings(loading.DecodeOptions(block_length=blocks), loaded) if held_out else {}
    global_batch = c.global_batch or 4 * processes.count
    steps_per_epoch = math.ceil(len(records) / global_batch)
    total = c.epochs * steps_per_epoch

    meta = dict(identity(c, records), **parameters, **disk.content_hashes(loaded.folder, c.adapter))
    meta.update(dtype=loading.resolve_dtype(stored, processes, prefer), global_batch=global_batch, grid=grid)
    if stored is not c and loading.resolve_dtype(c, processes) != meta["dtype"]:
        meta["compute"] = loading.resolve_dtype(c, processes)
    free = ["model", "data", "adapter"]  # these may be elsewhere, if they are the same
    before = epochs_before(c)
    if before:
        free += ["epochs", "changed_from_recipe"]  # the latter may list the epochs; what else it lists is compared
    disk.same_run(c.out, meta, free)  # before a checkpoint is read that need not fit
    if before:
        line = f"--epochs {c.epochs}, and the run was started with {before}"
        torchrun.warner(processes)(f"{line}: the learning rate follows the longer cosine")
    weights = trainable(c, loaded.m, last)
    objective = functools.partial(objectives.OBJECTIVES[c.objective], **parameters)
    reference = None
    if c.objective == "t3d":
        reference = first_reference(stored, loaded.m, processes, prefer, place)
        objective = functools.partial(objective, reference=reference)
    fused = processes.device.type == "cuda"  # one kernel for all weights; elsewhere it has no advantage
    optimizer = torch.optim.AdamW(weights.values(), lr=c.lr, weight_decay=c.weight_decay, fused=fused)

    out = disk.open_run(c.out, meta, processes, free)
    if processes.first:
        warn_of_options(c, total, unused)
    loaded.m.train()  # for dropout, and T3D's random tokens
    loaded.m.gradient_checkpointing = c.gradient_checkpointing
    done = 0 if last is None else resume.restore(last, weights, optimizer, reference)
    if processes.first:
        disk.keep_lines(out / "metrics.jsonl", done)  # a kill may have left lines of steps that are made again
        if 0 < done < total:
            tqdm.write(f"continuing at step {done} of {total}", sys.stderr)
    processes.barrier()
    end = min(total, (c.stop_after or c.epochs) * steps_per_epoch)
    return TrainingRun(
        c, processes, loaded, grid, records, held_out, sampling, objective, weights, optimizer, reference,
        place is not None, out, last, global_batch, steps_per_epoch, total, end, done,
    )  # fmt: skip


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


def trainable(c, m, last):
    """The weights to train, by name: all of them, or those of an adapter, new or as in a checkpoint."""
    if c.lora_rank == 0:
        m.requires_grad_(True)
    elif last or c.adapter:  # the checkpoint before the adapter: a continued run is past its start
        lora.load(m, last or c.adapter)
        for layer in lora.layers(m).values():
            layer.dropout = c.lora_dropout
    else:
        start = data.generator(c.seed, "lora")
        lora.inject(m, c.lora_rank, c.lora_alpha, c.lora_targets, c.lora_dropout, start)
    return {name: p for name, p in m.named_parameters() if p.requires_grad}


def first_reference(c, m, processes, dtype, place):
    """T3D's reference: the student as it starts, and then as of every reference_steps-th step."""
    if c.lora_rank == 0:
        return FrozenCopy(m, loading.load_model(c, processes, dtype=dtype, place=place).m)
    reference = lora.Reference(m)
    if c.adapter:
        reference.update()
    return reference


class FrozenCopy:
    """T3D's reference where all weights are trained, with the interface of lora.Reference: `copy`, a second model that
    is loaded from the same folder, computes what the student did at the last `update`. It costs a model's memory."""

    def __init__(self, student, copy):
        self.student, self.m = student, copy.eval().requires_grad_(False)
        self.kept = {}  # parameter's name -> tensor, for a checkpoint; empty = as loaded

    def update(self):
        self.restore(dict(self.student.named_parameters()))

    @torch.no_grad()
    def restore(self, stored):
        """Take over the weights in `stored`, name -> tensor."""
        shard.settle(self.m)
        self.kept = dict(self.m.named_parameters())
        for name, p in self.kept.items():
            p.copy_(stored[name])  # in place and one by one: no third model is in memory

    @torch.no_grad()
    def __call__(self, *inputs, **options):
        return self.m(*inputs, **options)


# What changes nothing in what a run computes, and may differ when it is continued.
FREE = ("out", "device", "batch_size", "gradient_checkpointing", "compile", "save_every", "keep_last", "stop_after")
FREE += ("log", "unfinished", "shard")


def identity(c, records):
    """What a training run is, for its meta.json: its options, but for FREE and those of its objective, and the data by
    their content."""
    settings = {}
    for f in dataclasses.fields(c):
        if f.name not in FREE and "own_default" not in f.metadata:
            settings[f.name] = getattr(c, f.name)
    for name, value in recipes.settings(c.recipe).items():
        if getattr(c, name) not in (value, list(value) if isinstance(value, tuple) else value):
            settings.setdefault("changed_from_recipe", {})[name] = getattr(c, name)
    # What is trained on, and not the file: a run goes on where the same records have moved elsewhere.
    sha256 = hashlib.sha256(json.dumps(records).encode()).hexdigest()
    return dict(command="train", **settings, examples=len(records), data_sha256=sha256, versions=disk.versions())


def epochs_before(c):
    """The epochs that the run in c's folder was started with, if c asks for more; else 0."""
    meta = Path(c.out) / "meta.json"
    before = data.read_json(meta).get("epochs") if meta.is_file() else None
    return before if type(before) is int and before < c.epochs else 0


def split_off(records, c):
    """(held out, to train on): --held-out records, the same for the same seed, and the rest.

    Raises ValueError where nothing would be left to train on."""
    if c.held_out >= len(records):
        raise ValueError(f"--held-out {c.held_out}: there are {len(records)} records, and none would be trained on")
    chosen = set(data.epoch_order(len(records), c.seed, "held out")[: c.held_out])
    parts = [], []
    for i, record in enumerate(records):
        parts[i not in chosen].append(record)
    return parts


def warn_of_options(c, total, unused):
    if c.warmup >= total:
        tqdm.write(f"warning: {c.warmup} warm-up steps, but {total} in all: the peak --lr is never reached", sys.stderr)
    if c.lr == c.final_lr == 0:
        tqdm.write("warning: --lr 0 trains nothing: the weights stay as they are", sys.stderr)
    if unused:
        flags = ", ".join(map(flag, unused))
        tqdm.write(f"warning: {flags}: not used by --objective {c.objective}", sys.stderr)


def last_metrics(run):
    """The last line of the log of a run that has nothing left to do; empty for another run, or without a log."""
    last, file = {}, run.out / "metrics.jsonl"
    if run.done >= run.end and file.is_file():
        for _, row in data.read_rows(file):
            last = row
    return last


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
            resume.write_checkpoint(
                beside, run.loaded, run.c.model, run.weights, run.optimizer, step, run.reference, first
            )  # fmt: skip
    if first:
        resume.prune(run.out, run.c.keep_last)
    run.processes.barrier()


# ------------------------------------------------------------------------------------------------------------- steps


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
    sums, tokens = {}, 0
    for records, share, losses in losses_of_parts(run, chosen, epoch):
        # Backward adds to the gradients that are there, so that no forward pass has to hold the whole batch.
        (losses["loss"] * share).backward()
        for name, value in losses.items():
            sums[name] = sums.get(name, 0.0) + value.item() * share
        tokens += sum(map(length, records))

    # 2. the sums over all processes
    names = dict.fromkeys(processes.gather(sums))  # a process without an example knows no names
    *means, tokens = processes.sum([*(sums.get(name, 0.0) for name in names), tokens])
    weights = list(run.weights.values())
    if not shard.is_spread(weights):  # backward has added up the others already
        processes.sum_gradients(weights)  # a sum, not a mean: each process's part has its share in it already

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


@torch.no_grad()
def on_held_out(run):
    """The objective's mean loss on the held-out records, shared over the processes, and an answer to the first.

    The same windows are drawn after every epoch, so that the losses compare."""
    c, processes, m = run.c, run.processes, run.loaded.m
    m.eval()
    # Without a gradient there is nothing to add up but the loss itself: a mean over rows, whoever has them.
    total = 0.0
    for _, share, losses in losses_of_parts(run, run.held_out, "held out"):
        total += losses["loss"].item() * share
    mean = processes.sum([total])[0]
    found = dict(held_out_loss=round(mean, 6) if math.isfinite(mean) else None, sample="")  # JSON has no NaN
    if processes.first or run.spread:  # a model that is spread answers on all processes, or not at all
        example = [dict(id="sample", prompt_ids=run.held_out[0]["prompt_ids"])]
        found["sample"] = distill.answer_batch(run.loaded, example, run.sampling, c.seed, processes.device)[0]["text"]
    m.train()
    return found


def losses_of_parts(run, chosen, when):
    """Run the objective on this process's part of the chosen records, some at a time -> yields (records, their share of
    the chosen, losses). when: the epoch, or "held out"; with a record's id it decides what is drawn for it."""
    c, processes = run.c, run.processes
    more = whole_batch(run, chosen, when)
    mine = sorted(chosen[processes.index :: processes.count], key=length)  # little padding in a forward pass
    parts = [mine[i : i + c.batch_size] for i in range(0, len(mine), c.batch_size)]
    if run.spread:  # every process makes each pass with the others: one with fewer records on some that do not count
        most = math.ceil(math.ceil(len(chosen) / processes.count) / c.batch_size)
        parts += [[]] * (most - len(parts))
    for records in parts:
        shown = records or chosen[:1]
        generators = [data.generator(c.seed, when, r["id"]) for r in shown]
        batch = loading.batch_of(shown, run.loaded, processes, run.grid)
        # The loss of the global batch is the mean over its rows; theirs has this share in it.
        losses = run.objective(run.loaded.m, batch, generator=generators, **more)
        yield records, len(records) / len(chosen), losses


def whole_batch(run, chosen, when):
    """The argument with which the loss of a part of a batch is its part of the whole batch's: the share of rows with a
    pair for tabom's ranking loss (objectives.share_with_pairs), the tokens of a row for nelbo; empty for other
    objectives. chosen: the records of the whole batch. when: the epoch, or "held out"."""
    known, parameters = inspect.signature(run.objective).parameters, run.objective.keywords
    if not {"pair_share", "targets"} & known.keys():
        return {}
    batch = data.collate(chosen, run.loaded.m.config.pad_id)
    if "targets" in known:
        return dict(targets=objectives.was_decoded(batch).sum(1).float().mean().item())
    # The same keys as for the loss, so the same windows: of all rows, not only of this process's.
    generators = [data.generator(run.c.seed, when, r["id"]) for r in chosen]
    window, starts = parameters["window"], parameters["starts"]
    share = objectives.share_with_pairs(batch, window, starts=starts, generator=generators)
    return dict(pair_share=share)


def length(record):
    """Tokens of a record's prompt and response."""
    return len(record["prompt_ids"]) + len(record["response_ids"])


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


def learning_rate(step, total, c):
    """Linear warm-up from 0 to the peak, then a cosine to the final rate; step counts from 0."""
    if step < c.warmup:  # the first step has the rate 0, as in the release
        return c.lr * step / c.warmup
    done = (step - c.warmup) / max(total - c.warmup, 1)
    return c.final_lr + (c.lr - c.final_lr) * (1 + math.cos(math.pi * done)) / 2
