"""The layout: who imports whom, which files stand at the top, and how dense the code is.

python -m pytest tests/test_layout.py           # python tests/style.py prints the counts"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml  # comes with huggingface_hub
from style import FOLDERS, ROOT, Counts, code_lines, count, imports_at_top, module_name, sources, together

LEAVES = ["model", "lora", "decode", "objectives", "tokenizer", "data"]
LEAVES += [f"benchmarks.{name}" for name in "gsm8k math500 humaneval mbpp ifeval execute answers".split()]
# A file imports at its top only from the levels below its own.
LEVELS = [
    ["tabom"],
    ["tools.check", "tools.generate", "tools.merge", "tools.grade", "tools.harness"],
    ["tools.checks"],
    ["experiments.demo", "experiments.claims"],
    ["experiments.report", "experiments.gradients"],
    ["experiments.sweep", "experiments.mechanism"],
    ["experiments.diagnose", "experiments.tiny", "experiments.speed", "tools.watch"],
    ["experiments.pictures"],
    ["experiments.plots", "experiments.table", "experiments.looks"],
    ["experiments.stats", "experiments.puzzles", "experiments.cost", "experiments.jobs", "experiments.reach"],
    ["experiments.memory"],
    ["train"],
    ["release.tables"],
    ["release.commands"],
    ["release.found"],
    ["evaluate"],
    ["distill"],
    ["release.published"],
    ["runs.records", "runs.adapters"],
    ["runs.loading"],
    ["runs.resume", "runs.logs"],
    ["runs.objective_options", "release.files", "release.epochs", "runs.card"],
    ["runs.disk"],
    ["baselines"],
    ["baselines.preference", "baselines.ideal"],
    ["baselines.certainty", "baselines.timesteps", "baselines.weighted"],
    ["baselines.common", "baselines.exact", "baselines.measures", "baselines.reference"],
    ["runs.torchrun", "blocks.decoders", "blocks.network", "release.credit"],
    ["runs.shard", "runs.options", "runs.pace", "runs.streams", "runs.queue", "blocks.data", "formats.columns"],
    ["formats.talks", "formats.quoted", "release.recipes", "release.rows"],
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
    assert names == sorted(SIZES)


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


def test_the_workflow_runs_what_we_run():
    """.ci/run, with the lowest Python that the README promises and a newer one; it needs nothing beside the project."""
    (job,) = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))["jobs"].values()
    (command,) = [step["run"] for step in job["steps"] if "run" in step]
    assert command == ".ci/run" and os.access(ROOT / command, os.X_OK)
    lowest = re.search(r"Python (3\.\d+) or newer", (ROOT / "README.md").read_text(encoding="utf-8"))[1]
    assert job["strategy"]["matrix"]["python"] == [lowest, "3.12"]
    outside = [line for line in (ROOT / command).read_text().splitlines() if "../shared" in line]
    assert all(line.startswith("if [ -d ../shared") for line in outside)


# ------------------------------------------------------------------------------------------------- the size of the core

# The most lines of code (no blanks, comments, docstrings) of each file at the top.
SIZES = dict(
    tabom=80, model=350, decode=400, objectives=300, train=350, lora=320, distill=200, tokenizer=300, data=300,
    evaluate=300,
)  # fmt: skip
READING_PATH = ("tabom", "model", "decode", "objectives", "train")
# What belongs to a room. The core looks it up by name, each in one line, and knows no more of it.
ROOMS = re.compile(r"\b(sdar|a2d|block[ _-]?causal|t3d|d_?parallel|releases?|credit)\b", re.IGNORECASE)
LOOKED_UP = dict(model=1, decode=1, data=1, tokenizer=1, distill=1, evaluate=3, train=1, objectives=0, lora=0, tabom=1)


@pytest.mark.parametrize("name", SIZES)
def test_a_core_file_keeps_to_its_size(name):
    assert code_lines(ROOT / f"{name}.py") <= SIZES[name]


def test_the_core_is_read_in_an_evening():
    sizes = {name: code_lines(ROOT / f"{name}.py") for name in SIZES}
    assert sum(sizes[name] for name in READING_PATH) <= 1450
    assert sum(sizes[name] for name in (*READING_PATH, "lora", "distill")) <= 1950


@pytest.mark.parametrize("name", SIZES)
def test_the_core_knows_no_room(name):
    lines = [line for line in (ROOT / f"{name}.py").read_text(encoding="utf-8").splitlines() if ROOMS.search(line)]
    assert len(lines) <= LOOKED_UP[name], lines


def test_what_a_line_of_code_is(tmp_path):
    file = tmp_path / "a.py"
    file.write_text(
        '"""A docstring\n\nof three lines."""\n# one\n\nx = 1  # two\n\n\ndef f():\n    "doc"\n    return x\n'
    )
    assert code_lines(file) == 3


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
