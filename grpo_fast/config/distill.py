"""The fields of on-policy distillation: those of `GRPOConfig` that it uses, and its own."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, Literal

from grpo_fast.config.fields import GRPOConfig, Value, names_checked, refuse_unused, with_inherited_fields
from grpo_fast.errors import UserError, shown

# What only advantages from rewards need, and what would add another term to the loss.
_UNUSED_PREFIXES = ("advantage_", "length_penalty", "ref_model_", "num_generations_kept", "keep_generations")
_UNUSED = {
    "reward_weights", "reward_baseline", "eval_metric", "beta", "use_bias_correction_kl", "kl_estimator", "kl_clip",
    "kl_in_reward", "sync_ref_model", "scale_rewards", "relative_weight", "baseline_weight", "incomplete_groups",
    "multi_objective_aggregation", "dynamic_sampling", "max_num_gen_batches", "script_objects",
}  # fmt: skip
UNUSED_FIELDS = frozenset(
    f.name for f in dataclasses.fields(GRPOConfig) if f.name in _UNUSED or f.name.startswith(_UNUSED_PREFIXES)
)
# What the exact divergence does not use: it needs no importance weights, and its samples serve one step.
_POLICY_LOSS_PREFIXES = (
    "epsilon", "covariance_", "entropy_", "off_policy_", "rollout_rs", "sapo_", "vespo_", "vllm_importance_sampling_",
)  # fmt: skip
_POLICY_LOSS = {"delta", "importance_sampling_level", "use_adaptive_entropy", "top_entropy_quantile"}
_UNUSED_BY_EXACT = [
    f.name for f in dataclasses.fields(GRPOConfig) if f.name in _POLICY_LOSS or f.name.startswith(_POLICY_LOSS_PREFIXES)
]


@with_inherited_fields
@names_checked
@dataclass
class DistillConfig(GRPOConfig):
    """A run of on-policy distillation: the student samples, and a teacher says at every token what it would write.

    Args:
        teacher_model_name_or_path: the teacher, a folder or hub name, with the student's tokenizer and vocabulary.
        teacher_model_init_kwargs: more arguments for the teacher.
        distillation_loss: the divergence from the teacher over the whole vocabulary at every token (exact), or its
            estimate from the sampled token alone (sampled): then the token's advantage is the teacher's
            log-probability less the student's, in the policy loss of loss_type. The exact form takes only the mean over
            tokens from loss_type.
        distillation_beta: of the exact divergence, as `beta` in TRL's GKD: 1 for the reverse KL, 0 for the forward KL,
            between them the generalised Jensen-Shannon divergence.
        reward_funcs: what to measure beside the divergence, if anything; they do not train.
        keep_best: also keep the checkpoint with the lowest reverse KL on the held-out prompts, measured every
            eval_steps.
    """

    teacher_model_name_or_path: str = ""
    teacher_model_init_kwargs: dict[str, Value] | None = None
    distillation_loss: Literal["exact", "sampled"] = "exact"
    distillation_beta: float = 1.0

    command: ClassVar[str] = "distill"
    unused_fields: ClassVar[frozenset[str]] = UNUSED_FIELDS
    needs_rewards: ClassVar[bool] = False

    def __post_init__(self):
        refuse_unused(self, UNUSED_FIELDS, "distillation")
        if not self.teacher_model_name_or_path:
            raise UserError("teacher_model_name_or_path is missing: a folder or a hub name")
        if not 0 <= self.distillation_beta <= 1:
            raise UserError(
                f"distillation_beta={shown(self.distillation_beta)} is not allowed: it must be from 0 (forward KL) to "
                "1 (reverse KL)"
            )
        if self.distillation_loss == "exact":
            refuse_unused(self, _UNUSED_BY_EXACT, "distillation_loss='exact'")
        elif self.distillation_beta != 1:
            raise UserError("distillation_loss='sampled' estimates the reverse KL, so it requires distillation_beta=1")
        super().__post_init__()
        if self.distillation_loss == "exact" and self.updates_per_batch > 1:
            raise UserError(
                "distillation_loss='exact' is on-policy: it takes one step for each generation batch, not "
                f"{self.updates_per_batch}"
            )

    @property
    def corrects_sampler(self) -> bool:
        """Only the estimate from sampled tokens depends on who sampled them."""
        return self.distillation_loss == "sampled" and super().corrects_sampler
