"""The configuration: the objective that its fields make, and what is refused."""

import dataclasses

import pytest

from grpo_fast.config import GRPOConfig, check_complete, steps_of_epochs
from grpo_fast.errors import UserError
from grpo_kernels import PRESETS, PolicyObjective
from grpo_kernels.custom_loss import SETTINGS, parameters_of

COVARIANCE = ("covariance_ratio", "covariance_low", "covariance_high")
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
    ("kl_clip", "kl_clip", 9.0),
    ("covariance_ratio", "covariance_ratio", 0.3),
    ("covariance_low", "covariance_low", 0.5),
    ("covariance_high", "covariance_high", 9.0),
    ("covariance_kl", "covariance_kl", 0.7),
]


@pytest.mark.parametrize("loss_type", PRESETS)
@pytest.mark.parametrize(("field", "name", "value"), LOSS_SETTINGS, ids=lambda part: str(part))
def test_objective_has_each_loss_setting(field, name, value, loss_type):
    # The bound of `delta` must be above that of epsilon, which is infinite in "unclipped".
    fields = {"epsilon": 0.2, field: value} if field == "delta" else {field: value}
    function = PRESETS[loss_type].function
    taken = parameters_of(function).keys() if function else set()
    of_functions = {*SETTINGS, *(() if "selected" in taken else COVARIANCE)}
    ignored = function and set(fields) & of_functions - taken
    if ignored:
        with pytest.raises(UserError, match=r"has no effect: the function of loss_type=.* takes no"):
            GRPOConfig(**BASE, loss_type=loss_type, **fields)
        return
    objective = GRPOConfig(**BASE, loss_type=loss_type, **fields).objective()
    assert getattr(objective, name) == value
    same = {"kind": PRESETS[loss_type].kind, "aggregation": PRESETS[loss_type].aggregation}
    assert same.items() <= dataclasses.asdict(objective).items()


def test_objective_settings_are_all_fields():
    """Every setting of the objective is a field, except those that a preset or a function alone decides."""
    names = {field.name for field in dataclasses.fields(PolicyObjective)}
    alone = {"kind", "aggregation", "function", "scales_with_advantage"}
    assert names == {name for _, name, _ in LOSS_SETTINGS} | {"level"} | alone


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
        ({"loss_type": "clip_cov", "covariance_low": 6.0}, "^covariance_low=6.0 must be below covariance_high=5.0"),
        (
            {"advantage_estimator": "pass_at_k", "advantage_k": 9},
            "advantage_k=9 is not allowed: it must be at most num_generations=8",
        ),
        ({"importance_sampling_level": "tok"}, "importance_sampling_level='tok' is not allowed: it must be one of tok"),
        ({"padding_free": ["auto"]}, r"padding_free=\['auto'\] is not allowed: it must be one of auto, always, never"),
        ({"num_train_epochs": 0}, "num_train_epochs=0 is not allowed: it must be a finite number, above 0"),
        ({"warmup_ratio": 1.5}, "warmup_ratio=1.5 is not allowed: it must be a finite number, from 0 to 1"),
        ({"max_steps": -2}, "max_steps=-2 is not allowed: it must be a finite number, at least 1"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps=0 is not allowed: it must be at least 1"),
        (
            {"gradient_accumulation_steps": 4, "steps_per_generation": 2},
            "a generation batch of 16 completions cannot be divided into optimizer steps of "
            "per_device_train_batch_size=8 x gradient_accumulation_steps=4 x 1 process = 32 completions",
        ),
        (
            {"generation_batch_size": 64, "per_device_train_batch_size": 8, "steps_per_generation": 4},
            "generation_batch_size=64 contradicts per_device_train_batch_size=8 x steps_per_generation=4",
        ),
        (
            {"log_completions": True, "eval_strategy": "steps", "lerning_rate": 1, "frobnicate": 2},
            "^GRPOConfig: 4 unknown fields: log_completions: set log_completions_steps; eval_strategy: set eval_steps "
            r"\(0: only before and after training\); lerning_rate \(did you mean 'learning_rate'\?\); frobnicate$",
        ),
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


@pytest.mark.parametrize(
    ("fields", "missing"),
    [({"model_name_or_path": ""}, "model_name_or_path"), ({"dataset_name": ""}, "dataset_name"),
     ({"reward_funcs": []}, "reward_funcs")],
)  # fmt: skip
def test_check_complete_names_what_only_a_script_can_give(fields, missing):
    check_complete(GRPOConfig(**BASE))
    with pytest.raises(UserError, match=f"^{missing} is missing"):
        check_complete(GRPOConfig(**{**BASE, **fields}))


@pytest.mark.parametrize(
    ("fields", "processes", "completions", "parts", "updates"),
    [
        ({}, 1, 64, 1, 1),
        ({"generation_batch_size": 16, "num_iterations": 2}, 4, 16, 1, 2),
        ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}, 1, 8, 1, 1),
        ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}, 3, 24, 1, 1),
        # TRL's defaults hold for what is not set: 8 completions a device, one step.
        ({"gradient_accumulation_steps": 4}, 1, 32, 1, 1),
        ({"per_device_train_batch_size": 8}, 2, 16, 1, 1),
        ({"per_device_train_batch_size": 4, "steps_per_generation": 6, "num_iterations": 2}, 1, 24, 6, 12),
        ({"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "steps_per_generation": 6}, 2, 48, 3, 3),
        ({"generation_batch_size": 64, "per_device_train_batch_size": 8}, 2, 64, 4, 4),
    ],
)
def test_batches_have_trls_sizes(fields, processes, completions, parts, updates, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    config = GRPOConfig(**BASE, num_generations=4, **fields)
    # Resolved only once: a copy has the same sizes.
    for made in (config, dataclasses.replace(config, seed=1)):
        assert made.generation_batch_size == completions
        assert (made.parts_per_batch, made.updates_per_batch) == (parts, updates)


@pytest.mark.parametrize(
    ("fields", "rows", "steps"),
    [
        ({"num_train_epochs": 1}, 40, 10),
        # As in TRL, the rest that fills no batch is left out of every epoch.
        ({"num_train_epochs": 2}, 43, 20),
        ({"num_train_epochs": 0.25}, 40, 3),
        ({"num_train_epochs": 1, "num_iterations": 2, "steps_per_generation": 8}, 40, 20),
        ({"num_train_epochs": 3}, 1, 3),
    ],
)
def test_epochs_are_trls_number_of_steps(fields, rows, steps):
    sizes = {"num_generations": 4, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}
    config = GRPOConfig(**{**BASE, **sizes, **fields})
    assert config.max_steps == -1
    assert steps_of_epochs(config, rows) == steps


def test_max_steps_overrides_epochs():
    assert GRPOConfig(**BASE, num_train_epochs=3, max_steps=7).max_steps == 7
    assert GRPOConfig(**BASE).max_steps == 100


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ({"scale_rewards": True}, {"scale_rewards": "group"}),
        ({"scale_rewards": False}, {"scale_rewards": "none"}),
        ({"report_to": "none"}, {"report_to": []}),
        ({"report_to": "wandb"}, {"report_to": ["wandb"]}),
    ],
)
def test_config_takes_trls_values(given, meant):
    config = GRPOConfig(**BASE, **given)
    assert {name: getattr(config, name) for name in meant} == meant


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


@pytest.mark.parametrize("value", [{"x": 1}, "wrong", object()], ids=["a mapping", "a text", "an object"])
def test_config_in_a_script_refuses_another_kind_of_value_for_every_number(value):
    """In one line that names the field; a file is checked by its parser already."""
    numbers = [
        field.name for field in dataclasses.fields(GRPOConfig)
        if field.type in ("int", "float", "int | None", "float | None")
    ]  # fmt: skip
    assert len(numbers) > 30
    for name in numbers:
        with pytest.raises(UserError, match=f"^{name}=.* is not allowed: it must be a (whole )?number") as raised:
            GRPOConfig(model_name_or_path="m", dataset_name="d", **{name: value})
        assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match=r"^lora_r=True is not allowed: it must be a whole number$"):
        GRPOConfig(model_name_or_path="m", dataset_name="d", lora_r=True)
    with pytest.raises(UserError, match=r"^dataset_name=3 is not allowed: it must be a text$"):
        GRPOConfig(model_name_or_path="m", dataset_name=3)
