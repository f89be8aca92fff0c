"""The generated tasks."""

import itertools
import operator
from fractions import Fraction

import pytest

from grpo_fast.data import BUILT_IN, addition, arithmetic, countdown, sort_digits
from grpo_fast.errors import UserError


def test_sort_digits_holds_out_whole_multisets():
    train, test = sort_digits()
    assert len(train) + len(test) == 10_000
    assert 500 <= len(test) < 525
    assert not {row["answer"] for row in train} & {row["answer"] for row in test}
    assert all(row["answer"] == "".join(sorted(row["prompt"][:-1])) for row in train + test)


def test_addition_holds_out_both_orders():
    train, test = addition()
    assert len(train) + len(test) == 100

    def pairs(rows):
        return {tuple(sorted(row["prompt"][0]["content"].split("?")[0][8:].split(" + "))) for row in rows}

    assert not pairs(train) & pairs(test)
    for row in train + test:
        a, b = row["prompt"][0]["content"].removeprefix("What is ").split("?")[0].split(" + ")
        assert int(a) + int(b) == int(row["answer"])


def asked(row):
    """The two operands, the operator and the answer of an arithmetic question."""
    a, sign, b = row["prompt"][0]["content"].removeprefix("What is ").partition("?")[0].split(" ")
    return int(a), sign, int(b), int(row["answer"])


def test_arithmetic_answers_are_right_and_held_out():
    compute = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
    train, test = arithmetic("+-*/", digits=2, num_pairs=600, seed=3)
    assert all(compute[sign](a, b) == answer for a, sign, b, answer in map(asked, train + test))
    assert {sign for _, sign, _, _ in map(asked, train)} == {sign for _, sign, _, _ in map(asked, test)} == set("+-*/")
    assert {len(str(a)) for a, _, _, _ in map(asked, train)} >= {1, 2}

    def pairs(rows):
        return {tuple(sorted((a, b))) for a, sign, b, _ in map(asked, rows) if sign in "+-*"}

    assert not pairs(train) & pairs(test)
    assert len(pairs(train)) == 480
    assert len(pairs(test)) == 120


def test_arithmetic_uses_all_pairs_if_there_are_few():
    train, test = arithmetic("-", digits=1)
    assert len(train) + len(test) == 100
    assert min(answer for _, _, _, answer in map(asked, train + test)) < 0


def values(numbers):
    """All values of the expressions that use every one of `numbers` once."""
    if len(numbers) == 1:
        yield numbers[0]
    for i, j in itertools.permutations(range(len(numbers)), 2):
        a, b, rest = numbers[i], numbers[j], [n for k, n in enumerate(numbers) if k not in (i, j)]
        for result in {a + b, a - b, a * b, *([a / b] if b else [])}:
            yield from values([result, *rest])


def test_countdown_targets_can_be_reached():
    train, test = countdown(train_size=30, test_size=10, seed=1)
    assert len(train) == 30
    assert len(test) == 10
    for row in train + test:
        assert len(row["nums"]) in (3, 4)
        assert all(1 <= number <= 99 for number in [*row["nums"], row["target"]])
        assert row["target"] in set(values([Fraction(number) for number in row["nums"]]))


def test_countdown_numbers_are_unique():
    train, test = countdown(train_size=1000, test_size=200)
    numbers = [tuple(sorted(row["nums"])) for row in train + test]
    assert len(set(numbers)) == 1200
    assert any(list(number) != row["nums"] for number, row in zip(numbers, train + test, strict=True))
    assert all(sum(len(n) == count for n in numbers) > 200 for count in (3, 4))


@pytest.mark.parametrize("task", ["sort_digits", "arithmetic", "countdown"])
def test_tasks_depend_on_their_seed(task):
    sizes = {"countdown": {"train_size": 50, "test_size": 10}, "arithmetic": {"digits": 3, "num_pairs": 50}}
    small = sizes.get(task, {})
    assert BUILT_IN[task](**small, seed=1) == BUILT_IN[task](**small, seed=1)
    assert BUILT_IN[task](**small, seed=1) != BUILT_IN[task](**small, seed=2)


@pytest.mark.parametrize(
    ("task", "arguments", "message"),
    [
        (arithmetic, {"operators": "+%"}, r"operators='\+%' is not allowed: it must be some of \+-\*/, each once"),
        (arithmetic, {"operators": "++"}, "each once"),
        (arithmetic, {"digits": 10}, "digits=10 is not allowed: it must be from 1 to 9"),
        (addition, {"test_share": 1.0}, "test_share=1.0 is not allowed"),
        (countdown, {"min_numbers": 4, "max_numbers": 3}, "max_numbers=3 is not allowed: it must be from 4 to 6"),
        (countdown, {"max_number": 2}, r"found only \d+ problems of 3 to 4 numbers up to 2 with targets up to 99, but"),
    ],
)
def test_tasks_wrong_arguments(task, arguments, message):
    with pytest.raises(UserError, match=message):
        task(**arguments)
