"""The problem that every contender solves, hidden states and a head to GRPO loss and gradients, and its solution.

The logits are spread as in a language model (standard deviation 3, the target's about 18 above the mean), so that
16-bit logits are rounded as coarsely as in training. The loss is a clipped token-mean loss, with importance ratios far
from the clip bounds, so that rounding a log-probability does not change whether its token is clipped.

The true values are computed in float64 from the same (rounded) inputs: all log-probabilities, the loss, and a sample
of the gradients' rows, each of which depends on the whole vocabulary (hidden) or on all tokens (weight). This takes
1U = 2 N H V flops in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

EPSILON = 0.2
SEQUENCES = 8
SAMPLED_ROWS = 64
LOGIT_STD = 3.0
# Log-ratios of the policy to the sampling policy: two within the clip bounds and two outside.
LOG_RATIOS = (-0.6, -0.05, 0.05, 0.6)
MODES = ("trainable", "frozen", "scoring")
UNITS = {"trainable": 3, "frozen": 2, "scoring": 1}


@dataclass(frozen=True)
class Shape:
    """A head: its model, hidden size, vocabulary size and softcap."""

    model: str
    hidden: int
    vocab: int
    softcap: float | None = None


HEADS = {
    head.model: head
    for head in (
        Shape("smollm2-135m", 576, 49152),
        Shape("qwen3-0.6b", 1024, 151936),
        Shape("qwen3-1.7b", 2048, 151936),
        Shape("qwen3-4b", 2560, 151936),
        Shape("qwen3-8b", 4096, 151936),
        Shape("llama3-8b", 4096, 128256),
        Shape("gemma2-2b", 2304, 256000, softcap=30.0),
    )
}


@dataclass(frozen=True)
class Batch:
    """Flat per-token arguments ``[N]`` of the loss for `sequences` rows of equal length.

    ``advantages`` is ``[sequences]``; ``weights`` include the normaliser of the whole step of ``total`` tokens.
    """

    targets: Tensor
    advantages: Tensor
    weights: Tensor
    old_logprobs: Tensor | None
    sequences: int
    total: int
    softcap: float | None

    @property
    def token_advantages(self) -> Tensor:
        return self.advantages.repeat_interleave(self.targets.numel() // self.sequences)

    def part(self, index: int, count: int) -> tuple[slice, Batch]:
        """The rows of the `index`-th of `count` microbatches of whole sequences, and its batch."""
        length = self.targets.numel() // self.sequences
        first, last = index * self.sequences // count, (index + 1) * self.sequences // count
        rows = slice(first * length, last * length)
        old = None if self.old_logprobs is None else self.old_logprobs[rows]
        return rows, replace(
            self, targets=self.targets[rows], advantages=self.advantages[first:last], weights=self.weights[rows],
            old_logprobs=old, sequences=last - first,
        )  # fmt: skip


@dataclass(frozen=True)
class Problem:
    """``hidden [N, H]`` and ``weight [V, H]``, their batch, which gradients are needed, and the microbatches."""

    shape: Shape
    mode: str
    hidden: Tensor
    weight: Tensor
    batch: Batch
    microbatches: int = 1

    def parts(self) -> list[tuple[slice, Batch]]:
        """The rows and the batch of every microbatch."""
        return [self.batch.part(index, self.microbatches) for index in range(self.microbatches)]

    @property
    def tokens(self) -> int:
        return self.hidden.shape[0]

    @property
    def flops(self) -> float:
        """3U, 2U or 1U: the least that computes the requested gradients."""
        return UNITS[self.mode] * 2.0 * self.tokens * self.shape.hidden * self.shape.vocab

    @property
    def gradient_bytes(self) -> int:
        rows = {"trainable": self.tokens + self.shape.vocab, "frozen": self.tokens, "scoring": 0}[self.mode]
        return rows * self.shape.hidden * self.hidden.element_size()

    @property
    def gradient_formula(self) -> str:
        rows = {"trainable": "(N + V)", "frozen": "N", "scoring": "0"}[self.mode]
        return f"gradients {rows} H {self.hidden.element_size()}"

    def with_mode(self, mode: str) -> Problem:
        return replace(self, mode=mode)

    def columns(self) -> dict:
        return {
            "model": self.shape.model, "N": self.tokens, "H": self.shape.hidden, "V": self.shape.vocab,
            "dtype": str(self.hidden.dtype).removeprefix("torch."), "head": self.mode,
        }  # fmt: skip


@dataclass(frozen=True)
class Truth:
    """In float64: ``logprobs [N]``, the loss and its scale, and the gradients of sampled rows of hidden and weight."""

    logprobs: Tensor
    loss: Tensor
    scale: float
    rows: Tensor
    grad_hidden: Tensor
    columns: Tensor
    grad_weight: Tensor


def grpo_loss(logprobs: Tensor, batch: Batch) -> Tensor:
    """The clipped loss in plain PyTorch, for every contender that only computes log-probabilities."""
    advantages = batch.token_advantages
    ratio = torch.exp(logprobs - batch.old_logprobs)
    clipped = ratio.clamp(1 - EPSILON, 1 + EPSILON)
    return -(batch.weights * torch.minimum(ratio * advantages, clipped * advantages)).sum()


def make_problem(
    shape: Shape, tokens: int, dtype: torch.dtype, device: torch.device, mode: str
) -> tuple[Problem, Truth]:
    """A problem and its true values; the same arguments give the same problem."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    weight = normal(shape.vocab, shape.hidden).mul_(LOGIT_STD / math.sqrt(shape.hidden)).to(dtype)
    targets = torch.randint(shape.vocab, (tokens,), generator=generator, device=device)
    hidden = normal(tokens, shape.hidden)
    # |w|^2 is LOGIT_STD^2, so this raises the target's logit by 18.
    for rows in torch.arange(tokens, device=device).split(65536):
        hidden[rows] += 18.0 / LOGIT_STD**2 * weight[targets[rows]].float()
    hidden = hidden.to(dtype)
    sequences = math.gcd(tokens, SEQUENCES) if tokens < 65536 else tokens // 4096
    advantages = normal(sequences)
    batch = Batch(
        targets, advantages + advantages.sign() * 0.1, torch.full((tokens,), 1 / tokens, device=device), None,
        sequences, tokens, shape.softcap,
    )  # fmt: skip
    normalisers, logprobs = _logprobs(hidden, weight, targets, shape.softcap)
    choice = torch.randint(len(LOG_RATIOS), (tokens,), generator=generator, device=device)
    shifts = torch.tensor(LOG_RATIOS, device=device, dtype=torch.float64)[choice]
    batch = replace(batch, old_logprobs=(logprobs - shifts).float())
    problem = Problem(shape, mode, hidden, weight, batch)
    return problem, _truth(problem, normalisers, logprobs, generator)


def cap_logits(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _vocabulary_chunks(vocab: int, device: torch.device, rows: int) -> list[slice]:
    """Slices of the vocabulary whose float64 logits for `rows` tokens stay within 256 MiB (2 GiB on a GPU)."""
    budget = (2 << 30) if device.type == "cuda" else (256 << 20)
    width = max(min(budget // (8 * rows), vocab), 1)
    return [slice(start, min(start + width, vocab)) for start in range(0, vocab, width)]


def _logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None) -> tuple[Tensor, Tensor]:
    """Float64 log-sum-exps and log-probabilities ``[N]``."""
    tokens = hidden.shape[0]
    block = min(tokens, 16384)
    normalisers = hidden.new_full((tokens,), -math.inf, dtype=torch.float64)
    chosen = torch.empty_like(normalisers)
    for columns in _vocabulary_chunks(weight.shape[0], hidden.device, block):
        part = weight[columns].double()
        for start in range(0, tokens, block):
            rows = slice(start, start + block)
            logits = cap_logits(hidden[rows].double() @ part.T, softcap)
            normalisers[rows] = torch.logaddexp(normalisers[rows], logits.logsumexp(1))
            local = targets[rows] - columns.start
            here = (local >= 0) & (local < part.shape[0])
            picked = logits.gather(1, local.clamp(0, part.shape[0] - 1)[:, None]).squeeze(1)
            chosen[rows] = torch.where(here, picked, chosen[rows])
    return normalisers, chosen - normalisers


def _truth(problem: Problem, normalisers: Tensor, logprobs: Tensor, generator: torch.Generator) -> Truth:
    hidden, weight, batch = problem.hidden, problem.weight, problem.batch
    tokens, vocab = problem.tokens, problem.shape.vocab
    device, softcap = hidden.device, batch.softcap
    double = replace(
        batch, advantages=batch.advantages.double(), weights=batch.weights.double(),
        old_logprobs=batch.old_logprobs.double(),
    )  # fmt: skip
    leaf = logprobs.clone().requires_grad_()
    loss = grpo_loss(leaf, double)
    (coefficient,) = torch.autograd.grad(loss, leaf)

    def sample(size: int) -> Tensor:
        return torch.randperm(size, generator=generator, device=device)[:SAMPLED_ROWS]

    def grad_logits(logits: Tensor, rows: Tensor | slice, ids: Tensor) -> Tensor:
        """dL/dlogits (before the softcap) ``[rows, ids]``."""
        capped = cap_logits(logits, softcap)
        made = torch.exp(capped - normalisers[rows, None]).neg_()
        made += batch.targets[rows, None] == ids
        made *= coefficient[rows, None]
        return made if softcap is None else made * (1 - (capped / softcap).square())

    rows = sample(tokens)
    grad_hidden = torch.zeros(rows.numel(), problem.shape.hidden, dtype=torch.float64, device=device)
    for columns in _vocabulary_chunks(vocab, device, max(rows.numel(), 4096)):
        part = weight[columns].double()
        ids = torch.arange(columns.start, columns.stop, device=device)
        grad_hidden += grad_logits(hidden[rows].double() @ part.T, rows, ids) @ part
    # Half of the sampled vocabulary is among the targets.
    ids = torch.cat([batch.targets[rows[: SAMPLED_ROWS // 2]], sample(vocab)[: SAMPLED_ROWS // 2]]).unique()
    grad_weight = torch.zeros(ids.numel(), problem.shape.hidden, dtype=torch.float64, device=device)
    for start in range(0, tokens, 65536):
        span = slice(start, start + 65536)
        part = hidden[span].double()
        grad_weight += grad_logits(part @ weight[ids].double().T, span, ids).T @ part
    scale = (double.weights * double.token_advantages.abs()).sum().item()
    return Truth(logprobs, loss.detach(), scale, rows, grad_hidden, ids, grad_weight)


def norm_error(result: Tensor, truth: Tensor) -> float:
    """``|result - truth| / |truth|``."""
    return ((result.double() - truth).norm() / truth.norm()).item()


def errors(
    truth: Truth, loss: Tensor | None, logprobs: Tensor | None, grad_hidden: Tensor | None, grad_weight: Tensor | None
) -> dict[str, float]:
    """The errors of a contender's results: the loss's relative to ``sum |w A|``, the gradients' in the norm, and the
    largest and the median absolute error of the log-probabilities (nats)."""
    found: dict[str, float] = {}
    if loss is not None:
        found["error_loss"] = (loss.detach().double() - truth.loss).abs().item() / truth.scale
    if logprobs is not None:
        difference = (logprobs.detach().double().flatten() - truth.logprobs).abs()
        found["error_logprob"] = difference.max().item()
        found["error_logprob_median"] = difference.median().item()
    if grad_hidden is not None:
        found["error_hidden"] = norm_error(grad_hidden[truth.rows], truth.grad_hidden)
    if grad_weight is not None:
        found["error_weight"] = norm_error(grad_weight[truth.columns], truth.grad_weight)
    return found


# The largest errors of a correct contender. 16-bit logits near 20 have rounding errors of up to 0.06.
LIMITS = {
    torch.float32: {"error_loss": 1e-4, "error_logprob": 1e-3, "error_hidden": 1e-3, "error_weight": 1e-3},
    torch.float16: {"error_loss": 1e-2, "error_logprob": 0.1, "error_hidden": 0.05, "error_weight": 0.05},
    torch.bfloat16: {"error_loss": 2e-2, "error_logprob": 0.5, "error_hidden": 0.1, "error_weight": 0.1},
}


def verdict(found: dict[str, float], dtype: torch.dtype) -> str | None:
    """The first error that is too large, or None."""
    for name, limit in LIMITS[dtype].items():
        value = found.get(name, 0.0)
        if not value <= limit:
            return f"{name} is {value:.2g}, above {limit:g}"
    return None
