"""Sampling from the policy's own module, with transformers' logits processors."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationConfig, GenerationMixin, LogitsProcessorList

from grpo_fast.errors import UserError, nearest, one_line
from grpo_fast.rollout.base import Response, Rollout, Sampling, eos_token_ids
from grpo_fast.rollout.decode import Decoder, not_finite
from grpo_fast.rollout.rows import cache_argument, forward_arguments, plain_layers

# What may change the sampled distribution besides temperature, top_p, top_k and min_p; and whether it depends on the
# tokens before.
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


class TransformersRollout(Rollout):
    """Samples with continuous batching (:class:`~grpo_fast.rollout.decode.Decoder`) where the model allows it.

    That is where all layers of its cache are full attention or a sliding window. Other models (state spaces, linear or
    chunked attention, and those that prepare the inputs of `generate` in a way of their own) are sampled with
    `generate` itself, in batches of prompts of similar length, each of which runs to its longest completion.

    Args:
        model: a transformers causal LM; it is sampled in eval mode and put back as it was.
        tokenizer: its tokenizer, with a padding token.
        max_tokens: cached tokens at any time; with `generate`, prompts and longest completions of a batch.
    """

    def __init__(self, model: nn.Module, tokenizer, max_tokens: int):
        self.model = model
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.eos_token_ids = eos_token_ids(model, tokenizer)
        if reason := not_continuous(model):
            self.warning = padded_warning(model, reason)

    @torch.no_grad()
    def generate(self, prompt_ids: list[list[int]], sampling: Sampling) -> list[Response]:
        """Responses to every prompt, `num_generations` side by side, in the order of the prompts."""
        responses: list[list[Response]] = [[] for _ in prompt_ids]
        training, own_config = self.model.training, self.model.generation_config
        self.model.eval()
        # A model may ship filters (a repetition penalty, say) that would fill in for what is not set here, and then
        # the sampled policy would not be the trained one.
        self.model.generation_config = GenerationConfig()
        try:
            config = self.generation_config(sampling)
            if continuous(self.model):
                return self._decode(prompt_ids, sampling, config)
            for batch in self._batches(prompt_ids, sampling):
                sampled = self._sample([prompt_ids[index] for index in batch], sampling.num_generations, config)
                for place, index in enumerate(batch):
                    first = place * sampling.num_generations
                    responses[index] = sampled[first : first + sampling.num_generations]
        finally:
            self.model.train(training)
            self.model.generation_config = own_config
        return [response for group in responses for response in group]

    def _decode(self, prompt_ids: list[list[int]], sampling: Sampling, config: GenerationConfig) -> list[Response]:
        @cache
        def filters(prompt_length: int) -> LogitsProcessorList:
            """What `generate` would apply after a prompt of this length."""
            ids = torch.zeros(1, prompt_length, dtype=torch.long, device=self.model.device)
            return self.model.generate(
                ids, attention_mask=torch.ones_like(ids), generation_config=config, custom_generate=processors
            )

        decoder = Decoder(
            self.model, self.max_tokens, sampling.max_completion_length, self.eos_token_ids, filters,
            any(FILTERS[name] for name in sampling.generation_kwargs), sampling.temperature == 0,
        )  # fmt: skip
        return decoder(prompt_ids, sampling.num_generations)

    def check(self, prompt_ids: list[int], sampling: Sampling) -> None:
        """Sample one token, so that what cannot work fails before anything long begins.

        Raises:
            UserError: the sampling arguments are refused.
        """
        shortest, longest = sampling.generation_kwargs.get("min_new_tokens", 0), sampling.max_completion_length
        if not isinstance(shortest, int) or not 0 <= shortest <= longest:
            raise UserError(
                f"generation_kwargs: min_new_tokens={shortest!r} is not allowed: it must be from 0 to {longest}"
            )
        with torch.random.fork_rng():
            try:
                self.generate([prompt_ids], sampling.one_token())
            except (TypeError, ValueError) as error:
                if isinstance(error, UserError):
                    raise
                given = sampling.generation_kwargs
                raise UserError(f"generation_kwargs={given!r} is not allowed: {one_line(error)}") from None

    def _batches(self, prompt_ids: list[list[int]], sampling: Sampling) -> Iterator[list[int]]:
        """Indices of prompts to be sampled together: similar lengths, within the token budget."""
        batch: list[int] = []
        for index in sorted(range(len(prompt_ids)), key=lambda index: len(prompt_ids[index])):
            width = len(prompt_ids[index]) + sampling.max_completion_length
            if batch and (len(batch) + 1) * sampling.num_generations * width > self.max_tokens:
                yield batch
                batch = []
            batch.append(index)
        yield batch

    def _sample(self, prompt_ids: list[list[int]], repeats: int, config: GenerationConfig) -> list[Response]:
        """`repeats` responses to each prompt of one padded batch, with transformers' own loop."""
        width = max(map(len, prompt_ids))
        ids = torch.full((len(prompt_ids), width), self.tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for line, prompt in enumerate(prompt_ids):
            ids[line, width - len(prompt) :] = torch.tensor(prompt)
            mask[line, width - len(prompt) :] = 1
        ids, mask = ids.to(self.model.device), mask.to(self.model.device)
        arguments = {}
        if repeats > 1 and width > 1 and plain_layers(self.model.config) and (name := cache_argument(self.model)):
            arguments[name] = self._prompt_cache(ids[:, :-1], mask[:, :-1], repeats)
        recorder = Recorder()
        try:
            output = self.model.generate(
                input_ids=ids.repeat_interleave(repeats, 0), attention_mask=mask.repeat_interleave(repeats, 0),
                generation_config=config, custom_generate=recorder.generate, **arguments,
            )  # fmt: skip
        except RuntimeError as error:
            if "probability tensor" not in str(error):
                raise
            raise not_finite() from None
        logprobs = recorder.logprobs(output)
        return [self._response(*pair) for pair in zip(output[:, width:].tolist(), logprobs.tolist(), strict=True)]

    def _prompt_cache(self, ids: Tensor, mask: Tensor, repeats: int) -> DynamicCache:
        """Keys and values of the prompts but for their last token, computed once and repeated for each completion."""
        cached = DynamicCache(config=self.model.config)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        body = self.model.base_model
        body(
            input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True, **{cache_argument(body): cached}
        )
        cached.batch_repeat_interleave(repeats)
        return cached

    def generation_config(self, sampling: Sampling) -> GenerationConfig:
        """How `generate` is called; a temperature of 0 is greedy.

        Raises:
            UserError: `generation_kwargs` names something other than a filter of the distribution.
        """
        for name in sampling.generation_kwargs:
            if name not in FILTERS:
                raise UserError(
                    f"generation_kwargs: {name!r} is not allowed{nearest(name, FILTERS)}; "
                    f"there are {', '.join(FILTERS)}, and fields of their own for temperature, top_p, top_k and min_p"
                )
        chosen = {"do_sample": False}
        if sampling.temperature > 0:
            chosen = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p}
            chosen |= {"top_k": sampling.top_k, "min_p": sampling.min_p}
        return GenerationConfig(
            max_new_tokens=sampling.max_completion_length,
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=sorted(self.eos_token_ids) or None,
            **chosen,
            **sampling.generation_kwargs,
        )

    def _response(self, tokens: list[int], logprobs: list[float]) -> Response:
        for index, token in enumerate(tokens):
            if token in self.eos_token_ids:
                return Response(tokens[: index + 1], "stop", logprobs[: index + 1])
        return Response(tokens, "length", logprobs)


def continuous(model: nn.Module) -> bool:
    """Whether rows can leave and join the model's cache, and a step needs no more than tokens and positions."""
    return not_continuous(model) is None


def not_continuous(model: nn.Module) -> str | None:
    """Why continuous batching cannot sample the model, as the end of "because ..."; None where it can."""
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


def padded_warning(model: nn.Module, reason: str) -> str:
    return (
        f"{type(model).__name__} is sampled in padded batches, each of which runs to its longest completion, and not "
        f"with continuous batching, because {reason}; use_vllm may be faster"
    )


def processors(model: nn.Module, input_ids: Tensor, logits_processor: LogitsProcessorList, **others) -> Any:
    """In place of the decoding loop of `generate`: what it would apply to the logits."""
    return logits_processor


class Recorder:
    """The decoding loop of `generate`, with the log-probabilities of what it samples."""

    def __init__(self):
        self.before: Tensor | None = None
        self.chosen: list[Tensor] = []

    def generate(self, model: nn.Module, input_ids: Tensor, logits_processor: LogitsProcessorList, **others) -> Tensor:
        return model._sample(input_ids, logits_processor=LogitsProcessorList([*logits_processor, self]), **others)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.logprobs(input_ids)
        self.before = scores.log_softmax(-1)
        return scores

    def logprobs(self, input_ids: Tensor) -> Tensor:
        """Those of all tokens so far ``[rows, tokens]``; the last ones are read off the scores before."""
        if self.before is not None:
            self.chosen.append(self.before.gather(1, input_ids[:, -1:]))
            self.before = None
        return torch.cat(self.chosen, 1) if self.chosen else torch.zeros(len(input_ids), 0)
