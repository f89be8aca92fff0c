"""README.md: its Python runs, its commands name what exists, and it stays short."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README, re.S)


def test_readme_length():
    assert len(README.split()) <= 1000


def test_readme_loss_snippets():
    short, whole, _ = PYTHON
    names = {}
    torch.manual_seed(0)
    exec(whole, names)
    assert names["hidden"].grad.abs().sum() > 0
    assert names["head"].weight.grad.abs().sum() > 0
    # Masked positions have no gradient.
    assert names["hidden"].grad[~names["mask"]].abs().sum() == 0
    names["hidden"].grad = None
    exec(short, names | {"lm_head": names["head"], "advantages": torch.tensor([1.0, -1.0, 0.5, -0.5])})
    assert names["hidden"].grad.abs().sum() > 0


def test_readme_reward_snippet(tmp_path):
    from grpo_fast.rewards import RewardModel

    (snippet,) = (code for code in PYTHON if code.startswith("# my_rewards.py\n"))
    (tmp_path / "my_rewards.py").write_text(snippet)
    model = RewardModel([f"{tmp_path / 'my_rewards.py'}:short_and_right"], None)
    assert model(["q"], ["it is 7"], {"answer": ["7"]}).total.item() == pytest.approx(1 - 0.007)


def test_readme_imports():
    """Those of the table of drop-ins, apart from the one of TRL, which may not be installed."""
    lines = re.findall(r"`(from grpo_fast[\w.]* import \w+)`", README)
    assert len(lines) == 4
    for line in lines:
        if ".trl " not in line:
            exec(line)
