"""The layout: who imports whom, which files stand at the top, and how dense the code is.

python -m pytest tests/test_layout.py"""

import os
import shutil
import subprocess
import sys

import pytest
from style import ROOT, imports, module_name, sources

LEAVES = ["options", "model", "lora", "decode", "objectives", "data"]
LEAVES += [f"benchmarks.{name}" for name in ("gsm8k", "math500", "humaneval", "mbpp", "ifeval", "execute")]
# A file imports only from the levels below its own. Inside experiments/ the order is that of the last levels.
LEVELS = [
    ["tabom", "harness"],
    ["experiments.demo", "experiments.claims"],
    ["experiments.report"],
    ["experiments.sweep"],
    ["experiments.diagnose", "experiments.tiny", "experiments.speed"],
    ["experiments.plots", "experiments.stats", "experiments.puzzles", "experiments.cost"],
    ["distill"],
    ["train"],
    ["evaluate"],
    ["runs"],
    LEAVES,
]


def test_an_import_only_goes_down():
    level = {}
    for number, names in enumerate(LEVELS):
        level.update(dict.fromkeys(names, number))
    for file in sources():
        if file.name == "__init__.py":
            continue
        name = module_name(file)
        assert name in level, f"{name} has no place in the layout"
        for other in imports(file) - {"benchmarks", "experiments"}:
            assert level[other] > level[name], f"{name} imports {other}"


def test_the_top_is_small():
    names = sorted(file.stem for file in ROOT.glob("*.py"))
    assert names == sorted(["tabom", "distill", "train", "evaluate", "runs", "harness", *LEAVES[:6]])


@pytest.mark.parametrize("leaf", LEAVES)
def test_a_leaf_copied_alone_imports(leaf, tmp_path):
    source = ROOT / f"{leaf.replace('.', '/')}.py"
    assert not imports(source)
    shutil.copyfile(source, tmp_path / source.name)
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, "-c", f"import {source.stem}"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
