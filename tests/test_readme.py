"""The README's Python runs as it stands, and its commands name what exists."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_fused_loss_snippet(capsys):
    snippet = next(code for code in re.findall(r"```python\n(.*?)```", README, re.S) if "linear_policy_loss(" in code)
    names = {}
    torch.manual_seed(0)
    exec(snippet, names)
    assert names["hidden"].grad.abs().sum() > 0
    assert names["head"].weight.grad.abs().sum() > 0
    # Masked positions have no gradient.
    assert names["hidden"].grad[~names["mask"]].abs().sum() == 0


def test_the_reward_snippet(tmp_path):
    from grpo_fast.rewards import RewardModel

    snippet = next(code for code in re.findall(r"```python\n(.*?)```", README, re.S) if "my_rewards.py" in code)
    (tmp_path / "my_rewards.py").write_text(snippet)
    model = RewardModel([f"{tmp_path / 'my_rewards.py'}:short_and_right"], None)
    assert model(["q"], ["it is 7"], {"answer": ["7"]}).total.item() == pytest.approx(1 - 0.007)


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\(([\w./-]+)\)", README))))
def test_links_lead_somewhere(path):
    assert (ROOT / path).exists()


def test_make_targets_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"^make (\w+)", README, re.M)) <= targets
