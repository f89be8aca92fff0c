"""Whether gradients and weights are finite: one fused reduction and one wait for the device, however many tensors."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import get_total_norm

from grpo_fast.distributed.processes import gather, largest
from grpo_fast.errors import UserError

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


def _own(tensors: Iterable[Tensor]) -> Iterable[Tensor]:
    for tensor in tensors:
        own = tensor.detach()
        own = own.to_local() if isinstance(own, DTensor) else own
        if own.is_floating_point() and own.numel():
            yield own
