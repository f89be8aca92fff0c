"""Compile every kernel for every architecture, without a GPU, and report what each needs.

    python -m grpo_kernels.triton_kernels.compile_report              # a table
    python -m grpo_kernels.triton_kernels.compile_report sm_90 --json # one architecture, for a program to read

A row names shared memory in bytes, registers a thread, spilled bytes a thread ("stack"), how many instructions of the
innermost loop around the matrix products touch spilled values, the instruction of these products, the best instruction
that loads from memory, and the bytes that a thread moves by the widest load and store (0 where the copy engine moves
whole blocks). Arguments are as aligned as a launch may find them, but for V in the rows "odd V".
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from grpo_kernels.triton_kernels import (
    adamw_kernels,
    elementwise_kernels,
    head_kernels,
    known_lse_kernels,
    policy_kernels,
    product_forward,
    row_kernels,
    scale_kernels,
    support_kernels,
    support_launches,
    triton_gather,
    triton_head,
)
from grpo_kernels.triton_kernels.launch import interpreting
from grpo_kernels.triton_kernels.tiles import ARCHITECTURES, Tile

MATRIX_PRODUCT = re.compile(r"\b(HGMMA|HMMA|UTC\w*MMA|FFMA|v_mfma\w*|v_fma\w*|v_pk_fma\w*)")
SPILL = re.compile(r"\b(LDL|STL)\b")
DOT_DTYPES = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}
# How data come from memory, the best first: by the copy engine, straight to shared memory, to registers.
LOAD = re.compile(r"\b(UTMALDG|LDGSTS|LDG|(?:global|buffer)_load)([\w.]*)")
STORE = re.compile(r"\b(UTMASTG|STG|(?:global|buffer)_store)([\w.]*)")
# Part of an instruction's name -> bytes that it moves for each thread; 4 without any.
BYTES = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1,
         "dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "ushort": 2, "short": 2, "ubyte": 1, "byte": 1}  # fmt: skip
# The types of arguments by their names; the others are pointers to float32.
SIZES = (
    "N",
    "V",
    "padded_columns",
    "H",
    "hidden_stride",
    "weight_stride_v",
    "out_stride",
    "stride",
    "plane_stride",
    "maximum_stride",
    "first_column",
    "tiles_per_split",
    "splits",
    "support_stride",
    "weight_stride_h",
)
NUMBERS = ("logit_scale", "bias_scale", "gradient_scale", "softcap", "low", "high", "delta", "pos", "neg")
NUMBERS += ("decay_pos", "decay_neg", "beta", "kl_clip", "entropy_coef")
NUMBERS += ("decay", "beta1", "beta2", "step_size", "bias_correction", "eps")
TYPES = {
    **dict.fromkeys((*SIZES, "numel", "length", "inner"), "i32"),
    **dict.fromkeys(NUMBERS, "fp32"),
    **dict.fromkeys(("targets", "offsets", "starts", "ends", "tokens", "order", "bounds", "pair_tokens"), "*i64"),
    **dict.fromkeys(("ids", "words", "support"), "*i32"),
    "mask": "*i1",
}


@dataclass(frozen=True)
class Report:
    architecture: str
    kernel: str
    variant: str
    shared: int
    registers: int
    stack: int
    loop_spills: int
    product: str
    load: str
    load_bytes: int
    store_bytes: int


@dataclass(frozen=True)
class Variant:
    """One specialisation of a kernel: the types of arguments that differ from `TYPES`, and compile-time constants.

    `odd` are sizes that are no multiples of 16, though the kernel would be compiled for it if they were.
    """

    kernel: triton.JITFunction
    name: str
    types: dict[str, str]
    constants: dict[str, object]
    warps: int = 4
    stages: int = 3
    odd: frozenset[str] = frozenset()


def head_variants(architecture: str) -> Iterator[Variant]:
    row = ARCHITECTURES[architecture]
    for tiles, dtype in ((row.half, "bf16"), (row.single, "fp32")):
        for index, tile in enumerate(tiles):
            # The default tile in all its uses; candidates for autotuning in the heaviest and in the lightest.
            uses = [(store, entropy) for store in (True, False) for entropy in (True, False)] if index == 0 else []
            for store, entropy in uses or [(False, False)]:
                yield _head_forward(row.descriptors, tile, dtype, store, entropy, options=False)
            if not (row.capped and dtype == "bf16"):
                yield _head_forward(row.descriptors, tile, dtype, True, True, options=True)
    for tile in row.capped or ():
        yield _head_forward(row.descriptors, tile, "bf16", True, True, options=True)
        yield _head_forward(row.descriptors, tile, "bf16", False, True, options=True)
    if row.descriptors:
        # Inputs that descriptors cannot address go through plain pointers on every architecture.
        yield _head_forward(False, row.half[0], "bf16", True, True, options=False)
    for tiles, dtype in ((row.half, "bf16"), (row.single, "fp32")):
        capped = row.capped if dtype == "bf16" and row.capped else tiles
        for store in (True, False):
            yield _with_support(_head_forward(row.descriptors, capped[0], dtype, store, entropy=True, options=True))
        yield _with_support(_head_forward(row.descriptors, tiles[0], dtype, True, entropy=True, options=False))
        yield _with_support(_head_gradient_known(row.descriptors, capped[0], dtype, options=True))
    for tiles, dtype in ((row.half, "bf16"), (row.half, "fp16"), (row.single, "fp32")):
        yield _head_gradient_known(row.descriptors, tiles[0], dtype, options=False)
        capped = row.capped if dtype != "fp32" and row.capped else tiles
        yield _head_gradient_known(row.descriptors, capped[0], dtype, options=True)
        if row.descriptors:
            yield _head_gradient_known(False, tiles[0], dtype, options=False)
    for dtype in ("bf16", "fp16", "fp32"):
        for part in (row.half[0].part, product_forward.ROW_WIDTH):
            for options in (False, True):
                yield _head_gradient(part, dtype, options)
        yield replace(_head_gradient(row.half[0].part, dtype, False), name=f"{dtype} odd V", odd=frozenset({"V"}))
        for options in (False, True):
            yield _row_statistics(dtype, True, options)
    yield _row_statistics("bf16", False, False)


def _head_forward(descriptors: bool, tile: Tile, dtype: str, store: bool, entropy: bool, options: bool) -> Variant:
    types = {}
    blocks = {
        "hidden": (tile.rows, tile.depth),
        "weight": (tile.columns, tile.depth),
        "out": (tile.rows, tile.part),
    }
    for name, (rows, columns) in blocks.items():
        described = descriptors and (store or name != "out")
        types[name] = f"tensordesc<{dtype}[{rows}, {columns}]>" if described else f"*{dtype}"
    constants = {
        "HAS_BIAS": options, "HAS_TEMPERATURE": options, "HAS_SOFTCAP": options, "WITH_ENTROPY": entropy,
        "STORE": store, "HAS_SUPPORT": False, "DESCRIPTORS": descriptors, "BLOCK_N": tile.rows, "BLOCK_V": tile.columns,
        "PART_V": tile.part, "BLOCK_K": tile.depth, "weight_stride_h": 1,
        "DOT_DTYPE": DOT_DTYPES[dtype],
    }  # fmt: skip
    name = f"{dtype} {tile.rows}x{tile.columns}x{tile.depth}/{tile.part} {'store' if store else 'score'}"
    name += (" entropy" if entropy else "") + (" options" if options else "") + (" descriptors" if descriptors else "")
    return Variant(head_kernels.head_forward, name, types, constants, tile.warps, tile.stages)


def _with_support(variant: Variant) -> Variant:
    return replace(variant, name=f"{variant.name} support", constants=variant.constants | {"HAS_SUPPORT": True})


def _head_gradient_known(descriptors: bool, tile: Tile, dtype: str, options: bool) -> Variant:
    forward = _head_forward(descriptors, tile, dtype, store=True, entropy=options, options=options)
    constants = forward.constants | {
        "HAS_GRAD": dtype != "fp16" or options, "HAS_GRAD_ENTROPY": options, "ROW_SCALED": dtype == "fp16",
    }  # fmt: skip
    for name in ("WITH_ENTROPY", "STORE"):
        del constants[name]
    return replace(forward, kernel=known_lse_kernels.head_gradient_known, constants=constants)


def _head_gradient(part: int, dtype: str, options: bool) -> Variant:
    constants = {
        "HAS_TEMPERATURE": options, "HAS_SOFTCAP": options, "HAS_GRAD": True, "HAS_GRAD_ENTROPY": options,
        "ROW_SCALED": dtype == "fp16", "PART_V": part, "PARTS": triton_head.GRADIENT_PARTS,
        "ROWS": triton_head.gradient_rows(part),
    }  # fmt: skip
    name = f"{dtype} part {part}" + (" options" if options else "")
    return Variant(head_kernels.head_gradient, name, {"e": f"*{dtype}"}, constants, triton_head.GRADIENT_WARPS)


def _row_statistics(dtype: str, store: bool, options: bool) -> Variant:
    """Scoring has the scales of FP8 operands."""
    constants = {
        "HAS_SCALES": not store, "HAS_BIAS": options, "HAS_TEMPERATURE": options, "HAS_SOFTCAP": options,
        "WITH_ENTROPY": options, "STORE": store, "WIDTH": product_forward.ROW_WIDTH, "ROWS": product_forward.ROW_ROWS,
    }  # fmt: skip
    name = f"{dtype} {'store' if store else 'score with scales'}" + (" options" if options else "")
    types = {"out": f"*{dtype}"}
    return Variant(row_kernels.row_statistics, name, types, constants, product_forward.ROW_WARPS)


def support_variants() -> Iterator[Variant]:
    """The kernels on the kept ids alone."""
    constants = {"BLOCK": support_launches.BITS_BLOCK}
    yield Variant(support_kernels.support_bits, "", {}, constants, support_launches.BITS_WARPS)
    block = {"PAIRS": triton_gather.PAIRS, "BLOCK_H": triton_gather.BLOCK_H}
    for dtype in ("bf16", "fp16", "fp32"):
        types = dict.fromkeys(("hidden", "weight", "out"), f"*{dtype}")
        product = {"DOT_DTYPE": DOT_DTYPES[dtype], **block}
        for options in (False, True):
            flags = {"HAS_BIAS": options, "HAS_TEMPERATURE": options, "HAS_SOFTCAP": options}
            name = dtype + (" options" if options else "")
            constants = {"weight_stride_h": 1, **flags, **product}
            yield Variant(support_kernels.support_forward, name, types, constants, triton_gather.WARPS)
            constants = {"HAS_WEIGHT": True, "HAS_BIAS": options, "ADD": options, **product}
            yield Variant(support_kernels.support_grad_weight, name, types, constants, triton_gather.WARPS)
        constants = {"weight_stride_h": 1, **product}
        yield Variant(support_kernels.support_grad_hidden, dtype, types, constants, triton_gather.WARPS)
    for options in (False, True):
        flags = {"HAS_TEMPERATURE": options, "HAS_SOFTCAP": options, "HAS_GRAD_ENTROPY": options}
        constants = {**flags, "PAIRS": triton_gather.GRADIENT_PAIRS}
        name = "options" if options else ""
        yield Variant(support_kernels.support_gradient, name, {}, constants, triton_gather.GRADIENT_WARPS)


def small_variants() -> Iterator[Variant]:
    """The kernels that are bound by memory; the same on every architecture."""
    constants = {"CHECK_TARGETS": True, "BLOCK": triton_head.COMBINE_ROWS}
    yield Variant(head_kernels.combine_splits, "", {}, constants, triton_head.COMBINE_WARPS)
    flags = ("HAS_DELTA", "HAS_OLD", "HAS_REF", "HAS_CORRECTION", "HAS_ENTROPY", "KL_BIAS_CORRECTION", "PRODUCT")
    for kernel in (policy_kernels.policy_tokens, policy_kernels.policy_sequences):
        for kind, index in policy_kernels.KINDS.items():
            constants = {"KIND": index, "KL": 3, **dict.fromkeys(flags, True), "BLOCK": policy_kernels.BLOCK}
            yield Variant(kernel, kind, {}, constants, policy_kernels.WARPS)
    for dtype in ("bf16", "fp32"):
        sizes = {"values": f"*{dtype}", "blocks": "i32"}
        constants = {"BLOCK": scale_kernels.BLOCK}
        yield Variant(scale_kernels.scale_unless_one, dtype, sizes, constants, scale_kernels.WARPS)
    for weight, grad in (("bf16", "bf16"), ("bf16", "fp32"), ("fp32", "fp32")):
        sizes = {"weight": f"*{weight}", "grad": f"*{grad}", "key": "i32", "second_key": "i32"}
        constants = {"BLOCK": adamw_kernels.BLOCK}
        yield Variant(adamw_kernels.adamw_step, f"{weight}, {grad} gradient", sizes, constants, adamw_kernels.WARPS)
    block = {"BLOCK": elementwise_kernels.BLOCK}
    types = {"logprobs": "*bf16", "grad_logprobs": "*bf16"}
    for kl in (1, 2, 3):
        yield Variant(elementwise_kernels.kl_forward, f"k{kl}", types, {"KL": kl, **block})
        constants = {"KL": kl, "NEEDS_LOGPROBS": True, "NEEDS_REF": True, **block}
        yield Variant(elementwise_kernels.kl_backward, f"k{kl}", types, constants)
    for inner in (1, 128):
        constants = {"BLOCK_L": elementwise_kernels.BLOCK // inner, "BLOCK_I": inner}
        yield Variant(elementwise_kernels.masked_sums, f"inner {inner}", {"values": "*bf16"}, constants)
    yield Variant(elementwise_kernels.masked_mean_backward, "", {"grad_values": "*bf16"}, block)


def target_of(architecture: str) -> GPUTarget:
    if architecture.startswith("gfx"):
        return GPUTarget("hip", architecture, 64)
    return GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)


def compile_variant(variant: Variant, architecture: str) -> Report:
    names = variant.kernel.arg_names
    types = {name: variant.types.get(name, TYPES.get(name, "*fp32")) for name in names}
    types |= dict.fromkeys(variant.constants, "constexpr")
    attributes = {
        (index,): [["tt.divisibility", 16]]
        for index, parameter in enumerate(variant.kernel.params)
        if is_aligned(parameter, types[parameter.name]) and parameter.name not in variant.odd
    }
    source = ASTSource(
        variant.kernel,
        signature=types,
        constexprs={(names.index(name),): value for name, value in variant.constants.items()},
        attrs=attributes,
    )
    compiled = triton.compile(
        source,
        target=target_of(architecture),
        options={"num_warps": variant.warps, "num_stages": variant.stages},
    )
    read = _read_amd if architecture.startswith("gfx") else _read_nvidia
    registers, stack, loop_spills, assembly = read(compiled.asm)
    loop = "\n".join(product_loop(assembly))
    product = MATRIX_PRODUCT.search(loop) if "_products(" in variant.kernel.src else None
    load, load_bytes = widest(LOAD, assembly)
    return Report(
        architecture, variant.kernel.__name__, variant.name, compiled.metadata.shared, registers, stack, loop_spills,
        product[0] if product else "", load, load_bytes, widest(STORE, assembly)[1],
    )  # fmt: skip


def is_aligned(parameter: triton.runtime.jit.KernelParam, kind: str) -> bool:
    """Whether the kernel is compiled for an address, or a size, that is a multiple of 16."""
    if kind.startswith("*"):
        return not (parameter.do_not_specialize or parameter.do_not_specialize_on_alignment)
    return kind.startswith("i") and not parameter.do_not_specialize


def widest(pattern: re.Pattern, assembly: str) -> tuple[str, int]:
    """The best instruction that matches, and the bytes of its widest form."""
    found = [match.groups() for match in pattern.finditer(assembly)]
    if not found:
        return "", 0
    best = max((name for name, _ in found), key=lambda name: (name.startswith("UTMA"), name == "LDGSTS"))
    if best.startswith("UTMA"):
        return best, 0
    forms = [re.split(r"[._]", form) for name, form in found if name == best]
    return best, max(next((BYTES[part] for part in form if part in BYTES), 4) for form in forms)


def _read_amd(asm: dict) -> tuple[int, int, int, str]:
    def number(field: str) -> int:
        return int(re.search(rf"\.{field}:\s*(\d+)", asm["amdgcn"]).group(1))

    spills = number("vgpr_spill_count")
    # The report does not locate spills, so any spill counts as one in the loop.
    return number("vgpr_count"), number("private_segment_fixed_size"), spills, asm["amdgcn"]


def _read_nvidia(asm: dict) -> tuple[int, int, int, str]:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(asm["cubin"])
        usage = _output(tools / "cuobjdump", "--dump-resource-usage", binary)
        registers, stack = (int(re.search(rf"{field}:(\d+)", usage).group(1)) for field in ("REG", "STACK"))
        assembly = _output(tools / "nvdisasm", "-c", binary)
    spills = sum(bool(SPILL.search(line)) for line in product_loop(assembly))
    return registers, stack, spills, assembly


def _output(*command) -> str:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True).stdout


def product_loop(assembly: str) -> list[str]:
    """The lines of the shortest loop around matrix products, in `nvdisasm -c` or AMD assembly; none without a loop."""
    lines = assembly.splitlines()
    labels = {line.strip().rstrip(":").split(":")[0]: index for index, line in enumerate(lines)
              if re.match(r"\s*\.L\w+:", line)}  # fmt: skip
    loops = []
    for index, line in enumerate(lines):
        branch = re.search(r"\b(?:BRA\b.*`\(|s_c?branch\w*\s+)(\.L\w+)", line)
        start = labels.get(branch.group(1)) if branch else None
        if start is not None and start < index and any(MATRIX_PRODUCT.search(text) for text in lines[start:index]):
            loops.append((start, index))
    if not loops:
        return []
    start, end = min(loops, key=lambda loop: loop[1] - loop[0])
    return lines[start:end]


def reports(architecture: str) -> Iterator[Report]:
    for variant in (*head_variants(architecture), *support_variants(), *small_variants()):
        yield compile_variant(variant, architecture)


def main() -> int:
    known = [name for name in ARCHITECTURES if name != "interpreter"]
    parser = argparse.ArgumentParser(prog="python -m grpo_kernels.triton_kernels.compile_report", description=__doc__)
    parser.add_argument("architectures", nargs="*", metavar="ARCHITECTURE", help=f"of {', '.join(known)}; default: all")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    chosen = parser.parse_args()
    unknown = [name for name in chosen.architectures if name not in known]
    if unknown:
        parser.error(f"unknown architecture {unknown[0]}; choose of {', '.join(known)}")
    if interpreting():
        parser.error("TRITON_INTERPRET=1 leaves nothing to compile; unset it")
    for architecture in chosen.architectures or known:
        for report in reports(architecture):
            if chosen.json:
                print(json.dumps(asdict(report)), flush=True)
            else:
                r = report
                print(
                    f"{r.architecture:7} {r.kernel:20} {r.variant:58} {r.shared:7} B {r.registers:4} registers "
                    f"{r.stack:4} B stack {r.loop_spills:3} spills in the loop  {r.product:9} "
                    f"{r.load} {r.load_bytes} B, stores {r.store_bytes} B",
                    flush=True,
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
