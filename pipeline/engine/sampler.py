"""Logits to token ids on the device, without host synchronization.

Random numbers come from Philox4x32-10, a counter-based generator (Salmon et al., "Parallel random
numbers: as easy as 1, 2, 3", SC 2011), keyed by a hash of the prompt's token ids and counted by
(step, choice, seed): a row's draws depend on nothing else. Shapes: B rows, V vocab, N steps.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.core import MOST_LOGPROBS, SamplingParams

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
SORTED_AT_ONCE = 1 << 24
"""Logits that are sorted together: a sort, its order and its float64 sums take 36 bytes for each of them."""


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
class SamplerRow:
    """One row's settings, its prompt's key and which of the prompt's answers it is."""

    params: SamplingParams
    key: int
    choice: int = 0


@dataclass(frozen=True, slots=True)
class SamplerRows:
    """The settings of B rows on the device; the flags are known on the host and spare what no row uses."""

    temperature_B: Tensor
    top_k_B: Tensor
    top_p_B: Tensor
    min_p_B: Tensor
    penalty_B: Tensor
    words_B5: Tensor
    any_sampled: bool
    any_filtered: bool
    any_penalty: bool
    top_logprobs: int

    @classmethod
    def of(cls, rows: Sequence[SamplerRow], device: torch.device) -> SamplerRows:
        """From the settings of each row."""
        params = [row.params for row in rows]
        words = [
            (row.params.seed & _MASK, row.params.seed >> 32, row.key & _MASK, row.key >> 32, row.choice) for row in rows
        ]
        drawn = [p for p in params if p.temperature > 0]

        def floats(values: Iterable[float]) -> Tensor:
            return torch.tensor(list(values), dtype=torch.float32, device=device)

        return cls(
            temperature_B=floats(p.temperature for p in params),
            top_k_B=torch.tensor([p.top_k for p in params], dtype=torch.int64, device=device),
            top_p_B=floats(p.top_p for p in params),
            min_p_B=floats(p.min_p for p in params),
            penalty_B=floats(p.repetition_penalty for p in params),
            words_B5=torch.tensor(words, dtype=torch.int64, device=device).reshape(-1, 5),
            any_sampled=bool(drawn),
            any_filtered=any(p.top_k > 0 or p.top_p < 1 or p.min_p > 0 for p in drawn),
            any_penalty=any(p.repetition_penalty != 1 for p in params),
            top_logprobs=max((p.logprobs or 0 for p in params), default=0),
        )

    def uniforms(self, first_step_B: Tensor, steps: int) -> Tensor:
        """Uniform numbers in [0, 1) of 53 bits for the given steps of every row, float64 [N, B]."""
        step_NB = first_step_B[None] + torch.arange(steps, device=first_step_B.device)[:, None]
        seed_low, seed_high, key_low, key_high, choice = (w.expand_as(step_NB) for w in self.words_B5.unbind(1))
        high, low, _, _ = philox4x32((step_NB, choice, seed_low, seed_high), (key_low, key_high))
        return ((high << 21) | (low >> 11)).double() * 2.0**-53


@dataclass(frozen=True, slots=True)
class Sampled:
    """One step of B rows: tokens, their log-probabilities under the unmodified softmax, finite or not [B].

    `top_tokens_BK` and `top_logprobs_BK` are the likeliest tokens if any row asked for them.
    """

    tokens_B: Tensor
    logprobs_B: Tensor
    finite_B: Tensor
    top_tokens_BK: Tensor | None = None
    top_logprobs_BK: Tensor | None = None


def sample(logits_BV: Tensor, rows: SamplerRows, uniforms_B: Tensor | None, seen_BV: Tensor | None = None) -> Sampled:
    """Choose a token for each row: the largest logit at temperature 0, else a draw by `uniforms_B`.

    `logits_BV` is float32; `seen_BV` marks the tokens of prompt and answer so far and is needed where a
    row has a repetition penalty. A row whose logits hold nan or +inf is marked as not finite.
    """
    lse_B = torch.logsumexp(logits_BV, dim=-1)
    adjusted_BV = logits_BV
    if rows.any_penalty:
        assert seen_BV is not None
        adjusted_BV = _penalized(logits_BV, rows.penalty_B[:, None], seen_BV)
    tokens_B = torch.argmax(adjusted_BV, dim=-1)
    if rows.any_sampled:
        assert uniforms_B is not None
        drawn_B = _draw(adjusted_BV, rows, uniforms_B)
        tokens_B = torch.where(rows.temperature_B > 0, drawn_B, tokens_B)
    chosen_B = logits_BV.gather(1, tokens_B[:, None])[:, 0]
    top_tokens_BK = top_logprobs_BK = None
    if rows.top_logprobs:
        # always as many: which of equals comes first must not depend on what the neighbours ask for
        top_BK, top_tokens_BK = torch.topk(logits_BV, min(MOST_LOGPROBS, logits_BV.shape[1]), dim=-1)
        top_tokens_BK = top_tokens_BK[:, : rows.top_logprobs]
        top_logprobs_BK = top_BK[:, : rows.top_logprobs] - lse_B[:, None]
    return Sampled(tokens_B, chosen_B - lse_B, torch.isfinite(lse_B), top_tokens_BK, top_logprobs_BK)


def _penalized(logits_BV: Tensor, penalty_B1: Tensor, seen_BV: Tensor) -> Tensor:
    """Keskar et al., "CTRL", 2019: a seen token's logit is divided by the penalty, a negative one multiplied."""
    lowered_BV = torch.where(logits_BV < 0, logits_BV * penalty_B1, logits_BV / penalty_B1)
    return torch.where(seen_BV, lowered_BV, logits_BV)


def _draw(logits_BV: Tensor, rows: SamplerRows, uniforms_B: Tensor) -> Tensor:
    """Inverse-transform sampling in float64; whether a row goes through the sort is its own matter."""
    temperature_B1 = torch.where(rows.temperature_B > 0, rows.temperature_B, 1.0)[:, None]
    scaled_BV = torch.nan_to_num(logits_BV / temperature_B1, nan=0.0, posinf=3e38, neginf=-3e38)
    plain_B = _inverse_cdf(torch.softmax(scaled_BV, dim=-1), uniforms_B)
    if not rows.any_filtered:
        return plain_B
    top_k_B, top_p_B, min_p_B = rows.top_k_B, rows.top_p_B, rows.min_p_B
    at_once = _rows_at_once(*scaled_BV.shape)
    parts = zip(*(torch.split(x, at_once) for x in (scaled_BV, uniforms_B, top_k_B, top_p_B, min_p_B)), strict=True)
    filtered_B = torch.cat([_draw_filtered(*part) for part in parts])
    return torch.where((top_k_B > 0) | (top_p_B < 1) | (min_p_B > 0), filtered_B, plain_B)


def _rows_at_once(rows: int, vocab: int) -> int:
    """How many of the rows are sorted together: equal parts, since a part's size can decide on the bits of sums."""
    parts = -(-rows * vocab // SORTED_AT_ONCE)
    while parts < rows and rows % parts:
        parts += 1
    return max(1, rows // max(1, parts))


def _draw_filtered(scaled_BV: Tensor, uniforms_B: Tensor, top_k_B: Tensor, top_p_B: Tensor, min_p_B: Tensor) -> Tensor:
    """A draw from what the filters leave of each row's tokens."""
    sorted_BV, order_BV = torch.sort(scaled_BV, dim=-1, descending=True, stable=True)
    left_BV = _filter_sorted(sorted_BV, top_k_B[:, None], top_p_B[:, None], min_p_B[:, None])
    drawn_B = _inverse_cdf(torch.softmax(left_BV, dim=-1), uniforms_B)
    return order_BV.gather(1, drawn_B[:, None])[:, 0]


def _filter_sorted(sorted_BV: Tensor, top_k_B1: Tensor, top_p_B1: Tensor, min_p_B1: Tensor) -> Tensor:
    """Apply top-k, top-p to what it left, and min-p to logits in descending order; the first always stays."""
    rank_V = torch.arange(sorted_BV.shape[1], device=sorted_BV.device)
    top_k_BV = sorted_BV.masked_fill((top_k_B1 > 0) & (rank_V >= top_k_B1), float("-inf"))
    probs_BV = torch.softmax(top_k_BV, dim=-1)
    before_BV = torch.cumsum(probs_BV.double(), dim=-1) - probs_BV
    outside_BV = (top_p_B1 < 1) & (before_BV >= top_p_B1)
    unlikely_BV = probs_BV < min_p_B1 * probs_BV[:, :1]
    return top_k_BV.masked_fill((outside_BV | unlikely_BV) & (rank_V > 0), float("-inf"))


def _inverse_cdf(probs_BV: Tensor, uniforms_B: Tensor) -> Tensor:
    """The first index whose cumulative probability exceeds the uniform number, [B]."""
    cdf_BV = torch.cumsum(probs_BV.double(), dim=-1)
    target_B1 = (uniforms_B * cdf_BV[:, -1])[:, None]
    return torch.searchsorted(cdf_BV, target_B1, right=True)[:, 0].clamp(max=probs_BV.shape[1] - 1)
