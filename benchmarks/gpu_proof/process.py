"""A command in a process of its own, with a time limit that also ends whatever it started."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

# Seconds for the traceback after SIGABRT, and for the driver to let go of a process after SIGKILL.
TRACEBACK, KILLED = 3.0, 20.0
INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit status, negative for a signal and None where it reached the limit; its seconds."""

    code: int | None
    seconds: float


def run_command(command: list[str], environment: dict[str, str], log: Path, limit: float) -> Ended:
    """Run `command` for at most `limit` seconds; its output is appended to `log`.

    At the limit, its Python writes the traceback of every thread to the log, and its process group is killed. The group
    is also killed after a command that ends by itself, so that nothing it started is left on the GPU.
    """
    begin = time.monotonic()
    # An interrupt waits until the process can be killed: within Popen it would lose it.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, INTERRUPTS)
    process, code = None, None
    try:
        with log.open("ab") as output:
            process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
                start_new_session=True, preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_SETMASK, mask),
            )  # fmt: skip
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        code = process.wait(max(limit, 0.0))
    except subprocess.TimeoutExpired:
        # Python's fault handler writes the tracebacks.
        process.send_signal(signal.SIGABRT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(TRACEBACK)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if process is not None:
            kill(process)
    return Ended(code, time.monotonic() - begin)


def kill(process: subprocess.Popen) -> None:
    """Kill a process and its group."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    # A process that is stuck in the driver outlives the signal, and must not stop the other stages.
    with suppress(subprocess.TimeoutExpired):
        process.wait(KILLED)
