"""Rows of Arrow IPC streams, as `datasets` writes its shards: forward through one, or anywhere by an index."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import pyarrow as pa

from pipeline.data.files import Located, UnreadableFile


def read_schema(file: Located) -> pa.Schema:
    """The schema at the beginning of a stream."""
    with _stream(file) as reader:
        return reader.schema


class ArrowRows:
    """A position in one stream's rows; local files are mapped, so that what is passed over is not read."""

    def __init__(self, file: Located) -> None:
        self._file = file
        self._reopen()

    def count(self) -> int:
        """All rows, from the batches' headers."""
        return sum(batch.num_rows for batch in self._batches)

    def take(self, first: int, count: int, columns: Sequence[str]) -> pa.Table:
        """Rows first .. first + count - 1; raises UnreadableFile where there are fewer."""
        if first < self._first:
            self._reopen()
        taken = []
        while count:
            while first >= self._first + self._batch.num_rows:
                self._next()
            part = self._batch.slice(first - self._first, count)
            taken.append(part.select(columns))
            first += part.num_rows
            count -= part.num_rows
        if not taken:
            return self._schema.empty_table().select(columns)
        return pa.Table.from_batches(taken).combine_chunks()

    def _reopen(self) -> None:
        reader = _stream(self._file)
        self._schema: pa.Schema = reader.schema
        self._batches: Iterator[pa.RecordBatch] = iter(reader)
        self._batch: pa.RecordBatch = pa.RecordBatch.from_pylist([], schema=reader.schema)
        self._first = 0

    def _next(self) -> None:
        self._first += self._batch.num_rows
        batch = next(self._batches, None)
        if batch is None:
            raise UnreadableFile(f"it ends after {self._first} rows")
        self._batch = batch


class MappedRows:
    """Rows of local shards in the order of an index, each a number of a row of all shards together."""

    def __init__(self, shards: Sequence[Located], indices: Sequence[Located]) -> None:
        if any(file.fs is not None for file in (*shards, *indices)):
            raise UnreadableFile("its rows are in the order of an index; copy the folder to a local disk")
        self._batches = [batch for shard in shards for batch in _stream(shard)]
        self._starts = list(accumulate((batch.num_rows for batch in self._batches), initial=0))
        self._indices = [ArrowRows(part) for part in indices]
        self._index_starts = list(accumulate((ArrowRows(part).count() for part in indices), initial=0))

    def take(self, first: int, count: int, columns: Sequence[str]) -> pa.Table:
        """Rows first .. first + count - 1 of the index."""
        wanted = self._wanted(first, count)
        by_batch: dict[int, list[int]] = {}
        for place in sorted(range(count), key=wanted.__getitem__):
            by_batch.setdefault(bisect_right(self._starts, wanted[place]) - 1, []).append(place)
        taken, places = [], []
        for number, members in by_batch.items():
            inside = [wanted[place] - self._starts[number] for place in members]
            taken.append(self._batches[number].select(columns).take(pa.array(inside, pa.int64())))
            places += members
        if not taken:
            return self._batches[0].schema.empty_table().select(columns)
        order = sorted(range(count), key=places.__getitem__)
        return pa.Table.from_batches(taken).combine_chunks().take(pa.array(order, pa.int64()))

    def _wanted(self, first: int, count: int) -> list[int]:
        """Which rows of the shards the index names at first .. first + count - 1."""
        wanted: list[int] = []
        while len(wanted) < count:
            at = first + len(wanted)
            part = bisect_right(self._index_starts, at) - 1
            inside = at - self._index_starts[part]
            number = min(count - len(wanted), self._index_starts[part + 1] - at)
            wanted += self._indices[part].take(inside, number, ["indices"])["indices"].to_pylist()
        return wanted


def _stream(file: Located) -> Any:
    source = pa.memory_map(file.key) if file.fs is None else pa.PythonFile(file.open(in_order=True), mode="r")
    return pa.ipc.open_stream(source)
