"""What both vLLM backends share: sampling parameters, seeds, and the engine's options."""

from __future__ import annotations

import json
import os
import reprlib
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import torch
from torch import nn

from grpo_fast.config import GRPOConfig
from grpo_fast.errors import UserError, nearest
from grpo_fast.rollout.base import Response, Sampling
from grpo_fast.rollout.vllm.guard import server_key
from grpo_fast.rollout.vllm.json_client import JsonClient
from grpo_fast.rollout.vllm.kv_plan import KVPlan, kv_bytes_per_token, plan_kv_cache
from grpo_fast.rollout.vllm.worker import WORKER_EXTENSION

# generation_kwargs that vLLM has, by its names for them.
FILTERS = {"repetition_penalty": "repetition_penalty", "min_new_tokens": "min_tokens"}
# Tokens that vLLM allocates together: its block, or a multiple of it.
BLOCK = {"cpu": 128, "cuda": 16}
# Bytes that training keeps for each trained parameter while vLLM samples: its gradient and Adam's two moments.
TRAINING_BYTES = 12
# Share of the free memory that is never planned for: activations while sampling, fragmentation.
RESERVE = 0.1


def sampling_arguments(sampling: Sampling, eos_token_ids: Iterable[int]) -> dict[str, Any]:
    """vLLM's SamplingParams, but for the seed. Log-probabilities are asked for, of the sampled token alone.

    vLLM's own end-of-text token is ignored and ours are stop tokens, so that both backends end at the same ones, and
    the token is part of the completion.

    Raises:
        UserError: `generation_kwargs` names something that vLLM does not have.
    """
    for name in sampling.generation_kwargs:
        if name not in FILTERS:
            raise UserError(
                f"generation_kwargs: {name!r} is not allowed with vLLM{nearest(name, FILTERS)}; "
                f"there are {', '.join(FILTERS)}, and fields of their own for temperature, top_p, top_k and min_p"
            )
    filters = {FILTERS[name]: value for name, value in sampling.generation_kwargs.items()}
    shortest, longest = filters.get("min_tokens", 0), sampling.max_completion_length
    if not isinstance(shortest, int) or not 0 <= shortest <= longest:
        raise UserError(
            f"generation_kwargs: min_new_tokens={shortest!r} is not allowed: it must be from 0 to {longest}"
        )
    penalty = filters.get("repetition_penalty", 1.0)
    if not isinstance(penalty, int | float) or not penalty > 0:
        raise UserError(f"generation_kwargs: repetition_penalty={penalty!r} is not allowed: it must be above 0")
    if sampling.temperature > 0:
        filters |= {"top_p": sampling.top_p, "top_k": sampling.top_k, "min_p": sampling.min_p or 0.0}
    return {
        "n": sampling.num_generations,
        "max_tokens": longest,
        "temperature": sampling.temperature,
        "ignore_eos": True,
        "stop_token_ids": sorted(eos_token_ids),
        "logprobs": 0,
        "detokenize": False,
        **filters,
    }


def prompt_seeds(sampling: Sampling, prompts: int) -> list[int]:
    """A seed for each prompt; vLLM adds a completion's place among those of its prompt.

    They follow from `sampling.seed`, or from one number of torch's default generator, so that a resumed run draws them
    again.
    """
    seed = sampling.seed
    if seed is None:
        seed = int(torch.randint(2**62, ()))
    return torch.randint(2**62, (prompts,), generator=torch.Generator().manual_seed(seed)).tolist()


def response(
    token_ids: Sequence[Any], logprobs: Sequence[Any], finish_reason: Any, vocab_size: int, longest: int
) -> Response:
    """A completion as vLLM gives it, checked.

    Args:
        token_ids: its tokens.
        logprobs: their log-probabilities.
        finish_reason: how it ended.
        vocab_size: token ids are below.
        longest: the most tokens that were asked for.

    Raises:
        UserError: it is not a completion.
    """
    if not 0 < len(token_ids) == len(logprobs) <= longest or finish_reason not in ("stop", "length"):
        raise UserError(
            f"vLLM gave {len(token_ids)} tokens with {len(logprobs)} log-probabilities where at most {longest} were "
            f"asked for, and ended by {reprlib.repr(finish_reason)}, which is no completion"
        )
    for token in token_ids:
        if type(token) is not int or not 0 <= token < vocab_size:
            raise UserError(f"vLLM gave the token id {reprlib.repr(token)}; it must be from 0 to {vocab_size - 1}")
    for logprob in logprobs:
        # Rounding may take a probability a little above 1.
        if type(logprob) not in (int, float) or not -sys.float_info.max <= logprob < 1e-3:
            raise UserError(f"vLLM gave the log-probability {reprlib.repr(logprob)}; it must be finite and at most 0")
    return Response(list(token_ids), finish_reason, [float(logprob) for logprob in logprobs])


def model_length(config: GRPOConfig, longest_prompt: int) -> int:
    """Tokens of the longest sequence.

    Raises:
        UserError: `vllm_max_model_length` is shorter than what the data need.
    """
    needed = longest_prompt + config.max_completion_length
    length = config.vllm_max_model_length or needed
    if length < needed:
        raise UserError(
            f"vllm_max_model_length={length} is not allowed: it must be at least {needed}, the longest prompt "
            f"({longest_prompt} tokens) and max_completion_length={config.max_completion_length}"
        )
    return length


def plan(config: GRPOConfig, model_config: Any, dtype: torch.dtype, device: str, length: int, available: int) -> KVPlan:
    """Keys and values of a generation batch, or of as much of it as `max_tokens_per_generation_batch` lets be sampled
    at once and `available` bytes hold; the rest waits its turn."""
    sequences = max(1, min(config.generation_batch_size, config.max_tokens_per_generation_batch // length))
    return plan_kv_cache(kv_bytes_per_token(model_config, dtype), length, sequences, available, BLOCK[device])


def server_address(config: GRPOConfig) -> str:
    """Where the run looks for its server, and where ``grpo-fast serve`` starts it."""
    return config.vllm_server_base_url or f"http://{config.vllm_server_host}:{config.vllm_server_port}"


def server_client(config: GRPOConfig) -> JsonClient:
    """Requests to the run's server.

    Raises:
        UserError: its address is none, or it needs a key and there is none.
    """
    address = server_address(config)
    client = JsonClient(address)
    client.key = server_key(urlsplit(address).hostname)
    return client


def free_memory(device: str) -> int:
    """Bytes that are free on the GPU, or on the machine."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    return psutil.virtual_memory().available


def save_config(model: nn.Module, folder: Path) -> None:
    """Write the ``config.json`` that vLLM builds the model from, without what it need not know of 4-bit weights."""
    plain = {key: value for key, value in model.config.to_dict().items() if key != "quantization_config"}
    plain["architectures"] = [type(model).__name__]
    (folder / "config.json").write_text(json.dumps(plain), encoding="utf-8")


def quiet_vllm(level: str) -> None:
    """No reports to vLLM's makers, and no log below `level`, unless the environment says otherwise."""
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", level)


def engine_options(config: GRPOConfig, dtype: torch.dtype, device: str, length: int, kv: KVPlan) -> dict[str, Any]:
    """Arguments of vLLM's engine, in process and as a server, by their Python names."""
    return {
        "dtype": str(dtype).removeprefix("torch."),
        # The first sync brings the weights.
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
        "max_model_len": length,
        "max_num_seqs": kv.sequences,
        "logprobs_mode": "processed_logprobs",
        "worker_extension_cls": WORKER_EXTENSION,
        "trust_remote_code": config.trust_remote_code,
        # Compilation for a CPU needs a compiler and takes longer than it saves.
        "enforce_eager": device == "cpu",
    }
