"""From completions to committed Parts, behind the engine, written in a thread of its own; until then in the journal."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from typing import cast

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.claimed import ClaimedChunk
from pipeline.core import Completion
from pipeline.intake import PreparedChunk
from pipeline.output.part import rows_of
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
        return Counts(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __sub__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(self)))

    @property
    def tokens(self) -> int:
        """All of them."""
        return self.prompt_tokens + self.completion_tokens + self.target_tokens


Ended = Callable[[ClaimedChunk, Counts, Counts], None]


@dataclass(slots=True)
class _OpenChunk:
    """A chunk whose rows are still coming in; `fresh` are those, since a time, that only this process knows of."""

    prepared: PreparedChunk
    completions: dict[int, Completion] = field(default_factory=dict)
    fresh: dict[int, Completion] = field(default_factory=dict)
    fresh_since: float = 0.0

    @property
    def claimed(self) -> ClaimedChunk:
        return self.prepared.claimed

    @property
    def is_complete(self) -> bool:
        return len(self.completions) == len(self.claimed.wanted)

    def add(self, index: int, completion: Completion) -> None:
        assert index not in self.completions, "a row is answered once"
        self.completions[index] = completion

    def add_fresh(self, index: int, completion: Completion) -> bool:
        """The same for one that has to be written down; whether it is the first since the last time."""
        self.add(index, completion)
        first = not self.fresh
        if first:
            self.fresh_since = time.monotonic()
        self.fresh[index] = completion
        return first

    def take_fresh(self) -> dict[int, Completion]:
        taken, self.fresh = self.fresh, {}
        return taken


class Outlet:
    """Takes prepared chunks and completions, in any order; commits a chunk when its last row is there.

    One thread writes; what fails in it is raised by the next call. Rows whose chunk is not complete are on their way
    to the journal after half of `journal_s`; the other half is for what the thread is writing just then.
    """

    def __init__(self, sink: Sink, task: Task, schema: pa.Schema, ended: Ended, journal_s: float = 10.0) -> None:
        """`ended` is told, in the writing thread, of every chunk that is done with: what came of it, and how much of
        that was in the journal; nothing where another process has the chunk."""
        self._sink = sink
        self._task = task
        self._schema = schema
        self._ended = ended
        self._journal_after_s = journal_s / 2
        self._open: dict[str, _OpenChunk] = {}
        self._complete: deque[_OpenChunk] = deque()
        self._closing = False
        self._failure: Exception | None = None
        self._changed = threading.Condition()  # guards all of these
        self._writer = threading.Thread(target=self._write, name="outlet", daemon=True)
        self._writer.start()

    def expect(self, prepared: PreparedChunk) -> None:
        """A chunk is on its way; its error rows, and those of its journal, are already there."""
        chunk = _OpenChunk(prepared)
        for index, completion in prepared.claimed.found.items():
            chunk.add(index, completion)
        for completion in prepared.failed:
            chunk.add(_index(completion), completion)
        with self._changed:
            self._open[prepared.claimed.chunk.id] = chunk
            self._pass_on_complete(chunk)

    def add(self, completions: Iterable[Completion]) -> None:
        """Some rows' completions, or none; raises what an earlier write raised."""
        with self._changed:
            for completion in completions:
                chunk = self._open[cast(RequestId, completion.request_id)[0]]
                if chunk.add_fresh(_index(completion), completion):
                    self._changed.notify_all()
                self._pass_on_complete(chunk)
            self._raise_failure()

    def close(self) -> None:
        """Wait for the writes under way; finished rows of chunks that are given up stay in the journal.

        Raises what a write raised.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._writer.join()
        self._raise_failure()

    def _pass_on_complete(self, chunk: _OpenChunk) -> None:
        """Hand a chunk to the writing thread with its last row, waiting while that has too many."""
        if not chunk.is_complete:
            return
        del self._open[chunk.claimed.chunk.id]
        self._complete.append(chunk)
        self._changed.notify_all()
        self._changed.wait_for(lambda: len(self._complete) <= WRITES_AHEAD or self._failure is not None)
        self._raise_failure()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _write(self) -> None:
        """Whatever goes wrong here is raised in the main thread."""
        try:
            while (write := self._next_write()) is not None:
                write()
        except Exception as error:  # noqa: BLE001  # carried to the main thread, not swallowed
            with self._changed:
                self._failure = error
                self._changed.notify_all()

    def _next_write(self) -> Callable[[], None] | None:
        """Wait for what is to be written next: the journal when it is due, else a Part; None at the end."""
        with self._changed:
            while True:
                unsaved = [chunk for chunk in (*self._complete, *self._open.values()) if chunk.fresh]
                due = self._due(unsaved)
                if due:
                    return partial(_write_journal, [(chunk, chunk.take_fresh()) for chunk in due])
                if self._complete:
                    return partial(self._write_part, self._complete[0])
                if self._closing:
                    return None
                since = min((chunk.fresh_since for chunk in unsaved), default=None)
                self._changed.wait(None if since is None else since + self._journal_after_s - time.monotonic())

    def _due(self, unsaved: Sequence[_OpenChunk]) -> Sequence[_OpenChunk]:
        """Chunks with rows that have waited long enough; where chunks are given up, all at once."""
        if self._closing:
            return unsaved if self._open else ()
        before = time.monotonic() - self._journal_after_s
        return [chunk for chunk in unsaved if chunk.fresh_since <= before]

    def _write_part(self, chunk: _OpenChunk) -> None:
        claimed = chunk.claimed
        completions = [chunk.completions[index] for index in claimed.wanted]
        table = self._table(chunk.prepared, completions)
        counts = _counts(table, completions)
        is_mine = self._publish(claimed, table, counts)
        if is_mine or claimed.part is None:  # also where somebody else was first: the rows are there
            claimed.journal.remove()
        if is_mine:
            found = [position for position, index in enumerate(claimed.wanted) if index in claimed.found]
            answered = table.select(["completion_tokens"]).take(pa.array(found, pa.int64()))
            self._ended(claimed, counts, _counts(answered, [completions[position] for position in found]))
        else:
            self._ended(claimed, Counts(), Counts())
        with self._changed:
            self._complete.popleft()
            self._changed.notify_all()

    def _publish(self, claimed: ClaimedChunk, table: pa.Table, counts: Counts) -> bool:
        """Commit a chunk's rows, or put them in the place of the errors of its Part; False where others have it."""
        if claimed.part is None:
            return self._sink.commit(claimed.chunk, table, asdict(counts))
        total = Counts(**claimed.part.counts) - _counts_of_errors(claimed.part.failed_rows) + counts
        return self._sink.replace(claimed.chunk, claimed.part, table, asdict(total), claimed.is_mine)

    def _table(self, prepared: PreparedChunk, completions: list[Completion]) -> pa.Table:
        """The rows of the completions, in their order."""
        claimed = prepared.claimed
        rows = [prepared.rows[index] for index in claimed.wanted]
        values = common_results(claimed.chunk, claimed.wanted, completions) | self._task.results(completions, rows)
        given = prepared.table if claimed.part is None else rows_of(prepared.table, claimed.wanted)
        arrays = [
            pa.chunked_array([pa.array(values[f.name], type=f.type)]) if f.name in values else given[f.name]
            for f in self._schema
        ]
        return pa.table(arrays, schema=self._schema)


def _index(completion: Completion) -> int:
    return cast(RequestId, completion.request_id)[1]


def _write_journal(taken: Sequence[tuple[_OpenChunk, dict[int, Completion]]]) -> None:
    for chunk, fresh in taken:
        chunk.claimed.journal.write(fresh)


def _counts(table: pa.Table, completions: Sequence[Completion]) -> Counts:
    """Of rows and their completions; the tokens of all answers, those in the column and a row's further ones."""
    first = pc.sum(table["completion_tokens"]).as_py() or 0
    return Counts(
        rows=len(completions),
        error_rows=sum(c.error is not None for c in completions),
        prompt_tokens=sum(c.prompt_tokens for c in completions),
        completion_tokens=first + sum(len(choice.token_ids) for c in completions for choice in c.choices[1:]),
        target_tokens=sum(c.target_tokens for c in completions),
    )


def _counts_of_errors(rows: pa.Table) -> Counts:
    """The share that error rows have in the counts of their Part: they have no answer and no target."""
    return Counts(
        rows=rows.num_rows,
        error_rows=rows.num_rows,
        prompt_tokens=pc.sum(rows["prompt_tokens"]).as_py() or 0,
        completion_tokens=pc.sum(rows["completion_tokens"]).as_py() or 0,
    )
