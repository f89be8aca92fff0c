"""The stages, the most important first: their commands, their time limits, and what each has shown."""

from __future__ import annotations

import csv
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

PREDICTIONS = Path(__file__).with_name("predictions.csv")
# Where CUDA's toolkit puts compute-sanitizer if it is not on the PATH.
TOOLKIT = Path("/usr/local/cuda/bin/compute-sanitizer")
# A stage's own benchmark starts nothing new after this share of the stage's limit.
SHARE = 0.85
# By whether the sizes are tiny.
QUICK_OPTIONS = {True: ["--quick", "--threads", "1"], False: []}
OURS, FUSED, TRL = "grpo-fast", "FusedGRPOTrainer", "TRL"
# The head and the number of tokens of the headline, at full and at tiny sizes.
MAIN_HEADS = (("qwen3-8b", "16384"), ("tiny", "256"))
UNITS = {"trainable": "3U", "frozen": "2U", "scoring": "1U"}
NOTHING = "no result of ours; see the log"
Row = dict[str, str]


@dataclass(frozen=True)
class Proof:
    """One run: its device, `output` (the folder that holds one for each device), `folder` (this device's) and facts."""

    device: str
    quick: bool
    output: Path
    folder: Path
    facts: dict[str, str]
    contenders: tuple[str, ...] = ()
    python: str = sys.executable
    vllm_python: str | None = None
    limits: float = 1.0

    def limit(self, stage: Stage) -> float:
        """The stage's time limit in seconds."""
        return 60 * self.limits * (stage.quick_minutes if self.quick else stage.minutes)

    def rows(self, name: str) -> list[Row]:
        """The rows of a CSV that were measured at this commit."""
        path = self.folder / f"{name}.csv"
        found = read_rows(path) if path.exists() else []
        return [row for row in found if row.get("commit", "") == self.facts.get("commit", "")]


@dataclass(frozen=True)
class Finding:
    """What a stage that ended normally has shown, whether it `failed`, and whether by a `wrong` result of ours."""

    headline: str
    failed: bool = False
    wrong: bool = False


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        minutes, quick_minutes: its time limit, at full and at tiny sizes.
        command: its command, given how many seconds it has.
        finding: reads its results, given its output.
        correctness: whether a failure makes the whole command fail; a wrong result in any other stage does so too.
        left_out: why it cannot run here, or None.
        environment: further variables.
        optional: whether it is skipped, and does not fail, where a package is not installed.
        repeated: whether it runs in every call, whatever was finished before.
    """

    name: str
    minutes: float
    quick_minutes: float
    command: Callable[[Proof, float], list[str]]
    finding: Callable[[Proof, str], Finding]
    correctness: bool = False
    left_out: Callable[[Proof], str | None] = lambda proof: None
    environment: dict[str, str] = field(default_factory=dict)
    optional: bool = True
    repeated: bool = False


def read_rows(path: Path) -> list[Row]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def predicted(proof: Proof, stage: str) -> str:
    """What `predictions.csv` predicts for a stage on this device, or an empty string."""
    for row in read_rows(PREDICTIONS):
        if not proof.quick and row["stage"] == stage and proof.facts["device"].startswith(row["device"]):
            return row["value"]
    return ""


def benchmark(module: str, *options: str) -> Callable[[Proof, float], list[str]]:
    """The command of ``benchmarks.MODULE``."""

    def command(proof: Proof, seconds: float) -> list[str]:
        python = proof.vllm_python if module.endswith("vllm_sleep") and proof.vllm_python else proof.python
        made = [python, "-m", f"benchmarks.{module}", "--device", proof.device, "--output", str(proof.output)]
        made += ["--commit", proof.facts["commit"], "--minutes", f"{SHARE * seconds / 60:.3f}", *options]
        return made + QUICK_OPTIONS[proof.quick]

    return command


def doctor(proof: Proof, seconds: float) -> list[str]:
    return [proof.python, "-m", "grpo_kernels.doctor"]


def sanitizer() -> str | None:
    return shutil.which("compute-sanitizer") or (str(TOOLKIT) if TOOLKIT.exists() else None)


def memcheck(proof: Proof, seconds: float) -> list[str]:
    options = ["--tool", "memcheck", "--error-exitcode", "1"]
    return [sanitizer() or "compute-sanitizer", *options, *doctor(proof, seconds)]


def no_memcheck(proof: Proof) -> str | None:
    if proof.device == "cpu":
        return "it needs a GPU"
    return None if sanitizer() else "compute-sanitizer is not on the PATH; it comes with NVIDIA's CUDA toolkit"


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def read_doctor(proof: Proof, log: str) -> Finding:
    shares = [float(share) for share in re.findall(r"error ([\d.]+|inf) of the allowed", log)]
    if not shares:
        return Finding(last_line(log))
    return Finding(f"{len(shares)} comparisons, the largest error is {max(shares):.2f} of the allowed")


def read_memcheck(proof: Proof, log: str) -> Finding:
    errors = re.findall(r"ERROR SUMMARY: (\d+) error", log)
    return Finding(f"{sum(map(int, errors))} errors", failed=not errors or any(map(int, errors)))


def our_rows(rows: list[Row], column: str) -> list[Row]:
    """Rows of ours with a result, right or not."""
    return [row for row in rows if row.get(column) in (OURS, FUSED) and row.get("status") != "left out"]


def judged(rows: list[Row], headline: str) -> Finding:
    """The headline, unless one of our rows is not ok."""
    bad = [row for row in rows if row["status"] != "ok"]
    if not rows:
        return Finding(NOTHING, failed=True)
    if bad:
        shown = f"{bad[0]['status']}: {bad[0].get('detail', '')}"
        return Finding(shown, failed=True, wrong=any(row["status"] == "wrong" for row in bad))
    return Finding(headline)


def read_equivalence(proof: Proof, log: str) -> Finding:
    rows = proof.rows("equivalence")
    shares = [float(row["share"]) for row in rows if row.get("share")]
    backends = "/".join(sorted({row["backend"] for row in rows}))
    shown = f"{len(rows)} right ({backends}), the largest error is {max(shares, default=0):.2f} of the allowed"
    return judged(rows, shown + also_left_out(log))


def also_left_out(log: str) -> str:
    """How many cases there was no time or memory for."""
    count = len(re.findall(r"left out for lack of time|: left out: it needs", log))
    return f"; {count} left out" if count else ""


def read_head(proof: Proof, log: str) -> Finding:
    rows = proof.rows("head")
    ours = our_rows(rows, "contender")
    if not ours:
        return judged(ours, "")
    case = next((row for row in ours if (row["model"], row["N"]) in MAIN_HEADS), ours[0])
    same = [row for row in rows if all(row[name] == case[name] for name in ("model", "N", "dtype"))]
    floor = {row["head"]: float(row["to_floor"]) for row in our_rows(same, "contender") if row.get("to_floor")}
    shown = " ".join(f"{UNITS[mode]} {floor[mode]:.2f}x" for mode in UNITS if mode in floor)
    peers = [row for row in same if row["contender"] not in (OURS, "bare GEMMs") and row["head"] == "trainable"
             and row.get("to_floor")]  # fmt: skip
    best = min(peers, key=lambda row: float(row["to_floor"]), default=None)
    rival = f", {best['contender']} {float(best['to_floor']):.2f}x" if best else ""
    return judged(ours, f"{shown} of the bare products{rival}" + also_left_out(log))


def read_loss(proof: Proof, log: str) -> Finding:
    ours = our_rows(proof.rows("loss"), "contender")
    measured = [row for row in ours if row["operation"] == "policy_loss" and row.get("to_floor")]
    largest = max(measured, key=lambda row: int(row["N"]), default=None)
    shown = f"policy_loss N={largest['N']}: {float(largest['to_floor']):.1f}x its bytes" if largest else ""
    return judged(ours, shown + also_left_out(log))


def read_steps(name: str, label: str) -> Callable[[Proof, str], Finding]:
    """Seconds of our step and how many times as fast as TRL's it is, for every value of the column `label`."""

    def read(proof: Proof, log: str) -> Finding:
        rows = proof.rows(name)
        ours = our_rows(rows, "trainer")
        shown = []
        for row in ours:
            speed = f", {float(row['speedup']):.2f}x TRL" if row.get("speedup") else ""
            shown.append(f"{row[label]}: {float(row['seconds']):.3g} s{speed}" if row.get("seconds") else row[label])
        absent = [row["detail"] for row in rows if row["trainer"] == TRL and row["status"] == "left out"]
        return judged(ours, f"{label} " + "; ".join([*shown, *absent[:1]]) + also_left_out(log))

    return read


def read_plan(proof: Proof, log: str) -> Finding:
    rows = [row for row in proof.rows("plan") if row["status"] != "left out"]
    ratios = [float(row["ratio"]) for row in rows if row.get("ratio")]
    shown = f"planned / measured {min(ratios):.2f} to {max(ratios):.2f} in {len(ratios)} settings" if ratios else ""
    return judged(rows, shown + also_left_out(log))


def read_longest(proof: Proof, log: str) -> Finding:
    """For each cap: our longest answer, what was planned for it, and TRL's longest."""
    shown = []
    rows = [row for row in proof.rows("longest") if int(row.get("answer_tokens") or 0)]
    for cap in sorted({float(row["cap_gib"]) for row in rows}):
        best = {}
        for row in rows:
            whose = TRL if row["contender"].startswith(TRL) else OURS
            if float(row["cap_gib"]) == cap:
                best[whose] = max(best.get(whose, row), row, key=lambda row: int(row["answer_tokens"]))
        if OURS in best:
            longest = f"{cap:g} GiB {int(best[OURS]['answer_tokens']):,} tokens"
            planned = int(best[OURS].get("planned_tokens") or 0)
            trl = f", TRL {int(best[TRL]['answer_tokens']):,}" if TRL in best else ""
            shown.append(f"{longest} (planned {planned:,}{trl})")
    return Finding("; ".join(shown) or NOTHING, failed=not shown)


def read_vllm(proof: Proof, log: str) -> Finding:
    rows = proof.rows("vllm_sleep")
    if not rows:
        return judged(rows, "")
    shown = []
    for row in rows:
        if row["status"] == "ok":
            freed = f"sleep frees {float(row['freed_gib']):.1f} GiB" if row.get("freed_gib") else "no sleep on a CPU"
            within = f"sync {float(row['sync_seconds']):.2g} s, log-probabilities within {row['difference']}"
            shown.append(f"{row['contender']}: {freed}, {within}")
    return judged(rows, "; ".join(shown))


def read_figures(proof: Proof, log: str) -> Finding:
    return Finding(f"{log.count('drew ')} figures in {proof.folder}")


STAGES = (
    Stage("doctor", 3, 2, doctor, read_doctor, correctness=True, optional=False),
    Stage("equivalence", 6, 2, benchmark("gpu_proof.equivalence"), read_equivalence, correctness=True, optional=False),
    # Without the cache of torch's allocator every tensor is an allocation of its own, so memcheck sees its bounds.
    Stage("memcheck", 8, 2, memcheck, read_memcheck, correctness=True, left_out=no_memcheck,
          environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}),
    Stage("head", 7, 4, benchmark("gpu_proof.heads"), read_head),
    Stage("loss", 3, 2, benchmark("loss"), read_loss),
    Stage("step", 4, 3, benchmark("step", "--equal", "0,0.5"), read_steps("step", "equal")),
    Stage("trl_subclass", 6, 6, benchmark("trl_subclass"), read_steps("trl_subclass", "case")),
    Stage("plan", 9, 3, benchmark("plan"), read_plan),
    Stage("longest", 9, 2, benchmark("longest"), read_longest),
    Stage("vllm", 6, 5, benchmark("gpu_proof.vllm_sleep"), read_vllm, correctness=True),
    Stage("figures", 2, 2, lambda proof, _: [proof.python, "-m", "benchmarks.gpu_proof.figures", str(proof.folder)],
          read_figures, repeated=True),
)  # fmt: skip
