"""What a task does: a row's prompt to the engine's request, and completions to columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from pipeline.core import Completion, Request
from pipeline.data.source import Chunk
from pipeline.tasks.generate import GenerateTask
from pipeline.tasks.label import LabelTask

RequestId = tuple[str, int]
"""Chunk id and the row's index in the chunk."""


class Task(Protocol):
    """`columns` are the input columns it reads besides the prompt's, `answer_tokens` the room an answer needs."""

    kind: str
    columns: tuple[str, ...]
    answer_tokens: int

    def request(self, request_id: RequestId, prompt_ids: tuple[int, ...], row: Mapping[str, Any]) -> Request:
        """The row's request; raises ValueError with the reason if the row cannot be asked."""
        ...

    def results(self, completions: Sequence[Completion], rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
        """The task's output columns for completed rows, error rows included, in the same order."""
        ...


def common_results(chunk: Chunk, completions: Sequence[Completion]) -> dict[str, list[Any]]:
    """The output columns that do not depend on the task."""
    return {
        "row_id": [chunk.row_id(index) for index in range(len(completions))],
        "finish_reason": [c.finish_reason.value for c in completions],
        "error": [c.error for c in completions],
        "prompt_tokens": [c.prompt_tokens for c in completions],
    }


__all__ = ["GenerateTask", "LabelTask", "RequestId", "Task", "common_results"]
