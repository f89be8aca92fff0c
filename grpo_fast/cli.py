"""The command line: ``grpo-fast train CONFIG.yaml [--field value ...]``, ``plan`` and ``eval`` alike, ``report``."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import re
import sys
import time
import traceback
import warnings
from collections.abc import Collection, Sequence
from functools import partialmethod
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import get_args, get_type_hints

from grpo_fast.config import TRL_FIELDS_INSTEAD, GRPOConfig
from grpo_fast.errors import UserError, import_extra, nearest, one_line, printable, say
from grpo_fast.files import read_yaml, user_path
from grpo_fast.report.terminal import open_standard_streams, print_error, silence
from grpo_fast.startup import leaving_at_once
from grpo_kernels import __version__

USAGE = """usage: grpo-fast train CONFIG.yaml [--field value ...]

Train a model with GRPO. Every field of the configuration can be set on the command line.

  grpo-fast plan CONFIG.yaml --vram 24GiB     what a run takes in memory, and whether it fits
  grpo-fast train --help                      all fields, with their meaning
  grpo-fast train CONFIG.yaml --print_config  the configuration as resolved
  grpo-fast train RUN/config.yaml --resume    go on from a run folder's newest checkpoint
  grpo-fast serve CONFIG.yaml                 a vLLM server for that run (use_vllm: true, vllm_mode: server)
  grpo-fast eval RUN/config.yaml --greedy     the accuracy of a model on held-out prompts, with its interval
  grpo-fast report RUN [--output FILE.html]   a run folder as one HTML page, while it goes on or afterwards
  grpo-fast compare RUN RUN ...               the curves of several runs in one figure; seeds of a setting together
  grpo-fast doctor                            which kernels run on this machine, and whether their results are right
  grpo-fast doctor --head H,V --tokens N      predicted time of a head on a GPU that is not at hand
  grpo-fast --version"""

# The signal's number everywhere; Windows has no name for it.
SIGPIPE = 13
# Seconds until a process that has failed is sure that the first one has not.
PATIENCE = 3
FIELDS = {field.name for field in dataclasses.fields(GRPOConfig)}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point.

    Returns the exit status: 0, 1 if a plan does not fit or a kernel is wrong, 2 for wrong input or output that cannot
    be written, 130 when interrupted, 141 where nobody reads the output.
    """
    open_standard_streams()
    argv = list(sys.argv[1:] if argv is None else argv)
    _show_errors_as_text()
    try:
        try:
            return _run(argv)
        finally:
            # Here, not when the interpreter ends, where an error is no more than a note.
            sys.stdout.flush()
    except BrokenPipeError:
        silence(sys.stdout)
        return 128 + SIGPIPE
    except OSError as error:
        silence(sys.stdout)
        print_error(f"grpo-fast: error: the output could not be written: {error.strerror or error}")
        return 2


def _run(argv: list[str]) -> int:
    try:
        for argument in argv:
            if not _is_unicode(argument):
                raise UserError(f"{argument!r} is not allowed: it must be UTF-8 text")
        if not argv or argv[0] in ("-h", "--help"):
            print(USAGE)
            return 0
        if argv[0] == "--version":
            print(f"grpo-fast {__version__}")
            return 0
        if argv[0] not in COMMANDS:
            raise UserError(f"unknown command {argv[0]!r}{nearest(argv[0], COMMANDS)}; there is: {', '.join(COMMANDS)}")
        return COMMANDS[argv[0]](argv[1:])
    except UserError as error:
        _tell(str(error))
        return 2
    except OSError as error:
        if isinstance(error, BrokenPipeError) and argv[0] not in LASTING:
            raise
        where = f": {error.filename}" if error.filename else ""
        _tell(f"{error.strerror or error}{where}")
        return 2
    except KeyboardInterrupt:
        print_error("\ngrpo-fast: interrupted")
        return 130


def _is_unicode(text: str) -> bool:
    """Whether it can be written; bytes that are not UTF-8 come from the system as surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _show_errors_as_text() -> None:
    """Tracebacks and warnings, too, may hold a completion, a column or an answer of a server."""

    def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        say("".join(traceback.format_exception(kind, error, trace)).rstrip("\n"), file=sys.stderr)

    def warn(message: Warning | str, kind: type[Warning], file: str, line: int, source: str | None = None) -> str:
        return printable(f"{file}:{line}: {kind.__name__}: {message}\n")

    sys.excepthook, warnings.formatwarning = show, warn


def _tell(error: str) -> None:
    """Of several processes that fail alike only the first one says so; their launcher ends the others."""
    rank = int(os.environ.get("RANK", 0))
    if rank:
        time.sleep(PATIENCE)
    line = " ".join(error.splitlines())
    print_error(f"grpo-fast: error{f' in process {rank}' * bool(rank)}: {line}")


def parse_config(argv: Sequence[str], unused: Collection[str] = ()) -> GRPOConfig:
    """The configuration of a YAML file (the first argument, optional) and of ``--field value`` pairs after it.

    Args:
        argv: the command line.
        unused: fields that the command does nothing with.

    Raises:
        UserError: a missing file, an unknown field, a value that is not allowed, or a file from a run's folder that
            names Python to be run; see `trust`.
    """
    jsonargparse = import_extra("jsonargparse", "train")
    parser = jsonargparse.ArgumentParser(
        prog="grpo-fast train", usage="grpo-fast train CONFIG.yaml [--field value ...]", exit_on_error=False
    )
    parser.add_argument("--config", action="config", help="YAML file; may also be given as the first argument.")
    parser.add_class_arguments(GRPOConfig, instantiate=False)
    argv = ["--resume_from_checkpoint=true" if argument == "--resume" else argument for argument in argv]
    path = None
    if argv and not argv[0].startswith("-"):
        path = user_path(argv[0])
        argv = [f"--config={path}", *argv[1:]]
    files = _config_files(argv)
    for file in files:
        _check_file(file)
    _check_options(argv)
    try:
        values = parser.parse_args(argv)
    except jsonargparse.ArgumentError as error:
        raise UserError(_explain(one_line(error, limit=2000))) from None
    values = values.clone().as_dict() if hasattr(values, "clone") else dict(values)
    values.pop("config", None)
    if values.get("run_name") is None and path is not None:
        values["run_name"] = path.stem
    config = GRPOConfig(**values)
    from grpo_fast.train.trust import check_code

    # Not a part of a field, as in --model_init_kwargs.head_dim, which leaves the rest to the file.
    named = {argument[2:].split("=")[0] for argument in argv if argument.startswith("--")}
    for file in files:
        check_code(file, config, named | set(unused))
    return config


def _config_files(argv: list[str]) -> list[Path]:
    """The files that --config names; it may also hold the fields themselves."""
    given = [value for option, value in pairwise(argv) if option == "--config"]
    given += [argument.split("=", 1)[1] for argument in argv if argument.startswith("--config=")]
    return [Path(value) for value in given if "\n" not in value and not value.lstrip().startswith("{")]


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise UserError(f"no such file: {path}")
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold fields and values, as in: learning_rate: 1e-5")
    for name in content:
        if name not in FIELDS:
            raise UserError(f"{path}: unknown field {name!r}{_instead(str(name))}")


def _check_options(argv: list[str]) -> None:
    for index, argument in enumerate(argv):
        if argument.endswith((".yaml", ".yml")) and index and not argument.startswith("-"):
            raise UserError(f"{argument}: the configuration file goes first, before the options")
        if not argument.startswith("--"):
            continue
        name = argument[2:].split("=")[0].split(".")[0].removesuffix("+")
        if name not in FIELDS | {"config", "help", "print_config"}:
            raise UserError(f"unknown option --{name}{_instead(name)}")


def _instead(name: str) -> str:
    """What an unknown field may have meant: another name of ours, or one of TRL's."""
    if name in TRL_FIELDS_INSTEAD:
        return f"; set {TRL_FIELDS_INSTEAD[name]} instead"
    return nearest(name, FIELDS)


def _explain(message: str) -> str:
    """jsonargparse's complaint about a value, in the words of the other errors."""
    found = re.search(r'key "(\w+)":.*(?:Got value|Given value): (.*)', message)
    if not found or found[1] not in FIELDS:
        return message
    hint = get_type_hints(GRPOConfig)[found[1]]
    kind = str(hint).replace("typing.", "") if get_args(hint) else hint.__name__
    return f"{found[1]}={found[2].strip()!r} is not allowed: it must be {kind}"


def quiet_libraries() -> None:
    """No bars, which would break up the run's own live line, and no notes of kernels that a library did not find."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Its variable TQDM_DISABLE is read when tqdm is imported, which torch may have done.
    tqdm = import_extra("tqdm", "train").tqdm
    tqdm.__init__ = partialmethod(tqdm.__init__, disable=True)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|torchao|vllm)\.")
    for name in ("torchao", "bitsandbytes", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    transformers = import_extra("transformers", "train")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def train(argv: Sequence[str]) -> int:
    config = parse_config(argv)
    with leaving_at_once():
        quiet_libraries()
        import_extra("accelerate", "train")
        from grpo_fast.distributed.processes import disconnect
        from grpo_fast.trainer import GRPOTrainer

    GRPOTrainer(config).train()
    disconnect()
    return 0


def report(argv: Sequence[str]) -> int:
    """Write the page of a run folder and print its path."""
    jsonargparse = import_extra("jsonargparse", "train")
    parser = jsonargparse.ArgumentParser(prog="grpo-fast report", exit_on_error=False)
    parser.add_argument("run", type=str, help="a run folder, of a run that ended or still goes on")
    parser.add_argument("--output", type=str, help="where to write the page (default: report.html in the run folder)")
    try:
        arguments = parser.parse_args(list(argv))
    except jsonargparse.ArgumentError as error:
        raise UserError(f"grpo-fast report RUN [--output FILE.html]: {one_line(error)}") from None
    with leaving_at_once():
        from grpo_fast.report import write_report

    say(str(write_report(user_path(arguments.run), user_path(arguments.output) if arguments.output else None)))
    return 0


def compare(argv: Sequence[str]) -> int:
    """Draw the curves of several runs, print their scores and the figure's path."""
    jsonargparse = import_extra("jsonargparse", "train")
    parser = jsonargparse.ArgumentParser(prog="grpo-fast compare", exit_on_error=False)
    parser.add_argument("runs", type=str, nargs="+", help="run folders; those of one setting are one curve")
    parser.add_argument("--metric", type=str, help="a reward, or a figure of metrics.jsonl (default: the score)")
    parser.add_argument("--output", type=str, default="compare.png", help="where to write the figure")
    try:
        arguments = parser.parse_args(list(argv))
    except jsonargparse.ArgumentError as error:
        raise UserError(f"grpo-fast compare RUN RUN ... [--metric NAME] [--output FILE]: {one_line(error)}") from None
    with leaving_at_once():
        from grpo_fast.report.compare import plot_curves, print_curves, read_curves

    metric, curves = read_curves([user_path(run) for run in arguments.runs], arguments.metric)
    output = user_path(arguments.output)
    if output.suffix not in (".png", ".svg", ".pdf"):
        raise UserError(f"--output={arguments.output!r} is not allowed: it must end in .png, .svg or .pdf")
    plot_curves({metric: curves}, metric, output)
    print_curves(curves, metric)
    say(str(output))
    return 0


PLAN_USAGE = """usage: grpo-fast plan [CONFIG.yaml] --vram SIZE [--prompt_tokens 512] [--field value ...]

Add up what a run takes in memory, from the model's configuration alone: no weights, no GPU, no data.
The exit status is 1 where it does not fit.

  --vram SIZE          memory of the GPU: 24GiB, 80GB (default: that of the GPU at hand)
  --prompt_tokens N    length of the longest prompt (default: 512)
  --model NAME         short for --model_name_or_path; also a config.json or the folder of one
  --field value        any field of the configuration, as for train"""


def plan(argv: Sequence[str]) -> int:
    argv = ["--model_name_or_path" + a.removeprefix("--model") if re.match(r"--model(=|$)", a) else a for a in argv]
    if "--help" in argv or "-h" in argv:
        print(PLAN_USAGE)
        return 0
    vram, argv = _take(argv, "--vram")
    prompt_tokens, argv = _take(argv, "--prompt_tokens", "512")
    if not prompt_tokens.isdecimal() or not int(prompt_tokens):
        raise UserError(f"--prompt_tokens={prompt_tokens!r} is not allowed: it must be a number of tokens, at least 1")
    # A plan needs no data and no rewards; their fields have to hold something.
    config = parse_config([*argv, "--dataset_name=any", "--reward_funcs=[any]", "--reward_weights=null"])
    with leaving_at_once():
        quiet_libraries()
        import torch

        from grpo_fast.memory.report import parse_size, print_plan

    if vram is not None:
        size = parse_size(vram)
    elif torch.cuda.is_available():
        size = torch.cuda.get_device_properties(0).total_memory
    else:
        raise UserError("there is no GPU here whose memory could be read; say it with --vram 24GiB")
    return 0 if print_plan(config, size, int(prompt_tokens)) else 1


SERVE_USAGE = """usage: grpo-fast serve CONFIG.yaml [--field value ...] [-- VLLM OPTIONS]

Start a vLLM server with what the run of that configuration needs, at its vllm_server_base_url, or vllm_server_host and
vllm_server_port. The run brings the weights. Ctrl-C ends it. At any address but loopback, server and run both need the
same secret in the environment variable VLLM_API_KEY.

  --field value        any field of the configuration, as for train
  -- VLLM OPTIONS      further options of vLLM's server, as in: -- --tensor-parallel-size 2"""


def serve(argv: Sequence[str]) -> int:
    """Become vLLM's server."""
    argv = list(argv)
    cut = argv.index("--") if "--" in argv else len(argv)
    if {"--help", "-h"} & set(argv[:cut]):
        print(SERVE_USAGE)
        return 0
    config = parse_config(argv[:cut], unused=["reward_funcs"])
    with leaving_at_once():
        quiet_libraries()
        from grpo_fast.rollout.vllm.serve import serve as start

    start(config, argv[cut + 1 :])
    return 0


EVAL_USAGE = """usage: grpo-fast eval [CONFIG.yaml] [--model_name_or_path RUN/checkpoint-N] [--field value ...]

Measure a model on the held-out prompts of a configuration: the mean of every reward function and pass@k, with 95%
intervals. A checkpoint may hold an adapter alone; without CONFIG.yaml its run's config.yaml is taken.

  --greedy             one completion a prompt, of the likeliest tokens
  --num_generations_eval N
                       sampled completions of each prompt; --temperature, --top_p and so on as for train
  --k 1,4,8            pass@k for these (default: 1 and the number of completions)
  --threshold 1.0      a completion is right from this reward on
  --batch_size 32      prompts that are sampled, and written, at once
  --output FOLDER      where samples.jsonl and summary.json go (default: runs/eval-NAME-TIME)
  --resume             go on with an interrupted evaluation in that folder
  --compare FOLDER     another evaluation of the same prompts: also estimate the difference to it"""


def evaluate(argv: Sequence[str]) -> int:
    """Write an evaluation's folder and print its figures."""
    if "--help" in argv or "-h" in argv:
        print(EVAL_USAGE)
        return 0
    greedy, resume = ("--greedy" in argv, "--resume" in argv)
    argv = [argument for argument in argv if argument not in ("--greedy", "--resume")]
    k, argv = _take(argv, "--k")
    threshold, argv = _take(argv, "--threshold", "1")
    batch_size, argv = _take(argv, "--batch_size", "32")
    output, argv = _take(argv, "--output")
    compare, argv = _take(argv, "--compare")
    numbers = (k or "").replace(" ", "").split(",") if k else []
    if not all(number.isdecimal() for number in numbers):
        raise UserError(f"--k={k!r} is not allowed: it must be numbers from 1 on, as in 1,4,8")
    if not batch_size.isdecimal() or not int(batch_size):
        raise UserError(f"--batch_size={batch_size!r} is not allowed: it must be a number of prompts, at least 1")
    try:
        least = float(threshold)
    except ValueError:
        least = math.nan
    if not math.isfinite(least):
        raise UserError(f"--threshold={threshold!r} is not allowed: it must be a finite number")
    model, _ = _take(argv, "--model_name_or_path")
    if model and not (argv and not argv[0].startswith("-")):
        own = user_path(model).parent / "config.yaml"
        argv = [str(own), *argv] if own.is_file() else argv
    config = parse_config(argv)
    with leaving_at_once():
        quiet_libraries()
        import_extra("accelerate", "train")
        from grpo_fast.distributed.processes import launched
        from grpo_fast.evaluation.run import EvalOptions, EvalRun

    if launched() > 1:
        raise UserError(f"grpo-fast eval runs in one process, but {launched()} were started")
    folder, other = (user_path(path) if path else None for path in (output, compare))
    options = EvalOptions(greedy, tuple(map(int, numbers)), least, int(batch_size), folder, resume, other)
    EvalRun(config, options).run()
    return 0


def doctor(argv: Sequence[str]) -> int:
    """Check the kernels on this machine, or predict a head's time; returns 1 where a result is wrong."""
    from grpo_kernels.doctor import main as check

    return check(argv)


def _take(argv: list[str], option: str, default: str | None = None) -> tuple[str | None, list[str]]:
    """The value of an option of the command's own, and the arguments without it."""
    value, rest = default, []
    arguments = iter(argv)
    for argument in arguments:
        if argument.split("=")[0] != option:
            rest.append(argument)
            continue
        value = argument.split("=", 1)[1] if "=" in argument else next(arguments, None)
        if not value:
            raise UserError(f"{option} needs a value")
    return value, rest


# Their output may break off; a pipe that breaks in them is another one.
LASTING = ("train", "eval")
COMMANDS = {
    "train": train,
    "plan": plan,
    "serve": serve,
    "eval": evaluate,
    "report": report,
    "compare": compare,
    "doctor": doctor,
}

if __name__ == "__main__":
    sys.exit(main())
