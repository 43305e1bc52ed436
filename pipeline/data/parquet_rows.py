"""The rows of one Parquet file, decoded a batch at a time, and what is said where they cannot be."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.files import Located, first_line
from pipeline.data.schemas import listed
from pipeline.errors import ConfigError, RunFailed

_BATCH_BYTES = 16 * 2**20  # decoded bytes that one batch aims at
_MAX_BATCH_ROWS = 8192
_STREAM_BYTES = 2**20  # read-ahead per column; 0 would load each column of a row group whole
_REMOTE_STREAM_BYTES = 8 * 2**20  # the same where every read is a request


def open_rows(file: Located, dictionaries: Sequence[str]) -> pq.ParquetFile:
    """A file to decode, page checksums checked, with `dictionaries` (paths of leaf columns) as such.

    Raises RunFailed where it cannot be opened.
    """
    stream = _STREAM_BYTES if file.fs is None else _REMOTE_STREAM_BYTES
    where = file.key if file.fs is None else file.open(in_order=False)
    try:
        return pq.ParquetFile(
            where,
            buffer_size=stream,
            pre_buffer=False,
            page_checksum_verification=True,
            read_dictionary=list(dictionaries),
        )
    except (pa.ArrowException, OSError) as error:
        raise RunFailed(f"data.path {file.path} cannot be opened ({first_line(error)}); restore the file") from error


class RowCursor:
    """A position in one file's rows that moves forward by decoding and jumps by row group."""

    def __init__(self, reader: pq.ParquetFile, columns: list[str], file: Located) -> None:
        """At the first row of some columns of an open file."""
        self._reader = reader
        self._columns = columns
        self._file = file
        metadata = reader.metadata
        sizes = (metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))
        self._starts = list(accumulate(sizes, initial=0))  # first row of each group, then the number of rows
        self._position = 0  # the row that `_rest`, and after it `_batches`, goes on with
        self._group = -1
        self._group_end = 0
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._rest: pa.RecordBatch | None = None

    def take(self, first: int, count: int) -> list[pa.RecordBatch]:
        """Rows first .. first + count - 1, as slices of the decoded batches.

        Raises ConfigError where they cannot be decoded, RunFailed where the file cannot be read or has changed.
        """
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
        self._batches = self._decoded(self._columns)

    def _decoded(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Some columns of the open row group, from its first row on."""
        batches: Iterator[pa.RecordBatch] = self._reader.iter_batches(
            batch_size=self._batch_rows(), row_groups=[self._group], columns=list(columns)
        )
        return batches

    def _batch_rows(self) -> int:
        group = self._reader.metadata.row_group(self._group)
        row_bytes: int = max(1, group.total_byte_size // group.num_rows)
        return min(max(1, _BATCH_BYTES // row_bytes), _MAX_BATCH_ROWS)

    def _decode(self) -> pa.RecordBatch:
        try:
            batch = next(self._batches, None)
        except (pa.ArrowException, OSError) as error:
            self._file.require_unchanged()
            raise self._broken(error) from error
        if batch is None or not batch.num_rows:
            raise ConfigError(self._sentence("", f"it ends at row {self._position} of the file"))
        return batch

    def _broken(self, error: Exception) -> ConfigError | RunFailed:
        """The row group is not to be decoded, with the columns that it fails in, or is not to be had."""
        if not _is_of_content(error):
            return RunFailed(self._sentence("", first_line(error)))
        failing = [name for name in self._columns if self._fails(name)]
        columns = f", column{'s' if len(failing) > 1 else ''} {listed(failing)}," if failing else ""
        return ConfigError(self._sentence(columns, first_line(error)))

    def _fails(self, column: str) -> bool:
        try:
            for _ in self._decoded([column]):
                pass
        except (pa.ArrowException, OSError):
            return True
        return False

    def _sentence(self, columns: str, reason: str) -> str:
        return (
            f"data.path {self._file.path}: row group {self._group}{columns} cannot be read ({reason}); restore the "
            "file and run the same command again, or start another output.dir without the file, or without the column "
            "by data.columns"
        )


def _is_of_content(error: Exception) -> bool:
    """Whether pyarrow cannot make anything of the bytes; else they could not be had, or there is no memory for them."""
    if isinstance(error, pa.ArrowMemoryError):
        return False
    return not isinstance(error, OSError) or (type(error) is OSError and error.errno is None)
