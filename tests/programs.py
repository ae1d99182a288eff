"""Programs that are right or wrong by making, for test_humaneval.py and test_mbpp.py; and how both run them."""

import ast
import gzip
import json
import os
from pathlib import Path

import pytest

from benchmarks import execute

REAL = Path(os.environ.get("TABOM_DATA", "no-such-folder"))
GOLDEN = Path(__file__).parent / "golden" / "harness"
needs_data = pytest.mark.skipif(not REAL.is_dir(), reason="TABOM_DATA names no folder")


def rows(name):
    with gzip.open(REAL / f"{name}.jsonl.gz", "rt", encoding="utf-8") as f:
        return [json.loads(line) for line in f]


class OffByOne(ast.NodeTransformer):
    def visit_Return(self, node):
        return ast.Return(ast.BinOp(node.value or ast.Constant(None), ast.Add(), ast.Constant(1)))


def off_by_one(code):
    return ast.unparse(ast.fix_missing_locations(OffByOne().visit(ast.parse(code))))


def emptied(code, body):
    tree = ast.parse(code)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            node.body = ast.parse(body).body
    return ast.unparse(tree)


def fenced(code):
    return f"Here is the completed function:\n```python\n{code}\n```\nIt works."


def judge(cases):
    """Runs the cases, (right or not, name, job); each distinct program once."""
    hashable = []
    for right, name, (program, tests, names) in cases:
        hashable.append((right, name, (program, tests, tuple(names))))
    jobs = list(dict.fromkeys(job for _, _, job in hashable))
    results = dict(zip(jobs, execute.run_many(jobs, workers=2)))
    wrong = []
    for right, name, job in hashable:
        if results[job]["passed"] != right:
            wrong.append((name, right, results[job]))
    assert not wrong, wrong
