"""What vLLM's workers do for a training run: an extension class, called through `collective_rpc`.

It is named to vLLM by ``worker_extension_cls`` and imported in its processes, so nothing here needs the trainer.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

WORKER_EXTENSION = "grpo_fast.rollout.vllm.worker.WorkerExtension"


class WorkerExtension:
    """Methods that every vLLM worker gets."""

    def load_folder(self, folder: str) -> None:
        """Replace the weights by those of the safetensors files in `folder`, one tensor at a time."""
        self.reload_weights(weights_iterator=read_folder(Path(folder)))

    def repack_head(self) -> None:
        """Renew the copy of the output head that vLLM packs for CPU products.

        A reload renews the packed copies of all layers that it loads, but a tied head is not loaded by itself: its
        weight is the embedding's, and its packed copy stays the old one. On a GPU nothing is packed.
        """
        from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm
        from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

        for module in self.get_model().modules():
            if isinstance(module, VocabParallelEmbedding) and hasattr(module, "cpu_linear"):
                dispatch_cpu_unquantized_gemm(module, remove_weight=False)


def read_folder(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of a folder's safetensors files.

    Raises:
        FileNotFoundError: there are none.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"there are no weights in {folder}")
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                yield name, tensors.get_tensor(name)
