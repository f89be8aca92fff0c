"""Rewards for a right final answer, compared with the column ``answer``: 1 or 0."""

from __future__ import annotations

import logging
import re
from functools import lru_cache
from importlib.util import find_spec
from itertools import pairwise

from grpo_fast.errors import import_extra
from grpo_fast.rewards.base import between, isolated, text_of

# Final answers stand at the end; math-verify's patterns take quadratic time on long texts.
LONGEST_ANSWER = 2000

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_BOX = re.compile(r"\\(?:boxed|fbox)\s*{")
_FONTS = "text|textbf|textit|mathrm|mathbf|mbox"
_TEXT = re.compile(rf"[\s()$.]*\\(?:{_FONTS})\s*{{[^{{}}\\\d]*}}[\s()$.]*")
_PROSE = re.compile(r"(?<![\\a-zA-Z{])[a-zA-Z]{2,} [a-zA-Z]{2,}")
_JOINT = re.compile(r"[\s$,;]*(?:and|or)?[\s$,;]*")


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


def boxes(text: str) -> list[tuple[int, int, str]]:
    r"""Every ``\boxed{...}`` whose braces close: where it starts and ends, and its content. Inner boxes are content."""
    found, position = [], 0
    while match := _BOX.search(text, position):
        depth, position = 1, match.end()
        for end in range(match.end(), len(text)):
            depth += (text[end] == "{") - (text[end] == "}")
            if not depth:
                found.append((match.start(), end + 1, text[match.end() : end]))
                position = end + 1
                break
    return found


def last_box(text: str) -> str | None:
    r"""The content of the last ``\boxed{...}`` in the last 2,000 characters; None where there is none."""
    found = boxes(text[-LONGEST_ANSWER:])
    return found[-1][2] if found else None


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


def final_part(text: str) -> tuple[str, bool]:
    r"""What a text gives as its answer, and whether nothing else is around it.

    The last ``<answer>...</answer>``, or else what follows the last ``####``, or else all of the text; and in that the
    last ``\boxed{...}``, together with those before it where only commas, "and" or "or" stand between them.
    """
    answer = between(text, "<answer>", "</answer>")
    bare = answer is not None or "####" in text
    part = (text.rpartition("####")[2] if answer is None else answer).strip()[-LONGEST_ANSWER:]
    found = boxes(part)
    contents = [content for _, _, content in found[-1:]]
    for (_, end, content), (start, _, _) in reversed(list(pairwise(found))):
        if not _JOINT.fullmatch(part, end, start):
            break
        contents.insert(0, content)
    return (", ".join(contents), True) if contents else (part, bare)


def _check_math() -> None:
    # Importing it takes seconds, which only the workers need to spend.
    if find_spec("math_verify") is None:
        import_extra("math_verify", "train")


def _prepare_math() -> None:
    # Imports sympy and builds the parsers, which takes seconds.
    same_answer(r"\boxed{\frac{1}{2}}", "1/2")


@isolated(over_limit=0.0, check=_check_math, prepare=_prepare_math)
def math_answer(prompts, completions, answer, **columns) -> list[float]:
    r"""1 where the completion's answer is mathematically that of the ``answer`` column, by math-verify, else 0.

    The answer is the last ``<answer>...</answer>``, what follows the last ``####``, the last ``\boxed{...}``, or what
    math-verify finds in its last 2,000 characters. Units are no matter; 50% is 0.5, but its sign may also be missing.
    Words are compared as they are, but for case.
    """
    return [float(same_answer(text_of(c), str(a))) for c, a in zip(completions, answer, strict=True)]


def same_answer(completion: str, reference: str) -> bool:
    """Whether two texts give the same answer. Has no time limit of its own: see :func:`isolated`."""
    expected, given = final_part(reference)[0], final_part(completion)
    words = _plain_words(expected)
    if _TEXT.fullmatch(expected) or re.fullmatch(r"no|[a-z][a-z' -]{2,}", words):
        # As mathematics, a word is the product of its letters, in any order.
        return _plain_words(given[0]) == words
    # No timeouts: its own work by signals, which only a main thread gets.
    math_verify = import_extra("math_verify", "train")
    return math_verify.verify(_parsed(expected, True), _parsed(*given), timeout_seconds=None)


def _plain_words(text: str) -> str:
    """Text without LaTeX's fonts and braces, parentheses, a full stop at its end, and capitals."""
    text = re.sub(rf"\\(?:{_FONTS})\b|[{{}}()$*]", " ", text)
    return " ".join(text.split()).rstrip(".").lower()


@lru_cache(maxsize=1024)
def _parsed(part: str, bare: bool) -> list:
    math_verify = import_extra("math_verify", "train")
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    part = part.rstrip(". ").replace(r"\varnothing", r"\emptyset")
    part = re.sub(r"(?<=\d)\\[,!](?=\d{3})", "", part)
    # Bare LaTeX is none to math-verify.
    if bare and not re.search(r"(?<!\\)\$|\\\(|\\\[", part) and not _PROSE.search(part):
        part = rf"\boxed{{{part}}}"
    return math_verify.parse(part, parsing_timeout=None)
