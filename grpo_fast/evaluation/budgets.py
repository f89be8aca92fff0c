"""``grpo-fast eval --thinking_budgets``: the scores of one model at several thinking budgets, and their figure."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.table import Table

from grpo_fast.config import GRPOConfig
from grpo_fast.evaluation.run import SETTINGS, EvalOptions, EvalRun
from grpo_fast.report import is_share, show, write_config, write_json
from grpo_fast.report.console import Terminal
from grpo_fast.report.curves import new_panels, plain, save_figure
from grpo_fast.report.terminal import lasting_output
from grpo_fast.train.run_folder import claim, release
from grpo_fast.train.trust import remember_own

FIGURE, CURVE = "budgets.png", "budgets.json"


class BudgetCurve:
    """Evaluates the model of `config` at each of the options' `thinking_budgets`, from the smallest on.

    The folder of each evaluation is ``budget-N`` within that of the curve. All sample with the same random seeds.

    Raises:
        UserError: the options, the configuration, the data or the model cannot be used.
    """

    def __init__(self, config: GRPOConfig, options: EvalOptions):
        self.budgets = sorted(set(options.thinking_budgets))
        self.configs = [replace(config, thinking_budget=budget) for budget in self.budgets]
        self.base = EvalRun(self.configs[0], options)
        self.folder, self.metric = self.base.folder, self.base.metric

    def run(self) -> list[dict[str, Any]]:
        """Sample and score what is missing, draw the curve, and return the summaries, one for each budget."""
        try:
            with lasting_output():
                claim(self.folder, "--output")
                write_config(self.folder / "config.yaml", self.base.config)
                remember_own(self.folder, self.base.config)
                write_json(self.folder / SETTINGS, self.base.settings)
                summaries = [self.at(config).run() for config in self.configs]
                write_json(self.folder / CURVE, summaries)
                draw(summaries, self.metric, self.folder / FIGURE)
                self.show(summaries)
                return summaries
        finally:
            release(self.folder)

    def at(self, config: GRPOConfig) -> EvalRun:
        """The evaluation at the budget of `config`, with the model of the curve."""
        one = copy.copy(self.base)
        one.config, one.folder = config, self.folder / f"budget-{config.thinking_budget}"
        one.sampling = replace(one.sampling, thinking_budget=config.thinking_budget)
        one.settings = {**one.settings, "thinking_budget": config.thinking_budget}
        one.resume(one.options.resume and (one.folder / SETTINGS).exists())
        return one

    def show(self, summaries: list[dict[str, Any]]) -> None:
        console, labels = Terminal(), list(summaries[0]["metrics"][self.metric])
        table = Table(title=f"{self.metric} by thinking budget", title_justify="left")
        for column in ("budget", *labels, "mean length", "closed by the budget", "cut off"):
            table.add_column(column, justify="right")
        for summary in summaries:
            figures = [summary["metrics"][self.metric][label]["value"] for label in labels]
            cells = ["n/a" if value is None else show(value, is_share(abs(value))) for value in figures]
            closed, cut = f"{summary['thinking_closed_ratio']:.1%}", f"{summary['clipped_ratio']:.1%}"
            table.add_row(str(summary["thinking_budget"]), *cells, f"{summary['mean_length']:.1f}", closed, cut)
        console.print(table)
        for label, name in (("curve", CURVE), ("figure", FIGURE)):
            console.print(f"{label + ':':<8}{self.folder / name}", soft_wrap=True)


def draw(summaries: list[dict[str, Any]], metric: str, path: Path) -> None:
    """Draw every estimate of `metric`, with its 95% interval, over the budgets."""
    budgets = [summary["thinking_budget"] for summary in summaries]
    figure, axes = new_panels(1, 1, (7, 4.5))
    axis, curves = axes[0, 0], [summary["metrics"][metric] for summary in summaries]
    for label in curves[0]:
        points = [(budget, found[label]) for budget, found in zip(budgets, curves, strict=True)]
        points = [(budget, found) for budget, found in points if found["value"] is not None]
        (line,) = axis.plot([b for b, _ in points], [f["value"] for _, f in points], "o-", markersize=4, label=label)
        known = [(budget, found) for budget, found in points if None not in (found["low"], found["high"])]
        if known:
            low, high = ([found[end] for _, found in known] for end in ("low", "high"))
            axis.fill_between([budget for budget, _ in known], low, high, color=line.get_color(), alpha=0.15)
    # Logarithmic from the smallest budget on; a budget of 0 has a place as well.
    axis.set_xscale("symlog", base=2, linthresh=max(1, min((b for b in budgets if b), default=1)))
    axis.set_xticks(budgets, [str(budget) for budget in budgets])
    axis.minorticks_off()
    axis.set_xlabel("thinking budget (tokens)")
    axis.set_title(plain(f"{metric} on {summaries[0]['num_prompts']} prompts, 95% intervals"), loc="left")
    axis.legend()
    save_figure(figure, path)
