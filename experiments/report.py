"""Tables, intervals and pictures of the runs of claims.py, all computed from the stored runs.

    report.write_report(folder, found, losses, grid, about)    # found: (row, base model, seed) -> result
    python -m experiments.report experiments/results    # tables and pictures of a folder, again

    results.json     how the experiment was run, and every run with its scores
    tables.md        the tables, in the shape of the paper's
    *.png, *.pdf     TDS over steps (Figure 2), loss over mask ratio (Figure 3), accuracy over
                     training

The unit of the statistics is the base model: the runs on one of them share its weights,
trajectories and test puzzles, so their mean is one value.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import NamedTuple

import data
import runs
from experiments import plots, stats, sweep
from experiments.stats import markdown_table

COMPARED = ("base", "SFT-SD", "TABOM")  # what differences are taken to
SUBSETS = {  # of the base models, by number, for the primary measure
    "all": range(99),
    "without base-0, on which the settings were chosen": range(1, 99),
    "base-3 and later, which had no part in going on": range(3, 99),
}
DERIVED = ("name", "checkpoints", "foreign")  # keys of a run that say again what others say
DIGITS = 8  # significant ones of a stored number: enough for every p of the tables


class Results(NamedTuple):
    """An experiment, as results.json holds it."""

    found: dict  # (row, base model, seed) -> the result of a run; seed is None before training
    losses: list  # rows of the cross-entropy over the mask ratio
    grid: list  # the names of the rows of Table 9


# ---------------------------------------------------------------------------------------- measures

SOLVED = ("in-domain %", "out-of-domain %")
SOLVED_TWO = (
    "in-domain, 2 a step %",
    "in-domain, lost with 2 a step",
    "out-of-domain, 2 a step %",
    "out-of-domain, lost with 2 a step",
)
STYLES = (
    "in-domain, in foreign style %",
    "out-of-domain, in foreign style %",
    "out-of-domain, right of those in own style %",
)
NATS = ("TDS", "ranking loss", "ranking loss above its least")
# Of the order; None for a model that says nothing before its EOS.
ORDER = (*NATS, "inversions, own step %", "inversions, window %")


def measures(result):
    """Every measure of a run -> {label: value}; a value may be None.

    The ranking loss above its least is the part that the order decides: the entropies alone leave
    the rest."""
    inside, outside = scores_of(result, "test_in"), scores_of(result, "test_out")
    inside_two, outside_two = scores_of(result, "test_in", 2), scores_of(result, "test_out", 2)
    styles = result["styles"]
    ranking, least = inside["ranking"], inside.get("ranking_least")
    above = None
    if ranking is not None and least is not None:
        above = ranking - least
    return {
        "in-domain %": 100 * inside["accuracy"],
        "out-of-domain %": 100 * outside["accuracy"],
        "in-domain, 2 a step %": 100 * inside_two["accuracy"],
        "out-of-domain, 2 a step %": 100 * outside_two["accuracy"],
        "in-domain, lost with 2 a step": 100 * (inside["accuracy"] - inside_two["accuracy"]),
        "out-of-domain, lost with 2 a step": 100 * (outside["accuracy"] - outside_two["accuracy"]),
        "in-domain, in foreign style %": percent(styles["test_in"]["foreign"]),
        "out-of-domain, in foreign style %": percent(styles["test_out"]["foreign"]),
        "out-of-domain, right of those in own style %": percent(styles["test_out"]["own_right"]),
        "validation %": 100 * result["chosen"]["accuracy"],
        "TDS": inside["tds"],
        "ranking loss": ranking,
        "ranking loss above its least": above,
        "inversions, own step %": percent(inside["inversions_step"]),
        "inversions, window %": percent(inside["inversions_window"]),
    }


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
    return sorted({key[1] for key in keys if row in (None, key[0])})


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


def primary(values):
    """TABOM - SFT-SD in-domain over those subsets of the base models that have both."""
    ours, theirs = values_of(values, "TABOM", "in-domain %"), values_of(values, "SFT-SD", "in-domain %")
    differences = {}
    for name, numbers in SUBSETS.items():
        chosen = {}
        for (base, seed), value in ours.items():
            if int(base.rpartition("-")[2]) in numbers:
                chosen[base, seed] = value
        difference = stats.paired(chosen, theirs)
        if difference is not None:
            differences[name] = difference
    return differences


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


def markdown(found, losses=(), grid=()):
    """All tables. An interval is 95 %, Student's t over the base models, p that of the paired test.
    A difference is over the runs that both rows have; the differences on each base model stand
    behind it."""
    values = measured(found)
    rows, bases = summarise(values), bases_of(values)
    main, parts = [], []
    for name in rows:
        if not name.startswith("TABOM,"):
            main.append(name)
        elif name not in grid:
            parts.append(name)
    sections = [
        ("The base models", setup_table(found, values)),
        ("The primary measure: in-domain %, TABOM - SFT-SD", primary_table(values)),
        *comparisons("Main results (Tables 2 and 3)", rows, main, SOLVED, bases),
        *comparisons("Two tokens a step (Table 4)", rows, main, SOLVED_TWO, bases),
        *comparisons("Window and terms (Tables 5 to 7)", rows, ["TABOM", *parts], SOLVED, bases),
        *grid_comparisons("Window, margin and weight (Table 9)", values, grid),
        *comparisons("Style of the answers", rows, [*main, *parts], STYLES, bases),
        *comparisons("Order", rows, [*main, *parts], ORDER, bases),
        ("Cross-entropy of the base models (Figure 3)", loss_table(losses)),
        ("What goes with in-domain accuracy", relation_table(values)),
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
            cells = [base, result["seed"], *right, result["puzzles"], result["kept"]]
            cells.append(", ".join(map(str, sorted(steps.get(base, "-")))))
            lines.append(list(map(str, cells)))
    columns = ["model", "seed", *SOLVED, "puzzles distilled", "trajectories kept"]
    return markdown_table([*columns, "optimizer steps of a run"], lines)


def primary_table(values):
    lines = []
    for name, value in primary(values).items():
        lines.append([name, shown(value, 1, "+")])
    return markdown_table(["base models", "difference"], lines)


def comparisons(title, rows, names, labels, bases):
    """A section with a table for each measure: (its title, its table)."""
    sections = []
    for label in labels:
        sections.append((f"{title}: {label}", comparison(rows, names, label, bases)))
    return sections


def grid_comparisons(title, values, grid):
    """The sections of the rows of a grid, on the base models that have all of them; none without a
    grid."""
    names, bases = [], set(bases_of(values))
    for name in names_of(values):
        if name in grid:
            names.append(name)
            bases &= set(bases_of(values, name))
    if not names:
        return []
    chosen = {}
    for key, of_run in values.items():
        if key[1] in bases and key[0] in (*COMPARED, *names):
            chosen[key] = of_run
    return comparisons(title, summarise(chosen), ["TABOM", *names], SOLVED, sorted(bases))


def comparison(rows, names, label, bases):
    """One measure of some rows, by base model too, and its differences to the rows in COMPARED.
    Empty for fewer than two rows."""
    names = [name for name in names if name in rows]
    if len(names) < 2:
        return ""
    digits, lines = (3 if label in NATS else 1), []
    for name in names:
        row = rows[name]
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
        text += f", p {value['p']:.3f} ({each})"
    return text


def loss_table(losses):
    """The mean over the base models and its standard error."""
    ratios, lines = {}, {}  # both keep the order of the rows
    for r in losses:
        ratios[f"mask ratio {r['mask_ratio']}"] = None
        text = f"{r['loss']:.4f}"
        if r["loss_se"] is not None:
            text += f" ± {r['loss_se']:.4f}"
        lines.setdefault(r["data"], [r["data"]]).append(text)
    if not lines:
        return ""
    return markdown_table(["nats", *ratios], lines.values())


def relation_table(values):
    lines = []
    for label in ORDER:
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


def accuracy_curves(found, names):
    """What accuracy on the validation puzzles gains over the base model with each epoch, in points,
    with the first seed: the mean over the base models that every row has."""
    shared = set(bases_of(found))
    for name in names:
        shared &= set(bases_of(found, name))
    gains = {}  # (row, epoch) -> one for each base model
    for (row, base, _), result in found.items():
        if row in names and base in shared and "curve" in result:
            before = found["base", base, None]["chosen"]["accuracy"]
            for epoch, accuracy in enumerate([before, *result["curve"]]):
                gains.setdefault((row, epoch), []).append(100 * (accuracy - before))
    rows = []
    for (row, epoch), values in gains.items():
        rows.append(dict(model=row, epoch=epoch, base_models=len(values), **stats.mean_and_error("gain", values)))
    return rows


# ---------------------------------------------------------------------------------------- a folder


def write_report(folder, found, losses, grid, about):
    """Write results.json, the tables and the pictures, and print the tables. losses: rows of the
    cross-entropy over the mask ratio. grid: the names of the rows of Table 9. about: what else
    results.json says of the experiment."""
    folder.mkdir(exist_ok=True)
    head = dict(**about, versions=runs.versions(), grid=list(grid), losses=losses)
    lines = []
    for result in found.values():
        kept = dict(result)
        for name in DERIVED:
            kept.pop(name, None)
        lines.append(json.dumps(rounded(kept)))
    start = json.dumps(rounded(head), indent=1).removesuffix("\n}")
    with runs.atomic_file(folder / "results.json") as f:
        f.write(start + ',\n "runs": [\n' + ",\n".join(lines) + "\n ]\n}\n")  # a line for each run
    remake(folder)


def remake(folder):
    """Make the tables and pictures of a folder from its results.json, and print the tables."""
    folder = Path(folder)
    results = read(folder)
    tables = markdown(*results)
    with runs.atomic_file(folder / "tables.md") as f:
        f.write(tables + "\n")
    names = names_of(results.found, without=results.grid)
    plots.save(plots.draw_tds(tds_curves(results.found, names), names), folder / "tds.png")
    plots.save(plots.draw_loss(results.losses), folder / "loss.png")
    plots.save(plots.draw_gain(accuracy_curves(results.found, names), names), folder / "accuracy.png")
    print(tables)


def read(folder):
    """The Results of a folder. Raises FileNotFoundError, or ValueError for a file that is something
    else."""
    file = Path(folder) / "results.json"
    if not file.is_file():
        raise FileNotFoundError(f"no results.json in {folder}: give the results folder of an experiment of claims")
    saved = data.read_json(file)
    found = {}
    for result in map(sweep.upgraded, saved.get("runs", [{}])):
        if not {"row", "base", "settings"} <= result.keys():
            raise ValueError(f"{file}: these are not the results of an experiment of claims")
        found[result["row"], result["base"], result["settings"].get("seed")] = result
    return Results(found, saved.get("losses", []), saved.get("grid", []))


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
