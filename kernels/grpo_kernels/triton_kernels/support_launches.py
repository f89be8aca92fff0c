"""The mask of bits of a support, for the kernels that multiply with the whole vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_kernels.support import RowSupport
from grpo_kernels.triton_kernels.launch import run_kernel
from grpo_kernels.triton_kernels.support_kernels import support_bits

BITS_BLOCK, BITS_WARPS = 128, 4


def support_words(support: RowSupport, vocab_size: int) -> Tensor:
    """``[C, words]`` int32: bit ``v % 32`` of word ``v // 32`` is 1 where a row keeps column v."""
    ids, starts, ends = support
    words = torch.zeros(len(starts), -(-vocab_size // 32), dtype=torch.int32, device=ids.device)
    run_kernel(
        support_bits, ids.device, len(starts), ids, starts.contiguous(), ends.contiguous(), words, words.stride(0),
        BLOCK=BITS_BLOCK, num_warps=BITS_WARPS,
    )  # fmt: skip
    return words
