"""Logits to token ids on the device, without host synchronization.

Random numbers come from Philox4x32-10, a counter-based generator (Salmon et al., "Parallel random
numbers: as easy as 1, 2, 3", SC 2011), keyed by a hash of the prompt's token ids and counted by
(step, choice, seed): a row's draws depend on nothing else. Shapes: B rows, V vocab, N steps.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.core import SamplingParams

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def prompt_key(prompt_ids: Sequence[int]) -> int:
    """A 64-bit hash of the token ids: the generator's key for this prompt."""
    data = array("q", prompt_ids).tobytes()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def philox4x32(counter: Sequence[Tensor], key: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds of Philox4x32 on int64 tensors that hold unsigned 32-bit words, of any one shape."""
    x0, x1, x2, x3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        product0, product1 = x0 * _MULTIPLIERS[0], x2 * _MULTIPLIERS[1]
        x0, x1, x2, x3 = (
            ((product1 >> 32) & _MASK) ^ x1 ^ k0,
            product1 & _MASK,
            ((product0 >> 32) & _MASK) ^ x3 ^ k1,
            product0 & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return x0, x1, x2, x3


@dataclass(frozen=True, slots=True)
class SamplerRows:
    """The settings of B rows on the device; the flags are known on the host and spare what no row uses."""

    temperature_B: Tensor
    top_k_B: Tensor
    top_p_B: Tensor
    words_B4: Tensor
    any_sampled: bool
    any_filtered: bool

    @classmethod
    def of(cls, rows: Sequence[tuple[SamplingParams, int]], device: torch.device) -> SamplerRows:
        """From (parameters, prompt key) of each row."""
        params = [p for p, _ in rows]
        words = [(p.seed & _MASK, p.seed >> 32, key & _MASK, key >> 32) for p, key in rows]
        return cls(
            temperature_B=torch.tensor([p.temperature for p in params], dtype=torch.float32, device=device),
            top_k_B=torch.tensor([p.top_k for p in params], dtype=torch.int64, device=device),
            top_p_B=torch.tensor([p.top_p for p in params], dtype=torch.float32, device=device),
            words_B4=torch.tensor(words, dtype=torch.int64, device=device).reshape(-1, 4),
            any_sampled=any(p.temperature > 0 for p in params),
            any_filtered=any(p.temperature > 0 and (p.top_k > 0 or p.top_p < 1) for p in params),
        )

    def uniforms(self, first_step_B: Tensor, steps: int, choice: int = 0) -> Tensor:
        """Uniform numbers in [0, 1) of 53 bits for the given steps of every row, float64 [N, B]."""
        step_NB = first_step_B[None] + torch.arange(steps, device=first_step_B.device)[:, None]
        seed_low, seed_high, key_low, key_high = (w.expand_as(step_NB) for w in self.words_B4.unbind(1))
        counter = (step_NB, torch.full_like(step_NB, choice), seed_low, seed_high)
        high, low, _, _ = philox4x32(counter, (key_low, key_high))
        return ((high << 21) | (low >> 11)).double() * 2.0**-53


@dataclass(frozen=True, slots=True)
class Sampled:
    """Chosen tokens [B], their log-probabilities under the unmodified softmax [B], finite or not [B]."""

    tokens_B: Tensor
    logprobs_B: Tensor
    finite_B: Tensor


def sample(logits_BV: Tensor, rows: SamplerRows, uniforms_B: Tensor | None) -> Sampled:
    """Choose a token for each row: the largest logit at temperature 0, else a draw by `uniforms_B`.

    `logits_BV` is float32. A row whose logits hold nan or +inf is marked as not finite.
    """
    lse_B = torch.logsumexp(logits_BV, dim=-1)
    tokens_B = torch.argmax(logits_BV, dim=-1)
    if rows.any_sampled:
        assert uniforms_B is not None
        drawn_B = _draw(logits_BV, rows, uniforms_B)
        tokens_B = torch.where(rows.temperature_B > 0, drawn_B, tokens_B)
    chosen_B = logits_BV.gather(1, tokens_B[:, None])[:, 0]
    return Sampled(tokens_B, chosen_B - lse_B, torch.isfinite(lse_B))


def _draw(logits_BV: Tensor, rows: SamplerRows, uniforms_B: Tensor) -> Tensor:
    """Inverse-transform sampling in float64; whether a row goes through the sort is its own matter."""
    temperature_B1 = torch.where(rows.temperature_B > 0, rows.temperature_B, 1.0)[:, None]
    scaled_BV = torch.nan_to_num(logits_BV / temperature_B1, nan=0.0, posinf=3e38, neginf=-3e38)
    plain_B = _inverse_cdf(torch.softmax(scaled_BV, dim=-1), uniforms_B)
    if not rows.any_filtered:
        return plain_B
    sorted_BV, order_BV = torch.sort(scaled_BV, dim=-1, descending=True, stable=True)
    probs_BV = torch.softmax(_filter_sorted(sorted_BV, rows), dim=-1)
    filtered_B = order_BV.gather(1, _inverse_cdf(probs_BV, uniforms_B)[:, None])[:, 0]
    return torch.where((rows.top_k_B > 0) | (rows.top_p_B < 1), filtered_B, plain_B)


def _filter_sorted(sorted_BV: Tensor, rows: SamplerRows) -> Tensor:
    """Apply top-k, then top-p to what it left, to logits in descending order; the first always stays."""
    rank_V = torch.arange(sorted_BV.shape[1], device=sorted_BV.device)
    top_k_B1, top_p_B1 = rows.top_k_B[:, None], rows.top_p_B[:, None]
    sorted_BV = sorted_BV.masked_fill((top_k_B1 > 0) & (rank_V >= top_k_B1), float("-inf"))
    probs_BV = torch.softmax(sorted_BV, dim=-1)
    before_BV = torch.cumsum(probs_BV.double(), dim=-1) - probs_BV
    outside_BV = (top_p_B1 < 1) & (before_BV >= top_p_B1) & (rank_V > 0)
    return sorted_BV.masked_fill(outside_BV, float("-inf"))


def _inverse_cdf(probs_BV: Tensor, uniforms_B: Tensor) -> Tensor:
    """The first index whose cumulative probability exceeds the uniform number, [B]."""
    cdf_BV = torch.cumsum(probs_BV.double(), dim=-1)
    target_B1 = (uniforms_B * cdf_BV[:, -1])[:, None]
    return torch.searchsorted(cdf_BV, target_B1, right=True)[:, 0].clamp(max=probs_BV.shape[1] - 1)
