"""Worker processes for reward functions that must be stopped when they hang, which a thread cannot be."""

from __future__ import annotations

import importlib.util
import json
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
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any

from grpo_fast.errors import UserError, one_line
from grpo_fast.rewards.calls import Outcome

# Seconds in which a worker must have imported a function; the limit of a sample counts from then on.
START_LIMIT = 120.0
# Seconds in which a worker and all that it has started must have ended.
END_LIMIT = 5.0
MOST_WORKERS = 8
LONGEST_REPLY = 1 << 20


def check_workers(name: str) -> None:
    """Refuse a reward function that runs in workers where their time and memory cannot be limited.

    Raises:
        UserError: this is neither Linux nor macOS.
    """
    if importlib.util.find_spec("resource") is None:
        raise UserError(
            f"reward_funcs: {name} runs in a process of its own, with limits that only Linux and macOS have, not "
            f"{platform.system()}; run it there (on Windows, under WSL), or use a function without @isolated()"
        )


class Worker:
    """One process, idle or with one sample, and its keeper (``worker.keep``), which ends with this process.

    To be made in a thread that lasts: the kernel takes the end of that thread for the end of this process.
    """

    def __init__(self):
        self.connection, theirs = Pipe()
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
        # Away from the terminal's Ctrl-C, which is for the trainer; its end closes the pipe, and so ends the worker.
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "grpo_fast.rewards.worker", str(theirs.fileno()), str(os.getpid())],
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


@dataclass
class Job:
    worker: Worker
    index: int
    deadline: float
    started: bool = False


class WorkerPool:
    """As many workers as there are CPUs, up to 8, started when they are needed and kept for the next batch."""

    def __init__(self):
        self.idle: list[Worker] = []
        # A Mac has no affinity.
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
        """Score `size` samples, each alone, in at most `timeout` seconds each.

        `settings` of the run reach those functions that have a parameter of that name.

        A sample that takes longer, or that ends its worker, has the value `over_limit`; where that is None, an error.
        """
        values: list = [None] * size
        errors: dict[int, str] = {}
        waiting = deque(range(size))
        jobs: dict[Connection, Job] = {}

        def over(job: Job, reason: str) -> None:
            del jobs[job.worker.connection]
            job.worker.kill()
            if job.started and over_limit is not None:
                values[job.index] = over_limit
            else:
                errors[job.index] = reason

        with self.lock:
            while waiting or jobs:
                while waiting and len(jobs) < self.limit:
                    index = waiting.popleft()
                    worker = self.idle.pop() if self.idle else self.starter.submit(Worker).result()
                    job = jobs[worker.connection] = Job(worker, index, time.monotonic() + START_LIMIT)
                    try:
                        sample = {key: [column[index]] for key, column in arguments.items()}
                        worker.connection.send((name, sample, timeout, dict(settings or {})))
                    except Exception as error:
                        over(job, f"could not be sent the sample: {one_line(error)}")
                nearest = min((job.deadline for job in jobs.values()), default=0.0)
                for connection in wait(list(jobs), max(nearest - time.monotonic(), 0.0)):
                    job = jobs[connection]
                    try:
                        reply = connection.recv_bytes(LONGEST_REPLY)
                    except (EOFError, OSError):
                        over(job, f"ended its process (status {job.worker.process.wait()})")
                        continue
                    if reply == b"started":
                        job.started, job.deadline = True, time.monotonic() + timeout
                        continue
                    del jobs[connection]
                    self.idle.append(job.worker)
                    values[job.index], error = json.loads(reply)
                    if error is not None:
                        errors[job.index] = error
                for job in [job for job in jobs.values() if job.deadline <= time.monotonic()]:
                    limit = timeout if job.started else START_LIMIT
                    over(job, f"took longer than {limit:g} s")
        return Outcome(values, errors)

    def close(self) -> None:
        while self.idle:
            self.idle.pop().kill()
