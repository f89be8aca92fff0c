"""Rewards for a completion's format, whatever its answer.

Format rewards are 1 if a completion has the format that the prompt asks for, else 0; if the prompt ends in ``<think>``,
by itself or through the chat template, the completion is read as if it began with that tag.
"""

from __future__ import annotations

import re

from grpo_fast.errors import UserError, import_extra, one_line
from grpo_fast.rewards.base import RewardFunction, text_of

# For each completion.
MATCH_SECONDS = 1.0

_TAG = re.compile("(</?(?:think|answer)>)")


def _whole(prompts: list, completions: list, rendered_prompts: list[str] | None) -> list[str]:
    """The completions' texts, including a tag that the prompt has opened."""
    texts = map(text_of, prompts) if rendered_prompts is None else rendered_prompts
    opened = [text.rstrip().endswith("<think>") for text in texts]
    return ["<think>" * tag + text_of(completion) for tag, completion in zip(opened, completions, strict=True)]


def answer_format(prompts, completions, rendered_prompts=None, **columns) -> list[float]:
    """1 for ``<think>...</think> <answer>...</answer>`` with only white space between and after them (R1-Zero, arXiv
    2501.12948).

    Each tag must occur once, and both parts must contain text. Text before ``<think>`` is allowed, for prompts that
    begin the answer with "Let me solve this step by step."
    """
    rewards = []
    for text in _whole(prompts, completions, rendered_prompts):
        parts = _TAG.split(text)
        filled = [bool(part.strip()) for part in parts[2::2]]
        in_order = parts[1::2] == ["<think>", "</think>", "<answer>", "</answer>"]
        rewards.append(float(in_order and filled == [True, False, True, False]))
    return rewards


def soft_answer_format(prompts, completions, **columns) -> list[float]:
    """1 if ``<answer>...</answer>`` follows somewhere after a ``</think>``; other text is ignored."""
    rewards = []
    for completion in map(text_of, completions):
        _, found, rest = completion.partition("</think>")
        _, opened, rest = rest.partition("<answer>")
        rewards.append(float(bool(found and opened and "</answer>" in rest)))
    return rewards


def think_format(prompts, completions, rendered_prompts=None, **columns) -> list[float]:
    """1 if the completion begins with the only ``<think>`` and closes it (TRL's ``think_format_reward``)."""
    texts = _whole(prompts, completions, rendered_prompts)
    return [float(t.startswith("<think>") and t.count("<think>") == 1 and "</think>" in t) for t in texts]


def format_regex(pattern: str) -> RewardFunction:
    r"""1 if the whole completion matches a regular expression, in which ``.`` also matches the end of a line.

    White space around the completion is ignored. The syntax is that of the `regex` package, a superset of Python's.

    Args:
        pattern: such as ``"<think>.*</think>\s*<answer>\d+</answer>"``. For a part of the completion, write ``.*``
            around it.

    Raises:
        UserError: the pattern is not a regular expression, or `regex`, which transformers requires, is missing.
    """
    regex = import_extra("regex", "train")
    try:
        compiled = regex.compile(pattern, regex.DOTALL)
    except regex.error as error:
        raise UserError(f"format_regex({pattern!r}) is not allowed: {one_line(error)}") from None

    def format_regex_reward(prompts, completions, rendered_prompts=None, **columns) -> list[float]:
        texts = [text.strip() for text in _whole(prompts, completions, rendered_prompts)]
        # Python's own expressions have no time limit, and some take exponential time.
        return [float(compiled.fullmatch(text, timeout=MATCH_SECONDS) is not None) for text in texts]

    return format_regex_reward
