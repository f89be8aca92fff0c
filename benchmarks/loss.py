"""How fast are the elementwise operations, forward and backward, next to plain and compiled PyTorch?

    python -m benchmarks.loss

The floor is what the operation must read and write (the CSV has the formula) at the bandwidth of copying a large
tensor in the same run. Liger's Triton loss starts from the logits, so it is measured in `head`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.harness.measure import (
    Run,
    describe_failure,
    interleave,
    main,
    parser,
    pick,
    seconds_of,
    show_seconds,
    start,
)
from grpo_fast.errors import UserError
from grpo_kernels import PRESETS, kl_estimate, masked_mean, policy_loss

KEY = ("operation", "N", "contender")
LIMIT = 1e-4
BETA = 0.1
Inputs = dict[str, Tensor]


class Operation(NamedTuple):
    """Our operation, the same in plain PyTorch, and the float32 bytes that it must read and write per token."""

    ours: Callable[[Inputs], Tensor]
    plain: Callable[[Inputs], Tensor]
    bytes_per_token: int
    formula: str


def _our_loss(x: Inputs) -> Tensor:
    return policy_loss(x["logprobs"], x["advantages"], x["weights"], PRESETS["dapo"], old_logprobs=x["old"]).loss


def _plain_loss(x: Inputs) -> Tensor:
    ratio = torch.exp(x["logprobs"] - x["old"])
    terms = torch.minimum(ratio * x["advantages"], ratio.clamp(0.8, 1.2) * x["advantages"])
    return -(terms * x["weights"]).sum()


_WITH_KL = replace(PRESETS["dapo"], beta=BETA)


def _our_loss_with_kl(x: Inputs) -> Tensor:
    return policy_loss(
        x["logprobs"], x["advantages"], x["weights"], _WITH_KL, old_logprobs=x["old"], ref_logprobs=x["ref"]
    ).loss


def _plain_kl(x: Inputs) -> Tensor:
    difference = x["ref"] - x["logprobs"]
    return torch.exp(difference) - difference - 1


OPERATIONS = {
    "policy_loss": Operation(_our_loss, _plain_loss, 20, "20 N: read 4 float32, write 1"),
    "policy_loss with KL": Operation(
        _our_loss_with_kl,
        lambda x: _plain_loss(x) + BETA * (_plain_kl(x) * x["weights"]).sum(),
        24,
        "24 N: read 5 float32, write 1",
    ),
    "kl_estimate": Operation(
        lambda x: kl_estimate(x["logprobs"], x["ref"]), _plain_kl, 20, "20 N: read 3 float32, write 2"
    ),
    "masked_mean": Operation(
        lambda x: masked_mean(x["logprobs"], x["mask"]),
        lambda x: (x["logprobs"] * x["mask"]).sum() / x["mask"].sum(),
        9,
        "9 N: read 1 float32 and 1 bool, write 1 float32",
    ),
}


def make_inputs(tokens: int, device: torch.device) -> Inputs:
    generator = torch.Generator(device).manual_seed(0)

    def normal() -> Tensor:
        return torch.randn(tokens, generator=generator, device=device)

    logprobs = normal().sub_(2)
    return {
        "logprobs": logprobs,
        "old": logprobs + 0.3 * normal(),
        "ref": logprobs + 0.3 * normal(),
        "advantages": normal(),
        "weights": torch.full((tokens,), 1 / tokens, device=device),
        "mask": torch.rand(tokens, generator=generator, device=device) < 0.8,
    }


def step(function: Callable[[Inputs], Tensor], inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The value, and the gradient with respect to the log-probabilities."""
    leaf = inputs["logprobs"].detach().requires_grad_()
    value = function({**inputs, "logprobs": leaf})
    value.backward(torch.ones_like(value))
    return value.detach(), leaf.grad


def bandwidth(device: torch.device, quick: bool) -> float:
    """Bytes read and written per second when a large tensor is copied."""
    source = torch.ones((4 if quick else 256) << 18, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * source.nbytes / min(seconds_of(lambda: target.copy_(source), device) for _ in range(10))


def run_loss(run: Run, sizes: list[int] | None = None, operations: list[str] | None = None) -> None:
    device, table = run.device, run.table("loss", KEY)
    default = [4096] if run.quick else [1 << 13, 1 << 17, 1 << 21] + ([1 << 24] if device.type == "cuda" else [])
    rate = bandwidth(device, run.quick)
    print(f"loss: copying moves {rate / 1e9:,.1f} GB/s", flush=True)
    # Written before each call, to clear the GPU's cache.
    flushed = torch.empty(64 << 20, device=device) if device.type == "cuda" else None
    for tokens in sizes or default:
        for name in operations or OPERATIONS:
            if run.out_of_time(f"loss: {name} N={tokens}"):
                continue
            operation, inputs = OPERATIONS[name], make_inputs(tokens, device)
            double = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
            truth = step(operation.plain, double)
            functions = {
                "grpo-fast": operation.ours,
                "PyTorch": operation.plain,
                "PyTorch, compiled": torch.compile(operation.plain, dynamic=False),
            }
            calls: dict[str, Callable[[], Any]] = {}
            rows = {contender: {"operation": name, "N": tokens, "contender": contender} for contender in functions}
            for contender, function in functions.items():
                row = rows[contender]
                try:
                    found = step(function, inputs)
                    error = max(((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, truth, strict=True))
                    row |= {"status": "ok" if error <= LIMIT else "wrong", "error": error}
                    if error <= LIMIT:
                        calls[contender] = partial(step, function, inputs)
                except Exception as reason:
                    row |= {"status": "failed", "detail": describe_failure(reason)}
            before = flushed.zero_ if flushed is not None else None
            measured = interleave(calls, device, run.repeats or 15, deadline=run.deadline, before=before)
            floor = operation.bytes_per_token * tokens / rate
            for contender, row in rows.items():
                entry = measured.get(contender)
                if entry is not None and entry.failure:
                    row |= {"status": "failed", "detail": entry.failure}
                elif entry is not None:
                    row |= {
                        **entry.times.columns(),
                        "to_floor": entry.times.median / floor,
                        "peak_bytes": entry.peak_bytes,
                    }
                row |= {"floor_seconds": floor, "needed_bytes": operation.formula, "gb_per_second": rate / 1e9}
                table.add(row)
                seconds = entry.times.median if entry else float("nan")
                print(f"  {name} N={tokens} {contender:20}{row['status']:>8}{show_seconds(seconds):>12}", flush=True)
        torch.compiler.reset()


def body() -> None:
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--sizes", help="numbers of tokens, with commas")
    arguments.add_argument("--operations", help=f"of {', '.join(OPERATIONS)}")
    chosen = arguments.parse_args()
    run = start(chosen)
    sizes = chosen.sizes.split(",") if chosen.sizes else []
    for size in sizes:
        if not size.isdigit() or int(size) < 1:
            raise UserError(f"--sizes: {size!r} is not a number of tokens")
    run_loss(run, [int(size) for size in sizes] or None, pick("operations", chosen.operations, OPERATIONS))


if __name__ == "__main__":
    main(body)
