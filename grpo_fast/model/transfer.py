"""Copies of the host's tensors to a GPU that do not make the host wait for the GPU's earlier work."""

from __future__ import annotations

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`; from the CPU to a GPU by way of pinned memory, and without waiting.

    Whatever uses the result on the current stream comes after the copy. torch keeps the pinned memory until then.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
