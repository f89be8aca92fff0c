"""``python docs/fill_recipes.py`` writes the table of methods into docs/recipes.md, from the blocks of that page."""

from __future__ import annotations

import re
from pathlib import Path

from grpo_fast.config import GRPOConfig
from grpo_fast.files import read_yaml
from grpo_kernels import PolicyObjective

PAGE = Path(__file__).parent / "recipes.md"
HEAD = ("method", "", "KL to the reference", "advantage: reward less", "length", "ratio of, within")
# The methods in the table, by the first words of their section, whose first block counts.
METHODS = (
    "GRPO", "DeepSeek-R1-Zero", "Dr. GRPO", "DAPO", "GSPO", "CISPO", "ScaleRL", "SAPO", "RLOO", "REINFORCE++",
    "Kimi k1.5",
)  # fmt: skip
BASE = {"model_name_or_path": "m", "dataset_name": "gsm8k", "reward_funcs": ["math_answer"]}
_BASELINES = {"mean": "the group's mean", "leave_one_out": "the others' mean"}
_SCALES = {"group": "over the group's deviation", "batch": "over the batch's deviation", "none": "no deviation"}
_ESTIMATORS = {"reinforce_plus_plus": "the batch's mean, over the batch's deviation (of tokens)"}
_LENGTHS = {
    "sequence_mean": "mean over an answer's tokens",
    "token_mean": "all tokens of the step alike",
    "constant_length": "sum over an answer's tokens, by a constant",
    "sequence_sum": "sum over an answer's tokens",
}
_LEVELS = {"token": "a token", "sequence": "an answer, geometric mean", "product": "an answer"}


def describe(config: GRPOConfig) -> tuple[str, str, str, str]:
    """KL, advantage, length and ratio of a configuration, in the words of the table."""
    objective = config.objective()
    if not config.beta:
        kl = "none"
    elif config.kl_in_reward:
        kl = f"k1 in the reward, {config.beta:g}"
    else:
        kl = f"{objective.kl}{' times the ratio' * objective.kl_bias_correction}, {objective.beta:g}"
    if config.advantage_estimator is not None:
        advantage = _ESTIMATORS[config.advantage_estimator]
    else:
        advantage = f"{_BASELINES[config.reward_baseline]}, {_SCALES[config.scale_rewards]}"
    return kl, advantage, _length(objective), _ratio(objective, config.loss_type)


def _length(objective: PolicyObjective) -> str:
    # All tokens of an answer have the answer's ratio.
    once = objective.level != "token" and objective.aggregation == "sequence_mean"
    return "each answer once" if once else _LENGTHS[objective.aggregation]


def _ratio(objective: PolicyObjective, loss_type: str) -> str:
    whose = _LEVELS[objective.level]
    if objective.kind == "cispo":
        return f"{whose}, at most {objective.upper_bound:g}, as a constant"
    if objective.kind == "sapo":
        positive, negative = objective.sapo_temperature_pos, objective.sapo_temperature_neg
        return f"{whose}, a smooth gate of temperatures {positive:g} and {negative:g}"
    if loss_type == "kimi":
        return "none, but a penalty on its squared logarithm"
    assert objective.kind == "clip", objective.kind
    low, high = objective.lower_bound, objective.upper_bound
    return f"{whose}, {f'{low:g} to {high:g}' if low > 0 else f'at most {high:g}'}"


def blocks(text: str) -> dict[str, tuple[str, str]]:
    """For each method of the page, the anchor of its section and the section's first block of YAML."""
    found = {}
    for title, body in re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", text, re.M | re.S):
        method = title.partition(" (")[0]
        block = re.search(r"```yaml\n(.*?)```", body, re.S)
        if method in METHODS and block:
            found[method] = (re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-"), block[1])
    return found


def table(text: str, folder: Path) -> str:
    """The table of methods in Markdown; files go to `folder`."""
    rows = [HEAD, tuple("---" for _ in HEAD)]
    found = blocks(text)
    for method in METHODS:
        anchor, block = found[method]
        path = folder / "block.yaml"
        path.write_text(block, encoding="utf-8")
        config = GRPOConfig(**BASE | read_yaml(path))
        paper, alone = describe(config), describe(GRPOConfig(**BASE, loss_type=config.loss_type))
        rows.append((f"[{method}](#{anchor})", "paper", *paper))
        cells = ("the same" if mine == theirs else mine for mine, theirs in zip(alone, paper, strict=True))
        rows.append(("", f"`{config.loss_type}` alone", *cells))
    return "".join(f"| {' | '.join(row)} |\n".replace("|  |", "| |") for row in rows)


def fill(text: str, folder: Path) -> str:
    """The page with its table."""
    before, rest = text.split("<!-- methods -->\n")
    return f"{before}<!-- methods -->\n{table(text, folder)}<!-- end -->{rest.partition('<!-- end -->')[2]}"


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        PAGE.write_text(fill(PAGE.read_text(encoding="utf-8"), Path(folder)), encoding="utf-8")
