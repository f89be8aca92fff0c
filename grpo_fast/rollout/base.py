"""What every sampling backend takes and gives."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

from grpo_fast.config import GRPOConfig


@dataclass(frozen=True)
class Sampling:
    """How completions are sampled: `num_generations` for each prompt, at most `max_completion_length` tokens each.

    A temperature of 0 takes the likeliest token.
    """

    num_generations: int
    max_completion_length: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float | None = None
    generation_kwargs: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_config(cls, config: GRPOConfig, num_generations: int) -> Sampling:
        return cls(
            num_generations=num_generations,
            max_completion_length=config.max_completion_length,
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            min_p=config.min_p,
            generation_kwargs=config.generation_kwargs or {},
        )


class Response(NamedTuple):
    """A completion's tokens, its end-of-text token included, and whether it ended by itself or was cut off."""

    token_ids: list[int]
    finish_reason: Literal["stop", "length"]


class Rollout(Protocol):
    def generate(self, prompt_ids: list[list[int]], sampling: Sampling) -> list[Response]:
        """Responses to every prompt, those of a prompt side by side, in the order of the prompts."""
        ...
