"""Calling a reward function: with which arguments, what it returned, where it failed. Does not import torch."""

from __future__ import annotations

import asyncio
import copy
import inspect
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from grpo_fast.errors import UserError, one_line
from grpo_fast.rewards.base import RewardFunction, text_of
from grpo_fast.rewards.registry import REWARDS

# The trainer passes the reserved names to every function, beside the dataset's columns, the offered ones to functions
# that take them, and the judged ones to functions with a judge: whether a completion is right, and its group's number.
RESERVED_COLUMNS = ("prompts", "completions", "completion_ids")
OFFERED_COLUMNS = ("rendered_prompts",)
JUDGED_COLUMNS = ("correct", "groups")
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
        values = asyncio.run(asyncio.wait_for(values, timeout))
    values = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise WrongReturn(f"must return a list of numbers, got {type(values).__name__}")
    if len(values) != len(indices):
        raise WrongReturn(f"returned {len(values)} rewards for {len(indices)} completions")
    return list(values)


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


def unreachable(function: RewardFunction) -> set[str]:
    """Names that a dataset column cannot have for `function`, because the trainer or Python fills these arguments."""
    judged = JUDGED_COLUMNS if hasattr(function, "judge") else ()
    return {*RESERVED_COLUMNS, *OFFERED_COLUMNS, *judged, *_filled_by_call(function)}


def chosen(function: RewardFunction, arguments: dict[str, Any]) -> dict[str, Any]:
    """Those of `arguments` that `function` is called with."""
    parameters = _parameters(function)
    takes_all = not parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    dropped = {name for name in OFFERED_COLUMNS if not takes_all and name not in parameters}
    dropped |= _filled_by_call(function)
    return {name: values for name, values in arguments.items() if name not in dropped}


def check_values(functions: Iterable[RewardFunction], rows: list[dict[str, Any]]) -> None:
    """Raise UserError for a row without a value in a column that a built-in function requires.

    The user's own functions may return None for such a row.
    """
    for function in functions:
        if REWARDS.get(getattr(function, "__name__", "")) is not function:
            continue
        for name, parameter in _parameters(function).items():
            if parameter.default is not parameter.empty or parameter.kind is parameter.VAR_KEYWORD:
                continue
            for row in rows if name not in RESERVED_COLUMNS else ():
                value = row.get(name)
                if value is None or value != value:
                    raise UserError(
                        f"the row with the prompt {one_line(text_of(row['prompt']), 60)!r} has no {name!r}, which the "
                        f"reward function {function.__name__!r} needs; add it, or leave the row out"
                    )


def _parameters(function: RewardFunction) -> dict[str, inspect.Parameter]:
    """The parameters by name; empty for a function without an inspectable signature."""
    try:
        return dict(inspect.signature(function).parameters)
    except ValueError:
        return {}


def _filled_by_call(function: RewardFunction) -> set[str]:
    """Arguments that the call itself fills: a method's object (``self``), and a worker's ``reward_timeout``."""
    names = {"reward_timeout"} & set(_parameters(function)) if hasattr(function, "isolated") else set()
    method = function if inspect.ismethod(function) else function.__call__
    if inspect.ismethod(method):
        first = next(iter(inspect.signature(method.__func__).parameters.values()), None)
        if first is not None and first.kind is first.POSITIONAL_OR_KEYWORD:
            names.add(first.name)
    return names
