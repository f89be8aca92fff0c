"""The recipes that ship with the package, and the settings that docs/recipes.md lists."""

import importlib.util
import re
from importlib import resources
from pathlib import Path

import pytest
import yaml

from grpo_fast.cli import main, parse_config
from grpo_fast.config import GRPOConfig
from grpo_fast.data import BUILT_IN, load_rows, load_template
from grpo_fast.errors import UserError
from grpo_fast.recipes import OWN_RECIPES, RECIPES, find_config
from grpo_fast.rewards import RewardModel

DOCUMENT = Path(__file__).parent.parent / "docs" / "recipes.md"


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_is_valid(name):
    config = parse_config([name, "--seed", "3"])
    assert (config.run_name, config.seed) == (name, 3)
    rewards = RewardModel(config.reward_funcs, config.reward_weights)
    assert rewards.index(config.eval_metric) >= 0
    load_template(config)
    if config.dataset_name in BUILT_IN and config.dataset_name not in ("gsm8k", "math"):
        train, test = load_rows(config)
        assert len(train) >= config.prompts_per_step
        rewards.check_columns(name for name in test[0] if name != "prompt")


def test_recipes_are_files_of_the_package():
    """A wheel holds every file of the packages that pyproject.toml names."""
    folder = resources.files("grpo_fast").joinpath("recipes")
    shipped = {file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml")}
    assert shipped == set(RECIPES) >= {"sort", "smollm2_addition", "gsm8k_qwen"}


def test_find_config_prefers_the_recipe_to_a_file_without_suffix(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("sort", "mine", "sort.yaml"):
        (tmp_path / name).write_text("seed: 1\n")
    assert find_config("sort") == RECIPES["sort"]
    for name in ("sort.yaml", "./sort", "./mine", str(tmp_path / "mine")):
        assert find_config(name) == Path(name)


def test_find_config_unknown_name_lists_the_recipes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").write_text("seed: 1\n")
    with pytest.raises(UserError, match=r"'mine' is not a recipe; there is: countdown_qwen, .*: mine.yaml or ./mine$"):
        find_config("mine")
    for command in ("train", "plan", "eval", "serve"):
        assert main([command, "srot"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "'srot' is not a recipe (did you mean 'sort'?); there is: countdown_qwen, " in line
    assert main(["train", "qwen3_1.7b_full_24"]) == 2
    assert "did you mean 'qwen3_1.7b_full_24gb'" in capsys.readouterr().err


def test_find_config_former_path_of_a_recipe_says_its_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert find_config("examples/sort.yaml") == RECIPES["sort"]
    assert capsys.readouterr().err == "note: examples/sort.yaml is the recipe 'sort' of this package\n"
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "sort.yaml").write_text("seed: 1\n")
    assert find_config("examples/sort.yaml") == Path("examples/sort.yaml")


def test_recipes_command_describes_each_in_a_line(capsys):
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()[2:]
    described = [line for line in lines if line.startswith("  ")]
    own = [name for recipes in OWN_RECIPES.values() for name in recipes]
    assert [line.split()[0] for line in described] == [*RECIPES, *own]
    assert all(len(line) < 120 and len(line.split()) > 5 for line in described)
    assert main(["recipes", "sort"]) == 2


@pytest.mark.parametrize("text", re.findall(r"```yaml\n(.*?)```", DOCUMENT.read_text(), re.DOTALL))
def test_settings_of_papers_are_valid(text, tmp_path):
    path = tmp_path / "paper.yaml"
    base = {"model_name_or_path": "m", "dataset_name": "gsm8k", "reward_funcs": ["math_answer"]}
    path.write_text(yaml.safe_dump({**base, **yaml.safe_load(text)}))
    config = parse_config([str(path)])
    RewardModel(config.reward_funcs, config.reward_weights)
    load_template(config)


@pytest.fixture(scope="module")
def filler():
    spec = importlib.util.spec_from_file_location("fill_recipes", DOCUMENT.with_name("fill_recipes.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_table_of_methods_is_what_presets_and_blocks_set(filler, tmp_path):
    text = DOCUMENT.read_text(encoding="utf-8")
    assert filler.fill(text, tmp_path) == text, "python docs/fill_recipes.py writes the table"
    assert set(filler.blocks(text)) == set(filler.METHODS)


# By hand, from docs/objectives.md and the fields' defaults.
ALONE = {
    "grpo": (
        "none", "the group's mean, over the group's deviation", "mean over an answer's tokens", "a token, 0.8 to 1.2",
    ),
    "dr_grpo": (
        "none", "the group's mean, over the group's deviation", "sum over an answer's tokens, by a constant",
        "a token, 0.8 to 1.2",
    ),
    "gspo": (
        "none", "the group's mean, over the group's deviation", "each answer once",
        "an answer, geometric mean, 0.9997 to 1.0004",
    ),
    "rloo": ("none", "the group's mean, over the group's deviation", "each answer once", "an answer, 0.8 to 1.2"),
    "cispo": (
        "none", "the group's mean, over the group's deviation", "all tokens of the step alike",
        "a token, at most 5, as a constant",
    ),
}  # fmt: skip


@pytest.mark.parametrize("preset", ALONE)
def test_table_describes_a_preset(filler, preset):
    base = {"model_name_or_path": "m", "dataset_name": "d", "reward_funcs": ["r"]}
    assert filler.describe(GRPOConfig(**base, loss_type=preset)) == ALONE[preset]
    found = filler.describe(
        GRPOConfig(**base, loss_type=preset, beta=0.1, reward_baseline="leave_one_out", scale_rewards="none")
    )
    assert found[:2] == ("k3 times the ratio, 0.1", "the others' mean, no deviation")
    in_reward = filler.describe(GRPOConfig(**base, loss_type=preset, beta=0.1, kl_in_reward=True))
    assert in_reward[0] == "k1 in the reward, 0.1"
