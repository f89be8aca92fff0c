"""Supervised fine-tuning: its loss is cross entropy, packed or not, and its runs resume bit for bit."""

import json
import re

import pytest
import torch
from transformers import AutoModelForCausalLM

from grpo_fast.arguments import parse_config
from grpo_fast.cli import main
from grpo_fast.config import SFTConfig
from grpo_fast.errors import UserError
from grpo_fast.sft.trainer import SFTTrainer
from grpo_fast.train.checkpoint import checkpoints
from support import small
from support.killed import killed_at, seed_generators
from support.runs import assert_same_run, figures
from support.small import weights

SMALL = {
    "model_name_or_path": "random-llama",
    "model_init_kwargs": {"hidden_size": 32, "intermediate_size": 32, "initializer_range": 0.1},
    "dataset_name": "sort_digits",
    "dataset_kwargs": {"length": 2, "test_size": 20},
    "per_device_train_batch_size": 6,
    "learning_rate": 1e-2,
    "max_steps": 5,
    "save_steps": 1,
    "use_cpu": True,
}


def trainer(folder, resume=False, **fields) -> SFTTrainer:
    return SFTTrainer(SFTConfig(**{**SMALL, "output_dir": str(folder), "resume_from_checkpoint": resume, **fields}))


def cross_entropy(model, examples) -> torch.Tensor:
    """The mean over the learned tokens, from full logits of one example at a time."""
    losses = []
    for one in examples:
        ids = torch.tensor([one.prompt_ids + one.completion_ids])
        logits = model(input_ids=ids).logits[0, len(one.prompt_ids) - 1 : -1].float()
        each = torch.nn.functional.cross_entropy(logits, torch.tensor(one.completion_ids), reduction="none")
        losses.append(each[torch.tensor(one.completion_mask)])
    return torch.cat(losses).mean()


@pytest.mark.parametrize("fields", [{}, {"packing": False}, {"max_tokens_per_microbatch": 12}], ids=str)
def test_sft_step_is_that_of_cross_entropy(tmp_path, fields):
    """Two steps on conversations, of which some tokens are not learned."""
    made = trainer(tmp_path, max_grad_norm=0.0, lr_scheduler_type="constant", **fields)
    # A token in the middle of a completion that is not learned, as between the turns of a chat.
    made.train_rows = [
        one._replace(completion_mask=[True, place % 3 > 0, *one.completion_mask[2:]])
        for place, one in enumerate(made.train_rows)
    ]
    plain = AutoModelForCausalLM.from_config(made.model.config)
    plain.load_state_dict(made.model.state_dict())
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.0)
    order, steps = made.prompt_order(), made.steps()
    for _ in range(2):
        examples = [made.train_rows[next(order)] for _ in range(6)]
        loss = cross_entropy(plain, examples)
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in plain.parameters()])
        metrics = next(steps)
        assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert metrics["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        held_out = cross_entropy(plain, made.eval_rows).item()
    assert made.measure() == {"eval/loss": pytest.approx(held_out, rel=1e-4)}


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({"weight_decay": 0.1}, marks=pytest.mark.long),
        {"use_peft": True, "lora_r": 4, "lora_dropout": 0.2},
    ],
    ids=lambda f: ",".join(f),
)
def test_resumed_sft_runs_are_bit_identical(tmp_path, fields):
    seed_generators(0)
    trainer(tmp_path / "whole", **fields).train()
    seed_generators(0)
    killed_at(2, trainer(tmp_path / "run", **fields))
    second = trainer(tmp_path / "run", resume=True, **fields)
    assert second.step == 2
    # Only the checkpoint decides how the run continues.
    seed_generators(1)
    second.train()
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    saved = checkpoints(tmp_path / "run")[-1]
    assert (saved / "adapter_model.safetensors").exists() == bool(fields.get("use_peft"))
    with pytest.raises(UserError, match="max_length=3 is not that of"):
        trainer(tmp_path / "run", resume=True, max_length=3, **fields)


def test_sft_command_learns_and_leaves_a_run_folder(tmp_path, capsys):
    """Epochs decide its length; it keeps the checkpoint of the lowest loss, and resumes with its own config.yaml."""
    path, folder = tmp_path / "run.yaml", tmp_path / "run"
    settings = {**SMALL, "max_steps": -1, "num_train_epochs": 1, "eval_steps": 5, "keep_best": True, "save_steps": 0}
    path.write_text(json.dumps({**settings, "output_dir": str(folder)}))
    assert main(["sft", str(path)]) == 0
    said = capsys.readouterr().out
    assert "13 steps of 6 examples" in said
    assert re.search(r"(\d+) examples with (\d+) learned tokens", said)
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["metric"], summary["steps"]) == ("loss", 13)
    lines = figures(folder)
    scores = {line["step"]: line["eval/loss"] for line in lines if "eval/loss" in line}
    assert list(scores) == [5, 10, 13]
    assert summary["best_score"] == min(scores.values()) < 0.8 * summary["before"]
    kept = {path.name for path in checkpoints(folder)}
    assert summary["best_checkpoint"] == f"checkpoint-{min(scores, key=scores.get)}"
    assert {summary["best_checkpoint"], "checkpoint-13"} <= kept
    assert (folder / "loss.png").stat().st_size > 10_000
    page = (folder / "report.html").read_text()
    assert "loss on held-out prompts" in page
    assert "finished after 13 steps" in page
    capsys.readouterr()
    assert main(["compare", str(folder), "--output", str(tmp_path / "compare.png")]) == 0
    assert "%" not in capsys.readouterr().out
    assert main(["train", str(folder / "config.yaml")]) == 2
    message = "config.yaml is for grpo-fast sft; give a configuration of grpo-fast train"
    assert message in capsys.readouterr().err
    assert main(["sft", str(folder / "config.yaml"), "--resume", "--max_steps", "14"]) == 0
    assert figures(folder)[-1]["step"] == 14


def test_grpo_continues_from_a_cold_start(tmp_path):
    first = trainer(tmp_path / "sft")
    first.train()
    last = tmp_path / "sft" / "checkpoint-5"
    second = small.trainer(tmp_path / "grpo", model_name_or_path=str(last), model_init_kwargs=None, max_steps=1)
    assert torch.equal(weights(second.model), weights(first.model))
    # Sampling and learning agree on the tokens of a prompt and its completion.
    example = first.train_rows[0]
    assert second.train_prompts[0] == example.prompt_ids
    assert second.tokenizer.eos_token_id == example.completion_ids[-1]
    second.train()


def test_sort_cold_start_begins_where_sort_sft_ends():
    first, second = parse_config(["sort_sft"], kind=SFTConfig), parse_config(["sort_cold_start"])
    steps = first.num_train_epochs * first.max_train_samples / first.prompts_per_step
    assert second.model_name_or_path == f"{first.output_dir}/checkpoint-{steps:.0f}"
    assert second.dataset_name == first.dataset_name


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--num_generations=4", "grpo-fast sft does not use num_generations"),
        ("--max_lenght=4", "unknown option --max_lenght (did you mean 'max_length'?)"),
        ("--max_length=1", "max_length=1 is not allowed: it must be at least 2"),
        ("--packing=false --padding_free=always", "padding_free='always' requires packing=True"),
        ("--padding_free=never", "padding_free='never' pads the examples, so it requires packing=False"),
        ("--num_train_epochs=0", "num_train_epochs=0.0 is not allowed"),
    ],
)
def test_sft_command_refuses_wrong_options(argument, message, capsys):
    assert main(["sft", "sort_sft", *argument.split()]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("speculative_tokens", 4), ("max_staleness", 1), ("rollout_rs", "token_k1"), ("use_adaptive_entropy", True),
        ("kl_clip", 1.0), ("covariance_ratio", 0.1), ("off_policy_mask_threshold", 1.0), ("length_penalty", 0.1),
        ("pass_rates", "runs/eval"), ("prompt_sampling", "curriculum"),
    ],
)  # fmt: skip
def test_sft_refuses_each_field_that_it_would_ignore(name, value, capsys):
    with pytest.raises(UserError, match=rf"{name}=.* has no effect in supervised fine-tuning; leave it out"):
        SFTConfig(**SMALL, **{name: value})
    assert main(["sft", "sort_sft", f"--{name}={value}"]) == 2
    assert f"grpo-fast sft does not use {name}" in capsys.readouterr().err


def test_sft_config_refuses_fields_of_sampling():
    with pytest.raises(UserError, match=r"beta=0.1 has no effect in supervised fine-tuning; leave it out"):
        SFTConfig(**SMALL, beta=0.1)
    with pytest.raises(UserError, match="SFTConfig: unknown field 'max_seq_length'"):
        SFTConfig(**SMALL, max_seq_length=5)
