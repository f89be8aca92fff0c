"""The presets as a table, with their papers, equations and names elsewhere: ``python -m grpo_kernels.objective_table``.

The equations are objectives to maximise; `docs/objectives.md` explains their symbols.
"""

from __future__ import annotations

from typing import NamedTuple

from grpo_kernels.objective import BUILT_IN, PRESETS

HEAD = ("`loss_type`", "paper", "equation", "in TRL", "in verl", "what differs")


class Source(NamedTuple):
    """Where a preset comes from, and what other libraries call it; Markdown."""

    paper: str
    equation: str
    trl: str
    verl: str
    differs: str = ""


SOURCES: dict[str, Source] = {
    "reinforce": Source(
        "Williams 1992; naive policy gradient with raw rewards as `A`, REINFORCE with baseline with `r - b`",
        "`1/N Σ_i Σ_t A logp_t`",
        "none",
        "`loss_mode: gpg`",
    ),
    "unclipped": Source(
        "the importance-weighted policy gradient",
        "`1/N Σ_i Σ_t r_t A`",
        "`bnpo`, infinite `epsilon`",
        "`vanilla`, large `clip_ratio`",
        "the first update equals `reinforce`",
    ),
    "grpo": Source(
        "DeepSeekMath, 2402.03300, eq. 3",
        "`1/S Σ_i 1/abs(o_i) Σ_t clip(r_t)`",
        "`grpo`",
        "`vanilla`, `seq-mean-token-mean`",
    ),
    "bnpo": Source(
        "TRL's name",
        "`1/N Σ_i Σ_t clip(r_t)`",
        "`bnpo`",
        "`vanilla`, `token-mean`",
        "TRL's `N` is that of a microbatch, here that of the step, so it equals `dapo`",
    ),
    "dapo": Source(
        "DAPO, 2503.14476, eq. 8",
        "`1/N Σ_i Σ_t clip(r_t)`",
        "`dapo`",
        "`vanilla`, `token-mean`",
        "the paper's `epsilon_high` is 0.28; as in TRL it is not set by the preset",
    ),
    "dr_grpo": Source(
        "Dr. GRPO, 2503.20783, section 3.2",
        "`1/(S L) Σ_i Σ_t clip(r_t)`, `L = max_completion_length`",
        "`dr_grpo`",
        "`vanilla`, `seq-mean-token-sum-norm`",
        "use it with `scale_rewards: none`",
    ),
    "dual_clip": Source(
        "1912.09729, eq. 8",
        "`1/N Σ_i Σ_t clip(r_t)`, and at least `3 A` where `A < 0`",
        "`bnpo`, `delta=3`",
        "`vanilla`, `clip_ratio_c=3`",
        "any clipped preset takes `delta`",
    ),
    "gspo": Source(
        "GSPO, 2507.18071, eq. 5 and 7",
        "`1/S Σ_i clip(s)`, bounds 3e-4 and 4e-4",
        "`grpo`, `importance_sampling_level: sequence`",
        "`gspo`",
    ),
    "luspo": Source(
        "LUSPO, 2602.05261",
        "`1/S Σ_i abs(o_i) clip(s)`",
        "`luspo`, `importance_sampling_level: sequence`",
        "none",
        "TRL's own default level is the token",
    ),
    "rloo": Source(
        "RLOO, 2402.14740",
        "`1/S Σ_i clip(W)`; the first update is the paper's `1/S Σ_i A Σ_t logp_t`",
        "`RLOOTrainer`",
        "`adv_estimator: rloo`",
        "the leave-one-out baseline is an advantage (`reward_baseline`), the paper's KL goes into the reward "
        "(`kl_in_reward`)",
    ),
    "cispo": Source(
        "CISPO, 2506.13585, eq. 4",
        "`1/N Σ_i Σ_t sg(min(r_t, 5)) A logp_t`",
        "`cispo`",
        "`cispo`",
        "`epsilon_high` bounds the ratio itself, as in TRL; verl's is a distance from 1, and it bounds below as well",
    ),
    "sapo": Source(
        "SAPO, 2511.20347, eq. 5 and 6",
        "`1/S Σ_i 1/abs(o_i) Σ_t 4/τ σ(τ (r_t - 1)) A`, `τ` 1 where `A > 0`, else 1.05",  # noqa: RUF001
        "`sapo`",
        "`sapo`",
    ),
    "vespo": Source(
        "VESPO, 2602.10693",
        "`1/N Σ_i Σ_t sg(W^k exp(λ (1 - W))) A logp_t`, `k, λ` 2, 3 where `A > 0`, else 3, 2",
        "`vespo`",
        "none",
        "a correction `rho` multiplies the term, where TRL multiplies it into `W`; with a corrected KL term, its ratio "
        "is `W` here and a token's in TRL",
    ),
    "gpg": Source(
        "GPG, 2504.02546",
        "`1/N Σ_i Σ_t A logp_t`",
        "none",
        "`loss_mode: gpg`",
        "the formula of `reinforce`; its advantage is `advantage_estimator: gpg`",
    ),
    "dppo_tv": Source(
        "DPPO, 2602.04879",
        "`1/N Σ_i Σ_t sg(M_t min(r_t, 20)) A logp_t`; `M_t` is 0 where `p_t` has moved by more than 0.15 in "
        "`A`'s direction",
        "none",
        "`loss_mode: dppo_tv`",
        "`epsilon` bounds the change of the probability, `delta` the ratio",
    ),
    "dppo_kl": Source(
        "DPPO, 2602.04879",
        "as `dppo_tv`; `M_t` is 0 where the KL divergence of drawing this token or another exceeds 0.05",
        "none",
        "`loss_mode: dppo_kl`",
        "verl adds 1e-8 inside its logarithm",
    ),
    "gmpo": Source(
        "GMPO, 2507.20673",
        "`1/S Σ_i A exp(1/abs(o_i) Σ_t clip(log r_t, -0.4, 0.4))`, one-sided by the sign of `A`",
        "`GMPOTrainer` (experimental)",
        "`loss_mode: geo_mean`",
        "`epsilon` is a distance of `log r_t` from 0, as there",
    ),
    "clip_cov": Source(
        "Clip-Cov, 2505.22617",
        "`1/N Σ_i Σ_t (1 - M_t) clip(r_t)`; `M_t` is 1 for a random 2e-4 of the tokens, of those whose covariance of "
        "`logp_t` and `A` is between 1 and 5",
        "none",
        "`loss_mode: clip_cov`",
        "the means are those of the step, verl's those of a microbatch; `covariance_ratio`, `covariance_low` and "
        "`covariance_high` are its `clip_cov_ratio`, `clip_cov_lb` and `clip_cov_ub`",
    ),
    "kl_cov": Source(
        "KL-Cov, 2505.22617",
        "`1/N Σ_i Σ_t r_t A - M_t abs(log r_t)`; `M_t` is 1 for the 2e-4 of the tokens with the highest covariance",
        "none",
        "`loss_mode: kl_cov`",
        "as above; `covariance_ratio` and `covariance_kl` are its `kl_cov_ratio` and `ppo_kl_coef`",
    ),
    "kimi": Source(
        "Kimi k1.5, 2501.12599, section 2.3.2",
        "`1/S Σ_i A Σ_t logp_t - τ/2 (Σ_t log r_t)²`, `τ` 0.05",
        "none",
        "none",
        "the paper gives no `τ`; another one takes `functools.partial(kimi, tau=...)` in a file of your own; use it "
        "with `scale_rewards: none`",
    ),
    "dro": Source(
        "DRO, 2405.19107, in Tinker's form",
        "`1/N Σ_i Σ_t A logp_t - τ/2 (log r_t)²`, `τ` 0.05",
        "none",
        "none",
        "Tinker sums over tokens; another `τ` takes `functools.partial(dro, tau=...)` in a file of your own",
    ),
}


def objective_table() -> str:
    """The table in Markdown, one row for each built-in preset; a KeyError names a preset without a source."""
    rows = [HEAD, tuple("---" for _ in HEAD)]
    rows += [(f"`{name}`", *SOURCES[name]) for name in PRESETS if name in BUILT_IN]
    return "".join(f"| {' | '.join(row)} |\n".replace("|  |", "| |") for row in rows)


if __name__ == "__main__":
    print(objective_table(), end="")
