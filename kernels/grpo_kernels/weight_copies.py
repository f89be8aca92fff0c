"""The 16-bit copy that a GPU's products need of a float32 weight, made once where several calls share the weight.

    with kept_weight_copies():
        for microbatch in step:             # no weight changes in here
            linear_policy_loss(...).loss.backward()

Without the context each forward, and each backward that multiplies by the weight, makes a copy of its own. A copy takes
2 V H bytes, and is gone at the end of the context.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

# (memory, offset, shape, strides, dtype) of a weight -> the memory, the weight's version, and its copy. None outside of
# the context. It is no context variable, because autograd's threads for GPUs would not see that.
_kept: dict[tuple, tuple[StorageWeakRef, int, Tensor]] | None = None


@contextmanager
def kept_weight_copies() -> Iterator[None]:
    """Within it copies of weights are kept; a weight that torch sees change in place is copied again.

    Changes that torch does not see, such as a kernel's that gets a pointer, must not happen within it.
    """
    global _kept
    before = _kept
    _kept = {} if before is None else before
    try:
        yield
    finally:
        _kept = before


def copied(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """`weight` in `dtype`: a new copy, or the kept one."""
    if _kept is None or weight.is_inference():
        return weight.to(dtype)
    storage = weight.untyped_storage()
    key = storage._cdata, weight.storage_offset(), weight.shape, weight.stride(), dtype
    reference, version, copy = _kept.get(key, (None, None, None))
    if copy is None or reference.expired() or version != weight._version:
        copy = weight.to(dtype)
        _kept[key] = StorageWeakRef(storage), weight._version, copy
    return copy
