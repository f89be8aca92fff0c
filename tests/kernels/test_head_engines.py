"""The engines of a head's forward: equal results, the choice between them, and what is kept of it on disk."""

import json
from collections.abc import Iterator

import pytest
import torch
from test_fake_cuda import SCRIPT

from conftest import DEVICE
from grpo_kernels import PolicyObjective, budget, linear_logprob, linear_policy_loss
from grpo_kernels._head import Rows
from grpo_kernels._head_arguments import make_pass
from grpo_kernels.budget import product_columns, product_rows
from grpo_kernels.cost_model import CASES, GPUS, head_cost
from grpo_kernels.gpus import rates_of
from grpo_kernels.triton_kernels import engines, product_forward, triton_head
from grpo_kernels.triton_kernels.launch import PlannedGPU, planning
from grpo_kernels.triton_kernels.tiles import ARCHITECTURES
from support.fake_cuda import SHARED_BYTES, run_cases
from support.logprob_cases import make, run
from support.loss_cases import make as make_loss
from support.oracle import compare

ENGINE = "GRPO_KERNELS_ENGINE"
interpreted = pytest.mark.skipif(DEVICE != "cpu", reason="tests the interpreter")


@pytest.fixture
def products(monkeypatch) -> Iterator[list[tuple[int, int]]]:
    """The heads' forwards are made of products of few columns; the blocks of the vocabulary that are multiplied."""
    monkeypatch.setenv(ENGINE, "products")
    monkeypatch.setattr(budget, "SCRATCH_COLUMNS", 64)
    budget.product_rows.cache_clear()
    blocks, multiply = [], product_forward.Products.__call__

    def noted(self, block, width):
        blocks.append((block.start, block.stop))
        return multiply(self, block, width)

    monkeypatch.setattr(product_forward.Products, "__call__", noted)
    yield blocks
    budget.product_rows.cache_clear()


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("trainable", "V"), [("hwb", 259), ("h", 256), ("", 259)])
def test_products_with_every_option(V, trainable, dtype, products):
    bias = torch.randn(V)
    bias[::7] = float("-inf")
    arguments = make(
        33, 17, V, dtype, trainable=trainable, scale=3.0, bias=bias, temperature=torch.rand(33) + 0.5, softcap=2.5,
        logit_scale=0.3,
    )  # fmt: skip
    arguments["targets"] = arguments["targets"] // 7 * 7 + 1
    arguments["targets"][arguments["targets"] >= V] = 1
    arguments["targets"][5:9] = -100
    compare(run, arguments, dtype, backend="triton", max_buffer_bytes=13_000)
    # The vocabulary in several blocks, for several chunks.
    assert len(set(products)) > 1
    assert products.count(products[0]) > 1


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_products_give_the_loss_of_the_fused_kernel(level, dtype, products, monkeypatch):
    results = {}
    for engine in engines.ENGINES:
        monkeypatch.setenv(ENGINE, engine)
        torch.manual_seed(1)
        arguments = make_loss(dtype=dtype)
        arguments["objective"] = PolicyObjective(level=level, entropy_coef=0.1)
        result = linear_policy_loss(**arguments, backend="triton", max_buffer_bytes=20_000)
        result.loss.backward()
        results[engine] = result.loss, result.logprobs, arguments["hidden"].grad, arguments["weight"].grad
    assert products
    for got, expected in zip(*results.values(), strict=True):
        # One rounding of the exponentials, which are relative to the maxima of other tiles.
        torch.testing.assert_close(got, expected, rtol=3e-5 if dtype == torch.float32 else 2**-6, atol=1e-5)


@interpreted
def test_products_propagate_nan(products):
    arguments = make(5, 8, 130, trainable="")
    arguments["hidden"][2, 3] = float("nan")
    logprobs = linear_logprob(**arguments, backend="triton")
    assert logprobs.isnan().tolist() == [False, False, True, False, False]
    assert products


@interpreted
def test_pair_of_programs_shares_a_processor():
    arguments = make(600, 64, 5000, torch.bfloat16, trainable="")
    _, call = make_pass(
        "test", *arguments.values(), bias=None, temperature=1.0, logit_scale=1.0, softcap=None, max_buffer_bytes=None,
        process_group=None, with_entropy=False, backend="triton",
    )  # fmt: skip
    programs = {}
    for tile in ARCHITECTURES["sm_90"].half:
        planned = PlannedGPU("sm_90", 4)
        with planning(planned):
            call.head.launch_forward(tile, Rows(call.hidden, call.targets, None), torch.empty(600, 0), False)
        programs.setdefault(tile.per_processor, set()).add(planned.record[0].programs)
    assert programs == {1: {4}, 2: {8}}


def test_product_columns_fill_rounds_of_tiles():
    columns = product_columns(2944, 151936, 16_000, 512, 132)
    assert columns % 512 == 0
    assert columns <= 16_000
    tiles = 23 * columns // 256
    assert tiles / (-(-tiles // 132) * 132) > 0.97
    # At least one tile, and no more than the vocabulary.
    assert product_columns(100, 300, 7, 512, 132) == 512
    assert product_columns(100, 300, 10**9, 64, 132) == 320
    # 33 tiles of rows are a quarter of the processors, so that any even number of tiles of columns fills them.
    scratch = 128 << 20
    rows = product_rows(3 * 33 * 128, 10**6, 151936, scratch, 512, 132)
    assert rows * 4 * 512 <= scratch
    filled = 151936 * rows / (128 * 256 * 132)
    columns = product_columns(rows, 151936, scratch // (4 * rows), 512, 132)
    assert filled / budget.product_rounds(rows, 151936, columns, 132) > 0.96
    assert product_rows(200, 10**6, 151936, scratch, 512, 132) == 200
    assert product_rows(200, 10**6, 259, 3000, 64, 2) == 2


def test_default_is_the_engine_that_the_cost_model_prefers():
    """The formula behind the default, and the steps of both engines."""
    chosen = set()
    for name, gpu in GPUS.items():
        for case in CASES:
            for H, V in ((2048, 151936), (4096, 151936), (8192, 128256)):
                costs = {e: head_cost(case, 16384, H, V, gpu, engine=e).seconds(gpu) for e in engines.ENGINES}
                preferred = head_cost(case, 16384, H, V, gpu)
                # Where both take about the same time, rounds of tiles decide, which the formula leaves out.
                if abs(costs["fused"] / costs["products"] - 1) > 0.02:
                    assert preferred.engine == min(costs, key=costs.__getitem__), (name, case, H, costs)
                chosen.add(preferred.engine)
    assert chosen == set(engines.ENGINES)
    with pytest.raises(ValueError, match=r"^head_cost: engine must be one of fused, products, or None, got 'best'$"):
        head_cost("scoring", 8, 8, 8, GPUS["h100"], engine="best")


def test_rates_are_known_by_the_names_of_drivers():
    assert rates_of("NVIDIA H100 80GB HBM3") is GPUS["h100"]
    assert rates_of("NVIDIA H200") is GPUS["h200"]
    # Slower than the one with HBM3.
    assert rates_of("NVIDIA H100 PCIe") is None
    assert rates_of("NVIDIA GeForce RTX 4090") is None


@pytest.fixture
def gpu(monkeypatch, tmp_path) -> Iterator[list[str]]:
    """A GPU whose forwards the interpreter computes, and which is faster by products; the timed engines."""
    timed, launches = [], triton_head.TritonHead.launches

    def named(self, *args):
        found = launches(self, *args)
        for name, launch in found.items():
            launch.__name__ = name
        return found

    def time(run):
        timed.append(run.__name__)
        return {"fused": 2.0, "products": 1.0}[run.__name__]

    monkeypatch.setenv("GRPO_KERNELS_CACHE", str(tmp_path))
    monkeypatch.setattr(engines, "on_gpu", lambda device: True)
    monkeypatch.setattr(engines, "timed", time)
    monkeypatch.setattr(triton_head, "MEASURED_ROWS", 32)
    monkeypatch.setattr(triton_head.TritonHead, "launches", named)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H300")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for cached in (engines.predicted, engines.entry):
        cached.cache_clear()
    engines.measured.forget()
    yield timed
    for cached in (engines.predicted, engines.entry):
        cached.cache_clear()
    engines.measured.forget()


@interpreted
def test_engine_is_measured_once_for_a_head(gpu, tmp_path, recwarn):
    arguments = make(40, 17, 130, torch.bfloat16, trainable="")
    expected = linear_logprob(**arguments, backend="torch")
    short = {name: value[:9] if name != "weight" else value for name, value in arguments.items()}
    torch.testing.assert_close(linear_logprob(**short, backend="triton"), expected[:9])
    assert gpu == []
    for _ in range(2):
        torch.testing.assert_close(linear_logprob(**arguments, backend="triton"), expected)
    assert gpu == ["fused", "products"] * engines.ROUNDS
    ((name, engine),) = json.loads((tmp_path / "engines.json").read_text()).items()
    assert engine == "products"
    for part in ("NVIDIA H300", f"torch {torch.__version__}", "bfloat16", "H=17", "V=130", "store=False"):
        assert part in name
    gpu.clear()
    # A process that finds the file measures nothing, and another head is measured by itself.
    engines.measured.forget()
    linear_logprob(**arguments, backend="triton")
    assert gpu == []
    assert not [warning for warning in recwarn if "grpo_kernels" in str(warning.message)]
    linear_logprob(arguments["hidden"].clone().requires_grad_(), *list(arguments.values())[1:], backend="triton")
    assert len(gpu) == 2 * engines.ROUNDS
    assert len(json.loads((tmp_path / "engines.json").read_text())) == 2


@interpreted
@pytest.mark.parametrize(
    ("content", "said"),
    [("{", "holds no measurements and is ignored"), ("[3]", "holds no measurements and is ignored"),
     ('{"NAME": "warp", "other": 3}', "entries of .* that are not of this version are ignored")],
    ids=["broken", "list", "foreign"],
)  # fmt: skip
def test_foreign_files_are_ignored_with_one_line(content, said, gpu, tmp_path):
    arguments = make(40, 17, 130, torch.bfloat16, trainable="")
    (tmp_path / "engines.json").write_text(content)
    with pytest.warns(UserWarning, match=said) as found:
        linear_logprob(**arguments, backend="triton")
    linear_logprob(**arguments, backend="triton")
    assert len([w for w in found if "grpo_kernels" in str(w.message)]) == 1
    assert len(gpu) == 2 * engines.ROUNDS


@interpreted
def test_engine_that_fails_is_not_used(gpu, monkeypatch, tmp_path):
    def broken(*_, **__):
        raise RuntimeError("cuBLAS: not supported\nmore")

    monkeypatch.setattr(torch, "mm", broken)
    arguments = make(40, 17, 130, torch.bfloat16, trainable="")
    with pytest.warns(
        UserWarning, match="the engine 'products' is not used, because it failed: cuBLAS: not supported$"
    ):
        logprobs = linear_logprob(**arguments, backend="triton")
    assert logprobs.isfinite().all()
    # The next call in this process does not try it again, but another process does.
    assert linear_logprob(**arguments, backend="triton").equal(logprobs)
    assert not (tmp_path / "engines.json").exists()


@interpreted
@pytest.mark.parametrize("allowed", [True, False])
def test_float32_products_are_left_out_where_tf32_is_allowed(allowed, gpu, monkeypatch):
    monkeypatch.setattr(engines, "_rounds_to_tf32", lambda: allowed)
    linear_logprob(**make(40, 17, 130, trainable=""), backend="triton")
    assert bool(gpu) != allowed


def test_unknown_engine_is_refused(monkeypatch):
    monkeypatch.setenv(ENGINE, "cublas")
    with pytest.raises(
        ValueError, match=r"^GRPO_KERNELS_ENGINE=cublas is not allowed: it must be fused or products, or unset$"
    ):
        engines.named_engine()


FAKE = ["logprob bf16 none 4096x151936", "loss bf16 head 2048x50257"]
FURTHER = ["loss fp16 hidden 2048x32003", "loss fp32 head 2048x49153", "loss_options fp32-bf16 head 2048x32003"]


@pytest.mark.slow
@interpreted
@pytest.mark.parametrize(
    ("architecture", "cases"),
    [
        pytest.param("sm_90", FAKE, id="sm_90"),
        pytest.param("sm_90", FURTHER, marks=pytest.mark.long, id="sm_90 further"),
        pytest.param("sm_80", FAKE + FURTHER, marks=pytest.mark.long, id="sm_80"),
    ],
)
def test_products_on_a_fake_gpu(architecture, cases, fake_cuda_guard):
    reports = run_cases(SCRIPT, fake_cuda_guard, architecture, *cases, environment={ENGINE: "products"})
    for name, report in reports.items():
        assert report.error is None, f"{name}: {report.error}"
        assert not report.refused
        assert not report.of("head_forward")
        launches = report.of("row_statistics")
        assert all(launch.shared <= SHARED_BYTES[architecture] for launch in launches)
        assert launches
        for launch in launches:
            assert 16 in launch.vectors["ld"], f"{name}: {launch.vectors}"
            assert not {1, 2} & set(launch.vectors["st"]), f"{name}: {launch.vectors}"
            stored = launch.constants["STORE"] == "True"
            assert not stored or 16 in launch.vectors["st"], f"{name}: {launch.vectors}"
        kind = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp32-bf16": "bfloat16"}[name.split()[1]]
        assert any(product.endswith(f"{kind} -> float32") for product in report.products), report.products
        assert report.waits.keys() <= {"partition", "index by a mask"}, name
