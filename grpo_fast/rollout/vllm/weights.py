"""A policy's weights under their checkpoint's names, one tensor at a time, for an engine with a copy of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import revert_weight_conversion

from grpo_fast.errors import UserError, writing

# Bytes of weights that are gathered in memory for one file.
FILE_BYTES = 1 << 30


@torch.no_grad()
def engine_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of `model` as its checkpoint has them; what is computed for them is one layer's at a time.

    LoRA adapters are merged: ``W + scale * B @ A`` in float32, rounded to W's dtype, and the trained tensors stay as
    they are. 4-bit weights are widened to the embedding's dtype. A sharded tensor is gathered, in which every rank has
    to take part. A tied head is left out.

    Args:
        model: a transformers causal LM, with adapters inside it or not, or a PeftModel.

    Raises:
        UserError: an adapter that is not a plain LoRA.
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    conversions = getattr(model, "_weight_conversions", None) or get_model_conversion_mapping(model, add_legacy=False)
    if not conversions:
        yield from _tensors(model)
        return
    # A checkpoint may split or join what the model holds, such as the matrices of a layer's experts.
    layer: dict[str, Tensor] = {}
    for name, tensor in _tensors(model):
        if layer and _layer(name) != _layer(next(iter(layer))):
            yield from revert_weight_conversion(model, layer).items()
            layer = {}
        layer[name] = tensor
    yield from revert_weight_conversion(model, layer).items()


def write_weights(model: nn.Module, folder: Path) -> None:
    """Write what `engine_weights` gives to safetensors files of about a GiB.

    Raises:
        UserError: the disk is full, or cannot be written to.
    """
    for number, tensors in enumerate(in_files(engine_weights(model))):
        with writing(folder):
            save_file(tensors, folder / f"weights-{number:05d}.safetensors", {"format": "pt"})


def in_files(tensors: Iterator[tuple[str, Tensor]], most: int = FILE_BYTES) -> Iterator[dict[str, Tensor]]:
    """The tensors in groups of at most `most` bytes, or one tensor where it is larger."""
    group: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if group and size + tensor.nbytes > most:
            yield group
            group, size = {}, 0
        group[name] = tensor.contiguous()
        size += tensor.nbytes
    if group:
        yield group


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers by their names without adapters; one that is tied, under its first name."""
    dtype = model.get_input_embeddings().weight.dtype
    seen: set[int] = set()
    for path, module in model.named_modules():
        parts = path.split(".")
        # The parts of an adapted layer, which come with the layer itself.
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
                whole = _gather(tensor)
            yield (
                f"{path}.{name}" if path else name,
                _merge(whole, module, path) if adapted and name == "weight" else whole,
            )


def _gather(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach()


def _merge(weight: Tensor, layer: nn.Module, path: str) -> Tensor:
    """The weight of an adapted layer with its active adapters."""
    if not isinstance(layer, LoraLayer):
        raise _other_adapter(path)
    merged = weight.float()
    for adapter in layer.active_adapters:
        if adapter in layer.lora_variant or layer.lora_bias.get(adapter):
            raise _other_adapter(path)
        if adapter in layer.lora_A:
            down, up = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
            transposed = layer.fan_in_fan_out
        elif adapter in layer.lora_embedding_A:
            down, up, transposed = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter], True
        else:
            continue
        delta = layer.scaling[adapter] * (_gather(up).float() @ _gather(down).float())
        merged = merged + (delta.T if transposed else delta)
    return merged.to(weight.dtype)


def _other_adapter(path: str) -> UserError:
    return UserError(f"the adapter of {path} is not a plain LoRA, and others are not merged for vLLM")


def _layer(name: str) -> str:
    """A tensor's name up to the number of its layer; the name itself outside of layers."""
    parts = name.split(".")
    number = next((index for index, part in enumerate(parts) if part.isdecimal()), len(parts))
    return ".".join(parts[: number + 1])
