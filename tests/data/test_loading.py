import dataclasses
import gzip
import itertools
import json
import operator
import os
from fractions import Fraction
from pathlib import Path

import pytest

from grpo_fast.cli import main, parse_config
from grpo_fast.config import GRPOConfig
from grpo_fast.data import (
    BUILT_IN,
    addition,
    arithmetic,
    check_lengths,
    countdown,
    encode_rows,
    load_rows,
    prompt_order,
    read_file,
    sort_digits,
)
from grpo_fast.data.questions import gsm8k, math
from grpo_fast.errors import UserError
from grpo_fast.model.loading import digit_tokenizer
from grpo_fast.rewards import RewardModel
from grpo_fast.rewards.functions.answer_text import boxes

# GSM8K's train.jsonl and test.jsonl.
GSM8K_DIR = Path(os.environ.get("GSM8K_DIR", Path(__file__).parents[2] / "data" / "gsm8k"))


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


def test_arithmetic_takes_all_pairs_where_they_are_few():
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


def test_every_countdown_target_can_be_reached():
    train, test = countdown(train_size=30, test_size=10, seed=1)
    assert len(train) == 30
    assert len(test) == 10
    for row in train + test:
        assert len(row["nums"]) in (3, 4)
        assert all(1 <= number <= 99 for number in [*row["nums"], row["target"]])
        assert row["target"] in set(values([Fraction(number) for number in row["nums"]]))


def test_countdown_numbers_never_come_twice():
    train, test = countdown(train_size=1000, test_size=200)
    numbers = [tuple(sorted(row["nums"])) for row in train + test]
    assert len(set(numbers)) == 1200
    assert any(list(number) != row["nums"] for number, row in zip(numbers, train + test, strict=True))
    assert all(sum(len(n) == count for n in numbers) > 200 for count in (3, 4))


@pytest.mark.parametrize("task", ["sort_digits", "arithmetic", "countdown"])
def test_tasks_follow_their_seed(task):
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
def test_tasks_name_what_is_allowed(task, arguments, message):
    with pytest.raises(UserError, match=message):
        task(**arguments)


GSM8K_ROWS = [
    {"question": "How many?", "answer": "3 * 400 = <<3*400=1200>>1,200 in all.\n#### 1,200"},
    {"question": "How much colder?", "answer": "5 less.\n#### -5"},
    {"question": "How much?", "answer": "Half of it.\n####  $2.50"},
]


def test_gsm8k_answers_are_the_numbers_after_the_marks(tmp_path):
    write(tmp_path / "train.jsonl", *GSM8K_ROWS)
    write(tmp_path / "test.jsonl", GSM8K_ROWS[0])
    train, test = gsm8k(str(tmp_path))
    assert [row["answer"] for row in train] == ["1200", "-5", "2.50"]
    assert test == [{"question": "How many?", "answer": "1200", "solution": "3 * 400 = <<3*400=1200>>1,200 in all."}]
    rows, held_out = load_rows(config("gsm8k", dataset_kwargs={"path": str(tmp_path)}, prompt_file="question_only"))
    assert [row["prompt"] for row in rows] == ["How many?", "How much colder?", "How much?"]
    assert [row["answer"] for row in held_out] == ["1200"]


def test_one_file_of_gsm8k_is_split(tmp_path):
    path = write(tmp_path / "all.jsonl", *({**GSM8K_ROWS[i % 3], "question": f"{i}?"} for i in range(30)))
    train, test = load_rows(config("gsm8k", dataset_kwargs={"path": str(path)}, prompt_template="{question}"))
    assert len(train) + len(test) == 30
    assert 1 <= len(test) <= 9


@pytest.mark.skipif(not GSM8K_DIR.is_dir(), reason="GSM8K_DIR has no GSM8K")
def test_all_of_gsm8k_is_read():
    train, test = gsm8k(str(GSM8K_DIR))
    assert (len(train), len(test)) == (7473, 1319)
    for split, rows in (("train", train), ("test", test)):
        raw = [json.loads(line) for line in (GSM8K_DIR / f"{split}.jsonl").open(encoding="utf-8")]
        assert [row["question"] for row in rows] == [row["question"] for row in raw]
        assert [row["answer"] for row in rows] == [
            row["answer"].rpartition("####")[2].strip().replace(",", "") for row in raw
        ]


@pytest.mark.parametrize(
    ("text", "boxed"),
    [
        (r"so $x = \boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
        (r"\boxed{1} and then \boxed{ 2 }", "2"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        (r"\boxed{\text{a}\\ \text{b}} }", r"\text{a}\\ \text{b}"),
        (r"is \fbox{3}", "3"),
        (r"is $\boxed 5$.", "5"),
        (r"\boxed{1", None),
        ("nothing", None),
    ],
)
def test_boxed_answers_have_balanced_braces(text, boxed):
    found = boxes(text)
    assert (found[-1][2].strip() if found else None) == boxed


def test_math_from_the_hub(monkeypatch):
    import datasets

    rows = [{"problem": f"{i}?", "level": "Level 1", "solution": rf"\boxed{{{i}}}"} for i in range(4)]
    train, test = datasets.Dataset.from_list(rows), datasets.Dataset.from_list(rows[:1])
    hub = datasets.DatasetDict({"train": train, "test": test})
    asked_for = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *names: asked_for.append(names) or hub)
    train, test = math()
    assert asked_for == [("DigitalLearningGmbH/MATH-lighteval", None)]
    assert train[3] == {"level": "Level 1", "question": "3?", "answer": "3", "solution": r"\boxed{3}"}
    assert len(test) == 1

    gsm = datasets.DatasetDict({"train": datasets.Dataset.from_list(GSM8K_ROWS)})
    monkeypatch.setattr(datasets, "load_dataset", lambda *names: asked_for.append(names) or gsm)
    assert gsm8k()[1] is None
    assert asked_for[1] == ("openai/gsm8k", "main")


@pytest.mark.parametrize(
    ("load", "files", "message"),
    [
        (gsm8k, {"train": ['{"question": "a"}']}, r"gsm8k, train row 1 of .*: no text in column 'answer'"),
        (gsm8k, {"train": ['{"question": "a", "answer": "5"}']}, "no number after #### in the answer '5'"),
        (gsm8k, {"test": ['{"question": "a", "answer": "#### 5"}']}, "has no split 'train'; it has test.jsonl"),
        (gsm8k, {}, "it has no .jsonl, .json, .csv .* or .parquet file"),
        (math, {"train": [r'{"problem": "a", "solution": "5"}']}, r"no \\boxed{} in the solution that ends in '5'"),
        (math, {"train": ['{"problem": 5, "solution": "5"}']}, "no text in column 'problem'"),
    ],
)
def test_wrong_question_files_are_named(tmp_path, load, files, message):
    for name, lines in files.items():
        write(tmp_path / f"{name}.jsonl", *lines)
    with pytest.raises(UserError, match=message):
        load(str(tmp_path))


def test_a_hub_that_is_out_of_reach_is_named(monkeypatch):
    import datasets

    def refuse(*names):
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(UserError, match="gsm8k: path='openai/gsm8k' could not be loaded: no network"):
        gsm8k()
    with pytest.raises(UserError, match="path='no-such-folder' is neither a folder, a file nor a hub name"):
        gsm8k("no-such-folder")


def test_an_empty_file_is_named(tmp_path):
    write(tmp_path / "train.jsonl")
    with pytest.raises(UserError, match="dataset_name='gsm8k' has no rows for training"):
        load_rows(config("gsm8k", dataset_kwargs={"path": str(tmp_path)}, prompt_file="r1_zero"))


def test_jsonl_with_a_template(tmp_path):
    rows = [{"question": f"{i}?", "answer": f"#### {i}"} for i in range(30)]
    path = write(tmp_path / "a.jsonl", *rows)
    train, test = load_rows(config(path, prompt_template="Q: {question}", system_prompt="Be brief."))
    assert len(train) + len(test) == 30
    assert test
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
        ("sort_digits", {"dataset_train_split": "zzz"}, "dataset_train_split='zzz' requires a hub dataset"),
        ("sort_digits", {"dataset_kwargs": {"length": 9}}, "length=9 is not allowed: it must be from 1 to 6"),
        ("a.jsonl", {"dataset_kwargs": {"length": 4}}, "dataset_kwargs requires one of the built-in datasets"),
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


@pytest.mark.parametrize(
    ("fields", "limit"),
    [
        ({}, "the model's 50 positions"),
        ({"max_tokens_per_microbatch": 50}, "max_tokens_per_microbatch=50"),
        ({"use_vllm": True, "vllm_max_model_length": 50}, "vllm_max_model_length=50"),
    ],
)
def test_long_prompts_can_be_dropped(fields, limit):
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


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch, capsys):
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


def test_rows_get_every_column(tmp_path):
    path = write(tmp_path / "a.jsonl", *({"prompt": f"a{i}", **({"hint": "b"} if i % 2 else {})} for i in range(9)))
    train, test = load_rows(config(path))
    assert {row["hint"] for row in train + test} == {None, "b"}


def test_byte_order_mark(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b'{"prompt": "a"}\r\n{"prompt": "b"}\r\n')
    assert sorted(row["prompt"] for rows in load_rows(config(path)) for row in rows) == ["a", "b"]


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


def split(path, **fields):
    """Prompts of both sides: of training in their order, held-out ones as a set."""
    train, test = load_rows(config(path, **fields))
    return [row["prompt"] for row in train], {row["prompt"] for row in test}


def test_the_split_follows_from_the_rows_alone(tmp_path):
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
    # Another prompt, order or format of the same rows.
    assert split(path, prompt_template="Q: {question}")[1] == {f"Q: {question}" for question in test}
    assert split(write(tmp_path / "b.jsonl", *reversed(rows)), **fields) == (train[::-1], test)
    (tmp_path / "c.csv").write_text("answer,question\n" + "".join(f"{i},q{i}\n" for i in range(400)))
    assert split(tmp_path / "c.csv", **fields) == (train, test)
    # What was trained on stays so when the file grows.
    more = [{"question": f"new{i}", "answer": str(i)} for i in range(5000)]
    grown, held_out = split(write(tmp_path / "d.jsonl", *rows, *more), **fields)
    assert len(held_out) == 200
    assert set(train) <= set(grown)


def test_rows_with_one_prompt_stay_on_one_side(tmp_path):
    rows = [{"prompt": f"p{i % 40}", "answer": str(i)} for i in range(400)]
    train, test = split(write(tmp_path / "a.jsonl", *rows))
    assert test
    assert not set(train) & test
    path = write(tmp_path / "b.jsonl", *({"prompt": "p", "answer": str(i)} for i in range(9)))
    with pytest.raises(UserError, match="no rows for evaluation; it needs at least two different prompts, or an eval"):
        load_rows(config(path))


def test_a_small_file_holds_out_one_prompt(tmp_path):
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
def test_suffixes_say_what_a_file_holds(tmp_path, name):
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
        ("a.jsonl.gz", gzip.compress(b'{"prompt": "a"}' * 99)[:-9], "is not a complete gzip file"),
        ("a.txt", b"", r"only a \.jsonl, \.json, \.csv \(each also with \.gz\) or \.parquet file can be read"),
    ],
)
def test_broken_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_file(str(tmp_path / name))


def test_a_folder_of_compressed_files(tmp_path):
    for name in ("train", "test"):
        content = "".join(json.dumps(row) + "\n" for row in GSM8K_ROWS).encode()
        (tmp_path / f"{name}-00000-of-00001.jsonl.gz").write_bytes(gzip.compress(content))
    train, test = gsm8k(str(tmp_path))
    assert len(train) == len(test) == 3
