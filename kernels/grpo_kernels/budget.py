"""Byte budgets of temporary memory, and chunks that fit them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch

MIB = 1 << 20
CPU_BUFFER_BYTES = 256 * MIB
GPU_BUFFER_BYTES = 1024 * MIB
# No weight gradient is read and written for each chunk of a frozen head, so shorter chunks cost little.
FROZEN_GPU_BUFFER_BYTES = 512 * MIB
# Where the caller names no budget and the rows do not fit the default, a GPU's free memory is used up to this share.
FREE_SHARE = 0.25

# A tile of the matrix products on a GPU. A processor computes one at a time, so rows come in multiples of it.
TILE_ROWS, TILE_COLUMNS = 128, 256
# Products a GPU computes while it moves one byte: 680 TFLOP/s over 3 TB/s, an H100 at bfloat16.
FLOPS_PER_BYTE = 227
# A chunk's launches, in rounds of tiles: about 60 microseconds of 2 milliseconds, for a vocabulary of 152k.
LAUNCHES = 0.03

# A block's launches, in rounds of tiles: about 5 of 50 microseconds, at a hidden size of 4096.
BLOCK_LAUNCHES = 0.1
# Scratch for the float32 products of a block of the vocabulary: at most this, and this share of the byte budget beside
# a buffer for a chunk's logits and without one. Chunks without a buffer leave room for this many columns in it.
SCRATCH_BYTES, SCRATCH_SHARE, SCORING_SCRATCH_SHARE = 512 * MIB, 0.125, 0.25
SCRATCH_COLUMNS = 4096
# Rows whose products with a block of the vocabulary are made at once, at most: for more, the weight is read again.
PRODUCT_ROWS = 8448

# What a CPU works on at once, rows of the buffer or copies of operands: small enough for the last-level cache.
CPU_BLOCK_BYTES = 4 * MIB
# The largest share of the byte budget for such a block. Two exist at once.
BLOCK_SHARE = 0.125
# Sums of the weight's gradient that are rounded at once: they fit a GPU's second-level cache.
ROUNDED_BYTES = 32 * MIB
# [C, H] temporaries that exist at once beside the logits: hidden states and gradients, each also scaled or rounded.
NARROW_COPIES = 3

# Temporary memory for each kept id of a support whose rows of the weight are gathered: its logit, its gradient, and its
# places in two orders.
GATHER_BYTES = 40
# Up to which share of the vocabulary gathering the kept rows is less work; on a CPU as measured (benchmarks.kept_ids):
# there bfloat16 breaks even, and float32 would gain up to about twice as many.
GATHER_SHARE_CPU = 1 / 48
# A pair reads H numbers at 3 TB/s, where the whole vocabulary costs 2 V H flops a token: at 560 TFLOP/s for 16-bit
# operands that is V / 190, at 50 TFLOP/s for float32 V / 33, before the second-level cache helps.
GATHER_SHARE_GPU = {2: 1 / 256, 4: 1 / 64}


def gather_share(device: torch.device, dtype: torch.dtype) -> float:
    """Kept ids a token, as a share of the vocabulary, up to which their rows of a weight in `dtype` are gathered."""
    if device.type == "cpu":
        return GATHER_SHARE_CPU
    return GATHER_SHARE_GPU[2 if dtype.itemsize == 2 else 4]


def chunks(num_rows: int, rows_per_chunk: int) -> Iterator[slice]:
    """Split `num_rows` into slices of nearly equal length, none longer than `rows_per_chunk`."""
    count = -(-num_rows // max(rows_per_chunk, 1))
    for index in range(count):
        yield slice(index * num_rows // count, (index + 1) * num_rows // count)


def cpu_block_bytes(max_buffer_bytes: int) -> int:
    """`Head.block_bytes` on a CPU."""
    return min(CPU_BLOCK_BYTES, int(BLOCK_SHARE * max_buffer_bytes))


def most_rows(num_rows: int, most: int) -> int:
    """Rows of the longest chunk on a GPU, if `most` fit the byte budget."""
    return max(num_rows, 1) if num_rows <= most else max(most // TILE_ROWS * TILE_ROWS, min(most, TILE_ROWS), 1)


@lru_cache(maxsize=4096)
def wave_rows(num_rows: int, most: int, hidden_size: int, processors: int, trained: bool) -> int:
    """Rows of a chunk on a GPU, at most `most`: all, or the multiple of a tile that needs the least time.

    The product for the hidden states' gradient, ``[rows, V] @ [V, H]``, computes as many tiles at once as there are
    processors, and a round that does not use all of them takes as long as a full one. With a trained head every chunk
    also reads and writes the float32 sums of the weight's gradient. The last chunk is what remains.
    """
    longest = most_rows(num_rows, most)
    if num_rows <= longest or longest < TILE_ROWS:
        return longest
    columns = -(-hidden_size // TILE_COLUMNS)
    # What a chunk costs by itself, in rounds: launches, and 8 bytes for each weight whose sum is read and written.
    chunk = LAUNCHES
    if trained:
        chunk += 8 * hidden_size * FLOPS_PER_BYTE / (2 * TILE_ROWS * TILE_COLUMNS * processors)

    def rounds(rows: int) -> int:
        return -(-(-(-rows // TILE_ROWS) * columns) // processors)

    def time(rows: int) -> tuple[float, int]:
        whole, rest = divmod(num_rows, rows)
        # Of two lengths that take the same time, the shorter one needs less memory.
        return whole * (rounds(rows) + chunk) + (rounds(rest) + chunk if rest else 0.0), rows

    return min(range(longest, longest // 2, -TILE_ROWS), key=time)


@lru_cache(maxsize=4096)
def product_columns(num_rows: int, vocab: int, most: int, width: int, processors: int) -> int:
    """Columns of a block of the vocabulary whose products are made at once: a multiple of `width`, at most `most`.

    Like `wave_rows`, it takes the least time by the rounds of tiles, and by the launches of a block.
    """
    longest = max(min(most, -(-vocab // width) * width) // width * width, width)
    return min(
        range(longest, longest // 2, -width),
        key=lambda columns: (product_rounds(num_rows, vocab, columns, processors), columns),
    )


def product_rounds(num_rows: int, vocab: int, columns: int, processors: int) -> float:
    """Rounds of tiles, and of launches, of the products with the whole vocabulary in blocks of `columns`."""
    whole, rest = divmod(vocab, columns)
    rounds = [-(-(-(-num_rows // TILE_ROWS) * -(-size // TILE_COLUMNS)) // processors) for size in (columns, rest)]
    return whole * (rounds[0] + BLOCK_LAUNCHES) + (rounds[1] + BLOCK_LAUNCHES if rest else 0.0)


@lru_cache(maxsize=4096)
def product_rows(num_rows: int, most: int, vocab: int, scratch_bytes: int, width: int, processors: int) -> int:
    """Rows of a chunk, at most `most`, whose products lie in `scratch_bytes` and take the least time for all rows."""
    most = min(most, PRODUCT_ROWS, scratch_bytes // (4 * min(vocab, SCRATCH_COLUMNS)))
    if num_rows <= most or most < 2 * TILE_ROWS:
        return max(min(num_rows, most), 1)

    def rounds(rows: int) -> float:
        columns = product_columns(rows, vocab, scratch_bytes // (4 * rows), width, processors)
        return product_rounds(rows, vocab, columns, processors)

    def time(rows: int) -> tuple[float, int]:
        whole, rest = divmod(num_rows, rows)
        return whole * rounds(rows) + (rounds(rest) if rest else 0.0), rows

    longest = most // TILE_ROWS * TILE_ROWS
    # Shorter ones read the weight more often.
    return min(range(longest, longest // 2 - 1, -TILE_ROWS), key=time)


def row_slices(num_rows: int, rows: int) -> Iterator[slice]:
    """Split `num_rows` into slices of exactly `rows`, but for the last."""
    for start in range(0, num_rows, rows):
        yield slice(start, min(start + rows, num_rows))


def free_bytes(device: torch.device) -> int:
    """What could be allocated on a GPU now: the driver's free memory, and what torch holds without using it."""
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + held


def equal_parts(num_rows: int, most: int) -> int:
    """Rows of a chunk, at most `most` and at least 1, such that the last chunk is not much shorter than the others."""
    rows = max(min(most, num_rows), 1)
    return -(-num_rows // -(-num_rows // rows)) if num_rows else 1
