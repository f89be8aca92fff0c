"""Generated tasks: each returns training rows and held-out rows, always the same for the same seed."""

from __future__ import annotations

import itertools
import random
import string

from grpo_fast.data.templates import Row
from grpo_fast.errors import UserError

Splits = tuple[list[Row], list[Row]]


def sort_digits(length: int = 4, test_size: int = 500, seed: int = 0) -> Splits:
    """Prompts ``3142>`` with the answer ``1234``: all tuples of `length` digits, about `test_size` held out.

    Whole multisets are held out, so that training has no other order of the same digits.
    """
    _check("sort_digits", "length", length, 1, 6)
    _check("sort_digits", "test_size", test_size, 1, 10**length - 1)
    by_answer: dict[str, list[Row]] = {}
    for digits in map("".join, itertools.product(string.digits, repeat=length)):
        answer = "".join(sorted(digits))
        by_answer.setdefault(answer, []).append({"prompt": f"{digits}>", "answer": answer})
    answers = list(by_answer)
    random.Random(seed).shuffle(answers)
    train, test = [], []
    for answer in answers:
        (test if len(test) < test_size else train).extend(by_answer[answer])
    return train, test


def addition(test_share: float = 0.2, seed: int = 0) -> Splits:
    """Questions ``What is 3 + 4?`` for all pairs of digits: `arithmetic` with its defaults, sorted by question."""
    splits = arithmetic(test_share=test_share, seed=seed)
    for rows in splits:
        rows.sort(key=lambda row: row["prompt"][0]["content"])
    return splits


# The question and the answer for two operands; divisions have no remainder.
OPERATORS = {
    "+": lambda a, b: (f"{a} + {b}", a + b),
    "-": lambda a, b: (f"{a} - {b}", a - b),
    "*": lambda a, b: (f"{a} * {b}", a * b),
    "/": lambda a, b: (f"{a * b} / {b}", a),
}


def arithmetic(
    operators: str = "+", digits: int = 1, num_pairs: int = 5000, test_share: float = 0.2, seed: int = 0
) -> Splits:
    """Questions ``What is 12 - 34? Reply with only the number.`` as a chat, with their ``answer``.

    There are at most `num_pairs` pairs of operands of up to `digits` digits, in both orders, with all of the
    `operators` (some of ``+-*/``; the operands of a division are its quotient and divisor). The share `test_share` of
    the unordered pairs is held out, so that 4 + 3 is not in the training rows if 3 + 4 is held out.
    """
    if not operators or len(set(operators)) != len(operators) or not set(operators) <= set(OPERATORS):
        allowed = "".join(OPERATORS)
        raise UserError(f"arithmetic: operators={operators!r} is not allowed: it must be some of {allowed}, each once")
    _check("arithmetic", "digits", digits, 1, 9)
    _check("arithmetic", "num_pairs", num_pairs, 2, 1_000_000)
    if not 0 < test_share < 1:
        raise UserError(f"arithmetic: test_share={test_share!r} is not allowed: it must be above 0 and below 1")
    generator, limit = random.Random(seed), 10**digits
    if num_pairs >= limit * (limit + 1) // 2:
        pairs = list(itertools.combinations_with_replacement(range(limit), 2))
        generator.shuffle(pairs)
    else:
        drawn: dict[tuple[int, int], None] = {}
        while len(drawn) < num_pairs:
            a, b = generator.randrange(limit), generator.randrange(limit)
            drawn[min(a, b), max(a, b)] = None
        pairs = list(drawn)
    held_out = min(max(round(test_share * len(pairs)), 1), len(pairs) - 1)
    return _questions(pairs[held_out:], operators), _questions(pairs[:held_out], operators)


def _questions(pairs: list[tuple[int, int]], operators: str) -> list[Row]:
    rows = []
    for a, b in itertools.chain.from_iterable(dict.fromkeys([pair, pair[::-1]]) for pair in pairs):
        for operator in operators:
            if operator == "/" and b == 0:
                continue
            asked, answer = OPERATORS[operator](a, b)
            content = f"What is {asked}? Reply with only the number."
            rows.append({"prompt": [{"role": "user", "content": content}], "answer": str(answer)})
    return rows


def countdown(
    train_size: int = 20_000,
    test_size: int = 500,
    min_numbers: int = 3,
    max_numbers: int = 4,
    max_number: int = 99,
    max_target: int = 99,
    seed: int = 0,
) -> Splits:
    """Countdown problems: make ``target`` from ``nums``, using every number once, with + - * / and parentheses.

    Every target can be reached: it is the value of a random expression whose intermediate results are positive
    integers. `nums` are from 1 to `max_number`, targets from 1 to `max_target`. No two problems have the same numbers
    in any order, so that no training row is a held-out problem with another target.
    """
    _check("countdown", "train_size", train_size, 1, 1_000_000)
    _check("countdown", "test_size", test_size, 1, 1_000_000)
    _check("countdown", "min_numbers", min_numbers, 2, 6)
    _check("countdown", "max_numbers", max_numbers, min_numbers, 6)
    _check("countdown", "max_number", max_number, 1, 10_000)
    _check("countdown", "max_target", max_target, 1, 1_000_000)
    generator, wanted = random.Random(seed), train_size + test_size
    problems: dict[tuple[int, ...], int] = {}
    # A draw fails if its numbers are taken or give no target; many failures in a row mean that few problems are left.
    failures = 0
    while len(problems) < wanted:
        count = generator.randint(min_numbers, max_numbers)
        nums = tuple(sorted(generator.choices(range(1, max_number + 1), k=count)))
        values = (_random_value(list(nums), generator) for _ in range(0 if nums in problems else 20))
        target = next((value for value in values if value is not None and value <= max_target), None)
        failures += 1
        if target is not None:
            problems[nums], failures = target, 0
        if failures > 5_000:
            raise UserError(
                f"countdown: found only {len(problems)} problems of {min_numbers} to {max_numbers} numbers up to "
                f"{max_number} with targets up to {max_target}, but train_size + test_size = {wanted}"
            )
    rows = [{"nums": generator.sample(nums, len(nums)), "target": target} for nums, target in problems.items()]
    return rows[test_size:], rows[:test_size]


def _random_value(values: list[int], generator: random.Random) -> int | None:
    """The value of a random expression of all `values`, or None if a step does not give a positive integer."""
    while len(values) > 1:
        a, b = (values.pop(int(generator.random() * len(values))) for _ in range(2))
        sign = generator.choice("+-*/")
        value = a + b if sign == "+" else a - b if sign == "-" else a * b if sign == "*" else a // b
        if value < 1 or (sign == "/" and a % b):
            return None
        values.append(value)
    return values[0]


def _check(task: str, name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise UserError(f"{task}: {name}={value!r} is not allowed: it must be from {low} to {high}")
