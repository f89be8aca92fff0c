"""Templates and prompt files, and how a chat that ends in the assistant's turn is encoded and scored."""

import json
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from grpo_fast.config import GRPOConfig
from grpo_fast.data import PROMPTS, as_scored, encode_prompts, load_template
from grpo_fast.errors import UserError
from grpo_fast.evaluate import sample_and_score
from grpo_fast.rollout import Response, Sampling

QUESTION = {"question": "What is {1, 2}?", "answer": "a set"}
COUNTDOWN = {"nums": [3, 4, 5], "target": 17}
TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}<|assistant|>{% endif %}"


def config(**fields):
    return GRPOConfig("m", dataset_name="d.jsonl", reward_funcs=["exact_answer"], **fields)


def build(row, **fields):
    return load_template(config(**fields))(row)


@pytest.fixture(scope="module")
def tokenizer():
    """One token a character."""
    characters = sorted({chr(i) for i in range(32, 127)} | {"\n"})
    backend = Tokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?")
    made.chat_template = TEMPLATE
    return made


def text_of(ids, tokenizer):
    return "".join(tokenizer.convert_ids_to_tokens(ids))


def test_built_in_prompts_take_their_columns():
    assert set(PROMPTS) == {"r1_zero", "question_only", "countdown", "countdown_short"}
    assert build(QUESTION, prompt_file="question_only") == QUESTION["question"]
    r1_zero = build(QUESTION, prompt_file="r1_zero")
    assert QUESTION["question"] in r1_zero
    assert r1_zero.endswith("Assistant: <think>")
    system, user, assistant = build(COUNTDOWN, prompt_file="countdown")
    assert (system["role"], user["role"]) == ("system", "user")
    assert "[3, 4, 5]" in user["content"]
    assert "17" in user["content"]
    assert assistant == {"role": "assistant", "content": "<think>"}
    assert build(COUNTDOWN, prompt_file="countdown_short")[-2:] == [
        {"role": "user", "content": "Make 17 from the numbers [3, 4, 5]."},
        {"role": "assistant", "content": "<answer>"},
    ]


def test_a_file_of_ones_own(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_bytes(b"\xef\xbb\xbfQ: {question}\r\nAnswer in \\boxed{{}}.\n")
    text = "Q: What is {1, 2}?\nAnswer in \\boxed{}."
    assert build(QUESTION, prompt_file=str(path)) == text
    chat = [{"role": "system", "content": "Be {brief}."}, {"role": "user", "content": text}]
    assert build(QUESTION, prompt_file=str(path), system_prompt="Be {brief}.") == chat
    assert build(QUESTION, prompt_file=str(path), apply_chat_template=True) == chat[1:]


def test_a_template_may_repeat_a_column_and_format_it():
    assert build(COUNTDOWN, prompt_template="{target:03d} {nums} {target}") == "017 [3, 4, 5] 17"
    assert build({"the-question 2": "a"}, prompt_template="{the-question 2}") == "a"
    assert build({"a": "x", "b": 0.5}, prompt_template="{a:>999}{b:.3f}") == "x".rjust(999) + "0.500"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt_file": "r1_zer"}, "is neither a file nor one of .*did you mean 'r1_zero'"),
        ({"prompt_file": "countdown"}, "prompt_file='countdown' uses column 'target', but there is question, answer"),
        ({"prompt_file": "countdown", "system_prompt": "a"}, "brings its own messages; leave system_prompt out"),
        ({"prompt_template": r"\boxed{}"}, r"cannot be filled: {} is not the name of a column; {{ and }} stand for"),
        ({"prompt_template": "{0}"}, r"\{0\} is not the name of a column"),
        ({"prompt_template": "{question.x}"}, "cannot be filled: {question.x} is not the name"),
        ({"prompt_template": "{question[0]}"}, "is not the name of a column"),
        ({"prompt_template": "{question!x}"}, "cannot be filled"),
        ({"prompt_template": "{question:d}"}, "cannot be filled: Unknown format code 'd'"),
        (
            {"prompt_template": "{question:{width}}"},
            r"filled: the width in {question:{width}} must be below 1000",
        ),
        ({"prompt_template": "{question:>1000}"}, r"the width in {question:>1000} must be below 1000"),
        ({"prompt_template": "{question:.1000000000f}"}, r"the width in {question:.1000000000f} must be"),
        ({"prompt_template": "{question!r:>0001000}"}, "must be below 1000"),
        ({"prompt_template": "{hint}"}, "uses column 'hint', which is empty here"),
        ({}, r"no column 'prompt' \(it has question, answer, hint\); set prompt_template, as in .* or prompt_file"),
    ],
)
def test_wrong_templates_are_named(fields, message):
    with pytest.raises(UserError, match=message):
        build({**QUESTION, **({} if "prompt_file" in fields else {"hint": None})}, **fields)


@pytest.mark.parametrize(
    ("suffix", "content", "message"),
    [
        ("txt", b"\xff", "is not UTF-8 text"),
        ("txt", b"{", "cannot be filled"),
        ("yaml", b"- [", "is not valid YAML"),
        ("yaml", b"role: user\ncontent: a\n", "must hold a list of messages, each with a role and a content"),
        ("yaml", b"- role: user\n", "must hold a list of messages"),
        ("yml", b"[]", "must hold a list of messages"),
        ("yaml", b"[" * 5000, "is not valid YAML: nested too deeply"),
    ],
)
def test_wrong_files_are_named(tmp_path, suffix, content, message):
    path = tmp_path / f"p.{suffix}"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        build(QUESTION, prompt_file=str(path))
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_one_of_template_and_file():
    with pytest.raises(UserError, match="prompt_template and prompt_file both make the prompt"):
        config(prompt_template="{question}", prompt_file="r1_zero")
    with pytest.raises(UserError, match="system_prompt goes with prompt_template or prompt_file"):
        config(system_prompt="a")


def test_the_assistants_turn_is_opened_or_gone_on_with(tokenizer):
    user = {"role": "user", "content": "Hi"}
    rows = [{"prompt": [user]}, {"prompt": [user, {"role": "assistant", "content": "<think>"}]}, {"prompt": "Hi"}]
    texts = [text_of(ids, tokenizer) for ids in encode_prompts(rows, tokenizer, config())]
    assert texts == ["<|user|>Hi<|end|><|assistant|>", "<|user|>Hi<|end|><|assistant|><think>", "Hi"]


def test_a_turn_is_scored_from_its_beginning():
    """As in TRL, the message that is scored begins with what the prompt put into the assistant's mouth."""
    user, opened = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "<think>"}
    assert as_scored("Hi <think>", "a") == ("Hi <think>", "a")
    assert as_scored([user], "a") == ([user], [{"role": "assistant", "content": "a"}])
    prompt = [user, opened]
    assert as_scored(prompt, "a") == ([user], [{"role": "assistant", "content": "<think>a"}])
    assert prompt == [user, opened]


def test_rewards_get_whole_turns(tokenizer):
    rows = [{"prompt": build(COUNTDOWN, prompt_file="countdown"), **COUNTDOWN}]
    rollout = SimpleNamespace(generate=lambda prompts, sampling: [Response(tokenizer.encode("x</think>"), "stop")])
    seen = []
    sample_and_score(
        rollout, lambda prompts, completions, columns: seen.append((prompts, completions, columns)),
        SimpleNamespace(batch_decode=lambda ids, skip_special_tokens: ["x</think>"] * len(ids)),
        rows, [[1]], Sampling(1, 9),
    )  # fmt: skip
    ((prompts, completions, columns),) = seen
    assert [message["role"] for message in prompts[0]] == ["system", "user"]
    assert completions == [[{"role": "assistant", "content": "<think>x</think>"}]]
    assert (columns["nums"], columns["target"]) == ([[3, 4, 5]], [17])


def test_row_and_file_are_named(tmp_path):
    from grpo_fast.data import load_rows

    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ({"question": "a"}, {"question": None})))
    with pytest.raises(UserError, match=r"a\.jsonl, row 2: prompt_file='r1_zero' uses column 'question', which is"):
        load_rows(GRPOConfig("m", dataset_name=str(path), reward_funcs=["r"], prompt_file="r1_zero"))
