"""The example of the lecture's experiment: on our operations it samples, rewards and learns what plain torch does."""

import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import policy_gradient


def plain_included_and_ordered(prompt: list[int], response: list[int]) -> float:
    """As the lecture defines it, on lists."""
    included = sum(number in response for number in prompt)
    return included + sum(left <= right for left, right in pairwise(response))


def plain_right_places(prompt: list[int], response: list[int]) -> float:
    return sum(number == other for number, other in zip(sorted(prompt), response, strict=True))


@pytest.mark.parametrize(
    ("name", "plain"), [("full", plain_right_places), ("partial", plain_included_and_ordered)]
)  # fmt: skip
def test_rewards_equal_those_on_lists(name, plain):
    prompts, responses = torch.randint(4, (2, 200, 4))
    expected = [plain(*pair) for pair in zip(prompts.tolist(), responses.tolist(), strict=True)]
    assert policy_gradient.REWARDS[name](prompts, responses).tolist() == expected
    # The lecture's example: more of this response is right than its places say.
    prompt, response = torch.tensor([[3, 1, 0, 2]]), torch.tensor([[0, 3, 1, 2]])
    assert policy_gradient.REWARDS[name](prompt, response).item() == {"full": 1, "partial": 6}[name]


@pytest.mark.parametrize("name", policy_gradient.REWARDS)
@pytest.mark.parametrize("steps", [1, 3])
def test_training_equals_plain_torch_in_every_epoch(name, steps):
    """In float64, where a difference in rounding changes no sampled number."""
    reward = policy_gradient.REWARDS[name]
    settings = {"epochs": 25, "steps_per_epoch": steps, "dtype": torch.float64}
    fused = list(policy_gradient.train(reward, **settings))
    plain = list(policy_gradient.train(reward, **settings, loss_of=policy_gradient.plain_loss))
    assert [epoch[:2] for epoch in fused] == [epoch[:2] for epoch in plain]
    assert [epoch.loss for epoch in fused] == pytest.approx([epoch.loss for epoch in plain], rel=1e-9, abs=1e-12)
    assert fused[-1].reward > fused[0].reward + 0.5


def test_length_bias_of_grpo_and_not_of_dr_grpo():
    """Under `grpo` right responses become shorter and wrong ones longer, though nothing depends on their lengths."""
    gaps = {name: list(policy_gradient.length_bias(name, epochs=60)) for name in ("grpo", "dr_grpo")}
    gap = {name: sum(wrong - right for right, wrong in run[-10:]) / 10 for name, run in gaps.items()}
    assert gap["grpo"] > 10 > 4 > abs(gap["dr_grpo"])


@pytest.mark.parametrize(
    ("script", "argument", "message"),
    [
        ("policy_gradient.py", "--seeds=0", "--seeds=0 must be at least 1"),
        ("policy_gradient.py", "--output=x.txt", "--output=x.txt must end in .png, .svg or .pdf"),
        ("ppo.py", "--output=nowhere/x.json", "--output=nowhere/x.json: the folder nowhere does not exist"),
    ],
)
def test_example_refuses_wrong_arguments_before_it_trains(script, argument, message):
    path = Path(policy_gradient.__file__).with_name(script)
    done = subprocess.run([sys.executable, path, argument], capture_output=True, text=True)
    assert done.returncode == 2
    assert message in done.stderr
