"""Supports of targets, as a truncated sampler would have kept them."""

from __future__ import annotations

import torch
from torch import Tensor

from grpo_kernels.support import Support


def random_support(targets: Tensor, vocab: int, most: int, dtype: torch.dtype = torch.int32) -> Support:
    """From 1 to `most` ids of each target, one of which is the target; none for a target of -100."""
    kept = []
    for target in targets.flatten().tolist():
        ids = torch.randperm(vocab)[: int(torch.randint(1, most + 1, ()))]
        if target >= 0 and target not in ids:
            ids[0] = target
        kept.append((ids if target >= 0 else ids[:0]).to(dtype))
    return Support.of(kept)


def nucleus(logits: Tensor, top_p: float) -> list[Tensor]:
    """The ids of each row that `top_p` keeps: the most likely ones whose probabilities reach it."""
    probabilities, ids = logits.softmax(-1).sort(-1, descending=True)
    before = probabilities.cumsum(-1) - probabilities
    return [row[mass < top_p] for row, mass in zip(ids, before, strict=True)]


def mask_of(support: Support, vocab: int) -> Tensor:
    """``[N, V]`` bool."""
    mask = torch.zeros(len(support.offsets) - 1, vocab, dtype=torch.bool)
    for row, (start, end) in enumerate(zip(support.offsets[:-1], support.offsets[1:], strict=True)):
        mask[row, support.ids[start:end].long()] = True
    return mask
