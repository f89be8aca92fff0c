"""``grpo-fast eval``: sample completions of the held-out prompts, write them as they are made, and estimate scores."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from grpo_fast.config import GRPOConfig
from grpo_fast.data import Row, encode_prompts, encode_rows, load_rows
from grpo_fast.distributed.rng import own_generators
from grpo_fast.errors import UserError, one_line, say
from grpo_fast.evaluation.estimates import estimate, score_estimates, scores
from grpo_fast.evaluation.progress import EvalProgress
from grpo_fast.files import LinesFile, json_ready, parse_json, replace_text
from grpo_fast.model.loading import check_vocabulary, load_trained, max_positions
from grpo_fast.model.policy import FusedPolicy
from grpo_fast.report import write_config, write_json
from grpo_fast.report.progress import command
from grpo_fast.report.run import read_lines
from grpo_fast.report.terminal import lasting_output
from grpo_fast.rewards import RewardModel
from grpo_fast.rollout import Sampling, build_rollout, check_engine
from grpo_fast.rollout.probe import Probe, tolerance
from grpo_fast.train.checkpoint import STATE_FILE, checkpoints, fingerprint, verify_model
from grpo_fast.train.groups import sample_and_score
from grpo_fast.train.run_folder import claim, claim_new, release
from grpo_fast.train.trust import remember_own
from grpo_kernels import Support

# The fields that decide, with the data, which prompts a run holds out.
_DATA_FIELDS = ("dataset_name", "dataset_config", "dataset_kwargs", "dataset_train_split", "dataset_test_split")
_DATA_FIELDS += ("eval_dataset_name", "prompt_template", "prompt_file", "system_prompt", "apply_chat_template")
_DATA_FIELDS += ("chat_template_kwargs",)

SAMPLES, SETTINGS, SUMMARY = "samples.jsonl", "settings.json", "summary.json"


@dataclass(frozen=True)
class EvalOptions:
    """The options of an evaluation, in addition to the run's configuration.

    Args:
        greedy: one completion for each prompt, of the most likely tokens, instead of `num_generations_eval` samples.
        k: the values of k for pass@k, at most the number of completions; empty for 1 and that number.
        threshold: the reward from which a completion counts as correct.
        batch_size: number of prompts that are sampled and written at once.
        output: the folder to write (default: runs/eval-NAME-TIME).
        resume: continue an interrupted evaluation in that folder.
        compare: the folder of another evaluation of the same prompts, to estimate the difference of the means.
        thinking_budgets: thinking budgets at which to evaluate (`evaluation.budgets`); empty for the configuration's.
        split: ``"test"`` for the held-out prompts, or ``"train"`` for those of training, for instance to learn from
            the right completions or for their pass rates (`data.pass_rates`).
    """

    greedy: bool = False
    k: tuple[int, ...] = ()
    threshold: float = 1.0
    batch_size: int = 32
    output: Path | None = None
    resume: bool = False
    compare: Path | None = None
    thinking_budgets: tuple[int, ...] = ()
    split: str = "test"

    @property
    def prompts(self) -> str:
        """What the prompts of the evaluation are called."""
        return "training" if self.split == "train" else "held-out"


class EvalRun:
    """Evaluates the model of `config` on its held-out prompts.

    Raises:
        UserError: the options, the configuration, the data or the model cannot be used.
    """

    def __init__(self, config: GRPOConfig, options: EvalOptions):
        self.config, self.options = config, options
        self.folder: Path | None = None
        # What continues an interrupted evaluation: this one, or the curve that it is part of.
        self.whole = self
        try:
            self.prepare()
        except BaseException:
            if self.folder is not None:
                release(self.folder)
            raise

    def prepare(self) -> None:
        """Load and check everything that the evaluation needs."""
        config, options = self.config, self.options
        self.sampling = Sampling.from_config(config, config.num_generations_eval)
        if options.greedy:
            self.sampling = replace(self.sampling, num_generations=1, temperature=0.0)
        count = self.sampling.num_generations
        self.ks = sorted(set(options.k or (1, count)))
        for k in self.ks:
            if not 1 <= k <= count:
                made = "--greedy" if options.greedy else f"num_generations_eval={count}"
                raise UserError(f"--k: {k} is not allowed: it must be from 1 to {count}, the completions of {made}")
        self.folder = choose_folder(config, options)
        check_engine(config)
        self.rewards = RewardModel(
            config.reward_funcs,
            config.reward_weights,
            config.reward_timeout,
            config.on_reward_error,
            config.code_isolation,
        )
        self.metric = self.rewards.names[self.rewards.index(config.eval_metric)]
        train, held_out = load_rows(replace(config, max_eval_samples=None))
        self.rows = train if options.split == "train" else held_out[: config.max_eval_samples]
        self.rewards.check_rows(self.rows, f"{options.prompts} data")
        device = Accelerator(cpu=config.use_cpu).device
        torch.manual_seed(config.seed)
        verify_model(Path(config.model_name_or_path))
        model, self.tokenizer = load_trained(config)
        # Nothing is trained, so prompts need not fit a microbatch.
        endless, positions = replace(config, max_tokens_per_microbatch=2**62), max_positions(model.config)
        self.rows, self.prompts = encode_rows(self.rows, self.tokenizer, endless, positions, options.prompts, warn)
        if options.split == "test":
            check_split(config, held_out, self.tokenizer)
        check_vocabulary(model, self.prompts, self.tokenizer)
        if not config.load_in_4bit:
            model.to(device)
        self.rollout = build_rollout(config, model, self.tokenizer, max(map(len, self.prompts)))
        self.rollout.sync(model)
        if self.rollout.copies_weights:
            self.probe(model)
        self.rollout.check(self.prompts[0], self.sampling)
        self.settings = {
            "model": config.model_name_or_path,
            "dataset": config.dataset_name,
            "prompts": fingerprint(self.prompts),
            "reward_funcs": config.reward_funcs,
            "seed": config.seed,
            "batch_size": options.batch_size,
            **asdict(self.sampling),
        }
        self.resume(options.resume)
        self.others = read_scores(options.compare, self.settings["prompts"]) if options.compare else {}

    def resume(self, resumes: bool) -> None:
        """Continue the evaluation in the folder, which must have the same settings; or begin a new one there."""
        self.resumes = resumes
        if resumes:
            check_settings(self.folder, self.settings)

    def probe(self, model: nn.Module) -> None:
        """Check that the engine has the weights of `model`; see `rollout.probe`."""
        config, policy = self.config, FusedPolicy(model, self.config.temperature)
        longest = max(map(len, self.prompts)) + config.max_completion_length
        probe = Probe(self.prompts[0], longest, config.temperature, tolerance(config, model.dtype))

        @torch.no_grad()
        def score(prompt_ids: list[int], completion_ids: list[int], support: Support | None) -> Tensor:
            ids = torch.tensor([[*prompt_ids, *completion_ids]], device=model.device)
            return policy(ids, logits_to_keep=len(completion_ids), support=support)[0]

        probe.check(self.rollout, score)

    def run(self) -> dict[str, Any]:
        """Sample, score and write the completions that are missing, and return the summary."""
        try:
            with lasting_output():
                return self.measure()
        finally:
            release(self.folder)

    def measure(self) -> dict[str, Any]:
        """Run the evaluation in its folder, to which no other process writes."""
        claim(self.folder, "--output")
        if not self.resumes:
            refuse_other_evaluation(self.folder)
        write_config(self.folder / "config.yaml", self.config)
        remember_own(self.folder, self.config)
        write_json(self.folder / SETTINGS, self.settings)
        start = time.perf_counter()
        lines = self.keep_whole_batches()
        count, temperature = self.sampling.num_generations, self.sampling.temperature
        how = "1 greedy completion" if self.options.greedy else f"{count} completions at temperature {temperature:g}"
        title = f"{self.config.model_name_or_path} on {len(self.prompts)} {self.options.prompts} prompts, {how} each"
        if (budget := self.sampling.thinking_budget) is not None:
            title += f", thinking budget {budget}"
        progress = EvalProgress(title, len(self.prompts), self.metric, self.folder, self.options.prompts)
        for note in self.rewards.notes:
            progress.console.print(note, soft_wrap=True)
        with progress, LinesFile(self.folder / SAMPLES, append=True) as file:
            if self.rollout.warning:
                progress.warn(self.rollout.warning)
            try:
                progress.update(lines)
                while len(lines) < len(self.prompts) * count:
                    for line in self.sample(len(lines) // count):
                        lines.append(line)
                        file.write(line)
                    progress.update(lines)
            except KeyboardInterrupt:
                progress.stopped(self.resume_command())
                raise
        found = {
            **self.settings,
            "threshold": self.options.threshold,
            "compared_with": str(self.options.compare) if self.options.compare else None,
            "num_prompts": len(self.prompts),
            **self.summarize(lines),
            "seconds": round(time.perf_counter() - start, 2),
        }
        summary = json_ready(found)
        write_json(self.folder / SUMMARY, summary)
        progress.finished(summary)
        return summary

    def sample(self, first: int) -> Iterator[dict[str, Any]]:
        """One line of ``samples.jsonl`` for every completion of the batch that begins with prompt `first`.

        Each batch has its own random generators, so that a resumed evaluation samples the same as an uninterrupted one.
        """
        batch = slice(first, first + self.options.batch_size)
        rows, prompts = self.rows[batch], self.prompts[batch]
        with own_generators((self.config.seed + first) % 2**63):
            responses, texts, scored = sample_and_score(
                self.rollout, self.rewards, self.tokenizer, rows, prompts, self.sampling
            )
        for index, (response, text) in enumerate(zip(responses, texts, strict=True)):
            place = index // self.sampling.num_generations
            values = [None if value != value else value for value in scored.each[index].tolist()]
            closed = {} if response.mask is None else {"thinking_closed": not all(response.mask)}
            yield {
                "index": first + place,
                "prompt": rows[place]["prompt"],
                "completion": text,
                "rewards": dict(zip(self.rewards.names, values, strict=True)),
                "reward": None if (total := scored.total[index].item()) != total else total,
                "finish_reason": response.finish_reason,
                "length": len(response.token_ids),
                **closed,
            }

    def resume_command(self) -> str:
        """The command that continues this evaluation."""
        options, folder = self.options, self.whole.folder
        words = ["eval", str(folder / "config.yaml"), "--output", str(folder), "--resume"]
        words += ["--greedy"] * options.greedy
        for name in ("k", "thinking_budgets"):
            words += [f"--{name}", ",".join(map(str, getattr(options, name)))] if getattr(options, name) else []
        for name in ("threshold", "batch_size", "compare", "split"):
            if (value := getattr(options, name)) != getattr(EvalOptions, name):
                words += [f"--{name}", str(value)]
        return f"{command()} {shlex.join(words)}"

    def keep_whole_batches(self) -> list[dict[str, Any]]:
        """The lines of an interrupted evaluation, without the last batch if it is incomplete."""
        path = self.folder / SAMPLES
        if not path.exists():
            return []
        texts, lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1], []
        with suppress(ValueError):
            for text in texts:
                lines.append(parse_json(text))
        count = self.sampling.num_generations
        if len(lines) < len(self.prompts) * count:
            whole = self.options.batch_size * count
            lines = lines[: len(lines) // whole * whole]
        replace_text(path, "".join(text + "\n" for text in texts[: len(lines)]))
        return lines

    def summarize(self, lines: list[dict[str, Any]]) -> dict[str, Any]:
        """The estimates of every reward function, and the lengths of the completions."""
        metrics, seed = {}, self.config.seed
        for name, values in scores(lines, len(self.prompts)).items():
            found = score_estimates(values, self.ks, self.options.threshold, seed)
            if name in self.others:
                # Paired by prompt, so that the difficulty of each prompt cancels out.
                found["difference"] = estimate(values.nanmean(1) - self.others[name].nanmean(1), seed, shares=False)
            metrics[name] = {label: one._asdict() for label, one in found.items()}
        closed = [line["thinking_closed"] for line in lines if "thinking_closed" in line]
        return {
            "metrics": metrics,
            "mean_length": sum(line["length"] for line in lines) / len(lines),
            "clipped_ratio": sum(line["finish_reason"] == "length" for line in lines) / len(lines),
            **({"thinking_closed_ratio": sum(closed) / len(lines)} if closed else {}),
        }


def warn(text: str) -> None:
    say(f"warning: {text}", file=sys.stderr)


def check_split(config: GRPOConfig, held_out: list[Row], tokenizer: Any) -> None:
    """Warn if a checkpoint is evaluated on its own run's data, but not on the rows that the run held out.

    The data may have changed since the run, or an earlier release, whose split depended on the seed, made the split.
    """
    path = Path(config.model_name_or_path) / STATE_FILE
    if not path.is_file() or config.eval_dataset_name is not None:
        return
    run = json.loads(path.read_text(encoding="utf-8")).get("fixed", {})
    if any(getattr(config, name) != run.get(name) for name in _DATA_FIELDS) or config.long_prompts == "drop":
        return
    theirs = fingerprint(encode_prompts(held_out[: run["max_eval_samples"]], tokenizer, config))
    if theirs != run["held-out data"]:
        warn(
            f"the held-out prompts of {config.dataset_name} are not those of the run that made "
            f"{config.model_name_or_path}: {theirs}, not {run['held-out data']}; it may have trained on some of them"
        )


def read_scores(folder: Path, prompts: str) -> dict[str, Tensor]:
    """The scores of a finished evaluation; `prompts` is the fingerprint of the prompts that it must have.

    Raises:
        UserError: the folder holds no finished evaluation, or one of other prompts.
    """
    if not (folder / SUMMARY).is_file() or not (folder / SAMPLES).is_file():
        raise UserError(f"--compare={str(folder)!r} holds no finished evaluation")
    try:
        summary = parse_json((folder / SUMMARY).read_text(encoding="utf-8"))
        if summary["prompts"] != prompts:
            raise UserError(f"--compare={str(folder)!r} is of {summary['prompts']}, not of {prompts}")
        damaged: list[str] = []
        lines = read_lines(folder / SAMPLES, damaged)
        if damaged:
            raise ValueError(damaged[0])
        return scores(lines, summary["num_prompts"])
    except (ValueError, KeyError, TypeError, IndexError, RuntimeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"--compare={str(folder)!r} is damaged: {one_line(error)}") from None


def choose_folder(config: GRPOConfig, options: EvalOptions) -> Path:
    """The folder to write, claimed for this process.

    Raises:
        UserError: another process uses it, or it holds anything but an evaluation to resume.
    """
    if options.output is None:
        if options.resume:
            raise UserError("--resume needs the evaluation's folder: --output FOLDER")
        return claim_new(f"eval-{config.run_name or config.dataset_name.replace('/', '-')}")
    folder = options.output
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output={str(folder)!r} is not a folder")
    if (folder / "metrics.jsonl").exists() or checkpoints(folder):
        raise UserError(f"--output={str(folder)!r} holds a training run; choose another folder")
    if options.resume and not (folder / SETTINGS).exists():
        raise UserError(f"--resume: {folder} holds no evaluation")
    if not options.resume:
        # Before the claim, which creates a file there; `EvalRun.measure` checks again after it.
        refuse_other_evaluation(folder)
    claim(folder, "--output")
    return folder


def refuse_other_evaluation(folder: Path) -> None:
    """Refuse to write a new evaluation to the folder of another one.

    Raises:
        UserError: `folder` holds an evaluation.
    """
    if (folder / SAMPLES).exists() or any(folder.glob("budget-*")):
        raise UserError(f"--output={str(folder)!r} already holds an evaluation; choose another, or --resume it")


def check_settings(folder: Path, now: dict[str, Any]) -> None:
    """Check that a resumed evaluation has the settings with which it was started.

    Raises:
        UserError: a value differs, or the settings file cannot be read.
    """
    path = folder / SETTINGS
    try:
        saved = parse_json(path.read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(f"--resume: {path} is damaged; start the evaluation again in another folder") from None
    for name, value in json.loads(json.dumps(now)).items():
        if saved.get(name) != value:
            raise UserError(f"--resume: {name}={value!r} differs from {saved.get(name)!r}, the value in {folder}")
