"""The output head on Triton: each step of `grpo_kernels._head.Head` that touches logits is one kernel.

The chunk's buffer holds exponentials, then dL/d(hidden @ weight.T), in bfloat16 where the device multiplies bfloat16
into float32, else in float32. For a float16 head it is float16 and holds UNIT times the gradient of a coefficient of 1,
at most: the coefficient itself, about 1 / tokens, would underflow and becomes the row scale.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.errors import OutOfResources
from triton.tools.tensor_descriptor import TensorDescriptor

from grpo_kernels._head import Chunk, Head, Rows, RowStatistics
from grpo_kernels.budget import (
    SCORING_SCRATCH_SHARE,
    SCRATCH_BYTES,
    SCRATCH_SHARE,
    equal_parts,
    product_rows,
)
from grpo_kernels.triton_kernels.engines import MEASURED_ROWS, decided, entry, measure, named_engine
from grpo_kernels.triton_kernels.head_kernels import combine_splits, head_forward, head_gradient
from grpo_kernels.triton_kernels.known_lse_kernels import head_gradient_known
from grpo_kernels.triton_kernels.launch import architecture_of, interpreting, processors, run_kernel
from grpo_kernels.triton_kernels.product_forward import (
    ALIGNMENT,
    ROW_WIDTH,
    Products,
    forward_by_products,
    padded_columns,
)
from grpo_kernels.triton_kernels.scale_kernels import scale_unless_one_
from grpo_kernels.triton_kernels.support_launches import support_words
from grpo_kernels.triton_kernels.tiles import ARCHITECTURES, Tile, refuse_tile, splits_of, tiles_to_try

T = TypeVar("T")
DOT_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
# Rows and warps of the kernels that are bound by memory.
COMBINE_ROWS, COMBINE_WARPS = 128, 4
# Parts of tiles that one program of `head_gradient` processes.
GRADIENT_PARTS = 16
GRADIENT_ROWS, GRADIENT_WARPS = 64 if interpreting() else 16, 4
# The same where the parts are those of `row_statistics`, wider than those of any tile of products.
WIDE_GRADIENT_ROWS, WIDEST_PART = 2, 256


def descriptors_fit(*matrices: Tensor) -> bool:
    """Whether tensor descriptors can address these matrices: rows and base aligned to 16 bytes, unit last stride."""
    return all(
        m.stride(-1) == 1 and m.data_ptr() % 16 == 0 and m.stride(0) * m.element_size() % 16 == 0 for m in matrices
    )


# The gradient of a coefficient of 1 is at most 1 for log-probabilities. For entropies it is |p (log p + entropy)|,
# below 4 for any vocabulary of up to 2**20 tokens. UNIT is half of float16's largest number, and lets probabilities
# down to 2e-9 keep all of its digits.
UNIT, ENTROPY_BOUND = 2.0**15, 4.0


def gradient_rows(part: int) -> int:
    """Rows of a program of `head_gradient` whose parts are `part` columns wide."""
    if part > WIDEST_PART:
        return WIDE_GRADIENT_ROWS
    # Every thread has 16 bytes to move.
    return GRADIENT_ROWS * max(64 // part, 1)


def _normalized(
    grad_logprobs: Tensor | None, grad_entropy: Tensor | None, like: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor]:
    """Coefficients ``[C]`` for which the gradient is at most 1, and the factor ``[C]`` that gives the original ones."""
    if grad_entropy is None:
        return None, None, torch.ones_like(like) if grad_logprobs is None else grad_logprobs
    grad_logprobs = torch.ones_like(like) if grad_logprobs is None else grad_logprobs
    size = grad_logprobs.abs() + ENTROPY_BOUND * grad_entropy.abs()
    divisor = torch.where(size == 0, 1.0, size)
    return grad_logprobs / divisor, grad_entropy / divisor, size


class TritonHead(Head):
    """`Head` that keeps logits in registers; except for float16 the row scale is part of the gradient."""

    # Elements: rows are whole numbers of 16 elements apart whatever V is, so that Triton, which asks whether sizes are
    # multiples of 16, loads and stores 16 bytes at a time; descriptors and cuBLAS need multiples of 16 bytes.
    buffer_alignment = ALIGNMENT

    scale_ = staticmethod(scale_unless_one_)

    @property
    def buffer_dtype(self) -> torch.dtype:
        return self.operand_dtype if self.operand_dtype.itemsize == 2 else self.dtype

    def scratch_bytes(self, scoring: bool = False) -> int:
        """Memory for the float32 products of a part of the vocabulary, unless `head_forward` makes the logits."""
        sizes = MEASURED_ROWS, self.weight.shape[1], self.sizing_vocab
        engine, _ = self._decided(sizes, scoring)
        # Ranks whose engines differ must still agree on chunks.
        shared = self.process_group is not None and self.weight.device.type == "cuda" and named_engine() is None
        if engine == "fused" and not shared:
            return 0
        share = SCORING_SCRATCH_SHARE if scoring else SCRATCH_SHARE
        return min(int(share * self.max_buffer_bytes), SCRATCH_BYTES)

    def _decided(self, sizes: tuple[int, int, int], scoring: bool) -> tuple[str | None, str]:
        stored = 0 if scoring else self.buffer_dtype.itemsize
        alone, softcap = self.process_group is None, self.softcap is not None
        return decided(self.weight.device, self.operand_dtype, sizes, stored, softcap, alone)

    def scoring_buffer(self, num_rows: int) -> Tensor:
        """A buffer without columns: scoring stores no logits. Its rows are those of a chunk."""
        narrow = self.narrow_bytes() + 4 * 4 * processors(self.weight.device)
        most, scratch = self.max_buffer_bytes // narrow, self.scratch_bytes(scoring=True)
        if not scratch:
            return torch.empty(equal_parts(num_rows, most), 0, device=self.weight.device)
        V = max(self.sizing_vocab, 1)
        rows = product_rows(num_rows, most, V, scratch, ROW_WIDTH, processors(self.weight.device))
        return torch.empty(rows, 0, device=self.weight.device)

    def operand(self, rows: Tensor) -> Tensor:
        # The kernel takes 16-bit operands without widening.
        return rows.to(self.operand_dtype).contiguous()

    def forward_(self, rows: Rows, out: Tensor, with_entropy: bool) -> RowStatistics:
        return self.over_shards(self.launches(rows, out, with_entropy)[self.engine(rows, out, with_entropy)]())

    def launches(self, rows: Rows, out: Tensor, with_entropy: bool) -> dict[str, Callable[[], RowStatistics]]:
        """The forward of this rank's shard by each engine of `ENGINES`."""
        words = None if rows.support is None else support_words(rows.support, self.vocab_size)
        return {
            "fused": lambda: self.with_tile(
                "head_forward",
                rows,
                out,
                with_entropy,
                lambda tile: self.launch_forward(tile, rows, out, with_entropy, words),
            ),
            "products": lambda: forward_by_products(self, Products, self.combined, rows, out, with_entropy),
        }

    def engine(self, rows: Rows, out: Tensor, with_entropy: bool) -> str:
        """Which engine runs the forward of `rows`; it is measured where this has to be done, and decided before."""
        if rows.support is not None:
            # `row_statistics` takes no mask of kept ids.
            return "fused"
        sizes, scoring = (*rows.hidden.shape, self.vocab_size), out.shape[1] == 0
        engine, predicted = self._decided(sizes, scoring)
        if engine is None and sizes[0] >= MEASURED_ROWS:
            _, H, V = sizes
            stored = 0 if scoring else out.element_size()
            name = entry(out.device, self.operand_dtype, H, V, stored, self.softcap is not None)
            engine = measure(name, rows.hidden, self.launches(rows, out, with_entropy))
        return engine or predicted

    def with_tile(self, kernel: str, rows: Rows, out: Tensor, with_entropy: bool, launch: Callable[[Tile], T]) -> T:
        """`launch` with the first tile of the table that the device has the resources for, or with the tuned one.

        Raises:
            RuntimeError: the device has the resources for none.
        """
        architecture = architecture_of(out.device)
        dtype, softcap = self.operand_dtype, self.softcap is not None
        sizes = f"H={rows.hidden.shape[1]} V={self.vocab_size}"
        key = f"{str(dtype).removeprefix('torch.')} {softcap=} {sizes} store={out.shape[1] > 0} entropy={with_entropy}"
        if self.weight.dtype != dtype:
            key += f" weight={str(self.weight.dtype).removeprefix('torch.')}"
        if kernel != "head_forward":
            key += f" kernel={kernel}"

        def seconds(tile: Tile) -> float:
            try:
                if out.is_cuda:
                    return triton.testing.do_bench(lambda: launch(tile), warmup=5, rep=50, return_mode="median")
                started = time.perf_counter()
                launch(tile)
                return time.perf_counter() - started
            except OutOfResources:
                return float("inf")

        refusal = None
        for tile in tiles_to_try(ARCHITECTURES[architecture].candidates(dtype, softcap), architecture, key, seconds):
            try:
                return launch(tile)
            except OutOfResources as error:
                # Raised before anything runs.
                refuse_tile(tile, architecture, key)
                refusal = error
        raise RuntimeError(
            f"no tile of {kernel} fits {architecture} ({key}: {refusal or 'refused before'}); use backend='torch'"
        )

    def launch_forward(
        self, tile: Tile, rows: Rows, out: Tensor, with_entropy: bool, words: Tensor | None = None
    ) -> RowStatistics:
        (hidden, targets, temperature, _), weight, device = rows, self.weight, out.device
        (N, H), V, store = hidden.shape, self.vocab_size, out.shape[1] > 0
        architecture = ARCHITECTURES[architecture_of(device)]
        row_blocks, tiles = -(-N // tile.rows), -(-V // tile.columns)
        programs = tile.per_processor * processors(device)
        splits, tiles_per_split = splits_of(row_blocks, tiles, programs)
        items = row_blocks * splits
        partials = torch.empty(4, splits, N, dtype=torch.float32, device=device)
        # The last tile writes all of its parts, including those beyond V.
        parts = tiles * (tile.columns // tile.part) if store else 0
        tile_maximum = torch.empty(parts, N, dtype=torch.float32, device=device)
        descriptors = architecture.descriptors and descriptors_fit(hidden, weight, *([out] if store else []))
        first, second, third = hidden, weight, out
        if descriptors:
            first = TensorDescriptor.from_tensor(hidden, [tile.rows, tile.depth])
            second = TensorDescriptor.from_tensor(weight, [tile.columns, tile.depth])
            third = TensorDescriptor.from_tensor(out, [tile.rows, tile.part]) if store else out
        run_kernel(
            head_forward, device, min(items, programs) if architecture.descriptors else items,
            first, second, self.bias, targets, temperature, partials, third, tile_maximum,
            N, V, padded_columns(out), H,
            hidden.stride(0), weight.stride(0), weight.stride(1), out.stride(0), tiles_per_split, splits,
            self.logit_scale, self.softcap or 1.0, words, 0 if words is None else words.stride(0),
            HAS_SUPPORT=words is not None,
            HAS_BIAS=self.bias is not None,
            HAS_TEMPERATURE=temperature is not None,
            HAS_SOFTCAP=self.softcap is not None,
            WITH_ENTROPY=with_entropy,
            STORE=store,
            DESCRIPTORS=descriptors,
            DOT_DTYPE=DOT_DTYPES[self.operand_dtype],
            BLOCK_N=tile.rows, BLOCK_V=tile.columns, PART_V=tile.part, BLOCK_K=tile.depth,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        return self.combined(partials, targets, tile_maximum, tile.part, with_entropy)

    def combined(
        self, partials: Tensor, targets: Tensor, tile_maximum: Tensor, tile_width: int, with_entropy: bool
    ) -> RowStatistics:
        """The statistics of this rank's shard from those of its splits, ``partials [4, splits, C]``."""
        _, splits, N = partials.shape
        statistics = torch.empty(4, N, dtype=torch.float32, device=partials.device)
        run_kernel(
            combine_splits, partials.device, -(-N // COMBINE_ROWS), partials, statistics, targets, N, self.vocab_size,
            splits, CHECK_TARGETS=self.process_group is None, BLOCK=COMBINE_ROWS, num_warps=COMBINE_WARPS,
        )  # fmt: skip
        maximum, total, weighted, target = statistics
        return RowStatistics(target, maximum, total, weighted if with_entropy else None, tile_maximum, tile_width)

    def recompute_(
        self, rows: Rows, stats: RowStatistics, out: Tensor, grad_logprobs: Tensor, grad_entropy: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        g, g_entropy, scale, row_scale = self.row_scaled(
            out.dtype, grad_logprobs, grad_entropy, stats.total, rows.temperature
        )
        # An incoming gradient may be one number, expanded.
        g, g_entropy = (None if grad is None else grad.contiguous() for grad in (g, g_entropy))
        words = None if rows.support is None else support_words(rows.support, self.vocab_size)

        def launch(tile: Tile) -> None:
            self.launch_known(tile, rows, stats, out, g, g_entropy, scale, row_scale is not None, words)

        self.with_tile("head_gradient_known", rows, out, g_entropy is not None, launch)
        return out, row_scale

    def launch_known(
        self,
        tile: Tile,
        rows: Rows,
        stats: RowStatistics,
        out: Tensor,  # [C, V]
        grad_logprobs: Tensor | None,  # [C], None for 1
        grad_entropy: Tensor | None,  # [C], None for 0
        scale: float,
        row_scaled: bool,
        words: Tensor | None = None,  # [C, words]
    ) -> None:
        (hidden, targets, temperature, _), weight, device = rows, self.weight, out.device
        (N, H), V = hidden.shape, self.vocab_size
        architecture = ARCHITECTURES[architecture_of(device)]
        row_blocks, programs = -(-N // tile.rows), tile.per_processor * processors(device)
        splits, tiles_per_split = splits_of(row_blocks, -(-V // tile.columns), programs)
        items = row_blocks * splits
        descriptors = architecture.descriptors and descriptors_fit(hidden, weight, out)
        first, second, third = hidden, weight, out
        if descriptors:
            first = TensorDescriptor.from_tensor(hidden, [tile.rows, tile.depth])
            second = TensorDescriptor.from_tensor(weight, [tile.columns, tile.depth])
            third = TensorDescriptor.from_tensor(out, [tile.rows, tile.part])
        run_kernel(
            head_gradient_known, device, min(items, programs) if architecture.descriptors else items,
            first, second, self.bias, targets, temperature, stats.maximum, stats.total, stats.weighted, stats.target,
            grad_logprobs, grad_entropy, third, N, V, padded_columns(out), H,
            hidden.stride(0), weight.stride(0), weight.stride(1), out.stride(0), tiles_per_split, splits,
            self.logit_scale, self.softcap or 1.0, scale, words, 0 if words is None else words.stride(0),
            HAS_SUPPORT=words is not None,
            HAS_BIAS=self.bias is not None,
            HAS_TEMPERATURE=temperature is not None,
            HAS_SOFTCAP=self.softcap is not None,
            HAS_GRAD=grad_logprobs is not None,
            HAS_GRAD_ENTROPY=grad_entropy is not None,
            ROW_SCALED=row_scaled,
            DESCRIPTORS=descriptors,
            DOT_DTYPE=DOT_DTYPES[self.operand_dtype],
            BLOCK_N=tile.rows, BLOCK_V=tile.columns, PART_V=tile.part, BLOCK_K=tile.depth,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip

    def row_scaled(
        self,
        dtype: torch.dtype,
        grad_logprobs: Tensor | None,  # [C]
        grad_entropy: Tensor | None,  # [C]
        like: Tensor,  # [C]
        temperature: Tensor | None,  # [C]
    ) -> tuple[Tensor | None, Tensor | None, float, Tensor | None]:
        """For a gradient that is stored in `dtype`: its coefficients, its scale, and the row scale to apply later.

        Without a row scale the kernel divides by the temperature; with one it does not.
        """
        if dtype != torch.float16:
            return grad_logprobs, grad_entropy, self.logit_scale, None
        grad_logprobs, grad_entropy, size = _normalized(grad_logprobs, grad_entropy, like)
        row_scale = size * (self.logit_scale / UNIT)
        return grad_logprobs, grad_entropy, UNIT, row_scale if temperature is None else row_scale / temperature

    def gradient_(
        self, chunk: Chunk, grad_logprobs: Tensor | None, grad_entropy: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        (_, targets, temperature, _), e, stats = chunk.rows, chunk.e, chunk.stats
        N, V = e.shape
        program_rows = gradient_rows(stats.tile_width)
        grad_logprobs, grad_entropy, scale, row_scale = self.row_scaled(
            e.dtype, grad_logprobs, grad_entropy, stats.total, temperature
        )
        # An incoming gradient may be one number, expanded.
        grad_logprobs, grad_entropy = (
            None if grad is None else grad.contiguous() for grad in (grad_logprobs, grad_entropy)
        )
        run_kernel(
            head_gradient, e.device, -(-N // program_rows) * -(-V // (GRADIENT_PARTS * stats.tile_width)),
            e, stats.tile_maximum, stats.maximum, stats.total, stats.weighted, stats.target, targets,
            temperature, grad_logprobs, grad_entropy, N, V, padded_columns(e), e.stride(0),
            scale, self.softcap or 1.0,
            HAS_TEMPERATURE=temperature is not None,
            HAS_SOFTCAP=self.softcap is not None,
            HAS_GRAD=grad_logprobs is not None,
            HAS_GRAD_ENTROPY=grad_entropy is not None,
            ROW_SCALED=row_scale is not None,
            PART_V=stats.tile_width, PARTS=GRADIENT_PARTS, ROWS=program_rows, num_warps=GRADIENT_WARPS,
        )  # fmt: skip
        return e, row_scale
