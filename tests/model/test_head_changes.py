"""A head that changes after the policy was built: followed exactly, or refused in one line at the next call."""

import copy

import peft
import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch.nn.utils import parametrizations, weight_norm
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from grpo_fast.errors import UserError
from grpo_fast.model.microbatch_policy import MicrobatchPolicy
from grpo_fast.model.policy import FusedPolicy
from support.rows import packed_logprobs, plain_logprobs
from support.tiny import VOCAB, random_samples, tiny_model

IDS = torch.randint(2, VOCAB, (2, 9), generator=torch.Generator().manual_seed(3))
COEFFICIENTS = torch.randn(2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


def lora(**options):
    return peft.LoraConfig(r=2, task_type="CAUSAL_LM", init_lora_weights=False, **options)


def adapted(**options):
    def change(model):
        peft.get_peft_model(model, lora(**options))

    return change


def ia3(model):
    config = peft.IA3Config(target_modules=["lm_head"], feedforward_modules=[], task_type="CAUSAL_LM")
    peft.get_peft_model(model, config)


def second_adapter(model):
    wrapped = peft.get_peft_model(model, lora(target_modules=["q_proj"]))
    wrapped.add_adapter("second", lora(target_modules=["lm_head"]))
    wrapped.set_adapter("second")


def merged(model):
    peft.get_peft_model(model, lora(target_modules=["q_proj", "lm_head"])).merge_and_unload()


def merged_in_place(model):
    """The weight that is tied to the head changes, and the adapter stays in place."""
    peft.get_peft_model(model, lora(target_modules=["embed_tokens"])).merge_adapter()


def disabled(model):
    peft.get_peft_model(model, lora(target_modules=["q_proj", "embed_tokens"])).base_model.disable_adapter_layers()


def switched(model):
    wrapped = peft.get_peft_model(model, lora(target_modules=["q_proj"]))
    wrapped.add_adapter("second", lora(target_modules=["q_proj", "embed_tokens"]))
    wrapped.set_adapter("second")


def another_head(model):
    model.lm_head = torch.nn.Linear(32, VOCAB, bias=True, dtype=torch.float64)


def larger_vocabulary(model):
    model.resize_token_embeddings(VOCAB + 7)


def bias(model):
    model.lm_head.bias = torch.nn.Parameter(torch.randn(VOCAB, dtype=torch.float64))


def weight_hook(model):
    model.lm_head.weight.register_hook(lambda grad: 2 * grad)


def moved_by_accelerate(model):
    add_hook_to_module(model.lm_head, AlignDevicesHook(execution_device="cpu"))


FOLLOWED = {
    "frozen": lambda model: model.lm_head.requires_grad_(False),
    "another head": another_head,
    "a larger vocabulary": larger_vocabulary,
    "a bias": bias,
    "a hook of the weight": weight_hook,
    "a parametrization": lambda model: parametrizations.weight_norm(model.lm_head),
    "an orthogonal parametrization": lambda model: parametrizations.orthogonal(model.lm_head),
    "an adapter elsewhere": adapted(target_modules=["q_proj", "up_proj"]),
    "an adapter of the embedding": adapted(target_modules=["embed_tokens"]),
    "a trained copy of the embedding": adapted(target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
    "merged": merged,
    "merged in place": merged_in_place,
    "disabled": disabled,
    "switched": switched,
    "compiled in place": lambda model: model.lm_head.compile(backend="eager"),
    "moved by accelerate": moved_by_accelerate,
}
ADAPTER = "the output head of LlamaForCausalLM carries an adapter"


def doubled(model):
    forward = model.lm_head.forward
    model.lm_head.forward = lambda hidden: 2 * forward(hidden)


class Doubled(torch.nn.Linear):
    def forward(self, hidden):
        return 2 * super().forward(hidden)


def another_kind(model):
    model.lm_head = Doubled(32, VOCAB, bias=False, dtype=torch.float64)


def sequence(model):
    model.lm_head = torch.nn.Sequential(model.lm_head, torch.nn.Dropout())


def int8(model):
    quantize_(model.float(), Int8WeightOnlyConfig(), filter_fn=lambda module, name: name == "lm_head")


def fp8(model):
    model.lm_head.weight.data = model.lm_head.weight.data.to(torch.float8_e4m3fn)


def no_parameter(model):
    weight = model.lm_head.weight.detach()
    del model.lm_head.weight
    model.lm_head.weight = weight


REFUSED = {
    "LoRA": (adapted(target_modules=["lm_head"]), ADAPTER),
    "DoRA": (adapted(target_modules=["lm_head"], use_dora=True), ADAPTER),
    "IA3": (ia3, ADAPTER),
    "a parameter's LoRA": (lambda m: peft.get_peft_model(m, lora(target_parameters=["lm_head.weight"])), ADAPTER),
    "a second adapter": (second_adapter, ADAPTER),
    "a trained copy": (adapted(target_modules=["q_proj"], modules_to_save=["lm_head"]), ADAPTER),
    "a forward hook": (
        lambda model: model.lm_head.register_forward_hook(lambda *_: None),
        r"the output head of LlamaForCausalLM has a forward hook \(.*<lambda>\), which would not run",
    ),
    "a pre-hook": (
        lambda model: model.lm_head.register_forward_pre_hook(lambda *_: None),
        "LlamaForCausalLM has a forward pre-hook",
    ),
    "a backward hook": (
        lambda model: model.lm_head.register_full_backward_hook(lambda *_: None),
        "LlamaForCausalLM has a backward hook",
    ),
    "the old weight norm": (lambda model: weight_norm(model.lm_head), "is no parameter"),
    "a hook of the model": (
        lambda model: model.register_forward_hook(lambda *_: None),
        "LlamaForCausalLM has a forward hook .* put it on the model's base_model",
    ),
    "its own forward": (doubled, "has its own forward"),
    "another class": (another_kind, "has its own forward"),
    "several layers": (sequence, "no linear output head, but Sequential"),
    "int8": (int8, r"is quantised \(.*Int8.*\); leave it in 16 or 32 bits"),
    "fp8": (fp8, r"is quantised \(torch.float8_e4m3fn\)"),
    "no parameter": (no_parameter, "is no parameter"),
    "meta": (lambda model: model.lm_head.to("meta"), "on the meta device, without values"),
    "offloaded": (lambda model: cpu_offload(model.lm_head, "cpu"), "has its own forward"),
    "another softcap": (
        lambda model: setattr(model.config, "final_logit_softcapping", 3.0),
        "transforms its logits in a way that is not supported",
    ),
}
# With embeddings tied to the head.
REFUSED_IF_TIED = {
    "an adapter that is tied": adapted(target_modules=["embed_tokens"], ensure_weight_tying=True),
    "tokens": adapted(target_modules=["q_proj"], trainable_token_indices=[3, 5]),
}


def gradients(model, logprobs, coefficients):
    model.zero_grad()
    (logprobs * coefficients).sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(got, expected):
    assert got.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(got[name], grad, rtol=1e-8, atol=1e-10, msg=name)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("change", FOLLOWED)
def test_policy_follows_a_changed_head(change, tied):
    """Log-probabilities and every gradient are those of plain logits, before and after."""
    model = tiny_model(tie_word_embeddings=tied, pad_token_id=None)
    policy = FusedPolicy(model)
    policy(IDS)
    FOLLOWED[change](model)
    model.model.norm.requires_grad_()
    logprobs = model(input_ids=IDS).logits[:, :-1].log_softmax(-1).gather(2, IDS[:, 1:, None]).squeeze(2)
    expected = gradients(model, logprobs, COEFFICIENTS)
    for one in (policy, FusedPolicy(model)):
        got = one(IDS)
        torch.testing.assert_close(got, logprobs, rtol=1e-8, atol=1e-8)
        assert_same_gradients(gradients(model, got, COEFFICIENTS), expected)


@pytest.mark.parametrize("change", [*REFUSED, *REFUSED_IF_TIED])
def test_policy_refuses_a_changed_head(change):
    apply, message = REFUSED.get(change) or (REFUSED_IF_TIED[change], ADAPTER)
    model = tiny_model(tie_word_embeddings=change in REFUSED_IF_TIED)
    policy = FusedPolicy(model)
    policy(IDS)
    apply(model)
    with pytest.raises(UserError, match=message) as error:
        policy(IDS, advantages=torch.ones(2))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("change", ["another head", "an adapter elsewhere", "merged", "a parametrization"])
def test_trainers_policy_follows_a_changed_head(change):
    model, samples = tiny_model(), random_samples(groups=2, per_group=2)
    policy = MicrobatchPolicy(model)
    packed_logprobs(policy, samples, 200, "shared")
    FOLLOWED[change](model)
    model.model.norm.requires_grad_()
    logprobs = plain_logprobs(model, samples)
    coefficients = torch.randn(logprobs.shape, dtype=torch.float64)
    expected = gradients(model, logprobs, coefficients)
    got = packed_logprobs(policy, samples, 200, "shared")
    torch.testing.assert_close(got, logprobs, rtol=1e-8, atol=1e-8)
    assert_same_gradients(gradients(model, got, coefficients), expected)


@pytest.mark.parametrize("change", ["LoRA", "IA3", "a trained copy", "a forward hook", "its own forward", "fp8"])
def test_trainers_policy_refuses_a_changed_head(change):
    apply, message = REFUSED[change]
    model, samples = tiny_model(), random_samples(groups=1, per_group=2)
    policy = MicrobatchPolicy(model)
    packed_logprobs(policy, samples, 200, "shared")
    apply(model)
    with pytest.raises(UserError, match=message):
        packed_logprobs(policy, samples, 200, "shared")


def test_policy_compares_another_head_again():
    """With the model's own logits, so that an unknown transform is noticed; a copied policy is independent."""
    model = tiny_model()
    policy = FusedPolicy(model)
    policy(IDS)
    other, forward = copy.deepcopy(policy), model.forward

    def scaled(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits * 1.5
        return output

    model.forward = scaled
    with pytest.raises(UserError, match="transforms its logits"):
        policy(IDS)
    assert other(IDS).shape == (2, 8)


def test_policy_follows_mixed_adapters():
    model = peft.get_peft_model(tiny_model(), lora(target_modules=["q_proj"]), mixed=True)
    expected = model(input_ids=IDS).logits[:, :-1].log_softmax(-1).gather(2, IDS[:, 1:, None]).squeeze(2)
    torch.testing.assert_close(FusedPolicy(model)(IDS), expected, rtol=1e-8, atol=1e-8)


def test_policy_refuses_peft_methods_outside_the_layers():
    activated = peft.get_peft_model(tiny_model(), lora(target_modules=["q_proj"], alora_invocation_tokens=[3, 4]))
    with pytest.raises(UserError, match="activated LoRA"):
        FusedPolicy(activated)
    poly = peft.PolyConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=2, n_tasks=2, n_skills=2, n_splits=1)
    with pytest.raises(UserError, match="PolyModel does more than its layers do"):
        FusedPolicy(peft.get_peft_model(tiny_model(), poly))
    plain = peft.get_peft_model(tiny_model(), lora(target_modules=["q_proj"]))
    policy = FusedPolicy(plain)
    plain.base_model.register_forward_pre_hook(lambda *_: None)
    with pytest.raises(UserError, match="LoraModel has a forward pre-hook"):
        policy(IDS)
