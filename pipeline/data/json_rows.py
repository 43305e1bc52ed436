"""Lines to rows of a fixed schema: whole batches by Arrow, line by line where that does not go."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json as pj

from pipeline.data.json_values import Unfit, coerce_row, parse_object
from pipeline.data.lines import LONG_LINE_BYTES, Line, LongLine
from pipeline.data.source import Rows

RAW_CHARACTERS = 65_536
"""How much of a line that is no row its error keeps."""
_BATCH_ROWS = 512
_BATCH_BYTES = 4 * 2**20
_WHITE = b" \t\r\n"


class RowParser:
    """Makes rows of one file's lines. Both ways of parsing give the same row for a line, whatever is beside it."""

    def __init__(self, schema: pa.Schema, file_name: str, *, ignore_others: bool) -> None:
        """`ignore_others`: keys that are no column are passed over; they make an error row otherwise."""
        self._schema = schema
        self._file_name = file_name
        self._coerce = coerce_row(schema, ignore_others=ignore_others)
        # Passing keys over, Arrow accepts there what is no valid row (repeated keys, numbers without bound).
        self._by_arrow = bool(schema.names) and not ignore_others
        self._options = pj.ParseOptions(explicit_schema=schema, unexpected_field_behavior="error")

    def rows(self, lines: Iterable[Line]) -> Rows:
        """One row for each line, in order; no more than a batch of lines is held at a time."""
        tables: list[pa.Table] = []
        errors: dict[int, str] = {}
        done = 0
        for batch in _batches(lines):
            table = self._whole(batch) if self._by_arrow else None
            if table is None:
                table = self._each(batch, done, errors)
            tables.append(table)
            done += len(batch)
        table = pa.concat_tables(tables) if tables else self._schema.empty_table()
        return Rows(table.combine_chunks() if table.nbytes < 2**31 else table, errors)

    def _whole(self, batch: Sequence[Line]) -> pa.Table | None:
        """The batch as Arrow reads it; None where a line of it is, or may be, something that Arrow sees otherwise."""
        if any(isinstance(line, LongLine) for _, line in batch):
            return None
        texts = [line.strip(_WHITE) for _, line in batch]
        # Arrow takes objects as they come, not lines: only between "}" and "{" is a line end between two objects.
        if not all(text.startswith(b"{") and text.endswith(b"}") for text in texts):
            return None
        data = b"\n".join(texts)
        try:
            data.decode("utf-8")
            table = pj.read_json(
                io.BytesIO(data),
                read_options=pj.ReadOptions(use_threads=False, block_size=len(data) + 1),
                parse_options=self._options,
            )
        except (UnicodeDecodeError, pa.ArrowException):
            return None
        if table.num_rows != len(batch) or not all(_all_finite(column) for column in table.itercolumns()):
            return None
        return table.select(self._schema.names).cast(self._schema)

    def _each(self, batch: Sequence[Line], first: int, errors: dict[int, str]) -> pa.Table:
        """The batch line by line; an error row for each line that is no object or does not fit."""
        rows: list[dict[str, Any]] = []
        for index, (number, line) in enumerate(batch, first):
            try:
                rows.append(self._coerce(parse_object(line)))
            except Unfit as reason:
                errors[index] = f"{self._file_name}, line {number}: {reason}; the line: {_raw(line)}"
                rows.append({})
        return pa.Table.from_pylist(rows, schema=self._schema)


def _batches(lines: Iterable[Line]) -> Iterator[Sequence[Line]]:
    """So small that a bad line slows down few others; not much more than 4 MiB unless one line is."""
    batch: list[Line] = []
    size = 0
    for line in lines:
        if batch and (len(batch) == _BATCH_ROWS or size + len(line[1]) > _BATCH_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(line)
        size += len(line[1])
    if batch:
        yield batch


def _all_finite(column: pa.Array | pa.ChunkedArray) -> bool:
    """Whether no number in it, however deep, came out as NaN or infinite (Arrow reads "NaN" and 400 digits so)."""
    kind = column.type
    if pa.types.is_floating(kind):
        return pc.all(pc.is_finite(column), min_count=0).as_py() is not False
    if pa.types.is_list(kind):
        return _all_finite(pc.list_flatten(column))
    if pa.types.is_struct(kind):
        chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
        return all(_all_finite(field) for chunk in chunks for field in chunk.flatten())
    return True


def _raw(line: bytes) -> str:
    text = line[:LONG_LINE_BYTES].decode("utf-8", "backslashreplace")
    length = line.length if isinstance(line, LongLine) else len(line)
    if len(text) <= RAW_CHARACTERS and length <= LONG_LINE_BYTES:
        return text
    return f"{text[:RAW_CHARACTERS]}... ({length:,} bytes in all)"
