"""Run the real launch paths for a GPU without a GPU: what would a first launch on it refuse, wait for or hold?

Tensors are torch's fake ones on "cuda": they have shapes, dtypes and strides, but no data. Each kernel launch goes
through Triton's own binder, specialisation and compiler for the chosen architecture and through Triton's check of
shared memory; only the launch itself is left out. A dispatch mode holds torch's operations to the rules of CUDA that
fake tensors do not know, counts waits of the host for the device, and measures live bytes.

In a test (see `test_fake_cuda.py`):

    reports = run_cases(SCRIPT, guard_library, "sm_90", "scoring", "loss")   # {case: Report}

and the script, which runs in a process of its own, since kernels are interpreted in the tests' process:

    from support.fake_cuda import main
    ...
    if __name__ == "__main__":
        main({"scoring": scoring, "loss": loss})    # functions without arguments
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

GUARD = os.environ.get("FAKE_CUDA_GUARD")
if GUARD:
    _libraries = Path(importlib.util.find_spec("torch").origin).parent / "lib"
    for _name in ("libc10.so", "libtorch_cpu.so", GUARD):
        ctypes.CDLL(str(_libraries / _name), ctypes.RTLD_GLOBAL)

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode  # noqa: E402
from torch.multiprocessing.reductions import StorageWeakRef  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

KIB = 1 << 10
# Shared memory that one program may use, in bytes (CUDA C++ Programming Guide, "Technical Specifications per Compute
# Capability"), and a usual number of processors.
SHARED_BYTES = {
    "sm_75": 64 * KIB, "sm_80": 163 * KIB, "sm_86": 99 * KIB, "sm_89": 99 * KIB, "sm_90": 227 * KIB,
    "sm_100": 227 * KIB, "sm_120": 99 * KIB,
}  # fmt: skip
PROCESSORS = {"sm_75": 40, "sm_80": 108, "sm_86": 84, "sm_89": 128, "sm_90": 132, "sm_100": 148, "sm_120": 170}
TOTAL_BYTES = 80 << 30

aten = torch.ops.aten


@dataclass
class Launch:
    """One launch of a Triton kernel.

    Attributes:
        signature: Triton's types of the arguments: ``"*bf16"``, ``"i32"``, ``"tensordesc<fp16[128, 64]>"``, ...
        divisible: arguments that the kernel was specialised for as multiples of 16.
        shared: bytes of shared memory; None if the kernel was not compiled.
        constants: compile-time arguments as text.
        vectors: bytes of each global load and store instruction in the PTX, with their number.
    """

    kernel: str
    programs: int
    signature: dict[str, str]
    divisible: list[str]
    constants: dict[str, str]
    warps: int
    stages: int
    shared: int
    tensor_instruction: str | None
    vectors: dict[str, dict[int, int]]


@dataclass
class Report:
    """What a case did on the fake GPU.

    Attributes:
        refused: launches that Triton refused for lack of shared memory, whether or not the caller went on.
        waits: for each kind of operation for which the host waits for the device, how often.
        peak_bytes: the most that was allocated at once, beyond what was at the case's start (see `start`).
        products: for each matrix product (name, dtypes, result) its flops.
        moved_bytes: for each of torch's other operations the bytes of its inputs and results.
        error: the exception that ended the case, or None.
    """

    launches: list[Launch] = field(default_factory=list)
    refused: list[Launch] = field(default_factory=list)
    waits: dict[str, int] = field(default_factory=dict)
    peak_bytes: int = 0
    products: dict[str, int] = field(default_factory=dict)
    moved_bytes: dict[str, int] = field(default_factory=dict)
    returned: Any = None
    error: str | None = None

    def of(self, kernel: str) -> list[Launch]:
        return [launch for launch in self.launches if launch.kernel == kernel]


# In the tests' process.

# The guard is loaded before anything else imports torch, which looks for a GPU only once.
RUN = """
import runpy, sys
import support.fake_cuda
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def build_guard(folder: Path) -> Path | str:
    """Compile the guard library into `folder`; where that is not possible, say why."""
    compiler = shutil.which("g++")
    if compiler is None:
        return "fake CUDA needs g++"
    if not sys.platform.startswith("linux"):
        return "fake CUDA needs Linux"
    if torch.version.cuda or torch.version.hip:
        return "fake CUDA needs a build of torch without CUDA"
    root, library = Path(torch.__file__).parent, folder / "fake_cuda_guard.so"
    source = Path(__file__).with_name("fake_cuda_guard.cpp")
    command = [compiler, "-std=c++20", "-shared", "-fPIC", f"-I{root / 'include'}", str(source), "-o", str(library)]
    command += [f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return library if done.returncode == 0 else f"fake CUDA does not compile: {done.stderr.strip()[-300:]}"


def run_cases(
    script: Path, guard: Path, architecture: str, *cases: str, environment: dict[str, str] | None = None
) -> dict[str, Report]:
    """The reports of cases (all, if none is named) of a script that calls `main`, in a process of its own."""
    here = Path(__file__).parents[1]
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    own = {
        "FAKE_CUDA_GUARD": str(guard),
        # Programs that ptxas has not seen must not get into the user's cache.
        "TRITON_CACHE_DIR": str(guard.parent / "triton"),
        "PYTHONPATH": os.pathsep.join([str(here.parent / "kernels"), str(here.parent), str(here)]),
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", RUN, str(script), architecture, *cases],
        env={**inherited, **own, **(environment or {})}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    reports = {}
    for name, fields in json.loads(done.stdout.splitlines()[-1]).items():
        fields |= {kind: [Launch(**launch) for launch in fields[kind]] for kind in ("launches", "refused")}
        for launch in fields["launches"] + fields["refused"]:
            # JSON's keys are text.
            launch.vectors = {kind: {int(size): n for size, n in v.items()} for kind, v in launch.vectors.items()}
        reports[name] = Report(**fields)
    return reports


# In the script's process.


def main(cases: dict[str, Callable[[], Any]]) -> None:
    """The script's part of `run_cases`: run the cases and print their reports as a line of JSON.

    What a case returns must fit into JSON and becomes `Report.returned`. A case that raises ends with `Report.error`.
    """
    architecture, *names = sys.argv[1:]
    with installed(architecture) as gpu:
        print(json.dumps({name: asdict(gpu.run(cases[name])) for name in names or cases}), flush=True)
    # Autograd's thread for the device would be torn down by hooks that the fake ones lack.
    os._exit(0)


@contextlib.contextmanager
def installed(architecture: str) -> Iterator[FakeGPU]:
    """Within it torch and Triton find one GPU of `architecture`, on which :meth:`FakeGPU.run` runs things."""
    import triton
    from triton.runtime.jit import JITFunction

    assert GUARD, "set FAKE_CUDA_GUARD to the library of build_guard()"
    assert os.environ.get("TRITON_INTERPRET") != "1", "kernels are interpreted in this process"
    gpu = FakeGPU(architecture)
    properties = SimpleNamespace(
        name=f"fake {architecture}", major=gpu.capability // 10, minor=gpu.capability % 10, total_memory=TOTAL_BYTES,
        multi_processor_count=PROCESSORS[architecture], gcnArchName=architecture,
        shared_memory_per_block_optin=SHARED_BYTES[architecture], L2_cache_size=50 << 20, warp_size=32,
    )  # fmt: skip
    replaced = [
        (torch.cuda, "is_available", lambda: True),
        (torch.cuda, "is_initialized", lambda: True),
        (torch.cuda, "device_count", lambda: 1),
        (torch.cuda, "current_device", lambda: 0),
        (torch.cuda, "device", lambda device: contextlib.nullcontext()),
        (torch.cuda, "get_device_properties", lambda device=None: properties),
        (torch.cuda, "get_device_capability", lambda device=None: (properties.major, properties.minor)),
        (torch.cuda, "get_device_name", lambda device=None: properties.name),
        (torch.cuda, "mem_get_info", lambda device=None: (TOTAL_BYTES - gpu.live_bytes, TOTAL_BYTES)),
        (torch.cuda, "memory_allocated", lambda device=None: gpu.live_bytes),
        (torch.cuda, "memory_reserved", lambda device=None: gpu.live_bytes),
        (torch.cuda, "synchronize", lambda device=None: gpu.wait("synchronize")),
        (torch.cuda, "is_bf16_supported", lambda *_, **__: gpu.capability >= 80),
        (torch.cuda.amp.common, "amp_definitely_not_available", lambda: False),
        (FakeTensor, "data_ptr", address),
        (FakeTensor, "tolist", gpu.tolist),
        (triton.runtime.driver, "_active", gpu.driver()),
        (JITFunction, "run", gpu.recorded(JITFunction.run)),
        (triton.backends.backends["nvidia"].compiler, "make_cubin", lambda *_: b"not assembled"),
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


class FakeGPU:
    """One GPU that compiles what is launched on it, and runs nothing.

    Attributes:
        active_share: which part of the rows `grpo_kernels._passes.partition` finds in its first category.
        report: that of the case that runs.
    """

    active_share = 1.0

    def __init__(self, architecture: str):
        self.architecture, self.capability = architecture, int(architecture.removeprefix("sm_"))
        self.live_bytes = self.base_bytes = 0
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.report = Report()

    def run(self, case: Callable[[], Any]) -> Report:
        self.report = Report()
        self.start()
        partitions = [
            (module, "partition", self.partition)
            for name, module in list(sys.modules.items())
            if name.startswith("grpo_kernels.") and hasattr(module, "partition")
        ]
        with contextlib.ExitStack() as stack:
            for replaced in partitions:
                stack.enter_context(_replaced(*replaced))
            stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
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
        """What is allocated now does not count towards the case's peak."""
        self._forget_freed()
        if self.live_bytes:
            # What is left may be part of a cycle.
            gc.collect()
            self._forget_freed()
        self.base_bytes, self.report.peak_bytes = self.live_bytes, 0

    def wait(self, name: str) -> None:
        self.report.waits[name] = self.report.waits.get(name, 0) + 1

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
        self.report.peak_bytes = max(self.report.peak_bytes, self.live_bytes - self.base_bytes)

    def _forget_freed(self) -> None:
        for key, (reference, size) in list(self._storages.items()):
            if reference.expired():
                del self._storages[key]
                self.live_bytes -= size

    def tolist(self, tensor: Tensor) -> Any:
        self.wait("tolist")
        raise RuntimeError("a fake tensor has no values: replace what reads them, as FakeGPU.partition does")

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

        utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": SHARED_BYTES[self.architecture]},
            load_binary=lambda name, kernel, shared, device: (None, None, 0, 0, 1024),
        )
        return SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", self.capability, 32),
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
    source, metadata, ptx = compiled.src, compiled.metadata, compiled.asm["ptx"]
    names = list(source.signature)
    divisible = [
        names[path[0]] for path, values in source.attrs.items() if any(v[0] == "tt.divisibility" for v in values)
    ]
    constants = {names[path[0]]: str(value) for path, value in source.constants.items()}
    instruction = re.search(r"\b(wgmma|tcgen05\.mma|mma)\.", ptx)
    return Launch(
        kernel.__name__, programs, {name: str(kind) for name, kind in source.signature.items()}, divisible, constants,
        metadata.num_warps, metadata.num_stages, metadata.shared, instruction and instruction[1], _vectors(ptx),
    )  # fmt: skip


def _vectors(ptx: str) -> dict[str, dict[int, int]]:
    """Bytes of each global load and store in the text of a program, and how many instructions have them."""
    found: dict[str, Counter] = {"ld": Counter(), "st": Counter()}
    for kind, vector, bits in re.findall(r"\b(ld|st)\.global(?:\.[a-z]\w*(?:::\w+)*)*?(?:\.v(\d))?\.[bfsu](\d+)", ptx):
        found[kind][int(vector or 1) * int(bits) // 8] += 1
    for size in re.findall(r"\bcp\.async\.c[ag]\.shared\.global(?:\.\S+)? .*?, 0x([0-9a-f]+)", ptx):
        found["ld"][int(size, 16)] += 1
    return {kind: dict(sizes) for kind, sizes in found.items()}


PRODUCTS = {getattr(packet, name) for packet in (aten.mm, aten.addmm, aten.bmm) for name in packet.overloads()}
MIXED = (aten.mm.dtype, aten.mm.dtype_out, aten.addmm.dtype, aten.addmm.dtype_out)
HALF = (torch.float16, torch.bfloat16)


class Rules(TorchDispatchMode):
    """Answers for the values that fake tensors lack, holds products to CUDA's rules, and counts."""

    def __init__(self, gpu: FakeGPU):
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = str(func).removeprefix("aten.")
        out = self._answer(func, name, args, kwargs)
        tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)]
        for tensor in tensors:
            self.gpu.allocate(tensor)
        if func not in PRODUCTS and not func.is_view:
            moved = sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor.device.type == "cuda")
            self.gpu.report.moved_bytes[name] = self.gpu.report.moved_bytes.get(name, 0) + moved
        return out

    def _answer(self, func: Any, name: str, args: tuple, kwargs: dict) -> Any:
        on_gpu = any(isinstance(leaf, Tensor) and leaf.device.type == "cuda" for leaf in tree_leaves((args, kwargs)))
        if not on_gpu:
            return func(*args, **kwargs)
        if func is aten._local_scalar_dense.default:
            self.gpu.wait("item")
            return 1 if not args[0].is_floating_point() else 1.0
        if func in (aten.nonzero.default, aten.masked_select.default):
            # As if every element were chosen.
            self.gpu.wait(name)
            shape = (args[0].numel(), args[0].dim()) if func is aten.nonzero.default else (args[0].numel(),)
            dtype = torch.int64 if func is aten.nonzero.default else args[0].dtype
            return torch.empty(shape, dtype=dtype, device=args[0].device)
        if func is aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1]):
            self.gpu.wait("index by a mask")
            every = [None if i is None else torch.arange(i.numel(), device=args[0].device) for i in args[1]]
            return func(args[0], every)
        if func in (aten._to_copy.default, aten.copy_.default):
            devices = {leaf.device.type for leaf in (*args, kwargs.get("device")) if hasattr(leaf, "device")}
            target = torch.device(kwargs["device"]).type if kwargs.get("device") is not None else None
            if target == "cpu" or (func is aten.copy_.default and args[0].device.type == "cpu" and "cuda" in devices):
                self.gpu.wait("copy to the CPU")
        if func in MIXED:
            return self._mixed_product(func, name, args, kwargs)
        if func in PRODUCTS:
            self._product(func, name, args, kwargs)
        return func(*args, **kwargs)

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
