"""Which arguments a reward function is called with, and which dataset columns it needs. Does not import torch."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

from grpo_fast.errors import UserError, one_line
from grpo_fast.rewards.base import RewardFunction, text_of
from grpo_fast.rewards.registry import REWARDS

# The trainer passes the reserved names to every function, beside the dataset's columns, the offered ones to functions
# that take them, and the judged ones to functions with a judge: whether a completion is right, and its group's number.
RESERVED_COLUMNS = ("prompts", "completions", "completion_ids")
OFFERED_COLUMNS = ("rendered_prompts",)
JUDGED_COLUMNS = ("correct", "groups")


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
    """Check that every row has a value in the columns that built-in functions require.

    Other functions may return None for a row without a value.

    Raises:
        UserError: a value is missing; names the column, the function and the row's prompt.
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
