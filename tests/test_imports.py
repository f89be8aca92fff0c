"""Which module imports which, read from their sources: no circles, and every arrow points down.

``python tests/test_imports.py`` draws the floors.
"""

from __future__ import annotations

import ast
import sys
import textwrap
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {"grpo_fast": ROOT / "grpo_fast", "grpo_kernels": ROOT / "kernels" / "grpo_kernels"}
# The floors from the top down, and the rooms on each. A room is a module or a package with all that is in it, less the
# rooms that have a longer name; the package itself, `grpo_fast`, is its ``__init__.py`` alone.
FLOORS = (
    ("grpo_fast", "policy"),
    ("cli", "__main__"),
    ("distillation",),
    ("trainer", "sft"),
    ("evaluation", "integrations", "arguments"),
    ("memory", "train"),
    ("rollout", "report"),
    ("distributed",),
    ("data", "model"),
    ("convert", "recipes"),
    ("config", "files", "named_functions", "rewards"),
    ("grpo_kernels", "errors", "startup"),
)
# What the kernels may need beside Python's own modules.
KERNELS_NEED = {"grpo_kernels", "torch", "triton"}


class Arrow(NamedTuple):
    """An import of one module by another; `early` if it happens when the importing module is imported itself."""

    source: str
    target: str
    line: int
    early: bool

    def __str__(self) -> str:
        return f"{self.source} -> {self.target} (line {self.line})"


def find_modules(packages: dict[str, Path]) -> dict[str, Path]:
    """The source file of every module of the packages, by the module's name."""
    modules = {}
    for package, folder in packages.items():
        for path in sorted(folder.rglob("*.py")):
            parts = (package, *path.relative_to(folder).with_suffix("").parts)
            modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return modules


def read_arrows(modules: dict[str, Path]) -> list[Arrow]:
    """Every import in the modules, of each other or of anything else."""
    return [arrow for name in modules for arrow in arrows_of(name, modules)]


def arrows_of(name: str, modules: dict[str, Path]) -> Iterator[Arrow]:
    """The imports in one module. ``from package import submodule`` leads to the submodule, not to the package."""
    path = modules[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node, early in _imports(ast.parse(path.read_text(encoding="utf-8")), early=True):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        else:
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *filter(None, [node.module])])
            inside = [f"{base}.{alias.name}" for alias in node.names]
            targets = [target if target in modules else base for target in inside]
        for target in dict.fromkeys(targets):
            if target != name:
                yield Arrow(name, target, node.lineno, early)


def _imports(node: ast.AST, early: bool) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        yield node, early
    elif isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
        for part, now in ((node.body, False), (node.orelse, early)):
            for child in part:
                yield from _imports(child, now)
    else:
        later = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            yield from _imports(child, early and not later)


def find_circles(arrows: Iterable[tuple[str, str]]) -> list[list[str]]:
    """The groups of names that all lead to each other (Tarjan's strongly connected components)."""
    graph: dict[str, set[str]] = {}
    for source, target in arrows:
        graph.setdefault(source, set()).add(target)
        graph.setdefault(target, set())
    numbers: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    circles = []

    def visit(name: str) -> None:
        numbers[name] = lowest[name] = len(numbers)
        stack.append(name)
        for target in sorted(graph[name]):
            if target not in numbers:
                visit(target)
            if target in stack:
                lowest[name] = min(lowest[name], lowest[target])
        if lowest[name] == numbers[name]:
            group = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            if len(group) > 1:
                circles.append(sorted(group))

    for name in sorted(graph):
        if name not in numbers:
            visit(name)
    return sorted(circles)


def room_of(module: str, floors: tuple[tuple[str, ...], ...]) -> tuple[int, str] | None:
    """The floor, counted from the top, and the room of a module; None for one that stands nowhere."""
    found = None
    for floor, rooms in enumerate(floors):
        for room in rooms:
            whole = room if room in PACKAGES else f"grpo_fast.{room}"
            inside = module.startswith(f"{whole}.") and room != "grpo_fast"
            if (module == whole or inside) and (found is None or len(room) > len(found[1])):
                found = floor, room
    return found


def draw_floors(arrows: Iterable[Arrow], modules: Iterable[str], floors: tuple[tuple[str, ...], ...]) -> str:
    """A table with a line for each room: its floor, its modules, the rooms it imports, and ``^`` for those above."""
    places = {module: room_of(module, floors) for module in modules}
    lines = [("floor", "room", "modules", "imports")]
    for floor, rooms in enumerate(floors):
        for room in rooms:
            inside = [module for module, place in places.items() if place == (floor, room)]
            reached = {
                places[arrow.target]
                for arrow in arrows
                if places.get(arrow.target) and places.get(arrow.source) == (floor, room)
            } - {(floor, room)}
            names = [f"{'^' * (place[0] < floor)}{place[1]}" for place in sorted(reached)]
            lines.append((str(len(floors) - 1 - floor), room, str(len(inside)), ", ".join(names)))
    widths = [max(len(line[column]) for line in lines) for column in range(3)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(line, widths, strict=False)), line[3]]).rstrip()
        for line in lines
    )


@pytest.fixture(scope="module")
def modules():
    return find_modules(PACKAGES)


@pytest.fixture(scope="module")
def arrows(modules):
    return [arrow for arrow in read_arrows(modules) if arrow.target in modules]


@pytest.mark.parametrize("when", ["imported", "ever"])
def test_imports_form_no_circles(arrows, when):
    """Neither while modules are imported, nor with what functions import when they are called."""
    counted = [arrow for arrow in arrows if arrow.early or when == "ever"]
    circles = find_circles((arrow.source, arrow.target) for arrow in counted)
    within = [
        [str(arrow) for arrow in counted if arrow.source in circle and arrow.target in circle] for circle in circles
    ]
    assert not circles, "circles of imports:\n\n" + "\n\n".join("\n".join(lines) for lines in within)


def test_kernels_import_only_torch_and_triton(modules):
    foreign = [
        str(arrow)
        for arrow in read_arrows({name: path for name, path in modules.items() if name.startswith("grpo_kernels")})
        if arrow.target.split(".")[0] not in KERNELS_NEED | sys.stdlib_module_names
    ]
    assert not foreign, "\n".join(foreign)


def test_floors_hold_every_module(modules):
    homeless = [module for module in modules if room_of(module, FLOORS) is None]
    assert not homeless, f"add to FLOORS: {', '.join(homeless)}"
    rooms = [room for floor in FLOORS for room in floor]
    assert len(set(rooms)) == len(rooms)
    empty = set(rooms) - {room_of(module, FLOORS)[1] for module in modules}
    assert not empty, f"no module is left of {', '.join(sorted(empty))}"


def test_imports_point_down(arrows):
    """Also those inside functions and for type checkers alone: a floor knows nothing of those above it."""
    upward = [str(arrow) for arrow in arrows if room_of(arrow.source, FLOORS)[0] > room_of(arrow.target, FLOORS)[0]]
    assert not upward, "imports of a module on a floor above:\n  " + "\n  ".join(upward)


def test_imports_between_rooms_of_a_floor_form_no_circles(arrows):
    rooms = {(room_of(arrow.source, FLOORS), room_of(arrow.target, FLOORS)) for arrow in arrows}
    circles = find_circles((source[1], target[1]) for source, target in rooms if source[0] == target[0])
    assert not circles, "circles of rooms:\n" + "\n".join("  " + ", ".join(circle) for circle in circles)


@pytest.fixture
def package(tmp_path):
    """Writes a package named p, and reads its modules."""

    def write(**sources):
        for name, source in sources.items():
            path = tmp_path / (name.replace("__", "/") + ".py")
            path.parent.mkdir(exist_ok=True)
            path.write_text(textwrap.dedent(source))
        for folder in {tmp_path, *(path.parent for path in tmp_path.rglob("*.py"))}:
            (folder / "__init__.py").touch()
        return find_modules({"p": tmp_path})

    return write


def test_arrows_of_reads_all_forms_of_imports(package):
    modules = package(
        a="""
            import os.path, p.b
            import p.c as c
            from p import d, x
            from p.sub import e
            from p.sub.e import f
            from . import g
            from .sub import h, y
            """,
        b="", c="", d="", g="",
        sub__e="from .. import b\nfrom ..c import z\nfrom . import h\nfrom .h import *\n",
        sub__h="",
    )  # fmt: skip
    assert list(modules) == ["p", "p.a", "p.b", "p.c", "p.d", "p.g", "p.sub", "p.sub.e", "p.sub.h"]
    found = ["os.path", "p.b", "p.c", "p.d", "p", "p.sub.e", "p.sub.e", "p.g", "p.sub.h", "p.sub"]
    assert [arrow.target for arrow in arrows_of("p.a", modules)] == found
    assert [arrow.target for arrow in arrows_of("p.sub.e", modules)] == ["p.b", "p.c", "p.sub.h", "p.sub.h"]
    assert all(arrow.early for arrow in read_arrows(modules))


def test_arrows_of_tells_late_imports_apart(package):
    modules = package(
        a="""
            import typing
            from typing import TYPE_CHECKING
            if TYPE_CHECKING:
                import p.b
            else:
                import p.c
            if typing.TYPE_CHECKING:
                from p.b import x
            try:
                import p.d
            except ImportError:
                pass
            class A:
                import p.e
                def f(self):
                    import p.g
            async def f():
                if 1:
                    from p import h
            """,
        b="", c="", d="", e="", g="", h="",
    )  # fmt: skip
    arrows = [arrow for arrow in read_arrows(modules) if arrow.target in modules]
    assert [arrow.target for arrow in arrows if arrow.early] == ["p.c", "p.d", "p.e"]
    assert [arrow.target for arrow in arrows if not arrow.early] == ["p.b", "p.b", "p.g", "p.h"]
    assert [arrow.line for arrow in arrows if arrow.target == "p.h"] == [20]


def test_find_circles():
    chain = [("a", "b"), ("b", "c"), ("c", "d"), ("a", "d")]
    assert find_circles(chain) == []
    assert find_circles([*chain, ("c", "b")]) == [["b", "c"]]
    assert find_circles([*chain, ("d", "b"), ("x", "y"), ("y", "x"), ("x", "a")]) == [["b", "c", "d"], ["x", "y"]]


def test_room_of_prefers_the_longest_name():
    floors = (("rollout.vllm",), ("rollout", "grpo_kernels"), ("grpo_fast",))
    assert room_of("grpo_fast.rollout.vllm.serve", floors) == (0, "rollout.vllm")
    assert room_of("grpo_fast.rollout.base", floors) == (1, "rollout")
    assert room_of("grpo_fast.rollouts", floors) is None
    assert room_of("grpo_kernels.kl", floors) == (1, "grpo_kernels")
    assert room_of("grpo_fast", floors) == (2, "grpo_fast")


def test_draw_floors():
    arrows = [Arrow(f"grpo_fast.{a}", f"grpo_fast.{b}", 1, True) for a, b in (("cli", "config"), ("config", "cli"))]
    drawn = draw_floors(arrows, ["grpo_fast.cli", "grpo_fast.config"], (("cli",), ("config",)))
    assert drawn == "floor  room    modules  imports\n1      cli     1        config\n0      config  1        ^cli"


if __name__ == "__main__":
    everything = find_modules(PACKAGES)
    print(draw_floors(read_arrows(everything), everything, FLOORS))
