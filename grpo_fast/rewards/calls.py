"""One call of a reward function: what it returned, and for which samples it failed. Needs no torch."""

from __future__ import annotations

import asyncio
import inspect
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from grpo_fast.errors import one_line
from grpo_fast.rewards.base import RewardFunction


class Outcome(NamedTuple):
    """A function's values ``[B]`` as it returned them, and by the index of a sample, whose value is None, what failed.

    An error reads on from "reward function 'name'".
    """

    values: list[Any]
    errors: dict[int, str]


class WrongReturn(Exception):
    """A function returned something other than a value for each sample."""


def failed(size: int, message: str) -> Outcome:
    return Outcome([None] * size, dict.fromkeys(range(size), message))


def call(function: RewardFunction, arguments: dict[str, list], size: int, timeout: float) -> Outcome:
    """Call `function` on the whole batch.

    Where that raises, it is called on each sample alone to find those at fault, and once more on all the others
    together, since it may compare them.

    Args:
        function: sync or async.
        arguments: lists of `size` values, by name; the function gets lists of its own.
        timeout: seconds after which an async call is cancelled.
    """
    try:
        return Outcome(_values(function, arguments, range(size), timeout), {})
    except (Exception, SystemExit) as error:
        outcome = failed(size, _reason(error))
    if size == 1:
        return outcome
    errors = {}
    for index in range(size):
        try:
            _values(function, arguments, [index], timeout)
        except (Exception, SystemExit) as error:
            errors[index] = _reason(error)
    rest = [index for index in range(size) if index not in errors]
    if not errors or not rest:
        return outcome
    try:
        found = dict(zip(rest, _values(function, arguments, rest, timeout), strict=True))
    except (Exception, SystemExit):
        return outcome
    return Outcome([found.get(index) for index in range(size)], errors)


def _values(function: RewardFunction, arguments: dict[str, list], indices: Sequence[int], timeout: float) -> list:
    chosen = {name: [_copied(values[index]) for index in indices] for name, values in arguments.items()}
    values = function(**chosen)
    if inspect.isawaitable(values):
        values = asyncio.run(_within(values, timeout))
    values = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise WrongReturn(f"must return a list of numbers, got {type(values).__name__}")
    if len(values) != len(indices):
        raise WrongReturn(f"returned {len(values)} rewards for {len(indices)} completions")
    return list(values)


async def _within(values: Any, timeout: float) -> Any:
    return await asyncio.wait_for(values, timeout)


def _copied(value: Any) -> Any:
    """A list that a function may change without changing the trainer's: token ids, or chat messages."""
    if not isinstance(value, list):
        return value
    return [dict(part) if isinstance(part, dict) else part for part in value]


def _reason(error: BaseException) -> str:
    if isinstance(error, WrongReturn):
        return str(error)
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"raised {type(error).__name__}: {one_line(error)} ({Path(place.filename).name}, line {place.lineno})"
