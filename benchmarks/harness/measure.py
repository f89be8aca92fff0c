"""What every benchmark shares: timing, peak memory, the machine's name, CSV tables and the command line."""

from __future__ import annotations

import argparse
import csv
import ctypes
import datetime
import gc
import importlib
import importlib.metadata
import math
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import linear_regression
from typing import Any

import torch

from grpo_fast.errors import UserError, one_line

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
# Runs with --quick only show that a benchmark works; their results are kept apart from the measured ones.
QUICK_RESULTS = ROOT / "runs" / "benchmarks"
PROC = Path("/proc/self")
MIB = 1 << 20


@dataclass
class Times:
    """Seconds of each repeat of one call."""

    seconds: list[float] = field(default_factory=list)

    def quantile(self, q: float) -> float:
        """The quantile, interpolated linearly between repeats; NaN without any."""
        if not self.seconds:
            return math.nan
        return torch.tensor(self.seconds, dtype=torch.float64).quantile(q).item()

    @property
    def median(self) -> float:
        return self.quantile(0.5)

    def columns(self) -> dict[str, Any]:
        """Columns of a row: median, p20 and p80 in seconds, and the number of repeats."""
        quantiles = {"seconds": self.median, "seconds_p20": self.quantile(0.2), "seconds_p80": self.quantile(0.8)}
        return {**quantiles, "repeats": len(self.seconds)}


@dataclass
class Measured:
    """Times of one call, its peak memory (bytes beyond those in use before it), and why it failed, if it did."""

    times: Times = field(default_factory=Times)
    peak_bytes: float = math.nan
    failure: str | None = None


class Deadline:
    """The time after which no new work is started; never without `seconds`."""

    def __init__(self, seconds: float | None = None):
        self.end = math.inf if seconds is None else time.perf_counter() + seconds

    @property
    def left(self) -> float:
        return self.end - time.perf_counter()

    def within(self, seconds: float | None) -> Deadline:
        """A deadline in `seconds` from now, but no later than this one."""
        return Deadline(min(self.left, math.inf if seconds is None else seconds))


def seconds_of(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call, by CUDA events on a GPU and by the wall clock elsewhere, without freeing its result."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        result = call()
        end.record()
        torch.cuda.synchronize(device)
        seconds = start.elapsed_time(end) / 1e3
    else:
        begin = time.perf_counter()
        result = call()
        seconds = time.perf_counter() - begin
    del result
    return seconds


# A call this many times slower than the fastest gets only the required repeats.
SLOW = 4.0


def interleave(
    calls: dict[str, Callable[[], Any]],
    device: torch.device,
    repeats: int = 5,
    least: int = 3,
    deadline: Deadline | None = None,
    before: Callable[[], Any] | None = None,
) -> dict[str, Measured]:
    """Time all calls in turn: `repeats` rounds with one of each, and each round starts with the next one.

    No round starts after the deadline once there have been `least` rounds, and a call that takes `SLOW` times as long
    as the fastest takes part in only these. The first round also measures the peak memory. A call that raises is not
    repeated, and its failure is recorded. `before` runs untimed ahead of each call.
    """
    measured = {name: Measured() for name in calls}
    deadline = deadline or Deadline()
    slowest = 0.0
    for number in range(repeats):
        if number >= least and deadline.left < slowest:
            break
        begin = time.perf_counter()
        fastest = min((entry.times.median for entry in measured.values() if entry.times.seconds), default=math.inf)
        names = [name for name in calls if number < least or measured[name].times.median < SLOW * fastest]
        shift = number % len(names) if names else 0
        for name in names[shift:] + names[:shift]:
            entry = measured[name]
            if entry.failure:
                continue
            if before is not None:
                before()
            try:
                if number == 0:
                    with peak_memory(device) as peak:
                        seconds = seconds_of(calls[name], device)
                    entry.peak_bytes = peak.bytes
                else:
                    seconds = seconds_of(calls[name], device)
                entry.times.seconds.append(seconds)
            except Exception as error:
                entry.failure = describe_failure(error)
                release(device)
        slowest = max(slowest, time.perf_counter() - begin)
    return measured


def describe_failure(error: Exception) -> str:
    """``out of memory``, or the exception's type and message, in one line."""
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        return "out of memory"
    return f"{type(error).__name__}: {one_line(error, 160)}"


def release(device: torch.device) -> None:
    """Return freed memory to the system, so that the next contender starts from the same state."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif sys.platform == "linux":
        # glibc keeps freed blocks below 32 MiB, which would hide the next call's use of them.
        ctypes.CDLL(None).malloc_trim(0)


class Peak:
    """The result of :func:`peak_memory`, set at the end of its block; NaN if it cannot be read."""

    bytes: float = math.nan


def _status(name: str) -> int:
    for line in (PROC / "status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(name)


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Peak bytes within the block beyond those in use at its start.

    On a GPU, those in torch's allocator; on a CPU, the resident memory of the process (Linux), including the BLAS
    library's workspaces.
    """
    peak = Peak()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        start = torch.cuda.memory_allocated(device)
        yield peak
        torch.cuda.synchronize(device)
        peak.bytes = torch.cuda.max_memory_allocated(device) - start
    elif (PROC / "clear_refs").exists():
        release(device)
        start = _status("VmRSS")
        (PROC / "clear_refs").write_text("5")
        yield peak
        peak.bytes = _status("VmHWM") - start
    else:
        yield peak


def available_bytes(device: torch.device) -> float:
    """Free memory; infinite if it cannot be read."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    info = Path("/proc/meminfo")
    if not info.exists():
        return math.inf
    return next(int(line.split()[1]) * 1024 for line in info.read_text().splitlines() if line.startswith("MemAvail"))


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def cpu_name() -> str:
    """The processor's name without trademarks, clock rate and number of cores."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = named[0] if named else platform.processor() or platform.machine()
    return " ".join(re.sub(r"\((R|TM)\)|@.*|\bCPU\b|\bProcessor\b|\d+-Core", " ", name).split())


def device_name(device: torch.device) -> str:
    """``NVIDIA H200``, or ``CPU 2 cores AMD EPYC`` with the number of threads in use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU {threads} {'core' if threads == 1 else 'cores'} {cpu_name()}"


def missing(module: str, package: str) -> str | None:
    """Why a module cannot be imported, in one line with the pip command that installs it; None if it can."""
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        return f"{error.name} is not installed; install it with: pip install {package}"
    except Exception as error:
        return f"{module} cannot be imported: {describe_failure(error)}"
    return None


def require(module: str, package: str) -> Any:
    """The module; raises UserError with the pip command if it is not installed."""
    if reason := missing(module, package):
        raise UserError(reason)
    return importlib.import_module(module)


def version(package: str | None) -> str:
    """A distribution's version; empty if it is not installed."""
    try:
        return importlib.metadata.version(package) if package else ""
    except importlib.metadata.PackageNotFoundError:
        return ""


def git_commit() -> str:
    """The checkout's commit, with ``+`` if tracked files outside the results differ from it; empty without git."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        commit = git("rev-parse", "--short=10", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    except OSError:
        return ""
    return commit + ("+" if commit and changed else "")


@dataclass
class Run:
    """One run of a benchmark: its device, its time limit and where its rows go."""

    device: torch.device
    quick: bool = False
    repeats: int | None = None
    minutes: float | None = None
    output: Path | None = None
    commit: str = ""
    deadline: Deadline = field(default_factory=Deadline)

    @property
    def folder(self) -> Path:
        base = self.output or (QUICK_RESULTS if self.quick else RESULTS)
        return base / slug(device_name(self.device))

    def table(self, name: str, key: tuple[str, ...]) -> Table:
        """This device's CSV called `name`, in which a row replaces the one with the same `key` columns."""
        return Table(self.folder / f"{name}.csv", key, self.facts())

    def facts(self) -> dict[str, str]:
        return {
            "device": device_name(self.device),
            "torch": torch.__version__,
            "triton": version("triton"),
            "commit": self.commit,
            "date": datetime.date.today().isoformat(),
        }

    def share(self, minutes: float) -> Run:
        """The same run with at most `minutes` from now on."""
        return replace(self, minutes=minutes, deadline=self.deadline.within(60 * minutes))

    def out_of_time(self, what: str) -> bool:
        """Whether the deadline has passed, in which case `what` is reported as left out."""
        if self.deadline.left > 0:
            return False
        print(f"{what}: left out for lack of time", flush=True)
        return True


class Table:
    """A CSV that is rewritten completely for every row, so that a run that is killed loses none."""

    def __init__(self, path: Path, key: tuple[str, ...], facts: dict[str, str]):
        self.path, self.key, self.facts = path, key, facts
        self.rows = read_csv(path) if path.exists() else []

    def add(self, row: dict[str, Any]) -> None:
        written = {name: format_value(value) for name, value in {**row, **self.facts}.items()}
        mine = [written.get(name, "") for name in self.key]
        self.rows = [old for old in self.rows if [old.get(name, "") for name in self.key] != mine] + [written]
        columns = list(dict.fromkeys(name for old in [written, *self.rows] for name in old))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".csv.part")
        with partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows)
        partial.replace(self.path)


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def format_value(value: Any) -> str:
    """Floats with four significant digits (the rest is noise); empty for None and NaN."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() and abs(value) < 2**53 else f"{value:.4g}"
    return str(value)


def fit_exponent(x: list[float], y: list[float]) -> float:
    """The ``k`` of ``y = c x^k`` by least squares in the logarithms; NaN with fewer than two points above 0."""
    points = [(math.log(a), math.log(b)) for a, b in zip(x, y, strict=True) if a > 0 and b > 0]
    return linear_regression(*zip(*points, strict=True)).slope if len(dict(points)) > 1 else math.nan


def parser(description: str) -> argparse.ArgumentParser:
    """The options of every benchmark."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    made.add_argument("--quick", action="store_true", help="tiny sizes, to check that it runs; results go to runs/")
    made.add_argument("--repeats", type=int, help="rounds of repeats")
    made.add_argument("--minutes", type=float, help="start nothing new after this many minutes")
    made.add_argument("--threads", type=int, help="CPU threads (default: all, at most 2)")
    made.add_argument("--output", type=Path, help="folder for the results (default: benchmarks/results)")
    made.add_argument("--commit", default="", help="commit to record if there is no git checkout")
    return made


def pick(option: str, names: str | None, known: Iterable[str]) -> list[str]:
    """The names in a comma-separated list, or all known ones without a list.

    Raises:
        UserError: a name is unknown.
    """
    known = list(known)
    picked = [name.strip() for name in names.split(",")] if names else known
    for name in picked:
        if name not in known:
            raise UserError(f"--{option}: {name!r} is unknown; use one of {', '.join(known)}")
    return picked


def start(arguments: argparse.Namespace) -> Run:
    """Check the shared options and set up the device."""
    name = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device={name!r} is not a device; use cpu or cuda") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device={name!r} is not measured here; use cpu or cuda")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError("--device=cuda: torch sees no CUDA device; use --device=cpu")
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    for option in ("repeats", "minutes", "threads"):
        value = getattr(arguments, option)
        if value is not None and not value > 0:
            raise UserError(f"--{option}={value} is not allowed: it must be above 0")
    if device.type == "cpu":
        torch.set_num_threads(arguments.threads or min(os.cpu_count() or 1, 2))
    torch.manual_seed(0)
    return Run(
        device, arguments.quick, arguments.repeats, arguments.minutes, arguments.output,
        arguments.commit or git_commit(),
        Deadline(None if arguments.minutes is None else 60 * arguments.minutes),
    )  # fmt: skip


def main(body: Callable[[], None]) -> None:
    """Run a benchmark's `body`. An error that the user can correct ends in one line and status 2."""
    try:
        body()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("stopped; the rows so far are written", file=sys.stderr)
        raise SystemExit(130) from None


def show_seconds(seconds: float) -> str:
    if math.isnan(seconds):
        return "-"
    if seconds >= 0.1:
        return f"{seconds:.2f} s"
    return f"{1e3 * seconds:.3g} ms" if seconds >= 1e-4 else f"{1e6 * seconds:.3g} us"


def show_bytes(size: float) -> str:
    if math.isnan(size):
        return "-"
    return f"{size / MIB:,.0f} MiB" if size < 10240 * MIB else f"{size / 1024 / MIB:,.1f} GiB"
