"""The memory plan: parameters of real models, and the peak of a real step on a CPU."""

from collections import deque
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, Qwen3Config, Qwen3MoeConfig

from grpo_fast.cli import parse_config
from grpo_fast.config import GRPOConfig
from grpo_fast.data import check_lengths
from grpo_fast.memory.plan import GIB, count_weights, longest_answer, plan_memory, total
from grpo_fast.memory.switches import switches
from grpo_fast.memory.trace import Setup, Tracer, _trace
from grpo_fast.model.activations import prepare_activations
from grpo_fast.model.host_layers import keep_layers_on_host
from grpo_fast.model.loading import add_adapter
from grpo_fast.model.microbatch_policy import MicrobatchPolicy
from grpo_fast.model.packing import Sample, build_microbatch, plan_rows, token_offsets
from grpo_fast.model.policy import LossInputs
from grpo_fast.rollout import decode
from support.plans import medium, read_config, settings
from support.tiny import SMALL

FIXED = ("weights", "adapters", "optimizer state", "gradients")
RECIPES = [
    ("qwen3_8b_gsm8k_24gb_lora", "qwen3_8b", 24 * GIB),
    ("qwen3_8b_gsm8k_80gb_lora_64k", "qwen3_8b", 80 * 10**9),
    ("qwen3_1.7b_full_24gb", "qwen3_1.7b", 24 * GIB),
]
PROMPT = 20


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", [Qwen3Config, LlamaConfig, Gemma2Config, Qwen3MoeConfig])
def test_plan_memory_parameters_equal_the_real_model(kind, tied):
    extra = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2} if kind is Qwen3MoeConfig else {}
    model_config = kind(**{**SMALL, "head_dim": 8, "tie_word_embeddings": tied, **extra})
    model = AutoModelForCausalLM.from_config(model_config, dtype=torch.bfloat16)
    real = {id(p): p for p in model.parameters()}.values()
    plan = plan_memory(
        settings(dtype="bfloat16", max_tokens_per_microbatch=64, max_completion_length=8), model_config, 8
    )
    assert plan.parameters == plan.trained == sum(p.numel() for p in real)
    assert plan.rollout["weights"] == sum(p.numel() * p.element_size() for p in real)
    config = settings(dtype="bfloat16", use_peft=True, lora_r=3, max_tokens_per_microbatch=64, max_completion_length=8)
    add_adapter(model, config)
    trained = [p for p in model.parameters() if p.requires_grad]
    plan = plan_memory(config, model_config, 8)
    assert plan.trained == sum(p.numel() for p in trained)
    assert plan.training["gradients"] == sum(p.numel() * p.element_size() for p in trained)
    assert plan.training["optimizer state"] == 8 * plan.trained


def measured_peak(config: GRPOConfig, model_config, answer: int, prompt: int = PROMPT, answers: int = 1) -> int:
    """Bytes that a second forward and backward add to what is already allocated, by torch's allocator."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(model_config, dtype=getattr(torch, config.dtype))
    if config.use_peft:
        add_adapter(model, config)
    if config.gradient_checkpointing:
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)({"use_reentrant": False})
    policy = MicrobatchPolicy(model, 1.0, config.max_buffer_bytes)
    samples = [Sample(list(range(2, 2 + prompt)), torch.randint(2, 100, (answer,)).tolist(), 0) for _ in range(answers)]
    assert policy.check_packing(samples[0].prompt_ids, "always")
    batch = build_microbatch(
        samples, plan_rows(samples, list(range(answers)), 1 << 20), token_offsets(samples), 0, True
    )
    ones = torch.ones(answers * answer)
    inputs = LossInputs(objective=config.objective(), advantages=ones, weights=ones / answer)
    policy.train()
    policy(batch, inputs).loss.backward()
    return peak_bytes(lambda: policy(batch, inputs).loss.backward())


def peak_bytes(call: Callable[[], object]) -> int:
    """Most bytes that `call` adds to what is already allocated, by torch's allocator."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    live = peak = 0
    for event in profiled.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    return peak


@pytest.mark.parametrize("use_peft", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("checkpointing", [True, False], ids=["checkpointed", "stored"])
@pytest.mark.parametrize(
    ("answer", "max_buffer_mib"),
    [pytest.param(300, 32, marks=pytest.mark.long), (1500, 32), pytest.param(1500, 4, marks=pytest.mark.long)],
)
def test_plan_memory_peak_equals_a_measured_step(use_peft, checkpointing, answer, max_buffer_mib):
    model_config = medium(tie_word_embeddings=answer == 300)
    config = settings(
        use_peft=use_peft, gradient_checkpointing=checkpointing, max_completion_length=answer, use_cpu=True,
        max_tokens_per_microbatch=PROMPT + answer, max_buffer_mib=max_buffer_mib,
    )  # fmt: skip
    plan = plan_memory(config, model_config, PROMPT)
    planned = total(plan.training) - sum(plan.training.get(part, 0) for part in FIXED)
    measured = measured_peak(config, model_config, answer)
    print(f"planned {planned / 2**20:.2f} MiB, measured {measured / 2**20:.2f} MiB")
    assert abs(planned - measured) < 0.04 * measured
    if checkpointing:
        tokens = PROMPT + answer
        assert plan.training["layers' inputs"] == 5 * tokens * 128 * 4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_plan_memory_layer_inputs_have_the_dtype_of_the_weights(dtype):
    """Also in mixed precision: the offloaded bytes are exactly those of the layer inputs."""
    config = settings(
        use_peft=True, gradient_checkpointing=True, activation_offloading=True, dtype=dtype, bf16=True,
        max_completion_length=1000, max_tokens_per_microbatch=1024,
    )  # fmt: skip
    plans = [plan_memory(replace(config, activation_offloading=on), medium(), 24).training for on in (False, True)]
    layer = 1024 * 128 * getattr(torch, dtype).itemsize
    assert plans[0]["layers' inputs"] == 5 * layer
    # The embedding output is offloaded as well; the inputs of two layers stay on the device.
    assert total(plans[0]) - total(plans[1]) == (5 + 1 - 2) * layer


def test_plan_memory_counts_the_16_bit_copy_of_a_float32_head():
    """What a GPU multiplies by under autocast; a 16-bit head and a CPU need none."""
    copy = "16-bit copy of the head"
    model = medium()
    for fields, copies in (
        ({"dtype": "float32", "bf16": True}, 1),
        ({"dtype": "float32", "bf16": False}, 0),
        ({"dtype": "bfloat16", "bf16": True}, 0),
        ({"dtype": "float32", "bf16": True, "use_cpu": True}, 0),
    ):
        plan = plan_memory(settings(use_peft=True, max_completion_length=1000, **fields), model, 24)
        expected = 2 * model.vocab_size * model.hidden_size * copies
        assert plan.training.get(copy, 0) == expected, fields


@pytest.mark.parametrize(("prompt", "answer"), [(200, 300), (50, 1400)], ids=["masked", "gathered"])
def test_plan_memory_peak_with_a_shared_prompt(prompt, answer):
    config = settings(
        use_peft=True, max_completion_length=answer, use_cpu=True, max_tokens_per_microbatch=prompt + 4 * answer,
        max_buffer_mib=4, num_generations=4,
    )  # fmt: skip
    plan = plan_memory(config, medium(), prompt)
    assert plan.tokens == prompt + 4 * answer
    planned = total(plan.training) - sum(plan.training.get(part, 0) for part in FIXED)
    measured = measured_peak(config, medium(), answer, prompt, 4)
    print(f"planned {planned / 2**20:.2f} MiB, measured {measured / 2**20:.2f} MiB")
    assert abs(planned - measured) < 0.04 * measured


def test_plan_memory_fullest_moment_is_head_or_backward():
    """The comparison with measured peaks covers both moments only if each is the fullest in some case."""
    peaks = set()
    for mib in (32, 4):
        config = settings(
            use_peft=True, gradient_checkpointing=True, max_completion_length=1500, max_buffer_mib=mib,
            max_tokens_per_microbatch=1520, use_cpu=True,
        )  # fmt: skip
        moments = plan_memory(config, medium(), PROMPT).moments
        peaks.add(max(("head", "backward"), key=lambda name: total(moments[name])))
    assert peaks == {"head", "backward"}


@pytest.mark.parametrize("kind", [Qwen3Config, Gemma2Config])
def test_trace_extrapolated_from_few_layers_equals_the_whole_model(kind):
    model_config = kind(**{**SMALL, "head_dim": 8, "num_hidden_layers": 12})
    for fields in (
        {"gradient_checkpointing": True},
        {"use_peft": True},
        {"bf16": True, "gradient_checkpointing": True},
    ):
        setup = Setup(settings(**fields), 12, 512, 500)
        short = Tracer(model_config).trace(setup)
        whole = _trace(model_config, setup, "cpu" if "bf16" in fields else "meta")
        for some, every in ((short.head, whole.head), (short.peak, whole.peak)):
            assert sum(some.values()) == pytest.approx(sum(every.values()), rel=0.01)


def test_plan_memory_with_experts_and_adapters_on_them():
    model_config = Qwen3MoeConfig(
        **SMALL, head_dim=8, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2, decoder_sparse_step=1
    )
    for use_peft in (False, True):
        config = settings(use_peft=use_peft, dtype="bfloat16", max_completion_length=64)
        plan = plan_memory(config, model_config)
        assert plan.training["MLP"] > 0
        # A mixture of experts cannot be tiled, so it is not offered.
        assert "tiled_mlp" not in [switch.name for switch in switches(config, Tracer(model_config), GIB, 512)]


def test_count_weights_4bit_size_equals_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    model_config = medium()
    for nested in (False, True):
        config = settings(load_in_4bit=True, use_peft=True, dtype="bfloat16", use_bnb_nested_quant=nested)
        counted = count_weights(Tracer(model_config).model(config), config)
        real = 0
        model = AutoModelForCausalLM.from_config(model_config, dtype=torch.bfloat16)
        for name, parameter in model.named_parameters():
            if "proj" in name:
                packed, state = functional.quantize_4bit(parameter.data, quant_type="nf4", compress_statistics=nested)
                scales = [state.absmax, *([state.state2.absmax] if nested else [])]
                real += sum(t.numel() * t.element_size() for t in (packed, *scales))
            else:
                real += parameter.numel() * parameter.element_size()
        assert counted.bytes == real


def test_plan_memory_cache_stops_growing_at_the_window():
    full = Gemma2Config(**{**SMALL, "head_dim": 8, "sliding_window": 1 << 20, "num_hidden_layers": 4})
    half = Gemma2Config(**{**SMALL, "head_dim": 8, "sliding_window": 100, "num_hidden_layers": 4})
    config = settings(max_completion_length=900, max_tokens_per_generation_batch=1, generation_batch_size=8)
    caches = [plan_memory(config, model_config, 100).rollout["KV cache"] for model_config in (full, half)]
    # The budget is for one sequence; 2 key heads of 8 numbers, keys and values in float32.
    assert caches == [4 * 1000 * 2 * 8 * 2 * 4, 2 * (1000 + 100) * 2 * 8 * 2 * 4]


@pytest.mark.parametrize(("budget", "rows", "width"), [(100_000, 8, 1000), (4000, 8, 500), (900, 1, 1000)])
def test_plan_memory_cache_is_bounded_by_the_budget(budget, rows, width):
    """All sequences are cached if they fit, otherwise fewer and longer ones; one sequence always has room."""
    config = settings(max_completion_length=900, max_tokens_per_generation_batch=budget, generation_batch_size=8,
                      max_eval_samples=1)  # fmt: skip
    plan = plan_memory(config, medium(), 100)
    text = medium()
    token = 2 * text.num_key_value_heads * (text.hidden_size // text.num_attention_heads) * 4 * text.num_hidden_layers
    assert plan.rollout["KV cache"] == token * rows * width
    assert plan.sequences == min(8, budget // 100)


@pytest.mark.parametrize(("rows", "key_heads", "part"), [(1, 4, 256), (1, 4, 4096), (1, 1, 256), (3, 4, 256)])
def test_plan_memory_peak_of_sampling_when_sequences_join(rows, key_heads, part, monkeypatch):
    """Evicted sequences are computed again without a second copy of their keys and values."""
    monkeypatch.setattr(decode, "PREFILL_TOKENS", part)
    monkeypatch.setattr("grpo_fast.memory.plan.PREFILL_TOKENS", part)
    length = 1500 if rows == 1 else 600
    answer = length - PROMPT
    model_config = medium(num_hidden_layers=24, num_key_value_heads=key_heads, vocab_size=512)
    model = AutoModelForCausalLM.from_config(model_config).eval()
    decoder = decode.Decoder(model, rows * length, answer, set(), lambda _: lambda _, scores: scores, False, False)
    decoder.waiting, decoder.responses = deque(), [None] * 2 * rows

    def join_and_end(first: int) -> None:
        one_missing = [5] * (answer - 1), [0.0] * (answer - 1)
        decoder.admit([decode.Sequence(first + i, first + i, [7] * PROMPT, *one_missing) for i in range(rows)])
        decoder.step()
        assert not decoder.live

    with torch.no_grad():
        measured = peak_bytes(lambda: [join_and_end(first) for first in (0, rows)])
    budget = rows * length if rows > 1 else 1
    config = settings(
        dtype="float32", max_completion_length=answer, max_tokens_per_generation_batch=budget, use_cpu=True,
        generation_batch_size=max(rows, 2), num_generations=max(rows, 2), num_generations_eval=1, max_eval_samples=1,
    )  # fmt: skip
    parts = plan_memory(config, model_config, PROMPT).rollout
    assert parts["KV cache"] == 24 * 2 * 4 * 32 * key_heads * rows * length
    planned = total(parts) - sum(parts.get(part, 0) for part in FIXED)
    print(f"planned {planned / 2**20:.2f} MiB, measured {measured / 2**20:.2f} MiB")
    # With repeated heads the plan is an upper bound: it adds them to a mask in the dtype of the queries.
    assert 0.99 * measured < planned < (1.01 if key_heads == 4 else 1.15) * measured
    assert measured < 1.4 * parts["KV cache"]


def test_plan_memory_vllm_has_its_own_weights_and_cache():
    """They are absent from training with sleep mode, present without it, and absent with a server."""
    fields = {"max_completion_length": 900, "generation_batch_size": 8, "use_vllm": True}
    model_config = medium()
    plans = {
        name: plan_memory(settings(**fields, **more), model_config, 100)
        for name, more in {
            "asleep": {},
            "awake": {"vllm_enable_sleep_mode": False},
            "server": {"vllm_mode": "server"},
            "fewer": {"max_tokens_per_generation_batch": 3000},
        }.items()
    }
    asleep, awake, server = plans["asleep"], plans["awake"], plans["server"]
    engine = {"vLLM's weights", "vLLM's KV cache"}
    assert engine <= asleep.rollout.keys()
    assert not engine & (asleep.training.keys() | server.rollout.keys())
    assert engine <= awake.training.keys()
    assert awake.peak > asleep.peak > server.peak - 1
    assert asleep.rollout["vLLM's weights"] == 4 * asleep.parameters
    token = 2 * model_config.num_key_value_heads * (model_config.hidden_size // model_config.num_attention_heads) * 4
    token *= model_config.num_hidden_layers
    # 1,000 tokens are 63 blocks of 16, and one block stays empty.
    assert asleep.rollout["vLLM's KV cache"] == token * 16 * (8 * 63 + 1)
    assert plans["fewer"].rollout["vLLM's KV cache"] == token * 16 * (3 * 63 + 1)


@pytest.mark.parametrize("awake", [False, True])
def test_plan_memory_vllm_shares_the_weights_with_adapters(monkeypatch, awake):
    """The plan drops by exactly the weights, also where 4-bit weights are not shared."""
    fields = {"use_vllm": True, "use_peft": True, "lora_r": 12, "vllm_enable_sleep_mode": not awake}
    shared = plan_memory(settings(**fields), medium(), 100)
    weights = 4 * shared.parameters
    monkeypatch.setattr("grpo_fast.rollout.vllm.adapters.merge_reason", lambda model: "of a test")
    merged = plan_memory(settings(**fields), medium(), 100)
    monkeypatch.undo()
    # vLLM allocates adapters of rank 12 with rank 16.
    adapters = 4 * shared.trained * 16 // 12
    for moment, parts in merged.moments.items():
        both = {**parts, "vLLM's adapters": adapters} if awake or moment == "rollout" else parts
        assert shared.moments[moment] == {name: size for name, size in both.items() if name != "vLLM's weights"}
    assert total(merged.rollout) + adapters - total(shared.rollout) == weights == shared.rollout["weights"]
    quantised = plan_memory(settings(**fields, load_in_4bit=True), medium(), 100)
    assert quantised.rollout["vLLM's weights"] == weights


@pytest.mark.parametrize(("recipe", "model", "vram"), RECIPES)
def test_plan_memory_recipes_fit(recipe, model, vram):
    config = parse_config([recipe])
    model_config = read_config(model, **(config.model_init_kwargs or {}))
    plan = plan_memory(config, model_config)
    assert plan.fits(vram)
    assert not plan.fits(vram // 2)
    assert longest_answer(config, Tracer(model_config), vram, 512) >= config.max_completion_length
    # The trainer's own check of positions and microbatches.
    check_lengths([[1] * 512], [{"prompt": "p"}], model_config.max_position_embeddings, config)
    assert plan.parameters == {"qwen3_8b": 8_190_735_360, "qwen3_1.7b": 1_720_574_976}[model]


def test_64k_recipe_extends_the_positions(tmp_path):
    """The recipe's arguments reach the rotary embedding of a model that is loaded with them."""
    config = parse_config(["qwen3_8b_gsm8k_80gb_lora_64k"])
    small = medium(rope_parameters={"rope_type": "default", "rope_theta": 1000000.0}, max_position_embeddings=40960)
    AutoModelForCausalLM.from_config(small).save_pretrained(tmp_path)
    plain, stretched = (
        AutoModelForCausalLM.from_pretrained(tmp_path, **options) for options in ({}, config.model_init_kwargs)
    )
    assert stretched.config.max_position_embeddings == 65536
    ratio = (plain.model.rotary_emb.inv_freq / stretched.model.rotary_emb.inv_freq).tolist()
    # YaRN keeps the fastest frequencies and divides the slowest by its factor.
    assert ratio[0] == pytest.approx(1)
    assert ratio[-1] == pytest.approx(2)


def test_longest_answer_is_the_last_length_that_fits():
    config = settings(
        use_peft=True, load_in_4bit=True, dtype="bfloat16", gradient_checkpointing=True, max_completion_length=4096,
        max_tokens_per_microbatch=4608, max_tokens_per_generation_batch=1,
    )  # fmt: skip
    model_config = read_config("qwen3_8b")
    tracer, vram = Tracer(model_config), 20 * GIB
    longest = longest_answer(config, tracer, vram, 512)
    assert 4096 < longest < 40000
    config.max_completion_length = longest
    assert plan_memory(config, model_config, 512, tracer).fits(vram)
    config.max_completion_length = int(1.05 * longest)
    assert not plan_memory(config, model_config, 512, tracer).fits(vram)


def test_plan_memory_reference_and_offloaded_state_are_in_host_memory():
    model_config = medium()
    config = settings(beta=0.1, optim_offload=True, max_completion_length=100, max_tokens_per_microbatch=200)
    plan = plan_memory(config, model_config, 50)
    assert plan.host == {"optimizer state": 12 * plan.parameters, "reference": 4 * plan.parameters}
    # Scoring by the reference is a forward of the whole microbatch: the MLP has three tensors of its width at once.
    assert plan.moments["reference"]["MLP"] >= 3 * 200 * model_config.intermediate_size * 4
    assert "optimizer state" not in plan.training
    assert plan.moments["reference"]["reference"] == 4 * plan.parameters


@pytest.mark.parametrize("count", [1, 2, 4, 6, 9])
def test_plan_memory_layers_on_host_equal_the_real_model(count):
    """The weights that leave the device, and the slots that stay on it, to the byte."""
    model_config = medium()
    shared = {"use_peft": True, "gradient_checkpointing": True, "max_completion_length": 100, "dtype": "bfloat16"}
    config = settings(layers_on_host=count, max_tokens_per_microbatch=200, **shared)
    model = AutoModelForCausalLM.from_config(model_config, dtype=torch.bfloat16)
    add_adapter(model, config)
    prepare_activations(model, config)
    layers = keep_layers_on_host(model, count, torch.device("cpu"))
    plan, without = (plan_memory(one, model_config, 50) for one in (config, replace(config, layers_on_host=0)))
    assert plan.host["frozen layers"] == layers.bytes_on_host
    assert plan.training["slots for layers"] == sum(slot.numel() for slot in layers.slots)
    assert without.training["weights"] - plan.training["weights"] == layers.bytes_on_host
    assert without.peak - plan.peak == layers.bytes_on_host - plan.training["slots for layers"]
