"""What a head costs on a GPU that is not at hand: flops, bytes and predicted time, from the code's own steps.

    python -m grpo_kernels.doctor --head 4096,151936 --tokens 16384

The real passes run on tensors without memory. Every product, elementwise operation and kernel launch is noted with its
operands, so the figures change when the code does. Bytes are those of all the operands of a step, each counted once,
as if a cache held what a step reads twice. The rates of a GPU are assumptions until they are measured.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from grpo_kernels._checks import require
from grpo_kernels._head_arguments import make_pass
from grpo_kernels.gpus import GPU, GPUS
from grpo_kernels.linear_logprob import _LinearLogprob
from grpo_kernels.linear_policy_loss import _LinearPolicyLoss
from grpo_kernels.objective import PRESETS
from grpo_kernels.policy_loss import make_token_loss

# case -> products of N x H x V multiplications in it
CASES = {"trainable": 3, "frozen": 2, "scoring": 1}

# What each kernel writes; it reads its other tensors, and those in UPDATED as well. An unknown kernel counts as reading
# and writing all of them.
WRITTEN = {
    "head_forward": {"partials", "out", "tile_maximum"},
    "row_statistics": {"partials", "out", "tile_maximum"},
    "combine_splits": {"statistics"},
    "head_gradient": {"e"},
    "policy_tokens": {"grad_logprobs", "sums"},
    "scale_unless_one": set(),
    "adamw_step": {"weight", "exp_avg", "exp_avg_sq"},
}
UPDATED = {("head_gradient", "e"), *(("adamw_step", name) for name in ("weight", "exp_avg", "exp_avg_sq"))}
# The incoming gradient of a loss is 1, and then the kernel touches nothing else.
UNTOUCHED = {("scale_unless_one", "values")}
DEVICE = torch.device("cuda", 0)
# Tiles that cuBLAS computes at a time, one on each multiprocessor.
PRODUCT_TILE = 128, 256


@dataclass(frozen=True)
class Step:
    """One product, elementwise operation or kernel launch.

    Attributes:
        part: what the step is for: "forward", "gradient", "hidden's gradient", "weight's gradient" or "other".
        flops: of products alone.
        read, written: bytes.
        scale: the time of its products over that of ideal ones, since tiles and rounds of programs are not full.
        shapes: of the operands, for comparisons.
    """

    name: str
    part: str
    flops: int
    read: int
    written: int
    scale: float = 1.0
    shapes: tuple[Any, ...] = ()

    def seconds(self, gpu: GPU) -> float:
        """Predicted: products, then their results; operands arrive while others are multiplied."""
        if not self.flops:
            return gpu.launch + (self.read + self.written) / gpu.bandwidth
        if self.name == "head_forward":
            return max(self.flops * self.scale / gpu.forward, (self.read + self.written) / gpu.bandwidth)
        results = self.written * (2 if self.name.startswith("addmm") else 1)
        return self.flops * self.scale / gpu.products + results / gpu.bandwidth


@dataclass(frozen=True)
class Cost:
    """The steps of one forward and backward of a head, and how often the host waits for the GPU in it."""

    case: str
    tokens: int
    hidden: int
    vocabulary: int
    steps: tuple[Step, ...]
    host_waits: int

    @property
    def flops(self) -> int:
        return sum(step.flops for step in self.steps)

    @property
    def engine(self) -> str:
        """The engine of the forward pass."""
        return "products" if any(step.name == "row_statistics" for step in self.steps) else "fused"

    @property
    def bytes(self) -> int:
        return sum(step.read + step.written for step in self.steps)

    def floor(self, gpu: GPU) -> float:
        """Seconds of the bare products at cuBLAS's rate."""
        return CASES[self.case] * 2 * self.tokens * self.hidden * self.vocabulary / gpu.products

    def seconds(self, gpu: GPU) -> float:
        return sum(step.seconds(gpu) for step in self.steps)

    def parts(self, gpu: GPU) -> dict[str, tuple[float, int, float]]:
        """part -> (flops, bytes, seconds), in the order of the first step of each."""
        sums: dict[str, list[float]] = defaultdict(lambda: [0, 0, 0.0])
        for step in self.steps:
            for index, value in enumerate((step.flops, step.read + step.written, step.seconds(gpu))):
                sums[step.part][index] += value
        return {part: (flops, int(size), seconds) for part, (flops, size, seconds) in sums.items()}


def head_cost(
    case: str,
    tokens: int,
    hidden: int,
    vocabulary: int,
    gpu: GPU,
    max_buffer_bytes: int | None = None,
    engine: str | None = None,
) -> Cost:
    """Note the steps of a bfloat16 head: the token-level policy loss with its backward, or scoring.

    Args:
        case: "trainable", "frozen" (the weight) or "scoring".
        tokens, hidden, vocabulary: N, H and V.
        max_buffer_bytes: as in `linear_policy_loss`.
        engine: "fused" or "products", as in `triton_kernels.engines`; None for the one that is predicted to be faster.

    Raises:
        ValueError: an unknown case or engine, or a size below 1.
    """
    require(case in CASES, f"head_cost: case must be one of {', '.join(CASES)}, got {case!r}")
    require(min(tokens, hidden, vocabulary) > 0, "head_cost: tokens, hidden and vocabulary must be at least 1")
    from grpo_kernels.triton_kernels.engines import ENGINES
    from grpo_kernels.triton_kernels.launch import PlannedGPU, planning

    known = engine is None or engine in ENGINES
    require(known, f"head_cost: engine must be one of {', '.join(ENGINES)}, or None, got {engine!r}")
    planned = PlannedGPU(gpu.architecture, gpu.processors, rates=gpu, engine=engine)
    pretended = _PretendedGPU(tokens, gpu)
    with planning(planned), pretended:
        given = inputs(tokens, hidden, vocabulary, DEVICE)
        with Recorder(planned.record):
            run_head(case, given, max_buffer_bytes)
    sizes = hidden, vocabulary
    return Cost(case, tokens, hidden, vocabulary, tuple(steps(planned.record, sizes, gpu.processors)), pretended.waits)


def inputs(tokens: int, hidden: int, vocabulary: int, device: torch.device) -> tuple[Tensor, ...]:
    """Hidden states, weight, targets, advantages and token weights."""
    generator = torch.Generator(device.type).manual_seed(0) if device.type == "cpu" else None
    rows = torch.randn(tokens, hidden, dtype=torch.bfloat16, device=device, generator=generator)
    weight = torch.randn(vocabulary, hidden, dtype=torch.bfloat16, device=device, generator=generator)
    targets = torch.zeros(tokens, dtype=torch.int64, device=device)
    return rows, weight, targets, *(torch.ones(tokens, device=device) for _ in range(2))


@torch.no_grad()
def run_head(case: str, given: tuple[Tensor, ...], max_buffer_bytes: int | None = None) -> None:
    """The forward and backward whose steps are noted. Autograd is left out: it has no nodes for a device not there."""
    rows, weight, targets, advantages, weights = given
    # The default byte budget depends on it.
    weight.requires_grad_(case == "trainable")
    _, call = make_pass(
        "head_cost", rows, weight, targets, bias=None, temperature=1.0, logit_scale=1.0, softcap=None,
        max_buffer_bytes=max_buffer_bytes, process_group=None, with_entropy=False, backend="triton",
    )  # fmt: skip
    call = replace(call, needs=(case != "scoring", case == "trainable", False))
    context: Any = SimpleNamespace(
        set_materialize_grads=lambda value: None,
        mark_non_differentiable=lambda *tensors: None,
        save_for_backward=lambda *tensors: None,
    )
    if case == "scoring":
        _LinearLogprob.forward(context, rows, weight, None, call)
        return
    loss = make_token_loss(
        "head_cost", targets.shape, rows.device, call.head.dtype, PRESETS["dapo"], "triton", advantages=advantages,
        weights=weights, old_logprobs=None, ref_logprobs=None, correction=None, cu_seqlens=None,
    )  # fmt: skip
    _LinearPolicyLoss.forward(context, rows, weight, None, call, loss, False)
    _LinearPolicyLoss.backward(context, torch.ones((), device=rows.device))


class _PretendedGPU(TorchFunctionMode):
    """Tensors without memory (torch's "meta") that say they are on a GPU.

    Their addresses are aligned, and where the host reads numbers of tokens, every one of `tokens` is active. torch.cuda
    answers for the GPU.
    """

    def __init__(self, tokens: int, gpu: GPU):
        super().__init__()
        self.tokens, self.waits = tokens, 0
        nothing = lambda device=None: 0  # noqa: E731
        self.answers = {
            "get_device_properties": lambda device=None: SimpleNamespace(multi_processor_count=gpu.processors),
            "mem_get_info": lambda device=None: (gpu.free, gpu.free),
            "memory_reserved": nothing,
            "memory_allocated": nothing,
        }

    def __enter__(self):
        self._swap_answers()
        return super().__enter__()

    def __exit__(self, *error):
        self._swap_answers()
        return super().__exit__(*error)

    def _swap_answers(self):
        for name, answer in self.answers.items():
            self.answers[name] = getattr(torch.cuda, name)
            setattr(torch.cuda, name, answer)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func == torch.Tensor.device.__get__:
            return DEVICE
        if func in (torch.Tensor.is_meta.__get__, torch.Tensor.is_cuda.__get__):
            return func == torch.Tensor.is_cuda.__get__
        if func is torch.Tensor.data_ptr:
            return 0
        if func is torch.Tensor.tolist:
            self.waits += 1
            return [self.tokens, *[0] * (args[0].numel() - 1)]
        if func is torch.Tensor.item:
            self.waits += 1
            return 1
        if kwargs.get("device") is not None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


class Recorder(TorchDispatchMode):
    """Notes every operation of torch that touches memory, as (operation, arguments, results).

    With `shapes_alone` the tensors have no memory.
    """

    def __init__(self, record: list[Any], shapes_alone: bool = True):
        super().__init__()
        self.record, self.shapes_alone = record, shapes_alone

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # torch 2.11 knows no shapes of addmm with out_dtype; a result that is given needs none.
        known = (kwargs or {}).get("out") if self.shapes_alone else None
        out = func(*args, **(kwargs or {})) if known is None else known
        name = func._schema.name
        if not func.is_view and not name.startswith("aten::empty") and "aten::new_empty" not in name and _distinct(out):
            self.record.append((func, (*args, *(kwargs or {}).values()), out))
        return out


def _bytes(tensor: Tensor) -> int:
    """Of the elements that exist: an expanded dimension is one."""
    count = math.prod(size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or size == 0)
    return count * tensor.element_size()


def _key(tensor: Tensor) -> tuple[int, int, torch.Size]:
    return id(tensor.untyped_storage()), tensor.storage_offset(), tensor.shape


def _distinct(values: Any) -> dict[Any, Tensor]:
    return {_key(value): value for value in tree_leaves(values) if isinstance(value, Tensor)}


def steps(record: list[Any], head: tuple[int, int], processors: int) -> Iterator[Step]:
    """The steps of a record of launches and operations; `head` is (H, V)."""
    for entry in record:
        yield _operation(*entry, head, processors) if isinstance(entry, tuple) else launch_step(entry, processors)


def launch_step(launch: Any, processors: int) -> Step:
    arguments = {name: getattr(value, "base", value) for name, value in launch.arguments.items()}
    tensors = {name: value for name, value in arguments.items() if isinstance(value, Tensor)}
    written = WRITTEN.get(launch.kernel, set(tensors))
    read = {
        name
        for name in tensors
        if (launch.kernel, name) not in UNTOUCHED
        and (name not in written or (launch.kernel, name) in UPDATED or launch.kernel not in WRITTEN)
    }
    flops, scale, part = 0, 1.0, "other"
    if launch.kernel == "head_forward":
        part = "forward"
        rows, columns, depth = arguments["N"], arguments["V"], arguments["H"]
        flops = 2 * rows * columns * depth
        blocks = -(-rows // arguments["BLOCK_N"])
        rounds = -(-blocks * arguments["splits"] // processors) * arguments["tiles_per_split"]
        scale = rounds * processors * arguments["BLOCK_N"] * arguments["BLOCK_V"] / (rows * columns)
    elif launch.kernel in ("combine_splits", "row_statistics"):
        part = "forward"
    elif launch.kernel == "head_gradient":
        part = "gradient"
    shapes = tuple((name, tuple(tensor.shape), tensor.dtype) for name, tensor in sorted(tensors.items()))
    return Step(
        launch.kernel, part, flops, sum(_bytes(tensors[name]) for name in read),
        sum(_bytes(tensors[name]) for name in written if name in tensors), scale, shapes,
    )  # fmt: skip


def _operation(func: Any, arguments: tuple, out: Any, head: tuple[int, int], processors: int) -> Step:
    given, made = _distinct(arguments), _distinct(out)
    # An operation in place, or one with out=, returns its argument. A factory reads nothing.
    read = sum(_bytes(tensor) for key, tensor in given.items() if key not in made or func._schema.name.endswith("_"))
    written = sum(map(_bytes, made.values()))
    name = func._schema.name.removeprefix("aten::")
    flops, scale, part = 0, 1.0, "other"
    if name in ("mm", "addmm"):
        (a, b), (H, V) = [value for value in arguments if isinstance(value, Tensor)][name == "addmm" :][:2], head
        rows, columns = a.shape[0], b.shape[1]
        flops = 2 * rows * columns * a.shape[1]
        tiles = math.prod(-(-size // tile) for size, tile in zip((rows, columns), PRODUCT_TILE, strict=True))
        scale = -(-tiles // processors) * processors * math.prod(PRODUCT_TILE) / (rows * columns)
        part = "weight's gradient" if a.shape[1] != V and columns == H else "hidden's gradient"
        if a.shape[1] == H and b.stride(0) == 1:
            # Rows of the weight, transposed.
            part = "forward"
    elif any(tensor.shape[-1:] == head[:1] and tensor.dim() == 2 for tensor in made.values()):
        tall = any(tensor.shape[0] == head[1] for tensor in made.values())
        part = "weight's gradient" if tall else "hidden's gradient"
    shapes = tuple((tuple(tensor.shape), tensor.dtype) for tensor in (*given.values(), *made.values()))
    return Step(name, part, flops, read, written, scale, shapes)


def _waits(count: int) -> str:
    named = " (it reads which rows have a gradient; none with rows=, as in the trainer)" if count else ""
    return f"{count} host wait{'s' * (count != 1)}{named}"


def report(tokens: int, hidden: int, vocabulary: int, names: list[str], max_buffer_bytes: int | None = None) -> str:
    """Tables of predictions for the GPUs `names`: of each case, its parts and the bare products beside the whole."""
    from grpo_kernels.triton_kernels.engines import ENGINES

    lines = [
        f"Predicted, not measured: bfloat16 head, N={tokens} tokens, H={hidden}, V={vocabulary} (doctor --head).",
        "Assumed rates: "
        + "; ".join(
            f"{name.upper()} {gpu.products / 1e12:.0f} TFLOP/s products, {gpu.forward / 1e12:.0f} forward kernel, "
            f"{gpu.bandwidth / 1e12:.1f} TB/s"
            for name, gpu in ((name, GPUS[name]) for name in names)
        ),
    ]
    for case, products in CASES.items():
        both = {
            (name, engine): head_cost(case, tokens, hidden, vocabulary, GPUS[name], max_buffer_bytes, engine)
            for name in names
            for engine in ENGINES
        }
        costs = {name: head_cost(case, tokens, hidden, vocabulary, GPUS[name], max_buffer_bytes) for name in names}
        first = next(iter(costs.values()))
        chunks = Counter(step.name for step in first.steps)["combine_splits"]
        lines.append(f"\n{case} ({products}U), {chunks} chunk{'s' * (chunks > 1)}, {_waits(first.host_waits)}")
        if len({cost.engine for cost in costs.values()}) > 1:
            lines[-1] += f"; chunks and GB are those of the {names[0].upper()}"
        head = f"  {'':20} {'TFLOP':>8} {'GB':>8}" + "".join(f" {name.upper() + ' ms':>10}" for name in names)
        lines.append(head)
        parts = {name: cost.parts(GPUS[name]) for name, cost in costs.items()}
        for part, (flops, size, _) in parts[names[0]].items():
            times = "".join(f" {parts[name][part][2] * 1e3:10.2f}" for name in names)
            lines.append(f"  {part:20} {flops / 1e12:8.2f} {size / 1e9:8.2f}{times}")
        whole = "".join(f" {cost.seconds(GPUS[name]) * 1e3:10.2f}" for name, cost in costs.items())
        lines.append(f"  {'predicted':20} {first.flops / 1e12:8.2f} {first.bytes / 1e9:8.2f}{whole}")
        floors = "".join(f" {cost.floor(GPUS[name]) * 1e3:10.2f}" for name, cost in costs.items())
        lines.append(f"  {'bare products':20} {'':8} {'':8}{floors}")
        ratios = "".join(f" {cost.seconds(GPUS[name]) / cost.floor(GPUS[name]):9.2f}x" for name, cost in costs.items())
        lines.append(f"  {'ratio':20} {'':8} {'':8}{ratios}")
        lines.append(f"  {'forward by':38}" + "".join(f" {cost.engine:>10}" for cost in costs.values()))
        for engine in ENGINES:
            times = "".join(f" {both[name, engine].seconds(GPUS[name]) * 1e3:10.2f}" for name in names)
            lines.append(f"  {f'predicted with {engine}':38}{times}")
    return "\n".join(lines)
