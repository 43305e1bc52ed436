"""Parquet files as a Source: found by their footers, read chunk by chunk in bounded memory."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from pipeline.data.broken_values import checked_rows
from pipeline.data.files import FileKind, Located, locate, reaching
from pipeline.data.hive import Keys, partition_keys, partition_schema, partition_value
from pipeline.data.parquet_footer import Footer, is_being_written, parse_footer, read_tails
from pipeline.data.parquet_rows import RowCursor, open_rows
from pipeline.data.schemas import checked_columns, decoded, project, require_same
from pipeline.data.source import Chunk, Counted, FoundFile, Rows, SourceFile
from pipeline.errors import ConfigError, RunFailed

PARQUET = FileKind("Parquet", (".parquet",))
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
        self.refused: Mapping[str, ConfigError] = {}
        self._files: dict[str, Located] = {}

    def find(self) -> list[FoundFile]:
        """All files sorted by name, from their footers alone.

        Raises ConfigError for a missing path, a folder or glob without files, a file that is not a
        whole Parquet file, unknown `columns`, and files whose schemas differ from each other. Once there was a run's
        first start, a file that is being written is `left` for later, and one that has another schema, or is none
        that can be read, is `refused`.
        """
        files = self._without_unfinished(locate(self._path, PARQUET, self._storage_options))
        partitions = self._partitions([partition_keys(file.inner) for file in files])
        found: list[FoundFile] = []
        refused: dict[str, ConfigError] = {}
        for file, tail in zip(files, read_tails(files), strict=True):
            try:
                found.append(self._found(file, tail, partitions, files[0].path))
            except ConfigError as error:
                if not self._fixed:
                    raise
                refused[file.name] = error
        self.refused = refused
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
        one, or its data cannot be decoded, RunFailed when it cannot be reached or is written to meanwhile.
        """
        located, footer = self._registered(file)
        schema = self.schema()
        with reaching(file.path, RunFailed), open_rows(located, footer.dictionaries) as reader:
            own = [name for name in schema.names if name in reader.schema_arrow.names]
            keys = partition_keys(located.inner)
            constants = {
                name: partition_value(file.path, name, keys.get(name), schema.field(name).type)
                for name in schema.names
                if name not in own
            }
            rows = RowCursor(reader, own, located)
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

    def _found(self, file: Located, tail: bytes, partitions: pa.Schema, first_path: str) -> FoundFile:
        """A file by its footer, which has to fit the schema; `first_path` is the first file's."""
        footer, keys = parse_footer(file, tail, self._columns), partition_keys(file.inner)
        if self._fixed and self._schema is not None:  # a key that is new is a column of its own file alone
            partitions = pa.schema([f for f in partitions if f.name in self._schema.names or f.name in keys])
        self._check(file.path, _with_partitions(footer.schema, partitions, keys, file.path), first_path)
        return FoundFile(name=file.name, path=file.path, size=file.size, rows=footer.rows, digest=footer.digest)

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

    def _registered(self, file: SourceFile) -> tuple[Located, Footer]:
        if not self._files:
            self.find()
        located = self._files[file.path]
        with reaching(file.path):
            now = located.renewed()
        footer = parse_footer(now, read_tails([now])[0], self._columns)
        if (now.size, footer.digest) != (file.size, file.digest):
            raise ConfigError(
                f"data.path {file.path} is not the registered file any more ({now.size} bytes, registered with "
                f"{file.size}); restore it, or start another output.dir"
            )
        return located, footer


def _with_partitions(schema: pa.Schema, partitions: pa.Schema, keys: Keys, path: str) -> pa.Schema:
    """The file's columns and those of the folders' keys; a column of its own stays its own."""
    for field in partitions:
        if field.name not in schema.names:
            partition_value(path, field.name, keys.get(field.name), field.type)
            schema = schema.append(field)
    return schema


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
