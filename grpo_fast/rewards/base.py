"""Helpers that all reward functions share: their signature, a message's text, and the mark for worker processes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

RewardFunction = Callable[..., Sequence[float | None]]


def text_of(message: str | list[dict[str, str]]) -> str:
    """The text of a prompt or completion, which is a string or a list of chat messages."""
    return message if isinstance(message, str) else "".join(part["content"] for part in message)


def isolated(
    over_limit: float | None = None,
    check: Callable[..., Mapping[str, Any] | None] | None = None,
    prepare: Callable[..., object] | None = None,
    check_row: Callable[[Mapping[str, Any]], None] | None = None,
) -> Callable[[RewardFunction], RewardFunction]:
    """Mark a reward function for worker processes, which score one sample at a time and are killed at the time limit.

    Another process must find the function by its name: define it at the top level of a module or file.

    Args:
        over_limit: reward of a sample that takes more than ``reward_timeout`` seconds or too much memory; None makes
            that an error.
        check: called once before a run with the settings it has parameters for (``reward_timeout``,
            ``code_isolation``); raises UserError if the function cannot work here. It may return settings to use
            instead, and a ``note`` for the log.
        prepare: called once in each worker, with settings like `check`, before the first sample's time starts.
        check_row: called with every row of the data before a run; raises ValueError if a column is wrong.
    """

    def mark(function: RewardFunction) -> RewardFunction:
        vars(function).update(isolated=True, over_limit=over_limit, check=check, prepare=prepare, check_row=check_row)
        return function

    return mark


def settings_of(function: Callable, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a run's settings that `function` has a parameter for."""
    parameters = inspect.signature(function).parameters
    return {name: value for name, value in settings.items() if name in parameters}


def between(text: str, opening: str, closing: str) -> str | None:
    """The text inside the last complete pair of tags; None without one."""
    before, closed, _ = text.rpartition(closing)
    _, opened, inside = before.rpartition(opening)
    return inside if closed and opened else None
