"""FusedGRPOTrainer compared with TRL's trainer: same data and seed, step by step."""

import copy
import os
import socket

import peft
import pytest
import torch

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
pytest.importorskip("trl", minversion="1.16")
import trl
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3MoeConfig,
    TrainerCallback,
)

from benchmarks import plots, trl_subclass
from benchmarks.harness.measure import Run, read_csv
from grpo_fast.data.tasks import sort_digits
from grpo_fast.errors import UserError
from grpo_fast.integrations import trl as integration
from grpo_fast.integrations.trl import FusedGRPOTrainer
from grpo_fast.model.loading import digit_tokenizer
from grpo_fast.rewards import digits_included, digits_ordered

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
STEPS = int(os.environ.get("TRL_STEPS", "20"))
# Seconds, and what depends on them, differ between runs.
UNCOMPARED = ("step_time", "runtime", "per_second", "flos", "total_")


@pytest.fixture(autouse=True)
def _no_poison(poisoned_memory):
    """TRL's and transformers' own code reads memory that it has not written."""
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small Llama on disk, where TRL looks for its reference policy."""
    torch.manual_seed(0)
    tokenizer = digit_tokenizer()
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=48, intermediate_size=96, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.15,
            pad_token_id=tokenizer.pad_token_id, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip
    path = tmp_path_factory.mktemp("llama")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def rewards():
    """As TRL's reward functions, by TRL's own signature."""
    return [digits_included, digits_ordered]


def build(kind, folder, out, peft=None, model=None, **fields):
    # With Adam's default epsilon of 1e-8, a gradient of mere rounding would move its weight by a whole step.
    args = trl.GRPOConfig(
        **{
            "output_dir": str(out), "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2,
            "num_generations": 4, "max_completion_length": 5, "learning_rate": 3e-3, "max_steps": 3,
            "logging_steps": 1, "lr_scheduler_type": "constant", "adam_epsilon": 1e-5, "save_strategy": "no",
            "report_to": "none", "disable_tqdm": True, "use_cpu": True, "seed": 1, "bf16": False,
            "gradient_checkpointing": False, **fields,
        }
    )  # fmt: skip
    rows, _ = sort_digits(length=3)
    rows = [{"prompt": row["prompt"]} for row in rows[:200]]
    return kind(
        model=model or AutoModelForCausalLM.from_pretrained(folder), reward_funcs=rewards(), args=args,
        train_dataset=Dataset.from_list(rows), processing_class=digit_tokenizer(), peft_config=peft,
    )  # fmt: skip


def trajectory(trainer):
    """The weights after every step, and the metrics logged by then."""
    weights = []

    class Keep(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            weights.append(torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad]))

    trainer.add_callback(Keep())
    trainer.train()
    logs = [
        {k: v for k, v in e.items() if not any(part in k for part in UNCOMPARED)} for e in trainer.state.log_history
    ]
    return weights, [entry for entry in logs if "loss" in entry]


def compare(folder, tmp_path, peft=None, one_pass=True, tolerance=1e-4, **fields):
    """Losses, metrics and weights of both trainers agree at every step; returns ours."""
    # Each sets the seed when it is built, so both draw the same random numbers.
    theirs, their_logs = trajectory(build(trl.GRPOTrainer, folder, tmp_path / "trl", copy.deepcopy(peft), **fields))
    trainer = build(FusedGRPOTrainer, folder, tmp_path / "fused", copy.deepcopy(peft), **fields)
    assert (trainer._objective is not None) == one_pass
    ours, our_logs = trajectory(trainer)
    steps = fields.get("max_steps", 3)
    assert len(ours) == len(theirs) == len(our_logs) == len(their_logs) == steps
    assert sum(entry["grad_norm"] > 0 for entry in their_logs) > steps / 2
    for step in range(steps):
        assert our_logs[step].keys() == their_logs[step].keys()
        for name, value in their_logs[step].items():
            assert our_logs[step][name] == pytest.approx(value, rel=20 * tolerance, abs=tolerance), (step, name)
        moved = (theirs[step] - theirs[0]).norm() if step else theirs[0].norm()
        difference = (ours[step] - theirs[step]).norm()
        assert difference <= tolerance * moved, (step, difference, moved)
    return our_logs


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_trainer_trajectories_equal_trl(loss_type, folder, tmp_path):
    """Steps of the sorting task: two microbatches, two updates a generation, and for half of the types a KL term."""
    beta = 0.05 if LOSS_TYPES.index(loss_type) % 2 else 0.0
    fields = {"epsilon": 0.05, "epsilon_high": 1.05} if loss_type == "cispo" else {"epsilon": 0.05}
    logs = compare(
        folder, tmp_path, one_pass=loss_type != "vespo", loss_type=loss_type, beta=beta, max_steps=STEPS,
        num_iterations=2, **fields,
    )  # fmt: skip
    # The second update on a generation is off-policy, so that clipping matters.
    name = {"cispo": "cispo_clip_ratio", "sapo": "entropy", "vespo": "vespo/phi_seq_mean"}.get(
        loss_type, "clip_ratio/region_mean"
    )
    assert logs[1][name] > 0


OPTIONS = {
    "sequence": {"importance_sampling_level": "sequence", "loss_type": "grpo", "epsilon": 0.01, "beta": 0.1},
    "sequence, luspo": {"importance_sampling_level": "sequence", "loss_type": "luspo", "epsilon": 0.01},
    "corrected kl": {"use_bias_correction_kl": True, "beta": 0.1, "epsilon": 0.05},
    "delta": {"delta": 1.3},
    "narrow delta": {"delta": 1.05, "one_pass": False},
    "off-policy mask": {"off_policy_mask_threshold": 0.01, "one_pass": False},
    "high entropy": {"top_entropy_quantile": 0.3, "beta": 0.1, "one_pass": False},
    "entropy bonus": {"entropy_coef": 0.05, "loss_type": "grpo", "one_pass": False},
    "adaptive entropy": {"use_adaptive_entropy": True, "entropy_target": 2.0, "one_pass": False},
    "truncated": {"mask_truncated_completions": True, "beta": 0.1},
    "two windows": {"steps_per_generation": 4},
    "one window": {"num_iterations": 1, "loss_type": "bnpo"},
    "float32 head": {"cast_lm_head_to_fp32": True},
    "checkpointing": {"gradient_checkpointing": True},
    "temperature": {"temperature": 0.7, "beta": 0.1},
    "synchronised reference": {"beta": 0.1, "sync_ref_model": True, "ref_model_sync_steps": 2},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_trainer_options_equal_trl(name, folder, tmp_path):
    compare(folder, tmp_path, **{"max_steps": 4, "num_iterations": 2, **OPTIONS[name]})


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_trainer_with_an_adapter_equals_trl(level, folder, tmp_path):
    """A frozen head, and the model without its adapter as the reference."""
    # An adapter's second matrix starts at 0, so that the steps are the whole of its weights.
    peft = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    compare(folder, tmp_path, peft, beta=0.1, importance_sampling_level=level, num_iterations=2, max_steps=4)


def batch(trainer, tools_are_far, rows=6, prompt=4, length=7):
    """One of TRL's microbatches with every field that a loss may read; ratios on both sides of every bound."""
    generator = torch.Generator().manual_seed(3)
    lengths = torch.tensor([7, 1, 5, 3, 6, 2])
    mask = (torch.arange(length) < lengths[:, None]).long()
    ids = torch.randint(2, 12, (rows, prompt + length), generator=generator)
    prompt_mask = torch.ones(rows, prompt, dtype=torch.long)
    prompt_mask[1, :2] = 0
    attention = torch.cat([prompt_mask, mask], 1)
    with torch.no_grad():
        logits = trainer.model(input_ids=ids, attention_mask=attention).logits[:, prompt - 1 : -1].log_softmax(-1)
    logprobs = logits.gather(2, ids[:, prompt:, None]).squeeze(2)
    noise = [torch.randn(rows, length, generator=generator) for _ in range(3)]
    tools = torch.ones(rows, length, dtype=torch.long)
    tools[0, 2:5] = tools[4, 3] = 0
    # A tool's answer may be improbable, also under the policy that sampled.
    far = torch.where(tools == 0, -120.0, 0.0) * tools_are_far
    return {
        "prompt_ids": ids[:, :prompt], "prompt_mask": prompt_mask, "completion_ids": ids[:, prompt:],
        "completion_mask": mask, "tool_mask": tools, "advantages": torch.tensor([0.7, -0.9, -1.3, 0.4, 0.0, -0.2]),
        "old_per_token_logps": logprobs + 0.2 * noise[0] + far, "ref_per_token_logps": logprobs + 0.5 * noise[1],
        "sampling_per_token_logps": logprobs + 0.3 * noise[2],
        "importance_sampling_ratio": torch.rand(rows, length, generator=generator) + 0.5,
        "num_items_in_batch": torch.tensor(91),
    }  # fmt: skip


def loss_of(kind, folder, tmp_path, use_vllm, per_sequence=False, far=False, training=True, **fields):
    """Loss, gradients and metrics of one microbatch."""
    trainer = build(kind, folder, tmp_path / kind.__name__, **fields)
    trainer.use_vllm = trainer.vllm_importance_sampling_correction = use_vllm
    trainer.current_gradient_accumulation_steps = 2
    trainer.model.train(training)
    inputs = batch(trainer, far)
    if per_sequence:
        inputs["importance_sampling_ratio"] = inputs["importance_sampling_ratio"][:, :1]
    with torch.set_grad_enabled(training):
        loss = trainer.compute_loss(trainer.model, inputs)
    grads = []
    if training:
        loss.backward()
        grads = [p.grad for p in trainer.model.parameters()]
    return loss.detach(), grads, {k: v[-1] for k, v in trainer._metrics["train" if training else "eval"].items()}


def compare_losses(folder, tmp_path, **fields):
    wanted, got = (loss_of(kind, folder, tmp_path, **fields) for kind in (trl.GRPOTrainer, FusedGRPOTrainer))
    assert relative_error(got[0], wanted[0]) < 1e-4
    assert len(got[1]) == len(wanted[1])
    for a, b in zip(got[1], wanted[1], strict=True):
        assert relative_error(a, b) < 1e-4
    assert got[2].keys() == wanted[2].keys()
    for name, value in wanted[2].items():
        assert got[2][name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    return got


def relative_error(value, expected):
    return ((value - expected).norm() / expected.norm().clamp(min=1e-12)).item()


@pytest.mark.parametrize("per_sequence", [False, True], ids=["tokens", "sequences"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_sampler_correction_and_tool_masks(loss_type, per_sequence, folder, tmp_path):
    bounds = {"epsilon_high": 1.1} if loss_type == "cispo" else {}
    fields = {"loss_type": loss_type, "beta": 0.1, "per_sequence": per_sequence, **bounds}
    corrected = compare_losses(folder, tmp_path, use_vllm=True, **fields)
    plain = compare_losses(folder, tmp_path, use_vllm=False, **fields)
    if loss_type != "vespo":
        assert relative_error(corrected[0], plain[0]) > 1e-3


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_improbable_tool_tokens_are_left_out(level, folder, tmp_path):
    """Tokens of tools are left out however improbable they are; TRL's own loss is NaN then."""
    fields = {"use_vllm": False, "importance_sampling_level": level}
    near, far = (loss_of(FusedGRPOTrainer, folder, tmp_path, far=far, **fields) for far in (False, True))
    assert torch.equal(near[0], far[0])
    assert all(torch.equal(a, b) for a, b in zip(near[1], far[1], strict=True))
    assert near[2] == far[2]


@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_evaluation_loss_equals_trl(loss_type, folder, tmp_path):
    compare_losses(folder, tmp_path, use_vllm=False, training=False, loss_type=loss_type)


MODELS = {
    "softcap": (Gemma2Config, {"final_logit_softcapping": 2.0, "head_dim": 12, "query_pre_attn_scalar": 12}),
    "scaled up": (CohereConfig, {"logit_scale": 1.7}),
    "scaled down": (GraniteConfig, {"logits_scaling": 1.7}),
    "experts": (
        Qwen3MoeConfig,
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "output_router_logits": True,
         "router_aux_loss_coef": 0.1},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_trainer_models_equal_trl(name, folder, tmp_path):
    """Models that transform their logits, and one with a loss that balances its experts."""
    torch.manual_seed(0)
    config, fields = MODELS[name]
    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    kept = (*kept, "num_key_value_heads", "initializer_range", "pad_token_id", "bos_token_id", "eos_token_id")
    small = LlamaConfig.from_pretrained(folder)
    model = AutoModelForCausalLM.from_config(config(**{key: getattr(small, key) for key in kept}, **fields))
    model.save_pretrained(tmp_path / "model")
    digit_tokenizer().save_pretrained(tmp_path / "model")
    one_pass = compare(tmp_path / "model", tmp_path, beta=0.1, num_iterations=2)
    assert ("aux_loss" in one_pass[0]) == (name == "experts")


def test_loss_computes_no_logits(folder, tmp_path, monkeypatch):
    """Sampling calls the head's forward; the loss and the scores never do, and the loss is one pass."""
    passes = []
    one_pass = integration.linear_policy_loss
    monkeypatch.setattr(integration, "linear_policy_loss", lambda *a, **k: passes.append(1) or one_pass(*a, **k))
    trainer = build(FusedGRPOTrainer, folder, tmp_path, beta=0.1)
    trainer.current_gradient_accumulation_steps = 1
    inputs = batch(trainer, 0)

    linear, head = torch.nn.functional.linear, trainer.model.lm_head.weight

    def refuse(hidden, weight, bias=None):
        assert weight is not head, "logits were made"
        return linear(hidden, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", refuse)
    trainer.compute_loss(trainer.model, inputs).backward()
    assert passes == [1]


def test_mixed_precision_is_as_exact_as_trl(folder, tmp_path):
    """Under autocast both round, but ours does not round the logits."""
    wanted, got = (loss_of(kind, folder, tmp_path, False, bf16=True) for kind in (trl.GRPOTrainer, FusedGRPOTrainer))
    exact = loss_of(trl.GRPOTrainer, folder, tmp_path, False)
    errors = [relative_error(flat(made[1]), flat(exact[1])) for made in (got, wanted)]
    assert 0 < errors[0] < 1.2 * errors[1] < 0.1


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors])


REFUSED = {
    "loss_type='ppo'": {"loss_type": "ppo"},
    "importance_sampling_level='turn'": {"importance_sampling_level": "turn"},
    "torch_compile=True; leave it out": {"torch_compile": True},
    "FSDP": {"fsdp": True},
}


@pytest.mark.parametrize("message", REFUSED)
def test_trainer_refuses_unsupported_arguments(message, folder, tmp_path):
    args = trl.GRPOConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False)
    for name, value in REFUSED[message].items():
        setattr(args, name, value)
    # The model does not exist, so the check must precede its loading.
    with pytest.raises(UserError, match=message) as caught:
        FusedGRPOTrainer(model=str(tmp_path / "none"), reward_funcs=rewards(), args=args)
    assert "\n" not in str(caught.value)


def test_trainer_refuses_fsdp_from_the_launcher(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    args = trl.GRPOConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False)
    with pytest.raises(UserError, match="does not support FSDP"):
        FusedGRPOTrainer(model=str(tmp_path / "none"), reward_funcs=rewards(), args=args)


def test_trainer_refuses_an_unknown_logit_transform(folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.config.logit_scale = 2.0
    with pytest.raises(UserError, match="transforms its logits in a way that is not supported"):
        build(FusedGRPOTrainer, folder, tmp_path, model=model)


def test_changed_heads_are_refused_or_followed(folder, tmp_path):
    """An adapter or a hook added after the trainer was built, and keywords that the model would ignore."""
    trainer = build(FusedGRPOTrainer, folder, tmp_path)
    model, ids = trainer.model, torch.randint(2, 12, (2, 7))
    call = {"input_ids": ids, "labels": ids, "fused_lm_head": True}
    model.lm_head.bias = torch.nn.Parameter(torch.randn(model.config.vocab_size))
    logits = model(input_ids=ids).logits[:, :-1] / trainer.temperature
    expected = logits.log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
    torch.testing.assert_close(model(**call).log_probs, expected, rtol=1e-4, atol=1e-4)
    for keyword in ("shift_labels", "num_items_in_batch", "cu_seq_lens_q"):
        with pytest.raises(UserError, match=f"{keyword} is no argument of this call"):
            model(**call, **{keyword: ids})
    hook = model.lm_head.register_forward_hook(lambda *_: None)
    with pytest.raises(UserError, match="has a forward hook"):
        model(**call)
    hook.remove()
    peft.get_peft_model(model, LoraConfig(r=2, target_modules=["lm_head"]))
    with pytest.raises(UserError, match="carries an adapter"):
        model(**call)


@pytest.mark.parametrize("temperature", [0.0, float("inf"), 1e-45])
def test_temperature_is_checked_before_the_model_is_loaded(tmp_path, temperature):
    args = trl.GRPOConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False, temperature=temperature)
    with pytest.raises(UserError, match="temperature must be a number from 1e-6 to 1e6"):
        FusedGRPOTrainer(model=str(tmp_path / "none"), reward_funcs=rewards(), args=args)


def two_processes(rank, port, folder, out):
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    torch.set_num_threads(1)
    fields = {"num_iterations": 2, "beta": 0.1, "ddp_backend": "gloo", "per_device_train_batch_size": 4}
    for loss_type in ("dapo", "grpo"):
        compare(folder, out / f"{loss_type}-{rank}", loss_type=loss_type, max_steps=4, **fields)
    assert torch.distributed.get_world_size() == 2


def test_trainer_on_two_processes_equals_trl(folder, tmp_path):
    """DDP: the normaliser of "dapo" spans the processes, and the gradients are reduced over them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(two_processes, args=(port, folder, tmp_path), nprocs=2)


def test_benchmark_of_the_trainer_runs(tmp_path):
    """The gate passes, and both trainers are timed."""
    run = Run(torch.device("cpu"), quick=True, repeats=1, output=tmp_path)
    trl_subclass.run_subclass(run, ["full"])
    rows = read_csv(run.folder / "trl_subclass.csv")
    assert [(row["trainer"], row["status"]) for row in rows] == [("FusedGRPOTrainer", "ok"), ("TRL", "ok")]
    assert all(float(row["seconds"]) > 0 and float(row["peak_bytes"]) > 0 for row in rows)
    assert 0 < float(rows[0]["gradient_difference"]) < 1e-5
    table = plots.fill_tables("<!-- table: trl-subclass cpu -->\n<!-- /table -->", tmp_path)
    assert "llama-tiny, full, FusedGRPOTrainer" in table
