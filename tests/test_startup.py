"""The start of the program: Ctrl-C during imports, and non-ASCII paths under any locale."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from grpo_fast.cli import main

ROOT = Path(__file__).parent.parent
INTERRUPTING = """
import os, signal, time
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(60)
except KeyboardInterrupt:
    raise ImportError("swallowed")
"""
RECIPE = {
    "model_name_or_path": "random-llama",
    "model_init_kwargs": {"hidden_size": 32, "intermediate_size": 32},
    "dataset_name": "zahlen_é.jsonl",
    "prompt_template": "{größe}>",
    "reward_funcs": ["länge_ö.py:länge"],
    "num_generations": 2,
    "generation_batch_size": 2,
    "max_completion_length": 2,
    "max_steps": 1,
    "use_cpu": True,
}
REWARD = """
from grpo_fast.rewards import isolated
@isolated()
def länge(prompts, completions, **columns):
    return [float(len(completion)) for completion in completions]
"""
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}


def program(*arguments, folder, **environment):
    path = os.pathsep.join([str(folder), str(ROOT), str(ROOT / "kernels")])
    return subprocess.run(
        [sys.executable, "-m", "grpo_fast", *arguments],
        env={**os.environ, "PYTHONPATH": path, **environment},
        cwd=folder, capture_output=True, timeout=120,
    )  # fmt: skip


@pytest.mark.parametrize("module", ["torch", "accelerate"])
def test_program_interrupted_during_an_import_prints_no_traceback(tmp_path, module):
    """Even if the library swallows the exception; the command imports accelerate, and torch is imported before."""
    (tmp_path / f"{module}.py").write_text(INTERRUPTING)
    done = program("train", "sort", folder=tmp_path)
    assert done.stderr.decode() == "\ngrpo-fast: interrupted\n"
    assert done.returncode == 130


def test_program_installed_is_the_one_tested():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"grpo-fast": "grpo_fast.__main__:main"}


def test_program_under_an_ascii_locale_accepts_unicode_paths(tmp_path):
    folder = tmp_path / "läufe"
    folder.mkdir()
    rows = [json.dumps({"größe": str(number)}, ensure_ascii=False) for number in range(10, 20)]
    (folder / "zahlen_é.jsonl").write_text("\n".join(rows), encoding="utf-8")
    (folder / "länge_ö.py").write_text(REWARD, encoding="utf-8")
    (folder / "rezept_ü.yaml").write_text(json.dumps(RECIPE, ensure_ascii=False), encoding="utf-8")
    done = program("train", "rezept_ü.yaml", "--output_dir", "lauf_ß", folder=folder, **ASCII)
    assert done.returncode == 0, done.stderr.decode()
    assert r"lauf_\xdf/checkpoint-1" in done.stdout.decode("ascii")
    summary = json.loads((folder / "lauf_ß" / "summary.json").read_text(encoding="utf-8"))
    assert summary["metric"] == "länge"


def test_main_refuses_arguments_that_are_not_unicode(capsys):
    assert main(["train", "rezept_\udce4.yaml"]) == 2
    assert capsys.readouterr().err == "grpo-fast: error: 'rezept_\\udce4.yaml' is not allowed: it must be UTF-8 text\n"
