"""GRPO for long chain-of-thought on limited VRAM, built on `grpo_kernels`.

`grpo-fast train CONFIG.yaml` is the command line; in Python,

    from grpo_fast import GRPOConfig, GRPOTrainer
    GRPOTrainer(GRPOConfig(...)).train()
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grpo_fast.config import DistillConfig, GRPOConfig, SFTConfig
    from grpo_fast.distillation import DistillationTrainer
    from grpo_fast.integrations import cs336
    from grpo_fast.model.policy import FusedPolicy
    from grpo_fast.sft.trainer import SFTTrainer
    from grpo_fast.trainer import GRPOTrainer
    from grpo_kernels import __version__

__all__ = [
    "DistillConfig",
    "DistillationTrainer",
    "FusedPolicy",
    "GRPOConfig",
    "GRPOTrainer",
    "SFTConfig",
    "SFTTrainer",
    "__version__",
    "cs336",
]

# Imported when they are asked for: reward workers import parts of this package and must not load torch.
_HOMES = {
    "DistillConfig": "grpo_fast.config",
    "DistillationTrainer": "grpo_fast.distillation",
    "FusedPolicy": "grpo_fast.model.policy",
    "GRPOConfig": "grpo_fast.config",
    "GRPOTrainer": "grpo_fast.trainer",
    "SFTConfig": "grpo_fast.config",
    "SFTTrainer": "grpo_fast.sft.trainer",
    "cs336": "grpo_fast.integrations.cs336",
    "__version__": "grpo_kernels",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    home = importlib.import_module(_HOMES[name])
    return home if name == "cs336" else getattr(home, name)


def __dir__() -> list[str]:
    return __all__
