"""Every function, class and constant of the packages' modules is used: by code, by users, or by its dotted name."""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = {"grpo_fast": ROOT / "grpo_fast", "grpo_kernels": ROOT / "kernels" / "grpo_kernels"}
PROGRAMS = {"benchmarks": ROOT / "benchmarks", "examples": ROOT / "examples"}
# Other people's programs import what these modules define.
FOR_USERS = "grpo_fast.integrations."
EXCEPTIONS = {
    "grpo_fast.files.read_metrics": "the tests of several folders read the metrics of whole runs with it",
}


def read_modules(folders: dict[str, Path]) -> dict[str, ast.Module]:
    """The syntax tree of every module, by the module's name."""
    trees = {}
    for package, folder in folders.items():
        for path in sorted(folder.rglob("*.py")):
            parts = (package, *path.relative_to(folder).with_suffix("").parts)
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            trees[name] = ast.parse(path.read_text(encoding="utf-8"))
    return trees


def definitions(tree: ast.Module) -> Iterator[tuple[str, ast.stmt]]:
    """The names that a module defines, each with the statement that does.

    Dunder names are left out, and so is `main`: scripts, ``python -m`` and the sandbox's program start with it.
    """
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names = [node.name]
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [target.id for target in targets if isinstance(target, ast.Name)]
        else:
            continue
        yield from ((name, node) for name in names if name != "main" and not name.startswith("__"))


def used_inside(name: str, definition: ast.stmt, tree: ast.Module) -> bool:
    """Whether a module reads one of its own names outside the statement that defines it, or lists it in __all__."""
    for node in tree.body:
        if node is not definition:
            listed = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
            for part in ast.walk(node):
                if isinstance(part, ast.Name) and part.id == name and isinstance(part.ctx, ast.Load):
                    return True
                if listed and isinstance(part, ast.Constant) and part.value == name:
                    return True
    return False


def used_outside(trees: dict[str, ast.Module]) -> set[str]:
    """The dotted names that modules import, reach through an imported module, or hold in strings."""
    used = set()
    for tree in trees.values():
        modules = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    used.add(f"{node.module}.{alias.name}")
                    modules[alias.asname or alias.name] = f"{node.module}.{alias.name}"
            elif isinstance(node, ast.Import):
                modules |= {alias.asname or alias.name: alias.name for alias in node.names}
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                used.update(node.value.split())
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, (ast.Name, ast.Attribute)):
                owner = ast.unparse(node.value)
                used.add(f"{modules.get(owner, owner)}.{node.attr}")
    return used


def find_unused(packages: dict[str, ast.Module], programs: dict[str, ast.Module]) -> list[str]:
    """The dotted names that the packages' modules define, and that neither they nor the programs use."""
    used = used_outside(packages | programs)
    return [
        f"{module}.{name}"
        for module, tree in packages.items()
        for name, definition in definitions(tree)
        if f"{module}.{name}" not in used and not used_inside(name, definition, tree)
    ]


def test_every_definition_is_used():
    unused = find_unused(read_modules(PACKAGES), read_modules(PROGRAMS))
    unused = [name for name in unused if name not in EXCEPTIONS and not name.startswith(FOR_USERS)]
    assert not unused, "remove what nothing uses but tests:\n  " + "\n  ".join(unused)


def test_find_unused_knows_each_kind_of_use():
    sources = {
        "p.a": """
            __all__ = ["listed"]
            LIMIT: int = 3
            unused_constant = LIMIT
            def listed(): ...
            def imported(): ...
            def reached(): ...
            def renamed(): ...
            def named_in_a_string(): ...
            def unused(): return unused()
            class Unused: ...
            """,
        "p.b": "import p.a\nfrom p.a import imported\nfrom p import a as other\nother.renamed(p.a.reached)",
        "p.c": "worker = 'p.a.named_in_a_string'\nprint(worker)\nfrom p.elsewhere import unused",
    }
    trees = {name: ast.parse(textwrap.dedent(source)) for name, source in sources.items()}
    assert find_unused({"p.a": trees["p.a"]}, trees) == ["p.a.unused_constant", "p.a.unused", "p.a.Unused"]
