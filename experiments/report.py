"""Tables and pictures of the runs of claims.py, all computed from what is kept of each base model.

    report.write_report("out/experiment/results")
    python -m experiments.report experiments/results    # the same, again

    bases/base-N.json    a base model and its runs, see claims.py
    tables.md            the primary measures, the paper's claims by learning rate, and a table for every question
    *.png, *.pdf         frontier: gain in-domain against loss elsewhere; tds: TDS over steps (Figure 2)

looks.py says what is measured, and when a difference between rows may be shown.
"""

import argparse
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import torch

import data
from experiments import looks, plots, reach, stats, tiny
from experiments.stats import markdown_table
from release import epochs
from runs import disk

QUESTIONS = (164, 500, 1319)  # of HumanEval, MATH500 and GSM8K
LAST = 8  # decode steps
LIMIT = """\
The puzzles do not test the paper: its claims are about language models, and a model of 0.2 million parameters whose
answers have at most 25 characters is none. A verdict says what happened here."""
TITLES = {
    "in": "in-domain", "near": "near", "far": "far", "in-2": "in-domain, 2 a step", "elsewhere": "(near + far) / 2",
    "kl": "KL to the base model, near and far", "tds": "TDS", "correlation": "order",
}  # fmt: skip
# What base models are tested with.
TESTS = {"in": "in-domain", "near": "near", "far": "far", "in-2": "2 a step"}
TESTS |= {looks.SEVERAL: "several", f"{looks.SEVERAL}-2": "several, 2 a step"}
# What the paper claims: (claim, row, row that it is compared with, measure, sign that confirms it).
CLAIMS = (
    ("gains in-domain over SFT-SD", "TABOM", "SFT-SD", "in", 1),
    ("gains in-domain over the base model", "TABOM", "base", "in", 1),
    ("transfers: over the base model", "TABOM", "base", "elsewhere", 1),
    ("forgets less than SFT-SD", "TABOM", "SFT-SD", "elsewhere", 1),
    ("SFT on ground truth loses in-domain", "SFT-GT", "base", "in", -1),
    ("SFT on ground truth forgets", "SFT-GT", "base", "elsewhere", -1),
    ("higher TDS than the base model", "TABOM", "base", "tds", 1),
    ("higher TDS than SFT-SD", "TABOM", "SFT-SD", "tds", 1),
    ("better than SFT-SD with two tokens a step", "TABOM", "SFT-SD", "in-2", 1),
    ("trajectory masking gains over SFT-SD", "TABOM, no ranking", "SFT-SD", "in", 1),
    ("ranking is needed", "TABOM", "TABOM, no ranking", "in", 1),
    ("ranking raises the TDS", "TABOM", "TABOM, no ranking", "tds", 1),
    ("better than naive trajectory distillation", "TABOM", "naive TD", "in", 1),
    ("better than dInfer", "TABOM", "dInfer", "in", 1),
    ("better than T3D", "TABOM", "T3D", "in", 1),
    ("better than dParallel", "TABOM", "dParallel", "in", 1),
    ("Eq. 8 better than the exact KL of Eq. 6", "TABOM", "TABOM, kl", "in", 1),
)
# Pairs that are compared at equal gain.
PAIRS = (looks.PRIMARY, ("TABOM, no ranking", "SFT-SD"), ("naive TD", "SFT-SD"), ("TABOM", "naive TD"))
PAIRS += (("TABOM", "TABOM, no ranking"),)
# Why naive TD leads, and what ranking does: (row, row that it is compared with).
LEAD = (("naive TD", "SFT-SD"), ("naive TD", "TABOM"), ("naive TD", "TABOM, no ranking"))
LEAD += (("TABOM, no ranking", "SFT-SD"), ("TABOM", "TABOM, no ranking"), ("naive TD's weights", "TABOM, no ranking"))
LEAD += (("naive TD's weights", "naive TD"), ("any reach", "TABOM, no ranking"), ("any reach", "naive TD"))


# ------------------------------------------------------------------------------------------ tables


def shown(value, name="in", sign="+", each=False):
    """A mean with its interval, "-" for None. each: also the value on each base model."""
    if value is None:
        return "-"
    digits = 3 if name in looks.FINE else 1
    text = f"{value['mean']:{sign}.{digits}f}"
    if value["low"] is not None:
        text += f" [{value['low']:{sign}.{digits}f}, {value['high']:{sign}.{digits}f}]"
    if each:
        text += f" ({' '.join(map(f'{{:{sign}.{digits}f}}'.format, value['bases'].values()))})"
    return text


def counted(value, name="in", most=None):
    """The same with the number of base models, where it is not `most`."""
    count = len(value["bases"]) if value else 0
    return shown(value, name) + (f" ({count})" if value and count != most else "")


def markdown(bases):
    """All tables. bases: {number: what is kept of it}."""
    sections = [("The base models", bases_table(bases))]
    for task in ("in", looks.SEVERAL):
        name, of_task = TESTS[task], looks.on_task(bases, task)
        looked = looks.looked_at(of_task)
        if looks.rows_of(of_task) and not looks.rows_of(looked):
            numbers = " and ".join(map(str, looks.LOOKS))
            told = f"Differences are shown at {numbers} base models; of odd ones alone once all have a row."
            sections.append((f"Rows, {name}", told))
        elif looked:
            hidden = looks.being_made(of_task, max(looked))
            told = ", ".join(f"{key} ({count})" for key, count in hidden.items()) or "none"
            sections.append((f"{name}: not shown until all of these base models have it (how many do)", told))
            sections += with_looks(looked) if 2 in looked else described(looked, name)
    return "\n\n".join(f"### {title}\n\n{content}" for title, content in sections)


def with_looks(bases):
    """The tables of the base models of a look, [(title, content)]."""
    sections = []
    for look in filter(lambda look: look <= len(bases), looks.LOOKS):
        title = f"The primary measures: the look at {look} base models"
        sections.append((title, primary_table(dict(list(bases.items())[:look]))))
    return sections + [
        ("The paper's claims, by learning rate", f"{LIMIT}\n\n{claims_table(bases)}"),
        ("All rows, after the last epoch", rows_table(bases)),
        ("TABOM - SFT-SD by learning rate, on the odd base models", rates_table(bases)),
        ("Loss at equal gain", equal_gain_table(bases)),
        ("Gain and loss of each epoch", epochs_table(bases)),
        ("The best epoch on the test puzzles, against the last", best_table(bases)),
        ("Why naive TD leads, and what ranking does", lead_table(bases)),
    ]


def described(bases, name):
    """The tables of runs on a task that test nothing, [(title, content)]: those of the runs in-domain, with the task in
    its place."""
    sections = [
        ("all rows, after the last epoch", rows_table(bases)),
        ("differences between rows", pairs_table(bases)),
        ("loss at equal gain", equal_gain_table(bases)),
        ("gain and loss of each epoch", epochs_table(bases)),
    ]
    return [(f"{name}: {title}", content.replace(TESTS["in"], name)) for title, content in sections]


def bases_table(bases):
    """What each base model solves before training, and what there was to train on."""
    lines = []
    for number, base in sorted(bases.items()):
        runs, steps = base["runs"], set()
        tried = ", ".join(f"seed {seed}: {100 * share:.1f}" for seed, share in base["tried"])
        before = {}
        for tested in filter(None, map(runs.get, ("base", f"base {looks.SEVERAL}"))):
            before |= tested["epochs"][-1]["right"]
        right = [cell(looks.of_epoch(dict(right=before), name)) for name in TESTS]
        for run in runs.values():
            steps.add(run.get("steps", 0))
        task = "in" if "kept in" in base else looks.SEVERAL
        kept, early = base[f"kept {task}"], 100 * base[f"early EOS {task}"]
        cells = [f"{kept[0]} of {kept[1]}", f"{early:.0f}", f"{max(steps)}", f"{len(runs)}", f"{base['minutes']:.0f}"]
        lines.append([f"base-{number}", tried, *right, *cells])
    columns = ["model", "validation %", *map("{} %".format, TESTS.values())]
    columns += ["kept to train on", "EOS among the first 8 %", "steps", "runs", "minutes"]
    return markdown_table(columns, lines)


def cell(value):
    return "-" if value is None else f"{value:.1f}"


def primary_table(bases):
    lines = []
    for name, found, level, said, note in looks.primary(bases):
        p = "-" if found is None or found["p"] is None else f"{found['p']:.4f}"
        lines.append([name, said, shown(found, each=True), p, f"{level:.4f}", note])
    kl, _ = looks.loss_at_equal_gain(bases, *looks.PRIMARY, loss="kl")
    lines.append(["beside P2: KL to the base model", "-", shown(kl, "kl", each=True), "-", "0.05", "describes"])
    return markdown_table(["measure", "verdict", "value (each base model)", "p", "level", "note"], lines)


def rates_of(bases):
    return list(dict(map(reversed, looks.rows_of(bases))))


def claims_table(bases):
    rates, lines, p1 = rates_of(bases), [], (*looks.PRIMARY, "in", looks.rate_of_p1(bases)[0])
    for claim, row, other, name, sign in CLAIMS:
        cells = []
        for rate in rates:
            one = looks.difference(bases, row, other, rate, name)
            told = "-" if one is None else f"{looks.verdict(one, name, sign)}: {counted(one, name, len(bases))}"
            cells.append(f"(P1) {shown(one)}" if (row, other, name, rate) == p1 else told)
        lines.append([claim, f"{row} - {other}, {TITLES[name]}", *cells])
    return markdown_table(["claim", "difference", *rates], lines)


def rows_table(bases):
    """Every row at every rate: gains over the base model, differences to SFT-SD, and what else changed."""
    lines, names = [], ("in", "near", "far", "in-2", "kl", "tds", "correlation")
    for row, rate in looks.rows_of(bases):
        count = len(looks.values_of(bases, row, rate, "in"))
        cells = [counted(looks.difference(bases, row, "base", rate, name), name, count) for name in names]
        against = "-" if row == "SFT-SD" else shown(looks.difference(bases, row, "SFT-SD", rate, "in"))
        lines.append([row, rate, str(count), cells[0], against, *cells[1:]])
    titles = [f"{TITLES[name]} - base" for name in names]
    return markdown_table(["row", "rate", "base models", titles[0], "in-domain - SFT-SD", *titles[1:]], lines)


def pairs_table(bases):
    """Of PAIRS, a row less the other at each rate that both have."""
    lines, names = [], ("in", "in-2", "elsewhere", "kl", "tds", "correlation")
    for (row, other), rate in itertools.product(PAIRS, rates_of(bases)):
        cells = []
        for name in names:
            cells.append(counted(looks.difference(bases, row, other, rate, name), name, len(bases)))
        if set(cells) != {"-"}:
            lines.append([f"{row} - {other}", rate, *cells])
    return markdown_table(["rows", "rate", *map(TITLES.get, names)], lines)


def odd(bases):
    """The base models that have all learning rates."""
    return {number: base for number, base in bases.items() if number % 2}


def rates_table(bases):
    lines = []
    for rate in rates_of(bases):
        lines.append([rate, shown(looks.difference(odd(bases), *looks.PRIMARY, rate, "in"), each=True)])
    low, high = (looks.runs_of(looks.difference(bases, *looks.PRIMARY, rate, "in")) for rate in looks.FRONTIER_RATES)
    change = stats.paired(high, low)
    lines.append(
        [f"{looks.FRONTIER_RATES[1]} less {looks.FRONTIER_RATES[0]}, all base models", shown(change, each=True)]
    )
    return markdown_table(["rate", "in-domain"], lines)


def equal_gain_table(bases):
    """Losses at equal gain of PAIRS, points and KL."""
    lines = []
    for row, other in PAIRS:
        points, without = looks.loss_at_equal_gain(bases, row, other)
        kl, _ = looks.loss_at_equal_gain(bases, row, other, "kl")
        if points:
            cells = [shown(points), shown(kl, "kl"), str(len(points["bases"])), without]
            lines.append([f"{row} - {other}", *cells])
    return markdown_table(["rows", "loss, points", "KL, nats", "base models", "left out, without a gain"], lines)


def frontier(bases):
    """Gain and loss of each row, rate and epoch, means over base models with standard errors: what plots.draw_frontier
    draws."""
    found = []
    for row, rate in looks.rows_of(bases):
        for epoch in range(1, 1 + looks.EPOCHS):
            points = looks.each(bases, lambda base: looks.points_of(base, row, (rate,)).get((rate, epoch)))  # noqa: B023
            gains, losses = zip(*points.values())
            both = stats.mean_and_error("gain", gains) | stats.mean_and_error("loss", losses)
            found.append(dict(row=row, rate=rate, epoch=epoch, base_models=len(gains), **both))
    return found


def epochs_table(bases):
    lines = []
    for one in frontier(bases):
        gain, loss = f"{one['gain']:+.1f} ± {cell(one['gain_se'])}", f"{one['loss']:+.1f} ± {cell(one['loss_se'])}"
        lines.append([one["row"], one["rate"], str(one["epoch"]), str(one["base_models"]), gain, loss])
    return markdown_table(["row", "rate", "epoch", "base models", "gain in-domain", "loss near and far"], lines)


def best_table(bases):
    """How far the best of the epochs, chosen on the test puzzles, is above the last, and above one chosen on the other
    half of these, on the puzzles that all epochs were tested on; and how far it would be above the truth if all epochs
    were equally good (epochs.simulate), as correlated as these, for so many questions."""
    lines = []
    for row, rate in looks.rows_of(bases):
        found = looks.each(bases, lambda base: verdicts_of(base, looks.key_of(row, rate)))  # noqa: B023
        last, honest, same = {}, {}, []
        for at, right in found.items():  # [E, Q]
            report = epochs.report(dict(enumerate(right, 1)), seed=at[0])
            last[at] = report["best"]["score"] - report["last"]["score"]
            honest[at] = report["best"]["score"] - report["honest"]["score"]
            same.append(np.corrcoef(right)[np.triu_indices(looks.EPOCHS, 1)].mean())
        accuracy, correlation = np.mean(list(found.values())), max(float(np.nan_to_num(same).mean()), 0.0)
        cells = [row, rate, str(right.shape[1]), str(len(found)), *map(shown, map(stats.interval, (last, honest)))]
        for questions in QUESTIONS:
            cells.append(f"{epochs.simulate(looks.EPOCHS, questions, accuracy, correlation, 5000)['best']:+.2f}")
        lines.append([*cells, f"{correlation:.2f}"])
    titles = ["row", "rate", "puzzles", "base models", "best - last", "best - chosen on others"]
    return markdown_table([*titles, *map("equally good, {}".format, QUESTIONS), "correlation of epochs"], lines)


def verdicts_of(base, key):
    """The verdicts of a run's epochs on the in-domain puzzles that all were tested on, bool [E, Q]; None without it."""
    if key not in base["runs"]:
        return None
    found = [looks.unpack(one["right"]["in"]) for one in base["runs"][key]["epochs"]]
    return np.stack([right[: min(map(len, found))] for right in found])


def lead_table(bases):
    """What is between naive TD and TABOM, and how much of each loss the last decode steps have."""
    lines, steps = [], tiny.SHORT.answer
    columns = list(itertools.product(("in", "elsewhere"), looks.FRONTIER_RATES))
    for row, other in LEAD:
        cells = [counted(looks.difference(bases, row, other, rate, name)) for name, rate in columns]
        lines.append([f"{row} - {other}", *cells])
    shares = {"SFT-SD": torch.full((steps,), 1 / steps), "TABOM": reach.weights_of_window(steps, reach.WINDOW)}
    shares |= {"naive TD, naive TD's weights": reach.weights_of_traj(steps), "any reach": reach.weights_of_reach(steps)}
    told = [f"{row} {100 * weights[-LAST:].sum():.0f} %" for row, weights in shares.items()]
    titles = [f"{TITLES[name]}, {rate}" for name, rate in columns]
    differences = markdown_table(["rows", *titles], lines)
    return f"Share of the last {LAST} of {steps} decode steps in the loss: {', '.join(told)}.\n\n{differences}"


# ---------------------------------------------------------------------------------------- a folder


def write_report(folder):
    """Make the tables and pictures of a folder from its base models, and print the tables -> where they are."""
    bases, folder = read(folder), Path(folder)
    looked, tables = looks.looked_at(looks.on_task(bases, "in")), markdown(bases)
    with disk.atomic_file(folder / "tables.md") as f:
        f.write(tables + "\n")
    if {(row, looks.RATE) for row in looks.PRIMARY}.issubset(looks.rows_of(looked)):
        points = list(filter(is_drawn, frontier(looked)))
        single = []
        for row, base in itertools.product(looks.PRIMARY, looked.values()):
            single += zip(itertools.repeat(row), *zip(*looks.points_of(base, row).values()))
        plots.save(plots.draw_frontier(points, single), folder / "frontier.png")
        plots.save(plots.draw_tds(tds_curves(looked), ["base", *looks.PRIMARY[::-1]]), folder / "tds.png")
    print(tables)
    return dict(results=str(folder), bases=len(bases), looked_at=len(looked))


def is_drawn(point):
    """Whether a point of a frontier is in the picture: of the rows of LEAD. With T3D, which loses 45 points, the others
    would be one spot."""
    return point["rate"] in looks.FRONTIER_RATES and point["row"] in itertools.chain(*LEAD)


def tds_curves(bases):
    """TDS at each step of the base model and of the primary rows: what plots.draw_tds draws."""
    found = []
    for row in ("base", *looks.PRIMARY[::-1]):
        curves = [
            base["runs"][looks.key_of(row, looks.RATE)]["epochs"][-1]["order"]["per_step"] for base in bases.values()
        ]
        for step in range(max(map(len, curves))):
            means = []
            for curve in curves:
                means += stats.present(curve[step : step + 1])
            found.append(dict(model=row, step=step, base_models=len(means), **stats.mean_and_error("tds", means)))
    return found


def read(folder):
    """The base models of a folder, {number: what is kept}. Raises FileNotFoundError where there are none, ValueError
    for a file that is something else."""
    found = {}
    for file in sorted(Path(folder).glob("bases/base-*.json")):
        base = data.read_json(file)
        runs = base.get("runs", {})
        tested = runs.get("base", runs.get(f"base {looks.SEVERAL}", {}))
        if not {"number", "tried", "runs"} <= base.keys() or not tested.get("epochs"):
            raise ValueError(f"{file}: this is not what claims keeps of a base model")
        if file.name != f"base-{base['number']}.json":
            raise ValueError(f"{file}: it is of base-{base['number']}: two files of one base model would be one")
        found[base["number"]] = base
    if not found:
        raise FileNotFoundError(f"no bases/base-*.json in {folder}: give the results folder of an experiment of claims")
    return dict(sorted(found.items()))


def main(argv=None):
    """Make tables and pictures again -> exit status."""
    parser = argparse.ArgumentParser(prog="python -m experiments.report", description=write_report.__doc__)
    parser.add_argument("folder", help="a results folder of claims, with bases/")
    folder = parser.parse_args(argv).folder
    try:
        print(json.dumps(write_report(folder)))
    except (ValueError, OSError, ImportError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
