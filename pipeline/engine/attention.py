"""The attention of a static pass: which rows its tokens belong to and what they look at.

A model hands over the queries, keys and values of a flat pass of T tokens, layer by layer; the pass
knows the rows. Shapes: T tokens of the pass, B slots, H query heads, K key/value heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.engine.kv_cache import KVCache, Segment
from pipeline.kernels.attention import (
    QUERY_BLOCK,
    AttentionRule,
    attend_causal,
    attend_earlier,
    attend_reference,
    attend_segment,
    merge_segments,
)
from pipeline.kernels.cache_attention import RowsKernel


class AttentionPass(Protocol):
    """What a model calls in place of its own attention.

    `reach_T` is, for each token of the pass, the length that its row can reach, prompt and answer
    together: what decides on a RoPE that depends on length.
    """

    @property
    def reach_T(self) -> Tensor: ...

    def attend(self, layer: int, q_HTD: Tensor, k_KTD: Tensor, v_KTD: Tensor, rule: AttentionRule) -> Tensor:
        """Attention output [T, H, D] of the pass's tokens in this layer."""
        ...


@dataclass(frozen=True, slots=True)
class TrieMask:
    """What the nodes of a candidates' token trie see: N nodes behind a prompt of S tokens.

    `ancestors_NN` is True where a node (row) may look at a node (column): itself and its ancestors.
    `depths_N` is how far behind the prompt's last token a node stands, from 1.
    """

    ancestors_NN: Tensor
    depths_N: Tensor

    def seen_nodes(self, window: int | None) -> Tensor:
        """[N, N]: the nodes a node sees, those of its ancestors that are within the window."""
        if window is None:
            return self.ancestors_NN
        return self.ancestors_NN & (self.depths_N[:, None] - self.depths_N < window)

    def seen_prompt(self, prompt_tokens: int, window: int | None) -> Tensor | None:
        """[N, S]: the prompt's tokens that a node sees, or None for all."""
        if window is None:
            return None
        behind_S = prompt_tokens - 1 - torch.arange(prompt_tokens, device=self.depths_N.device)
        return self.depths_N[:, None] + behind_S < window


@dataclass(frozen=True, slots=True)
class RowSpan:
    """Where a row lies in a packed pass: the tokens that look back, then the nodes of its candidates' token trie.

    `earlier` are the segments that its prompt begins with and that are not in the pass; `kept_as` is the segment
    that the row's own keys and values are to fill.
    """

    start: int
    causal: int
    trie: TrieMask | None = None
    earlier: tuple[Segment, ...] = ()
    kept_as: Segment | None = None

    @property
    def text(self) -> slice:
        """The tokens that look at all before them."""
        return slice(self.start, self.start + self.causal)

    @property
    def nodes(self) -> slice:
        """The trie nodes' tokens, right behind."""
        count = 0 if self.trie is None else self.trie.depths_N.shape[0]
        return slice(self.start + self.causal, self.start + self.causal + count)


@dataclass(frozen=True, slots=True)
class CacheWrite:
    """Where a pass's tokens are kept: [T] slots and [T] positions (padding goes to the scratch slot)."""

    cache: KVCache
    slots_T: Tensor
    positions_T: Tensor


@dataclass(frozen=True, slots=True)
class TiledRows:
    """Rows that begin with the same segments, cut into a kernel's tiles."""

    earlier: tuple[Segment, ...]
    tiles: Tensor


@dataclass(frozen=True, slots=True)
class Tiling:
    """All rows of a pass in the tiles of a kernel that takes them together."""

    kernel: RowsKernel
    groups: tuple[TiledRows, ...]

    @classmethod
    def of(cls, rows: Sequence[RowSpan], kernel: RowsKernel, device: torch.device) -> Tiling:
        """The tiles of each group of rows that begin alike."""
        spans = [(group[0].earlier, [(r.start, r.causal) for r in group]) for group in by_beginning(rows)]
        return cls(kernel, tuple(TiledRows(earlier, kernel.tiles_of(span, device)) for earlier, span in spans))


@dataclass(frozen=True, slots=True)
class PackedPrefill:
    """Rows side by side in one flat pass; each looks at itself, at its own exact length, and at what it begins with.

    With a `tiling` its kernel attends to all rows that begin alike at once, without one each row by itself.
    """

    rows: tuple[RowSpan, ...]
    write: CacheWrite | None
    positions_T: Tensor
    reach_T: Tensor
    tiling: Tiling | None = None

    def attend(self, layer: int, q_HTD: Tensor, k_KTD: Tensor, v_KTD: Tensor, rule: AttentionRule) -> Tensor:
        """Attention output [T, H, D]; padding tokens get zeros."""
        if self.write is not None:
            self.write.cache.write(layer, self.write.slots_T, self.write.positions_T, k_KTD, v_KTD)
        heads, tokens, dim = q_HTD.shape
        out_THD = torch.zeros(tokens, heads, dim, dtype=q_HTD.dtype, device=q_HTD.device)
        if self.tiling is None:
            self._attend_row_by_row(layer, q_HTD, k_KTD, v_KTD, rule, out_THD)
        else:
            for group in self.tiling.groups:
                before = _joined(layer, group.earlier)
                self.tiling.kernel.attend(q_HTD, k_KTD, v_KTD, group.tiles, before, rule, out_THD)
        for row in self.rows:
            if row.kept_as is not None:
                row.kept_as.put(layer, k_KTD[:, row.text], v_KTD[:, row.text])
            if row.trie is not None:
                before = _joined(layer, row.earlier)
                out_THD[row.nodes] = _attend_trie(row, row.trie, before, q_HTD, k_KTD, v_KTD, rule).transpose(0, 1)
        return out_THD

    def _attend_row_by_row(
        self, layer: int, q_HTD: Tensor, k_KTD: Tensor, v_KTD: Tensor, rule: AttentionRule, out_THD: Tensor
    ) -> None:
        """Write what the rows' own tokens get, but for those of tries."""
        for rows in by_beginning(self.rows):
            own = [attend_causal(q_HTD[:, r.text], k_KTD[:, r.text], v_KTD[:, r.text], rule) for r in rows]
            before = _joined(layer, rows[0].earlier)
            if before is not None:
                queries_T = torch.cat([torch.arange(r.start, r.start + r.causal, device=q_HTD.device) for r in rows])
                seen = attend_earlier(q_HTD[:, queries_T], *before, self.positions_T[queries_T], rule)
                own = _merged(own, seen)
            for row, (out_HSD, _) in zip(rows, own, strict=True):
                out_THD[row.text] = out_HSD.transpose(0, 1)


def by_beginning(all_rows: Sequence[RowSpan]) -> list[list[RowSpan]]:
    """The rows in groups that begin with the same segments: their queries look at those together."""
    groups: dict[tuple[int, ...], list[RowSpan]] = {}
    for row in all_rows:
        groups.setdefault(tuple(map(id, row.earlier)), []).append(row)
    return list(groups.values())


def _joined(layer: int, earlier: tuple[Segment, ...]) -> tuple[Tensor, Tensor] | None:
    """Keys and values [K, S, D] of segments that follow one another; None for none."""
    if not earlier:
        return None
    if len(earlier) == 1:
        return earlier[0].keys[layer], earlier[0].values[layer]
    return torch.cat([s.keys[layer] for s in earlier], dim=1), torch.cat([s.values[layer] for s in earlier], dim=1)


def _merged(own: list[tuple[Tensor, Tensor]], seen: tuple[Tensor, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Each row's attention to itself, merged with all rows' attention to what they begin with.

    Padded, since vectorized functions may round the last few elements otherwise than the others.
    """
    lengths = [out.shape[1] for out, _ in own]
    padding = -sum(lengths) % QUERY_BLOCK
    outs, lses = torch.cat([out for out, _ in own], dim=1), torch.cat([lse for _, lse in own], dim=1)
    parts = [(F.pad(out, (0, 0, 0, padding)), F.pad(lse, (0, padding))) for out, lse in (seen, (outs, lses))]
    merged_HTD, lse_HT = merge_segments(parts)
    kept = sum(lengths)
    rows_HTD, rows_HT = (torch.split(x[:, :kept], lengths, dim=1) for x in (merged_HTD, lse_HT))
    return list(zip(rows_HTD, rows_HT, strict=True))


def _attend_trie(
    row: RowSpan,
    trie: TrieMask,
    before: tuple[Tensor, Tensor] | None,
    q_HTD: Tensor,
    k_KTD: Tensor,
    v_KTD: Tensor,
    rule: AttentionRule,
) -> Tensor:
    """Attention [H, N, D] of a trie's nodes to the whole prompt and to their ancestors."""
    k_KSD, v_KSD = k_KTD[:, row.text], v_KTD[:, row.text]
    if before is not None:
        k_KSD, v_KSD = torch.cat([before[0], k_KSD], dim=1), torch.cat([before[1], v_KSD], dim=1)
    nodes = row.nodes
    seen_NN = trie.seen_nodes(rule.window)
    merged_HND, _ = merge_segments(
        [
            attend_segment(q_HTD[:, nodes], k_KSD, v_KSD, rule, trie.seen_prompt(k_KSD.shape[1], rule.window)),
            attend_reference(q_HTD[:, nodes], k_KTD[:, nodes], v_KTD[:, nodes], rule, seen_NN),
        ]
    )
    return merged_HND


@dataclass(frozen=True, slots=True)
class SlotDecode:
    """One token for each of `slots_B`, which are all slots of the cache in order, or `some`.

    `positions_B` is where each slot's token stands in its row, `lengths_B` how many of the row's tokens it sees, itself
    included; none in a free slot.
    """

    cache: KVCache
    slots_B: Tensor
    positions_B: Tensor
    lengths_B: Tensor
    reach_T: Tensor
    some: bool = False

    def attend(self, layer: int, q_HTD: Tensor, k_KTD: Tensor, v_KTD: Tensor, rule: AttentionRule) -> Tensor:
        """Attention output [B, H, D] of each slot's token."""
        self.cache.write(layer, self.slots_B, self.positions_B, k_KTD, v_KTD)
        slots_B = self.slots_B if self.some else None
        out_BHD, _ = self.cache.attend(layer, q_HTD.transpose(0, 1), self.lengths_B, rule, slots_B)
        return out_BHD
