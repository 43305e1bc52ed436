"""task=generate: the prompt answered with text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from pipeline.core import Completion, Request, SamplingParams
from pipeline.tasks.sampling import row_params

Decode = Callable[[Sequence[Sequence[int]]], list[str]]


class GenerateTask:
    """One request a row, decoded to text; `sampling_columns` maps parameters to columns with rows' own values."""

    kind = "generate"

    def __init__(
        self, sampling: SamplingParams, decode: Decode, sampling_columns: Mapping[str, str] | None = None
    ) -> None:
        self._sampling = sampling
        self._decode = decode
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
        answers = [c.choices or (c,) for c in completions]
        texts = iter(self._texts([choice for choices in answers for choice in choices]))
        described = [[_describe(choice, next(texts)) for choice in choices] for choices in answers]
        columns = {name: [choices[0][name] for choices in described] for name in described[0][0]} if described else {}
        return {**columns, "choices": [None if c.error else d for c, d in zip(completions, described, strict=True)]}

    def _texts(self, completions: Sequence[Completion]) -> list[str]:
        """The answers' texts, cut where a stop text begins."""
        texts = self._decode([c.token_ids for c in completions])
        return [text[: c.text_end] for text, c in zip(texts, completions, strict=True)]


def _describe(completion: Completion, text: str) -> dict[str, Any]:
    """One answer's values in the columns, or in an item of `choices`."""
    failed = completion.error is not None
    return {
        "completion": None if failed else text,
        "finish_reason": completion.finish_reason.value,
        "completion_tokens": len(completion.token_ids),
        "cumulative_logprob": completion.cumulative_logprob,
        "token_ids": None if failed else list(completion.token_ids),
        "logprobs": None if failed else [_logprob(asdict(step)) for step in completion.logprobs],
    }


def _logprob(step: dict[str, Any]) -> dict[str, Any]:
    return {**step, "top": [{"token_id": token, "logprob": logprob} for token, logprob in step["top"]]}
