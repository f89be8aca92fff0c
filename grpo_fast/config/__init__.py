"""The configuration of a run: its fields, and the checks that every configuration passes."""

from grpo_fast.config.checks import LARGEST_REWARD, UNCENTRED
from grpo_fast.config.fields import FREE_FIELDS, TRL_FIELDS_INSTEAD, GRPOConfig

__all__ = ["FREE_FIELDS", "LARGEST_REWARD", "TRL_FIELDS_INSTEAD", "UNCENTRED", "GRPOConfig"]
