"""The metrics of a step, under TRL's names."""

from __future__ import annotations

import math
import sys
from dataclasses import replace

import torch
from torch import Tensor

from grpo_fast.model.transfer import send
from grpo_fast.rewards import Rewards
from grpo_fast.rollout import Response
from grpo_fast.train.advantages import nanstd
from grpo_fast.train.batch import StepBatch
from grpo_kernels import PolicyObjective, policy_loss


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


def group_metrics(rewards: Tensor, num_generations: int) -> dict[str, float]:
    """The rewards ``[B]`` by group, beside ``reward`` and ``reward_std``, which are those of the batch.

    ``groups/reward_mean`` is the mean over the groups of their mean reward, ``groups/reward_std`` that of the standard
    deviations within them, and ``groups/reward_mean_std`` the standard deviation of the means: whether rewards differ
    between completions of a prompt, from which a policy learns, or between prompts. NaN counts nowhere.
    """
    groups = rewards.view(-1, num_generations)
    means, spreads = groups.nanmean(1), nanstd(groups, 1).squeeze(1)
    spreads = spreads.masked_fill(groups.isnan().all(1), torch.nan)
    return {
        "groups/reward_mean": means.nanmean().item(),
        "groups/reward_std": spreads.nanmean().item(),
        "groups/reward_mean_std": nanstd(means).item(),
    }


def advantage_metrics(batch: StepBatch) -> dict[str, float]:
    """Mean and standard deviation over the completions in the loss, each with the advantage of its first token."""
    firsts = batch.offsets[:-1][batch.counted].to(batch.advantages.device)
    if not len(firsts):
        return {}
    values = batch.advantages[firsts].double()
    return {"advantages/mean": values.mean().item(), "advantages/std": nanstd(values).item()}


def completion_metrics(responses: list[Response]) -> dict[str, float]:
    """Lengths of all completions and of those that ended by themselves, and the share that did not.

    That share, ``completions/clipped_ratio``, is also called the non-stop rate. With a thinking budget, also the share
    of the completions in which it closed the thinking.
    """
    lengths = torch.tensor([float(len(response.token_ids)) for response in responses])
    ended = torch.tensor([response.finish_reason == "stop" for response in responses])
    metrics = {"completions/clipped_ratio": 1 - ended.float().mean().item()}
    masks = [response.mask for response in responses if response.mask is not None]
    if masks:
        metrics["completions/thinking_closed_ratio"] = sum(not all(mask) for mask in masks) / len(responses)
    for name, counted in (
        ("length", lengths),
        ("terminated_length", lengths[ended] if ended.any() else torch.zeros(1)),
    ):
        for statistic in ("mean", "min", "max"):
            metrics[f"completions/{statistic}_{name}"] = getattr(counted, statistic)().item()
    return metrics


def staleness_metrics(responses: list[Response], version: int) -> dict[str, float]:
    """By how many syncs the weights that sampled a token are older than those of `version`: mean and largest."""
    stale = [version - own for response in responses for own in response.versions or []]
    return {"sampling/staleness/mean": sum(stale) / len(stale), "sampling/staleness/max": max(stale)} if stale else {}


def loss_metrics(loss: Tensor, stats: dict[str, Tensor] | None, objective: PolicyObjective) -> dict[str, float]:
    """From the sums of `linear_policy_loss`, added up over the microbatches of a step; `stats` is None without any.

    Entropy, KL and clip ratios are means over the tokens (sequences, if a ratio belongs to a sequence) that were
    computed, which leaves out groups dropped for lack of variance.
    """
    if stats is None:
        return {"loss": loss.item()}
    # The host waits once for all of them.
    value, *read = torch.stack([loss.double(), *(value.double() for value in stats.values())]).cpu().tolist()
    sums = dict(zip(stats, read, strict=True))
    tokens = max(sums["tokens"], 1.0)
    if "divergence" in sums:
        # Of a distillation, whose loss is the divergence alone.
        return {"loss": value, "divergence": sums["divergence"] / tokens}
    ratios = max(sums["ratios"], 1.0)
    metrics = {"loss": value, "entropy": sums["entropy"] / tokens}
    if objective.uses_reference:
        metrics["kl"] = sums["kl"] / tokens
    low, high = sums["clip_low"] / ratios, sums["clip_high"] / ratios
    if objective.kind == "clip":
        metrics |= {"clip_ratio/low_mean": low, "clip_ratio/high_mean": high, "clip_ratio/region_mean": low + high}
    elif objective.kind == "cispo":
        metrics["cispo_clip_ratio"] = high
    return metrics


def clip_extremes(
    batch: StepBatch, logprobs: Tensor, advantages: Tensor, objective: PolicyObjective
) -> dict[str, float]:
    """``clip_ratio/low_min`` and ``clip_ratio/high_max``, as in TRL, of a clipped objective.

    They are the lowest share of the tokens of a completion that are clipped below, and the highest of those clipped
    above, over the completions that were computed. A ratio that belongs to a sequence clips all of its tokens or none.
    `logprobs` and `advantages` ``[N]`` are those of the update.
    """
    if objective.kind != "clip" or not batch.active:
        return {}
    counted = (batch.weights != 0).to(logprobs.device)
    # On the CPU, where the lengths are known; a GPU would make the host wait for them.
    rows = send(torch.arange(len(batch.samples)).repeat_interleave(batch.offsets.diff()), logprobs.device)

    def sums(values: Tensor) -> Tensor:
        zeros = torch.zeros(len(batch.samples), dtype=torch.float64, device=logprobs.device)
        return zeros.index_add(0, rows, values.double() * counted)

    tokens = sums(torch.ones_like(logprobs))
    active = torch.zeros(len(batch.samples), dtype=torch.bool)
    active[batch.active] = True
    computed = send(active, logprobs.device) & (tokens > 0)
    old = logprobs if batch.old_logprobs is None else batch.old_logprobs
    log_ratio = (logprobs - old).double()
    if objective.level != "token":
        whole = sums(log_ratio.nan_to_num(nan=0.0))
        log_ratio = (whole / tokens if objective.level == "sequence" else whole)[rows]
    ratio, advantages = log_ratio.exp(), advantages.to(logprobs.device)
    low = sums((ratio < objective.lower_bound) & (advantages < 0)) / tokens
    high = sums((ratio > objective.upper_bound) & (advantages > 0)) / tokens
    extremes = torch.stack([low.where(computed, torch.inf).min(), high.where(computed, -torch.inf).max()]).tolist()
    # Without a completion that was computed they are infinite.
    if not all(map(math.isfinite, extremes)):
        return {}
    return dict(zip(("clip_ratio/low_min", "clip_ratio/high_max"), extremes, strict=True))


def loss_parts(
    loss: float, batch: StepBatch, logprobs: Tensor, advantages: Tensor, objective: PolicyObjective
) -> dict[str, float]:
    """What the loss of a step is the sum of: ``loss/policy``, ``loss/kl`` and ``loss/entropy``, as far as it has them.

    `logprobs` and `advantages` ``[N]`` are those of the update. Without a KL term and an entropy bonus the policy part
    is the whole loss, and the result is empty.
    """
    if not (objective.uses_reference or objective.entropy_coef):
        return {}
    shared = {"correction": batch.correction, "old_logprobs": batch.old_logprobs, "selected": batch.selected}
    shared["cu_seqlens"] = batch.offsets.to(logprobs.device)
    # In float64, so that differences of sums keep their digits.
    logprobs, without_bonus = logprobs.double(), replace(objective, entropy_coef=0.0)
    alone = replace(without_bonus, beta=0.0)
    policy = policy_loss(logprobs, advantages, batch.weights, alone, **shared).loss.item()
    if not objective.uses_reference:
        return {"loss/policy": policy, "loss/entropy": loss - policy}
    both = policy_loss(logprobs, advantages, batch.weights, without_bonus, ref_logprobs=batch.ref_logprobs, **shared)
    kl = both.loss.item() - policy
    parts = {"loss/policy": policy, "loss/kl": kl}
    return parts | ({"loss/entropy": loss - policy - kl} if objective.entropy_coef else {})


def sampling_metrics(batch: StepBatch, logprobs: Tensor, by_token: bool) -> dict[str, float]:
    """The difference of the sampler's log-probabilities from the trainer's ``[N]``, and the ratios that correct for it.

    Means and extremes are over the tokens (sequences, if a ratio belongs to a sequence) that were computed; in TRL over
    all of them.
    """
    if not batch.active or not bool((batch.weights != 0).any()):
        return {}
    active = torch.zeros(len(batch.samples), dtype=torch.bool)
    active[batch.active] = True
    samples = torch.arange(len(active)).repeat_interleave(batch.offsets.diff()).to(logprobs.device)
    # A token without weight was forced, not sampled.
    computed = active.to(logprobs.device)[samples] & (batch.weights != 0)
    difference = (logprobs - batch.sampling_logprobs).abs()[computed].nan_to_num(nan=0.0)
    ratio, samples = batch.correction[computed], samples[computed]
    if not by_token:
        # All tokens of a sequence have its ratio.
        ratio = ratio[samples.diff(prepend=samples.new_full((1,), -1)) != 0]
    return {
        "sampling/sampling_logp_difference/mean": difference.mean().item(),
        "sampling/sampling_logp_difference/max": difference.max().item(),
        "sampling/importance_sampling_ratio/min": ratio.min().item(),
        "sampling/importance_sampling_ratio/mean": ratio.mean().item(),
        "sampling/importance_sampling_ratio/max": ratio.max().item(),
    }


def peak_memory(device: torch.device) -> dict[str, float]:
    """Peak memory in GiB: of tensors on a GPU since the last call, or the largest resident size of the process."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return {"memory/peak_allocated_gib": peak / 2**30}
    return {"memory/peak_rss_gib": _peak_rss() / 2**30}


def _peak_rss() -> int:
    """The largest resident size of this process so far, bytes."""
    try:
        import resource
    except ImportError:
        import psutil

        return psutil.Process().memory_info().peak_wset
    # In bytes on a Mac, otherwise in KiB.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
