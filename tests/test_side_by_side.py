"""Code of others beside ours: TRL's scripts with the import changed, and the lecture's experiment in plain torch.

The lecture's example samples, rewards and learns on our operations what plain torch does.
"""

import re
import subprocess
import sys
import textwrap
from functools import partial
from itertools import pairwise
from pathlib import Path

import datasets
import pytest
import torch
import yaml

from grpo_fast.config import sizes
from grpo_fast.errors import UserError
from grpo_fast.model.loading import digit_tokenizer
from support.runs import figures
from support.tiny import digit_llama

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import policy_gradient

CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}>"


def plain_included_and_ordered(prompt: list[int], response: list[int]) -> float:
    """As the lecture defines it, on lists."""
    included = sum(number in response for number in prompt)
    return included + sum(left <= right for left, right in pairwise(response))


def plain_right_places(prompt: list[int], response: list[int]) -> float:
    return sum(number == other for number, other in zip(sorted(prompt), response, strict=True))


@pytest.mark.parametrize(
    ("name", "plain"), [("full", plain_right_places), ("partial", plain_included_and_ordered)]
)  # fmt: skip
def test_rewards_equal_those_on_lists(name, plain):
    prompts, responses = torch.randint(4, (2, 200, 4))
    expected = [plain(*pair) for pair in zip(prompts.tolist(), responses.tolist(), strict=True)]
    assert policy_gradient.REWARDS[name](prompts, responses).tolist() == expected
    # The lecture's example: more of this response is right than its places say.
    prompt, response = torch.tensor([[3, 1, 0, 2]]), torch.tensor([[0, 3, 1, 2]])
    assert policy_gradient.REWARDS[name](prompt, response).item() == {"full": 1, "partial": 6}[name]


@pytest.mark.parametrize("name", policy_gradient.REWARDS)
@pytest.mark.parametrize("steps", [1, 3])
def test_training_equals_plain_torch_in_every_epoch(name, steps):
    """In float64, where a difference in rounding changes no sampled number."""
    reward = policy_gradient.REWARDS[name]
    settings = {"epochs": 25, "steps_per_epoch": steps, "dtype": torch.float64}
    fused = list(policy_gradient.train(reward, **settings))
    plain = list(policy_gradient.train(reward, **settings, loss_of=policy_gradient.plain_loss))
    assert [epoch[:2] for epoch in fused] == [epoch[:2] for epoch in plain]
    assert [epoch.loss for epoch in fused] == pytest.approx([epoch.loss for epoch in plain], rel=1e-9, abs=1e-12)
    assert fused[-1].reward > fused[0].reward + 0.5


def test_length_bias_of_grpo_and_not_of_dr_grpo():
    """Under `grpo` right responses become shorter and wrong ones longer, though nothing depends on their lengths."""
    gaps = {name: list(policy_gradient.length_bias(name, epochs=60)) for name in ("grpo", "dr_grpo")}
    gap = {name: sum(wrong - right for right, wrong in run[-10:]) / 10 for name, run in gaps.items()}
    assert gap["grpo"] > 10 > 4 > abs(gap["dr_grpo"])


@pytest.mark.parametrize(
    ("script", "argument", "message"),
    [
        ("policy_gradient.py", "--seeds=0", "--seeds=0 must be at least 1"),
        ("policy_gradient.py", "--output=x.txt", "--output=x.txt must end in .png, .svg or .pdf"),
        ("ppo.py", "--output=nowhere/x.json", "--output=nowhere/x.json: the folder nowhere does not exist"),
    ],
)
def test_example_refuses_wrong_arguments_before_it_trains(script, argument, message):
    path = Path(policy_gradient.__file__).with_name(script)
    done = subprocess.run([sys.executable, path, argument], capture_output=True, text=True)
    assert done.returncode == 2
    assert message in done.stderr


QUICK_START = """
# train_grpo.py
from datasets import load_dataset
from {module} import GRPOTrainer
from {module}.rewards import accuracy_reward

dataset = load_dataset("trl-lib/DeepMath-103K", split="train")

trainer = GRPOTrainer(
    model="Qwen/Qwen2.5-0.5B-Instruct",
    reward_funcs=accuracy_reward,
    train_dataset=dataset,
)
trainer.train()
"""


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A small model and dataset under the names of TRL's documentation."""
    monkeypatch.chdir(tmp_path)
    tokenizer = digit_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    for saved in (digit_llama(), tokenizer):
        saved.save_pretrained("Qwen/Qwen2.5-0.5B-Instruct")
    rows = [{"prompt": [{"role": "user", "content": f"{i} + 1"}], "solution": f"${i + 1}$"} for i in range(12)]
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: datasets.Dataset.from_list(rows))
    monkeypatch.setattr(sizes, "DEFAULT_STEPS", 1)
    monkeypatch.setattr(sizes, "DEFAULT_COMPLETIONS", 8)
    return tmp_path


def test_quick_start_of_trl_runs_with_the_import_changed(hub):
    exec(QUICK_START.format(module="grpo_fast"), {"__name__": "__main__"})
    [folder] = (hub / "runs").iterdir()
    assert folder.name.startswith("Qwen2.5-0.5B-Instruct-GRPO-")
    assert "rewards/accuracy_reward/mean" in figures(folder)[0]
    # Everything else has a name.
    assert list(yaml.safe_load((folder / "config.yaml").read_text())["script_objects"]) == ["train_dataset"]


def test_script_with_two_reward_functions_says_what_divides_what(hub):
    script = textwrap.dedent("""
        from datasets import load_dataset
        from grpo_fast import GRPOConfig, GRPOTrainer

        def reward_len(completions, **kwargs):
            return [-abs(20 - len(completion[0]["content"])) for completion in completions]

        def reward_digits(completions, solution, log_extra=None, **kwargs):
            return [float(completion[0]["content"].isdecimal()) for completion in completions]

        args = GRPOConfig(output_dir="out", num_generations=8, per_device_train_batch_size=1,
                          gradient_accumulation_steps=%d, max_steps=1, max_completion_length=4, report_to="none")
        trainer = GRPOTrainer(model="Qwen/Qwen2.5-0.5B-Instruct", args=args, reward_funcs=[reward_len, reward_digits],
                              train_dataset=load_dataset("any", split="train"))
        trainer.train()
    """)
    message = (
        "num_generations=8 must divide the completions of a generation batch, per_device_train_batch_size=1 x "
        "gradient_accumulation_steps=4 x 1 process = 4; gradient_accumulation_steps=8 would do"
    )
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        exec(script % 4, {"__name__": "__main__"})
    exec(script % 8, {"__name__": "__main__"})
    assert {"rewards/reward_len/mean", "rewards/reward_digits/mean"} <= set(figures(hub / "out")[0])


def test_quick_start_runs_with_trl_itself(hub, monkeypatch):
    """The same script, the same model and data, and the same names of the metrics."""
    trl = pytest.importorskip("trl")
    short = partial(trl.GRPOConfig, max_steps=1, max_completion_length=4, use_cpu=True, report_to="none", bf16=False)
    monkeypatch.setattr(trl.trainer.grpo_trainer, "GRPOConfig", short)
    names = {"__name__": "__main__"}
    exec(QUICK_START.format(module="trl"), names)
    theirs = {name for entry in names["trainer"].state.log_history for name in entry}
    exec(QUICK_START.format(module="grpo_fast"), {"__name__": "__main__"})
    [folder] = (hub / "runs").iterdir()
    ours = set(figures(folder)[0])
    # All rewards are equal, so ours updates nothing and has no gradient norm.
    shared = {"reward", "reward_std", "frac_reward_zero_std", "rewards/accuracy_reward/mean", "completions/mean_length"}
    assert shared <= theirs & ours, (theirs, ours)
