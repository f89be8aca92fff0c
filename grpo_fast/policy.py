"""A transformers causal LM whose forward ends in log-probabilities, or in the policy loss, instead of in logits.

    policy = FusedPolicy(model, temperature=0.9)
    logprobs = policy(input_ids, attention_mask, logits_to_keep=K)                        # [B, K]
    loss = policy(input_ids, attention_mask, completion_mask=mask, advantages=advantages).loss

It holds no weights of its own: the optimizer gets the model's, `model.generate` and `model.save_pretrained` work as
before.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from grpo_fast.attention import install
from grpo_fast.errors import UserError, one_line
from grpo_fast.head_weight import head_group, head_weight
from grpo_fast.heads import body, logit_transform, output_head, router_loss, within, wrappers
from grpo_fast.layout import IGNORE_INDEX, Layout, lay_out
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
    """

    objective: PolicyObjective
    advantages: Tensor
    weights: Tensor
    old_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    correction: Tensor | None = None
    correct: Callable[..., Tensor] | None = None
    share: float = 1.0


# A transformers model takes any keyword, so that these would be passed on to it and change nothing.
ELSEWHERE = {
    "temperature": "give it to FusedPolicy(model, temperature=...)",
    "labels": "the tokens that are scored are those of input_ids, by completion_mask or logits_to_keep",
}


class FusedPolicy(nn.Module):
    """Computes per-token log-probabilities, entropies or the policy loss inside its forward, without logits.

    Tied heads, biases, and the logit scale or softcap of the model's config are heeded. On the first forward a short
    sequence's log-probabilities are compared with those of the model's own logits, and on the first packed one with
    those of separate rows, so that a model that does something else cannot go unnoticed.

    Args:
        model: a transformers causal LM, or its PeftModel, compiled, DDP or FSDP2 (`fully_shard`) form. DDP and FSDP2
            may as well be put around the FusedPolicy; they find everything inside its forward. Of a model compiled as
            a whole the original is run; compile its layers, or `model.base_model`, in place.
        temperature: sampling temperature, which divides the logits.
        max_buffer_bytes: temporary memory of the head; see `linear_logprob`.
        check: compare on the first forwards, as above.

    Raises:
        UserError: the model has no linear output head, or the head carries an adapter or is quantised; it is wrapped
            in something that is not supported, or is no module; `temperature` is not above 0.
    """

    def __init__(
        self, model: nn.Module, temperature: float = 1.0, max_buffer_bytes: int | None = None, check: bool = True
    ):
        super().__init__()
        if not isinstance(model, nn.Module):
            raise UserError(f"FusedPolicy needs a loaded transformers model, got {model!r:.60}")
        if not temperature > 0:
            raise UserError(f"temperature must be above 0, got {temperature}")
        self.model = model
        output_head(self.causal_lm)
        self.head_options = {
            "temperature": temperature,
            "max_buffer_bytes": max_buffer_bytes,
            **logit_transform(self.causal_lm.config),
        }
        self.unchecked = {"head", "packed"} if check else set()

    @property
    def causal_lm(self) -> nn.Module:
        """The transformers model inside its wrappers."""
        *_, model = wrappers(self.model)
        return model

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
                another, as `cu_seqlens` or a `position_ids` that starts anew says.
            attention_mask: ``[B, T]``, 0 where there is padding.
            position_ids: ``[B, T]``; by default padding is not counted, as in `model.generate`.
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
            **model_inputs: passed on to the model, images for instance.

        Returns:
            ``logprobs [B, K]``, or a tuple of it with ``entropy [B, K]`` and the 0-dim router loss, as asked for;
            float32 (float64 for a float64 model), differentiable in the model's parameters. With `advantages`
            :class:`grpo_kernels.PolicyLoss`: a differentiable ``loss``, to be backpropagated once, and detached
            ``stats``, ``logprobs`` and (as asked for) ``entropy``. If the model's config sets `output_router_logits`,
            its router loss is part of ``loss``, as in transformers.

        Raises:
            UserError: arguments do not fit together, the model transforms its logits in an unknown way, or it cannot
                take packed input.
            ValueError: a loss argument has a wrong shape, or one that `objective` needs is missing.
        """
        for name, instead in ELSEWHERE.items():
            if name in model_inputs:
                raise UserError(f"{name} is no argument of this call: {instead}")
        if not isinstance(objective, PolicyObjective):
            raise UserError(f"objective must be a PolicyObjective, such as PRESETS['dapo'], got {objective!r:.60}")
        layout = lay_out(input_ids, attention_mask, position_ids, completion_mask, logits_to_keep, cu_seqlens)
        if not model_inputs and input_ids.device.type == "cpu":
            # Images may have ids of their own, and on a GPU looking at values would stall the stream.
            vocab = self.causal_lm.config.get_text_config().vocab_size
            wrong = input_ids[(input_ids < 0) | (input_ids >= vocab)]
            if wrong.numel():
                raise UserError(f"input_ids holds {wrong[0].item()}; allowed are token ids from 0 to {vocab - 1}")
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
        return within(self.model, partial(self._run, layout, loss, return_entropy, return_aux_loss, model_inputs))

    def _run(
        self, layout: Layout, loss: LossInputs | None, with_entropy: bool, with_router: bool, model_inputs: dict
    ) -> PolicyLoss | Tensor | tuple[Tensor, ...]:
        if "head" in self.unchecked:
            row, mask = layout.input_ids[0], layout.attention_mask
            if mask is not None and mask[0].any():
                row = row[mask[0] != 0]
            self._check_head(row[:CHECKED_LENGTH].tolist())
            self.unchecked.discard("head")
        if layout.segments is not None:
            self._require_packing("its attention cannot be replaced", install(self.causal_lm))
            if "packed" in self.unchecked:
                self._check_packed(layout.input_ids[0, :CHECKED_LENGTH])
                self.unchecked.discard("packed")
        if with_router and not self.routes:
            raise UserError("return_aux_loss needs a mixture of experts with output_router_logits in its config")
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
        model = self.causal_lm
        options: dict[str, Any] = {"attention_mask": layout.attention_mask, "use_cache": False, **model_inputs}
        if layout.segments is not None:
            # A mask of four dimensions is passed through: none is made, and packed attention needs none.
            mask = layout.input_ids.new_zeros(1, 1, 1, 1, dtype=torch.bool)
            options |= {"attention_mask": mask, "segments": layout.segments}
        # Some models know no positions, and those of images are numbered by the model.
        numbered = "position_ids" in inspect.signature(body(model).forward).parameters and not model_inputs
        if layout.position_ids is not None and (numbered or layout.given_positions):
            options["position_ids"] = layout.position_ids
        return self._body(layout.input_ids, options, routed, layout.attention_mask)

    def _body(
        self, input_ids: Tensor, options: dict[str, Any], routed: bool, padding_mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The model without its head: ``[B, T, H]`` and the router loss, if `routed`."""
        model = self.causal_lm
        output = body(model)(input_ids=input_ids, **options, **({"output_router_logits": True} if routed else {}))
        return output.last_hidden_state, router_loss(model, output.router_logits, padding_mask) if routed else None

    def _head(
        self,
        hidden: Tensor,
        targets: Tensor,
        loss: LossInputs | None = None,
        with_entropy: bool = False,
        cu_seqlens: Tensor | None = None,
        router: Tensor | None = None,
    ) -> PolicyLoss | Tensor | tuple[Tensor, Tensor]:
        """From the hidden states that predict `targets` to log-probabilities, or to the loss."""
        head = self.causal_lm.get_output_embeddings()
        weight, bias = head_weight(head)
        options = {"bias": bias, "return_entropy": with_entropy, "process_group": head_group(head), **self.head_options}
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
            UserError: the log-probabilities differ.
        """
        within(self.model, partial(self._check_head, prompt_ids))

    @torch.no_grad()
    def _check_head(self, prompt_ids: list[int]) -> None:
        model = self.causal_lm
        weight = head_weight(model.get_output_embeddings())[0]
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

    def _require_packing(self, reason: str, possible: bool) -> None:
        if not possible:
            name, attention = type(self.causal_lm).__name__, self.causal_lm.config._attn_implementation
            raise UserError(
                f"packed input is not possible with {name} and attention {attention!r}, pad instead: {reason}"
            )

    @torch.no_grad()
    def _check_packed(self, ids: Tensor) -> None:
        """Compare two sequences, packed, with the same two in rows of their own.

        Raises:
            UserError: the model cannot take the packed ones, or gives something else.
        """
        rows = torch.stack([ids, ids.flip(0)])
        starts = torch.arange(3, device=ids.device) * len(ids)
        layouts = lay_out(rows), lay_out(rows.view(1, -1), cu_seqlens=starts)
        try:
            with exactly(self.causal_lm, ids.device):
                hidden = [self._hidden_states(layout, False, {})[0].view(2, len(ids), -1) for layout in layouts]
                apart, packed = (self._head(h[:, :-1], rows[:, 1:]) for h in hidden)
        except Exception as error:
            # Models that keep a state along the row fail in many ways.
            self._require_packing(one_line(error), False)
        difference = (apart - packed).abs().max().item()
        reason = f"log-probabilities differ by {difference:.3g} from those of separate rows"
        self._require_packing(reason, difference <= HEAD_TOLERANCE.get(hidden[0].dtype, HEAD_TOLERANCE_16_BIT))


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
