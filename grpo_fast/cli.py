"""The command line: ``grpo-fast train CONFIG [--field value ...]`` and the other commands."""

from __future__ import annotations

import argparse
import logging
import math
import os
import re
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partialmethod
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn

from grpo_fast.arguments import parse_config
from grpo_fast.config import DistillConfig, SFTConfig
from grpo_fast.convert.command import CONVERT_USAGE, convert
from grpo_fast.errors import UserError, import_extra, nearest, printable, say, shown
from grpo_fast.files import user_path
from grpo_fast.recipes import describe_recipes
from grpo_fast.report.terminal import open_standard_streams, print_error, silence
from grpo_fast.startup import leaving_at_once
from grpo_kernels import __version__

if TYPE_CHECKING:
    from grpo_fast.train.run import TrainingRun

USAGE = """usage: grpo-fast train CONFIG [--field value ...]

Train a model with GRPO. CONFIG is a YAML file or the name of a recipe, such as sort. Every field of the configuration
can be set on the command line.

  grpo-fast sft CONFIG                        supervised fine-tuning, as a cold start; its own fields: sft --help
  grpo-fast distill CONFIG                    on-policy distillation from a teacher; its own fields: distill --help
  grpo-fast convert THEIR.yaml                the configuration for a file of TRL, verl or LLaMA-Factory
  grpo-fast recipes                           the configurations that ship with the package
  grpo-fast plan CONFIG --vram 24GiB          the memory that a run needs, and whether it fits
  grpo-fast train --help                      all fields, with their meaning
  grpo-fast train CONFIG --print_config       the configuration as resolved
  grpo-fast train RUN/config.yaml --resume    continue from a run folder's newest checkpoint
  grpo-fast serve CONFIG                      a vLLM server for that run (use_vllm: true, vllm_mode: server)
  grpo-fast eval RUN/config.yaml --greedy     the accuracy of a model on held-out prompts, with its interval
  grpo-fast report RUN [--output FILE.html]   a run folder as one HTML page, during the run or afterwards
  grpo-fast compare RUN RUN ...               the curves of several runs in one figure, averaged over seeds
  grpo-fast doctor                            which kernels run on this machine, and whether they are correct
  grpo-fast doctor --head H,V --tokens N      the predicted time of a head on an H100 or H200
  grpo-fast --version"""

# The signal's number everywhere; Windows has no name for it.
SIGPIPE = 13
# Seconds that the other processes of a run leave the first one to report an error that all of them have.
PATIENCE = 3


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are UserErrors."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.usage}: {message}" if self.usage else message)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point.

    Returns the exit status: 0; 1 if a plan does not fit or a kernel is wrong; 2 for wrong input, or output that cannot
    be written; 130 when interrupted; 141 when nobody reads the output.
    """
    open_standard_streams()
    argv = list(sys.argv[1:] if argv is None else argv)
    _show_errors_as_text()
    try:
        try:
            return _run(argv)
        finally:
            # Here, because an error when the interpreter exits would not change the status.
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
            # Bytes that are not UTF-8 come from the system as surrogates.
            if re.search("[\ud800-\udfff]", argument):
                raise UserError(f"{argument!r} is not allowed: it must be UTF-8 text")
        if not argv or argv[0] in ("-h", "--help"):
            print(USAGE)
            return 0
        if argv[0] == "--version":
            print(f"grpo-fast {__version__}")
            return 0
        if argv[0] not in COMMANDS:
            raise UserError(f"unknown command {argv[0]!r}{nearest(argv[0], COMMANDS)}; there is: {', '.join(COMMANDS)}")
        if argv[0] in USAGES and {"-h", "--help"} & set(_own(argv)):
            say(USAGES[argv[0]])
            return 0
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


def _show_errors_as_text() -> None:
    """Make tracebacks and warnings printable: they may quote a completion, a column or a server's answer."""

    def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        say("".join(traceback.format_exception(kind, error, trace)).rstrip("\n"), file=sys.stderr)

    def warn(message: Warning | str, kind: type[Warning], file: str, line: int, source: str | None = None) -> str:
        return printable(f"{file}:{line}: {kind.__name__}: {message}\n")

    sys.excepthook, warnings.formatwarning = show, warn


def _tell(error: str) -> None:
    """Print an error. If all processes of a run have it, only the first prints it: the launcher ends the others."""
    rank = int(os.environ.get("RANK", 0))
    if rank:
        time.sleep(PATIENCE)
    line = " ".join(error.splitlines())
    print_error(f"grpo-fast: error{f' in process {rank}' * bool(rank)}: {line}")


def _own(argv: list[str]) -> list[str]:
    """The arguments before ``--``."""
    return argv[: argv.index("--")] if "--" in argv else argv


def _options(
    argv: Sequence[str], flags: Sequence[str] = (), **defaults: str | None
) -> tuple[argparse.Namespace, list[str]]:
    """A command's own options, beside the fields of the configuration, and the arguments without them."""
    parser = _Parser(add_help=False, allow_abbrev=False)
    for name in flags:
        parser.add_argument(f"--{name}", action="store_true")
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", nargs="?", const="", default=default)
    options, rest = parser.parse_known_args(argv)
    for name in defaults:
        if getattr(options, name) == "":
            raise UserError(f"--{name} needs a value")
    return options, rest


def _count(option: str, text: str, what: str) -> int:
    if not text.isdecimal() or not int(text):
        raise UserError(f"{option}={shown(text)} is not allowed: it must be a number of {what}, at least 1")
    return int(text)


def _numbers(option: str, text: str | None, allowed: str) -> tuple[int, ...]:
    numbers = (text or "").replace(" ", "").split(",") if text else []
    if not all(number.isdecimal() for number in numbers):
        raise UserError(f"{option}={text!r} is not allowed: it must be numbers {allowed}")
    return tuple(map(int, numbers))


def quiet_libraries() -> None:
    """Silence progress bars, which would break up the live line, and notes about kernels that are not installed."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # tqdm reads TQDM_DISABLE when it is imported, and torch may already have imported it.
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
    with _importing():
        from grpo_fast.trainer import GRPOTrainer

    return _run_to_the_end(GRPOTrainer(config))


def sft(argv: Sequence[str]) -> int:
    config = parse_config(argv, kind=SFTConfig)
    with _importing():
        from grpo_fast.sft.trainer import SFTTrainer

    return _run_to_the_end(SFTTrainer(config))


def distill(argv: Sequence[str]) -> int:
    config = parse_config(argv, kind=DistillConfig)
    with _importing():
        from grpo_fast.distillation import DistillationTrainer

    return _run_to_the_end(DistillationTrainer(config))


@contextmanager
def _importing() -> Iterator[None]:
    """A context for the imports of a trainer, which take long."""
    with leaving_at_once():
        quiet_libraries()
        import_extra("accelerate", "train")
        yield


def _run_to_the_end(run: TrainingRun) -> int:
    from grpo_fast.distributed.processes import disconnect

    run.train()
    disconnect()
    return 0


def report(argv: Sequence[str]) -> int:
    """Write the page of a run folder and print its path."""
    parser = _Parser(usage="grpo-fast report RUN [--output FILE.html]")
    parser.add_argument("run", help="a run folder, of a run that has ended or is still going")
    parser.add_argument("--output", help="where to write the page (default: report.html in the run folder)")
    arguments = parser.parse_args(argv)
    with leaving_at_once():
        from grpo_fast.report import write_report

    say(str(write_report(user_path(arguments.run), user_path(arguments.output) if arguments.output else None)))
    return 0


def compare(argv: Sequence[str]) -> int:
    """Draw the curves of several runs, and print their scores and the figure's path."""
    parser = _Parser(usage="grpo-fast compare RUN RUN ... [--metric NAME] [--output FILE]")
    parser.add_argument("runs", nargs="+", help="run folders; runs that differ only in their seed form one curve")
    parser.add_argument("--metric", help="a reward, or a metric of metrics.jsonl (default: the score)")
    parser.add_argument("--output", default="compare.png", help="where to write the figure")
    arguments = parser.parse_args(argv)
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


PLAN_USAGE = """usage: grpo-fast plan [CONFIG] --vram SIZE [--longest] [--prompt_tokens 512] [--field value ...]

Estimate the memory of a run from the model's configuration alone: it needs no weights, no GPU and no data.
The exit status is 1 if the run does not fit.

  --vram SIZE          memory of the GPU: 24GiB, 80GB (default: that of this machine's GPU)
  --prompt_tokens N    length of the longest prompt (default: 512)
  --longest            search the switches that allow the longest answers, and write them as a recipe and a chart
  --output FILE.yaml   where --longest writes them (default: MODEL-SIZE.yaml and .png in the current folder)
  --gpu NAME           the device for which --longest estimates seconds (default: a usual one of that size)
  --model NAME         short for --model_name_or_path; also a config.json or its folder
  --field value        any field of the configuration, as for train"""


def plan(argv: Sequence[str]) -> int:
    """Print the memory that a run needs; returns 1 if it does not fit."""
    argv = ["--model_name_or_path" + a.removeprefix("--model") if re.match(r"--model(=|$)", a) else a for a in argv]
    options, argv = _options(argv, ("longest",), vram=None, prompt_tokens="512", output=None, gpu=None)
    prompt_tokens = _count("--prompt_tokens", options.prompt_tokens, "tokens")
    if not options.longest and (options.output or options.gpu):
        raise UserError("--output and --gpu belong to --longest")
    # A plan uses no data and no rewards, but the fields must not be empty.
    placeholders = ["--dataset_name=any", "--reward_funcs=[any]", "--reward_weights=null"]
    config, complete = parse_config([*argv, *placeholders]), False
    if options.longest:
        with suppress(UserError):
            config, complete = parse_config(argv), True
    with leaving_at_once():
        quiet_libraries()
        import torch

        from grpo_fast.memory.longest_report import print_longest
        from grpo_fast.memory.report import parse_size, print_plan

    if options.vram is not None:
        size = parse_size(options.vram)
    elif torch.cuda.is_available():
        size = torch.cuda.get_device_properties(0).total_memory
    else:
        raise UserError("this machine has no GPU whose memory could be read; set it with --vram 24GiB")
    if options.longest:
        model = Path(config.model_name_or_path).stem if Path(config.model_name_or_path).exists() else None
        name = model or config.model_name_or_path.rsplit("/", 1)[-1]
        output = user_path(options.output or f"{name}-{size / (1 << 30):.3g}GiB.yaml")
        return 0 if print_longest(config, size, prompt_tokens, output, options.gpu, not complete) else 1
    return 0 if print_plan(config, size, prompt_tokens) else 1


SERVE_USAGE = """usage: grpo-fast serve CONFIG [--field value ...] [-- VLLM OPTIONS]

Start a vLLM server with the settings that the run needs, at vllm_server_base_url, or at vllm_server_host and
vllm_server_port. The run sends the weights. Ctrl-C stops the server. At any address other than loopback, server and run
both need the same secret in the environment variable VLLM_API_KEY.

  --field value        any field of the configuration, as for train
  -- VLLM OPTIONS      further options of vLLM's server, as in: -- --tensor-parallel-size 2"""


def serve(argv: Sequence[str]) -> int:
    """Replace this process by vLLM's server."""
    own = _own(list(argv))
    config = parse_config(own, unused=["reward_funcs"])
    with leaving_at_once():
        quiet_libraries()
        from grpo_fast.rollout.vllm.serve import serve as start

    start(config, list(argv[len(own) + 1 :]))
    return 0


EVAL_USAGE = """usage: grpo-fast eval [CONFIG] [--model_name_or_path RUN/checkpoint-N] [--field value ...]

Measure a model on the held-out prompts of a configuration: the mean of every reward function and pass@k, with 95%
intervals. A checkpoint may hold only an adapter; without CONFIG, its run's config.yaml is used.

  --greedy             one completion per prompt, of the likeliest tokens
  --num_generations_eval N
                       sampled completions of each prompt; --temperature, --top_p and so on as for train
  --k 1,4,8            pass@k for these (default: 1 and the number of completions)
  --threshold 1.0      a completion with at least this reward is correct
  --batch_size 32      prompts that are sampled and written at once
  --output FOLDER      where samples.jsonl and summary.json go (default: runs/eval-NAME-TIME)
  --split train        the training prompts instead; samples.jsonl is then data for: grpo-fast sft ... --min_reward 1,
                       and train --pass_rates FOLDER chooses among them by these samples
  --resume             continue an interrupted evaluation in that folder
  --compare FOLDER     another evaluation of the same prompts: also estimate the difference from it
  --thinking_budgets 0,256,1024
                       evaluate at each of these thinking budgets, and draw the scores over them"""


def evaluate(argv: Sequence[str]) -> int:
    """Write an evaluation's folder and print its metrics."""
    defaults = {"k": None, "threshold": "1", "batch_size": "32", "output": None, "compare": None, "split": "test"}
    options, argv = _options(argv, ("greedy", "resume"), thinking_budgets=None, **defaults)
    k = _numbers("--k", options.k, "from 1 on, as in 1,4,8")
    budgets = _numbers("--thinking_budgets", options.thinking_budgets, "from 0 on, as in 0,256,1024")
    batch_size = _count("--batch_size", options.batch_size, "prompts")
    if options.split not in ("test", "train"):
        raise UserError(f"--split={shown(options.split)} is not allowed: it must be test or train")
    try:
        threshold = float(options.threshold)
    except ValueError:
        threshold = math.nan
    if not math.isfinite(threshold):
        raise UserError(f"--threshold={options.threshold!r} is not allowed: it must be a finite number")
    model = _options(argv, model_name_or_path=None)[0].model_name_or_path
    if model and not (argv and not argv[0].startswith("-")):
        own = user_path(model).parent / "config.yaml"
        argv = [str(own), *argv] if own.is_file() else argv
    config = parse_config(argv)
    with leaving_at_once():
        quiet_libraries()
        import_extra("accelerate", "train")
        from grpo_fast.distributed.processes import launched
        from grpo_fast.evaluation.budgets import BudgetCurve
        from grpo_fast.evaluation.run import EvalOptions, EvalRun

    if launched() > 1:
        raise UserError(f"grpo-fast eval runs in one process, but {launched()} were started")
    folder, other = (user_path(path) if path else None for path in (options.output, options.compare))
    chosen = EvalOptions(
        options.greedy, k, threshold, batch_size, folder, options.resume, other, budgets, options.split
    )
    (BudgetCurve if budgets else EvalRun)(config, chosen).run()
    return 0


def recipes(argv: Sequence[str]) -> int:
    """List the configurations that ship with the package."""
    if argv and not {"--help", "-h"} & set(argv):
        raise UserError(f"grpo-fast recipes takes no arguments, not {' '.join(argv)!r}")
    say(f"grpo-fast train, plan, serve and eval take these names in place of a file:\n\n{describe_recipes()}")
    return 0


DOCTOR_USAGE = """usage: grpo-fast doctor [--head H,V --tokens N [--device h100|h200]]

Which kernels run on this machine, and whether their results are correct; or the predicted time of a head on a GPU."""


def doctor(argv: Sequence[str]) -> int:
    """Check the kernels on this machine, or predict the time of a head; returns 1 if a result is wrong."""
    from grpo_kernels.doctor import main as check

    return check(argv)


# Commands whose output may break off without ending them; another pipe that breaks in them is an error.
LASTING = ("train", "sft", "distill", "eval")
USAGES = {
    "convert": CONVERT_USAGE,
    "plan": PLAN_USAGE,
    "serve": SERVE_USAGE,
    "eval": EVAL_USAGE,
    "doctor": DOCTOR_USAGE,
}
COMMANDS = {
    "train": train,
    "sft": sft,
    "distill": distill,
    "convert": convert,
    "recipes": recipes,
    "plan": plan,
    "serve": serve,
    "eval": evaluate,
    "report": report,
    "compare": compare,
    "doctor": doctor,
}

if __name__ == "__main__":
    sys.exit(main())
