"""No write to stdout or stderr ends a run. python -m pytest tests/test_streams.py"""

import os
import signal
import subprocess

import pytest
from helpers import ROOT, TRAIN, flags, interpreter

from runs import resume

PROGRAM = """
import sys
from runs import streams
streams.guard()
for i in range(1000):
    print("x" * 1000, file=sys.stderr, flush=True)
    print("x" * 1000)
open(sys.argv[1], "w").write("saved")
"""


def shell_line(line, *arguments):
    """Run a line of the shell in which PY is our interpreter, $1 the program."""
    command, env = interpreter("-c")
    return subprocess.run(
        ["bash", "-c", line, "bash", *arguments], env={**env, "PY": command[0]}, capture_output=True, cwd=ROOT
    )


@pytest.mark.parametrize(
    "line",
    [
        '$PY -c "$1" "$2" 2>&1 | head -n 1',
        '$PY -c "$1" "$2" 2>&-',
        '$PY -c "$1" "$2" >&-',
        '$PY -c "$1" "$2" >&- 2>&-',
        '$PY -c "$1" "$2" > /dev/full',
        '$PY -c "$1" "$2" 2> /dev/full',
    ],
)
def test_work_is_saved_whatever_happens_to_the_streams(line, tmp_path):
    file = tmp_path / "saved"
    done = shell_line(f"set -o pipefail; {line}", PROGRAM, str(file))
    assert file.read_text() == "saved"
    assert done.returncode == 0, done.stderr


def test_what_goes_to_a_closed_stderr_does_not_go_to_stdout():
    done = shell_line("$PY tabom.py grade --task gsm8k --responses nowhere --out out/V 2>&-")
    assert done.returncode == 1
    assert done.stdout == b""


def test_a_character_that_stdout_cannot_show_ends_nothing():
    program = "from runs import streams\nstreams.guard()\nprint('caf\\u00e9 \\udce9')"
    done = shell_line('PYTHONIOENCODING=ascii $PY -c "$1"', program)
    assert done.returncode == 0, done.stderr
    assert done.stdout == b"caf\\xe9 \\udce9\n"


def test_training_goes_on_where_its_reader_has_gone(tiny, trajectories, tmp_path):
    out = tmp_path / "R"
    words = flags(model=tiny, data=trajectories, out=out, **TRAIN)
    done = shell_line('set -o pipefail; $PY tabom.py train "$@" 2>&1 | head -c 1', *words)
    assert done.returncode == 0, done.stderr
    assert (out / "epoch-2" / "adapter_model.safetensors").is_file()


def test_a_signal_that_is_ignored_stays_ignored():
    """As under nohup, which lets a run outlive its terminal."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with resume.stop_signals() as seen:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            os.kill(os.getpid(), signal.SIGTERM)
        assert seen == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGHUP, before)
