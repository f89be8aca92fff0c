"""The rows of a run: their source, their prompts, and the split that is held out.

Every row has a ``prompt``, a string or a list of chat messages (TRL's two forms). The other columns are passed to the
reward functions by name.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable
from typing import Any

from grpo_fast.config import GRPOConfig
from grpo_fast.data.files import DATA_FILE, is_file, load_hub, read_file
from grpo_fast.data.instructions import reference_answer
from grpo_fast.data.questions import gsm8k, math
from grpo_fast.data.tasks import addition, arithmetic, countdown, sort_digits
from grpo_fast.data.templates import Prompt, Row, has_text, load_template
from grpo_fast.errors import UserError, nearest

# Of a dataset without a split for evaluation, about this share of the rows is held out, at most MAX_HELD_OUT.
HELD_OUT_SHARE, MAX_HELD_OUT = 0.1, 200

# Each returns the training rows and the held-out rows, except for a single file of GSM8K or MATH.
BUILT_IN: dict[str, Callable[..., tuple[list[Row], list[Row] | None]]] = {
    function.__name__: function for function in (sort_digits, addition, arithmetic, countdown, gsm8k, math)
}


def load_rows(
    config: GRPOConfig, train_rows: list[Row] | None = None, eval_rows: list[Row] | None = None
) -> tuple[list[Row], list[Row]]:
    """Training and evaluation rows, each with its ``prompt``.

    `train_rows` and `eval_rows` are those of a script, in place of what the configuration names.

    Raises:
        UserError: a missing file, a malformed line, an unknown built-in, a wrong prompt file, a row without a column
            that the template or the trainer needs, or an empty split.
    """
    build = load_template(config)
    raw, test = (train_rows, None) if train_rows is not None else load_splits(config)
    test = test if eval_rows is None else eval_rows
    train = _with_prompts(raw, build, config.dataset_name, config.answer_column)
    if test is None:
        train, test = hold_out(train, [_content(row) for row in raw])
        field = "eval_dataset_name" if train_rows is None else "eval_dataset"
        instead = f"; it needs at least two different prompts, or an {field}"
    else:
        own = "eval_dataset" if eval_rows is not None else f"{config.dataset_name}, held out"
        test = _with_prompts(test, build, config.eval_dataset_name or own, config.answer_column)
        instead = "; set eval_dataset_name"
    for name, rows, more in (("training", train, ""), ("evaluation", test, instead)):
        if not rows:
            raise UserError(f"dataset_name={config.dataset_name!r} has no rows for {name}{more}")
    return train[: config.max_train_samples], test[: config.max_eval_samples]


def prepare_rows(config: GRPOConfig, rows: list[Row], source: str) -> list[Row]:
    """Rows with their ``prompt`` and answer, made as in the run; `source` names them in errors."""
    return _with_prompts(rows, load_template(config), source, config.answer_column)


def hold_out(rows: list[Row], contents: list[str]) -> tuple[list[Row], list[Row]]:
    """Split rows into training rows, in their order, and about a tenth, at most 200, that are held out.

    The hash of a row's text in `contents` is its place between 0 and 1. Rows below `HELD_OUT_SHARE` are held out, the
    lowest first (or the lowest one if none is below); rows with the same prompt stay together at the lowest of their
    places. So the split does not depend on a seed, order or limit, and new rows with other prompts move no training row
    to the held-out ones.
    """
    groups: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(_content(row["prompt"]), []).append(index)
    if len(groups) < 2:
        return rows, []
    # Places from 0 to below 1, the same on every machine.
    hashes = [hashlib.blake2b(content.encode(), digest_size=6).digest() for content in contents]
    places = [int.from_bytes(digest) / 2**48 for digest in hashes]
    placed = sorted((min(places[index] for index in group), group) for group in groups.values())
    held_out = placed[0][1]
    for place, group in placed[1:-1]:
        if place >= HELD_OUT_SHARE or len(held_out) + len(group) > MAX_HELD_OUT:
            break
        held_out = held_out + group
    chosen = set(held_out)
    return [row for index, row in enumerate(rows) if index not in chosen], [rows[index] for index in held_out]


def _content(value: object) -> str:
    """A row or a prompt as one text, without the columns that have no value."""
    if isinstance(value, dict):
        value = {name: cell for name, cell in value.items() if cell is not None}
    return json.dumps(value, sort_keys=True, default=lambda cell: str(cell) if has_text(cell) else type(cell).__name__)


def _with_prompts(rows: list[Row], build: Callable[[Row], Prompt], source: str, answer_column: str | None) -> list[Row]:
    """Every row with its prompt, its answer and all columns of the data; None for a column that it lacks."""
    columns = dict.fromkeys(name for row in rows for name in row)
    made = []
    for number, row in enumerate(rows, 1):
        try:
            prompt = build(row)
            made.append({**columns, **row, **find_answer(row, answer_column), "prompt": prompt})
        except UserError as error:
            raise UserError(f"{source}, row {number}: {error}") from None
    return made


def find_answer(row: Row, column: str | None) -> Row:
    """The column ``answer`` of a row whose answer has another place."""
    if column is None:
        found = None if "answer" in row else reference_answer(row)
        return {} if found is None else {"answer": found}
    if column in row:
        return {"answer": row[column]}
    value: Any = row
    for name in column.split("."):
        if not isinstance(value, dict) or name not in value:
            raise UserError(
                f"answer_column={column!r} is not in the row{nearest(column, row)}; it has {', '.join(row)}"
            )
        value = value[name]
    return {"answer": value}


def load_splits(config: GRPOConfig) -> tuple[list[Row], list[Row] | None]:
    name = config.dataset_name
    if name in BUILT_IN and config.eval_dataset_name:
        raise UserError(f"eval_dataset_name requires a file or hub dataset; {name!r} has its own held-out rows")
    if name in BUILT_IN or is_file(name):
        for field in ("dataset_config", "dataset_train_split", "dataset_test_split"):
            if getattr(config, field) != getattr(GRPOConfig, field):
                raise UserError(f"{field}={getattr(config, field)!r} requires a hub dataset, not {name!r}")
    if name in BUILT_IN:
        return _built_in(name, config.dataset_kwargs or {})
    if config.dataset_kwargs:
        raise UserError(f"dataset_kwargs requires one of the built-in datasets {', '.join(BUILT_IN)}, not {name!r}")
    held_out = read_file(config.eval_dataset_name) if config.eval_dataset_name else None
    if is_file(name):
        return read_file(name), held_out
    if "/" not in name:
        raise UserError(
            f"dataset_name={name!r} is neither a {DATA_FILE}, nor a hub name (owner/name), "
            f"nor one of {', '.join(BUILT_IN)}{nearest(name, BUILT_IN)}"
        )
    loaded = load_hub(name, config.dataset_config, "dataset_name")
    train, test = config.dataset_train_split, config.dataset_test_split
    for field, split in (("dataset_train_split", train), ("dataset_test_split", test)):
        if split not in loaded and (split == train or split != GRPOConfig.dataset_test_split):
            raise UserError(f"{field}={split!r} is not in {name!r}: it has {list(loaded)}")
    if held_out is None and test in loaded:
        held_out = list(loaded[test])
    return list(loaded[train]), held_out


def _built_in(name: str, kwargs: dict[str, Any]) -> tuple[list[Row], list[Row] | None]:
    known = inspect.signature(BUILT_IN[name]).parameters
    for key in kwargs:
        if key not in known:
            raise UserError(f"dataset_kwargs: {name} takes {', '.join(known)}, not {key!r}{nearest(key, known)}")
        if not isinstance(kwargs[key], type(known[key].default)):
            kind = type(known[key].default).__name__
            raise UserError(f"dataset_kwargs: {key}={kwargs[key]!r} is not allowed: it must be of type {kind}")
    return BUILT_IN[name](**kwargs)
