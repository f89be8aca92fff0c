"""The cost model notes what the code does, and bars on its predictions: a change that costs traffic shows here."""

from collections import Counter

import pytest
import torch
from triton.runtime import interpreter

from grpo_fast.cli import main
from grpo_kernels import cost_model
from grpo_kernels._head import Head
from grpo_kernels.cost_model import CASES, GPUS, Recorder, head_cost, inputs, launch_step, run_head, steps
from grpo_kernels.triton_kernels import launch, policy_kernels, product_forward, triton_head
from grpo_kernels.triton_kernels.engines import ENGINES
from grpo_kernels.triton_kernels.launch import Launch, interpreting
from support.traffic import Accesses

# N, H, V of a head of Qwen3-8B, and what is allowed there: predicted time over that of the bare products on an H100 and
# on an H200, and bytes. They may only fall.
LARGE = 16384, 4096, 151936
BARS = {"trainable": (1.13, 1.13), "frozen": (1.19, 1.19), "scoring": (1.22, 1.21)}
# GB of both engines, "fused" and "products", with the chunks that an H100's memory allows.
BYTES = {"trainable": (29.8e9, 53.3e9), "frozen": (23.5e9, 47.0e9), "scoring": (2.8e9, 29.0e9)}
SMALL = 70, 40, 384
needs_the_interpreter = pytest.mark.skipif(not interpreting(), reason="the kernels are interpreted")


@pytest.fixture(autouse=True)
def plain_memory(monkeypatch):
    """Filling uninitialised memory would be noted as traffic."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)


@pytest.mark.parametrize("case", CASES)
def test_predictions_stay_below_their_bars(case):
    for name, bar in zip(("h100", "h200"), BARS[case], strict=True):
        cost = head_cost(case, *LARGE, GPUS[name])
        assert cost.seconds(GPUS[name]) <= bar * cost.floor(GPUS[name])
        assert cost.host_waits <= 1
    for engine, size in zip(ENGINES, BYTES[case], strict=True):
        assert head_cost(case, *LARGE, GPUS["h100"], engine=engine).bytes <= size


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", CASES)
def test_head_cost_flops_are_those_of_the_products(case, engine):
    N, H, V = LARGE
    cost = head_cost(case, *LARGE, GPUS["h100"], engine=engine)
    assert cost.engine == engine
    assert cost.flops == CASES[case] * 2 * N * H * V
    parts = cost.parts(GPUS["h100"])
    multiplied = {"forward", "hidden's gradient", "weight's gradient"} & {part for part in parts if parts[part][0]}
    assert len(multiplied) == CASES[case]
    assert all(parts[part][0] == 2 * N * H * V for part in multiplied)


def test_an_added_copy_shows(monkeypatch):
    before = head_cost("trainable", *LARGE, GPUS["h200"])
    original = triton_head.TritonHead.gradient_

    def copying(head, chunk, *grads):
        return original(head, chunk._replace(e=chunk.e.clone()), *grads)

    monkeypatch.setattr(triton_head.TritonHead, "gradient_", copying)
    after = head_cost("trainable", *LARGE, GPUS["h200"])
    N, _, V = LARGE
    assert after.bytes - before.bytes == 2 * 2 * N * V
    added = after.seconds(GPUS["h200"]) - before.seconds(GPUS["h200"])
    assert added >= 2 * 2 * N * V / GPUS["h200"].bandwidth


def test_head_cost_leaves_torch_as_it_was():
    before = torch.cuda.mem_get_info, torch.empty(3).device
    head_cost("scoring", 8, 8, 8, GPUS["h100"])
    with pytest.raises(TypeError):
        head_cost("scoring", 8, 8, 8, GPUS["h100"], "1 GiB")
    assert before == (torch.cuda.mem_get_info, torch.empty(3).device)
    assert launch.processors(torch.device("cpu")) == 2


def test_smaller_chunks_cost_more():
    costs = [head_cost("trainable", 4096, 512, 32000, GPUS["h100"], size << 20) for size in (16, 64, 512)]
    assert costs[0].bytes > costs[1].bytes > costs[2].bytes
    assert costs[0].seconds(GPUS["h100"]) > costs[1].seconds(GPUS["h100"]) > costs[2].seconds(GPUS["h100"])


def noting_launches(monkeypatch, note):
    """Call ``note(launch, run)`` instead of each launch."""

    def noted(kernel, device, programs, *arguments, **constants):
        named = dict(zip(kernel.arg_names, arguments, strict=False)) | constants
        note(Launch(kernel.__name__, programs, named), lambda: run(kernel, device, programs, *arguments, **constants))

    run = launch.run_kernel
    for module in (triton_head, product_forward, policy_kernels):
        monkeypatch.setattr(module, "run_kernel", noted)


@needs_the_interpreter
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", CASES)
def test_kernels_touch_the_bytes_of_their_steps(case, engine, monkeypatch):
    monkeypatch.setenv("GRPO_KERNELS_ENGINE", engine)
    seen = []

    def note(planned, run):
        accesses = Accesses(interpreter._interpreter)
        with monkeypatch.context() as patch:
            patch.setattr(interpreter, "_interpreter", accesses)
            run()
        step = launch_step(planned, 2)
        assert (step.read, step.written) == (len(accesses.read), len(accesses.written)), planned.kernel
        seen.append(planned.kernel)

    noting_launches(monkeypatch, note)
    run_head(case, inputs(*SMALL, torch.device("cpu")), max_buffer_bytes=50_000)
    expected = {"scoring": 2, "frozen": 4, "trainable": 4}[case]
    assert len(set(seen)) == expected
    assert set(seen) <= set(cost_model.WRITTEN)
    assert case == "scoring" or len(seen) > expected


@needs_the_interpreter
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("case", CASES)
def test_planned_steps_are_those_of_a_real_run(case, engine, monkeypatch):
    """On a CPU that multiplies as a GPU does, the real kernels and products have the shapes that are predicted."""
    monkeypatch.setenv("GRPO_KERNELS_ENGINE", engine)
    products = {name: getattr(torch, name) for name in ("mm", "addmm")}
    for name, product in products.items():

        def multiply(*operands, out_dtype=None, out=None, product=product):
            result = product(*(operand.float() for operand in operands))
            return result if out is None else out.copy_(result)

        monkeypatch.setattr(torch, name, multiply)
    monkeypatch.setattr(Head, "mixed_products", property(lambda head: True))
    monkeypatch.setattr(Head, "on_cpu", property(lambda head: False))
    record = []

    def note(planned, run):
        record.append(planned)
        with torch.utils._python_dispatch._disable_current_modes():
            run()

    noting_launches(monkeypatch, note)
    given = inputs(*SMALL, torch.device("cpu"))
    with Recorder(record, shapes_alone=False):
        run_head(case, given, 40_000)
    monkeypatch.undo()
    monkeypatch.setitem(launch.ARCHITECTURES, "planned", launch.ARCHITECTURES["interpreter"])
    gpu = cost_model.GPU("planned", 2, 1.0, 1.0, 1.0, 0)
    planned = head_cost(case, *SMALL, gpu, 40_000, engine).steps

    # A CPU reads the incoming gradient instead of launching the kernel that looks at it.
    compared = cost_model.WRITTEN.keys() - {"scale_unless_one"}

    def shapes(found):
        kernels = [(step.name, step.shapes, step.flops) for step in found if step.name in compared]
        return kernels, Counter((step.name, step.part, step.flops) for step in found if step.name in products)

    assert shapes(list(steps(record, SMALL[1:], 2))) == shapes(planned)
    assert case == "scoring" or len(shapes(planned)[0]) > 4


def test_doctor_predicts_a_head(capsys):
    assert main(["doctor", "--head", "64,1000", "--tokens", "32"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("Predicted, not measured: bfloat16 head, N=32 tokens, H=64, V=1000")
    assert "H100 ms    H200 ms" in said
    assert "trainable (3U), 1 chunk, 1 host wait (it reads which rows have a gradient; none with rows=" in said
    for line in (
        "trainable (3U)",
        "frozen (2U)",
        "scoring (1U)",
        "weight's gradient",
        "bare products",
        "ratio",
        "predicted with products",
    ):
        assert line in said
    assert main(["doctor", "--head", "64,1000", "--device", "h200"]) == 0
    said = capsys.readouterr().out
    assert "N=16384" in said
    assert "H100" not in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--head", "64"], "argument --head: '64' is not allowed: it must be H,V, as in 4096,151936"),
        (["--head", "64,0"], "argument --head: '64,0' is not allowed"),
        (
            ["--head", "64,10", "--tokens", "-3"],
            "argument --tokens: '-3' is not allowed: it must be a number from 1 on",
        ),
        (["--head", "64,10", "--device", "b200"], "argument --device: invalid choice: 'b200'"),
        (["--tokens", "3"], "--tokens and --device need --head H,V"),
    ],
)
def test_doctor_refuses_arguments(arguments, message, capsys):
    assert main(["doctor", *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_head_cost_refuses_arguments():
    with pytest.raises(ValueError, match=r"^head_cost: case must be one of trainable, frozen, scoring, got 'dense'$"):
        head_cost("dense", 1, 1, 1, GPUS["h100"])
    with pytest.raises(ValueError, match=r"^head_cost: tokens, hidden and vocabulary must be at least 1$"):
        head_cost("frozen", 0, 1, 1, GPUS["h100"])
