"""Training prompts chosen and drawn by how often an evaluation solved them."""

import itertools
import json
from collections import Counter
from types import SimpleNamespace

import pytest
import yaml

from grpo_fast import GRPOConfig
from grpo_fast.cli import main
from grpo_fast.data import PassRates, prompt_order
from grpo_fast.errors import UserError
from grpo_fast.evaluation.run import EvalOptions, EvalRun
from support.runs import SMALL, trainer

BASE = {"model_name_or_path": "m", "dataset_name": "d", "reward_funcs": ["r"]}
CHAT = [{"role": "user", "content": "four"}]
# The rewards of each prompt's completions.
REWARDS = {"one": [1.0, 1.0], "two": [0.0, 1.0, None], "three": [0.4, 0.9], json.dumps(CHAT): [2.0, 0.0, 0.0, 0.0]}


def write(folder, threshold=1.0, rewards=None, metrics=("judge", "length")):
    folder.mkdir()
    lines = []
    for prompt, values in (rewards or REWARDS).items():
        prompt = json.loads(prompt) if prompt.startswith("[") else prompt
        lines += [{"prompt": prompt, "rewards": {"judge": value, "length": 0.0}} for value in values]
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "summary.json").write_text(
        json.dumps({"metrics": {name: {} for name in metrics}, "threshold": threshold})
    )
    return folder


def settings(folder, **fields):
    return GRPOConfig(**{**BASE, "pass_rates": str(folder), **fields})


def rows(*prompts):
    return [{"prompt": prompt} for prompt in prompts]


def test_pass_rates_are_shares_of_the_rewarded_completions(tmp_path):
    folder = write(tmp_path / "eval")
    found = PassRates(settings(folder, max_pass_rate=0.9), "judge").of(rows("one", "two", "three", CHAT))
    assert found == [1, 0.5, 0, 0.25]
    lower = PassRates(settings(write(tmp_path / "lower", 0.5), max_pass_rate=0.9), "judge")
    assert lower.of(rows("three")) == [0.5]


def test_filter_keeps_the_bounds_and_says_what_it_leaves_out(tmp_path):
    made = PassRates(settings(write(tmp_path / "eval"), min_pass_rate=0.25, max_pass_rate=0.5), "judge")
    said = []
    assert made.filter(rows("one", "two", "three", CHAT, "five"), said.append) == rows("two", CHAT)
    assert said == [
        "pass_rates leaves out 3 of 5 training prompts: 1 below min_pass_rate=0.25, 1 above max_pass_rate=0.5, "
        f"1 not in {tmp_path}/eval"
    ]
    assert made.filter(rows("two", "two"), said.append) == rows("two", "two")
    assert len(said) == 1
    with pytest.raises(UserError, match=r"none of the 2 training prompts is left: 1 below .*, 1 above"):
        made.filter(rows("one", "three"), said.append)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "summary.json").unlink(), "holds no finished evaluation: it has no summary.json"),
        (lambda folder: (folder / "samples.jsonl").unlink(), "it has no samples.jsonl"),
        (lambda folder: (folder / "summary.json").write_text("{}"), r"is damaged \(summary.json\): 'metrics'"),
        (lambda folder: (folder / "samples.jsonl").open("a").write("{\n"), r"is damaged \(samples.jsonl, line 12\)"),
    ],
)
def test_damaged_evaluation_is_refused(tmp_path, damage, message):
    folder = write(tmp_path / "eval")
    damage(folder)
    with pytest.raises(UserError, match=message):
        PassRates(settings(folder, min_pass_rate=0.1), "judge")


def test_reward_that_was_not_measured_is_refused(tmp_path):
    with pytest.raises(
        UserError, match=r"has no rewards of 'right'.*; it has those of judge, length; set eval_metric to one"
    ):
        PassRates(settings(write(tmp_path / "eval"), min_pass_rate=0.1), "right")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"min_pass_rate": 0.1}, "min_pass_rate requires pass_rates"),
        ({"prompt_sampling": "curriculum"}, "prompt_sampling requires pass_rates"),
        ({"pass_rates": "f"}, "pass_rates='f' has no effect without one of min_pass_rate"),
        ({"pass_rates": "f", "min_pass_rate": 0.5, "max_pass_rate": 0.1}, "min_pass_rate=0.5 is above max_pass_rate"),
        ({"pass_rates": "f", "max_pass_rate": 1.1}, "max_pass_rate=1.1 is not allowed"),
        ({"pass_rates": "f", "prompt_sampling": "hard"}, "one of uniform, prioritized, curriculum"),
        ({"pass_rates": "f", "prompt_sampling": "prioritized", "shuffle_dataset": False}, "draws prompts at random"),
    ],
)
def test_config_refuses_wrong_pass_rates(fields, message):
    with pytest.raises(UserError, match=message):
        GRPOConfig(**BASE, **fields)


def test_prioritized_order_draws_by_failure_rate_and_resumes():
    rates = [1.0, 0.75, 0.5, 0.0]
    drawn = list(itertools.islice(prompt_order(4, True, 3, 0, "prioritized", rates), 7000))
    counts = Counter(drawn)
    assert counts[0] == 0
    # In proportion to 1, 2 and 4; four standard deviations of the counts are 98, 133 and 138.
    for index, expected in ((1, 1000), (2, 2000), (3, 4000)):
        assert abs(counts[index] - expected) < 140
    again = list(itertools.islice(prompt_order(4, True, 3, 50, "prioritized", rates), 20))
    assert again == drawn[50:70]


def test_curriculum_order_begins_each_epoch_with_the_easiest():
    rates = [0.0, 1.0, 0.5, 0.5, 0.5, 0.5]
    drawn = list(itertools.islice(prompt_order(6, True, 3, 0, "curriculum", rates), 60))
    epochs = [drawn[start : start + 6] for start in range(0, 60, 6)]
    assert all((epoch[0], epoch[-1]) == (1, 0) and sorted(epoch) == list(range(6)) for epoch in epochs)
    # Rows of one rate have another order in each epoch.
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert list(itertools.islice(prompt_order(6, True, 3, 20, "curriculum", rates), 20)) == drawn[20:40]
    assert list(itertools.islice(prompt_order(6, False, 3, 0, "curriculum", rates), 6)) == [1, 2, 3, 4, 5, 0]


def test_prioritized_needs_a_prompt_that_is_not_always_solved(tmp_path):
    made = PassRates(settings(write(tmp_path / "eval"), prompt_sampling="prioritized"), "judge")
    with pytest.raises(UserError, match="never draws a prompt with a pass rate of 1, and all of them have it"):
        made.of(rows("one", "one"))


def test_training_prompts_are_evaluated_then_chosen(tmp_path, capsys):
    """From the command line: evaluate the training prompts, then train on those that are sometimes solved."""
    fields = {"max_train_samples": 30, "num_generations_eval": 4, "eval_metric": "digits_included"}
    path = tmp_path / "sort.yaml"
    path.write_text(yaml.safe_dump({**SMALL, **fields}))
    options = ["--split", "train", "--threshold", "0.3", "--output", str(tmp_path / "eval")]
    assert main(["eval", str(path), *options]) == 0
    lines = [json.loads(line) for line in (tmp_path / "eval" / "samples.jsonl").read_text().splitlines()]
    passed: dict[str, list[bool]] = {}
    for line in lines:
        passed.setdefault(line["prompt"], []).append(line["rewards"]["digits_included"] >= 0.3)
    rates = {prompt: sum(values) / len(values) for prompt, values in passed.items()}
    assert len(set(rates.values())) > 1, "the test needs prompts of different difficulty"
    assert "training prompts, 4 completions" in capsys.readouterr().out

    chosen = {"pass_rates": str(tmp_path / "eval"), "min_pass_rate": 0.01, "prompt_sampling": "curriculum"}
    made = trainer(tmp_path / "run", **fields, **chosen)
    all_rows = trainer(tmp_path / "all", **fields).train_rows
    assert made.train_rows == [row for row in all_rows if rates[row["prompt"]] > 0] != all_rows
    assert "warning: pass_rates leaves out" in capsys.readouterr().err
    drawn = [rates[made.train_rows[index]["prompt"]] for index in made.draw(len(made.train_rows))]
    assert drawn == sorted(drawn, reverse=True)
    made.close()


def test_interrupted_evaluation_of_training_prompts_continues_with_them(tmp_path):
    for chosen in (False, True):
        made = SimpleNamespace(
            options=EvalOptions(output=tmp_path, split="train" if chosen else "test"), folder=tmp_path
        )
        made.whole = made
        assert ("--split train" in EvalRun.resume_command(made)) == chosen
