"""task=generate: the prompt answered with text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pipeline.core import Completion, Request, SamplingParams

Decode = Callable[[Sequence[Sequence[int]]], list[str]]


class GenerateTask:
    """One request a row, decoded to text."""

    kind = "generate"
    columns: tuple[str, ...] = ()

    def __init__(self, sampling: SamplingParams, decode: Decode) -> None:
        self._sampling = sampling
        self._decode = decode

    def request(self, request_id: tuple[str, int], prompt_ids: tuple[int, ...], row: Mapping[str, Any]) -> Request:
        """The row's request, under the run's sampling parameters."""
        return Request(id=request_id, prompt_ids=prompt_ids, sampling=self._sampling)

    def results(self, completions: Sequence[Completion], rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
        """Text, number of tokens (the stop token not counted) and summed log-probability; null in error rows."""
        texts = self._decode([c.token_ids for c in completions])
        failed = [c.error is not None for c in completions]
        return {
            "completion": [None if bad else text for bad, text in zip(failed, texts, strict=True)],
            "completion_tokens": [len(c.token_ids) for c in completions],
            "cumulative_logprob": [c.cumulative_logprob for c in completions],
        }
