"""Differentiable operations from hidden states to the GRPO loss, without ever building the logits.

Depends only on torch and triton. Every operation takes packed ``[N]`` or padded ``[B, T]`` tensors; see
`kernels/README.md` for the mathematics, the cost and the limits of each.
"""

from grpo_kernels.kl import kl_estimate
from grpo_kernels.linear_logprob import linear_logprob
from grpo_kernels.linear_policy_loss import linear_policy_loss
from grpo_kernels.masked_mean import masked_mean
from grpo_kernels.objective import PRESETS, PolicyObjective, register_objective
from grpo_kernels.policy_loss import PolicyLoss, policy_loss
from grpo_kernels.sampling_ratio import SAMPLING_RATIO_MODES, sampling_ratio
from grpo_kernels.support import Support
from grpo_kernels.token_weights import high_entropy_mask, token_weights

__version__ = "0.1.0"

__all__ = [
    "PRESETS",
    "SAMPLING_RATIO_MODES",
    "PolicyLoss",
    "PolicyObjective",
    "Support",
    "__version__",
    "high_entropy_mask",
    "kl_estimate",
    "linear_logprob",
    "linear_policy_loss",
    "masked_mean",
    "policy_loss",
    "register_objective",
    "sampling_ratio",
    "token_weights",
]
