"""The policy objective as data: one algebra for every published variant.

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

import torch
from torch import Tensor

from grpo_kernels._common import (
    require,
    require_floating,
    require_number,
    require_shape,
    require_tensors,
    sequence_ids,
    sequence_offsets,
)
from grpo_kernels.kl import KL_ESTIMATORS

KINDS = ("clip", "cispo", "sapo", "vespo", "reinforce")
LEVELS = ("token", "sequence", "product")
AGGREGATIONS = ("sequence_mean", "token_mean", "constant_length", "sequence_sum")


@dataclass(frozen=True)
class PolicyObjective:
    """What is minimised for each token; see the table at the top of this module.

    Attributes:
        kind: ``"clip"``, ``"cispo"``, ``"sapo"``, ``"vespo"`` or ``"reinforce"``.
        epsilon: lower clip distance of ``"clip"``, above 0; from 1 on nothing is clipped below, and infinity never
            clips.
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
        aggregation: the normaliser that `token_weights` puts into the weights:
            ``"sequence_mean"``: 1 / (S * length of the sequence),
            ``"token_mean"``: 1 / (tokens of the step),
            ``"constant_length"``: 1 / (S * a constant length),
            ``"sequence_sum"``: 1 / S.

    Raises:
        ValueError: a field is outside what is allowed.
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
        for name, allowed in choices.items():
            value = getattr(self, name)
            require(value in allowed, f"PolicyObjective: {name}={value!r} is unknown; choose one of {allowed}")
        shapes = ("sapo_temperature_pos", "sapo_temperature_neg", "vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg")
        shapes = (*shapes, "vespo_lambda_neg")
        for name in ("epsilon", "epsilon_high", "delta", "beta", "entropy_coef", *shapes):
            require_number("PolicyObjective", name, getattr(self, name))
        require(self.epsilon > 0, f"PolicyObjective: epsilon must be above 0, got {self.epsilon}")
        for name in ("epsilon_high", "delta", *shapes):
            value = getattr(self, name)
            require(
                value is None or (math.isfinite(value) and value > 0),
                f"PolicyObjective: {name} must be a finite number above 0, got {value}",
            )
        for name in ("beta", "entropy_coef"):
            value = getattr(self, name)
            require(math.isfinite(value), f"PolicyObjective: {name} must be finite, got {value}")
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
    def uses_reference(self) -> bool:
        return self.beta != 0.0

    @property
    def advantage_alone(self) -> bool:
        """Whether a token of advantage 0 has no gradient whatever its log-probability."""
        return self.beta == 0.0 and self.entropy_coef == 0.0


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


def token_weights(
    mask: Tensor,
    aggregation: str,
    *,
    cu_seqlens: Tensor | None = None,
    num_sequences: float | None = None,
    num_tokens: float | None = None,
    constant_length: float | None = None,
) -> Tensor:
    """The weights ``w_t`` of a whole optimizer step: mask and normaliser in one tensor.

    Call it once on all sequences of the step, or on a part of them with the totals of the step given; either way the
    loss of the step is the plain sum of its microbatches' losses.

    Args:
        mask: ``[B, T]``, a sequence a row, or packed ``[N]`` with `cu_seqlens`; non-zero where a token counts.
        aggregation: one of the values described in :class:`PolicyObjective`.
        cu_seqlens: ``[S + 1]`` int offsets of the sequences of a packed mask.
        num_sequences: sequences of the step (default: those in `mask`, empty ones included, as in TRL).
        num_tokens: counted tokens of the step (default: those in `mask`).
        constant_length: the length of ``"constant_length"``; Dr. GRPO and TRL take the longest allowed completion.

    Returns:
        float32 tensor of `mask`'s shape. A step without any counted token gives zeros.

    Raises:
        ValueError: unknown `aggregation`, a packed mask without `cu_seqlens` where sequences matter, or no
            `constant_length` where it is needed.
    """
    op = "token_weights"
    require(aggregation in AGGREGATIONS, f"{op}: aggregation={aggregation!r} is unknown; choose one of {AGGREGATIONS}")
    require_tensors(op, mask=mask)
    require(mask.dim() in (1, 2), f"{op}: mask must have shape [B, T] or [N], got {tuple(mask.shape)}")
    counted = (mask != 0).to(torch.float32)
    if aggregation == "token_mean":
        total = counted.sum() if num_tokens is None else counted.new_tensor(float(num_tokens))
        return counted / total.clamp(min=1.0)

    offsets = sequence_offsets(op, mask.shape, cu_seqlens, mask.device)
    require(offsets is not None, f"{op}: aggregation={aggregation!r} needs cu_seqlens for a packed mask")
    sequences = float(max(offsets.numel() - 1, 1)) if num_sequences is None else float(num_sequences)
    require(sequences > 0, f"{op}: num_sequences must be above 0, got {num_sequences}")
    if aggregation == "sequence_sum":
        return counted / sequences
    if aggregation == "constant_length":
        require(
            constant_length is not None and constant_length > 0,
            f"{op}: aggregation='constant_length' needs constant_length above 0, got {constant_length}",
        )
        return counted / (sequences * constant_length)
    flat = counted.flatten()
    ids = sequence_ids(offsets, flat.numel())
    lengths = flat.new_zeros(offsets.numel() - 1).index_add_(0, ids, flat).clamp_(min=1.0)
    return (flat / (sequences * lengths[ids])).view_as(counted)


def high_entropy_mask(entropy: Tensor, mask: Tensor, quantile: float) -> Tensor:
    """The tokens of the highest entropy, which alone carry the policy gradient in "Beyond the 80/20 Rule"
    (arXiv 2506.01939; TRL's `top_entropy_quantile`): give the others the advantage 0.

    The weights stay as they are, and so do the normaliser, the KL term and the ratio of a sequence.

    Args:
        entropy: per-token entropies of all tokens of the step, nats, any shape.
        mask: same shape; non-zero where a token counts.
        quantile: the share of the counted tokens to keep, in [0, 1]; ties with the last one are kept as well. 0 keeps
            the highest.

    Returns:
        bool tensor of `entropy`'s shape, False where `mask` is 0.

    Raises:
        ValueError: `quantile` is out of range, or the shapes differ.
    """
    op = "high_entropy_mask"
    require_tensors(op, entropy=entropy, mask=mask)
    require_shape(op, entropy.shape, mask=mask)
    require_number(op, "quantile", quantile)
    require(0 <= quantile <= 1, f"{op}: quantile must be from 0 to 1, got {quantile}")
    counted = mask != 0
    values = entropy[counted].sort().values
    if values.numel() == 0:
        return counted
    # The first one at or above the interpolated quantile; rounded, since 1 - 0.7 is a little above 0.3.
    threshold = values[math.ceil(round((1 - quantile) * (values.numel() - 1), 6))]
    return counted & (entropy >= threshold)


def require_objective(op: str, objective: PolicyObjective) -> None:
    if not isinstance(objective, PolicyObjective):
        raise TypeError(f"{op}: objective must be a PolicyObjective (see PRESETS), got {type(objective).__name__}")


def require_reference(op: str, objective: PolicyObjective, ref_logprobs: Tensor | None) -> None:
    require(
        not objective.uses_reference or ref_logprobs is not None,
        f"{op}: beta={objective.beta} needs ref_logprobs",
    )
    require_floating(op, ref_logprobs=ref_logprobs)
