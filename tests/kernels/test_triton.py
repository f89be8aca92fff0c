"""The Triton kernels: compilation for every GPU, sizes beyond 32 bits, tuning, refusals."""

import json
import mmap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from triton.runtime.errors import OutOfResources

from conftest import DEVICE
from grpo_kernels import PolicyObjective, kl_estimate, linear_logprob, linear_policy_loss, masked_mean, policy_loss
from grpo_kernels._head_arguments import make_pass
from grpo_kernels.triton_kernels import launch, tiles, triton_head
from grpo_kernels.triton_kernels.engines import ENGINES
from grpo_kernels.triton_kernels.tiles import ARCHITECTURES, Tile, nearest_architecture, splits_of
from support.compiled import compiled
from support.logprob_cases import make, run
from support.loss_cases import make as make_loss
from support.oracle import SLACK, relative_error

interpreted = pytest.mark.skipif(DEVICE != "cpu", reason="tests the interpreter")


@pytest.mark.parametrize("engine", ENGINES)
def test_kernels_are_not_recompiled_for_other_token_counts(engine, monkeypatch):
    monkeypatch.setenv("GRPO_KERNELS_ENGINE", engine)
    changes = json.loads(compiled(str(Path(__file__).parents[1] / "support" / "launches.py")))
    assert len(changes) == 10
    assert not any(changes.values()), changes


@interpreted
@pytest.mark.slow
def test_kernels_with_seventy_thousand_rows(monkeypatch):
    """More rows than a grid's second dimension could count, in one launch of each kernel."""
    row = ARCHITECTURES["interpreter"]
    monkeypatch.setitem(ARCHITECTURES, "interpreter", replace(row, single=(Tile(1024, 16, 16, 16, 4, 2),)))
    monkeypatch.setattr(triton_head, "GRADIENT_ROWS", 2048)
    monkeypatch.setattr(triton_head, "COMBINE_ROWS", 8192)
    N = 70_000
    arguments = {"hidden": torch.randn(N, 4).requires_grad_(), "weight": torch.randn(11, 4).requires_grad_()}
    arguments["targets"] = torch.randint(0, 11, (N,))
    results = {}
    for backend in ("triton", "torch"):
        arguments["hidden"].grad = arguments["weight"].grad = None
        logprobs = linear_logprob(**arguments, backend=backend)
        logprobs.square().sum().backward()
        results[backend] = logprobs, arguments["hidden"].grad, arguments["weight"].grad
    for got, expected in zip(results["triton"], results["torch"], strict=True):
        assert relative_error(got, expected) < SLACK[torch.float32]
    tokens = {"advantages": torch.randn(N), "weights": torch.full((N,), 1 / N), "old_logprobs": logprobs.detach() - 0.1}
    losses = [policy_loss(logprobs.detach(), **tokens, backend=backend).loss for backend in ("triton", "torch")]
    torch.testing.assert_close(*losses)


def far_apart(matrix: torch.Tensor, stride: int) -> torch.Tensor:
    """The matrix with its rows `stride` elements apart, in memory of which only the used pages exist."""
    size = (matrix.shape[0] - 1) * stride + matrix.shape[1]
    memory = mmap.mmap(-1, size * matrix.element_size(), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)
    far = torch.frombuffer(memory, dtype=matrix.dtype).as_strided(matrix.shape, (stride, 1))
    return far.copy_(matrix)


@interpreted
def test_head_offsets_beyond_32_bits():
    """Rows of the weight and of the buffer that start past 2**31 elements."""
    stride = 2**30 + 8
    arguments = make(4, 8, 5, trainable="")
    weight = far_apart(arguments["weight"], stride)
    assert weight.storage_offset() + 4 * weight.stride(0) > 2**31
    _, call = make_pass(
        "test", arguments["hidden"], weight, arguments["targets"], bias=None, temperature=1.0, logit_scale=1.0,
        softcap=None, max_buffer_bytes=None, process_group=None, with_entropy=True, backend="triton",
    )  # fmt: skip
    results = []
    for out in (torch.empty(4, 8)[:, :5], far_apart(torch.zeros(4, 5), stride)):
        (chunk,) = call.chunks(torch.arange(4), out, True)
        e = out.clone()
        call.head.gradient_(chunk, torch.ones(4), torch.ones(4))
        results.append((chunk.stats.logprobs, chunk.stats.entropy, e, out.clone()))
    for near, far in zip(*results, strict=True):
        assert torch.equal(near, far)
    expected = linear_logprob(**arguments, backend="torch")
    torch.testing.assert_close(results[0][0], expected)


@interpreted
@pytest.mark.parametrize("trainable", ["hw", "h"])
@pytest.mark.parametrize("V", [264, 259])
def test_head_with_tensor_descriptors(V, trainable, monkeypatch):
    """The loads and stores of sm_90 and later. V = 259 leaves a last block that is not full."""
    used, describe = [], triton_head.TensorDescriptor.from_tensor

    def recorded(matrix, block_shape):
        used.append(block_shape)
        return describe(matrix, block_shape)

    monkeypatch.setattr(triton_head.TensorDescriptor, "from_tensor", recorded)
    monkeypatch.setitem(ARCHITECTURES, "interpreter", replace(ARCHITECTURES["interpreter"], descriptors=True))
    arguments = make(70, 40, V, trainable=trainable, bias=torch.randn(V))
    got = run(arguments, backend="triton")
    assert len(used) >= 3
    for name in ("hidden", "weight"):
        arguments[name] = arguments[name].detach().requires_grad_(name[0] in trainable)
    for name, expected in run(arguments, backend="torch").items():
        assert expected is None or relative_error(got[name], expected) < SLACK[torch.float32], name


@interpreted
def test_kernels_propagate_nan():
    """Neither a maximum nor a clip hides a NaN in hidden states or the weight."""
    for place in ("hidden", "weight"):
        arguments = make(5, 8, 130, trainable="")
        arguments[place][2, 3] = float("nan")
        logprobs, entropy = linear_logprob(**arguments, return_entropy=True, backend="triton")
        rows = [2] if place == "hidden" else range(5)
        assert logprobs[list(rows)].isnan().all()
        assert entropy[list(rows)].isnan().all()
        assert place == "weight" or logprobs.isnan().sum() == 1
    for name in ("advantages", "old_logprobs"):
        tokens = {key: torch.rand(5) + 0.5 for key in ("logprobs", "advantages", "weights", "old_logprobs")}
        tokens[name][1] = float("nan")
        assert policy_loss(**tokens, backend="triton").loss.isnan()


@interpreted
def test_unchecked_ids_and_offsets_are_harmless(monkeypatch):
    """A GPU does not check ids and offsets: a wrong id gives NaN, wrong offsets are cut off, other rows stay right."""
    monkeypatch.setattr("grpo_kernels._checks.values_can_be_checked", lambda device: False)
    arguments = make(5, 8, 130, trainable="")
    expected = linear_logprob(**arguments)
    arguments["targets"][1], arguments["targets"][3] = 130, -7
    logprobs = linear_logprob(**arguments, backend="triton")
    assert logprobs.isnan().tolist() == [False, True, False, True, False]
    torch.testing.assert_close(logprobs[[0, 2, 4]], expected[[0, 2, 4]])
    # PyTorch itself refuses ids that are too large.
    arguments["targets"][1] = 5
    assert linear_logprob(**arguments, backend="torch").isnan().tolist() == [False, False, False, True, False]
    tokens = {key: torch.rand(9) for key in ("logprobs", "advantages", "weights", "old_logprobs")}
    for offsets in ([0, 4, 900], [-50, 4, 9], [0, 4, 6]):
        loss = policy_loss(
            **tokens, objective=PolicyObjective(level="sequence"), cu_seqlens=torch.tensor(offsets), backend="triton"
        ).loss
        assert loss.isfinite()


@settings(max_examples=300, derandomize=True, deadline=None, database=None)
@given(st.integers(1, 3000), st.integers(1, 1200), st.integers(1, 300))
def test_splits_cover_every_tile_once(row_blocks, tiles_, programs):
    splits, each = splits_of(row_blocks, tiles_, programs)
    assert (splits - 1) * each < tiles_ <= splits * each
    # Within a few percent of work that is spread evenly, or of one tile a program.
    rounds = -(-row_blocks * splits // programs)
    assert rounds * each <= 1.15 * max(row_blocks * tiles_ / programs, 1) + max(row_blocks / programs, 1)


@interpreted
def test_autotuning_measures_each_head_once(monkeypatch, tmp_path):
    row = ARCHITECTURES["interpreter"]
    candidates = (*row.single, Tile(32, 64, 16, 32, 4, 2))
    monkeypatch.setitem(ARCHITECTURES, "interpreter", replace(row, single=candidates))
    monkeypatch.setenv("GRPO_KERNELS_AUTOTUNE", "1")
    monkeypatch.setenv("GRPO_KERNELS_CACHE", str(tmp_path / "cache"))
    launches = []
    original = triton_head.TritonHead.launch_forward

    def counted(head, tile, *args):
        launches.append(tile)
        return original(head, tile, *args)

    monkeypatch.setattr(triton_head.TritonHead, "launch_forward", counted)
    arguments = {name: value.detach() for name, value in make(9, 8, 130).items()}
    first = linear_logprob(**arguments, backend="triton")
    assert set(launches[:-1]) == set(candidates)
    assert launches[-1] in candidates
    known = json.loads((tmp_path / "cache" / "tiles.json").read_text())
    assert list(known) == ["interpreter float32 softcap=False H=8 V=130 store=False entropy=False"]
    slower = next(tile for tile in candidates if tile != launches[-1])
    launches.clear()
    # Another number of tokens uses the same entry of the file.
    (tmp_path / "cache" / "tiles.json").write_text(json.dumps({next(iter(known)): vars(slower)}))
    tiles.tuned.forget()
    again = linear_logprob(**{k: v if k == "weight" else v[:5] for k, v in arguments.items()}, backend="triton")
    assert launches == [slower]
    torch.testing.assert_close(again, first[:5])
    # After a damaged file, or one with other contents, the tiles are measured again.
    for damaged in ("{", "[1]", json.dumps({next(iter(known)): {"width": 3}})):
        (tmp_path / "cache" / "tiles.json").write_text(damaged)
        tiles.tuned.forget()
        torch.testing.assert_close(linear_logprob(**arguments, backend="triton"), first)
        assert json.loads((tmp_path / "cache" / "tiles.json").read_text()).popitem()[1]["rows"] > 0
    # Without a writable folder, the process keeps its measurements in memory.
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GRPO_KERNELS_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.warns(
        UserWarning, match="measurements cannot be stored in .*; set GRPO_KERNELS_CACHE to a writable folder"
    ):
        torch.testing.assert_close(linear_logprob(**arguments, backend="triton"), first)
    launches.clear()
    torch.testing.assert_close(linear_logprob(**arguments, backend="triton"), first)
    assert len(launches) == 1


@interpreted
@pytest.mark.parametrize("autotune", ["0", "1"])
def test_tiles_that_do_not_fit_are_left_out(autotune, monkeypatch, tmp_path):
    row = ARCHITECTURES["interpreter"]
    candidates = (*row.single, Tile(32, 64, 16, 32, 4, 2), Tile(16, 64, 16, 32, 4, 2))
    monkeypatch.setitem(ARCHITECTURES, "interpreter", replace(row, single=candidates))
    monkeypatch.setattr(tiles, "_refused", set())
    monkeypatch.setenv("GRPO_KERNELS_AUTOTUNE", autotune)
    monkeypatch.setenv("GRPO_KERNELS_CACHE", str(tmp_path))
    tiles.tuned.forget()
    original, launches, fitting = triton_head.TritonHead.launch_forward, [], {candidates[1]}

    def limited(head, tile, *args):
        launches.append(tile)
        if tile not in fitting:
            raise OutOfResources(311_352, 232_448, "shared memory")
        return original(head, tile, *args)

    monkeypatch.setattr(triton_head.TritonHead, "launch_forward", limited)
    arguments = {name: value.detach() for name, value in make(9, 8, 130).items()}
    expected = linear_logprob(**arguments, backend="torch")
    for _ in range(2):
        torch.testing.assert_close(linear_logprob(**arguments, backend="triton"), expected)
    # Each call ends with the tile that fits, and the second one does not try another.
    assert launches[-2:] == [candidates[1]] * 2
    assert launches.count(candidates[0]) == 1
    fitting.clear()
    tiles.tuned.forget()
    for said in ("Required: 311352, Hardware limit: 232448", "refused before"):
        with pytest.raises(RuntimeError, match=rf"^no tile of head_forward fits interpreter .*{said}.*backend='torch'"):
            linear_logprob(**arguments, backend="triton")


@interpreted
def test_padded_columns_stay_within_the_buffer():
    head = make_pass(
        "test", torch.zeros(3, 4), torch.zeros(50, 4), torch.zeros(3).long(), bias=None, temperature=1.0,
        logit_scale=1.0, softcap=None, max_buffer_bytes=None, process_group=None, with_entropy=False, backend="triton",
    )[1].head  # fmt: skip
    buffer = head.buffer(3)
    assert buffer.shape == (3, 50)
    assert buffer.stride(0) == triton_head.padded_columns(buffer) == 64
    # A row that has no room, and a last row that has none.
    assert triton_head.padded_columns(torch.empty(3, 50)) == 50
    assert triton_head.padded_columns(torch.empty(2 * 64 + 50).as_strided((3, 50), (64, 1))) == 50


@pytest.mark.parametrize(
    ("name", "row"),
    [("sm_80", "sm_80"), ("sm_87", "sm_86"), ("sm_90", "sm_90"), ("sm_103", "sm_100"), ("sm_121", "sm_120"),
     ("sm_75", None), ("gfx942", "gfx942"), ("gfx90a", None)],
)  # fmt: skip
def test_nearest_architecture(name, row):
    assert nearest_architecture(name) == row


OPERATIONS = {
    "linear_logprob": lambda t: linear_logprob(t, torch.zeros(7, 4, dtype=t.dtype), torch.zeros(3).long(),
                                               backend="triton"),
    "linear_policy_loss": lambda t: linear_policy_loss(t, torch.zeros(7, 4, dtype=t.dtype), torch.zeros(3).long(),
                                                       t[:, 0], t[:, 0], backend="triton"),
    "policy_loss": lambda t: policy_loss(t[:, 0], t[:, 0], t[:, 0], backend="triton"),
    "kl_estimate": lambda t: kl_estimate(t, t, backend="triton"),
    "masked_mean": lambda t: masked_mean(t, t > 0, backend="triton"),
}  # fmt: skip


@pytest.mark.parametrize("op", OPERATIONS)
def test_unsupported_backend_is_refused(op, monkeypatch):
    values = torch.rand(3, 4)
    with pytest.raises(ValueError, match=f"^{op}: backend='triton' cannot run here: float64 is computed by backend="):
        OPERATIONS[op](values.double())
    monkeypatch.setattr(launch, "interpreting", lambda: False)
    monkeypatch.setattr(launch, "device_name", lambda device: None)
    with pytest.raises(ValueError, match=f"^{op}: .*tensors are on .*; it needs a GPU .sm_80, .*, gfx942., or TRITON"):
        OPERATIONS[op](values)
    monkeypatch.setattr(launch, "device_name", lambda device: "sm_75")
    monkeypatch.setattr(torch.Tensor, "device", property(lambda tensor: torch.device("cuda", 0)))
    with pytest.raises(
        ValueError, match=f"^{op}: .*unsupported architecture sm_75; there are kernels for sm_80, "
    ) as e:
        OPERATIONS[op](values)
    assert "\n" not in str(e.value)


def test_missing_triton_is_refused(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"^masked_mean: .*triton is not installed; pip install triton$"):
        OPERATIONS["masked_mean"](torch.rand(3, 4))


@interpreted
@pytest.mark.parametrize("operation", ["linear_logprob", "linear_policy_loss"])
def test_doctor_passes_for_float16_heads(operation):
    from grpo_kernels import doctor

    for backend in ("triton", "torch"):
        assert doctor.worst_share(operation, torch.float16, torch.device("cpu"), backend) < 0.7


@interpreted
def test_doctor_finds_a_wrong_result(monkeypatch, capsys):
    from grpo_kernels import doctor

    monkeypatch.setattr(doctor, "CHECKS", {name: doctor.CHECKS[name] for name in ("policy_loss", "masked_mean")})
    assert doctor.main() == 0
    said = capsys.readouterr().out
    assert "backend='auto' takes torch" in said
    assert "masked_mean          bfloat16  triton  ok" in said
    right = doctor.CHECKS["masked_mean"]

    def wrong(tensors, backend):
        (mean,), names = right(tensors, backend)
        return [mean + (backend == "triton")], names

    monkeypatch.setitem(doctor.CHECKS, "masked_mean", wrong)
    assert doctor.main() == 1
    assert "WRONG" in capsys.readouterr().out


def test_linear_policy_loss_tensors_fit_the_budget():
    """The kernels' buffer is the only tensor of width V, and it keeps to the budget."""
    from support.measure import LargestTensor

    arguments = make_loss([200] * 3)
    budget = 64_000
    with LargestTensor() as largest:
        linear_policy_loss(**arguments, max_buffer_bytes=budget, backend="triton").loss.backward()
    assert largest.numel * 4 <= max(budget, 259 * 17 * 4, 600 * 17 * 4)
