"""Reward functions, with TRL's signature ``f(prompts, completions, **columns) -> list[float | None]``.

Prompts and completions are strings, or lists of chat messages if the prompt is a chat. `columns` are the dataset's
other columns, with one value per sample, and ``completion_ids``. A function with a parameter ``rendered_prompts``, or
with ``**columns``, also gets the prompts as text after the chat template, up to where the completions begin. A dataset
column with one of these names is not passed. None means that the function does not apply to a sample. A function may
be ``async``; one marked `isolated` runs in processes that can be killed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from grpo_fast.rewards.base import RewardFunction, isolated, text_of
from grpo_fast.rewards.calls import RESERVED_COLUMNS
from grpo_fast.rewards.functions.answers import (
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
    kimi_length,
    soft_answer_format,
    soft_overlong,
    think_format,
)
from grpo_fast.rewards.functions.tasks import countdown_equation, digits_included, digits_ordered
from grpo_fast.rewards.registry import REWARDS, load_reward

if TYPE_CHECKING:
    from grpo_fast.rewards.engine import RewardModel, Rewards

__all__ = [
    "RESERVED_COLUMNS",
    "REWARDS",
    "RewardFunction",
    "RewardModel",
    "Rewards",
    "answer_format",
    "boxed_answer",
    "countdown_equation",
    "digits_included",
    "digits_ordered",
    "exact_answer",
    "final_number",
    "gsm8k_answer",
    "isolated",
    "kimi_length",
    "load_reward",
    "math_answer",
    "parse_final_number",
    "soft_answer_format",
    "soft_overlong",
    "text_of",
    "think_format",
    "unit_tests",
]


def __getattr__(name: str) -> Any:
    # The engine imports torch, which worker processes do not need.
    if name not in ("RewardModel", "Rewards"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from grpo_fast.rewards import engine

    return getattr(engine, name)
