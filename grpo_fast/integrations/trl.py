"""TRL's GRPOTrainer with our output head: hidden states go to the loss in one pass, without logits.

    from grpo_fast.integrations.trl import FusedGRPOTrainer
    FusedGRPOTrainer(model=..., reward_funcs=..., args=trl.GRPOConfig(...), train_dataset=...).train()

TRL's own code still samples, rewards, batches and logs; its metrics use our log-probabilities and entropies. The
log-probabilities of the old and of the reference policy cost 1U, and a microbatch's loss with its gradients 3U, or 2U
with a frozen head (U = 2 N H V flops). If an option needs the log-probabilities before the loss (see
`one_pass_objective`), TRL computes its loss from ours: 1U + 3U.
"""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env
from torch import Tensor, nn

from grpo_fast.errors import UserError, import_extra
from grpo_fast.model.heads import (
    body,
    head_tensors,
    logit_transform,
    output_head,
    require_no_skipped_hooks,
    require_temperature,
    require_values,
    router_loss,
)
from grpo_fast.model.inputs import check_keywords
from grpo_fast.model.policy import FusedPolicy
from grpo_kernels import PRESETS, PolicyObjective, linear_logprob, linear_policy_loss, token_weights

_trl = import_extra("trl.trainer.grpo_trainer", "trl")
_utils = import_extra("trl.trainer.utils", "trl")
if not hasattr(_utils, "FusedCausalLMOutput"):
    raise UserError(f"trl {import_extra('trl', 'trl').__version__} is too old: FusedGRPOTrainer needs 1.16 or newer")

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
LEVELS = ("token", "sequence")


class FusedGRPOTrainer(_trl.GRPOTrainer):
    """TRL's `GRPOTrainer` with the same arguments, which computes log-probabilities and losses without logits.

    Raises:
        UserError: `loss_type`, `importance_sampling_level` or `temperature` is not allowed, the model's head or the
            transform of its logits is not supported, or the run uses DeepSpeed ZeRO-3, FSDP, context parallelism or
            torch.compile.
    """

    def __init__(self, model: Any, reward_funcs: Any = None, args: Any = None, *others: Any, **named: Any):
        if args is not None:
            check_arguments(args)
        super().__init__(model, reward_funcs, args, *others, **named)
        model = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        for each in (model, None if self.ref_model is None else self.accelerator.unwrap_model(self.ref_model)):
            if each is not None:
                add_head(each, self.temperature, self.args.cast_lm_head_to_fp32)
        # Any tokens will do.
        FusedPolicy(model, self.temperature).check_head(list(range(min(16, model.config.get_text_config().vocab_size))))
        self._objective = one_pass_objective(self)

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        if self._objective is None:
            return super()._compute_loss(functools.partial(model, with_entropy=True), inputs)
        arguments, outputs = self._loss_arguments(inputs), []

        def forward(**model_inputs: Any) -> Any:
            output = model(**model_inputs, policy_loss=arguments)
            outputs.append((output.loss, output.aux_loss))
            aux_loss = None if output.aux_loss is None else output.aux_loss.detach()
            return _utils.FusedCausalLMOutput(log_probs=output.log_probs, entropy=output.entropy, aux_loss=aux_loss)

        # TRL's code computes the metrics. Our log-probabilities are 0 where the mask is 0, so the others must be, too.
        mask = _loss_mask(inputs)
        logps = {name: inputs.get(name) for name in ("old_per_token_logps", "ref_per_token_logps")}
        near = {name: x.masked_fill(mask == 0, 0.0) for name, x in logps.items() if x is not None}
        super()._compute_loss(forward, {**inputs, **near})
        loss, aux_loss = outputs[0]
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * aux_loss / self._accumulation()
        return loss

    def _loss_arguments(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of `linear_policy_loss` for one of TRL's microbatches, ``[B, T]`` each."""
        mask = _loss_mask(inputs)
        correction = None
        if self.use_vllm and self.vllm_importance_sampling_correction:
            correction = inputs["importance_sampling_ratio"].expand(mask.shape)
        advantages = inputs["advantages"]
        return {
            "advantages": advantages[:, None].expand(mask.shape) if advantages.dim() == 1 else advantages,
            "weights": self._weights(mask, inputs),
            "objective": self._objective,
            "old_logprobs": inputs.get("old_per_token_logps"),
            "ref_logprobs": inputs["ref_per_token_logps"] if self.beta != 0.0 else None,
            "correction": correction,
        }

    def _weights(self, mask: Tensor, inputs: dict[str, Any]) -> Tensor:
        """Mask and normaliser ``[B, T]``: TRL's loss of this microbatch is the sum of weights times token losses."""
        aggregation, accumulation = self._objective.aggregation, self._accumulation()
        if self.loss_type in ("dapo", "cispo"):
            # The tokens of the generation batch; an optimizer step uses a part of them.
            tokens = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
            if self.model.training:
                tokens = tokens * accumulation / self.args.steps_per_generation
            return token_weights(mask, aggregation, num_tokens=1) / tokens
        weights = token_weights(mask, aggregation, constant_length=self.max_completion_length)
        return weights / accumulation

    def _accumulation(self) -> float:
        return self.current_gradient_accumulation_steps if self.model.training else 1.0


def _loss_mask(inputs: dict[str, Any]) -> Tensor:
    mask = inputs["completion_mask"]
    return mask * inputs["tool_mask"] if "tool_mask" in inputs else mask


def check_arguments(args: Any) -> None:
    """Refuse arguments that cannot work, before the model is loaded.

    Raises:
        UserError: see `FusedGRPOTrainer`.
    """
    for name, allowed in (("loss_type", LOSS_TYPES), ("importance_sampling_level", LEVELS)):
        value = getattr(args, name)
        if value not in allowed:
            raise UserError(f"{name}={value!r} is not supported; choose one of {', '.join(allowed)}")
    require_temperature(args.temperature)
    plugin, parallel = args.deepspeed_plugin, getattr(args, "parallelism_config", None)
    refused = {
        "DeepSpeed ZeRO-3": plugin is not None and plugin.zero_stage == 3,
        # Set in the arguments or by accelerate launch.
        "FSDP": bool(args.fsdp) or parse_flag_from_env("ACCELERATE_USE_FSDP"),
        "context parallelism": parallel is not None and (parallel.cp_enabled or parallel.sp_enabled),
    }
    for name, wanted in refused.items():
        if wanted:
            raise UserError(f"FusedGRPOTrainer does not support {name}; use one process, DDP or ZeRO up to stage 2")
    if args.torch_compile:
        raise UserError("FusedGRPOTrainer does not support torch_compile=True; leave it out")


def one_pass_objective(trainer: Any) -> PolicyObjective | None:
    """What the trainer minimises, if one pass over the head can compute its gradient; otherwise None.

    It cannot where the loss is not a sum over tokens of a function of their own (or their sequence's) ratio: "vespo",
    `off_policy_mask_threshold`, `top_entropy_quantile`, an entropy bonus, and clip bounds outside `PolicyObjective`'s,
    such as a `delta` below 1 + epsilon_high.
    """
    args, preset = trainer.args, PRESETS[trainer.loss_type]
    if (
        preset.kind == "vespo"
        or trainer.off_policy_mask_threshold is not None
        or trainer.top_entropy_quantile < 1.0
        or trainer._entropy_bonus_enabled
    ):
        return None
    bounds = {
        "clip": {"epsilon": trainer.epsilon_low, "epsilon_high": trainer.epsilon_high, "delta": args.delta},
        "cispo": {"epsilon_high": trainer.epsilon_high},
        "sapo": {name: getattr(args, name) for name in ("sapo_temperature_pos", "sapo_temperature_neg")},
    }
    options = {"level": trainer.importance_sampling_level, "beta": trainer.beta, **bounds[preset.kind]}
    try:
        return PolicyObjective(
            kind=preset.kind, aggregation=preset.aggregation, kl_bias_correction=args.use_bias_correction_kl, **options
        )
    except ValueError:
        return None


def add_head(model: nn.Module, temperature: float, in_float32: bool = False) -> None:
    """Let ``model(..., labels=labels, fused_lm_head=True)`` compute with our head; other calls stay as they are.

    The call returns TRL's `FusedCausalLMOutput` with log-probabilities (and entropies, ``with_entropy=True``)
    ``[B, L - 1]``, or with ``policy_loss=`` (arguments of `linear_policy_loss` for the last T tokens, ``[B, T]``) the
    loss and the detached log-probabilities and entropies ``[B, T]``. It raises a UserError for keywords that the
    model's forward does not name, and for a head that has received an adapter or a hook.

    Args:
        model: a transformers causal LM, not wrapped by peft.
        temperature: divides the logits.
        in_float32: run the head in float32 outside autocast (TRL's `cast_lm_head_to_fp32`).

    Raises:
        UserError: the model has no linear output head, or the head carries an adapter or a hook, or is quantised; or
            the model cannot be run without its head.
    """
    output_head(model)
    body(model)
    others, config = model.forward, model.config.get_text_config()

    @functools.wraps(type(model).forward)
    def forward(self, *args, fused_lm_head=False, labels=None, policy_loss=None, with_entropy=False, **kwargs):
        if not fused_lm_head:
            return others(*args, **kwargs, **({} if labels is None else {"labels": labels}))
        layer, inner = output_head(self), body(self)
        require_values(layer)
        require_no_skipped_hooks(self)
        # TRL asks for router logits, from which the auxiliary loss is computed.
        routed = kwargs.pop("output_router_logits", getattr(config, "output_router_logits", False))
        check_keywords(kwargs, self, inner)
        output = inner(*args, use_cache=False, **kwargs, **({"output_router_logits": True} if routed else {}))
        head = {**head_tensors(layer), "temperature": temperature, **logit_transform(self.config)}
        hidden, labels = (x.to(head["weight"].device) for x in (output.last_hidden_state, labels))
        enabled = torch.is_autocast_enabled(hidden.device.type) and not in_float32
        with torch.autocast(hidden.device.type, enabled=enabled):
            found = _run_head(hidden.float() if in_float32 else hidden, labels, policy_loss, with_entropy, head)
        aux_loss = router_loss(self, output.router_logits, kwargs.get("attention_mask")) if routed else None
        return _utils.FusedCausalLMOutput(**found, aux_loss=aux_loss)

    model.forward = types.MethodType(forward, model)


def _run_head(
    hidden: Tensor, labels: Tensor, policy_loss: dict[str, Any] | None, with_entropy: bool, head: dict[str, Any]
) -> dict[str, Tensor | None]:
    """Fields of `FusedCausalLMOutput`, see `add_head`."""
    if policy_loss is None:
        found = linear_logprob(hidden[:, :-1], targets=labels[:, 1:], return_entropy=with_entropy, **head)
        return dict(zip(("log_probs", "entropy"), found, strict=True)) if with_entropy else {"log_probs": found}
    given = {name: x.to(hidden.device) if isinstance(x, Tensor) else x for name, x in policy_loss.items()}
    length = given["weights"].shape[1]
    found = linear_policy_loss(
        hidden[:, -length - 1 : -1], targets=labels[:, -length:], return_entropy=True, **given, **head
    )
    return {"loss": found.loss, "log_probs": found.logprobs, "entropy": found.entropy}
