"""Reward functions by name."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from grpo_fast.errors import UserError, nearest, one_line
from grpo_fast.files import user_path
from grpo_fast.rewards.base import RewardFunction
from grpo_fast.rewards.functions.answers import boxed_answer, exact_answer, final_number, gsm8k_answer, math_answer
from grpo_fast.rewards.functions.code import unit_tests
from grpo_fast.rewards.functions.format import (
    answer_format,
    kimi_length,
    soft_answer_format,
    soft_overlong,
    think_format,
)
from grpo_fast.rewards.functions.tasks import countdown_equation, digits_included, digits_ordered

REWARDS: dict[str, RewardFunction] = {
    function.__name__: function
    for function in (
        exact_answer,
        final_number,
        gsm8k_answer,
        boxed_answer,
        math_answer,
        answer_format,
        soft_answer_format,
        think_format,
        countdown_equation,
        unit_tests,
        digits_included,
        digits_ordered,
    )
}

# What other trainers call these functions.
ALIASES = {
    "accuracy": "math_answer",
    "accuracy_reward": "math_answer",
    "format": "answer_format",
    "format_reward": "answer_format",
    "think_format_reward": "think_format",
}

# Functions that return a reward function.
MAKERS: dict[str, Callable[..., RewardFunction]] = {"kimi_length": kimi_length, "soft_overlong": soft_overlong}

# Folders of the reward files loaded so far.
_FOLDERS: set[Path] = set()

_CALL = re.compile(r"(\w+)(?:\((.*)\))?")


def is_built_in(name: str) -> bool:
    """Whether `name` is a reward function of this package."""
    name = ALIASES.get(name, name)
    call = _CALL.fullmatch(name)
    return name in REWARDS or bool(call and call[1] in MAKERS)


def load_reward(name: str) -> RewardFunction:
    """Load a reward function by name.

    Args:
        name: a built-in function, possibly with arguments (``soft_overlong(4096, 819)``); ``package.module.function``,
            also from the current folder; or ``path/to/file.py:function``, where the file may import its neighbours.

    Raises:
        UserError: there is no such function, or its arguments do not fit.
    """
    name = ALIASES.get(name, name)
    if is_built_in(name):
        return REWARDS[name] if name in REWARDS else _make(name)
    path, _, attribute = name.rpartition(":" if ":" in name else ".")
    try:
        module = _load_file(path) if ":" in name else _import_module(path, name)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"reward_funcs: {name!r} cannot be loaded: {type(error).__name__}: {one_line(error)}") from None
    function = getattr(module, attribute, None)
    if not callable(function):
        raise UserError(f"reward_funcs: {name!r} names no function: {module.__name__} has no callable {attribute!r}")
    return function


def metric_names(functions: list[RewardFunction], sources: list[str]) -> list[str]:
    """A name for each function's metrics: its own name, or if several functions share it, the shortest distinct end of
    what `load_reward` got: ``maths.score`` and ``code.score``. UserError for a function that is listed twice.
    """
    for source, count in Counter(sources).items():
        if count > 1:
            raise UserError(f"reward_funcs: {source!r} is listed {count} times; set its weight in reward_weights")
    names = {source: getattr(function, "__name__", source) for function, source in zip(functions, sources, strict=True)}
    for name, count in Counter(names.values()).items():
        if count > 1:
            alike = [source for source in sources if names[source] == name]
            taken = set(names.values()) - {name}
            parts = {source: _parts(source) for source in alike}
            for length in range(1, max(map(len, parts.values())) + 1):
                ends = {source: ".".join(found[-length:]) for source, found in parts.items()}
                if len(taken.union(ends.values())) == len(taken) + len(ends):
                    break
            else:
                ends = dict(zip(alike, alike, strict=True))
            names |= ends
    return [names[source] for source in sources]


def _parts(source: str) -> list[str]:
    """Folders, module and attribute; a call with arguments is a single part."""
    path, colon, attribute = source.rpartition(":")
    if colon:
        return [*Path(path).with_suffix("").parts, attribute]
    return [source] if "(" in source else source.split(".")


def _make(call: str) -> RewardFunction:
    name, text = call.removesuffix(")").partition("(")[::2]
    arguments = [int(word) if word.isdecimal() else word for word in re.split(r"[\s,]+", text.strip()) if word]
    parameters = inspect.signature(MAKERS[name], eval_str=True).parameters
    fits = len(arguments) == len(parameters) and all(
        isinstance(value, parameter.annotation) for value, parameter in zip(arguments, parameters.values(), strict=True)
    )
    if not fits:
        raise UserError(f"reward_funcs: {name}({text}) is not allowed: write {name}({', '.join(parameters)})")
    function = MAKERS[name](*arguments)
    function.__name__ = name
    return function


def _load_file(path: str) -> ModuleType:
    file = user_path(path)
    if not file.is_file():
        raise UserError(f"reward_funcs: no such file: {path}")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None:
        raise UserError(f"reward_funcs: {path} is not a Python file")
    _check_neighbours(file.parent.resolve())
    _extend_path(file.parent)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _check_neighbours(folder: Path) -> None:
    """Python imports one module per name: a second file would silently get the first one's neighbour."""
    _FOLDERS.add(folder)
    for path in folder.iterdir():
        loaded = Path(getattr(sys.modules.get(path.stem), "__file__", None) or path).resolve()
        if loaded.parent != folder and loaded.parent in _FOLDERS:
            raise UserError(f"reward_funcs: {loaded} and {path} are modules of the same name; rename one of them")


def _import_module(module: str, name: str) -> ModuleType:
    if not module:
        names = [*REWARDS, *MAKERS]
        raise UserError(f"reward_funcs: {name!r} is unknown{nearest(name, names)}; built in: {', '.join(names)}")
    _extend_path(Path.cwd())
    return importlib.import_module(module)


def _extend_path(folder: Path) -> None:
    if str(folder.resolve()) not in sys.path:
        sys.path.append(str(folder.resolve()))
