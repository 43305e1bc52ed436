"""One query per slot against the keys and values that a static cache holds of its row.

Shapes: B slots, S positions of a slot, H query heads, K key/value heads, G = H / K, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.kernels.attention import AttentionRule, attend_cache, segment_kernel, softmax_weights
from pipeline.kernels.float8 import decoded

BLOCK = 256
"""Positions whose keys are dequantized at a time."""


@dataclass(frozen=True, slots=True)
class CachedLayer:
    """A layer's keys and values [slots, K, S, D]; in FP8 (`float8.py`) with a scale [slots, K, S] for each token.

    `slots_B` is the slot that each query is for; without it there is a query for every slot, in order.
    """

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None
    slots_B: Tensor | None = None

    def in_order(self) -> CachedLayer:
        """A slot for every query, copied where not all are asked for."""
        if self.slots_B is None:
            return self
        stored = (self.keys, self.values, self.key_scales, self.value_scales)
        keys, values, *scales = (None if x is None else x.index_select(0, self.slots_B) for x in stored)
        assert keys is not None
        assert values is not None
        return CachedLayer(keys, values, *scales)


AttendCached = Callable[[Tensor, CachedLayer, Tensor, AttentionRule, int], tuple[Tensor, Tensor]]
"""Queries [B, H, D], layer, lengths [B], rule and splits to the output [B, H, D] and the log-sum-exp [B, H].

Of each query's slot the first so many positions count, the query's own the last of them; a slot of length 0 is free,
and what it gets is finite and means nothing. `splits` is into how many equal parts the positions are cut, whose
attention is merged; it changes bits, and nothing else does.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionNeed:
    """What is to be run: where, in which dtype, with heads of `head_dim`, over a cache in FP8 or not."""

    device_type: str
    capability: tuple[int, int] | None = None
    dtype: torch.dtype = torch.float32
    head_dim: int = 128
    float8: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class RowsKernel:
    """What computes the attention of all rows of a pass that begin alike in one call (see `triton_prefill`).

    `tiles_of` makes of rows, as (first token in the pass, tokens), the tensor that `attend` takes.
    """

    attend: Callable[[Tensor, Tensor, Tensor, Tensor, tuple[Tensor, Tensor] | None, AttentionRule, Tensor], Tensor]
    tiles_of: Callable[[Sequence[tuple[int, int]], torch.device], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionKernel:
    """One implementation; `can_run` and `passed_over` answer with a reason, or None (see `registry.Kernel`).

    `stops_at_length` says whether a slot takes as long as its row, and not as its room, is long. `rows` is for prefill
    in dtypes of 16 bits; without it, and in others, rows are attended to one by one. `prepare` compiles what there is
    to compile, which can take seconds.
    """

    name: str
    attend: AttendCached
    can_run: Callable[[AttentionNeed], str | None]
    passed_over: Callable[[AttentionNeed], str | None]
    stops_at_length: Callable[[AttentionNeed], bool]
    rows: RowsKernel | None = None
    prepare: Callable[[AttentionNeed], None] | None = None

    def rows_in(self, dtype: torch.dtype) -> RowsKernel | None:
        """The kernel for a prefill in a dtype, if there is one."""
        return self.rows if dtype.itemsize == 2 else None


def runs_slot_by_slot(need: AttentionNeed) -> str | None:
    """Why slots cannot be attended to one by one, or None if they can."""
    if need.device_type == "cpu":
        return None
    return f"slots are attended to one by one on cpu, where the host knows their lengths, not on {need.device_type}"


def attend_slot_by_slot(
    q_BHD: Tensor, layer: CachedLayer, lengths_B: Tensor, rule: AttentionRule, splits: int
) -> tuple[Tensor, Tensor]:
    """Each slot by itself, up to its row's length, by torch's flash kernel where the rule allows; FP8 as the reference.

    A CPU takes longer to read all positions of all slots than to start an operation for each. A slot's bits depend
    on its own length only.
    """
    layer = layer.in_order()
    if layer.key_scales is not None:
        return attend_cached_reference(q_BHD, layer, lengths_B, rule, splits)
    lengths = lengths_B.tolist()
    taken = [slot for slot, length in enumerate(lengths) if length]
    outs_BHD, lses_BH = torch.zeros_like(q_BHD), q_BHD.new_full(q_BHD.shape[:2], float("-inf"), dtype=torch.float32)
    if taken:
        attend = segment_kernel(q_BHD, rule)
        q_B1H1D, k_B1KSD, v_B1KSD = (
            x.unbind() for x in (q_BHD[:, None, :, None], layer.keys[:, None], layer.values[:, None])
        )
        parts = [attend(q_B1H1D[s], *_seen(k_B1KSD[s], v_B1KSD[s], lengths[s], rule)) for s in taken]
        outs_BHD[taken] = torch.cat([out_1H1D for out_1H1D, _ in parts])[:, :, 0]
        lses_BH[taken] = torch.cat([lse_1H1 for _, lse_1H1 in parts])[:, :, 0]
    broken_BH1 = (q_BHD * 0).sum(dim=-1, keepdim=True)  # nan for a query that is not finite, which flash makes zeros of
    return outs_BHD + broken_BH1, lses_BH


def _seen(k_1KSD: Tensor, v_1KSD: Tensor, length: int, rule: AttentionRule) -> tuple[Tensor, Tensor]:
    """A slot's keys and values that a query at its row's end sees."""
    count = length if rule.window is None else min(length, rule.window)
    return k_1KSD.narrow(2, length - count, count), v_1KSD.narrow(2, length - count, count)


def attend_cached_reference(
    q_BHD: Tensor, layer: CachedLayer, lengths_B: Tensor, rule: AttentionRule, splits: int
) -> tuple[Tensor, Tensor]:
    """In plain torch, all positions at once whatever `splits` says; FP8 is dequantized block by block."""
    layer = layer.in_order()
    if layer.key_scales is None or layer.value_scales is None:
        return attend_cache(q_BHD, layer.keys, layer.values, lengths_B, rule)
    slots, heads, dim = q_BHD.shape
    kv_heads, positions = layer.keys.shape[1:3]
    q_BKGD = q_BHD.reshape(slots, kv_heads, heads // kv_heads, dim).float()
    blocks = [slice(first, first + BLOCK) for first in range(0, positions, BLOCK)]
    raw_BKGS = torch.cat(
        [
            torch.matmul(q_BKGD, decoded(layer.keys[:, :, block]).transpose(-1, -2))
            * layer.key_scales[:, :, None, block]
            for block in blocks
        ],
        dim=-1,
    )
    scores_BKGS = rule.scores(raw_BKGS).masked_fill(rule.hidden(lengths_B, positions)[:, None, None], float("-inf"))
    lse_BKG = torch.logsumexp(scores_BKGS, dim=-1)
    weights_BKGS = softmax_weights(scores_BKGS, lse_BKG) * layer.value_scales[:, :, None]
    out_BKGD = torch.zeros_like(q_BKGD)
    for block in blocks:
        out_BKGD = out_BKGD + torch.matmul(weights_BKGS[..., block], decoded(layer.values[:, :, block]))
    return out_BKGD.reshape(slots, heads, dim).to(q_BHD.dtype), lse_BKG.reshape(slots, heads)
