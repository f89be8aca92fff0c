"""Training on a part of each group, chosen by its rewards or lengths."""

import itertools

import pytest
import torch

from grpo_fast.errors import UserError
from grpo_fast.train.advantages import group_advantages
from grpo_fast.train.downsampling import kept_completions
from support.runs import config, trainer


@pytest.mark.parametrize("count", [2, 3, 5, 6])
def test_max_variance_equals_the_best_of_all_subsets(count):
    rewards = torch.cat([torch.randn(20, 6), torch.randint(0, 2, (20, 6)).float()]).double()
    kept = kept_completions(rewards, torch.ones(40, 6), count, "max_variance")
    assert (kept.sum(1) == count).all()
    for row, chosen in zip(rewards, kept, strict=True):
        best = max(row[list(subset)].var(correction=0) for subset in itertools.combinations(range(6), count))
        torch.testing.assert_close(row[chosen].var(correction=0), best)


def test_gfpo_keeps_short_or_efficient_completions():
    rewards = torch.tensor([[1.0, 0.0, 1.0, torch.nan, 0.5]])
    lengths = torch.tensor([[10.0, 2.0, 5.0, 1.0, 4.0]])
    assert kept_completions(rewards, lengths, 2, "shortest").tolist() == [[False, True, False, False, True]]
    assert kept_completions(rewards, lengths, 2, "token_efficiency").tolist() == [[False, False, True, False, True]]
    assert kept_completions(rewards, lengths, 2, "max_variance").tolist() == [[False, True, True, False, False]]


@pytest.mark.parametrize("keep", ["max_variance", "shortest", "token_efficiency"])
def test_collect_trains_on_the_kept_completions(tmp_path, keep):
    """Their advantages and their normaliser are those of a batch that never had the others."""
    made = trainer(tmp_path, num_generations_kept=2, keep_generations=keep, loss_type="grpo", learning_rate=1e-2)
    scored = []
    sample = made.sample
    made.sample = lambda count: scored.append(sample(count)) or scored[-1]
    batch, _ = made.collect()
    rewards = scored[0].rewards.total.view(8, 4)
    lengths = torch.tensor([float(len(one.token_ids)) for one in scored[0].responses]).view(8, 4)
    kept = kept_completions(rewards, lengths, 2, keep)
    expected = group_advantages(rewards[kept], 2).values
    firsts = batch.offsets[:-1]
    assert expected.any()
    torch.testing.assert_close(batch.advantages[firsts].view(8, 4)[kept], expected.float())
    assert set(batch.active) <= set(kept.flatten().nonzero().squeeze(1).tolist())
    assert batch.weights.sum().item() == pytest.approx(1)
    assert made.update(batch)["grad_norm"] > 0


@pytest.mark.parametrize("count", [1, 5])
def test_num_generations_kept_is_within_the_group(tmp_path, count):
    with pytest.raises(UserError, match=f"num_generations_kept={count} is not allowed: it must be from 2 to num_gen"):
        config(tmp_path, num_generations_kept=count)
