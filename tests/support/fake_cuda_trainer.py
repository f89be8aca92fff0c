"""Optimizer steps of the trainer's `Learner` on a fake GPU, for `test_fake_trainer.py`: ``NAME``, one of `CASES`."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from transformers import Qwen3Config, Qwen3ForCausalLM

from grpo_fast.config import GRPOConfig
from grpo_fast.memory.plan import plan_memory, total
from grpo_fast.model.microbatch_policy import MicrobatchPolicy
from grpo_fast.model.packing import Sample, build_microbatch, plan_rows, token_offsets
from grpo_fast.model.policy import LossInputs
from grpo_fast.train.batch import build_step_batch
from grpo_fast.train.learner import Learner
from grpo_kernels import PRESETS
from support.fake_cuda import main
from support.fake_gpu import FakeGPU

# Answers of equal lengths, as the plan has them, in two microbatches of a prompt's four.
PROMPT, ANSWER, GROUP, PROMPTS = 100, 900, 4, 2
SIZES = {
    "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 2,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True,
}  # fmt: skip
FIELDS = {
    "model_name_or_path": "m", "dataset_name": "d", "reward_funcs": ["r"], "num_generations": GROUP,
    "generation_batch_size": GROUP * PROMPTS, "max_completion_length": ANSWER, "dtype": "bfloat16",
    "max_tokens_per_microbatch": PROMPT + GROUP * ANSWER,
    # A fixed one: by default the head takes what is free.
    "max_buffer_mib": 256,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "packed": {},
    "padded": {"padding_free": "never"},
    "checkpointed": {"gradient_checkpointing": True},
    "activations offloaded": {"gradient_checkpointing": True, "activation_offloading": True},
    "optimizer offloaded": {"optim_offload": True},
    "lora": {"use_peft": True, "lora_r": 16},
    "autocast": {"dtype": "float32", "bf16": True},
    "float32": {"dtype": "float32"},
    "tiled": {"tiled_mlp": True, "gradient_checkpointing": True},
    "reference": {"beta": 0.1},
    "several steps": {
        "generation_batch_size": None,
        "per_device_train_batch_size": GROUP,
        "steps_per_generation": PROMPTS,
    },
}


def build_model(dtype: torch.dtype) -> Qwen3ForCausalLM:
    torch.set_default_dtype(dtype)
    try:
        with torch.device("cuda"):
            return Qwen3ForCausalLM(Qwen3Config(**SIZES, attn_implementation="sdpa"))
    finally:
        torch.set_default_dtype(torch.float32)


def step(name: str) -> dict[str, Any]:
    """Two steps, of which the second is measured: the first allocates the optimizer's state."""
    gpu = FakeGPU.present
    fields = {**FIELDS, **CASES[name]}
    config = GRPOConfig(**{key: value for key, value in fields.items() if value is not None})
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(mixed_precision="bf16" if config.bf16 else "no")
    # The comparisons before training read differences of log-probabilities.
    gpu.value = 0.0
    model = build_model(getattr(torch, config.dtype))
    learner = Learner(model, config, accelerator, list(range(PROMPT)), 0)
    gpu.value = 1.0
    prompts = [list(range(PROMPT)) for _ in range(PROMPTS)]
    samples = [Sample(prompt, [7] * ANSWER, index) for index, prompt in enumerate(prompts) for _ in range(GROUP)]
    batch = build_step_batch(samples, torch.ones(len(samples), dtype=torch.bool), config.objective(), config)
    batch.weights = batch.weights.to("cuda")
    batch.set_advantages(torch.ones(len(samples) * ANSWER), config.objective())
    # The GPU cannot say that every token moves the policy.
    known = learner.known_rows
    learner.known_rows = lambda batch: (known(batch), "all")[1]
    if config.uses_reference:
        batch.ref_logprobs = learner.score_reference(batch)
    (*_, part) = parts = learner.parts(batch)
    learner.update(parts[0])
    gpu.start()
    learner.score(learner.policy, batch)
    scoring = gpu.report.places
    gpu.start()
    gpu.report.launches.clear()
    learner.update(part)
    waits, places = gpu.report.waits, gpu.report.places
    gpu.report.waits, gpu.report.places = {}, {}
    microbatches = len(list(learner.microbatches(part)))
    gpu.report.waits, gpu.report.places = waits, places
    trained = [p for p in learner.policy.parameters() if p.requires_grad]
    return {
        "packed": learner.packed,
        "microbatches": microbatches,
        "waits of scoring": scoring,
        "tensors": len(trained),
        "dtypes": sorted({str(p.dtype).removeprefix("torch.") for p in trained}),
        "peak": gpu.base_bytes + gpu.report.peak_bytes,
        "planned": total(plan_memory(config, model.config, PROMPT).training),
        "optimizer": type(learner.optimizer.optimizer).__name__,
    }


def float16() -> dict[str, Any]:
    """A user's loop with a loss scale: float32 weights, a forward under float16 autocast, and the backward."""
    gpu = FakeGPU.present
    policy = MicrobatchPolicy(build_model(torch.float32))
    samples = [Sample(list(range(PROMPT)), [7] * ANSWER, 0) for _ in range(GROUP)]
    rows = plan_rows(samples, list(range(GROUP)), 0)
    microbatch = build_microbatch(samples, rows, token_offsets(samples), 0, packed=False).to(torch.device("cuda"))
    tokens = torch.empty(GROUP * ANSWER, device="cuda")
    gpu.start()
    with torch.autocast("cuda", torch.float16):
        loss = policy(microbatch, LossInputs(objective=PRESETS["dapo"], advantages=tokens, weights=tokens, rows="all"))
    (loss.loss * 2.0**16).backward()
    return {"dtypes": sorted({str(p.grad.dtype).removeprefix("torch.") for p in policy.parameters()})}


if __name__ == "__main__":
    functions = {name: partial(step, name) for name in CASES} | {"float16": float16}
    main({name: functions[name] for name in sys.argv[2:] or functions})
