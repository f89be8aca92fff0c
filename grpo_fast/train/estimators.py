"""Advantages of whole batches by name: `advantage_estimator` in a configuration, in place of baseline and scale.

An estimator is a function of the rewards of P prompts with G completions each. It takes any of these by name:

    rewards          ``[P, G]`` float64, NaN for a completion without a reward
    lengths          ``[P, G]`` float64, tokens of the completion
    greedy_rewards   ``[P]`` float64, the reward of one more completion, of the likeliest tokens (it is sampled only for
                     an estimator that takes it)
    advantage_k, length_penalty, length_penalty_share   these fields of the configuration, where they are set

and returns advantages ``[P, G]``; NaN counts as 0.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from grpo_fast.config import GRPOConfig
from grpo_fast.errors import UserError, one_line, say, shown
from grpo_fast.named_functions import load_function
from grpo_fast.train.selection import best_ones, right_ones

SETTINGS = ("advantage_k", "length_penalty", "length_penalty_share")
ARGUMENTS = ("rewards", "lengths", "greedy_rewards", *SETTINGS)


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


def remax(rewards: Tensor, greedy_rewards: Tensor) -> Tensor:
    """ReMax: the reward less that of the greedy completion."""
    return rewards - greedy_rewards[:, None]


def pass_at_k(rewards: Tensor, advantage_k: int = 4) -> Tensor:
    """Pass@k training: the expected advantage of the sets of k completions that a completion belongs to."""
    _check_k(advantage_k, rewards)
    wrong = ~((rewards == 0) | (rewards == 1) | rewards.isnan())
    if bool(wrong.any()):
        raise ValueError(f"rewards must be 0 or 1, got {rewards[wrong][0].item():g}; pkpo takes any")
    known = ~rewards.isnan()
    values = torch.zeros_like(rewards)
    for row, reward in enumerate(rewards):
        total, bad = int(known[row].sum()), int((reward == 0).sum())
        # With fewer than k rewards, of all of them.
        k = min(advantage_k, total)
        mean = 1 - math.comb(bad, k) / max(math.comb(total, k), 1)
        spread = math.sqrt(mean * (1 - mean))
        if spread:
            fails = math.comb(bad - 1, k - 1) / math.comb(total - 1, k - 1)
            # A set with a wrong completion fails if the others of it are wrong, too.
            values[row] = (1 - mean - fails * (reward == 0).to(reward.dtype)) / spread
    return values.masked_fill(~known, torch.nan)


def pkpo(rewards: Tensor, advantage_k: int = 4) -> Tensor:
    """PKPO: how much a completion adds to the highest reward of k, over all sets of k that it belongs to."""
    _check_k(advantage_k, rewards)
    values = torch.full_like(rewards, torch.nan)
    for row, reward in enumerate(rewards):
        places = (~reward.isnan()).nonzero().squeeze(1)
        total, k = len(places), min(advantage_k, len(places))
        order = places[reward[places].argsort(stable=True)]
        ranked, gains = reward[order], torch.zeros(total, dtype=rewards.dtype)
        for place in range(total):
            # Its gain over the best of the other k - 1, which is the one at `best`; without others, its reward.
            gain = (
                ranked[place]
                if k == 1
                else sum((ranked[place] - ranked[best]) * math.comb(best, k - 2) for best in range(k - 2, place))
            )
            gains[place] = gain / math.comb(total, k)
        # The estimate of the gradient is a sum over the group, where a loss takes the mean.
        values[row, order] = total * gains
    return values


def grpo_passk(rewards: Tensor) -> Tensor:
    """Only the best completion: its lead over the second best, over the standard deviation of the group."""
    ranked, order = rewards.nan_to_num(nan=-torch.inf).sort(dim=1, descending=True, stable=True)
    lead = (ranked[:, 0] - ranked[:, 1]).nan_to_num(nan=0.0, posinf=0.0)
    scaled = lead / (_deviation(rewards) + 1e-6)
    return torch.zeros_like(rewards).scatter(1, order[:, :1], scaled[:, None]).masked_fill(rewards.isnan(), torch.nan)


def length_penalised(rewards: Tensor, lengths: Tensor, length_penalty: float = 0.2) -> Tensor:
    """Rewards that shrink with the length of the completion among the right ones, less the mean of the others."""
    values = _shortened(rewards, lengths, length_penalty)
    count = (~values.isnan()).sum(1, keepdim=True)
    return _centred(values) * count / (count - 1).clamp(min=1)


def grpo_lambda(
    rewards: Tensor, lengths: Tensor, length_penalty: float = 0.2, length_penalty_share: float = 0.2
) -> Tensor:
    """GRPO-lambda: the same penalty in the groups of the highest mean reward alone, normalised as in GRPO."""
    count = round(length_penalty_share * len(rewards))
    best = rewards.nanmean(1).nan_to_num(nan=-torch.inf).argsort(descending=True, stable=True)[:count]
    values = rewards.clone()
    values[best] = _shortened(rewards[best], lengths[best], length_penalty)
    centred = _centred(values)
    # Means of equal numbers may differ from them by rounding.
    return torch.where(centred.abs() > 1e-12, centred / (_deviation(values)[:, None] + 1e-4), 0.0 * centred)


def _shortened(rewards: Tensor, lengths: Tensor, penalty: float) -> Tensor:
    """``r (1 - penalty * sigmoid((length - mean) / std))``, mean and deviation of the group's rewarded completions."""
    if bool((rewards < 0).any()):
        raise ValueError(f"rewards must be at least 0, got {rewards[rewards < 0][0].item():g}")
    counted = lengths.masked_fill(~(rewards > 0), torch.nan)
    centred = lengths - counted.nanmean(1, keepdim=True)
    spread = _deviation(counted, correction=0)[:, None]
    scaled = torch.where(spread > 0, centred / spread.clamp(min=1e-12), 0.0)
    return torch.where(rewards > 0, rewards * (1 - penalty * torch.sigmoid(scaled)), rewards)


def _deviation(values: Tensor, correction: int = 1) -> Tensor:
    """Standard deviation ``[P]`` without NaN, 0 of fewer than two numbers."""
    count = (~values.isnan()).sum(1)
    squares = _centred(values).square().nansum(1)
    return torch.where(count > 1, squares / (count - correction).clamp(min=1), 0.0).sqrt()


def _check_k(k: int, rewards: Tensor) -> None:
    if k > rewards.shape[1]:
        raise ValueError(f"advantage_k={k} must be at most the {rewards.shape[1]} completions of a prompt")


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
    "remax": Estimator(
        remax,
        "ReMax, 2310.10505",
        "`r - r_greedy`, the reward of one more completion of the likeliest tokens",
        "`remax`",
    ),
    "pass_at_k": Estimator(
        pass_at_k,
        "Pass@k Training, 2508.10751",
        "for rewards 0 and 1, the mean of `(R - mean) / std` over the sets of `advantage_k` completions with this one, "
        "`R` 1 if one of them is right; mean and std over all sets",
        "none",
    ),
    "pkpo": Estimator(
        pkpo,
        "PKPO, 2505.15201",
        "`G / C(G, k) Σ_sets (highest r of the set - highest r of the others in it)` over the sets of "
        "`k = advantage_k` completions with this one",
        "none",
    ),
    "grpo_passk": Estimator(
        grpo_passk,
        "2503.19595",
        "for the best completion of the group `(r - second best) / std`, else 0",
        "`grpo_passk`",
    ),
    "length_penalised": Estimator(
        length_penalised,
        "2502.04463",
        "`r (1 - length_penalty σ((abs(o) - mean) / std))` less the mean of the others; mean and std of the lengths of "  # noqa: RUF001
        "the group's rewarded completions",
        "none",
    ),
    "grpo_lambda": Estimator(
        grpo_lambda,
        "GRPO-λ, 2505.18086",
        "the same rewards in the share `length_penalty_share` of the groups with the highest mean reward, `r` in the "
        "others; then `(. - mean) / std` of the group",
        "none",
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


def check_estimator(config: GRPOConfig) -> None:
    """Load the configuration's estimator.

    Raises:
        UserError: it cannot be used, or does not take a setting that is set.
    """
    if config.advantage_estimator is None:
        return
    taken = inspect.signature(load_estimator(config.advantage_estimator)).parameters
    for name in SETTINGS:
        value = getattr(config, name)
        if value is not None and name not in taken:
            raise UserError(f"{name}={shown(value)} has no effect: {config.advantage_estimator!r} does not take it")


def needs_greedy(config: GRPOConfig) -> bool:
    """Whether the advantages need the reward of a greedy completion of each prompt."""
    name = config.advantage_estimator
    return name is not None and "greedy_rewards" in inspect.signature(load_estimator(name)).parameters


def estimate_advantages(
    name: str, rewards: Tensor, lengths: Tensor, greedy_rewards: Tensor | None = None, **settings: Any
) -> Tensor:
    """Advantages ``[P, G]`` float64 from rewards and lengths ``[P, G]``, by the estimator called `name`.

    `greedy_rewards` are ``[P]``; `settings` are fields of the configuration, None where the function's own default
    holds.

    Raises:
        UserError: the function fails, or does not return finite numbers of that shape.
    """
    function = load_estimator(name)
    given: dict[str, Any] = {"rewards": rewards.double().clone(), "lengths": lengths.double()}
    if greedy_rewards is not None:
        given["greedy_rewards"] = greedy_rewards.double()
    given |= {name: value for name, value in settings.items() if value is not None}
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
