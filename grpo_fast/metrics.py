"""The figures of a step, under TRL's names."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from torch import Tensor

from grpo_fast.rewards import Rewards
from grpo_fast.rollout import Response


def reward_metrics(names: list[str], rewards: Rewards, group_std: Tensor, equal: Tensor) -> dict[str, float]:
    """``reward``, ``reward_std`` (mean over groups), ``frac_reward_zero_std`` and mean and std of each function."""
    metrics = {
        "reward": rewards.total.mean().item(),
        "reward_std": group_std.mean().item(),
        "frac_reward_zero_std": equal.float().mean().item(),
    }
    for index, name in enumerate(names):
        values = rewards.each[:, index]
        values = values[~values.isnan()]
        metrics[f"rewards/{name}/mean"] = values.mean().item()
        metrics[f"rewards/{name}/std"] = values.std().item() if values.numel() > 1 else 0.0
    return metrics


def completion_metrics(responses: list[Response]) -> dict[str, float]:
    """Lengths of all completions and of those that ended by themselves, and the share that was cut off."""
    lengths = torch.tensor([float(len(response.token_ids)) for response in responses])
    ended = torch.tensor([response.finish_reason == "stop" for response in responses])
    metrics = {
        "completions/mean_length": lengths.mean().item(),
        "completions/min_length": lengths.min().item(),
        "completions/max_length": lengths.max().item(),
        "completions/clipped_ratio": 1 - ended.float().mean().item(),
    }
    terminated = lengths[ended] if ended.any() else torch.zeros(1)
    metrics["completions/mean_terminated_length"] = terminated.mean().item()
    metrics["completions/min_terminated_length"] = terminated.min().item()
    metrics["completions/max_terminated_length"] = terminated.max().item()
    return metrics


def loss_metrics(loss: Tensor, stats: dict[str, Tensor], clips: bool, uses_reference: bool) -> dict[str, float]:
    """From the sums that `linear_policy_loss` returned, added up over the microbatches of a step."""
    sums = {name: value.item() for name, value in stats.items()}
    tokens, ratios = max(sums["tokens"], 1.0), max(sums["ratios"], 1.0)
    metrics = {"loss": loss.item(), "entropy": sums["entropy"] / tokens}
    if uses_reference:
        metrics["kl"] = sums["kl"] / tokens
    if clips:
        low, high = sums["clip_low"] / ratios, sums["clip_high"] / ratios
        metrics |= {"clip_ratio/low_mean": low, "clip_ratio/high_mean": high, "clip_ratio/region_mean": low + high}
    return metrics


class MetricsFile:
    """``metrics.jsonl``: one object a line, flushed at once, so that an interrupted run keeps its figures."""

    def __init__(self, path: Path):
        self.file = path.open("w", encoding="utf-8")

    def write(self, metrics: dict[str, float]) -> None:
        plain = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in metrics.items()}
        self.file.write(json.dumps(plain) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


def read_metrics(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
