"""Token weights, which combine the mask and the normaliser of a whole optimizer step."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from grpo_kernels import _checks as checks

AGGREGATIONS = ("sequence_mean", "token_mean", "constant_length", "sequence_sum")


def token_weights(
    mask: Tensor,  # [N] or [B, T]
    aggregation: str,
    *,
    cu_seqlens: Tensor | None = None,  # [S + 1]
    num_sequences: float | None = None,
    num_tokens: float | None = None,
    constant_length: float | None = None,
) -> Tensor:
    """The weights ``w_t`` of a whole optimizer step: mask and normaliser in one tensor.

    Call it once on all sequences of the step, or on each part of them with the totals of the step; either way the loss
    of the step is the plain sum of its microbatches' losses.

    Args:
        mask: ``[B, T]``, one sequence per row, or packed ``[N]`` with `cu_seqlens`; non-zero where a token counts.
        aggregation: one of the values described in :class:`PolicyObjective`.
        cu_seqlens: ``[S + 1]`` int offsets of the sequences of a packed mask.
        num_sequences: sequences of the step (default: those in `mask`, empty ones included, as in TRL).
        num_tokens: counted tokens of the step (default: those in `mask`).
        constant_length: the length of ``"constant_length"``; in Dr. GRPO and TRL the longest allowed completion.

    Returns:
        float32 tensor of `mask`'s shape. A step without any counted token gives zeros.

    Raises:
        ValueError: unknown `aggregation`, a packed mask without `cu_seqlens` where sequences matter, or no
            `constant_length` where it is needed.
    """
    op = "token_weights"
    checks.require_choice(op, "aggregation", aggregation, AGGREGATIONS)
    checks.require_tensors(op, mask=mask)
    checks.require(mask.dim() in (1, 2), f"{op}: mask must have shape [B, T] or [N], got {tuple(mask.shape)}")
    counted = (mask != 0).to(torch.float32)
    if aggregation == "token_mean":
        total = counted.sum() if num_tokens is None else counted.new_tensor(float(num_tokens))
        return counted / total.clamp(min=1.0)

    offsets = checks.sequence_offsets(op, mask.shape, cu_seqlens, mask.device, f"aggregation={aggregation!r}")
    assert offsets is not None
    sequences = float(max(offsets.numel() - 1, 1)) if num_sequences is None else float(num_sequences)
    checks.require(sequences > 0, f"{op}: num_sequences must be above 0, got {num_sequences}")
    if aggregation == "sequence_sum":
        return counted / sequences
    if aggregation == "constant_length":
        checks.require(
            constant_length is not None and constant_length > 0,
            f"{op}: aggregation='constant_length' needs constant_length above 0, got {constant_length}",
        )
        return counted / (sequences * constant_length)
    flat = counted.flatten()
    ids = checks.sequence_ids(offsets, flat.numel())
    lengths = checks.sequence_sums(flat, ids, offsets).clamp_(min=1.0)
    return (flat / (sequences * lengths[ids])).view_as(counted)


def high_entropy_mask(
    entropy: Tensor,  # any shape
    mask: Tensor,  # the same shape
    quantile: float,
) -> Tensor:
    """The tokens with the highest entropy, the only ones with a policy gradient in "Beyond the 80/20 Rule"
    (arXiv 2506.01939; TRL's `top_entropy_quantile`). Set the advantages of the others to 0.

    The weights stay unchanged, and so do the normaliser, the KL term and the ratio of a sequence.

    Args:
        entropy: per-token entropies of all tokens of the step, nats, any shape.
        mask: same shape; non-zero where a token counts.
        quantile: the share of the counted tokens to keep, in [0, 1]; ties with the last one are kept as well. 0 keeps
            the highest one.

    Returns:
        bool tensor of `entropy`'s shape, False where `mask` is 0.

    Raises:
        ValueError: `quantile` is out of range, or the shapes differ.
    """
    op = "high_entropy_mask"
    checks.require_tensors(op, entropy=entropy, mask=mask)
    checks.require_shape(op, entropy.shape, mask=mask)
    checks.require_number(op, "quantile", quantile)
    checks.require(0 <= quantile <= 1, f"{op}: quantile must be from 0 to 1, got {quantile}")
    counted = mask != 0
    values = entropy[counted].sort().values
    if values.numel() == 0:
        return counted
    # The first value at or above the interpolated quantile; rounded, since 1 - 0.7 is a little above 0.3.
    threshold = values[math.ceil(round((1 - quantile) * (values.numel() - 1), 6))]
    return counted & (entropy >= threshold)
