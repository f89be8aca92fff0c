"""Optimizer steps of several trainers, timed in turn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.harness.measure import Table, Times, describe_failure, show_bytes, show_seconds, version
from benchmarks.harness.trainers import Stopped
from grpo_fast.errors import UserError


def compare_steps(
    table: Table,
    columns: dict[str, Any],
    steps: dict[str, Callable[[], tuple[float, float]] | str],
    difference: Callable[[], float],
    limit: float,
    repeats: int,
    base: str,
) -> None:
    """Time `repeats` steps of each trainer in turn, after one untimed step, and write a row for each trainer.

    Args:
        columns: of all rows, with the ``tokens`` of a step.
        steps: by trainer, a function that takes a step and returns its seconds and peak bytes, or why it has none.
        difference: returns the difference between the gradients of the first step; nothing is timed above `limit`.
        base: the trainer that ``speedup`` is relative to.
    """
    states = {
        name: {"status": "left out", "detail": step} if isinstance(step, str) else {"status": "ok", "detail": ""}
        for name, step in steps.items()
    }
    times, peaks, found = {name: Times() for name in steps}, dict.fromkeys(steps, 0.0), None
    for number in range(repeats + 1):
        for name in list(steps)[:: -1 if number % 2 else 1]:
            step = steps[name]
            if states[name]["status"] != "ok" or isinstance(step, str):
                continue
            try:
                seconds, peak = step()
            except Exception as error:
                expected = isinstance(error, (Stopped, UserError))
                states[name] = {"status": "failed", "detail": str(error) if expected else describe_failure(error)}
                continue
            if number:
                times[name].seconds.append(seconds)
                peaks[name] = max(peaks[name], peak)
        if number == 0 and all(state["status"] == "ok" for state in states.values()):
            found = difference()
            if not found <= limit:
                wrong = {"status": "wrong", "detail": f"the first gradients differ by {found:.2g}"}
                states = dict.fromkeys(steps, wrong)
    versions = {"transformers": version("transformers"), "peer": f"trl {version('trl')}" if version("trl") else ""}
    for name, state in states.items():
        row = {**columns, "trainer": name, **state, "gradient_difference": found, **versions}
        shown, taken = f"{state['status']}: {state['detail']}", times[name]
        if state["status"] == "ok":
            rate = columns["tokens"] / taken.median
            row |= {**taken.columns(), "tokens_per_second": rate, "peak_bytes": peaks[name]}
            row["speedup"] = times[base].median / taken.median
            shown = f"{show_seconds(taken.median):>10}  {rate:>10,.0f} tokens/s  {show_bytes(peaks[name]):>11}"
        print(f"  {name:18}{shown}", flush=True)
        table.add(row)
