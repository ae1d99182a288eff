"""stdout and stderr that never end a run.

    streams.guard()     # first thing in a program

A terminal closes, a reader goes (`2>&1 | head`), a stream was closed from the start (`2>&-`), or a character is none of
the stream's encoding: whatever happens to a line that is shown, the work goes on and is saved.
"""

import os
import sys


class Guarded:
    """A text stream whose writes do not fail: once one did, what is written is dropped."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        return self.attempt(self.stream.write, text)

    def flush(self):
        self.attempt(self.stream.flush)

    def attempt(self, act, *arguments):
        try:
            return act(*arguments)
        except (OSError, ValueError):  # its reader is gone; it was closed
            # What is still in the buffer needs a place to go to, or Python complains of it at its end.
            to_nowhere(self.stream)
            return 0

    def __getattr__(self, name):
        return getattr(self.stream, name)


def to_nowhere(stream):
    """Let a stream's file descriptor write to nowhere from now on."""
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
    except (OSError, ValueError):  # a stream without a descriptor
        pass


def guard():
    """Guard this process's stdout and stderr."""
    for name, number in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:  # closed: a file that is opened later must not get its number
            nowhere = os.open(os.devnull, os.O_WRONLY)
            if nowhere != number:
                os.dup2(nowhere, number)
                os.close(nowhere)
            setattr(sys, name, open(number, "w", encoding="utf-8", closefd=False))  # noqa: SIM115, it stays open
        stream = getattr(sys, name)
        stream.reconfigure(errors="backslashreplace")  # as stderr does: no character ends a run
        setattr(sys, name, Guarded(stream))
