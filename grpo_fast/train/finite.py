"""Whether gradients and weights are finite: one fused reduction and one wait for the device, however many tensors.

Where they are not, the completions whose loss is to blame.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from grpo_fast.distributed.processes import gather, largest
from grpo_fast.errors import UserError
from grpo_fast.train.batch import StepBatch
from grpo_kernels import PolicyObjective, policy_loss

SHOWN = 3


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether every floating-point number of `tensors` is finite, in every process of the run.

    Each process checks its own shards. The tensors are read once, for their norm, in which NaN and infinities survive;
    only if that is not finite, which it also is when it overflows, they are checked one by one.
    """
    own = list(_own(tensors))
    if not largest(int(not get_total_norm(own).isfinite())):
        return True
    return not largest(int(not all(tensor.isfinite().all() for tensor in own)))


def not_finite(named: Iterable[tuple[str, Tensor]]) -> str:
    """The names of the tensors that hold NaN or an infinity, in any process: the first three, and how many more.

    It waits for the device once per tensor, so it is only for error messages.
    """
    found = gather(lambda: [name for name, tensor in named if not all(t.isfinite().all() for t in _own([tensor]))])
    names = list(dict.fromkeys(name.removeprefix("module.").removeprefix("model.") for part in found for name in part))
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def check_finite(named: Iterable[tuple[str, Tensor]], source: str) -> None:
    """Raise a UserError that names the tensors that are not finite, and their `source`."""
    named = list(named)
    if not all_finite(tensor for _, tensor in named):
        raise UserError(f"{source} holds weights that are not finite: {not_finite(named)}")


def bad_completions(
    batch: StepBatch, objective: PolicyObjective, logprobs: Tensor, correction: Tensor | None = None
) -> str:
    """Which completions have a loss or a gradient that is not finite, and why: the first three, and how many more.

    `logprobs` are those of the policy and `correction` weighs the loss, ``[N]`` over all completions of the batch. An
    empty string says that every completion's own loss is finite.
    """
    # The entropies are not known here.
    objective = dataclasses.replace(objective, entropy_coef=0.0)
    found = list(_bad_completions(batch, objective, logprobs, correction))
    more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return ", ".join(found[:SHOWN]) + more


def _bad_completions(
    batch: StepBatch, objective: PolicyObjective, logprobs: Tensor, correction: Tensor | None
) -> Iterator[str]:
    groups = [sample.group for sample in batch.samples]
    columns = {
        "log-probability": logprobs, "advantage": batch.advantages, "old log-probability": batch.old_logprobs,
        "reference log-probability": batch.ref_logprobs, "correction": correction, "selection": batch.selected,
    }  # fmt: skip
    for index in batch.active:
        at = slice(int(batch.offsets[index]), int(batch.offsets[index + 1]))
        parts = {name: None if values is None else values[at] for name, values in columns.items()}
        leaf = logprobs[at].detach().requires_grad_()
        loss = policy_loss(
            leaf, parts["advantage"], batch.weights[at], objective, old_logprobs=parts["old log-probability"],
            ref_logprobs=parts["reference log-probability"], correction=parts["correction"],
            selected=parts["selection"], cu_seqlens=torch.tensor([0, leaf.numel()], device=leaf.device),
        ).loss  # fmt: skip
        (slope,) = torch.autograd.grad(loss, leaf)
        if loss.isfinite() and slope.isfinite().all():
            continue
        wrong = [(name, values) for name, values in parts.items() if values is not None and not values.isfinite().all()]
        if wrong:
            name, values = wrong[0]
            reason = f"{name} {values[~values.isfinite()][0].item()}"
        else:
            old = parts["old log-probability"]
            furthest = (logprobs[at] - (logprobs[at] if old is None else old)).abs().max().item()
            reason = f"log-probabilities up to {furthest:.3g} from the old ones"
        yield f"completion {index - groups.index(groups[index]) + 1} of prompt {groups[index] + 1} ({reason})"


def _own(tensors: Iterable[Tensor]) -> Iterable[Tensor]:
    for tensor in tensors:
        own = tensor.detach()
        own = own.to_local() if isinstance(own, DTensor) else own
        if own.is_floating_point() and own.numel():
            yield own
