"""docs/drop-in.md: every block of Python runs or, where a peer is missing, parses; both sides of a change agree."""

import importlib
import re
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.plots import TABLES
from grpo_fast.errors import UserError
from support.tiny import tiny_model

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "drop-in.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.S)


def block(part: str) -> str:
    """The one block that has `part` in it."""
    (found,) = [code for code in BLOCKS if part in code]
    return found


@pytest.mark.parametrize("code", BLOCKS)
def test_every_block_parses(code):
    compile(code, "drop-in.md", "exec")


def test_block_of_any_loop_equals_its_logits_form():
    """The losses and their gradients with and without logits are the same."""
    names = {}
    for part in ("def loss_with_logits", "def loss_without_logits"):
        exec(block(part), names)
    model, ids = tiny_model(torch.float32), torch.randint(2, 41, (3, 9))
    mask = (torch.arange(6) < torch.tensor([6, 2, 4])[:, None]).long()
    found = []
    for name in ("loss_with_logits", "loss_without_logits"):
        model.zero_grad()
        loss = names[name](model, ids, mask, torch.tensor([1.0, -0.5, 0.3]))
        loss.backward()
        found.append((loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-4, atol=1e-6)
    assert (found[1][1] - found[0][1]).norm() < 1e-4 * found[0][1].norm()


@pytest.mark.parametrize("part", ["linear_policy_loss, token_weights", "LigerFusedLinearGRPOLoss(beta"])
def test_independent_blocks_run(part):
    names = {}
    exec(block(part), names)
    assert names["hidden"].grad.abs().sum() > 0


def test_block_of_trl_trains(tmp_path):
    trl = pytest.importorskip("trl", minversion="1.16")
    from datasets import Dataset

    from grpo_fast.model.loading import digit_tokenizer

    tokenizer, built = digit_tokenizer(), []
    fields = {
        "output_dir": str(tmp_path), "report_to": "none", "use_cpu": True, "bf16": False, "num_generations": 2,
        "per_device_train_batch_size": 2, "max_completion_length": 3, "max_steps": 1, "save_strategy": "no",
    }  # fmt: skip
    for part in ("def train_with_trl", "def train_with_ours"):
        names = {}
        exec(block(part), names)
        make = names[re.search(r"def (\w+)", block(part))[1]]
        data = Dataset.from_list([{"prompt": "21>"}] * 4)
        built.append(make(tiny_model(torch.float32), lambda completions, **_: [1.0, 0.0], data, tokenizer, **fields))
    assert type(built[0]) is trl.GRPOTrainer
    assert issubclass(type(built[1]), trl.GRPOTrainer)
    assert type(built[1]) is not trl.GRPOTrainer
    built[1].train()


def test_import_without_trl_names_the_extra(monkeypatch):
    monkeypatch.delitem(sys.modules, "grpo_fast.integrations.trl", raising=False)
    for name in [name for name in sys.modules if name.split(".")[0] == "trl"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(UserError, match=r"pip install 'grpo-fast\[trl\]'") as caught:
        importlib.import_module("grpo_fast.integrations.trl")
    assert "\n" not in str(caught.value)


def test_links_and_tables_exist():
    for path in set(re.findall(r"\]\(([\w./-]+)\)", PAGE)):
        assert (ROOT / "docs" / path).exists(), path
    headings = {title.lower().replace(" ", "-") for title in re.findall(r"^## (.*)$", PAGE, re.M)}
    assert set(re.findall(r"\]\(#([\w-]+)\)", PAGE)) <= headings
    assert set(re.findall(r"<!-- table: ([\w-]+)", PAGE)) <= set(TABLES)
