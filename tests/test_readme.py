"""Every command and every piece of code in the README: python -m pytest tests/test_readme.py

What runs on the tiny model is run as it stands there; what needs a GPU is parsed."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import tabom
from experiments import cost, speed
from options import command_line

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
COMMANDS = [line for kind, body in BLOCKS if kind == "bash" for line in body.splitlines() if "tabom.py" in line]
WALK = [line for line in COMMANDS if "out/v" not in line and ("tiny" in line or "--data-only" in line)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder in which the README's relative paths mean what they mean in a clone."""
    here = tmp_path_factory.mktemp("clone")
    for name in ("tabom.py", "tiny"):
        (here / name).symlink_to(ROOT / name)
    return here


def run(words, folder):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_the_walk_through_runs_as_it_stands(folder):
    assert len(WALK) == 6
    launch = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}
    for line in WALK:
        program, *words = shlex.split(line)
        done = run([*launch[program], *words], folder)
        assert done.returncode == 0, f"{line}\n{done.stderr}"
        assert json.loads(done.stdout.strip().splitlines()[-1]), line


def test_every_command_parses():
    assert {shlex.split(line.split("tabom.py", 1)[1])[0] for line in COMMANDS} == set(tabom.COMMANDS)
    for line in COMMANDS:
        command_line(tabom.COMMANDS, "").parse_args(shlex.split(line.split("tabom.py", 1)[1]))


def test_python_code_runs(folder):
    codes = [body for kind, body in BLOCKS if kind == "python"]
    assert codes
    for code in codes:
        done = run([sys.executable, "-c", code], folder)
        assert done.returncode == 0, done.stderr


def test_every_named_flag_exists():
    known = {"--nproc_per_node", "--help"}
    parsers = [speed.command_line(), cost.command_line(), *command_line(tabom.COMMANDS, "").commands.values()]
    for parser in parsers:
        known.update(parser._option_string_actions)
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", README)) <= known


def test_every_named_function_exists():
    modules = "|".join(file.stem for file in ROOT.glob("*.py"))
    for module, name in re.findall(rf"`({modules})\.(\w+)`", README):
        assert name in ("py", "safetensors") or hasattr(__import__(module), name), f"{module}.{name}"
