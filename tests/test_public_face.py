"""What a user imports: names that load on first use, and one version for both packages."""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

import grpo_fast
import grpo_kernels

ROOT = Path(__file__).parent.parent


def run(code: str) -> str:
    path = [str(ROOT), str(ROOT / "kernels")]
    code = f"import sys; sys.path[:0] = {path}\n{code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_import_of_the_package_loads_no_library():
    heavy = ("torch", "transformers", "grpo_kernels", "numpy")
    assert run(f"import grpo_fast; print([name for name in {heavy} if name in sys.modules])") == "[]"


def test_import_of_the_config_loads_neither_model_nor_trainer():
    loaded = run("from grpo_fast import GRPOConfig; print(*[n for n in sys.modules if n.startswith('grpo_fast')])")
    assert {"grpo_fast.model", "grpo_fast.trainer", "grpo_fast.train"}.isdisjoint(loaded.split())


def test_public_names_are_those_of_their_modules():
    from grpo_fast.config import GRPOConfig
    from grpo_fast.integrations import cs336
    from grpo_fast.model.policy import FusedPolicy
    from grpo_fast.policy import FusedPolicy as policy_of_earlier_versions
    from grpo_fast.trainer import GRPOTrainer

    assert grpo_fast.FusedPolicy is FusedPolicy is policy_of_earlier_versions
    assert grpo_fast.GRPOConfig is GRPOConfig
    assert grpo_fast.GRPOTrainer is GRPOTrainer
    assert grpo_fast.cs336 is cs336


def test_dir_lists_the_public_names():
    names = ["DistillConfig", "DistillationTrainer", "FusedPolicy", "GRPOConfig", "GRPOTrainer", "SFTConfig"]
    names += ["SFTTrainer", "__version__", "cs336"]
    assert sorted(grpo_fast.__all__) == names
    assert run("import grpo_fast; print(dir(grpo_fast))") == str(names)
    assert all(getattr(grpo_fast, name) is not None for name in names)
    assert all(hasattr(grpo_kernels, name) for name in grpo_kernels.__all__)


def test_unknown_attribute_is_named_with_the_known_ones():
    with pytest.raises(AttributeError, match="module 'grpo_fast' has no attribute 'Trainer'; it has DistillConfig, "):
        _ = grpo_fast.Trainer
    with pytest.raises(ImportError, match="cannot import name 'Trainer'"):
        exec("from grpo_fast import Trainer")


def test_version_is_one():
    """Both packages ship in one distribution, whose metadata holds the same version."""
    assert grpo_fast.__version__ == grpo_kernels.__version__
    try:
        installed = importlib.metadata.version("grpo-fast")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("grpo-fast is not installed")
    assert grpo_fast.__version__ == installed
