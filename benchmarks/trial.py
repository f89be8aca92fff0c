"""The peak memory of one optimizer step with synthetic answers of one length, in our trainer or in TRL's.

`plan` and `longest` run such steps. Models have the real configurations and random weights, created on the device.
Nothing is sampled; rewards, advantages, packing, forward, backward, clipping and optimizer are the trainer's own. A
short step allocates the optimizer state first, and the gradients are allocated before the first microbatch, so that one
microbatch takes as much memory as a whole step.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.harness.measure import ROOT, describe_failure, release, require
from benchmarks.harness.trainers import our_config, quiet, synchronize, trl_trainer
from benchmarks.step import FIRST_TOKEN, OURS, FixedRollout, parity_reward

# Small enough for a CPU, with activations that are large compared with the head.
TINY = {
    "vocab_size": 4096, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 32, "tie_word_embeddings": False,
}  # fmt: skip
MODELS = {"qwen3-1.7b": "qwen3_1.7b.json", "qwen3-8b": "qwen3_8b.json", "qwen3-tiny": TINY}
MOST_POSITIONS = 1 << 21
PROMPT_TOKENS = 128
GROUP = 8
# The length of the answers in the step that allocates the optimizer state.
SHORT = 16
WORDS = 512
# The most bytes that a failed trial may leave on a GPU for the next one to run in the same process.
MOST_LEFT = 64 << 20
OUT_OF_MEMORY = ("out of memory", "ALLOC_FAILED")


@dataclass(frozen=True)
class Job:
    """A trainer and its settings, in which answers are tried.

    Attributes:
        trainer: ours or TRL's.
        model: one of `MODELS`.
        fields: fields of our configuration, from which TRL's is derived.
        options: further options of TRL's configuration.
        group: the number of answers to the single prompt of a step.
        together: how many answers a microbatch of ours holds (TRL's holds one).
        cap_bytes: the most memory that torch may allocate on a GPU. On a CPU, a trial that takes more has failed.
    """

    trainer: str
    model: str
    device: str
    fields: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    group: int = GROUP
    together: int = 1
    cap_bytes: int | None = None

    def config(self, folder: Path, answer: int) -> Any:
        """Our configuration for answers of `answer` tokens: LoRA of rank 16, checkpointing, and `fields`."""
        data = str(folder / "prompts.jsonl")
        fields = {"dtype": "bfloat16", "use_peft": True, "lora_r": 16, "gradient_checkpointing": True, **self.fields}
        return our_config(
            torch.device(self.device), folder / "run", model_name_or_path=self.model, dataset_name=data,
            eval_dataset_name=data, shuffle_dataset=False, reward_funcs=["benchmarks.step.parity_reward"],
            num_generations=self.group, generation_batch_size=self.group, max_completion_length=answer,
            max_tokens_per_microbatch=self.tokens(answer), learning_rate=1e-6, lr_scheduler_type="constant",
            max_steps=1 << 20, **fields,
        )  # fmt: skip

    def tokens(self, answer: int) -> int:
        """The number of positions in a microbatch."""
        return PROMPT_TOKENS + self.together * answer


def model_config(name: str) -> Any:
    """The transformers configuration of the model, with positions for answers of any length."""
    transformers = require("transformers", "'grpo-fast[train]'")
    fields = MODELS[name]
    if isinstance(fields, str):
        fields = json.loads((ROOT / "tests" / "data" / fields).read_text())
    return transformers.Qwen3Config(**{**fields, "max_position_embeddings": MOST_POSITIONS})


def planned(job: Job, answer: int, tracer: Any = None) -> Any:
    """The memory plan of a job for answers of `answer` tokens; `tracer` reuses traces of earlier plans of the model."""
    from grpo_fast.memory.plan import plan_memory

    return plan_memory(job.config(Path(), answer), model_config(job.model), PROMPT_TOKENS, tracer)


def random_model(job: Job, config: Any) -> tuple[nn.Module, Any]:
    """The model with random weights on the device, in 4 bits if `config` says so, and a tokenizer with a few words."""
    transformers = require("transformers", "'grpo-fast[train]'")
    tokenizers = require("tokenizers", "'grpo-fast[train]'")
    # Special tokens are also found inside words, so they must not look like one.
    vocabulary = {"<pad>": 0, "</s>": 1} | {f"t{index}": index for index in range(FIRST_TOKEN, WORDS)}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<pad>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="</s>")
    torch.manual_seed(0)
    with torch.device(job.device):
        model = transformers.AutoModelForCausalLM.from_config(
            model_config(job.model), dtype=getattr(torch, config.dtype), attn_implementation=config.attn_implementation
        )
    if config.load_in_4bit:
        quantise(model, config)
    return model, tokenizer


def quantise(model: nn.Module, config: Any) -> None:
    """Convert every linear layer but the head to 4 bits, as transformers does for a folder with ``load_in_4bit``."""
    bitsandbytes = require("bitsandbytes", "bitsandbytes")
    head = model.get_output_embeddings()
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head]
    for name in linear:
        plain = model.get_submodule(name)
        options = {"quant_type": config.bnb_4bit_quant_type, "compress_statistics": config.use_bnb_nested_quant}
        packed = bitsandbytes.nn.Linear4bit(
            plain.in_features, plain.out_features, bias=plain.bias is not None, compute_dtype=torch.bfloat16,
            device="meta", **options,
        )  # fmt: skip
        packed.weight = bitsandbytes.nn.Params4bit(plain.weight.data, requires_grad=False, **options)
        packed.bias = plain.bias
        # As in `grpo_fast.model.loading`: sampling on a CPU must not repack the weights.
        packed.support_avx512bf16_for_cpu = False
        model.set_submodule(name, packed.to(plain.weight.device))
    model.is_loaded_in_4bit = True


def synthetic_answers(group: int, length: int) -> list[list[int]]:
    """`group` answers of `length` tokens, whose `parity_reward` alternates."""
    ids = torch.randint(FIRST_TOKEN, WORDS, (group, length), generator=torch.Generator().manual_seed(0)).tolist()
    for place, answer in enumerate(ids):
        answer[0] = FIRST_TOKEN + place % 2
    return ids


def add_zero_gradients(model: nn.Module) -> None:
    """Allocate the gradients, as they are from the second microbatch of a step on."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


class OurSteps:
    """Our trainer."""

    def __init__(self, job: Job, folder: Path):
        from grpo_fast.trainer import GRPOTrainer

        self.job = job
        with patch("grpo_fast.trainer.load_model", lambda config: random_model(job, config)):
            self.trainer = GRPOTrainer(job.config(folder, SHORT))
        # The trainer has a copy of the configuration.
        self.config = self.trainer.config
        self.model = self.trainer.model
        self.microbatches = self.trainer.learner.microbatches

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self.trainer.learner.optimizer.optimizer

    def step(self, answer: int, microbatches: int | None) -> None:
        """One optimizer step on answers of `answer` tokens, with all microbatches or only the first ones."""
        self.config.max_completion_length = answer
        self.config.max_tokens_per_microbatch = self.job.tokens(answer)
        prompt = tuple(self.trainer.train_prompts[0])
        self.trainer.rollout.engine = FixedRollout({prompt: synthetic_answers(self.job.group, answer)})
        self.trainer.learner.microbatches = lambda batch: islice(self.microbatches(batch), microbatches)
        add_zero_gradients(self.model)
        next(self.trainer.steps())


class TRLSteps:
    """TRL's trainer, whose `train()` takes one step per call."""

    def __init__(self, job: Job, folder: Path):
        from grpo_fast.model.loading import add_adapter

        self.job, config = job, job.config(folder, SHORT)
        model, tokenizer = random_model(job, config)
        self.model = add_adapter(model, config) if config.use_peft else model
        self.trainer = trl_trainer(
            config, folder / "trl", [{"prompt": synthetic_prompt()}], parity_reward, 1, self.rollout,
            model=(self.model, tokenizer),
            **{"max_steps": 1, "max_completion_length": MOST_POSITIONS, **job.options},
        )  # fmt: skip
        self.answer, self.left, self.loss = SHORT, None, self.trainer.compute_loss
        self.trainer.compute_loss = self.limited_loss

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self.trainer.optimizer

    def rollout(self, prompts: list[str], trainer: Any) -> dict[str, Any]:
        answers = synthetic_answers(len(prompts), self.answer)
        return {
            "prompt_ids": trainer.processing_class(prompts)["input_ids"],
            "completion_ids": answers,
            "logprobs": None,
        }

    def limited_loss(self, model: nn.Module, inputs: Any, *args: Any, **options: Any) -> torch.Tensor:
        """TRL's loss for the first `left` microbatches, and 0 for the others."""
        if self.left == 0:
            return torch.zeros((), device=self.job.device, requires_grad=True)
        self.left = None if self.left is None else self.left - 1
        add_zero_gradients(model)
        return self.loss(model, inputs, *args, **options)

    def step(self, answer: int, microbatches: int | None) -> None:
        self.answer, self.left = answer, microbatches
        self.trainer.train()


def synthetic_prompt() -> str:
    return " ".join(f"t{FIRST_TOKEN + index}" for index in range(PROMPT_TOKENS))


class Trials:
    """Takes steps with answers of any length, one after another.

    Raises:
        UserError: the trainer refuses the job.
    """

    def __init__(self, job: Job):
        self.job, self.device = job, torch.device(job.device)
        self.folder = tempfile.TemporaryDirectory()
        (Path(self.folder.name) / "prompts.jsonl").write_text(json.dumps({"prompt": synthetic_prompt()}) + "\n")
        self.steps: Any = None
        if self.device.type == "cuda" and job.cap_bytes:
            most = torch.cuda.get_device_properties(self.device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(job.cap_bytes / most, 1.0), self.device)
        self.build()

    def build(self) -> None:
        quiet()
        self.steps = (OurSteps if self.job.trainer == OURS else TRLSteps)(self.job, Path(self.folder.name))
        self.steps.step(SHORT, None)

    def trial(self, answer: int, whole: bool = False) -> dict[str, Any]:
        """One step with answers of `answer` tokens: its first microbatch, or the whole step.

        Returns whether it ``fits``, and its ``peak_bytes`` (of all tensors on the device) and ``seconds``, or the
        reason in ``detail``. If it is ``broken``, the process must not be used any more.
        """
        failure = None
        try:
            if self.steps is None:
                self.build()
            release(self.device)
            begin = time.perf_counter()
            peak = self.peak_of(lambda: self.steps.step(answer, None if whole else 1))
            seconds = time.perf_counter() - begin
        except Exception as error:
            failure = describe_failure(error)
        if failure is not None:
            self.steps = None
            try:
                release(self.device)
                left = torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0
            except RuntimeError:
                left = MOST_LEFT + 1
            short = any(sign in failure for sign in OUT_OF_MEMORY)
            return {"fits": False, "memory": short, "detail": failure, "broken": not short or left > MOST_LEFT}
        fits = self.device.type == "cuda" or not self.job.cap_bytes or peak <= self.job.cap_bytes
        detail = "" if fits else "out of memory"
        return {"fits": fits, "memory": not fits, "detail": detail, "peak_bytes": peak, "seconds": seconds}

    def peak_of(self, call: Callable[[], None]) -> int:
        """The most bytes in tensors during a call: those in torch's allocator on a GPU; on a CPU, those that the call
        allocates according to torch's profiler, plus those held before."""
        if self.device.type == "cuda":
            synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            call()
            synchronize(self.device)
            return torch.cuda.max_memory_allocated(self.device)
        held = self.held_bytes()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            call()
        live = most = 0
        for event in profiled.profiler.kineto_results.events():
            if event.name() == "[memory]":
                live += event.nbytes()
                most = max(most, live)
        return held + most

    def held_bytes(self) -> int:
        """Bytes of the weights, the gradients and the optimizer state."""
        parameters = list(self.steps.model.parameters())
        state = [value for values in self.steps.optimizer.state.values() for value in values.values()]
        tensors = [*parameters, *(p.grad for p in parameters), *state]
        storages = [tensor.untyped_storage() for tensor in tensors if isinstance(tensor, torch.Tensor)]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    def stop(self) -> None:
        self.steps = None
        self.folder.cleanup()
        release(self.device)
