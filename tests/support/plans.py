"""Configurations and models for tests of memory plans."""

from pathlib import Path

from transformers import AutoConfig, Qwen3Config

from grpo_fast.config import GRPOConfig
from support.tiny import SMALL

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests" / "data"


def settings(**fields) -> GRPOConfig:
    return GRPOConfig(**{"model_name_or_path": "m", "dataset_name": "d", "reward_funcs": ["r"], **fields})


def medium(**fields) -> Qwen3Config:
    """A model whose head and layers both contribute visibly to the peak."""
    sizes = {"hidden_size": 128, "intermediate_size": 384, "head_dim": 32, "num_hidden_layers": 6, "vocab_size": 8192}
    sizes["num_key_value_heads"] = 1
    return Qwen3Config(**{**SMALL, **sizes, "max_position_embeddings": 4096, **fields})


def read_config(name: str, **fields):
    return AutoConfig.from_pretrained(DATA / f"{name}.json", **fields)
