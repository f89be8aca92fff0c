"""`FusedPolicy` under the name of earlier versions."""

from grpo_fast.model.policy import FusedPolicy

__all__ = ["FusedPolicy"]
