"""An engine that stands for one in another process: it has its own weights, and each token's log-probability."""

from __future__ import annotations

import copy

import torch

from grpo_fast.rollout import Response, Rollout, Sampling
from grpo_fast.rollout.base import eos_token_ids


class SeparateEngine(Rollout):
    """Samples token by token from a copy of the model, with a generator of its own.

    `weights` are copies of the model after each sync, the first one included.
    """

    copies_weights = separate = True

    def __init__(self, model, tokenizer):
        self.model, self.eos_token_ids = copy.deepcopy(model).eval(), eos_token_ids(model, tokenizer)
        self.weights, self.contexts = [], []

    def sync(self, model):
        self.model.load_state_dict(model.state_dict())
        self.weights.append(copy.deepcopy(self.model))

    @torch.no_grad()
    def generate(self, prompt_ids: list[list[int]], sampling: Sampling) -> list[Response]:
        self.contexts.append(prompt_ids)
        seed = 0 if sampling.seed is None else sampling.seed
        generator = torch.Generator().manual_seed(seed)
        return [
            self.complete(list(prompt), sampling, generator)
            for prompt in prompt_ids
            for _ in range(sampling.num_generations)
        ]

    def complete(self, ids: list[int], sampling: Sampling, generator: torch.Generator) -> Response:
        tokens, logprobs = [], []
        while len(tokens) < sampling.max_completion_length:
            scores = self.model(input_ids=torch.tensor([ids + tokens])).logits[0, -1].float() / sampling.temperature
            tokens.append(int(torch.multinomial(scores.softmax(-1), 1, generator=generator)))
            logprobs.append(scores.log_softmax(-1)[tokens[-1]].item())
            if tokens[-1] in self.eos_token_ids:
                return Response(tokens, "stop", logprobs)
        return Response(tokens, "length", logprobs)


def use_separate_engine(setattr_=setattr) -> None:
    """Have the trainer sample from a `SeparateEngine` where it would use vLLM."""
    import grpo_fast.trainer

    setattr_(grpo_fast.trainer, "check_engine", lambda config: None)
    setattr_(grpo_fast.trainer, "build_rollout", lambda config, model, tokenizer, _: SeparateEngine(model, tokenizer))
