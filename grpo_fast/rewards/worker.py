"""A process that scores one sample at a time for `WorkerPool`, which kills it if a sample takes too long.

Its limits require Linux or macOS; `pool.check_workers` refuses other systems before a worker is started.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import signal
import sys
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

from grpo_fast.rewards.base import settings_of
from grpo_fast.rewards.calls import call
from grpo_fast.rewards.registry import load_reward

# Bytes that a worker may allocate, and seconds of CPU time beyond the time limit after which the kernel ends it.
MEMORY = 4 << 30
GRACE = 5
# linux/prctl.h
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
# Seconds between a keeper's looks for its parent on systems whose kernel does not report the parent's end.
LOOKS = 0.2


def keep(parent: int) -> None:
    """Fork into a keeper, which does not return, and the worker, which does.

    The keeper waits for the end of the worker or of `parent`, or for SIGTERM. Then it kills everything that the worker
    has started, also in other process groups, and exits.
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
    """Kill all children of this process, and their children, which become children of this process."""
    listed = Path(f"/proc/self/task/{os.getpid()}/children")
    while True:
        try:
            children = listed.read_text().split()
        except OSError:
            # Children cannot be listed here: end this process's group, including this process.
            os.killpg(0, signal.SIGKILL)
            return
        for child in children:
            with suppress(ProcessLookupError):
                os.kill(int(child), signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def serve(connection: Connection) -> None:
    """Answer each (function's name, one sample's arguments, timeout, settings) twice: at its start, and with its
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
            if prepare := functions[name].prepare:
                prepare(**settings_of(prepare, settings))
        spent = resource.getrusage(resource.RUSAGE_SELF)
        _limit("RLIMIT_CPU", math.ceil(spent.ru_utime + spent.ru_stime + timeout + GRACE))
        connection.send_bytes(b"started")
        function, chosen = functions[name], settings_of(functions[name], {**settings, "reward_timeout": timeout})
        # Not a partial: a column with the name of a setting must not replace the setting.
        outcome = call(lambda **columns: function(**columns, **chosen), arguments, 1, timeout)  # noqa: B023
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
