"""How fast is hidden -> loss, forward and backward, and how much memory does it take?

    python -m benchmarks.head                                           # every shape of this device
    python -m benchmarks.head --shapes smollm2-135m:2048:float32 --heads trainable,frozen

Every contender's loss and gradients are compared with float64 (see `harness/problem.py`) before it is timed; a wrong
one is reported and not timed. The floor is the bare matrix products of the same shapes, timed in the same run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from benchmarks.harness.contenders import CONTENDERS, FLOOR, Contender, NotApplicable, choose, floor_call, prepared
from benchmarks.harness.measure import (
    Run,
    Table,
    describe_failure,
    interleave,
    main,
    parser,
    pick,
    release,
    show_bytes,
    show_seconds,
    start,
)
from benchmarks.harness.problem import HEADS, MODES, UNITS, Problem, Shape, Truth, errors, make_problem, verdict
from grpo_fast.errors import UserError, one_line

KEY = ("model", "N", "H", "V", "dtype", "head", "contender")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Case(NamedTuple):
    """A head, the number of tokens and the dtype."""

    shape: Shape
    tokens: int
    dtype: torch.dtype


def cases_for(run: Run) -> list[Case]:
    """The cases of a device, the most important first, since a run may end early."""
    small, f32, bf16 = HEADS["smollm2-135m"], torch.float32, torch.bfloat16
    if run.quick:
        tiny = Shape("tiny", 64, 1031)
        return [Case(tiny, 256, f32), Case(tiny, 256, bf16), Case(Shape("tiny-softcap", 64, 1031, 30.0), 256, f32)]
    if run.device.type == "cpu":
        large = HEADS["qwen3-1.7b"]
        return [Case(small, 2048, f32), Case(small, 2048, bf16), Case(large, 1024, f32), Case(large, 1024, bf16)]
    main_head = HEADS["qwen3-8b"]
    first = [Case(main_head, 16384, bf16), Case(small, 16384, bf16), Case(HEADS["gemma2-2b"], 16384, bf16)]
    others = [HEADS[name] for name in ("qwen3-1.7b", "llama3-8b", "qwen3-0.6b", "qwen3-4b")]
    lengths = [Case(main_head, tokens, bf16) for tokens in (262144, 1024, 4096, 65536)]
    return first + lengths + [Case(head, 16384, bf16) for head in others] + [Case(small, 16384, f32)]


def parse_cases(text: str) -> list[Case]:
    """The cases in ``model:N:dtype`` or ``HxV:N:dtype``, separated by commas."""
    cases = []
    for item in text.split(","):
        parts = item.strip().split(":")
        name, tokens, dtype = parts if len(parts) == 3 else (item, "", "")
        shape, sizes = HEADS.get(name), name.split("x")
        if shape is None and len(sizes) == 2 and all(size.isdigit() for size in sizes):
            shape = Shape(name, *map(int, sizes))
        if shape is None or not tokens.isdigit() or int(tokens) < 1 or dtype not in DTYPES:
            raise UserError(
                f"--shapes: {item!r} is not MODEL:TOKENS:DTYPE; models are {', '.join(HEADS)} or HxV as in 576x49152, "
                f"dtypes {', '.join(DTYPES)}"
            )
        cases.append(Case(shape, int(tokens), DTYPES[dtype]))
    return cases


def gate(contender: Contender, problem: Problem, truth: Truth) -> tuple[Any, dict[str, Any]]:
    """Run the contender once, as a warm-up too, and compare the result with the true values.

    Returns its call, or None if it cannot be timed, and its errors and status.
    """
    try:
        call = prepared(contender, problem)
        outcome = call()
        for name in ("grad_hidden", "grad_weight"):
            if outcome[name] is not None and not bool(outcome[name].isfinite().all()):
                return None, {"status": "wrong", "detail": f"{name} is not finite"}
        found = errors(truth, **outcome)
    except NotApplicable as reason:
        return None, {"status": "left out", "detail": str(reason)}
    except Exception as error:
        if "CUDA error" in str(error):
            # After an illegal memory access, for example, nothing works in this process any more.
            raise UserError(
                f"{contender.name} broke CUDA, leave it out with --contenders: {one_line(error)}"
            ) from error
        return None, {"status": "failed", "detail": describe_failure(error)}
    finally:
        release(problem.hidden.device)
    wrong = verdict(found, problem.hidden.dtype)
    return (None if wrong else call), {"status": "wrong" if wrong else "ok", "detail": wrong or "", **found}


def measure_problem(
    run: Run, problem: Problem, truth: Truth, contenders: Sequence[Contender] = CONTENDERS, repeats: int = 5,
    seconds: float | None = None, least: int = 3,
) -> list[dict[str, Any]]:  # fmt: skip
    """The rows of one problem: the floor, and every contender checked and then timed in turn."""
    calls: dict[str, Callable[[], Any]] = {FLOOR: floor_call(problem)}
    gated: dict[str, dict[str, Any]] = {}
    calls[FLOOR]()
    for contender in contenders:
        call, state = gate(contender, problem, truth)
        gated[contender.name] = state
        if call is not None:
            calls[contender.name] = call
        elif state["status"] != "left out":
            print(f"  {contender.name}: {state['status']}: {state['detail']}", flush=True)
    measured = interleave(calls, run.device, run.repeats or repeats, least, run.deadline.within(seconds))
    floor = measured[FLOOR].times.median
    units = f"{UNITS[problem.mode]}U"
    by_name = {contender.name: contender for contender in contenders}
    rows = []
    for name in (FLOOR, *by_name):
        entry, status = measured.get(name), gated.get(name, {"status": "ok", "detail": ""})
        row = {**problem.columns(), "contender": name, **status}
        if entry is not None and entry.failure:
            row |= {"status": "failed", "detail": entry.failure}
        elif entry is not None:
            row |= {
                **entry.times.columns(),
                "to_floor": entry.times.median / floor,
                "tflops": problem.flops / entry.times.median / 1e12,
                "peak_bytes": None if name == FLOOR else entry.peak_bytes,
                "beyond_gradients_bytes": None if name == FLOOR else entry.peak_bytes - problem.gradient_bytes,
            }
        row |= {
            "gradient_bytes": problem.gradient_bytes,
            "needed_bytes": f"{problem.gradient_formula} = {problem.gradient_bytes}",
            "cost": units if name == FLOOR else by_name[name].cost_in(problem.mode),
            "needed_flops": f"{units} = {problem.flops:.4g}",
            "peer": "" if name == FLOOR else by_name[name].version(),
        }
        rows.append(row)
    return rows


def run_head(
    run: Run, cases: list[Case], modes: Sequence[str], contenders: Sequence[Contender] = CONTENDERS,
    table: Table | None = None, seconds: float | None = None, least: int = 3,
) -> None:  # fmt: skip
    """Measure every case and mode until the run's deadline, in rounds for `seconds` but at least `least` of them."""
    table = table or run.table("head", KEY)
    for number, case in enumerate(cases):
        if run.out_of_time(f"head: {', '.join(f'{c.shape.model} N={c.tokens}' for c in cases[number:])}"):
            return
        torch.compiler.reset()
        try:
            problem, truth = make_problem(case.shape, case.tokens, case.dtype, run.device, modes[0])
        except (torch.OutOfMemoryError, RuntimeError) as error:
            print(f"head: {case.shape.model} N={case.tokens}: {describe_failure(error)}")
            release(run.device)
            continue
        for mode in modes:
            if run.out_of_time(f"head: {case.shape.model} N={case.tokens} {mode}"):
                continue
            print(f"head: {case.shape.model} N={case.tokens} {case.dtype} {mode}", flush=True)
            rows = measure_problem(run, problem.with_mode(mode), truth, contenders, seconds=seconds, least=least)
            for row in rows:
                table.add(row)
                shown = f"{row['status']}: {row['detail']}"
                if row["status"] == "ok":
                    peak = show_bytes(row["peak_bytes"] or math.nan)
                    time = f"{show_seconds(row['seconds']):>10}  {row['to_floor']:6.2f}x floor"
                    shown = f"{time}  {peak:>11}  {row['cost']}"
                print(f"  {row['contender']:28}{shown}", flush=True)
        del problem, truth
        release(run.device)


def body() -> None:
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--shapes", help="MODEL:TOKENS:DTYPE, several with commas (default: those of the device)")
    arguments.add_argument("--heads", help=f"of {', '.join(MODES)}, with commas (default: all)")
    arguments.add_argument("--contenders", help="names with commas (default: all)")
    chosen = arguments.parse_args()
    run = start(chosen)
    cases = parse_cases(chosen.shapes) if chosen.shapes else cases_for(run)
    run_head(run, cases, pick("heads", chosen.heads, MODES), choose(chosen.contenders))


if __name__ == "__main__":
    main(body)
