"""Calls between two processes that do not trust each other: plain data is sent over pipes, objects as numbers.

Plain data (numbers, text, bytes, the standard containers, dates, decimals, fractions) is copied. Any other object stays
in its process; the other side gets a `Remote` with its number, and operations on that are carried out here. No message
can name code: the decoder makes only plain data, the classes and modules below, and `Remote` objects.

Runs inside the sandbox (`confine.py`), so it imports as little as possible.
"""

import _json
import _thread
import builtins
import os
import sys

LONGEST = 64 << 20
SCALARS = (type(None), bool, int, float, str)
# Modules and classes that tests may use from the program's imports; each side uses its own.
MODULES = (
    "bisect", "collections", "copy", "datetime", "decimal", "fractions", "functools", "heapq", "itertools", "json",
    "math", "random", "re", "statistics", "string", "typing",
)  # fmt: skip
CLASSES = {
    "collections": ("Counter", "OrderedDict", "defaultdict", "deque"),
    "datetime": ("date", "datetime", "time", "timedelta"),
    "decimal": ("Decimal",),
    "fractions": ("Fraction",),
    "builtins": (
        "bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "int", "list", "object", "range", "set",
        "str", "tuple",
    ),
}  # fmt: skip


class _Context:
    strict, memo = True, {}
    object_hook = object_pairs_hook = None
    parse_float, parse_int, parse_constant = float, int, float


def _refuse(value):
    raise TypeError(f"{type(value).__name__} is not plain data")


# Importing the json package would take as long as Python takes to start.
_scan = _json.make_scanner(_Context())
_write = _json.make_encoder(None, _refuse, _json.encode_basestring_ascii, None, ":", ",", False, False, True)


class Closed(BaseException):
    """The other side has ended. Tests cannot expect this exception."""


class Pipe:
    """Messages over two file descriptors, each preceded by its length."""

    def __init__(self, reading: int, writing: int):
        self.reading, self.writing = reading, writing

    def send(self, message: list) -> None:
        data = "".join(_write(message, 0)).encode()
        data = len(data).to_bytes(8, "big") + data
        try:
            while data:
                data = data[os.write(self.writing, data) :]
        except OSError:
            raise Closed from None

    def receive(self) -> list:
        size = int.from_bytes(self._read(8), "big")
        if size > LONGEST:
            raise Closed
        text = self._read(size).decode()
        message, end = _scan(text, 0)
        if end != len(text) or type(message) is not list or not message:
            raise ValueError("not a message")
        return message

    def _read(self, size: int) -> bytes:
        parts = []
        while size:
            part = os.read(self.reading, min(size, 1 << 20))
            if not part:
                raise Closed
            parts.append(part)
            size -= len(part)
        return b"".join(parts)


class Peer:
    """One of two processes that call each other's objects.

    `perform` carries out a request ``(operation, plain, values, keywords)`` of the other side; what it returns or
    raises is the reply. `remote` is the class that stands for an object of the other side, by this peer and its number.
    """

    def __init__(self, pipe: Pipe, perform, remote):
        self.pipe, self.perform, self.remote = pipe, perform, remote
        self.own: list = []
        self.numbers: dict[int, int] = {}
        self.remotes: dict[int, object] = {}
        self.exceptions: dict[str, type] = {}
        self.lock = _thread.RLock()

    def request(self, operation: str, *plain, arguments: tuple = (), keywords: dict | None = None):
        """Carry out `operation` on the other side and return its value.

        Changes to lists, dicts, sets and other containers among the arguments are applied here as well.

        Raises:
            Exception: what it raised there, as the nearest exception known here.
            Closed: the other side has ended.
        """
        keywords = keywords or {}
        given = [*arguments, *keywords.values()]
        encoded = [self.encode(value) for value in given]
        with self.lock:
            self.pipe.send([operation, list(plain), encoded, list(keywords)])
            while True:
                kind, *rest = self.pipe.receive()
                if kind == "returned":
                    value, changed = rest
                    for index, new in changed:
                        _change(given[index], self.decode(new))
                    return self.decode(value)
                if kind == "raised":
                    raise self._exception(*rest)
                self.answer(kind, *rest)

    def answer(self, operation: str, plain: list, encoded: list, keywords: list) -> None:
        """Carry out a request of the other side, and reply."""
        try:
            values = [self.decode(value) for value in encoded]
            split = len(values) - len(keywords)
            named = dict(zip(keywords, values[split:], strict=True))
            result = self.encode(self.perform(operation, plain, values[:split], named))
            after = [value if type(value) in SCALARS else self.encode(value) for value in values]
            changed = [[i, new] for i, (new, old) in enumerate(zip(after, encoded, strict=True)) if new != old]
            reply = ["returned", result, changed]
        except Closed:
            raise
        except BaseException as error:
            reply = self._raised(error)
        self.pipe.send(reply)

    def _raised(self, error: BaseException) -> list:
        details = []
        for value in (list(error.args), {k: v for k, v in vars(error).items() if type(v) in SCALARS}):
            try:
                details.append(self.encode(value))
            except Exception:
                details.append(self.encode([] if type(value) is list else {}))
        return ["raised", _names(type(error)), *details]

    def _exception(self, names: list, arguments: list, attributes: list) -> BaseException:
        # What ends a process there, such as SystemExit, is an ordinary failure here.
        found = next(self._known(names), RuntimeError)
        try:
            error = found(*self.decode(arguments))
        except Exception:
            error = found.__new__(found)
        for name, value in self.decode(attributes).items():
            if not name.startswith("_") and found.__module__ != "builtins":
                setattr(error, name, value)
        return error

    def _known(self, names: list):
        """The classes of exceptions known here among those with these names."""
        for name in names:
            module, _, plain = name.partition(".")
            found = self.exceptions.get(name) or (module == "builtins" and getattr(builtins, plain, None))
            if isinstance(found, type) and issubclass(found, Exception):
                yield found

    def encode(self, value):
        kind = type(value)
        if kind in SCALARS:
            return value
        if kind is list:
            return ["list", *map(self.encode, value)]
        if isinstance(value, self.remote):
            return ["yours", value._remote_number]
        for base, encode in _ENCODERS:
            if isinstance(value, base):
                return encode(self, value)
        module = getattr(kind, "__module__", "")
        if module in CLASSES and kind.__name__ in CLASSES[module]:
            return _encode_library(self, kind, value)
        if isinstance(value, type) and value.__name__ in CLASSES.get(value.__module__, ()):
            return ["class", value.__module__, value.__name__]
        if kind is type(os) and sys.modules.get(value.__name__) is value and value.__name__ in MODULES:
            return ["module", value.__name__]
        return self.refer(value)

    def refer(self, value) -> list:
        number = self.numbers.get(id(value))
        if number is None:
            number = self.numbers[id(value)] = len(self.own)
            self.own.append(value)
        if isinstance(value, type) and issubclass(value, Exception):
            return ["object", number, "exception", _names(value)]
        return ["object", number, "coroutine" if type(value).__name__ == "coroutine" else "", []]

    def decode(self, coded):
        if type(coded) in SCALARS:
            return coded
        if type(coded) is not list or type(coded[0]) is not str:
            raise ValueError("not plain data")
        return _DECODERS[coded[0]](self, *coded[1:])

    def local(self, number: int):
        if type(number) is not int or not 0 <= number < len(self.own):
            raise ValueError("no such object")
        return self.own[number]

    def _theirs(self, number: int, kind: str, names: list):
        """The stand-in for an object of the other side: a class of exceptions can be caught, a coroutine awaited."""
        if number in self.remotes:
            return self.remotes[number]
        stub = self.remote(self, number)
        if kind == "exception":
            stub = type(names[0].rpartition(".")[2], (next(self._known(names), Exception),), {"__module__": "solution"})
            self.exceptions[names[0]] = stub
        elif kind == "coroutine":
            stub = _awaiting(self, stub)
        self.remotes[number] = stub
        return stub

    def _items(self, *coded):
        return [self.decode(item) for item in coded]

    def _pairs(self, *coded):
        items = self._items(*coded)
        return dict(zip(items[::2], items[1::2], strict=True))


def _names(kind: type) -> list[str]:
    return [f"{base.__module__}.{base.__qualname__}" for base in kind.__mro__]


async def _awaiting(peer: Peer, stub):
    return peer.request("await", arguments=(stub,))


def _encode_dict(peer: Peer, value: dict) -> list:
    kind = type(value).__name__ if type(value).__module__ == "collections" else "dict"
    return [kind, *(peer.encode(part) for pair in dict.items(value) for part in pair)]


def _encode_tuple(peer: Peer, value: tuple) -> list:
    items = [peer.encode(item) for item in tuple.__iter__(value)]
    fields = getattr(type(value), "_fields", None)
    return ["tuple", *items] if fields is None else ["named", type(value).__name__, list(fields), *items]


def _encode_library(peer: Peer, kind: type, value) -> list:
    """A value as the arguments that make an equal one."""
    if kind.__name__ == "deque":
        return ["deque", value.maxlen, *map(peer.encode, value)]
    arguments = value.__reduce__()[1] if kind.__module__ == "datetime" else (str(value),)
    return ["library", kind.__module__, kind.__name__, *map(peer.encode, arguments)]


def _decode_library(peer: Peer, module: str, name: str, *arguments):
    if module not in ("datetime", "decimal", "fractions"):
        raise ValueError("not plain data")
    return _decode_class(peer, module, name)(*peer._items(*arguments))


def _decode_class(peer: Peer, module: str, name: str):
    if name not in CLASSES.get(module, ()):
        raise ValueError("no such class")
    return getattr(__import__(module), name)


def _decode_module(peer: Peer, name: str):
    if name not in MODULES:
        raise ValueError("no such module")
    return __import__(name)


def _decode_named(peer: Peer, name: str, fields: list, *items):
    return __import__("collections").namedtuple(name, fields, rename=True)(*peer._items(*items))


# The first match counts; subclasses are sent as their bases.
_ENCODERS = (
    (bool, lambda peer, value: bool(value)),
    (int, lambda peer, value: int(value)),
    (float, lambda peer, value: float(value)),
    (str, lambda peer, value: str.__str__(value)),
    (tuple, _encode_tuple),
    (list, lambda peer, value: ["list", *map(peer.encode, list.__iter__(value))]),
    (dict, _encode_dict),
    (set, lambda peer, value: ["set", *map(peer.encode, set.__iter__(value))]),
    (frozenset, lambda peer, value: ["frozenset", *map(peer.encode, frozenset.__iter__(value))]),
    (bytes, lambda peer, value: ["bytes", value.hex()]),
    (bytearray, lambda peer, value: ["bytearray", value.hex()]),
    (complex, lambda peer, value: ["complex", value.real, value.imag]),
    (range, lambda peer, value: ["range", value.start, value.stop, value.step]),
    (slice, lambda peer, value: ["slice", *map(peer.encode, (value.start, value.stop, value.step))]),
    (type(Ellipsis), lambda peer, value: ["ellipsis"]),
)
_DECODERS = {
    "list": Peer._items,
    "tuple": lambda peer, *items: tuple(peer._items(*items)),
    "named": _decode_named,
    "dict": Peer._pairs,
    "OrderedDict": lambda peer, *items: _decode_class(peer, "collections", "OrderedDict")(peer._pairs(*items)),
    "Counter": lambda peer, *items: _decode_class(peer, "collections", "Counter")(peer._pairs(*items)),
    "defaultdict": lambda peer, *items: _decode_class(peer, "collections", "defaultdict")(None, peer._pairs(*items)),
    "deque": lambda peer, longest, *items: _decode_class(peer, "collections", "deque")(peer._items(*items), longest),
    "set": lambda peer, *items: set(peer._items(*items)),
    "frozenset": lambda peer, *items: frozenset(peer._items(*items)),
    "bytes": lambda peer, text: bytes.fromhex(text),
    "bytearray": lambda peer, text: bytearray.fromhex(text),
    "complex": lambda peer, real, imag: complex(real, imag),
    "range": lambda peer, *bounds: range(*bounds),
    "slice": lambda peer, *bounds: slice(*peer._items(*bounds)),
    "ellipsis": lambda peer: Ellipsis,
    "library": _decode_library,
    "class": _decode_class,
    "module": _decode_module,
    "yours": Peer.local,
    "object": Peer._theirs,
}


def _change(old, new) -> None:
    """Make a container equal to its changed copy of the other side; containers in it keep their identity."""
    if type(old) is not type(new):
        return
    if type(old) is list:
        for index, (before, after) in enumerate(zip(old, new)):  # noqa: B905 - of unequal lengths
            if type(before) is type(after) and type(after) in (list, dict, set, bytearray):
                _change(before, after)
                new[index] = before
    if type(old) in (list, bytearray):
        old[:] = new
    elif isinstance(old, (dict, set)):
        old.clear()
        old.update(new)
    elif type(old).__name__ == "deque":
        old.clear()
        old.extend(new)
