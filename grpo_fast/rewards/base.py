"""What every reward function shares: its signature, the text of a message, and the mark for a process of its own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

RewardFunction = Callable[..., Sequence[float | None]]


def text_of(message: str | list[dict[str, str]]) -> str:
    """The text of a completion, whether it is a string or a list of chat messages."""
    return message if isinstance(message, str) else "".join(part["content"] for part in message)


def isolated(
    over_limit: float | None = None,
    check: Callable[..., Mapping[str, Any] | None] | None = None,
    prepare: Callable[..., object] | None = None,
    check_row: Callable[[Mapping[str, Any]], None] | None = None,
) -> Callable[[RewardFunction], RewardFunction]:
    """Mark a reward function for worker processes, which score a sample at a time and are killed at the time limit.

    The function must be found by its name in another process: at the top level of a module or file.

    Args:
        over_limit: reward of a sample that takes more than ``reward_timeout`` seconds or all memory; None where that
            is an error.
        check: called once before a run, with those of the run's settings that it names (``reward_timeout``,
            ``code_isolation``); raises UserError where the function cannot work here. It may return settings to use
            instead, and a ``note`` for the log.
        prepare: called once in each worker, with settings as `check`, before the limit of its first sample counts.
        check_row: called with every row of the data before a run; raises ValueError where a column is at fault.
    """

    def mark(function: RewardFunction) -> RewardFunction:
        function.isolated, function.over_limit, function.check, function.prepare = True, over_limit, check, prepare
        function.check_row = check_row
        return function

    return mark


def settings_of(function: Callable, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a run's settings that `function` has a parameter for."""
    parameters = inspect.signature(function).parameters
    return {name: value for name, value in settings.items() if name in parameters}


def between(text: str, opening: str, closing: str) -> str | None:
    """The text inside the last complete pair of tags; None where there is none."""
    before, found, _ = text.rpartition(closing)
    if not found:
        return None
    _, found, inside = before.rpartition(opening)
    return inside if found else None
