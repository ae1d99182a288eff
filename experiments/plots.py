"""The pictures of the experiments, with matplotlib: the paper's Figures 2 and 3, training curves, one trajectory.

    plots.save(plots.draw_tds(rows), "tds.png")      # rows: dicts, as in the JSON Lines that diagnose.py writes

No window is opened and no global state of matplotlib is used.
"""

import math
import unicodedata
import warnings
from pathlib import Path

import data

CONTEXTS = ("step", "window")  # of the entropies compared: each token's own step, or one window's start for all
METRICS = ("loss", "ce", "ranking", "rank", "in_order", "entropy", "grad_norm")  # drawn where metrics.jsonl has them


def figure(columns=1, rows=1, width=6.0, height=4.0):
    """An empty figure and its axes as a flat list; no window, no global state."""
    try:
        from matplotlib.figure import Figure
    except ImportError as e:
        raise ImportError("pictures need matplotlib: pip install matplotlib") from e
    drawing = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return drawing, list(drawing.subplots(rows, columns, squeeze=False).flat)


def save(drawing, file):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # a character that the font lacks is drawn as a box
        drawing.savefig(file, dpi=150)


def labels(names):
    """A short label for each name of a curve: its path without the folders that all paths share."""
    parts = {name: Path(name).parts for name in names}
    paths = [p[:-1] for p in parts.values() if len(p) > 1]
    shared = 0
    while len(paths) > 1 and all(len(p) > shared and p[shared] == paths[0][shared] for p in paths):
        shared += 1
    return {name: "/".join(p[shared:] if len(p) > 1 else p) for name, p in parts.items()}


def curves(axes, rows, keys, x, y, error=None):
    """One line for each value of the row's keys, with a band of a standard error."""

    def key(row):
        return tuple(row[k] for k in keys)

    short = [labels(dict.fromkeys(row[k] for row in rows)) for k in keys]
    for k in dict.fromkeys(map(key, rows)):
        line = [r for r in rows if key(r) == k and r[y] is not None]
        xs, ys = [r[x] for r in line], [r[y] for r in line]
        label = " on ".join(names[name] for names, name in zip(short, k))
        colour = axes.plot(xs, ys, label=label)[0].get_color()
        if error is not None:
            low, high = ([r[y] + sign * (r[error] or 0) for r in line] for sign in (-1, 1))
            axes.fill_between(xs, low, high, color=colour, alpha=0.2, linewidth=0)
    axes.legend(fontsize="small")


def draw_tds(rows):
    """Figure 2 of the paper: TDS over decoding steps."""
    drawing, (axes,) = figure()
    curves(axes, rows, ["model"], "step", "tds", "tds_se")
    axes.set(xlabel="decoding step", ylabel="TDS (variance of entropies, nats²)")
    return drawing


def draw_loss(rows):
    """Figure 3 of the paper: cross-entropy over the mask ratio."""
    drawing, (axes,) = figure()
    curves(axes, rows, ["model", "data"], "mask_ratio", "loss", "loss_se")
    axes.set(xlabel="mask ratio", ylabel="cross-entropy (nats)", ylim=(0, None))
    return drawing


def draw_inversions(rows):
    drawing, panels = figure(columns=2)
    for axes, context in zip(panels, CONTEXTS):
        curves(axes, [r for r in rows if r["context"] == context], ["model"], "distance", "rate")
        what = "each token's own step" if context == "step" else "the window's start"
        axes.set(
            xlabel="distance in decode order", ylabel="hard before easy", title=f"entropies at {what}", ylim=(0, 1)
        )
    return drawing


def draw_training(metrics):
    """Training curves: one panel for each metric, one line for each run."""
    shown = [k for k in METRICS if any(k in row for rows in metrics.values() for row in rows)]
    columns = min(3, len(shown))
    drawing, panels = figure(columns, math.ceil(len(shown) / columns), width=4.5, height=3.0)
    for axes, k in zip(panels, shown):
        rows = [dict(row, run=name) for name, lines in metrics.items() for row in lines if k in row]
        curves(axes, rows, ["run"], "step", k)
        axes.set(xlabel="step", ylabel=k)
    for axes in panels[len(shown) :]:
        axes.set_axis_off()
    return drawing


def draw_trajectory(tok, record, columns=100):
    """A response up to its first EOS: every token in its place, coloured by the rank at which it was decoded."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.patches import Rectangle

    shown = data.cut_at_eos(record, tok.stop_ids)
    ids, order = shown["response_ids"], shown["order"]
    cells, x, y = [], 0, 0  # (column, line, width, text, rank)
    for text, places in tok.pieces(ids):
        seen = text.replace("\n", "↵").replace("\t", "→")
        seen = "".join(ch if ch.isprintable() else "·" for ch in seen)
        width = max(1, sum(2 if unicodedata.east_asian_width(ch) in "WF" else 1 for ch in seen))
        if x + width > columns and x:
            x, y = 0, y + 1
        cells.append((x, y, width, seen, sum(order[i] for i in places) / len(places)))
        x, y = (0, y + 1) if "\n" in text else (x + width, y)
    wide, lines = max(c[0] + c[2] for c in cells), max(c[1] for c in cells) + 1
    drawing, (axes,) = figure(width=max(4.0, 0.09 * wide + 0.5), height=0.22 * lines + 1.2)
    scale = ScalarMappable(Normalize(0, max(len(ids) - 1, 1)), colormaps["viridis"])
    for x, y, width, text, rank in cells:
        axes.add_patch(Rectangle((x, y), width, 1, facecolor=scale.to_rgba(rank), edgecolor="white", linewidth=0.3))
        colour = "white" if rank < 0.6 * len(ids) else "black"
        style = dict(family="monospace", fontsize=8, color=colour, ha="center", va="center", parse_math=False)
        axes.text(x + width / 2, y + 0.5, text, **style)
    axes.set(xlim=(0, wide), ylim=(lines, 0))
    axes.set_axis_off()
    drawing.colorbar(scale, ax=axes, orientation="horizontal", label="rank in the decode order", aspect=50)
    return drawing


def draw_accuracy(rows):
    """Accuracy over training, one curve per model."""
    drawing, (axes,) = figure()
    if rows:
        curves(axes, rows, ["model"], "epoch", "accuracy", "accuracy_se")
    axes.set(xlabel="epoch", ylabel="in-domain validation %")
    return drawing
