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
from pipeline.kernels.attention import (
    AttentionRule,
    attend_cache,
    attend_causal,
    attend_reference,
    attend_segment,
    merge_segments,
)


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
    """Where a row lies in a packed pass: its prompt, then the nodes of its candidates' token trie."""

    start: int
    prompt_tokens: int
    trie: TrieMask | None = None

    @property
    def prompt(self) -> slice:
        """The prompt's tokens."""
        return slice(self.start, self.start + self.prompt_tokens)

    @property
    def nodes(self) -> slice:
        """The trie nodes' tokens, right behind the prompt."""
        count = 0 if self.trie is None else self.trie.depths_N.shape[0]
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
    reach_T: Tensor

    def attend(self, layer: int, q_HTD: Tensor, k_KTD: Tensor, v_KTD: Tensor, rule: AttentionRule) -> Tensor:
        """Attention output [T, H, D]; padding tokens get zeros."""
        if self.write is not None:
            self.write.cache.write(layer, self.write.slots_T, self.write.positions_T, k_KTD, v_KTD)
        heads, tokens, dim = q_HTD.shape
        out_THD = torch.zeros(tokens, heads, dim, dtype=q_HTD.dtype, device=q_HTD.device)
        for row in self.rows:
            prompt = row.prompt
            k_KSD, v_KSD = k_KTD[:, prompt], v_KTD[:, prompt]
            out_HSD, _ = attend_causal(q_HTD[:, prompt], k_KSD, v_KSD, rule)
            out_THD[prompt] = out_HSD.transpose(0, 1)
            if row.trie is not None:
                nodes = row.nodes
                seen_NS = row.trie.seen_prompt(row.prompt_tokens, rule.window)
                merged_HND, _ = merge_segments(
                    [
                        attend_segment(q_HTD[:, nodes], k_KSD, v_KSD, rule, seen_NS),
                        attend_reference(
                            q_HTD[:, nodes], k_KTD[:, nodes], v_KTD[:, nodes], rule, row.trie.seen_nodes(rule.window)
                        ),
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
    reach_T: Tensor

    def attend(self, layer: int, q_HTD: Tensor, k_KTD: Tensor, v_KTD: Tensor, rule: AttentionRule) -> Tensor:
        """Attention output [B, H, D] of each slot's token over its row so far, itself included."""
        self.cache.write(layer, self.slots_B, self.positions_B, k_KTD, v_KTD)
        slots = self.slots_B.shape[0]
        keys, values = self.cache.read(layer)
        out_BHD, _ = attend_cache(q_HTD.transpose(0, 1), keys[:slots], values[:slots], self.positions_B + 1, rule)
        return out_BHD
