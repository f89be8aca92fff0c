"""An estimate of the seconds of a step, from the numbers that vendors publish; nothing here was measured.

Training is bound by arithmetic, sampling by reading the weights and the keys and values once for every token, and
offloading by the bus to host memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from grpo_fast.config import GRPOConfig
from grpo_fast.errors import UserError
from grpo_fast.memory.plan import GIB, MemoryPlan


class Gpu(NamedTuple):
    """Memory in GiB, dense 16-bit TFLOP/s with float32 sums, memory bandwidth in GB/s, bus bandwidth in GB/s."""

    memory: int
    tflops: float
    bandwidth: float
    bus: float


# From the vendors' data sheets; the rates of matrix products are those without sparsity.
GPUS = {
    "T4": Gpu(16, 65, 320, 16),
    "L4": Gpu(24, 121, 300, 32),
    "RTX 3090": Gpu(24, 71, 936, 32),
    "RTX 4090": Gpu(24, 165, 1008, 32),
    "RTX 5090": Gpu(32, 210, 1792, 64),
    "A100 40GB": Gpu(40, 312, 1555, 32),
    "L40S": Gpu(48, 362, 864, 32),
    "A100": Gpu(80, 312, 2039, 32),
    "H100": Gpu(80, 989, 3350, 64),
    "H200": Gpu(141, 989, 4800, 64),
    "B200": Gpu(180, 2250, 8000, 64),
}
# The device that a size of memory stands for.
USUAL = ("T4", "RTX 4090", "RTX 5090", "A100 40GB", "L40S", "H100", "H200", "B200")
# Assumed shares of the published rates.
ARITHMETIC, READING, BUS = 0.4, 0.6, 0.7
# transformers launches every kernel of a layer for every token; assumed seconds of one layer.
LAYER_LAUNCHES = 0.7e-3
ASSUMPTIONS = (
    f"assumed, not measured: {ARITHMETIC:.0%} of the arithmetic, {READING:.0%} of the memory bandwidth and {BUS:.0%} "
    "of the bus bandwidth that the data sheet names"
)


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step in which all answers have their full length."""

    sampling: float
    training: float
    gpu: str

    @property
    def total(self) -> float:
        return self.sampling + self.training


def find_gpu(vram: int, name: str | None = None) -> str:
    """A key of `GPUS`: by its name, or the usual device with `vram` bytes.

    Raises:
        UserError: there is no such device in the table.
    """
    if name is None:
        return min(USUAL, key=lambda gpu: abs(GPUS[gpu].memory * GIB - vram))
    matches = [gpu for gpu in GPUS if gpu.lower().replace(" ", "") == name.lower().replace(" ", "")]
    if not matches:
        raise UserError(f"--gpu={name!r} is not allowed: it must be one of {', '.join(GPUS)}")
    return matches[0]


def estimate_step(config: GRPOConfig, model_config: Any, plan: MemoryPlan, prompt_tokens: int, gpu: str) -> StepTime:
    """The seconds that sampling and training take if every answer has `max_completion_length` tokens.

    Args:
        config: the run.
        model_config: the model's transformers configuration.
        plan: the run's memory.
        prompt_tokens: length of the prompts.
        gpu: a key of `GPUS`.
    """
    device, text = GPUS[gpu], model_config.get_text_config()
    answer, completions = config.max_completion_length, config.generation_batch_size
    sequence, layers = prompt_tokens + answer, text.num_hidden_layers
    heads = text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    keys = getattr(text, "num_key_value_heads", None) or heads
    flops, reads = device.tflops * 1e12 * ARITHMETIC, device.bandwidth * 1e9 * READING

    # Products of a forward, and of causal attention: two products over half of the pairs.
    forward = 2 * plan.parameters * sequence
    attention = 2 * sequence**2 * heads * head_dim * layers
    # The backward has the gradients of the inputs and, where they are trained, of the weights; attention's computes
    # five products for the forward's two.
    passes = 1 + 1 + (0 if config.use_peft else 1) + (1 if config.gradient_checkpointing else 0)
    attention_passes = 1 + 2.5 + (1 if config.gradient_checkpointing else 0)
    work = config.num_iterations * (passes * forward + attention_passes * attention)
    if config.uses_reference:
        work += forward + attention
    training = completions * work / flops
    bus = device.bus * 1e9 * BUS
    # Once in the forward and once in the backward: layers for every microbatch of one answer, and all layers' inputs.
    waiting = plan.host.get("frozen layers", 0)
    moved = 2 * completions * waiting * config.num_iterations
    if config.activation_offloading:
        moved += 2 * completions * sequence * text.hidden_size * 2 * layers
    training = max(training, moved / bus)
    if config.optim_offload:
        training += 4 * plan.trained / bus

    # Answers start short: on average they take half of their room.
    mean_length = prompt_tokens + answer / 2
    at_once = min(max(config.max_tokens_per_generation_batch // mean_length, 1), completions)
    weights = plan.rollout.get("vLLM's weights") or plan.rollout.get("weights", 0)
    mean_cache = 4 * keys * head_dim * layers * mean_length * at_once
    token = max((weights + waiting + mean_cache) / reads, waiting / bus, 2 * plan.parameters * at_once / flops)
    if not config.use_vllm:
        token = max(token, LAYER_LAUNCHES * layers)
    return StepTime(completions / at_once * answer * token, training, gpu)
