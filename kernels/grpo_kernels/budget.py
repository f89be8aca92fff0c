"""Byte budgets of temporary memory, and chunks that fit them."""

from __future__ import annotations

from collections.abc import Iterator

MIB = 1 << 20
CPU_BUFFER_BYTES = 256 * MIB
GPU_BUFFER_BYTES = 1024 * MIB
# No weight gradient is read and written for each chunk of a frozen head, so shorter chunks cost little.
FROZEN_GPU_BUFFER_BYTES = 512 * MIB

# What a CPU works on at once, rows of the buffer or copies of operands: small enough for the last-level cache.
CPU_BLOCK_BYTES = 4 * MIB
# The largest share of the byte budget for such a block. Two exist at once.
BLOCK_SHARE = 0.125
# Sums of the weight's gradient that are rounded at once: they fit a GPU's second-level cache.
ROUNDED_BYTES = 32 * MIB
# [C, H] temporaries that exist at once beside the logits: hidden states and gradients, each also scaled or rounded.
NARROW_COPIES = 3


def chunks(num_rows: int, rows_per_chunk: int) -> Iterator[slice]:
    """Split `num_rows` into slices of nearly equal length, none longer than `rows_per_chunk`."""
    count = -(-num_rows // max(rows_per_chunk, 1))
    for index in range(count):
        yield slice(index * num_rows // count, (index + 1) * num_rows // count)


def cpu_block_bytes(max_buffer_bytes: int) -> int:
    """`Head.block_bytes` on a CPU."""
    return min(CPU_BLOCK_BYTES, int(BLOCK_SHARE * max_buffer_bytes))


def equal_parts(num_rows: int, most: int) -> int:
    """Rows of a chunk, at most `most` and at least 1, such that the last chunk is not much shorter than the others."""
    rows = max(min(most, num_rows), 1)
    return -(-num_rows // -(-num_rows // rows)) if num_rows else 1
