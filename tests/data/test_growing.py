"""Files that are appended to: the rows that were registered stay what they were, the new ones follow."""

from __future__ import annotations

import gzip
import tempfile
from pathlib import Path

import fsspec
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from reading import read_all, registered

from pipeline.data import lines
from pipeline.data.jsonl import JsonlSource
from pipeline.data.source import Counted, SourceFile, chunks_of

SCHEMA = pa.schema([("a", pa.int64())])
PIECES = (b'{"a": 1}', b'{"a": 22}', b"no row", b"\n", b"\n", b"\r\n", b" ", b"\xff", b'{"a":', b"3}", b"\xef\xbb\xbf")


def source_of(path: Path) -> JsonlSource:
    source = JsonlSource(str(path))
    source.fix_schema(SCHEMA)
    return source


def written(path: Path, content: bytes, codec: str = "") -> JsonlSource:
    path.write_bytes(packed(content, codec))
    return source_of(path)


def packed(content: bytes, codec: str) -> bytes:
    if codec == ".gz":
        return gzip.compress(content, mtime=0)
    return content if not codec else bytes(pa.compress(content, "zstd", asbytes=True))


def regrown(path: Path, file: SourceFile) -> Counted | str:
    source = source_of(path)
    (found,) = source.find()
    return source.grown(file, found)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=8), st.lists(st.sampled_from(PIECES), min_size=1, max_size=6))
@example([b'{"a": 1}'], [b"\n", b'{"a": 22}'])
@example([b'{"a":'], [b"3}"])
@example([b"\xef\xbb\xbf"], [b'{"a": 1}'])
@example([b" "], [b'{"a": 1}'])
def test_what_counts_as_appended_leaves_every_row_as_it_was(before: list[bytes], more: list[bytes]) -> None:
    """Any bytes behind any others: the rows begin with those of before, but for the last one if it was unfinished."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.jsonl"
        source = written(path, b"".join(before))
        (file,) = registered(source)
        old, old_errors = read_all(source)
        path.write_bytes(b"".join(before + more))
        grown = regrown(path, file)
        whole = source_of(path)
        new, new_errors = read_all(whole)
        stays = file.rows - file.unfinished
        same = new.slice(0, stays).equals(old.slice(0, stays))
        same = same and [bool(error) for error in new_errors[:stays]] == [bool(error) for error in old_errors[:stays]]
        if isinstance(grown, Counted):
            assert same
            (anew,) = registered(whole)
            assert grown == Counted(rows=new.num_rows, content=anew.content, unfinished=anew.unfinished)
        else:
            assert "its last line had no end" in grown
            assert not (b"".join(before).endswith(b"\n") or not file.rows or file.unfinished)
        assert not file.unfinished or old_errors[-1], "a row that could be read is never unfinished"


@pytest.mark.parametrize("codec", ["", ".gz", ".zst"])
def test_chunks_begin_anew_where_a_file_had_ended(codec: str, tmp_path: Path) -> None:
    path, content = tmp_path / f"x.jsonl{codec}", b""
    ends: list[int] = []
    file = None
    for count in (7, 1, 10, 2):
        first = ends[-1] if ends else 0
        content += packed(b"".join(b'{"a": %d}\n' % n for n in range(first, first + count)), codec)
        path.write_bytes(content)
        (found,) = source_of(path).find()
        if file is None:
            (file,) = registered(source_of(path))
        else:
            counted = regrown(path, file)
            assert isinstance(counted, Counted), counted
            file = SourceFile(
                ordinal=0, name=file.name, path=file.path, size=found.size, digest=found.digest, rows=counted.rows,
                content=counted.content, ends=tuple(ends),
            )  # fmt: skip
        ends.append(first + count)
    assert file is not None and file.rows == 20
    chunks = chunks_of(file, 5)
    assert [(chunk.first_row, chunk.num_rows) for chunk in chunks] == [(0, 5), (5, 2), (7, 1), (8, 5), (13, 5), (18, 2)]
    assert sorted(chunk.id for chunk in chunks) == [chunk.id for chunk in chunks]
    rows = list(source_of(path).read(file, chunks))
    assert [row for part in rows for row in part.table["a"].to_pylist()] == list(range(20))


@pytest.mark.parametrize("codec", ["", ".gz"])
def test_a_change_anywhere_before_the_end_is_seen(codec: str, tmp_path: Path) -> None:
    """Also where the first and the last 64 KiB are as they were."""
    path = tmp_path / f"x.jsonl{codec}"
    rows = [b'{"a": %d}\n' % n for n in range(100_000, 150_000)]
    (file,) = registered(written(path, b"".join(rows), codec))
    for at in (0, 25_000, 49_999):
        changed = [*rows[:at], b'{"a": 999999}\n', *rows[at + 1 :]]
        assert len(b"".join(changed)) == len(b"".join(rows))
        path.write_bytes(packed(b"".join(changed), codec) + packed(b'{"a": 1}\n', codec))
        assert isinstance(regrown(path, file), str), at
    path.write_bytes(packed(b"".join(rows), codec) + packed(b'{"a": 1}\n', codec))
    assert regrown(path, file) == Counted(rows=50_001, content=registered(source_of(path))[0].content)


def test_a_file_that_became_shorter_has_changed(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    (file,) = registered(written(path, b'{"a": 1}\n{"a": 2}\n'))
    path.write_bytes(b'{"a": 1}\n')
    assert regrown(path, file) == "it is not longer than it was"


@pytest.mark.parametrize("codec", ["", ".gz"])
def test_what_is_appended_while_a_file_is_read_is_not_there_yet(
    codec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last line has no end; what follows must not become part of it."""
    monkeypatch.setattr(lines, "_BLOCK_BYTES", 1000)
    path = tmp_path / f"x.jsonl{codec}"
    source = written(path, b"\n".join(b'{"a": %d}' % n for n in range(10_000)), codec)
    (file,) = registered(source)
    parts = source.read(file, chunks_of(file, 3000))
    seen = next(parts).table["a"].to_pylist()
    for _ in range(2):
        with path.open("ab") as stream:
            stream.write(packed(b'\n{"a": -1}', codec))
        seen += next(parts).table["a"].to_pylist()
    seen += [row for part in parts for row in part.table["a"].to_pylist()]
    assert seen == list(range(10_000))


def test_an_object_that_was_appended_to() -> None:
    """What is in a store is replaced by something longer."""
    fs = fsspec.filesystem("memory")
    for codec in ("", ".gz"):
        path = f"/growing/x.jsonl{codec}"
        old, more = packed(b'{"a": 1}\n{"a": 2}', codec), packed(b'\n{"a": 3}\n', codec)
        fs.pipe_file(path, old)
        before = JsonlSource(f"memory:/{path}")
        before.fix_schema(SCHEMA)
        (file,) = registered(before)
        fs.pipe_file(path, old + more)
        assert [rows.table["a"].to_pylist() for rows in before.read(file, chunks_of(file, 5))] == [[1, 2]]
        after = JsonlSource(f"memory:/{path}")
        (found,) = after.find()
        grown = after.grown(file, found)
        assert isinstance(grown, Counted) and grown.rows == 3
