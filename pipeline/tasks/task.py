"""What a task does: a row's prompt to the engine's request, and completions to columns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from pipeline.core import Completion, Request
from pipeline.data.source import Chunk

RequestId = tuple[str, int]
"""Chunk id and the row's index in the chunk."""
Row = Mapping[str, Any]


class Task(Protocol):
    """`columns` are the input columns it reads besides the prompt's."""

    kind: str
    columns: tuple[str, ...]

    def requests(self, ids: Sequence[RequestId], rows: Sequence[Row]) -> list[Request | str]:
        """Each row's request, still without its prompt, or the reason why the row cannot be asked."""
        ...

    def results(self, completions: Sequence[Completion], rows: Sequence[Row]) -> dict[str, list[Any]]:
        """The task's output columns for completed rows, error rows included, in the same order."""
        ...


def common_results(chunk: Chunk, indices: Sequence[int], completions: Sequence[Completion]) -> dict[str, list[Any]]:
    """The output columns that do not depend on the task, for the rows of these indices in the chunk."""
    return {
        "row_id": [chunk.row_id(index) for index in indices],
        "finish_reason": [c.finish_reason.value for c in completions],
        "error": [c.error for c in completions],
        "prompt_tokens": [c.prompt_tokens for c in completions],
    }


def row_by_row(
    make: Callable[[RequestId, Row], Request], ids: Sequence[RequestId], rows: Sequence[Row]
) -> list[Request | str]:
    """What `make` gives for each row, or why it raised ValueError."""
    made: list[Request | str] = []
    for request_id, row in zip(ids, rows, strict=True):
        try:
            made.append(make(request_id, row))
        except ValueError as error:
            made.append(str(error))
    return made
