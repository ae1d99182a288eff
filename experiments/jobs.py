"""Jobs that processes share: each has a folder, and its result in there, which a later start finds.

    found = jobs.share({out / "a": work_a, out / "b": work_b}, processes, alone)  # work_a(folder) -> a dict

The jobs of a sweep are its runs."""

import json
import time

import data
from runs import disk


def share(jobs, processes, alone):
    """Do the jobs that have no result yet; a process that is free takes the next -> all results, on
    the first process.

    jobs: folder -> a function of the folder, whose result is a dict; it is kept in the folder's
    result.json. alone: the Processes that the jobs work with, which also holds the lock of a job's
    folder; where the file system has no locks, each process keeps to every count-th job."""
    own = list(jobs)[processes.index :: processes.count]
    while True:
        missing = [folder for folder in jobs if not result_of(folder)]
        if not missing:
            break
        worked = False
        for folder in missing:
            worked |= attempt(folder, jobs[folder], folder in own, alone)
        if not worked:  # other processes are at what is missing; torchrun ends all if one fails
            time.sleep(0.5)
    if not processes.first:
        return None
    return list(map(result_of, jobs))


def attempt(folder, work, own, alone):
    """Do a job, unless another process holds it or has done it -> whether it was done here."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        held = alone.lock(folder)
    except FileExistsError:  # another process is at it
        return False
    try:
        if not (held or own) or result_of(folder):
            return False
        result = dict(name=folder.name, **work(folder))
        with disk.atomic_file(folder / "result.json") as f:
            f.write(json.dumps(result, indent=2) + "\n")
    finally:
        alone.unlock()
    return True


def result_of(folder):
    """What a finished job wrote into its folder, or None."""
    file = folder / "result.json"
    if not file.is_file():
        return None
    return data.read_json(file)
