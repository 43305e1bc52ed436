"""task=generate: the prompt answered with text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pipeline.core import Completion, Request, SamplingParams
from pipeline.tasks.sampling import row_params
from pipeline.tasks.task import RequestId, Row, row_by_row

Decode = Callable[[Sequence[Sequence[int]]], list[str]]


class GenerateTask:
    """One request a row, decoded to text; `sampling_columns` maps parameters to columns with rows' own values."""

    kind = "generate"

    def __init__(
        self,
        sampling: SamplingParams,
        decode: Decode,
        sampling_columns: Mapping[str, str] | None = None,
        on_request: Sequence[str] = (),
    ) -> None:
        """`on_request` are the output columns that are there only if asked for."""
        self._on_request = on_request
        self._sampling = sampling
        self._decode = decode
        self._sampling_columns = sampling_columns or {}
        self.columns: tuple[str, ...] = tuple(self._sampling_columns.values())

    def requests(self, ids: Sequence[RequestId], rows: Sequence[Row]) -> list[Request | str]:
        """The rows' requests, under the run's sampling parameters or their own; the reason where those are unusable."""
        return row_by_row(self._request, ids, rows)

    def _request(self, request_id: RequestId, row: Row) -> Request:
        sampling = self._sampling
        if self._sampling_columns:
            sampling = row_params(sampling, self._sampling_columns, row)
        return Request(id=request_id, prompt_ids=(), sampling=sampling)

    def results(self, completions: Sequence[Completion], rows: Sequence[Row]) -> dict[str, list[Any]]:
        """Text, number of tokens (the stop token not counted) and log-probabilities; null in error rows."""
        texts = self._texts([choice for c in completions for choice in c.choices or (c,)])
        columns = {name: [_VALUES[name](c, texts[id(_first(c))]) for c in completions] for name in self._columns()}
        if "choices" in self._on_request:
            columns["choices"] = [_choices(c, texts) for c in completions]
        return columns

    def _columns(self) -> list[str]:
        return [*_ALWAYS, *(name for name in ("token_ids", "logprobs") if name in self._on_request)]

    def _texts(self, answers: Sequence[Completion]) -> dict[int, str | None]:
        """The answers' texts by the answers' ids, cut where a stop text begins; None where there is no answer."""
        texts = self._decode([a.token_ids for a in answers])
        return {
            id(answer): None if answer.error is not None else text[: answer.text_end]
            for answer, text in zip(answers, texts, strict=True)
        }


def _first(completion: Completion) -> Completion:
    return completion.choices[0] if completion.choices else completion


def _choices(completion: Completion, texts: Mapping[int, str | None]) -> list[dict[str, Any]] | None:
    """All answers of a row, with whatever a row's own columns have; null in error rows."""
    if completion.error is not None:
        return None
    return [
        {"finish_reason": answer.finish_reason.value}
        | {name: value(answer, texts[id(answer)]) for name, value in _VALUES.items()}
        for answer in completion.choices or (completion,)
    ]


def token_logprobs(answer: Completion) -> list[dict[str, Any]] | None:
    """The column `logprobs`: the steps with their alternatives, null in error rows."""
    if answer.error is not None:
        return None
    return [
        {
            "token_id": step.token_id,
            "logprob": step.logprob,
            "top": [{"token_id": token, "logprob": logprob} for token, logprob in step.top],
        }
        for step in answer.logprobs
    ]


_ALWAYS = ("completion", "completion_tokens", "cumulative_logprob")
_VALUES: Mapping[str, Callable[[Completion, str | None], Any]] = {
    "completion": lambda answer, text: text,
    "completion_tokens": lambda answer, text: len(answer.token_ids),
    "cumulative_logprob": lambda answer, text: answer.cumulative_logprob,
    "token_ids": lambda answer, text: None if answer.error is not None else list(answer.token_ids),
    "logprobs": lambda answer, text: token_logprobs(answer),
}
