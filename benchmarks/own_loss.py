"""How much does a user's own loss function cost compared with the same formula built in, forward and backward?

    python -m benchmarks.own_loss

Each formula is run from hidden states (`linear_policy_loss`), where nearly all of the time is in the head, and from
log-probabilities (`policy_loss`). The two forms are timed in turns, and their losses and gradients must agree. On a CPU
the cost is the process's CPU time, on which other work on the machine has little effect.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.harness.measure import Run, main, parser, seconds_of, show_seconds, start
from benchmarks.harness.problem import HEADS, Problem, Shape, make_problem
from grpo_kernels import PRESETS, PolicyObjective, linear_policy_loss, policy_loss
from grpo_kernels.objective import function_objective

KEY = ("formula", "from", "N", "loss")
LIMIT = 1e-5


def clip(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, epsilon: float = 0.2) -> Tensor:
    ratio = torch.exp(logprobs - old_logprobs)
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - epsilon, 1 + epsilon) * advantages)


def clip_sequences(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, cu_seqlens: Tensor, epsilon: float = 3e-4,
    epsilon_high: float = 4e-4,
) -> Tensor:  # fmt: skip
    lengths = cu_seqlens.diff()
    means = torch.segment_reduce(logprobs - old_logprobs, "mean", lengths=lengths, unsafe=True)
    ratio = torch.exp(means).repeat_interleave(lengths)
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - epsilon, 1 + epsilon_high) * advantages)


class Formula(NamedTuple):
    """A formula as a built-in objective and as a function."""

    built_in: PolicyObjective
    function: PolicyObjective


FORMULAS = {
    "clip of a token's ratio (dapo)": Formula(PRESETS["dapo"], function_objective(clip, scales_with_advantage=True)),
    "clip of a sequence's ratio (gspo)": Formula(
        PRESETS["gspo"],
        function_objective(clip_sequences, aggregation="sequence_mean", scales_with_advantage=True),
    ),
}


def from_hidden(problem: Problem, objective: PolicyObjective) -> tuple[Tensor, ...]:
    """The loss and its gradients, with a trainable head."""
    batch = problem.batch
    hidden, weight = problem.hidden.detach().requires_grad_(), problem.weight.detach().requires_grad_()
    result = linear_policy_loss(
        hidden, weight, batch.targets, batch.token_advantages, batch.weights, objective,
        old_logprobs=batch.old_logprobs, cu_seqlens=offsets(problem),
    )  # fmt: skip
    result.loss.backward()
    return result.loss.detach(), hidden.grad, weight.grad


def from_logprobs(problem: Problem, objective: PolicyObjective) -> tuple[Tensor, ...]:
    batch = problem.batch
    generator = torch.Generator(problem.hidden.device).manual_seed(0)
    noise = torch.randn(batch.old_logprobs.shape, generator=generator, device=problem.hidden.device)
    leaf = (batch.old_logprobs + 0.3 * noise).requires_grad_()
    loss = policy_loss(
        leaf, batch.token_advantages, batch.weights, objective, old_logprobs=batch.old_logprobs,
        cu_seqlens=offsets(problem),
    ).loss  # fmt: skip
    loss.backward()
    return loss.detach(), leaf.grad


def cost_of(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of a call: CPU time of this process on a CPU."""
    if device.type != "cpu":
        return seconds_of(call, device)
    begin = time.process_time()
    call()
    return time.process_time() - begin


def offsets(problem: Problem) -> Tensor:
    batch = problem.batch
    length = batch.targets.numel() // batch.sequences
    return torch.arange(batch.sequences + 1, device=batch.targets.device) * length


def run_own_loss(run: Run, tokens: int = 2048) -> None:
    table = run.table("own_loss", KEY)
    shape = Shape("tiny", 64, 1031) if run.quick else HEADS["smollm2-135m"]
    problem, _ = make_problem(shape, 256 if run.quick else tokens, torch.float32, run.device, "trainable")
    calls: dict[str, Callable[..., tuple[Tensor, ...]]] = {
        "hidden states": from_hidden,
        "log-probabilities": from_logprobs,
    }
    for place, call in calls.items():
        for name, formula in FORMULAS.items():
            forms = {"built in": formula.built_in, "own function": formula.function}
            results = [call(problem, objective) for objective in forms.values()]
            error = max(
                ((ours - own).norm() / own.norm().clamp(min=1e-12)).item() for own, ours in zip(*results, strict=True)
            )
            timed: dict[str, Callable[[], Any]] = {
                form: partial(call, problem, objective) for form, objective in forms.items()
            }
            seconds = {form: [] for form in timed}
            for _ in range(run.repeats or 9):
                for form, function in timed.items():
                    seconds[form].append(cost_of(function, run.device))
            medians = {form: statistics.median(values) for form, values in seconds.items()}
            for form, median in medians.items():
                row = {"formula": name, "from": place, "N": problem.batch.targets.numel(), "loss": form}
                row |= {"head": shape.model, "status": "ok" if error <= LIMIT else "wrong", "error": error}
                row |= {"seconds": median, "repeats": len(seconds[form])}
                row |= {"to_built_in": median / medians["built in"]}
                table.add(row)
                print(f"  {place:18} {name:36} {form:14}{show_seconds(median):>12}", flush=True)


def body() -> None:
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--tokens", type=int, default=2048)
    chosen = arguments.parse_args()
    run_own_loss(start(chosen), chosen.tokens)


if __name__ == "__main__":
    main(body)
