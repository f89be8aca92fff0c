"""Frozen layers in host memory: the same numbers bit for bit, and copies that are counted."""

import peft
import pytest
import torch

from grpo_fast.config import GRPOConfig
from grpo_fast.errors import UserError
from grpo_fast.model.activations import prepare_activations
from grpo_fast.model.host_layers import SLOTS, keep_layers_on_host, spread
from grpo_fast.trainer import GRPOTrainer
from support.tiny import VOCAB, tiny_model

LAYERS = 6
CPU = torch.device("cpu")
FIELDS = {"gradient_checkpointing": True, "use_peft": True}


def config(rewards=("exact_answer",), **fields) -> GRPOConfig:
    return GRPOConfig("random-llama", dataset_name="sort_digits", reward_funcs=list(rewards), **FIELDS, **fields)


def prepared(count, lora=True, layers=LAYERS, **fields):
    """A model with adapters that are not zero, and what keeps `count` of its layers in host memory."""
    made = tiny_model(num_hidden_layers=layers).train()
    if lora:
        torch.manual_seed(0)
        options = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        peft.get_peft_model(made, options, autocast_adapter_dtype=False)
    prepare_activations(made, config(**fields))
    return made, keep_layers_on_host(made, count, CPU, min_bytes=1)


def batch(length=24, seed=0):
    return torch.randint(2, VOCAB, (2, length), generator=torch.Generator().manual_seed(seed))


def gradients(made, *batches, dtype=None):
    """Gradients by name, summed over the microbatches."""
    made.zero_grad(set_to_none=True)
    for ids in batches:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None):
            hidden = made.base_model(input_ids=ids, use_cache=False).last_hidden_state
        hidden.double().square().mean().backward()
    return {name: p.grad.clone() for name, p in made.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("count", "fields", "dtype"),
    [
        (1, {}, None),
        (2, {"activation_offloading": True}, None),
        (3, {}, None),
        (3, {"tiled_mlp": True, "activation_offloading": True}, torch.bfloat16),
        (LAYERS, {}, None),
        (LAYERS, {"tiled_mlp": True, "activation_offloading": True}, None),
    ],
)
def test_host_layers_leave_the_gradients_as_they_are(count, fields, dtype):
    plain, _ = prepared(0, **fields)
    batches = [batch(), batch(seed=1), batch(length=7, seed=2)]
    expected = gradients(plain, *batches, dtype=dtype)
    moved, layers = prepared(count, **fields)
    got = gradients(moved, *batches, dtype=dtype)
    assert len(expected) == 2 * 7 * LAYERS
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        assert torch.equal(got[name], gradient), name
    assert layers.bytes_on_host > 0


def test_host_layers_copies_of_a_step():
    """The forward copies each layer once, the backward each but those that the slots still hold."""
    made, layers = prepared(LAYERS)
    gradients(made, batch())
    assert layers.copies == LAYERS + LAYERS - SLOTS
    assert layers.bytes_copied == layers.copies * layers.bytes_on_host // LAYERS
    # The backward ends with the first two layers in the slots, so the next forward begins with them.
    gradients(made, batch())
    assert layers.copies == 2 * (LAYERS + LAYERS - SLOTS) - SLOTS


def test_host_layers_copies_of_sampling():
    """Every token's forward copies every layer; the first one of the next token arrives during the last of this one."""
    made, layers = prepared(LAYERS)
    with torch.no_grad():
        for _ in range(3):
            made.base_model(input_ids=batch(), use_cache=False)
    assert layers.copies == 3 * LAYERS + 1


def test_host_layers_next_layer_is_copied_before_it_is_needed():
    """When a layer's forward begins, its own weights and those of the next layer are in the slots."""
    made, layers = prepared(LAYERS)
    held = []
    enter = layers.enter

    def entering(index):
        enter(index)
        held.append((index, sorted(layers.held)))

    layers.enter = entering
    gradients(made, batch())
    forward = [(0, [0, 1]), (1, [1, 2]), (2, [2, 3]), (3, [3, 4]), (4, [4, 5]), (5, [4, 5])]
    backward = [(5, [4, 5]), (4, [3, 4]), (3, [2, 3]), (2, [1, 2]), (1, [0, 1]), (0, [0, 1])]
    # Before a layer's forward, and again within its checkpoint.
    assert held == [*(entry for entry in forward for _ in range(2)), *backward]


def test_host_layers_refuse_a_forward_whose_backward_would_miss_them():
    made, _ = prepared(LAYERS)
    with pytest.raises(RuntimeError, match="must checkpoint its layers: call train"):
        made.eval().base_model(input_ids=batch(), use_cache=False)


def test_host_layers_take_two_slots_on_the_device():
    made, layers = prepared(LAYERS)
    gradients(made, batch())
    frozen = [p for p in made.model.layers.parameters() if not p.requires_grad]
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in frozen}
    one = layers.bytes_on_host // LAYERS
    assert sum(slot.numel() for slot in layers.slots) == SLOTS * one
    # The other layers' weights are one number each.
    assert sum(storages.values()) <= SLOTS * one + 8 * len(frozen)
    assert sum(p.numel() for p in frozen) == sum(
        p.numel() for name, p in tiny_model(num_hidden_layers=LAYERS).model.layers.named_parameters()
    )


def test_host_layers_small_weights_stay():
    made = tiny_model(num_hidden_layers=LAYERS)
    made.requires_grad_(False)
    prepare_activations(made, config())
    layers = keep_layers_on_host(made, LAYERS, CPU, min_bytes=1024)
    norms = [layer.input_layernorm.weight for layer in made.model.layers]
    assert all(torch.equal(norm, torch.ones_like(norm)) for norm in norms)
    assert all(weight.nbytes >= 1024 for one in layers.waiting for weight, _ in one.weights)
    # Whoever reads a weight that waits gets NaN, not another layer's weights.
    assert made.model.layers[0].mlp.up_proj.weight.isnan().all()


def test_host_layers_without_frozen_weights():
    made = tiny_model(num_hidden_layers=LAYERS)
    prepare_activations(made, config())
    with pytest.raises(UserError, match=r"layers_on_host=2 has no effect: no layer of LlamaFor.* of at least 1 bytes"):
        keep_layers_on_host(made, 2, CPU, min_bytes=1)


def test_host_layers_without_checkpointed_layers():
    made = tiny_model()
    with pytest.raises(UserError, match="has no layers that checkpoint themselves"):
        keep_layers_on_host(made, 1, CPU)


@pytest.mark.parametrize(
    ("count", "expected"),
    [(1, [5]), (2, [2, 5]), (3, [1, 3, 5]), (4, [0, 2, 3, 5]), (6, [0, 1, 2, 3, 4, 5]), (9, None)],
)
def test_spread(count, expected):
    assert spread(list(range(6)), count) == (expected or list(range(6)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_peft": False}, "layers_on_host requires use_peft: only frozen weights"),
        ({"gradient_checkpointing": False}, "layers_on_host requires gradient_checkpointing"),
        ({"use_vllm": True}, "layers_on_host requires use_vllm=False"),
        ({"layers_on_host": -1}, "layers_on_host=-1 is not allowed"),
    ],
)
def test_layers_on_host_is_refused(fields, message):
    with pytest.raises(UserError, match=message):
        GRPOConfig(
            "random-llama", dataset_name="sort_digits", reward_funcs=["exact_answer"],
            **{"layers_on_host": 1, **FIELDS, **fields},
        )  # fmt: skip


def sum_of_characters(completions, **_):
    return [float(sum(map(ord, text)) % 7) for text in completions]


def test_layers_on_host_train_the_same_adapters(tmp_path, monkeypatch):
    """A whole run, with sampling, a reference policy and a checkpoint from which it continues, ends the same."""
    monkeypatch.setattr("grpo_fast.model.host_layers.MIN_BYTES", 1)
    adapters = []
    for count in (0, 2):
        output = tmp_path / str(count)
        fields = {
            "layers_on_host": count, "beta": 0.1, "generation_batch_size": 8, "num_generations": 4, "max_steps": 2,
            "max_completion_length": 4, "max_train_samples": 8, "max_eval_samples": 2, "save_steps": 1,
            "output_dir": str(output), "use_cpu": True, "learning_rate": 1e-2,
        }  # fmt: skip
        trainer = GRPOTrainer(reward_funcs=sum_of_characters, args=config(rewards=(), **fields))
        assert (trainer.learner.host_layers is not None) == bool(count)
        trainer.train()
        adapters.append({name: p.detach().clone() for name, p in trainer.learner.trained()})
    assert adapters[0].keys() == adapters[1].keys()
    assert all(torch.equal(value, adapters[1][name]) for name, value in adapters[0].items())
    assert any(value.abs().max() > 0 for name, value in adapters[0].items() if "lora_B" in name)
