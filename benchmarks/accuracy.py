"""How far are the log-probabilities and gradients of every contender from float64, and how fast is it?

    python -m benchmarks.accuracy

The largest and the median error of the log-probabilities (nats), and the errors of the gradients in the norm. Liger
returns no log-probabilities. `harness/problem.py` describes the inputs and the method.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from benchmarks.harness.contenders import CONTENDERS, FLOOR, Contender, choose
from benchmarks.harness.measure import Run, main, parser, release, show_seconds, start
from benchmarks.harness.problem import HEADS, Shape, make_problem
from benchmarks.head import KEY, Case, measure_problem

ERRORS = ("error_logprob", "error_logprob_median", "error_hidden", "error_weight")


def cases_for(run: Run) -> list[Case]:
    if run.quick:
        return [Case(Shape("tiny", 64, 1031), 256, dtype) for dtype in (torch.float32, torch.bfloat16)]
    if run.device.type == "cpu":
        return [Case(HEADS["smollm2-135m"], 512, dtype) for dtype in (torch.float32, torch.bfloat16)]
    return [Case(HEADS["qwen3-8b"], 4096, dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32)]


def run_accuracy(
    run: Run, contenders: Sequence[Contender] = CONTENDERS, seconds: float | None = None, least: int = 3
) -> None:
    table = run.table("accuracy", KEY)
    for case in cases_for(run):
        if run.out_of_time(f"accuracy: {case.shape.model} {case.dtype}"):
            continue
        torch.compiler.reset()
        print(f"accuracy: {case.shape.model} N={case.tokens} {case.dtype}", flush=True)
        problem, truth = make_problem(case.shape, case.tokens, case.dtype, run.device, "trainable")
        for row in measure_problem(run, problem, truth, contenders, repeats=3, seconds=seconds, least=least):
            if row["contender"] == FLOOR:
                continue
            table.add(row)
            if row["status"] == "left out":
                continue
            figures = "  ".join(f"{name.removeprefix('error_')} {row[name]:.1e}" for name in ERRORS if name in row)
            time = show_seconds(row.get("seconds", float("nan")))
            print(f"  {row['contender']:28}{row['status']:>7} {time:>9}  {figures}", flush=True)
        del problem, truth
        release(run.device)


def body() -> None:
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--contenders", help="names with commas (default: all)")
    chosen = arguments.parse_args()
    run_accuracy(start(chosen), choose(chosen.contenders))


if __name__ == "__main__":
    main(body)
