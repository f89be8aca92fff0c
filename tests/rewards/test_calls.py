"""The arguments of reward functions, and the checks of what they return."""

import math
import pickle
import sys
from collections import OrderedDict

import numpy
import pytest

from grpo_fast.errors import UserError
from grpo_fast.rewards import RESERVED_COLUMNS, RewardModel


def test_total_is_the_weighted_sum_without_none():
    def abstains(prompts, completions, **columns):
        return [None, 1.0]

    model = RewardModel(["digits_included", "exact_answer"], [2.0, 0.5])
    model.functions[1] = abstains
    scored = model(["12>", "12>"], ["12", "1"], {"answer": ["12", "12"]})
    assert scored.total.tolist() == [2.0, 1.5]
    assert scored.each.isnan().tolist() == [[False, True], [False, False]]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return [0.0]", "returned 1 rewards for 2 completions"),
        ("return [0.0, float('nan')]", "returned nan for completion 1"),
        ("return [float('inf'), 0.0]", "returned inf for completion 0"),
        ("return ['good', 0.0]", "returned 'good' for completion 0"),
        ("return 1.0", "must return a list of numbers, got float"),
        ("return 'ab'", "must return a list of numbers, got str"),
        ("return [0.0, 1e300]", r"returned 1e\+300 for completion 1"),
        ("return [0.0, 10**400]", "returned 1000000"),
        ("raise SystemExit(0)", "raised SystemExit: 0"),
        ("raise KeyError('a\\nb')", "raised KeyError: 'a"),
        ("return [1 / 0]", r"raised ZeroDivisionError: division by zero \(mine.py, line 2"),
    ],
)
def test_call_wrong_return_value(tmp_path, body, message):
    (tmp_path / "mine.py").write_text(f"def mine(prompts, completions, **columns):\n    {body}\n")
    model = RewardModel([f"{tmp_path / 'mine.py'}:mine"], None, on_error="raise")
    with pytest.raises(UserError, match=f"reward function 'mine' {message}.* for the prompt '[ab]'"):
        model(["a", "b"], ["c", "d"], {})


def test_check_columns_missing_argument():
    model = RewardModel(["exact_answer"], None)
    model.check_columns(["answer", "level"])
    with pytest.raises(UserError, match=r"reward function 'exact_answer'.*missing a required argument: 'answer'"):
        model.check_columns(["level"])


class Counted:
    """A reward function that is an object, and one that is its method, with ``self``."""

    def __init__(self):
        self.seen = []

    def __call__(self, prompts, completions, **columns):
        self.seen.append((prompts, completions, columns))
        return [0.0] * len(prompts)

    def method(self, prompts, completions, **columns):
        return self(prompts, completions, **columns)


@pytest.mark.parametrize("bound", [False, True], ids=["object", "method"])
def test_columns_with_the_names_of_arguments(bound):
    model, counted, said = RewardModel(["exact_answer", "kimi_length(exact_answer)"], None), Counted(), []
    model.functions[0], model.warn = counted.method if bound else counted, said.append
    names = ["self", "index", "columns", "name", "function", "the question", "prompts", "completions", "completion_ids"]
    columns = {name: [f"{name} 1", f"{name} 2"] for name in [*names, "correct", "reward_timeout", "signature"]}
    model.check_columns(columns)
    model.check_columns(columns)
    model(["p", "p"], ["a", "b"], {**columns, "completion_ids": [[1], [1, 2]]}, num_generations=2)
    ((prompts, completions, seen),) = counted.seen
    assert (prompts, completions, seen.pop("completion_ids")) == (["p", "p"], ["a", "b"], [[1], [1, 2]])
    assert seen == {name: columns[name] for name in columns if name not in ("self", *RESERVED_COLUMNS)}
    taken = {"exact_answer": ["self", *RESERVED_COLUMNS], "kimi_length": ["correct", *RESERVED_COLUMNS]}
    assert sorted(text.split(", whose")[0] for text in said) == sorted(
        f"the dataset's column {column!r} does not reach the reward function {name!r}"
        for name, columns in taken.items() for column in columns
    )  # fmt: skip


def test_rendered_prompts_reach_functions_with_that_parameter():
    seen = {}

    def strict(prompts, completions, completion_ids, answer):
        return [0.0]

    def named(prompts, completions, completion_ids, answer, rendered_prompts):
        seen["named"] = rendered_prompts
        return [0.0]

    def open_ended(prompts, completions, **columns):
        seen["open-ended"] = columns["rendered_prompts"]
        return [0.0]

    model = RewardModel(["exact_answer", "final_number", "boxed_answer"], None)
    model.functions = [strict, named, open_ended]
    model.check_columns(["answer"])
    model(["p"], ["c"], {"answer": ["1"], "completion_ids": [[1]], "rendered_prompts": ["<s>p"]})
    assert seen == {"named": ["<s>p"], "open-ended": ["<s>p"]}


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("exact_answer", {"answer": None}),
        ("countdown_equation", {"nums": [1], "target": None}),
        ("math_answer", {}),
        ("final_number", {"answer": math.nan}),
    ],
)
def test_check_rows_missing_answer(name, row):
    column = "target" if "nums" in row else "answer"
    rows = [
        {"prompt": "p", "nums": [1], column: "1"},
        {"prompt": [{"role": "user", "content": "How?"}], "nums": [1], **row},
    ]
    message = f"the row with the prompt 'How.' has no {column!r}, which the reward function {name!r} needs; add it"
    with pytest.raises(UserError, match=message):
        RewardModel([name], None).check_rows(rows, "data")
    own = RewardModel([name], None)
    own.functions = [lambda prompts, completions, answer=None, **columns: [None]]
    own.check_rows(rows, "data")


class Opaque:
    """A value that is neither JSON nor immutable, such as an image."""

    def __init__(self, pixels):
        self.pixels = pixels


COLUMNS = {
    "a list": [1, 2],
    "a dictionary": {"inputs": 1},
    "lists in lists": [[1, 2], [3, [4, [5]]]],
    "lists in dictionaries": {"inputs": [1, {"value": [2]}], "outputs": {"first": {"second": [3]}}},
    "a set in a tuple": ({1, 2}, [3]),
    "another kind of dictionary": OrderedDict(cases=[1]),
    "an array": numpy.arange(3),
    "an object": Opaque([[1, 2]]),
}


def spoil(value):
    """Change everything in `value`, from the inside out."""
    if isinstance(value, dict):
        for part in value.values():
            spoil(part)
        value["spoilt"] = True
    elif isinstance(value, (list, tuple)):
        for part in value:
            spoil(part)
        if isinstance(value, list):
            value.append("spoilt")
    elif isinstance(value, set):
        value.add("spoilt")
    elif isinstance(value, numpy.ndarray):
        value += 1
    elif isinstance(value, Opaque):
        spoil(value.pixels)


@pytest.mark.parametrize("value", COLUMNS.values(), ids=COLUMNS)
def test_call_passes_deep_copies(value):
    """Changes by a function are not visible to other functions, other samples of the group or the next batch."""
    seen = []

    def spoiling(prompts, completions, column, completion_ids, **columns):
        for index, given in enumerate(column):
            seen.append(pickle.dumps((given, prompts[index], completions[index], completion_ids[index])))
            for part in (given, prompts[index], completions[index], completion_ids[index]):
                spoil(part)
        prompts.clear()
        return [1.0] * len(column)

    model = RewardModel(["exact_answer", "final_number"], None)
    model.functions = [spoiling, spoiling]
    prompts = [[{"role": "user", "content": [{"type": "text", "text": "q"}]}]] * 2
    arguments = prompts, ["a", "b"], {"column": [value] * 2, "completion_ids": [[1, 2]] * 2}
    before = pickle.dumps(arguments)
    for _ in range(2):
        assert model(*arguments).total.tolist() == [2, 2]
    assert len(seen) == 8
    assert len(set(seen)) == 2  # those of the two samples
    assert pickle.dumps(arguments) == before


def test_call_column_that_cannot_be_copied():
    model = RewardModel(["exact_answer"], None)
    model.functions = [lambda prompts, **columns: [1.0] * len(prompts)]
    with pytest.raises(UserError, match="'exact_answer' could not be given a copy of column 'file': cannot pickle"):
        model(["q"], ["a"], {"file": [sys.stdout]})


def test_total_is_nan_if_all_functions_return_none():
    model = RewardModel(["exact_answer"], None)
    model.functions = [lambda prompts, completions, **columns: [None, 0.5]]
    scored = model(["a", "b"], ["c", "d"], {})
    assert scored.total.isnan().tolist() == [True, False]


def test_index_unknown_metric():
    with pytest.raises(UserError, match="eval_metric='accuracy' is not one of reward_funcs: exact_answer"):
        RewardModel(["exact_answer"], None).index("accuracy")


def scored(function, completion, prompt="q", **columns):
    return function([prompt], [completion], **{name: [value] for name, value in columns.items()})[0]
