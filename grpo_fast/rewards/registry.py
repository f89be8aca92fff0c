"""Reward functions by name."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from grpo_fast.errors import UserError, nearest, one_line
from grpo_fast.rewards.answers import boxed_answer, exact_answer, final_number, gsm8k_answer, math_answer
from grpo_fast.rewards.base import RewardFunction
from grpo_fast.rewards.code import unit_tests
from grpo_fast.rewards.countdown import countdown_equation
from grpo_fast.rewards.format import answer_format, soft_answer_format, think_format
from grpo_fast.rewards.length import kimi_length, soft_overlong
from grpo_fast.rewards.sorting import digits_included, digits_ordered

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

# Those that are made with arguments.
MAKERS: dict[str, Callable[..., RewardFunction]] = {"kimi_length": kimi_length, "soft_overlong": soft_overlong}

_CALL = re.compile(r"(\w+)(?:\((.*)\))?")


def is_built_in(name: str) -> bool:
    """Whether `load_reward` would find `name` in this package."""
    call = _CALL.fullmatch(name)
    return name in REWARDS or bool(call and call[1] in MAKERS)


def load_reward(name: str) -> RewardFunction:
    """A built-in by name, one with arguments (``soft_overlong(4096, 819)``), ``package.module.function``, or
    ``path/to/file.py:function``.

    Modules may lie in the present folder, and a file may import its neighbours.

    Raises:
        UserError: there is no such function, or its arguments do not fit.
    """
    if name in REWARDS:
        return REWARDS[name]
    call = _CALL.fullmatch(name)
    if call and call[1] in MAKERS:
        return _make(call[1], call[2] or "")
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
    return function


def _make(name: str, text: str) -> RewardFunction:
    arguments = [int(word) if word.isdecimal() else word for word in re.split(r"[\s,]+", text.strip()) if word]
    parameters = inspect.signature(MAKERS[name], eval_str=True).parameters
    wanted = {parameter: kind.annotation for parameter, kind in parameters.items()}
    if len(arguments) != len(wanted) or not all(map(isinstance, arguments, wanted.values())):
        example = ", ".join(wanted)
        raise UserError(f"reward_funcs: {name}({text}) is not allowed: write {name}({example})")
    function = MAKERS[name](*arguments)
    function.__name__ = name
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
        names = [*REWARDS, *MAKERS]
        raise UserError(f"reward_funcs: {name!r} is unknown{nearest(name, names)}; built in: {', '.join(names)}")
    _extend_path(Path.cwd())
    return importlib.import_module(module_name)


def _extend_path(folder: Path) -> None:
    if str(folder.resolve()) not in sys.path:
        sys.path.append(str(folder.resolve()))
