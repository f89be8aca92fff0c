"""The assignment's functions compared with its published description, written out here."""

import math

import pytest
import torch

from grpo_fast.config import GRPOConfig
from grpo_fast.errors import UserError
from grpo_fast.integrations import cs336
from grpo_fast.model.loading import load_model
from support.tiny import VOCAB, tiny_model

B, T = 3, 10


class Words:
    """A tokenizer of single characters, with the few calls that the assignment makes."""

    def __init__(self, pad_token_id=0):
        self.pad_token_id, self.eos_token_id = pad_token_id, 1

    def __call__(self, text, add_special_tokens=True):
        ids = [2 + ord(letter) % (VOCAB - 2) for letter in text]
        return {"input_ids": [40, *ids] if add_special_tokens else ids}


@pytest.fixture
def batch():
    """The shapes of the assignment's fixtures: log-probabilities on both sides of the clip range, a mask with holes."""
    policy = torch.randn(B, T)
    mask = torch.rand(B, T) > 0.5
    mask[:, 0] = True
    return {
        "policy_log_probs": policy.requires_grad_(),
        "old_log_probs": policy.detach() + 0.6 * torch.randn(B, T),
        "response_mask": mask,
        "raw_rewards": torch.rand(B, 1),
        "advantages": torch.tensor([[0.8], [-0.5], [-0.3]]),
        "cliprange": 0.1,
    }


def test_tokenize_prompt_and_output():
    tokenizer = Words()
    prompts, outputs = ["ab", "abcde", "a"], ["xyz", "x", "wxyz"]
    got = cs336.tokenize_prompt_and_output(prompts, outputs, tokenizer)
    ids = [[tokenizer(p + o, add_special_tokens=False)["input_ids"]] for p, o in zip(prompts, outputs, strict=True)]
    rows = [row + [0] * (6 - len(row)) for (row,) in ids]
    assert got["input_ids"].tolist() == [row[:-1] for row in rows]
    assert got["labels"].tolist() == [row[1:] for row in rows]
    assert got["response_mask"].int().tolist() == [[0, 1, 1, 1, 0], [0, 0, 0, 0, 1], [1, 1, 1, 1, 0]]
    # Without a padding token the end-of-text one fills the rows.
    assert cs336.tokenize_prompt_and_output(prompts, outputs, Words(None))["labels"][0, -1] == 1
    with pytest.raises(UserError, match="there are 3 prompts, but 1 outputs"):
        cs336.tokenize_prompt_and_output(prompts, outputs[:1], tokenizer)


def test_compute_entropy():
    logits = 3 * torch.randn(B, T, 100)
    p = logits.softmax(-1)
    torch.testing.assert_close(cs336.compute_entropy(logits), -(p * p.log()).sum(-1))
    assert cs336.compute_entropy(torch.zeros(1, 8)).item() == pytest.approx(math.log(8))
    # A forbidden token adds nothing, huge logits do not overflow, and the gradient stays finite.
    sharp = torch.tensor([[1e4, 0.0, -float("inf")]], requires_grad=True)
    entropy = cs336.compute_entropy(sharp)
    entropy.sum().backward()
    assert entropy.item() == 0.0
    assert sharp.grad.isfinite().all()


@pytest.mark.parametrize("with_entropy", [False, True])
def test_get_response_log_probs(with_entropy):
    """As computed from the model's own logits, including the gradients of all weights."""
    model = tiny_model()
    tokens = torch.randint(0, VOCAB, (B, T + 1))
    input_ids, labels = tokens[:, :-1], tokens[:, 1:]
    log_p = model(input_ids).logits.log_softmax(-1)
    expected = log_p.gather(-1, labels[..., None]).squeeze(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    upstream, other = torch.randn(2, B, T, dtype=torch.float64)
    ((expected * upstream).sum() + with_entropy * (entropy * other).sum()).backward()
    expected_grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    got = cs336.get_response_log_probs(model, input_ids, labels, return_token_entropy=with_entropy)
    assert set(got) == ({"log_probs", "token_entropy"} if with_entropy else {"log_probs"})
    torch.testing.assert_close(got["log_probs"], expected.detach())
    loss = (got["log_probs"] * upstream).sum()
    if with_entropy:
        torch.testing.assert_close(got["token_entropy"], entropy.detach())
        loss = loss + (got["token_entropy"] * other).sum()
    loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected_grads[name])


def test_get_response_log_probs_builds_no_logits(monkeypatch):
    """The largest tensor of the head stays under that of the full logits."""
    model = tiny_model(dtype=torch.float32, vocab_size=20_000)
    tokens = torch.randint(0, 20_000, (2, 65))
    shapes, linear = [], torch.nn.functional.linear

    def watched(hidden, weight, bias=None):
        shapes.extend(["logits"] if weight is model.lm_head.weight else [])
        return linear(hidden, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", watched)
    cs336.get_response_log_probs(model, tokens[:, :-1], tokens[:, 1:], True)
    assert shapes == []


def test_compute_naive_policy_gradient_loss(batch):
    got = cs336.compute_naive_policy_gradient_loss(batch["raw_rewards"], batch["policy_log_probs"])
    torch.testing.assert_close(got, -batch["raw_rewards"] * batch["policy_log_probs"])
    got.sum().backward()
    torch.testing.assert_close(batch["policy_log_probs"].grad, -batch["raw_rewards"].expand(B, T))


# The assignment's own tests use 0.1 and 10.
@pytest.mark.parametrize("cliprange", [0.1, 0.5, 10.0])
def test_compute_grpo_clip_loss(batch, cliprange):
    policy, old, A = batch["policy_log_probs"], batch["old_log_probs"], batch["advantages"]
    plain = policy.detach().requires_grad_()
    ratio = torch.exp(plain - old)
    inner = ratio.clamp(1 - cliprange, 1 + cliprange)
    expected = -torch.minimum(ratio * A, inner * A)
    expected.square().sum().backward()
    got, metadata = cs336.compute_grpo_clip_loss(A, policy, old, cliprange)
    torch.testing.assert_close(got, expected.detach())
    got.square().sum().backward()
    torch.testing.assert_close(policy.grad, plain.grad)
    assert torch.equal(metadata["clipped"], inner * A < ratio * A)
    assert metadata["clipped"].any() == (cliprange < 1)


def test_compute_policy_gradient_loss(batch):
    policy = batch["policy_log_probs"]
    arguments = {name: batch[name] for name in ("raw_rewards", "advantages", "old_log_probs", "cliprange")}
    got = {name: cs336.compute_policy_gradient_loss(policy, name, **arguments) for name in cs336.NEEDED}
    torch.testing.assert_close(got["no_baseline"][0], -batch["raw_rewards"] * policy)
    torch.testing.assert_close(got["reinforce_with_baseline"][0], -batch["advantages"] * policy)
    clip, metadata = cs336.compute_grpo_clip_loss(batch["advantages"], policy, batch["old_log_probs"], 0.1)
    torch.testing.assert_close(got["grpo_clip"][0], clip)
    assert got["grpo_clip"][1].keys() == metadata.keys()
    for loss_type, needed in cs336.NEEDED.items():
        for name in needed:
            with pytest.raises(UserError, match=f"loss_type='{loss_type}' needs {name}"):
                cs336.compute_policy_gradient_loss(policy, loss_type, **{**arguments, name: None})
    with pytest.raises(UserError, match="loss_type='ppo' is not allowed: it must be one of no_baseline, "):
        cs336.compute_policy_gradient_loss(policy, "ppo", **arguments)


@pytest.mark.parametrize("dim", [None, 0, 1, -1])
def test_masked_mean_and_masked_normalize(dim):
    tensor, mask = torch.randn(B, T), torch.rand(B, T) > 0.5
    mask[0], mask[:, 2] = False, False
    total = (tensor * mask).sum() if dim is None else (tensor * mask).sum(dim)
    count = mask.sum() if dim is None else mask.sum(dim)
    mean = cs336.masked_mean(tensor, mask, dim)
    torch.testing.assert_close(mean, total / count, equal_nan=True)
    assert mean.isnan().any() == (dim is not None)
    torch.testing.assert_close(cs336.masked_normalize(tensor, mask, 42.0, dim), total / 42.0)
    assert cs336.masked_mean(tensor, torch.zeros(B, T)).isnan()


def test_sft_microbatch_train_step(batch):
    policy, mask = batch["policy_log_probs"], batch["response_mask"]
    loss, _ = cs336.sft_microbatch_train_step(policy, mask, gradient_accumulation_steps=2, normalize_constant=42.0)
    assert loss.item() == pytest.approx((-(policy.detach() * mask).sum(-1) / 42.0).mean().item() / 2)
    torch.testing.assert_close(policy.grad, -mask.float() / 42.0 / B / 2)
    # Gradients add up from one microbatch to the next.
    cs336.sft_microbatch_train_step(policy, mask, gradient_accumulation_steps=2, normalize_constant=42.0)
    torch.testing.assert_close(policy.grad, -mask.float() / 42.0 / B)


@pytest.mark.parametrize("loss_type", cs336.NEEDED)
def test_grpo_microbatch_train_step(batch, loss_type):
    """Mean over each response's own tokens, then over the batch, then over the accumulation steps."""
    plain = batch["policy_log_probs"].detach().requires_grad_()
    ratio = torch.exp(plain - batch["old_log_probs"])
    A, mask = batch["advantages"], batch["response_mask"]
    each = {
        "no_baseline": -batch["raw_rewards"] * plain,
        "reinforce_with_baseline": -A * plain,
        "grpo_clip": -torch.minimum(ratio * A, ratio.clamp(0.9, 1.1) * A),
    }[loss_type]
    expected = ((each * mask).sum(-1) / mask.sum(-1)).mean() / 4
    expected.backward()
    loss, metadata = cs336.grpo_microbatch_train_step(**batch, gradient_accumulation_steps=4, loss_type=loss_type)
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(batch["policy_log_probs"].grad, plain.grad)
    assert ("clip_fraction" in metadata) == (loss_type == "grpo_clip")
    if loss_type == "grpo_clip":
        clipped = (ratio.clamp(0.9, 1.1) * A < ratio * A) & mask
        assert metadata["clip_fraction"].item() == pytest.approx((clipped.sum() / mask.sum()).item())


def test_grpo_microbatch_train_step_with_an_empty_response_is_nan(batch):
    batch["response_mask"][1] = False
    loss, _ = cs336.grpo_microbatch_train_step(**batch, gradient_accumulation_steps=1, loss_type="no_baseline")
    assert loss.isnan()


def reward_fn(response, truth):
    right = float(len(response) / 10)
    return {"reward": right, "format_reward": 1.0, "answer_reward": float(response == truth)}


@pytest.mark.parametrize("normalize_by_std", [True, False])
def test_compute_group_normalized_rewards(normalize_by_std):
    responses = ["a", "abc", "abcd", "abcde", "aa", "aa", "aa", "aa"]
    advantages, rewards, metadata = cs336.compute_group_normalized_rewards(
        reward_fn, responses, ["aa"] * 8, group_size=4, advantage_eps=1e-6, normalize_by_std=normalize_by_std
    )
    raw = [0.1, 0.3, 0.4, 0.5]
    mean = sum(raw) / 4
    # Bessel's correction: the sum of squares over 3.
    std = math.sqrt(sum((r - mean) ** 2 for r in raw) / 3)
    expected = [(r - mean) / (std + 1e-6 if normalize_by_std else 1) for r in raw]
    assert advantages.tolist()[:4] == pytest.approx(expected, rel=1e-5)
    assert advantages.tolist()[4:] == pytest.approx([0.0] * 4, abs=1e-2)
    assert rewards.tolist() == pytest.approx([*raw, 0.2, 0.2, 0.2, 0.2])
    assert metadata["mean_reward"] == pytest.approx(2.1 / 8)
    assert metadata["mean_answer_reward"] == 0.5
    assert (metadata["min_reward"], metadata["max_reward"]) == (pytest.approx(0.1), pytest.approx(0.5))
    with pytest.raises(UserError, match="group_size=3 is not allowed: it must divide the 8 responses"):
        cs336.compute_group_normalized_rewards(reward_fn, responses, ["aa"] * 8, 3, 1e-6, True)


def digits_model():
    config = GRPOConfig(
        "random-llama", dataset_name="x", reward_funcs=["x"], seed=3,
        model_init_kwargs={"hidden_size": 32, "intermediate_size": 32, "initializer_range": 0.1},
    )  # fmt: skip
    return load_model(config)


LOOP = {
    "learning_rate": 3e-3,
    "rollout_batch_size": 32,
    "train_batch_size": 32,
    "gradient_accumulation_steps": 4,
    "sampling_max_tokens": 6,
    "stop": None,
}


def sevens(response, truth):
    share = response.count(truth) / max(len(response), 1)
    return {"reward": share, "format_reward": 1.0, "answer_reward": share}


@pytest.mark.slow
@pytest.mark.parametrize("loss_type", cs336.NEEDED)
def test_grpo_train_loop_learns(loss_type):
    """Random weights learn to answer with sevens."""
    torch.manual_seed(0)
    model, tokenizer = digits_model()
    logged = []
    history = cs336.grpo_train_loop(
        model, tokenizer, ["12>", "3>"], ["7", "7"], sevens, loss_type=loss_type, n_grpo_steps=12,
        epochs_per_rollout_batch=2 if loss_type == "grpo_clip" else 1, log=logged.append, **LOOP,
    )  # fmt: skip
    assert logged == history
    assert [entry["step"] for entry in history] == list(range(1, 13))
    assert history[0]["mean_reward"] < 0.2
    assert sum(entry["mean_reward"] for entry in history[-3:]) / 3 > 0.4
    assert all(4 <= entry["response_tokens"] <= 6 for entry in history)
    assert all(entry["grad_norm"] > 0 for entry in history[:5])
    assert ("clip_fraction" in history[0]) == (loss_type == "grpo_clip")
    if loss_type == "grpo_clip":
        assert max(entry["clip_fraction"] for entry in history) > 0


def test_grpo_train_loop_step_is_the_same_for_any_microbatches():
    weights = []
    for steps in (1, 8):
        torch.manual_seed(0)
        model, tokenizer = digits_model()
        options = {**LOOP, "gradient_accumulation_steps": steps, "n_grpo_steps": 1}
        cs336.grpo_train_loop(model, tokenizer, ["12>", "3>"], ["7", "7"], sevens, **options)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    before = torch.cat([p.detach().flatten() for p in digits_model()[0].parameters()])
    # Adam's first step is the gradient's sign times the learning rate, so only entries near 0 may differ.
    moved = (weights[0] - before).abs() > 0.5 * LOOP["learning_rate"]
    assert moved.float().mean() > 0.5
    assert ((weights[0] - weights[1]).abs() < 1e-5).float().mean() > 0.99


def test_grpo_train_loop_keeps_special_tokens_in_responses():
    torch.manual_seed(0)
    model, tokenizer = digits_model()
    tokenizer.add_special_tokens({"additional_special_tokens": ["7"]})
    seen = []
    options = {**LOOP, "n_grpo_steps": 1}
    cs336.grpo_train_loop(
        model, tokenizer, ["12>"], ["7"], lambda response, truth: seen.append(response) or sevens(response, truth),
        **options,
    )  # fmt: skip
    assert any("7" in response for response in seen)
    assert not any("</s>" in response for response in seen)


def test_grpo_train_loop_stops_sampling_at_the_text():
    """At once, so that responses are scored, and trained on, up to the end of the text."""
    torch.manual_seed(0)
    model, tokenizer = digits_model()
    seen = []
    options = {**LOOP, "n_grpo_steps": 1, "sampling_min_tokens": 2, "sampling_max_tokens": 12, "stop": "7"}
    (metrics,) = cs336.grpo_train_loop(
        model, tokenizer, ["12>"], ["7"], lambda response, truth: seen.append(response) or sevens(response, truth),
        **options,
    )  # fmt: skip
    # Only one within the first two tokens is ignored.
    assert all("7" not in response[2:-1] for response in seen)
    assert sum(response[2:].endswith("7") for response in seen) > 8
    assert metrics["response_tokens"] == pytest.approx(sum(map(len, seen)) / len(seen))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"group_size": 5}, "group_size=5 is not allowed: it must divide rollout_batch_size=32"),
        ({"train_batch_size": 24}, "train_batch_size=24 is not allowed: it must divide rollout_batch_size=32"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps=0 is not allowed: it must divide train_"),
        ({"ground_truths": ["7"]}, "there are 2 prompts, but 1 ground truths"),
    ],
)
def test_grpo_train_loop_refuses_bad_input(change, words):
    arguments = {"prompts": ["1>", "2>"], "ground_truths": ["7", "7"], **LOOP, **change}
    with pytest.raises(UserError) as caught:
        cs336.grpo_train_loop(*digits_model(), reward_fn=sevens, **arguments)
    assert words in str(caught.value)
