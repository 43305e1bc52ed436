"""Triton kernels for GPTQ weights.

Letters: N outputs, K inputs, M rows of activations, F codes in a unit (a 32-bit word; for 3 bits three of them),
U units along K. Every word is loaded once. The product takes the inputs field by field: activations lie as
[M, F, U], and the codes k = F u + f of a block of units meet x[:, f, u], so that codes never change places
between the word and the tensor core.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pipeline.kernels.triton_code.arithmetic import (
    add_products,
    difference,
    difference_half,
    rounded,
    store_rows,
    whole,
)


@triton.jit
def statistics(zeros_ptr, scales_ptr, group, n, inside, N, HALF: tl.constexpr):
    """Zero points and scales of groups (a column) and outputs (a row), both in the dtype of the arithmetic."""
    at = group * N + n
    zero = tl.load(zeros_ptr + at, mask=inside, other=0)
    scale = tl.load(scales_ptr + at, mask=inside, other=0)
    number: tl.constexpr = tl.float16 if HALF else tl.float32
    return zero.to(number), scale.to(number)


@triton.jit(do_not_specialize=["M"])
def linear_gptq(
    x_ptr,
    words_ptr,
    zeros_ptr,
    scales_ptr,
    group_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    U,
    BITS: tl.constexpr,
    FIELDS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    ROW_TILES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_U: tl.constexpr,
    EVEN: tl.constexpr,
    HALF: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """out [M, N] = x W^T + b, x as [M, F, U].

    Each tile of BLOCK_M rows has its own sum and products of its own, all of one shape: the bits of a row are the
    same however many tiles there are. `group_ptr`, the group of each input, is None where groups are whole units
    in order; to look them up is slow. EVEN says that BLOCK_U divides U.
    """
    m = tl.program_id(0) * (ROW_TILES * BLOCK_M) + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_1N = (n < N)[None, :]
    x_1M = x_ptr + m.to(tl.int64)[None, :] * (FIELDS * U)
    sums = (tl.zeros((BLOCK_N, BLOCK_M), tl.float32),) * ROW_TILES
    for first in range(0, U, BLOCK_U):
        u = first + tl.arange(0, BLOCK_U)
        inside_U1 = (u < U)[:, None]
        inside_UN = inside_1N if EVEN else inside_1N & inside_U1
        words_UN = tl.load(words_ptr + u[:, None] * N + n[None, :], mask=inside_UN, other=0)
        if group_ptr is None:
            if GROUP_SIZE % (BLOCK_U * FIELDS) == 0:
                zero, scale = statistics(
                    zeros_ptr, scales_ptr, first * FIELDS // GROUP_SIZE, n[None, :], inside_1N, N, HALF
                )
            else:
                group = (u * FIELDS // GROUP_SIZE)[:, None]
                zero, scale = statistics(zeros_ptr, scales_ptr, group, n[None, :], inside_UN, N, HALF)
            for field in tl.static_range(FIELDS):
                if HALF:
                    w_UN = difference_half(words_UN, zero, field * BITS, BITS) * scale
                else:
                    w_UN = difference(words_UN, zero, field * BITS, BITS) * scale
                w_NU = tl.trans(rounded(w_UN, x_ptr.dtype.element_ty, INTERPRETED))
                sums = add_products(sums, w_NU, x_1M, m, u, field, M, U, FIELDS, ROW_TILES, EVEN, INTERPRETED)
        else:
            for field in range(FIELDS):
                group = tl.load(group_ptr + u * FIELDS + field, mask=u < U, other=0)[:, None]
                zero, scale = statistics(zeros_ptr, scales_ptr, group, n[None, :], inside_UN, N, False)
                codes_UN = (words_UN >> (field * BITS)) & ((1 << BITS) - 1)
                w_NU = tl.trans(rounded(whole(codes_UN, zero) * scale, x_ptr.dtype.element_ty, INTERPRETED))
                sums = add_products(sums, w_NU, x_1M, m, u, field, M, U, FIELDS, ROW_TILES, EVEN, INTERPRETED)
    for tile in tl.static_range(ROW_TILES):
        store_rows(sums[tile], bias_ptr, out_ptr, m + tile * BLOCK_M, n, M, N, INTERPRETED)


@triton.jit
def dequantize_gptq(
    words_ptr,
    zeros_ptr,
    scales_ptr,
    group_ptr,
    out_ptr,
    N,
    U,
    BITS: tl.constexpr,
    FIELDS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_U: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """The weight [N, K]: scale times (code - zero) in float32, rounded once."""
    WORDS: tl.constexpr = FIELDS * BITS // 32
    u = tl.program_id(0) * BLOCK_U + tl.arange(0, BLOCK_U)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    field = tl.arange(0, FIELDS)
    n_11N = n[None, None, :]
    inside_U1N = (u < U)[:, None, None] & (n < N)[None, None, :]
    words = words_ptr + (u * WORDS)[:, None, None] * N + n_11N
    start_1F1 = (field * BITS)[None, :, None]
    word = tl.load(words, mask=inside_U1N, other=0).to(tl.uint32, bitcast=True)
    codes_UFN = word >> (start_1F1 % 32)
    if WORDS > 1:
        word1 = tl.load(words + N, mask=inside_U1N, other=0).to(tl.uint32, bitcast=True)
        word2 = tl.load(words + 2 * N, mask=inside_U1N, other=0).to(tl.uint32, bitcast=True)
        low = tl.where(start_1F1 < 32, word, tl.where(start_1F1 < 64, word1, word2))
        high = tl.where(start_1F1 < 32, word1, word2)
        crosses = start_1F1 % 32 + BITS > 32
        codes_UFN = (low >> (start_1F1 % 32)) | tl.where(crosses, high << ((32 - start_1F1 % 32) % 32), 0)
    codes_UFN = (codes_UFN & ((1 << BITS) - 1)).to(tl.int32)
    k_UF = u[:, None] * FIELDS + field[None, :]
    if group_ptr is not None:
        group = tl.load(group_ptr + k_UF, mask=(u < U)[:, None], other=0)[:, :, None]
        zero, scale = statistics(zeros_ptr, scales_ptr, group, n_11N, inside_U1N, N, False)
    elif GROUP_SIZE % (BLOCK_U * FIELDS) == 0:
        group = tl.program_id(0) * (BLOCK_U * FIELDS) // GROUP_SIZE
        zero, scale = statistics(zeros_ptr, scales_ptr, group, n_11N, (n < N)[None, None, :], N, False)
    else:
        group = (u * FIELDS // GROUP_SIZE)[:, None, None]
        zero, scale = statistics(zeros_ptr, scales_ptr, group, n_11N, inside_U1N, N, False)
    values_UFN = whole(codes_UFN, zero) * scale
    out_UFN = rounded(values_UFN, out_ptr.dtype.element_ty, INTERPRETED)
    k = tl.program_id(0) * (BLOCK_U * FIELDS) + tl.arange(0, BLOCK_U * FIELDS)
    at_NK = n.to(tl.int64)[:, None] * (U * FIELDS) + k[None, :]
    out_NK = tl.trans(tl.reshape(out_UFN, (BLOCK_U * FIELDS, BLOCK_N)))
    tl.store(out_ptr + at_NK, out_NK, mask=(n < N)[:, None] & (k < U * FIELDS)[None, :])
