"""Exactly-once output: one Parquet Part per Chunk, whose final name is the commit."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.source import Chunk
from pipeline.errors import RunFailed
from pipeline.output.durable import discard, failing_run, make_folder, publish, sync_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

_COUNTS_KEY = "pipeline.counts"
_PART = re.compile(r"part-(\d{6,}-\d{12,})\.parquet")
_EMPTY = Chunk(file_ordinal=0, first_row=0, num_rows=0)


def part_name(chunk_id: str) -> str:
    """The file name of a chunk's Part; names sort like the rows."""
    return f"part-{chunk_id}.parquet"


def committed_parts(results: Path) -> set[str]:
    """The ids of the chunks that have a Part, from one listing; none where the folder is not there yet."""
    if not results.is_dir():
        return set()
    with failing_run(results), os.scandir(results) as entries:
        matches = [_PART.fullmatch(entry.name) for entry in entries]
    return {match[1] for match in matches if match}


class Sink:
    """Writes Parts of one schema.

    A Part is written in `work` under a name of this `attempt` (unique to the process), synced, and
    published in `results` by an exclusive link: under its final name it is whole, and whoever comes
    second discards. `work` must be on the file system of `results`.
    """

    def __init__(
        self,
        results: Path,
        work: Path,
        schema: pa.Schema,
        attempt: str,
        compression: str = "zstd",
        row_group_rows: int | None = None,
        before_publish: Callable[[], None] | None = None,
    ) -> None:
        """Make both folders; ConfigError where that is impossible. `row_group_rows` None: one row group a Part.

        `before_publish` may raise to stop a finished Part from being published.
        """
        self._results = results
        self._work = work
        self._schema = schema
        self._attempt = attempt
        self._compression = compression
        self._row_group_rows = row_group_rows
        self._before_publish = before_publish
        make_folder(results)
        make_folder(work)

    def committed(self) -> set[str]:
        """The ids of the chunks that have a Part."""
        return committed_parts(self._results)

    def commit(self, chunk: Chunk, table: pa.Table, counts: Mapping[str, int]) -> bool:
        """Publish the chunk's rows, with `counts` in the footer; False if the chunk had a Part already.

        `table` has the schema's columns in any order, of types that cast to it without loss. Raises
        RunFailed when writing fails; then no final name exists that was not there before.
        """
        assert table.num_rows == chunk.num_rows, f"{table.num_rows} rows for {chunk}"
        table = table.select(self._schema.names).cast(self._schema)
        final = self._results / part_name(chunk.id)
        temporary = self._work / f"part-{chunk.id}.{self._attempt}.tmp"
        with failing_run(final):
            try:
                self._write(temporary, table, counts)
                if self._before_publish is not None:
                    self._before_publish()
                published = publish(temporary, final)
                sync_folder(self._results)
            finally:
                discard(temporary)
        return published

    def commit_empty(self) -> bool:
        """Publish the Part without rows that keeps the schema of a dataset without rows."""
        return self.commit(_EMPTY, self._schema.empty_table(), {})

    def totals(self, chunk_ids: Iterable[str]) -> dict[str, int]:
        """The sums of the counts that the chunks' Parts were committed with.

        Raises RunFailed if one is unreadable, or is another run's by the schema's metadata.
        """
        totals: Counter[str] = Counter()
        for chunk_id in chunk_ids:
            totals.update(_read_counts(self._results / part_name(chunk_id), self._schema.metadata or {}))
        return dict(totals)

    def sweep(self) -> None:
        """Remove what killed attempts left in `work`; for when no chunk is left to do."""
        for path in self._work.glob("part-*.tmp"):
            discard(path)

    def _write(self, path: Path, table: pa.Table, counts: Mapping[str, int]) -> None:
        # A Python file, not a path: its OSError keeps the errno, and what is synced is what was written.
        with path.open("wb") as file:
            with pq.ParquetWriter(file, self._schema, compression=self._compression) as writer:
                writer.write_table(table, row_group_size=self._row_group_rows)
                writer.add_key_value_metadata({_COUNTS_KEY: json.dumps(dict(counts), sort_keys=True)})
            file.flush()
            os.fsync(file.fileno())


def _read_counts(path: Path, expected: Mapping[bytes, bytes]) -> dict[str, int]:
    try:
        metadata = pq.read_metadata(path).metadata or {}
        counts: dict[str, int] = json.loads(metadata[_COUNTS_KEY.encode()])
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise RunFailed(
            f"{path} is not a Part that this pipeline committed ({error!r}); remove it to have its rows done again"
        ) from error
    if any(metadata.get(key) != value for key, value in expected.items()):
        raise RunFailed(
            f"{path} was made by another run than run.json tells of (its metadata names another run or other "
            "settings); remove it to have its rows done again"
        )
    return counts
