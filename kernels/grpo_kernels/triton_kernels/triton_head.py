"""The output head on Triton: each step of `grpo_kernels._head.Head` that touches logits is one kernel.

The chunk's buffer holds exponentials, then dL/d(hidden @ weight.T), in bfloat16 where the device multiplies bfloat16
into float32, else in float32.
"""

from __future__ import annotations

import time

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from grpo_kernels._head import Chunk, Head, Rows, RowStatistics
from grpo_kernels.budget import equal_parts
from grpo_kernels.triton_kernels.head_kernels import combine_splits, head_forward, head_gradient
from grpo_kernels.triton_kernels.launch import architecture_of, interpreting, processors, run_kernel
from grpo_kernels.triton_kernels.tiles import ARCHITECTURES, Tile, choose_tile, splits_of

DOT_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
# Rows and warps of the kernels that are bound by memory.
COMBINE_ROWS, COMBINE_WARPS = 128, 4
# Parts of tiles that one program of `head_gradient` processes.
GRADIENT_PARTS = 16
GRADIENT_ROWS, GRADIENT_WARPS = 64 if interpreting() else 16, 4


def descriptors_fit(*matrices: Tensor) -> bool:
    """Whether tensor descriptors can address these matrices: rows and base aligned to 16 bytes, unit last stride."""
    return all(
        m.stride(-1) == 1 and m.data_ptr() % 16 == 0 and m.stride(0) * m.element_size() % 16 == 0 for m in matrices
    )


class TritonHead(Head):
    """`Head` that keeps logits in registers; the row scale is part of the gradient, so `gradient_` returns None."""

    # Elements: rows start at multiples of 16 bytes whatever V is, as the kernels and cuBLAS require.
    buffer_alignment = 8

    @property
    def buffer_dtype(self) -> torch.dtype:
        return self.gradient_dtype

    def scoring_buffer(self, num_rows: int) -> Tensor:
        """A buffer without columns: scoring stores no logits. Its rows are those of a chunk."""
        narrow = self.narrow_bytes() + 4 * 4 * processors(self.weight.device)
        return torch.empty(equal_parts(num_rows, self.max_buffer_bytes // narrow), 0, device=self.weight.device)

    def operand(self, rows: Tensor) -> Tensor:
        # The kernel takes 16-bit operands without widening.
        return rows.to(self.operand_dtype).contiguous()

    def forward_(self, rows: Rows, out: Tensor, with_entropy: bool) -> RowStatistics:
        return self.launch_forward(self.tile(rows, out, with_entropy), rows, out, with_entropy)

    def tile(self, rows: Rows, out: Tensor, with_entropy: bool) -> Tile:
        """The tile of the table, or with autotuning the fastest for these rows."""
        architecture = architecture_of(out.device)
        dtype, softcap = self.operand_dtype, self.softcap is not None
        candidates = ARCHITECTURES[architecture].candidates(dtype, softcap)
        sizes = f"H={rows.hidden.shape[1]} V={self.vocab_size}"
        key = f"{str(dtype).removeprefix('torch.')} {softcap=} {sizes} store={out.shape[1] > 0} entropy={with_entropy}"

        def measure(tile: Tile) -> float:
            def launch():
                self.launch_forward(tile, rows, out, with_entropy)

            if out.is_cuda:
                return triton.testing.do_bench(launch, warmup=5, rep=50, return_mode="median")
            started = time.perf_counter()
            launch()
            return time.perf_counter() - started

        return choose_tile(candidates, architecture, key, measure)

    def launch_forward(self, tile: Tile, rows: Rows, out: Tensor, with_entropy: bool) -> RowStatistics:
        (hidden, targets, temperature), weight, device = rows, self.weight, out.device
        (N, H), V, store = hidden.shape, self.vocab_size, out.shape[1] > 0
        architecture = ARCHITECTURES[architecture_of(device)]
        row_blocks, tiles = -(-N // tile.rows), -(-V // tile.columns)
        programs = processors(device)
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
            N, V, H, hidden.stride(0), weight.stride(0), weight.stride(1), out.stride(0), tiles_per_split, splits,
            self.logit_scale, self.softcap or 1.0,
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
        statistics = torch.empty(4, N, dtype=torch.float32, device=device)
        run_kernel(
            combine_splits, device, -(-N // COMBINE_ROWS), partials, statistics, targets, N, V, splits,
            CHECK_TARGETS=self.process_group is None, BLOCK=COMBINE_ROWS, num_warps=COMBINE_WARPS,
        )  # fmt: skip
        maximum, total, weighted, target = statistics
        mine = RowStatistics(target, maximum, total, weighted if with_entropy else None, tile_maximum, tile.part)
        return self.over_shards(mine)

    def gradient_(
        self, chunk: Chunk, grad_logprobs: Tensor | None, grad_entropy: Tensor | None = None
    ) -> tuple[Tensor, None]:
        (_, targets, temperature), e, stats = chunk.rows, chunk.e, chunk.stats
        N, V = e.shape
        # An incoming gradient may be one number, expanded.
        grad_logprobs, grad_entropy = (
            None if grad is None else grad.contiguous() for grad in (grad_logprobs, grad_entropy)
        )
        run_kernel(
            head_gradient, e.device, -(-N // GRADIENT_ROWS) * -(-V // (GRADIENT_PARTS * stats.tile_width)),
            e, stats.tile_maximum, stats.maximum, stats.total, stats.weighted, stats.target, targets,
            temperature, grad_logprobs, grad_entropy, N, V, e.stride(0), self.logit_scale, self.softcap or 1.0,
            HAS_TEMPERATURE=temperature is not None,
            HAS_SOFTCAP=self.softcap is not None,
            HAS_GRAD=grad_logprobs is not None,
            HAS_GRAD_ENTROPY=grad_entropy is not None,
            PART_V=stats.tile_width, PARTS=GRADIENT_PARTS, ROWS=GRADIENT_ROWS, num_warps=GRADIENT_WARPS,
        )  # fmt: skip
        return e, None
