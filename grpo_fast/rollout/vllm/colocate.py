"""Sampling with vLLM in the training process, on the same device, asleep while the policy is trained."""

from __future__ import annotations

import os
import random
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import nn

from grpo_fast.config import GRPOConfig
from grpo_fast.errors import UserError, import_extra, one_line
from grpo_fast.model.loading import base_config
from grpo_fast.rollout.base import Response, Rollout, Sampling, eos_token_ids
from grpo_fast.rollout.vllm.common import (
    RESERVE,
    TRAINING_BYTES,
    engine_options,
    free_memory,
    model_length,
    plan,
    prompt_seeds,
    quiet_vllm,
    response,
    sampling_arguments,
    save_config,
)
from grpo_fast.rollout.vllm.weights import engine_weights


class VLLMColocate(Rollout):
    """A vLLM engine in this process. It starts with random weights: nothing is sampled before the first `sync`.

    Sleeping is vLLM's level 2: weights and keys and values are dropped. Level 1 would keep a copy of the weights in
    host memory, but every sync brings newer ones. On a CPU vLLM frees nothing, so `sleep` does nothing there.

    Args:
        config: the run.
        model: a transformers causal LM, on its device.
        tokenizer: its tokenizer.
        longest_prompt: tokens of the longest prompt that will be sampled from.

    Raises:
        UserError: vLLM is not installed, does not know the model, or has not enough memory.
    """

    copies_weights = True
    separate = False

    def __init__(self, config: GRPOConfig, model: nn.Module, tokenizer: Any, longest_prompt: int):
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            raise UserError("vllm_mode='colocate' goes with one process; several share a server: vllm_mode='server'")
        # What goes wrong is raised.
        quiet_vllm("CRITICAL")
        # One process, so that weights are handed over instead of sent; sockets on this machine alone.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_HOST_IP", "127.0.0.1")
        # vLLM would bind this process, the trainer's, to some of its cores.
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        self.vllm = import_extra("vllm", "vllm")
        self.device = model.device.type
        self.eos_token_ids = eos_token_ids(model, tokenizer)
        self.vocab_size = model.get_input_embeddings().weight.shape[0]
        self.sleeps = config.vllm_enable_sleep_mode and self.device == "cuda"
        self.has_weights = False
        self.llm = None
        dtype = model.get_input_embeddings().weight.dtype
        length = model_length(config, longest_prompt)
        kv = plan(config, model.config, dtype, self.device, length, self._available(config, model, dtype))
        options = engine_options(config, dtype, self.device, length, kv)
        options |= {"kv_cache_memory_bytes": kv.bytes, "enable_sleep_mode": self.sleeps, "seed": config.seed % 2**32}
        if self.device == "cuda":
            options["gpu_memory_utilization"] = self._utilization(config, model, dtype, kv.bytes)
        with tempfile.TemporaryDirectory(prefix="grpo-fast-") as folder, undisturbed():
            save_config(model, Path(folder))
            name = base_config(config).model_name_or_path if config.trust_remote_code else folder
            try:
                self.llm = self.vllm.LLM(name, **options)
                self._generate([[0]], Sampling(1, 1, seed=0))
            except Exception as error:
                # An unknown architecture, a head_dim or a dtype without a kernel, too little memory: of many types.
                self.close()
                raise UserError(f"vLLM cannot sample from {type(model).__name__}: {one_line(error)}") from None

    @staticmethod
    def _available(config: GRPOConfig, model: nn.Module, dtype: torch.dtype) -> int:
        """Bytes for keys and values: what is free, less the engine's weights and what training will take beside it."""
        weights = sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize
        trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        device = model.device.type
        if device == "cuda" and config.vllm_gpu_memory_utilization is not None:
            total = torch.cuda.get_device_properties(model.device).total_memory
            return int(config.vllm_gpu_memory_utilization * total) - weights
        return int((1 - RESERVE) * free_memory(device)) - weights - TRAINING_BYTES * trained

    @staticmethod
    def _utilization(config: GRPOConfig, model: nn.Module, dtype: torch.dtype, kv_bytes: int) -> float:
        """The share of the GPU that vLLM checks to be free before it starts."""
        if config.vllm_gpu_memory_utilization is not None:
            return config.vllm_gpu_memory_utilization
        weights = sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize
        return min(1.0, (weights + kv_bytes) / torch.cuda.get_device_properties(model.device).total_memory)

    def check(self, prompt_ids: list[int], sampling: Sampling) -> None:
        """Sample one token, so that what cannot work fails before anything long begins.

        Raises:
            UserError: the sampling arguments are refused.
        """
        sampling_arguments(sampling, self.eos_token_ids)
        try:
            self._generate([prompt_ids], sampling.one_token())
        except (TypeError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"vLLM refuses the sampling arguments: {one_line(error)}") from None

    def generate(self, prompt_ids: list[list[int]], sampling: Sampling) -> list[Response]:
        """Responses to every prompt, `num_generations` side by side, in the order of the prompts."""
        if not self.has_weights:
            raise RuntimeError("VLLMColocate.generate: the engine has no weights yet; sync comes first")
        try:
            return self._generate(prompt_ids, sampling)
        except (RuntimeError, AssertionError) as error:
            # Out of memory, say: the run can be saved, though nothing more is sampled.
            raise UserError(f"vLLM failed while it sampled: {one_line(error)}") from error

    def sync(self, model: nn.Module) -> None:
        """Sample from the weights of `model` (a transformers causal LM, or its PeftModel) from now on.

        Every tensor is handed over and copied by itself; adapters come merged. Keys and values of prompts that the
        engine kept are forgotten.
        """
        with undisturbed():
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": engine_weights(model)})
            self._repack_head()
            self._reset_prefix_cache()
        self.has_weights = True

    def sleep(self) -> None:
        """Drop the engine's weights, keys and values. On a CPU nothing would be freed, and nothing is done."""
        if self.sleeps:
            self.llm.sleep(level=2)
            self.has_weights = False

    def wake(self) -> None:
        """Take the memory again; the weights come with the next `sync`."""
        if self.sleeps:
            self.llm.wake_up()

    def close(self) -> None:
        """End the engine and free its memory."""
        if self.llm is not None:
            self.llm.llm_engine.engine_core.shutdown()
            self.llm = None
        self.vllm.distributed.cleanup_dist_env_and_memory()

    def _generate(self, prompt_ids: list[list[int]], sampling: Sampling) -> list[Response]:
        arguments = sampling_arguments(sampling, self.eos_token_ids)
        parameters = [
            self.vllm.SamplingParams(**arguments, seed=seed) for seed in prompt_seeds(sampling, len(prompt_ids))
        ]
        prompts = [{"prompt_token_ids": ids} for ids in prompt_ids]
        with undisturbed(), eager(self.device):
            outputs = self.llm.generate(prompts, parameters, use_tqdm=False)
        return [
            response(
                list(completion.token_ids),
                [each[token].logprob for token, each in zip(completion.token_ids, completion.logprobs, strict=True)],
                completion.finish_reason,
                self.vocab_size,
                sampling.max_completion_length,
            )
            for output in outputs
            for completion in output.outputs
        ]

    def _repack_head(self) -> None:
        """A tied head keeps an old copy for CPU products after a reload; see `WorkerExtension.repack_head`."""
        self.llm.collective_rpc("repack_head")

    def _reset_prefix_cache(self) -> None:
        """Keys and values of prompts that were seen before belong to the old weights."""
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("VLLMColocate.sync: vLLM did not reset its prefix cache")


@contextmanager
def undisturbed() -> Iterator[None]:
    """vLLM seeds the process's generators, replaces `torch.set_num_threads` and sets LD_PRELOAD: all are put back."""
    set_num_threads, preload = torch.set_num_threads, os.environ.get("LD_PRELOAD")
    python, numpys = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            numpy.random.set_state(numpys)
            torch.set_num_threads = set_num_threads
            if preload is None:
                os.environ.pop("LD_PRELOAD", None)
            else:
                os.environ["LD_PRELOAD"] = preload


def eager(device: str):
    """On a CPU vLLM's compiled functions run as they are written: compiling needs a compiler, and takes longer."""
    return torch.compiler.set_stance("force_eager") if device == "cpu" else nullcontext()
