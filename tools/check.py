"""One command that says whether the project works on this machine, and how fast.

    python tabom.py check                                                  # 40 s on one core; on a GPU not yet run
    python tabom.py check --only logits,decoding --device cuda
    python tabom.py check --model GSAI-ML/LLaDA-8B-Instruct --adapter out/R/epoch-5

Each line of the table is a comparison with the official code's outputs, with a CPU, or with the same computation made
in another way: passed, failed, skipped with the reason, or shown where it has no limit. The exit status is 1 if one has
failed. What is timed has a limit only where it tells a fault from a slow machine.
"""

import contextlib
import io
import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import data
import distill
import train
from experiments import cost, puzzles
from runs import loading, torchrun
from runs.options import flag, name_list, opt
from tools import checks
from tools.checks import ROOT, Row, Skip, equal

TINY = ROOT / "tiny"
ENDS = 60  # seconds in which all processes have to end after one has failed


@dataclass
class CheckOptions(loading.ModelOptions):
    """check"""

    model: str | None = opt(None, "also check a model of yours: folder, or Hub repo id")
    adapter: str | None = opt(None, "with --model: an adapter for it")
    only: tuple | None = opt(None, "only these checks, comma-separated", parse=name_list)


def check(c):
    """Make the checks on a device -> how many rows have passed, failed, been skipped, or only been shown, and the rows.
    Prints a table.

    Raises ValueError for an unknown check, and for --adapter without --model."""
    if c.adapter is not None and c.model is None:
        raise ValueError("--adapter is checked on its base: give --model")
    for name in c.only or ():
        if name not in CHECKS:
            raise ValueError(f"--only {name}: there are {', '.join(CHECKS)}")
    processes = torchrun.Processes(c.device, alone=True)
    processes.shows = False
    found = []
    print("| check | ours | reference | off by | limit | |\n| --- | --- | --- | --- | --- | --- |")
    own_first = sorted(CHECKS, key=lambda name: name != "own") if c.model else CHECKS  # a name may be misspelt
    for name in c.only or own_first:
        for row, verdict, reason in rows_of(CHECKS[name], c, processes):
            cells = [f"{name}: {row.name}" if row.name else name, *map(shown, row[1:]), f"{verdict} {reason}".strip()]
            print(f"| {' | '.join(cells)} |", flush=True)
            values = {key: finite(value) for key, value in row._asdict().items()}
            found.append(dict(check=name, **values, verdict=verdict, reason=reason))
    verdicts = [row["verdict"] for row in found]
    counts = {name: verdicts.count(name) for name in ("passed", "failed", "skipped", "shown")}
    return dict(device=str(processes.device), **counts, rows=found)


def rows_of(make, c, processes):
    """The rows of a check, each with its verdict and the reason, where there is one. An error is a failed row."""
    try:
        for row in make(c, processes):
            verdict = "passed" if row.passed else "failed"
            yield row, "shown" if row.limit is None else verdict, ""
    except Skip as e:
        yield Row("", None), "skipped", str(e)
    except Exception as e:  # whatever a device does must not hide what others check
        if os.environ.get("TABOM_DEBUG"):
            raise
        yield Row("", None), "failed", f"{type(e).__name__} {' '.join(str(e).split())[:200]}"


def shown(value):
    """A cell of the table."""
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value).replace("|", "/")


def finite(value):
    """A value for JSON, which has no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ------------------------------------------------------------------------------------------- runs of the tiny model


def trained(processes, folder, out, *, count=1, **options):
    """Train the tiny model on the trajectories of a folder, in this process or in several -> its last metrics."""
    options.update(model=str(TINY), data=str(folder / "T"), out=str(folder / out), keep="all", dtype="float32")
    options.update(window=8, warmup=0, lr=1e-2, global_batch=6, batch_size=2)
    if count == 1:
        train.train(train.TrainOptions(**options, device=str(processes.device)), processes)
        processes.unlock()
    else:
        words = ["--shard"] * options.pop("shard", False)
        for name, value in dict(options, device=processes.device.type).items():
            words += [flag(name), str(value)]
        done = launched(count, ROOT / "tabom.py", "train", *words)
        if done.returncode:
            raise RuntimeError(done.stderr.strip().splitlines()[0])
    *_, (_, last) = data.read_rows(folder / out / "metrics.jsonl")
    return last


def launched(count, program, *words, **environment):
    """A program under torchrun, with the project on its path -> the finished process."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
    env = dict(dict(os.environ, PYTHONPATH=str(ROOT)), **environment)
    return subprocess.run([*command, str(program), *map(str, words)], env=env, capture_output=True, text=True)


def distilled(processes, folder):
    """Trajectories of six puzzles in folder/T -> how many. Raises Skip without the tiny model."""
    if not TINY.is_dir():
        raise Skip(f"{TINY} is not there: the tiny model comes with a clone of the project")
    file = puzzles.write_puzzles(folder / "puzzles.jsonl", ["latin"], 6, False, 0)
    options = dict(model=str(TINY), data=str(file), out=str(folder / "T"), check="none", dtype="float32")
    found = distill.distill(distill.DistillOptions(**options, device=str(processes.device)), processes)
    processes.unlock()
    return found["trajectories"]


def training(c, processes):
    """distill, then three steps of train: at once, and two and one more from the checkpoint."""
    tolerance = 0.0 if processes.device.type == "cpu" else 1e-3  # sums have no fixed order on a GPU
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        yield equal("trajectories", distilled(processes, folder), 6)
        whole = trained(processes, folder, "whole", epochs=3)
        trained(processes, folder, "parts", epochs=3, stop_after=2)
        parts = trained(processes, folder, "parts", epochs=3)
        for name in ("loss", "grad_norm"):
            yield equal(f"{name} of step 3, continued and not", parts[name], whole[name], tolerance * abs(whole[name]))


# A process that fails in its second step, and says when
FAILS = """
import os, sys, time
import tabom, train
from runs import torchrun

step = train.train_step

def failing(run, number, *more):
    if number == 1 and os.environ["RANK"] == "1":
        open(os.environ["CHECK_FAILED"], "w").write(str(time.time()))
        raise ValueError("on purpose")
    return step(run, number, *more)

train.train_step = failing
torchrun.leave(tabom.main(sys.argv[1:]))
"""


def processes_together(c, processes):
    """The loss on two processes and on one; on two GPUs also with --shard, and how long until all end after one
    fails."""
    kind = processes.device.type
    if kind not in ("cuda", "cpu"):
        raise Skip(f"several processes cannot share {kind}")
    if kind == "cuda" and torch.cuda.device_count() < 2:
        raise Skip("one GPU is visible, and two processes need two")
    tolerance = 1e-6 if kind == "cpu" else 1e-3
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        distilled(processes, folder)
        alone = trained(processes, folder, "1", epochs=2)["loss"]
        both = trained(processes, folder, "2", count=2, epochs=2)["loss"]
        yield equal("loss of step 2 on two processes, and on one", both, alone, tolerance)
        if kind == "cpu":
            raise Skip("--shard, and the end after one fails, on a CPU: tests/test_shard.py, tests/test_torchrun.py")
        spread = trained(processes, folder, "spread", count=2, epochs=2, shard=True)["loss"]
        yield equal("the same with --shard", spread, alone, tolerance)
        yield Row("seconds until all end after one fails", seconds_to_the_end(processes, folder), limit=ENDS)


def seconds_to_the_end(processes, folder):
    """How long two processes take to end after one of them has failed."""
    program, mark = folder / "fails.py", folder / "failed"
    program.write_text(FAILS)
    words = ["--model", TINY, "--data", folder / "T", "--out", folder / "F", "--keep", "all", "--global-batch", 2]
    launched(2, program, "train", *words, "--device", processes.device.type, CHECK_FAILED=str(mark))
    return time.time() - float(mark.read_text())


# ---------------------------------------------------------------------------------------------------- a user's model

PROMPTS = ("What is 17 + 25?", "Name three primary colours.", "Write a Python function that reverses a string.")


def own(c, processes):
    """A user's model: it loads with its tokenizer and adapter, and answers; then what a full run costs on it."""
    if c.model is None:
        raise Skip("no --model")
    begun = time.perf_counter()
    loaded = loading.load_model(c, processes, c.adapter)
    yield Row("seconds to load", time.perf_counter() - begun)
    config = loaded.m.config
    yield Row("family, parameters", f"{config.family}, {sum(p.numel() for p in loaded.m.parameters()):,}")
    yield Row("ids of the tokenizer, rows of the model", loaded.tok.size, config.vocab_size, limit=config.vocab_size)
    for line in loading.disagreements(loaded.tok, config):
        yield Row("warning", line)
    settings = loading.decoder_settings(loading.DecodeOptions(), loaded)
    prompts = [loaded.tok.chat([dict(role="user", content=text)]) for text in PROMPTS]
    begun = time.perf_counter()
    texts, records = distill.answer(loaded.m, loaded.tok, prompts, settings, c.seed)
    seconds = time.perf_counter() - begun
    for prompt, text in zip(PROMPTS, texts):
        yield Row(prompt, repr(text[:60]))
    yield Row("tokens a second, 3 prompts", sum(len(record["response_ids"]) for record in records) / seconds)
    if processes.device.type == "cuda":
        yield Row("peak of memory, GB", torch.cuda.max_memory_allocated() / 1e9)
    words = [str(loaded.folder)]
    if c.block_causal is not None:
        words += ["--block-causal", str(c.block_causal)]
    with contextlib.redirect_stdout(io.StringIO()) as tables:  # the first below two lines of title
        cost.plan(cost.command_line().parse_args(words))
    for line in tables.getvalue().splitlines()[2:]:
        name, *values = line.strip("| ").split(" | ")
        if values and name != "---":
            yield Row(f"a full run, estimated: {name}", "; ".join(values))


def on_device(make):
    """A check of checks.py, which asks for nothing but the device."""
    return lambda c, processes: make(processes.device)


CHECKS = {  # name -> (options, processes) -> rows
    "environment": on_device(checks.environment),
    "logits": on_device(checks.logits),
    "attention": on_device(checks.attention),
    "decoding": on_device(checks.decoding),
    "batches": on_device(checks.batches),
    "losses": on_device(checks.losses),
    "training": training,
    "waits": on_device(checks.waits),
    "speed": on_device(checks.speeds),
    "compile": on_device(checks.compiled),
    "processes": processes_together,
    "own": own,
}
