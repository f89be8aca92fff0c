"""Reward functions, with TRL's signature ``f(prompts, completions, **columns) -> list[float | None]``.

Prompts and completions are strings, or lists of chat messages if the prompt is a chat. `columns` are the dataset's
other columns, with one value per sample, and ``completion_ids``. A function with a parameter ``rendered_prompts``, or
with ``**columns``, also gets the prompts as text after the chat template, up to where the completions begin. A dataset
column with one of these names is not passed. None means that the function does not apply to a sample. A function may
be ``async``; one marked `isolated` runs in processes that can be killed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from grpo_fast.rewards.base import RewardFunction, isolated, text_of
from grpo_fast.rewards.calls import RESERVED_COLUMNS
from grpo_fast.rewards.functions.answers import (
    accuracy_reward,
    boxed_answer,
    exact_answer,
    final_number,
    gsm8k_answer,
    math_answer,
    parse_final_number,
)
from grpo_fast.rewards.functions.code import unit_tests
from grpo_fast.rewards.functions.format import (
    answer_format,
    format_regex,
    soft_answer_format,
    think_format,
)
from grpo_fast.rewards.functions.length import cosine_scaled, get_cosine_scaled_reward, kimi_length, soft_overlong
from grpo_fast.rewards.functions.tasks import countdown_equation, digits_included, digits_ordered
from grpo_fast.rewards.functions.text import language_consistency, repetition_penalty
from grpo_fast.rewards.registry import REWARDS, load_reward

# TRL's names.
think_format_reward = think_format
get_soft_overlong_punishment = soft_overlong
get_repetition_penalty_reward = repetition_penalty

if TYPE_CHECKING:
    from grpo_fast.rewards.engine import RewardModel, Rewards
    from grpo_fast.rewards.functions.reward_model import RewardClassifier, reward_model

__all__ = [
    "RESERVED_COLUMNS",
    "REWARDS",
    "RewardClassifier",
    "RewardFunction",
    "RewardModel",
    "Rewards",
    "accuracy_reward",
    "answer_format",
    "boxed_answer",
    "cosine_scaled",
    "countdown_equation",
    "digits_included",
    "digits_ordered",
    "exact_answer",
    "final_number",
    "format_regex",
    "get_cosine_scaled_reward",
    "get_repetition_penalty_reward",
    "get_soft_overlong_punishment",
    "gsm8k_answer",
    "isolated",
    "kimi_length",
    "language_consistency",
    "load_reward",
    "math_answer",
    "parse_final_number",
    "repetition_penalty",
    "reward_model",
    "soft_answer_format",
    "soft_overlong",
    "text_of",
    "think_format",
    "think_format_reward",
    "unit_tests",
]


# Where the names are that need torch, which worker processes do without.
_LATER = {
    "RewardModel": "engine",
    "Rewards": "engine",
    "RewardClassifier": "functions.reward_model",
    "reward_model": "functions.reward_model",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LATER[name]}"), name)
