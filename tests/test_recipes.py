"""Every recipe is a valid configuration whose rewards, prompts and columns are there."""

from pathlib import Path

import pytest

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
