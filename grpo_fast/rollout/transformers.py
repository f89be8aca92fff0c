"""Sampling with transformers' `generate`, from the policy's own module."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import nn
from transformers import DynamicCache, GenerationConfig

from grpo_fast.errors import UserError, nearest, one_line
from grpo_fast.rollout.base import Response, Sampling

# What may change the sampled distribution besides temperature, top_p, top_k and min_p.
FILTERS = (
    "repetition_penalty",
    "no_repeat_ngram_size",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
    "min_new_tokens",
    "bad_words_ids",
    "suppress_tokens",
    "begin_suppress_tokens",
)


class TransformersRollout:
    """Batches prompts of similar length under a token budget and computes each prompt once for all its completions.

    Args:
        model: a transformers causal LM; it is sampled in eval mode and put back as it was.
        tokenizer: its tokenizer, with a padding token.
        max_tokens: prompts and longest completions that are sampled at once, in tokens.
    """

    copies_weights = False
    separate = False

    def __init__(self, model: nn.Module, tokenizer, max_tokens: int):
        self.model = model
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        eos = model.generation_config.eos_token_id
        self.eos_token_ids = {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None}

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
            for batch in self._batches(prompt_ids, sampling):
                sampled = self._sample([prompt_ids[index] for index in batch], sampling)
                for place, index in enumerate(batch):
                    first = place * sampling.num_generations
                    responses[index] = sampled[first : first + sampling.num_generations]
        finally:
            self.model.train(training)
            self.model.generation_config = own_config
        return [response for group in responses for response in group]

    def check(self, prompt_ids: list[int], sampling: Sampling) -> None:
        """Sample one token, so that what cannot work fails before anything long begins.

        Raises:
            UserError: the sampling arguments are refused.
        """
        filters = dict(sampling.generation_kwargs)
        shortest, longest = filters.pop("min_new_tokens", 0), sampling.max_completion_length
        if not isinstance(shortest, int) or not 0 <= shortest <= longest:
            raise UserError(
                f"generation_kwargs: min_new_tokens={shortest!r} is not allowed: it must be from 0 to {longest}"
            )
        one_token = replace(sampling, num_generations=1, max_completion_length=1, generation_kwargs=filters)
        with torch.random.fork_rng():
            try:
                self.generate([prompt_ids], one_token)
            except (TypeError, ValueError) as error:
                if isinstance(error, UserError):
                    raise
                given = sampling.generation_kwargs
                raise UserError(f"generation_kwargs={given!r} is not allowed: {one_line(error)}") from None

    def sync(self, model: nn.Module) -> None:
        """Nothing to do: the policy's own module is sampled."""

    def sleep(self) -> None:
        """Nothing to do: there is no memory of its own."""

    def wake(self) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Nothing to do."""

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

    def _sample(self, prompt_ids: list[list[int]], sampling: Sampling) -> list[Response]:
        device = self.model.device
        width = max(map(len, prompt_ids))
        ids = torch.full((len(prompt_ids), width), self.tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for line, prompt in enumerate(prompt_ids):
            ids[line, width - len(prompt) :] = torch.tensor(prompt)
            mask[line, width - len(prompt) :] = 1
        ids, mask = ids.to(device), mask.to(device)
        repeats = sampling.num_generations
        arguments = {}
        if repeats > 1 and width > 1:
            arguments["past_key_values"] = self._prompt_cache(ids[:, :-1], mask[:, :-1], repeats)
        try:
            output = self.model.generate(
                input_ids=ids.repeat_interleave(repeats, 0),
                attention_mask=mask.repeat_interleave(repeats, 0),
                generation_config=self.generation_config(sampling),
                **arguments,
            )
        except RuntimeError as error:
            if "probability tensor" not in str(error):
                raise
            raise UserError("the policy's probabilities are not finite any more; try a smaller learning_rate") from None
        return [self._response(tokens) for tokens in output[:, width:].tolist()]

    def _prompt_cache(self, ids: torch.Tensor, mask: torch.Tensor, repeats: int) -> DynamicCache:
        """Keys and values of the prompts but for their last token, computed once and repeated for each completion."""
        cache = DynamicCache(config=self.model.config)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        self.model.base_model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        )
        cache.batch_repeat_interleave(repeats)
        return cache

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

    def _response(self, tokens: list[int]) -> Response:
        for index, token in enumerate(tokens):
            if token in self.eos_token_ids:
                return Response(tokens[: index + 1], "stop")
        return Response(tokens, "length")
