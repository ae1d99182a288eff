"""The layout: who imports whom, which files stand at the top, and how dense the code is.

python -m pytest tests/test_layout.py           # python tests/style.py prints the counts"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from style import FOLDERS, ROOT, Counts, count, imports_at_top, module_name, sources, together

LEAVES = ["model", "lora", "decode", "objectives", "data"]
LEAVES += [f"benchmarks.{name}" for name in ("gsm8k", "math500", "humaneval", "mbpp", "ifeval", "execute", "answers")]
# A file imports only from the levels below its own. Inside experiments/ the order is that of the last levels.
LEVELS = [
    ["tabom"],
    ["tools.generate", "tools.merge", "tools.grade", "tools.harness"],
    ["experiments.demo", "experiments.claims"],
    ["experiments.report", "experiments.gradients"],
    ["experiments.sweep", "experiments.mechanism"],
    ["experiments.diagnose", "experiments.tiny", "experiments.speed", "tools.watch"],
    ["experiments.plots"],
    ["experiments.stats", "experiments.puzzles", "experiments.cost"],
    ["train"],
    ["evaluate"],
    ["distill"],
    ["release", "release.published", "release.recipes"],
    ["runs.resume", "runs.records", "runs.logs"],
    ["runs.loading"],
    ["runs.disk"],
    ["runs.torchrun", "blocks.decoders"],
    ["runs.shard", "runs.options", "runs.streams", "runs.queue", "blocks.data"],
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
        for other in imports_at_top(file) - set(FOLDERS):
            assert level[other] > level[name], f"{name} imports {other}"


def test_the_top_is_small():
    names = sorted(file.stem for file in ROOT.glob("*.py"))
    assert names == sorted(["tabom", "distill", "train", "evaluate", *LEAVES[:5]])


ALONE = """
import sys
for folder in sys.argv[1:]:
    sys.path[0] = folder
    name = folder.rpartition("/")[2]
    __import__(name)
    assert sys.modules.pop(name).__file__.startswith(folder)
"""


def test_leaves_import_no_sibling():
    for leaf in LEAVES:
        assert imports_at_top(ROOT / f"{leaf.replace('.', '/')}.py") == set(), leaf


def test_a_leaf_copied_alone_imports(tmp_path):
    """Each from a folder of its own, all in one process that sees no other file of ours."""
    folders = []
    for leaf in LEAVES:
        source = ROOT / f"{leaf.replace('.', '/')}.py"
        folders.append(tmp_path / source.stem)
        folders[-1].mkdir()
        shutil.copyfile(source, folders[-1] / source.name)
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, "-c", ALONE, *map(Path.as_posix, folders)]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ----------------------------------------------------------------------------------------------------------- density

COUNTS = {module_name(file): count(file) for file in sources()}
CORE = ("decode", "objectives", "train", "model")  # what a reader of the method reads


@pytest.mark.parametrize("name", COUNTS)
def test_no_comprehension_stands_in_another(name):
    assert COUNTS[name].nested == 0


def test_comprehensions_are_at_most_25_of_1000_lines():
    found = together(COUNTS.values())
    assert found.comprehensions <= 0.025 * found.lines


def test_the_core_is_commented():
    found = together(COUNTS[name] for name in CORE)
    assert found.comments >= 0.08 * found.lines


@pytest.mark.parametrize("name", COUNTS)
def test_functions_fit_a_screen(name):
    assert COUNTS[name].longest_function <= 60


def test_what_the_counts_are(tmp_path):
    """The counting itself, on a file whose numbers are plain."""
    file = tmp_path / "a.py"
    file.write_text(
        "# one\n"
        "x = [y for y in [z for z in '#']]  # two\n"
        "s = sum(a if a else 0 for a in x)\n"
        "def long():\n"
        "    def short():\n"
        "        return 1\n"
        "    return short\n" + "#" * 101 + "\n"
    )
    assert count(file) == Counts(
        lines=8, comments=3, comprehensions=3, nested=1, conditionals=1, longest_function=4, wide=1
    )
