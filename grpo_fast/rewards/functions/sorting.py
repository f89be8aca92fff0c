"""Partial rewards for sorting the digits of a prompt."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

from grpo_fast.rewards.base import text_of


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
