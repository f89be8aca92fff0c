"""The Makefile's targets: their help texts, the files and markers they name, and what the documents say of them."""

import os
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Where a fresh environment would be made, so that every command is printed whatever is installed.
FRESH = ("VENV=.venv-none", "OLDEST_VENV=.venv-none-oldest", "VLLM_VENV=.venv-none-vllm")


def make(*arguments: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "ARGS")}
    return subprocess.run(
        ["make", "--no-print-directory", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def read_targets() -> dict[str, str]:
    """The group of each target, by its name, as `make help` lists them."""
    groups, group = {}, None
    for line in make("help").splitlines():
        if line.startswith("  make "):
            groups[line.split()[1]] = group
        elif line:
            group = line
    return groups


TARGETS = read_targets()


def test_help_groups_the_targets():
    assert list(dict.fromkeys(TARGETS.values()))[:4] == ["Run", "Test", "Bench", "Check"]
    assert all(TARGETS[name] == "Test" for name in TARGETS if name.startswith("test"))
    assert all(TARGETS[name] == "Bench" for name in TARGETS if name.startswith("bench"))


def test_help_lists_every_target():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    phony = re.search(r"^\.PHONY: ((?:.*\\\n)*.*)", makefile, re.MULTILINE)[1].replace("\\\n", " ").split()
    assert {*phony} == {"help", *TARGETS}
    assert {*re.findall(r"^([a-z][a-z0-9-]*):", makefile, re.MULTILINE)} == {*phony}


@pytest.mark.parametrize("target", TARGETS)
def test_commands_name_what_exists(target):
    """Files, modules, markers and tests; each may have moved since the command was written."""
    commands = make("--dry-run", *FRESH, target)
    paths = set(re.findall(r"(?:tests|examples|benchmarks|kernels|docs)/[\w./-]*\w", commands))
    assert not [path for path in paths if not (ROOT / path).exists()]
    for module in re.findall(r"-m ((?:benchmarks|grpo_kernels)[\w.]+)", commands):
        names = [module.replace(".", "/") + end for end in (".py", "/__main__.py")]
        assert any((ROOT / folder / name).exists() for folder in ("", "kernels") for name in names), module
    markers = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["pytest"]["ini_options"]
    known = {line.partition(":")[0] for line in markers["markers"]}
    for selection in re.findall(r"pytest .*?-m (\"[^\"]+\"|\w+)", commands):
        assert {*re.findall(r"\w+", selection)} - {"not", "and"} <= known
    for path, words in re.findall(r"(tests/\S+\.py) -k (\w+)", commands):
        assert re.search(rf"^def test_\w*{words}", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE)


def test_documents_name_existing_targets():
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("[a-z]*/README.md")]:
        prose, *blocks = re.split(r"^```\w*\n", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
        named = re.findall(r"`make\s+([a-z][a-z0-9-]*)", "\n".join([prose, *blocks[1::2]]))
        named += re.findall(r"^make ([a-z][a-z0-9-]*)", "\n".join(blocks[::2]), re.MULTILINE)
        assert {*named} <= {"help", *TARGETS}, path.relative_to(ROOT)


@pytest.mark.parametrize("marker", ["slow", "long", "gpu", "vllm", "benchmark"])
def test_every_marker_selects_tests(marker):
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")]
    assert any(re.search(rf"pytest\.mark\.{marker}\b", source) for source in sources)
