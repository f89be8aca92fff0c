"""Sampling completions: one small protocol, one file a backend."""

from grpo_fast.rollout.base import Response, Rollout, Sampling
from grpo_fast.rollout.transformers import TransformersRollout

__all__ = ["Response", "Rollout", "Sampling", "TransformersRollout"]
