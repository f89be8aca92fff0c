"""A transformers causal LM whose forward ends in log-probabilities or in the policy loss instead of logits.

    policy = FusedPolicy(model, temperature=0.9)
    logprobs = policy(input_ids, attention_mask, logits_to_keep=K)                        # [B, K]
    loss = policy(input_ids, attention_mask, completion_mask=mask, advantages=advantages).loss

It adds no weights: the optimizer gets the model's, and `model.generate` and `model.save_pretrained` work as before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from grpo_fast.errors import UserError, one_line
from grpo_fast.model.attention import REQUIRE_CAUSAL, install
from grpo_fast.model.heads import (
    body,
    head_tensors,
    logit_transform,
    output_head,
    require_no_skipped_hooks,
    require_temperature,
    require_values,
    router_loss,
    within,
    wrappers,
)
from grpo_fast.model.images import has_images, image_positions, places_images, twice
from grpo_fast.model.inputs import check_keywords, check_tensors, check_token_ids, forward_arguments
from grpo_fast.model.layout import IGNORE_INDEX, PACKING, Microbatch, lay_out
from grpo_kernels import (
    PolicyLoss,
    PolicyObjective,
    Support,
    linear_distillation,
    linear_logprob,
    linear_policy_loss,
    token_weights,
)

# Largest difference between log-probabilities that are compared before training: those of the head and of the model's
# own logits, or of packed and of separate rows.
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-5}
TOLERANCE_16_BIT = 0.3
# Tokens of the sequences that are compared.
CHECKED_LENGTH = 64
NOT_REPLACED = "its attention cannot be replaced"


@dataclass(kw_only=True)
class Teaching:
    """What a teacher knows of a microbatch's targets: hidden states ``[n, H_t]`` and its head, as arguments of
    `linear_distillation`, in which `beta` chooses the divergence."""

    hidden: Tensor
    head: dict[str, Any]
    beta: float


@dataclass(kw_only=True)
class LossInputs:
    """Per-token arguments of `linear_policy_loss`, ``[n]`` or ``[B, K]`` each.

    Attributes:
        correct: computes `correction` from the present log-probabilities ``[n]``, called with ``cu_seqlens=``; it costs
            a pass over the head.
        share: this forward's share of the optimizer step, which multiplies its router loss.
        rows: "all" if every token moves the policy; None lets the head ask the device which ones do.
        teaching: a teacher's view of the tokens; the loss is then the weighted divergence from it, and nothing else.
    """

    objective: PolicyObjective
    advantages: Tensor
    weights: Tensor
    old_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    correction: Tensor | None = None
    correct: Callable[..., Tensor] | None = None
    selected: Tensor | None = None
    share: float | Tensor = 1.0
    rows: Literal["all"] | None = None
    teaching: Teaching | None = None


class FusedPolicy(nn.Module):
    """Computes per-token log-probabilities, entropies or the policy loss inside its forward, without logits.

    Tied heads, biases, and the logit scale or softcap of the model's config are included; each call reads them again,
    and refuses a head that has received an adapter or a hook in the meantime. The first forward, and the first one
    with another head, compares the log-probabilities of a short sequence with those of the model's own logits; the
    first packed one, and the first with images, compares packed rows with separate ones. So a model that does
    something else is noticed.

    Args:
        model: a transformers causal LM, or its PeftModel, compiled, DDP or FSDP2 (`fully_shard`) form. DDP and FSDP2
            may also wrap the FusedPolicy; their hooks run inside its forward. If the model is compiled as a whole, the
            original is run; compile its layers, or `model.base_model`, in place.
        temperature: sampling temperature, which divides the logits; from 1e-6 to 1e6.
        max_buffer_bytes: temporary memory of the head; see `linear_logprob`.
        check: compare on the first forwards, as above.

    Raises:
        UserError: the model has no linear output head, or the head carries an adapter or a hook, or is quantised; the
            model has a wrapper that is not supported, or is no module; `temperature` is out of range.
    """

    def __init__(
        self, model: nn.Module, temperature: float = 1.0, max_buffer_bytes: int | None = None, check: bool = True
    ):
        super().__init__()
        if not isinstance(model, nn.Module):
            raise UserError(f"FusedPolicy needs a loaded transformers model, got {model!r:.60}")
        self.model, self.check = model, check
        self.head_options = {"temperature": require_temperature(temperature), "max_buffer_bytes": max_buffer_bytes}
        # The head that was compared last, and the sets of inputs with which packed rows were.
        self.compared_head: tuple | None = None
        self.compared_packed: set[tuple[str, ...]] = set()
        # The model may be on the meta device now, and get its weights later.
        output_head(self.causal_lm)
        require_no_skipped_hooks(self.model)

    @property
    def causal_lm(self) -> nn.Module:
        """The transformers model inside its wrappers."""
        *_, model = wrappers(self.model)
        return model

    def _inspect(self) -> tuple:
        """Refuse a head that does more than multiply, and read the logit transform from the model's present config.

        Returns what the log-probabilities depend on besides the weights.
        """
        model = self.causal_lm
        head, transform = output_head(model), logit_transform(model.config)
        require_values(head)
        require_no_skipped_hooks(self.model)
        if not getattr(model.config, "return_dict", True):
            raise UserError("the model's config has return_dict=False; set model.config.return_dict = True")
        self.head_options |= transform
        return head, vars(model).get("forward"), *transform.values()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        completion_mask: Tensor | None = None,
        logits_to_keep: int | None = None,
        cu_seqlens: Tensor | None = None,
        advantages: Tensor | None = None,
        weights: Tensor | None = None,
        objective: PolicyObjective = PolicyObjective(),
        old_logprobs: Tensor | None = None,
        ref_logprobs: Tensor | None = None,
        correction: Tensor | None = None,
        selected: Tensor | None = None,
        support: Support | None = None,
        share: float = 1.0,
        return_entropy: bool = False,
        return_aux_loss: bool = False,
        **model_inputs: Any,
    ) -> PolicyLoss | Tensor | tuple[Tensor, ...]:
        """Log-probabilities of the last K tokens of each row; with `advantages` the policy loss on them.

        A token is scored if it and the previous one are no padding and belong to one sequence, and `completion_mask`
        is not 0. Elsewhere its log-probability and entropy are 0, and the head does no work.

        Args:
            input_ids: ``[B, T]`` int64, padded on either side or on both; or packed, ``[1, T]``: sequences one after
                another. `cu_seqlens`, a `position_ids` that restarts, an `attention_mask` that numbers the sequences
                (1 1 2 2 2), or transformers' `cu_seq_lens_q`, `cu_seq_lens_k` and `seq_idx` define where they begin;
                if several are given, they have to agree.
            attention_mask: ``[B, T]``, 0 for padding.
            position_ids: ``[B, T]``, or ``[3, B, T]`` (``[4, B, T]`` with the text's) for models that place images; by
                default padding is not counted, as in `model.generate`.
            completion_mask: ``[B, K]`` for the last K tokens, 0 for those that are not scored.
            logits_to_keep: K, if there is no `completion_mask`; by default T - 1.
            cu_seqlens: ``[S + 1]`` int offsets of packed sequences, from 0 to T.
            advantages: ``[B]`` or ``[B, K]``; of packed sequences ``[S]`` or ``[1, K]``.
            weights: ``[B, K]``, mask and normaliser from `grpo_kernels.token_weights`. By default those of this call
                alone; pass them if several calls make up one optimizer step.
            objective: what is minimised, such as ``grpo_kernels.PRESETS["dapo"]``.
            old_logprobs, ref_logprobs, correction, selected: ``[B, K]``, as in `grpo_kernels.policy_loss`.
            support: the ids that a truncated sampler (top_p, top_k, min_p) kept for each of the B K tokens, one row
                after another, as in `grpo_kernels.linear_logprob`; by default the whole vocabulary.
            share: factor of a mixture of experts' router loss, which is a mean over the tokens of this call: 1 / calls,
                or the call's share of the tokens, if several calls make up one optimizer step.
            return_entropy: entropies (nats) as well.
            return_aux_loss: without `advantages`, the router loss as well (times its coefficient, not `share`).
            **model_inputs: passed on to the model, images for instance; names that its forward has.

        Returns:
            ``logprobs [B, K]``, or a tuple of it with ``entropy [B, K]`` and the 0-dim router loss, as requested;
            float32 (float64 for a float64 model), differentiable in the model's parameters. With `advantages`
            :class:`grpo_kernels.PolicyLoss`: a differentiable ``loss``, to be backpropagated once, and detached
            ``stats``, ``logprobs`` and (if requested) ``entropy``. If the model's config sets `output_router_logits`,
            its router loss is part of ``loss``, as in transformers.

        Raises:
            UserError: arguments do not fit together or are unknown, the head has changed into one that is not
                supported, the model transforms its logits in an unknown way, or it cannot take packed input.
            ValueError: a loss argument has a wrong shape, or one that `objective` needs is missing.
        """
        fingerprint, model = self._inspect(), self.causal_lm
        inner = body(model)
        packing = {name: model_inputs.pop(name) for name in PACKING if name in model_inputs}
        check_keywords(model_inputs, model, inner, (*forward_arguments(self), *PACKING))
        if not isinstance(objective, PolicyObjective):
            raise UserError(f"objective must be a PolicyObjective, such as PRESETS['dapo'], got {objective!r:.60}")
        if isinstance(share, bool) or not isinstance(share, int | float | Tensor):
            raise UserError(f"share must be a number, got {share!r:.60}")
        given = {
            "weights": weights, "old_logprobs": old_logprobs, "ref_logprobs": ref_logprobs, "correction": correction,
            "selected": selected,
        }  # fmt: skip
        check_tensors(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            completion_mask=completion_mask, cu_seqlens=cu_seqlens, advantages=advantages, **given,
            **{name: value for name, value in packing.items() if not name.startswith("max_length")},
        )  # fmt: skip
        microbatch = lay_out(
            input_ids, attention_mask, position_ids, completion_mask, logits_to_keep, cu_seqlens, packing
        )
        microbatch.support = support
        check_token_ids(input_ids, model.config, bool(model_inputs))
        if position_ids is not None and position_ids.dim() == 3 and not places_images(inner):
            raise UserError(f"{type(inner).__name__} takes position_ids [B, T], got {list(position_ids.shape)}")
        loss = None
        if advantages is not None:
            if advantages.device.type == "cpu" and not advantages.isfinite().all():
                value = advantages[~advantages.isfinite()][0].item()
                raise UserError(f"advantages holds {value}; allowed are finite numbers")
            loss = _loss_inputs(microbatch, objective, advantages, share, **given)
        else:
            given["objective"] = None if objective == PolicyObjective() else objective
            for name, value in given.items():
                if value is not None:
                    raise UserError(f"{name} belongs to the loss, which needs advantages as well")
        if return_aux_loss and not self.routes:
            raise UserError("return_aux_loss needs a mixture of experts with output_router_logits in its config")
        if microbatch.segments is not None:
            self._require_packing(None if install(model) else NOT_REPLACED)

        def compute() -> PolicyLoss | Tensor | tuple[Tensor, ...]:
            if self.check:
                self._compare(microbatch, fingerprint, model_inputs)
            return self._run(microbatch, loss, return_entropy, return_aux_loss, model_inputs)

        return within(self.model, compute)

    @property
    def routes(self) -> bool:
        """Whether the model is a mixture of experts whose config enables the router loss."""
        return bool(getattr(self.causal_lm.config.get_text_config(), "output_router_logits", False))

    def _run(
        self, microbatch: Microbatch, loss: LossInputs | None = None, with_entropy: bool = False,
        with_router: bool = False, model_inputs: Mapping[str, Any] | None = None,
    ) -> PolicyLoss | Tensor | tuple[Tensor, ...]:  # fmt: skip
        """The one forward: log-probabilities of the targets (and entropies, router loss), or with `loss` the loss."""
        routed = self.routes and (loss is not None or with_router)
        hidden, router = self._hidden_states(microbatch, routed, model_inputs or {})
        head, targets, shape = self._head(), microbatch.targets, microbatch.targets.shape
        head["support"] = microbatch.support
        if loss is None:
            rows = "all" if microbatch.complete else None
            found = linear_logprob(hidden, targets=targets, return_entropy=with_entropy, rows=rows, **head)
            # A view would lose the hook that FSDP2 puts on it if a caller changed it in place.
            parts = [part.clone() for part in (found if with_entropy else (found,))]
            parts += [router] if with_router else []
            return tuple(parts) if len(parts) > 1 else parts[0]
        if microbatch.cu_seqlens is not None:
            hidden, targets = hidden.flatten(0, -2), targets.flatten()
        if loss.teaching is not None:
            return distillation_loss(hidden, head, loss.teaching, loss.weights)
        old_logprobs, correction = loss.old_logprobs, loss.correction
        folds = loss.objective.kind == "vespo" and (correction is not None or loss.correct is not None)
        if loss.correct is not None or (folds and old_logprobs is None):
            with torch.no_grad():
                present = linear_logprob(hidden, targets=targets, rows=loss.rows, **head)
            old_logprobs = present if folds and old_logprobs is None else old_logprobs
            if loss.correct is not None:
                correction = loss.correct(present, cu_seqlens=microbatch.cu_seqlens)
        if folds:
            # VESPO's weight is a function of the whole ratio, including the sampler's (TRL's bounds).
            old_logprobs, correction = old_logprobs - correction.log().clamp(math.log(1e-8), 20.0), None
        result = linear_policy_loss(
            hidden, targets=targets, advantages=loss.advantages, weights=loss.weights, objective=loss.objective,
            old_logprobs=old_logprobs, ref_logprobs=loss.ref_logprobs, correction=correction,
            selected=loss.selected, cu_seqlens=microbatch.cu_seqlens, return_entropy=with_entropy, rows=loss.rows,
            **head,
        )  # fmt: skip
        return result._replace(
            loss=result.loss if router is None else result.loss + loss.share * router,
            logprobs=result.logprobs.view(shape),
            entropy=None if result.entropy is None else result.entropy.view(shape),
        )

    def _hidden_states(
        self, microbatch: Microbatch, routed: bool, model_inputs: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """The hidden states that predict the targets, ``[n, H]`` or ``[B, K, H]``, and the router loss, if `routed`."""
        model, inner = self.causal_lm, body(self.causal_lm)
        options: dict[str, Any] = {"attention_mask": microbatch.attention_mask, "use_cache": False, **model_inputs}
        if microbatch.segments is not None:
            # transformers passes a mask of four dimensions through and makes none; packed attention needs none.
            mask = microbatch.input_ids.new_zeros(1, 1, 1, 1, dtype=torch.bool)
            options |= {"attention_mask": mask, "segments": microbatch.segments}
        positions = microbatch.position_ids
        if microbatch.default_positions and has_images(model_inputs, microbatch.input_ids):
            # The model numbers images itself where each row is one sequence.
            positions = None if microbatch.segments is None else image_positions(inner, microbatch, model_inputs)
        # Some models have no positions.
        if positions is not None and (not microbatch.default_positions or "position_ids" in forward_arguments(inner)):
            options["position_ids"] = positions
        if routed:
            options["output_router_logits"] = True
        output = inner(input_ids=microbatch.input_ids, **options)
        router = None
        if routed:
            router = router_loss(model, output.router_logits, microbatch.attention_mask)
            router = model.config.get_text_config().router_aux_loss_coef * router
        hidden = output.last_hidden_state.flatten(0, 1).index_select(0, microbatch.sources.flatten())
        return hidden.unflatten(0, microbatch.sources.shape), router

    def _head(self) -> dict[str, Any]:
        """Arguments of the operations: the output head and what it does to the logits."""
        return {**head_tensors(self.causal_lm.get_output_embeddings()), **self.head_options}

    def _compare(self, microbatch: Microbatch, fingerprint: tuple, model_inputs: dict[str, Any]) -> None:
        """Compare what has not been compared yet.

        The head with the model's own logits, packed rows with separate ones, and packed rows with each set of images
        with separate ones that have the same.
        """
        row, mask = microbatch.input_ids[0], microbatch.attention_mask
        # Placeholders of images may be outside the vocabulary.
        highest = self.causal_lm.config.get_text_config().vocab_size - 1
        if fingerprint != self.compared_head:
            real = row if mask is None or not mask[0].any() else row[mask[0] != 0]
            self._check_head(real[:CHECKED_LENGTH].clamp(0, highest).tolist())
            self.compared_head = fingerprint
        if microbatch.segments is None:
            return
        if () not in self.compared_packed:
            ids = row[:CHECKED_LENGTH].clamp(0, highest)
            self._check_packed(torch.stack([ids, ids.flip(0)]), {})
            self.compared_packed.add(())
        names = tuple(sorted(name for name, value in model_inputs.items() if isinstance(value, Tensor | list)))
        if names not in self.compared_packed:
            self._check_packed(torch.stack([row, row]), {name: model_inputs[name] for name in names})
            self.compared_packed.add(names)

    def check_head(self, prompt_ids: list[int]) -> None:
        """Compare with the model's own logits on one prompt, so that an unknown logit transform is noticed.

        Under autocast they are compared twice: in the weights' precision, which shows small differences, and under
        autocast, as the head will run.

        Raises:
            UserError: the log-probabilities differ, or the head does more than multiply.
        """
        self._inspect()
        within(self.model, partial(self._check_head, prompt_ids))

    @torch.no_grad()
    def _check_head(self, prompt_ids: list[int]) -> None:
        weight = next(self.causal_lm.get_output_embeddings().parameters())
        ids = torch.tensor([[*prompt_ids, prompt_ids[-1]][:CHECKED_LENGTH]], device=weight.device)
        self._check_head_in(weight.dtype, ids)
        if torch.is_autocast_enabled(weight.device.type):
            self._check_head_in(torch.get_autocast_dtype(weight.device.type), ids, autocast=True)

    def _check_head_in(self, dtype: torch.dtype, ids: Tensor, autocast: bool = False) -> None:
        """Compare on ``ids [1, n]``; `dtype`, that of products, decides how large a difference may be."""
        model = self.causal_lm
        with exactly(model, ids.device, autocast):
            # Calling the model would run its hooks, which may expect one call.
            output = model.forward(input_ids=ids, use_cache=False)
            logits = output.logits[:, :-1].to(torch.promote_types(dtype, torch.float32))
            expected = (logits / self.head_options["temperature"]).log_softmax(-1)
            expected = expected.gather(2, ids[:, 1:, None]).squeeze(2)
            difference = (self._run(lay_out(ids)) - expected).abs().max().item()
        if not difference <= TOLERANCE.get(dtype, TOLERANCE_16_BIT):
            raise UserError(
                f"{type(model).__name__} transforms its logits in a way that is not supported: "
                f"log-probabilities differ by {difference:.3g}{f' under {dtype} autocast' if autocast else ''}"
            )

    def _require_packing(self, obstacle: str | None, inputs: str = "") -> None:
        if obstacle is not None:
            name, attention = type(self.causal_lm).__name__, self.causal_lm.config._attn_implementation
            raise UserError(
                f"packed input{inputs} is not possible with {name} and attention {attention!r}, pad instead: {obstacle}"
            )

    def _check_packed(self, rows: Tensor, model_inputs: dict[str, Any]) -> None:
        """Refuse packed input if two sequences ``[2, n]`` score differently when packed.

        With `model_inputs`, images and other inputs of one row, both rows hold the same tokens and inputs.
        """
        length, names, inputs = rows.shape[1], "", ({}, {})
        separate = lay_out(rows)
        packed = lay_out(rows.reshape(1, -1), cu_seqlens=torch.arange(3, device=rows.device) * length)
        if model_inputs:
            names = f" with {', '.join(sorted(model_inputs))}"
            # Per-token inputs become two rows or a longer one; images are twice as many either way.
            inputs = tuple({key: twice(x, length, axis) for key, x in model_inputs.items()} for axis in (0, 1))
            inputs[0]["segments"] = REQUIRE_CAUSAL
        self._require_packing(self._packing_obstacle(separate, packed, *inputs), names)

    @torch.no_grad()
    def _packing_obstacle(
        self, separate: Microbatch, packed: Microbatch, separate_inputs: dict | None = None,
        packed_inputs: dict | None = None,
    ) -> str | None:  # fmt: skip
        """Why packed rows cannot be used, or None if both microbatches, which score the same tokens, agree."""
        if not install(self.causal_lm):
            return NOT_REPLACED
        vocab, found = self.causal_lm.config.get_text_config().vocab_size, []
        try:
            with exactly(self.causal_lm, packed.input_ids.device):
                for microbatch, inputs in ((separate, separate_inputs), (packed, packed_inputs)):
                    # Placeholders of images may be outside the vocabulary.
                    scored = (microbatch.targets >= 0) & (microbatch.targets < vocab)
                    hidden, _ = self._hidden_states(microbatch, False, inputs or {})
                    targets = microbatch.targets.masked_fill(~scored, IGNORE_INDEX)
                    found.append(linear_logprob(hidden, targets=targets, **self._head())[scored])
        except Exception as error:
            # Models that keep a state along the row fail in many ways.
            return one_line(error)
        difference = (found[0] - found[1]).abs().max().item()
        if difference <= TOLERANCE.get(hidden.dtype, TOLERANCE_16_BIT):
            return None
        return f"log-probabilities differ by {difference:.3g} from those of separate rows"


def _loss_inputs(
    microbatch: Microbatch, objective: PolicyObjective, advantages: Tensor, share: float | Tensor,
    weights: Tensor | None, **others: Tensor | None,
) -> LossInputs:  # fmt: skip
    """The loss's arguments, with weights, and flat if the row is packed."""
    mask, cu_seqlens = microbatch.targets != IGNORE_INDEX, microbatch.cu_seqlens

    def flat(tensor: Tensor) -> Tensor:
        return tensor.flatten() if cu_seqlens is not None and tensor.shape == mask.shape else tensor

    if weights is None:
        if objective.aggregation == "constant_length":
            raise UserError("an objective with a constant length needs weights: see grpo_kernels.token_weights")
        weights = token_weights(flat(mask), objective.aggregation, cu_seqlens=cu_seqlens)
    if cu_seqlens is not None and advantages.shape == (len(cu_seqlens) - 1,):
        # If there are as many sequences as tokens, the operation would take them for the tokens'.
        advantages = advantages.repeat_interleave(cu_seqlens.diff())
    return LossInputs(
        objective=objective, advantages=flat(advantages), weights=flat(weights), share=share,
        **{name: None if tensor is None else flat(tensor) for name, tensor in others.items()},
    )  # fmt: skip


def distillation_loss(hidden: Tensor, head: dict[str, Any], teaching: Teaching, weights: Tensor) -> PolicyLoss:
    """The weighted divergence from a teacher, with its sum over the tokens of non-zero weight in the statistics."""
    head = dict(head)
    if head.pop("process_group", None) is not None:
        raise UserError("a head whose vocabulary is sharded cannot be distilled; load the model whole")
    if head.pop("support", None) is not None:
        raise UserError("the divergence from a teacher covers the whole vocabulary; distil without truncated_support")
    result = linear_distillation(
        hidden, teacher_hidden=teaching.hidden, weights=weights, beta=teaching.beta, **head,
        **{f"teacher_{name}": teaching.head.get(name) for name in ("weight", "bias", "softcap")},
        teacher_logit_scale=teaching.head.get("logit_scale", 1.0),
    )  # fmt: skip
    counted = weights != 0
    stats = {"divergence": result.divergence.sum().double(), "tokens": counted.sum().double()}
    return PolicyLoss(result.loss, stats, result.divergence, None)


@contextmanager
def exactly(model: nn.Module, device: torch.device, autocast: bool = False) -> Iterator[None]:
    """For a comparison: without dropout, and without autocast or with the one that is on."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        with nullcontext() if autocast else torch.autocast(device.type, enabled=False):
            yield
    finally:
        for module in training:
            module.training = True
