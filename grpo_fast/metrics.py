"""The figures of a step, under TRL's names."""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
import zlib
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from grpo_fast.advantages import nanstd
from grpo_fast.errors import UserError, writing
from grpo_fast.files import replace_text, split_lines
from grpo_fast.rewards import Rewards
from grpo_fast.rollout import Response
from grpo_kernels import PolicyObjective

if TYPE_CHECKING:
    from grpo_fast.collect import StepBatch

# Figures that depend on the machine: the same run gives others elsewhere, or a second time.
MACHINE_METRICS = frozenset({"step_time", "tokens_per_second", "memory/peak_allocated_gib", "memory/peak_rss_gib"})


def reward_metrics(names: list[str], rewards: Rewards, equal: Tensor) -> dict[str, float]:
    """``reward``, ``reward_std`` and ``frac_reward_zero_std``, and mean, std and share of errors of each function."""
    metrics = {
        "reward": rewards.total.nanmean().item(),
        "reward_std": nanstd(rewards.total).item(),
        "frac_reward_zero_std": equal.float().mean().item(),
    }
    for index, name in enumerate(names):
        metrics[f"rewards/{name}/mean"] = rewards.each[:, index].nanmean().item()
        metrics[f"rewards/{name}/std"] = nanstd(rewards.each[:, index]).item()
        metrics[f"rewards/{name}/errors"] = rewards.errors[:, index].float().mean().item()
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


def loss_metrics(loss: Tensor, stats: dict[str, Tensor] | None, objective: PolicyObjective) -> dict[str, float]:
    """From the sums that `linear_policy_loss` returned, added up over the microbatches of a step.

    Entropy, KL and clip ratios are means over the tokens (sequences, where ratios are theirs) that were computed:
    groups dropped for want of variance are not among them. `stats` is None where all were dropped.
    """
    if stats is None:
        return {"loss": loss.item()}
    sums = {name: value.item() for name, value in stats.items()}
    tokens, ratios = max(sums["tokens"], 1.0), max(sums["ratios"], 1.0)
    metrics = {"loss": loss.item(), "entropy": sums["entropy"] / tokens}
    if objective.uses_reference:
        metrics["kl"] = sums["kl"] / tokens
    low, high = sums["clip_low"] / ratios, sums["clip_high"] / ratios
    if objective.kind == "clip":
        metrics |= {"clip_ratio/low_mean": low, "clip_ratio/high_mean": high, "clip_ratio/region_mean": low + high}
    elif objective.kind == "cispo":
        metrics["cispo_clip_ratio"] = high
    return metrics


def sampling_metrics(batch: StepBatch, logprobs: Tensor, by_token: bool) -> dict[str, float]:
    """How far the sampler's log-probabilities are from the trainer's ``[N]``, and the ratios that correct for it.

    Over the tokens (of ratios that are the sequence's: the sequences) that were computed, as in TRL over all.
    """
    if not batch.active:
        return {}
    active = torch.zeros(len(batch.samples), dtype=torch.bool)
    active[batch.active] = True
    computed = active.repeat_interleave(batch.offsets.diff()).to(logprobs.device)
    difference = (logprobs - batch.sampling_logprobs).abs()[computed].nan_to_num(nan=0.0)
    firsts = batch.offsets[:-1][active].to(logprobs.device)
    ratio = batch.correction[computed] if by_token else batch.correction[firsts]
    return {
        "sampling/sampling_logp_difference/mean": difference.mean().item(),
        "sampling/sampling_logp_difference/max": difference.max().item(),
        "sampling/importance_sampling_ratio/min": ratio.min().item(),
        "sampling/importance_sampling_ratio/mean": ratio.mean().item(),
        "sampling/importance_sampling_ratio/max": ratio.max().item(),
    }


def peak_memory(device: torch.device) -> dict[str, float]:
    """Peak memory in GiB: on a GPU what tensors took since the last call, else the process' largest resident size."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return {"memory/peak_allocated_gib": peak / 2**30}
    return {"memory/peak_rss_gib": _peak_rss() / 2**30}


def _peak_rss() -> int:
    """The most memory that this process has had, in bytes."""
    try:
        import resource
    except ImportError:
        import psutil

        return psutil.Process().memory_info().peak_wset
    # In KiB, but on a Mac in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def json_ready(content: Any) -> Any:
    """`content` with None for what JSON has no number for: NaN and the infinities."""
    if isinstance(content, dict):
        return {key: json_ready(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [json_ready(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


class LinesFile:
    """A JSON-lines file, an object a line, flushed at once, so that an interrupted run keeps what it wrote.

    With `append`, the lines that are there stay. With `checksums`, each gets a last entry ``crc32``: that of the line
    without it.
    """

    def __init__(self, path: Path, append: bool = False, checksums: bool = False):
        self.path, self.mode, self.checksums, self.file = path, "a" if append else "w", checksums, None

    def write(self, entry: dict[str, Any]) -> None:
        with writing(self.path):
            if self.file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self.file = self.path.open(self.mode, encoding="utf-8")
            line = json.dumps(json_ready(entry), ensure_ascii=False)
            if self.checksums:
                line = f'{line[:-1]}, "crc32": {zlib.crc32(line.encode())}}}'
            self.file.write(line + "\n")
            self.file.flush()

    def __enter__(self) -> LinesFile:
        return self

    def __exit__(self, *_) -> None:
        if self.file is not None:
            # What could not be flushed was reported when it was written.
            with suppress(OSError):
                self.file.close()


_CHECKSUM = re.compile(r', "crc32": (\d+)\}$')


def without_checksum(line: str) -> str:
    """A line of ``metrics.jsonl`` without the CRC-32 at its end; as it is where there is none.

    Raises:
        ValueError: the checksum is not that of the line.
    """
    line = line.rstrip("\n")
    found = _CHECKSUM.search(line)
    if not found:
        return line
    bare = line[: found.start()] + "}"
    if zlib.crc32(bare.encode()) != int(found[1]):
        raise ValueError("its checksum is that of another line")
    return bare


def parse_metrics(text: str) -> tuple[list[tuple[str, dict[str, float]]], list[int]]:
    """The lines of ``metrics.jsonl`` with what they say, and the numbers of those that are damaged.

    A last line that was cut off by a kill is neither. A run of an earlier version has lines without checksums, which
    are damaged only where they are not JSON, or stand behind one that has its checksum.
    """
    lines, damaged, checked = [], [], False
    for number, line in enumerate(split_lines(text), 1):
        found = bool(_CHECKSUM.search(line))
        checked = checked or found
        try:
            entry = json.loads(without_checksum(line))
        except (ValueError, RecursionError):
            entry = None
        if isinstance(entry, dict) and type(entry.get("step")) is int and found == checked:
            lines.append((line, {name: math.nan if value is None else value for name, value in entry.items()}))
        else:
            damaged.append(number)
    if not text.endswith("\n") and damaged[-1:] == [text.count("\n") + 1]:
        damaged.pop()
    return lines, damaged


def read_metrics(path: Path) -> list[dict[str, float]]:
    """The figures of every step in ``metrics.jsonl``, NaN where a number is missing.

    Raises:
        UserError: a line is damaged.
    """
    lines, damaged = parse_metrics(path.read_text(encoding="utf-8", errors="replace"))
    if damaged:
        raise UserError(f"{path}: line {damaged[0]} is damaged")
    return [entry for _, entry in lines]


def cut_metrics(path: Path, step: int) -> tuple[list[dict[str, float]], str]:
    """Keep only the lines up to `step`, and return what they say; those after it are about to be written once more.

    Where lines are damaged, and where all are to be written once more, the file as it was stays beside it under
    another name, and a note that says so is returned, too.

    Raises:
        UserError: the file cannot be written.
    """
    if not path.exists():
        return [], ""
    lines, damaged = parse_metrics(path.read_text(encoding="utf-8", errors="replace"))
    kept = [(line, entry) for line, entry in lines if entry["step"] <= step]
    note = ""
    if damaged or (lines and not kept):
        with writing(path):
            copy = _keep_copy(path)
        numbers = ", ".join(map(str, damaged[:3])) + f" and {len(damaged) - 3} more" * (len(damaged) > 3)
        what = f"line {numbers} is damaged and left out" if damaged else f"{len(lines)} steps are made once more"
        note = f"{path}: {what}; the file as it was is kept as {copy}"
    replace_text(path, "".join(line + "\n" for line, _ in kept))
    return [entry for _, entry in kept], note


def _keep_copy(path: Path) -> Path:
    """Copy a file to ``NAME.1``, or the first number that is free."""
    number = 1
    while (copy := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    return Path(shutil.copy2(path, copy))
