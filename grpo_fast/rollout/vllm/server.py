"""Sampling from a vLLM server, which `grpo-fast serve CONFIG.yaml` starts; weights go through a shared folder."""

from __future__ import annotations

import itertools
import reprlib
import secrets
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from grpo_fast.config import GRPOConfig
from grpo_fast.errors import UserError, one_line, printable, say
from grpo_fast.rollout.base import Response, Rollout, Sampling, eos_token_ids
from grpo_fast.rollout.vllm.common import model_length, prompt_seeds, response, sampling_arguments, server_client
from grpo_fast.rollout.vllm.guard import KEY_VARIABLE
from grpo_fast.rollout.vllm.json_client import KeyRefused, ServerError
from grpo_fast.rollout.vllm.weights import write_weights
from grpo_fast.rollout.vllm.worker import WORKER_EXTENSION

START = "start one with: grpo-fast serve CONFIG.yaml"
# Seconds that the server may take to read new weights.
LOAD_TIMEOUT = 1800.0
# Seconds in which at least one of the prompts under way must be answered: so many, and so many for each token.
PATIENCE, PATIENCE_PER_TOKEN = 3600.0, 1.0
# Bytes of an answer: so many, and so many for each token, with its log-probability. (vLLM 0.32 takes about 150.)
ANSWER_BYTES, TOKEN_BYTES = 1 << 20, 1 << 10


class VLLMServer(Rollout):
    """A vLLM server of its own process, on this machine or on one that shares its temporary folder (TMPDIR).

    Each prompt is one request with a seed of its own, repeated when the connection is lost. Every answer names the
    weights that it was sampled from, so a server that was started anew, or serves another run, is noticed.

    Args:
        config: the run.
        model: a transformers causal LM.
        tokenizer: its tokenizer.
        longest_prompt: tokens of the longest prompt that will be sampled from.

    Raises:
        UserError: no server answers in time, or it was started in a way that cannot serve this run.
    """

    copies_weights = True
    separate = True

    def __init__(self, config: GRPOConfig, model: nn.Module, tokenizer: Any, longest_prompt: int):
        self.client = server_client(config)
        self.eos_token_ids = eos_token_ids(model, tokenizer)
        self.vocab_size = model.get_input_embeddings().weight.shape[0]
        self.run = secrets.token_hex(8)
        self.syncs = 0
        self.version: str | None = None
        self._wait(config.vllm_server_timeout)
        self._check_options(model_length(config, longest_prompt))

    def check(self, prompt_ids: list[int], sampling: Sampling) -> None:
        """Sample one token, so that what cannot work fails before anything long begins.

        Raises:
            UserError: the sampling arguments are refused, or the engine does not answer.
        """
        sampling_arguments(sampling, self.eos_token_ids)
        self.generate([prompt_ids], sampling.one_token())

    def generate(self, prompt_ids: list[list[int]], sampling: Sampling) -> list[Response]:
        """Responses to every prompt, `num_generations` side by side, in the order of the prompts.

        Raises:
            UserError: the server does not answer any more, answers nonsense, or has other weights than this run's.
        """
        arguments, longest = sampling_arguments(sampling, self.eos_token_ids), sampling.max_completion_length
        bodies = [
            {"token_ids": ids, "sampling_params": {**arguments, "seed": seed}}
            for ids, seed in zip(prompt_ids, prompt_seeds(sampling, len(prompt_ids)), strict=True)
        ]
        try:
            answers = self.client.post_all(
                "/inference/v1/generate",
                bodies,
                PATIENCE + PATIENCE_PER_TOKEN * longest,
                [ANSWER_BYTES + TOKEN_BYTES * (len(ids) + sampling.num_generations * longest) for ids in prompt_ids],
            )
        except ServerError as error:
            raise self._gone(error) from None
        return [completion for answer in answers for completion in self._completions(answer, sampling)]

    def sync(self, model: nn.Module) -> None:
        """Sample from the weights of `model` (a transformers causal LM, or its PeftModel) from now on.

        They are written to a temporary folder, a file of about a GiB at a time, read by the server's workers, and
        removed. Of several processes the first one alone calls this, with whole weights.

        Raises:
            UserError: the folder cannot be written, or the server cannot read it or does not answer.
        """
        with tempfile.TemporaryDirectory(prefix="grpo-fast-weights-") as folder:
            write_weights(model, Path(folder))
            self._load(folder)
        self.syncs += 1
        self.version = f"{self.run}:{self.syncs}"
        self._post("/update_weight_version", {"new_version": self.version})

    def close(self) -> None:
        """End requests under way; the server goes on, for the next run."""
        self.client.hang_up()

    def _load(self, folder: str) -> None:
        try:
            self._rpc("load_folder", folder, timeout=LOAD_TIMEOUT)
        except ServerError as error:
            if "no weights in" in str(error):
                raise UserError(
                    f"the vLLM server at {self.client.base_url} cannot read {folder}: it must share this machine's "
                    "temporary folder; set TMPDIR to one that both see"
                ) from None
            raise self._gone(error) from None
        self._repack_head()
        self._reset_prefix_cache()

    def _repack_head(self) -> None:
        """A tied head keeps an old copy for CPU products after a reload; see `WorkerExtension.repack_head`."""
        try:
            self._rpc("repack_head")
        except ServerError as error:
            raise self._gone(error) from None

    def _reset_prefix_cache(self) -> None:
        """Keys and values of prompts that were seen before belong to the old weights."""
        for _ in range(10):
            answer = self._post("/reset_prefix_cache", {})
            if isinstance(answer, dict) and answer.get("success") is True:
                return
            # Blocks of a request that has just ended may still be held.
            time.sleep(0.2)
        raise UserError(f"the vLLM server at {self.client.base_url} keeps its prefix cache: is another run using it?")

    def _rpc(self, method: str, *arguments: str, timeout: float = 60.0) -> None:
        body = {"method": method, "args": list(arguments)}
        self.client.request("POST", "/collective_rpc", body, timeout=timeout)

    def _post(self, path: str, body: Any) -> Any:
        try:
            return self.client.request("POST", path, body)
        except ServerError as error:
            raise self._gone(error) from None

    def _completions(self, answer: Any, sampling: Sampling) -> Iterator[Response]:
        longest = sampling.max_completion_length
        try:
            choices = sorted(answer["choices"], key=lambda choice: choice["index"])
            if [choice["index"] for choice in choices] != list(range(sampling.num_generations)):
                raise ValueError(f"{len(choices)} completions instead of {sampling.num_generations}, by their numbers")
            for choice in choices:
                ids = choice["token_ids"]
                content = choice["logprobs"]["content"]
                if [each["token_id"] for each in content] != ids:
                    raise ValueError("log-probabilities of other tokens")
                self._check_version({span["version"] for span in choice["weight_versions"]})
                logprobs = [each["logprob"] for each in content]
                yield response(ids, logprobs, choice["finish_reason"], self.vocab_size, longest)
        except UserError:
            raise
        except (TypeError, KeyError, ValueError, AttributeError, RecursionError) as error:
            raise UserError(
                f"the vLLM server at {self.client.base_url} answered something else than completions "
                f"({type(error).__name__}: {one_line(error, 80)})"
            ) from None

    def _check_version(self, found: set[str]) -> None:
        if self.version is not None and found != {self.version}:
            raise UserError(
                f"the vLLM server at {self.client.base_url} sampled from other weights than this run's: it was started "
                "again, or another run uses it; --resume goes on with this one"
            )

    def _wait(self, timeout: float) -> None:
        end = time.monotonic() + timeout
        for attempt in itertools.count():
            try:
                self.client.request("GET", "/health", timeout=10.0, retries=())
                return
            except KeyRefused as error:
                raise self._gone(error) from None
            except ServerError as error:
                if time.monotonic() >= end:
                    raise UserError(
                        f"no vLLM server answers at {self.client.base_url} within vllm_server_timeout={timeout:g} s "
                        f"({error}); {START}"
                    ) from None
            if attempt == 0:
                say(f"waiting up to {timeout:g} s for a vLLM server at {self.client.base_url} ...")
            time.sleep(min(0.2 * 2**attempt, 2.0, max(0.0, end - time.monotonic())))

    def _check_options(self, length: int) -> None:
        """The server renews its weights over HTTP, has our worker extension, and gives filtered log-probabilities."""
        try:
            options = self.client.request("GET", "/server_info?config_format=json")["vllm_config"]
            model = options["model_config"]
            found = {
                "--worker-extension-cls": options["parallel_config"]["worker_extension_cls"],
                "--logprobs-mode": model["logprobs_mode"],
            }
            longest = int(model["max_model_len"])
        except KeyRefused as error:
            raise self._gone(error) from None
        except (ServerError, TypeError, KeyError, ValueError, OverflowError) as error:
            raise UserError(
                f"the server at {self.client.base_url} does not tell its options ({one_line(error)}): it is no vLLM "
                f"server, or was started without VLLM_SERVER_DEV_MODE=1; {START}"
            ) from None
        wanted = {"--worker-extension-cls": WORKER_EXTENSION, "--logprobs-mode": "processed_logprobs"}
        for option, value in wanted.items():
            if found[option] != value:
                raise UserError(
                    f"the vLLM server at {self.client.base_url} was started with {option} {_text(found[option])}, "
                    f"but needs {value}; {START}"
                )
        if longest < length:
            raise UserError(
                f"the vLLM server at {self.client.base_url} takes {longest} tokens, but the longest prompt and "
                f"completion have {length}; {START}"
            )

    def _gone(self, error: Exception) -> UserError:
        if isinstance(error, KeyRefused):
            sent = f"the key in {KEY_VARIABLE}" if self.client.key else f"requests without {KEY_VARIABLE}"
            return UserError(
                f"the vLLM server at {self.client.base_url} refuses {sent}: set {KEY_VARIABLE} to the value that the "
                "server was started with"
            )
        return UserError(
            f"the vLLM server at {self.client.base_url} no longer answers ({one_line(error, 160)}); "
            "start it again and --resume this run"
        )


def _text(option: Any) -> str:
    return printable(option[:80]) or "(none)" if isinstance(option, str) else reprlib.repr(option)
