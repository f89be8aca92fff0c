"""``report.html``: a run on one self-contained page."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import reprlib
from pathlib import Path
from typing import Any

from grpo_fast.config import GRPOConfig
from grpo_fast.errors import one_line, printable, writing
from grpo_fast.report import charts
from grpo_fast.report.charts import draw_curves, figure
from grpo_fast.report.curves import column, known, number
from grpo_fast.report.diagnosis import diagnose_run
from grpo_fast.report.run import Run, read_completions, read_run
from grpo_fast.report.summary import clock, is_share, show

HERE = Path(__file__).parent
COLORS = ("blue", "amber", "green", "violet", "red", "teal", "pink", "olive", "grey")
# Characters beyond which a text is folded.
FOLD_AFTER = 600


def write_report(folder: Path, output: Path | None = None) -> Path:
    """Write the page of the run in `folder` to `output` (default: ``report.html`` in `folder`) and return its path.

    Everything that comes from the model, the data or the configuration is escaped: the templates escape by default,
    control characters are printed as escapes, and the page's content policy allows no script but its own.

    Raises:
        UserError: the folder holds no run, or the page cannot be written.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    run = read_run(folder)
    completions = read_completions(folder, run.damaged)
    style, script = (Markup((HERE / name).read_text(encoding="utf-8")) for name in ("page.css", "page.js"))
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        finalize=lambda value: printable(value) if type(value) is str else value,
    )  # fmt: skip
    environment.filters |= {"figure": shown_figure, "compact": compact}
    changed, unchanged = split_config(run.config)
    page = environment.get_template("page.html").render(
        style=style, script=script, script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        name=run.config.get("run_name") or run.folder.absolute().name, facts=facts(run), tiles=tiles(run),
        curves=draw_curves(run.history, run.summary), box=charts, plan=plan_bars(run), fold_after=FOLD_AFTER,
        diagnosis=diagnose_run(run.history), warnings=run.warnings,
        completions=completions, changed=changed, unchanged=unchanged, damaged=run.damaged,
    )  # fmt: skip
    output = output or folder / "report.html"
    with writing(output):
        output.write_text(page, encoding="utf-8")
    return output


def facts(run: Run) -> dict[str, str]:
    """What was trained, on what, and how far."""
    config, rewards = run.config, run.config.get("reward_funcs")
    last = run.history[-1]["step"] if run.history else 0
    running = f"not finished: step {last} of {config.get('max_steps')}"
    sampled = {}
    if rewards or "loss_type" in config:
        sampled["rewards"] = ", ".join(map(str, rewards if isinstance(rewards, list) else [rewards or ""]))
        sampled["loss"] = str(config.get("loss_type"))
    return {
        "model": str(config.get("model_name_or_path")),
        "data": str(config.get("dataset_name")),
        **sampled,
        "state": f"finished after {run.summary.get('steps')} steps" if run.summary else running,
    }


def tiles(run: Run) -> list[tuple[str, str, str]]:
    """The main results at the top of the page: (label, value, note)."""
    made, summary = [], run.summary
    if summary:
        scores = {name: summary[name] for name in ("before", "after", "best_score") if name in summary}
        share = is_share(*scores.values(), metric=str(summary.get("metric")))
        shown = {name: show(score, share) for name, score in scores.items()}
        change = f"{shown.get('before', 'n/a')} → {shown.get('after', 'n/a')}"
        made.append((f"{summary.get('metric')} on held-out prompts", change, "before → after"))
        if "best_score" in shown:
            made.append(("best on held-out prompts", shown["best_score"], f"kept: {summary.get('best_checkpoint')}"))
    if not run.history:
        return made
    last = run.history[-1]["step"]
    made.append(("optimizer steps", f"{last:,}", f"of {run.config.get('max_steps')}"))
    times, speeds = (known(column(run.history, name)) for name in ("step_time", "tokens_per_second"))
    if summary.get("train_seconds") is not None:
        made.append(("training time", clock(summary["train_seconds"]), "without evaluation and loading"))
    elif times:
        # Not every step may be logged.
        made.append(("training time so far", clock(sum(times) / len(times) * last), "from the mean step time"))
    if speeds:
        made.append(("tokens per second", f"{sorted(speeds)[len(speeds) // 2]:,.0f}", "median of the steps"))
    for name, note in (("memory/peak_allocated_gib", "tensors on the GPU"), ("memory/peak_rss_gib", "the process")):
        if peaks := known(column(run.history, name)):
            made.append(("peak memory", f"{max(peaks):.3g} GiB", note))
    return made


def plan_bars(run: Run) -> dict[str, Any]:
    """The planned memory by part and the measured peak, as shares of the widest bar; empty without a plan."""
    phases = {
        phase: {part: size for part, size in parts.items() if (number(size) or 0) > 0}
        for phase, parts in run.plan.items()
        if isinstance(parts, dict)
    }
    bars = [(f"planned, {phase}", parts) for phase, parts in phases.items() if parts]
    if not bars:
        return {}
    names = list(dict.fromkeys(part for _, parts in bars for part in parts))
    colors = {part: COLORS[i % len(COLORS)] + " faded" * (i // len(COLORS)) for i, part in enumerate(names)}
    if peaks := known(column(run.history, "memory/peak_allocated_gib")):
        bars.append(("measured peak", {"measured": max(peaks) * 2**30}))
    widest = max(sum(parts.values()) for _, parts in bars)
    drawn = []
    for label, parts in bars:
        shares = [(part, size, size / widest, colors.get(part, "ink")) for part, size in parts.items()]
        drawn.append((label, sum(parts.values()), shares))
    return {"bars": drawn, "colors": colors}


def split_config(config: dict[str, Any]) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """The fields as (name, value): those that differ from their defaults, and the others."""
    defaults = dataclasses.asdict(GRPOConfig())
    sides: tuple[list, list] = ([], [])
    for name, value in config.items():
        same = name in defaults and defaults[name] == value
        sides[same].append((str(name), value if isinstance(value, str) else json.dumps(value, default=str)))
    return sides


def shown_figure(value: Any) -> str:
    """A number of a completion; anything else is printed and marked."""
    if value is None:
        return "n/a"
    return figure(value) if number(value) is not None else f"{one_line(reprlib.repr(value), 40)} (not a number)"


def compact(size: float) -> str:
    """Bytes in GiB, or in MiB below 512 MiB."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**29 else f"{size / 2**20:.1f} MiB"
