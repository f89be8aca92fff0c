"""One copy of a frozen model for trainer and vLLM in the same process: the trainer's weights are views of vLLM's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from grpo_fast.rollout.vllm.weights import base_model


def sharing_obstacle(model: nn.Module) -> str | None:
    """Why vLLM cannot use the trainer's memory for the weights of a `model` with adapters that it takes alone; None if
    it can, as far as can be seen before vLLM has started.
    """
    if any(type(weight).__name__ == "Params4bit" for _, weight in frozen(model)):
        return "vLLM needs the 4-bit weights in 16 bits"
    dtypes = {weight.dtype for _, weight in frozen(model)}
    if len(dtypes) > 1:
        return f"the trainer has weights of several dtypes: {', '.join(sorted(map(str, dtypes)))}"
    return None


def frozen(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The weights of `model` besides its adapters, under their names without adapters; tied ones once."""
    for name, parameter in base_model(model).named_parameters():
        if ".lora_" not in name:
            yield name.replace(".base_layer.", "."), parameter


def move_out(model: nn.Module) -> None:
    """Move the frozen weights to main memory, so that they are not on the GPU twice while vLLM starts."""
    for _, parameter in frozen(model):
        parameter.data = parameter.data.cpu()
    if torch.cuda.is_initialized():
        # Otherwise torch keeps the memory, and vLLM has as much less.
        torch.cuda.empty_cache()


def move_back(model: nn.Module, device: torch.device) -> None:
    """Move the frozen weights to `device`."""
    for _, parameter in frozen(model):
        parameter.data = parameter.data.to(device)


def views(model: nn.Module, weights: Mapping[str, Tensor], fused: Mapping[str, Sequence[str]]) -> dict[str, Tensor]:
    """For each frozen weight of `model`, the part of vLLM's that holds the same numbers.

    vLLM fuses layers along their outputs and pads the vocabulary.

    Args:
        weights: vLLM's weights by their names without adapters; they are those of `model`.
        fused: vLLM's names of fused layers, such as ``qkv_proj``, and the names of their parts in order.

    Raises:
        ValueError: a weight is not among vLLM's, or has different values there; the message says which.
    """
    own = dict(frozen(model))
    found = {}
    for name, weight in own.items():
        layer, _, kind = name.rpartition(".")
        above, _, last = layer.rpartition(".")
        whole, start = weights.get(name), 0
        for joined, parts in fused.items():
            if whole is None and last in parts:
                whole = weights.get(f"{above}.{joined}.{kind}")
                before = [own.get(f"{above}.{part}.{kind}") for part in parts[: parts.index(last)]]
                start = sum(len(part) for part in before if part is not None)
        part = None if whole is None else whole[start : start + len(weight)]
        if part is None or part.dtype != weight.dtype or part.shape != weight.shape or not part.is_contiguous():
            raise ValueError(f"{name} has no counterpart")
        if not torch.equal(part, weight.detach().to(part.device)):
            raise ValueError(f"{name} has different values")
        found[name] = part
    return found


def adopt(model: nn.Module, parts: Mapping[str, Tensor]) -> None:
    """Let the frozen weights of `model` be `parts`, without a copy."""
    for name, parameter in frozen(model):
        parameter.data = parts[name]


def engine_tensors(engine_model: nn.Module) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    """vLLM's weights by their names without adapters, and its fused layers: what `views` needs."""
    named = {name.replace(".base_layer.", "."): _plain(weight) for name, weight in engine_model.named_parameters()}
    return named, getattr(engine_model, "packed_modules_mapping", {})


@contextmanager
def plain_layers() -> Iterator[None]:
    """A context in which vLLM on a CPU builds layers that keep their weights, instead of a packed copy."""
    from vllm.model_executor.layers.linear import LinearBase

    # vLLM itself sets it for single layers.
    LinearBase._cpu_skip_gemm_dispatch = True
    try:
        yield
    finally:
        del LinearBase._cpu_skip_gemm_dispatch


def keep_plain(engine_model: nn.Module) -> None:
    """Have layers that were built in `plain_layers` keep their weights when they are loaded again."""
    for layer in engine_model.modules():
        if hasattr(layer, "cpu_linear"):
            layer._cpu_skip_gemm_dispatch = True


def _plain(weight: Tensor) -> Tensor:
    """The weight's memory, as a tensor without vLLM's attributes and methods."""
    return weight.detach().as_subclass(torch.Tensor)
