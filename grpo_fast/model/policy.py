"""A transformers causal LM whose forward ends in log-probabilities, or in the policy loss, instead of in logits.

    policy = FusedPolicy(model, temperature=0.9)
    logprobs = policy(input_ids, attention_mask, logits_to_keep=K)                        # [B, K]
    loss = policy(input_ids, attention_mask, completion_mask=mask, advantages=advantages).loss

It holds no weights of its own: the optimizer gets the model's, `model.generate` and `model.save_pretrained` work as
before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
from grpo_fast.model.layout import IGNORE_INDEX, PACKING, Layout, lay_out
from grpo_kernels import PolicyLoss, PolicyObjective, linear_logprob, linear_policy_loss, token_weights

# Largest difference between the head's and the model's own log-probabilities in the check before training.
HEAD_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-5}
HEAD_TOLERANCE_16_BIT = 0.3
# Tokens of the sequences that are compared.
CHECKED_LENGTH = 64


@dataclass
class LossInputs:
    """Per-token arguments of `linear_policy_loss`, ``[n]`` or ``[B, K]`` each.

    Attributes:
        correct: makes `correction` from the present log-probabilities ``[n]``, called with ``cu_seqlens=``; it costs a
            pass over the head.
        share: the part that this forward has in the optimizer step; its router loss is multiplied by it.
        rows: "all" if every token moves the policy; None lets the head ask the device which ones do.
    """

    objective: PolicyObjective
    advantages: Tensor
    weights: Tensor
    old_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    correction: Tensor | None = None
    correct: Callable[..., Tensor] | None = None
    share: float = 1.0
    rows: Literal["all"] | None = None


class FusedPolicy(nn.Module):
    """Computes per-token log-probabilities, entropies or the policy loss inside its forward, without logits.

    Tied heads, biases, and the logit scale or softcap of the model's config are part of it; each call looks at them
    again, and refuses a head that has got an adapter or a hook since. On the first forward, and whenever the head is
    another one, a short sequence's log-probabilities are compared with those of the model's own logits; on the first
    packed one, and the first with images, with those of separate rows. So a model that does something else cannot go
    unnoticed.

    Args:
        model: a transformers causal LM, or its PeftModel, compiled, DDP or FSDP2 (`fully_shard`) form. DDP and FSDP2
            may as well be put around the FusedPolicy; they find everything inside its forward. Of a model compiled as
            a whole the original is run; compile its layers, or `model.base_model`, in place.
        temperature: sampling temperature, which divides the logits; from 1e-6 to 1e6.
        max_buffer_bytes: temporary memory of the head; see `linear_logprob`.
        check: compare on the first forwards, as above.

    Raises:
        UserError: the model has no linear output head, or the head carries an adapter or a hook, or is quantised; it
            is wrapped in something that is not supported, or is no module; `temperature` is out of range.
    """

    def __init__(
        self, model: nn.Module, temperature: float = 1.0, max_buffer_bytes: int | None = None, check: bool = True
    ):
        super().__init__()
        if not isinstance(model, nn.Module):
            raise UserError(f"FusedPolicy needs a loaded transformers model, got {model!r:.60}")
        self.model, self.check = model, check
        self.head_options = {"temperature": require_temperature(temperature), "max_buffer_bytes": max_buffer_bytes}
        # What was compared with the model's own logits last, and the inputs beside which packed rows were.
        self.compared_head: tuple | None = None
        self.compared_packed: set[tuple[str, ...]] = set()
        # It may be on the meta device now, to get its weights later.
        output_head(self.causal_lm)
        require_no_skipped_hooks(self.model)

    @property
    def causal_lm(self) -> nn.Module:
        """The transformers model inside its wrappers."""
        *_, model = wrappers(self.model)
        return model

    def _inspect(self) -> tuple:
        """Refuse a head that does more than multiply, and take the logit transform from the model's config as it is
        now; what the log-probabilities depend on beside weights is returned."""
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
        share: float = 1.0,
        return_entropy: bool = False,
        return_aux_loss: bool = False,
        **model_inputs: Any,
    ) -> PolicyLoss | Tensor | tuple[Tensor, ...]:
        """Log-probabilities of the last K tokens of each row; with `advantages` the policy loss on them.

        A token is scored where it and the one before it are no padding and belong to one sequence, and where
        `completion_mask` is not 0. Elsewhere its log-probability and entropy are 0, and the head does no work.

        Args:
            input_ids: ``[B, T]`` int64, padded on either side or on both; or packed, ``[1, T]``: sequences one behind
                another. `cu_seqlens`, a `position_ids` that starts again, an `attention_mask` that numbers sequences
                (1 1 2 2 2), or transformers' `cu_seq_lens_q`, `cu_seq_lens_k` and `seq_idx` say where they begin;
                several of these have to agree.
            attention_mask: ``[B, T]``, 0 where there is padding.
            position_ids: ``[B, T]``, or ``[3, B, T]`` (``[4, B, T]`` with the text's) for models that place images; by
                default padding is not counted, as in `model.generate`.
            completion_mask: ``[B, K]`` for the last K tokens, 0 where one is not scored.
            logits_to_keep: K, where there is no `completion_mask`; by default T - 1.
            cu_seqlens: ``[S + 1]`` int offsets of packed sequences, from 0 to T.
            advantages: ``[B]`` or ``[B, K]``; of packed sequences ``[S]`` or ``[1, K]``.
            weights: ``[B, K]``, mask and normaliser by `grpo_kernels.token_weights`. By default those of this call
                alone; give them where several calls make up one optimizer step.
            objective: what is minimised, such as ``grpo_kernels.PRESETS["dapo"]``.
            old_logprobs, ref_logprobs, correction: ``[B, K]``, as in `grpo_kernels.policy_loss`.
            share: factor of a mixture of experts' router loss, which is a mean over the tokens of this call: 1 / calls,
                or the call's share of the tokens, where several make up one optimizer step.
            return_entropy: entropies (nats) as well.
            return_aux_loss: without `advantages`, the router loss as well (times its coefficient, not `share`).
            **model_inputs: passed on to the model, images for instance; names that its forward has.

        Returns:
            ``logprobs [B, K]``, or a tuple of it with ``entropy [B, K]`` and the 0-dim router loss, as asked for;
            float32 (float64 for a float64 model), differentiable in the model's parameters. With `advantages`
            :class:`grpo_kernels.PolicyLoss`: a differentiable ``loss``, to be backpropagated once, and detached
            ``stats``, ``logprobs`` and (as asked for) ``entropy``. If the model's config sets `output_router_logits`,
            its router loss is part of ``loss``, as in transformers.

        Raises:
            UserError: arguments do not fit together or are unknown, the head has changed into one that is not
                supported, the model transforms its logits in an unknown way, or it cannot take packed input.
            ValueError: a loss argument has a wrong shape, or one that `objective` needs is missing.
        """
        fingerprint = self._inspect()
        packing = {name: model_inputs.pop(name) for name in PACKING if name in model_inputs}
        inner = body(self.causal_lm)
        check_keywords(model_inputs, self.causal_lm, inner, (*forward_arguments(self), *PACKING))
        if not isinstance(objective, PolicyObjective):
            raise UserError(f"objective must be a PolicyObjective, such as PRESETS['dapo'], got {objective!r:.60}")
        if isinstance(share, bool) or not isinstance(share, int | float | Tensor):
            raise UserError(f"share must be a number, got {share!r:.60}")
        check_tensors(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            completion_mask=completion_mask, cu_seqlens=cu_seqlens, advantages=advantages, weights=weights,
            old_logprobs=old_logprobs, ref_logprobs=ref_logprobs, correction=correction,
            **{name: value for name, value in packing.items() if not name.startswith("max_length")},
        )  # fmt: skip
        layout = lay_out(input_ids, attention_mask, position_ids, completion_mask, logits_to_keep, cu_seqlens, packing)
        check_token_ids(input_ids, self.causal_lm.config, bool(model_inputs))
        if position_ids is not None and position_ids.dim() == 3 and not places_images(inner):
            raise UserError(f"{type(inner).__name__} takes position_ids [B, T], got {list(position_ids.shape)}")
        if advantages is not None and advantages.device.type == "cpu" and not advantages.isfinite().all():
            value = advantages[~advantages.isfinite()][0].item()
            raise UserError(f"advantages holds {value}; allowed are finite numbers")
        loss = None
        if advantages is not None:
            loss = LossInputs(objective, advantages, weights, old_logprobs, ref_logprobs, correction, share=share)
            loss = _flat(loss, layout)
        given = {"weights": weights, "old_logprobs": old_logprobs, "ref_logprobs": ref_logprobs}
        given["objective"] = None if objective == PolicyObjective() else objective
        for name, value in {**given, "correction": correction}.items():
            if loss is None and value is not None:
                raise UserError(f"{name} belongs to the loss, which needs advantages as well")
        if return_aux_loss and not self.routes:
            raise UserError("return_aux_loss needs a mixture of experts with output_router_logits in its config")
        if layout.segments is not None:
            self._require_packing("its attention cannot be replaced", install(self.causal_lm))

        def compute() -> PolicyLoss | Tensor | tuple[Tensor, ...]:
            if self.check:
                self._compare(layout, fingerprint, model_inputs)
            return self._run(layout, loss, return_entropy, return_aux_loss, model_inputs)

        return within(self.model, compute)

    def _compare(self, layout: Layout, fingerprint: tuple, model_inputs: dict) -> None:
        """Compare what has not been compared yet: the head with the model's own logits, packed rows with separate
        ones, and packed rows with each kind of images with separate ones that have the same."""
        row, mask = layout.input_ids[0], layout.attention_mask
        # Placeholders of images may lie outside of the vocabulary.
        highest = self.causal_lm.config.get_text_config().vocab_size - 1
        if fingerprint != self.compared_head:
            real = row if mask is None or not mask[0].any() else row[mask[0] != 0]
            self._check_head(real[:CHECKED_LENGTH].clamp(0, highest).tolist())
            self.compared_head = fingerprint
        if layout.segments is None:
            return
        if () not in self.compared_packed:
            ids = row[:CHECKED_LENGTH].clamp(0, highest)
            self._check_packed(torch.stack([ids, ids.flip(0)]))
            self.compared_packed.add(())
        names = tuple(sorted(name for name, value in model_inputs.items() if isinstance(value, Tensor | list)))
        if names not in self.compared_packed:
            self._check_packed(torch.stack([row, row]), {name: model_inputs[name] for name in names})
            self.compared_packed.add(names)

    def _run(
        self, layout: Layout, loss: LossInputs | None, with_entropy: bool, with_router: bool, model_inputs: dict
    ) -> PolicyLoss | Tensor | tuple[Tensor, ...]:
        routed = self.routes and (loss is not None or with_router)
        hidden, router = self._hidden_states(layout, routed, model_inputs)
        hidden = hidden.index_select(1, layout.sources)
        if loss is None:
            found = self._head(hidden, layout.targets, None, with_entropy)
            if not with_router:
                return found
            return (*found, router) if with_entropy else (found, router)
        shape, targets = layout.targets.shape, layout.targets
        if layout.cu_seqlens is not None:
            hidden, targets = hidden.flatten(0, 1), targets.flatten()
        result = self._head(hidden, targets, loss, with_entropy, layout.cu_seqlens, router)
        entropy = None if result.entropy is None else result.entropy.view(shape)
        return result._replace(logprobs=result.logprobs.view(shape), entropy=entropy)

    @property
    def routes(self) -> bool:
        """Whether the model is a mixture of experts whose config asks for the router loss."""
        return bool(getattr(self.causal_lm.config.get_text_config(), "output_router_logits", False))

    def _hidden_states(self, layout: Layout, routed: bool, model_inputs: dict) -> tuple[Tensor, Tensor | None]:
        """``[B, T, H]`` and the router loss, if `routed`."""
        inner = body(self.causal_lm)
        options: dict[str, Any] = {"attention_mask": layout.attention_mask, "use_cache": False, **model_inputs}
        if layout.segments is not None:
            # A mask of four dimensions is passed through: none is made, and packed attention needs none.
            mask = layout.input_ids.new_zeros(1, 1, 1, 1, dtype=torch.bool)
            options |= {"attention_mask": mask, "segments": layout.segments}
        positions = layout.position_ids
        if not layout.given_positions and has_images(model_inputs, layout.input_ids):
            # The model numbers images itself, where each row is one sequence.
            positions = None if layout.segments is None else image_positions(inner, layout, model_inputs)
        # Some models know no positions.
        if positions is not None and (layout.given_positions or "position_ids" in forward_arguments(inner)):
            options["position_ids"] = positions
        return self._body(layout.input_ids, options, routed, layout.attention_mask)

    def _body(
        self, input_ids: Tensor, options: dict[str, Any], routed: bool, padding_mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The model without its head: ``[B, T, H]`` and the router loss, if `routed`."""
        model = self.causal_lm
        if routed:
            options["output_router_logits"] = True
        output = body(model)(input_ids=input_ids, **options)
        return output.last_hidden_state, router_loss(model, output.router_logits, padding_mask) if routed else None

    def _head(
        self,
        hidden: Tensor,
        targets: Tensor,
        loss: LossInputs | None = None,
        with_entropy: bool = False,
        cu_seqlens: Tensor | None = None,
        router: Tensor | None = None,
        rows: Literal["all"] | None = None,
    ) -> PolicyLoss | Tensor | tuple[Tensor, Tensor]:
        """From the hidden states that predict `targets` to log-probabilities, or to the loss.

        `rows` is "all" if no target is ignored and, with a loss, every token moves the policy.
        """
        weight, bias, group = head_tensors(self.causal_lm.get_output_embeddings())
        options = {
            "bias": bias,
            "return_entropy": with_entropy,
            "process_group": group,
            "rows": rows,
            **self.head_options,
        }
        if loss is None:
            found = linear_logprob(hidden, weight, targets, **options)
            # A view would lose the hook that FSDP2 puts on it if a caller changed it in place.
            return tuple(part.clone() for part in found) if with_entropy else found.clone()
        old_logprobs, correction = loss.old_logprobs, loss.correction
        folds = loss.objective.kind == "vespo" and (correction is not None or loss.correct is not None)
        if loss.correct is not None or (folds and old_logprobs is None):
            with torch.no_grad():
                present = linear_logprob(hidden, weight, targets, **options | {"return_entropy": False})
            old_logprobs = present if folds and old_logprobs is None else old_logprobs
        if loss.correct is not None:
            correction = loss.correct(present, cu_seqlens=cu_seqlens)
        if folds:
            # VESPO's weight is a function of the whole ratio, the sampler's included (TRL's bounds).
            old_logprobs, correction = old_logprobs - correction.log().clamp(math.log(1e-8), 20.0), None
        result = linear_policy_loss(
            hidden, weight, targets, loss.advantages, loss.weights, loss.objective, old_logprobs=old_logprobs,
            ref_logprobs=loss.ref_logprobs, correction=correction, cu_seqlens=cu_seqlens, **options,
        )  # fmt: skip
        return result if router is None else result._replace(loss=result.loss + loss.share * router)

    def check_head(self, prompt_ids: list[int]) -> None:
        """Compare with the model's own logits on one prompt, so that an unknown logit transform cannot slip through.

        Raises:
            UserError: the log-probabilities differ, or the head does more than multiply.
        """
        self._inspect()
        within(self.model, partial(self._check_head, prompt_ids))

    @torch.no_grad()
    def _check_head(self, prompt_ids: list[int]) -> None:
        model = self.causal_lm
        weight = next(model.get_output_embeddings().parameters())
        ids = torch.tensor([[*prompt_ids, prompt_ids[-1]][:CHECKED_LENGTH]], device=weight.device)
        with exactly(model, weight.device):
            # Not by calling the model, which may have hooks that expect one call.
            output = model.forward(input_ids=ids, use_cache=False)
            logits = output.logits[0, :-1].to(torch.promote_types(weight.dtype, torch.float32))
            expected = (logits / self.head_options["temperature"]).log_softmax(-1)
            expected = expected.gather(1, ids[0, 1:, None]).squeeze(1)
            layout = lay_out(ids)
            hidden, _ = self._hidden_states(layout, False, {})
            got = self._head(hidden[0, :-1], ids[0, 1:])
        difference = (got - expected).abs().max().item()
        if not difference <= HEAD_TOLERANCE.get(weight.dtype, HEAD_TOLERANCE_16_BIT):
            raise UserError(
                f"{type(model).__name__} transforms its logits in a way that is not supported: "
                f"log-probabilities differ by {difference:.3g}"
            )

    def _require_packing(self, reason: str, possible: bool, inputs: str = "") -> None:
        if not possible:
            name, attention = type(self.causal_lm).__name__, self.causal_lm.config._attn_implementation
            raise UserError(
                f"packed input{inputs} is not possible with {name} and attention {attention!r}, pad instead: {reason}"
            )

    @torch.no_grad()
    def _check_packed(self, rows: Tensor, model_inputs: dict | None = None) -> None:
        """Compare two sequences ``[2, n]``, packed, with the same two in rows of their own.

        Args:
            rows: the tokens; with `model_inputs` the same ones twice.
            model_inputs: images and the like of one of the rows; both get them.

        Raises:
            UserError: the model cannot take the packed ones, or gives something else.
        """
        length, device, names = rows.shape[1], rows.device, ""
        layouts = lay_out(rows), lay_out(rows.reshape(1, -1), cu_seqlens=torch.arange(3, device=device) * length)
        inputs: list[dict] = [{}, {}]
        if model_inputs:
            names = f" with {', '.join(sorted(model_inputs))}"
            # One number a token makes two rows or a longer one; images are twice as many either way.
            inputs = [{key: twice(x, length, axis) for key, x in model_inputs.items()} for axis in (0, 1)]
            inputs[0]["segments"] = REQUIRE_CAUSAL
        # Placeholders of images may lie outside of the vocabulary.
        vocab, targets, found = self.causal_lm.config.get_text_config().vocab_size, rows[:, 1:], []
        targets = targets.masked_fill((targets < 0) | (targets >= vocab), IGNORE_INDEX)
        try:
            with exactly(self.causal_lm, device):
                for layout, more in zip(layouts, inputs, strict=True):
                    hidden = self._hidden_states(layout, False, more)[0].view(2, length, -1)
                    found.append(self._head(hidden[:, :-1], targets))
        except Exception as error:
            # Models that keep a state along the row fail in many ways.
            self._require_packing(one_line(error), False, names)
        difference = (found[0] - found[1]).abs().max().item()
        reason = f"log-probabilities differ by {difference:.3g} from those of separate rows"
        self._require_packing(reason, difference <= HEAD_TOLERANCE.get(hidden.dtype, HEAD_TOLERANCE_16_BIT), names)


def _flat(loss: LossInputs, layout: Layout) -> LossInputs:
    """The loss's arguments with weights, and as packed tensors where the row is packed."""
    packed, mask = layout.cu_seqlens is not None, layout.targets != IGNORE_INDEX
    if loss.weights is None:
        if loss.objective.aggregation == "constant_length":
            raise UserError("an objective with a constant length needs weights: see grpo_kernels.token_weights")
        offsets = {"cu_seqlens": layout.cu_seqlens} if packed else {}
        loss.weights = token_weights(mask.flatten() if packed else mask, loss.objective.aggregation, **offsets)
    if packed:
        if loss.advantages.shape == (len(layout.cu_seqlens) - 1,):
            # As many sequences as tokens would be taken for tokens.
            loss.advantages = loss.advantages.repeat_interleave(layout.cu_seqlens.diff())
        for name, value in vars(loss).items():
            if isinstance(value, Tensor) and value.shape == mask.shape:
                setattr(loss, name, value.flatten())
    return loss


@contextmanager
def exactly(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Without dropout and without autocast, for a comparison."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for module in training:
            module.training = True
