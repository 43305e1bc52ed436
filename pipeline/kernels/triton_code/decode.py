"""Triton kernels for one query per slot against a static cache.

Letters: G query heads of a key/value head, S positions, D head dim, P splits of the positions.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pipeline.kernels.triton_code.arithmetic import multiply_add, rounded


@triton.jit
def code_values(codes):
    """FP8 (e4m3) codes in bytes as float16: each number divided by 256, exactly, without the type's own conversion."""
    bits = codes.to(tl.int32)
    return (((bits & 0x80) << 8) | ((bits & 0x7F) << 7)).to(tl.int16).to(tl.float16, bitcast=True)


@triton.jit
def attend_split(
    q_ptr,
    keys_ptr,
    values_ptr,
    key_scales_ptr,
    value_scales_ptr,
    lengths_ptr,
    out_ptr,
    lse_ptr,
    S,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLIT_BLOCKS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Attention of a slot's query heads to one split of its positions, and its log-sum-exp.

    A split is SPLIT_BLOCKS blocks of BLOCK_S positions, of which only those are read that the row has reached and
    the window shows. All products have one shape, so a row's bits depend on the row and on SPLITS. An empty split
    gives zeros and -inf. WINDOW and SOFTCAP 0 are off; scales are None but for FP8.
    """
    slot = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    split = tl.program_id(2)
    length = tl.load(lengths_ptr + slot).to(tl.int32)
    first = split * (SPLIT_BLOCKS * BLOCK_S)
    end = tl.minimum(first + SPLIT_BLOCKS * BLOCK_S, length)
    if WINDOW > 0:
        first = tl.maximum(first, tl.maximum(length - WINDOW, 0) // BLOCK_S * BLOCK_S)
    row = slot * KV_HEADS + head
    g = tl.arange(0, BLOCK_G)
    d = tl.arange(0, BLOCK_D)
    inside_GD = (g < GROUP)[:, None] & (d < D)[None, :]
    q_GD = tl.load(q_ptr + (row * GROUP + g)[:, None] * D + d[None, :], mask=inside_GD, other=0)
    largest_G = tl.full((BLOCK_G,), float("-inf"), tl.float32)
    sum_G = tl.zeros((BLOCK_G,), tl.float32)
    out_GD = tl.zeros((BLOCK_G, BLOCK_D), tl.float32)
    for begin in range(first, end, BLOCK_S):
        s = begin + tl.arange(0, BLOCK_S)
        shown_S = s < end
        at_S = row * S + s
        k_DS = tl.load(keys_ptr + at_S[None, :] * D + d[:, None], mask=shown_S[None, :] & (d < D)[:, None], other=0)
        v_SD = tl.load(values_ptr + at_S[:, None] * D + d[None, :], mask=shown_S[:, None] & (d < D)[None, :], other=0)
        zero_GS = tl.zeros((BLOCK_G, BLOCK_S), tl.float32)
        if key_scales_ptr is None:
            score_GS = multiply_add(q_GD, k_DS, zero_GS, INTERPRETED) * SCALE
        else:
            score_GS = multiply_add(q_GD, code_values(k_DS).to(q_ptr.dtype.element_ty), zero_GS, INTERPRETED)
            k_scale_S = tl.load(key_scales_ptr + at_S, mask=shown_S, other=0)
            score_GS = score_GS * (k_scale_S * (256.0 * SCALE))[None, :]
        if SOFTCAP > 0:
            score_GS = SOFTCAP * (2.0 * tl.sigmoid(score_GS * (2.0 / SOFTCAP)) - 1.0)
        if WINDOW > 0:
            shown_S = shown_S & (s >= length - WINDOW)
        score_GS = tl.where(shown_S[None, :], score_GS, float("-inf"))
        now_G = tl.maximum(largest_G, tl.max(score_GS, axis=1))
        base_G = tl.where(now_G == float("-inf"), 0.0, now_G)
        weight_GS = tl.exp(score_GS - base_G[:, None])
        faded_G = tl.exp(largest_G - base_G)
        sum_G = sum_G * faded_G + tl.sum(weight_GS, axis=1)
        if value_scales_ptr is None:
            weight_GS = rounded(weight_GS, values_ptr.dtype.element_ty, INTERPRETED)
        else:
            number: tl.constexpr = tl.float32 if q_ptr.dtype.element_ty == tl.float32 else tl.bfloat16
            v_scale_S = tl.load(value_scales_ptr + at_S, mask=shown_S, other=0)
            weight_GS = rounded(weight_GS * (v_scale_S * 256.0)[None, :], number, INTERPRETED)
            v_SD = code_values(v_SD).to(number)
        out_GD = multiply_add(weight_GS, v_SD, out_GD * faded_G[:, None], INTERPRETED)
        largest_G = now_G
    empty_G = sum_G == 0
    out_GD = out_GD / tl.where(empty_G, 1.0, sum_G)[:, None]
    lse_G = tl.where(empty_G, float("-inf"), largest_G + tl.log(tl.where(empty_G, 1.0, sum_G)))
    at_G = (row * GROUP + g) * SPLITS + split
    tl.store(lse_ptr + at_G, lse_G, mask=g < GROUP)
    out_GD = rounded(out_GD, out_ptr.dtype.element_ty, INTERPRETED)
    tl.store(out_ptr + at_G[:, None] * D + d[None, :], out_GD, mask=inside_GD)


@triton.jit
def merge_splits(
    outs_ptr,
    lses_ptr,
    out_ptr,
    lse_ptr,
    D: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """One query head's splits merged by their log-sum-exps, the first one first; zeros and -inf where all are empty."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    largest = tl.load(lses_ptr + row * SPLITS)
    for split in range(1, SPLITS):
        largest = tl.maximum(largest, tl.load(lses_ptr + row * SPLITS + split))
    base = tl.where(largest == float("-inf"), 0.0, largest)
    total = 0.0
    out_D = tl.zeros((BLOCK_D,), tl.float32)
    for split in range(SPLITS):
        weight = tl.exp(tl.load(lses_ptr + row * SPLITS + split) - base)
        part_D = tl.load(outs_ptr + (row * SPLITS + split) * D + d, mask=d < D, other=0)
        total += weight
        out_D += weight * part_D
    tl.store(lse_ptr + row, largest + tl.log(tl.where(total == 0, 1.0, total)))
    out_D = out_D / tl.where(total == 0, 1.0, total)
    tl.store(out_ptr + row * D + d, rounded(out_D, out_ptr.dtype.element_ty, INTERPRETED), mask=d < D)
