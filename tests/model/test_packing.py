import pytest
import torch

from grpo_fast.model.microbatch_policy import MicrobatchPolicy
from grpo_fast.model.packing import Sample, build_microbatch, fill_microbatches, plan_rows, token_offsets
from support.rows import LAYOUTS, packed_logprobs, plain_logprobs
from support.tiny import random_samples, tiny_model


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("max_tokens", [400, 60, 32, 16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_microbatches_equal_single_sequences(attention, max_tokens, layout):
    samples = random_samples()
    model = tiny_model(attn_implementation=attention)
    assert model.config._attn_implementation == attention
    coefficients = torch.randn(sum(len(s.completion_ids) for s in samples), dtype=torch.float64)

    expected = plain_logprobs(model, samples)
    (expected * coefficients).sum().backward()
    expected_grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    got = packed_logprobs(MicrobatchPolicy(model), samples, max_tokens, layout)
    (got * coefficients).sum().backward()

    # Eager attention takes its softmax in float32.
    tolerance = 1e-10 if attention == "sdpa" else 1e-5
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
    for parameter, grad in zip(model.parameters(), expected_grads, strict=True):
        assert (parameter.grad - grad).norm() <= tolerance * grad.norm()


def test_plan_rows_holds_each_prompt_once():
    samples = random_samples(groups=3, per_group=5)
    rows = plan_rows(samples, list(range(15)), 1000)
    assert [len(row.samples) for row in rows] == [5, 5, 5]
    for row in rows:
        prompt = len(samples[row.samples[0]].prompt_ids)
        assert row.length == prompt + sum(len(samples[i].completion_ids) - 1 for i in row.samples)


def test_plan_rows_splits_long_rows():
    samples = random_samples(groups=2, per_group=8)
    rows = plan_rows(samples, list(range(16)), 20)
    assert sorted(index for row in rows for index in row.samples) == list(range(16))
    assert all(row.length <= 20 or len(row.samples) == 1 for row in rows)
    assert len({samples[i].group for row in rows for i in row.samples[:1]}) == 2


def test_build_microbatch_contains_chosen_samples_only():
    samples = random_samples()
    rows = plan_rows(samples, [1, 2, 9], 1000)
    microbatch = build_microbatch(samples, rows, token_offsets(samples), 0, packed=True)
    offsets = token_offsets(samples)
    expected = torch.cat([torch.arange(offsets[i], offsets[i + 1]) for i in (1, 2, 9)])
    assert microbatch.tokens.tolist() == expected.tolist()
    assert microbatch.targets.tolist() == [t for i in (1, 2, 9) for t in samples[i].completion_ids]


def test_fill_microbatches_leaves_little_room():
    """Whatever the lengths, no position is padding, and no two microbatches could have been one."""
    samples = random_samples(groups=9, per_group=3, longest=40)
    rows = plan_rows(samples, list(range(27)), 0)
    microbatches = fill_microbatches(rows, 100, packed=True)
    taken = sorted(sum(row.length for row in chosen) for chosen in microbatches)
    assert sum(taken) == sum(len(s.prompt_ids) + len(s.completion_ids) - 1 for s in samples)
    assert taken[-1] <= 100
    assert taken[0] + taken[1] > 100
    offsets = token_offsets(samples)
    for chosen in microbatches:
        microbatch = build_microbatch(samples, chosen, offsets, 0, packed=True)
        assert microbatch.input_ids.shape == (1, sum(row.length for row in chosen))


def test_fill_microbatches_isolates_long_sequences():
    samples = [Sample([2, 3], [4] * length, 0) for length in (5, 50, 3)]
    microbatches = fill_microbatches(plan_rows(samples, [0, 1, 2], 20), 20, packed=True)
    assert [[row.samples for row in chosen] for chosen in microbatches] == [[[1]], [[0, 2]]] or len(microbatches) == 2


def test_build_microbatch_refuses_padded_rows_of_several_samples():
    samples = random_samples()
    with pytest.raises(ValueError, match="holds one sample"):
        build_microbatch(samples, plan_rows(samples, [0, 1], 100), token_offsets(samples), 0, packed=False)
