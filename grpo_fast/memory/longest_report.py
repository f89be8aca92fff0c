"""What ``grpo-fast plan --longest`` prints and writes: a table, a recipe and a chart of the memory by part."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from rich.table import Table

from grpo_fast.config import GRPOConfig
from grpo_fast.errors import UserError, import_extra
from grpo_fast.files import replace_text
from grpo_fast.memory.longest import Longest, best, longest_answers
from grpo_fast.memory.plan import GIB, MemoryPlan, usable
from grpo_fast.memory.report import MOMENTS, WIDTH, gib, read_run
from grpo_fast.memory.step_time import ASSUMPTIONS, LAYER_LAUNCHES, StepTime, estimate_step, find_gpu
from grpo_fast.memory.trace import Tracer
from grpo_fast.model.loading import max_positions
from grpo_fast.report.console import Terminal
from grpo_fast.report.curves import new_panels, plain, save_figure

# Fields that the search sets; a recipe names them even where they have their defaults.
NAMED = (
    "dtype", "use_peft", "load_in_4bit", "gradient_checkpointing", "num_generations", "generation_batch_size",
    "max_completion_length", "max_tokens_per_microbatch", "max_tokens_per_generation_batch",
)  # fmt: skip
COLORS = [
    "#1f6feb", "#1a7f37", "#cf222e", "#9a6700", "#8250df", "#0a7f8c", "#bf3989", "#57606a", "#bc4c00", "#54aeff",
    "#4ac26b", "#ff8182", "#d4a72c", "#c297ff", "#76e3ea", "#000000",
]  # fmt: skip


def print_longest(
    config: GRPOConfig,
    vram: int,
    prompt_tokens: int,
    output: Path,
    gpu: str | None = None,
    placeholders: bool = False,
    console: Terminal | None = None,
) -> bool:
    """Print the longest answers that fit a device, and write the recipe and the chart of the best way to train.

    Args:
        config: the run; the search sets its switches.
        vram: bytes of the device.
        prompt_tokens: length of the longest prompt.
        output: the recipe to write, ``.yaml``; the chart is written beside it as ``.png``.
        gpu: a device of `step_time.GPUS` for the estimate of time (default: the usual one with `vram` bytes).
        placeholders: whether the dataset and the rewards of `config` are not the user's.

    Returns:
        Whether anything fits.

    Raises:
        UserError: `output` exists, has another suffix or cannot be written, the device is unknown, the prompts take all
            positions, or the model cannot be read or planned.
    """
    console = console or Terminal(width=WIDTH)
    if output.suffix not in (".yaml", ".yml"):
        raise UserError(f"--output={str(output)!r} is not allowed: it must end in .yaml or .yml")
    if not os.access(output.parent, os.W_OK):
        why = "cannot be written to" if output.parent.is_dir() else "does not exist"
        raise UserError(f"--output={str(output)!r}: the folder {str(output.parent)!r} {why}")
    chart = output.with_suffix(".png")
    for path in (output, chart):
        if path.exists():
            raise UserError(f"{path} already exists; choose another file with --output")
    gpu = find_gpu(vram, gpu)
    config, model_config = read_run(config)
    positions = max_positions(model_config)
    if positions and prompt_tokens >= positions:
        raise UserError(
            f"--prompt_tokens={prompt_tokens} leaves no room for an answer in the {positions:,} positions of "
            f"{config.model_name_or_path}; set it lower"
        )
    tracer = Tracer(model_config)
    with console.status("searching") as status:
        found = longest_answers(
            config, tracer, vram, prompt_tokens, lambda trained: status.update(f"searching: {trained}")
        )
    limit = f"{positions:,} positions" if positions else "positions without end"
    console.print(f"{config.model_name_or_path} on {gib(vram)} GiB, prompts of {prompt_tokens:,} tokens; {limit}.")
    console.print(_table(found, model_config, prompt_tokens, gpu))
    chosen = best(found)
    if chosen.plan is None or chosen.config is None:
        console.print("does not fit: no combination of the switches leaves room for an answer")
        return False
    console.print(_switches(found))
    time = estimate_step(chosen.config, model_config, chosen.plan, prompt_tokens, gpu)
    console.print(_explanation(chosen, time, positions))
    plot_memory(chosen.plan, vram, f"{config.model_name_or_path}, {chosen.trained}, {chosen.answer:,} tokens", chart)
    replace_text(output, recipe(chosen, vram, placeholders))
    console.print(f"{output} and {chart}")
    return True


def _table(found: list[Longest], model_config: Any, prompt_tokens: int, gpu: str) -> Table:
    table = Table("trained", title="Longest answers that fit, in tokens", title_justify="left")
    for column in ("longest answer", "by memory alone", "sampled at once", f"s/step, {gpu}"):
        table.add_column(column, justify="right")
    for each in found:
        if each.config is None or each.plan is None:
            table.add_row(each.trained, "none fits")
            continue
        time = estimate_step(each.config, model_config, each.plan, prompt_tokens, gpu)
        at_once = _at_once(each.config, prompt_tokens)
        table.add_row(each.trained, f"{each.answer:,}", f"{each.by_memory:,}", f"{at_once:,}", f"{time.total:,.0f}")
    return table


def _at_once(config: GRPOConfig, prompt_tokens: int) -> int:
    """How many answers of full length the sampler keeps at once."""
    return config.max_tokens_per_generation_batch // (prompt_tokens + config.max_completion_length)


def _switches(found: list[Longest]) -> str:
    """One line for each way to train: the switches that it needs."""
    lines = []
    for each in found:
        if each.switches is not None:
            named = (name if value is True else f"{name}={value}" for name, value in each.switches.items())
            lines.append(f"{each.trained}: {', '.join(named) or 'no switch needed'}")
    return "\n".join(lines)


def _explanation(chosen: Longest, time: StepTime, positions: int | None) -> str:
    launches = (
        "" if chosen.config.use_vllm else f"; {LAYER_LAUNCHES * 1e3:g} ms for the launches of each layer and token"
    )
    lines = [
        f"A step of {chosen.config.generation_batch_size:,} answers of full length: about {time.sampling:,.0f} s of "
        f"sampling and {time.training:,.0f} s of training on one {time.gpu} ({ASSUMPTIONS}{launches}). Shorter answers "
        "take less.",
    ]
    if positions and chosen.by_memory > chosen.answer * 1.01:
        lines.append(
            f"Memory would hold answers of {chosen.by_memory:,} tokens: beyond its {positions:,} positions the model "
            "needs model_init_kwargs with larger max_position_embeddings and rope scaling."
        )
    lines.append(
        "num_generations changes none of this: a microbatch holds one answer, and the sampler keeps as many answers at "
        "once as max_tokens_per_generation_batch allows."
    )
    return "\n".join(lines)


def recipe(chosen: Longest, vram: int, placeholders: bool) -> str:
    """The text of a configuration file with every field of the run that is no default."""
    yaml = import_extra("yaml", "train")
    config = chosen.config
    default = GRPOConfig(model_name_or_path="any", dataset_name="any", reward_funcs=["any"])
    left_out = {"dataset_name", "reward_funcs"} if placeholders else set()
    fields = {"model_name_or_path": config.model_name_or_path}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in left_out and (field.name in NAMED or value != getattr(default, field.name)):
            fields[field.name] = value
    lines = [
        f"# {config.model_name_or_path} within {gib(vram)} GiB: {chosen.trained}, answers of up to {chosen.answer:,} "
        "tokens, according to the plan",
    ]
    if placeholders:
        lines.append("# Add dataset_name, prompt_template and reward_funcs before training.")
    return "\n".join(lines) + "\n" + yaml.safe_dump(fields, sort_keys=False)


def plot_memory(plan: MemoryPlan, vram: int, title: str, path: Path) -> None:
    """Draw each moment of a plan as a bar of its parts, and the memory of the device as a line."""
    figure, axes = new_panels(1, 1, (9, 1.6 + 0.55 * len(plan.moments)))
    axis = axes[0, 0]
    parts = list(dict.fromkeys(part for moment in plan.moments.values() for part in moment))
    labels = [MOMENTS[name] for name in plan.moments]
    starts = [0.0] * len(labels)
    for index, part in enumerate(parts):
        sizes = [moment.get(part, 0) / GIB for moment in plan.moments.values()]
        # A part that is too thin to see would only lengthen the legend.
        label = part if max(sizes) > 0.01 * plan.peak / GIB else None
        axis.barh(labels, sizes, left=starts, color=COLORS[index % len(COLORS)], label=label, height=0.6)
        starts = [start + size for start, size in zip(starts, sizes, strict=True)]
    axis.axvline(vram / GIB, color="#24292f", linewidth=1.2, label="device")
    axis.axvline(usable(vram) / GIB, color="#24292f", linewidth=1.2, linestyle=":", label="usable (assumed)")
    axis.invert_yaxis()
    axis.set_xlabel("GiB")
    axis.set_title(plain(title), loc="left", fontsize=11)
    axis.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5))
    save_figure(figure, path)
