"""The kernels as Triton compiles them for gfx942, run by an instruction emulator: tinygrad's, which PYTHONPATH names.

Run as a process of its own, where Triton's kernels are not interpreted. It prints, as JSON, the relative errors of
`linear_policy_loss` in bfloat16 against float64, each with what is allowed, and the matrix instructions executed.

What exchanges data between lanes is wrong for a gfx942 in the emulator (of 2026-08), or missing, and is replaced here.
Its 32x32 matrix instructions also place results wrongly, so the kernels are compiled for 16x16 ones.
"""

import ctypes
import json
import mmap
import re
import struct

import torch
import triton
from test.mockgpu.amd import emu
from tinygrad.dtype import AddrSpace, dtypes
from tinygrad.uop.ops import UOp
from triton.compiler import ASTSource

from grpo_kernels import PRESETS, linear_policy_loss
from grpo_kernels.triton_kernels import launch, policy_kernels, triton_head
from grpo_kernels.triton_kernels.compile_report import is_aligned, target_of
from support.oracle import SLACK, relative_error

TYPES = {
    torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int64: "*i64", torch.bool: "*i1",
}  # fmt: skip
FORMATS = {"i32": "<i", "fp32": "<f"}
EXECUTED = set()


def number(value):
    return UOp.const(value, dtypes.int)


def moved(inst, ctx, read):
    """vdst[lane] = read(lane); every lane is read before the first is written, even where both are one register."""
    executing, destination = ctx.rexec(), ctx.inst_field(type(inst).vdst)
    held = UOp.placeholder((ctx.wave_size,), dtypes.uint32, slot=0, addrspace=AddrSpace.LOCAL)
    lane = ctx.range()
    reads = held.index(lane).store(read(lane)).end(lane)
    lane = ctx.range()
    writes = ctx.wvgpr_dyn(destination, lane, held.after(reads).index(lane), executing).end(lane)
    return UOp.sink(reads, writes, *ctx.inc_pc())


def between_lanes(inst, ctx, original=emu._compile_mem_op):
    """ds_swizzle_b32 by bit masks, and ds_bpermute_b32."""
    name = emu._op_name(inst)
    if "SWIZZLE" in name:
        offset = int(inst.offset1) << 8 | int(inst.offset0)
        assert not offset & 0x8000, "another mode of ds_swizzle"
        kept, added, flipped = (number(offset >> shift & 31) for shift in (0, 5, 10))
        source = ctx.inst_field(type(inst).addr)

        def swizzled(lane):
            lane = lane.cast(dtypes.int)
            return ctx.rvgpr_dyn(source, (lane & number(32)) | ((((lane & number(31)) & kept) | added) ^ flipped))

        return moved(inst, ctx, swizzled)
    if "BPERMUTE" in name:
        address, data = ctx.inst_field(type(inst).addr), ctx.inst_field(type(inst).data0)
        offset = (ctx.inst_field(type(inst).offset1) << emu._c(8)) | ctx.inst_field(type(inst).offset0)

        def permuted(lane):
            source = ((ctx.rvgpr_dyn(address, lane) + offset) >> emu._c(2)) & emu._c(63)
            return ctx.rvgpr_dyn(data, source.cast(dtypes.int))

        return moved(inst, ctx, permuted)
    return original(inst, ctx)


def dpp_operand(ctx, inst, lane, fallback):
    """The first operand of an instruction with DPP, from a copy: the result may go to the same register."""
    source, enabled, valid = emu._dpp16_ctrl(
        lane,
        emu._iattr(inst, "dpp"),
        emu._iattr(inst, "row_mask", 15),
        emu._iattr(inst, "bank_mask", 15),
        ctx.wave_size,
    )
    held = UOp.placeholder((ctx.wave_size,), dtypes.uint32, slot=0, addrspace=AddrSpace.LOCAL)
    own = ctx.range()
    copied = held.index(own).store(ctx.rvgpr_dyn(ctx.inst_field(type(inst).vsrc0), own)).end(own)
    value = held.after(copied).index((enabled & valid).where(source, number(0)))
    outside = UOp.const(0, fallback.dtype) if emu._iattr(inst, "bc") else fallback
    return enabled.where(valid.where(value, outside), fallback)


def dpp_source(lane, control, row_mask, bank_mask, wave_size, original=emu._dpp16_ctrl):
    """row_bcast 15 and 31: the last lane of a row, or of the first two rows, for those after them."""
    source, enabled, valid = original(lane, control, row_mask, bank_mask, wave_size)
    lane = lane.cast(dtypes.int)
    if control == 0x142:
        return (lane & number(~15)) - number(1), enabled, lane >= number(16)
    if control == 0x143:
        return number(31) + lane * number(0), enabled, lane >= number(32)
    return source, enabled, valid


def correct_the_emulator():
    emu._dpp16_ctrl, emu._load_dpp16_src0 = dpp_source, dpp_operand
    for kind in emu._inst_kinds("DS"):
        emu._INST_HANDLERS[kind] = between_lanes


def loaded(program: bytes):
    """The program in memory, its address, and its symbols' offsets."""
    (headers, sections), sizes = struct.unpack_from("<QQ", program, 32), struct.unpack_from("<5H", program, 54)
    parts = [struct.unpack_from("<IIQQQQQQ", program, headers + i * sizes[0]) for i in range(sizes[1])]
    memory = mmap.mmap(-1, max(part[3] + part[6] for part in parts) + (1 << 16))
    for kind, _, offset, at, _, size, *_ in parts:
        if kind == 1:
            memory[at : at + size] = program[offset : offset + size]
    table = [struct.unpack_from("<IIQQQQIIQQ", program, sections + i * sizes[2]) for i in range(sizes[3])]
    symbols = {}
    for section in table:
        if section[1] in (2, 11):
            for entry in range(section[4], section[4] + section[5], 24):
                name, _, _, _, value, _ = struct.unpack_from("<IBBHQQ", program, entry)
                start = table[section[6]][4] + name
                symbols[program[start : program.index(b"\0", start)].decode()] = value
    return memory, ctypes.addressof(ctypes.c_char.from_buffer(memory)), symbols


def compiled(kernel, named, options):
    """The kernel for these arguments, specialised as a launch would."""
    types, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = named[parameter.name]
        if parameter.is_constexpr or value is None:
            types[parameter.name], constants[(index,)] = "constexpr", value
            continue
        address = value.data_ptr() if isinstance(value, torch.Tensor) else value
        kind = TYPES[value.dtype] if isinstance(value, torch.Tensor) else "fp32" if isinstance(value, float) else "i32"
        types[parameter.name] = kind
        if is_aligned(parameter, kind) and address % 16 == 0:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature=types, constexprs=constants, attrs=attributes)
    return types, triton.compile(source, target=target_of("gfx942"), options={"matrix_instr_nonkdim": 16, **options})


def emulated(kernel, device, programs, *arguments, num_warps, num_stages=2, **constants):
    """In place of `run_kernel`."""
    named = dict(zip(kernel.arg_names, arguments, strict=False)) | constants
    types, program = compiled(kernel, named, {"num_warps": num_warps, "num_stages": num_stages})
    EXECUTED.update(re.findall(r"\bv_mfma\w+", program.asm["amdgcn"]))
    memory, address, symbols = loaded(program.asm["hsaco"])
    descriptor = symbols[f"{kernel.__name__}.kd"]
    _, private, size = struct.unpack_from("<III", memory, descriptor)
    (entry,) = struct.unpack_from("<q", memory, descriptor + 16)
    (resources,) = struct.unpack_from("<I", memory, descriptor + 52)
    (properties,) = struct.unpack_from("<H", memory, descriptor + 56)
    assert properties & 0x7F == 8, "the program wants more than the address of its arguments"
    passed = ctypes.create_string_buffer(size)
    values = iter([(types[name], named[name]) for name in kernel.arg_names if types[name] != "constexpr"])
    layout = r"\.offset: +(\d+)\n +\.size: +\d+\n +\.value_kind: +(\w+)"
    for offset, kind in re.findall(layout, program.asm["amdgcn"]):
        if kind == "hidden_block_count_x":
            struct.pack_into("<I", passed, int(offset), programs)
        # After the kernel's own come two pointers to scratch memory, which these kernels do not use.
        elif not kind.startswith("hidden") and (argument := next(values, None)):
            form, value = argument
            pointer = isinstance(value, torch.Tensor)
            struct.pack_into("<Q" if pointer else FORMATS[form], passed, int(offset),
                             value.data_ptr() if pointer else value)  # fmt: skip
    at = ctypes.addressof(passed)
    # The launch states the shared memory, in units of 512 bytes.
    resources = resources & ~(0x1FF << 15) | -(-program.metadata.shared // 512) << 15
    registers = [at & 0xFFFFFFFF, at >> 32, *[0] * ((resources >> 1 & 31) - 2)]
    emu.run_asm(address + descriptor + entry, len(memory), programs, 1, 1, num_warps * 64, 1, 1, at, resources, private,
                "cdna", registers)  # fmt: skip


def main():
    correct_the_emulator()
    triton_head.run_kernel = policy_kernels.run_kernel = emulated
    generator = torch.Generator().manual_seed(0)
    N, H, V = 40, 72, 304

    def given(dtype):
        generator.manual_seed(0)
        hidden = (3 * torch.randn(N, H, generator=generator)).bfloat16().to(dtype).requires_grad_()
        weight = (torch.randn(V, H, generator=generator) / H**0.5).bfloat16().to(dtype).requires_grad_()
        targets = torch.randint(0, V, (N,), generator=generator)
        advantages = torch.randn(N, generator=generator)
        return hidden, weight, targets, advantages, torch.full((N,), 1 / N)

    results = []
    for dtype, backend in ((torch.bfloat16, "triton"), (torch.float64, "reference")):
        inputs = given(dtype)
        with launch.planning(launch.PlannedGPU("gfx942", 3)):
            found = linear_policy_loss(*inputs, PRESETS["dapo"], temperature=0.8, return_entropy=True, backend=backend)
            found.loss.backward()
        results.append({"loss": found.loss, "logprobs": found.logprobs, "entropy": found.entropy,
                        "hidden": inputs[0].grad, "weight": inputs[1].grad})  # fmt: skip
    got, truth = results
    errors = {name: (relative_error(got[name], truth[name]), SLACK[got[name].dtype]) for name in got}
    print(json.dumps({"errors": errors, "instructions": sorted(EXECUTED)}))


if __name__ == "__main__":
    main()
