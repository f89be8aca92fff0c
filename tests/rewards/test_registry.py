"""Loading reward functions by name."""

import pytest

from grpo_fast.errors import UserError
from grpo_fast.rewards import RewardModel, final_number, load_reward


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("exact_anser", "did you mean 'exact_answer'"),
        ("no_such_module.reward", "cannot be loaded: ModuleNotFoundError: No module named 'no_such_module'"),
        ("json.no_such_reward", "no callable 'no_such_reward'"),
        ("missing.py:reward", "no such file: missing.py"),
        ("kimi_length", r"kimi_length\(\) is not allowed: write kimi_length\(judge\)"),
        ("soft_overlong(10)", r"write soft_overlong\(max_completion_len, soft_punish_cache\)"),
        ("soft_overlong(10, ten)", r"write soft_overlong\(max_completion_len, soft_punish_cache\)"),
        ("soft_overlong(10, 20)", "must be from 1 to the first"),
    ],
)
def test_load_reward_unknown_name(name, message):
    with pytest.raises(UserError, match=message):
        load_reward(name)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def mine(:", "cannot be loaded: SyntaxError"),
        ("import no_such_module_here", "No module named 'no_such_module_here'"),
        ("mine = 3", "no callable 'mine'"),
    ],
)
def test_load_reward_broken_file(tmp_path, text, message):
    (tmp_path / "broken.py").write_text(text)
    with pytest.raises(UserError, match=message):
        load_reward(f"{tmp_path / 'broken.py'}:mine")


def test_load_reward_file_imports_its_neighbour(tmp_path):
    (tmp_path / "neighbour_of_mine.py").write_text("VALUE = 2.0")
    (tmp_path / "with_neighbour.py").write_text(
        "from neighbour_of_mine import VALUE\ndef mine(prompts, **columns):\n    return [VALUE] * len(prompts)"
    )
    model = RewardModel([f"{tmp_path / 'with_neighbour.py'}:mine"], None)
    assert model(["a"], ["b"], {}).total.item() == 2


def reward_file(path, value):
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"def score(prompts, **columns):\n    return [{value}] * len(prompts)\n")
    return f"{path}:score"


def test_metric_names_functions_of_one_name(tmp_path):
    maths, code = reward_file(tmp_path / "maths.py", 1.0), reward_file(tmp_path / "code.py", 2.0)
    model = RewardModel([maths, "exact_answer", code, "kimi_length(maths.score)"], None)
    assert model.names == ["maths.score", "exact_answer", "code.score", "kimi_length"]
    assert model(["q"], ["a"], {"answer": ["b"], "completion_ids": [[1]]}, 1).each.tolist() == [[1, 0, 2, 0]]
    assert RewardModel([maths], None).names == ["score"]


def test_metric_names_are_the_shortest_distinct_ends(tmp_path):
    sources = [reward_file(tmp_path / folder / "rewards.py", 1.0) for folder in ("easy", "hard")]
    assert RewardModel(sources, None).names == ["easy.rewards.score", "hard.rewards.score"]
    (tmp_path / "mine.py").write_text("def exact_answer(prompts, **columns):\n    return [0.5] * len(prompts)\n")
    mine = f"{tmp_path / 'mine.py'}:exact_answer"
    assert RewardModel(["exact_answer", mine], None).names == ["exact_answer", "mine.exact_answer"]
    lengths = ["exact_answer", "final_number", "kimi_length(exact_answer)", "kimi_length(final_number)"]
    assert RewardModel(lengths, None).names == lengths


def test_metric_names_function_listed_twice():
    with pytest.raises(UserError, match="'exact_answer' is listed 2 times; set its weight in reward_weights"):
        RewardModel(["exact_answer", "exact_answer"], None)


def test_load_reward_files_with_different_neighbours_of_one_name(tmp_path):
    """Otherwise the second file would import the first file's neighbour."""
    sources = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "shared_helper.py").write_text(f"VALUE = {name!r}")
        (tmp_path / name / "rewards.py").write_text(f"import shared_helper\ndef {name}(prompts, **columns): ...\n")
        sources.append(f"{tmp_path / name / 'rewards.py'}:{name}")
    RewardModel(sources[:1], None)
    with pytest.raises(
        UserError, match=r"first/shared_helper.py and .*second/shared_helper.py are modules of the same name"
    ):
        RewardModel(sources, None)


def test_load_reward_dotted_path():
    assert load_reward("grpo_fast.rewards.final_number") is final_number
