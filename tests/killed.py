"""Runs commands of tabom.py, each in a fork of its own that a fault meets at a chosen moment: python tests/killed.py

Reads a line of JSON per command from stdin and answers with one. A moment is an operation on a file below `out`, or a
step: an optimizer step or a decoded response. Moments are counted, not timed: a fault meets the same one on every
machine. The libraries are imported once, before the first fork.

    {"words": ["train", ...], "out": "out/R", "kind": "file", "at": 7, "signal": 9, "largest_file": null}
    -> {"status": -9, "errors": "...", "moments": {"file": 7, "step": 1}}

at: the number of the moment of that kind at which the signal is sent; 0 = never. largest_file: bytes at which the disk
of the command is full.
"""

import json
import os
import resource
import signal
import sys
import tempfile
from pathlib import Path

import torch

import distill
import tabom
import train

FILE_EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"}  # os.replace is a rename


class Moments:
    """Counts the moments of a command in a file that outlives it, and sends the signal at the chosen one."""

    def __init__(self, request, log):
        self.request, self.log, self.seen = request, log, dict(file=0, step=0)

    def count(self, kind):
        self.seen[kind] += 1
        os.ftruncate(self.log, 0)
        os.pwrite(self.log, json.dumps(self.seen).encode(), 0)
        if kind == self.request["kind"] and self.seen[kind] == self.request["at"]:
            os.kill(os.getpid(), self.request["signal"])

    def hook(self, event, arguments):
        """Called by Python before each of its operations."""
        if event in FILE_EVENTS and str(arguments[0]).startswith(self.request["out"]):
            self.count("file")

    def counted(self, step):
        """The function, whose calls are steps."""

        def call(*arguments):
            self.count("step")
            return step(*arguments)

        return call


def child(request, log):
    """Run the command; never returns."""
    moments = Moments(request, log)
    if request["largest_file"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["largest_file"],) * 2)
    train.train_step = moments.counted(train.train_step)
    distill.record_of = moments.counted(distill.record_of)
    sys.addaudithook(moments.hook)
    status = 99  # an exception that the command line does not know
    try:
        status = tabom.main(request["words"])
    finally:
        sys.stderr.flush()
        os._exit(status)


def main():
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the background of a shell ignores it
    for line in sys.stdin:
        with tempfile.TemporaryDirectory() as folder:
            errors, log = (os.open(Path(folder, name), os.O_RDWR | os.O_CREAT) for name in ("errors", "log"))
            pid = os.fork()
            if pid == 0:
                os.dup2(errors, 1)
                os.dup2(errors, 2)
                child(json.loads(line), log)
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            answer = dict(status=status, errors=Path(folder, "errors").read_text())
            answer["moments"] = json.loads(Path(folder, "log").read_text() or "{}")
            os.close(errors)
            os.close(log)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
