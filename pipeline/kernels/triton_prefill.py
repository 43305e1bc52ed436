"""Attention of rows side by side in one pass, in Triton: one launch for all rows that begin alike."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.kernels.attention import AttentionRule
from pipeline.kernels.triton_launch import Launch, start

TILE = 64
"""Queries of a program."""


def tiles_of(rows: Sequence[tuple[int, int]], device: torch.device) -> Tensor:
    """[N, 3] int32: a tile's row's first token in the pass, the tile's first query in the row, and the row's tokens.

    `rows` are (first token in the pass, tokens).
    """
    tiles = [(begin, first, tokens) for begin, tokens in rows for first in range(0, tokens, TILE)]
    return torch.tensor(tiles, dtype=torch.int32, device=device).reshape(-1, 3)


def attend_rows(
    q_HTD: Tensor,
    k_KTD: Tensor,
    v_KTD: Tensor,
    tiles_N3: Tensor,
    earlier: tuple[Tensor, Tensor] | None,
    rule: AttentionRule,
    out_THD: Tensor,
) -> Tensor:
    """Write to `out_THD` what each row's tokens get of `earlier` (keys and values [K, S, D]) and of their own row.

    Tokens in no tile are left as they are. Returns `out_THD`.
    """
    if tiles_N3.shape[0]:
        start(rows_launch(q_HTD, k_KTD, v_KTD, tiles_N3, earlier, rule, out_THD))
    return out_THD


def rows_launch(
    q_HTD: Tensor,
    k_KTD: Tensor,
    v_KTD: Tensor,
    tiles_N3: Tensor,
    earlier: tuple[Tensor, Tensor] | None,
    rule: AttentionRule,
    out_THD: Tensor,
) -> Launch:
    """The call that does it."""
    from pipeline.kernels.triton_code.prefill import attend_tiles

    heads, _, dim = q_HTD.shape
    q_THD, k_TKD, v_TKD = (x.transpose(0, 1).contiguous() for x in (q_HTD, k_KTD, v_KTD))
    keys, values = (None, None) if earlier is None else (x.contiguous() for x in earlier)
    return Launch(
        function=attend_tiles,
        arguments={
            "q_ptr": q_THD,
            "keys_ptr": k_TKD,
            "values_ptr": v_TKD,
            "earlier_keys_ptr": keys,
            "earlier_values_ptr": values,
            "tiles_ptr": tiles_N3,
            "out_ptr": out_THD,
            "EARLIER": 0 if keys is None else keys.shape[1],
        },
        constants={
            "SCALE": rule.scale,
            "SOFTCAP": rule.softcap or 0.0,
            "WINDOW": rule.window or 0,
            "HEADS": heads,
            "KV_HEADS": k_KTD.shape[0],
            "D": dim,
            "BLOCK_M": TILE,
            "BLOCK_S": 64 if dim <= 64 else 32,
            "BLOCK_D": max(16, 1 << (dim - 1).bit_length()),
        },
        grid=(tiles_N3.shape[0], heads),
        warps=4 if dim <= 128 else 8,
        stages=2,
    )
