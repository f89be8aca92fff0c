"""The GPU branches of gpu-proof's stages, at full sizes where no model is needed, on a fake GPU."""

from pathlib import Path

import pytest

from conftest import DEVICE
from support.fake_cuda import Report, run_cases

pytestmark = [
    pytest.mark.slow, pytest.mark.long, pytest.mark.skipif(DEVICE != "cpu", reason="replaces the GPU")
]  # fmt: skip
SCRIPT = Path(__file__).parents[1] / "support" / "fake_cuda_proof.py"
TRAINED = ("step", "plan", "longest")


@pytest.fixture(scope="module")
def reports(fake_cuda_guard) -> dict[str, Report]:
    return run_cases(SCRIPT, fake_cuda_guard, "sm_90")


@pytest.mark.parametrize("stage", ["machine", "doctor", "equivalence", "heads", "loss", "step", "plan", "longest"])
def test_stage_runs_to_its_end(stage, reports):
    report = reports[stage]
    assert report.error is None
    assert report.refused == []
    assert stage == "machine" or report.launches
    if stage in TRAINED:
        kernels = {launch.kernel for launch in report.launches}
        assert kernels >= {"head_forward", "head_gradient", "policy_tokens"}


def test_machine_of_the_fake_gpu(reports):
    assert reports["machine"].returned | {"driver": ""} == {
        "capability": "sm_90", "memory_gib": "80", "driver": "", "cuda": "hip None"
    }  # fmt: skip


def test_doctor_checks_both_backends_in_every_dtype(reports):
    said = reports["doctor"].returned
    checked = [line.split()[:3] for line in said if " of the allowed" in line]
    # Five operations; Triton has no float64.
    assert len(checked) == 5 * (3 + 4)
    assert said[1] == "cuda:0: fake sm_90, sm_90, 80 GiB"


def test_equivalence_runs_every_call_at_full_size(reports):
    """Whether a loss is right needs values; that no call failed does not."""
    rows = reports["equivalence"].returned
    assert {row["status"] for row in rows} <= {"ok", "wrong"}
    assert {row["detail"] for row in rows} <= {"", "error_loss is 1, above 2e-05"}
    largest = [(row["head"], row["backend"]) for row in rows if row["model"] == "qwen3-8b"]
    calls = ("trainable", "frozen", "scoring", "logprob")
    assert largest == [(call, backend) for call in calls for backend in ("triton", "torch")]
    assert {row["dtype"] for row in rows if row["model"] == "gpt2"} == {"bfloat16", "float16", "float32"}
    assert "autocast" in {row["head"] for row in rows}


def test_heads_are_checked_and_timed(reports):
    rows = reports["heads"].returned
    assert {row["status"] for row in rows} == {"ok"}
    names = {"bare GEMMs", "grpo-fast", "full logits", "torch linear_cross_entropy"}
    assert {(row["head"], row["contender"]) for row in rows} == {
        (mode, name) for mode in ("trainable", "frozen", "scoring") for name in names
    }
    # A call of ours takes the memory that is free, not more.
    assert all(float(row["peak_bytes"]) < 80 * 2**30 for row in rows if row["contender"] == "grpo-fast")


def test_loss_step_plan_and_longest_end_in_results(reports):
    assert {row["status"] for row in reports["loss"].returned} == {"ok"}
    ours, trl = reports["step"].returned
    assert (ours["status"], trl["status"]) == ("ok", "left out")
    assert reports["step"].of("adamw_step")
    (planned,) = reports["plan"].returned
    assert planned["status"] == "ok"
    assert int(planned["measured_bytes"]) > 0
    assert reports["longest"].returned["fits"] is True
