"""The frozen values that cross rooms: what is asked of the engine and what it answers."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from enum import StrEnum


class FinishReason(StrEnum):
    """Why a completion ended; the values of the `finish_reason` column."""

    STOP = "stop"
    LENGTH = "length"
    ERROR = "error"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How one request's tokens are chosen; temperature 0 is greedy, top_k 0 and top_p 1 are off."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Refuse values outside their range; the message names the key of the `sampling` group."""
        for key, valid, allowed in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < float("inf"), "0 (greedy) or more"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1 (off)"),
            ("seed", 0 <= self.seed < 2**64, "between 0 and 2**64 - 1"),
        ):
            if not valid:
                raise ValueError(f"sampling.{key} must be {allowed}, got {getattr(self, key)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One row made ready for the engine.

    With `candidates` the request is scored, not decoded: the answer is the log-probability of each
    candidate continuation given the prompt. Otherwise tokens are generated under `sampling`.
    """

    id: Hashable
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams = SamplingParams()
    candidates: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One request answered.

    `cumulative_logprob` sums the natural-log probabilities of the generated tokens under the
    model's unmodified softmax; `candidate_logprobs` holds the same sum for each candidate.
    `error` is set exactly when `finish_reason` is ERROR.
    """

    request_id: Hashable
    prompt_tokens: int
    finish_reason: FinishReason
    token_ids: tuple[int, ...] = ()
    cumulative_logprob: float | None = None
    candidate_logprobs: tuple[float, ...] = ()
    error: str | None = None
