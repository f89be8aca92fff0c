"""The implementations from hidden states to the GRPO loss that are compared, behind one interface.

A contender makes a function ``loss(hidden [N, H], weight [V, H], batch) -> (loss, log-probabilities [N] or None)``
that can be differentiated and, if it can, a function ``score(hidden, weight, batch) -> [N]`` without gradients.
Contenders that only compute log-probabilities are followed by the same plain PyTorch loss. Peers are called through
their public functions with their own defaults.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness.measure import available_bytes, missing, pick, show_bytes, version
from benchmarks.harness.problem import EPSILON, MODES, Batch, Problem, cap_logits, grpo_loss
from grpo_kernels import PRESETS, linear_logprob, linear_policy_loss

Loss = Callable[[Tensor, Tensor, Batch], tuple[Tensor, Tensor | None]]
Score = Callable[[Tensor, Tensor, Batch], Tensor]


class NotApplicable(Exception):
    """A contender cannot take part in a case; the message is the reason, in one line."""


@dataclass(frozen=True)
class Contender:
    """One row of the tables.

    Attributes:
        name: its name in tables and figures.
        make: returns its `Loss` for batches of the given one's size.
        make_score: returns its `Score`; None if it has none.
        package: the name for pip; its version is recorded.
        module: the module that it is imported from.
        gpu_only: whether it needs a CUDA device.
        softcap: whether it supports a softcap.
        full_logits: how many float32 copies of ``[N, V]`` it holds at its peak.
        cost: its passes over the head in each of MODES, as formulas.
        step: replaces :func:`forward_backward` for a whole problem.
    """

    name: str
    make: Callable[[Batch], Loss]
    make_score: Callable[[Batch], Score] | None = None
    package: str | None = None
    module: str | None = None
    gpu_only: bool = False
    softcap: bool = True
    full_logits: float = 0.0
    cost: tuple[str, str, str] = ("4U", "3U", "1U")
    step: Callable[[Problem], dict[str, Any]] | None = None

    def cost_in(self, mode: str) -> str:
        return self.cost[MODES.index(mode)]

    def version(self) -> str:
        return f"{self.package} {version(self.package)}" if self.package and version(self.package) else ""

    def missing(self) -> str | None:
        """Why its package cannot be imported, in one line; None if it can."""
        return missing(self.module, self.package or self.module) if self.module else None

    def check(self, problem: Problem) -> None:
        """Raise NotApplicable if it is not installed, does not support the case, or would not fit into memory."""
        device = problem.hidden.device
        if self.gpu_only and device.type != "cuda":
            raise NotApplicable("needs a CUDA device")
        if reason := self.missing():
            raise NotApplicable(reason)
        if problem.batch.softcap is not None and not self.softcap:
            raise NotApplicable("has no softcap")
        if problem.mode == "scoring" and self.make_score is None:
            raise NotApplicable("has no scoring without a loss")
        tokens = problem.tokens / problem.microbatches
        need = self.full_logits * 4 * tokens * problem.shape.vocab + problem.gradient_bytes
        if self.full_logits and need > 0.9 * available_bytes(device):
            raise NotApplicable(f"needs about {show_bytes(need)} of memory")


def _ours(batch: Batch) -> Loss:
    def loss(hidden: Tensor, weight: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        result = linear_policy_loss(
            hidden, weight, batch.targets, batch.token_advantages, batch.weights, PRESETS["dapo"],
            old_logprobs=batch.old_logprobs, softcap=batch.softcap,
        )  # fmt: skip
        return result.loss, result.logprobs

    return loss


def _ours_score(hidden: Tensor, weight: Tensor, batch: Batch) -> Tensor:
    return linear_logprob(hidden, weight, batch.targets, softcap=batch.softcap)


def _full_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None) -> Tensor:
    """A linear head in the weights' dtype, then a log-softmax in float32."""
    logits = cap_logits((hidden @ weight.T).float(), softcap)
    return torch.log_softmax(logits, -1).gather(1, targets[:, None]).squeeze(1)


def _from_logprobs(logprobs: Callable[[Tensor, Tensor, Batch], Tensor]) -> Callable[[Batch], Loss]:
    def make(batch: Batch) -> Loss:
        def loss(hidden: Tensor, weight: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
            found = logprobs(hidden, weight, batch)
            return grpo_loss(found, batch), found

        return loss

    return make


def _full(hidden: Tensor, weight: Tensor, batch: Batch) -> Tensor:
    return _full_logprobs(hidden, weight, batch.targets, batch.softcap)


def _compiled_full(batch: Batch) -> Loss:
    softcap, sequences, total = batch.softcap, batch.sequences, batch.total

    @torch.compile(dynamic=False)
    def run(hidden, weight, targets, advantages, weights, old_logprobs):
        inside = Batch(targets, advantages, weights, old_logprobs, sequences, total, softcap)
        found = _full_logprobs(hidden, weight, targets, softcap)
        return grpo_loss(found, inside), found

    return lambda hidden, weight, batch: run(
        hidden, weight, batch.targets, batch.advantages, batch.weights, batch.old_logprobs
    )


def _compiled_full_score(batch: Batch) -> Score:
    run = torch.compile(_full_logprobs, dynamic=False)
    return lambda hidden, weight, batch: run(hidden, weight, batch.targets, batch.softcap)


def _torch_lce(hidden: Tensor, weight: Tensor, batch: Batch) -> Tensor:
    if not hasattr(F, "linear_cross_entropy"):
        raise NotApplicable(f"torch {torch.__version__} has no linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions()
    return -F.linear_cross_entropy(hidden, weight, batch.targets, reduction="none", options=options).float()


def _trl(hidden: Tensor, weight: Tensor, batch: Batch) -> Tensor:
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE

    # Arguments: bias, targets, temperature, vocabulary chunk, softcap, logit scale, other outputs (the trainer also
    # requests entropies, which take a little longer).
    return ChunkedLogProbFunction.apply(
        hidden, weight, None, batch.targets, 1.0, _CHUNKED_LOGPROB_CHUNK_SIZE, batch.softcap, 1.0, ()
    )[0]


def _liger(batch: Batch) -> Loss:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    module = LigerFusedLinearGRPOLoss(
        beta=0.0, use_ref_model=False, epsilon_low=EPSILON, epsilon_high=EPSILON, loss_type="dapo", temperature=1.0
    )

    def loss(hidden: Tensor, weight: Tensor, batch: Batch) -> tuple[Tensor, None]:
        rows = batch.sequences, -1
        found, _ = module(
            hidden.view(*rows, hidden.shape[-1]), weight, batch.targets.view(rows), torch.ones_like(
                batch.targets.view(rows), dtype=torch.float32
            ), batch.advantages, old_per_token_logps=batch.old_logprobs.view(rows),
            num_items_in_batch=torch.tensor(batch.total, device=hidden.device),
        )  # fmt: skip
        return found, None

    return loss


def _liger_triton(batch: Batch) -> Loss:
    from liger_kernel.transformers.grpo_loss import triton_grpo_loss

    def loss(hidden: Tensor, weight: Tensor, batch: Batch) -> tuple[Tensor, None]:
        rows = batch.sequences, -1
        # It expects logits at one position more than there are targets.
        padded = F.pad(hidden.view(*rows, hidden.shape[-1]), (0, 0, 0, 1))
        found, _ = triton_grpo_loss(
            padded @ weight.T, batch.old_logprobs.view(rows), None, batch.targets.view(rows), batch.advantages,
            torch.ones_like(batch.targets.view(rows)), temperature=1.0, beta=0.0, eps_low=EPSILON, eps_high=EPSILON,
            loss_type="dapo", reduce=True, num_items_in_batch=torch.tensor(batch.total, device=hidden.device),
        )  # fmt: skip
        return found, None

    return loss


def _cce(hidden: Tensor, weight: Tensor, batch: Batch) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(hidden, weight, batch.targets, softcap=batch.softcap, reduction="none").float()


def _quack(hidden: Tensor, weight: Tensor, batch: Batch) -> Tensor:
    # Its chunked function sums over the tokens; a loss with token weights needs the function with full logits.
    from quack.linear_cross_entropy import linear_cross_entropy_func

    return -linear_cross_entropy_func(hidden, weight, None, batch.targets, reduction="none").float()


OURS = "grpo-fast"
FLOOR = "bare GEMMs"
FLOOR_BYTES = {"cpu": 1 << 30, "cuda": 8 << 30}
CONTENDERS: tuple[Contender, ...] = (
    Contender(OURS, _ours, lambda _: _ours_score, cost=("3U", "2U", "1U")),
    Contender("full logits", _from_logprobs(_full), lambda _: _full, full_logits=3.5, cost=("3U", "2U", "1U")),
    Contender(
        "full logits, compiled", _compiled_full, _compiled_full_score, full_logits=2.5, cost=("3U", "2U", "1U")
    ),
    Contender(
        "torch linear_cross_entropy", _from_logprobs(_torch_lce), lambda _: _torch_lce, softcap=False,
        cost=("4U", "3U", "1U"),
    ),
    Contender("TRL", _from_logprobs(_trl), lambda _: _trl, package="trl", module="trl.kernels"),
    Contender("Liger", _liger, package="liger-kernel", module="liger_kernel.chunked_loss", softcap=False),
    Contender(
        "Liger Triton loss", _liger_triton, package="liger-kernel", module="liger_kernel.transformers.grpo_loss",
        gpu_only=True, softcap=False, full_logits=1.5, cost=("3U", "2U", "1U"),
    ),
    Contender(
        "cut-cross-entropy", _from_logprobs(_cce), lambda _: _cce, package="cut-cross-entropy",
        module="cut_cross_entropy", gpu_only=True,
    ),
    Contender(
        "QuACK", _from_logprobs(_quack), lambda _: _quack, package="quack-kernels",
        module="quack.linear_cross_entropy", gpu_only=True, softcap=False, full_logits=1.5, cost=("3U", "2U", "1U"),
    ),
)  # fmt: skip
BY_NAME = {contender.name: contender for contender in CONTENDERS}


def choose(names: str | None) -> tuple[Contender, ...]:
    """The contenders in a comma-separated list, or all of them without one."""
    return tuple(BY_NAME[name] for name in pick("contenders", names, BY_NAME))


def forward_backward(problem: Problem, loss: Loss) -> dict[str, Any]:
    """One step: the loss, the log-probabilities if there are any, and the gradients of fresh leaves."""
    hidden = problem.hidden.detach().requires_grad_()
    weight = problem.weight.detach().requires_grad_(problem.mode == "trainable")
    if problem.microbatches == 1:
        # Without slices, whose backward pass would be measured too.
        parts = [(hidden, problem.batch)]
    else:
        parts = [(hidden[rows], batch) for rows, batch in problem.parts()]
    total, logprobs = torch.zeros((), device=hidden.device), []
    for part, batch in parts:
        value, found = loss(part, weight, batch)
        value.backward()
        total += value.detach()
        logprobs.append(found)
    found = None if logprobs[0] is None else torch.cat(logprobs)
    return {"loss": total, "logprobs": found, "grad_hidden": hidden.grad, "grad_weight": weight.grad}


@torch.no_grad()
def score_once(problem: Problem, score: Score) -> dict[str, Any]:
    logprobs = score(problem.hidden, problem.weight, problem.batch)
    return {"loss": None, "logprobs": logprobs, "grad_hidden": None, "grad_weight": None}


def prepared(contender: Contender, problem: Problem) -> Callable[[], dict[str, Any]]:
    """The contender's call for this problem, which is what is timed."""
    contender.check(problem)
    if contender.step is not None:
        return partial(contender.step, problem)
    if problem.mode == "scoring" and contender.make_score is not None:
        return partial(score_once, problem, contender.make_score(problem.batch))
    return partial(forward_backward, problem, contender.make(problem.parts()[0][1]))


def floor_call(problem: Problem) -> Callable[[], None]:
    """The bare matrix products of the same shapes and dtype into allocated buffers: 3U, 2U or 1U.

    The products are computed in chunks whose ``[C, V]`` buffer takes at most `FLOOR_BYTES`.
    """
    hidden, weight = problem.hidden, problem.weight
    vocab, limit = problem.shape.vocab, FLOOR_BYTES[hidden.device.type]
    count = -(-problem.tokens * vocab * hidden.element_size() // limit)
    rows = -(-problem.tokens // count)
    buffer = hidden.new_zeros(rows, vocab)
    grad_hidden = torch.empty_like(hidden) if problem.mode != "scoring" else None
    grad_weight = torch.empty_like(weight) if problem.mode == "trainable" else None

    @torch.no_grad()
    def run() -> None:
        for start in range(0, problem.tokens, rows):
            part = hidden[start : start + rows]
            logits = buffer[: part.shape[0]]
            torch.mm(part, weight.T, out=logits)
            if grad_hidden is not None:
                torch.mm(logits, weight, out=grad_hidden[start : start + rows])
            if grad_weight is not None:
                if start == 0:
                    torch.mm(logits.T, part, out=grad_weight)
                else:
                    grad_weight.addmm_(logits.T, part)

    return run
