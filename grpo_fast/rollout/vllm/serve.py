"""``grpo-fast serve CONFIG.yaml``: start a vLLM server for the run of that configuration."""

from __future__ import annotations

import dataclasses
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import nn

from grpo_fast.config import GRPOConfig
from grpo_fast.data import encode_rows, load_rows
from grpo_fast.errors import UserError, require_extra, say
from grpo_fast.model.loading import adapter_fields, base_config, load_model, max_positions, train_adapter
from grpo_fast.rollout.vllm import adapters, common
from grpo_fast.rollout.vllm.guard import KEY_VARIABLE, MIDDLEWARE
from grpo_fast.rollout.vllm.kv_plan import plan_engine_cache

# vLLM's options that decide who can reach the server, and what sets them here.
SET_ELSEWHERE = {"host": "vllm_server_host", "api-key": f"{KEY_VARIABLE} in the environment"}


def server_command(config: GRPOConfig, folder: Path, more: Sequence[str] = ()) -> list[str]:
    """The command that starts vLLM's OpenAI-compatible server for `config`, after writing ``config.json`` to `folder`.

    The server starts with random weights and gets the run's at the first sync. On a GPU, which nothing else should use,
    vLLM takes `vllm_gpu_memory_utilization` or its default share of the memory; on a CPU, what the run needs.

    Args:
        more: further vLLM options, such as ``--tensor-parallel-size 2``; they come last, so they take precedence.

    Raises:
        UserError: vLLM is not installed, or the model or the data cannot be used.
    """
    require_extra("vllm", "vllm")
    common.check_mask(config)
    device = "cuda" if torch.cuda.is_available() and not config.use_cpu else "cpu"
    train, held_out = load_rows(config)
    model, tokenizer = load_model(dataclasses.replace(adapter_fields(config), load_in_4bit=False, use_peft=False))
    prompts = []
    for rows, kind in ((train, "training"), (held_out, "held-out")):
        prompts += encode_rows(rows, tokenizer, config, max_positions(model.config), kind, print)[1]
    length = common.model_length(config, max(map(len, prompts)))
    dtype = model.get_input_embeddings().weight.dtype
    weights = sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize
    available = common.usable_memory(device) - weights
    kv = plan_engine_cache(config, model.config, dtype, device, length, available)
    common.save_config(model, folder)
    options = common.engine_options(config, dtype, device, length, kv)
    if config.use_peft:
        options |= _adapter_options(config, model)
    common.save_tokenizer(tokenizer, folder, options)
    if device == "cpu":
        options["kv_cache_memory_bytes"] = kv.bytes
    elif config.vllm_gpu_memory_utilization is not None:
        options["gpu_memory_utilization"] = config.vllm_gpu_memory_utilization
    model_path = base_config(config).model_name_or_path if config.trust_remote_code else str(folder)
    host, port = listening_at(config)
    address = ["--host", host, "--port", str(port)]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model_path, *address]
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        if value is True:
            command.append(flag)
        elif isinstance(value, list):
            command += [flag, *value]
        elif value is not False:
            command += [flag, str(value)]
    # --enable-scale-out adds the endpoint that takes and returns token ids.
    return [*command, "--enable-scale-out", "--disable-uvicorn-access-log", "--middleware", MIDDLEWARE, *more]


def _adapter_options(config: GRPOConfig, model: nn.Module) -> dict[str, Any]:
    """The options with which vLLM takes the run's adapters alone; none if it cannot, and the run will say why.

    The adapters are put into `model`.
    """
    train_adapter(model, config)
    if adapters.merge_reason(model) or not common.supports_adapters(type(model).__name__):
        return {}
    return adapters.lora_options(model)


def server_environment(config: GRPOConfig) -> dict[str, str]:
    """Environment variables of the server; its "development mode" allows weight updates over HTTP."""
    common.quiet_vllm("WARNING")
    environment = {
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_HOST_IP": "127.0.0.1",
    }
    if config.use_cpu or not torch.cuda.is_available():
        environment |= {"TORCHDYNAMO_DISABLE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    return {**environment, **os.environ}


def check_options(more: Sequence[str]) -> None:
    """Refuse vLLM options that could expose the server, or show its key in the list of processes.

    Raises:
        UserError: it says what to set instead.
    """
    for option in more:
        name = option.split("=")[0].removeprefix("--").replace("_", "-")
        # vLLM also accepts abbreviated option names.
        for known, instead in SET_ELSEWHERE.items():
            if option.startswith("--") and len(name) > 1 and known.startswith(name):
                raise UserError(f"{option.split('=')[0]} is not allowed here: set {instead} instead")


def listening_at(config: GRPOConfig) -> tuple[str, int]:
    """The server's host and port.

    Raises:
        UserError: the address is invalid, or others can reach it and no key is set.
    """
    parts = urlsplit(common.server_client(config).base_url)
    return parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)


def serve(config: GRPOConfig, more: Sequence[str] = ()) -> None:
    """Replace this process by the server, which runs until Ctrl-C.

    Raises:
        UserError: the address is in use, does not belong to this machine, or needs a key; or as `server_command`.
    """
    require_extra("vllm", "vllm")
    check_options(more)
    host, port = listening_at(config)
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        address = common.server_address(config)
        raise UserError(f"cannot start a server at {address}: {error.strerror or error}") from None
    folder = Path(tempfile.mkdtemp(prefix="grpo-fast-serve-"))
    try:
        command = server_command(config, folder, more)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    say(f"starting vLLM at {common.server_address(config)}")
    os.execve(command[0], command, server_environment(config))
