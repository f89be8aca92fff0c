"""Differentiable operations from hidden states to the GRPO loss, without ever building the logits.

Depends only on torch and triton. Every operation takes packed ``[N]`` or padded ``[B, T]`` tensors; see
`kernels/README.md` for the mathematics, the cost and the limits of each.
"""

from grpo_kernels.kl import kl_estimate
from grpo_kernels.linear_distillation import DistillationLoss, linear_distillation
from grpo_kernels.linear_logprob import linear_logprob
from grpo_kernels.linear_policy_loss import linear_policy_loss
from grpo_kernels.masked_mean import masked_mean
from grpo_kernels.masks import REJECTION_MODES, covariance_mask, off_policy_mask, rejection_mask
from grpo_kernels.objective import PRESETS, PolicyObjective, register_objective
from grpo_kernels.policy_loss import PolicyLoss, policy_loss
from grpo_kernels.sampling_ratio import SAMPLING_RATIO_MODES, sampling_ratio
from grpo_kernels.support import Support
from grpo_kernels.token_weights import high_entropy_mask, token_weights

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "REJECTION_MODES",
    "SAMPLING_RATIO_MODES",
    "DistillationLoss",
    "PolicyLoss",
    "PolicyObjective",
    "Support",
    "__version__",
    "covariance_mask",
    "high_entropy_mask",
    "kl_estimate",
    "linear_distillation",
    "linear_logprob",
    "linear_policy_loss",
    "masked_mean",
    "off_policy_mask",
    "policy_loss",
    "register_objective",
    "rejection_mask",
    "sampling_ratio",
    "token_weights",
]
