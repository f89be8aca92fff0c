"""Objectives that together use every setting."""

from __future__ import annotations

import dataclasses

from grpo_kernels import PRESETS, PolicyObjective

OBJECTIVES = {
    # bnpo is dapo, and gpg is reinforce; test_masks.py has those that need selected tokens.
    **{
        name: objective
        for name, objective in PRESETS.items()
        if name not in ("bnpo", "gpg") and not objective.needs_selection
    },
    "asymmetric": PolicyObjective(epsilon=0.1, epsilon_high=0.3),
    "k1": PolicyObjective(beta=0.2, kl="k1"),
    "k2, sequence": PolicyObjective(beta=0.2, kl="k2", level="sequence", epsilon=0.02),
    "k3": PolicyObjective(beta=0.2),
    "k3, clipped": PolicyObjective(beta=0.2, kl_clip=0.05),
    "k1, clipped, sequence": PolicyObjective(beta=0.2, kl="k1", kl_clip=0.3, level="sequence", kl_bias_correction=True),
    "corrected kl": PolicyObjective(beta=0.2, kl_bias_correction=True),
    "corrected kl, sequence": PolicyObjective(beta=0.2, kl_bias_correction=True, level="sequence", epsilon=0.02),
    "corrected kl, product": PolicyObjective(beta=0.2, kl_bias_correction=True, level="product"),
    "bonus": PolicyObjective(entropy_coef=0.3),
    "cispo, sequence": dataclasses.replace(PRESETS["cispo"], level="sequence", epsilon_high=1.05),
    "sapo, sequence": dataclasses.replace(PRESETS["sapo"], level="sequence"),
    "everything": PolicyObjective(
        kind="sapo", level="sequence", beta=0.1, kl="k2", kl_bias_correction=True, entropy_coef=-0.1,
        sapo_temperature_neg=2.0, aggregation="sequence_sum",
    ),
}  # fmt: skip
