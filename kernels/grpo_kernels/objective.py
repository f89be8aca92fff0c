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

As in TRL, cispo's ``epsilon_high`` bounds the ratio itself, whereas clip's is a distance from 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from grpo_kernels._checks import require, require_choice, require_finite_positive, require_number
from grpo_kernels.token_weights import AGGREGATIONS

KINDS = ("clip", "cispo", "sapo", "vespo", "reinforce")
LEVELS = ("token", "sequence", "product")

KL_ESTIMATORS = ("k1", "k2", "k3")


@dataclass(frozen=True)
class PolicyObjective:
    """What is minimised for each token; see the table at the top of this module.

    Attributes:
        kind: ``"clip"``, ``"cispo"``, ``"sapo"``, ``"vespo"`` or ``"reinforce"``.
        epsilon: lower clip distance of ``"clip"``, above 0; 1 or more clips nothing below, and infinity nothing at
            all.
        epsilon_high: upper clip distance of ``"clip"`` (None: `epsilon`), or the bound of ``"cispo"``'s ratio.
        delta: upper bound of the unclipped ratio in ``"clip"`` (None: no bound). It matters where A < 0.
        level: whether the ratio belongs to a ``"token"``, to a ``"sequence"`` as the geometric mean of its tokens'
            (GSPO, arXiv 2507.18071, eq. 7), or to a sequence as their ``"product"`` (RLOO, VESPO).
        beta: weight of the KL term, >= 0.
        kl: KL estimator, ``"k1"``, ``"k2"`` or ``"k3"``.
        kl_bias_correction: multiply the KL estimate by the ratio (DeepSeek-V3.2; TRL's `use_bias_correction_kl`).
        entropy_coef: weight of the entropy bonus.
        sapo_temperature_pos, sapo_temperature_neg: ``"sapo"``'s temperature for A > 0 and for A <= 0.
        vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg: ``"vespo"``'s power and decay of the ratio for
            A > 0 and for A < 0.
        aggregation: the normaliser that `token_weights` includes in the weights:
            ``"sequence_mean"``: 1 / (S * length of the sequence),
            ``"token_mean"``: 1 / (tokens of the step),
            ``"constant_length"``: 1 / (S * a constant length),
            ``"sequence_sum"``: 1 / S.

    Raises:
        ValueError: a field is out of range or unknown.
    """

    kind: str = "clip"
    epsilon: float = 0.2
    epsilon_high: float | None = None
    delta: float | None = None
    level: str = "token"
    beta: float = 0.0
    kl: str = "k3"
    kl_bias_correction: bool = False
    entropy_coef: float = 0.0
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0
    aggregation: str = "sequence_mean"

    def __post_init__(self):
        choices = {"kind": KINDS, "level": LEVELS, "kl": KL_ESTIMATORS, "aggregation": AGGREGATIONS}
        for name, value in vars(self).items():
            if name in choices:
                require_choice("PolicyObjective", name, value, choices[name])
            elif name in ("beta", "entropy_coef"):
                require_number("PolicyObjective", name, value)
                require(math.isfinite(value), f"PolicyObjective: {name} must be finite, got {value}")
            elif name not in ("epsilon", "kl_bias_correction"):
                require_finite_positive("PolicyObjective", name, value)
        require_number("PolicyObjective", "epsilon", self.epsilon)
        require(self.epsilon > 0, f"PolicyObjective: epsilon must be above 0, got {self.epsilon}")
        require(self.beta >= 0, f"PolicyObjective: beta must be >= 0, got {self.beta}")
        if self.kind == "cispo":
            require(self.epsilon_high is not None, "PolicyObjective: kind='cispo' needs epsilon_high (the paper's 5.0)")
        if self.delta is not None:
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
        return self.beta != 0.0

    @property
    def advantage_alone(self) -> bool:
        """Whether a token of advantage 0 has no gradient whatever its log-probability."""
        return not self.uses_reference and self.entropy_coef == 0.0


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
    }
)
