"""What a sample of completions says about a score: pass@k, standard errors and intervals.

Every figure is a mean over prompts. Completions of one prompt are alike, so prompts, not completions, are what the
errors and intervals count as independent.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

LEVEL = 0.95
RESAMPLES = 4000
# Numbers that are drawn at once.
_CHUNK = 1 << 22


class Estimate(NamedTuple):
    """A mean over prompts with its 95% interval and its standard error; NaN where the sample does not tell."""

    value: float
    low: float
    high: float
    standard_error: float


def pass_at_k(correct: Tensor, samples: Tensor, k: int) -> Tensor:
    """Chance that at least one of `k` completions is right, without bias, for every prompt.

    ``1 - C(n - c, k) / C(n, k)`` of the Codex paper (arXiv 2107.03374, section 2.1), as a product of `k` factors.

    Args:
        correct: right completions ``c`` of each prompt, ``[P]``.
        samples: completions ``n`` of each prompt, ``[P]``.
        k: at least 1.

    Returns:
        ``[P]`` float64; NaN where a prompt has fewer than `k` completions.
    """
    drawn = torch.arange(k, dtype=torch.float64)
    n, c = samples.double()[:, None], correct.double()[:, None]
    all_wrong = ((n - c - drawn).clamp(min=0) / (n - drawn)).prod(1)
    return torch.where(samples >= k, 1 - all_wrong, math.nan)


def estimate(values: Tensor, seed: int = 0, shares: bool = True) -> Estimate:
    """Mean of one value a prompt, ``[P]``; prompts with NaN are left out. `shares` as in `bootstrap_interval`.

    With as many completions for every prompt, the standard error is the clustered one (arXiv 2411.00640, section 2.2).
    """
    known = values[~values.isnan()].double()
    if not len(known):
        return Estimate(math.nan, math.nan, math.nan, math.nan)
    error = known.std().item() / math.sqrt(len(known)) if len(known) > 1 else math.nan
    return Estimate(known.mean().item(), *bootstrap_interval(known, seed, shares), error)


def bootstrap_interval(values: Tensor, seed: int = 0, shares: bool = True, level: float = LEVEL) -> tuple[float, float]:
    """Percentile bootstrap of the mean of `values` ``[P]`` (P >= 1, no NaN), by `seed`.

    Resampling shows no spread where all values are equal. Of `shares` that are all 0 or all 1 the interval is then the
    exact binomial one (Clopper and Pearson); of others it is NaN.
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
