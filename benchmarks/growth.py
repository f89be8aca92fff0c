"""How do time and peak memory grow with the tokens, the vocabulary and the number of microbatches?

    python -m benchmarks.growth [--sweeps tokens,vocabulary,microbatches]

Forward and backward with a trainable head. The fitted exponents k of ``c x^k`` (least squares in the logarithms) go to
``growth_fit.csv``: 1 is linear, 0 is flat. Memory is what comes on top of the gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from benchmarks.harness.contenders import BY_NAME, OURS, Contender, Loss, NotApplicable
from benchmarks.harness.measure import Run, describe_failure, fit_exponent, interleave, main, parser, release, start
from benchmarks.harness.problem import Problem, Shape, Truth, errors, make_problem, verdict
from benchmarks.head import measure_problem
from grpo_fast.errors import UserError
from grpo_kernels import PRESETS, linear_policy_loss

KEY = ("sweep", "x", "N", "H", "V", "dtype", "contender")
FIT_KEY = ("sweep", "contender", "figure")
SWEEPS = ("tokens", "vocabulary", "microbatches")
CONTENDERS = tuple(BY_NAME[name] for name in (OURS, "full logits", "TRL", "Liger"))
SHARED = f"{OURS}, one weight buffer"


def plan(run: Run, sweep: str) -> tuple[list[int], Callable[[int], tuple[Shape, int]], torch.dtype]:
    """The points of a sweep, and head and tokens at a point."""
    gpu = run.device.type == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32
    hidden, vocab, tokens = (4096, 151936, 16384) if gpu else (64, 1031, 256) if run.quick else (128, 32768, 1024)
    if run.quick:
        hidden, vocab, tokens = 64, 1031, 256
    if sweep == "tokens":
        points = [2**k * tokens // 2 for k in range(4)]
        if gpu and not run.quick:
            points = [1024, 4096, 16384, 65536, 262144]
        return points, lambda x: (Shape(f"{hidden}x{vocab}", hidden, vocab), x), dtype
    if sweep == "vocabulary":
        points = [2**k * vocab // 4 for k in range(4)]
        return points, lambda x: (Shape(f"{hidden}x{x}", hidden, x), tokens // 2), dtype
    return [1, 2, 4, 8] if gpu else [1, 2, 4], lambda x: (Shape(f"{hidden}x{vocab}", hidden, vocab), tokens), dtype


def accumulated(problem: Problem, loss: Loss, count: int) -> dict[str, Any]:
    """`count` microbatches, forward and backward; the gradients add up."""
    hidden = problem.hidden.detach().requires_grad_()
    weight = problem.weight.detach().requires_grad_()
    total = torch.zeros((), device=hidden.device)
    for index in range(count):
        rows, batch = problem.batch.part(index, count)
        value, _ = loss(hidden[rows], weight, batch)
        value.backward()
        total += value.detach()
    return {"loss": total, "logprobs": None, "grad_hidden": hidden.grad, "grad_weight": weight.grad}


def with_one_buffer(problem: Problem, count: int) -> dict[str, Any]:
    """Ours, with one float32 gradient of the weight for all microbatches."""
    hidden = problem.hidden.detach().requires_grad_()
    buffer = torch.zeros(problem.weight.shape, device=hidden.device)
    total = torch.zeros((), device=hidden.device)
    for index in range(count):
        rows, batch = problem.batch.part(index, count)
        value = linear_policy_loss(
            hidden[rows], problem.weight, batch.targets, batch.token_advantages, batch.weights, PRESETS["dapo"],
            old_logprobs=batch.old_logprobs, softcap=batch.softcap, grad_weight_buffer=buffer,
        ).loss  # fmt: skip
        value.backward()
        total += value.detach()
    return {"loss": total, "logprobs": None, "grad_hidden": hidden.grad, "grad_weight": buffer}


def measure_microbatches(
    run: Run, problem: Problem, truth: Truth, count: int, contenders: tuple[Contender, ...], seconds: float | None
) -> list[dict[str, Any]]:
    """Rows of one number of microbatches, gated like those of `head`."""
    calls: dict[str, Callable[[], Any]] = {}
    rows: dict[str, dict[str, Any]] = {}
    _, first = problem.batch.part(0, count)
    smaller = replace(problem, hidden=problem.hidden[: first.targets.numel()], batch=first)
    for contender in contenders:
        row = rows[contender.name] = {**problem.columns(), "contender": contender.name, "peer": contender.version()}
        try:
            contender.check(smaller)
            loss = contender.make(first)
            calls[contender.name] = lambda loss=loss: accumulated(problem, loss, count)
        except NotApplicable as reason:
            row |= {"status": "left out", "detail": str(reason)}
    if OURS in calls:
        rows[SHARED] = {**problem.columns(), "contender": SHARED}
        calls[SHARED] = lambda: with_one_buffer(problem, count)
    for name in list(calls):
        try:
            found = errors(truth, **calls[name]())
            wrong = verdict(found, problem.hidden.dtype)
            rows[name] |= {"status": "wrong" if wrong else "ok", "detail": wrong, **found}
        except Exception as error:
            wrong = describe_failure(error)
            rows[name] |= {"status": "failed", "detail": wrong}
        if wrong:
            del calls[name]
        release(run.device)
    measured = interleave(calls, run.device, run.repeats or 3, 2, run.deadline.within(seconds))
    for name, entry in measured.items():
        if entry.failure:
            rows[name] |= {"status": "failed", "detail": entry.failure}
            continue
        beyond = entry.peak_bytes - problem.gradient_bytes
        rows[name] |= {**entry.times.columns(), "peak_bytes": entry.peak_bytes, "beyond_gradients_bytes": beyond}
    return list(rows.values())


def run_sweep(run: Run, sweep: str, seconds: float | None = None) -> None:
    table = run.table("growth", KEY)
    points, at, dtype = plan(run, sweep)
    kept: dict[str, list[tuple[float, float, float]]] = {}
    for x in points:
        if run.deadline.left <= 0:
            print(f"growth: left out for lack of time: {sweep} {x}")
            continue
        torch.compiler.reset()
        shape, tokens = at(x)
        try:
            problem, truth = make_problem(shape, tokens, dtype, run.device, "trainable")
        except torch.OutOfMemoryError:
            print(f"growth: {sweep} {x}: out of memory")
            release(run.device)
            continue
        if sweep == "microbatches":
            rows = measure_microbatches(run, problem, truth, x, CONTENDERS, seconds)
        else:
            rows = measure_problem(run, problem, truth, CONTENDERS, repeats=3, seconds=seconds)
        for row in rows:
            table.add({"sweep": sweep, "x": x, **row})
            if row["status"] == "ok" and row.get("beyond_gradients_bytes") is not None:
                point = (x, row["seconds"], row["beyond_gradients_bytes"])
                kept.setdefault(row["contender"], []).append(point)
        done = "  ".join(f"{name} {points[-1][1]:.3g} s" for name, points in kept.items())
        print(f"growth: {sweep} {x}: {done}", flush=True)
        del problem, truth
        release(run.device)
    fits = run.table("growth_fit", FIT_KEY)
    for name, found in kept.items():
        xs, seconds_, memory = ([point[place] for point in found] for place in range(3))
        for figure, values in (("seconds", seconds_), ("beyond_gradients_bytes", memory)):
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
    arguments.add_argument("--sweeps", default=",".join(SWEEPS), help=f"of {', '.join(SWEEPS)}")
    chosen = arguments.parse_args()
    run = start(chosen)
    sweeps = [sweep.strip() for sweep in chosen.sweeps.split(",")]
    for sweep in sweeps:
        if sweep not in SWEEPS:
            raise UserError(f"--sweeps: {sweep!r} is unknown; there are {', '.join(SWEEPS)}")
    run_growth(run, sweeps)


if __name__ == "__main__":
    main(body)
