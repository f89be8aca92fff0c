"""How many tokens per second does sampling reach on responses of mixed length, compared with transformers?

    python -m benchmarks.rollout [--models llama-16m,smollm2-135m-instruct] [--longest 256]

The same model, prompts and filters for our rollout, one padded call of `generate`, `generate_batch`, which is
transformers' continuous batching, and, where it is installed, vLLM in this process. One token id in 64 ends a response,
after at least 8 tokens, so that the lengths are roughly geometric. Before anything is timed, log-probabilities of the
sampled tokens, ours and vLLM's, must agree with those from the model's full logits. Tokens per second count the tokens
of the responses; vLLM starts and gets the weights before.
"""

from __future__ import annotations

import importlib.util
import random
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.harness.measure import (
    Run,
    Times,
    describe_failure,
    main,
    parser,
    peak_memory,
    pick,
    release,
    seconds_of,
    show_bytes,
    start,
    version,
)
from benchmarks.harness.trainers import our_config, quiet
from benchmarks.step import FIRST_TOKEN, RANDOM, Setting, build_model
from grpo_fast.errors import UserError

KEY = ("model", "dtype", "sequences", "longest_tokens", "contender")
OURS, PADDED, CONTINUOUS, VLLM = "grpo-fast", "generate", "generate_batch", "vllm"
MODELS = [*RANDOM, "smollm2-135m-instruct"]
# One token id in ENDING ends a response, after at least SHORTEST tokens.
ENDING, SHORTEST = 64, 8
# The largest difference of a log-probability from that of the full logits, by the dtype of the weights.
LIMITS = {"float32": 1e-4, "bfloat16": 0.3}
PAGE = 32


@dataclass(frozen=True)
class Case:
    """A model, its prompts and how to sample them."""

    model: nn.Module
    tokenizer: Any
    prompts: list[list[int]]
    group: int
    longest: int
    ending: list[int]
    config: Any = None
    # vLLM's engine, once it has started.
    engines: dict[str, Any] = field(default_factory=dict)

    @property
    def filters(self) -> dict[str, Any]:
        return {"min_new_tokens": min(SHORTEST, self.longest - 1)}

    def generation_config(self, **others: Any) -> Any:
        from transformers import GenerationConfig

        return GenerationConfig(
            max_new_tokens=self.longest, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
            eos_token_id=self.ending, pad_token_id=self.tokenizer.pad_token_id, **self.filters, **others,
        )  # fmt: skip


def build_case(run: Run, name: str, folder: Path, longest: int) -> Case:
    """A case of 64 sequences; 32 for SmolLM2, which is slower, and 16 with --quick."""
    from grpo_fast.model.loading import load_model

    prompts, group = (4, 4) if run.quick else (4, 8) if name not in RANDOM else (8, 8)
    dtype = "float32" if run.device.type == "cpu" else "bfloat16"
    path, vocab = build_model(Setting(name, dtype, prompts, group, 32, longest), folder)
    config = our_config(
        run.device, folder / "run", model_name_or_path=path, dtype=dtype, dataset_name="sort_digits",
        reward_funcs=["exact_answer"], max_completion_length=longest, num_generations=group,
        generation_batch_size=prompts * group, use_vllm=True, vllm_enable_sleep_mode=False,
    )  # fmt: skip
    model, tokenizer = load_model(config)
    generator = random.Random(0)
    drawn = [[generator.randrange(FIRST_TOKEN, vocab) for _ in range(32)] for _ in range(prompts)]
    ending = [token for token in range(FIRST_TOKEN, vocab) if token % ENDING == 5]
    return Case(model.to(run.device).eval(), tokenizer, drawn, group, longest, ending, config)


def ours(case: Case) -> list[tuple[list[int], list[float]]]:
    """Tokens and log-probabilities of every response."""
    from grpo_fast.rollout import Sampling, TransformersRollout

    rollout = TransformersRollout(case.model, case.tokenizer, 65536)
    rollout.eos_token_ids = set(case.ending)
    sampling = Sampling(case.group, case.longest, generation_kwargs=case.filters)
    return [(response.token_ids, response.logprobs) for response in rollout.generate(case.prompts, sampling)]


def padded(case: Case) -> list[tuple[list[int], None]]:
    """One call of `generate` for all responses, which runs until the longest has ended."""
    ids = torch.tensor(case.prompts, device=case.model.device)
    output = case.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        generation_config=case.generation_config(num_return_sequences=case.group),
    )
    ending = set(case.ending)
    responses = []
    for tokens in output[:, ids.shape[1] :].tolist():
        stop = next((place for place, token in enumerate(tokens) if token in ending), len(tokens) - 1)
        responses.append((tokens[: stop + 1], None))
    return responses


def continuous(case: Case) -> list[tuple[list[int], list[float]]]:
    """`generate_batch`, with a cache for all responses at full length; it does not support `min_new_tokens`."""
    from transformers.generation import ContinuousBatchingConfig

    pages = -(-(len(case.prompts[0]) + case.longest) // PAGE) * len(case.prompts) * case.group
    config = case.generation_config(num_return_sequences=case.group)
    config.min_new_tokens = None
    outputs = case.model.generate_batch(
        case.prompts, generation_config=config, progress_bar=False,
        continuous_batching_config=ContinuousBatchingConfig(
            num_blocks=pages, page_size=PAGE, max_batch_tokens=512, return_logprobs=True
        ),
    )  # fmt: skip
    if not outputs:
        raise RuntimeError("generate_batch gave no outputs")
    return [(list(output.generated_tokens), list(output.logprobs)) for output in outputs.values()]


def vllm(case: Case) -> list[tuple[list[int], list[float]]]:
    """vLLM in this process, as the trainer uses it; the first call starts it."""
    from grpo_fast.rollout import Sampling, build_rollout

    if VLLM not in case.engines:
        # vLLM bars this token as well before the shortest length.
        case.model.config.eos_token_id = case.ending[0]
        engine = build_rollout(case.config, case.model, case.tokenizer, len(case.prompts[0]))
        case.engines[VLLM] = engine
        engine.eos_token_ids = set(case.ending)
        engine.sync(case.model)
    sampling = Sampling(case.group, case.longest, generation_kwargs=case.filters)
    return [(response.token_ids, response.logprobs) for response in case.engines[VLLM].generate(case.prompts, sampling)]


CONTENDERS: dict[str, Callable[[Case], list]] = {OURS: ours, PADDED: padded, CONTINUOUS: continuous, VLLM: vllm}


def present() -> list[str]:
    """The contenders that are installed."""
    return [name for name in CONTENDERS if name != VLLM or importlib.util.find_spec("vllm")]


@torch.no_grad()
def logprob_difference(case: Case, responses: list[tuple[list[int], list[float]]]) -> float:
    """The largest difference between the given log-probabilities and those of the model's full logits."""
    largest = 0.0
    prompts = [prompt for prompt in case.prompts for _ in range(case.group)]
    barred = torch.tensor(case.ending)
    for prompt, (tokens, logprobs) in zip(prompts, responses, strict=True):
        ids = torch.tensor([prompt + tokens[:-1]], device=case.model.device)
        logits: Tensor = case.model(input_ids=ids).logits[0, len(prompt) - 1 :].float().cpu()
        # No response may end earlier.
        logits[: case.filters["min_new_tokens"], barred] = -torch.inf
        expected = logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None]).squeeze(1)
        largest = max(largest, (expected - torch.tensor(logprobs)).abs().max().item())
    return largest


def measure_model(run: Run, name: str, case: Case, contenders: list[str]) -> None:
    """Measure one model and write its rows: all contenders in turn, with the same seeds."""
    dtype = str(case.model.dtype).removeprefix("torch.")
    status: dict[str, dict[str, str]] = {contender: {"status": "ok"} for contender in contenders}
    differences: dict[str, float] = {}
    for contender in {OURS, VLLM} & set(contenders):
        try:
            differences[contender] = logprob_difference(case, CONTENDERS[contender](case))
        except Exception as error:
            status[contender] = {"status": "failed", "detail": describe_failure(error)}
            continue
        if not differences[contender] <= LIMITS[dtype]:
            detail = f"log-probabilities differ by {differences[contender]:.2g}"
            status[contender] = {"status": "wrong", "detail": detail}
    rates = {contender: Times() for contender in contenders}
    times = {contender: Times() for contender in contenders}
    lengths: dict[str, list[int]] = {contender: [] for contender in contenders}
    peaks: dict[str, float] = {}
    repeats = run.repeats or (2 if run.quick else 3)
    for number in range(repeats):
        for contender in contenders if number % 2 == 0 else contenders[::-1]:
            if status[contender]["status"] != "ok" or (number and run.deadline.left <= 0):
                continue
            torch.manual_seed(number)
            sampled: list = []
            try:
                with peak_memory(run.device) as peak:
                    seconds = seconds_of(lambda: sampled.extend(CONTENDERS[contender](case)), run.device)  # noqa: B023
            except Exception as error:
                status[contender] = {"status": "failed", "detail": describe_failure(error)}
                release(run.device)
                continue
            drawn = [len(tokens) for tokens, _ in sampled]
            lengths[contender] += drawn
            times[contender].seconds.append(seconds)
            rates[contender].seconds.append(sum(drawn) / seconds)
            peaks[contender] = max(peaks.get(contender, 0.0), peak.bytes)
    table = run.table("rollout", KEY)
    for contender in contenders:
        row = {
            "model": name, "dtype": dtype, "sequences": len(case.prompts) * case.group,
            "longest_tokens": case.longest, "contender": contender, **status[contender],
            "prompt_tokens": len(case.prompts[0]), "logprob_difference": differences.get(contender),
            "transformers": version("transformers"), "vllm": version("vllm") if contender == VLLM else "",
        }  # fmt: skip
        text = f"{status[contender]['status']}: {status[contender].get('detail', '')}"
        if status[contender]["status"] == "ok" and lengths[contender]:
            rate = rates[contender].median
            mean = sum(lengths[contender]) / len(lengths[contender])
            base = rates[PADDED].median if PADDED in rates and rates[PADDED].seconds else None
            row |= {
                **times[contender].columns(), "tokens_per_second": rate, "speedup": rate / base if base else None,
                "mean_tokens": mean, "peak_bytes": None if contender == VLLM else peaks[contender],
            }  # fmt: skip
            # vLLM allocated its cache when it started.
            memory = "" if contender == VLLM else f", {show_bytes(peaks[contender])}"
            text = f"{rate:>9,.0f} tokens/s, {mean:.0f} tokens on average{memory}"
        print(f"  {name:24}{contender:16}{text}", flush=True)
        table.add(row)


def run_rollout(run: Run, models: list[str], longest: int = 256, contenders: list[str] | None = None) -> None:
    quiet()
    longest = min(longest, 32) if run.quick else longest
    print(f"rollout: responses of {SHORTEST} to {longest} tokens", flush=True)
    for name in models:
        if run.out_of_time(f"rollout: {name}"):
            continue
        with tempfile.TemporaryDirectory() as folder:
            case = build_case(run, name, Path(folder), longest)
        try:
            measure_model(run, name, case, contenders or present())
        finally:
            for engine in case.engines.values():
                engine.close()
        del case
        release(run.device)


def body() -> None:
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--models", help=f"of {', '.join(MODELS)}, with commas (default: by the device)")
    arguments.add_argument("--longest", type=int, default=256, help="tokens of the longest response")
    arguments.add_argument("--contenders", help=f"of {', '.join(CONTENDERS)}, with commas (default: installed ones)")
    chosen = arguments.parse_args()
    run = start(chosen)
    default = "llama-tiny" if run.quick else "llama-16m,smollm2-135m-instruct"
    models = chosen.models or (default if run.device.type == "cpu" else "llama-0.6b")
    contenders = pick("contenders", chosen.contenders, CONTENDERS) if chosen.contenders else present()
    if chosen.longest < 2:
        raise UserError(f"--longest={chosen.longest} is not allowed: it must be at least 2")
    run_rollout(run, pick("models", models, MODELS), chosen.longest, contenders)


if __name__ == "__main__":
    main(body)
