"""Reward functions, with TRL's signature ``f(prompts, completions, **columns) -> list[float | None]``.

Prompts and completions are strings, or lists of chat messages where the prompt is a chat; `columns` are the dataset's
other columns, one value a sample, and ``completion_ids``. None means that a function does not apply to a sample.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import re
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch

from grpo_fast.errors import UserError, nearest

RewardFunction = Callable[..., Sequence[float | None]]


def text_of(message: str | list[dict[str, str]]) -> str:
    """The text of a completion, whether it is a string or a list of chat messages."""
    return message if isinstance(message, str) else "".join(part["content"] for part in message)


def _digits(text: str) -> list[str]:
    return [character for character in text if character.isdigit()]


def _included(prompt: str, completion: str) -> float:
    wanted, given = Counter(_digits(prompt)), Counter(_digits(completion))
    length = max(sum(wanted.values()), len(completion.replace(" ", "")), 1)
    return (wanted & given).total() / length


def digits_included(prompts, completions, **columns) -> list[float]:
    """Share of the prompt's digits that the completion holds, as a multiset; anything superfluous lowers it."""
    return [_included(text_of(p), text_of(c)) for p, c in zip(prompts, completions, strict=True)]


def digits_ordered(prompts, completions, **columns) -> list[float]:
    """Share of neighbours in ascending order, times `digits_included`, so that order pays for the right digits only."""
    rewards = []
    for prompt, completion in zip(prompts, completions, strict=True):
        prompt, completion = text_of(prompt), text_of(completion)
        answer = completion.replace(" ", "")
        ascending = sum(a.isdigit() and b.isdigit() and a <= b for a, b in pairwise(answer))
        pairs = max(len(_digits(prompt)) - 1, len(answer) - 1, 1)
        rewards.append(ascending / pairs * _included(prompt, completion))
    return rewards


def exact_answer(prompts, completions, answer, **columns) -> list[float]:
    """1 where the completion is the ``answer`` column, but for surrounding white space, else 0."""
    return [float(text_of(c).strip() == str(a).strip()) for c, a in zip(completions, answer, strict=True)]


_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def parse_final_number(text: str) -> float | None:
    """The number after the last ``####``, else the last number; None where there is none."""
    numbers = _NUMBER.findall(text.rpartition("####")[2])
    return float(numbers[-1].replace(",", "")) if numbers else None


def final_number(prompts, completions, answer, **columns) -> list[float]:
    """1 where the completion's final number is that of the ``answer`` column (GSM8K: after ``####``), else 0."""
    rewards = []
    for completion, reference in zip(completions, answer, strict=True):
        expected, given = parse_final_number(str(reference)), parse_final_number(text_of(completion))
        rewards.append(float(given is not None and given == expected))
    return rewards


REWARDS: dict[str, RewardFunction] = {
    function.__name__: function for function in (digits_included, digits_ordered, exact_answer, final_number)
}


def load_reward(name: str) -> RewardFunction:
    """A built-in by name, ``package.module.function``, or ``path/to/file.py:function``."""
    if name in REWARDS:
        return REWARDS[name]
    path, colon, attribute = name.rpartition(":")
    if colon:
        if not Path(path).is_file():
            raise UserError(f"reward_funcs: no such file: {path} (from {name!r})")
        spec = importlib.util.spec_from_file_location(Path(path).stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        module_name, _, attribute = name.rpartition(".")
        if not module_name:
            raise UserError(
                f"reward_funcs: {name!r} is unknown{nearest(name, REWARDS)}; built in: {', '.join(REWARDS)}"
            )
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            raise UserError(f"reward_funcs: cannot import {module_name!r} (from {name!r}): {error}") from None
    function = getattr(module, attribute, None)
    if not callable(function):
        raise UserError(f"reward_funcs: {name!r} names no function: {module.__name__} has no callable {attribute!r}")
    return function


class Rewards(NamedTuple):
    """Rewards of a batch: the weighted sum ``[B]``, and each function's own values ``[B, F]`` (NaN for None)."""

    total: torch.Tensor
    each: torch.Tensor


class RewardModel:
    """The configured reward functions and their weights."""

    def __init__(self, names: list[str], weights: list[float] | None):
        self.functions = [load_reward(name) for name in names]
        self.names = [getattr(function, "__name__", name) for function, name in zip(self.functions, names, strict=True)]
        self.weights = torch.tensor(weights or [1.0] * len(names))

    def index(self, metric: str | None) -> int:
        if metric is None:
            return len(self.names) - 1
        if metric not in self.names:
            raise UserError(f"eval_metric={metric!r} is not one of reward_funcs: {', '.join(self.names)}")
        return self.names.index(metric)

    def __call__(self, prompts: list, completions: list, columns: dict[str, list[Any]]) -> Rewards:
        """Call every function once on the whole batch.

        Raises:
            UserError: a function raises, or returns the wrong number of rewards, NaN, infinity or not a number.
        """
        rows = []
        for name, function in zip(self.names, self.functions, strict=True):
            try:
                values = function(prompts=prompts, completions=completions, **columns)
            except Exception as error:
                place = traceback.extract_tb(error.__traceback__)[-1]
                raise UserError(
                    f"reward function {name!r} raised {type(error).__name__}: {error} "
                    f"({Path(place.filename).name}, line {place.lineno}; columns: {', '.join(columns)})"
                ) from error
            rows.append(_checked(name, values, len(prompts)))
        each = torch.tensor(rows, dtype=torch.float32).T.contiguous()
        return Rewards((each.nan_to_num(nan=0.0) * self.weights).sum(1), each)


def _checked(name: str, values: object, expected: int) -> list[float]:
    values = values.tolist() if isinstance(values, torch.Tensor) else values
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise UserError(f"reward function {name!r} must return a list of numbers, got {type(values).__name__}")
    if len(values) != expected:
        raise UserError(f"reward function {name!r} returned {len(values)} rewards for {expected} completions")
    for index, value in enumerate(values):
        number = isinstance(value, (int, float)) or hasattr(value, "__float__")
        if value is not None and not (number and math.isfinite(value)):
            raise UserError(
                f"reward function {name!r} returned {value!r} for completion {index}; "
                "it must be a finite number, or None to abstain"
            )
    return [math.nan if value is None else float(value) for value in values]
