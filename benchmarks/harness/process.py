"""A benchmark in a process of its own, so that its memory cap, its peak and its crash concern nothing else."""

from __future__ import annotations

import json
import math
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.measure import ROOT, Deadline
from grpo_fast.errors import UserError


class OutOfTime(Exception):
    """The deadline passed before a reply."""


class JsonProcess:
    """A process that runs `module` with ``--job JSON`` and, by :func:`serve`, replies to requests in lines of JSON.

    Raises:
        UserError: the process ended; the message is its last line.
        OutOfTime: the deadline passed before it was ready or replied; the process is stopped.
    """

    def __init__(self, module: str, job: dict[str, Any], deadline: Deadline):
        self.deadline = deadline
        # Removed with everything that the process leaves in it.
        self.folder = tempfile.TemporaryDirectory()
        self.errors = Path(self.folder.name) / "errors"
        paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
        changes = {
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "TMPDIR": self.folder.name,
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
        }
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module, "--job", json.dumps(job)], env={**os.environ, **changes},
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, bufsize=1,
            )  # fmt: skip
        self.read()

    def ask(self, **request: Any) -> dict[str, Any]:
        """The reply to a request."""
        with suppress(BrokenPipeError):
            print(json.dumps(request), file=self.process.stdin)
        return self.read()

    def read(self) -> dict[str, Any]:
        left = None if self.deadline.left == math.inf else max(self.deadline.left, 0)
        if not select.select([self.process.stdout], [], [], left)[0]:
            self.stop()
            raise OutOfTime
        if line := self.process.stdout.readline():
            return json.loads(line)
        code = self.process.wait()
        lines = [line.strip() for line in self.errors.read_text(errors="replace").splitlines() if line.strip()]
        self.stop()
        if code < 0:
            raise UserError(f"the process was killed by signal {-code}")
        raise UserError(lines[-1].removeprefix("error: ") if lines else f"the process ended with status {code}")

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()
        self.folder.cleanup()


def serve(make: Callable[[], Callable[..., dict[str, Any]]]) -> None:
    """The process's side: call `make`, and then its result with every request. Whatever is printed goes to stderr."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    answer = make()
    print(json.dumps({"ready": True}), file=replies, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(**json.loads(line))), file=replies, flush=True)
