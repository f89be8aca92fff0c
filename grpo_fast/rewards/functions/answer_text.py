"""What a text gives as its answer: where it stands in the text, and what plain numbers, choices and times in it are.

Whether two pieces of mathematics are equal is not decided here.
"""

from __future__ import annotations

import re
import unicodedata
from decimal import Decimal
from fractions import Fraction
from itertools import pairwise
from typing import NamedTuple

from grpo_fast.rewards.base import between

# Final answers stand at the end; math-verify's patterns take quadratic time on long texts.
LONGEST_ANSWER = 2000
# Digits of a number that is read; Python refuses to convert much longer ones.
LONGEST_NUMBER = 1000
# Characters of several answers on one side of an "or".
LONGEST_LIST = 100
FONTS = "text|textbf|textit|mathrm|mathbf|mbox"

_CJK = r"\u4e00-\u9fff"
_FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}
# Minus sign, en dash and small hyphen; Chinese full stop and comma; degree, powers and operators.
_SIGNS = str.maketrans(
    {"\u2212": "-", "\u2013": "-", "\ufe63": "-", "\u3002": ".", "\u3001": ","}
    | {"°": r"^\circ ", "²": "^2", "³": "^3", "\u00d7": "*", "÷": "/"}
)
_VULGAR = re.compile("[¼-¾⅐-⅞]")
_EXPONENT = re.compile(r"(?<![\w.])(\d+(?:\.\d*)?|\.\d+)[eE]([+-]?\d{1,2})(?![\w.]*\w)")
# Between Chinese and anything else, so that a number in a Chinese sentence is a word of its own.
_CJK_EDGE = re.compile(rf"(?<=[{_CJK}])(?=[^\s{_CJK}])|(?<=[^\s{_CJK}])(?=[{_CJK}])")

# LaTeX of numbers, in order, as plain text.
_UNLATEX = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\[dt]?frac\s*\{\s*(-?[\d.]+)\s*\}\s*\{\s*(\d+)\s*\}", r" \1/\2 "),
        (r"\\[dt]?frac\s*(\d)\s*(\d)", r" \1/\2 "),
        (r"\{,\}", ","),
        (r"(?<=\d)\\[,!](?=\d{3})", ""),
        (r"\\[%$]", lambda match: match[0][1]),
        (r"(?:\^\s?)?\{?\\(?:circ|degree)\b\s?\}?|\bdeg(?:rees?)?\b|度", " "),
        (rf"\\(?:{FONTS})\s*\{{([^{{}}]*)\}}", r" \1 "),
        (r"\\(?:left|right|displaystyle)(?![a-zA-Z])|\\[,!;:()\[\] ]|\*\*|~", " "),
        (r"\$", " "),
    )
]

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d*)?|\.\d+"
_LITERAL = (
    r"(?P<sign>[-+]?)\s*(?:(?P<whole>\d+)(?:\s+and)?\s+(?P<part>\d+/\d+)"
    rf"|(?P<over>{_DIGITS})(?:\s*/\s*(?P<under>\d+))?)"
)
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12, "万": 4, "亿": 8}
_SCALE = "|".join(rf"{word}s?\b" if word.isascii() else word for word in _SCALES)
# Letters right behind a number, or short ones, are variables, but for these.
_SHORT_UNITS = "mm|cm|dm|km|mi|ft|in|yd|mg|kg|lbs?|oz|ml|cl|dl|hrs?|min|sec|ms|mph|kph|kmh|rpm|Hz|kHz|kW|kWh|kJ|kcal"
_SHORT_UNITS += "|am|pm|rad|USD|EUR"
# Words that go on with the number, or with the sentence.
_NO_UNITS = (
    "or|and|to|plus|minus|times|over|squared|cubed|factorial|pi|sqrt|point|half|dozen|more|less|fewer|greater|than"
    "|halves|thirds|quarters|fourths|fifths|(?:ten|hundred|thousand|million)ths?"
)
# Possessive: a long text is cut into words in one way only.
_UNIT = (
    rf"(?:(?!(?:{_NO_UNITS})\b)(?:(?<=[\s/])[A-Za-z]{{3,}}+|[A-Za-z]{{4,}}+|(?:{_SHORT_UNITS})(?![A-Za-z])|(?<=[\s/])[mgshLVWNJKCF](?!\w)"
    rf"|[€£¥₹]|[{_CJK}]++)(?:\s?\^\{{?\d\}}?)?+[\s/.·-]*+)++"
)
_NUMBER = re.compile(
    rf"\s*[€£¥₹]?\s*{_LITERAL}\s*(?P<percent>%|[Pp]er\s?cent\b)?\s*(?P<scale>{_SCALE})?\s*(?:{_UNIT})?[\s.]*"
)
# A number in a sentence, with what is tied to it: of "10-3" or "12:30" no part is a number by itself.
_TIED = re.compile(
    r"(?:(?<![\w)\]}])[-+])?(?<!\d)(?:\d+(?: and)? (?=\d+/\d))?(?:\d|\.(?=\d))(?:\d|[.,:/^*+-](?=[\d.]))*"
)

_BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*(\{?)")
_FILLERS = r"(?:maybe|perhaps|possibly|even|else|also|alternatively|either|(?:it\s+)?(?:could|might|may)\s+be)"
_OR = r"(?:\bor\b|\\(?:text|mbox)\s*\{\s*or\s*\}|或者?)"
# What may stand between boxes that are one answer, or several to choose from.
_JOINT = re.compile(rf"(?:[\s$,;.:/&=]|\\[()\[\]]|\band\b|\bi\.e\.|{_OR}|\b{_FILLERS}\b)*", re.IGNORECASE)
_ITEM = r"(?:[A-Za-z]\s*=\s*)?(?:\$[^$]+\$|(?<![\w.])[-+]?[^\s,;$]*\d(?:[^\s,;$]*[^\s,;$.])?)"
_SPLIT = re.compile(rf"\s*,?\s*\(?\s*{_OR}\s*(?:{_FILLERS}\b\s*)*", re.IGNORECASE)
_LAST_ITEM = re.compile(rf"((?:{_ITEM}\s*,\s*)*{_ITEM})(?:\s+[A-Za-z%]+)?$")
_FIRST_ITEM = re.compile(_ITEM)
_AND = re.compile(rf"{_ITEM}(?:,\s*{_ITEM})*,?\s+and\s+{_ITEM}\.?")

_CLAIM = re.compile(
    r"(?:\banswers?\b[\s*]*(?:is|are|:|=)|\b(?:solutions|roots)\s+are\b|答案?\s*[是为选:]|答案|选(?=[\s(]*[A-J]\b))"
    r"[\s:*是为选]*(?:\b(?:option|choice|equal to)\b)?[\s:*]*",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(rf"\n|[.!?](?:\s|$)|,(?=\s*[{_CJK}])")

_OTHER = r"\s*(?:or|and|或|和|[,/&])\s*(?:(?:maybe|perhaps|possibly)\s+)?[(\[]?[A-J]\b"
_CHOICE = re.compile(
    rf"(?:(?i:option|choice)\s*)?[(\[]?\s*([A-Ja-j])\s*(?:[)\].:]+(?!{_OTHER})(?:\s+.*|\s*)|$)", re.DOTALL
)
_CLAIMED_CHOICE = re.compile(rf"[(\[]?([A-J])\b(?!{_OTHER})")
_LAST_CHOICE = re.compile(r"(?:^|[\s(])([A-J])[\s.*)]*$")
_RIGHT_CHOICE = re.compile(r"(?:^|[\s(])([A-J])\)?\s+(?:is|must be)\s+(?:the\s+)?(?:correct|right|best|answer)")
_NO_CHOICE = re.compile(r"(?:(?i:\b(?:n?or|and|not)|n't)|[,/&]|或|和|不)\s*[(\[]?[A-J]$")
_CLOCK = re.compile(r"(?<![\d:.])(\d+(?:\s*:\s*\d+)+)(?![\d:])\s*(?:([ap])\.?\s?m\b)?", re.IGNORECASE)


class Answer(NamedTuple):
    """What a text gives as its answer.

    `items` are several where it gives several, to choose from or as a set; `bare` says that there is nothing around
    them; `claim` is what a sentence such as "the answer is ..." says it is, None without one.
    """

    items: list[str]
    bare: bool
    claim: str | None = None

    @property
    def text(self) -> str:
        return ", ".join(self.items)

    @property
    def stated(self) -> str:
        """The narrowest text that holds the answer."""
        return self.text if self.claim is None else self.claim


class Quantity(NamedTuple):
    """A number as it is written, exactly; `percent` says that a percent sign stands behind it."""

    value: Fraction
    percent: bool = False

    def allows(self, given: Quantity) -> bool:
        """Whether `given` is this number: 50% is 0.5, but a sign may be missing, too. What is 1/4 is not 0.25%."""
        if self.percent == given.percent:
            return self.value == given.value
        if self.percent:
            return given.value in (self.value, self.value / 100)
        return given.value == 100 * self.value or (given.value == self.value and abs(self.value) > 1)


def plain(text: str) -> str:
    """`text` with one spelling for what has several: full width, minus signs, ``½``, degrees, ``1e3`` and ``.5``."""
    text = text.translate(_FULL_WIDTH).translate(_SIGNS)
    text = _VULGAR.sub(lambda match: " " + unicodedata.normalize("NFKC", match[0]).replace("\u2044", "/"), text)
    text = _EXPONENT.sub(lambda match: format(Decimal(match[0]), "f"), text)
    text = re.sub(r"(?<![\w.])\.(?=\d)", "0.", text)
    return _CJK_EDGE.sub(" ", text)


def unlatex(text: str) -> str:
    """`text` without the LaTeX that is usual around numbers and letters."""
    for pattern, replacement in _UNLATEX:
        text = pattern.sub(replacement, text)
    return text.strip()


def boxes(text: str) -> list[tuple[int, int, str]]:
    r"""Every ``\boxed{...}`` whose braces close, and ``\boxed 5``: where it starts and ends, and its content.

    Inner boxes are content; ``\{`` and ``\}`` do not count as braces.
    """
    found, position = [], 0
    while match := _BOX.search(text, position):
        position = match.end()
        if not match[1]:
            word = re.compile(r"[^\s$\\{}]+").match(text, position)
            if word:
                position = word.end()
                found.append((match.start(), position, word[0].rstrip(".,;")))
            continue
        depth = 1
        for part in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, position):
            depth += {"{": 1, "}": -1}.get(part[0], 0)
            if not depth:
                found.append((match.start(), part.end(), text[match.end() : part.start()]))
                position = part.end()
                break
    return found


def last_box(text: str) -> str | None:
    r"""The content of the last box in the last 2,000 characters; None where there is none."""
    found = boxes(text[-LONGEST_ANSWER:])
    return found[-1][2] if found else None


def final_answer(text: str) -> Answer:
    r"""What a text gives as its answer.

    The last ``<answer>...</answer>``, or else what follows the last ``####``, or else all of the text; and in that the
    last ``\boxed{...}``, together with those before it where only commas, "and", "or", "maybe" and the like stand
    between them; without a box, what "the answer is" is followed by, and what "or" separates.
    """
    answer = between(text, "<answer>", "</answer>")
    bare = answer is not None or "####" in text
    part = plain((text.rpartition("####")[2] if answer is None else answer).strip()[-LONGEST_ANSWER:])
    found = boxes(part)
    contents = [content for _, _, content in found[-1:]]
    for (_, end, content), (start, _, _) in reversed(list(pairwise(found))):
        if not _JOINT.fullmatch(part, end, start):
            break
        contents.insert(0, content)
    if contents:
        items = alternatives(contents[0]) if len(contents) == 1 else contents
        return Answer(items or contents, True)
    claim = _claim(part)
    return Answer(alternatives(part if claim is None else claim) or [part], bare, claim)


def _claim(text: str) -> str | None:
    """The rest of the last sentence that says what the answer is."""
    found = list(_CLAIM.finditer(text))
    if not found:
        return None
    rest = text[found[-1].end() :].strip()
    end = _SENTENCE_END.search(rest)
    return (rest[: end.start()] if end and end.start() else rest).strip(" *")


def alternatives(text: str) -> list[str]:
    """The answers that a text gives to choose from ("1 or 2"), or joined by "and" and nothing else; none of one."""
    text = " ".join(text.split())
    if len(text) < LONGEST_LIST and _AND.fullmatch(text) and not read_number(text):
        return [found.strip("$.") for found in re.findall(_ITEM, text)]
    pieces = _SPLIT.split(text)
    if len(pieces) < 2:
        return []
    first, last = _LAST_ITEM.search(pieces[0][-LONGEST_LIST:]), _FIRST_ITEM.match(pieces[-1][:LONGEST_LIST])
    # What goes on to another number is a sentence that has an "or" in it.
    if not first or not last or re.search(r"\d", pieces[-1][last.end() :]):
        return []
    middle = [piece for piece in pieces[1:-1] if _FIRST_ITEM.match(piece)]
    return [item.strip("$. ") for item in (*first[1].split(","), *middle, last[0])]


def read_number(text: str) -> Quantity | None:
    """The number that `text` is, but for currency, units and LaTeX; None where it is anything else."""
    found = _NUMBER.fullmatch(" ".join(unlatex(text).split())) if len(text) < LONGEST_NUMBER else None
    value = _value(found) if found else None
    if value is None:
        return None
    scale = _SCALES.get((found["scale"] or "").removesuffix("s"), 0)
    return Quantity(value * 10**scale, found["percent"] is not None)


def _value(match: re.Match) -> Fraction | None:
    try:
        if match["whole"]:
            value = int(match["whole"]) + Fraction(match["part"])
        else:
            value = Fraction(match["over"].replace(",", "").rstrip(".")) / int(match["under"] or 1)
    except ZeroDivisionError:
        return None
    return -value if match["sign"] == "-" else value


def last_number(text: str) -> Fraction | str | None:
    """The last number in a text; what it is a part of, as in ``10-3``, ``12:30`` or ``3,4``, is returned as it is."""
    # Without a word that is cut in two. Most texts have a number near their end.
    end = text[-LONGEST_ANSWER:].partition(" ")[2] if len(text) > LONGEST_ANSWER else text
    tied = _TIED.findall(unlatex(plain(end))) or _TIED.findall(unlatex(plain(text)))
    if not tied:
        return None
    found = re.fullmatch(_LITERAL, tied[-1]) if len(tied[-1]) < LONGEST_NUMBER else None
    value = _value(found) if found else None
    return tied[-1] if value is None else value


def read_choice(answer: Answer) -> str | None:
    """The letter that an answer chooses, ``A`` to ``J``; None where it chooses none, or several."""
    text = unlatex(answer.stated).strip("* \n")
    found = _CHOICE.fullmatch(text)
    if found or answer.bare:
        return found[1].upper() if found else None
    if answer.claim is not None:
        found = _CLAIMED_CHOICE.match(text)
    else:
        found = _RIGHT_CHOICE.search(text) or _LAST_CHOICE.search(text)
        found = found if found and not _NO_CHOICE.search(text[: found.end(1)]) else None
    return found[1] if found else None


def read_clock(text: str) -> tuple[list[int], str] | None:
    """The numbers of the last ``4:10`` in a text, and ``a`` or ``p`` where "a.m." or "p.m." follows."""
    found = _CLOCK.findall(unlatex(text))
    return ([int(part) for part in found[-1][0].split(":")], found[-1][1].lower()) if found else None
