"""What an operation writes and keeps alive, without running it; and what an interpreted kernel touches."""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Written(NamedTuple):
    """One tensor that one call wrote."""

    call: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class Traffic(TorchDispatchMode):
    """Records every tensor that is written within it, and the most bytes of new storage that were alive at once."""

    def __init__(self):
        super().__init__()
        self.written: list[Written] = []
        self.alive: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.is_view:
            return out
        found = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        inputs = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in found:
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in inputs and key not in self.alive:
                self.alive[key] = storage.nbytes()
                weakref.finalize(storage, self.alive.pop, key, None)
        self.peak = max(self.peak, sum(self.alive.values()))
        if "empty" not in func._schema.name:
            self.written += [Written(func._schema.name, tuple(t.shape), t.dtype) for t in found]
        return out


class Accesses:
    """Stands in for the interpreter's memory: which bytes a launch really reads and writes."""

    def __init__(self, memory):
        self.memory, self.read, self.written = memory, set(), set()

    def __getattr__(self, name):
        return getattr(self.memory, name)

    def _note(self, into, pointers, mask, size):
        for address in pointers[mask].ravel().tolist():
            into.update(range(address, address + size))

    def load(self, pointers, mask, other, dtype):
        self._note(self.read, pointers, mask, dtype.itemsize)
        return self.memory.load(pointers, mask, other, dtype)

    def store(self, pointers, values, mask):
        self._note(self.written, pointers, mask, values.dtype.itemsize)
        return self.memory.store(pointers, values, mask)
