"""`GRPOTrainer` in a script or a notebook: objects instead of names, as in TRL."""

import json
from functools import partial

import datasets
import peft
import pytest
import torch
import transformers
import yaml

from grpo_fast import GRPOConfig, GRPOTrainer
from grpo_fast.cli import main
from grpo_fast.data import sort_digits
from grpo_fast.errors import UserError
from grpo_fast.model.loading import digit_tokenizer
from support.runs import assert_same_run, figures
from support.tiny import digit_llama

ROWS = sort_digits(length=2, test_size=20)
SIZES = {"num_generations": 4, "generation_batch_size": 16, "max_completion_length": 3, "use_cpu": True}
SHORT = {**SIZES, "learning_rate": 1e-3, "max_steps": 4, "save_steps": 2}


def digits(completions, **columns):
    return [float(len(text)) for text in completions]


def right(prompts, completions, answer, **columns):
    return [float(text == right) for text, right in zip(completions, answer, strict=True)]


def make_trainer(folder, model=None, **arguments):
    fields = {**SHORT, "output_dir": str(folder), **arguments.pop("fields", {})}
    given = {
        "reward_funcs": [digits, right],
        "train_dataset": datasets.Dataset.from_list(ROWS[0]),
        "eval_dataset": ROWS[1],
        "processing_class": digit_tokenizer(),
        **arguments,
    }
    return GRPOTrainer(model=model or digit_llama(), args=GRPOConfig(**fields), **given)


def weights(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def test_trainer_takes_objects_and_trains_the_model_that_was_given(tmp_path):
    model = digit_llama()
    before, trainer = weights(model), make_trainer(tmp_path / "run", model)
    summary = trainer.train()
    assert (summary.metric, summary.steps) == ("right", 4)
    assert not torch.equal(weights(model), before)
    assert {"rewards/digits/mean", "rewards/right/mean"} <= set(figures(tmp_path / "run")[0])
    measured = trainer.evaluate()
    assert measured["eval/rewards/right/mean"] == summary.after
    assert trainer.evaluate(ROWS[1][:2]).keys() == measured.keys()
    assert trainer.save_model(tmp_path / "model") == tmp_path / "model"
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(weights(saved), weights(model))
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "model").eos_token == "</s>"


@pytest.mark.parametrize("adapted", ["no", "config", "model"])
def test_run_given_objects_resumes_like_one_that_never_stopped(tmp_path, adapted):
    def make(folder, **fields):
        model, arguments = digit_llama(), {}
        if adapted != "no":
            lora = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
            torch.manual_seed(1)
            arguments = {"peft_config": lora} if adapted == "config" else {}
            model = model if arguments else peft.get_peft_model(model, lora)
        return make_trainer(folder, model, fields={"beta": 0.1, **fields}, **arguments)

    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    make(whole).train()
    make(stopped, max_steps=2, lr_scheduler_type="constant").train()
    with pytest.raises(UserError, match=r"already holds a run; .*train\(resume_from_checkpoint=True\)"):
        make(stopped).train()
    with pytest.raises(UserError, match="lr_scheduler_type='linear' is not that of"):
        make(stopped).train(resume_from_checkpoint=True)

    folder = tmp_path / "other"
    make(folder, save_steps=1).train()
    newest = folder / "checkpoint-4"
    newest.rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="is not in output_dir="):
        make(folder).train(resume_from_checkpoint=str(tmp_path / "elsewhere"))
    make(folder, save_steps=1).train(resume_from_checkpoint=folder / "checkpoint-3")
    assert_same_run(folder, whole)


def test_resume_refuses_another_model_and_an_older_checkpoint(tmp_path):
    make_trainer(tmp_path / "run").train()
    other = digit_llama()
    torch.nn.init.normal_(other.lm_head.weight)
    with pytest.raises(UserError, match=r"initial weights of the model='.*' is not that of"):
        make_trainer(tmp_path / "run", other).train(resume_from_checkpoint=True)
    with pytest.raises(UserError, match=r"is older than .*checkpoint-4"):
        make_trainer(tmp_path / "run").train(resume_from_checkpoint=tmp_path / "run" / "checkpoint-2")
    with pytest.raises(UserError, match="set output_dir of its configuration"):
        make_trainer(tmp_path, fields={"output_dir": None, "run_name": "x"}).train(resume_from_checkpoint=True)


def test_config_names_what_it_cannot_hold_and_the_command_line_says_so(tmp_path, capsys):
    make_trainer(tmp_path / "run", fields={"max_steps": 1}).train()
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert written["script_objects"] == {
        "model": "LlamaForCausalLM",
        "processing_class": type(digit_tokenizer()).__name__,
        "train_dataset": f"Dataset of {len(ROWS[0])} rows",
        "eval_dataset": f"list of {len(ROWS[1])} rows",
        "reward_funcs": f"{__name__}.digits, {__name__}.right",
    }
    capsys.readouterr()
    assert main(["train", str(tmp_path / "run" / "config.yaml"), "--resume"]) == 2
    error = capsys.readouterr().err
    assert "a script gave this run objects" in error
    assert "resume it from that script, with trainer.train(resume_from_checkpoint=True)" in error
    assert len(error.splitlines()) == 1
    # What the command line names instead needs no object.
    named = ["--dataset_name", "sort_digits", "--reward_funcs", "[exact_answer]"]
    assert main(["eval", str(tmp_path / "run" / "config.yaml"), *named]) == 2
    error = capsys.readouterr().err
    assert "(model: LlamaForCausalLM; processing_class: " in error
    assert "; start it from that script, or set --model_name_or_path" in error
    options = ["--model_name_or_path", str(tmp_path / "run" / "checkpoint-1"), "--output", str(tmp_path / "eval")]
    assert main(["eval", *options, *named, "--max_eval_samples", "3"]) == 0


def test_closures_and_lambdas_of_one_name_are_told_apart(tmp_path):
    rewards = [
        lambda completions, **columns: [1.0] * len(completions),
        lambda completions, **columns: [2.0] * len(completions),
    ]
    trainer = make_trainer(tmp_path, reward_funcs=[*rewards, partial(digits)])
    assert len(set(trainer.rewards.names)) == 3
    assert len(set(trainer.config.reward_funcs)) == 3
    with pytest.raises(UserError, match="is listed 2 times"):
        make_trainer(tmp_path, reward_funcs=[digits, digits])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train_dataset": {"train": []}}, "train_dataset holds several splits, train; give one of them"),
        ({"train_dataset": iter([])}, "train_dataset must be a datasets.Dataset or a list of rows, got list_iterator"),
        ({"train_dataset": ["text"]}, "train_dataset, row 1: expected a dictionary, got str"),
        ({"train_dataset": [{"question": "1"}]}, "no column 'prompt'"),
        ({"train_dataset": None}, "dataset_name is missing.*give GRPOTrainer train_dataset="),
        ({"reward_funcs": None}, "reward_funcs is missing"),
        ({"reward_funcs": [torch.nn.Linear(1, 1)]}, "the reward model Linear does not say where its tokenizer is"),
        ({"model": 3}, "model must be a name or a transformers model, got int"),
        ({"fields": {"model_name_or_path": "m"}}, "model and the configuration's model_name_or_path='m' are both"),
        ({"fields": {"dataset_name": "d"}}, "train_dataset and the configuration's dataset_name='d' are both given"),
        ({"fields": {"dataset_train_split": "s"}}, "dataset_train_split"),
        ({"fields": {"dtype": "bfloat16"}}, "dtype='bfloat16' has no effect on a model that is loaded already"),
        ({"processing_class": "name"}, "processing_class must be a tokenizer, got str"),
        ({"processing_class": None}, "processing_class is missing"),
        ({"callbacks": [print], "tools": [print]}, "does not take callbacks: use report_to.*; tools: use nothing"),
        ({"peft_config": peft.PromptTuningConfig()}, "peft_config must be a LoraConfig or a like one"),
    ],
    ids=lambda part: next(iter(part)) if isinstance(part, dict) else "",
)  # fmt: skip
def test_trainer_refuses_wrong_arguments(tmp_path, arguments, message):
    with pytest.raises(UserError, match=message) as error:
        make_trainer(tmp_path / "run", **arguments)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_trainer_refuses_an_unknown_argument(tmp_path):
    with pytest.raises(TypeError, match="GRPOTrainer takes no argument 'trian_dataset'"):
        make_trainer(tmp_path, trian_dataset=[])
    assert make_trainer(tmp_path, callbacks=None, optimizers=(None, None)).config.script_objects


def test_trainer_takes_the_configuration_alone_as_before(tmp_path):
    config = GRPOConfig(
        **SHORT, model_name_or_path="random-llama", dataset_name="sort_digits", reward_funcs=["exact_answer"],
        output_dir=str(tmp_path / "run"),
    )  # fmt: skip
    for trainer in (GRPOTrainer(config), GRPOTrainer(config=config), GRPOTrainer(args=config)):
        assert trainer.config.script_objects is None
    GRPOTrainer(config).train()
    with pytest.raises(UserError, match="already holds a run"):
        GRPOTrainer(config)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 4
