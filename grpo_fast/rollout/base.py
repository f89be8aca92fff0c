"""The interface of a sampling engine: what it takes and what it returns."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

from torch import nn

from grpo_fast.config import GRPOConfig
from grpo_fast.errors import UserError, nearest
from grpo_kernels import Support


@dataclass(frozen=True)
class Sampling:
    """How to sample: `num_generations` completions of each prompt, of at most `max_completion_length` tokens.

    A temperature of 0 takes the most likely token. Engines with their own random generators seed them with `seed`, or
    with a number drawn from torch's default generator if it is None. After `thinking_budget` tokens within
    ``<think>``, the thinking is closed (see `rollout.thinking`). With `keeps_support`, responses say which tokens the
    filters kept.
    """

    num_generations: int
    max_completion_length: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float | None = None
    generation_kwargs: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None
    thinking_budget: int | None = None
    keeps_support: bool = False

    @classmethod
    def from_config(cls, config: GRPOConfig, num_generations: int) -> Sampling:
        names = ("max_completion_length", "temperature", "top_p", "top_k", "min_p", "thinking_budget")
        given = {name: getattr(config, name) for name in names}
        return cls(num_generations, **given, generation_kwargs=config.generation_kwargs or {})

    def one_token(self) -> Sampling:
        """The same sampling for one completion of one token, as a test of the engine."""
        filters = {name: value for name, value in self.generation_kwargs.items() if name != "min_new_tokens"}
        return replace(self, num_generations=1, max_completion_length=1, generation_kwargs=filters, seed=self.seed or 0)

    def check_generation_kwargs(self, allowed: Iterable[str], engine: str = "") -> None:
        """Refuse `generation_kwargs` that are not `allowed`, a `min_new_tokens` out of range, and an empty `stop`.

        Args:
            engine: follows "is not allowed" in the message, such as " with vLLM".

        Raises:
            UserError: it names the value and what is allowed.
        """
        for name in self.generation_kwargs:
            if name not in allowed:
                raise UserError(
                    f"generation_kwargs: {name!r} is not allowed{engine}{nearest(name, allowed)}; allowed are "
                    f"{', '.join(allowed)}; temperature, top_p, top_k and min_p are fields of the configuration"
                )
        shortest, longest = self.generation_kwargs.get("min_new_tokens", 0), self.max_completion_length
        if not isinstance(shortest, int) or not 0 <= shortest <= longest:
            raise UserError(
                f"generation_kwargs: min_new_tokens={shortest!r} is not allowed: it must be from 0 to {longest}"
            )
        stop = self.generation_kwargs.get("stop", "text")
        texts = [stop] if isinstance(stop, str) else stop
        if not isinstance(texts, list | tuple) or not texts or not all(isinstance(t, str) and t for t in texts):
            raise UserError(f"generation_kwargs: stop={stop!r} is not allowed: it must be a text or texts, none empty")

    @property
    def filters(self) -> dict[str, Any]:
        """`generation_kwargs` without ``stop``: what changes the sampled distribution."""
        return {name: value for name, value in self.generation_kwargs.items() if name != "stop"}

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """The texts that end a completion; those that end within the first `min_new_tokens` tokens do not count."""
        stop = self.generation_kwargs.get("stop", ())
        return (stop,) if isinstance(stop, str) else tuple(stop)


class Response(NamedTuple):
    """A completion's tokens, and whether it stopped at an end-of-text token or a stop text or reached the length limit.

    The end-of-text token, or the one that completes the stop text, is the last of the tokens.

    `logprobs` are log-probabilities of the tokens under the sampled distribution: after temperature and filters.
    `past` is set where a stop text ended the completion: how many characters its last token has after that text.
    `mask` is False where a token was not sampled but forced, to close the thinking; None if all were sampled.
    `support` holds the ids that the filters kept for each token (itself where it was forced), if they were asked for.
    `versions` are those of the weights that sampled each token (with `max_staleness`): how many syncs came before.
    """

    token_ids: list[int]
    finish_reason: Literal["stop", "length"]
    logprobs: list[float] | None = None
    past: int | None = None
    mask: list[bool] | None = None
    support: Support | None = None
    versions: list[int] | None = None

    @property
    def ended(self) -> bool:
        """Whether the last token is an end-of-text token, which is no part of the text."""
        return self.finish_reason == "stop" and self.past is None


def eos_token_ids(model: nn.Module, tokenizer: Any) -> set[int]:
    """The tokens that end a completion: the tokenizer's, and those of the model's generation_config."""
    eos = model.generation_config.eos_token_id
    return {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}


class Rollout:
    """A sampling engine. Only `generate` must be defined; the other methods default to what an engine on the policy's
    own weights needs.

    Attributes:
        copies_weights: it samples from a copy of the weights, which `sync` updates.
        separate: it runs in another process or on another machine, so it can sample during an update.
        warning: what a user should know about how this model is sampled; a run prints it once.
    """

    copies_weights: bool = False
    separate: bool = False
    warning: str = ""

    def check(self, prompt_ids: list[int], sampling: Sampling) -> None:
        """Sample one token, so that wrong arguments and broken engines fail before any long work.

        Raises:
            UserError: the sampling arguments are refused, or the engine does not answer.
        """
        self.generate([prompt_ids], sampling.one_token())

    def generate(self, prompt_ids: list[list[int]], sampling: Sampling) -> list[Response]:
        """`num_generations` consecutive responses for every prompt, in the order of the prompts."""
        raise NotImplementedError

    def sync(self, model: nn.Module) -> None:
        """Sample from the weights of `model` (a transformers causal LM, or its PeftModel) from now on."""

    def take_figures(self) -> dict[str, float]:
        """Metrics of what was sampled since the last call, by name."""
        return {}

    def sleep(self) -> None:
        """Release memory while the policy is trained."""

    def wake(self) -> None:
        """Reacquire the memory; called before `sync` and `generate`."""

    def close(self) -> None:
        """End the engine; nothing is sampled afterwards."""
