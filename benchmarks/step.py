"""How long is a whole optimizer step without sampling, and how much memory does it take, next to TRL's GRPOTrainer?

    python -m benchmarks.step [--model smollm2-135m-instruct] [--equal 0,0.5,0.75]

Both trainers get the same model, prompts, settings and, instead of sampling, the same completions of mixed length (the
longest is 8 times the mean); rewards, advantages, batching, forward, backward, clipping and AdamW are each trainer's
own. A fraction of the groups has equal rewards and so no gradient. The gradients of the first step must agree before
anything is timed. Tokens per second count the real tokens, with the prompt counted once for each completion.
"""

from __future__ import annotations

import gc
import json
import math
import random
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.measure import Run, main, parser, peak_memory, release, require, start
from benchmarks.harness.steps import compare_steps
from benchmarks.harness.trainers import (
    PacedTRL,
    alone_in_accelerate,
    fixed_rollout,
    missing_trl,
    our_config,
    our_steps,
    quiet,
    trl_trainer,
)
from grpo_fast.errors import UserError

KEY = ("model", "dtype", "equal", "trainer")
OURS, TRL = "grpo-fast", "TRL"
SPREAD = 8
# The largest difference between the two gradients in the norm, by the dtype of the weights.
LIMITS = {"float32": 1e-3, "bfloat16": 0.1}
FIRST_TOKEN = 16
# Each is one token of SmolLM2's tokenizer, with or without a space before it.
WORDS = ["the", "of", "and", "to", "in", "is", "that", "it", "for", "was", "on", "are", "as", "with", "his", "they"]


@dataclass(frozen=True)
class Setting:
    """A model and the sizes of a step: prompts, completions per prompt, prompt tokens and mean completion tokens."""

    model: str
    dtype: str
    prompts: int
    group: int
    prompt_tokens: int
    mean_tokens: int
    rows_per_microbatch: int = 8

    @property
    def longest(self) -> int:
        return SPREAD * self.mean_tokens

    @property
    def samples(self) -> int:
        return self.prompts * self.group


# Llamas with random weights: two with SmolLM2's vocabulary, one of them with its width, and one like Qwen3-0.6B.
RANDOM = {
    "llama-tiny": {"vocab_size": 509, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
                   "num_attention_heads": 2, "num_key_value_heads": 2},
    "llama-16m": {"vocab_size": 49152, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4,
                  "num_attention_heads": 4, "num_key_value_heads": 4},
    "llama-45m": {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 4,
                  "num_attention_heads": 9, "num_key_value_heads": 3},
    "llama-0.6b": {"vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
                   "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128},
}  # fmt: skip


def setting_for(run: Run, model: str | None) -> Setting:
    if run.quick:
        return Setting(model or "llama-tiny", "float32", 4, 4, 8, 4)
    if run.device.type == "cpu":
        if model == "smollm2-135m-instruct":
            return Setting(model, "float32", 4, 8, 32, 8)
        return Setting(model or "llama-16m", "float32", 8, 8, 32, 16)
    return Setting(model or "llama-0.6b", "bfloat16", 8, 8, 256, 512)


def build_model(setting: Setting, folder: Path) -> tuple[str, int]:
    """A model's name for `load_model`, and its vocabulary size. A random model is written to `folder`, with a tokenizer
    of the words ``t0 t1 ...``."""
    if setting.model not in RANDOM:
        if setting.model != "smollm2-135m-instruct":
            known = ", ".join(["smollm2-135m-instruct", *RANDOM])
            raise UserError(f"--model={setting.model!r} is unknown; use one of {known}")
        return setting.model, 49152
    transformers = require("transformers", "'grpo-fast[train]'")
    tokenizers = require("tokenizers", "'grpo-fast[train]'")
    fields = RANDOM[setting.model]
    vocabulary = {f"t{index}": index for index in range(fields["vocab_size"])}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="t0"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, pad_token="t0", eos_token="t1")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **fields, max_position_embeddings=8192, tie_word_embeddings=True, pad_token_id=0, bos_token_id=None,
        eos_token_id=1,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).to(getattr(torch, setting.dtype))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder), fields["vocab_size"]


def mixed_lengths(count: int, mean: int, seed: int = 0) -> list[int]:
    """`count` lengths of about the given mean: the longest `SPREAD` times the mean, the others exponential."""
    others = [-math.log(1 - (index + 0.5) / (count - 1)) for index in range(count - 1)]
    scale = max(count * mean - SPREAD * mean, count) / sum(others)
    lengths = [max(1, min(round(scale * value), SPREAD * mean)) for value in others] + [SPREAD * mean]
    random.Random(seed).shuffle(lengths)
    return lengths


def make_prompts(setting: Setting, seed: int = 1) -> list[str]:
    """Distinct prompts of words that are one token each."""
    words = [f"t{index}" for index in range(FIRST_TOKEN, 500)] if setting.model in RANDOM else WORDS
    generator = random.Random(seed)
    return [" ".join(generator.choice(words) for _ in range(setting.prompt_tokens)) for _ in range(setting.prompts)]


def make_rollouts(setting: Setting, vocab: int, equal: float, seed: int = 0) -> list[list[list[int]]]:
    """Completions ``[prompts][group]`` of token ids. The reward is the parity of the first id, which is the same in
    each of the first `equal` share of the groups and alternates in the others."""
    generator = random.Random(seed)
    lengths = iter(mixed_lengths(setting.samples, setting.mean_tokens, seed))
    rollouts = []
    for prompt in range(setting.prompts):
        group = []
        for place in range(setting.group):
            ids = [generator.randrange(FIRST_TOKEN, vocab) for _ in range(next(lengths))]
            parity = 0 if prompt < round(equal * setting.prompts) else place % 2
            ids[0] = FIRST_TOKEN + 2 * generator.randrange((vocab - FIRST_TOKEN) // 2 - 1) + parity
            group.append(ids)
        rollouts.append(group)
    return rollouts


def parity_reward(prompts: list, completions: list, completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """1 where the completion's first token id is odd, else 0."""
    return [float(ids[0] % 2) for ids in completion_ids]


class FixedRollout:
    """Replaces our sampling with fixed completions of each prompt."""

    copies_weights = separate = False

    def __init__(self, by_prompt: dict[tuple[int, ...], list[list[int]]]):
        self.by_prompt = by_prompt

    def sleep(self) -> None:
        """Does nothing: there is no engine."""

    wake = sleep

    def take_figures(self) -> dict[str, float]:
        return {}

    def generate(self, prompt_ids: list[list[int]], sampling: Any) -> list[Any]:
        from grpo_fast.rollout import Response

        return [Response(ids, "length") for prompt in prompt_ids for ids in self.by_prompt[tuple(prompt)]]


def copy_gradients(named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Gradients by parameter name, on the CPU."""
    return {name: p.grad.detach().float().cpu() for name, p in named if p.grad is not None}


def gradient_difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """``|ours - theirs| / |theirs|`` over all parameters; infinite if their names differ."""
    if ours.keys() != theirs.keys():
        return math.inf
    difference = sum((ours[name] - theirs[name]).square().sum().item() for name in ours)
    return math.sqrt(difference / max(sum(value.square().sum().item() for value in theirs.values()), 1e-30))


class OurSteps:
    """Our trainer with the fixed completions."""

    def __init__(self, config: Any, rollouts: list[list[list[int]]], device: torch.device):
        from grpo_fast.trainer import GRPOTrainer

        trainer = GRPOTrainer(config)
        prompts = [tuple(ids) for ids in trainer.train_prompts]
        trainer.rollout.engine = FixedRollout(dict(zip(prompts, rollouts, strict=True)))
        self.prompt_tokens = [len(prompt) for prompt in prompts]
        self.gradients: dict[str, Tensor] | None = None

        def keep(*_: Any) -> None:
            if self.gradients is None:
                self.gradients = copy_gradients(trainer.model.named_parameters())

        trainer.learner.optimizer.optimizer.register_step_pre_hook(keep)
        self._steps = our_steps(trainer, device)

    def step(self) -> float:
        with alone_in_accelerate():
            return next(self._steps)[0]

    def stop(self) -> None:
        self._steps = None


class TRLSteps:
    """TRL's trainer with the fixed completions."""

    def __init__(
        self, config: Any, folder: Path, rows: list[dict], rollouts: list[list[list[int]]], setting: Setting,
        device: torch.device,
    ):  # fmt: skip
        by_prompt = {row["prompt"]: group for row, group in zip(rows, rollouts, strict=True)}
        self.gradients: dict[str, Tensor] | None = None

        def keep(named: Iterable[tuple[str, Tensor]]) -> None:
            if self.gradients is None:
                self.gradients = copy_gradients(named)

        rollout = fixed_rollout(by_prompt)
        trainer = trl_trainer(config, folder, rows, parity_reward, setting.rows_per_microbatch, rollout)
        paced = PacedTRL(trainer, device, keep)
        self.step, self.stop = paced.step, paced.stop


def measure_fraction(run: Run, setting: Setting, name: str, vocab: int, equal: float, folder: Path) -> None:
    """Measure one fraction of groups with equal rewards and write its rows."""
    device = run.device
    rollouts = make_rollouts(setting, vocab, equal)
    rows = [{"prompt": prompt} for prompt in make_prompts(setting)]
    data = folder / "prompts.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    repeats = run.repeats or (2 if run.quick or run.minutes else 3)
    width = setting.prompt_tokens + setting.longest
    config = our_config(
        device, folder / "ours", model_name_or_path=name, dtype=setting.dtype, dataset_name=str(data),
        eval_dataset_name=str(data), shuffle_dataset=False, reward_funcs=["benchmarks.step.parity_reward"],
        num_generations=setting.group, generation_batch_size=setting.samples, max_completion_length=setting.longest,
        max_tokens_per_microbatch=setting.rows_per_microbatch * width, learning_rate=1e-6,
        lr_scheduler_type="constant", max_steps=repeats + 1,
    )  # fmt: skip
    trainers: dict[str, Any] = {OURS: OurSteps(config, rollouts, device)}
    steps: dict[str, Any] = {OURS: partial(measured_step, trainers[OURS], device), TRL: missing_trl()}
    if steps[TRL] is None:
        trainers[TRL] = TRLSteps(config, folder / "trl", rows, rollouts, setting, device)
        steps[TRL] = partial(measured_step, trainers[TRL], device)
    lengths = trainers[OURS].prompt_tokens
    columns = {
        "model": setting.model, "dtype": setting.dtype, "equal": equal, "prompts": setting.prompts,
        "group": setting.group, "prompt_tokens": max(lengths), "mean_tokens": setting.mean_tokens,
        "longest_tokens": setting.longest, "padded_tokens": setting.samples * width,
        "tokens": sum(prompt + len(ids) for prompt, group in zip(lengths, rollouts, strict=True) for ids in group),
    }  # fmt: skip

    def difference() -> float:
        return gradient_difference(trainers[OURS].gradients, trainers[TRL].gradients)

    try:
        compare_steps(run.table("step", KEY), columns, steps, difference, LIMITS[setting.dtype], repeats, TRL)
    finally:
        for trainer in trainers.values():
            trainer.stop()


def measured_step(trainer: Any, device: torch.device) -> tuple[float, float]:
    """Seconds and peak bytes of one step."""
    with peak_memory(device) as peak:
        seconds = trainer.step()
    return seconds, peak.bytes


def run_step(run: Run, equal: list[float], model: str | None = None) -> None:
    setting = setting_for(run, model)
    quiet()
    print(
        f"step: {setting.model}, {setting.prompts} prompts x {setting.group}, completions of {setting.mean_tokens} "
        f"tokens on average, at most {setting.longest}",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model_name, vocab = build_model(setting, folder / "model")
        for number, fraction in enumerate(equal):
            if run.out_of_time(f"step: equal {fraction}"):
                continue
            print(f"  {fraction:.0%} equal rewards", flush=True)
            (folder / str(number)).mkdir()
            measure_fraction(run, setting, model_name, vocab, fraction, folder / str(number))
            gc.collect()
            release(run.device)


def body() -> None:
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--model", help=f"smollm2-135m-instruct, {', '.join(RANDOM)} (default: by the device)")
    arguments.add_argument("--equal", default="0,0.5,0.75", help="fractions of groups with equal rewards")
    chosen = arguments.parse_args()
    run = start(chosen)
    try:
        equal = [float(value) for value in chosen.equal.split(",")]
    except ValueError:
        raise UserError(f"--equal={chosen.equal!r} is not a list of fractions") from None
    for value in equal:
        if not 0 <= value < 1:
            raise UserError(f"--equal: {value} is not allowed: it must be at least 0 and below 1")
    run_step(run, equal, chosen.model)


if __name__ == "__main__":
    main(body)
