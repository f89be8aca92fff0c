"""Unit tests of generated Python: which code runs, and which programs pass."""

import json
import os
import socket
import sys
import threading
import time

import pytest
from accelerate.state import AcceleratorState

from grpo_fast.config import GRPOConfig
from grpo_fast.errors import UserError
from grpo_fast.rewards import RewardModel, unit_tests
from grpo_fast.rewards.functions import code
from grpo_fast.rewards.functions.code import extract_code, read_tests
from grpo_fast.rewards.sandbox import isolation
from grpo_fast.trainer import GRPOTrainer
from support.attacks import CHEATED_TESTS, CHEATS, SQUARE
from support.small import SMALL

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the sandbox is made for Linux")

TEST = "assert square(3) == 9"
SECONDS = 20.0
HELPER, MAIN = "def helper(x):\n    return x * x\n", "def square(x):\n    return helper(x)\n"


def run_tests(program, tests, seconds=SECONDS, code_isolation="available"):
    return code.run_tests(program, read_tests(tests), seconds, code_isolation)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Here:\n```python\nx = 1\n```\nDone.", "x = 1\n"),
        ("```python\nx = 1\n```\nbetter:\n```python\nx = 2\n```", "x = 2\n"),
        ("```py\nx = 1\n```\nIt prints\n```\n1\n```", "x = 1\n"),
        ("```\nx = 1\n```", "x = 1\n"),
        ("```PYTHON\nx = 1\n```", "x = 1\n"),
        ("```Python3 title='a.py'\nx = 1\n```", "x = 1\n"),
        ("~~~python\nx = 1\n~~~", "x = 1\n"),
        ("~~~~\nx = '''\n~~~\n'''\n~~~~", "x = '''\n~~~\n'''\n"),
        ("````python\nx = '```'\n```\n````", "x = '```'\n```\n"),
        ("1. So:\n   ```python\n   def f():\n       return 1\n   ```", "def f():\n    return 1\n"),
        ("\t``` python\n\tx = 1\n\t```", "x = 1\n"),
        ("> ```python\n> x = 1\n> ```", "x = 1\n"),
        ("```python\r\nx = 1\r\n```\r\n", "x = 1\r\n"),
        ("```python\nx = 1\n```\nand\n```python\nx = 2", "x = 1\n"),
        ("Use ```x``` here.\n```python\nx = 1\n```", "x = 1\n"),
        ("```bash\nls\n```", None),
        ("```python\nx = 1", None),
        ("<answer>x = 1</answer>", "x = 1"),
        ("```python\nx = 1\n```<answer>\n```python\nx = 2\n```\n</answer>", "x = 2\n"),
        ("def f():\n    return 1\n", "def f():\n    return 1\n"),
        ("I cannot.", None),
        (" ", None),
        ("", None),
    ],
)
def test_extract_code_one_block(text, expected):
    assert extract_code(text) == expected


def block(*codes):
    return "\n".join(f"```python\n{code}```\n" for code in codes)


@pytest.mark.parametrize(
    ("text", "wanted", "expected"),
    [
        (block(SQUARE, "print(square(3))\n"), ["square"], SQUARE),
        (block(SQUARE, "result = square(input())\n"), ["square"], SQUARE),
        (block(HELPER, MAIN), ["square"], f"{HELPER}\n{MAIN}"),
        (block("def square(x):\n    return 0\n", SQUARE), ["square"], SQUARE),
        (block(HELPER, "broken(\n", MAIN, "square(2)\n"), ["square"], f"{HELPER}\n{MAIN}"),
        (
            block("import math\n", "def f(x):\n    return math.pi\n"),
            ["f"],
            "import math\n\ndef f(x):\n    return math.pi\n",
        ),
        (block(SQUARE, "x = 1\n"), ["cube"], "x = 1\n"),
        # Scripts: the last one, not both.
        (block("print(input())\n", "print(int(input()))\n"), [], "print(int(input()))\n"),
    ],
)
def test_extract_code_joins_the_needed_blocks(text, wanted, expected):
    assert extract_code(text, wanted) == expected


RIGHT = {
    "a function": (SQUARE, f"{TEST}\nassert square(2) == 4"),
    "output": (f"{SQUARE}\nprint('x' * 10**7)", TEST),
    "a guarded main": (f"{SQUARE}\nif __name__ == '__main__':\n    raise ValueError", TEST),
    "many modules": (
        "import bisect, collections, dataclasses, datetime, decimal, functools, hashlib, heapq, itertools, json\n"
        "import math, random, re, statistics, string, typing, unicodedata, zoneinfo, sqlite3, concurrent.futures\n"
        "open('notes', 'w').write('kept')\ndef notes(): return open('notes').read()",
        "assert notes() == 'kept'\nassert open('notes').read() == 'kept'",
    ),
    "dataclasses": (
        "from __future__ import annotations\nfrom dataclasses import dataclass, field, asdict\n@dataclass(order=True)\n"
        "class Point:\n    x: int\n    y: int = 0\n    tags: list[str] = field(default_factory=list)\n"
        "    def moved(self, by): return Point(self.x + by, self.y)\ndef plain(p): return asdict(p)",
        "p = Point(1, 2)\nassert p.x == 1 and p.moved(by=3) == Point(4, 2) and p != Point(1, 3) and p < Point(2)\n"
        "assert plain(p) == {'x': 1, 'y': 2, 'tags': []}\np.y = 5\nassert plain(p)['y'] == 5\n"
        'assert isinstance(p, Point) and not isinstance(3, Point) and repr(p) == "Point(x=1, y=5, tags=[])"',
    ),
    "get_type_hints": (
        "from __future__ import annotations\nimport typing\nclass Node:\n    next: Node | None\n    value: int\n"
        "def hints(): return {k: str(v) for k, v in typing.get_type_hints(Node).items()}",
        "assert hints()['value'] == \"<class 'int'>\"",
    ),
    "pickle": (
        "import pickle, copy\nclass Point:\n    def __init__(self, x): self.x = x\n"
        "def again(x): return pickle.loads(pickle.dumps(copy.deepcopy(Point(x)))).x",
        "assert again(3) == 3",
    ),
    "asyncio": (
        "import asyncio\nasync def double(x):\n    await asyncio.sleep(0.001)\n    return 2 * x\n"
        "def both(*xs):\n    async def all(): return await asyncio.gather(*map(double, xs))\n"
        "    return asyncio.run(all())",
        "import asyncio\nassert both(1, 2) == [2, 4]\nassert asyncio.run(double(4)) == 8\n"
        "async def check():\n    assert await double(5) == 10\n    return await asyncio.gather(double(1), double(2))\n"
        "assert asyncio.run(check()) == [2, 4]",
    ),
    "exceptions": (
        "class Wrong(ValueError):\n    def __init__(self, text, code):\n        super().__init__(text)\n"
        "        self.code = code\ndef fail(kind):\n    if kind == 'own':\n        raise Wrong('bad', 7)\n"
        "    return {}['key'] if kind == 'key' else int('x')",
        "for kind, error in (('own', Wrong), ('own', ValueError), ('key', KeyError), ('int', ValueError)):\n"
        "    try:\n        fail(kind)\n    except error as e:\n        caught = e\n    else:\n        assert False\n"
        "    if error is Wrong:\n        assert caught.code == 7 and str(caught) == 'bad'\n"
        "import unittest\nwith unittest.TestCase().assertRaises(KeyError):\n    fail('key')",
    ),
    "changed arguments": (
        "def sort(xs): xs.sort()\ndef rotate(m): m[:] = [list(r) for r in zip(*m[::-1])]\n"
        "def fill(d, s, *, b): d['k'] = [1]; s.add(3); b.extend(b'x')",
        "xs = [3, 1, 2]\nassert sort(xs) is None\nassert xs == [1, 2, 3]\nm = [[1, 2], [3, 4]]\nrow = m[0]\nrotate(m)\n"
        "assert m == [[3, 1], [4, 2]] and row == [3, 1]\nd, s, b = {}, {1}, bytearray()\nfill(d, s, b=b)\n"
        "assert d == {'k': [1]} and s == {1, 3} and b == b'x'",
    ),
    "plain data": (
        "import collections, datetime, decimal, fractions, typing\n"
        "Point = collections.namedtuple('Point', 'x y')\ndef same(x): return x\ndef point(): return Point(1, 2)\n"
        "def some(): return [collections.Counter('aab'), collections.OrderedDict(a=1), collections.deque([1, 2], 2),\n"
        "    collections.defaultdict(int, a=1), decimal.Decimal('0.1'), fractions.Fraction(1, 3),\n"
        "    datetime.date(2024, 2, 29), datetime.timedelta(3), range(3), float('inf'), 10**5000, 1j, b'x', '\\ud800']",
        "import collections, datetime, decimal, fractions\nassert point() == (1, 2) and point().y == 2\n"
        "expected = [collections.Counter(a=2, b=1), {'a': 1}, collections.deque([1, 2]), {'a': 1},\n"
        "    decimal.Decimal('0.1'), fractions.Fraction(1, 3), datetime.date(2024, 2, 29), datetime.timedelta(3),\n"
        "    range(3), float('inf'), 10**5000, 1j, b'x', '\\ud800']\nassert some() == expected == same(some())\n"
        "assert isinstance(some()[0], collections.Counter) and type(some()[2]) is collections.deque\n"
        "assert same({(1, 2): {3}, None: frozenset([4])}) == {(1, 2): {3}, None: frozenset([4])}\n"
        "assert same(-0.0).hex() == '-0x0.0p+0' and same(True) is True and same('é\\n\\0') == 'é\\n\\0'",
    ),
    "functions as arguments": (
        "import functools\ndef apply(f, *xs): return [f(x) for x in xs]\n"
        "def cached(f): return functools.lru_cache(None)(f)\ndef adder(n): return lambda x: x + n",
        "assert apply(lambda x: x + 1, 1, 2) == [2, 3] and apply(len, 'ab', [1]) == [2, 1] and apply(str, 1) == ['1']\n"
        "calls = []\n@cached\ndef slow(x):\n    calls.append(x)\n    return x * x\n"
        "assert slow(3) == slow(3) == 9 and calls == [3] and adder(2)(3) == 5 and apply(adder(1), 1) == [2]",
    ),
    "iterators": (
        "def naturals():\n    n = 0\n    while True:\n        yield n\n        n += 1\ndef total(xs): return sum(xs)\n"
        "def upper(f): return [line.upper() for line in f]",
        "import io, itertools\nassert list(itertools.islice(naturals(), 3)) == [0, 1, 2]\ng = naturals()\n"
        "assert next(g) == 0 and next(g) == 1 and total(x for x in range(4)) == 6 and total(iter([1, 2])) == 3\n"
        "assert upper(io.StringIO('a\\nb')) == ['A\\n', 'B']",
    ),
    "classes": (
        "import threading\nclass Stack:\n    count = 0\n    def __init__(self): self.items = []; Stack.count += 1\n"
        "    def push(self, x): self.items.append(x); return self\n    def pop(self): return self.items.pop()\n"
        "    def __len__(self): return len(self.items)\n    def __contains__(self, x): return x in self.items\n"
        "    def __getitem__(self, i): return self.items[i]\n    def __iter__(self): return iter(self.items)\n"
        "    def __add__(self, other): s = Stack(); s.items = self.items + other.items; return s\n"
        "    def __enter__(self): return self\n    def __exit__(self, *e): self.items.clear()\n"
        "    @property\n    def top(self): return self.items[-1]\n    @staticmethod\n    def of(*xs):\n"
        "        s = Stack(); s.items = list(xs); return s\n",
        "s = Stack()\ns.push(1).push(2)\n"
        "assert len(s) == 2 and 1 in s and 5 not in s and s[0] == 1 and s[:2] == [1, 2]\n"
        "assert list(s) == [1, 2] and s.top == 2 and s.pop() == 2 and s.items == [1] and bool(s) and Stack.count >= 1\n"
        "assert (s + Stack.of(4, 5)).items == [1, 4, 5]\nwith s as same:\n    assert same is s\nassert not s",
    ),
    "objects of the tests": (
        "def depth(node): return 0 if node is None else 1 + max(depth(node.left), depth(node.right))\n"
        "def mark(node): node.seen = True\ndef name(node): return node.name()",
        "class Node:\n    def __init__(self, left=None, right=None): self.left, self.right = left, right\n"
        "    def name(self): return 'node'\nn = Node(Node(), Node(Node()))\nassert depth(n) == 3\nmark(n)\n"
        "assert n.seen is True and name(n) == 'node'",
    ),
    "names of its imports": (
        "import math\nfrom collections import Counter, defaultdict\nfrom typing import List\nLIMIT = 10\n"
        "def area(r): return math.pi * r * r\ndef ten(*xs): return LIMIT",
        "assert abs(area(2) - math.pi * 4) < 1e-9 and Counter('aa') == {'a': 2} and LIMIT == 10 and ten(1, 2) == 10\n"
        "def f(xs: List[int]) -> int: return len(xs)\nassert f([1]) == 1 and [ten() for _ in range(2)] == [10, 10]",
    ),
    "a name of Python's": ("def sum(a, b): return a + b", "assert sum(10, 15) == 25\nassert len([sum(1, 2)]) == 1"),
    "HumanEval": (
        SQUARE,
        "METADATA = {'author': 'x'}\n\ndef check(candidate):\n    assert candidate(3) == 9\n    for n in range(50):\n"
        "        assert candidate(n) == n ** 2\n\ncheck(square)",
    ),
    "enumerations": (
        "import enum\nclass Colour(enum.Enum):\n    RED = 1\nclass Level(enum.IntEnum):\n    LOW = 1\n"
        "def red(): return Colour.RED",
        "assert red() is Colour.RED and red() == Colour.RED and red().value == 1 and Level.LOW == 1",
    ),
}


@pytest.mark.parametrize(("program", "tests"), RIGHT.values(), ids=RIGHT)
def test_run_tests_right_programs_pass(program, tests):
    assert run_tests(program, tests, SECONDS)


def test_run_tests_threads_pass_with_the_filter():
    if isolation.choose("available")[0] == "rlimits":
        pytest.skip("without a system call filter a program has no threads")
    program = (
        "import threading, concurrent.futures, queue\ndef squares(xs):\n"
        "    with concurrent.futures.ThreadPoolExecutor(8) as pool:\n        return [*pool.map(lambda x: x * x, xs)]\n"
        "def counted(f):\n    found = queue.Queue()\n"
        "    threads = [threading.Thread(target=lambda: found.put(f(1))) for _ in range(4)]\n"
        "    [t.start() for t in threads]\n    [t.join() for t in threads]\n    return found.qsize()"
    )
    assert run_tests(program, "assert squares([1, 2]) == [1, 4]\nassert counted(lambda x: x) == 4", SECONDS)


@pytest.mark.parametrize(
    ("program", "tests"),
    [
        (SQUARE, f"{TEST}\nassert square(2) == 5"),
        ("def square(x):\n    return x + x", TEST),
        ("def square(x) return", TEST),
        ("", TEST),
        ("def square(x):\n    raise ValueError", TEST),
        (SQUARE, "assert square(3, 4) == 9"),
        (SQUARE, "assert cube(3) == 27"),
        (SQUARE, "assert square.missing == 1"),
        ("square = 9", TEST),
        # Python has this name, but the program does not define it.
        (SQUARE, "assert sum([1, 2]) == 3"),
    ],
)
def test_run_tests_wrong_programs_fail(program, tests):
    assert not run_tests(program, tests, SECONDS)


@pytest.mark.parametrize("program", CHEATS.values(), ids=CHEATS)
def test_run_tests_cheating_programs_fail(program):
    """Each program has to fail every kind of test."""
    passed = [name for name, tests in CHEATED_TESTS.items() if run_tests(program, tests, SECONDS, "none")]
    assert passed == []


def test_run_tests_right_program_passes_all_forms():
    """The right program passes, so the failures above are due to the cheats."""
    assert [name for name, tests in CHEATED_TESTS.items() if not run_tests(SQUARE, tests, SECONDS)] == []


@pytest.mark.parametrize(
    "program",
    [
        "def apply(f): return f.__globals__['EXPECTED']",
        "def apply(f): return f.__code__.co_consts[1]",
        "def apply(f): return f.__closure__[0].cell_contents",
        "def apply(f):\n    peer = f._remote_peer\n    return peer.request('name', 'EXPECTED')[1]",
        "def apply(f): return f._remote_peer.request('get', '__globals__', arguments=(f,))['EXPECTED']",
        "def apply(f): return f._remote_peer.request('operator', '__str__', arguments=(f,))",
        "def apply(f):\n    try:\n        f(None)\n    except TypeError as e:\n"
        "        frame = e.__traceback__\n        while frame.tb_next: frame = frame.tb_next\n"
        "        return frame.tb_frame.f_globals['EXPECTED']",
        "def apply(f):\n    f._remote_peer.request('call', arguments=(exec, 'raise SystemExit'))",
    ],
)
def test_run_tests_functions_of_the_tests_expose_nothing(program):
    tests = (
        "EXPECTED = 'a long secret'\ndef given(x, other=EXPECTED): return EXPECTED[x]\nassert apply(given) == EXPECTED"
    )
    assert run_tests("def apply(f): return ''.join(f(i) for i in range(13))", tests, SECONDS)
    assert not run_tests(program, tests, SECONDS)


CASES = {"inputs": ["3\n", "10\n"], "outputs": ["9\n", "100"]}


@pytest.mark.parametrize(
    ("program", "passes"),
    [
        ("print(int(input()) ** 2)", True),
        ("import sys\nn = int(sys.stdin.buffer.read())\nsys.stdout.write(f'{n * n}  \\n\\n')", True),
        ("def main():\n    print(int(open(0).readline()) ** 2)\nif __name__ == '__main__':\n    main()", True),
        ("import os\nos.write(1, b'%d\\n' % (int(os.read(0, 100)) ** 2))", True),
        ("print(int(input()) ** 2)\nimport sys\nsys.exit()", True),
        ("print(int(input()) ** 2)\nexit(1)", False),
        ("print(int(input()) * 3)", False),
        ("print(9)", False),
        ("print('9')\nprint('100')", False),
        ("import os\nprint(int(input()) ** 2, flush=True)\nos._exit(0)", False),
    ],
)
def test_run_tests_compares_the_output_of_scripts(program, passes):
    assert run_tests(program, CASES, SECONDS) is passes


@pytest.mark.parametrize(
    "tests",
    [
        TEST,
        [TEST, "assert square(1) == 1"],
        {"inputs": [[3], [4]], "outputs": [9, 16], "fn_name": "square"},
        json.dumps({"inputs": [[3]], "outputs": [9], "fn_name": "square"}),
        json.dumps([TEST]),
        [{"input": "3", "output": "9"}, {"input": "4", "output": "16"}],
    ],
)
def test_read_tests_all_forms(tests):
    script = f"{SQUARE}\nif __name__ == '__main__':\n    print(square(int(input())))"
    wrong = script.replace("x * x", "x + 7")
    assert run_tests(script, tests, SECONDS)
    assert not run_tests(wrong, tests, SECONDS)


@pytest.mark.parametrize(
    ("tests", "message"),
    [
        ("", "tests are empty"),
        ([], "tests are empty"),
        ("  \n", "tests are empty"),
        (5, "tests must be code, a list of code"),
        (3, "tests must be code"),
        ("assert square(3) = 9", "tests are not valid Python: .*, line 1"),
        ("# nothing", "tests do not use the program"),
        ("assert True", "tests do not use the program"),
        (
            "def check(f):\n    assert f(3) == 9",
            r"tests do not use the program: .*; check\(\) is defined but not called",
        ),
        ("import math\nassert math.sqrt(9) == 3", "tests do not use the program"),
        ({"inputs": ["1"], "outputs": []}, "tests have 1 inputs and 0 outputs"),
        ({"question": "1"}, "tests hold a dict of question; it must have inputs and outputs"),
        ({"inputs": [[1]], "outputs": [1], "fn_name": "f(); g"}, "tests have fn_name="),
        ([TEST, 3], "tests hold 3"),
        (f"import numpy as np\n{TEST}", "tests import 'numpy'; only the standard library is available"),
    ],
)
def test_check_rows_invalid_tests(tests, message):
    model = RewardModel(["unit_tests"], None, code_isolation="none")
    rows = [{"prompt": "Square numbers.", "tests": TEST}, {"prompt": "Square them.", "tests": tests}]
    with pytest.raises(
        UserError, match=rf"^training data, row 2 \(prompt 'Square them.'\): unit_tests: {message}"
    ) as error:
        model.check_rows(rows, "training data")
    assert "\n" not in str(error.value)
    model.check_rows(rows[:1], "training data")
    with pytest.raises(ValueError, match=message.removeprefix("tests ")):
        read_tests(tests)


def test_trainer_refuses_invalid_tests_before_a_model_is_loaded(tmp_path):
    path = tmp_path / "data.jsonl"
    rows = [{"prompt": f"p{i}", "tests": TEST if i else "assert True"} for i in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        **SMALL,
        "dataset_kwargs": None,
        "dataset_name": str(path),
        "reward_funcs": ["unit_tests"],
        "model_name_or_path": "missing",
    }
    with pytest.raises(UserError, match=r"data, row \d \(prompt 'p0'\): unit_tests: tests do not use the program"):
        GRPOTrainer(GRPOConfig(**settings, output_dir=str(tmp_path / "run")))


def test_trainer_reports_how_generated_code_runs(tmp_path, capsys):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i}>", "tests": TEST}) + "\n" for i in range(10, 20)))
    settings = {**SMALL, "dataset_kwargs": None, "dataset_name": str(path), "reward_funcs": ["unit_tests"]}
    settings |= {"max_steps": 1, "max_eval_samples": 1, "generation_batch_size": 4, "code_isolation": "none"}
    GRPOTrainer(GRPOConfig(**settings, output_dir=str(tmp_path / "run"))).train()
    AcceleratorState._reset_state(reset_partial_state=True)
    said = "unit_tests: generated code runs in a process with resource limits only, which can signal this user's others"
    assert said in " ".join(capsys.readouterr().out.split())


def test_run_tests_that_never_use_the_program_are_invalid():
    tests = "for _ in range(0):\n    assert square(3) == 9"
    with pytest.raises(ValueError, match="tests ran to their end, without having used the program"):
        run_tests(SQUARE, tests, SECONDS)
    with pytest.raises(ValueError, match="tests raised ZeroDivisionError: division by zero, without having used"):
        run_tests(SQUARE, f"1 / 0\n{TEST}", SECONDS)
    # Here the program itself fails.
    assert not run_tests("1 / 0", f"1 / 0\n{TEST}", SECONDS)


def test_run_tests_broken_sandbox_is_an_error(monkeypatch):
    assert run_tests(SQUARE, TEST, SECONDS, "none")
    monkeypatch.setattr(isolation, "python", lambda: "/bin/false")
    with pytest.raises(RuntimeError, match="the sandbox for generated code did not start within 20 s"):
        run_tests(SQUARE, TEST, SECONDS, "none")


def test_unit_tests_of_completions():
    completions = [f"```python\n{SQUARE}\n```", f"```python\n{SQUARE}\n```", "I cannot.", f"<answer>{SQUARE}</answer>"]
    tests = [TEST, [TEST, "assert square(1) == 2"], TEST, [TEST, "assert square(0) == 0"]]
    assert unit_tests([""] * 4, completions, tests=tests) == [1, 0, 0, 1]
    chat = [[{"role": "assistant", "content": completions[0]}]]
    assert unit_tests([""], chat, tests=tests[:1]) == [1]


def test_reward_model_scores_harmless_beside_harmful_programs():
    """Harmless and harmful completions in one batch, scored as in training."""
    model = RewardModel(["unit_tests"], None, timeout=5.0)
    assert any("generated code runs" in note for note in model.notes)
    forks = "import os\nfor _ in range(50):\n    os.fork()"
    programs = [SQUARE, "while True: pass", forks, "x = bytearray(1 << 40)", SQUARE, "1 +"]
    completions = [f"```python\n{program}\n```" for program in programs] + [f"```python\n{'x = 1;' * 180_000}\n```"]
    threads = threading.active_count()
    start = time.monotonic()
    got = model(["q"] * 7, completions, {"tests": [TEST] * 7})
    assert time.monotonic() - start < 30
    assert got.total.tolist() == [1, 0, 0, 0, 1, 0, 0]
    assert not got.errors.any()
    # One more thread starts the workers.
    assert threading.active_count() <= threads + 1
    model.pool.close()


def test_run_removes_deeply_nested_folders(monkeypatch, tmp_path):
    """Nested more deeply than Python can recurse, and the last folder is locked."""
    monkeypatch.setattr(isolation.tempfile, "tempdir", str(tmp_path))
    os.chmod(tmp_path, 0o755)
    program = "import os\ndef dig():\n    for _ in range(200):\n        os.mkdir('d')\n        os.chdir('d')\n"
    program += "    os.chmod('.', 0)"
    assert run_tests(program, "dig()", SECONDS, "rlimits")
    assert list(tmp_path.iterdir()) == []


def test_program_cannot_forge_a_verdict():
    """Writing to every open file forges no verdict and closes no socket of this process."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        program = "import os\nfor fd in range(64):\n    try:\n        os.write(fd, b'12\\npassed')\n"
        assert not run_tests(f"{program}    except OSError:\n        pass\n{SQUARE}", TEST, SECONDS)
        with pytest.raises(BlockingIOError):
            server.accept()
