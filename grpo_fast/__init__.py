"""GRPO for long chain-of-thought on limited VRAM, built on `grpo_kernels`.

`grpo-fast train CONFIG.yaml` is the command line; in Python,

    from grpo_fast.config import GRPOConfig
    from grpo_fast.trainer import GRPOTrainer
    GRPOTrainer(GRPOConfig(...)).train()
"""

__version__ = "0.1.0"
