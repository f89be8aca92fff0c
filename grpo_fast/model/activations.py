"""What of a forward is kept for the backward: checkpoints, their way to host memory and back, and tiled MLPs."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from grpo_fast.config import GRPOConfig
from grpo_fast.errors import UserError, import_extra

# Smaller tensors stay where they are: their copies cost more time than they free memory.
MIN_OFFLOADED_BYTES = 1 << 20
# Tokens of one MLP tile: enough for matrix products at full speed.
MLP_TILE_TOKENS = 2048


def check_activations(config: GRPOConfig, device: torch.device) -> None:
    """Refuse, before anything is loaded, what this device or installation does not have.

    Raises:
        UserError: use_liger_kernel without a GPU or without liger-kernel.
    """
    if config.use_liger_kernel:
        if device.type == "cpu":
            raise UserError("use_liger_kernel=True needs a GPU: its kernels are written in Triton")
        import_extra("liger_kernel", "liger")


def prepare_activations(model: nn.Module, config: GRPOConfig) -> ActivationOffloader | None:
    """Change `model` (a transformers causal LM) in place as the configuration's activation fields say.

    Returns the offloader, which knows how much it moved, or None without `activation_offloading`.

    Raises:
        UserError: the model cannot be treated so.
    """
    if config.use_liger_kernel:
        _use_liger_kernel(model)
    if config.tiled_mlp:
        tile_mlps(model)
    if config.gradient_checkpointing:
        # The older name is deprecated where the newer one exists.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        try:
            enable({"use_reentrant": False})
        except ValueError as error:
            raise UserError(f"gradient_checkpointing=True: {error}") from None
    return offload_checkpoints(model) if config.activation_offloading else None


def _use_liger_kernel(model: nn.Module) -> None:
    patch = import_extra("liger_kernel.transformers.monkey_patch", "liger")
    kind = model.config.model_type
    if kind not in patch.MODEL_TYPE_TO_APPLY_LIGER_FN:
        known = ", ".join(sorted(patch.MODEL_TYPE_TO_APPLY_LIGER_FN))
        raise UserError(f"use_liger_kernel=True does not know model type {kind!r}, only {known}")
    # The loss is computed without logits here, so its cross entropies stay out.
    patch._apply_liger_kernel_to_instance(
        model, rope=True, rms_norm=True, swiglu=True, cross_entropy=False, fused_linear_cross_entropy=False
    )


def tile_mlps(model: nn.Module, tokens: int = MLP_TILE_TOKENS) -> int:
    """Compute every MLP in tiles of `tokens` tokens, each recomputed in the backward; returns how many MLPs.

    The intermediates of one tile exist at a time, instead of those of all tokens. torch's checkpoint around each tile
    keeps dropout, autocast and a layer right whose input needs no gradient; with liger-kernel 0.8.5's
    ``apply_tiled_mlp`` dropout is drawn anew in the backward, autocast is off there, and adapters behind an input
    without gradient get none.

    Raises:
        UserError: the model has no MLPs, or they are mixtures of experts, whose router sees all tokens at once.
    """
    mlps = [m.mlp for m in model.modules() if isinstance(getattr(m, "mlp", None), nn.Module)]
    if not mlps:
        raise UserError(f"tiled_mlp=True: the layers of {type(model).__name__} have no module named 'mlp'")
    for mlp in mlps:
        if any("expert" in name or "router" in name for name, _ in mlp.named_modules()):
            raise UserError(f"tiled_mlp=True is for dense MLPs, but {type(mlp).__name__} is a mixture of experts")
        mlp.forward = partial(_tiled, mlp.forward, tokens)
    return len(mlps)


def _tiled(forward: Callable[[Tensor], Tensor], tokens: int, hidden: Tensor) -> Tensor:
    flat = hidden.reshape(-1, hidden.shape[-1])
    if len(flat) <= tokens:
        return forward(hidden)
    return torch.cat([checkpoint(forward, tile, use_reentrant=False) for tile in flat.split(tokens)]).view_as(hidden)


def offload_checkpoints(model: nn.Module, min_bytes: int = MIN_OFFLOADED_BYTES) -> ActivationOffloader:
    """Let the inputs of `model`'s checkpointed layers wait in host memory for their backward.

    Raises:
        UserError: the model's layers do not checkpoint themselves.
    """
    layers = list(_checkpointed_layers(model))
    if not layers:
        raise UserError(f"activation_offloading=True: {type(model).__name__} has no layers that checkpoint themselves")
    offloader = ActivationOffloader(min_bytes)
    for index, layer in enumerate(layers):
        # The backward begins with the last layer: its input is wanted at once, so it stays.
        keep = index == len(layers) - 1
        layer._gradient_checkpointing_func = partial(offloader.run, keep, layer._gradient_checkpointing_func)
    return offloader


def _checkpointed_layers(model: nn.Module) -> Iterator[nn.Module]:
    """In the order of the forward. The stacks above them carry the same attributes, but only pass them on."""
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False) and hasattr(module, "_gradient_checkpointing_func"):
            below = (m for child in module.children() for m in child.modules())
            if not any(getattr(m, "gradient_checkpointing", False) for m in below):
                yield module


class Saved:
    """A tensor that waits for the backward, on its device or in a buffer of host memory."""

    def __init__(self, tensor: Tensor, previous: Saved | None):
        self.tensor: Tensor | None = tensor
        self.shape, self.dtype, self.device = tensor.shape, tensor.dtype, tensor.device
        self.previous = (lambda: None) if previous is None else weakref.ref(previous)
        self.host: Tensor | None = None
        self.arrived: torch.Event | None = None


class ActivationOffloader:
    """Moves what layers save to host memory in the forward, and back one layer ahead in the backward.

    On a GPU the copies run on a stream of their own, beside the computation. A tensor's memory on the device is free
    once the next layer begins, which waits for the copy; so no more than one layer's tensors are on their way out,
    however far the CPU has run ahead. Host buffers are pinned, of a power of two bytes (torch pins no other sizes), and
    reused in every step. On a CPU the copies are plain ones.

    Attributes:
        offloaded_tensors, offloaded_bytes: moved to host memory since the start.
        buffer_bytes: host memory in buffers, in use or free.
    """

    def __init__(self, min_bytes: int = MIN_OFFLOADED_BYTES):
        self.min_bytes = min_bytes
        self.offloaded_tensors = self.offloaded_bytes = self.buffer_bytes = 0
        self.free: list[Tensor] = []
        self.stream: torch.Stream | None = None
        self.leaving: list[Saved] = []
        self.latest: Callable[[], Saved | None] = lambda: None
        # By address: the storage, which may be gone and its address taken by another one, and what was saved of it.
        self.seen: dict[tuple, tuple[StorageWeakRef, Callable[[], Saved | None]]] = {}

    def run(self, keep: bool, function: Callable, *args: Any, **kwargs: Any) -> Any:
        """Call `function`, a checkpoint, and offload what it saves; with `keep`, leave it on the device."""
        if not torch.is_grad_enabled():
            return function(*args, **kwargs)
        self._let_go()
        with torch.autograd.graph.saved_tensors_hooks(partial(self._pack, keep), self._unpack):
            return function(*args, **kwargs)

    def free_bytes(self) -> int:
        """Bytes of the buffers that hold nothing."""
        return sum(buffer.numel() for buffer in self.free)

    def _pack(self, keep: bool, tensor: Tensor) -> Saved | Tensor:
        if isinstance(tensor, nn.Parameter) or tensor.nbytes < self.min_bytes:
            return tensor
        storage = tensor.untyped_storage()
        key = (storage.data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
        key += (tensor._version,)
        self.seen = {key: value for key, value in self.seen.items() if value[1]() is not None}
        known, earlier = self.seen.get(key, (None, lambda: None))
        if earlier() is not None and not known.expired():
            return earlier()
        saved = Saved(tensor, self.latest())
        self.latest = weakref.ref(saved)
        if not keep:
            self.seen[key] = (StorageWeakRef(storage), self.latest)
            self._send(saved)
        return saved

    def _send(self, saved: Saved) -> None:
        tensor = saved.tensor
        saved.host = self._buffer(tensor)
        # The graph owns what was saved; when it goes, with or without a backward, the buffer is free.
        weakref.finalize(saved, self.free.append, saved.host)
        self.offloaded_tensors += 1
        self.offloaded_bytes += tensor.nbytes
        with self._beside(tensor.device):
            _view(saved).copy_(tensor, non_blocking=True)
            saved.arrived = None if self.stream is None else self.stream.record_event()
        self.leaving.append(saved)

    def _let_go(self) -> None:
        """Free the memory of what is on its way out. The stream of the computation, not the CPU, waits for the copy."""
        for saved in self.leaving:
            self._wait(saved)
            saved.tensor = None
        self.leaving.clear()

    def _unpack(self, saved: Saved | Tensor) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        self._let_go()
        self._fetch(saved)
        self._wait(saved)
        tensor = saved.tensor
        if saved.host is not None:
            saved.tensor = None
        if saved.previous() is not None:
            self._fetch(saved.previous())
        return tensor

    def _fetch(self, saved: Saved) -> None:
        if saved.tensor is not None:
            return
        saved.tensor = torch.empty(saved.shape, dtype=saved.dtype, device=saved.device)
        with self._beside(saved.device):
            saved.tensor.copy_(_view(saved), non_blocking=True)
            saved.arrived = None if self.stream is None else self.stream.record_event()

    def _wait(self, saved: Saved) -> None:
        if saved.arrived is not None:
            torch.cuda.current_stream(saved.device).wait_event(saved.arrived)
            saved.arrived = None

    def _beside(self, device: torch.device):
        """The stream of the copies, which begin after what the computation has been told to do."""
        if device.type != "cuda":
            return nullcontext()
        if self.stream is None:
            self.stream = torch.cuda.Stream(device)
        self.stream.wait_stream(torch.cuda.current_stream(device))
        return torch.cuda.stream(self.stream)

    def _buffer(self, tensor: Tensor) -> Tensor:
        fitting = [index for index, buffer in enumerate(self.free) if buffer.numel() >= tensor.nbytes]
        if fitting:
            return self.free.pop(min(fitting, key=lambda index: self.free[index].numel()))
        size = 1 << (tensor.nbytes - 1).bit_length()
        self.buffer_bytes += size
        return torch.empty(size, dtype=torch.uint8, pin_memory=tensor.is_cuda)


def _view(saved: Saved) -> Tensor:
    """What was saved, as it lies in its host buffer."""
    size = saved.shape.numel() * saved.dtype.itemsize
    return saved.host[:size].view(saved.dtype).view(saved.shape)
