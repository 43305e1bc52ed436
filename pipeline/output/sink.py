"""Exactly-once output: one Parquet Part per Chunk, whose final name is the commit."""

from __future__ import annotations

import json
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.source import Chunk
from pipeline.output.durable import failing_run
from pipeline.output.part import (
    ATTEMPT_KEY,
    COUNTS_KEY,
    CommittedPart,
    Footer,
    read_footer,
    read_part,
)
from pipeline.output.seal import SealedFile
from pipeline.output.store import JOURNAL, RESULTS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from typing import BinaryIO

    from pipeline.output.store import Draft, Store

_CHECKED = {"write_page_checksum": True}
"""A flipped bit in a page is found by whoever asks for it, as pipeline.verify does."""
_PART = re.compile(r"part-(\d{6,}-\d{12,})\.parquet")
NO_ROWS = Chunk(file_ordinal=0, first_row=0, num_rows=0)
"""The chunk of a dataset without rows."""


def part_name(chunk_id: str) -> str:
    """The file name of a chunk's Part; names sort like the rows."""
    return f"part-{chunk_id}.parquet"


def part_path(chunk_id: str) -> str:
    """Where a chunk's Part is in the output."""
    return f"{RESULTS}/{part_name(chunk_id)}"


def committed_parts(store: Store) -> set[str]:
    """The ids of the chunks that have a Part, from one listing."""
    with failing_run(store.shown(RESULTS)):
        matches = [_PART.fullmatch(name) for name in store.names(RESULTS)]
    return {match[1] for match in matches if match}


class Sink:
    """Writes Parts of one schema.

    A Part is written as a draft of this `attempt` (unique to the process) and published exclusively:
    under its final name it is whole, and whoever comes second discards. It names its attempt, so that no
    two attempts write the same bytes and a store can tell whose a Part is.
    """

    def __init__(
        self,
        store: Store,
        schema: pa.Schema,
        attempt: str,
        compression: str = "zstd",
        row_group_rows: int | None = None,
        before_publish: Callable[[], object] | None = None,
    ) -> None:
        """Make the folders; ConfigError where that is impossible. `row_group_rows` None: one row group a Part.

        `before_publish` may raise to stop a finished Part from being published.
        """
        self._store = store
        self._schema = schema
        self._attempt = attempt
        self._compression = compression
        self._row_group_rows = row_group_rows
        self._before_publish = before_publish
        store.make_folder(RESULTS)
        store.make_folder(JOURNAL)

    def committed(self) -> set[str]:
        """The ids of the chunks that have a Part."""
        return committed_parts(self._store)

    def commit(self, chunk: Chunk, table: pa.Table, counts: Mapping[str, int]) -> bool:
        """Publish the chunk's rows, with `counts` in the footer; False if the chunk had a Part already.

        `table` has the schema's columns in any order, of types that cast to it without loss. Raises
        RunFailed when writing fails; then no final name exists that was not there before.
        """
        with self._written(chunk, table, counts) as draft:
            return draft.publish()

    def replace(
        self, chunk: Chunk, part: CommittedPart, rows: pa.Table, counts: Mapping[str, int], is_mine: Callable[[], bool]
    ) -> bool:
        """Put `rows` in the place of a Part's error rows, and `counts` in the footer: a reader finds the old Part or
        the new one. False, and nothing happens, if the claim is not this process's any more or the Part not the same.

        Raises RunFailed when writing fails; then the old Part is there.
        """
        with self._written(chunk, part.with_rows(rows), counts) as draft:
            if not is_mine() or self.footer(chunk.id).attempt != part.attempt:
                return False
            draft.replace()
            return True

    def footer(self, chunk_id: str) -> Footer:
        """What the Part of a chunk says of itself; RunFailed if it is unreadable or another run's."""
        return read_footer(self._store, self._schema.metadata or {}, part_path(chunk_id))

    def read_failed(self, chunk_id: str, attempt: str | None) -> CommittedPart | None:
        """The Part of a chunk if it still is the one of an attempt, whose errors are to be done again."""
        footer = None if attempt is None else self.footer(chunk_id)
        if footer is None or footer.attempt != attempt:
            return None
        return read_part(self._store, footer, self._schema, part_path(chunk_id))

    @contextmanager
    def _written(self, chunk: Chunk, table: pa.Table, counts: Mapping[str, int]) -> Iterator[Draft]:
        """A Part that is finished but for its name."""
        assert table.num_rows == chunk.num_rows, f"{table.num_rows} rows for {chunk}"
        table = table.select(self._schema.names).cast(self._schema)
        name = part_path(chunk.id)
        with failing_run(self._store.shown(name)), self._store.draft(name, self._attempt) as draft:
            self._write(draft.file, table, counts)
            draft.finish()
            if self._before_publish is not None:
                self._before_publish()
            yield draft

    def commit_empty(self) -> bool:
        """Publish the Part without rows that keeps the schema of a dataset without rows."""
        return self.commit(NO_ROWS, self._schema.empty_table(), {})

    def totals(self, chunk_ids: Iterable[str]) -> dict[str, int]:
        """The sums of the counts that the chunks' Parts were committed with.

        Raises RunFailed if one is unreadable, or is another run's by the schema's metadata.
        """
        totals: Counter[str] = Counter()
        for footer in self.footers(chunk_ids):
            totals.update(footer.counts)
        return dict(totals)

    def footers(self, chunk_ids: Iterable[str]) -> Iterator[Footer]:
        """What the chunks' Parts say of themselves, in that order; raises what `footer` does."""
        with ThreadPoolExecutor(self._store.reads_at_once) as pool:
            try:
                yield from pool.map(self.footer, chunk_ids)
            finally:
                pool.shutdown(cancel_futures=True)

    def _write(self, file: BinaryIO, table: pa.Table, counts: Mapping[str, int]) -> None:
        sealed = SealedFile(file)
        with pq.ParquetWriter(sealed, self._schema, compression=self._compression, **_CHECKED) as writer:
            writer.write_table(table, row_group_size=self._row_group_rows)
            counted = json.dumps(dict(counts), sort_keys=True)
            writer.add_key_value_metadata({COUNTS_KEY: counted, ATTEMPT_KEY: self._attempt, **sealed.end_pages()})
        sealed.end_footer()
