"""The paper's claims on a small model: its tables and figures, with seeds, intervals and paired differences.

    torchrun --nproc_per_node 2 tabom.py demo --full                      # run() below; hours, and the same command
    python tabom.py demo --full --rows "SFT-SD;TABOM" --seeds 1           # continues; only these rows

Every base model is made from random weights by demo.retrain with a seed of its own, and answers puzzles of its own.
Its hard in-domain puzzles are distilled once, and every row of the tables trains on the trajectories that are right,
or on the same puzzles' answers in the foreign style (SFT-GT), with the same adapter, number of steps and batches. The
last checkpoint counts in every row. What was tried before is in results/registered.md: on validation puzzles of the
first base model alone. The test puzzles are used for nothing but the tables.

The unit of the statistics is the base model: the runs on one of them share its weights, trajectories and test puzzles,
so their mean is one value.

    O/base-N/tiny                 a base model; data (its puzzles), T (trajectories), kept.jsonl (those that are
                                  right), truth.jsonl (SFT-GT on the same puzzles), D (diagnose)
    O/base-N/runs/ROW/seed-S      a run as in sweep.py; O/base-N/runs/base is the model before training
    O/results/results.json        every run with its scores, every row with its intervals
    O/results/tables.md           the tables, in the shape of the paper's
    O/results/*.png               TDS over steps (Figure 2), loss over mask ratio (Figure 3), accuracy over training
"""

import contextlib
import functools
import json
import os
import platform
import shutil
import sys

import data
import demo
import diagnose
import options
import runs
import sweep
import tabom

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
COMPARED = ("base", "SFT-SD", "TABOM")  # what differences are taken to
FOREIGN = 0.1  # of the answers that a base model sees are in foreign style
TAKEN = 2  # a base model is the checkpoint after so many of its 3 epochs: it can still learn
SIZES = dict(train=3200, validation=400, test=1000)
QUICK = dict(train=24, validation=6, test=6)
BATCH = 64  # puzzles decoded together
TOKENS_PER_STEP = (1, 2)


def run(c):
    """Make what is missing of the experiment -> where the tables are. c: options.DemoOptions."""
    rows = list(ROWS) if c.rows is None else list(c.rows)
    unknown = [name for name in rows if name not in ROWS]
    if unknown:
        raise ValueError(f"--rows {unknown[0]}: none of {'; '.join(ROWS)}")
    ranks, alone = runs.Ranks("cpu"), runs.Ranks("cpu", alone=True)
    sizes = QUICK if c.quick else SIZES
    tasks = {name: [task.tag, task.symbols, task.foreign] for name, task in demo.TASKS.items()}
    about = dict(setting=SETTING, training=TRAINING, sizes=sizes, foreign=FOREIGN, taken=TAKEN, seed=c.seed)
    about.update(tasks=tasks, domains=[demo.IN_DOMAIN, demo.OUT_OF_DOMAIN])
    about.update(command="demo --full", versions=runs.versions())
    out = runs.open_run(c.out or "out/experiment", about, ranks)

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
    sweep.share(jobs, ranks, needs)
    return report(c, out) if ranks.first else None


def settings_of(name, seed):
    """What a row changes of the options of train."""
    own = SETTING if ROWS[name]["objective"] == "tabom" else {}
    return {**own, **ROWS[name], "seed": seed}


def prepare(c, alone, seed, base):
    """A base model, its puzzles, its trajectories and the answers in foreign style -> what there is of each."""
    if c.quick:
        shutil.copytree(demo.TINY, base / "tiny", dirs_exist_ok=True)
    elif not (base / "tiny").is_dir():
        demo.retrain(base, seed, FOREIGN, taken=TAKEN, ranks=alone)
    demo.write_datasets(base / "data", seed, **QUICK if c.quick else SIZES)
    s = of_base(c, base)
    tabom.distill(sweep.decoding(s, None, base / "data" / "train.jsonl", base / "T", s.seed, None), alone)
    records = data.read_trajectories(base / "T")
    kept = [r for r in records if data.usable(r)]
    task = demo.TASKS[demo.IN_DOMAIN]
    with runs.atomic_file(base / "kept.jsonl") as f:
        f.writelines(json.dumps(r) + "\n" for r in kept)
    with runs.atomic_file(base / "truth.jsonl") as f:
        for r in kept:
            f.write(json.dumps(dict(id=r["id"], prompt=r["prompt"], answer=demo.restyled(r["answer"], task))) + "\n")
    shutil.rmtree(base / "D", ignore_errors=True)
    about = dict(model=str(base / "tiny"), data=str(base / "kept.jsonl"), ground_truth=str(base / "truth.jsonl"))
    about.update(device="cpu")
    with contextlib.redirect_stdout(sys.stderr):
        diagnose.run(options.DiagnoseOptions(**about, out=str(base / "D"), window=SETTING["window"], limit=128), alone)
    return dict(seed=seed, puzzles=len(records), kept=len(kept))


def of_base(c, base):
    """The options of a sweep over one base model."""
    at = {k: str(base / "data" / f"{k}.jsonl") for k in ("validation", "test_in", "test_out")}
    return options.SweepOptions(
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
    """Train, validate and test one row with one seed, and see in which style it answers; with the first seed validate
    every epoch."""
    s = of_base(c, base)
    result = sweep.one_run(s, alone, settings, base / "T", folder)
    if settings["seed"] == c.seed:
        curve = []
        for epoch in range(1, settings.get("epochs", s.epochs) + 1):
            where = folder / f"validation-1-{epoch}"
            curve.append(sweep.validate(s, alone, str(folder / "R-1" / f"epoch-{epoch}"), where, settings["seed"]))
        result["curve"] = [score["accuracy"] for score in curve]
    answers = [r["text"] for r in data.read_trajectories(folder / "test-test_in")]
    foreign = set(demo.TASKS[demo.IN_DOMAIN].foreign)
    return dict(result, foreign=sum(bool(text) and set(text) <= foreign for text in answers) / len(answers))


# --------------------------------------------------------------------------------------------------------- statistics


def by_base(values):
    """{(base, seed): value} -> {base: mean over its runs}; a value that is None is none."""
    bases = {}
    for (base, _), value in values.items():
        if value is not None:
            bases.setdefault(base, []).append(value)
    return {base: sum(ours) / len(ours) for base, ours in bases.items()}


def interval(values, level=0.95):
    """The mean over base models of {(base, seed): value} and its Student t interval -> dict(mean, low, high, bases: the
    value of each); low and high are None below two base models, and all is None without a value."""
    from scipy import stats

    bases = by_base(values)
    if not bases:
        return None
    ours, low, high = list(bases.values()), None, None
    if len(ours) > 1 and max(ours) > min(ours):
        low, high = map(float, stats.t.interval(level, len(ours) - 1, loc=sum(ours) / len(ours), scale=stats.sem(ours)))
    return dict(mean=sum(ours) / len(ours), low=low, high=high, bases=bases)


def paired(ours, theirs):
    """interval() of the differences of two rows over the runs that both have, and p of Student's paired two-sided test
    over the base models. A run without a seed (the model before training) goes with every run of its base model."""
    from scipy import stats

    differences = {}
    for (base, seed), our in ours.items():
        for (other, another), their in theirs.items():
            if base == other and (seed == another or None in (seed, another)) and None not in (our, their):
                differences[base, another if seed is None else seed] = our - their
    found = interval(differences)
    if found is not None:
        spread = found["low"] is not None
        found["p"] = float(stats.ttest_1samp(list(found["bases"].values()), 0).pvalue) if spread else None
    return found


def relation(found, label):
    """How a measure goes with in-domain accuracy over the rows that train on trajectories: Pearson's correlation for
    each base model, over the means of the seeds -> {base: r}; without those with fewer than three rows, or where
    nothing differs."""
    from scipy import stats

    points = {}
    for row in names_of(found, without=("base", "SFT-GT")):
        measured, right = (by_base(values_of(found, row, name)) for name in (label, "in-domain %"))
        for base, value in measured.items():
            points.setdefault(base, []).append((value, right[base]))
    relations = {}
    for base, pairs in sorted(points.items()):
        columns = list(zip(*pairs))
        if len(pairs) > 2 and all(max(column) - min(column) > 1e-9 for column in columns):
            relations[base] = float(stats.pearsonr(*columns).statistic)
    return relations


# ------------------------------------------------------------------------------------------------------------- report

MEASURES = {
    "in-domain %": lambda r: 100 * test(r, "test_in")["accuracy"],
    "out-of-domain %": lambda r: 100 * test(r, "test_out")["accuracy"],
    "in-domain, 2 a step %": lambda r: 100 * test(r, "test_in", 2)["accuracy"],
    "out-of-domain, 2 a step %": lambda r: 100 * test(r, "test_out", 2)["accuracy"],
    "validation %": lambda r: 100 * r["chosen"]["accuracy"],
    "TDS": lambda r: test(r, "test_in")["tds"],
    "ranking loss": lambda r: test(r, "test_in")["rank"],
    "inversions, own step %": lambda r: percent(test(r, "test_in")["inversions_step"]),
    "inversions, window %": lambda r: percent(test(r, "test_in")["inversions_window"]),
}
SOLVED = ("in-domain %", "out-of-domain %")
SOLVED_TWO = ("in-domain, 2 a step %", "out-of-domain, 2 a step %")
# None for a model that has nothing to say before its EOS
ORDER = ("TDS", "ranking loss", "inversions, own step %", "inversions, window %")


def percent(share):
    return None if share is None else 100 * share


def test(result, stem, at_once=1):
    """The scores of a run on one test set."""
    for name, scores in result["tests"].items():
        source, _, more = name.partition(", ")
        if sweep.stem(source) == stem and more == ("" if at_once == 1 else f"{at_once} a step"):
            return scores
    raise KeyError(stem)


def report(c, out):
    """Tables, figures and results.json of everything that is there -> where they are, and the number of runs."""
    found = collect(out)
    rows = summarise(found)
    losses = loss_curves(out)
    tables = markdown(found, rows, losses)
    folder = out / "results"
    folder.mkdir(exist_ok=True)
    machine = dict(processors=os.cpu_count(), machine=platform.machine(), system=platform.system())
    command = {k: v for k, v in vars(c).items() if k in ("full", "quick", "bases", "seeds", "rows", "compile", "seed")}
    about = dict(command=command, setting=SETTING, training=TRAINING, sizes=QUICK if c.quick else SIZES)
    relations = {label: relation(found, label) for label in ORDER}
    everything = dict(**about, versions=runs.versions(), machine=machine, rows=rows, relations=relations)
    everything["runs"] = list(found.values())
    with runs.atomic_file(folder / "results.json") as f:
        f.write(json.dumps(everything, indent=1) + "\n")
    with runs.atomic_file(folder / "tables.md") as f:
        f.write(tables + "\n")
    names = names_of(found, without=GRID)
    diagnose.save(diagnose.draw_tds(tds_curves(found, names)), folder / "tds.png")
    diagnose.save(diagnose.draw_loss(losses), folder / "loss.png")
    diagnose.save(draw_accuracy(found, names), folder / "accuracy.png")
    print(tables)
    return dict(out=str(folder), runs=len(found), rows=len(rows))


def collect(out):
    """(row, base, seed) -> the result of a run, the base models first; paths relative to the experiment's folder."""
    found = {}
    for base in sorted(out.glob("base-*")):
        result = sweep.result_of(base / "runs" / "base")
        if result is not None:
            about = sweep.result_of(base)
            found["base", base.name, None] = {**result, **about, "row": "base", "base": base.name}
    for name in ROWS:
        for base in sorted(out.glob("base-*")):
            for folder in sorted((base / "runs" / name).glob("seed-*")):
                result = sweep.result_of(folder)
                if result is not None:
                    found[name, base.name, result["settings"]["seed"]] = dict(row=name, base=base.name, **result)
    text = json.dumps(list(found.values())).replace(f"{out.resolve()}/", "").replace(f"{out}/", "")
    return dict(zip(found, json.loads(text)))


def names_of(found, without=()):
    """The rows that have runs, in their order."""
    return [name for name in dict.fromkeys(k[0] for k in found) if name not in without]


def values_of(found, row, label):
    """A measure of a row -> {(base, seed): value}"""
    return {k[1:]: MEASURES[label](r) for k, r in found.items() if k[0] == row}


def summarise(found):
    """Every row: its measures with intervals over the base models, and its differences to the rows in COMPARED."""
    rows = {}
    for name in names_of(found):
        ours = {label: values_of(found, name, label) for label in MEASURES}
        rows[name] = dict(
            runs=sum(k[0] == name for k in found),
            measures={label: interval(values) for label, values in ours.items()},
            differences={
                other: {label: paired(values, values_of(found, other, label)) for label, values in ours.items()}
                for other in COMPARED
                if other != name
            },
        )
    return rows


def markdown(found, rows, losses=()):
    """All tables. An interval is 95 %, Student's t over the base models; p is that of the paired test."""
    variants = [name for name in ROWS if name.startswith("TABOM,")]
    grid = ["TABOM", *(name for name in variants if name in GRID)]
    parts = ["TABOM", *(name for name in variants if name not in GRID)]
    main = ["base", *(name for name in ROWS if name not in variants)]
    style = [f"{100 * r['foreign']:.0f} %" for r in found.values() if r["row"] == "SFT-GT"]
    sections = [
        ("The base models", setup_table(found)),
        ("Answers in the foreign style", f"SFT-GT, run by run: {', '.join(style) or '-'}."),
        *((f"Main results (Tables 2 and 3): {k}", comparison(rows, main, k)) for k in SOLVED),
        *((f"Two tokens a step (Table 4): {k}", comparison(rows, main, k)) for k in SOLVED_TWO),
        *((f"Window and terms (Tables 5 to 7): {k}", comparison(rows, parts, k)) for k in SOLVED),
        *((f"Window, margin and weight (Table 9): {k}", comparison(rows, grid, k)) for k in SOLVED),
        *((f"Order: {k}", comparison(rows, list(rows), k)) for k in ORDER),
        ("Cross-entropy of the base models (Figure 3)", loss_table(losses)),
        ("What goes with in-domain accuracy", relation_table(found)),
    ]
    return "\n\n".join(f"### {title}\n\n{content}" for title, content in sections if content)


def table(columns, lines):
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, ["---"] * len(columns), *lines))


def setup_table(found):
    columns = ["model", "seed", *SOLVED, "puzzles distilled", "trajectories kept", "optimizer steps of a run"]
    lines = []
    for r in found.values():
        if r["row"] == "base":
            steps = sorted({x["steps"] for x in found.values() if "steps" in x and x["base"] == r["base"]})
            right = [f"{MEASURES[label](r):.1f}" for label in SOLVED]
            kept = [str(r["puzzles"]), str(r["kept"]), ", ".join(map(str, steps)) or "-"]
            lines.append([r["base"], str(r["seed"]), *right, *kept])
    return table(columns, lines)


def comparison(rows, names, label):
    """One measure of some rows, by base model too, and its differences to the rows in COMPARED; empty without rows
    to compare."""
    names = [name for name in names if name in rows]
    if len(names) < 2:
        return ""
    digits, lines = (3 if label in ("TDS", "ranking loss") else 1), []
    for name in names:
        row = rows[name]
        value = row["measures"][label]
        bases = "-" if value is None else " ".join(f"{x:.{digits}f}" for x in value["bases"].values())
        differences = (shown(row["differences"].get(other, {}).get(label), digits, "+") for other in COMPARED)
        lines.append([name, str(row["runs"]), shown(value, digits), bases, *differences])
    return table(["row", "runs", label, "by base model", *(f"- {other}" for other in COMPARED)], lines)


def shown(value, digits=1, sign=""):
    """A mean with its interval, and p where it is a difference; - where there is none."""
    if value is None:
        return "-"
    mean, low, high = ("-" if value[k] is None else f"{value[k]:{sign}.{digits}f}" for k in ("mean", "low", "high"))
    if value["low"] is None:
        return mean
    return f"{mean} [{low}, {high}]" + (f", p {value['p']:.3f}" if "p" in value else "")


def loss_table(losses):
    sources = list(dict.fromkeys(r["data"] for r in losses))
    if not sources:
        return ""
    ratios = [f"mask ratio {r['mask_ratio']}" for r in losses if r["data"] == sources[0]]
    lines = [[source, *(f"{r['loss']:.4f}" for r in losses if r["data"] == source)] for source in sources]
    return table(["nats", *ratios], lines)


def relation_table(found):
    lines = [(label, relation(found, label)) for label in ORDER]
    return table(
        ["measure", "r, by base model"],
        [[label, " ".join(f"{r:+.2f}" for r in of.values()) or "-"] for label, of in lines],
    )


def tds_curves(found, names):
    """TDS at each step, the mean over the runs of a row and its standard error."""
    rows = []
    for name in names:
        curves = [test(r, "test_in")["per_step"] for r in found.values() if r["row"] == name]
        for t in range(max(map(len, curves))):
            values = [curve[t] for curve in curves if len(curve) > t]
            rows.append(dict(model=name, step=t, **diagnose.mean_and_error("tds", values)))
    return rows


def loss_curves(out):
    """Cross-entropy over the mask ratio, the mean over the base models, for trajectories and the foreign style."""
    cells = {}
    for file in sorted(out.glob("base-*/D/loss.jsonl")):
        for _, row in data.read_rows(file):
            source = "self-distilled" if row["data"].endswith("(decoded)") else "ground truth"
            cells.setdefault((source, row["mask_ratio"]), []).append(row["loss"])
    return [
        dict(model="base", data=source, mask_ratio=ratio, **diagnose.mean_and_error("loss", values))
        for (source, ratio), values in sorted(cells.items())
    ]


def draw_accuracy(found, names):
    """Accuracy on the validation puzzles after each epoch, the mean over the base models, with the first seed."""
    start = {r["base"]: 100 * r["chosen"]["accuracy"] for r in found.values() if r["row"] == "base"}
    rows = []
    for name in names:
        curves = [
            [start[r["base"]], *(100 * accuracy for accuracy in r["curve"])]
            for r in found.values()
            if r["row"] == name and "curve" in r
        ]
        for epoch, values in enumerate(zip(*curves)):
            rows.append(dict(model=name, epoch=epoch, **diagnose.mean_and_error("accuracy", list(values))))
    drawing, (axes,) = diagnose.figure()
    if rows:
        diagnose.curves(axes, rows, ["model"], "epoch", "accuracy", "accuracy_se")
    axes.set(xlabel="epoch", ylabel="in-domain validation %")
    return drawing
