"""Triton kernels for weights in BitBLAS' layout.

Letters as in gptq.py, and G groups; a unit is an int32 word of interleaved fields, or for 8 bits a byte.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pipeline.kernels.triton_code.arithmetic import add_products, difference, rounded, store_rows, whole


@triton.jit
def statistics(scales_ptr, zeros_ptr, n, group, inside, G):
    """Scales and zeros of outputs and groups in float32; without zeros the second is of no meaning."""
    at = n * G + group
    scale = tl.load(scales_ptr + at, mask=inside, other=0).to(tl.float32)
    zero = scale
    if zeros_ptr is not None:
        zero = tl.load(zeros_ptr + at, mask=inside, other=0).to(tl.float32)
    return scale, zero


@triton.jit
def field_codes(units, OFFSET: tl.constexpr, FIELD: tl.constexpr, BITS: tl.constexpr):
    """The codes of one field, less an offset, in float32."""
    PAIRS: tl.constexpr = 16 * (FIELD % 2) + 4 * (FIELD // 2)
    QUADS: tl.constexpr = 16 * (FIELD // 8) + 8 * (FIELD % 2) + 2 * (FIELD % 8 // 2)
    return difference(units, 1.0 * OFFSET, QUADS if BITS == 2 else PAIRS, BITS)


@triton.jit
def scaled(codes, scale, zero, ZEROS: tl.constexpr):
    """The weights of codes, which are floats already: every operation rounds by itself, as the format has it."""
    if ZEROS == "original":
        return (codes - zero) * scale
    elif ZEROS == "rescale":
        return codes * scale - zero
    else:
        return codes * scale


@triton.jit(do_not_specialize=["M"])
def linear_bitblas(
    x_ptr,
    units_ptr,
    scales_ptr,
    zeros_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    U,
    G,
    BITS: tl.constexpr,
    FIELDS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    ZEROS: tl.constexpr,
    OFFSET: tl.constexpr,
    ROW_TILES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_U: tl.constexpr,
    EVEN: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """out [M, N] = x W^T + b, x as [M, F, U] with its inputs in the packed order; tiles as in `linear_gptq`.

    Groups are whole units. OFFSET is what every code has too much: half the range where there are no zeros or codes
    are signed.
    """
    m = tl.program_id(0) * (ROW_TILES * BLOCK_M) + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    n_N1 = n.to(tl.int64)[:, None]
    inside_N1 = (n < N)[:, None]
    x_1M = x_ptr + m.to(tl.int64)[None, :] * (FIELDS * U)
    sums = (tl.zeros((BLOCK_N, BLOCK_M), tl.float32),) * ROW_TILES
    for first in range(0, U, BLOCK_U):
        u = first + tl.arange(0, BLOCK_U)
        inside_NU = inside_N1 if EVEN else inside_N1 & (u < U)[None, :]
        units_NU = tl.load(units_ptr + n_N1 * U + u[None, :], mask=inside_NU, other=0)
        if BITS == 8:
            units_NU = units_NU.to(tl.int32) ^ 128
        if GROUP_SIZE % (BLOCK_U * FIELDS) == 0:
            group = first * FIELDS // GROUP_SIZE
            scale, zero = statistics(scales_ptr, zeros_ptr, n_N1, group, inside_N1, G)
        else:
            group = (u * FIELDS // GROUP_SIZE)[None, :]
            scale, zero = statistics(scales_ptr, zeros_ptr, n_N1, group, inside_NU, G)
        for field in tl.static_range(FIELDS):
            codes_NU = field_codes(units_NU, OFFSET, field, BITS)
            w_NU = rounded(scaled(codes_NU, scale, zero, ZEROS), x_ptr.dtype.element_ty, INTERPRETED)
            sums = add_products(sums, w_NU, x_1M, m, u, field, M, U, FIELDS, ROW_TILES, EVEN, INTERPRETED)
    for tile in tl.static_range(ROW_TILES):
        store_rows(sums[tile], bias_ptr, out_ptr, m + tile * BLOCK_M, n, M, N, INTERPRETED)


@triton.jit
def dequantize_bitblas(
    units_ptr,
    scales_ptr,
    zeros_ptr,
    order_ptr,
    out_ptr,
    N,
    U,
    G,
    BITS: tl.constexpr,
    FIELDS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    ZEROS: tl.constexpr,
    OFFSET: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_U: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """The weight [N, K] in float32, rounded once; `order_ptr`, if any, says which input a packed one is."""
    u = tl.program_id(0) * BLOCK_U + tl.arange(0, BLOCK_U)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    n_N11 = n.to(tl.int64)[:, None, None]
    inside_N11 = (n < N)[:, None, None]
    inside_NU1 = inside_N11 & (u < U)[None, :, None]
    field = tl.arange(0, FIELDS)
    if BITS == 2:
        shift = 16 * (field // 8) + 8 * (field % 2) + 2 * (field % 8 // 2)
    else:
        shift = 16 * (field % 2) + 4 * (field // 2)
    units_NU1 = tl.load(units_ptr + n_N11 * U + u[None, :, None], mask=inside_NU1, other=0).to(tl.int32)
    if BITS == 8:
        units_NU1 = units_NU1 ^ 128
    codes_NUF = whole((units_NU1 >> shift[None, None, :]) & ((1 << BITS) - 1), 1.0 * OFFSET)
    if GROUP_SIZE % (BLOCK_U * FIELDS) == 0:
        group = tl.program_id(0) * (BLOCK_U * FIELDS) // GROUP_SIZE
        scale, zero = statistics(scales_ptr, zeros_ptr, n_N11, group, inside_N11, G)
    elif GROUP_SIZE % FIELDS == 0:
        group = (u * FIELDS // GROUP_SIZE)[None, :, None]
        scale, zero = statistics(scales_ptr, zeros_ptr, n_N11, group, inside_NU1, G)
    else:
        group = ((u[:, None] * FIELDS + field[None, :]) // GROUP_SIZE)[None, :, :]
        scale, zero = statistics(scales_ptr, zeros_ptr, n_N11, group, inside_NU1, G)
    values_NK = tl.reshape(scaled(codes_NUF, scale, zero, ZEROS), (BLOCK_N, BLOCK_U * FIELDS))
    k = tl.program_id(0) * (BLOCK_U * FIELDS) + tl.arange(0, BLOCK_U * FIELDS)
    inside_NK = (n < N)[:, None] & (k < U * FIELDS)[None, :]
    out_K = k
    if order_ptr is not None:
        out_K = tl.load(order_ptr + k, mask=k < U * FIELDS, other=0)
    at_NK = n.to(tl.int64)[:, None] * (U * FIELDS) + out_K[None, :]
    tl.store(out_ptr + at_NK, rounded(values_NK, out_ptr.dtype.element_ty, INTERPRETED), mask=inside_NK)
