"""Columns, completions, file names and server answers are text: they cannot control a terminal or fill the memory."""

import ast
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from rich.table import Table

import grpo_fast
from grpo_fast.cli import main, parse_config
from grpo_fast.config import GRPOConfig
from grpo_fast.errors import UserError, one_line, printable
from grpo_fast.evaluation.progress import EvalProgress
from grpo_fast.evaluation.run import SETTINGS, check_settings
from grpo_fast.files import LONGEST_INTEGER, YAML_BYTES, parse_json, read_yaml
from grpo_fast.model.loading import load_trained
from grpo_fast.report import Summary
from grpo_fast.report.console import Terminal
from grpo_fast.report.progress import Progress
from grpo_fast.report.run import read_run
from grpo_fast.rewards.engine import RewardModel

# Clears the screen, sets the title, writes to the clipboard, moves up, rings, overwrites the line, reverses the text.
ATTACKS = ["\x1b[2J", "\x1b]0;owned\x07", "\x1b]52;c;cm0gLXJm\x1b\\", "\x9b1A", "\a", "50%\r99%", "a\bb", "\u202egnp"]
ATTACK = "".join(ATTACKS)
# What rich itself sends: colours, cursor movements, erasures.
RICH = re.compile(r"\x1b\[\??[\d;]*[mKAhlG]|\r")
COMMANDS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


@pytest.mark.parametrize("text", ["plain\ttext\n", "naïve 数学 ∑ é", "👩‍🔬 👨‍👩‍👧", "فارسی\u200cنویسی", "\u200fعربية"])
def test_printable_keeps_text_of_any_language(text):
    assert printable(text) == text


@pytest.mark.parametrize("attack", [*ATTACKS, "\ud800", "\u2028", "\x00", "\x7f"])
def test_printable_escapes_control_characters(attack):
    for shown in (printable(f"a{attack}b"), one_line(f"a{attack}b"), one_line(ValueError(f"a{attack}b"))):
        assert not COMMANDS.search(shown)
        assert shown.isprintable()
        assert shown[0] + shown[-1] == "ab"
    assert printable("one\r\ntwo") == "one\ntwo"


@pytest.mark.parametrize("is_terminal", [True, False])
def test_terminal_prints_markup_and_control_characters_as_text(is_terminal):
    console = Terminal(force_terminal=is_terminal, file=io.StringIO(), width=4000)
    hostile = f"[red]{ATTACK}[/] :smile: [link=http://example.org]x[/link] [/]"
    table = Table(hostile, title=hostile, caption=hostile)
    table.add_row(hostile)
    console.print(hostile, soft_wrap=True, style="yellow")
    console.print(table)
    text = console.file.getvalue()
    assert ("\x1b[" in text) == is_terminal
    plain = RICH.sub("", text)
    assert not COMMANDS.search(plain)
    assert plain.count(printable(hostile)) == 5


@pytest.fixture
def terminal(monkeypatch):
    """Progress displays write to a terminal whose output can be read."""
    sent = io.StringIO()
    for package in ("report", "evaluation"):
        terminal = lambda **options: Terminal(**options, force_terminal=True, file=sent, width=4000)  # noqa: E731
        monkeypatch.setattr(f"grpo_fast.{package}.progress.Terminal", terminal)
    return sent


def test_progress_prints_control_characters_as_text(terminal):
    config = GRPOConfig(f"m{ATTACK}", dataset_name=f"d{ATTACK}", reward_funcs=["r"])
    progress = Progress(config, Path(f"runs/{ATTACK}"), f"metric{ATTACK}", 1000)
    metrics = {"step": 1, "reward": 0.5, "completions/mean_length": 3.0, "tokens_per_second": 9.0}
    with progress:
        progress.phase(f"loading {ATTACK}")
        progress.warn(f"'r' fails for the prompt {ATTACK}")
        progress.started(0.1)
        progress.update({**metrics, f"rewards/metric{ATTACK}/mean": 0.5})
        progress.evaluated(1, 0.5, True)
    progress.stopped(1, Path(f"{ATTACK}/checkpoint-1"))
    progress.finished(Summary(f"metric{ATTACK}", 0.1, 0.2, 5.0, 1), Path(ATTACK))
    assert "metric\\x1b[2J" in terminal.getvalue()
    assert not COMMANDS.search(RICH.sub("", terminal.getvalue()))


def test_eval_progress_prints_control_characters_as_text(terminal):
    estimate = {"value": 0.5, "low": 0.4, "high": 0.6, "standard_error": 0.1}
    summary = {"metrics": {ATTACK: {ATTACK: estimate}}, "compared_with": ATTACK, "mean_length": 3, "clipped_ratio": 0}
    progress = EvalProgress(f"model {ATTACK}", 1, ATTACK, Path(ATTACK))
    with progress:
        progress.update([{"index": 0, "rewards": {ATTACK: 1.0}}])
    progress.stopped(f"grpo-fast eval {ATTACK}")
    progress.finished(summary)
    assert "\\x1b[2J" in terminal.getvalue()
    assert not COMMANDS.search(RICH.sub("", terminal.getvalue()))


def test_commands_print_errors_and_paths_as_text(tmp_path, monkeypatch, capsys):
    """An error of any command is one line, whatever it names."""
    monkeypatch.setenv("COLUMNS", "4000")
    folder = tmp_path / f"run{ATTACK}\nsecond line"
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump({"reward_funcs": ["r"], "run_name": f"$x^ [/] {ATTACK}"}))
    lines = [{"step": step, "reward": 0.5, "rewards/r/mean": 0.5} for step in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["report", str(folder)]) == 0
    assert main(["compare", str(folder), str(folder), "--output", str(folder / "c.png")]) == 0
    for wrong in (["report", str(folder / "x")], ["train", str(folder / "x.yaml")], [ATTACK], ["train", f"--{ATTACK}"]):
        assert main(wrong) == 2
    RewardModel(["exact_answer"], None).warn(ATTACK)
    printed = capsys.readouterr()
    assert "$x^ [/] \\x1b[2J" in printed.out
    for text in printed:
        assert not COMMANDS.search(text)
    assert all(line.startswith(("grpo-fast: error: ", "warning: ")) for line in printed.err.splitlines())


def test_tracebacks_and_warnings_are_printed_as_text():
    """Python itself prints unexpected errors."""
    program = f"""
import warnings
from grpo_fast import cli

def fail(argv):
    warnings.warn("warned " + {ATTACK!r})
    raise RuntimeError("failed " + {ATTACK!r})

cli.COMMANDS["fail"] = fail
cli.main(["fail"])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1
    assert "UserWarning: warned \\x1b[2J" in done.stderr
    assert "Traceback (most recent call last)" in done.stderr
    assert "RuntimeError: failed \\x1b[2J" in done.stderr
    assert not COMMANDS.search(done.stderr)


def test_package_prints_only_constants_by_print():
    """Everything else goes through `Terminal` or `say`."""
    folder = Path(grpo_fast.__file__).parent
    for file in sorted(set(folder.rglob("*.py")) - {folder / "report" / "console.py", folder / "errors.py"}):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                assert "Console" not in [alias.name for alias in node.names], file
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
                names = {part.id for argument in node.args for part in ast.walk(argument) if isinstance(part, ast.Name)}
                assert all(name.isupper() or name == "__version__" for name in names), f"{file}:{node.lineno}"


def bomb(levels, merge=False):
    """YAML whose aliases stand for 9**levels values."""
    lines = ["a0: &a0 {x: lol}" if merge else "a0: &a0 [lol]"]
    for level in range(1, levels + 1):
        aliases = ", ".join([f"*a{level - 1}"] * 9)
        lines.append(f"a{level}: &a{level} {{<<: [{aliases}]}}" if merge else f"a{level}: &a{level} [{aliases}]")
    return "\n".join(lines)


HOSTILE_YAML = {
    "billion laughs": (bomb(9), r"the aliases of .* stand for more than 4,194,304 characters, or for themselves"),
    "merged laughs": (bomb(9, merge=True), "the aliases of"),
    "long text": ("a: &a " + "x" * 100_000 + "\nb: [" + "*a, " * 100 + "]", "the aliases of"),
    "itself": ("model_init_kwargs: &a {b: *a}", "or for themselves"),
    "deep": ("model_init_kwargs: " + "[" * 5000, "is not valid YAML: nested too deeply"),
    "deep blocks": ("\n".join(" " * depth + "a:" for depth in range(1200)), "is not valid YAML: nested too deeply"),
    "large": ("a: " + "x" * YAML_BYTES, r"is too large: a YAML file may have 1,048,576 bytes"),
    "long integer": ("seed: 0x" + "f" * LONGEST_INTEGER, "is not valid YAML: an integer of 102 characters"),
    "13th month": ("run_name: 2026-13-01", "is not valid YAML: month must be in"),
    "wrong tag": ("seed: !!int ''", "is not valid YAML"),
    "code": ("seed: !!python/object/apply:os.system ['true']", "is not valid YAML: could not determine a constructor"),
}


@pytest.mark.parametrize(("text", "message"), HOSTILE_YAML.values(), ids=HOSTILE_YAML)
def test_read_yaml_refuses_hostile_files(tmp_path, text, message):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    read_options = (["{}"], ["--config", "{}"], ["--seed=1", "--config={}"])
    readers = [lambda path, words=words: parse_config([word.format(path) for word in words]) for words in read_options]
    for read in (read_yaml, *readers):
        with pytest.raises(UserError, match=message) as error:
            read(path)
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 1000
    path = tmp_path / "prompt.yaml"
    path.write_text(text)
    from grpo_fast.data.templates import read_prompt_file

    with pytest.raises(UserError, match=message):
        read_prompt_file(str(path))


def test_read_yaml_allows_aliases(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(bomb(3) + "\nb: {<<: {c: &d 1}, e: *d}\n")
    assert read_yaml(path) == yaml.safe_load(path.read_text())
    path.write_text("")
    assert read_yaml(path) is None


@pytest.mark.parametrize("text", ["[" * 100_000, "1" * 5000])
def test_readers_report_nested_json_in_one_line(tmp_path, text):
    for name in (SETTINGS, "adapter_config.json", "summary.json", "config.yaml"):
        (tmp_path / name).write_text("{}" if name == "config.yaml" else text)
    config = GRPOConfig(str(tmp_path), dataset_name="d", reward_funcs=["r"])
    for read in (lambda: check_settings(tmp_path, {}), lambda: load_trained(config), lambda: read_run(tmp_path)):
        with pytest.raises(UserError, match=r"damaged|not valid") as error:
            read()
        assert "\n" not in str(error.value)


def test_parse_json_reports_nesting_as_a_value_error():
    assert parse_json('{"a": [1.5, null]}') == {"a": [1.5, None]}
    for text in ("[" * 100_000, '{"a":' * 100_000, "1" * 5000, "{"):
        with pytest.raises(ValueError, match=r"nested too deeply|Exceeds the limit|Expecting"):
            parse_json(text)
