"""Rewards for a completion's length in tokens. They take arguments, as in ``soft_overlong(4096, 819)``."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

from grpo_fast.errors import UserError
from grpo_fast.rewards.base import RewardFunction, text_of
from grpo_fast.rewards.functions.answers import same_answer


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

    def soft_overlong_punishment_reward(prompts, completions, completion_ids, **columns) -> list[float]:
        left = [max_completion_len - soft_punish_cache - len(ids) for ids in completion_ids]
        return [min(max(tokens / soft_punish_cache, -1.0), 0.0) for tokens in left]

    return soft_overlong_punishment_reward


def cosine_scaled(
    judge: str,
    max_len: int,
    min_value_wrong: float = -1.0,
    max_value_wrong: float = -0.5,
    min_value_correct: float = 0.5,
    max_value_correct: float = 1.0,
) -> RewardFunction:
    """A reward for right and wrong completions that follows half a cosine from no tokens to `max_len`.

    A right completion gets `max_value_correct` if it is short and `min_value_correct` at `max_len` or beyond; a wrong
    one `min_value_wrong` if it is short and `max_value_wrong` if it is long, so that thinking longer about a hard
    question pays (arXiv 2502.03373, appendix C.1, without its penalty for completions that reach the limit).

    Args:
        judge: the run's reward function that tells what is right, by a value of 1 or more. If it returns None, so does
            this function.

    Raises:
        UserError: `max_len` is below 1.
    """
    bounds = {True: (max_value_correct, min_value_correct), False: (min_value_wrong, max_value_wrong)}
    _check_longest("cosine_scaled", max_len)

    def cosine_scaled_reward(prompts, completions, completion_ids, correct, groups, **columns) -> list[float | None]:
        return _along_cosine(correct, completion_ids, max_len, bounds)

    cosine_scaled_reward.judge = judge
    return cosine_scaled_reward


def get_cosine_scaled_reward(
    max_len: int,
    min_value_wrong: float = -1.0,
    max_value_wrong: float = -0.5,
    min_value_correct: float = 0.5,
    max_value_correct: float = 1.0,
) -> RewardFunction:
    """TRL's function of that name: :func:`cosine_scaled`, which judges the completion by the column ``solution``.

    Completions are compared as in :func:`accuracy_reward`, but not in worker processes: prefer ``cosine_scaled`` with
    ``accuracy_reward`` or ``math_answer`` as its judge where an answer may take long to parse.
    """
    bounds = {True: (max_value_correct, min_value_correct), False: (min_value_wrong, max_value_wrong)}
    _check_longest("get_cosine_scaled_reward", max_len)

    def cosine_scaled_reward(prompts, completions, completion_ids, solution, **columns) -> list[float | None]:
        pairs = zip(completions, solution, strict=True)
        correct = [None if s is None else same_answer(text_of(c), str(s)) for c, s in pairs]
        return _along_cosine(correct, completion_ids, max_len, bounds)

    return cosine_scaled_reward


def _check_longest(name: str, max_len: int) -> None:
    if max_len < 1:
        raise UserError(f"{name}: max_len={max_len} is not allowed: it must be at least 1, in tokens")


def _along_cosine(
    correct: Sequence[bool | None], completion_ids: Sequence[list], max_len: int, bounds: dict[bool, tuple]
) -> list[float | None]:
    """Rewards between a right or wrong completion's `bounds`: the first of no tokens, the second from `max_len` on."""
    rewards: list[float | None] = []
    for right, ids in zip(correct, completion_ids, strict=True):
        share = (1 + math.cos(math.pi * min(len(ids) / max_len, 1.0))) / 2
        rewards.append(None if right is None else bounds[right][1] + (bounds[right][0] - bounds[right][1]) * share)
    return rewards
