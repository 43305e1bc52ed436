"""What the Triton kernels share: packed codes to floats, rounding, products, and the rows that they store.

Codes become floats without a conversion. A code whose bits lie at position P of a word is the end of the
mantissa of the float32 2^(23 - P) + code, of which only the exponent has to be added; taking away
2^(23 - P) + zero leaves code - zero, exactly. INTERPRETED says that Triton's interpreter runs the kernel: it
truncates to bfloat16 and multiplies bfloat16 as integers, so for it both are spelled out.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def difference(words, zero, POSITION: tl.constexpr, BITS: tl.constexpr):
    """Code minus zero in float32, exact for a whole zero; of the codes at bits POSITION and up of int32 words."""
    NEAR: tl.constexpr = POSITION if POSITION + BITS <= 23 else POSITION - 16
    near = words
    if POSITION + BITS > 23:
        near = words >> 16
    biased = (near & (((1 << BITS) - 1) << NEAR)) | ((150 - NEAR) << 23)
    return biased.to(tl.float32, bitcast=True) - (zero + 1.0 * (1 << (23 - NEAR)))


@triton.jit
def difference_half(words, zero, POSITION: tl.constexpr, BITS: tl.constexpr):
    """The same in float16, two at a time on the device; exact for whole float16 zeros of up to 8 bits."""
    WITHIN: tl.constexpr = POSITION % 16
    NEAR: tl.constexpr = WITHIN if WITHIN + BITS <= 10 else WITHIN - 8
    biased = ((words >> (POSITION - NEAR)) & (((1 << BITS) - 1) << NEAR)) | ((25 - NEAR) << 10)
    offset = zero + 1.0 * (1 << (10 - NEAR))
    return biased.to(tl.int16).to(tl.float16, bitcast=True) - offset


@triton.jit
def whole(codes, offset):
    """Codes (int32, 0 to 255) minus a whole offset, in float32, exactly."""
    return (codes | 0x4B000000).to(tl.float32, bitcast=True) - (offset + 8388608.0)


@triton.jit
def rounded(values, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    """Float32 values rounded once to a dtype, to the nearest, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = values.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return bits.to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return values.to(dtype)


@triton.jit
def multiply_add(a_MK, b_KN, sum_MN, INTERPRETED: tl.constexpr):
    """A B + sum in float32; both factors in one dtype."""
    if INTERPRETED:
        return tl.dot(a_MK.to(tl.float32), b_KN.to(tl.float32), sum_MN, input_precision="ieee")
    else:
        return tl.dot(a_MK, b_KN, sum_MN, input_precision="ieee")


@triton.jit
def add_products(
    sums,
    w_NU,
    x_1M,
    m,
    u,
    field,
    M,
    U,
    FIELDS: tl.constexpr,
    ROW_TILES: tl.constexpr,
    EVEN: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """The sums [N, M] of each tile of rows plus W's block of one field times that field of x [M, F, U]."""
    BLOCK_M: tl.constexpr = m.shape[0]
    added = ()
    for tile in tl.static_range(ROW_TILES):
        inside_UM = (m + tile * BLOCK_M < M)[None, :]
        if not EVEN:
            inside_UM = inside_UM & (u < U)[:, None]
        x_UM = tl.load(x_1M + (tile * BLOCK_M * FIELDS + field) * U + u[:, None], mask=inside_UM, other=0)
        added = added + (multiply_add(w_NU, x_UM, sums[tile], INTERPRETED),)
    return added


@triton.jit
def store_rows(sum_NM, bias_ptr, out_ptr, m, n, M, N, INTERPRETED: tl.constexpr):
    """Rows m of the output [M, N] at columns n: the sums plus the bias in float32, rounded once."""
    if bias_ptr is not None:
        sum_NM += tl.load(bias_ptr + n, mask=n < N, other=0).to(tl.float32)[:, None]
    out_MN = rounded(tl.trans(sum_NM), out_ptr.dtype.element_ty, INTERPRETED)
    at_MN = m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(out_ptr + at_MN, out_MN, mask=(m < M)[:, None] & (n < N)[None, :])
