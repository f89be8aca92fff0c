"""Errors that the user can mend: one line that names the value and what is allowed."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType


class UserError(ValueError):
    """Wrong input. The command line prints its one line and exits with status 2; no traceback."""


def nearest(name: str, known: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` for a misspelt name, or an empty string."""
    known = sorted(known)
    match = [other for other in known if name in other] or difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f" (did you mean {match[0]!r}?)" if match else ""


def import_extra(module: str, extra: str) -> ModuleType:
    """Import a module of an optional dependency, or say which extra installs it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise UserError(
            f"{error.name or module!r} is not installed; install it with: pip install 'grpo-fast[{extra}]'"
        ) from None
