"""A run outlives its terminal: output that can no longer be written is dropped, and the run continues."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

from grpo_fast.errors import one_line, say

NAMES = ("stdout", "stderr")


def open_standard_streams() -> None:
    """Open ``/dev/null`` in the place of every standard stream that the program was started without.

    Otherwise the next file that it opens would get descriptor 1 or 2, and receive what is printed.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # `open` returns the lowest free descriptor, which is this one.
            os.open(os.devnull, os.O_RDWR)
    for name in NAMES:
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115


def silence(stream: TextIO) -> None:
    """Redirect `stream`, and what it has buffered, to ``/dev/null``."""
    with suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def print_error(text: str) -> None:
    """Print a line on standard error, if it can still be written."""
    with suppress(OSError, ValueError):
        say(text, sys.stderr)


class Outlet:
    """A text stream that is silenced at its first error, which is reported on the other standard stream."""

    def __init__(self, stream: TextIO, name: str):
        self.stream, self.name = stream, name

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except UnicodeEncodeError as error:
            # An ASCII terminal cannot show every path or prompt.
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
            say(f"grpo-fast: {self.name} takes no more output ({reason}); continuing without it", getattr(sys, other))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextmanager
def lasting_output() -> Iterator[None]:
    """Within this context a closed pipe, a full disk or a closed terminal does not end the run; see :class:`Outlet`."""
    # A stream is None in a program without a console.
    before = {name: getattr(sys, name) for name in NAMES if getattr(sys, name) is not None}
    for name, stream in before.items():
        setattr(sys, name, Outlet(stream, name))
    try:
        yield
    finally:
        for name, stream in before.items():
            # Flushed here, because an error at interpreter exit would change the exit status.
            getattr(sys, name).flush()
            setattr(sys, name, stream)
