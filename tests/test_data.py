import itertools
import json

import pytest

from grpo_fast.config import GRPOConfig
from grpo_fast.data import addition, check_lengths, load_rows, prompt_order, sort_digits
from grpo_fast.errors import UserError


def config(name, **fields):
    return GRPOConfig("m", dataset_name=str(name), reward_funcs=["exact_answer"], **fields)


def write(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_sorting_holds_out_whole_multisets():
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


def test_jsonl_with_a_template(tmp_path):
    rows = [{"question": f"{i}?", "answer": f"#### {i}"} for i in range(30)]
    path = write(tmp_path / "a.jsonl", *rows)
    train, test = load_rows(config(path, prompt_template="Q: {question}", system_prompt="Be brief."))
    assert len(train) == 27
    assert len(test) == 3
    assert train[0]["prompt"][0] == {"role": "system", "content": "Be brief."}
    assert train[0]["prompt"][1]["content"] == f"Q: {train[0]['question']}"
    assert not {row["question"] for row in train} & {row["question"] for row in test}


def test_separate_evaluation_file_and_limits(tmp_path):
    train_file = write(tmp_path / "a.jsonl", *({"prompt": f"p{i}"} for i in range(9)))
    test_file = write(tmp_path / "b.jsonl", *({"prompt": f"q{i}"} for i in range(9)))
    train, test = load_rows(
        config(train_file, eval_dataset_name=str(test_file), max_train_samples=4, max_eval_samples=2)
    )
    assert [row["prompt"] for row in train] == ["p0", "p1", "p2", "p3"]
    assert [row["prompt"] for row in test] == ["q0", "q1"]


@pytest.mark.parametrize("suffix", ["json", "parquet"])
def test_other_files(tmp_path, suffix):
    rows = [{"prompt": f"p{i}", "answer": str(i)} for i in range(10)]
    path = tmp_path / f"a.{suffix}"
    if suffix == "json":
        path.write_text(json.dumps(rows))
    else:
        import datasets

        datasets.Dataset.from_list(rows).to_parquet(path)
    train, test = load_rows(config(path))
    assert sorted(row["prompt"] for row in train + test) == [f"p{i}" for i in range(10)]


@pytest.mark.parametrize(
    ("lines", "fields", "message"),
    [
        (['{"prompt": "a"}', "", '{"prompt": "b"'], {}, "line 3: not valid JSON"),
        (['{"prompt": "a"}', "[1]"], {}, "line 2: expected an object, got list"),
        (['{"question": "a"}'] * 2, {}, r"no column 'prompt' \(it has question\)"),
        (
            ['{"question": "a"}'] * 2,
            {"prompt_template": "{q}"},
            "row 1: prompt_template uses column 'q', but there is question",
        ),
        (['{"question": "a"}'] * 2, {"prompt_template": "{"}, "prompt_template='{' cannot be filled"),
        (['{"question": "a"}'] * 2, {"prompt_template": "{question.x}"}, "cannot be filled"),
        (['{"prompt": 3}'] * 2, {}, "row 1: a prompt must be text, or chat messages with a role and a content, got 3"),
        (['{"prompt": "a"}', '{"prompt": [{"content": "a"}]}'], {}, "row 2: a prompt must be text, or chat"),
        (['{"prompt": "\\ud800"}'] * 2, {}, "row 1: the prompt is not valid Unicode"),
        (['{"prompt": "a"}'], {}, "no rows for evaluation; set eval_dataset_name"),
        (["[" * 100_000], {}, "line 1: not valid JSON"),
        ([], {}, "no rows for training"),
    ],
)
def test_bad_lines_are_named(tmp_path, lines, fields, message):
    path = write(tmp_path / "a.jsonl", *lines)
    with pytest.raises(UserError, match=message):
        load_rows(config(path, **fields))


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("missing.jsonl", {}, "no such file: missing.jsonl"),
        ("sort_digit", {}, "did you mean 'sort_digits'"),
        ("sort_digits", {"dataset_kwargs": {"lenth": 3}}, "not 'lenth' .did you mean 'length'"),
        ("sort_digits", {"dataset_kwargs": {"length": "a"}}, "length='a' is not allowed: it must be of type int"),
        ("sort_digits", {"dataset_train_split": "zzz"}, "dataset_train_split='zzz' goes with hub datasets"),
        ("sort_digits", {"dataset_kwargs": {"length": 9}}, "length=9 is not allowed: it must be from 1 to 6"),
        ("a.jsonl", {"dataset_kwargs": {"length": 4}}, "dataset_kwargs goes with the built-in datasets"),
    ],
)
def test_bad_names_are_named(name, fields, message):
    with pytest.raises(UserError, match=message):
        load_rows(config(name, **fields))


def test_lengths():
    rows = [{"prompt": "short"}, {"prompt": "long"}]
    encoded = [[1], [1] * 20]
    check_lengths(encoded, rows, 30, config("x", max_completion_length=10))
    with pytest.raises(UserError, match="do not fit the model's 29 positions; the longest prompt begins 'long'"):
        check_lengths(encoded, rows, 29, config("x", max_completion_length=10))
    with pytest.raises(UserError, match="do not fit max_tokens_per_microbatch=25"):
        check_lengths(encoded, rows, None, config("x", max_completion_length=10, max_tokens_per_microbatch=25))
    with pytest.raises(UserError, match="no tokens"):
        check_lengths([[]], rows, None, config("x"))


def test_rows_get_every_column(tmp_path):
    path = write(tmp_path / "a.jsonl", *({"prompt": "a", **({"hint": "b"} if i % 2 else {})} for i in range(9)))
    train, test = load_rows(config(path))
    assert {row["hint"] for row in train + test} == {None, "b"}


def test_byte_order_mark(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"prompt": "a"}\r\n' * 3)
    assert load_rows(config(path))[0][0]["prompt"] == "a"


def test_order_covers_every_epoch_and_follows_the_seed():
    first = list(itertools.islice(prompt_order(7, True, 1), 21))
    assert all(sorted(first[i : i + 7]) == list(range(7)) for i in (0, 7, 14))
    assert first[:7] != first[7:14]
    assert first == list(itertools.islice(prompt_order(7, True, 1), 21))
    assert first != list(itertools.islice(prompt_order(7, True, 2), 21))
    assert list(itertools.islice(prompt_order(3, False, 1), 6)) == [0, 1, 2, 0, 1, 2]


def test_prompts_go_on_from_any_place():
    first = list(itertools.islice(prompt_order(7, True, 1), 30))
    for start in range(22):
        assert list(itertools.islice(prompt_order(7, True, 1, start), 8)) == first[start : start + 8]
    assert list(itertools.islice(prompt_order(3, False, 1, 4), 4)) == [1, 2, 0, 1]
