"""Values that are not what their column's type says: text that is no UTF-8, decimals of too many digits.

Arrow hands them on unseen. In a Part they would keep other readers from a whole file (DuckDB refuses a query that
meets one), so they are taken out, and their rows are error rows that hold what was there.
"""

from __future__ import annotations

from collections.abc import Container, Iterator

import pyarrow as pa

from pipeline.data.files import first_line
from pipeline.data.json_rows import RAW_CHARACTERS
from pipeline.data.source import Rows


def checked_rows(table: pa.Table, file_name: str) -> Rows:
    """A chunk's rows, null in every value that is none, with the reason for its row."""
    errors: dict[int, str] = {}
    columns = []
    for name, column in zip(table.schema.names, table.itercolumns(), strict=True):
        if _reason(column) is None:
            columns.append(column)
            continue
        broken = dict(_broken_of(column))
        for index, (reason, raw) in broken.items():
            errors.setdefault(index, f"{file_name}: the value of {name} cannot be read ({reason}){raw}")
        columns.append(_without(column, broken.keys()))
    return Rows(pa.Table.from_arrays(columns, schema=table.schema) if columns else table, errors)


def _broken_of(column: pa.ChunkedArray) -> Iterator[tuple[int, tuple[str, str]]]:
    """Rows whose value is broken, with the reason and the value as text."""
    first = 0
    for chunk in column.chunks:
        for index, reason in _broken(chunk, 0, len(chunk)):
            yield first + index, (reason, _raw(chunk.slice(index, 1)))
        first += len(chunk)


def _broken(values: pa.Array, first: int, count: int) -> Iterator[tuple[int, str]]:
    """The broken ones of `count` values, found by halving, each with the reason."""
    # Copied, because a slice of lists has the elements of all of them.
    reason = _reason(pa.concat_arrays([values.slice(first, count)]))
    if reason is not None and count == 1:
        yield first, reason
    elif reason is not None:
        half = count // 2
        yield from _broken(values, first, half)
        yield from _broken(values, first + half, count - half)


def _reason(values: pa.Array | pa.ChunkedArray) -> str | None:
    """Why some of the values are not what their type says; None for good ones."""
    try:
        values.validate(full=True)
    except pa.ArrowInvalid as error:
        return "text that is not valid UTF-8" if "UTF8" in str(error) else first_line(error)
    return None


def _raw(value: pa.Array) -> str:
    """Text that is no UTF-8 with its wrong bytes escaped; nothing for values of other types."""
    if pa.types.is_string_view(value.type):
        raw = value.view(pa.binary_view())
    elif pa.types.is_string(value.type) or pa.types.is_large_string(value.type):
        raw = value.cast(pa.large_binary())
    else:
        return ""
    text = raw[0].as_py().decode("utf-8", "backslashreplace")
    return f"; it is: {text if len(text) <= RAW_CHARACTERS else text[:RAW_CHARACTERS] + '...'}"


def _without(column: pa.ChunkedArray, rows: Container[int]) -> pa.ChunkedArray:
    """The column with null in these rows."""
    first, chunks = 0, []
    for chunk in column.chunks:
        kept = [
            pa.nulls(1, chunk.type) if first + index in rows else chunk.slice(index, 1) for index in range(len(chunk))
        ]
        chunks.append(pa.concat_arrays(kept) if kept else chunk)
        first += len(chunk)
    return pa.chunked_array(chunks, column.type)
