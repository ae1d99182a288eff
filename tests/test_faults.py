"""Runs that are killed, stopped, damaged or started twice: python -m pytest tests/test_faults.py"""

import gzip
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import ROOT, flags, last_json, shell

import data
import runs
import tabom

TRAIN = dict(keep="all", window=8, epochs=3, global_batch=4, batch_size=4, lr=1e-2, warmup=2)
FILES = ("adapter_model.safetensors", "optimizer.safetensors", "trainer.json", "adapter_config.json")


def start(*words, program=ROOT / "tabom.py", processes=1, largest_file=None):
    """tabom.py in a process that a test may kill. largest_file: bytes at which the disk of that process is full."""

    def fill():
        if largest_file is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))

    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([*command, str(program), *map(str, words)], env=env, preexec_fn=fill, **pipes)


@pytest.fixture(scope="module")
def slowly(tmp_path_factory):
    """tabom.py with a pause of 0.1 seconds at each training step and each decoded batch, so that a kill meets it."""
    program = tmp_path_factory.mktemp("program") / "slowly.py"
    program.write_text(
        "import sys, time, evaluate, tabom, train\n"
        "def slow(work):\n"
        "    return lambda *arguments: (time.sleep(0.1), work(*arguments))[1]\n"
        "train.train_step, evaluate.answer_batch = slow(train.train_step), slow(evaluate.answer_batch)\n"
        "sys.exit(tabom.main())\n"
    )
    return program


def untimed(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in lines]


@pytest.fixture(scope="module")
def whole(tiny, trajectories, tmp_path_factory):
    """A run of 9 steps that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole") / "R"
    assert tabom.main(["train", *flags(model=tiny, data=trajectories, out=out, **TRAIN)]) == 0
    return out


def same(out, whole):
    for file in FILES:
        assert (out / "epoch-3" / file).read_bytes() == (whole / "epoch-3" / file).read_bytes(), file
    assert untimed(out) == untimed(whole)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_training_killed_at_any_moment_ends_bit_equal(tiny, trajectories, whole, slowly, tmp_path, seed):
    chance, out = random.Random(seed), tmp_path / "R"
    words = ["train", *flags(model=tiny, data=trajectories, out=out, save_every=chance.choice([1, 2]), **TRAIN)]
    process = start(*words, program=slowly)
    while process.poll() is None and not (out / "metrics.jsonl").is_file():
        time.sleep(0.02)
    time.sleep(chance.uniform(0, 0.8))
    assert process.poll() is None  # of at least 0.9 seconds
    process.kill()
    process.communicate()
    assert len(untimed(out)) < 9
    assert tabom.main(words) == 0
    same(out, whole)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_writes_a_checkpoint_before_the_process_leaves(tiny, trajectories, whole, slowly, tmp_path, number):
    out = tmp_path / "R"
    words = ["train", *flags(model=tiny, data=trajectories, out=out, **TRAIN)]
    process = start(*words, program=slowly)
    while process.poll() is None and not ((out / "metrics.jsonl").is_file() and untimed(out)):
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "the same command continues" in errors
    done = len(untimed(out))
    assert done < 9 and runs.checkpoints(out)[-1][0] == done  # not a step is lost
    assert tabom.main(words) == 0
    same(out, whole)


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest"])
def test_a_damaged_checkpoint_is_skipped(tiny, trajectories, whole, tmp_path, capsys, damage):
    out = tmp_path / "R"
    words = ["train", *flags(model=tiny, data=trajectories, out=out, **TRAIN)]
    assert tabom.main(words) == 0
    file = out / "epoch-3" / ("manifest.json" if damage == "manifest" else "optimizer.safetensors")
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
    file.write_bytes(content[: len(content) // 2] if damage in ("truncate", "manifest") else content)
    if damage == "remove":
        file.unlink()
    assert runs.last_checkpoint(out) == out / "epoch-2"
    assert tabom.main(words) == 0
    assert f"{out / 'epoch-3'} is damaged" in capsys.readouterr().err
    same(out, whole)


def test_only_the_last_checkpoints_between_epochs_are_kept(tiny, trajectories, whole, tmp_path):
    out = tmp_path / "R"
    options = dict(model=tiny, data=trajectories, out=out, save_every=1, keep_last=2)
    assert tabom.main(["train", *flags(**options, **TRAIN)]) == 0
    names = sorted(p.name for p in out.iterdir() if p.is_dir())
    assert names == ["epoch-1", "epoch-2", "epoch-3", "step-7", "step-8"]
    same(out, whole)


def test_a_second_process_in_the_same_folder_is_refused(tiny, puzzles, slowly, tmp_path):
    out = tmp_path / "T"
    words = ["distill", *flags(model=tiny, data=puzzles, out=out, check="exact", batch_size=1)]
    first = start(*words, program=slowly)
    while first.poll() is None and not (out / "meta.json").is_file():
        time.sleep(0.01)
    first.send_signal(signal.SIGSTOP)
    second = shell(*words)
    first.send_signal(signal.SIGCONT)
    first.communicate(timeout=120)
    assert first.returncode == 0 and len(data.read_trajectories(out)) == 12
    assert second.returncode == 1 and "another process is writing into" in second.stderr


def test_a_step_that_is_not_finite_is_dropped_on_demand(tiny, trajectories, tmp_path, capsys):
    options = dict(model=tiny, data=trajectories, out=tmp_path / "R", skip_nonfinite=True)
    assert tabom.main(["train", *flags(**options, **{**TRAIN, "epochs": 1, "weight": 1e38, "margin": 1e38})]) == 0
    captured = capsys.readouterr()
    assert captured.err.count("the step is dropped") == 3
    assert last_json(captured.out)["loss"] is None  # JSON has no infinity
    assert all(line["loss"] is None for line in untimed(tmp_path / "R"))


def test_a_run_continues_whose_steps_were_all_dropped(tiny, trajectories, tmp_path, capsys):
    options = dict(model=tiny, data=trajectories, out=tmp_path / "R", skip_nonfinite=True)
    options.update(TRAIN, epochs=2, weight=1e38, margin=1e38)
    assert tabom.main(["train", *flags(**options, stop_after=1)]) == 0
    assert tabom.main(["train", *flags(**options)]) == 0
    assert last_json(capsys.readouterr().out)["step"] == 6


def test_models_that_differ_anywhere_are_told_apart(tmp_path):
    """A large file is sampled: what fine-tuning changes is far more than one sample."""
    file = tmp_path / "model.safetensors"
    content = bytearray(os.urandom(20 * 2**20))
    file.write_bytes(content)
    before = runs.fingerprint(tmp_path)
    content[9 * 2**20 : 11 * 2**20] = bytes(2**21)
    file.write_bytes(content)
    assert runs.fingerprint(tmp_path) != before


# ----------------------------------------------------------------------------------------------------------- decoding


@pytest.fixture(scope="module")
def decoding(tiny, puzzles, bytes_model, tmp_path_factory):
    """For distill and evaluate: the words of a run with a batch size, the folder of its records, and the records of a
    run that nothing disturbed, with another batch size. Tokens are sampled at temperature 1."""
    folder = tmp_path_factory.mktemp("decoding")
    (folder / "data").mkdir()
    with gzip.open(folder / "data" / "gsm8k_test.jsonl.gz", "wt") as f:
        f.writelines(json.dumps(dict(question=f"What is {i}?", answer=f"#### {i}")) + "\n" for i in range(12))

    def words(command, out, batch_size):
        if command == "distill":
            own = dict(model=tiny, data=puzzles, check="exact")
        else:
            own = dict(model=bytes_model, data=folder / "data", tasks="gsm8k", max_new_tokens=48, block_length=48)
        return [command, *flags(**own, out=out, batch_size=batch_size, temperature=1.0)]

    def lines(command, out):
        files = Path(out, *(["gsm8k"] if command == "evaluate" else [])).glob("trajectories-*.jsonl")
        return [line for file in files for line in file.read_bytes().split(b"\n") if line]

    def records(command, out):
        return sorted((json.loads(line) for line in lines(command, out)), key=data.by_id)

    whole = {}
    for command in ("distill", "evaluate"):
        assert tabom.main(words(command, folder / command, 5)) == 0
        whole[command] = records(command, folder / command)
        assert len({r["id"] for r in whole[command]}) == 12
    return words, lines, records, whole


def alike(found, whole):
    """The same records; entropies and probabilities but for the rounding of another batch size."""
    for ours, theirs in zip(found, whole, strict=True):
        close = ("entropy", "confidence")
        assert {k: v for k, v in ours.items() if k not in close} == {k: v for k, v in theirs.items() if k not in close}
        assert all(ours[k] == pytest.approx(theirs[k], abs=1e-4) for k in close)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["distill", "evaluate"])
@pytest.mark.parametrize("seed", range(20))
def test_decoding_killed_at_any_moment_loses_and_repeats_nothing(decoding, slowly, tmp_path, command, seed):
    words, lines, records, whole = decoding
    chance, out = random.Random(f"{command} {seed}"), tmp_path / "T"
    process = start(*words(command, out, 1), program=slowly)
    while process.poll() is None and not lines(command, out):
        time.sleep(0.01)
    time.sleep(chance.uniform(0, 1.0))
    assert process.poll() is None  # eleven more take 1.1 seconds
    process.kill()
    process.communicate()
    before = [line for line in lines(command, out) if line.endswith(b"}")]
    assert tabom.main(words(command, out, 3)) == 0
    after = lines(command, out)
    assert after[: len(before)] == before and len(after) == 12
    alike(records(command, out), whole[command])


@pytest.mark.parametrize("command", ["distill", "evaluate"])
def test_a_full_disk_keeps_what_was_decoded(decoding, tmp_path, command):
    words, lines, records, whole = decoding
    out = tmp_path / "T"
    process = start(*words(command, out, 1), largest_file=8_000)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1 and "Traceback" not in errors
    assert re.fullmatch(r"error: .*(too large|No space).*", errors.strip().splitlines()[-1])
    before = [line for line in lines(command, out) if line.endswith(b"}")]
    assert 0 < len(before) < 12
    assert tabom.main(words(command, out, 12)) == 0
    assert lines(command, out)[: len(before)] == before
    alike(records(command, out), whole[command])


@pytest.mark.skipif(not Path("/sys/kernel").is_dir(), reason="needs a folder that even root cannot write into")
@pytest.mark.parametrize("command", ["distill", "evaluate", "train"])
def test_a_folder_that_cannot_be_written_is_one_line(decoding, tiny, trajectories, capsys, command):
    out = "/sys/kernel/tabom/out"
    train = ["train", *flags(model=tiny, data=trajectories, out=out, **TRAIN)]
    assert tabom.main(train if command == "train" else decoding[0](command, out, 4)) == 1
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error")]
    assert "/sys/kernel/tabom" in line


# ---------------------------------------------------------------------------------------------------- many processes


@pytest.mark.slow
def test_one_two_and_four_processes_train_the_same(tiny, trajectories, tmp_path):
    """Ten responses of different lengths in batches of 4, 4 and 2: of four processes, two have nothing in the last."""
    records = data.read_trajectories(trajectories)[:10]
    file = tmp_path / "trajectories.jsonl"
    with open(file, "w") as f:
        for i, r in enumerate(records):
            n = 37 - 3 * i
            rank = {k: j for j, k in enumerate(sorted(r["order"][:n]))}
            cut = {k: r[k][:n] for k in data.PER_TOKEN} | dict(order=[rank[k] for k in r["order"][:n]])
            f.write(json.dumps({**r, **cut, "prompt_ids": r["prompt_ids"][: 37 - i]}) + "\n")
    losses = {}
    for processes in (1, 2, 4):
        out = tmp_path / f"R-{processes}"
        settings = {**TRAIN, "epochs": 7, "lr": 1e-3, "batch_size": 2}
        process = start("train", *flags(model=tiny, data=file, out=out, **settings), processes=processes)
        _, errors = process.communicate(timeout=280)
        assert process.returncode == 0, errors
        losses[processes] = [(line["loss"], line["ce"], line["rank"]) for line in untimed(out)]
    assert len(losses[1]) == 21 and len({loss for loss, _, _ in losses[1]}) == 21
    for processes in (2, 4):
        for one, several in zip(losses[1], losses[processes]):
            assert one == pytest.approx(several, abs=1e-6)


def worker(out, rank):
    """The process id of a rank of the run that writes into out."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words, environment = (folder / "cmdline").read_bytes(), (folder / "environ").read_bytes()
        except OSError:
            continue
        if str(out).encode() in words and f"\0RANK={rank}\0".encode() in b"\0" + environment:
            return int(folder.name)
    return None


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the processes in /proc")
def test_a_process_that_dies_takes_the_others_down(tiny, trajectories, tmp_path):
    out = tmp_path / "R"
    words = ["train", *flags(model=tiny, data=trajectories, out=out, **{**TRAIN, "epochs": 500, "warmup": 2})]
    process = start(*words, processes=2)
    while process.poll() is None and not ((out / "metrics.jsonl").is_file() and len(untimed(out)) > 3):
        time.sleep(0.05)
    os.kill(worker(out, 1), signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode != 0 and worker(out, 0) is None
    steps = len(untimed(out))
    assert steps < 1500 and runs.last_checkpoint(out) is not None


@pytest.mark.slow
def test_the_error_of_one_process_is_shown_first(tiny, trajectories, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys, tabom, train\n"
        "step = train.train_step\n"
        "def broken(*arguments):\n"
        "    if os.environ['RANK'] == '1' and arguments[1] == 2:\n"
        "        raise ValueError('rank 1 found a bad thing')\n"
        "    return step(*arguments)\n"
        "train.train_step = broken\n"
        "sys.exit(tabom.main())\n"
    )
    words = ["train", *flags(model=tiny, data=trajectories, out=tmp_path / "R", **TRAIN)]
    process = start(*words, program=program, processes=2)
    _, errors = process.communicate(timeout=90)
    assert process.returncode != 0
    first = re.search(r"error: .*", errors, re.IGNORECASE).group()
    assert first == "error: rank 1 found a bad thing"
    assert [line["step"] for line in untimed(tmp_path / "R")] == [1, 2]
