"""Values that are not what their type says: out of the table, each with the reason for its row."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from reading import read_all

from pipeline.data.broken_values import checked_rows
from pipeline.data.parquet import ParquetSource

BYTES = [b"a", b"\xff\xfe", None, b"b" * 70_000 + b"\xe9", b"c"]
GOOD = [0, 2, 4]


def texts(kind: pa.DataType, values: Sequence[bytes | None] = BYTES) -> pa.Array:
    """Text whose bytes nobody has checked."""
    binary = pa.array(values, pa.large_binary() if pa.types.is_large_string(kind) else pa.binary())
    return pa.Array.from_buffers(kind, len(values), binary.buffers(), binary.null_count)


def coded(indices: pa.DataType, kind: pa.DataType | None = None) -> pa.Array:
    """The same as a dictionary column: pandas makes one with indices of 8 bits of its categories."""
    values = texts(kind or pa.string(), [value for value in BYTES if value is not None])
    return pa.DictionaryArray.from_arrays(pa.array([0, 1, None, 2, 3], indices), values)


def viewed() -> pa.Array:
    """The same with the bytes elsewhere, as Polars has it."""
    return pa.Array.from_buffers(pa.string_view(), len(BYTES), pa.array(BYTES, pa.binary_view()).buffers(), 1)


SHAPES: dict[str, Callable[[], pa.Array]] = {
    "string": lambda: texts(pa.string()),
    "large_string": lambda: texts(pa.large_string()),
    "struct": lambda: pa.StructArray.from_arrays([texts(pa.string())], ["k"]),
    "list": lambda: pa.ListArray.from_arrays(pa.array(range(6), pa.int32()), texts(pa.string())),
    "map": lambda: pa.MapArray.from_arrays(pa.array(range(6), pa.int32()), pa.array(range(5)), texts(pa.string())),
    "string of a dictionary": lambda: coded(pa.int32()),
    "string of a narrow dictionary": lambda: coded(pa.int8()),
    "large_string of a wide dictionary": lambda: coded(pa.int64(), pa.large_string()),
    "struct of a dictionary": lambda: pa.StructArray.from_arrays([coded(pa.int8())], ["k"]),
    "list of a dictionary": lambda: pa.ListArray.from_arrays(pa.array(range(6), pa.int32()), coded(pa.int8())),
    "string_view": viewed,
    "list of string_view": lambda: pa.ListArray.from_arrays(pa.array(range(6), pa.int32()), viewed()),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("chunk_rows", [1, 3, 5])
def test_text_that_is_no_utf8_is_null_and_a_reason(tmp_path: Path, shape: str, chunk_rows: int) -> None:
    column = SHAPES[shape]()
    pq.write_table(pa.table({"id": range(5), "v": column}), tmp_path / "x.parquet")
    table, reasons = read_all(ParquetSource(str(tmp_path / "x.parquet")), chunk_rows)
    assert table["id"].to_pylist() == list(range(5)), "the row's other values stay"
    assert [index for index, reason in enumerate(reasons) if reason is None] == GOOD
    assert [table["v"][row].as_py() for row in GOOD] == [column[row].as_py() for row in GOOD]
    assert table["v"][1].as_py() is None and table["v"][3].as_py() is None
    assert reasons[1] is not None and "x.parquet: the value of v cannot be read (text that is not valid" in reasons[1]
    if shape.startswith(("string", "large_string")):
        assert reasons[1].endswith(r"it is: \xff\xfe")
        assert reasons[3] is not None and len(reasons[3]) < 66_000


def test_other_values_that_are_none(tmp_path: Path) -> None:
    """A decimal with more digits than its type has, in the second of two pieces."""
    fits = pa.array([1, 2], pa.decimal128(3, 0))
    raw = struct.pack("<qqqq", 7, 0, 1000, 0)
    wrong = pa.Array.from_buffers(pa.decimal128(3, 0), 2, [None, pa.py_buffer(raw)])
    rows = checked_rows(pa.table({"v": pa.chunked_array([fits, wrong])}), "x")
    assert rows.table["v"].to_pylist() == [1, 2, 7, None]
    assert list(rows.errors) == [3] and "precision" in rows.errors[3]


def test_a_whole_table_is_handed_on_as_it_is() -> None:
    table = pa.table({"v": ["a", None], "w": [[1], []]})
    assert checked_rows(table, "x").table.equals(table)
    assert not checked_rows(table, "x").errors
