"""A transformers causal LM whose forward ends in the loss instead of in logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from grpo_fast.attention import install
from grpo_fast.errors import UserError
from grpo_fast.packing import Microbatch, Sample, build_microbatch, plan_rows, token_offsets
from grpo_kernels import PolicyLoss, PolicyObjective, linear_logprob, linear_policy_loss

# What a model's config calls its logit transform, and how it becomes an argument of the head.
_LOGIT_SCALES = {
    "logit_scale": lambda value: value,
    "logits_scaling": lambda value: 1 / value,
    "lm_head_multiplier": lambda value: value,
}
# Largest difference between the head's and the model's own log-probabilities in the check before training.
HEAD_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
HEAD_TOLERANCE_16_BIT = 0.3


@dataclass
class LossInputs:
    """Per-token arguments of `linear_policy_loss` for one microbatch, ``[n]`` each."""

    objective: PolicyObjective
    advantages: Tensor
    weights: Tensor
    old_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None


class FusedPolicy(nn.Module):
    """Computes log-probabilities, or the policy loss, inside the wrapped module's forward, without logits.

    Args:
        model: a transformers causal LM.
        temperature: sampling temperature, which divides the logits.
        max_buffer_bytes: temporary memory of the head; see `linear_logprob`.

    Raises:
        UserError: the model has no linear output head.
    """

    def __init__(self, model: nn.Module, temperature: float = 1.0, max_buffer_bytes: int | None = None):
        super().__init__()
        self.model = model
        head = model.get_output_embeddings()
        if not isinstance(head, nn.Linear):
            raise UserError(f"{type(model).__name__} has no linear output head, but {type(head).__name__}")
        config = model.config.get_text_config()
        scale = 1.0
        for name, convert in _LOGIT_SCALES.items():
            value = getattr(config, name, None)
            scale *= 1.0 if value is None else convert(value)
        self.head_options = {
            "temperature": temperature,
            "logit_scale": scale,
            "softcap": getattr(config, "final_logit_softcapping", None),
            "max_buffer_bytes": max_buffer_bytes,
        }

    def hidden_states(self, microbatch: Microbatch) -> Tensor:
        """``[n, H]`` hidden states that predict the targets."""
        if microbatch.segments is None:
            options = {"attention_mask": microbatch.attention_mask}
        else:
            # A mask of four dimensions is passed through: none is made, and packed attention needs none.
            mask = microbatch.input_ids.new_zeros(1, 1, 1, 1, dtype=torch.bool)
            options = {"attention_mask": mask, "segments": microbatch.segments}
        output = self.model.base_model(
            input_ids=microbatch.input_ids, position_ids=microbatch.position_ids, use_cache=False, **options
        )
        return output.last_hidden_state.flatten(0, 1).index_select(0, microbatch.sources)

    def forward(
        self, microbatch: Microbatch, inputs: LossInputs | None = None, with_entropy: bool = False
    ) -> PolicyLoss | Tensor | tuple[Tensor, Tensor]:
        """The loss of a microbatch, or without `inputs` its log-probabilities ``[n]`` (and entropies, if asked for)."""
        hidden = self.hidden_states(microbatch)
        head = self.model.get_output_embeddings()
        options = {"bias": head.bias, **self.head_options}
        if inputs is None:
            return linear_logprob(hidden, head.weight, microbatch.targets, return_entropy=with_entropy, **options)
        return linear_policy_loss(
            hidden, head.weight, microbatch.targets, inputs.advantages, inputs.weights, inputs.objective,
            old_logprobs=inputs.old_logprobs, ref_logprobs=inputs.ref_logprobs, cu_seqlens=microbatch.cu_seqlens,
            return_entropy=True, **options,
        )  # fmt: skip

    @torch.no_grad()
    def check_head(self, prompt_ids: list[int]) -> None:
        """Compare with the model's own logits on one prompt, so that an unknown logit transform cannot slip through.

        Raises:
            UserError: the log-probabilities differ.
        """
        device = self.model.device
        ids = torch.tensor([[*prompt_ids, prompt_ids[-1]][:64]], device=device)
        output = self.model(input_ids=ids, use_cache=False)
        logits = output.logits[0, :-1].float() / self.head_options["temperature"]
        expected = logits.log_softmax(-1).gather(1, ids[0, 1:, None]).squeeze(1)
        length = ids.shape[1]
        got = self(
            Microbatch(
                input_ids=ids,
                position_ids=torch.arange(length, device=device)[None],
                attention_mask=torch.ones_like(ids),
                sources=torch.arange(length - 1, device=device),
                targets=ids[0, 1:],
                tokens=torch.arange(length - 1, device=device),
                cu_seqlens=torch.tensor([0, length - 1], device=device),
            )
        )
        difference = (got - expected).abs().max().item()
        if not difference <= HEAD_TOLERANCE.get(self.model.dtype, HEAD_TOLERANCE_16_BIT):
            raise UserError(
                f"{type(self.model).__name__} transforms its logits in a way that is not supported: "
                f"log-probabilities differ by {difference:.3g}"
            )

    def check_packing(self, prompt_ids: list[int], padding_free: str) -> bool:
        """Whether sequences are packed: the model's attention allows it, and packed rows give what padded ones do.

        Args:
            prompt_ids: any prompt, for the comparison.
            padding_free: "auto", "always" or "never".

        Raises:
            UserError: packing was demanded, but the model cannot.
        """
        if padding_free == "never":
            return False
        reason = "its attention cannot be replaced"
        if install(self.model):
            try:
                difference = self._packing_difference(prompt_ids[:64])
            except UserError as error:
                reason = str(error)
            else:
                if difference <= HEAD_TOLERANCE.get(self.model.dtype, HEAD_TOLERANCE_16_BIT):
                    return True
                reason = f"log-probabilities differ by {difference:.3g} from those of padded rows"
        if padding_free == "always":
            name, attention = type(self.model).__name__, self.model.config._attn_implementation
            raise UserError(f"padding_free='always' is not possible with {name} and attention {attention!r}: {reason}")
        return False

    @torch.no_grad()
    def _packing_difference(self, prompt_ids: list[int]) -> float:
        """Largest difference between the log-probabilities of three completions in packed and in padded rows."""
        completions = (prompt_ids[::-1], [*prompt_ids[::2], prompt_ids[0]], prompt_ids[-1:] * 3)
        samples = [Sample(prompt_ids, ids, 0) for ids in completions]
        offsets = token_offsets(samples)
        found = []
        for longest_shared_row in (1 << 30, 0):
            packed = bool(longest_shared_row)
            rows = plan_rows(samples, [0, 1, 2], longest_shared_row)
            found.append(self(build_microbatch(samples, rows, offsets, 0, packed).to(self.model.device)))
        return (found[0] - found[1]).abs().max().item()
