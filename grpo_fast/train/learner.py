"""The policy and its optimizer: gradients of a step, its update, and scores of tokens."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from grpo_fast.config import GRPOConfig
from grpo_fast.distributed.processes import rank, size, total
from grpo_fast.distributed.rng import own_random_numbers
from grpo_fast.distributed.sharding import (
    is_sharded,
    outer_weights,
    release,
    shard,
    sum_gradients,
    whole,
    whole_state,
    without_sync,
)
from grpo_fast.errors import NotFiniteError, UserError
from grpo_fast.model.activations import prepare_activations
from grpo_fast.model.attention import install
from grpo_fast.model.loading import REFERENCE, train_adapter
from grpo_fast.model.microbatch_policy import MicrobatchPolicy
from grpo_fast.model.packing import (
    Microbatch,
    Sample,
    build_microbatch,
    deal_microbatches,
    empty_microbatch,
    fair_share,
    fill_microbatches,
    plan_rows,
    token_offsets,
)
from grpo_fast.model.policy import LossInputs
from grpo_fast.train.batch import StepBatch
from grpo_fast.train.checkpoint import load_tensors, load_weights
from grpo_fast.train.finite import all_finite, not_finite
from grpo_fast.train.metrics import loss_metrics, sampling_metrics
from grpo_fast.train.optimizers import build_optimizer, build_scheduler, load_optimizer_tensors, optimizer_tensors
from grpo_fast.train.reference import load_reference, move_towards, reference_tensors
from grpo_kernels import high_entropy_mask, sampling_ratio

T = TypeVar("T")


class Learner:
    """Trains a policy on generation batches.

    Args:
        model: a transformers causal LM; with `use_peft` it gets its adapters here.
        config: the run.
        accelerator: where it runs.
        prompt_ids: any prompt, to compare the fused head and packed rows with the model's own.
        pad_token_id: for padded rows.

    Raises:
        UserError: the model cannot be trained as `config` says.
    """

    def __init__(
        self, model: nn.Module, config: GRPOConfig, accelerator: Accelerator, prompt_ids: list[int], pad_token_id: int
    ):
        self.model, self.config, self.accelerator, self.pad_token_id = model, config, accelerator, pad_token_id
        self.objective, self.sharded = config.objective(), is_sharded(config)
        self.adapter = train_adapter(model, config) if config.use_peft else None
        prepare_activations(model, config)
        policy = MicrobatchPolicy(model, config.temperature, config.max_buffer_bytes)
        policy.eval()
        # Parked on the CPU, where it is not sharded: scoring takes it to the device and back.
        self.reference = None
        if config.uses_reference and self.adapter is None:
            self.reference = copy.deepcopy(policy).requires_grad_(False)
        for one in (policy, self.reference) if self.sharded else ():
            if one is not None:
                shard(one, config, accelerator.device)
        if not self.sharded:
            policy.to(accelerator.device)
        with outer_weights(policy):
            policy.check_head(prompt_ids)
            self.packed = policy.check_packing(prompt_ids, config.padding_free)
        if self.packed and self.reference is not None:
            install(self.reference.model)
        if config.share_prompts == "always" and not self.packed:
            raise UserError(f"share_prompts='always' is not possible: {type(model).__name__} cannot be packed")
        self.policy, self.optimizer = policy, build_optimizer(policy, config)
        if not self.sharded:
            self.policy, self.optimizer = accelerator.prepare(policy, self.optimizer)
            sum_gradients(self.policy)
        self.scheduler = build_scheduler(self.optimizer, config)

    def weights(self) -> dict[str, Tensor] | None:
        """For a checkpoint, the weights of a sharded model in the first process; None where the model has them."""
        return whole_state(self.adapter or self.model, self.adapter is not None) if self.sharded else None

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """For a checkpoint, beside the weights: the optimizer's state, and the reference policy where it moves."""
        tensors = {"optimizer": optimizer_tensors(self.optimizer)}
        if self.config.sync_ref_model:
            tensors["reference"] = reference_tensors(self.reference.model)
        return tensors

    def restore(self, folder: Path, step: int) -> None:
        """Go on from a checkpoint of `step`; an unrefreshed reference policy is the one that the run began with."""
        load_weights(folder, self.adapter or self.model)
        load_optimizer_tensors(self.optimizer, load_tensors(folder, "optimizer"))
        if self.config.sync_ref_model:
            load_reference(self.reference.model, load_tensors(folder, "reference"))
        # The schedule is a function of the step.
        schedule = self.scheduler.state_dict()
        self.scheduler.load_state_dict({**schedule, "last_epoch": step - 1, "_step_count": step + 1})
        self.scheduler.step()

    def trained(self) -> list[tuple[str, nn.Parameter]]:
        """The weights that the optimizer moves, with their names."""
        return [(name, p) for name, p in self.policy.named_parameters() if p.requires_grad]

    def refresh_reference(self, step: int) -> None:
        """Move the reference policy towards the trained one, if `step` is one of those that do."""
        if self.config.sync_ref_model and step % self.config.ref_model_sync_steps == 0:
            move_towards(self.reference.model, self.model, self.config.ref_model_mixup_alpha)

    def kl_penalty(self, batch: StepBatch) -> tuple[Tensor, float]:
        """``beta * sum_t (logp_t - ref_t)`` of every completion ``[S]``, as in TRL's RLOO, and the mean over tokens."""
        self.policy.eval()
        k1 = self.score(self.policy, batch) - batch.ref_logprobs
        batch.ref_logprobs = None
        return self.config.beta * batch.sums(k1).cpu(), k1.mean().item()

    def update(self, batch: StepBatch, keep_logprobs: bool = False) -> dict[str, float]:
        """One optimizer step on a generation batch.

        Raises:
            NotFiniteError: the gradient is not finite, and the weights are as they were; or the new weights are not.
        """
        if self.config.top_entropy_quantile < 1:
            batch.high_entropy = self.high_entropy(batch)
        metrics = self.accumulate_gradients(batch, keep_logprobs)
        # torchao's optimizers keep it in a tensor.
        learning_rate = float(self.scheduler.get_last_lr()[0])
        trained = self.trained()
        parameters = [p for _, p in trained]
        norm = get_total_norm([p.grad for p in parameters])
        grad_norm = whole(norm).item()
        if not grad_norm < float("inf"):
            names = not_finite((name, p.grad) for name, p in trained)
            where = f"in {names}" if names else "its norm is too large a number"
            found = f"norm {grad_norm}, loss {metrics['loss']:g}"
            raise NotFiniteError(f"the gradient is not finite ({found}): {where}", weights_lost=False)
        if self.config.max_grad_norm:
            clip_grads_with_norm_(parameters, self.config.max_grad_norm, norm)
        with own_random_numbers() if self.sharded else nullcontext():
            self.optimizer.step()
        if not all_finite(parameters):
            raise NotFiniteError(
                f"the updated weights are not finite (norm of the gradient {grad_norm:g}, learning_rate "
                f"{learning_rate:g}): in {not_finite(trained)}",
                weights_lost=True,
            )
        self.optimizer.zero_grad(set_to_none=True)
        self.scheduler.step()
        return metrics | {"grad_norm": grad_norm, "learning_rate": learning_rate}

    def accumulate_gradients(self, batch: StepBatch, keep_logprobs: bool = False) -> dict[str, float]:
        """Forward and backward of every microbatch; the gradients add up to those of the whole step.

        Returns the loss's figures. With `keep_logprobs`, the batch also gets the log-probabilities as its old ones.
        """
        self.policy.train()
        loss, stats = torch.zeros((), device=self.accelerator.device), None
        corrects = batch.sampling_logprobs is not None and batch.correction is None
        seen = torch.zeros_like(batch.weights) if keep_logprobs or corrects else None
        rows = self.known_rows(batch)
        with own_random_numbers():
            for microbatch, last in with_last(self.microbatches(batch)):
                inputs = self.loss_inputs(batch, microbatch.tokens, rows)
                with without_sync(self.policy, last):
                    result = self.policy(microbatch, inputs)
                    self.accelerator.backward(result.loss)
                loss += result.loss.detach()
                stats = result.stats if stats is None else {name: stats[name] + result.stats[name] for name in stats}
                if seen is not None:
                    seen[microbatch.tokens] = result.logprobs.float()
                # Its graph would stay in memory beside the next microbatch's forward.
                del result
        loss, stats = sum_figures(loss, stats)
        if seen is not None:
            total(seen)
        # Without any active group the gradient is zero, not absent: the optimizer's moments still decay.
        for parameter in self.policy.parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if keep_logprobs:
            batch.old_logprobs = seen
        metrics = loss_metrics(loss, stats, self.objective)
        if corrects:
            batch.correction = self.sampling_ratio(seen, batch.sampling_logprobs, batch.offsets.to(seen.device))
            metrics |= sampling_metrics(batch, seen, by_token="token" in self.config.vllm_importance_sampling_mode)
        return metrics

    def known_rows(self, batch: StepBatch) -> Literal["all"] | None:
        """ "all" if every token of the active completions moves the policy, so that microbatches need not ask which."""
        mode = self.config.vllm_importance_sampling_mode
        if batch.sampling_logprobs is not None and batch.correction is None and "mask" in mode:
            return None
        moves = batch.weights != 0
        if self.objective.advantage_alone:
            for factor in (batch.advantages, batch.high_entropy, batch.correction):
                moves = moves if factor is None else moves & (factor != 0)
        return "all" if int(moves.sum()) == int(batch.offsets.diff()[batch.active].sum()) else None

    def loss_inputs(self, batch: StepBatch, tokens: Tensor, rows: Literal["all"] | None = None) -> LossInputs:
        advantages = batch.advantages if batch.high_entropy is None else batch.advantages * batch.high_entropy
        fields = (advantages, batch.weights, batch.old_logprobs, batch.ref_logprobs, batch.correction)
        corrects = batch.sampling_logprobs is not None and batch.correction is None
        correct = None
        if corrects:
            correct = partial(self.sampling_ratio, sampling_logprobs=batch.sampling_logprobs[tokens])
        share = len(tokens) / int(batch.offsets.diff()[batch.active].sum())
        tensors = (None if field is None else field[tokens] for field in fields)
        return LossInputs(self.objective, *tensors, correct, share, rows)

    def sampling_ratio(self, logprobs: Tensor, sampling_logprobs: Tensor, cu_seqlens: Tensor) -> Tensor:
        """``rho_t`` of the run's mode, for the tokens of whole sequences."""
        config = self.config
        return sampling_ratio(
            logprobs, sampling_logprobs, config.vllm_importance_sampling_mode, cu_seqlens=cu_seqlens,
            clip_max=config.vllm_importance_sampling_clip_max, clip_min=config.vllm_importance_sampling_clip_min,
        )  # fmt: skip

    def microbatches(self, batch: StepBatch) -> Iterator[Microbatch]:
        config, device = self.config, self.accelerator.device
        budget, pad = config.max_tokens_per_microbatch, self.pad_token_id
        shares = self.packed and config.share_prompts != "never"
        rows = plan_rows(batch.samples, batch.active, budget if shares else 0)
        if size() == 1:
            dealt = fill_microbatches(rows, budget, self.packed)
        else:
            rows = plan_rows(batch.samples, batch.active, min(budget, fair_share(rows, size())) if shares else 0)
            dealt = deal_microbatches(rows, budget, self.packed, size())[rank()]
        for chosen in dealt:
            if chosen:
                yield build_microbatch(batch.samples, chosen, batch.offsets, pad, self.packed).to(device)
            else:
                yield empty_microbatch(pad, self.packed).to(device)

    def score_reference(self, batch: StepBatch) -> Tensor:
        """Log-probabilities ``[N]`` under the initial policy: a copy parked on the CPU; with an adapter, the model
        without it, or with the adapter that the run went on from."""
        if self.adapter is not None:
            self.policy.eval()
            with self.initial_adapter():
                return self.score(self.policy, batch)
        if self.sharded:
            return self.score(self.reference, batch)
        with self.accelerator.autocast():
            scores = self.score(self.reference.to(self.accelerator.device), batch)
        self.reference.to("cpu")
        return scores

    @contextmanager
    def initial_adapter(self) -> Iterator[None]:
        """Within it the policy has the adapter that the run began with: a frozen copy, or none."""
        if REFERENCE not in self.adapter.peft_config:
            with self.adapter.disable_adapter():
                yield
            return
        trained = self.adapter.active_adapter
        self.adapter.set_adapter(REFERENCE)
        try:
            yield
        finally:
            # This also freezes the copy again.
            self.adapter.set_adapter(trained)

    @torch.no_grad()
    def score(self, policy: nn.Module, batch: StepBatch) -> Tensor:
        """Log-probabilities ``[N]`` of the step's tokens under `policy` (1U in the head)."""
        logprobs = torch.zeros_like(batch.weights)
        for microbatch in self.microbatches(batch):
            logprobs[microbatch.tokens] = policy(microbatch).float()
        release(policy)
        return total(logprobs)

    @torch.no_grad()
    def score_completion(self, prompt_ids: list[int], completion_ids: list[int]) -> Tensor:
        """Log-probabilities of one completion's tokens under the policy as it is."""
        samples = [Sample(prompt_ids, completion_ids, 0)]
        rows, offsets = plan_rows(samples, [0], 0), token_offsets(samples)
        microbatch = build_microbatch(samples, rows, offsets, self.pad_token_id, self.packed)
        self.policy.eval()
        logprobs = self.policy(microbatch.to(self.accelerator.device)).float()
        release(self.policy)
        return logprobs

    @torch.no_grad()
    def high_entropy(self, batch: StepBatch) -> Tensor:
        """``[N]`` bool: the `top_entropy_quantile` of all counted tokens, by the entropies of the present policy."""
        counted = batch.weights != 0
        samples = counted[batch.offsets[:-1].to(counted.device)].nonzero().squeeze(1).tolist()
        entropy = torch.zeros_like(batch.weights)
        self.policy.eval()
        for microbatch in self.microbatches(dataclasses.replace(batch, active=samples)):
            entropy[microbatch.tokens] = self.policy(microbatch, with_entropy=True)[1].float()
        release(self.policy)
        total(entropy)
        return high_entropy_mask(entropy, counted, self.config.top_entropy_quantile)


def with_last(items: Iterable[T]) -> Iterator[tuple[T, bool]]:
    """Each item, and whether it is the last one."""
    items = iter(items)
    for item in items:
        for following in items:
            yield item, False
            item = following
        yield item, True


def sum_figures(loss: Tensor, stats: dict[str, Tensor] | None) -> tuple[Tensor, dict[str, Tensor] | None]:
    """The loss and its statistics over all processes, which had the same number of microbatches."""
    if size() == 1 or stats is None:
        return loss, stats
    sums = total(torch.stack([loss.double(), *(value.double() for value in stats.values())]))
    return sums[0], dict(zip(stats, sums[1:], strict=True))
