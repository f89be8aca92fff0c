"""The configuration: the objective that its fields make, and what is refused."""

import dataclasses

import pytest

from grpo_fast.config import GRPOConfig
from grpo_fast.errors import UserError
from grpo_kernels import PRESETS, PolicyObjective

BASE = {"model_name_or_path": "m", "dataset_name": "d", "reward_funcs": ["r"]}
# TRL's name of a loss setting, the name in PolicyObjective, and a value that no preset has.
LOSS_SETTINGS = [
    ("epsilon", "epsilon", 0.17),
    ("epsilon_high", "epsilon_high", 1.9),
    ("delta", "delta", 7.0),
    ("beta", "beta", 0.03),
    ("kl_estimator", "kl", "k2"),
    ("use_bias_correction_kl", "kl_bias_correction", True),
    ("entropy_coef", "entropy_coef", 0.01),
    ("sapo_temperature_pos", "sapo_temperature_pos", 1.3),
    ("sapo_temperature_neg", "sapo_temperature_neg", 1.4),
    ("vespo_k_pos", "vespo_k_pos", 1.1),
    ("vespo_lambda_pos", "vespo_lambda_pos", 1.2),
    ("vespo_k_neg", "vespo_k_neg", 1.7),
    ("vespo_lambda_neg", "vespo_lambda_neg", 1.8),
]


@pytest.mark.parametrize("loss_type", PRESETS)
@pytest.mark.parametrize(("field", "name", "value"), LOSS_SETTINGS, ids=lambda part: str(part))
def test_objective_has_each_loss_setting(field, name, value, loss_type):
    # The bound of `delta` must be above that of epsilon, which is infinite in "unclipped".
    fields = {"epsilon": 0.2, field: value} if field == "delta" else {field: value}
    objective = GRPOConfig(**BASE, loss_type=loss_type, **fields).objective()
    assert getattr(objective, name) == value
    same = {"kind": PRESETS[loss_type].kind, "aggregation": PRESETS[loss_type].aggregation}
    assert same.items() <= dataclasses.asdict(objective).items()


def test_objective_settings_are_all_fields():
    """Every setting of the objective is a field, except the two that a preset alone decides."""
    names = {field.name for field in dataclasses.fields(PolicyObjective)}
    assert names == {name for _, name, _ in LOSS_SETTINGS} | {"level", "kind", "aggregation"}


def test_objective_keeps_the_presets_values():
    assert GRPOConfig(**BASE, loss_type="gspo").objective().epsilon == PRESETS["gspo"].epsilon
    config = GRPOConfig(**BASE, loss_type="gspo", importance_sampling_level="token")
    assert (config.objective().level, config.objective().epsilon) == ("token", PRESETS["gspo"].epsilon)


@pytest.mark.parametrize(
    ("fields", "in_run", "in_loss"),
    [({}, False, False), ({"beta": 0.1}, True, True), ({"beta": 0.1, "kl_in_reward": True}, True, False)],
)
def test_uses_reference_for_a_kl_in_the_loss_or_in_the_reward(fields, in_run, in_loss):
    config = GRPOConfig(**BASE, **fields)
    assert (config.uses_reference, config.objective().uses_reference) == (in_run, in_loss)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"beta": -1.0}, "beta=-1.0 is not allowed: it must be a finite number, at least 0"),
        ({"epsilon": 0.0}, "^epsilon must be above 0, got 0.0"),
        ({"importance_sampling_level": "tok"}, "importance_sampling_level='tok' is not allowed: it must be one of tok"),
        ({"padding_free": ["auto"]}, r"padding_free=\['auto'\] is not allowed: it must be one of auto, always, never"),
        ({"dataset_name": ""}, "dataset_name is missing"),
        ({"reward_funcs": []}, "reward_funcs is missing"),
        ({"activation_offloading": True}, "activation_offloading requires gradient_checkpointing"),
        ({"share_prompts": "always", "padding_free": "never"}, "share_prompts='always' requires padding_free"),
        (
            {"vllm_importance_sampling_clip_min": 4.0},
            r"vllm_importance_sampling_clip_min=4.0 is above vllm_importance_sampling_clip_max=3.0",
        ),
        ({"prompt_template": "{q}", "prompt_file": "p"}, "prompt_template and prompt_file both make the prompt"),
    ],
)
def test_config_refuses_wrong_fields(fields, message):
    with pytest.raises(UserError, match=message):
        GRPOConfig(**{**BASE, **fields})


@pytest.mark.parametrize("digits", [400, 5000])
@pytest.mark.parametrize(
    "name", ["temperature", "max_steps", "delta", "seed", "vllm_server_timeout", "generation_batch_size"]
)
def test_config_shortens_huge_numbers_in_errors(name, digits):
    with pytest.raises(UserError, match=f"^{name}=.* is not allowed: it must be a") as error:
        GRPOConfig(**{**BASE, name: 10**digits})
    assert len(str(error.value)) < 250


@pytest.mark.parametrize(
    "fields",
    [{"reward_weights": [10**400]}, {"run_name": "a/" * 1000}, {"report_to": ["x" * 1000]}, {"epsilon": -(10**300)}],
    ids=lambda fields: next(iter(fields)),
)
def test_config_shortens_long_values_in_errors(fields):
    with pytest.raises(UserError) as error:
        GRPOConfig(**{**BASE, **fields})
    assert len(str(error.value)) < 250
