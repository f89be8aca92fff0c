"""The built-in reward functions, except `math_answer` and `unit_tests`."""

import json
import math
from pathlib import Path

import pytest

from grpo_fast.errors import UserError
from grpo_fast.rewards import (
    RewardModel,
    answer_format,
    boxed_answer,
    countdown_equation,
    digits_included,
    digits_ordered,
    final_number,
    gsm8k_answer,
    load_reward,
    soft_answer_format,
    think_format,
)

GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k"


@pytest.mark.parametrize(
    ("prompt", "completion", "included", "ordered"),
    [
        ("3142>", "1234", 1.0, 1.0),
        ("3142>", "4321", 1.0, 0.0),
        ("3142>", "1243", 1.0, 2 / 3),
        ("3142>", "", 0.0, 0.0),
        ("3142>", "1", 0.25, 0.0),
        ("3142>", "1111", 0.25, 0.25),
        ("3142>", "5678", 0.0, 0.0),  # perfect order of the wrong digits earns nothing
        ("3142>", "12344", 0.8, 0.8),  # one digit too many
        ("3142>", "12>34", 0.8, 0.8 * 2 / 4),
        ("2255>", "2255", 1.0, 1.0),
        ("2255>", "2555", 0.75, 0.75),
    ],
)
def test_digits_included_and_ordered_partial_answers(prompt, completion, included, ordered):
    assert digits_included([prompt], [completion]) == [pytest.approx(included)]
    assert digits_ordered([prompt], [completion]) == [pytest.approx(ordered)]


@pytest.mark.parametrize(
    ("completion", "answer", "reward"),
    [
        ("7", "7", 1),
        ("3 + 4 = 7.", "7", 1),
        ("7 is 3 + 4", "7", 0),
        ("", "7", 0),
        ("so the total is 1,234.50 dollars", "1234.5", 1),
        ("#### 72", "Natalia sold ... #### 72", 1),
        ("#### 72 and not 5", "#### 5", 1),
        ("12 apples #### 5", "#### 5", 1),
        ("-3", "3", 0),
        ("-3", "#### -3", 1),
        ("72", "#### 1,072", 0),
        (".5", "0.5", 1),
        ("it is -.25", "-0.25", 1),
        ("-.25", "25", 0),
        ("\u22123", "-3", 1),
        ("\u22123", "3", 0),
        ("1e3", "1000", 1),
        ("1e-3", "0.001", 1),
        ("1e3", "3", 0),
        ("3,4", "34", 0),
        ("3,4", "4", 0),
        ("1,2001", "1200", 0),
        ("10-3", "-3", 0),
        ("10-3", "3", 0),
        ("pages 10\u201312", "-12", 0),
        ("2", "1/2", 0),
        ("3/2", "1/2", 0),
        ("1/2", "2", 0),
        ("1/2", "0.5", 1),
        (r"\frac{1}{2}", "1/2", 1),
        (r"\frac{1}{2}", "2", 0),
        ("2 1/2", "2.5", 1),
        ("2 1/2", "1/2", 0),
        ("12:30", "4:10", 0),
        ("10", "4:10", 0),
        ("12:30", "30", 0),
        ("at 4:10", "4:10", 1),
        ("123456789012345678901", "123456789012345678902", 0),
        ("123456789012345678901", "#### 123,456,789,012,345,678,901", 1),
        ("0.1234567890123456788", "0.1234567890123456789", 0),
        ("9" * 5000, "9" * 5000, 1),
        ("9" * 5000, "9" * 4999, 0),
        ("2*8", "8", 0),
        ("72%", "72", 1),
        ("7.0", "7", 1),
        ("答案是42。", "42", 1),
        ("\uff17\uff12", "72", 1),
        ("a 5-year-old", "5", 1),
        ("1/0", "0", 0),
        ("so 72 " + "and no other number " * 200, "72", 1),
        ("5" + "7" * 3000, "7" * 1999, 0),
    ],
)
def test_final_number_completion_and_answer(completion, answer, reward):
    assert final_number(["q"], [completion], answer=[answer]) == [reward]
    assert final_number([[]], [[{"role": "assistant", "content": completion}]], answer=[answer]) == [reward]


@pytest.mark.skipif(not GSM8K.is_dir(), reason="GSM8K is not beside this checkout")
def test_final_number_reads_every_gsm8k_answer():
    for name, size in (("train", 7473), ("test", 1319)):
        answers = [json.loads(line)["answer"] for line in (GSM8K / f"{name}.jsonl").open(encoding="utf-8")]
        assert len(answers) == size
        finals = [answer.rpartition("####")[2].strip() for answer in answers]
        assert sum(final_number(finals, finals, answer=answers)) == size


def scored(function, completion, prompt="q", **columns):
    return function([prompt], [completion], **{name: [value] for name, value in columns.items()})[0]


@pytest.mark.parametrize(
    ("completion", "strict", "soft", "think"),
    [
        ("<think>a</think><answer>b</answer>", 1, 1, 1),
        ("<think>a\nb</think>\n \n<answer>b</answer>\n", 1, 1, 1),
        ("First: <think>a</think> <answer>b</answer>", 1, 1, 0),
        ("<think>a</think> so <answer>b</answer>", 0, 1, 1),
        ("<think>a</think> <answer>b</answer> and more", 0, 1, 1),
        ("<think></think> <answer>b</answer>", 0, 1, 1),
        ("<think>a</think> <answer> </answer>", 0, 1, 1),
        ("a</think> <answer>b</answer>", 0, 1, 0),
        ("<think>a<think>b</think> <answer>b</answer>", 0, 1, 0),
        ("<think>a</think> <answer>b</answer> <answer>c</answer>", 0, 1, 1),
        ("<answer>b</answer> <think>a</think>", 0, 0, 0),
        ("<think>a</think> <answer>b", 0, 0, 1),
        ("<think>a", 0, 0, 0),
        ("b", 0, 0, 0),
        ("", 0, 0, 0),
    ],
)
def test_format_rewards_of_completions(completion, strict, soft, think):
    assert scored(answer_format, completion) == strict
    assert scored(soft_answer_format, completion) == soft
    assert scored(think_format, completion) == think


def test_format_rewards_prompt_that_opens_the_tag():
    prompt = "What is 3 + 4?\nAssistant: <think>"
    assert scored(answer_format, "a</think> <answer>7</answer>", prompt) == 1
    assert scored(think_format, "a</think> 7", prompt) == 1
    assert scored(answer_format, "<think>a</think> <answer>7</answer>", prompt) == 0


@pytest.mark.parametrize(
    ("equation", "right"),
    [
        ("(3 + 5) * 4 - 8", True),
        ("4*(5+3)-8", True),
        ("3 * 4 * (8 - 5) - 12", False),  # a number that was not given
        ("3 * 8", False),  # not all of them
        ("(3 + 5) * 4 - 8 + 3 - 3", False),  # one of them three times
        ("3 + 5 + 4 + 8", False),  # 20
        ("24", False),
        ("(3 + 5) * 4 - 8 = 24", False),
        ("3 ** 5 - 4 * 8", False),
        ("3 // 5 + 4 * 8", False),
        ("-3 + 5 * 4 + 8", False),
        ("__import__('os').getpid()", False),
        ("(3 + 5) * 4 - 8 # 24", False),
        ("3 / (5 - 5)", False),
        ("(3 + 5", False),
        ("(" * 140 + "3" + ")" * 140, False),
        ("9**9**9**9", False),
        ("", False),
    ],
)
def test_countdown_equation_right_and_wrong(equation, right):
    text = f"<think>3 + 5</think> <answer> {equation} </answer>"
    assert scored(countdown_equation, text, nums=[3, 5, 4, 8], target=24) == right


def test_countdown_equation_is_exact_and_needs_the_tags():
    assert scored(countdown_equation, "<answer>8 / (3 - 8 / 3)</answer>", nums=[3, 3, 8, 8], target=24) == 1
    assert scored(countdown_equation, "<answer>1 / 3 * 3</answer>", nums=[1, 3, 3], target=1) == 1
    assert scored(countdown_equation, "8 / (3 - 8 / 3)", nums=[3, 3, 8, 8], target=24) == 0
    assert scored(countdown_equation, "<answer>1+2</answer> <answer>2+2</answer>", nums=[1, 2], target=3) == 0


@pytest.mark.parametrize(
    ("completion", "answer", "right"),
    [
        (r"so \boxed{\frac{1}{2}}", r"\frac{1}{2}", True),
        (r"so \boxed{\dfrac{1} {2}}.", r"the half, \boxed{\frac{1}{2}}", True),
        (r"\boxed{1} then \boxed{2}", "2", True),
        (r"\boxed{1} then \boxed{2}", "1", False),
        (r"\boxed{1} then \boxed{2", "1", True),
        (r"\boxed{\left(1,\,2\right)}", "(1, 2)", True),
        ("2", "2", False),
        ("", "2", False),
        (r"\boxed 5", "5", True),
        (r"$\boxed 5$.", "5", True),
        (r"\boxed 15", "5", False),
        (r"\fbox{5}", "5", True),
        (r"\boxed{7.0}", "7", True),
        (r"\boxed{7}", "7.0", True),
        (r"\boxed{7.1}", "7", False),
        (r"\boxed{0.5}", r"\frac{1}{2}", True),
        (r"\boxed{.5}", "0.5", True),
        (r"\boxed{1,000}", "1000", True),
        (r"\boxed{\{1, 2\}}", r"\{1,2\}", True),
        (r"\boxed{[0, 1\}}", r"[0,1\}", True),
        (r"\boxed{[0, 1\}}", "[0,1", False),
        (r"\boxed{\leftarrow}", "arrow", False),
        (r"\boxed{\rightarrow}", "arrow", False),
        (r"\boxed{arrow}", "arrow", True),
        (r"\boxed{\leftarrow}", r"\leftarrow", True),
        (r"\boxed{3,4}", "34", False),
        (r"\boxed{10-3}", "-3", False),
        (r"\boxed{123456789012345678901}", "123456789012345678902", False),
        (r"\boxedfoo{5}", "5", False),
        (r"\boxed{\text{even}}", r"\text{even}", True),
    ],
)
def test_boxed_answer_right_and_wrong(completion, answer, right):
    assert scored(boxed_answer, completion, answer=answer) == right


def test_gsm8k_answer_needs_the_mark():
    assert scored(gsm8k_answer, "it is #### 1,072", answer="so #### 1072") == 1
    assert scored(gsm8k_answer, "it is 1072", answer="so #### 1072") == 0
    assert scored(gsm8k_answer, "it is #### 72", answer="so #### 1072") == 0


def test_kimi_length_right_and_wrong_completions():
    """By hand: lengths 2, 4, 10 make 0.5, 0.25, -0.5; the third group's lengths are equal."""
    model = RewardModel(["exact_answer", "kimi_length(exact_answer)"], [1.0, 0.5])
    model.check_columns(["answer"])
    ids = [[0] * length for length in (2, 4, 10, 2, 4, 10, 5, 5, 5)]
    completions = ["1", "1", "1", "2", "2", "2", "1", "2", "1"]
    prompts = ["q"] * 3 + ["r"] * 3 + ["s"] * 3
    got = model(prompts, completions, {"answer": ["1"] * 9, "completion_ids": ids}, 3)
    assert got.each[:, 1].tolist() == [0.5, 0.25, -0.5, 0, 0, -0.5, 0, 0, 0]
    assert got.total.tolist() == [1.25, 1.125, 0.75, 0, 0, -0.25, 1, 0, 1]


def test_kimi_length_separates_groups_of_one_prompt():
    """The same prompt twice in a batch, as happens at the end of an epoch."""
    model = RewardModel(["exact_answer", "kimi_length(exact_answer)"], None)
    ids = [[0] * length for length in (2, 4, 20, 40)]
    got = model(["q"] * 4, ["1"] * 4, {"answer": ["1"] * 4, "completion_ids": ids}, 2)
    assert got.each[:, 1].tolist() == [0.5, -0.5, 0.5, -0.5]


def test_kimi_length_needs_its_judge():
    with pytest.raises(UserError, match="needs 'final_number' among the functions"):
        RewardModel(["exact_answer", "kimi_length(final_number)"], None)


def test_kimi_length_judge_returns_none():
    model = RewardModel(["exact_answer", "kimi_length(exact_answer)"], None)
    model.functions[0] = lambda prompts, completions, **columns: [None, 1.0]
    got = model(["q", "q"], ["a", "b"], {"completion_ids": [[1], [1, 2, 3]]}, 2)
    assert got.each[:, 1].tolist() == pytest.approx([math.nan, -0.5], nan_ok=True)


def test_soft_overlong_grows_over_the_last_tokens():
    """By hand: no penalty up to 6 tokens, then a quarter per token, at most 1."""
    reward = load_reward("soft_overlong(10, 4)")
    ids = [[0] * length for length in (0, 6, 7, 8, 9, 10, 11)]
    assert reward(ids, ids, completion_ids=ids) == [0, 0, -0.25, -0.5, -0.75, -1, -1]
