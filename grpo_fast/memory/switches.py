"""Which switches of the configuration save memory, how much each, and which of them make a run fit."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, NamedTuple

from grpo_fast.config import GRPOConfig
from grpo_fast.errors import UserError
from grpo_fast.memory.plan import MemoryPlan, longest_answer, plan_memory, total
from grpo_fast.memory.trace import Setup, Traced, Tracer

Changes = dict[str, Any]


@dataclass(frozen=True)
class Switch:
    """What a change of the configuration buys: bytes in training and in sampling, and the longest answer with it."""

    name: str
    training: int
    rollout: int
    longest: int


class Remedy(NamedTuple):
    """A configuration that fits, and the names of what was changed for it."""

    names: list[str]
    config: GRPOConfig


class Untraced(Tracer):
    """A tracer that leaves activations out, so that plans are quick lower bounds."""

    def __init__(self, tracer: Tracer):
        super().__init__(tracer.model_config)
        self.models, self.counted = tracer.models, tracer.counted

    def trace(self, setup: Setup) -> Traced:
        return Traced({}, {})


def possible_changes(config: GRPOConfig, prompt_tokens: int) -> dict[str, Changes]:
    """Changes that may save memory, by names that say all of them; those that cost the least come first."""
    sequence = prompt_tokens + config.max_completion_length
    listed = [
        {"max_tokens_per_microbatch": sequence},
        {"max_tokens_per_generation_batch": sequence * config.num_generations},
        {"gradient_checkpointing": True},
        {"tiled_mlp": True},
        {"activation_offloading": True, "gradient_checkpointing": True},
        {"max_buffer_mib": 128},
        {"dtype": "bfloat16", "bf16": False},
        {"optim": "adamw_torch_8bit", "optim_offload": False},
        {"optim_offload": True, "optim": "adamw_torch_fused"},
        {"use_peft": True},
        {"load_in_4bit": True, "use_peft": True},
    ]
    listed += [{"num_generations": n, "max_tokens_per_generation_batch": n * sequence} for n in (4, 2)]
    impossible = {"optim_offload", "activation_offloading"} if config.use_cpu else set()
    if config.dtype == "auto" or config.optim in ("adamw_8bit", "paged_adamw_8bit"):
        impossible.add("dtype")
    found = {}
    for changes in listed:
        first, value = next(iter(changes.items()))
        different = {field: value for field, value in changes.items() if _lowers(config, field, value)}
        if first == "num_generations" and (value >= config.num_generations or config.generation_batch_size % value):
            continue
        if first in different and first not in impossible:
            found[_name(different)] = changes
    return found


def _lowers(config: GRPOConfig, field: str, value: Any) -> bool:
    now = getattr(config, field)
    return value < (now or math.inf) if field.startswith("max_") else now != value


def _name(changes: Changes) -> str:
    """``activation_offloading (with gradient_checkpointing)``, ``dtype=bfloat16``."""
    first, *others = (
        field if value is True else f"{field}={str(value).lower() if value is False else value}"
        for field, value in changes.items()
    )
    return f"{first} (with {', '.join(others)})" if others else first


def merged(config: GRPOConfig, changes: Iterable[Changes]) -> Changes | None:
    """The fields of all `changes` together, of limits the lowest; None where two of them contradict each other."""
    together: Changes = {}
    for fields in changes:
        for field, value in fields.items():
            if field.startswith("max_"):
                together[field] = min(value, together.get(field, value), getattr(config, field) or value)
            elif together.setdefault(field, value) != value:
                return None
    return together


def _allowed_changes(config: GRPOConfig, tracer: Tracer, prompt_tokens: int) -> dict[str, Changes]:
    """Those of `possible_changes` that this model takes: not every MLP can be tiled, say."""
    allowed = {}
    for name, changes in possible_changes(config, prompt_tokens).items():
        try:
            plan_memory(replace(config, **merged(config, [changes])), tracer.model_config, prompt_tokens, tracer)
        except UserError:
            continue
        allowed[name] = changes
    return allowed


def switches(config: GRPOConfig, tracer: Tracer, vram: int, prompt_tokens: int) -> list[Switch]:
    """Each change alone, in the order of what it saves; those that buy nothing are left out."""

    def measure(config: GRPOConfig) -> tuple[MemoryPlan, int]:
        return plan_memory(config, tracer.model_config, prompt_tokens, tracer), longest_answer(
            config, tracer, vram, prompt_tokens
        )

    now, longest = measure(config)
    found = []
    for name, changes in _allowed_changes(config, tracer, prompt_tokens).items():
        plan, answer = measure(replace(config, **merged(config, [changes])))
        training = total(now.training) - total(plan.training)
        found.append((now.peak - plan.peak, Switch(name, training, total(now.rollout) - total(plan.rollout), answer)))
    useful = [entry for entry in found if max(*entry[:1], entry[1].training) > 0 or entry[1].longest > longest]
    useful.sort(key=lambda entry: (-entry[0], -entry[1].longest, -entry[1].training))
    return [switch for _, switch in useful]


def smallest_remedy(config: GRPOConfig, tracer: Tracer, vram: int, prompt_tokens: int) -> Remedy | None:
    """The fewest changes with which the plan fits, and of those the cheapest; None where no combination does."""
    untraced = Untraced(tracer)

    def fits(remedy: Remedy) -> bool:
        # What does not fit without its activations need not be traced.
        plans = (plan_memory(remedy.config, tracer.model_config, prompt_tokens, each) for each in (untraced, tracer))
        try:
            return all(plan.fits(vram) for plan in plans)
        except UserError:
            return False

    return next(filter(fits, _combinations(config, possible_changes(config, prompt_tokens))), None)


def _combinations(config: GRPOConfig, changes: dict[str, Changes]) -> Iterator[Remedy]:
    """All different results of `changes` together, the fewest of them first."""
    known = set()
    for size in range(1, len(changes) + 1):
        for names in combinations(changes, size):
            together = merged(config, (changes[name] for name in names))
            key = together and frozenset(together.items())
            if together is None or key in known:
                continue
            known.add(key)
            try:
                made = replace(config, **together)
            except UserError:
                continue
            yield Remedy(list(names), made)


def shorter_remedy(config: GRPOConfig, tracer: Tracer, vram: int, prompt_tokens: int) -> Remedy | None:
    """The fewest changes that fit together with a half, a quarter, ... of the longest completion; None for none."""

    def remedy(halvings: int) -> Remedy | None:
        answer = max(config.max_completion_length >> halvings, 1)
        found = smallest_remedy(replace(config, max_completion_length=answer), tracer, vram, prompt_tokens)
        return found and Remedy([f"max_completion_length={answer}", *found.names], found.config)

    low, high = 0, max(config.max_completion_length.bit_length() - 1, 1)
    found = remedy(high)
    while found and high - low > 1:
        middle = (low + high) // 2
        shorter = remedy(middle)
        low, high, found = (low, middle, shorter) if shorter else (middle, high, found)
    return found
