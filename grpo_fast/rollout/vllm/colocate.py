"""Sampling with vLLM in the training process, on the same device; it sleeps while the policy is trained."""

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
from grpo_fast.distributed.rng import kept_torch_generators
from grpo_fast.errors import UserError, import_extra, one_line
from grpo_fast.model.loading import base_config
from grpo_fast.rollout.base import Response, Rollout, Sampling, eos_token_ids
from grpo_fast.rollout.stops import stop_texts
from grpo_fast.rollout.vllm import adapters, common, shared
from grpo_fast.rollout.vllm.kv_plan import plan_engine_cache
from grpo_fast.rollout.vllm.weights import engine_weights


class VLLMColocate(Rollout):
    """A vLLM engine in this process. It starts with random weights, so nothing can be sampled before the first `sync`.

    With LoRA, a sync gives it the adapters alone, each version under its own name, and the weights of the base model
    are in memory once: the trainer's are views of vLLM's. Where that is not possible, vLLM gets its own copy of the
    weights, if need be with the adapters merged, and `warning` says why.

    Sleep uses vLLM's level 2, which discards the weights and the KV cache. (Level 1 keeps a copy of the weights in host
    memory, but every sync replaces them.) If the trainer shares the weights, only the KV cache is discarded. On a CPU
    vLLM frees no memory, so `sleep` does nothing there.

    The arguments are those of `build_rollout`.

    Raises:
        UserError: vLLM is not installed, does not support the model, or has too little memory.
    """

    copies_weights = True

    def __init__(self, config: GRPOConfig, model: nn.Module, tokenizer: Any, longest_prompt: int):
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            raise UserError("vllm_mode='colocate' requires a single process; use vllm_mode='server' with several")
        # Errors are raised, so the log need not repeat them.
        common.quiet_vllm("CRITICAL")
        # One process, so that weights are passed without copies between processes; sockets on this machine only.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_HOST_IP", "127.0.0.1")
        # Otherwise vLLM binds this process, the trainer's, to some of its cores.
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        self.vllm = import_extra("vllm", "vllm")
        common.check_mask(config)
        self.device = model.device.type
        self.eos_token_ids, self.tokenizer = eos_token_ids(model, tokenizer), tokenizer
        self.vocab_size = model.get_input_embeddings().weight.shape[0]
        self.sleeps = config.vllm_enable_sleep_mode and self.device == "cuda"
        self.has_weights = self.has_base = False
        self.llm, self.adapter, self.syncs = None, None, 0
        adapted = bool(adapters.adapted_layers(model))
        reason = adapters.merge_reason(model) if adapted else None
        if adapted and not reason and not common.supports_adapters(type(model).__name__):
            reason = f"vLLM supports no adapters of {type(model).__name__}"
        self.adapters = adapted and not reason
        obstacle = shared.sharing_obstacle(model) if self.adapters else None
        if obstacle:
            self.warning = f"the weights are in memory twice, because {obstacle}"
        self.shares = moved = self.adapters and not obstacle
        device = model.device
        if moved:
            shared.move_out(model)
        try:
            with tempfile.TemporaryDirectory(prefix="grpo-fast-") as folder, undisturbed():
                self._start(config, model, common.model_length(config, longest_prompt), device, Path(folder))
                if self.adapters:
                    reason = self._try_adapters(model)
        except BaseException:
            self.shares = False
            self.close()
            raise
        finally:
            if moved and not self.shares:
                shared.move_back(model, device)
        if reason:
            self.warning = adapters.warn_merged(reason)

    def _start(self, config: GRPOConfig, model: nn.Module, length: int, device: torch.device, folder: Path) -> None:
        """Start vLLM with random weights, and sample one token."""
        dtype = model.get_input_embeddings().weight.dtype
        weights = sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize
        share, total = config.vllm_gpu_memory_utilization, 0
        if self.device == "cuda":
            total = torch.cuda.get_device_properties(device).total_memory
        if self.device == "cuda" and share is not None:
            available = int(share * total) - weights
        else:
            trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
            available = common.usable_memory(self.device) - weights - common.TRAINING_BYTES * trained
        kv = plan_engine_cache(config, model.config, dtype, self.device, length, available)
        options = common.engine_options(config, dtype, self.device, length, kv)
        options |= {"kv_cache_memory_bytes": kv.bytes, "enable_sleep_mode": self.sleeps, "seed": config.seed % 2**32}
        if self.adapters:
            options |= adapters.lora_options(model)
        if self.device == "cuda":
            # vLLM checks that this share of the GPU is free before it starts.
            options["gpu_memory_utilization"] = min(1.0, (weights + kv.bytes) / total) if share is None else share
        common.save_config(model, folder)
        common.save_tokenizer(self.tokenizer, folder, options)
        name = base_config(config).model_name_or_path if config.trust_remote_code else str(folder)
        try:
            plain = self.shares and self.device == "cpu"
            with shared.plain_layers() if plain else nullcontext():
                self.llm = self.vllm.LLM(name, **options)
            if plain:
                self.llm.apply_model(shared.keep_plain)
            self._generate([[0]], Sampling(1, 1, seed=0, keeps_support=config.truncated_support))
        except Exception as error:
            # An unknown architecture, a head_dim or dtype without a kernel, too little memory: many types.
            if config.truncated_support and "sampling distribution replay" in str(error):
                raise UserError(common.NO_RUNNER) from None
            raise UserError(f"vLLM cannot sample from {type(model).__name__}: {one_line(error)}") from None

    def check(self, prompt_ids: list[int], sampling: Sampling) -> None:
        try:
            common.sampling_arguments(sampling, self.eos_token_ids)
            self._generate([prompt_ids], sampling.one_token())
        except UserError:
            raise
        except (TypeError, ValueError) as error:
            raise UserError(f"vLLM refuses the sampling arguments: {one_line(error)}") from None

    def generate(self, prompt_ids: list[list[int]], sampling: Sampling) -> list[Response]:
        if not self.has_weights:
            raise RuntimeError("VLLMColocate.generate: the engine has no weights yet; call sync first")
        try:
            return self._generate(prompt_ids, sampling)
        except (RuntimeError, AssertionError) as error:
            # For example out of memory: the run can still be saved.
            raise UserError(f"vLLM failed while sampling: {one_line(error)}") from error

    def sync(self, model: nn.Module) -> None:
        """Copy the weights of `model`, one tensor at a time, or its adapters alone if vLLM has the weights."""
        with undisturbed():
            if not self.has_base:
                self._load_weights(model)
                self.has_base = self.adapters
            if self.adapters:
                self._load_adapter(model)
        self.has_weights = True

    def sleep(self) -> None:
        if self.sleeps and self.shares:
            self.llm.sleep(level=0)
            self.llm.release_kv_cache_memory()
        elif self.sleeps:
            self.llm.sleep(level=2)
            self.has_weights = self.has_base = False

    def wake(self) -> None:
        if self.sleeps:
            self.llm.wake_up(["kv_cache"] if self.shares else None)

    def close(self) -> None:
        if self.llm is not None:
            self.llm.llm_engine.engine_core.shutdown()
            self.llm = None
        self.vllm.distributed.cleanup_dist_env_and_memory()

    def _generate(self, prompt_ids: list[list[int]], sampling: Sampling) -> list[Response]:
        arguments = common.sampling_arguments(sampling, self.eos_token_ids)
        seeds = common.prompt_seeds(sampling, len(prompt_ids))
        parameters = [self.vllm.SamplingParams(**arguments, seed=seed) for seed in seeds]
        prompts = [{"prompt_token_ids": ids} for ids in prompt_ids]
        # Compilation for a CPU needs a compiler and takes longer than it saves.
        eager = torch.compiler.set_stance("force_eager") if self.device == "cpu" else nullcontext()
        stops = stop_texts(self.tokenizer, sampling)
        with undisturbed(), eager:
            outputs = self.llm.generate(prompts, parameters, use_tqdm=False, lora_request=self.adapter)
        wanted = self.adapter.lora_name if self.adapter else None
        for output in outputs:
            sampled = output.lora_request.lora_name if output.lora_request else None
            if sampled != wanted:
                raise UserError(f"vLLM sampled with adapters {sampled}, not with {wanted} of this run")
        return [
            common.response(
                list(completion.token_ids),
                [each[token].logprob for token, each in zip(completion.token_ids, completion.logprobs, strict=True)],
                completion.finish_reason,
                self.vocab_size,
                sampling.max_completion_length,
                self.eos_token_ids,
                stops,
                common.kept_ids(completion) if sampling.keeps_support else None,
            )
            for output in outputs
            for completion in output.outputs
        ]

    def _try_adapters(self, model: nn.Module) -> str | None:
        """Give vLLM weights and adapters, and the trainer vLLM's weights; the reason if the adapters must be merged."""
        self._load_weights(model)
        self.has_base = True
        try:
            self._load_adapter(model)
        except Exception as error:
            # For a layer or a rank that it does not support, vLLM raises exceptions of many types.
            self.adapters = self.shares = self.has_base = False
            return adapters.refused_reason(error)
        if self.shares:
            (found,) = self.llm.apply_model(shared.engine_tensors)
            try:
                shared.adopt(model, shared.views(model, *found))
            except ValueError as error:
                # vLLM keeps the weights in another form.
                self.shares, self.has_base = False, not self.sleeps
                self.warning = f"the weights are in memory twice, because in vLLM {error}"
        return None

    def _load_weights(self, model: nn.Module) -> None:
        """Copy the weights, without adapters or merged with them, and discard what was computed with the old ones."""
        tensors = engine_weights(model, merged=not self.adapters)
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": tensors})
        self._repack_head()
        self._reset_prefix_cache()

    def _load_adapter(self, model: nn.Module) -> None:
        """Give vLLM the adapters under a new name, by which its prefix cache knows them too, in place of the last."""
        from vllm.lora.request import LoRARequest

        version = self.syncs + 1
        with tempfile.TemporaryDirectory(prefix="grpo-fast-adapter-") as folder:
            adapters.write_adapter(model, Path(folder))
            adapter = LoRARequest(f"version {version}", version, folder)
            self.llm.llm_engine.add_lora(adapter)
        self.adapter, self.syncs = adapter, version

    def _repack_head(self) -> None:
        """Update the packed copy of a tied head, or do without one; see `WorkerExtension`."""
        self.llm.collective_rpc("use_plain_head" if self.shares else "repack_head")

    def _reset_prefix_cache(self) -> None:
        """Discard keys and values that were computed with the old weights."""
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("VLLMColocate.sync: vLLM did not reset its prefix cache")


@contextmanager
def undisturbed() -> Iterator[None]:
    """Restore what vLLM changes in this process: random generators, `torch.set_num_threads` and LD_PRELOAD."""
    set_num_threads, preload = torch.set_num_threads, os.environ.get("LD_PRELOAD")
    python, numpys = random.getstate(), numpy.random.get_state()
    with kept_torch_generators():
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
