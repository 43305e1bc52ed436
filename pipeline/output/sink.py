"""Exactly-once output: one Parquet Part per Chunk, whose final name is the commit."""

from __future__ import annotations

import json
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.source import Chunk
from pipeline.errors import RunFailed
from pipeline.output.durable import failing_run
from pipeline.output.store import JOURNAL, RESULTS, StoreError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping
    from typing import BinaryIO

    from pipeline.output.store import Store

_COUNTS_KEY = "pipeline.counts"
_ATTEMPT_KEY = "pipeline.attempt"
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
        before_publish: Callable[[], None] | None = None,
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
        assert table.num_rows == chunk.num_rows, f"{table.num_rows} rows for {chunk}"
        table = table.select(self._schema.names).cast(self._schema)
        name = part_path(chunk.id)
        with failing_run(self._store.shown(name)), self._store.draft(name, self._attempt) as draft:
            self._write(draft.file, table, counts)
            draft.finish()
            if self._before_publish is not None:
                self._before_publish()
            return draft.publish()

    def commit_empty(self) -> bool:
        """Publish the Part without rows that keeps the schema of a dataset without rows."""
        return self.commit(NO_ROWS, self._schema.empty_table(), {})

    def totals(self, chunk_ids: Iterable[str]) -> dict[str, int]:
        """The sums of the counts that the chunks' Parts were committed with.

        Raises RunFailed if one is unreadable, or is another run's by the schema's metadata.
        """
        totals: Counter[str] = Counter()
        for counts in self._counts([part_path(chunk_id) for chunk_id in chunk_ids]):
            totals.update(counts)
        return dict(totals)

    def _counts(self, names: list[str]) -> Iterator[dict[str, int]]:
        read = partial(_read_counts, self._store, self._schema.metadata or {})
        with ThreadPoolExecutor(self._store.reads_at_once) as pool:
            try:
                yield from pool.map(read, names)
            finally:
                pool.shutdown(cancel_futures=True)

    def _write(self, file: BinaryIO, table: pa.Table, counts: Mapping[str, int]) -> None:
        with pq.ParquetWriter(file, self._schema, compression=self._compression) as writer:
            writer.write_table(table, row_group_size=self._row_group_rows)
            about = {_COUNTS_KEY: json.dumps(dict(counts), sort_keys=True), _ATTEMPT_KEY: self._attempt}
            writer.add_key_value_metadata(about)


def _read_counts(store: Store, expected: Mapping[bytes, bytes], name: str) -> dict[str, int]:
    shown = store.shown(name)
    try:
        with store.open(name) as file:
            metadata = pq.read_metadata(file).metadata or {}
        counts: dict[str, int] = json.loads(metadata[_COUNTS_KEY.encode()])
    except StoreError as error:
        raise RunFailed(f"{shown} could not be read ({error}); run the same command again") from error
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise RunFailed(
            f"{shown} is not a Part that this pipeline committed ({error!r}); remove it to have its rows done again"
        ) from error
    if any(metadata.get(key) != value for key, value in expected.items()):
        raise RunFailed(
            f"{shown} was made by another run than run.json tells of (its metadata names another run or other "
            "settings); remove it to have its rows done again"
        )
    return counts
