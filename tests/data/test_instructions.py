"""Alpaca's and ShareGPT's data, the column of answers, and the names of rewards in one text."""

import json

import pytest

from grpo_fast.cli import parse_config
from grpo_fast.config import GRPOConfig
from grpo_fast.data import load_rows, load_template
from grpo_fast.errors import UserError
from grpo_fast.rewards.functions.answers import math_answer
from grpo_fast.rewards.functions.format import answer_format
from grpo_fast.rewards.registry import ALIASES, is_built_in, load_reward

ADD = {"instruction": "Add the numbers.", "input": "2 3", "output": "5"}
TALK = [
    {"from": "human", "value": "Add 2 and 3."},
    {"from": "gpt", "value": "5"},
    {"from": "human", "value": "And 4?"},
    {"from": "gpt", "value": "9"},
]


def config(name="d.jsonl", **fields):
    return GRPOConfig("m", dataset_name=str(name), reward_funcs=["exact_answer"], **fields)


def build(row, **fields):
    return load_template(config(**fields))(row)


def chat(*turns):
    return [{"role": role, "content": content} for role, content in turns]


def loaded(tmp_path, rows, **fields):
    path = tmp_path / "d.json"
    path.write_text(json.dumps(rows))
    train, test = load_rows(config(path, **fields))
    return train + test


def test_alpaca_row_needs_no_template():
    assert build(ADD) == "Add the numbers.\n2 3"
    assert build({"instruction": "Count.", "input": "", "output": "1"}) == "Count."
    assert build({"instruction": "Count."}) == "Count."
    # A template and a prompt column still come first.
    assert build(ADD, prompt_template="{input}") == "2 3"
    assert build({**ADD, "prompt": "Hi"}) == "Hi"


def test_alpaca_row_becomes_a_chat():
    user = ("user", "Add the numbers.\n2 3")
    assert build(ADD, apply_chat_template=True) == chat(user)
    assert build(ADD, system_prompt="Be brief.") == chat(("system", "Be brief."), user)
    row = {**ADD, "system": "Only digits.", "history": [["Hello", "Hi"]]}
    turns = [("system", "Only digits."), ("user", "Hello"), ("assistant", "Hi"), user]
    assert build(row, system_prompt="Be brief.") == chat(*turns)


def test_sharegpt_conversation_ends_before_the_last_answer():
    turns = [("user", "Add 2 and 3."), ("assistant", "5"), ("user", "And 4?")]
    assert build({"conversations": TALK}) == chat(*turns)
    assert build({"conversations": TALK, "system": "Digits."}, system_prompt="x") == chat(("system", "Digits."), *turns)
    openai = chat(("system", "Digits."), ("user", "Add 2 and 3."), ("assistant", "5"))
    assert build({"messages": openai}, system_prompt="x") == openai[:2]
    # Without an answer at its end, all of it is the prompt.
    assert build({"messages": openai[:2]}) == openai[:2]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({**ADD, "system": "Digits."}, "column 'system' is part of a chat; set apply_chat_template: true"),
        ({**ADD, "history": [["a", "b"]]}, "column 'history' is part of a chat"),
        ({**ADD, "instruction": ""}, "column 'instruction' is empty"),
        ({**ADD, "input": [2]}, r"column 'input' must be text, got \[2\]"),
        ({**ADD, "images": ["a.png"]}, "column 'images' cannot be used"),
        ({"conversations": TALK, "tools": "[...]"}, "column 'tools' cannot be used"),
        ({"conversations": [{"from": "observation", "value": "x"}]}, "is from 'observation'; it can be from human"),
        ({"conversations": [{"from": "human", "value": 3}]}, "must have a text, got 3"),
        ({"conversations": TALK[1:2]}, "has no message of the user"),
        ({"messages": []}, r"column 'messages' must be a list of messages, got \[\]"),
    ],
)
def test_instruction_data_refuses_what_would_be_lost(row, words):
    with pytest.raises(UserError, match=words):
        build(row)


def test_history_of_a_wrong_shape_is_refused():
    with pytest.raises(UserError, match=r"must be a list of pairs of texts, got \['a'\]"):
        build({**ADD, "history": ["a"]}, apply_chat_template=True)


def test_load_rows_takes_the_answer_from_instruction_data(tmp_path):
    rows = [{**ADD, "input": f"{i} 3", "output": str(i + 3)} for i in range(12)]
    made = loaded(tmp_path, rows)
    assert len(made) == 12
    assert all(row["answer"] == row["output"] for row in made)
    made = loaded(tmp_path, [{"conversations": [{"from": "human", "value": str(i)}, TALK[3]]} for i in range(12)])
    assert {row["answer"] for row in made} == {"9"}
    # An answer column of its own is left alone.
    made = loaded(tmp_path, [{**row, "answer": "own"} for row in rows])
    assert {row["answer"] for row in made} == {"own"}


def test_load_rows_takes_the_answer_from_a_column_by_name(tmp_path):
    rows = [{"prompt": f"{i}?", "solution": str(i), "answer": "worked"} for i in range(12)]
    made = loaded(tmp_path, rows, answer_column="solution")
    assert all(row["answer"] == row["solution"] == row["prompt"][:-1] for row in made)
    nested = [{"prompt": f"{i}?", "reward_model": {"style": "rule", "ground_truth": str(i)}} for i in range(12)]
    made = loaded(tmp_path, nested, answer_column="reward_model.ground_truth")
    assert all(row["answer"] == row["prompt"][:-1] for row in made)
    with pytest.raises(UserError, match=r"answer_column='reward_model.truth' is not in the row"):
        loaded(tmp_path, nested, answer_column="reward_model.truth")
    with pytest.raises(UserError, match=r"row 1: answer_column='solutoin' is not in the row \(did you mean 'solution'"):
        loaded(tmp_path, rows, answer_column="solutoin")


@pytest.mark.parametrize("given", ["accuracy,format", "accuracy, format", "[accuracy, format]"])
def test_reward_funcs_may_be_one_text(given):
    made = parse_config(["sort", "--reward_weights", "null", "--reward_funcs", given])
    assert made.reward_funcs == ["accuracy", "format"]
    assert [load_reward(name) for name in made.reward_funcs] == [math_answer, answer_format]
    assert all(map(is_built_in, ALIASES))


def test_reward_funcs_in_a_file_keeps_the_arguments_of_a_reward(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("model_name_or_path: m\ndataset_name: d.jsonl\nreward_funcs: accuracy,soft_overlong(4096, 819)\n")
    assert parse_config([str(path)]).reward_funcs == ["accuracy", "soft_overlong(4096, 819)"]
    with pytest.raises(UserError, match="reward_funcs is missing"):
        parse_config([str(path), "--reward_funcs", ","])
