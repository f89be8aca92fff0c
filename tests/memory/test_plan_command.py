"""The command ``grpo-fast plan``."""

import json

import pytest

from grpo_fast.cli import main
from grpo_fast.errors import UserError
from grpo_fast.memory.plan import GIB, usable
from grpo_fast.memory.report import parse_size
from support.plans import DATA, ROOT, medium


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--vram", "24GiB"], 0, "fits"),
        (["--vram", "2GiB"], 1, "no combination of these switches fits, not even with shorter answers"),
        (["--vram", "24GiB", "--load_in_4bit=true", "--use_vllm=true"], 0, "load_in_4bit does not make that smaller"),
        (["--vram", "lots"], 2, "--vram 'lots' is not a size of memory"),
        (["--vram"], 2, "--vram needs a value"),
        (["--vram", "24GiB", "--prompt_tokens", "0"], 2, "--prompt_tokens='0' is not allowed"),
        (["--vram", "24GiB", "--lora_rr", "3"], 2, "did you mean 'lora_r'"),
        (["--vram", "24GiB", "--model", "nowhere"], 2, "is neither a folder"),
    ],
)
def test_plan_command(arguments, status, message, capsys):
    model = ["--model", str(DATA / "qwen3_1.7b.json"), "--use_peft=true", "--dtype=bfloat16"]
    lengths = ["--max_completion_length=512", "--max_tokens_per_microbatch=1024", "--gradient_checkpointing=true"]
    assert main(["plan", *model, *lengths, "--max_tokens_per_generation_batch=8192", *arguments]) == status
    output = capsys.readouterr()
    assert message in " ".join((output.out + output.err).split())
    assert max(map(len, output.out.splitlines()), default=0) <= 100


def test_plan_command_reads_folders_and_built_in_models(capsys, tmp_path):
    medium().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["hidden_size"] == 128
    assert main(["plan", "--model", str(tmp_path), "--vram=24GiB", "--max_completion_length=64"]) == 0
    assert main(["plan", str(ROOT / "examples" / "sort.yaml"), "--vram=24GiB"]) == 0
    assert "random-llama" in capsys.readouterr().out


def test_parse_size():
    assert parse_size("24GiB") == parse_size("24") == 24 * GIB
    assert parse_size("80GB") == 80 * 10**9
    assert usable(24 * GIB) < 24 * GIB
    with pytest.raises(UserError, match="is not a size"):
        parse_size("0")
