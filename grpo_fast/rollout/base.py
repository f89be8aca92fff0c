"""What every sampling backend takes and gives."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, Protocol

from torch import nn

from grpo_fast.config import GRPOConfig


@dataclass(frozen=True)
class Sampling:
    """How completions are sampled: `num_generations` for each prompt, at most `max_completion_length` tokens each.

    A temperature of 0 takes the likeliest token. An engine with generators of its own takes them from `seed`; None
    draws one from torch's.
    """

    num_generations: int
    max_completion_length: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float | None = None
    generation_kwargs: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None

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

    def one_token(self) -> Sampling:
        """The same for a single token of a single completion, to try it out."""
        filters = {name: value for name, value in self.generation_kwargs.items() if name != "min_new_tokens"}
        return replace(self, num_generations=1, max_completion_length=1, generation_kwargs=filters, seed=self.seed or 0)


class Response(NamedTuple):
    """A completion's tokens, its end-of-text token included, and whether it ended by itself or was cut off.

    `logprobs` are those of the distribution that each token was drawn from, after the temperature and every filter.
    """

    token_ids: list[int]
    finish_reason: Literal["stop", "length"]
    logprobs: list[float] | None = None


def eos_token_ids(model: nn.Module, tokenizer: Any) -> set[int]:
    """The tokens that end a completion: the tokenizer's, and those of the model's generation_config."""
    eos = model.generation_config.eos_token_id
    return {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}


class Rollout(Protocol):
    """A sampling engine. One that subclasses it need only define what is not "nothing to do".

    Attributes:
        copies_weights: it samples from weights of its own, which `sync` renews.
        separate: it has a process, or a machine, of its own, so that it can sample beside an update.
        warning: what a user should know about the way it samples this model; a run says it once.
    """

    copies_weights: bool = False
    separate: bool = False
    warning: str = ""

    def check(self, prompt_ids: list[int], sampling: Sampling) -> None:
        """Sample one token, so that what cannot work fails before anything long begins.

        Raises:
            UserError: the sampling arguments are refused, or the engine does not answer.
        """
        ...

    def generate(self, prompt_ids: list[list[int]], sampling: Sampling) -> list[Response]:
        """Responses to every prompt, those of a prompt side by side, in the order of the prompts."""
        ...

    def sync(self, model: nn.Module) -> None:
        """Sample from the weights of `model` (a transformers causal LM, or its PeftModel) from now on."""
        ...

    def sleep(self) -> None:
        """Give memory back while the policy is trained."""
        ...

    def wake(self) -> None:
        """Take the memory again; called before `sync` and `generate`."""
        ...

    def close(self) -> None:
        """End the engine; nothing is sampled after it."""
        ...
