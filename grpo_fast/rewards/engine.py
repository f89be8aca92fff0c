"""Calls the configured reward functions, checks what they return, and adds up the rewards."""

from __future__ import annotations

import inspect
import math
import operator
import sys
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch

from grpo_fast.config import LARGEST_REWARD
from grpo_fast.errors import UserError, one_line, say
from grpo_fast.rewards.base import RewardFunction, settings_of, text_of
from grpo_fast.rewards.calls import (
    JUDGED_COLUMNS,
    OFFERED_COLUMNS,
    RESERVED_COLUMNS,
    Outcome,
    call,
    check_values,
    chosen,
    failed,
    unreachable,
)
from grpo_fast.rewards.registry import load_reward, metric_names
from grpo_fast.rewards.workers import WorkerPool, check_workers

# For each step of a completion, its end in characters and its reward.
Steps = list[tuple[int, float]]


class Rewards(NamedTuple):
    """Rewards of a batch, float64.

    `total` ``[B]`` is the weighted sum; NaN if every function returned None. `each` ``[B, F]`` has the functions' own
    values; NaN for None, and the mean for rewards of steps. `steps` has those rewards, for each completion by the
    function's index. `errors` ``[B, F]`` is true where a function failed, which counts as None.
    """

    total: torch.Tensor
    each: torch.Tensor
    steps: list[dict[int, Steps]]
    errors: torch.Tensor


class RewardModel:
    """The configured reward functions and their weights.

    All functions run concurrently. Those marked `isolated` score one sample at a time in worker processes, which are
    killed at the time limit. The others score the whole batch, each in its own thread. A thread cannot be killed: a
    function that hangs loses its batch after `timeout` seconds per sample, and is not called again until it returns.

    Args:
        names: see :func:`load_reward`.
        weights: one per function (default: 1 each).
        timeout: seconds per sample.
        on_error: what happens to a sample for which a function raises, takes too long or does not return a number.
            ``"none"``: no reward from that function, with a warning the first time; ``"raise"``: a UserError, which a
            function that fails for its whole first batch raises in any case.
        code_isolation: how generated code must be contained, see :func:`grpo_fast.rewards.sandbox.isolation.choose`.

    Raises:
        UserError: a function cannot be loaded, cannot work here, or is listed twice.
    """

    def __init__(
        self,
        names: list[str],
        weights: list[float] | None,
        timeout: float = 10.0,
        on_error: str = "none",
        code_isolation: str = "available",
    ):
        self.sources = names
        self.functions = [load_reward(name) for name in names]
        self.names = metric_names(self.functions, names)
        self.weights = torch.tensor(weights or [1.0] * len(names), dtype=torch.float64)
        self.timeout, self.on_error = timeout, on_error
        self.settings: dict[str, Any] = {"reward_timeout": timeout, "code_isolation": code_isolation}
        # Lines for the log about how generated code runs.
        self.notes: list[str] = []
        self.pool = WorkerPool()
        self.threads: dict[str, threading.Thread] = {}
        self.worked: set[str] = set()
        self.warned: set[str] = set()
        self.warn: Callable[[str], None] = lambda text: say(f"warning: {text}", file=sys.stderr)
        for name, function in zip(self.names, self.functions, strict=True):
            judge = getattr(function, "judge", None)
            if judge is not None and (judge not in self.names or judge == name):
                raise UserError(
                    f"reward_funcs: {name}({judge}) needs {judge!r} among the functions (a weight of 0 keeps it out of "
                    f"the sum); they are {', '.join(self.names)}"
                )
            if hasattr(function, "isolated"):
                check_workers(name)
            check = getattr(function, "check", None)
            if check is not None:
                found = dict(check(**settings_of(check, self.settings)) or {})
                self.notes += [found.pop("note")] if "note" in found else []
                self.settings |= found

    def index(self, metric: str | None) -> int:
        if metric is None:
            return len(self.names) - 1
        if metric not in self.names:
            raise UserError(f"eval_metric={metric!r} is not one of reward_funcs: {', '.join(self.names)}")
        return self.names.index(metric)

    def check_columns(self, columns: Iterable[str]) -> None:
        """Raise UserError if a function does not accept the columns; warn of columns that are not passed to it."""
        columns = list(columns)
        for name, function in zip(self.names, self.functions, strict=True):
            for column in unreachable(function) & set(columns):
                self._warn_once(
                    f"{name}, {column}",
                    f"the dataset's column {column!r} does not reach the reward function {name!r}, whose argument of "
                    "that name has another meaning; rename the column if the function should see it",
                )
            judged = JUDGED_COLUMNS if hasattr(function, "judge") else ()
            arguments = chosen(function, dict.fromkeys([*columns, *RESERVED_COLUMNS, *OFFERED_COLUMNS, *judged]))
            try:
                signature = inspect.signature(function)
            except ValueError:
                continue
            try:
                signature.bind(**arguments)
            except TypeError as error:
                raise UserError(
                    f"reward function {name!r}{signature} does not fit: {error}; "
                    f"it is called with {', '.join(arguments)}"
                ) from None

    def check_rows(self, rows: list[dict[str, Any]], source: str) -> None:
        """Check the columns of rows with prompts, and the values that the functions need.

        Raises:
            UserError: a signature does not fit; or a value is missing or wrong, with the `source` of the rows.
        """
        self.check_columns(name for name in rows[0] if name != "prompt")
        check_values(self.functions, rows)
        for name, function in zip(self.names, self.functions, strict=True):
            check = getattr(function, "check_row", None)
            for number, row in enumerate(rows, 1) if check else ():
                try:
                    check(row)
                except ValueError as error:
                    prompt = _shortened(row.get("prompt", ""))
                    raise UserError(f"{source}, row {number} (prompt {prompt}): {name}: {one_line(error)}") from None

    def __call__(
        self, prompts: list, completions: list, columns: dict[str, list[Any]], num_generations: int | None = None
    ) -> Rewards:
        """Score a batch.

        Args:
            prompts: B strings or lists of chat messages.
            completions: B strings or lists of chat messages.
            columns: B values for each name.
            num_generations: size of the groups, whose completions are adjacent. Functions with a judge need it, because
                different groups may have equal prompts.

        Raises:
            UserError: a function failed, and `on_error` is ``"raise"`` or it failed for all of its first batch.
        """
        arguments = {**columns, "prompts": prompts, "completions": completions}
        indices = range(len(self.names))
        judged = [index for index in indices if hasattr(self.functions[index], "judge")]
        if judged and num_generations is None:
            raise ValueError(f"{self.names[judged[0]]} compares completions of one group: num_generations is needed")
        outcomes = self._call_all([index for index in indices if index not in judged], arguments)
        texts = [text_of(completion) for completion in completions]
        read = {index: self._read(index, outcome, texts) for index, outcome in outcomes.items()}
        for index in judged:
            # One after the other: they are fast, and a judge has no judge itself.
            values = read[self.names.index(self.functions[index].judge)].values
            correct = [None if math.isnan(value := mean_reward(each)) else value >= 1 for each in values]
            groups = [sample // num_generations for sample in range(len(prompts))]
            outcome = self._call_all([index], {**arguments, "correct": correct, "groups": groups})[index]
            read[index] = self._read(index, outcome, texts)
        for index in indices:
            self._report(index, read[index].errors, prompts)
        samples, values = range(len(prompts)), [read[index].values for index in indices]
        each = torch.tensor(
            [[mean_reward(value) for value in row] for row in values], dtype=torch.float64
        ).T.contiguous()
        steps = [
            {index: values[index][sample] for index in indices if isinstance(values[index][sample], list)}
            for sample in samples
        ]
        errors = torch.tensor([[sample in read[index].errors for index in indices] for sample in samples])
        total = (each.nan_to_num(nan=0.0) * self.weights).sum(1)
        return Rewards(total.masked_fill(each.isnan().all(1), math.nan), each, steps, errors)

    def _call_all(self, indices: list[int], arguments: dict[str, list]) -> dict[int, Outcome]:
        size, started, outcomes = len(arguments["prompts"]), [], {}
        for index in indices:
            name, function = self.names[index], self.functions[index]
            taken = chosen(function, arguments)
            if name in self.threads and self.threads[name].is_alive():
                outcomes[index] = failed(size, "is still busy with an earlier batch")
                continue
            thread = threading.Thread(target=self._call, args=(index, function, taken, size, outcomes), daemon=True)
            thread.start()
            self.threads[name] = thread
            # The pool enforces the limit itself, from the moment a worker has started.
            limit = None if hasattr(function, "isolated") else time.monotonic() + self.timeout * size
            started.append((index, thread, limit))
        for index, thread, limit in started:
            thread.join(None if limit is None else max(limit - time.monotonic(), 0.0))
            if index not in outcomes:
                outcomes[index] = failed(size, f"took longer than {self.timeout:g} s for each of {size} samples")
            if isinstance(outcomes[index], KeyboardInterrupt):
                raise outcomes[index]
        return outcomes

    def _call(self, index: int, function: RewardFunction, arguments: dict, size: int, outcomes: dict) -> None:
        """The body of a thread; a result after the time limit is ignored."""
        try:
            if hasattr(function, "isolated"):
                source = self.sources[index]
                found = self.pool.run(source, arguments, size, self.timeout, function.over_limit, self.settings)
            else:
                found = call(function, arguments, size, self.timeout * size)
        except Exception as error:
            found = failed(size, f"could not be run in worker processes: {one_line(error)}")
        except KeyboardInterrupt as error:
            found = error
        outcomes.setdefault(index, found)

    def _read(self, index: int, outcome: Outcome, texts: list[str]) -> Outcome:
        """The values as floats (NaN for None) or lists of steps; any other value becomes an error."""
        values, errors = [], dict(outcome.errors)
        has_steps = any(isinstance(value, (list, tuple)) for value in outcome.values)
        for sample, (value, text) in enumerate(zip(outcome.values, texts, strict=True)):
            try:
                if has_steps:
                    values.append(read_steps(self.names[index], value, sample, text))
                else:
                    values.append(_number(value, sample))
            except UserError as error:
                values.append(math.nan)
                errors[sample] = str(error).removeprefix(f"reward function {self.names[index]!r}").lstrip(", ")
        return Outcome(values, errors)

    def _report(self, index: int, errors: dict[int, str], prompts: list) -> None:
        name = self.names[index]
        if len(errors) < len(prompts):
            self.worked.add(name)
        if not errors:
            return
        sample = min(errors)
        others = f" and for {len(errors) - 1} more of {len(prompts)} samples" * (len(errors) > 1)
        text = f"reward function {name!r} {errors[sample]} for the prompt {_shortened(prompts[sample])}{others}"
        if self.on_error == "raise" or name not in self.worked:
            raise UserError(text)
        self._warn_once(name, f"{text}; such samples get no reward from it, see rewards/{name}/errors")

    def _warn_once(self, subject: str, text: str) -> None:
        if subject not in self.warned:
            self.warned.add(subject)
            self.warn(text)


def _shortened(prompt: Any) -> str:
    return repr(one_line(text_of(prompt) or "(empty)", 80))


def _number(value: object, index: int) -> float:
    if value is None:
        return math.nan
    try:
        number = math.nan if isinstance(value, str) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not abs(number) <= LARGEST_REWARD:
        raise UserError(
            f"returned {value!r:.80} for completion {index}; it must be a number within +-{LARGEST_REWARD:.1e}, or None"
        )
    return number


def read_steps(name: str, value: object, index: int, text: str) -> Steps | float:
    """Check what function `name` returned for the steps of completion `index`, whose text is `text`; NaN for None.

    Raises:
        UserError: `value` is not a list of pairs, the ends do not rise within the text, or a reward is not finite.
    """
    if value is None:
        return math.nan
    place = f"reward function {name!r}, completion {index}"
    if not isinstance(value, (list, tuple)):
        raise UserError(f"{place}: {value!r:.80} beside lists of steps; every completion needs a list, or None")
    steps: Steps = []
    for pair in value:
        try:
            end, reward = pair
            end, reward = operator.index(end), float(reward)
        except (TypeError, ValueError, OverflowError):
            raise UserError(f"{place}: {pair!r:.80} must be a pair of a step's end and its reward") from None
        if not abs(reward) <= LARGEST_REWARD:
            raise UserError(f"{place}: the reward in {pair!r:.80} must be a number within +-{LARGEST_REWARD:.1e}")
        lowest = steps[-1][0] + 1 if steps else 1
        if not lowest <= end <= len(text):
            raise UserError(
                f"{place}: the end in {pair!r:.80} must be from {lowest} to {len(text)}, in the completion's characters"
            )
        steps.append((end, reward))
    return steps


def mean_reward(steps: Steps | float) -> float:
    """A completion's reward itself, or the mean over its steps; NaN without steps."""
    if not isinstance(steps, list):
        return steps
    return sum(reward for _, reward in steps) / len(steps) if steps else math.nan
