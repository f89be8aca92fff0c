"""The functions of CS336's assignment 5 that its tests call, and its two reward functions; see `cs336`."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from grpo_fast.errors import UserError
from grpo_fast.model.layout import Microbatch
from grpo_fast.model.microbatch_policy import MicrobatchPolicy
from grpo_fast.rewards import RewardModel
from grpo_fast.rewards.functions.answer_text import last_box
from grpo_kernels import masked_mean

LossType = Literal["no_baseline", "reinforce_with_baseline", "grpo_clip"]
RewardFunction = Callable[[str, str], dict[str, float]]
# Arguments that each loss type needs besides the policy's log-probabilities.
NEEDED = {
    "no_baseline": ("raw_rewards",),
    "reinforce_with_baseline": ("advantages",),
    "grpo_clip": ("advantages", "old_log_probs", "cliprange"),
}


def tokenize_prompt_and_output(prompt_strs: list[str], output_strs: list[str], tokenizer: Any) -> dict[str, Tensor]:
    """Tokens of each prompt followed by those of its output, padded on the right; no special tokens are added.

    Returns:
        ``input_ids`` and ``labels``, ``[B, T]`` int64 with T = longest sequence - 1: the tokens without the last and
        without the first one; and ``response_mask``, ``[B, T]`` bool: whether the label belongs to the output.

    Raises:
        UserError: the numbers of prompts and outputs differ.
    """
    if len(prompt_strs) != len(output_strs):
        raise UserError(f"there are {len(prompt_strs)} prompts, but {len(output_strs)} outputs")
    prompts, outputs = ([encode(tokenizer, text) for text in texts] for texts in (prompt_strs, output_strs))
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    rows = [prompt + output for prompt, output in zip(prompts, outputs, strict=True)]
    tokens = torch.full((len(rows), max(map(len, rows))), pad)
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    for line, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        tokens[line, : len(row)] = torch.tensor(row)
        mask[line, len(prompt) : len(row)] = True
    return {"input_ids": tokens[:, :-1], "labels": tokens[:, 1:], "response_mask": mask[:, 1:]}


def encode(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text, without special tokens."""
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def compute_entropy(logits: Tensor) -> Tensor:
    """Entropy in nats of the last dimension: ``[..., V]`` to ``[...]``."""
    log_p = logits.log_softmax(-1)
    # A probability of 0 adds nothing, but its logarithm is infinite.
    return -(log_p.exp() * log_p.clamp(min=torch.finfo(log_p.dtype).min)).sum(-1)


def get_response_log_probs(
    model: nn.Module,
    input_ids: Tensor,
    labels: Tensor,
    return_token_entropy: bool = False,
    response_mask: Tensor | None = None,
) -> dict[str, Tensor]:
    """Log-probabilities of `labels`, and the entropies of their distributions, without an ``[B, T, V]`` tensor.

    Args:
        model: a transformers causal LM.
        input_ids: ``[B, T]`` int64, padded on the right.
        labels: ``[B, T]`` int64, the next tokens.
        return_token_entropy: also return entropies.
        response_mask: ``[B, T]`` bool; only these tokens reach the head, and the others are 0 in the result (not an
            argument of the assignment's).

    Returns:
        ``log_probs`` (and ``token_entropy``), ``[B, T]`` float32 in nats, differentiable; without `response_mask`,
        prompts and padding are not masked out.
    """
    rows, length = input_ids.shape
    places = torch.arange(rows * length, device=input_ids.device).view(rows, length)
    microbatch = Microbatch(
        input_ids=input_ids,
        position_ids=places[:1].expand(rows, -1),
        attention_mask=torch.ones_like(input_ids),
        targets=labels if response_mask is None else labels[response_mask],
        sources=places if response_mask is None else places[response_mask],
    )
    policy = MicrobatchPolicy(model)
    names = ("log_probs", "token_entropy") if return_token_entropy else ("log_probs",)
    values = policy(microbatch, with_entropy=True) if return_token_entropy else (policy(microbatch),)
    if response_mask is not None:
        values = [value.new_zeros(rows, length).masked_scatter(response_mask, value) for value in values]
    return dict(zip(names, values, strict=True))


def masked_normalize(tensor: Tensor, mask: Tensor, normalize_constant: float = 1.0, dim: int | None = None) -> Tensor:
    """Sum over `dim` (None: all dimensions) of the entries where `mask` is 1, divided by `normalize_constant`."""
    selected = torch.where(mask.bool(), tensor, 0.0)
    return (selected.sum() if dim is None else selected.sum(dim)) / normalize_constant


def sft_microbatch_train_step(
    policy_log_probs: Tensor, response_mask: Tensor, gradient_accumulation_steps: int, normalize_constant: float = 1.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """Backward of the mean over the batch of ``-sum(log p) / normalize_constant``, over `gradient_accumulation_steps`.

    Args:
        policy_log_probs: ``[B, T]``, differentiable.
        response_mask: ``[B, T]``, 1 where the token belongs to the response.

    Returns:
        The scalar loss, detached, and ``response_tokens``, their number.
    """
    each = masked_normalize(-policy_log_probs, response_mask, normalize_constant, dim=-1)
    loss = each.mean() / gradient_accumulation_steps
    loss.backward()
    return loss.detach(), {"response_tokens": response_mask.sum()}


def compute_group_normalized_rewards(
    reward_fn: RewardFunction,
    rollout_responses: list[str],
    repeated_ground_truths: list[str],
    group_size: int,
    advantage_eps: float,
    normalize_by_std: bool,
) -> tuple[Tensor, Tensor, dict[str, float]]:
    """``r - mean``, or ``(r - mean) / (std + advantage_eps)``, within the group (std with Bessel's correction).

    Args:
        reward_fn: maps a response and its ground truth to ``reward``, ``format_reward`` and ``answer_reward``.
        rollout_responses: B responses, those to one prompt next to each other.
        repeated_ground_truths: B ground truths.
        group_size: responses to a prompt.

    Returns:
        Advantages and raw rewards, ``[B]`` float32 each; and mean, standard deviation, minimum and maximum of the
        reward, with the means of the other two.

    Raises:
        UserError: the lengths differ, or `group_size` does not divide them.
    """
    count = len(rollout_responses)
    if count != len(repeated_ground_truths):
        raise UserError(f"there are {count} responses, but {len(repeated_ground_truths)} ground truths")
    if group_size < 1 or count % group_size:
        raise UserError(f"group_size={group_size} is not allowed: it must divide the {count} responses")
    scored = [reward_fn(*pair) for pair in zip(rollout_responses, repeated_ground_truths, strict=True)]
    rewards = torch.tensor([float(entry["reward"]) for entry in scored], dtype=torch.float64)
    groups = rewards.view(-1, group_size)
    advantages = groups - groups.mean(1, keepdim=True)
    if normalize_by_std:
        advantages = advantages / (groups.std(1, keepdim=True) + advantage_eps)
    names = [name for name in ("reward", "format_reward", "answer_reward") if name in scored[0]]
    metadata = {f"mean_{name}": sum(float(entry[name]) for entry in scored) / count for name in names}
    metadata |= {f"{name}_reward": getattr(rewards, name)().item() for name in ("std", "min", "max")}
    return advantages.flatten().float(), rewards.float(), metadata


def compute_naive_policy_gradient_loss(raw_rewards_or_advantages: Tensor, policy_log_probs: Tensor) -> Tensor:
    """``-A log p`` of each token, ``[B, T]``, from ``[B, 1]`` and ``[B, T]``."""
    return -raw_rewards_or_advantages * policy_log_probs


def compute_grpo_clip_loss(
    advantages: Tensor, policy_log_probs: Tensor, old_log_probs: Tensor, cliprange: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """``-min(r A, clip(r, 1 - cliprange, 1 + cliprange) A)`` of each token, with ``r = exp(log p - old)``.

    Args:
        advantages: ``[B, 1]``.
        policy_log_probs: ``[B, T]``, differentiable.
        old_log_probs: ``[B, T]``, a constant.

    Returns:
        The loss ``[B, T]``, and ``clipped`` ``[B, T]`` bool: whether the clipped side of the minimum is smaller.

    Raises:
        UserError: `cliprange` is not above 0.
    """
    if not 0 < cliprange < math.inf:
        raise UserError(f"cliprange={cliprange!r} is not allowed: it must be a finite number above 0")
    ratio = torch.exp(policy_log_probs - old_log_probs.detach())
    free, clipped = ratio * advantages, ratio.clamp(1 - cliprange, 1 + cliprange) * advantages
    return -torch.minimum(free, clipped), {"clipped": clipped < free}


def compute_policy_gradient_loss(
    policy_log_probs: Tensor,
    loss_type: LossType,
    raw_rewards: Tensor | None = None,
    advantages: Tensor | None = None,
    old_log_probs: Tensor | None = None,
    cliprange: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The per-token loss ``[B, T]`` of a loss type, and its metadata.

    Args:
        policy_log_probs: ``[B, T]``, differentiable.
        loss_type: ``"no_baseline"`` (with `raw_rewards`), ``"reinforce_with_baseline"`` (`advantages`) or
            ``"grpo_clip"`` (`advantages`, `old_log_probs`, `cliprange`).
        raw_rewards, advantages: ``[B, 1]``.
        old_log_probs: ``[B, T]``.

    Raises:
        UserError: the loss type is unknown, or an argument that it needs is missing.
    """
    if loss_type not in NEEDED:
        raise UserError(f"loss_type={loss_type!r} is not allowed: it must be one of {', '.join(NEEDED)}")
    given = {"raw_rewards": raw_rewards, "advantages": advantages, "old_log_probs": old_log_probs}
    given["cliprange"] = cliprange
    for name in NEEDED[loss_type]:
        if given[name] is None:
            raise UserError(f"loss_type={loss_type!r} needs {name}")
    if loss_type == "grpo_clip":
        return compute_grpo_clip_loss(advantages, policy_log_probs, old_log_probs, cliprange)
    return compute_naive_policy_gradient_loss(given[NEEDED[loss_type][0]], policy_log_probs), {}


def grpo_microbatch_train_step(
    policy_log_probs: Tensor,
    response_mask: Tensor,
    gradient_accumulation_steps: int,
    loss_type: LossType,
    raw_rewards: Tensor | None = None,
    advantages: Tensor | None = None,
    old_log_probs: Tensor | None = None,
    cliprange: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Backward of the mean over the batch of each response's mean loss, over `gradient_accumulation_steps`.

    Args:
        response_mask: ``[B, T]``, 1 where the token belongs to the response. A row without any makes the loss NaN.
        policy_log_probs, loss_type, raw_rewards, advantages, old_log_probs, cliprange: as in
            `compute_policy_gradient_loss`.

    Returns:
        The scalar loss, detached, and the loss type's metadata, with ``clip_fraction`` for ``"grpo_clip"``.
    """
    each, metadata = compute_policy_gradient_loss(
        policy_log_probs, loss_type, raw_rewards, advantages, old_log_probs, cliprange
    )
    loss = masked_mean(each, response_mask, dim=-1).mean() / gradient_accumulation_steps
    loss.backward()
    if "clipped" in metadata:
        metadata = metadata | {"clip_fraction": masked_mean(metadata["clipped"].float(), response_mask)}
    return loss.detach(), metadata


def r1_zero_reward_fn(response: str, ground_truth: Any, fast: bool = True) -> dict[str, float]:
    """The reward of a response to the prompt `r1_zero`: 1 if it has the format and the right answer, else 0.

    Args:
        response: what follows ``<think>``. The format is ``</think> <answer>`` with exactly one space, and
            ``</answer>``; the answer is what follows the last ``<answer>``.
        ground_truth: a text or a number, or a list of them, of which one has to be met.
        fast: accepted as in the assignment. Its quick judge misses some right answers that the slow one accepts; here
            the answer is judged in the same way for both, by `math_answer`, for at most 10 s in its own process.

    Returns:
        ``format_reward``, ``answer_reward`` and ``reward``. A wrong answer in the right format has only the first, and
        without the format all are 0.
    """
    if "</think> <answer>" not in response or "</answer>" not in response:
        return _rewards(False, False)
    return _rewards(True, _is_right(response.split("<answer>")[-1].replace("</answer>", ""), ground_truth))


def question_only_reward_fn(response: str, ground_truth: Any, fast: bool = True) -> dict[str, float]:
    r"""The reward of a response to the prompt `question_only`: its format is a ``\boxed{}``, which has the answer.

    Arguments and results are those of `r1_zero_reward_fn`.
    """
    found = last_box(response)
    return _rewards(False, False) if found is None else _rewards(True, _is_right(found, ground_truth))


def _rewards(formatted: bool, right: bool) -> dict[str, float]:
    return {"format_reward": float(formatted), "answer_reward": float(right), "reward": float(formatted and right)}


def _is_right(answer: str, ground_truth: Any) -> bool:
    truths = [str(truth) for truth in (ground_truth if isinstance(ground_truth, list) else [ground_truth])]
    if answer.strip() in (truth.strip() for truth in truths):
        return True
    completions = [f"<answer>{answer}</answer>"] * len(truths)
    return bool((_judge()([""] * len(truths), completions, {"answer": truths}).each == 1).any())


@cache
def _judge() -> RewardModel:
    return RewardModel(["math_answer"], None)
