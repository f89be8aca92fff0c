"""``grpo-fast serve CONFIG.yaml``: a vLLM server for the run of that configuration."""

from __future__ import annotations

import dataclasses
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

import torch

from grpo_fast.config import GRPOConfig
from grpo_fast.data import encode_rows, load_rows
from grpo_fast.errors import UserError, require_extra, say
from grpo_fast.model.loading import adapter_fields, base_config, load_model, max_positions
from grpo_fast.rollout.vllm.common import (
    RESERVE,
    engine_options,
    free_memory,
    model_length,
    plan,
    quiet_vllm,
    save_config,
    server_address,
    server_client,
)
from grpo_fast.rollout.vllm.guard import KEY_VARIABLE, MIDDLEWARE

# Options of vLLM's that decide who reaches the server, and what sets them here.
SET_ELSEWHERE = {"host": "vllm_server_host", "api-key": f"{KEY_VARIABLE} in the environment"}


def server_command(config: GRPOConfig, folder: Path, more: Sequence[str] = ()) -> list[str]:
    """The command that starts vLLM's OpenAI-compatible server for `config`, whose ``config.json`` goes to `folder`.

    The server starts with random weights and gets the run's at its first sync. On a GPU, which is the server's alone,
    vLLM takes its usual share of the memory, or `vllm_gpu_memory_utilization`; on a CPU, what the run needs.

    Args:
        more: further options of vLLM's, such as ``--tensor-parallel-size 2``; they come last and so win.

    Raises:
        UserError: vLLM is not installed, or something of the model or the data is wrong.
    """
    require_extra("vllm", "vllm")
    device = "cuda" if torch.cuda.is_available() and not config.use_cpu else "cpu"
    train, held_out = load_rows(config)
    model, tokenizer = load_model(dataclasses.replace(adapter_fields(config), load_in_4bit=False, use_peft=False))
    prompts = []
    for rows, kind in ((train, "training"), (held_out, "held-out")):
        prompts += encode_rows(rows, tokenizer, config, max_positions(model.config), kind, print)[1]
    length = model_length(config, max(map(len, prompts)))
    dtype = model.get_input_embeddings().weight.dtype
    weights = sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize
    kv = plan(config, model.config, dtype, device, length, int((1 - RESERVE) * free_memory(device)) - weights)
    save_config(model, folder)
    options = engine_options(config, dtype, device, length, kv)
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
        elif value is not False:
            command += [flag, str(value)]
    # Token ids in, token ids out.
    return [*command, "--enable-scale-out", "--disable-uvicorn-access-log", "--middleware", MIDDLEWARE, *more]


def server_environment(config: GRPOConfig) -> dict[str, str]:
    """Environment variables of the server: its weights can be renewed over HTTP, which vLLM calls development mode."""
    quiet_vllm("WARNING")
    environment = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_HOST_IP": "127.0.0.1"}
    if config.use_cpu or not torch.cuda.is_available():
        environment |= {"TORCHDYNAMO_DISABLE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    return {**environment, **os.environ}


def check_options(more: Sequence[str]) -> None:
    """Refuse options that would let others reach the server, or show its key in the list of processes.

    Raises:
        UserError: it says what to set instead.
    """
    for option in more:
        name = option.split("=")[0].removeprefix("--").replace("_", "-")
        # vLLM also takes the beginning of an option's name.
        for known, instead in SET_ELSEWHERE.items():
            if option.startswith("--") and len(name) > 1 and known.startswith(name):
                raise UserError(f"{option.split('=')[0]} is not allowed here: set {instead} instead")


def listening_at(config: GRPOConfig) -> tuple[str, int]:
    """The server's host and port.

    Raises:
        UserError: the address is none, or one that others reach, and there is no key.
    """
    parts = urlsplit(server_client(config).base_url)
    return parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)


def serve(config: GRPOConfig, more: Sequence[str] = ()) -> None:
    """Become the server; it ends with Ctrl-C.

    Raises:
        UserError: the address is taken, is none of this machine's, or needs a key; see also `server_command`.
    """
    require_extra("vllm", "vllm")
    check_options(more)
    host, port = listening_at(config)
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        raise UserError(f"no server can be started at {server_address(config)}: {error.strerror or error}") from None
    folder = Path(tempfile.mkdtemp(prefix="grpo-fast-serve-"))
    try:
        command = server_command(config, folder, more)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    say(f"starting vLLM at {server_address(config)}")
    os.execve(command[0], command, server_environment(config))
