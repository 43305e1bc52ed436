"""The writing thread: rows reach the journal in time whatever the engine does, and failures reach the main thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pytest

from pipeline.claimed import ClaimedChunk
from pipeline.core import Completion, FinishReason, Request
from pipeline.data.source import Chunk
from pipeline.errors import RunFailed
from pipeline.intake import PreparedChunk
from pipeline.outlet import Counts, Outlet

ROWS = 10
SCHEMA = pa.schema([("row_id", pa.string()), ("completion_tokens", pa.int32())])
JOURNAL_S = 0.4


class Recorded:
    """A journal of a chunk that notes when it was given which rows."""

    def __init__(self, found: dict[int, Completion] | None = None) -> None:
        self.found = found or {}
        self.writes: list[tuple[float, list[int]]] = []
        self.removed = False

    def write(self, completions: dict[int, Completion]) -> None:
        self.writes.append((time.monotonic(), sorted(completions)))

    def remove(self) -> None:
        self.removed = True

    @property
    def rows(self) -> list[int]:
        return sorted(row for _, rows in self.writes for row in rows)


class Task:
    def results(self, completions: list[Completion], rows: list[Any]) -> dict[str, list[Any]]:
        return {"completion_tokens": [len(c.token_ids) for c in completions]}


class Sink:
    """Takes Parts as fast as it is let."""

    def __init__(self, before: Callable[[], None] = lambda: None, *, is_first: bool = True) -> None:
        self.before = before
        self.is_first = is_first
        self.committed: list[str] = []

    def commit(self, chunk: Chunk, table: pa.Table, counts: dict[str, int]) -> bool:
        self.before()
        self.committed.append(chunk.id)
        return self.is_first


def answer(chunk: Chunk, index: int) -> Completion:
    return Completion(request_id=(chunk.id, index), prompt_tokens=3, finish_reason=FinishReason.STOP, token_ids=(1, 2))


def chunk(number: int) -> Chunk:
    return Chunk(file_ordinal=0, first_row=number * ROWS, num_rows=ROWS)


def prepared(number: int, journal: Any) -> PreparedChunk:
    one = chunk(number)
    claimed = ClaimedChunk(one, journal, lambda: True)
    requests = [Request(id=(one.id, index), prompt_ids=(1,)) for index in sorted(claimed.left)]
    return PreparedChunk(claimed, pa.table({"x": range(ROWS)}), [{}] * ROWS, requests, [])


@contextmanager
def outlet(sink: Any, journal_s: float = JOURNAL_S, ended: Any = lambda *_: None) -> Iterator[Outlet]:
    task: Any = Task()
    made = Outlet(sink, task, SCHEMA, ended, journal_s)
    try:
        yield made
    finally:
        made.close()


def test_rows_are_in_the_journal_in_time_while_the_engine_is_at_work() -> None:
    journal = Recorded()
    with outlet(Sink()) as out:
        out.expect(prepared(0, journal))
        for index in range(4):
            began = time.monotonic()
            out.add([answer(chunk(0), index)])
            time.sleep(1.2 * JOURNAL_S)  # no call, as when the engine takes long
            assert index in journal.rows
            assert journal.writes[-1][0] - began < JOURNAL_S
    assert journal.rows == [0, 1, 2, 3] and not journal.removed


def test_chunks_that_are_committed_sooner_are_not_in_the_journal() -> None:
    journals = [Recorded() for _ in range(5)]
    sink = Sink()
    with outlet(sink, journal_s=60) as out:
        for number, journal in enumerate(journals):
            out.expect(prepared(number, journal))
            out.add(answer(chunk(number), index) for index in range(ROWS))
    assert sink.committed == [chunk(number).id for number in range(5)]
    assert all(not journal.writes and journal.removed for journal in journals)


def test_what_is_finished_is_kept_when_the_chunk_is_given_up() -> None:
    journals = [Recorded(), Recorded()]
    with outlet(Sink(), journal_s=3600) as out:
        for number, journal in enumerate(journals):
            out.expect(prepared(number, journal))
        out.add([answer(chunk(0), 7), answer(chunk(1), 0), answer(chunk(0), 2)])
    assert [journal.rows for journal in journals] == [[2, 7], [0]]


def test_with_nothing_to_wait_for_every_row_goes_at_once() -> None:
    journal = Recorded()
    with outlet(Sink(), journal_s=0) as out:
        out.expect(prepared(0, journal))
        for index in range(3):
            out.add([answer(chunk(0), index)])
            deadline = time.monotonic() + 5
            while index not in journal.rows:
                assert time.monotonic() < deadline
                time.sleep(0.001)


def test_rows_of_the_journal_count_as_there() -> None:
    told: list[tuple[str, Counts, Counts]] = []
    found = {index: answer(chunk(0), index) for index in range(6)}
    sink = Sink()
    ended = lambda claimed, counts, journaled: told.append((claimed.chunk.id, counts, journaled))  # noqa: E731
    with outlet(sink, ended=ended) as out:
        out.expect(prepared(0, Recorded(found)))
        out.add(answer(chunk(0), index) for index in range(6, ROWS))
        out.expect(prepared(1, Recorded({index: answer(chunk(1), index) for index in range(ROWS)})))
    whole = Counts(rows=10, prompt_tokens=30, completion_tokens=20)
    six = Counts(rows=6, prompt_tokens=18, completion_tokens=12)
    assert told == [(chunk(0).id, whole, six), (chunk(1).id, whole, whole)]


def test_rows_that_somebody_else_has_committed_are_counted_there() -> None:
    """As by a process that stood still for longer than its lease: the rows of all processes add up to the whole."""
    told: list[tuple[Counts, Counts]] = []
    journal = Recorded()
    ended = lambda claimed, counts, journaled: told.append((counts, journaled))  # noqa: E731
    with outlet(Sink(is_first=False), ended=ended) as out:
        out.expect(prepared(0, journal))
        out.add(answer(chunk(0), index) for index in range(ROWS))
    assert told == [(Counts(), Counts())]
    assert journal.removed, "the rows are somewhere else"


@pytest.mark.parametrize("where", ["journal", "part"])
def test_a_failed_write_is_raised_where_the_rows_are_given(where: str) -> None:
    def fail(*_: Any) -> None:
        raise RunFailed("no space left")

    journal = Recorded()
    if where == "journal":
        journal.write = fail  # type: ignore[method-assign]
    with pytest.raises(RunFailed, match="no space"), outlet(Sink(fail), journal_s=0) as out:
        out.expect(prepared(0, journal))
        deadline = time.monotonic() + 5
        out.add(answer(chunk(0), index) for index in range(ROWS if where == "part" else 1))
        while time.monotonic() < deadline:
            out.add([])
            time.sleep(0.005)


def test_a_slow_store_holds_up_the_rows_and_not_the_memory() -> None:
    """Whoever gives rows waits while five Parts are not written; then none is lost."""
    going = threading.Event()
    sink = Sink(lambda: going.wait(10) or None)
    given: list[int] = []

    def give(out: Outlet) -> None:
        for number in range(8):
            out.expect(prepared(number, Recorded()))
            out.add(answer(chunk(number), index) for index in range(ROWS))
            given.append(number)

    with outlet(sink, journal_s=60) as out:
        thread = threading.Thread(target=give, args=(out,))
        thread.start()
        time.sleep(0.3)
        assert given == [0, 1, 2, 3]
        going.set()
        thread.join(10)
    assert sink.committed == [chunk(number).id for number in range(8)]
