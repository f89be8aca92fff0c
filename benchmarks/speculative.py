"""How much faster is sampling with `speculative_tokens`, on word problems with SmolLM2?

    python -m benchmarks.speculative [--groups 1x2,1x8] [--epochs 3] [--longest 96] [--temperature 1.0]

Both samplers use the same random numbers, so they sample the same tokens (up to rounding in float32); they run in turns
in one process. A group of ``2x8`` is 8 answers to each of 2 prompts. From the second epoch on, drafts also come from
the answers of earlier epochs. Reported are CPU seconds of the process, and wall-clock seconds, which other processes
disturb.
"""

from __future__ import annotations

import time
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.harness.measure import Run, main, parser, start
from benchmarks.harness.trainers import quiet
from grpo_fast.config import GRPOConfig
from grpo_fast.errors import UserError
from grpo_fast.rollout import Response, Sampling, TransformersRollout
from grpo_fast.rollout import transformers as engine
from grpo_fast.rollout.decode import Decoder
from grpo_fast.rollout.speculative import SpeculativeDecoder

KEY = ("model", "prompts", "num_generations", "longest_tokens", "temperature", "epoch", "speculative_tokens", "threads")
PLAIN, SPECULATIVE = "plain", "speculative"
PROBLEMS = (
    "A baker sells 12 loaves in the morning and twice as many in the afternoon. Each loaf costs $3. How many dollars "
    "does the baker earn in a day?",
    "Mia has 45 stickers. She gives 8 to each of her three friends and buys 10 more. How many stickers does she have?",
    "A train travels 60 miles an hour for 2 hours and then 45 miles an hour for 4 hours. How many miles is that?",
    "Tom reads 15 pages a day. His book has 240 pages, and he has read for 9 days. How many pages are left?",
)
INSTRUCTION = "\nThink step by step, and write the answer after ####."


class FixedDecoder(Decoder):
    """The plain decoder, at the random numbers of the speculative one."""

    uniforms, stream = SpeculativeDecoder.uniforms, SpeculativeDecoder.stream

    def __call__(self, *arguments: Any) -> list[Response]:
        self.streams, self.seed = {}, int(torch.randint(2**62, ()))
        return super().__call__(*arguments)


def measure(run: Run, groups: list[tuple[int, int]], epochs: int, longest: int, temperature: float, limit: int) -> None:
    """Measure each group, epoch by epoch, and write its rows."""
    from grpo_fast.model.loading import load_model

    config = GRPOConfig(model_name_or_path="smollm2-135m-instruct", use_cpu=run.device.type == "cpu")
    model, tokenizer = load_model(config)
    model.to(run.device).eval()
    encoded = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": problem + INSTRUCTION}], add_generation_prompt=True, return_dict=False
        )
        for problem in PROBLEMS
    ]
    table = run.table("speculative", KEY)
    for prompts, answers in groups:
        samplers = {
            PLAIN: TransformersRollout(model, tokenizer, 65536),
            SPECULATIVE: TransformersRollout(model, tokenizer, 65536, limit),
        }
        sampling = Sampling(answers, longest, temperature=temperature)
        for epoch in range(1, epochs + 1):
            if run.out_of_time(f"{prompts}x{answers}, epoch {epoch}"):
                return
            found, seconds, wall = {}, {}, {}
            for name in (PLAIN, SPECULATIVE) if epoch % 2 else (SPECULATIVE, PLAIN):
                torch.manual_seed(epoch)
                begun = time.process_time(), time.perf_counter()
                found[name] = samplers[name].generate(encoded[:prompts], sampling)
                seconds[name], wall[name] = time.process_time() - begun[0], time.perf_counter() - begun[1]
            tokens = sum(len(response.token_ids) for response in found[SPECULATIVE])
            same = [a.token_ids == b.token_ids for a, b in zip(*found.values(), strict=True)]
            figures = samplers[SPECULATIVE].take_figures()
            row = {
                "model": "smollm2-135m-instruct", "prompts": prompts, "num_generations": answers,
                "longest_tokens": longest, "temperature": temperature, "epoch": epoch, "speculative_tokens": limit,
                "threads": torch.get_num_threads(), "tokens": tokens, "same_answers": sum(same) / len(same),
                "plain_seconds": seconds[PLAIN], "speculative_seconds": seconds[SPECULATIVE],
                "plain_wall_seconds": wall[PLAIN], "speculative_wall_seconds": wall[SPECULATIVE],
                "speedup": seconds[PLAIN] / seconds[SPECULATIVE],
                "acceptance_rate": figures["speculative/acceptance_rate"],
                "tokens_per_step": figures["speculative/tokens_per_step"],
            }  # fmt: skip
            table.add(row)
            print(
                f"  {prompts}x{answers}, epoch {epoch}: {tokens} tokens, {row['speedup']:.2f}x, "
                f"{row['tokens_per_step']:.2f} tokens per row and step, {row['acceptance_rate']:.0%} accepted, "
                f"{row['same_answers']:.0%} of the answers the same",
                flush=True,
            )


def read_groups(text: str) -> list[tuple[int, int]]:
    try:
        groups = [tuple(map(int, part.split("x"))) for part in text.split(",")]
    except ValueError:
        groups = []
    if not groups or not all(len(g) == 2 and 1 <= g[0] <= len(PROBLEMS) and g[1] >= 1 for g in groups):
        raise UserError(
            f"--groups={text!r} is not allowed: it must be like 1x8,2x4, with at most {len(PROBLEMS)} prompts"
        )
    return groups


def body() -> None:
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--groups", default="1x1,1x2,1x4,1x8", help="prompts x answers to each, with commas")
    arguments.add_argument("--epochs", type=int, default=3, help="how often the prompts are sampled")
    arguments.add_argument("--longest", type=int, default=96, help="tokens of the longest answer")
    arguments.add_argument("--temperature", type=float, default=1.0)
    arguments.add_argument("--speculative_tokens", type=int, default=4)
    chosen = arguments.parse_args()
    groups = read_groups("1x2" if chosen.quick else chosen.groups)
    for name in ("epochs", "longest", "speculative_tokens"):
        if getattr(chosen, name) < 1:
            raise UserError(f"--{name}={getattr(chosen, name)} is not allowed: it must be at least 1")
    quiet()
    run = start(chosen)
    longest = min(chosen.longest, 16) if chosen.quick else chosen.longest
    with patch.object(engine, "Decoder", FixedDecoder):
        measure(run, groups, chosen.epochs, longest, chosen.temperature, chosen.speculative_tokens)


if __name__ == "__main__":
    main(body)
