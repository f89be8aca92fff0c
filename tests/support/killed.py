"""Killed runs, and rewards that draw random numbers."""

from __future__ import annotations

import random

import numpy
import pytest
import torch

from grpo_fast.trainer import GRPOTrainer

# Every generator that a checkpoint keeps influences the rewards, and so the gradients.
NOISE = (
    "import random\nimport numpy\nimport torch\n"
    "def noise(prompts, completions, **columns):\n"
    "    parts = lambda: (random.gauss(0, 1), numpy.random.normal(), torch.rand(()).item())\n"
    "    return [sum(parts()) for _ in prompts]\n"
)


class Killed(BaseException):
    """Like SIGKILL, nothing catches it."""


def killed_at(step: int, made: GRPOTrainer) -> None:
    """Train until `step` updates were made in this process, and die in the next one."""
    update, calls = made.update, []

    def count(*args, **kwargs):
        calls.append(args)
        if len(calls) > step:
            raise Killed
        return update(*args, **kwargs)

    made.update = count
    with pytest.raises(Killed):
        made.train()


def seed_generators(seed: int) -> None:
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)
