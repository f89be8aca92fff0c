"""Random generators that are put back: those of the CPU and of the GPU in use, and of no other GPU."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from grpo_fast.distributed.rng import kept_torch_generators
from grpo_fast.rollout.base import Sampling
from grpo_fast.rollout.transformers import TransformersRollout
from grpo_fast.rollout.vllm.colocate import undisturbed
from support.tiny import tiny_model


@contextmanager
def checked_sampling():
    tokenizer = SimpleNamespace(eos_token_id=0, pad_token_id=0)
    TransformersRollout(tiny_model(torch.float32), tokenizer, 64).check([3, 4], Sampling(1, 2))
    yield


@pytest.mark.parametrize("kept", [kept_torch_generators, undisturbed, checked_sampling])
def test_generators_of_other_gpus_are_not_touched(kept, monkeypatch):
    touched = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: touched.append(("get", device)))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: touched.append(("set", device)))
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: None)
    before = torch.get_rng_state()
    with kept():
        torch.manual_seed(9)
        torch.rand(3)
    if kept is not checked_sampling:
        assert torch.equal(torch.get_rng_state(), before)
    assert touched == [("get", 3), ("set", 3)]
