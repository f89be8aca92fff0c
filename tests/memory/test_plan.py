"""The memory plan: parameters as real models have them, and the peak that a real step reaches on a CPU."""

import itertools
import json
import re
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM, Gemma2Config, LlamaConfig, Qwen3Config, Qwen3MoeConfig

from grpo_fast.cli import main, parse_config
from grpo_fast.config import GRPOConfig
from grpo_fast.data import check_lengths
from grpo_fast.errors import UserError
from grpo_fast.memory.plan import (
    CONTEXT_BYTES,
    FRAGMENTATION,
    GIB,
    count_weights,
    longest_answer,
    plan_memory,
    total,
    usable,
)
from grpo_fast.memory.report import parse_size
from grpo_fast.memory.switches import merged, possible_changes, shorter_remedy, smallest_remedy, switches
from grpo_fast.memory.trace import Setup, Traced, Tracer, _trace, weights_dtype
from grpo_fast.model.loading import add_adapter
from grpo_fast.model.microbatch_policy import MicrobatchPolicy
from grpo_fast.model.packing import Sample, build_microbatch, plan_rows, token_offsets
from grpo_fast.model.policy import LossInputs
from support.tiny import SMALL

ROOT = Path(__file__).parents[2]
DATA = ROOT / "tests" / "data"
FIXED = ("weights", "adapters", "optimizer state", "gradients")
RECIPES = [
    ("qwen3_8b_gsm8k_24gb_lora", "qwen3_8b", 24 * GIB),
    ("qwen3_8b_gsm8k_80gb_lora_64k", "qwen3_8b", 80 * 10**9),
    ("qwen3_1.7b_full_24gb", "qwen3_1.7b", 24 * GIB),
]
PROMPT = 20


def settings(**fields) -> GRPOConfig:
    return GRPOConfig(**{"model_name_or_path": "m", "dataset_name": "d", "reward_funcs": ["r"], **fields})


def medium(**fields) -> Qwen3Config:
    """A head large enough to matter, and layers that matter beside it."""
    sizes = {"hidden_size": 128, "intermediate_size": 384, "head_dim": 32, "num_hidden_layers": 6, "vocab_size": 8192}
    sizes["num_key_value_heads"] = 1
    return Qwen3Config(**{**SMALL, **sizes, "max_position_embeddings": 4096, **fields})


def read_config(name: str, **fields):
    return AutoConfig.from_pretrained(DATA / f"{name}.json", **fields)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", [Qwen3Config, LlamaConfig, Gemma2Config, Qwen3MoeConfig])
def test_parameters_are_those_of_the_real_model(kind, tied):
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
    """Bytes that a second forward and backward take beyond what is there before it, as torch's allocator reports it."""
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
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        policy(batch, inputs).loss.backward()
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
def test_planned_peak_is_what_a_step_takes(use_peft, checkpointing, answer, max_buffer_mib):
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
def test_layers_inputs_have_the_weights_dtype(dtype):
    """In mixed precision too: what is offloaded is neither more nor less than they are."""
    config = settings(
        use_peft=True, gradient_checkpointing=True, activation_offloading=True, dtype=dtype, bf16=True,
        max_completion_length=1000, max_tokens_per_microbatch=1024,
    )  # fmt: skip
    plans = [plan_memory(replace(config, activation_offloading=on), medium(), 24).training for on in (False, True)]
    layer = 1024 * 128 * getattr(torch, dtype).itemsize
    assert plans[0]["layers' inputs"] == 5 * layer
    # The embedding's output waits with them; two layers' stay.
    assert total(plans[0]) - total(plans[1]) == (5 + 1 - 2) * layer


@pytest.mark.parametrize(("prompt", "answer"), [(200, 300), (50, 1400)], ids=["masked", "gathered"])
def test_planned_peak_with_a_shared_prompt(prompt, answer):
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


def test_head_and_backward_moments_each_decide_somewhere():
    """The comparison above would not see a moment that is never the fullest."""
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
def test_few_layers_tell_what_all_take(kind):
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


def test_experts_and_adapters_on_them_can_be_planned():
    model_config = Qwen3MoeConfig(
        **SMALL, head_dim=8, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2, decoder_sparse_step=1
    )
    for use_peft in (False, True):
        config = settings(use_peft=use_peft, dtype="bfloat16", max_completion_length=64)
        plan = plan_memory(config, model_config)
        assert plan.training["MLP"] > 0
        # A mixture of experts cannot be tiled, so it is not offered.
        assert "tiled_mlp" not in [switch.name for switch in switches(config, Tracer(model_config), GIB, 512)]


def test_quantised_weights_have_the_size_that_bitsandbytes_gives_them():
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


def test_cache_stops_growing_at_the_window():
    full = Gemma2Config(**{**SMALL, "head_dim": 8, "sliding_window": 1 << 20, "num_hidden_layers": 4})
    half = Gemma2Config(**{**SMALL, "head_dim": 8, "sliding_window": 100, "num_hidden_layers": 4})
    config = settings(max_completion_length=900, max_tokens_per_generation_batch=1, generation_batch_size=8)
    caches = [plan_memory(config, model_config, 100).rollout["KV cache"] for model_config in (full, half)]
    # The budget is for one sequence; 2 key heads of 8 numbers, keys and values in float32.
    assert caches == [4 * 1000 * 2 * 8 * 2 * 4, 2 * (1000 + 100) * 2 * 8 * 2 * 4]


@pytest.mark.parametrize(("budget", "rows", "width"), [(100_000, 8, 1000), (4000, 8, 500), (900, 1, 1000)])
def test_cache_is_bounded_by_the_budget(budget, rows, width):
    """It is full with all sequences where they fit, and with fewer longer ones else; one always has its room."""
    config = settings(max_completion_length=900, max_tokens_per_generation_batch=budget, generation_batch_size=8,
                      max_eval_samples=1)  # fmt: skip
    plan = plan_memory(config, medium(), 100)
    text = medium()
    token = 2 * text.num_key_value_heads * (text.hidden_size // text.num_attention_heads) * 4 * text.num_hidden_layers
    assert plan.rollout["KV cache"] == token * rows * width
    assert plan.sequences == min(8, budget // 100)


def test_vllm_has_weights_and_keys_of_its_own():
    """Asleep while training, always there without sleep, elsewhere on a server; adapters come merged."""
    fields = {"max_completion_length": 900, "generation_batch_size": 8, "use_vllm": True, "use_peft": True}
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
    assert asleep.rollout["vLLM's weights"] == 4 * (asleep.parameters - asleep.trained)
    token = 2 * model_config.num_key_value_heads * (model_config.hidden_size // model_config.num_attention_heads) * 4
    token *= model_config.num_hidden_layers
    # 1,000 tokens are 63 blocks of 16, and one block stays empty.
    assert asleep.rollout["vLLM's KV cache"] == token * 16 * (8 * 63 + 1)
    assert plans["fewer"].rollout["vLLM's KV cache"] == token * 16 * (3 * 63 + 1)


@pytest.mark.parametrize(("recipe", "model", "vram"), RECIPES)
def test_recipes_fit(recipe, model, vram):
    config = parse_config([str(ROOT / "examples" / f"{recipe}.yaml")])
    model_config = read_config(model, **(config.model_init_kwargs or {}))
    plan = plan_memory(config, model_config)
    assert plan.fits(vram)
    assert not plan.fits(vram // 2)
    assert longest_answer(config, Tracer(model_config), vram, 512) >= config.max_completion_length
    # The trainer's own check of positions and microbatches.
    check_lengths([[1] * 512], [{"prompt": "p"}], model_config.max_position_embeddings, config)
    assert plan.parameters == {"qwen3_8b": 8_190_735_360, "qwen3_1.7b": 1_720_574_976}[model]


def test_64k_recipe_stretches_the_positions(tmp_path):
    """The recipe's arguments reach the rotary embedding of a model that is loaded with them."""
    config = parse_config([str(ROOT / "examples" / "qwen3_8b_gsm8k_80gb_lora_64k.yaml")])
    small = medium(rope_parameters={"rope_type": "default", "rope_theta": 1000000.0}, max_position_embeddings=40960)
    AutoModelForCausalLM.from_config(small).save_pretrained(tmp_path)
    plain, stretched = (
        AutoModelForCausalLM.from_pretrained(tmp_path, **options) for options in ({}, config.model_init_kwargs)
    )
    assert stretched.config.max_position_embeddings == 65536
    ratio = (plain.model.rotary_emb.inv_freq / stretched.model.rotary_emb.inv_freq).tolist()
    # YaRN leaves the fastest frequencies alone and divides the slowest by its factor.
    assert ratio[0] == pytest.approx(1)
    assert ratio[-1] == pytest.approx(2)


def test_longest_answer_is_where_the_plan_stops_fitting():
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


def test_switches_and_the_smallest_remedy():
    config = settings(
        use_peft=True, dtype="bfloat16", max_completion_length=8192, max_tokens_per_microbatch=8704,
        max_tokens_per_generation_batch=8 * 8704,
    )  # fmt: skip
    tracer = Tracer(read_config("qwen3_8b"))
    found = {switch.name: switch for switch in switches(config, tracer, 24 * GIB, 512)}
    before = plan_memory(config, tracer.model_config, 512, tracer)
    config.gradient_checkpointing = True
    after = plan_memory(config, tracer.model_config, 512, tracer)
    config.gradient_checkpointing = False
    assert found["gradient_checkpointing"].training == total(before.training) - total(after.training) > 50 * GIB
    assert smallest_remedy(config, tracer, 24 * GIB, 512).names == ["gradient_checkpointing", "load_in_4bit"]
    assert smallest_remedy(config, tracer, 4 * GIB, 512) is None
    assert shorter_remedy(config, tracer, 4 * GIB, 512) is None


def holding(size: int) -> int:
    """Bytes of a device that a plan of `size` bytes just fills."""
    return next(
        vram for vram in itertools.count(int((size + CONTEXT_BYTES) / (1 - FRAGMENTATION))) if usable(vram) >= size
    )


def test_smallest_remedy_where_one_switch_is_enough():
    """All of them together need not fit, since fewer completions of a prompt must not widen the sampler's budget."""
    config = settings(
        use_peft=True, dtype="bfloat16", max_completion_length=2000, gradient_checkpointing=True,
        max_tokens_per_microbatch=2048, max_tokens_per_generation_batch=64,
    )  # fmt: skip
    tracer = Tracer(medium())
    offloading = replace(config, activation_offloading=True)
    plans = [plan_memory(each, tracer.model_config, 48, tracer) for each in (config, offloading)]
    vram = holding(plans[1].peak)
    assert not plans[0].fits(vram)
    remedy = smallest_remedy(config, tracer, vram, 48)
    assert remedy.names == ["activation_offloading"]
    assert remedy.config == offloading
    for name, changes in possible_changes(config, 48).items():
        # A name says all that it changes.
        made = replace(config, **merged(config, [changes]))
        differing = {field for field in changes if getattr(made, field) != getattr(config, field)}
        assert {field for field in changes if re.search(rf"\b{field}\b", name)} == differing
        assert made.max_tokens_per_generation_batch <= config.max_tokens_per_generation_batch


def test_two_completions_are_offered_where_that_helps():
    """vLLM in this process holds whole answers, here more of them than training takes."""
    config = settings(
        use_vllm=True, use_peft=True, gradient_checkpointing=True, tiled_mlp=True, dtype="bfloat16", max_buffer_mib=1,
        num_generations=8, generation_batch_size=8, max_completion_length=2000, max_tokens_per_microbatch=2048,
        max_tokens_per_generation_batch=8 * 2048,
    )  # fmt: skip
    tracer = Tracer(medium(num_key_value_heads=4, head_dim=128, vocab_size=512))
    found = {switch.name: switch for switch in switches(config, tracer, 2 * GIB, 48)}
    two = "num_generations=2 (with max_tokens_per_generation_batch=4096)"
    assert found[two].rollout > found["num_generations=4 (with max_tokens_per_generation_batch=8192)"].rollout > 0
    fewer = replace(config, num_generations=2, max_tokens_per_generation_batch=4096)
    vram = holding(plan_memory(fewer, tracer.model_config, 48, tracer).peak)
    assert smallest_remedy(config, tracer, vram, 48) == ([two], fewer)
    odd = replace(config, num_generations=3, generation_batch_size=9)
    assert not any("num_generations" in name for name in possible_changes(odd, 48))


def test_changes_that_contradict_each_other_are_not_combined():
    config = settings()
    assert merged(config, [{"optim": "adamw_torch_8bit"}, {"optim": "adamw_torch_fused"}]) is None
    assert merged(config, [{"num_generations": 4}, {"num_generations": 2}]) is None
    both = [{"max_tokens_per_microbatch": 9000}, {"max_tokens_per_microbatch": 700}]
    assert merged(config, both) == {"max_tokens_per_microbatch": 700}
    limit = config.max_tokens_per_generation_batch
    assert merged(config, [{"max_tokens_per_generation_batch": limit + 1}]) == {
        "max_tokens_per_generation_batch": limit
    }


class Formula(Tracer):
    """Activations by a formula, which takes no time; adapters add to them, as float32 copies of inputs do."""

    def trace(self, setup: Setup) -> Traced:
        if setup.config.tiled_mlp and setup.config.lora_r == 3:
            raise UserError("this MLP cannot be tiled")
        layer = setup.tokens * 128 * weights_dtype(self.model_config, setup.config).itemsize
        inside = (20 if setup.config.use_peft else 14) * layer * (1 if setup.training else 0.2)
        mlp = 9 * layer / (8 if setup.config.tiled_mlp else 1)
        layers = 1 if setup.config.gradient_checkpointing or not setup.training else setup.layers
        residual = setup.layers * layer if setup.training else layer
        parts = {"attention": layers * inside, "mlp": layers * mlp, "residual": residual, "embedding": layer}
        return Traced(parts, {**parts, "gradients": layer, "head": setup.predicted * 128 * 4})


def grid():
    """Settings that differ in what bounds them: weights, activations, the sampler's cache, vLLM's copy."""
    samplers = [{}, {"max_tokens_per_generation_batch": 64}, {"use_vllm": True}]
    shares = [0.95, 0.8, 0.6, 0.4, 0.2, 0.05, 0.01]
    choices = itertools.product([False, True], [False, True], ["float32", "bfloat16"], samplers, shares)
    # A fifth of them holds every pair of values.
    for number, (use_peft, checkpointing, dtype, sampler, share) in enumerate(itertools.islice(choices, 0, None, 5)):
        fields = {"load_in_4bit": True} if use_peft and number % 4 == 0 else {}
        fields |= {"beta": 0.1} if number % 3 == 0 else {}
        fields |= {"optim": "adamw_torch_8bit"} if number % 5 == 0 else {}
        config = settings(
            use_peft=use_peft, gradient_checkpointing=checkpointing, dtype=dtype, lora_r=[3, 8][number % 2],
            max_completion_length=1000, max_tokens_per_microbatch=[1024, 4096][number % 2], **sampler, **fields,
        )  # fmt: skip
        yield config, share


def test_what_is_recommended_fits_by_the_plan():
    """At a share of what each setting takes: one switch where one is enough, and None where none fits."""
    tracer, prompt = Formula(medium()), 24
    found = {"one": 0, "several": 0, "shorter": 0, "none": 0}

    def fits(config, vram):
        return plan_memory(config, tracer.model_config, prompt, tracer).fits(vram)

    for config, share in grid():
        vram = holding(int(share * plan_memory(config, tracer.model_config, prompt, tracer).peak))
        assert not fits(config, vram)
        changes = possible_changes(config, prompt)
        alone = []
        for name, each in changes.items():
            with suppress(UserError):
                alone += [name] * fits(replace(config, **merged(config, [each])), vram)
        longest = longest_answer(config, tracer, vram, prompt)
        assert longest == 0 or fits(replace(config, max_completion_length=longest), vram)
        remedy = smallest_remedy(config, tracer, vram, prompt)
        if remedy:
            assert remedy.config == replace(config, **merged(config, (changes[name] for name in remedy.names)))
            assert fits(remedy.config, vram)
            assert remedy.names == alone[:1] if alone else len(remedy.names) > 1
            found["one" if alone else "several"] += 1
            continue
        assert not alone
        shorter = shorter_remedy(config, tracer, vram, prompt)
        found["shorter" if shorter else "none"] += 1
        if shorter:
            answer = shorter.config.max_completion_length
            assert answer < config.max_completion_length
            assert shorter.names[0] == f"max_completion_length={answer}"
            assert fits(shorter.config, vram)
        else:
            assert longest == 0
    assert min(found.values()) > 0, found


def test_reference_and_offloaded_state_are_in_host_memory():
    model_config = medium()
    config = settings(beta=0.1, optim_offload=True, max_completion_length=100, max_tokens_per_microbatch=200)
    plan = plan_memory(config, model_config, 50)
    assert plan.host == {"optimizer state": 12 * plan.parameters, "reference": 4 * plan.parameters}
    assert "optimizer state" not in plan.training
    assert plan.moments["reference"]["reference"] == 4 * plan.parameters


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--vram", "24GiB"], 0, "fits"),
        (["--vram", "2GiB"], 1, "no combination of these switches fits, not even with shorter answers"),
        (["--vram", "24GiB", "--load_in_4bit=true", "--use_vllm=true"], 0, "load_in_4bit does not make that smaller"),
        (["--vram", "lots"], 2, "--vram 'lots' is not a size of memory"),
        (["--vram"], 2, "--vram needs a value"),
        (["--vram", "24GiB", "--prompt_tokens", "0"], 2, "--prompt_tokens='0' is not allowed"),
        (["--vram", "24GiB", "--lora_rr", "3"], 2, "did you mean 'lora_r'"),
        (["--vram", "24GiB", "--model", "nowhere"], 2, "is neither a folder"),
    ],
)
def test_command(arguments, status, message, capsys):
    model = ["--model", str(DATA / "qwen3_1.7b.json"), "--use_peft=true", "--dtype=bfloat16"]
    lengths = ["--max_completion_length=512", "--max_tokens_per_microbatch=1024", "--gradient_checkpointing=true"]
    assert main(["plan", *model, *lengths, "--max_tokens_per_generation_batch=8192", *arguments]) == status
    output = capsys.readouterr()
    assert message in " ".join((output.out + output.err).split())
    assert max(map(len, output.out.splitlines()), default=0) <= 100


def test_folders_and_built_ins_are_read(capsys, tmp_path):
    medium().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["hidden_size"] == 128
    assert main(["plan", "--model", str(tmp_path), "--vram=24GiB", "--max_completion_length=64"]) == 0
    assert main(["plan", str(ROOT / "examples" / "sort.yaml"), "--vram=24GiB"]) == 0
    assert "random-llama" in capsys.readouterr().out


def test_sizes():
    assert parse_size("24GiB") == parse_size("24") == 24 * GIB
    assert parse_size("80GB") == 80 * 10**9
    assert usable(24 * GIB) < 24 * GIB
    with pytest.raises(UserError, match="is not a size"):
        parse_size("0")
