"""A run outlives its terminal: output that goes nowhere any more is dropped, and the run goes on."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from grpo_fast.errors import one_line, say

NAMES = ("stdout", "stderr")


def open_standard_streams() -> None:
    """Give a program that was started without some of its standard streams ``/dev/null`` in their places.

    Otherwise the next file that it opens would take the number 1 or 2, and get what is printed.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # The lowest free number is this one.
            os.open(os.devnull, os.O_RDWR)
    for name in NAMES:
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115


def silence(stream: TextIO) -> None:
    """Send what is written to `stream` from now on, and what it still holds, to ``/dev/null``."""
    with suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def print_error(text: str) -> None:
    """A line on standard error, where there still is one."""
    with suppress(OSError, ValueError):
        say(text, sys.stderr)


class Outlet:
    """A text stream that is silenced at its first error, with a note on the other stream."""

    def __init__(self, stream: TextIO, name: str):
        self.stream, self.name = stream, name

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except UnicodeEncodeError as error:
            # A path or a prompt may hold what an ASCII terminal cannot show.
            return self.write(text.encode(error.encoding, "backslashreplace").decode(error.encoding))
        except OSError as error:
            self.lose(error)
            return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError as error:
            self.lose(error)

    def lose(self, error: OSError) -> None:
        silence(self.stream)
        other = next(name for name in NAMES if name != self.name)
        reason = error.strerror or one_line(error)
        with suppress(OSError, ValueError):
            say(f"grpo-fast: {self.name} takes no more output ({reason}); going on without it", getattr(sys, other))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def lasting_output() -> Iterator[None]:
    """Within it, a closed pipe, a full disk or a terminal that is gone end no run; see :class:`Outlet`."""
    # A program without a console has None.
    before = {name: getattr(sys, name) for name in NAMES if getattr(sys, name) is not None}
    for name, stream in before.items():
        setattr(sys, name, Outlet(stream, name))
    try:
        yield
    finally:
        for name, stream in before.items():
            # Here, not when the interpreter ends, where an error would change the exit status.
            getattr(sys, name).flush()
            setattr(sys, name, stream)
