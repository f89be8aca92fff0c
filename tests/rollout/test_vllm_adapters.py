"""LoRA adapters without the weights that they adapt, and one copy of those; with a fake server, without vLLM."""

import copy

import peft
import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from grpo_fast.config import GRPOConfig
from grpo_fast.errors import UserError
from grpo_fast.rollout import Sampling
from grpo_fast.rollout.vllm import common, json_client, serve, shared, worker
from grpo_fast.rollout.vllm import server as vllm_server
from grpo_fast.rollout.vllm.adapters import adapter_matrices, lora_options, merge_reason
from grpo_fast.rollout.vllm.weights import engine_weights
from support.tiny import tiny_model
from support.vllm_server import OPTIONS, PROMPTS, FakeServer, connect

LORA = {"max_lora_rank": 8, "target_modules": None}


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(json_client, "RETRIES", (0.01,))


def adapt(model, **fields):
    lora = {"r": 4, "lora_alpha": 12, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **fields}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**lora))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name or "lora_embedding_A" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return adapted


def moe_model():
    config = transformers.Qwen3MoeConfig(
        vocab_size=53, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


@pytest.fixture
def start():
    servers = []

    def start(lora=LORA, hook=lambda path, body: None):
        servers.append(FakeServer(hook, {**OPTIONS, "lora_config": lora}))
        return servers[-1]

    yield start
    for server in servers:
        server.http.shutdown()
        server.http.server_close()


@pytest.mark.parametrize(
    "fields", [{}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 7}, "alpha_pattern": {"down_proj": 3}}]
)
def test_adapter_matrices_are_what_merging_adds(fields):
    model = tiny_model(torch.float32)
    adapted = adapt(model, **fields)
    merged, base = dict(engine_weights(adapted)), dict(engine_weights(adapted, merged=False))
    changed = {name for name, weight in merged.items() if not torch.equal(weight, base[name])}
    matrices = list(adapter_matrices(adapted))
    assert {f"{path}.weight" for path, _, _ in matrices} == changed
    for path, down, up in matrices:
        torch.testing.assert_close(base[f"{path}.weight"] + up @ down, merged[f"{path}.weight"], atol=1e-6, rtol=0)


def test_adapter_matrices_join_active_adapters():
    adapted = adapt(tiny_model(torch.float32))
    adapted.add_adapter("second", peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"]))
    adapted.base_model.set_adapter(["default", "second"])
    for name, parameter in adapted.named_parameters():
        if "second" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    merged, base = dict(engine_weights(adapted)), dict(engine_weights(adapted, merged=False))
    ranks = set()
    for path, down, up in adapter_matrices(adapted):
        ranks.add(len(down))
        torch.testing.assert_close(base[f"{path}.weight"] + up @ down, merged[f"{path}.weight"], atol=1e-6, rtol=0)
    assert ranks == {4, 6}
    assert lora_options(adapted)["max_lora_rank"] == 8


@pytest.mark.parametrize(
    ("make", "fields", "reason"),
    [
        (None, {}, None),
        (None, {"r": 512}, None),
        (None, {"r": 513}, "the rank 513 is above 512"),
        (None, {"use_dora": True}, "the adapter of model.layers.0.self_attn.q_proj is not a plain LoRA"),
        (None, {"target_modules": ["q_proj", "embed_tokens"]}, "model.embed_tokens is not a linear layer"),
        (None, {"modules_to_save": ["lm_head"]}, "the adapter of lm_head is not a plain LoRA"),
        (None, {"trained": "norm"}, "model.norm.weight is trained besides the adapters"),
        (moe_model, {}, "the layers of Qwen3MoeForCausalLM are named differently in its checkpoint"),
    ],
)
def test_merge_reason(make, fields, reason):
    model = make() if make else tiny_model(torch.float32, tie_word_embeddings=False)
    trains_norm = "trained" in fields
    adapted = adapt(model, **{name: value for name, value in fields.items() if name != "trained"})
    if trains_norm:
        model.model.norm.weight.requires_grad_()
    assert merge_reason(adapted) == merge_reason(model) == reason


def sync_and_look(rollout, server, adapted):
    rollout.sync(adapted)
    described, tensors = server.adapters[rollout.version]
    for path, down, up in adapter_matrices(adapted):
        assert torch.equal(tensors.pop(f"base_model.model.{path}.lora_A.weight"), down)
        assert torch.equal(tensors.pop(f"base_model.model.{path}.lora_B.weight"), up)
    assert not tensors
    # The scale is in B.
    assert described["r"] == described["lora_alpha"] == 4


def test_sync_sends_the_weights_once_and_each_version_of_the_adapters(start):
    server, model = start(), tiny_model(torch.float32)
    adapted = adapt(model)
    rollout = connect(server.url, model)
    assert rollout.warning == ""
    sync_and_look(rollout, server, adapted)
    base = dict(engine_weights(model, merged=False))
    assert server.loaded.keys() == base.keys()
    assert all(torch.equal(tensor, base[name]) for name, tensor in server.loaded.items())
    first = rollout.version
    assert rollout.generate(PROMPTS, Sampling(1, 8))
    server.calls.clear()
    for parameter in adapted.parameters():
        parameter.data += 0.1 * parameter.requires_grad
    sync_and_look(rollout, server, adapted)
    steps = [body.get("method", path) for path, body in server.calls]
    assert steps == ["check_folder", "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/update_weight_version"]
    assert rollout.version != first
    assert server.adapters.keys() == {rollout.version}
    rollout.generate(PROMPTS, Sampling(1, 8))
    assert {body["model"] for body in server.called("/inference/v1/generate")} == {rollout.version}


def test_sync_leaves_no_files_and_shows_them_to_nobody(start):
    server, model = start(), tiny_model(torch.float32)
    adapted = adapt(model)
    rollout = connect(server.url, model)
    for _ in range(2):
        rollout.sync(adapted)
    # The folder of the run, one for each call, and files.
    for folder in server.worker.seen:
        assert {mode for name, (mode, _) in folder.items() if "." not in name} == {0o700}
        assert {mode for name, (mode, _) in folder.items() if "." in name} == {0o600}
    path = rollout.folder.path
    # The adapter that is in use stays until the next one or the end.
    (kept,) = path.iterdir()
    assert str(kept) == server.called("/v1/load_lora_adapter")[-1]["lora_path"]
    rollout.close()
    assert not path.exists()
    assert not server.adapters


def test_generate_refuses_completions_of_other_adapters(start):
    """The server forgot the version, or sampled without it."""
    server, model = start(), tiny_model(torch.float32)
    adapted = adapt(model)
    rollout = connect(server.url, model)
    rollout.sync(adapted)
    kept = dict(server.adapters)
    server.adapters.clear()
    with pytest.raises(UserError, match="sampled from other weights than this run's: it was restarted"):
        rollout.generate(PROMPTS, Sampling(1, 8))
    server.adapters = kept
    assert rollout.generate(PROMPTS, Sampling(1, 8))
    server.hook = lambda path, body: (200, server.content(path, body) | {"model": "base"}) if "gen" in path else None
    with pytest.raises(UserError, match="sampled from other weights than this run's"):
        rollout.generate(PROMPTS, Sampling(1, 8))


@pytest.mark.parametrize(
    ("lora", "fields", "reason"),
    [
        (None, {}, "the server was started without --enable-lora"),
        ({"max_lora_rank": 1, "target_modules": None}, {}, "the rank 4 is above the server's --max-lora-rank 1"),
        (
            {"max_lora_rank": 8, "target_modules": ["q_proj", "k_proj"]},
            {"target_modules": ["q_proj", "v_proj"]},
            "the server's --lora-target-modules lack v_proj",
        ),
        (LORA, {"r": 513}, "the rank 513 is above 512"),
    ],
)
def test_sync_merges_where_adapters_cannot_go_alone(start, lora, fields, reason):
    """It says why, once."""
    server, model = start(lora), tiny_model(torch.float32)
    adapted = adapt(model, **fields)
    rollout = connect(server.url, model)
    assert rollout.warning == (
        f"vLLM gets the whole model after every update, with the adapters merged, because {reason}"
    )
    for _ in range(2):
        rollout.sync(adapted)
        merged = dict(engine_weights(adapted))
        assert all(torch.equal(tensor, merged[name]) for name, tensor in server.loaded.items())
        for parameter in adapted.parameters():
            parameter.data += 0.1 * parameter.requires_grad
    assert not server.called("/v1/load_lora_adapter")
    assert all("model" not in body for body in server.called("/inference/v1/generate"))


def bf16_steps(rollout, server, model, steps=3):
    """The bytes of each sync's files, of weights of which a tenth changes each time."""
    for step in range(steps):
        rollout.sync(model)
        assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in server.loaded.items())
        with torch.no_grad():
            for weight in model.parameters():
                weight.view(-1)[step::10] *= 1.5
    return [sum(size for name, (_, size) in folder.items() if "safe" in name) for folder in server.worker.seen]


def test_sync_sends_changed_values_of_16_bit_weights(start):
    server, model = start(), tiny_model(torch.bfloat16, hidden_size=64, num_hidden_layers=4)
    rollout = connect(server.url, model)
    whole, *rest = bf16_steps(rollout, server, model)
    # A bit for each value and two bytes for each change, and names of tensors.
    assert max(rest) < whole / 2
    assert rollout.sends_changes


def test_sync_sends_all_values_to_a_server_without_their_copy(start):
    """It was restarted, or another run used it."""
    server, model = start(), tiny_model(torch.bfloat16)
    rollout = connect(server.url, model)
    bf16_steps(rollout, server, model, 1)
    server.worker = type(server.worker)()
    first, whole, later = bf16_steps(rollout, server, model, 2)
    assert max(first, later) < whole / 1.5
    answers = [body["args"][2] for body in server.called("/collective_rpc") if body["method"] == "load_folder"]
    assert [bool(base) for base in answers] == [False, True, False, True]


@pytest.mark.parametrize("where", [vllm_server, worker])
def test_sync_sends_all_values_if_memory_has_no_room_for_a_copy(start, monkeypatch, where):
    monkeypatch.setattr(where, "has_room", lambda size: False)
    server, model = start(), tiny_model(torch.bfloat16)
    rollout = connect(server.url, model)
    sizes = bf16_steps(rollout, server, model)
    assert len(set(sizes)) == 1
    assert not rollout.sends_changes
    assert not rollout.sent


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("[Errno 13] Permission denied: '/tmp/x'", "only the user who runs this process can read it; start the server"),
        ("damaged: /tmp/x differs", "its files are not what this process wrote; check the disk"),
    ],
)
def test_sync_says_why_the_server_cannot_read(start, error, message):
    server = start(hook=lambda path, body: (500, error) if "rpc" in path else None)
    rollout = connect(server.url)
    with pytest.raises(UserError, match=f"cannot read .*: {message}"):
        rollout.sync(tiny_model(torch.float32))


@pytest.mark.parametrize("tied", [False, True])
def test_views_find_parts_of_fused_and_padded_weights(tied):
    """Then the trainer's weights are these parts, and it trains its adapters as before."""
    model = tiny_model(torch.float32, tie_word_embeddings=tied)
    adapted = adapt(model)
    plain = copy.deepcopy(adapted)
    fused = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
    theirs = {name: weight.detach().clone() for name, weight in shared.frozen(model)}
    for joined, parts in fused.items():
        for layer in {name.rsplit(".", 2)[0] for name in theirs if parts[0] in name}:
            theirs[f"{layer}.{joined}.weight"] = torch.cat([theirs.pop(f"{layer}.{part}.weight") for part in parts])
    for name in {"model.embed_tokens.weight", "lm_head.weight"} & theirs.keys():
        theirs[name] = torch.nn.functional.pad(theirs[name], (0, 0, 0, 11))
    found = shared.views(model, theirs, fused)
    shared.adopt(model, found)
    held = {weight.untyped_storage().data_ptr() for weight in theirs.values()}
    assert {weight.untyped_storage().data_ptr() for _, weight in shared.frozen(model)} == held
    ids = torch.tensor([[3, 4, 5, 6]])
    for each in (adapted, plain):
        each(input_ids=ids, labels=ids).loss.backward()
    for (name, own), (_, expected) in zip(adapted.named_parameters(), plain.named_parameters(), strict=True):
        assert torch.equal(own, expected), name
        assert (own.grad is None) == (expected.grad is None)
        assert own.grad is None or torch.equal(own.grad, expected.grad)


def test_views_refuse_weights_that_are_not_there():
    model = tiny_model(torch.float32)
    theirs = {name: weight.detach().clone() for name, weight in shared.frozen(model)}
    theirs["model.norm.weight"][0] += 1
    with pytest.raises(ValueError, match=r"model\.norm\.weight has different values"):
        shared.views(model, theirs, {})
    for wrong in (theirs["model.norm.weight"].bfloat16(), theirs["model.norm.weight"][:-1], None):
        theirs["model.norm.weight"] = wrong
        with pytest.raises(ValueError, match=r"model\.norm\.weight has no counterpart"):
            shared.views(model, {name: weight for name, weight in theirs.items() if weight is not None}, {})


@pytest.mark.parametrize(("supported", "rank"), [(True, 12), (False, 12), (True, 513)])
def test_server_command_takes_adapters(tmp_path, monkeypatch, supported, rank):
    """Those of the run, if they can go alone and vLLM supports the architecture."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "vllm" or None)
    monkeypatch.setattr(common, "supports_adapters", lambda architecture: supported)
    config = GRPOConfig(
        model_name_or_path="random-llama", dataset_name="sort_digits", reward_funcs=["exact_answer"], use_vllm=True,
        vllm_mode="server", use_cpu=True, max_completion_length=5, use_peft=True, lora_r=rank,
        lora_target_modules=["q_proj", "up_proj"],
    )  # fmt: skip
    command = serve.server_command(config, tmp_path, ["--seed", "3"])
    if not supported or rank > 512:
        assert "--enable-lora" not in command
        return
    at = command.index("--enable-lora")
    assert command[at : at + 8] == [
        "--enable-lora", "--max-loras", "1", "--max-lora-rank", "16", "--lora-target-modules", "q_proj", "up_proj",
    ]  # fmt: skip
    assert serve.server_environment(config)["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"
