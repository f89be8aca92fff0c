"""Reward functions, with TRL's signature ``f(prompts, completions, **columns) -> list[float | None]``.

Prompts and completions are strings, or lists of chat messages where the prompt is a chat; `columns` are the dataset's
other columns, one value a sample, and ``completion_ids``. None means that a function does not apply to a sample. A
function that judges the steps of an answer returns lists of (end, reward) pairs instead: see `process_rewards.py`.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
import re
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

from grpo_fast.errors import UserError, nearest, one_line
from grpo_fast.process_rewards import Steps, mean_reward, read_steps

RewardFunction = Callable[..., Sequence[float | None]]

# What the trainer passes by name beside the data's own columns.
RESERVED_COLUMNS = ("prompts", "completions", "completion_ids")


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
    """A built-in by name, ``package.module.function``, or ``path/to/file.py:function``.

    Modules may lie in the present folder, and a file may import its neighbours.
    """
    if name in REWARDS:
        return REWARDS[name]
    path, colon, attribute = name.rpartition(":")
    try:
        module = _load_file(path) if colon else _import_module(name)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"reward_funcs: {name!r} cannot be loaded: {type(error).__name__}: {one_line(error)}") from None
    attribute = attribute if colon else name.rpartition(".")[2]
    function = getattr(module, attribute, None)
    if not callable(function):
        raise UserError(f"reward_funcs: {name!r} names no function: {module.__name__} has no callable {attribute!r}")
    if inspect.iscoroutinefunction(function):
        raise UserError(f"reward_funcs: {name!r} is async, which is not supported yet; make it a plain function")
    return function


def _load_file(path: str) -> ModuleType:
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"reward_funcs: no such file: {path}")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None:
        raise UserError(f"reward_funcs: {path} is not a Python file")
    _extend_path(file.parent)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _import_module(name: str) -> ModuleType:
    module_name = name.rpartition(".")[0]
    if not module_name:
        known = ", ".join(REWARDS)
        raise UserError(f"reward_funcs: {name!r} is unknown{nearest(name, REWARDS)}; built in: {known}")
    _extend_path(Path.cwd())
    return importlib.import_module(module_name)


def _extend_path(folder: Path) -> None:
    if str(folder.resolve()) not in sys.path:
        sys.path.append(str(folder.resolve()))


class Rewards(NamedTuple):
    """Rewards of a batch: the weighted sum ``[B]``, and each function's own values ``[B, F]`` (NaN for None).

    A completion for which every function returned None has the sum NaN. Where a function rewarded steps, its value is
    their mean, and `steps` holds them: for each completion, by the function's index.
    """

    total: torch.Tensor
    each: torch.Tensor
    steps: list[dict[int, Steps]]


class RewardModel:
    """The configured reward functions and their weights.

    Raises:
        UserError: a function cannot be loaded, or two have the same name.
    """

    def __init__(self, names: list[str], weights: list[float] | None):
        self.functions = [load_reward(name) for name in names]
        self.names = [getattr(function, "__name__", name) for function, name in zip(self.functions, names, strict=True)]
        self.weights = torch.tensor(weights or [1.0] * len(names))
        for name, count in Counter(self.names).items():
            if count > 1:
                raise UserError(f"reward_funcs: {count} functions are named {name!r}; metrics need a name for each")

    def index(self, metric: str | None) -> int:
        if metric is None:
            return len(self.names) - 1
        if metric not in self.names:
            raise UserError(f"eval_metric={metric!r} is not one of reward_funcs: {', '.join(self.names)}")
        return self.names.index(metric)

    def check_columns(self, columns: Iterable[str]) -> None:
        """Every function must accept the data's columns by name.

        Raises:
            UserError: a signature does not fit, or a column has a name that is taken.
        """
        columns = list(columns)
        for name in RESERVED_COLUMNS:
            if name in columns:
                raise UserError(f"the dataset has a column {name!r}, which rewards get from the trainer; rename it")
        arguments = dict.fromkeys([*RESERVED_COLUMNS, *columns])
        for name, function in zip(self.names, self.functions, strict=True):
            try:
                signature = inspect.signature(function)
            except ValueError:
                continue
            try:
                signature.bind(**arguments)
            except TypeError as error:
                raise UserError(
                    f"reward function {name!r}{signature} does not fit: {error}; "
                    f"it is called with {', '.join(arguments)}"
                ) from None

    def __call__(self, prompts: list, completions: list, columns: dict[str, list[Any]]) -> Rewards:
        """Call every function once on the whole batch; each gets lists of its own.

        Raises:
            UserError: a function raises, or returns the wrong number of rewards, NaN, infinity or not a number.
        """
        rows, steps = [], [{} for _ in prompts]
        texts = [text_of(completion) for completion in completions]
        for index, (name, function) in enumerate(zip(self.names, self.functions, strict=True)):
            arguments = {"prompts": prompts, "completions": completions, **columns}
            arguments = {key: [_copied(value) for value in values] for key, values in arguments.items()}
            try:
                values = function(**arguments)
            except (Exception, SystemExit) as error:
                place = traceback.extract_tb(error.__traceback__)[-1]
                raise UserError(
                    f"reward function {name!r} raised {type(error).__name__}: {one_line(error)} "
                    f"({Path(place.filename).name}, line {place.lineno}; columns: {', '.join(columns)})"
                ) from error
            values = _checked(name, values, texts)
            for found, value in zip(steps, values, strict=True):
                if isinstance(value, list):
                    found[index] = value
            rows.append([mean_reward(value) if isinstance(value, list) else value for value in values])
        each = torch.tensor(rows, dtype=torch.float32).T.contiguous()
        total = (each.nan_to_num(nan=0.0) * self.weights).sum(1)
        return Rewards(total.masked_fill(each.isnan().all(1), math.nan), each, steps)


def _copied(value: Any) -> Any:
    """A list that a function may change without changing the trainer's: token ids, or chat messages."""
    if not isinstance(value, list):
        return value
    return [dict(part) if isinstance(part, dict) else part for part in value]


def _checked(name: str, values: object, texts: list[str]) -> list[float | Steps]:
    values = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise UserError(f"reward function {name!r} must return a list of numbers, got {type(values).__name__}")
    if len(values) != len(texts):
        raise UserError(f"reward function {name!r} returned {len(values)} rewards for {len(texts)} completions")
    if not any(isinstance(value, (list, tuple)) for value in values):
        return [_number(name, value, index) for index, value in enumerate(values)]
    return [read_steps(name, value, index, text) for index, (value, text) in enumerate(zip(values, texts, strict=True))]


def _number(name: str, value: object, index: int) -> float:
    if value is None:
        return math.nan
    try:
        number = math.nan if isinstance(value, str) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not abs(number) <= torch.finfo(torch.float32).max:
        raise UserError(
            f"reward function {name!r} returned {value!r:.80} for completion {index}; "
            "it must be a finite number, or None to abstain"
        )
    return number
