"""The trainer's policy: a forward on microbatches whose sequences may share their prompts."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from grpo_fast.errors import UserError
from grpo_fast.model.attention import install
from grpo_fast.model.heads import within
from grpo_fast.model.packing import Microbatch, Sample, build_microbatch, plan_rows, token_offsets
from grpo_fast.model.policy import CHECKED_LENGTH, HEAD_TOLERANCE, HEAD_TOLERANCE_16_BIT, FusedPolicy, LossInputs
from grpo_kernels import PolicyLoss


class MicrobatchPolicy(FusedPolicy):
    """A FusedPolicy that takes a `packing.Microbatch`; nothing is compared unless one of its checks is called."""

    def forward(
        self, microbatch: Microbatch, inputs: LossInputs | None = None, with_entropy: bool = False
    ) -> PolicyLoss | Tensor | tuple[Tensor, Tensor]:
        """The loss of a microbatch, or without `inputs` its log-probabilities ``[n]`` (and entropies, if asked for).

        A mixture of experts' router loss is a mean over the microbatch's positions, in which a shared prompt counts
        once; `LossInputs.share` weights it among the step's microbatches.
        """
        self._inspect()
        return within(self.model, partial(self._score, microbatch, inputs, with_entropy))

    def _score(
        self, microbatch: Microbatch, inputs: LossInputs | None, with_entropy: bool
    ) -> PolicyLoss | Tensor | tuple[Tensor, Tensor]:
        options = {"position_ids": microbatch.position_ids, "use_cache": False}
        if microbatch.segments is None:
            options["attention_mask"] = microbatch.attention_mask
        else:
            # A mask of four dimensions is passed through: none is made, and packed attention needs none.
            mask = microbatch.input_ids.new_zeros(1, 1, 1, 1, dtype=torch.bool)
            options |= {"attention_mask": mask, "segments": microbatch.segments}
        routed = self.routes and inputs is not None
        hidden, router = self._body(microbatch.input_ids, options, routed, microbatch.attention_mask)
        hidden = hidden.flatten(0, 1).index_select(0, microbatch.sources)
        # With a loss entropies cost next to nothing.
        with_entropy = with_entropy or inputs is not None
        rows = "all" if inputs is None else inputs.rows
        return self._head(hidden, microbatch.targets, inputs, with_entropy, microbatch.cu_seqlens, router, rows)

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
                difference = self._packing_difference(prompt_ids[:CHECKED_LENGTH])
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
