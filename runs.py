"""What all commands share: processes, the model, its decoder, run folders that continue, and checkpoints.

    processes = runs.Processes("auto")                              # this process among those of torchrun
    loaded = runs.load_model(c, processes, c.adapter)               # c: ModelOptions; -> m, tok, folder
    settings = runs.decoder_settings(c, loaded)                     # c: DecodeOptions; -> arguments of decode.generate
    out = runs.open_run("out/R", meta, processes)                   # a new folder, or the same run continued
    with runs.atomic_folder(out / "epoch-1") as beside:             # appears whole or not at all
        runs.write_checkpoint(beside, loaded, c.model, weights, optimizer, step)
    step = runs.restore(runs.last_checkpoint(out), weights, optimizer)

A run may be killed at any time: what it has finished stays whole, and the same command continues from there.
"""

import atexit
import contextlib
import dataclasses
import datetime
import gzip
import hashlib
import itertools
import json
import os
import platform
import shutil
import signal
import sys
import threading
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

import data
import decode
import lora
import model
import shard
from options import kind, opt

# ---------------------------------------------------------------------------------------------------------- options


DTYPES = ("auto", *model.DTYPES)


@dataclass
class ModelOptions:
    """the model and the machine"""

    model: str = opt(None, "model folder in Hugging Face layout, or Hub repo id", required=True)
    device: str = opt("auto", "cuda, mps or cpu; auto takes the first one available")
    dtype: str = opt("auto", "of the base model; auto: bfloat16 on cuda, else float32", choices=DTYPES)
    seed: int = opt(0, "seed of every random choice, for any number of processes")
    compile: bool = opt(False, "compile the transformer's blocks: faster after a minute, the same except for rounding")
    block_causal: int | None = opt(
        None, "attention is causal from block to block of this many tokens (A2D: 32 for bd3lm models)", low=1
    )


@dataclass
class DecodeOptions:
    """the decoder (defaults in brackets)"""

    max_new_tokens: int | None = opt(None, "response length in tokens (256)")
    steps: int | None = opt(None, "decoding steps for the whole response (one per token)")
    block_length: int | None = opt(
        None,
        "decode in blocks of this many tokens, left to right; 0 = one (LLaDA 32, Dream 0, SDAR the model's)",
    )
    strategy: str | None = opt(
        None, "which masked positions to decode first (Dream: entropy, LLaDA: confidence)", choices=decode.STRATEGIES
    )
    schedule: str | None = opt(
        None, "how the tokens are divided among --steps (the family's)", choices=decode.SCHEDULES
    )
    temperature: float | None = opt(None, "for drawing tokens; 0 takes the most probable one (Dream: 0.1, LLaDA: 0)")
    top_p: float | None = opt(None, "draw from the most probable tokens with this total probability (Dream: 0.9)")
    top_k: int | None = opt(None, "draw from this many of the most probable tokens")
    threshold: float | None = opt(
        None, "each step decodes every token of at least this probability, instead of following --schedule"
    )
    tokens_per_step: int | None = opt(None, "decode exactly this many tokens a step, instead of --steps", low=1)
    greedy: bool = opt(False, "take the most probable token; --temperature then only affects which position is next")
    sample: bool = opt(False, "draw tokens even where a benchmark's protocol takes the most probable one")
    suppress_eos: bool = opt(False, "never choose EOS: every response has its full length")
    eos_last: bool = opt(False, "decode EOS last: positions that predict it score lowest")


@dataclass
class DatasetOptions:
    """the dataset"""

    data: str = opt(None, "dataset: .jsonl, .jsonl.gz, .json or .parquet", required=True)
    prompt_field: str | None = opt(None, "name of the prompt's field, where it is not one of the usual names")
    answer_field: str | None = opt(None, "name of the answer's field, where it is not one of the usual names")
    limit: int | None = opt(None, "use only the first LIMIT rows", low=1)
    raw: bool = opt(False, "use prompts as they are, without the chat template")


# -------------------------------------------------------------------------------------------------------- processes


class Processes:
    """This process among those that torchrun started: its index, its device, the folders that it has locked, and what
    the processes do together. alone: each process works for itself, as if there were no others."""

    def __init__(self, device="auto", alone=False):
        self.index, self.count = place_among_processes()
        self.shows = self.index == 0  # progress bars and tables
        if alone:
            self.index, self.count = 0, 1
        self.locks = {}  # folder -> the open file that holds its lock
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
        if self.count > 1 and not dist.is_initialized():
            patient = datetime.timedelta(hours=2)  # others wait while the first writes a checkpoint
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo", timeout=patient)

    @property
    def first(self):
        return self.index == 0

    def barrier(self):
        if self.count > 1:
            dist.barrier()

    def sum(self, values):
        """The sum over all processes of a list of numbers."""
        total = torch.tensor(values, dtype=torch.float32 if self.device.type == "mps" else torch.float64)
        if self.count > 1:
            total = total.to(self.device)
            dist.all_reduce(total)
        return total.tolist()

    def gather(self, items):
        """The lists of all processes, one after the other, on every process."""
        if self.count == 1:
            return list(items)
        lists = [None] * self.count
        dist.all_gather_object(lists, list(items))
        return list(itertools.chain.from_iterable(lists))

    def agree(self, error=None):
        """Raise the error of the first process that has one, on every process: none waits for one that is gone."""
        for found in self.gather([error]):
            if found is not None:
                raise found

    def must_share(self, folder):
        """Raises FileNotFoundError, on every process, where a folder is not the same one for all of them."""
        if self.count == 1:
            return
        mark = folder / self.gather([f"{uuid.uuid4().hex}.tmp"])[0]  # a new name, so that no node has it in a cache
        self.agree(problem_of(mark.touch) if self.first else None)
        deadline, problem = time.monotonic() + PATIENCE, None
        while not mark.exists() and problem is None:
            time.sleep(0.05)
            if time.monotonic() > deadline:
                place = f"process {self.index} on {platform.node()}"
                problem = FileNotFoundError(
                    f"{folder.resolve()} of {place} is not the folder of process 0: give an --out that all nodes share"
                )
        try:
            self.agree(problem)
        finally:
            if self.first:
                mark.unlink()

    def sum_gradients(self, parameters):
        """Add up the gradients of all processes, in one message of float32 for each 64 MiB.

        Not DistributedDataParallel, which takes the mean over processes and needs rows on each of them: a process's
        share of the loss has its weight already, and the last batch may leave some without a row. It takes as long
        within a few percent (docs/speed.md)."""
        if self.count == 1:
            return
        bucket, size = [], 0
        for i, p in enumerate(parameters, 1):
            if p.grad is None:  # a process without an example has no gradient
                p.grad = torch.zeros_like(p)
            bucket.append(p.grad)
            size += p.numel()
            if size >= 2**24 or i == len(parameters):
                sum_together(bucket)
                bucket, size = [], 0

    def lock(self, folder):
        """Keep other processes out of a folder for as long as this object lives -> whether it is locked.

        False where there are no locks: on Windows, and on some network file systems. Raises FileExistsError where
        another process holds the lock."""
        try:
            import fcntl  # not on Windows
        except ImportError:
            return False
        folder = Path(folder).resolve()
        if folder not in self.locks:
            f = open(folder / LOCK, "a")  # noqa: SIM115, it stays open
            try:
                fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as e:
                f.close()
                raise FileExistsError(
                    f"another process is writing into {folder}: wait for it to end, or choose another --out"
                ) from e
            except OSError:  # a file system without locks
                f.close()
                return False
            self.locks[folder] = f
        return True

    def locked_by_another(self, folder):
        """Whether another process holds the lock of a folder. It need not be one that this process may write to."""
        file = Path(folder).resolve() / LOCK
        if file.parent in self.locks or not file.is_file():
            return False  # our own lock is left alone: closing the file once more would give it back
        try:
            import fcntl  # not on Windows

            with open(file, "rb") as f:
                fcntl.lockf(f, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except (ImportError, OSError):  # no locks here
            return False
        return False

    def unlock(self):
        """Give back all locks: for a process that makes one run after the other."""
        while self.locks:
            self.locks.popitem()[1].close()


SHOWN = 5  # so many differences does the error for another run's folder name
PATIENCE = 10  # seconds in which a network file system has to show a file of another node
LOCK = "lock"  # the file in a run folder that the lock is on
ERRORS = (ValueError, OSError, ImportError, SafetensorError, RuntimeError)  # of bad input; torch raises the last


def tell(error):
    """Write an error as one line to stderr -> the exit status 1. TABOM_DEBUG=1 raises it instead."""
    if os.environ.get("TABOM_DEBUG"):
        raise error
    last_words(f"error: {' '.join(str(error).split()) or type(error).__name__}")
    return 1


def leave(status):
    """End this process with an exit status, after those groups of processes that it is in.

    The groups of a model that is spread stay with the model's mesh, and so do their threads: one that lets go of a
    tensor while the interpreter is taken down aborts the process. So a process that had others beside it calls what
    libraries have registered for its end, wandb for one, and is gone."""
    if not dist.is_initialized():
        sys.exit(status)
    try:
        dist.destroy_process_group()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def last_words(line):
    """Write the line with which a run ends to stderr, once: where one process fails, or all of them for one reason,
    the others have nothing to add, least of all that they lost contact."""
    key = f"tabom's last words {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
    try:
        if place_among_processes()[1] > 1:
            # A client of torchrun's own store, which outlives its processes. No collective: others may be gone.
            store = dist.TCPStore(
                os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), wait_for_workers=False,
                timeout=datetime.timedelta(seconds=10),
            )  # fmt: skip
            if store.add(key, 1) > 1:
                return
    except (KeyError, ValueError, RuntimeError):  # no such store: better said twice than not at all
        pass
    print(line, file=sys.stderr, flush=True)


def place_among_processes():
    """(index, count) of this process among those of torchrun; (0, 1) without torchrun, whatever RANK is set to.

    Raises ValueError for a place that there is not."""
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys():
        return 0, 1
    rank, size = os.environ["RANK"], os.environ["WORLD_SIZE"]
    if not (rank.isdecimal() and size.isdecimal() and int(rank) < int(size)):
        raise ValueError(f"the environment has RANK {rank!r} of WORLD_SIZE {size!r}: unset both, or use torchrun")
    return int(rank), int(size)


def sum_together(gradients):
    """Add up some gradients over all processes, in place, in one message."""
    flat = torch.cat([g.float().flatten() for g in gradients])
    dist.all_reduce(flat)
    start = 0
    for g in gradients:
        g.copy_(flat[start : start + g.numel()].view_as(g))
        start += g.numel()


# -------------------------------------------------------------------------------------- the model and its decoder


def warner(processes):
    """A function that writes a line of warning to stderr, once for all processes."""

    def warn(line):
        if processes.first and processes.shows:
            tqdm.write(f"warning: {line}", sys.stderr)

    return warn


class Loaded(NamedTuple):
    """A model, its tokenizer, and the folder that both came from."""

    m: Any
    tok: Any
    folder: Path

    @property
    def never_chosen(self):
        """Ids that no response may hold: the mask token, and rows of the network that are no token."""
        return sorted({*self.tok.unused_ids(self.m.config.vocab_size), self.m.config.mask_id})


def disagreements(tok, config):
    """Lines about the ids on which a tokenizer and a model's config (anything with eos_id, pad_id and
    mask_id) disagree."""
    lines = []
    for name in ("eos", "pad", "mask"):
        token = tok.special.get(f"{name}_token")
        ours, theirs = getattr(config, f"{name}_id", None), tok.ids.get(token)
        if None not in (ours, theirs) and ours != theirs:
            lines.append(f"{name}_token_id is {ours} in config.json, the tokenizer has {theirs} ({token})")
    return lines


def load_model(c, processes, adapter=None, weights=None, dtype="auto", place=None):
    """Loaded: the model of the options c on this process's device, its tokenizer and its folder.

    adapter: a folder to take an adapter from. weights: another folder with the same model's tensors, such as a
    checkpoint. place: see model.load. Raises ValueError for a tokenizer that has more ids than the model has rows."""
    folder = model.resolve(c.model)
    dtype = model.DTYPES[resolve_dtype(c, processes, dtype)]
    m = model.load(weights or folder, dtype=dtype, device=processes.device, place=place)
    if c.block_causal is not None:
        if m.config.family not in ("sdar", "a2d"):
            raise ValueError(f"--block-causal {c.block_causal}: {m.config.family} models see everything; leave it out")
        m.config.block_length = c.block_causal
    one_thread_if_small(m)
    tok = data.load_tokenizer(folder, m.config.eos_id, m.config.mask_id)
    for line in disagreements(tok, m.config):
        warner(processes)(f"{folder}: {line}")
    if tok.size > m.config.vocab_size:
        rows = m.config.vocab_size
        raise ValueError(f"{folder}: the tokenizer has ids up to {tok.size - 1}, the model only {rows} rows")
    if adapter is not None:
        lora.load(m, adapter)
    if c.compile:
        compile_blocks(m)
    return Loaded(m, tok, folder)


def compile_blocks(m, **options):
    """Compile the transformer's blocks, with the options of torch.compile."""
    torch._dynamo.config.recompile_limit = 64  # of one code, shared by all blocks and models, adapted or not
    torch.fx.experimental._config.use_duck_shape = False  # sizes that are equal by chance may differ later
    for block in m.layers:
        block.compile(dynamic=True, **options)


SMALL = 50_000_000  # parameters


def one_thread_if_small(m):
    """Let torch use one thread for a small model, where OMP_NUM_THREADS does not say otherwise.

    Threads of a small model mostly wait for each other, and each wait is long where other programs use the cores."""
    if "OMP_NUM_THREADS" not in os.environ and sum(p.numel() for p in m.parameters()) < SMALL:
        torch.set_num_threads(1)


def load_checkpoint(c, processes, checkpoint):
    """Loaded for a checkpoint of a run: the base model with its adapter, or its weights where all were trained. None is
    the base model."""
    if checkpoint is None or (Path(checkpoint) / "adapter_config.json").is_file():
        return load_model(c, processes, adapter=checkpoint)
    return load_model(c, processes, weights=checkpoint)


def resolve_dtype(c, processes, dtype="auto"):
    """The dtype asked for; "auto" means `dtype`, and that again what the device is best at."""
    if c.dtype != "auto":
        return c.dtype
    if dtype != "auto":
        return dtype
    return "bfloat16" if processes.device.type == "cuda" else "float32"


GRIDS = ("start", "prompt")  # where blocks are counted from: the start of a row, or the end of its prompt


def decoding_grid(config):
    """Where the decoder of a block-causal model counts blocks from; None without blocks."""
    if config.block_length is None:
        return None
    return "prompt" if DECODERS[config.family]["schedule"] == "a2d" else "start"


def batch_of(records, loaded, processes, grid=None):
    """Records -> the batch of objectives.py, on this process's device. grid: of block-causal attention, one of GRIDS;
    None = its decoder's."""
    batch = data.collate(records, loaded.m.config.pad_id)
    if (grid or decoding_grid(loaded.m.config)) == "prompt":
        batch["origin"] = batch["prompt_mask"].sum(1)
    return {name: tensor.to(processes.device) for name, tensor in batch.items()}


# Each family's own decoder (Table 8 of the paper, and 32-token blocks for LLaDA's distillation; SDAR's and dllm's own
# evaluation). Where attention is block-causal, its blocks are the decoder's.
DECODERS = {
    "dream": dict(strategy="entropy", schedule="dream", temperature=0.1, top_p=0.9, max_new_tokens=256),
    "llada": dict(strategy="confidence", schedule="llada", temperature=0.0, block_length=32, max_new_tokens=256),
    "sdar": dict(strategy="confidence", schedule="sdar", temperature=0.0, max_new_tokens=256),
    "a2d": dict(strategy="confidence", schedule="a2d", temperature=0.0, block_length=32, max_new_tokens=256),
}


def decoder_settings(c, loaded, preset=None):
    """The arguments of decode.generate: the family's, then a benchmark's preset, then the model's own, then the flags
    of c (DecodeOptions). suppress_eos and eos_last are among them: evaluate.with_eos_rules puts in the ids. Where the
    model's attention is block-causal, a block length that is asked for becomes its own: m.config.block_length is set.

    Raises ValueError for settings that do not fit together, before anything is decoded or written."""
    family, blocks = loaded.m.config.family, getattr(loaded.m.config, "block_length", None)
    if family not in DECODERS:
        raise ValueError(f"{loaded.folder}: no decoder for {family!r} models; there is one for {', '.join(DECODERS)}")
    known = {f.name: f for f in dataclasses.fields(DecodeOptions) if f.name != "sample"}
    flags = {}
    for name in known:
        value = getattr(c, name)
        if value is not None and value is not False:  # 0 is a value: --temperature 0, --block-length 0
            flags[name] = value
    settings, base = {}, DECODERS[family]
    if blocks is not None:
        base = dict(base, block_length=blocks)
    for layer in (base, preset or {}, own_decoder(loaded.folder, known), flags):
        paced = "steps" in layer or "tokens_per_step" in layer
        if paced or "max_new_tokens" in layer:  # the layer below said its steps for another length, or this one anew
            settings.pop("steps", None)
        if paced:
            settings.pop("tokens_per_step", None)
        settings.update(layer)
    if c.sample:
        settings["greedy"] = False
    settings["block_length"] = settings.get("block_length") or blocks
    if "tokens_per_step" not in settings:
        steps, length = settings["max_new_tokens"], settings["block_length"]
        if settings["schedule"] in decode.BLOCKWISE and length is not None:
            steps = length * -(-steps // length)  # a last block that is not whole has as many steps as the others
        settings.setdefault("steps", steps)
    rules = ("suppress_eos", "eos_last")
    decode.Settings(**{k: v for k, v in settings.items() if k not in rules})
    if blocks is not None:
        loaded.m.config.block_length = settings["block_length"]
    return settings


def own_decoder(folder, known):
    """The decoder settings of a model folder: what its generation_config.json has under "tabom"."""
    file = Path(folder) / "generation_config.json"
    own = data.read_json(file).get("tabom", {}) if file.is_file() else {}
    if type(own) is not dict:
        raise ValueError(f'{file}: "tabom" must be an object of decoder settings, not {own}')
    for name, value in own.items():
        if name not in known:
            raise ValueError(f'{file}: "tabom" has {name}; the decoder settings are {", ".join(known)}')
        wanted = kind(known[name])
        if type(value) is not wanted and not (wanted is float and type(value) is int):
            raise ValueError(f'{file}: "tabom" has {name} {value!r}, which must be {wanted.__name__}')
    return own


# ------------------------------------------------------------------------------------------------------ run folders


def open_run(out, meta, processes, free=()):
    """Make the folder of a run, or continue the same run. meta, in its meta.json, identifies the run; only its `free`
    keys may change between two starts. Raises FileExistsError, on every process, for a folder that holds anything
    else, or that is not the same folder for all processes; ValueError where they have different files or options."""
    out = Path(out)
    same_everywhere(meta, processes)
    processes.agree(problem_of(same_run, out, meta, free))  # all have looked before one writes

    def begin():
        out.mkdir(parents=True, exist_ok=True)
        processes.lock(out)
        with atomic_file(out / "meta.json") as f:
            f.write(json.dumps(meta, indent=2) + "\n")

    processes.agree(problem_of(begin) if processes.first else None)
    processes.must_share(out)
    return out


def problem_of(act, *arguments):
    """The error of a call that reads or writes a run folder, or None."""
    try:
        act(*arguments)
    except (OSError, ValueError) as e:
        return e
    return None


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


def same_run(out, meta, free=()):
    """Raises FileExistsError for a folder that holds anything but this run, begun earlier; writes nothing."""
    out, meta = Path(out), json.loads(json.dumps(meta))
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file, not a folder")
    if (out / "meta.json").is_file():
        before = data.read_json(out / "meta.json")
        if "command" not in free and before.get("command") != meta.get("command"):  # the rest differs anyway
            raise FileExistsError(f"{out} holds a run of {before.get('command')}: choose another --out")
        differ = [k for k in {**before, **meta} if k not in {*free, "versions"} and before.get(k) != meta.get(k)]
        if differ:
            changes = ", ".join(f"{k} was {before.get(k)!r} and is now {meta.get(k)!r}" for k in differ[:SHOWN])
            if len(differ) > SHOWN:
                changes = f"{changes}, and {len(differ) - SHOWN} more"
            raise FileExistsError(f"{out} holds another run: {changes}; use its options, or choose another --out")
    elif out.is_dir() and any(file.suffix != ".tmp" and file.name != LOCK for file in out.iterdir()):
        raise FileExistsError(f"{out} is not empty and holds no run that could continue: choose another --out")


def json_line(row):
    """A row of JSON Lines. Text is written as it is, but for lone surrogates, which no file can hold."""
    line = json.dumps(row, ensure_ascii=False)
    try:
        line.encode()
    except UnicodeEncodeError:
        line = json.dumps(row)
    return line + "\n"


@contextlib.contextmanager
def atomic_file(path):
    """A text file that appears whole or not at all; compressed where its name ends in .gz. Raises IsADirectoryError for
    the path of a folder."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, not a file")
    beside = path.with_name(path.name + ".tmp")
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(beside, "wt", encoding="utf-8") as f:
            yield f
            f.flush()
        with open(beside, "rb") as f:
            os.fsync(f.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path, processes=None):
    """A folder that appears whole or not at all: written beside its place, and renamed once.

    processes: all of them write into it together, and the first makes and renames it."""
    path, first = Path(path), processes is None or processes.first
    beside = path.with_name(path.name + ".tmp")
    if first:
        must_be_free(path)
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
    if processes is not None:
        processes.barrier()  # it is there
    try:
        yield beside
        if processes is not None:
            processes.barrier()  # all have written
        if first:
            os.replace(beside, path)
    finally:
        if first:
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
    """Cut a log back to its first lines: those of the steps that the checkpoint knows."""
    if file.is_file():
        lines = data.read_text(file).splitlines(keepends=True)
        with atomic_file(file) as f:
            f.writelines(lines[:count])


def copy_extras(source, target):
    """The small files of a model folder that are no weights: tokenizer, chat template, generation settings, code."""
    for file in Path(source).iterdir():
        weights = file.suffix in (".safetensors", ".bin") or file.name.endswith(".index.json") or file.name in TRAINER
        there = (Path(target) / file.name).exists()
        if file.is_file() and not weights and not there and file.stat().st_size < 2**26:
            shutil.copyfile(file, Path(target) / file.name)


# ------------------------------------------------------------------------------------------------------ checkpoints

MANIFEST = "manifest.json"  # the SHA-256 of each file of a checkpoint
TRAINER = ("optimizer.safetensors", "reference.safetensors", "trainer.json", MANIFEST)  # for a continued run alone
SPREAD = "state"  # the folder in place of the first two where weights are spread over processes: a file of each


def write_checkpoint(folder, loaded, base, weights, optimizer, step, reference=None, write=True):
    """An adapter (or a model) that every command takes, and beside it what a continued run needs. base: the name of
    the base model. Where the weights are spread over processes all of them call this, and one of them with write."""
    m, spread = loaded.m, shard.is_spread(weights.values())
    if lora.layers(m):
        lora.save(m, folder, base)
    else:
        model.save(m, folder, whole=shard.whole, write=write)
    state, kept = optimizer_state(weights, optimizer), {} if reference is None else reference.kept
    if spread:
        shard.save({**state, **{f"reference.{name}": tensor for name, tensor in kept.items()}}, folder / SPREAD)
    if not write:
        return
    if not lora.layers(m):
        copy_extras(loaded.folder, folder)
    if not spread:
        model.save_tensors({name: shard.whole(tensor) for name, tensor in state.items()}, folder / TRAINER[0])
        if kept:
            model.save_tensors({name: shard.whole(tensor) for name, tensor in kept.items()}, folder / TRAINER[1])
    (folder / "trainer.json").write_text(json.dumps(dict(step=step, reference=bool(kept))) + "\n")
    hashes = {}  # last: of all that was written
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            hashes[file.relative_to(folder).as_posix()] = fingerprint(file)
    (folder / MANIFEST).write_text(json.dumps(hashes, indent=2) + "\n")


def optimizer_state(weights, optimizer):
    """AdamW's state by name: step, exp_avg and exp_avg_sq of each weight; empty before the first step."""
    state = {}
    for name, p in weights.items():
        for key, value in optimizer.state[p].items():
            state[f"{key}.{name}"] = value
    return state


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
        try:
            step = data.read_json(folder / "trainer.json").get("step")
        except (OSError, ValueError):
            continue
        if type(step) is int and folder.suffix != ".tmp":
            found.append((step, folder))
    return sorted(found)


def last_checkpoint(out, warn=None):
    """The folder of the latest intact checkpoint in a run, or None. A damaged one is left alone, and named on stderr,
    or by warn(line)."""
    warn = warn or warner(Processes("cpu", alone=True))
    for _, folder in reversed(checkpoints(out)):
        if intact(folder):
            return folder
        warn(f"{folder} is damaged: the checkpoint before it is used")
    return None


def prune(out, keep):
    """Remove all checkpoints between epochs but the last few."""
    between = [folder for _, folder in checkpoints(out) if folder.name.startswith("step-")]
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
        shard.load({**state, **kept}, checkpoint / SPREAD)
        stored = state
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
            shard.fill(tensors[prefix + name], f.get_tensor(name))
    return names
