"""The command ``grpo-fast convert``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from grpo_fast.convert.conversion import FIELDS, TRAINERS, read_file
from grpo_fast.convert.conversion import convert as convert_fields
from grpo_fast.errors import UserError, import_extra, nearest, one_line, say, shown
from grpo_fast.files import replace_text, user_path

CONVERT_USAGE = """usage: grpo-fast convert THEIR.yaml [--output FILE.yaml] [--field value ...]

Write the configuration for a file of TRL, verl or LLaMA-Factory (or a shell script that starts verl), and say for each
field what became of it, and what to do where it has no counterpart. The exit status is 1 if something is left to set.

  --output FILE.yaml   where to write it (default: THEIR-grpo-fast.yaml in the current folder)
  --from NAME          trl, verl or llama-factory (default: recognised by the fields)
  --processes N        processes of the run, by which TRL and LLaMA-Factory multiply the batch (default: 1)
  --field value        any field of the configuration, as for train, such as --reward_funcs accuracy,format"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise UserError(f"grpo-fast convert: {message}")


def convert(argv: Sequence[str]) -> int:
    """Write a converted configuration; returns 1 if it needs more before it runs."""
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("file")
    parser.add_argument("--output")
    parser.add_argument("--from", choices=TRAINERS, dest="trainer")
    parser.add_argument("--processes", type=int, default=1)
    options, rest = parser.parse_known_args(argv)
    if options.processes < 1:
        raise UserError(f"--processes={options.processes} is not allowed: it must be at least 1")
    path = user_path(options.file)
    output = user_path(options.output or f"{path.stem}-grpo-fast.yaml")
    if output.exists():
        raise UserError(f"{output} already exists; choose another file with --output")
    made = convert_fields(read_file(path), path.parent, options.trainer, options.processes, _read_changes(rest))
    replace_text(output, made.text(path.name))
    say("\n".join([f"{path} ({made.trainer}) as {output}:", "", *made.report()]))
    return 1 if made.to_set else 0


def _read_changes(words: list[str]) -> dict[str, Any]:
    """The values of ``--field value`` and ``--field=value``."""
    yaml = import_extra("yaml", "train")
    parts = [part for word in words for part in (word.split("=", 1) if word.startswith("--") else [word])]
    if len(parts) % 2 or not all(part.startswith("--") for part in parts[::2]):
        raise UserError(f"{shown(' '.join(words))} is not allowed: fields are set as in --learning_rate 1e-5")
    changes = {}
    for option, value in zip(parts[::2], parts[1::2], strict=True):
        name = option.removeprefix("--")
        if name not in FIELDS:
            raise UserError(f"unknown option {option}{nearest(name, FIELDS)}")
        try:
            changes[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UserError(f"{option}={shown(value)} is not valid YAML: {one_line(error)}") from None
    return changes
