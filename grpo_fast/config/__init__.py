"""The configuration of a run: its fields, and the checks that every configuration passes."""

from grpo_fast.config.checks import (
    ESTIMATOR_NAMES,
    LARGEST_REWARD,
    SELECTIVE_ESTIMATORS,
    UNCENTRED,
    check_complete,
    check_repeatable,
    ignored_settings,
)
from grpo_fast.config.distill import DistillConfig
from grpo_fast.config.fields import FREE_FIELDS, GRPOConfig
from grpo_fast.config.sft import SFTConfig
from grpo_fast.config.sizes import UNSET, steps_of_epochs
from grpo_fast.config.trl import TRL_FIELDS_INSTEAD, name_unknown

__all__ = [
    "ESTIMATOR_NAMES",
    "FREE_FIELDS",
    "LARGEST_REWARD",
    "SELECTIVE_ESTIMATORS",
    "TRL_FIELDS_INSTEAD",
    "UNCENTRED",
    "UNSET",
    "DistillConfig",
    "GRPOConfig",
    "SFTConfig",
    "check_complete",
    "check_repeatable",
    "ignored_settings",
    "name_unknown",
    "steps_of_epochs",
]
