"""Frozen decoder layers that wait in host memory and are copied to the device one layer ahead of the computation.

With adapters, the weights of the base do not change, so copies go one way. A layer is needed twice in a step of
training: in the forward, in order, and in the backward, where its checkpoint is recomputed, in reverse order. The
device holds as many layers as there are slots: one that computes and one that is being copied. The idea is that of
ZeRO-Infinity (Rajbhandari et al., 2021) and of FlexGen (Sheng et al., 2023), for frozen weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from grpo_fast.errors import UserError
from grpo_fast.model.activations import checkpointed_layers

T = TypeVar("T")
SLOTS = 2
# Smaller weights stay on the device: norms and biases.
MIN_BYTES = 1 << 16
# Weights start at multiples of this many bytes within a layer's buffer.
ALIGNMENT = 256


@dataclass
class Waiting:
    """One layer's frozen weights in host memory.

    Attributes:
        buffer: their bytes, pinned for a GPU.
        weights: each with its first byte in the buffer.
        slot: the slot that holds them, if any.
        arrived: the end of the copy into it, on a GPU.
    """

    buffer: Tensor
    weights: list[tuple[nn.Parameter, int]]
    slot: int | None = None
    arrived: torch.cuda.Event | None = field(default=None, repr=False)


class HostLayers:
    """Moves the frozen weights of some layers of a model to host memory, and back while they are needed.

    On a GPU the copies run on a stream of their own, beside the computation of the layer before.

    Attributes:
        copies: how many layers were copied to the device.
        bytes_copied: their bytes.
    """

    def __init__(self, layers: list[nn.Module], device: torch.device, min_bytes: int):
        self.device, self.copies, self.bytes_copied = device, 0, 0
        self.waiting = [_stash(layer, device, min_bytes) for layer in layers]
        largest = max((one.buffer.numel() for one in self.waiting), default=0)
        self.slots = [torch.empty(largest, dtype=torch.uint8, device=device) for _ in range(SLOTS)]
        self.held: list[int | None] = [None] * SLOTS
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        for index, layer in enumerate(layers):
            layer.register_forward_pre_hook(partial(self._before, index))
            # Depending on its version, transformers recomputes a layer with or without its hooks.
            layer._gradient_checkpointing_func = partial(self._checkpoint, index, layer._gradient_checkpointing_func)

    @property
    def bytes_on_host(self) -> int:
        return sum(one.buffer.numel() for one in self.waiting)

    def _before(self, index: int, layer: nn.Module, _: Any) -> None:
        if torch.is_grad_enabled() and not layer.training:
            raise RuntimeError(
                "with layers_on_host, a forward with gradients must checkpoint its layers: call train() on the model"
            )
        self.enter(index)

    def _checkpoint(self, index: int, run: Callable, function: Callable, *args: Any, **kwargs: Any) -> Any:
        def entering(*inputs: Any, **options: Any) -> Any:
            self.enter(index)
            return function(*inputs, **options)

        return run(entering, *args, **kwargs)

    def enter(self, index: int) -> None:
        """Make a layer's weights available before its forward, and begin to copy those of the next."""
        self._fetch(index, keep=index)
        one = self.waiting[index]
        if one.arrived is not None:
            torch.cuda.current_stream(self.device).wait_event(one.arrived)
            one.arrived = None
        following = self._following(index)
        if following != index:
            self._fetch(following, keep=index)

    def _following(self, index: int) -> int:
        """The layer that is likely to be next.

        In a backward pass it is the previous one. In a forward pass it is the next one; after the last one, a pass
        without gradients starts again with the first, while one with gradients turns back.
        """
        last = len(self.waiting) - 1
        if torch._C._current_graph_task_id() != -1:
            return index - 1 if index else min(1, last)
        if index < last:
            return index + 1
        return max(last - 1, 0) if torch.is_grad_enabled() else 0

    def _fetch(self, index: int, keep: int) -> None:
        """Copy a layer's weights into a slot, unless they are in one; the slot of layer `keep` is not taken."""
        one = self.waiting[index]
        if one.slot is not None:
            return
        slot = next(slot for slot, holder in enumerate(self.held) if holder is None or holder != keep)
        if (holder := self.held[slot]) is not None:
            _release(self.waiting[holder], self.device)
        self.held[slot], one.slot = index, slot
        target = self.slots[slot][: one.buffer.numel()]
        if self.stream is None:
            target.copy_(one.buffer)
        else:
            # What is queued may still read the slot's former weights.
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self.stream):
                target.copy_(one.buffer, non_blocking=True)
                one.arrived = self.stream.record_event()
        for weight, start in one.weights:
            weight.data = target[start : start + weight.nbytes].view(weight.dtype).view(weight.shape)
        self.copies += 1
        self.bytes_copied += one.buffer.numel()


def keep_layers_on_host(
    model: nn.Module, count: int, device: torch.device, min_bytes: int | None = None
) -> HostLayers | None:
    """Let `count` layers of `model` wait in host memory, evenly spread to give the copies time; all if it has fewer.

    Args:
        model: a causal LM whose layers checkpoint themselves and whose weights are frozen but for adapters.
        count: number of layers; 0 changes nothing.
        device: where the model computes. The model may still be in host memory: what waits never reaches the device.
        min_bytes: smaller weights stay on the device (default: `MIN_BYTES`).

    Raises:
        UserError: the layers do not checkpoint themselves, or have no frozen weights of `min_bytes`.
    """
    if not count:
        return None
    layers = list(checkpointed_layers(model))
    if not layers:
        raise UserError(f"layers_on_host={count}: {type(model).__name__} has no layers that checkpoint themselves")
    smallest = MIN_BYTES if min_bytes is None else min_bytes
    moved = HostLayers(spread(layers, count), device, smallest)
    if not moved.bytes_on_host:
        raise UserError(
            f"layers_on_host={count} has no effect: no layer of {type(model).__name__} has a frozen weight of at least "
            f"{smallest:,} bytes; leave it out"
        )
    return moved


def spread(layers: Sequence[T], count: int) -> list[T]:
    """`count` of the layers at even distances, the last one among them; all if there are not more."""
    total = len(layers)
    count = min(count, total)
    return [layers[(index + 1) * total // count - 1] for index in range(count)]


def _stash(layer: nn.Module, device: torch.device, min_bytes: int) -> Waiting:
    frozen = [p for p in layer.parameters() if not p.requires_grad and p.nbytes >= min_bytes]
    starts, size = [], 0
    for weight in frozen:
        starts.append(size)
        size += -(-weight.nbytes // ALIGNMENT) * ALIGNMENT
    buffer = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda" and size > 0)
    for weight, start in zip(frozen, starts, strict=True):
        buffer[start : start + weight.nbytes].view(weight.dtype).view(weight.shape).copy_(weight.detach())
    waiting = Waiting(buffer, list(zip(frozen, starts, strict=True)))
    _release(waiting, device)
    return waiting


def _release(waiting: Waiting, device: torch.device) -> None:
    """Leave tensors of the weights' shapes but without memory in their place.

    They are NaN where their dtype has one, so that it is noticed if they are read outside the layer's forward.
    """
    waiting.slot = waiting.arrived = None
    for weight, _ in waiting.weights:
        fill = torch.nan if weight.dtype.is_floating_point else 0
        weight.data = torch.full((1,), fill, dtype=weight.dtype, device=device).expand(weight.shape)
