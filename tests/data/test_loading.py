"""Rows from files and by name, and the rows that are held out."""

import gzip
import json

import pytest

from grpo_fast.cli import main, parse_config
from grpo_fast.data import (
    load_rows,
    read_file,
)
from grpo_fast.data.questions import gsm8k
from grpo_fast.errors import UserError
from grpo_fast.rewards import RewardModel
from support.questions import GSM8K_ROWS, config, write


def test_load_rows_jsonl_with_a_template(tmp_path):
    rows = [{"question": f"{i}?", "answer": f"#### {i}"} for i in range(30)]
    path = write(tmp_path / "a.jsonl", *rows)
    train, test = load_rows(config(path, prompt_template="Q: {question}", system_prompt="Be brief."))
    assert len(train) + len(test) == 30
    assert test
    assert train[0]["prompt"][0] == {"role": "system", "content": "Be brief."}
    assert train[0]["prompt"][1]["content"] == f"Q: {train[0]['question']}"
    assert not {row["question"] for row in train} & {row["question"] for row in test}


def test_load_rows_evaluation_file_and_limits(tmp_path):
    train_file = write(tmp_path / "a.jsonl", *({"prompt": f"p{i}"} for i in range(9)))
    test_file = write(tmp_path / "b.jsonl", *({"prompt": f"q{i}"} for i in range(9)))
    train, test = load_rows(
        config(train_file, eval_dataset_name=str(test_file), max_train_samples=4, max_eval_samples=2)
    )
    assert [row["prompt"] for row in train] == ["p0", "p1", "p2", "p3"]
    assert [row["prompt"] for row in test] == ["q0", "q1"]


@pytest.mark.parametrize("suffix", ["json", "parquet"])
def test_load_rows_json_and_parquet(tmp_path, suffix):
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
            "row 1: prompt_template uses column 'q', but the row has question",
        ),
        (['{"question": "a"}'] * 2, {"prompt_template": "{"}, "prompt_template cannot be filled: Single '{' enc"),
        (['{"prompt": 3}'] * 2, {}, "row 1: a prompt must be text, or chat messages with a role and a content, got 3"),
        (['{"prompt": "a"}', '{"prompt": [{"content": "a"}]}'], {}, "row 2: a prompt must be text, or chat"),
        (['{"prompt": "\\ud800"}'] * 2, {}, "row 1: the prompt is not valid Unicode"),
        (['{"prompt": "a"}'], {}, "no rows for evaluation; it needs at least two"),
        (["[" * 100_000], {}, "line 1: not valid JSON"),
        ([], {}, "no rows for training"),
    ],
)
def test_load_rows_wrong_lines(tmp_path, lines, fields, message):
    path = write(tmp_path / "a.jsonl", *lines)
    with pytest.raises(UserError, match=message):
        load_rows(config(path, **fields))


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("missing.jsonl", {}, "no such file: missing.jsonl"),
        ("sort_digit", {}, "did you mean 'sort_digits'"),
        ("sort_digits", {"dataset_kwargs": {"lengths": 3}}, "not 'lengths' .did you mean 'length'"),
        ("sort_digits", {"dataset_kwargs": {"length": "a"}}, "length='a' is not allowed: it must be of type int"),
        ("sort_digits", {"dataset_train_split": "zzz"}, "dataset_train_split='zzz' requires a hub dataset"),
        ("sort_digits", {"dataset_kwargs": {"length": 9}}, "length=9 is not allowed: it must be from 1 to 6"),
        ("a.jsonl", {"dataset_kwargs": {"length": 4}}, "dataset_kwargs requires one of the built-in datasets"),
    ],
)
def test_load_rows_wrong_names(name, fields, message):
    with pytest.raises(UserError, match=message):
        load_rows(config(name, **fields))


def test_paths_with_a_tilde(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "train.jsonl", *GSM8K_ROWS)
    (tmp_path / "prompt.txt").write_text("Q: {question}")
    (tmp_path / "mine.py").write_text("def mine(prompts, completions, **columns):\n    return [0.0] * len(prompts)\n")
    write(tmp_path / "run.yaml", {"model_name_or_path": "~/model", "dataset_name": "~/train.jsonl"})
    run = parse_config(["~/run.yaml", "--eval_dataset_name=~/train.jsonl", "--prompt_file=~/prompt.txt",
                        "--output_dir=~/out", "--reward_funcs=[~/mine.py:mine]"])  # fmt: skip
    home = str(tmp_path)
    assert (run.model_name_or_path, run.output_dir) == (f"{home}/model", f"{home}/out")
    train, test = load_rows(run)
    assert [row["prompt"] for row in train] == [row["prompt"] for row in test]
    assert train[0]["prompt"] == "Q: How many?"
    assert RewardModel(run.reward_funcs, None).names == ["mine"]
    assert len(gsm8k("~")[0]) == len(gsm8k("~/train.jsonl")[0]) == 3
    for arguments in (["report", "~/nothing"], ["compare", "~/nothing"]):
        assert main(arguments) == 2
        assert f"{home}/nothing" in capsys.readouterr().err
    options = ["--model_name_or_path=~/train.jsonl", "--output=~/train.jsonl"]
    assert main(["eval", "~/run.yaml", "--reward_funcs=[exact_answer]", *options]) == 2
    assert f"--output='{home}/train.jsonl' is not a folder" in capsys.readouterr().err
    with pytest.raises(UserError, match="no such file: ~nobody-here/a"):
        load_rows(config("~nobody-here/a.jsonl"))


def test_load_rows_fills_missing_columns(tmp_path):
    path = write(tmp_path / "a.jsonl", *({"prompt": f"a{i}", **({"hint": "b"} if i % 2 else {})} for i in range(9)))
    train, test = load_rows(config(path))
    assert {row["hint"] for row in train + test} == {None, "b"}


def test_read_file_byte_order_mark(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"prompt": "a"}\r\n{"prompt": "b"}\r\n')
    assert sorted(row["prompt"] for rows in load_rows(config(path)) for row in rows) == ["a", "b"]


def split(path, **fields):
    """The training prompts in their order, and the set of held-out prompts."""
    train, test = load_rows(config(path, **fields))
    return [row["prompt"] for row in train], {row["prompt"] for row in test}


def test_hold_out_depends_on_the_rows_alone(tmp_path):
    rows = [{"question": f"q{i}", "answer": str(i)} for i in range(400)]
    path, fields = write(tmp_path / "a.jsonl", *rows), {"prompt_template": "{question}"}
    train, test = split(path, **fields)
    assert 20 <= len(test) <= 60
    assert train == [row["question"] for row in rows if row["question"] not in test]
    for seed in (7, 8):
        assert split(path, **fields, seed=seed) == (train, test)
    few, fewer = split(path, **fields, seed=7, max_eval_samples=5, max_train_samples=9)
    assert few == train[:9]
    assert len(fewer) == 5
    assert fewer < test
    # The same rows with another prompt, order or format.
    assert split(path, prompt_template="Q: {question}")[1] == {f"Q: {question}" for question in test}
    assert split(write(tmp_path / "b.jsonl", *reversed(rows)), **fields) == (train[::-1], test)
    (tmp_path / "c.csv").write_text("answer,question\n" + "".join(f"{i},q{i}\n" for i in range(400)))
    assert split(tmp_path / "c.csv", **fields) == (train, test)
    # Training rows stay training rows when the file grows.
    more = [{"question": f"new{i}", "answer": str(i)} for i in range(5000)]
    grown, held_out = split(write(tmp_path / "d.jsonl", *rows, *more), **fields)
    assert len(held_out) == 200
    assert set(train) <= set(grown)


def test_hold_out_keeps_rows_of_one_prompt_together(tmp_path):
    rows = [{"prompt": f"p{i % 40}", "answer": str(i)} for i in range(400)]
    train, test = split(write(tmp_path / "a.jsonl", *rows))
    assert test
    assert not set(train) & test
    path = write(tmp_path / "b.jsonl", *({"prompt": "p", "answer": str(i)} for i in range(9)))
    with pytest.raises(UserError, match="no rows for evaluation; it needs at least two different prompts, or an eval"):
        load_rows(config(path))


def test_hold_out_one_prompt_of_a_small_file(tmp_path):
    for size in range(2, 9):
        train, test = split(write(tmp_path / "a.jsonl", *({"prompt": f"{size} {i}"} for i in range(size))))
        assert train
        assert test
        assert len(train) + len(test) == size


CSV = '\ufeffprompt,answer,note\r\n"say ""a, b""\r\nand c","1",\r\nq,007,"\u2028x"\r\n\r\nr,3,4\r\n'
CSV_ROWS = [
    {"prompt": 'say "a, b"\r\nand c', "answer": "1", "note": None},
    {"prompt": "q", "answer": "007", "note": "\u2028x"},
    {"prompt": "r", "answer": "3", "note": "4"},
]


@pytest.mark.parametrize("name", ["a.csv", "a.CSV.gz", "a.jsonl.gz", "a.JSONL", "a.json.gz", "a.Json", "b.v1.jsonl"])
def test_read_file_suffixes(tmp_path, name):
    lower = name.lower()
    text = CSV if "csv" in lower else json.dumps(CSV_ROWS) if ".json" in lower and "jsonl" not in lower else None
    text = text or "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in CSV_ROWS)
    content = text.encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if lower.endswith(".gz") else content)
    assert read_file(str(tmp_path / name)) == CSV_ROWS
    train, test = load_rows(config(tmp_path / name))
    assert len(train) + len(test) == 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"a,b\n1,2\n3\n", r"a\.csv, line 3: 1 cells for 2 columns"),
        ("a.csv", b"a,a\n1,2\n", r"the first line must have a different name for every column, got \['a', 'a'\]"),
        ("a.csv", b"a,\n1,2\n", "the first line must have a different name"),
        ("a.csv", b'a,b\n1,"2\n', "line 2: not valid CSV: unexpected end of data"),
        ("a.csv", b"a,b\n1,\xff\n", "line 2: not UTF-8 text"),
        ("a.jsonl.gz", b"{}", "is not a complete gzip file: Not a gzipped file"),
        ("a.jsonl.gz", gzip.compress(b'{"prompt": "a"}' * 99, mtime=0)[:-9], "is not a complete gzip file"),
        ("a.txt", b"", r"only a \.jsonl, \.json, \.csv \(each also with \.gz\) or \.parquet file can be read"),
    ],
)
def test_read_file_broken_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_file(str(tmp_path / name))
