"""The pictures of the experiments: the paper's Figures 2 and 3, training curves, differences, one trajectory.

    plots.save(plots.draw_tds(rows), "tds.png")      # writes tds.png and tds.pdf
    plots.save_frames(tok, record, "x.gif")          # a response while it unmasks, as an animation

rows: dicts, as in the JSON Lines that diagnose.py writes. Every picture has the width of a paper's column, and panels
below one another. Colour is the model, dash is the dataset: TABOM has one strong colour everywhere, the base model is
grey, all others are muted (and can be told apart by colour-blind readers). A panel has at most MOST lines; with more,
the base model and TABOM stand in each. Where rows have a standard error it is drawn as a band, and the title says over
how many values (n). What lies far from everything else is marked at the edge with its value, or has a panel.
matplotlib is imported where it is used; no window is opened, and none of its settings changed.
"""

import functools
import itertools
import math
import re
import unicodedata
import warnings
from pathlib import Path

import data
from experiments import puzzles

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
FRAMES = 80  # pictures of an animation, at most
A_SECOND = 8  # of them
HELD = 3000  # milliseconds for which the last one stays
LEAST = 1e-4  # nats: entropies below are drawn as this one


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


def without_outliers(spans):
    """The limits of an axis for {name: (low, high)}, and the names that lie beyond them: at most two, each so far out
    that the others need less than APART of the axis."""
    spans, beyond = dict(spans), []
    while len(spans) > 2 and len(beyond) < 2:
        low, high = limits(spans)
        far = min(spans, key=lambda name: width_without(spans, name))
        if width_without(spans, far) >= APART * (high - low):
            break
        beyond.append(far)
        del spans[far]
    return limits(spans), beyond


def limits(spans):
    """The least and the largest number of {name: (low, high)}."""
    return min(low for low, _ in spans.values()), max(high for _, high in spans.values())


def width_without(spans, name):
    low, high = limits({other: span for other, span in spans.items() if other != name})
    return high - low


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
    spans = {}
    for name in names:
        known = [row["tds"] for row in of_models(rows, [name]) if row["tds"] is not None]
        spans[name] = 2 * (max(known, default=0.0),)
    beyond = without_outliers(spans)[1] if len(names) > MOST else []
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
def draw_differences(rows, other):
    """Differences to another row with their 95 % intervals: a panel for each measure, a line for each row, with the
    number of its base models. rows: dicts of row, measure, mean, low, high, and bases where they are known."""
    measures, names = list(dict.fromkeys(column(rows, "measure"))), list(dict.fromkeys(column(rows, "row")))
    drawing, panels = figure(max(len(measures), 1), height=0.45 + 0.125 * len(names))
    for axes, measure in zip(panels, measures):
        mine = {row["row"]: row for row in rows if row["measure"] == measure}
        (low, high), beyond = without_outliers({name: (r["low"], r["high"]) for name, r in mine.items()})
        low, high = min(low, 0), max(high, 0)
        axes.axvline(0, color="0.6", linewidth=0.8, zorder=0)
        for name, r in mine.items():
            y, colour = names.index(name), STRONG if is_ours(name) else "#4477aa"
            if name in beyond:
                at_edge(axes, r, y, low if r["mean"] < low else high, colour)
                continue
            axes.plot([r["low"], r["high"]], [y, y], color=colour, linewidth=1.8 if is_ours(name) else 1.0)
            axes.plot(r["mean"], y, "o", color=colour)
        room = 0.04 * (high - low)
        axes.set(xlim=(low - room, high + room), ylim=(len(names) - 0.4, -0.6), xlabel=f"{measure}, less {other}'s")
        axes.set_yticks(range(len(names)), [counted(name, mine.get(name)) for name in names])
    return drawing


def counted(name, row):
    """The label of a row: its name and the number of its base models."""
    if row is None or "bases" not in row:
        return name
    return f"{name} ({len(row['bases'])})"


def at_edge(axes, row, y, edge, colour):
    """Mark what lies beyond an axis: an arrow, and its value."""
    left = row["mean"] < edge
    axes.plot(edge, y, "<" if left else ">", color=colour)
    text = f"{row['mean']:+.1f} [{row['low']:+.1f}, {row['high']:+.1f}]"
    place = dict(xytext=(5 if left else -5, 0), textcoords="offset points", va="center", ha="left" if left else "right")
    axes.annotate(text, (edge, y), fontsize=6, color=colour, **place)


@styled
def draw_scatter(points, xlabel, ylabel, models=None, title=None):
    """A point for each run, coloured by its row. points: dicts of row, x and y. models: see curves. A row that lies far
    below or above the others is marked at the edge with its mean."""
    names = list(dict.fromkeys(column(points, "row")))
    look_of, spans = looks(models or names), {}
    for name in names:
        ys = [point["y"] for point in points if point["row"] == name]
        spans[name] = (min(ys), max(ys))
    (low, high), beyond = without_outliers(spans) if spans else ((0, 0), [])

    def draw(axes, panel):
        for name in panel:
            mine, look = [point for point in points if point["row"] == name], look_of[name]
            ys = column(mine, "y")
            style = dict(
                color=look["color"], marker=look["marker"], linestyle="", alpha=0.85, zorder=look.get("zorder")
            )
            if name in beyond:
                edge, mean = low if max(ys) < low else high, sum(ys) / len(ys)
                ys = [edge] * len(ys)
                place = dict(xytext=(6, 0), textcoords="offset points", va="center", fontsize=6, color=look["color"])
                axes.annotate(f"{mean:+.1f} on average", (max(column(mine, "x")), edge), **place)
                style.update(marker="v" if mean < low else "^")
            axes.plot(column(mine, "x"), ys, label=f"{name} ({len(mine)})", **style)
        axes.axhline(0, color="0.6", linewidth=0.8, zorder=0)
        axes.set(xlabel=xlabel, ylabel=ylabel)

    panels = panels_of(names)
    drawing, axes_of = stacked(panels, draw)
    xs = column(points, "x")
    for axes in axes_of:
        if xs:
            room = 0.04 * (max(xs) - min(xs)) or 1
            axes.set(xlim=(min(xs) - room, max(xs) + room))
    if title:
        axes_of[0].set_title(title, loc="right")
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
        value = row.get(name, row.get(OLD_METRICS.get(name)))
        if value is not None:
            found.append((row["step"], value))
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


# ---------------------------------------------------------------------------------- one trajectory


@styled
def draw_trajectory(tok, record, columns=60):
    """A response up to its first EOS: every token in its place, coloured by the rank at which it
    was decoded. A puzzle is drawn as its grid, with the rank in every cell."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.ticker import MaxNLocator

    shown = data.cut_at_eos(record, tok.stop_ids)
    title = f"A response of {len(shown['response_ids'])} tokens"
    if side_of(record):
        shown = record  # the ends are cells, too
        title = "An answer: the rank of each cell in the decode order;\nwhat the puzzle gives is framed"
    scale = ScalarMappable(Normalize(0, max(*shown["order"], 1)), COLOURS)
    cells, side = cells_of(tok, record, shown, columns)
    drawing, axes = cells_figure(cells, side)
    for cell in cells:
        small = f"{cell['rank']:.0f}" if side else ""
        draw_cell(axes, cell, scale.to_rgba(cell["rank"]), cell["text"], small, cell["given"])
    axes.set_title(title)
    bar = drawing.colorbar(
        scale, ax=axes, orientation="horizontal", label="rank in the decode order", aspect=40, pad=0.02
    )
    bar.locator = MaxNLocator(integer=True)
    return drawing


COLOURS = "cividis"  # from dark blue to yellow, for all eyes


def side_of(record):
    """The side of the puzzle that a record answers; None for any other prompt, and where none is known."""
    prompt = record.get("prompt")
    side = puzzles.side(prompt) if isinstance(prompt, str) else None
    return side if side and len(record["response_ids"]) >= side * side else None


def cells_of(tok, record, shown, columns):
    """The cells of a response and the side of its puzzle, None for other text. record: with the prompt, where it is
    known; shown: the part of it that is drawn. A cell is a dict of x, y, width, text, rank, places and given."""
    prompt, side, cells = record.get("prompt"), side_of(record), []
    for x, y, width, text, rank, places in token_cells(tok, shown, columns):
        cell = dict(x=x, y=y, width=width, text=text, rank=rank, places=places, given=False)
        place = places[0]
        if side:  # what is behind the grid goes on below it
            cell.update(x=place % side, y=place // side, width=1)
        if side and place < side * side:
            cell["given"] = prompt[len(prompt) - side * side + place] != puzzles.BLANK
        if side and shown["response_ids"][place] in tok.stop_ids:
            cell.update(text="end", given=False)
        cells.append(cell)
    return cells, side


def cells_figure(cells, side):
    """A figure with axes for these cells."""
    wide, lines = max(c["x"] + c["width"] for c in cells), max(c["y"] for c in cells) + 1
    height = 0.9 + (0.85 * COLUMN * lines / wide if side else 0.15 * lines)
    drawing, (axes,) = figure(height=height)
    axes.set(xlim=(-0.05, wide + 0.05), ylim=(lines + 0.05, -0.05))
    if side:
        axes.set_aspect("equal")
    axes.set_axis_off()
    return drawing, axes


def draw_cell(axes, cell, colour, text, small="", framed=False, ink=None):
    """One cell: its colour, its text in the middle, and a small text in the corner -> what was drawn. ink: of the text,
    None = black or white."""
    from matplotlib.patches import Rectangle

    x, y, width = cell["x"], cell["y"], cell["width"]
    edge = dict(edgecolor="black" if framed else "white", linewidth=1.2 if framed else 0.3)
    inset = 0.04 if framed else 0.0
    patch = Rectangle((x + inset, y + inset), width - 2 * inset, 1 - 2 * inset, facecolor=colour, **edge)
    bright = 0.3 * colour[0] + 0.59 * colour[1] + 0.11 * colour[2]
    style = dict(color=ink or ("white" if bright < 0.5 else "black"), parse_math=False)
    drawn = [axes.add_patch(patch)]
    middle = dict(ha="center", va="center", **style)
    if not small:
        drawn.append(axes.text(x + width / 2, y + 0.5, text, family="monospace", fontsize=5.5, **middle))
        return drawn
    drawn.append(axes.text(x + 0.5, y + 0.45, text, fontsize=12 if len(text) == 1 else 7, **middle))
    drawn.append(axes.text(x + 0.92, y + 0.92, small, fontsize=6, ha="right", va="bottom", **style))
    return drawn


def token_cells(tok, record, columns):
    """Where each token of a response is drawn: (column, line, width, text, decode rank, its places), in the
    order of the text."""
    cells, x, y = [], 0, 0
    order = record["order"]
    for text, places in tok.pieces(record["response_ids"]):
        seen, width = visible_text(text)
        if x + width > columns and x:
            x, y = 0, y + 1
        rank = sum(order[i] for i in places) / len(places)  # a character may be several tokens
        cells.append((x, y, width, seen, rank, places))
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


@styled
def save_frames(tok, record, file, columns=60):
    """Write a response while it unmasks, as an animation (GIF): a picture for each step, at most FRAMES, coloured by
    the entropy at which a token was decoded, on a log scale. The last picture stays. Of a puzzle, what is given is
    framed, and a cell has its step in the corner.

    record: of a trajectory file: prompt, response_ids, step, entropy and order."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm

    decoded = [i for i, rank in enumerate(record["order"]) if rank >= 0]
    known = [max(record["entropy"][i], LEAST) for i in decoded]
    scale = ScalarMappable(LogNorm(min(known), max(*known, 1.01 * min(known))), COLOURS)
    cells, side = cells_of(tok, record, record, columns)
    drawing, axes = cells_figure(cells, side)
    drawing.colorbar(scale, ax=axes, orientation="horizontal", label="entropy (nats)", aspect=40, pad=0.02)
    waiting, artists, pictures = list(cells), [], []
    for cell in cells:
        given = record["prompt"][cell["places"][0] - side * side] if cell["given"] else ""
        artists.append(draw_cell(axes, cell, (0.9, 0.9, 0.9), given, " " if side else "", cell["given"], "0.6"))
    steps = sorted({record["step"][i] for i in decoded})
    for now in [-1, *steps[:: -(-len(steps) // FRAMES)], steps[-1]]:
        for cell in waiting[:]:
            places = cell["places"]
            when = max(record["step"][i] for i in places)
            if when > now or record["order"][places[0]] < 0:
                continue
            waiting.remove(cell)
            for artist in artists[cells.index(cell)]:
                artist.remove()
            colour = scale.to_rgba(max(record["entropy"][places[0]], LEAST))
            draw_cell(axes, cell, colour, cell["text"], str(when) if side else "", cell["given"])
        axes.set_title(f"step {now + 1} of {steps[-1] + 1}")
        pictures.append(picture_of(drawing))
    times = [1000 // A_SECOND] * (len(pictures) - 1) + [HELD]
    pictures[0].save(file, save_all=True, append_images=pictures[1:], duration=times, loop=0, optimize=True)


def picture_of(drawing):
    """A figure as an image of pillow, which comes with matplotlib; the first call settles where everything stands."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    drawing.set_dpi(120)
    canvas = FigureCanvasAgg(drawing)
    canvas.draw()
    drawing.set_layout_engine("none")
    whole = Image.frombuffer("RGBA", canvas.get_width_height(), bytes(canvas.buffer_rgba()))
    return whole.convert("RGB").quantize(64, dither=Image.Dither.NONE)
