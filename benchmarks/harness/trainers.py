"""Our trainer and TRL's with the same settings, both advanced one optimizer step at a time.

TRL's `train()` runs in a thread that blocks before each optimizer step until the benchmark releases it, so that the
steps of both trainers can be timed in turn.
"""

from __future__ import annotations

import itertools
import logging
import os
import queue
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.measure import describe_failure, missing, require

# TRL reads this when it is imported; its notices would appear between the results.
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
# What TRL calls by the same names as we do.
SHARED_SETTINGS = (
    "num_generations", "max_completion_length", "temperature", "loss_type", "beta", "scale_rewards", "num_iterations",
    "learning_rate", "lr_scheduler_type", "weight_decay", "max_grad_norm", "max_steps", "gradient_checkpointing",
    "bf16", "use_cpu", "shuffle_dataset", "seed",
)  # fmt: skip


def missing_trl() -> str | None:
    """Why TRL's trainer cannot be imported, in one line; None if it can."""
    return missing("trl.trainer.grpo_trainer", "trl")


def quiet() -> None:
    """Turn off the libraries' progress bars and deprecation warnings."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    for name in ("transformers", "trl", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging_ = require("transformers", "'grpo-fast[train]'").utils.logging
    logging_.disable_progress_bar()
    logging_.set_verbosity_error()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def our_config(device: torch.device, folder: Path, **fields: Any) -> Any:
    """Our configuration, with `folder` as the run folder."""
    from grpo_fast.config import GRPOConfig

    return GRPOConfig(use_cpu=device.type == "cpu", output_dir=str(folder), log_completions_steps=0, **fields)


def trl_arguments(config: Any, folder: Path, rows_per_microbatch: int, **others: Any) -> Any:
    """TRL's configuration with our settings, one generation per step and no output; `others` override."""
    trl = require("trl", "trl")
    samples = config.generation_batch_size
    steps = -(-samples // rows_per_microbatch)
    settings = {name: getattr(config, name) for name in SHARED_SETTINGS}
    settings |= {
        "output_dir": str(folder),
        "per_device_train_batch_size": samples // steps,
        "gradient_accumulation_steps": steps,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    return trl.GRPOConfig(**{**settings, **others})


def trl_trainer(
    config: Any,
    folder: Path,
    rows: list[dict[str, Any]],
    reward: Callable[..., list[float]],
    rows_per_microbatch: int,
    rollout: Callable[..., dict[str, Any]] | None = None,
    kind: Any = None,
    model: Any = None,
    peft_config: Any = None,
    **options: Any,
) -> Any:
    """TRL's trainer with our settings, model and prompts.

    Args:
        rows: the training set.
        rollout: replaces TRL's sampling.
        kind: a subclass of TRL's trainer to use.
        model: a model and its tokenizer (default: those that `config` names).
        options: override TRL's settings.
    """
    trl, datasets = require("trl", "trl"), require("datasets", "datasets")
    from transformers.trainer_callback import PrinterCallback

    from grpo_fast.model.loading import load_model

    torch.manual_seed(config.seed)
    policy, tokenizer = model or load_model(config)
    trainer = (kind or trl.GRPOTrainer)(
        model=policy,
        reward_funcs=[reward],
        args=trl_arguments(config, folder, rows_per_microbatch, **options),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
        rollout_func=rollout,
        peft_config=peft_config,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def fixed_rollout(by_prompt: dict[str, list[list[int]]]) -> Callable[..., dict[str, Any]]:
    """A replacement of TRL's sampling that returns the given completions of each prompt, in their order."""

    def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
        places: dict[str, itertools.count] = {}
        chosen = [by_prompt[text][next(places.setdefault(text, itertools.count()))] for text in prompts]
        ids = trainer.processing_class(prompts)["input_ids"]
        return {"prompt_ids": ids, "completion_ids": [list(each) for each in chosen], "logprobs": None}

    return rollout


class Stopped(Exception):
    """TRL's training ended early; the message is the reason."""


class PacedTRL:
    """TRL's `train()`, one optimizer step at a time.

    Args:
        trainer: TRL's trainer.
        before_optimizer: called with the model's named parameters and their gradients before every optimizer step.
    """

    def __init__(self, trainer: Any, device: torch.device, before_optimizer: Callable[[Any], None] | None = None):
        self.trainer, self.device = trainer, device
        self._go: queue.Queue[bool] = queue.Queue()
        self._events: queue.Queue[tuple[str, Any]] = queue.Queue()
        self._begin = 0.0
        self.ended = False
        self.logs: list[dict[str, float]] = []
        trainer.add_callback(self._callback(before_optimizer))
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._expect("ready")

    def _run(self) -> None:
        try:
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)
            self.trainer.train()
            self._events.put(("end", ""))
        except Exception as error:
            self._events.put(("end", describe_failure(error)))

    def _callback(self, before_optimizer: Callable[[Any], None] | None) -> Any:
        from transformers import TrainerCallback

        paced = self

        class Pace(TrainerCallback):
            def on_step_begin(self, args, state, control, **kwargs):
                paced._events.put(("ready", None))
                if not paced._go.get():
                    control.should_training_stop = True
                    raise Stopped
                synchronize(paced.device)
                paced._begin = time.perf_counter()

            def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
                if before_optimizer is not None:
                    before_optimizer(model.named_parameters())

            def on_step_end(self, args, state, control, **kwargs):
                synchronize(paced.device)
                paced._events.put(("done", time.perf_counter() - paced._begin))

            def on_log(self, args, state, control, logs=None, **kwargs):
                paced.logs.append(dict(logs or {}))

        return Pace()

    def _expect(self, wanted: str) -> Any:
        kind, value = self._events.get()
        if kind != wanted:
            self.ended = True
            raise Stopped(value or "it ended early")
        return value

    def step(self) -> float:
        """Seconds of one optimizer step. Returns once the thread waits before the next step or has ended."""
        if self.ended:
            raise Stopped("it has no steps left")
        self._go.put(True)
        seconds = self._expect("done")
        kind, failure = self._events.get()
        self.ended = kind == "end"
        if self.ended and failure:
            raise Stopped(failure)
        return seconds

    def stop(self) -> None:
        """End the training and its thread."""
        self._go.put(False)
        self._thread.join()
        self.trainer = None


@contextmanager
def alone_in_accelerate() -> Iterator[None]:
    """Accelerate has one gradient state per process: while TRL's trainer waits within an accumulation, that state would
    make every other optimizer skip its step."""
    from accelerate.state import GradientState

    state = GradientState()
    before = state.sync_gradients
    state._set_sync_gradients(True)
    try:
        yield
    finally:
        state._set_sync_gradients(before)


def our_steps(trainer: Any, device: torch.device) -> Iterator[tuple[float, dict[str, float]]]:
    """Seconds and metrics of each of our optimizer steps."""
    steps = trainer.steps()
    while True:
        synchronize(device)
        begin = time.perf_counter()
        metrics = next(steps, None)
        if metrics is None:
            return
        synchronize(device)
        yield time.perf_counter() - begin, metrics
