"""Errors that the user can mend: one line that names the value and what is allowed."""

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

# Control characters but tab and newline; those that reorder what follows; lone halves of UTF-16 pairs.
_NOT_SHOWN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class UserError(ValueError):
    """Wrong input. The command line prints its one line and exits with status 2; no traceback."""


class CheckpointError(UserError):
    """A checkpoint could not be written."""


class NotFiniteError(UserError):
    """An optimizer step was stopped by a number that is not finite.

    Args:
        message: what was not finite.
        weights_lost: whether the weights are among it; otherwise they are those of the step before.
    """

    def __init__(self, message: str, weights_lost: bool):
        super().__init__(message)
        self.weights_lost = weights_lost


def printable(text: str) -> str:
    """`text` with control characters as escapes (``\\x1b``): printed, it cannot command a terminal or hide a part."""
    return _NOT_SHOWN.sub(lambda found: ascii(found[0])[1:-1], text.replace("\r\n", "\n"))


def say(text: str, file: TextIO | None = None) -> None:
    """Print text that may come from elsewhere, at once."""
    print(printable(text), file=file, flush=True)


def one_line(error: BaseException | str, limit: int = 300) -> str:
    """An exception's message, printable and without its line breaks, or its type where it has none."""
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
    """As :func:`import_extra`, but without importing it."""
    if importlib.util.find_spec(module) is None:
        raise UserError(f"{module} is not installed; install it with: pip install 'grpo-fast[{extra}]'")


def import_extra(module: str, extra: str) -> ModuleType:
    """Import a module of an optional dependency, or say which extra installs it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UserError(
            f"{error.name or module!r} is not installed; install it with: pip install 'grpo-fast[{extra}]'"
        ) from None
