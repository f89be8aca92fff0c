"""Judging a program: it runs in one process, and its tests in another, which calls it through a `Peer`.

The program's process holds nothing of the tests: it sees only the arguments of each call. The tests' process compares
the results as plain data. There, a `Remote` stands for an object of the program. It can be called, inspected and passed
back, but it never equals plain data and cannot be ordered against or combined with it; otherwise it could wait for the
expected value and then agree with it.

Runs inside the sandbox (`confine.py`), so it imports as little as possible.
"""

import _operator
import builtins
import os
import sys

from grpo_fast.rewards.sandbox.wire import MODULES, Closed, Peer, Pipe

NAME = "solution"
# What Python does with an object besides calling it and looking up its attributes.
_UNARY = {
    "__len__": len, "__iter__": iter, "__next__": next, "__str__": str, "__repr__": repr, "__hash__": hash,
    "__int__": int, "__float__": float, "__complex__": complex, "__index__": _operator.index, "__abs__": abs,
    "__neg__": _operator.neg, "__pos__": _operator.pos, "__invert__": _operator.invert, "__reversed__": reversed,
    "__bool__": bool, "__bytes__": bytes, "__round__": round,
}  # fmt: skip
_WITH_VALUES = {
    "__getitem__": _operator.getitem, "__setitem__": _operator.setitem, "__delitem__": _operator.delitem,
    "__contains__": _operator.contains, "__format__": format,
    "__enter__": lambda value: type(value).__enter__(value),
    "__exit__": lambda value, *error: type(value).__exit__(value, *error),
}  # fmt: skip
_BINARY = {
    f"__{name.strip('_')}__": getattr(_operator, name)
    for name in (
        "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and_", "or_", "xor", "lshift", "rshift",
        "lt", "le", "eq", "ne", "gt", "ge",
    )
}  # fmt: skip
_OPERATORS = {**_UNARY, **_WITH_VALUES, **_BINARY}
_ATTRIBUTES = {"get": getattr, "set": setattr, "delete": delattr}
_CLASS_CHECKS = {"isinstance": isinstance, "issubclass": issubclass}


class Remote:
    """Stands for an object of the other process."""

    __slots__ = ("_remote_number", "_remote_peer")

    def __init__(self, peer: Peer, number: int):
        object.__setattr__(self, "_remote_peer", peer)
        object.__setattr__(self, "_remote_number", number)

    def __call__(self, *arguments, **keywords):
        return self._remote_peer.request("call", arguments=(self, *arguments), keywords=keywords)

    def __getattr__(self, name: str):
        return self._remote_peer.request("get", name, arguments=(self,))

    def __setattr__(self, name: str, value) -> None:
        self._remote_peer.request("set", name, arguments=(self, value))

    def __delattr__(self, name: str) -> None:
        self._remote_peer.request("delete", name, arguments=(self,))

    def __instancecheck__(self, value) -> bool:
        return isinstance(value, Remote) and self._remote_peer.request("isinstance", arguments=(value, self)) is True

    def __subclasscheck__(self, value) -> bool:
        return isinstance(value, Remote) and self._remote_peer.request("issubclass", arguments=(value, self)) is True


def _method(name: str):
    def method(self, *values):
        if name == "__exit__":
            # The exception and its traceback stay in this process, and the program cannot suppress it.
            self._remote_peer.request("operator", name, arguments=(self, None, None, None))
            return None
        return self._remote_peer.request("operator", name, arguments=(self, *values))

    return method


def _binary(name: str):
    def method(self, other):
        if isinstance(other, Remote):
            return self._remote_peer.request("operator", name, arguments=(self, other))
        if name in ("__eq__", "__ne__"):
            return name == "__ne__"
        raise TypeError(f"an object of the program does not support {name} with {type(other).__name__}")

    return method


for _name in (*_UNARY, *_WITH_VALUES):
    setattr(Remote, _name, _method(_name))
for _name in _BINARY:
    setattr(Remote, _name, _binary(_name))
    if _name not in ("__lt__", "__le__", "__eq__", "__ne__", "__gt__", "__ge__"):
        # Also for plain data on the left.
        setattr(Remote, f"__r{_name[2:]}", _binary(_name))


class Program:
    """The program's process: runs the program and serves the judge's requests."""

    def __init__(self, pipe: Pipe):
        self.peer = Peer(pipe, self.perform, Remote)
        self.code = ""
        self.module = type(sys)(NAME)

    def serve(self) -> None:
        try:
            while True:
                self.peer.answer(*self.peer.pipe.receive())
        except Closed:
            return

    def perform(self, operation: str, plain: list, values: list, keywords: dict):
        match operation:
            case "name":
                names = vars(self.module)
                # No exception: the program has raised none.
                return plain[0] in names, names.get(plain[0])
            case "call":
                return values[0](*values[1:], **keywords)
            case "get" | "set" | "delete":
                return _ATTRIBUTES[operation](values[0], plain[0], *values[1:])
            case "operator":
                return _OPERATORS[plain[0]](*values)
            case "isinstance" | "issubclass":
                return _CLASS_CHECKS[operation](*values)
            case "await":
                import asyncio

                return asyncio.run(values[0])
            case "load":
                return self.load(*plain)
            case "run":
                return self.run(values[0])
            case "here":
                return True
        raise ValueError(operation)

    def load(self, code: str, now: bool) -> None:
        """Keep the program for `run`, and if `now`, run it as a module."""
        self.code = code
        if now:
            sys.modules[NAME] = self.module
            self.module.__builtins__ = builtins
            exec(compile(code, NAME, "exec"), vars(self.module))

    def run(self, text: str) -> tuple[bool, str]:
        """Run the program as a script with `text` as its input. Returns whether it ended normally, and its output."""
        with open("stdin", "w", encoding="utf-8", newline="") as file:
            file.write(text)
        files = os.open("stdin", os.O_RDONLY), os.open("stdout", os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        for target, file in enumerate(files):
            # The program may have closed its standard streams.
            if file != target:
                os.dup2(file, target)
                os.close(file)
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.stdout = printed = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        module = sys.modules["__main__"] = type(sys)("__main__")
        module.__builtins__ = builtins
        try:
            exec(compile(self.code, NAME, "exec"), vars(module))
            well = True
        except SystemExit as error:
            well = error.code in (None, 0, False)
        for stream in (printed, sys.stdout):
            if not stream.closed:
                stream.flush()
        with open("stdout", "rb") as file:
            return well, file.read().decode(errors="replace")


class Names(dict):
    """The global names of tests: their own; Python's functions and modules, which a program must not replace unless
    they are `tested`; and the program's."""

    def __init__(self, judge: "Judge", tested: list[str]):
        super().__init__(__name__="tests", __builtins__=builtins)
        self.judge, self.tested = judge, tested

    def __missing__(self, name: str):
        if name not in self.tested:
            if name in MODULES:
                return __import__(name)
            if hasattr(builtins, name):
                raise KeyError(name)
        # Counted before the reply, so that a program's failure is not taken for a fault of the tests.
        self.judge.uses += 1
        found, value = self.judge.peer.request("name", name)
        if found is not True:
            raise NameError(f"name {name!r} is not defined", name=name)
        return value


class Judge:
    """The tests' process."""

    def __init__(self, pipe: Pipe):
        self.peer = Peer(pipe, self.perform, Remote)
        self.uses = 0

    def perform(self, operation: str, plain: list, values: list, keywords: dict):
        """What the program may do with objects of the tests: use them, but not inspect their implementation."""
        value, *others = values
        match operation:
            case "call" if callable(value):
                return value(*others, **keywords)
            case "get" | "set" if _is_public(value, plain[0]):
                return _ATTRIBUTES[operation](value, plain[0], *others)
            case "get" if plain[0] in ("__name__", "__qualname__", "__doc__"):
                return str(getattr(value, plain[0]))
            case "get":
                raise AttributeError("an object of the tests does not expose this")
            case "operator" if plain[0] in _OPERATORS and plain[0] not in ("__repr__", "__str__", "__format__"):
                return _OPERATORS[plain[0]](value, *others)
        raise PermissionError("an object of the tests does not allow this")

    def passes(self, code: str, tests: str, cases: list[tuple[str, str]], tested: list[str]) -> bool:
        """Whether the program passes its tests and produces the output of every case from its input."""
        self.uses = 1
        self.peer.request("load", code, bool(tests))
        self.uses = 0
        if tests:
            exec(compile(tests, "tests", "exec"), Names(self, tested))
        for given, expected in cases:
            self.uses += 1
            well, output = self.peer.request("run", arguments=(given,))
            if well is not True or _lines(output) != _lines(expected):
                return False
        # A program that has exited fails, even if its tests caught that.
        return self.peer.request("here") is True


def _is_public(value, name: str) -> bool:
    """Whether `name` is public and the tests define the class of `value`; frames and functions give access to all."""
    own = getattr(type(value), "__module__", "") in ("tests", "_io")
    return own and type(name) is str and not name.startswith("_")


def _lines(text: str) -> list[str]:
    """The lines without white space at their ends and empty lines at the end."""
    return [line.rstrip() for line in text.rstrip().split("\n")]


def judge(pipe: Pipe, code: str, tests: str, cases: list[tuple[str, str]], tested: list[str]) -> str:
    """The verdict: ``passed``, ``failed``, or ``unused`` and how the tests ended without using the program."""
    sys.set_int_max_str_digits(0)
    side, verdict, ended = Judge(pipe), "failed", "ran to their end"
    try:
        verdict = "passed" if side.passes(code, tests, cases, tested) else "failed"
    except BaseException as error:
        ended = f"raised {type(error).__name__}: {error}"
    return verdict if side.uses else f"unused {ended}"


def program(pipe: Pipe) -> None:
    sys.set_int_max_str_digits(0)
    sys.argv[:] = [NAME]
    Program(pipe).serve()
