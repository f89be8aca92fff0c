"""Stanford CS336's assignment 5 (Alignment and Reasoning RL, spring 2025), on the fused operations.

Names, arguments and results are the assignment's, so its tests pass with these functions in `tests/adapters.py`. The
two reward functions are here, too (`r1_zero_reward_fn`, `question_only_reward_fn`), and the loops: `sft_train_loop`,
`expert_iteration` and `grpo_train_loop`. Each loop validates at intervals, keeps sampled texts over time and draws the
curves. Log-probabilities come from `linear_logprob`, without logits, and in the loops for the responses' tokens alone.
"""

from __future__ import annotations

import random
import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from grpo_fast.errors import UserError
from grpo_fast.integrations.cs336_functions import (
    NEEDED,
    LossType,
    RewardFunction,
    compute_entropy,
    compute_group_normalized_rewards,
    compute_grpo_clip_loss,
    compute_naive_policy_gradient_loss,
    compute_policy_gradient_loss,
    encode,
    get_response_log_probs,
    grpo_microbatch_train_step,
    masked_normalize,
    question_only_reward_fn,
    r1_zero_reward_fn,
    sft_microbatch_train_step,
    tokenize_prompt_and_output,
)
from grpo_fast.integrations.cs336_record import Record
from grpo_fast.integrations.cs336_sampling import (
    Sampler,
    base_model,
    check_divides,
    check_pairs,
    log_generations,
    make_batch,
    make_optimizer,
    make_validation,
    means,
    mode,
    take_step,
)
from grpo_fast.train.selection import right_ones
from grpo_kernels import masked_mean

__all__ = [
    "NEEDED",
    "compute_entropy",
    "compute_group_normalized_rewards",
    "compute_grpo_clip_loss",
    "compute_naive_policy_gradient_loss",
    "compute_policy_gradient_loss",
    "expert_iteration",
    "get_response_log_probs",
    "grpo_microbatch_train_step",
    "grpo_train_loop",
    "log_generations",
    "masked_mean",
    "masked_normalize",
    "question_only_reward_fn",
    "r1_zero_reward_fn",
    "sft_microbatch_train_step",
    "sft_train_loop",
    "tokenize_prompt_and_output",
]


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
    val_prompts: list[str] | None = None,
    val_ground_truths: list[str] | None = None,
    eval_steps: int = 10,
    num_logged_samples: int = 8,
    output_dir: str | Path | None = None,
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
        val_prompts, val_ground_truths: the validation set. It is measured by `log_generations`, with the same sampling
            settings and random numbers each time.
        eval_steps: steps from one validation to the next; there is also one before the first step and after the last.
        num_logged_samples: texts that are kept of each validation, of the same prompts each time; without a validation
            set, of the step's rollouts.
        output_dir: a folder for ``metrics.jsonl`` (a line for each step), ``samples.jsonl`` (the texts, with their
            rewards) and ``curves.png`` (the validation's reward with its 95% interval, and the training's metrics).
        log: called with the metrics of each step.

    Returns:
        The metrics of all steps: the rewards' metadata, ``loss``, ``grad_norm``, ``token_entropy`` and
        ``response_tokens`` (means over the optimizer steps and the responses), and ``clip_fraction`` for grpo_clip. A
        validation adds its metrics, as in ``val_reward``, ``val_reward_low`` and ``val_reward_high``, and step 0 has
        only these.

    Raises:
        UserError: sizes do not divide each other, a response is empty, or `output_dir` already has a run.
    """
    check_divides(
        group_size=(group_size, "rollout_batch_size", rollout_batch_size),
        train_batch_size=(train_batch_size, "rollout_batch_size", rollout_batch_size),
        gradient_accumulation_steps=(gradient_accumulation_steps, "train_batch_size", train_batch_size),
    )
    check_pairs(prompts, ground_truths, "ground truths")
    sample = Sampler(
        policy, tokenizer, sampling_temperature, sampling_min_tokens, sampling_max_tokens, stop,
        max_tokens_per_generation_batch,
    )  # fmt: skip
    validate = make_validation(sample, val_prompts, val_ground_truths, reward_fn, seed)
    optimizer, order = make_optimizer(policy, learning_rate), random.Random(seed)
    model, micro = base_model(policy), train_batch_size // gradient_accumulation_steps

    with Record(validate, n_grpo_steps, eval_steps, num_logged_samples, output_dir, log) as record:
        for step in range(1, n_grpo_steps + 1):
            chosen = order.choices(range(len(prompts)), k=rollout_batch_size // group_size)
            responses = sample([prompts[index] for index in chosen], group_size)
            chosen = [index for index in chosen for _ in range(group_size)]
            advantages, rewards, figures = compute_group_normalized_rewards(
                reward_fn, responses, [ground_truths[index] for index in chosen], group_size, advantage_eps,
                use_std_normalization,
            )  # fmt: skip
            microbatches = []
            for first in range(0, rollout_batch_size, micro):
                rows = slice(first, first + micro)
                batch = make_batch([prompts[i] for i in chosen[rows]], responses[rows], tokenizer, policy)
                if not batch["response_mask"].any(1).all():
                    raise UserError(f"step {step}: a response is empty; raise {sampling_min_tokens=}")
                signals = {"raw_rewards": rewards[rows, None], "advantages": advantages[rows, None]}
                signals = {name: value.to(model.device) for name, value in signals.items()}
                microbatches.append((batch, signals | {"old_log_probs": None}))
            if loss_type == "grpo_clip":
                with torch.no_grad():
                    for batch, signals in microbatches:
                        signals["old_log_probs"] = get_response_log_probs(model, **batch)["log_probs"]

            updates = []
            with mode(policy, training=True):
                for _ in range(epochs_per_rollout_batch):
                    for first in range(0, len(microbatches), gradient_accumulation_steps):
                        minibatch = microbatches[first : first + gradient_accumulation_steps]
                        updates.append(_accumulate_gradients(model, minibatch, loss_type, cliprange))
                        updates[-1]["grad_norm"] = take_step(optimizer, max_grad_norm)
            texts = [
                {"prompt": prompts[i], "response": response, "ground_truth": ground_truths[i], "reward": reward}
                for i, response, reward in zip(chosen, responses, rewards.tolist(), strict=True)
            ]
            record.add(step, figures | means(updates), texts)
    return record.history


def _accumulate_gradients(
    model: nn.Module,
    microbatches: list[tuple[dict[str, Tensor], dict[str, Tensor | None]]],
    loss_type: LossType,
    cliprange: float,
) -> dict[str, float]:
    """Forward and backward of one optimizer step's microbatches, and its metrics."""
    count, figures = len(microbatches), defaultdict(float)
    for batch, signals in microbatches:
        mask = batch["response_mask"]
        scored = get_response_log_probs(model, **batch, return_token_entropy=True)
        loss, metadata = grpo_microbatch_train_step(
            scored["log_probs"], mask, count, loss_type, **signals, cliprange=cliprange
        )
        figures["loss"] += loss.item()
        figures["token_entropy"] += masked_mean(scored["token_entropy"].detach(), mask).item() / count
        figures["response_tokens"] += mask.sum().item() / len(mask) / count
        if "clip_fraction" in metadata:
            figures["clip_fraction"] += metadata["clip_fraction"].item() / count
    return figures


def sft_train_loop(
    policy: nn.Module,
    tokenizer: Any,
    prompts: list[str],
    responses: list[str],
    *,
    n_epochs: int = 1,
    learning_rate: float = 1e-5,
    train_batch_size: int = 64,
    gradient_accumulation_steps: int = 32,
    normalize_constant: float = 1.0,
    max_grad_norm: float = 1.0,
    reward_fn: RewardFunction | None = None,
    val_prompts: list[str] | None = None,
    val_ground_truths: list[str] | None = None,
    eval_steps: int = 10,
    num_logged_samples: int = 8,
    sampling_temperature: float = 1.0,
    sampling_min_tokens: int = 4,
    sampling_max_tokens: int = 1024,
    stop: str | None = "</answer>",
    max_tokens_per_generation_batch: int = 65536,
    seed: int = 0,
    output_dir: str | Path | None = None,
    log: Callable[[dict[str, float]], None] | None = None,
) -> list[dict[str, float]]:
    """The assignment's supervised fine-tuning: `policy` learns the responses, in place, on its own device.

    The loss is that of `sft_microbatch_train_step`, over batches in a new random order in each epoch. A step is an
    optimizer step (AdamW as in `grpo_train_loop`); the last batch of an epoch may be smaller.

    Args:
        prompts, responses: the training set.
        n_epochs: passes over it.
        train_batch_size: responses of an optimizer step.
        gradient_accumulation_steps: microbatches in which they are computed; must divide `train_batch_size`.
        normalize_constant: divides the sum over a response's tokens.
        reward_fn: scores the validation's responses.
        policy, tokenizer, val_prompts, val_ground_truths, eval_steps, num_logged_samples, output_dir, log: as in
            `grpo_train_loop`; without a validation set, the texts that are kept are those of the batch.
        sampling_temperature, sampling_min_tokens, sampling_max_tokens, stop: for the validation.

    Returns:
        The metrics of all steps: ``loss``, ``grad_norm``, ``token_entropy`` (the mean over the responses' tokens) and
        ``response_tokens``, and those of the validations as in `grpo_train_loop`.

    Raises:
        UserError: sizes do not fit each other, a response is empty, or `output_dir` already has a run.
    """
    check_divides(gradient_accumulation_steps=(gradient_accumulation_steps, "train_batch_size", train_batch_size))
    check_pairs(prompts, responses, "responses")
    for index, response in enumerate(responses):
        if not encode(tokenizer, response):
            raise UserError(f"the response to the prompt {prompts[index][:60]!r} is empty")
    sampler = Sampler(
        policy, tokenizer, sampling_temperature, sampling_min_tokens, sampling_max_tokens, stop,
        max_tokens_per_generation_batch,
    )  # fmt: skip
    validate = make_validation(sampler, val_prompts, val_ground_truths, reward_fn, seed)
    optimizer, order, step = make_optimizer(policy, learning_rate), random.Random(seed), 0
    steps = n_epochs * -(-len(prompts) // train_batch_size)
    with Record(validate, steps, eval_steps, num_logged_samples, output_dir, log) as record:
        for _ in range(n_epochs):
            for chosen in _shuffled(len(prompts), train_batch_size, order):
                step += 1
                pairs = [prompts[i] for i in chosen], [responses[i] for i in chosen]
                figures = _sft_update(
                    policy, tokenizer, optimizer, *pairs, train_batch_size // gradient_accumulation_steps,
                    normalize_constant, max_grad_norm,
                )  # fmt: skip
                texts = [{"prompt": prompts[i], "response": responses[i]} for i in chosen]
                record.add(step, figures, texts)
    return record.history


def _shuffled(count: int, size: int, order: random.Random) -> list[list[int]]:
    """The numbers below `count` in a random order, in lists of `size`; the last one may be shorter."""
    indices = list(range(count))
    order.shuffle(indices)
    return [indices[first : first + size] for first in range(0, count, size)]


def _sft_update(
    policy: nn.Module,
    tokenizer: Any,
    optimizer: torch.optim.Optimizer,
    prompts: list[str],
    responses: list[str],
    micro: int,
    normalize_constant: float,
    max_grad_norm: float,
) -> dict[str, float]:
    """One optimizer step on a batch, in microbatches of `micro` rows, and its metrics."""
    count, figures, tokens = len(prompts), defaultdict(float), 0
    with mode(policy, training=True):
        for first in range(0, count, micro):
            rows = slice(first, first + micro)
            batch = make_batch(prompts[rows], responses[rows], tokenizer, policy)
            mask = batch["response_mask"]
            scored = get_response_log_probs(base_model(policy), **batch, return_token_entropy=True)
            # Each microbatch counts by its rows, because the last one may have fewer.
            constant = normalize_constant * count / len(mask)
            loss, _ = sft_microbatch_train_step(scored["log_probs"], mask, 1, constant)
            figures["loss"] += loss.item()
            figures["token_entropy"] += scored["token_entropy"].detach().sum().item()
            tokens += int(mask.sum())
    figures["token_entropy"] /= tokens
    return {**figures, "response_tokens": tokens / count, "grad_norm": take_step(optimizer, max_grad_norm)}


def expert_iteration(
    policy: nn.Module,
    tokenizer: Any,
    prompts: list[str],
    ground_truths: list[str],
    reward_fn: RewardFunction,
    *,
    n_ei_steps: int = 5,
    ei_batch_size: int = 512,
    n_rollouts: int = 8,
    n_epochs: int = 1,
    learning_rate: float = 1e-5,
    train_batch_size: int = 64,
    gradient_accumulation_steps: int = 32,
    normalize_constant: float = 1.0,
    max_grad_norm: float = 1.0,
    sampling_temperature: float = 1.0,
    sampling_min_tokens: int = 4,
    sampling_max_tokens: int = 1024,
    stop: str | None = "</answer>",
    max_tokens_per_generation_batch: int = 65536,
    seed: int = 0,
    val_prompts: list[str] | None = None,
    val_ground_truths: list[str] | None = None,
    eval_steps: int = 1,
    num_logged_samples: int = 8,
    output_dir: str | Path | None = None,
    log: Callable[[dict[str, float]], None] | None = None,
) -> list[dict[str, float]]:
    """The assignment's expert iteration: `policy` learns its own right responses, in place, on its own device.

    Each step samples `n_rollouts` responses to `ei_batch_size` random prompts, keeps those whose reward is at least 1,
    and takes `n_epochs` passes of supervised fine-tuning over them, as `sft_train_loop` does. A step without a right
    response changes nothing, and a warning says so.

    Args:
        n_ei_steps: steps.
        ei_batch_size: prompts of a step; all of them, if there are fewer.
        n_rollouts: responses to a prompt, the assignment's G.
        policy, tokenizer, prompts, ground_truths, reward_fn, val_prompts, val_ground_truths, eval_steps,
            num_logged_samples, output_dir, log: as in `grpo_train_loop`.
        n_epochs, train_batch_size, gradient_accumulation_steps, normalize_constant: as in `sft_train_loop`.

    Returns:
        The metrics of all steps: the means over the responses, as in ``mean_reward``; ``num_correct``, how many were
        kept; where there are any, the means over the optimizer steps of what `sft_train_loop` returns; and the
        validations as in `grpo_train_loop`.

    Raises:
        UserError: sizes do not fit each other, or `output_dir` already has a run.
    """
    check_divides(gradient_accumulation_steps=(gradient_accumulation_steps, "train_batch_size", train_batch_size))
    check_pairs(prompts, ground_truths, "ground truths")
    sample = Sampler(
        policy, tokenizer, sampling_temperature, sampling_min_tokens, sampling_max_tokens, stop,
        max_tokens_per_generation_batch,
    )  # fmt: skip
    validate = make_validation(sample, val_prompts, val_ground_truths, reward_fn, seed)
    optimizer, order = make_optimizer(policy, learning_rate), random.Random(seed)
    with Record(validate, n_ei_steps, eval_steps, num_logged_samples, output_dir, log) as record:
        for step in range(1, n_ei_steps + 1):
            chosen = order.sample(range(len(prompts)), min(ei_batch_size, len(prompts)))
            responses = sample([prompts[i] for i in chosen], n_rollouts)
            texts = []
            for index, response in zip([i for i in chosen for _ in range(n_rollouts)], responses, strict=True):
                text = {"prompt": prompts[index], "response": response, "ground_truth": ground_truths[index]}
                texts.append(text | reward_fn(response, ground_truths[index]))
            names = [name for name in ("reward", "format_reward", "answer_reward") if name in texts[0]]
            figures = {f"mean_{name}": sum(float(text[name]) for text in texts) / len(texts) for name in names}
            # An empty response has nothing to learn from.
            right = right_ones(torch.tensor([float(text["reward"]) for text in texts])).tolist()
            kept = [
                text for text, good in zip(texts, right, strict=True) if good and encode(tokenizer, text["response"])
            ]
            figures["num_correct"] = float(len(kept))
            if not kept:
                warnings.warn(f"step {step}: no response is right, so nothing is learned", stacklevel=2)
            updates = []
            for _ in range(n_epochs if kept else 0):
                for rows in _shuffled(len(kept), train_batch_size, order):
                    pairs = ([kept[i][name] for i in rows] for name in ("prompt", "response"))
                    updates.append(
                        _sft_update(
                            policy, tokenizer, optimizer, *pairs, train_batch_size // gradient_accumulation_steps,
                            normalize_constant, max_grad_norm,
                        )
                    )  # fmt: skip
            record.add(step, figures | (means(updates) if updates else {}), texts)
    return record.history
