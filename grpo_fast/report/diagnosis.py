"""What the objective did during a run, for the report: its figures at the beginning and the end, and what they say."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from grpo_fast.report.curves import column, known, mean

# Metric -> what it is; in the order of the page.
FIGURES = {
    "objective/clipped_high": "tokens with a positive advantage and no gradient: out of the objective's bounds",
    "objective/clipped_low": "tokens with a negative advantage and no gradient: out of the objective's bounds",
    "objective/selected_tokens": "tokens that the objective selects (clip_cov, kl_cov)",
    "objective/masked_tokens": "tokens left out by the sampler's correction, a rejection or the off-policy mask",
    "objective/masked_sequences": "completions left out by them as a whole",
    "objective/effective_sample_size": "effective sample size of the ratios, as a share of the tokens",
    "entropy_coef": "weight of the entropy bonus",
    "frac_reward_zero_std": "groups whose rewards are all equal",
    "entropy": "entropy, nats per token",
    "grad_norm": "gradient norm",
}
# Quantity -> its column's title; the metrics are position/QUANTITY_1 to _4.
POSITIONS = {
    "entropy": "entropy (nats)",
    "kl": "KL to the reference policy",
    "moved": "(logp - old)² / 2, the distance from the policy that sampled",
}
PARTS = ("first quarter", "second", "third", "last quarter")


class Diagnosis(NamedTuple):
    """`figures` are (meaning, first, last); `positions` has the titles of its columns and a row for each part of a
    completion; `findings` are sentences."""

    figures: list[tuple[str, float, float]]
    columns: list[str]
    positions: list[tuple[str, list[tuple[float, float]]]]
    findings: list[str]


def diagnose_run(history: list[dict[str, Any]]) -> Diagnosis:
    """The means over the first and the last tenth of the steps that have a metric, and what stands out."""
    figures = [(text, *ends(history, name)) for name, text in FIGURES.items() if known(column(history, name))]
    quantities = [name for name in POSITIONS if known(column(history, f"position/{name}_1"))]
    positions = [
        (title, [ends(history, f"position/{name}_{part + 1}") for name in quantities])
        for part, title in enumerate(PARTS)
    ]
    findings = [text for find in FINDINGS if (text := find(history))]
    return Diagnosis(figures, [POSITIONS[name] for name in quantities], positions if quantities else [], findings)


def ends(history: list[dict[str, Any]], name: str) -> tuple[float, float]:
    values = known(column(history, name))
    tenth = max(len(values) // 10, 1)
    return mean(values[:tenth]), mean(values[-tenth:])


def _clipped(history: list[dict[str, Any]]) -> str:
    names = ("objective/clipped_low", "objective/clipped_high")
    low, high = (mean(column(history, name)) for name in names)
    if math.isnan(low + high):
        return ""
    if low + high > 0.5:
        return (
            f"Little signal: {low + high:.0%} of the tokens with an advantage had no gradient, because they "
            "were out of the objective's bounds. Each update moves too far for them: lower learning_rate or "
            "num_iterations, or widen epsilon and epsilon_high."
        )
    moved = known(column(history, "position/moved_1"))
    if low + high == 0 and any(value > 0 for value in moved):
        return "The objective's bounds never took effect, although the policy moved between the updates on a batch."
    return ""


def _masked(history: list[dict[str, Any]]) -> str:
    share = mean(column(history, "objective/masked_tokens"))
    if not share > 0.2:
        return ""
    return (
        f"Little signal: {share:.0%} of the tokens were left out because the policy was far from the one that sampled "
        "them. Compare the sampler's log-probabilities (sampling/...), lower num_iterations, or widen the threshold."
    )


def _sample_size(history: list[dict[str, Any]]) -> str:
    share = ends(history, "objective/effective_sample_size")[1]
    if not share < 0.5:
        return ""
    return (
        f"Unstable: at the end, the ratios differ so much that a batch counted as {share:.0%} of its tokens. Lower "
        "learning_rate or num_iterations."
    )


def _entropy(history: list[dict[str, Any]]) -> str:
    first, last = ends(history, "entropy")
    if not last < 0.1 * first:
        return ""
    return (
        f"Little signal: the entropy fell from {first:.3g} to {last:.3g} nats per token, so completions of a prompt "
        "hardly differ. If the task is not solved, use entropy_coef, use_adaptive_entropy, a wider epsilon_high or "
        "clip_cov."
    )


def _equal(history: list[dict[str, Any]]) -> str:
    share = ends(history, "frac_reward_zero_std")[1]
    if not share > 0.8:
        return ""
    return (
        f"Little signal: at the end, all rewards were equal in {share:.0%} of the groups, so nothing is learned from "
        "them. Use harder or easier prompts, or dynamic_sampling."
    )


def _gradient(history: list[dict[str, Any]]) -> str:
    values = column(history, "grad_norm")
    sizes = sorted(known(values))
    if len(sizes) < 5 or not sizes[-1] > 20 * sizes[len(sizes) // 2] > 0:
        return ""
    step = history[values.index(sizes[-1])]["step"]
    return (
        f"Unstable: the gradient norm reached {sizes[-1]:.3g} at step {step}, {sizes[-1] / sizes[len(sizes) // 2]:.0f} "
        "times its median. max_grad_norm bounds its effect; log_completions_steps saves what such a batch holds."
    )


FINDINGS: tuple[Callable[[list[dict[str, Any]]], str], ...] = (
    _clipped, _masked, _sample_size, _entropy, _equal, _gradient,
)  # fmt: skip
