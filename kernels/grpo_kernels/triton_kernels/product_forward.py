"""The forward pass of a head by cuBLAS's products and `row_statistics`, one block of the vocabulary at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from grpo_kernels._head import Head, Rows, RowStatistics
from grpo_kernels.budget import SCRATCH_BYTES, SCRATCH_SHARE, product_columns, product_rows, row_slices
from grpo_kernels.triton_kernels.launch import interpreting, processors, run_kernel
from grpo_kernels.triton_kernels.row_kernels import row_statistics
from grpo_kernels.triton_kernels.tiles import splits_of

# Elements: rows of a buffer start, and kernels write, at multiples of it.
ALIGNMENT = 16
# Columns that share a stored maximum, rows and warps of a program, and how many programs run on a processor at once.
ROW_WIDTH, ROW_ROWS, ROW_WARPS = (64, 16, 4) if interpreting() else (512, 4, 4)
ROW_PROGRAMS = 8


def padded_columns(buffer: Tensor) -> int:
    """Up to which column kernels may write in `buffer [C, V]`: a multiple of 16, if its memory goes that far, else V.

    With V itself as the bound, a V that is no multiple of 16 would make every load and store one number wide.
    """
    rows, columns = buffer.shape
    padded = -(-columns // ALIGNMENT) * ALIGNMENT
    end = buffer.storage_offset() + (rows - 1) * buffer.stride(0) + padded
    fits = padded <= buffer.stride(0) and end * buffer.element_size() <= buffer.untyped_storage().nbytes()
    return padded if fits else columns


class Scales(NamedTuple):
    """Factors of products whose operands were scaled."""

    rows: Tensor  # [C] float32
    columns: Tensor  # [v] float32


class Multiply(Protocol):
    def __call__(self, block: slice, width: int) -> tuple[Tensor, Scales | None]:
        """The products with v columns of the vocabulary, float32, as the first of ``[C, width]``, and their scales.

        The memory may be that of the block before; what lies in the columns from v on does not matter.
        """


class Products:
    """``hidden @ weight.T`` of 16-bit or float32 operands, without rounding the results."""

    def __init__(self, head: Head, hidden: Tensor):
        self.head, self.hidden = head, hidden.to(head.product_dtype)
        self.scratch: Tensor | None = None

    def __call__(self, block: slice, width: int) -> tuple[Tensor, None]:
        head = self.head
        if self.scratch is None:
            # The first block is the widest.
            self.scratch = torch.empty(self.hidden.shape[0], width, dtype=torch.float32, device=self.hidden.device)
        weight = head.weight[block].to(head.operand_dtype).to(head.product_dtype)
        options = {"out_dtype": torch.float32} if weight.dtype != torch.float32 else {}
        torch.mm(self.hidden, weight.t(), out=self.scratch[:, : weight.shape[0]], **options)
        return self.scratch[:, :width], None


def forward_by_products(
    head: Head,
    products: Callable[[Head, Tensor], Multiply],
    combine: Callable[[Tensor, Tensor, Tensor, int, bool], RowStatistics],
    rows: Rows,
    out: Tensor,
    with_entropy: bool,
) -> RowStatistics:
    """As `TritonHead.launch_forward`, over this rank's shard: e into ``out [C, V]``, unless it has no columns.

    Args:
        products: makes what multiplies of the head and some rows of hidden states.
        combine: `TritonHead.combined`.
    """
    N, V, device = rows.hidden.shape[0], head.vocab_size, out.device
    store = out.shape[1] > 0
    # A buffer that grew beyond the byte budget allows for more.
    share = min(int(SCRATCH_SHARE * out.numel() * out.element_size()), SCRATCH_BYTES)
    scratch = max(head.scratch_bytes(scoring=not store), share)
    each = product_rows(N, N, V, scratch, ROW_WIDTH, processors(device))
    tile_maximum = torch.empty(-(-V // ROW_WIDTH) if store else 0, N, dtype=torch.float32, device=device)
    parts = []
    for at in row_slices(N, each):
        temperature = None if rows.temperature is None else rows.temperature[at]
        part = Rows(rows.hidden[at], rows.targets[at], temperature)
        multiply = products(head, part.hidden)
        parts.append(
            _part_by_products(head, multiply, combine, part, out[at], tile_maximum[:, at], scratch, with_entropy)
        )
    if len(parts) == 1:
        return parts[0]
    target, maximum, total, weighted, *_ = zip(*parts, strict=True)
    return RowStatistics(
        torch.cat(target), torch.cat(maximum), torch.cat(total), torch.cat(weighted) if with_entropy else None,
        tile_maximum, ROW_WIDTH,
    )  # fmt: skip


def _part_by_products(
    head: Head,
    multiply: Multiply,
    combine: Callable[[Tensor, Tensor, Tensor, int, bool], RowStatistics],
    rows: Rows,
    out: Tensor,  # [C, V]
    tile_maximum: Tensor,  # [tiles, C]
    scratch: int,
    with_entropy: bool,
) -> RowStatistics:
    """The forward of as many rows as are multiplied at once."""
    (_, targets, temperature, _), device = rows, out.device
    N, V, store = targets.shape[0], head.vocab_size, out.shape[1] > 0
    columns = product_columns(N, V, scratch // (4 * max(N, 1)), ROW_WIDTH, processors(device))
    blocks = [slice(start, min(start + columns, V)) for start in range(0, V, columns)]
    tiles = [-(-(block.stop - block.start) // ROW_WIDTH) for block in blocks]
    row_blocks = -(-N // ROW_ROWS)
    splits = [splits_of(row_blocks, count, ROW_PROGRAMS * processors(device)) for count in tiles]
    total = sum(count for count, _ in splits)
    partials = torch.empty(4, total, N, dtype=torch.float32, device=device)
    first_split = first_tile = 0
    for block, count, (each, tiles_per_split) in zip(blocks, tiles, splits, strict=True):
        width = block.stop - block.start
        products, scales = multiply(block, count * ROW_WIDTH)
        stored = out[:, block] if store else out
        run_kernel(
            row_statistics, device, row_blocks * each,
            products, *(scales or (None, None)), None if head.bias is None else head.bias[block],
            targets, temperature, partials[:, first_split : first_split + each], stored,
            tile_maximum[first_tile : first_tile + count], N, width, padded_columns(stored), block.start,
            products.stride(0), stored.stride(0), total * N, tile_maximum.stride(0), tiles_per_split, each,
            head.logit_scale, head.softcap or 1.0,
            HAS_SCALES=scales is not None,
            HAS_BIAS=head.bias is not None,
            HAS_TEMPERATURE=temperature is not None,
            HAS_SOFTCAP=head.softcap is not None,
            WITH_ENTROPY=with_entropy,
            STORE=store,
            WIDTH=ROW_WIDTH, ROWS=ROW_ROWS, num_warps=ROW_WARPS,
        )  # fmt: skip
        first_split, first_tile = first_split + each, first_tile + count
    return combine(partials, targets, tile_maximum, ROW_WIDTH, with_entropy)
