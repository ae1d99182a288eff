"""Pictures of one trajectory: every token in its place, and an animation of how it unmasks.

    plots.save(pictures.draw_trajectory(tok, record), "trajectory.png")
    pictures.save_frames(tok, record, "x.gif")

record: of a trajectory file. The prompt of a puzzle has its answer drawn as a grid. matplotlib is imported where it is
used."""

import unicodedata

import data
from experiments import plots, puzzles

COLOURS = "cividis"  # from dark blue to yellow, for all eyes
FRAMES = 80  # pictures of an animation, at most
A_SECOND = 8  # of them
HELD = 3000  # milliseconds for which the last one stays
LEAST = 1e-4  # nats: entropies below are drawn as this one


@plots.styled
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
    height = 0.9 + (0.85 * plots.COLUMN * lines / wide if side else 0.15 * lines)
    drawing, (axes,) = plots.figure(height=height)
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


@plots.styled
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
