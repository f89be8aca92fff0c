"""Sampling ahead within a bound of staleness: the queue, the thread that samples from it, and whole runs."""

import itertools
import threading

import pytest
import torch
from accelerate.state import AcceleratorState

from grpo_fast.data import prompt_order
from grpo_fast.errors import UserError
from grpo_fast.files import read_metrics
from grpo_fast.rollout import Response, Sampling, asynchronous
from grpo_fast.rollout.asynchronous import AsyncRollout, part_lengths
from grpo_fast.rollout.queue import GroupQueue
from grpo_fast.rollout.stops import stop_texts
from grpo_fast.train.checkpoint import checkpoints
from grpo_fast.trainer import GRPOTrainer
from support import text_models
from support.separate import SeparateEngine, use_separate_engine
from support.small import trainer, weights

FIELDS = {
    "use_vllm": True, "vllm_mode": "server", "learning_rate": 1e-2, "max_steps": 5, "generation_batch_size": 8,
    "dataset_kwargs": {"length": 2, "test_size": 3},
}  # fmt: skip


def queue(max_staleness=1, per_step=2, batches=10, num_generations=2):
    return GroupQueue(((row, [row]) for row in itertools.count()), num_generations, max_staleness, per_step, batches)


def finish(groups):
    for answer in groups.open():
        answer.add(Response([7], "length", [-1.0]), groups.version)
        answer.end("length")


@pytest.mark.parametrize("max_staleness", [0, 1, 3])
@pytest.mark.parametrize("extra", [0, 1, 5])
def test_queue_bounds_the_age_of_every_token(max_staleness, extra):
    """Also where a batch takes further groups, as dynamic sampling does; prompts come in order, each once."""
    groups, rows, oldest = queue(max_staleness), [], 0
    for step in range(10):
        assert groups.version == step
        finish(groups)
        taken = groups.take(2)
        if extra:
            groups.wanted(extra)
            finish(groups)
            taken += groups.take(extra)
        rows += [group.row for group in taken]
        ages = [groups.version - v for group in taken for answer in group.answers for v in answer.response.versions]
        oldest = max(oldest, *ages)
        groups.synced()
    assert rows == list(range(10 * (2 + extra)))
    assert oldest <= max_staleness
    assert oldest == max_staleness or extra > 0
    assert groups.open() == []


def test_queue_begins_no_group_beyond_the_run():
    groups = queue(max_staleness=3, batches=2)
    assert len(groups.open()) == 2 * 2 * 2
    finish(groups)
    groups.take(2)
    groups.synced()
    assert groups.open() == []
    assert len(groups.take(2)) == 2
    assert groups.begun == 4


def test_queue_waits_for_the_slowest_answer_of_a_batch():
    groups = queue()
    answers = groups.open()
    for answer in answers[1:]:
        answer.end("length")
    assert groups.take(2) is None
    assert groups.open() == answers[:1]
    answers[0].end("length")
    assert [group.row for group in groups.take(2)] == [0, 1]


@pytest.mark.parametrize("longest", [1, 255, 256, 257, 1000, 4096])
def test_part_lengths_add_up(longest):
    part, last = part_lengths(longest)
    count = -(-longest // 256)
    assert (count - 1) * part + last == longest
    assert 0 < last <= part <= 256
    assert part - last < count


def test_async_rollout_continues_answers_with_new_weights(monkeypatch):
    """Each token has the version and the log-probability of the weights that drew it."""
    monkeypatch.setattr(asynchronous, "PART_TOKENS", 3)
    sampler = text_models.rollout()
    model = sampler.model
    engine = SeparateEngine(model, sampler.tokenizer)
    engine.eos_token_ids = set()
    engine.sync(model)
    prompts = itertools.cycle([(0, [5, 9, 11]), (1, [7])])
    groups = GroupQueue(prompts, 2, 1, 2, 10)
    stream = AsyncRollout(engine, groups, Sampling(2, 8, temperature=0.7), None, engine.eos_token_ids, 0)
    assert stream.sample_part()
    assert [len(answer.tokens) for answer in groups.open()] == [3] * 8
    assert groups.take(2) is None
    torch.manual_seed(1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    stream.hold()
    engine.sync(model)
    stream.synced()
    stream.release()
    while not all(group.finished for group in groups.groups):
        stream.sample_part()
    contexts = engine.contexts[1]
    assert contexts[0][:3] == [5, 9, 11]
    assert len(contexts[0]) == 6
    for group in stream.take(2):
        for answer in group.answers:
            tokens, reason, logprobs, *_, versions = answer.response
            assert reason == "length"
            assert versions == [0] * 3 + [1] * 5
            for place, (token, logprob, version) in enumerate(zip(tokens, logprobs, versions, strict=True)):
                ids = torch.tensor([answer.prompt + tokens[:place]])
                with torch.no_grad():
                    scores = engine.weights[version](input_ids=ids).logits[0, -1] / 0.7
                assert logprob == pytest.approx(scores.log_softmax(-1)[token].item(), abs=1e-5)


def test_async_rollout_joins_the_supports_of_the_parts(monkeypatch):
    """Each part keeps its tokens' own ids; those behind a stop text are cut off with their tokens."""
    monkeypatch.setattr(asynchronous, "PART_TOKENS", 3)
    sampler = text_models.rollout()

    class Engine(SeparateEngine):
        def generate(self, prompt_ids, sampling):
            return sampler.generate(prompt_ids, sampling)

    groups = GroupQueue(itertools.cycle([(0, [5, 9, 11]), (1, [7])]), 2, 1, 2, 10)
    sampling = Sampling(2, 8, temperature=0.7, top_k=5, keeps_support=True)
    sampler.eos_token_ids = set()
    stream = AsyncRollout(Engine(sampler.model, sampler.tokenizer), groups, sampling, None, set(), 0)
    while not all(group.finished for group in groups.groups) or not groups.groups:
        stream.sample_part()
    for group in stream.take(2):
        for answer in group.answers:
            tokens, support = answer.response.token_ids, answer.response.support
            with torch.no_grad():
                logits = sampler.model(torch.tensor([answer.prompt + tokens])).logits[0, len(answer.prompt) - 1 : -1]
            kept = logits.topk(5).indices.sort().values
            assert torch.equal(support.offsets, torch.arange(9) * 5)
            assert torch.equal(support.ids.view(8, 5), kept.int())
            answer.end("stop", 0, 4)
            assert torch.equal(answer.response.support.ids.view(4, 5), kept[:4].int())


class Scripted(SeparateEngine):
    """Says the tokens of a script, whatever the weights are."""

    script = ()

    def complete(self, ids, sampling, generator):
        said = ids[1:]
        tokens = self.script[len(said) : len(said) + sampling.max_completion_length]
        return Response(tokens, "length", [-1.0] * len(tokens))


def test_async_rollout_finds_a_stop_text_across_parts(monkeypatch):
    """The tokens after it, which the engine sampled because it saw no stop text, are left out."""
    monkeypatch.setattr(asynchronous, "PART_TOKENS", 2)
    sampler = text_models.rollout()
    names = [sampler.tokenizer.decode([token]) for token in range(2, 41)]
    pieces = ["a", "</", "answer", ">", "a", "a"]
    monkeypatch.setattr(Scripted, "script", [2 + names.index(piece) for piece in pieces])
    engine = Scripted(sampler.model, sampler.tokenizer)
    sampling = Sampling(1, 6, generation_kwargs={"stop": ["</answer>"]})
    groups = GroupQueue(itertools.repeat((0, [7])), 1, 0, 1, 1)
    stops = stop_texts(sampler.tokenizer, sampling)
    stream = AsyncRollout(engine, groups, sampling, stops, engine.eos_token_ids, 0).start()
    ((answer,),) = [group.answers for group in stream.take(1)]
    stream.close()
    assert answer.response == Response(Scripted.script[:4], "stop", [-1.0] * 4, 0, versions=[0] * 4)


def test_async_rollout_raises_the_error_of_its_thread():
    class Dying(SeparateEngine):
        def generate(self, prompt_ids, sampling):
            raise UserError("the server no longer answers")

    sampler = text_models.rollout()
    stream = AsyncRollout(Dying(sampler.model, sampler.tokenizer), queue(), Sampling(2, 4), None, (), 0).start()
    for call in (lambda: stream.take(1), stream.hold):
        with pytest.raises(UserError, match="the server no longer answers"):
            call()


@pytest.fixture
def separate(monkeypatch):
    use_separate_engine(monkeypatch.setattr)
    # Plots and pages take longer than these runs.
    monkeypatch.setattr(GRPOTrainer, "write_end", lambda *arguments: None)


def collected(made):
    """What each step of the run was trained on."""
    seen, sample = [], made.sample

    def kept(count):
        seen.append(sample(count))
        return seen[-1]

    made.sample = kept
    return seen


@pytest.mark.parametrize("max_staleness", [1, 2])
def test_run_with_max_staleness(tmp_path, separate, monkeypatch, max_staleness):
    """Prompts come in order, no token is too old, and the correction sees the policy that drew each token."""
    monkeypatch.setattr(asynchronous, "PART_TOKENS", 1)
    made = trainer(tmp_path, max_staleness=max_staleness, **FIELDS)
    seen, engine = collected(made), made.rollout.engine
    made.train()
    drawn = list(itertools.islice(prompt_order(len(made.train_rows), True, made.config.seed), 5 * 2))
    assert [row for groups in seen for row in groups.rows] == [made.train_rows[index] for index in drawn]
    for step, groups in enumerate(seen):
        for prompt, response in zip([p for p in groups.prompts for _ in range(4)], groups.responses, strict=True):
            assert all(0 <= step - version <= max_staleness for version in response.versions)
            for place, version in enumerate(response.versions):
                ids = torch.tensor([prompt + response.token_ids[:place]])
                with torch.no_grad():
                    scores = engine.weights[version](input_ids=ids).logits[0, -1].log_softmax(-1)
                assert response.logprobs[place] == pytest.approx(scores[response.token_ids[place]].item(), abs=1e-4)
    metrics = read_metrics(tmp_path / "metrics.jsonl")
    assert metrics[0]["sampling/staleness/max"] == 0
    assert all(0 <= entry["sampling/staleness/mean"] <= entry["sampling/staleness/max"] for entry in metrics)
    assert all(entry["sampling/staleness/max"] <= max_staleness for entry in metrics)


def test_run_with_max_staleness_0_is_the_run_without_it(tmp_path, separate):
    """Bit for bit, and without a queue."""
    ends = []
    for name, fields in (("plain", {}), ("zero", {"max_staleness": 0})):
        AcceleratorState._reset_state(reset_partial_state=True)
        made = trainer(tmp_path / name, **{**FIELDS, "max_steps": 2}, **fields)
        made.train()
        assert made.rollout.stream is None
        ends.append((weights(made.model), [entry["loss"] for entry in read_metrics(tmp_path / name / "metrics.jsonl")]))
    assert torch.equal(ends[0][0], ends[1][0])
    assert ends[0][1] == ends[1][1]


def test_run_with_max_staleness_resumed_draws_each_prompt_once(tmp_path, separate):
    """What was sampled ahead and not trained on is sampled again, also where batches take further groups."""
    fields = {**FIELDS, "max_staleness": 2, "dynamic_sampling": True, "eval_steps": 2}
    rows = []
    for resume, max_steps in enumerate((2, 5)):
        AcceleratorState._reset_state(reset_partial_state=True)
        made = trainer(tmp_path, **{**fields, "max_steps": max_steps, "resume_from_checkpoint": bool(resume)})
        seen = collected(made)
        made.train()
        rows += [row for groups in seen for row in groups.rows]
        assert made.state.num_prompts == len(rows)
    drawn = itertools.islice(prompt_order(len(made.train_rows), True, made.config.seed), len(rows))
    assert rows == [made.train_rows[index] for index in drawn]
    assert len(rows) > 5 * 2


def test_run_with_max_staleness_whose_engine_fails_keeps_a_checkpoint(tmp_path, separate, monkeypatch):
    made = trainer(tmp_path, max_staleness=1, **FIELDS)
    engine, generate = made.rollout.engine, SeparateEngine.generate

    def dying(prompts, sampling):
        if len(engine.weights) >= 3 and threading.current_thread() is not threading.main_thread():
            raise UserError("the server no longer answers")
        return generate(engine, prompts, sampling)

    engine.generate = dying
    with pytest.raises(UserError, match="the server no longer answers"):
        made.train()
    (last,) = checkpoints(tmp_path)
    assert int(last.name.removeprefix("checkpoint-")) >= 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_staleness": 1}, "max_staleness requires use_vllm, vllm_mode='server'"),
        ({"max_staleness": -1}, "max_staleness=-1 is not allowed"),
        ({"max_staleness": 1, "sample_ahead": True, **FIELDS}, "max_staleness replaces sample_ahead"),
        (
            {"max_staleness": 1, "generation_kwargs": {"min_new_tokens": 2}, **FIELDS},
            "max_staleness is not possible with generation_kwargs: min_new_tokens",
        ),
    ],
)
def test_config_refuses_max_staleness(tmp_path, fields, message):
    with pytest.raises(UserError, match=message):
        trainer(tmp_path, **fields)
