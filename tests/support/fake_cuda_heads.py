"""Both operations on the output head on a fake GPU, for `test_fake_cuda.py`: ``OPERATION DTYPES TRAINED HxV``."""

import sys
from contextlib import nullcontext
from unittest import mock

import torch

from grpo_kernels import PRESETS, Support, doctor, linear_logprob, linear_policy_loss
from grpo_kernels._head import Head
from grpo_kernels.weight_copies import kept_weight_copies
from support.fake_cuda import main

N = 4096
# Names of hidden states', the weight's and autocast's dtypes.
DTYPES = {
    "bf16": (torch.bfloat16, torch.bfloat16, None),
    "fp16": (torch.float16, torch.float16, None),
    "fp32": (torch.float32, torch.float32, None),
    "fp32-bf16": (torch.bfloat16, torch.float32, torch.bfloat16),
    "fp32-fp16": (torch.float16, torch.float32, torch.float16),
    # Without autocast both are promoted.
    "bf16-fp32": (torch.float32, torch.bfloat16, None),
}


def tensors(dtypes: str, trained: str, shape: str) -> tuple[dict, dict]:
    hidden_dtype, weight_dtype, _ = DTYPES[dtypes]
    H, V = map(int, shape.split("x"))
    head = {
        "hidden": torch.empty(N, H, dtype=hidden_dtype, device="cuda", requires_grad=trained != "none"),
        "weight": torch.empty(V, H, dtype=weight_dtype, device="cuda", requires_grad=trained == "head"),
        "targets": torch.empty(N, dtype=torch.int64, device="cuda"),
    }
    return head, {name: torch.empty(N, device="cuda") for name in ("advantages", "weights")}


def autocast(dtypes: str) -> torch.autocast:
    dtype = DTYPES[dtypes][2]
    return torch.autocast("cuda", dtype or torch.bfloat16, enabled=dtype is not None)


def finish(loss: torch.Tensor, head: dict) -> dict[str, str | None]:
    if loss.requires_grad:
        loss.backward()
    grads = {name: head[name].grad for name in ("hidden", "weight")}
    return {name: None if grad is None else str(grad.dtype).removeprefix("torch.") for name, grad in grads.items()}


def logprob(dtypes: str, trained: str, shape: str, **options) -> dict:
    head, _ = tensors(dtypes, trained, shape)
    with autocast(dtypes):
        logprobs = linear_logprob(**head, **options)
    return finish(logprobs.sum(), head)


def entropy(dtypes: str, trained: str, shape: str) -> dict:
    head, _ = tensors(dtypes, trained, shape)
    with autocast(dtypes):
        logprobs, entropies = linear_logprob(**head, return_entropy=True)
    return finish(logprobs.sum() + entropies.sum(), head)


def loss(dtypes: str, trained: str, shape: str, **options) -> dict:
    head, tokens = tensors(dtypes, trained, shape)
    with autocast(dtypes):
        result = linear_policy_loss(**head, **tokens, objective=PRESETS["dapo"], **options)
    return finish(result.loss, head)


def loss_options(dtypes: str, trained: str, shape: str) -> dict:
    V = int(shape.split("x")[1])
    bias = torch.empty(V, dtype=DTYPES[dtypes][1], device="cuda", requires_grad=trained == "head")
    return loss(
        dtypes, trained, shape, bias=bias, temperature=0.8, softcap=30.0, logit_scale=0.5, return_entropy=True,
        backend="triton",
    )  # fmt: skip


def loss_torch(dtypes: str, trained: str, shape: str) -> dict:
    return loss(dtypes, trained, shape, backend="torch", temperature=0.7, softcap=30.0)


def kept_ids(operation: str, dtypes: str, trained: str, shape: str, share: str) -> dict:
    """An operation over a support, whose kept ids are a share of the vocabulary."""
    V = int(shape.split("x")[1])
    ids = torch.empty(int(N * V * float(share)), dtype=torch.int32, device="cuda")
    support = Support(ids, torch.empty(N + 1, dtype=torch.int64, device="cuda"))
    options = {"temperature": 0.8, "softcap": 30.0, "support": support, "rows": "all"}
    if operation == "logprob":
        return logprob(dtypes, trained, shape, **options)
    return loss(dtypes, trained, shape, return_entropy=True, **options)


def loss_without_copy(dtypes: str, trained: str, shape: str) -> dict:
    """Kernels that get the weight as it is, whatever shared memory that needs."""
    with mock.patch.object(Head, "prepared", lambda head: head):
        # Several chunks, though there is memory for one.
        return loss(dtypes, trained, shape, max_buffer_bytes=512 << 20)


def step(dtypes: str, trained: str, shape: str, kept: str) -> None:
    """Two microbatches of both operations; with "changed" the weight changes between them."""
    head, tokens = tensors(dtypes, trained, shape)
    with kept_weight_copies() if kept != "alone" else nullcontext():
        for _ in range(2):
            with autocast(dtypes):
                loss = linear_policy_loss(**head, **tokens, objective=PRESETS["dapo"]).loss
                logprobs = linear_logprob(**head)
            (loss + logprobs.sum()).backward()
            if kept == "changed":
                with torch.no_grad():
                    head["weight"].mul_(2)


def check_up(dtypes: str, *_: str) -> None:
    """What `python -m grpo_kernels.doctor` runs in a dtype."""
    dtype = DTYPES[dtypes][0]
    given = {
        name: torch.empty(t.shape, dtype=t.dtype, device="cuda")
        for name, t in doctor.inputs(dtype, torch.device("cpu")).items()
    }
    for operation in doctor.CHECKS:
        for backend in ("triton", "torch"):
            doctor.results(operation, given, None, backend)


OPERATIONS = {
    f.__name__: f
    for f in (kept_ids, logprob, entropy, loss, loss_options, loss_torch, loss_without_copy, step, check_up)
}


def case(name: str):
    operation, *arguments = name.split()
    return lambda: OPERATIONS[operation](*arguments)


if __name__ == "__main__":
    main({name: case(name) for name in sys.argv[2:]})
