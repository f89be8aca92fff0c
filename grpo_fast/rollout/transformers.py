"""Sampling from the policy's own module, with transformers' logits processors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache, partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, LogitsProcessor, LogitsProcessorList, StoppingCriteriaList

from grpo_fast.distributed.rng import kept_torch_generators
from grpo_fast.errors import UserError, one_line
from grpo_fast.rollout.base import Response, Rollout, Sampling, eos_token_ids
from grpo_fast.rollout.decode import Decoder, left_padded, not_finite
from grpo_fast.rollout.rows import cache_argument, forward_arguments, plain_layers
from grpo_fast.rollout.speculative import Speculation, SpeculativeDecoder, check_speculation
from grpo_fast.rollout.stops import StopCriterion, StopTexts, ending, stop_texts
from grpo_fast.rollout.support import kept_ids
from grpo_fast.rollout.thinking import ForcedTokens, ThinkingBudget
from grpo_kernels import Support

# The allowed generation_kwargs besides ``stop``, which change the sampled distribution, and whether they depend on
# earlier tokens.
FILTERS = {
    "repetition_penalty": True,
    "no_repeat_ngram_size": True,
    "typical_p": False,
    "epsilon_cutoff": False,
    "eta_cutoff": False,
    "min_new_tokens": True,
    "bad_words_ids": True,
    "suppress_tokens": False,
    "begin_suppress_tokens": True,
}
ALLOWED = (*FILTERS, "stop")


class TransformersRollout(Rollout):
    """Samples with continuous batching (:class:`~grpo_fast.rollout.decode.Decoder`) if the model allows it.

    It does if all layers of its cache are full or sliding-window attention. Other models (state spaces, linear or
    chunked attention, and models with their own `prepare_inputs_for_generation`) are sampled with `generate`, in padded
    batches of prompts of similar length, each of which runs until its longest completion ends.

    Args:
        model: a transformers causal LM; sampling uses eval mode and restores the mode afterwards.
        tokenizer: its tokenizer, with a padding token.
        max_tokens: budget of cached tokens; with `generate`, of prompts and longest completions in one batch.
        speculative_tokens: most draft tokens for each sequence and step (see `rollout.speculative`); 0 for none.

    Raises:
        UserError: `speculative_tokens` are not possible with this model.
    """

    def __init__(self, model: nn.Module, tokenizer, max_tokens: int, speculative_tokens: int = 0):
        self.model, self.tokenizer, self.max_tokens = model, tokenizer, max_tokens
        self.speculation = None
        if speculative_tokens:
            check_speculation(model, speculative_tokens, not_continuous(model))
            self.speculation = Speculation(speculative_tokens)
        self.eos_token_ids = eos_token_ids(model, tokenizer)
        self.warning = padded_warning(model)

    @torch.no_grad()
    def generate(self, prompt_ids: list[list[int]], sampling: Sampling) -> list[Response]:
        training, own_config = self.model.training, self.model.generation_config
        self.model.eval()
        # Defaults that ship with a model, such as a repetition penalty, would make the sampled policy another one than
        # the trained policy.
        self.model.generation_config = GenerationConfig()
        try:
            config = self.generation_config(sampling)
            return (self._padded if not_continuous(self.model) else self._decode)(prompt_ids, sampling, config)
        finally:
            self.model.train(training)
            self.model.generation_config = own_config

    def _decode(self, prompt_ids: list[list[int]], sampling: Sampling, config: GenerationConfig) -> list[Response]:
        @cache
        def filters(prompt_length: int) -> LogitsProcessorList:
            """The logits processors that `generate` would apply after a prompt of this length."""
            ids = torch.zeros(1, prompt_length, dtype=torch.long, device=self.model.device)
            return self.model.generate(
                ids, attention_mask=torch.ones_like(ids), generation_config=config, custom_generate=processors
            )

        kind = Decoder if self.speculation is None else partial(SpeculativeDecoder, self.speculation)
        decoder = kind(
            self.model, self.max_tokens, sampling.max_completion_length, self.eos_token_ids, filters,
            any(FILTERS[name] for name in sampling.filters), sampling.temperature == 0,
            stop_texts(self.tokenizer, sampling), thinking_budget(self.tokenizer, sampling), sampling.keeps_support,
        )  # fmt: skip
        return decoder(prompt_ids, sampling.num_generations)

    def check(self, prompt_ids: list[int], sampling: Sampling) -> None:
        sampling.check_generation_kwargs(ALLOWED)
        with kept_torch_generators():
            try:
                super().check(prompt_ids, sampling)
            except UserError:
                raise
            except (TypeError, ValueError) as error:
                given = sampling.generation_kwargs
                raise UserError(f"generation_kwargs={given!r} is not allowed: {one_line(error)}") from None

    def take_figures(self) -> dict[str, float]:
        return {} if self.speculation is None else self.speculation.take_figures()

    def _padded(self, prompt_ids: list[list[int]], sampling: Sampling, config: GenerationConfig) -> list[Response]:
        groups: dict[int, list[Response]] = {}
        for batch in self._batches(prompt_ids, sampling):
            sampled = iter(self._sample([prompt_ids[index] for index in batch], sampling, config))
            groups |= {index: list(islice(sampled, sampling.num_generations)) for index in batch}
        return [response for index in range(len(prompt_ids)) for response in groups[index]]

    def _batches(self, prompt_ids: list[list[int]], sampling: Sampling) -> Iterator[list[int]]:
        """Indices of prompts to sample together: of similar lengths, within the token budget."""
        batch: list[int] = []
        for index in sorted(range(len(prompt_ids)), key=lambda index: len(prompt_ids[index])):
            width = len(prompt_ids[index]) + sampling.max_completion_length
            if batch and (len(batch) + 1) * sampling.num_generations * width > self.max_tokens:
                yield batch
                batch = []
            batch.append(index)
        yield batch

    def _sample(self, prompt_ids: list[list[int]], sampling: Sampling, config: GenerationConfig) -> list[Response]:
        """Responses to each prompt of one padded batch, with the loop of transformers."""
        repeats = sampling.num_generations
        ids, mask = left_padded(prompt_ids, self.tokenizer.pad_token_id, self.model.device)
        stops, budget = stop_texts(self.tokenizer, sampling), thinking_budget(self.tokenizer, sampling)
        forced = None
        if budget is not None:
            forced = ForcedTokens([budget.begin(prompt) for prompt in prompt_ids for _ in range(repeats)])
        recorder = Recorder([forced] if forced else [], sampling.keeps_support)
        criteria = StoppingCriteriaList([StopCriterion(stops, len(ids) * repeats)] if stops else [])
        try:
            output = self.model.generate(
                input_ids=ids.repeat_interleave(repeats, 0), attention_mask=mask.repeat_interleave(repeats, 0),
                generation_config=config, custom_generate=recorder.generate, stopping_criteria=criteria,
            )  # fmt: skip
        except RuntimeError as error:
            if "probability tensor" not in str(error):
                raise
            raise not_finite() from None
        logprobs = recorder.logprobs(output).tolist()
        completions = output[:, ids.shape[1] :].tolist()
        masks: list[list[bool] | None] = [None] * len(completions)
        if forced is not None:
            forced.add(output)
            masks = [state.mask for state in forced.states]
        rows = zip(completions, logprobs, masks, recorder.rows(len(completions)), strict=True)
        return [self._response(*each, stops) for each in rows]

    def generation_config(self, sampling: Sampling) -> GenerationConfig:
        """The arguments of `generate`.

        Raises:
            UserError: `generation_kwargs` are refused.
        """
        sampling.check_generation_kwargs(ALLOWED)
        chosen = {"do_sample": False}
        if sampling.temperature > 0:
            chosen = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p}
            chosen |= {"top_k": sampling.top_k, "min_p": sampling.min_p}
        return GenerationConfig(
            max_new_tokens=sampling.max_completion_length,
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=sorted(self.eos_token_ids) or None,
            **chosen,
            **sampling.filters,
        )

    def _response(
        self, tokens: list[int], logprobs: list[float], mask: list[bool] | None, kept: list[Tensor] | None,
        stops: StopTexts | None,
    ) -> Response:  # fmt: skip
        """The response up to its first end-of-text token or stop text; padding may follow these."""
        count, past = ending(tokens, self.eos_token_ids, stops) or (None, None)
        mask = mask and mask[:count]
        support = None if kept is None else Support.of(kept[: len(tokens[:count])])
        return Response(tokens[:count], "stop" if count else "length", logprobs[:count], past, mask, support)


def thinking_budget(tokenizer: Any, sampling: Sampling) -> ThinkingBudget | None:
    budget = sampling.thinking_budget
    return None if budget is None else ThinkingBudget(tokenizer, budget)


def not_continuous(model: nn.Module) -> str | None:
    """Why continuous batching cannot sample the model, as the end of "because ..."; None if it can.

    Rows must be able to join and leave its cache, and a step may need no inputs but tokens, positions and a mask.
    """
    for module in (model, model.base_model):
        missing = [name for name in ("position_ids", "attention_mask") if name not in forward_arguments(module)]
        missing += [] if cache_argument(module) else ["cache"]
        if missing:
            return f"the forward of {type(module).__name__} does not take {', '.join(missing)}"
    if type(model).prepare_inputs_for_generation is not GenerationMixin.prepare_inputs_for_generation:
        return "it has its own prepare_inputs_for_generation"
    if plain_layers(model.config) is None:
        return "its cache has layers other than full and sliding-window attention"
    return None


def padded_warning(model: nn.Module) -> str:
    """A warning for a model that continuous batching cannot sample; empty for others."""
    if (reason := not_continuous(model)) is None:
        return ""
    return (
        f"{type(model).__name__} is sampled in padded batches, each of which runs until its longest completion ends, "
        f"instead of with continuous batching, because {reason}; use_vllm may be faster"
    )


def processors(model: nn.Module, input_ids: Tensor, logits_processor: LogitsProcessorList, **others) -> Any:
    """Replaces the decoding loop of `generate` and returns the logits processors that it would apply."""
    return logits_processor


class Recorder:
    """The decoding loop of `generate`, which also records the log-probabilities of the sampled tokens.

    `last` are logits processors to apply after those of `generate`. With `keeps_support` it also records the ids that
    all of them keep.
    """

    def __init__(self, last: Sequence[LogitsProcessor] = (), keeps_support: bool = False):
        self.last, self.keeps_support = last, keeps_support
        self.kept: list[list[Tensor]] = []
        self.before: Tensor | None = None
        self.chosen: list[Tensor] = []

    def generate(self, model: nn.Module, input_ids: Tensor, logits_processor: LogitsProcessorList, **others) -> Tensor:
        processors = LogitsProcessorList([*logits_processor, *self.last, self])
        return model._sample(input_ids, logits_processor=processors, **others)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.logprobs(input_ids)
        self.before = scores.log_softmax(-1)
        if self.keeps_support:
            self.kept.append(kept_ids(scores))
        return scores

    def rows(self, count: int) -> list[list[Tensor] | None]:
        """For each of `count` rows the kept ids of its tokens; None without `keeps_support`."""
        return [[step[row] for step in self.kept] if self.keeps_support else None for row in range(count)]

    def logprobs(self, input_ids: Tensor) -> Tensor:
        """Log-probabilities of all tokens so far ``[rows, tokens]``; the scores before the last token give its own."""
        if self.before is not None:
            self.chosen.append(self.before.gather(1, input_ids[:, -1:]))
            self.before = None
        return torch.cat(self.chosen, 1) if self.chosen else torch.zeros(len(input_ids), 0)
