"""The README and docs/: every command, piece of code, flag, function and link in them.

    python -m pytest tests/test_readme.py                    # commands are parsed, python code is run
    python -m pytest -m slow tests/test_readme.py            # the blocks marked "bash run" are run as they stand

A page is a Markdown file. A block is fenced: ```bash (commands, parsed), ```bash run (commands on tiny/, run in their
order in a folder that looks like a clone), ```python (run), ```text (what the block before it prints)."""

import contextlib
import functools
import importlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from style import module_name, sources

import evaluate
import tabom
from runs.options import field_names, flag, load, parse
from tools import harness

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```([\w ]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
TEXT = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)

# Every block of every page: (page, kind, body).
BLOCKS = []
for page in PAGES:
    for kind, body in FENCE.findall(page.read_text(encoding="utf-8")):
        BLOCKS.append((page, kind, body))

MARKED = sorted({page for page, kind, _ in BLOCKS if kind == "bash run"})

# Every line of the bash blocks, and what follows tabom.py in those that call it.
LINES, CALLS = [], []
for _, kind, body in BLOCKS:
    if kind.startswith("bash"):
        LINES += body.splitlines()
for line in LINES:
    for part in line.split(" && "):
        if "tabom.py" in part:
            CALLS.append(part.split("tabom.py", 1)[1].strip())
EXPERIMENTS = re.findall(r"-m ((?:experiments|release)\.\w+)([^\n`]*)", TEXT)

# What a line may begin with, besides a command of the project.
OTHERS = ("pip install -r requirements.txt", "pytest", "echo ", "hf download ", "hf upload ")
# Flags of other programs: torchrun, lm-evaluation-harness, hf, and every parser's own.
THEIRS = {"--nproc_per_node", "--model_args", "--log_samples", "--apply_chat_template", "--batch_size", "--help"}
THEIRS |= {"--nnodes", "--node_rank", "--master_addr", "--master_port"}
THEIRS |= {"--repo-type", "--local-dir", "--include"}


@functools.cache
def flags_of(module):
    """The flags that a module of experiments/ or release/ has, from its --help."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), pytest.raises(SystemExit):
        importlib.import_module(module).main(["--help"])
    return set(re.findall(r"--[a-z][\w-]*", shown.getvalue()))


@functools.cache
def flags_of_commands():
    """The flags of all commands, of the experiments that are named, and THEIRS."""
    found = set(THEIRS)
    for name, (module, _) in tabom.COMMANDS.items():
        _, cls = load(None, module, name)
        found.update(map(flag, field_names(cls)))
    for module in {name for name, _ in EXPERIMENTS}:
        found |= flags_of(module)
    return found


# ------------------------------------------------------------------------------------------------------------ commands


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 220


def test_every_command_is_shown():
    assert {shlex.split(call)[0] for call in CALLS} == set(tabom.COMMANDS)


@pytest.mark.parametrize("call", sorted(set(CALLS)))
def test_a_command_parses(call):
    parse(tabom.COMMANDS, "", argv=shlex.split(call))


@pytest.mark.parametrize("line", sorted(set(LINES)))
def test_a_line_calls_what_is_there(line):
    if line.startswith(OTHERS) or "tabom.py" in line or re.search(r"-m (experiments|release)\.", line):
        return
    script = re.fullmatch(r"python ([\w/]+\.py) .*", line.replace("-m tools.harness", "tools/harness.py"))
    assert script, f"nobody knows what this is: {line}"
    assert (ROOT / script[1]).is_file(), line


@pytest.mark.parametrize(("module", "arguments"), sorted(set(EXPERIMENTS)))
def test_an_experiment_has_the_flags(module, arguments):
    assert set(re.findall(r"--[a-z][\w-]*", arguments)) <= flags_of(module)


@pytest.mark.parametrize("named", sorted(set(re.findall(r"(?<![\w-])--[a-z][\w-]*", TEXT))))
def test_a_named_flag_exists(named):
    assert named in flags_of_commands()


def test_the_arguments_of_the_harness_are_known():
    given = re.findall(r"--model_args (\S+)", "\n".join(LINES))
    assert given
    for text in given:
        values = dict(pair.split("=") for pair in text.split(","))
        for name, value in values.items():
            values[name] = {"True": True, "False": False}.get(value, value)  # as the harness reads them
        harness.read_options(values)


def test_a_flag_that_no_command_has_is_noticed():
    assert not {"--seeed", "--recipes"} & flags_of_commands()


# ------------------------------------------------------------------------------------------------------- code and names


def folder_like_a_clone(here):
    """A folder in which the relative paths of the pages mean what they mean in a clone, with python and torchrun."""
    for name in ("tabom.py", "tiny"):
        (here / name).symlink_to(ROOT / name)
    (here / "out").mkdir()
    (here / "bin").mkdir()
    for name, start in (("python", ""), ("torchrun", "-m torch.distributed.run")):
        file = here / "bin" / name
        file.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {start} "$@"\n')
        file.chmod(0o755)
    return here


def run(words, folder):
    path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": path}
    return subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True)


def test_python_code_runs(tmp_path):
    """Every block by itself, all in one process: importing torch is what takes long."""
    folder, files = folder_like_a_clone(tmp_path), []
    for number, (page, kind, body) in enumerate(BLOCKS):
        if kind == "python":
            file = folder / f"{page.stem}-{number}.py"
            file.write_text(body)
            files.append(str(file))
    assert len(files) >= 4
    code = "import runpy, sys\nfor file in sys.argv[1:]:\n    runpy.run_path(file)"
    done = run([sys.executable, "-c", code, *files], folder)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("page", MARKED, ids=lambda page: page.stem)
def test_what_is_marked_runs_and_prints_what_is_shown(page, tmp_path):
    """The last line that a block prints has the keys of the last line that the page shows."""
    folder, own = folder_like_a_clone(tmp_path), [(kind, body) for where, kind, body in BLOCKS if where == page]
    for i, (kind, body) in enumerate(own):
        if kind != "bash run":
            continue
        done = run(["bash", "-ec", body], folder)
        assert done.returncode == 0, f"{body}\n{done.stderr}"
        following, shown = own[i + 1] if i + 1 < len(own) else (None, "")
        if following == "text":
            printed, expected = (json.loads(text.strip().splitlines()[-1]) for text in (done.stdout, shown))
            assert list(printed) == list(expected), body
            tables = [[row for row in text.splitlines() if row.startswith("| ")] for text in (done.stdout, shown)]
            assert [row[:1] for row in tables] == [tables[0][:1]] * 2, body  # the same head


def test_the_walk_covers_the_short_commands():
    marked = " ".join(body for _, kind, body in BLOCKS if kind == "bash run")
    for command in ("distill", "train", "generate", "merge", "grade", "diagnose"):
        assert f"tabom.py {command} " in marked


def named_functions():
    modules = {module_name(file).rpartition(".")[2]: module_name(file) for file in sources()}
    found = set()
    for stem, name in re.findall(r"`(\w+)\.(\w+)`", TEXT):
        if stem in modules and name not in ("py", "safetensors", "json", "jsonl"):
            found.add((modules[stem], name))
    return sorted(found)


@pytest.mark.parametrize(("module", "name"), named_functions())
def test_a_named_function_exists(module, name):
    assert hasattr(importlib.import_module(module), name)


def test_the_algorithm_names_functions():
    """The lines of the README's pseudocode, and where each is."""
    named = re.findall(r"(\w+)\.py:(\w+)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(named) >= 12
    for module, name in named:
        assert callable(getattr(importlib.import_module(module), name)), f"{module}.{name}"


def test_a_benchmark_holds_the_names_that_are_listed():
    page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    table = page.split("## A benchmark")[1].split("## An objective")[0]
    names = re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
    assert {"NAME", "FIELDS", "ask", "settings", "grade", "program"} <= set(names)
    example = {}
    exec(FENCE.findall(table)[0][1], example)
    held = [vars(task) for task in evaluate.TASKS.values()]
    for benchmark in (example, *held):
        missing = {name for name in names if name not in benchmark} - {"rows"}
        assert missing in ({"grade"}, {"program"}), benchmark["NAME"]  # one of the two


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:\w+/)*\w+\.(?:py|md))`", TEXT))))
def test_a_named_file_exists(path):
    assert (ROOT / path).is_file() or list(ROOT.glob(f"*/{path}"))


# ---------------------------------------------------------------------------------------------------------------- links


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    found = set()
    for title in re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE):
        found.add(re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-"))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.is_file(), target
        assert not anchor or anchor in anchors(file), target


def test_every_page_is_reached_from_the_readme():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for page in PAGES[1:]:
        assert f"docs/{page.name}" in readme
