"""The output head in Triton: one kernel from hidden states to row statistics, and one that makes dL/dlogits.

    head_forward    z = softcap(logit_scale * hidden @ weight.T + bias) / temperature, a tile at a time, with online
                    max, sum(exp), sum(exp * log exp) and the target's z taken from the float32 accumulator. Scoring
                    writes these statistics alone, [4, splits, C] float32. Training also stores, in the operands'
                    dtype, e = exp(z - the tile's own maximum), which keeps full relative precision in 16 bits, and
                    the [tiles, C] maxima.
    combine_splits  the statistics of all splits into [4, C]
    head_gradient   e -> dL/d(hidden @ weight.T) in place; the target's column comes from the float32 statistics

A work item of `head_forward` is (a block of rows, a split of the vocabulary); neighbours share the split, so its
weight stays in the second-level cache. On sm_90 and later a fixed number of programs processes all items and loads
through tensor descriptors; before, each item has its own program and plain pointers. Row counts are plain run-time
numbers: no kernel is compiled again as they change, offsets are 64 bits wide and the grid has one dimension.
"""

import triton
import triton.language as tl

from grpo_kernels.triton_kernels.math import expm1, tanh


@triton.jit
def _half(z, index: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """The left (0) or right (1) half of the columns of ``z [ROWS, WIDTH]``; each thread keeps its own registers."""
    return z.reshape(ROWS, 2, WIDTH // 2).permute(0, 2, 1).split()[index]


@triton.jit
def _part(z, index: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, PART: tl.constexpr):
    """Columns ``[index * PART, (index + 1) * PART)`` of ``z [ROWS, WIDTH]``, where PART is all, 1/2 or 1/4 of WIDTH."""
    if WIDTH == 4 * PART:
        return _half(_half(z, index // 2, ROWS, WIDTH), index % 2, ROWS, 2 * PART)
    elif WIDTH == 2 * PART:
        return _half(z, index, ROWS, WIDTH)
    else:
        return z


@triton.jit
def kept_columns(words, first_column, V, row_mask, WIDTH: tl.constexpr):
    """Which columns of a tile each row keeps ``[ROWS, WIDTH]``; `words` are pointers to the first word of each row."""
    column = tl.arange(0, WIDTH)
    kept = tl.zeros([1, WIDTH], tl.int32)
    # A word of each row at a time: an address for each column would not fit the registers.
    for index in tl.static_range(WIDTH // 32):
        word = tl.load(words + first_column // 32 + index, row_mask & (first_column + 32 * index < V), other=0)
        kept = tl.where((column // 32 == index)[None, :], word[:, None] >> (column % 32)[None, :], kept)
    return (kept & 1) != 0


@triton.jit
def _merge(maximum, total, weighted, other_maximum, other_total, other_weighted, WITH_ENTROPY: tl.constexpr):
    """The statistics of two sets of columns from those of each; log e is relative to the maximum, so it shifts too."""
    merged = tl.maximum(maximum, other_maximum)
    shift = tl.where(maximum == float("-inf"), 0.0, maximum - merged)
    other_shift = tl.where(other_maximum == float("-inf"), 0.0, other_maximum - merged)
    kept, added = tl.exp(shift), tl.exp(other_shift)
    if WITH_ENTROPY:
        weighted = kept * (weighted + shift * total) + added * (other_weighted + other_shift * other_total)
    return merged, kept * total + added * other_total, weighted


@triton.jit
def _products(
    hidden, weight, first_row, first_column, rows, row_mask, V, H, hidden_stride, weight_stride_v, weight_stride_h,
    DESCRIPTORS: tl.constexpr, DOT_DTYPE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``hidden @ weight.T`` for a tile ``[BLOCK_N, BLOCK_V]``, float32."""
    column = tl.arange(0, BLOCK_V)
    column_mask = column < V - first_column
    weight_rows = (first_column + column).to(tl.int64) * weight_stride_v
    z = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    for k in range(0, H, BLOCK_K):
        if DESCRIPTORS:
            a = hidden.load([first_row, k])
            b = weight.load([first_column, k])
        else:
            depth = k + tl.arange(0, BLOCK_K)
            depth_mask = depth < H
            a = tl.load(
                hidden + rows[:, None] * hidden_stride + depth[None, :],
                row_mask[:, None] & depth_mask[None, :],
                other=0.0,
            )
            b = tl.load(
                weight + weight_rows[:, None] + depth[None, :] * weight_stride_h,
                column_mask[:, None] & depth_mask[None, :],
                other=0.0,
            )
        z = tl.dot(a.to(DOT_DTYPE), b.to(DOT_DTYPE).T, z, input_precision="ieee")
    return z


@triton.jit
def _fold_tile(
    z, statistics, first_row, first_column, target, inverse_temperature, rows, row_mask, bias, out, tile_maximum,
    maximum_stride, V, padded_columns, out_stride, logit_scale, softcap,
    support, support_stride, HAS_SUPPORT: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_TEMPERATURE: tl.constexpr, HAS_SOFTCAP: tl.constexpr, WITH_ENTROPY: tl.constexpr,
    STORE: tl.constexpr, DESCRIPTORS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Transform a tile of products, fold it into the running statistics and store its exponentials."""
    maximum, total, weighted, at_target = statistics
    # Within a tile columns are counted in 32 bits; only the tile's corner needs 64.
    column = tl.arange(0, WIDTH)
    column_mask = column < V - first_column
    z *= logit_scale
    if HAS_BIAS:
        z += tl.load(bias + first_column + column, column_mask, other=0.0).to(tl.float32)[None, :]
    if HAS_SOFTCAP:
        z = tl.where(z == float("-inf"), z, softcap * tanh(z / softcap))
    if HAS_TEMPERATURE:
        z *= inverse_temperature[:, None]
    if HAS_SUPPORT:
        z = tl.where(kept_columns(support + rows * support_stride, first_column, V, row_mask, WIDTH), z, float("-inf"))
    else:
        z = tl.where(column_mask[None, :], z, float("-inf"))
    target_column = (target - first_column).to(tl.int32)
    at_target += tl.sum(tl.where(column[None, :] == target_column[:, None], z, 0.0), 1)

    tile_max = tl.max(z, 1)
    # A tile in which every logit is -inf has no finite maximum to subtract.
    z -= tl.where(tile_max == float("-inf"), 0.0, tile_max)[:, None]
    if WITH_ENTROPY:
        # An excluded column must count as 0 * log 0 = 0; exp(-200) is 0 already. NaN stays NaN.
        z = tl.maximum(z, -200.0, propagate_nan=tl.PropagateNan.ALL)
    e = tl.exp(z)
    tile_total = tl.sum(e, 1)
    tile_weighted = tl.zeros_like(tile_total)
    if WITH_ENTROPY:
        tile_weighted = tl.sum(e * z, 1)
    if STORE:
        if DESCRIPTORS:
            out.store([first_row, first_column], e.to(out.dtype))
        else:
            tl.store(
                (out + rows * out_stride + first_column)[:, None] + column[None, :],
                e.to(out.dtype.element_ty),
                row_mask[:, None] & (column < padded_columns - first_column)[None, :],
            )
        tl.store(tile_maximum + (first_column // WIDTH).to(tl.int64) * maximum_stride + rows, tile_max, row_mask)
    maximum, total, weighted = _merge(maximum, total, weighted, tile_max, tile_total, tile_weighted, WITH_ENTROPY)
    return maximum, total, weighted, at_target


@triton.jit(
    do_not_specialize=["N", "tiles_per_split", "splits", "support_stride"],
    do_not_specialize_on_alignment=["bias", "targets", "temperature", "partials", "tile_maximum", "support"],
)
def head_forward(
    hidden,  # [N, H] in DOT_DTYPE: a pointer, or a descriptor of blocks [BLOCK_N, BLOCK_K]
    weight,  # [V, H]: a pointer, or a descriptor of blocks [BLOCK_V, BLOCK_K]
    bias,  # [V]
    targets,  # [N] int64, -1 where the target lies in another shard
    temperature,  # [N] float32
    partials,  # [4, splits, N] float32: maximum, sum(e), sum(e log e), z at the target
    out,  # [N, V]: e; a pointer, or a descriptor of blocks [BLOCK_N, PART_V]
    tile_maximum,  # [tiles, N] float32
    N,
    V,
    padded_columns,  # of out: V, or the next multiple of 16, which needs no mask for each column
    H,
    hidden_stride,
    weight_stride_v,
    weight_stride_h,
    out_stride,
    tiles_per_split,
    splits,
    logit_scale,
    softcap,
    support,  # [N, words] int32: a bit for each column that is kept
    support_stride,
    HAS_SUPPORT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
    STORE: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PART_V: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row_blocks = tl.cdiv(N, BLOCK_N)
    tiles = tl.cdiv(V, BLOCK_V)
    for item in range(tl.program_id(0), row_blocks * splits, tl.num_programs(0)):
        split = item // row_blocks
        first_row = (item % row_blocks) * BLOCK_N
        rows = first_row + tl.arange(0, BLOCK_N).to(tl.int64)
        row_mask = rows < N
        target = tl.load(targets + rows, row_mask, other=-1)
        inverse_temperature = tl.full([BLOCK_N], 1.0, tl.float32)
        if HAS_TEMPERATURE:
            inverse_temperature = 1.0 / tl.load(temperature + rows, row_mask, other=1.0)
        zero = tl.zeros([BLOCK_N], tl.float32)
        statistics = (zero + float("-inf"), zero, zero, zero)
        for tile in range(split * tiles_per_split, min((split + 1) * tiles_per_split, tiles)):
            first_column = tile * BLOCK_V
            z = _products(
                hidden, weight, first_row, first_column, rows, row_mask, V, H, hidden_stride, weight_stride_v,
                weight_stride_h, DESCRIPTORS, DOT_DTYPE, BLOCK_N, BLOCK_V, BLOCK_K,
            )  # fmt: skip
            for part in tl.static_range(BLOCK_V // PART_V):
                statistics = _fold_tile(
                    _part(z, part, BLOCK_N, BLOCK_V, PART_V), statistics, first_row, first_column + part * PART_V,
                    target, inverse_temperature, rows, row_mask, bias, out, tile_maximum, N, V,
                    padded_columns, out_stride, logit_scale, softcap, support, support_stride, HAS_SUPPORT,
                    HAS_BIAS, HAS_TEMPERATURE, HAS_SOFTCAP, WITH_ENTROPY, STORE, DESCRIPTORS, PART_V,
                )  # fmt: skip
        # Four planes of [splits, N].
        at = split.to(tl.int64) * N + rows
        plane = splits.to(tl.int64) * N
        for index in tl.static_range(4):
            tl.store(partials + index * plane + at, statistics[index], row_mask)


@triton.jit(
    do_not_specialize=["N", "splits"],
    do_not_specialize_on_alignment=["partials", "statistics", "targets"],
)
def combine_splits(
    partials,  # [4, splits, N] float32
    statistics,  # [4, N] float32: the same over all splits
    targets,  # [N] int64
    N,
    V,
    splits,
    CHECK_TARGETS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK).to(tl.int64)
    mask = rows < N
    plane = splits.to(tl.int64) * N
    maximum = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    weighted = tl.zeros([BLOCK], tl.float32)
    at_target = tl.zeros([BLOCK], tl.float32)
    for split in range(splits):
        at = partials + tl.cast(split, tl.int64) * N + rows
        split_maximum = tl.load(at, mask, other=float("-inf"))
        split_total = tl.load(at + plane, mask, other=0.0)
        split_weighted = tl.load(at + 2 * plane, mask, other=0.0)
        maximum, total, weighted = _merge(maximum, total, weighted, split_maximum, split_total, split_weighted, True)
        at_target += tl.load(at + 3 * plane, mask, other=0.0)
    if CHECK_TARGETS:
        # An id outside the vocabulary has no logit: its z is NaN, not 0.
        target = tl.load(targets + rows, mask, other=0)
        at_target = tl.where((target >= 0) & (target < V), at_target, float("nan"))
    combined = (maximum, total, weighted, at_target)
    for index in tl.static_range(4):
        tl.store(statistics + index * tl.cast(N, tl.int64) + rows, combined[index], mask)


@triton.jit(
    do_not_specialize=["N"],
    do_not_specialize_on_alignment=[
        "tile_maximum", "maximum", "total", "weighted", "at_target", "targets", "temperature", "grad_logprobs",
        "grad_entropy",
    ],
)  # fmt: skip
def head_gradient(
    e,  # [N, V]: exp(z - maximum of the tile), replaced by the gradient
    tile_maximum,  # [tiles, N] float32
    maximum,  # [N] float32, as total, weighted and at_target
    total,
    weighted,
    at_target,
    targets,  # [N] int64, -1 where the target lies in another shard
    temperature,  # [N] float32
    grad_logprobs,  # [N] float32
    grad_entropy,  # [N] float32
    N,
    V,
    padded_columns,  # of e: V, or the next multiple of 16, which needs no mask for each column
    stride,
    logit_scale,
    softcap,
    HAS_TEMPERATURE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_GRAD: tl.constexpr,
    HAS_GRAD_ENTROPY: tl.constexpr,
    ROW_SCALED: tl.constexpr,  # the gradient is logit_scale times dL/dz alone
    PART_V: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
):
    tiles = tl.cdiv(V, PART_V)
    spans = tl.cdiv(tiles, PARTS)
    first_tile = (tl.program_id(0) % spans) * PARTS
    rows = (tl.program_id(0) // spans) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    row_mask = rows < N
    column = tl.arange(0, PART_V)

    row_maximum = tl.load(maximum + rows, row_mask, other=0.0)
    row_total = tl.load(total + rows, row_mask, other=1.0)
    z_target = tl.load(at_target + rows, row_mask, other=0.0)
    target = tl.load(targets + rows, row_mask, other=-1)
    target_logprob = (z_target - row_maximum) - tl.log(row_total)
    # p - 1 at the target is computed from the float32 statistics, and rounded once, in the store.
    at_target_gradient = -expm1(target_logprob)
    g = tl.full([ROWS], 1.0, tl.float32)
    if HAS_GRAD:
        g = tl.load(grad_logprobs + rows, row_mask, other=0.0)
    scale = tl.full([ROWS], logit_scale, tl.float32)
    row_temperature = tl.full([ROWS], 1.0, tl.float32)
    if HAS_TEMPERATURE:
        row_temperature = tl.load(temperature + rows, row_mask, other=1.0)
        if not ROW_SCALED:
            scale = logit_scale / row_temperature
    g_entropy = tl.zeros([ROWS], tl.float32)
    mean_log_e = tl.zeros([ROWS], tl.float32)
    if HAS_GRAD_ENTROPY:
        g_entropy = tl.load(grad_entropy + rows, row_mask, other=0.0)
        mean_log_e = tl.load(weighted + rows, row_mask, other=0.0) / row_total

    for tile in range(first_tile, min(first_tile + PARTS, tiles)):
        first_column = tile * PART_V
        mask = row_mask[:, None] & (column < padded_columns - first_column)[None, :]
        pointers = (e + rows * stride + first_column)[:, None] + column[None, :]
        values = tl.load(pointers, mask, other=0.0).to(tl.float32)
        tile_max = tl.load(tile_maximum + tl.cast(tile, tl.int64) * N + rows, row_mask, other=0.0)
        shift = tl.where(tile_max == float("-inf"), 0.0, tile_max - row_maximum)
        is_target = column[None, :] == (target - first_column).to(tl.int32)[:, None]
        p = values * (tl.exp(shift) / row_total)[:, None]
        gradient = g[:, None] * tl.where(is_target, at_target_gradient[:, None], -p)
        if HAS_GRAD_ENTROPY:
            # log p + entropy = log e - weighted / total, since both shift by log(total).
            log_e = tl.log(tl.where(values > 0.0, values, 1.0)) + shift[:, None]
            log_e = tl.where(is_target, (z_target - row_maximum)[:, None], log_e)
            p_exact = tl.where(is_target, tl.exp(target_logprob)[:, None], p)
            slope = p_exact * (log_e - mean_log_e[:, None])
            gradient -= g_entropy[:, None] * tl.where(p_exact > 0.0, slope, 0.0)
        if HAS_SOFTCAP:
            z = tl.log(tl.where(values > 0.0, values, 1.0)) + (shift + row_maximum)[:, None]
            z = tl.where(is_target, z_target[:, None], z) * row_temperature[:, None] / softcap
            # Masked column: z is undefined, and the gradient is already 0.
            gradient *= tl.maximum(1.0 - z * z, 0.0)
        tl.store(pointers, (gradient * scale[:, None]).to(e.dtype.element_ty), mask)
