"""Are the operations right at full size? Their results against float64, computed in blocks on the same device.

    python -m benchmarks.gpu_proof.equivalence

The products of the largest heads have more than 2^31 elements, one vocabulary is a multiple of no power of two, and
one head stays in float32 under bfloat16 autocast. Memory that a kernel leaves unwritten holds NaN. Inputs and truth
are those of `harness/problem.py`; the limits are those of correct kernels, far below those for peers.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.measure import (
    Run,
    available_bytes,
    describe_failure,
    main,
    parser,
    release,
    seconds_of,
    show_bytes,
    start,
)
from benchmarks.harness.problem import HEADS, Batch, Problem, Shape, Truth, errors, grpo_loss, make_problem
from grpo_kernels import PRESETS, linear_logprob, linear_policy_loss
from grpo_kernels._backend import triton_obstacle

KEY = ("model", "N", "H", "V", "dtype", "head", "backend")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
# Float32 sums in another order: log-probabilities in nats, and the loss relative to sum |w A|. Gradients in the norm:
# far below the 3e-4 of TF32 products; or one rounding of a product's 16-bit operands and one of the gradient.
EXACT = {"error_logprob": 5e-5, "error_loss": 2e-5}
GRADIENT = {F32: 1e-4, BF16: 3 * 2.0**-9, F16: 3 * 2.0**-12}
# The truth of a case may take so many seconds; devices for games have 1/64 of their rate in float64.
TRUTH_SECONDS, FEWEST_TOKENS = 20.0, 256
Outcome = dict[str, Tensor | None]


@dataclass(frozen=True)
class Case:
    """A head, the number of tokens, the dtype and which calls are compared; see `CALLS`."""

    shape: Shape
    tokens: int
    dtype: torch.dtype
    calls: tuple[str, ...]


ALL = ("trainable", "frozen", "scoring", "logprob")
UNEVEN = Shape("gpt2", 768, 50257)
ON_GPU = [
    Case(HEADS["qwen3-8b"], 16384, BF16, ALL),
    Case(HEADS["qwen3-1.7b"], 8192, BF16, ("autocast", "trainable")),
    Case(HEADS["qwen3-8b"], 4096, F16, ALL),
    Case(HEADS["qwen3-1.7b"], 4096, F32, ALL),
    Case(UNEVEN, 4099, BF16, (*ALL, "autocast")),
    Case(UNEVEN, 4099, F16, ALL),
    Case(UNEVEN, 4099, F32, ALL),
    Case(HEADS["gemma2-2b"], 4096, BF16, ALL),
    Case(HEADS["smollm2-135m"], 65536, BF16, ALL),
]
TINY, CAPPED = Shape("tiny", 64, 1031), Shape("tiny-softcap", 64, 1031, 30.0)
QUICK = [
    *(Case(TINY, 257, dtype, (*ALL, "autocast") if dtype == BF16 else ALL) for dtype in (BF16, F16, F32)),
    Case(CAPPED, 256, BF16, ALL),
]


def policy_loss_of(hidden: Tensor, weight: Tensor, batch: Batch, backend: str) -> tuple[Tensor, Tensor]:
    result = linear_policy_loss(
        hidden, weight, batch.targets, batch.token_advantages, batch.weights, PRESETS["dapo"],
        old_logprobs=batch.old_logprobs, softcap=batch.softcap, backend=backend,
    )  # fmt: skip
    return result.loss, result.logprobs


def logprob_loss_of(hidden: Tensor, weight: Tensor, batch: Batch, backend: str) -> tuple[Tensor, Tensor]:
    logprobs = linear_logprob(hidden, weight, batch.targets, softcap=batch.softcap, backend=backend)
    return grpo_loss(logprobs, batch), logprobs


def gradients(
    problem: Problem, backend: str, loss: Callable[..., tuple[Tensor, Tensor]], trained: bool = True, wide: bool = False
) -> Outcome:
    """Results of one step. `wide`: float32 copies of the same values under autocast in the problem's dtype.

    In float16 with a loss scale, as it is trained: its smallest normal number is 6e-5, and a weight is 1 / tokens.
    """
    scale = 16.0 * 2 ** problem.tokens.bit_length() if problem.hidden.dtype == F16 else 1.0
    dtype, device = problem.hidden.dtype, problem.hidden.device.type
    hidden, weight = (t.detach().to(F32 if wide else dtype) for t in (problem.hidden, problem.weight))
    hidden.requires_grad_()
    weight.requires_grad_(trained)
    with torch.autocast(device, dtype, enabled=wide):
        value, logprobs = loss(hidden, weight, problem.batch, backend)
    (scale * value).backward()
    found = {"grad_hidden": hidden.grad, "grad_weight": weight.grad}
    if scale != 1.0:
        found = {name: None if grad is None else grad.float() / scale for name, grad in found.items()}
    return {"loss": value, "logprobs": logprobs, **found}


@torch.no_grad()
def scores(problem: Problem, backend: str) -> Outcome:
    batch = problem.batch
    logprobs = linear_logprob(problem.hidden, problem.weight, batch.targets, softcap=batch.softcap, backend=backend)
    return {"loss": None, "logprobs": logprobs, "grad_hidden": None, "grad_weight": None}


CALLS: dict[str, Callable[[Problem, str], Outcome]] = {
    "trainable": lambda problem, backend: gradients(problem, backend, policy_loss_of),
    "frozen": lambda problem, backend: gradients(problem, backend, policy_loss_of, trained=False),
    "scoring": scores,
    "logprob": lambda problem, backend: gradients(problem, backend, logprob_loss_of),
    "autocast": lambda problem, backend: gradients(problem, backend, policy_loss_of, wide=True),
}


def compare(problem: Problem, truth: Truth, call: str, backend: str) -> dict[str, Any]:
    """The columns of one call: its errors, and the largest of them as a `share` of what is allowed."""
    try:
        found = errors(truth, **CALLS[call](problem, backend))
    except Exception as error:
        return {"status": "failed", "detail": describe_failure(error)}
    finally:
        release(problem.hidden.device)
    limits = EXACT | dict.fromkeys(("error_hidden", "error_weight"), GRADIENT[problem.hidden.dtype])
    # A comparison with NaN is false.
    wrong = [f"{name} is {found[name]:.2g}, above {limit:.2g}" for name, limit in limits.items()
             if name in found and not found[name] <= limit]  # fmt: skip
    share = max(found[name] / limit for name, limit in limits.items() if name in found)
    return {"status": "wrong" if wrong else "ok", "detail": "; ".join(wrong), "share": share, **found}


def float64_rate(device: torch.device) -> float:
    """Floating-point operations a second of a float64 product."""
    size = 4096 if device.type == "cuda" else 256
    a = torch.randn(size, size, dtype=torch.float64, device=device)
    torch.mm(a, a)
    return 2 * size**3 / min(seconds_of(lambda: torch.mm(a, a), device) for _ in range(3))


def affordable_tokens(case: Case, rate: float) -> int:
    """The case's tokens, halved until the truth takes at most `TRUTH_SECONDS` at `rate`."""
    tokens = case.tokens
    while tokens > FEWEST_TOKENS and 2 * tokens * case.shape.hidden * case.shape.vocab > TRUTH_SECONDS * rate:
        tokens //= 2
    return tokens


def needed_bytes(case: Case) -> int:
    """Weight, its gradient and their float32 copies, hidden states likewise, and blocks of the truth."""
    return 16 * case.shape.hidden * (case.shape.vocab + case.tokens) + (4 << 30)


def run_equivalence(run: Run, cases: list[Case]) -> bool:
    """Compare and print every case; whether nothing was wrong and nothing failed."""
    table, right = run.table("equivalence", KEY), True
    backends = [*(["triton"] if triton_obstacle(run.device, F32) is None else []), "torch"]
    if "triton" not in backends:
        print(f"equivalence: the portable path alone: {triton_obstacle(run.device, F32)}", flush=True)
    rate = float64_rate(run.device)
    for case in cases:
        name = f"{case.shape.model} {case.shape.hidden}x{case.shape.vocab} {str(case.dtype).removeprefix('torch.')}"
        if run.deadline.left <= 0:
            print(f"{name}: left out for lack of time", flush=True)
            continue
        if run.device.type == "cuda" and needed_bytes(case) > available_bytes(run.device):
            print(f"{name}: left out: it needs about {show_bytes(needed_bytes(case))}", flush=True)
            continue
        tokens = affordable_tokens(case, rate)
        if tokens < case.tokens:
            print(f"{name}: {tokens} tokens in place of {case.tokens}: float64 runs at {rate / 1e12:.2g} TFLOP/s here")
        problem, truth = make_problem(case.shape, tokens, case.dtype, run.device, "trainable")
        for call in case.calls:
            for backend in backends:
                row = {**problem.columns(), "head": call, "backend": backend}
                row |= compare(problem, truth, call, backend)
                table.add(row)
                right = right and row["status"] == "ok"
                figures = "  ".join(f"{key[6:]} {value:.1e}" for key, value in row.items() if key.startswith("error_"))
                print(f"{name} N={tokens} {call:9} {backend:6} {row['status']:6} {row['detail']} {figures}", flush=True)
        del problem, truth
        release(run.device)
    return right


def body() -> None:
    run = start(parser(__doc__.splitlines()[0]).parse_args())
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    if not run_equivalence(run, QUICK if run.quick or run.device.type == "cpu" else ON_GPU):
        raise SystemExit(1)


if __name__ == "__main__":
    main(body)
