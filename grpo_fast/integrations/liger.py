"""Liger's fused GRPO loss, computed by `linear_policy_loss`.

    from grpo_fast.integrations.liger import FusedLinearGRPOLoss as LigerFusedLinearGRPOLoss

Same arguments, values, gradients and metrics as liger_kernel.chunked_loss.LigerFusedLinearGRPOLoss (0.8.5), at 3U for
a trainable head and 2U for a frozen one (U = 2 N H V flops), where Liger recomputes for 4U. Masked positions cost
nothing. The gradients are computed in the forward, so the loss can be backpropagated once.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from grpo_fast.model.heads import require_plain, require_temperature
from grpo_fast.model.inputs import check_tensors
from grpo_kernels import PRESETS, PolicyObjective, kl_estimate, linear_logprob, linear_policy_loss, token_weights

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
# Loss types with one normaliser for all processes.
GLOBAL = ("dapo", "cispo", "vespo")


class FusedLinearGRPOLoss(nn.Module):
    """Hidden states to the policy loss, with the constructor and the arguments of Liger's class.

    Args:
        beta: weight of the KL term (k3).
        compiled, chunk_size: accepted, without effect.
        use_ref_model: whether there is a reference; without one the KL term is zero.
        epsilon_low, epsilon_high: clip distances; for "cispo", `epsilon_high` bounds the ratio itself.
        loss_type: "grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo" or "vespo".
        max_completion_length: the constant of "dr_grpo".
        importance_sampling_level: "token" or "sequence".
        sapo_temperature_pos, sapo_temperature_neg, temperature, delta, use_bias_correction_kl: as in TRL's GRPOConfig.
        vespo_k_pos, vespo_lambda_pos, vespo_k_neg, vespo_lambda_neg: as in TRL's GRPOConfig.

    Raises:
        ValueError: an option is unknown or out of range (`temperature`: 1e-6 to 1e6), or not supported: a `delta`
            below 1 + epsilon_high; "luspo" with token ratios or with a KL term, for which Liger counts padding;
            "vespo" with `use_bias_correction_kl`.
    """

    def __init__(
        self,
        beta: float = 0.04,
        compiled: bool = True,
        use_ref_model: bool = True,
        chunk_size: int = 1,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        loss_type: str = "dapo",
        max_completion_length: int | None = None,
        importance_sampling_level: str = "token",
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        temperature: float = 1.0,
        delta: float | None = None,
        use_bias_correction_kl: bool = False,
        vespo_k_pos: float = 2.0,
        vespo_lambda_pos: float = 3.0,
        vespo_k_neg: float = 3.0,
        vespo_lambda_neg: float = 2.0,
    ):
        super().__init__()
        level, per_sequence = importance_sampling_level, importance_sampling_level == "sequence"
        _require(loss_type in LOSS_TYPES, f"loss_type={loss_type!r} is unknown; choose one of {LOSS_TYPES}")
        known = level in ("token", "sequence")
        _require(known, f"importance_sampling_level={level!r} is unknown; choose 'token' or 'sequence'")
        allowed = not per_sequence or loss_type not in ("cispo", "sapo", "vespo")
        _require(allowed, f"loss_type={loss_type!r} needs importance_sampling_level='token'")
        allowed = loss_type != "dr_grpo" or max_completion_length is not None
        _require(allowed, "loss_type='dr_grpo' needs max_completion_length")
        allowed = loss_type != "luspo" or (per_sequence and beta == 0.0)
        _require(allowed, "loss_type='luspo' is only supported with importance_sampling_level='sequence' and beta=0")
        allowed = loss_type != "vespo" or not use_bias_correction_kl or beta == 0.0
        _require(allowed, "loss_type='vespo' is not supported with use_bias_correction_kl=True")
        self.loss_type, self.beta, self.max_completion_length = loss_type, beta, max_completion_length
        self.temperature = require_temperature(temperature)
        preset = PRESETS[loss_type]
        bounds = {
            "clip": {"epsilon": epsilon_low, "epsilon_high": epsilon_high, "delta": delta},
            "cispo": {"epsilon_high": epsilon_high},
            "sapo": {"sapo_temperature_pos": sapo_temperature_pos, "sapo_temperature_neg": sapo_temperature_neg},
            "vespo": {
                "vespo_k_pos": vespo_k_pos, "vespo_lambda_pos": vespo_lambda_pos,
                "vespo_k_neg": vespo_k_neg, "vespo_lambda_neg": vespo_lambda_neg,
            },
        }  # fmt: skip
        self.objective = PolicyObjective(
            kind=preset.kind,
            aggregation=preset.aggregation,
            level="product" if loss_type == "vespo" else importance_sampling_level,
            # Without a reference Liger takes the policy's own log-probabilities, and the term has no gradient.
            beta=beta if use_ref_model else 0.0,
            kl_bias_correction=use_bias_correction_kl,
            **bounds[preset.kind],
        )

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        selected_token_ids: Tensor,
        attention_mask: Tensor,
        advantages: Tensor,
        bias: Tensor | None = None,
        ref_per_token_logps: Tensor | None = None,
        old_per_token_logps: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        vllm_is_ratio: Tensor | None = None,
        num_items_in_batch: Tensor | float | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Loss and metrics of a padded batch.

        Args:
            _input: ``[B, T, H]`` hidden states that predict the selected tokens.
            lin_weight, bias: ``[V, H]`` and ``[V]``, the output head.
            selected_token_ids, attention_mask: ``[B, T]``; the mask is 0 where a token does not count.
            advantages: ``[B]``, or ``[B, T]`` for each token.
            ref_per_token_logps: ``[B, T]``; by default computed from `ref_input` ``[B, T, H]``, `ref_weight` and
                `ref_bias`.
            old_per_token_logps: ``[B, T]``; None: the present ones.
            vllm_is_ratio: ``[B, T]``, ``[B, 1]`` or ``[B]``: the sampler's correction.
            num_items_in_batch: counted tokens of the step over all processes ("dapo", "cispo", "vespo"); None: those
                of this call's masks over all processes.

        Returns:
            The loss, differentiable once, and Liger's metrics: the mean KL where beta is not 0, then the fraction of
            clipped tokens; both over the counted tokens.

        Raises:
            ValueError: an argument is no tensor, shapes do not fit, the weight is quantised, or the reference is
                missing.
        """
        check_tensors(
            _input=_input, lin_weight=lin_weight, selected_token_ids=selected_token_ids, attention_mask=attention_mask,
            advantages=advantages, bias=bias, ref_per_token_logps=ref_per_token_logps,
            old_per_token_logps=old_per_token_logps, ref_input=ref_input, ref_weight=ref_weight, ref_bias=ref_bias,
            vllm_is_ratio=vllm_is_ratio,
        )  # fmt: skip
        require_plain("lin_weight", lin_weight)
        rows, length = attention_mask.shape
        mask = attention_mask != 0
        _require(
            _input.dim() == 3 and _input.shape[:2] == mask.shape,
            f"_input must have shape [{rows}, {length}, H] like attention_mask, got {tuple(_input.shape)}",
        )
        _require(
            tuple(advantages.shape) in ((rows,), (rows, length)),
            f"advantages must have shape [{rows}] or [{rows}, {length}], got {list(advantages.shape)}",
        )
        if advantages.dim() == 1:
            advantages = advantages[:, None].expand(rows, length)
        head = {"temperature": self.temperature}
        targets = selected_token_ids.masked_fill(~mask, -100)
        reference = None
        if self.objective.uses_reference:
            reference = ref_per_token_logps
            if reference is None:
                _require(ref_input is not None, "use_ref_model=True needs ref_per_token_logps or ref_input")
                with torch.no_grad():
                    reference = linear_logprob(ref_input, ref_weight, targets, bias=ref_bias, **head)
        old, correction = old_per_token_logps, None
        if vllm_is_ratio is not None:
            ratio = vllm_is_ratio[:, None] if vllm_is_ratio.dim() == 1 else vllm_is_ratio
            _require(
                tuple(ratio.shape) in ((rows, 1), (rows, length)),
                f"vllm_is_ratio must have shape [{rows}], [{rows}, 1] or [{rows}, {length}], got "
                f"{tuple(vllm_is_ratio.shape)}",
            )
            if self.loss_type == "vespo":
                if old is None:
                    with torch.no_grad():
                        old = linear_logprob(_input, lin_weight, targets, bias=bias, **head)
                old = _fold(old, ratio, mask)
            else:
                _require(
                    self.loss_type != "luspo" or ratio.shape[1] == 1,
                    f"loss_type='luspo' needs a vllm_is_ratio of shape [{rows}, 1], got {tuple(ratio.shape)}",
                )
                correction = ratio.float().expand(rows, length)
        found = linear_policy_loss(
            _input, lin_weight, targets, advantages, self._weights(mask, num_items_in_batch), self.objective,
            old_logprobs=old, ref_logprobs=reference, correction=correction, bias=bias, **head,
        )  # fmt: skip
        return found.loss, self._metrics(found.logprobs, mask, advantages, old, reference)

    def _weights(self, mask: Tensor, num_items: Tensor | float | None) -> Tensor:
        """Mask and normaliser ``[B, T]``."""
        weights = token_weights(mask, self.objective.aggregation, constant_length=self.max_completion_length)
        if self.loss_type == "luspo":
            # The mean over the batch of every sequence's loss times its length.
            return mask.float() / mask.shape[0]
        if self.loss_type not in GLOBAL:
            return weights
        processes = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        tokens = mask.sum() if num_items is None else torch.as_tensor(num_items, device=mask.device)
        tokens = tokens.float()
        if num_items is None and processes > 1:
            dist.all_reduce(tokens)
        return mask / (tokens / processes).clamp(min=1.0)

    @torch.no_grad()
    def _metrics(self, logprobs, mask, advantages, old, reference) -> tuple[Tensor, ...]:
        """Liger's, from the log-probabilities of the pass."""
        counted, o = mask.sum().clamp(min=1), self.objective
        log_ratio = torch.zeros_like(logprobs) if old is None else torch.where(mask, logprobs - old, 0.0)
        if o.level == "sequence":
            log_ratio = log_ratio.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
        ratio = log_ratio.exp()
        clipped = torch.zeros_like(mask)
        if o.kind == "clip":
            clipped = (ratio < 1 - o.epsilon) & (advantages < 0) | (ratio > 1 + o.upper_epsilon) & (advantages > 0)
        elif o.kind == "cispo":
            clipped = (ratio > o.epsilon_high) & (advantages > 0)
        metrics = ((clipped & mask).sum() / counted,)
        if self.beta == 0.0:
            return metrics
        kl = torch.zeros_like(logprobs)
        if reference is not None:
            kl = torch.where(mask, kl_estimate(logprobs, reference.float(), "k3"), 0.0)
            kl = kl * ratio if o.kl_bias_correction else kl
        return (kl.sum() / counted, *metrics)


def _fold(old: Tensor, ratio: Tensor, mask: Tensor) -> Tensor:
    """Old log-probabilities with the sampler's correction of each sequence folded into its first counted token."""
    log_ratio = ratio.float().clamp(min=1e-8).log().clamp(max=20.0).sum(1)
    first = mask & (mask.cumsum(1) == 1)
    return old - first * log_ratio[:, None]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(f"FusedLinearGRPOLoss: {message}")
