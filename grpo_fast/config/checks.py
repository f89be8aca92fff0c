"""Checks of a whole configuration, before anything is loaded."""

from __future__ import annotations

import numbers
import os
import sys
from collections.abc import Set
from functools import cache
from types import UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from grpo_fast.config.sizes import UNSET
from grpo_fast.errors import UserError, one_line, shown
from grpo_fast.named_functions import names_function
from grpo_kernels import PRESETS, PolicyObjective
from grpo_kernels.custom_loss import parameters_of

# The largest reward, reward weight or advantage: float32's largest number, since the loss takes float32 advantages.
# Squares of products of two such numbers are finite in float64.
LARGEST_REWARD = 3.4028234663852886e38
# Baselines that leave a reward to learn from even where all rewards of a group are equal.
UNCENTRED = ("none", "best_only")
# Built-in values of advantage_estimator.
ESTIMATOR_NAMES = (
    "reinforce_plus_plus", "reinforce_plus_plus_baseline", "opo", "gpg", "maxrl", "raft", "rejection_sampling", "remax",
    "pass_at_k", "pkpo", "grpo_passk", "length_penalised", "grpo_lambda",
)  # fmt: skip
# These select completions and train on them as in supervised fine-tuning; the loss averages over the selected ones.
SELECTIVE_ESTIMATORS = ("raft", "rejection_sampling")

_RANGES = [
    (("num_generations",), lambda v: v >= 2, "at least 2, since advantages compare completions of one prompt"),
    (
        (
            "generation_batch_size", "max_completion_length", "num_generations_eval", "num_iterations", "max_steps",
            "max_tokens_per_generation_batch", "max_tokens_per_microbatch", "max_buffer_mib", "logging_steps",
            "max_train_samples", "max_eval_samples", "lora_r", "lora_alpha", "save_total_limit",
            "max_num_gen_batches", "ref_model_sync_steps", "vllm_max_model_length", "advantage_k",
        ),
        lambda v: v >= 1,
        "at least 1",
    ),
    (
        (
            "temperature", "learning_rate", "adam_epsilon", "reward_timeout", "sync_tolerance", "vllm_server_timeout",
            "num_train_epochs", "off_policy_mask_threshold", "rollout_rs_threshold", "rollout_rs_threshold_lower",
            "entropy_coef_max",
        ),
        lambda v: v > 0,
        "above 0",
    ),
    (
        (
            "top_k", "beta", "weight_decay", "max_grad_norm", "warmup_steps", "log_completions_steps", "save_steps",
            "eval_steps", "advantage_eps", "relative_weight", "baseline_weight", "vllm_importance_sampling_clip_max",
            "vllm_importance_sampling_clip_min", "thinking_budget", "max_skipped_updates", "max_staleness",
            "speculative_tokens", "layers_on_host", "entropy_target", "entropy_coef_delta", "entropy_coef_min",
        ),
        lambda v: v >= 0,
        "at least 0",
    ),
    (
        (
            "top_entropy_quantile", "warmup_ratio", "length_penalty", "length_penalty_share", "min_pass_rate",
            "max_pass_rate",
        ),
        lambda v: 0 <= v <= 1,
        "from 0 to 1",
    ),
    (("seed",), lambda v: 0 <= v < 2**63, "at least 0 and below 2**63"),
    (("vllm_server_port",), lambda v: 1 <= v <= 65535, "from 1 to 65535"),
    (
        ("top_p", "ref_model_mixup_alpha", "vllm_gpu_memory_utilization", "covariance_ratio"),
        lambda v: 0 < v <= 1,
        "above 0 and at most 1",
    ),
    (("min_p", "adam_beta1", "adam_beta2", "lora_dropout"), lambda v: 0 <= v < 1, "at least 0 and below 1"),
]  # fmt: skip
# A field, what it requires where it is set, and how an error names that.
_REQUIRED = [
    ("keep_best", lambda c: c.eval_steps, "eval_steps: it compares the scores that are measured during training"),
    ("load_in_4bit", lambda c: c.use_peft, "use_peft: 4-bit weights are frozen, and only adapters are trained"),
    ("activation_offloading", lambda c: c.gradient_checkpointing, "gradient_checkpointing, whose inputs it offloads"),
    ("layers_on_host", lambda c: c.use_peft, "use_peft: only frozen weights can wait in host memory"),
    (
        "layers_on_host",
        lambda c: c.gradient_checkpointing,
        "gradient_checkpointing: the backward pass fetches a layer's weights when it recomputes the layer",
    ),
    (
        "layers_on_host",
        lambda c: not c.use_vllm,
        "use_vllm=False: vLLM keeps all layers on the GPU, and merging the adapters reads them all",
    ),
    ("kl_in_reward", lambda c: c.beta, "beta above 0: without the KL term there is no reference policy"),
    ("sync_ref_model", lambda c: c.beta, "beta above 0: without the KL term there is no reference policy"),
    ("sync_ref_model", lambda c: not c.use_peft, "use_peft=False: with adapters, the reference is the initial model"),
    (
        "sample_ahead",
        lambda c: c.corrects_sampler and c.vllm_mode == "server",
        "use_vllm, vllm_mode='server' and vllm_importance_sampling_correction: only a server can sample during an "
        "update, and the correction accounts for completions that are one step old",
    ),
    (
        "max_staleness",
        lambda c: c.corrects_sampler and c.vllm_mode == "server",
        "use_vllm, vllm_mode='server' and vllm_importance_sampling_correction: only a server can sample during an "
        "update, and the correction accounts for tokens that older weights sampled",
    ),
    (
        "speculative_tokens",
        lambda c: not c.use_vllm,
        "use_vllm=false: it is for sampling with transformers",
    ),
]
# The settings that each built-in kind of objective uses, among those that only some kinds use.
_KIND_SETTINGS = {
    "clip": ("epsilon", "epsilon_high", "delta", "importance_sampling_level"),
    "cispo": ("epsilon_high", "importance_sampling_level"),
    "sapo": ("sapo_temperature_pos", "sapo_temperature_neg", "importance_sampling_level"),
    "vespo": ("vespo_k_pos", "vespo_lambda_pos", "vespo_k_neg", "vespo_lambda_neg", "importance_sampling_level"),
    "reinforce": (),
}
# The settings of the tokens that a function takes as `selected`.
_SELECTION = ("covariance_ratio", "covariance_low", "covariance_high")
# Settings that another one switches on.
_SWITCHED = {
    "kl_clip": "beta",
    "entropy_coef_min": "use_adaptive_entropy",
    "entropy_coef_max": "use_adaptive_entropy",
    "entropy_coef_delta": "use_adaptive_entropy",
    "entropy_target": "use_adaptive_entropy",
    "ref_model_sync_steps": "sync_ref_model",
    "ref_model_mixup_alpha": "sync_ref_model",
    "max_num_gen_batches": "dynamic_sampling",
    "keep_generations": "num_generations_kept",
}
# What multi_objective_aggregation="normalize_then_sum" requires.
_NORMALIZE_THEN_SUM = (
    ("scale_rewards", "group"), ("reward_baseline", "mean"), ("kl_in_reward", False), ("relative_weight", 1.0),
    ("baseline_weight", 0.0),
)  # fmt: skip
# The kinds of values that `check_kinds` knows, and their names. A list may be one text, which is split later.
_KINDS = {
    int: (numbers.Integral, "a whole number"),
    float: (numbers.Real, "a number"),
    str: ((str, os.PathLike), "a text"),
    list: ((list, tuple, set, str), "a list"),
    dict: (dict, "a mapping of names to values"),
}
# Cached: a memory plan tries thousands of configurations.
_hints = cache(get_type_hints)


def check_config(config: Any) -> None:
    """Check a `GRPOConfig`, whose module imports this one.

    Raises:
        UserError: names the first wrong field, its value and what is allowed.
    """
    _check_types(config)
    for names, holds, allowed in _RANGES:
        for name in names:
            value = getattr(config, name)
            if name in config.unused_fields:
                continue
            if name == "max_steps" and value == UNSET and config.num_train_epochs is not None:
                # Known when the training rows are.
                continue
            # False for NaN and infinities, and exact for integers beyond the largest float.
            if value is not None and not (abs(value) <= sys.float_info.max and holds(value)):
                _refuse(name, value, f"a finite number, {allowed}")
    _check_values(config)
    for name, holds, required in _REQUIRED:
        if getattr(config, name) and not holds(config):
            raise UserError(f"{name} requires {required}")
    _check_combinations(config)
    _check_masks(config)
    if config.loss_type not in PRESETS:
        # The user's code runs only after the check of who may name it.
        return
    try:
        config.objective()
    except ValueError as error:
        raise UserError(one_line(str(error).removeprefix("PolicyObjective: "), limit=200)) from None


def check_kinds(config: Any) -> None:
    """Check that numbers are numbers, texts texts and so on; a script can give any object where a file cannot.

    Raises:
        UserError: names the first field with a value of another kind, and what is allowed.
    """
    for name, hint in _hints(type(config)).items():
        value, parts = getattr(config, name), _parts(hint)
        if value is None or not parts or not all(part in _KINDS for part in parts):
            continue
        # True and False are integers to Python.
        kinds = [_KINDS[part] for part in parts]
        if isinstance(value, bool) or not any(isinstance(value, kind) for kind, _ in kinds):
            _refuse(name, value, " or ".join(dict.fromkeys(text for _, text in kinds)))


def _parts(hint: Any) -> list[Any]:
    """The types of a union without None, or the type itself; ``list`` for ``list[str]``."""
    union = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    return [get_origin(part) or part for part in union if part is not type(None)]


def _check_types(config: Any) -> None:
    for name, hint in _hints(type(config)).items():
        value, allowed, is_list = getattr(config, name), _literals(hint), get_origin(hint) is list
        if allowed and not all(item in allowed for item in (value if is_list else [value])):
            _refuse(name, value, f"{'made of' if is_list else 'one of'} {', '.join(map(str, allowed))}")
        if hint is bool and value is not None and not isinstance(value, bool):
            _refuse(name, value, "true or false")
        if value is None and type(None) not in get_args(hint):
            _refuse(name, value, "set; leave the field out for its default")
        if float in (hint, *get_args(hint)) and isinstance(value, int) and abs(value) > sys.float_info.max:
            _refuse(name, value, f"a number within +-{sys.float_info.max:.1e}")


def check_complete(c: Any) -> None:
    """Refuse a `GRPOConfig` without a model, data or rewards, which only a script can give in another way."""
    if not c.model_name_or_path:
        raise UserError("model_name_or_path is missing: a folder, a hub name or a built-in name")
    if not c.dataset_name:
        raise UserError("dataset_name is missing: a data file, a hub name or a built-in name")
    if not c.reward_funcs and c.needs_rewards:
        raise UserError("reward_funcs is missing: at least one reward function, by name or dotted path")


# The fields that name what a script can give as an object, by the argument of `GRPOTrainer`.
_OBJECT_FIELDS = {
    "model": ("model_name_or_path",),
    "processing_class": ("model_name_or_path",),
    "peft_config": ("use_peft", "model_name_or_path"),
    "train_dataset": ("dataset_name",),
    "eval_dataset": ("eval_dataset_name", "dataset_name"),
    "reward_funcs": ("reward_funcs",),
}


def check_repeatable(config: Any, named: Set[str]) -> None:
    """Refuse, on the command line, the `GRPOConfig` of a run whose objects only its script has.

    An object whose field is `named` there, or not used, does not matter; a run is resumed by its script in any case.
    """
    objects = config.script_objects or {}
    left = {name: what for name, what in objects.items() if named.isdisjoint(_OBJECT_FIELDS.get(name, ()))}
    if objects and config.resume_from_checkpoint:
        left, advice = objects, "resume it from that script, with trainer.train(resume_from_checkpoint=True)"
    else:
        fields = dict.fromkeys(_OBJECT_FIELDS[name][0] for name in left if name in _OBJECT_FIELDS)
        advice = f"start it from that script, or set {', '.join(f'--{name}' for name in fields)}"
    if left:
        listed = "; ".join(f"{name}: {what}" for name, what in left.items())
        raise UserError(f"a script gave this run objects, which config.yaml cannot hold ({listed}); {advice}")
    config.script_objects = None


def _check_values(c: Any) -> None:
    if c.vllm_server_base_url is not None and not c.vllm_server_base_url.startswith(("http://", "https://")):
        _refuse("vllm_server_base_url", c.vllm_server_base_url, "an address like http://127.0.0.1:8000")
    if not c.vllm_server_host or "/" in c.vllm_server_host or ":" in c.vllm_server_host:
        allowed = "a name or an IPv4 address; vllm_server_base_url takes any other address"
        _refuse("vllm_server_host", c.vllm_server_host, allowed)
    if c.generation_batch_size % c.num_generations:
        allowed = f"a multiple of num_generations={shown(c.num_generations)}"
        _refuse("generation_batch_size", c.generation_batch_size, allowed)
    if c.run_name is not None and (not c.run_name or "/" in c.run_name):
        _refuse("run_name", c.run_name, "a name without '/'; output_dir takes a path")
    if not all(abs(weight) <= LARGEST_REWARD for weight in c.reward_weights or []):
        _refuse("reward_weights", c.reward_weights, f"made of numbers within +-{LARGEST_REWARD:.1e}")
    if c.loss_type not in PRESETS and not names_function(c.loss_type):
        allowed = f"one of {', '.join(PRESETS)}, or a function as package.module.function or file.py:function"
        _refuse("loss_type", c.loss_type, allowed)


def _check_estimator(c: Any) -> None:
    if c.advantage_estimator not in ESTIMATOR_NAMES and not names_function(c.advantage_estimator):
        allowed = f"one of {', '.join(ESTIMATOR_NAMES)}, or a function as package.module.function or file.py:function"
        _refuse("advantage_estimator", c.advantage_estimator, allowed)
    defaults = {
        "reward_baseline": "mean",
        "scale_rewards": "group",
        "multi_objective_aggregation": "sum_then_normalize",
    }
    for name, default in defaults.items():
        if getattr(c, name) != default:
            raise UserError(f"advantage_estimator takes the place of {name}={getattr(c, name)!r}; set only one of them")


def check_objective_settings(config: Any, objective: PolicyObjective) -> None:
    """Refuse settings that a loss function would ignore."""
    if objective.function is None:
        return
    taken = parameters_of(objective.function)
    needed = {
        "epsilon": "epsilon",
        "epsilon_high": "epsilon_high",
        "delta": "delta",
        "covariance_kl": "covariance_kl",
        "importance_sampling_level": "ratio",
        **dict.fromkeys(_SELECTION, "selected"),
    }
    for name, argument in needed.items():
        if getattr(config, name) is not None and argument not in taken:
            raise UserError(
                f"{name}={shown(getattr(config, name))} has no effect: the function of loss_type={config.loss_type!r} "
                f"takes no {argument!r}"
            )


def ignored_settings(config: Any, objective: PolicyObjective) -> list[str]:
    """A line for each setting of `config` that has no effect on its `objective` or without another setting."""
    fields = config.__dataclass_fields__
    changed = {name for name in fields if getattr(config, name) != fields[name].default}
    lines = []
    if objective.function is None:
        taken = _KIND_SETTINGS[objective.kind]
        if objective.kl_bias_correction and config.beta and not config.kl_in_reward:
            taken = (*taken, "importance_sampling_level")
        owners = {name for names in _KIND_SETTINGS.values() for name in names}
        owners |= {*_SELECTION, "covariance_kl"}
        lines += [
            f"{name}={shown(getattr(config, name))} has no effect with loss_type={config.loss_type!r}"
            for name in fields
            if name in (owners & changed) - set(taken)
        ]
    lines += [
        f"{name}={shown(getattr(config, name))} has no effect without {switch}"
        for name, switch in _SWITCHED.items()
        if name in changed and not getattr(config, switch)
    ]
    return lines


def _check_masks(c: Any) -> None:
    """Refuse masks of tokens and sequences that could never act, or that lack a bound."""
    if c.rollout_rs is None:
        for name in ("rollout_rs_threshold", "rollout_rs_threshold_lower"):
            if getattr(c, name) is not None:
                raise UserError(f"{name}={shown(getattr(c, name))} requires rollout_rs, whose divergence it bounds")
    else:
        if not c.use_vllm:
            raise UserError(f"rollout_rs={c.rollout_rs!r} requires use_vllm: transformers samples the trainer's policy")
        if c.rollout_rs_threshold is None:
            raise UserError(f"rollout_rs={c.rollout_rs!r} requires rollout_rs_threshold")
        if c.rollout_rs_threshold_lower is not None and not c.rollout_rs.endswith("k1"):
            raise UserError(f"rollout_rs_threshold_lower requires a rollout_rs of k1, not {c.rollout_rs!r}")
    if c.off_policy_mask_threshold is not None and not c.use_vllm and c.updates_per_batch == 1:
        raise UserError(
            f"off_policy_mask_threshold={shown(c.off_policy_mask_threshold)} has no effect: without use_vllm, the only "
            "update on a batch is by the policy that sampled it; set num_iterations or steps_per_generation"
        )
    if c.use_adaptive_entropy and c.entropy_coef_min > c.entropy_coef_max:
        raise UserError(
            f"entropy_coef_min={shown(c.entropy_coef_min)} is above entropy_coef_max={shown(c.entropy_coef_max)}"
        )
    if c.advantage_estimator is None:
        for name in ("advantage_k", "length_penalty", "length_penalty_share"):
            if getattr(c, name) is not None:
                raise UserError(f"{name}={shown(getattr(c, name))} requires an advantage_estimator that takes it")
    elif c.advantage_k is not None and c.advantage_estimator in ESTIMATOR_NAMES and c.advantage_k > c.num_generations:
        _refuse("advantage_k", c.advantage_k, f"at most num_generations={c.num_generations}")


def _check_combinations(c: Any) -> None:
    if c.corrects_sampler and c.loss_type == "vespo" and "token" not in c.vllm_importance_sampling_mode:
        raise UserError(
            "loss_type='vespo' requires vllm_importance_sampling_mode token_truncate or token_mask, not "
            f"{c.vllm_importance_sampling_mode!r}: its own ratio already covers the whole sequence"
        )
    low, high = c.vllm_importance_sampling_clip_min, c.vllm_importance_sampling_clip_max
    if low is not None and high is not None and low > high:
        names = "vllm_importance_sampling_clip_min", "vllm_importance_sampling_clip_max"
        raise UserError(f"{names[0]}={shown(low)} is above {names[1]}={shown(high)}")
    if c.thinking_budget is not None and c.thinking_budget >= c.max_completion_length:
        allowed = f"below max_completion_length={shown(c.max_completion_length)}, so that an answer can follow"
        _refuse("thinking_budget", c.thinking_budget, allowed)
    if c.thinking_budget is not None and c.use_vllm:
        raise UserError(
            "thinking_budget is not possible with use_vllm, because vLLM does not say which tokens it forced: set "
            "use_vllm=false, or leave out thinking_budget"
        )
    if c.max_staleness and c.sample_ahead:
        raise UserError("max_staleness replaces sample_ahead; set only one of them")
    if c.max_staleness and "min_new_tokens" in (c.generation_kwargs or {}):
        raise UserError(
            "max_staleness is not possible with generation_kwargs: min_new_tokens, which would start again where an "
            "answer continues with new weights; leave out one of them"
        )
    if c.share_prompts == "always" and c.padding_free == "never":
        raise UserError("share_prompts='always' requires padding_free: prompts are shared in packed sequences")
    if c.num_generations_kept is not None and not 2 <= c.num_generations_kept <= c.num_generations:
        _refuse("num_generations_kept", c.num_generations_kept, f"from 2 to num_generations={c.num_generations}")
    if c.advantage_estimator is not None:
        _check_estimator(c)
    if c.reward_baseline in UNCENTRED and c.scale_rewards != "none":
        raise UserError(
            f"reward_baseline={c.reward_baseline!r} requires scale_rewards='none', not {c.scale_rewards!r}: rewards "
            "that are not centred are not scaled"
        )
    if c.scale_rewards == "whiten" and c.reward_baseline not in ("mean", "leave_one_out"):
        raise UserError(
            f"scale_rewards='whiten' requires reward_baseline mean or leave_one_out, not {c.reward_baseline!r}: it "
            "divides rewards that are centred in their groups"
        )
    if not (c.relative_weight or c.baseline_weight):
        raise UserError("relative_weight and baseline_weight are both 0, so that no completion has an advantage")
    if c.multi_objective_aggregation == "normalize_then_sum":
        for name, value in _NORMALIZE_THEN_SUM:
            if getattr(c, name) != value:
                raise UserError(
                    f"multi_objective_aggregation='normalize_then_sum' requires {name}={value!r}, "
                    f"not {getattr(c, name)!r}"
                )
    # A script may give the functions to the trainer.
    if c.reward_weights is not None and c.reward_funcs and len(c.reward_weights) != len(c.reward_funcs):
        raise UserError(f"reward_weights has {len(c.reward_weights)} values for {len(c.reward_funcs)} reward_funcs")
    _check_pass_rates(c)
    if c.prompt_template is not None and c.prompt_file is not None:
        raise UserError("prompt_template and prompt_file both make the prompt; set one of them")


def _check_pass_rates(c: Any) -> None:
    usual = {"min_pass_rate": 0, "max_pass_rate": 1, "prompt_sampling": "uniform"}
    used = [name for name, value in usual.items() if getattr(c, name) != value]
    if used and c.pass_rates is None:
        raise UserError(f"{used[0]} requires pass_rates: the folder of an evaluation with --split train")
    if c.pass_rates is not None and not used:
        raise UserError(f"pass_rates={shown(c.pass_rates)} has no effect without one of {', '.join(usual)}")
    if c.min_pass_rate > c.max_pass_rate:
        raise UserError(f"min_pass_rate={c.min_pass_rate:g} is above max_pass_rate={c.max_pass_rate:g}")
    if c.prompt_sampling == "prioritized" and not c.shuffle_dataset:
        raise UserError("prompt_sampling='prioritized' requires shuffle_dataset=True: it draws prompts at random")


def _literals(hint: Any) -> tuple:
    """The values that a ``Literal`` (or an optional one) allows; empty for other types."""
    if get_origin(hint) is Literal:
        return get_args(hint)
    values = [value for part in get_args(hint) for value in _literals(part)]
    return (*values, None) if values and type(None) in get_args(hint) else tuple(values)


def _refuse(name: str, value: object, allowed: str) -> NoReturn:
    raise UserError(f"{name}={shown(value)} is not allowed: it must be {allowed}")
