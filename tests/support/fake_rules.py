"""What torch's operations do on a fake GPU: CUDA's rules for products, waits of the host, and live bytes.

Tensors on the GPU are torch's fake ones, without data; tensors on the CPU are real, so that the host's own planning
computes what it does beside a GPU. A number that the host reads from the GPU is `FakeGPU.value`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    from support.fake_gpu import FakeGPU

aten = torch.ops.aten
PRODUCTS = {getattr(packet, name) for packet in (aten.mm, aten.addmm, aten.bmm) for name in packet.overloads()}
MIXED = (aten.mm.dtype, aten.mm.dtype_out, aten.addmm.dtype, aten.addmm.dtype_out)
INDEXED = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)
HALF = (torch.float16, torch.bfloat16)


def on_gpu(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type == "cuda"


class Rules(TorchDispatchMode):
    """Runs operations on fake tensors, answers for the values that these lack, and counts."""

    def __init__(self, gpu: FakeGPU):
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        leaves = tree_leaves((args, kwargs))
        target = kwargs.get("device")
        target = None if target is None else torch.device(target).type
        if target != "cuda" and not any(isinstance(leaf, FakeTensor) for leaf in leaves):
            return self._on_host(func, args, kwargs)
        name = str(func).removeprefix("aten.")
        with self.gpu.mode:
            out = self._answer(func, name, args, kwargs, target)
        tensors = [leaf for leaf in (*leaves, *tree_leaves(out)) if isinstance(leaf, Tensor)]
        for tensor in tensors:
            self.gpu.allocate(tensor)
        if func not in PRODUCTS and not func.is_view:
            moved = sum(tensor.numel() * tensor.element_size() for tensor in tensors if on_gpu(tensor))
            self.gpu.report.moved_bytes[name] = self.gpu.report.moved_bytes.get(name, 0) + moved
        return out

    def _on_host(self, func: Any, args: tuple, kwargs: dict) -> Any:
        pinned = kwargs.pop("pin_memory", None)
        out = func(*args, **kwargs)
        return self.gpu.pin(out) if pinned else out

    def _answer(self, func: Any, name: str, args: tuple, kwargs: dict, target: str | None) -> Any:
        if func is aten._local_scalar_dense.default:
            self.gpu.wait("item")
            return self.gpu.value if args[0].is_floating_point() else 1
        if func in (aten.nonzero.default, aten.masked_select.default):
            # As if every element were chosen.
            self.gpu.wait(name)
            shape = (args[0].numel(), args[0].dim()) if func is aten.nonzero.default else (args[0].numel(),)
            dtype = torch.int64 if func is aten.nonzero.default else args[0].dtype
            return torch.empty(shape, dtype=dtype, device=args[0].device)
        if func is aten._unique2.default:
            # As if all were different.
            self.gpu.wait(name)
            flat = args[0].flatten()
            return torch.empty_like(flat), torch.empty_like(args[0], dtype=torch.int64), flat.new_empty(0)
        if func in INDEXED:
            args = (args[0], self._indices(args[0], args[1]), *args[2:])
        if func is aten._to_copy.default and target is not None and on_gpu(args[0]) != (target == "cuda"):
            waits = not (kwargs.get("non_blocking") and (target == "cpu" or self.gpu.is_pinned(args[0])))
            if waits:
                self.gpu.wait(f"copy {'from' if target == 'cuda' else 'to'} the CPU")
            dtype = kwargs.get("dtype") or args[0].dtype
            if target == "cpu":
                return self._on_cpu(args[0], dtype)
            return torch.empty(args[0].shape, dtype=dtype, device=kwargs["device"])
        if func is aten.copy_.default and on_gpu(args[0]) != on_gpu(args[1]):
            host, way = (args[1], "from") if on_gpu(args[0]) else (args[0], "to")
            non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking")
            # A number goes along as an argument of a kernel.
            if not (non_blocking and self.gpu.is_pinned(host)) and (way == "to" or host.dim()):
                self.gpu.wait(f"copy {way} the CPU")
            if way == "to":
                return self._fill(args[0])
        if func in MIXED:
            return self._mixed_product(func, name, args, kwargs)
        if func in PRODUCTS:
            self._product(func, name, args, kwargs)
        return func(*args, **kwargs)

    def _indices(self, indexed: Tensor, indices: list) -> list:
        """Indices that fake tensors can take: a mask is as if every element were chosen."""
        if any(index is not None and index.device.type == "cpu" and index.dim() for index in indices):
            self.gpu.wait("copy from the CPU")
        if not any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices):
            return indices
        self.gpu.wait("index by a mask")
        chosen = []
        for index in indices:
            if index is not None and index.dtype in (torch.bool, torch.uint8):
                chosen += [torch.arange(index.numel(), device=indexed.device)] * index.dim()
            else:
                chosen.append(index)
        return chosen

    def _on_cpu(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        with torch.utils._python_dispatch._disable_current_modes():
            return self._fill(torch.empty(tensor.shape, dtype=dtype))

    def _fill(self, tensor: Tensor) -> Tensor:
        with torch.utils._python_dispatch._disable_current_modes():
            return tensor.fill_(self.gpu.value if tensor.is_floating_point() else 1)

    def _product(self, func: Any, name: str, args: tuple, kwargs: dict) -> None:
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        dtypes = {tensor.dtype for tensor in (*tensors, *([kwargs["out"]] if "out" in kwargs else []))}
        assert len(dtypes) == 1, f"{name} of {dtypes}"
        self._count(name, *tensors[-2:], tensors[-1].dtype)

    def _mixed_product(self, func: Any, name: str, args: tuple, kwargs: dict) -> Tensor:
        """A product with `out_dtype`; answered here, since torch 2.11 has no fake kernel for those of addmm."""
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        a, b = tensors[-2:]
        dtype = next((arg for arg in args if isinstance(arg, torch.dtype)), kwargs.get("out_dtype"))
        assert a.dtype == b.dtype, f"{name} of {a.dtype} and {b.dtype}"
        assert dtype == a.dtype or (dtype == torch.float32 and a.dtype in HALF), f"{name} of {a.dtype} into {dtype}"
        out = kwargs.get("out")
        assert out is None or out.dtype == dtype, f"{name} of {a.dtype} into {dtype}, but out is {out.dtype}"
        assert len(tensors) == 2 or tensors[0].dtype in (dtype, a.dtype), f"{name} adds to {tensors[0].dtype}"
        shape = a.shape[0], b.shape[1]
        assert a.shape[1] == b.shape[0], f"{name}: {a.shape} @ {b.shape}"
        assert out is None or out.shape == shape, f"{name}: {a.shape} @ {b.shape} into {out.shape}"
        self._count(name, a, b, dtype)
        return torch.empty(shape, dtype=dtype, device=a.device) if out is None else out

    def _count(self, name: str, a: Tensor, b: Tensor, dtype: torch.dtype) -> None:
        short = [str(kind).removeprefix("torch.") for kind in (a.dtype, dtype)]
        key = f"{name} {short[0]} -> {short[1]}"
        flops = 2 * a.numel() * b.shape[-1]
        self.gpu.report.products[key] = self.gpu.report.products.get(key, 0) + flops
