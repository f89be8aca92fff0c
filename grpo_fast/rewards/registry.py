"""Reward functions by name."""

from __future__ import annotations

import ast
import inspect
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from grpo_fast.errors import UserError, nearest
from grpo_fast.named_functions import load_function
from grpo_fast.rewards.base import RewardFunction
from grpo_fast.rewards.functions.answers import (
    accuracy_reward,
    boxed_answer,
    exact_answer,
    final_number,
    gsm8k_answer,
    math_answer,
)
from grpo_fast.rewards.functions.code import unit_tests
from grpo_fast.rewards.functions.format import (
    answer_format,
    format_regex,
    soft_answer_format,
    think_format,
)
from grpo_fast.rewards.functions.length import cosine_scaled, kimi_length, soft_overlong
from grpo_fast.rewards.functions.tasks import countdown_equation, digits_included, digits_ordered
from grpo_fast.rewards.functions.text import language_consistency, repetition_penalty

REWARDS: dict[str, RewardFunction] = {
    function.__name__: function
    for function in (
        exact_answer,
        final_number,
        gsm8k_answer,
        boxed_answer,
        math_answer,
        accuracy_reward,
        answer_format,
        soft_answer_format,
        think_format,
        countdown_equation,
        unit_tests,
        digits_included,
        digits_ordered,
    )
}
# TRL's name.
REWARDS["think_format_reward"] = think_format

# Short names, and those of other trainers.
ALIASES = {
    "accuracy": "math_answer",
    "format": "answer_format",
    "format_reward": "answer_format",
}


def _reward_model(model: str, dtype: str = "auto", device: str | None = None, batch_size: int = 8) -> RewardFunction:
    # Imports torch, which worker processes do not need.
    from grpo_fast.rewards.functions.reward_model import reward_model

    return reward_model(model, dtype, device, batch_size)


# Functions that return a reward function.
MAKERS: dict[str, Callable[..., RewardFunction]] = {
    "format_regex": format_regex,
    "language_consistency": language_consistency,
    "repetition_penalty": repetition_penalty,
    "kimi_length": kimi_length,
    "soft_overlong": soft_overlong,
    "cosine_scaled": cosine_scaled,
    "reward_model": _reward_model,
}

_CALL = re.compile(r"(\w+)(?:\((.*)\))?", re.DOTALL)


def is_built_in(name: str) -> bool:
    """Whether `name` is a reward function of this package, or a reward model, which brings no code of its own."""
    name = ALIASES.get(name, name)
    call = _CALL.fullmatch(name)
    return name in REWARDS or bool(call and call[1] in MAKERS) or names_model(name)


def names_model(name: str) -> bool:
    """Whether `name` has the form of a hub name or folder, and not that of a function in a file."""
    return bool(re.fullmatch(r"[\w.~/-]*/[\w./-]*", name)) and not name.endswith(".py")


def is_shipped(function: object) -> bool:
    """Whether `function` is one of this package's, which `load_reward` finds by its name in every process."""
    home, name = getattr(function, "__module__", None) or "", getattr(function, "__qualname__", "")
    return home.startswith("grpo_fast.rewards.") and name.isidentifier()


def sources_of(functions: Sequence[str | RewardFunction]) -> list[str]:
    """For each function what `load_reward` finds it by; for one of a script, a name that tells it from the others.

    Raises:
        UserError: a function runs in worker processes, which could not find it.
    """
    sources: list[str] = []
    for function in functions:
        source = function if isinstance(function, str) else _source_of(function)
        alike = [other for other, taken in zip(functions, sources, strict=False) if taken.partition("#")[0] == source]
        # Closures and lambdas of one name are different functions.
        distinct = alike and not isinstance(function, str) and all(other is not function for other in alike)
        sources.append(f"{source}#{len(alike) + 1}" if distinct else source)
    return sources


def _source_of(function: RewardFunction) -> str:
    name = getattr(function, "__qualname__", type(function).__qualname__)
    if REWARDS.get(name) is function:
        return name
    module = getattr(function, "__module__", None) or "__main__"
    if hasattr(function, "isolated") and (module == "__main__" or not name.isidentifier()):
        raise UserError(
            f"reward_funcs: {name} is marked isolated, but worker processes cannot import it from this script; define "
            "it at the top level of a module"
        )
    return f"{module}.{name}"


def load_reward(name: str | RewardFunction) -> RewardFunction:
    """Load a reward function by name; a function itself is returned.

    Args:
        name: a built-in function, possibly with arguments (``soft_overlong(4096, 819)``); a reward model as
            ``owner/name`` or a folder with a slash in it; ``package.module.function``, also from the current folder; or
            ``path/to/file.py:function``, where the file may import its neighbours.

    Raises:
        UserError: there is no such function, or its arguments do not fit.
    """
    if not isinstance(name, str):
        return name
    name = ALIASES.get(name, name)
    if is_built_in(name):
        if names_model(name):
            return _reward_model(name)
        return REWARDS[name] if name in REWARDS else _make(name)
    if ":" not in name and "." not in name:
        names = [*REWARDS, *MAKERS]
        raise UserError(f"reward_funcs: {name!r} is unknown{nearest(name, names)}; built in: {', '.join(names)}")
    return load_function(name, "reward_funcs")


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
    signature = inspect.signature(MAKERS[name], eval_str=True)
    try:
        positional, named = _arguments(text)
        given = signature.bind(*positional, **named).arguments
        fits = all(_is(value, signature.parameters[key].annotation) for key, value in given.items())
    except TypeError:
        fits = False
    if not fits:
        wanted = ", ".join(
            str(parameter.replace(annotation=parameter.empty)) for parameter in signature.parameters.values()
        )
        raise UserError(f"reward_funcs: {name}({text}) is not allowed: write {name}({wanted})")
    function = MAKERS[name](**given)
    if name != "reward_model":
        function.__name__ = name
    return function


def _is(value: object, kind: Any) -> bool:
    return isinstance(value, (int, float) if kind is float else kind) and not isinstance(value, bool)


def _arguments(text: str) -> tuple[list[Any], dict[str, Any]]:
    """The arguments of a call: literals as in Python, and words, which are strings without quotes."""
    try:
        call = ast.parse(f"f({text})", mode="eval").body
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name):
            named = {keyword.arg or "": _value(keyword.value) for keyword in call.keywords}
            return [_value(argument) for argument in call.args], named
    except (SyntaxError, ValueError):
        pass
    if set(text) & set("()='\""):
        raise TypeError("not literals and words")
    return [int(word) if word.isdecimal() else word for word in re.split(r"[\s,]+", text.strip()) if word], {}


def _value(node: ast.expr) -> Any:
    return ast.unparse(node) if isinstance(node, (ast.Name, ast.Attribute)) else ast.literal_eval(node)
