"""Which settings save memory, how much each saves, and which of them make a run fit.

A "switch" is a change of a few fields that saves memory (`possible_changes`). `switches` measures each one alone;
`smallest_remedy` and `shorter_remedy` search for the fewest that make the plan fit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, NamedTuple

from grpo_fast.config import GRPOConfig
from grpo_fast.errors import UserError
from grpo_fast.memory.plan import longest_answer, plan_memory, total
from grpo_fast.memory.trace import Setup, Traced, Tracer

Changes = dict[str, Any]


@dataclass(frozen=True)
class Switch:
    """What one change saves: bytes in training and in sampling, and the longest completion (tokens) with it."""

    name: str
    training: int
    rollout: int
    longest: int


class Remedy(NamedTuple):
    """A configuration that fits, and the names of the changes that it took."""

    names: list[str]
    config: GRPOConfig


class Untraced(Tracer):
    """A tracer that counts no activations, for quick lower bounds."""

    def __init__(self, tracer: Tracer):
        super().__init__(tracer.model_config)
        self.models, self.counted = tracer.models, tracer.counted

    def trace(self, setup: Setup) -> Traced:
        return Traced({}, {})


def possible_changes(config: GRPOConfig, prompt_tokens: int) -> dict[str, Changes]:
    """Changes that can save memory, the cheapest first, under names that list every field that they change."""
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
    for size in (4, 2):
        if size < config.num_generations and config.generation_batch_size % size == 0:
            listed.append({"num_generations": size, "max_tokens_per_generation_batch": size * sequence})
    impossible = {"optim_offload", "activation_offloading"} if config.use_cpu else set()
    if config.dtype == "auto" or config.optim in ("adamw_8bit", "paged_adamw_8bit"):
        impossible.add("dtype")
    found = {}
    for changes in listed:
        first = next(iter(changes))
        different = {field: value for field, value in changes.items() if _differs(config, field, value)}
        if first in different and first not in impossible:
            # Other fields stay in the change even if they do not differ: nothing combined with it may reset them.
            found[_name(different)] = {f: v for f, v in changes.items() if f in different or not f.startswith("max_")}
    return found


def _differs(config: GRPOConfig, field: str, value: Any) -> bool:
    """Whether `value` is another value than the configuration's, or a smaller one for a limit."""
    now = getattr(config, field)
    return value < (now or math.inf) if field.startswith("max_") else now != value


def _name(changes: Changes) -> str:
    """``activation_offloading (with gradient_checkpointing)``, ``dtype=bfloat16``."""
    first, *others = (
        field if value is True else f"{field}={str(value).lower() if value is False else value}"
        for field, value in changes.items()
    )
    return f"{first} (with {', '.join(others)})" if others else first


def merged(changes: Iterable[Changes]) -> Changes | None:
    """The fields of all `changes`, with the lowest value of each limit; None if two changes contradict each other."""
    together: Changes = {}
    for fields in changes:
        for field, value in fields.items():
            if field.startswith("max_"):
                together[field] = min(value, together.get(field, value))
            elif together.setdefault(field, value) != value:
                return None
    return together


def switches(config: GRPOConfig, tracer: Tracer, vram: int, prompt_tokens: int) -> list[Switch]:
    """Each change by itself, the largest saving first; changes that save nothing or do not suit the model are left out.

    Raises:
        UserError: the model cannot be built or traced.
    """

    def measure(config: GRPOConfig) -> tuple[int, int, int, int]:
        plan = plan_memory(config, tracer.model_config, prompt_tokens, tracer)
        longest = longest_answer(config, tracer, vram, prompt_tokens)
        return plan.peak, total(plan.training), total(plan.rollout), longest

    peak, training, rollout, longest = measure(config)
    useful = []
    for name, changes in possible_changes(config, prompt_tokens).items():
        try:
            now = measure(replace(config, **changes))
        except UserError:
            # Not every MLP can be tiled, for example.
            continue
        if now[0] < peak or now[1] < training or now[3] > longest:
            useful.append((peak - now[0], Switch(name, training - now[1], rollout - now[2], now[3])))
    useful.sort(key=lambda entry: (-entry[0], -entry[1].longest, -entry[1].training))
    return [switch for _, switch in useful]


def smallest_remedy(config: GRPOConfig, tracer: Tracer, vram: int, prompt_tokens: int) -> Remedy | None:
    """The fewest changes with which the plan fits, the cheapest of equally many; None if no combination fits."""
    untraced = Untraced(tracer)

    def fits(remedy: Remedy) -> bool:
        # A plan that is too large without activations need not be traced.
        plans = (plan_memory(remedy.config, tracer.model_config, prompt_tokens, each) for each in (untraced, tracer))
        try:
            return all(plan.fits(vram) for plan in plans)
        except UserError:
            return False

    return next(filter(fits, _combinations(config, possible_changes(config, prompt_tokens))), None)


def _combinations(config: GRPOConfig, changes: dict[str, Changes]) -> Iterator[Remedy]:
    """The distinct allowed results of combining `changes`, the fewest changes first."""
    known = set()
    for size in range(1, len(changes) + 1):
        for names in combinations(changes, size):
            together = merged(changes[name] for name in names)
            if together is None or (key := frozenset(together.items())) in known:
                continue
            known.add(key)
            try:
                yield Remedy(list(names), replace(config, **together))
            except UserError:
                continue


def shorter_remedy(config: GRPOConfig, tracer: Tracer, vram: int, prompt_tokens: int) -> Remedy | None:
    """The fewest changes that fit together with half, a quarter, ... of the completion length; None if none fits."""

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
