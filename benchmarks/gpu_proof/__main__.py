"""Everything that must be shown on a new GPU, the most important first.

    python -m benchmarks.gpu_proof                                     # on the GPU, about an hour at most
    python -m benchmarks.gpu_proof --wheels wheels --minutes 9         # in pieces, on a machine without a network
    python -m benchmarks.gpu_proof --device cpu --quick                # a rehearsal at tiny sizes

Each stage has a process of its own and a time limit, so that a stage that fails, crashes or hangs costs only itself.
Finished stages are skipped by the next call; `--again` repeats one. The exit status is 1 if a result is wrong, or if a
stage of correctness (doctor, equivalence, memcheck, vllm) failed.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu_proof.process import INTERRUPTS, run_command
from benchmarks.gpu_proof.stages import OURS, QUICK_OPTIONS, STAGES, Proof, Stage, last_line, predicted, read_rows
from benchmarks.gpu_proof.wheels import install_wheels
from grpo_fast.errors import UserError, nearest, one_line

ROOT = Path(__file__).parents[2]
RESULTS, WORK = ROOT / "benchmarks" / "results", ROOT / "runs" / "gpu-proof"
QUICK_RESULTS = ROOT / "runs" / "benchmarks"
# Importing torch and reaching the GPU; nothing is started with less time than the second.
MACHINE_SECONDS, LEAST_SECONDS = 180.0, 20.0
# A stage that has less than this share of its limit is left to the next call.
LEAST_SHARE = 0.3
BROKE = " broke CUDA, leave it out"
PASS, FAIL, STOPPED, SKIPPED, WAITING = "pass", "FAIL", "stopped", "skipped", "not run"


@dataclass
class Outcome:
    """A row of the summary and of ``gpu_proof.csv``. `bad`: it makes the exit status 1."""

    stage: str
    status: str
    headline: str = ""
    predicted: str = ""
    seconds: float = 0.0
    bad: bool = False

    def columns(self) -> dict[str, str]:
        return {
            "stage": self.stage, "status": self.status, "seconds": f"{self.seconds:.1f}", "headline": self.headline,
            "predicted": self.predicted, "bad": "yes" if self.bad else "",
        }  # fmt: skip


@dataclass
class Results:
    """``gpu_proof.csv``: one row for each stage, with the facts of the machine; rewritten after every stage."""

    path: Path
    facts: dict[str, str]
    rows: dict[str, dict[str, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.path.exists():
            self.rows = {row["stage"]: row for row in read_rows(self.path)}

    def outcome(self, stage: str) -> Outcome | None:
        """What an earlier call found, and at which commit if that is another one."""
        row = self.rows.get(stage)
        if row is None:
            return None
        other = "" if self.commit(stage) == self.facts["commit"] else f" (commit {self.commit(stage) or '?'})"
        headline, seconds = row["headline"] + other, float(row["seconds"] or 0)
        return Outcome(stage, row["status"], headline, row["predicted"], seconds, bool(row["bad"]))

    def commit(self, stage: str) -> str:
        return self.rows.get(stage, {}).get("commit", "")

    def add(self, outcome: Outcome) -> None:
        self.rows[outcome.stage] = {**outcome.columns(), **self.facts}
        columns = list(dict.fromkeys(name for row in self.rows.values() for name in row))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".csv.part")
        with partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows.values())
        partial.replace(self.path)


def child_environment(device: str, site: Path | None) -> dict[str, str]:
    """Variables of the stages' processes: where the packages are, and nothing from the network."""
    paths = [str(ROOT), str(ROOT / "kernels"), *([str(site)] if site else []), os.environ.get("PYTHONPATH", "")]
    changes = {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",
        "HF_HUB_OFFLINE": "1",
    }
    # A rehearsal beside other work: several threads would mostly wait for each other.
    rehearsal = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} if device == "cpu" else {}
    return {**os.environ, **changes, **rehearsal}


def describe_machine(chosen: argparse.Namespace, output: Path, environment: dict[str, str]) -> dict[str, Any]:
    """What `machine.py` prints.

    Raises:
        UserError: there is no such device, or it does not answer.
    """
    command = [sys.executable, "-m", "benchmarks.gpu_proof.machine", "--device", chosen.device, "--output", str(output)]
    command += ["--commit", chosen.commit, *QUICK_OPTIONS[chosen.quick]]
    with tempfile.NamedTemporaryFile("r", encoding="utf-8", errors="replace") as log:
        ended = run_command(command, environment, Path(log.name), MACHINE_SECONDS)
        said = last_line(log.read())
    if ended.code is None:
        raise UserError(f"the {chosen.device} device does not answer within {MACHINE_SECONDS:.0f} s")
    if ended.code != 0:
        raise UserError(one_line(said.removeprefix("error: ")) or f"the device's check ended with status {ended.code}")
    return json.loads(said)


def explain(log: str) -> str:
    """The error that ended a process, in one line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return one_line((errors or lines or ["no output"])[-1], 160)


def end_of(log: Path, begin: int) -> str:
    with log.open("rb") as file:
        file.seek(begin)
        return file.read().decode(errors="replace")


def run_stage(proof: Proof, stage: Stage, environment: dict[str, str], log: Path, limit: float) -> Outcome:
    """Run one stage for at most `limit` seconds."""
    if reason := stage.left_out(proof):
        return Outcome(stage.name, SKIPPED, reason)
    begin, left_out, size = time.monotonic(), [], log.stat().st_size if log.exists() else 0
    variables = {**environment, **stage.environment}
    while True:
        left = limit - (time.monotonic() - begin)
        command = stage.command(proof, left)
        if left_out:
            kept = [name for name in proof.contenders if name not in left_out]
            command += ["--contenders", ",".join(kept)]
        ended = run_command(command, variables, log, left)
        said = end_of(log, size)
        # A peer that breaks CUDA takes the rest of its process along; the others are measured without it.
        broke = [name for name in proof.contenders if f"{name}{BROKE}" in said and name not in left_out]
        if not broke or OURS in broke or limit - (time.monotonic() - begin) < LEAST_SECONDS:
            break
        left_out += broke
        size = log.stat().st_size
    outcome = judge(proof, stage, ended.code, said, limit)
    outcome.seconds = time.monotonic() - begin
    outcome.headline += "".join(f"; {name} broke CUDA" for name in left_out)
    outcome.predicted = predicted(proof, stage.name) if outcome.status == PASS else ""
    return outcome


def judge(proof: Proof, stage: Stage, code: int | None, said: str, limit: float) -> Outcome:
    """What the end of a stage's process and its results mean."""
    failed = Outcome(stage.name, FAIL, bad=stage.correctness)
    if "Device not supported" in said and stage.name == "memcheck":
        return Outcome(stage.name, SKIPPED, "compute-sanitizer does not support this device")
    if code is None:
        found = stage.finding(proof, said.partition("Fatal Python error: Aborted")[0])
        so_far = "" if found.failed else f"; so far {found.headline}"
        failed.headline = f"stopped at its limit of {limit / 60:.1f} minutes, see the end of its log{so_far}"
        failed.bad = failed.bad or found.wrong
        if limit < proof.limit(stage) and not found.wrong:
            return Outcome(stage.name, STOPPED, f"the {limit / 60:.1f} minutes left were too few{so_far}")
    elif code < 0:
        failed.headline = f"killed by signal {-code} ({signal.Signals(-code).name}); the log has its last lines"
    elif f"{OURS}{BROKE}" in said or f"{OURS} is wrong" in said:
        failed.headline, failed.bad = explain(said), True
    elif code and stage.optional and ("is not installed" in explain(said) or "No module named" in explain(said)):
        return Outcome(stage.name, SKIPPED, explain(said))
    elif code:
        failed.headline = explain(said)
    else:
        finding = stage.finding(proof, said)
        bad = finding.failed and (stage.correctness or finding.wrong)
        return Outcome(stage.name, FAIL if finding.failed else PASS, finding.headline, bad=bad)
    return failed


def summary(proof: Proof, outcomes: dict[str, Outcome], logs: Path) -> str:
    """All stages on one screen."""
    facts = proof.facts
    versions = [f"{name} {facts[name]}" for name in ("driver", "torch", "triton") if facts.get(name)]
    lines = ["", ", ".join([f"gpu-proof on {facts['device']}", *versions, f"commit {facts.get('commit') or '?'}"])]
    for outcome in outcomes.values():
        minutes, seconds = divmod(round(outcome.seconds), 60)
        taken = f"{minutes}:{seconds:02}" if outcome.seconds else ""
        lines.append(f"  {outcome.stage:13}{outcome.status:8}{taken:>6}  {outcome.headline[:148]}".rstrip())
        if outcome.predicted:
            lines.append(f"{'predicted':>29}  {outcome.predicted}")
    count = {
        status: sum(each.status == status for each in outcomes.values()) for status in (PASS, FAIL, STOPPED, SKIPPED)
    }
    total = sum(outcome.seconds for outcome in outcomes.values()) / 60
    counted = ", ".join(f"{number} {status}" for status, number in count.items() if number)
    return "\n".join(
        [*lines, f"  {counted or 'nothing run'}; {total:.1f} minutes; CSV in {proof.folder}, logs in {logs}"]
    )


def chosen_stages(stages: Sequence[Stage], option: str, names: str | None) -> list[str]:
    """The stages that a comma-separated list names; none without one.

    Raises:
        UserError: a stage is unknown.
    """
    known = [stage.name for stage in stages]
    if names == "all":
        return known
    picked = [name.strip() for name in names.split(",")] if names else []
    for name in picked:
        if name not in known:
            raise UserError(f"{option}: {name!r} is unknown{nearest(name, known)}; use one of {', '.join(known)}")
    return picked


def read_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    made = argparse.ArgumentParser(prog="python -m benchmarks.gpu_proof", description=(__doc__ or "").splitlines()[0])
    made.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu, with --quick, is a rehearsal")
    made.add_argument("--quick", action="store_true", help="tiny sizes, to check that it runs; results go to runs/")
    made.add_argument("--stages", help="names with commas (default: all)")
    made.add_argument("--again", help="finished stages to repeat, with commas, or all")
    made.add_argument("--minutes", type=float, help="stop after this many minutes; the next call continues")
    made.add_argument("--limits", type=float, default=1.0, help="multiply the stages' time limits, for a slow GPU")
    made.add_argument("--wheels", type=Path, help="folder of wheels to install first, without a package index")
    made.add_argument("--vllm-python", help="Python of the environment that has vLLM (default: this one)")
    made.add_argument("--output", type=Path, help="folder for the results (default: benchmarks/results)")
    made.add_argument("--commit", default="", help="commit to record if there is no git checkout")
    chosen = made.parse_args(argv)
    for option in ("minutes", "limits"):
        value = getattr(chosen, option)
        if value is not None and not value > 0:
            raise UserError(f"--{option}={value} is not allowed: it must be above 0")
    if chosen.vllm_python and shutil.which(chosen.vllm_python) is None:
        raise UserError(f"--vllm-python: there is no program {chosen.vllm_python}")
    if chosen.device == "cpu" and not chosen.quick:
        raise UserError("--device cpu is a rehearsal at tiny sizes; add --quick (make bench measures a CPU)")
    return chosen


def prove(argv: Sequence[str] | None = None, stages: Sequence[Stage] = STAGES) -> int:
    """Run what is not finished yet; the exit status.

    Raises:
        UserError: an option is wrong, there is no device, or the wheels cannot be installed.
    """
    chosen = read_arguments(argv)
    begin = time.monotonic()
    wanted = chosen_stages(stages, "--stages", chosen.stages) or [stage.name for stage in stages]
    again = chosen_stages(stages, "--again", chosen.again)
    site = install_wheels(chosen.wheels, WORK) if chosen.wheels else None
    environment = child_environment(chosen.device, site)
    output = (chosen.output or (QUICK_RESULTS if chosen.quick else RESULTS)).resolve()
    machine = describe_machine(chosen, output, environment)
    folder, facts = Path(machine["folder"]), machine["facts"]
    proof = Proof(
        chosen.device, chosen.quick, output, folder, facts, tuple(machine["contenders"]),
        vllm_python=chosen.vllm_python, limits=chosen.limits,
    )  # fmt: skip
    logs = (chosen.output.resolve() if chosen.output else WORK) / folder.name / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    results = Results(folder / "gpu_proof.csv", facts)
    outcomes = {stage.name: results.outcome(stage.name) or Outcome(stage.name, WAITING) for stage in stages}
    for stage in stages:
        if stage.name not in wanted:
            continue
        if outcomes[stage.name].status == PASS and stage.name not in again and not stage.repeated:
            print(f"{stage.name}: finished before, at commit {results.commit(stage.name) or '?'}", flush=True)
            continue
        limit = proof.limit(stage)
        if chosen.minutes:
            left = 60 * chosen.minutes - (time.monotonic() - begin)
            if left < max(LEAST_SECONDS, LEAST_SHARE * limit):
                print(f"{stage.name}: too little time is left; call again to continue", flush=True)
                continue
            limit = min(left, limit)
        print(f"{stage.name}: up to {limit / 60:.1f} minutes", flush=True)
        # An environment of its own has its own versions of what the wheels hold.
        apart = stage.name == "vllm" and chosen.vllm_python
        variables = child_environment(chosen.device, None) if apart else environment
        try:
            outcomes[stage.name] = run_stage(proof, stage, variables, logs / f"{stage.name}.log", limit)
        except Exception as error:
            # A command that cannot start, or results of another form than expected: neither stops the other stages.
            shown = f"{type(error).__name__}: {one_line(error, 120)}"
            outcomes[stage.name] = Outcome(stage.name, FAIL, shown, bad=stage.correctness)
        results.add(outcomes[stage.name])
        print(summary(proof, outcomes, logs), flush=True)
    if not any(outcome.status != WAITING for outcome in outcomes.values()):
        print(summary(proof, outcomes, logs), flush=True)
    return int(any(outcome.bad for outcome in outcomes.values()))


def interrupt(*_: Any) -> None:
    """Ends the stage in progress, whatever the signal, also where the shell made this process ignore it."""
    raise KeyboardInterrupt


def main() -> int:
    # A stage that is stopped writes its traceback by SIGABRT, which must not write a core file.
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    for number in INTERRUPTS:
        signal.signal(number, interrupt)
    try:
        return prove()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command continues", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
