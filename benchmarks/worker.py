"""The trials of a job in a process of their own: a cap, a crash and what a failure leaves behind end with it."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import Any

from benchmarks.harness.measure import Deadline, main
from benchmarks.harness.process import JsonProcess, serve
from benchmarks.trial import Job, Trials
from grpo_fast.errors import UserError


class Worker:
    """`Trials` in another process, which is replaced when it breaks.

    Raises:
        UserError: the process did not become ready.
        OutOfTime: the deadline passed; the process is stopped.
    """

    def __init__(self, job: Job, deadline: Deadline):
        self.job, self.deadline = job, deadline
        self.process: JsonProcess | None = None

    def trial(self, answer: int, whole: bool = False) -> dict[str, Any]:
        """Like `Trials.trial`; the trial has failed if the process dies."""
        self.process = self.process or JsonProcess("benchmarks.worker", asdict(self.job), self.deadline)
        reply: dict[str, Any] = {"broken": True}
        try:
            reply = self.process.ask(answer=answer, whole=whole)
        except UserError as error:
            reply |= {"fits": False, "memory": False, "detail": str(error)}
        finally:
            if reply.get("broken"):
                self.stop()
        return reply

    def stop(self) -> None:
        if self.process is not None:
            self.process.stop()
            self.process = None


def body() -> None:
    arguments = argparse.ArgumentParser(description="The process of a Worker.")
    arguments.add_argument("--job", type=json.loads, required=True)
    job = Job(**arguments.parse_args().job)
    serve(lambda: Trials(job).trial)


if __name__ == "__main__":
    main(body)
