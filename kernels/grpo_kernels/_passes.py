"""Passes over the rows of a head: scoring, slopes, and gradients, a chunk at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from grpo_kernels._head import Head
from grpo_kernels.budget import chunks


def partition(category: Tensor, count: int) -> list[Tensor]:
    """The indices at which ``category [N]`` int is 0, 1, .. `count` - 1, each in order.

    Their numbers are read by the host once, which waits for a GPU: a row that is not multiplied has to be known.
    """
    if category.device.type == "cpu":
        return [(category == value).nonzero().squeeze(1) for value in range(count)]
    order = torch.argsort(category, stable=True)
    sizes = torch.stack([(category == value).sum() for value in range(count)]).tolist()
    return list(order[: sum(sizes)].split(sizes))


def row_chunks(rows: Tensor, num_tokens: int, most: int) -> Iterator[Tensor | slice]:
    """The row indices `rows` in chunks of at most `most`; slices, which copy nothing, where they are all rows."""
    for chunk in chunks(rows.numel(), most):
        yield chunk if rows.numel() == num_tokens else rows[chunk]


def forward_rows(head: Head, hidden, targets, temperature, rows, out, with_entropy):
    """The forward of one chunk: (hidden operand, e, statistics, temperatures)."""
    operand = head.operand(hidden[rows])
    row_temperature = None if temperature is None else temperature[rows]
    e = out[: operand.shape[0]]
    stats = head.forward_(operand, targets[rows], row_temperature, e, with_entropy)
    return operand, e, stats, row_temperature


def score(head: Head, hidden, targets, temperature, rows, logprobs, entropy) -> None:
    """1U: write log-probabilities (and entropies, where a tensor is given) of `rows` in place."""
    buffer = head.scoring_buffer(rows.numel())
    for at in row_chunks(rows, targets.numel(), buffer.shape[0]):
        _, _, stats, _ = forward_rows(head, hidden, targets, temperature, at, buffer, entropy is not None)
        logprobs[at] = stats.logprobs
        if entropy is not None:
            entropy[at] = stats.entropy


class Gradients:
    """Where the gradients of (hidden, weight, bias) are collected; None where one is not wanted.

    The weight's and the bias's are in the accumulation dtype, hidden's is in hidden's own unless it is given.
    """

    def __init__(
        self,
        head: Head,
        hidden: Tensor,
        needs: tuple[bool, bool, bool],
        weight_buffer: Tensor | None = None,
        hidden_dtype: torch.dtype | None = None,
    ):
        self.hidden = torch.zeros_like(hidden, dtype=hidden_dtype) if needs[0] else None
        self.weight = weight_buffer
        # The first chunk writes a weight gradient of its own, and the others add to it.
        self.unwritten = weight_buffer is None and needs[1]
        if self.unwritten:
            self.weight = torch.empty(head.weight.shape, dtype=head.dtype, device=hidden.device)
        self.bias = hidden.new_zeros(head.vocab_size, dtype=head.dtype) if needs[2] else None

    def add(self, head: Head, d: Tensor, row_scale: Tensor | None, operand: Tensor, rows: Tensor | slice) -> None:
        """2U: send one chunk's dL/dlogits on to the gradients that are wanted."""
        if self.hidden is not None:
            self.hidden[rows] = head.grad_hidden(d, row_scale).to(self.hidden.dtype)
        if self.weight is not None:
            head.accumulate_grad_weight(d, row_scale, operand, self.weight, self.unwritten)
            self.unwritten = False
        if self.bias is not None:
            head.accumulate_grad_bias(d, row_scale, self.bias)

    def collected(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The gradients of (hidden, weight, bias), once all chunks were added."""
        if self.unwritten:
            self.weight.zero_()
        return self.hidden, self.weight, self.bias


def recompute_gradients(
    head, hidden, targets, temperature, rows, grad_logprobs, grad_entropy, gradients: Gradients
) -> None:
    """3U: collect `gradients` for given dL/dlogp and dL/dentropy (or None), ``[N]`` each, of `rows`."""
    buffer = head.buffer(rows.numel())
    for at in row_chunks(rows, targets.numel(), buffer.shape[0]):
        operand, e, stats, row_temperature = forward_rows(
            head, hidden, targets, temperature, at, buffer, grad_entropy is not None
        )
        d, row_scale = head.gradient_(
            e,
            stats,
            targets[at],
            row_temperature,
            grad_logprobs[at],
            None if grad_entropy is None else grad_entropy[at],
        )
        gradients.add(head, d, row_scale, operand, at)
