"""What an objective did in an update: which tokens its bounds and masks left without a gradient, and where.

Everything is computed on the device from ``[N]`` tensors after the last microbatch, and read once.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from grpo_fast.model.transfer import send
from grpo_fast.train.batch import StepBatch
from grpo_kernels import PolicyObjective
from grpo_kernels._checks import sequence_ids, sequence_sums
from grpo_kernels._policy_terms import Tokens, policy_terms
from grpo_kernels.kl import kl_and_derivative

# Parts of a completion, from its beginning to its end, for the means by position.
PARTS = 4


@torch.no_grad()
def diagnose(
    batch: StepBatch,
    objective: PolicyObjective,
    logprobs: Tensor,
    entropy: Tensor,
    advantages: Tensor,
    correction: Tensor | None = None,
) -> dict[str, float]:
    """Metrics of an update, from the log-probabilities and entropies ``[N]`` under which its loss was computed.

    Means are over the computed tokens that count. What does not apply, or applies to no token, is left out:

    ``objective/clipped_low``, ``objective/clipped_high``: the shares of the tokens with an advantage, in the loss, that
    the objective itself leaves without a gradient, with a negative and with a positive advantage;
    ``objective/masked_tokens``, ``objective/masked_sequences``: the shares whose `correction` is 0;
    ``objective/selected_tokens``: the share that the objective selects;
    ``objective/effective_sample_size``: ``(sum v)² / (n sum v²)`` of the ratios times corrections ``v``;
    ``position/entropy_1`` to ``_4``, ``position/kl_1`` and ``position/moved_1``: by quarter of the completion, the mean
    entropy, the KL estimate to the reference policy, and ``(logp - old)² / 2``, the distance from the policy that
    sampled.
    """
    device, offsets = logprobs.device, batch.offsets
    active = torch.zeros(len(batch.samples), dtype=torch.bool)
    active[batch.active] = True
    ids, ends = send(sequence_ids(offsets, int(offsets[-1])), device), send(offsets, device)
    computed = send(active, device)[ids] & (batch.weights != 0)
    counts = sequence_sums(computed.double(), ids, ends)
    found: dict[str, Tensor] = {}

    def share(name: str, of: Tensor, among: Tensor) -> None:
        found[name] = (of & among).sum() / among.sum()

    old = batch.old_logprobs if batch.old_logprobs is not None else batch.sampling_logprobs
    kept = computed if correction is None else computed & (correction != 0)
    informative, silent = kept & (advantages != 0), _silent(batch, objective, logprobs, advantages)
    if batch.selected is not None:
        share("objective/selected_tokens", batch.selected != 0, computed)
        informative = informative & (batch.selected == 0)
    share("objective/clipped_low", silent & (advantages < 0), informative)
    share("objective/clipped_high", silent & (advantages > 0), informative)
    if correction is not None:
        share("objective/masked_tokens", ~kept, computed)
        left = sequence_sums(kept.double(), ids, ends)
        share("objective/masked_sequences", left == 0, counts > 0)
    log_ratio = (
        None if batch.old_logprobs is None else _log_ratio(logprobs - batch.old_logprobs, objective, computed, ids)
    )
    if log_ratio is not None or correction is not None:
        weight = torch.zeros_like(logprobs) if log_ratio is None else log_ratio
        weight = weight if correction is None else weight + correction.log()
        weight = weight.double().masked_fill(~computed, -math.inf)
        size = 2 * weight.logsumexp(0) - (2 * weight).logsumexp(0)
        found["objective/effective_sample_size"] = size.exp() / computed.sum()

    starts = ends[:-1][ids]
    place = torch.arange(len(ids), device=device) - starts
    part = (place * PARTS // ends.diff()[ids].clamp(min=1)).clamp(max=PARTS - 1)
    columns = {"entropy": entropy}
    if batch.ref_logprobs is not None:
        columns["kl"] = kl_and_derivative(logprobs, batch.ref_logprobs, objective.kl, objective.kl_clip)[0]
    if old is not None:
        columns["moved"] = (logprobs - old).square() / 2
    number = _by_part(computed.double(), part)
    for name, values in columns.items():
        means = _by_part(values.double().masked_fill(~computed, 0.0), part) / number
        found |= {f"position/{name}_{index + 1}": mean for index, mean in enumerate(means)}
    figures = torch.stack([value.double() for value in found.values()]).tolist()
    return {name: value for name, value in zip(found, figures, strict=True) if not math.isnan(value)}


def _by_part(values: Tensor, part: Tensor) -> Tensor:
    return values.new_zeros(PARTS).index_add(0, part, values)


def _silent(batch: StepBatch, objective: PolicyObjective, logprobs: Tensor, advantages: Tensor) -> Tensor:
    """Whether the objective's own term has no gradient in a token ``[N]``."""
    alone = replace(objective, beta=0.0, entropy_coef=0.0, kl_bias_correction=False)
    tokens = Tokens(advantages, batch.weights, batch.old_logprobs, batch.ref_logprobs, None, batch.selected)
    return policy_terms(logprobs, tokens, alone, None, send(batch.offsets, logprobs.device)).grad_logprobs == 0


def _log_ratio(difference: Tensor, objective: PolicyObjective, computed: Tensor, ids: Tensor) -> Tensor:
    """The logarithm of each token's ratio, at the level of the objective."""
    if objective.level == "token":
        return difference
    sums = torch.stack([difference.masked_fill(~computed, 0.0), computed.to(difference.dtype)], 1)
    totals = sums.new_zeros(int(ids[-1]) + 1 if len(ids) else 0, 2).index_add(0, ids, sums)[ids]
    return totals[:, 0] / (totals[:, 1].clamp(min=1.0) if objective.level == "sequence" else 1.0)
