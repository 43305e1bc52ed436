"""Attention over key/value segments: every function returns the output and its log-sum-exp.

Segments (a shared prefix, a prompt, a label trie, a cache) are attended to separately and merged
by their log-sum-exp, as in FlashDecoding and Cascade Inference.

Shapes: T query tokens, S key tokens, B slots, H query heads, K key/value heads, G = H / K query
heads per key/value head, D head dim. Outputs have the query's dtype; log-sum-exps are float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

QUERY_BLOCK = 64
"""Queries of several rows are multiplied with shared keys in blocks of this size, whatever their number: the size of
a product decides on its bits."""
FLASH_CAPABILITY = (8, 0)
"""The least compute capability that CUDA's flash operator runs on; on others it raises."""
LARGEST_FLASH_HEAD = 256
"""The longest head that it takes."""


AttendSegment = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Queries [1, H, T, D], keys and values [1, K, S, D] to the output [1, H, T, D] and the log-sum-exp [1, H, T]."""


@dataclass(frozen=True, slots=True)
class AttentionRule:
    """What a layer's attention is besides softmax(q k^T): the same for every token of the layer.

    scale     factor of the scores
    window    a token sees itself and this many minus one before it; None is all
    softcap   scores become softcap * tanh(score / softcap) (Gemma 2); None is off
    """

    scale: float
    window: int | None = None
    softcap: float | None = None

    def scores(self, raw: Tensor) -> Tensor:
        """Scaled and capped scores, float32, from q k^T in float32."""
        scaled = raw * self.scale
        return scaled if self.softcap is None else self.softcap * torch.tanh(scaled / self.softcap)

    def hidden(self, lengths_B: Tensor, positions: int) -> Tensor:
        """[B, S]: True for the positions of a slot that a query at its row's end does not see."""
        position_S = torch.arange(positions, device=lengths_B.device)
        hidden_BS = position_S >= lengths_B[:, None]
        if self.window is not None:
            hidden_BS = hidden_BS | (position_S < lengths_B[:, None] - self.window)
        return hidden_BS


def attend_reference(
    q_HTD: Tensor, k_KSD: Tensor, v_KSD: Tensor, rule: AttentionRule, mask_TS: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Softmax attention in plain torch, in float32 inside; `mask_TS` is True where a query may look.

    A query that may look nowhere gets zeros. The rule's window is the caller's matter, by the mask.
    Returns the output [H, T, D] and the log-sum-exp [H, T] of the scores.
    """
    heads, tokens, dim = q_HTD.shape
    groups = heads // k_KSD.shape[0]
    q_KGTD = q_HTD.reshape(-1, groups, tokens, dim).float()
    scores_KGTS = rule.scores(torch.matmul(q_KGTD, k_KSD[:, None].float().transpose(-1, -2)))
    if mask_TS is not None:
        scores_KGTS = scores_KGTS.masked_fill(~mask_TS, float("-inf"))
    lse_KGT = torch.logsumexp(scores_KGTS, dim=-1)
    weights_KGTS = (
        torch.nan_to_num(torch.softmax(scores_KGTS, dim=-1))
        if mask_TS is not None
        else (torch.softmax(scores_KGTS, dim=-1))
    )
    out_KGTD = torch.matmul(weights_KGTS, v_KSD[:, None].float())
    return out_KGTD.reshape(heads, tokens, dim).to(q_HTD.dtype), lse_KGT.reshape(heads, tokens)


def attend_causal(q_HTD: Tensor, k_KTD: Tensor, v_KTD: Tensor, rule: AttentionRule) -> tuple[Tensor, Tensor]:
    """A row's attention to itself: each token to those before it within the window, and to itself.

    By torch's flash kernel where the device has one and the rule allows. A row longer than the window
    goes in blocks of a window's length, each against the keys it can see. The bits depend on this
    row's own length only. Returns [H, T, D] and [H, T].
    """
    tokens = q_HTD.shape[1]
    if rule.window is None or tokens <= rule.window:
        flash = _flash_kernel(q_HTD, rule)
        if flash is not None:
            out_1HTD, lse_1HT = flash(q_HTD[None], k_KTD[None], v_KTD[None], 0.0, True, scale=rule.scale)[:2]
            return out_1HTD[0], lse_1HT[0, :, :tokens]
        return attend_reference(q_HTD, k_KTD, v_KTD, rule, visible(0, tokens, 0, tokens, None, q_HTD.device))
    blocks = []
    for first in range(0, tokens, rule.window):
        end, begin = min(first + rule.window, tokens), max(0, first - rule.window + 1)
        mask_TS = visible(first, end, begin, end, rule.window, q_HTD.device)
        blocks.append(attend_reference(q_HTD[:, first:end], k_KTD[:, begin:end], v_KTD[:, begin:end], rule, mask_TS))
    return torch.cat([out for out, _ in blocks], dim=1), torch.cat([lse for _, lse in blocks], dim=1)


def visible(
    first_query: int, end_query: int, first_key: int, end_key: int, window: int | None, device: torch.device
) -> Tensor:
    """[T, S]: True where the token at a query's position may see the one at a key's."""
    query_T1 = torch.arange(first_query, end_query, device=device)[:, None]
    key_S = torch.arange(first_key, end_key, device=device)
    seen_TS = key_S <= query_T1
    return seen_TS if window is None else seen_TS & (key_S > query_T1 - window)


def attend_segment(
    q_HTD: Tensor, k_KSD: Tensor, v_KSD: Tensor, rule: AttentionRule, mask_TS: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of queries to a segment that lies wholly before them, all of it or where the mask is True.

    Returns [H, T, D] and [H, T].
    """
    if mask_TS is not None:
        return attend_reference(q_HTD, k_KSD, v_KSD, rule, mask_TS)
    out_1HTD, lse_1HT = segment_kernel(q_HTD, rule)(q_HTD[None], k_KSD[None], v_KSD[None])
    return out_1HTD[0], lse_1HT[0]


def segment_kernel(q: Tensor, rule: AttentionRule) -> AttendSegment:
    """What attends to whole segments: torch's flash kernel where the device of `q` has one and the rule allows."""
    flash = _flash_kernel(q, rule)

    def by_flash(q_1HTD: Tensor, k_1KSD: Tensor, v_1KSD: Tensor) -> tuple[Tensor, Tensor]:
        found = flash(q_1HTD, k_1KSD, v_1KSD, 0.0, False, scale=rule.scale)
        return found[0], found[1].narrow(2, 0, q_1HTD.shape[2])

    def by_reference(q_1HTD: Tensor, k_1KSD: Tensor, v_1KSD: Tensor) -> tuple[Tensor, Tensor]:
        out_HTD, lse_HT = attend_reference(q_1HTD[0], k_1KSD[0], v_1KSD[0], rule)
        return out_HTD[None], lse_HT[None]

    return by_reference if flash is None else by_flash


def attend_earlier(
    q_HTD: Tensor, k_KSD: Tensor, v_KSD: Tensor, positions_T: Tensor, rule: AttentionRule
) -> tuple[Tensor, Tensor]:
    """Attention of queries, which may be of several rows, to the S keys that they all stand behind.

    In products of one size, so that a query's bits do not depend on the others. `positions_T` decides on what a
    window hides. Returns [H, T, D] and [H, T]; a query whose window has left all keys behind gets zeros and a
    log-sum-exp of -inf.
    """
    tokens = q_HTD.shape[1]
    padding = -tokens % QUERY_BLOCK
    blocks_HQD = torch.split(F.pad(q_HTD, (0, 0, 0, padding)), QUERY_BLOCK, dim=1)
    flash = _flash_kernel(q_HTD, rule) if q_HTD.device.type == "cpu" and rule.window is None else None
    if flash is not None:  # block by block: how it multiplies depends on how many blocks it gets
        found = [flash(b[None], k_KSD[None], v_KSD[None], 0.0, False, scale=rule.scale)[:2] for b in blocks_HQD]
        out_HTD = torch.cat([out[0] for out, _ in found], dim=1)[:, :tokens]
        lse_HT = torch.cat([lse[0, :, :QUERY_BLOCK] for _, lse in found], dim=1)[:, :tokens]
        return out_HTD + (q_HTD * 0).sum(-1, keepdim=True), lse_HT  # which it leaves out where a query is not finite
    key_S = torch.arange(k_KSD.shape[1], device=q_HTD.device)
    parts = []
    for block_HQD, position_Q in zip(
        blocks_HQD, torch.split(F.pad(positions_T, (0, padding)), QUERY_BLOCK), strict=True
    ):
        mask_QS = None if rule.window is None else key_S > position_Q[:, None] - rule.window
        parts.append(attend_reference(block_HQD, k_KSD, v_KSD, rule, mask_QS))
    outs, lses = torch.cat([out for out, _ in parts], dim=1), torch.cat([lse for _, lse in parts], dim=1)
    return outs[:, :tokens], lses[:, :tokens]


def _flash_kernel(q_HTD: Tensor, rule: AttentionRule):  # type: ignore[no-untyped-def]  # torch's operators are untyped
    """The flash operator for this device, dtype and rule, or None where only the reference can run."""
    if rule.softcap is not None:
        return None
    if q_HTD.device.type == "cpu" and q_HTD.dtype in (torch.float32, torch.bfloat16):
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    if q_HTD.device.type == "cuda" and q_HTD.dtype in (torch.float16, torch.bfloat16):
        dim, capability = q_HTD.shape[-1], torch.cuda.get_device_capability(q_HTD.device)
        if dim % 8 == 0 and dim <= LARGEST_FLASH_HEAD and capability >= FLASH_CAPABILITY:
            return _cuda_flash
    return None


def _cuda_flash(
    q_1HTD: Tensor, k_1KSD: Tensor, v_1KSD: Tensor, dropout: float, causal: bool, *, scale: float
) -> tuple[Tensor, Tensor]:
    """CUDA's flash operator, which wants keys and values repeated to the number of query heads."""
    groups = q_1HTD.shape[1] // k_1KSD.shape[1]
    k_1HSD, v_1HSD = (x.repeat_interleave(groups, dim=1) for x in (k_1KSD, v_1KSD))
    result = torch.ops.aten._scaled_dot_product_flash_attention.default(
        q_1HTD, k_1HSD, v_1HSD, dropout, causal, False, scale=scale
    )
    return result[0], result[1]


def attend_cache(
    q_BHD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, lengths_B: Tensor, rule: AttentionRule
) -> tuple[Tensor, Tensor]:
    """One query per slot, at its row's end, against the slot's keys and values, of which the first `lengths_B` count.

    Matrix products over the whole static cache rather than a masked fused kernel: their bits do not
    depend on the slot or on the neighbours. Returns [B, H, D] and [B, H].
    """
    slots, heads, dim = q_BHD.shape
    kv_heads, positions = k_BKSD.shape[1], k_BKSD.shape[2]
    q_BKGD = q_BHD.reshape(slots, kv_heads, heads // kv_heads, dim)
    scores_BKGS = rule.scores(torch.matmul(q_BKGD, k_BKSD.transpose(-1, -2)).float())
    scores_BKGS = scores_BKGS.masked_fill(rule.hidden(lengths_B, positions)[:, None, None], float("-inf"))
    lse_BKG = torch.logsumexp(scores_BKGS, dim=-1)
    weights_BKGS = softmax_weights(scores_BKGS, lse_BKG)
    out_BKGD = torch.matmul(weights_BKGS.to(v_BKSD.dtype), v_BKSD)
    return out_BKGD.reshape(slots, heads, dim), lse_BKG.reshape(slots, heads)


def softmax_weights(scores: Tensor, lse: Tensor) -> Tensor:
    """exp(scores - lse) over the last dimension; zeros where all scores, and so their log-sum-exp, are -inf."""
    return torch.exp(scores - lse.masked_fill(lse == float("-inf"), 0.0)[..., None])


def merge_segments(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Merge the attention of the same queries over disjoint segments, in the order given.

    `parts` holds (output [H, T, D], log-sum-exp [H, T]) of each segment; the result has the same
    shapes and equals attention over all segments at once, within rounding.
    """
    lses = torch.stack([lse for _, lse in parts])
    total_HT = torch.logsumexp(lses, dim=0)
    merged_HTD = torch.zeros_like(parts[0][0], dtype=torch.float32)
    for out_HTD, lse_HT in parts:
        merged_HTD = merged_HTD + torch.exp(lse_HT - total_HT)[..., None] * out_HTD.float()
    return merged_HTD.to(parts[0][0].dtype), total_HT
