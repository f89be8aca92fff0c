"""The functions of Stanford CS336's assignment 5 (Alignment and Reasoning RL, spring 2025), on the fused operations.

Names, arguments and results are the assignment's, so its tests pass with these functions in `tests/adapters.py`.
Log-probabilities come from `linear_logprob`, without logits.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from grpo_fast.data.encoding import completion_text
from grpo_fast.errors import UserError
from grpo_fast.model.layout import Microbatch
from grpo_fast.model.microbatch_policy import MicrobatchPolicy
from grpo_fast.rollout import Sampling, TransformersRollout
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
    prompts, outputs = ([_encode(tokenizer, text) for text in texts] for texts in (prompt_strs, output_strs))
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    rows = [prompt + output for prompt, output in zip(prompts, outputs, strict=True)]
    tokens = torch.full((len(rows), max(map(len, rows))), pad)
    mask = torch.zeros_like(tokens, dtype=torch.bool)
    for line, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        tokens[line, : len(row)] = torch.tensor(row)
        mask[line, len(prompt) : len(row)] = True
    return {"input_ids": tokens[:, :-1], "labels": tokens[:, 1:], "response_mask": mask[:, 1:]}


def _encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def compute_entropy(logits: Tensor) -> Tensor:
    """Entropy in nats of the last dimension: ``[..., V]`` to ``[...]``."""
    log_p = logits.log_softmax(-1)
    # A probability of 0 adds nothing, but its logarithm is infinite.
    return -(log_p.exp() * log_p.clamp(min=torch.finfo(log_p.dtype).min)).sum(-1)


def get_response_log_probs(
    model: nn.Module, input_ids: Tensor, labels: Tensor, return_token_entropy: bool = False
) -> dict[str, Tensor]:
    """Log-probabilities of `labels`, and the entropies of their distributions, without an ``[B, T, V]`` tensor.

    Args:
        model: a transformers causal LM.
        input_ids: ``[B, T]`` int64, padded on the right.
        labels: ``[B, T]`` int64, the next tokens.
        return_token_entropy: also return entropies.

    Returns:
        ``log_probs`` (and ``token_entropy``), ``[B, T]`` float32 in nats, differentiable; prompts and padding are not
        masked out.
    """
    rows, length = input_ids.shape
    places = torch.arange(rows * length, device=input_ids.device).view(rows, length)
    microbatch = Microbatch(
        input_ids=input_ids,
        position_ids=places[:1].expand(rows, -1),
        attention_mask=torch.ones_like(input_ids),
        targets=labels,
        sources=places,
    )
    policy = MicrobatchPolicy(model)
    if not return_token_entropy:
        return {"log_probs": policy(microbatch)}
    log_probs, entropy = policy(microbatch, with_entropy=True)
    return {"log_probs": log_probs, "token_entropy": entropy}


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


def grpo_train_loop(
    policy: nn.Module,
    tokenizer: Any,
    prompts: list[str],
    ground_truths: list[str],
    reward_fn: RewardFunction,
    *,
    n_grpo_steps: int = 200,
    learning_rate: float = 1e-5,
    advantage_eps: float = 1e-6,
    rollout_batch_size: int = 256,
    group_size: int = 8,
    sampling_temperature: float = 1.0,
    sampling_min_tokens: int = 4,
    sampling_max_tokens: int = 1024,
    epochs_per_rollout_batch: int = 1,
    train_batch_size: int = 256,
    gradient_accumulation_steps: int = 128,
    loss_type: LossType = "reinforce_with_baseline",
    use_std_normalization: bool = True,
    cliprange: float = 0.2,
    max_grad_norm: float = 1.0,
    stop: str | None = "</answer>",
    max_tokens_per_generation_batch: int = 65536,
    seed: int = 0,
    log: Callable[[dict[str, float]], None] | None = None,
) -> list[dict[str, float]]:
    """The assignment's GRPO loop with its hyperparameters; `policy` is trained in place, on its own device.

    Each step samples `group_size` responses to ``rollout_batch_size / group_size`` random prompts, scores them, and
    takes ``epochs_per_rollout_batch * rollout_batch_size / train_batch_size`` optimizer steps (AdamW, betas 0.9 and
    0.95, no weight decay) in microbatches of ``train_batch_size / gradient_accumulation_steps`` responses.

    Args:
        policy: a transformers causal LM.
        tokenizer: its tokenizer, with a padding token.
        prompts, ground_truths: the training set.
        reward_fn: as in `compute_group_normalized_rewards`.
        stop: sampling ends with this text, unless it ends within the first `sampling_min_tokens` tokens (as in vLLM).
        log: called with the metrics of each step.

    Returns:
        The metrics of all steps: the rewards' metadata, ``loss``, ``grad_norm``, ``token_entropy`` and
        ``response_tokens`` (means over the optimizer steps and the responses), and ``clip_fraction`` for grpo_clip.

    Raises:
        UserError: sizes do not divide each other, or a response is empty.
    """
    sizes = {
        "group_size": (group_size, "rollout_batch_size", rollout_batch_size),
        "train_batch_size": (train_batch_size, "rollout_batch_size", rollout_batch_size),
        "gradient_accumulation_steps": (gradient_accumulation_steps, "train_batch_size", train_batch_size),
    }
    for name, (part, of, whole) in sizes.items():
        if part < 1 or whole % part:
            raise UserError(f"{name}={part} is not allowed: it must divide {of}={whole}")
    if len(prompts) != len(ground_truths):
        raise UserError(f"there are {len(prompts)} prompts, but {len(ground_truths)} ground truths")
    model = policy.get_base_model() if hasattr(policy, "get_base_model") else policy
    rollout = TransformersRollout(model, tokenizer, max_tokens_per_generation_batch)
    generation_kwargs = {"min_new_tokens": min(sampling_min_tokens, sampling_max_tokens)}
    generation_kwargs |= {"stop": stop} if stop else {}
    sampling = Sampling(
        group_size, sampling_max_tokens, sampling_temperature, generation_kwargs=generation_kwargs
    )  # fmt: skip
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0, betas=(0.9, 0.95))
    order, history = random.Random(seed), []
    micro = train_batch_size // gradient_accumulation_steps

    for step in range(1, n_grpo_steps + 1):
        chosen = order.choices(range(len(prompts)), k=rollout_batch_size // group_size)
        prompt_ids = [_encode(tokenizer, prompts[index]) for index in chosen]
        responses = [
            completion_text(tokenizer, response.token_ids, response.ended, response.past or 0)
            for response in rollout.generate(prompt_ids, sampling)
        ]
        chosen = [index for index in chosen for _ in range(group_size)]
        advantages, rewards, figures = compute_group_normalized_rewards(
            reward_fn, responses, [ground_truths[index] for index in chosen], group_size, advantage_eps,
            use_std_normalization,
        )  # fmt: skip
        microbatches = []
        for first in range(0, rollout_batch_size, micro):
            rows = slice(first, first + micro)
            batch = tokenize_prompt_and_output([prompts[i] for i in chosen[rows]], responses[rows], tokenizer)
            if not batch["response_mask"].any(1).all():
                raise UserError(f"step {step}: a response is empty; raise sampling_min_tokens={sampling_min_tokens}")
            batch |= {"raw_rewards": rewards[rows, None], "advantages": advantages[rows, None], "old_log_probs": None}
            microbatches.append({name: None if v is None else v.to(model.device) for name, v in batch.items()})
        if loss_type == "grpo_clip":
            with torch.no_grad():
                for batch in microbatches:
                    scored = get_response_log_probs(model, batch["input_ids"], batch["labels"])
                    batch["old_log_probs"] = scored["log_probs"]

        policy.train()
        updates = []
        for _ in range(epochs_per_rollout_batch):
            for first in range(0, len(microbatches), gradient_accumulation_steps):
                minibatch = microbatches[first : first + gradient_accumulation_steps]
                updates.append(_accumulate_gradients(model, minibatch, loss_type, cliprange))
                updates[-1]["grad_norm"] = nn.utils.clip_grad_norm_(trained, max_grad_norm).item()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        means = {name: sum(update[name] for update in updates) / len(updates) for name in updates[0]}
        history.append({"step": step, **figures, **means})
        if log is not None:
            log(history[-1])
    return history


def _accumulate_gradients(
    model: nn.Module, microbatches: list[dict[str, Tensor]], loss_type: LossType, cliprange: float
) -> dict[str, float]:
    """Forward and backward of one optimizer step's microbatches, and its metrics."""
    count, figures = len(microbatches), defaultdict(float)
    for batch in microbatches:
        mask = batch["response_mask"]
        scored = get_response_log_probs(model, batch["input_ids"], batch["labels"], return_token_entropy=True)
        loss, metadata = grpo_microbatch_train_step(
            scored["log_probs"], mask, count, loss_type, batch["raw_rewards"], batch["advantages"],
            batch["old_log_probs"], cliprange,
        )  # fmt: skip
        figures["loss"] += loss.item()
        figures["token_entropy"] += masked_mean(scored["token_entropy"].detach(), mask).item() / count
        figures["response_tokens"] += mask.sum().item() / len(mask) / count
        if "clip_fraction" in metadata:
            figures["clip_fraction"] += metadata["clip_fraction"].item() / count
    return figures
