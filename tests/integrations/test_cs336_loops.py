"""The loops of the assignment: what they learn, measure, write and refuse."""

import json
import math

import pytest
import torch
from torch.nn import functional

from grpo_fast.config import GRPOConfig
from grpo_fast.errors import UserError
from grpo_fast.files import read_metrics
from grpo_fast.integrations import cs336
from grpo_fast.model.loading import load_model

PROMPTS, SEVENS = ["12>", "3>", "45>"], ["7", "7", "7"]
SAMPLING = {"sampling_max_tokens": 6, "stop": None}
GRPO = {
    "n_grpo_steps": 4, "learning_rate": 3e-3, "rollout_batch_size": 16, "train_batch_size": 16,
    "gradient_accumulation_steps": 2, **SAMPLING,
}  # fmt: skip
VALIDATION = {"val_prompts": ["1>", "2>"], "val_ground_truths": ["7", "7"]}


@pytest.fixture
def digits():
    """A small model with random weights, and its tokenizer."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "initializer_range": 0.1}
    return load_model(GRPOConfig("random-llama", dataset_name="x", reward_funcs=["x"], seed=3, model_init_kwargs=sizes))


def begins_right(response, truth):
    """1 for a response that begins with the right digit, and 0 for any other one."""
    right = float(response.startswith(truth))
    return {"reward": right, "format_reward": 1.0, "answer_reward": right}


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def log_probability(model, tokenizer, response):
    batch = cs336.tokenize_prompt_and_output(PROMPTS[:1], [response], tokenizer)
    with torch.no_grad():
        return cs336.get_response_log_probs(model, **batch)["log_probs"].sum().item()


def test_get_response_log_probs_of_the_mask_alone(digits):
    """The same values and gradients as those of all positions, of which the mask leaves out the others."""
    model, tokenizer = digits
    batch = cs336.tokenize_prompt_and_output(PROMPTS, ["77", "1", "4567"], tokenizer)
    grads = []
    for given in ({}, {"response_mask": batch["response_mask"]}):
        scored = cs336.get_response_log_probs(model, batch["input_ids"], batch["labels"], True, **given)
        masked = {name: value * batch["response_mask"] for name, value in scored.items()}
        if given:
            assert all(torch.equal(masked[name], scored[name]) for name in scored)
        (masked["log_probs"].sum() + masked["token_entropy"].square().sum()).backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        model.zero_grad()
        grads.append(masked)
    torch.testing.assert_close(grads[0], grads[2], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grads[1], grads[3])


def test_sft_train_loop_step_equals_plain_torch(digits):
    """Its gradient is that of the mean over the batch of the sum over each response, whatever the microbatches."""
    model, tokenizer = digits
    responses = ["77", "1", "4567"]
    batch = cs336.tokenize_prompt_and_output(PROMPTS, responses, tokenizer)
    logits = model(batch["input_ids"]).logits
    each = functional.cross_entropy(logits.transpose(1, 2), batch["labels"], reduction="none")
    expected = (each * batch["response_mask"]).sum(1).mean() / 5.0
    expected.backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()
    model.zero_grad()
    # Three rows in microbatches of two: the second one has a single row.
    history = cs336.sft_train_loop(
        model, tokenizer, PROMPTS, responses, train_batch_size=4, gradient_accumulation_steps=2, normalize_constant=5.0
    )
    assert len(history) == 1
    assert history[0]["loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert history[0]["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert history[0]["response_tokens"] == pytest.approx(7 / 3)


def test_sft_train_loop_learns_responses_without_logits(digits, monkeypatch):
    model, tokenizer = digits
    before, called, linear = log_probability(model, tokenizer, "777"), [], functional.linear

    def watched(hidden, weight, bias=None):
        called.extend(["head"] if weight is model.lm_head.weight else [])
        return linear(hidden, weight, bias)

    monkeypatch.setattr(functional, "linear", watched)
    history = cs336.sft_train_loop(
        model, tokenizer, PROMPTS, ["777"] * 3, n_epochs=20, train_batch_size=3, gradient_accumulation_steps=1,
        learning_rate=1e-2,
    )  # fmt: skip
    monkeypatch.undo()
    assert called == []
    assert [entry["step"] for entry in history] == list(range(1, 21))
    assert history[-1]["loss"] < history[0]["loss"] / 10
    assert log_probability(model, tokenizer, "777") > before / 10
    assert model.training
    cs336.sft_train_loop(model.eval(), tokenizer, PROMPTS, SEVENS)
    assert not model.training


def test_sft_train_loop_trains_adapters_alone(digits):
    peft = pytest.importorskip("peft")
    model, tokenizer = digits
    policy = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.5))
    frozen = {name: p.clone() for name, p in policy.named_parameters() if not p.requires_grad}
    history = cs336.sft_train_loop(
        policy, tokenizer, PROMPTS, ["777"] * 3, n_epochs=10, train_batch_size=3, gradient_accumulation_steps=1,
        learning_rate=3e-2, reward_fn=begins_right, **VALIDATION, **SAMPLING,
    )  # fmt: skip
    assert history[-1]["loss"] < history[1]["loss"]
    assert "val_reward" in history[-1]
    trained = dict(policy.named_parameters())
    assert all(torch.equal(trained[name], before) for name, before in frozen.items())


def test_expert_iteration_learns_from_right_responses(digits):
    model, tokenizer = digits
    history = cs336.expert_iteration(
        model, tokenizer, PROMPTS, SEVENS, begins_right, n_ei_steps=4, ei_batch_size=3, n_rollouts=32, n_epochs=3,
        train_batch_size=8, gradient_accumulation_steps=2, learning_rate=3e-3, **SAMPLING, **VALIDATION,
    )  # fmt: skip
    assert [entry["step"] for entry in history] == [0, 1, 2, 3, 4]
    assert history[1]["mean_reward"] < 0.3
    assert history[4]["mean_reward"] > 0.6
    assert all(entry["num_correct"] == round(entry["mean_reward"] * 96) for entry in history[1:])
    assert "num_correct" not in history[0]
    assert all("val_reward" in entry for entry in history)


def test_expert_iteration_without_a_right_response_changes_nothing(digits):
    model, tokenizer = digits
    before = weights(model)
    with pytest.warns(UserWarning, match="step 1: no response is right, so nothing is learned"):
        history = cs336.expert_iteration(
            model, tokenizer, PROMPTS, ["no"] * 3, begins_right, n_ei_steps=1, n_rollouts=2, **SAMPLING
        )
    assert torch.equal(weights(model), before)
    assert history == [
        {"step": 1, "mean_reward": 0.0, "mean_format_reward": 1.0, "mean_answer_reward": 0.0, "num_correct": 0.0}
    ]


def test_grpo_train_loop_hands_in_metrics_texts_and_curves(digits, tmp_path):
    model, tokenizer = digits
    logged = []
    history = cs336.grpo_train_loop(
        model, tokenizer, PROMPTS, SEVENS, begins_right, **GRPO, **VALIDATION, eval_steps=3, num_logged_samples=1,
        output_dir=tmp_path / "run", log=logged.append,
    )  # fmt: skip
    assert logged == history
    measured = [entry["step"] for entry in history if "val_reward" in entry]
    assert measured == [0, 3, 4]
    for step in (0, 3, 4):
        entry = history[step]
        assert entry["val_reward_low"] <= entry["val_reward"] <= entry["val_reward_high"]
        assert entry["val_format_reward"] == 1.0
        assert entry["val_token_entropy"] > 0
    written = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [entry["step"] for entry in written] == [0, 1, 2, 3, 4]
    assert written[3]["val_reward"] == history[3]["val_reward"]
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert [(sample["step"], sample["prompt"]) for sample in samples] == [(0, "1>"), (3, "1>"), (4, "1>")]
    assert {"response", "ground_truth", "reward", "token_entropy", "response_tokens"} <= samples[0].keys()
    assert (tmp_path / "run" / "curves.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match=r"already has a metrics\.jsonl; choose another folder"):
        cs336.grpo_train_loop(model, tokenizer, PROMPTS, SEVENS, begins_right, **GRPO, output_dir=tmp_path / "run")


def test_grpo_train_loop_without_validation_keeps_its_rollouts(digits, tmp_path):
    cs336.grpo_train_loop(
        *digits, PROMPTS, SEVENS, begins_right, **GRPO, eval_steps=2, num_logged_samples=3, output_dir=tmp_path
    )
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [2, 2, 2, 4, 4, 4]
    assert all(sample["reward"] == sample["response"].startswith("7") for sample in samples)
    assert (tmp_path / "curves.png").is_file()


def test_validation_does_not_change_the_training(digits):
    model, tokenizer = digits
    start = {name: value.clone() for name, value in model.state_dict().items()}
    ends = []
    for validation in ({}, {**VALIDATION, "eval_steps": 1}):
        model.load_state_dict(start)
        torch.manual_seed(1)
        history = cs336.grpo_train_loop(
            model, tokenizer, PROMPTS, SEVENS, begins_right, **GRPO | {"n_grpo_steps": 2}, **validation
        )
        ends.append((weights(model), [entry["mean_reward"] for entry in history if "mean_reward" in entry]))
    assert torch.equal(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]


def test_log_generations_describes_each_response(digits):
    model, tokenizer = digits
    arguments = (model, tokenizer, ["1>", "2>", "3>"] * 4, ["7"] * 12, begins_right)
    samples, metrics = cs336.log_generations(*arguments, **SAMPLING, seed=5)
    assert cs336.log_generations(*arguments, **SAMPLING, seed=5)[0] == samples
    assert cs336.log_generations(*arguments, **SAMPLING, seed=6)[0] != samples
    # The entropies, from the model's own logits.
    batch = cs336.tokenize_prompt_and_output(["1>"], [samples[0]["response"]], tokenizer)
    with torch.no_grad():
        entropy = cs336.compute_entropy(model(batch["input_ids"]).logits)[batch["response_mask"]]
    assert samples[0]["token_entropy"] == pytest.approx(entropy.mean().item(), rel=1e-5)
    assert samples[0]["response_tokens"] == len(entropy)
    rewards = [sample["reward"] for sample in samples]
    assert metrics["mean_reward"] == sum(rewards) / 12
    wrong = [sample["response_tokens"] for sample in samples if not sample["reward"]]
    assert metrics["mean_response_tokens_incorrect"] == pytest.approx(sum(wrong) / len(wrong))
    # All rewards are equal here: the exact binomial interval.
    _, none = cs336.log_generations(model, tokenizer, ["1>"] * 12, ["no"] * 12, begins_right, **SAMPLING)
    assert (none["reward_low"], none["mean_reward"]) == (0.0, 0.0)
    assert none["reward_high"] == pytest.approx(1 - 0.025 ** (1 / 12))
    assert "mean_response_tokens_correct" not in none


@pytest.mark.parametrize(
    ("response", "truth", "formatted", "right"),
    [
        ("so it is </think> <answer>7</answer>", "7", 1, 1),
        ("so it is </think> <answer> \\frac{1}{2} </answer>", "0.5", 1, 1),
        ("so it is </think> <answer>\\boxed{7}</answer>", 7, 1, 1),
        ("so it is </think> <answer>8</answer>", ["7", "8"], 1, 1),
        ("so it is </think> <answer>8</answer>", 7.0, 1, 0),
        # Without its format an answer counts for nothing; the assignment wants exactly one space.
        ("so it is </think>\n<answer>7</answer>", "7", 0, 0),
        ("so it is <answer>7</answer>", "7", 0, 0),
        ("so it is </think> <answer>7", "7", 0, 0),
    ],
)
def test_r1_zero_reward_fn(response, truth, formatted, right):
    expected = {"format_reward": formatted, "answer_reward": right, "reward": right}
    assert cs336.r1_zero_reward_fn(response, truth) == expected


@pytest.mark.parametrize(
    ("response", "formatted", "right"), [("It is \\boxed{7}.", 1, 1), ("\\boxed{8}", 1, 0), ("It is 7.", 0, 0)]
)
def test_question_only_reward_fn(response, formatted, right):
    expected = {"format_reward": formatted, "answer_reward": right, "reward": right}
    assert cs336.question_only_reward_fn(response, "7", fast=False) == expected


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"val_prompts": ["1>"]}, "a validation needs val_ground_truths"),
        ({"val_prompts": ["1>"], "val_ground_truths": ["7"]}, "a validation needs reward_fn"),
        (
            {**VALIDATION, "reward_fn": begins_right, "eval_steps": 0},
            "eval_steps=0 is not allowed: it must be at",
        ),
        ({"val_prompts": [], "val_ground_truths": [], "reward_fn": begins_right}, "there are no prompts"),
        ({"responses": ["7", ""]}, "there are 3 prompts, but 2 responses"),
        ({"responses": ["7", "", "7"]}, "the response to the prompt '3>' is empty"),
        ({"train_batch_size": 3}, "gradient_accumulation_steps=32 is not allowed: it must divide train_batch_size=3"),
    ],
)
def test_sft_train_loop_refuses_bad_input(change, words, digits):
    before = weights(digits[0])
    with pytest.raises(UserError, match=words):
        cs336.sft_train_loop(*digits, **{"prompts": PROMPTS, "responses": SEVENS, **change})
    assert torch.equal(weights(digits[0]), before)


def test_interval_that_cannot_be_estimated_is_left_out(digits, tmp_path):
    """All rewards are equal, but they are not shares."""
    cs336.grpo_train_loop(
        *digits, PROMPTS, SEVENS, lambda *_: {"reward": 0.5}, **GRPO | {"n_grpo_steps": 1}, **VALIDATION,
        output_dir=tmp_path,
    )  # fmt: skip
    assert math.isnan(read_metrics(tmp_path / "metrics.jsonl")[0]["val_reward_low"])
    assert (tmp_path / "curves.png").is_file()
