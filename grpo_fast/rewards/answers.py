"""Rewards for a right final answer, compared with the column ``answer``: 1 or 0."""

from __future__ import annotations

import re

from grpo_fast.errors import import_extra
from grpo_fast.rewards.base import between, isolated, text_of

# Final answers stand at the end; math-verify's patterns take quadratic time on long texts.
LONGEST_ANSWER = 2000

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_BOX = re.compile(r"\\(?:boxed|fbox)\s*{")


def exact_answer(prompts, completions, answer, **columns) -> list[float]:
    """1 where the completion is the ``answer`` column, but for surrounding white space, else 0."""
    return [float(text_of(c).strip() == str(a).strip()) for c, a in zip(completions, answer, strict=True)]


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


def gsm8k_answer(prompts, completions, answer, **columns) -> list[float]:
    """As `final_number`, but the completion must have written ``####`` before its answer, as GSM8K's solutions do."""
    right = final_number(prompts, completions, answer)
    return [value * ("####" in text_of(c)) for value, c in zip(right, completions, strict=True)]


def last_box(text: str) -> str | None:
    r"""The content of the last ``\boxed{...}`` whose braces close; None where there is none."""
    for start in reversed([match.end() for match in _BOX.finditer(text)]):
        depth = 1
        for end in range(start, min(start + LONGEST_ANSWER, len(text))):
            depth += (text[end] == "{") - (text[end] == "}")
            if not depth:
                return text[start:end]
    return None


def boxed_answer(prompts, completions, answer, **columns) -> list[float]:
    r"""1 where the last ``\boxed{...}`` holds the ``answer`` column (its own last box, if it has one), else 0.

    Spaces, ``$`` and ``\left``, ``\right``, ``\,``, ``\!`` are no matter; ``\dfrac`` and ``\tfrac`` are ``\frac``.
    """
    rewards = []
    for completion, reference in zip(completions, answer, strict=True):
        given, expected = last_box(text_of(completion)), str(reference)
        expected = last_box(expected) or expected
        rewards.append(float(given is not None and _plain_latex(given) == _plain_latex(expected)))
    return rewards


def _plain_latex(text: str) -> str:
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    return re.sub(r"\\left|\\right|\\[,!;: ]|[\s$]", "", text)


def final_part(text: str) -> str:
    """What a text gives as its answer: the last ``<answer>...</answer>``, or what follows the last ``####``, or all."""
    inside = between(text, "<answer>", "</answer>")
    if inside is None:
        inside = text.rpartition("####")[2]
    return inside.strip()[-LONGEST_ANSWER:]


def _check_math() -> None:
    import_extra("math_verify", "train")


@isolated(over_limit=0.0, check=_check_math)
def math_answer(prompts, completions, answer, **columns) -> list[float]:
    return [float(same_answer(text_of(c), str(a))) for c, a in zip(completions, answer, strict=True)]


def same_answer(completion: str, reference: str) -> bool:
    given, expected = final_part(completion), final_part(reference)
    return bool(given) and given == expected
