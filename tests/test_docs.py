"""docs/: links and commands name what exists, snippets run, and tables and references are complete."""

import dataclasses
import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.plots import fill_tables
from grpo_fast.cli import parse_config
from grpo_fast.config import TRL_FIELDS_INSTEAD, GRPOConfig
from grpo_fast.trainer import GRPOTrainer
from grpo_kernels import PRESETS

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [
    ROOT / "README.md",
    ROOT / "kernels" / "README.md",
    ROOT / "benchmarks" / "README.md",
    *sorted(DOCS.rglob("*.md")),
]
HOW_TO = sorted((DOCS / "how-to").glob("*.md"))
FIELDS = {field.name for field in dataclasses.fields(GRPOConfig)}
# A block that begins with its name is a file of the reader's.
FILE = re.compile(r"# (\w+\.(?:py|yaml))\n")


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def blocks(path: Path, *languages: str) -> list[str]:
    return [code for language, code in re.findall(r"```(\w+)\n(.*?)```", text(path), re.S) if language in languages]


def anchors(path: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", text(path), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def write_files(path: Path, folder: Path) -> None:
    for code in blocks(path, "python", "yaml"):
        if found := FILE.match(code):
            (folder / found[1]).write_text(code)


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_links(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", text(path)):
        if target.startswith("https://"):
            continue
        file, _, anchor = target.partition("#")
        place = (path.parent / file).resolve() if file else path
        assert place.exists(), target
        assert not anchor or anchor in anchors(place), target


def test_index_lists_every_page():
    linked = {(DOCS / target).resolve() for target in re.findall(r"\]\(([\w./-]+\.md)\)", text(DOCS / "index.md"))}
    assert set(DOCS.rglob("*.md")) - {DOCS / "index.md"} <= linked
    # One line each.
    assert all(": " in line for line in text(DOCS / "index.md").splitlines() if line.startswith("- "))


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_make_targets_exist(path):
    targets = set(re.findall(r"^([\w-]+):", text(ROOT / "Makefile"), re.M))
    assert set(re.findall(r"(?:^|`)make ([\w-]+)", text(path), re.M)) <= targets


@pytest.mark.parametrize("path", [*HOW_TO, DOCS / "rewards-and-data.md", DOCS / "migration.md"], ids=name)
def test_python_runs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    write_files(path, tmp_path)
    before, names = dict(PRESETS), {"__name__": "snippet"}
    try:
        for code in blocks(path, "python"):
            exec(code, names)
    finally:
        PRESETS.clear()
        PRESETS.update(before)
        for file in tmp_path.glob("*.py"):
            sys.modules.pop(file.stem, None)


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_train_commands_are_valid(path, tmp_path, monkeypatch):
    """Those whose files exist; names in capitals are the reader's."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    write_files(path, tmp_path)
    for line in re.findall(r"^grpo-fast train ([a-z].*)", "\n".join(blocks(path, "bash")), re.M):
        parse_config([argument for argument in shlex.split(line, comments=True) if argument != "--print_config"])


def test_task_of_the_how_to_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = DOCS / "how-to" / "add-a-task.md"
    write_files(page, tmp_path)
    exec(next(code for code in blocks(page, "python") if "reverse.jsonl" in code), {})
    options = ["--max_steps", "2", "--generation_batch_size", "32", "--max_eval_samples", "4", "--output_dir", "run"]
    summary = GRPOTrainer(parse_config(["reverse.yaml", *options])).train()
    assert summary.metric == "exact_answer"
    assert (tmp_path / "run" / "checkpoint-2").is_dir()


def test_tables_are_those_of_the_csv_files():
    marked = [path for path in PAGES if "<!-- table: " in text(path)]
    assert DOCS / "benchmarks.md" in marked
    for path in marked:
        assert fill_tables(text(path), ROOT / "benchmarks" / "results") == text(path), name(path)


def test_migration_names_our_fields():
    """The second column of the tables of other trainers."""
    rows = re.findall(r"^\| (.*?) \| (.*?) \|", text(DOCS / "migration.md"), re.M)
    ours = {field for _, cell in rows for field in re.findall(r"`([a-z_0-9]+)`", cell)}
    assert len(ours) > 60
    assert ours <= FIELDS


def test_migration_names_every_field_that_trl_calls_otherwise():
    table = text(DOCS / "migration.md").partition("## verl")[0]
    for field in TRL_FIELDS_INSTEAD:
        assert f"`{field}`" in table, field


def test_migration_covers_trl():
    trl = pytest.importorskip("trl", minversion="1.16")
    table = text(DOCS / "migration.md").partition("## verl")[0]
    own = trl.GRPOConfig.__annotations__.keys() - {"_VALID_DICT_FIELDS"}
    assert [field for field in own if field not in FIELDS and f"`{field}`" not in table] == []


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("api")
    done = subprocess.run(
        [sys.executable, DOCS / "build_api.py", folder], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert "Warn" not in done.stderr, done.stderr
    return folder


# Of modules without __all__, the documented names.
DOCUMENTED = {
    "grpo_fast.integrations.liger": ["FusedLinearGRPOLoss"],
    "grpo_fast.integrations.trl": ["FusedGRPOTrainer"],
    "grpo_fast.integrations.verl": ["install", "linear_cross_entropy"],
}


@pytest.mark.parametrize("module", ["grpo_kernels", "grpo_fast", "grpo_fast.rewards", *DOCUMENTED])
def test_every_public_name_is_in_the_reference(module, reference):
    if module.endswith(".trl"):
        pytest.importorskip("trl", minversion="1.16")
    public = DOCUMENTED.get(module) or importlib.import_module(module).__all__
    page = text(reference / (module.replace(".", "/") + ".html"))
    table = text(DOCS / "api.md")
    for public_name in public:
        submodule = f"{module}.integrations.{public_name}".replace(".", "/")
        assert f'<section id="{public_name}"' in page or (reference / f"{submodule}.html").exists(), public_name
        assert re.search(rf"`(\w+\.)?{public_name}`", table), public_name
