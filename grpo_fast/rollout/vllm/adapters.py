"""LoRA adapters on their own, for an engine that already has the weights of the base model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from grpo_fast.errors import one_line
from grpo_fast.rollout.vllm.kv_plan import RANKS, padded_rank
from grpo_fast.rollout.vllm.weights import base_model, converts_weights, gather, is_plain
from grpo_fast.rollout.vllm.wire import write_tensors

# The names under which vLLM, like peft, reads an adapter from a folder.
TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def adapted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of `model` that have an adapter of any kind, by their names without adapters."""
    named = base_model(model).named_modules()
    return {
        path: module for path, module in named if hasattr(module, "base_layer") or hasattr(module, "original_module")
    }


def merge_reason(model: nn.Module) -> str | None:
    """Why the adapters of `model` cannot be sent without the weights that they adapt; None if they can.

    The answer follows from the model alone; whether vLLM supports adapters of its layers shows when it loads them.
    """
    model = base_model(model)
    layers = adapted_layers(model)
    if converts_weights(model):
        return f"the layers of {type(model).__name__} are named differently in its checkpoint"
    for path, layer in layers.items():
        active = _active(layer)
        if not isinstance(layer, LoraLayer) or not all(is_plain(layer, adapter) for adapter in active):
            return f"the adapter of {path} is not a plain LoRA"
        if layer.lora_embedding_A or not isinstance(layer.get_base_layer(), nn.Linear):
            return f"{path} is not a linear layer"
    if (rank := largest_rank(model)) > RANKS[-1]:
        return f"the rank {rank} is above {RANKS[-1]}"
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ".lora_" not in name:
            return f"{name} is trained besides the adapters"
    return None


def largest_rank(model: nn.Module) -> int:
    """The largest rank of a layer's active adapters together; 0 without adapters."""
    ranks = [[layer.r.get(name, 0) for name in _active(layer)] for layer in adapted_layers(model).values()]
    return max(map(sum, ranks), default=0)


def lora_options(model: nn.Module) -> dict[str, Any]:
    """Arguments of vLLM's engine with which it takes the adapters of `model`, one version at a time."""
    return {
        "enable_lora": True,
        "max_loras": 1,
        "max_lora_rank": padded_rank(largest_rank(model)),
        # Only these layers need memory and time for adapters.
        "lora_target_modules": sorted({path.rsplit(".", 1)[-1] for path in adapted_layers(model)}),
    }


@torch.no_grad()
def adapter_matrices(model: nn.Module) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Each adapted layer's name, ``A [rank, in]`` and ``scale * B [out, rank]``, in float32.

    Several active adapters of a layer are joined to one of the sum of their ranks.
    """
    for path, layer in adapted_layers(model).items():
        adapters = [adapter for adapter in _active(layer) if adapter in getattr(layer, "lora_A", {})]
        if not adapters:
            continue
        down = torch.cat([gather(layer.lora_A[adapter].weight).float() for adapter in adapters])
        up = [layer.scaling[adapter] * gather(layer.lora_B[adapter].weight).float() for adapter in adapters]
        yield path, down, torch.cat(up, dim=1)


def write_adapter(model: nn.Module, folder: Path) -> str:
    """Write the adapters of `model` in the form in which vLLM reads them, and return the checksum of the folder.

    The scale is part of B, so that vLLM does not round it separately. The dtype is that of the embedding, to which vLLM
    would convert them.

    Raises:
        UserError: the disk is full, or `folder` cannot be written.
    """
    dtype = base_model(model).get_input_embeddings().weight.dtype
    tensors, targets = {}, set()
    for path, down, up in adapter_matrices(model):
        name = f"base_model.model.{path}"
        tensors |= {f"{name}.lora_A.weight": down.to(dtype), f"{name}.lora_B.weight": up.to(dtype).contiguous()}
        targets.add(path.rsplit(".", 1)[-1])
    rank = largest_rank(model)
    described = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": sorted(targets), "bias": "none"}
    return write_tensors({TENSORS: tensors}.items(), folder, {CONFIG: json.dumps(described)})


def warn_merged(reason: str) -> str:
    """What a run says once if it sends merged weights instead of adapters."""
    return f"vLLM gets the whole model after every update, with the adapters merged, because {reason}"


def refused_reason(error: Exception) -> str:
    """The reason to merge if vLLM refused the adapters."""
    return f"vLLM refuses the adapters ({one_line(error)})"


def _active(layer: nn.Module) -> list[str]:
    return list(getattr(layer, "active_adapters", ()))
