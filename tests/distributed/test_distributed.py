"""Two processes train as one does: DDP and FSDP2 on the CPU, in float64, and on completions that are given.

All of it runs in one pair of processes, which take seconds to start; meanwhile this process does the same by itself.
"""

import dataclasses
import json
import shutil
import signal
import socket
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from accelerate.state import AcceleratorState

from grpo_fast.config import GRPOConfig
from grpo_fast.distributed.sharding import is_sharded
from grpo_fast.model.packing import Row, deal_microbatches, fill_microbatches
from grpo_kernels import PRESETS, linear_policy_loss
from support.processes import ALLOWED, CASES, MODES, SERVED, STEPS, Given, Served, train, trajectory, work
from support.runs import assert_same_run, figures, saved_weights

# The fixture `runs` takes 35 s of processor time.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[dict, list[dict], Path]:
    """The results of one process, those of each of two, and the folder of their runs."""
    folder = tmp_path_factory.mktemp("runs")
    train(folder / "half", Given, max_steps=2)
    for mode in MODES:
        shutil.copytree(folder / "half", folder / mode / "one then two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = mp.spawn(work, args=(port, folder), nprocs=2, join=False)
    alone = {}
    for case, fields in CASES.items():
        alone[case] = trajectory(fields)
        AcceleratorState._reset_state(reset_partial_state=True)
    train(folder / "whole", Given)
    train(folder / "served", Served, **SERVED)
    while not processes.join():
        pass
    return alone, [torch.load(folder / f"found{rank}.pt", weights_only=True) for rank in range(2)], folder


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("mode", MODES)
def test_two_processes_train_as_one_does(runs, mode, case):
    alone, found, _ = runs
    one, *two = alone[case], *(each[f"{mode} {case}"] for each in found)
    assert one["gradient"].norm() > 1e-3
    assert len({weights.double().sum().item() for weights in one["weights"]}) == STEPS
    first, last = ALLOWED.get(case, (1e-12, 1e-9))
    for other in two:
        assert (other["gradient"] - one["gradient"]).norm() <= first * one["gradient"].norm()
        for mine, theirs in zip(other["weights"], one["weights"], strict=True):
            assert (mine - theirs).norm() <= last * theirs.norm()
        for mine, theirs in zip(other["figures"], one["figures"], strict=True):
            # Advantages, weights and log-probabilities of the trainer are float32.
            assert case in ALLOWED or mine == pytest.approx(theirs, rel=1e-5, abs=1e-6)
    # However they round, the weights of both processes stay equal.
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(two[0]["weights"], two[1]["weights"], strict=True))


@pytest.mark.parametrize("mode", MODES)
def test_runs_resumed_with_another_number_of_processes_are_the_same(runs, mode):
    *_, folder = runs
    one_again = folder / mode / "two then one"
    train(one_again, Given, resume=True)
    for run in (one_again, folder / mode / "one then two"):
        assert_same_but_for_rounding(run, folder / "whole")
        assert json.loads((run / "summary.json").read_text())["steps"] == 4


def assert_same_but_for_rounding(run: Path, other: Path) -> None:
    (weights,), (theirs,) = saved_weights(run).values(), saved_weights(other).values()
    assert weights.keys() == theirs.keys()
    for name, weight in theirs.items():
        assert (weights[name] - weight).norm() <= 1e-9 * weight.norm(), name
    for mine, others in zip(figures(run), figures(other), strict=True):
        assert mine == pytest.approx(others, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_sampling_ahead_from_a_server_by_the_first_process(runs, mode):
    assert_same_but_for_rounding(runs[2] / mode / "served", runs[2] / "served")
    assert figures(runs[2] / mode / "served")[-1]["sampling/importance_sampling_ratio/mean"] != 1


@pytest.mark.parametrize("mode", MODES)
def test_sampling_from_a_queue_by_the_first_process(runs, mode):
    entries = figures(runs[2] / mode / "queued")
    assert [entry["step"] for entry in entries] == [1, 2, 3, 4]
    assert entries[0]["sampling/staleness/max"] == 0
    assert all(entry["sampling/staleness/max"] <= 1 for entry in entries)


@pytest.mark.parametrize("mode", MODES)
def test_runs_resumed_with_two_processes_are_the_same(runs, mode):
    folder = runs[2] / mode
    assert_same_run(folder / "resumed", folder / "sampled")


@pytest.mark.parametrize("mode", MODES)
def test_signal_to_one_process_stops_both_after_the_same_step(runs, mode):
    _, found, folder = runs
    assert [each[f"{mode} killed"] for each in found] == [128 + signal.SIGTERM] * 2
    assert [path.name for path in (folder / mode / "killed").glob("checkpoint-*")] == ["checkpoint-2"]
    assert len(figures(folder / mode / "killed")) == 2


def test_step_that_is_not_finite_in_one_process_stops_both(runs):
    """Also if each holds its shard of the weights, and so of the numbers that are not finite."""
    first, second = (each["bad steps"] for each in runs[1])
    assert first == second
    for mode in MODES:
        assert first[f"{mode} gradient"].startswith(
            "NotFiniteError (True): the gradient is not finite (norm nan, loss nan)"
        )
        assert first[f"{mode} weights"].startswith("NotFiniteError (False): the updated weights are not finite")


def test_error_in_one_process_is_raised_in_all(runs):
    first, second = (each["errors"] for each in runs[1])
    assert first.pop("main") == "KeyError: 'a'"
    assert second.pop("main") == "UserError: process 0 failed: KeyError: 'a'"
    assert first == second
    assert "already holds a run; choose another one, or --resume that run" in first.pop("folder")
    assert first == {
        "second": "UserError: of the second",
        "sampling": "UserError: no more",
        "optim": "UserError: optim='adamw_torch_8bit' is not supported with FSDP: it must be 'adamw_torch_fused'",
        "offload": "UserError: optim_offload=True is not supported with FSDP: it must be False",
        "quantised": "UserError: load_in_4bit=True is not supported with FSDP: it must be False",
        "colocate": "UserError: vllm_mode='colocate' supports one process only; several require vllm_mode='server'",
    }


def test_head_is_gathered_once_per_microbatch(runs):
    # Two layers and once the other weights; the backward gathers the layers again.
    assert all(found["gathers"] == [3, 2] for found in runs[1])


def test_head_in_vocabulary_shards_equals_the_whole_head(runs):
    assert all(found["parts"] <= 1e-12 for found in runs[1])


def test_deal_microbatches_is_even():
    lengths = torch.randint(1, 60, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    rows = [Row([index], length) for index, length in enumerate(lengths)]
    for ranks in (2, 3, 8):
        for packed in (True, False):
            dealt = deal_microbatches(rows, 100, packed, ranks)
            assert len({len(microbatches) for microbatches in dealt}) == 1
            assert sorted(i for own in dealt for m in own for row in m for i in row.samples) == list(range(40))
            longest = [max(row.length for row in m) * len(m) for own in dealt for m in own if m]
            sizes = [sum(row.length for row in m) for own in dealt for m in own if m]
            assert max(sizes if packed else longest) <= 100
            loads = [sum(row.length for m in own for row in m) for own in dealt]
            assert max(loads) - min(loads) <= (10 if packed else 100)
    # A row above the budget is a microbatch by itself; if there are too few rows, some microbatches are empty.
    assert deal_microbatches([Row([0], 300), Row([1], 5), Row([2], 5)], 100, True, 2) == [
        [[Row([0], 300)]],
        [[Row([1], 5), Row([2], 5)]],
    ]
    assert deal_microbatches(rows[:1], 100, True, 3) == [[[rows[0]]], [[]], [[]]]
    assert deal_microbatches([], 100, True, 2) == [[], []]
    assert fill_microbatches([], 100, True) == []


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("preset", PRESETS)
def test_microbatch_without_targets_has_no_gradient(backend, preset, frozen):
    """The microbatch of a process that has fewer of them than the others."""
    hidden, nothing = torch.randn(0, 16, requires_grad=True), torch.zeros(0)
    weight = torch.randn(37, 16, requires_grad=not frozen)
    objective = dataclasses.replace(PRESETS[preset], beta=0.1, entropy_coef=0.1)
    result = linear_policy_loss(
        hidden, weight, nothing.long(), nothing, nothing, objective, old_logprobs=nothing, ref_logprobs=nothing,
        selected=nothing, cu_seqlens=torch.tensor([0]),
    )  # fmt: skip
    result.loss.backward()
    assert hidden.grad.shape == (0, 16)
    assert frozen or weight.grad.abs().sum() == 0
    assert not any(result.stats.values())


def test_is_sharded_is_false_for_one_process():
    assert not is_sharded(GRPOConfig("x", dataset_name="x", reward_funcs=["x"], fsdp=True))
