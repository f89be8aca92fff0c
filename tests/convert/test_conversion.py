"""Files of other trainers: what they become, what is said about the rest, and that the shipped examples run."""

import dataclasses
import json
import os
import re
from pathlib import Path

import pytest
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from grpo_fast.cli import main, parse_config
from grpo_fast.config import GRPOConfig
from grpo_fast.convert import TRAINERS, convert, fill_tables, read_file
from grpo_fast.errors import UserError
from grpo_fast.trainer import GRPOTrainer

ROOT = Path(__file__).parent.parent.parent
EXAMPLES = ROOT / "examples" / "convert"
FIELDS = {field.name for field in dataclasses.fields(GRPOConfig)}
BASE = {"model_name_or_path": "m", "dataset_name": "d.jsonl", "reward_funcs": "accuracy,format"}
LLAMA = {"model_name_or_path": "m", "stage": "ppo"}


def made(content, **arguments):
    return convert(content, Path(), **arguments)


def from_verl(**fields):
    """verl's fields, with ``__`` for full stops."""
    usual = {"actor_rollout_ref.model.path": "m", "actor_rollout_ref.rollout.n": 8}
    return made(usual | {name.replace("__", "."): v for name, v in fields.items()})


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model's folder, whose tokenizer has one token for each character, and a chat template."""
    characters = sorted({chr(i) for i in range(32, 127)} | {"\n"})
    backend = Tokenizer(models.WordLevel({c: i for i, c in enumerate([*characters, "</s>"])}, unk_token="?"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?", eos_token="</s>", pad_token="</s>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=1, max_position_embeddings=128, **sizes)
    folder = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        (
            "llama_factory",
            ["--reward_funcs", "exact_answer,format", "--max_steps", "1"],
            {"use_peft": True, "lora_alpha": 16, "generation_batch_size": 16, "warmup_ratio": 0.1},
        ),
        (
            "trl",
            [],
            {
                "reward_funcs": ["accuracy_reward"],
                "dtype": "bfloat16",
                "learning_rate": 1e-5,
                "lora_dropout": 0.05,
                "per_device_train_batch_size": 4,
                "gradient_accumulation_steps": 4,
                "generation_batch_size": 16,
                "warmup_ratio": 0.05,
            },
        ),
        (
            "verl",
            ["--reward_funcs=exact_answer"],
            {"answer_column": "reward_model.ground_truth", "generation_batch_size": 32, "kl_estimator": "k3"},
        ),
    ],
)
def test_example_converts_and_runs(name, options, expected, model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    output = tmp_path / "ours.yaml"
    assert main(["convert", str(EXAMPLES / f"{name}.yaml"), "--output", str(output), *options]) == 0
    assert "to set before it runs" not in capsys.readouterr().out
    config = parse_config([str(output)])
    assert {field: getattr(config, field) for field in expected} == expected
    small = {
        "model_name_or_path": model, "output_dir": tmp_path / "run", "max_steps": 1, "max_completion_length": 4,
        "max_eval_samples": 2, "num_generations": 4, "bf16": "false", "use_cpu": "true",
    }  # fmt: skip
    small |= {"gradient_accumulation_steps": 2} if name == "trl" else {"generation_batch_size": 8}
    summary = GRPOTrainer(
        parse_config([str(output), *(f"--{field}={value}" for field, value in small.items())])
    ).train()
    assert summary.steps == 1
    assert (tmp_path / "run" / "checkpoint-1").is_dir()


def test_convert_says_what_became_of_each_field(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    content = {
        **LLAMA, "lora_rank": 16, "cutoff_len": 512, "plot_loss": True, "ref_model": "x", "template": "qwen",
        "loraplus_lr_ratio": 16.0, "dataset": "missing", "num_train_epochs": 2.0,
    }  # fmt: skip
    (tmp_path / "theirs.yaml").write_text(yaml.safe_dump(content))
    assert main(["convert", "theirs.yaml"]) == 1
    said = capsys.readouterr().out
    for name in content:
        assert re.search(rf"\b{name}\b", said), name
    assert "lora_r: 16  (lora_rank)" in said
    assert "lora_alpha: 32  (LLaMA-Factory's default)" in said
    assert "left out, since they change no result: plot_loss" in said
    assert "cutoff_len: never cut: error or drop" in said
    assert "ref_model='x': the reference is the initial policy" in said
    assert "loraplus_lr_ratio=16.0: not known here" in said
    assert "dataset='missing': set dataset_name to the data's file: data/dataset_info.json does not exist" in said
    assert "reward_funcs: reward functions, such as math_answer" in said
    # The file says the same, and is our configuration but for what is left to set.
    written = (tmp_path / "theirs-grpo-fast.yaml").read_text()
    assert "#   ref_model='x': the reference is the initial policy" in written
    assert yaml.safe_load(written)["num_train_epochs"] == 2.0
    assert set(yaml.safe_load(written)) <= FIELDS
    assert main(["convert", "theirs.yaml"]) == 2
    assert "theirs-grpo-fast.yaml already exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "fields"),
    [
        (
            {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 8},
            {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 8},
        ),
        ({"steps_per_generation": 8}, {"per_device_train_batch_size": 8, "steps_per_generation": 8}),
        (
            {"generation_batch_size": 32, "per_device_train_batch_size": 2},
            {"generation_batch_size": 32, "per_device_train_batch_size": 2},
        ),
        # Two optimizer steps of TRL's 8 completions per process.
        ({"generation_batch_size": 64}, {"generation_batch_size": 64, "per_device_train_batch_size": 8}),
        ({"num_train_epochs": 1, "max_steps": -1}, {"num_train_epochs": 1.0, "max_steps": -1}),
        ({"max_steps": -1}, {"num_train_epochs": 3.0}),
        ({"max_steps": None}, {"num_train_epochs": 3.0}),
        ({"warmup_ratio": 0.1, "logging_first_step": True}, {"warmup_ratio": 0.1, "logging_first_step": True}),
        ({"learning_rate": "1e-5", "max_steps": "7"}, {"learning_rate": 1e-5, "max_steps": 7}),
        ({"report_to": "wandb"}, {"report_to": ["wandb"]}),
        ({"save_strategy": "no"}, {"save_steps": 0}),
        ({"optim": "adamw_torch"}, {"optim": "adamw_torch_fused"}),
        ({"repetition_penalty": 1.1}, {"generation_kwargs": {"repetition_penalty": 1.1}}),
        ({"vllm_importance_sampling_cap": 2.0}, {"vllm_importance_sampling_clip_max": 2.0}),
        ({"fp16": False}, {"bf16": True}),
        ({"bf16": False}, {"bf16": False}),
        ({}, {"per_device_train_batch_size": 8, "num_train_epochs": 3.0}),
        (
            {"reward_model_name_or_path": "owner/judge"},
            {"reward_funcs": ["accuracy", "format", "owner/judge"]},
        ),
        (
            {"reward_model_name_or_path": "judge", "reward_funcs": ["accuracy"]},
            {"reward_funcs": ["accuracy", "reward_model('judge')"]},
        ),
        ({}, {"reward_funcs": "accuracy,format", "gradient_checkpointing": True, "save_steps": 500}),
    ],
)
def test_convert_from_trl(content, fields, monkeypatch):
    result = made(BASE | content, processes=4)
    assert result.trainer == "TRL"
    assert {name: result.fields[name] for name in fields} == fields
    assert result.notes == result.to_set == {}
    assert "WORLD_SIZE" not in os.environ
    monkeypatch.setenv("WORLD_SIZE", "4")
    GRPOConfig(**result.fields)


@pytest.mark.parametrize(
    ("content", "completions", "per_step"),
    [
        ({}, 32, 32),
        ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 8}, 64, 64),
        ({"steps_per_generation": 8}, 256, 32),
        ({"generation_batch_size": 64}, 64, 32),
        ({"generation_batch_size": 32, "per_device_train_batch_size": 2}, 32, 8),
        ({"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}, 8, 8),
    ],
)
def test_batches_converted_from_trl_are_those_of_trl(content, completions, per_step, monkeypatch):
    result = made(BASE | content, processes=4)
    assert result.to_set == {}
    monkeypatch.setenv("WORLD_SIZE", "4")
    config = GRPOConfig(**result.fields)
    assert (config.generation_batch_size, config.generation_batch_size // config.parts_per_batch) == (
        completions,
        per_step,
    )


@pytest.mark.parametrize(
    ("content", "note"),
    [
        ({"deepspeed": "ds.json"}, "set fsdp: true for several GPUs"),
        ({"steps_per_generation": 0}, "steps_per_generation=0 is not allowed: it must be at least 1"),
        ({"optim": "lion"}, "use adamw_torch_fused"),
        ({"eval_strategy": "epoch"}, "set eval_steps to the steps between two evaluations"),
        ({"fp16": True}, "set bf16: true"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "it must be one of linear, cosine"),
        ({"max_steps": "many"}, "max_steps='many' is not allowed: it must be"),
        ({"learning_rat": 1.0}, "not known here (did you mean 'learning_rate'?)"),
        ({"per_device_train_batch_size": "auto"}, "per_device_train_batch_size='auto' is not allowed: it must be"),
        ({"output_dir": "$OUT"}, "write its value in place of the variable"),
    ],
)
def test_convert_notes_what_has_no_counterpart(content, note):
    result = made(BASE | content)
    name, value = next(iter(content.items()))
    assert note in result.notes[f"{name}={value!r}"]
    GRPOConfig(**result.fields)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"data__train_batch_size": 64, "actor_rollout_ref__rollout__n": 4}, {"generation_batch_size": 256}),
        (
            {"data__train_batch_size": 64, "actor_rollout_ref__rollout__n": 8,
             "actor_rollout_ref__actor__ppo_mini_batch_size": 16},
            {"generation_batch_size": 128, "num_generations": 8},
        ),
        ({"actor_rollout_ref__actor__loss_agg_mode": "seq-mean-token-sum-norm"}, {"loss_type": "dr_grpo"}),
        ({"actor_rollout_ref__actor__policy_loss__loss_mode": "gspo"}, {"loss_type": "gspo"}),
        (
            {"actor_rollout_ref__actor__policy_loss__loss_mode": "clip_cov",
             "actor_rollout_ref__actor__policy_loss__clip_cov_ratio": 0.001,
             "actor_rollout_ref__actor__policy_loss__clip_cov_ub": 4.0,
             "actor_rollout_ref__actor__policy_loss__ppo_kl_coef": 0.5},
            {"loss_type": "clip_cov", "covariance_ratio": 0.001, "covariance_high": 4.0},
        ),
        (
            {"actor_rollout_ref__actor__policy_loss__loss_mode": "kl_cov",
             "actor_rollout_ref__actor__policy_loss__ppo_kl_coef": 0.5},
            {"loss_type": "kl_cov", "covariance_kl": 0.5},
        ),
        (
            {"actor_rollout_ref__rollout__name": "vllm", "algorithm__rollout_correction__rollout_rs": "seq_mean_k1",
             "algorithm__rollout_correction__rollout_rs_threshold": "0.5_2.0"},
            {"rollout_rs": "seq_mean_k1", "rollout_rs_threshold": 2.0, "rollout_rs_threshold_lower": 0.5},
        ),
        ({"algorithm__adv_estimator": "remax"}, {"advantage_estimator": "remax"}),
        (
            {"actor_rollout_ref__actor__use_kl_loss": True, "actor_rollout_ref__actor__kl_loss_type": "mse"},
            {"beta": 0.001, "kl_estimator": "k2", "use_bias_correction_kl": False},
        ),
        ({"algorithm__adv_estimator": "rloo"}, {"reward_baseline": "leave_one_out", "scale_rewards": "none"}),
        ({"algorithm__norm_adv_by_std_in_grpo": False}, {"scale_rewards": "none"}),
        ({"actor_rollout_ref__rollout__top_k": -1}, {"top_k": 0}),
        ({"actor_rollout_ref__model__lora_rank": 8}, {"use_peft": True, "lora_r": 8, "lora_alpha": 16}),
        ({"data__train_files": ["a.parquet"]}, {"dataset_name": "a.parquet", "delta": 3.0}),
        ({"actor_rollout_ref__rollout__name": "vllm"}, {"vllm_importance_sampling_correction": False}),
        ({"actor_rollout_ref__actor__optim__lr_warmup_steps_ratio": 0.1}, {"warmup_steps": 0.1}),
        (
            {"data__prompt_key": "messages", "actor_rollout_ref__actor___target_": "x", "reward_model__max_length": 8},
            {"answer_column": "reward_model.ground_truth"},
        ),
        ({"trainer__save_freq": -1, "trainer__test_freq": 5}, {"save_steps": 0, "eval_steps": 5}),
        ({"trainer__total_epochs": 15}, {"num_train_epochs": 15}),
        ({"trainer__total_epochs": 15, "trainer__total_training_steps": 9}, {"max_steps": 9}),
        ({}, {"num_train_epochs": 30}),
    ],
)  # fmt: skip
def test_convert_from_verl(fields, expected):
    result = from_verl(**fields)
    assert result.trainer == "verl"
    assert {name: result.fields[name] for name in expected} == expected
    assert result.notes == {}


@pytest.mark.parametrize(
    ("fields", "note"),
    [
        ({"algorithm__adv_estimator": "gae"}, "there is no critic"),
        ({"data__train_files": ["a", "b"]}, "dataset_name takes one file"),
        ({"actor_rollout_ref__rollout__name": "sglang"}, "set use_vllm: true"),
        ({"trainer__n_gpus_per_node": 8}, "start 8 processes with torchrun"),
        ({"custom_reward_function__path": "r.py"}, "write a function that calls compute_score"),
        ({"data__truncation": "left"}, "prompts are never cut"),
        ({"data__prompt_key": "question"}, "rename the column of chat messages to prompt"),
        ({"reward_model__enable": True}, "name the reward model in reward_funcs"),
        ({"actor_rollout_ref__rollout__multi_turn__enable": True}, "without tools"),
        ({"algorithm__kl_ctrl__type": "adaptive"}, "set beta, a constant weight"),
        ({"actor_rollout_ref__rollout__tensor_model_parallel_size": 2}, "grpo-fast serve"),
    ],
)
def test_convert_from_verl_notes_what_has_no_counterpart(fields, note):
    notes = from_verl(**fields).notes
    assert len(notes) == 1
    assert note in next(iter(notes.values()))


def test_script_that_starts_verl(tmp_path):
    path = tmp_path / "run.sh"
    path.write_text(
        "set -x\n# data.train_batch_size=1\npython3 -m verl.trainer.main_ppo \\\n"
        "    algorithm.adv_estimator=grpo \\\n    data.train_files=\"['a.jsonl']\" \\\n"
        "    +actor_rollout_ref.model.path=$MODEL actor_rollout_ref.rollout.n=5 \\\n"
        "    data.train_batch_size=16 actor_rollout_ref.actor.optim.lr=1e-6 $@\n"
    )
    result = convert(read_file(path), tmp_path)
    assert result.trainer == "verl"
    expected = {"dataset_name": "a.jsonl", "generation_batch_size": 80, "learning_rate": 1e-6}
    assert {name: result.fields[name] for name in expected} == expected
    assert list(result.notes) == ["model.path='$MODEL'"]
    assert (
        "write its value in place of the variable, then set model_name_or_path" in result.notes["model.path='$MODEL'"]
    )
    assert set(result.to_set) == {"model_name_or_path", "reward_funcs"}


def test_home_folder_and_variables():
    fields = {"data__train_files": "$HOME/a.parquet", "data__val_files": ["${HOME}/b.parquet"]}
    result = from_verl(**fields, trainer__default_local_dir="${x}/y", trainer__experiment_name="mine")
    assert result.fields["dataset_name"] == "~/a.parquet"
    assert result.fields["eval_dataset_name"] == "~/b.parquet"
    assert result.fields["run_name"] == "mine"
    assert list(result.notes) == ["trainer.default_local_dir='${x}/y'"]
    notes = from_verl(data__train_batch_size="$BATCH").notes
    assert notes["rollout.n=8"].startswith("depends on data.train_batch_size; set generation_batch_size")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"finetuning_type": "full"}, {"use_peft": False}),
        ({"finetuning_type": "lora", "lora_rank": 4}, {"use_peft": True, "lora_r": 4, "lora_alpha": 8}),
        ({"lora_target": "q_proj,v_proj"}, {"lora_target_modules": ["q_proj", "v_proj"]}),
        ({"quantization_bit": 4}, {"load_in_4bit": True, "use_bnb_nested_quant": True}),
        ({}, {"generation_batch_size": 8, "num_train_epochs": 3.0}),
        ({"ppo_buffer_size": 2, "gradient_accumulation_steps": 8}, {"generation_batch_size": 128}),
        ({"ppo_whiten_rewards": True}, {"scale_rewards": "batch"}),
        ({"disable_gradient_checkpointing": True}, {"gradient_checkpointing": False}),
        ({"flash_attn": "fa2"}, {"attn_implementation": "flash_attention_2"}),
        ({"max_new_tokens": 99, "default_system": "Hi"}, {"max_completion_length": 99, "system_prompt": "Hi"}),
        ({"infer_backend": "vllm", "vllm_maxlen": 99}, {"use_vllm": True, "vllm_max_model_length": 99}),
    ],
)
def test_convert_from_llama_factory(content, expected):
    result = made(LLAMA | content)
    assert result.trainer == "LLaMA-Factory"
    assert {name: result.fields[name] for name in expected} == expected
    assert result.notes == {}


@pytest.mark.parametrize(
    ("info", "expected"),
    [
        ({"file_name": "a.json"}, {"dataset_name": "{folder}/a.json"}),
        ({"hf_hub_url": "a/b", "subset": "c", "split": "d"},
         {"dataset_name": "a/b", "dataset_config": "c", "dataset_train_split": "d"}),
        ({"file_name": "a.json", "columns": {"response": "gold"}}, {"answer_column": "gold"}),
        ({"file_name": "a.json", "columns": {"prompt": "q", "query": "more", "response": "gold"}},
         {"prompt_template": "{q}\n{more}", "answer_column": "gold"}),
        ({"file_name": "a.json", "formatting": "sharegpt", "columns": {"messages": "messages"},
          "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}},
         {"dataset_name": "{folder}/a.json"}),
    ],
)  # fmt: skip
def test_dataset_info(info, expected, tmp_path):
    (tmp_path / "dataset_info.json").write_text(json.dumps({"mine": info}))
    result = made(LLAMA | {"dataset": "mine", "dataset_dir": str(tmp_path)})
    expected = {name: value.replace("{folder}", str(tmp_path)) for name, value in expected.items()}
    assert {name: result.fields[name] for name in expected} == expected
    assert result.notes == {}


@pytest.mark.parametrize(
    ("info", "words"),
    [
        ({"file_name": "a.json", "ranking": True}, "preference data has no right answers"),
        ({"script_url": "a"}, "set dataset_name to a file or a hub name"),
        ({"file_name": "a.json", "formatting": "sharegpt", "tags": {"user_tag": "me"}}, "rename the columns and tags"),
        (None, "has no 'mine'"),
    ],
)
def test_dataset_info_that_cannot_be_read(info, words, tmp_path):
    (tmp_path / "dataset_info.json").write_text(json.dumps({"mine": info}))
    result = made(LLAMA | {"dataset": "mine", "dataset_dir": str(tmp_path)})
    assert words in result.notes["dataset='mine'"]
    assert "dataset_name" in result.to_set


def test_given_fields_take_precedence():
    result = made(BASE | {"max_steps": 5}, changes={"max_steps": 9, "seed": "3"})
    assert (result.fields["max_steps"], result.fields["seed"]) == (9, 3)
    assert result.sources["max_steps"] == "given"
    with pytest.raises(UserError, match="max_steps='x' is not allowed"):
        made(BASE, changes={"max_steps": "x"})


def test_configuration_that_would_be_refused_is_told():
    base = BASE | {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    for content in (base, base | {"num_generations": 8}):
        result = made(content)
        assert result.to_set == {
            "and": "num_generations=8 must divide the completions of a generation batch, per_device_train_batch_size=1 "
            "x gradient_accumulation_steps=4 x 1 process = 4; gradient_accumulation_steps=8 would do"
        }
        assert result.notes == {}
        assert made(content, processes=2).to_set == {}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "the following arguments are required: file"),
        (["missing.yaml"], "no such file: missing.yaml"),
        (["list.yaml"], "list.yaml must hold fields and values"),
        (["a.yaml", "--from", "unsloth"], "invalid choice: 'unsloth'"),
        (["a.yaml", "--processes", "0"], "--processes=0 is not allowed"),
        (["a.yaml", "--sed", "1"], "unknown option --sed (did you mean 'seed'?)"),
        (["a.yaml", "seed", "1"], "fields are set as in --learning_rate 1e-5"),
    ],
)
def test_convert_reports_wrong_options_in_one_line(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text("seed: 1\n")
    (tmp_path / "list.yaml").write_text("- 1\n")
    assert main(["convert", *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert words in error
    assert "\n" not in error
    assert not list(tmp_path.glob("*-grpo-fast.yaml"))


def test_tables_of_the_document_are_those_of_the_converter():
    page = (ROOT / "docs" / "migration.md").read_text(encoding="utf-8")
    assert {name for name in TRAINERS if f"<!-- fields: {name} -->" in page} == {"verl", "llama-factory"}
    assert fill_tables(page) == page, "run: python docs/fill_migration.py"


def test_converter_agrees_with_the_document_on_trl():
    page = (ROOT / "docs" / "migration.md").read_text(encoding="utf-8")
    section = page.partition("## TRL\n")[2].partition("\n## ")[0]
    table = {}
    for theirs, ours in re.findall(r"^\| (.*?) \| (.*?) \|", section, re.M):
        table |= {name: set(re.findall(r"`(\w+)`", ours)) for name in re.findall(r"`(\w+)`", theirs)}
    rows = {name: set(row.ours) for row in TRAINERS["trl"].rows for name in row.theirs}
    shared = [name for name in rows if name in table]
    assert len(shared) > 8
    for name in shared:
        assert rows[name] <= table[name], name


@pytest.mark.parametrize("kind", TRAINERS.values(), ids=TRAINERS)
def test_rows_name_our_fields(kind):
    assert {name for row in kind.rows for name in row.ours} <= FIELDS
    every = [name for row in kind.rows for name in row.theirs]
    assert not (FIELDS | set(every)) & set(kind.not_needed)
    # A field with our name has our meaning, unless the row says otherwise.
    odd = {name for row in kind.rows for name in row.theirs if name in FIELDS and name not in row.ours}
    assert odd == ({"per_device_train_batch_size", "gradient_accumulation_steps"} if kind.title[0] == "L" else set())
    assert len(set(every)) == len(every)
