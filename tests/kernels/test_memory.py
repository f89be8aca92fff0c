"""Real peak memory of `linear_policy_loss`, forward and backward, read from the operating system in a fresh process."""

import subprocess
import sys
from pathlib import Path

import pytest

MIB = 2**20
H, V = 576, 49152
BUDGET = 256 * MIB
# Memory that the BLAS and the allocator keep. The largest measured total, 254 MiB at N=5192, is within the budget.
SLACK = 16 * MIB

SCRIPT = """
import sys, torch
from grpo_kernels import linear_policy_loss, policy_loss
N, full = int(sys.argv[1]), sys.argv[2] == "full"
torch.set_num_threads(2)

def status(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field)) * 1024

def step(n):
    h = hidden[:n].detach().requires_grad_()
    if full:
        logprobs = torch.log_softmax(h @ weight.T, -1).gather(1, targets[:n, None]).squeeze(1)
        loss = policy_loss(logprobs, advantages[:n], weights[:n]).loss
    else:
        loss = linear_policy_loss(h, weight, targets[:n], advantages[:n], weights[:n]).loss
    loss.backward()
    grads = h.grad, weight.grad
    weight.grad = None
    return grads

hidden, weight = torch.randn(N, 576), (torch.randn(49152, 576) / 24).requires_grad_()
targets, advantages, weights = torch.randint(0, 49152, (N,)), torch.randn(N), torch.full((N,), 1 / N)
step(2)
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
grads = step(N)
print(status("VmHWM") - before)
"""


def peak(tokens: int, kind: str) -> int:
    """Bytes beyond what was resident with the inputs and after a small warm-up."""
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(tokens), kind], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_linear_policy_loss_peak_memory():
    # 5192 tokens fill four chunks; the other counts leave some of the budget unused.
    figures = {tokens: peak(tokens, "fused") for tokens in (4096, 5192, 8192)}
    full = peak(4096, "full")
    for tokens, size in figures.items():
        gradients = 4 * (tokens * H + V * H)
        print(f"N={tokens}: {size / MIB:.0f} MiB, of which gradients {gradients / MIB:.0f} MiB")
        assert size <= BUDGET + gradients + SLACK
    print(f"N=4096, full logits: {full / MIB:.0f} MiB")
    assert full > 5 * figures[4096]
