"""A grid of training runs over one model and one dataset, and a table of what each reached.

    python tabom.py sweep --model tiny --data train.jsonl --check exact --lr 3e-3 \
        --validation validation.jsonl --test test_in.jsonl,test_out.jsonl \
        --over objective=tabom,nelbo seed=0,1,2 --out out/S
    python tabom.py sweep --model M --data T --rows "SFT-SD;dInfer;TABOM" --over seed=0,1 \
        --test gsm8k,math500,humaneval --in-domain gsm8k,math500 --epoch last --best-of-epochs gsm8k --out out/S

Prompts are distilled once, and every run trains on the same trajectories. Each checkpoint answers
the validation questions, and the best one of a run, or that of --epoch, answers the test questions.
Under torchrun a process that is free takes the next run. A run loads the base model once, and puts
the adapters of its checkpoints on it. Rows are those of release/rows.py.

    S/T               the trajectories, if --data has prompts
    S/runs/NAME       a run: R-1 (training; with --rounds also R-2, T-2, ...), its answers, and
                      result.json
    S/results.json    every run with its settings and scores, and the mean and spread over seeds
    S/table.md        the table that is printed

In a result.json, "tests" has one entry for each test set and number of tokens per step. The entry
of the first one also says how the model orders its own answers (diagnose.own_order), with one
window and one margin for all runs of a sweep.
"""

import dataclasses
import difflib
import functools
import inspect
import itertools
import json
import math
import operator
from dataclasses import dataclass
from pathlib import Path

import data
import distill
import evaluate
import lora
import model
import objectives
import train
from benchmarks import answers
from experiments import diagnose, jobs, table
from release import epochs, rows
from runs import disk, loading, objective_options, torchrun
from runs.options import check_values, field_names, flag, kind, name_list, number_list, opt, parse_value, row_list

GROUND_TRUTH = rows.GROUND_TRUTH  # an objective of the grid: nelbo on the answers of --data
# The ideal one takes a forward pass for each token, and entropies that only our own trajectories log.
COMPARED = [name for name in objectives.OBJECTIVES if name != "ideal"]
DEFAULT_GRID = (f"objective={','.join(COMPARED)}", "seed=0,1,2")
TRAJECTORIES = 64  # so many answers to the first test set are replayed to measure their order


def which_epoch(text):
    """ "best", "last", or the number of an epoch."""
    if text in ("best", "last"):
        return text
    if not text.isdecimal() or int(text) < 1:
        raise ValueError("must be best, last, or the number of an epoch from 1")
    return int(text)


@dataclass
class SweepOptions(train.TrainOptions):
    """the sweep"""

    data: str = opt(None, "prompts with answers, which are distilled once; or trajectories", required=True)
    out: str = opt(None, "folder for the runs and the table; an unfinished sweep is continued", required=True)
    over: tuple = opt(
        DEFAULT_GRID,
        "the grid: OPTION=VALUE,VALUE for options of train; objective=sft-gt is nelbo on the answers of --data",
        parse=str,
        nargs="+",
    )
    rows: tuple | None = opt(
        None, f"instead of objectives, rows of the tables, separated by ;: {'; '.join(rows.ROWS)}", parse=row_list
    )
    validation: str | None = opt(None, "dataset or benchmark that chooses the checkpoint of a run")
    test: tuple = opt((), "datasets or benchmarks that the chosen checkpoint answers, comma-separated", parse=name_list)
    tokens_per_step: tuple = opt((1,), "tokens a step to test with, comma-separated", parse=number_list, low=1)
    ground_truth: str | None = opt(None, "dataset whose answers sft-gt trains on, instead of those of --data")
    in_domain: tuple = opt((), "those of --test with a mean of their own, as the others have", parse=name_list)
    epoch: int | str = opt(
        "best", "which checkpoint is tested: best (on --validation), last, or a number", parse=which_epoch
    )
    metric: str = opt("accuracy", "what chooses the best, on --validation", choices=("accuracy", "tds"))
    best_of_epochs: tuple = opt(
        (), "some of --test: also their best epoch, the last, and one chosen on held-out questions", parse=name_list
    )
    rounds: int = opt(1, "rounds of distilling with the chosen checkpoint and training on (ReDi)", low=1)
    check: str = opt("auto", "how a response is compared with the answer", choices=answers.CHECKS)
    decode_batch: int = opt(16, "prompts decoded together", low=1)
    test_limit: int | None = opt(None, "use only the first TEST_LIMIT questions of each validation and test set", low=1)
    benchmarks: str | None = opt(None, "folder with the benchmarks' files; without it they come from the Hub")


def sweep(c):
    """Train and evaluate a grid of settings -> a table with mean and spread over seeds."""
    grid = expand(c)
    prompts = check_sweep(c, grid)
    processes = torchrun.Processes(c.device)
    out = disk.open_run(c.out, identity(c), processes, may_change=("model", "adapter"))  # these by their content
    trajectories = Path(c.data)
    if prompts:
        trajectories = out / "T"
        distilling = torchrun.Processes(c.device)
        distill.distill(decoding(c, c.adapter, c.data, trajectories, c.seed, limit=c.limit), distilling)
        distilling.unlock()  # who trains on them sees by the lock that they are finished
        processes.barrier()

    alone = torchrun.Processes(c.device, alone=True)
    bench = Workbench(c, alone)
    runs = {out / "runs" / "base": functools.partial(base_run, bench)}
    for name, settings in grid.items():
        runs[out / "runs" / name] = functools.partial(one_run, bench, settings, trajectories)
    found = jobs.share(runs, processes, alone)
    if not processes.first:
        return None
    lines = table.over_seeds(found, c.in_domain)
    shown = f"{table.sweep_table(lines)}\n\n{table.questions(found[0])}"
    if c.best_of_epochs:
        shown += f"\n\n{table.epochs_table(found)}"
    with disk.atomic_file(out / "results.json") as f:
        f.write(json.dumps(dict(rows=lines, runs=found, command=vars(c), versions=disk.versions()), indent=2) + "\n")
    with disk.atomic_file(out / "table.md") as f:
        f.write(shown + "\n")
    print(shown)
    return dict(out=str(out), runs=len(found), rows=lines)


def check_sweep(c, grid):
    """Whether --data has prompts, and not trajectories. Raises ValueError for options that do not
    fit together."""
    if not c.test and c.validation is None:
        raise ValueError("--validation or --test: nothing to compare the runs by")
    if c.epoch == "best" and c.validation is None:
        raise ValueError("--epoch best needs --validation; --epoch last takes the last checkpoint, --epoch 3 the third")
    for name in ("in_domain", "best_of_epochs"):
        for source in set(getattr(c, name)) - set(c.test):
            raise ValueError(f"{flag(name)} {source}: none of --test {','.join(c.test)}")
    for name, settings in grid.items():
        made = training(c, settings)
        if type(c.epoch) is int and c.epoch > epochs_of(made):
            raise ValueError(f"--epoch {c.epoch}: --epochs of {name} is {epochs_of(made)}")
        if c.rounds > 1 and made.lora_rank == 0:
            raise ValueError("--rounds needs an adapter to go on from: --lora-rank above 0")
    names = list(map(table.source_name, c.test))
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"--test has two sets called {name}: rename one")
    # Before anything is made, so that a wrong name costs nothing. What there is to say is said when it is used.
    for source in filter(None, (c.ground_truth, c.validation, *c.test)):
        if source in evaluate.TASKS:
            evaluate.read_questions(source, c.benchmarks)
            continue
        rows = data.read_examples(source, c.prompt_field, c.answer_field, warn=lambda line: None)
        if set(map(type, map(operator.itemgetter("answer"), rows))) == {type(None)}:
            raise ValueError(f"{source}: no row has an answer to compare with: see --answer-field")
    prompts = not data.holds_trajectories(c.data)
    truth = c.ground_truth is None and any(s["objective"] == GROUND_TRUTH for s in grid.values())
    if not prompts and (c.rounds > 1 or truth):
        named = f"--rounds needs the dataset, and {GROUND_TRUTH} one with answers: see --ground-truth"
        raise ValueError(f"{c.data} has trajectories: {named}")
    return prompts


# What changes nothing in the scores of a run, the grid, which may grow, and the means of the table.
MAY_CHANGE = ("out", "device", "batch_size", "decode_batch", "gradient_checkpointing", "compile", "over")
MAY_CHANGE += ("rows", "in_domain")


def identity(c):
    """What a sweep is, for its meta.json: its options but for MAY_CHANGE, and what it reads by its
    content."""
    settings = {name: getattr(c, name) for name in field_names(SweepOptions) if name not in MAY_CHANGE}
    contents = {}
    for source in (c.data, c.ground_truth, c.validation, *c.test):
        if source is not None and source not in evaluate.TASKS:
            contents[str(source)] = list(map(disk.fingerprint, data.files_of(source)))
    base = disk.content_hashes(model.resolve(c.model), c.adapter)
    return dict(command="sweep", **settings, **base, contents=contents, versions=disk.versions())


# -------------------------------------------------------------------------------------------- grid


def expand(c):
    """The runs of a grid: name -> the options of train that it changes, in order. Runs that would
    differ only in an option that their objective does not use are one.

    Raises ValueError for an option that a grid does not take, or for a bad value."""
    axes, known, given, over = dict(objective=[c.objective]), grid_options(), set(), c.over
    if c.rows:
        axes, over = dict(row=list(rows.named(c.rows))), [text for text in over if text != DEFAULT_GRID[0]]
    for text in over:
        word, equals, values = text.partition("=")
        name = word.replace("-", "_")
        if not equals:
            raise ValueError(f"--over {text}: expected OPTION=VALUE,VALUE")
        if name not in known:
            raise ValueError(f"--over {text}: {why_not(name, known)}")
        if name in given:
            raise ValueError(f"--over {text}: {name} is given twice; put all its values into one")
        for row in c.rows or ():
            if name in rows.ROWS[row]:
                raise ValueError(f"--over {text}: --rows {row} sets {name} itself")
        given.add(name)
        more = [GROUND_TRUTH] * (name == "objective")
        axes[name] = [parse_value(known[name], value, more) for value in values.split(",")]
    grid = {}
    for values in itertools.product(*axes.values()):
        settings = dict(zip(axes, values))
        row = settings.pop("row", None)
        if row == rows.NO_SFT:  # which every sweep has
            continue
        settings = used_settings(c, rows.ROWS.get(row, {}) | settings)
        changed = [f"{k}={v}" for k, v in settings.items() if k not in rows.ROWS.get(row, {})]
        words = [row, *changed] if row else changed
        grid.setdefault("+".join(words), settings)
    return grid


def grid_options():
    """Name -> field of the options of train that a grid may vary: neither switches nor lists, and
    not what is the same in all runs (a recipe sets options before the grid does)."""
    same = {"out", "adapter", "recipe", *field_names(loading.DatasetOptions), *field_names(loading.ModelOptions)}
    found = {}
    for f in dataclasses.fields(train.TrainOptions):
        varies = f.name == "seed" or f.name not in same
        if varies and kind(f) not in (bool, tuple):
            found[f.name] = f
    return found


def why_not(name, known):
    """Why a grid does not take an option. known: the names of those that it takes."""
    hint = f"a grid takes {', '.join(known)}"
    if name in field_names(train.TrainOptions):
        return f"{flag(name)} is the same in all runs of a sweep; {hint}"
    if name in field_names(SweepOptions):
        return f"{flag(name)} is an option of the sweep, not of its runs; {hint}"
    close = difflib.get_close_matches(name, known, 1)
    if close:
        hint = f"did you mean {close[0]}?"
    return f"train has no option {flag(name)}; {hint}"


def used_settings(c, settings):
    """The settings of one run without those that its objective does not use."""
    unused = {*objective_options.chosen(training(c, settings))[1], *["keep"] * (settings["objective"] == GROUND_TRUTH)}
    return {k: v for k, v in settings.items() if k not in unused}


def training(c, settings, **more):
    """The options of train for one run of the grid."""
    values = {name: getattr(c, name) for name in field_names(train.TrainOptions)}
    values.update(settings)
    if values["objective"] == GROUND_TRUTH:
        values["objective"] = "nelbo"
    else:
        values["max_answer_tokens"] = None  # of trajectories nothing is left out for its length
    values.update(more)
    made = train.TrainOptions(**values)
    check_values(made)
    return made


# ----------------------------------------------------------------------------------------- one run


class Workbench:
    """What runs work with: the options of the sweep, the processes, and the base model, which is
    loaded once a run.

    window, margin: the W and gamma (nats) with which the order of answers is measured. They are the
    same for all runs, so that these compare. None takes those of the sweep, or TABOM's defaults."""

    def __init__(self, c, processes, window=None, margin=None):
        self.c, self.processes = c, processes
        own = inspect.signature(objectives.tabom).parameters
        self.window, self.margin = window or c.window, margin
        if self.window in (None, "global"):  # the measure has windows of one size
            self.window = own["window"].default
        if self.margin is None:
            self.margin = own["margin"].default if c.margin is None else c.margin
        self.clear()

    def clear(self):
        """Forget the models before the next run, because an adapter cannot be taken off again."""
        self.loaded = None  # the base model, with or without an adapter on it
        self.full = None, None  # the last checkpoint that is no adapter, and its model

    def base(self):
        """The base model. It may have an adapter on it, or be in training mode."""
        if self.loaded is None:
            self.loaded = loading.load_model(self.c, self.processes)
        return self.loaded

    def train(self, made):
        """train.train on the loaded base model; where all weights are trained it loads its own."""
        self.full = None, None
        if made.lora_rank == 0:
            return train.train(made, self.processes)
        return train.train(made, self.processes, self.base())

    def at(self, checkpoint):
        """The model of a checkpoint, ready to decode: the base model with the checkpoint's adapter,
        or another model where all weights were trained. None is the bare base model. Raises
        ValueError for it once an adapter is on it."""
        if not is_adapter(self.c, checkpoint):
            if self.full[0] != checkpoint:
                self.full = None, None  # never two of them in memory
                options = loading.ModelOptions(model=checkpoint, **machine_of(self.c))
                self.full = checkpoint, loading.load_model(options, self.processes)
            return self.full[1]
        loaded = self.base()
        if checkpoint is not None:
            lora.load(loaded.m, checkpoint)
        elif lora.layers(loaded.m):
            raise ValueError(f"{self.c.model} has an adapter on it: clear() for the bare model")
        loaded.m.eval()
        return loaded


def one_run(bench, settings, trajectories, folder):
    """Train, choose the checkpoint on the validation set, test it -> the content of result.json."""
    bench.clear()
    c = bench.c
    seed, adapter, candidates = settings.get("seed", c.seed), c.adapter, []
    for number in range(1, c.rounds + 1):
        source = trajectories
        if settings["objective"] == GROUND_TRUTH:
            source = c.ground_truth or c.data
        elif number > 1:  # what the model has become decodes the prompts anew
            source = folder / f"T-{number}"
            decode_prompts = decoding(c, adapter, c.data, source, seed, limit=c.limit)
            distill.distill(decode_prompts, bench.processes, bench.at(adapter))
        out = str(folder / f"R-{number}")
        made = training(c, settings, data=str(source), out=out, adapter=adapter)
        last = bench.train(made)
        of_round = validate_epochs(bench, made, number, folder)
        candidates += of_round
        adapter = choose(c, of_round)["checkpoint"]
    chosen = choose(c, candidates)
    final = {name: last[name] for name in ("loss", "ce", "ranking", "in_order") if name in last}
    tests = answer_tests(bench, chosen["checkpoint"], folder, seed)
    result = dict(settings=settings, chosen=chosen, checkpoints=candidates, tests=tests)
    if c.best_of_epochs:
        reports = [report_epochs(bench, task, of_round, chosen, folder, seed) for task in c.best_of_epochs]
        result["epochs"] = dict(zip(c.best_of_epochs, reports))
    return dict(**result, steps=last["steps"], training=final)


def base_run(bench, folder):
    """The same for the model before training."""
    bench.clear()
    c = bench.c
    score = validate(bench, c.adapter, folder / "validation", c.seed)
    tests = answer_tests(bench, c.adapter, folder, c.seed)
    return dict(settings=dict(objective="base"), chosen=score, tests=tests)


def epochs_of(made):
    """How many epochs a run is trained for. made: its TrainOptions."""
    return min(made.epochs, made.stop_after or made.epochs)


def validate_epochs(bench, made, number, folder):
    """The candidates of one round: its checkpoints with their scores on the validation set, or that of --epoch alone.
    made: its TrainOptions."""
    c, every, found = bench.c, range(1, epochs_of(made) + 1), []
    chosen = every if c.best_of_epochs else dict(best=every, last=every[-1:]).get(c.epoch, [c.epoch])
    for epoch in chosen:
        checkpoint = str(Path(made.out) / f"epoch-{epoch}")
        where = folder / f"validation-{number}-{epoch}"
        score = validate(bench, checkpoint, where, made.seed)
        found.append(dict(checkpoint=checkpoint, round=number, epoch=epoch, **score))
    return found


def choose(c, candidates):
    """The checkpoint of --epoch: of "best" that of the highest metric, the earliest of equal ones. TDS may be None: a
    model may have nothing to say before its EOS. Of several rounds the last."""
    if c.epoch == "best":
        return max(candidates, key=lambda one: -math.inf if one[c.metric] is None else one[c.metric])
    if c.epoch == "last":
        return candidates[-1]
    return [one for one in candidates if one["epoch"] == c.epoch][-1]


def report_epochs(bench, task, candidates, chosen, folder, seed):
    """What each epoch of the last round reaches on a task of --best-of-epochs: see epochs.report."""
    c, tests, validations = bench.c, {}, {}
    at_once = c.tokens_per_step[0]
    for one in candidates:
        where = test_folder(folder, task, at_once)  # which the tests have filled
        if one["checkpoint"] != chosen["checkpoint"]:
            where = where.with_name(f"{where.name}-epoch-{one['epoch']}")
        answer_set(bench, one["checkpoint"], task, where, seed, at_once)
        tests[one["epoch"]] = verdicts_of(task, where)
        if c.validation is not None:
            where = folder / f"validation-{one['round']}-{one['epoch']}"
            validations[one["epoch"]] = verdicts_of(c.validation, where)
    scores = {epoch: 100 * sum(right) / len(right) for epoch, right in tests.items()}
    return dict(scores=scores, **epochs.report(tests, validations or None, seed))


def verdicts_of(source, folder):
    """Whether each question that was answered into a folder was answered right, by rising id."""
    found = distill.read_verdicts(folder / source if source in evaluate.TASKS else folder)
    return [one["correct"] is True for one in found]


def validate(bench, checkpoint, folder, seed):
    """The scores of a checkpoint on the validation set; empty without one."""
    c = bench.c
    if c.validation is None:
        return {}
    score = answer_set(bench, checkpoint, c.validation, folder, seed)
    if c.metric == "tds":
        score["tds"] = order_of_answers(bench, checkpoint, c.validation, folder)["tds"]
    return score


def answer_tests(bench, checkpoint, folder, seed):
    """Answer every test set with every number of tokens per step -> a list of dicts of source,
    tokens_per_step and scores. The first scores also say how the answers are ordered."""
    found = []
    for source, at_once in itertools.product(bench.c.test, bench.c.tokens_per_step):
        where = test_folder(folder, source, at_once)
        scores = answer_set(bench, checkpoint, source, where, seed, at_once)
        if not found:
            scores.update(order_of_answers(bench, checkpoint, source, where))
        found.append(dict(source=source, tokens_per_step=at_once, scores=scores))
    return found


def test_folder(folder, source, at_once):
    """Where a run keeps its answers to a test set."""
    return folder / (f"test-{table.source_name(source)}" + (f"-{at_once}" if at_once != 1 else ""))


def answer_set(bench, checkpoint, source, folder, seed, at_once=None):
    """Answer the questions of a dataset or a benchmark -> dict(accuracy, questions, unchecked): the share of all
    questions that are answered right, and how many answers nobody could judge."""
    c, loaded = bench.c, bench.at(checkpoint)
    if source in evaluate.TASKS:
        at = dict(tasks=(source,), data=c.benchmarks, out=str(folder), limit=c.test_limit)
        at.update(batch_size=c.decode_batch, tokens_per_step=at_once, seed=seed)
        c_task = evaluate.EvaluateOptions(**model_of(c, checkpoint), **machine_of(c), **at)
        (score,) = evaluate.evaluate(c_task, bench.processes, loaded)["scores"]
        n, unchecked = score["n"], score.get("not_graded", 0)
    else:
        score = distill.distill(
            decoding(c, checkpoint, source, folder, seed, c.test_limit, at_once), bench.processes, loaded
        )
        n, unchecked = score["trajectories"], score["unchecked"]
        if unchecked == n:
            raise ValueError(f"{source}: no answer that --check {c.check} could compare with")
    return dict(accuracy=score["correct"] / n, questions=n, unchecked=unchecked)


def order_of_answers(bench, checkpoint, source, folder):
    """How a checkpoint orders the answers that it wrote into a folder: see diagnose.own_order."""
    if source in evaluate.TASKS:
        folder = folder / source
    loaded, at = bench.at(checkpoint), dict(window=bench.window, margin=bench.margin)
    return diagnose.own_order(loaded, bench.processes, folder, TRAJECTORIES, **at)


def is_adapter(c, checkpoint):
    """Whether a checkpoint belongs on the base model; None (nothing on it) does too. Otherwise it
    is a model of its own, all of whose weights were trained."""
    return checkpoint in (None, c.adapter) or (Path(checkpoint) / "adapter_config.json").is_file()


def model_of(c, checkpoint):
    """The options of distill and evaluate that name the model of a checkpoint."""
    if is_adapter(c, checkpoint):
        return dict(model=c.model, adapter=checkpoint)
    return dict(model=checkpoint, adapter=None)


def machine_of(c):
    return dict(device=c.device, dtype=c.dtype, compile=c.compile, block_causal=c.block_causal)


def decoding(c, checkpoint, source, folder, seed, limit, at_once=None):
    """The options of distill that decode a dataset with a checkpoint."""
    at = dict(data=str(source), out=str(folder), seed=seed, limit=limit, batch_size=c.decode_batch)
    at.update(tokens_per_step=at_once, check=c.check, raw=c.raw)
    at.update(prompt_field=c.prompt_field, answer_field=c.answer_field)
    return distill.DistillOptions(**model_of(c, checkpoint), **machine_of(c), **at)
