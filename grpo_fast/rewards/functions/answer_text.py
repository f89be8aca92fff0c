"""Finding the answer in a text, and reading the plain numbers, choices and times in it.

`answers.py` decides whether two answers are equal.
"""

from __future__ import annotations

import re
import unicodedata
from decimal import Decimal
from fractions import Fraction
from itertools import pairwise
from typing import NamedTuple

from grpo_fast.rewards.base import between

# Characters. Answers are at the end of a text, and math-verify's patterns take quadratic time; Python does not convert
# numbers that are much longer; a list is on one side of an "or".
LONGEST_ANSWER, LONGEST_NUMBER, LONGEST_LIST = 2000, 1000, 100
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
# Between Chinese and other characters, so that a number in a Chinese sentence becomes a separate word.
_CJK_EDGE = re.compile(rf"(?<=[{_CJK}])(?=[^\s{_CJK}])|(?<=[^\s{_CJK}])(?=[{_CJK}])")

# Replacements from the LaTeX of numbers to plain text, in order.
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
# Other short words after a number are variables, not units.
_SHORT_UNITS = "mm|cm|dm|km|mi|ft|in|yd|mg|kg|lbs?|oz|ml|cl|dl|hrs?|min|sec|ms|mph|kph|kmh|rpm|Hz|kHz|kW|kWh|kJ|kcal"
_SHORT_UNITS += "|am|pm|rad|USD|EUR"
# Words that continue the number or the sentence.
_NO_UNITS = (
    "or|and|to|plus|minus|times|over|squared|cubed|factorial|pi|sqrt|point|half|dozen|more|less|fewer|greater|than"
    "|halves|thirds|quarters|fourths|fifths|(?:ten|hundred|thousand|million)th[s]?"
)
# Possessive, so that a long text can be split into words in only one way.
_UNIT = (
    rf"(?:(?!(?:{_NO_UNITS})\b)(?:(?<=[\s/])[A-Za-z]{{3,}}+|[A-Za-z]{{4,}}+|(?:{_SHORT_UNITS})(?![A-Za-z])|(?<=[\s/])[mgshLVWNJKCF](?!\w)"
    rf"|[€£¥₹]|[{_CJK}]++)(?:\s?\^\{{?\d\}}?)?+[\s/.·-]*+)++"
)
_NUMBER = re.compile(
    rf"\s*[€£¥₹]?\s*{_LITERAL}\s*(?P<percent>%|[Pp]er\s?cent\b)?\s*(?P<scale>{_SCALE})?\s*(?:{_UNIT})?[\s.]*"
)
# A number in a sentence with everything attached to it: no part of "10-3" or "12:30" is a number by itself.
_TIED = re.compile(
    r"(?:(?<![\w)\]}])[-+])?(?<!\d)(?:\d+(?: and)? (?=\d+/\d))?(?:\d|\.(?=\d))(?:\d|[.,:/^*+-](?=[\d.]))*"
)

_BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*(\{?)")
_FILLERS = r"(?:maybe|perhaps|possibly|even|else|also|alternatively|either|(?:it\s+)?(?:could|might|may)\s+be)"
_OR = r"(?:\bor\b|\\(?:text|mbox)\s*\{\s*or\s*\}|或者?)"
# What may separate boxes that form one answer, or several alternatives.
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
    """The answer of a text.

    `items` has several entries if the text gives alternatives or a set. `bare` means that there is no other text around
    them. `claim` is the answer according to a sentence such as "the answer is ...", or None.
    """

    items: list[str]
    bare: bool
    claim: str | None = None

    @property
    def text(self) -> str:
        return ", ".join(self.items)

    @property
    def stated(self) -> str:
        """The shortest text that contains the answer."""
        return self.text if self.claim is None else self.claim


class Quantity(NamedTuple):
    """An exact number; `percent` is whether a percent sign follows it in the text."""

    value: Fraction
    percent: bool = False

    def allows(self, given: Quantity) -> bool:
        """Whether `given` is this number. 50% equals 0.5, and may lack its sign; 0.25% does not equal 1/4."""
        if self.percent == given.percent:
            return self.value == given.value
        if self.percent:
            return given.value in (self.value, self.value / 100)
        return given.value == 100 * self.value or (given.value == self.value and abs(self.value) > 1)


def plain(text: str) -> str:
    """Normalise what has several spellings: full width, minus signs, ``½``, degrees, ``1e3`` and ``.5``."""
    text = text.translate(_FULL_WIDTH).translate(_SIGNS)
    text = _VULGAR.sub(lambda match: " " + unicodedata.normalize("NFKC", match[0]).replace("\u2044", "/"), text)
    text = _EXPONENT.sub(lambda match: format(Decimal(match[0]), "f"), text)
    text = re.sub(r"(?<![\w.])\.(?=\d)", "0.", text)
    return _CJK_EDGE.sub(" ", text)


def unlatex(text: str) -> str:
    """Remove the LaTeX that is usual around numbers and letters."""
    for pattern, replacement in _UNLATEX:
        text = pattern.sub(replacement, text)
    return text.strip()


def boxes(text: str) -> list[tuple[int, int, str]]:
    r"""Start, end and content of every ``\boxed{...}`` with balanced braces and every ``\boxed 5``, also of ``\fbox``.

    Inner boxes are part of the content; ``\{`` and ``\}`` do not count as braces.
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
    r"""The content of the last box in the last 2,000 characters, or None."""
    found = boxes(text[-LONGEST_ANSWER:])
    return found[-1][2] if found else None


def final_answer(text: str) -> Answer:
    r"""Find the answer of a text.

    It is in the last ``<answer>...</answer>``, or after the last ``####``, or anywhere. There, it is the content of the
    last ``\boxed{...}``, with the boxes before it if only commas, "and", "or", "maybe" and the like separate them;
    without a box, what follows "the answer is", and the alternatives that "or" separates.
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
    """The rest of the last sentence that states the answer."""
    found = list(_CLAIM.finditer(text))
    if not found:
        return None
    rest = text[found[-1].end() :].strip()
    end = _SENTENCE_END.search(rest)
    return (rest[: end.start()] if end and end.start() else rest).strip(" *")


def alternatives(text: str) -> list[str]:
    """The answers in a text of alternatives ("1 or 2"), or of nothing but a list with "and"; empty for one answer."""
    text = " ".join(text.split())
    if len(text) < LONGEST_LIST and _AND.fullmatch(text) and not read_number(text):
        return [found.strip("$.") for found in re.findall(_ITEM, text)]
    pieces = _SPLIT.split(text)
    if len(pieces) < 2:
        return []
    first, last = _LAST_ITEM.search(pieces[0][-LONGEST_LIST:]), _FIRST_ITEM.match(pieces[-1][:LONGEST_LIST])
    # With another number after these, it is a sentence that happens to contain "or".
    if not first or not last or re.search(r"\d", pieces[-1][last.end() :]):
        return []
    middle = [piece for piece in pieces[1:-1] if _FIRST_ITEM.match(piece)]
    return [item.strip("$. ") for item in (*first[1].split(","), *middle, last[0])]


def read_number(text: str) -> Quantity | None:
    """The number that `text` consists of, apart from currency, units and LaTeX; None for any other text."""
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
    """The last number in a text; as a string if it is part of something else, as in ``10-3``, ``12:30`` or ``3,4``."""
    # Most texts have a number near their end. A first word that may be cut is dropped.
    end = text[-LONGEST_ANSWER:].partition(" ")[2] if len(text) > LONGEST_ANSWER else text
    tied = _TIED.findall(unlatex(plain(end))) or _TIED.findall(unlatex(plain(text)))
    if not tied:
        return None
    found = re.fullmatch(_LITERAL, tied[-1]) if len(tied[-1]) < LONGEST_NUMBER else None
    value = _value(found) if found else None
    return tied[-1] if value is None else value


def read_choice(answer: Answer) -> str | None:
    """The one letter that an answer chooses, ``A`` to ``J``, or None."""
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
    """The numbers of the last time such as ``4:10``, and ``a`` or ``p`` if "a.m." or "p.m." follows."""
    found = _CLOCK.findall(unlatex(text))
    return ([int(part) for part in found[-1][0].split(":")], found[-1][1].lower()) if found else None
