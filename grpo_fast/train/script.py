"""What a script or a notebook gives `GRPOTrainer` as objects, and the fields that describe them in config.yaml."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from grpo_fast.config import GRPOConfig, check_complete
from grpo_fast.data import Row
from grpo_fast.errors import UserError, shown
from grpo_fast.model.loading import LORA_FIELDS
from grpo_fast.rewards.functions.reward_model import RewardClassifier, reward_model
from grpo_fast.rewards.registry import is_shipped, names_model, sources_of

# Fields that say how a model is loaded, and so have no effect on one that is given as an object.
_LOADING = ("dtype", "attn_implementation", "trust_remote_code", "model_init_kwargs", "load_in_4bit")
# Fields that choose among the rows of a named dataset.
_SOURCES = ("dataset_config", "dataset_kwargs", "dataset_train_split", "dataset_test_split")
# TRL's further arguments of the trainer, and what to use instead.
_NOT_TAKEN = {
    "callbacks": "report_to, eval_steps and save_steps",
    "optimizers": "optim, learning_rate and lr_scheduler_type",
    "quantization_config": "load_in_4bit",
    "tools": "nothing: tools are not supported",
    "rollout_func": "use_vllm, or nothing: own rollouts are not supported",
    "environment_factory": "nothing: environments are not supported",
}
# Elements at the beginning of each tensor that stand for all of it in a fingerprint.
_SAMPLED = 256


@dataclass
class ScriptObjects:
    """The objects of a script; None, or an empty list, for what it named in the configuration instead."""

    model: nn.Module | None = None
    adapter: Any = None  # the PeftModel around `model`, or the PeftConfig of a new adapter
    tokenizer: Any = None
    train_rows: list[Row] | None = None
    eval_rows: list[Row] | None = None
    reward_funcs: list[str | Callable] | None = None


def refuse_others(others: Mapping[str, Any]) -> None:
    """Refuse arguments of TRL's trainer that are not taken here, unless they have TRL's default."""
    if unknown := [name for name in others if name not in _NOT_TAKEN]:
        raise TypeError(f"GRPOTrainer takes no argument {', '.join(map(repr, unknown))}")
    given = [name for name, value in others.items() if value is not None and value != (None, None)]
    if given:
        listed = "; ".join(f"{name}: use {_NOT_TAKEN[name]}" for name in given)
        raise UserError(f"GRPOTrainer does not take {listed}")


def read_script(
    config: GRPOConfig,
    model: Any,
    reward_funcs: Any,
    train_dataset: Any,
    eval_dataset: Any,
    processing_class: Any,
    peft_config: Any,
    reward_processing_classes: Any = None,
) -> tuple[GRPOConfig, ScriptObjects]:
    """The configuration of a run with the arguments of `GRPOTrainer`, and those of them that are objects.

    Raises:
        UserError: an argument is of a type that is not supported, or contradicts the configuration, or the run has no
            model, data or rewards.
    """
    objects, fields, described = ScriptObjects(), {}, {}
    if isinstance(model, (str, Path)):
        _refuse_twice("model", config.model_name_or_path != str(model) and config.model_name_or_path)
        fields["model_name_or_path"] = str(model)
    elif model is not None:
        _refuse_twice("model", config.model_name_or_path)
        objects.model, objects.adapter = _model_and_adapter(model, config)
        name = getattr(objects.model.config, "_name_or_path", "") or type(objects.model).__name__
        fields["model_name_or_path"], described["model"] = name, type(model).__name__
    if processing_class is not None:
        if not hasattr(processing_class, "apply_chat_template") or not hasattr(processing_class, "pad_token_id"):
            raise UserError(f"processing_class must be a tokenizer, got {type(processing_class).__name__}")
        objects.tokenizer, described["processing_class"] = processing_class, type(processing_class).__name__
    if peft_config is not None:
        if objects.adapter is not None:
            raise UserError("peft_config and a PeftModel both make the adapter; give one of them")
        objects.adapter, described["peft_config"] = peft_config, shown(peft_config)
    if objects.adapter is not None:
        fields |= {"use_peft": True, **_lora_fields(objects.adapter)}
    if train_dataset is not None:
        _refuse_twice("train_dataset", config.dataset_name, "dataset_name")
        for name in _SOURCES:
            _refuse_twice("train_dataset", getattr(config, name) != getattr(GRPOConfig, name) and name, name)
        objects.train_rows = read_dataset(train_dataset, "train_dataset")
        fields["dataset_name"], described["train_dataset"] = "train_dataset", _count(train_dataset, objects.train_rows)
    if eval_dataset is not None:
        _refuse_twice("eval_dataset", config.eval_dataset_name, "eval_dataset_name")
        objects.eval_rows = read_dataset(eval_dataset, "eval_dataset")
        described["eval_dataset"] = _count(eval_dataset, objects.eval_rows)
    if reward_funcs is not None:
        _refuse_twice("reward_funcs", config.reward_funcs)
        alone = isinstance(reward_funcs, str) or not isinstance(reward_funcs, Iterable)
        functions = _with_models([reward_funcs] if alone else list(reward_funcs), reward_processing_classes)
        objects.reward_funcs, fields["reward_funcs"] = functions, sources_of(functions)
        named = zip(fields["reward_funcs"], functions, strict=True)
        own = [name for name, given in named if not isinstance(given, str) and not is_shipped(given)]
        if own:
            described["reward_funcs"] = ", ".join(own)
    if described and config.run_name is None:
        stem = (fields.get("model_name_or_path") or config.model_name_or_path or "model").rstrip("/")
        fields["run_name"] = f"{stem.rsplit('/', 1)[-1]}-GRPO"
    config = dataclasses.replace(config, **fields, script_objects=described or None)
    _check_given(config)
    return config, objects


def _check_given(config: GRPOConfig) -> None:
    try:
        check_complete(config)
    except UserError as error:
        arguments = {"model_name_or_path": "model", "dataset_name": "train_dataset", "reward_funcs": "reward_funcs"}
        argument = arguments[str(error).partition(" ")[0]]
        raise UserError(f"{error}; in a script, give GRPOTrainer {argument}=...") from None


def _refuse_twice(argument: str, set_already: object, field: str = "") -> None:
    if set_already:
        name = field or {"model": "model_name_or_path"}.get(argument, argument)
        raise UserError(f"{argument} and the configuration's {name}={shown(set_already)} are both given; leave one out")


def _model_and_adapter(model: Any, config: GRPOConfig) -> tuple[nn.Module, Any]:
    """The transformers model, and the PeftModel around it or None."""
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        raise UserError(f"model must be a name or a transformers model, got {type(model).__name__}")
    for name in _LOADING:
        value = getattr(config, name)
        if value != getattr(GRPOConfig, name):
            raise UserError(
                f"{name}={shown(value)} has no effect on a model that is loaded already; load it so instead"
            )
    adapted = hasattr(model, "get_base_model") and hasattr(model, "peft_config")
    if config.use_peft and not adapted:
        # A new adapter, as the lora_* fields describe it.
        return model, None
    if not adapted:
        return model, None
    if list(model.peft_config) != ["default"]:
        raise UserError(
            f"a PeftModel must have one adapter, named 'default'; this one has {', '.join(model.peft_config)}"
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError("no weight of the PeftModel is trained; load it with is_trainable=True")
    return model.get_base_model(), model


def _lora_fields(adapter: Any) -> dict[str, Any]:
    """The `lora_*` fields that describe a PeftConfig, or that of a PeftModel, as far as fields can."""
    found = adapter.peft_config["default"] if hasattr(adapter, "get_base_model") else adapter
    if getattr(found, "is_prompt_learning", False) or not hasattr(found, "target_modules"):
        raise UserError(f"peft_config must be a LoraConfig or a like one, got {type(found).__name__}")
    values = {}
    for name, theirs in LORA_FIELDS.items():
        value = getattr(found, theirs, None)
        if isinstance(value, (set, tuple, list)):
            value = sorted(value)
        if value is not None and not (name == "lora_target_modules" and isinstance(value, str)):
            values[name] = value
    return values


def read_dataset(dataset: Any, argument: str) -> list[Row]:
    """The rows of a datasets.Dataset, or of a list of dictionaries.

    Raises:
        UserError: it is a stream, a dictionary of splits, or anything else.
    """
    if isinstance(dataset, Mapping):
        raise UserError(f"{argument} holds several splits, {', '.join(map(str, dataset))}; give one of them")
    if not hasattr(dataset, "__len__") or isinstance(dataset, (str, bytes)):
        raise UserError(
            f"{argument} must be a datasets.Dataset or a list of rows, got {type(dataset).__name__}; of a stream, give "
            f"the rows to use, as in list({argument}.take(1000))"
        )
    rows = list(dataset)
    for number, row in enumerate(rows, 1):
        if not isinstance(row, Mapping):
            raise UserError(f"{argument}, row {number}: expected a dictionary, got {type(row).__name__}")
    if not rows:
        raise UserError(f"{argument} has no rows")
    return [dict(row) for row in rows]


def _count(dataset: Any, rows: list[Row]) -> str:
    return f"{type(dataset).__name__} of {len(rows)} rows"


def _with_models(functions: list[Any], tokenizers: Any) -> list[Any]:
    """The reward functions, with modules as reward models, each with its tokenizer of ``reward_processing_classes``."""
    given = list(tokenizers) if isinstance(tokenizers, (list, tuple)) else [tokenizers] * bool(tokenizers)
    if given and len(given) != len(functions):
        raise UserError(
            f"reward_processing_classes has {len(given)} entries for {len(functions)} reward_funcs; give one for each, "
            "None for a function"
        )
    made = []
    for function, tokenizer in zip(functions, given or [None] * len(functions), strict=True):
        if isinstance(function, nn.Module):
            made.append(RewardClassifier(function, tokenizer))
            continue
        if not isinstance(function, str) and not callable(function):
            raise UserError(f"reward_funcs must be functions, models or names, got {type(function).__name__}")
        if tokenizer is not None and not (isinstance(function, str) and names_model(function)):
            raise UserError(
                f"reward_processing_classes gives a tokenizer to {shown(function)}, which is not a reward model"
            )
        made.append(function if tokenizer is None else reward_model(function, tokenizer=tokenizer))
    return made


def weights_fingerprint(model: nn.Module) -> str:
    """A checksum of the beginning of every parameter, to tell another model from the one that a run began with."""
    checksum = 0
    for name, parameter in model.named_parameters():
        values = parameter.detach().flatten()[:_SAMPLED].to("cpu").contiguous().view(torch.uint8)
        checksum = zlib.crc32(values.numpy().tobytes(), zlib.crc32(name.encode(), checksum))
    return f"{checksum:08x}"
