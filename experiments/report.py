"""Tables, intervals and pictures of the runs of claims.py, all computed from the stored runs.

    report.write_report(folder, found, about)           # found: (row, base model, seed) -> result
    python -m experiments.report experiments/results    # tables and pictures of a folder, again

    results.json     how the experiment was run, and every run with its scores
    tables.md        the paper's claims with verdicts, and a table for every measure
    *.png, *.pdf     accuracy: every row's difference to SFT-SD; order: accuracy against how far the decode
                     order moved; tds: TDS over steps (Figure 2)

The unit of the statistics is the base model: the runs on one of them share its weights,
trajectories and test puzzles, so their mean is one value.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import NamedTuple

import data
from experiments import plots, stats, sweep
from experiments.stats import markdown_table
from runs import disk

COMPARED = ("base", "SFT-SD", "TABOM")  # what differences are taken to
DERIVED = ("name", "checkpoints")  # keys of a run that say again what others say
DIGITS = 6  # significant ones of a stored number: enough for every digit of the tables
DOMAINS = ("in", "near", "far")
TITLES = dict(zip(DOMAINS, ("in-domain", "near", "far")))


class Results(NamedTuple):
    """An experiment, as results.json holds it."""

    found: dict  # (row, base model, seed) -> the result of a run; seed is None before training
    tried: dict  # row -> {rate: share of base-0's validation puzzles}


# ---------------------------------------------------------------------------------------- measures

SOLVED = ("in-domain %", "near %", "far %")
TWO = (
    "in-domain, 2 a step %",
    "near, 2 a step %",
    "far, 2 a step %",
    "in-domain, lost with 2 a step",
)
ANSWERS = (
    "in-domain, ends in the right place %",
    "in-domain, in foreign style %",
    "near, in foreign style %",
    "far, in foreign style %",
)
NATS = ("TDS", "TDS, final EOS", "ranking loss", "ranking loss above its least")
# Of the order; None for a model that says nothing before its EOS.
ORDER = (*NATS, "pairs out of order, own step %", "pairs out of order, window %")
CHANGED = ("KL of Eq. 6, 1e-3 nats", "entropy at its own step", "rank correlation with the base")
IN_NATS = (*NATS, *CHANGED)  # have three digits


def measures(result):
    """Every measure of a run -> {label: value}; a value may be None.

    The ranking loss above its least is the part that the order decides: the entropies alone leave
    the rest."""
    found, inside = {}, scores_of(result, "test_in")
    for name, title in TITLES.items():
        one, two = scores_of(result, f"test_{name}"), scores_of(result, f"test_{name}", 2)
        found[f"{title} %"] = 100 * one["accuracy"]
        found[f"{title}, 2 a step %"] = 100 * two["accuracy"]
        found[f"{title}, lost with 2 a step"] = 100 * (one["accuracy"] - two["accuracy"])
        found[f"{title}, ends in the right place %"] = 100 * result["answers"][name]["ends_right"]
        found[f"{title}, in foreign style %"] = 100 * result["answers"][name]["foreign"]
    ranking, least = inside["ranking"], inside["ranking_least"]
    above = None
    if ranking is not None and least is not None:
        above = ranking - least
    changed = result["mechanism"]
    found.update(zip(NATS, (inside["tds"], inside["tds_final"], ranking, above)))
    found["pairs out of order, own step %"] = percent(inside["inversions_step"])
    found["pairs out of order, window %"] = percent(inside["inversions_window"])
    return found | dict(zip(CHANGED, (1000 * changed["kl"], changed["entropy"], changed["correlation"])))


def scores_of(result, name, tokens_per_step=1):
    """The scores of a run on the test set of that stem. Raises KeyError if it was not tested so."""
    for one in result["tests"]:
        if sweep.source_name(one["source"]) == name and one["tokens_per_step"] == tokens_per_step:
            return one["scores"]
    raise KeyError(f"{name} with {tokens_per_step} tokens per step")


def percent(share):
    return None if share is None else 100 * share


def measured(found):
    """The measures of all runs: (row, base model, seed) -> {label: value}"""
    return dict(zip(found, map(measures, found.values())))


def values_of(values, row, label):
    """One measure of one row -> {(base, seed): value}. values: of measured()."""
    return {key[1:]: of_run[label] for key, of_run in values.items() if key[0] == row}


def bases_of(keys, row=None):
    """The base models that a row has runs on, or any row."""
    names = {key[1] for key in keys if row in (None, key[0])}
    return sorted(names, key=lambda name: int(name.rpartition("-")[2]))


def names_of(keys, without=()):
    """The rows that have runs, in their order."""
    names = []
    for row, _, _ in keys:
        if row not in names and row not in without:
            names.append(row)
    return names


# ------------------------------------------------------------------------------ rows and relations


def summarise(values):
    """Row -> its number of runs, its measures with intervals over the base models, and its
    differences to the rows in COMPARED, by their names. values: of measured()."""
    rows = {}
    for name in names_of(values):
        row = dict(measures={}, differences={})
        for label in next(iter(values.values())):
            ours = values_of(values, name, label)
            row["runs"] = len(ours)
            row["measures"][label] = stats.interval(ours)
            for other in COMPARED:
                if other != name:
                    difference = stats.paired(ours, values_of(values, other, label))
                    row["differences"].setdefault(other, {})[label] = difference
        rows[name] = row
    return rows


# What the paper claims: (claim, row, row that it is compared with, measure, sign that confirms it). The first is
# the primary measure.
CLAIMS = (
    ("gains in-domain over SFT-SD (primary)", "TABOM", "SFT-SD", "in-domain %", 1),
    ("gains in-domain over the base model", "TABOM", "base", "in-domain %", 1),
    ("SFT on ground truth loses in-domain", "SFT-GT", "base", "in-domain %", -1),
    ("SFT on ground truth forgets, near", "SFT-GT", "base", "near %", -1),
    ("SFT on ground truth forgets, far", "SFT-GT", "base", "far %", -1),
    ("transfers, near: over the base model", "TABOM", "base", "near %", 1),
    ("transfers, far: over the base model", "TABOM", "base", "far %", 1),
    ("higher TDS than the base model", "TABOM", "base", "TDS", 1),
    ("higher TDS than SFT-SD", "TABOM", "SFT-SD", "TDS", 1),
    ("better than SFT-SD with two tokens a step", "TABOM", "SFT-SD", "in-domain, 2 a step %", 1),
    ("trajectory masking gains over SFT-SD", "TABOM, no ranking", "SFT-SD", "in-domain %", 1),
    ("ranking is needed", "TABOM", "TABOM, no ranking", "in-domain %", 1),
    ("local window better than global", "TABOM", "TABOM, global window", "in-domain %", 1),
    ("better than naive trajectory distillation", "TABOM", "naive TD", "in-domain %", 1),
    ("better than dInfer", "TABOM", "dInfer", "in-domain %", 1),
    ("better than T3D", "TABOM", "T3D", "in-domain %", 1),
    ("better than dParallel", "TABOM", "dParallel", "in-domain %", 1),
    ("Eq. 8 better than the exact Plackett-Luce loss", "TABOM", "TABOM, listwise", "in-domain %", 1),
    ("Eq. 8 better than the exact KL of Eq. 6", "TABOM", "TABOM, kl", "in-domain %", 1),
    ("the window's context better than each step's own", "TABOM", "TABOM, own step", "in-domain %", 1),
    ("padding kept better than cut", "TABOM", "TABOM, padding cut", "in-domain %", 1),
    (
        "ranking puts the tokens in order",
        "TABOM",
        "TABOM, no ranking",
        "ranking loss above its least",
        -1,
    ),
)
FIRST_LOOK = 6  # in results/, results were read with so many base models; those made later replicate (registered.md)
SMALL = 2.0  # points: an interval within this of zero shows that there is nothing to see
SMALL_NATS = 0.005
FEWEST = 3  # base models: two differences may agree by chance
NOT_HERE = "not on these puzzles"  # the interval is on the other side of zero, of a claim about language models
LIMIT = """\
The puzzles do not test the paper: its claims are about language models, and a model of 0.2 million parameters whose
answers have at most 25 characters is none. A verdict says what happened here."""


def verdict(difference, label, sign):
    """What a paired difference says of a claim whose sign it should have."""
    if difference is None or difference["low"] is None:
        return "not measured"
    if len(difference["bases"]) < FEWEST:
        return "not resolved"
    low, high = sorted((sign * difference["low"], sign * difference["high"]))
    if low > 0:
        return "confirmed"
    if high < 0:
        return NOT_HERE
    small = SMALL_NATS if label in IN_NATS else SMALL
    return "not seen" if max(-low, high) <= small else "not resolved"


def claims_table(values):
    lines = []
    for claim, row, other, label, sign in CLAIMS:
        difference = stats.paired(values_of(values, row, label), values_of(values, other, label))
        digits = 3 if label in IN_NATS else 1
        what = f"{row} - {other}, {label.removesuffix(' %')}"
        lines.append([claim, verdict(difference, label, sign), what, shown(difference, digits, "+")])
    return markdown_table(["claim", "verdict", "difference", "value"], lines)


def primary_table(values):
    """The primary measure on the base models of the first look, and on those that were made after it."""
    _, row, other, label, _ = CLAIMS[0]
    looks, lines = {}, []
    for (base, seed), value in values_of(values, row, label).items():
        later = int(base.rpartition("-")[2]) > FIRST_LOOK
        looks.setdefault(later, {})[base, seed] = value
    for later, ours in sorted(looks.items()):
        difference = stats.paired(ours, values_of(values, other, label))
        lines.append(["later ones" if later else f"base-1 to base-{FIRST_LOOK}", shown(difference, 1, "+")])
    if len(lines) < 2:
        return ""
    return markdown_table(["base models", f"{row} - {other}, {label}"], lines)


def relation(values, label):
    """How a measure goes with in-domain accuracy over the rows that train on trajectories and that
    every base model has: Pearson's correlation for each base model, over the means of the seeds ->
    their interval. Base models with fewer than three rows, or where nothing differs, are left
    out."""
    points = {}
    for row in names_of(values, without=("base", "SFT-GT")):
        if bases_of(values, row) != bases_of(values):
            continue
        right = stats.by_base(values_of(values, row, "in-domain %"))
        for base, value in stats.by_base(values_of(values, row, label)).items():
            points.setdefault(base, []).append((value, right[base]))
    relations = {}
    for base, pairs in sorted(points.items()):
        measured_here, right_here = zip(*pairs)
        if len(pairs) > 2 and differ(measured_here) and differ(right_here):
            relations[base, None] = stats.pearson(measured_here, right_here)
    return stats.interval(relations)


def differ(values):
    return max(values) - min(values) > 1e-9


# ------------------------------------------------------------------------------------------ tables


def markdown(found, tried):
    """All tables. An interval is 95 %, Student's t over the base models, p that of the paired test.
    A difference is over the runs that both rows have; the differences on each base model stand
    behind it."""
    values = measured(found)
    rows, bases = summarise(values), bases_of(values)
    sections = [
        ("The base models", setup_table(found, values)),
        ("The paper's claims", f"{LIMIT}\n\n{claims_table(values)}"),
        (f"The primary measure on base-1 to base-{FIRST_LOOK}, and on later base models", primary_table(values)),
        *comparisons("Accuracy", rows, SOLVED, bases),
        *comparisons("Two tokens a step", rows, TWO, bases),
        *comparisons("Answers", rows, ANSWERS, bases),
        *comparisons("Order", rows, ORDER, bases),
        *comparisons("Against the base model's decoding", rows, CHANGED, bases),
        ("Accuracy by how far the decode order moved", thirds_table(found)),
        ("What goes with in-domain accuracy", relation_table(values)),
        ("Learning rates", rates_table(tried)),
    ]
    return "\n\n".join(f"### {title}\n\n{content}" for title, content in sections if content)


def setup_table(found, values):
    """What each base model solves before training, and what there was to train on."""
    steps = {}  # of the runs on each base model
    for (_, base, _), result in found.items():
        if "steps" in result:
            steps.setdefault(base, set()).add(result["steps"])
    lines = []
    for key, result in found.items():
        row, base, _ = key
        if row == "base":
            right = [f"{values[key][label]:.1f}" for label in SOLVED]
            cells = [base, result["seed"], result["epochs"], *right, result["puzzles"], result["kept"]]
            cells += [f"{100 * result['early_eos']:.0f}", ", ".join(map(str, sorted(steps.get(base, "-"))))]
            lines.append(list(map(str, cells)))
    columns = ["model", "seed", "epochs", *SOLVED, "puzzles distilled", "trajectories kept", "EOS among the first W %"]
    return markdown_table([*columns, "optimizer steps of a run"], lines)


def thirds_table(found):
    """Accuracy of each row on the thirds of the test puzzles whose decode order moved most, between and
    least, and that of the base model on the same puzzles: means over all runs."""
    lines = []
    for name in names_of(found, without=("base",)):
        runs_of = [result["mechanism"]["thirds"] for key, result in found.items() if key[0] == name]
        cells = [name]
        for third in zip(*runs_of):
            correlation, right, before = (sum(column) / len(column) for column in zip(*third))
            cells.append(f"{correlation:.2f}: {100 * right:.1f} ({100 * (right - before):+.1f})")
        lines.append(cells)
    columns = ["rank correlation: in-domain % (- base)", "moved most", "between", "moved least"]
    return markdown_table(columns, lines)


def rates_table(tried):
    """What each row reached on base-0's validation puzzles with each rate, %."""
    if not tried:
        return ""
    rates, lines = list(dict.fromkeys(rate for shares in tried.values() for rate in shares)), []
    for name, shares in tried.items():
        cells = [f"{100 * shares[rate]:.1f}" if rate in shares else "-" for rate in rates]
        lines.append([name, *cells])
    return markdown_table(["row", *rates], lines)


def comparisons(title, rows, labels, bases):
    """A section with a table for each measure: (its title, its table)."""
    sections = []
    for label in labels:
        sections.append((f"{title}: {label}", comparison(rows, label, bases)))
    return sections


def comparison(rows, label, bases):
    """One measure of all rows, by base model too, and its differences to the rows in COMPARED."""
    digits, lines = (3 if label in IN_NATS else 1), []
    for name, row in rows.items():
        value, by_base = row["measures"][label], dict.fromkeys(bases, "-")
        if value is not None:
            for base, x in value["bases"].items():
                by_base[base] = f"{x:.{digits}f}"
        cells = [name, str(row["runs"]), shown(value, digits), " ".join(by_base.values())]
        for other in COMPARED:
            cells.append(shown(row["differences"].get(other, {}).get(label), digits, "+"))
        lines.append(cells)
    columns = ["row", "runs", label, "by base model"]
    for other in COMPARED:
        columns.append(f"- {other}")
    return markdown_table(columns, lines)


def shown(value, digits=1, sign=""):
    """A mean with its interval. A difference (it has a p) also shows its p, and the difference on
    each base model. The text for None is "-"."""
    if value is None:
        return "-"
    text = f"{value['mean']:{sign}.{digits}f}"
    if value["low"] is not None:
        text += f" [{value['low']:{sign}.{digits}f}, {value['high']:{sign}.{digits}f}]"
    if value.get("p") is not None:
        each = " ".join(f"{x:{sign}.{digits}f}" for x in value["bases"].values())
        p = "p < 0.001" if value["p"] < 0.001 else f"p {value['p']:.3f}"
        text += f", {p} ({each})"
    return text


def relation_table(values):
    lines = []
    for label in (*ORDER, *CHANGED):
        value, bases = relation(values, label), "-"
        if value is not None:
            bases = " ".join(f"{r:+.2f}" for r in value["bases"].values())
        lines.append([label, shown(value, 2, "+"), bases])
    return markdown_table(["measure", "r", "by base model"], lines)


# ------------------------------------------------------------------------------------------ curves


def tds_curves(found, names):
    """TDS at each step: the mean of the base models, each the mean of its runs, and its standard
    error."""
    rows = []
    for name in names:
        curves = {}
        for key, result in found.items():
            if key[0] == name:
                curves[key[1:]] = scores_of(result, "test_in")["per_step"]
        for t in range(max(map(len, curves.values()))):
            at_step = {}
            for key, curve in curves.items():
                if len(curve) > t:
                    at_step[key] = curve[t]
            means = list(stats.by_base(at_step).values())
            rows.append(dict(model=name, step=t, base_models=len(means), **stats.mean_and_error("tds", means)))
    return rows


def forest(rows):
    """In-domain, near and far accuracy of every row less that of SFT-SD: what plots.draw_differences draws."""
    found = []
    for name, row in rows.items():
        for label in SOLVED:
            difference = row["differences"].get("SFT-SD", {}).get(label)
            if difference is not None and difference["low"] is not None:
                found.append(dict(row=name, measure=label, **difference))
    return found


def scatter(values):
    """How far each run moved the decode order, and what it gained in-domain over its base model."""
    points = []
    for (row, base, _), of_run in values.items():
        if row != "base":
            gain = of_run["in-domain %"] - values["base", base, None]["in-domain %"]
            points.append(dict(row=row, x=of_run[CHANGED[-1]], y=gain))
    return points


# ---------------------------------------------------------------------------------------- a folder


def write_report(folder, found, about):
    """Write results.json, the tables and the pictures, and print the tables. about: what else
    results.json says of the experiment."""
    folder.mkdir(exist_ok=True)
    head = {**about, "versions": disk.versions()}
    lines = []
    for result in found.values():
        kept = dict(result)
        for name in DERIVED:
            kept.pop(name, None)
        lines.append(json.dumps(rounded(kept)))
    start = json.dumps(rounded(head), indent=1).removesuffix("\n}")
    with disk.atomic_file(folder / "results.json") as f:
        f.write(start + ',\n "runs": [\n' + ",\n".join(lines) + "\n ]\n}\n")  # a line for each run
    remake(folder)


def remake(folder):
    """Make the tables and pictures of a folder from its results.json, and print the tables."""
    folder = Path(folder)
    results = read(folder)
    tables = markdown(*results)
    with disk.atomic_file(folder / "tables.md") as f:
        f.write(tables + "\n")
    values, names = measured(results.found), names_of(results.found)
    plots.save(plots.draw_tds(tds_curves(results.found, names), names), folder / "tds.png")
    plots.save(plots.draw_differences(forest(summarise(values)), "SFT-SD"), folder / "accuracy.png")
    moved = "rank correlation of the decode order\nwith the base model's"
    gain = "in-domain gain over\nthe base model (points)"
    along = relation(values, CHANGED[-1])
    title = None
    if along is not None:
        title = f"r = {shown(along, 2, '+')} over the rows that train on\ntrajectories and that all base models have"
    plots.save(plots.draw_scatter(scatter(values), moved, gain, names, title), folder / "order.png")
    print(tables)


def read(folder):
    """The Results of a folder. Raises FileNotFoundError, or ValueError for a file that is something
    else."""
    file = Path(folder) / "results.json"
    if not file.is_file():
        raise FileNotFoundError(f"no results.json in {folder}: give the results folder of an experiment of claims")
    saved = data.read_json(file)
    found = {}
    for result in saved.get("runs", [{}]):
        if not {"row", "base", "settings", "mechanism"} <= result.keys():
            raise ValueError(f"{file}: these are not the results of an experiment of claims")
        found[result["row"], result["base"], result["settings"].get("seed")] = result
    return Results(found, saved.get("tried", {}))


def rounded(value):
    """A value of JSON with DIGITS significant digits in its numbers."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {name: rounded(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return list(map(rounded, value))
    return value


def main(argv=None):
    """Make tables and pictures again -> exit status."""
    parser = argparse.ArgumentParser(prog="python -m experiments.report", description=remake.__doc__)
    parser.add_argument("folder", help="a folder with a results.json of claims")
    folder = parser.parse_args(argv).folder
    try:
        remake(folder)
    except (ValueError, OSError, ImportError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    print(json.dumps(dict(out=folder)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
