"""What `python -m benchmarks.gpu_proof` reads from its stages' results, and the predictions beside them."""

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from benchmarks.gpu_proof import __main__ as command
from benchmarks.gpu_proof import machine, predict, stages
from benchmarks.gpu_proof.stages import STAGES, Finding, Proof
from benchmarks.harness.measure import Run
from grpo_kernels.cost_model import GPUS

BY_NAME = {stage.name: stage for stage in STAGES}
FACTS = {"device": "CPU of the tests", "torch": "2", "commit": "abc"}


@pytest.fixture
def proof(tmp_path):
    return Proof("cpu", True, tmp_path, tmp_path / "device", FACTS, ("grpo-fast", "TRL", "Liger"))


@pytest.mark.parametrize(
    ("code", "log", "status", "headline"),
    [
        (0, "every result is right\n========= ERROR SUMMARY: 0 errors\n", "pass", "0 errors"),
        (0, "========= ERROR SUMMARY: 2 errors\n", "FAIL", "2 errors"),
        (1, "========= ERROR SUMMARY: 3 errors\n", "FAIL", "========= ERROR SUMMARY: 3 errors"),
        (0, "", "FAIL", "0 errors"),
        (1, "========= Error: Device not supported\n", "skipped", "compute-sanitizer does not support this device"),
    ],
)
def test_memcheck_outcome(proof, code, log, status, headline):
    outcome = command.judge(proof, BY_NAME["memcheck"], code, log, 60.0)
    assert (outcome.status, outcome.headline) == (status, headline)
    assert outcome.bad == (status == "FAIL")


def test_memcheck_is_skipped_where_it_cannot_run(proof, monkeypatch, tmp_path):
    stage = BY_NAME["memcheck"]
    assert stage.left_out(proof) == "it needs a GPU"
    monkeypatch.setattr(stages, "TOOLKIT", tmp_path / "none")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "compute-sanitizer is not on the PATH" in stage.left_out(replace(proof, device="cuda"))
    (tmp_path / "compute-sanitizer").touch(mode=0o755)
    assert stage.left_out(replace(proof, device="cuda")) is None
    assert stage.command(proof, 60.0)[:3] == [str(tmp_path / "compute-sanitizer"), "--tool", "memcheck"]


CASE = {"model": "qwen3-8b", "N": 16384, "H": 4096, "V": 151936, "dtype": "bfloat16"}
OUR_HEAD = [
    {**CASE, "head": head, "contender": "grpo-fast", "status": "ok", "to_floor": to_floor}
    for head, to_floor in (("trainable", 1.3), ("frozen", 1.42), ("scoring", 1.2))
]


@pytest.mark.parametrize(
    ("stage", "rows", "headline"),
    [
        (
            "head",
            [
                *OUR_HEAD,
                {**CASE, "head": "trainable", "contender": "Liger", "status": "ok", "to_floor": 2.5},
                {**CASE, "head": "trainable", "contender": "TRL", "status": "wrong"},
                {**CASE, "N": 1024, "head": "frozen", "contender": "grpo-fast", "status": "ok", "to_floor": 9.0},
            ],
            "3U 1.30x 2U 1.42x 1U 1.20x of the bare products, Liger 2.50x",
        ),
        (
            "loss",
            [
                {"operation": "policy_loss", "N": n, "contender": "grpo-fast", "status": "ok", "to_floor": n / 1024}
                for n in (1024, 2048)
            ],
            "policy_loss N=2048: 2.0x its bytes",
        ),
        (
            "step",
            [
                {"equal": 0.5, "trainer": "grpo-fast", "status": "ok", "seconds": 0.25, "speedup": 3.0},
                {"equal": 0.5, "trainer": "TRL", "status": "ok", "seconds": 0.75},
            ],
            "equal 0.5: 0.25 s, 3.00x TRL",
        ),
        (
            "step",
            [
                {"equal": 0, "trainer": "grpo-fast", "status": "ok", "seconds": 0.25},
                {"equal": 0, "trainer": "TRL", "status": "left out", "detail": "trl is not installed"},
            ],
            "equal 0: 0.25 s; trl is not installed",
        ),
        (
            "trl_subclass",
            [{"case": "kl", "trainer": "FusedGRPOTrainer", "status": "ok", "seconds": 1.5, "speedup": 2.0}],
            "case kl: 1.5 s, 2.00x TRL",
        ),
        (
            "plan",
            [
                {"setting": "a", "status": "ok", "ratio": 0.97},
                {"setting": "b", "status": "ok", "ratio": 1.04},
                {"setting": "c", "status": "left out"},
            ],
            "planned / measured 0.97 to 1.04 in 2 settings",
        ),
        (
            "longest",
            [
                {"contender": who, "cap_gib": 24, "status": "ok", "answer_tokens": tokens, "planned_tokens": planned}
                for who, tokens, planned in (("grpo-fast", 33000, 32000), ("TRL", 9000, ""), ("TRL Liger", 11000, ""))
            ],
            "24 GiB 33,000 tokens (planned 32,000, TRL 11,000)",
        ),
        (
            "vllm",
            [
                {"contender": who, "status": "ok", "freed_gib": freed, "sync_seconds": 0.5, "difference": 0.02}
                for who, freed in (("grpo-fast", 61.25), ("grpo-fast, LoRA", 9.5))
            ],
            "grpo-fast: sleep frees 61.2 GiB, sync 0.5 s, log-probabilities within 0.02; "
            "grpo-fast, LoRA: sleep frees 9.5 GiB, sync 0.5 s, log-probabilities within 0.02",
        ),
    ],
)
def test_finding_reads_the_rows_of_this_commit(proof, stage, rows, headline):
    name = "vllm_sleep" if stage == "vllm" else stage
    keys = tuple({column for row in rows for column in row})
    table = Run(torch.device("cpu"), output=proof.output, commit="abc").table(name, keys)
    for row in rows:
        table.add(row)
    proof = replace(proof, folder=table.path.parent)
    assert BY_NAME[stage].finding(proof, "") == Finding(headline)
    other = replace(proof, facts={**FACTS, "commit": "later"})
    assert BY_NAME[stage].finding(other, "") == Finding("no result of ours; see the log", failed=True)
    if stage in ("head", "loss", "step", "trl_subclass"):
        column = "contender" if "contender" in rows[0] else "trainer"
        table.add({**rows[0], column: rows[0][column], "status": "wrong", "detail": "error_hidden is 1"})
        found = BY_NAME[stage].finding(proof, "")
        assert found == Finding("wrong: error_hidden is 1", failed=True, wrong=True)


@pytest.fixture
def plain_memory(monkeypatch):
    """Filling uninitialised memory would be noted as traffic."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)


@pytest.mark.parametrize("name", GPUS)
def test_predictions_are_those_of_the_cost_model(name, proof, plain_memory):
    device = replace(proof, quick=False, facts={**FACTS, "device": predict.device_of(name)})
    update = "python -m benchmarks.gpu_proof.predict writes the present predictions"
    kept, present = (
        [float(ratio) for ratio in re.findall(r"([\d.]+)x", text)]
        for text in (stages.predicted(device, "head"), predict.predict_head(name))
    )
    # The interpreter, in which the tests run, has other tiles: the third digit may differ.
    assert present == pytest.approx(kept, abs=0.011), update
    assert len(kept) == 3


def test_write_predictions_replaces_the_heads_alone(tmp_path, plain_memory, monkeypatch):
    path = tmp_path / "predictions.csv"
    path.write_text("device,stage,value,source\nNVIDIA H200,head,3U 9.00x,old\n,plan,0.90 to 1.10,the bar\n")
    monkeypatch.setattr(predict, "HEAD", (64, 32, 128))
    predict.write_predictions(path)
    rows = stages.read_rows(path)
    assert [(row["device"], row["stage"]) for row in rows] == [
        ("NVIDIA H200", "head"), ("NVIDIA H100", "head"), ("", "plan")
    ]  # fmt: skip
    assert rows[0]["value"].startswith("3U ")
    assert "old" not in rows[0]["source"]
    assert rows[2]["source"] == "the bar"


def test_prediction_is_that_of_the_device(proof):
    h200 = replace(proof, quick=False, facts={**FACTS, "device": "NVIDIA H200"})
    h100 = replace(h200, facts={**FACTS, "device": "NVIDIA H100 80GB HBM3"})
    assert stages.predicted(h100, "head") != stages.predicted(h200, "head")
    assert stages.predicted(replace(h200, facts={**FACTS, "device": "NVIDIA L4"}), "head") == ""
    assert stages.predicted(h200, "plan") == "0.90 to 1.10"
    assert stages.predicted(replace(h200, quick=True), "head") == ""


@pytest.mark.parametrize(
    "text",
    [
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.159.04  Tue Oct  7\nGCC version:  gcc 13.3.0",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.04  Release Build",
    ],
)
def test_driver_version_without_nvidia_smi(text, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(machine, "DRIVER", tmp_path / "version")
    assert machine.driver_version() == ""
    (tmp_path / "version").write_text(text)
    assert machine.driver_version() == "580.159.04"


@pytest.mark.parametrize(("hip", "capability", "cuda"), [(None, "sm_90", "13.0"), ("7.2", "gfx942:x", "hip 7.2")])
def test_machine_names_the_gpu(hip, capability, cuda, monkeypatch):
    properties = SimpleNamespace(major=9, minor=0, gcnArchName="gfx942:x", total_memory=139 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.version, "cuda", None if hip else "13.0")
    monkeypatch.setattr(machine, "driver_version", lambda: "580.1")
    device = torch.device("meta")
    monkeypatch.setattr(torch.Tensor, "item", lambda tensor: 1024.0)
    assert machine.describe(device) == {
        "capability": capability, "memory_gib": "139", "driver": "580.1", "cuda": cuda
    }  # fmt: skip
