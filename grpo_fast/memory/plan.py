"""The memory that a run needs, planned before it starts: bytes by part, for training and for sampling.

    plan = plan_memory(config, model_config)
    plan.training, plan.rollout     the parts at the fullest moment of each
    plan.fits(24 << 30)

Four modules share the subject. This one adds up the plan: parameters are counted on the model, built without storage;
the head, the optimizer and the KV cache follow from their shapes. `trace` measures activations by running the model on
tensors without data. `switches` finds the settings that save memory. `report` prints all of it (``grpo-fast plan``).

While the run samples, the weights and the optimizer's state stay on the device; gradients and activations are gone.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from grpo_fast.config import GRPOConfig
from grpo_fast.errors import UserError
from grpo_fast.memory.trace import Setup, Traced, Tracer, weights_dtype
from grpo_fast.model.attention import Group
from grpo_fast.model.host_layers import ALIGNMENT, MIN_BYTES, SLOTS, spread
from grpo_fast.rollout.decode import CHUNK_LOGITS, PREFILL_TOKENS, STEP_LOGITS
from grpo_fast.rollout.transformers import not_continuous
from grpo_fast.rollout.vllm.kv_plan import padded_rank, plan_engine_cache, sequences_at_once
from grpo_kernels.budget import (
    CPU_BUFFER_BYTES,
    FROZEN_GPU_BUFFER_BYTES,
    GPU_BUFFER_BYTES,
    NARROW_COPIES,
    cpu_block_bytes,
    equal_parts,
    most_rows,
)

GIB = 1 << 30
# Left free (assumed, not measured): the CUDA context with its libraries, and gaps between the allocator's blocks.
CONTEXT_BYTES = GIB
FRAGMENTATION = 0.05
# Elements that share a scale: 4-bit weights, the scales themselves if they are quantised, 8-bit moments.
BLOCK_4BIT, BLOCK_SCALES, BLOCK_8BIT = 64, 256, 256
# Below this size a moment is not quantised.
LEAST_8BIT = 4096
# With activation offloading, layers whose inputs are on the device: one in use, one being copied.
LAYERS_IN_FLIGHT = 2
# Bytes for each logit while a token is sampled: float32 logits, filtered logits, log-probabilities and probabilities,
# and float64 cumulative probabilities. Filters that sort need no more (values, int64 indices, cumulative sums).
SAMPLED_BYTES = 24
# transformers' own loop samples all rows at once: float32 copies, and the bytes that a sorting filter adds.
LOGIT_COPIES, SORTED_BYTES = 3, 16
# Fields that change what `count_weights` counts.
COUNTED = ("dtype", "use_peft", "lora_r", "load_in_4bit", "use_bnb_nested_quant", "optim", "optim_offload")
# Lengths at which activations are traced to find the longest answer; others are interpolated, or extrapolated up to the
# longest answer that is searched.
LENGTHS = [1024, 4096, 16_384, 65_536]
LONGEST = 1 << 20


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of a run by part.

    Attributes:
        moments: the parts at each moment that can be the fullest: ``head``, ``backward``, ``reference`` (scoring by a
            reference copy, if there is one) and ``rollout``.
        host: the parts in host memory.
        parameters: number of weights, without adapters.
        trained: number of trained weights, adapters included.
        tokens: positions in one microbatch.
        sequences: most completions that are sampled at once.
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
    """Bytes of a `vram`-byte device that a plan may fill."""
    return int((1 - FRAGMENTATION) * vram) - CONTEXT_BYTES


@dataclass(frozen=True)
class Weights:
    """Numbers of parameters (`parameters`, `trained`), and bytes of what belongs to them.

    `layers` are the bytes of each decoder layer that can wait in host memory.
    """

    parameters: int
    trained: int
    bytes: int
    adapters: int
    gradients: int
    optimizer: int
    head_trained: bool
    largest_4bit: int
    layers: tuple[int, ...]


def count_weights(model: nn.Module, config: GRPOConfig) -> Weights:
    """Count the parameters of a model, which may be on the meta device; tied parameters count once.

    Raises:
        UserError: the model's output head is not linear.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise UserError(f"{type(model).__name__} has no linear output head, but {type(head).__name__}")
    named = dict(model.named_parameters())
    adapters = [p for name, p in named.items() if "lora_" in name]
    adapter_ids = set(map(id, adapters))
    own = [p for p in named.values() if id(p) not in adapter_ids]
    trained = [p for p in named.values() if p.requires_grad]
    quantised: dict[int, torch.Tensor] = {}
    if config.load_in_4bit:
        weights = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
        quantised = {id(w): w for w in weights if w is not head.weight and id(w) not in adapter_ids}

    def stored(parameter: torch.Tensor) -> int:
        return _bytes_4bit(parameter.numel(), config) if id(parameter) in quantised else parameter.nbytes

    def packed(parameter: torch.Tensor) -> int:
        """Without the scales of 4-bit weights, which stay on the device."""
        return math.ceil(parameter.numel() / 2) if id(parameter) in quantised else parameter.nbytes

    waiting = []
    for layer in _decoder_layers(model):
        sizes = [packed(p) for p in layer.parameters() if not p.requires_grad and id(p) not in adapter_ids]
        waiting.append(sum(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes if size >= MIN_BYTES))
    return Weights(
        parameters=sum(p.numel() for p in own),
        trained=sum(p.numel() for p in trained),
        bytes=sum(map(stored, own)),
        adapters=sum(p.nbytes for p in adapters),
        gradients=sum(p.nbytes for p in trained),
        optimizer=sum(_optimizer_bytes(p.numel(), config) for p in trained),
        head_trained=head.weight.requires_grad,
        largest_4bit=max((w.nbytes for w in quantised.values()), default=0),
        layers=tuple(waiting),
    )


def _decoder_layers(model: nn.Module) -> Iterable[nn.Module]:
    count = model.config.get_text_config().num_hidden_layers
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == count)
    return next(lists, ())


def sends_adapters(model: nn.Module) -> bool:
    """Whether vLLM takes the adapters of `model` without the weights."""
    if not hasattr(model, "peft_config"):
        return False
    from grpo_fast.rollout.vllm import adapters

    return adapters.merge_reason(model) is None


def _bytes_4bit(count: int, config: GRPOConfig) -> int:
    blocks = math.ceil(count / BLOCK_4BIT)
    scales = blocks + 4 * math.ceil(blocks / BLOCK_SCALES) if config.use_bnb_nested_quant else 4 * blocks
    return math.ceil(count / 2) + scales


def _optimizer_bytes(count: int, config: GRPOConfig) -> int:
    """Two moments: float32, or 8 bits with one float32 scale a block; in host memory also float32 weights."""
    if config.optim_offload:
        return 12 * count
    indivisible = config.optim == "adamw_torch_8bit" and count % BLOCK_8BIT
    if config.optim == "adamw_torch_fused" or count < LEAST_8BIT or indivisible:
        return 8 * count
    return 2 * (count + 4 * math.ceil(count / BLOCK_8BIT))


def plan_memory(
    config: GRPOConfig,
    model_config: Any,
    prompt_tokens: int = 512,
    tracer: Tracer | None = None,
    interpolated: bool = False,
) -> MemoryPlan:
    """Plan the memory of a run whose completions all have `max_completion_length` tokens.

    Args:
        config: the run.
        model_config: the model's transformers configuration.
        prompt_tokens: length of the longest prompt.
        tracer: reuses the traces of earlier plans for the same model.
        interpolated: trace only a few lengths, which serve all plans with the same settings: faster, an upper bound.

    Raises:
        UserError: the model cannot be built or traced.
    """
    planner = _Planner(config, tracer or Tracer(model_config), prompt_tokens)
    return planner.plan(config.max_completion_length, interpolated)


def longest_answer(config: GRPOConfig, tracer: Tracer, vram: int, prompt_tokens: int) -> int:
    """The longest completion, in tokens, with which the run fits `vram` bytes; 0 if none does."""
    planner = _Planner(config, tracer, prompt_tokens)
    fits = planner.plan(config.max_completion_length).fits(vram)
    return planner.longest(vram, config.max_completion_length if fits else 0)


class _Planner:
    """Plans one configuration for completions of any length; lengths are in tokens, results in bytes."""

    def __init__(self, config: GRPOConfig, tracer: Tracer, prompt_tokens: int):
        self.config, self.tracer, self.prompt_tokens = config, tracer, prompt_tokens
        self.text = tracer.model_config.get_text_config()
        self.dtype = weights_dtype(tracer.model_config, config)
        key = tuple(getattr(config, name) for name in COUNTED), tuple(config.lora_target_modules or ())
        if key not in tracer.counted:
            model = tracer.model(config)
            tracer.counted[key] = count_weights(model, config), not_continuous(model) is None, sends_adapters(model)
        self.weights, self.continuous, self.alone = tracer.counted[key]

    def plan(self, answer: int, interpolated: bool = False) -> MemoryPlan:
        """The plan for completions of `answer` tokens; interpolated traces are faster, and an upper bound."""
        config, weights = self.config, self.weights
        tokens = max(config.max_tokens_per_microbatch, self.prompt_tokens + answer)
        setup, trace = self.setup(tokens, answer), self.between if interpolated else self.tracer.trace
        traced = trace(setup)
        fixed = {"weights": weights.bytes, "adapters": weights.adapters, "unpacked 4-bit layer": weights.largest_4bit}
        host = {}
        if config.layers_on_host:
            layers = spread(weights.layers, config.layers_on_host)
            host["frozen layers"] = sum(layers)
            fixed["weights"] -= sum(layers)
            fixed["slots for layers"] = SLOTS * max(layers, default=0)
        offloads = config.optim_offload or config.optim == "paged_adamw_8bit"
        (host if offloads else fixed)["optimizer state"] = weights.optimizer
        training = {**fixed, "gradients": weights.gradients}
        workspace = self.head_workspace(setup.predicted)
        copy = {"16-bit copy of the head": self.head_copy()}
        moments = {
            "head": {**training, **copy, **self.named(traced.head, tokens, host), "head workspace": workspace},
            "backward": {**training, **copy, **self.named(traced.peak, tokens, host)},
        }
        if config.uses_reference and not config.use_peft:
            host["reference"] = weights.bytes
            scored = {"reference": weights.bytes, **copy, "head workspace": workspace}
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
            sampling = self.sampling(states, sequences)
            moments["rollout"] = {**fixed, **sampling}
            if self.continuous:
                # The rows that join have their place in the cache only when they are computed.
                joining = {**fixed, "KV cache": sampling["KV cache"], "prompts": self.prompts(setup, answer)}
                moments["rollout"] = max(moments["rollout"], joining, key=total)
        moments = {name: {part: int(n) for part, n in parts.items() if n >= 1} for name, parts in moments.items()}
        return MemoryPlan(
            moments, {part: int(n) for part, n in host.items()}, weights.parameters, weights.trained, tokens, sequences
        )

    def setup(self, tokens: int, answer: int) -> Setup:
        """The microbatch to trace: whole completions, which share their prompt when rows are packed."""
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
        """A trace interpolated between two of `LENGTHS`: an upper bound, because peaks are convex in the length.

        Beyond the last length it is extrapolated. A peak is the largest of several sums that grow linearly, and the one
        that is largest there stays the largest.
        """
        high = next((length for length in LENGTHS[1:] if length >= setup.tokens), LENGTHS[-1])
        low = LENGTHS[LENGTHS.index(high) - 1]
        ends = [self.tracer.trace(replace(setup, tokens=t, predicted=t, gathered=1.0, masked=0)) for t in (low, high)]
        return ends[0].mixed(ends[1], (setup.tokens - low) / (high - low))

    def named(self, traced: dict[str, float], tokens: int, host: dict[str, int] | None = None) -> dict[str, float]:
        """The parts of a trace under the plan's names; the layer inputs that checkpointing keeps are a part."""
        parts = dict(traced)
        boundaries = 0
        if self.config.gradient_checkpointing and host is not None:
            layer = tokens * self.text.hidden_size * self.dtype.itemsize
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
        """The logits of one chunk and its narrow copies, at most the buffer budget and what `predicted` rows need.

        On a GPU, 16-bit heads have 16-bit logits, and the head takes more than its default budget only from memory that
        is free, so that is not part of the plan. On a CPU, the entropies need two copies of a block of rows.
        """
        config, weights = self.config, self.weights
        on_gpu = GPU_BUFFER_BYTES if weights.head_trained else FROZEN_GPU_BUFFER_BYTES
        budget = config.max_buffer_bytes or (CPU_BUFFER_BYTES if config.use_cpu else on_gpu)
        half = not config.use_cpu and (config.bf16 or self.dtype.itemsize == 2)
        vocab = self.text.vocab_size
        row = vocab * (2 if half else 4) + NARROW_COPIES * self.text.hidden_size * 4
        if not config.use_cpu:
            return row * most_rows(predicted, budget // row)
        block = cpu_block_bytes(budget)
        rows = equal_parts(predicted, (budget - 2 * block) // row)
        copies = 2 * 4 * vocab * equal_parts(rows, block // (4 * vocab))
        if rows >= predicted and weights.head_trained:
            # One chunk: the copies are gone before the weight's gradient is allocated.
            copies = max(copies - 4 * vocab * self.text.hidden_size, 0)
        return row * rows + copies

    def head_copy(self) -> int:
        """What a GPU multiplies by under autocast in place of a float32 head; it is kept for the whole step."""
        copies = self.config.bf16 and not self.config.use_cpu and self.dtype.itemsize == 4
        return 2 * self.text.vocab_size * self.text.hidden_size if copies else 0

    def padded(self, answer: int) -> tuple[int, int]:
        """Rows and columns of a batch of `generate`: as many whole groups as the token budget holds, at least one."""
        config, tokens = self.config, self.prompt_tokens + answer
        kinds = (
            (config.num_generations, config.prompts_per_step),
            (config.num_generations_eval, config.max_eval_samples or sys.maxsize),
        )
        budget = config.max_tokens_per_generation_batch
        return max(min(max(budget // (size * tokens), 1), prompts) * size for size, prompts in kinds), tokens

    def sampled(self, answer: int) -> list[tuple[int, int]]:
        """Rows and columns of the decoder's cache in the two states that can be largest.

        Either all rows are in the cache, as wide as the budget allows, or the rows have their full width and the
        budget limits their number. With sliding windows the first can be larger.
        """
        config, budget, longest = self.config, self.config.max_tokens_per_generation_batch, self.prompt_tokens + answer
        evaluation = (config.max_eval_samples or math.inf) * config.num_generations_eval
        most = int(min(max(config.generation_batch_size, evaluation), max(STEP_LOGITS // self.text.vocab_size, 1)))
        fullest = min(max(budget // most, self.prompt_tokens), longest)
        return [(max(min(most, budget // width), 1), width) for width in (fullest, longest)]

    def engine(self, answer: int) -> tuple[dict[str, int], int]:
        """Weights and KV cache of vLLM in this process (nothing for a server), and the sequences it samples at once.

        With less memory vLLM samples fewer sequences at once. Its workspace is not counted.
        """
        config, length = self.config, self.prompt_tokens + answer
        if config.vllm_mode == "server":
            return {}, sequences_at_once(config, length)
        cache = plan_engine_cache(config, self.tracer.model_config, self.dtype, "cuda", length, sys.maxsize)
        parts = {"vLLM's weights": self.weights.parameters * self.dtype.itemsize, "vLLM's KV cache": cache.bytes}
        if self.alone:
            rank = padded_rank(config.lora_r)
            parts["vLLM's adapters"] = self.weights.trained * rank // config.lora_r * self.dtype.itemsize
            if not config.load_in_4bit:
                # They are the trainer's.
                del parts["vLLM's weights"]
        return parts, cache.sequences

    def sampling(self, states: list[tuple[int, int]], sequences: int) -> dict[str, float]:
        """The KV cache in the largest of `states` (rows, columns), and the logits of one token of each sequence.

        A layer's cache exists twice while rows join, and its keys or its values do while it grows. Masked attention
        adds a copy with as many key and value heads as query heads.
        """
        config, vocab, (queries, keys, kv_bytes) = self.config, self.text.vocab_size, self.heads()
        wide = max(rows * max(self.cached(width)) for rows, width in states)
        logits = sequences * vocab
        if self.continuous:
            sampled = min(logits, max(CHUNK_LOGITS, vocab)) * SAMPLED_BYTES
        else:
            filters = config.top_p < 1 or config.top_k > 0 or config.min_p
            sampled = logits * (4 * LOGIT_COPIES + (SORTED_BYTES if filters else 0))
        repeated = queries if queries > keys else 0
        return {
            "KV cache": kv_bytes * keys * max(rows * sum(self.cached(width)) for rows, width in states),
            "KV cache of a layer, copied": kv_bytes * wide * max(keys, keys / 2 + repeated),
            "logits of a token": logits * self.dtype.itemsize + sampled,
        }

    def prompts(self, setup: Setup, answer: int) -> float:
        """Memory while prompts are computed, beyond the KV cache: one forward with its masks and a layer's copies.

        A sequence that the budget evicted is computed again like a prompt, of nearly full length.
        """
        config, longest = self.config, self.prompt_tokens + answer
        room = config.max_tokens_per_generation_batch // max(config.generation_batch_size, config.num_generations_eval)
        alone = longest if longest > room else self.prompt_tokens
        tokens = max(min(PREFILL_TOKENS, config.prompts_per_step * self.prompt_tokens), alone)
        part = min(tokens, PREFILL_TOKENS)
        forward = Setup(setup.config, setup.layers, part, 1, training=False)
        queries, keys, kv_bytes = self.heads()
        # A single sequence in a single part is attended without a mask.
        mask = part * alone if tokens > min(alone, PREFILL_TOKENS) else 0
        repeated = kv_bytes * queries * tokens if mask and queries > keys else 0
        # Layers with a sliding window keep the columns of the last part.
        beyond = sum(min(width + PREFILL_TOKENS, tokens) - width for width in self.cached(tokens))
        attended = max(kv_bytes * keys * tokens / 2, mask * self.dtype.itemsize + repeated)
        traced = dict(self.tracer.trace(forward).peak)
        within_a_layer = max(traced.pop("mlp", 0) + traced.pop("attention", 0), attended)
        return kv_bytes * keys * beyond + mask + within_a_layer + sum(traced.values())

    def heads(self) -> tuple[int, int, int]:
        """The numbers of query heads and of key heads, and the bytes of one key and one value of a head."""
        queries = self.text.num_attention_heads
        dim = getattr(self.text, "head_dim", None) or self.text.hidden_size // queries
        return queries, getattr(self.text, "num_key_value_heads", None) or queries, 2 * dim * self.dtype.itemsize

    def cached(self, width: int) -> list[int]:
        """Columns that each layer's cache keeps of `width`."""
        types = getattr(self.text, "layer_types", None) or ["full_attention"] * self.text.num_hidden_layers
        window = getattr(self.text, "sliding_window", None) or width
        return [min(window, width) if kind == "sliding_attention" else width for kind in types]

    def longest(self, vram: int, shortest: int = 0) -> int:
        """The longest completion that fits, at most the model's positions; `shortest` (0 or one that fits) if none."""
        positions = getattr(self.text, "max_position_embeddings", None) or LONGEST
        low, high = shortest, max(positions - self.prompt_tokens, 0)
        if high <= low:
            return high
        if self.plan(high, True).fits(vram):
            low = high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.plan(middle, True).fits(vram) else (low, middle)
        # The search interpolated traces; the length that is returned fits by its exact plan.
        while low > shortest and not self.plan(low).fits(vram):
            low = max(low - max(low // 64, 1), shortest)
        return low
