"""What does FusedGRPOTrainer save inside TRL's own trainer? Wall time and peak memory of whole steps without sampling.

    python -m benchmarks.trl_subclass [--cases full,kl,lora] [--model llama-45m]

TRL's GRPOTrainer and our subclass of it get the same model, prompts, completions and settings; sampling is replaced by
fixed completions of mixed length. Each trainer has a process of its own, which takes its steps when it is told to, so
that the two are timed in turn and a peak is one trainer's alone. Before anything is timed, the gradients of the first
step must agree. Tokens a second count the real tokens, prompts once a completion.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.measure import (
    ROOT,
    Run,
    Times,
    describe_failure,
    main,
    parser,
    peak_memory,
    show_bytes,
    show_seconds,
    start,
    version,
)
from benchmarks.harness.trainers import PacedTRL, missing_trl, our_config, quiet, require, trl_arguments
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
# What each case adds to TRL's settings; "kl" scores a reference policy as well, and "lora" freezes the head.
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
    """TRL's trainer or ours, with fixed completions in the place of its sampling."""
    trl, datasets, peft = (require(name, name) for name in ("trl", "datasets", "peft"))
    from transformers.trainer_callback import PrinterCallback

    from grpo_fast.model.loading import load_model

    setting, folder = Setting(**job.setting), Path(job.folder) / job.trainer
    rollouts = make_rollouts(setting, job.vocab, 0.0)
    by_prompt = dict(zip(make_prompts(setting), rollouts, strict=True))
    config = our_config(
        torch.device(job.device), folder, model_name_or_path=job.model, dtype=setting.dtype, dataset_name="sort_digits",
        reward_funcs=["benchmarks.step.parity_reward"], shuffle_dataset=False, num_generations=setting.group,
        generation_batch_size=setting.samples, max_completion_length=setting.longest, learning_rate=1e-6,
        lr_scheduler_type="constant", max_steps=job.steps,
    )  # fmt: skip

    def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
        places: dict[str, itertools.count] = {}
        chosen = [by_prompt[text][next(places.setdefault(text, itertools.count()))] for text in prompts]
        ids = trainer.processing_class(prompts)["input_ids"]
        return {"prompt_ids": ids, "completion_ids": [list(each) for each in chosen], "logprobs": None}

    kind = trl.GRPOTrainer
    if job.trainer == FUSED:
        from grpo_fast.integrations.trl import FusedGRPOTrainer as kind
    torch.manual_seed(config.seed)
    model, tokenizer = load_model(config)
    adapter = peft.LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM") if job.case == "lora" else None
    trainer = kind(
        model=model, reward_funcs=[parity_reward], processing_class=tokenizer, rollout_func=rollout,
        args=trl_arguments(config, folder, setting.rows_per_microbatch, **CASES[job.case]),
        train_dataset=datasets.Dataset.from_list([{"prompt": prompt} for prompt in by_prompt]), peft_config=adapter,
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    return trainer


def work(job: Job, replies: Any) -> None:
    """The process of one trainer: a step for each line it reads, and a reply for each step."""
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
    for _ in sys.stdin:
        with peak_memory(device) as peak:
            seconds = paced.step()
        print(json.dumps({"seconds": seconds, "peak_bytes": peak.bytes}), file=replies, flush=True)


class Process:
    """A trainer's process, and why it ended if it did."""

    def __init__(self, job: Job):
        paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
        self.errors = Path(job.folder) / f"{job.trainer}.errors"
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.trl_subclass", "--job", json.dumps(asdict(job))],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, bufsize=1,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)),
                     "OMP_NUM_THREADS": str(job.threads)},
            )  # fmt: skip

    def step(self) -> dict[str, float]:
        """Seconds and peak bytes of one step.

        Raises:
            UserError: the process ended; its last line says why.
        """
        with suppress(BrokenPipeError):
            self.process.stdin.write("step\n")
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        self.process.wait()
        said = [text.strip() for text in self.errors.read_text(errors="replace").splitlines() if text.strip()]
        raise UserError(said[-1].removeprefix("error: ") if said else f"status {self.process.returncode}")

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


def measure_case(run: Run, setting: Setting, case: str, model: str, vocab: int, folder: Path) -> None:
    """Rows of one case."""
    load_file = require("safetensors.torch", "safetensors").load_file
    repeats = run.repeats or (2 if run.quick else 3)
    job = Job(
        "", case, asdict(setting), model, vocab, str(run.device), torch.get_num_threads(), repeats + 2, str(folder)
    )  # fmt: skip
    processes = {name: Process(Job(**{**asdict(job), "trainer": name})) for name in (FUSED, TRL)}
    status = {name: {"status": "ok"} for name in processes}
    times, peaks, difference = {name: Times() for name in processes}, dict.fromkeys(processes, 0.0), None

    def step(name: str, timed: bool) -> None:
        if status[name]["status"] != "ok":
            return
        try:
            reply = processes[name].step()
        except Exception as error:
            failure = str(error) if isinstance(error, UserError) else describe_failure(error)
            status[name] = {"status": "failed", "detail": failure}
            return
        if timed:
            times[name].seconds.append(reply["seconds"])
            peaks[name] = max(peaks[name], reply["peak_bytes"])

    try:
        for name in processes:
            step(name, timed=False)
        if all(state["status"] == "ok" for state in status.values()):
            found = (load_file(folder / f"{name}.safetensors") for name in (FUSED, TRL))
            difference = gradient_difference(*found)
            if not difference <= LIMITS[setting.dtype]:
                wrong = {"status": "wrong", "detail": f"the first gradients differ by {difference:.2g}"}
                status = {FUSED: wrong, TRL: wrong}
        for number in range(repeats):
            for name in list(processes)[:: 1 if number % 2 == 0 else -1]:
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
            if run.deadline.left <= 0:
                print(f"trl_subclass: left out for lack of time: {case}")
                continue
            folder = Path(name) / case
            folder.mkdir()
            measure_case(run, setting, case, path, vocab, folder)


def body() -> None:
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--model", help=f"one of {', '.join(RANDOM)} (default: by the device)")
    arguments.add_argument("--cases", default=",".join(CASES), help=f"of {', '.join(CASES)}")
    arguments.add_argument("--job", help="what a process of one trainer is started with")
    chosen = arguments.parse_args()
    if chosen.job:
        # What the libraries print must not stand between the replies.
        replies = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        work(Job(**json.loads(chosen.job)), replies)
        return
    run = start(chosen)
    cases = [case.strip() for case in chosen.cases.split(",")]
    for case in cases:
        if case not in CASES:
            raise UserError(f"--cases: {case!r} is unknown; there are {', '.join(CASES)}")
    run_subclass(run, cases, chosen.model)


if __name__ == "__main__":
    main(body)
