"""The wheel that ``pip install`` gets: its files, its metadata and the links of its long description."""

import email
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

import grpo_fast
import grpo_kernels

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REPOSITORY = PROJECT["urls"]["Repository"]
LINK = re.compile(r"(!?)\[[^\]]*\]\(([^)\s]+)")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


@pytest.fixture(scope="module")
def metadata(wheel):
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    return email.message_from_string(wheel.read(name).decode())


def test_wheel_modules_are_those_of_the_repository(wheel):
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "grpo_fast").rglob("*.py")}
    sources |= {str(path.relative_to(ROOT / "kernels")) for path in (ROOT / "kernels").rglob("*.py")}
    assert {name for name in wheel.namelist() if name.endswith(".py")} == sources


@pytest.mark.parametrize("package", ["grpo_fast", "grpo_kernels"])
def test_wheel_packages_are_typed(wheel, package):
    assert f"{package}/py.typed" in wheel.namelist()


def test_wheel_version_is_that_of_both_packages(metadata):
    assert metadata["Version"] == grpo_fast.__version__ == grpo_kernels.__version__


def test_long_description_links_lead_to_files_of_the_repository(metadata):
    """No link is relative, images lead to their bytes, and what a link names is there."""
    links = LINK.findall(metadata.get_payload())
    assert links
    for image, target in links:
        folder = f"{REPOSITORY}/{'raw' if image else 'blob'}/main/"
        if target.startswith(REPOSITORY):
            assert target.startswith(folder), target
            assert (ROOT / target.removeprefix(folder).partition("#")[0]).exists(), target
        else:
            assert target.startswith(("https://", "mailto:", "#")), target


def test_long_description_is_the_readme_apart_from_links(metadata):
    shortened = re.sub(rf"\]\({re.escape(REPOSITORY)}/(?:raw|blob)/main/", "](", metadata.get_payload())
    assert shortened.strip() == (ROOT / "README.md").read_text(encoding="utf-8").strip()


def test_addresses_of_the_project_agree():
    assert all(url == REPOSITORY or url.startswith(f"{REPOSITORY}/") for url in PROJECT["urls"].values())
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["repository-code"] == REPOSITORY
    assert citation["license"] == PROJECT["license"]


def test_requirements_have_pins():
    """Every requirement of the suite's environment is pinned, in alphabetical order, in constraints.txt."""
    pins = [line for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if line[0] != "#"]
    names = [line.partition("==")[0].lower().replace("_", "-") for line in pins]
    needed = [*PROJECT["dependencies"]]
    for extra in ("train", "smollm2", "dev", "bench"):
        needed += PROJECT["optional-dependencies"][extra]
    missing = {re.match(r"[\w-]+", line)[0].lower() for line in needed} - set(names)
    assert not missing, f"add to constraints.txt: {', '.join(sorted(missing))}"
    assert names == sorted(names)
