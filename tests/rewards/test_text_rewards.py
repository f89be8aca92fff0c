"""Rewards of the literature for language, repetition, length and format, and their arguments in a configuration."""

import math
import random

import pytest

from grpo_fast import GRPOConfig
from grpo_fast.errors import UserError
from grpo_fast.rewards import (
    RewardModel,
    get_cosine_scaled_reward,
    get_repetition_penalty_reward,
    get_soft_overlong_punishment,
    load_reward,
)


def score(name, completion, prompt="q", **columns):
    return load_reward(name)([prompt], [completion], **{key: [value] for key, value in columns.items()})[0]


@pytest.mark.parametrize(
    ("language", "completion", "share"),
    [
        ("en", "So the answer is seven", 1),
        ("en", "So 答案 is seven", 3 / 5),  # each Chinese character is a word
        ("zh", "所以答案是 seven", 5 / 6),
        ("zh", "所以答案是 $x + y = seven$ 和 `code here`", 1),
        ("zh", r"所以 \frac{1}{2} \[a + b\] \(c\)", 1),
        ("zh", "```python\nprint(1)\n```\n所以", 1),
        ("en", "it's naïve, isn\u2019t it? 12 + 3 = 15", 1),
        ("ru", "поэтому the ответ", 2 / 3),
        ("ja", "答えは seven です", 5 / 6),
        ("ko", "그래서 the 답", 2 / 3),
        ("ja", "サーバー、です。人々", 1),
        ("zh", "サーバー 答案", 2 / 6),
        ("th", "ดี ok", 1 / 2),
        ("hi", "इसलिए उत्तर", 1),
        ("en", "<think>all English</think> <answer>答案</answer>", 1),  # only the thoughts count
        ("zh", "<think>all English</think> 答案", 0),
        ("en", "1 + 2 = 3", 0),
        ("en", "", 0),
    ],
)
def test_language_consistency_is_the_share_of_words(language, completion, share):
    assert score(f"language_consistency({language})", completion) == pytest.approx(share)
    chat = [{"role": "assistant", "content": completion}]
    assert score(f"language_consistency({language})", chat, []) == pytest.approx(share)


@pytest.mark.parametrize(
    ("ids", "size", "penalty"),
    [
        ([1, 2, 3, 4], 2, 0),
        ([5, 5, 5, 5, 5], 2, -0.75),  # one distinct pair of four
        ([1, 2, 1, 2, 1], 2, -0.5),
        ([1, 2, 3, 1, 2, 3], 3, -0.25),
        ([1, 1], 3, 0),
        ([], 1, 0),
    ],
)
def test_repetition_penalty_counts_repeated_ngrams(ids, size, penalty):
    assert score(f"repetition_penalty({size}, -1.0)", "", completion_ids=ids) == penalty
    assert get_repetition_penalty_reward(ngram_size=size)([""], [""], completion_ids=[ids]) == [penalty]
    assert score(f"repetition_penalty(ngram_size={size}, max_penalty=-2)", "", completion_ids=ids) == 2 * penalty


def test_repetition_penalty_equals_the_papers_formula():
    generator = random.Random(0)
    for _ in range(50):
        ids = [generator.randrange(4) for _ in range(generator.randrange(3, 30))]
        grams = list(zip(ids, ids[1:], ids[2:], strict=False))
        expected = -1.5 * (1 - len(set(grams)) / len(grams))
        assert score("repetition_penalty(3, -1.5)", "", completion_ids=ids) == pytest.approx(expected)


@pytest.mark.parametrize("length", [0, 25, 50, 75, 100, 150])
def test_cosine_scaled_interpolates_right_and_wrong(length):
    """The paper's ``eta_min + (eta_max - eta_min) / 2 (1 + cos(t pi / T))`` for each, constant beyond the end."""
    share = 0.5 * (1 + math.cos(math.pi * min(length, 100) / 100))
    columns = {"answer": ["1", "1"], "completion_ids": [[0] * length] * 2}
    model = RewardModel(["exact_answer", "cosine_scaled(exact_answer, 100)"], [0, 1])
    model.check_columns(["answer"])
    got = model(["q", "q"], ["1", "2"], columns, 2)
    expected = [0.5 + 0.5 * share, -0.5 - 0.5 * share]
    assert got.total.tolist() == pytest.approx(expected)
    theirs = get_cosine_scaled_reward(max_len=100)
    solved = theirs(["q"] * 3, [r"\boxed{1}", r"\boxed{2}", "1"], [[0] * length] * 3, solution=["1", "1", None])
    assert solved == pytest.approx([*expected, None])


def test_cosine_scaled_takes_its_bounds_by_name():
    model = RewardModel(["exact_answer", "cosine_scaled(exact_answer, 10, max_value_correct=2.0)"], [0, 1])
    assert model(["q"], ["1"], {"answer": ["1"], "completion_ids": [[]]}, 1).total.tolist() == [2.0]


@pytest.mark.parametrize(
    ("completion", "prompt", "right"),
    [
        ("<think>a,\nb</think> <answer>7</answer>\n", "q", True),
        ("<think>a</think> <answer>seven</answer>", "q", False),
        ("so <think>a</think> <answer>7</answer>", "q", False),
        ("a</think> <answer>7</answer>", "Assistant: <think>", True),
    ],
)
def test_format_regex_matches_whole_completions(completion, prompt, right):
    name = r'format_regex("<think>.*(,|\\w).*</think>\\s*<answer>\\d+</answer>")'
    assert score(name, completion, prompt) == right
    assert GRPOConfig(reward_funcs=f"exact_answer, {name},final_number").reward_funcs == [
        "exact_answer",
        name,
        "final_number",
    ]


def test_format_regex_ends_a_match_that_takes_too_long(monkeypatch):
    monkeypatch.setattr("grpo_fast.rewards.functions.format.MATCH_SECONDS", 0.05)
    model = RewardModel(['format_regex("(a|aa)+b")'], None)
    model.warn = lambda text: warnings.append(text)
    warnings: list[str] = []
    got = model(["q", "q"], ["ab", "a" * 60], {})
    assert got.each[0].item() == 1
    assert got.errors.flatten().tolist() == [False, True]
    assert "TimeoutError" in warnings[0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("language_consistency(english)", "the language must be one of af, am, "),
        ("language_consistency()", r"write language_consistency\(language\)"),
        ("repetition_penalty(0)", "ngram_size=0 is not allowed"),
        ("repetition_penalty(3, 1.0)", "max_penalty=1.0 is not allowed"),
        ("repetition_penalty(three)", r"write repetition_penalty\(ngram_size=3, max_penalty=-1.0\)"),
        ("repetition_penalty(True)", "is not allowed: write"),
        ("cosine_scaled(exact_answer)", r"write cosine_scaled\(judge, max_len, min_value_wrong=-1.0, "),
        ("cosine_scaled(exact_answer, 0)", "max_len=0 is not allowed"),
        ("cosine_scaled(exact_answer, 9, best=1.0)", "is not allowed: write"),
        ('format_regex("(")', r"format_regex\('\('\) is not allowed: missing \)"),
        ("format_regex(__import__('os').getpid())", r"write format_regex\(pattern\)"),
    ],
)
def test_load_reward_refuses_arguments_that_do_not_fit(name, message):
    with pytest.raises(UserError, match=message):
        load_reward(name)


def test_functions_of_trl_have_its_metric_names():
    functions = [get_soft_overlong_punishment(10, 4), get_cosine_scaled_reward(10), get_repetition_penalty_reward()]
    names = ["soft_overlong_punishment_reward", "cosine_scaled_reward", "repetition_penalty_reward"]
    assert RewardModel(functions, None).names == names
