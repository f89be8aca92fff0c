"""Adaptive entropy control: the weight of the entropy bonus follows the measured entropy (Skywork-OR1, 2505.22312).

With ``e`` the mean entropy of the last update's tokens, as in TRL's `use_adaptive_entropy`:

    coefficient of the next update   c + delta if e <= target, else c - delta, from `entropy_coef_min` to `..._max`
    bonus of the next update         that coefficient if e <= target, else none; none in the first update
"""

from __future__ import annotations

import dataclasses

from grpo_fast.config import GRPOConfig
from grpo_fast.train.checkpoint import TrainerState
from grpo_kernels import PolicyObjective


def with_bonus(objective: PolicyObjective, config: GRPOConfig, state: TrainerState) -> PolicyObjective:
    """`objective` with the entropy bonus of the next update."""
    if not config.use_adaptive_entropy:
        return objective
    low = state.entropy is not None and state.entropy <= config.entropy_target
    return dataclasses.replace(objective, entropy_coef=coefficient(config, state) if low else 0.0)


def coefficient(config: GRPOConfig, state: TrainerState) -> float:
    return config.entropy_coef if state.entropy_coef is None else state.entropy_coef


def observe(config: GRPOConfig, state: TrainerState, metrics: dict[str, float]) -> dict[str, float]:
    """Adapt the coefficient in `state` to the entropy of an update; returns it as a metric."""
    if not config.use_adaptive_entropy or "entropy" not in metrics:
        return {}
    state.entropy = metrics["entropy"]
    change = config.entropy_coef_delta if state.entropy <= config.entropy_target else -config.entropy_coef_delta
    moved = coefficient(config, state) + change
    state.entropy_coef = min(max(moved, config.entropy_coef_min), config.entropy_coef_max)
    return {"entropy_coef": state.entropy_coef}
