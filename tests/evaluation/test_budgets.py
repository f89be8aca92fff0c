"""``grpo-fast eval --thinking_budgets``, and a training run with a thinking budget."""

import json

import pytest

from grpo_fast.cli import main
from grpo_fast.evaluation.budgets import BudgetCurve
from grpo_fast.evaluation.run import EvalOptions
from grpo_fast.files import read_metrics, split_lines
from grpo_fast.model import loading
from support.runs import config, trainer

FIELDS = {"max_completion_length": 10, "num_generations_eval": 2, "dataset_kwargs": None, "max_eval_samples": 20}


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Prompts that open the thinking, for a model whose vocabulary has the tags."""
    plain = loading.digit_tokenizer

    def tagged():
        tokenizer = plain()
        tokenizer.add_tokens(["<think>", "</think>"])
        return tokenizer

    monkeypatch.setattr(loading, "digit_tokenizer", tagged)
    path = tmp_path / "digits.jsonl"
    rows = [{"prompt": f"{number}><think>", "answer": "".join(sorted(str(number)))} for number in range(10, 99)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"dataset_name": str(path), **FIELDS}


def samples(folder):
    return [json.loads(line) for line in split_lines((folder / "samples.jsonl").read_text())]


def test_train_with_a_budget_closes_the_thinking_in_completions(tmp_path, data):
    made = trainer(tmp_path / "run", max_steps=2, thinking_budget=4, log_completions_steps=1, **data)
    assert made.train().steps == 2
    for metrics in read_metrics(tmp_path / "run" / "metrics.jsonl"):
        assert 0 < metrics["completions/thinking_closed_ratio"] <= 1
        assert metrics["grad_norm"] > 0
    path = tmp_path / "run" / "completions" / "completions_00001.jsonl"
    texts = [json.loads(line)["completion"] for line in split_lines(path.read_text())]
    # One token for each character, apart from the tags.
    assert sum("<think>" not in text and text.find("</think>") == 4 for text in texts) > 0
    assert all("</think>" in text[: 4 + len("</think>")] or "<think>" in text for text in texts if len(text) > 4)


def test_eval_at_budgets_draws_one_curve(tmp_path, data, capsys):
    folder = tmp_path / "curve"
    fields = {**data, "model_name_or_path": "random-llama", "reward_funcs": "[digits_included, exact_answer]"}
    arguments = [f"--{name}={json.dumps(value) if value is None else value}" for name, value in fields.items()]
    arguments += ["--use_cpu=true", "--thinking_budgets=4,0,2", "--k=1,2", "--output", str(folder)]
    assert main(["eval", *arguments]) == 0
    summaries = json.loads((folder / "budgets.json").read_text())
    assert [summary["thinking_budget"] for summary in summaries] == [0, 2, 4]
    for summary in summaries:
        lines = samples(folder / f"budget-{summary['thinking_budget']}")
        assert set(summary["metrics"]["exact_answer"]) == {"mean@2", "pass@1", "pass@2"}
        assert summary["thinking_closed_ratio"] == sum(line["thinking_closed"] for line in lines) / len(lines)
        assert summary["mean_length"] == sum(line["length"] for line in lines) / len(lines)
    first = samples(folder / "budget-0")
    assert all(line["thinking_closed"] and line["completion"].startswith("</think>") for line in first)
    assert (folder / "budgets.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "exact_answer by thinking budget" in printed
    assert "2 completions at temperature 1 each, thinking budget 4" in printed
    assert main(["eval", *arguments]) == 2
    assert "already holds an evaluation; choose another, or --resume it" in capsys.readouterr().err


def test_eval_at_budgets_resumes(tmp_path, data, capsys):
    """Only what is missing is sampled; the command that it prints continues the whole curve."""
    options = {"batch_size": 4, "thinking_budgets": (0, 3)}
    whole = BudgetCurve(config(tmp_path, **data), EvalOptions(output=tmp_path / "whole", **options)).run()
    folder = tmp_path / "curve"
    made = BudgetCurve(config(tmp_path, **data), EvalOptions(output=folder, **options))
    generate, calls = made.base.rollout.generate, []

    def interrupted(prompt_ids, sampling):
        calls.append(sampling.thinking_budget)
        if calls.count(3) == 2:
            raise KeyboardInterrupt
        return generate(prompt_ids, sampling)

    made.base.rollout.generate = interrupted
    with pytest.raises(KeyboardInterrupt):
        made.run()
    assert f"{folder / 'config.yaml'} --output {folder} --resume --thinking_budgets 0,3" in capsys.readouterr().out
    again = BudgetCurve(config(tmp_path, **data), EvalOptions(output=folder, resume=True, **options))
    generate, calls = again.base.rollout.generate, []
    again.base.rollout.generate = lambda ids, sampling: (
        calls.append(sampling.thinking_budget) or generate(ids, sampling)
    )
    found = again.run()
    assert set(calls) == {3}
    assert [{**summary, "seconds": 0} for summary in found] == [{**summary, "seconds": 0} for summary in whole]


@pytest.mark.parametrize(
    ("budgets", "message"),
    [
        ("a", "--thinking_budgets='a' is not allowed: it must be numbers from 0 on, as in 0,256,1024"),
        ("0,10", "thinking_budget=10 is not allowed: it must be below max_completion_length=10"),
    ],
)
def test_eval_refuses_budgets(budgets, message, tmp_path, capsys):
    arguments = ["--model_name_or_path=random-llama", "--dataset_name=sort_digits", "--reward_funcs=[exact_answer]"]
    arguments += ["--max_completion_length=10", "--output", str(tmp_path / "eval")]
    assert main(["eval", *arguments, "--thinking_budgets", budgets]) == 2
    assert message in capsys.readouterr().err
