"""The whole method on puzzles and a tiny model: distill, train, and an evaluation before and after.

    python tabom.py demo                          # under 5 minutes on 2 CPU cores
    python tabom.py demo --quick                  # a few puzzles: shows that it runs
    python tabom.py demo --data-only out/puzzles  # only the datasets

The puzzles are those of puzzles.py, the model is the folder tiny/ (tiny.py made it). The experiment behind the claims
is claims.py.
"""

from dataclasses import dataclass
from pathlib import Path

import distill
import runs
import train
from experiments import diagnose, puzzles
from experiments.tiny import TINY
from options import opt


@dataclass
class DemoOptions:
    """the demo"""

    out: str | None = opt(None, "folder for datasets, trajectories and checkpoints (out/demo)")
    quick: bool = opt(False, "few puzzles: shows that it runs, not what it does")
    data_only: str | None = opt(None, "only write the tasks' datasets into this folder")
    seed: int = opt(0, "of the tasks and of the training")


TRAINING = dict(window=8, margin=0.2, weight=1.0, epochs=4, lr=3e-3, global_batch=16, batch_size=16, warmup=20)
QUICK = dict(train=64, validation=8, test=32)
BATCH = 64  # puzzles decoded together


def demo(c):
    """The whole method on a tiny model: distill, train, and an evaluation before and after."""
    if c.data_only:
        if runs.Processes("cpu").count > 1:
            raise ValueError("--data-only needs one process: run it without torchrun")
        return dict(datasets=[str(file) for file in puzzles.write_datasets(c.data_only, c.seed)])
    out = Path(c.out or "out/demo") / f"{'quick' if c.quick else 'whole'}-{c.seed}"
    processes = runs.Processes("cpu")
    if processes.first:
        puzzles.write_datasets(out / "data", c.seed, **QUICK if c.quick else {})
    processes.barrier()
    base = dict(model=str(TINY), device="cpu", seed=c.seed)
    trained_on, *tests = (str(out / "data" / name) for name in ("train.jsonl", "test_in.jsonl", "test_out.jsonl"))
    distilled = distill.distill(
        distill.DistillOptions(**base, data=trained_on, out=str(out / "T"), check="exact", batch_size=BATCH)
    )
    trained = train.train(train.TrainOptions(**base, data=str(out / "T"), out=str(out / "R"), **TRAINING))
    rows = {}
    for name, adapter in (("before", None), ("after", trained["checkpoint"])):
        solved = []
        for test in tests:
            answers = out / f"{name}-{Path(test).stem}"
            score = distill.distill(
                distill.DistillOptions(
                    **base, data=test, out=str(answers), adapter=adapter, check="exact", batch_size=BATCH
                )
            )
            solved.append(score["correct"] / score["trajectories"])
        rows[name] = dict(
            zip(("in_domain", "out_of_domain"), solved),
            tds=diagnose.order_of(runs.ModelOptions(**base), processes, adapter, out / f"{name}-test_in", 128)["tds"],
        )
    count = score["trajectories"]
    if processes.first:
        print(before_and_after(rows, count))
    return dict(**rows, test_puzzles=count, kept=distilled["kept"], steps=trained["steps"], seed=c.seed)


def before_and_after(rows, count):
    lines = [f"| {count} puzzles each | in-domain % | out-of-domain % | TDS |", "| --- | --- | --- | --- |"]
    for name, row in rows.items():
        cells = [
            f"{100 * p:.1f} ± {100 * (p * (1 - p) / count) ** 0.5:.1f}"
            for p in (row["in_domain"], row["out_of_domain"])
        ]
        tds = "-" if row["tds"] is None else f"{row['tds']:.3f}"
        lines.append(f"| {name} | {cells[0]} | {cells[1]} | {tds} |")
    return "\n".join(lines)
