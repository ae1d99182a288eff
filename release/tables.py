"""The papers' tables, their numbers beside ours, from the run folders that are there.

    python tabom.py tables out --table 3,4
    python tabom.py tables out --paper t3d --format latex --out tables.tex

A cell shows the paper's number, then ours with its 95 % interval, each with its gain over the row that the paper
compares with. A cell without a run is empty, and the commands that would fill it are listed; so is every folder that
has no place, with the reason. release/paper.json has the papers' numbers and says which run a cell is of.
"""

import csv
import io
import itertools
import math
import os
from dataclasses import dataclass
from pathlib import Path

from release import commands, found
from release.published import PAPER
from runs import disk
from runs.options import name_list, opt

FORMATS = ("markdown", "csv", "latex")


def epoch(text):
    """ "last" or a number of at least 1; raises ValueError for anything else."""
    if text != "last" and not (text.isdecimal() and int(text)):
        raise ValueError("must be last, or the number of an epoch")
    return text if text == "last" else int(text)


@dataclass
class TablesOptions:
    """the tables"""

    folders: tuple = opt(
        ("out",), "folders of evaluate, diagnose and train, or with such folders in them", parse=str, nargs="*",
        positional=True,
    )  # fmt: skip
    paper: str = opt("tabom", "whose tables: tabom (2 to 7 and 9), t3d (1 to 7)", choices=tuple(found.PAPERS))
    table: tuple | None = opt(None, "only these tables, comma-separated (all)", parse=name_list)
    format: str = opt("markdown", "how they are written; csv: a line for each cell", choices=FORMATS)
    protocol: str = opt(
        "paper",
        "of tabom: the protocol of the evaluations that are shown",
        choices=("paper", "release"),
        idle=dict(paper="t3d"),
    )
    epoch: int | str = opt(
        "last", "which epoch of a run is shown: a number, or the last that is evaluated", parse=epoch
    )
    base: tuple = opt((), "names of other base models to show, without the paper's numbers", parse=name_list)
    math: tuple = opt(("prm12k", "math_train"), "data is mathematics if its name has one of these", parse=name_list)
    code: tuple = opt(
        ("ling-coder", "ling_coder", "prime_code"), "data is code if its name has one of these",
        parse=name_list,
    )  # fmt: skip
    out: str | None = opt(None, "file to write the tables into, instead of stdout")


@dataclass
class Entry:
    """A place in a table."""

    column: str
    where: dict  # which cell belongs here
    paper: float | None
    cell: found.Cell | None = None


@dataclass
class Section:
    """A part of a table: one base model, most often."""

    label: str
    rows: dict  # label -> [Entry]


def tables(c):
    """Print the tables -> how many folders were read and used, those left out with the reason, and empty cells.

    c: TablesOptions. Raises ValueError for a table that there is not, FileNotFoundError for a folder."""
    known = PAPER["tables"][c.paper]
    for number in c.table or ():
        if number not in known:
            raise ValueError(f"--table {number}: there are numbers of {', '.join(known)} in --paper {c.paper}")
    cells, left_out, folders = found.find(c)
    made, entries = {}, []
    for number in c.table or known:
        made[number] = fill(known[number], cells, c, left_out)
        entries += entries_of(made[number])
    shown = [entry.cell for entry in entries if entry.cell is not None]
    used = {os.path.realpath(folder) for cell in shown for folder in (cell.folder, cell.run)}
    told = {os.path.realpath(folder) for folder, _ in left_out}
    for cell in cells:
        if os.path.realpath(cell.folder) not in used | told:
            left_out.append((cell.folder, f"{said(cell)}: no cell of these tables is left for it"))
    left_out = list(dict.fromkeys(left_out))  # what two tables say of a folder, once
    missing = missing_commands(c, entries)
    text = WRITERS[c.format](c, known, made, list(map(": ".join, left_out)), missing)
    if c.out is None:
        print(text)
    else:
        with disk.atomic_file(Path(c.out)) as f:
            f.write(text + "\n")
    result = dict(paper=c.paper, tables=list(made), read=len(folders))
    result["used"] = sum(os.path.realpath(folder) in used for folder in folders)
    result["left_out"] = [dict(folder=folder, reason=reason) for folder, reason in left_out]
    return dict(result, cells=len(entries), filled=len(shown), commands=len(flat(missing)), out=c.out)


def said(cell):
    """What a cell is of, in words."""
    known = dict(cell.where, epoch=cell.epoch)
    return ", ".join(f"{name} {value}" for name, value in known.items() if value is not None)


def entries_of(sections):
    """All entries of some sections."""
    return [entry for section in sections for row in section.rows.values() for entry in row]


# ----------------------------------------------------------------------------------------- which cell goes where


def fill(table, cells, c, left_out):
    """The sections of a table, with the cells that belong there. Which of them do not compare goes into left_out."""
    sections = []
    for label, section in table["sections"].items():
        sections.append(Section(label, rows_of(table, section["where"], section["rows"])))
    shown = {cell.where["base"] for cell in cells if cell.where["base"] in c.base}
    for base in sorted(shown) if by_base(table) else ():
        without = dict.fromkeys(next(iter(table["sections"].values()))["rows"])
        sections.append(Section(base, rows_of(table, dict(base=base), without)))
    for section in sections:
        if "TABOM" in section.rows:
            add_authors_row(section, cells)
        for label, row in section.rows.items():
            for entry in row:
                entry.cell = choose(cells, entry, c, f"{section.label}, {label}, {entry.column}", left_out)
        drop_other_questions(section, table["gains_over"], left_out)
        say_empty_averages(section, table["averages"], left_out)
    return sections


def say_empty_averages(section, averages, left_out):
    """Say in left_out which averages are empty because their cells are of several models."""
    for (label, row), (average, members) in itertools.product(section.rows.items(), averages.items()):
        cells = [entry.cell for entry in row if entry.column in members]
        if all(cells) and not of_one_model(cells):
            where = f"{section.label}, {label}, {average}"
            left_out.append((cells[-1].folder, f"{where}: empty, its cells are of other runs or epochs of a run"))


def of_one_model(cells):
    """Whether cells are of one checkpoint; where a row has models of two data sets, as T3D's Table 1 has, one each."""
    models = {}  # data -> the run and epoch
    return all(models.setdefault(cell.where["data"], cell.run_and_epoch) == cell.run_and_epoch for cell in cells)


def by_base(table):
    """Whether the sections of a table are base models and nothing else, so that another one fits in."""
    return all(section["where"] == dict(base=label) for label, section in table["sections"].items())


def rows_of(table, where, rows):
    """label -> [Entry] of a section. rows: label -> the paper's numbers, or None for none."""
    made = {}
    for label, numbers in rows.items():
        row = {**PAPER["rows"].get(label, {}), **table.get("rows", {}).get(label, {})}
        made[label] = []
        for i, (column, is_of) in enumerate(table["columns"].items()):
            asked = {**table["where"], **where, **is_of, **row}
            made[label].append(Entry(column, asked, None if numbers is None else numbers[i]))
    return made


def add_authors_row(section, cells):
    """A row for the adapters that the authors trained, where some are evaluated: the paper's numbers are of these."""
    row = []
    for entry in section.rows["TABOM"]:
        where = dict(entry.where, method=found.AUTHORS_ROW)
        del where["window"]  # which their folder does not say
        row.append(Entry(entry.column, where, entry.paper))
    if any(fits(cell, entry) for cell in cells for entry in row):
        section.rows[found.AUTHORS_ROW] = row


def fits(cell, entry):
    """Whether a cell is what an entry asks for."""
    return entry.where.items() <= cell.where.items()


def choose(cells, entry, c, label, left_out):
    """The one cell that belongs to an entry, or None. Of a run's epochs it is that of --epoch; of runs that differ in
    margin and weight the one with the recipe's; of equal measurements of one model the first. Where several are left
    none is shown, and all are in left_out."""
    fitting = [cell for cell in cells if fits(cell, entry)]
    latest = {}
    for cell in fitting:
        latest[cell.run] = max(cell.epoch or 0, latest.get(cell.run, 0))
    chosen = []
    for cell in fitting:
        wanted = latest[cell.run] if c.epoch == "last" else c.epoch
        if cell.epoch in (None, wanted):
            chosen.append(cell)
    if len(chosen) > 1:
        chosen = [cell for cell in chosen if cell.recipe.items() <= cell.where.items()] or chosen
    if len(chosen) > 1 and any(cell.measured != chosen[0].measured for cell in chosen):
        for cell in chosen:
            others = ", ".join(other.folder for other in chosen if other is not cell)
            left_out.append((cell.folder, f"{label}: {others} has it too, so it is empty; name the folders to show"))
        return None
    return chosen[0] if chosen else None


def drop_other_questions(section, first, left_out):
    """Take out the cells that do not compare with the row `first`, or else with the first cell of the same benchmark:
    other questions, another number of them, or another base model's weights."""
    order = sorted(section.rows, key=lambda label: label != first)  # that row before the others
    against = {}
    for label in order:
        for entry in section.rows[label]:
            if entry.cell is None:
                continue
            measured = (entry.where["task"], entry.where["measure"])
            other = against.setdefault(measured, entry.cell)
            mine, theirs = dict(entry.cell.same, n=entry.cell.n), dict(other.same, n=other.n)
            differ = [name for name in mine if mine[name] != theirs.get(name)]
            if differ:
                what = f"{section.label}, {label}, {entry.column}"
                line = f"{what}: does not compare with {other.folder}, other {', '.join(differ)}"
                left_out.append((entry.cell.folder, line))
                entry.cell = None


# ------------------------------------------------------------------------------------------------ numbers


def combined(terms):
    """The sum of weight * value over independent terms (weight, value, low, high) -> (value, low, high).

    The interval follows from those of the terms: MOVER (Zou and Donner, 2008), for a difference of two shares
    Newcombe's (1998). Two models answer the same questions, so that a difference varies less than this says."""
    total = below = above = 0.0
    for weight, value, low, high in terms:
        total += weight * value
        if low is None:
            below = above = math.inf
            continue
        down, up = weight * (value - low), weight * (high - value)
        if weight < 0:
            down, up = -up, -down
        below, above = below + down**2, above + up**2
    if math.isinf(below):
        return total, None, None
    return total, total - math.sqrt(below), total + math.sqrt(above)


def terms_of(entries, weight=1.0):
    """Terms of combined(): the mean of some entries' cells times a weight; None where a cell is missing, or where they
    are not of one model."""
    cells = [entry.cell for entry in entries]
    if not cells or not all(cells) or not of_one_model(cells):
        return None
    return [(weight / len(cells), cell.value, cell.low, cell.high) for cell in cells]


def paper_mean(entries):
    """The mean of the paper's numbers; None where one is missing."""
    numbers = [entry.paper for entry in entries]
    return None if None in numbers else sum(numbers) / len(numbers)


def numbers_of(row, base):
    """What a place shows -> dict(paper, paper_gain, ours, gain); a number of ours is (value, low, high), None for none.

    row: its entries, several for an average. base: those of the row that it is compared with, or None."""
    ours, shown = terms_of(row), dict(paper=paper_mean(row), paper_gain=None, ours=None, gain=None)
    if ours:
        shown["ours"] = combined(ours)
    if base is not None and base is not row:
        before, theirs = terms_of(base, -1.0), paper_mean(base)
        if ours and before:
            shown["gain"] = combined([*ours, *before])
        if None not in (shown["paper"], theirs):
            shown["paper_gain"] = shown["paper"] - theirs
    return shown


def places(table, section, label):
    """Yield (title, entries, those of the row that it is compared with or None) along a row: its columns, with each
    average behind the last column that is in it."""
    row, first = section.rows[label], table["gains_over"]
    base = None if first in (None, label) else section.rows.get(first)
    titles = [entry.column for entry in row]
    for i, title in enumerate(titles):
        yield title, [row[i]], base and [base[i]]
        for average, members in table["averages"].items():
            if members[-1] == title:
                at = list(map(titles.index, members))
                yield average, [row[k] for k in at], base and [base[k] for k in at]


# ------------------------------------------------------------------------------------------------ texts


def missing_commands(c, entries):
    """{row and decoding: [commands]} for the empty cells of the paper's models. A command names all benchmarks of its
    row, those that are there too: results.json has the scores of the last call."""
    groups = {}
    for entry in entries:
        where = {"decoding": "full", **entry.where}
        measure = where.pop("measure")
        if measure is None or where["base"] not in found.CHECKPOINTS:  # T3D's latency has no unit
            continue
        task = where.pop("task")
        group = groups.setdefault(tuple(sorted(map(str, where.items()))), dict(where=where, tasks={}, empty={}))
        group["tasks"][task] = True
        if entry.cell is None:
            group["empty"][task, measure] = True
    made = {}
    for key, group in groups.items():
        if group["empty"]:
            tds = [task for task, measure in group["empty"] if measure == "tds"]
            made[key] = commands.lines(c, group["where"], tuple(group["tasks"]), tds)
    return made


def flat(missing):
    """All commands, each once."""
    return list(dict.fromkeys(itertools.chain.from_iterable(missing.values())))


def cells_of_place(shown, digits):
    """The two texts of a place: the paper's number and ours."""
    paper, ours = "", ""
    if shown["paper"] is not None:
        paper = f"{shown['paper']:.{digits}f}"
        if shown["paper_gain"] is not None:
            paper += f" ({shown['paper_gain']:+.{digits}f})"
    if shown["ours"] is not None:
        ours = with_interval(shown["ours"], digits)
        if shown["gain"] is not None:
            ours += f" ({with_interval(shown['gain'], digits, '+')})"
    return paper, ours


def with_interval(number, digits, sign=""):
    """ "84.31 [82.2, 86.2]" """
    value, low, high = number
    text = f"{value:{sign}.{digits}f}"
    return text if low is None else f"{text} [{low:{sign}.{digits - 1}f}, {high:{sign}.{digits - 1}f}]"


def grid(table, section):
    """(titles, lines) of a section, all texts: a column for the paper's number and one for ours, for each benchmark."""
    digits, titles, lines = 2, [section.label], []
    if table["where"].get("measure") == "tds":
        digits = 3
    for label in section.rows:
        line = [label]
        for title, row, base in places(table, section, label):
            if not lines:
                titles += [title, "ours"]
            line += cells_of_place(numbers_of(row, base), digits)
        lines.append(line)
    return titles, lines


def runs_of(made):
    """A line for each model and folder that is shown, with its settings."""
    lines = {}
    for number, sections in made.items():
        for section in sections:
            for label, row in section.rows.items():
                for cell in filter(None, (entry.cell for entry in row)):
                    line = f"{section.label}, {label}: {cell.folder} ({cell.about})"
                    lines.setdefault(line, []).append(number)
    return [f"{line}, in Table {', '.join(dict.fromkeys(numbers))}" for line, numbers in lines.items()]


LEGEND = (
    "The paper's number, then ours with its 95 % interval; in brackets the gain over the row that the table compares "
    "with. Means of the paper's numbers are computed from its columns."
)


def titles_of(c, known, made):
    """Table number -> its title."""
    name = {"tabom": "TABOM", "t3d": "T3D"}[c.paper]
    return {number: f"{name}, Table {number}: {known[number]['about']}" for number in made}


def markdown(c, known, made, left_out, missing):
    parts = [f"{PAPER[c.paper]}. {LEGEND}"]
    for number, title in titles_of(c, known, made).items():
        parts.append(f"## {title}")
        for section in made[number]:
            titles, lines = grid(known[number], section)
            rows = [titles, ["---"] * len(titles), *lines]
            parts.append("\n".join(f"| {' | '.join(row)} |" for row in rows))
    if runs := runs_of(made):
        parts.append("## Runs\n\n- " + "\n- ".join(runs))
    if missing:
        parts.append("## Commands for the empty cells\n\n```bash\n" + "\n".join(flat(missing)) + "\n```")
    if left_out:
        parts.append("## Left out\n\n- " + "\n- ".join(left_out))
    return "\n\n".join(parts)


def latex(c, known, made, left_out, missing):
    """A tabular for each section, with a comment for all else."""
    parts = [comment(f"{PAPER[c.paper]}. {LEGEND}")]
    for number, title in titles_of(c, known, made).items():
        for section in made[number]:
            titles, lines = grid(known[number], section)
            body = "\n".join(f"{' & '.join(map(escaped, row))} \\\\" for row in [titles, *lines])
            head = f"\\begin{{tabular}}{{l{'r' * (len(titles) - 1)}}}"
            parts.append(f"{comment(title)}\n{head}\n{body}\n\\end{{tabular}}")
    lists = {"Runs": runs_of(made), "Commands for the empty cells": flat(missing), "Left out": left_out}
    for title, lines in lists.items():
        parts.append("\n".join(map(comment, [title, *lines])))
    return "\n\n".join(parts)


def comment(text):
    return f"% {text}"


def escaped(text):
    """A text as LaTeX prints it."""
    for sign in "&%_#":
        text = text.replace(sign, f"\\{sign}")
    return text


def csv_lines(c, known, made, left_out, missing):
    """A line for each cell and average."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(("table", "section", "row", "column", "paper", "paper_gain", "ours", "low", "high", "gain",
                     "gain_low", "gain_high", "n", "epoch", "folder"))  # fmt: skip
    for number, sections in made.items():
        for section in sections:
            for label in section.rows:
                for title, row, base in places(known[number], section, label):
                    shown, cell = numbers_of(row, base), row[0].cell
                    alone = ("", "", "")
                    if len(row) == 1 and cell is not None:
                        alone = (cell.n, cell.epoch, cell.folder)
                    ours, gain = shown["ours"] or ("", "", ""), shown["gain"] or ("", "", "")
                    numbers = (shown["paper"], shown["paper_gain"], *ours, *gain)
                    rounded = [round(x, 4) if isinstance(x, float) else x for x in numbers]
                    writer.writerow((number, section.label, label, title, *rounded, *alone))
    return file.getvalue().rstrip("\n")


WRITERS = {"markdown": markdown, "csv": csv_lines, "latex": latex}
