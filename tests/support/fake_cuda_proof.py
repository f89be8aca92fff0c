"""The GPU branches of `benchmarks.gpu_proof`'s stages on a fake GPU, for `test_proof_on_fake_cuda.py`: ``STAGE``.

What is measured is measured in processes of their own; here it is what these processes run.
"""

from __future__ import annotations

import csv
import sys
import tempfile
from functools import partial
from typing import Any
from unittest import mock

import torch
from accelerate.state import AcceleratorState

# Before a GPU seems to be there: what these import looks for one.
import grpo_fast.trainer  # noqa: F401
from benchmarks import gpu, head, loss, plan, step
from benchmarks.gpu_proof import equivalence, machine
from benchmarks.harness.contenders import choose
from benchmarks.harness.measure import Run, parser, start
from benchmarks.longest import LEAN
from benchmarks.trial import Job, Trials
from grpo_kernels import doctor
from support.fake_cuda import main
from support.fake_gpu import FakeGPU


def started(folder: str, *options: str) -> Run:
    return start(parser("").parse_args(["--device", "cuda", "--output", folder, "--commit", "abc", *options]))


def rows(run: Run, name: str) -> list[dict[str, str]]:
    with (run.folder / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def patched(module: Any, name: str, result: Any) -> Any:
    """A function that returns `result`."""
    return mock.patch.object(module, name, return_value=result)


def run_machine(run: Run) -> Any:
    return machine.describe(run.device)


def run_doctor(run: Run) -> Any:
    with mock.patch("builtins.print") as said:
        doctor.check()
    return [call.args[0] for call in said.call_args_list]


def run_equivalence(run: Run) -> Any:
    """The largest head and, in every dtype, the odd one; also with float32 weights under autocast."""
    cases = [equivalence.ON_GPU[0], *(case for case in equivalence.ON_GPU if case.shape.model == "gpt2")]
    equivalence.run_equivalence(run, cases)
    return rows(run, "equivalence")


def run_heads(run: Run) -> Any:
    """The main shape, with ours and those contenders that need nothing but torch. Nothing is right without values."""
    contenders = choose("grpo-fast,full logits,torch linear_cross_entropy")
    first = head.cases_for(run)[:1]
    right, cases = patched(head, "verdict", None), patched(gpu, "cases_for", first)
    with right, cases:
        gpu.head_in_order(run, contenders)
    return rows(run, "head")


def run_loss(run: Run) -> Any:
    # Of the error, which is a quotient of the same number, nothing can be right either.
    with mock.patch.object(loss, "LIMIT", 2.0):
        loss.run_loss(run, [1 << 17])
    return rows(run, "loss")


def run_step(run: Run) -> Any:
    """Our trainer with a tiny model; TRL's is left out, as where it is not installed."""
    setting = step.Setting("llama-tiny", "bfloat16", 4, 4, 8, 4)
    with patched(step, "missing_trl", "trl is not installed"), patched(step, "setting_for", setting):
        step.run_step(run, [0.5])
    return rows(run, "step")


def run_plan(run: Run) -> Any:
    """Without the process of its own; with every field that is planned for."""
    setting = plan.Setting("lean", "qwen3-tiny", 512, {**LEAN, "max_buffer_mib": 1})
    with mock.patch.object(plan, "Worker", lambda job, deadline: Trials(job)), mock.patch.object(plan, "BAR", 9.0):
        plan.run_plan(run, [setting])
    return rows(run, "plan")


def run_longest(run: Run) -> Any:
    """A trial under a cap, with one microbatch."""
    trials = Trials(Job("grpo-fast", "qwen3-tiny", "cuda", LEAN, cap_bytes=1 << 30))
    try:
        return trials.trial(512)
    finally:
        trials.stop()


STAGES = {
    name.removeprefix("run_"): function for name, function in list(globals().items())
    if name.startswith("run_") and callable(function)
}  # fmt: skip


def rehearse(name: str) -> Any:
    AcceleratorState._reset_state(reset_partial_state=True)
    # Errors are this or a quotient of it and itself.
    FakeGPU.present.value = 1e-9
    # The compiler would look at the GPU.
    plain = mock.patch.object(torch, "compile", lambda function, **options: function)
    with tempfile.TemporaryDirectory() as folder, plain:
        return STAGES[name](started(folder))


if __name__ == "__main__":
    main({name: partial(rehearse, name) for name in sys.argv[2:] or STAGES})
