import pytest
import torch

from grpo_fast.errors import UserError
from grpo_fast.models import digit_tokenizer
from grpo_fast.rollout import Sampling, TransformersRollout
from tiny import VOCAB, tiny_model

PROMPTS = [[5, 9, 11], [7], [3, 4, 5, 6, 7, 8], [5, 9, 12, 2]]


def rollout(max_tokens=100_000):
    model = tiny_model(torch.float32, eos_token_id=None)
    tokenizer = digit_tokenizer()  # only its special tokens matter here
    return TransformersRollout(model, tokenizer, max_tokens), model


def greedy(model, prompt, length, eos):
    ids = list(prompt)
    for _ in range(length):
        ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] in eos:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("max_tokens", [100_000, 60, 1])
@pytest.mark.parametrize("num_generations", [1, 3])
def test_greedy_equals_one_at_a_time(max_tokens, num_generations):
    """Left padding, sorting by length, batching and the shared prompt cache change nothing."""
    sampler, model = rollout(max_tokens)
    responses = sampler.generate(PROMPTS, Sampling(num_generations, 12, temperature=0.0))
    with torch.no_grad():
        expected = [greedy(model, prompt, 12, sampler.eos_token_ids) for prompt in PROMPTS]
    assert [r.token_ids for r in responses] == [tokens for tokens in expected for _ in range(num_generations)]


def test_samples_follow_the_models_distribution():
    sampler, model = rollout()
    torch.manual_seed(0)
    draws = 20_000
    temperature = 0.8
    responses = sampler.generate(PROMPTS[:2], Sampling(draws, 2, temperature=temperature))
    for index, prompt in enumerate(PROMPTS[:2]):
        with torch.no_grad():
            p = (model(input_ids=torch.tensor([prompt])).logits[0, -1] / temperature).softmax(-1)
        first = torch.tensor([r.token_ids[0] for r in responses[index * draws : (index + 1) * draws]])
        counts = torch.bincount(first, minlength=VOCAB)
        likely = p * draws >= 5
        chi_square = ((counts - p * draws) ** 2 / (p * draws))[likely].sum().item()
        # Mean k, standard deviation sqrt(2 k): six of them away would be a wrong distribution.
        assert chi_square < likely.sum() + 6 * (2 * likely.sum()) ** 0.5


def test_responses_end_at_the_first_end_token():
    sampler, _ = rollout()
    sampler.eos_token_ids = {0, 17, 23}
    torch.manual_seed(0)
    responses = sampler.generate(PROMPTS, Sampling(200, 6))
    reasons = {"stop": 0, "length": 0}
    for token_ids, reason in responses:
        reasons[reason] += 1
        assert not set(token_ids[:-1]) & sampler.eos_token_ids
        assert (token_ids[-1] in sampler.eos_token_ids) == (reason == "stop")
        assert len(token_ids) == 6 or reason == "stop"
    assert min(reasons.values()) > 0


def test_filters_that_a_model_ships_are_not_applied():
    """They would fill in for what is not set, and the sampled policy would not be the trained one."""
    sampler, model = rollout()
    expected = sampler.generate(PROMPTS, Sampling(1, 12, temperature=0.0))
    model.generation_config.repetition_penalty = 1000.0
    model.generation_config.min_new_tokens = 12
    assert sampler.generate(PROMPTS, Sampling(1, 12, temperature=0.0)) == expected
    assert model.generation_config.repetition_penalty == 1000.0
    penalised = Sampling(1, 12, temperature=0.0, generation_kwargs={"repetition_penalty": 1000.0})
    assert sampler.generate(PROMPTS, penalised) != expected


def test_the_models_mode_is_restored():
    sampler, model = rollout()
    model.train()
    sampler.generate(PROMPTS, Sampling(2, 2))
    assert model.training


def test_unknown_generation_kwargs_are_named():
    sampler, _ = rollout()
    with pytest.raises(UserError, match=r"'repetition_penlty' is not allowed .did you mean 'repetition_penalty'"):
        sampler.generate(PROMPTS, Sampling(2, 2, generation_kwargs={"repetition_penlty": 1.1}))
