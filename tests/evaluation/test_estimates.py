"""pass@k against all subsets, and the coverage of intervals with correlated completions."""

import itertools
import math

import pytest
import torch

from grpo_fast.evaluation.estimates import bootstrap_interval, estimate, pass_at_k, score_estimates


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_pass_at_k_equals_the_share_of_subsets_with_a_correct_one(n):
    for c in range(n + 1):
        right = [index < c for index in range(n)]
        for k in range(1, n + 1):
            subsets = list(itertools.combinations(right, k))
            expected = sum(any(subset) for subset in subsets) / len(subsets)
            found = pass_at_k(torch.tensor([c]), torch.tensor([n]), k).item()
            assert found == pytest.approx(expected, abs=1e-12)


def test_pass_at_k_with_many_samples():
    """With binomial coefficients that overflow a float."""
    n, c, k = 10_000, 3, 2_000
    expected = 1 - math.comb(n - c, k) / math.comb(n, k)
    assert pass_at_k(torch.tensor([c]), torch.tensor([n]), k).item() == pytest.approx(expected, rel=1e-12)


def test_score_estimates_leave_out_prompts_with_too_few_completions():
    values = torch.tensor([[1.0, 0.0, math.nan], [0.0, 1.0, 1.0], [math.nan] * 3])
    found = score_estimates(values, [1, 3], threshold=1.0, seed=0)
    assert found["mean@3"].value == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert found["pass@1"].value == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert found["pass@3"].value == 1
    lower = score_estimates(values, [1], threshold=0.0, seed=0)
    assert lower["pass@1"].value == 1


def test_estimate_standard_error_is_clustered_by_prompt():
    values = torch.rand(9, 4, dtype=torch.float64) + torch.rand(9, 1)
    residual = (values - values.mean()).sum(1)
    clustered = math.sqrt(residual.square().sum().item() * 9 / 8) / values.numel()
    assert estimate(values.mean(1)).standard_error == pytest.approx(clustered, rel=1e-9)


def test_estimate_intervals_have_their_coverage(monkeypatch):
    """Prompts of unequal difficulty; intervals that treat completions as independent are too short."""
    monkeypatch.setattr("grpo_fast.evaluation.estimates.RESAMPLES", 500)
    trials, prompts, n = 300, 60, 8
    covered = {"bootstrap": 0, "standard error": 0, "completions alone": 0}
    for trial in range(trials):
        generator = torch.Generator().manual_seed(trial)
        # The arcsine distribution: most prompts are easy or hard. Its mean is 1/2.
        chance = torch.sin(math.pi / 2 * torch.rand(prompts, 1, generator=generator)).square()
        values = (torch.rand(prompts, n, generator=generator) < chance).double()
        found = estimate(values.mean(1), seed=trial)
        covered["bootstrap"] += found.low <= 0.5 <= found.high
        covered["standard error"] += abs(found.value - 0.5) <= 1.96 * found.standard_error
        covered["completions alone"] += abs(found.value - 0.5) <= 1.96 * values.std().item() / values.numel() ** 0.5
    # Two standard deviations of 300 trials are 2.5 points; with 60 prompts both are slightly below 95%.
    assert 0.91 <= covered["bootstrap"] / trials <= 0.98
    assert 0.91 <= covered["standard error"] / trials <= 0.98
    assert covered["completions alone"] / trials < 0.75


def test_bootstrap_interval_of_normal_values():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2000, generator=generator, dtype=torch.float64)
    low, high = bootstrap_interval(values, seed=1)
    half = 1.96 * values.std().item() / 2000**0.5
    assert (high - low) / 2 == pytest.approx(half, rel=0.05)
    assert (high + low) / 2 == pytest.approx(values.mean().item(), abs=half / 10)
    assert bootstrap_interval(values, seed=1) == (low, high)
    assert bootstrap_interval(values, seed=2) != (low, high)


def test_bootstrap_interval_of_equal_values():
    # Clopper and Pearson's limits for 0 of 32 and 32 of 32.
    low, high = bootstrap_interval(torch.zeros(32, dtype=torch.float64))
    assert (low, high) == (0, pytest.approx(0.1089, abs=1e-4))
    low, high = bootstrap_interval(torch.ones(32, dtype=torch.float64))
    assert (low, high) == (pytest.approx(1 - 0.1089, abs=1e-4), 1)
    # Values that are all 0.5, and differences that are all 0, have no interval.
    assert all(math.isnan(limit) for limit in bootstrap_interval(torch.full((3,), 0.5)))
    assert all(math.isnan(limit) for limit in bootstrap_interval(torch.zeros(3), shares=False))


def test_estimate_without_values_is_nan():
    assert all(math.isnan(part) for part in estimate(torch.full((3,), math.nan)))
    single = estimate(torch.tensor([0.5, math.nan]))
    assert single.value == 0.5
    assert all(math.isnan(part) for part in single[1:])
