import pytest
import torch
import transformers
from accelerate import Accelerator

from grpo_fast.config import GRPOConfig
from grpo_fast.errors import UserError
from grpo_fast.model import attention
from grpo_fast.model.layout import lay_out
from grpo_fast.model.microbatch_policy import MicrobatchPolicy
from grpo_fast.model.policy import FusedPolicy, LossInputs
from grpo_fast.train.learner import Learner
from grpo_kernels import PRESETS, linear_logprob
from support.rows import LAYOUTS, packed_logprobs, plain_logprobs
from support.small import SMALL
from support.tiny import random_samples, tiny_model

ARCHITECTURES = {
    "llama, tied": (transformers.LlamaConfig, {"tie_word_embeddings": True}),
    "qwen2": (transformers.Qwen2Config, {}),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 8}),
    "mistral, window": (transformers.MistralConfig, {"sliding_window": 5}),
    "gemma2, softcap": (transformers.Gemma2Config, {"head_dim": 8, "final_logit_softcapping": 3.0}),
    "gemma2, softcap in eager attention": (
        transformers.Gemma2Config,
        {"head_dim": 8, "attn_logit_softcapping": 2.0, "attn_implementation": "eager"},
    ),
    "gemma3, window": (transformers.Gemma3TextConfig, {"head_dim": 8, "sliding_window": 7}),
    "granite, scaled": (transformers.GraniteConfig, {"logits_scaling": 3.0}),
    "cohere, scaled": (transformers.CohereConfig, {"logit_scale": 0.3}),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_microbatch_policy_equals_the_models_own_logits(name, layout):
    """Log-probabilities, and the gradient of every parameter."""
    config_class, overrides = ARCHITECTURES[name]
    model = tiny_model(config_class=config_class, **overrides)
    policy = MicrobatchPolicy(model)
    policy.check_head(list(range(2, 20)))
    assert policy.check_packing(list(range(2, 20)), "always")
    samples = random_samples(longest=30)
    expected = plain_logprobs(model, samples)
    coefficients = torch.randn(expected.shape, dtype=torch.float64)
    (expected * coefficients).sum().backward()
    expected_grads = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    got = packed_logprobs(policy, samples, 200, layout)
    (got * coefficients).sum().backward()
    # transformers' norms and rotary embeddings compute in float32 for any dtype.
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    for parameter, grad in zip(model.parameters(), expected_grads, strict=True):
        assert (parameter.grad - grad).norm() <= 1e-5 * grad.norm() + 1e-9


def test_temperature_divides_the_logits():
    model = tiny_model()
    samples = random_samples(groups=1, per_group=1)
    prompt, completion, _ = samples[0]
    ids = torch.tensor([prompt + completion])
    with torch.no_grad():
        expected = (model(input_ids=ids).logits[0, :-1] / 0.7).log_softmax(-1).gather(1, ids[0, 1:, None]).squeeze(1)
        got = packed_logprobs(MicrobatchPolicy(model, temperature=0.7), samples, 100, "packed")
    torch.testing.assert_close(got, expected[len(prompt) - 1 :])


def test_unknown_logit_transform_is_refused():
    model = tiny_model()
    forward = model.forward

    def scaled(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits * 1.5
        return output

    model.forward = scaled
    with pytest.raises(UserError, match="transforms its logits"):
        MicrobatchPolicy(model).check_head([2, 3, 4, 5])


def test_head_is_compared_under_autocast_too(monkeypatch):
    """A head that is wrong only in the precision of the steps is refused, and one that is right is not."""
    policy, compute = MicrobatchPolicy(tiny_model(torch.float32)), linear_logprob
    with torch.autocast("cpu", torch.bfloat16):
        policy.check_head([2, 3, 4, 5])

    def wrong(*args, **options):
        return compute(*args, **options) * (2.0 if torch.is_autocast_enabled("cpu") else 1.0)

    monkeypatch.setattr("grpo_fast.model.policy.linear_logprob", wrong)
    policy.check_head([2, 3, 4, 5])
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(UserError, match=r"transforms its logits.* differ by \S+ under torch.bfloat16 autocast"),
    ):
        policy.check_head([2, 3, 4, 5])


@pytest.mark.parametrize("bf16", [True, False])
def test_learner_checks_the_head_as_its_steps_run(bf16, monkeypatch):
    found = []
    monkeypatch.setattr(
        MicrobatchPolicy, "check_head", lambda policy, prompt: found.append(torch.is_autocast_enabled("cpu"))
    )
    accelerator = Accelerator(cpu=True, mixed_precision="bf16" if bf16 else "no")
    config = GRPOConfig(**{**SMALL, "bf16": bf16})
    Learner(tiny_model(torch.float32), config, accelerator, [4, 5, 6], 0)
    assert found == [bf16]


def test_check_packing_with_other_attention(monkeypatch):
    model = tiny_model()
    model.config.layer_types = ["full_attention", "linear_attention"]
    policy = MicrobatchPolicy(model)
    assert not policy.check_packing([2, 3, 4, 5], "auto")
    with pytest.raises(UserError, match=r"padding_free='always' is not possible.*cannot be replaced"):
        policy.check_packing([2, 3, 4, 5], "always")


def test_check_packing_with_different_results(monkeypatch):
    """A model that adds to its scores, or that looks across sequences, is detected."""
    policy = MicrobatchPolicy(tiny_model())
    monkeypatch.setattr(attention, "UNKNOWN", ("scaling",))
    assert not policy.check_packing([2, 3, 4, 5], "auto")
    with pytest.raises(UserError, match="adds scaling to its scores"):
        policy.check_packing([2, 3, 4, 5], "always")
    monkeypatch.undo()
    assert policy.check_packing([2, 3, 4, 5], "always")
    monkeypatch.setattr(attention, "packed_attention", lambda query, key, value, *_, **__: query)
    with pytest.raises(UserError, match="differ by"):
        policy.check_packing([2, 3, 4, 5], "always")


def test_check_packing_with_an_error_of_the_model(monkeypatch):
    """Models that cannot take packed rows may raise any exception."""

    def fail(*_, **__):
        raise RuntimeError("no state for\nthis shape")

    policy = MicrobatchPolicy(tiny_model())
    monkeypatch.setattr(attention, "packed_attention", fail)
    assert not policy.check_packing([2, 3, 4, 5], "auto")
    with pytest.raises(UserError, match="LlamaForCausalLM and attention 'packed_sdpa': no state for this shape"):
        policy.check_packing([2, 3, 4, 5], "always")


@pytest.mark.parametrize("packed", [False, True])
def test_policies_share_one_layout_and_one_forward(packed):
    """What `FusedPolicy` lays out, the trainer's policy computes: the same numbers, bit for bit."""
    model, ids = tiny_model(), torch.arange(2, 16).view(2, 7)
    arguments = {"input_ids": ids, "attention_mask": torch.tensor([[1] * 7, [0] * 3 + [1] * 4])}
    if packed:
        arguments = {"input_ids": ids.view(1, 14), "cu_seqlens": torch.tensor([0, 5, 8, 14])}
    expected = FusedPolicy(model)(**arguments, return_entropy=True)
    got = MicrobatchPolicy(model)(lay_out(**arguments), with_entropy=True)
    assert got[0].shape == expected[0].shape
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_loss_inputs_are_passed_by_keyword():
    with pytest.raises(TypeError, match="takes 1 positional argument"):
        LossInputs(PRESETS["grpo"], torch.ones(1), torch.ones(1))
