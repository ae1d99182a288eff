"""The paper's claims on small models: what each objective gains, and what it forgets, on many base models.

    torchrun --nproc_per_node 2 tabom.py claims --compile            # hours; the same command continues
    python tabom.py claims --rows "SFT-SD;TABOM" --bases 12          # only these rows, on the first 12
    torchrun --nproc_per_node 8 tabom.py claims --model M --data theirs.jsonl --recipe dream-prm12k --epoch 1 \
        --test gsm8k,humaneval --in-domain gsm8k --out out/C         # on trajectories that are there

A base model is trained from random weights, with a seed of its own, on easy puzzles, and to the end. It is kept if it
solves KEPT of its validation puzzles. Its hard in-domain puzzles are distilled once, and every row trains on the right
ones of these trajectories, or on the same puzzles' answers in a foreign style (SFT-GT), from the same new adapter, with
the same number of steps and, on average, of supervised tokens in each: an objective that draws fewer tokens at a time
draws them more often. Each epoch's checkpoint is tested. results/registered.md says what was fixed before the runs.

    O/base-N/seed-S     a base model: tiny (itself), adapter (a new one), in.jsonl, near.jsonl, far.jsonl (its answers),
                        kept-*, truth-* (what is trained on), and runs/ROW RATE (a run)
    R/bases/base-N.json what report.py reads: the base model and its runs, with each puzzle right or wrong
    R/tables.md, ...    see report.py
"""

import base64
import dataclasses
import functools
import itertools
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

import data
import distill
import lora
import train
from benchmarks import answers
from experiments import diagnose, looks, mechanism, puzzles, reach, report, sweep, tiny
from release import rows
from release.recipes import RECIPES
from runs import disk, loading, torchrun
from runs.options import flag, name_list, opt, row_list

# TABOM's own settings, with which the order of answers is measured too; and what every row trains with.
SETTING = dict(window=reach.WINDOW, margin=0.2, weight=1.0)
TRAINING = dict(epochs=3, warmup=20, weight_decay=0.0)
EXAMPLES = 8  # of a step, times how often its objective draws each: copies, which an epoch shuffles one by one
TARGETS = 32  # tokens of each example on which a step has a loss, on average
KIND = dataclasses.replace(tiny.SHORT, count=7200)
KEPT = (0.55, 0.92)  # the share of validation puzzles that a base model solves
TRIES = 10  # seeds of a base model
DOMAINS = {"in": "short-latin", "near": "short-shear", "far": "short-far"}
SEVERAL = "several"  # the task with several right answers, in place of "in"
TASKS = DOMAINS | {SEVERAL: "short-several"}
SIZES = dict(train=2000, validation=300, several=1500, near=500, far=500) | {"in": 1500}
QUICK = dict.fromkeys(SIZES, 6) | dict(train=24)
EARLY = dict(near=250, far=250, several=500) | {"in": 500}  # puzzles that test the epochs before the last; it has all
MEASURED = 64  # trajectories on which entropies and distributions are compared
BATCH = 50  # puzzles decoded together
TOKENS_PER_STEP = (1, 2)  # with --data


def run_list(names, rates, task="in"):
    """Runs as (row, learning rate, task)."""
    return list(itertools.product(names, rates, [task]))


# The runs of the primary measures are made on all base models, the others on those with an odd number, where each of
# these stages is made on all before the next.
RATES = (3e-4, 1e-3)
SECOND = ("naive TD", "TABOM, no ranking")
ON_ODD = (
    run_list(SECOND, [3e-4]),
    run_list(("any reach", "naive TD's weights"), [3e-4]) + run_list(SECOND, [1e-3]),
    run_list(("SFT-GT", "T3D", "dInfer", "dParallel", "TABOM, kl"), [3e-4]),
    run_list(looks.PRIMARY, [3e-3]) + run_list(looks.PRIMARY, RATES, SEVERAL),
)
ROWS = rows.ROWS | {
    "dParallel": dict(objective="dparallel", block_length=8),
    "any reach": dict(objective="reach"),
    "naive TD's weights": dict(objective="balanced"),
}


def task_list(text):
    """ "in,several" -> ("in", "several"); raises ValueError for what is no task of a run."""
    tasks = name_list(text)
    if not {"in", SEVERAL}.issuperset(tasks):
        raise ValueError(f"must be in, {SEVERAL} or both, separated by commas")
    return tasks


def rate_list(text):
    """ "3e-4,1e-3" -> (0.0003, 0.001); raises ValueError for anything else."""
    try:
        return tuple(map(float, text.split(",")))
    except ValueError as e:
        raise ValueError("must be learning rates, separated by commas") from e


@dataclass
class ClaimsOptions:
    """the experiment"""

    out: str | None = opt(None, "folder for base models and runs (out/experiment); continued if unfinished")
    results: str | None = opt(None, "folder for what is kept of each base model, and the tables (results in --out)")
    quick: bool = opt(False, "few puzzles and hardly trained models: shows that it runs, not what it does")
    bases: int = opt(24, "base models, trained from different seeds", low=1)
    rows: tuple | None = opt(None, "only these rows of the tables, separated by ;", parse=row_list)
    rates: tuple | None = opt(None, "only these learning rates, comma-separated", parse=rate_list)
    tasks: tuple | None = opt(None, "only runs on these: in (in-domain), several (right answers)", parse=task_list)
    compile: bool = opt(False, "compile the blocks of the transformer; faster, equal but for rounding")
    seed: int = opt(0, "with --data: of the training")
    seeds: int = opt(1, "with --data: training runs of each row", low=1)
    data: str | None = opt(None, "no puzzles: trajectories of --model, of distill or of the authors")
    model: str | None = opt(None, "with --data: the model whose trajectories they are")
    test: tuple = opt((), "with --data: datasets or benchmarks to answer, comma-separated", parse=name_list)
    benchmarks: str | None = opt(None, "with --data: folder with the benchmarks' files, else from the Hub")
    ground_truth: str | None = opt(None, "with --data: dataset whose answers SFT-GT trains on; without it no SFT-GT")
    recipe: str | None = opt(None, "with --data: settings of all rows, as in train", choices=tuple(RECIPES))
    methods: tuple | None = opt(None, "with --data: as in train", parse=name_list)
    raw: bool = opt(False, "with --data: prompts as they are, without the chat template")
    check: str | None = opt(None, "with --data: as in sweep (auto)", choices=answers.CHECKS)
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
    """Every row on every base model -> where the tables are."""
    if c.data or c.model or c.test:
        return on_trajectories(c)
    for name in (*OF_SWEEP, "recipe", "ground_truth", "benchmarks"):
        if getattr(c, name):
            raise ValueError(f"{flag(name)} is for --data: puzzles have their own check, and the right ones are kept")
    for name in c.rows or ():
        if name not in ROWS:
            raise ValueError(f"--rows {name}: none of {'; '.join(ROWS)}")
        check_targets(name)
    if not any(runs_of(c, 1)):  # which has all that others have
        tasks = f" --tasks {c.tasks}" if c.tasks else ""
        raise ValueError(f"--rows {'; '.join(c.rows or ())} --rates {c.rates}{tasks}: no base model has such a run")
    out = Path(c.out or "out/experiment")
    results = Path(c.results or out / "results")
    processes, alone = torchrun.Processes("cpu"), torchrun.Processes("cpu", alone=True)
    out = disk.open_run(out, identity(c), processes)
    for number, runs in order_of_work(c):
        folder = out / f"base-{number}"
        folder.mkdir(exist_ok=True)
        try:
            held = alone.lock(folder)
        except FileExistsError:  # another process is at it
            continue
        if held or number % processes.count == processes.index:
            one_base(c, alone, number, runs, results, folder)
        alone.unlock()
    processes.barrier()
    if not processes.first:
        return None
    return report.write_report(results)


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


# -------------------------------------------------------------------------------------------- rows


def runs_of(c, number):
    """The runs on a base model in stages: those of the primary measures, ON_ODD's, and rows of one's own at RATES; of
    those that --rows, --rates and --tasks ask for."""
    odd = number % 2
    stages = [run_list(looks.PRIMARY, (*RATES, *[1e-4] * odd)), *(stage * odd for stage in ON_ODD)]
    ours = {*looks.PRIMARY, rows.NO_SFT, *(row for row, _, _ in itertools.chain(*ON_ODD))}
    stages.append(run_list([row for row in c.rows or () if row not in ours], RATES))
    return [list(filter(functools.partial(asked_for, c), stage)) for stage in stages]


def asked_for(c, run):
    return all(not chosen or value in chosen for value, chosen in zip(run, (c.rows, c.rates, c.tasks)))


def order_of_work(c):
    """(number of a base model, runs) in turn: a stage on all base models, then the next. At the end the first stage on
    base-0, which has no part in the results: it shows what the rates do."""
    for stage in zip(*(runs_of(c, number) for number in range(1, c.bases + 1))):
        yield from enumerate(stage, 1)
    yield 0, runs_of(c, 0)[0]


def key_of(run):
    """("TABOM", 3e-4, "in") -> "TABOM 0.0003"; the other task stands behind it. The base model has no rate."""
    row, lr, task = run
    return " ".join([row, *[f"{lr:g}"] * (lr > 0), *[task] * (task != "in")])


def targets_of(settings, answer=tiny.SHORT.answer):
    """The tokens on which an objective has a loss, on average over its draws, in a response of `answer`
    tokens that were decoded one at a time."""
    objective, window = settings["objective"], settings.get("window")
    if objective == "transition" or window == "global":
        return (answer + 2) / 3  # between two different ones of 0..N
    if objective in ("tabom", "balanced"):
        return window or reach.WINDOW
    if objective == "reach":
        return (answer + 3) / 4  # the mean of (n + 1) / 2 over n = 1..N
    if objective == "dparallel":  # both passes together ask for a block
        return answer / math.ceil(answer / settings["block_length"])
    return (answer + 1) / 2  # uniform in 1..N


def draws_of(settings):
    """How many copies of each example an epoch has, so that EXAMPLES times as many make a step of TARGETS targets for
    each of EXAMPLES."""
    return round(TARGETS / targets_of(settings))


def check_targets(row):
    """Raises ValueError for a row whose steps have more or fewer supervised tokens than the others'."""
    if row != rows.NO_SFT:
        targets = draws_of(settings_of(row)) * targets_of(settings_of(row))
        if abs(targets / TARGETS - 1) > 0.1:
            raise ValueError(f"{row}: {targets:.1f} supervised tokens per example and step, the rows have {TARGETS}")


def settings_of(row):
    """What a row changes of the options of train."""
    settings, ours = ROWS[row], dict(SETTING)
    if "ranking" in settings:
        del ours["margin"]  # which Eq. 8 alone has
    return {**ours, **settings} if settings["objective"] == "tabom" else settings


# ------------------------------------------------------------------------------------- a base model


class Base(NamedTuple):
    """A base model, with what its runs train on and are tested with."""

    folder: Path
    number: int
    processes: torchrun.Processes
    loaded: loading.Loaded  # with an adapter on it, which every run overwrites
    c: distill.DistillOptions
    tests: dict  # task -> its test puzzles
    answers: dict  # task -> the base model's answers to them
    kept: dict  # task -> the right ones of its answers to other puzzles, which runs train on
    states: dict  # "near", "far" -> the base model's distributions along its own trajectories


def identity(c):
    """What an experiment is, for its meta.json: nothing of it may change between two starts."""
    kind = dataclasses.asdict(kind_of(c))
    return dict(
        command="claims", setting=SETTING, training=TRAINING, examples=EXAMPLES, targets=TARGETS, kept=KEPT,
        sizes=sizes_of(c), early=EARLY, measured=MEASURED, batch=BATCH, kind=kind, tasks=TASKS, compile=c.compile,
        versions=disk.versions(),
    )  # fmt: skip


def kind_of(c):
    return dataclasses.replace(KIND, count=128, epochs=1) if c.quick else KIND


def sizes_of(c):
    return QUICK if c.quick else SIZES


def known(results, number):
    """What is there of a base model."""
    file = results / "bases" / f"base-{number}.json"
    return data.read_json(file) if file.is_file() else dict(runs={})


def one_base(c, alone, number, runs, results, folder):
    """Make those runs on the base model of this number that are not there yet; each is kept as it is finished."""
    found, begun = known(results, number), time.time()
    if set(map(key_of, runs)) <= found["runs"].keys():
        return
    base, about = make_base(c, alone, number, folder, set(list(zip(*runs))[2]))
    for name in about.keys() & found.keys() - {"versions"}:
        if found[name] != short(about[name]):  # as it would be read again
            there, here = str(found[name])[:40], str(short(about[name]))[:40]
            line = f"base-{number} has {name} {there}, made again it has {here}: its other runs are left out"
            torchrun.warner(alone)(f"{results}: {line}; give another --results, or the machine and options of then")
            return
    spent = found.get("minutes", 0)
    (results / "bases").mkdir(parents=True, exist_ok=True)
    found.update(number=number, **about)
    for run in runs:
        for one in (("base", 0, run[2]), run):
            if key_of(one) not in found["runs"]:
                found["runs"][key_of(one)] = one_run(base, *one)
        found["minutes"] = round(spent + (time.time() - begun) / 60, 1)
        with disk.atomic_file(results / "bases" / f"base-{number}.json") as f:
            f.write(as_lines(found))


def make_base(c, alone, number, folder, tasks):
    """Train base models until one fits, and make what its runs on these tasks need -> Base, and what is told of it."""
    # 1. the model: the first seed whose model is neither too weak nor too strong
    sizes, tried = sizes_of(c), []
    for seed in range(number, number + 100 * TRIES, 100):
        place = folder / f"seed-{seed}"
        if not (place / "tiny").is_dir():
            tiny.retrain(place, seed, kind_of(c), None, alone, c.compile)
        options = distill.DistillOptions(
            model=str(place / "tiny"), data=str(place / "train.jsonl"), out=str(place / "T"), check="exact",
            batch_size=BATCH, device="cpu", compile=c.compile, seed=seed,
        )  # fmt: skip
        loaded = loading.load_model(options, alone)
        base = Base(place, number, alone, loaded, options, {}, {}, {}, {})
        asked = puzzles_of(base, "validation", "in", sizes["validation"])
        tried.append([seed, sum(r["correct"] for r in solve(base, asked)) / len(asked)])
        if c.quick or KEPT[0] <= tried[-1][1] <= KEPT[1]:
            break
    else:
        raise ValueError(f"base-{number}: none of {TRIES} seeds solves {KEPT} of its validation puzzles: {tried}")

    # 2. what it is tested with: the same puzzles for all runs
    for task in sorted({"near", "far", *tasks}):
        base.tests[task] = puzzles_of(base, f"test_{task}", task, sizes[task])
        base.answers[task] = solve(base, base.tests[task])
        write_records(place / f"{task}.jsonl", base.answers[task])
        if task in ("near", "far"):
            base.states[task] = mechanism.states(loaded, alone, base.answers[task][:MEASURED])

    # 3. what its runs train on, and the adapter that they begin with
    about = dict(seed=seed, tried=tried, model=disk.fingerprint(place / "tiny"), compiled=c.compile)
    about.update(versions=disk.versions())
    for task in sorted(tasks):
        records = solve(base, puzzles_of(base, "train", task, sizes["train"]))
        kept = [r for r in records if c.quick or r["correct"]]
        about[f"kept {task}"] = [len(kept), len(records)]
        about[f"early EOS {task}"] = early_eos(kept)
        base.kept[task] = kept
    if not (place / "adapter" / "adapter_config.json").is_file():
        lora.inject(loaded.m, generator=data.generator(seed, "lora"))
        lora.save(loaded.m, place / "adapter")
    lora.load(loaded.m, place / "adapter")
    return base, about


def puzzles_of(base, name, task, count):
    """Different hard puzzles of a task, ready to be answered."""
    lines = puzzles.dataset(name, [TASKS[task]], count, True, base.number)
    examples = []
    for line in lines.splitlines():
        row = json.loads(line)
        row.update(prompt_ids=base.loaded.tok.encode(row["prompt"]), answer=[row["answer"]], task=TASKS[task])
        examples.append(row)
    return examples


def solve(base, asked, tokens_per_step=1):
    """The model's answers to puzzles, in their order, each with its verdict: see puzzles.solves."""
    base.loaded.m.eval()
    settings = loading.decoder_settings(dataclasses.replace(base.c, tokens_per_step=tokens_per_step), base.loaded)
    found = [None] * len(asked)
    for numbers, records in distill.answers(base.loaded, asked, settings, 0, base.processes.device, BATCH):
        for i, record in zip(numbers, records):
            task = puzzles.TASKS[asked[i]["task"]]
            right = record["finished"] and puzzles.solves(task, record["prompt"], record["text"])
            found[i] = dict(record, correct=right)
    return found


def write_records(file, records):
    file.parent.mkdir(parents=True, exist_ok=True)
    with disk.atomic_file(file) as f:
        f.writelines(map(disk.json_line, records))


def trained_on(base, task, draws, truth):
    """The file of what a run trains on: the right trajectories, or (truth) their puzzles' answers in foreign style; as
    many copies of each as a step draws, all with names, and so windows, of their own."""
    name, rows = f"{'truth' if truth else 'kept'}-{task}-{draws}.jsonl", []
    for r, k in itertools.product(base.kept[task], range(draws)):
        copy = dict(id=f"{r['id']}-{k}", finished=True, correct=True)  # all of them are trained on
        answer = puzzles.restyled(r["answer"][0], puzzles.TASKS[TASKS[task]])
        rows.append(dict(copy, prompt=r["prompt"], answer=answer) if truth else {**r, **copy})
    if truth:
        tiny.write_answers(base.folder / name, base.loaded.tok, rows, KIND.answer)
    else:
        write_records(base.folder / name, rows)
    return str(base.folder / name)


def early_eos(records):
    """The share of EOS among the first W tokens that each trajectory decoded."""
    found = []
    for r in records:
        last = r["response_ids"][-1]  # EOS, where the trajectory is a right one
        first = [r["response_ids"][i] for i, step in enumerate(r["order"]) if step < SETTING["window"]]
        found.append(first.count(last) / len(first))
    return sum(found) / len(found)


# ------------------------------------------------------------------------------------------- a run


def one_run(base, row, lr, task):
    """Train a row and test each epoch -> what is kept of it. The row "base" is the model before training."""
    folder = base.folder / "runs" / key_of((row, lr, task))
    if row == "base":
        lora.load(base.loaded.m, base.folder / "adapter")
        return dict(epochs=[test(base, task, folder, True, base.answers)])
    settings = dict(settings_of(row))
    draws, truth = draws_of(settings), settings["objective"] == sweep.GROUND_TRUTH
    if truth:
        settings["objective"] = "nelbo"
    made = train.TrainOptions(
        model=base.c.model, data=trained_on(base, task, draws, truth), out=str(folder / "R"), lr=lr,
        adapter=str(base.folder / "adapter"), global_batch=EXAMPLES * draws, batch_size=EXAMPLES * draws, save_every=0,
        seed=base.number, device="cpu", compile=base.c.compile, keep="all", **TRAINING, **settings,
    )  # fmt: skip
    with reach.offered():
        last, epochs = train.train(made, base.processes, base.loaded), []
    for epoch in range(1, made.epochs + 1):
        lora.load(base.loaded.m, folder / "R" / f"epoch-{epoch}")
        epochs.append(test(base, task, folder, whole=epoch == made.epochs))
    return dict(steps=last["steps"], ce=last["ce"], epochs=epochs)


def test(base, task, folder, whole, known=None):
    """Test the model as it is -> dict(right: test -> packed verdicts; kl: to the base model's distributions on its own
    near and far trajectories, nats a token; and with `whole` order: see mechanism.py and diagnose.own_order).

    The tests are task, near and far; without `whole` the first EARLY of each. With it task-2 is another, two tokens a
    step; in-domain only on base models after those of the first look: before there was no time. known: answers that
    need not be made again."""
    found = dict(right={}, kl={})
    for name in (task, "near", "far"):
        asked = base.tests[name][: None if whole else EARLY[name]]
        records = known[name] if known else solve(base, asked)
        found["right"][name] = pack([r["correct"] for r in records])
        if name == task and whole:
            write_records(folder / "answers.jsonl", records)
    if whole and (task == SEVERAL or base.number > min(looks.LOOKS)):
        found["right"][f"{task}-2"] = pack([r["correct"] for r in solve(base, base.tests[task], 2)])
    for name, states in base.states.items():
        found["kl"][name] = mechanism.kl_to(states, base.loaded)
    if whole:
        at = (base.loaded, base.processes, folder / "answers.jsonl")
        order = diagnose.own_order(*at, MEASURED, SETTING["window"], SETTING["margin"])
        found["order"] = order | mechanism.against_base(*at, base.folder / f"{task}.jsonl")
    return found


def as_lines(found):
    """What is kept of a base model, as JSON with a line for each run and numbers of six digits."""
    whole = short(found)
    runs = [f"  {json.dumps(name)}: {json.dumps(run)}" for name, run in whole.pop("runs").items()]
    head = json.dumps(whole, indent=1).removesuffix("\n}")
    return head + ',\n "runs": {\n' + ",\n".join(runs) + "\n }\n}\n"


def short(x):
    """JSON's values with numbers of six digits."""
    if isinstance(x, float):
        return float(f"{x:.6g}")
    if isinstance(x, (list, tuple)):
        return list(map(short, x))
    return dict(zip(x, map(short, x.values()))) if isinstance(x, dict) else x


def pack(verdicts):
    """[True, False, ...] -> text, eight in a byte; see looks.unpack."""
    return [len(verdicts), base64.b64encode(np.packbits(verdicts).tobytes()).decode()]
