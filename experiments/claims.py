"""The paper's claims on a small model: its tables and figures, with seeds, intervals and paired differences.

    torchrun --nproc_per_node 2 tabom.py claims                      # hours, and the same command
    python tabom.py claims --rows "SFT-SD;TABOM" --seeds 1           # continues; only these rows

Every base model is made from random weights by tiny.retrain with a seed of its own, and answers puzzles of its own.
Its hard in-domain puzzles are distilled once, and every row of the tables trains on the trajectories that are right,
or on the same puzzles' answers in the foreign style (SFT-GT), with the same adapter, number of steps and batches. The
last checkpoint counts in every row. What was tried before is in results/registered.md: on validation puzzles of the
first base model alone.

    O/base-N/tiny                 a base model; data (its puzzles), T (trajectories), kept.jsonl (those that are
                                  right), truth.jsonl (SFT-GT on the same puzzles), D (diagnose)
    O/base-N/runs/ROW/seed-S      a run as in sweep.py; O/base-N/runs/base is the model before training
    O/results/results.json        every run with its scores, every row with its intervals
    O/results/tables.md           the tables, in the shape of the paper's
    O/commands.jsonl              when it was started and continued, and with which options
    O/results/*.png               TDS over steps (Figure 2), loss over mask ratio (Figure 3), accuracy over training
"""

import contextlib
import functools
import json
import os
import platform
import shutil
import sys
import time
from dataclasses import dataclass

import data
import distill
import runs
from experiments import diagnose, puzzles, report, stats, sweep, tiny
from options import opt, row_list

# TABOM's own settings, and what every row trains with.
SETTING = dict(window=8, margin=0.2, weight=1.0)
TRAINING = dict(epochs=3, lr=3e-3, global_batch=16, batch_size=16, warmup=20)
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
GRID = {
    f"TABOM, {name} {value}": dict(objective="tabom", **{name: value})
    for name, values in dict(window=(4, 16), margin=(0.1, 0.3), weight=(2.0, 5.0)).items()
    for value in values
}
ROWS.update(GRID)
FOREIGN = 0.1  # of the answers that a base model sees are in foreign style
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


def claims(c):
    """The paper's claims with intervals: several base models, all objectives; hours -> where the tables are."""
    rows = list(ROWS) if c.rows is None else list(c.rows)
    unknown = [name for name in rows if name not in ROWS]
    if unknown:
        raise ValueError(f"--rows {unknown[0]}: none of {'; '.join(ROWS)}")
    processes, alone = runs.Processes("cpu"), runs.Processes("cpu", alone=True)
    sizes = QUICK if c.quick else SIZES
    tasks = {name: [task.tag, task.symbols, task.foreign] for name, task in puzzles.TASKS.items()}
    about = dict(setting=SETTING, training=TRAINING, sizes=sizes, foreign=FOREIGN, taken=TAKEN, seed=c.seed)
    about.update(tasks=tasks, domains=[puzzles.IN_DOMAIN, puzzles.OUT_OF_DOMAIN])
    about.update(command="claims", versions=runs.versions())
    out = runs.open_run(c.out or "out/experiment", about, processes, free=("command",))  # it was called demo --full
    if processes.first:
        with open(out / "commands.jsonl", "a", encoding="utf-8") as f:
            now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            f.write(json.dumps(dict(time=now, options={k: getattr(c, k) for k in COMMAND})) + "\n")

    bases = [out / f"base-{i}" for i in range(c.bases)]
    jobs = {base: functools.partial(prepare, c, alone, c.seed + i) for i, base in enumerate(bases)}
    jobs.update({base / "runs" / "base": functools.partial(sweep.base_run, of_base(c, base), alone) for base in bases})
    for seed in range(c.seeds):
        for name in rows:
            for base in bases:
                settings = settings_of(name, c.seed + seed)
                folder = base / "runs" / name / f"seed-{settings['seed']}"
                before = sweep.result_of(folder)
                if before and before["settings"] != settings:
                    raise ValueError(f"{folder} was made with {before['settings']}, now it is {settings}: remove it")
                jobs[folder] = functools.partial(one_run, c, alone, base, settings)
    needs = {folder: base for folder in jobs for base in bases if base in folder.parents}
    sweep.share(jobs, processes, alone, needs)
    if not processes.first:
        return None
    machine = dict(processors=os.cpu_count(), machine=platform.machine(), system=platform.system())
    commands = [row for _, row in data.read_rows(out / "commands.jsonl")]
    about = dict(commands=commands, setting=SETTING, training=TRAINING, sizes=sizes, machine=machine)
    found = collect(out)
    report.write(out / "results", found, loss_curves(out), list(GRID), about)
    return dict(out=str(out / "results"), runs=len(found), rows=len(report.names_of(found)))


def settings_of(name, seed):
    """What a row changes of the options of train."""
    own = SETTING if ROWS[name]["objective"] == "tabom" else {}
    return {**own, **ROWS[name], "seed": seed}


def prepare(c, alone, seed, base):
    """A base model, its puzzles, its trajectories and the answers in foreign style -> what there is of each."""
    if c.quick:
        shutil.copytree(tiny.TINY, base / "tiny", dirs_exist_ok=True)
    elif not (base / "tiny").is_dir():
        tiny.retrain(base, seed, FOREIGN, taken=TAKEN, processes=alone)
    puzzles.write_datasets(base / "data", seed, **QUICK if c.quick else SIZES)
    s = of_base(c, base)
    distill.distill(sweep.decoding(s, None, base / "data" / "train.jsonl", base / "T", s.seed, None), alone)
    records = data.read_trajectories(base / "T")
    kept = [r for r in records if data.usable(r)]
    task = puzzles.TASKS[puzzles.IN_DOMAIN]
    with runs.atomic_file(base / "kept.jsonl") as f:
        f.writelines(json.dumps(r) + "\n" for r in kept)
    with runs.atomic_file(base / "truth.jsonl") as f:
        for r in kept:
            f.write(json.dumps(dict(id=r["id"], prompt=r["prompt"], answer=puzzles.restyled(r["answer"], task))) + "\n")
    shutil.rmtree(base / "D", ignore_errors=True)
    about = dict(model=str(base / "tiny"), data=str(base / "kept.jsonl"), ground_truth=str(base / "truth.jsonl"))
    about.update(device="cpu")
    with contextlib.redirect_stdout(sys.stderr):
        diagnose.diagnose(
            diagnose.DiagnoseOptions(**about, out=str(base / "D"), window=SETTING["window"], limit=128), alone
        )
    return dict(seed=seed, puzzles=len(records), kept=len(kept))


def of_base(c, base):
    """The options of a sweep over one base model."""
    at = {k: str(base / "data" / f"{k}.jsonl") for k in ("validation", "test_in", "test_out")}
    return sweep.SweepOptions(
        model=str(base / "tiny"),
        data=str(base / "T"),
        ground_truth=str(base / "truth.jsonl"),
        validation=at["validation"],
        test=(at["test_in"], at["test_out"]),
        out=str(base),
        tokens_per_step=TOKENS_PER_STEP,
        check="exact",
        metric="last",
        decode_batch=BATCH,
        device="cpu",
        compile=c.compile,
        **TRAINING,
    )


def one_run(c, alone, base, settings, folder):
    """Train, validate and test one row with one seed; with the first seed validate every epoch."""
    s = of_base(c, base)
    result = sweep.one_run(s, alone, settings, base / "T", folder)
    if settings["seed"] == c.seed:
        curve = []
        for epoch in range(1, settings.get("epochs", s.epochs) + 1):
            where = folder / f"validation-1-{epoch}"
            curve.append(sweep.validate(s, alone, str(folder / "R-1" / f"epoch-{epoch}"), where, settings["seed"]))
        result["curve"] = [score["accuracy"] for score in curve]
    return dict(result, versions=runs.versions(), compile=c.compile)


# ------------------------------------------------------------------------------------------------------- what is there


def collect(out):
    """(row, base, seed) -> the result of a run, the base models first; paths relative to the experiment's folder."""
    found = {}
    for base in sorted(out.glob("base-*")):
        result = sweep.result_of(base / "runs" / "base")
        if result is not None:
            result["styles"] = styles(base / "runs" / "base")
            about = sweep.result_of(base)
            found["base", base.name, None] = {**result, **about, "row": "base", "base": base.name}
    for name in ROWS:
        for base in sorted(out.glob("base-*")):
            for folder in sorted((base / "runs" / name).glob("seed-*")):
                result = sweep.result_of(folder)
                if result is not None:
                    result["styles"] = styles(folder)
                    found[name, base.name, result["settings"]["seed"]] = dict(row=name, base=base.name, **result)
    text = json.dumps(list(found.values())).replace(f"{out.resolve()}/", "").replace(f"{out}/", "")
    return dict(zip(found, json.loads(text)))


def styles(folder):
    """In which style a run answers each test set: the share of answers in foreign style, and the share that is right of
    the others (None without any)."""
    shares = {}
    for stem, name in (("test_in", puzzles.IN_DOMAIN), ("test_out", puzzles.OUT_OF_DOMAIN)):
        foreign, records = set(puzzles.TASKS[name].foreign), []
        for file in data.trajectory_files(folder / f"test-{stem}"):
            records += [(bool(r["text"]) and set(r["text"]) <= foreign, r["correct"]) for _, r in data.read_rows(file)]
        own = [right for is_foreign, right in records if not is_foreign]
        shares[stem] = dict(foreign=1 - len(own) / len(records), own_right=sum(own) / len(own) if own else None)
    return shares


def loss_curves(out):
    """Cross-entropy over the mask ratio, the mean over the base models, for trajectories and the foreign style."""
    cells = {}
    for file in sorted(out.glob("base-*/D/loss.jsonl")):
        for _, row in data.read_rows(file):
            source = "self-distilled" if row["data"].endswith("(decoded)") else "ground truth"
            cells.setdefault((source, row["mask_ratio"]), []).append(row["loss"])
    return [
        dict(model="base", data=source, mask_ratio=ratio, **stats.mean_and_error("loss", values))
        for (source, ratio), values in sorted(cells.items())
    ]
