"""Experiment trackers through accelerate: tensorboard, wandb and trackio."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from accelerate.utils import ProjectConfiguration

from grpo_fast.config import GRPOConfig
from grpo_fast.errors import UserError, import_extra, one_line


def tracker_arguments(config: GRPOConfig, folder: Path) -> dict[str, Any]:
    """Keyword arguments of Accelerator for the trackers in `report_to`, whose files go into the run folder `folder`.

    Raises:
        UserError: a tracker's package is not installed.
    """
    for name in config.report_to:
        import_extra(name, "trackers")
    folders = ProjectConfiguration(project_dir=str(folder), logging_dir=str(folder / "tensorboard"))
    return {"log_with": config.report_to or None, "project_config": folders}


def hyperparameters(config: GRPOConfig) -> dict[str, bool | int | float | str]:
    """The configuration as trackers accept it: lists, mappings and None become JSON."""
    values = dataclasses.asdict(config).items()
    return {name: value if isinstance(value, (bool, int, float, str)) else json.dumps(value) for name, value in values}


class Trackers(AbstractContextManager):
    """The trackers of a run. Use it as a context manager around the run.

    A tracker that fails during the run, for example without a network, gets no more metrics; `warn` is called once,
    and the run continues. The project is ``grpo-fast`` unless WANDB_PROJECT names another one.

    Raises:
        UserError: a tracker could not be started.
    """

    def __init__(self, accelerator: Accelerator, config: GRPOConfig, folder: Path, warn: Callable[[str], None]):
        self.accelerator, self.warn = accelerator, warn
        name = config.run_name or folder.name
        arguments = {"wandb": {"name": name, "dir": str(folder)}, "trackio": {"name": name}}
        try:
            accelerator.init_trackers(os.environ.get("WANDB_PROJECT", "grpo-fast"), hyperparameters(config), arguments)
        except Exception as error:
            raise UserError(f"report_to={config.report_to} could not be started: {one_line(error)}") from None

    def log(self, metrics: dict[str, float], step: int) -> None:
        self._each("log", {name: value for name, value in metrics.items() if name != "step"}, step=step)

    def _each(self, method: str, *args: Any, **kwargs: Any) -> None:
        working: list[GeneralTracker] = []
        for tracker in self.accelerator.trackers:
            try:
                getattr(tracker, method)(*args, **kwargs)
                working.append(tracker)
            except Exception as error:
                self.warn(f"{tracker.name} failed and gets no more metrics: {one_line(error)}")
        self.accelerator.trackers = working

    def __exit__(self, *_) -> None:
        self._each("finish")
        self.accelerator.trackers = []
