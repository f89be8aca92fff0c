"""`math_answer`: a table of answer pairs, each judged by hand, and harmful completions."""

import json
import time
from collections import Counter
from pathlib import Path

import pytest

from grpo_fast.rewards import RewardModel, final_number, isolated, math_answer
from grpo_fast.rewards.functions.answer_text import final_answer
from grpo_fast.rewards.functions.answers import same_answer

PAIRS_FILE = Path(__file__).parents[1] / "support" / "answer_pairs.jsonl"
PAIRS = [json.loads(line) for line in PAIRS_FILE.open(encoding="utf-8")]


@pytest.mark.parametrize("kind", sorted({pair["kind"] for pair in PAIRS}))
def test_same_answer_pairs(kind):
    pairs = [pair for pair in PAIRS if pair["kind"] == kind]
    assert {pair["right"] for pair in pairs} == {True, False}
    for pair in pairs:
        assert same_answer(pair["completion"], pair["reference"]) is pair["right"], pair


KINDS = ("decimal", "minus sign", "exponent", "choice", "chinese", "degrees", "units", "percent", "mixed number")
KINDS += ("commas", "part of an expression", "clock", "long digits", "several boxes", "hedge")


def test_answer_pairs_are_many_and_unique():
    assert len(PAIRS) >= 1000
    counts = Counter(pair["kind"] for pair in PAIRS)
    assert min(counts[kind] for kind in KINDS) >= 30
    assert len({(pair["reference"], pair["completion"]) for pair in PAIRS}) == len(PAIRS)
    assert min(Counter(pair["right"] for pair in PAIRS).values()) > 150


@pytest.mark.parametrize(
    ("text", "items", "bare", "claim"),
    [
        ("<think>1</think> <answer> 2 </answer>", ["2"], True, None),
        ("1 #### 2", ["2"], True, None),
        ("<answer>#### 2</answer>", ["#### 2"], True, None),
        (r"1, no, \boxed{2}.", ["2"], True, None),
        (r"\boxed{1} and $\boxed{2}$", ["1", "2"], True, None),
        (r"\boxed{1}, or maybe $\boxed{2}$", ["1", "2"], True, None),
        (r"\boxed{1}, no: \boxed{2}", ["2"], True, None),
        (r"\boxed{\boxed{1}}", [r"\boxed{1}"], True, None),
        (r"\boxed{1} \boxed{2", ["1"], True, None),
        (r"\boxed{\{1, 2\}} is \boxed{[0, 1\}}", [r"[0, 1\}"], True, None),
        (r"$\boxed 5$", ["5"], True, None),
        (r"\boxed{1 or 2}", ["1", "2"], True, None),
        ("it is 2", ["it is 2"], False, None),
        ("The answer is 2. Or so.", ["The answer is 2. Or so."], False, "2"),
        ("The answer is 1, 2 or 3", ["1", "2", "3"], False, "1, 2 or 3"),
        ("There are 3 or 4, so 7", ["There are 3 or 4, so 7"], False, None),
        ("", [""], False, None),
    ],
)
def test_final_answer_in_texts(text, items, bare, claim):
    assert final_answer(text) == (items, bare, claim)


HARM = {
    "a megabyte of text": "so we get " * 100_000,
    "a megabyte of digits": "9" * 1_000_000,
    "a megabyte of boxes": r"\boxed{" * 140_000,
    "a megabyte of tags": "<answer>" * 125_000,
    "a megabyte of dollars": "$" * 1_000_000,
    "spaces": "answer" + " " * 1_000_000 + "=",
    "bait for the patterns": ("answer is " + "=" * 30 + " 1 ") * 200,
    "more bait": "final answer is " + r"\( " * 600,
    "nested fractions": r"$" + r"\frac{1" * 300 + "}" * 300 + "$",
    "nested parentheses": "$" + "(" * 900 + "1" + ")" * 900 + "$",
    "a tower": r"\boxed{9^{9^{9^{9}}}}",
    "a tower in plain text": "The answer is 9^9^9^9",
    "a factorial": r"\boxed{((99999999!)!)!}",
    "a power to expand": r"\boxed{(a+b+c+d+e+f+g)^{200}}",
    "an integral": r"\boxed{\int_0^{100} \sin(x^x) e^{x^{x}} dx}",
    "a long sum": r"\boxed{" + "+".join(map(str, range(500))) + "}",
    "words for a unit": "5 " + "a" * 1500 + "!",
    "space for a unit": "5" + " " * 1900 + "!",
    "bait for alternatives": "1 or " + "9" * 1900,
    "more bait for alternatives": "9," * 900 + " or 1 and 1",
    "answers without end": "the answer is " * 100_000,
    "nulls and surrogates": "\0\ud800" * 500 + r"\boxed{\0}",
}


def test_math_answer_harmful_completions_end_in_time():
    """With one or more workers: no completion takes longer than the limit, and the harmless ones are scored."""
    model = RewardModel(["math_answer", "final_number"], None, timeout=1.0)
    completions = [*HARM.values(), r"\boxed{\frac{14}{2}}"]
    start = time.monotonic()
    got = model(["q"] * len(completions), completions, {"answer": ["7"] * len(completions)})
    seconds = time.monotonic() - start
    model.pool.close()
    wrong = [name for name, value in zip(HARM, got.each[:-1, 0].tolist(), strict=True) if value]
    assert not wrong
    assert got.each[-1, 0] == 1
    assert not got.errors.any()
    assert seconds < 1.0 * len(completions) + 30


def test_math_answer_is_isolated_and_runs_in_a_thread():
    """Users may call it anywhere; math-verify's own time limits would fail outside the main thread."""
    assert math_answer.isolated
    assert math_answer.over_limit == 0
    assert not hasattr(final_number, "isolated")
    model = RewardModel(["exact_answer"], None)
    model.functions = [lambda **columns: math_answer(**columns)]
    assert model(["q"], [r"\boxed{\frac{14}{2}}"], {"answer": ["7"]}).total.item() == 1
    assert isolated()(lambda: None).over_limit is None
