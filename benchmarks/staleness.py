"""How much faster is training with `max_staleness`, for given times of sampling and training?

    python -m benchmarks.staleness [--train_seconds 10,30,90] [--max_staleness 0,1,2,4,8] [--token_seconds 0.02]

A simulation with its own clock: it uses the trainer's queue (`GroupQueue`) and lengths of parts, while sampling and
training take the given times instead of being computed. Measure those times in a run of your own: `step_time`
without sampling is `train_seconds`. Lengths are log-normal, cut off at the longest. Writes ``staleness.csv`` and
``staleness.png``; the speedup is that over `max_staleness` 0.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
import random
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.harness.measure import main
from grpo_fast.errors import UserError, writing
from grpo_fast.report.curves import new_panels, save_figure
from grpo_fast.rollout import Response
from grpo_fast.rollout.asynchronous import part_lengths
from grpo_fast.rollout.queue import Answer, GroupQueue

SEED = 0


@dataclass(frozen=True)
class Times:
    """Seconds: of the arithmetic and updates of a batch, of a weight sync, of a decoding step, of each row in it, and
    of each token of the answers that are computed again after a sync."""

    train: float
    sync: float
    token: float
    row: float
    prefill: float


@dataclass(frozen=True)
class Batch:
    """Prompts of a batch, answers to each, and the lengths of the answers in tokens."""

    prompts: int
    num_generations: int
    median: int
    sigma: float
    longest: int


@dataclass
class Outcome:
    """Of a simulated run: means over its batches, and how long sampler and trainer were busy."""

    seconds_per_batch: float
    mean_staleness: float
    max_staleness: int
    sampler_busy: float
    trainer_busy: float


class Clock:
    """Plays a run with two actors, the sampler and the trainer, each with the time at which it is free."""

    def __init__(self, times: Times, batch: Batch, max_staleness: int, batches: int):
        self.times, self.batch, self.batches = times, batch, batches
        prompts = ((row, [0]) for row in itertools.count())
        self.queue = GroupQueue(prompts, batch.num_generations, max_staleness, batch.prompts, batches)
        self.part, last = part_lengths(batch.longest)
        self.before_last = batch.longest - last
        self.lengths = random.Random(SEED)
        # By answer: how long it will be, and when its last part was done.
        self.wanted: dict[int, int] = {}
        self.done: dict[int, float] = {}
        self.sampler = self.trainer = self.sampling = 0.0
        self.synced = False

    def length(self, answer: Answer) -> int:
        """The tokens of an answer; the same ones for every `max_staleness`, as answers begin in the same order."""
        if id(answer) not in self.wanted:
            drawn = self.batch.median * math.exp(self.lengths.gauss(0, self.batch.sigma))
            self.wanted[id(answer)] = min(max(round(drawn), 1), self.batch.longest)
        return self.wanted[id(answer)]

    def sample_part(self) -> None:
        """Sample a part of every open answer, which begins when the sampler is free."""
        answers, times = self.queue.open(), self.times
        most = {
            answer: self.part if len(answer.tokens) < self.before_last else self.batch.longest for answer in answers
        }
        counts = {each: min(self.length(each) - len(each.tokens), most[each]) for each in answers}
        seconds, before = 0.0, 0
        for place, count in enumerate(sorted(counts.values())):
            seconds += (count - before) * (times.token + times.row * (len(counts) - place))
            before = count
        if self.synced:
            seconds += times.prefill * sum(len(answer.tokens) for answer in answers)
            self.synced = False
        self.sampler += seconds
        self.sampling += seconds
        for answer, count in counts.items():
            answer.add(Response([0] * count, "length", [0.0] * count), self.queue.version)
            if len(answer.tokens) == self.length(answer):
                answer.end("stop")
                self.done[id(answer)] = self.sampler

    def run(self) -> Outcome:
        ages: list[int] = []
        for _ in range(self.batches):
            while (groups := self.queue.take(self.batch.prompts)) is None:
                self.sample_part()
            answers = [answer for group in groups for answer in group.answers]
            ready = max(self.done.pop(id(answer)) for answer in answers)
            self.trainer = max(self.trainer, ready) + self.times.train
            ages += [self.queue.version - version for answer in answers for version in answer.versions]
            for answer in answers:
                del self.wanted[id(answer)]
            while self.sampler < self.trainer and self.queue.open():
                self.sample_part()
            # The sync waits for the part that is being sampled.
            self.trainer = self.sampler = max(self.sampler, self.trainer) + self.times.sync
            self.queue.synced()
            self.synced = True
        return Outcome(
            self.trainer / self.batches, sum(ages) / len(ages), max(ages), self.sampling / self.trainer,
            self.batches * self.times.train / self.trainer,
        )  # fmt: skip


def simulate(times: Times, batch: Batch, max_staleness: int, batches: int) -> Outcome:
    """A run of so many batches."""
    return Clock(times, batch, max_staleness, batches).run()


def draw(rows: list[dict[str, float]], path: Path) -> None:
    """Speedup and mean staleness over `max_staleness`, a line for each time of training."""
    figure, axes = new_panels(1, 2, (10, 3.6), sharex=True)
    for train in dict.fromkeys(row["train_seconds"] for row in rows):
        chosen = [row for row in rows if row["train_seconds"] == train]
        for axis, name in zip(axes.flat, ("speedup", "mean_staleness"), strict=True):
            label = f"training {train:g} s, sampling {chosen[0]['sampling_seconds']:.0f} s"
            axis.plot([r["max_staleness"] for r in chosen], [r[name] for r in chosen], "o-", label=label)
            axis.set_xlabel("max_staleness")
            axis.set_title(name.replace("_", " "), loc="left", fontsize=11)
    axes.flat[0].legend(fontsize=8)
    save_figure(figure, path)


def numbers(option: str, text: str, kind: type) -> list:
    try:
        values = [kind(value) for value in text.split(",")]
    except ValueError:
        values = [-1]
    if min(values) < 0:
        raise UserError(f"--{option}={text!r} is not allowed: it must be numbers from 0 on, with commas")
    return values


def body() -> None:
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    made.add_argument("--train_seconds", default="10,30,90", help="to train on a batch, with commas")
    made.add_argument("--max_staleness", default="0,1,2,4,8", help="values of the field, with commas")
    made.add_argument("--sync_seconds", default="2", help="to pass the weights on")
    made.add_argument("--token_seconds", default="0.02", help="of a decoding step, however many rows it has")
    made.add_argument("--row_seconds", default="2e-5", help="more for each row in it")
    made.add_argument("--prefill_seconds", default="5e-6", help="for each token that is computed again after a sync")
    made.add_argument("--prompts", default="32", help="of a batch")
    made.add_argument("--num_generations", default="8", help="answers to each")
    made.add_argument("--median", default="600", help="tokens of an answer")
    made.add_argument("--sigma", default="0.8", help="of the logarithm of the lengths")
    made.add_argument("--longest", default="4096", help="max_completion_length")
    made.add_argument("--batches", default="20", help="of the simulated run")
    made.add_argument("--output", type=Path, default=Path("runs/benchmarks"), help="folder of the results")
    chosen = vars(made.parse_args())
    kinds = dict.fromkeys(("prompts", "num_generations", "median", "longest", "batches", "max_staleness"), int)
    values = {name: numbers(name, text, kinds.get(name, float)) for name, text in chosen.items() if name != "output"}
    one = {name: found[0] for name, found in values.items()}
    for name in ("prompts", "num_generations", "median", "longest", "batches"):
        if one[name] < 1:
            raise UserError(f"--{name}={one[name]} is not allowed: it must be at least 1")
    batch = Batch(one["prompts"], one["num_generations"], one["median"], one["sigma"], one["longest"])
    rows = []
    for train in values["train_seconds"]:
        times = Times(train, *(one[f"{name}_seconds"] for name in ("sync", "token", "row", "prefill")))
        base = simulate(times, batch, 0, one["batches"])
        sampling = base.seconds_per_batch - train - times.sync
        for bound in values["max_staleness"]:
            outcome = simulate(times, batch, bound, one["batches"])
            speedup = base.seconds_per_batch / outcome.seconds_per_batch
            rows.append(
                {
                    "train_seconds": train, "sampling_seconds": sampling, **asdict(outcome), "max_staleness": bound,
                    "oldest_token": outcome.max_staleness, "speedup": speedup,
                }
            )  # fmt: skip
            print(
                f"training {train:g} s, sampling {sampling:.0f} s, max_staleness {bound}: "
                f"{outcome.seconds_per_batch:.1f} s a batch, {speedup:.2f}x, tokens {outcome.mean_staleness:.2f} old",
                flush=True,
            )
    path = chosen["output"] / "staleness.csv"
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    draw(rows, path.with_suffix(".png"))
    print(f"{path} and {path.with_suffix('.png')}")


if __name__ == "__main__":
    main(body)
