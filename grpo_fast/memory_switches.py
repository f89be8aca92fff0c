"""Which switches of the configuration save memory, how much each, and which of them make a run fit."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from grpo_fast.config import GRPOConfig
from grpo_fast.errors import UserError
from grpo_fast.memory_plan import MemoryPlan, longest_answer, plan_memory, total
from grpo_fast.memory_trace import Tracer


@dataclass(frozen=True)
class Switch:
    """What a change of the configuration buys: bytes in training and in sampling, and the longest answer with it."""

    name: str
    training: int
    rollout: int
    longest: int


def possible_changes(config: GRPOConfig, prompt_tokens: int) -> dict[str, dict[str, Any]]:
    """Changes that may save memory, by name; those that cost the least come first."""
    sequence = prompt_tokens + config.max_completion_length
    group = sequence * config.num_generations
    checkpointing = {"gradient_checkpointing": True}
    listed = {
        f"max_tokens_per_microbatch={sequence}": {"max_tokens_per_microbatch": sequence},
        f"max_tokens_per_generation_batch={group}": {"max_tokens_per_generation_batch": group},
        "gradient_checkpointing": checkpointing,
        "tiled_mlp": {"tiled_mlp": True},
        "activation_offloading": {**checkpointing, "activation_offloading": True},
        "max_buffer_mib=128": {"max_buffer_mib": 128},
        "dtype=bfloat16": {"dtype": "bfloat16", "bf16": False},
        "optim=adamw_torch_8bit": {"optim": "adamw_torch_8bit", "optim_offload": False},
        "optim_offload": {"optim": "adamw_torch_fused", "optim_offload": True},
        "use_peft": {"use_peft": True},
        "load_in_4bit (with use_peft)": {"use_peft": True, "load_in_4bit": True},
        "num_generations=4": {"num_generations": 4, "max_tokens_per_generation_batch": 4 * sequence},
    }
    impossible = []
    if config.use_cpu:
        impossible += ["optim_offload", "activation_offloading"]
    if config.dtype == "auto" or config.optim in ("adamw_8bit", "paged_adamw_8bit"):
        impossible += ["dtype=bfloat16"]
    if config.num_generations <= 4 or config.generation_batch_size % 4:
        impossible += ["num_generations=4"]
    return {
        name: changes
        for name, changes in listed.items()
        if name not in impossible and any(_lowers(config, field, value) for field, value in changes.items())
    }


def _allowed_changes(config: GRPOConfig, tracer: Tracer, prompt_tokens: int) -> dict[str, dict[str, Any]]:
    """Those of `possible_changes` that this model takes: not every MLP can be tiled, say."""
    allowed = {}
    for name, changes in possible_changes(config, prompt_tokens).items():
        try:
            plan_memory(replace(config, **changes), tracer.model_config, prompt_tokens, tracer)
        except UserError:
            continue
        allowed[name] = changes
    return allowed


def _lowers(config: GRPOConfig, field: str, value: Any) -> bool:
    now = getattr(config, field)
    return value < (now or math.inf) if field.startswith("max_") else now != value


def switches(config: GRPOConfig, tracer: Tracer, vram: int, prompt_tokens: int) -> list[Switch]:
    """Each change alone, in the order of what it saves; those that buy nothing are left out."""

    def measure(config: GRPOConfig) -> tuple[MemoryPlan, int]:
        return plan_memory(config, tracer.model_config, prompt_tokens, tracer), longest_answer(
            config, tracer, vram, prompt_tokens
        )

    now, longest = measure(config)
    found = []
    for name, changes in _allowed_changes(config, tracer, prompt_tokens).items():
        plan, answer = measure(replace(config, **changes))
        training = total(now.training) - total(plan.training)
        found.append((now.peak - plan.peak, Switch(name, training, total(now.rollout) - total(plan.rollout), answer)))
    useful = [entry for entry in found if max(*entry[:1], entry[1].training) > 0 or entry[1].longest > longest]
    useful.sort(key=lambda entry: (-entry[0], -entry[1].longest, -entry[1].training))
    return [switch for _, switch in useful]


def smallest_remedy(config: GRPOConfig, tracer: Tracer, vram: int, prompt_tokens: int) -> list[str] | None:
    """Names of the fewest changes with which the plan fits; None where not even all of them suffice."""
    changes = _allowed_changes(config, tracer, prompt_tokens)

    def fits(names: Iterable[str]) -> bool:
        changed = _with(config, [changes[name] for name in names])
        return plan_memory(changed, tracer.model_config, prompt_tokens, tracer).fits(vram)

    if not fits(changes):
        return None
    sizes = range(1, len(changes) + 1)
    return next((list(names) for size in sizes for names in combinations(changes, size) if fits(names)), None)


def longest_with_all(config: GRPOConfig, tracer: Tracer, vram: int, prompt_tokens: int) -> tuple[int, list[str]]:
    """The longest answer, in tokens, with all changes together, and their names."""
    changes = _allowed_changes(config, tracer, prompt_tokens)
    return longest_answer(_with(config, list(changes.values())), tracer, vram, prompt_tokens), list(changes)


def _with(config: GRPOConfig, changes: list[dict[str, Any]]) -> GRPOConfig:
    merged: dict[str, Any] = {}
    for fields in changes:
        for field, value in fields.items():
            merged[field] = min(value, merged.get(field, value)) if field.startswith("max_") else value
    return replace(config, **merged)
