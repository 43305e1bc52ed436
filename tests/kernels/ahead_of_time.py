"""Triton kernels compiled for a GPU that need not be there, and what the machine code shows."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.kernels import triton_attention, triton_bitblas, triton_gptq, triton_prefill
from pipeline.kernels.attention import AttentionRule
from pipeline.kernels.cache_attention import CachedLayer
from pipeline.kernels.packed_bitblas import BitblasWeight, ZerosMode
from pipeline.kernels.packed_gptq import GptqWeight
from pipeline.kernels.triton_launch import Launch

TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int8: "i8",
    torch.uint8: "u8",
}
SIZE = 4096
ROOMS: dict[type, Any] = {GptqWeight: triton_gptq, BitblasWeight: triton_bitblas}
ALIGNED = [["tt.divisibility", 16]]
"""What Triton knows of a pointer, or of an integer, that 16 divides."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineCode:
    """PTX, and of the program for the GPU its size, the shared memory it asks for and its stack: spilled registers."""

    ptx: str
    cubin_bytes: int
    shared_bytes: int
    stack_bytes: int
    registers: int


def compiled(launch: Launch, capability: int) -> MachineCode:
    """What a launch compiles to for compute capability 80, 90, ..., as on first use there."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {**launch.constants, "INTERPRETED": False}
    constants |= {name: None for name, value in launch.arguments.items() if value is None}
    signature = {name: _type_of(value) for name, value in launch.arguments.items() if value is not None}
    signature |= dict.fromkeys(constants, "constexpr")
    names = launch.function.arg_names
    any_value = launch.function.do_not_specialize or ()
    aligned = {
        (names.index(name),): ALIGNED
        for name, value in launch.arguments.items()
        if isinstance(value, Tensor) or (value is not None and value % 16 == 0 and name not in any_value)
    }
    ordered = {name: signature[name] for name in names}
    source = ASTSource(launch.function, ordered, constants, aligned)
    options = {"num_warps": launch.warps, "num_stages": launch.stages, "enable_fp_fusion": False}
    program = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers, stack = _resources(program.asm["cubin"], Path(triton.__file__).parent)
    return MachineCode(
        ptx=program.asm["ptx"],
        cubin_bytes=len(program.asm["cubin"]),
        shared_bytes=program.metadata.shared,
        stack_bytes=stack,
        registers=registers,
    )


def gptq_weight(bits: int, group_size: int, act_order: bool = False) -> GptqWeight:
    """A weight of 4096 x 4096 without memory behind it."""
    groups = SIZE // group_size
    return GptqWeight(
        words_WN=_empty(torch.int32, SIZE * bits // 32, SIZE),
        zeros_GN=_empty(torch.uint8, groups, SIZE),
        scales_GN=_empty(torch.float16, groups, SIZE),
        group_K=_empty(torch.int32, SIZE),
        bits=bits,
        group_size=group_size,
        act_order=act_order,
    )


def bitblas_weight(bits: int, group_size: int, mode: ZerosMode, act_order: bool = False) -> BitblasWeight:
    """A weight of 4096 x 4096 without memory behind it."""
    groups = SIZE // group_size
    return BitblasWeight(
        codes_NB=_empty(torch.int8, SIZE, SIZE * bits // 8),
        scales_NG=_empty(torch.float16, SIZE, groups),
        zeros_NG=None if mode == "none" else _empty(torch.float16, SIZE, groups),
        zeros_mode=mode,
        order_K=_empty(torch.int64, SIZE) if act_order else None,
        bits=bits,
        group_size=group_size,
    )


def compiled_dequantize(weight: GptqWeight | BitblasWeight, dtype: torch.dtype, capability: int) -> MachineCode:
    """What dequantizing a weight compiles to."""
    return compiled(ROOMS[type(weight)].dequantize_launch(weight, _empty(dtype, *weight.shape)), capability)


def compiled_linear(weight: GptqWeight | BitblasWeight, rows: int, dtype: torch.dtype, capability: int) -> MachineCode:
    """What a product of some rows with a weight, and a bias, compiles to."""
    outputs, inputs = weight.shape
    room = ROOMS[type(weight)]
    fields = room.fields_of(weight.bits)
    x_MFU = _empty(dtype, rows, fields, inputs // fields)
    launch = room.linear_launch(x_MFU, weight, _empty(dtype, outputs), _empty(dtype, rows, outputs))
    return compiled(launch, capability)


def compiled_attention(
    heads: tuple[int, int, int], rule: AttentionRule, splits: int, dtype: torch.dtype, float8: bool, capability: int
) -> list[MachineCode]:
    """What reading a cache compiles to, and merging its splits; `heads` are query heads, key/value heads and dim."""
    query_heads, kv_heads, dim = heads
    slots, positions = 16, 1024
    q = _empty(dtype, slots, query_heads, dim)
    codes = _empty(torch.uint8 if float8 else dtype, slots, kv_heads, positions, dim)
    scales = _empty(torch.float32, slots, kv_heads, positions) if float8 else None
    outs = q if splits == 1 else _empty(torch.float32, slots, query_heads, splits, dim)
    lses = _empty(torch.float32, slots, query_heads, splits)
    lengths = _empty(torch.int64, slots)
    layer = CachedLayer(codes, codes, scales, scales)
    launches = [triton_attention.split_launch(q, layer, lengths, rule, outs, lses)]
    if splits > 1:
        launches.append(triton_attention.merge_launch(outs, lses, q, lses[..., 0]))
    return [compiled(launch, capability) for launch in launches]


def compiled_rows(
    heads: tuple[int, int, int], rule: AttentionRule, earlier: int, dtype: torch.dtype, capability: int
) -> MachineCode:
    """What the attention of a prefill pass compiles to, for rows with so many tokens before them."""
    query_heads, kv_heads, dim = heads
    tokens = 8192
    q, k = _empty(dtype, query_heads, tokens, dim), _empty(dtype, kv_heads, tokens, dim)
    before = _empty(dtype, kv_heads, earlier, dim)
    tiles = _empty(torch.int32, 200, 3)
    out = _empty(dtype, tokens, query_heads, dim)
    launch = triton_prefill.rows_launch(q, k, k, tiles, (before, before) if earlier else None, rule, out)
    return compiled(launch, capability)


def _empty(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _type_of(value: Tensor | int) -> str:
    return f"*{TYPES[value.dtype]}" if isinstance(value, Tensor) else "i32"


def _resources(cubin: bytes, package: Path) -> tuple[int, int]:
    """Registers and stack bytes of a thread, as cuobjdump reports them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = package / "backends" / "nvidia" / "bin" / "cuobjdump"
        report = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", report.stdout)
    assert found is not None, report.stdout
    return int(found[1]), int(found[2])
