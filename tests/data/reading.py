"""What the tests of all sources do with one: register its files, read everything."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from pipeline.data.source import Source, SourceFile, chunks_of
from pipeline.data.source import registered as register


def registered(source: Source) -> list[SourceFile]:
    """The source's files as a first run registers them."""
    return [register(ordinal, found, source.count) for ordinal, found in enumerate(source.find())]


def read_all(source: Source, chunk_rows: int = 4096) -> tuple[pa.Table, list[str | None]]:
    """All rows as one table, and the reason of each row that could not be read."""
    schema = source.schema()
    tables, reasons = [schema.empty_table()], []
    for file in registered(source):
        chunks = chunks_of(file, chunk_rows)
        for chunk, rows in zip(chunks, source.read(file, chunks), strict=True):
            assert rows.table.num_rows == chunk.num_rows
            assert rows.table.schema.equals(schema)
            rows.table.validate(full=True)
            tables.append(rows.table)
            reasons += [rows.errors.get(index) for index in range(chunk.num_rows)]
    return pa.concat_tables(tables), reasons


def rows_of(source: Source, chunk_rows: int = 4096) -> list[dict[str, Any]]:
    """All rows of a source that has no bad ones."""
    table, reasons = read_all(source, chunk_rows)
    assert not any(reasons)
    return table.to_pylist()
