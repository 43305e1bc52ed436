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


MOST_LOGPROBS = 20
"""The most alternatives that are reported for a token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How one request's tokens are chosen.

    Temperature 0 is greedy; top_k 0, top_p 1, min_p 0 and repetition_penalty 1 are off. They act in
    transformers' order: repetition penalty, temperature, top-k, top-p, min-p. `stop` are texts that end
    an answer and are not part of it. `n` answers are drawn for the one prompt. `logprobs` None reports
    none, 0 the chosen tokens', k also the k likeliest alternatives' at every step.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    n: int = 1
    logprobs: int | None = None

    def __post_init__(self) -> None:
        """Refuse values outside their range; the message names the key of the `sampling` group."""
        infinite = float("inf")
        for key, valid, allowed in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < infinite, "0 (greedy) or more"),
            ("top_k", self.top_k >= 0, "0 (off) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1 (off)"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 (off) and 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < infinite, "above 0; 1 is off"),
            ("seed", 0 <= self.seed < 2**64, "between 0 and 2**64 - 1"),
            ("stop_token_ids", min(self.stop_token_ids, default=0) >= 0, "0 or more"),
            ("stop", all(self.stop), "texts of at least one character"),
            ("n", self.n >= 1, "at least 1"),
            (
                "logprobs",
                self.logprobs is None or 0 <= self.logprobs <= MOST_LOGPROBS,
                f"false, true or a count from 0 to {MOST_LOGPROBS}",
            ),
        ):
            if not valid:
                raise ValueError(f"sampling.{key} must be {allowed}, got {getattr(self, key)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """One step's log-probabilities under the unmodified softmax: of the chosen token, and of the likeliest."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One row made ready for the engine.

    With `candidates` the request is scored, not decoded: the answer is the log-probability of each
    candidate continuation given the prompt. With `target_ids` it is that of the one continuation, token
    by token, and with `score_prompt` that of the prompt's own tokens from the second on, alone or beside
    a target's. Otherwise tokens are generated under `sampling`.
    """

    id: Hashable
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams = SamplingParams()
    candidates: tuple[tuple[int, ...], ...] = ()
    target_ids: tuple[int, ...] = ()
    score_prompt: bool = False

    def __post_init__(self) -> None:
        assert not (self.candidates and self.scores_text), "candidates are scored by themselves"

    @property
    def scores_text(self) -> bool:
        """Whether the tokens of one given text are scored."""
        return bool(self.target_ids) or self.score_prompt

    @property
    def answer_tokens(self) -> int:
        """The room it needs behind the prompt, at most."""
        if self.candidates:
            return max(map(len, self.candidates))
        return len(self.target_ids) if self.scores_text else self.sampling.max_new_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One request answered.

    `token_ids` leaves out a stop token. `text_end` is the number of characters of the decoded text that
    belong to the answer where a stop text was found in it, else None. `cumulative_logprob` sums the
    natural-log probabilities of the tokens, the stop token's included, under the model's unmodified
    softmax; `logprobs` has them one by one if asked for. `candidate_logprobs` holds the same sum for
    each candidate. Of a scored text `cumulative_logprob` is the target's sum, `prompt_logprob` the
    prompt's from its second token on, and `logprobs` has the target's tokens, the prompt's without one.
    With several answers `choices` has them all and the other fields are the first's.
    `error` is set exactly when `finish_reason` is ERROR.
    """

    request_id: Hashable
    prompt_tokens: int
    finish_reason: FinishReason
    token_ids: tuple[int, ...] = ()
    text_end: int | None = None
    cumulative_logprob: float | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    candidate_logprobs: tuple[float, ...] = ()
    target_tokens: int = 0
    prompt_logprob: float | None = None
    choices: tuple[Completion, ...] = ()
    error: str | None = None
