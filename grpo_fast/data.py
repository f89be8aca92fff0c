"""Prompts and their columns: files, hub datasets and two generated tasks.

Every row has a ``prompt``, a string or a list of chat messages (TRL's two forms); all other columns reach the reward
functions by name.
"""

from __future__ import annotations

import inspect
import itertools
import json
import random
import string
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from grpo_fast.config import GRPOConfig
from grpo_fast.errors import UserError, import_extra, nearest, one_line

Row = dict[str, Any]
Prompt = str | list[dict[str, str]]

# Where a dataset has no split to evaluate on, this share of its rows is held out, at most MAX_HELD_OUT.
HELD_OUT_SHARE = 0.1
MAX_HELD_OUT = 200


def sort_digits(length: int = 4, test_size: int = 500, seed: int = 0) -> tuple[list[Row], list[Row]]:
    """Prompts ``3142>`` that ask for ``1234``: all tuples of `length` digits, of which about `test_size` are held out.

    Whole multisets are held out, so that no other order of the same digits is trained on.
    """
    if not 1 <= length <= 6:
        raise UserError(f"sort_digits: length={length!r} is not allowed: it must be from 1 to 6")
    if not 0 < test_size < 10**length:
        raise UserError(f"sort_digits: test_size={test_size!r} is not allowed: it must be from 1 to {10**length - 1}")
    by_answer: dict[str, list[Row]] = {}
    for digits in map("".join, itertools.product(string.digits, repeat=length)):
        answer = "".join(sorted(digits))
        by_answer.setdefault(answer, []).append({"prompt": f"{digits}>", "answer": answer})
    answers = list(by_answer)
    random.Random(seed).shuffle(answers)
    train, test = [], []
    for answer in answers:
        (test if len(test) < test_size else train).extend(by_answer[answer])
    return train, test


def addition(test_share: float = 0.2, seed: int = 0) -> tuple[list[Row], list[Row]]:
    """Questions ``What is 3 + 4?`` for all pairs of digits.

    A share of the unordered pairs is held out, so that 4 + 3 is not trained on where 3 + 4 is tested.
    """
    if not 0 < test_share < 1:
        raise UserError(f"addition: test_share={test_share!r} is not allowed: it must be above 0 and below 1")
    pairs = list(itertools.combinations_with_replacement(range(10), 2))
    random.Random(seed).shuffle(pairs)
    held_out = set(pairs[: max(round(test_share * len(pairs)), 1)])
    train, test = [], []
    for a, b in itertools.product(range(10), repeat=2):
        content = f"What is {a} + {b}? Reply with only the number."
        row = {"prompt": [{"role": "user", "content": content}], "answer": str(a + b)}
        (test if (min(a, b), max(a, b)) in held_out else train).append(row)
    return train, test


GENERATED: dict[str, Callable[..., tuple[list[Row], list[Row]]]] = {"sort_digits": sort_digits, "addition": addition}


def load_rows(config: GRPOConfig) -> tuple[list[Row], list[Row]]:
    """Training and evaluation rows, each with its ``prompt``.

    Raises:
        UserError: a missing file, a malformed line, an unknown built-in, a column that the template or the trainer
            needs and a row lacks, or an empty split.
    """
    train, test = _load_splits(config)
    train = _with_prompts(train, config)
    if test is None:
        shuffled = list(train)
        random.Random(config.seed).shuffle(shuffled)
        size = min(config.max_eval_samples or MAX_HELD_OUT, max(int(HELD_OUT_SHARE * len(train)), 1), len(train) - 1)
        train, test = shuffled[max(size, 0) :], shuffled[: max(size, 0)]
    else:
        test = _with_prompts(test, config)
    for name, rows, instead in (("training", train, ""), ("evaluation", test, "; set eval_dataset_name")):
        if not rows:
            raise UserError(f"dataset_name={config.dataset_name!r} has no rows for {name}{instead}")
    return train[: config.max_train_samples], test[: config.max_eval_samples]


def _with_prompts(rows: list[Row], config: GRPOConfig) -> list[Row]:
    """Every row with its prompt and with all columns of the data, None where it lacks one."""
    columns = dict.fromkeys(name for row in rows for name in row)
    made = []
    for number, row in enumerate(rows, 1):
        try:
            made.append({**columns, **row, "prompt": build_prompt(row, config)})
        except UserError as error:
            raise UserError(f"{config.dataset_name}, row {number}: {error}") from None
    return made


def _load_splits(config: GRPOConfig) -> tuple[list[Row], list[Row] | None]:
    name = config.dataset_name
    if name in GENERATED and config.eval_dataset_name:
        raise UserError(f"eval_dataset_name goes with files and hub datasets; {name!r} brings its own held-out rows")
    if name in GENERATED or _is_file(name):
        for field, default in (
            ("dataset_config", None),
            ("dataset_train_split", "train"),
            ("dataset_test_split", "test"),
        ):
            if getattr(config, field) != default:
                raise UserError(f"{field}={getattr(config, field)!r} goes with hub datasets, not with {name!r}")
    if name in GENERATED:
        return _generate(name, config.dataset_kwargs or {})
    if config.dataset_kwargs:
        raise UserError(f"dataset_kwargs goes with the built-in datasets {', '.join(GENERATED)}, not with {name!r}")
    if _is_file(name):
        train = read_file(name)
        return train, read_file(config.eval_dataset_name) if config.eval_dataset_name else None
    if "/" not in name:
        raise UserError(
            f"dataset_name={name!r} is neither a .jsonl, .json or .parquet file, nor a hub name (owner/name), "
            f"nor one of {', '.join(GENERATED)}{nearest(name, GENERATED)}"
        )
    datasets = import_extra("datasets", "train")
    try:
        loaded = datasets.load_dataset(name, config.dataset_config)
    except Exception as error:
        raise UserError(f"dataset_name={name!r} could not be loaded: {one_line(error)}") from None
    if config.dataset_train_split not in loaded:
        raise UserError(f"dataset_train_split={config.dataset_train_split!r} is not in {name!r}: it has {list(loaded)}")
    if config.dataset_test_split not in loaded and config.dataset_test_split != "test":
        raise UserError(f"dataset_test_split={config.dataset_test_split!r} is not in {name!r}: it has {list(loaded)}")
    train = list(loaded[config.dataset_train_split])
    if config.eval_dataset_name:
        return train, read_file(config.eval_dataset_name)
    return train, list(loaded[config.dataset_test_split]) if config.dataset_test_split in loaded else None


def _generate(name: str, kwargs: dict[str, Any]) -> tuple[list[Row], list[Row]]:
    known = inspect.signature(GENERATED[name]).parameters
    for key in kwargs:
        if key not in known:
            raise UserError(f"dataset_kwargs: {name} takes {', '.join(known)}, not {key!r}{nearest(key, known)}")
        if not isinstance(kwargs[key], type(known[key].default)):
            kind = type(known[key].default).__name__
            raise UserError(f"dataset_kwargs: {key}={kwargs[key]!r} is not allowed: it must be of type {kind}")
    return GENERATED[name](**kwargs)


def _is_file(name: str) -> bool:
    return Path(name).suffix in (".jsonl", ".json", ".parquet")


def read_file(name: str) -> list[Row]:
    """Rows of a .jsonl, .json (a list of objects) or .parquet file."""
    path = Path(name).expanduser()
    if not path.is_file():
        raise UserError(f"no such file: {name} (looked for {path.resolve()})")
    if path.suffix == ".jsonl":
        return list(_read_jsonl(path))
    if path.suffix == ".parquet":
        datasets = import_extra("datasets", "train")
        try:
            return list(datasets.Dataset.from_parquet(str(path)))
        except Exception as error:
            raise UserError(f"{name} is not a readable parquet file: {one_line(error)}") from None
    if path.suffix != ".json":
        raise UserError(f"{name}: only .jsonl, .json and .parquet files can be read")
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name} is not valid JSON: {one_line(error)}") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{name} must hold a list of objects")
    return rows


def _read_jsonl(path: Path) -> Iterator[Row]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}, line {number}: not valid JSON: {one_line(error)}") from None
            if not isinstance(row, dict):
                raise UserError(f"{path}, line {number}: expected an object, got {type(row).__name__}")
            yield row


def build_prompt(row: Row, config: GRPOConfig) -> Prompt:
    """The row's prompt: its ``prompt`` column, or `prompt_template` filled with its columns."""
    if config.prompt_template is None:
        if "prompt" not in row:
            raise UserError(f"no column 'prompt' (it has {', '.join(row)}); set prompt_template, as in '{{question}}'")
        return _checked_prompt(row["prompt"])
    try:
        text = config.prompt_template.format_map(row)
    except KeyError as error:
        raise UserError(f"prompt_template uses column {error}, but there is {', '.join(row)}") from None
    except (ValueError, AttributeError, IndexError) as error:
        raise UserError(f"prompt_template={config.prompt_template!r} cannot be filled: {one_line(error)}") from None
    if not (config.apply_chat_template or config.system_prompt):
        return _checked_prompt(text)
    system = [{"role": "system", "content": config.system_prompt}] if config.system_prompt else []
    return _checked_prompt([*system, {"role": "user", "content": text}])


def _checked_prompt(prompt: object) -> Prompt:
    if isinstance(prompt, str):
        texts = [prompt]
    elif isinstance(prompt, list) and prompt and all(isinstance(message, dict) for message in prompt):
        texts = [message.get(key) for message in prompt for key in ("role", "content")]
    else:
        texts = [None]
    if not all(isinstance(text, str) for text in texts):
        raise UserError(f"a prompt must be text, or chat messages with a role and a content, got {prompt!r:.80}")
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:
        raise UserError(f"the prompt is not valid Unicode: {one_line(error)}") from None
    return prompt


def encode_prompts(rows: list[Row], tokenizer, config: GRPOConfig) -> list[list[int]]:
    """Token ids of every row's prompt, by the model's chat template where the prompt is a chat."""
    encoded = []
    for prompt in (row["prompt"] for row in rows):
        if isinstance(prompt, str):
            encoded.append(tokenizer(prompt)["input_ids"])
            continue
        if tokenizer.chat_template is None:
            raise UserError(f"{config.model_name_or_path!r} has no chat template, but the prompts are chats")
        arguments = {"add_generation_prompt": True, **(config.chat_template_kwargs or {})}
        try:
            ids = tokenizer.apply_chat_template(prompt, **{**arguments, "tokenize": True, "return_dict": False})
        except Exception as error:
            raise UserError(f"the chat template refuses {prompt!r:.80}: {one_line(error)}") from None
        encoded.append(list(ids))
    return encoded


def check_lengths(encoded: list[list[int]], rows: list[Row], max_positions: int | None, config: GRPOConfig) -> None:
    """Every prompt and its longest completion must fit the model's positions and a microbatch."""
    longest = max(range(len(encoded)), key=lambda index: len(encoded[index]))
    length = len(encoded[longest])
    if min(len(ids) for ids in encoded) == 0:
        raise UserError("a prompt has no tokens; every prompt must have at least one")
    room = f"a prompt of {length} tokens and max_completion_length={config.max_completion_length}"
    where = f"the longest prompt begins {str(rows[longest]['prompt'])[:60]!r}"
    if max_positions is not None and length + config.max_completion_length > max_positions:
        raise UserError(f"{room} do not fit the model's {max_positions} positions; {where}")
    if length + config.max_completion_length > config.max_tokens_per_microbatch:
        raise UserError(f"{room} do not fit max_tokens_per_microbatch={config.max_tokens_per_microbatch}; {where}")


def prompt_order(num_rows: int, shuffle: bool, seed: int, start: int = 0) -> Iterator[int]:
    """Row indices without end, epoch by epoch, each in its own order, from the `start`-th index on."""
    order = list(range(num_rows))
    generator = random.Random(seed)
    for epoch in itertools.count():
        if shuffle:
            generator.shuffle(order)
        if epoch >= start // num_rows:
            yield from order[max(start - epoch * num_rows, 0) :]
