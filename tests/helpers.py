"""What several test files share: golden checkpoints, a model that is a table, commands run inside this process and as a
user runs them, broken model folders, what a run wrote."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file

import data
import model
import tabom

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "tests" / "golden"


class Golden:
    """A tiny checkpoint in the official layout, and what the official implementation computed with it."""

    def __init__(self, family):
        self.family = family
        self.folder = FOLDER / f"{family}-tiny"
        self.expected = load_file(self.folder / "expected.safetensors")
        self.objective = load_file(self.folder / "objective.safetensors")
        self.decode_cases = json.loads((self.folder / "expected.json").read_text())["cases"]
        self.objective_cases = json.loads((self.folder / "objective.json").read_text())

    def load(self, **options):
        return model.load(self.folder, **options)


class Toy:
    """Logits from a table by place (counted over real tokens) and from what is visible. Records what it was asked."""

    def __init__(self, vocab=13, seed=0, mask_logit=-30.0, scale=2.0):
        g = torch.Generator().manual_seed(seed)
        self.by_place = torch.randn(2048, vocab, generator=g)
        self.by_token = torch.randn(vocab, vocab, generator=g)
        self.mask_logit, self.scale = mask_logit, scale
        self.config = SimpleNamespace(mask_id=vocab - 1)
        self.calls = []  # (ids, attention_mask, positions) of every call

    def __call__(self, ids, attention_mask=None, positions=None):
        self.calls.append((ids.clone(), attention_mask, positions))
        seen = torch.ones_like(ids) if attention_mask is None else attention_mask.long()
        place = (seen.cumsum(1) - 1).clamp(min=0)
        weight = seen / (1 + place)  # near the start counts more: the order of the tokens matters
        context = (self.by_token[ids] * weight[..., None]).sum(1, keepdim=True)
        logits = self.scale * (self.by_place[place] + context)  # [B, L, V]
        logits[..., self.config.mask_id] = self.mask_logit
        return logits if positions is None else logits.gather(1, positions[..., None].expand(-1, -1, logits.shape[-1]))


BYTES_CONFIG = dict(
    model_type="llada", d_model=32, n_layers=1, n_heads=2, mlp_hidden_size=32, vocab_size=260, rms_norm_eps=1e-5,
    rope_theta=1e4, weight_tying=True, mask_token_id=257, eos_token_id=256, pad_token_id=256, init_std=0.5,
)  # fmt: skip


# A short training of the tiny model: 12 trajectories in batches of 5 make 3 steps an epoch.
TRAIN = dict(keep="all", window=8, epochs=2, global_batch=5, batch_size=2, lr=1e-2, warmup=2)


# --------------------------------------------------------------------------------------------------------- commands


def flags(**options):
    """{'lora_rank': 4, 'watch': True} -> ['--lora-rank', '4', '--watch']"""
    words = []
    for name, value in options.items():
        words.append("--" + name.replace("_", "-"))
        if value is not True:
            words.append(str(value))
    return words


def last_json(text):
    return json.loads(text.strip().splitlines()[-1])


def run(capsys, command, **options):
    """Run a command in this process -> its result and what it wrote to stderr."""
    status = tabom.main([command, *flags(**options)])
    captured = capsys.readouterr()
    assert status == 0, captured.err
    return last_json(captured.out), captured.err


def run_train(capsys, **options):
    """Run train with the options of TRAIN and these -> its result."""
    return run(capsys, "train", **{**TRAIN, **options})[0]


def fails(capsys, message, command, **options):
    """The command ends with status 1 and one line on stderr that says what is wrong."""
    assert tabom.main([command, *flags(**options)]) == 1
    captured = capsys.readouterr()
    (line,) = [x for x in captured.err.splitlines() if x.startswith("error")]
    assert re.search(message, line), line
    assert captured.out == ""


# Seconds after which a process counts as hung. No test waits for it; a busy machine may be 50 times slower than ours.
HUNG = 900


def interpreter(program, processes=1):
    """(the command that starts a program of ours, under torchrun for several processes; its environment)"""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    return [*command, str(program)], {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def start(*words, program=ROOT / "tabom.py", processes=1, largest_file=None):
    """tabom.py in a process that a test may kill. largest_file: bytes at which the disk of that process is full."""

    def fill():
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # tests in the background of a shell inherit that it is ignored
        if largest_file is not None:
            import resource  # not on Windows

            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))

    command, env = interpreter(program, processes)
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([*command, *map(str, words)], env=env, preexec_fn=fill, **pipes)


def wait_for(process, reached):
    """Wait until reached() is true, which the process must live to see: a state of its files, not a time."""
    deadline = time.monotonic() + HUNG
    while not reached():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "the process hangs"
        time.sleep(0.005)


@contextlib.contextmanager
def locked_by_another(folder):
    """Inside, another process holds the lock of a run folder."""
    program = (
        "import fcntl, sys\n"
        "file = open(sys.argv[1], 'a')\n"
        "fcntl.lockf(file, fcntl.LOCK_EX)\n"
        "print('locked', flush=True)\n"
        "sys.stdin.read()\n"
    )
    command, pipes = [sys.executable, "-c", program, str(folder / "lock")], dict(stdin=subprocess.PIPE, text=True)
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, **pipes)
    try:
        assert holder.stdout.readline() == "locked\n"
        yield
    finally:
        holder.communicate("")


def shell(*words, processes=1, **environment):
    """Run tabom.py as a user does -> the finished process."""
    command, env = interpreter(ROOT / "tabom.py", processes)
    words = [*command, *map(str, words)]
    return subprocess.run(words, capture_output=True, text=True, env={**env, **environment}, timeout=HUNG)


# ------------------------------------------------------------------------------------------------ what a run wrote


def metrics(folder):
    """The lines of metrics.jsonl, without what depends on the machine's speed."""
    lines = []
    for line in (Path(folder) / "metrics.jsonl").read_text().splitlines():
        line = json.loads(line)
        assert line.pop("tokens_per_second") > 0
        lines.append(line)
    return lines


def weights(folder):
    """The tensors of an adapter, by name."""
    return load_file(Path(folder) / "adapter_model.safetensors")


def meta(folder):
    return json.loads((Path(folder) / "meta.json").read_text())


def decoded(folder):
    """What was decoded and when, by id; entropies differ in the last digit with the shape of a batch."""
    same = ("prompt_ids", "response_ids", "order", "step", "text", "finished", "correct")
    found = {}
    for record in data.read_trajectories(folder):
        found[record["id"]] = [record[name] for name in same]
    return found


def write_lines(path, rows):
    """Write JSON Lines -> the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# ----------------------------------------------------------------------------------------------------- broken models


def changed_model(tmp_path, source, change=lambda folder: None):
    """A copy of a model folder, after change(folder)."""
    folder = tmp_path / "changed"
    shutil.copytree(source, folder)
    change(folder)
    return folder


def edit_json(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
