"""Decode attention in Triton: a program reads one split of one slot for all query heads of a key/value head."""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.kernels.attention import AttentionRule
from pipeline.kernels.cache_attention import AttentionNeed, CachedLayer
from pipeline.kernels.triton_launch import Launch, cover, import_obstacle, interpreting, place_obstacle, start

LARGEST_HEAD = {2: 256, 4: 128}
"""By bytes of a query's value: what is kept in registers without spilling."""
LEAST_ROWS = 16
"""Query heads of a product: what a tensor core instruction takes. Groups are filled up with zeros."""


def can_run(need: AttentionNeed) -> str | None:
    """Why Triton cannot read the cache here, or None if it can."""
    reason = place_obstacle(need.device_type, need.capability, need.dtype)
    if reason is None and need.head_dim > LARGEST_HEAD[need.dtype.itemsize]:
        largest = LARGEST_HEAD[need.dtype.itemsize]
        reason = f"the Triton kernel has room for heads of {largest} in this dtype, not of {need.head_dim}"
    return reason or import_obstacle()


def passed_over(need: AttentionNeed) -> str | None:
    """Why `auto` passes it over although it could run, or None."""
    return "Triton's interpreter is slow, so it has to be asked for" if interpreting() else None


def attend_cached(
    q_BHD: Tensor, layer: CachedLayer, lengths_B: Tensor, rule: AttentionRule, splits: int
) -> tuple[Tensor, Tensor]:
    """See `AttendCached`: the sums of each split in float32, weights rounded to the values' dtype, merged in order."""
    q_BHD, layer = q_BHD.contiguous(), layer.in_order()
    slots, heads, dim = q_BHD.shape
    out_BHD = torch.empty_like(q_BHD)
    lse_BH = torch.empty(slots, heads, dtype=torch.float32, device=q_BHD.device)
    if splits == 1:
        start(split_launch(q_BHD, layer, lengths_B, rule, out_BHD, lse_BH[..., None]))
        return out_BHD, lse_BH
    outs_BHPD = torch.empty(slots, heads, splits, dim, dtype=torch.float32, device=q_BHD.device)
    lses_BHP = torch.empty(slots, heads, splits, dtype=torch.float32, device=q_BHD.device)
    start(split_launch(q_BHD, layer, lengths_B, rule, outs_BHPD, lses_BHP))
    start(merge_launch(outs_BHPD, lses_BHP, out_BHD, lse_BH))
    return out_BHD, lse_BH


def split_launch(
    q_BHD: Tensor, layer: CachedLayer, lengths_B: Tensor, rule: AttentionRule, out: Tensor, lse_BHP: Tensor
) -> Launch:
    """What writes every split's attention to `out` [B, H, P, D], or [B, H, D] for one split, and `lse_BHP`."""
    from pipeline.kernels.triton_code.decode import attend_split

    slots, heads, dim = q_BHD.shape
    kv_heads, positions = layer.keys.shape[1:3]
    splits = lse_BHP.shape[2]
    block = _block(q_BHD.element_size(), dim)
    group = heads // kv_heads
    return Launch(
        function=attend_split,
        arguments={
            "q_ptr": q_BHD,
            "keys_ptr": layer.keys,
            "values_ptr": layer.values,
            "key_scales_ptr": layer.key_scales,
            "value_scales_ptr": layer.value_scales,
            "lengths_ptr": lengths_B,
            "out_ptr": out,
            "lse_ptr": lse_BHP,
            "S": positions,
        },
        constants={
            "SCALE": rule.scale,
            "SOFTCAP": rule.softcap or 0.0,
            "WINDOW": rule.window or 0,
            "KV_HEADS": kv_heads,
            "GROUP": group,
            "D": dim,
            "SPLITS": splits,
            "SPLIT_BLOCKS": cover(cover(positions, splits), block),
            "BLOCK_G": max(LEAST_ROWS, _power_of_2(group)),
            "BLOCK_S": block,
            "BLOCK_D": max(LEAST_ROWS, _power_of_2(dim)),
        },
        grid=(slots, kv_heads, splits),
        warps=4 if dim <= 128 else 8,
        stages=2,
    )


def merge_launch(outs_BHPD: Tensor, lses_BHP: Tensor, out_BHD: Tensor, lse_BH: Tensor) -> Launch:
    """What merges the splits, the first one first."""
    from pipeline.kernels.triton_code.decode import merge_splits

    slots, heads, splits, dim = outs_BHPD.shape
    return Launch(
        function=merge_splits,
        arguments={"outs_ptr": outs_BHPD, "lses_ptr": lses_BHP, "out_ptr": out_BHD, "lse_ptr": lse_BH},
        constants={"D": dim, "SPLITS": splits, "BLOCK_D": _power_of_2(dim)},
        grid=(slots * heads,),
        warps=4,
    )


def _block(itemsize: int, dim: int) -> int:
    """Positions at a time: tiles of keys and values of 16 KiB each at most, so that two of both fit shared memory."""
    if itemsize == 4:
        return 32
    return 64 if dim <= 128 else 32


def _power_of_2(value: int) -> int:
    """The least power of two that is not below the value."""
    return 1 << (value - 1).bit_length()
