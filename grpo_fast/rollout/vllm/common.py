"""Shared by both vLLM engines: sampling parameters, seeds, checks of completions, and the engine's options."""

from __future__ import annotations

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

# The generation_kwargs that vLLM supports besides ``stop``, and its names for them.
FILTERS = {"repetition_penalty": "repetition_penalty", "min_new_tokens": "min_tokens"}
NO_BUDGET = "thinking_budget is not possible with use_vllm, because vLLM does not say which tokens it forced"
# Bytes that training keeps for each trained parameter while vLLM samples: the gradient and Adam's two moments.
TRAINING_BYTES = 12
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
) -> Response:
    """Check a completion from vLLM: token ids below `vocab_size`, finite log-probabilities, at most `longest` tokens.

    With `stops`, tokens that vLLM sampled after a stop text are left out.

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
    if stops is None:
        return Response(ids, finish_reason, values)
    count, past = ending(ids, eos_token_ids, stops) or (None, None)
    if count is None and finish_reason == "stop":
        # vLLM's text may begin with a space that a completion alone does not have.
        past = 0
    return Response(ids[:count], "stop" if count else finish_reason, values[:count], past)


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
        "trust_remote_code": config.trust_remote_code,
        # Compilation for a CPU needs a compiler and takes longer than it saves.
        "enforce_eager": device == "cpu",
    }
