"""task=generate: the prompt answered with text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pipeline.core import Completion, Request, SamplingParams
from pipeline.tasks.sampling import row_params

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
        self.answer_tokens = sampling.max_new_tokens
        self._sampling_columns = sampling_columns or {}
        self.columns: tuple[str, ...] = tuple(self._sampling_columns.values())

    def request(self, request_id: tuple[str, int], prompt_ids: tuple[int, ...], row: Mapping[str, Any]) -> Request:
        """The row's request, under the run's sampling parameters or its own; ValueError if those are unusable."""
        sampling = self._sampling
        if self._sampling_columns:
            sampling = row_params(sampling, self._sampling_columns, row)
        return Request(id=request_id, prompt_ids=prompt_ids, sampling=sampling)

    def results(self, completions: Sequence[Completion], rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
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


def _logprobs(answer: Completion) -> list[dict[str, Any]] | None:
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
    "logprobs": lambda answer, text: _logprobs(answer),
}
