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
from grpo_fast.rewards.functions.countdown import countdown_equation
from grpo_fast.rewards.functions.format import answer_format, soft_answer_format, think_format
from grpo_fast.rewards.functions.length import kimi_length, soft_overlong
from grpo_fast.rewards.functions.sorting import digits_included, digits_ordered

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

# Those of the reward files that were loaded.
_FOLDERS: set[Path] = set()

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


def metric_names(functions: list[RewardFunction], sources: list[str]) -> list[str]:
    """A name for each function's metrics: its own, or where several share that one, as in two files, the shortest end
    of what `load_reward` got that tells them apart: ``maths.score`` and ``code.score``.

    Raises:
        UserError: a function is there twice.
    """
    for source, count in Counter(sources).items():
        if count > 1:
            raise UserError(f"reward_funcs: {source!r} is there {count} times; its weight is in reward_weights")
    names = {source: getattr(function, "__name__", source) for function, source in zip(functions, sources, strict=True)}
    for name, count in Counter(names.values()).items():
        if count > 1:
            alike = [source for source in sources if names[source] == name]
            names |= _shortest_ends(alike, taken=set(names.values()) - {name})
    return [names[source] for source in sources]


def _shortest_ends(sources: list[str], taken: set[str]) -> dict[str, str]:
    """By source, as many of its last parts as tell all of them, and what is `taken`, apart."""
    parts = {source: _parts(source) for source in sources}
    for length in range(1, max(map(len, parts.values())) + 1):
        ends = {source: ".".join(found[-length:]) for source, found in parts.items()}
        if len(taken.union(ends.values())) == len(taken) + len(ends):
            return ends
    return {source: source for source in sources}


def _parts(source: str) -> list[str]:
    """Folders, module and attribute. One with arguments is a single part."""
    path, colon, attribute = source.rpartition(":")
    if colon:
        return [*Path(path).with_suffix("").parts, attribute]
    return [source] if "(" in source else source.split(".")


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
    """Python imports one module of a name only; a second file would silently get the first one's neighbour."""
    _FOLDERS.add(folder)
    for path in folder.iterdir():
        loaded = Path(getattr(sys.modules.get(path.stem), "__file__", None) or path).resolve()
        if loaded.parent != folder and loaded.parent in _FOLDERS:
            raise UserError(f"reward_funcs: {loaded} and {path} are modules of one name; rename one of them")


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
