"""The trainer's policy: a forward on microbatches whose sequences may share their prompts."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from grpo_fast.errors import UserError
from grpo_fast.model.heads import within
from grpo_fast.model.layout import Microbatch
from grpo_fast.model.packing import Sample, build_microbatch, plan_rows, token_offsets
from grpo_fast.model.policy import CHECKED_LENGTH, FusedPolicy, LossInputs, Teaching
from grpo_kernels import PolicyLoss


class MicrobatchPolicy(FusedPolicy):
    """A FusedPolicy that takes a `Microbatch`; nothing is compared unless one of its checks is called."""

    def forward(
        self, microbatch: Microbatch, inputs: LossInputs | None = None, with_entropy: bool = False
    ) -> PolicyLoss | Tensor | tuple[Tensor, Tensor]:
        """The loss of a microbatch, or without `inputs` the log-probabilities (and entropies) of its targets.

        With `inputs`, entropies cost next to nothing and are always returned. A mixture of experts' router loss is a
        mean over the microbatch's positions, in which a shared prompt counts once; `LossInputs.share` weights it among
        the step's microbatches.
        """
        self._inspect()
        return within(self.model, partial(self._run, microbatch, inputs, with_entropy or inputs is not None))

    @torch.no_grad()
    def teach(self, microbatch: Microbatch, beta: float) -> Teaching:
        """What this policy, as a teacher, knows of the microbatch's targets."""
        self._inspect()
        hidden, _ = within(self.model, partial(self._hidden_states, microbatch, False, {}))
        return Teaching(hidden=hidden, head=self._head(), beta=beta)

    def check_packing(self, prompt_ids: list[int], padding_free: str) -> bool:
        """Whether sequences can be packed: the model's attention allows it, and packed rows give what padded ones do.

        Args:
            prompt_ids: any prompt, for the comparison.
            padding_free: "auto", "always" or "never".

        Raises:
            UserError: `padding_free` is "always", but the model cannot take packed rows.
        """
        if padding_free == "never":
            return False
        self._inspect()
        prompt_ids = prompt_ids[:CHECKED_LENGTH]
        completions = (prompt_ids[::-1], [*prompt_ids[::2], prompt_ids[0]], prompt_ids[-1:] * 3)
        samples = [Sample(prompt_ids, ids, 0) for ids in completions]
        offsets = token_offsets(samples)
        padded, packed = (
            build_microbatch(samples, plan_rows(samples, [0, 1, 2], longest), offsets, 0, longest > 0).to(
                self.model.device
            )
            for longest in (0, 1 << 30)
        )
        device = self.model.device
        compare = partial(self._packing_obstacle, padded.to(device), packed.to(device))
        # Both the policy and the model may be sharded.
        obstacle = within(self, partial(within, self.model, compare))
        if obstacle and padding_free == "always":
            name, attention = type(self.model).__name__, self.model.config._attn_implementation
            raise UserError(
                f"padding_free='always' is not possible with {name} and attention {attention!r}: {obstacle}"
            )
        return obstacle is None
