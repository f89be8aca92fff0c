"""Masks of tokens and sequences, written out token by token, and the objectives that take one."""

import dataclasses
import math

import pytest
import torch

from grpo_kernels import (
    PRESETS,
    REJECTION_MODES,
    covariance_mask,
    linear_policy_loss,
    off_policy_mask,
    policy_loss,
    rejection_mask,
)
from support.loss_cases import make as make_head
from support.oracle import compare, relative_error
from support.policy_cases import make, runner

LENGTHS = [3, 1, 8, 0, 5, 1, 2]
OFFSETS = torch.tensor([0, *LENGTHS]).cumsum(0)


def sample(spread=0.6):
    old = torch.randn(20, dtype=torch.float64) - 2
    return old + spread * torch.randn(20, dtype=torch.float64), old, torch.rand(20) < 0.8


@pytest.mark.parametrize("name", ["clip_cov", "kl_cov"])
def test_objective_with_selection_equals_the_reference(name):
    for dtype in (torch.float64, torch.float32):
        selected = (torch.rand(20) < 0.4).to(dtype)
        compare(runner(PRESETS[name]), make(dtype=dtype, selected=selected), dtype)
        objective = dataclasses.replace(PRESETS[name], beta=0.1, entropy_coef=0.1, covariance_kl=0.3)
        compare(runner(objective), make(dtype=dtype, selected=selected, correction=torch.rand(20, dtype=dtype)), dtype)


@pytest.mark.parametrize("trainable", ["h", "hw"])
@pytest.mark.parametrize("name", ["clip_cov", "kl_cov"])
def test_linear_policy_loss_with_selection_in_chunks(name, trainable):
    found = []
    for extra in ({"backend": "reference"}, {"max_buffer_bytes": 3 * 259 * 8}):
        torch.manual_seed(0)
        arguments = make_head(dtype=torch.float64, trainable=trainable)
        arguments["selected"] = (torch.arange(arguments["targets"].numel()) % 2).view(arguments["targets"].shape) == 0
        loss = linear_policy_loss(objective=PRESETS[name], **{**arguments, **extra}).loss
        loss.backward()
        found.append([loss.detach(), *(arguments[key].grad for key in ("hidden", "weight")[: len(trainable)])])
    assert found[0][1].any()
    assert all(relative_error(a, b) < 1e-12 for a, b in zip(*found, strict=True))


def test_objective_with_selection_needs_it():
    with pytest.raises(ValueError, match="policy_loss: the objective needs selected, the tokens to treat differently"):
        policy_loss(objective=PRESETS["kl_cov"], **make())


def covariances(logprobs, advantages, mask):
    counted = [i for i in range(20) if mask[i]]
    mean = [sum(values[i].item() for i in counted) / len(counted) for values in (advantages, logprobs)]
    return {i: (advantages[i].item() - mean[0]) * (logprobs[i].item() - mean[1]) for i in counted}


def test_covariance_mask_selects_the_highest():
    logprobs, _, mask = sample()
    advantages = torch.randn(20, dtype=torch.float64)
    by_place = covariances(logprobs, advantages, mask)
    ranked = sorted(by_place, key=by_place.get, reverse=True)
    for ratio, count in ((1e-4, 1), (0.25, int(0.25 * len(ranked))), (1.0, len(ranked))):
        got = covariance_mask(logprobs, advantages, mask, ratio)
        assert set(got.nonzero().flatten().tolist()) == set(ranked[:count])
    assert not covariance_mask(logprobs, advantages, torch.zeros(20), 0.5).any()
    # Candidates change neither the means nor the number.
    got = covariance_mask(logprobs, advantages, mask, 0.25, candidates=torch.arange(20) != ranked[0])
    assert set(got.nonzero().flatten().tolist()) == set(ranked[1 : int(0.25 * len(ranked)) + 1])


def test_covariance_mask_draws_between_the_bounds():
    logprobs, _, mask = sample()
    advantages = torch.randn(20, dtype=torch.float64)
    by_place = covariances(logprobs, advantages, mask)
    inside = {place for place, value in by_place.items() if 0.0 < value < 0.8}
    assert len(inside) >= 4
    drawn = set()
    for _ in range(60):
        got = covariance_mask(logprobs, advantages, mask, 2 / len(by_place), low=0.0, high=0.8)
        assert got.sum() == 2
        drawn |= set(got.nonzero().flatten().tolist())
    assert drawn == inside
    assert not covariance_mask(logprobs, advantages, mask, 0.5, low=90.0, high=91.0).any()


def test_off_policy_mask_equals_equation_9():
    logprobs, old, mask = sample()
    old[6] = math.nan
    advantages = torch.tensor([-1.0, -0.5, 1.0, 0.0, -2.0, 0.0, -1.0]).repeat_interleave(torch.tensor(LENGTHS))
    for threshold in (0.05, 0.3, 5.0):
        got = off_policy_mask(logprobs, old, advantages, threshold, mask=mask, cu_seqlens=OFFSETS)
        for first, last in zip(OFFSETS[:-1].tolist(), OFFSETS[1:].tolist(), strict=True):
            counted = [i for i in range(first, last) if mask[i]]
            distance = [0.0 if math.isnan(old[i]) else (old[i] - logprobs[i]).item() for i in counted]
            mean = sum(distance) / max(len(counted), 1)
            for i in range(first, last):
                assert got[i] == (0.0 if advantages[i] < 0 and mean > threshold else 1.0)
    assert off_policy_mask(logprobs, logprobs, advantages, 0.01, cu_seqlens=OFFSETS).all()


@pytest.mark.parametrize("mode", REJECTION_MODES)
def test_rejection_mask_equals_its_definition(mode):
    logprobs, old, mask = sample()
    level, _, estimator = mode.rpartition("_")

    def divergence(i):
        d = (logprobs[i] - old[i]).item()
        return {"k1": -d, "k2": d * d / 2, "k3": math.exp(d) - 1 - d}[estimator]

    kept = 0
    bounds = ((1.4, None), (1.1, None), (3.0, 0.9)) if estimator == "k1" else ((0.02, None), (0.3, None), (1.5, None))
    for threshold, lower in bounds:
        got = rejection_mask(logprobs, old, mode, threshold, lower=lower, mask=mask, cu_seqlens=OFFSETS)
        least = math.log(lower or 1 / threshold) if estimator == "k1" else -math.inf
        most = math.log(threshold) if estimator == "k1" else threshold
        for first, last in zip(OFFSETS[:-1].tolist(), OFFSETS[1:].tolist(), strict=True):
            values = [divergence(i) for i in range(first, last) if mask[i]] or [0.0]
            whole = {"seq_sum": sum(values), "seq_mean": sum(values) / len(values), "seq_max": max(values)}
            for i in range(first, last):
                if mask[i]:
                    assert got[i] == float(least <= (divergence(i) if level == "token" else whole[level]) <= most)
        kept += got.mean().item() / 3
    assert 0 < kept < 1


def test_geometric_rejection_bounds_the_geometric_mean():
    """seq_mean_k1 keeps the sequences whose geometric mean of ratios is within the bounds, as geometric_mask does."""
    logprobs, old, _ = sample()
    ratio = torch.exp(torch.stack([part.sum() for part in (logprobs - old).tensor_split(OFFSETS[1:-1])]))
    ratio = (ratio.log() / torch.tensor(LENGTHS).clamp(min=1)).exp().repeat_interleave(torch.tensor(LENGTHS))
    got = rejection_mask(logprobs, old, "seq_mean_k1", 1.25, cu_seqlens=OFFSETS)
    assert torch.equal(got != 0, (ratio >= 0.8) & (ratio <= 1.25))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda x: covariance_mask(x, x, x, 0), "ratio must be above 0 and at most 1, got 0"),
        (lambda x: covariance_mask(x, x, x, low=1.0), "low and high belong together, got 1.0 and None"),
        (lambda x: covariance_mask(x, x, x, low=2.0, high=1.0), "low=2.0 must be below high=1.0"),
        (lambda x: off_policy_mask(x, x, x, 0.0, cu_seqlens=OFFSETS), "threshold must be above 0, got 0.0"),
        (lambda x: off_policy_mask(x, x, x, 0.1), "a whole sequence needs cu_seqlens for packed"),
        (lambda x: rejection_mask(x, x, "k4", 1.0), "mode='k4' is unknown; choose one of token_k1, token_k2"),
        (lambda x: rejection_mask(x, x, "token_k3", 1.0, lower=0.5), "mode='token_k3' has no lower bound, got 0.5"),
    ],
)
def test_masks_refuse_bad_input(call, words):
    with pytest.raises(ValueError, match=words):
        call(torch.ones(20))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
@pytest.mark.parametrize("distance", [-200.0, 200.0])
def test_kl_clip_keeps_a_ratio_of_e_to_the_200_finite(kl, distance, dtype):
    """Loss and gradient; without it, k3 overflows."""
    logprobs = torch.full((2,), -1.0, dtype=dtype, requires_grad=True)
    arguments = logprobs, torch.zeros(2, dtype=dtype), torch.full((2,), 0.5)
    reference = torch.tensor([-1.0 + distance, -1.2], dtype=dtype)
    found = []
    for clip in (None, 10.0):
        objective = dataclasses.replace(PRESETS["dapo"], beta=0.1, kl=kl, kl_clip=clip)
        loss = policy_loss(*arguments, objective, ref_logprobs=reference).loss
        (slope,) = torch.autograd.grad(loss, logprobs)
        found.append((loss.item(), *slope.tolist()))
    assert math.isfinite(sum(found[0])) == (kl != "k3" or distance < 0)
    assert math.isfinite(sum(found[1]))
    assert abs(found[1][0]) < 0.1 * 0.5 * 11
    assert found[1][1] == 0
    assert found[1][2] == found[0][2] != 0
