"""Unit tests of generated Python.

Each program runs in a process of its own, and its tests in another (``judging.py``), which calls the program over a
pipe and compares what comes back as plain data. Both are sandboxed (``sandbox.py``) as well as this machine allows;
``isolation.py`` has the table of levels. What holds at all of them:

- A program ends with its time: CPU seconds are limited, and all processes are killed at the deadline by the clock.
- 1 GiB of address space, files of at most 10 MiB, 64 open ones, no core dumps, an environment that holds nothing of
  ours, no new processes. What it prints is thrown away.
- It never sees its tests, only the arguments of each call, and it passes only if it still runs when they have ended.

With the system call filter, a program has no memory beyond its address space (no shared memory, no memfd), cannot
signal or change another process, and has no network; threads are allowed. In namespaces (bubblewrap or our own) it sees
no files but Python's and the system's libraries, and 64 MiB of its own in memory. Outside of them, Landlock limits
files where the kernel has it, and otherwise an audit hook in Python, which a malicious program can get around; and only
time limits how many files it writes.
"""

from __future__ import annotations

import ast
import builtins
import json
import re
import sys
import textwrap
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

from grpo_fast.errors import one_line
from grpo_fast.rewards.base import between, isolated, text_of
from grpo_fast.rewards.sandbox.isolation import choose, run
from grpo_fast.rewards.sandbox.wire import MODULES

_FENCE = re.compile(r"^([ \t>]*)(`{3,}|~{3,})[ \t]*(.*)$")
# Functions that tests use beside the one they test.
_HELPERS = frozenset(
    """abs all any bool callable dict enumerate float frozenset getattr hasattr int isinstance issubclass iter len list
    map next print range repr reversed round set setattr sorted str tuple type zip Exception TypeError ValueError
    """.split()  # noqa: SIM905
)
_PYTHON = ("python", "py", "python3", "py3", "{.python}", "{python}")


def extract_code(text: str, wanted: Collection[str] = ()) -> str | None:
    """The program in a completion: its Python, from the last ``<answer>`` where there is one.

    Of several fenced blocks, those marked as Python count, or where there is none, those without a mark. The last one
    that defines a name of `wanted` is taken, or the last of all, together with the blocks before it that define what
    it uses. A text without fences is code as a whole inside ``<answer>``, and elsewhere if it is valid Python. Else
    there is none.
    """
    answer = between(text, "<answer>", "</answer>")
    blocks = list(_fenced_blocks(text if answer is None else answer))
    chosen = [code for mark, code in blocks if mark in _PYTHON] or [code for mark, code in blocks if not mark]
    if chosen:
        return _needed_blocks(chosen, set(wanted))
    if answer is not None:
        return answer
    return None if blocks or not text.strip() or _parse(text) is None else text


def _fenced_blocks(text: str) -> Iterator[tuple[str, str]]:
    """Language and content of the complete fenced blocks (CommonMark 4.5, also where they are indented or quoted)."""
    fence, mark, lines = None, "", []
    for line in text.splitlines(keepends=True):
        found = _FENCE.match(line.rstrip())
        if fence is None:
            # A mark of backticks holds none: that is code within a line.
            if found and not (found[2][0] == "`" and "`" in found[3]):
                fence, lines = found, []
                mark = found[3].strip().lower().split(maxsplit=1)[0] if found[3].strip() else ""
        elif found and not found[3] and found[2].startswith(fence[2]):
            yield mark, textwrap.dedent("".join(line.removeprefix(fence[1]) for line in lines))
            fence = None
        else:
            lines.append(line)


def _needed_blocks(blocks: list[str], wanted: set[str]) -> str:
    names = [_names(block) for block in blocks]
    if not any(wanted & bound for bound, _ in names):
        # A program that is no answer, or a script.
        wanted = names[-1][1]
        kept, rest = [blocks[-1]], range(len(blocks) - 2, -1, -1)
    else:
        kept, rest = [], range(len(blocks) - 1, -1, -1)
    for index in rest:
        bound, free = names[index]
        if wanted & bound:
            kept.insert(0, blocks[index])
            wanted = (wanted - bound) | free
    return "\n".join(kept) if len(kept) > 1 else kept[0]


def _parse(code: str) -> ast.Module | None:
    try:
        return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _names(code: str) -> tuple[set[str], set[str]]:
    """The names that code binds at its top level, and those that it uses and binds nowhere."""
    tree = _parse(code)
    if tree is None:
        return set(), set()
    used, bound, top = set(), set(), set()
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name, ctx=ast.Load()):
                used.add(name)
            case ast.Name(id=name) | ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                bound.add(name)
            case ast.ClassDef(name=name) | ast.arg(arg=name) | ast.MatchAs(name=str(name)):
                bound.add(name)
            case ast.ExceptHandler(name=str(name)) | ast.MatchStar(name=str(name)):
                bound.add(name)
            case ast.alias(name=name, asname=asname):
                bound.add(asname or name.partition(".")[0])
    for node in tree.body:
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                top.add(name)
            case ast.Assign() | ast.AnnAssign():
                top |= {
                    one.id for one in ast.walk(node) if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Store)
                }
            case ast.Import() | ast.ImportFrom():
                top |= {alias.asname or alias.name.partition(".")[0] for alias in node.names}
    return top, used - bound - set(dir(builtins))


class Tests(NamedTuple):
    """Tests of a program: code that uses its `names`, and inputs of the program as a script with their outputs."""

    code: str
    cases: list[tuple[str, str]]
    names: set[str]


def read_tests(value: Any) -> Tests:
    """The tests of a sample, in any of their forms (see :func:`unit_tests`).

    Raises:
        ValueError: there are none, they are no Python, or they use nothing of a program. Reads on from "tests".
    """
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        try:
            value = json.loads(value)
        except ValueError:
            value = [value]
    items = [value] if isinstance(value, (str, Mapping)) else value
    if not isinstance(items, (list, tuple)):
        raise ValueError(f"must be code, a list of code, or inputs and outputs, not {value!r:.80}")
    lines, cases = [], []
    for item in items:
        if isinstance(item, str):
            lines.append(item)
        elif isinstance(item, Mapping):
            made, more = _read_cases(item)
            lines += made
            cases += more
        else:
            raise ValueError(f"hold {item!r:.80}, which is neither code nor inputs and outputs")
    code = "\n".join(lines)
    if not code.strip() and not cases:
        raise ValueError("are empty")
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        place = f", line {error.lineno}" * bool(getattr(error, "lineno", None))
        raise ValueError(f"are no valid Python: {getattr(error, 'msg', error)}{place}") from None
    for node in tree.body:
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        for module in modules:
            if module.partition(".")[0] not in sys.stdlib_module_names:
                raise ValueError(f"import {module!r}; only the standard library is there")
    names = _tested_names(tree, _names(code)[1])
    if not names and (tree.body or not cases):
        defined = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
        hint = f"; {defined[0]}() is defined but not called with a function of the program" if defined else ""
        raise ValueError(f"call nothing of the program: they use no name that they do not define{hint}")
    return Tests(code if tree.body else "", cases, names)


def _tested_names(tree: ast.Module, free: set[str]) -> set[str]:
    """Those of the `free` names in tests that are the program's.

    A module of the standard library that is looked into, as in ``math.isclose``, is Python's. A program's function may
    be named as one of Python's where the tests use no other name: a program must not bring its own ``abs``.
    """
    nodes = list(ast.walk(tree))
    loads = [node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)]
    looked_into = [
        node.value.id for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    ]
    names = {name for name in free if name not in MODULES or loads.count(name) > looked_into.count(name)}
    if names:
        return names
    stored = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    called = {node.func.id for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    called = {name for name in called - stored if callable(getattr(builtins, name, None))}
    return called if len(called) == 1 else called - _HELPERS


def _read_cases(item: Mapping) -> tuple[list[str], list[tuple[str, str]]]:
    inputs, outputs = item.get("inputs", item.get("input")), item.get("outputs", item.get("output"))
    if inputs is None or outputs is None:
        raise ValueError(f"hold a dict of {', '.join(map(str, item))}; it must have inputs and outputs")
    if "inputs" not in item:
        inputs, outputs = [inputs], [outputs]
    if len(inputs) != len(outputs):
        raise ValueError(f"have {len(inputs)} inputs and {len(outputs)} outputs")
    function = item.get("fn_name")
    if function:
        if not str(function).isidentifier():
            raise ValueError(f"have fn_name={function!r}, which is no name of a function")
        return [
            f"assert {function}(*{given!r}) == {expected!r}" for given, expected in zip(inputs, outputs, strict=True)
        ], []
    return [], [(_text(given), _text(expected)) for given, expected in zip(inputs, outputs, strict=True)]


def _text(value: str | list) -> str:
    """An input or output, which some data sets give as a list of lines."""
    return value if isinstance(value, str) else "\n".join(map(str, value))


def run_tests(code: str, tests: Any, seconds: float, code_isolation: str = "available") -> bool:
    """Whether a program passes its tests in `seconds`.

    Raises:
        ValueError: the tests are at fault (see :func:`read_tests`), or have ended without using the program.
        RuntimeError: the sandbox did not start.
        UserError: this machine does not have what `code_isolation` asks for.
    """
    return _run(code, read_tests(tests), seconds, code_isolation)


def _run(code: str, tests: Tests, seconds: float, code_isolation: str) -> bool:
    verdict, detail = run(choose(code_isolation).level, code, tests.code, tests.cases, seconds, tests.names)
    if verdict == "unused":
        raise ValueError(f"tests {one_line(detail, 120)}, without having used the program")
    if verdict == "broken":
        raise RuntimeError(f"the sandbox for generated code did not start within {seconds:g} s")
    return verdict == "passed"


def _check(code_isolation: str = "available") -> dict[str, str]:
    chosen = choose(code_isolation)
    return {"code_isolation": chosen.level, "note": chosen.note}


def _prepare(code_isolation: str = "available") -> None:
    choose(code_isolation)


def _check_row(row: Mapping) -> None:
    if "tests" not in row:
        raise ValueError("a column 'tests' is missing")
    try:
        read_tests(row["tests"])
    except ValueError as error:
        raise ValueError(f"tests {error}") from None


@isolated(over_limit=0.0, check=_check, prepare=_prepare, check_row=_check_row)
def unit_tests(prompts, completions, tests, reward_timeout=10.0, code_isolation="available", **columns) -> list[float]:
    """1 where the completion's Python passes its ``tests``, else 0.

    Args:
        tests: for each sample, code with asserts that uses the completion's names, or a list of such; or inputs and
            outputs of the completion as a script, ``{"inputs": [...], "outputs": [...]}``, with ``fn_name`` arguments
            and results of that function; or a list of ``{"input": ..., "output": ...}``; these also as JSON.
        reward_timeout: seconds for a sample, of which the program gets all but a second.
        code_isolation: how the program must be contained, see :func:`grpo_fast.rewards.sandbox.isolation.choose`.

    Raises:
        ValueError: a sample's tests are at fault.
    """
    seconds = max(reward_timeout - 1, reward_timeout / 2)
    rewards = []
    for completion, test in zip(completions, tests, strict=True):
        read = read_tests(test)
        code = extract_code(text_of(completion), read.names)
        rewards.append(float(code is not None and _run(code, read, seconds, code_isolation)))
    return rewards
