"""verl's fields by their dotted names, of which ``actor_rollout_ref.`` is left out."""

from __future__ import annotations

from typing import Any

from grpo_fast.convert.rows import NoCounterpart, Row, Theirs, Trainer, choice, fixed
from grpo_fast.convert.trl import report_to
from grpo_fast.errors import shown
from grpo_kernels import REJECTION_MODES

# `loss_agg_mode` of the clipped loss.
_AGGREGATIONS = {
    "token-mean": "dapo", "seq-mean-token-mean": "grpo", "seq-mean-token-sum-norm": "dr_grpo",
}  # fmt: skip
_LOSS_MODES = {
    "gpg": "reinforce", "gspo": "gspo", "cispo": "cispo", "sapo": "sapo", "geo_mean": "gmpo", "clip_cov": "clip_cov",
    "kl_cov": "kl_cov", "dppo_tv": "dppo_tv", "dppo_kl": "dppo_kl",
}  # fmt: skip
_ESTIMATORS = ("reinforce_plus_plus", "reinforce_plus_plus_baseline", "opo", "remax", "grpo_passk")
_KL_TYPES = {"kl": "k1", "k1": "k1", "mse": "k2", "k2": "k2", "low_var_kl": "k3", "k3": "k3"}


def _adapters(theirs: Theirs) -> dict[str, Any]:
    if not int(theirs.get("model.lora_rank", 0)):
        return {}
    made = {"use_peft": True, "lora_r": theirs["model.lora_rank"], "lora_alpha": theirs.get("model.lora_alpha", 16)}
    modules = theirs.get("model.target_modules", "all-linear")
    if modules not in ("all-linear", None):
        made["lora_target_modules"] = modules if isinstance(modules, list) else [modules]
    return made


def _one_file(field: str, ours: str, theirs: Theirs) -> dict[str, Any]:
    value = theirs.get(field)
    files = value if isinstance(value, list) else [value]
    if len(files) > 1:
        raise NoCounterpart(f"{ours} takes one file: write the rows of all files to one")
    return {ours: files[0]} if files[0] is not None else {}


def _files(theirs: Theirs) -> dict[str, Any]:
    return _one_file("data.train_files", "dataset_name", theirs) | _one_file(
        "data.val_files", "eval_dataset_name", theirs
    )


def _prompt(theirs: Theirs) -> dict[str, Any]:
    if theirs["data.prompt_key"] not in ("prompt", "messages"):
        raise NoCounterpart("rename the column of chat messages to prompt")
    return {}


def _long_prompts(theirs: Theirs) -> dict[str, Any]:
    if theirs.get("data.truncation", "error") != "error":
        raise NoCounterpart("prompts are never cut: set long_prompts: drop, or error")
    return {"long_prompts": "drop"} if theirs.get("data.filter_overlong_prompts") else {}


def _completions(theirs: Theirs) -> dict[str, Any]:
    """An optimizer step has the completions of a mini-batch of prompts."""
    count = int(theirs.get("rollout.n", 1))
    batch = int(theirs.get("data.train_batch_size", 1024))
    return {"num_generations": count, "generation_batch_size": count * int(theirs.get(MINI_BATCH, batch))}


MINI_BATCH = "actor.ppo_mini_batch_size"


def _tokens(theirs: Theirs) -> dict[str, Any]:
    found = theirs.get("actor.ppo_max_token_len_per_gpu")
    return {} if found is None else {"max_tokens_per_microbatch": found}


def _loss(theirs: Theirs) -> dict[str, Any]:
    mode = theirs.get("actor.policy_loss.loss_mode", "vanilla")
    aggregation = theirs.get("actor.loss_agg_mode", "token-mean")
    if mode == "vanilla" and aggregation in _AGGREGATIONS:
        return {"loss_type": _AGGREGATIONS[aggregation]}
    if mode in _LOSS_MODES:
        return {"loss_type": _LOSS_MODES[mode]}
    raise NoCounterpart(f"no loss_type is {mode} with {aggregation}; docs/objectives.md has those that there are")


def _covariance(theirs: Theirs) -> dict[str, Any]:
    """The settings of the loss mode that is used."""
    names = {
        "clip_cov": {
            "clip_cov_ratio": "covariance_ratio", "clip_cov_lb": "covariance_low", "clip_cov_ub": "covariance_high",
        },
        "kl_cov": {"kl_cov_ratio": "covariance_ratio", "ppo_kl_coef": "covariance_kl"},
    }.get(theirs.get("actor.policy_loss.loss_mode", "vanilla"), {})  # fmt: skip
    given = {ours: theirs.get(f"actor.policy_loss.{name}") for name, ours in names.items()}
    return {ours: value for ours, value in given.items() if value is not None}


def _rejection(theirs: Theirs) -> dict[str, Any]:
    mode = theirs.get("algorithm.rollout_correction.rollout_rs")
    if mode is None:
        return {}
    bound = str(theirs.get("algorithm.rollout_correction.rollout_rs_threshold"))
    if mode not in REJECTION_MODES or "," in bound:
        raise NoCounterpart(f"set rollout_rs to one of {', '.join(REJECTION_MODES)}, and rollout_rs_threshold")
    lower, _, upper = bound.rpartition("_")
    made = {"rollout_rs": mode, "rollout_rs_threshold": float(upper)}
    return made | ({"rollout_rs_threshold_lower": float(lower)} if lower else {})


def _kl(theirs: Theirs) -> dict[str, Any]:
    if not theirs.get("actor.use_kl_loss"):
        return {}
    kind = str(theirs.get("actor.kl_loss_type", "low_var_kl"))
    if kind not in _KL_TYPES:
        raise NoCounterpart(f"{shown(kind)} has no counterpart; set kl_estimator to k1, k2 or k3")
    coefficient = theirs.get("actor.kl_loss_coef", 0.001)
    return {"beta": coefficient, "kl_estimator": _KL_TYPES[kind], "use_bias_correction_kl": False}


def _kl_in_reward(theirs: Theirs) -> dict[str, Any]:
    if not theirs.get("algorithm.use_kl_in_reward"):
        return {}
    if theirs.get("actor.use_kl_loss"):
        raise NoCounterpart("the KL is in the reward or in the loss, not in both: choose by kl_in_reward")
    return {"kl_in_reward": True, "beta": theirs.get("algorithm.kl_ctrl.kl_coef", 0.001)}


def _filter_groups(theirs: Theirs) -> dict[str, Any]:
    if not theirs.get("algorithm.filter_groups.enable"):
        return {}
    most = int(theirs.get("algorithm.filter_groups.max_num_gen_batches", 0))
    # verl's 0 is for no limit.
    return {"dynamic_sampling": True, "max_num_gen_batches": most or 10**6}


def _correction(theirs: Theirs) -> dict[str, Any]:
    mode = theirs.get("algorithm.rollout_correction.rollout_is")
    if mode is None:
        return {"vllm_importance_sampling_correction": False}
    if mode not in ("token", "sequence"):
        raise NoCounterpart("set vllm_importance_sampling_mode")
    made = {"vllm_importance_sampling_mode": f"{mode}_truncate"}
    bound = theirs.get("algorithm.rollout_correction.rollout_is_threshold", 2.0)
    return made | {"vllm_importance_sampling_clip_max": bound}


def _adam(theirs: Theirs) -> dict[str, Any]:
    names = {"actor.optim.lr": "learning_rate", "actor.optim.weight_decay": "weight_decay"}
    made = {ours: theirs[name] for name, ours in names.items() if name in theirs}
    betas = theirs.get("actor.optim.betas")
    return made | ({"adam_beta1": betas[0], "adam_beta2": betas[1]} if betas else {})


def _warmup(theirs: Theirs) -> dict[str, Any]:
    steps = theirs.get("actor.optim.lr_warmup_steps", -1)
    share = theirs.get("actor.optim.lr_warmup_steps_ratio", 0)
    return {"warmup_steps": steps if float(steps) >= 0 else share}


def _sampling(theirs: Theirs) -> dict[str, Any]:
    made = {
        name: theirs[f"rollout.{name}"] for name in ("temperature", "top_p", "top_k") if f"rollout.{name}" in theirs
    }
    return made | ({"top_k": 0} if made.get("top_k") == -1 else {})


def _reward(theirs: Theirs) -> dict[str, Any]:
    path = theirs.get("reward.custom_reward_function.path", theirs.get("custom_reward_function.path"))
    if not path:
        return {}
    name = theirs.get("reward.custom_reward_function.name", theirs.get("custom_reward_function.name", "compute_score"))
    raise NoCounterpart(
        f"write a function that calls {name} for each completion (docs/migration.md shows it), and set "
        f"reward_funcs to the file and that function, as in my_rewards.py:my_reward"
    )


def _frequencies(theirs: Theirs) -> dict[str, Any]:
    names = {"trainer.save_freq": "save_steps", "trainer.test_freq": "eval_steps"}
    # -1 is for never.
    return {ours: max(int(theirs[name]), 0) for name, ours in names.items() if name in theirs}


def _resume(theirs: Theirs) -> dict[str, Any]:
    # Without an output_dir of its own, a run starts in a new folder, which has nothing to resume.
    return {"resume_from_checkpoint": theirs["trainer.resume_mode"] == "auto" and "trainer.default_local_dir" in theirs}


def _steps(theirs: Theirs) -> dict[str, Any]:
    if theirs.get("trainer.total_training_steps") is not None:
        return {"max_steps": theirs["trainer.total_training_steps"]}
    return {"num_train_epochs": theirs["trainer.total_epochs"]} if "trainer.total_epochs" in theirs else {}


def _loggers(theirs: Theirs) -> dict[str, Any]:
    value = theirs["trainer.logger"]
    names = [value] if isinstance(value, str) else list(value or [])
    return report_to({"report_to": [name for name in names if name not in ("console", "file")]})


def _processes(theirs: Theirs) -> dict[str, Any]:
    count = int(theirs.get("trainer.n_gpus_per_node", 8)) * int(theirs.get("trainer.nnodes", 1))
    if count > 1:
        raise NoCounterpart(f"start {count} processes with torchrun; docs/several-gpus.md shows it")
    return {}


def _defaults(theirs: Theirs) -> dict[str, Any]:
    made = {
        "gradient_checkpointing": True,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.01,
        # Rows of verl's data have their answers there.
        "answer_column": "reward_model.ground_truth",
        **_completions(theirs),
    }
    if theirs.get("trainer.total_training_steps") is None:
        made["num_train_epochs"] = 30
    if theirs.get("actor.policy_loss.loss_mode", "vanilla") == "vanilla":
        made["delta"] = 3.0
    if theirs.get("rollout.name") == "vllm":
        made["vllm_importance_sampling_correction"] = False
    return made


VERL = Trainer(
    "verl",
    ("actor_rollout_ref",),
    (
        Row(("model.path",), ("model_name_or_path",)),
        Row(("model.trust_remote_code",), ("trust_remote_code",)),
        Row(("model.lora_rank", "model.lora_alpha", "model.target_modules"),
            ("lora_r", "lora_alpha", "lora_target_modules"), "with `use_peft: true`", _adapters),
        Row(("model.lora_adapter_path",), ("model_name_or_path",), "the adapter's folder",
            lambda theirs: {} if theirs["model.lora_adapter_path"] is None else
            {"model_name_or_path": theirs["model.lora_adapter_path"]}),
        Row(("model.enable_gradient_checkpointing",), ("gradient_checkpointing",)),
        Row(("model.enable_activation_offload",), ("activation_offloading",)),
        Row(("model.use_remove_padding",), ("padding_free",), "on where the model allows it", lambda _: {}),
        Row(("model.use_liger",), ("use_liger_kernel",)),
        Row(("model.tiled_mlp.enabled",), ("tiled_mlp",)),
        Row(("data.train_files", "data.val_files"), ("dataset_name", "eval_dataset_name"), "one file each", _files),
        Row(("data.prompt_key",), (), "chat messages are in column `prompt` or `messages`", _prompt),
        Row(("data.train_max_samples", "data.val_max_samples"), ("max_train_samples", "max_eval_samples"), "",
            lambda theirs: {f"max_{ours}_samples": theirs[name] for name, ours in
                            (("data.train_max_samples", "train"), ("data.val_max_samples", "eval"))
                            if int(theirs.get(name, -1)) > 0}),
        Row(("data.max_prompt_length", "data.filter_overlong_prompts", "data.truncation"), ("long_prompts",),
            "never cut", _long_prompts),
        Row(("data.max_response_length",), ("max_completion_length",)),
        Row(("data.train_batch_size", "rollout.n"), ("generation_batch_size", "num_generations"),
            "completions, not prompts: `train_batch_size x n`", _completions),
        Row((MINI_BATCH,), ("generation_batch_size",),
            "mini-batches of one rollout become rollouts of that size; prompts times `n`", _completions),
        Row(("actor.ppo_micro_batch_size_per_gpu", "actor.ppo_micro_batch_size", "actor.use_dynamic_bsz", 
             "actor.ppo_max_token_len_per_gpu"),
            ("max_tokens_per_microbatch",), "always by tokens", _tokens),
        Row(("actor.ppo_epochs",), ("num_iterations",)),
        Row(("actor.clip_ratio",), ("epsilon",)),
        Row(("actor.clip_ratio_low", "actor.clip_ratio_high"), ("epsilon", "epsilon_high")),
        Row(("actor.clip_ratio_c",), ("delta",), "3 by default there, none here"),
        Row(("actor.policy_loss.loss_mode", "actor.loss_agg_mode"), ("loss_type",),
            "[objectives.md](objectives.md) has the pairs", _loss),
        Row(("actor.policy_loss.clip_cov_ratio", "actor.policy_loss.clip_cov_lb", "actor.policy_loss.clip_cov_ub",
             "actor.policy_loss.kl_cov_ratio", "actor.policy_loss.ppo_kl_coef"),
            ("covariance_ratio", "covariance_low", "covariance_high", "covariance_kl"),
            "the settings of the chosen `loss_mode`", _covariance),
        Row(("actor.tau_pos", "actor.tau_neg"), ("sapo_temperature_pos", "sapo_temperature_neg")),
        Row(("actor.entropy_coeff",), ("entropy_coef",)),
        Row(("actor.use_kl_loss", "actor.kl_loss_coef", "actor.kl_loss_type"), ("beta", "kl_estimator"),
            "`kl` is k1, `mse` k2, `low_var_kl` k3; `use_bias_correction_kl: false` gives the plain estimate", _kl),
        Row(("algorithm.use_kl_in_reward", "algorithm.kl_ctrl.kl_coef"), ("kl_in_reward", "beta"),
            "a sequence's KL; a constant coefficient", _kl_in_reward),
        Row(("algorithm.adv_estimator",), ("reward_baseline",),
            "`grpo` is `mean`, `rloo` is `leave_one_out`; others set `advantage_estimator`; no critic, so no `gae`",
            choice("algorithm.adv_estimator", {
                "grpo": {}, "rloo": {"reward_baseline": "leave_one_out", "scale_rewards": "none"},
                **{name: {"advantage_estimator": name} for name in _ESTIMATORS},
            }, "set reward_baseline: mean for GRPO, leave_one_out for RLOO; there is no critic")),
        Row(("algorithm.norm_adv_by_std_in_grpo",), ("scale_rewards",), "`group` or `none`",
            lambda theirs: {} if theirs["algorithm.norm_adv_by_std_in_grpo"] else {"scale_rewards": "none"}),
        Row(("algorithm.filter_groups.enable", "algorithm.filter_groups.max_num_gen_batches"),
            ("dynamic_sampling", "max_num_gen_batches"), "", _filter_groups),
        Row(("algorithm.rollout_correction.rollout_is", "algorithm.rollout_correction.rollout_is_threshold"),
            ("vllm_importance_sampling_mode", "vllm_importance_sampling_clip_max"),
            "`token` is `token_truncate`, `sequence` is `sequence_truncate`", _correction),
        Row(("algorithm.rollout_correction.rollout_rs", "algorithm.rollout_correction.rollout_rs_threshold"),
            ("rollout_rs", "rollout_rs_threshold"), "one criterion; `0.5_2.0` also sets `rollout_rs_threshold_lower`",
            _rejection),
        Row(("actor.optim.lr", "actor.optim.weight_decay", "actor.optim.betas"),
            ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2"),
            "verl's weight decay is 0.01 by default", _adam),
        Row(("actor.optim.lr_warmup_steps", "actor.optim.lr_warmup_steps_ratio"), ("warmup_steps",),
            "below 1 a share", _warmup),
        Row(("actor.optim.lr_scheduler_type",), ("lr_scheduler_type",), "verl's default is `constant`"),
        Row(("actor.optim.warmup_style",), ("lr_scheduler_type",), "the same in older versions"),
        Row(("actor.grad_clip",), ("max_grad_norm",)),
        Row(("actor.fsdp_config.optimizer_offload",), ("optim_offload",), "on one GPU"),
        Row(("rollout.name",), ("use_vllm",), "vLLM or transformers; no SGLang",
            choice("rollout.name", {"vllm": {"use_vllm": True}, "hf": {}}, "set use_vllm: true")),
        Row(("rollout.temperature", "rollout.top_p", "rollout.top_k"), ("temperature", "top_p", "top_k"),
            "0 instead of -1 for all tokens", _sampling),
        Row(("rollout.gpu_memory_utilization", "rollout.max_model_len"),
            ("vllm_gpu_memory_utilization", "vllm_max_model_length")),
        Row(("rollout.free_cache_engine",), ("vllm_enable_sleep_mode",)),
        Row(("rollout.tensor_model_parallel_size",), (),
            "an option of the server: `grpo-fast serve CONFIG.yaml -- --tensor-parallel-size 2`",
            fixed("rollout.tensor_model_parallel_size", 1,
                  "give it to the server: grpo-fast serve CONFIG.yaml -- --tensor-parallel-size 2")),
        Row(("rollout.val_kwargs.n",), ("num_generations_eval",),
            "sampled; `grpo-fast eval --greedy` takes the likeliest tokens"),
        Row(("reward.custom_reward_function.path", "reward.custom_reward_function.name"), ("reward_funcs",),
            "`[file.py:function]`; see below", _reward),
        Row(("custom_reward_function.path", "custom_reward_function.name"), ("reward_funcs",),
            "the same in older versions", _reward),
        Row(("reward_model.enable",), ("reward_funcs",), "a sequence classifier as `owner/name`, besides functions",
            fixed("reward_model.enable", False,
                  "name the reward model in reward_funcs, as owner/name or as a folder with a slash in it")),
        Row(("algorithm.kl_ctrl.type",), ("beta",), "a constant coefficient",
            fixed("algorithm.kl_ctrl.type", "fixed", "set beta, a constant weight of the KL term")),
        Row(("rollout.multi_turn.enable",), (), "one answer to each prompt, without tools",
            fixed("rollout.multi_turn.enable", False, "use prompts that are answered at once, without tools")),
        Row(("model.use_fused_kernels",), (), "the loss never builds the logits", lambda _: {}),
        Row(("trainer.total_epochs", "trainer.total_training_steps"), ("num_train_epochs", "max_steps"),
            "the steps of the optimizer, where both are given", _steps),
        Row(("trainer.save_freq", "trainer.test_freq"), ("save_steps", "eval_steps"), "0 instead of -1 for never",
            _frequencies),
        Row(("trainer.max_actor_ckpt_to_keep",), ("save_total_limit",)),
        Row(("trainer.default_local_dir", "trainer.experiment_name"), ("output_dir", "run_name")),
        Row(("trainer.resume_mode",), ("resume_from_checkpoint",), "or `--resume`", _resume),
        Row(("trainer.logger",), ("report_to",), "the run folder is always written",
            _loggers),
        Row(("trainer.n_gpus_per_node", "trainer.nnodes"), (), "[torchrun](several-gpus.md) starts the processes",
            _processes),
    ),
    (
        "actor.checkpoint.", "actor.profiler.", "actor.fsdp_config.", "actor.shuffle", "actor.use_fused_kernels",
        "actor.entropy_from_logits_with_chunking", "actor.entropy_checkpointing", "actor.use_remove_padding",
        "ref.", "reward_model.", "rollout.multi_turn.", "rollout.agent.", "rollout.trace.", "rollout.profiler.",
        "rollout.engine_kwargs.", "algorithm.gamma", "algorithm.lam", "algorithm.kl_penalty", "algorithm.pf_ppo.",
        "algorithm.kl_ctrl.horizon", "algorithm.kl_ctrl.target_kl", "model.fused_kernel_options.",
        "critic.", "ray_kwargs.", "hydra.", "global_profiler.", "defaults", "data.reward_fn_key",
        "trainer.project_name", "trainer.critic_warmup", "trainer.val_before_train", "trainer.default_hdfs_dir",
        "trainer.log_val_generations", "trainer.device", "data.shuffle", "data.return_raw_chat", "data.val_batch_size",
        "data.dataloader_num_workers", "actor.strategy", "model.use_shm",
        "actor.ulysses_sequence_parallel_size", "actor.use_torch_compile", "rollout.enforce_eager",
        "rollout.log_prob_micro_batch_size_per_gpu", "rollout.log_prob_use_dynamic_bsz", "rollout.dtype",
        "rollout.log_prob_max_token_len_per_gpu", "rollout.max_num_batched_tokens", "rollout.max_num_seqs",
        "rollout.enable_chunked_prefill", "rollout.load_format", "rollout.layered_summon", "rollout.do_sample",
        "rollout.mode", "rollout.log_prob_micro_batch_size", "trainer.balance_batch", "trainer.validation_data_dir",
        "trainer.rollout_data_dir", "trainer.val_only", "data.filter_overlong_prompts_workers",
    ),
    _defaults,
)  # fmt: skip
