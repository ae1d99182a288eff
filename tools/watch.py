"""A response while it unmasks: on a terminal in colour, in a file as lines.

    watch = Watch(tok, mask_id, prompt, above="user: ...\\n", delay=0.1)
    t = decode.generate(m, ids, on_step=watch)
    watch.end()                                # the last picture stays: steps, tokens a step, the curve of entropies

A token's colour is its entropy at the step that decoded it, on a log scale between the least and the largest entropy
so far, so that colours differ for a model that is sure of everything, too; a line below says both ends in nats. A
puzzle of puzzles.py is shown as its grid, any other text with its line breaks.
"""

import math
import re
import sys
import time

from experiments import puzzles

MASKED, END = "\u00b7", "-"  # what stands for a mask, and in a grid for a token that ends the response
COLOURS = (27, 33, 39, 45, 50, 84, 154, 226, 220, 214, 208, 202)  # of 256 of a terminal, sure to unsure
CODE = re.compile("\x1b\\[[0-9;]*m")  # a colour of the terminal
LEAST = 1e-4  # nats: entropies below are drawn as this one
BARS = "▁▂▃▄▅▆▇█"
CURVE = 48  # characters of the curve of entropies


class Scale:
    """The place of an entropy, from 0 to 1, on a log scale between the least and the largest one that it was given."""

    def __init__(self, entropies):
        known = [max(h, LEAST) for h in entropies if not math.isnan(h)]
        self.low, self.high = (min(known), max(known)) if known else (LEAST, LEAST)

    def __call__(self, h):
        if self.high <= self.low:
            return 0.0
        place = math.log(max(h, LEAST) / self.low) / math.log(self.high / self.low)
        return min(max(place, 0.0), 1.0)

    def of(self, h, steps):
        """The one of a few steps, such as colours, that an entropy has."""
        return steps[min(int(self(h) * len(steps)), len(steps) - 1)]


class Watch:
    """Shows a response on stderr after every step: on_step of decode.generate, for one row.

    tok, mask_id: of the model. prompt: a text, which may be a puzzle. above: lines that stand above the response.
    delay: seconds between two pictures."""

    def __init__(self, tok, mask_id, prompt="", above="", delay=0.0):
        self.tok, self.mask_id, self.above, self.delay = tok, mask_id, above, delay
        self.side = puzzles.side(prompt)
        self.given = prompt[-(self.side**2) :] if self.side else ""
        self.terminal, self.waited = sys.stderr.isatty(), 0.0  # waited: seconds that showing has taken
        self.steps, self.last = 0, None  # ids, entropies, and the step that decoded each token, None for a mask

    def __call__(self, step, response, entropy):
        begun = time.perf_counter()
        ids, nats = response[0].tolist(), entropy[0].tolist()
        if len(ids) < len(self.given):
            self.side = None  # the whole puzzle is not asked for
        when = self.last[2] if self.last else [None] * len(ids)
        for i, token in enumerate(ids):
            if token != self.mask_id and when[i] is None:
                when[i] = step
        self.steps, self.last = self.steps + 1, (ids, nats, when)
        self.draw(step)
        time.sleep(self.delay)
        self.waited += time.perf_counter() - begun

    def draw(self, step):
        """One picture: of a terminal the whole screen, of a file a line."""
        ids, nats, when = self.last
        if self.terminal:
            body = self.puzzle(ids, nats, when) if self.side else self.text(ids, nats)
            self.say(f"\x1b[H\x1b[2J{self.above}step {step}\n{body}\n{self.legend(nats)}")
        else:
            self.say(f"step {step}: {self.text(ids, nats)}".replace("\n", "↵"))

    def end(self):
        """What stays: a puzzle's grid where only lines were written, and a line about the whole response."""
        if self.last is None:
            return
        ids, nats, when = self.last
        if self.side and not self.terminal:
            self.say(self.puzzle(ids, nats, when))
        self.say(self.summary())

    def say(self, text):
        print(text, file=sys.stderr, flush=True)

    def text(self, ids, nats):
        """The response as it reads, each token in the colour of its entropy."""
        cells, scale = [], Scale(nats)
        for text, places in self.tok.pieces(ids, self.mask_id):
            if text is None:
                cells.append(self.coloured(MASKED, 2))
            elif ids[places[0]] not in self.tok.stop_ids:
                cells.append(self.coloured(text, 38, 5, scale.of(nats[places[0]], COLOURS)))
        return "".join(cells)

    def puzzle(self, ids, nats, when):
        """A puzzle, the answer and the step of every cell, side by side."""
        cells, scale, count = letters(self.tok, ids, self.mask_id), Scale(nats), self.side**2
        for i, cell in enumerate(cells):
            if cell == MASKED:
                cells[i] = self.coloured(cell, 2)
            else:
                cells[i] = self.coloured(cell, 38, 5, scale.of(nats[i], COLOURS))
        steps = [MASKED if step is None else step for step in when[:count]]
        blocks = [("the puzzle", grid(self.given)), ("the answer", grid(cells[:count]))]
        return side_by_side([*blocks, ("the step of each cell", grid(steps, width=2))])

    def legend(self, nats):
        """The colours and what they mean."""
        scale = Scale(nats)
        bar = "".join(self.coloured("■", 38, 5, colour) for colour in COLOURS)
        return f"entropy {scale.low:.2g} {bar} {scale.high:.2g} nats"

    def summary(self):
        """Steps, tokens a step, and the curve: the mean entropy of the tokens of each step, on the scale of the
        colours."""
        _, nats, when = self.last
        by_step = {}
        for step, h in zip(when, nats):
            if step is not None:
                by_step.setdefault(step, []).append(h)
        means = [sum(by_step[step]) / len(by_step[step]) for step in sorted(by_step)]
        scale, count = Scale(nats), sum(map(len, by_step.values()))
        curve = "".join(scale.of(h, BARS) for h in thinned(means, CURVE))
        ends = f"{scale.low:.2g} to {scale.high:.2g} nats"
        return f"{self.steps} steps, {count / self.steps:.1f} tokens a step; entropy by step {curve} {ends}"

    def coloured(self, text, *codes):
        """The text in a colour of the terminal; as it is in a file."""
        return f"\x1b[{';'.join(map(str, codes))}m{text}\x1b[0m" if self.terminal else text


def thinned(values, most):
    """At most so many values: the means of neighbours."""
    size = -(-len(values) // most) if values else 1
    found = []
    for i in range(0, len(values), size):
        some = values[i : i + size]
        found.append(sum(some) / len(some))
    return found


# ------------------------------------------------------------------------------------------------------ puzzles as text


def letters(tok, ids, mask_id=None):
    """A character for every token of a puzzle's answer: MASKED for a mask, END for what ends the response."""
    found = []
    for token in ids:
        if token == mask_id:
            found.append(MASKED)
        else:
            found.append(END if token in tok.stop_ids else tok.decode([token]))
    return found


def grid(cells, width=1, wrong=()):
    """The rows of a square of cells as texts. wrong: the cells that have a ! before them."""
    n, rows = math.isqrt(len(cells)), []
    for start in range(0, n * n, n):
        row = []
        for i in range(start, start + n):
            cell = f"{'!' if i in wrong else ''}{cells[i]}"
            row.append(" " * (width + bool(wrong) - seen(cell)) + cell)
        rows.append(" ".join(row))
    return rows


def seen(text):
    """The width of a text without the codes of a terminal."""
    return len(CODE.sub("", text))


def side_by_side(blocks):
    """Blocks of equally many rows, (title, rows), as one text, the titles above."""
    columns = []
    for block in blocks:
        title, rows = block
        wide = max(map(seen, (title, *rows)))
        columns.append([text + " " * (wide - seen(text)) for text in (title, *rows)])
    return "\n".join("   ".join(line).rstrip() for line in zip(*columns))
