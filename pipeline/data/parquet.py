"""Parquet files as a Source: found by their footers, read chunk by chunk in bounded memory."""

from __future__ import annotations

import glob
import hashlib
import os
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.source import FoundFile
from pipeline.errors import ConfigError, RunFailed

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from pipeline.data.source import Chunk, SourceFile

_MAGIC = b"PAR1"
_ENCRYPTED_MAGIC = b"PARE"
_TAIL_BYTES = 8  # footer length (4 bytes, little endian) and magic
_BATCH_BYTES = 16 * 2**20  # decoded bytes that one batch aims at
_MAX_BATCH_ROWS = 8192
_STREAM_BYTES = 2**20  # read-ahead per column; 0 would load each column of a row group whole
_MAX_COMBINED_BYTES = 2**31 - 1  # what 32-bit string offsets can address


class ParquetSource:
    """The rows of a file, a folder, a glob, or a list of these.

    A folder is searched recursively for `*.parquet`; what begins with "." or "_" is left out, and
    keys of Hive-style folders are not made columns. A file is named by its path relative to the
    folder or to the part of the glob before the first wildcard; a single file by its base name; an
    entry of a list by its absolute path. A file reached twice counts once.
    """

    def __init__(self, path: str | Sequence[str], columns: Sequence[str] | None = None) -> None:
        """Keep the settings; nothing is read. ConfigError for an empty or repeating `columns`."""
        if columns is not None and (not columns or len(set(columns)) < len(columns)):
            raise ConfigError(
                f"data.columns must name at least one column, and each once, got {list(columns)}; "
                "leave it out for all columns"
            )
        self._path = path
        self._columns = columns
        self._schema: pa.Schema | None = None

    def find(self) -> list[FoundFile]:
        """All files sorted by name, from their footers alone.

        Raises ConfigError for a missing path, a folder or glob without files, a file that is not a
        whole Parquet file, unknown `columns`, and files whose schemas differ.
        """
        found: list[FoundFile] = []
        for name, path in _locate(self._path):
            footer = _read_footer(path)
            schema = self._project(footer.schema, path)
            if found:
                _require_same(self._schema, found[0].path, schema, str(path))
            else:
                self._schema = schema
            found.append(FoundFile(name=name, path=str(path), size=footer.size, rows=footer.rows, digest=footer.digest))
        return found

    def schema(self) -> pa.Schema:
        """The one schema of all files, in the order of `columns` or else of the first file.

        It holds names and types only: every column is nullable, dictionary columns are decoded, and
        metadata is dropped because it speaks of one file (pandas index, `datasets` features).
        """
        if self._schema is None:
            _, path = _locate(self._path)[0]
            self._schema = self._project(_read_footer(path).schema, path)
        return self._schema

    def read(self, file: SourceFile, chunks: Iterable[Chunk]) -> Iterator[pa.Table]:
        """Each chunk's rows as one table of `schema()`, in the order of `chunks`.

        Memory is about one chunk and one batch: a chunk that follows its predecessor goes on in the
        same row group, and row groups between chunks are skipped unread. Columns are contiguous
        unless the chunk has 2 GiB or more. Raises ConfigError when the file is not the registered
        one, RunFailed when its data cannot be decoded.
        """
        _require_registered(file)
        schema = self.schema()
        with _open(file.path) as reader:
            rows = _RowCursor(reader, schema.names, file.path)
            for chunk in chunks:
                assert chunk.file_ordinal == file.ordinal
                yield _as_table(rows.take(chunk.first_row, chunk.num_rows), schema)

    def _project(self, schema: pa.Schema, path: Path) -> pa.Schema:
        names = schema.names if self._columns is None else list(self._columns)
        unknown = [name for name in names if name not in schema.names]
        if unknown:
            raise ConfigError(
                f"data.columns names {_listed(unknown)}, which {path} does not have; "
                f"its columns are {_listed(schema.names)}"
            )
        repeated = sorted({name for name in names if schema.names.count(name) > 1})
        if repeated:
            raise ConfigError(
                f"data.path {path} has several columns named {_listed(repeated)}; "
                "rename them, or leave them out with data.columns"
            )
        return pa.schema([pa.field(name, _decoded(schema.field(name).type)) for name in names])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Footer:
    """What the end of a file says; `size` in bytes, `digest` of the footer and the size."""

    size: int
    rows: int
    digest: str
    schema: pa.Schema


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
            raise self._broken(_first_line(error)) from error
        if batch is None or not batch.num_rows:
            raise self._broken(f"it ends at row {self._position} of the file")
        return batch

    def _broken(self, reason: str) -> RunFailed:
        return RunFailed(
            f"data.path {self._path}: row group {self._group} cannot be read ({reason}); restore the file "
            "and run the same command again, or start another output.dir without it"
        )


def _locate(path: str | Sequence[str]) -> list[tuple[str, Path]]:
    """(name, absolute path) of every file, sorted by name, each file once."""
    if isinstance(path, str):
        entries = _expand(path)
    else:
        entries = [(str(file.absolute()), file) for entry in path for _, file in _expand(entry)]
    if not entries:
        raise ConfigError("data.path is an empty list; name at least one file, folder or glob")
    unique: dict[Path, tuple[str, Path]] = {}
    for name, file in sorted(entries):
        # The last component stays unresolved: two links to one blob (as hubs cache equal shards) are two files.
        unique.setdefault(file.parent.resolve() / file.name, (name, file.absolute()))
    return list(unique.values())


def _expand(text: str) -> list[tuple[str, Path]]:
    """(name, path) of the files that one entry of `data.path` stands for, in no order."""
    path = Path(text).expanduser()
    try:
        if path.is_file():
            return [(path.name, path)]
        if path.is_dir():
            root, found = path, list(_walk(path, above=()))
        elif _is_wild(text):
            root, found = _glob(path)
        else:
            raise ConfigError(f"data.path {text} is no file or folder on this machine; correct the path")
    except OSError as error:
        raise ConfigError(
            f"data.path {text} cannot be listed ({error.strerror}: {error.filename}); make it readable"
        ) from error
    if not found:
        raise ConfigError(
            f"data.path {text} matches no Parquet file; point it at *.parquet files "
            '(names that begin with "." or "_" are left out)'
        )
    return [(file.relative_to(root).as_posix(), file) for file in found]


def _walk(folder: Path, above: tuple[Path, ...]) -> Iterator[Path]:
    """The Parquet files below a folder; follows links, but never into a folder it is inside of."""
    real = folder.resolve()
    if real in above:
        return
    for entry in folder.iterdir():
        if _is_hidden(entry.name):
            continue
        if entry.is_dir():
            yield from _walk(entry, (*above, real))
        elif entry.suffix == ".parquet":
            yield entry


def _glob(pattern: Path) -> tuple[Path, list[Path]]:
    """The folder before the first wildcard, and the files that match; matching folders are searched."""
    fixed = next(index for index, part in enumerate(pattern.parts) if _is_wild(part))
    root = Path(*pattern.parts[:fixed])
    wild = str(Path(*pattern.parts[fixed:]))
    found: list[Path] = []
    for name in glob.iglob(wild, root_dir=root, recursive=True):  # noqa: PTH207 (Path.glob skips linked folders)
        match = root / name
        if any(_is_hidden(part) for part in Path(name).parts):
            continue
        found.extend(_walk(match, above=()) if match.is_dir() else [match])
    return root, found


def _is_wild(text: str) -> bool:
    return any(character in text for character in "*?[")


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "_"))


def _read_footer(path: Path) -> _Footer:
    """Check and describe a file by its last bytes; ConfigError when it is not a whole Parquet file."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            footer = _footer_bytes(file, size)
            if footer is None:
                raise _not_parquet(path, file, size)
            reader = pq.ParquetFile(file)
            digest = hashlib.sha256(footer + size.to_bytes(8, "little")).hexdigest()
            return _Footer(size=size, rows=reader.metadata.num_rows, digest=digest, schema=reader.schema_arrow)
    except (pa.ArrowException, OSError) as error:
        raise ConfigError(
            f"data.path {path} cannot be opened as Parquet ({_first_line(error)}); replace the file"
        ) from error


def _footer_bytes(file: BinaryIO, size: int) -> bytes | None:
    """The footer with its length and magic, or None where the file does not end in a whole one."""
    if size < len(_MAGIC) + _TAIL_BYTES:
        return None
    file.seek(-_TAIL_BYTES, os.SEEK_END)
    tail = file.read(_TAIL_BYTES)
    length = int.from_bytes(tail[:4], "little") + _TAIL_BYTES
    if tail[4:] not in (_MAGIC, _ENCRYPTED_MAGIC) or length + len(_MAGIC) > size:
        return None
    file.seek(-length, os.SEEK_END)
    return file.read(length)


def _not_parquet(path: Path, file: BinaryIO, size: int) -> ConfigError:
    file.seek(0)
    if file.read(len(_MAGIC)) == _MAGIC:
        return ConfigError(f"data.path {path} is a truncated Parquet file ({size} bytes, no footer); replace the file")
    return ConfigError(f"data.path {path} is not a Parquet file ({size} bytes); convert it or leave it out of the path")


def _require_same(schema: pa.Schema, path: str, other: pa.Schema, other_path: str) -> None:
    """ConfigError naming the first column that two files do not share; the order of columns is free."""
    for name in [*schema.names, *other.names]:
        kind, other_kind = _kind(schema, name), _kind(other, name)
        if kind != other_kind:
            raise ConfigError(
                f"data.path has files with different schemas: column {name} is {kind} in {path} and {other_kind} "
                f"in {other_path}; name the columns they share in data.columns, or rewrite one of them"
            )


def _kind(schema: pa.Schema, name: str) -> str:
    return str(schema.field(name).type) if name in schema.names else "missing"


def _require_registered(file: SourceFile) -> None:
    footer = _read_footer(Path(file.path))
    if (footer.size, footer.digest) != (file.size, file.digest):
        raise ConfigError(
            f"data.path {file.path} is not the registered file any more ({footer.size} bytes, registered with "
            f"{file.size}); restore it, or start another output.dir"
        )


def _open(path: str) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path, buffer_size=_STREAM_BYTES, pre_buffer=False, page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise RunFailed(f"data.path {path} cannot be opened ({_first_line(error)}); restore the file") from error


def _decoded(kind: pa.DataType) -> pa.DataType:
    """Dictionary types differ between files by index width alone; their values are what counts."""
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _as_table(batches: list[pa.RecordBatch], schema: pa.Schema) -> pa.Table:
    if not batches:
        return schema.empty_table()
    table = pa.Table.from_batches(batches).select(schema.names).cast(schema)
    return table.combine_chunks() if table.nbytes <= _MAX_COMBINED_BYTES else table


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
