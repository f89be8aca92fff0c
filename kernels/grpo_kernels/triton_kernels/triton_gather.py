"""The kept pairs of a pass on Triton; nothing waits for the GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton.language as tl
from torch import Tensor

from grpo_kernels._head import RowStatistics
from grpo_kernels.triton_kernels.launch import interpreting, run_kernel
from grpo_kernels.triton_kernels.support_kernels import (
    support_forward,
    support_grad_hidden,
    support_grad_weight,
    support_gradient,
)

if TYPE_CHECKING:
    from grpo_kernels._passes import Pass

DOT_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
# Pairs that a program handles at once, and numbers of each row: 16 bytes for each thread of a 16-bit weight.
PAIRS, BLOCK_H, WARPS = 16, 256 if not interpreting() else 64, 4
# `support_gradient` reads no rows.
GRADIENT_PAIRS, GRADIENT_WARPS = 128, 4


class TritonGather:
    """`Gather` in the kernels of `support_kernels`; the arguments are those of `TorchGather`."""

    def __init__(self, call: Pass, at: Tensor | slice, with_entropy: bool):
        self.call, self.head, self.at, self.with_entropy = call, call.head, at, with_entropy
        support = call.support
        self.ids = support.ids
        self.starts, self.ends = (bound[at].contiguous() for bound in (support.starts, support.ends))
        self.device = self.ids.device
        self.tokens = torch.arange(len(call.targets), device=self.device)[at]
        self.targets = call.targets[at].contiguous()
        self.temperature = None if call.temperature is None else call.temperature[at].contiguous()
        # The kernels take any distance between rows, but no other strides.
        self.hidden = call.hidden if call.hidden.stride(-1) == 1 else call.hidden.contiguous()
        self.dtype = {"DOT_DTYPE": DOT_DTYPES[self.head.operand_dtype]}

    def forward(self) -> tuple[Tensor, RowStatistics]:
        head, count = self.head, len(self.tokens)
        z = torch.empty(len(self.ids), dtype=torch.float32, device=self.device)
        statistics = torch.empty(4, count, dtype=torch.float32, device=self.device)
        run_kernel(
            support_forward, self.device, count,
            self.hidden, head.weight, head.bias, self.ids, self.starts, self.ends, self.tokens, self.targets,
            self.temperature, z, statistics, count, self.hidden.shape[1], self.hidden.stride(0),
            head.weight.stride(0), head.weight.stride(1), head.logit_scale, head.softcap or 1.0,
            HAS_BIAS=head.bias is not None,
            HAS_TEMPERATURE=self.temperature is not None,
            HAS_SOFTCAP=head.softcap is not None,
            **self.dtype, PAIRS=PAIRS, BLOCK_H=BLOCK_H, num_warps=WARPS,
        )  # fmt: skip
        maximum, total, weighted, target = statistics
        weighted = weighted if self.with_entropy else None
        return z, head.over_shards(RowStatistics(target, maximum, total, weighted, None, 0))

    def gradient(
        self, z: Tensor, stats: RowStatistics, grad_logprobs: Tensor | None, grad_entropy: Tensor | None
    ) -> Tensor:
        head = self.head
        if grad_logprobs is None:
            grad_logprobs = torch.ones_like(stats.target)
        # Pairs of other tokens have no gradient.
        d = torch.zeros_like(z)
        run_kernel(
            support_gradient, self.device, len(self.tokens),
            z, self.ids, self.starts, self.ends, self.targets, self.temperature,
            stats.maximum, stats.total, stats.weighted, stats.target,
            grad_logprobs.contiguous(), None if grad_entropy is None else grad_entropy.contiguous(), d,
            head.logit_scale, head.softcap or 1.0,
            HAS_TEMPERATURE=self.temperature is not None,
            HAS_SOFTCAP=head.softcap is not None,
            HAS_GRAD_ENTROPY=grad_entropy is not None,
            PAIRS=GRADIENT_PAIRS, num_warps=GRADIENT_WARPS,
        )  # fmt: skip
        return d

    def write_grad_hidden(self, d: Tensor, out: Tensor) -> None:
        head, found, tokens = self.head, out, self.tokens
        if head.process_group is not None or out.stride(1) != 1:
            found = torch.empty(len(tokens), out.shape[1], dtype=head.dtype, device=self.device)
            tokens = torch.arange(len(tokens), device=self.device)
        run_kernel(
            support_grad_hidden, self.device, len(tokens) * -(-out.shape[1] // BLOCK_H),
            d, self.ids, self.starts, self.ends, tokens, head.weight, found, out.shape[1],
            head.weight.stride(0), head.weight.stride(1), found.stride(0),
            **self.dtype, PAIRS=PAIRS, BLOCK_H=BLOCK_H, num_warps=WARPS,
        )  # fmt: skip
        if found is not out:
            out[self.at] = head.all_reduce(found).to(out.dtype)

    def add_grad_weight(self, d: Tensor, out: Tensor, add: bool) -> None:
        self._over_ids(d, out, None, add)

    def add_grad_bias(self, d: Tensor, out: Tensor) -> None:
        # The logit scale does not act on the bias.
        self._over_ids(d, None, out, False)

    def _over_ids(self, d: Tensor, out: Tensor | None, grad_bias: Tensor | None, add: bool) -> None:
        """A program for each id adds up its pairs, in the order of the tokens."""
        (V, H), ends = self.head.weight.shape, self.call.support.ends
        ordered, order = torch.sort(self.ids, stable=True)
        bounds = torch.searchsorted(ordered, torch.arange(V + 1, dtype=ordered.dtype, device=self.device))
        pairs = torch.arange(len(self.ids), device=self.device)
        # Unlike repeat_interleave, a search stays within bounds if unchecked offsets do not end at the last pair.
        tokens = torch.searchsorted(ends, pairs, right=True).clamp(max=len(ends) - 1)
        spans = 1 if out is None else -(-H // BLOCK_H)
        run_kernel(
            support_grad_weight, self.device, V * spans,
            d, order, bounds, tokens, self.hidden, out, grad_bias, H if out is not None else 1, self.hidden.stride(0),
            0 if out is None else out.stride(0), 1 / self.head.logit_scale,
            HAS_WEIGHT=out is not None, HAS_BIAS=grad_bias is not None, ADD=add,
            **self.dtype, PAIRS=PAIRS, BLOCK_H=BLOCK_H, num_warps=WARPS,
        )  # fmt: skip
