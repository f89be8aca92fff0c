"""Passes over the kept ids alone: the rows of the weight that they name are gathered, and no column is wasted.

For K kept ids of N tokens, in all of them K H multiplications a product instead of N V H:

    z_k  = logits of token n at id v, for each kept pair k = (n, v)      K numbers, in float32
    d_k  = dL/d(hidden_n . weight_v), from the statistics of token n     K numbers
    dH_n = sum of d_k weight_v over the pairs of n,  dW_v = sum of d_k hidden_n over the pairs of v

Here each pair reads its own row of the weight, which a matrix product reads once for many tokens, so gathering pays
only where few ids are kept (`gathers`). Elsewhere the pass is the usual one with all other columns set to -inf. All
pairs are processed at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol, Self

import torch
from torch import Tensor

from grpo_kernels._checks import IGNORE_INDEX
from grpo_kernels._head import RowStatistics
from grpo_kernels._passes import KnownRows, Pass, Scores, without_empty
from grpo_kernels._torch_gather import TorchGather
from grpo_kernels._torch_head import TorchHead
from grpo_kernels.budget import GATHER_BYTES, gather_share
from grpo_kernels.support import RowSupport, Support


class Gather(Protocol):
    """The kept pairs of some of a pass's tokens, and the products with them; ``[K]`` tensors of the head's dtype."""

    def forward(self) -> tuple[Tensor, RowStatistics]:
        """(z ``[K]``, the statistics of the n tokens)."""
        ...

    def gradient(
        self, z: Tensor, stats: RowStatistics, grad_logprobs: Tensor | None, grad_entropy: Tensor | None
    ) -> Tensor:
        """dL/d(hidden . weight) ``[K]``, from dL/dlogp and dL/dentropy ``[n]``; None stands for 1 and for 0."""
        ...

    def write_grad_hidden(self, d: Tensor, out: Tensor) -> None:
        """Write the tokens' rows of ``out [N, H]``, over all shards."""
        ...

    def add_grad_weight(self, d: Tensor, out: Tensor, add: bool) -> None:
        """Write ``out [V, H]``, or add to it; rounded once."""
        ...

    def add_grad_bias(self, d: Tensor, out: Tensor) -> None:
        """Add to ``out [V]``."""
        ...


class GatheredChunk(NamedTuple):
    """What `Scores` and `KnownRows` read of a `Chunk`, and the kept pairs."""

    at: Tensor | slice  # which of the N tokens
    stats: RowStatistics
    z: Tensor  # [K]
    pairs: Gather

    def gradient(self, grad_logprobs: Tensor | None, grad_entropy: Tensor | None) -> Tensor:
        """`Gather.gradient`; a target outside of its support has none."""
        if grad_logprobs is None:
            grad_logprobs = torch.ones_like(self.stats.target)
        grad_logprobs = torch.where(self.stats.target == float("-inf"), 0.0, grad_logprobs)
        return self.pairs.gradient(self.z, self.stats, grad_logprobs, grad_entropy)


@dataclass(frozen=True)
class GatheredPass(Pass):
    """A `Pass` over the kept ids; its buffers are theirs."""

    def prepared(self) -> Self:
        # A copy of the whole weight would cost more than casting the rows that are read.
        return self

    def chunks(self, rows: Tensor, buffer: Tensor | None, with_entropy: bool) -> Iterator[GatheredChunk]:
        if rows.numel() == 0:
            return
        at = slice(0, rows.numel()) if rows.numel() == self.targets.numel() else rows
        pairs: Gather
        if isinstance(self.head, TorchHead):
            pairs = TorchGather(self, at, with_entropy)
        else:
            from grpo_kernels.triton_kernels.triton_gather import TritonGather

            pairs = TritonGather(self, at, with_entropy)
        z, stats = pairs.forward()
        yield GatheredChunk(at, without_empty(stats), z, pairs)

    def gradient_chunks(self, rows: Tensor) -> Iterator[GatheredChunk]:
        return self.chunks(rows, None, self.with_entropy)

    def gradients(self, hidden_dtype: torch.dtype, weight_dtype: torch.dtype) -> GatheredGradients:
        return GatheredGradients(self, hidden_dtype, weight_dtype)

    def score(self, rows: Tensor, scores: Scores, known: KnownRows | None = None) -> None:
        # The few products are made again where a gradient needs them.
        for chunk in self.chunks(rows, None, scores.entropy is not None):
            scores.write(chunk)

    def slopes(self, rows: Tensor, scores: Scores, slopes: list[Tensor]) -> None:
        for chunk in self.chunks(rows, None, scores.entropy is not None):
            scores.write(chunk)
            chunk.pairs.write_grad_hidden(chunk.gradient(None, None), slopes[0])
            if len(slopes) > 1:
                one, zero = torch.ones_like(chunk.stats.total), torch.zeros_like(chunk.stats.total)
                chunk.pairs.write_grad_hidden(chunk.gradient(zero, one), slopes[1])


class GatheredGradients:
    """`Gradients` of the kept ids, all of which are in one chunk."""

    def __init__(self, call: Pass, hidden_dtype: torch.dtype, weight_dtype: torch.dtype):
        head = call.head
        self.hidden = call.hidden.new_zeros(call.hidden.shape, dtype=hidden_dtype) if call.needs[0] else None
        self.buffer, self.weight = call.grad_weight_buffer, call.grad_weight_buffer
        if call.needs[1] and self.buffer is None:
            self.weight = torch.zeros_like(head.weight, dtype=weight_dtype, memory_format=torch.contiguous_format)
        self.bias = call.hidden.new_zeros(head.vocab_size, dtype=head.dtype) if call.needs[2] else None

    def add(self, chunk: GatheredChunk, grad_logprobs: Tensor, grad_entropy: Tensor | None) -> None:
        d = chunk.gradient(grad_logprobs, grad_entropy)
        if self.hidden is not None:
            chunk.pairs.write_grad_hidden(d, self.hidden)
        if self.weight is not None:
            chunk.pairs.add_grad_weight(d, self.weight, add=self.buffer is not None)
        if self.bias is not None:
            chunk.pairs.add_grad_bias(d, self.bias)

    def recompute(
        self, call: Pass, rows: Tensor, known: KnownRows, grad_logprobs: Tensor, grad_entropy: Tensor | None
    ) -> None:
        for chunk in call.chunks(rows, None, grad_entropy is not None):
            self.add(chunk, grad_logprobs[chunk.at], None if grad_entropy is None else grad_entropy[chunk.at])

    def collected(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The gradients of (hidden, weight, bias)."""
        return self.hidden, self.weight, self.bias


def gathers(call: Pass, num_ids: int) -> bool:
    """Whether gathering `num_ids` kept ids is less work than the whole vocabulary; the host waits for nothing."""
    if call.rows is not None:
        count = call.rows.numel()
    elif call.targets.device.type == "cpu":
        count = int((call.targets != IGNORE_INDEX).sum())
    else:
        count = call.targets.numel()
    head = call.head
    share = gather_share(head.weight.device, head.operand_dtype)
    return num_ids <= share * count * head.sizing_vocab and GATHER_BYTES * num_ids <= head.max_buffer_bytes


def with_support(call: Pass, support: Support, gathered: bool) -> Pass:
    """`call` over the kept ids of its N tokens; `gathered` allows a `GatheredPass`."""
    head = call.head
    local = RowSupport.of(support, head.vocab_start, head.vocab_size)
    kind = GatheredPass if gathered and gathers(call, support.ids.numel()) else type(call)
    return kind(**vars(call) | {"support": local})
