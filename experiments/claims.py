"""The paper's claims on small models: every objective on every base model, with intervals and differences.

    torchrun --nproc_per_node 2 tabom.py claims --compile            # hours, and the same command
    python tabom.py claims --rows "SFT-SD;TABOM" --bases 2           # continues; only these rows
    torchrun --nproc_per_node 8 tabom.py claims --model M --data theirs.jsonl --recipe dream-prm12k --epoch 1 \
        --test gsm8k,humaneval --in-domain gsm8k --out out/C         # on trajectories that are there

tiny.retrain makes every base model from random weights, with a seed of its own, until it solves
ENOUGH of its validation puzzles, and each has its own puzzles. Its hard in-domain puzzles are
distilled once. Every row of the tables trains on the right ones of these trajectories, or on the same
puzzles' answers in a foreign style (SFT-GT), with the same adapter, batches, number of steps and,
on average, the same number of supervised tokens in each step: an objective that draws fewer tokens at a
time draws them more often. On base-0 each row tries RATES on validation puzzles; the best rate
of a row is its rate on all others, and base-0 has no part in the results. The last checkpoint counts.
results/registered.md says what was fixed before the runs.

    O/base-N/tiny               a base model; beside it: data (its puzzles), T (trajectories),
                                kept-K.jsonl (those that are right, each K times), truth-K.jsonl
    O/base-0/rates/ROW/LR       a run that tries a rate
    O/base-N/runs/ROW/seed-S    a run as in sweep.py, with measures of mechanism.py
    O/base-N/runs/base          the same for the model before training
    O/commands.jsonl            when it was started and continued, and with which options
    O/results                   results.json, tables and pictures: see report.py
"""

import dataclasses
import functools
import glob
import itertools
import json
import math
import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path

import data
import distill
import tokenizer
from benchmarks import answers
from experiments import mechanism, puzzles, report, sweep, tiny
from release import rows
from release.recipes import RECIPES
from runs import disk, torchrun
from runs.options import flag, name_list, opt, row_list

# TABOM's own settings, with which the order of answers is measured too; and what every row trains
# with.
SETTING = dict(window=8, margin=0.2, weight=1.0)
TRAINING = dict(epochs=3, warmup=20, weight_decay=0.0)
RATES = (3e-3, 1e-2)
EXAMPLES = 8  # of a step
TARGETS = 32  # tokens of each example on which a step has a loss, on average
# What is made on all base models before the next: the claims, the other rows, and those that need W passes a window.
TURNS = (
    ("SFT-SD", "TABOM", "TABOM, no ranking", "naive TD", "SFT-GT", "TABOM, global window"),
    ("TABOM, listwise", "TABOM, padding cut", "TABOM, ranking alone", "dInfer", "T3D", "dParallel"),
    ("TABOM, kl", "TABOM, own step"),
)
ON_PUZZLES = {"dParallel": dict(block_length=8)}
ROWS = {name: row | ON_PUZZLES.get(name, {}) for name, row in rows.ROWS.items() if name in itertools.chain(*TURNS)}
# Rows that take the rate of another, because to try it costs too much.
RATE_OF = dict.fromkeys(TURNS[-1], "TABOM")
DOMAINS = {"in": "short-latin", "near": "short-shear", "far": "short-far"}
ENOUGH = 0.35  # share of VALIDATED validation puzzles solved in each domain: then a base model is finished
VALIDATED = 100
KEEP = "correct"  # which trajectories are trained on
SIZES = dict(train=2000, validation_in=300, validation_near=100, validation_far=100)
SIZES.update(test_in=600, test_near=150, test_far=150)
QUICK = dict.fromkeys(SIZES, 6) | dict(train=24)
BATCH = 100  # puzzles decoded together
TOKENS_PER_STEP = (1, 2)
COMMAND = ("quick", "bases", "seeds", "rows", "compile", "seed")  # the options that say what is made


@dataclass
class ClaimsOptions:
    """the experiment"""

    out: str | None = opt(None, "folder for base models, runs and tables (out/experiment); continued if unfinished")
    quick: bool = opt(False, "few puzzles and hardly trained models: shows that it runs, not what it does")
    bases: int = opt(6, "base models in the results, trained from different seeds", low=1)
    seeds: int = opt(1, "training runs of each row on each base model", low=1)
    rows: tuple | None = opt(None, "only these rows of the tables, separated by ;", parse=row_list)
    compile: bool = opt(False, "compile the blocks of the transformer; faster, equal but for rounding")
    seed: int = opt(0, "of the tasks and of the training")
    data: str | None = opt(None, "no puzzles: trajectories of --model, of distill or of the authors")
    model: str | None = opt(None, "with --data: the model whose trajectories they are")
    test: tuple = opt((), "with --data: datasets or benchmarks to answer, comma-separated", parse=name_list)
    benchmarks: str | None = opt(None, "with --data: folder with the benchmarks' files, else from the Hub")
    ground_truth: str | None = opt(None, "with --data: dataset whose answers SFT-GT trains on; without it no SFT-GT")
    recipe: str | None = opt(None, "with --data: settings of all rows, as in train", choices=tuple(RECIPES))
    methods: tuple | None = opt(None, "with --data: as in train", parse=name_list)
    raw: bool = opt(False, "with --data: prompts as they are, without the chat template")
    check: str | None = opt(None, "with --data: as in sweep (auto); the puzzles' is exact", choices=answers.CHECKS)
    keep: str | None = opt(
        None, "with --data: as in train (correct), as for the puzzles", choices=("correct", "finished", "all")
    )
    limit: int | None = opt(None, "with --data: as in train", low=1)
    max_answer_tokens: int | None = opt(None, "with --data: as in train, for SFT-GT", low=1)
    validation: str | None = opt(None, "with --data: as in sweep")
    in_domain: tuple | None = opt(None, "with --data: as in sweep", parse=name_list)
    epoch: int | str | None = opt(None, "with --data: as in sweep (last)", parse=sweep.which_epoch)
    best_of_epochs: tuple | None = opt(None, "with --data: as in sweep", parse=name_list)
    gradient_checkpointing: bool = opt(False, "with --data: as in train")


# Options that a sweep over given trajectories has too, and puzzles have not.
OF_SWEEP = ("methods", "check", "keep", "raw", "limit", "max_answer_tokens")
OF_SWEEP += ("validation", "in_domain", "epoch", "best_of_epochs", "gradient_checkpointing")


def claims(c):
    """The paper's claims with intervals: several base models, all objectives; hours -> where the
    tables are."""
    if c.data or c.model or c.test:
        return on_trajectories(c)
    names = [name for name in c.rows or ROWS if name != rows.NO_SFT]  # which every base model has
    for name in names:
        if name not in ROWS:
            raise ValueError(f"--rows {name}: none of {'; '.join(ROWS)}")
        check_targets(name)
    for name in (*OF_SWEEP, "recipe", "ground_truth", "benchmarks"):
        if getattr(c, name):
            raise ValueError(f"{flag(name)} is for --data: puzzles are compared exactly, and the right ones are kept")
    processes, alone = torchrun.Processes("cpu"), torchrun.Processes("cpu", alone=True)
    out = Path(c.out or "out/experiment")
    out = disk.open_run(out, identity(c), processes)
    if processes.first:
        log_command(c, out)
    jobs, needs = jobs_of(c, alone, out, names)
    sweep.share(jobs, processes, alone, needs)
    if not processes.first:
        return None
    found = write_results(c, out)
    return dict(out=str(out / "results"), runs=len(found), rows=len(report.names_of(found)))


def on_trajectories(c):
    """The rows of the tables on trajectories that are there: a sweep over one model, with train's
    own settings or a recipe's in place of those of the puzzles -> what sweep returns."""
    if not (c.data and c.model and c.test):
        raise ValueError("--data, --model and --test: claims needs all three, or none for its puzzles")
    if c.quick:
        raise ValueError("--quick is for the puzzles: leave it out with --data")
    # The authors' files log no entropies, which kl needs: name the row where yours do.
    left_out = {"TABOM, kl"} if c.ground_truth else {"TABOM, kl", "SFT-GT"}
    default = tuple(name for name in rows.ROWS if name not in left_out)
    seeds = ",".join(map(str, range(c.seed, c.seed + c.seeds)))
    given = dict(model=c.model, data=c.data, ground_truth=c.ground_truth, test=c.test, benchmarks=c.benchmarks)
    given.update(out=c.out or "out/claims", seed=c.seed, compile=c.compile, recipe=c.recipe, epoch="last")
    for name in OF_SWEEP:
        if getattr(c, name):
            given[name] = getattr(c, name)  # else the recipe's, or the sweep's
    over = dict(rows=c.rows or default, over=(f"seed={seeds}",))
    return sweep.sweep(sweep.SweepOptions(tokens_per_step=TOKENS_PER_STEP, **over, **given))


def jobs_of(c, alone, out, names):
    """What is to be done, in order: folder -> what makes it, and folder -> the folders whose results it
    needs. In each of TURNS a base model has all its rows, and is reported, before the next one."""
    bases = [out / f"base-{i}" for i in range(c.bases + 1)]
    jobs, needs = {bases[0]: functools.partial(make_base, c, alone, c.seed)}, {}
    turns = [*TURNS, [name for name in names if name not in itertools.chain(*TURNS)]]
    for turn, of_turn in enumerate(turns, 1):
        chosen, rates = [name for name in of_turn if name in names], {}
        for name, lr in itertools.product(chosen, RATES):
            tried = RATE_OF.get(name, name)
            folder = out / "base-0" / "rates" / tried / str(lr)
            jobs[folder] = functools.partial(try_rate, c, alone, bases[0], settings_of(tried, c.seed, lr))
            needs[folder] = [bases[0]]
            rates.setdefault(name, []).append(folder)
        for i, base in enumerate(bases[1:] if chosen else (), 1):
            made = [base / "runs" / "base"]
            jobs[base] = functools.partial(make_base, c, alone, c.seed + i)
            jobs[made[0]] = functools.partial(run_before_training, c, alone, base)
            needs[made[0]] = [base]
            for seed, name in itertools.product(range(c.seed, c.seed + c.seeds), chosen):
                folder = base / "runs" / name / f"seed-{seed}"
                check_row_settings(folder, settings_of(name, seed))
                jobs[folder] = functools.partial(run_of_row, c, alone, base, name, seed, rates[name])
                needs[folder] = [made[0], *rates[name]]
                made.append(folder)
            reported = base / "reported" / str(turn)
            jobs[reported] = functools.partial(report_so_far, c, out)
            needs[reported] = made
    return jobs, needs


def kind_of(c):
    """The kind of model that the base models are."""
    if c.quick:
        return dataclasses.replace(tiny.SHORT, count=128, epochs=1)
    return tiny.SHORT


def identity(c):
    """What an experiment is, for its meta.json: nothing of it may change between two starts."""
    return dict(
        setting=SETTING,
        training=TRAINING,
        rates=RATES,
        examples=EXAMPLES,
        targets=TARGETS,
        sizes=QUICK if c.quick else SIZES,
        enough=ENOUGH,
        kind=dataclasses.asdict(kind_of(c)),
        domains=DOMAINS,
        seed=c.seed,
        command="claims",
        versions=disk.versions(),
    )


def log_command(c, out):
    """Add a line to commands.jsonl: now, and the options that say what is made."""
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    options = {name: getattr(c, name) for name in COMMAND}
    with open(out / "commands.jsonl", "a", encoding="utf-8") as f:
        f.write(json.dumps(dict(time=now, options=options)) + "\n")


# -------------------------------------------------------------------------------------------- rows


def targets_of(settings, answer=tiny.SHORT.answer):
    """The tokens on which an objective has a loss, on average over its draws, in a response of `answer`
    tokens that were decoded one at a time."""
    objective, window = settings["objective"], settings.get("window")
    if objective == "transition" or window == "global":
        return (answer + 2) / 3  # between two different ones of 0..N
    if objective == "tabom":
        return window
    if objective == "dparallel":  # both passes together ask for a block
        return answer / math.ceil(answer / settings["block_length"])
    return (answer + 1) / 2  # uniform in 1..N


def draws_of(settings):
    """How often each example of a step is drawn, so that it has TARGETS targets."""
    return round(TARGETS / targets_of(settings))


def check_targets(name):
    """Raises ValueError for a row whose steps have more or fewer supervised tokens than the others'."""
    settings = settings_of(name, 0)
    targets = draws_of(settings) * targets_of(settings)
    if abs(targets / TARGETS - 1) > 0.05:
        raise ValueError(f"{name}: {targets:.1f} supervised tokens per example and step, the rows have {TARGETS}")


def settings_of(name, seed, lr=None):
    """What a row changes of the options of train."""
    settings = dict(ROWS[name], seed=seed)
    if settings["objective"] == "tabom":
        settings = {**SETTING, **settings}
    if lr is not None:
        settings["lr"] = lr
    return settings


def check_row_settings(folder, settings):
    """Raises ValueError for a run that is there already and was made with other settings, but for its
    rate."""
    before = sweep.result_of(folder)
    if before and {**before["settings"], "lr": None} != {**settings, "lr": None}:
        raise ValueError(f"{folder} was made with {before['settings']}, now it is {settings}: remove it")


# -------------------------------------------------------------------------------------------- jobs


def make_base(c, alone, seed, base):
    """A base model, its puzzles, its trajectories and the answers in foreign style -> what there is
    of each."""
    for name, count in (QUICK if c.quick else SIZES).items():
        task = DOMAINS.get(name.rpartition("_")[2], DOMAINS["in"])
        file = base / "data" / f"{name}.jsonl"
        puzzles.write_puzzles(file, [task], count, True, seed, both=name != "train")
    s, solved = of_base(c, base), []

    def enough(checkpoint, epoch):
        """Whether a model solves ENOUGH; the domain that is learned last is asked first."""
        for name in reversed(DOMAINS):
            where, source = base / "V" / f"{name}-{epoch}", base / "data" / f"validation_{name}.jsonl"
            options = sweep.decoding(s, None, source, where, s.seed, VALIDATED)
            score = distill.distill(dataclasses.replace(options, model=str(checkpoint)), alone)
            solved.append([epoch, name, score["correct"] / score["trajectories"]])
            if solved[-1][-1] < ENOUGH:
                return False
        return True

    if not (base / "tiny").is_dir():
        tiny.retrain(base, seed, kind_of(c), enough, alone, c.compile)
    distill.distill(sweep.decoding(s, None, base / "data" / "train.jsonl", base / "T", s.seed, None), alone)
    records = data.read_trajectories(base / "T")
    kept = [r for r in records if c.quick or data.usable(r, KEEP)]
    for draws in sorted(set(map(draws_of, map(settings_of, ROWS, itertools.repeat(0))))):
        write_copies(base, kept, draws)
    about = dict(seed=seed, epochs=solved[-1][0], solved=solved)
    return dict(**about, puzzles=len(records), kept=len(kept), early_eos=early_eos(kept))


def write_copies(base, kept, draws):
    """Write the trajectories, and their puzzles' answers in foreign style, each as often as a step draws
    it: every copy has a name, and so windows, of its own."""
    task, tok = puzzles.TASKS[DOMAINS["in"]], tokenizer.load(base / "tiny")
    copies, truth = [], []
    for r, k in itertools.product(kept, range(draws)):
        name = f"{r['id']}-{k}"
        copies.append({**r, "id": name, "finished": True, "correct": True})  # all of them are trained on
        truth.append(dict(id=name, prompt=r["prompt"], answer=puzzles.restyled(r["answer"], task)))
    with disk.atomic_file(base / f"kept-{draws}.jsonl") as f:
        f.writelines(map(disk.json_line, copies))
    tiny.write_answers(base / f"truth-{draws}.jsonl", tok, truth, tiny.SHORT.answer)


def early_eos(records):
    """The share of EOS among the first W tokens that each trajectory decoded."""
    found = []
    for r in records:
        last = r["response_ids"][-1]  # EOS, where the trajectory is a right one
        first = [r["response_ids"][i] for i, step in enumerate(r["order"]) if step < SETTING["window"]]
        found.append(first.count(last) / len(first))
    return sum(found) / len(found)


def of_base(c, base, draws=1):
    """The options of a sweep over one base model."""
    datasets, tests = base / "data", []
    for name in DOMAINS:
        tests.append(str(datasets / f"test_{name}.jsonl"))
    return sweep.SweepOptions(
        model=str(base / "tiny"),
        data=str(base / f"kept-{draws}.jsonl"),
        ground_truth=str(base / f"truth-{draws}.jsonl"),
        validation=str(datasets / "validation_in.jsonl"),
        test=tuple(tests),
        out=str(base),
        tokens_per_step=TOKENS_PER_STEP,
        check="exact",
        epoch="last",
        decode_batch=BATCH,
        device="cpu",
        compile=c.compile,
        global_batch=EXAMPLES * draws,
        batch_size=EXAMPLES * draws,
        save_every=0,
        **TRAINING,
    )


def bench_of(c, alone, base, draws=1):
    """What the runs on a base model work with. Their order is measured with TABOM's window and
    margin in every row."""
    return sweep.Workbench(of_base(c, base, draws), alone, SETTING["window"], SETTING["margin"])


def try_rate(c, alone, base, settings, folder):
    """A row with one of RATES, on validation puzzles alone."""
    bench = bench_of(c, alone, base, draws_of(settings))
    bench.c = dataclasses.replace(bench.c, test=())
    return sweep.one_run(bench, settings, bench.c.data, folder)


def best_rate(tried):
    """The rate of the highest validation accuracy, the lowest of equal ones. tried: folders of runs."""
    found = list(map(sweep.result_of, tried))
    return max(found, key=lambda r: (r["chosen"]["accuracy"], -r["settings"]["lr"]))["settings"]["lr"]


def run_before_training(c, alone, base, folder):
    """The model before training, tested like every row."""
    bench = bench_of(c, alone, base)
    bench.c = dataclasses.replace(bench.c, validation=None)
    result = sweep.base_run(bench, folder)
    more = mechanism.against_base(bench.at(None), alone, folder / "test-test_in", folder / "test-test_in")
    return dict(result, mechanism=more)


def run_of_row(c, alone, base, name, seed, tried, folder):
    """Train, test and measure one row with one seed."""
    settings = settings_of(name, seed, best_rate(tried))
    bench = bench_of(c, alone, base, draws_of(settings))
    bench.c = dataclasses.replace(bench.c, validation=None)
    result = sweep.one_run(bench, settings, bench.c.data, folder)
    model, before = bench.at(result["chosen"]["checkpoint"]), base / "runs" / "base" / "test-test_in"
    more = mechanism.against_base(model, alone, folder / "test-test_in", before)
    return dict(result, mechanism=more, versions=disk.versions(), compile=c.compile)


def report_so_far(c, out, folder):
    """Tables and pictures of all runs that are there."""
    return dict(runs=len(write_results(c, out)))


# ----------------------------------------------------------------------------------- what is there


def write_results(c, out):
    """Write the report of an experiment -> its runs."""
    found = collect(out)
    commands = [row for _, row in data.read_rows(out / "commands.jsonl")]
    machine = dict(processors=os.cpu_count(), machine=platform.machine(), system=platform.system())
    about = dict(commands=commands, machine=machine, **identity(c), tried=tried_rates(out))
    report.write_report(out / "results", found, about)
    return found


def collect(out):
    """(row, base, seed) -> the result of a run, the base models first; paths relative to the
    experiment's folder."""
    found = {}
    for base in sorted(out.glob("base-*"), key=lambda path: int(path.name.rpartition("-")[2])):
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


def tried_rates(out):
    """What each row reached on the validation puzzles of base-0 with each rate: {row: {rate: share}}."""
    found = {}
    for name, lr in itertools.product(ROWS, RATES):
        result = sweep.result_of(out / "base-0" / "rates" / name / str(lr))
        if result is not None:
            found.setdefault(name, {})[str(lr)] = result["chosen"]["accuracy"]
    return found


def finished_run(folder, out):
    """The result of a run with what its answers look like; None before it has one. Paths are relative
    to out."""
    result = sweep.result_of(folder)
    if result is None:
        return None
    text = json.dumps(result)
    for prefix in (f"{out.resolve()}/", f"{out}/"):
        text = text.replace(prefix, "")
    return dict(json.loads(text), answers=answers_of(folder))


def answers_of(folder):
    """What the answers of a run to each test set look like: the shares that are in foreign style, and
    that end where the right answer does."""
    shares = {}
    for name, task in DOMAINS.items():
        foreign, count, in_style, right_end = set(puzzles.TASKS[task].foreign), 0, 0, 0
        for file in data.trajectory_files(folder / f"test-test_{name}"):
            for _, r in data.read_rows(file):
                count += 1
                in_style += bool(r["text"]) and set(r["text"]) <= foreign
                right_end += r["finished"] and len(r["text"]) == len(r["answer"][0])
        shares[name] = dict(foreign=in_style / count, ends_right=right_end / count)
    return shares
