"""`token_weights`: mask and normaliser of a whole optimizer step."""

from itertools import pairwise

import pytest
import torch

from grpo_kernels import PRESETS, policy_loss, token_weights
from grpo_kernels.token_weights import AGGREGATIONS

MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]])
EXPECTED = {
    "sequence_mean": [1 / 12, 1 / 4, 1 / 20],
    "token_mean": [1 / 9, 1 / 9, 1 / 9],
    "constant_length": [1 / 40, 1 / 40, 1 / 40],
    "sequence_sum": [1 / 4, 1 / 4, 1 / 4],
}


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_weights_equal_formula(aggregation):
    """Four sequences of 3, 1, 5 and no tokens; the empty one counts as a sequence, as in TRL."""
    expected = torch.tensor([*EXPECTED[aggregation], 0.0])[:, None] * MASK
    torch.testing.assert_close(token_weights(MASK, aggregation, constant_length=10), expected)
    packed = token_weights(MASK.flatten(), aggregation, cu_seqlens=torch.arange(5) * 5, constant_length=10)
    torch.testing.assert_close(packed.view(4, 5), expected)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_weights_of_parts_with_totals(aggregation):
    """Given the totals of the step, as ranks have them, each part of it gets its share."""
    whole = token_weights(MASK, aggregation, constant_length=10)
    parts = [
        token_weights(part, aggregation, constant_length=10, num_sequences=4, num_tokens=9)
        for part in (MASK[:1], MASK[1:3], MASK[3:])
    ]
    torch.testing.assert_close(torch.cat(parts), whole)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("cuts", [[3], [1, 2], [1, 2, 3], [0, 4]])
def test_losses_of_parts_add_up(preset, cuts):
    objective = PRESETS[preset]
    weights = token_weights(MASK, objective.aggregation, constant_length=10)
    fields = {"advantages": torch.randn(4, 5), "old_logprobs": torch.randn(4, 5) * 0.1 - 1, "weights": weights}
    fields["selected"] = torch.rand(4, 5) < 0.3
    logprobs = (torch.randn(4, 5) * 0.1 - 1).requires_grad_()
    whole = policy_loss(logprobs, objective=objective, **fields)
    (gradient,) = torch.autograd.grad(whole.loss, logprobs)
    bounds = [0, *cuts, 4]
    total, stats = 0.0, 0.0
    for start, end in pairwise(bounds):
        part = policy_loss(logprobs[start:end], objective=objective, **{k: v[start:end] for k, v in fields.items()})
        total, stats = total + part.loss, stats + torch.stack(list(part.stats.values()))
    torch.testing.assert_close(total, whole.loss)
    torch.testing.assert_close(torch.autograd.grad(total, logprobs)[0], gradient)
    torch.testing.assert_close(stats, torch.stack(list(whole.stats.values())))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("shape", [(3, 4), (0, 4), (3, 0)])
def test_no_tokens(aggregation, shape):
    weights = token_weights(torch.zeros(shape), aggregation, constant_length=4)
    assert weights.shape == shape
    assert (weights == 0).all()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"aggregation": "mean"}, "aggregation='mean' is unknown; choose one of"),
        ({"aggregation": "constant_length"}, "needs constant_length above 0, got None"),
        ({"aggregation": "constant_length", "constant_length": 0}, "needs constant_length above 0, got 0"),
        ({"mask": torch.ones(4)}, "needs cu_seqlens for packed [N] tensors"),
        ({"mask": torch.ones(4), "cu_seqlens": torch.tensor([0, 3])}, "must end at the number of tokens 4, got 3"),
        ({"mask": torch.ones(1, 2, 3)}, "mask must have shape [B, T] or [N], got (1, 2, 3)"),
        ({"num_sequences": 0}, "num_sequences must be above 0, got 0"),
    ],
)
def test_bad_input(arguments, words):
    with pytest.raises(ValueError, match="token_weights") as caught:
        token_weights(**{"mask": MASK, "aggregation": "sequence_mean", **arguments})
    assert words in str(caught.value)
