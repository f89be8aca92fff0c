"""Which arguments a reward function is called with, and which of the data's columns it needs. Needs no torch."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

from grpo_fast.errors import UserError, one_line
from grpo_fast.rewards.base import RewardFunction, text_of
from grpo_fast.rewards.registry import REWARDS

# What the trainer passes by name beside the data's own columns: to every function, and to those that take it.
RESERVED_COLUMNS = ("prompts", "completions", "completion_ids")
OFFERED_COLUMNS = ("rendered_prompts",)
# And to functions with a judge: whether a completion is right, and a number for each group of completions.
JUDGED_COLUMNS = ("correct", "groups")


def unreachable(function: RewardFunction) -> set[str]:
    """Names that no column of the data can have for `function`: the trainer, or Python, fills these arguments."""
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
    """Every row must have a value in the columns that a built-in function compares with.

    A function of the user's own may return None for a row without one.

    Raises:
        UserError: it names the column, the function and the row's prompt.
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
                    prompt = one_line(text_of(row["prompt"]), 60)
                    raise UserError(
                        f"the row with the prompt {prompt!r} has no {name!r}, which the reward function "
                        f"{function.__name__!r} needs; add it, or leave the row out"
                    )


def _parameters(function: RewardFunction) -> dict[str, inspect.Parameter]:
    """By name; empty for a function of which Python does not know them."""
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
