"""Rewards for how a completion is written: in one language, and without repetitions. They take arguments, as in
``language_consistency(en)`` and ``repetition_penalty(3, -1.0)``.
"""

from __future__ import annotations

import re

from grpo_fast.errors import UserError, import_extra, nearest
from grpo_fast.rewards.base import RewardFunction, text_of

_LATIN = (
    "af az bs ca cs cy da de en es et eu fi fr ga gl hr hu id is it lt lv ms nl no pl pt ro sk sl sq sv sw tr vi zu"
)
# The scripts that a language is written in, by ISO 639 code (Unicode CLDR, languages and scripts).
_SCRIPTS = {
    **dict.fromkeys(_LATIN.split(), ("Latin",)),
    **dict.fromkeys(("be", "bg", "kk", "ky", "mk", "mn", "ru", "sr", "uk"), ("Cyrillic",)),
    **dict.fromkeys(("ar", "fa", "ur"), ("Arabic",)),
    **dict.fromkeys(("hi", "mr", "ne"), ("Devanagari",)),
    "am": ("Ethiopic",),
    "bn": ("Bengali",),
    "el": ("Greek",),
    "gu": ("Gujarati",),
    "he": ("Hebrew",),
    "hy": ("Armenian",),
    "ja": ("Han", "Hiragana", "Katakana"),
    "ka": ("Georgian",),
    "km": ("Khmer",),
    "kn": ("Kannada",),
    "ko": ("Hangul",),
    "lo": ("Lao",),
    "ml": ("Malayalam",),
    "my": ("Myanmar",),
    "pa": ("Gurmukhi",),
    "si": ("Sinhala",),
    "ta": ("Tamil",),
    "te": ("Telugu",),
    "th": ("Thai",),
    "zh": ("Han",),
}
# Scripts without spaces between words, of which every letter counts as a word. By their extensions, since the sign for
# a long vowel in Katakana belongs to two scripts.
_UNSPACED = "".join(
    rf"\p{{scx={script}}}" for script in ("Han", "Hiragana", "Katakana", "Thai", "Lao", "Khmer", "Myanmar")
)
_LETTER = rf"(?:(?![{_UNSPACED}])\p{{L}}\p{{M}}*)"
# Formulas, code, tags and LaTeX's commands belong to no language.
_NO_LANGUAGE = re.compile(
    r"```.*?(?:```|\Z)|`[^`\n]*`|\$\$.*?\$\$|\$[^$\n]*\$|\\\[.*?\\\]|\\\(.*?\\\)|</?[a-z_]+>|\\[a-zA-Z]+", re.DOTALL
)


def language_consistency(language: str) -> RewardFunction:
    """The share of a completion's words that are in the target language (DeepSeek-R1, arXiv 2501.12948, section 2.3.2).

    As in the paper, the words are those of the chain of thought: what is before ``</think>``, or the whole completion
    without that tag. A completion without words gets 0. A word is in the language if the language's script is its
    first letter's. This separates Chinese from English, the mixture that the paper describes, exactly and word by word,
    which language detectors cannot do for single words; it does not separate English from French. Each letter of a
    script that has no spaces, such as Chinese, counts as a word; formulas, code, tags and LaTeX's commands do not
    count.

    Args:
        language: its ISO 639 code, as in ``en``, ``zh`` or ``ja``.

    Raises:
        UserError: the code is not known, or the `regex` package, which transformers requires, is missing.
    """
    if language not in _SCRIPTS:
        raise UserError(
            f"language_consistency({language}) is not allowed: the language must be one of "
            f"{', '.join(sorted(_SCRIPTS))}{nearest(language, _SCRIPTS)}"
        )
    regex = import_extra("regex", "train")
    words = regex.compile(rf"(?=\p{{L}})[{_UNSPACED}]\p{{M}}*|{_LETTER}+(?:['\u2019]{_LETTER}+)*")
    target = regex.compile("[" + "".join(rf"\p{{scx={script}}}" for script in _SCRIPTS[language]) + "]")

    def language_consistency_reward(prompts, completions, **columns) -> list[float]:
        rewards = []
        for completion in completions:
            thoughts = text_of(completion).partition("</think>")[0]
            found = words.findall(_NO_LANGUAGE.sub(" ", thoughts))
            rewards.append(sum(target.match(word) is not None for word in found) / max(len(found), 1))
        return rewards

    return language_consistency_reward


def repetition_penalty(ngram_size: int = 3, max_penalty: float = -1.0) -> RewardFunction:
    """`max_penalty` times the share of a completion's n-grams of tokens that repeat an earlier one.

    TRL's ``get_repetition_penalty_reward`` (arXiv 2502.03373, appendix C.2). Completions of fewer than `ngram_size`
    tokens get 0.

    Raises:
        UserError: `ngram_size` is below 1, or `max_penalty` above 0.
    """
    if ngram_size < 1:
        raise UserError(f"repetition_penalty: ngram_size={ngram_size} is not allowed: it must be at least 1")
    if max_penalty > 0:
        raise UserError(f"repetition_penalty: max_penalty={max_penalty} is not allowed: it must not be above 0")

    def repetition_penalty_reward(prompts, completions, completion_ids, **columns) -> list[float]:
        rewards = []
        for ids in completion_ids:
            count = len(ids) - ngram_size + 1
            distinct = {tuple(ids[start : start + ngram_size]) for start in range(max(count, 0))}
            rewards.append(max_penalty * (1 - len(distinct) / count) if count > len(distinct) else 0.0)
        return rewards

    return repetition_penalty_reward
