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
import importlib
import inspect
import json
import math
import re
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import baselines  # noqa: F401  its objectives
import data
import evaluate
import lora
import model
import objectives
from runs import disk, loading, resume, shard, torchrun
from runs.options import field_names, flag, name_list, opt

# ---------------------------------------------------------------------------------------------------------- options


def objective_options():
    """--objective and every option in objectives.OBJECTIVES as fields for make_dataclass: [(name, type, field)]."""
    sources = ", ".join(f"{name} ({objective.source})" for name, objective in objectives.OBJECTIVES.items())
    objective = opt("tabom", f"what to train: {sources}", choices=tuple(objectives.OBJECTIVES))
    users = {}  # option -> {objective: Option}
    for name, entry in objectives.OBJECTIVES.items():
        for option, declared in entry.options.items():
            users.setdefault(option, {})[name] = declared
    more = [objective_option(option, declared) for option, declared in users.items()]
    return [("objective", str, objective), *more]


def objective_option(name, declared):
    """An option that some objectives have, declared {objective: Option}, as (name, type, field). None = each one's
    default, which the help shows."""
    first, *others = declared.values()
    help = first.help
    if any(one.help != help for one in others):
        help = "; ".join(f"{objective}: {one.help}" for objective, one in declared.items())
    defaults = {objective: default_of(objective, name) for objective in declared}
    shown = ", ".join(f"{objective} {value}" for objective, value in defaults.items() if value is not None)
    if shown:  # None: the help says what it means
        help = f"{help} (default: {shown})"
    more = {limit: getattr(first, limit) for limit in ("low", "high", "choices") if getattr(first, limit) is not None}
    if first.choices:
        kind = str
    elif isinstance(first.kind, type):
        kind = first.kind
    else:
        kind, more["parse"] = int | str, first.kind
    return name, kind | None, opt(None, help, own_default=True, **more)


def default_of(objective, option):
    """The default of an objective's option: it stands in the signature of its loss."""
    return inspect.signature(objectives.OBJECTIVES[objective].loss).parameters[option].default


ObjectiveOptions = dataclasses.make_dataclass(
    "ObjectiveOptions", objective_options(), namespace=dict(__doc__="the objective", __module__=__name__)
)

# The four recipes of the authors' release (tonyckc/TABOM). All else is the same in them, and the default here: W 32,
# LoRA of rank and alpha 16, 5 epochs, weight decay 0.01, clipping at 1, 50 steps of warm-up.
SHARED = dict(window=32, lora_rank=16, lora_alpha=16, epochs=5, weight_decay=0.01, clip=1.0, warmup=50)
SHARED |= dict(starts="uniform", max_prompt_tokens=256, keep="all", cut_eos=False, lora_targets=("q_proj", "v_proj"))
RECIPES = {
    "dream-prm12k": SHARED | dict(methods=("entropy",), margin=0.1, weight=1.0, lr=2e-5, global_batch=32),
    "dream-ling-coder": SHARED
    | dict(methods=("all",), margin=0.1, weight=2.0, lr=1e-4, global_batch=64, starts="non-ltr"),
    "llada-prm12k": SHARED
    | dict(methods=("entropy", "default", "credit"), margin=0.2, weight=1.0, lr=2e-5, global_batch=32),
    "llada-ling-coder": SHARED | dict(methods=("default",), margin=0.3, weight=1.0, lr=2e-5, global_batch=32),
}


def recipe_help(recipe):
    """A recipe in the help of the command line."""
    return f"margin {recipe['margin']}, weight {recipe['weight']}, lr {recipe['lr']}, batch {recipe['global_batch']}"


def follows_recipe(cls):
    """A class of options whose `recipe` sets what the constructor is not given, from Python as on the command line.

    The constructor raises ValueError for a recipe that there is not."""
    plain = cls.__init__

    @functools.wraps(plain)
    def made(self, **given):
        name = given.get("recipe")
        if name not in (None, *RECIPES):
            raise ValueError(f"--recipe {name}: must be one of {', '.join(RECIPES)}")
        plain(self, **{**RECIPES.get(name, {}), **given})

    cls.__init__ = made
    return cls


@follows_recipe
@dataclass
class TrainOptions(ObjectiveOptions, loading.ModelOptions, loading.DatasetOptions):
    """training"""

    data: str = opt(None, "trajectories from distill; for nelbo also a dataset with answers (SFT-GT)", required=True)
    out: str = opt(None, "folder for checkpoints and metrics; an unfinished run is continued", required=True)
    adapter: str | None = opt(None, "adapter folder to start from, instead of a new adapter")
    recipe: str | None = opt(
        None,
        "settings of one of the authors' recipes; flags on the command line win: "
        + "; ".join(f"{name}: {recipe_help(recipe)}" for name, recipe in RECIPES.items()),
        choices=tuple(RECIPES),
    )
    grid: str | None = opt(
        None,
        "block-causal models: where blocks are counted from, the start of the row or the end of its prompt (as the "
        "model's decoder: SDAR start, A2D prompt)",
        choices=loading.GRIDS,
    )
    keep: str = opt(
        "correct",
        "trajectories to train on; correct: finished, and not judged wrong",
        choices=("correct", "finished", "all"),
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
    epochs: int = opt(5, "passes over the data; a checkpoint after each", low=1)
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
    lr: float = opt(2e-5, "peak learning rate", low=0)
    final_lr: float = opt(0.0, "learning rate at the end of the cosine", low=0)
    warmup: int = opt(50, "steps of linear warm-up", low=0)
    weight_decay: float = opt(0.01, "weight decay of AdamW", low=0)
    clip: float = opt(1.0, "largest gradient norm; 0 = no clipping", low=0)
    gradient_checkpointing: bool = opt(False, "recompute activations: less memory, more time")
    shard: bool = opt(
        False, "spread weights, gradients and optimizer over the processes (FSDP2), instead of a whole model on each"
    )


def objective_parameters(c):
    """The parameters of the objective that c (TrainOptions) names: those given and its own defaults; and the names of
    the options that are given and not used.

    Raises ValueError for a window without pairs, for options that exclude each other, and without an adapter where
    one is needed."""
    objective, used, unused = objectives.OBJECTIVES[c.objective], {}, []
    for name in field_names(ObjectiveOptions):
        given = getattr(c, name)
        if name == "objective":
            continue
        if name in objective.options:
            used[name] = default_of(c.objective, name) if given is None else given
        elif given is not None:
            unused.append(name)
    try:
        idle = objective.check(used) or ()
    except ValueError as e:  # it speaks of parameters
        named = re.compile(rf"\b({'|'.join(used)}) (?:'([^']*)')?")  # window 1, starts 'non-ltr'
        raise ValueError(named.sub(lambda found: f"{flag(found[1])} {found[2] or ''}", str(e))) from e
    unused += [name for name in idle if getattr(c, name) is not None]
    if c.shard and not objective.lockstep(used):
        raise ValueError(
            "--shard needs equally many forward passes on all processes: no --entropy-context step or --ranking kl"
        )
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
            if RECIPES.get(c.recipe, {}).get(name) == given:  # nobody gave the flag
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
    reference: Any  # the objective's, else None
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
    also_log = open_log(c, run) if first else None
    with (
        open(run.out / "metrics.jsonl", "a", encoding="utf-8") if first else contextlib.nullcontext() as log,
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
    check_log(c)
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
    objective, reference = functools.partial(objectives.OBJECTIVES[c.objective].loss, **parameters), None
    if objectives.OBJECTIVES[c.objective].reference is not None:
        reference = first_reference(stored, loaded.m, parameters, processes, prefer, place)
        objective = functools.partial(objective, reference=reference)
    fused = processes.device.type == "cuda"  # one kernel for all weights; elsewhere it has no advantage
    optimizer = torch.optim.AdamW(weights.values(), lr=c.lr, weight_decay=c.weight_decay, fused=fused)

    out = disk.open_run(c.out, meta, processes, free)
    if processes.first:
        warn_of_options(c, total, unused)
    loaded.m.train()  # for dropout, and whatever else an objective does in training alone
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


def first_reference(c, m, parameters, processes, dtype, place):
    """The reference of an objective that has one: the student as it starts."""

    def load_again():
        return loading.load_model(c, processes, dtype=dtype, place=place).m

    reference = objectives.OBJECTIVES[c.objective].reference(m, load_again, parameters)
    if c.adapter:  # else a new adapter, which changes nothing yet
        reference.update()
    return reference


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
    for name, value in RECIPES.get(c.recipe, {}).items():
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


LOGS = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}  # --log -> the module that it needs


def check_log(c):
    """Raises ImportError, before a folder is made, where the library of --log is not installed."""
    if c.log is None:
        return
    try:
        importlib.import_module(LOGS[c.log])
    except ImportError as e:
        raise ImportError(f"--log {c.log} needs a package that is not here: pip install {c.log}") from e


def open_log(c, run):
    """A function of a step's metrics that writes them to --log's library too. Raises ImportError without it."""
    if c.log == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter  # needs the package tensorboard

        writer = SummaryWriter(run.out / "tensorboard")

        def write(metrics):
            for name, value in metrics.items():
                if isinstance(value, (int, float)):
                    writer.add_scalar(name, value, metrics["step"])
            writer.flush()

        return write
    if c.log == "wandb":
        import wandb

        wandb.init(project="tabom", name=run.out.name, dir=run.out, config=data.read_json(run.out / "meta.json"))
        return lambda metrics: wandb.log(metrics, step=metrics["step"])
    return lambda metrics: None


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
    begun, c, processes = time.time(), run.c, run.processes
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
    metrics["tokens_per_second"] = round(tokens / (time.time() - begun), 1)
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
        found["sample"] = evaluate.answer_batch(run.loaded, example, run.sampling, c.seed, processes.device)[0]["text"]
    m.train()
    return found


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
        batch = loading.batch_of(shown, run.loaded, processes, run.grid)
        # The loss of the global batch is the mean over its rows; theirs has this share in it.
        losses = run.objective(run.loaded.m, batch, generator=generators, **more)
        yield records, len(records) / len(chosen), losses


def normaliser(run, chosen, when):
    """The arguments with which the loss of a part of a batch is its share of the whole batch's (Objective.normaliser).
    chosen: the records of the whole batch. when: the epoch, or "held out"."""
    of_batch = objectives.OBJECTIVES[run.c.objective].normaliser
    if of_batch is None:
        return {}
    # The same keys as for the loss, so the same draws: of all rows, not only of this process's.
    generators = [data.generator(run.c.seed, when, r["id"]) for r in chosen]
    batch = data.collate(chosen, run.loaded.m.config.pad_id)
    return of_batch(batch, run.objective.keywords, generators)


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


# -------------------------------------------------------------------------------------------------- what to train on


def training_records(c, loaded, parameters, processes, grid=None):
    """What to train on, sorted by id: the usable trajectories, or a dataset's prompts with their answers, as dicts of
    id, prompt_ids, response_ids, order (None for an answer) and what else the objective's parameters ask for. grid: of
    block-causal attention, see --grid; raises ValueError for one of a model without blocks."""
    config = loaded.m.config
    if config.block_length is None and grid is not None:
        raise ValueError(f"--grid {grid}: {c.model} sees everything, without blocks; leave it out")
    path, say = Path(c.data), torchrun.warner(processes)
    # A dataset's answers have no decode order: only an objective like Eq. 1 does without one.
    needs = objectives.OBJECTIVES[c.objective].needs(parameters)
    if data.holds_trajectories(path):
        kept = usable_trajectories(c, path, loaded, processes, say)
        gaps = sum(map(has_gap, kept))
        if gaps and "order" in needs:
            what = f"{gaps} of {len(kept)} trajectories have steps in which nothing was decoded"
            say(f"{what}: a window of such steps has fewer tokens, and an empty one trains on nothing")
    elif "order" not in needs:
        examples = data.read_examples(path, c.prompt_field, c.answer_field, c.limit, say)
        data.encode_examples(loaded.tok, examples, c.raw, c.max_prompt_tokens, answers=True)
        kept = examples
    else:
        raise ValueError(
            f"{path} has no trajectories, and {c.objective} needs them: distill first, or --objective nelbo"
        )
    fields = dict.fromkeys(("id", "prompt_ids", "response_ids", "order", *needs))
    records = []
    for record in kept:
        records.append({name: record.get(name) for name in fields})
        if grid is not None:
            records[-1] = whole_blocks(records[-1], config.block_length, grid, config.eos_id)
    if "entropy" in fields and any(record["entropy"] is None for record in records):
        raise ValueError(f"{path}: --ranking kl needs the entropies that distill logs, and some rows have none")
    return records


def whole_blocks(record, block_length, grid, eos_id):
    """A record for block-causal attention, whose last block is whole. A dataset's answer is filled up with EOS, which
    are targets as in SDAR's and A2D's own training: decoding asks for the whole block. A trajectory loses the masks
    behind the last block in which something was decoded: nothing sees them."""
    order = record["order"]
    n = len(record["response_ids"])
    if order is not None:
        while n > 0 and order[n - 1] < 0:
            n -= 1
    begin = len(record["prompt_ids"]) if grid == "start" else 0
    filling = -(begin + n) % block_length
    if order is None:
        return {**record, "response_ids": record["response_ids"] + [eos_id] * filling}
    changed = dict(record)
    for name in ("response_ids", "order", "entropy"):
        if record.get(name) is not None:
            changed[name] = record[name][: n + filling]
    return changed


def check_context(records, loaded, processes):
    """Warn of prompts that, with their response, are longer than what the model was made for."""
    longest, context = max(map(length, records)), loaded.m.config.max_length
    if context is not None and longest > context:
        line = f"a prompt and its response have up to {longest} tokens, the model's context has {context}"
        torchrun.warner(processes)(line)


def usable_trajectories(c, path, loaded, processes, say):
    """The trajectories that --keep lets through. Raises ValueError where none is left, for another vocabulary, and for
    a distillation that is not finished."""
    config, tok = loaded.m.config, loaded.tok
    methods = c.methods
    if methods is not None and "all" in methods:
        methods = None
    records = data.read_trajectories(path, config.vocab_size, tok, methods, config.mask_id, c.max_prompt_tokens, say)[
        : c.limit
    ]
    meta = data.read_json(path / "meta.json") if (path / "meta.json").is_file() else {}
    if meta.get("vocab_size", config.vocab_size) != config.vocab_size:
        raise ValueError(f"{path}: made with a vocabulary of {meta['vocab_size']}; {c.model} has {config.vocab_size}")
    check_finished(c, path, meta, len(records), processes)
    kept = [r for r in records if data.usable(r, c.keep)]
    if not kept:  # say why: an answer that is cut off and a wrong one want different remedies
        finished = sum(bool(r.get("finished")) for r in records)
        wrong = sum(r.get("correct") is False for r in records)
        raise ValueError(
            f"{path}: --keep {c.keep} keeps none of {len(records)} ({finished} finished, {wrong} wrong): "
            "take another --keep, or distill with a larger --max-new-tokens"
        )
    if (c.methods or c.max_prompt_tokens) and "method" not in kept[0]:
        say("--methods and --max-prompt-tokens act on the authors' files: these have their prompts already")
    wrong = sum(r.get("correct") is False for r in kept)
    if wrong:
        say(f"{wrong} of {len(kept)} trajectories are wrong and are trained on: --keep correct leaves them out")
    if c.cut_eos:
        kept = [data.cut_at_eos(r, tok.stop_ids) for r in kept]
    return kept


def has_gap(record):
    """Whether a trajectory has steps, before its last one, in which nothing was decoded."""
    steps = set(record["order"]) - {-1}
    return len(steps) <= max(steps)


def check_finished(c, path, meta, there, processes):
    """Raises ValueError for a distillation that is still running, or that ended before its last prompt."""
    if path.is_dir() and processes.locked_by_another(path):
        raise ValueError(f"{path}: distill is still writing into it: wait for it")
    prompts = meta.get("prompts")
    wanted = min(prompts if type(prompts) is int else there, c.limit or math.inf)  # a stranger's may be anything
    if there < wanted and not c.unfinished:
        how = "the same distill command continues it; --unfinished trains on what is there"
        raise ValueError(f"{path}: {there} of {wanted} prompts are answered: {how}")
