"""The GRPO step, top to bottom.

rollout -> rewards -> advantages -> drop what carries no gradient -> microbatches -> optimizer -> log
"""

from __future__ import annotations

import copy
import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import get_scheduler

from grpo_fast.advantages import group_advantages
from grpo_fast.checkpoint import save_model
from grpo_fast.config import GRPOConfig
from grpo_fast.data import check_lengths, encode_prompts, load_rows, prompt_order
from grpo_fast.errors import UserError
from grpo_fast.evaluate import evaluate, sample_and_score
from grpo_fast.metrics import MetricsFile, completion_metrics, loss_metrics, reward_metrics
from grpo_fast.models import load_model
from grpo_fast.packing import Sample, build_microbatch, fill_microbatches, plan_rows, token_offsets
from grpo_fast.policy import FusedPolicy, LossInputs
from grpo_fast.progress import Progress
from grpo_fast.report import Summary, plot_run, write_json
from grpo_fast.rewards import RewardModel
from grpo_fast.rollout import Sampling, TransformersRollout
from grpo_kernels import token_weights


@dataclass
class StepBatch:
    """Everything of one generation that the updates need. Token tensors are flat ``[N]`` over all completions."""

    samples: list[Sample]
    offsets: Tensor
    advantages: Tensor
    weights: Tensor
    active: list[int]
    ref_logprobs: Tensor | None = None
    old_logprobs: Tensor | None = None

    def to(self, device: torch.device) -> StepBatch:
        """The token tensors on the device of the microbatches; the plan of rows stays on the CPU."""
        return dataclasses.replace(self, advantages=self.advantages.to(device), weights=self.weights.to(device))


class GRPOTrainer:
    """Trains a policy as `config` says, and writes the run folder.

    Args:
        config: the run.

    Raises:
        UserError: anything about the configuration, the data, the rewards or the model that would fail later.
    """

    def __init__(self, config: GRPOConfig):
        self.config = config
        self.run_folder = prepare_run_folder(config)
        self.objective = config.objective()
        self.rewards = RewardModel(config.reward_funcs, config.reward_weights)
        self.metric = self.rewards.index(config.eval_metric)
        self.train_rows, self.eval_rows = load_rows(config)

        self.accelerator = Accelerator(mixed_precision="bf16" if config.bf16 else "no", cpu=config.use_cpu)
        if self.accelerator.num_processes > 1:
            raise UserError(f"training runs on one process so far, but {self.accelerator.num_processes} were launched")
        torch.manual_seed(config.seed)
        model, self.tokenizer = load_model(config)
        self.train_prompts = encode_prompts(self.train_rows, self.tokenizer, config)
        self.eval_prompts = encode_prompts(self.eval_rows, self.tokenizer, config)
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        check_lengths(self.train_prompts, self.train_rows, positions, config)
        check_lengths(self.eval_prompts, self.eval_rows, positions, config)
        if config.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

        policy = FusedPolicy(model, config.temperature, config.max_buffer_bytes)
        self.longest_shared_row = policy.longest_shared_row(config.share_prompts)
        self.optimizer = build_optimizer(policy, config)
        policy.to(self.accelerator.device).check_head(self.train_prompts[0])
        self.policy, self.optimizer = self.accelerator.prepare(policy, self.optimizer)
        self.reference = None
        if self.objective.uses_reference:
            self.reference = copy.deepcopy(policy).requires_grad_(False).eval()
        self.model = model
        self.scheduler = get_scheduler(
            config.lr_scheduler_type, self.optimizer, num_training_steps=config.max_steps,
            num_warmup_steps=round(config.warmup_steps * config.max_steps if config.warmup_steps < 1
                                   else config.warmup_steps),
        )  # fmt: skip
        self.rollout = TransformersRollout(model, self.tokenizer, config.max_tokens_per_generation_batch)
        self.sampling = Sampling.from_config(config, config.num_generations)
        self.eval_sampling = Sampling.from_config(config, config.num_generations_eval)
        self.rollout.generation_config(self.sampling)
        self.order = prompt_order(len(self.train_rows), config.shuffle_dataset, config.seed)
        self.step = 0
        self.num_tokens = 0

    def train(self) -> Summary:
        """Evaluate, train for `max_steps` optimizer steps, evaluate again, and write the run folder."""
        config = self.config
        metric_name = self.rewards.names[self.metric]
        progress = Progress(config, self.run_folder, metric_name, sum(p.numel() for p in self.model.parameters()))
        with progress:
            progress.phase(f"measuring {metric_name} before training on {len(self.eval_rows)} held-out prompts")
            before = self.evaluate()
            progress.started(before)
            metrics_file = MetricsFile(self.run_folder / "metrics.jsonl")
            history, train_seconds = [], 0.0
            try:
                while self.step < config.max_steps:
                    start = time.perf_counter()
                    metrics = self.train_on_one_generation()
                    seconds = time.perf_counter() - start
                    train_seconds += seconds
                    metrics |= {"step": self.step, "step_time": seconds}
                    metrics["tokens_per_second"] = (self.num_tokens - metrics["num_tokens"]) / seconds
                    metrics["num_tokens"] = self.num_tokens
                    history.append(metrics)
                    if self.step % config.logging_steps == 0 or self.step >= config.max_steps:
                        metrics_file.write(metrics)
                    progress.update(metrics)
            finally:
                metrics_file.close()
            progress.phase(f"measuring {metric_name} after training")
            after = self.evaluate()
            checkpoint = save_model(self.model, self.tokenizer, self.run_folder / f"checkpoint-{self.step}")
            summary = Summary(metric_name, before, after, round(train_seconds, 2), self.step)
            write_json(self.run_folder / "summary.json", dataclasses.asdict(summary))
            plot_run(history, summary, self.run_folder / "reward.png")
        progress.finished(summary, checkpoint)
        return summary

    def evaluate(self) -> float:
        """Mean of the evaluation metric on the held-out prompts."""
        return evaluate(
            self.rollout, self.rewards, self.metric, self.tokenizer, self.eval_rows, self.eval_prompts,
            self.eval_sampling, self.config.seed,
        )  # fmt: skip

    def train_on_one_generation(self) -> dict[str, float]:
        """Sample one generation batch and make `num_iterations` optimizer steps on it."""
        tokens_before = self.num_tokens
        batch, metrics = self.collect()
        for iteration in range(min(self.config.num_iterations, self.config.max_steps - self.step)):
            metrics |= self.update(batch, keep_logprobs=self.config.num_iterations > 1 and iteration == 0)
            self.step += 1
        return metrics | {"num_tokens": tokens_before}

    def collect(self) -> tuple[StepBatch, dict[str, float]]:
        """Rollout, rewards, advantages, token weights of the whole step, and what may be dropped."""
        config = self.config
        indices = [next(self.order) for _ in range(config.prompts_per_step)]
        rows, prompts = [self.train_rows[i] for i in indices], [self.train_prompts[i] for i in indices]
        responses, texts, rewards = sample_and_score(
            self.rollout, self.rewards, self.tokenizer, rows, prompts, self.sampling
        )
        advantages = group_advantages(rewards.total, config.num_generations, config.scale_rewards)
        samples = [
            Sample(prompts[i // config.num_generations], response.token_ids, i // config.num_generations)
            for i, response in enumerate(responses)
        ]
        self.num_tokens += sum(len(sample.prompt_ids) + len(sample.completion_ids) for sample in samples)
        counted = torch.tensor(
            [not (config.mask_truncated_completions and response.finish_reason == "length") for response in responses]
        )
        batch = build_step_batch(samples, advantages.values, counted, self.objective, config)
        batch = batch.to(self.accelerator.device)
        batch.ref_logprobs = self.score(self.reference, batch) if self.reference is not None else None
        next_step = self.step + 1
        if config.log_completions_steps and (next_step == 1 or next_step % config.log_completions_steps == 0):
            self.log_completions(next_step, rows, texts, rewards.each, advantages.values)
        metrics = reward_metrics(self.rewards.names, rewards, advantages.group_std, advantages.equal)
        return batch, metrics | completion_metrics(responses)

    def update(self, batch: StepBatch, keep_logprobs: bool = False) -> dict[str, float]:
        """One optimizer step on a generation batch."""
        self.accumulate_gradients(batch, keep_logprobs)
        metrics = self.loss_of_step
        learning_rate = self.scheduler.get_last_lr()[0]
        max_norm = self.config.max_grad_norm or float("inf")
        grad_norm = self.accelerator.clip_grad_norm_(self.policy.parameters(), max_norm).item()
        if not grad_norm < float("inf"):
            raise UserError(
                f"step {self.step + 1}: the gradient is not finite (norm {grad_norm}); the figures so far are in "
                f"{self.run_folder / 'metrics.jsonl'}; try a smaller learning_rate"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.scheduler.step()
        return metrics | {"grad_norm": grad_norm, "learning_rate": learning_rate}

    def accumulate_gradients(self, batch: StepBatch, keep_logprobs: bool = False) -> None:
        """Forward and backward of every microbatch; the gradients add up to those of the whole step."""
        self.policy.train()
        loss, stats = torch.zeros((), device=self.accelerator.device), None
        seen = torch.zeros_like(batch.weights) if keep_logprobs else None
        for microbatch in self.microbatches(batch):
            inputs = self.loss_inputs(batch, microbatch.tokens)
            result = self.policy(microbatch, inputs)
            self.accelerator.backward(result.loss)
            loss += result.loss.detach()
            stats = result.stats if stats is None else {name: stats[name] + result.stats[name] for name in stats}
            if keep_logprobs:
                seen[microbatch.tokens] = result.logprobs.float()
        if stats is None:
            stats = dict.fromkeys(("tokens", "entropy", "kl", "ratios", "ratio", "clip_low", "clip_high"), loss)
        # Without any active group the gradient is zero, not absent: the optimizer's moments still decay.
        for parameter in self.policy.parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if keep_logprobs:
            batch.old_logprobs = seen
        self.loss_of_step = loss_metrics(loss, stats, self.objective.kind == "clip", self.objective.uses_reference)

    def loss_inputs(self, batch: StepBatch, tokens: Tensor) -> LossInputs:
        fields = (batch.advantages, batch.weights, batch.old_logprobs, batch.ref_logprobs)
        return LossInputs(self.objective, *(None if field is None else field[tokens] for field in fields))

    def microbatches(self, batch: StepBatch):
        config, device = self.config, self.accelerator.device
        rows = plan_rows(batch.samples, batch.active, config.max_tokens_per_microbatch, self.longest_shared_row)
        for chosen in fill_microbatches(rows, config.max_tokens_per_microbatch):
            yield build_microbatch(batch.samples, chosen, batch.offsets, self.tokenizer.pad_token_id).to(device)

    @torch.no_grad()
    def score(self, policy: nn.Module, batch: StepBatch) -> Tensor:
        """Log-probabilities ``[N]`` of the step's tokens under `policy` (1U in the head)."""
        logprobs = torch.zeros_like(batch.weights)
        for microbatch in self.microbatches(batch):
            logprobs[microbatch.tokens] = policy(microbatch).float()
        return logprobs

    def log_completions(self, step: int, rows: list, texts: list[str], each: Tensor, advantages: Tensor) -> None:
        folder = self.run_folder / "completions"
        folder.mkdir(exist_ok=True)
        with (folder / f"completions_{step:05d}.jsonl").open("w", encoding="utf-8") as file:
            for index, text in enumerate(texts):
                rewards = dict(zip(self.rewards.names, each[index].tolist(), strict=True))
                entry = {"step": step, "prompt": rows[index // self.config.num_generations]["prompt"]}
                entry |= {"completion": text, "rewards": rewards, "advantage": advantages[index].item()}
                file.write(json.dumps(entry, ensure_ascii=False) + "\n")


def build_step_batch(
    samples: list[Sample], advantages: Tensor, counted: Tensor, objective: Any, config: GRPOConfig
) -> StepBatch:
    """Flat token tensors of a step, with one set of weights for all its microbatches.

    `advantages` and `counted` (whether a completion is in the loss at all) are ``[S]``. ``active`` lists the samples
    that can move the policy.
    """
    offsets = token_offsets(samples)
    lengths = offsets.diff()
    weights = token_weights(
        counted.repeat_interleave(lengths), objective.aggregation, cu_seqlens=offsets,
        constant_length=config.max_completion_length,
    )  # fmt: skip
    moves = counted & (advantages != 0) if objective.advantage_alone else counted
    return StepBatch(
        samples, offsets, advantages.repeat_interleave(lengths), weights, moves.nonzero().squeeze(1).tolist()
    )


def build_optimizer(policy: nn.Module, config: GRPOConfig) -> torch.optim.Optimizer:
    """AdamW; weight decay on matrices, not on norms and biases."""
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=True,
    )


def prepare_run_folder(config: GRPOConfig) -> Path:
    """Create the run folder, which must not hold another run."""
    name = config.run_name or config.dataset_name.replace("/", "-")
    folder = Path(config.output_dir or f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}")
    if (folder / "metrics.jsonl").exists():
        raise UserError(f"output_dir={str(folder)!r} already holds a run; choose another one")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output_dir={str(folder)!r} cannot be created: {error.strerror}") from None
    return folder
