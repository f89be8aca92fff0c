"""Is the memory plan right? The peak memory of a real optimizer step, compared with `grpo-fast plan`.

    python -m benchmarks.plan [--settings 8b-8k,8b-32k]

Each setting trains one step on synthetic answers (see `trial.py`), on a GPU in a process of its own. The planned peak
is that of training; the measured peak is the most memory that all tensors took. They must agree within 10%.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from benchmarks.harness.measure import Run, main, missing, parser, pick, show_bytes, start
from benchmarks.harness.process import OutOfTime
from benchmarks.harness.trainers import quiet
from benchmarks.step import OURS
from benchmarks.trial import Job, Trials, planned
from benchmarks.worker import Worker
from grpo_fast.errors import UserError

KEY = ("setting",)
BAR = 0.1
LEAN = {"tiled_mlp": True, "activation_offloading": True, "bf16": True}
NO_ADAPTER = {"use_peft": False, "optim": "adamw_torch_8bit"}


@dataclass(frozen=True)
class Setting:
    """Answers of one length in our trainer: the configuration, answers per prompt and answers per microbatch."""

    name: str
    model: str
    answer: int
    fields: dict[str, Any] = field(default_factory=dict)
    group: int = 2
    together: int = 1

    def job(self, run: Run) -> Job:
        return Job(OURS, self.model, str(run.device), self.fields, group=self.group, together=self.together)


ON_GPU = [
    Setting("1.7b-8k", "qwen3-1.7b", 8192),
    Setting("1.7b-32k", "qwen3-1.7b", 32768),
    Setting("8b-8k", "qwen3-8b", 8192),
    Setting("8b-32k", "qwen3-8b", 32768),
    Setting("8b-32k-lean", "qwen3-8b", 32768, LEAN),
    Setting("8b-8k-4bit", "qwen3-8b", 8192, {"load_in_4bit": True}),
    Setting("8b-4x8k-together", "qwen3-8b", 8192, group=4, together=4),
    Setting("1.7b-8k-full", "qwen3-1.7b", 8192, NO_ADAPTER),
]
# In float32, because a CPU, unlike a GPU, copies 16-bit weights for its products. The head uses its whole budget.
SMALL = {"dtype": "float32", "max_buffer_mib": 1}
ON_CPU = [
    Setting("300", "qwen3-tiny", 300, SMALL),
    Setting("600", "qwen3-tiny", 600, SMALL),
    Setting("1200", "qwen3-tiny", 1200, SMALL),
    Setting("4000-tiled", "qwen3-tiny", 4000, {**SMALL, "tiled_mlp": True}),
    Setting("8x300-apart", "qwen3-tiny", 300, SMALL, group=8),
    Setting("8x300-together", "qwen3-tiny", 300, SMALL, group=8, together=8),
]


def left_out(setting: Setting) -> str | None:
    """Which package a setting lacks, in one line, or None."""
    if setting.fields.get("load_in_4bit"):
        return missing("bitsandbytes", "bitsandbytes")
    return missing("torchao", "torchao") if "8bit" in setting.fields.get("optim", "") else None


def measured_step(run: Run, job: Job, answer: int) -> dict[str, Any]:
    """A whole step; on a GPU, in a process of its own."""
    trials = Worker(job, run.deadline) if run.device.type == "cuda" else Trials(job)
    try:
        return trials.trial(answer, whole=True)
    finally:
        trials.stop()


def measure_setting(run: Run, setting: Setting) -> dict[str, Any]:
    """The row of one setting."""
    job = setting.job(run)
    row = {
        "setting": setting.name, "model": setting.model, "answer_tokens": setting.answer, "group": setting.group,
        "microbatch_tokens": job.tokens(setting.answer), "fields": " ".join(f"{k}={v}" for k, v in job.fields.items()),
    }  # fmt: skip
    if reason := left_out(setting):
        return {**row, "status": "left out", "detail": reason}
    bytes_planned = sum(planned(job, setting.answer).training.values())
    found = measured_step(run, job, setting.answer)
    if not found["fits"]:
        return {**row, "status": "failed", "detail": found["detail"], "planned_bytes": bytes_planned}
    ratio = bytes_planned / found["peak_bytes"]
    status = "ok" if abs(ratio - 1) <= BAR else "off"
    return {
        **row, "status": status, "planned_bytes": bytes_planned, "measured_bytes": found["peak_bytes"], "ratio": ratio,
        "seconds": found["seconds"],
    }  # fmt: skip


def run_plan(run: Run, settings: list[Setting]) -> None:
    """Measure and print all settings.

    Raises:
        UserError: a plan is off by more than `BAR`, or a step failed.
    """
    quiet()
    table, bad = run.table("plan", KEY), []
    for setting in settings:
        try:
            if run.out_of_time(f"  {setting.name}"):
                continue
            row = measure_setting(run, setting)
        except OutOfTime:
            print(f"  {setting.name}: stopped for lack of time", flush=True)
            continue
        except UserError as error:
            row = {"setting": setting.name, "model": setting.model, "status": "failed", "detail": str(error)}
        table.add(row)
        if row["status"] in ("ok", "off"):
            promised, peak = show_bytes(row["planned_bytes"]), show_bytes(row["measured_bytes"])
            print(f"  {setting.name:20}planned {promised:>10}  measured {peak:>10}  {row['ratio']:.3f}", flush=True)
        else:
            print(f"  {setting.name:20}{row['status']}: {row['detail']}", flush=True)
        bad += [setting.name] * (row["status"] in ("off", "failed"))
    if bad:
        raise UserError(f"the plan does not hold within {BAR:.0%}, or the step failed: {', '.join(bad)}")


def body() -> None:
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--settings", help="names with commas (default: all of the device)")
    chosen = arguments.parse_args()
    run = start(chosen)
    known = {setting.name: setting for setting in (ON_CPU if run.quick or run.device.type == "cpu" else ON_GPU)}
    run_plan(run, [known[name] for name in pick("settings", chosen.settings, known)])


if __name__ == "__main__":
    main(body)
