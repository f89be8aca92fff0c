"""Reward models: sequence classifiers by name, and as objects of a script."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

from grpo_fast import GRPOConfig, GRPOTrainer
from grpo_fast.config import check_complete
from grpo_fast.data import sort_digits
from grpo_fast.errors import UserError
from grpo_fast.files import read_metrics, read_yaml
from grpo_fast.model.loading import digit_tokenizer
from grpo_fast.rewards import RewardClassifier, RewardModel, load_reward, reward_model
from grpo_fast.train.trust import named_code
from support.runs import SMALL

CHAT = "{% for message in messages %}{{ message['content'] }}>{% endfor %}"


def classifier(labels=1, **fields):
    config = LlamaConfig(
        vocab_size=len(digit_tokenizer()), hidden_size=16, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=24, initializer_range=0.5,
        bos_token_id=None, eos_token_id=None, num_labels=labels, **fields,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(config).eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a reward model in float32."""
    folder = tmp_path_factory.mktemp("models") / "judge"
    classifier().save_pretrained(folder)
    tokenizer = digit_tokenizer()
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    return folder


def alone(folder, text):
    """The score of one text without padding, as the model gives it."""
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    model.config.pad_token_id = digit_tokenizer().pad_token_id
    ids = digit_tokenizer()(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return model(ids).logits.item()


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_reward_model_scores_prompt_and_completion(saved, batch_size):
    prompts, completions = ["12>", "1>", "312>", "9>"], ["12", "1", "123456", ""]
    expected = [alone(saved, prompt + completion) for prompt, completion in zip(prompts, completions, strict=True)]
    got = reward_model(str(saved), batch_size=batch_size)(prompts, completions)
    assert got == pytest.approx(expected, abs=1e-5)
    assert len(set(got)) == 4
    model = RewardModel(["exact_answer", f"{saved}"], [0.0, 2.0])
    assert model.names == ["exact_answer", "judge"]
    total = model(prompts, completions, {"answer": ["1"] * 4}).total.tolist()
    assert total == pytest.approx([2 * value for value in expected], abs=1e-5)


def test_reward_model_reads_chats_by_its_own_template(saved):
    prompt = [{"role": "user", "content": "21"}]
    got = load_reward(f"reward_model({str(saved)!r})")([prompt], [[{"role": "assistant", "content": "12"}]])
    assert got == pytest.approx([alone(saved, "21>12>")], abs=1e-5)


def test_reward_model_has_its_own_precision_and_device(saved):
    made = load_reward(f'reward_model({str(saved)!r}, dtype="bfloat16", device="cpu", batch_size=3)')
    weight = next(made.model.parameters())
    assert (weight.dtype, made.batch_size, made.device) == (torch.bfloat16, 3, torch.device("cpu"))
    assert made(["12>"], ["12"]) == pytest.approx([alone(saved, "12>12")], rel=0.05, abs=0.05)
    assert next(reward_model(str(saved)).model.parameters()).dtype == torch.float32


def test_reward_model_never_cuts_a_text(saved):
    model = RewardModel([str(saved)], None)
    model.warn = lambda text: None
    got = model(["12>", "12>"], ["1" * 30, "12"], {})
    assert got.errors.flatten().tolist() == [True, False]
    assert got.total[1].item() == pytest.approx(alone(saved, "12>12"), abs=1e-5)
    with pytest.raises(ValueError, match="33 tokens, more than its 24 positions"):
        reward_model(str(saved))(["12>"], ["1" * 30])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda folder: AutoModelForCausalLM.from_config(classifier().config),
            r"is not a reward model: .* lack score.weight",
        ),
        (lambda folder: classifier(labels=3), "cannot be loaded: "),
    ],
)
def test_reward_model_refuses_models_without_a_trained_head(tmp_path, make, message):
    make(tmp_path).save_pretrained(tmp_path / "other")
    digit_tokenizer().save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=message):
        load_reward(f"{tmp_path}/other")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/no/such/folder", "the reward model '/no/such/folder' cannot be loaded"),
        ("reward_model(a, dtype=float8)", "dtype='float8' is not allowed: it must be one of auto, float32"),
        ("reward_model(a, device=nowhere)", "device='nowhere' is not allowed"),
        ("reward_model(a, batch_size=0)", "batch_size=0 is not allowed"),
        ("reward_model()", r"write reward_model\(model, dtype='auto', device=None, batch_size=8\)"),
        ("rewards/mine.py", "'rewards/mine.py' is unknown|cannot be loaded"),
    ],
)
def test_reward_model_refuses_wrong_arguments(name, message):
    with pytest.raises(UserError, match=message):
        load_reward(name)


def test_reward_classifier_refuses_several_outputs_and_a_missing_tokenizer(tmp_path):
    with pytest.raises(UserError, match="has 3 outputs; load it with num_labels=1"):
        RewardClassifier(classifier(labels=3), digit_tokenizer())
    with pytest.raises(UserError, match="does not say where its tokenizer is; pass reward_processing_classes"):
        RewardClassifier(classifier())
    classifier().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="has no tokenizer: "):
        reward_model(str(tmp_path))


def test_run_learns_from_a_reward_model_by_name(tmp_path, saved):
    config = GRPOConfig(**{**SMALL, "reward_funcs": [str(saved)], "max_steps": 1, "output_dir": str(tmp_path / "run")})
    assert named_code(config) == {}
    trainer = GRPOTrainer(config)
    trainer.train()
    (line,) = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert line["reward"] == line["rewards/judge/mean"] != 0
    assert read_yaml(tmp_path / "run" / "config.yaml")["reward_funcs"] == [str(saved)]


def test_trainer_takes_reward_models_as_trl_does(tmp_path, saved):
    """A module with its tokenizer, a name, and a function side by side."""
    train, held_out = sort_digits(length=2, test_size=8)
    module, tokenizer = classifier(), digit_tokenizer()
    fields = {
        name: value for name, value in SMALL.items() if name not in ("reward_funcs", "dataset_name", "dataset_kwargs")
    }

    def length(completions, **columns):
        return [float(len(text)) for text in completions]

    trainer = GRPOTrainer(
        args=GRPOConfig(**{**fields, "max_steps": 1, "output_dir": str(tmp_path / "run")}),
        reward_funcs=[module, str(saved), length],
        reward_processing_classes=[tokenizer, None, None],
        train_dataset=train,
        eval_dataset=held_out,
    )
    trainer.train()
    (line,) = read_metrics(tmp_path / "run" / "metrics.jsonl")
    # The same weights.
    assert line["rewards/LlamaForSequenceClassification/mean"] == pytest.approx(line["rewards/judge/mean"], abs=1e-5)
    assert "reward_funcs" in trainer.config.script_objects
    check_complete(trainer.config)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([None], "has 1 entries for 2 reward_funcs"),
        ([None, "tokenizer"], r"gives a tokenizer to <function .*>, which is not a reward model"),
    ],
)
def test_trainer_refuses_wrong_reward_processing_classes(given, message):
    with pytest.raises(UserError, match=message):
        GRPOTrainer(
            args=GRPOConfig(use_cpu=True),
            model="random-llama",
            reward_funcs=["exact_answer", lambda prompts, **columns: [0.0]],
            reward_processing_classes=given,
            train_dataset=[{"prompt": "1>"}],
        )
