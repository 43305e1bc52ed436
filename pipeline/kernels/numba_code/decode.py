"""Decode attention for a CPU: each key/value head of a slot is read once, for all query heads that share it.

Numba compiles Python to machine code of the processor at hand, once for each kind of cache, and keeps it. Sums are in
float32, in an order that follows from the slot's own length and the head's size: no slot knows of another one.
Shapes: B queries, H query heads, K key/value heads, G = H / K, S positions of a slot that are seen, D head dim.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numba import njit, prange, types
from numba.extending import overload

REORDERED = {"reassoc", "contract", "nsz"}
"""Sums over a head's values may be taken in the lanes of a vector; nothing is assumed of the numbers."""
ONLY_LOOPS = dict.fromkeys(
    ("comprehension", "numpy", "reduction", "inplace_binop", "setitem", "stencil", "fusion"), False
) | {"prange": True}
"""What is spread over threads: the loop that says so, nothing else."""
FLOAT8_NUMBERS = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
"""The number that each e4m3 code stands for."""
TILE = 4
"""Positions taken together, so that what is read and written for each of them is used four times."""


def _number(stored):
    """The float32 that a value of the cache stands for."""
    raise NotImplementedError


@overload(_number, inline="always")
def _number_of(stored):
    if stored == types.uint16:  # bfloat16 is the upper half of a float32
        return lambda stored: np.uint32(np.uint32(stored) << np.uint32(16)).view(np.float32)
    if stored == types.uint8:
        return lambda stored: FLOAT8_NUMBERS[stored]
    return lambda stored: stored


@njit(fastmath=REORDERED, error_model="numpy")
def _exp(x):
    """e^x for x <= 0 within 2 units in the last place, by Cephes' polynomial: it can be computed in vectors."""
    x = max(x, np.float32(-87.0))
    n = np.floor(x * np.float32(1.44269504) + np.float32(0.5))
    r = x - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * r * r + r + np.float32(1.0)
    power = np.int32((np.int32(n) + np.int32(127)) << np.int32(23))
    return p * power.view(np.float32)


@njit(fastmath=REORDERED, error_model="numpy")
def _multiply(q_GD, keys_SD, products_GS, tile_TD):
    """q k^T."""
    group, dim = q_GD.shape
    whole = keys_SD.shape[0] // TILE * TILE
    for s in range(0, whole, TILE):
        for i in range(TILE):
            for d in range(dim):
                tile_TD[i, d] = _number(keys_SD[s + i, d])
        for g in range(group):
            p0 = p1 = p2 = p3 = np.float32(0)
            for d in range(dim):
                p0 += q_GD[g, d] * tile_TD[0, d]
                p1 += q_GD[g, d] * tile_TD[1, d]
                p2 += q_GD[g, d] * tile_TD[2, d]
                p3 += q_GD[g, d] * tile_TD[3, d]
            products_GS[g, s] = p0
            products_GS[g, s + 1] = p1
            products_GS[g, s + 2] = p2
            products_GS[g, s + 3] = p3
    for s in range(whole, keys_SD.shape[0]):
        for g in range(group):
            product = np.float32(0)
            for d in range(dim):
                product += q_GD[g, d] * _number(keys_SD[s, d])
            products_GS[g, s] = product


@njit(fastmath=REORDERED, error_model="numpy")
def _softmax(scores_S):
    """Turn scores into weights; returns their log-sum-exp. All is nan where a score is not finite."""
    largest, broken = np.float32(-np.inf), np.float32(0)
    for s in range(scores_S.shape[0]):
        largest = max(largest, scores_S[s])
        broken += scores_S[s] * np.float32(0)
    total = np.float32(0)
    for s in range(scores_S.shape[0]):
        scores_S[s] = _exp(scores_S[s] - largest)
        total += scores_S[s]
    share = np.float32(1) / total + broken
    for s in range(scores_S.shape[0]):
        scores_S[s] *= share
    return largest + np.float32(math.log(total)) + broken


@njit(fastmath=REORDERED, error_model="numpy")
def _add_weighted(weights_GS, values_SD, sums_GD, tile_TD):
    """sums += weights values."""
    group, dim = sums_GD.shape
    whole = values_SD.shape[0] // TILE * TILE
    for s in range(0, whole, TILE):
        for i in range(TILE):
            for d in range(dim):
                tile_TD[i, d] = _number(values_SD[s + i, d])
        for g in range(group):
            w0, w1, w2, w3 = weights_GS[g, s], weights_GS[g, s + 1], weights_GS[g, s + 2], weights_GS[g, s + 3]
            for d in range(dim):
                sums_GD[g, d] += w0 * tile_TD[0, d] + w1 * tile_TD[1, d] + w2 * tile_TD[2, d] + w3 * tile_TD[3, d]
    for s in range(whole, values_SD.shape[0]):
        for g in range(group):
            for d in range(dim):
                sums_GD[g, d] += weights_GS[g, s] * _number(values_SD[s, d])


@njit(fastmath=REORDERED, error_model="numpy")
def _attend_head(q_GD, keys_SD, values_SD, key_scales_S, value_scales_S, scale, softcap, out_GD, lse_G):
    """The attention of a group's queries to what they see of their key/value head."""
    group, dim = q_GD.shape
    positions = keys_SD.shape[0]
    tile_TD = np.empty((TILE, dim), np.float32)
    weights_GS = np.empty((group, positions), np.float32)
    _multiply(q_GD, keys_SD, weights_GS, tile_TD)
    for g in range(group):
        for s in range(positions):
            weights_GS[g, s] *= scale
        for s in range(key_scales_S.shape[0]):
            weights_GS[g, s] *= key_scales_S[s]
        if softcap > 0:
            for s in range(positions):
                weights_GS[g, s] = softcap * math.tanh(weights_GS[g, s] / softcap)
        lse_G[g] = _softmax(weights_GS[g])
        for s in range(value_scales_S.shape[0]):
            weights_GS[g, s] *= value_scales_S[s]
        for d in range(dim):
            out_GD[g, d] = 0
    _add_weighted(weights_GS, values_SD, out_GD, tile_TD)


@njit(cache=True, parallel=ONLY_LOOPS, nogil=True, error_model="numpy")
def attend(
    q_BKGD, keys, values, key_scales, value_scales, slots_B, firsts_B, ends_B, scale, softcap, out_BKGD, lse_BKG
):
    """Fill `out_BKGD` and `lse_BKG`, both float32, with the attention of each query to its slot.

    q_BKGD         float32
    keys, values   [slots, K, positions, D]: float32, or bfloat16's bits as uint16, or e4m3 codes as uint8
    key_scales, value_scales   [slots, K, positions] float32 beside codes; else [slots, K, 0]
    slots_B, firsts_B, ends_B   the slot of each query, and from where to where it sees; nothing is filled where none
    scale, softcap   as in `AttentionRule`; 0 for no softcap
    """
    queries, kv_heads = q_BKGD.shape[0], q_BKGD.shape[1]
    for unit in prange(queries * kv_heads):  # by heads first, so that threads get equal shares of every slot
        query, head = unit % queries, unit // queries
        slot, first, end = slots_B[query], firsts_B[query], ends_B[query]
        if end > first:
            _attend_head(
                q_BKGD[query, head],
                keys[slot, head, first:end],
                values[slot, head, first:end],
                key_scales[slot, head, first:end],
                value_scales[slot, head, first:end],
                scale,
                softcap,
                out_BKGD[query, head],
                lse_BKG[query, head],
            )
