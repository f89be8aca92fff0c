"""Attention over packed rows: every implementation compared with one sequence at a time."""

from itertools import pairwise

import pytest
import torch
import transformers
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from grpo_fast.model import attention
from grpo_fast.model.attention import PREFIX, Group, Segments, install, packed_attention
from grpo_fast.model.microbatch_policy import MicrobatchPolicy
from support.rows import packed_logprobs, plain_logprobs
from support.tiny import random_samples, tiny_model

GROUPS = {
    "short group": [Group(0, 5, [4, 1, 6, 4])],
    "long completions": [Group(0, 3, [40, 30, 35])],
    "empty completions": [Group(0, 4, [0, 3, 0])],
    "alone": [Group(0, 2, [7])],
    "mixed": [Group(0, 6, [2, 2, 2]), Group(12, 1, [50]), Group(63, 2, [30, 60]), Group(155, 9, [1, 0, 0])],
}


def reference(query, key, value, groups, scale, window, softcap):
    """The definition, one sequence at a time, in float64; each position's output from the first of its sequences."""
    out = torch.full_like(query, float("nan"))
    for sequence in [s for group in groups for s in group.sequences()]:
        q, k, v = query[sequence], key[sequence], value[sequence]
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        distance = torch.arange(len(sequence))[:, None] - torch.arange(len(sequence))
        seen = (distance >= 0) & (distance < (window or len(sequence)))
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        out[sequence] = torch.einsum("hqk,khd->qhd", weights, v)
    return out


def as_kernel(query, key, value, cu_seqlens, longest, scale, window, softcap, dropout):
    """The result of a kernel for sequences of any length."""
    assert cu_seqlens.dtype == torch.int32
    assert longest == cu_seqlens.diff().max()
    groups = [Group(int(a), int(b - a), [0]) for a, b in pairwise(cu_seqlens)]
    return reference(query, key, value, groups, scale, window, softcap)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("kernel", ["buckets", "varlen", "flex"])
@pytest.mark.parametrize(("window", "softcap", "scale"), [(None, None, None), (5, None, 0.3), (5, 2.0, None)])
@pytest.mark.parametrize("name", GROUPS)
def test_packed_attention_equals_single_sequences(monkeypatch, name, window, softcap, scale, kernel):
    groups = GROUPS[name]
    if kernel != "buckets":
        # The others need CUDA.
        call = as_kernel if kernel == "varlen" else attention._flex()
        monkeypatch.setattr(attention, "varlen_kernel", lambda *_: call)
    torch.manual_seed(0)
    length = sum(group.length for group in groups)
    query, key, value = (torch.randn(length, heads, 8, dtype=torch.float64) for heads in (4, 2, 2))
    inputs = [x.requires_grad_(kernel != "flex") for x in (query, key, value)]
    expected = reference(*inputs, groups, scale, window, softcap)
    got = packed_attention(*inputs, Segments(groups), scale=scale, window=window, softcap=softcap)
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    if kernel == "flex":
        # Its backward needs a GPU.
        return
    coefficients = torch.randn_like(expected)
    for a, b in zip(
        torch.autograd.grad((got * coefficients).sum(), inputs),
        torch.autograd.grad((expected * coefficients).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_groups_are_masked_if_that_is_less_work():
    masked = {name: [group.masked for group in groups] for name, groups in GROUPS.items()}
    assert masked["short group"] == [True]
    assert masked["long completions"] == [False]
    assert masked["alone"] == [False]
    assert not Group(0, 5000, [10, 10]).masked


def test_long_sequences_have_no_mask():
    """Attention over a long row takes memory in proportion to its length."""
    segments = Segments([Group(0, 100, [5_000]), Group(5_100, 50, [7_000, 6_500])])
    query = torch.randn(18_650, 1, 8)
    out = packed_attention(query, query, query, segments)
    assert out.shape == query.shape
    assert all(mask is None for bucket in segments.buckets[0] for mask in bucket.masks.values())


@pytest.mark.parametrize("config_class", [transformers.LlamaConfig, transformers.Gemma3TextConfig])
def test_varlen_kernel_is_used_with_plain_causal_attention(monkeypatch, config_class):
    overrides = {"head_dim": 8, "sliding_window": 7} if config_class is not transformers.LlamaConfig else {}
    model = tiny_model(config_class=config_class, **overrides)
    samples = random_samples(longest=30)
    expected = plain_logprobs(model, samples)
    calls = []
    monkeypatch.setattr(attention, "varlen_kernel", lambda *_: lambda *args: calls.append(1) or as_kernel(*args))
    for layout in ("shared", "packed"):
        got = packed_logprobs(MicrobatchPolicy(model), samples, 200, layout)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert calls


@pytest.mark.parametrize("own", ["sdpa", "eager"])
def test_sampling_is_unchanged_by_install(own):
    """Without segments the model uses its own attention and masks: padding on the left, and a cache."""
    ids = torch.randint(2, 40, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :4] = mask[1, :1] = 0
    found = []
    for packed in (False, True):
        model = tiny_model(torch.float32, attn_implementation=own)
        if packed:
            assert install(model)
            assert install(model)
            assert model.config._attn_implementation == PREFIX + own
        out = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)
        found.append((out, model(ids, attention_mask=mask).logits[:, -1]))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


def test_own_attention_sees_its_own_name():
    """flash-attention's functions are looked up by the name in the configuration."""
    seen = []

    def own(module, *args, **kwargs):
        seen.append(module.config._attn_implementation)
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, *args, **kwargs)

    AttentionInterface.register("of_its_own", own)
    model = tiny_model()
    model.set_attn_implementation("of_its_own")
    assert install(model)
    model(input_ids=torch.tensor([[3, 4]]))
    assert seen == ["of_its_own"] * 2
    assert model.config._attn_implementation == PREFIX + "of_its_own"


def test_checkpointed_layers_see_the_same_segments():
    samples = random_samples()
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model().train()
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            enable({"use_reentrant": False})
        packed_logprobs(MicrobatchPolicy(model), samples, 1000, "shared").sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.equal(*gradients)


def test_varlen_kernel_requires_cuda_and_16_bits():
    query = torch.zeros(1, 1, 8)
    assert attention.varlen_kernel(query, None, 0.0) is None
    assert attention.varlen_kernel(query.half(), None, 0.0) is None
