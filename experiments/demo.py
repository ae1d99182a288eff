"""The whole method on puzzles and a tiny model: distill, train, and an evaluation before and after.

    python tabom.py demo                          # about three minutes on one CPU core
    python tabom.py demo --watch                  # and shows a puzzle while it is decoded
    python tabom.py demo --quick                  # a few puzzles: shows that it runs
    python tabom.py demo --data-only out/puzzles  # only the datasets

The puzzles are the 5x5 ones of puzzles.py, the base model is the folder tiny5/ (tiny.py made it). The model answers
1,200 puzzles itself, and its right answers are trained on: by TABOM, and by SFT on the same trajectories (SFT-SD). On
this base: it was stopped half-way, and the amount of training was chosen after looking at what gains. docs/results.md
has ten seeds that were run after the setting was fixed, and the experiment behind the claims (claims.py).

The last lines on stdout are one puzzle before and after, a table, and its numbers as JSON:

    before, TABOM, SFT-SD   the base model, and the same with the adapter that was trained
    in-domain       share of new puzzles of the kind that was trained on, solved without a mistake
    - before        the paired difference: the same puzzles before and after
    two a step      in-domain with two tokens a step
    near, far       other rules in the same symbols, and in other symbols: not trained on
    ±               one standard error: of a share p of n puzzles sqrt(p (1 - p) / n), of a paired difference that of
                    the mean of n differences of 1, 0 or -1; how far other puzzles would move it
    TDS             Trajectory Discrimination Score (Eq. 10, 11) in nats^2, on the model's own in-domain
                    answers: the variance of the entropies of what is still masked, averaged over the
                    steps; high where easy and hard cells are far apart
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

import data
import decode
import distill
import tokenizer
import train
from experiments import diagnose, pictures, plots, puzzles, stats
from experiments.tiny import TINY5
from runs import loading, torchrun
from runs.options import opt
from tools import watch


@dataclass
class DemoOptions:
    """the demo"""

    out: str | None = opt(None, "folder for datasets, trajectories, checkpoints and pictures (out/demo)")
    quick: bool = opt(False, "few puzzles: shows that it runs, not what it does")
    watch: bool = opt(False, "at the end, show on stderr how one puzzle is decoded before and after")
    data_only: str | None = opt(None, "only write the tasks' datasets into this folder")
    seed: int = opt(0, "of the tasks and of the training")


DOMAINS = {"in": "short-latin", "near": "short-shear", "far": "short-far"}  # the kinds of puzzles of puzzles.py
METHODS = {"TABOM": dict(objective="tabom", window=8, margin=0.2, weight=1.0), "SFT-SD": dict(objective="nelbo")}
TRAINING = dict(epochs=32, lr=6e-3, warmup=20, global_batch=32, batch_size=32)
WHOLE = dict(train=1200, test_in=500, test_near=200, test_far=200)  # puzzles
QUICK = dict(train=64, test_in=32, test_near=16, test_far=16)
QUICK_TRAINING = dict(warmup=2)  # of 32 steps
BATCH = 100  # puzzles decoded together
MEASURED = 128  # in-domain answers whose TDS is taken
DELAY = 0.1  # seconds between two pictures of --watch
# Seconds of each stage on one idle core: what the time that is left is reckoned from.
SECONDS = {"puzzles": 1, "distill": 24, "answers before": 20}
for name in METHODS:
    SECONDS.update({f"train {name}": 25, f"answers {name}": 20})
SECONDS["pictures"] = 13
QUICK_SHARE = 0.14  # of those seconds that --quick needs


def demo(c):
    """The whole method on a tiny model: distill, train, and an evaluation before and after.

    The same command continues where it was stopped. c: DemoOptions. Raises FileExistsError for
    folders that hold anything but a beginning of the same demo."""
    if c.data_only:
        if torchrun.Processes("cpu").count > 1:
            raise ValueError("--data-only needs one process: run it without torchrun")
        return dict(datasets=list(map(str, write_datasets(c.data_only, c.seed, WHOLE).values())))
    return whole_method(c, torchrun.Processes("cpu"))


def write_datasets(folder, seed, sizes):
    """Hard puzzles -> {name: file} of train, test_in, test_near and test_far. Only training insists on a style."""
    texts = {}
    for name, count in sizes.items():
        task = DOMAINS[name.removeprefix("test_").replace("train", "in")]
        texts[Path(folder) / f"{name}.jsonl"] = puzzles.dataset(name, [task], count, True, seed, both=name != "train")
    puzzles.write_new(texts)
    return dict(zip(sizes, texts))


def whole_method(c, processes, methods=tuple(METHODS)):
    """distill, train and evaluate in a folder -> the numbers of the table, which is printed."""
    name, sizes, training, share = "whole", WHOLE, TRAINING, 1.0
    if c.quick:
        name, sizes, training, share = "quick", QUICK, {**TRAINING, **QUICK_TRAINING}, QUICK_SHARE
    out = Path(c.out or "out/demo") / f"{name}-{c.seed}"
    base = dict(model=str(TINY5), device="cpu", seed=c.seed)
    stages = Stages(SECONDS, share, processes.first)

    stages.begin("puzzles")
    if processes.first:
        write_datasets(out / "data", c.seed, sizes)
    processes.barrier()

    stages.begin("distill")
    trajectories = decode_and_check(base, out, "train", out / "T")

    stages.begin("answers before")
    adapters, rows = {"before": None}, {"before": test(base, out, "before")}
    for method in methods:
        stages.begin(f"train {method}")
        options = dict(base, data=str(out / "T"), out=str(out / method), **training, **METHODS[method])
        trained = train.train(train.TrainOptions(**options))
        adapters[method] = trained["checkpoint"]
        stages.begin(f"answers {method}")
        rows[method] = test(base, out, method, adapters[method])

    stages.begin("pictures")
    curves = {}
    for row, adapter in adapters.items():
        loaded = loading.load_checkpoint(loading.ModelOptions(**base), processes, adapter)
        order = diagnose.own_order(loaded, processes, out / f"{row}-in", MEASURED, 8, 0.2)
        rows[row]["tds"], curves[row] = order["tds"], order["per_step"]
    result = dict(**rows, test_puzzles=sizes["test_in"], kept=trajectories["kept"], steps=trained["steps"], seed=c.seed)
    if processes.first:
        answers = chosen_puzzle(out, methods[0])
        drawn = draw(out, curves, methods, answers)
        stages.end()
        if c.watch:
            for row in answers:
                show(base, adapters[row], processes, answers[row], row)
        shown = [before_and_after(answers), table(rows, sizes), ON_THIS_BASE, drawn]
        if c.quick:
            shown[2] = "--quick: so few puzzles show that it runs, not what it does."
        print(*shown, sep="\n\n", flush=True)
    return result


def test(base, out, row, adapter=None):
    """What a model solves -> the shares of a row, and how its in-domain puzzles changed against `before`."""
    found = {}
    for name in DOMAINS:
        shares = decode_and_check(base, out, f"test_{name}", out / f"{row}-{name}", adapter)
        found[name] = shares["correct"] / shares["trajectories"]
    two = decode_and_check(base, out, "test_in", out / f"{row}-in-2", adapter, tokens_per_step=2)
    found = dict(in_domain=found.pop("in"), two_a_step=two["correct"] / two["trajectories"], **found)
    if row != "before":
        after, before = verdicts(out, row), verdicts(out, "before")
        found.update(stats.mean_and_error("gain", [after[name] - before[name] for name in before]))
    return found


def decode_and_check(base, out, dataset, folder, adapter=None, **decoder):
    """Decode the puzzles of a dataset and compare with the answers -> the counts of distill."""
    options = dict(base, data=str(out / "data" / f"{dataset}.jsonl"), out=str(folder), adapter=adapter)
    return distill.distill(distill.DistillOptions(**options, check="exact", batch_size=BATCH, **decoder))


def verdicts(out, row):
    """Which in-domain puzzles a row has solved: {id: True or False}"""
    return {r["id"]: r["correct"] for r in data.read_trajectories(out / f"{row}-in")}


def table(rows, sizes):
    """The table of the docstring above."""
    columns = [f"{sizes['test_in']} puzzles", "in-domain %", "- before", "two a step %", "near %", "far %", "TDS"]
    lines = []
    for name, row in rows.items():
        gain = f"{100 * row['gain']:+.1f} ± {100 * row['gain_se']:.1f}" if "gain" in row else ""
        cells = [name, percent(row["in_domain"], sizes["test_in"]), gain]
        for key, dataset in (("two_a_step", "test_in"), ("near", "test_near"), ("far", "test_far")):
            cells.append(percent(row[key], sizes[dataset]))
        lines.append([*cells, "-" if row["tds"] is None else f"{row['tds']:.3f}"])
    return stats.markdown_table(columns, lines)


ON_THIS_BASE = """\
± is one standard error; "- before" is paired, over the same puzzles. near and far puzzles were not trained on.
On this base model: it was stopped half-way, and the amount of training was chosen after looking at what gains.
docs/results.md has ten seeds in this setting, and twelve other base models in such large steps: SFT-SD gains more."""


def percent(p, n):
    """A share of n puzzles in percent, with its standard error."""
    return f"{100 * p:.1f} ± {100 * (p * (1 - p) / n) ** 0.5:.1f}"


# ----------------------------------------------------------------------------------------- one puzzle, and the pictures


def chosen_puzzle(out, method):
    """The records of one in-domain test puzzle, {"before": ..., method: ...}: the first that only the trained model
    solves, or else the first."""
    answers = {}
    for row in ("before", method):
        answers[row] = {r["id"]: r for r in data.read_trajectories(out / f"{row}-in")}
    ids = [row["id"] for _, row in data.read_rows(out / "data" / "test_in.jsonl")]
    only = [i for i in ids if answers[method][i]["correct"] and not answers["before"][i]["correct"]]
    chosen = (only or ids)[0]
    return {row: found[chosen] for row, found in answers.items()}


def before_and_after(answers):
    """One puzzle as a grid, with the answers before and after and the step of every cell."""
    tok, first = tokenizer.load(TINY5), answers["before"]
    given = first["prompt"][1:]
    right = first["answer"][0].ljust(len(given), watch.END)
    blocks = [("the puzzle", watch.grid(given))]
    for row, r in answers.items():
        cells = watch.letters(tok, r["response_ids"])
        wrong = [i for i, cell in enumerate(right) if cells[i] != cell]
        blocks += [(row, watch.grid(cells, wrong=wrong)), ("at step", watch.grid(r["step"], width=2))]
    told = "a test puzzle"
    if [r["correct"] for r in answers.values()] == [False, True]:
        told = "the first test puzzle that only the trained model solves"
    return f"{told} (! = wrong, {watch.END} = the answer has ended)\n\n{watch.side_by_side(blocks)}"


def show(base, adapter, processes, record, row):
    """Decode a puzzle once more, before one's eyes."""
    loaded = loading.load_checkpoint(loading.ModelOptions(**base), processes, adapter)
    settings = loading.with_eos_rules(loading.decoder_settings(loading.DecodeOptions(), loaded), loaded)
    tqdm.write(f"{row}:", sys.stderr)
    on_step = watch.Watch(loaded.tok, loaded.m.config.mask_id, record["prompt"], f"{row}:\n", DELAY)
    decode.generate(loaded.m, torch.tensor([record["prompt_ids"]]), on_step=on_step, **settings)
    on_step.end()


def draw(out, curves, methods, answers):
    """The pictures in out/pictures -> a line that says where they are, or what they need."""
    folder, rows = out / "pictures", []
    for row, curve in curves.items():
        model = "base" if row == "before" else row
        for step, value in enumerate(curve):
            rows.append(dict(model=model, step=step, tds=value, tds_se=None))
    metrics = {method: diagnose.read_metrics(out / method) for method in methods}
    tok, last = tokenizer.load(TINY5), answers[methods[0]]
    folder.mkdir(exist_ok=True)
    try:
        plots.save(plots.draw_tds(rows), folder / "tds.png")
        plots.save(plots.draw_training(metrics), folder / "training.png")
        plots.save(pictures.draw_trajectory(tok, last), folder / "puzzle.png")
        pictures.save_frames(tok, last, folder / "decoding.gif")
    except ImportError as e:
        return f"no pictures: {e}"
    return f"pictures: {folder}/decoding.gif, puzzle.png, tds.png, training.png"


# --------------------------------------------------------------------------- the time that is left


class Stages:
    """Says on stderr which stage begins and how long is left of all.

    seconds: {stage: what it takes on a reference machine}, times `share`. How fast this machine is follows from the
    stages that are over; one that an earlier run had finished does not count. So the first, a short one, says nothing
    yet, and what is said later never goes up."""

    def __init__(self, seconds, share=1.0, shows=True, clock=time.perf_counter):
        self.names, self.shows, self.clock = list(seconds), shows, clock
        self.expected = [share * value for value in seconds.values()]
        self.current, self.begun, self.said = None, None, float("inf")
        self.took = []  # (expected, real) seconds of the stages that had something to do

    def begin(self, name):
        self.end()
        self.current, self.begun = self.names.index(name), self.clock()
        line = f"stage {self.current + 1} of {len(self.names)}: {name}"
        if self.current > 0:
            self.said = min(self.said, self.left())
            line += f", about {duration(self.said)} left"
        if self.shows:
            tqdm.write(line, sys.stderr)

    def end(self):
        if self.current is not None:
            expected, real = self.expected[self.current], self.clock() - self.begun
            if real > expected / 8:
                self.took.append((expected, real))
        self.current = None

    def left(self):
        """Seconds until the end, from the start of the current stage."""
        pace = 1.0  # of this machine, in seconds for a second of the reference
        if self.took:
            expected, real = map(sum, zip(*self.took))
            pace = real / expected
        return pace * sum(self.expected[self.current :])


def duration(seconds):
    """40 -> "40 s", 100 -> "1 min 40 s" """
    seconds = max(1, round(seconds))
    return f"{seconds} s" if seconds < 60 else f"{seconds // 60} min {seconds % 60:02} s"
