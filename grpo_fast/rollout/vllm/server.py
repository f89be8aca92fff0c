"""Sampling from a vLLM server that `grpo-fast serve CONFIG.yaml` started; weights are passed in a shared folder."""

from __future__ import annotations

import itertools
import reprlib
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from grpo_fast.config import GRPOConfig
from grpo_fast.errors import UserError, one_line, printable, say
from grpo_fast.rollout.base import Response, Rollout, Sampling, eos_token_ids
from grpo_fast.rollout.stops import stop_texts
from grpo_fast.rollout.vllm.adapters import (
    adapted_layers,
    largest_rank,
    lora_options,
    merge_reason,
    warn_merged,
    write_adapter,
)
from grpo_fast.rollout.vllm.common import (
    NO_MASK,
    model_length,
    needs_tokenizer,
    prompt_seeds,
    response,
    sampling_arguments,
    server_client,
)
from grpo_fast.rollout.vllm.guard import KEY_VARIABLE
from grpo_fast.rollout.vllm.json_client import KeyRefused, ServerError
from grpo_fast.rollout.vllm.weights import engine_weights
from grpo_fast.rollout.vllm.wire import RunFolder, changes, in_files, write_tensors
from grpo_fast.rollout.vllm.worker import WORKER_EXTENSION, has_room

START = "start one with: grpo-fast serve CONFIG.yaml"
# Seconds for the server to read new weights.
LOAD_TIMEOUT = 1800.0
# Seconds in which at least one pending prompt must be answered: a constant, and an amount for each token.
PATIENCE, PATIENCE_PER_TOKEN = 3600.0, 1.0
# Most bytes of an answer: a constant, and an amount for each token with its log-probability (vLLM 0.32: about 150).
ANSWER_BYTES, TOKEN_BYTES = 1 << 20, 1 << 10
# Of each id that the filters kept.
ID_BYTES = 9
# Parts of the server's error if it cannot read the weights, and what to do.
UNREADABLE = {
    "no weights in": "it must share this machine's temporary folder; set TMPDIR to a folder that both can read",
    "Permission denied": "only the user who runs this process can read it; start the server as the same user",
    "damaged": "its files are not what this process wrote; check the disk that both share",
}


class VLLMServer(Rollout):
    """A vLLM server in another process, on this machine or on one that shares its temporary folder (TMPDIR).

    Each prompt is one request with its own seed, repeated if the connection is lost. Every answer names the version of
    the weights that it was sampled from, so a server that was restarted or serves another run is detected.

    After the first sync, LoRA adapters are sent alone, each version under its own name. Of 16-bit weights, only the
    values that changed are sent, if both processes have room for a copy of the weights in main memory.

    The arguments are those of `build_rollout`.

    Raises:
        UserError: no server answers in time, or its options do not suit this run.
    """

    copies_weights = True
    separate = True

    def __init__(self, config: GRPOConfig, model: nn.Module, tokenizer: Any, longest_prompt: int):
        self.client = server_client(config)
        self.eos_token_ids, self.tokenizer = eos_token_ids(model, tokenizer), tokenizer
        self.vocab_size = model.get_input_embeddings().weight.shape[0]
        self.run = secrets.token_hex(8)
        self.syncs = 0
        self.version: str | None = None
        self._wait(config.vllm_server_timeout)
        length = model_length(config, longest_prompt)
        lora = self._check_options(length, needs_tokenizer(config), config.truncated_support)
        reason = self._merge_reason(model, lora) if adapted_layers(model) else None
        self.adapters = bool(adapted_layers(model)) and reason is None
        self.warning = warn_merged(reason) if reason else ""
        self.folder: RunFolder | None = None
        # The folder of the adapter that the server has, and whether it has the weights that this adapter adapts.
        self.adapter_folder: Path | None = None
        self.has_base = False
        # What the server has of the weights, and the checksum of the folder that brought it there.
        weight = model.get_input_embeddings().weight
        size = sum(parameter.numel() for parameter in model.parameters()) * weight.element_size()
        self.sends_changes = weight.element_size() == 2 and not self.adapters and has_room(size)
        self.sent: dict[str, Tensor] = {}
        self.sent_checksum = ""

    def check(self, prompt_ids: list[int], sampling: Sampling) -> None:
        sampling_arguments(sampling, self.eos_token_ids)
        super().check(prompt_ids, sampling)

    def generate(self, prompt_ids: list[list[int]], sampling: Sampling) -> list[Response]:
        """`num_generations` consecutive responses for every prompt, in the order of the prompts.

        Raises:
            UserError: the server no longer answers, its answer is invalid, or it has other weights than this run's.
        """
        arguments, longest = sampling_arguments(sampling, self.eos_token_ids), sampling.max_completion_length
        token_bytes = TOKEN_BYTES
        if sampling.keeps_support:
            token_bytes += ID_BYTES * min(arguments["top_k"], self.vocab_size)
        bodies = [
            {"token_ids": ids, "sampling_params": {**arguments, "seed": seed}, **self._model()}
            for ids, seed in zip(prompt_ids, prompt_seeds(sampling, len(prompt_ids)), strict=True)
        ]
        try:
            answers = self.client.post_all(
                "/inference/v1/generate",
                bodies,
                PATIENCE + PATIENCE_PER_TOKEN * longest,
                [ANSWER_BYTES + token_bytes * (len(ids) + sampling.num_generations * longest) for ids in prompt_ids],
            )
        except ServerError as error:
            if self._model() and str(error).startswith("status 404"):
                raise self._other_weights() from None
            raise self._gone(error) from None
        return [completion for answer in answers for completion in self._completions(answer, sampling)]

    def sync(self, model: nn.Module) -> None:
        """Write the weights of `model`, or its adapters, to the run's folder, and have the server read them.

        Only the owner of this process can read the files, which are removed when they have been read (an adapter's,
        when the next one has). With several processes, only the first one calls this, with whole weights.

        Raises:
            UserError: the folder cannot be written, or the server cannot read it or does not answer.
        """
        if self.folder is None:
            self.folder = RunFolder()
        version = f"{self.run}:{self.syncs + 1}"
        if not self.has_base:
            self._send_weights(model, self.folder)
            self.has_base = self.adapters
        if self.adapters:
            self._send_adapter(model, self.folder, version)
        self.syncs += 1
        self.version = version
        self._post("/update_weight_version", {"new_version": version})

    def close(self) -> None:
        """End all pending requests and remove the run's files; the server keeps running, for the next run."""
        self.client.hang_up()
        self._unload()
        if self.folder is not None:
            self.folder.remove()

    def _send_weights(self, model: nn.Module, made: RunFolder) -> None:
        """Send all weights without adapters, or merged with them: if possible only the values that changed."""
        folder = made.new()
        tensors = engine_weights(model, merged=not self.adapters)
        if self.sends_changes:
            tensors = changes(tensors, self.sent)
        files = ((f"weights-{number:05d}.safetensors", each) for number, each in enumerate(in_files(tensors)))
        checksum = write_tensors(files, folder)
        answers = self._load(folder, "load_folder", checksum, self.sent_checksum, "keep" if self.sends_changes else "")
        self.sent_checksum = checksum
        if not all(isinstance(answer, dict) and answer.get("kept") for answer in answers):
            # It has no copy, because it has no room for one, or was restarted.
            self.sent.clear()
            self.sent_checksum = ""
            if any(isinstance(answer, dict) and answer.get("lacking") for answer in answers):
                self._send_weights(model, made)
                return
            self.sends_changes = False
        self._repack_head()
        self._reset_prefix_cache()

    def _send_adapter(self, model: nn.Module, made: RunFolder, version: str) -> None:
        """Send the adapters, and have the server forget those of the last version."""
        folder = made.new()
        checksum = write_adapter(model, folder)
        self._load(folder, "check_folder", checksum, remove=False)
        # A repeated request finds the adapter loaded, which is an error unless it may be loaded again.
        body = {"lora_name": version, "lora_path": str(folder), "load_inplace": True}
        try:
            self.client.request("POST", "/v1/load_lora_adapter", body, timeout=LOAD_TIMEOUT, parse=str)
        except ServerError as error:
            raise self._gone(error) from None
        self._unload()
        self.adapter_folder = folder

    def _unload(self) -> None:
        """Have the server forget the last version of the adapters, and remove its files."""
        folder, self.adapter_folder = self.adapter_folder, None
        if folder is None:
            return
        # A server that no longer answers has none.
        with suppress(ServerError):
            body = {"lora_name": self.version}
            self.client.request("POST", "/v1/unload_lora_adapter", body, timeout=10.0, retries=(), parse=str)
        shutil.rmtree(folder, ignore_errors=True)

    def _load(self, folder: Path, method: str, *arguments: str, remove: bool = True) -> list[Any]:
        """What the server's workers answer to `method`, which reads `folder`."""
        try:
            call = _call(method, str(folder), *arguments)
            answer = self.client.request("POST", "/collective_rpc", call, timeout=LOAD_TIMEOUT)
        except ServerError as error:
            for sign, advice in UNREADABLE.items():
                if sign in str(error):
                    raise self._error(f"cannot read {folder}: {advice}") from None
            raise self._gone(error) from None
        finally:
            if remove:
                shutil.rmtree(folder, ignore_errors=True)
        results = answer.get("results") if isinstance(answer, dict) else None
        return results if isinstance(results, list) else []

    def _model(self) -> dict[str, str]:
        """The field of a request that names the version of the adapters."""
        return {"model": self.version} if self.adapters and self.version is not None else {}

    def _merge_reason(self, model: nn.Module, lora: Any) -> str | None:
        """Why this server cannot take the adapters of `model` alone, with its options `lora` for adapters."""
        if reason := merge_reason(model):
            return reason
        if not isinstance(lora, dict):
            return "the server was started without --enable-lora"
        known, rank = lora.get("max_lora_rank"), largest_rank(model)
        if not isinstance(known, int) or known < rank:
            return f"the rank {rank} is above the server's --max-lora-rank {reprlib.repr(known)}"
        targets = lora.get("target_modules")
        missing = set(lora_options(model)["lora_target_modules"]) - set(targets or ())
        if isinstance(targets, list) and missing:
            return f"the server's --lora-target-modules lack {', '.join(sorted(missing))}"
        return None

    def _repack_head(self) -> None:
        """Update the packed copy of a tied head; see `WorkerExtension.repack_head`."""
        self._post("/collective_rpc", _call("repack_head"))

    def _reset_prefix_cache(self) -> None:
        """Discard keys and values that were computed with the old weights."""
        for _ in range(10):
            answer = self._post("/reset_prefix_cache", {})
            if isinstance(answer, dict) and answer.get("success") is True:
                return
            # A request that has just ended may still hold blocks.
            time.sleep(0.2)
        raise self._error("keeps its prefix cache; is another run using it?")

    def _post(self, path: str, body: Any) -> Any:
        try:
            return self.client.request("POST", path, body)
        except ServerError as error:
            raise self._gone(error) from None

    def _completions(self, answer: Any, sampling: Sampling) -> Iterator[Response]:
        longest, stops = sampling.max_completion_length, stop_texts(self.tokenizer, sampling)
        try:
            choices = sorted(answer["choices"], key=lambda choice: choice["index"])
            if [choice["index"] for choice in choices] != list(range(sampling.num_generations)):
                raise ValueError(f"{len(choices)} completions instead of {sampling.num_generations}, or wrong numbers")
            for choice in choices:
                ids = choice["token_ids"]
                content = choice["logprobs"]["content"]
                if [each["token_id"] for each in content] != ids:
                    raise ValueError("log-probabilities of different tokens")
                self._check_version({span["version"] for span in choice["weight_versions"]}, answer.get("model"))
                logprobs = [each["logprob"] for each in content]
                reason = choice["finish_reason"]
                kept = choice["sampling_mask"] if sampling.keeps_support else None
                if sampling.keeps_support and kept is None:
                    raise self._error(f"does not return the ids that its filters kept; {NO_MASK}")
                yield response(ids, logprobs, reason, self.vocab_size, longest, self.eos_token_ids, stops, kept)
        except UserError:
            raise
        except (TypeError, KeyError, ValueError, AttributeError, RecursionError) as error:
            reason = f"{type(error).__name__}: {one_line(error, 80)}"
            raise self._error(f"did not answer with completions ({reason})") from None

    def _check_version(self, found: set[str], model: Any) -> None:
        if self.version is not None and (found != {self.version} or (self.adapters and model != self.version)):
            raise self._other_weights()

    def _other_weights(self) -> UserError:
        return self._error(
            "sampled from other weights than this run's: it was restarted, or another run uses it; continue this run "
            "with --resume"
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

    def _check_options(self, length: int, needs_tokenizer: bool, keeps_support: bool = False) -> Any:
        """Check that the server can update its weights over HTTP and returns log-probabilities after the filters.

        Returns:
            Its options for adapters: a dict, or None if it takes none.
        """
        try:
            options = self.client.request("GET", "/server_info?config_format=json")["vllm_config"]
            model = options["model_config"]
            found = {
                "--worker-extension-cls": options["parallel_config"]["worker_extension_cls"],
                "--logprobs-mode": model["logprobs_mode"],
            }
            masks = model.get("return_sampling_mask")
            longest, bare = int(model["max_model_len"]), needs_tokenizer and bool(model["skip_tokenizer_init"])
        except KeyRefused as error:
            raise self._gone(error) from None
        except (ServerError, TypeError, KeyError, ValueError, OverflowError) as error:
            raise UserError(
                f"the server at {self.client.base_url} does not report its options ({one_line(error)}): it is not a "
                f"vLLM server, or was started without VLLM_SERVER_DEV_MODE=1; {START}"
            ) from None
        wanted = {"--worker-extension-cls": WORKER_EXTENSION, "--logprobs-mode": "processed_logprobs"}
        for option, value in wanted.items():
            if found[option] != value:
                raise self._error(f"was started with {option} {_text(found[option])}, but needs {value}; {START}")
        if keeps_support and masks is None:
            raise self._error(f"cannot return the ids that its filters keep; {NO_MASK}")
        if keeps_support and masks is not True:
            raise self._error(f"was started without --return-sampling-mask, but truncated_support needs it; {START}")
        if bare:
            raise self._error(f"was started without the tokenizer that generation_kwargs: stop needs; {START}")
        if longest < length:
            raise self._error(f"accepts {longest} tokens, but the longest prompt and completion have {length}; {START}")
        return options.get("lora_config")

    def _gone(self, error: Exception) -> UserError:
        if isinstance(error, KeyRefused):
            sent = f"the key in {KEY_VARIABLE}" if self.client.key else f"requests without {KEY_VARIABLE}"
            return self._error(f"refuses {sent}: set {KEY_VARIABLE} to the value with which the server was started")
        return self._error(
            f"no longer answers ({one_line(error, 160)}); restart it and continue this run with --resume"
        )

    def _error(self, text: str) -> UserError:
        return UserError(f"the vLLM server at {self.client.base_url} {text}")


def _call(method: str, *arguments: str) -> dict[str, Any]:
    return {"method": method, "args": list(arguments)}


def _text(option: Any) -> str:
    return printable(option[:80]) or "(none)" if isinstance(option, str) else reprlib.repr(option)
