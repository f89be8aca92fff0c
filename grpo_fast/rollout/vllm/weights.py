"""A policy's weights, one tensor at a time under their checkpoint names, for an engine that has its own copy."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

import torch
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import revert_weight_conversion

from grpo_fast.errors import UserError


@torch.no_grad()
def engine_weights(model: nn.Module, merged: bool = True) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of `model` as in its checkpoint; at most one layer is converted at a time.

    LoRA adapters are merged (``W + scale * B @ A`` in float32, rounded to the dtype of W) without changing the trained
    tensors. 4-bit weights are converted to the dtype of the embedding. Sharded tensors are gathered, so every rank must
    call this. A tied head is omitted.

    Args:
        model: a transformers causal LM, with or without adapters, or a PeftModel.
        merged: False leaves the adapters out.

    Raises:
        UserError: an adapter is not a plain LoRA.
    """
    model = base_model(model)
    if not converts_weights(model):
        yield from _tensors(model, merged)
        return
    # A checkpoint may split or join tensors of the model, such as the matrices of a layer's experts.
    for _, layer in groupby(_tensors(model, merged), lambda pair: _layer(pair[0])):
        yield from revert_weight_conversion(model, dict(layer)).items()


def base_model(model: nn.Module) -> nn.Module:
    """The transformers model of a PeftModel, or `model` itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def converts_weights(model: nn.Module) -> bool:
    """Whether the checkpoint's tensors have other names or shapes than those of the transformers `model`."""
    known = getattr(model, "_weight_conversions", None)
    return bool(known or get_model_conversion_mapping(model, add_legacy=False))


def _tensors(model: nn.Module, merged: bool) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers under their names without adapters; tied ones once, under the first name."""
    dtype = model.get_input_embeddings().weight.dtype
    seen: set[int] = set()
    for path, module in model.named_modules():
        parts = path.split(".")
        # Parts of an adapted layer are handled with the layer.
        if "base_layer" in parts or any(part.startswith("lora_") for part in parts):
            continue
        if isinstance(module, AuxiliaryTrainingWrapper):
            raise _other_adapter(path)
        adapted = hasattr(module, "base_layer")
        source = module.base_layer if adapted else module
        buffers = {k: v for k, v in source._buffers.items() if k not in source._non_persistent_buffers_set}
        for name, tensor in {**source._parameters, **buffers}.items():
            if tensor is None or id(tensor) in seen:
                continue
            seen.add(id(tensor))
            if type(tensor).__name__ == "Params4bit":
                whole = dequantize_module_weight(source).to(dtype)
            else:
                whole = gather(tensor)
            yield (
                f"{path}.{name}" if path else name,
                _merge(whole, module, path) if merged and adapted and name == "weight" else whole,
            )


def gather(tensor: Tensor) -> Tensor:
    """A whole tensor: one that is sharded is gathered from all processes."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach()


def _merge(weight: Tensor, layer: nn.Module, path: str) -> Tensor:
    """The weight of an adapted layer, merged with its active adapters."""
    if not isinstance(layer, LoraLayer):
        raise _other_adapter(path)
    merged = weight.float()
    for adapter in layer.active_adapters:
        if not is_plain(layer, adapter):
            raise _other_adapter(path)
        if adapter in layer.lora_A:
            down, up = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
            transposed = layer.fan_in_fan_out
        elif adapter in layer.lora_embedding_A:
            down, up, transposed = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter], True
        else:
            continue
        delta = layer.scaling[adapter] * (gather(up).float() @ gather(down).float())
        merged = merged + (delta.T if transposed else delta)
    return merged.to(weight.dtype)


def is_plain(layer: LoraLayer, adapter: str) -> bool:
    """Whether an adapter of a layer adds ``scale * B @ A`` to its weight, and does nothing else."""
    return adapter not in layer.lora_variant and not layer.lora_bias.get(adapter)


def _other_adapter(path: str) -> UserError:
    return UserError(f"the adapter of {path} is not a plain LoRA; vLLM can only sample with plain LoRA adapters")


def _layer(name: str) -> str:
    """The part of a tensor's name that ends with its layer number; the whole name outside of layers."""
    parts = name.split(".")
    number = next((index for index, part in enumerate(parts) if part.isdecimal()), len(parts))
    return ".".join(parts[: number + 1])
