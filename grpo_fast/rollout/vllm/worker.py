"""Methods that a training run calls in vLLM's workers, through `collective_rpc`.

vLLM imports the class in its own processes (``worker_extension_cls``), so this module must not import the trainer.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil
import torch
from torch import Tensor

from grpo_fast.rollout.vllm.wire import apply_changes, read_tensors, verify

WORKER_EXTENSION = "grpo_fast.rollout.vllm.worker.WorkerExtension"


class WorkerExtension:
    """Methods that are added to every vLLM worker."""

    def load_folder(self, folder: str, checksum: str, base: str = "", keep: str = "") -> dict[str, bool]:
        """Load the weights in `folder`, one tensor at a time.

        Args:
            checksum: see `wire.verify`.
            base: the checksum of the folder to whose weights this one has the changes; empty if it has all weights.
            keep: not empty to keep a copy of the weights in main memory, to which the next folder has the changes.

        Returns:
            ``kept``: whether there is a copy now. ``lacking``: the copy of `base` is missing, so nothing was loaded.

        Raises:
            FileNotFoundError: the folder has no weights.
            ValueError: a file differs from what was sent.
        """
        paths = verify(Path(folder), checksum)
        known, copy = getattr(self, "_kept_weights", ("", {}))
        self._kept_weights = ("", {})
        if base:
            if known != base:
                return {"kept": False, "lacking": True}
            apply_changes(read_tensors(paths), copy)
            self.reload_weights(weights_iterator=iter(copy.items()))
            self._kept_weights = (checksum, copy)
            return {"kept": True, "lacking": False}
        keeps = bool(keep) and has_room(sum(path.stat().st_size for path in paths))
        copy = {}
        self.reload_weights(weights_iterator=_copied(read_tensors(paths), copy) if keeps else read_tensors(paths))
        if keeps:
            self._kept_weights = (checksum, copy)
        return {"kept": keeps, "lacking": False}

    def check_folder(self, folder: str, checksum: str) -> None:
        """Check the files of an adapter, before vLLM reads them; see `wire.verify`."""
        verify(Path(folder), checksum)

    def repack_head(self) -> None:
        """Update the copy of the output head that vLLM packs for matrix products on a CPU.

        A reload updates the packed copies of the layers that it loads. A tied head is not among them, because its
        weight is the embedding's, so its packed copy would be outdated. On a GPU nothing is packed.
        """
        from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
        from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

        for module in self.get_model().modules():
            if isinstance(module, VocabParallelEmbedding) and hasattr(module, "cpu_linear"):
                dispatch_cpu_unquantized_gemm(module, remove_weight=False)

    def use_plain_head(self) -> None:
        """Multiply by the head's own weight instead of a packed copy; on a GPU nothing is packed."""
        for module in self.get_model().modules():
            if hasattr(module, "cpu_linear"):
                module.cpu_linear = torch.nn.functional.linear


def has_room(size: int) -> bool:
    """Whether main memory has room for a copy of `size` bytes: three times as much is free besides."""
    return 4 * size <= psutil.virtual_memory().available


def _copied(tensors: Iterator[tuple[str, Tensor]], copy: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors:
        copy[name] = tensor.clone()
        yield name, copy[name]
