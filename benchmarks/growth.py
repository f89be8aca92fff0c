"""How do time and peak memory grow with the tokens, the vocabulary and the number of microbatches?

    python -m benchmarks.growth [--sweeps tokens,vocabulary,microbatches]

Forward and backward with a trainable head. ``growth_fit.csv`` holds the exponents k of ``c x^k``, fitted by least
squares in the logarithms: 1 is linear, 0 is constant. Memory does not include the gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from benchmarks.harness.contenders import BY_NAME, OURS, Contender
from benchmarks.harness.measure import Run, fit_exponent, main, parser, pick, release, start
from benchmarks.harness.problem import Problem, Shape, make_problem
from benchmarks.head import measure_problem
from grpo_kernels import PRESETS, linear_policy_loss

KEY = ("sweep", "x", "N", "H", "V", "dtype", "contender")
FIT_KEY = ("sweep", "contender", "figure")
SWEEPS = ("tokens", "vocabulary", "microbatches")
CONTENDERS = tuple(BY_NAME[name] for name in (OURS, "full logits", "TRL", "Liger"))


def plan(run: Run, sweep: str) -> tuple[list[int], Callable[[int], tuple[Shape, int]], torch.dtype]:
    """The points of a sweep, the head and the number of tokens at a point, and the dtype."""
    gpu = run.device.type == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32
    hidden, vocab, tokens = (64, 1031, 256) if run.quick else (4096, 151936, 16384) if gpu else (128, 32768, 1024)
    if sweep == "tokens":
        points = [1024, 4096, 16384, 65536, 262144] if gpu and not run.quick else [2**k * tokens // 2 for k in range(4)]
        return points, lambda x: (Shape(f"{hidden}x{vocab}", hidden, vocab), x), dtype
    if sweep == "vocabulary":
        points = [2**k * vocab // 4 for k in range(4)]
        return points, lambda x: (Shape(f"{hidden}x{x}", hidden, x), tokens // 2), dtype
    return [1, 2, 4, 8] if gpu else [1, 2, 4], lambda x: (Shape(f"{hidden}x{vocab}", hidden, vocab), tokens), dtype


def with_one_buffer(problem: Problem) -> dict[str, Any]:
    """Our loss with one float32 gradient of the weight for all microbatches."""
    hidden = problem.hidden.detach().requires_grad_()
    buffer = torch.zeros(problem.weight.shape, device=hidden.device)
    total = torch.zeros((), device=hidden.device)
    for rows, batch in problem.parts():
        value = linear_policy_loss(
            hidden[rows], problem.weight, batch.targets, batch.token_advantages, batch.weights, PRESETS["dapo"],
            old_logprobs=batch.old_logprobs, softcap=batch.softcap, grad_weight_buffer=buffer,
        ).loss  # fmt: skip
        value.backward()
        total += value.detach()
    return {"loss": total, "logprobs": None, "grad_hidden": hidden.grad, "grad_weight": buffer}


SHARED = Contender(f"{OURS}, one weight buffer", BY_NAME[OURS].make, cost=BY_NAME[OURS].cost, step=with_one_buffer)


def run_sweep(run: Run, sweep: str, seconds: float | None = None) -> None:
    table = run.table("growth", KEY)
    points, at, dtype = plan(run, sweep)
    kept: dict[str, list[tuple[float, float, float]]] = {}
    for x in points:
        if run.out_of_time(f"growth: {sweep} {x}"):
            continue
        torch.compiler.reset()
        shape, tokens = at(x)
        contenders = CONTENDERS
        try:
            problem, truth = make_problem(shape, tokens, dtype, run.device, "trainable")
        except torch.OutOfMemoryError:
            print(f"growth: {sweep} {x}: out of memory")
            release(run.device)
            continue
        if sweep == "microbatches":
            problem, contenders = replace(problem, microbatches=x), (*CONTENDERS, SHARED)
        for row in measure_problem(run, problem, truth, contenders, repeats=3, seconds=seconds):
            table.add({"sweep": sweep, "x": x, **row})
            if row["status"] == "ok" and row.get("beyond_gradients_bytes") is not None:
                point = (x, row["seconds"], row["beyond_gradients_bytes"])
                kept.setdefault(row["contender"], []).append(point)
        done = "  ".join(f"{name} {found[-1][1]:.3g} s" for name, found in kept.items())
        print(f"growth: {sweep} {x}: {done}", flush=True)
        del problem, truth
        release(run.device)
    fits = run.table("growth_fit", FIT_KEY)
    for name, found in kept.items():
        xs, *measured = ([point[place] for point in found] for place in range(3))
        for figure, values in zip(("seconds", "beyond_gradients_bytes"), measured, strict=True):
            exponent = fit_exponent(xs, values)
            fits.add({
                "sweep": sweep, "contender": name, "figure": figure, "exponent": exponent, "points": len(found),
                "from": xs[0], "to": xs[-1],
            })  # fmt: skip
            print(f"  {name:32}{figure:24} x^{exponent:.2f}", flush=True)


def run_growth(run: Run, sweeps: list[str] | None = None, seconds: float | None = None) -> None:
    for sweep in sweeps or SWEEPS:
        run_sweep(run, sweep, seconds)


def body() -> None:
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--sweeps", help=f"of {', '.join(SWEEPS)}")
    chosen = arguments.parse_args()
    run_growth(start(chosen), pick("sweeps", chosen.sweeps, SWEEPS))


if __name__ == "__main__":
    main(body)
