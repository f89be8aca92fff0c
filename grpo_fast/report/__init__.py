"""What a run leaves behind for a person: the summary, the curves and the page."""

from grpo_fast.report.curves import plot_run
from grpo_fast.report.summary import Summary, is_share, show, write_config, write_json

__all__ = ["Summary", "is_share", "plot_run", "show", "write_config", "write_json"]
