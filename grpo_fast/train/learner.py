"""The policy and its optimizer: gradients of a step, its update, and scores of tokens."""

from __future__ import annotations

import copy
import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from grpo_fast.config import GRPOConfig
from grpo_fast.distributed import sharding
from grpo_fast.distributed.processes import gather, rank, size, total
from grpo_fast.distributed.rng import own_random_numbers
from grpo_fast.errors import NotFiniteError, UserError
from grpo_fast.model import packing
from grpo_fast.model.activations import prepare_activations
from grpo_fast.model.attention import install
from grpo_fast.model.host_layers import keep_layers_on_host
from grpo_fast.model.layout import Microbatch
from grpo_fast.model.loading import REFERENCE, train_adapter
from grpo_fast.model.microbatch_policy import MicrobatchPolicy
from grpo_fast.model.packing import Sample, build_microbatch, plan_rows, token_offsets
from grpo_fast.model.policy import LossInputs, Teaching
from grpo_fast.model.transfer import send
from grpo_fast.train.batch import StepBatch
from grpo_fast.train.checkpoint import load_tensors, load_weights
from grpo_fast.train.diagnosis import diagnose
from grpo_fast.train.finite import all_finite, bad_completions, not_finite
from grpo_fast.train.metrics import clip_extremes, loss_metrics, loss_parts, sampling_metrics
from grpo_fast.train.off_policy import loss_correction, sampling_correction
from grpo_fast.train.optimizers import build_optimizer, build_scheduler, load_optimizer_tensors, optimizer_tensors
from grpo_fast.train.reference import load_reference, move_towards, reference_tensors
from grpo_kernels import Support, covariance_mask, high_entropy_mask, masked_mean
from grpo_kernels.weight_copies import kept_weight_copies


class Learner:
    """Trains a policy on generation batches.

    `model` is a transformers causal LM, which gets its adapters here; `prompt_ids` is any prompt, with which the fused
    head and packed rows are compared with the model's own; `adapter` is a PeftConfig for them, or the PeftModel that
    the model is already in. A UserError refuses a model that cannot be trained.
    """

    def __init__(
        self, model: nn.Module, config: GRPOConfig, accelerator: Accelerator, prompt_ids: list[int], pad_token_id: int,
        adapter: Any = None,
    ):  # fmt: skip
        self.model, self.config, self.accelerator, self.pad_token_id = model, config, accelerator, pad_token_id
        self.objective, self.sharded = config.objective(), sharding.is_sharded(config)
        # A teacher's view of a microbatch, if the loss is the divergence from it.
        self.teach: Callable[[Microbatch], Teaching] | None = None
        self.adapter = train_adapter(model, config, adapter) if config.use_peft else None
        prepare_activations(model, config)
        self.host_layers = keep_layers_on_host(model, config.layers_on_host, accelerator.device)
        policy = MicrobatchPolicy(model, config.temperature, config.max_buffer_bytes)
        policy.eval()
        # Unless it is sharded, it waits on the CPU and is on the device only while it scores.
        self.reference = None
        if config.uses_reference and self.adapter is None:
            self.reference = copy.deepcopy(policy).requires_grad_(False)
        if self.sharded:
            for one in filter(None, (policy, self.reference)):
                sharding.shard(one, config, accelerator.device)
        else:
            policy.to(accelerator.device)
        with sharding.outer_weights(policy):
            # As in the steps.
            with accelerator.autocast():
                policy.check_head(prompt_ids)
            self.packed = policy.check_packing(prompt_ids, config.padding_free)
        if self.packed and self.reference is not None:
            install(self.reference.model)
        if config.share_prompts == "always" and not self.packed:
            raise UserError(f"share_prompts='always' is not possible: {type(model).__name__} cannot be packed")
        self.policy, self.optimizer = policy, build_optimizer(policy, config)
        if not self.sharded:
            self.policy, self.optimizer = accelerator.prepare(policy, self.optimizer)
            sharding.sum_gradients(self.policy)
        self.scheduler = build_scheduler(self.optimizer, config)

    def weights(self) -> dict[str, Tensor] | None:
        """For a checkpoint: a sharded model's whole weights, in the first process; None if it is not sharded."""
        return sharding.whole_state(self.adapter or self.model, self.adapter is not None) if self.sharded else None

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """For a checkpoint: the optimizer's state, and the reference policy if it moves."""
        tensors = {"optimizer": optimizer_tensors(self.optimizer)}
        if self.config.sync_ref_model:
            tensors["reference"] = reference_tensors(self.reference.model)
        return tensors

    def restore(self, folder: Path, step: int) -> None:
        """Continue from a checkpoint of `step`; a reference policy that does not move is the initial one."""
        load_weights(folder, self.adapter or self.model)
        load_optimizer_tensors(self.optimizer, load_tensors(folder, "optimizer"))
        if self.config.sync_ref_model:
            load_reference(self.reference.model, load_tensors(folder, "reference"))
        # The schedule is a function of the step.
        schedule = self.scheduler.state_dict()
        self.scheduler.load_state_dict({**schedule, "last_epoch": step - 1, "_step_count": step + 1})
        self.scheduler.step()

    def trained(self) -> list[tuple[str, nn.Parameter]]:
        """The trained weights with their names."""
        return [(name, p) for name, p in self.policy.named_parameters() if p.requires_grad]

    def refresh_reference(self, step: int) -> None:
        """Move the reference policy towards the trained one, every `ref_model_sync_steps`."""
        if self.config.sync_ref_model and step % self.config.ref_model_sync_steps == 0:
            move_towards(self.reference.model, self.model, self.config.ref_model_mixup_alpha)

    def kl_penalty(self, batch: StepBatch) -> tuple[Tensor, float]:
        """``beta * sum_t (logp_t - ref_t)`` of every completion ``[S]``, as in TRL's RLOO, and the mean over tokens."""
        self.policy.eval()
        k1 = self.score(self.policy, batch) - batch.ref_logprobs
        batch.ref_logprobs = None
        mean = k1.mean() if batch.mask is None else masked_mean(k1, batch.mask.to(k1.device))
        return self.config.beta * batch.sums(k1).cpu(), mean.item()

    def parts(self, batch: StepBatch) -> list[StepBatch]:
        """The batches of the optimizer steps that share a generation batch; drawn at random if they are several.

        Later steps are then off the policy that sampled, so the old log-probabilities are computed before the first.
        """
        count = self.config.parts_per_batch
        if count == 1:
            return [batch]
        self.policy.eval()
        batch.old_logprobs = self.score(self.policy, batch)
        if batch.sampling_logprobs is not None:
            offsets = send(batch.offsets, batch.weights.device)
            arguments = (batch.old_logprobs, batch.sampling_logprobs, offsets, batch.weights)
            batch.correction = sampling_correction(self.config, *arguments)
        return batch.split(count, self.config.objective(), self.config)

    def update(self, batch: StepBatch, keep_logprobs: bool = False) -> dict[str, float]:
        """One optimizer step on a generation batch.

        Raises:
            NotFiniteError: the loss or the gradient is not finite, and the weights are unchanged; or the new weights
                are not.
        """
        if self.config.top_entropy_quantile < 1:
            batch.high_entropy = self.high_entropy(batch)
        if self.objective.needs_selection:
            batch.selected = self.high_covariance(batch)
        metrics = self.accumulate_gradients(batch, keep_logprobs)
        # A tensor in torchao's optimizers.
        learning_rate = float(self.scheduler.get_last_lr()[0])
        trained = self.trained()
        parameters = [p for _, p in trained]
        norm = get_total_norm([p.grad for p in parameters])
        grad_norm = sharding.whole(norm).item()
        if not (math.isfinite(grad_norm) and math.isfinite(metrics["loss"])):
            what = "loss" if math.isfinite(grad_norm) else "gradient"
            names = not_finite((name, p.grad) for name, p in trained)
            where = f": in {names}" if names else ": its norm is too large" if what == "gradient" else ""
            source = self.bad_completions(batch)
            found = f"norm {grad_norm}, loss {metrics['loss']:g}"
            raise NotFiniteError(
                f"the {what} is not finite ({found}){f' because of {source}' if source else ''}{where}",
                weights_lost=False,
                metrics=metrics | {"grad_norm": grad_norm, "learning_rate": learning_rate},
            )
        if self.config.max_grad_norm:
            clip_grads_with_norm_(parameters, self.config.max_grad_norm, norm)
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

    def skip_update(self) -> None:
        """Drop the gradient of an update that failed; the learning rate moves on with the step."""
        self.optimizer.zero_grad(set_to_none=True)
        with warnings.catch_warnings():
            # PyTorch expects a step of the optimizer before the first one of its schedule.
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
            self.scheduler.step()

    def bad_completions(self, batch: StepBatch) -> str:
        """The completions whose loss is not finite under the current policy, in any process; one more forward."""
        self.policy.eval()
        logprobs = self.score(self.policy, batch)
        correction = self.correction(batch, logprobs)
        found = gather(lambda: bad_completions(batch, self.objective, logprobs, correction))
        return next(filter(None, found), "")

    def accumulate_gradients(self, batch: StepBatch, keep_logprobs: bool = False) -> dict[str, float]:
        """Forward and backward of all microbatches; their gradients add up to that of the whole step.

        Returns the metrics of the loss. `keep_logprobs` stores the log-probabilities in the batch as its old ones.
        """
        self.policy.train()
        loss, stats = torch.zeros((), device=self.accelerator.device), None
        corrects = batch.sampling_logprobs is not None and batch.correction is None
        has_parts = self.objective.uses_reference or self.objective.entropy_coef
        clips = self.objective.kind == "clip" and self.teach is None
        seen, entropy = torch.zeros_like(batch.weights), torch.zeros_like(batch.weights)
        rows = self.known_rows(batch)
        with own_random_numbers(), kept_weight_copies():
            rest = iter(self.microbatches(batch))
            following = next(rest, None)
            while following is not None:
                microbatch, following = following, next(rest, None)
                inputs = self.loss_inputs(batch, microbatch.tokens, rows)
                if self.teach is not None:
                    inputs.teaching = self.teach(microbatch)
                with sharding.without_sync(self.policy, following is None):
                    result = self.policy(microbatch, inputs)
                    self.accelerator.backward(result.loss)
                loss += result.loss.detach()
                stats = result.stats if stats is None else {name: stats[name] + result.stats[name] for name in stats}
                seen[microbatch.tokens] = result.logprobs.float()
                # The divergence from a teacher computes none.
                if result.entropy is not None:
                    entropy[microbatch.tokens] = result.entropy.float()
                # Its graph would stay in memory beside the next microbatch's forward.
                del result
        if size() > 1 and stats is not None:
            # All processes have the same number of microbatches.
            loss, *sums = total(torch.stack([loss.double(), *(value.double() for value in stats.values())]))
            stats = dict(zip(stats, sums, strict=True))
        total(seen)
        total(entropy)
        # Without any active group the gradient is zero, not absent: the optimizer's moments still decay.
        for parameter in self.policy.parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        metrics = loss_metrics(loss, stats, self.objective)
        # As in the microbatches.
        correction = self.correction(batch, seen)
        if stats is not None and self.teach is None:
            metrics |= diagnose(batch, self.objective, seen, entropy, self.step_advantages(batch), correction)
        if corrects:
            offsets = send(batch.offsets, seen.device)
            batch.correction = sampling_correction(self.config, seen, batch.sampling_logprobs, offsets, batch.weights)
            metrics |= sampling_metrics(batch, seen, by_token="token" in self.config.vllm_importance_sampling_mode)
        if clips and stats is not None:
            metrics |= clip_extremes(batch, seen, self.step_advantages(batch), self.objective)
        if has_parts and stats is not None:
            weighed = dataclasses.replace(batch, correction=correction)
            metrics |= loss_parts(metrics["loss"], weighed, seen, self.step_advantages(batch), self.objective)
        if keep_logprobs:
            batch.old_logprobs = seen
        return metrics

    def step_advantages(self, batch: StepBatch) -> Tensor:
        """The advantages ``[N]``, 0 for the tokens that `top_entropy_quantile` leaves out."""
        return batch.advantages if batch.high_entropy is None else batch.advantages * batch.high_entropy

    def known_rows(self, batch: StepBatch) -> Literal["all"] | None:
        """ "all" if every token of the active completions moves the policy, so that microbatches need not ask which."""
        mode = self.config.vllm_importance_sampling_mode
        rejects = "mask" in mode or self.config.rollout_rs is not None
        if batch.sampling_logprobs is not None and batch.correction is None and rejects:
            return None
        # Forced tokens have no weight.
        moves = batch.weights != 0
        if self.objective.advantage_alone:
            for factor in (batch.advantages, batch.high_entropy, batch.correction):
                moves = moves if factor is None else moves & (factor != 0)
        return "all" if int(moves.sum()) == int(batch.offsets.diff()[batch.active].sum()) else None

    def loss_inputs(self, batch: StepBatch, tokens: Tensor, rows: Literal["all"] | None = None) -> LossInputs:
        """What the loss needs of the step's `tokens`."""
        names = ("advantages", "weights", "old_logprobs", "ref_logprobs", "correction", "selected")
        fields = {name: value[tokens] for name in names if (value := getattr(batch, name)) is not None}
        if batch.high_entropy is not None:
            fields["advantages"] = fields["advantages"] * batch.high_entropy[tokens]
        if self.corrects_now(batch):
            sampled = None if batch.sampling_logprobs is None else batch.sampling_logprobs[tokens]
            fields["correct"] = partial(
                loss_correction, config=self.config, advantages=fields["advantages"], mask=fields["weights"],
                old_logprobs=fields.get("old_logprobs"), sampling_logprobs=sampled,
                known=fields.pop("correction", None),
            )  # fmt: skip
        share = len(tokens) / int(batch.offsets.diff()[batch.active].sum())
        return LossInputs(objective=self.objective, share=share, rows=rows, **fields)

    def corrects_now(self, batch: StepBatch) -> bool:
        """Whether the loss's factor depends on the log-probabilities of the update itself."""
        sampled = batch.sampling_logprobs is not None
        masks = self.config.off_policy_mask_threshold is not None and (sampled or batch.old_logprobs is not None)
        return masks or (sampled and batch.correction is None)

    def correction(self, batch: StepBatch, logprobs: Tensor) -> Tensor | None:
        """The loss's factor ``[N]`` under the policy's `logprobs` of all tokens; None if it is 1 for all."""
        return loss_correction(
            logprobs, self.config, advantages=self.step_advantages(batch), mask=batch.weights,
            old_logprobs=batch.old_logprobs, sampling_logprobs=batch.sampling_logprobs, known=batch.correction,
            cu_seqlens=send(batch.offsets, logprobs.device),
        )  # fmt: skip

    def microbatches(self, batch: StepBatch) -> Iterator[Microbatch]:
        """This process's microbatches of the active samples, on the device."""
        config, device = self.config, self.accelerator.device
        budget, pad = config.max_tokens_per_microbatch, self.pad_token_id
        shares = self.packed and config.share_prompts != "never"
        rows = plan_rows(batch.samples, batch.active, budget if shares else 0)
        if size() == 1:
            dealt = packing.fill_microbatches(rows, budget, self.packed)
        else:
            fair = min(budget, packing.fair_share(rows, size())) if shares else 0
            rows = plan_rows(batch.samples, batch.active, fair)
            dealt = packing.deal_microbatches(rows, budget, self.packed, size())[rank()]
        for chosen in dealt:
            if chosen:
                microbatch = build_microbatch(batch.samples, chosen, batch.offsets, pad, self.packed)
            else:
                microbatch = packing.empty_microbatch(pad, self.packed)
            if batch.support is not None:
                microbatch.support = batch.support.take(microbatch.tokens)
            yield microbatch.to(device)

    def score_reference(self, batch: StepBatch) -> Tensor:
        """Log-probabilities ``[N]`` under the reference policy."""
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
        """A context in which the policy has the adapter that the run began with: a frozen copy, or none."""
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
    def score(self, policy: nn.Module, batch: StepBatch, entropy: bool = False) -> Tensor:
        """Log-probabilities ``[N]`` of the step's tokens under `policy`, or their entropies (1U in the head)."""
        scores = torch.zeros_like(batch.weights)
        with kept_weight_copies():
            for microbatch in self.microbatches(batch):
                found = policy(microbatch, with_entropy=True)[1] if entropy else policy(microbatch)
                scores[microbatch.tokens] = found.float()
        sharding.release(policy)
        return total(scores)

    @torch.no_grad()
    def divergences(self, batch: StepBatch, teach: Callable[[Microbatch], Teaching]) -> Tensor:
        """The divergence ``[N]`` of the policy from a teacher at each of the step's tokens of non-zero weight."""
        self.policy.eval()
        found = torch.zeros_like(batch.weights)
        with kept_weight_copies():
            for microbatch in self.microbatches(batch):
                inputs = self.loss_inputs(batch, microbatch.tokens)
                inputs.teaching = teach(microbatch)
                found[microbatch.tokens] = self.policy(microbatch, inputs).logprobs.float()
        return total(found)

    @torch.no_grad()
    def score_completion(
        self, prompt_ids: list[int], completion_ids: list[int], support: Support | None = None
    ) -> Tensor:
        """Log-probabilities of one completion's tokens under the current policy, over what the sampler kept."""
        samples = [Sample(prompt_ids, completion_ids, 0)]
        rows, offsets = plan_rows(samples, [0], 0), token_offsets(samples)
        microbatch = build_microbatch(samples, rows, offsets, self.pad_token_id, self.packed)
        microbatch.support = support
        self.policy.eval()
        logprobs = self.policy(microbatch.to(self.accelerator.device)).float()
        sharding.release(self.policy)
        return logprobs

    def score_counted(self, batch: StepBatch, entropy: bool = False) -> Tensor:
        """`score` of all completions in the loss under the current policy, groups without variance included."""
        samples = batch.counted.nonzero().squeeze(1).tolist()
        self.policy.eval()
        return self.score(self.policy, dataclasses.replace(batch, active=samples), entropy=entropy)

    def high_entropy(self, batch: StepBatch) -> Tensor:
        """``[N]`` bool: the `top_entropy_quantile` of all counted tokens, by the entropies of the current policy."""
        entropy = self.score_counted(batch, entropy=True)
        return high_entropy_mask(entropy, batch.weights != 0, self.config.top_entropy_quantile)

    def high_covariance(self, batch: StepBatch) -> Tensor:
        """``[N]`` bool: the tokens of high covariance of log-probability and advantage that the objective asks for."""
        o, logprobs, advantages = self.objective, self.score_counted(batch), self.step_advantages(batch)
        counted, candidates = batch.weights != 0, None
        if o.covariance_low is not None and batch.old_logprobs is not None:
            # As in verl, tokens that the clip leaves without a gradient are not drawn.
            ratio = torch.exp(logprobs - batch.old_logprobs)
            clipped = torch.where(advantages > 0, ratio > o.upper_bound, ratio < o.lower_bound)
            candidates = counted & ~clipped
        return covariance_mask(
            logprobs, advantages, counted, o.covariance_ratio, low=o.covariance_low, high=o.covariance_high,
            candidates=candidates,
        )  # fmt: skip
