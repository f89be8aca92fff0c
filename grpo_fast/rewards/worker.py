"""A process that scores one sample at a time for `WorkerPool`, which kills it when a sample takes too long.

Its limits need Linux or macOS: `pool.check_workers` refuses other systems before one is started.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import signal
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from grpo_fast.rewards.base import settings_of
from grpo_fast.rewards.calls import Outcome, call
from grpo_fast.rewards.registry import load_reward

# Bytes that a worker may allocate, and seconds of CPU time beyond the limit after which it ends without being killed.
MEMORY = 4 << 30
GRACE = 5
# linux/prctl.h
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
# How often a keeper looks for its parent where the kernel does not tell it.
LOOKS = 0.2


def keep(parent: int) -> None:
    """Split into a keeper, which does not return, and the worker, which does.

    The keeper waits until the worker or `parent` has ended, however it ends, or for SIGTERM. Then it kills everything
    that the worker has started, in other process groups too, and exits.
    """
    libc = ctypes.CDLL(None) if sys.platform.startswith("linux") else None
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGCHLD})
    if libc:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    keeper = os.getpid()
    worker = os.fork()
    if not worker:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGCHLD})
        if libc:
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != keeper:
            os._exit(1)
        return
    status = None
    while os.getppid() == parent and status is None:
        if libc:
            received = signal.sigwait({signal.SIGTERM, signal.SIGCHLD})
        else:
            time.sleep(LOOKS)
            received = signal.SIGTERM if signal.SIGTERM in signal.sigpending() else None
        if received == signal.SIGTERM:
            break
        with suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                status = ended[1] if ended[0] == worker else status
    end_children()
    code = 0 if status is None else os.waitstatus_to_exitcode(status)
    os._exit(code if code >= 0 else 128 - code)


def end_children() -> None:
    """Kill all children of this process, and theirs, which become children of this one."""
    listed = Path(f"/proc/self/task/{os.getpid()}/children")
    while True:
        try:
            children = listed.read_text().split()
        except OSError:
            # They cannot be listed here: all that are in this process's group end, and so does this one.
            os.killpg(0, signal.SIGKILL)
            return
        for child in children:
            with suppress(ProcessLookupError):
                os.kill(int(child), signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def score(function, arguments: dict[str, list], timeout: float, settings: Mapping[str, Any]) -> Outcome:
    chosen = settings_of(function, {**settings, "reward_timeout": timeout})
    return call(lambda **columns: function(**columns, **chosen), arguments, 1, timeout)


def serve(connection: Connection) -> None:
    """Answer each (function's name, arguments of one sample, timeout, settings) twice: when it starts, and with its
    outcome."""
    import resource

    functions = {}
    while True:
        try:
            name, arguments, timeout, settings = connection.recv()
        except EOFError:
            return
        if name not in functions:
            functions[name] = load_reward(name)
            prepare = functions[name].prepare
            if prepare:
                prepare(**settings_of(prepare, settings))
        spent = resource.getrusage(resource.RUSAGE_SELF)
        _limit("RLIMIT_CPU", math.ceil(spent.ru_utime + spent.ru_stime + timeout + GRACE))
        connection.send_bytes(b"started")
        outcome = score(functions[name], arguments, timeout, settings)
        try:
            reply = json.dumps([outcome.values[0], outcome.errors.get(0)], default=float)
        except (TypeError, ValueError):
            reply = json.dumps([None, f"returned {outcome.values[0]!r:.80}, which is not a number"])
        connection.send_bytes(reply.encode())


def _limit(name: str, value: int) -> None:
    import resource

    kind = getattr(resource, name)
    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


if __name__ == "__main__":
    keep(int(sys.argv[2]))
    _limit("RLIMIT_DATA", MEMORY)
    serve(Connection(int(sys.argv[1])))
