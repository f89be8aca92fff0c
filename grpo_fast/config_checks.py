"""Which values the fields of a configuration may have, each by itself and beside others."""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from grpo_fast.advantages import LARGEST, UNCENTRED
from grpo_fast.errors import UserError
from grpo_kernels import PRESETS

if TYPE_CHECKING:
    from grpo_fast.config import GRPOConfig

_RANGES = [
    (("num_generations",), lambda v: v >= 2, "at least 2, since advantages compare completions of one prompt"),
    (
        (
            "generation_batch_size", "max_completion_length", "num_generations_eval", "num_iterations", "max_steps",
            "max_tokens_per_generation_batch", "max_tokens_per_microbatch", "max_buffer_mib", "logging_steps",
            "max_train_samples", "max_eval_samples", "lora_r", "lora_alpha", "save_total_limit",
            "max_num_gen_batches", "ref_model_sync_steps", "vllm_max_model_length",
        ),
        lambda v: v >= 1,
        "at least 1",
    ),
    (
        ("temperature", "learning_rate", "adam_epsilon", "reward_timeout", "sync_tolerance", "vllm_server_timeout"),
        lambda v: v > 0,
        "above 0",
    ),
    (
        (
            "top_k", "beta", "weight_decay", "max_grad_norm", "warmup_steps", "log_completions_steps", "save_steps",
            "eval_steps", "vllm_importance_sampling_clip_max", "vllm_importance_sampling_clip_min",
        ),
        lambda v: v >= 0,
        "at least 0",
    ),
    (("top_entropy_quantile",), lambda v: 0 <= v <= 1, "from 0 to 1"),
    (("seed",), lambda v: 0 <= v < 2**63, "at least 0 and below 2**63"),
    (("vllm_server_port",), lambda v: 1 <= v <= 65535, "from 1 to 65535"),
    (("top_p", "ref_model_mixup_alpha", "vllm_gpu_memory_utilization"), lambda v: 0 < v <= 1, "above 0 and at most 1"),
    (("min_p", "adam_beta1", "adam_beta2", "lora_dropout"), lambda v: 0 <= v < 1, "at least 0 and below 1"),
]  # fmt: skip


# Evaluated once: a plan tries thousands of configurations.
_hints = cache(get_type_hints)


def check_config(config: GRPOConfig) -> None:
    """Raise a UserError that names the first wrong field, its value and what is allowed."""
    for name, hint in _hints(type(config)).items():
        value, allowed = getattr(config, name), _literals(hint)
        if allowed and not set(value if get_origin(hint) is list else [value]) <= set(allowed):
            _refuse(
                name, value, f"{'made of' if get_origin(hint) is list else 'one of'} {', '.join(map(str, allowed))}"
            )
        if hint is bool and value is not None and not isinstance(value, bool):
            _refuse(name, value, "true or false")
        if value is None and type(None) not in get_args(hint):
            _refuse(name, value, "set; leave the field out for its default")
    for names, holds, allowed in _RANGES:
        for name in names:
            value = getattr(config, name)
            if value is not None and not (math.isfinite(value) and holds(value)):
                _refuse(name, value, f"a finite number, {allowed}")
    if not config.dataset_name:
        raise UserError("dataset_name is missing: a data file, a hub name or a built-in name")
    if not config.reward_funcs:
        raise UserError("reward_funcs is missing: at least one reward function, by name or dotted path")
    if config.keep_best and not config.eval_steps:
        raise UserError("keep_best goes with eval_steps: the best score is among those measured while training")
    if config.load_in_4bit and not config.use_peft:
        raise UserError("load_in_4bit goes with use_peft: 4-bit weights are not trained, adapters beside them are")
    if config.sample_ahead and not (config.corrects_sampler and config.vllm_mode == "server"):
        raise UserError(
            "sample_ahead goes with use_vllm, vllm_mode='server' and vllm_importance_sampling_correction: only a "
            "server samples beside an update, and its completions are a step old"
        )
    if config.corrects_sampler and config.loss_type == "vespo" and "token" not in config.vllm_importance_sampling_mode:
        raise UserError(
            "loss_type='vespo' goes with vllm_importance_sampling_mode token_truncate or token_mask, not "
            f"{config.vllm_importance_sampling_mode!r}: its own ratio is the sequence's"
        )
    address, host = config.vllm_server_base_url, config.vllm_server_host
    if address is not None and not address.startswith(("http://", "https://")):
        _refuse("vllm_server_base_url", address, "an address like http://127.0.0.1:8000")
    if not host or "/" in host or ":" in host:
        _refuse("vllm_server_host", host, "a name or an IPv4 address; vllm_server_base_url takes any other")
    low, high = config.vllm_importance_sampling_clip_min, config.vllm_importance_sampling_clip_max
    if low is not None and high is not None and low > high:
        raise UserError(f"vllm_importance_sampling_clip_min={low} is above vllm_importance_sampling_clip_max={high}")
    if config.activation_offloading and not config.gradient_checkpointing:
        raise UserError("activation_offloading goes with gradient_checkpointing: it keeps the layers' inputs")
    if config.share_prompts == "always" and config.padding_free == "never":
        raise UserError("share_prompts='always' goes with padding_free: prompts are shared in packed sequences")
    for name in ("kl_in_reward", "sync_ref_model"):
        if getattr(config, name) and not config.uses_reference:
            raise UserError(f"{name} goes with beta above 0: without, there is no reference policy")
    if config.sync_ref_model and config.use_peft:
        raise UserError("sync_ref_model goes without use_peft: the reference is the model that the adapter began from")
    if config.reward_baseline in UNCENTRED and config.scale_rewards != "none":
        raise UserError(
            f"reward_baseline={config.reward_baseline!r} goes with scale_rewards='none', not "
            f"{config.scale_rewards!r}: rewards that are not centred are not scaled"
        )
    if config.multi_objective_aggregation == "normalize_then_sum":
        for name, value in (("scale_rewards", "group"), ("reward_baseline", "mean"), ("kl_in_reward", False)):
            if getattr(config, name) != value:
                raise UserError(
                    f"multi_objective_aggregation='normalize_then_sum' goes with {name}={value!r}, "
                    f"not {getattr(config, name)!r}"
                )
    if config.generation_batch_size % config.num_generations:
        _refuse(
            "generation_batch_size", config.generation_batch_size,
            f"a multiple of num_generations={config.num_generations}",
        )  # fmt: skip
    if config.reward_weights is not None and len(config.reward_weights) != len(config.reward_funcs):
        raise UserError(
            f"reward_weights has {len(config.reward_weights)} values for {len(config.reward_funcs)} reward_funcs"
        )
    if config.prompt_template is not None and config.prompt_file is not None:
        raise UserError("prompt_template and prompt_file both make the prompt; set one of them")
    if config.prompt_template is config.prompt_file is None and (config.system_prompt or config.apply_chat_template):
        name = "system_prompt" if config.system_prompt else "apply_chat_template"
        raise UserError(f"{name} goes with prompt_template or prompt_file; a prompt column is taken as it is")
    if config.run_name is not None and (not config.run_name or "/" in config.run_name):
        _refuse("run_name", config.run_name, "a name without '/'; output_dir takes a path")
    if not all(abs(weight) <= LARGEST for weight in config.reward_weights or []):
        _refuse("reward_weights", config.reward_weights, f"made of numbers within +-{LARGEST:.1e}")
    if config.loss_type not in PRESETS:
        _refuse("loss_type", config.loss_type, f"one of {', '.join(PRESETS)}")
    try:
        config.objective()
    except ValueError as error:
        raise UserError(str(error).removeprefix("PolicyObjective: ")) from None


def _literals(hint: Any) -> tuple:
    """The values that a ``Literal`` (or an optional one) allows; empty for other types."""
    if get_origin(hint) is Literal:
        return get_args(hint)
    values = [value for part in get_args(hint) for value in _literals(part)]
    return (*values, None) if values and type(None) in get_args(hint) else tuple(values)


def _refuse(name: str, value: object, allowed: str) -> None:
    raise UserError(f"{name}={value!r} is not allowed: it must be {allowed}")
