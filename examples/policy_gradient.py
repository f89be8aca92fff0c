"""Policy gradients from scratch: a tiny model sorts numbers, in a plain loop with the operations of `grpo_kernels`.

    python examples/policy_gradient.py [--seeds 3] [--output policy_gradient.png]

The task is that of Stanford's CS336 lecture on policy gradients: prompt and response are n numbers each. The model is
not autoregressive: it reads all numbers at once and writes each place of the response independently of the others. So
there is no sampler and no trainer here, only a loop: sample, reward, advantages, loss, step.

The figure compares two rewards, one that counts the right places (full) and one that also gives points for numbers in
the wrong place and for neighbours in order (partial); and the length bias of `grpo` and `dr_grpo` in a second toy task.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from grpo_fast.report.curves import new_panels, save_figure, smooth
from grpo_kernels import PRESETS, linear_policy_loss, token_weights

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = ("#1f6feb", "#cf222e")

NUMBERS, LENGTH, WIDTH = 8, 4, 32
PROMPTS, GROUP, EPOCHS = 16, 16, 150


class Sorter(nn.Module):
    """Reads n numbers, each with a matrix of its place, and writes n numbers, each through a matrix of its place.

    All places share one output head, tied to the embedding, so a response needs a single product with it.
    """

    def __init__(self, numbers: int = NUMBERS, length: int = LENGTH, width: int = WIDTH):
        super().__init__()
        self.embedding = nn.Parameter(torch.randn(numbers, width) / math.sqrt(width))
        self.read = nn.Parameter(torch.randn(length, width, width) / math.sqrt(width))
        self.write = nn.Parameter(torch.randn(length, width, width) / math.sqrt(width))

    def forward(self, prompts: Tensor) -> Tensor:
        """Hidden states ``[B, n, width]`` of the responses to ``prompts [B, n]``; `embedding` is their output head."""
        seen = torch.einsum("bnd,nde->be", self.embedding[prompts], self.read) / math.sqrt(prompts.shape[1])
        return torch.einsum("bd,nde->bne", torch.nn.functional.gelu(seen), self.write) * math.sqrt(self.write.shape[1])


def right_places(prompts: Tensor, responses: Tensor) -> Tensor:
    """The full reward: how many places hold the number that sorting puts there. ``[B]`` of ``[B, n]`` each."""
    return (responses == prompts.sort(-1).values).sum(-1).float()


def included_and_ordered(prompts: Tensor, responses: Tensor) -> Tensor:
    """The partial reward: how many of the prompt's numbers the response has, and how many neighbours are in order."""
    included = (prompts[..., :, None] == responses[..., None, :]).any(-1).sum(-1)
    ordered = (responses[..., 1:] >= responses[..., :-1]).sum(-1)
    return (included + ordered).float()


REWARDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"full": right_places, "partial": included_and_ordered}


class Epoch(NamedTuple):
    """What an epoch leaves: its mean reward, the share of completely sorted responses, and the loss."""

    reward: float
    sorted: float
    loss: float


def sample(model: Sorter, prompts: Tensor, generator: torch.Generator) -> Tensor:
    """``[B, n]`` responses to ``prompts [B, n]``, one number at each place independently."""
    with torch.no_grad():
        logits = model(prompts) @ model.embedding.T
    flat = torch.multinomial(logits.softmax(-1).flatten(0, 1), 1, generator=generator)
    return flat.view(prompts.shape)


def fused_loss(model: Sorter, prompts: Tensor, responses: Tensor, advantages: Tensor) -> Tensor:
    """The policy loss through the fused operation: no logits, whatever the number of tokens."""
    weights = token_weights(torch.ones_like(responses), "sequence_mean")
    result = linear_policy_loss(
        model(prompts), model.embedding, responses, advantages, weights, PRESETS["reinforce"]
    )  # fmt: skip
    return result.loss


def plain_loss(model: Sorter, prompts: Tensor, responses: Tensor, advantages: Tensor) -> Tensor:
    """The same from full logits."""
    logprobs = torch.log_softmax(model(prompts) @ model.embedding.T, -1).gather(-1, responses[..., None]).squeeze(-1)
    return -(advantages[:, None] * logprobs).mean(1).mean()


def train(
    reward: Callable[[Tensor, Tensor], Tensor],
    epochs: int = EPOCHS,
    seed: int = 0,
    loss_of: Callable[[Sorter, Tensor, Tensor, Tensor], Tensor] = fused_loss,
    steps_per_epoch: int = 1,
    learning_rate: float = 1e-2,
    dtype: torch.dtype = torch.float32,
) -> Iterator[Epoch]:
    """Train a new model on new prompts in each epoch, and yield what the epoch leaves.

    An epoch samples GROUP responses to each of PROMPTS prompts, centres and scales their rewards within each group, and
    takes `steps_per_epoch` steps of AdamW on them.
    """
    torch.manual_seed(seed)
    model, generator = Sorter().to(dtype), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    for _ in range(epochs):
        prompts = torch.randint(NUMBERS, (PROMPTS, LENGTH), generator=generator).repeat_interleave(GROUP, 0)
        responses = sample(model, prompts, generator)
        rewards = reward(prompts, responses)
        groups = rewards.view(PROMPTS, GROUP)
        advantages = ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-5)).flatten()
        for _ in range(steps_per_epoch):
            loss = loss_of(model, prompts, responses, advantages)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        is_sorted = (responses == prompts.sort(-1).values).all(-1).float().mean().item()
        yield Epoch(rewards.mean().item(), is_sorted, loss.item())


# The second task is autoregressive. An answer has been given, right or wrong by a coin, and the model knows which: a
# model often does know that it guesses. It then writes marks until it stops. They have no influence on the reward, so
# there is nothing to learn, and any change of the lengths comes from the objective.
MARKS, STOP, LONGEST = 8, 8, 24
BIAS_PROMPTS, BIAS_GROUP, BIAS_EPOCHS = 32, 8, 150


class Writer(nn.Module):
    """The next mark, or STOP, follows from the last mark and from whether the answer is right."""

    def __init__(self, width: int = WIDTH):
        super().__init__()
        self.answer, self.last = nn.Embedding(2, width), nn.Embedding(MARKS + 2, width)
        self.mix, self.head = nn.Linear(width, width), nn.Linear(width, MARKS + 1, bias=False)

    def forward(self, right: Tensor, last: Tensor) -> Tensor:
        """Hidden states ``[..., width]`` for the answers' ``right [...]`` and the last marks ``[...]``."""
        return torch.nn.functional.gelu(self.mix(self.answer(right.long()) + self.last(last)))


def write(model: Writer, right: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Marks ``[B, LONGEST]``, and which of them belong to the response: those up to and with the first STOP."""
    last, marks = torch.full(right.shape, MARKS + 1), []
    with torch.no_grad():
        for _ in range(LONGEST):
            logits = model(right, last) @ model.head.weight.T
            last = torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)
            marks.append(last)
    written = torch.stack(marks, 1)
    stops = (written == STOP).cumsum(1)
    return written, (stops == 0) | ((stops == 1) & (written == STOP))


def length_bias(loss_type: str, epochs: int = BIAS_EPOCHS, seed: int = 0) -> Iterator[tuple[float, float]]:
    """Train with an objective, and yield the mean lengths of an epoch's right and wrong responses.

    `grpo` divides each response's loss by its own length. Of two wrong responses the longer one is thus punished less
    at each token, and of two right ones the shorter one is praised more. `dr_grpo` divides all by the same number.
    """
    torch.manual_seed(seed)
    model, generator, objective = Writer(), torch.Generator().manual_seed(seed), PRESETS[loss_type]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    for _ in range(epochs):
        right = torch.rand(BIAS_PROMPTS * BIAS_GROUP, generator=generator) < 0.5
        marks, mask = write(model, right, generator)
        groups = right.float().view(BIAS_PROMPTS, BIAS_GROUP)
        advantages = groups - groups.mean(1, keepdim=True)
        if loss_type == "grpo":
            advantages = advantages / (groups.std(1, keepdim=True) + 1e-4)
        last = torch.cat([torch.full((len(marks), 1), MARKS + 1), marks[:, :-1]], 1)
        hidden = model(right[:, None].expand_as(marks), last)
        weights = token_weights(mask, objective.aggregation, constant_length=LONGEST)
        linear_policy_loss(hidden, model.head.weight, marks, advantages.flatten(), weights, objective).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        lengths = mask.sum(1).float()
        yield lengths[right].mean().item(), lengths[~right].mean().item()


def main(seeds: int = 3, output: str = "policy_gradient.png") -> dict[str, float]:
    """Run both experiments with several seeds, draw the figure, and return its last values, by the curve's name."""
    figure, axes = new_panels(1, 3, (13, 4))
    last = {}

    def draw(axis: Axes, name: str, runs: list[list[float]], color: str, style: str = "-") -> None:
        mean = torch.tensor(runs).mean(0).tolist()
        axis.plot(range(1, len(mean) + 1), smooth(mean), style, color=color, label=name)
        last[name] = sum(mean[-20:]) / 20
        print(f"{name}: {last[name]:.3f} (mean of the last 20 epochs, {seeds} seeds)")

    best = {"full": LENGTH, "partial": 2 * LENGTH - 1}
    for (name, reward), color in zip(REWARDS.items(), COLORS, strict=False):
        runs = [list(train(reward, seed=seed)) for seed in range(seeds)]
        draw(axes[0, 0], f"{name} reward", [[epoch.reward / best[name] for epoch in run] for run in runs], color)
        draw(axes[0, 1], f"sorted, {name} reward", [[epoch.sorted for epoch in run] for run in runs], color)
    for name, color in zip(("grpo", "dr_grpo"), COLORS, strict=False):
        runs = [list(length_bias(name, seed=seed)) for seed in range(seeds)]
        draw(axes[0, 2], f"{name}, right", [[right for right, _ in run] for run in runs], color)
        draw(axes[0, 2], f"{name}, wrong", [[wrong for _, wrong in run] for run in runs], color, "--")
    titles = ("reward, as a share of the highest", "completely sorted responses (share)", "length (tokens)")
    for axis, title in zip(axes.flat, titles, strict=True):
        axis.set_title(title, loc="left", fontsize=11)
        axis.set_xlabel("epoch")
        axis.legend(fontsize=8, frameon=False)
    save_figure(figure, Path(output))
    print(output)
    return last


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", default="policy_gradient.png")
    arguments = parser.parse_args()
    if arguments.seeds < 1:
        parser.error(f"--seeds={arguments.seeds} must be at least 1")
    if not arguments.output.endswith((".png", ".svg", ".pdf")):
        parser.error(f"--output={arguments.output} must end in .png, .svg or .pdf")
    main(**vars(arguments))
