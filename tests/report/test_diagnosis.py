"""What the report says of an objective, from the metrics of a run."""

import pytest

from grpo_fast.report.diagnosis import diagnose_run
from support.run_folders import page, step_metrics, write_lines


def history(count=20, **metrics):
    return [step_metrics(step, **{name: make(step) for name, make in metrics.items()}) for step in range(1, count + 1)]


@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        (
            {"objective/clipped_low": lambda s: 0.3, "objective/clipped_high": lambda s: 0.4},
            "Little signal: 70% of the tokens with an advantage had no gradient",
        ),
        (
            {name: lambda s: 0.0 for name in ("objective/clipped_low", "objective/clipped_high")}
            | {"position/moved_1": lambda s: 0.01},
            "bounds never took effect",
        ),
        ({"objective/masked_tokens": lambda s: 0.25}, "Little signal: 25% of the tokens were left out"),
        ({"objective/effective_sample_size": lambda s: 0.9 if s < 15 else 0.2}, "counted as 20% of its tokens"),
        ({"entropy": lambda s: 2.0 if s < 15 else 0.1}, "the entropy fell from 2 to 0.1 nats"),
        ({"frac_reward_zero_std": lambda s: s / 20}, "all rewards were equal in 98% of the groups"),
        ({"grad_norm": lambda s: 90.0 if s == 7 else 0.3}, "reached 90 at step 7, 300 times its median"),
    ],
)
def test_diagnosis_of_a_run_that_stalls_or_is_unstable(metrics, words):
    (finding,) = diagnose_run(history(**metrics)).findings
    assert words in finding


def test_diagnosis_of_an_ordinary_run_finds_nothing():
    found = diagnose_run(history(**{"objective/clipped_low": lambda s: 0.1, "objective/clipped_high": lambda s: 0.05}))
    assert found.findings == []
    assert found.positions == []
    assert diagnose_run([]).figures == []


def test_page_shows_figures_by_position_and_findings(folder):
    lines = history(**{"objective/masked_tokens": lambda s: 0.5})
    for line in lines:
        line |= {f"position/entropy_{part}": part + line["step"] / 100 for part in range(1, 5)}
    write_lines(folder / "metrics.jsonl", lines)
    words = page(folder).words
    assert "What the objective did Little signal: 50% of the tokens were left out" in words
    assert "first quarter 1.015 → 1.195" in words
    assert "last quarter 4.015 → 4.195" in words
    assert "KL to the reference policy" not in words
