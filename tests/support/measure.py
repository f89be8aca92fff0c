"""The cost of a call: the largest tensor it creates, and the flops of its matrix products (including Triton's)."""

from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, mm_flop

from grpo_kernels.triton_kernels.triton_head import TritonHead


class LargestTensor(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        inputs = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        made = [t.untyped_storage() for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        # In units of float32; views of inputs are not new memory.
        sizes = [storage.nbytes() // 4 for storage in made if storage.data_ptr() not in inputs]
        self.numel = max(self.numel, *sizes, 0)
        return out


def count_flops(function, shapes: tuple[int, int, int]) -> float:
    """Matrix-product flops of `function` in U = 2 N H V."""
    N, H, V = shapes
    forward, known, kernels = TritonHead.launch_forward, TritonHead.launch_known, 0

    def count(head, rows):
        nonlocal kernels
        kernels += 2 * rows.hidden.numel() * head.vocab_size

    def count_forward(head, tile, rows, *args):
        count(head, rows)
        return forward(head, tile, rows, *args)

    def count_known(head, tile, rows, *args):
        count(head, rows)
        return known(head, tile, rows, *args)

    addmm_ = {torch.ops.aten.addmm_: lambda _, a, b, *args, **kwargs: mm_flop(a, b)}
    with (
        FlopCounterMode(display=False, custom_mapping=addmm_) as counter,
        mock.patch.object(TritonHead, "launch_forward", count_forward),
        mock.patch.object(TritonHead, "launch_known", count_known),
    ):
        function()
    return (counter.get_total_flops() + kernels) / (2 * N * H * V)
