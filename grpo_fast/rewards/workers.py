"""Worker processes for reward functions that may have to be killed, which a thread cannot be.

`WorkerPool` is used by the run; this module as a program is a worker, which scores one sample at a time.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import math
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from grpo_fast.errors import UserError, one_line
from grpo_fast.rewards.base import settings_of
from grpo_fast.rewards.calls import Outcome, call
from grpo_fast.rewards.registry import load_reward

# Seconds for a worker to import a function, before the first sample's time starts; and to end with its children.
START_LIMIT, END_LIMIT = 120.0, 5.0
MOST_WORKERS, LONGEST_REPLY = 8, 1 << 20
# Bytes that a worker may allocate, and seconds of CPU time beyond the time limit after which the kernel ends it.
MEMORY, GRACE = 4 << 30, 5
# linux/prctl.h
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
# Seconds between a keeper's looks for its parent on systems whose kernel does not report the parent's end.
LOOKS = 0.2


def check_workers(name: str) -> None:
    """Raise UserError for a reward function that runs in workers, unless this is Linux or macOS."""
    if importlib.util.find_spec("resource") is None:
        raise UserError(
            f"reward_funcs: {name} runs in its own process with limits that only Linux and macOS have, not "
            f"{platform.system()}; run it there (on Windows, under WSL), or use a function without @isolated()"
        )


class Worker:
    """A process that scores one sample at a time, and its keeper (`keep`), which ends with this process.

    Create it in a thread that lasts: the kernel treats the end of that thread as the end of this process.
    """

    def __init__(self):
        self.index, self.deadline, self.started = 0, 0.0, False
        self.connection, theirs = Pipe()
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
        # A new session: the terminal's Ctrl-C is for the trainer, whose end closes the pipe and so ends the worker.
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "grpo_fast.rewards.workers", str(theirs.fileno()), str(os.getpid())],
            env=environment,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        theirs.close()

    def kill(self) -> None:
        """End the worker and whatever it has started."""
        self.process.terminate()
        try:
            self.process.wait(END_LIMIT)
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.connection.close()


class WorkerPool:
    """One worker per CPU, up to 8, started on demand and kept for the next batch."""

    def __init__(self):
        self.idle: list[Worker] = []
        # macOS has no affinity.
        cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.limit = min(cpus, MOST_WORKERS)
        self.lock = threading.Lock()
        self.starter = ThreadPoolExecutor(1, "starts workers")

    def run(
        self,
        name: str,
        arguments: dict[str, list],
        size: int,
        timeout: float,
        over_limit: float | None,
        settings: Mapping[str, Any] | None = None,
    ) -> Outcome:
        """Score `size` samples with the function `name`, each alone in at most `timeout` seconds.

        A sample that takes longer or ends its worker gets the value `over_limit`, or an error if that is None. The
        function gets the `settings` that it has parameters for.
        """
        values: list = [None] * size
        errors: dict[int, str] = {}
        waiting = deque(range(size))
        busy: dict[Connection, Worker] = {}

        def end(worker: Worker, reason: str) -> None:
            del busy[worker.connection]
            worker.kill()
            if worker.started and over_limit is not None:
                values[worker.index] = over_limit
            else:
                errors[worker.index] = reason

        with self.lock:
            while waiting or busy:
                while waiting and len(busy) < self.limit:
                    index = waiting.popleft()
                    worker = self.idle.pop() if self.idle else self.starter.submit(Worker).result()
                    worker.index, worker.deadline, worker.started = index, time.monotonic() + START_LIMIT, False
                    busy[worker.connection] = worker
                    try:
                        sample = {key: [column[index]] for key, column in arguments.items()}
                        worker.connection.send((name, sample, timeout, dict(settings or {})))
                    except Exception as error:
                        end(worker, f"could not be sent the sample: {one_line(error)}")
                nearest = min((worker.deadline for worker in busy.values()), default=0.0)
                for connection in wait(list(busy), max(nearest - time.monotonic(), 0.0)):
                    worker = busy[connection]
                    try:
                        reply = connection.recv_bytes(LONGEST_REPLY)
                    except (EOFError, OSError):
                        end(worker, f"ended its process (status {worker.process.wait()})")
                        continue
                    if reply == b"started":
                        worker.started, worker.deadline = True, time.monotonic() + timeout
                        continue
                    self.idle.append(busy.pop(connection))
                    values[worker.index], error = json.loads(reply)
                    if error is not None:
                        errors[worker.index] = error
                for worker in [worker for worker in busy.values() if worker.deadline <= time.monotonic()]:
                    end(worker, f"took longer than {timeout if worker.started else START_LIMIT:g} s")
        return Outcome(values, errors)

    def close(self) -> None:
        while self.idle:
            self.idle.pop().kill()


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
