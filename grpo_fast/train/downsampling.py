"""Which completions of a group are trained on, chosen after they were rewarded and before the backward."""

from __future__ import annotations

import torch
from torch import Tensor


def kept_completions(rewards: Tensor, lengths: Tensor, count: int, keep: str) -> Tensor:
    """The `count` completions of each group to train on.

    Args:
        rewards: ``[P, G]``, NaN for a completion without a reward, which is kept last.
        lengths: ``[P, G]``, tokens of the completions.
        count: from 2 to G.
        keep: ``"max_variance"``, the subset whose rewards have the largest variance, which consists of the highest and
            the lowest ones (PODS, arXiv 2504.13818); ``"shortest"`` or ``"token_efficiency"``, the shortest ones or
            those of the highest reward per token (GFPO, arXiv 2508.09726).

    Returns:
        bool ``[P, G]``, True for `count` completions of each group. Which of equal ones are kept depends on their
        order alone.
    """
    if keep == "max_variance":
        order = rewards.nan_to_num(nan=torch.inf).argsort(dim=1, stable=True)
        places = torch.stack([_max_variance(row[index], count) for row, index in zip(rewards, order, strict=True)])
        chosen = order.gather(1, places)
    else:
        worth = -lengths if keep == "shortest" else rewards / lengths
        worth = worth.masked_fill(rewards.isnan(), -torch.inf)
        chosen = worth.argsort(dim=1, descending=True, stable=True)[:, :count]
    return torch.zeros_like(rewards, dtype=torch.bool).scatter(1, chosen, True)


def _max_variance(ascending: Tensor, count: int) -> Tensor:
    """The places of the `count` numbers of largest variance among ascending ones, NaN last."""
    known = int((~ascending.isnan()).sum())
    if known <= count:
        return torch.arange(count)
    subsets = [[*range(low), *range(known - count + low, known)] for low in range(count + 1)]
    places = torch.tensor(subsets)
    return places[ascending[places].var(1, correction=0).argmax()]
