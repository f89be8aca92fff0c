"""The command line: the configuration it resolves, and its one-line errors."""

import subprocess
import sys

import pytest
import yaml

from grpo_fast.cli import main, parse_config
from grpo_fast.errors import UserError, import_extra

SORT = "sort"


def test_parse_config_prefers_options_to_the_file():
    config = parse_config([SORT, "--seed", "7", "--learning_rate=2e-4", "--reward_funcs", "[exact_answer]"])
    assert (config.seed, config.learning_rate, config.reward_funcs) == (7, 2e-4, ["exact_answer"])
    assert config.num_generations == 16
    assert config.run_name == "sort"


def test_parse_config_without_a_file():
    config = parse_config(
        ["--model_name_or_path", "m", "--dataset_name", "d.jsonl", "--reward_funcs", "[exact_answer]"]
    )
    assert (config.model_name_or_path, config.loss_type) == ("m", "dapo")


def test_print_config_output_can_be_read_back(tmp_path):
    command = [sys.executable, "-m", "grpo_fast", "train", SORT, "--seed", "7", "--print_config"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    path = tmp_path / "resolved.yaml"
    path.write_text(done.stdout)
    assert yaml.safe_load(done.stdout)["seed"] == 7
    assert parse_config([str(path), "--run_name", "sort"]) == parse_config([SORT, "--seed", "7"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.yaml"], "no such file: missing.yaml"),
        ([SORT, "--lerning_rate", "1"], "unknown option --lerning_rate (did you mean 'learning_rate'?)"),
        ([SORT, "--learning_rate", "fast"], "learning_rate='fast' is not allowed: it must be float"),
        ([SORT, "--max_steps", "1.5"], "max_steps='1.5' is not allowed: it must be int"),
        ([SORT, "--epsilon", "wide"], "epsilon='wide' is not allowed: it must be float | None"),
        ([SORT, "--gradient_accumulation_steps", "4"], "set max_tokens_per_microbatch instead"),
        ([SORT, "--vllm_importance_sampling_cap", "2"], "set vllm_importance_sampling_clip_max instead"),
        ([SORT, "--vllm_tensor_parallel_size", "2"], "grpo-fast serve CONFIG.yaml -- --tensor-parallel-size 2"),
        ([SORT, "--max_eval_samples", "4", "sort.yaml"], "the configuration file goes first"),
        ([SORT, "--seed", str(2**63)], "it must be a finite number, at least 0 and below 2**63"),
        ([SORT, "--reward_weights", "[.nan, 1, 1]"], "reward_weights"),
        ([SORT, "--reward_weights", "[1e39, 1, 1]"], "it must be made of numbers within +-3.4e+38"),
        ([SORT, "--eval_dataset_name", "x.jsonl"], "has its own held-out rows"),
        ([SORT, "--reward_funcs", "[exact_answer, exact_answer]"], "'exact_answer' is listed 2 times"),
        ([SORT, "--attn_implementation", "bogus"], "could not be loaded"),
        ([SORT, "--model_init_kwargs", "{vocab_size: 3}"], "'vocab_size' is not a field to set"),
        ([SORT, "--model_init_kwargs", "{hidden_size: -3}"], "could not be loaded"),
        ([SORT, "--output_dir", "/dev/null/run"], "/dev/null is not a folder"),
        ([SORT, "--learning_rate", ".nan"], "learning_rate=nan is not allowed: it must be a finite number, above 0"),
        ([SORT, "--num_generations", "1"], "num_generations=1 is not allowed: it must be a finite number, at least 2"),
        ([SORT, "--num_generations", "7"], "generation_batch_size=1024 is not allowed: it must be a multiple of"),
        ([SORT, "--loss_type", "gprp"], "loss_type='gprp' is not allowed: it must be one of grpo, bnpo"),
        ([SORT, "--epsilon", "0"], "epsilon must be"),
        ([SORT, "--scale_rewards", "grp"], "scale_rewards"),
        ([SORT, "--lr_scheduler_type", "lineal"], "lr_scheduler_type"),
        ([SORT, "--reward_weights", "[1.0]"], "reward_weights has 1 values for 3 reward_funcs"),
        ([SORT, "--reward_funcs", "[exact_anser]"], "did you mean 'exact_answer'"),
        ([SORT, "--dataset_name", "sort_digit"], "did you mean 'sort_digits'"),
        ([SORT, "--dataset_name", "missing.jsonl"], "no such file: missing.jsonl"),
        ([SORT, "--model_name_or_path", "random-lama"], "did you mean 'random-llama'"),
        ([SORT, "--model_init_kwargs", "{hiden_size: 3}"], "did you mean 'hidden_size'"),
        ([SORT, "--max_completion_length", "100"], "do not fit the model's 64 positions"),
        ([SORT, "--generation_kwargs", "{repetition_penalty: -1}"], "generation_kwargs={'repetition_penalty': -1} is"),
        (
            [SORT, "--generation_kwargs", "{min_new_tokens: 9}"],
            "min_new_tokens=9 is not allowed: it must be from",
        ),
        ([SORT, "--dataset_config", "zzz"], "dataset_config='zzz' requires a hub dataset, not 'sort_digits'"),
        ([SORT, "--dataset_test_split", "zzz"], "dataset_test_split='zzz' requires a hub dataset"),
        ([SORT, "--system_prompt", "Be brief."], "system_prompt requires prompt_template"),
        ([SORT, "--run_name", "../x"], "run_name='../x' is not allowed: it must be a name without '/'"),
        ([SORT, "--generation_kwargs", "{top_kk: 3}"], "generation_kwargs: 'top_kk' is not allowed"),
    ],
)
def test_train_reports_wrong_options_in_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("grpo-fast: error: ")
    assert message in error
    assert "\n" not in error


@pytest.mark.parametrize("command", ["plan", "serve", "eval", "doctor"])
def test_main_prints_a_commands_usage(command, capsys):
    assert main([command, "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"usage: grpo-fast {command}")


@pytest.mark.parametrize("options", [["--temperature", "{}"], ["--temperature={}"], ["--reward_weights", "[1, {}, 1]"]])
def test_train_shortens_huge_numbers_in_errors(options, capsys):
    assert main(["train", SORT, *(option.format("1" + "0" * 400) for option in options)]) == 2
    error = capsys.readouterr().err
    assert "000... is not allowed: " in error
    assert len(error) < 250


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate: [1\n", "is not valid YAML"),
        ("- 1\n", "must hold fields and values"),
        ("learning_rates: 1\n", "unknown field 'learning_rates' (did you mean 'learning_rate'?)"),
        ("learning_rate: 1\n", "model_name_or_path"),
        (
            "model_name_or_path: m\ndataset_name: d\nreward_funcs: [r]\nseed:\n",
            "seed=None is not allowed: it must be set",
        ),
    ],
)
def test_train_reports_wrong_files_in_one_line(text, message, capsys, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    assert main(["train", str(path)]) == 2
    assert message in capsys.readouterr().err


def test_main_with_an_unknown_command_or_none(capsys):
    assert main(["trian"]) == 2
    assert "did you mean 'train'" in capsys.readouterr().err
    assert main([]) == 0
    assert "usage" in capsys.readouterr().out


def test_import_extra_names_the_pip_command():
    with pytest.raises(UserError, match=r"pip install 'grpo-fast\[vllm\]'"):
        import_extra("no_such_module_at_all", "vllm")
