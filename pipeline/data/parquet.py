"""Parquet files as a Source: found by their footers, read chunk by chunk in bounded memory."""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.broken_values import checked_rows
from pipeline.data.files import FileKind, Located, first_line, locate, reaching
from pipeline.data.hive import Keys, partition_keys, partition_schema, partition_value
from pipeline.data.parquet_footer import is_being_written, read_footers
from pipeline.data.schemas import checked_columns, decoded, project, require_same
from pipeline.data.source import Chunk, Counted, FoundFile, Rows, SourceFile
from pipeline.errors import ConfigError, RunFailed

PARQUET = FileKind("Parquet", (".parquet",))
_BATCH_BYTES = 16 * 2**20  # decoded bytes that one batch aims at
_MAX_BATCH_ROWS = 8192
_STREAM_BYTES = 2**20  # read-ahead per column; 0 would load each column of a row group whole
_REMOTE_STREAM_BYTES = 8 * 2**20  # the same where every read is a request
_MAX_COMBINED_BYTES = 2**31 - 1  # what 32-bit string offsets can address


class ParquetSource:
    """The rows of a file, a folder, a glob, a URL, or a list of these.

    Files are named and found as in `files.locate`. Folders called key=value below the root make
    columns, behind those of the files and of the types that pyarrow.dataset gives them, null for a file
    outside such folders; a column that the files have themselves stays theirs.
    """

    def __init__(
        self,
        path: str | Sequence[str],
        columns: Sequence[str] | None = None,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        """Keep the settings; nothing is read. ConfigError for an empty or repeating `columns`."""
        self._path = path
        self._columns = checked_columns(columns)
        self._storage_options = storage_options or {}
        self._schema: pa.Schema | None = None
        self._fixed = False
        self.left: Sequence[str] = ()
        self._files: dict[str, Located] = {}

    def find(self) -> list[FoundFile]:
        """All files sorted by name, from their footers alone.

        Raises ConfigError for a missing path, a folder or glob without files, a file that is not a
        whole Parquet file, unknown `columns`, and files whose schemas differ from each other or from
        that of the run's first start. Once there was one, a file that is being written is `left` for later.
        """
        files = self._without_unfinished(locate(self._path, PARQUET, self._storage_options))
        keys = [partition_keys(file.inner) for file in files]
        partitions = self._partitions(keys)
        found: list[FoundFile] = []
        for file, footer, own_keys in zip(files, read_footers(files, self._columns), keys, strict=True):
            self._check(file.path, _with_partitions(footer.schema, partitions, own_keys, file.path), files[0].path)
            found.append(
                FoundFile(name=file.name, path=file.path, size=file.size, rows=footer.rows, digest=footer.digest)
            )
        self._files = {file.path: file for file in files}
        return found

    def count(self, found: FoundFile) -> Counted:
        """What its footer says."""
        assert found.rows is not None
        return Counted(rows=found.rows)

    def grown(self, file: SourceFile, found: FoundFile) -> str:
        """Never: a footer that knows of more rows is another footer."""
        return "nothing can be appended to a Parquet file; put new rows in a new one"

    def fix_schema(self, schema: pa.Schema) -> None:
        """Hold every file to the schema of the run's first start."""
        self._schema = schema
        self._fixed = True

    def schema(self) -> pa.Schema:
        """The one schema of all files, in the order of `columns` or else of the first file.

        It holds names and types only: every column is nullable, dictionary columns are decoded, and
        metadata is dropped because it speaks of one file (pandas index, `datasets` features).
        """
        if self._schema is None:
            self.find()
        assert self._schema is not None
        return self._schema

    def read(self, file: SourceFile, chunks: Iterable[Chunk]) -> Iterator[Rows]:
        """Each chunk's rows as one table of `schema()`, in the order of `chunks`.

        Memory is about one chunk and one batch: a chunk that follows its predecessor goes on in the
        same row group, and row groups between chunks are skipped unread. Columns are contiguous
        unless the chunk has 2 GiB or more. Raises ConfigError when the file is not the registered
        one, RunFailed when its data cannot be decoded.
        """
        located = self._registered(file)
        schema = self.schema()
        with reaching(file.path, RunFailed), _open(located) as reader:
            own = [name for name in schema.names if name in reader.schema_arrow.names]
            keys = partition_keys(located.inner)
            constants = {
                name: partition_value(file.path, name, keys.get(name), schema.field(name).type)
                for name in schema.names
                if name not in own
            }
            rows = _RowCursor(reader, own, file.path)
            for chunk in chunks:
                assert chunk.file_ordinal == file.ordinal
                batches = rows.take(chunk.first_row, chunk.num_rows) if own else []
                located.require_unchanged()
                yield checked_rows(_as_table(batches, chunk.num_rows, constants, schema), file.name)

    def _without_unfinished(self, files: list[Located]) -> list[Located]:
        """The files, after the run's first start without those that somebody is still writing."""
        now = time.time()
        writing = [file for file in files if self._fixed and is_being_written(file, now)]
        self.left = [f"{file.path} has no Parquet footer yet, and is left for the next run" for file in writing]
        return [file for file in files if file not in writing] if writing else files

    def _partitions(self, keys: Sequence[Keys]) -> pa.Schema:
        """Types of the partition keys: those of the run's first start, else what the folders say."""
        found = partition_schema(keys)
        if not self._fixed or self._schema is None:
            return found
        fixed = self._schema
        return pa.schema([fixed.field(f.name) if f.name in fixed.names else f for f in found])

    def _check(self, path: str, schema: pa.Schema, first_path: str) -> None:
        schema = project(schema, self._columns, path)
        if self._schema is None:
            self._schema = schema
        require_same(self._schema, "the run's first start" if self._fixed else first_path, schema, path)

    def _registered(self, file: SourceFile) -> Located:
        if not self._files:
            self.find()
        located = self._files[file.path]
        with reaching(file.path):
            now = located.renewed()
        footer = read_footers([now], self._columns)[0]
        if (now.size, footer.digest) != (file.size, file.digest):
            raise ConfigError(
                f"data.path {file.path} is not the registered file any more ({now.size} bytes, registered with "
                f"{file.size}); restore it, or start another output.dir"
            )
        return located


class _RowCursor:
    """A position in one file's rows that moves forward by decoding and jumps by row group."""

    def __init__(self, reader: pq.ParquetFile, columns: list[str], path: str) -> None:
        self._reader = reader
        self._columns = columns
        self._path = path
        metadata = reader.metadata
        sizes = (metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))
        self._starts = list(accumulate(sizes, initial=0))  # first row of each group, then the number of rows
        self._position = 0  # the row that `_rest`, and after it `_batches`, goes on with
        self._group = -1
        self._group_end = 0
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._rest: pa.RecordBatch | None = None

    def take(self, first: int, count: int) -> list[pa.RecordBatch]:
        """Rows first .. first + count - 1, as slices of the decoded batches."""
        assert first + count <= self._starts[-1]
        if count:
            self._seek(first)
        taken = []
        while count:
            batch = self._next(count)
            taken.append(batch)
            count -= batch.num_rows
        return taken

    def _seek(self, row: int) -> None:
        """Stay in the open row group when `row` lies ahead in it, else open the group that has it."""
        if not self._position <= row < self._group_end:
            self._open_group_of(row)
        while self._position < row:
            self._next(row - self._position)

    def _next(self, limit: int) -> pa.RecordBatch:
        """The rows at the position, at least one and at most `limit`; moves behind them."""
        if self._rest is None or not self._rest.num_rows:
            if self._position == self._group_end:
                self._open_group_of(self._position)
            self._rest = self._decode()
        batch = self._rest.slice(0, limit)
        self._rest = self._rest.slice(limit)
        self._position += batch.num_rows
        return batch

    def _open_group_of(self, row: int) -> None:
        self._group = bisect_right(self._starts, row) - 1
        self._position, self._group_end = self._starts[self._group : self._group + 2]
        self._rest = None
        self._batches = self._reader.iter_batches(
            batch_size=self._batch_rows(), row_groups=[self._group], columns=self._columns
        )

    def _batch_rows(self) -> int:
        group = self._reader.metadata.row_group(self._group)
        row_bytes: int = max(1, group.total_byte_size // group.num_rows)
        return min(max(1, _BATCH_BYTES // row_bytes), _MAX_BATCH_ROWS)

    def _decode(self) -> pa.RecordBatch:
        try:
            batch = next(self._batches, None)
        except (pa.ArrowException, OSError) as error:
            raise self._broken(first_line(error)) from error
        if batch is None or not batch.num_rows:
            raise self._broken(f"it ends at row {self._position} of the file")
        return batch

    def _broken(self, reason: str) -> RunFailed:
        return RunFailed(
            f"data.path {self._path}: row group {self._group} cannot be read ({reason}); restore the file "
            "and run the same command again, or start another output.dir without it"
        )


def _with_partitions(schema: pa.Schema, partitions: pa.Schema, keys: Keys, path: str) -> pa.Schema:
    """The file's columns and those of the folders' keys; a column of its own stays its own."""
    for field in partitions:
        if field.name not in schema.names:
            partition_value(path, field.name, keys.get(field.name), field.type)
            schema = schema.append(field)
    return schema


def _open(file: Located) -> pq.ParquetFile:
    stream = _STREAM_BYTES if file.fs is None else _REMOTE_STREAM_BYTES
    where = file.key if file.fs is None else file.open(in_order=False)
    try:
        return pq.ParquetFile(where, buffer_size=stream, pre_buffer=False, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise RunFailed(f"data.path {file.path} cannot be opened ({first_line(error)}); restore the file") from error


def _as_table(
    batches: list[pa.RecordBatch], count: int, constants: Mapping[str, pa.Scalar], schema: pa.Schema
) -> pa.Table:
    """The decoded batches with the partition's constants, `count` rows, as a table of the schema."""
    if not count:
        return schema.empty_table()
    table = pa.Table.from_batches(batches) if batches else None
    columns = [
        pa.chunked_array([pa.repeat(constants[name], count)])
        if name in constants or table is None
        else decoded(table[name])
        for name in schema.names
    ]
    table = pa.Table.from_arrays(columns, names=schema.names).cast(schema)
    return table.combine_chunks() if table.nbytes <= _MAX_COMBINED_BYTES else table
