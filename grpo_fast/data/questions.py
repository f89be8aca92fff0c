"""Questions with a reference answer: GSM8K and MATH, from the hub or from files, with the same three columns.

``question``, ``answer`` (which rewards compare with) and ``solution`` (the worked text). MATH keeps its other columns.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from grpo_fast.data.files import DATA_FILE, is_file, load_hub, read_file
from grpo_fast.data.templates import Row
from grpo_fast.errors import UserError
from grpo_fast.files import user_path
from grpo_fast.rewards.functions.answer_text import boxes

GSM8K = "openai/gsm8k"
MATH = "DigitalLearningGmbH/MATH-lighteval"

_FINAL = re.compile(r"####\s*(-?\$?[\d,]*\.?\d+)")


def gsm8k(path: str = GSM8K) -> tuple[list[Row], list[Row] | None]:
    """GSM8K (arXiv:2110.14168): the answer is the number after ``####``, without commas.

    `path` is a hub name; a folder with ``train`` and ``test`` files (see `read_file`); or one file, of which a share is
    held out. Raises UserError if it cannot be read, or for a row without question or answer.
    """
    return _questions("gsm8k", path, "main" if path == GSM8K else None, _gsm8k_row)


def math(path: str = MATH) -> tuple[list[Row], list[Row] | None]:
    r"""MATH (arXiv:2103.03874): the answer is the content of the solution's last ``\boxed{}``.

    `path` and errors are as for `gsm8k`; files have the columns ``problem`` and ``solution``.
    """
    return _questions("math", path, None, _math_row)


def _gsm8k_row(row: Row) -> Row:
    question, worked = _column(row, "question"), _column(row, "answer")
    final = _FINAL.search(worked)
    if final is None:
        raise UserError(f"no number after #### in the answer {worked[-60:]!r}")
    answer = final[1].replace(",", "").replace("$", "")
    return {"question": question, "answer": answer, "solution": worked[: final.start()].rstrip()}


def _math_row(row: Row) -> Row:
    question, solution = _column(row, "problem"), _column(row, "solution")
    found = boxes(solution)
    if not found:
        raise UserError(f"no \\boxed{{}} in the solution that ends in {solution[-60:]!r}")
    others = {name: value for name, value in row.items() if name != "problem"}
    return {**others, "question": question, "answer": found[-1][2].strip(), "solution": solution}


def _column(row: Row, name: str) -> str:
    if not isinstance(row.get(name), str):
        raise UserError(f"no text in column {name!r} (it has {', '.join(row)})")
    return row[name]


def _questions(
    task: str, path: str, hub_config: str | None, convert: Callable[[Row], Row]
) -> tuple[list[Row], list[Row] | None]:
    made = []
    for split, rows in _read(task, path, hub_config).items():
        made.append([])
        for number, row in enumerate(rows, 1):
            try:
                made[-1].append(convert(row))
            except UserError as error:
                raise UserError(f"{task}, {split} row {number} of {path}: {error}") from None
    return made[0], made[1] if len(made) > 1 else None


def _read(task: str, path: str, hub_config: str | None) -> dict[str, list[Row]]:
    """The training rows and, if there are any, the test rows."""
    folder = user_path(path)
    if is_file(path):
        return {"train": read_file(path)}
    if folder.is_dir():
        files = sorted(file for file in folder.iterdir() if is_file(file.name))
        found = ", ".join(file.name for file in files) or f"no {DATA_FILE}"
        parts = {name: [f for f in files if re.split(r"[-.]", f.name)[0] == name] for name in ("train", "test")}
        splits = {name: [row for file in some for row in read_file(str(file))] for name, some in parts.items() if some}
    else:
        if path.count("/") != 1 or path.startswith((".", "/", "~")):
            raise UserError(f"{task}: path={path!r} is neither a folder, a file nor a hub name")
        loaded = load_hub(path, hub_config, f"{task}: path")
        found = ", ".join(loaded)
        splits = {name: list(loaded[name]) for name in ("train", "test") if name in loaded}
    if "train" not in splits:
        raise UserError(f"{task}: {path} has no split 'train'; it has {found}")
    return splits
