"""Tables, intervals and pictures of the runs of claims.py.

    report.write(folder, found, losses, grid, about)    # found: (row, base model, seed) -> the result of a run

The unit of the statistics is the base model: the runs on one of them share its weights, trajectories and test puzzles,
so their mean is one value.
"""

import json

import runs
from experiments import plots, stats, sweep

COMPARED = ("base", "SFT-SD", "TABOM")  # what differences are taken to
SUBSETS = {  # of the base models, by number, for the primary measure
    "all": range(99),
    "without base-0, on which the settings were chosen": range(1, 99),
    "base-3 and later, which had no part in going on": range(3, 99),
}

# ----------------------------------------------------------------------------------------------------------- measures

MEASURES = {
    "in-domain %": lambda r: 100 * test(r, "test_in")["accuracy"],
    "out-of-domain %": lambda r: 100 * test(r, "test_out")["accuracy"],
    "in-domain, 2 a step %": lambda r: 100 * test(r, "test_in", 2)["accuracy"],
    "out-of-domain, 2 a step %": lambda r: 100 * test(r, "test_out", 2)["accuracy"],
    "in-domain, lost with 2 a step": lambda r: lost(r, "test_in"),
    "out-of-domain, lost with 2 a step": lambda r: lost(r, "test_out"),
    "in-domain, in foreign style %": lambda r: percent(r["styles"]["test_in"]["foreign"]),
    "out-of-domain, in foreign style %": lambda r: percent(r["styles"]["test_out"]["foreign"]),
    "out-of-domain, right of those in own style %": lambda r: percent(r["styles"]["test_out"]["own_right"]),
    "validation %": lambda r: 100 * r["chosen"]["accuracy"],
    "TDS": lambda r: test(r, "test_in")["tds"],
    "ranking loss": lambda r: test(r, "test_in")["rank"],
    "ranking loss above its least": lambda r: above_least(test(r, "test_in")),
    "inversions, own step %": lambda r: percent(test(r, "test_in")["inversions_step"]),
    "inversions, window %": lambda r: percent(test(r, "test_in")["inversions_window"]),
}
SOLVED = ("in-domain %", "out-of-domain %")
SOLVED_TWO = ("in-domain, 2 a step %", "in-domain, lost with 2 a step", "out-of-domain, 2 a step %")
SOLVED_TWO += ("out-of-domain, lost with 2 a step",)
STYLES = ("in-domain, in foreign style %", "out-of-domain, in foreign style %")
STYLES += ("out-of-domain, right of those in own style %",)
NATS = ("TDS", "ranking loss", "ranking loss above its least")
ORDER = (*NATS, "inversions, own step %", "inversions, window %")  # None where nothing is said before the EOS


def percent(share):
    return None if share is None else 100 * share


def lost(result, stem):
    """Points of accuracy that decoding two tokens a step costs."""
    return 100 * (test(result, stem)["accuracy"] - test(result, stem, 2)["accuracy"])


def above_least(scores):
    """The part of the ranking loss that the order decides: the entropies alone leave the rest."""
    parts = scores["rank"], scores.get("rank_least")
    return None if None in parts else parts[0] - parts[1]


def test(result, stem, at_once=1):
    """The scores of a run on one test set."""
    for name, scores in result["tests"].items():
        source, _, more = name.partition(", ")
        if sweep.stem(source) == stem and more == ("" if at_once == 1 else f"{at_once} a step"):
            return scores
    raise KeyError(stem)


def relation(found, label):
    """How a measure goes with in-domain accuracy over the rows that train on trajectories and that every base model
    has: Pearson's correlation for each base model, over the means of the seeds -> their interval; without base
    models with fewer than three rows, or where nothing differs."""
    points = {}
    for row in names_of(found, without=("base", "SFT-GT")):
        if bases_of(found, row) != bases_of(found):
            continue
        measured, right = (stats.by_base(values_of(found, row, name)) for name in (label, "in-domain %"))
        for base, value in measured.items():
            points.setdefault(base, []).append((value, right[base]))
    relations = {}
    for base, pairs in sorted(points.items()):
        columns = list(zip(*pairs))
        if len(pairs) > 2 and all(max(column) - min(column) > 1e-9 for column in columns):
            relations[base, None] = stats.pearson(*columns)
    return stats.interval(relations)


# ------------------------------------------------------------------------------------------------------------- tables


def write(folder, found, losses, grid, about):
    """Write results.json, tables.md and the pictures, and print the tables. losses: rows of the cross-entropy over the
    mask ratio. grid: the rows of Table 9. about: what else results.json holds."""
    folder.mkdir(exist_ok=True)
    rows = summarise(found)
    tables = markdown(found, rows, losses, grid)
    everything = dict(**about, versions=runs.versions(), primary=primary(found), rows=rows)
    everything["relations"] = {label: relation(found, label) for label in ORDER}
    everything["runs"] = list(found.values())
    with runs.atomic_file(folder / "results.json") as f:
        f.write(json.dumps(everything, indent=1) + "\n")
    with runs.atomic_file(folder / "tables.md") as f:
        f.write(tables + "\n")
    names = names_of(found, without=grid)
    plots.save(plots.draw_tds(tds_curves(found, names)), folder / "tds.png")
    plots.save(plots.draw_loss(losses), folder / "loss.png")
    plots.save(plots.draw_accuracy(accuracy_curves(found, names)), folder / "accuracy.png")
    print(tables)


def bases_of(found, row=None):
    """The base models that a row has runs on, or any."""
    return sorted({k[1] for k in found if row in (None, k[0])})


def names_of(found, without=()):
    """The rows that have runs, in their order."""
    return [name for name in dict.fromkeys(k[0] for k in found) if name not in without]


def values_of(found, row, label):
    """A measure of a row -> {(base, seed): value}"""
    return {k[1:]: MEASURES[label](r) for k, r in found.items() if k[0] == row}


def summarise(found):
    """Every row: its measures with intervals over the base models, and its differences to the rows in COMPARED."""
    rows = {}
    for name in names_of(found):
        ours = {label: values_of(found, name, label) for label in MEASURES}
        rows[name] = dict(
            runs=sum(k[0] == name for k in found),
            measures={label: stats.interval(values) for label, values in ours.items()},
            differences={
                other: {label: stats.paired(values, values_of(found, other, label)) for label, values in ours.items()}
                for other in COMPARED
                if other != name
            },
        )
    return rows


def primary(found):
    """TABOM - SFT-SD in-domain over subsets of the base models."""
    measure = "in-domain %"
    differences = {}
    for name, numbers in SUBSETS.items():
        ours, theirs = (
            {k: v for k, v in values_of(found, row, measure).items() if int(k[0].rpartition("-")[2]) in numbers}
            for row in ("TABOM", "SFT-SD")
        )
        differences[name] = stats.paired(ours, theirs)
    return {name: value for name, value in differences.items() if value is not None}


def markdown(found, rows, losses=(), grid=()):
    """All tables. An interval is 95 %, Student's t over the base models, p that of the paired test; a difference is
    over the runs that both rows have, and what it is on each base model stands behind it."""
    variants = [name for name in rows if name.startswith("TABOM,")]
    parts = ["TABOM", *(name for name in variants if name not in grid)]
    main = [name for name in rows if name not in variants]
    bases = bases_of(found)
    grid = [name for name in grid if name in rows]
    searched = [base for base in bases if all(base in bases_of(found, name) for name in grid)]
    at_grid = summarise({k: r for k, r in found.items() if k[1] in searched and k[0] in ("base", *COMPARED, *grid)})

    def tables(title, rows, names, labels, bases=bases):
        return [(f"{title}: {label}", comparison(rows, names, label, bases)) for label in labels]

    sections = [
        ("The base models", setup_table(found)),
        ("The primary measure: in-domain %, TABOM - SFT-SD", primary_table(found)),
        *tables("Main results (Tables 2 and 3)", rows, main, SOLVED),
        *tables("Two tokens a step (Table 4)", rows, main, SOLVED_TWO),
        *tables("Window and terms (Tables 5 to 7)", rows, parts, SOLVED),
        *(tables("Window, margin and weight (Table 9)", at_grid, ["TABOM", *grid], SOLVED, searched) if grid else []),
        *tables("Style of the answers", rows, [*main, *parts[1:]], STYLES),
        *tables("Order", rows, [*main, *parts[1:]], ORDER),
        ("Cross-entropy of the base models (Figure 3)", loss_table(losses)),
        ("What goes with in-domain accuracy", relation_table(found)),
    ]
    return "\n\n".join(f"### {title}\n\n{content}" for title, content in sections if content)


def markdown_table(columns, lines):
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, ["---"] * len(columns), *lines))


def setup_table(found):
    columns = ["model", "seed", *SOLVED, "puzzles distilled", "trajectories kept", "optimizer steps of a run"]
    lines = []
    for r in found.values():
        if r["row"] == "base":
            steps = sorted({x["steps"] for x in found.values() if "steps" in x and x["base"] == r["base"]})
            right = [f"{MEASURES[label](r):.1f}" for label in SOLVED]
            kept = [str(r["puzzles"]), str(r["kept"]), ", ".join(map(str, steps)) or "-"]
            lines.append([r["base"], str(r["seed"]), *right, *kept])
    return markdown_table(columns, lines)


def primary_table(found):
    lines = [[name, shown(value, 1, "+")] for name, value in primary(found).items()]
    return markdown_table(["base models", "difference"], lines)


def comparison(rows, names, label, bases):
    """One measure of some rows, by base model too, and its differences to the rows in COMPARED; empty without rows
    to compare."""
    names = [name for name in names if name in rows]
    if len(names) < 2:
        return ""
    digits, lines = (3 if label in NATS else 1), []
    for name in names:
        row = rows[name]
        value = row["measures"][label]
        own = {} if value is None else value["bases"]
        by_model = " ".join(f"{own[base]:.{digits}f}" if base in own else "-" for base in bases)
        differences = (shown(row["differences"].get(other, {}).get(label), digits, "+") for other in COMPARED)
        lines.append([name, str(row["runs"]), shown(value, digits), by_model, *differences])
    return markdown_table(["row", "runs", label, "by base model", *(f"- {other}" for other in COMPARED)], lines)


def shown(value, digits=1, sign=""):
    """A mean with its interval; of a difference (it has a p) also p and the difference on each base model. - where
    there is none."""
    if value is None:
        return "-"
    text = f"{value['mean']:{sign}.{digits}f}"
    if value["low"] is not None:
        text += f" [{value['low']:{sign}.{digits}f}, {value['high']:{sign}.{digits}f}]"
    if value.get("p") is not None:
        text += f", p {value['p']:.3f} ({' '.join(f'{x:{sign}.{digits}f}' for x in value['bases'].values())})"
    return text


def loss_table(losses):
    """The mean over the base models and its standard error."""
    sources = list(dict.fromkeys(r["data"] for r in losses))
    if not sources:
        return ""
    ratios = [f"mask ratio {r['mask_ratio']}" for r in losses if r["data"] == sources[0]]
    lines = []
    for source in sources:
        errors = [(r["loss"], r["loss_se"]) for r in losses if r["data"] == source]
        lines.append([source, *(f"{x:.4f}" if e is None else f"{x:.4f} ± {e:.4f}" for x, e in errors)])
    return markdown_table(["nats", *ratios], lines)


def relation_table(found):
    lines = []
    for label in ORDER:
        value = relation(found, label)
        bases = "-" if value is None else " ".join(f"{r:+.2f}" for r in value["bases"].values())
        lines.append([label, shown(value, 2, "+"), bases])
    return markdown_table(["measure", "r", "by base model"], lines)


def tds_curves(found, names):
    """TDS at each step: the mean of the base models, each the mean of its runs, and its standard error."""
    rows = []
    for name in names:
        curves = {k[1:]: test(r, "test_in")["per_step"] for k, r in found.items() if k[0] == name}
        for t in range(max(map(len, curves.values()))):
            means = stats.by_base({k: curve[t] for k, curve in curves.items() if len(curve) > t})
            rows.append(dict(model=name, step=t, **stats.mean_and_error("tds", list(means.values()))))
    return rows


def accuracy_curves(found, names):
    """Accuracy on the validation puzzles after each epoch, with the first seed: the mean over the base models that
    every row has."""
    start = {r["base"]: 100 * r["chosen"]["accuracy"] for r in found.values() if r["row"] == "base"}
    shared = set.intersection(*(set(bases_of(found, name)) for name in names))
    rows = []
    for name in names:
        curves = [
            [start[r["base"]], *(100 * accuracy for accuracy in r["curve"])]
            for r in found.values()
            if r["row"] == name and "curve" in r and r["base"] in shared
        ]
        for epoch, values in enumerate(zip(*curves)):
            rows.append(dict(model=name, epoch=epoch, **stats.mean_and_error("accuracy", list(values))))
    return rows
