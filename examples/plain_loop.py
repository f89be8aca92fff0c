"""GRPO in a plain training loop: a small Llama with random weights learns to sort two digits.

    python examples/plain_loop.py [--steps 150]

It does without grpo-fast's trainer: the model samples with `generate`, and `FusedPolicy` computes the loss of the
sampled tokens without logits.
"""

import argparse

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from grpo_fast import FusedPolicy
from grpo_kernels import PRESETS

DIGITS, ARROW, END = 2, 10, 11  # the tokens are the ten digits, an arrow after the question, and the end
PROMPTS, GROUP = 32, 8


def questions(count: int) -> torch.Tensor:
    """``[count, 3]``: two digits and the arrow."""
    digits = torch.randint(10, (count, DIGITS))
    return torch.cat([digits, torch.full((count, 1), ARROW)], 1)


def reward(prompt_ids: torch.Tensor, completion_ids: torch.Tensor) -> torch.Tensor:
    """``[B]``: the share of the sorted digits, and of the end after them, that are in the right place."""
    answer = torch.full_like(prompt_ids, END)
    answer[:, :DIGITS] = prompt_ids[:, :DIGITS].sort(1).values
    width = completion_ids.shape[1]
    return (completion_ids == answer[:, :width]).sum(1) / (DIGITS + 1)


def sample(model: LlamaForCausalLM, prompt_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Prompts with answers ``[B, T]``, the answers' mask ``[B, K]`` (up to the first end), and rewards ``[B]``."""
    model.eval()
    mask = torch.ones_like(prompt_ids)
    ids = model.generate(prompt_ids, attention_mask=mask, do_sample=True, max_new_tokens=DIGITS + 1)
    completion_ids = ids[:, prompt_ids.shape[1] :]
    mask = ((completion_ids == END).cumsum(1) - (completion_ids == END).long()) == 0
    return ids, mask, reward(prompt_ids, completion_ids.where(mask, -1))


def main(steps: int, seed: int = 0) -> tuple[float, float]:
    """Train, and return the mean reward on new questions before and after."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=12, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=16, pad_token_id=END, bos_token_id=None, eos_token_id=END,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    policy = FusedPolicy(model)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3, betas=(0.9, 0.99))
    held_out = questions(500)
    before = sample(model, held_out)[2].mean().item()
    for step in range(1, steps + 1):
        ids, mask, rewards = sample(model, questions(PROMPTS).repeat_interleave(GROUP, 0))
        groups = rewards.view(PROMPTS, GROUP)
        advantages = groups - groups.mean(1, keepdim=True)
        advantages = (advantages / (groups.std(1, keepdim=True) + 1e-4)).flatten()
        policy.train()
        result = policy(ids, completion_mask=mask, advantages=advantages, objective=PRESETS["dapo"])
        result.loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            print(f"step {step}: reward {rewards.mean():.3f}, {mask.sum(1).float().mean():.1f} tokens")
    after = sample(model, held_out)[2].mean().item()
    print(f"mean reward on {len(held_out)} questions: {before:.3f} before, {after:.3f} after")
    return before, after


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=150)
    main(**vars(parser.parse_args()))
