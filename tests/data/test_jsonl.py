"""The JSON lines source against DuckDB, against itself on its two ways of parsing, and on files that are broken."""

from __future__ import annotations

import gzip
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reading import read_all, registered, rows_of

from pipeline.data import json_rows, json_values, jsonl, lines
from pipeline.data.json_rows import RAW_CHARACTERS, RowParser
from pipeline.data.jsonl import JsonlSource
from pipeline.data.source import chunks_of
from pipeline.errors import ConfigError, RunFailed

ROOT = Path(lines.__file__).parents[2]
BAD = {
    "half": b'{"a": 1, "s": "x',
    "word": b"hello",
    "number": b"17",
    "list": b'[{"a": 1}]',
    "null": b"null",
    "nan": b'{"a": NaN}',
    "infinite": b'{"d": -Infinity}',
    "too large": b'{"d": 1e400}',
    "endless": b'{"d": ' + b"9" * 5000 + b"}",
    "beyond int64": b'{"a": 9223372036854775808}',
    "fraction": b'{"a": 1.0}',
    "boolean": b'{"a": true}',
    "other type": b'{"s": 1}',
    "other type inside": b'{"o": {"k": "x"}}',
    "element": b'{"l": ["x", 1]}',
    "repeated": b'{"a": 1, "a": 2}',
    "repeated inside": b'{"o": {"k": 1, "k": 1}}',
    "unknown": b'{"a": 1, "other": "x"}',
    "unknown inside": b'{"o": {"other": 1}}',
    "two": b'{"a": 1}{"a": 2}',
    "behind": b'{"a": 1} x',
    "comma": b'{"a": 1},',
    "trailing comma": b'{"a": 1,}',
    "quotes": b"{'a': 1}",
    "comment": b'{"a": 1} // one',
    "not UTF-8": b'{"s": "\xff"}',
    "encoded surrogate": b'{"s": "\xed\xa0\x80"}',
    "half surrogate": b'{"s": "\\ud800"}',
    "other half": b'{"s": "x\\uDC00"}',
    "half surrogate key": b'{"\\ud800": 1}',
    "control": b'{"s": "a\tb"}',
    "NUL": b'{"s": "a\x00b"}',
    "NUL behind": b'{"a": 1}\x00',
    "deep": b'{"l": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "UTF-16": '{"a": 1}'.encode("utf-16-le"),
    "later BOM": b'\xef\xbb\xbf{"a": 1}',
}
GOOD: list[tuple[bytes, dict[str, Any]]] = [
    (b'{"a": 1, "s": "x", "d": 0.5, "o": {"k": 1, "t": [{"u": "v"}]}, "l": ["p"], "b": true}',
     {"a": 1, "s": "x", "d": 0.5, "o": {"k": 1, "t": [{"u": "v"}]}, "l": ["p"], "b": True}),
    (b"{}", {}),
    (b' {"s" : "NUL \\u0000, \\ud83d\\ude00"}\t', {"s": "NUL \0, \U0001f600"}),
    (b'{"o": {}, "l": []}', {"o": {"k": None, "t": None}, "l": []}),
    (b'{"l": [null], "o": {"t": null}, "a": null}', {"l": [None], "o": {"k": None, "t": None}}),
    ('{"s": "ü€", "a": -9223372036854775808, "d": 3}'.encode(), {"s": "ü€", "a": -(2**63), "d": 3.0}),
    (b'{"other": null, "empty": {}}', {}),
    (b'{"\\u0061": 5}', {"a": 5}),
    (b'{"d": 1e-400, "a": -0}', {"d": 0.0, "a": 0}),
]  # fmt: skip
COLUMNS = ("a", "s", "d", "o", "l", "b")
BLANK = (b"", b"   ", b"\t", b"\r")


def source_of(folder: Path, content: bytes, name: str = "x.jsonl", **options: Any) -> JsonlSource:
    (folder / name).write_bytes(content)
    return JsonlSource(str(folder / name), **options)


def full(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row.get(name) for name in COLUMNS}


def compressed(content: bytes, suffix: str) -> bytes:
    """In two members, as appending to a compressed file leaves it."""
    half = len(content) // 2
    if suffix == ".gz":
        return gzip.compress(content[:half]) + gzip.compress(content[half:])
    if suffix == ".zst":
        return b"".join(pa.compress(part, codec="zstd", asbytes=True) for part in (content[:half], content[half:]))
    return content


# Rows


SELECT = """
    select i, i / 4 as half, 's' || i as word, case when i % 3 = 0 then null else i % 2 = 0 end as even,
        [i, null, i + 1] as list, {'x': i, 'y': {'z': ['é' || i]}} as deep, [{'a': i}, {'a': null}] as structs,
        date '2024-01-01' + i::int as day
    from range(5000) t(i)
"""


@pytest.mark.parametrize("name", ["x.jsonl", "x.ndjson.gz", "x.json.zst"])
def test_duckdb_writes_and_reads_the_same_rows(tmp_path: Path, name: str) -> None:
    options = {"x.jsonl": "", "x.ndjson.gz": ", compression gzip", "x.json.zst": ", compression zstd"}[name]
    duckdb.sql(f"copy ({SELECT}) to '{tmp_path / name}' (format json{options})")
    table, reasons = read_all(JsonlSource(str(tmp_path / name)), 700)
    assert not any(reasons)
    query = f"select * replace (day::text as day) from read_json('{tmp_path / name}', format = 'newline_delimited')"
    oracle = duckdb.sql(query).fetchall()
    assert [tuple(row.values()) for row in table.to_pylist()] == oracle
    assert str(table.schema.field("day").type) == "string"


@settings(max_examples=120, deadline=None)
@given(
    picks=st.lists(st.sampled_from([*GOOD, *BAD.items(), *BLANK]), max_size=60),
    chunk_rows=st.integers(1, 30),
    batch_rows=st.integers(1, 20),
    block_bytes=st.sampled_from([1, 7, 64, 1000, 2**20]),
    end=st.sampled_from([b"\n", b"\r\n"]),
    last=st.booleans(),
    bom=st.booleans(),
    suffix=st.sampled_from(["", ".gz", ".zst"]),
    order=st.randoms(use_true_random=False),
)
def test_rows_out_are_rows_in_for_any_mixture(
    picks: list[Any], chunk_rows: int, batch_rows: int, block_bytes: int, end: bytes, last: bool, bom: bool,
    suffix: str, order: random.Random,
) -> None:  # fmt: skip
    first = [GOOD[0]]  # so that the schema is what the other lines are made for
    contents = [pick if isinstance(pick, bytes) else pick[isinstance(pick[0], str)] for pick in [*first, *picks]]
    wanted = [pick for pick in [*first, *picks] if not isinstance(pick, bytes)]
    text = (b"\xef\xbb\xbf" if bom else b"") + end.join(contents) + (end if last else b"")
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "_BLOCK_BYTES", block_bytes)
        patch.setattr(lines, "_STRIDE_BYTES", 10)
        patch.setattr(json_rows, "_BATCH_ROWS", batch_rows)
        patch.setattr("pipeline.data.jsonl.SAMPLE_ROWS", 1)
        source = source_of(Path(folder), compressed(text, suffix), f"x.jsonl{suffix}")
        table, reasons = read_all(source, chunk_rows)
        assert table.num_rows == len(wanted)
        for pick, row, reason in zip(wanted, table.to_pylist(), reasons, strict=True):
            if isinstance(pick[0], str):
                assert row == full({})
                assert reason is not None and reason.startswith("x.jsonl")
                assert pick[1].strip()[:50].decode("utf-8", "backslashreplace") in reason
            else:
                assert reason is None
                assert row == full(pick[1])
        (file,) = registered(source)
        chunks = chunks_of(file, chunk_rows)
        order.shuffle(chunks)
        for chunk, rows in zip(chunks, source.read(file, chunks), strict=True):
            assert rows.table.equals(table.slice(chunk.first_row, chunk.num_rows))
            assert [rows.errors.get(i) for i in range(chunk.num_rows)] == reasons[
                chunk.first_row : chunk.first_row + chunk.num_rows
            ]


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_line_names_file_line_and_reason_and_keeps_its_text(tmp_path: Path, kind: str) -> None:
    content = b"\n".join([GOOD[0][0], b"", BAD[kind], GOOD[1][0]])
    source = source_of(tmp_path, content)
    source.fix_schema(json_values.infer_schema([json.loads(GOOD[0][0])]))
    table, reasons = read_all(source)
    assert [reason is None for reason in reasons] == [True, False, True]
    assert table.to_pylist()[1] == full({})
    reason = reasons[1]
    assert reason is not None
    assert reason.startswith("x.jsonl, line 3: ")
    raw = BAD[kind].decode("utf-8", "backslashreplace")
    assert reason.endswith(f"; the line: {raw}") or (len(raw) > RAW_CHARACTERS and "bytes in all)" in reason)
    assert len(reason) < RAW_CHARACTERS + 500
    assert reason.encode("utf-8")


MIB = 2**20


def test_a_line_beyond_the_longest_is_an_error_row_of_bounded_size(tmp_path: Path) -> None:
    long, just = b'{"a": "' + b"x" * 50_000_000 + b'"}', b'{"a": "' + b"y" * (lines.MAX_LINE_BYTES - 9) + b'"}'
    source = source_of(tmp_path, b'{"a": "b"}\n' + long + b"\n" + just + b"\n" + b'{"a": "c"}')
    table, reasons = read_all(source)
    assert [len(value) if value else None for value in table["a"].to_pylist()] == [
        1, None, lines.MAX_LINE_BYTES - 9, 1,
    ]  # fmt: skip
    assert reasons[1] is not None
    assert "longer than 32 MiB" in reasons[1]
    assert reasons[1].endswith("xxx... (50,000,009 bytes in all)")
    assert len(reasons[1]) < RAW_CHARACTERS + 200


@pytest.mark.parametrize(
    "line", [b'{"a": "x"}' + b" " * 33 * MIB, b" " * 33 * MIB + b'{"a": "x"}', b"\xef\xbb\xbf" + b"x" * 33 * MIB]
)
@pytest.mark.parametrize("place", [0, 1])
def test_a_line_is_too_long_wherever_its_blanks_are(tmp_path: Path, line: bytes, place: int) -> None:
    content = [b'{"a": "b"}', b'{"a": "c"}']
    content.insert(place, line)
    _, reasons = read_all(source_of(tmp_path, b"\n".join(content)))
    assert [reason is None for reason in reasons] == [index != place for index in range(3)]
    assert f"line {place + 1}: it is longer than 32 MiB" in str(reasons[place])


def test_blanks_are_no_row_however_many(tmp_path: Path) -> None:
    assert rows_of(source_of(tmp_path, b" " * 40 * MIB + b'\n{"a": 1}\n' + b"\t" * 40 * MIB)) == [{"a": 1}]


def test_a_repeated_key_is_found_quickly_among_many() -> None:
    line = b'{"o": {' + b", ".join(b'"%d": 1' % n for n in [*range(300_000), 299_999]) + b"}}"
    started = time.monotonic()
    with pytest.raises(json_values.Unfit, match="key 299999 twice"):
        RowParser(pa.schema([("o", pa.int64())]), "x", ignore_others=False)._coerce(json_values.parse_object(line))
    assert time.monotonic() - started < 20


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("asdolbktu"), inner, max_size=3),
    max_leaves=8,
)
SPLICES = [
    *(bytes([byte]) for byte in b'{}[],:"\\0+ \t\x00\xff'),
    *(b"-0", b".5", b"1e9", b"NaN", b"9" * 400, b"null", b'"a":1', b'{"a":1}', b"\\ud800", b"\xef\xbb\xbf", b"//"),
]


@st.composite
def nearly_json(draw: st.DrawFn) -> bytes:
    """A good line, or any object, with a few bytes replaced."""
    line = draw(st.sampled_from([good for good, _ in GOOD]) | values.map(
        lambda value: json.dumps({"o": value, "d": value} if not isinstance(value, dict) else value).encode()
    ))  # fmt: skip
    for _ in range(draw(st.integers(0, 2))):
        at = draw(st.integers(0, len(line)))
        line = line[:at] + draw(st.sampled_from(SPLICES)) + line[at + draw(st.integers(0, 2)) :]
    return line.replace(b"\n", b" ")


@settings(max_examples=400, deadline=None)
@given(st.lists(nearly_json(), min_size=1, max_size=4))
def test_arrow_and_python_read_a_line_alike(texts: list[bytes]) -> None:
    parser = RowParser(json_values.infer_schema([json.loads(GOOD[0][0])]), "x", ignore_others=False)
    batch = list(enumerate(texts, 1))
    whole = parser._whole(batch)
    if whole is None:
        return
    errors: dict[int, str] = {}
    each = parser._each(batch, 0, errors)
    assert not errors
    assert repr(whole.to_pylist()) == repr(each.to_pylist())


def test_good_batches_are_read_by_arrow_and_a_bad_line_slows_only_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    each: list[int] = []
    original = RowParser._each
    spy = lambda self, batch, *rest: each.append(len(batch)) or original(self, batch, *rest)  # noqa: E731
    monkeypatch.setattr(RowParser, "_each", spy)
    parser = RowParser(pa.schema([("a", pa.int64())]), "x", ignore_others=False)
    texts = [(n, b'{"a": %d}' % n) for n in range(2000)]
    texts[700] = (700, b"no")
    rows = parser.rows(texts)
    assert each == [512]
    assert rows.table["a"].to_pylist() == [n if n != 700 else None for n in range(2000)]
    assert list(rows.errors) == [700]


# The schema


def types(source: JsonlSource) -> dict[str, str]:
    return {field.name: str(field.type) for field in source.schema()}


def test_the_schema_widens_numbers_and_joins_objects(tmp_path: Path) -> None:
    rows = [
        {"n": 1, "z": None, "o": {"a": 1}, "l": [], "e": {}, "ll": [[1], [2.5]], "m": 1},
        {"n": 2.5, "z": None, "o": {"b": "x", "e": {}}, "l": [{"c": 1}, {"d": True}], "e": {}, "late": "x", "m": "x"},
    ]
    source = source_of(tmp_path, "\n".join(map(json.dumps, rows)).encode())
    assert types(source) == {
        "n": "double", "z": "string", "o": "struct<a: int64, b: string>", "l": "list<item: struct<c: int64, d: bool>>",
        "ll": "list<item: list<item: double>>", "m": "int64", "late": "string",
    }  # fmt: skip
    table, reasons = read_all(source)
    assert table["n"].to_pylist() == [1.0, None]
    assert reasons[1] is not None
    assert "m is a string, and the column's type is int64" in reasons[1]


def test_every_file_has_its_share_in_the_schema(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.data.jsonl.SAMPLE_ROWS", 4)
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n{"a": 2}\n{"a": 3, "x": 1}\n')
    (tmp_path / "b.jsonl").write_text('{"b": 1}\n')
    source = JsonlSource(str(tmp_path))
    assert types(source) == {"a": "int64", "b": "int64"}
    _, reasons = read_all(source)
    assert [reason is None for reason in reasons] == [True, True, False, True]
    assert "the key x is not among those of the run's first rows" in str(reasons[2])


def test_a_fixed_schema_is_held_to_without_looking_at_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = source_of(tmp_path, b'{"a": "text"}\n{"b": 1}')
    source.fix_schema(pa.schema([("a", pa.int64()), ("b", pa.int64())]))
    monkeypatch.setattr(JsonlSource, "_sample", lambda self: pytest.fail("looked at rows"))
    assert types(source) == {"a": "int64", "b": "int64"}
    table, reasons = read_all(source)
    assert table.to_pylist() == [{"a": None, "b": None}, {"a": None, "b": 1}]
    assert "a is a string" in str(reasons[0])


def test_columns_are_taken_in_the_order_asked_for_and_the_rest_is_not_looked_at(tmp_path: Path) -> None:
    content = b'{"a": 1, "b": {"c": 2}, "x": 1}\n{"b": {"c": 3}, "x": "other type", "y": 1}\n{"b": {"c": 1, "d": 2}}'
    source = source_of(tmp_path, content, columns=["b", "a"])
    source.fix_schema(pa.schema([("b", pa.struct([("c", pa.int64())])), ("a", pa.int64())]))
    table, reasons = read_all(source)
    assert table.to_pylist() == [{"b": {"c": 2}, "a": 1}, {"b": {"c": 3}, "a": None}, {"b": None, "a": None}]
    assert "the key b.d is not among" in str(reasons[2])
    assert JsonlSource(str(tmp_path), ["b", "a"]).schema().names == ["b", "a"]
    with pytest.raises(ConfigError, match=r"data\.columns names nope, .*; the keys there are a, b, x, y"):
        JsonlSource(str(tmp_path), ["nope"]).schema()


def nested(depth: int, begin: str, end: str) -> bytes:
    return b'{"a": 1, "d": ' + (begin * depth + "1" + end * depth).encode() + b"}"


@pytest.mark.parametrize(("begin", "end"), [("[", "]"), ('{"k": ', "}")], ids=["lists", "objects"])
def test_what_is_nested_deeper_than_parquet_can_be_read_makes_no_column(tmp_path: Path, begin: str, end: str) -> None:
    for depth, is_column in ((json_values.MAX_DEPTH - 1, True), (json_values.MAX_DEPTH, False)):
        source = source_of(tmp_path, b'{"a": 1}\n' + nested(depth, begin, end))
        assert source.schema().names == (["a", "d"] if is_column else ["a"])
        table, reasons = read_all(source)
        assert [reason is None for reason in reasons] == [True, is_column]
        pq.write_table(table, tmp_path / "x.parquet")
        assert pq.read_table(tmp_path / "x.parquet").equals(table)
        if begin != "[":  # DuckDB takes twice as long for each further list
            assert len(duckdb.sql(f"select * from '{tmp_path / 'x.parquet'}'").fetchall()) == 2


def test_too_many_keys_are_refused_unless_they_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (json_values, jsonl):
        monkeypatch.setattr(module, "MAX_KEYS", 20)
    content = b"\n".join(b'{"a": %d, "m": {"k%d": 1}, "l": [{"k%d": 2}]}' % (n, n, n % 3) for n in range(20))
    with pytest.raises(ConfigError, match=r"more than 20 different keys .*, most of them in m; .* data\.columns"):
        source_of(tmp_path, content).schema()
    assert rows_of(source_of(tmp_path, content, columns=["a"])) == [{"a": n} for n in range(20)]
    one = b'{"a": 1}\n{"a": 1, "m": {' + b", ".join(b'"%d": 1' % n for n in range(20)) + b'}}\n{"a": 2}'
    table, reasons = read_all(source_of(tmp_path, one))
    assert [reason is None for reason in reasons] == [True, False, True]
    assert table.to_pylist() == [{"a": 1}, {"a": None}, {"a": 2}]
    with pytest.raises(ConfigError, match=r"no JSON object .*line 1: it has more than .* keys, .*data\.columns"):
        source_of(tmp_path, one.splitlines()[1]).schema()


def test_objects_of_thousands_of_keys_are_read_in_seconds(tmp_path: Path) -> None:
    content = b"\n".join(
        b'{"m": {' + b", ".join(b'"%d": %d.5' % (k, n) for k in range(9 * n, 9 * n + 9)) + b"}}" for n in range(1000)
    )
    started = time.monotonic()
    table, reasons = read_all(source_of(tmp_path, content))
    assert not any(reasons)
    assert table["m"][999].as_py()["8999"] == 999.5
    assert time.monotonic() - started < 20


# Files


def test_a_folder_gives_all_suffixes_and_nothing_else(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b/c.ndjson.gz", "d.json.zst", "_e.jsonl", "f.txt", "g.parquet", "h.jsonl.bz2"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(compressed(b'{"a": 1}\n', Path(name).suffix))
    source = JsonlSource(str(tmp_path))
    assert [(file.name, file.rows) for file in source.find()] == [
        ("a.jsonl", None), ("b/c.ndjson.gz", None), ("d.json.zst", None),
    ]  # fmt: skip
    assert rows_of(source) == [{"a": 1}] * 3


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf", b"  \r\n\t\n"])
def test_nothing_but_blank_lines_is_no_rows(tmp_path: Path, content: bytes) -> None:
    source = source_of(tmp_path, content)
    assert registered(source)[0].rows == 0
    assert source.schema().names == []
    assert source_of(tmp_path, content, columns=["a"]).schema() == pa.schema([("a", pa.string())])


def test_a_file_without_an_object_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"x\.jsonl has no JSON object .*\(line 1: it is a list, not an object\)"):
        source_of(tmp_path, b'[1, 2]\n"x"\n').schema()


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_compressed_file_cut_short_is_refused(tmp_path: Path, suffix: str) -> None:
    whole = compressed(b"\n".join(b'{"a": %d}' % random.randrange(10**9) for _ in range(3000)), suffix)
    source = source_of(tmp_path, whole[: -len(whole) // 4], f"x.jsonl{suffix}")
    (found,) = source.find()
    with pytest.raises(ConfigError, match=r"x\.jsonl.* cannot be read \(") as error:
        source.count(found)
    assert "\n" not in str(error.value)


def test_a_changed_file_is_refused(tmp_path: Path) -> None:
    source = source_of(tmp_path, b'{"a": 1}\n{"a": 2}\n')
    (file,) = registered(source)
    (tmp_path / "x.jsonl").write_bytes(b'{"a": 1}\n{"a": 3}\n')
    with pytest.raises(ConfigError, match=r"x\.jsonl is not the registered file any more"):
        next(iter(source.read(file, chunks_of(file, 5))))


def overwritten(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(b"x" * 1000)


def replaced(path: Path) -> None:
    other = path.with_suffix(".other")
    other.write_bytes(b'{"a": -1}\n' * 50_000)
    other.replace(path)


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize(
    "change", [lambda path: os.truncate(path, 1000), overwritten, replaced], ids=["cut", "in", "new"]
)
def test_a_file_that_changes_while_it_is_read_stops_the_run_before_a_wrong_row(
    change: Callable[[Path], None], suffix: str, tmp_path: Path
) -> None:
    content = b"".join(b'{"a": %d}\n' % n for n in range(300_000))
    source = source_of(tmp_path, gzip.compress(content, 1) if suffix else content, f"x.jsonl{suffix}")
    (file,) = registered(source)
    parts = source.read(file, chunks_of(file, 1000))
    assert next(parts).table["a"].to_pylist() == list(range(1000))
    change(tmp_path / f"x.jsonl{suffix}")
    with pytest.raises(RunFailed, match=r"x\.jsonl.* has been written to while it was read .*; restore it"):
        next(parts)


def test_a_file_that_is_removed_while_it_is_read_is_read_to_its_end(tmp_path: Path) -> None:
    source = source_of(tmp_path, b"".join(b'{"a": %d}\n' % n for n in range(300_000)))
    (file,) = registered(source)
    parts = source.read(file, chunks_of(file, 100_000))
    tables = [next(parts).table]
    (tmp_path / "x.jsonl").unlink()
    tables += [part.table for part in parts]
    assert pa.concat_tables(tables)["a"].to_pylist() == list(range(300_000))


def test_going_to_a_chunk_reads_little_of_a_plain_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "_BLOCK_BYTES", 1000)
    monkeypatch.setattr(lines, "_STRIDE_BYTES", 5000)
    source = source_of(tmp_path, b"".join(b'{"a": %d}\n\n' % n for n in range(20_000)))
    assert source.schema().names == ["a"]
    (file,) = registered(source)
    read: list[int] = []
    original = lines.LineReader._read
    monkeypatch.setattr(lines.LineReader, "_read", lambda self: read.append(1) or original(self))
    chunks = chunks_of(file, 100)
    wanted = [chunks[150], chunks[3], chunks[4], chunks[199]]
    for chunk, rows in zip(wanted, source.read(file, wanted), strict=True):
        assert rows.table["a"].to_pylist() == list(range(chunk.first_row, chunk.first_row + 100))
    assert len(read) < 40


MEMORY = """
import re, sys
from pipeline.data.jsonl import JsonlSource
from pipeline.data.source import chunks_of, registered
source = JsonlSource(sys.argv[1])
source.schema()
# What getrusage tells begins with the peak of the process that started this one.
rss = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
before = rss()
(found,) = source.find()
file = registered(0, found, source.count)
rows = sum(part.table.num_rows for part in source.read(file, chunks_of(file, 4096)))
print(rows, (rss() - before) // 1024)
"""


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    line = json.dumps({"id": 1, "prompt": "some words " * 90, "tags": ["a", "b"]}).encode() + b"\n"
    with path.open("wb") as file:
        for _ in range(300):
            file.write(line * (1_000_000 // len(line)))
    grown = subprocess.run(
        [sys.executable, "-c", MEMORY, str(path)], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    rows, mebibytes = map(int, grown.stdout.split())
    assert rows == 300 * (1_000_000 // len(line))
    assert mebibytes < 150


@pytest.mark.parametrize("megabytes", [20, 40])
def test_memory_does_not_grow_with_the_lines_that_are_no_rows(tmp_path: Path, megabytes: int) -> None:
    """All in one chunk: those that are cut, and those that are read and found broken."""
    path = tmp_path / "x.jsonl"
    with path.open("wb") as file:
        file.write(b'{"a": "x"}\n')
        for _ in range(600 // megabytes):
            file.write(b'{"a": "' + b"x" * megabytes * 1_000_000 + b"\n")
    grown = subprocess.run(
        [sys.executable, "-c", MEMORY, str(path)], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    rows, mebibytes = map(int, grown.stdout.split())
    assert rows == 1 + 600 // megabytes
    assert mebibytes < 150
