"""Supervised fine-tuning on the parts of GRPO's trainer.

The loss of a step is the mean over its learned tokens of ``-log p``: that of the policy loss whose advantages are 1
(``reinforce``). So the head never builds logits, examples are packed, and everything else is shared: adapters,
optimizers, several GPUs, checkpoints.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from grpo_fast.config import SFTConfig
from grpo_fast.data.examples import Encoded, encode_examples, load_examples
from grpo_fast.distributed.processes import connect, on_main
from grpo_fast.distributed.rng import rng_state
from grpo_fast.model import loading
from grpo_fast.model.loading import load_model
from grpo_fast.model.packing import Sample
from grpo_fast.report.progress import Progress
from grpo_fast.train import checkpoint
from grpo_fast.train.batch import StepBatch, build_step_batch
from grpo_fast.train.checkpoint import TrainerState
from grpo_fast.train.finite import check_finite
from grpo_fast.train.learner import Learner
from grpo_fast.train.metrics import peak_memory
from grpo_fast.train.run import TrainingRun
from grpo_fast.train.run_folder import choose_run_folder, release


class SFTTrainer(TrainingRun):
    """Fine-tunes a model on examples, and writes the run folder.

        SFTTrainer(SFTConfig(model_name_or_path=..., dataset_name=...)).train()

    The score is the loss on the held-out rows, a mean over their learned tokens (nats).

    Raises:
        UserError: the configuration, the data or the model would make the run fail later.
    """

    score, score_name, lower_is_better = "loss", "eval/loss", True

    def __init__(self, config: SFTConfig):
        connect(config.use_cpu)
        self.config = config = loading.adapter_fields(config)
        self.run_folder, found = on_main(partial(choose_run_folder, config))
        try:
            self.prepare(found)
        except BaseException:
            release(self.run_folder)
            raise

    def prepare(self, found: tuple[Path, TrainerState] | None) -> None:
        """Load and check everything, and restore the checkpoint that was `found`."""
        config = self.config
        self.objective = config.objective()
        train, held_out = load_examples(config)
        self.start_devices()
        on_main(lambda: checkpoint.verify_model(Path(config.model_name_or_path)))
        model, self.tokenizer = load_model(config)
        if not config.use_peft:
            check_finite(model.named_parameters(), f"model_name_or_path={config.model_name_or_path!r}")
        arguments = (self.tokenizer, config, loading.max_positions(model.config))
        self.train_rows = encode_examples(train, *arguments, "training", self.warn)
        self.eval_rows = encode_examples(held_out, *arguments, "held-out", self.warn)
        self.resolve_steps(found)
        config = self.config
        tokens = [example.prompt_ids + example.completion_ids for example in self.train_rows + self.eval_rows]
        loading.check_vocabulary(model, tokens, self.tokenizer)
        self.learner = Learner(model, config, self.accelerator, tokens[0], self.tokenizer.pad_token_id)
        self.adapter, self.model = self.learner.adapter, model
        fixed = loading.random_base(config)
        fixed["training data"] = _fingerprint(self.train_rows)
        fixed["held-out data"] = _fingerprint(self.eval_rows)
        self.start_saver(found, fixed)

    def announce(self, progress: Progress) -> None:
        learned = sum(sum(example.completion_mask) for example in self.train_rows)
        progress.note(f"{len(self.train_rows)} examples with {learned:,} learned tokens")

    def held_out_rows(self) -> str:
        return f"{len(self.eval_rows)} held-out rows"

    def open(self) -> None:
        """There is no engine to start."""

    def close(self) -> None:
        """There is no engine to end."""

    def steps(self) -> Iterator[dict[str, float]]:
        config, state = self.config, self.state
        while state.step < config.max_steps:
            start = time.perf_counter()
            examples = [self.train_rows[index] for index in self.draw(config.prompts_per_step)]
            metrics = self.update(self.batch(examples))
            tokens = sum(len(example.prompt_ids) + len(example.completion_ids) for example in examples)
            state.step += 1
            state.num_tokens += tokens
            state.num_prompts += len(examples)
            # Kept for a checkpoint: if the next step fails, it has already advanced the generators.
            self.saver.rng = rng_state()
            seconds = time.perf_counter() - start
            state.train_seconds += seconds
            speed = {"step_time": seconds, "tokens_per_second": tokens / seconds}
            speed |= peak_memory(self.accelerator.device)
            yield {"step": state.step, **metrics, "num_tokens": state.num_tokens, **speed}

    def batch(self, examples: list[Encoded]) -> StepBatch:
        """The examples as the completions of a step, each learned token with advantage 1."""
        samples = [Sample(one.prompt_ids, one.completion_ids, index) for index, one in enumerate(examples)]
        learned = torch.tensor([kept for one in examples for kept in one.completion_mask])
        counted = torch.ones(len(samples), dtype=torch.bool)
        batch = build_step_batch(samples, counted, self.objective, self.config, None if learned.all() else learned)
        batch.weights = batch.weights.to(self.accelerator.device)
        batch.set_advantages(learned.float(), self.objective)
        return batch

    def measure(self) -> dict[str, float]:
        """The loss on the held-out rows."""
        batch, policy = self.batch(self.eval_rows), self.learner.policy
        policy.eval()
        logprobs = self.learner.score(policy, batch)
        # Reset, so that the next step does not report the memory of the evaluation.
        peak_memory(self.accelerator.device)
        return {self.score_name: -(logprobs.double() * batch.weights.double()).sum().item()}


def _fingerprint(examples: list[Encoded]) -> str:
    """The number of examples and a checksum of their tokens and of which of them are learned."""
    parts = [[*one.prompt_ids, *one.completion_ids, *map(int, one.completion_mask)] for one in examples]
    return checkpoint.fingerprint(parts).replace("prompts", "examples")
