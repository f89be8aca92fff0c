"""Rewards of 1 or 0 for a final answer, compared with the column ``answer``."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache

from grpo_fast.errors import import_extra, require_extra
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
# A number followed by one or two letters that are not a unit; longer words may be prose.
_VARIABLE = re.compile(r"(?!.*[a-zA-Z]{4}).*\d ?[a-zA-Z].*", re.DOTALL)
# Digits that math-verify can distinguish, since it compares in float64.
_EXACT_DIGITS = 15

Rule = Callable[[Answer, Answer], bool | None]


def exact_answer(prompts, completions, answer, **columns) -> list[float]:
    """1 if the completion equals the ``answer`` column, except for surrounding white space, else 0."""
    return [float(text_of(c).strip() == str(a).strip()) for c, a in zip(completions, answer, strict=True)]


def parse_final_number(text: str) -> Fraction | None:
    """The exact last number of a text, after ``####`` if it has that; None without a number.

    A part of something else, as in ``10-3``, ``12:30`` or ``3,4``, is not a number; ``1/2`` and ``2 1/2`` are.
    """
    value = last_number(text.rpartition("####")[2])
    return value if isinstance(value, Fraction) else None


def final_number(prompts, completions, answer, **columns) -> list[float]:
    """1 if the completion's final number is that of the ``answer`` column (in GSM8K, after ``####``), else 0.

    See :func:`parse_final_number`. What is not a number there, such as a time, is compared literally.
    """
    rewards = []
    for completion, reference in zip(completions, answer, strict=True):
        texts = (str(reference), text_of(completion))
        expected, given = (last_number(text.rpartition("####")[2]) for text in texts)
        rewards.append(float(given is not None and given == expected))
    return rewards


def gsm8k_answer(prompts, completions, answer, **columns) -> list[float]:
    """Like `final_number`, but the completion must have ``####`` before its answer, as GSM8K's solutions do."""
    right = final_number(prompts, completions, answer)
    return [value * ("####" in text_of(c)) for value, c in zip(right, completions, strict=True)]


def boxed_answer(prompts, completions, answer, **columns) -> list[float]:
    r"""1 if the last ``\boxed{...}`` contains the ``answer`` column (or the last box of that), else 0.

    Spaces, ``$``, ``\left``, ``\right``, ``\,`` and ``\!`` are ignored; ``\dfrac`` and ``\tfrac`` equal ``\frac``;
    numbers are compared by value, so 7.0 equals 7.
    """
    rewards = []
    for completion, reference in zip(completions, answer, strict=True):
        given, expected = last_box(text_of(completion)), str(reference)
        expected = last_box(expected) or expected
        number = None if given is None else read_number(plain(given))
        same_number = number is not None and number == read_number(plain(expected))
        rewards.append(float(same_number or (given is not None and _plain_latex(given) == _plain_latex(expected))))
    return rewards


def _plain_latex(text: str) -> str:
    text = re.sub(r"\\[dt]frac(?![a-zA-Z])", r"\\frac", text)
    return re.sub(r"\\(?:left|right)(?![a-zA-Z])|\\[,!;: ]|[\s$]", "", text)


# `prepare` imports sympy and builds the parsers, which takes seconds.
@isolated(
    over_limit=0.0,
    check=lambda: require_extra("math_verify", "train"),
    prepare=lambda: same_answer(r"\boxed{\frac{1}{2}}", "1/2"),
)
def math_answer(prompts, completions, answer, **columns) -> list[float]:
    r"""1 if the completion's answer is mathematically equal to the ``answer`` column, by math-verify, else 0.

    The answer is the last ``<answer>...</answer>``, what follows the last ``####``, the last ``\boxed{...}``, what
    follows "the answer is", or what math-verify finds in the last 2,000 characters. Units are ignored; 50% equals 0.5,
    and may also lack its sign. Plain numbers are compared exactly, words without case, choices by their letter. Several
    alternative answers are right only if all of them are.
    """
    return [float(same_answer(text_of(c), str(a))) for c, a in zip(completions, answer, strict=True)]


def same_answer(completion: str, reference: str) -> bool:
    """Whether two texts give the same answer. Has no time limit, so run it in a worker (:func:`isolated`)."""
    return _judged(RULES, final_answer(reference), final_answer(completion))


def _judged(rules: list[Rule], expected: Answer, given: Answer) -> bool:
    return next(verdict for rule in rules if (verdict := rule(expected, given)) is not None)


def _same_text(expected: Answer, given: Answer) -> bool | None:
    texts = [" ".join(unlatex(text).split()) for text in (expected.text, given.stated)]
    return True if texts[0] == texts[1] != "" else None


def _same_words(expected: Answer, given: Answer) -> bool | None:
    words = _plain_words(expected.text)
    if not _TEXT.fullmatch(expected.text) and not _WORDS.fullmatch(words):
        return None
    # To math-verify, a word is the product of its letters, in any order.
    return words in (_plain_words(given.text), _plain_words(given.stated))


def _same_choice(expected: Answer, given: Answer) -> bool | None:
    wanted = read_choice(expected._replace(bare=True)) if _CHOICES.fullmatch(unlatex(expected.text)) else None
    return None if wanted is None else read_choice(given) == wanted


def _same_several(expected: Answer, given: Answer) -> bool | None:
    """Several answers are right if all of them are, or if they are the set that was asked for."""
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
        # math-verify reads "1,2001" as 1,200 and "4:10" as 4. Try a decimal comma and a ratio.
        return read_number(last.replace(",", ".").replace(":", "/")) == number
    if last is not None and len(str(number.value.numerator)) > _EXACT_DIGITS:
        return last == number.value
    return None


def _same_mathematics(expected: Answer, given: Answer) -> bool:
    # No timeouts: math-verify's use signals, which only a main thread gets.
    math_verify = import_extra("math_verify", "train")
    return math_verify.verify(_parsed(expected.text, True), _parsed(given.text, given.bare), timeout_seconds=None)


# The first rule that does not return None decides.
NUMERIC_RULES: list[Rule] = [_same_clock, _same_number, _same_mathematics]
RULES: list[Rule] = [_same_text, _same_choice, _same_words, _same_several, *NUMERIC_RULES]


def _plain_words(text: str) -> str:
    """Lower-case text without LaTeX's fonts, braces, parentheses and a final full stop."""
    text = re.sub(rf"\\(?:{FONTS})\b|[{{}}()$*]", " ", text)
    return " ".join(text.split()).rstrip(".").lower()


@lru_cache(maxsize=1024)
def _parsed(part: str, bare: bool) -> list:
    math_verify = import_extra("math_verify", "train")
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    part = part.rstrip(". ").replace(r"\varnothing", r"\emptyset")
    part = re.sub(r"(?<=\d)\\[,!](?=\d{3})", "", part)
    # math-verify does not recognize LaTeX without delimiters: it would read "5x" as 5 and "8!" as 8.
    bare = bare or not re.search(r"\s|\\boxed", part)
    if bare and not re.search(r"(?<!\\)\$|\\\(|\\\[", part) and not _PROSE.search(part):
        part = rf"\boxed{{{part}}}"
    return math_verify.parse(part, parsing_timeout=None)
