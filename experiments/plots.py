"""The pictures of the experiments: the paper's Figures 2 and 3, training curves, one trajectory.

    plots.save(plots.draw_tds(rows), "tds.png")      # writes tds.png and tds.pdf

rows: dicts, as in the JSON Lines that diagnose.py writes. Colour is the model, dash is the dataset.
Where rows have a standard error it is drawn as a band, and the title says over how many values (n).
matplotlib is imported where it is used; no window is opened, and none of its settings changed.
"""

import itertools
import math
import unicodedata
import warnings
from pathlib import Path

import data

# Of the entropies that are compared: each token's own step, or one window's start for all.
CONTEXTS = ("step", "window")
METRICS = {  # of metrics.jsonl, with their units; those that a run has are drawn
    "loss": "nats",
    "ce": "nats",
    "ranking": "nats",
    "in_order": "share of pairs",
    "entropy": "nats",
    "grad_norm": "L2 norm",
}
OLD_METRICS = {"ranking": "rank"}  # names in the metrics of old runs
COUNTS = ("base_models", "trajectories", "responses")  # keys: a row is the mean of so many values
DASHES = ("-", "--", ":", "-.")
SMOOTH_FROM = 60  # a training curve of so many steps is smoothed
BESIDE = 6  # with more curves the legend stands beside the picture


def figure(columns=1, rows=1, width=6.0, height=4.0):
    """An empty figure and its axes as a flat list."""
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise ImportError("pictures need matplotlib: pip install matplotlib") from e
    drawing = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return drawing, list(drawing.subplots(rows, columns, squeeze=False).flat)


def save(drawing, file):
    """Write a picture as the PNG file named, and as a PDF of the same name: fonts embedded, and no
    date in it."""
    import matplotlib

    file = Path(file)
    with warnings.catch_warnings(), matplotlib.rc_context({"pdf.fonttype": 42}):
        warnings.filterwarnings("ignore", "Glyph")  # a character that the font lacks is drawn as a box
        drawing.savefig(file, dpi=150)
        drawing.savefig(file.with_suffix(".pdf"), metadata=dict(CreationDate=None))


# ------------------------------------------------------------------------------------------ curves


def labels(names):
    """A short label for each name of a curve: its path without the folders that all paths share."""
    paths = []
    for name in names:
        if len(Path(name).parts) > 1:
            paths.append(Path(name).parts[:-1])
    shared = 0
    while len(paths) > 1 and all(len(p) > shared and p[shared] == paths[0][shared] for p in paths):
        shared += 1
    short = {}
    for name in names:
        parts = Path(name).parts
        short[name] = "/".join(parts[shared:] if len(parts) > 1 else parts)
    return short


def colours(names):
    """A colour for each name, the same in every picture that is given the same names."""
    from matplotlib import colormaps

    names = list(dict.fromkeys(names))
    palette = colormaps["tab10"].colors
    if len(names) > len(palette):
        palette = colormaps["tab20"].colors
    return dict(zip(names, itertools.cycle(palette)))


def curves(axes, rows, keys, x, y, error=None, models=None):
    """One line for each value of the rows' keys: the first key has the colour, a second one the
    dash. error: the key of a standard error, drawn as a band. models: the names that have colours,
    in their order; None = those of the rows."""
    lines = {}  # (model, or model and dataset) -> rows
    for row in rows:
        line = lines.setdefault(tuple(map(row.get, keys)), [])
        if row[y] is not None:
            line.append(row)
    if not lines:
        return
    names_of = [list(dict.fromkeys(names)) for names in zip(*lines)]  # for each key
    short = list(map(labels, names_of))  # for each key: name -> label
    colour_of = colours(models or names_of[0])
    dash_of = dict(zip(names_of[-1], itertools.cycle(DASHES)))
    for names, line in lines.items():
        label = " on ".join(label_of[name] for label_of, name in zip(short, names))
        style = dict(color=colour_of[names[0]])
        if len(keys) > 1:
            style.update(linestyle=dash_of[names[-1]])
        axes.plot(column(line, x), column(line, y), label=label, **style)
        if error is not None:
            band(axes, column(line, x), column(line, y), column(line, error), style["color"])
    legend(axes, len(lines))


def column(rows, key):
    return [row[key] for row in rows]


def band(axes, xs, ys, errors, colour):
    """Shade one standard error on either side of a curve; None is no error."""
    import numpy  # comes with matplotlib

    ys = numpy.array(ys, dtype=float)
    errors = numpy.nan_to_num(numpy.array(errors, dtype=float))
    axes.fill_between(xs, ys - errors, ys + errors, color=colour, alpha=0.15, linewidth=0)


def legend(axes, count):
    """The names of the curves: beside the picture where they are many."""
    if count > BESIDE:
        axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0.0)
    elif count:
        axes.legend(fontsize="small")


def caption(rows, what):
    """A title, and below it what the bands are and over how many values: n = 3 base models."""
    for name in COUNTS:
        if rows and name in rows[0]:
            counts = column(rows, name)
            n = f"{min(counts)}"
            if max(counts) > min(counts):
                n = f"{min(counts)} to {max(counts)}"
            return f"{what}\nmean ± 1 standard error, n = {n} {name.replace('_', ' ')}"
    return what


def draw_tds(rows, models=None):
    """Figure 2 of the paper: the Trajectory Discrimination Score (TDS) over decoding steps. models:
    see curves."""
    drawing, (axes,) = figure(width=7.0)
    curves(axes, rows, ["model"], "step", "tds", "tds_se", models)
    axes.set(xlabel="decoding step", ylabel="TDS (variance of entropies, nats²)")
    axes.set_title(caption(rows, "Trajectory Discrimination Score over decoding"), fontsize="medium")
    return drawing


def draw_loss(rows):
    """Figure 3 of the paper: cross-entropy over the mask ratio."""
    drawing, (axes,) = figure()
    curves(axes, rows, ["model", "data"], "mask_ratio", "loss", "loss_se")
    axes.set(xlabel="mask ratio", ylabel="cross-entropy (nats per token)", ylim=(0, None))
    axes.set_title(caption(rows, "Cross-entropy of the masked tokens"), fontsize="medium")
    return drawing


def draw_inversions(rows):
    """The share of pairs that were decoded hard before easy, over their distance: a panel for each
    context."""
    drawing, panels = figure(columns=2)
    for axes, context in zip(panels, CONTEXTS):
        curves(axes, [r for r in rows if r["context"] == context], ["model"], "distance", "rate")
        what = "the window's start"
        if context == "step":
            what = "each token's own step"
        axes.set_title(f"Entropies at {what}", fontsize="medium")
        axes.set(xlabel="distance in decode order (tokens)", ylabel="hard before easy (share of pairs)", ylim=(0, 1))
    return drawing


def draw_differences(rows, other):
    """Differences to another row with their 95 % intervals: a panel for each measure, a line for each row.
    rows: dicts of row, measure, mean, low and high."""
    measures, names = list(dict.fromkeys(column(rows, "measure"))), list(dict.fromkeys(column(rows, "row")))
    drawing, panels = figure(max(len(measures), 1), width=3.6, height=1.2 + 0.25 * len(names))
    for axes, measure in zip(panels, measures):
        axes.axvline(0, color="0.6", linewidth=0.8)
        for r in rows:
            if r["measure"] == measure:
                y = names.index(r["row"])
                axes.plot([r["low"], r["high"]], [y, y], color="tab:blue")
                axes.plot(r["mean"], y, "o", color="tab:blue")
        axes.set(xlabel=f"{measure}, less {other}'s", yticks=range(len(names)), yticklabels=names)
        axes.invert_yaxis()
        if axes is not panels[0]:
            axes.set_yticklabels([])
    return drawing


def draw_scatter(points, xlabel, ylabel, models=None):
    """A point for each run, coloured by its row. points: dicts of row, x and y. models: see curves."""
    drawing, (axes,) = figure(width=7.0)
    names = list(dict.fromkeys(column(points, "row")))
    colour_of = colours(models or names)
    for name in names:
        mine = [p for p in points if p["row"] == name]
        axes.plot(column(mine, "x"), column(mine, "y"), "o", color=colour_of[name], label=name)
    axes.axhline(0, color="0.6", linewidth=0.8)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    legend(axes, len(names))
    return drawing


# ---------------------------------------------------------------------------------------- training


def draw_training(metrics):
    """Training curves: one panel for each metric, one line for each run. metrics: run -> rows of
    its metrics.jsonl."""
    shown = []
    for name in METRICS:
        for rows in metrics.values():
            if points(rows, name) and name not in shown:
                shown.append(name)
    columns = max(min(3, len(shown)), 1)
    lines = max(math.ceil(len(shown) / columns), 1)
    drawing, panels = figure(columns, lines, width=4.5, height=3.0)
    colour_of, short = colours(metrics), labels(metrics)
    for axes, name in zip(panels, shown):
        for run, rows in metrics.items():
            xs_ys = points(rows, name)
            if xs_ys:
                training_curve(axes, *zip(*xs_ys), colour_of[run], short[run])
        axes.set_title(name, fontsize="medium")
        axes.set(xlabel="optimizer step", ylabel=METRICS[name])
    if shown:
        legend(panels[0], len(metrics))  # the other panels have the same colours
    for axes in panels[len(shown) :]:
        axes.set_axis_off()
    return drawing


def points(rows, name):
    """The (step, value) pairs of one metric; steps that were dropped have none."""
    found = []
    for row in rows:
        value = row.get(name, row.get(OLD_METRICS.get(name)))
        if value is not None:
            found.append((row["step"], value))
    return found


def training_curve(axes, xs, ys, colour, label):
    """One metric of one run; a long one as its running mean, over a pale line of the values
    themselves."""
    if len(ys) >= SMOOTH_FROM:
        axes.plot(xs, ys, color=colour, alpha=0.2, linewidth=0.8)
        width = len(ys) // 20
        ys = running_mean(ys, width)
        label = f"{label} (mean of {2 * width + 1} steps)"
    axes.plot(xs, ys, color=colour, label=label)


def running_mean(values, half):
    """The mean of each value and of `half` values on either side, fewer near the ends."""
    means = []
    for i in range(len(values)):
        near = values[max(i - half, 0) : i + half + 1]
        means.append(sum(near) / len(near))
    return means


# ---------------------------------------------------------------------------------- one trajectory


def draw_trajectory(tok, record, columns=100):
    """A response up to its first EOS: every token in its place, coloured by the rank at which it
    was decoded."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.patches import Rectangle

    shown = data.cut_at_eos(record, tok.stop_ids)
    count = len(shown["response_ids"])
    cells = token_cells(tok, shown, columns)
    wide = max(x + width for x, _, width, _, _ in cells)
    lines = cells[-1][1] + 1
    drawing, (axes,) = figure(width=max(4.0, 0.09 * wide + 0.5), height=0.22 * lines + 1.5)
    scale = ScalarMappable(Normalize(0, max(count - 1, 1)), colormaps["viridis"])
    for x, y, width, text, rank in cells:
        axes.add_patch(Rectangle((x, y), width, 1, facecolor=scale.to_rgba(rank), edgecolor="white", linewidth=0.3))
        colour = "white" if rank < 0.6 * count else "black"
        style = dict(family="monospace", fontsize=8, color=colour, ha="center", va="center", parse_math=False)
        axes.text(x + width / 2, y + 0.5, text, **style)
    axes.set(xlim=(0, wide), ylim=(lines, 0))
    axes.set_axis_off()
    axes.set_title(f"A response of {count} tokens", fontsize="medium")
    drawing.colorbar(scale, ax=axes, orientation="horizontal", label="rank in the decode order", aspect=50)
    return drawing


def token_cells(tok, record, columns):
    """Where each token of a response is drawn: (column, line, width, text, decode rank), in the
    order of the text."""
    cells, x, y = [], 0, 0
    order = record["order"]
    for text, places in tok.pieces(record["response_ids"]):
        seen, width = visible_text(text)
        if x + width > columns and x:
            x, y = 0, y + 1
        rank = sum(order[i] for i in places) / len(places)  # a character may be several tokens
        cells.append((x, y, width, seen, rank))
        x += width
        if "\n" in text:
            x, y = 0, y + 1
    return cells


def visible_text(text):
    """(text without invisible characters, its width in columns of a monospaced font, at least 1)"""
    seen, width = "", 0
    for ch in text.replace("\n", "↵").replace("\t", "→"):
        seen += ch if ch.isprintable() else "·"
        width += 2 if unicodedata.east_asian_width(ch) in "WF" else 1
    return seen, max(width, 1)
