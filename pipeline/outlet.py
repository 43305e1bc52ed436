"""From completions to committed Parts, behind the engine, written in a thread of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import cast

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.core import Completion
from pipeline.data.source import Chunk
from pipeline.intake import PreparedChunk
from pipeline.output.sink import Sink
from pipeline.tasks.task import RequestId, Task, common_results

WRITES_AHEAD = 4


@dataclass(frozen=True, slots=True)
class Counts:
    """What a chunk, or many, came to."""

    rows: int = 0
    error_rows: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    target_tokens: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.rows + other.rows,
            self.error_rows + other.error_rows,
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            self.target_tokens + other.target_tokens,
        )


class _OpenChunk:
    """A chunk whose rows are still coming in."""

    def __init__(self, prepared: PreparedChunk) -> None:
        self.prepared = prepared
        self.completions: list[Completion | None] = [None] * prepared.chunk.num_rows
        self.missing = prepared.chunk.num_rows

    def add(self, index: int, completion: Completion) -> None:
        assert self.completions[index] is None, "a row is answered once"
        self.completions[index] = completion
        self.missing -= 1


class Outlet:
    """Takes prepared chunks and completions, in any order; commits a chunk when its last row is there."""

    def __init__(self, sink: Sink, task: Task, schema: pa.Schema, committed: Callable[[Chunk, Counts], None]) -> None:
        """`committed` is told, in the writing thread, of every chunk that is done with."""
        self._sink = sink
        self._task = task
        self._schema = schema
        self._committed = committed
        self._open: dict[str, _OpenChunk] = {}
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="outlet")
        self._writes: list[Future[None]] = []

    def expect(self, prepared: PreparedChunk) -> None:
        """A chunk is on its way; its error rows are already there."""
        self._open[prepared.chunk.id] = _OpenChunk(prepared)
        for completion in prepared.failed:
            self.add(completion)

    def add(self, completion: Completion) -> None:
        """One row's completion; raises what an earlier write raised."""
        chunk_id, index = cast(RequestId, completion.request_id)
        chunk = self._open[chunk_id]
        chunk.add(index, completion)
        if not chunk.missing:
            del self._open[chunk_id]
            self._writes.append(self._writer.submit(self._write, chunk))
            self._settle(WRITES_AHEAD)

    def close(self) -> None:
        """Wait for the writes under way; raises what they raised. Chunks with rows missing are given up."""
        try:
            self._settle(0)
        finally:
            self._writer.shutdown(wait=True)

    def _settle(self, most: int) -> None:
        """Hear of finished writes, waiting until at most so many are under way."""
        while self._writes and (len(self._writes) > most or self._writes[0].done()):
            self._writes.pop(0).result()

    def _write(self, chunk: _OpenChunk) -> None:
        completions = [c for c in chunk.completions if c is not None]
        prepared = chunk.prepared
        table = self._table(prepared, completions)
        counts = Counts(
            rows=len(completions),
            error_rows=sum(c.error is not None for c in completions),
            prompt_tokens=sum(c.prompt_tokens for c in completions),
            completion_tokens=_completion_tokens(table, completions),
            target_tokens=sum(c.target_tokens for c in completions),
        )
        self._sink.commit(prepared.chunk, table, asdict(counts))
        self._committed(prepared.chunk, counts)

    def _table(self, prepared: PreparedChunk, completions: list[Completion]) -> pa.Table:
        values = common_results(prepared.chunk, completions) | self._task.results(completions, prepared.rows)
        arrays = [
            pa.chunked_array([pa.array(values[f.name], type=f.type)]) if f.name in values else prepared.table[f.name]
            for f in self._schema
        ]
        return pa.table(arrays, schema=self._schema)


def _completion_tokens(table: pa.Table, completions: Sequence[Completion]) -> int:
    """Tokens of all answers: those in the column, and those of a row's further answers."""
    first: int = pc.sum(table["completion_tokens"]).as_py() or 0
    return first + sum(len(choice.token_ids) for c in completions for choice in c.choices[1:])
