"""``grpo-fast eval``, and held-out scores during training."""

import json
import math
import re

import pytest
import torch
from accelerate.state import AcceleratorState

from grpo_fast.cli import main
from grpo_fast.errors import UserError
from grpo_fast.evaluation.run import EvalOptions, EvalRun
from grpo_fast.files import LinesFile, cut_metrics, read_metrics, split_lines
from grpo_fast.report import write_report
from grpo_fast.report.run import read_lines
from support.killed import NOISE, seed_generators
from support.runs import assert_same_run, config, figures, trainer
from support.small import weights

SCORE = "eval/rewards/exact_answer/mean"
# Scores of the evaluations before training and after each step.
SCORES = [0.1, 0.2, 0.5, 0.3, 0.5, 0.4]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run with its configuration, not to be changed by a test."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    trainer(folder, max_steps=2, num_generations_eval=4, max_eval_samples=20, eval_metric="digits_included").train()
    AcceleratorState._reset_state(reset_partial_state=True)
    return folder


def evaluate(folder, *arguments) -> dict:
    assert main(["eval", *map(str, arguments), "--output", str(folder)]) == 0
    return json.loads((folder / "summary.json").read_text())


def samples(folder) -> list[dict]:
    return [json.loads(line) for line in split_lines((folder / "samples.jsonl").read_text(encoding="utf-8"))]


def grouped(lines: list[dict], size: int) -> list[list[dict]]:
    return [lines[start : start + size] for start in range(0, len(lines), size)]


def options(folder, **fields) -> EvalOptions:
    return EvalOptions(**{"output": folder, "batch_size": 8, **fields})


def test_eval_of_a_checkpoint_equals_the_score_of_its_run(trained, tmp_path, capsys):
    """With all prompts at once, the completions are those of the run's last evaluation."""
    summary = json.loads((trained / "summary.json").read_text())
    assert summary["before"] != summary["after"]
    made = evaluate(tmp_path / "after", "--model_name_or_path", trained / "checkpoint-2", "--batch_size", 99)
    assert made["metrics"]["digits_included"]["mean@4"]["value"] == pytest.approx(summary["after"], abs=1e-6)
    made = evaluate(tmp_path / "before", trained / "config.yaml", "--batch_size", 99)
    assert made["metrics"]["digits_included"]["mean@4"]["value"] == pytest.approx(summary["before"], abs=1e-6)
    printed = capsys.readouterr().out
    assert "checkpoint-2 on 20 held-out prompts, 4 completions at temperature 1 each" in printed
    assert "20/20 prompts" in printed
    assert "pass@4" in printed


def test_eval_writes_samples_and_summary(trained, tmp_path):
    made = evaluate(tmp_path / "eval", trained / "config.yaml", "--k", "2,4", "--batch_size", 8)
    lines = samples(tmp_path / "eval")
    assert len(lines) == 80
    assert set(lines[0]) == {"index", "prompt", "completion", "reward", "rewards", "finish_reason", "length"}
    assert [line["index"] for line in lines] == [index for index in range(20) for _ in range(4)]
    for line in lines:
        answer = "".join(sorted(line["prompt"].removesuffix(">")))
        assert line["rewards"]["exact_answer"] == float(line["completion"].strip() == answer)
        assert 1 <= line["length"] <= 3
        assert line["finish_reason"] == "stop" or line["length"] == 3
    assert set(made["metrics"]) == {"digits_included", "digits_ordered", "exact_answer"}
    found = made["metrics"]["digits_included"]
    assert set(found) == {"mean@4", "pass@2", "pass@4"}
    values = [line["rewards"]["digits_included"] for line in lines]
    assert found["mean@4"]["value"] == pytest.approx(sum(values) / 80)
    assert found["mean@4"]["low"] < found["mean@4"]["value"] < found["mean@4"]["high"]
    right = [any(value >= 1 for value in values[start : start + 4]) for start in range(0, 80, 4)]
    assert found["pass@4"]["value"] == pytest.approx(sum(right) / 20)
    assert made["mean_length"] == pytest.approx(sum(line["length"] for line in lines) / 80)
    assert made["clipped_ratio"] == sum(line["finish_reason"] == "length" for line in lines) / 80
    lower = evaluate(tmp_path / "lower", trained / "config.yaml", "--threshold", "0.5", "--batch_size", 8)
    assert lower["metrics"]["digits_included"]["pass@4"]["value"] > found["pass@4"]["value"]


def test_eval_greedy_does_not_depend_on_the_seed(trained, tmp_path):
    model = ["--model_name_or_path", trained / "checkpoint-2", "--greedy"]
    made = evaluate(tmp_path / "a", *model)
    assert list(made["metrics"]["exact_answer"]) == ["mean@1", "pass@1"]
    evaluate(tmp_path / "b", *model, "--seed", 7, "--batch_size", 3)
    texts = [[line["completion"] for line in samples(tmp_path / name)] for name in "ab"]
    assert len(texts[0]) == 20
    assert texts[0] == texts[1]


def test_eval_resumes_an_interrupted_evaluation(tmp_path, capsys):
    fields = {"num_generations_eval": 2, "eval_metric": "digits_ordered", "max_eval_samples": 20}
    whole = EvalRun(config(tmp_path, **fields), options(tmp_path / "whole")).run()
    folder = tmp_path / "eval"
    made = EvalRun(config(tmp_path, **fields), options(folder))
    generate, calls = made.rollout.generate, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(*arguments)

    made.rollout.generate = interrupted
    with pytest.raises(KeyboardInterrupt):
        made.run()
    assert len(samples(folder)) == 32
    assert not (folder / "summary.json").exists()
    assert f"to continue: grpo-fast eval {folder}/config.yaml --output {folder} --resume --batch_size 8" in (
        capsys.readouterr().out
    )
    # As after a kill: an incomplete batch, and an incomplete line.
    path = folder / "samples.jsonl"
    kept = [line + "\n" for line in split_lines(path.read_text())]
    path.write_text("".join(kept[:21]) + kept[21][:9])
    with pytest.raises(UserError, match="already holds an evaluation"):
        EvalRun(config(tmp_path, **fields), options(folder))
    with pytest.raises(UserError, match=r"--resume: batch_size=4 differs from 8, the value in "):
        EvalRun(config(tmp_path, **fields), options(folder, resume=True, batch_size=4))
    made = EvalRun(config(tmp_path, **fields), options(folder, resume=True))
    generate, batches = made.rollout.generate, []
    made.rollout.generate = lambda prompts, sampling: batches.append(len(prompts)) or generate(prompts, sampling)
    resumed = made.run()
    assert batches == [8, 4]
    assert samples(folder) == samples(tmp_path / "whole")
    assert {**resumed, "seconds": 0} == {**whole, "seconds": 0}


def test_eval_compares_two_evaluations_by_prompt(trained, tmp_path, capsys):
    first = evaluate(tmp_path / "a", trained / "config.yaml")
    model = ["--model_name_or_path", trained / "checkpoint-2"]
    made = evaluate(tmp_path / "b", *model, "--num_generations_eval", 3, "--compare", tmp_path / "a")
    found, name = made["metrics"]["digits_included"], "digits_included"
    difference = found["difference"]["value"]
    assert difference == pytest.approx(found["mean@3"]["value"] - first["metrics"][name]["mean@4"]["value"], abs=1e-6)
    means = [
        [sum(line["rewards"][name] for line in group) / n for group in grouped(samples(tmp_path / run), n)]
        for run, n in (("a", 4), ("b", 3))
    ]
    spread = torch.tensor(means[1]).sub(torch.tensor(means[0])).std().item()
    assert found["difference"]["standard_error"] == pytest.approx(spread / 20**0.5, rel=1e-5)
    assert f"difference: to the means in {tmp_path / 'a'}" in capsys.readouterr().out
    other = ["--max_eval_samples", 19, "--compare", tmp_path / "a", "--output", tmp_path / "c"]
    assert main(["eval", str(trained / "config.yaml"), *map(str, other)]) == 2
    assert re.search(r"--compare='\S+/a' is of 20 prompts \(\w+\), not of", capsys.readouterr().err)


def test_lines_files_end_lines_only_at_newlines(trained, tmp_path):
    """A completion may contain characters that Unicode treats as line breaks."""
    evaluate(tmp_path / "a", trained / "config.yaml")
    path, text = tmp_path / "a" / "samples.jsonl", "a\u2028b\u2029c\u0085d\x0b\x0ce\x1cf"
    lines = [{**line, "completion": text} for line in samples(tmp_path / "a")]
    path.unlink()
    with LinesFile(path) as file:
        for line in lines:
            file.write(line)
    assert read_lines(path) == lines
    made = evaluate(tmp_path / "b", trained / "config.yaml", "--compare", tmp_path / "a")
    assert made["metrics"]["digits_included"]["difference"]["value"] == pytest.approx(0, abs=1e-6)
    path = tmp_path / "metrics.jsonl"
    with LinesFile(path) as file:
        for step in (1, 2):
            file.write({"step": step, "note": text})
    assert [line["note"] for line in read_metrics(path)] == [text, text]
    assert [line["step"] for line in cut_metrics(path, 1)[0]] == [1]
    assert [split_lines(text) for text in ("", "\n", "a", "a\n", "a\r\n\nb")] == [
        [],
        [""],
        ["a"],
        ["a"],
        ["a\r", "", "b"],
    ]


def test_eval_samples_batches_with_different_random_numbers(tmp_path):
    rows = [{"prompt": "31>", "answer": "13"}] * 6
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    fields = dict.fromkeys(("dataset_name", "eval_dataset_name"), str(tmp_path / "rows.json"))
    EvalRun(config(tmp_path, **fields, dataset_kwargs=None), options(tmp_path / "eval", batch_size=1)).run()
    assert len({line["completion"] for line in samples(tmp_path / "eval")}) > 1


def test_eval_uses_the_held_out_rows_of_the_run(tmp_path, capsys):
    rows = [{"prompt": f"{a}{b}>", "answer": f"{min(a, b)}{max(a, b)}"} for a in range(10) for b in range(10)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    fields = {"dataset_name": str(tmp_path / "rows.json"), "dataset_kwargs": None}
    made = trainer(tmp_path / "run", **fields, max_steps=1, max_eval_samples=5)
    made.train()
    AcceleratorState._reset_state(reset_partial_state=True)
    trained_on = {row["prompt"] for row in made.train_rows}
    capsys.readouterr()
    model = ["--model_name_or_path", tmp_path / "run" / "checkpoint-1", "--greedy"]
    for name, more in (("a", ["--seed", 7]), ("b", ["--seed", 7, "--max_eval_samples", 100])):
        evaluate(tmp_path / name, *model, *more)
        prompts = [line["prompt"] for line in samples(tmp_path / name)]
        assert len(prompts) >= 5
        assert prompts[:5] == [row["prompt"] for row in made.eval_rows]
        assert not trained_on & set(prompts)
        assert "warning" not in capsys.readouterr().err
    (tmp_path / "rows.json").write_text(json.dumps(rows[: len(rows) // 4]))
    evaluate(tmp_path / "c", *model)
    error = capsys.readouterr().err
    assert f"warning: the held-out prompts of {tmp_path / 'rows.json'} are not those of the run that made" in error
    evaluate(tmp_path / "d", *model, "--prompt_template", "{prompt}")
    assert "warning" not in capsys.readouterr().err


def test_long_prompts_are_dropped_in_training_and_evaluation(tmp_path, capsys):
    rows = [{"prompt": "1" * length + ">", "answer": "1"} for length in (2, 70, 3, 80, 4)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    fields = dict.fromkeys(("dataset_name", "eval_dataset_name"), str(tmp_path / "rows.json")) | {
        "dataset_kwargs": None
    }
    message = "a prompt of 81 tokens and max_completion_length=3 do not fit the model's 64 positions"
    with pytest.raises(UserError, match=message):
        trainer(tmp_path / "run", **fields)
    made = trainer(tmp_path / "run", **fields, long_prompts="drop")
    said, printed = "warning: long_prompts='drop' leaves out 2 of 5 {} prompts, longer than 61", capsys.readouterr().err
    assert [printed.count(said.format(kind)) for kind in ("training", "held-out")] == [1, 1]
    for rows, prompts in ((made.train_rows, made.train_prompts), (made.eval_rows, made.eval_prompts)):
        assert [len(row["prompt"]) for row in rows] == [len(ids) for ids in prompts] == [3, 4, 5]
    AcceleratorState._reset_state(reset_partial_state=True)
    found = EvalRun(config(tmp_path, **fields, long_prompts="drop"), options(tmp_path / "eval"))
    assert said.format("held-out") in capsys.readouterr().err
    found.run()
    assert [len(line["prompt"]) for line in samples(tmp_path / "eval")] == [3, 4, 5]


@pytest.mark.parametrize("folder_model", [False, True], ids=["built-in", "folder"])
def test_eval_loads_an_adapter_into_its_base(tmp_path, folder_model):
    fields = {"use_peft": True, "lora_r": 4, "learning_rate": 0.05, "max_steps": 2, "eval_metric": "digits_included"}
    if folder_model:
        made = trainer(tmp_path / "other", seed=9)
        made.model.save_pretrained(tmp_path / "model")
        made.tokenizer.save_pretrained(tmp_path / "model")
        fields |= {"model_name_or_path": str(tmp_path / "model"), "model_init_kwargs": None}
    made = trainer(tmp_path / "run", **fields)
    made.train()
    AcceleratorState._reset_state(reset_partial_state=True)
    after = json.loads((tmp_path / "run" / "summary.json").read_text())["after"]
    folder = tmp_path / "run" / "checkpoint-2"
    assert not (folder / "model.safetensors").exists()
    found = EvalRun(config(tmp_path, **fields | {"model_name_or_path": str(folder)}), options(None, batch_size=99))
    assert torch.equal(weights(found.rollout.model), weights(made.model))
    found.folder = tmp_path / "eval"
    assert found.run()["metrics"]["digits_included"]["mean@1"]["value"] == pytest.approx(after, abs=1e-6)
    base = EvalRun(config(tmp_path, **fields), options(tmp_path / "base", batch_size=99))
    assert not any("lora" in name for name, _ in base.rollout.model.named_parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--k", "5"], "--k: 5 is not allowed: it must be from 1 to 4, the completions of num_generations_eval=4"),
        (["--greedy", "--k", "2"], "from 1 to 1, the completions of --greedy"),
        (["--k", "0"], "--k: 0 is not allowed"),
        (["--k", "1;2"], "--k='1;2' is not allowed: it must be numbers from 1 on"),
        (["--threshold", "nan"], "--threshold='nan' is not allowed"),
        (["--batch_size", "0"], "--batch_size='0' is not allowed"),
        (["--resume"], "--resume needs the evaluation's folder: --output FOLDER"),
        (["--resume", "--output", "new"], "--resume: new holds no evaluation"),
        (["--output", "run"], "--output='run' holds a training run; choose another folder"),
        (["--output", "file"], "--output='file' is not a folder"),
        (["--model_name_or_path", "empty"], "empty/adapter_config.json names no base_model_name_or_path"),
        (["--model_name_or_path", "broken"], "broken/adapter_config.json is not valid"),
        (["--model_name_or_path", "lost"], "the adapter lost does not fit 'random-llama'"),
        (["--compare", "empty"], "--compare='empty' holds no finished evaluation"),
        (["--greeedy"], "unknown option --greeedy"),
    ],
)
def test_eval_with_wrong_input_ends_in_one_line(trained, tmp_path, monkeypatch, arguments, message, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").symlink_to(trained)
    (tmp_path / "file").write_text("")
    contents = {
        "empty": "{}",
        "broken": "{",
        "lost": '{"base_model_name_or_path": "random-llama", "peft_type": "LORA"}',
    }
    for name, content in contents.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(content)
    assert main(["eval", str(trained / "config.yaml"), *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("grpo-fast: error: ")
    assert message in error
    assert "\n" not in error


def scripted(folder, resume=False, **fields):
    """A run whose held-out score after step N is `SCORES[N]`."""
    made = trainer(folder, resume, **{"eval_steps": 1, "keep_best": True, "save_total_limit": 1, **fields})
    measure = made.measure
    made.measure = lambda: {**measure(), SCORE: SCORES[made.step]}
    return made


def test_eval_steps_write_the_curve_of_scores(tmp_path, capsys):
    made = trainer(tmp_path / "run", eval_steps=2, logging_steps=5, log_completions_steps=0)
    steps = []
    measure = made.measure
    made.measure = lambda: steps.append(made.step) or measure()
    made.train()
    # One evaluation at the end serves both the curve and the summary.
    assert steps == [0, 2, 4, 5]
    lines = {line["step"]: line for line in read_metrics(tmp_path / "run" / "metrics.jsonl")}
    assert sorted(lines) == [2, 4, 5]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert lines[5][SCORE] == summary["after"]
    assert {"eval/rewards/digits_included/mean", "eval/completions/mean_length"} <= set(lines[2])
    printed = capsys.readouterr().out
    assert printed.count("held-out exact_answer") == 3
    assert "step 4: held-out exact_answer" in printed
    page = write_report(tmp_path / "run").read_text()
    # The points of steps 2, 4 and 5, and the one before training.
    assert [page.count(f"held out, {label}:") >= 1 for label in ("before", "step 2", "step 5", "after")] == [
        True, True, True, False,
    ]  # fmt: skip
    assert page.count('class="held-out"') >= 1


def test_eval_steps_do_not_change_the_training(tmp_path):
    """Even if rewards draw from every random generator."""
    (tmp_path / "noise.py").write_text(NOISE)
    fields = {"reward_funcs": [f"{tmp_path / 'noise.py'}:noise", "exact_answer"]}
    for name, more in (("without", {}), ("with", {"eval_steps": 1})):
        seed_generators(0)
        trainer(tmp_path / name, **fields, **more).train()
    trained = [
        [{name: value for name, value in line.items() if not name.startswith("eval/")} for line in figures(folder)]
        for folder in (tmp_path / "without", tmp_path / "with")
    ]
    assert trained[0] == trained[1]


def test_keep_best_keeps_the_best_checkpoint(tmp_path):
    folder = tmp_path / "run"
    made = scripted(folder, save_steps=0)
    seen, save = [], made.saver.save

    def save_and_look():
        checkpoint = save()
        seen.append(sorted(path.name for path in folder.glob("checkpoint-*")))
        return checkpoint

    made.saver.save = save_and_look
    made.train()
    # Step 4 equals the best score, of step 2, and does not replace it.
    assert seen == [["checkpoint-1"], ["checkpoint-2"], ["checkpoint-2", "checkpoint-5"]]
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["best_score"], summary["best_checkpoint"]) == (0.5, "checkpoint-2")
    assert [line[SCORE] for line in read_metrics(folder / "metrics.jsonl")] == SCORES[1:]
    assert "checkpoint-2" in write_report(folder).read_text()


def test_keep_best_resumes_the_best_score(tmp_path):
    folder = tmp_path / "run"
    scripted(folder, max_steps=3, lr_scheduler_type="constant").train()
    state = json.loads((folder / "checkpoint-3" / "trainer_state.json").read_text())
    assert (state["best_step"], state["best_score"]) == (2, 0.5)
    scripted(folder, resume=True, lr_scheduler_type="constant").train()
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-5"]
    assert json.loads((folder / "summary.json").read_text())["best_checkpoint"] == "checkpoint-2"


def test_eval_steps_resumed_run_is_bit_identical(tmp_path):
    fields = {"eval_steps": 3, "keep_best": True, "save_steps": 3}
    trainer(tmp_path / "whole", **fields).train()
    folder = tmp_path / "run"
    made = trainer(folder, **fields)
    collect = made.collect

    def fail():
        if made.step == 3:
            raise UserError("no reward today")
        return collect()

    made.collect = fail
    with pytest.raises(UserError, match="no reward today"):
        made.train()
    trainer(folder, resume=True, **fields).train()
    assert_same_run(folder, tmp_path / "whole")
    assert [line["step"] for line in figures(folder) if SCORE in line] == [3, 5]


def test_failed_evaluation_loses_no_metrics(tmp_path):
    made = trainer(tmp_path, eval_steps=2)
    measure = made.measure

    def fail():
        if made.step == 2:
            raise UserError("no reward today")
        return measure()

    made.measure = fail
    with pytest.raises(UserError, match="no reward today"):
        made.train()
    assert [line["step"] for line in figures(tmp_path)] == [1, 2]
    assert (tmp_path / "checkpoint-2").is_dir()


def test_eval_steps_wait_for_the_end_of_a_generation_batch(tmp_path):
    trainer(tmp_path, eval_steps=1, num_iterations=2, max_steps=4).train()
    assert [line["step"] for line in figures(tmp_path) if SCORE in line] == [2, 4]


def test_keep_best_ignores_scores_that_are_nan(tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.SCORES", [math.nan] * 6)
    scripted(tmp_path).train()
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["best_score"], summary["best_checkpoint"]) == (None, None)


def test_keep_best_requires_eval_steps(tmp_path):
    with pytest.raises(UserError, match="keep_best requires eval_steps"):
        config(tmp_path, keep_best=True)
