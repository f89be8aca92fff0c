"""The tokens that a truncated sampler kept: recorded while sampling, and the loss over these alone."""

import copy
import dataclasses
import pickle

import pytest
import torch
from accelerate import Accelerator
from transformers import LlamaConfig, Phi3Config

from grpo_fast.config import GRPOConfig
from grpo_fast.errors import UserError
from grpo_fast.files import read_metrics
from grpo_fast.model import packing
from grpo_fast.model.loading import digit_tokenizer
from grpo_fast.model.policy import FusedPolicy, Teaching, distillation_loss
from grpo_fast.rollout import Response, Sampling, TransformersRollout, check_support, speculative
from grpo_fast.train.batch import build_step_batch
from grpo_fast.train.learner import Learner
from grpo_kernels import PolicyObjective, Support, sampling_ratio
from support import text_models
from support.small import trainer
from support.supports import mask_of, random_support
from support.tiny import VOCAB, random_samples, tiny_model

PROMPTS = [[5, 9, 11], [7], [3, 4, 5, 6, 7, 8]]
FILTERS = {"top_p": 0.8, "top_k": 12, "min_p": 0.02}
SAMPLES = random_samples(groups=2, per_group=3, longest=9)


@pytest.fixture(autouse=True)
def engine(monkeypatch):
    """Runs with use_vllm, whose loss corrects for the sampler, sample with transformers."""
    monkeypatch.setattr("grpo_fast.trainer.check_engine", lambda config: None)
    monkeypatch.setattr(
        "grpo_fast.trainer.build_rollout",
        lambda config, model, tokenizer, _: TransformersRollout(model, tokenizer, 100_000),
    )


@pytest.mark.parametrize("config_class", [LlamaConfig, Phi3Config], ids=["continuous", "padded"])
def test_recorded_ids_are_those_that_the_filters_keep(config_class):
    model = tiny_model(torch.float32, config_class, eos_token_id=None)
    engine = TransformersRollout(model, digit_tokenizer(), 100_000)
    sampling = Sampling(3, 6, temperature=0.7, **FILTERS, generation_kwargs={"min_new_tokens": 4}, keeps_support=True)
    responses = engine.generate(PROMPTS, sampling)
    assert len(responses) == 9
    for place, response in enumerate(responses):
        prompt, ids = PROMPTS[place // 3], response.token_ids
        with torch.no_grad():
            logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].float() / 0.7
        kept = mask_of(response.support, VOCAB)
        assert len(kept) == len(ids)
        truncated = logits.masked_fill(~kept, float("-inf")).log_softmax(-1)
        found = truncated.gather(1, torch.tensor(ids)[:, None]).squeeze(1)
        torch.testing.assert_close(found, torch.tensor(response.logprobs), rtol=0, atol=1e-5)
        assert (kept.sum(1) <= FILTERS["top_k"]).all()
        # The lowest kept token's probability is above every one that was left out.
        assert (logits.masked_fill(~kept, 99).amin(1) >= logits.masked_fill(kept, -99)[:, 2:].amax(1)).all()
    (other, *_) = engine.generate(PROMPTS, dataclasses.replace(sampling, keeps_support=False))
    assert other.support is None


def test_speculative_decoder_keeps_the_ids_of_drafted_tokens(monkeypatch):
    """Of several tokens that a step accepts, each has the ids that were kept at its own place."""
    # Drafts are verified whatever they cost.
    monkeypatch.setattr(speculative, "step_cost", lambda device: lambda tokens: 1e9 + tokens)
    sampler = text_models.rollout()
    engine = TransformersRollout(sampler.model, sampler.tokenizer, 100_000, speculative_tokens=4)
    sampling = Sampling(8, 40, temperature=0.2, top_k=5, keeps_support=True)
    responses = engine.generate([[5, 9, 11]], sampling)
    assert engine.take_figures()["speculative/tokens_per_step"] > 1
    for response in responses:
        ids = response.token_ids
        with torch.no_grad():
            logits = sampler.model(torch.tensor([[5, 9, 11, *ids]])).logits[0, 2:-1]
        kept = logits.topk(5).indices.sort().values
        assert torch.equal(response.support.offsets, torch.arange(len(ids) + 1) * 5)
        assert torch.equal(response.support.ids.view(-1, 5), kept.int())


def test_greedy_completion_of_a_baseline_keeps_no_ids(tmp_path):
    """At a temperature of 0 no filter applies, and the loss does not use it."""
    made = trainer(tmp_path, top_k=4, truncated_support=True, advantage_estimator="remax", max_steps=1)
    sampled, generate = [], made.rollout.generate
    made.rollout.generate = lambda prompts, sampling: sampled.append(sampling) or generate(prompts, sampling)
    made.collect()
    assert [(sampling.temperature, sampling.keeps_support) for sampling in sampled] == [(1.0, True), (0.0, False)]


def test_microbatch_moves_its_support():
    microbatch = packing.empty_microbatch(0, False)
    microbatch.support = Support.of([torch.tensor([1, 2])])
    moved = microbatch.to(torch.device("meta")).support
    assert [tensor.device.type for tensor in moved] == ["meta", "meta"]


def test_divergence_from_a_teacher_is_refused():
    head = {"weight": torch.zeros(3, 2), "support": Support.of([torch.tensor([1])])}
    teaching = Teaching(hidden=torch.zeros(1, 2), head={"weight": torch.zeros(3, 2)}, beta=1.0)
    with pytest.raises(UserError, match="covers the whole vocabulary; distil without truncated_support"):
        distillation_loss(torch.zeros(1, 2), head, teaching, torch.ones(1))


def test_forced_tokens_keep_themselves():
    class Forcing:
        max_new_tokens, eos_token_ids, stops, keeps_support = 9, set(), None, True

    from grpo_fast.rollout.decode import Decoder, Sequence

    class Thinking:
        mask = (False,)

        def forced(self):
            return 7

        def add(self, tokens):
            pass

    sequence = Sequence(0, 0, [1], thinking=Thinking())
    Decoder.add(Forcing(), sequence, 3, -1.0, torch.tensor([3, 4], dtype=torch.int32))
    assert (sequence.tokens, sequence.logprobs, sequence.kept[0].tolist()) == ([7], [0.0], [7])


LONG = {
    "use_vllm": True, "top_p": 0.9, "max_completion_length": 100, "generation_kwargs": {"min_new_tokens": 100},
    "num_generations": 4, "generation_batch_size": 4, "max_steps": 1, "dataset_kwargs": {"length": 2, "test_size": 1},
    "model_init_kwargs": {"hidden_size": 32, "intermediate_size": 32, "initializer_range": 0.3,
                          "max_position_embeddings": 256},
    "reward_funcs": ["digits_included"],
}  # fmt: skip


def test_ratio_of_a_training_step_is_one_with_the_support_and_vanishes_without(tmp_path, monkeypatch):
    figures = {}
    for truncated in (True, False):
        folder = tmp_path / str(truncated)
        if not truncated:
            monkeypatch.setattr("grpo_fast.trainer.check_support", lambda config: None)
        made = trainer(folder, truncated_support=truncated, **LONG)
        made.train()
        (figures[truncated],) = read_metrics(folder / "metrics.jsonl")
    ratio = "sampling/importance_sampling_ratio"
    assert figures[True]["sampling/sampling_logp_difference/max"] < 1e-5
    for statistic in ("min", "mean", "max"):
        assert figures[True][f"{ratio}/{statistic}"] == pytest.approx(1, abs=1e-4)
    assert figures[True]["grad_norm"] > 1e-3
    assert figures[False][f"{ratio}/max"] < 1e-3
    assert figures[False]["grad_norm"] < 1e-3 * figures[True]["grad_norm"]


def learner_and_batch(**fields):
    config = GRPOConfig(
        "x", dataset_name="x", reward_funcs=["x"], use_cpu=True, max_completion_length=9, max_grad_norm=0.0,
        num_generations=3, generation_batch_size=6, **fields,
    )  # fmt: skip
    learner = Learner(tiny_model(), config, Accelerator(cpu=True), [2, 3], 0)
    batch = build_step_batch(SAMPLES, torch.ones(6, dtype=torch.bool), learner.objective, config)
    targets = torch.tensor([token for sample in SAMPLES for token in sample.completion_ids])
    batch.support = random_support(targets, VOCAB, 9)
    advantages = torch.randn(6, generator=torch.Generator().manual_seed(1)).repeat_interleave(batch.offsets.diff())
    batch.set_advantages(advantages, learner.objective)
    return learner, batch


def truncated_logprobs(model, support):
    """From the model's own logits, one sequence at a time."""
    kept, found, at = mask_of(support, VOCAB), [], 0
    for prompt, completion, _ in SAMPLES:
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
        rows = slice(at, at := at + len(completion))
        logp = logits.masked_fill(~kept[rows], float("-inf")).log_softmax(-1)
        found.append(logp.gather(1, torch.tensor(completion)[:, None]).squeeze(1))
    return torch.cat(found)


@pytest.mark.parametrize("fields", [{}, {"padding_free": "never"}, {"max_tokens_per_microbatch": 12}], ids=str)
def test_step_gradient_is_that_of_the_truncated_policy(fields):
    learner, batch = learner_and_batch(**fields)
    # A group whose advantages are 0 is not computed.
    batch.set_advantages(batch.advantages * torch.tensor([1.0, 1, 1, 0, 1, 1]).repeat_interleave(batch.offsets.diff()),
                         learner.objective)  # fmt: skip
    assert len(batch.active) == 5
    learner.accumulate_gradients(batch)
    model = tiny_model()
    loss = -(batch.advantages * batch.weights * truncated_logprobs(model, batch.support)).sum()
    loss.backward()
    found, expected = (torch.cat([p.grad.flatten() for p in one.parameters()]) for one in (learner.policy, model))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_parts_of_a_batch_take_their_support_along():
    learner, batch = learner_and_batch(per_device_train_batch_size=3, steps_per_generation=2)
    with torch.no_grad():
        expected = truncated_logprobs(tiny_model(), batch.support)
    torch.manual_seed(3)
    parts = learner.parts(batch)
    assert len(parts) == 2
    torch.testing.assert_close(batch.old_logprobs, expected.float(), rtol=0, atol=1e-5)
    for part in parts:
        scores = learner.score(learner.policy, part)
        chosen = part.active
        assert len(chosen) == 3
        torch.testing.assert_close(scores, part.old_logprobs, rtol=0, atol=1e-6)


def test_fused_policy_takes_a_support():
    policy = FusedPolicy(tiny_model())
    ids = torch.randint(2, VOCAB, (2, 6))
    mask = torch.ones(2, 4)
    mask[1, 3] = 0
    support = random_support(ids[:, 2:].masked_fill(mask == 0, -100), VOCAB, 9)
    logprobs = policy(ids, completion_mask=mask, support=support)
    logits = policy.model(ids).logits[:, 1:-1].flatten(0, 1).masked_fill(~mask_of(support, VOCAB), float("-inf"))
    expected = logits.log_softmax(-1).gather(1, ids[:, 2:].reshape(-1, 1)).view(2, 4)
    torch.testing.assert_close(logprobs, torch.where(mask == 0, 0.0, expected), rtol=0, atol=1e-6)
    given = {"completion_mask": mask, "advantages": torch.ones(2), "support": support}
    loss = policy(ids, objective=PolicyObjective(), **given).loss
    assert loss.isfinite()


def test_responses_with_a_support_can_be_sent_to_other_processes():
    response = Response([3, 4], "stop", [-0.1, -0.2], support=Support.of([torch.tensor([3, 5]), torch.tensor([4])]))
    again = pickle.loads(pickle.dumps(response))
    assert again.support.ids.tolist() == [3, 5, 4]
    assert again.support.offsets.tolist() == [0, 2, 3]


def test_probe_samples_with_the_filters_of_the_run(tmp_path):
    """And still notices stale weights."""
    made = trainer(tmp_path, use_vllm=True, top_p=0.9, truncated_support=True, learning_rate=1e-2)
    assert made.rollout.probe.sampling.top_p == 0.9
    assert made.rollout.probe.check(made.rollout.engine, made.learner.score_completion) < 1e-5
    made.rollout.engine.model = copy.deepcopy(made.model)
    torch.nn.init.normal_(made.rollout.engine.model.get_output_embeddings().weight)
    with pytest.raises(UserError, match="does not have the trainer's weights"):
        made.rollout.probe.check(made.rollout.engine, made.learner.score_completion)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "truncated_support=true needs top_p, top_k or min_p"),
        ({"top_k": 3, "generation_kwargs": {"repetition_penalty": 1.2}}, "repetition_penalty is not possible with"),
    ],
)
def test_check_support_refuses_what_cannot_be_recorded(fields, message):
    config = GRPOConfig("x", dataset_name="x", reward_funcs=["x"], truncated_support=True, **fields)
    with pytest.raises(UserError, match=message):
        check_support(config)
    check_support(dataclasses.replace(config, top_k=3, generation_kwargs={"min_new_tokens": 2}))


def test_the_ratio_over_the_whole_vocabulary_is_the_kept_mass():
    learner, batch = learner_and_batch()
    truncated = learner.score(learner.policy, batch)
    whole = learner.score(learner.policy, dataclasses.replace(batch, support=None))
    model, mass = tiny_model(), []
    with torch.no_grad():
        for prompt, completion, _ in SAMPLES:
            mass.append(model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].softmax(-1))
    mass = (torch.cat(mass) * mask_of(batch.support, VOCAB)).sum(1)
    ratio = sampling_ratio(whole, truncated, "token_truncate", clip_max=None)
    torch.testing.assert_close(ratio, mass.float(), rtol=1e-4, atol=1e-6)
