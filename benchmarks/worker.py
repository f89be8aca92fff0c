"""The trials of a job in a process of their own: a cap, a crash and what a failure leaves behind end with it."""

from __future__ import annotations

import json
import math
import os
import select
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.measure import ROOT, Deadline, main
from benchmarks.trial import Job, Trials
from grpo_fast.errors import UserError


class OutOfTime(Exception):
    """The deadline came before the trial's end."""


class Worker:
    """The same trials in a process of their own. A new one takes the place of one that broke.

    Raises:
        UserError: the process could not be made ready.
        OutOfTime: the deadline came first; the process is gone.
    """

    def __init__(self, job: Job, deadline: Deadline):
        self.job, self.deadline = job, deadline
        self.process: subprocess.Popen | None = None

    def trial(self, answer: int, whole: bool = False) -> dict[str, Any]:
        """As `Trials.trial`; a process that dies has failed the trial."""
        if self.process is None:
            self.start()
        self.process.stdin.write(json.dumps({"answer": answer, "whole": whole}) + "\n")
        reply = self.read()
        if reply is None:
            return {"fits": False, "memory": False, "detail": self.end()}
        if reply.get("broken"):
            self.stop()
        return reply

    def start(self) -> None:
        # Whatever the process leaves in its temporary folder goes when it ends.
        self.folder = tempfile.TemporaryDirectory()
        self.errors = Path(self.folder.name) / "errors"
        paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
        changes = {
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "TMPDIR": self.folder.name,
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
        }
        command = [sys.executable, "-m", "benchmarks.worker", json.dumps(asdict(self.job))]
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, bufsize=1,
                env={**os.environ, **changes},
            )  # fmt: skip
        if self.read() is None:
            raise UserError(self.end())

    def read(self) -> dict[str, Any] | None:
        """What the process says next; None when it has ended."""
        left = None if self.deadline.left == math.inf else max(self.deadline.left, 0)
        if not select.select([self.process.stdout], [], [], left)[0]:
            self.stop()
            raise OutOfTime
        line = self.process.stdout.readline()
        return json.loads(line) if line else None

    def end(self) -> str:
        """Why the process ended, in one line."""
        code = self.process.wait()
        lines = [line.strip() for line in self.errors.read_text(errors="replace").splitlines() if line.strip()]
        self.stop()
        if code < 0:
            return f"the process was killed by signal {-code}"
        return lines[-1].removeprefix("error: ") if lines else f"the process ended with status {code}"

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process.stdin.close()
            self.process.stdout.close()
            self.process = None
            self.folder.cleanup()


def body() -> None:
    """The process of a `Worker`: its argument is the job, each line it reads a trial, each line it writes a reply."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    trials = Trials(Job(**json.loads(sys.argv[1])))
    print(json.dumps({"ready": True}), file=replies, flush=True)
    for line in sys.stdin:
        print(json.dumps(trials.trial(**json.loads(line))), file=replies, flush=True)


if __name__ == "__main__":
    main(body)
