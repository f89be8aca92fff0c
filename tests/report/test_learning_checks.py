"""Signs that nothing is being learned: what each of them is, and that a run says it once."""

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
        (CONSTANT, {}, "constant reward", ["had the same reward, 0.5,", "reward_funcs"]),
        (FLAT, {}, "no variance", ["num_generations=4", "temperature=1", "switch on dynamic_sampling"]),
        (FLAT, {"dynamic_sampling": True}, "no variance", ["raise max_num_gen_batches=10"]),
        (CUT_OFF, {}, "all truncated", ["max_completion_length=3; raise it"]),
        (CUT_OFF, {"mask_truncated_completions": True}, "all truncated", ["mask_truncated_completions", "nothing is"]),
    ],
)
def test_a_sign_that_holds_for_several_batches_is_found_once(figures, fields, name, words):
    found = observed([figures] * 10, **fields)
    assert [list(batch) for batch in found] == [[name] if batch == PATIENCE else [] for batch in range(1, 11)]
    assert all(word in found[PATIENCE - 1][name] for word in [*words, f"for {PATIENCE} batches in a row"])


@pytest.mark.parametrize(("last", "solved"), [(1.0, True), (0.9, True), (0.0, False)])
def test_constant_reward_that_is_the_highest_so_far_may_mean_a_solved_task(last, solved):
    rising = [{**FINE, "reward": reward} for reward in (0.1, 0.9)]
    text = observed([*rising, *[{**CONSTANT, "reward": last}] * PATIENCE])[-1]["constant reward"]
    assert f"had the same reward, {last:g}," in text
    assert ("the task may be solved" in text) == solved
    assert ("change reward_funcs" in text) != solved


def test_a_sign_must_hold_in_a_row():
    assert not any(observed([FLAT, FLAT, FINE] * 5))
    assert not any(observed([FLAT, FLAT, CONSTANT, CONSTANT] * 5))


def test_rewards_and_lengths_are_judged_apart():
    found = observed([CONSTANT | {"completions/clipped_ratio": 1.0}] * PATIENCE)
    assert list(found[-1]) == ["constant reward", "all truncated"]


def test_rewards_that_are_not_centred_teach_though_they_are_equal():
    fields = {"reward_baseline": "none", "scale_rewards": "none"}
    assert not any(observed([CONSTANT] * PATIENCE, **fields))
    assert list(observed([CONSTANT | {"reward": 0.0}] * PATIENCE, **fields)[-1]) == ["constant reward"]


def test_a_short_run_is_told_in_its_last_batch():
    found = observed([NO_REWARD], max_steps=2, num_iterations=2)
    assert found[0]["no reward"].startswith("in the only batch no completion got a reward")


REWARDS = {
    "no reward": "[None] * len(prompts)",
    "constant reward": "[0.25] * len(prompts)",
    "no variance": "[float(prompt[0]) for prompt in prompts]",
    "all truncated": "[float(index % 3) for index, _ in enumerate(prompts)]",
}


@pytest.mark.parametrize("name", REWARDS)
def test_a_run_says_it_once_also_when_it_is_resumed(tmp_path, monkeypatch, capsys, name):
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


def test_a_run_that_goes_on_from_before_a_warning_says_it_again(tmp_path):
    signals = trainer(tmp_path / "run").warnings
    said = []
    signals.warn(4, "no reward", "text 4")
    signals.warn(6, "no variance", "text 6")
    signals.start(5, said.append)
    signals.warn(7, "no reward", "again")
    signals.warn(7, "no variance", "text 7")
    assert said == ["text 7"]
    assert [line["text"] for line in read_lines(tmp_path / "run" / "warnings.jsonl")] == ["text 4", "text 7"]


def test_failures_of_a_reward_function_are_in_the_report(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def mine(prompts, **columns):\n    return [[1.0, None, 'x<y'][i % 3] for i, _ in enumerate(prompts)]\n"
    )
    trainer(tmp_path / "run", max_steps=1, reward_funcs=[f"{tmp_path / 'mine.py'}:mine"]).train()
    assert "returned &#39;x&lt;y&#39; for completion 2" in write_report(tmp_path / "run").read_text()
