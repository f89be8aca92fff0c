"""Losses and advantages of the user's own, named by a configuration."""

import sys

import pytest
import torch

from grpo_fast.errors import UserError
from grpo_fast.model.policy import FusedPolicy
from grpo_kernels import PRESETS
from grpo_kernels.objective import function_objective
from support.runs import config, figures, trainer
from support.small import weights
from support.tiny import tiny_model

LOSSES = """
import torch
from grpo_kernels import PRESETS, PolicyObjective, register_objective
from grpo_kernels.objective import function_objective

def mine(logprobs, old_logprobs, advantages, epsilon=0.2):
    ratio = torch.exp(logprobs - old_logprobs)
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - epsilon, 1 + epsilon) * advantages)

def plain(logprobs, advantages):
    return -advantages * logprobs

def mean(logprobs):
    return logprobs.mean()

gspo = PRESETS["gspo"]
register_objective("registered in a file", plain)
averaged = function_objective(mine, aggregation="sequence_mean", scales_with_advantage=True)
number = 3
"""


@pytest.fixture
def losses(tmp_path, monkeypatch):
    (tmp_path / "my_losses.py").write_text(LOSSES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [*sys.path])
    yield f"{tmp_path / 'my_losses.py'}"
    sys.modules.pop("my_losses", None)
    PRESETS.pop("registered in a file", None)


@pytest.mark.parametrize(("name", "preset"), [("mine", "dapo"), ("gspo", "gspo"), ("averaged", "grpo")])
def test_own_loss_trains_like_the_preset_of_its_formula(losses, tmp_path, name, preset):
    """Two updates on each batch, with a KL term, so that the ratios are not 1."""
    fields = {"num_iterations": 2, "max_steps": 4, "beta": 0.05}
    runs = {}
    for label, loss_type in (("theirs", preset), ("ours", f"{losses}:{name}")):
        made = trainer(tmp_path / label, loss_type=loss_type, **fields)
        made.train()
        runs[label] = weights(made.model), figures(tmp_path / label)
    torch.testing.assert_close(runs["ours"][0], runs["theirs"][0], rtol=1e-5, atol=1e-6)
    losses_of = [[entry["loss"] for entry in runs[label][1]] for label in ("ours", "theirs")]
    assert losses_of[0] == pytest.approx(losses_of[1], rel=1e-4, abs=1e-6)


def test_own_loss_takes_the_settings_of_the_configuration(losses, tmp_path):
    assert config(tmp_path, loss_type=f"{losses}:mine").objective().epsilon == 0.2
    objective = config(tmp_path, loss_type="my_losses.mine", epsilon=0.3, beta=0.1).objective()
    assert (objective.epsilon, objective.beta, objective.aggregation) == (0.3, 0.1, "token_mean")
    with pytest.raises(UserError, match=r"^epsilon=0.3 has no effect: the function of loss_type=.* takes no 'epsilon'"):
        config(tmp_path, loss_type=f"{losses}:plain", epsilon=0.3).objective()


def test_own_loss_is_not_run_by_the_configuration_itself(tmp_path):
    """Before anything runs, it is checked who wrote the name."""
    (tmp_path / "losses.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n{LOSSES}")
    made = config(tmp_path, loss_type=f"{tmp_path / 'losses.py'}:mine")
    assert not (tmp_path / "ran").exists()
    assert made.objective().kind == "function"
    assert (tmp_path / "ran").exists()
    PRESETS.pop("registered in a file")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("missing.py:mine", "loss_type: no such file: missing.py"),
        ("my_losses.py:absent", "my_losses.py:absent' names no function: my_losses has no callable 'absent'"),
        ("my_losses.py:number", "my_losses.py:number' names no function"),
        ("no_such_losses.mine", "loss_type: 'no_such_losses.mine' cannot be loaded: ModuleNotFoundError"),
        ("my_losses.py:mean", "loss_type: objective 'mean' must return one loss per token"),
    ],
)
def test_own_loss_that_cannot_be_used_is_refused(losses, tmp_path, name, words):
    with pytest.raises(UserError, match=words) as error:
        trainer(tmp_path / "run", loss_type=name)
    assert "\n" not in str(error.value)


def test_loss_type_that_names_nothing_is_refused(tmp_path):
    for name in ("gprp", "losses.py:", ":mine", "a.b c"):
        with pytest.raises(UserError, match=r"loss_type=.* is not allowed: it must be one of grpo, .*file.py:function"):
            config(tmp_path, loss_type=name)
    assert PRESETS


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("preset", ["dapo", "gspo"])
def test_fused_policy_takes_a_function(preset, packed):
    """A token's loss and one of whole sequences, with a mask in the padded rows."""

    def own(ratio, logprobs, advantages, epsilon, epsilon_high):
        high = epsilon if epsilon_high is None else epsilon_high
        return -torch.minimum(ratio * advantages, ratio.clamp(1 - epsilon, 1 + high) * advantages)

    model, built_in = tiny_model(), PRESETS[preset]
    same = {name: getattr(built_in, name) for name in ("level", "epsilon", "epsilon_high", "aggregation")}
    ids = torch.randint(0, model.config.vocab_size, (2, 9))
    given = {"input_ids": ids, "advantages": torch.tensor([1.0, -0.5])}
    shape = (2, 8)
    if packed:
        given |= {"input_ids": ids.view(1, -1), "cu_seqlens": torch.tensor([0, 9, 18])}
        shape = (1, 17)
    else:
        mask = torch.ones(2, 9, dtype=torch.long)
        mask[1, 7:] = 0
        given["attention_mask"] = mask
    given["old_logprobs"] = torch.full(shape, -3.0) - torch.rand(shape)
    gradients = []
    for objective in (built_in, function_objective(own, **same)):
        model.zero_grad()
        FusedPolicy(model)(**given, objective=objective).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert gradients[0].any()
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-7)
