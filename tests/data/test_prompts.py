"""Templates and prompt files; encoding and scoring of chats that end in the assistant's turn."""

import copy
import datetime
import json
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from grpo_fast.config import GRPOConfig
from grpo_fast.data import PROMPTS, as_scored, completion_text, encode_prompts, load_template
from grpo_fast.errors import UserError
from grpo_fast.rewards import answer_format, think_format
from grpo_fast.rollout import Response, Sampling
from grpo_fast.train.advantages import step_tokens
from grpo_fast.train.groups import sample_and_score

QUESTION = {"question": "What is {1, 2}?", "answer": "a set"}
COUNTDOWN = {"nums": [3, 4, 5], "target": 17}
USER = {"role": "user", "content": "Hi"}
TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}<|assistant|>{% endif %}"


def config(**fields):
    return GRPOConfig("m", dataset_name="d.jsonl", reward_funcs=["exact_answer"], **fields)


def build(row, **fields):
    return load_template(config(**fields))(row)


@pytest.fixture(scope="module")
def tokenizer():
    """A tokenizer with one token per character."""
    characters = sorted({chr(i) for i in range(32, 127)} | {"\n"})
    backend = Tokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?")
    made.chat_template = TEMPLATE
    return made


def text_of(ids, tokenizer):
    return "".join(tokenizer.convert_ids_to_tokens(ids))


def test_built_in_prompts_use_their_columns():
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


def test_prompt_file_text_and_messages(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_bytes(b"\xef\xbb\xbfQ: {question}\r\nAnswer in \\boxed{{}}.\n")
    text = "Q: What is {1, 2}?\nAnswer in \\boxed{}."
    assert build(QUESTION, prompt_file=str(path)) == text
    chat = [{"role": "system", "content": "Be {brief}."}, {"role": "user", "content": text}]
    assert build(QUESTION, prompt_file=str(path), system_prompt="Be {brief}.") == chat
    assert build(QUESTION, prompt_file=str(path), apply_chat_template=True) == chat[1:]


def test_template_repeats_and_formats_a_column():
    assert build(COUNTDOWN, prompt_template="{target:03d} {nums} {target}") == "017 [3, 4, 5] 17"
    row = {"the-question 2": "a", "2nd": "b", "q.text": "c", "Question (en)": "d", "self": "e", "args[0]": "f", "題": 1}
    template = "{the-question 2} {2nd} {q.text} {Question (en)} {self} {args[0]} {題:02d}"
    assert build(row, prompt_template=template) == "a b c d e f 01"
    assert build({"a": "x", "b": 0.5}, prompt_template="{a:>999}{b:.3f}") == "x".rjust(999) + "0.500"


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ([{"role": "user", "content": "Hi"}], "list"),
        ([["a"]], "list"),
        (["a", "b"], "list"),
        ([1, None], "list"),
        ({"text": "a"}, "dict"),
        (b"a", "bytes"),
        (object(), "object"),
    ],
)
@pytest.mark.parametrize("fields", [{}, {"system_prompt": "Be brief."}], ids=["text", "chat"])
def test_template_column_that_is_not_text(value, kind, fields):
    message = (
        rf"prompt_template uses column 'a', which is a {kind} here; it can be text, a number, a date or a list of n"
    )
    with pytest.raises(UserError, match=message):
        build({"a": value}, prompt_template="{a}", **fields)


def test_template_columns_that_read_as_text():
    day = datetime.date(2026, 11, 25)
    row = {"a": "x", "b": 2, "c": 0.5, "d": [1, 2.5], "e": day, "f": []}
    assert build(row, prompt_template="{a} {b} {c:.1%} {d} {e:%d.%m.} {f}") == "x 2 50.0% [1, 2.5] 25.11. []"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt_file": "r1_zer"}, "is neither a file nor one of .*did you mean 'r1_zero'"),
        (
            {"prompt_file": "countdown"},
            "prompt_file='countdown' uses column 'target', but the row has question",
        ),
        ({"prompt_file": "countdown", "system_prompt": "a"}, "has its own messages; leave system_prompt out"),
        ({"prompt_template": r"\boxed{}"}, r"cannot be filled: {} names no column; {{ and }} stand for braces"),
        (
            {"prompt_template": r"\frac{1}{2}"},
            r"uses column '1', but the row has .* \({{ and }} stand for braces",
        ),
        ({"prompt_template": "{question.__class__}"}, "uses column 'question.__class__', but the row has question"),
        ({"prompt_template": "{question[0]}"}, r"uses column 'question\[0\]', but the row has question"),
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
def test_template_wrong_placeholders(fields, message):
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
def test_prompt_file_wrong_content(tmp_path, suffix, content, message):
    path = tmp_path / f"p.{suffix}"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        build(QUESTION, prompt_file=str(path))
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_template_and_prompt_file_exclude_each_other():
    with pytest.raises(UserError, match="prompt_template and prompt_file both make the prompt"):
        config(prompt_template="{question}", prompt_file="r1_zero")


@pytest.mark.parametrize("field", [{"system_prompt": "a"}, {"apply_chat_template": True}])
def test_prompt_column_is_not_made_a_chat(field):
    with pytest.raises(UserError, match=f"{next(iter(field))} requires prompt_template or prompt_file"):
        build({"prompt": "Hi"}, **field)


def test_encode_prompts_opens_or_continues_the_assistants_turn(tokenizer):
    user = {"role": "user", "content": "Hi"}
    rows = [{"prompt": [user]}, {"prompt": [user, {"role": "assistant", "content": "<think>"}]}, {"prompt": "Hi"}]
    texts = [text_of(ids, tokenizer) for ids in encode_prompts(rows, tokenizer, config())]
    assert texts == ["<|user|>Hi<|end|><|assistant|>", "<|user|>Hi<|end|><|assistant|><think>", "Hi"]


def test_as_scored_continued_turn():
    """As in TRL, the scored message begins with the assistant's words in the prompt."""
    user, opened = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "<think>"}
    assert as_scored("Hi <think>", "a") == ("Hi <think>", "a")
    assert as_scored([user], "a") == ([user], [{"role": "assistant", "content": "a"}])
    prompt = [user, opened]
    assert as_scored(prompt, "a") == ([user], [{"role": "assistant", "content": "<think>a"}])
    assert prompt == [user, opened]


def scored(tokenizer, rows, *completions, finish_reason="length"):
    """The arguments of the reward functions for these completions, one per row."""
    responses = [Response(tokenizer.encode(text, add_special_tokens=False), finish_reason) for text in completions]
    rollout, seen = SimpleNamespace(generate=lambda prompts, sampling: responses), []
    prompts = encode_prompts(rows, tokenizer, config())
    sample_and_score(rollout, lambda *arguments: seen.append(arguments[:3]), tokenizer, rows, prompts, Sampling(1, 9))
    return seen


def test_scored_completions_are_whole_turns(tokenizer):
    rows = [{"prompt": build(COUNTDOWN, prompt_file="countdown"), **COUNTDOWN}]
    ((prompts, completions, columns),) = scored(tokenizer, rows, "x</think>")
    assert [message["role"] for message in prompts[0]] == ["system", "user"]
    assert completions == [[{"role": "assistant", "content": "<think>x</think>"}]]
    assert (columns["nums"], columns["target"]) == ([[3, 4, 5]], [17])


@pytest.fixture
def tagged(tokenizer):
    """A tokenizer that adds BOS and EOS to a text, and has tags as special tokens."""
    made = copy.deepcopy(tokenizer)
    made.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"})
    made.add_special_tokens({"additional_special_tokens": ["<think>", "</think>", "<tool_call>", "<|im_end|>"]})
    ends = [(token, made.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    made.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=ends)
    return made


def test_encode_prompts_text_has_one_bos_and_no_eos(tagged):
    assert tagged("Hi")["input_ids"] == tagged.encode("<s>Hi</s>", add_special_tokens=False)
    prompts = ["Hi", "<s>Hi", "", "Hi</s>", "<s>", "a"]
    encoded = encode_prompts([{"prompt": prompt} for prompt in prompts], tagged, config())
    assert [text_of(ids, tagged) for ids in encoded] == ["<s>Hi", "<s>Hi", "<s>", "<s>Hi</s>", "<s>", "<s>a"]
    tagged.chat_template = "{{ bos_token }}" + TEMPLATE
    (ids,) = encode_prompts([{"prompt": [USER]}], tagged, config())
    assert text_of(ids, tagged) == "<s><|user|>Hi<|end|><|assistant|>"


def test_completion_text_keeps_tags_that_are_special_tokens(tagged):
    rows = [{"prompt": "p"}] * 3
    texts = ["<think>a</think><tool_call>b</s>", "<s><pad>c</s>", "<think>d<|im_end|>"]
    ((_, completions, _),) = scored(tagged, rows, *texts, finish_reason="stop")
    assert completions == ["<think>a</think><tool_call>b", "c", "<think>d"]
    ((_, completions, _),) = scored(tagged, rows, *texts, finish_reason="length")
    assert completions == ["<think>a</think><tool_call>b", "c", "<think>d<|im_end|>"]


def test_completion_text_keeps_the_pad_token_without_eos(tokenizer):
    made = copy.deepcopy(tokenizer)
    made.pad_token = "a"
    assert completion_text(made, made.encode("banana"), False) == "banana"


def test_step_ends_in_text_with_tags(tagged):
    ids = tagged.encode("<think>ab</think>c</s>", add_special_tokens=False)
    text = completion_text(tagged, ids, True)
    ends = [len("<think>"), len("<think>ab"), len("<think>ab</think>"), len(text)]
    assert step_tokens(tagged, ids, ends, True) == [1, 3, 4, 6]


OPENS = TEMPLATE.replace("<|assistant|>", "<|assistant|><think>\n")


@pytest.mark.parametrize("reward", [think_format, answer_format])
@pytest.mark.parametrize(
    ("template", "prompt", "completion", "value"),
    [
        (OPENS, [USER], "a</think> <answer>b</answer>", 1.0),
        (OPENS, [USER], "<think>a</think> <answer>b</answer>", 0.0),
        (TEMPLATE, [USER], "<think>a</think> <answer>b</answer>", 1.0),
        (TEMPLATE, [USER], "a</think> <answer>b</answer>", 0.0),
        # A tag in the user's message opens nothing.
        (TEMPLATE, [{"role": "user", "content": "Use <think>"}], "a</think> <answer>b</answer>", 0.0),
        (TEMPLATE, [USER, {"role": "assistant", "content": "<think>\n"}], "a</think> <answer>b</answer>", 1.0),
        (OPENS, [USER, {"role": "assistant", "content": "<think>"}], "<think>a</think> <answer>b</answer>", 0.0),
        (TEMPLATE, "Assistant: <think>", "a</think> <answer>b</answer>", 1.0),
        (TEMPLATE, "Assistant:", "a</think> <answer>b</answer>", 0.0),
    ],
)
def test_format_rewards_tag_opened_by_the_chat_template(tagged, reward, template, prompt, completion, value):
    tagged.chat_template = template
    ((prompts, completions, columns),) = scored(tagged, [{"prompt": prompt}], completion)
    assert reward(prompts, completions, **columns) == [value]


def test_rendered_prompt_ends_at_the_completion(tagged):
    tagged.chat_template = OPENS
    rows = [{"prompt": [USER]}, {"prompt": [USER, {"role": "assistant", "content": " Well. "}]}, {"prompt": "p"}]
    ((_, completions, columns),) = scored(tagged, rows, "a", "b", "c")
    start = "<|user|>Hi<|end|>"
    assert columns["rendered_prompts"] == [f"{start}<|assistant|><think>\n", f"{start}<|assistant|> ", "<s>p"]
    assert [message if isinstance(message, str) else message[0]["content"] for message in completions] == [
        "a", " Well. b", "c",
    ]  # fmt: skip


def test_load_rows_error_names_row_and_file(tmp_path):
    from grpo_fast.data import load_rows

    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ({"question": "a"}, {"question": None})))
    with pytest.raises(UserError, match=r"a\.jsonl, row 2: prompt_file='r1_zero' uses column 'question', which is"):
        load_rows(GRPOConfig("m", dataset_name=str(path), reward_funcs=["r"], prompt_file="r1_zero"))
