"""The processes of a run, as started by `torchrun` or `accelerate launch`; otherwise one.

Every process takes the same steps on the same completions. What not all of them compute is done by the first one
(`on_main`), or by each for its share (`gather`, `total`); an error in one is raised in all, so that no process waits
for another that has stopped. Random numbers are the same everywhere, except inside `own_random_numbers`.
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
# How long processes wait for the first one: scoring a batch may take long.
PATIENCE = timedelta(days=1)


def size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if size() > 1 else 0


def is_main() -> bool:
    """Whether this is the process that writes files and prints."""
    return rank() == 0


def launched() -> int:
    """How many processes a launcher has started."""
    return int(os.environ.get("WORLD_SIZE", 1))


def connect(use_cpu: bool) -> None:
    """Connect the processes of a launcher; without one, do nothing."""
    if launched() > 1:
        PartialState(cpu=use_cpu)


def disconnect() -> None:
    """At the end of the program."""
    if size() > 1:
        dist.destroy_process_group()


def new_group() -> Any:
    """A group for objects on the CPU: waiting neither keeps a GPU busy nor ends after NCCL's ten minutes."""
    return dist.new_group(backend="gloo", timeout=PATIENCE) if size() > 1 else None


# Created on first use.
_control_group = cache(new_group)


def on_main(call: Callable[[], T], group: Any = None) -> T:
    """Call `call` in the first process, and return its result, or raise its error, in every process.

    Another thread needs another `group`, from :func:`new_group`.
    """
    if size() == 1:
        return call()
    value, error = _attempt(call) if is_main() else (None, None)
    outcome = [(value, _sendable(error))]
    dist.broadcast_object_list(outcome, src=0, group=group or _control_group())
    return _agree([outcome[0]], error)[0]


def gather(call: Callable[[], T], group: Any = None) -> list[T]:
    """Call `call` in each process, and return all results by rank, or raise the first error, in every process.

    `group` as for :func:`on_main`.
    """
    if size() == 1:
        return [call()]
    value, error = _attempt(call)
    outcomes: list[Any] = [None] * size()
    dist.all_gather_object(outcomes, (value, _sendable(error)), group=group or _control_group())
    return _agree(outcomes, error)


def _attempt(call: Callable[[], T]) -> tuple[T | None, BaseException | None]:
    try:
        return call(), None
    except (Exception, KeyboardInterrupt) as error:
        return None, error


def _sendable(error: BaseException | None) -> BaseException | None:
    """The error for the other processes: exceptions of other types may not survive pickling."""
    if error is None or isinstance(error, (UserError, OSError, KeyboardInterrupt)):
        return error
    return UserError(f"process {rank()} failed: {type(error).__name__}: {one_line(error)}")


def _agree(outcomes: list[tuple[T, BaseException | None]], own: BaseException | None) -> list[T]:
    error = own or next((error for _, error in outcomes if error is not None), None)
    if error is not None:
        raise error
    return [value for value, _ in outcomes]


def total(tensor: Tensor) -> Tensor:
    """The sum of the processes' tensors, in each of them and in place."""
    if size() > 1:
        dist.all_reduce(tensor)
    return tensor


def largest(value: int) -> int:
    """The largest of the processes' values, in each of them."""
    return max(gather(lambda: value))


def share(items: list[T]) -> list[T]:
    """The items of this process; adjacent items belong to different processes."""
    return items[rank() :: size()]


def join(shares: list[list[T]]) -> list[T]:
    """The items that `share` distributed, in their original order."""
    items: list[Any] = [None] * sum(map(len, shares))
    for place, part in enumerate(shares):
        items[place :: len(shares)] = part
    return items
