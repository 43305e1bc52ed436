"""Triton kernel for rows that lie side by side in one pass.

Letters: M query tokens of a tile, S key tokens of a block, D head dim, T tokens of the pass.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pipeline.kernels.triton_code.arithmetic import multiply_add, rounded


@triton.jit
def look_at(
    q_MD, k_DS, v_SD, shown_MS, largest_M, sum_M, out_MD, SCALE: tl.constexpr, SOFTCAP: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """One block of keys more: the running maximum, sum of weights and weighted sum of values."""
    zero_MS = tl.zeros(shown_MS.shape, tl.float32)
    score_MS = multiply_add(q_MD, k_DS, zero_MS, INTERPRETED) * SCALE
    if SOFTCAP > 0:
        score_MS = SOFTCAP * (2.0 * tl.sigmoid(score_MS * (2.0 / SOFTCAP)) - 1.0)
    score_MS = tl.where(shown_MS, score_MS, float("-inf"))
    now_M = tl.maximum(largest_M, tl.max(score_MS, axis=1))
    base_M = tl.where(now_M == float("-inf"), 0.0, now_M)
    weight_MS = tl.exp(score_MS - base_M[:, None])
    faded_M = tl.exp(largest_M - base_M)
    sum_M = sum_M * faded_M + tl.sum(weight_MS, axis=1)
    weight_MS = rounded(weight_MS, v_SD.dtype, INTERPRETED)
    return now_M, sum_M, multiply_add(weight_MS, v_SD, out_MD * faded_M[:, None], INTERPRETED)


@triton.jit(do_not_specialize=["EARLIER"])
def attend_tiles(
    q_ptr,
    keys_ptr,
    values_ptr,
    earlier_keys_ptr,
    earlier_values_ptr,
    tiles_ptr,
    out_ptr,
    EARLIER,
    SCALE: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """One query head of one tile: first the EARLIER keys [K, S, D] that the row begins with, then its own, causally.

    Tensors of the pass are [T, heads, D]. A tile is (first token of its row in the pass, first query in the row,
    tokens of the row); tiles and blocks begin at the row's first token, so a row's bits are its own. WINDOW and
    SOFTCAP 0 are off.
    """
    tile = tiles_ptr + tl.program_id(0) * 3
    head = tl.program_id(1)
    kv_head = head // (HEADS // KV_HEADS)
    start = tl.load(tile).to(tl.int64)
    first = tl.load(tile + 1)
    length = tl.load(tile + 2)
    m = first + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    inside_MD = (m < length)[:, None] & (d < D)[None, :]
    at_MD = ((start + m) * HEADS + head)[:, None] * D + d[None, :]
    q_MD = tl.load(q_ptr + at_MD, mask=inside_MD, other=0)
    largest_M = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    sum_M = tl.zeros((BLOCK_M,), tl.float32)
    out_MD = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    if earlier_keys_ptr is not None:
        begin = 0
        if WINDOW > 0:
            begin = tl.maximum(EARLIER + first - WINDOW + 1, 0) // BLOCK_S * BLOCK_S
        for block in range(begin, EARLIER, BLOCK_S):
            s = block + tl.arange(0, BLOCK_S)
            at_S = kv_head.to(tl.int64) * EARLIER + s
            inside_S = s < EARLIER
            k_DS = tl.load(
                earlier_keys_ptr + at_S[None, :] * D + d[:, None], mask=inside_S[None, :] & (d < D)[:, None], other=0
            )
            v_SD = tl.load(
                earlier_values_ptr + at_S[:, None] * D + d[None, :], mask=inside_S[:, None] & (d < D)[None, :], other=0
            )
            shown_MS = inside_S[None, :] & (m >= 0)[:, None]
            if WINDOW > 0:
                shown_MS = shown_MS & (s[None, :] > (EARLIER + m - WINDOW)[:, None])
            largest_M, sum_M, out_MD = look_at(
                q_MD, k_DS, v_SD, shown_MS, largest_M, sum_M, out_MD, SCALE, SOFTCAP, INTERPRETED
            )
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(first - WINDOW + 1, 0) // BLOCK_S * BLOCK_S
    for block in range(begin, tl.minimum(first + BLOCK_M, length), BLOCK_S):
        s = block + tl.arange(0, BLOCK_S)
        at_S = (start + s) * KV_HEADS + kv_head
        inside_S = s < length
        k_DS = tl.load(keys_ptr + at_S[None, :] * D + d[:, None], mask=inside_S[None, :] & (d < D)[:, None], other=0)
        v_SD = tl.load(values_ptr + at_S[:, None] * D + d[None, :], mask=inside_S[:, None] & (d < D)[None, :], other=0)
        shown_MS = s[None, :] <= m[:, None]
        if WINDOW > 0:
            shown_MS = shown_MS & (s[None, :] > (m - WINDOW)[:, None])
        largest_M, sum_M, out_MD = look_at(
            q_MD, k_DS, v_SD, shown_MS, largest_M, sum_M, out_MD, SCALE, SOFTCAP, INTERPRETED
        )
    out_MD = out_MD / sum_M[:, None]
    tl.store(out_ptr + at_MD, rounded(out_MD, out_ptr.dtype.element_ty, INTERPRETED), mask=inside_MD)
