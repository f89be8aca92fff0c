"""Unit tests of generated Python.

Each program runs in one process and its tests in another (``sandbox/judging.py``), which calls the program over a pipe
and compares the results as plain data. Both are confined as well as this machine allows (``sandbox/isolation.py``):

- CPU seconds are limited, and all processes are killed at the deadline.
- A program has 1 GiB of address space, files of at most 10 MiB, 64 open files, no core dumps, an environment without
  the run's variables, and no new processes. Its output is discarded.
- It never sees its tests, only the arguments of each call, and passes only if it still runs when they have ended.

With the system call filter, a program also has no memory beyond its address space (no shared memory, no memfd), cannot
signal or change another process, and has no network; it may use threads. In namespaces (bubblewrap or our own) it sees
only the files of Python and the system's libraries, and 64 MiB of its own in memory. Without namespaces, Landlock
limits files if the kernel has it; otherwise a Python audit hook does, which a malicious program can evade, and only the
deadline limits how many files a program writes.
"""

from __future__ import annotations

import ast
import builtins
import json
import re
import symtable
import sys
import textwrap
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

from grpo_fast.errors import one_line
from grpo_fast.rewards.base import between, isolated, text_of
from grpo_fast.rewards.sandbox.isolation import choose, run
from grpo_fast.rewards.sandbox.wire import MODULES

_FENCE = re.compile(r"^([ \t>]*)(`{3,}|~{3,})[ \t]*(.*)$")
# Functions that tests use beside the one under test.
_HELPERS = frozenset(
    """abs all any bool callable dict enumerate float frozenset getattr hasattr int isinstance issubclass iter len list
    map next print range repr reversed round set setattr sorted str tuple type zip Exception TypeError ValueError
    """.split()  # noqa: SIM905
)
_PYTHON = ("python", "py", "python3", "py3", "{.python}", "{python}")
# What the parser raises for text that is not a program.
_NOT_PYTHON = (SyntaxError, ValueError, RecursionError, MemoryError)


def extract_code(text: str, wanted: Collection[str] = ()) -> str | None:
    """The Python program in a completion, or in its last ``<answer>`` if it has one; None without a program.

    Of several fenced blocks, those marked as Python count, or without any, those that have no mark. The program is the
    last block that defines a name of `wanted`, or the last of all, after the earlier blocks that define what it uses.
    A text without fences is a program inside ``<answer>``, and elsewhere if it is valid Python.
    """
    answer = between(text, "<answer>", "</answer>")
    blocks = list(_fenced_blocks(text if answer is None else answer))
    chosen = [code for mark, code in blocks if mark in _PYTHON] or [code for mark, code in blocks if not mark]
    if chosen:
        return _needed_blocks(chosen, set(wanted))
    if answer is not None:
        return answer
    try:
        ast.parse(text)
    except _NOT_PYTHON:
        return None
    return text if text.strip() and not blocks else None


def _fenced_blocks(text: str) -> Iterator[tuple[str, str]]:
    """Language and content of the complete fenced blocks (CommonMark 4.5, also if they are indented or quoted)."""
    fence, mark, lines = None, "", []
    for line in text.splitlines(keepends=True):
        found = _FENCE.match(line.rstrip())
        if fence is None:
            # After a fence of backticks, more backticks in the line mean inline code.
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
        # A script, or a wrong answer: the last block counts as wanted.
        wanted = names[-1][0] or {""}
        names[-1] = wanted, names[-1][1]
    kept = []
    for block, (bound, free) in zip(reversed(blocks), reversed(names), strict=True):
        if wanted & bound:
            kept.insert(0, block)
            wanted = (wanted - bound) | free
    return "\n".join(kept)


def _names(code: str) -> tuple[set[str], set[str]]:
    """The names that code binds at its top level, and those that it uses and binds nowhere."""
    try:
        top = symtable.symtable(code, "code", "exec")
    except _NOT_PYTHON:
        return set(), set()
    bound = {s.get_name() for s in top.get_symbols() if s.is_assigned() or s.is_imported()}
    used, tables = set(), [top]
    while tables:
        table = tables.pop()
        tables += table.get_children()
        used |= {s.get_name() for s in table.get_symbols() if s.is_referenced() and (table is top or s.is_global())}
    return bound, used - bound - set(dir(builtins))


class Tests(NamedTuple):
    """Tests of a program: code that uses its `names`, and pairs of input and output of the program as a script."""

    code: str
    cases: list[tuple[str, str]]
    names: set[str]


def read_tests(value: Any) -> Tests:
    """The tests of a sample, in any of their forms (see :func:`unit_tests`).

    Raises:
        ValueError: there are none, they are not valid Python, or they use no name of a program. The message completes
            the sentence "tests ...".
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
    except _NOT_PYTHON as error:
        place = f", line {error.lineno}" * bool(getattr(error, "lineno", None))
        raise ValueError(f"are not valid Python: {getattr(error, 'msg', error)}{place}") from None
    for node in tree.body:
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        for module in modules:
            if module.partition(".")[0] not in sys.stdlib_module_names:
                raise ValueError(f"import {module!r}; only the standard library is available")
    names = _tested_names(tree, _names(code)[1])
    if not names and (tree.body or not cases):
        defined = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
        hint = f"; {defined[0]}() is defined but not called with a function of the program" if defined else ""
        raise ValueError(f"do not use the program: they define all the names that they use{hint}")
    return Tests(code if tree.body else "", cases, names)


def _tested_names(tree: ast.Module, free: set[str]) -> set[str]:
    """Those of the `free` names in tests that belong to the program.

    A module of the standard library whose attributes are used, as in ``math.isclose``, is Python's. A program may
    define a function with the name of a builtin only if the tests use no other name: it must not replace ``abs``.
    """
    nodes = list(ast.walk(tree))
    loads = [node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)]
    owners = [node.value.id for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)]
    names = {name for name in free if name not in MODULES or loads.count(name) > owners.count(name)}
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
    function, pairs = item.get("fn_name"), list(zip(inputs, outputs, strict=True))
    if function:
        if not str(function).isidentifier():
            raise ValueError(f"have fn_name={function!r}, which is not the name of a function")
        return [f"assert {function}(*{given!r}) == {expected!r}" for given, expected in pairs], []
    # Some data sets have lists of lines.
    return [], [tuple(v if isinstance(v, str) else "\n".join(map(str, v)) for v in pair) for pair in pairs]


def run_tests(code: str, tests: Tests, seconds: float, code_isolation: str = "available") -> bool:
    """Whether a program passes its tests within `seconds`.

    Raises:
        ValueError: the tests ended without using the program.
        RuntimeError: the sandbox did not start.
        UserError: `code_isolation` asks for a level that this machine does not have.
    """
    verdict, detail = run(choose(code_isolation)[0], code, tests.code, tests.cases, seconds, tests.names)
    if verdict == "unused":
        raise ValueError(f"tests {one_line(detail, 120)}, without having used the program")
    if verdict == "broken":
        raise RuntimeError(f"the sandbox for generated code did not start within {seconds:g} s: {detail}")
    return verdict == "passed"


def _check(code_isolation: str = "available") -> dict[str, str]:
    level, note = choose(code_isolation)
    return {"code_isolation": level, "note": note}


def _check_row(row: Mapping) -> None:
    if "tests" not in row:
        raise ValueError("the column 'tests' is missing")
    try:
        read_tests(row["tests"])
    except ValueError as error:
        raise ValueError(f"tests {error}") from None


@isolated(over_limit=0.0, check=_check, prepare=choose, check_row=_check_row)
def unit_tests(prompts, completions, tests, reward_timeout=10.0, code_isolation="available", **columns) -> list[float]:
    """1 if the completion's Python passes its ``tests``, else 0.

    Args:
        tests: for each sample, code with asserts that uses the completion's names, or a list of such code; or inputs
            and outputs of the completion as a script, ``{"inputs": [...], "outputs": [...]}``, or with ``fn_name``,
            arguments and results of that function; or a list of ``{"input": ..., "output": ...}``; these also as JSON.
        reward_timeout: seconds for a sample, of which the program gets all but one.
        code_isolation: how the program must be contained, see :func:`grpo_fast.rewards.sandbox.isolation.choose`.

    Raises:
        ValueError: a sample's tests are invalid.
    """
    seconds = max(reward_timeout - 1, reward_timeout / 2)
    rewards = []
    for completion, test in zip(completions, tests, strict=True):
        read = read_tests(test)
        code = extract_code(text_of(completion), read.names)
        rewards.append(float(code is not None and run_tests(code, read, seconds, code_isolation)))
    return rewards
