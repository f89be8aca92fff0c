"""Rewards for a completion's format and length, whatever its answer.

Format rewards are 1 if a completion has the format that the prompt asks for, else 0; if the prompt ends in ``<think>``,
by itself or through the chat template, the completion is read as if it began with that tag. Length rewards count tokens
and take arguments: ``kimi_length(math_answer)``, ``soft_overlong(4096, 819)``.
"""

from __future__ import annotations

import re
from collections import defaultdict

from grpo_fast.errors import UserError
from grpo_fast.rewards.base import RewardFunction, text_of

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


def kimi_length(judge: str) -> RewardFunction:
    """Reward short completions if they are right; punish long ones, also if they are wrong.

    With the lengths in the group, ``x = 0.5 - (length - min) / (max - min)``, or 0 if all are equal. The reward is x
    for a right completion and ``min(0, x)`` for a wrong one (Kimi k1.5, arXiv 2501.12599, section 2.3.3).

    Args:
        judge: the run's reward function that tells what is right, by a value of 1 or more. If it returns None, so does
            this function.
    """

    def length_reward(prompts, completions, completion_ids, correct, groups, **columns) -> list[float | None]:
        lengths = defaultdict(list)
        for group, ids in zip(groups, completion_ids, strict=True):
            lengths[group].append(len(ids))
        rewards: list[float | None] = []
        for group, ids, right in zip(groups, completion_ids, correct, strict=True):
            shortest, spread = min(lengths[group]), max(lengths[group]) - min(lengths[group])
            x = 0.5 - (len(ids) - shortest) / spread if spread else 0.0
            rewards.append(None if right is None else x if right else min(0.0, x))
        return rewards

    length_reward.judge = judge
    return length_reward


def soft_overlong(max_completion_len: int, soft_punish_cache: int) -> RewardFunction:
    """A penalty that grows from 0 to -1 over the last `soft_punish_cache` tokens before `max_completion_len`.

    DAPO's soft overlong punishment (arXiv 2503.14476, equation 13), with the arguments of TRL's
    ``get_soft_overlong_punishment``.
    """
    if not 0 < soft_punish_cache <= max_completion_len:
        raise UserError(
            f"soft_overlong({max_completion_len}, {soft_punish_cache}) is not allowed: the second number, the tokens "
            "over which the penalty grows, must be from 1 to the first, the longest completion"
        )

    def overlong_reward(prompts, completions, completion_ids, **columns) -> list[float]:
        left = [max_completion_len - soft_punish_cache - len(ids) for ids in completion_ids]
        return [min(max(tokens / soft_punish_cache, -1.0), 0.0) for tokens in left]

    return overlong_reward
