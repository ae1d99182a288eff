"""Runs that are killed, stopped, short of disk or started twice: python -m pytest tests/test_faults.py

The moment of a fault is counted in steps and in operations on files (see killed.py), never in seconds."""

import gzip
import json
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import (
    HUNG,
    ROOT,
    TRAIN,
    fails,
    flags,
    interpreter,
    locked_by_another,
    metrics,
    start,
    wait_for,
    write_lines,
)

import data
import distill
import tabom
import train
from runs import resume

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no forks, no locks, no limits")

# 9 steps, 3 epochs, and checkpoints between them
LONG = dict(TRAIN, epochs=3, global_batch=4, batch_size=4, save_every=2)
FILES = ("adapter_model.safetensors", "optimizer.safetensors", "trainer.json", "adapter_config.json")


@pytest.fixture(scope="module")
def killed():
    """A function that runs a command which a fault meets -> its status, errors and moments."""
    command, env = interpreter(ROOT / "tests" / "killed.py")
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with subprocess.Popen(command, env=env, **pipes) as process:

        def call(words, out, kind="file", at=0, number=signal.SIGKILL, largest_file=None):
            request = dict(words=words, out=str(out), kind=kind, at=at, signal=number, largest_file=largest_file)
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        yield call
        process.stdin.close()


def some(count, fast):
    """Seeds, of which the first few run every time."""
    return [pytest.param(seed, marks=() if seed < fast else pytest.mark.slow) for seed in range(count)]


# --------------------------------------------------------------------------------------------------------- training


def training(tiny, trajectories, out, **changes):
    return ["train", *flags(model=tiny, data=trajectories, out=out, **{**LONG, **changes})]


@pytest.fixture(scope="module")
def whole(tiny, trajectories, killed, tmp_path_factory):
    """(a run that nothing disturbed, the numbers of its moments)"""
    out = tmp_path_factory.mktemp("whole") / "R"
    done = killed(training(tiny, trajectories, out), out)
    assert done["status"] == 0, done["errors"]
    assert done["moments"]["step"] == 9
    return out, done["moments"]


def same(out, whole):
    for file in FILES:
        assert (out / "epoch-3" / file).read_bytes() == (whole / "epoch-3" / file).read_bytes(), file
    assert metrics(out) == metrics(whole)


@pytest.mark.parametrize("seed", some(40, fast=4))
def test_training_killed_at_any_moment_ends_bit_equal(tiny, trajectories, whole, killed, tmp_path, seed):
    out, moments = tmp_path / "R", whole[1]
    chance = random.Random(seed)
    kind = "step" if seed % 4 == 0 else "file"
    words = training(tiny, trajectories, out)
    done = killed(words, out, kind, chance.randint(1, moments[kind]))
    assert done["status"] == -signal.SIGKILL
    assert not (out / "epoch-3").exists() or done["moments"]["step"] == 9
    assert tabom.main(words) == 0
    same(out, whole[0])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_writes_a_checkpoint_before_the_process_leaves(tiny, trajectories, whole, killed, tmp_path, number):
    out = tmp_path / "R"
    words = training(tiny, trajectories, out, save_every=0)
    done = killed(words, out, "step", 5, number)
    assert done["status"] == 130
    assert "the same command continues" in done["errors"]
    assert len(metrics(out)) == 5  # the step that the signal met is made
    assert resume.checkpoints(out)[-1] == (5, out / "step-5")  # and not lost
    assert tabom.main(words) == 0
    same(out, whole[0])


def test_a_damaged_checkpoint_is_made_again(tiny, trajectories, whole, killed, tmp_path, capsys):
    out, words = tmp_path / "R", training(tiny, trajectories, tmp_path / "R")
    assert killed(words, out)["status"] == 0
    file = out / "epoch-3" / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    assert tabom.main(words) == 0
    assert f"{out / 'epoch-3'} is damaged" in capsys.readouterr().err
    same(out, whole[0])


# --------------------------------------------------------------------------------------------------------- decoding


@pytest.fixture(scope="module")
def decoding(tiny, puzzles, bytes_model, killed, tmp_path_factory):
    """For distill and evaluate: the words of a run with a batch size, the lines that it wrote, and the records and
    moments of a run that nothing disturbed. Tokens are drawn at temperature 1."""
    folder = tmp_path_factory.mktemp("decoding")
    (folder / "data").mkdir()
    with gzip.open(folder / "data" / "gsm8k_test.jsonl.gz", "wt") as f:
        for i in range(12):
            f.write(json.dumps(dict(question=f"What is {i}?", answer=f"#### {i}")) + "\n")

    def words(command, out, batch_size):
        if command == "distill":
            own = dict(model=tiny, data=puzzles, check="exact")
        else:
            own = dict(model=bytes_model, data=folder / "data", tasks="gsm8k", max_new_tokens=24, block_length=24)
        return [command, *flags(**own, out=out, batch_size=batch_size, temperature=1.0, sample=True)]

    whole = {}
    for command in ("distill", "evaluate"):
        done = killed(words(command, folder / command, 1), folder / command)
        assert done["status"] == 0, done["errors"]
        assert done["moments"]["step"] == 12
        whole[command] = records_of(folder / command), done["moments"]
    return words, whole


def lines_of(out):
    """The lines of the trajectory files of a run of distill or evaluate, the torn one too."""
    lines = []
    for file in sorted(out.glob("**/trajectories-*.jsonl")):
        lines += [line for line in file.read_bytes().split(b"\n") if line]
    return lines


def records_of(out):
    return sorted(map(json.loads, lines_of(out)), key=data.by_id)


def alike(found, whole):
    """The same records; entropies and probabilities but for the rounding of another batch size."""
    for ours, theirs in zip(found, whole, strict=True):
        for key in ours | theirs:
            if key in ("entropy", "confidence"):
                assert ours[key] == pytest.approx(theirs[key], abs=1e-4)
            else:
                assert ours[key] == theirs[key]


@pytest.mark.parametrize("command", ["distill", "evaluate"])
@pytest.mark.parametrize("seed", some(20, fast=2))
def test_decoding_killed_at_any_moment_loses_and_repeats_nothing(decoding, killed, tmp_path, command, seed):
    words, whole = decoding
    records, moments = whole[command]
    chance, out = random.Random(f"{command} {seed}"), tmp_path / "T"
    kind = "file" if seed % 4 == 1 else "step"
    done = killed(words(command, out, 1), out, kind, chance.randint(1, moments[kind]))
    assert done["status"] == -signal.SIGKILL
    before = [line for line in lines_of(out) if line.endswith(b"}")]
    assert len(before) >= done["moments"]["step"] - 1  # every response is written before the next is decoded
    assert tabom.main(words(command, out, 3)) == 0
    after = lines_of(out)
    assert after[: len(before)] == before
    assert len(after) == 12
    alike(records_of(out), records)


@pytest.mark.parametrize("command", ["distill", "evaluate"])
def test_a_full_disk_keeps_what_was_decoded(decoding, killed, tmp_path, command):
    words, whole = decoding
    out = tmp_path / "T"
    size = sum(len(line) for line in map(json.dumps, whole[command][0])) // 2
    done = killed(words(command, out, 1), out, largest_file=size)
    assert done["status"] == 1
    assert "Traceback" not in done["errors"]
    assert re.fullmatch(r"error: .*(too large|No space).*", done["errors"].strip().splitlines()[-1])
    before = [line for line in lines_of(out) if line.endswith(b"}")]
    assert 0 < len(before) < 12
    assert tabom.main(words(command, out, 12)) == 0
    assert lines_of(out)[: len(before)] == before
    alike(records_of(out), whole[command][0])


@pytest.mark.skipif(not Path("/sys/kernel").is_dir(), reason="needs a folder that even root cannot write into")
@pytest.mark.parametrize("command", ["distill", "evaluate", "train"])
def test_a_folder_that_cannot_be_written_is_one_line(decoding, tiny, trajectories, capsys, command):
    out = "/sys/kernel/tabom/out"
    words = training(tiny, trajectories, out) if command == "train" else decoding[0](command, out, 4)
    assert tabom.main(words) == 1
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error")]
    assert "/sys/kernel/tabom" in line


# ------------------------------------------------------------------------------------------ two commands, one folder

TRY_LOCK = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'a'), fcntl.LOCK_EX | fcntl.LOCK_NB)"


@pytest.mark.parametrize("command", ["distill", "train"])
def test_a_running_command_keeps_others_out_of_its_folder(
    tiny, puzzles, trajectories, tmp_path, capsys, monkeypatch, command
):
    """Another process tries the lock in the middle of the run, and gets it afterwards."""
    out, found = tmp_path / "R", []
    module, name = dict(distill=(distill, "answers"), train=(train, "train_step"))[command]
    work = getattr(module, name)

    def others():
        done = subprocess.run([sys.executable, "-c", TRY_LOCK, str(out / "lock")], capture_output=True, text=True)
        return done.returncode, "BlockingIOError" in done.stderr

    def watched(*arguments):
        if not found:
            found.append(others())
        return work(*arguments)

    monkeypatch.setattr(module, name, watched)
    if command == "distill":
        words = ["distill", *flags(model=tiny, data=puzzles, out=out, limit=2)]
    else:
        words = training(tiny, trajectories, out, epochs=1)
    assert tabom.main(words) == 0
    assert found == [(1, True)]


def test_a_second_command_in_the_same_folder_is_one_line(tiny, puzzles, tmp_path, capsys):
    out = tmp_path / "T"
    options = dict(model=tiny, data=puzzles, out=out, limit=2)
    assert tabom.main(["distill", *flags(**options)]) == 0
    capsys.readouterr()
    with locked_by_another(out):
        fails(capsys, "another process is writing into .*: wait for it", "distill", **options)
    assert tabom.main(["distill", *flags(**options)]) == 0


# ---------------------------------------------------------------------------------------------------- many processes


@pytest.mark.slow
def test_one_two_and_four_processes_train_the_same(tiny, trajectories, tmp_path):
    """Ten responses of different lengths in batches of 4, 4 and 2: of four processes, two have nothing in the last."""
    rows = []
    for i, record in enumerate(data.read_trajectories(trajectories)[:10]):
        n = 37 - 3 * i
        rank = dict(zip(sorted(record["order"][:n]), range(n)))
        row = dict(id=record["id"], prompt_ids=record["prompt_ids"][: 37 - i], response_ids=record["response_ids"][:n])
        row["order"] = [rank[k] for k in record["order"][:n]]
        rows.append(row)
    file, losses = write_lines(tmp_path / "trajectories.jsonl", rows), {}
    for processes in (1, 2, 4):
        out = tmp_path / f"R-{processes}"
        words = training(tiny, file, out, epochs=7, lr=1e-3, batch_size=2)
        process = start(*words, processes=processes)
        _, errors = process.communicate(timeout=HUNG)
        assert process.returncode == 0, errors
        losses[processes] = [(line["loss"], line["ce"], line["ranking"]) for line in metrics(out)]
    assert len(set(losses[1])) == 21
    for processes in (2, 4):
        for one, several in zip(losses[1], losses[processes], strict=True):
            assert one == pytest.approx(several, abs=1e-6)


def worker(out, index):
    """The process id of the process of that index among those that write into out; None if there is none."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words, environment = (folder / "cmdline").read_bytes(), (folder / "environ").read_bytes()
        except OSError:
            continue
        if str(out).encode() in words and f"\0RANK={index}\0".encode() in b"\0" + environment:
            return int(folder.name)
    return None


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the processes in /proc")
def test_a_process_that_dies_takes_the_others_down(tiny, trajectories, tmp_path):
    out = tmp_path / "R"
    process = start(*training(tiny, trajectories, out, epochs=100_000, save_every=0), processes=2)
    wait_for(process, lambda: (out / "epoch-1" / "manifest.json").is_file())
    os.kill(worker(out, 1), signal.SIGKILL)
    process.communicate(timeout=HUNG)
    assert process.returncode != 0
    assert worker(out, 0) is None
    assert resume.last_checkpoint(out) is not None


BROKEN = """
import os, sys, tabom, train
step = train.train_step
def broken(*arguments):
    if os.environ["RANK"] == "1" and arguments[1] == 2:
        raise ValueError("process 1 found a bad thing")
    return step(*arguments)
train.train_step = broken
sys.exit(tabom.main())
"""


@pytest.mark.slow
def test_the_error_of_one_process_is_shown_first(tiny, trajectories, tmp_path):
    program, out = tmp_path / "program.py", tmp_path / "R"
    program.write_text(BROKEN)
    process = start(*training(tiny, trajectories, out), program=program, processes=2)
    _, errors = process.communicate(timeout=HUNG)
    assert process.returncode != 0
    assert re.search(r"error: .*", errors, re.IGNORECASE).group() == "error: process 1 found a bad thing"
    assert [line["step"] for line in metrics(out)] == [1, 2]
