"""What the updates of one generation batch need: sampled groups, their advantages and flat token tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from grpo_fast.config import GRPOConfig
from grpo_fast.data import Row
from grpo_fast.data.encoding import as_scored, completion_text, rendered_prompt
from grpo_fast.distributed.processes import on_main
from grpo_fast.errors import UserError, one_line
from grpo_fast.model.packing import Sample
from grpo_fast.rewards import Rewards, text_of
from grpo_fast.rewards.engine import RewardModel
from grpo_fast.rollout import Response
from grpo_fast.rollout.base import Rollout, Sampling
from grpo_fast.train.advantages import RewardAdvantages, incomplete_groups, reward_advantages, step_tokens
from grpo_fast.train.batch import StepBatch
from grpo_kernels import Support


@dataclass
class Groups:
    """P prompts and their completions, the G completions of a prompt in a row.

    `greedy` ``[P]`` are the rewards of one more completion each, of the likeliest tokens, if the advantages need them.
    """

    rows: list[dict[str, Any]]
    prompts: list[list[int]]
    responses: list[Response]
    texts: list[str]
    rewards: Rewards
    greedy: Tensor | None = None

    def samples(self) -> list[Sample]:
        size = len(self.responses) // len(self.prompts)
        return [
            Sample(self.prompts[index // size], response.token_ids, index // size)
            for index, response in enumerate(self.responses)
        ]

    def mask(self) -> Tensor | None:
        """Whether each token was sampled ``[N]``; None if none was forced."""
        if all(response.mask is None or all(response.mask) for response in self.responses):
            return None
        return torch.tensor([kept for r in self.responses for kept in r.mask or [True] * len(r.token_ids)])

    def support(self) -> Support:
        """The ids that the sampler kept for each token ``[N]``."""
        return Support.joined([response.support for response in self.responses])

    def counted(self, config: GRPOConfig) -> Tensor:
        """Whether each completion is in the loss ``[B]``."""
        ended = torch.tensor([response.finish_reason == "stop" for response in self.responses])
        counted = ended | (not config.mask_truncated_completions)
        if config.incomplete_groups == "drop":
            counted = counted & ~incomplete_groups(self.rewards.total, config.num_generations)
        return counted

    def check_complete(self, num_generations: int) -> None:
        """Raise a UserError if a completion has no reward."""
        missing = self.rewards.total.isnan().nonzero().squeeze(1).tolist()
        if missing:
            prompt = one_line(text_of(self.rows[missing[0] // num_generations]["prompt"]), 80)
            raise UserError(
                f"{len(missing)} of {len(self.texts)} completions have no reward from any function, the first of them "
                f"for the prompt {prompt!r}; incomplete_groups=drop leaves such groups out, keep such completions alone"
            )

    def lines(self, step: int, names: list[str], batch: StepBatch) -> Iterator[dict[str, Any]]:
        """Every completion with its rewards and the advantage of its first token, for the log."""
        firsts = batch.advantages[batch.offsets[:-1].to(batch.advantages.device)].tolist()
        size = len(self.responses) // len(self.prompts)
        for index, (text, advantage) in enumerate(zip(self.texts, firsts, strict=True)):
            rewards = dict(zip(names, self.rewards.each[index].tolist(), strict=True))
            group = index // size
            entry = {"step": step, "group": group, "prompt": self.rows[group]["prompt"], "completion": text}
            yield {**entry, "rewards": rewards, "advantage": advantage}

    def replaced(self, places: list[int], others: Groups) -> Groups:
        """These groups, with those of `others` at `places`."""
        size = len(self.responses) // len(self.prompts)
        inside = [place * size + index for place in places for index in range(size)]
        rewards = {"steps": _put(self.rewards.steps, inside, others.rewards.steps)}
        for name in ("total", "each", "errors"):
            rewards[name] = getattr(self.rewards, name).clone()
            rewards[name][inside] = getattr(others.rewards, name)
        greedy = self.greedy
        if greedy is not None and others.greedy is not None:
            greedy = greedy.clone()
            greedy[places] = others.greedy
        return Groups(
            _put(self.rows, places, others.rows),
            _put(self.prompts, places, others.prompts),
            _put(self.responses, inside, others.responses),
            _put(self.texts, inside, others.texts),
            self.rewards._replace(**rewards),
            greedy,
        )


def _put(items: list, places: list[int], others: list) -> list:
    items = list(items)
    for place, other in zip(places, others, strict=True):
        items[place] = other
    return items


def token_advantages(groups: Groups, advantages: RewardAdvantages, tokenizer: Any) -> Tensor:
    """The advantage of every token ``[N]`` float32: the outcome's plus those of the steps that end at or after it.

    A UserError refuses an advantage beyond float32.
    """
    tokens = []
    for place, (response, steps) in enumerate(zip(groups.responses, groups.rewards.steps, strict=True)):
        values = torch.full((len(response.token_ids),), advantages.outcome[place].item(), dtype=torch.float64)
        for index, pairs in steps.items():
            counts = step_tokens(tokenizer, response.token_ids, [end for end, _ in pairs], response.ended)
            for count, value in zip(counts, advantages.steps[index][place].tolist(), strict=False):
                values[:count] += value
        tokens.append(values)
    advantage = torch.cat(tokens).float()
    if not bool(advantage.isfinite().all()):
        raise UserError(
            "an advantage is beyond the numbers of float32; set smaller reward_weights, or scale_rewards: group"
        )
    return advantage


def sample_groups(
    sample: Callable[[int], Groups], weights: Tensor, config: GRPOConfig
) -> tuple[Groups, int, dict[str, float]]:
    """The groups of a step; with `dynamic_sampling`, groups without variance are replaced.

    As in DAPO (arXiv 2503.14476, section 3.2), since a prompt whose completions all have the same reward teaches
    nothing: as many prompts as there are such groups are sampled, until there is none or `max_num_gen_batches` batches
    were sampled. Groups without variance that remain then stay, so that a batch always has its full size.

    `sample` samples and scores that many further prompts; `weights` are those of the reward functions, ``[F]``.

    Returns the groups, the number of prompts that were drawn, and metrics of the resampling. The mean reward of
    everything that was sampled, unlike the batch's, does not depend on what was kept.
    """
    groups = sample(config.prompts_per_step)
    if not config.dynamic_sampling:
        return groups, config.prompts_per_step, {}
    drawn, batches, sampled = config.prompts_per_step, 1, [groups.rewards.total]
    equal = first = without_variance(groups.rewards, weights, config)
    while equal and batches < config.max_num_gen_batches:
        groups = groups.replaced(equal, others := sample(len(equal)))
        drawn, batches = drawn + len(equal), batches + 1
        sampled.append(others.rewards.total)
        equal = without_variance(groups.rewards, weights, config)
    return groups, drawn, {
        "dynamic_sampling/num_gen_batches": batches,
        "dynamic_sampling/refilled_share": len(first) / config.prompts_per_step if batches > 1 else 0.0,
        "dynamic_sampling/sampled_reward": torch.cat(sampled).nanmean().item(),
    }  # fmt: skip


def without_variance(rewards: Rewards, weights: Tensor, config: GRPOConfig) -> list[int]:
    """The places of the groups whose rewards are all equal."""
    equal = reward_advantages(rewards, weights, config).equal
    return equal[:: config.num_generations].nonzero().squeeze(1).tolist()


def sample_and_score(
    rollout: Rollout,
    rewards: RewardModel,
    tokenizer: Any,
    rows: list[Row],
    prompt_ids: list[list[int]],
    sampling: Sampling,
) -> tuple[list[Response], list[str], Rewards]:
    """Sample `num_generations` responses to each row and score them: (responses, their texts, rewards)."""
    return score_responses(rewards, tokenizer, rows, prompt_ids, rollout.generate(prompt_ids, sampling))


def score_responses(
    rewards: RewardModel, tokenizer: Any, rows: list[Row], prompt_ids: list[list[int]], responses: list[Response]
) -> tuple[list[Response], list[str], Rewards]:
    """As `sample_and_score`, for given responses, those of a row next to each other."""
    ids = [list(response.token_ids) for response in responses]
    texts = [completion_text(tokenizer, r.token_ids, r.ended, r.past or 0) for r in responses]
    size = len(responses) // len(rows)
    repeated = [row for row in rows for _ in range(size)]
    rendered = [rendered_prompt(tokenizer, i, row["prompt"]) for i, row in zip(prompt_ids, rows, strict=True)]
    turns = [as_scored(row["prompt"], text) for row, text in zip(repeated, texts, strict=True)]
    prompts, completions = map(list, zip(*turns, strict=True))
    columns = {name: [row.get(name) for row in repeated] for name in repeated[0] if name != "prompt"}
    columns |= {"completion_ids": ids, "rendered_prompts": [text for text in rendered for _ in range(size)]}
    # In one process only: a reward function may have state or cost money.
    return responses, texts, on_main(lambda: rewards(prompts, completions, columns, size))
