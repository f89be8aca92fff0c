"""Rewards of the generated tasks: Countdown (reach a target with the given numbers) and sorting digits."""

from __future__ import annotations

import ast
import operator
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import pairwise

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

    It is parsed, not run as code, and computed in exact fractions. Equations of more than 300 characters are wrong.
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
    """1 if the last ``<answer>`` is an equation that makes ``target`` from the numbers in ``nums``, else 0."""
    rewards = []
    for completion, numbers, goal in zip(completions, nums, target, strict=True):
        equation = between(text_of(completion), "<answer>", "</answer>")
        rewards.append(float(equation is not None and solves_countdown(equation, numbers, goal)))
    return rewards


def _included(prompt: str, completion: str) -> float:
    wanted, given = Counter(filter(str.isdigit, prompt)), Counter(filter(str.isdigit, completion))
    return (wanted & given).total() / max(wanted.total(), len(completion.replace(" ", "")), 1)


def digits_included(prompts, completions, **columns) -> list[float]:
    """The share of the prompt's digits that the completion has, as a multiset; extra characters lower it."""
    return [_included(text_of(p), text_of(c)) for p, c in zip(prompts, completions, strict=True)]


def digits_ordered(prompts, completions, **columns) -> list[float]:
    """The share of neighbours in ascending order, times `digits_included`, so that only the right digits count."""
    rewards = []
    for prompt, completion in zip(prompts, completions, strict=True):
        prompt, completion = text_of(prompt), text_of(completion)
        answer = completion.replace(" ", "")
        ascending = sum(a.isdigit() and b.isdigit() and a <= b for a, b in pairwise(answer))
        pairs = max(sum(map(str.isdigit, prompt)) - 1, len(answer) - 1, 1)
        rewards.append(ascending / pairs * _included(prompt, completion))
    return rewards
