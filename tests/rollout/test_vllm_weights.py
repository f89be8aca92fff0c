"""The weights that are sent to vLLM, and the plan of its KV cache; without vLLM."""

from types import SimpleNamespace

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from grpo_fast.config import GRPOConfig
from grpo_fast.errors import UserError
from grpo_fast.rollout.rows import cache_argument
from grpo_fast.rollout.vllm.common import engine_options, model_length
from grpo_fast.rollout.vllm.kv_plan import kv_bytes_per_token, plan_engine_cache, plan_kv_cache
from grpo_fast.rollout.vllm.serve import server_command
from grpo_fast.rollout.vllm.weights import engine_weights

SHAPE = {
    "vocab_size": 53,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
EXPERTS = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}


def make_model(name, **overrides):
    config = getattr(transformers, f"{name}Config")(**{**SHAPE, **overrides})
    return AutoModelForCausalLM.from_config(config).float()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("name", "more"),
    [("Llama", {}), ("Qwen2", {}), ("Qwen3", {}), ("Gemma2", {}), ("Phi3", {}), ("Qwen3Moe", EXPERTS), ("Mixtral", {})],
)
def test_engine_weights_equal_the_checkpoint(tmp_path, name, more, tied):
    """Experts are split if the checkpoint splits them, and a tied head is omitted."""
    model = make_model(name, tie_word_embeddings=tied, **more)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    given = dict(engine_weights(model))
    assert given.keys() == saved.keys()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in given.items())


def adapt(model, **fields):
    lora = {"r": 4, "lora_alpha": 12, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **fields}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**lora))
    for name, parameter in adapted.named_parameters():
        # The matrices that are initialised to zero.
        if "lora_B" in name or "lora_embedding_A" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return adapted


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_engine_weights_merge_adapters_as_peft_does(rslora, dtype):
    model = make_model("Llama").to(dtype)
    adapted = adapt(model, use_rslora=rslora)
    kept = {name: tensor.clone() for name, tensor in adapted.state_dict().items()}
    for source in (adapted, model):
        given = dict(engine_weights(source))
        assert {tensor.dtype for tensor in given.values()} == {dtype}
    assert all(torch.equal(tensor, kept[name]) for name, tensor in adapted.state_dict().items())
    merged = adapted.merge_and_unload().state_dict()
    assert given.keys() == merged.keys()
    for name, tensor in given.items():
        # peft rounds the product to 16 bits before it adds.
        torch.testing.assert_close(tensor, merged[name], atol=1e-6 if dtype == torch.float32 else 0.02, rtol=0)


def test_engine_weights_merge_an_adapter_of_the_embedding():
    adapted = adapt(make_model("Llama", tie_word_embeddings=False), target_modules=["embed_tokens", "q_proj"])
    before = adapted.get_input_embeddings().weight.clone()
    given, merged = dict(engine_weights(adapted)), adapted.merge_and_unload().state_dict()
    assert (given["model.embed_tokens.weight"] - before).abs().max() > 0.01
    for name, tensor in given.items():
        torch.testing.assert_close(tensor, merged[name], atol=1e-6, rtol=0)


def test_engine_weights_merge_one_tensor_at_a_time():
    adapted = adapt(make_model("Llama", num_hidden_layers=8))
    own = {parameter.data_ptr() for parameter in adapted.parameters()}
    made = 0
    for _, tensor in engine_weights(adapted):
        made += tensor.data_ptr() not in own
    assert made == 8 * 7
    layer = next(engine_weights(adapted))
    assert layer[0] == "model.embed_tokens.weight"


def test_engine_weights_refuse_other_adapters():
    with pytest.raises(UserError, match=r"the adapter of .*q_proj is not a plain LoRA"):
        dict(engine_weights(adapt(make_model("Llama"), use_dora=True)))
    for fields in ({"modules_to_save": ["embed_tokens"]}, {"trainable_token_indices": {"embed_tokens": [3]}}):
        with pytest.raises(UserError, match=r"the adapter of .*embed_tokens is not a plain LoRA"):
            dict(engine_weights(adapt(make_model("Llama"), target_modules=["q_proj"], **fields)))


def test_engine_weights_dequantise_4bit_weights():
    """The result equals what the trainer multiplies with, adapter included."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    model = make_model("Llama", hidden_size=64, intermediate_size=64, head_dim=16)
    plain = model.model.layers[0].self_attn.q_proj
    quantised = bitsandbytes.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    quantised.weight = bitsandbytes.nn.Params4bit(plain.weight.data, requires_grad=False, quant_type="nf4")
    model.model.layers[0].self_attn.q_proj = quantised.to("cpu")
    adapt(model)
    given = dict(engine_weights(model))["model.layers.0.self_attn.q_proj.weight"]
    assert given.dtype == torch.float32
    layer = model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        torch.testing.assert_close(given, layer(torch.eye(64)).T, atol=1e-4, rtol=0)
        assert 0.01 < (given - plain.weight).abs().max() < 1


@pytest.mark.parametrize(
    ("name", "more", "expected"),
    [
        ("Llama", {}, 2 * 2 * 2 * 8 * 2),
        ("Llama", {"num_hidden_layers": 5, "head_dim": 64, "num_key_value_heads": 4}, 5 * 2 * 4 * 64 * 2),
        ("Gemma2", {}, 2 * 2 * 2 * 8 * 2),
        # One attention layer in four; the others have a state of fixed size.
        (
            "Qwen3Next",
            {"num_hidden_layers": 4, "layer_types": ["linear_attention"] * 3 + ["full_attention"]},
            1 * 2 * 2 * 8 * 2,
        ),
        ("DeepseekV3", {"kv_lora_rank": 12, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8}, 2 * 16 * 2),
    ],
)
def test_kv_bytes_per_token(name, more, expected):
    config = getattr(transformers, f"{name}Config")(**{**SHAPE, **more})
    assert kv_bytes_per_token(config, torch.bfloat16) == expected


def test_kv_bytes_per_token_equals_the_cache_of_the_model():
    model = make_model("Llama", num_hidden_layers=3)
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=torch.ones(1, 7, dtype=torch.long), use_cache=True, **{cache_argument(model): cache})
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert held == 7 * kv_bytes_per_token(model.config, torch.float32)


def test_plan_kv_cache_limits_sequences_to_the_memory():
    # 20 tokens take two blocks of 16; one more block stays empty.
    assert plan_kv_cache(10, 20, 8, 10**9, 16) == (8, (8 * 2 + 1) * 160)
    assert plan_kv_cache(10, 20, 8, (5 * 2 + 1) * 160, 16) == (5, (5 * 2 + 1) * 160)
    assert plan_kv_cache(10, 20, 8, (5 * 2 + 1) * 160 - 1, 16).sequences == 4
    for available in (3 * 160 - 1, 0, -5):
        with pytest.raises(UserError, match=r"one sequence of 20 tokens needs .* GiB; choose a smaller max_compl"):
            plan_kv_cache(10, 20, 8, available, 16)


def make_config(**fields):
    return GRPOConfig(
        model_name_or_path="random-llama", dataset_name="sort_digits", reward_funcs=["exact_answer"], use_vllm=True,
        **{"max_completion_length": 5, **fields},
    )  # fmt: skip


def test_plan_engine_cache_limits_sequences_to_the_token_budget():
    config = make_config(num_generations=4, generation_batch_size=64, max_tokens_per_generation_batch=200)
    model_config = make_model("Llama").config
    assert plan_engine_cache(config, model_config, torch.float32, "cpu", 10, 10**9).sequences == 20
    assert plan_engine_cache(config, model_config, torch.float32, "cpu", 2, 10**9).sequences == 64
    assert plan_engine_cache(config, model_config, torch.float32, "cpu", 1000, 10**9).sequences == 1


def test_model_length():
    assert model_length(make_config(), 6) == 11
    assert model_length(make_config(vllm_max_model_length=11), 6) == 11
    with pytest.raises(UserError, match=r"vllm_max_model_length=10 is not allowed: it must be at least 11"):
        model_length(make_config(vllm_max_model_length=10), 6)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vllm_server_port", 0),
        ("vllm_server_port", 65536),
        ("vllm_server_timeout", 0),
        ("vllm_max_model_length", 0),
        ("vllm_gpu_memory_utilization", 0.0),
        ("vllm_gpu_memory_utilization", 1.1),
    ],
)
def test_config_refuses_vllm_fields_out_of_range(field, value):
    with pytest.raises(UserError, match=f"^{field}={value!r} is not allowed"):
        make_config(**{field: value})


def test_server_command_has_the_options_of_the_engine(tmp_path, monkeypatch):
    """The same options as in process, and the address of the run."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name == "vllm" or None)
    config = make_config(vllm_server_port=8123, use_cpu=True, generation_batch_size=32, num_generations=4)
    command = server_command(config, tmp_path, ["--seed", "3"])
    given = dict(zip(command[3::2], command[4::2], strict=False))
    assert given["--model"] == str(tmp_path)
    assert (given["--host"], given["--port"]) == ("127.0.0.1", "8123")
    assert (tmp_path / "config.json").is_file()
    assert command[-2:] == ["--seed", "3"]
    kv = SimpleNamespace(sequences=32)
    for name, value in engine_options(config, torch.float32, "cpu", 5 + 5, kv).items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            assert (flag in command) == value
        else:
            assert command[command.index(flag) + 1] == str(value)


def test_server_command_without_vllm_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"vllm is not installed; install it with: pip install 'grpo-fast\[vllm\]'"):
        server_command(make_config(), tmp_path)
