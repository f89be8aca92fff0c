"""Rewards for a right final answer, compared with the column ``answer``: 1 or 0."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache
from importlib.util import find_spec

from grpo_fast.errors import import_extra
from grpo_fast.rewards.base import isolated, text_of
from grpo_fast.rewards.functions.answer_text import (
    FONTS,
    Answer,
    final_answer,
    last_box,
    last_number,
    plain,
    read_choice,
    read_clock,
    read_number,
    unlatex,
)

_TEXT = re.compile(rf"[\s()$.]*\\(?:{FONTS})\s*{{[^{{}}\\\d]*}}[\s()$.]*")
_WORDS = re.compile(r"no|(?=.*[a-z]{3})[a-z][a-z' -]*|[\u4e00-\u9fff]+")
_CHOICES = re.compile(r"[(\[]?[A-J][)\]]?|[(\[]?[A-J][).\]:]+\s.*")
_PROSE = re.compile(r"(?<![\\a-zA-Z{])[a-zA-Z]{2,} [a-zA-Z]{2,}")
# A number with a letter or two behind it that are no unit; longer words may be prose.
_VARIABLE = re.compile(r"(?!.*[a-zA-Z]{4}).*\d ?[a-zA-Z].*", re.DOTALL)
# Digits that math-verify, which compares at float64's precision, tells apart.
_EXACT_DIGITS = 15

Rule = Callable[[Answer, Answer], bool | None]


def exact_answer(prompts, completions, answer, **columns) -> list[float]:
    """1 where the completion is the ``answer`` column, but for surrounding white space, else 0."""
    return [float(text_of(c).strip() == str(a).strip()) for c, a in zip(completions, answer, strict=True)]


def parse_final_number(text: str) -> Fraction | None:
    """The number after the last ``####``, else the last number, exactly; None where there is none.

    A part of something else, as in ``10-3``, ``12:30`` or ``3,4``, is no number; ``1/2`` and ``2 1/2`` are.
    """
    value = last_number(text.rpartition("####")[2])
    return value if isinstance(value, Fraction) else None


def final_number(prompts, completions, answer, **columns) -> list[float]:
    """1 where the completion's final number is that of the ``answer`` column (GSM8K: after ``####``), else 0.

    See :func:`parse_final_number`. What is no number there, such as a time, is compared as it is written.
    """
    rewards = []
    for completion, reference in zip(completions, answer, strict=True):
        texts = (str(reference), text_of(completion))
        expected, given = (last_number(text.rpartition("####")[2]) for text in texts)
        rewards.append(float(given is not None and given == expected))
    return rewards


def gsm8k_answer(prompts, completions, answer, **columns) -> list[float]:
    """As `final_number`, but the completion must have written ``####`` before its answer, as GSM8K's solutions do."""
    right = final_number(prompts, completions, answer)
    return [value * ("####" in text_of(c)) for value, c in zip(right, completions, strict=True)]


def boxed_answer(prompts, completions, answer, **columns) -> list[float]:
    r"""1 where the last ``\boxed{...}`` holds the ``answer`` column (its own last box, if it has one), else 0.

    Spaces, ``$`` and ``\left``, ``\right``, ``\,``, ``\!`` are no matter; ``\dfrac`` and ``\tfrac`` are ``\frac``; of
    numbers only the value counts, so that 7.0 is 7.
    """
    rewards = []
    for completion, reference in zip(completions, answer, strict=True):
        given, expected = last_box(text_of(completion)), str(reference)
        expected = last_box(expected) or expected
        rewards.append(float(given is not None and _same_box(given, expected)))
    return rewards


def _same_box(given: str, expected: str) -> bool:
    numbers = [read_number(plain(text)) for text in (given, expected)]
    return _plain_latex(given) == _plain_latex(expected) or (None not in numbers and numbers[0] == numbers[1])


def _plain_latex(text: str) -> str:
    text = re.sub(r"\\[dt]frac(?![a-zA-Z])", r"\\frac", text)
    return re.sub(r"\\(?:left|right)(?![a-zA-Z])|\\[,!;: ]|[\s$]", "", text)


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

    The answer is the last ``<answer>...</answer>``, what follows the last ``####``, the last ``\boxed{...}``, what "the
    answer is" is followed by, or what math-verify finds in its last 2,000 characters. Units are no matter; 50% is 0.5,
    but its sign may also be missing. Plain numbers are compared exactly, words as they are, but for case, and of a
    choice the letter. Several answers to choose from are right only where all of them are.
    """
    return [float(same_answer(text_of(c), str(a))) for c, a in zip(completions, answer, strict=True)]


def same_answer(completion: str, reference: str) -> bool:
    """Whether two texts give the same answer. Has no time limit of its own: see :func:`isolated`."""
    expected, given = final_answer(reference), final_answer(completion)
    return _judged(RULES, expected, given)


def _judged(rules: list[Rule], expected: Answer, given: Answer) -> bool:
    verdicts = (rule(expected, given) for rule in rules)
    return next(verdict for verdict in verdicts if verdict is not None)


def _same_text(expected: Answer, given: Answer) -> bool | None:
    texts = [" ".join(unlatex(text).split()) for text in (expected.text, given.stated)]
    return True if texts[0] == texts[1] != "" else None


def _same_words(expected: Answer, given: Answer) -> bool | None:
    words = _plain_words(expected.text)
    if not _TEXT.fullmatch(expected.text) and not _WORDS.fullmatch(words):
        return None
    # As mathematics, a word is the product of its letters, in any order.
    return words in (_plain_words(given.text), _plain_words(given.stated))


def _same_choice(expected: Answer, given: Answer) -> bool | None:
    wanted = read_choice(expected._replace(bare=True)) if _CHOICES.fullmatch(unlatex(expected.text)) else None
    return None if wanted is None else read_choice(given) == wanted


def _same_several(expected: Answer, given: Answer) -> bool | None:
    """Several answers are right where all of them are, or where they are the set that was asked for."""
    if len(given.items) == 1:
        return None
    if _same_mathematics(expected, Answer([given.text], True)):
        return True
    return all(_judged(NUMERIC_RULES, expected, Answer([item], True)) for item in given.items)


def _same_clock(expected: Answer, given: Answer) -> bool | None:
    """To math-verify ``4:10`` is the quotient 4/10."""
    clocks = read_clock(expected.text), read_clock(given.stated)
    if clocks[0] is None or clocks[1] is None:
        return None
    (numbers, half), (given_numbers, given_half) = clocks
    return numbers == given_numbers and (not half or not given_half or half == given_half)


def _same_number(expected: Answer, given: Answer) -> bool | None:
    """Plain numbers are compared exactly."""
    number, given_number = read_number(expected.text), read_number(given.stated)
    if number is None:
        return None
    if given_number is not None:
        return number.allows(given_number)
    if (given.bare or " " not in given.text) and _VARIABLE.fullmatch(unlatex(given.text)):
        # To math-verify "2t" is two tons.
        return False
    last = None if given.bare else last_number(given.stated)
    if isinstance(last, str) and re.search("[,:]", last):
        # Of "1,2001" and "4:10" math-verify reads 1,200 and 4. The comma may be a decimal one, and the colon a ratio's.
        return read_number(last.replace(",", ".").replace(":", "/")) == number
    if last is not None and len(str(number.value.numerator)) > _EXACT_DIGITS:
        return last == number.value
    return None


def _same_mathematics(expected: Answer, given: Answer) -> bool:
    # No timeouts: its own work by signals, which only a main thread gets.
    math_verify = import_extra("math_verify", "train")
    return math_verify.verify(_parsed(expected.text, True), _parsed(given.text, given.bare), timeout_seconds=None)


# The first that knows decides; None leaves it to the next.
NUMERIC_RULES: list[Rule] = [_same_clock, _same_number, _same_mathematics]
RULES: list[Rule] = [_same_text, _same_choice, _same_words, _same_several, *NUMERIC_RULES]


def _plain_words(text: str) -> str:
    """Text without LaTeX's fonts and braces, parentheses, a full stop at its end, and capitals."""
    text = re.sub(rf"\\(?:{FONTS})\b|[{{}}()$*]", " ", text)
    return " ".join(text.split()).rstrip(".").lower()


@lru_cache(maxsize=1024)
def _parsed(part: str, bare: bool) -> list:
    math_verify = import_extra("math_verify", "train")
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    part = part.rstrip(". ").replace(r"\varnothing", r"\emptyset")
    part = re.sub(r"(?<=\d)\\[,!](?=\d{3})", "", part)
    # Bare LaTeX is none to math-verify, which would read 5 in "5x" and 8 in "8!".
    bare = bare or not re.search(r"\s|\\boxed", part)
    if bare and not re.search(r"(?<!\\)\$|\\\(|\\\[", part) and not _PROSE.search(part):
        part = rf"\boxed{{{part}}}"
    return math_verify.parse(part, parsing_timeout=None)
