import pytest
import torch
import transformers

from grpo_fast.errors import UserError
from grpo_fast.policy import FusedPolicy
from test_packing import packed_logprobs, plain_logprobs
from tiny import random_samples, tiny_model

ARCHITECTURES = {
    "llama, tied": (transformers.LlamaConfig, {"tie_word_embeddings": True}),
    "qwen2": (transformers.Qwen2Config, {}),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 8}),
    "gemma2, softcap": (transformers.Gemma2Config, {"head_dim": 8, "final_logit_softcapping": 3.0}),
    "granite, scaled": (transformers.GraniteConfig, {"logits_scaling": 3.0}),
    "cohere, scaled": (transformers.CohereConfig, {"logit_scale": 0.3}),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("share_prompts", ["auto", "never"])
def test_equals_the_models_own_logits(name, share_prompts):
    config_class, overrides = ARCHITECTURES[name]
    model = tiny_model(config_class=config_class, **overrides)
    policy = FusedPolicy(model)
    policy.check_head(list(range(2, 20)))
    samples = random_samples()
    longest = policy.longest_shared_row(share_prompts)
    assert (longest > 0) == (share_prompts == "auto")
    with torch.no_grad():
        got = packed_logprobs(policy, samples, 200, longest)
        torch.testing.assert_close(got, plain_logprobs(model, samples), rtol=1e-5, atol=1e-5)


def test_temperature_divides_the_logits():
    model = tiny_model()
    samples = random_samples(groups=1, per_group=1)
    prompt, completion, _ = samples[0]
    ids = torch.tensor([prompt + completion])
    with torch.no_grad():
        expected = (model(input_ids=ids).logits[0, :-1] / 0.7).log_softmax(-1).gather(1, ids[0, 1:, None]).squeeze(1)
        got = packed_logprobs(FusedPolicy(model, temperature=0.7), samples, 100, 0)
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
        FusedPolicy(model).check_head([2, 3, 4, 5])


def test_sharing_is_bounded_by_a_sliding_window():
    window = {"head_dim": 8, "sliding_window": 16}
    assert FusedPolicy(tiny_model(config_class=transformers.Gemma2Config, **window)).longest_shared_row("auto") == 16


def test_sharing_is_refused_where_attention_cannot():
    model = tiny_model()
    model.config._attn_implementation = "flash_attention_2"
    policy = FusedPolicy(model)
    assert policy.longest_shared_row("auto") == 0
    with pytest.raises(UserError, match="share_prompts"):
        policy.longest_shared_row("always")
