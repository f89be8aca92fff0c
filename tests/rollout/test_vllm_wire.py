"""Files of weights for another process: who can read them, checksums, and changed values alone."""

import math
import os
import subprocess
import sys

import pytest
import torch

from grpo_fast.rollout.vllm import wire
from grpo_fast.rollout.vllm.wire import BITS, POSITIONS, VALUES, RunFolder, apply_changes, changes, verify


def mode(path):
    return path.stat().st_mode & 0o777


@pytest.fixture
def folder():
    made = RunFolder()
    yield made.new()
    made.remove()


def write(folder):
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(3, dtype=torch.bfloat16)}
    return tensors, wire.write_tensors([("one.safetensors", tensors)], folder, {"text.json": "{}"})


@pytest.mark.parametrize("umask", [0o000, 0o022])
def test_write_tensors_lets_only_the_owner_read(umask):
    before = os.umask(umask)
    try:
        made = RunFolder()
        folder = made.new()
        write(folder)
    finally:
        os.umask(before)
    assert mode(made.path) == mode(folder) == 0o700
    assert {path.name: mode(path) for path in folder.iterdir()} == dict.fromkeys(
        ("one.safetensors", "text.json", wire.SUMS), 0o600
    )
    made.remove()
    assert not made.path.exists()


def test_run_folder_is_removed_when_python_ends(tmp_path):
    program = "from grpo_fast.rollout.vllm.wire import RunFolder; made = RunFolder(); made.new(); print(made.path)"
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    found = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.startswith(str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_verify_returns_the_files_that_were_written(folder):
    tensors, checksum = write(folder)
    paths = verify(folder, checksum)
    assert [path.name for path in paths] == ["one.safetensors", "text.json"]
    found = dict(wire.read_tensors(paths[:1]))
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    with pytest.raises(FileNotFoundError, match="there are no weights in"):
        verify(folder.parent, checksum)


@pytest.mark.parametrize("name", ["one.safetensors", "text.json", wire.SUMS])
def test_verify_refuses_another_content(folder, name):
    _, checksum = write(folder)
    content = bytearray((folder / name).read_bytes())
    content[-2] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"damaged: .*{name}"):
        verify(folder, checksum)


def test_verify_refuses_another_folder(folder):
    _, checksum = write(folder)
    with pytest.raises(ValueError, match="damaged"):
        verify(folder, checksum[::-1])


def step(tensors, share, generator):
    """`tensors` with a `share` of the values replaced by any bits at all."""
    after = {}
    for name, tensor in tensors.items():
        bits = tensor.clone().view(wire.INTEGERS[tensor.element_size()])
        at = torch.rand(bits.shape, generator=generator) < share
        bits[at] = torch.randint(-(2**15), 2**15, bits.shape, generator=generator).to(bits.dtype)[at]
        after[name] = bits.view(tensor.dtype)
    return after


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.02, 0.2, 0.97, 1.0])
def test_changes_restore_every_bit(dtype, share, folder):
    """Also of NaN and of -0, through files, step after step."""
    generator = torch.Generator().manual_seed(0)
    tensors = {"a": torch.randn(37, 53, generator=generator).to(dtype), "b": torch.zeros(1, dtype=dtype)}
    sent, received = {}, {}
    for number in range(3):
        groups = wire.in_files(changes(tensors.items(), sent), most=3000)
        (inner := folder / str(number)).mkdir()
        checksum = wire.write_tensors(((f"{index}.safetensors", group) for index, group in enumerate(groups)), inner)
        apply_changes(wire.read_tensors(verify(inner, checksum)), received)
        for key, tensor in tensors.items():
            assert torch.equal(wire._integers(received[key]), wire._integers(tensor))
            assert received[key].dtype == dtype
            assert received[key].shape == tensor.shape
        tensors = step(tensors, share, generator)


@pytest.mark.parametrize(
    ("changed", "parts"),
    [(0, set()), (3, {VALUES, POSITIONS}), (100, {VALUES, BITS}), (900, {VALUES, BITS}), (950, {""}), (1000, {""})],
)
def test_changes_choose_the_smallest_form(changed, parts):
    """Of 1,000 bfloat16 values: positions take 6 bytes a change, bits 125 and 2 a change, all values 2,000."""
    before = torch.ones(1000, dtype=torch.bfloat16)
    after = before.clone()
    after[:changed] = 2
    sent = {"w": before.clone()}
    given = dict(changes([("w", after)], sent))
    assert given.keys() == {f"w{part}" for part in parts}
    size = sum(tensor.nbytes for tensor in given.values())
    assert size == min(6 * changed, math.ceil(1000 / 8) + 2 * changed, 2000)
    assert torch.equal(sent["w"], after)


def test_changes_send_minus_zero():
    sent = {"w": torch.zeros(64, dtype=torch.bfloat16)}
    after = sent["w"].clone()
    after[5] = -0.0
    received = {"w": torch.zeros(64, dtype=torch.bfloat16)}
    apply_changes(changes([("w", after)], sent), received)
    assert torch.signbit(received["w"]).nonzero().tolist() == [[5]]
