"""Advantages of whole batches by name: `advantage_estimator` in a configuration, in place of baseline and scale.

An estimator is a function of the rewards of P prompts with G completions each. It takes any of these by name:

    rewards   ``[P, G]`` float64, NaN for a completion without a reward
    lengths   ``[P, G]`` float64, tokens of the completion

and returns advantages ``[P, G]``; NaN counts as 0.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from grpo_fast.errors import UserError, one_line, say
from grpo_fast.named_functions import load_function
from grpo_fast.train.selection import best_ones, right_ones

ARGUMENTS = ("rewards", "lengths")


class Estimator(NamedTuple):
    """An estimator with its paper and its name in verl."""

    function: Callable[..., Tensor]
    paper: str
    formula: str
    verl: str


def _whitened(values: Tensor, lengths: Tensor) -> Tensor:
    """Less the mean of the batch's tokens, over their standard deviation (Bessel's correction); every token counts."""
    weight = lengths.masked_fill(values.isnan(), 0.0)
    values, count = values.nan_to_num(), weight.sum()
    mean = (weight * values).sum() / count
    variance = (weight * (values - mean).square()).sum() / (count - 1).clamp(min=1.0)
    return ((values - mean) * torch.rsqrt(variance + 1e-8)).masked_fill(weight == 0, torch.nan)


def _centred(rewards: Tensor) -> Tensor:
    return rewards - rewards.nanmean(1, keepdim=True)


def reinforce_plus_plus(rewards: Tensor, lengths: Tensor) -> Tensor:
    """REINFORCE++: the reward, normalised over the tokens of the batch."""
    return _whitened(rewards, lengths)


def reinforce_plus_plus_baseline(rewards: Tensor, lengths: Tensor) -> Tensor:
    """REINFORCE++ with the mean of the group as its baseline, then normalised over the tokens of the batch."""
    return _whitened(_centred(rewards), lengths)


def opo(rewards: Tensor, lengths: Tensor) -> Tensor:
    """OPO: the reward less the mean of the group in which longer completions weigh more."""
    weight = lengths.masked_fill(rewards.isnan(), 0.0)
    return rewards - (weight * rewards.nan_to_num()).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp(min=1.0)


def gpg(rewards: Tensor) -> Tensor:
    """GPG: the centred reward, times the share of the batch whose groups have a gradient, inverted."""
    values = _centred(rewards)
    learns = (values.nan_to_num().abs().amax(1) > 1e-12).sum()
    return values * len(values) / learns.clamp(min=1)


def maxrl(rewards: Tensor) -> Tensor:
    """MaxRL: the centred reward over the mean of the group, so that hard prompts weigh more; 0 if the mean is 0."""
    if bool((rewards < 0).any()):
        raise ValueError(f"rewards must be at least 0, got {rewards[rewards < 0][0].item():g}")
    mean = rewards.nanmean(1, keepdim=True)
    return torch.where(mean > 0, _centred(rewards) / mean.clamp(min=torch.finfo(mean.dtype).tiny), 0.0)


def raft(rewards: Tensor) -> Tensor:
    """RAFT: 1 for the completion of the highest reward of each group, which alone is trained on."""
    return best_ones(rewards).double()


def rejection_sampling(rewards: Tensor) -> Tensor:
    """Online rejection sampling: 1 for every completion whose reward is at least 1; only these are trained on."""
    return right_ones(rewards).double()


ESTIMATORS = {
    "reinforce_plus_plus": Estimator(
        reinforce_plus_plus,
        "REINFORCE++, 2501.03262",
        "`(r - mean) / std` over the tokens of the batch",
        "`reinforce_plus_plus`",
    ),
    "reinforce_plus_plus_baseline": Estimator(
        reinforce_plus_plus_baseline,
        "REINFORCE++, 2501.03262",
        "`r - mean of the group`, then `(. - mean) / std` over the tokens of the batch",
        "`reinforce_plus_plus_baseline`",
    ),
    "opo": Estimator(opo, "OPO, 2505.23585", "`r - Σ_i abs(o_i) r_i / Σ_i abs(o_i)` of the group", "`opo`"),
    "gpg": Estimator(
        gpg,
        "GPG, 2504.02546",
        "`a (r - mean of the group)`, `a` groups over groups with a gradient",
        "`gpg`, whose `a` is completions over completions with a reward other than 0",
    ),
    "maxrl": Estimator(maxrl, "MaxRL, 2602.02710", "`(r - mean of the group) / mean of the group`", "none"),
    "raft": Estimator(raft, "RAFT, 2304.06767", "1 for the best of the group; the others are left out", "none"),
    "rejection_sampling": Estimator(
        rejection_sampling, "RAFT of 2504.11343", "1 where the reward is at least 1; the others are left out", "none"
    ),
}


def estimator_table() -> str:
    """The table of the documentation, in Markdown."""
    lines = ["| `advantage_estimator` | paper | advantage | in verl (`adv_estimator`) |", "|---|---|---|---|"]
    lines += [f"| `{name}` | {e.paper} | {e.formula} | {e.verl} |" for name, e in ESTIMATORS.items()]
    return "\n".join(lines) + "\n"


def load_estimator(name: str) -> Callable[..., Tensor]:
    """A built-in estimator, or the user's function.

    Raises:
        UserError: there is no such function, or it needs an argument that is not in `ARGUMENTS`.
    """
    if name in ESTIMATORS:
        return ESTIMATORS[name].function
    function = load_function(name, "advantage_estimator")
    for parameter in inspect.signature(function).parameters.values():
        if parameter.default is parameter.empty and parameter.name not in ARGUMENTS:
            raise UserError(
                f"advantage_estimator: {name!r} needs {parameter.name!r}; it may take {', '.join(ARGUMENTS)}, "
                "and parameters with defaults"
            )
    return function


def estimate_advantages(name: str, rewards: Tensor, lengths: Tensor) -> Tensor:
    """Advantages ``[P, G]`` float64 from rewards and lengths ``[P, G]``, by the estimator called `name`.

    Raises:
        UserError: the function fails, or does not return finite numbers of that shape.
    """
    function = load_estimator(name)
    given = {"rewards": rewards.double().clone(), "lengths": lengths.double()}
    taken = inspect.signature(function).parameters
    try:
        values = function(**{name: value for name, value in given.items() if name in taken})
    except Exception as error:
        raise UserError(f"advantage_estimator: {name!r} failed: {type(error).__name__}: {one_line(error)}") from None
    if not isinstance(values, Tensor) or values.shape != rewards.shape:
        found = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise UserError(f"advantage_estimator: {name!r} must return a tensor {list(rewards.shape)}, got {found}")
    values = values.detach().double().nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf)
    if bool(values.isinf().any()):
        raise UserError(f"advantage_estimator: {name!r} returned an infinite advantage")
    return values


if __name__ == "__main__":
    say(estimator_table().rstrip())
