"""A downloaded run folder is data: Python code that it names runs only if the command line names it, too."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.state import AcceleratorState
from safetensors.torch import save_file

from grpo_fast.cli import main, parse_config
from grpo_fast.errors import UserError
from grpo_fast.train.trust import remember_own
from support.runs import config, trainer

PYTHON = (
    "from pathlib import Path\n"
    "(Path(__file__).parent / 'ran').touch()\n"
    "def mine(prompts, completions, **columns):\n    return [float(len(c)) for c in completions]\n"
)


@pytest.fixture(autouse=True)
def _own_state(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def own_run(folder: Path, steps: int = 1) -> Path:
    """A run whose reward function is a file in its folder."""
    folder.mkdir()
    (folder / "mine.py").write_text(PYTHON)
    trainer(folder, max_steps=steps, reward_funcs=["exact_answer", f"{folder / 'mine.py'}:mine"]).train()
    return folder


@pytest.fixture
def downloaded(tmp_path, monkeypatch):
    """Somebody else's run: the same content, but not started here."""
    folder = own_run(tmp_path / "run")
    shutil.rmtree(tmp_path / "state")
    (folder / "ran").unlink()
    monkeypatch.chdir(tmp_path)
    return folder


def refusal(capsys) -> str:
    error = capsys.readouterr().err.strip()
    assert "\n" not in error
    return error


def test_commands_refuse_reward_functions_of_a_downloaded_folder(downloaded, capsys):
    commands = [
        ["train", "run/config.yaml", "--resume"],
        ["train", "run/config.yaml", "--resume", "--max_steps", "2"],
        ["train", "--config", "run/config.txt", "--resume"],
        ["train", "--config=run/config.yaml", "--output_dir", "other"],
        ["eval", "run/config.yaml"],
        ["eval", "--model_name_or_path", "run/checkpoint-1"],
        ["eval", "run/config.yaml", "--reward_funcs+=boxed_answer"],
    ]
    shutil.copy("run/config.yaml", "run/config.txt")
    for command in commands:
        assert main(command) == 2
        error = refusal(capsys)
        assert "lies in a run's folder that was not written here by you, and it names Python to be run" in error
        assert 'add --reward_funcs \'["exact_answer", ' in error
    assert main(["report", "run"]) == 0
    assert main(["compare", "run"]) == 0
    assert not (downloaded / "ran").exists()
    assert sorted(path.name for path in Path().iterdir()) == ["compare.png", "run"]


def test_commands_run_code_that_the_command_line_names(downloaded, capsys):
    assert main(["eval", "run/config.yaml"]) == 2
    option = json.dumps(["exact_answer", f"{downloaded / 'mine.py'}:mine"])
    assert main(["eval", "run/config.yaml", "--reward_funcs", option]) == 0
    assert (downloaded / "ran").exists()
    AcceleratorState._reset_state(reset_partial_state=True)
    # From then on, the run is this user's.
    allowed = ["train", "run/config.yaml", "--resume", "--max_steps", "2"]
    assert main([*allowed, "--reward_funcs", option]) == 0
    parse_config(["run/config.yaml"])


def test_eval_runs_built_in_rewards_without_permission(downloaded, capsys):
    assert main(["eval", "run/config.yaml", "--reward_funcs", "[exact_answer]"]) == 0
    assert not (downloaded / "ran").exists()


def test_commands_run_the_code_of_the_users_own_run(tmp_path, monkeypatch):
    folder = own_run(tmp_path / "run")
    assert main(["train", str(folder / "config.yaml"), "--resume", "--max_steps", "2"]) == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.chdir(tmp_path)
    assert main(["eval", "--model_name_or_path", str(folder / "checkpoint-2"), "--output", "e"]) == 0
    # Also the evaluation's file.
    parse_config([str(tmp_path / "e" / "config.yaml")])
    # A copy is another run.
    shutil.copytree(folder, tmp_path / "copy")
    with pytest.raises(UserError, match="names Python to be run"):
        parse_config([str(tmp_path / "copy" / "config.yaml")])


def test_check_code_ignores_records_in_the_current_folder(downloaded, monkeypatch):
    """Without a home folder, a command does not look for records in the current one."""
    remember_own(downloaded, parse_config(["run/config.yaml", "--reward_funcs", f"[{downloaded / 'mine.py'}:mine]"]))
    option = json.dumps(["exact_answer", f"{downloaded / 'mine.py'}:mine"])
    remember_own(downloaded, parse_config(["run/config.yaml", "--reward_funcs", option]))
    parse_config(["run/config.yaml"])
    (record,) = {path.parent for path in Path("state").rglob("*") if path.is_file()}
    for state in ("", "state", "~"):
        shutil.copytree(record, Path("~/.local/state/grpo-fast/own-runs"), dirs_exist_ok=True)
        monkeypatch.setenv("XDG_STATE_HOME", state)
        monkeypatch.setattr(Path, "home", no_home)
        with pytest.raises(UserError, match="names Python to be run"):
            parse_config(["run/config.yaml"])
        # The missing record does not end a run.
        remember_own(downloaded, parse_config(["run/config.yaml", "--reward_funcs", option]))


def no_home():
    raise RuntimeError("Could not determine home directory.")


def test_check_code_trusts_recipes_outside_of_run_folders(tmp_path):
    (tmp_path / "mine.py").write_text(PYTHON)
    recipe = tmp_path / "recipe.yaml"
    fields = {"reward_funcs": [f"{tmp_path / 'mine.py'}:mine"], "trust_remote_code": True}
    recipe.write_text(yaml.safe_dump({**vars(config(tmp_path / "run")), **fields}))
    assert parse_config([str(recipe)]).trust_remote_code
    # In a run's folder, it belongs to the run.
    (tmp_path / "run" / "checkpoint-1").mkdir(parents=True)
    (tmp_path / "run" / "recipes").mkdir()
    for place in (tmp_path / "run", tmp_path / "run" / "recipes", tmp_path / "run" / "checkpoint-1"):
        shutil.copy(recipe, place / "recipe.yaml")
        with pytest.raises(UserError, match=r"add --reward_funcs '.*' --trust_remote_code true$"):
            parse_config([str(place / "recipe.yaml")])


@pytest.mark.parametrize(
    ("fields", "option"),
    [
        ({"trust_remote_code": True}, "--trust_remote_code true"),
        ({"reward_funcs": ["os.path.join"]}, "--reward_funcs '[\"os.path.join\"]'"),
        ({"reward_funcs": ["kimi_length(x).py:f"]}, "--reward_funcs '[\"kimi_length(x).py:f\"]'"),
        ({"attn_implementation": "someone/kernel"}, "--attn_implementation '\"someone/kernel\"'"),
        ({"model_init_kwargs": {"allow_all_kernels": True}}, "--model_init_kwargs '{\"allow_all_kernels\": true}'"),
    ],
    ids=["code of the model", "a module", "a file", "a kernel", "arguments"],
)
def test_check_code_covers_every_field_that_names_code(tmp_path, fields, option, capsys):
    folder = tmp_path / "run"
    (folder / "checkpoint-1").mkdir(parents=True)
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({**vars(config(folder)), **fields}))
    with pytest.raises(UserError) as error:
        parse_config([str(path)])
    assert str(error.value).endswith(f"to allow that, add {option}")
    name, _, value = option.removeprefix("--").partition(" ")
    # A part of the field is not the field.
    with pytest.raises(UserError, match="names Python"):
        parse_config([str(path), "--model_init_kwargs.head_dim=32"])
    parse_config([str(path), f"--{name}", value.strip("'")])


def test_commands_refuse_the_code_of_a_downloaded_model(tmp_path, capsys):
    """`trust_remote_code: true` and a model whose configuration names its own class."""
    folder = tmp_path / "run"
    model = folder / "checkpoint-1"
    trainer(tmp_path / "made").model.save_pretrained(model)
    trainer(tmp_path / "made").tokenizer.save_pretrained(model)
    content = json.loads((model / "config.json").read_text())
    names = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    (model / "config.json").write_text(json.dumps({**content, "model_type": "evil", "auto_map": names}))
    (model / "evil.py").write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n")
    save_file({}, folder / "empty.safetensors")
    fields = {"model_name_or_path": str(model), "model_init_kwargs": None, "trust_remote_code": True}
    (folder / "config.yaml").write_text(yaml.safe_dump({**vars(config(folder)), **fields}))
    commands = [["eval", "--model_name_or_path", str(model)], ["train", str(folder / "config.yaml"), "--resume"]]
    commands += [["plan", str(folder / "config.yaml"), "--vram", "24GiB"], ["serve", str(folder / "config.yaml")]]
    for command in commands:
        assert main(command) == 2
        assert "--trust_remote_code true" in refusal(capsys)
    assert not (tmp_path / "ran").exists()
    # With permission, the code runs, so the test above means something.
    assert main([*commands[0], "--trust_remote_code", "true"]) == 2
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("value", [{"class_path": "evil_module.Evil"}, [{"class_path": "evil_module.Evil"}]], ids=str)
@pytest.mark.parametrize("field", ["model_init_kwargs", "dataset_kwargs", "chat_template_kwargs", "generation_kwargs"])
def test_parse_config_does_not_import_a_class_path(tmp_path, monkeypatch, field, value):
    """jsonargparse imports the class that a dictionary names if any value is allowed."""
    (tmp_path / "evil_module.py").write_text("class Evil:\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / "recipe.yaml"
    for given in (value, json.dumps(value), {"deeper": value}):
        path.write_text(yaml.safe_dump({**vars(config(tmp_path)), field: {"a": given}}))
        assert getattr(parse_config([str(path)]), field) == {"a": given}
    assert "evil_module" not in sys.modules


def test_parse_config_reads_option_values_like_a_file():
    options = ["--model_init_kwargs.head_dim=32", "--model_init_kwargs.rope_theta", "1e4"]
    options += ["--model_init_kwargs.attention_bias=true", "--model_init_kwargs.layer_types=[full_attention]"]
    values = {"head_dim": 32, "rope_theta": 1e4, "attention_bias": True, "layer_types": ["full_attention"]}
    base = ["--model_name_or_path", "m", "--dataset_name", "d.jsonl", "--reward_funcs", "[exact_answer]"]
    assert parse_config([*base, *options]).model_init_kwargs == values
    assert parse_config([*base, "--model_init_kwargs", json.dumps(values)]).model_init_kwargs == values
