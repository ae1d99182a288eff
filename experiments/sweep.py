"""A grid of training runs over one model and one dataset, and one table of what each of them reached.

    python tabom.py sweep --model tiny --data train.jsonl --check exact --lr 3e-3 --validation validation.jsonl \
        --test test_in.jsonl,test_out.jsonl --over objective=tabom,nelbo seed=0,1,2 --out out/S      # run() below

Prompts are distilled once, and every run trains on the same trajectories. Each checkpoint answers the validation
questions, the best one of a run the test questions. Under torchrun a process that is free takes the next run.

    S/T                     the trajectories, where --data has prompts
    S/runs/NAME             a run: R-1 (training; R-2, ... and T-2, ... with --rounds), answers, result.json, which also
                            has how the model orders its own answers to the first test set (diagnose.order_of)
    S/results.json          every run with its settings and scores, and the mean and spread over seeds
    S/table.md              the table that is printed
"""

import dataclasses
import functools
import itertools
import json
import math
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import data
import distill
import evaluate
import model
import objectives
import runs
import train
from experiments import diagnose
from options import check_values, kind, name_list, number_list, opt, parse_value

GROUND_TRUTH = "sft-gt"  # an objective of the grid: nelbo on the answers of --data instead of the trajectories
TRAJECTORIES = 64  # replayed for their order, which is measured alike for all runs, whatever they train


@dataclass
class SweepOptions(train.TrainOptions):
    """the sweep"""

    data: str = opt(None, "prompts with answers, which are distilled once; or trajectories", required=True)
    out: str = opt(None, "folder for the runs and the table; an unfinished sweep is continued", required=True)
    over: tuple = opt(
        (f"objective={','.join(objectives.OBJECTIVES)}", "seed=0,1,2"),
        "the grid: OPTION=VALUE,VALUE for options of train; objective=sft-gt is nelbo on the answers of --data",
        parse=str,
        nargs="+",
    )
    validation: str | None = opt(None, "dataset or benchmark that chooses the checkpoint of a run")
    test: tuple = opt((), "datasets or benchmarks that the chosen checkpoint answers, comma-separated", parse=name_list)
    tokens_per_step: tuple = opt((1,), "test with so many tokens a step, comma-separated", parse=number_list, low=1)
    ground_truth: str | None = opt(None, "dataset whose answers sft-gt trains on, instead of those of --data")
    metric: str = opt("accuracy", "of the validation; last = no choice", choices=("accuracy", "tds", "last"))
    rounds: int = opt(1, "distill again with the chosen checkpoint and train on, so many times in all (ReDi)", low=1)
    check: str = opt("auto", "how a response is compared with the answer", choices=evaluate.CHECKS)
    decode_batch: int = opt(16, "prompts decoded together", low=1)
    test_limit: int | None = opt(None, "only the first so many questions of each validation and test set", low=1)
    benchmarks: str | None = opt(None, "folder with the benchmarks' files; without it they come from the Hub")


def sweep(c):
    """Train and evaluate a grid of settings -> a table with mean and spread over seeds."""
    grid = expand(c)
    prompts = check_sweep(c, grid)
    processes = runs.Processes(c.device)
    out = runs.open_run(c.out, identity(c), processes, free=("model", "adapter"))  # these by their content
    trajectories = Path(c.data)
    if prompts:
        trajectories = out / "T"
        distill.distill(decoding(c, c.adapter, c.data, trajectories, c.seed, limit=c.limit), processes)

    alone = runs.Processes(c.device, alone=True)
    jobs = {out / "runs" / "base": functools.partial(base_run, c, alone)}
    for name, settings in grid.items():
        jobs[out / "runs" / name] = functools.partial(one_run, c, alone, settings, trajectories)
    found = share(jobs, processes, alone)
    if not processes.first:
        return None
    rows = summarise(found)
    table = sweep_table(rows)
    with runs.atomic_file(out / "results.json") as f:
        f.write(json.dumps(dict(rows=rows, runs=found, command=vars(c), versions=runs.versions()), indent=2) + "\n")
    with runs.atomic_file(out / "table.md") as f:
        f.write(table + "\n")
    print(table)
    return dict(out=str(out), runs=len(found), rows=rows)


def check_sweep(c, grid):
    """Whether --data has prompts, and not trajectories. Raises ValueError for options that do not fit together."""
    if not c.test and c.validation is None:
        raise ValueError("--validation or --test: nothing to compare the runs by")
    if c.metric != "last" and c.validation is None:
        raise ValueError(f"--metric {c.metric} needs --validation; --metric last takes the last checkpoint")
    stems = [stem(source) for source in c.test]
    twice = next((name for name in stems if stems.count(name) > 1), None)
    if twice:
        raise ValueError(f"--test has two sets called {twice}: rename one")
    if c.rounds > 1 and c.lora_rank == 0:
        raise ValueError("--rounds needs an adapter to go on from: --lora-rank above 0")
    prompts = not data.holds_trajectories(c.data)
    truth = any(s["objective"] == GROUND_TRUTH for s in grid.values()) and c.ground_truth is None
    if not prompts and (c.rounds > 1 or truth):
        raise ValueError(f"{c.data} has trajectories: --rounds and {GROUND_TRUTH} need the dataset with answers")
    return prompts


def identity(c):
    """What a sweep is, for its meta.json: its options, but for the grid, which may grow, and what it reads."""
    machine = ("out", "device", "batch_size", "decode_batch", "gradient_checkpointing", "compile")
    settings = {f.name: getattr(c, f.name) for f in dataclasses.fields(c) if f.name not in (*machine, "over")}
    given = (c.data, c.ground_truth, c.validation, *c.test)
    read = [source for source in given if source not in (None, *evaluate.TASKS)]
    contents = {str(s): [runs.fingerprint(file) for file in data.trajectory_files(s)] for s in read}
    model_of_all = runs.identity(model.resolve(c.model), c.adapter)
    return dict(command="sweep", **settings, **model_of_all, contents=contents, versions=runs.versions())


def stem(source):
    return Path(source).name.split(".")[0]


def share(jobs, processes, alone, after=()):
    """Do what is missing of some jobs, each process that is free the next -> their results, on the first process only.

    jobs: folder -> a function of the folder, whose result is a dict; it is kept in the folder's result.json.
    after: folder -> the folder whose result it needs first. alone: the Processes that the jobs work with, which also
    holds the lock of a job's folder; where the file system has no locks, each process keeps to every count-th job."""
    own = list(jobs)[processes.index :: processes.count]
    while missing := [folder for folder in jobs if not result_of(folder)]:
        ready = [folder for folder in missing if folder not in after or result_of(after[folder])]
        if not any(attempt(folder, jobs[folder], folder in own, alone) for folder in ready):
            time.sleep(0.5)  # others are at it; torchrun ends all of them where one fails
    return list(map(result_of, jobs)) if processes.first else None


def attempt(folder, work, own, alone):
    """Do a job, unless another process holds it or has done it -> whether it was done here."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        held = alone.lock(folder)
    except FileExistsError:  # another process is at it
        return False
    try:
        if not (held or own) or result_of(folder):
            return False
        result = dict(name=folder.name, **work(folder))
        with runs.atomic_file(folder / "result.json") as f:
            f.write(json.dumps(result, indent=2) + "\n")
    finally:
        alone.unlock()
    return True


def result_of(folder):
    file = folder / "result.json"
    return data.read_json(file) if file.is_file() else None


# ------------------------------------------------------------------------------------------------------------- grid


def expand(c):
    """The runs of a grid: name -> the options of train that it changes, in order. Runs that would differ only in an
    option that their objective does not use are one.

    Raises ValueError for an option that train does not have, or a value that it does not take."""
    axes = dict(objective=[c.objective])
    for text in c.over:
        name, equals, values = text.partition("=")
        name = name.replace("-", "_")
        known = {f.name: f for f in dataclasses.fields(train.TrainOptions) if kind(f) not in (bool, tuple)}
        fixed = {f.name for f in dataclasses.fields(runs.ModelOptions)} - {"seed"} | {
            "data",
            "out",
            "adapter",
            "limit",
        }
        if name not in known.keys() - fixed or not equals:
            raise ValueError(f"--over {text}: expected OPTION=VALUE,VALUE with an option of train")
        extra = (GROUND_TRUTH,) if name == "objective" else ()
        axes[name] = [parse_value(known[name], value, extra) for value in values.split(",")]
    grid = {}
    for values in itertools.product(*axes.values()):
        settings = dict(zip(axes, values))
        used, unused = train.objective_parameters(training(c, settings))
        unused += ["reference_steps"] if settings["objective"] != "t3d" else []
        unused += ["keep"] if settings["objective"] == GROUND_TRUTH else []
        settings = {k: v for k, v in settings.items() if k not in unused}
        grid.setdefault("+".join(f"{k}={v}" for k, v in settings.items()), settings)
    return grid


def training(c, settings, **more):
    """The options of train for one run of the grid."""
    values = {f.name: getattr(c, f.name) for f in dataclasses.fields(train.TrainOptions)}
    values.update(settings)
    if values["objective"] == GROUND_TRUTH:
        values["objective"] = "nelbo"
    made = train.TrainOptions(**{**values, **more})
    check_values(made)
    return made


# ------------------------------------------------------------------------------------------------------------- runs


def one_run(c, alone, settings, trajectories, folder):
    """Train, choose the checkpoint on the validation set, test it -> the content of result.json."""
    seed, adapter, candidates = settings.get("seed", c.seed), c.adapter, []
    for number in range(1, c.rounds + 1):
        truth = settings["objective"] == GROUND_TRUTH
        source = (c.ground_truth or c.data) if truth else trajectories
        if number > 1 and not truth:  # what the model has become decodes the prompts anew
            source = folder / f"T-{number}"
            distill.distill(decoding(c, adapter, c.data, source, seed, limit=c.limit), alone)
        trained = folder / f"R-{number}"
        made = training(c, settings, data=str(source), out=str(trained), adapter=adapter)
        last = train.train(made, alone)
        of_round = []
        epochs = min(made.epochs, made.stop_after or made.epochs)
        for epoch in range(epochs if c.metric == "last" else 1, epochs + 1):
            checkpoint = str(trained / f"epoch-{epoch}")
            score = validate(c, alone, checkpoint, folder / f"validation-{number}-{epoch}", seed)
            of_round.append(dict(checkpoint=checkpoint, round=number, epoch=epoch, **score))
        candidates += of_round
        adapter = best(c, of_round)["checkpoint"]
    chosen = best(c, candidates)
    keys = ("loss", "ce", "rank", "in_order")
    final = {k: last[k] for k in keys if k in last}
    tests = test(c, alone, chosen["checkpoint"], folder, seed)
    return dict(
        settings=settings, chosen=chosen, checkpoints=candidates, tests=tests, steps=last["steps"], training=final
    )


def base_run(c, alone, folder):
    """The same for the model before training."""
    score = validate(c, alone, c.adapter, folder / "validation", c.seed)
    return dict(settings=dict(objective="base"), chosen=score, tests=test(c, alone, c.adapter, folder, c.seed))


def best(c, candidates):
    """The checkpoint of the highest metric, the earliest of equal ones; the last one for "last". TDS may be None, where
    a model has nothing to say before its EOS."""
    if c.metric == "last":
        return candidates[-1]
    return max(candidates, key=lambda one: -math.inf if one[c.metric] is None else one[c.metric])


def validate(c, alone, checkpoint, folder, seed):
    if c.validation is None:
        return {}
    score = answers(c, alone, checkpoint, c.validation, folder, seed)
    if c.metric == "tds":
        score["tds"] = order(c, alone, checkpoint, c.validation, folder)["tds"]
    return score


def test(c, alone, checkpoint, folder, seed):
    """The scores on every test set, and the order of the trajectories of the first."""
    found = {}
    for source, at_once in itertools.product(c.test, c.tokens_per_step):
        name = source if at_once == c.tokens_per_step[0] else f"{source}, {at_once} a step"
        where = folder / f"test-{stem(source)}{'' if at_once == 1 else f'-{at_once}'}"
        found[name] = answers(c, alone, checkpoint, source, where, seed, at_once)
        if len(found) == 1:
            found[name].update(order(c, alone, checkpoint, source, where))
    return found


def answers(c, alone, checkpoint, source, folder, seed, at_once=None):
    """Answer the questions of a dataset or a benchmark -> dict(accuracy, questions)."""
    if source in evaluate.TASKS:
        at = dict(tasks=(source,), data=c.benchmarks, out=str(folder), limit=c.test_limit, batch_size=c.decode_batch)
        at.update(tokens_per_step=at_once)
        c_task = evaluate.EvaluateOptions(**model_of(c, checkpoint), **machine_of(c), seed=seed, **at)
        (score,) = evaluate.evaluate(c_task, alone)["scores"]
        return dict(accuracy=score["correct"] / score["n"], questions=score["n"])
    score = distill.distill(decoding(c, checkpoint, source, folder, seed, c.test_limit, at_once), alone)
    if not score["checked"]:
        raise ValueError(f"{source}: no answer that --check {c.check} could compare with")
    return dict(accuracy=score["correct"] / score["checked"], questions=score["checked"])


def order(c, alone, checkpoint, source, folder):
    folder = folder / source if source in evaluate.TASKS else folder
    loaded = runs.ModelOptions(model=c.model, **machine_of(c))
    return diagnose.order_of(loaded, alone, checkpoint, folder, TRAJECTORIES)


def model_of(c, checkpoint):
    """The base model with an adapter, or the folder of one that was trained in full."""
    if checkpoint is None or (Path(checkpoint) / "adapter_config.json").is_file():
        return dict(model=c.model, adapter=checkpoint)
    return dict(model=checkpoint, adapter=None)


def machine_of(c):
    return dict(device=c.device, dtype=c.dtype, compile=c.compile)


def decoding(c, checkpoint, source, folder, seed, limit, at_once=None):
    """The options of distill that decode a dataset with a checkpoint."""
    shared = {k: getattr(c, k) for k in ("check", "prompt_field", "answer_field", "raw")}
    at = dict(data=str(source), out=str(folder), seed=seed, limit=limit, batch_size=c.decode_batch)
    at.update(tokens_per_step=at_once)
    return distill.DistillOptions(**model_of(c, checkpoint), **machine_of(c), **shared, **at)


# ------------------------------------------------------------------------------------------------------------ table


def summarise(found):
    """Mean and standard deviation over the seeds of each configuration."""
    groups = {}
    for result in found:
        settings = {k: v for k, v in result["settings"].items() if k != "seed"}
        groups.setdefault(json.dumps(settings), (settings, []))[1].append(result)
    rows = []
    for settings, group in groups.values():
        scores = {}
        if "accuracy" in group[0]["chosen"]:
            scores["validation %"] = [100 * r["chosen"]["accuracy"] for r in group]
        for name in group[0]["tests"]:
            source, comma, at_once = name.partition(", ")
            scores[f"{stem(source)}{comma}{at_once} %"] = [100 * r["tests"][name]["accuracy"] for r in group]
        first = next(iter(group[0]["tests"]), None)
        if first is not None:
            scores["TDS"] = [r["tests"][first]["tds"] for r in group]
        rows.append(dict(**settings, runs=len(group), scores={k: mean_and_spread(v) for k, v in scores.items()}))
    return rows


def mean_and_spread(values):
    there = [x for x in values if x is not None]
    spread = statistics.stdev(there) if len(there) > 1 else None
    return dict(mean=statistics.fmean(there) if there else None, sd=spread, values=values)


def sweep_table(rows):
    """A line for each configuration: what it changes, the number of runs, mean ± standard deviation over them."""
    axes = list(dict.fromkeys(k for row in rows for k in row if k not in ("runs", "scores")))
    scores = list(rows[0]["scores"])
    lines = [f"| {' | '.join([*axes, 'runs', *scores])} |", "|" + " --- |" * (len(axes) + 1 + len(scores))]
    for row in rows:
        cells = [str(row.get(k, "")) for k in axes] + [str(row["runs"])]
        for k in scores:
            digits, score = (3 if k == "TDS" else 1), row["scores"][k]
            mean, sd = ("-" if x is None else f"{x:.{digits}f}" for x in (score["mean"], score["sd"]))
            cells.append(mean if sd == "-" else f"{mean} ± {sd}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
