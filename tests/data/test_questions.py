"""GSM8K and MATH, from files and from the hub."""

import gzip
import json
import os
from pathlib import Path

import pytest

from grpo_fast.data import load_rows
from grpo_fast.data.questions import gsm8k, math
from grpo_fast.errors import UserError
from grpo_fast.rewards.functions.answer_text import boxes
from support.questions import GSM8K_ROWS, config, write

# GSM8K's train.jsonl and test.jsonl.
GSM8K_DIR = Path(os.environ.get("GSM8K_DIR", Path(__file__).parents[2] / "data" / "gsm8k"))


def test_gsm8k_answers_follow_the_mark(tmp_path):
    write(tmp_path / "train.jsonl", *GSM8K_ROWS)
    write(tmp_path / "test.jsonl", GSM8K_ROWS[0])
    train, test = gsm8k(str(tmp_path))
    assert [row["answer"] for row in train] == ["1200", "-5", "2.50"]
    assert test == [{"question": "How many?", "answer": "1200", "solution": "3 * 400 = <<3*400=1200>>1,200 in all."}]
    rows, held_out = load_rows(config("gsm8k", dataset_kwargs={"path": str(tmp_path)}, prompt_file="question_only"))
    assert [row["prompt"] for row in rows] == ["How many?", "How much colder?", "How much?"]
    assert [row["answer"] for row in held_out] == ["1200"]


def test_gsm8k_one_file_is_split(tmp_path):
    path = write(tmp_path / "all.jsonl", *({**GSM8K_ROWS[i % 3], "question": f"{i}?"} for i in range(30)))
    train, test = load_rows(config("gsm8k", dataset_kwargs={"path": str(path)}, prompt_template="{question}"))
    assert len(train) + len(test) == 30
    assert 1 <= len(test) <= 9


@pytest.mark.skipif(not GSM8K_DIR.is_dir(), reason="GSM8K_DIR has no GSM8K")
def test_gsm8k_reads_the_whole_data_set():
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
def test_boxes_have_balanced_braces(text, boxed):
    found = boxes(text)
    assert (found[-1][2].strip() if found else None) == boxed


def test_questions_from_the_hub(monkeypatch):
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
def test_questions_wrong_files(tmp_path, load, files, message):
    for name, lines in files.items():
        write(tmp_path / f"{name}.jsonl", *lines)
    with pytest.raises(UserError, match=message):
        load(str(tmp_path))


def test_gsm8k_unreachable_hub(monkeypatch):
    import datasets

    def refuse(*names):
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(UserError, match="gsm8k: path='openai/gsm8k' could not be loaded: no network"):
        gsm8k()
    with pytest.raises(UserError, match="path='no-such-folder' is neither a folder, a file nor a hub name"):
        gsm8k("no-such-folder")


def test_gsm8k_empty_file(tmp_path):
    write(tmp_path / "train.jsonl")
    with pytest.raises(UserError, match="dataset_name='gsm8k' has no rows for training"):
        load_rows(config("gsm8k", dataset_kwargs={"path": str(tmp_path)}, prompt_file="r1_zero"))


def test_gsm8k_folder_of_compressed_files(tmp_path):
    for name in ("train", "test"):
        content = "".join(json.dumps(row) + "\n" for row in GSM8K_ROWS).encode()
        (tmp_path / f"{name}-00000-of-00001.jsonl.gz").write_bytes(gzip.compress(content))
    train, test = gsm8k(str(tmp_path))
    assert len(train) == len(test) == 3
