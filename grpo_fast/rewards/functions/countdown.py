"""Countdown: reach a target with given numbers, each used exactly once."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Sequence
from fractions import Fraction

from grpo_fast.rewards.base import between, text_of

OPERATORS: dict[type, Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
ALLOWED = frozenset("0123456789+-*/() ")
LONGEST = 300


def _value(node: ast.expr, used: list[int]) -> Fraction:
    if isinstance(node, ast.Constant):
        used.append(node.value)
        return Fraction(node.value)
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](_value(node.left, used), _value(node.right, used))
    raise ValueError(f"not allowed in an equation: {type(node).__name__}")


def solves_countdown(equation: str, numbers: Sequence[int], target: int) -> bool:
    """Whether `equation` (digits, ``+ - * /``, parentheses, spaces) uses each number once and equals the target.

    It is parsed, not evaluated as code, and computed in exact fractions; what is longer than 300 characters is wrong.
    """
    equation = equation.strip()
    if len(equation) > LONGEST or not ALLOWED.issuperset(equation):
        return False
    used: list[int] = []
    try:
        value = _value(ast.parse(equation, mode="eval").body, used)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return False
    return sorted(used) == sorted(map(int, numbers)) and value == Fraction(target)


def countdown_equation(prompts, completions, nums, target, **columns) -> list[float]:
    """1 where the last ``<answer>`` is an equation that makes ``target`` from the numbers in ``nums``, else 0."""
    rewards = []
    for completion, numbers, goal in zip(completions, nums, target, strict=True):
        equation = between(text_of(completion), "<answer>", "</answer>")
        rewards.append(float(equation is not None and solves_countdown(equation, numbers, goal)))
    return rewards
