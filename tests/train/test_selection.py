"""Rejection sampling, offline and online: which completions are kept, and that they are learned as by SFT."""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from grpo_fast.cli import main
from grpo_fast.files import read_metrics
from grpo_fast.train.selection import best_ones, right_ones
from support.runs import trainer
from support.small import SMALL

NAN = math.nan


def test_best_ones():
    rewards = torch.tensor([[1.0, 3.0, 3.0], [NAN, -2.0, NAN], [NAN, NAN, NAN], [-math.inf, NAN, -1.0]])
    assert best_ones(rewards).int().tolist() == [[0, 1, 0], [0, 1, 0], [0, 0, 0], [0, 0, 1]]


def test_right_ones():
    assert right_ones(torch.tensor([0.5, 1.0, NAN, 2.0])).tolist() == [False, True, False, True]
    assert right_ones(torch.tensor([0.5, 1.0]), 0.5).tolist() == [True, True]


@pytest.mark.parametrize("name", ["raft", "rejection_sampling"])
@pytest.mark.parametrize("loss_type", ["reinforce", "dapo"])
def test_selective_estimators_learn_as_supervised_fine_tuning(tmp_path, name, loss_type):
    """The step's gradient is that of the cross entropy over the tokens of the kept completions, from full logits."""
    made = trainer(tmp_path, advantage_estimator=name, loss_type=loss_type, max_grad_norm=0.0)
    plain = AutoModelForCausalLM.from_config(made.model.config)
    plain.load_state_dict(made.model.state_dict())
    batch, metrics = made.collect()
    kept = batch.counted.nonzero().squeeze(1).tolist()
    if name == "raft":
        assert [index // 4 for index in kept] == list(range(8))
    assert 0 < len(kept) < 32
    assert metrics["frac_selected"] == len(kept) / 32
    losses = []
    for one in (batch.samples[index] for index in kept):
        ids = torch.tensor([one.prompt_ids + one.completion_ids])
        logits = plain(input_ids=ids).logits[0, len(one.prompt_ids) - 1 : -1]
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(one.completion_ids), reduction="none"))
    loss = torch.cat(losses).mean()
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in plain.parameters()]).item()
    metrics = made.update(batch)
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-4)
    # At the sampling policy the ratio of the clipped objective is 1 for each token.
    assert metrics["loss"] == pytest.approx(loss.item() if loss_type == "reinforce" else -1.0, rel=1e-5)


def test_rejection_sampling_without_a_right_completion_changes_nothing(tmp_path):
    (tmp_path / "wrong.py").write_text("def wrong(prompts, completions, **columns):\n    return [0.5] * len(prompts)\n")
    made = trainer(
        tmp_path / "run", reward_funcs=[f"{tmp_path / 'wrong.py'}:wrong"], advantage_estimator="rejection_sampling",
        max_steps=1, weight_decay=0.0,
    )  # fmt: skip
    before = [p.detach().clone() for p in made.model.parameters()]
    made.train()
    (line,) = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert (line["frac_selected"], line["loss"], line["grad_norm"]) == (0.0, 0.0, 0.0)
    assert all(torch.equal(old, new) for old, new in zip(before, made.model.parameters(), strict=True))


def test_rejection_sampling_from_eval_to_sft(tmp_path, capsys):
    """Samples of the training prompts, of which the right ones are learned, each once."""
    path = tmp_path / "run.yaml"
    settings = {**SMALL, "num_generations_eval": 4, "max_train_samples": 40}
    settings |= {"reward_funcs": ["digits_included", "digits_ordered"]}
    path.write_text(json.dumps(settings))
    folder = tmp_path / "samples"
    assert main(["eval", str(path), "--split", "train", "--output", str(folder)]) == 0
    assert "40 training prompts, 4 completions" in " ".join(capsys.readouterr().out.split())
    lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert len(lines) == 160
    assert all(line["reward"] == pytest.approx(sum(line["rewards"].values())) for line in lines)
    right = {(line["prompt"], line["completion"]) for line in lines if line["reward"] >= 1 and line["completion"]}
    lines = [line for line in lines if line["completion"]]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = ["--min_reward", "1", "--max_steps", "2", "--output_dir", str(tmp_path / "sft"), "--use_cpu", "true"]
    data = ["--dataset_name", str(tmp_path / "samples.jsonl"), "--model_name_or_path", "random-llama"]
    assert main(["sft", *data, *options]) == 0
    said = capsys.readouterr().out
    train, held_out = (int(said.partition(mark)[0].split()[-1]) for mark in (" examples with", " held-out rows"))
    assert train + held_out == len(right)
    assert main(["eval", str(path), "--split", "all"]) == 2
    assert "--split='all' is not allowed: it must be test or train" in capsys.readouterr().err
