"""TRL's spellings: fields that have another name or no place here, and values that mean one of ours."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from grpo_fast.errors import UserError, nearest

# TRL's fields that have another name or another place here: what an error says after "set".
TRL_FIELDS_INSTEAD = {
    "repetition_penalty": "generation_kwargs",
    "max_prompt_length": "long_prompts: prompts are never cut",
    "log_completions": "log_completions_steps",
    "num_completions_to_print": "log_completions_steps",
    "eval_strategy": "eval_steps (0: only before and after training)",
    "eval_on_start": "nothing: held-out prompts are measured before training in any case",
    "per_device_eval_batch_size": "max_tokens_per_generation_batch",
    "save_strategy": "save_steps (0: only after the last step)",
    "logging_strategy": "logging_steps",
    "load_best_model_at_end": "keep_best",
    "metric_for_best_model": "eval_metric",
    "vllm_importance_sampling_cap": "vllm_importance_sampling_clip_max",
    "vllm_tensor_parallel_size": "it on the server (grpo-fast serve CONFIG.yaml -- --tensor-parallel-size 2)",
    "use_transformers_continuous_batching": "max_tokens_per_generation_batch: continuous batching is the default",
    "use_transformers_paged": "max_tokens_per_generation_batch: continuous batching is the default",
    "remove_unused_columns": "nothing: all columns reach the reward functions",
    "gradient_checkpointing_kwargs": "gradient_checkpointing alone",
    "torch_dtype": "dtype",
    "fp16": "bf16 or dtype (float16 needs a loss scale, which this trainer does not have)",
}
_SCALES = {True: "group", False: "none"}


def name_unknown(names: Iterable[str], known: Collection[str], kind: str = "field", mark: str = "") -> str:
    """All unknown names of `names` in one line, each with what to use instead; empty if all are known.

    `kind` is what the names are, and `mark` is printed before each.
    """
    unknown = [name for name in names if name not in known]
    if not unknown:
        return ""
    if len(unknown) == 1:
        shown = f"{mark}{unknown[0]}" if mark else repr(unknown[0])
        return f"unknown {kind} {shown}{_instead(unknown[0], known)}"
    listed = "; ".join(f"{mark}{name}{_instead(name, known, ': ')}" for name in unknown)
    return f"{len(unknown)} unknown {kind}s: {listed}"


def _instead(name: str, known: Collection[str], link: str = "; ") -> str:
    """The field that replaces one of TRL's, or the most similar name."""
    if name in TRL_FIELDS_INSTEAD:
        return f"{link}set {TRL_FIELDS_INSTEAD[name]}" + " instead" * (link == "; ")
    return nearest(name, known)


def check_names(names: Iterable[str], known: Collection[str], kind: str) -> None:
    """Refuse unknown fields of a configuration, all of them at once."""
    if wrong := name_unknown(names, known):
        raise UserError(f"{kind}: {wrong}")


def translate(config: Any) -> None:
    """Replace TRL's values of a `GRPOConfig` by the ones that mean the same here."""
    if isinstance(config.scale_rewards, bool):
        config.scale_rewards = _SCALES[config.scale_rewards]
    if isinstance(config.report_to, str):
        config.report_to = [] if config.report_to == "none" else [config.report_to]
