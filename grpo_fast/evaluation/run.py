"""``grpo-fast eval``: a model's completions of the held-out prompts, written as they come, and what they say."""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from grpo_fast.config import GRPOConfig
from grpo_fast.data import Row, encode_prompts, encode_rows, load_rows
from grpo_fast.distributed.rng import own_generators
from grpo_fast.errors import UserError, one_line, say
from grpo_fast.evaluation.estimates import Estimate, estimate, pass_at_k
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

# What decides which prompts a run holds out, besides the data.
_DATA_FIELDS = ("dataset_name", "dataset_config", "dataset_kwargs", "dataset_train_split", "dataset_test_split")
_DATA_FIELDS += ("eval_dataset_name", "prompt_template", "prompt_file", "system_prompt", "apply_chat_template")
_DATA_FIELDS += ("chat_template_kwargs",)

SAMPLES, SETTINGS, SUMMARY = "samples.jsonl", "settings.json", "summary.json"


@dataclass(frozen=True)
class EvalOptions:
    """What an evaluation has beside the run's configuration.

    Args:
        greedy: one completion a prompt, of the likeliest tokens, instead of `num_generations_eval` sampled ones.
        k: pass@k is estimated for each of these; at most the number of completions. Empty for 1 and that number.
        threshold: a completion counts as right from this reward on.
        batch_size: prompts that are sampled and written at once.
        output: the folder to write (default: runs/eval-NAME-TIME).
        resume: go on with an interrupted evaluation in that folder.
        compare: the folder of another evaluation of the same prompts; the means' difference is estimated, too.
    """

    greedy: bool = False
    k: tuple[int, ...] = ()
    threshold: float = 1.0
    batch_size: int = 32
    output: Path | None = None
    resume: bool = False
    compare: Path | None = None


class EvalRun:
    """Evaluates the model of `config` on its held-out prompts.

    Raises:
        UserError: anything about the options, the configuration, the data or the model that would fail later.
    """

    def __init__(self, config: GRPOConfig, options: EvalOptions):
        self.config, self.options = config, options
        self.folder: Path | None = None
        try:
            self.prepare()
        except BaseException:
            if self.folder is not None:
                release(self.folder)
            raise

    def prepare(self) -> None:
        """Load and check everything."""
        config, options = self.config, self.options
        self.sampling = Sampling.from_config(config, config.num_generations_eval)
        if options.greedy:
            self.sampling = dataclasses.replace(self.sampling, num_generations=1, temperature=0.0)
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
        _, held_out = load_rows(dataclasses.replace(config, max_eval_samples=None))
        self.rows = held_out[: config.max_eval_samples]
        self.rewards.check_rows(self.rows, "held-out data")
        device = Accelerator(cpu=config.use_cpu).device
        torch.manual_seed(config.seed)
        verify_model(Path(config.model_name_or_path))
        model, self.tokenizer = load_trained(config)
        # Nothing is trained, so no microbatch has to hold a prompt.
        endless = dataclasses.replace(config, max_tokens_per_microbatch=2**62)
        self.rows, self.prompts = encode_rows(
            self.rows, self.tokenizer, endless, max_positions(model.config), "held-out", warn
        )
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
            **dataclasses.asdict(self.sampling),
        }
        if options.resume:
            check_settings(self.folder, self.settings)
        self.others = read_scores(options.compare, self.settings["prompts"]) if options.compare else {}

    def probe(self, model: nn.Module) -> None:
        """Prove that the engine has the weights of `model`; see `rollout.probe`."""
        config, policy = self.config, FusedPolicy(model, self.config.temperature)
        longest = max(map(len, self.prompts)) + config.max_completion_length
        probe = Probe(self.prompts[0], longest, config.temperature, tolerance(config, model.dtype))

        @torch.no_grad()
        def score(prompt_ids: list[int], completion_ids: list[int]) -> Tensor:
            ids = torch.tensor([[*prompt_ids, *completion_ids]], device=model.device)
            return policy(ids, logits_to_keep=len(completion_ids))[0]

        probe.check(self.rollout, score)

    def run(self) -> dict[str, Any]:
        """Sample, score and write what is not yet there, and return the summary."""
        try:
            with lasting_output():
                return self.measure()
        finally:
            release(self.folder)

    def measure(self) -> dict[str, Any]:
        """The evaluation in its folder, which no other process writes to."""
        claim(self.folder, "--output")
        if not self.options.resume:
            refuse_other_evaluation(self.folder)
        write_config(self.folder / "config.yaml", self.config)
        remember_own(self.folder, self.config)
        write_json(self.folder / SETTINGS, self.settings)
        start = time.perf_counter()
        lines = self.keep_whole_batches()
        count, temperature = self.sampling.num_generations, self.sampling.temperature
        how = "1 greedy completion" if self.options.greedy else f"{count} completions at temperature {temperature:g}"
        title = f"{self.config.model_name_or_path} on {len(self.prompts)} held-out prompts, {how} each"
        progress = EvalProgress(title, len(self.prompts), self.metric, self.folder)
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
        summary = {
            **self.settings,
            "threshold": self.options.threshold,
            "compared_with": str(self.options.compare) if self.options.compare else None,
            "num_prompts": len(self.prompts),
            **self.summarize(lines),
            "seconds": round(time.perf_counter() - start, 2),
        }
        summary = json_ready(summary)
        write_json(self.folder / SUMMARY, summary)
        progress.finished(summary)
        return summary

    def sample(self, first: int) -> Iterator[dict[str, Any]]:
        """One line of ``samples.jsonl`` for every completion of the batch that begins with prompt `first`.

        Each batch has generators of its own, so that a resumed evaluation samples what a whole one does.
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
            yield {
                "index": first + place,
                "prompt": rows[place]["prompt"],
                "completion": text,
                "rewards": dict(zip(self.rewards.names, values, strict=True)),
                "finish_reason": response.finish_reason,
                "length": len(response.token_ids),
            }

    def resume_command(self) -> str:
        """What goes on with this evaluation."""
        words = ["eval", str(self.folder / "config.yaml"), "--output", str(self.folder), "--resume"]
        words += ["--greedy"] * self.options.greedy
        for name in ("threshold", "batch_size"):
            value = getattr(self.options, name)
            if value != getattr(EvalOptions, name):
                words += [f"--{name}", str(value)]
        if self.options.k:
            words += ["--k", ",".join(map(str, self.options.k))]
        if self.options.compare:
            words += ["--compare", str(self.options.compare)]
        return f"{command()} {shlex.join(words)}"

    def keep_whole_batches(self) -> list[dict[str, Any]]:
        """The lines of an interrupted evaluation, but for a batch that was not written to its end."""
        path = self.folder / SAMPLES
        if not path.exists():
            return []
        texts, lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1], []
        for text in texts:
            try:
                lines.append(parse_json(text))
            except ValueError:
                break
        count = self.sampling.num_generations
        if len(lines) < len(self.prompts) * count:
            whole = self.options.batch_size * count
            lines = lines[: len(lines) // whole * whole]
        replace_text(path, "".join(text + "\n" for text in texts[: len(lines)]))
        return lines

    def summarize(self, lines: list[dict[str, Any]]) -> dict[str, Any]:
        """Estimates of every reward function, and the completions' lengths."""
        metrics, seed = {}, self.config.seed
        for name, values in scores(lines, len(self.prompts)).items():
            found = score_estimates(values, self.ks, self.options.threshold, seed)
            if name in self.others:
                # Prompt by prompt: how hard each one is cancels out.
                found["difference"] = estimate(values.nanmean(1) - self.others[name].nanmean(1), seed, shares=False)
            metrics[name] = {label: one._asdict() for label, one in found.items()}
        return {
            "metrics": metrics,
            "mean_length": sum(line["length"] for line in lines) / len(lines),
            "clipped_ratio": sum(line["finish_reason"] == "length" for line in lines) / len(lines),
        }


def warn(text: str) -> None:
    say(f"warning: {text}", file=sys.stderr)


def check_split(config: GRPOConfig, held_out: list[Row], tokenizer: Any) -> None:
    """Warn where a checkpoint is measured on its own run's data, but on other rows than that run held out.

    The data may have changed since, or an earlier release made the split, which followed from the seed.
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
            f"{config.model_name_or_path}: {theirs}, not {run['held-out data']}; it may have been trained on some"
        )


def scores(lines: list[dict[str, Any]], num_prompts: int) -> dict[str, Tensor]:
    """Every reward function's values ``[P, n]`` from the lines of ``samples.jsonl``; NaN where it abstained."""
    return {
        name: torch.tensor(
            [math.nan if line["rewards"][name] is None else line["rewards"][name] for line in lines],
            dtype=torch.float64,
        ).reshape(num_prompts, -1)
        for name in lines[0]["rewards"]
    }


def read_scores(folder: Path, prompts: str) -> dict[str, Tensor]:
    """The scores of a finished evaluation of `prompts`, which are given by their fingerprint.

    Raises:
        UserError: the folder holds none, or one of other prompts.
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


def score_estimates(values: Tensor, ks: list[int], threshold: float, seed: int) -> dict[str, Estimate]:
    """``mean@n`` and ``pass@k`` of one reward function's values ``[P, n]``, NaN where it abstained.

    A completion is right from `threshold` on. Prompts without values, or with fewer than k, are left out.
    """
    found = {f"mean@{values.shape[1]}": estimate(values.nanmean(1), seed)}
    correct, samples = (values >= threshold).sum(1), (~values.isnan()).sum(1)
    return found | {f"pass@{k}": estimate(pass_at_k(correct, samples, k), seed) for k in ks}


def choose_folder(config: GRPOConfig, options: EvalOptions) -> Path:
    """The folder to write, claimed for this process; it must not hold an evaluation but one to resume.

    Raises:
        UserError: another process has it, or it holds something else.
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
        # Before the claim, which would leave its file there.
        refuse_other_evaluation(folder)
    claim(folder, "--output")
    try:
        if not options.resume:
            refuse_other_evaluation(folder)
    except BaseException:
        release(folder)
        raise
    return folder


def refuse_other_evaluation(folder: Path) -> None:
    """A new evaluation never goes into the folder of another one.

    Raises:
        UserError: `folder` holds an evaluation.
    """
    if (folder / SAMPLES).exists():
        raise UserError(f"--output={str(folder)!r} already holds an evaluation; choose another, or --resume it")


def check_settings(folder: Path, now: dict[str, Any]) -> None:
    """What an evaluation that goes on has in common with what was written.

    Raises:
        UserError: a value differs, or the file of settings cannot be read.
    """
    path = folder / SETTINGS
    try:
        saved = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"--resume: {folder} holds no evaluation") from None
    except ValueError:
        raise UserError(f"--resume: {path} is damaged; start the evaluation again in another folder") from None
    for name, value in json.loads(json.dumps(now)).items():
        if saved.get(name) != value:
            raise UserError(f"--resume: {name}={value!r} is not that of {folder}, {saved.get(name)!r}")
