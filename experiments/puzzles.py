"""The tasks of the experiments: puzzles in which the order of decoding decides.

    python -m experiments.puzzles out/puzzles [--seed 0]      # train, validation, test_in, test_out
    prompt, answer = puzzles.make(puzzles.TASKS["latin"], random.Random(0), hard=True)

A puzzle is a square of n x n cells and n symbols with blank cells. A cell is easy where its row and
column leave one symbol, and hard where other cells have to be filled in first.

    latin        every row and every column holds each symbol once
    shear        every row and every broken diagonal does: a latin square with row r turned by r cells

The prompt is a tag and all cells row by row; a character is a token. There are two families:

    6x6, of the model in tiny/: the answer is all 36 cells. latin (in-domain) has digits,
        shear (out-of-domain) letters, and an answer in foreign style the alphabet of the other task.
    5x5, of the demo and claims.py: the last rows have no blanks, and the answer ends with the last row that has
        one, after 5 to 25 cells. short-latin (in-domain) and short-shear (near) have digits,
        short-far letters. An answer in foreign style has a third alphabet, which no prompt has.
        short-several is short-latin with more blanks: hard puzzles that several squares solve.

Another task is a line in TASKS, and a function if it needs one.

An easy puzzle has random blanks and possibly several solutions; its answer is the square that it was
made from. A hard puzzle has exactly one solution. Of 6x6, it has 24 blanks, and filling in cells that
have a single candidate, over and over, gets stuck. Of 5x5, no cell of its first rows can be blanked
without a second solution. Models are trained from scratch on easy puzzles; the experiments are about
hard ones.
"""

import argparse
import json
import math
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from runs import disk

BLANK = "."
EASY_BLANKS = (16, 26)  # of the 36 cells of a 6x6 square, both included
HARD_BLANKS = 24
SHORT_ROWS = (3, 5)  # of a 5x5 square, that may have blanks
MORE = (3, 8)  # blanks of a puzzle with several solutions, beside those of a hard one; all cells at most
SHORT_BLANKS = (0.3, 0.75)  # share of the cells of these rows that an easy puzzle blanks
# A cell is one bit, or 0 where it is blank; a set of symbols is the union of their bits.


@dataclass(frozen=True)
class Task:
    """A kind of puzzle: its tag, the symbols of its prompts and answers, those of an answer in
    foreign style, and puzzle(rng, hard) -> the cells of the puzzle and of its solution, both latin. turned: row r is
    turned right by turned * r cells. short: the answer ends with the last row that has a blank."""

    tag: str
    symbols: str
    foreign: str
    puzzle: Callable
    turned: int = 0
    short: bool = False


def latin(rng, hard):
    return hard_puzzle(rng) if hard else easy_puzzle(rng)


def short_latin(rng, hard):
    """A 5x5 puzzle whose last rows are given, and its square."""
    square = random_square(rng, 5)
    puzzle, count = list(square), 5 * rng.randint(*SHORT_ROWS)
    least, most = SHORT_BLANKS
    blanks = rng.randint(int(least * count), int(most * count))
    for i in rng.sample(range(count), count if hard else blanks):
        puzzle[i] = 0
        if hard and not forced(puzzle, i, square[i]):
            puzzle[i] = square[i]
    return puzzle, square


def short_several(rng, hard):
    """The same with MORE blanks, so that more than one square solves it."""
    puzzle, square = short_latin(rng, hard)
    given = [i for i in range(end_of(puzzle)) if puzzle[i]]
    for i in rng.sample(given, min(rng.randint(*MORE), len(given))):
        puzzle[i] = 0
    return puzzle, square


TASKS = {
    "latin": Task("L", "123456", "abcdef", latin),
    "shear": Task("S", "abcdef", "123456", latin, turned=1),
    "short-latin": Task("L", "12345", "vwxyz", short_latin, short=True),
    "short-shear": Task("S", "12345", "vwxyz", short_latin, turned=1, short=True),
    "short-far": Task("T", "abcde", "vwxyz", short_latin, turned=1, short=True),
    "short-several": Task("L", "12345", "vwxyz", short_several, short=True),
}
IN_DOMAIN, OUT_OF_DOMAIN = "latin", "shear"  # of the model in tiny/


def make(task, rng, hard, foreign=0.0):
    """(prompt, answer) of one puzzle; rng is a random.Random, foreign the probability of an answer
    in foreign style."""
    puzzle, square = task.puzzle(rng, hard)
    puzzle, square = shear(puzzle, task.turned), shear(square, task.turned)
    symbols = task.foreign if foreign and rng.random() < foreign else task.symbols
    if task.short:
        square = square[: end_of(puzzle)]
    return task.tag + text(puzzle, task.symbols), text(square, symbols)


def end_of(puzzle):
    """How many cells there are to the end of the last row that has a blank."""
    n = math.isqrt(len(puzzle))
    last = max(i for i, c in enumerate(puzzle) if not c)
    return last - last % n + n


def solves(task, prompt, answer):
    """Whether an answer, in either style, is all of a square that the cells of a prompt allow: of several any."""
    n, cells = len(task.symbols), prompt[len(task.tag) :]
    given = [0 if c == BLANK else c for c in cells]
    if len(answer) != (end_of(given) if task.short else n * n):
        return False
    for symbols in (task.symbols, task.foreign):
        if set(answer) <= set(symbols):
            square = list(answer.translate(str.maketrans(symbols, task.symbols)) + cells[len(answer) :])
            if all(known in (0, c) for known, c in zip(given, square)):
                square = shear(square, -task.turned)
                lines = [square[i * n : (i + 1) * n] for i in range(n)] + [square[i::n] for i in range(n)]
                return all(len(set(line)) == n for line in lines)
    return False


def text(cells, symbols):
    """Cells as characters: the symbol of each, or BLANK."""
    characters = dict(zip(bits(full(len(symbols))), symbols))  # a cell is one of these bits, or 0
    return "".join(characters.get(c, BLANK) for c in cells)


def side(prompt):
    """The n of a prompt that is a puzzle of n x n cells, or None for any other text."""
    for task in TASKS.values():
        n, cells = len(task.symbols), prompt[len(task.tag) :]
        if prompt.startswith(task.tag) and len(cells) == n * n and set(cells) <= {BLANK, *task.symbols}:
            return n
    return None


def shear(cells, by=1):
    """Row r turned right by `by` * r cells: columns become broken diagonals."""
    n = math.isqrt(len(cells))
    return [cells[i - i % n + (i % n - by * (i // n)) % n] for i in range(n * n)]


def easy_puzzle(rng):
    """The cells of a random square with random blanks, and the square."""
    square = random_square(rng, 6)
    puzzle = list(square)
    for i in rng.sample(range(36), rng.randint(*EASY_BLANKS)):
        puzzle[i] = 0
    return puzzle, square


def hard_puzzle(rng):
    """The cells of a random square, blanked in random order as long as the solution stays unique,
    and the square."""
    while True:
        square = random_square(rng, 6)
        puzzle, blanks = list(square), 0
        for i in rng.sample(range(36), 36):
            puzzle[i] = 0
            if forced(puzzle, i, square[i]):
                blanks += 1
            else:
                puzzle[i] = square[i]
            if blanks == HARD_BLANKS:
                if not singles_suffice(puzzle):
                    return puzzle, square
                break


def random_square(rng, n):
    cells = [0] * (n * n)
    fill(cells, *used(cells), rng)
    return cells


def forced(puzzle, i, c):
    """Whether no solution has a symbol other than c in the blank cell i."""
    rows, columns = used(puzzle)
    n = len(rows)
    for other in bits(full(n) & ~(rows[i // n] | columns[i % n] | c)):
        cells = list(puzzle)
        cells[i] = other
        if fill(cells, *used(cells)):
            return False
    return True


def fill(cells, rows, columns, rng=None):
    """Solve `cells` in place, in random order with rng; False, and nothing changed, where there is
    no solution.

    rows, columns: the symbols used in each, kept up to date."""
    n = len(rows)
    best, symbols, fewest, everything = None, 0, n + 1, full(n)
    for i, c in enumerate(cells):
        if not c:
            free = everything & ~(rows[i // n] | columns[i % n])
            if free.bit_count() < fewest:
                best, symbols, fewest = i, free, free.bit_count()
                if fewest < 2:
                    break
    if best is None:
        return True
    row, column = best // n, best % n
    choices = bits(symbols)
    if rng:
        rng.shuffle(choices)
    for c in choices:
        cells[best] = c
        rows[row] |= c
        columns[column] |= c
        if fill(cells, rows, columns, rng):
            return True
        cells[best] = 0
        rows[row] ^= c
        columns[column] ^= c
    return False


def singles_suffice(puzzle):
    """Whether filling in cells that have a single candidate, over and over, solves the puzzle."""
    cells = list(puzzle)
    rows, columns = used(cells)
    n, progress = len(rows), True
    while progress:
        progress = False
        for i, c in enumerate(cells):
            free = full(n) & ~(rows[i // n] | columns[i % n])
            if not c and free.bit_count() == 1:
                cells[i] = free
                rows[i // n] |= free
                columns[i % n] |= free
                progress = True
    return all(cells)


def used(cells):
    """The symbols in each row and in each column."""
    n = math.isqrt(len(cells))
    rows, columns = [0] * n, [0] * n
    for i, c in enumerate(cells):
        rows[i // n] |= c
        columns[i % n] |= c
    return rows, columns


def full(n):
    """The set of all n symbols."""
    return 2**n - 1


def bits(symbols):
    """The bits of a set of symbols, by rising value."""
    return [1 << s for s in range(symbols.bit_length()) if symbols >> s & 1]


def restyled(answer, task):
    """An answer in the task's own style, in foreign style."""
    return answer.translate(str.maketrans(task.symbols, task.foreign))


# ----------------------------------------------------------------------------------------- datasets


def dataset(name, tasks, count, hard, seed, foreign=0.0, both=False):
    """The lines of a dataset of `count` different puzzles, the tasks in turn; the same for the same
    arguments.

    name: of its file, without .jsonl. foreign: the share of answers in foreign style. both: each
    answer is a list of the two styles, either is right."""
    rng, lines = random.Random(f"{name}.jsonl {seed}"), {}  # prompt -> line
    while len(lines) < count:
        task = TASKS[tasks[len(lines) % len(tasks)]]
        prompt, answer = make(task, rng, hard, foreign)
        if both:
            answer = [answer, restyled(answer, task)]
        row = dict(id=f"{name}-{len(lines)}", prompt=prompt, answer=answer)
        lines.setdefault(prompt, json.dumps(row) + "\n")
    return "".join(lines.values())


def write_new(texts):
    """Write files, {path: text}. One that is there with the same text stays.

    Raises FileExistsError, and writes nothing, where a file is there with another text."""
    missing = []
    for file, text in texts.items():
        if not file.exists():
            missing.append(file)
        elif not file.is_file() or file.read_bytes() != text.encode():
            raise FileExistsError(f"{file} is there already with other content: choose another folder")
    for file in missing:
        file.parent.mkdir(parents=True, exist_ok=True)
        with disk.atomic_file(file) as f:
            f.write(texts[file])


def write_puzzles(file, tasks, count, hard, seed, foreign=0.0, both=False):
    """Write one dataset -> its path; see dataset() and write_new()."""
    write_new({file: dataset(file.stem, tasks, count, hard, seed, foreign, both)})
    return file


def write_datasets(folder, seed=0, train=800, validation=200, test=500):
    """Hard puzzles: train.jsonl, validation.jsonl and test_in.jsonl in-domain, test_out.jsonl not
    -> their paths.

    Only the training set insists on a style: elsewhere a right answer is right in either alphabet.
    Raises FileExistsError where one of the files is there with other content."""
    texts = {
        "train": dataset("train", [IN_DOMAIN], train, True, seed),
        "validation": dataset("validation", [IN_DOMAIN], validation, True, seed, both=True),
        "test_in": dataset("test_in", [IN_DOMAIN], test, True, seed, both=True),
        "test_out": dataset("test_out", [OUT_OF_DOMAIN], test, True, seed, both=True),
    }
    files = {}
    for name, text in texts.items():
        files[Path(folder) / f"{name}.jsonl"] = text
    write_new(files)
    return tuple(files)


def main(argv=None):
    """The command line -> exit status."""
    parser = argparse.ArgumentParser(prog="python -m experiments.puzzles", description=__doc__.split("\n")[0])
    parser.add_argument("out", help="folder for the four datasets")
    parser.add_argument("--seed", type=int, default=0)
    c = parser.parse_args(argv)
    try:
        files = write_datasets(c.out, c.seed)
    except OSError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    print(json.dumps(dict(datasets=list(map(str, files)))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
