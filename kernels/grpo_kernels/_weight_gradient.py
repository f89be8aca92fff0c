"""The weight's gradient of one pass: summed up over its chunks, and rounded once, while the last one is added."""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_kernels._head import Head
from grpo_kernels.budget import ROUNDED_BYTES, chunks


class WeightGradient:
    """``[V, H]`` in `dtype`, from sums in the head's accumulation dtype.

    The first chunk writes the sums and the others add to them. A 16-bit result and its float32 sums never exist side
    by side: the result's memory holds the sums of the first half of the vocabulary, which the last chunk rounds in
    place, a block at a time from the start. A pass of one chunk writes a bfloat16 result without any sums.

    Args:
        head: whose weight it is.
        dtype: of the result.
        buffer: ``[V, H]`` in the accumulation dtype; the chunks are added to it, and it is the result.
    """

    def __init__(self, head: Head, dtype: torch.dtype, buffer: Tensor | None = None):
        self.head, self.dtype, self.result = head, dtype if buffer is None else buffer.dtype, buffer
        # Elements of the result in the memory of one sum.
        self.each = head.dtype.itemsize // self.dtype.itemsize
        # Each part's first row of the vocabulary, and its sums.
        self.sums: list[tuple[int, Tensor]] = [] if buffer is None else [(0, buffer)]

    def add(self, d: Tensor, row_scale: Tensor | None, hidden: Tensor, last: bool) -> None:
        """Add ``d.T @ (row_scale * hidden)`` of a chunk, the `last` one or another."""
        head, add = self.head, bool(self.sums)
        scaled = head.scaled_rows(hidden, row_scale)
        if not add:
            self._allocate(alone=last)
        width = head.block_width(head.gradient_dtype, d.shape[0])
        if last and self.sums[0][1].dtype != self.dtype:
            # A block stays in the cache until it is rounded.
            width = min(width, ROUNDED_BYTES // (head.dtype.itemsize * scaled.shape[1]))
        for start, sums in self.sums:
            for block in chunks(sums.shape[0], width):
                rows = slice(start + block.start, start + block.stop)
                head.multiply(d[:, rows].t(), scaled, sums[block], add, head.gradient_dtype)
                if last and sums.dtype != self.dtype:
                    self._round(rows, sums[block])
        if last:
            self.sums.clear()

    def collected(self) -> Tensor:
        """The gradient, after the last chunk; zeros if there was none."""
        return torch.zeros_like(self.head.weight, dtype=self.dtype) if self.result is None else self.result

    def _allocate(self, alone: bool) -> None:
        """Memory for the result and for the sums; a pass of one chunk may need none for sums."""
        head, (V, H) = self.head, self.head.weight.shape
        # Not a view, because autograd adds to a gradient in place only if nothing else has its memory.
        self.result = torch.empty(V, H, dtype=self.dtype, device=head.weight.device)
        if self.each <= 1 or (alone and self.dtype == head.gradient_dtype):
            self.sums = [(0, self.result)]
            return
        inside = V // self.each
        first = self.result.view(-1)[: self.each * inside * H].view(head.dtype).view(inside, H)
        self.sums = [(0, first), (inside, first.new_empty(V - inside, H))]

    def _round(self, rows: slice, sums: Tensor) -> None:
        """Write the result's `rows`; what they overwrite has been read."""
        result = self.result[rows]
        # Only the first block can lie on its own sums.
        result.copy_(sums.to(self.dtype) if rows.start * self.each < rows.stop else sums)
