"""The 16-bit copy of a weight is shared by the calls of a step, and never outlives the weight that it is a copy of."""

import weakref

import torch

from grpo_kernels.weight_copies import copied, kept_weight_copies


def test_copies_are_shared_within_the_context_alone():
    weight = torch.randn(5, 4)
    assert copied(weight, torch.bfloat16) is not copied(weight, torch.bfloat16)
    with kept_weight_copies():
        first = copied(weight, torch.bfloat16)
        assert torch.equal(first, weight.bfloat16())
        with kept_weight_copies():
            # A head detaches the weight.
            assert copied(weight.detach(), torch.bfloat16) is first
        assert copied(weight, torch.bfloat16) is first
        assert copied(weight, torch.float16).dtype == torch.float16
        assert torch.equal(copied(weight.t(), torch.bfloat16), weight.t().bfloat16())
        assert torch.equal(copied(weight[1:], torch.bfloat16), weight[1:].bfloat16())
        gone = weakref.ref(first)
        del first
        assert gone() is not None
    assert gone() is None
    assert copied(weight, torch.bfloat16) is not copied(weight, torch.bfloat16)


def test_changed_and_replaced_weights_are_copied_again():
    weight = torch.randn(5, 4, requires_grad=True)
    with kept_weight_copies():
        first = copied(weight, torch.bfloat16)
        with torch.no_grad():
            weight.mul_(2)
        second = copied(weight.detach(), torch.bfloat16)
        assert torch.equal(second, 2 * first)
        # Weights that come and go, which an allocator puts at the same address.
        for value in range(20):
            assert (copied(torch.full((5, 4), float(value)), torch.bfloat16) == value).all()
        with torch.inference_mode():
            weight = torch.ones(5, 4)
            assert (copied(weight, torch.bfloat16) == 1).all()
            weight.mul_(3)
            assert (copied(weight, torch.bfloat16) == 3).all()
