"""Keywords of a call: ours, those that the model's forward names, and others, which are refused."""

import dataclasses

import peft
import pytest
import torch
import transformers
from torch.nn.parallel import DistributedDataParallel
from transformers import GPT2Config

from grpo_fast.errors import UserError
from grpo_fast.model.inputs import INSTEAD, RENAMED
from grpo_fast.model.policy import FusedPolicy
from grpo_fast.rollout.rows import cache_argument
from grpo_kernels import PolicyObjective
from support.tiny import VOCAB, tiny_model

IDS = torch.tensor([[3, 4, 5, 6]])
UNKNOWN = {
    "old_per_token_logps": "it is called old_logprobs here",
    "ref_per_token_logps": "it is called ref_logprobs here",
    "mask": "it is called completion_mask here",
    "num_logits_to_keep": "it is called logits_to_keep here",
    "beta": r"pass objective=PolicyObjective\(beta=...\)",
    "epsilon": r"pass objective=PolicyObjective\(epsilon=...\)",
    "loss_type": r"pass objective=PRESETS\[...\] of grpo_kernels",
    "num_items_in_batch": "pass weights, computed by grpo_kernels.token_weights",
    "labels": "the scored tokens are those of input_ids",
    "temperature": r"pass it to FusedPolicy\(model, temperature=...\)",
    "adapter_names": "choose the adapter with model.set_adapter",
    "advantage": r"nor of LlamaModel.forward \(did you mean 'advantages'\?\)",
    "return_entropies": r"did you mean 'return_entropy'\?",
    "cu_seqlen": r"did you mean 'cu_seqlens'\?",
    "pixel_values": "pixel_values is no argument of this call, nor of LlamaModel.forward",
    "is_causal": "is_causal is no argument of this call",
    "segments": "segments is no argument of this call",
}
UNUSABLE = {
    cache_argument(tiny_model()): transformers.DynamicCache(),
    "inputs_embeds": torch.zeros(1, 4, 32),
    "output_attentions": True,
    "output_hidden_states": True,
    "output_router_logits": True,
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_keywords_are_refused(name):
    with pytest.raises(UserError, match=UNKNOWN[name]) as error:
        FusedPolicy(tiny_model())(IDS, advantages=torch.ones(1), **{name: torch.ones(1, 3)})
    assert str(error.value).startswith(f"{name} is no argument of this call")
    assert "\n" not in str(error.value)


def test_names_of_other_libraries_are_refused():
    policy = FusedPolicy(tiny_model())
    for name in [*RENAMED, *INSTEAD, *(field.name for field in dataclasses.fields(PolicyObjective))]:
        with pytest.raises(UserError, match=f"{name} is no argument of this call: "):
            policy(IDS, **{name: None})


@pytest.mark.parametrize("name", UNUSABLE)
def test_model_arguments_without_effect_are_refused(name):
    policy = FusedPolicy(tiny_model())
    with pytest.raises(UserError, match=f"{name} is not supported: "):
        policy(IDS, **{name: UNUSABLE[name]})
    assert torch.equal(policy(IDS, **{name: None}, use_cache=True), policy(IDS))


def test_return_dict_must_be_true():
    """Tuples are refused, whether the call or the model's config requests them."""
    model = tiny_model()
    assert torch.equal(FusedPolicy(model)(IDS, return_dict=True), FusedPolicy(model)(IDS))
    with pytest.raises(UserError, match="return_dict=False is not supported"):
        FusedPolicy(model)(IDS, return_dict=False)
    model.config.return_dict = False
    with pytest.raises(UserError, match="the model's config has return_dict=False; set model"):
        FusedPolicy(model)(IDS)


def test_unknown_keywords_are_refused_through_wrappers(alone):
    adapted = peft.get_peft_model(tiny_model(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    inner = tiny_model()
    inner.model = torch.compile(inner.model, backend="eager")
    models = [DistributedDataParallel(tiny_model()), adapted, torch.compile(tiny_model()), inner]
    for model in models:
        policy = FusedPolicy(model)
        with pytest.raises(UserError, match="beta is no argument of this call"):
            policy(IDS, beta=0.1)
        assert torch.equal(policy(IDS, use_cache=False), policy(IDS))


def test_models_that_name_no_arguments_receive_all():
    class AnyArguments(transformers.LlamaModel):
        def forward(self, *args, **kwargs):
            seen.update(kwargs)
            return super().forward(*args, **{name: x for name, x in kwargs.items() if name != "extra"})

    class AnyModel(transformers.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    seen, model = {}, tiny_model()
    expected = FusedPolicy(model)(IDS)
    model.__class__, model.model.__class__ = AnyModel, AnyArguments
    assert torch.equal(FusedPolicy(model)(IDS, extra=3), expected)
    assert seen["extra"] == 3
    with pytest.raises(UserError, match="loss_type is no argument of this call"):
        FusedPolicy(model)(IDS, loss_type="grpo")


def test_padded_rows_are_numbered_the_same_with_keywords():
    """GPT-2 has an embedding for each position; padding is not counted, with or without keywords of the model."""
    model = tiny_model(config_class=GPT2Config, n_positions=32)
    ids = torch.randint(2, VOCAB, (2, 9))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    kinds = torch.randint(2, VOCAB, ids.shape)
    got = FusedPolicy(model)(ids, mask, use_cache=False, token_type_ids=kinds)
    for row, start in ((0, 0), (1, 4)):
        tokens = ids[row : row + 1, start:]
        logits = model(input_ids=tokens, token_type_ids=kinds[row : row + 1, start:]).logits[:, :-1]
        expected = logits.log_softmax(-1).gather(2, tokens[:, 1:, None]).squeeze(2)
        torch.testing.assert_close(got[row, start:], expected[0])
    without = FusedPolicy(model)(ids, mask)
    assert (got - without).abs().max() > 1e-3


@pytest.mark.parametrize("token", [-1, VOCAB])
def test_token_ids_are_checked_with_keywords(token):
    ids = torch.tensor([[3, token, 5]])
    with pytest.raises(UserError, match=f"input_ids holds {token}; allowed are token ids from 0 to {VOCAB - 1}"):
        FusedPolicy(tiny_model())(ids, use_cache=False)


WRONG = {
    "a batch": ({"input_ids": {"input_ids": IDS}}, r"input_ids must be a tensor, got dict; .*policy\(\*\*batch\)"),
    "a list of ids": ({"input_ids": IDS.tolist()}, "input_ids must be a tensor, got list"),
    "ids in float32": ({"input_ids": IDS.float()}, "input_ids must be .* int64 or int32, got .*float32"),
    "a list of masks": ({"attention_mask": [[1, 1, 1, 1]]}, "attention_mask must be a tensor, got list"),
    "a list of scored tokens": ({"completion_mask": [[1, 1]]}, "completion_mask must be a tensor, got list"),
    "a list of advantages": ({"advantages": [1.0]}, "advantages must be a tensor, got list"),
    "one advantage": ({"advantages": 1.0}, "advantages must be a tensor, got float"),
    "a list of offsets": ({"cu_seqlens": [0, 2, 4]}, "cu_seqlens must be a tensor, got list"),
    "a list of positions": ({"position_ids": [[0, 1, 2, 3]]}, "position_ids must be a tensor, got list"),
    "short positions": ({"position_ids": torch.arange(3)[None]}, r"position_ids must be \[1, 4\].*got \[1, 3\]"),
    "flat positions": ({"position_ids": torch.arange(4)}, r"position_ids must be \[1, 4\].*got \[4\]"),
    "a fraction to keep": ({"logits_to_keep": 2.0}, "logits_to_keep must be a whole number from 1 to 4, got 2.0"),
    "true to keep": ({"logits_to_keep": True}, "logits_to_keep must be a whole number from 1 to 4, got True"),
    "a tensor to keep": ({"logits_to_keep": torch.arange(2)}, "logits_to_keep must be a whole number"),
    "a word as a share": ({"advantages": torch.ones(1), "share": "half"}, "share must be a number, got 'half'"),
    "a mask of scores": ({"attention_mask": torch.zeros(1, 4) - 1e9}, "attention_mask holds -1000000000.0; allowed"),
    "a mask of fractions": ({"attention_mask": torch.full((1, 4), 0.5)}, "attention_mask holds 0.5; allowed"),
}


@pytest.mark.parametrize("name", WRONG)
def test_arguments_of_wrong_type_are_refused_in_one_line(name):
    arguments, message = WRONG[name]
    with pytest.raises(UserError, match=message) as error:
        FusedPolicy(tiny_model())(**{"input_ids": IDS, **arguments})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", ["0.7", True, None, 0.0, -1, float("nan"), float("inf"), 1e-45, 1e39, torch.ones(2)])
def test_temperatures_out_of_range_are_refused(value):
    with pytest.raises(UserError, match="temperature must be a number from 1e-6 to 1e6, got") as error:
        FusedPolicy(tiny_model(), temperature=value)
    assert "\n" not in str(error.value)


def test_temperature_may_be_a_tensor_of_one_number():
    model = tiny_model()
    got = FusedPolicy(model, temperature=torch.tensor(0.5))(IDS)
    assert torch.equal(got, FusedPolicy(model, temperature=0.5)(IDS))


def test_models_on_the_meta_device_are_refused():
    policy = FusedPolicy(tiny_model().to("meta"))
    with pytest.raises(UserError, match="on the meta device, without values"):
        policy(IDS)
