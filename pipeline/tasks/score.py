"""task=score: how likely the model finds a given text, the target behind the prompt or the prompt itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pipeline.core import Completion, Request, SamplingParams
from pipeline.tasks.generate import token_logprobs
from pipeline.tasks.sampling import row_params
from pipeline.tasks.task import RequestId, Row, row_by_row

EncodeAll = Callable[[Sequence[str]], list[tuple[int, ...]]]
SCORE_PARAMETERS = ("logprobs",)
"""The sampling parameters that mean anything where nothing is generated."""


class ScoreTask:
    """One scored request a row; the target is the row's text in a column, or without one the prompt."""

    kind = "score"

    def __init__(
        self,
        target: str | None,
        encode: EncodeAll,
        *,
        logprobs: int | None = None,
        sampling_columns: Mapping[str, str] | None = None,
        on_request: Sequence[str] = (),
    ) -> None:
        """`encode` gives the tokens of texts behind the prompt; `on_request` are the columns asked for."""
        self._target = target
        self._encode = encode
        self._sampling = SamplingParams(logprobs=logprobs)
        self._sampling_columns = {k: v for k, v in (sampling_columns or {}).items() if k in SCORE_PARAMETERS}
        self._on_request = on_request
        self._score_prompt = target is None or "prompt_logprob" in on_request
        self.columns: tuple[str, ...] = (*(() if target is None else (target,)), *self._sampling_columns.values())

    def requests(self, ids: Sequence[RequestId], rows: Sequence[Row]) -> list[Request | str]:
        """The rows' requests; the reason where the target is null, no text or without tokens."""
        targets = iter(self._target_ids(rows))

        def make(request_id: RequestId, row: Row) -> Request:
            target = next(targets)
            if isinstance(target, str):
                raise ValueError(target)
            return Request(
                id=request_id,
                prompt_ids=(),
                sampling=row_params(self._sampling, self._sampling_columns, row),
                target_ids=target,
                score_prompt=self._score_prompt,
            )

        return row_by_row(make, ids, rows)

    def results(self, completions: Sequence[Completion], rows: Sequence[Row]) -> dict[str, list[Any]]:
        """Nothing is generated: no completion and no tokens of one. All else is null in error rows."""
        sums = [self._sum(c) for c in completions]
        columns: dict[str, list[Any]] = {
            "completion": [None] * len(completions),
            "completion_tokens": [0] * len(completions),
            "cumulative_logprob": sums,
            "target_logprob": sums,
            "target_tokens": [self._tokens(c) for c in completions],
        }
        asked = {name: [_ON_REQUEST[name](c) for c in completions] for name in self._on_request}
        return columns | asked

    def _sum(self, completion: Completion) -> float | None:
        return completion.prompt_logprob if self._target is None else completion.cumulative_logprob

    def _tokens(self, completion: Completion) -> int:
        if completion.error is not None:
            return 0
        return completion.prompt_tokens - 1 if self._target is None else completion.target_tokens

    def _target_ids(self, rows: Sequence[Row]) -> list[tuple[int, ...] | str]:
        """The tokens of each row's target, or why it has none; tokenized together."""
        if self._target is None:
            return [() for _ in rows]
        read = [_text(self._target, row[self._target]) for row in rows]
        encoded = iter(self._encode([text for text, reason in read if reason is None]))
        return [
            (next(encoded) or f"column {self._target} holds {text!r}, which has no tokens to score")
            if reason is None
            else reason
            for text, reason in read
        ]


def _text(column: str, value: Any) -> tuple[str, str | None]:
    """A cell's text, and the reason why it cannot be scored, if there is one."""
    if not isinstance(value, str):
        what = "null" if value is None else f"{type(value).__name__}, not text"
        return "", f"column {column} is {what}; there is nothing to score"
    if not value:
        return "", f"column {column} is an empty text; there is nothing to score"
    try:
        value.encode()  # half a surrogate pair would break the tokenizer's whole batch
    except UnicodeEncodeError as error:
        return "", f"column {column} holds no valid text: {error}"
    return value, None


_ON_REQUEST: Mapping[str, Callable[[Completion], Any]] = {
    "token_ids": lambda c: None if c.error is not None else [step.token_id for step in c.logprobs],
    "logprobs": token_logprobs,
    "prompt_logprob": lambda c: c.prompt_logprob,
}
