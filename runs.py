"""The processes of a run, the folder that it writes, and its checkpoints.

    ranks = runs.Ranks("auto")                                      # this process among those of torchrun
    m, tok, folder = runs.load_model(c, ranks, c.adapter)           # c: options with a model and a dtype
    out = runs.open_run("out/R", meta, ranks)                       # a new folder, or the same run continued
    with runs.atomic_folder(out / "epoch-1") as beside:             # appears whole or not at all
        runs.write_checkpoint(beside, m, folder, c.model, weights, optimizer, step)
    step = runs.restore(runs.last_checkpoint(out), weights, optimizer)

A run may be killed at any time: what it has finished stays whole, and the same command continues from there.
"""

import contextlib
import datetime
import hashlib
import json
import os
import platform
import shutil
import signal
import sys
import threading
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import data
import lora
import model

# -------------------------------------------------------------------------------------------------------- processes


class Ranks:
    """This process among those that torchrun started: its rank, its device, and what they do together."""

    def __init__(self, device="auto", alone=False):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.shows = self.rank == 0  # progress
        if alone:  # one of several that work each for itself
            self.rank, self.world = 0, 1
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        if device == "cuda":
            device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        try:
            self.device = torch.device(device)
            torch.empty(1, device=self.device).item()
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)
        except Exception as e:  # torch raises whatever its backends do
            raise ValueError(f"--device {device} cannot be used here: {str(e).strip().splitlines()[0]}") from e
        if self.world > 1 and not dist.is_initialized():
            patient = datetime.timedelta(hours=2)  # others wait while the first writes a checkpoint
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo", timeout=patient)

    @property
    def first(self):
        return self.rank == 0

    def barrier(self):
        if self.world > 1:
            dist.barrier()

    def sum(self, values):
        """The sum over all processes of a list of numbers."""
        total = torch.tensor(values, dtype=torch.float32 if self.device.type == "mps" else torch.float64)
        if self.world > 1:
            total = total.to(self.device)
            dist.all_reduce(total)
        return total.tolist()

    def gather(self, items):
        """The lists of all processes, one after the other, on every process."""
        if self.world == 1:
            return list(items)
        lists = [None] * self.world
        dist.all_gather_object(lists, list(items))
        return [item for one in lists for item in one]

    def sum_gradients(self, parameters):
        """Add up the gradients of all processes, in one message of float32 for each 64 MiB."""
        if self.world == 1:
            return
        for p in parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad  # a process without an example has none
        bucket, size = [], 0
        for i, p in enumerate(parameters, 1):
            bucket, size = [*bucket, p.grad], size + p.numel()
            if size >= 2**24 or i == len(parameters):
                flat = torch.cat([g.float().flatten() for g in bucket])
                dist.all_reduce(flat)
                for g, total in zip(bucket, flat.split([g.numel() for g in bucket])):
                    g.copy_(total.view_as(g))
                bucket, size = [], 0


def load_model(options, ranks, adapter=None, weights=None, dtype="auto"):
    """The model on this process's device, its tokenizer, and the folder that both came from.

    weights: another folder with the same model's tensors, such as a checkpoint."""
    folder = model.resolve(options.model)
    m = model.load(weights or folder, dtype=model.DTYPES[resolve_dtype(options, ranks, dtype)], device=ranks.device)
    tok = data.load_tokenizer(folder)
    if tok.size > m.config.vocab_size:
        rows = m.config.vocab_size
        raise ValueError(f"{folder}: the tokenizer has ids up to {tok.size - 1}, the model only {rows} rows")
    if adapter is not None:
        lora.load(m, adapter)
    if options.compile:
        torch._dynamo.config.recompile_limit = 64  # of one code, shared by all blocks and models, adapted or not
        for block in m.layers:
            block.compile(dynamic=True)
    return m, tok, folder


def resolve_dtype(options, ranks, dtype="auto"):
    """The dtype asked for; "auto" means `dtype`, and that again what the device is best at."""
    dtype = options.dtype if options.dtype != "auto" else dtype
    return ("bfloat16" if ranks.device.type == "cuda" else "float32") if dtype == "auto" else dtype


# ------------------------------------------------------------------------------------------------------ run folders


def open_run(out, meta, ranks, free=()):
    """Make the folder of a run, or continue the same one. What the run is stands in its meta.json; `free` keys may
    change between two starts. Raises FileExistsError, on every process, for a folder that holds anything else."""
    out = Path(out)
    same_run(out, meta, free)
    ranks.barrier()  # all have looked before one writes
    if ranks.first:
        out.mkdir(parents=True, exist_ok=True)
        lock(out)
        with atomic_file(out / "meta.json") as f:
            f.write(json.dumps(meta, indent=2) + "\n")
    ranks.barrier()
    return out


def same_run(out, meta, free=()):
    """Raises FileExistsError for a folder that holds anything but a beginning of this run; writes nothing."""
    out, meta = Path(out), json.loads(json.dumps(meta))
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file, not a folder")
    if (out / "meta.json").is_file():
        before = data.read_json(out / "meta.json")
        differ = [k for k in {**before, **meta} if k not in {*free, "versions"} and before.get(k) != meta.get(k)]
        if differ:
            changes = ", ".join(f"{k} was {before.get(k)!r} and is now {meta.get(k)!r}" for k in differ)
            raise FileExistsError(f"{out} holds another run: {changes}; choose another --out")
    elif out.is_dir() and any(file.suffix != ".tmp" and file.name != LOCK for file in out.iterdir()):
        raise FileExistsError(f"{out} is not empty and holds no run of ours: choose another --out")


LOCK = "lock"
locked = {}  # folder -> the open file that holds its lock for as long as this process lives


def lock(out):
    """Keep other processes out of a folder -> whether that is so. Raises FileExistsError where one is at it already.

    Not on Windows, which has no such locks, and not between machines whose file system does not share them."""
    try:
        import fcntl
    except ImportError:
        return False
    if out.resolve() not in locked:
        f = open(out / LOCK, "a")  # noqa: SIM115, it stays open
        try:
            fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            f.close()
            raise FileExistsError(f"another process is writing into {out}: wait for it, or choose another --out") from e
        except OSError:  # a file system without locks
            f.close()
            return False
        locked[out.resolve()] = f
    return True


@contextlib.contextmanager
def unlocking():
    """Gives back at its end the folders that were locked inside it: for a process that makes many runs."""
    before = set(locked)
    try:
        yield
    finally:
        for folder in set(locked) - before:
            locked.pop(folder).close()


@contextlib.contextmanager
def atomic_file(path):
    """A text file that appears whole or not at all."""
    beside = path.with_name(path.name + ".tmp")
    try:
        with open(beside, "w", encoding="utf-8") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path):
    """A folder that appears whole or not at all: written beside its place, and renamed once."""
    path = Path(path)
    must_be_free(path)
    beside = path.with_name(path.name + ".tmp")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        yield beside
        os.replace(beside, path)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def must_be_free(path):
    """Raises FileExistsError for a path that is there already, unless it is an empty folder."""
    if Path(path).exists() and (not Path(path).is_dir() or any(Path(path).iterdir())):
        raise FileExistsError(f"{path} is there already: choose another --out")


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


def identity(c, folder, adapter=None):
    """What a run depends on besides its options: the bytes of the model and of the adapter."""
    return dict(model_sha256=fingerprint(folder), adapter_sha256=None if adapter is None else fingerprint(adapter))


def drop_torn_line(file):
    """Cut off what a process left behind that was killed while it wrote a line."""
    content = file.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(file, whole)


def keep_lines(file, count):
    """Cut a log back to its first lines: those of the steps that the checkpoint knows."""
    if file.is_file():
        lines = file.read_text().splitlines(keepends=True)
        with atomic_file(file) as f:
            f.writelines(lines[:count])


def copy_extras(source, target):
    """The small files of a model folder that are no weights: tokenizer, chat template, generation settings, code."""
    for file in Path(source).iterdir():
        weights = file.suffix in (".safetensors", ".bin") or file.name.endswith(".index.json")
        weights = weights or file.name in TRAINER
        if file.is_file() and not weights and not (Path(target) / file.name).exists() and file.stat().st_size < 2**26:
            shutil.copyfile(file, Path(target) / file.name)


# ------------------------------------------------------------------------------------------------------ checkpoints

MANIFEST = "manifest.json"  # the SHA-256 of each file of a checkpoint
TRAINER = (
    "optimizer.safetensors",
    "reference.safetensors",
    "trainer.json",
    MANIFEST,
)  # what only a continued run needs


def write_checkpoint(folder, m, base_folder, base, weights, optimizer, step, reference=None):
    """An adapter (or a model) that every command takes, and beside it what a continued run needs."""
    if lora.layers(m):
        lora.save(m, folder, base)
    else:
        model.save(m, folder)
        copy_extras(base_folder, folder)
    state = {f"{k}.{name}": v for name, p in weights.items() for k, v in optimizer.state[p].items()}
    save_file({k: v.detach().cpu().contiguous() for k, v in state.items()}, folder / "optimizer.safetensors")
    if reference is not None and reference.adapter:
        save_file({k: v.cpu() for k, v in reference.adapter.items()}, folder / "reference.safetensors")
    (folder / "trainer.json").write_text(json.dumps(dict(step=step)) + "\n")
    hashes = {file.name: fingerprint(file) for file in sorted(folder.iterdir())}
    (folder / MANIFEST).write_text(json.dumps(hashes, indent=2) + "\n")


def intact(checkpoint):
    """Whether the files of a checkpoint are those that were written."""
    try:
        hashes = data.read_json(checkpoint / MANIFEST)
        return bool(hashes) and all(fingerprint(checkpoint / name) == sha for name, sha in hashes.items())
    except (OSError, ValueError):
        return False


def checkpoints(out):
    """The checkpoints of a run, damaged ones too: (step, folder), by rising step."""
    found = []
    for folder in (*out.glob("epoch-*"), *out.glob("step-*")):
        with contextlib.suppress(OSError, ValueError):
            if folder.suffix != ".tmp" and type(step := data.read_json(folder / "trainer.json").get("step")) is int:
                found.append((step, folder))
    return sorted(found)


def last_checkpoint(out):
    """The folder of the latest intact checkpoint in a run, or None. A damaged one is named on stderr and left alone."""
    for _, folder in reversed(checkpoints(out)):
        if intact(folder):
            return folder
        tqdm.write(f"warning: {folder} is damaged: the checkpoint before it is used", sys.stderr)
    return None


def prune(out, keep):
    """Remove all checkpoints between epochs but the last few."""
    between = [folder for _, folder in checkpoints(out) if folder.name.startswith("step-")]
    for folder in between[: max(len(between) - keep, 0)]:
        shutil.rmtree(folder)


@contextlib.contextmanager
def stop_signals():
    """Inside, SIGTERM and SIGINT do not end the process, but are put into the list that this gives."""
    seen, before = [], {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, signal.SIGINT):
            before[number] = signal.signal(number, lambda n, _: seen.append(n))
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def restore(checkpoint, weights, optimizer, reference=None):
    """Fill the optimizer's state, and T3D's reference, from a checkpoint whose weights are loaded already -> optimizer
    steps done."""
    state = load_file(checkpoint / "optimizer.safetensors")
    step = data.read_json(checkpoint / "trainer.json").get("step")
    wanted = {f"{k}.{name}" for name in weights for k in ("step", "exp_avg", "exp_avg_sq")}
    if type(step) is not int or state.keys() not in (wanted, set()):  # none where no step was finite yet
        raise ValueError(f"{checkpoint}: not a checkpoint of this run: remove it to continue from the one before")
    for name, p in weights.items() if state else ():
        moments = {k: state[f"{k}.{name}"].to(p.device) for k in ("exp_avg", "exp_avg_sq")}
        step_of = state[f"step.{name}"]  # a tensor that lives on the CPU, but for the fused AdamW
        optimizer.state[p] = {"step": step_of.to(p.device) if optimizer.defaults["fused"] else step_of, **moments}
    if reference is not None and (checkpoint / "reference.safetensors").is_file():
        stored = load_file(checkpoint / "reference.safetensors")
        reference.adapter = {k: v.to(weights[k].device) for k, v in stored.items()}
    return step
