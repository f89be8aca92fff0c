"""The GPU branches of gpu-proof's stages, at full sizes where no model is needed, on a fake GPU."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from support.fake_cuda import Report, run_cases

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(1800)]
SCRIPT = Path(__file__).parents[1] / "support" / "fake_cuda_proof.py"


@pytest.fixture(scope="module")
def rehearse(fake_cuda_guard) -> Callable[[str], Report]:
    """The report of a stage, which must have come to its end."""

    @cache
    def run(stage: str) -> Report:
        report = run_cases(SCRIPT, fake_cuda_guard, "sm_90", stage)[stage]
        assert report.error is None
        assert report.refused == []
        return report

    return run


def test_machine_of_the_fake_gpu(rehearse):
    assert rehearse("machine").returned | {"driver": ""} == {
        "capability": "sm_90", "memory_gib": "80", "driver": "", "cuda": "hip None"
    }  # fmt: skip


def test_doctor_checks_both_backends_in_every_dtype(rehearse):
    said = rehearse("doctor").returned
    checked = [line.split()[:3] for line in said if " of the allowed" in line]
    # Five operations; Triton has no float64.
    assert len(checked) == 5 * (3 + 4)
    assert said[1] == "cuda:0: fake sm_90, sm_90, 80 GiB"


def test_equivalence_runs_every_call_at_full_size(rehearse):
    """Whether a loss is right needs values; that no call failed does not."""
    rows = rehearse("equivalence").returned
    assert {row["status"] for row in rows} <= {"ok", "wrong"}
    assert {row["detail"] for row in rows} <= {"", "error_loss is 1, above 2e-05"}
    largest = [(row["head"], row["backend"]) for row in rows if row["model"] == "qwen3-8b"]
    calls = ("trainable", "frozen", "scoring", "logprob")
    assert largest == [(call, backend) for call in calls for backend in ("triton", "torch")]
    assert {row["dtype"] for row in rows if row["model"] == "gpt2"} == {"bfloat16", "float16", "float32"}
    assert "autocast" in {row["head"] for row in rows}


def test_heads_are_checked_and_timed(rehearse):
    rows = rehearse("heads").returned
    assert {row["status"] for row in rows} == {"ok"}
    names = {"bare GEMMs", "grpo-fast", "full logits", "torch linear_cross_entropy"}
    assert {(row["head"], row["contender"]) for row in rows} == {
        (mode, name) for mode in ("trainable", "frozen", "scoring") for name in names
    }
    # A call of ours takes the memory that is free, not more.
    assert all(float(row["peak_bytes"]) < 80 * 2**30 for row in rows if row["contender"] == "grpo-fast")


def test_loss_ends_in_results(rehearse):
    assert {row["status"] for row in rehearse("loss").returned} == {"ok"}


@pytest.mark.parametrize("stage", ["step", "plan", "longest"])
def test_trainer_steps_end_in_results(stage, rehearse):
    report = rehearse(stage)
    assert {launch.kernel for launch in report.launches} >= {"head_forward", "head_gradient", "policy_tokens"}
    if stage == "step":
        assert [row["status"] for row in report.returned] == ["ok", "left out"]
        assert report.of("adamw_step")
    elif stage == "plan":
        assert [row["status"] for row in report.returned] == ["ok"]
        assert int(report.returned[0]["measured_bytes"]) > 0
    else:
        assert report.returned["fits"] is True
