"""What a run shows and leaves behind: console progress, tracker figures, curves and the report page."""

from grpo_fast.report.curves import plot_run
from grpo_fast.report.page import write_report
from grpo_fast.report.summary import Summary, clock, curves_file, is_share, show, write_config, write_json

__all__ = [
    "Summary",
    "clock",
    "curves_file",
    "is_share",
    "plot_run",
    "show",
    "write_config",
    "write_json",
    "write_report",
]
