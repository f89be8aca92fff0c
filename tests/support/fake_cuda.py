"""Run the real launch paths for a GPU without a GPU: what would a first launch on it refuse, wait for or hold?

Tensors are torch's fake ones on "cuda": they have shapes, dtypes and strides, but no data. Each kernel launch goes
through Triton's own binder, specialisation and compiler for the chosen architecture and through Triton's check of
shared memory; only the launch itself is left out (`fake_gpu`). A dispatch mode holds torch's operations to the rules
of CUDA that fake tensors do not know, counts waits of the host for the device, and measures live bytes (`fake_rules`).

In a test (see `test_fake_cuda.py`):

    reports = run_cases(SCRIPT, guard_library, "sm_90", "scoring", "loss")   # {case: Report}

and the script, which runs in a process of its own, since kernels are interpreted in the tests' process:

    from support.fake_cuda import main
    ...
    if __name__ == "__main__":
        main({"scoring": scoring, "loss": loss})    # functions without arguments
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

GUARD = os.environ.get("FAKE_CUDA_GUARD")
if GUARD:
    _libraries = Path(importlib.util.find_spec("torch").origin).parent / "lib"
    for _name in ("libc10.so", "libtorch_cpu.so", GUARD):
        ctypes.CDLL(str(_libraries / _name), ctypes.RTLD_GLOBAL)


import torch  # noqa: E402

KIB = 1 << 10
# Shared memory that one program may use, in bytes (CUDA C++ Programming Guide, "Technical Specifications per Compute
# Capability"; 64 KiB of LDS on CDNA), and a usual number of processors.
SHARED_BYTES = {
    "sm_75": 64 * KIB, "sm_80": 163 * KIB, "sm_86": 99 * KIB, "sm_89": 99 * KIB, "sm_90": 227 * KIB,
    "sm_100": 227 * KIB, "sm_120": 99 * KIB, "gfx942": 64 * KIB,
}  # fmt: skip
PROCESSORS = {
    "sm_75": 40, "sm_80": 108, "sm_86": 84, "sm_89": 128, "sm_90": 132, "sm_100": 148, "sm_120": 170, "gfx942": 304,
}  # fmt: skip


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
        places: the same for each line of ours that waits, ``"file:line"``.
        peak_bytes: the most that was allocated at once, beyond what was at the case's start (see `start`).
        products: for each matrix product (name, dtypes, result) its flops.
        moved_bytes: for each of torch's other operations the bytes of its inputs and results.
        error: the exception that ended the case, or None.
    """

    launches: list[Launch] = field(default_factory=list)
    refused: list[Launch] = field(default_factory=list)
    waits: dict[str, int] = field(default_factory=dict)
    places: dict[str, int] = field(default_factory=dict)
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
        # A Triton on PYTHONPATH comes before the installed one.
        "PYTHONPATH": os.pathsep.join(
            [*filter(None, [os.environ.get("PYTHONPATH")]), str(here.parent / "kernels"), str(here.parent), str(here)]
        ),
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
    from support.fake_gpu import installed

    architecture, *names = sys.argv[1:]
    with installed(architecture) as gpu:
        print(json.dumps({name: asdict(gpu.run(cases[name])) for name in names or cases}), flush=True)
    # Autograd's thread for the device would be torn down by hooks that the fake ones lack.
    os._exit(0)
