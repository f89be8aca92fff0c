"""Errors that the user can fix: one line that names the value and what is allowed."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TextIO

# Control characters except tab and newline, characters that reverse the text, and unpaired surrogates.
_NOT_SHOWN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class UserError(ValueError):
    """Wrong input, of which the command line prints one line without a traceback, to exit with status 2."""


class CheckpointError(UserError):
    """A checkpoint could not be written."""


class NotFiniteError(UserError):
    """A number that is not finite stopped an optimizer step.

    `weights_lost` says whether the weights are not finite either; otherwise they are those of the previous step.
    """

    def __init__(self, message: str, weights_lost: bool):
        super().__init__(message)
        self.weights_lost = weights_lost


def printable(text: str) -> str:
    """`text` with control characters escaped (``\\x1b``), so that it cannot control a terminal or hide its parts."""
    return _NOT_SHOWN.sub(lambda found: ascii(found[0])[1:-1], text.replace("\r\n", "\n"))


def say(text: str, file: TextIO | None = None) -> None:
    """Print text of any origin, and flush."""
    print(printable(text), file=file, flush=True)


def one_line(error: BaseException | str, limit: int = 300) -> str:
    """An exception's message (or its type, if it has none), printable and on one line."""
    text = printable(" ".join(str(error).split())) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."


def shown(value: object) -> str:
    """``repr(value)`` for a message, shortened to 100 characters."""
    try:
        return one_line(repr(value), limit=100)
    except ValueError:
        # Python prints no integer of more than 4,300 digits.
        return f"<{type(value).__name__} too long to print>"


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Report a full or unwritable disk in one line that names the file."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} could not be written: {error.strerror or one_line(error)}") from None


def nearest(name: str, known: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` for a misspelt name, or an empty string."""
    known = sorted(known)
    match = [other for other in known if name in other] or difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f" (did you mean {match[0]!r}?)" if match else ""


def require_extra(module: str, extra: str) -> None:
    """Check, without importing it, that a module of an optional dependency is installed."""
    if importlib.util.find_spec(module) is None:
        raise UserError(f"{module} is not installed; install it with: pip install 'grpo-fast[{extra}]'")


def import_extra(module: str, extra: str) -> ModuleType:
    """Import a module of an optional dependency; without it, a UserError names the extra to install."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UserError(
            f"{error.name or module!r} is not installed; install it with: pip install 'grpo-fast[{extra}]'"
        ) from None
