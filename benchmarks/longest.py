"""How long can an answer be? The longest that trains one optimizer step under a memory cap, in ours and TRL's trainer.

    python -m benchmarks.longest [--caps 24,48,80,139] [--contenders "grpo-fast,TRL"] [--minutes 9] [--again]

Qwen3-8B with random weights, LoRA of rank 16 and 8 answers of equal length to one prompt. Each contender runs under
each cap in a process of its own, in which torch may allocate no more than the cap. The length doubles (ours starts near
the planned length) until a trial runs out of memory; bisection then narrows the gap to 5%. During the search, a step
computes one of its 8 microbatches, with all gradients and the optimizer state allocated; if there is time, the longest
answer is then tried in a whole step. Every trial is recorded, so that a search that was stopped can continue.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.measure import (
    Run,
    Table,
    available_bytes,
    format_value,
    main,
    missing,
    parser,
    pick,
    show_bytes,
    show_seconds,
    start,
    version,
)
from benchmarks.harness.process import OutOfTime
from benchmarks.harness.trainers import missing_trl, quiet
from benchmarks.step import OURS, TRL
from benchmarks.trial import GROUP, Job, model_config, planned
from benchmarks.worker import Worker
from grpo_fast.errors import UserError

KEY = ("model", "contender", "cap_gib")
GIB = 1 << 30
CAPS = "24,48,80,139"
# A CPU has no cap; there, the peak of a trial is compared with it.
CPU_CAPS = "0.01"
TOLERANCE = 1.05
LEAST, MOST = 64, 1 << 20
# Lengths whose plans show how the peak grows, on a GPU and on a CPU with the small model.
POINTS = {"cuda": (8192, 32768), "cpu": (512, 2048)}
# A device needs only this share of a cap: an 80 GB device has a little less than 80 GiB.
ALMOST = 0.95


@dataclass(frozen=True)
class Contender:
    """A trainer with fields of our configuration and options of TRL's."""

    name: str
    trainer: str
    fields: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    def job(self, model: str, device: torch.device, cap_bytes: int) -> Job:
        fields, options = dict(self.fields), dict(self.options)
        if device.type == "cpu":
            fields |= {"dtype": "float32", "activation_offloading": False, "bf16": False}
            if self.trainer == TRL:
                options["bf16"] = False
            else:
                fields["max_buffer_mib"] = 1
        elif self.trainer == TRL and missing("flash_attn", "flash-attn") is None:
            fields["attn_implementation"] = "flash_attention_2"
        return Job(self.trainer, model, str(device), fields, options, cap_bytes=cap_bytes)

    def left_out(self, device: torch.device) -> str | None:
        """Why this contender cannot take part, or None."""
        liger, four_bits = self.options.get("use_liger_kernel"), self.fields.get("load_in_4bit")
        if liger and device.type == "cpu":
            return "its kernels need a GPU"
        reason = missing("liger_kernel", "liger-kernel") if liger else None
        reason = reason or (missing("bitsandbytes", "bitsandbytes") if four_bits else None)
        return reason or (missing_trl() if self.trainer == TRL else None)


# With mixed precision, only the adapters need float32 copies.
LEAN = {"tiled_mlp": True, "activation_offloading": True, "bf16": True}
# The leanest settings of TRL: gradient checkpointing, one answer per microbatch, its chunked head and mixed precision.
# Its GRPO trainer does not offload activations.
TRL_LEAN = {"bf16": True}
CONTENDERS = [
    Contender(OURS, OURS, LEAN),
    Contender(f"{OURS} without offloading", OURS, {**LEAN, "activation_offloading": False}),
    Contender(f"{OURS} 4-bit", OURS, {**LEAN, "load_in_4bit": True}),
    Contender(TRL, TRL, options=TRL_LEAN),
    Contender(f"{TRL} Liger", TRL, options={**TRL_LEAN, "use_liger_kernel": True}),
    Contender(f"{TRL} 4-bit", TRL, {"load_in_4bit": True}, {**TRL_LEAN, "use_liger_kernel": True}),
]


@dataclass
class Bounds:
    """The longest answer that is known to fit (0: none) and the shortest that is known not to (None: none)."""

    fits: int = 0
    fails: int | None = None

    def next(self, begin: int, growth: float, tolerance: float = TOLERANCE) -> int | None:
        """The length to try next; None if the bounds are within `tolerance`, or would leave `LEAST` to `MOST`."""
        if self.fails is None:
            length = math.ceil(growth * self.fits) if self.fits else begin
            return min(length, MOST) if self.fits < MOST else None
        if not self.fits:
            length = int(self.fails / growth)
            return length if length >= LEAST else None
        return round(math.sqrt(self.fits * self.fails)) if self.fails > tolerance * self.fits else None

    def add(self, length: int, fits: bool) -> None:
        if fits:
            self.fits = max(length, self.fits)
        else:
            self.fails = min(length, self.fails or length)


def planned_longest(job: Job, tracer: Any) -> int:
    """The longest answer whose planned step, without margins, stays below the cap; 0 if there is none.

    A plan for long answers takes seconds, and the peak grows almost linearly: two plans show roughly where it reaches
    the cap, and a third plan there corrects the estimate.
    """

    def peak(length: int) -> int:
        return sum(planned(job, length, tracer).training.values())

    low, high = POINTS[torch.device(job.device).type]
    slope = (peak(high) - peak(low)) / (high - low)
    length = low
    for _ in range(2):
        length = min(int(length + (job.cap_bytes - peak(max(length, LEAST))) / slope), MOST)
    return max(length, 0)


def host_bytes() -> float:
    """Free host memory, also within a container's limit."""
    free = available_bytes(torch.device("cpu"))
    most, used = (Path(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    if most.exists() and (limit := most.read_text().strip()) != "max":
        free = min(free, int(limit) - int(used.read_text()))
    return free


def search(
    trial: Callable[[int], dict[str, Any]], bounds: Bounds, begin: int, growth: float, report: Callable[[dict], None]
) -> None:
    """Try lengths until the bounds meet, and pass each trial's reply and length to `report`.

    Raises:
        UserError: a trial failed for another reason than memory before any answer fitted.
    """
    while (length := bounds.next(begin, growth)) is not None:
        reply = trial(length)
        if not (reply["fits"] or reply["memory"] or bounds.fits):
            raise UserError(reply["detail"])
        bounds.add(length, reply["fits"])
        report({**reply, "length": length})


def measure_one(run: Run, contender: Contender, model: str, cap: float, table: Table, tracer: Any) -> None:
    """The row of one contender under one cap, written after every trial."""
    job = contender.job(model, run.device, int(cap * GIB))
    row: dict[str, Any] = {
        "model": model, "contender": contender.name, "cap_gib": cap, "group": GROUP,
        "settings": " ".join(f"{name}={value}" for name, value in {**job.fields, **job.options}.items()),
        "peer": f"trl {version('trl')}" if contender.trainer == TRL else "", "transformers": version("transformers"),
    }  # fmt: skip
    if reason := contender.left_out(run.device):
        table.add({**row, "status": "left out", "detail": reason})
        print(f"    {contender.name}: left out: {reason}", flush=True)
        return
    bounds, earlier = Bounds(), find_row(table, row)
    if earlier.get("status") == "stopped":
        fails = earlier.get("too_long_tokens")
        bounds = Bounds(int(earlier["answer_tokens"]), int(fails) if fails else None)
        row |= {name: float(earlier[name]) for name in ("peak_bytes", "seconds") if earlier.get(name)}
    begin, growth = 2048 if run.device.type == "cuda" else 256, 2.0
    if contender.trainer == OURS:
        row["planned_tokens"] = planned_longest(job, tracer)
        begin, growth = max(row["planned_tokens"], LEAST), 1.15
    worker = Worker(job, run.deadline)

    def trial(length: int, whole: bool = False) -> dict[str, Any]:
        host = planned(job, length, tracer).host if contender.trainer == OURS else {}
        if sum(host.values()) > host_bytes():
            return {"fits": False, "memory": True, "detail": "host memory"}
        return worker.trial(length, whole)

    def report(reply: dict[str, Any]) -> None:
        if reply["fits"]:
            row.update(peak_bytes=reply["peak_bytes"], seconds=reply["seconds"])
        else:
            row["detail"] = reply["detail"]
        table.add({**row, **tokens(bounds), "status": "stopped"})
        print(f"    {contender.name}: {reply['length']:,} tokens {show_trial(reply)}", flush=True)

    try:
        search(trial, bounds, begin, growth, report)
        row |= {"status": "ok" if bounds.fits else "failed"}
        if bounds.fits and run.deadline.left > 1.3 * GROUP * row["seconds"]:
            reply = trial(bounds.fits, whole=True)
            row["whole_step"] = "yes" if reply["fits"] else f"no: {reply['detail']}"
            row["whole_step_seconds"] = reply.get("seconds")
    except OutOfTime:
        row.setdefault("status", "stopped")
    except UserError as error:
        row |= {"status": "failed", "detail": str(error)}
    finally:
        worker.stop()
    table.add({**row, **tokens(bounds)})
    expected = f", planned {row['planned_tokens']:,}" if "planned_tokens" in row else ""
    whole = f", as a whole step: {row['whole_step']}" if "whole_step" in row else ""
    print(f"  {contender.name} under {cap:g} GiB: {row['status']}, {bounds.fits:,} tokens{expected}{whole}", flush=True)


def tokens(bounds: Bounds) -> dict[str, int | None]:
    return {"answer_tokens": bounds.fits, "too_long_tokens": bounds.fails}


def show_trial(reply: dict[str, Any]) -> str:
    if reply["fits"]:
        return f"fit: {show_bytes(reply['peak_bytes'])}, {show_seconds(reply['seconds'])}"
    return f"do not: {reply['detail']}"


def find_row(table: Table, row: dict[str, Any]) -> dict[str, str]:
    """The earlier row of the same contender, model and cap; empty if there is none."""
    return next((old for old in table.rows if all(old[name] == format_value(row[name]) for name in KEY)), {})


def run_longest(run: Run, contenders: list[Contender], caps: list[float], again: bool = False) -> None:
    """Measure all contenders under all caps; keep earlier results unless `again`."""
    from grpo_fast.memory.trace import Tracer

    quiet()
    model = "qwen3-8b" if run.device.type == "cuda" and not run.quick else "qwen3-tiny"
    table, tracer = run.table("longest", KEY), Tracer(model_config(model))
    begin = time.perf_counter()
    for cap in caps:
        total = torch.cuda.get_device_properties(run.device).total_memory if run.device.type == "cuda" else math.inf
        if ALMOST * cap * GIB > total:
            print(f"  {cap:g} GiB: left out, the device has {total / GIB:.1f} GiB", flush=True)
            continue
        for contender in contenders:
            earlier = find_row(table, {"model": model, "contender": contender.name, "cap_gib": cap})
            if earlier.get("status") in ("ok", "failed") and not again:
                print(f"  {contender.name} under {cap:g} GiB: measured before, {earlier['answer_tokens']} tokens")
            elif not run.out_of_time(f"  {contender.name} under {cap:g} GiB"):
                measure_one(run, contender, model, cap, table, tracer)
    print(f"longest: {time.perf_counter() - begin:.0f} s; {table.path}", flush=True)
    for line in summary(table.rows):
        print(f"  {line}", flush=True)


def summary(rows: list[dict[str, str]]) -> list[str]:
    """For each cap, the longest answers of ours and of TRL, and their ratio."""
    lines = []
    for cap in sorted({float(row["cap_gib"]) for row in rows}):
        best = {}
        for row in rows:
            if float(row["cap_gib"]) == cap and row["status"] == "ok":
                mine = TRL if row["contender"].startswith(TRL) else OURS
                best[mine] = max(best.get(mine, (0, "")), (int(row["answer_tokens"]), row["contender"]))
        if len(best) == 2:
            (ours, name), (theirs, other) = best[OURS], best[TRL]
            lines.append(f"{cap:g} GiB: {name} {ours:,}, {other} {theirs:,} tokens: {ours / theirs:.2f}x")
    return lines


def numbers(text: str) -> list[float]:
    try:
        caps = [float(value) for value in text.split(",")]
    except ValueError:
        raise UserError(f"--caps={text!r} is not a list of GiB") from None
    for cap in caps:
        if not 0 < cap < math.inf:
            raise UserError(f"--caps: {cap} is not allowed: it must be above 0, in GiB")
    return caps


def body() -> None:
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--caps", help=f"GiB with commas (default: {CAPS}; on a CPU, and with --quick, {CPU_CAPS})")
    arguments.add_argument("--contenders", help="names with commas (default: all)")
    arguments.add_argument("--again", action="store_true", help="repeat earlier measurements")
    chosen = arguments.parse_args()
    run = start(chosen)
    known = {contender.name: contender for contender in CONTENDERS}
    names = pick("contenders", chosen.contenders, known)
    caps = numbers(chosen.caps or (CPU_CAPS if run.quick or run.device.type == "cpu" else CAPS))
    run_longest(run, [known[name] for name in names], caps, chosen.again)


if __name__ == "__main__":
    main(body)
