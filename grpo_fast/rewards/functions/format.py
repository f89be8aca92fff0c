"""Format rewards: 1 where a completion has the form that the prompt asks for, else 0.

A prompt that ends in ``<think>``, by itself or by the chat template, has opened that tag already; the completion is
read as if it began with it.
"""

from __future__ import annotations

from grpo_fast.rewards.base import text_of

TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def _whole(prompts: list, completions: list, rendered_prompts: list[str] | None) -> list[str]:
    """The completions' texts, with the tag that the prompt has opened."""
    texts = map(text_of, prompts) if rendered_prompts is None else rendered_prompts
    opened = [text.rstrip().endswith("<think>") for text in texts]
    return ["<think>" * tag + text_of(completion) for tag, completion in zip(opened, completions, strict=True)]


def _between_tags(text: str) -> list[str] | None:
    """The five stretches of text around R1-Zero's four tags; None unless each tag is there once, in order."""
    if any(text.count(tag) != 1 for tag in TAGS):
        return None
    parts = []
    for tag in TAGS:
        part, found, text = text.partition(tag)
        if not found:
            return None
        parts.append(part)
    return [*parts, text]


def answer_format(prompts, completions, rendered_prompts=None, **columns) -> list[float]:
    """1 for ``<think>...</think> <answer>...</answer>`` with nothing but white space between and after them (R1-Zero,
    arXiv 2501.12948).

    Each tag occurs once, and both parts hold some text. There may be text before ``<think>``, as in prompts that begin
    the answer with "Let me solve this step by step."
    """
    rewards = []
    for text in _whole(prompts, completions, rendered_prompts):
        parts = _between_tags(text)
        filled = parts and [bool(part.strip()) for part in parts[1:]]
        rewards.append(float(filled == [True, False, True, False]))
    return rewards


def soft_answer_format(prompts, completions, **columns) -> list[float]:
    """1 where a ``</think>`` is followed, later on, by ``<answer>...</answer>``; text around them is no matter."""
    rewards = []
    for completion in map(text_of, completions):
        _, found, rest = completion.partition("</think>")
        _, opened, rest = rest.partition("<answer>")
        rewards.append(float(bool(found and opened and "</answer>" in rest)))
    return rewards


def think_format(prompts, completions, rendered_prompts=None, **columns) -> list[float]:
    """1 where the completion begins with ``<think>``, has it once, and closes it (TRL's ``think_format_reward``)."""
    rewards = []
    for text in _whole(prompts, completions, rendered_prompts):
        rewards.append(float(text.startswith("<think>") and text.count("<think>") == 1 and "</think>" in text))
    return rewards
