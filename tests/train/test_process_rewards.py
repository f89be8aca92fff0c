"""Rewards for the steps of an answer, from characters to token advantages."""

import json

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from grpo_fast.errors import UserError
from grpo_fast.rewards import RewardModel
from grpo_fast.rewards.engine import mean_reward, read_steps
from grpo_fast.train.advantages import normalise_steps, step_tokens
from support.small import SMALL, trainer


@pytest.fixture(scope="module")
def tokenizer():
    """Byte-level BPE as in GPT-2: a character may be several tokens, and a token several characters."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<eos>"],
        show_progress=False,
    )  # fmt: skip
    made.train_from_iterator(["so the answer is seven, since three and four are seven. "] * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>")


TEXT = "three and 😀four\nare séven. so 7"


@pytest.mark.parametrize("end", range(1, len(TEXT) + 1))
def test_step_tokens_at_every_end_in_characters(tokenizer, end):
    ids = tokenizer(TEXT)["input_ids"]
    assert tokenizer.decode(ids) == TEXT
    (count,) = step_tokens(tokenizer, [*ids, tokenizer.eos_token_id], [end], True)
    # The oracle counts bytes, of which every token has a whole number.
    lengths = [len(token) for token in tokenizer.convert_ids_to_tokens(ids)]
    assert sum(lengths) == len(TEXT.encode())
    needed, covered, expected = len(TEXT[:end].encode()), 0, 0
    while covered < needed:
        covered += lengths[expected]
        expected += 1
    # The step at the end of the text includes the token that ends the sequence.
    assert count == expected + (end == len(TEXT))


def test_step_tokens_of_several_steps_rise(tokenizer):
    ids = [*tokenizer(TEXT)["input_ids"], tokenizer.eos_token_id]
    ends = [10, 16, 27, len(TEXT)]
    counts = step_tokens(tokenizer, ids, ends, True)
    assert counts == [step_tokens(tokenizer, ids, [end], True)[0] for end in ends]
    assert counts[-1] == len(ids)
    assert [TEXT.startswith(tokenizer.decode(ids[:count])) for count in counts[:2]] == [True, True]


def test_normalise_steps_gives_tokens_the_steps_to_come(tokenizer):
    """DeepSeekMath, section 4.1.3: normalised over all steps of the group, summed over those to come."""
    steps = [[(10, 1.0), (16, 0.0)], [(4, 1.0)], [], [(4, 0.5), (10, 0.5), (16, 2.0)]]
    rewards = torch.tensor([1.0, 0.0, 1.0, 0.5, 0.5, 2.0])
    normal = ((rewards - rewards.mean()) / (rewards.std() + 1e-4)).tolist()
    found = normalise_steps(steps, 4, "group", "mean")
    assert found.equal.tolist() == [False] * 4
    ids = tokenizer(TEXT)["input_ids"]
    expected = [[normal[0] + normal[1], normal[1], 0.0], [normal[2], 0, 0], [0, 0, 0]]
    for line, pairs, values in zip(found.values, steps, expected, strict=False):
        advantages = torch.zeros(len(ids))
        counts = step_tokens(tokenizer, ids, [end for end, _ in pairs], False)
        for count, value in zip(counts, line.tolist(), strict=False):
            advantages[:count] += value
        counts.append(len(ids))
        start = 0
        for count, value in zip(counts, values, strict=False):
            torch.testing.assert_close(advantages[start:count], torch.full((count - start,), float(value)))
            start = count


def test_normalise_steps_separates_groups():
    found = normalise_steps([[(1, 0.3)], [(1, 0.3), (2, 0.3)], [(1, 1.0)], [(1, 3.0)], [], []], 2, "none", "mean")
    assert found.values.tolist() == [[0, 0], [0, 0], [-1, 0], [1, 0], [0, 0], [0, 0]]
    assert found.equal.tolist() == [True, True, False, False, True, True]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0.5, "0.5 beside lists of steps"),
        ([0.5], "0.5 must be a pair"),
        ([(1, 0.5, 2)], r"\(1, 0.5, 2\) must be a pair"),
        ([(1.5, 0.5)], r"\(1.5, 0.5\) must be a pair"),
        ([(2, 1.0), (2, 1.0)], r"the end in \(2, 1.0\) must be from 3 to 5, in the completion's characters"),
        ([(6, 1.0)], r"the end in \(6, 1.0\) must be from 1 to 5"),
        ([(0, 1.0)], r"the end in \(0, 1.0\) must be from 1 to 5"),
        ([(5, float("nan"))], "the reward in .* must be a number within"),
        ([(5, 1e300)], "the reward in .* must be a number within"),
    ],
)
def test_read_steps_names_wrong_steps(value, message):
    with pytest.raises(UserError, match=f"reward function 'mine', completion 3: {message}"):
        read_steps("mine", value, 3, "12345")


def test_mean_reward_of_steps():
    assert mean_reward([(1, 1.0), (2, 0.0), (5, 0.5)]) == 0.5
    model = RewardModel(["exact_answer"], [2.0])
    model.functions = [lambda prompts, completions, **columns: [[(1, 1.0), (2, 0.0)], [], None]]
    scored = model(["a"] * 3, ["12"] * 3, {})
    assert scored.total.tolist()[:1] == [1.0]
    assert scored.total.isnan().tolist() == [False, True, True]
    assert scored.steps == [{0: [(1, 1.0), (2, 0.0)]}, {0: []}, {}]


def test_collect_with_process_rewards(tmp_path):
    """Together with an outcome reward; each digit is a step, which is right if the digit is in its place."""
    (tmp_path / "mine.py").write_text(
        "def places(prompts, completions, answer, **columns):\n"
        "    return [[(i + 1, float(c[i:i+1] == a[i:i+1])) for i in range(len(c))]\n"
        "            for c, a in zip(completions, answer)]\n"
    )
    fields = {"reward_funcs": ["digits_included", f"{tmp_path / 'mine.py'}:places"], "reward_weights": [0.5, 2.0]}
    made = trainer(tmp_path / "run", **fields, scale_rewards="none", log_completions_steps=1)
    batch, metrics = made.collect()
    lines = [json.loads(line) for line in (tmp_path / "run" / "completions" / "completions_00001.jsonl").open()]
    size = SMALL["num_generations"]
    expected = []
    for start in range(0, len(lines), size):
        group = lines[start : start + size]
        outcome = [0.5 * line["rewards"]["digits_included"] for line in group]
        answers = ["".join(sorted(line["prompt"][:-1])) for line in group]
        steps = [
            [float(c == a[i : i + 1]) for i, c in enumerate(line["completion"])]
            for line, a in zip(group, answers, strict=True)
        ]
        every = [reward for rewards in steps for reward in rewards]
        mean = sum(every) / max(len(every), 1)
        for index, sample in enumerate(batch.samples[start : start + size]):
            own = [2.0 * (reward - mean) for reward in steps[index]]
            for token in range(len(sample.completion_ids)):
                # The token that ends the sequence belongs to the last digit.
                first = min(token, len(own) - 1) if own else 0
                expected.append(outcome[index] - sum(outcome) / size + sum(own[first:]))
    torch.testing.assert_close(batch.advantages, torch.tensor(expected), rtol=1e-4, atol=1e-5)
    firsts = batch.advantages[batch.offsets[:-1]]
    assert [line["advantage"] for line in lines] == pytest.approx(firsts.tolist())
    assert metrics["rewards/places/mean"] > 0
    assert made.update(batch)["grad_norm"] > 0
