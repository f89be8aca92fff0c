"""Shared by both vLLM engines: sampling parameters, seeds, checks of completions, and the engine's options."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import reprlib
import sys
from collections.abc import Container, Iterable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import torch
from torch import nn

from grpo_fast.config import GRPOConfig
from grpo_fast.errors import UserError
from grpo_fast.rollout.base import Response, Sampling
from grpo_fast.rollout.stops import StopTexts, ending
from grpo_fast.rollout.vllm.guard import server_key
from grpo_fast.rollout.vllm.json_client import JsonClient
from grpo_fast.rollout.vllm.kv_plan import KVPlan
from grpo_fast.rollout.vllm.worker import WORKER_EXTENSION
from grpo_kernels import Support

# The generation_kwargs that vLLM supports besides ``stop``, and its names for them.
FILTERS = {"repetition_penalty": "repetition_penalty", "min_new_tokens": "min_tokens"}
NO_BUDGET = "thinking_budget is not possible with use_vllm, because vLLM does not say which tokens it forced"
# Bytes that training keeps for each trained parameter while vLLM samples: the gradient and Adam's two moments.
TRAINING_BYTES = 12
# A top_k that vLLM cuts to the size of the vocabulary.
EVERY_TOKEN = 2**31 - 1
NO_MASK = (
    "truncated_support is not possible with this vLLM, which has no return_sampling_mask: install vLLM 0.32 or later, "
    "or set use_vllm=false"
)
NO_RUNNER = (
    "truncated_support is not possible with vLLM here: it returns the ids that its filters keep only with its model "
    "runner V2, which needs a GPU with Triton (VLLM_USE_V2_MODEL_RUNNER); sample with transformers (use_vllm=false), "
    "or leave out top_p, top_k and min_p"
)
# Share of the free memory that is left for activations while sampling and for fragmentation.
RESERVE = 0.1


def sampling_arguments(sampling: Sampling, eos_token_ids: Iterable[int]) -> dict[str, Any]:
    """The arguments of vLLM's SamplingParams without the seed, requesting log-probabilities of the sampled tokens only.

    vLLM's end-of-text token is ignored and `eos_token_ids` are stop tokens, so that all engines stop at the same tokens
    and include them in the completion.

    Raises:
        UserError: `generation_kwargs` are refused.
    """
    sampling.check_generation_kwargs((*FILTERS, "stop"), " with vLLM")
    if sampling.thinking_budget is not None:
        raise UserError(NO_BUDGET)
    filters = {FILTERS[name]: value for name, value in sampling.filters.items()}
    penalty = filters.get("repetition_penalty", 1.0)
    if not isinstance(penalty, int | float) or not penalty > 0:
        raise UserError(f"generation_kwargs: repetition_penalty={penalty!r} is not allowed: it must be above 0")
    if sampling.temperature > 0:
        filters |= {"top_p": sampling.top_p, "top_k": sampling.top_k, "min_p": sampling.min_p or 0.0}
        if sampling.keeps_support and not sampling.top_k:
            # vLLM returns the kept ids only with a top_k; this one keeps every token.
            filters["top_k"] = EVERY_TOKEN
    if texts := sampling.stop_texts:
        filters |= {"stop": list(texts), "include_stop_str_in_output": True, "skip_special_tokens": False}
    return {
        "n": sampling.num_generations,
        "max_tokens": sampling.max_completion_length,
        "temperature": sampling.temperature,
        "ignore_eos": True,
        "stop_token_ids": sorted(eos_token_ids),
        "logprobs": 0,
        "detokenize": bool(texts),
        **filters,
    }


def prompt_seeds(sampling: Sampling, prompts: int) -> list[int]:
    """A seed for each prompt; vLLM adds the index of each completion of the prompt.

    They are derived from `sampling.seed` or from one draw of torch's default generator, so a resumed run repeats them.
    """
    seed = sampling.seed
    if seed is None:
        seed = int(torch.randint(2**62, ()))
    return torch.randint(2**62, (prompts,), generator=torch.Generator().manual_seed(seed)).tolist()


def response(
    token_ids: Sequence[Any],
    logprobs: Sequence[Any],
    finish_reason: Any,
    vocab_size: int,
    longest: int,
    eos_token_ids: Container[int] = (),
    stops: StopTexts | None = None,
    kept: Sequence[Sequence[Any]] | None = None,
) -> Response:
    """Check a completion from vLLM: token ids below `vocab_size`, finite log-probabilities, at most `longest` tokens.

    With `stops`, tokens that vLLM sampled after a stop text are left out. `kept` are the ids that its filters kept for
    each token, if they were asked for.

    Raises:
        UserError: a value is out of range.
    """
    if not 0 < len(token_ids) == len(logprobs) <= longest or finish_reason not in ("stop", "length"):
        raise UserError(
            f"vLLM returned an invalid completion: {len(token_ids)} tokens (at most {longest} were requested), "
            f"{len(logprobs)} log-probabilities and the finish reason {reprlib.repr(finish_reason)}"
        )
    for token in token_ids:
        if type(token) is not int or not 0 <= token < vocab_size:
            raise UserError(f"vLLM returned the token id {reprlib.repr(token)}; it must be from 0 to {vocab_size - 1}")
    for logprob in logprobs:
        # Rounding can raise a probability slightly above 1.
        if type(logprob) not in (int, float) or not -sys.float_info.max <= logprob < 1e-3:
            raise UserError(
                f"vLLM returned the log-probability {reprlib.repr(logprob)}; it must be finite and at most 0"
            )
    ids, values = list(token_ids), [float(logprob) for logprob in logprobs]
    support = None if kept is None else checked_support(kept, ids, vocab_size)
    if stops is None:
        return Response(ids, finish_reason, values, support=support)
    count, past = ending(ids, eos_token_ids, stops) or (None, None)
    if count is None and finish_reason == "stop":
        # vLLM's text may begin with a space that a completion alone does not have.
        past = 0
    if count and support is not None:
        support = support.take(torch.arange(count))
    return Response(ids[:count], "stop" if count else finish_reason, values[:count], past, support=support)


def kept_ids(completion: Any) -> Sequence[Sequence[int]]:
    """The ids that vLLM's filters kept for each token of a completion.

    Raises:
        UserError: it did not return them.
    """
    mask = getattr(completion, "sampling_mask", None)
    if mask is None:
        raise UserError(NO_MASK)
    return mask.token_ids


def checked_support(kept: Sequence[Sequence[Any]], token_ids: list[int], vocab_size: int) -> Support:
    """The ids that vLLM kept for each token, each of which must be among its own.

    Raises:
        UserError: they are not, are listed twice, or are no ids below `vocab_size`.
    """
    if len(kept) != len(token_ids):
        raise UserError(f"vLLM returned the kept ids of {len(kept)} tokens for a completion of {len(token_ids)}")
    rows = []
    for token, ids in zip(token_ids, kept, strict=True):
        row = [int(id) for id in ids]
        if token not in row or len(set(row)) != len(row) or not 0 <= min(row) <= max(row) < vocab_size:
            raise UserError(f"vLLM returned the kept ids {reprlib.repr(row)} for a token whose id is {token}")
        rows.append(torch.tensor(row, dtype=torch.int32))
    return Support.of(rows)


def model_length(config: GRPOConfig, longest_prompt: int) -> int:
    """The length of the longest sequence, in tokens.

    Raises:
        UserError: `vllm_max_model_length` is too short for the data.
    """
    needed = longest_prompt + config.max_completion_length
    length = config.vllm_max_model_length or needed
    if length < needed:
        raise UserError(
            f"vllm_max_model_length={length} is not allowed: it must be at least {needed}, the longest prompt "
            f"({longest_prompt} tokens) and max_completion_length={config.max_completion_length}"
        )
    return length


def server_address(config: GRPOConfig) -> str:
    """The address at which ``grpo-fast serve`` starts the server and the run connects to it."""
    return config.vllm_server_base_url or f"http://{config.vllm_server_host}:{config.vllm_server_port}"


def server_client(config: GRPOConfig) -> JsonClient:
    """A client of the run's server.

    Raises:
        UserError: the address is invalid, or the server needs a key and none is set.
    """
    address = server_address(config)
    client = JsonClient(address)
    client.key = server_key(urlsplit(address).hostname)
    return client


def usable_memory(device: str) -> int:
    """Free bytes of the GPU or of the machine's memory, less RESERVE."""
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else psutil.virtual_memory().available
    return int((1 - RESERVE) * free)


def save_config(model: nn.Module, folder: Path) -> None:
    """Write the ``config.json`` from which vLLM builds the model, without 4-bit settings (vLLM gets 16-bit weights)."""
    plain = {key: value for key, value in model.config.to_dict().items() if key != "quantization_config"}
    plain["architectures"] = [type(model).__name__]
    (folder / "config.json").write_text(json.dumps(plain), encoding="utf-8")


def needs_tokenizer(config: GRPOConfig) -> bool:
    """Whether vLLM itself needs the tokenizer: to find stop texts."""
    return "stop" in (config.generation_kwargs or {})


def save_tokenizer(tokenizer: Any, folder: Path, options: dict[str, Any]) -> None:
    """Write the tokenizer to `folder`, and have the engine of these `options` use it, if it needs one."""
    if not options["skip_tokenizer_init"]:
        tokenizer.save_pretrained(folder)
        options["tokenizer"] = str(folder)


def check_mask(config: GRPOConfig) -> None:
    """Raise a UserError if the run needs the ids that the filters keep, and the installed vLLM cannot return them."""
    if config.truncated_support:
        arguments = importlib.import_module("vllm.engine.arg_utils").EngineArgs
        if "return_sampling_mask" not in {field.name for field in dataclasses.fields(arguments)}:
            raise UserError(NO_MASK)


def quiet_vllm(level: str) -> None:
    """Turn off vLLM's usage reports and its log below `level`, unless the environment sets them."""
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", level)


def supports_adapters(architecture: str) -> bool:
    """Whether vLLM supports LoRA adapters of an architecture; True if it does not know it, which it reports itself."""
    from vllm.model_executor.models import ModelRegistry, supports_lora

    known = ModelRegistry.models.get(architecture)
    return known is None or supports_lora(known.load_model_cls())


def engine_options(config: GRPOConfig, dtype: torch.dtype, device: str, length: int, kv: KVPlan) -> dict[str, Any]:
    """Arguments of vLLM's engine, in process and as a server, under their Python names."""
    return {
        "dtype": str(dtype).removeprefix("torch."),
        # The first sync loads the weights.
        "load_format": "dummy",
        "skip_tokenizer_init": not needs_tokenizer(config),
        "generation_config": "vllm",
        "max_model_len": length,
        "max_num_seqs": kv.sequences,
        "logprobs_mode": "processed_logprobs",
        "worker_extension_cls": WORKER_EXTENSION,
        **({"return_sampling_mask": True} if config.truncated_support else {}),
        "trust_remote_code": config.trust_remote_code,
        # Compilation for a CPU needs a compiler and takes longer than it saves.
        "enforce_eager": device == "cpu",
    }
