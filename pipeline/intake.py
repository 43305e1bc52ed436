"""From chunks to requests, ahead of the engine: claims, reads, renders and tokenizes in a thread of its own."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from pipeline.claimed import ClaimedChunk
from pipeline.core import Completion, FinishReason, Request
from pipeline.data.source import Chunk, Rows, Source, SourceFile
from pipeline.prompts import Prompt, PromptBuilder
from pipeline.tasks.task import RequestId, Task

if TYPE_CHECKING:
    import pyarrow as pa

CHUNKS_AHEAD = 2
ROWS_AT_ONCE = 1024
"""Rows that are Python values at the same time, while the rest of the chunk is Arrow's."""
UNREADABLE = (ValueError, OverflowError, NotImplementedError)
"""What pyarrow raises on text that is no UTF-8, dates beyond the year 9999, unknown time zones, rare types."""


@dataclass(frozen=True, slots=True)
class PreparedChunk:
    """A claimed chunk: its table, the rows of the columns that the task reads, and of each row that has to be done
    and is not yet, a request or an error."""

    claimed: ClaimedChunk
    table: pa.Table
    rows: Sequence[Mapping[str, Any]]
    requests: Sequence[Request]
    failed: Sequence[Completion]


class Preparation:
    """Turns a chunk's rows into requests."""

    def __init__(
        self, prompts: PromptBuilder, task: Task, unfit: Callable[[Request], str | None], max_len: int
    ) -> None:
        """`unfit` says why the engine cannot take a request, or None; `max_len` is its longest row in tokens."""
        self._max_len = max_len
        self._prompts = prompts
        self._task = task
        self._unfit = unfit
        self._columns = list(dict.fromkeys([*prompts.columns, *task.columns]))

    def prepare(self, claimed: ClaimedChunk, data: Rows) -> PreparedChunk:
        """Requests of the good rows, error completions of the others; nothing for rows that need not be done."""
        prepared: list[Request | Completion] = []
        task_rows: list[Mapping[str, Any]] = []
        chunk, left = claimed.chunk, claimed.left
        columns, chunk_id = data.table.select(self._columns), chunk.id
        for first in range(0, chunk.num_rows, ROWS_AT_ONCE):
            # a table without columns does not know its own end
            read = enumerate(read_rows(columns.slice(first, min(ROWS_AT_ONCE, chunk.num_rows - first))), first)
            rows = {(chunk_id, index): data.errors.get(index, row) for index, row in read}
            prepared += self._prepare({row_id: row for row_id, row in rows.items() if row_id[1] in left})
            task_rows += [{} if isinstance(row, str) else self._of_task(row) for row in rows.values()]
        requests = [item for item in prepared if isinstance(item, Request)]
        failed = [item for item in prepared if isinstance(item, Completion)]
        return PreparedChunk(claimed, data.table, task_rows, requests, failed)

    def _prepare(self, rows: Mapping[RequestId, Mapping[str, Any] | str]) -> list[Request | Completion]:
        """Some rows' requests, and first the errors of those that are none."""
        failed = [_error(request_id, 0, row) for request_id, row in rows.items() if isinstance(row, str)]
        readable = {request_id: row for request_id, row in rows.items() if not isinstance(row, str)}
        asked = self._task.requests(list(readable), list(readable.values()))
        prompts = self._prompts.build(list(readable.values()), [self._room(a) for a in asked], self._max_len)
        return [*failed, *map(self._prepared, readable, asked, prompts)]

    def _of_task(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        return {name: row[name] for name in self._task.columns}

    def _room(self, asked: Request | str) -> int | None:
        """The room that the answer leaves to the prompt; None if it leaves none, which is no matter of the prompt's."""
        room = self._max_len - (asked.answer_tokens if isinstance(asked, Request) else 1)
        return room if room >= 1 else None

    def _prepared(self, request_id: RequestId, asked: Request | str, prompt: Prompt) -> Request | Completion:
        if prompt.error is not None:
            return _error(request_id, 0, prompt.error)
        tokens = len(prompt.token_ids)
        if isinstance(asked, str):
            return _error(request_id, tokens, asked)
        request = replace(asked, prompt_ids=prompt.token_ids)
        reason = self._unfit(request)
        return request if reason is None else _error(request_id, tokens, reason)


def read_rows(table: pa.Table) -> list[dict[str, Any] | str]:
    """The rows as Python values; for a row with a value that Python cannot hold, the reason instead."""
    try:
        rows: list[dict[str, Any] | str] = table.to_pylist()
        return rows or [{} for _ in range(table.num_rows)]
    except UNREADABLE:
        return [_read_row(table.slice(index, 1)) for index in range(table.num_rows)]


def _read_row(row: pa.Table) -> dict[str, Any] | str:
    try:
        values: dict[str, Any] = row.to_pylist()[0]
        return values
    except UnicodeDecodeError as error:
        return f"a column of the row is not valid UTF-8 ({error.reason})"
    except UNREADABLE as error:
        return f"a column of the row has a value that cannot be read ({error})"


def _error(request_id: tuple[str, int], prompt_tokens: int, reason: str) -> Completion:
    return Completion(
        request_id=request_id, prompt_tokens=prompt_tokens, finish_reason=FinishReason.ERROR, error=reason
    )


class Intake:
    """Prepared chunks, a few ahead of whoever takes them; a context manager around its thread."""

    def __init__(
        self,
        source: Source,
        files: Sequence[SourceFile],
        chunks: Sequence[Chunk],
        claim: Callable[[Chunk], ClaimedChunk | None],
        preparation: Preparation,
    ) -> None:
        """`claim` takes a chunk for this process; None where it is not to be had."""
        self._source = source
        self._files = {file.ordinal: file for file in files}
        self._chunks = chunks
        self._claim = claim
        self._preparation = preparation
        self._queue: queue.Queue[PreparedChunk | Exception | None] = queue.Queue(maxsize=CHUNKS_AHEAD)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="intake", daemon=True)
        self.exhausted = False

    def __enter__(self) -> Intake:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._closing.set()
        self._thread.join()

    def take(self, wait_s: float) -> PreparedChunk | None:
        """The next prepared chunk; None if there is none within `wait_s` seconds, or no more (`exhausted`)."""
        if self.exhausted:
            return None
        try:
            item = self._queue.get(timeout=wait_s) if wait_s > 0 else self._queue.get_nowait()
        except queue.Empty:
            return None
        if isinstance(item, Exception):
            raise item
        self.exhausted = item is None
        return item

    def _work(self) -> None:
        """Whatever goes wrong here is raised where the chunks are taken."""
        try:
            for prepared in self._prepared():
                if not self._put(prepared):
                    return
            self._put(None)
        except Exception as error:  # noqa: BLE001  # carried to the main thread, not swallowed
            self._put(error)

    def _prepared(self) -> Iterator[PreparedChunk]:
        for ordinal, chunks in _by_file(self._chunks):
            claimed: deque[ClaimedChunk] = deque()
            for rows in self._source.read(self._files[ordinal], self._claims(chunks, claimed)):
                yield self._preparation.prepare(claimed.popleft(), rows)

    def _claims(self, chunks: Sequence[Chunk], claimed: deque[ClaimedChunk]) -> Iterator[Chunk]:
        """Chunks as they can be claimed, each only when the reader is ready for it."""
        for chunk in chunks:
            if self._closing.is_set():
                return
            taken = self._claim(chunk)
            if taken is not None:
                claimed.append(taken)
                yield chunk

    def _put(self, item: PreparedChunk | Exception | None) -> bool:
        while not self._closing.is_set():
            try:
                self._queue.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False


def _by_file(chunks: Sequence[Chunk]) -> list[tuple[int, list[Chunk]]]:
    """Runs of chunks of the same file, in order."""
    runs: list[tuple[int, list[Chunk]]] = []
    for chunk in chunks:
        if not runs or runs[-1][0] != chunk.file_ordinal:
            runs.append((chunk.file_ordinal, []))
        runs[-1][1].append(chunk)
    return runs
