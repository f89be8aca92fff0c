"""PPO and GRPO in a plain training loop: a small Llama with random weights learns to sort three digits.

    python examples/ppo.py [--method ppo] [--steps 200] [--seed 0] [--output ppo.json]

Both sample the same number of completions, take the same optimizer steps with the same clipped ratio, and stay close to
the initial model. They differ in the advantage and in where the KL enters:

    PPO   a critic (a second model with a value head) estimates V_t; the reward of each token is -beta KL_t, and that of
          the last one also the task's; advantages by GAE; the critic learns by a clipped value loss; a controller
          adapts beta to a target KL.
    GRPO  the reward less the mean of the prompt's group, over its deviation, for all tokens; a constant beta in
          the loss.

Sources: PPO, arXiv 1707.06347; GAE, arXiv 1506.02438; per-token KL and its controller, arXiv 1909.08593, section 2.2.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from grpo_fast import FusedPolicy
from grpo_fast.train.metrics import peak_memory
from grpo_kernels import PRESETS

DIGITS, ARROW, END = 3, 10, 11  # the tokens are the ten digits, an arrow after the question, and the end
COMPLETIONS, GROUP, UPDATES = 256, 8, 2  # of a step; of a prompt, for GRPO; optimizer steps on them
LEARNING_RATE, CLIP, GRPO_BETA = 1e-3, 0.2, 0.02
GAMMA, LAMBDA, VALUE_CLIP, VALUE_COEF = 1.0, 0.95, 0.2, 0.5


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimates (arXiv 1506.02438, equation 16) and returns, ``[B, K]`` each.

    ``A_t = sum_l (gamma lam)^l d_{t+l}`` with ``d_t = r_t + gamma V_{t+1} - V_t``, where V is 0 after the last token;
    the return is ``A_t + V_t``.

    Args:
        rewards: ``[B, K]``, of each token.
        values: ``[B, K]``, the critic's estimate before each token.
        mask: ``[B, K]`` bool, true for a row's tokens, which come first; both results are 0 elsewhere.
    """
    advantages, following, later = (
        torch.zeros_like(values),
        values.new_zeros(len(values)),
        values.new_zeros(len(values)),
    )
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * following - values[:, t]
        later = torch.where(mask[:, t], delta + gamma * lam * later, 0.0)
        following = torch.where(mask[:, t], values[:, t], 0.0)
        advantages[:, t] = later
    return advantages, (advantages + values) * mask


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float) -> Tensor:
    """Half the mean over the tokens of the larger squared error, of a value and of one within `clip` of the old."""
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    errors = torch.maximum((values - returns).square(), (clipped - returns).square())
    return 0.5 * (errors * mask).sum() / mask.sum()


def whiten(values: Tensor, mask: Tensor) -> Tensor:
    """``[B, K]`` with mean 0 and deviation 1 over the tokens."""
    tokens = values[mask]
    return (values - tokens.mean()) / (tokens.std() + 1e-8) * mask


@dataclasses.dataclass
class AdaptiveKL:
    """The coefficient of a KL penalty, which moves so that the KL reaches a target (arXiv 1909.08593, section 2.2).

    ``beta <- beta (1 + gain clip(KL / target - 1, -0.2, 0.2))``
    """

    beta: float
    target: float
    gain: float = 0.1

    def update(self, kl: float) -> None:
        """After a step whose completions had, on average, this KL to the reference (nats)."""
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.beta *= 1 + self.gain * error


class Critic(nn.Module):
    """A second model of the same size, with one value in place of the vocabulary."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.body = LlamaForCausalLM(config).model
        self.head = nn.Linear(config.hidden_size, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, ids: Tensor, count: int) -> Tensor:
        """The value before each of the last `count` tokens, ``[B, count]``."""
        hidden = self.body(input_ids=ids, use_cache=False).last_hidden_state
        return self.head(hidden[:, -count - 1 : -1]).squeeze(2)


def make_config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=12, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=16, pad_token_id=END, bos_token_id=None, eos_token_id=END,
    )  # fmt: skip


def questions(count: int) -> Tensor:
    """``[count, DIGITS + 1]``: digits and the arrow."""
    return torch.cat([torch.randint(10, (count, DIGITS)), torch.full((count, 1), ARROW)], 1)


@torch.no_grad()
def sample(model: LlamaForCausalLM, prompts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Prompts with answers ``[B, T]``, the answers' mask ``[B, K]`` (up to the first end), and rewards ``[B]``.

    A reward is the share of the sorted digits, and of the end after them, that are in the right place.
    """
    model.eval()
    options = {"do_sample": True, "min_new_tokens": DIGITS + 1, "max_new_tokens": DIGITS + 1}
    ids = model.generate(prompts, attention_mask=torch.ones_like(prompts), **options, eos_token_id=None)
    answer = ids[:, prompts.shape[1] :]
    ended = answer == END
    mask = (ended.cumsum(1) - ended.long()) == 0
    right = torch.cat([prompts[:, :DIGITS].sort(1).values, torch.full((len(prompts), 1), END)], 1)
    return ids, mask, ((answer == right) & mask).sum(1) / (DIGITS + 1)


class GRPO:
    """The advantages of groups; all that GRPO needs beside the policy and its reference."""

    trained: tuple[nn.Module, ...] = ()

    def prompts(self) -> Tensor:
        return questions(COMPLETIONS // GROUP).repeat_interleave(GROUP, 0)

    def advantages(self, ids, mask, rewards, logprobs, ref_logprobs) -> Tensor:
        groups = rewards.view(-1, GROUP)
        centred = groups - groups.mean(1, keepdim=True)
        return (centred / (groups.std(1, keepdim=True) + 1e-4)).flatten()

    def loss(self, ids, mask) -> Tensor | float:
        return 0.0

    objective = dataclasses.replace(PRESETS["dapo"], epsilon=CLIP, beta=GRPO_BETA)


class PPO:
    """The critic, its loss, and the advantages of tokens."""

    def __init__(self, config: LlamaConfig, kl_target: float):
        self.critic, self.controller = Critic(config), AdaptiveKL(GRPO_BETA, kl_target)
        self.trained = (self.critic,)

    def prompts(self) -> Tensor:
        return questions(COMPLETIONS)

    @torch.no_grad()
    def advantages(self, ids, mask, rewards, logprobs, ref_logprobs) -> Tensor:
        divergence = (logprobs - ref_logprobs) * mask
        each = -self.controller.beta * divergence
        each[torch.arange(len(each)), mask.sum(1) - 1] += rewards
        self.old_values = self.critic(ids, mask.shape[1]) * mask
        advantages, self.returns = gae(each, self.old_values, mask, GAMMA, LAMBDA)
        self.controller.update(divergence.sum(1).mean().item())
        return whiten(advantages, mask)

    def loss(self, ids, mask) -> Tensor:
        values = self.critic(ids, mask.shape[1]) * mask
        return VALUE_COEF * value_loss(values, self.old_values, self.returns, mask, VALUE_CLIP)

    objective = dataclasses.replace(PRESETS["dapo"], epsilon=CLIP)


def train(method: str, steps: int, seed: int = 0, kl_target: float = 10.0) -> dict:
    """Train, and return the curves and costs of the run.

    ``rewards``, ``kl`` (nats of an answer) and ``seconds`` (CPU time so far) are those of each step; ``before`` and
    ``after`` the mean rewards on new questions; ``state_bytes`` what weights, gradients and optimizer take.
    """
    torch.manual_seed(seed)
    config = make_config()
    model = LlamaForCausalLM(config)
    policy, reference = FusedPolicy(model), FusedPolicy(copy.deepcopy(model).requires_grad_(False))
    held_out = questions(500)
    how = {"grpo": GRPO, "ppo": lambda: PPO(config, kl_target)}[method]()
    parameters = [parameter for module in (policy, *how.trained) for parameter in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, betas=(0.9, 0.99))
    record: dict = {"method": method, "seed": seed, "rewards": [], "kl": [], "beta": [], "seconds": []}
    record["before"] = sample(model, held_out)[2].mean().item()
    start = time.process_time()
    for step in range(1, steps + 1):
        ids, mask, rewards = sample(model, how.prompts())
        with torch.no_grad():
            old_logprobs, ref_logprobs = (each(ids, completion_mask=mask) for each in (policy, reference))
        advantages = how.advantages(ids, mask, rewards, old_logprobs, ref_logprobs)
        policy.train()
        for _ in range(UPDATES):
            optimizer.zero_grad()
            result = policy(
                ids, completion_mask=mask, advantages=advantages, objective=how.objective, old_logprobs=old_logprobs,
                ref_logprobs=ref_logprobs if how.objective.beta else None,
            )  # fmt: skip
            (result.loss + how.loss(ids, mask)).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
        kl = ((old_logprobs - ref_logprobs) * mask).sum(1).mean().item()
        beta = how.controller.beta if isinstance(how, PPO) else GRPO_BETA
        for name, value in (("rewards", rewards.mean().item()), ("kl", kl), ("beta", beta)):
            record[name].append(value)
        record["seconds"].append(time.process_time() - start)
        if step % 10 == 0:
            print(f"{method}, step {step}: reward {record['rewards'][-1]:.3f}, KL {kl:.2f} nats, beta {beta:.4f}")
    record["after"] = sample(model, held_out)[2].mean().item()
    record["state_bytes"] = state_bytes(parameters, reference, optimizer)
    record["peak_rss_bytes"] = peak_memory(torch.device("cpu"))["memory/peak_rss_gib"] * 2**30
    print(f"mean reward on {len(held_out)} questions: {record['before']:.3f} before, {record['after']:.3f} after")
    return record


def state_bytes(parameters: list[nn.Parameter], reference: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    """The bytes of the trained weights, their gradients and moments, and of the reference."""
    moments = [value for state in optimizer.state.values() for value in state.values() if value.dim()]
    tensors = {
        "weights": parameters,
        "gradients": [parameter.grad for parameter in parameters],
        "optimizer": moments,
        "reference": list(reference.parameters()),
    }
    return {name: sum(tensor.numel() * tensor.element_size() for tensor in group) for name, group in tensors.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", choices=("ppo", "grpo"), default="ppo")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kl_target", type=float, default=10.0, help="nats of an answer, for PPO's controller")
    parser.add_argument("--output", type=Path, help="where to write the curves and costs, as JSON")
    arguments = parser.parse_args()
    if arguments.steps < 1 or not arguments.kl_target > 0:
        parser.error("--steps must be at least 1, and --kl_target above 0")
    if arguments.output and not arguments.output.parent.is_dir():
        parser.error(f"--output={arguments.output}: the folder {arguments.output.parent} does not exist")
    record = train(arguments.method, arguments.steps, arguments.seed, arguments.kl_target)
    if arguments.output:
        arguments.output.write_text(json.dumps(record), encoding="utf-8")


if __name__ == "__main__":
    main()
