"""Runs of two processes with more settings: both end with the same weights, and a resumed run is the same."""

import contextlib
import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from grpo_fast.distributed.processes import connect, gather
from support.processes import MODES, flat, train
from support.runs import assert_same_run

pytestmark = pytest.mark.long

SETTINGS = {
    "mixed precision": {"bf16": True},
    "bfloat16": {"dtype": "bfloat16", "learning_rate": 1e-2},
    "lora, bfloat16": {"use_peft": True, "lora_r": 4, "dtype": "bfloat16", "learning_rate": 1e-2},
    "lora, mixed": {"use_peft": True, "lora_r": 4, "lora_dropout": 0.1, "dtype": "bfloat16", "bf16": True},
    "moving reference": {"sync_ref_model": True, "ref_model_sync_steps": 1},
    "dynamic sampling": {"dynamic_sampling": True, "mask_truncated_completions": True, "num_iterations": 2},
    "evaluated": {"eval_steps": 1, "keep_best": True, "log_completions_steps": 1},
    "memory": {"gradient_checkpointing": True, "activation_offloading": True, "tiled_mlp": True},
}


def work(rank: int, port: int, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_PORT": str(port)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    connect(use_cpu=True)
    with contextlib.redirect_stdout(None):
        for mode, fields in MODES.items():
            for name, more in SETTINGS.items():
                trainer = train(folder / mode / name, None, **fields, **more)
                weights = gather(lambda trainer=trainer: flat(trainer.model.parameters()))
                assert torch.equal(*weights), (mode, name)
                train(folder / mode / f"{name}, resumed", None, max_steps=2, **fields, **more)
                train(folder / mode / f"{name}, resumed", None, resume=True, **fields, **more)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, args=(port, folder), nprocs=2)
    return folder


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("mode", MODES)
def test_resumed_runs_with_more_settings_are_the_same(folder, mode, name):
    assert_same_run(folder / mode / f"{name}, resumed", folder / mode / name)
