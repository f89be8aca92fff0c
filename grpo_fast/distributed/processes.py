"""The processes of a run, as `torchrun` or `accelerate launch` started them; without these, one.

Every process goes through the same steps on the same completions. What is not computed by all of them alike is done by
the first one (`on_main`), or by each for its share (`gather`, `total`); an error of one is an error of all, so that
none waits for another that has given up. Random numbers are the same everywhere, but where each process draws its own
(`own_random_numbers`).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor

from grpo_fast.errors import UserError, one_line

T = TypeVar("T")
# For what the first process does alone: scoring a batch may take long.
PATIENCE = timedelta(days=1)


def size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if size() > 1 else 0


def is_main() -> bool:
    """Whether this is the process that writes files and lines."""
    return rank() == 0


def launched() -> int:
    """How many processes a launcher has started."""
    return int(os.environ.get("WORLD_SIZE", 1))


def connect(use_cpu: bool) -> None:
    """Connect the processes of a launcher; without one nothing is to be done."""
    if launched() > 1:
        PartialState(cpu=use_cpu)


def disconnect() -> None:
    """At the end of the program."""
    if size() > 1:
        dist.destroy_process_group()


def new_group() -> Any:
    """For objects, on the CPU: waiting neither keeps a GPU busy nor ends after NCCL's ten minutes."""
    return dist.new_group(backend="gloo", timeout=PATIENCE) if size() > 1 else None


@cache
def _control_group() -> Any:
    return new_group()


def on_main(call: Callable[[], T], group: Any = None) -> T:
    """What `call` returns in the first process, in every process; what it raises there is raised everywhere.

    In another thread it needs a `group` of its own, of :func:`new_group`.
    """
    if size() == 1:
        return call()
    value, error = _attempt(call) if is_main() else (None, None)
    outcome = [(value, _told(error))]
    dist.broadcast_object_list(outcome, src=0, group=group or _control_group())
    return _agree([outcome[0]], error)[0]


def gather(call: Callable[[], T], group: Any = None) -> list[T]:
    """What `call` returns in each process, by rank, in every process; what it raises in one is raised everywhere.

    `group` as for :func:`on_main`.
    """
    if size() == 1:
        return [call()]
    value, error = _attempt(call)
    outcomes: list[Any] = [None] * size()
    dist.all_gather_object(outcomes, (value, _told(error)), group=group or _control_group())
    return _agree(outcomes, error)


def _attempt(call: Callable[[], T]) -> tuple[T | None, BaseException | None]:
    try:
        return call(), None
    except (Exception, KeyboardInterrupt) as error:
        return None, error


def _told(error: BaseException | None) -> BaseException | None:
    """What the other processes are told of an error: those of a program may not survive the way."""
    if error is None or isinstance(error, (UserError, OSError, KeyboardInterrupt)):
        return error
    return UserError(f"process {rank()} failed: {type(error).__name__}: {one_line(error)}")


def _agree(outcomes: list[tuple[T, BaseException | None]], own: BaseException | None) -> list[T]:
    error = own or next((error for _, error in outcomes if error is not None), None)
    if error is not None:
        raise error
    return [value for value, _ in outcomes]


def total(tensor: Tensor) -> Tensor:
    """The sum of the processes' tensors, in each of them."""
    if size() > 1:
        dist.all_reduce(tensor)
    return tensor


def largest(value: int) -> int:
    """The largest of the processes' values, in each of them."""
    return max(gather(lambda: value))


def share(items: list[T]) -> list[T]:
    """The items of this process; neighbours go to different ones."""
    return items[rank() :: size()]


def join(shares: list[list[T]]) -> list[T]:
    """What `share` cut apart, in its order."""
    items: list[Any] = [None] * sum(map(len, shares))
    for place, part in enumerate(shares):
        items[place :: len(shares)] = part
    return items
