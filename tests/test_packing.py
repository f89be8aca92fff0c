import pytest
import torch

from grpo_fast.packing import build_microbatch, fill_microbatches, plan_rows, token_offsets
from grpo_fast.policy import FusedPolicy
from tiny import random_samples, tiny_model


def plain_logprobs(model, samples):
    """Log-probabilities of each completion from the model's own logits, one sequence at a time."""
    result = []
    for prompt, completion, _ in samples:
        ids = torch.tensor([prompt + completion])
        logp = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        result.append(logp.gather(1, ids[0, 1:, None]).squeeze(1)[len(prompt) - 1 :])
    return torch.cat(result)


def packed_logprobs(policy, samples, max_tokens, longest_shared_row):
    offsets = token_offsets(samples)
    out = torch.zeros(int(offsets[-1]), dtype=torch.float64)
    rows = plan_rows(samples, list(range(len(samples))), max_tokens, longest_shared_row)
    for chosen in fill_microbatches(rows, max_tokens):
        microbatch = build_microbatch(samples, chosen, offsets, 0)
        assert microbatch.input_ids.numel() <= max_tokens
        out = out.index_put((microbatch.tokens,), policy(microbatch))
    return out


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("max_tokens", "longest_shared_row"), [(400, 0), (400, 100), (60, 100), (32, 24), (16, 0)])
def test_packed_equals_one_by_one(attention, max_tokens, longest_shared_row):
    samples = random_samples()
    model = tiny_model(attn_implementation=attention)
    assert model.config._attn_implementation == attention
    policy = FusedPolicy(model)
    coefficients = torch.randn(sum(len(s.completion_ids) for s in samples), dtype=torch.float64)

    expected = plain_logprobs(model, samples)
    (expected * coefficients).sum().backward()
    expected_grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    got = packed_logprobs(policy, samples, max_tokens, longest_shared_row)
    (got * coefficients).sum().backward()

    # Eager attention takes its softmax in float32.
    tolerance = 1e-10 if attention == "sdpa" else 1e-5
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
    for parameter, grad in zip(model.parameters(), expected_grads, strict=True):
        assert (parameter.grad - grad).norm() <= tolerance * grad.norm()


def test_shared_rows_hold_each_prompt_once():
    samples = random_samples(groups=3, per_group=5)
    rows = plan_rows(samples, list(range(15)), 1000, 1000)
    assert [len(row.samples) for row in rows] == [5, 5, 5]
    for row in rows:
        prompt = len(samples[row.samples[0]].prompt_ids)
        assert row.length == prompt + sum(len(samples[i].completion_ids) - 1 for i in row.samples)


def test_rows_are_split_where_they_get_too_long():
    samples = random_samples(groups=2, per_group=8)
    rows = plan_rows(samples, list(range(16)), 1000, 20)
    assert sorted(index for row in rows for index in row.samples) == list(range(16))
    assert all(row.length <= 20 or len(row.samples) == 1 for row in rows)
    assert len({samples[i].group for row in rows for i in row.samples[:1]}) == 2


def test_only_chosen_samples_are_computed():
    samples = random_samples()
    rows = plan_rows(samples, [1, 2, 9], 1000, 1000)
    microbatch = build_microbatch(samples, rows, token_offsets(samples), 0)
    offsets = token_offsets(samples)
    expected = torch.cat([torch.arange(offsets[i], offsets[i + 1]) for i in (1, 2, 9)])
    assert microbatch.tokens.tolist() == expected.tolist()
    assert microbatch.targets.tolist() == [t for i in (1, 2, 9) for t in samples[i].completion_ids]
