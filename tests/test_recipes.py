"""Every recipe is a valid configuration whose rewards, prompts and columns are there."""

import re
from pathlib import Path

import pytest
import yaml

from grpo_fast.cli import parse_config
from grpo_fast.data import BUILT_IN, load_rows, load_template
from grpo_fast.rewards import RewardModel

RECIPES = sorted((Path(__file__).parent.parent / "examples").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_valid(path):
    config = parse_config([str(path)])
    rewards = RewardModel(config.reward_funcs, config.reward_weights)
    assert rewards.index(config.eval_metric) >= 0
    load_template(config)
    if config.dataset_name in BUILT_IN and config.dataset_name not in ("gsm8k", "math"):
        train, test = load_rows(config)
        assert len(train) >= config.prompts_per_step
        rewards.check_columns(name for name in test[0] if name != "prompt")


DOCUMENT = Path(__file__).parent.parent / "docs" / "recipes.md"


@pytest.mark.parametrize("text", re.findall(r"```yaml\n(.*?)```", DOCUMENT.read_text(), re.DOTALL))
def test_settings_of_the_papers_are_valid(text, tmp_path):
    path = tmp_path / "paper.yaml"
    base = {"model_name_or_path": "m", "dataset_name": "gsm8k", "reward_funcs": ["math_answer"]}
    path.write_text(yaml.safe_dump({**base, **yaml.safe_load(text)}))
    config = parse_config([str(path)])
    RewardModel(config.reward_funcs, config.reward_weights)
    load_template(config)
