"""Does vLLM in the training process sample from the trainer's weights, and give its memory back while it sleeps?

    python -m benchmarks.gpu_proof.vllm_sleep

Our trainer takes four optimizer steps with a random model, of all weights, and of LoRA adapters, for which vLLM and the
trainer share the other weights. Before every step but the first the engine wakes, gets the
new weights and samples a probe, whose log-probabilities must be the trainer's; after sampling it sleeps, and the
memory that this frees is measured. On a CPU vLLM frees nothing, so there it does not sleep.
"""

from __future__ import annotations

import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.measure import Run, main, parser, start
from benchmarks.harness.trainers import our_config, quiet, require, synchronize
from benchmarks.step import Setting, build_model, make_prompts
from grpo_fast.errors import UserError, one_line

KEY = ("model", "dtype", "contender")
STEPS = 4
# What is trained, and the fields of the configuration that say so.
CONTENDERS: dict[str, dict[str, Any]] = {"grpo-fast": {}, "grpo-fast, LoRA": {"use_peft": True, "lora_r": 16}}


def setting_for(run: Run) -> Setting:
    if run.quick:
        return Setting("llama-tiny", "float32", 4, 4, 8, 4)
    return Setting("llama-0.6b", "bfloat16", 8, 8, 256, 64)


class Recorder:
    """What every call of some methods took, in seconds, and what it returned."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: dict[str, list[float]] = {}
        self.results: dict[str, list[Any]] = {}
        self.freed: list[int] = []

    def watch(self, target: Any, name: str) -> None:
        call: Callable[..., Any] = getattr(target, name)

        def watched(*arguments: Any, **options: Any) -> Any:
            synchronize(self.device)
            before, begin = self.free(), time.perf_counter()
            result = call(*arguments, **options)
            synchronize(self.device)
            self.seconds.setdefault(name, []).append(time.perf_counter() - begin)
            self.results.setdefault(name, []).append(result)
            if name == "sleep":
                self.freed.append(self.free() - before)
            return result

        setattr(target, name, watched)

    def free(self) -> int:
        return torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else 0

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name]) if name in self.seconds else math.nan


def train(run: Run, setting: Setting, folder: Path, fields: dict[str, Any]) -> dict[str, Any]:
    """Columns of a training run of `STEPS` steps, with further `fields` of the configuration.

    Raises:
        UserError: vLLM cannot sample here, its log-probabilities are not the trainer's, or it has its own copy of
            weights that it should share.
    """
    from grpo_fast.trainer import GRPOTrainer

    name, _ = build_model(setting, folder / "model")
    data = folder / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in make_prompts(setting)), "utf-8")
    config = our_config(
        run.device, folder / "run", model_name_or_path=name, dtype=setting.dtype, dataset_name=str(data),
        eval_dataset_name=str(data), reward_funcs=["benchmarks.step.parity_reward"], num_generations=setting.group,
        generation_batch_size=setting.samples, max_completion_length=setting.longest, max_steps=STEPS,
        learning_rate=1e-4, lr_scheduler_type="constant", use_vllm=True, vllm_mode="colocate",
        **fields,
    )  # fmt: skip
    recorder = Recorder(run.device)
    trainer = GRPOTrainer(config)
    try:
        for method in ("sync", "sleep", "wake", "generate"):
            recorder.watch(trainer.rollout.engine, method)
        recorder.watch(trainer.rollout.probe, "check")
        steps = len(list(trainer.steps()))
    finally:
        trainer.rollout.close()
    engine = trainer.rollout.engine
    if engine.shares != bool(fields):
        raise UserError(f"the weights are not shared: {engine.warning}")
    differences = recorder.results.get("check", [])
    if steps < STEPS or len(differences) < STEPS - 1:
        raise UserError(f"{steps} of {STEPS} steps, {len(differences)} of at least {STEPS - 1} probes")
    freed = max(recorder.freed, default=0)
    return {
        "steps": steps, "probes": len(differences), "difference": max(differences),
        "seconds": recorder.median("generate"), "sync_seconds": recorder.median("sync"),
        "sleep_seconds": recorder.median("sleep"), "wake_seconds": recorder.median("wake"),
        "freed_gib": freed / 2**30 if run.device.type == "cuda" else None,
    }  # fmt: skip


def run_vllm_sleep(run: Run) -> bool:
    """Train and write the rows; whether everything was right."""
    peer = f"vllm {require('vllm', 'vllm').__version__}"
    quiet()
    setting, table, right = setting_for(run), run.table("vllm_sleep", KEY), True
    for contender, fields in CONTENDERS.items():
        row = {"model": setting.model, "dtype": setting.dtype, "contender": contender, "peer": peer}
        with tempfile.TemporaryDirectory() as name:
            try:
                row |= {"status": "ok", "detail": "", **train(run, setting, Path(name), fields)}
            except UserError as error:
                row |= {"status": "failed", "detail": one_line(error)}
        if row.get("freed_gib") is not None and not row["freed_gib"] > 0:
            row |= {"status": "failed", "detail": "no memory was freed while vLLM slept"}
        table.add(row)
        print("  ".join(f"{column} {value}" for column, value in row.items()), flush=True)
        right = right and row["status"] == "ok"
    return right


def body() -> None:
    if not run_vllm_sleep(start(parser(__doc__.splitlines()[0]).parse_args())):
        raise SystemExit(1)


if __name__ == "__main__":
    main(body)
