"""What the compiler makes of the kernels for every GPU, held to bars: no GPU is needed."""

import json

import pytest

from grpo_kernels.triton_kernels.compile_report import LOAD, STORE, product_loop, widest
from grpo_kernels.triton_kernels.tiles import ARCHITECTURES
from support.compiled import compiled

# The instruction of a 16-bit head's products and that of its loads: tensor cores on every GPU, fed by the copy engine
# from sm_90 on.
ENGINES = {
    "sm_80": ("HMMA", "LDGSTS"),
    "sm_86": ("HMMA", "LDGSTS"),
    "sm_89": ("HMMA", "LDGSTS"),
    "sm_90": ("HGMMA", "UTMALDG"),
    "sm_100": ("UTCHMMA", "UTMALDG"),
    "sm_120": ("HMMA", "UTMALDG"),
    "gfx942": ("v_mfma_f32_32x32x8_bf16", "global_load"),
}
# Their code is like that of sm_80 and sm_90; `make test-long` compiles for them.
SIMILAR = ("sm_86", "sm_89", "sm_120")
# Kernel -> bytes of the widest load and store of a thread, at least, and registers at most. `head_gradient` and
# `adamw_step` are those that move gigabytes, whatever V and the number of weights are multiples of.
MEMORY_BOUND = {
    "head_gradient": (16, 16, 80),
    "row_statistics": (16, 16, 112),
    "adamw_step": (16, 16, 80),
    "scale_unless_one": (2, 2, 80),
    "combine_splits": (4, 4, 64),
    "support_bits": (4, 0, 64),
    "support_forward": (16, 4, 168),
    "support_gradient": (4, 4, 80),
    "support_grad_hidden": (16, 2, 96),
    "support_grad_weight": (16, 2, 128),
    "policy_tokens": (4, 4, 64),
    "policy_sequences": (4, 4, 144),
    "kl_forward": (2, 4, 64),
    "kl_backward": (2, 2, 64),
    "masked_sums": (2, 4, 80),
    "masked_mean_backward": (2, 2, 80),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "architecture", [pytest.param(name, marks=[pytest.mark.long] * (name in SIMILAR)) for name in ENGINES]
)
def test_kernels_compile_for_architecture(architecture):
    """Every tile of the table, default and candidate, fits the GPU and keeps its inner loop in registers."""
    lines = compiled("-m", "grpo_kernels.triton_kernels.compile_report", architecture, "--json").splitlines()
    reports = [json.loads(line) for line in lines]
    row = ARCHITECTURES[architecture]
    assert {report["kernel"] for report in reports if not report["product"]} == MEMORY_BOUND.keys()
    heads = [report for report in reports if report["kernel"] == "head_forward"]
    used = {report["variant"].split()[1] for report in heads}
    assert used == {f"{t.rows}x{t.columns}x{t.depth}/{t.part}" for t in (*row.half, *row.single, *(row.capped or ()))}
    for report in reports:
        assert report["shared"] <= row.shared_bytes, report
        assert report["loop_spills"] == 0, report
        # A spill may occur once per tile of products, but not in each step of its loop.
        assert report["stack"] <= 160, report
    for tile in (tile for tile in row.half if tile.per_processor > 1):
        mine = [r for r in heads if f" {tile.rows}x{tile.columns}x{tile.depth}/{tile.part} " in r["variant"]]
        for report in mine:
            # A processor of an H100 has 65,536 registers and 228 KiB of shared memory, of which a program takes 1 more.
            assert tile.per_processor * tile.warps * 32 * (report["registers"] + 1) <= 65536, report
            assert tile.per_processor * (report["shared"] + 1024) <= 228 * 1024, report
        assert mine
    product, load = ENGINES[architecture]
    for report in reports:
        if report["product"] and report["variant"].startswith("bf16"):
            assert report["product"] == product, report
    for report in heads:
        described = "descriptors" in report["variant"]
        assert described or not row.descriptors or "store entropy" in report["variant"]
        if described or not row.descriptors:
            assert report["load"] == load, report
        if not described:
            assert report["load_bytes"] == 16, report
    for report in reports:
        if report["kernel"] in MEMORY_BOUND:
            loads, stores, registers = MEMORY_BOUND[report["kernel"]]
            # Rows of products whose bound is no multiple of 16 may be read one number at a time.
            single = report["kernel"] == "row_statistics" and "odd V" in report["variant"]
            if architecture == "gfx942" and report["variant"].split(" options")[0].endswith("part 512"):
                # A wavefront of 64 threads moves 512 bytes at a time.
                loads = stores = 8
            if "score" in report["variant"]:
                # Statistics alone.
                stores = 4
            assert report["load_bytes"] >= (2 if single else loads), report
            assert report["store_bytes"] >= (2 if single else stores), report
            assert report["registers"] <= registers, report
            assert report["stack"] <= 16, report


def test_every_architecture_has_bars():
    assert ENGINES.keys() == ARCHITECTURES.keys() - {"interpreter"}


NVIDIA = """
.L_x_1:
        LDG.E.128 R4, desc[UR4][R2.64] ;
.L_x_2:
        LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64] ;
        HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        STL [R1], R4 ;
        @P0 BRA `(.L_x_2) ;
        LDL R4, [R1] ;
        STG.E.U16 desc[UR4][R2.64], R4 ;
        STG.E.64 desc[UR4][R2.64], R4 ;
        @P1 BRA `(.L_x_1) ;
"""
AMD = """
.LBB0_3:                                ; %for
        global_load_dwordx4 v[0:3], v[4:5], off
        v_mfma_f32_16x16x16_bf16 v[0:3], v[4:5], v[6:7], v[0:3]
        s_cbranch_scc1 .LBB0_3
        global_store_short v[0:1], v2, off
"""


def test_product_loop_is_the_innermost():
    loop = product_loop(NVIDIA)
    assert [line.split()[0] for line in loop] == [".L_x_2:", "LDGSTS.E.BYPASS.128", "HMMA.16816.F32.BF16", "STL"]
    assert len(product_loop(AMD)) == 3
    assert product_loop("        HMMA.16816.F32.BF16 R4, R8, R12, R4 ;") == []


def testwidest_access_is_the_best_instruction():
    assert widest(LOAD, NVIDIA) == ("LDGSTS", 16)
    assert widest(LOAD, NVIDIA + "        UTMALDG.2D [UR8], [UR4] ;") == ("UTMALDG", 0)
    assert widest(STORE, NVIDIA) == ("STG", 8)
    assert (widest(LOAD, AMD), widest(STORE, AMD)) == (("global_load", 16), ("global_store", 2))
    assert widest(LOAD, "") == ("", 0)
