"""The paper's claims on a small model: its tables and figures, with intervals and differences.

    torchrun --nproc_per_node 2 tabom.py claims                      # hours, and the same command
    python tabom.py claims --rows "SFT-SD;TABOM" --seeds 1           # continues; only these rows
    torchrun --nproc_per_node 8 tabom.py claims --model M --data theirs.jsonl --recipe dream-prm12k \
        --test gsm8k,humaneval --out out/C                           # on trajectories that are there

tiny.retrain makes every base model from random weights, with a seed of its own, and each has its
own puzzles. Its hard in-domain puzzles are distilled once. Every row of the tables trains on the
right ones of these trajectories, or on the same puzzles' answers in the foreign style (SFT-GT),
with the same adapter, number of steps and batches. The last checkpoint counts in every row.
results/registered.md says what was tried before: on validation puzzles of the first base model
alone.

    O/base-N/tiny               a base model; beside it: data (its puzzles), T (trajectories),
                                kept.jsonl (those that are right), truth.jsonl (SFT-GT on the same
                                puzzles), D (diagnose)
    O/base-N/runs/ROW/seed-S    a run as in sweep.py
    O/base-N/runs/base          the same for the model before training
    O/commands.jsonl            when it was started and continued, and with which options
    O/results                   results.json, tables and pictures: see report.py
"""

import contextlib
import functools
import glob
import itertools
import json
import os
import platform
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import data
import distill
import runs
import train
from experiments import diagnose, puzzles, report, stats, sweep, tiny
from options import name_list, opt, row_list

# TABOM's own settings, with which the order of answers is measured too; and what every row trains
# with.
SETTING = dict(window=8, margin=0.2, weight=1.0)
TRAINING = dict(epochs=3, lr=3e-3, global_batch=16, batch_size=16, warmup=20)
PINNED = dict(weight_decay=0.0, cut_eos=True)  # as the committed results were made; not train's defaults
ROWS = {
    "SFT-GT": dict(objective=sweep.GROUND_TRUTH),
    "SFT-SD": dict(objective="nelbo"),
    "TABOM": dict(objective="tabom"),
    "TABOM, no ranking": dict(objective="tabom", weight=0.0),
    "TABOM, global window": dict(objective="tabom", window="global"),
    "dInfer": dict(objective="transition"),
    "naive TD": dict(objective="traj"),
    "T3D": dict(objective="t3d"),
    "dParallel": dict(objective="dparallel", block_length=8),
    "TABOM, own step": dict(objective="tabom", entropy_context="step"),
    "TABOM, ranking alone": dict(objective="tabom", ce_weight=0.0),
}
GRID = {  # Table 9: each differs from TABOM in one setting
    "TABOM, window 4": dict(objective="tabom", window=4),
    "TABOM, window 16": dict(objective="tabom", window=16),
    "TABOM, margin 0.1": dict(objective="tabom", margin=0.1),
    "TABOM, margin 0.3": dict(objective="tabom", margin=0.3),
    "TABOM, weight 2.0": dict(objective="tabom", weight=2.0),
    "TABOM, weight 5.0": dict(objective="tabom", weight=5.0),
}
ROWS.update(GRID)
FOREIGN = 0.1  # share of the answers that a base model sees in foreign style
TAKEN = 2  # a base model is the checkpoint after so many of its 3 epochs: it can still learn
SIZES = dict(train=3200, validation=400, test=1000)
QUICK = dict(train=24, validation=6, test=6)
BATCH = 64  # puzzles decoded together
TOKENS_PER_STEP = (1, 2)
COMMAND = ("quick", "bases", "seeds", "rows", "compile", "seed")  # the options that say what is made


@dataclass
class ClaimsOptions:
    """the experiment"""

    out: str | None = opt(None, "folder for base models, runs and tables (out/experiment); continued if unfinished")
    quick: bool = opt(False, "few puzzles and the model in tiny/: shows that it runs, not what it does")
    bases: int = opt(3, "base models, trained from different seeds", low=1)
    seeds: int = opt(2, "training runs of each row on each base model", low=1)
    rows: tuple | None = opt(None, "only these rows of the tables, separated by ;", parse=row_list)
    compile: bool = opt(False, "compile the blocks of the transformer; faster, equal but for rounding")
    seed: int = opt(0, "of the tasks and of the training")
    data: str | None = opt(None, "no puzzles: trajectories of --model, of distill or of the authors")
    model: str | None = opt(None, "with --data: the model whose trajectories they are")
    test: tuple = opt((), "with --data: datasets or benchmarks to answer, comma-separated", parse=name_list)
    benchmarks: str | None = opt(None, "with --data: folder with the benchmarks' files, else from the Hub")
    ground_truth: str | None = opt(None, "with --data: dataset whose answers SFT-GT trains on; without it no SFT-GT")
    recipe: str | None = opt(None, "with --data: settings of all rows, as in train", choices=tuple(train.RECIPES))
    methods: tuple | None = opt(None, "with --data: as in train", parse=name_list)


def claims(c):
    """The paper's claims with intervals: several base models, all objectives; hours -> where the
    tables are."""
    rows = list(c.rows or ROWS)
    for name in rows:
        if name not in ROWS:
            raise ValueError(f"--rows {name}: none of {'; '.join(ROWS)}")
    if c.data or c.model or c.test:
        return on_trajectories(c)
    processes, alone = runs.Processes("cpu"), runs.Processes("cpu", alone=True)
    out = Path(c.out or "out/experiment")
    out = runs.open_run(out, identity(c), processes, free=("command",))  # it was demo --full
    if processes.first:
        log_command(c, out)

    bases = [out / f"base-{i}" for i in range(c.bases)]
    jobs, needs = {}, {}  # folder -> what makes it; folder -> the folder that must be there first
    for i, base in enumerate(bases):
        jobs[base] = functools.partial(make_base, c, alone, c.seed + i)
    for base in bases:
        jobs[base / "runs" / "base"] = functools.partial(run_before_training, c, alone, base)
        needs[base / "runs" / "base"] = base
    for seed, name, base in itertools.product(range(c.seeds), rows, bases):
        settings = settings_of(name, c.seed + seed)
        folder = base / "runs" / name / f"seed-{settings['seed']}"
        check_row_settings(folder, settings)
        jobs[folder] = functools.partial(run_of_row, c, alone, base, settings)
        needs[folder] = base
    sweep.share(jobs, processes, alone, needs)
    if not processes.first:
        return None
    found = collect(out)
    report.write_report(out / "results", found, loss_curves(out), list(GRID), about(c, out))
    return dict(out=str(out / "results"), runs=len(found), rows=len(report.names_of(found)))


def on_trajectories(c):
    """The rows of the tables on trajectories that are there: a sweep over one model, with train's
    own settings or a recipe's in place of those of the puzzles -> what sweep returns."""
    if not (c.data and c.model and c.test):
        raise ValueError("--data, --model and --test: claims needs all three, or none for its puzzles")
    if c.quick:
        raise ValueError("--quick is for the puzzles: leave it out with --data")
    default = [name for name in ROWS if name not in GRID and (c.ground_truth or name != "SFT-GT")]
    grid = {}
    for name, seed in itertools.product(c.rows or default, range(c.seed, c.seed + c.seeds)):
        settings = dict(ROWS[name], seed=seed)
        settings.pop("block_length", None)  # of the puzzles
        if settings.get("window") == "global":
            settings["starts"] = "uniform"  # which a recipe may have changed; a global window has no other
        grid[f"{name}/seed-{seed}"] = settings
    given = dict(model=c.model, data=c.data, ground_truth=c.ground_truth, test=c.test, benchmarks=c.benchmarks)
    given.update(out=c.out or "out/claims", seed=c.seed, compile=c.compile, recipe=c.recipe, metric="last")
    if c.methods:
        given.update(methods=c.methods)  # else the recipe's
    return sweep.sweep(sweep.SweepOptions(tokens_per_step=TOKENS_PER_STEP, **given), grid)


def identity(c):
    """What an experiment is, for its meta.json: nothing of it may change between two starts."""
    tasks = {}
    for name, task in puzzles.TASKS.items():
        tasks[name] = [task.tag, task.symbols, task.foreign]
    return dict(
        setting=SETTING,
        training=TRAINING,
        sizes=QUICK if c.quick else SIZES,
        foreign=FOREIGN,
        taken=TAKEN,
        seed=c.seed,
        tasks=tasks,
        domains=[puzzles.IN_DOMAIN, puzzles.OUT_OF_DOMAIN],
        command="claims",
        versions=runs.versions(),
    )


def log_command(c, out):
    """Add a line to commands.jsonl: now, and the options that say what is made."""
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    options = {name: getattr(c, name) for name in COMMAND}
    with open(out / "commands.jsonl", "a", encoding="utf-8") as f:
        f.write(json.dumps(dict(time=now, options=options)) + "\n")


def about(c, out):
    """What results.json says of the experiment, beside its runs."""
    commands = [row for _, row in data.read_rows(out / "commands.jsonl")]
    machine = dict(processors=os.cpu_count(), machine=platform.machine(), system=platform.system())
    sizes = QUICK if c.quick else SIZES
    training = {**TRAINING, **PINNED}
    return dict(commands=commands, setting=SETTING, training=training, sizes=sizes, machine=machine)


def settings_of(name, seed):
    """What a row changes of the options of train."""
    settings = dict(ROWS[name], seed=seed)
    if settings["objective"] == "tabom":
        settings = {**SETTING, **settings}
    return settings


def check_row_settings(folder, settings):
    """Raises ValueError for a run that is there already and was made with other settings."""
    before = sweep.result_of(folder)
    if before and before["settings"] != settings:
        raise ValueError(f"{folder} was made with {before['settings']}, now it is {settings}: remove it")


# -------------------------------------------------------------------------------------------- jobs


def make_base(c, alone, seed, base):
    """A base model, its puzzles, its trajectories and the answers in foreign style -> what there is
    of each."""
    if c.quick:
        shutil.copytree(tiny.TINY, base / "tiny", dirs_exist_ok=True)
    elif not (base / "tiny").is_dir():
        tiny.retrain(base, seed, FOREIGN, taken=TAKEN, processes=alone)
    puzzles.write_datasets(base / "data", seed, **QUICK if c.quick else SIZES)
    s = of_base(c, base)
    distill.distill(sweep.decoding(s, None, base / "data" / "train.jsonl", base / "T", s.seed, None), alone)
    records = data.read_trajectories(base / "T")
    kept = list(filter(data.usable, records))
    write_rows(base / "kept.jsonl", kept)
    task, truth = puzzles.TASKS[puzzles.IN_DOMAIN], []
    for r in kept:
        truth.append(dict(id=r["id"], prompt=r["prompt"], answer=puzzles.restyled(r["answer"], task)))
    write_rows(base / "truth.jsonl", truth)
    measure_base(base, alone)
    return dict(seed=seed, puzzles=len(records), kept=len(kept))


def write_rows(file, rows):
    with runs.atomic_file(file) as f:
        for row in rows:
            f.write(json.dumps(row) + "\n")


def measure_base(base, alone):
    """Diagnose a base model: its cross-entropy over the mask ratio is Figure 3."""
    shutil.rmtree(base / "D", ignore_errors=True)
    options = diagnose.DiagnoseOptions(
        model=str(base / "tiny"),
        data=str(base / "kept.jsonl"),
        ground_truth=str(base / "truth.jsonl"),
        out=str(base / "D"),
        window=SETTING["window"],
        margin=SETTING["margin"],
        limit=128,
        device="cpu",
    )
    with contextlib.redirect_stdout(sys.stderr):
        diagnose.diagnose(options, alone)


def of_base(c, base):
    """The options of a sweep over one base model."""
    datasets = base / "data"
    return sweep.SweepOptions(
        model=str(base / "tiny"),
        data=str(base / "T"),
        ground_truth=str(base / "truth.jsonl"),
        validation=str(datasets / "validation.jsonl"),
        test=(str(datasets / "test_in.jsonl"), str(datasets / "test_out.jsonl")),
        out=str(base),
        tokens_per_step=TOKENS_PER_STEP,
        check="exact",
        metric="last",
        decode_batch=BATCH,
        device="cpu",
        compile=c.compile,
        **TRAINING,
        **PINNED,
    )


def bench_of(c, alone, base):
    """What the runs on a base model work with. Their order is measured with TABOM's window and
    margin in every row."""
    return sweep.Workbench(of_base(c, base), alone, SETTING["window"], SETTING["margin"])


def run_before_training(c, alone, base, folder):
    """The model before training, tested like every row."""
    return sweep.base_run(bench_of(c, alone, base), folder)


def run_of_row(c, alone, base, settings, folder):
    """Train, validate and test one row with one seed; with the first seed validate every epoch."""
    bench = bench_of(c, alone, base)
    result = sweep.one_run(bench, settings, base / "T", folder)
    if settings["seed"] == c.seed:
        result["curve"] = []
        for epoch in range(1, settings.get("epochs", bench.c.epochs) + 1):
            checkpoint = str(folder / "R-1" / f"epoch-{epoch}")
            score = sweep.validate(bench, checkpoint, folder / f"validation-1-{epoch}", settings["seed"])
            result["curve"].append(score["accuracy"])
    return dict(result, versions=runs.versions(), compile=c.compile)


# ----------------------------------------------------------------------------------- what is there


def collect(out):
    """(row, base, seed) -> the result of a run, the base models first; paths relative to the
    experiment's folder."""
    found = {}
    for base in sorted(out.glob("base-*")):
        result = finished_run(base / "runs" / "base", out)
        if result is not None:
            about_base = sweep.result_of(base)
            found["base", base.name, None] = {**result, **about_base, "row": "base", "base": base.name}
    for name in ROWS:
        for folder in sorted(out.glob(f"base-*/runs/{glob.escape(name)}/seed-*")):
            base, result = folder.parts[-4], finished_run(folder, out)
            if result is not None:
                found[name, base, result["settings"]["seed"]] = dict(row=name, base=base, **result)
    return found


def finished_run(folder, out):
    """The result of a run with the styles of its answers; None before it has one. Paths are
    relative to out."""
    result = sweep.result_of(folder)
    if result is None:
        return None
    text = json.dumps(sweep.upgraded(result))
    for prefix in (f"{out.resolve()}/", f"{out}/"):
        text = text.replace(prefix, "")
    return dict(json.loads(text), styles=styles(folder))


def styles(folder):
    """In which style a run answers each test set: the share of answers in foreign style, and the
    share that is right of the others (None without any)."""
    shares = {}
    for stem, name in (("test_in", puzzles.IN_DOMAIN), ("test_out", puzzles.OUT_OF_DOMAIN)):
        foreign, own, answers = set(puzzles.TASKS[name].foreign), [], 0
        for file in data.trajectory_files(folder / f"test-{stem}"):
            for _, r in data.read_rows(file):
                answers += 1
                if not r["text"] or not set(r["text"]) <= foreign:
                    own.append(r["correct"])
        right = None
        if own:
            right = sum(own) / len(own)
        shares[stem] = dict(foreign=1 - len(own) / answers, own_right=right)
    return shares


def loss_curves(out):
    """Cross-entropy over the mask ratio, the mean over the base models, for trajectories and the
    foreign style."""
    cells = {}  # (source, mask ratio) -> the loss of each base model
    for file in sorted(out.glob("base-*/D/loss.jsonl")):
        for _, row in data.read_rows(file):
            source = "ground truth"
            if row["data"].endswith("(decoded)"):
                source = "self-distilled"
            cells.setdefault((source, row["mask_ratio"]), []).append(row["loss"])
    rows = []
    for (source, ratio), values in sorted(cells.items()):
        about_cell = dict(model="base", data=source, mask_ratio=ratio, base_models=len(values))
        rows.append(dict(**about_cell, **stats.mean_and_error("loss", values)))
    return rows
