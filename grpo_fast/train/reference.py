"""A reference policy that follows the trained one: TRL's `sync_ref_model` (TR-DPO, arXiv 2404.09656)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from grpo_fast.distributed.processes import is_main
from grpo_fast.distributed.sharding import cut_like, to_main
from grpo_fast.errors import UserError


@torch.no_grad()
def move_towards(reference: nn.Module, policy: nn.Module, share: float) -> None:
    """Set `reference` to ``(1 - share) * reference + share * policy``; a share of 1 copies `policy` bit for bit."""
    for kept, new in zip(reference.parameters(), policy.parameters(), strict=True):
        kept.lerp_(new.to(kept.device), share)


def reference_tensors(reference: nn.Module) -> dict[str, Tensor]:
    """The weights for a checkpoint, in the first process; tied weights are there once."""
    tensors = {name: to_main(parameter) for name, parameter in reference.named_parameters()}
    return tensors if is_main() else {}


@torch.no_grad()
def load_reference(reference: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Load a checkpoint's weights; a UserError if they are those of another model."""
    own = dict(reference.named_parameters())
    if {name: t.shape for name, t in own.items()} != {name: t.shape for name, t in tensors.items()}:
        raise UserError("the checkpoint's reference.safetensors holds the weights of another model")
    for name, parameter in own.items():
        parameter.copy_(cut_like(tensors[name], parameter))
