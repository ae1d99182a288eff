"""Tables and pictures of the runs of claims.py, all computed from what is kept of each base model.

    report.write_report("out/experiment/results")
    python -m experiments.report experiments/results    # the same, again

    bases/base-N.json    a base model and its runs, see claims.py
    tables.md            the primary measures, the paper's claims by learning rate, and a table for every question
    *.png, *.pdf         frontier: gain in-domain against loss elsewhere; tds: TDS over steps (Figure 2)

Differences between rows are shown at the looks alone (LOOKS), on the base models that each look has: see
results/registered.md. The unit of the statistics is the base model: the runs on one share its weights, trajectories
and test puzzles.
"""

import argparse
import base64
import itertools
import json
import statistics
import sys
from pathlib import Path

import numpy as np
import torch

import data
from experiments import plots, reach, stats, tiny
from experiments.stats import markdown_table
from release import epochs
from runs import disk

LOOKS = {12: 0.0052, 24: 0.0480}  # base models -> two-sided level (O'Brien and Fleming, together 0.05)
PRIMARY, RATE, LOW_RATE = ("TABOM", "SFT-SD"), "0.0003", "0.0001"
FRONTIER_RATES = ("0.0003", "0.001")
EPOCHS, QUESTIONS = 3, (164, 500, 1319)  # the last: of HumanEval, MATH500 and GSM8K
LAST = 8  # decode steps
LOST = 2.0  # points of (near + far) / 2 that both rows may lose on average, so that P1 is like the paper's
SMALL, SMALL_FINE = 1.5, 0.005  # an interval within this of zero shows that there is nothing to see
FEWEST = 3  # base models of a verdict: two differences may agree by chance
SEVERAL = "several"
LIMIT = """\
The puzzles do not test the paper: its claims are about language models, and a model of 0.2 million parameters whose
answers have at most 25 characters is none. A verdict says what happened here."""
TITLES = {
    "in": "in-domain", "near": "near", "far": "far", "in-2": "in-domain, 2 a step", "elsewhere": "(near + far) / 2",
    "kl": "KL to the base model, near and far", "tds": "TDS", "correlation": "order", SEVERAL: "several",
    f"{SEVERAL}-2": "several, 2 a step",
}  # fmt: skip
FINE = ("kl", "tds", "correlation")  # measures with three digits
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
    ("better than naive trajectory distillation", "TABOM", "naive TD", "in", 1),
    ("better than dInfer", "TABOM", "dInfer", "in", 1),
    ("better than T3D", "TABOM", "T3D", "in", 1),
    ("better than dParallel", "TABOM", "dParallel", "in", 1),
    ("Eq. 8 better than the exact KL of Eq. 6", "TABOM", "TABOM, kl", "in", 1),
    ("several right answers: over SFT-SD", "TABOM", "SFT-SD", SEVERAL, 1),
    ("several right answers, 2 a step: over SFT-SD", "TABOM", "SFT-SD", f"{SEVERAL}-2", 1),
)
# Why naive TD leads: (row, row that it is compared with).
LEAD = (("naive TD", "SFT-SD"), ("naive TD", "TABOM, no ranking"), ("naive TD's weights", "TABOM, no ranking"))
LEAD += (("naive TD's weights", "naive TD"), ("any reach", "TABOM, no ranking"), ("any reach", "naive TD"))


# ---------------------------------------------------------------------------------------- measures


def unpack(packed):
    """The verdicts that claims.pack() packed, as a bool array."""
    count, text = packed
    return np.unpackbits(np.frombuffer(base64.b64decode(text), np.uint8))[:count].astype(bool)


def measure(run, name):
    """A measure of a run after its last epoch: accuracies in percent, TDS in nats squared, KL in nats. None where the
    run was not tested so."""
    return of_epoch(run["epochs"][-1], name)


def of_epoch(tested, name, like=None):
    """The same of one of its epochs; like: another epoch, whose puzzles alone count where it was tested on fewer."""
    if name == "elsewhere":
        return statistics.fmean(of_epoch(tested, where, like) for where in ("near", "far"))
    if name == "kl":
        return statistics.fmean(tested["kl"].values())
    if name in FINE:
        return tested["order"][name]
    if name not in tested["right"]:
        return None
    count = like["right"][name][0] if like else None
    return 100 * float(unpack(tested["right"][name])[:count].mean())


def key_of(row, rate, name="in"):
    """Under which name a base model has the run of a row at a rate that has this measure: see claims.key_of."""
    return " ".join([row, *[rate] * (row != "base"), *[SEVERAL] * name.startswith(SEVERAL)])


def each(bases, of_base):
    """What a function says of each base model, where it says something -> what stats.interval and stats.paired take."""
    found = {}
    for number, base in bases.items():
        value = of_base(base)
        if value is not None:
            found[number, 0] = value
    return found


def values_of(bases, row, rate, name):
    """A measure of a row on all base models that have the run."""
    key = key_of(row, rate, name)
    return each(bases, lambda base: measure(base["runs"][key], name) if key in base["runs"] else None)


def difference(bases, row, other, rate, name):
    """A row less another at the same rate, paired over base models: see stats.paired. None where none has both."""
    return stats.paired(values_of(bases, row, rate, name), values_of(bases, other, rate, name))


def rows_of(bases):
    """The (row, rate) that have runs in-domain, in order of the rates and then as claims.py makes them."""
    found = {}
    for base in bases.values():
        for key in base["runs"]:
            row, _, rate = key.rpartition(" ")
            if row and rate != SEVERAL:
                found[row, rate] = float(rate)
    return sorted(found, key=found.get)


# ------------------------------------------------------------------------- gain and loss


def points_of(base, row, rates=FRONTIER_RATES, loss="elsewhere"):
    """Gain in-domain and loss elsewhere of a row on one base model: {(rate, epoch): (gain, loss)}, of the rates that it
    has. Each epoch is compared with the base model on the puzzles that it was tested on. loss: "elsewhere", points, or
    "kl", nats."""
    before, found = base["runs"]["base"]["epochs"][-1], {}
    for rate in rates:
        run = base["runs"].get(key_of(row, rate), dict(epochs=[]))
        for epoch, tested in enumerate(run["epochs"], 1):
            gain, change = (of_epoch(tested, name) - of_epoch(before, name, like=tested) for name in ("in", loss))
            found[rate, epoch] = gain, change if loss == "kl" else -change
    return found


def loss_at(points, gain):
    """The loss on a frontier at a gain: points of equal gain are one, the lines between neighbours are straight, and
    (0, 0) is one of the points."""
    x, y = np.round([(0.0, 0.0), *points], 9).T  # equal shares of 500 and of 1,500 puzzles are equal
    xs, which = np.unique(x, return_inverse=True)
    return float(np.interp(round(gain, 9), xs, np.bincount(which, y) / np.bincount(which)))


def loss_at_equal_gain(bases, row, other, loss="elsewhere"):
    """The loss of a row less that of another, on each base model at the smaller of the two rows' largest gains -> as of
    stats.paired, and the names of the base models on which that gain is not above 0."""
    ours, theirs, without = {}, {}, []
    for number, base in bases.items():
        of_row, of_other = points_of(base, row, loss=loss), points_of(base, other, loss=loss)
        if len(of_row) == len(of_other) == EPOCHS * len(FRONTIER_RATES):
            gain = min(max(of_row.values())[0], max(of_other.values())[0])
            if gain > 0:
                ours[number, 0], theirs[number, 0] = loss_at(of_row.values(), gain), loss_at(of_other.values(), gain)
            else:
                without.append(f"base-{number}")
    return stats.paired(ours, theirs), ", ".join(without) or "none"


# ------------------------------------------------------------------------------------------ verdicts


def needed(number):
    """The runs of the primary measures on a base model, those that P1 may have to be read from among them."""
    rates = (*FRONTIER_RATES, *[LOW_RATE] * (number % 2))
    return set(itertools.starmap(key_of, itertools.product(PRIMARY, rates)))


def looked_at(bases):
    """The base models that the last look has: base-1 to base-12, or to base-24; before these are complete, none. They
    are without the runs that are still being made, each of whose tables would be one more look."""
    ready = set(filter(lambda number: needed(number) <= bases[number]["runs"].keys(), bases))
    for look in sorted(LOOKS, reverse=True):
        numbers = range(1, look + 1)
        if ready.issuperset(numbers):
            found, hidden = dict(zip(numbers, map(bases.get, numbers))), being_made(bases, look)
            for number, base in found.items():
                runs = filter(lambda run: run[0] not in hidden, base["runs"].items())
                found[number] = dict(base, runs=dict(runs))
            return found
    return {}


def being_made(bases, look):
    """The runs that are not on all base models of a look that get them, {name: how many have it}. A row is made on all
    odd ones, or on all."""
    made, odd = {}, range(1, look + 1, 2)
    for number in filter(lambda number: 1 <= number <= look, bases):
        for key in bases[number]["runs"]:
            made.setdefault(key, set()).add(number)
    return {key: len(on) for key, on in made.items() if on not in (set(odd), set(range(1, look + 1)))}


def verdict(found, name, sign=1):
    """What a difference says of a claim whose sign it should have."""
    if found is None or found["low"] is None:
        return "not measured"
    if len(found["bases"]) < FEWEST:
        return "not resolved"
    low, high = sorted((sign * found["low"], sign * found["high"]))
    if low > 0:
        return "confirmed"
    if high < 0:
        return "contradicted"
    return "not seen" if max(-low, high) <= (SMALL_FINE if name in FINE else SMALL) else "not resolved"


def runs_of(difference):
    """A difference as values once more, to take its interval at another level or a difference of differences."""
    return dict(zip(itertools.product(difference["bases"], [0]), difference["bases"].values()))


def rate_of_p1(bases):
    """The rate of P1: RATE where both rows lose at most LOST points, else LOW_RATE; and what they lose."""
    lost = [difference(bases, row, "base", RATE, "elsewhere")["mean"] for row in PRIMARY]
    rate, said = (RATE, "valid") if min(lost) >= -LOST else (LOW_RATE, "not valid there")
    return rate, f"{PRIMARY[0]} {lost[0]:+.1f}, {PRIMARY[1]} {lost[1]:+.1f}: {said}"


def primary(bases):
    """The two primary measures at a look: [(name, difference with its interval at its level, level, verdict, note)].
    Holm: the smaller p has half of the look's level, the other, if that holds, all of it."""
    rate, told = rate_of_p1(bases)
    first = difference(bases, *PRIMARY, rate, "in")
    second, without = loss_at_equal_gain(bases, *PRIMARY)
    notes = [f"rate {rate}; (near + far) / 2 at {RATE}: {told}", f"left out, without a gain: {without}"]
    level, found = LOOKS[len(bases)], [first, second]
    p = [one["p"] if one and one["p"] is not None else 1.0 for one in found]
    levels = [level / 2, level / 2]
    if min(p) < level / 2:
        levels[p.index(max(p))] = level
    names, lines = ("P1: TABOM - SFT-SD, in-domain", "P2: loss of TABOM - SFT-SD at equal gain"), []
    for name, one, at, note in zip(names, found, levels, notes):
        if one is not None:
            one = {**stats.interval(runs_of(one), 1 - at), "p": one["p"]}
        lines.append((name, one, at, verdict(one, "in", 1 if name.startswith("P1") else -1), note))
    return lines


# ------------------------------------------------------------------------------------------ tables


def shown(value, name="in", sign="+", each=False):
    """A mean with its interval, "-" for None. each: also the value on each base model."""
    if value is None:
        return "-"
    digits = 3 if name in FINE else 1
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
    looked = looked_at(bases)
    sections = [("The base models", bases_table(bases))]
    if looked:
        for look in LOOKS:
            if look <= len(looked):
                title = f"The primary measures: the look at {look} base models"
                sections.append((title, primary_table(dict(list(looked.items())[:look]))))
        hidden = ", ".join(f"{key} ({count})" for key, count in being_made(bases, len(looked)).items())
        sections += [
            ("Not shown until all of these base models have it (how many do)", hidden or "none"),
            ("The paper's claims, by learning rate", f"{LIMIT}\n\n{claims_table(looked)}"),
            ("All rows, after the last epoch", rows_table(looked)),
            ("TABOM - SFT-SD by learning rate, on the odd base models", rates_table(looked)),
            ("Loss at equal gain", equal_gain_table(looked)),
            ("Gain and loss of each epoch", epochs_table(looked)),
            ("The best epoch on the test puzzles, against the last", best_table(looked)),
            ("Why naive TD leads", lead_table(looked)),
        ]
    else:
        sections.append(("Rows", f"Differences are shown at {' and '.join(map(str, LOOKS))} base models."))
    return "\n\n".join(f"### {title}\n\n{content}" for title, content in sections)


def bases_table(bases):
    """What each base model solves before training, and what there was to train on."""
    lines = []
    for number, base in sorted(bases.items()):
        runs, steps = base["runs"], set()
        tried = ", ".join(f"seed {seed}: {100 * share:.1f}" for seed, share in base["tried"])
        right = [cell(measure(runs["base"], name)) for name in ("in", "near", "far", "in-2")]
        right.append(cell(measure(runs.get(f"base {SEVERAL}", runs["base"]), SEVERAL)))
        for run in runs.values():
            steps.add(run.get("steps", 0))
        kept, early = base["kept in"], 100 * base["early EOS in"]
        cells = [f"{kept[0]} of {kept[1]}", f"{early:.0f}", f"{max(steps)}", f"{len(runs)}", f"{base['minutes']:.0f}"]
        lines.append([f"base-{number}", tried, *right, *cells])
    columns = ["model", "validation %", "in-domain %", "near %", "far %", "2 a step %", "several %"]
    columns += ["kept to train on", "EOS among the first 8 %", "steps", "runs", "minutes"]
    return markdown_table(columns, lines)


def cell(value):
    return "-" if value is None else f"{value:.1f}"


def primary_table(bases):
    lines = []
    for name, found, level, said, note in primary(bases):
        p = "-" if found is None or found["p"] is None else f"{found['p']:.4f}"
        lines.append([name, said, shown(found, each=True), p, f"{level:.4f}", note])
    kl, _ = loss_at_equal_gain(bases, *PRIMARY, loss="kl")
    lines.append(["beside P2: KL to the base model", "-", shown(kl, "kl", each=True), "-", "0.05", "describes"])
    return markdown_table(["measure", "verdict", "value (each base model)", "p", "level", "note"], lines)


def rates_of(bases):
    return list(dict(map(reversed, rows_of(bases))))


def claims_table(bases):
    rates, lines, p1 = rates_of(bases), [], (*PRIMARY, "in", rate_of_p1(bases)[0])
    for claim, row, other, name, sign in CLAIMS:
        cells = []
        for rate in rates:
            one = difference(bases, row, other, rate, name)
            told = "-" if one is None else f"{verdict(one, name, sign)}: {counted(one, name, len(bases))}"
            cells.append(f"(P1) {shown(one)}" if (row, other, name, rate) == p1 else told)
        lines.append([claim, f"{row} - {other}, {TITLES[name]}", *cells])
    return markdown_table(["claim", "difference", *rates], lines)


def rows_table(bases):
    """Every row at every rate: gains over the base model, differences to SFT-SD, and what else changed."""
    lines, names = [], ("in", "near", "far", "in-2", "kl", "tds", "correlation")
    for row, rate in rows_of(bases):
        count = len(values_of(bases, row, rate, "in"))
        cells = [counted(difference(bases, row, "base", rate, name), name, count) for name in names]
        against = "-" if row == "SFT-SD" else shown(difference(bases, row, "SFT-SD", rate, "in"))
        lines.append([row, rate, str(count), cells[0], against, *cells[1:]])
    titles = [f"{TITLES[name]} - base" for name in names]
    return markdown_table(["row", "rate", "base models", titles[0], "in-domain - SFT-SD", *titles[1:]], lines)


def odd(bases):
    """The base models that have all learning rates."""
    return {number: base for number, base in bases.items() if number % 2}


def rates_table(bases):
    lines = []
    for rate in rates_of(bases):
        lines.append([rate, shown(difference(odd(bases), *PRIMARY, rate, "in"), each=True)])
    low, high = (runs_of(difference(bases, *PRIMARY, rate, "in")) for rate in FRONTIER_RATES)
    change = stats.paired(high, low)
    lines.append([f"{FRONTIER_RATES[1]} less {FRONTIER_RATES[0]}, all base models", shown(change, each=True)])
    return markdown_table(["rate", "in-domain"], lines)


def equal_gain_table(bases):
    """Losses at equal gain of pairs of rows, points and KL: the pairs beside that of P2."""
    pairs = [("TABOM, no ranking", "SFT-SD"), ("naive TD", "SFT-SD"), ("TABOM", "naive TD")]
    pairs += [("TABOM", "TABOM, no ranking")]
    lines = []
    for row, other in pairs:
        points, without = loss_at_equal_gain(bases, row, other)
        kl, _ = loss_at_equal_gain(bases, row, other, "kl")
        cells = [shown(points), shown(kl, "kl"), str(len(points["bases"]) if points else 0)]
        lines.append([f"{row} - {other}", *cells, without])
    return markdown_table(["rows", "loss, points", "KL, nats", "base models", "left out, without a gain"], lines)


def frontier(bases):
    """Gain and loss of each row, rate and epoch, means over base models with standard errors: what plots.draw_frontier
    draws."""
    found = []
    for row, rate in rows_of(bases):
        for epoch in range(1, 1 + EPOCHS):
            points = each(bases, lambda base: points_of(base, row, (rate,)).get((rate, epoch)))  # noqa: B023
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
    for row, rate in rows_of(bases):
        found = each(bases, lambda base: verdicts_of(base, key_of(row, rate)))  # noqa: B023
        last, honest, same = {}, {}, []
        for at, right in found.items():  # [E, Q]
            report = epochs.report(dict(enumerate(right, 1)), seed=at[0])
            last[at] = report["best"]["score"] - report["last"]["score"]
            honest[at] = report["best"]["score"] - report["honest"]["score"]
            same.append(np.corrcoef(right)[np.triu_indices(EPOCHS, 1)].mean())
        accuracy, correlation = np.mean(list(found.values())), max(float(np.nan_to_num(same).mean()), 0.0)
        cells = [row, rate, str(right.shape[1]), str(len(found)), *map(shown, map(stats.interval, (last, honest)))]
        for questions in QUESTIONS:
            cells.append(f"{epochs.simulate(EPOCHS, questions, accuracy, correlation, 5000)['best']:+.2f}")
        lines.append([*cells, f"{correlation:.2f}"])
    titles = ["row", "rate", "puzzles", "base models", "best - last", "best - chosen on others"]
    return markdown_table([*titles, *map("equally good, {}".format, QUESTIONS), "correlation of epochs"], lines)


def verdicts_of(base, key):
    """The verdicts of a run's epochs on the in-domain puzzles that all were tested on, bool [E, Q]; None without it."""
    if key not in base["runs"]:
        return None
    found = [unpack(one["right"]["in"]) for one in base["runs"][key]["epochs"]]
    return np.stack([right[: min(map(len, found))] for right in found])


def lead_table(bases):
    """What is between naive TD and TABOM, and how much of each loss the last decode steps have."""
    lines, steps = [], tiny.SHORT.answer
    for row, other in LEAD:
        cells = [counted(difference(bases, row, other, rate, "in")) for rate in FRONTIER_RATES]
        lines.append([f"{row} - {other}", *cells])
    shares = {"SFT-SD": torch.full((steps,), 1 / steps), "TABOM": reach.weights_of_window(steps, reach.WINDOW)}
    shares |= {"naive TD, naive TD's weights": reach.weights_of_traj(steps), "any reach": reach.weights_of_reach(steps)}
    told = [f"{row} {100 * weights[-LAST:].sum():.0f} %" for row, weights in shares.items()]
    differences = markdown_table(["in-domain", *FRONTIER_RATES], lines)
    return f"Share of the last {LAST} of {steps} decode steps in the loss: {', '.join(told)}.\n\n{differences}"


# ---------------------------------------------------------------------------------------- a folder


def write_report(folder):
    """Make the tables and pictures of a folder from its base models, and print the tables -> where they are."""
    bases, folder = read(folder), Path(folder)
    looked, tables = looked_at(bases), markdown(bases)
    with disk.atomic_file(folder / "tables.md") as f:
        f.write(tables + "\n")
    if looked:
        points = [point for point in frontier(looked) if point["rate"] in FRONTIER_RATES]
        single = []
        for row, base in itertools.product(PRIMARY, looked.values()):
            single += zip(itertools.repeat(row), *zip(*points_of(base, row).values()))
        plots.save(plots.draw_frontier(points, single), folder / "frontier.png")
        plots.save(plots.draw_tds(tds_curves(looked), ["base", *PRIMARY[::-1]]), folder / "tds.png")
    print(tables)
    return dict(results=str(folder), bases=len(bases), looked_at=len(looked))


def tds_curves(bases):
    """TDS at each step of the base model and of the primary rows: what plots.draw_tds draws."""
    found = []
    for row in ("base", *PRIMARY[::-1]):
        curves = [base["runs"][key_of(row, RATE)]["epochs"][-1]["order"]["per_step"] for base in bases.values()]
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
        if not {"number", "tried", "runs"} <= base.keys() or not base["runs"].get("base", {}).get("epochs"):
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
