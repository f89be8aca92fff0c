"""TRL's fields: those of `GRPOConfig`, `ModelConfig` and `ScriptArguments`, as in ``trl grpo --config``."""

from __future__ import annotations

from typing import Any

from grpo_fast.convert.rows import NoCounterpart, Row, Theirs, Trainer, fixed
from grpo_fast.named_functions import split_names


def report_to(theirs: Theirs) -> dict[str, Any]:
    given = theirs["report_to"]
    names = [given] if isinstance(given, str) else list(given or [])
    return {"report_to": [name for name in names if name not in ("none", None)]}


def _eval_steps(theirs: Theirs) -> dict[str, Any]:
    if theirs.get("eval_strategy") == "epoch":
        raise NoCounterpart("set eval_steps to the steps between two evaluations")
    return {} if theirs.get("eval_strategy") == "steps" or "eval_strategy" not in theirs else {"eval_steps": 0}


def _save_steps(theirs: Theirs) -> dict[str, Any]:
    if theirs["save_strategy"] == "no":
        return {"save_steps": 0}
    if theirs["save_strategy"] != "steps":
        raise NoCounterpart("set save_steps to the steps between two checkpoints")
    return {}


def epochs(theirs: Theirs) -> dict[str, Any]:
    """The length of a run whose file leaves it open; -1 is for no `max_steps`."""
    return {"num_train_epochs": 3.0} if theirs.get("max_steps") in (None, -1, "-1") else {}


def _log_completions(theirs: Theirs) -> dict[str, Any]:
    return {} if theirs["log_completions"] else {"log_completions_steps": 0}


def _reward_funcs(theirs: Theirs) -> dict[str, Any]:
    """Functions, and a reward model by its name; one without a slash is named as the argument of `reward_model`."""
    functions, model = theirs.get("reward_funcs") or [], theirs.get("reward_model_name_or_path")
    if model is None:
        return {"reward_funcs": functions} if functions else {}
    functions = split_names(functions) if isinstance(functions, str) else list(functions)
    return {"reward_funcs": [*functions, model if "/" in model else f"reward_model({model!r})"]}


def defaults(theirs: Theirs) -> dict[str, Any]:
    made: dict[str, Any] = {"gradient_checkpointing": True, "logging_steps": 10, "save_steps": 500}
    made["bf16"] = not theirs.get("fp16")
    made |= {"per_device_train_batch_size": 8, **epochs(theirs)}
    if theirs.get("use_peft"):
        made["lora_dropout"] = 0.05
    if theirs.get("use_vllm"):
        made |= {"vllm_enable_sleep_mode": False, "vllm_gpu_memory_utilization": 0.3}
    return made


# Fields of transformers' Trainer, which LLaMA-Factory has, too.
TRAINER_ROWS = (
    Row(("eval_strategy", "eval_on_start"), ("eval_steps",), "held-out prompts are always measured", _eval_steps),
    Row(("save_strategy",), ("save_steps",), "0 for the last step only", _save_steps),
    Row(("load_best_model_at_end",), ("keep_best",), "the best score measured every `eval_steps`"),
    Row(("metric_for_best_model",), ("eval_metric",), "the name of a reward function"),
    Row(("report_to",), ("report_to",), "", report_to),
    Row(("torch_dtype",), ("dtype",)),
    Row(
        ("fp16",), (), "use `bf16`, which needs no loss scaling",
        fixed("fp16", False, "set bf16: true"),
    ),
    Row(("tf32",), (), "leave it out; products in float32 stay exact"),
    Row(("deepspeed",), (), "set `fsdp: true` for several GPUs, `optim_offload: true` for one"),
    Row(("fsdp", "fsdp_config"), ("fsdp",), "true or false", lambda theirs: {"fsdp": bool(theirs.get("fsdp"))}),
    Row(("push_to_hub", "hub_model_id", "hub_strategy"), (), "upload the checkpoint's folder afterwards"),
    Row(("torch_compile",), (), "leave it out; the model is not compiled"),
    Row(("optim",), ("optim",), "AdamW in four forms", lambda theirs: _optim(theirs["optim"])),
)  # fmt: skip
# What changes no result, and what a run does in any case.
TRAINER_NOT_NEEDED = (
    "do_train", "do_eval", "overwrite_output_dir", "overwrite_cache", "ddp_timeout", "dataloader_num_workers",
    "preprocessing_num_workers", "dataloader_pin_memory", "per_device_eval_batch_size", "logging_strategy",
    "logging_dir", "disable_tqdm", "remove_unused_columns", "gradient_checkpointing_kwargs",
    "save_only_model", "save_safetensors", "log_level", "include_num_input_tokens_seen",
)  # fmt: skip


def _optim(name: str) -> dict[str, Any]:
    if name not in ("adamw_torch", "adamw_torch_fused", "adamw_torch_8bit", "adamw_8bit", "paged_adamw_8bit"):
        raise NoCounterpart("use adamw_torch_fused, adamw_torch_8bit, adamw_8bit or paged_adamw_8bit")
    return {"optim": "adamw_torch_fused" if name == "adamw_torch" else name}


TRL = Trainer(
    "TRL",
    (),
    (
        *TRAINER_ROWS,
        Row(("max_prompt_length",), ("long_prompts",), "prompts are never cut: `error` or `drop`", lambda _: {}),
        Row(("repetition_penalty",), ("generation_kwargs",), "`{repetition_penalty: 1.1}`",
            lambda theirs: {"generation_kwargs": {"repetition_penalty": theirs["repetition_penalty"]}}),
        Row(("log_completions", "num_completions_to_print", "log_unique_prompts"), ("log_completions_steps",),
            "to files in `completions/`",
            lambda theirs: _log_completions(theirs) if "log_completions" in theirs else {}),
        Row(("vllm_tensor_parallel_size", "vllm_model_impl"), (),
            "give it to the server: `grpo-fast serve CONFIG.yaml -- --tensor-parallel-size 2`"),
        Row(("vllm_importance_sampling_cap",), ("vllm_importance_sampling_clip_max",)),
        Row(("disable_dropout",), (), "set the dropout of the model's config to 0"),
        Row(("use_liger_loss",), (), "not needed: the loss never builds the logits", lambda _: {}),
        Row(("load_in_8bit",), (), "use `load_in_4bit`"),
        Row(("use_dora",), (), "use `use_rslora`, or neither"),
        Row(("lora_task_type",), (), "not needed", lambda _: {}),
        Row(("model_revision",), (), "download that revision, and give its folder as `model_name_or_path`",
            fixed("model_revision", "main", "download that revision, and give its folder as model_name_or_path")),
        Row(("dataset_streaming",), (), "write the rows to a file"),
        Row(("reward_model_name_or_path", "reward_funcs"), ("reward_funcs",), "a sequence classifier besides functions",
            _reward_funcs),
    ),
    (*TRAINER_NOT_NEEDED, "cast_lm_head_to_fp32", "ds3_gather_for_generation", "cache_implementation"),
    defaults,
)  # fmt: skip
