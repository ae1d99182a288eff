"""Which run it is that continues, its checkpoints, and what it needs beside the weights.

    with disk.atomic_folder(out / "epoch-1") as beside:
        resume.write_checkpoint(beside, loaded, c, weights, optimizer, step)
    step = resume.restore(resume.last_checkpoint(out), weights, optimizer)

A run may be killed at any time: what it has finished stays whole, and the same command continues from there.
"""

import contextlib
import hashlib
import json
import shutil
import signal
import threading
from pathlib import Path

import torch
from safetensors import safe_open

import data
import lora
import model
from release import recipes
from runs import card, disk, objective_options, shard, torchrun
from runs.options import field_names

MANIFEST = "manifest.json"  # the SHA-256 of each file of a checkpoint
TRAINER = ("optimizer.safetensors", "reference.safetensors", "trainer.json", MANIFEST)  # for a continued run alone
SPREAD = "state"  # the folder in place of the first two where weights are spread over processes: a file of each

# What changes nothing in what a run computes, and may differ when it is continued; and what may be elsewhere then, if
# its content is the same.
MAY_CHANGE_ON_RESUME = ("out", "device", "batch_size", "gradient_checkpointing", "compile", "save_every", "keep_last")
MAY_CHANGE_ON_RESUME += ("stop_after", "log", "unfinished", "shard")
MAY_MOVE = ("model", "data", "adapter", "trained_on")  # the last is in the content of the records


def identity(c, records, held_out=()):
    """What a training run is, for its meta.json: its options, but for MAY_CHANGE_ON_RESUME and those of its objective,
    and the data, also what is held out, by their content."""
    settings = dict(objective=c.objective)
    left_out = {*MAY_CHANGE_ON_RESUME, *field_names(objective_options.ObjectiveOptions)}
    for name in field_names(type(c)):
        if name not in left_out:
            settings[name] = getattr(c, name)
    for name, value in recipes.of(c).items():
        if getattr(c, name) not in (value, list(value) if isinstance(value, tuple) else value):
            settings.setdefault("changed_from_recipe", {})[name] = getattr(c, name)
    # What is trained on, and not the file: a run goes on where the same records have moved elsewhere.
    sha256 = hashlib.sha256(json.dumps([*records, *held_out]).encode()).hexdigest()
    trained_on = "answers" if any(record["order"] is None for record in records) else "trajectories"
    about = dict(trained_on=trained_on, examples=len(records), data_sha256=sha256, versions=disk.versions())
    return dict(command="train", **settings, **about)


def longer_epochs(c, say):
    """The keys of meta.json that may change where --epochs asks for more than the run in --out was started with: none
    if it does not."""
    meta = Path(c.out) / "meta.json"
    before = data.read_json(meta).get("epochs") if meta.is_file() else None
    if type(before) is not int or before >= c.epochs:
        return ()
    say(f"--epochs {c.epochs}, and the run was started with {before}: the learning rate follows the longer cosine")
    return "epochs", "changed_from_recipe"  # the latter may list the epochs; what else it lists is compared


def write_checkpoint(folder, loaded, c, weights, optimizer, step, reference=None, write=True):
    """An adapter (or a model) that every command takes, its card, and beside it what a continued run needs. folder: in
    that of the run; c: TrainOptions. Where the weights are spread over processes all of them call this, and one of
    them with write."""
    m, spread = loaded.m, shard.is_spread(weights.values())
    if lora.layers(m):
        lora.save(m, folder, c.model)
    else:
        model.save(m, folder, whole=shard.whole, write=write)
    state, kept = optimizer_state(weights, optimizer), {} if reference is None else reference.kept
    if spread:
        shard.save({**state, **{f"reference.{name}": tensor for name, tensor in kept.items()}}, folder / SPREAD)
    if not write:
        return
    (folder / card.FILE).write_text(card.text(c, folder.parent, MAY_CHANGE_ON_RESUME), encoding="utf-8")
    if not lora.layers(m):
        copy_extras(loaded.folder, folder)
    if not spread:
        disk.save_tensors({name: shard.whole(tensor) for name, tensor in state.items()}, folder / TRAINER[0])
        if kept:
            disk.save_tensors({name: shard.whole(tensor) for name, tensor in kept.items()}, folder / TRAINER[1])
    (folder / "trainer.json").write_text(json.dumps(dict(step=step, reference=bool(kept))) + "\n")
    hashes = {}  # last: of all that was written, but for the card, which may be edited
    for file in sorted(folder.rglob("*")):
        if file.is_file() and file.name != card.FILE:
            hashes[file.relative_to(folder).as_posix()] = disk.fingerprint(file)
    (folder / MANIFEST).write_text(json.dumps(hashes, indent=2) + "\n")


def copy_extras(source, target):
    """The small files of a model folder that are no weights: tokenizer, chat template, generation settings, code."""
    for file in Path(source).iterdir():
        weights = file.suffix in (".safetensors", ".bin") or file.name.endswith(".index.json") or file.name in TRAINER
        there = (Path(target) / file.name).exists()
        if file.is_file() and not weights and not there and file.stat().st_size < 2**26:
            shutil.copyfile(file, Path(target) / file.name)


def optimizer_state(weights, optimizer):
    """AdamW's state by name: step, exp_avg and exp_avg_sq of each weight; empty before the first step."""
    state = {}
    for name, p in weights.items():
        for key, value in optimizer.state[p].items():
            state[f"{key}.{name}"] = value
    return state


def intact(checkpoint):
    """Whether the files of a checkpoint are those that were written. Raises OSError where they cannot be read."""
    try:
        hashes = data.read_json(checkpoint / MANIFEST)
        return bool(hashes) and all(disk.fingerprint(checkpoint / name) == sha for name, sha in hashes.items())
    except (FileNotFoundError, ValueError):
        return False


def checkpoints(out):
    """The checkpoints of a run, damaged ones too: (step, folder), by rising step."""
    found = []
    for folder in (*out.glob("epoch-*"), *out.glob("step-*")):
        try:
            step = data.read_json(folder / "trainer.json").get("step")
        except (OSError, ValueError):
            continue
        if type(step) is int and folder.suffix != ".tmp":
            found.append((step, folder))
    return sorted(found)


def last_checkpoint(out, warn=None):
    """The folder of the latest intact checkpoint in a run, None where there is none. A damaged one is left alone, and
    named on stderr, or by warn(line)."""
    warn = warn or torchrun.warner(torchrun.Processes("cpu", alone=True))
    for _, folder in reversed(checkpoints(out)):
        if intact(folder):
            return folder
        warn(f"{folder} is damaged: the checkpoint before it is used")
    return None


def where_to_continue(out, processes):
    """The last checkpoint, on every process the one that the first sees. Raises ValueError where all are damaged: to
    begin anew would overwrite them."""
    last = processes.gather([last_checkpoint(out, torchrun.warner(processes))])[0]
    if last is None and checkpoints(out):
        raise ValueError(f"{out}: all its checkpoints are damaged: remove them to begin anew, or take another --out")
    return last


def prune(out, keep, step):
    """Remove all checkpoints between epochs up to a step but the last few. One behind it is damaged: the run continued
    from one before."""
    between = []
    for at, folder in checkpoints(out):
        if at <= step and folder.name.startswith("step-"):
            between.append(folder)
    for folder in between[: max(len(between) - keep, 0)]:
        shutil.rmtree(folder)


@contextlib.contextmanager
def stop_signals():
    """Inside this context, SIGTERM, SIGINT and SIGHUP (a closed terminal) do not end the process: they are appended to
    the list that it yields."""
    seen, before = [], {}
    if threading.current_thread() is threading.main_thread():
        hangup = getattr(signal, "SIGHUP", signal.SIGTERM)  # Windows has none
        for number in {signal.SIGTERM, signal.SIGINT, hangup}:
            if signal.getsignal(number) == signal.SIG_IGN:
                continue  # under nohup, and in the background of a script: it goes on
            before[number] = signal.signal(number, lambda n, _: seen.append(n))
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def restore(checkpoint, weights, optimizer, reference=None):
    """Fill the optimizer's state, and T3D's reference, from a checkpoint whose weights are loaded already -> optimizer
    steps done. Over how many processes the weights were spread then, if at all, does not matter.

    Raises ValueError for a checkpoint of other weights."""
    about, wrong = data.read_json(checkpoint / "trainer.json"), f"{checkpoint}: not a checkpoint of this run"
    if type(about.get("step")) is not int:
        raise ValueError(f"{wrong}: remove it to continue from the one before")
    state = {}
    for name, p in weights.items():
        # The fused AdamW counts its steps on the device, the plain one on the CPU.
        state[f"step.{name}"] = torch.zeros((), device=p.device if optimizer.defaults["fused"] else "cpu")
        state[f"exp_avg.{name}"] = torch.zeros_like(p.detach())
        state[f"exp_avg_sq.{name}"] = torch.zeros_like(p.detach())
    kept = {}
    if about.get("reference"):
        kept = {f"reference.{name}": torch.zeros_like(p.detach()) for name, p in weights.items()}
    if (checkpoint / SPREAD).is_dir():
        stored = state if any((checkpoint / SPREAD).iterdir()) else {}  # none where no step was finite yet
        if stored:
            shard.load({**state, **kept}, checkpoint / SPREAD)
    else:
        stored = fill_from(checkpoint / TRAINER[0], state, wrong)
        if len(stored) not in (0, len(state)):  # empty where no step was finite yet
            raise ValueError(f"{wrong}: remove it to continue from the one before")
        if kept:
            fill_from(checkpoint / TRAINER[1], kept, wrong, "reference.")
    for name, p in weights.items() if stored else ():
        optimizer.state[p] = {key: state[f"{key}.{name}"] for key in ("step", "exp_avg", "exp_avg_sq")}
    if kept:
        reference.restore({name.removeprefix("reference."): tensor for name, tensor in kept.items()})
    return about["step"]


def fill_from(file, tensors, wrong, prefix=""):
    """Fill tensors, {prefix + name: tensor}, from a safetensors file, one after the other -> the names in the file.

    Raises ValueError, with the message `wrong`, for a name that is not among them."""
    with safe_open(file, "pt") as f:
        names = list(f.keys())
        for name in names:
            if prefix + name not in tensors:
                raise ValueError(f"{wrong}: {file.name} has {name}")
            shard.fill(tensors[prefix + name], f, name)
    return names
