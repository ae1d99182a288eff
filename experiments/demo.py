"""The whole method on puzzles and a tiny model: distill, train, and an evaluation before and after.

    python tabom.py demo                          # about three minutes on one CPU core
    python tabom.py demo --quick                  # a few puzzles: shows that it runs
    python tabom.py demo --data-only out/puzzles  # only the datasets

The puzzles are those of puzzles.py, the model is the folder tiny/ (tiny.py made it). The experiment
behind the claims is claims.py. The last lines on stdout are a table and its numbers as JSON:

    | 500 puzzles each | in-domain % | out-of-domain % | TDS |
    | before | ... ± ... | ... ± ... | ... |
    | after | ... ± ... | ... ± ... | ... |

    before, after   the tiny model, and the same with the adapter that was trained
    in-domain       share of new puzzles of the kind that was trained on, solved without a mistake
    out-of-domain   the same for a kind that was not trained on
    ±               one standard error of that share p of n puzzles, sqrt(p (1 - p) / n): how far other
                    puzzles would move it; another seed of the training moves it further
    TDS             Trajectory Discrimination Score (Eq. 10, 11) in nats^2, on the model's own in-domain
                    answers: the variance of the entropies of what is still masked, averaged over the
                    steps; high where easy and hard cells are far apart
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

import distill
import train
from experiments import diagnose, puzzles
from experiments.tiny import TINY
from runs import loading, torchrun
from runs.options import opt


@dataclass
class DemoOptions:
    """the demo"""

    out: str | None = opt(None, "folder for datasets, trajectories and checkpoints (out/demo)")
    quick: bool = opt(False, "few puzzles: shows that it runs, not what it does")
    data_only: str | None = opt(None, "only write the tasks' datasets into this folder")
    seed: int = opt(0, "of the tasks and of the training")


TRAINING = dict(window=8, margin=0.2, weight=1.0, epochs=4, lr=3e-3, warmup=20)
TRAINING.update(global_batch=16, batch_size=16)
WHOLE = dict(train=800, validation=200, test=500)  # puzzles
QUICK = dict(train=64, validation=8, test=32)
BATCH = 64  # puzzles decoded together
MEASURED = 128  # in-domain answers whose TDS is taken
# Seconds of each stage on one idle core: what the time that is left is reckoned from.
SECONDS = {"puzzles": 5, "distill": 33, "train": 5}
SECONDS.update({"answers before": 30, "answers after": 30, "TDS": 8})
QUICK_SHARE = 0.1  # of those seconds that --quick needs


def demo(c):
    """The whole method on a tiny model: distill, train, and an evaluation before and after.

    The same command continues where it was stopped. c: DemoOptions. Raises FileExistsError for
    folders that hold anything but a beginning of the same demo."""
    if c.data_only:
        if torchrun.Processes("cpu").count > 1:
            raise ValueError("--data-only needs one process: run it without torchrun")
        return dict(datasets=list(map(str, puzzles.write_datasets(c.data_only, c.seed))))
    return whole_method(c, torchrun.Processes("cpu"))


def whole_method(c, processes):
    """distill, train and evaluate in a folder -> the numbers of the table, which is printed."""
    name, sizes, share = "whole", WHOLE, 1.0
    if c.quick:
        name, sizes, share = "quick", QUICK, QUICK_SHARE
    out = Path(c.out or "out/demo") / f"{name}-{c.seed}"
    base = dict(model=str(TINY), device="cpu", seed=c.seed)
    stages = Stages(SECONDS, share, processes.first)
    files = {}
    for name in ("train", "test_in", "test_out"):
        files[name] = str(out / "data" / f"{name}.jsonl")

    stages.begin("puzzles")
    if processes.first:
        puzzles.write_datasets(out / "data", c.seed, **sizes)
    processes.barrier()

    stages.begin("distill")
    trajectories = decode_and_check(base, files["train"], out / "T")

    stages.begin("train")
    options = dict(base, data=str(out / "T"), out=str(out / "R"), **TRAINING)
    trained = train.train(train.TrainOptions(**options))

    adapters = {"before": None, "after": trained["checkpoint"]}
    rows = {}
    for when, adapter in adapters.items():
        stages.begin(f"answers {when}")
        inside = decode_and_check(base, files["test_in"], out / f"{when}-test_in", adapter)
        outside = decode_and_check(base, files["test_out"], out / f"{when}-test_out", adapter)
        count = inside["trajectories"]  # the same number of both kinds
        rows[when] = dict(in_domain=inside["correct"] / count)
        rows[when]["out_of_domain"] = outside["correct"] / count

    stages.begin("TDS")
    limits = (MEASURED, TRAINING["window"], TRAINING["margin"])
    for when, adapter in adapters.items():
        loaded = loading.load_checkpoint(loading.ModelOptions(**base), processes, adapter)
        order = diagnose.own_order(loaded, processes, out / f"{when}-test_in", *limits)
        rows[when]["tds"] = order["tds"]
    stages.end()
    if processes.first:
        print(before_and_after(rows, count))
    made = dict(test_puzzles=count, kept=trajectories["kept"], steps=trained["steps"])
    return dict(**rows, **made, seed=c.seed)


def decode_and_check(base, dataset, out, adapter=None):
    """Decode the puzzles of a dataset and compare with the answers -> the counts of distill."""
    options = dict(base, data=dataset, out=str(out), adapter=adapter, check="exact", batch_size=BATCH)
    return distill.distill(distill.DistillOptions(**options))


def before_and_after(rows, count):
    """The table of the docstring above."""
    lines = [f"| {count} puzzles each | in-domain % | out-of-domain % | TDS |"]
    lines.append("| --- | --- | --- | --- |")
    for name, row in rows.items():
        cells = [name]
        for domain in ("in_domain", "out_of_domain"):
            p = row[domain]
            error = (p * (1 - p) / count) ** 0.5
            cells.append(f"{100 * p:.1f} ± {100 * error:.1f}")
        cells.append("-" if row["tds"] is None else f"{row['tds']:.3f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


# --------------------------------------------------------------------------- the time that is left


class Stages:
    """Says on stderr which stage begins and how long is left of all.

    seconds: {stage: what it takes on a reference machine}, times `share`. How fast this machine is
    follows from the stages that are over; one that an earlier run had finished does not count."""

    def __init__(self, seconds, share=1.0, shows=True, clock=time.perf_counter):
        self.names, self.shows, self.clock = list(seconds), shows, clock
        self.expected = [share * value for value in seconds.values()]
        self.current, self.begun = None, None
        self.took = []  # (expected, real) seconds of the stages that had something to do

    def begin(self, name):
        self.end()
        self.current, self.begun = self.names.index(name), self.clock()
        if self.shows:
            stage = f"stage {self.current + 1} of {len(self.names)}: {name}"
            tqdm.write(f"{stage}, about {duration(self.left())} left", sys.stderr)

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
    """40 -> "40 s", 100 -> "2 min" """
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min"
