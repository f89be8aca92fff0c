"""The lengths of prompts, and the order in which they are sampled."""

import dataclasses
import itertools

import pytest

from grpo_fast.config import GRPOConfig
from grpo_fast.data import check_lengths, encode_rows, prompt_order
from grpo_fast.errors import UserError
from grpo_fast.model.loading import digit_tokenizer


def config(name, **fields):
    return GRPOConfig("m", dataset_name=str(name), reward_funcs=["exact_answer"], **fields)


def test_check_lengths_limits():
    rows = [{"prompt": "short"}, {"prompt": "long"}]
    encoded = [[1], [1] * 20]
    check_lengths(encoded, rows, 30, config("x", max_completion_length=10))
    with pytest.raises(UserError, match="do not fit the model's 29 positions; the longest prompt begins 'long'"):
        check_lengths(encoded, rows, 29, config("x", max_completion_length=10))
    with pytest.raises(UserError, match="do not fit max_tokens_per_microbatch=25"):
        check_lengths(encoded, rows, None, config("x", max_completion_length=10, max_tokens_per_microbatch=25))
    with pytest.raises(UserError, match="no tokens"):
        check_lengths([[]], rows, None, config("x"))


@pytest.mark.parametrize(
    ("fields", "limit"),
    [
        ({}, "the model's 50 positions"),
        ({"max_tokens_per_microbatch": 50}, "max_tokens_per_microbatch=50"),
        ({"use_vllm": True, "vllm_max_model_length": 50}, "vllm_max_model_length=50"),
    ],
)
def test_encode_rows_drops_long_prompts(fields, limit):
    tokenizer = digit_tokenizer()
    rows = [{"prompt": "1" * length} for length in (3, 40, 41, 5, 60)]
    run = config("x", max_completion_length=10, **fields)
    positions, said = None if fields else 50, []
    message = rf"a prompt of 60 tokens and max_completion_length=10 do not fit {limit}; .*; long_prompts=drop leaves"
    with pytest.raises(UserError, match=message):
        encode_rows(rows, tokenizer, run, positions, "training", said.append)
    drop = dataclasses.replace(run, long_prompts="drop")
    kept, encoded = encode_rows(rows, tokenizer, drop, positions, "training", said.append)
    assert kept == [rows[0], rows[1], rows[3]]
    assert [len(ids) for ids in encoded] == [3, 40, 5]
    reason = f"longer than 40 tokens, which is what max_completion_length=10 leaves of {limit}"
    assert said == [f"long_prompts='drop' leaves out 2 of 5 training prompts, {reason}"]
    with pytest.raises(UserError, match="would leave out 2 of 2 held-out prompts: all are longer than 40 tokens"):
        encode_rows([rows[2], rows[4]], tokenizer, drop, positions, "held-out", said.append)


def test_prompt_order_covers_every_epoch_and_depends_on_the_seed():
    first = list(itertools.islice(prompt_order(7, True, 1), 21))
    assert all(sorted(first[i : i + 7]) == list(range(7)) for i in (0, 7, 14))
    assert first[:7] != first[7:14]
    assert first == list(itertools.islice(prompt_order(7, True, 1), 21))
    assert first != list(itertools.islice(prompt_order(7, True, 2), 21))
    assert list(itertools.islice(prompt_order(3, False, 1), 6)) == [0, 1, 2, 0, 1, 2]


def test_prompt_order_starts_anywhere():
    first = list(itertools.islice(prompt_order(7, True, 1), 30))
    for start in range(22):
        assert list(itertools.islice(prompt_order(7, True, 1, start), 8)) == first[start : start + 8]
    assert list(itertools.islice(prompt_order(3, False, 1, 4), 4)) == [1, 2, 0, 1]
