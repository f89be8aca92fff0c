"""TRL's ways to set the size of a batch and the length of a run, in this trainer's own terms.

A generation batch has ``per_device_train_batch_size x processes x steps_per_generation`` completions; an optimizer step
takes ``per_device_train_batch_size x processes x gradient_accumulation_steps`` of them.
"""

from __future__ import annotations

import math
import os
from typing import Any

from grpo_fast.errors import UserError, shown

# The value of max_steps and generation_batch_size where other fields decide; TRL's default of max_steps.
UNSET = -1
DEFAULT_STEPS, DEFAULT_COMPLETIONS = 100, 64
# TRL's default of per_device_train_batch_size, which holds if only the other two fields are set.
PER_DEVICE = 8
_PARTS = ("per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation")


def processes() -> int:
    """How many processes `torchrun` or `accelerate launch` has started."""
    return int(os.environ.get("WORLD_SIZE", 1))


def uses_trl_sizes(config: Any) -> bool:
    """Whether a `GRPOConfig` sets one of the fields with which TRL computes its batches."""
    return any(getattr(config, name) is not None for name in _PARTS)


def resolve_sizes(config: Any) -> None:
    """Set `generation_batch_size` and `max_steps` of a `GRPOConfig` as far as its other fields decide them.

    Raises:
        UserError: the fields contradict each other, or do not divide each other; says what must divide what.
    """
    if config.max_steps == UNSET and config.num_train_epochs is None:
        config.max_steps = DEFAULT_STEPS
    if not uses_trl_sizes(config):
        if config.generation_batch_size == UNSET:
            config.generation_batch_size = DEFAULT_COMPLETIONS
        return
    for name in _PARTS:
        value = getattr(config, name)
        if value is not None and not 1 <= value <= 2**31:
            raise UserError(f"{name}={shown(value)} is not allowed: it must be at least 1")
    step, accumulated = completions_per_step(config), config.gradient_accumulation_steps or 1
    per_batch = config.steps_per_generation
    size = step // accumulated * (per_batch or accumulated)
    if config.generation_batch_size == UNSET:
        config.generation_batch_size = size
    elif per_batch is not None and config.generation_batch_size != size:
        raise UserError(
            f"generation_batch_size={shown(config.generation_batch_size)} contradicts {_product(config, per_batch)} = "
            f"{size} completions; leave generation_batch_size or steps_per_generation out"
        )
    if config.generation_batch_size % step:
        raise UserError(
            f"a generation batch of {shown(config.generation_batch_size)} completions cannot be divided into optimizer "
            f"steps of {_product(config, accumulated, 'gradient_accumulation_steps')} = {step} completions; set "
            "steps_per_generation to a multiple of gradient_accumulation_steps"
        )
    if config.num_generations > 0 and config.generation_batch_size % config.num_generations:
        field = "gradient_accumulation_steps" if per_batch is None else "steps_per_generation"
        needed = config.num_generations // math.gcd(config.num_generations, step // accumulated)
        value = needed * math.ceil((per_batch or accumulated) / needed)
        raise UserError(
            f"num_generations={config.num_generations} must divide the completions of a generation batch, "
            f"{_product(config, per_batch or accumulated, field)} = {size}; {field}={value} would do"
        )


def completions_per_step(config: Any) -> int:
    """The completions of one optimizer step, over all processes; without TRL's fields, all of a generation batch."""
    if not uses_trl_sizes(config):
        return config.generation_batch_size
    per_device = config.per_device_train_batch_size or PER_DEVICE
    return per_device * processes() * (config.gradient_accumulation_steps or 1)


def steps_of_epochs(config: Any, rows: int) -> int:
    """The optimizer steps of `num_train_epochs` over so many training rows, as in TRL.

    As there, the rows that do not fill a last generation batch are left out of an epoch; a set of rows that fills none
    counts as one.
    """
    batches = max(rows // config.prompts_per_step, 1)
    return math.ceil(config.num_train_epochs * batches * config.updates_per_batch)


def _product(config: Any, steps: int, field: str = "steps_per_generation") -> str:
    per_device, count = config.per_device_train_batch_size or PER_DEVICE, processes()
    return f"per_device_train_batch_size={per_device} x {field}={steps} x {count} process{'es' if count > 1 else ''}"
