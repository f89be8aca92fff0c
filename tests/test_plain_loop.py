import re
import runpy
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parent.parent / "examples" / "plain_loop.py"


def test_plain_loop_learns(monkeypatch, capsys):
    """From its command line; 150 steps take it above 0.95, and a random answer gets less than 0.1."""
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), "--steps", "50"])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    before, after = map(float, re.search(r"([\d.]+) before, ([\d.]+) after", capsys.readouterr().out).groups())
    assert before < 0.2
    assert after > 0.4


def test_plain_loop_is_short():
    lines = EXAMPLE.read_text().splitlines()
    assert len(lines) < 80
    imports = [line for line in lines if line.startswith(("import ", "from "))]
    ours = [line for line in imports if "grpo" in line]
    assert ours == ["from grpo_fast import FusedPolicy", "from grpo_kernels import PRESETS"]
