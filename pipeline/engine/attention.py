"""The attention of a static pass: which rows its tokens belong to and what they look at.

A model hands over the queries, keys and values of a flat pass of T tokens, layer by layer; the pass
knows the rows. Shapes: T tokens of the pass, B slots, H query heads, K key/value heads, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pipeline.engine.kv_cache import KVCache
from pipeline.kernels.attention import attend_cache, attend_reference, attend_segment, merge_segments


class AttentionPass(Protocol):
    """What a model calls in place of its own attention."""

    def attend(self, layer: int, q_HTD: Tensor, k_KTD: Tensor, v_KTD: Tensor, scale: float) -> Tensor:
        """Attention output [T, H, D] of the pass's tokens in this layer."""
        ...


@dataclass(frozen=True, slots=True)
class RowSpan:
    """Where a row lies in a packed pass: its prompt, then the nodes of its candidates' token trie.

    `ancestors_NN` is True where a node (row) may look at a node (column): itself and its ancestors.
    """

    start: int
    prompt_tokens: int
    ancestors_NN: Tensor | None = None

    @property
    def prompt(self) -> slice:
        """The prompt's tokens."""
        return slice(self.start, self.start + self.prompt_tokens)

    @property
    def nodes(self) -> slice:
        """The trie nodes' tokens, right behind the prompt."""
        count = 0 if self.ancestors_NN is None else self.ancestors_NN.shape[0]
        return slice(self.start + self.prompt_tokens, self.start + self.prompt_tokens + count)


@dataclass(frozen=True, slots=True)
class CacheWrite:
    """Where a pass's tokens are kept: [T] slots and [T] positions (padding goes to the scratch slot)."""

    cache: KVCache
    slots_T: Tensor
    positions_T: Tensor


@dataclass(frozen=True, slots=True)
class PackedPrefill:
    """Prompts side by side in one flat pass; each looks at itself only, at its own exact length."""

    rows: tuple[RowSpan, ...]
    write: CacheWrite | None

    def attend(self, layer: int, q_HTD: Tensor, k_KTD: Tensor, v_KTD: Tensor, scale: float) -> Tensor:
        """Attention output [T, H, D]; padding tokens get zeros."""
        if self.write is not None:
            self.write.cache.write(layer, self.write.slots_T, self.write.positions_T, k_KTD, v_KTD)
        heads, tokens, dim = q_HTD.shape
        out_THD = torch.zeros(tokens, heads, dim, dtype=q_HTD.dtype, device=q_HTD.device)
        for row in self.rows:
            prompt = row.prompt
            k_KSD, v_KSD = k_KTD[:, prompt], v_KTD[:, prompt]
            out_HSD, _ = attend_segment(q_HTD[:, prompt], k_KSD, v_KSD, scale, causal=True)
            out_THD[prompt] = out_HSD.transpose(0, 1)
            if row.ancestors_NN is not None:
                nodes = row.nodes
                merged_HND, _ = merge_segments(
                    [
                        attend_segment(q_HTD[:, nodes], k_KSD, v_KSD, scale, causal=False),
                        attend_reference(q_HTD[:, nodes], k_KTD[:, nodes], v_KTD[:, nodes], scale, row.ancestors_NN),
                    ]
                )
                out_THD[nodes] = merged_HND.transpose(0, 1)
        return out_THD


@dataclass(frozen=True, slots=True)
class SlotDecode:
    """One token per slot: the tokens of the pass are the first B slots of the cache.

    `positions_B` is where each slot's token stands in its row.
    """

    cache: KVCache
    slots_B: Tensor
    positions_B: Tensor

    def attend(self, layer: int, q_HTD: Tensor, k_KTD: Tensor, v_KTD: Tensor, scale: float) -> Tensor:
        """Attention output [B, H, D] of each slot's token over its row so far, itself included."""
        self.cache.write(layer, self.slots_B, self.positions_B, k_KTD, v_KTD)
        slots = self.slots_B.shape[0]
        keys, values = self.cache.read(layer)
        out_BHD, _ = attend_cache(q_HTD.transpose(0, 1), keys[:slots], values[:slots], self.positions_B + 1, scale)
        return out_BHD
