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
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.measure import (
    Deadline,
    Run,
    Times,
    main,
    parser,
    peak_memory,
    pick,
    require,
    show_bytes,
    show_seconds,
    start,
    version,
)
from benchmarks.harness.process import JsonProcess, serve
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
    if run.quick:
        return Setting(model or "llama-tiny", "float32", 4, 4, 8, 4)
    if run.device.type == "cpu":
        return Setting(model or "llama-45m", "float32", 4, 8, 32, 16)
    return Setting(model or "llama-0.6b", "bfloat16", 8, 8, 256, 512)


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

    def step() -> dict[str, float]:
        with peak_memory(device) as peak:
            seconds = paced.step()
        return {"seconds": seconds, "peak_bytes": peak.bytes}

    return step


def measure_case(run: Run, setting: Setting, case: str, model: str, vocab: int, folder: Path) -> None:
    """Measure one case and write its rows."""
    load_file = require("safetensors.torch", "safetensors").load_file
    repeats, threads = run.repeats or (2 if run.quick else 3), torch.get_num_threads()
    job = Job("", case, asdict(setting), model, vocab, str(run.device), threads, repeats + 2, str(folder))
    processes: dict[str, JsonProcess] = {}
    status = {name: {"status": "ok"} for name in (FUSED, TRL)}
    times, peaks, difference = {name: Times() for name in status}, dict.fromkeys(status, 0.0), None

    def step(name: str, timed: bool) -> None:
        if status[name]["status"] != "ok":
            return
        try:
            if name not in processes:
                fields = {**asdict(job), "trainer": name}
                processes[name] = JsonProcess("benchmarks.trl_subclass", fields, Deadline())
            reply = processes[name].ask()
        except UserError as error:
            status[name] = {"status": "failed", "detail": str(error)}
            return
        if timed:
            times[name].seconds.append(reply["seconds"])
            peaks[name] = max(peaks[name], reply["peak_bytes"])

    try:
        for name in status:
            step(name, timed=False)
        if all(state["status"] == "ok" for state in status.values()):
            difference = gradient_difference(*(load_file(folder / f"{name}.safetensors") for name in (FUSED, TRL)))
            if not difference <= LIMITS[setting.dtype]:
                wrong = {"status": "wrong", "detail": f"the first gradients differ by {difference:.2g}"}
                status = {FUSED: wrong, TRL: wrong}
        for number in range(repeats):
            for name in list(status)[:: 1 if number % 2 == 0 else -1]:
                step(name, timed=True)
    finally:
        for process in processes.values():
            process.stop()
    write_rows(run, setting, case, vocab, status, times, peaks, difference)


def write_rows(
    run: Run, setting: Setting, case: str, vocab: int, status: dict[str, dict[str, str]], times: dict[str, Times],
    peaks: dict[str, float], difference: float | None,
) -> None:  # fmt: skip
    table = run.table("trl_subclass", KEY)
    answers = [len(ids) for group in make_rollouts(setting, vocab, 0.0) for ids in group]
    tokens = sum(answers) + setting.samples * setting.prompt_tokens
    for name, state in status.items():
        row = {
            "model": setting.model, "dtype": setting.dtype, "case": case, "trainer": name, **state,
            "prompts": setting.prompts, "group": setting.group, "prompt_tokens": setting.prompt_tokens,
            "mean_tokens": setting.mean_tokens, "longest_tokens": max(answers), "tokens": tokens,
            "gradient_difference": difference, "transformers": version("transformers"), "peer": f"trl {version('trl')}",
        }  # fmt: skip
        taken = times[name]
        if state["status"] == "ok" and taken.seconds:
            row |= {**taken.columns(), "tokens_per_second": tokens / taken.median, "peak_bytes": peaks[name]}
            row["speedup"] = times[TRL].median / taken.median if times[TRL].seconds else None
            print(f"  {case:6}{name:18}{show_seconds(taken.median):>10}{show_bytes(peaks[name]):>12}", flush=True)
        else:
            print(f"  {case:6}{name:18}{state['status']}: {state.get('detail', '')}", flush=True)
        table.add(row)


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
