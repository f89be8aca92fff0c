"""The correction for the difference between a sampler's and the trainer's log-probabilities."""

import math
from itertools import pairwise

import pytest
import torch

from grpo_kernels import PRESETS, SAMPLING_RATIO_MODES, policy_loss, sampling_ratio, token_weights

LENGTHS = [1, 4, 7, 2]
OFFSETS = torch.tensor([0, *LENGTHS]).cumsum(0)


def draws(seed=0, spread=0.5):
    generator = torch.Generator().manual_seed(seed)
    logprobs = -torch.rand(sum(LENGTHS), generator=generator) * 4
    return logprobs, logprobs + spread * torch.randn(len(logprobs), generator=generator)


def definition(logprobs, sampled, mode, low, high):
    """One sequence at a time, in Python's floats."""
    level, bound = mode.split("_")
    found = []
    for first, last in pairwise(OFFSETS):
        differences = [a - b for a, b in zip(logprobs[first:last].tolist(), sampled[first:last].tolist(), strict=True)]
        differences = [0.0 if math.isnan(d) else d for d in differences]
        sums = {"token": differences, "sequence": [sum(differences)] * len(differences)}
        sums["geometric"] = [sum(differences) / len(differences)] * len(differences)
        for value in sums[level]:
            ratio = math.exp(value)
            inside = low <= ratio <= high
            found.append(ratio if inside else (min(max(ratio, low), high) if bound == "truncate" else 0.0))
    return torch.tensor(found)


@pytest.mark.parametrize("mode", SAMPLING_RATIO_MODES)
@pytest.mark.parametrize(("low", "high"), [(None, 1.2), (0.8, None), (0.9, 1.1), (None, None)])
def test_modes_equal_definition(mode, low, high):
    logprobs, sampled = draws()
    sampled[5] = math.nan
    got = sampling_ratio(logprobs, sampled, mode, clip_min=low, clip_max=high, cu_seqlens=OFFSETS)
    expected = definition(logprobs, sampled, mode, low or 0.0, math.inf if high is None else high)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert not got.requires_grad
    if high == 1.1:
        assert (got != 1).any()


@pytest.mark.parametrize("mode", SAMPLING_RATIO_MODES)
def test_padded_rows_equal_packed_ones(mode):
    logprobs, sampled = draws()
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    padded = [torch.full(mask.shape, math.nan).masked_scatter(mask, values) for values in (logprobs, sampled)]
    got = sampling_ratio(*padded, mode, mask=mask)
    torch.testing.assert_close(got[mask], sampling_ratio(logprobs, sampled, mode, cu_seqlens=OFFSETS))
    assert (got[~mask] == 1).all()


def test_geometric_mode_is_independent_of_length():
    """With 1% per token over 4,096 tokens the product masks the answer, and the geometric mean does not."""
    logprobs = torch.zeros(4096)
    offsets = torch.tensor([0, 4096])
    product = sampling_ratio(logprobs, logprobs - 0.01, "sequence_mask", cu_seqlens=offsets)
    geometric = sampling_ratio(logprobs, logprobs - 0.01, "geometric_mask", cu_seqlens=offsets)
    assert (product == 0).all()
    torch.testing.assert_close(geometric, torch.full_like(geometric, math.exp(0.01)))


def test_corrected_gradient_is_unbiased():
    """The mean over what the sampler drew, corrected, is the mean over what the policy would have drawn."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, generator=generator, dtype=torch.float64, requires_grad=True)
    other = logits.detach() + 0.3 * torch.randn(6, generator=generator, dtype=torch.float64)
    rewards = torch.randn(6, generator=generator, dtype=torch.float64)
    policy, sampler = logits.log_softmax(0), other.log_softmax(0)
    # Instead of sampling: every token once, weighted by the sampler's probability.
    rho = sampling_ratio(policy, sampler, "token_truncate", clip_max=None)
    result = policy_loss(policy, rewards, sampler.exp(), PRESETS["reinforce"], correction=rho)
    (got,) = torch.autograd.grad(result.loss, logits, retain_graph=True)
    (expected,) = torch.autograd.grad(-(policy.exp() * rewards).sum(), logits)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)


def test_masked_sequences_have_no_gradient():
    logprobs, sampled = draws()
    sampled[OFFSETS[2] : OFFSETS[3]] -= 5.0
    logprobs.requires_grad_()
    rho = sampling_ratio(logprobs, sampled, "sequence_mask", cu_seqlens=OFFSETS)
    weights = token_weights(torch.ones(len(logprobs)), "sequence_mean", cu_seqlens=OFFSETS)
    policy_loss(logprobs, torch.ones(len(logprobs)), weights, PRESETS["grpo"], correction=rho).loss.backward()
    assert (logprobs.grad[OFFSETS[2] : OFFSETS[3]] == 0).all()
    assert (logprobs.grad[: OFFSETS[2]] != 0).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "token"}, "mode='token' is unknown; choose one of token_truncate"),
        ({"clip_min": 2.0, "clip_max": 1.0}, r"clip_min=2.0 is above clip_max=1.0"),
        ({"clip_max": -1.0}, "clip_max must be at least 0, got -1.0"),
        ({"mode": "sequence_mask"}, "needs cu_seqlens"),
    ],
)
def test_bad_options_are_refused(options, message):
    logprobs, sampled = draws()
    with pytest.raises(ValueError, match=message):
        sampling_ratio(logprobs, sampled, **{"mode": "token_mask", **options})


def test_unequal_shapes_are_refused():
    logprobs, sampled = draws()
    with pytest.raises(ValueError, match="sampling_logprobs must have shape"):
        sampling_ratio(logprobs, sampled[1:], "token_mask")


@pytest.mark.parametrize("mode", SAMPLING_RATIO_MODES)
def test_infinite_log_probabilities(mode):
    """In sequences of two tokens, the policy, the sampler or both give a token probability 0."""
    level, bound = mode.split("_")
    never = -math.inf

    def ratios(logprobs, sampled):
        got = sampling_ratio(torch.tensor(logprobs), torch.tensor(sampled), mode, cu_seqlens=torch.tensor([0, 2]))
        return got.tolist()

    other = 1.0 if level == "token" else 0.0
    assert ratios([-1.0, never], [-1.0, -1.0]) == [other, 0.0]
    assert ratios([-1.0, never], [-1.0, never]) == [other, 0.0]
    assert ratios([-1.0, never], [-1.0, math.nan]) == [other, 0.0]
    at_bound = 3.0 if bound == "truncate" else 0.0
    assert ratios([-1.0, -1.0], [-1.0, never]) == [1.0 if level == "token" else at_bound, at_bound]
    # One token of ratio 0 makes a sequence impossible under the policy, whatever the others are.
    assert ratios([never, -1.0], [-1.0, never]) == [0.0, at_bound if level == "token" else 0.0]


@pytest.mark.parametrize("mode", SAMPLING_RATIO_MODES)
def test_nan_log_probabilities_count_as_equal(mode):
    logprobs, sampled = torch.tensor([math.nan, -1.0, -1.0]), torch.tensor([-1.0, math.nan, -1.0])
    assert sampling_ratio(logprobs, sampled, mode, cu_seqlens=torch.tensor([0, 3])).tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"mask": [1, 1]}, TypeError, "mask must be a tensor, got list"),
        ({"mask": torch.ones(2, device="meta")}, ValueError, "mask is on meta, but the other tensors are on cpu"),
        ({"sampling_logprobs": torch.ones(2, device="meta")}, ValueError, "sampling_logprobs is on meta"),
        ({"clip_max": math.nan}, ValueError, "clip_max must be at least 0, got nan"),
    ],
)
def test_bad_tensors_are_refused(change, error, words):
    arguments = {"logprobs": torch.zeros(2), "sampling_logprobs": torch.zeros(2), "mode": "token_mask"}
    with pytest.raises(error, match=f"sampling_ratio: {words}"):
        sampling_ratio(**{**arguments, **change})
