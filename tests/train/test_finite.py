"""A bad step never replaces a good checkpoint."""

import dataclasses
import itertools
import math
import re

import pytest
import torch

from grpo_fast.errors import NotFiniteError, UserError
from grpo_fast.train.checkpoint import checkpoints
from grpo_fast.train.finite import all_finite, not_finite
from grpo_kernels import PRESETS
from support.runs import assert_same_run, figures, saved_weights, trainer
from support.small import weights

MODES = [{}, {"use_peft": True, "lora_r": 4}, {"optim": "adamw_torch_8bit"}, {"dtype": "bfloat16"}]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_all_finite_and_not_finite(bad, dtype):
    tensors = [torch.randn(3, 4, dtype=dtype), torch.empty(0), torch.arange(3), torch.randn(7, dtype=dtype)]
    assert all_finite(tensors)
    # Their norm overflows.
    tensors[0][0] = torch.finfo(dtype).max
    assert all_finite(tensors)
    assert all_finite([])
    tensors[3][5] = bad
    assert not all_finite(tensors)
    named = [(f"model.{index}", tensor) for index, tensor in enumerate(tensors)]
    assert not_finite(named) == "3"
    assert not_finite([(f"module.model.{i}", tensors[3]) for i in range(5)]) == "0, 1, 2 and 2 more"


def bad_gradient(made, step: int) -> None:
    """Put an infinity into the advantages of `step`."""
    collect = made.collect

    def bad():
        batch, metrics = collect()
        if made.step == step - 1:
            batch.advantages[batch.offsets[batch.active[0]]] = float("inf")
        return batch, metrics

    made.collect = bad


def bad_update(made, step: int) -> None:
    """Give `step` a learning rate that makes every weight infinite."""
    update = made.learner.update

    def bad(*args, **kwargs):
        if made.step == step - 1:
            for group in made.learner.optimizer.param_groups:
                group["lr"] = torch.tensor(1e39) if isinstance(group["lr"], torch.Tensor) else 1e39
        return update(*args, **kwargs)

    made.learner.update = bad


def names(folder) -> list[str]:
    return [path.name for path in checkpoints(folder)]


@pytest.mark.parametrize("fields", MODES, ids=lambda fields: ",".join(fields))
def test_train_with_a_bad_gradient_keeps_the_weights(tmp_path, capsys, fields):
    """The previous step's weights are saved beside the last checkpoint, and a resumed run draws other prompts."""
    fields = {"save_steps": 2, "save_total_limit": 1, **fields}
    made = trainer(tmp_path, **fields)
    bad_gradient(made, 4)
    with pytest.raises(UserError) as error:
        made.train()
    message = str(error.value)
    assert message.startswith("step 4: the gradient is not finite (norm nan, loss ")
    (active,) = {
        int(found) for found in re.findall(r"because of completion (\d) of prompt \d \(advantage inf\): in", message)
    }
    assert 1 <= active <= 4
    assert "more; to continue" in message
    assert "\n" not in message
    resume = (
        f"to continue from {tmp_path}/checkpoint-3, with other prompts and a smaller learning_rate: grpo-fast train "
    )
    assert message.endswith(f"{resume}{tmp_path}/config.yaml --resume --learning_rate 0.0005")
    assert names(tmp_path) == ["checkpoint-2", "checkpoint-3"]
    assert all(tensor.isfinite().all() for tensors in saved_weights(tmp_path).values() for tensor in tensors.values())

    second = trainer(tmp_path, resume=True, learning_rate=5e-4, **fields)
    assert torch.equal(weights(second.model), weights(made.model))
    # The same prompts would give the same gradient.
    assert second.state.num_prompts == made.state.num_prompts + made.config.prompts_per_step
    assert not torch.equal(second.saver.rng["torch"], made.saver.rng["torch"])
    capsys.readouterr()
    second.train()
    said = "checkpoint-3 with learning_rate=0.0005 instead of 0.001, and with other prompts and random numbers"
    assert said in capsys.readouterr().out
    entries = figures(tmp_path)
    assert [entry["step"] for entry in entries] == [1, 2, 3, 4, 5]
    # Linear, down to 0 after the fifth step.
    assert [entry["learning_rate"] for entry in entries] == pytest.approx([1e-3, 8e-4, 6e-4, 2e-4, 1e-4])
    assert names(tmp_path) == ["checkpoint-5"]
    trainer(tmp_path, resume=True, learning_rate=5e-4, **fields)
    with pytest.raises(UserError, match=r"learning_rate=0.001 is not that of .*take that value or a smaller one"):
        trainer(tmp_path, resume=True, **fields)


@pytest.mark.parametrize("fields", MODES, ids=lambda fields: ",".join(fields))
def test_train_with_bad_weights_saves_nothing(tmp_path, fields):
    """The last checkpoint stays despite save_total_limit, and a resumed run continues from it."""
    fields = {"save_total_limit": 1, **fields}
    made = trainer(tmp_path / "run", save_steps=2, **fields)
    bad_update(made, 4)
    with pytest.raises(UserError, match=r"step 4: the updated weights are not finite .norm of the gradient") as error:
        made.train()
    assert f"to continue from {tmp_path}/run/checkpoint-2, with other prompts" in str(error.value)
    assert names(tmp_path / "run") == ["checkpoint-2"]
    trainer(tmp_path / "run", resume=True, **fields).train()
    trainer(tmp_path / "whole", **fields).train()
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_train_with_a_bad_first_step_leaves_no_checkpoint(tmp_path):
    with pytest.raises(UserError) as error:
        trainer(tmp_path, learning_rate=1e39, lr_scheduler_type="constant").train()
    assert str(error.value).startswith("step 1: the updated weights are not finite")
    assert "to continue from the beginning and a smaller learning_rate: " in str(error.value)
    assert names(tmp_path) == []
    trainer(tmp_path, resume=True, max_steps=1).train()
    assert names(tmp_path) == ["checkpoint-1"]


def test_update_refuses_a_gradient_whose_norm_overflows(tmp_path):
    """Its numbers are finite, but the optimizer's squares of them would not be."""
    made = trainer(tmp_path)
    batch, _ = made.collect()
    batch.advantages *= 1e30
    before = weights(made.model)
    with pytest.raises(NotFiniteError, match=r"step 1: the gradient is not finite .norm inf.*its norm is too large"):
        made.update(batch)
    assert torch.equal(before, weights(made.model))


def test_trainer_refuses_weights_that_are_not_finite(tmp_path):
    made = trainer(tmp_path / "run")
    with torch.no_grad():
        made.model.model.norm.weight[3] = float("nan")
    made.model.save_pretrained(tmp_path / "model")
    made.tokenizer.save_pretrained(tmp_path / "model")
    fields = {"model_name_or_path": str(tmp_path / "model"), "model_init_kwargs": None}
    with pytest.raises(UserError, match=r"model_name_or_path='.*model' holds weights that are not finite: norm"):
        trainer(tmp_path / "run", **fields)


def far_ratio(made, step: int, distance: float = -200.0) -> None:
    """Old log-probabilities of one active completion far from the policy's, at `step`."""
    collect = made.collect

    def bad():
        batch, metrics = collect()
        if made.step == step - 1:
            batch.old_logprobs = made.learner.score(made.learner.policy, batch)
            chosen = next(i for i in batch.active if batch.advantages[batch.offsets[i]] < 0)
            batch.old_logprobs[batch.offsets[chosen] : batch.offsets[chosen + 1]] += distance
            made.chosen = chosen
        return batch, metrics

    made.collect = bad


def test_train_with_a_ratio_of_e_to_the_200_stops_and_names_the_completion(tmp_path):
    made = trainer(tmp_path)
    far_ratio(made, 3)
    with pytest.raises(UserError) as error:
        made.train()
    group, completion = divmod(made.chosen, 4)
    named = f"because of completion {completion + 1} of prompt {group + 1} (log-probabilities up to 200 from the old"
    assert str(error.value).startswith("step 3: the gradient is not finite (norm ")
    assert named in str(error.value)
    assert f"to continue from {tmp_path}/checkpoint-2" in str(error.value)
    assert all(tensor.isfinite().all() for tensors in saved_weights(tmp_path).values() for tensor in tensors.values())


def test_train_skips_updates_that_are_not_finite(tmp_path, capsys):
    """Weights and moments stay, the learning rate follows the step, and each skipped update is named once."""
    made, before = trainer(tmp_path, max_skipped_updates=1), []
    far_ratio(made, 3)
    update = made.update
    made.update = lambda *args, **given: (before.append(weights(made.model)), update(*args, **given))[1]
    made.train()
    assert torch.equal(before[3], before[2])
    assert not torch.equal(before[4], before[3])
    entries = figures(tmp_path)
    assert [entry["skipped_update"] for entry in entries] == [0, 0, 1, 0, 0]
    assert [entry["learning_rate"] for entry in entries] == pytest.approx([1e-3, 8e-4, 6e-4, 4e-4, 2e-4])
    assert "grad_norm" not in entries[2]
    said = capsys.readouterr().out
    assert "step 3: the gradient is not finite" in said
    assert "skipped (1 of at most 1 in a row)" in " ".join(said.split())
    assert [path.name for path in checkpoints(tmp_path)][-1] == "checkpoint-5"


def test_train_stops_after_too_many_skipped_updates(tmp_path):
    made = trainer(tmp_path, max_skipped_updates=2)
    for step in (2, 3, 4):
        far_ratio(made, step)
    with pytest.raises(UserError, match="step 4: the gradient is not finite"):
        made.train()
    assert [entry["skipped_update"] for entry in figures(tmp_path)] == [0, 1, 1]


def test_update_refuses_a_loss_that_is_not_finite(tmp_path):
    """Although its gradient is."""
    made = trainer(tmp_path)
    batch, _ = made.collect()
    accumulate = made.learner.accumulate_gradients
    made.learner.accumulate_gradients = lambda *args: {**accumulate(*args), "loss": math.inf}
    before = weights(made.model)
    with pytest.raises(NotFiniteError, match=r"step 1: the loss is not finite \(norm [0-9.e-]+, loss inf\)$"):
        made.update(batch)
    assert torch.equal(before, weights(made.model))


KL_TERMS = {"none": {"beta": 0.0}, **{kl: {"beta": 0.1, "kl": kl} for kl in ("k1", "k2", "k3")}}


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.long)])
def test_far_ratio_ends_in_finite_weights_or_a_clear_stop(tmp_path, dtype):
    """Whatever the objective, its KL term and the dtype."""
    made = trainer(tmp_path, lr_scheduler_type="constant", dtype=dtype)
    batch, _ = made.collect()
    scored, start = made.learner.score(made.learner.policy, batch), weights(made.model)
    stops = 0
    for preset, kl, distance in itertools.product(PRESETS, KL_TERMS, (-200.0, 200.0)):
        case = preset, kl, distance
        torch.nn.utils.vector_to_parameters(start.clone(), made.model.parameters())
        made.learner.objective = dataclasses.replace(PRESETS[preset], **KL_TERMS[kl], kl_bias_correction=True)
        batch.old_logprobs = batch.ref_logprobs = scored + distance
        stopped, metrics = None, {"loss": 0.0}
        try:
            metrics = made.learner.update(batch)
        except NotFiniteError as error:
            stopped, stops = str(error), stops + 1
            made.learner.optimizer.zero_grad()
        assert stopped is None or "because of completion" in stopped, case
        assert stopped is None or torch.equal(weights(made.model), start), case
        assert math.isfinite(metrics["loss"]), case
        assert weights(made.model).isfinite().all(), case
    assert stops > 10


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kl_clip_trains_on_through_a_reference_far_away(tmp_path, dtype):
    """With every estimator; without the bound, k3 stops the run."""
    made = trainer(tmp_path, lr_scheduler_type="constant", dtype=dtype)
    batch, _ = made.collect()
    scored, start = made.learner.score(made.learner.policy, batch), weights(made.model)
    for kl, distance in itertools.product(("k1", "k2", "k3"), (-200.0, 200.0)):
        made.learner.objective = dataclasses.replace(PRESETS["dapo"], beta=0.1, kl=kl, kl_clip=10.0)
        batch.ref_logprobs = scored + distance
        torch.nn.utils.vector_to_parameters(start.clone(), made.model.parameters())
        metrics = made.learner.update(batch)
        assert math.isfinite(metrics["loss"] + metrics["kl"] + metrics["grad_norm"])
        assert weights(made.model).isfinite().all()
    made.learner.objective = dataclasses.replace(PRESETS["dapo"], beta=0.1)
    with pytest.raises(NotFiniteError, match="because of completion"):
        made.learner.update(batch)
