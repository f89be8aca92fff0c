"""Small runs to stop, resume and compare."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from grpo_fast.config import GRPOConfig
from grpo_fast.files import read_metrics
from grpo_fast.train.checkpoint import checkpoints
from grpo_fast.trainer import GRPOTrainer
from support.small import SMALL

# Metrics that depend on the machine and differ between identical runs.
MACHINE_METRICS = frozenset({"step_time", "tokens_per_second", "memory/peak_allocated_gib", "memory/peak_rss_gib"})


def config(folder, **fields) -> GRPOConfig:
    return GRPOConfig(**{**SMALL, "max_steps": 5, "save_steps": 1, "output_dir": str(folder), **fields})


def trainer(folder, resume=False, **fields) -> GRPOTrainer:
    return GRPOTrainer(config(folder, resume_from_checkpoint=resume, **fields))


def figures(folder: Path) -> list[dict]:
    """The run's metrics, except those that depend on the machine."""
    entries = read_metrics(folder / "metrics.jsonl")
    return [{name: value for name, value in entry.items() if name not in MACHINE_METRICS} for entry in entries]


def saved_weights(folder: Path) -> dict[str, torch.Tensor]:
    newest = checkpoints(folder)[-1]
    return {path.name: load_file(path) for path in newest.glob("*model*.safetensors")}


def assert_same_run(folder: Path, whole: Path) -> None:
    """Assert that metrics of every step, last weights and summary equal those of the other run, bit for bit."""
    assert figures(folder) == figures(whole)
    assert checkpoints(folder)[-1].name == checkpoints(whole)[-1].name
    ours, theirs = saved_weights(folder), saved_weights(whole)
    assert ours
    for name, tensors in theirs.items():
        assert tensors.keys() == ours[name].keys()
        assert all(torch.equal(tensor, ours[name][key]) for key, tensor in tensors.items())
    summaries = [json.loads((path / "summary.json").read_text()) for path in (folder, whole)]
    assert [s.pop("train_seconds") > 0 for s in summaries] == [True, True]
    assert summaries[0] == summaries[1]
