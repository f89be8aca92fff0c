"""The configuration from a command's arguments: a file or recipe, and ``--field value`` pairs."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Collection, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TypeVar, get_args, get_type_hints

from grpo_fast.config import DistillConfig, GRPOConfig, SFTConfig, check_complete, check_repeatable, name_unknown
from grpo_fast.errors import UserError, import_extra, one_line, shown
from grpo_fast.files import read_yaml
from grpo_fast.recipes import find_config

C = TypeVar("C", bound=GRPOConfig)


def parse_config(argv: Sequence[str], unused: Collection[str] = (), kind: type[C] = GRPOConfig) -> C:
    """The configuration from a recipe or YAML file (first argument, optional) and the ``--field value`` pairs after it.

    `unused` are fields that the command does not use, and `kind` is the class of its configuration. A UserError refuses
    a missing file, an unknown field, a wrong value, and a file in a run's folder that names Python code to run; see
    `trust`.
    """
    jsonargparse = import_extra("jsonargparse", "train")
    parser = jsonargparse.ArgumentParser(
        prog=f"grpo-fast {kind.command}",
        usage=f"grpo-fast {kind.command} CONFIG [--field value ...]",
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", help="YAML file; the first argument can be a file or recipe, too.")
    parser.add_class_arguments(kind, instantiate=False, skip=set(kind.unused_fields))
    known = {field.name for field in dataclasses.fields(kind)} - kind.unused_fields
    argv = ["--resume_from_checkpoint=true" if argument == "--resume" else argument for argument in argv]
    name = None
    if argv and not argv[0].startswith("-"):
        path = find_config(argv[0], kind.command)
        name, argv = path.stem, [f"--config={path}", *argv[1:]]
    files = _config_files(argv)
    for file in files:
        _check_file(file, known, kind)
    _check_options(argv, known, kind)
    try:
        values = parser.parse_args(argv).as_dict()
    except jsonargparse.ArgumentError as error:
        raise UserError(_explain(str(error), kind)) from None
    except OverflowError:
        # jsonargparse does not catch this for an integer beyond the largest float.
        wrong = next(argument for argument in argv if re.search(r"\d{309}", argument))
        raise UserError(f"{shown(wrong)} is not allowed: a number must be within +-{sys.float_info.max:.1e}") from None
    values.pop("config", None)
    config = kind(**values | {"run_name": name if values["run_name"] is None else values["run_name"]})
    check_complete(config)
    from grpo_fast.train.trust import check_code

    # Not --model_init_kwargs.head_dim, which sets a part of a field and leaves the rest to the file.
    named = {argument[2:].split("=")[0] for argument in argv if argument.startswith("--")}
    check_repeatable(config, named | set(unused))
    for file in files:
        check_code(file, config, named | set(unused))
    return config


def _config_files(argv: list[str]) -> list[Path]:
    """The files given as --config, whose value may also be YAML itself."""
    given = [value for option, value in pairwise(argv) if option == "--config"]
    given += [argument.split("=", 1)[1] for argument in argv if argument.startswith("--config=")]
    return [Path(value) for value in given if "\n" not in value and not value.lstrip().startswith("{")]


def _check_file(path: Path, known: set[str], kind: type[GRPOConfig]) -> None:
    if not path.is_file():
        raise UserError(f"no such file: {path}")
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold fields and values, as in: learning_rate: 1e-5")
    _refuse_others(path, set(map(str, content)), known, kind)
    if wrong := _unused(map(str, content), kind) or name_unknown(map(str, content), known):
        raise UserError(f"{path}: {wrong}")


def _refuse_others(path: Path, names: set[str], known: set[str], kind: type[GRPOConfig]) -> None:
    """Refuse the configuration of another command, such as the config.yaml of its run's folder."""
    for other in (GRPOConfig, SFTConfig, DistillConfig):
        theirs = other.__dataclass_fields__.keys() - other.unused_fields
        if not names <= known and names <= theirs:
            raise UserError(
                f"{path} is for grpo-fast {other.command}; give a configuration of grpo-fast {kind.command}"
            )


def _unused(names: Iterable[str], kind: type[GRPOConfig]) -> str:
    """The fields of `GRPOConfig` that the command does not use, in one line; empty if there are none."""
    found = sorted(kind.unused_fields & set(names))
    return f"grpo-fast {kind.command} does not use {', '.join(found)}" if found else ""


def _check_options(argv: list[str], known: set[str], kind: type[GRPOConfig]) -> None:
    names = []
    for index, argument in enumerate(argv):
        if argument.endswith((".yaml", ".yml")) and index and not argument.startswith("-"):
            raise UserError(f"{argument}: the configuration file goes first, before the options")
        if not argument.startswith("--"):
            continue
        names.append(argument[2:].split("=")[0].split(".")[0].removesuffix("+"))
    options = known | {"config", "help", "print_config"}
    if wrong := _unused(names, kind) or name_unknown(names, options, "option", "--"):
        raise UserError(wrong)


def _explain(message: str, kind: type[GRPOConfig]) -> str:
    """jsonargparse's complaint about a value, in the words of the other errors."""
    found = re.search(r'key "(\w+)":.*(?:Got value|Given value): (.*)', " ".join(message.split()))
    if not found or found[1] not in kind.__dataclass_fields__:
        return one_line(message, limit=2000)
    hint = get_type_hints(kind)[found[1]]
    allowed = str(hint).replace("typing.", "") if get_args(hint) else hint.__name__
    return f"{found[1]}={shown(found[2].strip())} is not allowed: it must be {allowed}"
