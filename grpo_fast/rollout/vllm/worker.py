"""Methods that a training run calls in vLLM's workers, through `collective_rpc`.

vLLM imports the class in its own processes (``worker_extension_cls``), so this module must not import the trainer.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

WORKER_EXTENSION = "grpo_fast.rollout.vllm.worker.WorkerExtension"


class WorkerExtension:
    """Methods that are added to every vLLM worker."""

    def load_folder(self, folder: str) -> None:
        """Load the weights from the safetensors files in `folder`, one tensor at a time."""
        self.reload_weights(weights_iterator=read_folder(Path(folder)))

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


def read_folder(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of the safetensors files in `folder`.

    Raises:
        FileNotFoundError: it has no such files.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"there are no weights in {folder}")
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                yield name, tensors.get_tensor(name)
