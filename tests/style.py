"""Counts what makes code dense, and who imports whom: python tests/style.py

A line per file: its lines, the share with a comment, comprehensions (generator expressions included) and conditional
expressions per 1,000 lines, nested comprehensions, the longest function, and the share of lines above 100 columns. Then
the same of decode, objectives, train and model together, and of all files. test_layout.py holds the bars."""

import ast
import io
import tokenize
from pathlib import Path
from typing import NamedTuple

DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
ROOT = Path(__file__).parent.parent
FOLDERS = "blocks baselines release formats runs tools benchmarks experiments".split()
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


class Counts(NamedTuple):
    """What one file, or many together, hold."""

    lines: int
    comments: int
    comprehensions: int
    nested: int
    conditionals: int
    longest_function: int
    wide: int  # lines above 100 columns


def sources():
    """The files of the project that are no tests."""
    found = list(ROOT.glob("*.py"))
    for folder in FOLDERS:
        found += ROOT.glob(f"{folder}/*.py")
    return sorted(found)


def count(file):
    text = file.read_text(encoding="utf-8")
    nodes = list(ast.walk(ast.parse(text)))
    comments = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            comments.add(token.start[0])
    found, nested, conditionals, longest = 0, 0, 0, 0
    for node in nodes:
        if isinstance(node, COMPREHENSIONS):
            found += 1
            nested += sum(isinstance(child, COMPREHENSIONS) for child in ast.walk(node)) > 1
        conditionals += isinstance(node, ast.IfExp)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            longest = max(longest, node.end_lineno - node.lineno + 1)
    lines = text.splitlines()
    wide = sum(len(line) > 100 for line in lines)
    return Counts(len(lines), len(comments), found, nested, conditionals, longest, wide)


def code_lines(file):
    """Lines of a file that are no blank, comment or docstring."""
    text, docstrings = file.read_text(encoding="utf-8"), set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and ast.get_docstring(
            node
        ):
            docstrings.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    numbered = enumerate(map(str.strip, text.splitlines()), 1)
    return sum(bool(line) and not line.startswith("#") and number not in docstrings for number, line in numbered)


def together(counts):
    """The sum of counts; of the longest function the largest."""
    counts = list(counts)
    sums = [sum(column) for column in zip(*counts)]
    longest = max(c.longest_function for c in counts)
    return Counts(*sums)._replace(longest_function=longest)


def imports_at_top(file):
    """The modules of the project that a file imports at its top: names as in sources(). A function may import another
    one when it is called: a room that is looked up, or what only one path needs."""
    known = {module_name(one) for one in sources()}
    found = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found & known


def module_name(file):
    """experiments/demo.py -> experiments.demo"""
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


if __name__ == "__main__":
    print("file lines comment% compr/1000 nested cond/1000 longest wide%")
    every = {module_name(file): count(file) for file in sources()}
    core = together(every[name] for name in ("decode", "objectives", "train", "model"))
    for name, c in [*every.items(), ("core", core), ("all", together(every.values()))]:
        per = 1000 / c.lines
        comment, wide = 100 * c.comments / c.lines, 100 * c.wide / c.lines
        cells = [c.lines, f"{comment:.1f}", f"{c.comprehensions * per:.0f}", c.nested]
        print(name, *cells, f"{c.conditionals * per:.0f}", c.longest_function, f"{wide:.1f}")
