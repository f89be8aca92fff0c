"""All benchmarks but the race on a CPU, in under 15 minutes.

    python -m benchmarks.cpu [--minutes 14] [--quick] [--parts head,step]

Each part has a share of the time and names what it leaves out. Without a limit, and with more cases and contenders,
run the part's own module: `python -m benchmarks.head`. The race takes longer than everything here together:
`python -m benchmarks.race`.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable

import torch

from benchmarks.accuracy import run_accuracy
from benchmarks.growth import run_growth
from benchmarks.harness.contenders import BY_NAME, CONTENDERS, OURS
from benchmarks.harness.measure import Run, main, parser, pick, start
from benchmarks.harness.problem import MODES
from benchmarks.head import KEY, cases_for, run_head
from benchmarks.loss import run_loss
from benchmarks.step import run_step
from grpo_fast.errors import UserError

MINUTES = 14.0
Part = tuple[str, float, Callable[[Run], None]]

# The contenders to compare at the large head, where a round of all would take minutes.
LARGE_HEAD = {
    (torch.float32, "trainable"): (OURS, "full logits"),
    (torch.float32, "frozen"): (OURS,),
    (torch.bfloat16, "trainable"): (OURS, "full logits", "Liger"),
}
SLOWEST = "torch linear_cross_entropy"


def head_first(run: Run) -> None:
    """The small head in all modes, with the slowest peer once, and the large one with LARGE_HEAD's contenders."""
    cases, table = cases_for(run), run.table("head", KEY)
    small = [case for case in cases if case.shape == cases[0].shape]
    large = [case for case in cases if case.shape != cases[0].shape]
    others = [contender for contender in CONTENDERS if contender.name != SLOWEST]
    for case in small:
        everyone = CONTENDERS if case.dtype == torch.float32 else others
        run_head(run, [case], MODES[:1], everyone, table, seconds=15, least=2)
        run_head(run, [case], MODES[1:], others, table, seconds=10)
    for case in large:
        for (dtype, mode), names in LARGE_HEAD.items():
            if dtype == case.dtype:
                run_head(run, [case], (mode,), [BY_NAME[name] for name in names], table, seconds=10, least=2)


def chosen_parts(parts: list[Part], names: str | None) -> list[Part]:
    """The parts in a comma-separated list, or all of them without one."""
    known = {part[0]: part for part in parts}
    return [known[name] for name in pick("parts", names, known)]


def run_parts(run: Run, parts: list[Part]) -> None:
    """Run every part within its share of the run's minutes; unused time goes to the later parts.

    A part that fails is reported, and the others still run.
    """
    total = sum(share for _, share, _ in parts)
    for number, (name, share, part) in enumerate(parts):
        rest = sum(share for _, share, _ in parts[number:])
        minutes = max(run.deadline.left, 0.0) / 60 * share / rest if run.minutes else share
        if run.out_of_time(name):
            continue
        begin = time.perf_counter()
        print(f"== {name}: {minutes:.1f} of {run.minutes or total:.1f} minutes", flush=True)
        try:
            part(run.share(minutes))
        except UserError as error:
            print(f"{name}: {error}", flush=True)
        except Exception:
            traceback.print_exc()
            torch.compiler.reset()
        print(f"== {name}: {time.perf_counter() - begin:.0f} s", flush=True)


def body() -> None:
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--parts", help="names with commas (default: all)")
    arguments.set_defaults(device="cpu", minutes=MINUTES)
    chosen = arguments.parse_args()
    run = start(chosen)
    parts: list[Part] = [
        ("head", 9.0, head_first),
        ("step", 2.0, lambda part: run_step(part, [0.0, 0.5])),
        ("accuracy", 1.0, lambda part: run_accuracy(part, seconds=10, least=2)),
        ("loss", 0.5, run_loss),
        ("growth", 2.0, lambda part: run_growth(part, seconds=2)),
    ]
    run_parts(run, chosen_parts(parts, chosen.parts))


if __name__ == "__main__":
    main(body)
