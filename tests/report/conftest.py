import pytest

from grpo_fast.config import GRPOConfig
from grpo_fast.report import write_config
from support.run_folders import completion, step_metrics, write_lines


@pytest.fixture
def folder(tmp_path):
    """A running run: a configuration, metrics and completions, but no summary."""
    run = tmp_path / "run"
    run.mkdir()
    write_config(run / "config.yaml", GRPOConfig("m", dataset_name="d", reward_funcs=["right"], max_steps=20, seed=7))
    write_lines(run / "metrics.jsonl", [step_metrics(step) for step in range(1, 13)])
    lines = [completion(10, "flat", "same", 0.0, right=1.0) for _ in range(2)]
    lines += [completion(10, "What is 2+2?", f"answer {i}", i - 1.0, right=float(i)) for i in range(3)]
    write_lines(run / "completions" / "completions_00010.jsonl", lines)
    return run
