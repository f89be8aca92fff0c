"""When does it pay to gather the rows of the weight that a truncated sampler kept, and when to mask the whole product?

    python -m benchmarks.kept_ids [--kept 4,64,1024]

Each token keeps the same number of ids, drawn by Zipf's law, as frequent tokens are kept most often. "gathered" and
"masked" are the two ways of `linear_policy_loss` with a support; "whole" has none. Both are compared with float64
before they are timed. `predicted` is the ratio of the two ways by bytes and flops on an H100 (see `predicted_ratio`);
`share` is the kept share of the vocabulary, which decides by default (`grpo_kernels.budget.gather_share`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.harness.measure import Run, interleave, main, parser, release, show_seconds, start
from benchmarks.harness.problem import HEADS, Shape
from grpo_fast.errors import UserError
from grpo_kernels import PRESETS, Support, _support_pass, linear_policy_loss
from grpo_kernels.budget import gather_share
from grpo_kernels.cost_model import GPUS

KEY = ("model", "N", "H", "V", "dtype", "mode", "kept", "contender")
KEPT = (4, 16, 64, 256, 1024, 4096)
MODES = ("scoring", "trainable")
# Most that log-probabilities may differ from float64, and gradients in the norm: 16-bit gradients are rounded once.
ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


def cases_for(run: Run) -> list[tuple[Shape, int, torch.dtype]]:
    if run.quick:
        return [(Shape("tiny", 64, 1031), 64, torch.float32)]
    if run.device.type == "cpu":
        return [(HEADS["smollm2-135m"], 256, dtype) for dtype in (torch.float32, torch.bfloat16)]
    return [(HEADS["qwen3-8b"], 16384, torch.bfloat16), (HEADS["smollm2-135m"], 16384, torch.float32)]


def draw_support(targets: Tensor, vocab: int, kept: int) -> Support:
    """`kept` ids of each target, which is one of them."""
    weights = 1 / torch.arange(1, vocab + 1, device=targets.device, dtype=torch.float32)
    ids = torch.stack([torch.multinomial(weights, kept) for _ in range(len(targets))])
    missing = ~(ids == targets[:, None]).any(1)
    ids[missing, 0] = targets[missing]
    offsets = torch.arange(len(targets) + 1, device=targets.device) * kept
    return Support(ids.flatten().int(), offsets)


def call(
    inputs: dict[str, Any], mode: str, support: Support | None, gathered: bool, backend: str = "auto"
) -> dict[str, Tensor]:
    """The loss with gradients, or with `mode` "scoring" the loss alone."""
    leaves = {name: inputs[name].detach().requires_grad_(mode == "trainable") for name in ("hidden", "weight")}
    with mock.patch.object(_support_pass, "gathers", return_value=gathered):
        result = linear_policy_loss(
            **{**inputs, **leaves}, objective=PRESETS["dapo"], support=support, rows="all", backend=backend
        )
    if mode == "trainable":
        result.loss.backward()
    return {"logprobs": result.logprobs, **{name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}}


def predicted_ratio(shape: Shape, kept: int, dtype: torch.dtype) -> float:
    """Time masked over time gathered on an H100: its flops, and the rows of the weight from memory, without caches."""
    gpu = GPUS["h100"]
    rate = gpu.forward if dtype.itemsize == 2 else 50e12
    return (2 * shape.vocab * shape.hidden / rate) / (kept * shape.hidden * dtype.itemsize / gpu.bandwidth)


def verdict(found: dict[str, Tensor], truth: dict[str, Tensor], dtype: torch.dtype) -> str:
    """ "ok", or what differs from float64 by how much."""
    for name, value in found.items():
        difference = value.double() - truth[name]
        error = difference.abs().max() if name == "logprobs" else difference.norm() / truth[name].norm()
        if not error <= ALLOWED[dtype]:
            return f"wrong: {name} differs by {error:.2g}"
    return "ok"


def run_kept_ids(run: Run, kept: tuple[int, ...] = KEPT) -> None:
    table = run.table("kept_ids", KEY)
    for shape, tokens, dtype in cases_for(run):
        torch.manual_seed(0)
        targets = torch.randint(0, shape.vocab, (tokens,), device=run.device)
        inputs = {
            "hidden": torch.randn(tokens, shape.hidden, device=run.device).to(dtype),
            "weight": (torch.randn(shape.vocab, shape.hidden, device=run.device) / shape.hidden**0.5).to(dtype),
            "targets": targets,
            "advantages": torch.randn(tokens, device=run.device),
            "weights": torch.full((tokens,), 1 / tokens, device=run.device),
        }
        for count in (count for count in kept if count < shape.vocab):
            if run.out_of_time(f"kept_ids: {shape.model} {dtype} {count}"):
                continue
            support = draw_support(targets, shape.vocab, count)
            first = slice(0, 64)
            few = {name: value if name == "weight" else value[first] for name, value in inputs.items()}
            exact = {name: value.double() if value.is_floating_point() else value for name, value in few.items()}
            part = support.take(torch.arange(64, device=run.device))
            truth = call(exact, "trainable", part, gathered=False, backend="reference")
            print(f"kept_ids: {shape.model} N={tokens} {dtype}, {count} of {shape.vocab} ids a token", flush=True)
            for mode in MODES:
                statuses = {
                    name: verdict(call(few, "trainable", part, name == "gathered"), truth, dtype)
                    for name in ("gathered", "masked")
                }
                calls: dict[str, Callable[[], Any]] = {"whole": partial(call, inputs, mode, None, False)}
                for name, status in statuses.items():
                    if status == "ok":
                        calls[name] = partial(call, inputs, mode, support, name == "gathered")
                measured = interleave(calls, run.device, repeats=run.repeats or 5)
                share = count / shape.vocab
                for name in ("whole", *statuses):
                    facts = {"model": shape.model, "N": tokens, "H": shape.hidden, "V": shape.vocab}
                    facts |= {"dtype": str(dtype).removeprefix("torch."), "mode": mode, "kept": count, "share": share}
                    facts |= {"contender": name, "status": statuses.get(name, "ok")}
                    if name in measured and not measured[name].failure:
                        facts |= measured[name].times.columns() | {"peak_bytes": measured[name].peak_bytes}
                    if name == "gathered":
                        chosen = share <= gather_share(run.device, dtype)
                        facts |= {"chosen": chosen, "predicted": predicted_ratio(shape, count, dtype)}
                    table.add(facts)
                    time = show_seconds(facts.get("seconds", float("nan")))
                    print(f"  {mode:10} {name:10} {facts['status']:>6} {time:>10}", flush=True)
        release(run.device)


def body() -> None:
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--kept", help=f"kept ids of a token, with commas (default: {','.join(map(str, KEPT))})")
    chosen = arguments.parse_args()
    kept = KEPT
    if chosen.kept:
        if not all(part.isdigit() and int(part) for part in chosen.kept.split(",")):
            raise UserError(f"--kept: {chosen.kept!r} must be numbers above 0, with commas")
        kept = tuple(int(part) for part in chosen.kept.split(","))
    run_kept_ids(start(chosen), kept)


if __name__ == "__main__":
    main(body)
