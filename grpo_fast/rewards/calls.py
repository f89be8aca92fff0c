"""Calling a reward function: what it returned, and for which samples it failed. Does not import torch."""

from __future__ import annotations

import asyncio
import copy
import inspect
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from grpo_fast.errors import one_line
from grpo_fast.rewards.base import RewardFunction

_IMMUTABLE = frozenset({str, bytes, int, float, bool, type(None)})


class Outcome(NamedTuple):
    """A function's values ``[B]`` as it returned them, and an error message for each index whose value is missing.

    The messages complete the sentence "reward function 'name' ...".
    """

    values: list[Any]
    errors: dict[int, str]


class WrongReturn(Exception):
    """A function could not be called, or did not return one value per sample."""


def failed(size: int, message: str) -> Outcome:
    return Outcome([None] * size, dict.fromkeys(range(size), message))


def call(function: RewardFunction, arguments: dict[str, list], size: int, timeout: float) -> Outcome:
    """Call `function` on the whole batch.

    If that raises, each sample is tried alone to find those at fault. Then the others are scored together, because the
    function may compare them.

    Args:
        function: sync or async.
        arguments: lists of `size` values, by name; each call gets deep copies of them.
        timeout: seconds until an async call is cancelled.
    """

    def attempt(indices: Sequence[int]) -> tuple[list, str]:
        try:
            return _values(function, arguments, indices, timeout), ""
        except (Exception, SystemExit) as error:
            return [], _reason(error)

    values, reason = attempt(range(size))
    if not reason:
        return Outcome(values, {})
    errors = {index: error for index in range(size) if (error := attempt([index])[1])} if size > 1 else {}
    rest = [index for index in range(size) if index not in errors]
    if errors and rest:
        found, error = attempt(rest)
        if not error:
            by_index = dict(zip(rest, found, strict=True))
            return Outcome([by_index.get(index) for index in range(size)], errors)
    return failed(size, reason)


def _values(function: RewardFunction, arguments: dict[str, list], indices: Sequence[int], timeout: float) -> list:
    values = function(**{name: _copies(name, column, indices) for name, column in arguments.items()})
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


def _copies(name: str, values: list, indices: Sequence[int]) -> list:
    """Copies that a function may change at any depth: the samples of a group share the values of their row."""
    try:
        return [copied(values[index]) for index in indices]
    except Exception as error:
        raise WrongReturn(f"could not be given a copy of column {name!r}: {one_line(error)}") from None


def copied(value: Any) -> Any:
    """A deep copy; much faster than `copy.deepcopy` for JSON values, above all for long lists of numbers."""
    kind = type(value)
    if kind in _IMMUTABLE:
        return value
    if kind is list:
        return value.copy() if _IMMUTABLE.issuperset(map(type, value)) else [copied(part) for part in value]
    if kind is dict:
        return {key: copied(part) for key, part in value.items()}
    return copy.deepcopy(value)


def _reason(error: BaseException) -> str:
    if isinstance(error, WrongReturn):
        return str(error)
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"raised {type(error).__name__}: {one_line(error)} ({Path(place.filename).name}, line {place.lineno})"
