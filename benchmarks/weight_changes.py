"""What share of its 16-bit weights does a step change, and how much does a run send to a vLLM server?

    python -m benchmarks.weight_changes [--model smollm2-135m-instruct] [--steps 6]

GRPO steps of our trainer with all weights in bfloat16, at the given learning rates. After each step, the changed values
are encoded as for a server, and decoding them must reproduce the weights bit for bit.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.measure import Run, main, parser, show_bytes, start
from benchmarks.harness.trainers import our_config, quiet
from grpo_fast.errors import UserError

KEY = ("model", "learning_rate", "optim")


def measure(run: Run, model: str, rate: float, optim: str, steps: int, folder: Path) -> dict[str, Any]:
    """The columns of one run; shares are of all values, and of the bytes of all weights.

    Raises:
        UserError: the decoded weights are not the trainer's, or a step changed none.
    """
    from grpo_fast.rollout.vllm.weights import engine_weights
    from grpo_fast.rollout.vllm.wire import apply_changes, changes
    from grpo_fast.trainer import GRPOTrainer

    small = model == "random-llama"
    config = our_config(
        run.device, folder / "run", model_name_or_path=model, dtype="bfloat16", optim=optim, learning_rate=rate,
        dataset_name="sort_digits" if small else "addition", reward_funcs=["benchmarks.step.parity_reward"],
        num_generations=4, generation_batch_size=8, max_completion_length=5 if small else 8, max_steps=steps,
        lr_scheduler_type="constant", warmup_steps=0, max_tokens_per_microbatch=2048, max_eval_samples=1,
        report_to=[],
    )  # fmt: skip
    trainer = GRPOTrainer(config)
    sent: dict[str, torch.Tensor] = {}
    received: dict[str, torch.Tensor] = {}
    changed, sizes, seconds = [], [], []
    try:
        for step in range(steps + 1):
            before = {name: tensor.clone() for name, tensor in sent.items()}
            begin = time.perf_counter()
            parts = list(changes(engine_weights(trainer.model), sent))
            seconds.append(time.perf_counter() - begin)
            apply_changes(parts, received)
            whole = dict(engine_weights(trainer.model))
            if not all(torch.equal(received[name], tensor) for name, tensor in whole.items()):
                raise UserError(f"step {step}: the decoded weights differ")
            if step:
                differ = sum(int((before[name] != tensor).sum()) for name, tensor in whole.items())
                changed.append(differ / sum(tensor.numel() for tensor in whole.values()))
                size = sum(tensor.nbytes for _, tensor in parts)
                sizes.append(size / sum(tensor.nbytes for tensor in whole.values()))
            if step == 0:
                steps_of = trainer.steps()
            if step < steps:
                next(steps_of)
    finally:
        trainer.rollout.close()
    return {
        "steps": len(changed), "parameters": sum(tensor.numel() for tensor in sent.values()),
        "changed_first": changed[0], "changed_median": statistics.median(changed), "changed_last": changed[-1],
        "sent_median": statistics.median(sizes), "encode_seconds": statistics.median(seconds[1:]),
    }  # fmt: skip


def body() -> None:
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--model", help="name or folder (default: smollm2-135m-instruct, or random-llama if quick)")
    arguments.add_argument("--rates", default="1e-6,1e-5", help="learning rates, with commas")
    arguments.add_argument("--optims", default="adamw_torch_fused", help="optimizers, with commas")
    arguments.add_argument("--steps", type=int, default=6)
    chosen = arguments.parse_args()
    run = start(chosen)
    quiet()
    model = chosen.model or ("random-llama" if run.quick else "smollm2-135m-instruct")
    table = run.table("weight_changes", KEY)
    for optim in chosen.optims.split(","):
        for rate in map(float, chosen.rates.split(",")):
            with tempfile.TemporaryDirectory() as name:
                row = measure(run, model, rate, optim, 2 if run.quick else chosen.steps, Path(name))
            changed, sent = f"{row['changed_median']:.3%} of values", f"{row['sent_median']:.1%}"
            whole = show_bytes(2 * row["parameters"])
            print(f"  {model:24}{optim:20}lr {rate:<8g}{changed}, {sent} of {whole} sent", flush=True)
            table.add({"model": model, "learning_rate": rate, "optim": optim, **row})


if __name__ == "__main__":
    main(body)
