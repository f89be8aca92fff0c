"""What is kept for the backward: the gradients stay the same, and memory is saved."""

import copy
import gc

import peft
import pytest
import torch
from torch import nn
from transformers import GPT2Config, Qwen3MoeConfig
from transformers.models.llama import modeling_llama

from grpo_fast.config import GRPOConfig
from grpo_fast.errors import UserError
from grpo_fast.model import activations
from grpo_fast.model.activations import check_activations, offload_checkpoints, prepare_activations, tile_mlps
from support.tiny import VOCAB, tiny_model

LAYERS = 4


def config(**fields) -> GRPOConfig:
    return GRPOConfig("random-llama", dataset_name="sort_digits", reward_funcs=["exact_answer"], **fields)


def model(lora=False, seed=0, **fields):
    """Four layers, optionally with adapters on some modules only, prepared according to the configuration."""
    made = tiny_model(num_hidden_layers=LAYERS).train()
    if lora:
        torch.manual_seed(seed)
        modules = lora if isinstance(lora, list) else "all-linear"
        options = peft.LoraConfig(r=4, target_modules=modules, init_lora_weights=False)
        peft.get_peft_model(made, options, autocast_adapter_dtype=False)
    prepare_activations(made, config(**fields))
    return made


def batch(length=24, rows=2, seed=0):
    return torch.randint(2, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def gradients(made, *batches, dtype=None):
    """Gradients by name, summed over the microbatches."""
    made.zero_grad(set_to_none=True)
    for ids in batches:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype is not None):
            hidden = made.base_model(input_ids=ids, use_cache=False).last_hidden_state
        hidden.double().square().mean().backward()
    return {name: p.grad.clone() for name, p in made.named_parameters() if p.grad is not None}


def assert_same(got, expected, **tolerance):
    assert got.keys() == expected.keys()
    assert len(expected) > 4
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(got[name], gradient, **(tolerance or {"rtol": 0, "atol": 0}), msg=name)


class Kept(torch.autograd.graph.saved_tensors_hooks):
    """Bytes that autograd keeps, without parameters and with each storage once."""

    def __init__(self):
        self.storages = {}
        super().__init__(self.pack, lambda tensor: tensor)

    def pack(self, tensor):
        if not isinstance(tensor, nn.Parameter):
            storage = tensor.untyped_storage()
            self.storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    @property
    def bytes(self):
        return sum(self.storages.values())


def kept_bytes(made, ids):
    kept = Kept()
    with kept:
        made.base_model(input_ids=ids, use_cache=False).last_hidden_state.sum().backward()
    return kept.bytes


@pytest.mark.parametrize("lora", [False, True])
def test_checkpointing_keeps_gradients_and_saves_memory(lora):
    plain, checkpointed = model(lora), model(lora, gradient_checkpointing=True)
    ids = batch()
    assert_same(gradients(checkpointed, ids), gradients(plain, ids))
    assert kept_bytes(checkpointed, ids) < kept_bytes(plain, ids) / 3


def offloading_model(lora=False, min_bytes=0):
    """The model, its offloader, and the bytes of every tensor that it sends to host memory."""
    made, sent = model(lora, gradient_checkpointing=True), []
    offloader = offload_checkpoints(made, min_bytes)
    return made, offloader, count_sent(offloader, sent)


def count_sent(offloader, sent):
    send = offloader._send

    def counted(saved, tensor):
        sent.append(tensor.nbytes)
        send(saved, tensor)

    offloader._send = counted
    return sent


def free_bytes(offloader):
    return sum(buffer.numel() for buffer in offloader.free)


@pytest.mark.parametrize("lora", [False, True])
def test_offloading_keeps_gradients(lora):
    plain = model(lora)
    made, offloader, sent = offloading_model(lora)
    ids = batch()
    assert_same(gradients(made, ids), gradients(plain, ids))
    # Every layer's input but the last one's, once.
    assert sent == [ids.numel() * 32 * 8] * (LAYERS - 1)
    assert free_bytes(offloader) == (LAYERS - 1) * 16384  # 12,288 bytes, in the next power of two


def test_offloaded_tensors_leave_the_device(monkeypatch):
    """While the head computes, only the last layer's input and output are on the device."""
    made, *_ = offloading_model()
    alive = []
    original = activations.ActivationOffloader._pack

    def pack(self, keep, tensor):
        packed = original(self, keep, tensor)
        alive.append(packed)
        return packed

    monkeypatch.setattr(activations.ActivationOffloader, "_pack", pack)
    hidden = made.base_model(input_ids=batch(), use_cache=False).last_hidden_state
    assert [saved.tensor is not None for saved in alive] == [False] * (LAYERS - 1) + [True]
    hidden.sum().backward()
    assert all(saved.tensor is None for saved in alive[:-1])


def test_offloaded_tensors_return_one_layer_ahead(monkeypatch):
    """Unpacking a layer's input starts the copy of the one below, so that it is there when it is needed."""
    made, offloader, _ = offloading_model()
    events, fetch, unpack = [], offloader._fetch, type(offloader)._unpack

    def log_fetch(saved):
        if saved.tensor is None:
            events.append(("fetch", saved))
        return fetch(saved)

    def log_unpack(self, saved):
        events.append(("unpack", saved))
        return unpack(self, saved)

    monkeypatch.setattr(offloader, "_fetch", log_fetch)
    monkeypatch.setattr(type(offloader), "_unpack", log_unpack)
    gradients(made, batch())
    order = [saved for kind, saved in events if kind == "unpack"]
    assert len(order) == LAYERS
    expected = [("unpack", order[0])]
    for saved in order[1:]:
        expected += [("fetch", saved), ("unpack", saved)]
    assert events == expected


def test_offload_buffers_are_reused():
    made, offloader, sent = offloading_model()
    gradients(made, batch())
    addresses = {buffer.data_ptr() for buffer in offloader.free}
    assert len(addresses) == LAYERS - 1
    gradients(made, batch(seed=1), batch(20, seed=2), batch(17, seed=3))
    assert {buffer.data_ptr() for buffer in offloader.free} == addresses
    assert len(sent) == 4 * (LAYERS - 1)


def test_offload_buffers_are_freed_without_a_backward():
    made, offloader, sent = offloading_model()
    hidden = made.base_model(input_ids=batch(), use_cache=False).last_hidden_state
    assert not offloader.free
    del hidden
    gc.collect()
    assert len(offloader.free) == LAYERS - 1
    with torch.no_grad():
        made.base_model(input_ids=batch(), use_cache=False)
    assert len(sent) == LAYERS - 1


def test_offloading_with_two_graphs_at_once():
    """The second forward precedes the first backward."""
    made, *_ = offloading_model()
    plain = model()
    for each in (plain, made):
        each.zero_grad()
        first, second = (each.base_model(input_ids=batch(seed=s), use_cache=False).last_hidden_state for s in (0, 1))
        second.square().mean().backward()
        first.square().mean().backward()
    got, expected = ({n: p.grad for n, p in each.named_parameters() if p.grad is not None} for each in (made, plain))
    assert_same(got, expected)


def test_offloading_of_small_and_shared_tensors():
    made, _, sent = offloading_model(min_bytes=1 << 20)
    gradients(made, batch())
    assert sent == []

    offloader = activations.ActivationOffloader(0)
    count_sent(offloader, sent)
    shared, weight = torch.randn(8, 8, requires_grad=True) * 1, nn.Parameter(torch.randn(8, 8))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: offloader._pack(False, t), offloader._unpack):
        loss = (shared * shared.detach() * weight).sum() + (shared.sin() + shared.cos()).sum()
    # shared (for several operations) and its product; never the parameter.
    assert len(sent) == 2
    loss.backward()


def test_offloading_of_a_tensor_changed_in_place():
    offloader = activations.ActivationOffloader(0)
    tensor = torch.zeros(8)
    first = offloader._pack(False, tensor)
    tensor.add_(1)
    second = offloader._pack(False, tensor)
    offloader._let_go()
    assert offloader._unpack(first).sum() == 0
    assert offloader._unpack(second).sum() == 8


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("lora", [False, True, ["gate_proj", "down_proj"]])
def test_tiled_mlp_keeps_gradients(lora, checkpointing, monkeypatch):
    """Over several microbatches too; with adapters on the MLPs only, the first MLP's input needs no gradient."""
    monkeypatch.setattr(activations.tile_mlps, "__defaults__", (7,))
    batches = [batch(seed=0), batch(20, seed=1), batch(3, rows=1, seed=2)]
    tiled = model(lora, tiled_mlp=True, gradient_checkpointing=checkpointing)
    assert_same(gradients(tiled, *batches), gradients(model(lora), *batches), rtol=1e-10, atol=1e-13)


def test_tiled_mlp_bounds_the_intermediates():
    wide = {"intermediate_size": 512, "num_hidden_layers": 2}
    plain, tiled = (tiny_model(torch.float32, **wide).train() for _ in range(2))
    assert tile_mlps(tiled, 8) == 2
    largest = []
    for each in (plain, tiled):
        tokens = []
        for layer in each.model.layers:
            layer.mlp.up_proj.register_forward_hook(lambda m, i, out, n=tokens: n.append(out.numel() // 512))
        each.base_model(input_ids=batch(), use_cache=False).last_hidden_state.sum().backward()
        largest.append(max(tokens))
    assert largest == [48, 8]
    ids = batch()
    assert kept_bytes(tiled, ids) < kept_bytes(plain, ids) / 2


def test_tiled_mlp_with_dropout_and_autocast():
    """The backward recomputes what the forward drew, in the precision of the forward."""

    class Dropping(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.up, self.down, self.drop = nn.Linear(16, 64), nn.Linear(64, 16), nn.Dropout(0.5)
            self.masks, self.dtypes = [], []

        def forward(self, hidden):
            up = self.up(hidden)
            dropped = self.drop(up)
            self.masks.append(dropped.detach() == 0)
            self.dtypes.append(up.dtype)
            return self.down(dropped)

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp = Dropping()

    layer = Layer()
    tile_mlps(layer, 10)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer.mlp(torch.randn(1, 30, 16, requires_grad=True))
    out.float().sum().backward()
    masks = layer.mlp.masks
    assert len(masks) == 6
    assert set(layer.mlp.dtypes) == {torch.bfloat16}
    assert not torch.equal(masks[0], masks[1])
    # The backward computes the tiles in any order.
    assert all(any(torch.equal(again, first) for first in masks[:3]) for again in masks[3:])


def test_activations_with_all_options(monkeypatch):
    monkeypatch.setattr(activations.tile_mlps, "__defaults__", (7,))
    monkeypatch.setattr(activations.offload_checkpoints, "__defaults__", (0,))
    batches = [batch(seed=0), batch(20, seed=1)]
    made = model(True, tiled_mlp=True, gradient_checkpointing=True, activation_offloading=True)
    assert_same(gradients(made, *batches), gradients(model(True), *batches), rtol=1e-10, atol=1e-13)


def test_tiled_mlp_of_a_copy_uses_its_weights():
    """The reference policy is a deep copy; its tiled MLPs must not compute with the trained weights."""
    made = tiny_model(num_hidden_layers=2)
    prepare_activations(made, config(tiled_mlp=True, gradient_checkpointing=True, activation_offloading=True))
    ids = batch()
    reference = copy.deepcopy(made)
    before = reference(ids).logits
    with torch.no_grad():
        for p in made.parameters():
            p.zero_()
    assert torch.equal(reference(ids).logits, before)
    assert not before.eq(0).all()


def test_activations_unsupported_models_are_refused():
    moe = tiny_model(
        config_class=Qwen3MoeConfig, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8,
        decoder_sparse_step=1,
    )  # fmt: skip
    with pytest.raises(UserError, match="Qwen3MoeSparseMoeBlock is a mixture of experts"):
        prepare_activations(moe, config(tiled_mlp=True))
    with pytest.raises(UserError, match="no module named 'mlp'"):
        tile_mlps(nn.Linear(2, 2))
    with pytest.raises(UserError, match="no layers that checkpoint themselves"):
        offload_checkpoints(nn.Linear(2, 2))
    with pytest.raises(UserError, match="use_liger_kernel=True needs a GPU"):
        check_activations(config(use_liger_kernel=True), torch.device("cpu"))
    gpt2 = tiny_model(config_class=GPT2Config)
    with pytest.raises(UserError, match=r"does not support model type 'gpt2', only .*llama"):
        prepare_activations(gpt2, config(use_liger_kernel=True))


def test_use_liger_kernel_replaces_the_modules(monkeypatch):
    """Whether they compute the same is tested on a GPU."""
    # liger-kernel also changes the module that all Llamas share.
    for name, value in list(vars(modeling_llama).items()):
        monkeypatch.setattr(modeling_llama, name, value)
    made = tiny_model()
    prepare_activations(made, config(use_liger_kernel=True))
    assert {layer.mlp.forward.__func__.__qualname__ for layer in made.model.layers} == {"LigerSwiGLUMLP.forward"}
