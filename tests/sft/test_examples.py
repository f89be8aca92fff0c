"""Rows as examples of supervised fine-tuning: which of their tokens are learned."""

import json

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from grpo_fast.config import SFTConfig
from grpo_fast.data.examples import encode_examples, load_examples, read_examples
from grpo_fast.errors import UserError

PLAIN_CHAT = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% if m['role'] == 'assistant' %}<|end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MARKED_CHAT = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<|assistant|>{% generation %}{{ m['content'] }}<|end|>"
    "{% endgeneration %}{% else %}<|{{ m['role'] }}|>{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# Writes the last turn of the assistant in another way than the earlier ones, as Qwen3's template does.
CHANGING_CHAT = PLAIN_CHAT.replace("<|end|>", "<|end|>{% if loop.last %}<|last|>{% endif %}")
TWO_TURNS = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two three"},
    {"role": "user", "content": "four"},
    {"role": "assistant", "content": "five"},
]


def config(**fields):
    return SFTConfig(**{"model_name_or_path": "m", "dataset_name": "d.jsonl", "use_cpu": True, **fields})


def learned(row, tokenizer, **fields):
    """The texts before the first learned token, and those that are learned, with a gap as ``_``."""
    settings = config(**fields)
    (one,) = encode_examples(read_examples([row], settings, "d"), tokenizer, settings, None, "training", pytest.fail)
    assert one.completion_mask[0]
    assert one.completion_mask[-1]
    assert len(one.completion_mask) == len(one.completion_ids)
    after = [
        tokenizer.decode([token]) if kept else "_"
        for token, kept in zip(one.completion_ids, one.completion_mask, strict=True)
    ]
    return " ".join(tokenizer.decode([token]) for token in one.prompt_ids), " ".join(after)


@pytest.fixture
def tokenizer():
    """One token for each word and each mark of a turn."""
    marks = ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|last|>"]
    words = ["<pad>", "<eos>", *marks, "one", "two", "three", "four", "five", "six"]
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", additional_special_tokens=marks
    )


@pytest.mark.parametrize(
    ("row", "fields", "expected"),
    [
        ({"prompt": "one two", "completion": "three"}, {}, ("one two", "three <eos>")),
        ({"prompt": "one two", "completion": "three"}, {"completion_only_loss": False}, ("one", "two three <eos>")),
        ({"prompt": "one", "answer": "two"}, {}, ("one", "two <eos>")),
        ({"prompt": "one", "answer": "two", "worked": "four"}, {"answer_column": "worked"}, ("one", "four <eos>")),
        ({"q": "one", "completion": "two"}, {"prompt_template": "{q} four"}, ("one four", "two <eos>")),
        ({"instruction": "one", "input": "two", "output": "three"}, {}, ("one two", "three <eos>")),
        ({"text": "one two three"}, {}, ("one", "two three <eos>")),
        ({"body": "one two"}, {"dataset_text_field": "body"}, ("one", "two <eos>")),
    ],
)
def test_encode_examples_of_texts(tokenizer, row, fields, expected):
    assert learned(row, tokenizer, **fields) == expected


@pytest.mark.parametrize("template", [PLAIN_CHAT, MARKED_CHAT], ids=["plain", "marked"])
@pytest.mark.parametrize(
    ("row", "fields", "expected"),
    [
        (
            {"prompt": TWO_TURNS[:1], "completion": TWO_TURNS[1:2]}, {},
            ("<|user|> one <|assistant|>", "two three <|end|>"),
        ),
        ({"prompt": TWO_TURNS[:3], "answer": "five"}, {},
            ("<|user|> one <|assistant|> two three <|end|> <|user|> four <|assistant|>", "five <|end|>"),
        ),
        (
            {"messages": TWO_TURNS}, {},
            ("<|user|>", "one <|assistant|> two three <|end|> <|user|> four <|assistant|> five <|end|>"),
        ),
        (
            {"messages": TWO_TURNS}, {"assistant_only_loss": True},
            ("<|user|> one <|assistant|>", "two three <|end|> _ _ _ five <|end|>"),
        ),
        (
            {"conversations": [{"from": "human", "value": "one"}, {"from": "gpt", "value": "two"}]},
            {"assistant_only_loss": True, "system_prompt": "four"},
            ("<|system|> four <|user|> one <|assistant|>", "two <|end|>"),
        ),
        (
            {"instruction": "one", "output": "two"}, {"apply_chat_template": True},
            ("<|user|> one <|assistant|>", "two <|end|>"),
        ),
    ],
)  # fmt: skip
def test_encode_examples_of_chats(tokenizer, row, fields, expected, template):
    tokenizer.chat_template = template
    assert learned(row, tokenizer, **fields) == expected


def test_encode_examples_continues_an_opened_turn(tokenizer):
    tokenizer.chat_template = PLAIN_CHAT
    row = {"prompt": [TWO_TURNS[0], {"role": "assistant", "content": "two "}], "completion": "three"}
    assert learned(row, tokenizer) == ("<|user|> one <|assistant|> two", "three <|end|>")


@pytest.mark.parametrize(
    ("row", "fields", "message"),
    [
        ({"a": "one"}, {}, r"d, row 1: no column 'prompt', 'messages' or 'text' \(it has a\); set prompt_template"),
        ({"prompt": "one"}, {}, "d, row 1: no column 'completion' or 'answer' to learn"),
        ({"prompt": "one", "completion": 3}, {}, "column 'completion' must be a text, or one message .*, got 3"),
        ({"prompt": "one", "completion": [{"role": "user", "content": "a"}]}, {}, "a message from 'user', not the"),
        ({"messages": TWO_TURNS[:1]}, {}, "the messages have no turn of the assistant to learn"),
        ({"text": 7}, {}, "column 'text' must be a text, got 7"),
        ({"text": "one"}, {"assistant_only_loss": True}, "assistant_only_loss=True requires chats"),
        (
            {"text": "one"},
            {"completion_only_loss": True},
            "completion_only_loss=True requires prompts with completions",
        ),
        ({"messages": TWO_TURNS}, {}, "'m' has no chat template, but the examples are chats"),
        ({"prompt": "one", "answer": "two"}, {"min_reward": 1.0}, "needs a number in column 'reward', got None"),
    ],
)
def test_examples_refuse_rows_without_something_to_learn(tokenizer, row, fields, message):
    with pytest.raises(UserError, match=message):
        learned(row, tokenizer, **fields)


def test_encode_examples_refuses_a_template_that_rewrites_turns(tokenizer):
    tokenizer.chat_template = CHANGING_CHAT
    with pytest.raises(UserError, match="renders a turn differently when more turns follow"):
        learned({"messages": TWO_TURNS}, tokenizer, assistant_only_loss=True)


def test_encode_examples_says_what_it_cuts_and_leaves_out(tokenizer):
    rows = [{"prompt": "one two", "answer": answer} for answer in ("three", "three four five", "six")]
    rows.append({"prompt": "one two three four", "answer": "five"})
    settings, said = config(max_length=4), []
    found = encode_examples(read_examples(rows, settings, "d"), tokenizer, settings, 64, "training", said.append)
    assert [len(one.prompt_ids + one.completion_ids) for one in found] == [4, 4, 4]
    assert said == [
        "1 of 4 training examples are left out: they have no token to learn within 4 tokens (max_length)",
        "1 of 4 training examples are longer than 4 tokens (max_length) and cut there",
    ]
    with pytest.raises(UserError, match=r"none of 4 held-out examples has a token to learn within 2 tokens \(the pos"):
        encode_examples(read_examples(rows, settings, "d"), tokenizer, settings, 2, "held-out", said.append)


def test_load_examples_holds_out_rows_by_their_prompt(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"p{n % 40}", "completion": str(n), "reward": float(n % 2)} for n in range(80)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train, held_out = load_examples(config(dataset_name=str(path)))
    assert len(train) + len(held_out) == 80
    assert held_out
    assert {one.prompt for one in train}.isdisjoint(one.prompt for one in held_out)
    right = load_examples(config(dataset_name=str(path), min_reward=1.0))
    assert sorted(int(one.completion) for part in right for one in part) == list(range(1, 80, 2))
    with pytest.raises(UserError, match="has no rows for training with a reward of at least min_reward=2"):
        load_examples(config(dataset_name=str(path), min_reward=2.0))
