"""Attention over key/value segments: every function returns the output and its log-sum-exp.

Segments (a shared prefix, a prompt, a label trie, a cache) are attended to separately and merged
by their log-sum-exp, as in FlashDecoding and Cascade Inference.

Shapes: T query tokens, S key tokens, B slots, H query heads, K key/value heads, G = H / K query
heads per key/value head, D head dim. Outputs have the query's dtype; log-sum-exps are float32.
"""

from __future__ import annotations

import torch
from torch import Tensor


def attend_reference(
    q_HTD: Tensor, k_KSD: Tensor, v_KSD: Tensor, scale: float, mask_TS: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Softmax attention in plain torch, in float32 inside; `mask_TS` is True where a query may look.

    Returns the output [H, T, D] and the log-sum-exp [H, T] of the scaled scores.
    """
    heads, tokens, dim = q_HTD.shape
    groups = heads // k_KSD.shape[0]
    q_KGTD = q_HTD.reshape(-1, groups, tokens, dim).float()
    scores_KGTS = torch.matmul(q_KGTD, k_KSD[:, None].float().transpose(-1, -2)) * scale
    if mask_TS is not None:
        scores_KGTS = scores_KGTS.masked_fill(~mask_TS, float("-inf"))
    lse_KGT = torch.logsumexp(scores_KGTS, dim=-1)
    out_KGTD = torch.matmul(torch.softmax(scores_KGTS, dim=-1), v_KSD[:, None].float())
    return out_KGTD.reshape(heads, tokens, dim).to(q_HTD.dtype), lse_KGT.reshape(heads, tokens)


def attend_segment(q_HTD: Tensor, k_KSD: Tensor, v_KSD: Tensor, scale: float, *, causal: bool) -> tuple[Tensor, Tensor]:
    """Attention of one row's queries to one segment, causal within it or to all of it.

    Same result as `attend_reference`, by torch's flash kernel where the device has one. The bits
    depend on this row's own lengths only. Returns [H, T, D] and [H, T].
    """
    flash = _flash_kernel(q_HTD)
    if flash is None:
        mask_TS = None
        if causal:
            mask_TS = torch.ones(q_HTD.shape[1], k_KSD.shape[1], dtype=torch.bool, device=q_HTD.device).tril()
        return attend_reference(q_HTD, k_KSD, v_KSD, scale, mask_TS)
    out_1HTD, lse_1HT = flash(q_HTD[None], k_KSD[None], v_KSD[None], 0.0, causal, scale=scale)[:2]
    return out_1HTD[0], lse_1HT[0, :, : q_HTD.shape[1]]


def _flash_kernel(q_HTD: Tensor):  # type: ignore[no-untyped-def]  # torch's operators are untyped
    """The flash operator of this tensor's device and dtype, or None where only the reference can run."""
    if q_HTD.device.type == "cpu" and q_HTD.dtype in (torch.float32, torch.bfloat16):
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    if q_HTD.device.type == "cuda" and q_HTD.dtype in (torch.float16, torch.bfloat16) and q_HTD.shape[-1] % 8 == 0:
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
    q_BHD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, lengths_B: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """One query per slot against the slot's own keys and values, of which the first `lengths_B` count.

    Matrix products over the whole static cache rather than a masked fused kernel: their bits do not
    depend on the slot or on the neighbours. Returns [B, H, D] and [B, H].
    """
    slots, heads, dim = q_BHD.shape
    kv_heads, positions = k_BKSD.shape[1], k_BKSD.shape[2]
    q_BKGD = q_BHD.reshape(slots, kv_heads, heads // kv_heads, dim)
    scores_BKGS = torch.matmul(q_BKGD, k_BKSD.transpose(-1, -2)).float() * scale
    beyond_BS = torch.arange(positions, device=q_BHD.device) >= lengths_B[:, None]
    scores_BKGS = scores_BKGS.masked_fill(beyond_BS[:, None, None], float("-inf"))
    lse_BKG = torch.logsumexp(scores_BKGS, dim=-1)
    weights_BKGS = torch.exp(scores_BKGS - lse_BKG[..., None])
    out_BKGD = torch.matmul(weights_BKGS.to(v_BKSD.dtype), v_BKSD)
    return out_BKGD.reshape(slots, heads, dim), lse_BKG.reshape(slots, heads)


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
