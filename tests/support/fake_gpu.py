"""A GPU that compiles what is launched on it, and runs nothing; see `fake_cuda`."""

from __future__ import annotations

import contextlib
import gc
import os
import re
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef

from support.fake_cuda import GUARD, PROCESSORS, SHARED_BYTES, Launch, Report
from support.fake_rules import Rules

TOTAL_BYTES = 80 << 30


@contextlib.contextmanager
def installed(architecture: str) -> Iterator[FakeGPU]:
    """Within it torch and Triton find one GPU of `architecture`, on which :meth:`FakeGPU.run` runs things."""
    import triton
    from triton.runtime.jit import JITFunction

    assert GUARD, "set FAKE_CUDA_GUARD to the library of build_guard()"
    assert os.environ.get("TRITON_INTERPRET") != "1", "kernels are interpreted in this process"
    gpu = FakeGPU.present = FakeGPU(architecture)
    compilers = triton.backends.backends
    replaced = [
        *((torch.cuda, name, value) for name, value in gpu.answers().items()),
        (torch, "Generator", Generator),
        (torch.version, "hip", "fake" if gpu.amd else None),
        (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
        (torch.nn.Module, "to", module_to),
        (torch.nn.functional, "scaled_dot_product_attention", attention),
        (FakeTensor, "data_ptr", address),
        (FakeTensor, "tolist", lambda tensor: tensor.cpu().tolist()),
        (Tensor, "pin_memory", lambda tensor, device=None: gpu.pin(tensor.clone())),
        (Tensor, "is_pinned", lambda tensor, device=None: gpu.is_pinned(tensor)),
        (torch.UntypedStorage, "data_ptr", storage_address(torch.UntypedStorage.data_ptr)),
        (triton.runtime.driver, "_active", gpu.driver()),
        (JITFunction, "run", gpu.recorded(JITFunction.run)),
        (compilers["nvidia"].compiler, "make_cubin", lambda *_: b"not assembled"),
        (compilers["amd"].compiler, "make_hsaco", lambda *_: b"not assembled"),
    ]
    with contextlib.ExitStack() as stack:
        for owner, name, value in replaced:
            stack.enter_context(_replaced(owner, name, value))
        yield gpu


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    missing = object()
    before = vars(owner).get(name, missing)
    setattr(owner, name, value)
    try:
        yield
    finally:
        delattr(owner, name) if before is missing else setattr(owner, name, before)


def address(tensor: Tensor) -> int:
    """An address as the caching allocator gives them: storages start at multiples of 512 bytes."""
    return (1 << 30) + tensor.storage_offset() * tensor.element_size()


def storage_address(data_ptr: Callable) -> Callable:
    """Addresses of storages; those without data have one of their own, too."""
    return lambda storage: storage._cdata if storage.device.type == "meta" else data_ptr(storage)


def module_to(module: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
    """`torch.nn.Module.to`, which cannot exchange a parameter's data here: it gets new parameters."""
    device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
    moved: dict[int, Tensor] = {}
    for part in module.modules():
        for own in (part._parameters, part._buffers):
            for name, tensor in own.items():
                if tensor is None:
                    continue
                wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
                target = device or tensor.device
                if id(tensor) not in moved and (target.type, wanted) != (tensor.device.type, tensor.dtype):
                    made = tensor.detach().to(target, wanted)
                    kept = isinstance(tensor, torch.nn.Parameter)
                    moved[id(tensor)] = torch.nn.Parameter(made, tensor.requires_grad) if kept else made
                own[name] = moved.get(id(tensor), tensor)
    return module


def attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """`scaled_dot_product_attention` by the kernels that torch takes on a GPU; a CPU build would not choose them."""
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    aten = torch.ops.aten
    if attn_mask is None and query.dtype != torch.float32:
        return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, float("-inf"))
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*query.shape[:-1], key.shape[-2])
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale
    )[0]


class Generator(torch.Generator):
    """One on the CPU, whatever the device: an operation on fake tensors does not use it."""

    def __new__(cls, device: Any = None) -> Generator:
        return super().__new__(cls)


class Stream:
    """Stands in for `torch.cuda.Stream` and `torch.cuda.Event`: the host waits only if it synchronises."""

    gpu: FakeGPU

    def __init__(self, *_: Any, **__: Any):
        pass

    def wait_stream(self, other: Stream) -> None: ...

    def wait_event(self, event: Stream) -> None: ...

    def record(self, stream: Stream | None = None) -> None: ...

    def record_event(self, event: Stream | None = None) -> Stream:
        return event or type(self)()

    def synchronize(self) -> None:
        self.gpu.wait("event")

    def elapsed_time(self, end: Stream) -> float:
        return 1.0


class FakeGPU:
    """One GPU that compiles what is launched on it, and runs nothing.

    Attributes:
        present: the one that is installed.
        active_share: which part of the rows `grpo_kernels._passes.partition` finds in its first category.
        value: every number that the host reads.
        report: that of the case that runs.
    """

    present: FakeGPU
    active_share = 1.0
    value = 1.0

    def __init__(self, architecture: str):
        self.architecture, self.amd = architecture, architecture.startswith("gfx")
        self.capability = 94 if self.amd else int(architecture.removeprefix("sm_"))
        self.live_bytes = self.base_bytes = self.largest_bytes = 0
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self._pinned: dict[int, StorageWeakRef] = {}
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.report = Report()

    def answers(self) -> dict[str, Any]:
        """What `torch.cuda` says."""
        properties = SimpleNamespace(
            name=f"fake {self.architecture}", major=self.capability // 10, minor=self.capability % 10,
            total_memory=TOTAL_BYTES, multi_processor_count=PROCESSORS[self.architecture],
            gcnArchName=self.architecture, shared_memory_per_block_optin=SHARED_BYTES[self.architecture],
            L2_cache_size=50 << 20, warp_size=32,
        )  # fmt: skip
        stream = type("FakeStream", (Stream,), {"gpu": self})
        only = stream()
        return {
            "is_available": lambda: True,
            "is_initialized": lambda: True,
            "device_count": lambda: 1,
            "current_device": lambda: 0,
            "set_device": lambda device: None,
            "device": lambda device: contextlib.nullcontext(),
            "get_device_properties": lambda device=None: properties,
            "get_device_capability": lambda device=None: (properties.major, properties.minor),
            "get_device_name": lambda device=None: properties.name,
            "mem_get_info": lambda device=None: (TOTAL_BYTES - self.live_bytes, TOTAL_BYTES),
            "memory_allocated": lambda device=None: self.live_bytes,
            "memory_reserved": lambda device=None: self.live_bytes,
            "max_memory_allocated": lambda device=None: self.largest_bytes,
            "reset_peak_memory_stats": lambda device=None: setattr(self, "largest_bytes", self.live_bytes),
            "empty_cache": lambda: None,
            "set_per_process_memory_fraction": lambda fraction, device=None: None,
            "manual_seed_all": lambda seed: None,
            "synchronize": lambda device=None: self.wait("synchronize"),
            "is_bf16_supported": lambda *_, **__: self.amd or self.capability >= 80,
            "get_rng_state": lambda device="cuda": torch.zeros(16, dtype=torch.uint8),
            "set_rng_state": lambda state, device="cuda": None,
            "Stream": stream,
            "Event": stream,
            "current_stream": lambda device=None: only,
            "stream": lambda stream: contextlib.nullcontext(),
        }

    def run(self, case: Callable[[], Any]) -> Report:
        self.report = Report()
        self.start()
        partitions = [
            (module, "partition", self.partition)
            for name, module in list(sys.modules.items())
            if name.startswith("grpo_kernels.") and hasattr(module, "partition")
        ]
        # As FakeTensorMode sets it, so that `torch.tensor` makes its result on the CPU first.
        lifted = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        with contextlib.ExitStack() as stack:
            stack.callback(torch._C._set_only_lift_cpu_tensors, lifted)
            for replaced in partitions:
                stack.enter_context(_replaced(*replaced))
            stack.enter_context(Rules(self))
            try:
                self.report.returned = case()
            except Exception as error:
                where = " < ".join(
                    f"{Path(frame.filename).name}:{frame.lineno}"
                    for frame in traceback.extract_tb(error.__traceback__)[:-9:-1]
                )
                self.report.error = f"{type(error).__name__}: {error} (at {where})"
        return self.report

    def start(self) -> None:
        """What is allocated now does not count towards the case's peak, nor what the host has waited for."""
        self._forget_freed()
        if self.live_bytes:
            # What is left may be part of a cycle.
            gc.collect()
            self._forget_freed()
        self.base_bytes, self.report.peak_bytes = self.live_bytes, 0
        self.report.waits, self.report.places = {}, {}
        self.largest_bytes = self.live_bytes

    def wait(self, name: str) -> None:
        self.report.waits[name] = self.report.waits.get(name, 0) + 1
        # The innermost of our own lines.
        own = (f for f in reversed(traceback.extract_stack()) if re.search("/grpo_(fast|kernels)/", f.filename))
        place = next((f"{Path(frame.filename).name}:{frame.lineno}" for frame in own), "elsewhere")
        self.report.places[place] = self.report.places.get(place, 0) + 1

    def allocate(self, tensor: Tensor) -> None:
        """Count a tensor's storage, if it is new, and no longer those that are gone."""
        if tensor.device.type != "cuda":
            return
        storage = tensor.untyped_storage()
        known = self._storages.get(storage._cdata)
        # A weak reference keeps the address taken, so it is the same storage unless that is gone.
        if known is not None and not known[0].expired():
            return
        self._forget_freed()
        size = storage.nbytes()
        self._storages[storage._cdata] = StorageWeakRef(storage), size
        self.live_bytes += size
        self.largest_bytes = max(self.largest_bytes, self.live_bytes)
        self.report.peak_bytes = max(self.report.peak_bytes, self.live_bytes - self.base_bytes)

    def _forget_freed(self) -> None:
        for key, (reference, size) in list(self._storages.items()):
            if reference.expired():
                del self._storages[key]
                self.live_bytes -= size

    def pin(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        self._pinned[storage._cdata] = StorageWeakRef(storage)
        return tensor

    def is_pinned(self, tensor: Tensor) -> bool:
        """Whether a tensor on the CPU is in memory from which copies are asynchronous."""
        known = self._pinned.get(tensor.untyped_storage()._cdata)
        return known is not None and not known.expired()

    def partition(self, category: Tensor, count: int) -> list[Tensor]:
        """`grpo_kernels._passes.partition`, with `active_share` of the rows in category 0 and the rest in 1."""
        if category.device.type == "cuda":
            torch.argsort(category, stable=True)
            self.wait("partition")
        rows = torch.arange(category.numel(), device=category.device)
        first = max(int(category.numel() * self.active_share), 1)
        return [rows[:first], rows[first:], *[rows[:0]] * (count - 2)][:count]

    def driver(self) -> Any:
        from triton.backends.compiler import GPUTarget

        amd, capability = self.amd, self.capability
        utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": SHARED_BYTES[self.architecture]},
            load_binary=lambda name, kernel, shared, device: (None, None, 0, 0, 1024),
        )
        target = GPUTarget("hip", self.architecture, 64) if amd else GPUTarget("cuda", capability, 32)
        return SimpleNamespace(
            get_current_target=lambda: target,
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
            get_active_torch_device=lambda: torch.device("cuda", 0),
            get_device_interface=lambda: torch.cuda,
            map_python_to_cpp_type=lambda kind: kind,
            launcher_cls=lambda source, metadata: lambda *arguments: None,
            utils=utils,
        )

    def recorded(self, run: Callable) -> Callable:
        from triton.runtime.errors import OutOfResources

        def recorded_run(kernel, *arguments, grid, warmup=False, **options):
            bound = dict(zip(kernel.arg_names, arguments, strict=False)) | options
            for name, value in bound.items():
                if isinstance(value, Tensor):
                    assert value.device.type == "cuda", f"{kernel.__name__}: {name} is on {value.device}"
            (programs,) = grid
            assert 0 < programs < 2**31, f"{kernel.__name__}: grid {grid}"
            compiled = run(kernel, *arguments, grid=grid, warmup=True, **options)
            launch = _launch(kernel, compiled, programs)
            try:
                # As a launch does it: Triton compares the compiled kernel's needs with the device's limits.
                compiled.run(*grid, 1, 1, 0, None, None, None, None, None)
            except OutOfResources:
                self.report.refused.append(launch)
                raise
            self.report.launches.append(launch)
            return compiled

        return recorded_run


def _launch(kernel: Any, compiled: Any, programs: int) -> Launch:
    source, metadata = compiled.src, compiled.metadata
    program = compiled.asm.get("ptx") or compiled.asm["amdgcn"]
    names = list(source.signature)
    divisible = [
        names[path[0]] for path, values in source.attrs.items() if any(v[0] == "tt.divisibility" for v in values)
    ]
    constants = {names[path[0]]: str(value) for path, value in source.constants.items()}
    instruction = re.search(r"\b(wgmma|tcgen05\.mma|mma|v_mfma)[._]", program)
    return Launch(
        kernel.__name__, programs, {name: str(kind) for name, kind in source.signature.items()}, divisible, constants,
        metadata.num_warps, metadata.num_stages, metadata.shared, instruction and instruction[1], _vectors(program),
    )  # fmt: skip


# What AMD's names of instructions call 2 to 16 bytes; 4 bytes are a dword.
AMD_BYTES = {"ushort": 2, "short": 2, "dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16}
AMD_ACCESS = re.compile(r"\b(?:global|buffer)_(load|store)_(dword(?:x\d)?|u?short)\b")


def _vectors(program: str) -> dict[str, dict[int, int]]:
    """Bytes of each global load and store in the text of a program, and how many instructions have them."""
    found: dict[str, Counter] = {"ld": Counter(), "st": Counter()}
    for kind, vector, bits in re.findall(
        r"\b(ld|st)\.global(?:\.[a-z]\w*(?:::\w+)*)*?(?:\.v(\d))?\.[bfsu](\d+)", program
    ):
        found[kind][int(vector or 1) * int(bits) // 8] += 1
    for size in re.findall(r"\bcp\.async\.c[ag]\.shared\.global(?:\.\S+)? .*?, 0x([0-9a-f]+)", program):
        found["ld"][int(size, 16)] += 1
    for kind, size in AMD_ACCESS.findall(program):
        found["ld" if kind == "load" else "st"][AMD_BYTES[size]] += 1
    return {kind: dict(sizes) for kind, sizes in found.items()}
