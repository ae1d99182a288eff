"""Files and folders that appear whole or not at all, and run folders that the same command continues.

    out = disk.open_run("out/R", meta, processes)   # a new folder, or the same run continued
    with disk.atomic_folder(out / "epoch-1") as beside:
        ...                                         # written beside its place, renamed once

A process may be killed at any time: what was there before stays whole.
"""

import contextlib
import gzip
import hashlib
import json
import os
import platform
import re
import shutil
import uuid
from pathlib import Path

import torch
from safetensors.torch import save_file

import data
import lora
from runs import torchrun

SHOWN = 5  # so many differences does the error for another run's folder name


def open_run(out, meta, processes, may_change=()):
    """Make the folder of a run, or continue the same run. meta, in its meta.json, identifies the run; only its keys
    `may_change` may differ later. Raises FileExistsError, on every process, for a folder that holds anything
    else, or that is not the same folder for all processes; ValueError where they have different files or options."""
    out = Path(out)
    same_everywhere(meta, processes)
    processes.agree(torchrun.problem_of(same_run, out, meta, may_change))  # all have looked before one writes

    def begin():
        out.mkdir(parents=True, exist_ok=True)
        if processes.lock(out):
            remove_left_over(out)
        with atomic_file(out / "meta.json") as f:
            f.write(json.dumps(meta, indent=2) + "\n")

    processes.agree(torchrun.problem_of(begin) if processes.first else None)
    processes.must_share(out)
    return out


def same_everywhere(meta, processes):
    """Raises ValueError, on every process, where one has other files or options than the first. The paths of model,
    adapter and data may differ: their content is in meta."""
    first, *others = processes.gather([dict(meta, node=platform.node())])
    for number, other in enumerate(others, 1):
        for key in {**first, **other}:
            ours, theirs = first.get(key), other.get(key)
            if ours != theirs and key not in ("model", "adapter", "data", "versions", "node"):
                raise ValueError(
                    f"process {number} on {other['node']} and process 0 on {first['node']} differ in {key}: "
                    f"{theirs!s:.24} and {ours!s:.24}; give all nodes the same files and options"
                )


def same_run(out, meta, may_change=()):
    """Raises FileExistsError for a folder that holds anything but this run, begun earlier; writes nothing."""
    out, meta = Path(out), json.loads(json.dumps(meta))
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file, not a folder")
    if (out / "meta.json").is_file():
        before = data.read_json(out / "meta.json")
        if "command" not in may_change and before.get("command") != meta.get("command"):  # the rest differs anyway
            raise FileExistsError(f"{out} holds a run of {before.get('command')}: choose another --out")
        differ = [k for k in {**before, **meta} if k not in {*may_change, "versions"} and before.get(k) != meta.get(k)]
        if differ:
            changes = ", ".join(f"{k} was {before.get(k)!r} and is now {meta.get(k)!r}" for k in differ[:SHOWN])
            if len(differ) > SHOWN:
                changes = f"{changes}, and {len(differ) - SHOWN} more"
            raise FileExistsError(f"{out} holds another run: {changes}; use its options, or choose another --out")
    elif out.is_dir() and any(file.suffix != ".tmp" and file.name != torchrun.LOCK for file in out.iterdir()):
        raise FileExistsError(f"{out} is not empty and holds no run that could continue: choose another --out")


def json_line(row):
    """A row of JSON Lines. Text is written as it is, but for lone surrogates, which no file can hold."""
    line = json.dumps(row, ensure_ascii=False)
    try:
        line.encode()
    except UnicodeEncodeError:
        line = json.dumps(row)
    return line + "\n"


def beside(path):
    """A name beside a path that nobody has."""
    return path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")


LEFT = re.compile(r".*\.[0-9a-f]{8}\.tmp")  # what a killed process leaves: a name that beside() made


def remove_left_over(folder):
    """Remove what a killed process has left in a run folder that is locked."""
    for path in folder.iterdir():
        if LEFT.fullmatch(path.name) and path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif LEFT.fullmatch(path.name):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_file(path):
    """A text file that appears whole or not at all; compressed where its name ends in .gz. Of a link the target is
    written, and into a device or a pipe, as open() does. Raises IsADirectoryError for the path of a folder."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {path.parent}")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, not a file")
    opened = gzip.open if path.suffix == ".gz" else open
    if path.exists() and not path.is_file():
        with opened(path, "wt", encoding="utf-8") as f:
            yield f
        return
    path = path.resolve()
    whole = beside(path)
    try:
        with opened(whole, "wt", encoding="utf-8") as f:
            yield f
            f.flush()
        with open(whole, "rb") as f:
            os.fsync(f.fileno())
        os.replace(whole, path)
    finally:
        whole.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path, processes=None):
    """A folder that appears whole or not at all: written beside its place, and renamed once.

    processes: all of them write into it together, and the first makes and renames it. Raises FileExistsError for a
    place that is not free, before and after it is written."""
    path, first = Path(path).resolve(), processes is None or processes.first
    whole = beside(path)
    if processes is not None:
        whole = processes.gather([whole])[0]  # the first process's choice
    if first:
        must_be_free(path)
        whole.mkdir(parents=True)
    if processes is not None:
        processes.barrier()  # it is there
    try:
        yield whole
        if processes is not None:
            processes.barrier()  # all have written
        if first:
            must_be_free(path)  # others may have been faster
            os.replace(whole, path)
    finally:
        if first:
            shutil.rmtree(whole, ignore_errors=True)


def must_be_free(path):
    """Raises FileExistsError for a path that is there already, unless it is an empty folder, and NotADirectoryError for
    one below a file."""
    if Path(path).exists() and (not Path(path).is_dir() or any(Path(path).iterdir())):
        raise FileExistsError(f"{path} is there already: choose another --out")
    above = next(filter(Path.exists, Path(path).absolute().parents))
    if not above.is_dir():
        raise NotADirectoryError(f"--out {path}: {above} is a file")


def versions():
    return dict(python=platform.python_version(), torch=torch.__version__)


def fingerprint(path):
    """SHA-256 of a file, or of the names, sizes and bytes of the files in a model or adapter folder: of those above 16
    MiB 4 KiB of every MiB, which no tensor of a model of that size slips through."""
    digest, path = hashlib.sha256(), Path(path)
    for file in [path] if path.is_file() else sorted(path.glob("*")):
        if file.suffix in (".safetensors", ".json", ".txt", ".jinja") or file == path:
            with open(file, "rb") as f:
                size = file.stat().st_size
                digest.update(f"{file.name} {size}".encode() if file != path else b"")
                whole = file == path or size < 2**24
                for start in range(0, size, 2**20):
                    f.seek(start)
                    digest.update(f.read(2**20 if whole else 2**12))
    return digest.hexdigest()


def data_fingerprint(path):
    """SHA-256 of the file that a dataset is, or of each of its files."""
    hashes = list(map(fingerprint, data.files_of(path)))
    return hashes[0] if len(hashes) == 1 else hashes


def content_hashes(folder, adapter=None):
    """What a run depends on besides its options: the bytes of the model and of the adapter."""
    adapter_sha256 = None if adapter is None else fingerprint(lora.adapter_folder(adapter))
    return dict(model_sha256=fingerprint(folder), adapter_sha256=adapter_sha256)


def drop_torn_line(file):
    """Cut off what a process left behind that was killed while it wrote a line."""
    content = file.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(file, whole)


def keep_lines(file, count):
    """Cut a log back to its first lines: those of the steps that the checkpoint knows. A torn last line is none."""
    if file.is_file():
        drop_torn_line(file)
        lines = data.read_text(file).splitlines(keepends=True)
        with atomic_file(file) as f:
            f.writelines(lines[:count])


def save_tensors(tensors, file):
    """A safetensors file that others can read: the library makes it private (mode 600), whatever the umask."""
    file.unlink(missing_ok=True)
    file.touch()  # made the usual way, it has the mode that the umask gives
    mode = file.stat().st_mode
    save_file(tensors, file, metadata={"format": "pt"})
    file.chmod(mode)
