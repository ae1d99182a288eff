"""This process among those that torchrun started: what they do together, and how they end.

    processes = torchrun.Processes("auto")          # its index, count and device
    total = processes.sum([loss, tokens])           # over all processes
    torchrun.leave(status)                          # ends a process that had others beside it

Without torchrun the process is alone: index 0 of 1.
"""

import atexit
import datetime
import itertools
import os
import platform
import sys
import time
import uuid
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from tqdm import tqdm


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
            # Where a process sees one GPU alone, as SLURM can have it, that is cuda:0 whatever its LOCAL_RANK
            device = f"cuda:{0 if torch.cuda.device_count() == 1 else os.environ.get('LOCAL_RANK', 0)}"
        try:
            self.device = torch.device(device)
            torch.empty(1, device=self.device).item()
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)
        except Exception as e:  # torch raises whatever its backends do
            raise ValueError(f"--device {device} cannot be used here: {str(e).strip().splitlines()[0]}") from e
        if self.device.type == "cuda":
            # cuDNN's attention makes a plan for every new shape, tens of milliseconds each, and our last block of the
            # network has a new number of queries at almost every decoding step.
            torch.backends.cuda.enable_cudnn_sdp(False)
        if self.count > 1 and not dist.is_initialized():
            how = dict(timeout=datetime.timedelta(hours=2))  # others wait while the first writes a checkpoint
            if self.device.type == "cuda":  # only what is on the GPUs goes over NCCL
                dist.init_process_group("cpu:gloo,cuda:nccl", device_id=self.device, **how)
            else:
                dist.init_process_group("gloo", **how)

    @property
    def first(self):
        return self.index == 0

    def barrier(self):
        self.sum([0])  # torch's own barrier would wait for the GPU too

    def sum(self, values):
        """The sum over all processes of a list of numbers."""
        total = torch.tensor(values, dtype=torch.float64)  # on the CPU, where the numbers are
        if self.count > 1:
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
            return False  # this process's lock is left alone: closing the file once more would give it back
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


PATIENCE = 10  # seconds in which a network file system has to show a file of another node
LOCK = "lock"  # the file in a run folder that the lock is on
ERRORS = (ValueError, OSError, ImportError, SafetensorError, RuntimeError)  # of bad input; torch raises the last


def problem_of(act, *arguments):
    """The error of a call that reads or writes a run folder, or None."""
    try:
        act(*arguments)
    except (OSError, ValueError) as e:
        return e
    return None


def tell(error):
    """Write an error as one line to stderr -> the exit status 1. TABOM_DEBUG=1 raises it instead."""
    if os.environ.get("TABOM_DEBUG"):
        raise error
    last_words(f"error: {' '.join(str(error).split()) or type(error).__name__}")
    return 1


def leave(status):
    """End this process with an exit status, and after a success those groups of processes that it is in.

    The groups of a model that is spread stay with the model's mesh, and so do their threads: one that lets go of a
    tensor while the interpreter is taken down aborts the process. So a process that had others beside it calls what
    libraries have registered for its end, wandb for one, and is gone.

    After an error the groups are left as they are: under NCCL a group ends with what it was told to do, and others may
    wait in a collective that this process never joins. Its end is what torchrun ends the others for."""
    if not dist.is_initialized():
        sys.exit(status)
    try:
        if status == 0:
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
            # A client of torchrun's store, which outlives its processes. No collective: others may be gone.
            store = dist.TCPStore(
                os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), wait_for_workers=False,
                timeout=datetime.timedelta(seconds=10),
            )  # fmt: skip
            if store.add(key, 1) > 1:
                return
    except (KeyError, ValueError, RuntimeError):  # no such store: better said twice than not at all
        pass
    begin = "\n" if dist.is_initialized() else ""  # another process may be within the line of its progress bar
    print(f"{begin}{line}", file=sys.stderr, flush=True)


def per_second(count, begun):
    """How many a second, since time.perf_counter() was `begun`: a clock that no one sets, and at least a nanosecond."""
    return count / max(time.perf_counter() - begun, 1e-9)


def place_among_processes():
    """(index, count) of this process among those of torchrun; (0, 1) without torchrun, whatever RANK is set to.

    Raises ValueError for a place that there is not."""
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys():
        return 0, 1
    rank, size = os.environ["RANK"], os.environ["WORLD_SIZE"]
    if not (rank.isdecimal() and size.isdecimal() and int(rank) < int(size)):
        raise ValueError(f"the environment has RANK {rank!r} of WORLD_SIZE {size!r}: unset both, or use torchrun")
    return int(rank), int(size)


def warner(processes):
    """A function that writes a line of warning to stderr, once for all processes."""

    def warn(line):
        if processes.first and processes.shows:
            tqdm.write(f"warning: {line}", sys.stderr)

    return warn
