"""What a run of CS336's assignment hands in: its metrics, sampled texts over time, and the curves."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from grpo_fast.errors import UserError, import_extra, require_extra
from grpo_fast.files import LinesFile
from grpo_fast.report.curves import column, known, new_panels, save_figure, smooth

METRICS, SAMPLES, CURVES = "metrics.jsonl", "samples.jsonl", "curves.png"
# The panels of the figure: a title, and the metrics in it.
PANELS = {
    "validation": ("val_reward", "val_format_reward", "val_answer_reward"),
    "training reward": ("mean_reward",),
    "training loss": ("loss",),
    "entropy of a token (nats)": ("token_entropy", "val_token_entropy"),
    "response length (tokens)": ("response_tokens", "val_response_tokens"),
    "gradient norm": ("grad_norm",),
}
# Colours of a panel's metrics, in their order.
COLORS = ("#1f6feb", "#9a6700", "#1a7f37")

Measured = tuple[dict[str, float], list[dict[str, Any]]]


class Record:
    """The history of a run, with a validation every `eval_steps` steps, before the first and after the last step.

    Attributes:
        history: the metrics of every step; those of a validation begin with ``val_``, and step 0 has only those.

    Args:
        validate: measures the model: its metrics, and its samples, of which the first `num_samples` are kept. None for
            no validation.
        output_dir: where the files go, or None for none: `METRICS` and `SAMPLES` with a line for each step and text,
            and the figure `CURVES`, drawn again at each validation and at the end.
        log: called with the metrics of each step.

    Raises:
        UserError: the folder already has a run, or `eval_steps` or `num_samples` is out of range.
    """

    def __init__(
        self,
        validate: Callable[[], Measured] | None,
        last_step: int,
        eval_steps: int,
        num_samples: int,
        output_dir: str | Path | None,
        log: Callable[[dict[str, float]], None] | None,
    ):
        for name, value, least in (("eval_steps", eval_steps, 1), ("num_logged_samples", num_samples, 0)):
            if value < least:
                raise UserError(f"{name}={value} is not allowed: it must be at least {least}")
        self.validate, self.last_step, self.eval_steps, self.num_samples = validate, last_step, eval_steps, num_samples
        self.folder = None if output_dir is None else Path(output_dir)
        self.log, self.history = log, []
        # Entries that are in the figure.
        self.drawn = 0
        if self.folder is not None:
            require_extra("matplotlib", "train")
            for name in (METRICS, SAMPLES):
                if (self.folder / name).exists():
                    raise UserError(f"output_dir={str(output_dir)!r} already has a {name}; choose another folder")

    def __enter__(self) -> Record:
        self.files = {} if self.folder is None else {n: LinesFile(self.folder / n) for n in (METRICS, SAMPLES)}
        if self.validate is not None:
            self.add(0, {})
        return self

    def __exit__(self, *_: object) -> None:
        for file in self.files.values():
            file.__exit__()
        if self.folder is not None and self.drawn < len(self.history):
            plot_curves(self.history, self.folder / CURVES)

    def add(self, step: int, figures: dict[str, float], samples: list[dict[str, Any]] | None = None) -> None:
        """Add a step's metrics, and where there is no validation, some texts of the `samples` it was trained on."""
        entry = {"step": step, **figures}
        due = step % self.eval_steps == 0 or step == self.last_step
        if due and self.validate is not None:
            measured, samples = self.validate()
            entry |= {f"val_{name.removeprefix('mean_')}": value for name, value in measured.items()}
        self.history.append(entry)
        if self.log is not None:
            self.log(entry)
        if self.folder is None:
            return
        self.files[METRICS].write(entry)
        if due:
            for sample in (samples or [])[: self.num_samples]:
                self.files[SAMPLES].write({"step": step, **sample})
            plot_curves(self.history, self.folder / CURVES)
            self.drawn = len(self.history)


def plot_curves(history: list[dict[str, float]], path: Path) -> None:
    """Draw `PANELS` over the steps; the 95% interval of the validation's reward is a band around it.

    Raises:
        UserError: matplotlib is not installed, or the file cannot be written.
    """
    import_extra("matplotlib", "train")
    panels = {
        title: found
        for title, names in PANELS.items()
        if (found := [name for name in names if known(column(history, name))])
    }
    figure, axes = new_panels(max(math.ceil(len(panels) / 2), 1), 2, (11, 3.2 * max(math.ceil(len(panels) / 2), 1)))
    steps = column(history, "step")
    for axis, (title, names) in zip(axes.flat, panels.items(), strict=False):
        for name, color in zip(names, COLORS, strict=False):
            drawn = [(x, y) for x, y in zip(steps, column(history, name), strict=True) if not math.isnan(y)]
            x, y = zip(*drawn, strict=True)
            if name.startswith("val_"):
                axis.plot(x, y, "o-", color=color, markersize=4, label=name)
            else:
                axis.plot(x, y, color=color, alpha=0.25, linewidth=1)
                axis.plot(x, smooth(list(y)), color=color, linewidth=2, label=name)
        if "val_reward" in names:
            band = [column(history, name) for name in ("step", "val_reward_low", "val_reward_high")]
            rows = [row for row in zip(*band, strict=True) if not any(map(math.isnan, row))]
            if rows:
                x, low, high = zip(*rows, strict=True)
                axis.fill_between(x, low, high, color=COLORS[0], alpha=0.15, label="95% interval", linewidth=0)
        axis.set_title(title, loc="left", fontsize=11)
        axis.set_xlabel("step")
        axis.legend(fontsize=8, frameon=False)
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_visible(False)
    save_figure(figure, path)
