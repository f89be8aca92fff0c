"""Row statistics of logits whose products lie in memory: what `head_forward` does after its own products.

    row_statistics   z = softcap(logit_scale * products + bias) / temperature of a block of the vocabulary, read once:
                     its maximum, sum(exp), sum(exp * log exp) and the target's z, and for training the exponentials
                     and the maxima that they are relative to, as `head_forward` stores them

A program processes a few rows and a range of wide tiles: threads read 16 bytes at a time, and few of them share a row.
"""

import triton
import triton.language as tl

from grpo_kernels.triton_kernels.head_kernels import _fold_tile


@triton.jit(
    do_not_specialize=["N", "V", "first_column", "plane_stride", "maximum_stride", "tiles_per_split", "splits"],
    do_not_specialize_on_alignment=[
        "bias", "targets", "temperature", "row_scale", "column_scale", "partials", "tile_maximum",
    ],
)  # fmt: skip
def row_statistics(
    products,  # [N, whole tiles of columns] float32
    row_scale,  # [N] float32: factors of the products' rows and columns, for operands that were scaled
    column_scale,  # [V] float32
    bias,  # [V]
    targets,  # [N] int64, negative where the target lies in another shard
    temperature,  # [N] float32
    partials,  # [4, splits, N] float32, a part of a tensor with more splits
    out,  # [N, V]: e
    tile_maximum,  # [tiles, N] float32
    N,
    V,  # columns of this block of the vocabulary
    padded_columns,  # of out: V, or the next multiple of 16, which needs no mask for each column
    first_column,  # of the block
    stride,
    out_stride,
    plane_stride,  # of partials
    maximum_stride,  # of tile_maximum
    tiles_per_split,
    splits,
    logit_scale,
    softcap,
    HAS_SCALES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
    STORE: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    split = tl.program_id(0) % splits
    rows = (tl.program_id(0) // splits) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    row_mask = rows < N
    column = tl.arange(0, WIDTH)
    target = tl.load(targets + rows, row_mask, other=-1) - first_column
    inverse_temperature = tl.full([ROWS], 1.0, tl.float32)
    if HAS_TEMPERATURE:
        inverse_temperature = 1.0 / tl.load(temperature + rows, row_mask, other=1.0)
    scale = tl.full([ROWS], 1.0, tl.float32)
    if HAS_SCALES:
        scale = tl.load(row_scale + rows, row_mask, other=1.0)
    zero = tl.zeros([ROWS], tl.float32)
    statistics = (zero + float("-inf"), zero, zero, zero)
    tiles = tl.cdiv(V, WIDTH)
    for tile in range(split * tiles_per_split, min((split + 1) * tiles_per_split, tiles)):
        start = tile * WIDTH
        # Rows of products are whole tiles long, so that their columns need no mask.
        z = tl.load((products + rows * stride + start)[:, None] + column[None, :], row_mask[:, None], other=0.0)
        if HAS_SCALES:
            z *= scale[:, None] * tl.load(column_scale + start + column, column < V - start, other=0.0)[None, :]
        statistics = _fold_tile(
            z, statistics, 0, start, target, inverse_temperature, rows, row_mask, bias, out, tile_maximum,
            maximum_stride, V,
            padded_columns, out_stride, logit_scale, softcap, None, 0, False,
            HAS_BIAS, HAS_TEMPERATURE, HAS_SOFTCAP, WITH_ENTROPY, STORE, False, WIDTH,
        )  # fmt: skip
    at = split.to(tl.int64) * N + rows
    for index in tl.static_range(4):
        tl.store(partials + tl.cast(plane_stride, tl.int64) * index + at, statistics[index], row_mask)
