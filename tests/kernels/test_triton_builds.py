"""Every Triton kernel compiled for the GPUs it is meant for, without one: that it compiles, and to what."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from ahead_of_time import (
    MachineCode,
    bitblas_weight,
    compiled_attention,
    compiled_dequantize,
    compiled_linear,
    compiled_rows,
    gptq_weight,
)
from triton_process import TritonProcess

from pipeline.kernels.attention import AttentionRule
from pipeline.kernels.packed_bitblas import BitblasWeight
from pipeline.kernels.packed_gptq import GptqWeight
from pipeline.kernels.triton_tiles import linear_tile

CAPABILITIES = pytest.mark.parametrize("capability", [80, 90])
SHARED_BYTES = 99 << 10
"""What a program may ask for on the GPUs that have the least, those of compute capability 8.6 and 8.9."""
ROUNDING = {torch.float16: "cvt.rn.f16", torch.bfloat16: "cvt.rn.bf16", torch.float32: ""}
TENSOR_CORE = {torch.float16: "m16n8k16.row.col.f32.f16", torch.bfloat16: "m16n8k16.row.col.f32.bf16"}

SPILLED_BYTES = 128
"""Per thread: for dequantizing, the compiler trades some registers for occupancy."""

Packed = GptqWeight | BitblasWeight


def check_dequantize(code: MachineCode, dtype: torch.dtype) -> None:
    """It fits the GPU, keeps everything in registers, and rounds where the format does and nowhere else."""
    assert code.cubin_bytes > 0
    assert code.stack_bytes <= SPILLED_BYTES, "spilled registers"
    assert code.shared_bytes <= SHARED_BYTES
    assert "fma.rn.f32" not in code.ptx
    assert ROUNDING[dtype] in code.ptx


def check_linear(code: MachineCode, dtype: torch.dtype) -> None:
    """It fits the GPU, loads ahead, keeps everything in registers, and uses one tensor core instruction throughout."""
    assert code.cubin_bytes > 0
    assert code.stack_bytes == 0, "spilled registers"
    assert code.shared_bytes <= SHARED_BYTES
    assert "cp.async" in code.ptx
    assert "wgmma" not in code.ptx
    if dtype in TENSOR_CORE:
        products = [line for line in code.ptx.splitlines() if "mma.sync" in line]
        assert products
        assert all(TENSOR_CORE[dtype] in line for line in products)
    else:
        assert "tf32" not in code.ptx


@CAPABILITIES
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("weight", [gptq_weight(4, 128), bitblas_weight(4, 128, "rescale")], ids=["gptq", "bitblas"])
def test_four_bits(compiler: TritonProcess, weight: Packed, dtype: torch.dtype, capability: int) -> None:
    check_dequantize(compiler(compiled_dequantize, weight, dtype, capability), dtype)
    check_linear(compiler(compiled_linear, weight, 16, dtype, capability), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("fields", [1, 4, 8, 16])
def test_products_have_16_inputs_or_more(fields: int, dtype: torch.dtype) -> None:
    """Triton 3.6, which torch 2.11 brings, compiles none with fewer; later versions do, so a build does not show it."""
    x_MFU = torch.empty(40, fields, 512, dtype=dtype, device="meta")
    assert linear_tile(x_MFU, unit_bytes=4).block_u >= 16


LLAMA3, LLAMA2, GEMMA2 = (32, 8, 128), (32, 32, 128), (8, 4, 256)
"""Query heads, key/value heads and the length of a head."""
PLAIN, CAPPED = AttentionRule(128**-0.5), AttentionRule(0.0625, 4096, 50.0)
ATTENTION_BUILDS = [
    pytest.param(LLAMA3, PLAIN, 1, torch.bfloat16, False, 90, id="llama3"),
    *(
        pytest.param(*build, id=name, marks=pytest.mark.slow)
        for name, build in {
            "llama3-float8-splits-sm80": (LLAMA3, PLAIN, 4, torch.bfloat16, True, 80),
            "llama3-float8": (LLAMA3, PLAIN, 1, torch.bfloat16, True, 90),
            "llama2-float16-sm80": (LLAMA2, PLAIN, 1, torch.float16, False, 80),
            "llama2-float32": (LLAMA2, PLAIN, 2, torch.float32, False, 90),
            "gemma2": (GEMMA2, CAPPED, 4, torch.bfloat16, False, 90),
            "gemma2-float8-sm80": (GEMMA2, CAPPED, 1, torch.float16, True, 80),
        }.items()
    ),
]


@pytest.mark.parametrize(("heads", "rule", "splits", "dtype", "float8", "capability"), ATTENTION_BUILDS)
def test_cache_attention(
    compiler: TritonProcess, heads: tuple[int, int, int], rule: AttentionRule, splits: int, dtype: torch.dtype,
    float8: bool, capability: int,
) -> None:  # fmt: skip
    read, *merged = compiler(compiled_attention, heads, rule, splits, dtype, float8, capability)
    assert len(merged) == (splits > 1)
    for code in (read, *merged):
        assert code.cubin_bytes > 0
        assert code.stack_bytes == 0, "spilled registers"
        assert code.shared_bytes <= SHARED_BYTES
    assert "cp.async" in read.ptx
    assert "wgmma" not in read.ptx
    assert "tf32" not in read.ptx
    assert ("mma.sync" in read.ptx) == (dtype != torch.float32)


@pytest.mark.parametrize(
    ("heads", "rule", "earlier", "dtype", "capability"),
    [
        pytest.param(LLAMA3, PLAIN, 100, torch.bfloat16, 90, id="llama3-behind-100"),
        pytest.param(LLAMA2, PLAIN, 0, torch.float16, 80, id="llama2-sm80", marks=pytest.mark.slow),
        pytest.param(GEMMA2, CAPPED, 100, torch.bfloat16, 80, id="gemma2-behind-100-sm80", marks=pytest.mark.slow),
    ],
)
def test_prefill_attention(
    compiler: TritonProcess, heads: tuple[int, int, int], rule: AttentionRule, earlier: int, dtype: torch.dtype,
    capability: int,
) -> None:  # fmt: skip
    code = compiler(compiled_rows, heads, rule, earlier, dtype, capability)
    assert code.cubin_bytes > 0
    assert code.stack_bytes == 0, "spilled registers"
    assert code.shared_bytes <= SHARED_BYTES
    assert "mma" in code.ptx


GPTQ_KINDS = [(bits, *kind) for bits, kind in product((2, 3, 4, 8), ((32, False), (4096, False), (128, True)))]
BITBLAS_KINDS: list[Any] = list(product((2, 4, 8), (32, 4096), ("none", "rescale")))


@pytest.mark.slow
@CAPABILITIES
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    "weight",
    [gptq_weight(*kind) for kind in GPTQ_KINDS] + [bitblas_weight(*kind, act_order=True) for kind in BITBLAS_KINDS],
    ids=[f"gptq-{kind}" for kind in GPTQ_KINDS] + [f"bitblas-{kind}" for kind in BITBLAS_KINDS],
)
def test_all_variants(compiler: TritonProcess, weight: Packed, dtype: torch.dtype, capability: int) -> None:
    check_dequantize(compiler(compiled_dequantize, weight, dtype, capability), dtype)
    if weight.bits != 3:
        for rows in (16, 40):
            check_linear(compiler(compiled_linear, weight, rows, dtype, capability), dtype)
