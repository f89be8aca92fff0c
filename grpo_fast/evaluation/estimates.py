"""Estimates of a score from sampled completions: pass@k, standard errors and confidence intervals.

Every estimate is a mean over prompts. Completions of the same prompt are correlated, so standard errors and intervals
treat prompts, not completions, as independent.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

LEVEL = 0.95
RESAMPLES = 4000
# Indices that are drawn at once.
_CHUNK = 1 << 22


class Estimate(NamedTuple):
    """A mean over prompts, its 95% interval and its standard error; NaN where they cannot be estimated."""

    value: float
    low: float
    high: float
    standard_error: float


def pass_at_k(correct: Tensor, samples: Tensor, k: int) -> Tensor:
    """Unbiased estimate, for each prompt, of the probability that at least one of `k` completions is correct.

    ``1 - C(n - c, k) / C(n, k)`` (Codex paper, arXiv 2107.03374, section 2.1), computed as a product of `k` factors.

    Args:
        correct: number ``c`` of correct completions of each prompt, ``[P]``.
        samples: number ``n`` of completions of each prompt, ``[P]``.
        k: at least 1.

    Returns:
        ``[P]`` float64; NaN where a prompt has fewer than `k` completions.
    """
    drawn = torch.arange(k, dtype=torch.float64)
    n, c = samples.double()[:, None], correct.double()[:, None]
    all_wrong = ((n - c - drawn).clamp(min=0) / (n - drawn)).prod(1)
    return torch.where(samples >= k, 1 - all_wrong, math.nan)


def estimate(values: Tensor, seed: int = 0, shares: bool = True) -> Estimate:
    """The mean of ``[P]`` values, one for each prompt, without NaN. `shares` as in `bootstrap_interval`.

    If all prompts have equally many completions, the standard error is the clustered one (arXiv 2411.00640, section
    2.2).
    """
    known = values[~values.isnan()].double()
    if not len(known):
        return Estimate(math.nan, math.nan, math.nan, math.nan)
    error = known.std().item() / math.sqrt(len(known)) if len(known) > 1 else math.nan
    return Estimate(known.mean().item(), *bootstrap_interval(known, seed, shares), error)


def bootstrap_interval(values: Tensor, seed: int = 0, shares: bool = True, level: float = LEVEL) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of `values` ``[P]`` (P >= 1, no NaN), with random seed `seed`.

    If all values are equal, resampling has no spread. For `shares` that are all 0 or all 1, the interval is then the
    exact binomial one (Clopper and Pearson); otherwise it is NaN.
    """
    count, first = len(values), values[0].item()
    tail = (1 - level) / 2
    if bool((values == first).all()):
        if not shares or first not in (0.0, 1.0):
            return math.nan, math.nan
        reach = 1 - tail ** (1 / count)
        return (0.0, reach) if first == 0 else (1 - reach, 1.0)
    generator = torch.Generator().manual_seed(seed)
    rows = max(_CHUNK // count, 1)
    means = []
    for start in range(0, RESAMPLES, rows):
        drawn = torch.randint(count, (min(rows, RESAMPLES - start), count), generator=generator)
        means.append(values[drawn].mean(1))
    low, high = torch.cat(means).quantile(torch.tensor([tail, 1 - tail], dtype=values.dtype)).tolist()
    return low, high


def score_estimates(values: Tensor, ks: list[int], threshold: float, seed: int) -> dict[str, Estimate]:
    """``mean@n`` and ``pass@k`` of one reward function's values ``[P, n]``, which are NaN where it abstained.

    A completion is correct if its value is at least `threshold`. Prompts without values, or with fewer than k, are
    left out.
    """
    found = {f"mean@{values.shape[1]}": estimate(values.nanmean(1), seed)}
    correct, samples = (values >= threshold).sum(1), (~values.isnan()).sum(1)
    return found | {f"pass@{k}": estimate(pass_at_k(correct, samples, k), seed) for k in ks}


def scores(lines: list[dict[str, Any]], num_prompts: int) -> dict[str, Tensor]:
    """The values ``[P, n]`` of every reward function in the lines of ``samples.jsonl``; NaN where it abstained."""
    values = {name: [line["rewards"][name] for line in lines] for name in lines[0]["rewards"]}
    return {
        name: torch.tensor([math.nan if v is None else v for v in each], dtype=torch.float64).reshape(num_prompts, -1)
        for name, each in values.items()
    }
