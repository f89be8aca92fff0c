"""The trainer with an engine that has a copy of the weights: sync, probe, correction and sampling ahead."""

import copy
import dataclasses
import sys
import threading

import pytest
import torch
from accelerate.state import AcceleratorState

from grpo_fast.config import GRPOConfig
from grpo_fast.errors import UserError
from grpo_fast.evaluation.run import EvalOptions, EvalRun
from grpo_fast.files import read_metrics
from grpo_fast.rollout import TransformersRollout, check_support
from grpo_fast.train.checkpoint import checkpoints
from grpo_kernels import sampling_ratio
from support.small import SMALL, trainer, weights

FIELDS = {"use_vllm": True, "learning_rate": 1e-2}


class CopyEngine(TransformersRollout):
    """Samples from a copy of the model, like an engine in another process."""

    copies_weights = True
    syncs = True
    shift = 0.0

    def __init__(self, model, tokenizer):
        super().__init__(copy.deepcopy(model), tokenizer, 100_000)
        self.calls, self.seen = [], []

    def sync(self, model):
        self.calls.append("sync")
        if self.syncs:
            self.model.load_state_dict(model.state_dict())

    def sleep(self):
        self.calls.append("sleep")

    def wake(self):
        self.calls.append("wake")

    def close(self):
        self.calls.append("close")

    def generate(self, prompt_ids, sampling):
        # The probe sets a seed; it must not change the state of the trainer's generator.
        with torch.random.fork_rng(enabled=sampling.seed is not None):
            if sampling.seed is not None:
                torch.manual_seed(sampling.seed)
            else:
                self.calls.append("generate")
            self.seen.append(weights(self.model))
            responses = super().generate(prompt_ids, sampling)
        shift = 0.0 if sampling.num_generations == 1 else self.shift
        return [each._replace(logprobs=[value + shift for value in each.logprobs]) for each in responses]


class SeparateEngine(CopyEngine):
    separate = True


@pytest.fixture
def use(monkeypatch):
    """Make the trainer sample from an engine of this class."""

    def choose(engine):
        monkeypatch.setattr("grpo_fast.trainer.check_engine", lambda config: None)
        monkeypatch.setattr(
            "grpo_fast.trainer.build_rollout", lambda config, model, tokenizer, _: engine(model, tokenizer)
        )

    return choose


def test_sampler_with_a_copy_equals_a_run_without_engine(tmp_path, use):
    """The engine is synced before every generation and sleeps during updates."""
    plain = trainer(tmp_path / "plain", learning_rate=1e-2)
    plain.train()
    use(CopyEngine)
    made = trainer(tmp_path / "copy", **FIELDS)
    made.train()
    assert made.rollout.engine.calls[0] == "sync"
    first = made.rollout.engine.calls.index("sleep")
    assert made.rollout.engine.calls[first:] == [*["sleep", "wake", "sync", "generate"] * 3, "close"]
    torch.testing.assert_close(weights(made.model), weights(plain.model), rtol=0, atol=1e-5)
    metrics = read_metrics(tmp_path / "copy" / "metrics.jsonl")
    for entry in metrics:
        assert entry["sampling/sampling_logp_difference/max"] < 1e-5
        assert entry["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=1e-4)
    assert not any("sampling/" in name for name in read_metrics(tmp_path / "plain" / "metrics.jsonl")[0])


def test_probe_stops_a_run_with_stale_weights(tmp_path, use, monkeypatch):
    """The error shows the numbers, and the run can be resumed."""
    use(CopyEngine)
    made = trainer(tmp_path, **FIELDS)
    monkeypatch.setattr(CopyEngine, "syncs", False)
    with pytest.raises(UserError, match=r"differ by up to \d\.\d+ \(allowed: 0\.001.*; sampler -\d.*, trainer -\d"):
        made.train()
    assert [folder.name for folder in checkpoints(tmp_path)] == ["checkpoint-1"]
    assert "close" in made.rollout.engine.calls
    monkeypatch.setattr(CopyEngine, "syncs", True)
    AcceleratorState._reset_state(reset_partial_state=True)
    again = trainer(tmp_path, resume_from_checkpoint=True, **FIELDS)
    again.train()
    assert again.step == 3


def test_probe_stops_before_a_run_whose_first_sync_failed(tmp_path, use):
    class Other(CopyEngine):
        syncs = False

        def __init__(self, model, tokenizer):
            super().__init__(model, tokenizer)
            torch.nn.init.normal_(self.model.get_output_embeddings().weight)

    use(Other)
    with pytest.raises(UserError, match="does not have the trainer's weights"):
        trainer(tmp_path, **FIELDS)


def test_sync_tolerance_set_by_the_user(tmp_path, use, monkeypatch):
    use(CopyEngine)
    monkeypatch.setattr(CopyEngine, "syncs", False)
    made = trainer(tmp_path, sync_tolerance=50.0, **FIELDS)
    made.train()
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["sampling/sampling_logp_difference/max"] > 1e-3


def test_sync_tolerance_in_mixed_precision(tmp_path, use):
    """The weights are float32, but the trainer computes log-probabilities in bfloat16."""
    use(CopyEngine)
    trainer(tmp_path / "bf16", bf16=True, **FIELDS).train()
    assert read_metrics(tmp_path / "bf16" / "metrics.jsonl")[0]["sampling/sampling_logp_difference/max"] > 1e-3


FILTERS = [{"top_p": 0.9}, {"top_k": 4}, {"min_p": 0.2}]


@pytest.mark.parametrize("filters", FILTERS, ids=lambda filters: "".join(filters))
def test_check_support_refuses_filters_that_change_the_correction(tmp_path, use, filters):
    """Before any work, and naming the ways out; sampling for an evaluation is not affected."""
    use(CopyEngine)
    ((name, value),) = filters.items()
    message = (
        f"^{name}={value} is not allowed in training with use_vllm.*set truncated_support=true.*"
        "or set vllm_importance_sampling_correction=f"
    )
    with pytest.raises(UserError, match=message):
        trainer(tmp_path, **filters, **FIELDS, reward_funcs=["no_such_reward"])
    assert not (tmp_path / "config.yaml").exists()
    GRPOConfig(**{**SMALL, **filters, "use_vllm": True})


@pytest.mark.parametrize(
    ("mask", "fields"),
    [
        ("rollout_rs", {"rollout_rs": "token_k3", "rollout_rs_threshold": 2.0}),
        ("off_policy_mask_threshold", {"off_policy_mask_threshold": 0.5}),
    ],
)
def test_check_support_names_the_masks_that_compare_with_the_sampler(mask, fields):
    fields = {"use_vllm": True, "vllm_importance_sampling_correction": False, "top_p": 0.9, **fields}
    config = GRPOConfig(**{**SMALL, **fields})
    with pytest.raises(UserError, match=f"with use_vllm and {mask}, because.*leave out top_p.*, or set {mask}=null$"):
        check_support(config)
    check_support(dataclasses.replace(config, truncated_support=True))


@pytest.mark.parametrize("fields", [{"use_vllm": False}, {"vllm_importance_sampling_correction": False}], ids=str)
def test_check_support_allows_filters_without_the_correction(tmp_path, use, fields):
    """The loss takes its old log-probabilities from the trainer, over the whole vocabulary."""
    use(
        CopyEngine
        if fields.get("use_vllm", True)
        else lambda model, tokenizer: TransformersRollout(model, tokenizer, 9)
    )
    made = trainer(tmp_path, **{**FIELDS, **fields, "top_p": 0.9, "top_k": 4, "min_p": 0.05, "max_steps": 2})
    batch, _ = made.collect()
    assert batch.sampling_logprobs is None
    made.train()
    (first, *_) = read_metrics(tmp_path / "metrics.jsonl")
    assert first["grad_norm"] > 0
    assert not any(name.startswith("sampling/") for name in first)


def test_filtered_logprobs_cover_only_the_kept_tokens(tmp_path, use, monkeypatch):
    """Why the filters are refused: each token's ratio is the kept probability, so that of a sequence vanishes."""
    monkeypatch.setattr("grpo_fast.trainer.check_support", lambda config: None)
    use(CopyEngine)
    made = trainer(tmp_path, top_k=4, **FIELDS)
    batch, _ = made.collect()
    active = torch.zeros(len(batch.samples), dtype=torch.bool)
    active[batch.active] = True
    logprobs = made.learner.score(made.learner.policy, batch)[active.repeat_interleave(batch.offsets.diff())]
    sampled = batch.sampling_logprobs[active.repeat_interleave(batch.offsets.diff())]
    assert len(sampled) > 0
    assert (logprobs - sampled).exp().max() < 0.95


@pytest.mark.parametrize("loss_type", ["grpo", "gspo", "cispo", "vespo"])
@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "geometric_mask"])
def test_correction_uses_the_logprobs_of_the_trainer(tmp_path, use, monkeypatch, mode, loss_type):
    """It is computed in the forward of the step; the gradient equals that with ratios given beforehand."""
    if loss_type == "vespo" and "token" not in mode:
        pytest.skip("refused")
    use(CopyEngine)
    monkeypatch.setattr(CopyEngine, "shift", 0.05)
    bounds = {"vllm_importance_sampling_clip_max": 0.95, "vllm_importance_sampling_clip_min": 0.5}
    made = trainer(tmp_path, loss_type=loss_type, vllm_importance_sampling_mode=mode, **bounds, **FIELDS)
    learner = made.learner
    batch, _ = made.collect()
    gradients = []

    def gradient():
        figures = learner.accumulate_gradients(batch)
        gradients.append(torch.cat([p.grad.flatten() for p in made.model.parameters()]))
        learner.optimizer.zero_grad()
        return figures

    sampled = batch.sampling_logprobs
    # Noise, so that tokens and sequences have different ratios, some of them outside the bounds.
    generator = torch.Generator().manual_seed(0)
    batch.sampling_logprobs = sampled + 0.2 * torch.randn(len(sampled), generator=generator)
    figures = gradient()
    logprobs = learner.score(learner.policy.train(), batch)
    expected = sampling_ratio(
        logprobs, batch.sampling_logprobs, mode, clip_max=0.95, clip_min=0.5, cu_seqlens=batch.offsets
    )
    active = torch.zeros(len(batch.samples), dtype=torch.bool)
    active[batch.active] = True
    computed = active.repeat_interleave(batch.offsets.diff())
    torch.testing.assert_close(batch.correction[computed], expected[computed], rtol=1e-4, atol=1e-5)
    ratios = expected[computed] if "token" in mode else expected[batch.offsets[:-1][active]]
    assert figures["sampling/importance_sampling_ratio/mean"] == pytest.approx(ratios.mean().item(), rel=1e-4)
    assert figures["sampling/importance_sampling_ratio/max"] == pytest.approx(ratios.max().item(), rel=1e-4)
    difference = (logprobs - batch.sampling_logprobs).abs()[computed]
    assert figures["sampling/sampling_logp_difference/mean"] == pytest.approx(difference.mean().item(), rel=1e-4)
    # A second update on the batch reuses the ratios of the first.
    batch.old_logprobs = logprobs if loss_type == "vespo" else None
    batch.correction = expected
    gradient()
    batch.sampling_logprobs = batch.correction = batch.old_logprobs = None
    gradient()
    size = gradients[1].norm()
    assert (gradients[0] - gradients[1]).norm() <= 1e-4 * size
    assert (gradients[2] - gradients[1]).norm() > 0.01 * size


def test_vespo_with_open_bounds_uses_the_whole_ratio(tmp_path, use):
    """Its weight depends only on the ratio to the sampler, not on how that splits into two ratios."""
    use(CopyEngine)
    bounds = {"vllm_importance_sampling_mode": "token_truncate", "vllm_importance_sampling_clip_max": None}
    made = trainer(tmp_path, loss_type="vespo", **bounds, **FIELDS)
    batch, _ = made.collect()
    batch.sampling_logprobs = batch.sampling_logprobs + 0.1 * torch.randn(len(batch.sampling_logprobs))
    gradients = []
    for sampled, old in ((batch.sampling_logprobs, None), (None, batch.sampling_logprobs)):
        batch.sampling_logprobs, batch.old_logprobs, batch.correction = sampled, old, None
        made.learner.accumulate_gradients(batch)
        gradients.append(torch.cat([p.grad.flatten() for p in made.model.parameters()]))
        made.learner.optimizer.zero_grad()
    assert (gradients[0] - gradients[1]).norm() <= 1e-4 * gradients[1].norm()


AHEAD = {**FIELDS, "vllm_mode": "server", "sample_ahead": True, "max_steps": 4}


def test_sample_ahead_is_one_step_old(tmp_path, use):
    """Step k trains on samples from the weights before step k - 1, drawn during it; step 1 is on-policy."""
    use(SeparateEngine)
    made = trainer(tmp_path, **AHEAD)
    engine, trained, threads = made.rollout.engine, [], []
    generate, update = engine.generate, made.learner.update

    def watched(prompts, sampling):
        if sampling.num_generations > 1:
            threads.append((threading.current_thread() is threading.main_thread(), weights(engine.model)))
        return generate(prompts, sampling)

    engine.generate = watched
    made.learner.update = lambda *args: trained.append(weights(made.model)) or update(*args)
    made.train()
    assert [main for main, _ in threads] == [True, False, False, False]
    sampled_from = [found for _, found in threads]
    assert torch.equal(sampled_from[0], trained[0])
    for step in range(1, 4):
        assert torch.equal(sampled_from[step], trained[step - 1])
    metrics = read_metrics(tmp_path / "metrics.jsonl")
    assert metrics[0]["sampling/sampling_logp_difference/max"] < 1e-5
    assert all(entry["sampling/sampling_logp_difference/max"] > 1e-3 for entry in metrics[1:])
    assert "sleep" not in engine.calls


def test_sample_ahead_failure_stops_the_run_with_a_checkpoint(tmp_path, use):
    class Dying(SeparateEngine):
        def generate(self, prompt_ids, sampling):
            if threading.current_thread() is not threading.main_thread():
                raise UserError("the server no longer answers")
            return super().generate(prompt_ids, sampling)

    use(Dying)
    with pytest.raises(UserError, match="the server no longer answers"):
        trainer(tmp_path, **AHEAD).train()
    assert [folder.name for folder in checkpoints(tmp_path)] == ["checkpoint-1"]
    use(SeparateEngine)
    AcceleratorState._reset_state(reset_partial_state=True)
    again = trainer(tmp_path, resume_from_checkpoint=True, **AHEAD)
    again.train()
    assert [entry["step"] for entry in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


def test_sample_ahead_resumed_draws_each_prompt_once(tmp_path, use):
    """Samples that were drawn ahead and not trained on are drawn again."""
    use(SeparateEngine)
    drawn = {}
    for name, steps in (("whole", (4,)), ("parts", (2, 4))):
        for resume, max_steps in enumerate(steps):
            AcceleratorState._reset_state(reset_partial_state=True)
            made = trainer(tmp_path / name, **{**AHEAD, "max_steps": max_steps, "resume_from_checkpoint": bool(resume)})
            collect, seen = made.collect, drawn.setdefault(name, [])
            made.collect = lambda collect=collect, seen=seen: seen.append(collect()) or seen[-1]
            made.train()
    prompts = {
        name: [[sample.prompt_ids for sample in batch.samples] for batch, _ in found] for name, found in drawn.items()
    }
    assert prompts["whole"] == prompts["parts"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sample_ahead": True}, "sample_ahead requires use_vllm, vllm_mode='server'"),
        ({"use_vllm": True, "loss_type": "vespo"}, "loss_type='vespo' requires vllm_importance_sampling_mode token"),
        ({"vllm_importance_sampling_clip_min": 4.0}, "clip_min=4.0 is above vllm_importance_sampling_clip_max=3.0"),
        ({"sync_tolerance": 0.0}, "sync_tolerance=0.0 is not allowed"),
        ({"use_vllm": "yes"}, "use_vllm='yes' is not allowed: it must be true or false"),
        ({"vllm_server_base_url": "127.0.0.1:8000"}, "base_url='127.0.0.1:8000' is not allowed.*like http://127.0.0.1"),
        ({"vllm_server_base_url": ""}, "vllm_server_base_url='' is not allowed"),
        ({"vllm_server_host": "http://127.0.0.1"}, "vllm_server_host='http://127.0.0.1' is not allowed.*IPv4"),
        ({"vllm_server_host": "::1"}, "vllm_server_host='::1' is not allowed"),
    ],
)
def test_config_refuses_bad_sampling_fields(tmp_path, fields, message):
    with pytest.raises(UserError, match=message):
        trainer(tmp_path, **fields)


def test_check_engine_names_a_missing_engine_before_loading_a_model(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError, match=r"vllm is not installed; install it with: pip install 'grpo-fast\[vllm\]'"):
        trainer(tmp_path, use_vllm=True, model_name_or_path=str(tmp_path / "none"))


def test_evaluation_probes_its_engine(tmp_path, monkeypatch):
    """An engine with other weights after a sync is refused."""
    config = GRPOConfig(**{**SMALL, "output_dir": str(tmp_path)}, use_vllm=True)
    options = EvalOptions(output=tmp_path / "eval")
    monkeypatch.setattr("grpo_fast.evaluation.run.check_engine", lambda config: None)
    monkeypatch.setattr(
        "grpo_fast.evaluation.run.build_rollout", lambda _, model, tokenizer, __: CopyEngine(model, tokenizer)
    )
    EvalRun(config, options)

    def lost(engine, model):
        torch.nn.init.normal_(engine.model.get_output_embeddings().weight)

    monkeypatch.setattr(CopyEngine, "sync", lost)
    with pytest.raises(UserError, match="does not have the trainer's weights"):
        EvalRun(config, options)
