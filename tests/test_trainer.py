"""Whole runs of a tiny model."""

import errno
import importlib
import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load as load_file_bytes
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from grpo_fast.cli import main, parse_config
from grpo_fast.errors import UserError
from grpo_fast.files import read_metrics
from grpo_fast.trainer import GRPOTrainer
from grpo_kernels import PRESETS
from support.runs import MACHINE_METRICS
from support.small import SMALL, run, trainer, weights


def test_train_writes_the_run_folder(tmp_path, capsys):
    """What a user finds after `grpo-fast train`."""
    folder = tmp_path / "run"
    path = tmp_path / "small.yaml"
    path.write_text(json.dumps({**SMALL, "log_completions_steps": 2}))
    assert main(["train", str(path), "--output_dir", str(folder), "--seed", "5"]) == 0
    assert "before" in capsys.readouterr().out

    summary = json.loads((folder / "summary.json").read_text())
    assert set(summary) == {"metric", "before", "after", "train_seconds", "steps", "best_score", "best_checkpoint"}
    assert (summary["metric"], summary["steps"]) == ("exact_answer", 3)

    metrics = read_metrics(folder / "metrics.jsonl")
    assert [m["step"] for m in metrics] == [1, 2, 3]
    names = {"reward", "reward_std", "frac_reward_zero_std", "rewards/exact_answer/mean", "rewards/exact_answer/std"}
    names |= {"completions/mean_length", "completions/clipped_ratio", "completions/mean_terminated_length"}
    names |= {"loss", "grad_norm", "learning_rate", "entropy", "num_tokens", "clip_ratio/region_mean"}
    assert names <= set(metrics[0])
    # 32 completions of 1 to 3 tokens to prompts of 3.
    assert 3 * 32 * (3 + 1) <= metrics[-1]["num_tokens"] <= 3 * 32 * (3 + 3)

    lines = [json.loads(line) for line in (folder / "completions" / "completions_00002.jsonl").open()]
    assert len(lines) == 32
    assert set(lines[0]) == {"step", "group", "prompt", "completion", "rewards", "advantage"}
    assert sorted(p.name for p in (folder / "completions").iterdir()) == [
        "completions_00001.jsonl", "completions_00002.jsonl",
    ]  # fmt: skip
    for start in range(0, 32, 4):
        group = lines[start : start + 4]
        assert len({line["prompt"] for line in group}) == 1
        assert sum(line["advantage"] for line in group) == pytest.approx(0, abs=1e-4)

    assert (folder / "reward.png").read_bytes().startswith(b"\x89PNG")
    resolved = parse_config([str(folder / "config.yaml")])
    assert (resolved.seed, resolved.output_dir) == (5, str(folder))

    model = AutoModelForCausalLM.from_pretrained(folder / "checkpoint-3")
    tokenizer = AutoTokenizer.from_pretrained(folder / "checkpoint-3")
    ids = tokenizer("31>", return_tensors="pt")["input_ids"]
    assert tokenizer.decode(model.generate(ids, max_new_tokens=2, do_sample=False)[0, :3]) == "31>"

    # A second run does not overwrite the first.
    assert main(["train", str(path), "--output_dir", str(folder)]) == 2
    assert "already holds a run" in capsys.readouterr().err


def test_train_saves_the_trained_model(tmp_path):
    made = trainer(tmp_path)
    before = weights(made.model)
    made.train()
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-3")
    assert torch.equal(weights(saved), weights(made.model))
    assert not torch.equal(before, weights(made.model))


def test_train_with_the_same_seed_gives_the_same_run(tmp_path):
    runs = [run(tmp_path / str(index), seed=seed) for index, seed in enumerate((3, 3, 4))]
    figures = [[{k: v for k, v in m.items() if k not in MACHINE_METRICS} for m in metrics] for metrics, _, _ in runs]
    assert figures[0] == figures[1]
    assert figures[0] != figures[2]
    assert torch.equal(runs[0][2], runs[1][2])


@pytest.mark.parametrize("loss_type", PRESETS)
def test_gradient_does_not_depend_on_the_token_budget(tmp_path, loss_type):
    made = trainer(tmp_path, loss_type=loss_type, beta=0.05, model_init_kwargs=SMALL["model_init_kwargs"])
    batch, _ = made.collect()
    if made.objective.needs_selection:
        batch.selected = made.learner.high_covariance(batch)
    gradients = []
    layouts = ((10_000, True, "auto"), (10_000, True, "never"), (10_000, False, "never"), (24, True, "auto"))
    for budget, packed, shares in (*layouts, (6, False, "never")):
        made.config.max_tokens_per_microbatch, made.learner.packed, made.config.share_prompts = budget, packed, shares
        made.learner.accumulate_gradients(batch)
        gradients.append(torch.cat([p.grad.flatten() for p in made.model.parameters()]))
        made.learner.optimizer.zero_grad()
    assert gradients[0].norm() > 0
    for other in gradients[1:]:
        # float32 sums in another order
        assert (other - gradients[0]).norm() <= 1e-5 * gradients[0].norm()


@pytest.mark.parametrize("loss_type", ["dapo", "gspo"])
def test_microbatches_do_not_look_for_rows_that_all_move(tmp_path, monkeypatch, loss_type):
    made = trainer(tmp_path, loss_type=loss_type, model_init_kwargs=SMALL["model_init_kwargs"])
    batch, _ = made.collect()
    searches = []
    for name in ("linear_logprob", "linear_policy_loss"):
        module = importlib.import_module(f"grpo_kernels.{name}")
        search = module.partition
        monkeypatch.setattr(module, "partition", lambda *args, search=search: searches.append(1) or search(*args))
    batch.set_advantages(torch.ones_like(batch.advantages), made.learner.objective)
    made.learner.score(made.learner.policy, batch)
    made.learner.accumulate_gradients(batch)
    assert not searches
    # Some tokens of a completion do not move it.
    batch.advantages[0] = 0.0
    assert made.learner.known_rows(batch) is None
    made.learner.accumulate_gradients(batch)
    assert searches


@pytest.mark.parametrize(
    "fields",
    [
        {"num_iterations": 2, "max_steps": 5},
        {"beta": 0.1},
        {"loss_type": "gspo", "num_iterations": 2, "max_steps": 4},
        {"entropy_coef": 0.01},
        {"bf16": True},
        {"dtype": "bfloat16", "learning_rate": 1e-2},
        {"gradient_checkpointing": True},
        {"mask_truncated_completions": True},
        {"temperature": 0.7, "top_p": 0.9, "top_k": 8},
        {"scale_rewards": "none", "weight_decay": 0.1, "max_grad_norm": 0.0},
        {"attn_implementation": "eager", "share_prompts": "never"},
        {"padding_free": "never"},
        {"use_peft": True, "lora_r": 4, "beta": 0.1, "learning_rate": 1e-2},
        {"use_peft": True, "lora_dropout": 0.1, "lora_target_modules": ["q_proj", "up_proj"], "dtype": "bfloat16"},
        {"bf16": True, "beta": 0.1},
    ],
    ids=lambda fields: ",".join(fields),
)
def test_train_with_options(tmp_path, fields):
    metrics, before, after = run(tmp_path, **fields)
    assert metrics[-1]["step"] == fields.get("max_steps", 3)
    assert after.isfinite().all()
    assert not torch.equal(before, after)
    if fields.get("beta"):
        # The reference is the initial policy.
        assert metrics[0]["kl"] == pytest.approx(0, abs=1e-6)
        assert metrics[-1]["kl"] > 1e-7


def test_update_in_a_second_iteration_uses_old_logprobs(tmp_path):
    made = trainer(tmp_path, num_iterations=2, learning_rate=0.1)
    batch, _ = made.collect()
    before = made.learner.score(made.learner.policy, batch)
    first = made.learner.update(batch, keep_logprobs=True)
    active = torch.cat([torch.arange(batch.offsets[i], batch.offsets[i + 1]) for i in batch.active])
    torch.testing.assert_close(batch.old_logprobs[active], before[active], rtol=1e-4, atol=1e-5)
    second = made.learner.update(batch)
    assert first["clip_ratio/region_mean"] == 0
    assert second["clip_ratio/region_mean"] > 0
    assert first["clip_ratio/low_min"] == first["clip_ratio/high_max"] == 0
    assert second["clip_ratio/low_min"] <= second["clip_ratio/low_mean"]
    assert second["clip_ratio/high_max"] >= second["clip_ratio/high_mean"]


def test_collect_leaves_out_groups_without_variance(tmp_path, monkeypatch):
    made = trainer(tmp_path, reward_funcs=["exact_answer"])
    monkeypatch.setattr(made.rewards, "functions", [lambda prompts, completions, **c: [1.0] * len(prompts)])
    batch, metrics = made.collect()
    assert metrics["frac_reward_zero_std"] == 1
    assert batch.active == []
    before = weights(made.model)
    figures = made.learner.update(batch)
    assert figures["grad_norm"] == 0
    assert torch.equal(before, weights(made.model))


def test_collect_with_kl_keeps_groups_without_variance(tmp_path):
    made = trainer(tmp_path, reward_funcs=["exact_answer"], beta=0.1)
    batch, _ = made.collect()
    assert len(batch.active) == len(batch.samples)


def test_collect_masks_truncated_completions(tmp_path):
    made = trainer(tmp_path, mask_truncated_completions=True)
    batch, metrics = made.collect()
    truncated = [i for i, sample in enumerate(batch.samples) if 0 not in sample.completion_ids]
    assert truncated
    assert metrics["completions/clipped_ratio"] == pytest.approx(len(truncated) / 32)
    assert not set(truncated) & set(batch.active)
    for index in truncated:
        assert batch.weights[batch.offsets[index] : batch.offsets[index + 1]].abs().sum() == 0
    assert batch.weights.sum() == pytest.approx(1)


def test_update_with_an_infinite_gradient_keeps_the_weights(tmp_path):
    made = trainer(tmp_path)
    batch, _ = made.collect()
    before = weights(made.model)
    batch.advantages[batch.offsets[batch.active[0]]] = float("inf")
    with pytest.raises(UserError, match="step 1: the gradient is not finite"):
        made.update(batch)
    assert torch.equal(before, weights(made.model))


def test_train_with_a_wrong_reward_stops_early(tmp_path, capsys):
    (tmp_path / "mine.py").write_text("def mine(prompts, completions, **columns):\n    return [0.0]\n")
    path = tmp_path / "small.yaml"
    path.write_text(json.dumps({**SMALL, "reward_funcs": [f"{tmp_path / 'mine.py'}:mine"]}))
    folder = tmp_path / "run"
    assert main(["train", str(path), "--output_dir", str(folder)]) == 2
    assert "returned 1 rewards for" in capsys.readouterr().err
    # The folder can be used again.
    assert not (folder / "metrics.jsonl").exists()


def test_train_reports_a_full_disk(tmp_path, monkeypatch):
    made = trainer(tmp_path)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(made.model, "save_pretrained", full)
    with pytest.raises(UserError, match=r"checkpoint-3 could not be written: No space left on device"):
        made.train()
    assert not list(tmp_path.glob("*checkpoint*"))
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 3


def test_train_gives_rewards_conversations_as_messages(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def mine(prompts, completions, answer, completion_ids, **columns):\n"
        "    assert all(p[-1]['role'] == 'user' for p in prompts)\n"
        "    assert all(c[0]['role'] == 'assistant' for c in completions)\n"
        "    assert len(answer) == len(completion_ids) == len(prompts)\n"
        "    return [float(len(c[0]['content'])) for c in completions]\n"
    )
    rows = [{"question": str(i), "answer": i} for i in range(10, 40)]
    (tmp_path / "q.json").write_text(json.dumps(rows))
    fields = {"dataset_name": str(tmp_path / "q.json"), "dataset_kwargs": None, "prompt_template": "{question}"}
    fields |= {"apply_chat_template": True, "reward_funcs": [f"{tmp_path / 'mine.py'}:mine"]}
    with pytest.raises(UserError, match="has no chat template"):
        trainer(tmp_path / "a", **fields)
    trainer(tmp_path / "b").tokenizer.save_pretrained(tmp_path / "model")
    trainer(tmp_path / "b").model.save_pretrained(tmp_path / "model")
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    (tmp_path / "model" / "chat_template.jinja").write_text(template)
    chat = {"model_name_or_path": str(tmp_path / "model"), "model_init_kwargs": None}
    metrics, _, _ = run(tmp_path / "c", **fields, **chat)
    assert metrics[-1]["step"] == 3


def test_train_logs_every_step(tmp_path):
    metrics, _, _ = run(tmp_path, num_iterations=2, max_steps=5, log_completions_steps=2)
    assert [m["step"] for m in metrics] == [1, 2, 3, 4, 5]
    assert metrics[0]["reward"] == metrics[1]["reward"]
    assert metrics[0]["loss"] != metrics[1]["loss"]
    # Steps 2 and 4 fall on the generations that begin with steps 1 and 3.
    assert sorted(p.name[12:17] for p in (tmp_path / "completions").iterdir()) == ["00001", "00003"]


def test_train_interrupted_leaves_its_model(tmp_path, capsys):
    (tmp_path / "mine.py").write_text(
        "calls = 0\n"
        "def mine(prompts, completions, **columns):\n"
        "    global calls\n    calls += 1\n"
        "    if calls == 4:\n        raise KeyboardInterrupt\n"
        "    return [float(i % 3) for i in range(len(prompts))]\n"
    )
    path = tmp_path / "small.yaml"
    path.write_text(json.dumps({**SMALL, "reward_funcs": [f"{tmp_path / 'mine.py'}:mine"]}))
    assert main(["train", str(path), "--output_dir", str(tmp_path / "run")]) == 130
    assert "stopped after step 2; the model so far" in capsys.readouterr().out.replace("\n", " ")
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 2
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-2")


@pytest.mark.parametrize("on_error", ["none", "raise"])
def test_train_with_a_failing_reward_ends_only_if_asked(tmp_path, capsys, on_error):
    (tmp_path / "mine.py").write_text(
        "calls = 0\n"
        "def mine(prompts, completions, **columns):\n"
        "    global calls\n    calls += 1\n"
        "    if calls > 3 and len(prompts) > 1:\n        raise ValueError('no more')\n"
        "    return [float(i % 3) for i in range(len(prompts))]\n"
    )
    path = tmp_path / "small.yaml"
    path.write_text(json.dumps({**SMALL, "reward_funcs": [f"{tmp_path / 'mine.py'}:mine"]}))
    status = main(["train", str(path), "--output_dir", str(tmp_path / "run"), "--on_reward_error", on_error])
    captured = capsys.readouterr()
    printed = " ".join((captured.out + captured.err).split())
    assert "reward function 'mine' raised ValueError: no more (mine.py, line 6) for the prompt" in printed
    errors = [m["rewards/mine/errors"] for m in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert (status, errors) == ((0, [0, 0, 1]) if on_error == "none" else (2, [0, 0]))
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / f"checkpoint-{len(errors)}")


def test_train_without_rewards_writes_valid_json(tmp_path):
    (tmp_path / "mine.py").write_text("def mine(prompts, completions, **columns): return [None] * len(prompts)\n")
    run(tmp_path, reward_funcs=[f"{tmp_path / 'mine.py'}:mine"], max_steps=1)
    for file in (tmp_path / "summary.json", tmp_path / "metrics.jsonl"):
        assert "NaN" not in file.read_text()
    assert json.loads((tmp_path / "summary.json").read_text())["before"] is None


def test_train_in_an_oddly_named_folder(tmp_path):
    folder = tmp_path / "a [/b] ü c"
    run(folder, max_steps=1)
    assert (folder / "checkpoint-1").is_dir()


def test_trainer_refuses_broken_models(tmp_path):
    made = trainer(tmp_path / "run")
    made.model.save_pretrained(tmp_path / "model")
    made.tokenizer.save_pretrained(tmp_path / "model")
    fields = {"model_name_or_path": str(tmp_path / "model"), "model_init_kwargs": None}
    trainer(tmp_path / "run", **fields)

    weights_file = tmp_path / "model" / "model.safetensors"
    whole = weights_file.read_bytes()
    weights_file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="could not be loaded: SafetensorError"):
        trainer(tmp_path / "run", **fields)

    tensors = {k: v for k, v in load_file_bytes(whole).items() if "layers.1" not in k}
    save_file(tensors, weights_file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks \d+ weights, which would be random: model.layers.1"):
        trainer(tmp_path / "run", **fields)

    made.model.resize_token_embeddings(8)
    made.model.save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="token id 11 of the tokenizer is outside the model's vocabulary of 8"):
        trainer(tmp_path / "run", **fields)


def test_trainer_refuses_a_disk_that_is_too_small(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=2**12))
    with pytest.raises(UserError, match=r"the disk has 0.0 MiB left, and 1 checkpoint takes"):
        trainer(tmp_path / "run")


@pytest.mark.slow
def test_train_with_the_demo_recipe_learns_to_sort(tmp_path):
    """The recipe of `make demo` with half of its steps: a wrong sign or mask anywhere in the step would show."""
    options = ["--output_dir", str(tmp_path), "--seed", "11", "--max_steps", "150"]
    summary = GRPOTrainer(parse_config(["sort", *options])).train()
    assert summary.before < 0.02
    assert summary.after >= 0.6
