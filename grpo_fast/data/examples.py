"""Examples to learn from by supervised fine-tuning: their texts, their tokens, and which tokens are learned.

A row is one of TRL's forms, or one of LLaMA-Factory's: a ``prompt`` (text or chat) with its ``completion``, whole
``messages``, plain text, or Alpaca's and ShareGPT's columns. Prompts are made and encoded as for sampling, so that a
model which is trained further with GRPO sees the same tokens.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from grpo_fast.config import SFTConfig
from grpo_fast.data.encoding import encode_prompts
from grpo_fast.data.instructions import chat_of, is_alpaca, is_sharegpt, turns_of
from grpo_fast.data.loading import find_answer, hold_out, load_splits
from grpo_fast.data.templates import Prompt, Row, load_template
from grpo_fast.errors import UserError, one_line, shown


class Example(NamedTuple):
    """A row to learn from: a prompt and its completion (a text), or whole messages, or a text, without a completion."""

    prompt: Prompt
    completion: str | None


class Encoded(NamedTuple):
    """An example's tokens: those before the first one that is learned, the rest, and whether each of these is learned.

    `completion_ids` ends with a learned token; `completion_mask` is as long.
    """

    prompt_ids: list[int]
    completion_ids: list[int]
    completion_mask: list[bool]


def load_examples(config: SFTConfig) -> tuple[list[Example], list[Example]]:
    """The examples to train on, and those that are held out (see `hold_out`).

    Raises:
        UserError: a file is missing or malformed, a row has nothing to learn, or a split is empty.
    """
    raw, test = load_splits(config)
    train = read_examples(raw, config, config.dataset_name)
    if test is None:
        rows = [{"prompt": example.prompt, "example": example} for example in train]
        rows, test_rows = hold_out(rows, [json.dumps(example) for example in train])
        train, held_out = ([row["example"] for row in part] for part in (rows, test_rows))
    else:
        held_out = read_examples(test, config, config.eval_dataset_name or f"{config.dataset_name}, held out")
    for name, examples in (("training", train), ("evaluation", held_out)):
        if not examples:
            least = "" if config.min_reward is None else f" with a reward of at least min_reward={config.min_reward:g}"
            raise UserError(f"dataset_name={config.dataset_name!r} has no rows for {name}{least}")
    return train[: config.max_train_samples], held_out[: config.max_eval_samples]


def read_examples(rows: list[Row], config: SFTConfig, source: str) -> list[Example]:
    """The examples in `rows`, with `min_reward` only those above, each once; `source` names the rows in errors.

    Raises:
        UserError: names the number of a row that has nothing to learn, or something other than text.
    """
    build, examples, seen = load_template(config), [], set()
    for number, row in enumerate(rows, 1):
        try:
            if not _is_kept(row, config):
                continue
            example = _example(row, config, build)
            if config.min_reward is None or (key := json.dumps(example)) not in seen:
                examples.append(example)
            if config.min_reward is not None:
                seen.add(key)
        except UserError as error:
            raise UserError(f"{source}, row {number}: {error}") from None
    return examples


def _is_kept(row: Row, config: SFTConfig) -> bool:
    if config.min_reward is None:
        return True
    reward = row.get("reward")
    if isinstance(reward, bool) or not isinstance(reward, int | float) or math.isnan(reward):
        raise UserError(f"min_reward={config.min_reward:g} needs a number in column 'reward', got {shown(reward)}")
    return reward >= config.min_reward


def _example(row: Row, config: SFTConfig, build: Callable[[Row], Prompt]) -> Example:
    templated = config.prompt_template is not None or config.prompt_file is not None
    if not templated and is_sharegpt(row):
        turns = turns_of(row)
        if not any(role == "assistant" for role, _ in turns):
            raise UserError("the messages have no turn of the assistant to learn")
        own = turns[0][0] == "system" or row.get("system")
        return Example(chat_of(row.get("system") or (None if own else config.system_prompt), turns), None)
    field = config.dataset_text_field
    if not templated and not is_alpaca(row) and "prompt" not in row and field in row:
        if not isinstance(row[field], str) or not row[field]:
            raise UserError(f"column {field!r} must be a text, got {shown(row[field])}")
        return Example(row[field], None)
    if not templated and not is_alpaca(row) and "prompt" not in row:
        raise UserError(
            f"no column 'prompt', 'messages' or {field!r} (it has {', '.join(row)}); set prompt_template, as in "
            "'{question}', or dataset_text_field"
        )
    return Example(build(row), _completion(row, config))


def _completion(row: Row, config: SFTConfig) -> str:
    """The text that follows the row's prompt."""
    completion = row.get("completion") if config.answer_column is None else None
    name = "completion" if completion is not None else config.answer_column or "answer"
    if completion is None:
        completion = {"answer": row.get("answer"), **find_answer(row, config.answer_column)}["answer"]
    if isinstance(completion, list) and len(completion) == 1 and isinstance(completion[0], dict):
        if completion[0].get("role") != "assistant":
            raise UserError(f"the completion is a message from {shown(completion[0].get('role'))}, not the assistant")
        completion = completion[0].get("content")
    if completion is None:
        raise UserError(
            f"no column 'completion' or 'answer' to learn (it has {', '.join(row)}); set answer_column to the column "
            "of the answers"
        )
    if not isinstance(completion, str) or not completion:
        raise UserError(f"column {name!r} must be a text, or one message of the assistant, got {shown(completion)}")
    return completion


def encode_examples(
    examples: list[Example], tokenizer: Any, config: SFTConfig, max_positions: int | None, kind: str,
    warn: Callable[[str], None],
) -> list[Encoded]:  # fmt: skip
    """The examples' tokens, cut to `max_length` or the model's `max_positions`, whichever is less.

    Args:
        kind: what messages call the examples, such as "training".
        warn: called with a line that says how many examples are cut or left out.

    Raises:
        UserError: the tokenizer has no chat template for chats, or none that shows where turns begin; or nothing of
            any example is left.
    """
    limit = min(filter(None, (config.max_length, max_positions)), default=None)
    encoded, cut, lost = [], 0, 0
    for example in examples:
        ids, learned = _tokens(example, tokenizer, config)
        cut += limit is not None and len(ids) > limit
        # The first token has none before it that could predict it.
        places = [place for place, is_learned in enumerate(learned[:limit]) if is_learned and place]
        if not places:
            lost += 1
            continue
        first, end = places[0], places[-1] + 1
        encoded.append(Encoded(ids[:first], ids[first:end], learned[first:end]))
    count = f"{len(examples)} {kind} examples"
    bound = f"{limit} tokens ({'max_length' if limit == config.max_length else 'the positions of the model'})"
    if not encoded:
        raise UserError(f"none of {count} has a token to learn within {bound}")
    if lost:
        warn(f"{lost} of {count} are left out: they have no token to learn within {bound}")
    if cut > lost:
        warn(f"{cut - lost} of {count} are longer than {bound} and cut there")
    return encoded


def _tokens(example: Example, tokenizer: Any, config: SFTConfig) -> tuple[list[int], list[bool]]:
    """All tokens of an example, and whether each is learned."""
    whole = config.completion_only_loss is False and not config.assistant_only_loss
    if isinstance(example.prompt, list):
        return _chat_tokens(example, tokenizer, config, whole)
    if config.assistant_only_loss:
        raise UserError("assistant_only_loss=True requires chats: a text has no turns of the assistant")
    ending = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    (before,) = encode_prompts([{"prompt": example.prompt}], tokenizer, config)
    if example.completion is None:
        if config.completion_only_loss:
            raise UserError("completion_only_loss=True requires prompts with completions; this data is plain text")
        return [*before, *ending], [True] * (len(before) + len(ending))
    after = [*tokenizer(example.completion, add_special_tokens=False)["input_ids"], *ending]
    return [*before, *after], [whole] * len(before) + [True] * len(after)


def _chat_tokens(example: Example, tokenizer: Any, config: SFTConfig, whole: bool) -> tuple[list[int], list[bool]]:
    if tokenizer.chat_template is None:
        raise UserError(f"{config.model_name_or_path!r} has no chat template, but the examples are chats")
    messages, first = list(example.prompt), 0
    if example.completion is not None:
        opened = messages.pop()["content"] if messages[-1]["role"] == "assistant" else ""
        first = len(messages)
        messages.append({"role": "assistant", "content": opened + example.completion})
    elif config.completion_only_loss:
        raise UserError(
            "completion_only_loss=True requires prompts with completions; for messages set assistant_only_loss"
        )
    if example.completion is None and not config.assistant_only_loss:
        text = _render(tokenizer, messages, config)
        ids = _text_tokens(tokenizer, text)
        return ids, [True] * len(ids)
    if config.assistant_only_loss and "{% generation" in tokenizer.chat_template.replace("{%-", "{%"):
        made = tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True,
            **(config.chat_template_kwargs or {}),
        )  # fmt: skip
        return list(made["input_ids"]), [bool(part) for part in made["assistant_masks"]]
    text, pieces, done = _render(tokenizer, messages, config), [], 0
    for place, message in enumerate(messages):
        if message["role"] != "assistant" or place < first:
            continue
        if place == first and example.completion is not None and opened:
            start = _render(tokenizer, [*messages[:place], {**message, "content": opened}], config, open_turn=True)
        else:
            start = _render(tokenizer, messages[:place], config, add_generation_prompt=True)
        end = _render(tokenizer, messages[: place + 1], config)
        if not (text.startswith(start) and text.startswith(end)):
            raise UserError(
                "the chat template renders a turn differently when more turns follow, so the assistant's turns "
                "cannot be located; leave out assistant_only_loss, or use one turn per example"
            )
        pieces += [(text[done : len(start)], whole), (text[len(start) : len(end)], True)]
        done = len(end)
    pieces.append((text[done:], whole))
    ids, learned = [], []
    for piece, is_learned in pieces:
        tokens = _text_tokens(tokenizer, piece)
        ids += tokens
        learned += [is_learned] * len(tokens)
    return ids, learned


def _text_tokens(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _render(
    tokenizer: Any, messages: list[dict[str, str]], config: SFTConfig, add_generation_prompt: bool = False,
    open_turn: bool = False,
) -> str:  # fmt: skip
    options = {"add_generation_prompt": add_generation_prompt, "continue_final_message": open_turn}
    options |= {**(config.chat_template_kwargs or {}), "tokenize": False}
    try:
        return tokenizer.apply_chat_template(messages, **options)
    except Exception as error:
        raise UserError(f"the chat template refuses {messages!r:.80}: {one_line(error)}") from None
