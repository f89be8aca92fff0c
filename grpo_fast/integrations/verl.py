"""verl's fused linear log-probability, computed by `linear_logprob`.

    from grpo_fast.integrations.verl import install
    install()  # in every worker, before the models are built

`linear_cross_entropy` has the arguments and the results of verl.utils.kernel.linear_cross_entropy (verl 0.9). Its
gradient costs 3U for the tokens that have one (U = 2 N H V flops) and nothing for the others. It also supports hidden
sizes that are not multiples of 128, CPUs and frozen heads.
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from torch import Tensor

from grpo_fast.errors import import_extra
from grpo_fast.model.heads import require_plain, require_temperature
from grpo_fast.model.inputs import check_tensors
from grpo_kernels import linear_logprob

REDUCTIONS = {"none": lambda values: values, "sum": torch.sum, "mean": torch.mean}
# Where verl looks the function up; Megatron's modules import it by name.
OWNER = "verl.utils.kernel.linear_cross_entropy"
IMPORTERS = ("verl.models.mcore.model_forward_fused", "verl.models.mcore.model_forward_1f1b_overlap")


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float | Tensor | None = 1.0,
    reduction: str | None = "none",
    dist_process_group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of `labels` and entropies, by verl's conventions.

    Args:
        hidden: ``[..., H]``.
        weight: ``[V, H]``, or this rank's rows ``[V_local, H]`` with a process group, in rank order.
        labels: ``[...]`` ids in ``[0, V)``; -100 gives log-probability and entropy 0.
        temperature: divides the logits; one number from 1e-6 to 1e6, or one per token ``[...]``.
        reduction: "none", or "sum" or "mean" of the log-probabilities over all tokens.
        dist_process_group: the ranks that hold the vocabulary in shards. As in verl, the gradients of `hidden` add up
            over the ranks to the whole one, which Megatron's sequence-parallel gather does.

    Returns:
        ``(logprobs [N], entropy [N])``, float32, flattened as verl's are; ``logprobs`` is a scalar with a reduction.

    Raises:
        ValueError: an argument is no tensor, shapes do not fit, the weight is quantised, an id is outside the
            vocabulary, or `reduction` is unknown.
    """
    check_tensors(hidden=hidden, weight=weight, labels=labels)
    require_plain("weight", weight)
    reduction = "none" if reduction is None else reduction.lower()
    if reduction not in REDUCTIONS:
        raise ValueError(f"linear_cross_entropy: reduction={reduction!r} is unknown; choose one of {list(REDUCTIONS)}")
    temperature = 1.0 if temperature is None else temperature
    temperature = temperature.reshape(-1) if isinstance(temperature, Tensor) else require_temperature(temperature)
    hidden = hidden.reshape(-1, hidden.shape[-1])
    ranks = 1 if dist_process_group is None else dist.get_world_size(dist_process_group)
    if ranks > 1 and hidden.requires_grad:
        # `linear_logprob` gives every rank the whole gradient.
        hidden = hidden.view_as(hidden)
        hidden.register_hook(lambda gradient: gradient / ranks)
    logprobs, entropy = linear_logprob(
        hidden, weight, labels.reshape(-1), temperature=temperature, return_entropy=True,
        process_group=dist_process_group,
    )  # fmt: skip
    return REDUCTIONS[reduction](logprobs), entropy


def install() -> None:
    """Replace verl's `linear_cross_entropy` by ours, in this process.

    Raises:
        UserError: verl is not installed.
    """
    import_extra(OWNER, "verl").linear_cross_entropy = linear_cross_entropy
    for name in IMPORTERS:
        if name in sys.modules:
            sys.modules[name].linear_cross_entropy = linear_cross_entropy
