"""examples/grpo_fast.ipynb: its code compiles and names what exists, and the whole notebook runs."""

import ast
import builtins
import importlib
import json
import os
import sys
import time
from pathlib import Path

import pytest

from grpo_fast import GRPOConfig

NOTEBOOK = Path(__file__).parent.parent / "examples" / "grpo_fast.ipynb"
FIELDS = set(GRPOConfig.__dataclass_fields__)


def cells(kind: str) -> list[dict]:
    content = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    return [cell for cell in content["cells"] if cell["cell_type"] == kind]


def code() -> str:
    """All code, without IPython's own commands."""
    lines = "\n".join("".join(cell["source"]) for cell in cells("code")).splitlines()
    return "\n".join(line.replace(line.lstrip(), "pass") if line.lstrip().startswith("%") else line for line in lines)


def test_notebook_is_stored_without_outputs():
    assert len(cells("code")) >= 8
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells("code"))


def test_notebook_imports_what_exists():
    for node in ast.walk(ast.parse(code())):
        if isinstance(node, ast.ImportFrom) and node.module != "IPython.display":
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


def test_notebook_uses_only_names_that_it_defines():
    """In order: a cell uses what it or an earlier one has made."""
    known = set(dir(builtins))
    for statement in ast.parse(code()).body:
        stored = {
            node.id for node in ast.walk(statement) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
        }
        stored |= {node.arg for node in ast.walk(statement) if isinstance(node, ast.arg)}
        stored |= {getattr(statement, "name", "")}
        for node in ast.walk(statement):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                stored |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
        used = {
            node.id for node in ast.walk(statement) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
        }
        assert used <= known | stored, used - known - stored
        known |= stored


def test_notebook_sets_fields_that_exist():
    tree, found = ast.parse(code()), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "GRPOConfig":
            found |= {keyword.arg for keyword in node.keywords if keyword.arg}
    names = {"common": {}, "gpus": {}}
    for statement in tree.body:
        target = getattr(statement, "targets", [None])[0]
        if isinstance(target, ast.Name) and target.id in names:
            names[target.id] = ast.literal_eval(statement.value)
    assert set(names["gpus"]) == {"T4", "L4", "A100"}
    for fields in names["gpus"].values():
        config = GRPOConfig(**names["common"], **fields)
        assert config.max_completion_length + 256 <= config.max_tokens_per_microbatch
    assert names["gpus"]["T4"]["dtype"] == "float32"
    assert found <= FIELDS
    assert len(found) > 10
    text = "".join("".join(cell["source"]) for cell in cells("markdown"))
    assert all(gpu in text for gpu in names["gpus"])


@pytest.mark.long
@pytest.mark.timeout(900)
def test_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    kernelspec = pytest.importorskip("ipykernel.kernelspec")
    # A kernel in this environment, whatever the user has registered.
    kernelspec.write_kernel_spec(str(tmp_path / "kernels" / "python3"))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    # Threads that wait for each other make no progress on a machine that is busy with something else.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("TRAIN_ON_GPU", raising=False)
    book = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(book)
    start = time.process_time(), os.times().children_user
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(book, timeout=800, kernel_name="python3", resources=resources).execute()
    # What the kernel used of the CPU, which does not depend on the machine's load.
    print(f"{os.times().children_user - start[1]:.0f} s of CPU time in the kernel")
    printed = "".join(
        output.get("text", "") for cell in book.cells if cell.cell_type == "code" for output in cell.outputs
    )
    assert "after 200 steps" in printed
    before, after = printed.partition("exact: ")[2].split("% ")[0], printed.partition("before, ")[2].split("%")[0]
    assert float(after) > float(before) + 30
    assert printed.count(" fits ") == 3
    kinds = {
        kind for cell in book.cells if cell.cell_type == "code" for out in cell.outputs for kind in out.get("data", {})
    }
    assert "image/png" in kinds
