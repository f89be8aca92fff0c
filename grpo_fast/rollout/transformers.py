"""Sampling with transformers' `generate`, from the policy's own module."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from transformers import DynamicCache, GenerationConfig

from grpo_fast.errors import UserError, nearest
from grpo_fast.rollout.base import Response, Sampling


class TransformersRollout:
    """Batches prompts of similar length under a token budget and computes each prompt once for all its completions.

    Args:
        model: a transformers causal LM; it is sampled in eval mode and put back as it was.
        tokenizer: its tokenizer, with a padding token.
        max_tokens: prompts and longest completions that are sampled at once, in tokens.
    """

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
        training = self.model.training
        self.model.eval()
        try:
            for batch in self._batches(prompt_ids, sampling):
                sampled = self._sample([prompt_ids[index] for index in batch], sampling)
                for place, index in enumerate(batch):
                    first = place * sampling.num_generations
                    responses[index] = sampled[first : first + sampling.num_generations]
        finally:
            self.model.train(training)
        return [response for group in responses for response in group]

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
        output = self.model.generate(
            input_ids=ids.repeat_interleave(repeats, 0),
            attention_mask=mask.repeat_interleave(repeats, 0),
            generation_config=self.generation_config(sampling),
            **arguments,
        )
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
        """How `generate` is called.

        Raises:
            UserError: `generation_kwargs` names something that a GenerationConfig does not have.
        """
        known = vars(GenerationConfig())
        for name in sampling.generation_kwargs:
            if name not in known:
                raise UserError(f"generation_kwargs: GenerationConfig has no field {name!r}{nearest(name, known)}")
        arguments = {
            "do_sample": True,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p,
            "max_new_tokens": sampling.max_completion_length,
            "pad_token_id": self.tokenizer.pad_token_id,
            "eos_token_id": sorted(self.eos_token_ids),
            **sampling.generation_kwargs,
        }
        return GenerationConfig(**arguments)

    def _response(self, tokens: list[int]) -> Response:
        for index, token in enumerate(tokens):
            if token in self.eos_token_ids:
                return Response(tokens[: index + 1], "stop")
        return Response(tokens, "length")
