"""The house rules that an import or a stray file could break without any other test noticing."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_kernels_is_a_plain_folder():
    # A package named `kernels` on the path would be imported by transformers in place of the real one.
    assert not list((ROOT / "kernels").glob("*.py"))


def test_grpo_kernels_needs_torch_and_triton_alone():
    unwanted = ("transformers", "grpo_fast", "accelerate", "datasets")
    code = f"import sys, grpo_kernels; print([name for name in {unwanted} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_grpo_kernels_source_imports():
    allowed = {"torch", "triton", "grpo_kernels", "__future__"} | set(sys.stdlib_module_names)
    for path in (ROOT / "kernels").rglob("*.py"):
        for line in path.read_text().splitlines():
            words = line.split()
            if words[:1] in (["import"], ["from"]):
                assert words[1].split(".")[0] in allowed, f"{path.name}: {line}"


def test_files_of_tests_have_names_of_their_own():
    # pytest imports each by its name alone, and one of two with the same name would be left out.
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
