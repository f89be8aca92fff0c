"""What a run needs in memory, before it is started: the parts of training and of sampling, in bytes.

    plan = plan_memory(config, model_config)
    plan.training, plan.rollout     the parts at the fullest moment of each
    plan.fits(24 << 30)

Parameters are counted on the model itself, built without storage; activations are those that autograd keeps
(`memory_trace`); the head, the optimizer and the KV cache follow from their shapes. Sampling uses the policy's own
weights, or vLLM's copy in this process, so the optimizer's state stays beside it, while gradients and activations are
gone.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from grpo_fast.config import GRPOConfig
from grpo_fast.errors import UserError
from grpo_fast.memory.trace import Setup, Traced, Tracer, weights_dtype
from grpo_fast.model.attention import Group
from grpo_fast.rollout.decode import CHUNK_LOGITS, PREFILL_TOKENS, STEP_LOGITS
from grpo_fast.rollout.transformers import continuous
from grpo_fast.rollout.vllm.common import BLOCK
from grpo_fast.rollout.vllm.kv_plan import kv_bytes_per_token, plan_kv_cache
from grpo_kernels.budget import (
    CPU_BUFFER_BYTES,
    FROZEN_GPU_BUFFER_BYTES,
    GPU_BUFFER_BYTES,
    NARROW_COPIES,
    cpu_block_bytes,
    equal_parts,
)

GIB = 1 << 30
# Left free: the CUDA context with its libraries, and what the allocator cannot use between blocks. Not measured here.
CONTEXT_BYTES = GIB
FRAGMENTATION = 0.05
# Elements that share a scale: of 4-bit weights, of those scales where they are quantised too, of 8-bit moments.
BLOCK_4BIT, BLOCK_SCALES, BLOCK_8BIT = 64, 256, 256
# Below this size a moment is not quantised.
LEAST_8BIT = 4096
# Layers whose inputs are on the device while the others' are in host memory: in use, and on their way.
LAYERS_IN_FLIGHT = 2
# Of each logit that a token is being sampled from: float32 logits, filtered ones, log-probabilities, probabilities, and
# float64 cumulated ones. Filters that sort take no more: values, int64 indices, cumulated probabilities.
SAMPLED_BYTES = 24
# The same in transformers' own loop, which samples all rows at once; and with a filter that sorts.
LOGIT_COPIES, SORTED_BYTES = 3, 16
# Fields that decide what is counted on a model.
COUNTED = ("dtype", "use_peft", "lora_r", "load_in_4bit", "use_bnb_nested_quant", "optim", "optim_offload")
# Lengths at which activations are traced to find the longest answer; in between they are interpolated.
LENGTHS = [1024 << (2 * step) for step in range(6)]


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of a run by part.

    Attributes:
        moments: the parts at every moment that may be the fullest: ``head``, ``backward``, ``reference`` (its
            scoring, where it is a copy) and ``rollout``.
        host: what is kept in host memory instead.
        parameters: number of weights.
        trained: number of those, or of the adapters', that are trained.
        tokens: positions of one microbatch.
        sequences: completions sampled at once, at most.
    """

    moments: dict[str, dict[str, int]]
    host: dict[str, int]
    parameters: int
    trained: int
    tokens: int
    sequences: int

    @property
    def training(self) -> dict[str, int]:
        return max((parts for name, parts in self.moments.items() if name != "rollout"), key=total)

    @property
    def rollout(self) -> dict[str, int]:
        return self.moments["rollout"]

    @property
    def peak(self) -> int:
        return max(map(total, self.moments.values()))

    def fits(self, vram: int) -> bool:
        return self.peak <= usable(vram)


def total(parts: dict[str, int]) -> int:
    return sum(parts.values())


def usable(vram: int) -> int:
    """Bytes of a device that a plan may fill."""
    return int((1 - FRAGMENTATION) * vram) - CONTEXT_BYTES


@dataclass(frozen=True)
class Weights:
    """Counts of a model, and bytes of what belongs to its parameters."""

    parameters: int
    trained: int
    bytes: int
    adapters: int
    gradients: int
    optimizer: int
    head_bytes: int
    head_trained: bool
    largest_4bit: int


def count_weights(model: nn.Module, config: GRPOConfig) -> Weights:
    """Count the parameters of a model, which may be on the meta device; tied ones count once."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise UserError(f"{type(model).__name__} has no linear output head, but {type(head).__name__}")
    named = dict(model.named_parameters())
    adapters = {id(p) for name, p in named.items() if "lora_" in name}
    quantised = {}
    if config.load_in_4bit:
        linear = [module for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        quantised = {
            id(m.weight): m.weight for m in linear if m.weight is not head.weight and id(m.weight) not in adapters
        }
    own = [p for p in named.values() if id(p) not in adapters]
    trained = [p for p in named.values() if p.requires_grad]
    return Weights(
        parameters=sum(p.numel() for p in own),
        trained=sum(p.numel() for p in trained),
        bytes=sum(_bytes_4bit(p.numel(), config) if id(p) in quantised else _bytes(p) for p in own),
        adapters=sum(_bytes(p) for p in named.values() if id(p) in adapters),
        gradients=sum(map(_bytes, trained)),
        optimizer=sum(_optimizer_bytes(p.numel(), config) for p in trained),
        head_bytes=_bytes(head.weight),
        head_trained=head.weight.requires_grad,
        largest_4bit=max(map(_bytes, quantised.values()), default=0),
    )


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _bytes_4bit(count: int, config: GRPOConfig) -> int:
    blocks = math.ceil(count / BLOCK_4BIT)
    scales = blocks + 4 * math.ceil(blocks / BLOCK_SCALES) if config.use_bnb_nested_quant else 4 * blocks
    return math.ceil(count / 2) + scales


def _optimizer_bytes(count: int, config: GRPOConfig) -> int:
    """Two moments: float32, or 8 bits with a float32 scale a block. In host memory the float32 weights join them."""
    if config.optim_offload:
        return 12 * count
    if config.optim == "adamw_torch_fused" or count < LEAST_8BIT:
        return 8 * count
    if config.optim == "adamw_torch_8bit" and count % BLOCK_8BIT:
        return 8 * count
    return 2 * (count + 4 * math.ceil(count / BLOCK_8BIT))


def plan_memory(
    config: GRPOConfig, model_config: Any, prompt_tokens: int = 512, tracer: Tracer | None = None
) -> MemoryPlan:
    """The memory of a run, with every completion as long as `max_completion_length`.

    Args:
        config: the run.
        model_config: the model's transformers configuration.
        prompt_tokens: length of the longest prompt.
        tracer: keeps traces of the same model from earlier plans.

    Raises:
        UserError: the model cannot be built or followed.
    """
    tracer = tracer or Tracer(model_config)
    return _Planner(config, tracer, prompt_tokens).plan(config.max_completion_length)


class _Planner:
    """The plans of one configuration for answers of any length."""

    def __init__(self, config: GRPOConfig, tracer: Tracer, prompt_tokens: int):
        self.config, self.tracer, self.prompt_tokens = config, tracer, prompt_tokens
        self.model_config = tracer.model_config
        self.text = tracer.model_config.get_text_config()
        self.itemsize = weights_dtype(self.model_config, config).itemsize
        key = tuple(getattr(config, name) for name in COUNTED), tuple(config.lora_target_modules or ())
        if key not in tracer.counted:
            model = tracer.model(config)
            tracer.counted[key] = count_weights(model, config), continuous(model)
        self.weights, self.continuous = tracer.counted[key]

    def plan(self, answer: int, interpolated: bool = False) -> MemoryPlan:
        config, weights = self.config, self.weights
        tokens = max(config.max_tokens_per_microbatch, self.prompt_tokens + answer)
        setup, trace = self.setup(tokens, answer), self.between if interpolated else self.tracer.trace
        traced = trace(setup)
        fixed = {
            "weights": weights.bytes,
            "unpacked 4-bit layer": weights.largest_4bit,
            "adapters": weights.adapters,
        }
        host = {}
        offloads = config.optim_offload or config.optim == "paged_adamw_8bit"
        (host if offloads else fixed)["optimizer state"] = weights.optimizer
        training = {**fixed, "gradients": weights.gradients}
        workspace = self.head_workspace(setup.predicted)
        moments = {
            "head": {**training, **self.named(traced.head, tokens, host), "head workspace": workspace},
            "backward": {**training, **self.named(traced.peak, tokens, host)},
        }
        if config.uses_reference and not config.use_peft:
            host["reference"] = weights.bytes
            scored = {"reference": weights.bytes, "head workspace": workspace}
            forward = trace(replace(setup, training=False)).peak
            moments["reference"] = {**fixed, **scored, **self.named(forward, tokens)}
        if config.use_vllm:
            engine, sequences = self.engine(answer)
            moments["rollout"] = {**fixed, **engine}
            if not config.vllm_enable_sleep_mode:
                moments = {name: {**parts, **engine} for name, parts in moments.items()}
        else:
            states = self.sampled(answer) if self.continuous else [self.padded(answer)]
            sequences = max(rows for rows, _ in states)
            moments["rollout"] = {**fixed, **self.sampling(states, sequences)}
            if self.continuous:
                moments["rollout"]["prompts"] = self.prompts(setup, answer)
        moments = {name: {part: int(n) for part, n in parts.items() if n >= 1} for name, parts in moments.items()}
        return MemoryPlan(
            moments, {part: int(n) for part, n in host.items()}, weights.parameters, weights.trained, tokens, sequences
        )

    def setup(self, tokens: int, answer: int) -> Setup:
        """A microbatch of whole answers, which share prompts where rows are packed."""
        config, prompt = self.config, self.prompt_tokens
        shares = config.share_prompts != "never" and config.padding_free != "never"
        together = min(max((tokens - prompt) // answer, 1), config.num_generations) if shares else 1
        rows = max(tokens // (prompt + together * answer), 1)
        group = Group(0, prompt, [answer] * together)
        masked = group.length if config.use_cpu and group.masked else 0
        gathered = 1.0 if masked else round((prompt + answer) * together / group.length, 3)
        predicted = min(rows * together * answer, tokens)
        return Setup(config, self.text.num_hidden_layers, tokens, predicted, gathered, masked)

    def between(self, setup: Setup) -> Traced:
        """The trace of a length between two of `LENGTHS`. Peaks bend upwards, so a line lies above them."""
        high = next((length for length in LENGTHS[1:] if length >= setup.tokens), LENGTHS[-1])
        low = LENGTHS[LENGTHS.index(high) - 1]
        ends = [self.tracer.trace(replace(setup, tokens=t, predicted=t, gathered=1.0, masked=0)) for t in (low, high)]
        return ends[0].mixed(ends[1], (setup.tokens - low) / (high - low))

    def named(self, traced: dict[str, float], tokens: int, host: dict[str, int] | None = None) -> dict[str, float]:
        """The parts of a trace by the names of a plan, the layers' inputs apart where they are kept."""
        parts = dict(traced)
        boundaries = 0
        if self.config.gradient_checkpointing and host is not None:
            layer = tokens * self.text.hidden_size * self.itemsize
            # The first layer's input is the embedding's output.
            boundaries = min(max(self.text.num_hidden_layers - 1, 0) * layer, int(parts.get("residual", 0)))
            parts["residual"] = parts.get("residual", 0) - boundaries
            if self.config.activation_offloading:
                boundaries += int(parts.pop("embedding", 0))
                stay = min(LAYERS_IN_FLIGHT * layer, boundaries)
                # Pinned buffers have sizes of powers of two.
                host["layers' inputs"] = (boundaries - stay) // layer * (1 << (layer - 1).bit_length())
                boundaries = stay
        return {
            "embedding output": parts.get("embedding", 0),
            "layers' inputs": boundaries,
            "attention": parts.get("attention", 0),
            "MLP": parts.get("mlp", 0),
            "norms and residual": parts.get("residual", 0),
            "head gradients": parts.get("head", 0),
            "gradients in flight": parts.get("gradients", 0),
        }

    def head_workspace(self, predicted: int) -> int:
        """The logits of a chunk and the narrow copies beside them, within the budget and not more than the rows need.

        16-bit heads keep 16-bit logits on a GPU. On a CPU the entropies take two copies of a block of rows.
        """
        config, weights = self.config, self.weights
        on_gpu = GPU_BUFFER_BYTES if weights.head_trained else FROZEN_GPU_BUFFER_BYTES
        budget = config.max_buffer_bytes or (CPU_BUFFER_BYTES if config.use_cpu else on_gpu)
        half = not config.use_cpu and (config.bf16 or self.itemsize == 2)
        vocab = self.text.vocab_size
        row = vocab * (2 if half else 4) + NARROW_COPIES * self.text.hidden_size * 4
        if not config.use_cpu:
            return row * equal_parts(predicted, budget // row)
        block = cpu_block_bytes(budget)
        rows = equal_parts(predicted, (budget - 2 * block) // row)
        return row * rows + 2 * 4 * vocab * equal_parts(rows, block // (4 * vocab))

    def padded(self, answer: int) -> tuple[int, int]:
        """Rows and columns of a batch that `generate` runs: whole groups under the token budget, at least one."""
        config = self.config
        tokens = self.prompt_tokens + answer
        groups = config.max_tokens_per_generation_batch // (config.num_generations * tokens)
        training = min(max(groups, 1), config.prompts_per_step) * config.num_generations
        groups = config.max_tokens_per_generation_batch // (config.num_generations_eval * tokens)
        evaluation = min(max(groups, 1), config.max_eval_samples or math.inf) * config.num_generations_eval
        return int(max(training, evaluation)), tokens

    def sampled(self, answer: int) -> list[tuple[int, int]]:
        """Rows and columns of the decoder's cache when it may be largest: before the budget takes rows away, and after.

        A cache that stops growing at a window is smaller with few wide rows than with many narrow ones.
        """
        config, budget, longest = self.config, self.config.max_tokens_per_generation_batch, self.prompt_tokens + answer
        evaluation = (config.max_eval_samples or math.inf) * config.num_generations_eval
        most = int(min(max(config.generation_batch_size, evaluation), max(STEP_LOGITS // self.text.vocab_size, 1)))
        fullest = min(max(budget // most, self.prompt_tokens), longest)
        return [(max(min(most, budget // width), 1), width) for width in (fullest, longest)]

    def engine(self, answer: int) -> tuple[dict[str, int], int]:
        """vLLM's weights, keys and values in this process (a server has memory of its own), and its sequences.

        All that may be sampled at once; with less memory vLLM samples fewer side by side. Its workspace is not counted.
        """
        config, length = self.config, self.prompt_tokens + answer
        sequences = max(1, min(config.generation_batch_size, config.max_tokens_per_generation_batch // length))
        if config.vllm_mode == "server":
            return {}, sequences
        token = kv_bytes_per_token(self.model_config, weights_dtype(self.model_config, config))
        cache = plan_kv_cache(token, length, sequences, sys.maxsize, BLOCK["cuda"])
        # Adapters come merged.
        merged = self.weights.parameters - (self.weights.trained if config.use_peft else 0)
        return {"vLLM's weights": merged * self.itemsize, "vLLM's KV cache": cache.bytes}, sequences

    def sampling(self, states: list[tuple[int, int]], sequences: int) -> dict[str, float]:
        """The KV cache in the largest of `states`, rows and columns, and the logits of one token of each sequence.

        While a layer works, its cache exists twice, since it grows by copying, and once more with a key and value head
        for each query head, which masked attention needs.
        """
        text, config = self.text, self.config
        heads = text.num_attention_heads
        token = 2 * self.head_dim() * self.itemsize
        wide = max(rows * max(self.cached(width)) for rows, width in states)
        logits = sequences * text.vocab_size
        if self.continuous:
            sampled = min(logits, max(CHUNK_LOGITS, text.vocab_size)) * SAMPLED_BYTES
        else:
            filters = config.top_p < 1 or config.top_k > 0 or config.min_p
            sampled = logits * (4 * LOGIT_COPIES + (SORTED_BYTES if filters else 0))
        keys = self.key_heads()
        return {
            "KV cache": token * keys * max(rows * sum(self.cached(width)) for rows, width in states),
            "KV cache of a layer, copied": token * wide * (keys / 2 + (heads if heads > keys else 0)),
            "logits of a token": logits * self.itemsize + sampled,
        }

    def prompts(self, setup: Setup, answer: int) -> float:
        """What computing prompts takes: their cache and one forward.

        A sequence that gave way under the budget comes back as a prompt of nearly its full length.
        """
        config, longest = self.config, self.prompt_tokens + answer
        room = config.max_tokens_per_generation_batch // max(config.generation_batch_size, config.num_generations_eval)
        alone = longest if longest > room else self.prompt_tokens
        tokens = max(min(PREFILL_TOKENS, config.prompts_per_step * self.prompt_tokens), alone)
        at_once = replace(
            setup, tokens=min(tokens, PREFILL_TOKENS), predicted=1, gathered=1.0, masked=0, training=False
        )  # fmt: skip
        cache = 2 * self.head_dim() * self.itemsize * self.key_heads() * tokens * self.text.num_hidden_layers
        return cache + sum(self.tracer.trace(at_once).peak.values())

    def cached(self, width: int) -> list[int]:
        """Columns that each layer keeps of `width`."""
        types = getattr(self.text, "layer_types", None) or ["full_attention"] * self.text.num_hidden_layers
        window = getattr(self.text, "sliding_window", None) or width
        return [min(window, width) if kind == "sliding_attention" else width for kind in types]

    def key_heads(self) -> int:
        return getattr(self.text, "num_key_value_heads", None) or self.text.num_attention_heads

    def head_dim(self) -> int:
        return getattr(self.text, "head_dim", None) or self.text.hidden_size // self.text.num_attention_heads

    def longest(self, vram: int, shortest: int = 0) -> int:
        """The longest answer, in tokens, with which the plan fits: 0 where none does, at most the model's positions."""
        positions = getattr(self.text, "max_position_embeddings", None) or LENGTHS[-1]
        low, high = shortest, max(positions - self.prompt_tokens, 0)
        if high <= low:
            return high
        if self.plan(high, True).fits(vram):
            low = high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.plan(middle, True).fits(vram) else (low, middle)
        # Interpolated; what is returned fits by the plan itself.
        while low > shortest and not self.plan(low).fits(vram):
            low = max(low - max(low // 64, 1), shortest)
        return low


def longest_answer(config: GRPOConfig, tracer: Tracer, vram: int, prompt_tokens: int) -> int:
    """The longest answer that fits, in tokens; 0 where none does."""
    planner = _Planner(config, tracer, prompt_tokens)
    fits = planner.plan(config.max_completion_length).fits(vram)
    return planner.longest(vram, config.max_completion_length if fits else 0)
