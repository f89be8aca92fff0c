"""The policy objective as data: one formula for all published variants.

    L = sum_t w_t * ( rho_t * l(logp_t, old_t, A_t) + beta * kl(logp_t, ref_t) - entropy_coef * entropy_t )

`PolicyObjective` describes ``l``, the ratio's level and the KL term; `token_weights` gives ``w_t``, which carry the
mask and the normaliser of a whole optimizer step, so that any split into microbatches adds up to the same gradient.
With the ratio ``r = exp(logp - old)`` of a token, ``exp(mean_t(logp - old))`` of a sequence, or the product of the
sequence's ratios, and sg() a stopped gradient:

    kind         l(logp, old, A)                                       source
    "clip"       -min(min(r, delta) A, clip(r, 1-eps, 1+eps_high) A)   PPO; DeepSeekMath, arXiv 2402.03300, eq. 3;
                                                                       delta: dual clip, arXiv 1912.09729, eq. 8
    "cispo"      -sg(min(r, eps_high)) A logp                          MiniMax-M1, arXiv 2506.13585, eq. 4
    "sapo"       -(4/tau) sigmoid(tau (r - 1)) A, tau by the sign of A SAPO, arXiv 2511.20347
    "vespo"      -sg(r^k exp(lambda (1 - r))) A logp, k and lambda by  VESPO, arXiv 2602.10693
                 the sign of A
    "reinforce"  -A logp                                               REINFORCE
    "function"   a function of these tensors in plain PyTorch          see `custom_loss.py`

As in TRL, cispo's ``epsilon_high`` bounds the ratio itself, whereas clip's is a distance from 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import Tensor

from grpo_kernels import published_losses
from grpo_kernels._checks import require, require_choice, require_finite_positive, require_number
from grpo_kernels.custom_loss import SETTINGS, check_function, own_defaults, parameters_of
from grpo_kernels.token_weights import AGGREGATIONS

KINDS = ("clip", "cispo", "sapo", "vespo", "reinforce", "function")
LEVELS = ("token", "sequence", "product")

KL_ESTIMATORS = ("k1", "k2", "k3")


@dataclass(frozen=True)
class PolicyObjective:
    """What is minimised for each token; see the table at the top of this module.

    Attributes:
        kind: ``"clip"``, ``"cispo"``, ``"sapo"``, ``"vespo"``, ``"reinforce"`` or ``"function"``.
        epsilon: lower clip distance of ``"clip"``, above 0; 1 or more clips nothing below, and infinity nothing at
            all.
        epsilon_high: upper clip distance of ``"clip"`` (None: `epsilon`), or the bound of ``"cispo"``'s ratio.
        delta: upper bound of the unclipped ratio in ``"clip"`` (None: no bound). It matters where A < 0.
        level: whether the ratio belongs to a ``"token"``, to a ``"sequence"`` as the geometric mean of its tokens'
            (GSPO, arXiv 2507.18071, eq. 7), or to a sequence as their ``"product"`` (RLOO, VESPO).
        beta: weight of the KL term, >= 0.
        kl: KL estimator, ``"k1"``, ``"k2"`` or ``"k3"``.
        kl_bias_correction: multiply the KL estimate by the ratio (DeepSeek-V3.2; TRL's `use_bias_correction_kl`).
        kl_clip: bound of the KL estimate's magnitude, beyond which it has no gradient (None: no bound). verl always
            bounds k3 by 10.
        entropy_coef: weight of the entropy bonus.
        sapo_temperature_pos, sapo_temperature_neg: ``"sapo"``'s temperature for A > 0 and for A <= 0.
        vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg: ``"vespo"``'s power and decay of the ratio for
            A > 0 and for A < 0.
        covariance_ratio, covariance_low, covariance_high: the tokens that `covariance_mask` selects for a `function`
            that takes `selected`.
        covariance_kl: weight of the selected tokens' KL penalty in ``PRESETS["kl_cov"]``.
        aggregation: the normaliser that `token_weights` includes in the weights:
            ``"sequence_mean"``: 1 / (S * length of the sequence),
            ``"token_mean"``: 1 / (tokens of the step),
            ``"constant_length"``: 1 / (S * a constant length),
            ``"sequence_sum"``: 1 / S.
        function: the loss of ``"function"``; `register_objective` describes it.
        scales_with_advantage: whether `function` is 0, with a gradient of 0, wherever the advantage is 0. Such tokens
            then cost nothing, as with every other kind.

    Raises:
        ValueError: a field is out of range or unknown, or `function` cannot be used.
    """

    kind: str = "clip"
    epsilon: float = 0.2
    epsilon_high: float | None = None
    delta: float | None = None
    level: str = "token"
    beta: float = 0.0
    kl: str = "k3"
    kl_bias_correction: bool = False
    kl_clip: float | None = None
    entropy_coef: float = 0.0
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0
    covariance_ratio: float = 2e-4
    covariance_low: float | None = None
    covariance_high: float | None = None
    covariance_kl: float = 1.0
    aggregation: str = "sequence_mean"
    function: Callable[..., Tensor] | None = None
    scales_with_advantage: bool = False

    def __post_init__(self):
        choices = {"kind": KINDS, "level": LEVELS, "kl": KL_ESTIMATORS, "aggregation": AGGREGATIONS}
        for name, value in vars(self).items():
            if name in choices:
                require_choice("PolicyObjective", name, value, choices[name])
            elif name in ("beta", "entropy_coef"):
                require_number("PolicyObjective", name, value)
                require(math.isfinite(value), f"PolicyObjective: {name} must be finite, got {value}")
            elif name not in ("epsilon", "kl_bias_correction", "function", "scales_with_advantage"):
                require_finite_positive("PolicyObjective", name, value)
        require_number("PolicyObjective", "epsilon", self.epsilon)
        require(self.epsilon > 0, f"PolicyObjective: epsilon must be above 0, got {self.epsilon}")
        require(self.beta >= 0, f"PolicyObjective: beta must be >= 0, got {self.beta}")
        low, high = self.covariance_low, self.covariance_high
        require(
            low is None or high is None or low < high,
            f"PolicyObjective: covariance_low={low} must be below covariance_high={high}",
        )
        if self.kind == "cispo":
            require(self.epsilon_high is not None, "PolicyObjective: kind='cispo' needs epsilon_high (the paper's 5.0)")
        require(
            (self.kind == "function") == (self.function is not None),
            f"PolicyObjective: kind='function' and function belong together, got kind={self.kind!r} and "
            f"function={self.function!r}",
        )
        if self.function is not None:
            _check_function(self)
        elif self.delta is not None:
            require(
                self.delta >= 1 + self.upper_epsilon,
                f"PolicyObjective: delta must be at least 1 + epsilon_high = {1 + self.upper_epsilon}, "
                f"got {self.delta}",
            )

    @property
    def upper_epsilon(self) -> float:
        return self.epsilon if self.epsilon_high is None else self.epsilon_high

    @property
    def lower_bound(self) -> float:
        """The ratio below which ``"clip"`` is flat where A < 0."""
        return 1 - self.epsilon

    @property
    def upper_bound(self) -> float:
        """The ratio above which ``"clip"`` is flat where A > 0, or the bound of ``"cispo"``'s ratio."""
        return self.upper_epsilon if self.kind == "cispo" else 1 + self.upper_epsilon

    @property
    def uses_reference(self) -> bool:
        """Whether the loss needs log-probabilities of a reference policy, as its KL term does."""
        return self.beta != 0.0 or self._takes("ref_logprobs")

    @property
    def needs_selection(self) -> bool:
        """Whether the loss needs `selected` tokens."""
        return self._takes("selected")

    @property
    def whole_sequences(self) -> bool:
        """Whether a token's coefficient depends on other tokens of its sequence."""
        return self.level != "token" or self._takes("cu_seqlens")

    @property
    def advantage_alone(self) -> bool:
        """Whether a token of advantage 0 has no gradient whatever its log-probability."""
        scales = self.function is None or self.scales_with_advantage
        return scales and self.beta == 0.0 and self.entropy_coef == 0.0

    def _takes(self, name: str) -> bool:
        return self.function is not None and name in parameters_of(self.function)

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that `function` may take."""
        return {name: getattr(self, name) for name in SETTINGS}


@lru_cache(maxsize=256)
def _check_function(objective: PolicyObjective) -> None:
    """Try the function out, once for each objective."""
    assert objective.function is not None
    check_function(objective.function, objective.settings, objective.scales_with_advantage)


def function_objective(function: Callable[..., Tensor], **fields: Any) -> PolicyObjective:
    """The objective of a loss function, with the function's own defaults; see `register_objective`."""
    made = {"aggregation": "token_mean", **own_defaults(function), **fields}
    return PolicyObjective(kind="function", function=function, **made)


class _Presets(dict):
    def __missing__(self, name):
        raise KeyError(f"PRESETS has no {name!r}; choose one of {', '.join(self)}")


PRESETS: dict[str, PolicyObjective] = _Presets(
    {
        # TRL's loss_type values, with TRL's meaning.
        "grpo": PolicyObjective(aggregation="sequence_mean"),
        "bnpo": PolicyObjective(aggregation="token_mean"),
        "dr_grpo": PolicyObjective(aggregation="constant_length"),
        "dapo": PolicyObjective(aggregation="token_mean"),
        "cispo": PolicyObjective(kind="cispo", epsilon_high=5.0, aggregation="token_mean"),
        "sapo": PolicyObjective(kind="sapo", aggregation="sequence_mean"),
        "luspo": PolicyObjective(level="sequence", aggregation="sequence_sum"),
        "vespo": PolicyObjective(kind="vespo", level="product", aggregation="token_mean"),
        # Named by their papers. In TRL: importance_sampling_level="sequence", RLOOTrainer, delta.
        "gspo": PolicyObjective(level="sequence", epsilon=3e-4, epsilon_high=4e-4, aggregation="sequence_mean"),
        "rloo": PolicyObjective(level="product", aggregation="sequence_mean"),
        "dual_clip": PolicyObjective(delta=3.0, aggregation="token_mean"),
        # The policy gradient with raw rewards (naive) or with a baseline, and its importance-weighted form.
        "reinforce": PolicyObjective(kind="reinforce", aggregation="token_mean"),
        "unclipped": PolicyObjective(epsilon=math.inf, aggregation="token_mean"),
        "gpg": PolicyObjective(kind="reinforce", aggregation="token_mean"),
        # Functions, which autograd differentiates.
        "dppo_tv": function_objective(published_losses.dppo_tv, scales_with_advantage=True),
        "dppo_kl": function_objective(published_losses.dppo_kl, scales_with_advantage=True),
        "gmpo": function_objective(published_losses.gmpo, aggregation="sequence_mean", scales_with_advantage=True),
        "kimi": function_objective(published_losses.kimi, aggregation="sequence_sum"),
        "dro": function_objective(published_losses.dro),
        "clip_cov": function_objective(
            published_losses.clip_cov, covariance_low=1.0, covariance_high=5.0, scales_with_advantage=True
        ),
        "kl_cov": function_objective(published_losses.kl_cov),
    }
)
BUILT_IN = frozenset(PRESETS)


def register_objective(name: str, function: Callable[..., Tensor], **fields: Any) -> PolicyObjective:
    """Add a loss of your own to `PRESETS`, as a plain PyTorch function of ``[N]`` tensors.

    The head costs what a built-in objective costs: autograd differentiates the function on ``[N]`` tensors, and the
    derivative takes the place of a built-in one. KL term, entropy bonus, sampler correction and weights are added as
    for every objective, so the function returns the loss of each token without them.

    Args:
        name: the preset's name. It replaces one of your own, but no built-in one.
        function: returns the loss of each token ``[N]``. It takes any of these by name: ``logprobs``, ``old_logprobs``
            (`logprobs` without a gradient on the first update), ``advantages``, ``ref_logprobs``, ``ratio`` (of the
            objective's `level`, differentiable) and ``selected`` (1 for the tokens of `covariance_mask`, else 0), all
            ``[N]``; ``cu_seqlens [S + 1]``, offsets of whole sequences; and the fields ``epsilon``, ``epsilon_high``,
            ``delta`` and ``covariance_kl``. Without ``cu_seqlens`` it may get any
            part of the tokens, so a token's loss must depend on that token alone. With it, it gets counted tokens of
            whole sequences, and no token may depend on another sequence.
        **fields: fields of `PolicyObjective`; by default ``aggregation="token_mean"``, and the function's own defaults
            for the fields that it takes.

    Returns:
        The objective, which is now ``PRESETS[name]``.

    Raises:
        ValueError: the name is that of a built-in preset, or the function fails on a few tokens or breaks the rules
            above.
        TypeError: `function` is no function.
    """
    require(name not in BUILT_IN, f"register_objective: {name!r} is a built-in preset; choose another name")
    PRESETS[name] = made = function_objective(function, **fields)
    return made
