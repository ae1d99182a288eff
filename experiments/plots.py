"""The charts of the experiments: the paper's Figures 2 and 3, gains against losses, differences, training curves.

    plots.save(plots.draw_tds(rows), "tds.png")      # writes tds.png and tds.pdf

rows: dicts, as in the JSON Lines that diagnose.py writes. Every picture has the width of a paper's column, and panels
below one another. Colour is the model, dash is the dataset: TABOM has one strong colour everywhere, the base model is
grey, all others are muted (and can be told apart by colour-blind readers). A panel has at most MOST lines; with more,
the base model and TABOM stand in each. Where rows have a standard error it is drawn as a band, and the title says over
how many values (n). matplotlib is imported where it is used; no window is opened, and none of its settings changed.
The pictures of one trajectory are in pictures.py.
"""

import functools
import itertools
import math
import re
import warnings
from pathlib import Path

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
COUNTS = ("base_models", "trajectories", "responses")  # keys: a row is the mean of so many values
DASHES = ("-", "--", ":", "-.")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
SMOOTH_FROM = 60  # a training curve of so many steps is smoothed
MOST = 7  # lines of a panel
SHORT, LONG = 26, 48  # letters of a name that fits into half a column, and into a whole one
LINE = 0.14  # inches of a legend's line
APART = 0.5  # without a row that lies apart, the others need less than this share of the axis
COLUMN = 3.3  # inches, the width of a column of a paper
STYLE = {
    "font.size": 7,
    "axes.titlesize": 7,
    "axes.labelsize": 7,
    "xtick.labelsize": 6.5,
    "ytick.labelsize": 6.5,
    "legend.fontsize": 6.5,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.linewidth": 1.0,
    "lines.markersize": 3.0,
}
STRONG, GREY = "#d55e00", "#555555"  # TABOM, the base model
# Paul Tol's palette "muted", without its reds.
MUTED = ("#88ccee", "#117733", "#332288", "#ddcc77", "#aa4499", "#44aa99", "#999933")


def styled(draw):
    """A function that draws, with STYLE in place of matplotlib's settings while it does."""

    @functools.wraps(draw)
    def drawn(*values, **more):
        try:
            from matplotlib import rc_context
        except ImportError as e:
            raise ImportError("pictures need matplotlib: pip install matplotlib") from e
        with rc_context(STYLE):
            return draw(*values, **more)

    return drawn


def figure(rows=1, columns=1, height=2.1):
    """An empty figure as wide as a column and its axes as a flat list. height: of a row of panels, inches."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(COLUMN, height * rows), layout="constrained")
    return drawing, list(drawing.subplots(rows, columns, squeeze=False).flat)


@styled
def save(drawing, file):
    """Write a picture as the PNG file named, and as a PDF of the same name: vectors, fonts embedded, and no
    date in it."""
    import matplotlib

    file = Path(file)
    with warnings.catch_warnings(), matplotlib.rc_context({"pdf.fonttype": 42}):
        warnings.filterwarnings("ignore", "Glyph")  # a character that the font lacks is drawn as a box
        drawing.savefig(file, dpi=200)
        drawing.savefig(file.with_suffix(".pdf"), metadata=dict(CreationDate=None))


# ------------------------------------------------------------------------------------------ models


def is_ours(name):
    """Whether a curve is TABOM itself: by its name, or by the objective in the path of a run of sweep."""
    return name == "TABOM" or ("=" in name and "tabom" in re.split("[^a-z]+", name.lower()))


def looks(names):
    """Colour, dash and marker of each name, the same in every picture that is given the same names."""
    names = list(dict.fromkeys(names))
    others = [name for name in names if name != "base" and not is_ours(name)]
    found = dict(base=dict(color=GREY, linestyle="-", marker="."))
    for i, name in enumerate(others):
        dash, marker = DASHES[i // len(MUTED) % len(DASHES)], MARKERS[i % len(MARKERS)]
        found[name] = dict(color=MUTED[i % len(MUTED)], linestyle=dash, marker=marker)
    if len(others) == 1 and not any(map(is_ours, names)):
        found[others[0]]["color"] = STRONG  # there is nothing else
    for i, name in enumerate(filter(is_ours, names)):
        found[name] = dict(color=STRONG, linestyle=DASHES[i % len(DASHES)], marker="o", zorder=3)
    return {name: found[name] for name in names}


def panels_of(names):
    """Names in panels of at most MOST: where there are more, the base model and TABOM are in each."""
    names = list(dict.fromkeys(names))
    if len(names) <= MOST:
        return [names]
    always = [name for name in names if name == "base" or is_ours(name)][:2]
    others = [name for name in names if name not in always]
    count = math.ceil(len(others) / (MOST - len(always)))
    size = math.ceil(len(others) / count)
    return [always + others[i : i + size] for i in range(0, len(others), size)]


def apart(values):
    """The names of {name: number} that lie apart: at most two, each so far out that the others need less than APART of
    the axis."""
    values, found = dict(values), []
    while len(values) > 2 and len(found) < 2:
        far = min(values, key=lambda name: width(values, name))
        if width(values, far) >= APART * width(values):
            break
        found.append(far)
        del values[far]
    return found


def width(values, without=None):
    """The width of an axis for {name: number}, without one of the names."""
    rest = [value for name, value in values.items() if name != without]
    return max(rest) - min(rest)


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


def curves(axes, rows, keys, x, y, error=None, models=None):
    """One line for each value of the rows' keys: the first key has the colour, a second one the
    dash. A single value is a point. error: the key of a standard error, drawn as a band. models: the names that have
    colours, in their order; None = those of the rows."""
    lines, counts = {}, {}  # (model, or model and dataset) -> its rows, and the base models that they are means of
    for row in rows:
        names = tuple(map(row.get, keys))
        line = lines.setdefault(names, [])
        if "base_models" in row:
            counts[names] = max(row["base_models"], counts.get(names, 0))
        if row[y] is not None:
            line.append(row)
    if not lines:
        return
    names_of = [list(dict.fromkeys(names)) for names in zip(*lines)]  # for each key
    short = list(map(labels, names_of))  # for each key: name -> label
    look_of = looks(models or names_of[0])
    dash_of = dict(zip(names_of[-1], itertools.cycle(DASHES)))
    for names, line in lines.items():
        label = " on ".join(label_of[name] for label_of, name in zip(short, names))
        if names in counts:
            label += f" ({counts[names]})"
        style = {**look_of[names[0]], "marker": "" if len(line) > 1 else "o"}
        if len(keys) > 1:
            style.update(linestyle=dash_of[names[-1]])
        if style["color"] == STRONG:
            style.update(linewidth=1.8)
        axes.plot(column(line, x), column(line, y), label=label, **style)
        if error is not None:
            band(axes, column(line, x), column(line, y), column(line, error), style["color"])
    axes.margins(x=0.01)


def column(rows, key):
    return [row[key] for row in rows]


def band(axes, xs, ys, errors, colour):
    """Shade one standard error on either side of a curve; None is no error."""
    import numpy  # comes with matplotlib

    ys = numpy.array(ys, dtype=float)
    errors = numpy.nan_to_num(numpy.array(errors, dtype=float))
    axes.fill_between(xs, ys - errors, ys + errors, color=colour, alpha=0.15, linewidth=0)


def legend(axes):
    """The names of the curves: below the axes, where they hide nothing, in two columns if they are short."""
    handles, names = axes.get_legend_handles_labels()
    if names:
        columns = 2 if max(map(len, names)) <= SHORT and len(names) > 1 else 1
        below = -0.27 - 0.08 * axes.get_xlabel().count("\n")
        place = dict(loc="upper center", bbox_to_anchor=(0.45, below), borderaxespad=0.0)
        names = [shortened(name) for name in names]
        axes.legend(handles, names, **place, ncols=columns, handlelength=2.2, columnspacing=1.0, labelspacing=0.3)


def shortened(name):
    """A name that fits into a column; of a long path the end tells more than the beginning."""
    return name if len(name) <= LONG else f"…{name[1 - LONG :]}"


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


def stacked(panels, draw):
    """A figure with a panel below the other for each of some lists of rows: draw(axes, rows) fills one."""
    drawing, axes_of = figure(max(len(panels), 1))
    lines = 0  # of a legend
    for axes, rows in zip(axes_of, panels):
        draw(axes, rows)
        legend(axes)
        if axes.get_legend():
            names = axes.get_legend().get_texts()
            lines = max(lines, math.ceil(len(names) / axes.get_legend()._ncols))
    drawing.set_figheight(len(axes_of) * (1.9 + LINE * lines))
    return drawing, axes_of


def most_bases(rows, model):
    """The most base models that a value of this model is the mean of."""
    return max(row.get("base_models", 0) for row in rows if row["model"] == model)


def of_models(rows, names):
    return [row for row in rows if row["model"] in names]


@styled
def draw_tds(rows, models=None):
    """Figure 2 of the paper: the Trajectory Discrimination Score (TDS) over decoding steps. models:
    see curves. A model whose curve leaves the others far below has a panel with the base model and TABOM. A step that
    fewer than half of a model's base models have is left out."""
    rows = [row for row in rows if 2 * row.get("base_models", math.inf) >= most_bases(rows, row["model"])]
    names = list(dict.fromkeys(column(rows, "model")))
    highest = {}
    for name in names:
        known = [row["tds"] for row in of_models(rows, [name]) if row["tds"] is not None]
        highest[name] = max(known, default=0.0)
    beyond = apart(highest) if len(names) > MOST else []
    panels = panels_of([name for name in names if name not in beyond])
    if beyond:
        panels.append([*(name for name in names if name == "base" or is_ours(name)), *beyond])

    def draw(axes, panel):
        axes.set(xlabel="decoding step", ylabel="TDS (variance of entropies, nats²)")
        curves(axes, of_models(rows, panel), ["model"], "step", "tds", "tds_se", models or names)

    drawing, axes_of = stacked(panels, draw)
    axes_of[0].set_title(caption(rows, "Trajectory Discrimination Score over decoding"))
    inside = axes_of[: len(panels) - bool(beyond)]
    if len(inside) > 1:
        low, high = zip(*(axes.get_ylim() for axes in inside))
        for axes in inside:
            axes.set_ylim(min(low), max(high))  # the same in all, so that they can be compared
    return drawing


@styled
def draw_loss(rows):
    """Figure 3 of the paper: cross-entropy over the mask ratio."""
    names, sources = list(dict.fromkeys(column(rows, "model"))), list(dict.fromkeys(column(rows, "data")))
    panels = [rows]
    if len(names) * len(sources) > MOST:
        panels = []
        for source, some in itertools.product(sources, panels_of(names)):
            panels.append([row for row in of_models(rows, some) if row["data"] == source])

    def draw(axes, panel):
        curves(axes, panel, ["model", "data"], "mask_ratio", "loss", "loss_se", names)
        axes.set(xlabel="mask ratio", ylabel="cross-entropy (nats per token)")

    drawing, axes_of = stacked(panels, draw)
    axes_of[0].set_title(caption(rows, "Cross-entropy of the masked tokens"))
    return drawing


@styled
def draw_inversions(rows):
    """The share of pairs that were decoded hard before easy, over their distance: a panel for each
    context."""
    names = list(dict.fromkeys(column(rows, "model")))
    panels = list(itertools.product(CONTEXTS, panels_of(names)))

    def draw(axes, panel):
        context, some = panel
        mine = [row for row in of_models(rows, some) if row["context"] == context]
        curves(axes, mine, ["model"], "distance", "rate", models=names)
        axes.set_title("Entropies at each token's own step" if context == "step" else "Entropies at the window's start")
        axes.set(xlabel="distance in decode order (tokens)", ylabel="hard before easy\n(share of pairs)")

    return stacked(panels, draw)[0]


@styled
def draw_frontier(points, faint=(), title=None):
    """What each row gains in-domain against what it loses elsewhere: a line in order of the gain. The base model, at
    the origin, is a point of each.

    points: dicts of row, rate, epoch, gain and loss (in points), and gain_se and loss_se: their standard errors over
    base models, or None. faint: (row, gain, loss) of single base models, which are pale dots."""
    names = list(dict.fromkeys(column(points, "row")))
    look_of = looks(names)

    def draw(axes, panel):
        axes.axhline(0, color="0.6", linewidth=0.8, zorder=0)
        axes.axvline(0, color="0.6", linewidth=0.8, zorder=0)
        axes.plot(0, 0, "o", color=GREY, label="base", zorder=4)
        for name in panel:
            mine, colour = [point for point in points if point["row"] == name], look_of[name]["color"]
            line = sorted(zip([0, *column(mine, "gain")], [0, *column(mine, "loss")]))
            axes.plot(*zip(*line), label=name, **dict(look_of[name], linewidth=1.8 if colour == STRONG else 1.0))
            for one in mine:
                error = dict(xerr=one["gain_se"], yerr=one["loss_se"], elinewidth=0.5)
                axes.errorbar(one["gain"], one["loss"], **error, fmt="none", ecolor=colour)
            for row, gain, loss in faint:
                if row == name:
                    axes.plot(gain, loss, ".", color=colour, alpha=0.3, markeredgewidth=0)
        axes.set(xlabel="gain in-domain (points)", ylabel="loss near and far (points)")

    drawing, axes_of = stacked(panels_of(names), draw)
    for axes in axes_of[1:]:  # so that they can be compared
        axes.sharex(axes_of[0])
        axes.sharey(axes_of[0])
    axes_of[0].autoscale()
    if title:
        axes_of[0].set_title(title)
    return drawing


# ---------------------------------------------------------------------------------------- training


@styled
def draw_training(metrics):
    """Training curves: one panel for each metric, one line for each run; with more than MOST runs, more panels.
    metrics: run -> rows of its metrics.jsonl."""
    shown = []
    for name in METRICS:
        for rows in metrics.values():
            if points(rows, name) and name not in shown:
                shown.append(name)
    look_of, short = looks(metrics), labels(metrics)
    groups = list(itertools.product(panels_of(metrics), shown))
    columns = max(min(2, len(groups)), 1)
    lines = max(math.ceil(len(groups) / columns), 1)
    drawing, panels = figure(lines, columns, height=1.35 + LINE * min(len(metrics), MOST) / lines)
    for axes, (runs, name) in zip(panels, groups):
        for run in runs:
            xs_ys = points(metrics[run], name)
            if xs_ys:
                training_curve(axes, *zip(*xs_ys), look_of[run], short[run])
        axes.set_title(name)
        axes.set(xlabel="optimizer step", ylabel=METRICS[name])
        axes.margins(x=0.01)
        if name == shown[0]:  # the other panels have the same colours
            handles, names = axes.get_legend_handles_labels()
            if len(groups) == len(shown):
                names = [shortened(label) for label in names]
                drawing.legend(handles, names, loc="outside lower center", labelspacing=0.3)
            else:
                axes.legend(fontsize=5)
    for axes in panels[len(groups) :]:
        axes.set_axis_off()
    return drawing


def points(rows, name):
    """The (step, value) pairs of one metric; steps that were dropped have none."""
    found = []
    for row in rows:
        if row.get(name) is not None:
            found.append((row["step"], row[name]))
    return found


def training_curve(axes, xs, ys, look, label):
    """One metric of one run; a long one as its running mean, over a pale line of the values
    themselves."""
    if len(ys) >= SMOOTH_FROM:
        axes.plot(xs, ys, color=look["color"], alpha=0.2, linewidth=0.6)
        width = len(ys) // 20
        ys = running_mean(ys, width)
        label = f"{label} (mean of {2 * width + 1} steps)"
    axes.plot(xs, ys, color=look["color"], linestyle=look["linestyle"], label=label)


def running_mean(values, half):
    """The mean of each value and of `half` values on either side, fewer near the ends."""
    means = []
    for i in range(len(values)):
        near = values[max(i - half, 0) : i + half + 1]
        means.append(sum(near) / len(near))
    return means
