"""The GRPO step, top to bottom.

rollout -> rewards -> advantages -> drop what carries no gradient -> microbatches -> optimizer -> log
"""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import get_scheduler

from grpo_fast.activations import check_activations, prepare_activations
from grpo_fast.advantages import group_advantages
from grpo_fast.checkpoint import (
    TrainerState,
    check_same,
    check_space,
    checkpoints,
    find_checkpoint,
    fingerprint,
    fixed_fields,
    keep_newest,
    load_tensors,
    load_weights,
    rng_state,
    save_checkpoint,
    set_rng_state,
)
from grpo_fast.config import GRPOConfig
from grpo_fast.data import check_lengths, encode_prompts, load_rows, prompt_order
from grpo_fast.errors import CheckpointError, UserError, one_line, writing
from grpo_fast.evaluate import evaluate, sample_and_score
from grpo_fast.files import remove_leftovers
from grpo_fast.interrupt import Interrupt
from grpo_fast.metrics import LinesFile, completion_metrics, cut_metrics, loss_metrics, peak_memory, reward_metrics
from grpo_fast.models import add_adapter, check_vocabulary, load_model
from grpo_fast.optimizers import build_optimizer, check_optimizer, load_optimizer_tensors, optimizer_tensors
from grpo_fast.packing import Sample, build_microbatch, fill_microbatches, plan_rows, token_offsets
from grpo_fast.policy import FusedPolicy, LossInputs
from grpo_fast.progress import Progress
from grpo_fast.report import Summary, plot_run, write_config, write_json, write_plan, write_report
from grpo_fast.rewards import RewardModel
from grpo_fast.rollout import Sampling, TransformersRollout
from grpo_fast.trackers import Trackers, tracker_arguments
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
        self.run_folder = choose_run_folder(config)
        found = find_checkpoint(self.run_folder, config) if config.resume_from_checkpoint else None
        self.objective = config.objective()
        self.rewards = RewardModel(config.reward_funcs, config.reward_weights)
        self.metric = self.rewards.index(config.eval_metric)
        self.train_rows, self.eval_rows = load_rows(config)
        for rows in (self.train_rows, self.eval_rows):
            self.rewards.check_columns(name for name in rows[0] if name != "prompt")

        trackers = tracker_arguments(config, self.run_folder)
        self.accelerator = Accelerator(mixed_precision="bf16" if config.bf16 else "no", cpu=config.use_cpu, **trackers)
        if self.accelerator.num_processes > 1:
            raise UserError(f"training runs on one process so far, but {self.accelerator.num_processes} were launched")
        check_optimizer(config, self.accelerator.device)
        check_activations(config, self.accelerator.device)
        torch.manual_seed(config.seed)
        model, self.tokenizer = load_model(config)
        self.train_prompts = encode_prompts(self.train_rows, self.tokenizer, config)
        self.eval_prompts = encode_prompts(self.eval_rows, self.tokenizer, config)
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        check_lengths(self.train_prompts, self.train_rows, positions, config)
        check_lengths(self.eval_prompts, self.eval_rows, positions, config)
        check_vocabulary(model, self.train_prompts + self.eval_prompts, self.tokenizer)
        self.adapter = add_adapter(model, config) if config.use_peft else None
        check_space(model, self.run_folder, config)
        prepare_activations(model, config)

        policy = FusedPolicy(model, config.temperature, config.max_buffer_bytes)
        self.optimizer = build_optimizer(policy, config)
        policy.to(self.accelerator.device).eval().check_head(self.train_prompts[0])
        self.packed = policy.check_packing(self.train_prompts[0], config.padding_free)
        if config.share_prompts == "always" and not self.packed:
            raise UserError(f"share_prompts='always' is not possible: {type(model).__name__} cannot be packed")
        # Parked on the CPU: scoring takes it to the device and back.
        self.reference = None
        if self.objective.uses_reference and self.adapter is None:
            self.reference = copy.deepcopy(policy).requires_grad_(False).eval().to("cpu")
        self.policy, self.optimizer = self.accelerator.prepare(policy, self.optimizer)
        self.model = model
        self.scheduler = build_scheduler(self.optimizer, config)
        self.rollout = TransformersRollout(model, self.tokenizer, config.max_tokens_per_generation_batch)
        self.sampling = Sampling.from_config(config, config.num_generations)
        self.eval_sampling = Sampling.from_config(config, config.num_generations_eval)
        self.rollout.check(self.train_prompts[0], self.sampling)
        self.fixed = fixed_fields(config) | {
            "number of parameters": sum(p.numel() for p in model.parameters()),
            "training data": fingerprint(self.train_prompts),
            "held-out data": fingerprint(self.eval_prompts),
        }
        # Where the run is between two updates; `updates_left` are those to come on the same generation batch.
        self.step = self.saved_step = self.updates_left = self.num_tokens = self.num_prompts = 0
        self.train_seconds, self.before = 0.0, math.nan
        self.rng: dict[str, Tensor] = {}
        if found is not None:
            self.restore(*found)
        self.order = prompt_order(len(self.train_rows), config.shuffle_dataset, config.seed, self.num_prompts)

    def train(self) -> Summary:
        """Evaluate, train for `max_steps` optimizer steps, evaluate again, and write the run folder.

        A run that is stopped, by SIGINT or SIGTERM, by the user or by wrong rewards, still leaves its metrics and a
        checkpoint. A resumed one goes on after its last checkpoint as if it had never stopped.
        """
        config, folder = self.config, self.run_folder
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(folder)
        written = dataclasses.replace(config, output_dir=str(folder), resume_from_checkpoint=False)
        write_config(folder / "config.yaml", written)
        if self.accelerator.device.type == "cuda":
            longest = max(map(len, self.train_prompts))
            write_plan(folder / "memory_plan.json", config, self.model.config, longest)
        metric = self.rewards.names[self.metric]
        history = cut_metrics(folder / "metrics.jsonl", self.step)
        progress = Progress(config, folder, metric, sum(p.numel() for p in self.model.parameters()))
        trackers = Trackers(self.accelerator, config, folder, progress.warn)
        with progress, trackers, LinesFile(folder / "metrics.jsonl", append=True) as metrics_file:
            if self.step:
                progress.phase(f"going on from {folder / f'checkpoint-{self.step}'}")
                progress.started(self.before)
            else:
                start = f"no checkpoint in {folder}: starting from the beginning; " * config.resume_from_checkpoint
                progress.phase(f"{start}measuring {metric} before training on {len(self.eval_rows)} held-out prompts")
                self.before = self.evaluate()
                progress.started(self.before)
                trackers.log({f"eval/rewards/{metric}/mean": self.before}, step=self.step)

            def log(metrics: dict[str, float]) -> None:
                history.append(metrics)
                if self.step % config.logging_steps == 0 or self.step >= config.max_steps:
                    metrics_file.write(metrics)
                    trackers.log(metrics, step=self.step)
                progress.update(metrics)

            checkpoint = self.run_steps(log, progress)
            progress.phase(f"measuring {metric} after training")
            summary = Summary(metric, self.before, self.evaluate(), round(self.train_seconds, 2), self.step)
            write_json(folder / "summary.json", dataclasses.asdict(summary))
            trackers.log({f"eval/rewards/{metric}/mean": summary.after}, step=self.step)
            if history:
                plot_run(history, summary, folder / "reward.png")
            write_report(folder)
        progress.finished(summary, checkpoint)
        return summary

    def run_steps(self, log: Callable[[dict[str, float]], None], progress: Progress) -> Path:
        """The remaining steps, with a checkpoint every `save_steps` of them and after the last one, which is returned.

        Checkpoints fall between generation batches: with `num_iterations` above 1, one that is due, and a signal that
        stops the run, wait for the other updates on the same batch.
        """
        if self.rng:
            set_rng_state(self.rng)
        with Interrupt() as interrupt:
            try:
                for metrics in self.steps():
                    log(metrics)
                    if interrupt.signal and not self.updates_left:
                        break
                    if self.save_is_due():
                        self.save()
                checkpoint = self.save()
            except CheckpointError:
                raise
            except (KeyboardInterrupt, UserError) as error:
                # A second Ctrl-C ends at once.
                if self.step and not (interrupt.signal and isinstance(error, KeyboardInterrupt)):
                    progress.stopped(self.step, self.save())
                raise
        if interrupt.signal:
            progress.stopped(self.step, checkpoint)
            interrupt.exit()
        return checkpoint

    def save_is_due(self) -> bool:
        every = self.config.save_steps
        return bool(every) and not self.updates_left and self.step // every != self.saved_step // every

    def save(self) -> Path:
        """Write a checkpoint, unless this step has one, and remove those beyond `save_total_limit`."""
        folder = self.run_folder / f"checkpoint-{self.step}"
        if self.saved_step != self.step:
            state = TrainerState(
                self.step, self.num_tokens, self.num_prompts, self.train_seconds, self.before, self.fixed
            )
            tensors = {"optimizer": optimizer_tensors(self.optimizer), "rng": self.rng}
            save_checkpoint(folder, self.adapter or self.model, self.tokenizer, state, tensors)
            self.saved_step = self.step
            keep_newest(self.run_folder, self.config.save_total_limit)
        return folder

    def restore(self, folder: Path, state: TrainerState) -> None:
        """Go on where the checkpoint was written; a reference policy keeps the weights that it began with."""
        check_same(folder, state.fixed, self.fixed)
        load_weights(folder, self.adapter or self.model)
        load_optimizer_tensors(self.optimizer, load_tensors(folder, "optimizer"))
        self.rng = load_tensors(folder, "rng")
        self.step = self.saved_step = state.step
        self.num_tokens, self.num_prompts, self.train_seconds = state.num_tokens, state.num_prompts, state.train_seconds
        self.before = math.nan if state.before is None else state.before
        # The schedule is a function of the step.
        schedule = self.scheduler.state_dict()
        self.scheduler.load_state_dict({**schedule, "last_epoch": self.step - 1, "_step_count": self.step + 1})
        self.scheduler.step()

    def steps(self) -> Iterator[dict[str, float]]:
        """Train, and yield the figures of every optimizer step. A generation batch serves `num_iterations` of them."""
        while self.step < self.config.max_steps:
            start = time.perf_counter()
            batch, figures = self.collect()
            tokens = sum(len(sample.prompt_ids) + len(sample.completion_ids) for sample in batch.samples)
            updates = min(self.config.num_iterations, self.config.max_steps - self.step)
            for iteration in range(updates):
                metrics = self.update(batch, keep_logprobs=self.config.num_iterations > 1 and iteration == 0)
                self.step += 1
                if iteration == 0:
                    self.num_tokens += tokens
                    self.num_prompts += self.config.prompts_per_step
                self.updates_left = updates - iteration - 1
                # Kept for a checkpoint: should the next step fail, the generators will have moved on.
                self.rng = rng_state()
                seconds = time.perf_counter() - start
                self.train_seconds += seconds
                speed = {"step_time": seconds, "tokens_per_second": tokens / seconds}
                speed |= peak_memory(self.accelerator.device)
                yield {"step": self.step, **figures, **metrics, "num_tokens": self.num_tokens, **speed}
                start = time.perf_counter()

    def evaluate(self) -> float:
        """Mean of the evaluation metric on the held-out prompts."""
        return evaluate(
            self.rollout, self.rewards, self.metric, self.tokenizer, self.eval_rows, self.eval_prompts,
            self.eval_sampling, self.config.seed,
        )  # fmt: skip

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
        counted = torch.tensor(
            [not (config.mask_truncated_completions and response.finish_reason == "length") for response in responses]
        )
        batch = build_step_batch(samples, advantages.values, counted, self.objective, config)
        batch = batch.to(self.accelerator.device)
        batch.ref_logprobs = self.score_reference(batch) if self.objective.uses_reference else None
        if self.logs_completions():
            self.log_completions(self.step + 1, rows, texts, rewards.each, advantages.values)
        metrics = reward_metrics(self.rewards.names, rewards, advantages.equal)
        return batch, metrics | completion_metrics(responses)

    def update(self, batch: StepBatch, keep_logprobs: bool = False) -> dict[str, float]:
        """One optimizer step on a generation batch."""
        metrics = self.accumulate_gradients(batch, keep_logprobs)
        # torchao's optimizers keep it in a tensor.
        learning_rate = float(self.scheduler.get_last_lr()[0])
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

    def accumulate_gradients(self, batch: StepBatch, keep_logprobs: bool = False) -> dict[str, float]:
        """Forward and backward of every microbatch; the gradients add up to those of the whole step.

        Returns the loss's figures. With `keep_logprobs`, the batch also gets the log-probabilities as its old ones.
        """
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
        # Without any active group the gradient is zero, not absent: the optimizer's moments still decay.
        for parameter in self.policy.parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if keep_logprobs:
            batch.old_logprobs = seen
        return loss_metrics(loss, stats, self.objective)

    def loss_inputs(self, batch: StepBatch, tokens: Tensor) -> LossInputs:
        fields = (batch.advantages, batch.weights, batch.old_logprobs, batch.ref_logprobs)
        return LossInputs(self.objective, *(None if field is None else field[tokens] for field in fields))

    def microbatches(self, batch: StepBatch):
        config, device = self.config, self.accelerator.device
        budget, pad = config.max_tokens_per_microbatch, self.tokenizer.pad_token_id
        shares = self.packed and config.share_prompts != "never"
        rows = plan_rows(batch.samples, batch.active, budget if shares else 0)
        for chosen in fill_microbatches(rows, budget, self.packed):
            yield build_microbatch(batch.samples, chosen, batch.offsets, pad, self.packed).to(device)

    def score_reference(self, batch: StepBatch) -> Tensor:
        """Log-probabilities ``[N]`` under the initial policy: without the adapter, or its copy, parked on the CPU."""
        if self.adapter is not None:
            self.policy.eval()
            with self.adapter.disable_adapter():
                return self.score(self.policy, batch)
        with self.accelerator.autocast():
            scores = self.score(self.reference.to(self.accelerator.device), batch)
        self.reference.to("cpu")
        return scores

    @torch.no_grad()
    def score(self, policy: nn.Module, batch: StepBatch) -> Tensor:
        """Log-probabilities ``[N]`` of the step's tokens under `policy` (1U in the head)."""
        logprobs = torch.zeros_like(batch.weights)
        for microbatch in self.microbatches(batch):
            logprobs[microbatch.tokens] = policy(microbatch).float()
        return logprobs

    def logs_completions(self) -> bool:
        """Whether one of the steps on the coming generation is due for its completions to be written."""
        every = self.config.log_completions_steps
        last = min(self.step + self.config.num_iterations, self.config.max_steps)
        return bool(every) and (self.step == 0 or self.step // every != last // every)

    def log_completions(self, step: int, rows: list, texts: list[str], each: Tensor, advantages: Tensor) -> None:
        with LinesFile(self.run_folder / "completions" / f"completions_{step:05d}.jsonl") as file:
            for index, text in enumerate(texts):
                rewards = dict(zip(self.rewards.names, each[index].tolist(), strict=True))
                entry = {"step": step, "prompt": rows[index // self.config.num_generations]["prompt"]}
                file.write({**entry, "completion": text, "rewards": rewards, "advantage": advantages[index].item()})


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


def choose_run_folder(config: GRPOConfig) -> Path:
    """The run folder, which must not hold another run but one to resume. It is created when the run begins."""
    name = config.run_name or config.dataset_name.replace("/", "-")
    folder = Path(config.output_dir or f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}")
    if config.resume_from_checkpoint:
        if config.output_dir is None:
            raise UserError("--resume needs the run folder: set output_dir, or give that folder's own config.yaml")
    elif (folder / "metrics.jsonl").exists() or checkpoints(folder):
        raise UserError(f"output_dir={str(folder)!r} already holds a run; choose another one, or --resume that run")
    return folder


def build_scheduler(optimizer: torch.optim.Optimizer, config: GRPOConfig) -> torch.optim.lr_scheduler.LRScheduler:
    """transformers' schedule; like there, `warmup_steps` below 1 is a share of the steps, rounded up."""
    warmup = config.warmup_steps
    warmup = math.ceil(warmup * config.max_steps) if warmup < 1 else int(warmup)
    try:
        return get_scheduler(
            config.lr_scheduler_type, optimizer, num_warmup_steps=warmup, num_training_steps=config.max_steps
        )
    except ValueError as error:
        raise UserError(f"lr_scheduler_type={config.lr_scheduler_type!r}: {one_line(error)}") from None
