"""Switches that save memory, and the remedies made of them."""

import itertools
import re
from contextlib import suppress
from dataclasses import replace

from grpo_fast.errors import UserError
from grpo_fast.memory.plan import CONTEXT_BYTES, FRAGMENTATION, GIB, longest_answer, plan_memory, total, usable
from grpo_fast.memory.switches import merged, possible_changes, shorter_remedy, smallest_remedy, switches
from grpo_fast.memory.trace import Setup, Traced, Tracer, weights_dtype
from support.plans import medium, read_config, settings


def test_smallest_remedy_and_switches_of_an_8b_model():
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
    """Bytes of the smallest device that holds a plan of `size` bytes."""
    return next(
        vram for vram in itertools.count(int((size + CONTEXT_BYTES) / (1 - FRAGMENTATION))) if usable(vram) >= size
    )


def test_smallest_remedy_with_one_switch_that_is_enough():
    """Fewer completions per prompt must not raise the budget of the sampler."""
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
        # A name lists every field that changes.
        made = replace(config, **changes)
        differing = {field for field in changes if getattr(made, field) != getattr(config, field)}
        assert {field for field in changes if re.search(rf"\b{field}\b", name)} == differing
        assert made.max_tokens_per_generation_batch <= config.max_tokens_per_generation_batch


def test_switches_offer_two_completions_if_that_saves_memory():
    """vLLM in this process caches whole completions, which here take more memory than training."""
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


def test_merged_changes_that_contradict_each_other():
    assert merged([{"optim": "adamw_torch_8bit"}, {"optim": "adamw_torch_fused"}]) is None
    assert merged([{"num_generations": 4}, {"num_generations": 2}]) is None
    both = [{"max_tokens_per_microbatch": 9000}, {"max_tokens_per_microbatch": 700}]
    assert merged(both) == {"max_tokens_per_microbatch": 700}


class Formula(Tracer):
    """A fast tracer that computes activations by a formula; adapters add float32 copies of their inputs."""

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
    """Settings that are limited by different parts: weights, activations, the sampler's cache, vLLM's copy."""
    samplers = [{}, {"max_tokens_per_generation_batch": 64}, {"use_vllm": True}]
    shares = [0.95, 0.8, 0.6, 0.4, 0.2, 0.05, 0.01]
    choices = itertools.product([False, True], [False, True], ["float32", "bfloat16"], samplers, shares)
    # Every fifth combination covers all pairs of values.
    for number, (use_peft, checkpointing, dtype, sampler, share) in enumerate(itertools.islice(choices, 0, None, 5)):
        fields = {"load_in_4bit": True} if use_peft and number % 4 == 0 else {}
        fields |= {"beta": 0.1} if number % 3 == 0 else {}
        fields |= {"optim": "adamw_torch_8bit"} if number % 5 == 0 else {}
        config = settings(
            use_peft=use_peft, gradient_checkpointing=checkpointing, dtype=dtype, lora_r=[3, 8][number % 2],
            max_completion_length=1000, max_tokens_per_microbatch=[1024, 4096][number % 2], **sampler, **fields,
        )  # fmt: skip
        yield config, share


def test_remedies_and_longest_answers_fit_their_own_plan():
    """With a share of the memory that each setting takes: one switch if one is enough, None if none fits."""
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
                alone += [name] * fits(replace(config, **each), vram)
        longest = longest_answer(config, tracer, vram, prompt)
        assert longest == 0 or fits(replace(config, max_completion_length=longest), vram)
        remedy = smallest_remedy(config, tracer, vram, prompt)
        if remedy:
            assert remedy.config == replace(config, **merged(changes[name] for name in remedy.names))
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
