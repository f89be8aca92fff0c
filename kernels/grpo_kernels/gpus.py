"""Rates of GPUs, and the time that they predict for a head's forward pass with each engine."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GPU:
    """Rates that a GPU sustains.

    Attributes:
        products: flops a second of bfloat16 products by cuBLAS.
        forward: the same for the kernel `head_forward`.
        bandwidth: bytes a second.
        free: bytes of memory that are free when the head runs, for chunks that grow with it.
        launch: seconds from one small kernel to the next.
    """

    architecture: str
    processors: int
    products: float
    forward: float
    bandwidth: float
    free: int
    launch: float = 4e-6


# Data sheets: 989e12 dense bfloat16 flops a second on both, 3.35e12 and 4.8e12 bytes a second. Large products reach 69%
# to 80% of that, as power allows, and long copies 90%. The forward's share of cuBLAS's rate is a guess: 76% to 82%.
# Half of the memory, 80 and 141 GB, is free.
GPUS = {
    "h100": GPU("sm_90", 132, 680e12, 560e12, 3.0e12, 40 * 10**9),
    "h200": GPU("sm_90", 132, 790e12, 600e12, 4.3e12, 70 * 10**9),
}


def rates_of(name: str) -> GPU | None:
    """The rates of a device by the driver's name for it, such as "NVIDIA H100 80GB HBM3"; None for others."""
    words = name.lower().replace("-", " ").split()
    return next((gpu for key, gpu in GPUS.items() if key in words and "pcie" not in words), None)


def predicted_forward(gpu: GPU, engine: str, sizes: tuple[int, int, int], stored_bytes: int) -> float:
    """Seconds of a forward pass of a head with 16-bit operands, without the effect of partly filled rounds of tiles.

    Args:
        engine: "fused" or "products", as in `triton_kernels.engines`.
        sizes: N, H and V.
        stored_bytes: written for each logit, 0 for scoring.
    """
    N, H, V = sizes
    flops, logits = 2 * N * H * V, N * V
    if engine == "fused":
        return max(flops / gpu.forward, logits * stored_bytes / gpu.bandwidth)
    # The float32 products are written, read, and reduced.
    return flops / gpu.products + logits * (4 + 4 + stored_bytes) / gpu.bandwidth
