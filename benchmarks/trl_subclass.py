"""How much time and memory does FusedGRPOTrainer save in TRL's trainer? Whole steps without sampling.

    python -m benchmarks.trl_subclass [--cases full,kl,lora] [--model llama-45m]

TRL's GRPOTrainer and our subclass of it get the same model, prompts, settings and, instead of sampling, the same fixed
completions of mixed length. Each runs in its own process and takes a step when it is asked to, so that the two are
timed in turn and each peak belongs to one trainer. The gradients of the first step must agree before anything is timed.
Tokens per second count the real tokens, with the prompt counted once for each completion.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import step
from benchmarks.harness.measure import Deadline, Run, main, parser, peak_memory, pick, require, start
from benchmarks.harness.process import JsonProcess, serve
from benchmarks.harness.steps import compare_steps
from benchmarks.harness.trainers import PacedTRL, fixed_rollout, missing_trl, our_config, quiet, trl_trainer
from benchmarks.step import (
    LIMITS,
    RANDOM,
    Setting,
    build_model,
    copy_gradients,
    gradient_difference,
    make_prompts,
    make_rollouts,
    parity_reward,
)
from grpo_fast.errors import UserError

KEY = ("model", "dtype", "case", "trainer")
FUSED, TRL = "FusedGRPOTrainer", "TRL"
# What each case adds to TRL's settings. "kl" also scores a reference policy, and "lora" freezes the head.
CASES: dict[str, dict[str, Any]] = {"full": {}, "kl": {"beta": 0.04}, "lora": {}}


@dataclass(frozen=True)
class Job:
    """One trainer in one process."""

    trainer: str
    case: str
    setting: dict[str, Any]
    model: str
    vocab: int
    device: str
    threads: int
    steps: int
    folder: str


def setting_for(run: Run, model: str | None) -> Setting:
    if run.quick or run.device.type != "cpu":
        return step.setting_for(run, model)
    return Setting(model or "llama-45m", "float32", 4, 8, 32, 16)


def build_trainer(job: Job) -> Any:
    """TRL's trainer or ours, with fixed completions in place of its sampling."""
    peft = require("peft", "peft")
    setting, folder = Setting(**job.setting), Path(job.folder) / job.trainer
    by_prompt = dict(zip(make_prompts(setting), make_rollouts(setting, job.vocab, 0.0), strict=True))
    config = our_config(
        torch.device(job.device), folder, model_name_or_path=job.model, dtype=setting.dtype, dataset_name="sort_digits",
        reward_funcs=["benchmarks.step.parity_reward"], shuffle_dataset=False, num_generations=setting.group,
        generation_batch_size=setting.samples, max_completion_length=setting.longest, learning_rate=1e-6,
        lr_scheduler_type="constant", max_steps=job.steps,
    )  # fmt: skip
    kind = None
    if job.trainer == FUSED:
        from grpo_fast.integrations.trl import FusedGRPOTrainer as kind
    adapter = peft.LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM") if job.case == "lora" else None
    return trl_trainer(
        config, folder, [{"prompt": prompt} for prompt in by_prompt], parity_reward, setting.rows_per_microbatch,
        fixed_rollout(by_prompt), kind, peft_config=adapter, **CASES[job.case],
    )  # fmt: skip


def steps(job: Job) -> Callable[[], dict[str, float]]:
    """The process of one trainer: a function that takes a step, and returns its seconds and peak bytes."""
    save_file = require("safetensors.torch", "safetensors").save_file
    device = torch.device(job.device)
    if device.type == "cpu":
        torch.set_num_threads(job.threads)
    quiet()
    path = Path(job.folder) / f"{job.trainer}.safetensors"

    def keep(named: Any) -> None:
        if not path.exists():
            save_file({name: grad.contiguous() for name, grad in copy_gradients(named).items()}, path)

    paced = PacedTRL(build_trainer(job), device, keep)

    def take_step() -> dict[str, float]:
        with peak_memory(device) as peak:
            seconds = paced.step()
        return {"seconds": seconds, "peak_bytes": peak.bytes}

    return take_step


def measure_case(run: Run, setting: Setting, case: str, model: str, vocab: int, folder: Path) -> None:
    """Measure one case and write its rows."""
    load_file = require("safetensors.torch", "safetensors").load_file
    repeats, threads = run.repeats or (2 if run.quick else 3), torch.get_num_threads()
    job = Job("", case, asdict(setting), model, vocab, str(run.device), threads, repeats + 2, str(folder))
    processes: dict[str, JsonProcess] = {}

    def take_step(name: str) -> tuple[float, float]:
        if name not in processes:
            fields = {**asdict(job), "trainer": name}
            processes[name] = JsonProcess("benchmarks.trl_subclass", fields, Deadline())
        reply = processes[name].ask()
        return reply["seconds"], reply["peak_bytes"]

    def difference() -> float:
        return gradient_difference(*(load_file(folder / f"{name}.safetensors") for name in (FUSED, TRL)))

    answers = [len(ids) for group in make_rollouts(setting, vocab, 0.0) for ids in group]
    columns = {
        "model": setting.model, "dtype": setting.dtype, "case": case, "prompts": setting.prompts,
        "group": setting.group, "prompt_tokens": setting.prompt_tokens, "mean_tokens": setting.mean_tokens,
        "longest_tokens": max(answers), "tokens": sum(answers) + setting.samples * setting.prompt_tokens,
    }  # fmt: skip
    steps = {name: partial(take_step, name) for name in (FUSED, TRL)}
    try:
        compare_steps(run.table("trl_subclass", KEY), columns, steps, difference, LIMITS[setting.dtype], repeats, TRL)
    finally:
        for process in processes.values():
            process.stop()


def run_subclass(run: Run, cases: list[str], model: str | None = None) -> None:
    if reason := missing_trl():
        raise UserError(reason)
    setting = setting_for(run, model)
    quiet()
    print(f"trl_subclass: {setting.model}, {setting.prompts} prompts x {setting.group}", flush=True)
    with tempfile.TemporaryDirectory() as name:
        path, vocab = build_model(setting, Path(name) / "model")
        for case in cases:
            if run.out_of_time(f"trl_subclass: {case}"):
                continue
            print(f"  {case}", flush=True)
            folder = Path(name) / case
            folder.mkdir()
            measure_case(run, setting, case, path, vocab, folder)


def body() -> None:
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--model", help=f"one of {', '.join(RANDOM)} (default: by the device)")
    arguments.add_argument("--cases", help=f"of {', '.join(CASES)}, with commas (default: all)")
    arguments.add_argument("--job", type=json.loads, help="internal: the job of one trainer's process")
    chosen = arguments.parse_args()
    if chosen.job:
        serve(lambda: steps(Job(**chosen.job)))
    else:
        run_subclass(start(chosen), pick("cases", chosen.cases, CASES), chosen.model)


if __name__ == "__main__":
    main(body)
