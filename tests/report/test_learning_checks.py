"""Warnings that nothing is being learned: when each is due, what it says, and that a run gives it once."""

import math

import pytest
import torch

from grpo_fast.config import GRPOConfig
from grpo_fast.report import write_report
from grpo_fast.report.learning_checks import PATIENCE, LearningSignals
from grpo_fast.report.run import read_lines
from grpo_fast.rollout.sampler import Sampler
from support.runs import trainer
from support.small import SMALL

FINE = {"reward": 0.5, "reward_std": 0.3, "frac_reward_zero_std": 0.25, "completions/clipped_ratio": 0.5}
FLAT = {**FINE, "frac_reward_zero_std": 1.0}
CONSTANT = {**FLAT, "reward_std": 0.0}
NO_REWARD = {**CONSTANT, "reward": math.nan}
CUT_OFF = {**FINE, "completions/clipped_ratio": 1.0}


def observed(batches: list[dict], **fields) -> list[dict[str, str]]:
    signals = LearningSignals(GRPOConfig(**{**SMALL, "max_steps": 100, **fields}))
    return [signals.observe(figures) for figures in batches]


@pytest.mark.parametrize(
    ("figures", "fields", "name", "words"),
    [
        (NO_REWARD, {}, "no reward", ["no completion got a reward", "reward_funcs"]),
        (CONSTANT, {}, "constant reward", ["had the same reward, 0.5,", "reward_funcs", "too hard or too easy"]),
        (FLAT, {}, "no variance", ["num_generations=4", "temperature=1", "switch on dynamic_sampling"]),
        (FLAT, {"dynamic_sampling": True}, "no variance", ["raise max_num_gen_batches=10"]),
        (CUT_OFF, {}, "all truncated", ["max_completion_length=3; raise it"]),
        (CUT_OFF, {"mask_truncated_completions": True}, "all truncated", ["mask_truncated_completions", "nothing is"]),
    ],
)
def test_observe_problem_in_several_batches_warns_once(figures, fields, name, words):
    found = observed([figures] * 10, **fields)
    assert [list(batch) for batch in found] == [[name] if batch == PATIENCE else [] for batch in range(1, 11)]
    assert all(word in found[PATIENCE - 1][name] for word in [*words, f"for {PATIENCE} batches in a row"])


def test_observe_problem_with_interruptions_gives_no_warning():
    assert not any(observed([FLAT, FLAT, FINE] * 5))
    assert not any(observed([FLAT, FLAT, CONSTANT, CONSTANT] * 5))


def test_observe_rewards_and_lengths_are_checked_separately():
    found = observed([CONSTANT | {"completions/clipped_ratio": 1.0}] * PATIENCE)
    assert list(found[-1]) == ["constant reward", "all truncated"]


def test_observe_equal_uncentred_rewards_warns_only_at_zero():
    fields = {"reward_baseline": "none", "scale_rewards": "none"}
    assert not any(observed([CONSTANT] * PATIENCE, **fields))
    assert list(observed([CONSTANT | {"reward": 0.0}] * PATIENCE, **fields)[-1]) == ["constant reward"]


def test_observe_short_run_warns_in_its_last_batch():
    found = observed([NO_REWARD], max_steps=2, num_iterations=2)
    assert found[0]["no reward"].startswith("in the only batch no completion got a reward")


def name_of_constant(*batches: list[float], **fields) -> str:
    """The warning due after the given batches and PATIENCE of the last one, whose rewards are all equal."""
    signals = LearningSignals(GRPOConfig(**{**SMALL, "max_steps": 100, **fields}))
    for rewards in batches[:-1]:
        signals.see(rewards)
        assert not signals.observe(FINE)
    for _ in range(PATIENCE):
        signals.see(batches[-1])
        found = signals.observe(CONSTANT | {"reward": batches[-1][0]})
    ((name, text),) = found.items()
    assert ("the task may be solved; stop the run, or make the task harder" in text) == (name == "solved")
    return name


def test_observe_constant_highest_reward_is_called_solved():
    assert name_of_constant([0.0, 1.0], [1.0, 1.0]) == "solved"
    assert name_of_constant([0.0, math.nan], [0.5, 0.5]) == "solved"
    # Below what some completion had earlier, and constant from the start.
    assert name_of_constant([0.0, 1.0], [0.5, 0.5]) == "constant reward"
    assert name_of_constant([0.0, 1.0], [0.0, 0.0]) == "constant reward"
    assert name_of_constant([1.0, 1.0]) == "constant reward"
    assert name_of_constant([math.nan], [1.0, 1.0]) == "constant reward"


REWARDS = {
    "no reward": "[None] * len(prompts)",
    "constant reward": "[0.25] * len(prompts)",
    "no variance": "[float(prompt[0]) for prompt in prompts]",
    "all truncated": "[float(index % 3) for index, _ in enumerate(prompts)]",
}


@pytest.mark.parametrize("name", REWARDS)
def test_train_warns_once_even_after_a_resume(tmp_path, monkeypatch, capsys, name):
    (tmp_path / "mine.py").write_text(f"def mine(prompts, **columns):\n    return {REWARDS[name]}\n")
    fields = {"reward_funcs": [f"{tmp_path / 'mine.py'}:mine"]}
    if name == "all truncated":
        # Their loss has no token: it must be 0, not NaN.
        fields["mask_truncated_completions"] = True
        generate = Sampler.generate

        def cut_off(self, prompts, sampling):
            responses = generate(self, prompts, sampling)
            return [response._replace(finish_reason="length") for response in responses]

        monkeypatch.setattr(Sampler, "generate", cut_off)
    made = trainer(tmp_path / "run", max_steps=5, **fields)
    before = torch.cat([p.detach().flatten() for p in made.model.parameters()])
    made.train()
    said = capsys.readouterr().out
    assert said.count("warning: ") == said.count(f"warning: step {PATIENCE}: for {PATIENCE} batches in a row ") == 1
    # Nothing moved, and nothing became NaN.
    assert torch.equal(before, torch.cat([p.detach().flatten() for p in made.model.parameters()]))
    (kept,) = read_lines(tmp_path / "run" / "warnings.jsonl")
    assert (kept["step"], kept["name"]) == (PATIENCE, name)
    assert kept["text"].split(" batches ")[1][:40] in (tmp_path / "run" / "report.html").read_text()

    trainer(tmp_path / "run", resume=True, max_steps=9, **fields).train()
    assert "warning: " not in capsys.readouterr().out
    assert len(read_lines(tmp_path / "run" / "warnings.jsonl")) == 1


def test_train_solved_task_is_told_apart_from_a_constant_reward(tmp_path, capsys):
    # The first two calls score the held-out prompts and the first batch.
    (tmp_path / "mine.py").write_text(
        "calls = []\ndef mine(prompts, **columns):\n    calls.append(prompts)\n"
        "    return [float(len(calls) > 2 or i % 2) for i, _ in enumerate(prompts)]\n"
    )
    trainer(tmp_path / "run", max_steps=6, reward_funcs=[f"{tmp_path / 'mine.py'}:mine"]).train()
    said = capsys.readouterr().out
    assert said.count("warning: ") == 1
    begin = (
        f"warning: step {1 + PATIENCE}: for {PATIENCE} batches in a row all completions of all prompts had the highest"
    )
    assert f"{begin} reward of this run, 1, so nothing more is learned from them: the task may be solved; stop" in said


def test_warnings_resumed_from_an_earlier_step_are_given_again(tmp_path):
    signals = trainer(tmp_path / "run").warnings
    said = []
    signals.warn(4, "no reward", "text 4")
    signals.warn(6, "no variance", "text 6")
    signals.start(5, said.append)
    signals.warn(7, "no reward", "again")
    signals.warn(7, "no variance", "text 7")
    assert said == ["text 7"]
    assert [line["text"] for line in read_lines(tmp_path / "run" / "warnings.jsonl")] == ["text 4", "text 7"]


def test_train_reports_failures_of_a_reward_function(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def mine(prompts, **columns):\n    return [[1.0, None, 'x<y'][i % 3] for i, _ in enumerate(prompts)]\n"
    )
    trainer(tmp_path / "run", max_steps=1, reward_funcs=[f"{tmp_path / 'mine.py'}:mine"]).train()
    assert "returned &#39;x&lt;y&#39; for completion 2" in write_report(tmp_path / "run").read_text()
