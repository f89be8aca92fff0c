"""On-policy distillation: its loss is the divergence of full logits, and a teacher of another vocabulary is refused."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from grpo_fast.arguments import parse_config
from grpo_fast.cli import main
from grpo_fast.config import DistillConfig, GRPOConfig
from grpo_fast.distillation import DistillationTrainer
from grpo_fast.errors import UserError
from grpo_fast.model.loading import load_model
from grpo_fast.recipes import OWN_RECIPES
from support.killed import killed_at, seed_generators
from support.runs import assert_same_run, figures
from support.small import SMALL

STUDENT = {name: value for name, value in SMALL.items() if name != "reward_funcs"}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A teacher of another hidden size, far from uniform."""
    kwargs = {"hidden_size": 48, "intermediate_size": 40, "initializer_range": 0.3}
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(5)
    for part in load_model(GRPOConfig(model_name_or_path="random-llama", model_init_kwargs=kwargs, seed=5)):
        part.save_pretrained(folder)
    return folder


def trainer(folder, teacher, resume=False, **fields) -> DistillationTrainer:
    return DistillationTrainer(
        DistillConfig(
            **{**STUDENT, "output_dir": str(folder), "resume_from_checkpoint": resume, **fields},
            teacher_model_name_or_path=str(teacher),
        )
    )


def log_probs(model, samples, temperature=1.0):
    """Full log-probabilities ``[N, V]`` at the samples' completions."""
    rows = [torch.tensor(one.prompt_ids + one.completion_ids) for one in samples]
    # Padding on the right does not reach what is before it.
    logits = model(input_ids=torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)).logits
    scored = [
        row[len(one.prompt_ids) - 1 : len(one.prompt_ids + one.completion_ids) - 1]
        for row, one in zip(logits, samples, strict=True)
    ]
    return (torch.cat(scored).float() / temperature).log_softmax(-1)


def copy_of(model):
    made = AutoModelForCausalLM.from_config(model.config)
    made.load_state_dict(model.state_dict())
    return made


@pytest.mark.parametrize("beta", [1.0, 0.0])
@pytest.mark.parametrize("fields", [{}, {"padding_free": "never", "temperature": 0.7}], ids=["packed", "padded"])
def test_exact_distillation_is_the_divergence_of_full_logits(tmp_path, teacher, fields, beta):
    made = trainer(tmp_path, teacher, distillation_beta=beta, max_grad_norm=0.0, **fields)
    plain, theirs = copy_of(made.model), AutoModelForCausalLM.from_pretrained(teacher)
    batch, _ = made.collect()
    log_p = log_probs(plain, batch.samples, made.config.temperature)
    log_q = log_probs(theirs, batch.samples, made.config.temperature).detach()
    first, second = (log_p, log_q) if beta else (log_q, log_p)
    expected = (first.exp() * (first - second)).sum(-1).mean()
    expected.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in plain.parameters()])
    metrics = made.update(batch)
    assert metrics["loss"] == pytest.approx(expected.item(), rel=1e-4)
    assert metrics["reverse_kl" if beta else "divergence"] == pytest.approx(expected.item(), rel=1e-4)
    assert metrics["grad_norm"] == pytest.approx(norm.item(), rel=1e-3)


def test_sampled_distillation_estimates_the_exact_gradient(tmp_path, teacher):
    """Its advantages are differences of log-probabilities; its mean gradient over many samples is the exact one's."""
    made = trainer(tmp_path, teacher, distillation_loss="sampled", num_generations=128, generation_batch_size=1024)
    plain, theirs = copy_of(made.model), AutoModelForCausalLM.from_pretrained(teacher)
    batch, metrics = made.collect()
    log_p, log_q = log_probs(plain, batch.samples), log_probs(theirs, batch.samples).detach()
    tokens = torch.tensor([token for one in batch.samples for token in one.completion_ids])
    gap = (log_q - log_p.detach()).gather(1, tokens[:, None]).squeeze(1)
    torch.testing.assert_close(batch.advantages, gap, rtol=1e-3, atol=1e-4)
    assert metrics["reverse_kl"] == pytest.approx(-gap.mean().item(), rel=1e-3)
    made.learner.accumulate_gradients(batch)
    (log_p.exp() * (log_p - log_q)).sum(-1).mean().backward()
    ours, exact = (
        torch.cat([p.grad.flatten() for p in model.parameters()]) for model in (made.model, plain)
    )  # fmt: skip
    assert torch.cosine_similarity(ours, exact, dim=0) > 0.8


def test_distillation_learns_the_teacher_and_measures_rewards(tmp_path, teacher):
    fields = {"max_steps": 12, "eval_steps": 6, "keep_best": True, "learning_rate": 2e-2}
    summary = trainer(tmp_path / "with", teacher, reward_funcs=["exact_answer"], **fields).train()
    assert (summary.metric, summary.steps) == ("reverse_kl", 12)
    assert summary.best_score < 0.8 * summary.before
    last = figures(tmp_path / "with")[-1]
    assert {"reverse_kl", "rewards/exact_answer/mean", "eval/reverse_kl", "eval/rewards/exact_answer/mean"} <= set(last)
    assert "reverse_kl on held-out prompts" in (tmp_path / "with" / "report.html").read_text()


@pytest.mark.parametrize("form", ["exact", pytest.param("sampled", marks=pytest.mark.long)])
def test_resumed_distillation_is_bit_identical(tmp_path, teacher, form):
    fields = {"distillation_loss": form, "save_steps": 1, "max_steps": 3}
    seed_generators(0)
    trainer(tmp_path / "whole", teacher, **fields).train()
    seed_generators(0)
    killed_at(1, trainer(tmp_path / "run", teacher, **fields))
    seed_generators(1)
    trainer(tmp_path / "run", teacher, resume=True, **fields).train()
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    # Without reward functions, none are reported.
    assert not [name for name in figures(tmp_path / "run")[-1] if "reward" in name]


def test_distillation_keeps_layers_of_the_student_alone_on_the_host(tmp_path, teacher, monkeypatch):
    monkeypatch.setattr("grpo_fast.model.host_layers.MIN_BYTES", 1024)
    fields = {"use_peft": True, "gradient_checkpointing": True, "layers_on_host": 1}
    made = trainer(tmp_path, teacher, **fields)
    assert made.learner.host_layers.bytes_on_host
    assert made.update(made.collect()[0])["reverse_kl"] > 0


def test_exact_distillation_reports_nothing_of_a_policy_loss(tmp_path, teacher):
    made = trainer(tmp_path, teacher)
    found = made.update(made.collect()[0])
    assert not [name for name in found if name.startswith(("objective/", "position/", "clip_ratio/"))]


def test_distillation_refuses_another_vocabulary(tmp_path, teacher):
    (tmp_path / "other").mkdir()
    model = AutoModelForCausalLM.from_pretrained(teacher)
    model.resize_token_embeddings(model.config.vocab_size + 8, mean_resizing=False)
    model.save_pretrained(tmp_path / "other")
    for path in teacher.glob("*token*"):
        (tmp_path / "other" / path.name).write_bytes(path.read_bytes())
    with pytest.raises(UserError, match=r"has a vocabulary of \d+ tokens, the student \d+: .* the student's family"):
        trainer(tmp_path / "run", tmp_path / "other")
    with pytest.raises(UserError, match=r"teacher_model_name_or_path='.*nowhere': "):
        trainer(tmp_path / "run", tmp_path / "nowhere")
    (tmp_path / "swapped").mkdir()
    for path in teacher.iterdir():
        (tmp_path / "swapped" / path.name).write_bytes(path.read_bytes())
    file = tmp_path / "swapped" / "tokenizer.json"
    content = json.loads(file.read_text())
    words = content["model"]["vocab"]
    one, other = list(words)[3:5]
    words[one], words[other] = words[other], words[one]
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match="have different tokenizers"):
        trainer(tmp_path / "run", tmp_path / "swapped")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"teacher_model_name_or_path": ""}, "teacher_model_name_or_path is missing"),
        ({"distillation_beta": 2.0}, "distillation_beta=2.0 is not allowed: it must be from 0"),
        ({"distillation_beta": 0.5, "distillation_loss": "sampled"}, "so it requires distillation_beta=1"),
        ({"distillation_loss": "all"}, "distillation_loss='all' is not allowed: it must be one of exact, sampled"),
        ({"beta": 0.1}, "beta=0.1 has no effect in distillation; leave it out"),
        ({"epsilon": 0.1}, "epsilon=0.1 has no effect in distillation_loss='exact'"),
        ({"kl_clip": 1.0}, "kl_clip=1.0 has no effect in distillation; leave it out"),
        ({"length_penalty": 0.1}, "length_penalty=0.1 has no effect in distillation; leave it out"),
        ({"use_adaptive_entropy": True}, "use_adaptive_entropy=True has no effect in distillation_loss='exact'"),
        ({"use_vllm": True, "rollout_rs": "token_k1"}, "rollout_rs='token_k1' has no effect in distillation_loss='ex"),
        ({"use_vllm": True, "off_policy_mask_threshold": 1.0}, "off_policy_mask_threshold=1.0 has no effect in distil"),
        ({"loss_type": "clip_cov", "covariance_ratio": 0.1}, "covariance_ratio=0.1 has no effect in distillation_loss"),
        ({"loss_type": "vespo", "vespo_k_pos": 1.0}, "vespo_k_pos=1.0 has no effect in distillation_loss='exact'"),
        ({"num_iterations": 2}, "takes one step for each generation batch, not 2"),
    ],
)
def test_distill_config_refuses_what_has_no_effect(fields, message):
    with pytest.raises(UserError, match=message):
        DistillConfig(**{**STUDENT, "teacher_model_name_or_path": "t", **fields})


@pytest.mark.parametrize("name", OWN_RECIPES["distill"])
def test_distill_recipes_are_valid(name, capsys):
    config = parse_config([name], kind=DistillConfig)
    assert config.run_name == name
    assert main(["distill", name, "--max_length=3"]) == 2
    assert "unknown option --max_length" in capsys.readouterr().err


def test_distill_refuses_a_teachers_code_from_a_foreign_run_folder(tmp_path, capsys):
    """A configuration inside a run's folder may have come from anywhere."""
    (tmp_path / "metrics.jsonl").touch()
    path = tmp_path / "config.yaml"
    kwargs = {"trust_remote_code": True}
    path.write_text(json.dumps({**STUDENT, "teacher_model_name_or_path": "t", "teacher_model_init_kwargs": kwargs}))
    assert main(["distill", str(path)]) == 2
    said = capsys.readouterr().err
    assert "lies in a run's folder that was not written here by you" in said
    assert "--teacher_model_init_kwargs" in said
