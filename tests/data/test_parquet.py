"""The Parquet source against pyarrow's own readers, DuckDB, and files that are broken on purpose."""

from __future__ import annotations

import base64
import errno
import os
import random
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import duckdb
import pandas as pd
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pyarrow.parquet.encryption as pe
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.parquet import ParquetSource
from pipeline.data.parquet_rows import RowCursor
from pipeline.data.source import Chunk, SourceFile, chunks_of
from pipeline.errors import ConfigError, RunFailed


def rows(count: int, first: int = 0) -> pa.Table:
    numbers = range(first, first + count)
    return pa.table(
        {
            "id": pa.array(numbers, pa.int64()),
            "prompt": [f"prompt {n}" if n % 7 else None for n in numbers],
            "tags": [["t"] * (n % 3) for n in numbers],
            "deep": [{"a": n, "b": {"c": str(n)}} for n in numbers],
        },
        schema=pa.schema(
            [
                ("id", pa.int64()),
                ("prompt", pa.string()),
                ("tags", pa.list_(pa.string())),
                ("deep", pa.struct([("a", pa.int64()), ("b", pa.struct([("c", pa.string())]))])),
            ]
        ),
    )


def write(path: Path, table: pa.Table, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, **options)
    return path


def registered(source: ParquetSource) -> list[SourceFile]:
    return [SourceFile(ordinal=ordinal, **asdict(file)) for ordinal, file in enumerate(source.find())]


def read_all(source: ParquetSource, chunk_rows: int) -> pa.Table:
    tables = [part.table for file in registered(source) for part in source.read(file, chunks_of(file, chunk_rows))]
    return pa.concat_tables(tables) if tables else source.schema().empty_table()


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The row groups whose decoding was started, in order."""
    groups: list[int] = []
    original = pq.ParquetFile.iter_batches

    def spy(self: pq.ParquetFile, *args: object, **options: object) -> object:
        groups.extend(options["row_groups"])
        return original(self, *args, **options)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", spy)
    return groups


# What data.path may be


def test_a_folder_gives_its_files_by_relative_name_without_hidden_ones(tmp_path: Path) -> None:
    for name in ("b.parquet", "a/x.parquet", "a/deep/y.parquet", "_tmp/z.parquet", ".h/z.parquet", "_m.parquet"):
        write(tmp_path / name, rows(3))
    (tmp_path / "README.md").write_text("not data")
    found = ParquetSource(str(tmp_path)).find()
    assert [file.name for file in found] == ["a/deep/y.parquet", "a/x.parquet", "b.parquet"]
    assert all(Path(file.path).is_absolute() and file.size == Path(file.path).stat().st_size for file in found)


def test_a_single_file_is_named_by_its_base_name(tmp_path: Path) -> None:
    path = write(tmp_path / "deep/odd[1]*.parquet", rows(3))
    assert [(f.name, f.path, f.rows) for f in ParquetSource(str(path)).find()] == [("odd[1]*.parquet", str(path), 3)]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("*.parquet", ["r.parquet"]),
        ("y=*/*.parquet", ["y=1/a.parquet", "y=2/b.parquet"]),
        ("y=[1]", ["y=1/a.parquet"]),
        ("**/*.parquet", ["r.parquet", "y=1/a.parquet", "y=2/b.parquet"]),
        ("y=2/?.parquet", ["b.parquet"]),
    ],
)
def test_a_glob_names_files_from_before_its_first_wildcard(tmp_path: Path, pattern: str, names: list[str]) -> None:
    for name in ("y=1/a.parquet", "y=2/b.parquet", "y=2/_c.parquet", "r.parquet"):
        write(tmp_path / name, rows(1))
    assert [file.name for file in ParquetSource(str(tmp_path / pattern)).find()] == names


def test_a_relative_path_works_and_is_kept_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "d/a.parquet", rows(1))
    monkeypatch.chdir(tmp_path)
    for path in ("d", "d/*.parquet", "d/a.parquet", "./d/../d"):
        assert [(f.name, Path(f.path).is_absolute()) for f in ParquetSource(path).find()] == [("a.parquet", True)]


def test_a_list_gives_absolute_names_and_each_file_once(tmp_path: Path) -> None:
    a, b = write(tmp_path / "d/a.parquet", rows(1)), write(tmp_path / "d/b.parquet", rows(2))
    source = ParquetSource([str(b), str(tmp_path / "d"), str(tmp_path / "*/a.parquet")])
    assert [(file.name, file.rows) for file in source.find()] == [(str(a), 1), (str(b), 2)]
    detour = ParquetSource([str(a), f"{tmp_path}/d/../d/a.parquet"]).find()
    assert [Path(file.path).resolve() for file in detour] == [a]


def test_links_to_one_blob_are_files_of_their_own(tmp_path: Path) -> None:
    blob = write(tmp_path / "blobs/0a1b", rows(2))
    (tmp_path / "snap").mkdir()
    for name in ("0.parquet", "1.parquet"):
        (tmp_path / "snap" / name).symlink_to(blob)
    assert [file.name for file in ParquetSource(str(tmp_path / "snap")).find()] == ["0.parquet", "1.parquet"]


def test_linked_folders_are_followed_and_a_loop_ends(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere/x.parquet", rows(1))
    write(tmp_path / "d/a.parquet", rows(1))
    (tmp_path / "d/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "d/loop").symlink_to(tmp_path / "d")
    assert [file.name for file in ParquetSource(str(tmp_path / "d")).find()] == ["a.parquet", "link/x.parquet"]


@pytest.mark.parametrize("name", [b"y=\xff/a.parquet", b"a\xff.parquet"])
def test_a_name_that_is_no_utf8_is_refused(tmp_path: Path, name: bytes) -> None:
    """run.json, which names every file, could not be written."""
    whole = write(tmp_path / "whole", rows(1)).read_bytes()
    path = os.fsencode(tmp_path) + b"/d/" + name
    os.makedirs(os.path.dirname(path))
    with open(path, "wb") as file:
        file.write(whole)
    with pytest.raises(ConfigError, match=r"a file whose name is no UTF-8: .*\\xff.*; rename it"):
        ParquetSource(str(tmp_path / "d")).find()


def test_what_is_no_regular_file_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=r"a\.parquet is no regular file"):
        ParquetSource(str(tmp_path)).find()
    with pytest.raises(ConfigError, match=r"a\.parquet is no regular file"):
        ParquetSource(str(tmp_path / "*.parquet")).find()


@pytest.mark.parametrize("path", ["{}/none", "{}/none/*.parquet", "{}/empty"])
def test_a_path_without_files_is_one_sentence(tmp_path: Path, path: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"data\.path .*(no file or folder|matches no Parquet file)") as error:
        ParquetSource(path.format(tmp_path)).find()
    assert "\n" not in str(error.value)


def test_an_empty_list_is_refused() -> None:
    with pytest.raises(ConfigError, match="empty list"):
        ParquetSource([]).find()


# What is in the files


@pytest.mark.parametrize("content", [b"", b"id,prompt\n1,x\n", b"PAR0" * 20])
def test_a_file_of_another_format_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.parquet"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"data\.path {path} is not a Parquet file"):
        ParquetSource(str(tmp_path)).find()


def test_a_parquet_file_truncated_anywhere_is_named(tmp_path: Path) -> None:
    whole = write(tmp_path / "x.parquet", rows(500), row_group_size=100).read_bytes()
    path = tmp_path / "t" / "x.parquet"
    path.parent.mkdir()
    for size in {4, 8, 11, 12, 100, len(whole) // 2, len(whole) - 100, len(whole) - 8, len(whole) - 1}:
        path.write_bytes(whole[:size])
        with pytest.raises(ConfigError, match=rf"data\.path {path} (is a truncated Parquet|cannot be opened)") as error:
            ParquetSource(str(path)).find()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("damage", [b"\xff" * 40, b"\0" * 40])
def test_a_damaged_footer_is_named(tmp_path: Path, damage: bytes) -> None:
    path = write(tmp_path / "x.parquet", rows(500))
    content = bytearray(path.read_bytes())
    start = len(content) - 8 - int.from_bytes(content[-8:-4], "little")
    content[start : start + len(damage)] = damage
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"data\.path {path} cannot be opened as Parquet"):
        ParquetSource(str(path)).find()


def test_a_footer_with_any_bytes_changed_is_read_or_refused_in_one_sentence(tmp_path: Path) -> None:
    """Nothing else may come of it: pyarrow itself would end the process where a column's own metadata is damaged."""
    path = tmp_path / "x.parquet"
    whole = write(path, rows(60), row_group_size=25).read_bytes()
    start = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    refused = 0
    for seed in range(600):
        rng = random.Random(seed)
        content = bytearray(whole)
        for _ in range(rng.choice([1, 1, 3])):
            content[rng.randrange(start, len(whole) - 8)] = rng.randrange(256)
        path.write_bytes(content)
        source = ParquetSource(str(path))
        try:
            (file,) = registered(source)
            assert sum(part.table.num_rows for part in source.read(file, chunks_of(file, 7))) == file.rows == 60
        except (ConfigError, RunFailed) as error:
            assert str(path) in str(error) and "\n" not in str(error)
            refused += 1
    assert 200 < refused < 600


def encrypted(path: Path, *, plaintext_footer: bool) -> Path:
    """A file with one encrypted column of three."""

    class Keys(pe.KmsClient):
        def wrap_key(self, key_bytes: bytes, master_key_identifier: str) -> bytes:
            return base64.b64encode(key_bytes)

    connection = pe.KmsConnectionConfig()
    keys = pe.EncryptionConfiguration(
        footer_key="footer", column_keys={"column": ["prompt"]}, plaintext_footer=plaintext_footer
    )
    options = pe.CryptoFactory(lambda _: Keys()).file_encryption_properties(connection, keys)
    return write(path, rows(10).select(["id", "prompt", "deep"]), encryption_properties=options)


@pytest.mark.parametrize("plaintext_footer", [True, False])
def test_an_encrypted_file_is_refused_before_the_device_is_taken(tmp_path: Path, plaintext_footer: bool) -> None:
    path = encrypted(tmp_path / "a.parquet", plaintext_footer=plaintext_footer)
    with pytest.raises(ConfigError, match=rf"data\.path {path} (has encrypted columns|is an encrypted .*); decrypt it"):
        ParquetSource(str(path)).find()


def test_columns_beside_encrypted_ones_can_be_read(tmp_path: Path) -> None:
    path = encrypted(tmp_path / "a.parquet", plaintext_footer=True)
    assert read_all(ParquetSource(str(path), ["id"]), 4)["id"].to_pylist() == list(range(10))
    source = ParquetSource(str(path), ["id", "prompt"])
    (file,) = registered(source)
    with pytest.raises(ConfigError, match=r"row group 0, column prompt, cannot be read \(Cannot decrypt"):
        next(iter(source.read(file, chunks_of(file, 4))))


def test_the_digest_follows_the_content_not_the_place(tmp_path: Path) -> None:
    def digest(path: Path) -> str:
        return ParquetSource(str(path)).find()[0].digest

    a = write(tmp_path / "a.parquet", rows(100))
    copy = tmp_path / "copy.parquet"
    copy.write_bytes(a.read_bytes())
    assert digest(a) == digest(copy) == digest(a)
    assert digest(a) != digest(write(tmp_path / "b.parquet", rows(100, first=1)))
    assert digest(a) != digest(write(tmp_path / "c.parquet", rows(100), row_group_size=10))


def test_different_schemas_name_both_files_and_the_column(tmp_path: Path) -> None:
    a = write(tmp_path / "a.parquet", pa.table({"id": [1], "prompt": ["x"]}))
    b = write(tmp_path / "b.parquet", pa.table({"prompt": ["x"], "id": ["1"]}))
    with pytest.raises(ConfigError, match=rf"column id is int64 in {a} and string in {b}"):
        ParquetSource(str(tmp_path)).find()
    assert read_all(ParquetSource(str(tmp_path), columns=["prompt"]), 10).to_pydict() == {"prompt": ["x", "x"]}
    write(b, pa.table({"prompt": ["x"]}))
    with pytest.raises(ConfigError, match=rf"column id is int64 in {a} and missing in {b}"):
        ParquetSource(str(tmp_path)).find()


def test_the_order_of_columns_may_differ_between_files(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", pa.table({"id": [1], "prompt": ["x"]}))
    write(tmp_path / "b.parquet", pa.table({"prompt": ["y"], "id": [2]}))
    assert read_all(ParquetSource(str(tmp_path)), 10).to_pydict() == {"id": [1, 2], "prompt": ["x", "y"]}


def test_columns_are_projected_in_the_order_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", rows(50), row_group_size=7)
    source = ParquetSource(str(path), columns=["deep", "id"])
    assert source.schema().names == ["deep", "id"]
    assert read_all(source, 20).equals(rows(50).select(["deep", "id"]))


def test_a_column_whose_name_begins_anothers_is_told_apart(tmp_path: Path) -> None:
    table = pa.table({"a.b": [1], "a": [2], "ab": [3]})
    path = write(tmp_path / "a.parquet", table)
    assert read_all(ParquetSource(str(path), columns=["a"]), 10).to_pydict() == {"a": [2]}
    assert read_all(ParquetSource(str(path), columns=["a.b"]), 10).to_pydict() == {"a.b": [1]}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (["id", "nope"], r"data\.columns names nope, .* its columns are id, prompt, tags, deep"),
        ([], r"data\.columns must name at least one column"),
        (["id", "id"], r"data\.columns must name .* each once"),
    ],
)
def test_bad_columns_are_refused(tmp_path: Path, columns: list[str], message: str) -> None:
    path = write(tmp_path / "a.parquet", rows(1))
    with pytest.raises(ConfigError, match=message):
        ParquetSource(str(path), columns=columns).find()


def test_columns_with_one_name_are_refused_unless_left_out(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", pa.Table.from_arrays([pa.array([1])] * 3, names=["a", "b", "a"]))
    with pytest.raises(ConfigError, match="several columns named a"):
        ParquetSource(str(path)).schema()
    assert read_all(ParquetSource(str(path), columns=["b"]), 10).to_pydict() == {"b": [1]}


def test_pandas_files_lose_their_metadata_and_keep_their_values(tmp_path: Path) -> None:
    for name, words in (("a", ["x", "y"]), ("b", [f"w{n}" for n in range(300)])):
        frame = pd.DataFrame({"word": pd.Categorical(words), "at": pd.Timestamp("2024-05-01 12:00:00.123456")})
        frame.to_parquet(tmp_path / f"{name}.parquet")  # index types int8 and int16
    source = ParquetSource(str(tmp_path))
    table = read_all(source, 7)
    assert not source.schema().metadata
    assert table.schema.field("word").type == pa.string()
    oracle = duckdb.sql(f"select word, \"at\" from read_parquet('{tmp_path}/*.parquet') order by filename").fetchall()
    assert [tuple(row.values()) for row in table.to_pylist()] == oracle


# Types and partitions


def test_duckdb_writes_and_reads_the_same_rows_of_every_nesting(tmp_path: Path) -> None:
    duckdb.sql(
        f"""copy (
            select i, 's' || i as word, [i, null] as list, [[i], [], null] as lists,
                {{'x': i, 'y': {{'z': ['é' || i, null]}}}} as deep, [{{'a': i}}, null] as structs,
                map {{'k' || i: [i]}} as map, i::decimal(12, 3) as money, (i % 2 = 0) as even,
                timestamp '2024-01-01 00:00:00' + to_seconds(i) as at, date '2024-01-01' as day,
                ('b' || i)::blob as bytes, case when i % 3 = 0 then null else i / 7.0 end as part,
                (['red', 'green'])[1 + i % 2]::enum('red', 'green') as color
            from range(3000) t(i)
        ) to '{tmp_path / "a.parquet"}' (format parquet, row_group_size 700)"""
    )
    mine = read_all(ParquetSource(str(tmp_path / "a.parquet")), 450)
    mine.validate(full=True)
    oracle = duckdb.sql(f"select * from read_parquet('{tmp_path / 'a.parquet'}')")
    ours = duckdb.sql(f"select * from read_parquet('{write(tmp_path / 'mine.parquet', mine)}')")
    assert ours.columns == oracle.columns
    assert ours.fetchall() == oracle.fetchall()


def test_dictionaries_and_large_types_at_any_depth(tmp_path: Path) -> None:
    words = pa.array(["a", "b", "a"]).dictionary_encode()
    table = pa.table(
        {
            "word": words,
            "list": pa.ListArray.from_arrays([0, 1, 3, 3], words),
            "struct": pa.StructArray.from_arrays([words], ["w"]),
            "map": pa.MapArray.from_arrays([0, 1, 2, 3], pa.array(["x", "y", "z"]), words),
            "large": pa.array(["a", None, "c"], pa.large_string()),
            "large_list": pa.array([["a"], None, []], pa.large_list(pa.large_string())),
        }
    )
    source = ParquetSource(str(write(tmp_path / "a.parquet", table)))
    assert read_all(source, 2).to_pylist() == table.to_pylist()
    assert [str(field.type) for field in source.schema()] == [
        "string", "list<item: string>", "struct<w: string>", "map<string, string>", "large_string",
        "large_list<item: large_string>",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (["1", "02", "-3"], "int32"),  # DuckDB would keep the zero and make them text
        (["2024-05-01", "x y", "a=b"], "string"),
        (["1", "x"], "string"),
        (["1", None], "int32"),
        (["3000000000", "1"], "int64"),
    ],
)
def test_folders_make_columns_as_pyarrow_and_duckdb_read_them(
    tmp_path: Path, values: list[str | None], kind: str
) -> None:
    table = pa.concat_tables(
        [rows(30).select(["id"]).append_column("k", pa.array([v] * 30, pa.string())) for v in values]
    )
    ds.write_dataset(table, tmp_path, format="parquet", partitioning=["k"], partitioning_flavor="hive")
    source = ParquetSource(str(tmp_path))
    mine = read_all(source, 7)
    assert [(field.name, str(field.type)) for field in source.schema()] == [("id", "int64"), ("k", kind)]
    oracle = duckdb.sql(f"select id, k from read_parquet('{tmp_path}/**/*.parquet', hive_partitioning = true)")
    if "02" not in values:
        assert sorted(map(str, duckdb.sql("select id, k from mine").fetchall())) == sorted(map(str, oracle.fetchall()))
    if kind != "int64":
        theirs = ds.dataset(tmp_path, format="parquet", partitioning="hive").to_table()
        assert sorted(map(str, theirs.to_pylist())) == sorted(map(str, mine.to_pylist()))
        assert theirs.schema.equals(source.schema())


def test_partition_columns_are_projected_and_are_null_outside_their_folders(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", rows(5))
    write(tmp_path / "y=7/w=x/b.parquet", rows(3))
    source = ParquetSource(str(tmp_path), columns=["w", "id", "y"])
    expected = [{"w": None, "id": n, "y": None} for n in range(5)] + [{"w": "x", "id": n, "y": 7} for n in range(3)]
    assert read_all(source, 2).to_pylist() == expected
    assert read_all(ParquetSource(str(tmp_path), columns=["y"]), 2)["y"].to_pylist() == [None] * 5 + [7] * 3


def test_a_column_of_the_files_stays_theirs(tmp_path: Path) -> None:
    write(tmp_path / "id=9/a.parquet", rows(3))
    assert read_all(ParquetSource(str(tmp_path)), 2).equals(rows(3))


def test_the_schema_of_the_first_start_is_held_to(tmp_path: Path) -> None:
    write(tmp_path / "y=1/a.parquet", rows(3))
    schema = ParquetSource(str(tmp_path)).schema()

    def resumed() -> ParquetSource:
        source = ParquetSource(str(tmp_path))
        source.fix_schema(schema)
        return source

    def refused() -> str:
        """What is said of the one file that does not fit; the other one is found."""
        source = resumed()
        assert [file.name for file in source.find()] == ["y=1/a.parquet"]
        ((name, error),) = source.refused.items()
        assert name.endswith("/b.parquet")
        return str(error)

    assert read_all(resumed(), 2)["y"].to_pylist() == [1, 1, 1]
    other = write(tmp_path / "y=2/b.parquet", rows(2).append_column("new", pa.array([1, 2])))
    assert f"column new is missing in the run's first start and int64 in {other}" in refused()
    write(other, rows(2).set_column(0, "id", pa.array(["x", "y"])))
    assert f"column id is int64 in the run's first start and string in {other}" in refused()
    other.write_bytes(b"PAR1 and no more")
    os.utime(other, (0, 0))
    assert f"{other} is a truncated Parquet file" in refused()
    other.unlink()
    other = write(tmp_path / "y=x/b.parquet", rows(2))
    assert "lies in a folder y=x, but the column y is int32; rename the folder" in refused()
    other.unlink()
    other = write(tmp_path / "y=1/z=1/b.parquet", rows(2))
    assert f"column z is missing in the run's first start and int32 in {other}" in refused()


# Reading


@settings(max_examples=60, deadline=None)
@given(
    num_rows=st.integers(0, 400),
    row_group_size=st.integers(1, 150),
    chunk_rows=st.integers(1, 150),
    batch_rows=st.integers(1, 64),
    seed=st.integers(0, 2**32),
)
def test_chunks_give_the_file_whole_in_parts_and_in_any_order(
    num_rows: int, row_group_size: int, chunk_rows: int, batch_rows: int, seed: int
) -> None:
    rng = random.Random(seed)
    table = rows(num_rows)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.data.parquet_rows._MAX_BATCH_ROWS", batch_rows)
        source = ParquetSource(str(write(Path(folder) / "a.parquet", table, row_group_size=row_group_size)))
        assert read_all(source, chunk_rows).equals(table)
        (file,) = registered(source)
        some = [chunk for chunk in chunks_of(file, chunk_rows) if rng.random() < 0.6]
        shuffled = rng.sample(some, len(some))
        for order in (some, shuffled):
            for chunk, part in zip(order, source.read(file, order), strict=True):
                assert part.table.equals(table.slice(chunk.first_row, chunk.num_rows))
                assert all(column.num_chunks <= 1 for column in part.table.columns)
                assert not part.errors


def test_consecutive_chunks_go_on_in_a_row_group_and_gaps_skip_whole_ones(tmp_path: Path, opened: list[int]) -> None:
    source = ParquetSource(str(write(tmp_path / "a.parquet", rows(1000), row_group_size=100)))
    (file,) = registered(source)
    chunks = chunks_of(file, 10)
    assert len(list(source.read(file, chunks))) == 100
    assert opened == list(range(10))
    opened.clear()
    list(source.read(file, [chunks[0], chunks[3], chunks[55], chunks[57], chunks[99]]))
    assert opened == [0, 5, 9]
    opened.clear()
    list(source.read(file, [chunks[55], chunks[53], chunks[54]]))
    assert opened == [5, 5]


def test_empty_row_groups_and_an_empty_file_are_no_obstacle(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    with pq.ParquetWriter(path, rows(0).schema) as writer:
        for first, count in ((0, 0), (0, 5), (5, 0), (5, 0), (5, 5), (10, 0)):
            writer.write_table(rows(count, first))
    assert read_all(ParquetSource(str(path)), 3).equals(rows(10))
    empty = ParquetSource(str(write(tmp_path / "e.parquet", rows(0))))
    assert registered(empty)[0].rows == 0
    assert read_all(empty, 3).equals(rows(0))


def test_memory_stays_near_a_chunk_and_a_batch_in_a_huge_row_group(tmp_path: Path) -> None:
    texts = pa.array([f"{n:07d}" * 60 for n in range(150_000)])
    path = write(tmp_path / "a.parquet", pa.table({"prompt": texts}), row_group_size=150_000, use_dictionary=False)
    assert pq.read_metadata(path).num_row_groups == 1
    del texts
    source = ParquetSource(str(path))
    (file,) = registered(source)
    before = pa.total_allocated_bytes()
    peak = max(pa.total_allocated_bytes() for _ in source.read(file, chunks_of(file, 1000)))
    assert peak - before < 16 * 2**20 < 60_000_000 < pq.read_metadata(path).row_group(0).total_byte_size


def damage(path: Path, group: int, *, at_header: bool) -> None:
    """Flip bits of a row group's first column: in its first page header, or amid its (only) data page."""
    column = pq.read_metadata(path).row_group(group).column(0)
    first = column.dictionary_page_offset or column.data_page_offset
    start = first if at_header else first + column.total_compressed_size // 2
    content = bytearray(path.read_bytes())
    content[start : start + 16] = bytes(byte ^ 0xA5 for byte in content[start : start + 16])
    path.write_bytes(content)


@pytest.mark.parametrize("at_header", [True, False], ids=["header", "checksum"])
def test_a_corrupt_page_names_file_and_row_group(tmp_path: Path, at_header: bool) -> None:
    path = write(
        tmp_path / "a.parquet", rows(4000), row_group_size=1000, write_page_checksum=True, use_dictionary=False
    )
    damage(path, group=2, at_header=at_header)
    source = ParquetSource(str(path))
    (file,) = registered(source)
    parts = source.read(file, chunks_of(file, 500))
    assert pa.concat_tables(next(parts).table for _ in range(4)).equals(rows(2000))
    with pytest.raises(ConfigError, match=rf"data\.path {path}: row group 2, column id, cannot be read \(") as error:
        next(parts)
    assert "\n" not in str(error.value)
    last = Chunk(file_ordinal=0, first_row=3500, num_rows=500)
    assert next(iter(source.read(file, [last]))).table.equals(rows(500, first=3500))


@pytest.mark.parametrize(
    ("codec", "reason"), [(3, "While LZO compression is supported"), (9, "Unsupported compression codec value: 9")]
)
def test_a_codec_that_is_not_known_names_the_column_and_leaves_the_others(
    tmp_path: Path, codec: int, reason: str
) -> None:
    path = write(tmp_path / "a.parquet", pa.table({"id": range(9), "text": ["x"] * 9}), row_group_size=3)
    head, found, tail = path.read_bytes().rpartition(b"\x18\x04text\x15\x02")  # its path, then its codec: snappy
    assert found
    path.write_bytes(head + found[:-1] + bytes([2 * codec]) + tail)
    source = ParquetSource(str(path))
    (file,) = registered(source)
    parts = source.read(file, chunks_of(file, 3))
    assert [next(parts).table["id"].to_pylist() for _ in range(2)] == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(ConfigError, match=r"a\.parquet: row group 2, column text, cannot be read \(" + reason):
        next(parts)
    assert read_all(ParquetSource(str(path), columns=["id"]), 4)["id"].to_pylist() == list(range(9))


def test_a_disk_that_fails_is_no_fault_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = ParquetSource(str(write(tmp_path / "a.parquet", rows(10))))
    (file,) = registered(source)

    def fail(*_: object) -> Iterator[pa.RecordBatch]:
        raise OSError(errno.EIO, os.strerror(errno.EIO))
        yield

    monkeypatch.setattr(RowCursor, "_decoded", fail)
    with pytest.raises(RunFailed, match=r"a\.parquet: row group 0 cannot be read \(.*Input/output error"):
        next(iter(source.read(file, chunks_of(file, 5))))


def test_a_file_rewritten_since_registration_is_refused(tmp_path: Path) -> None:
    source = ParquetSource(str(write(tmp_path / "a.parquet", rows(10))))
    (file,) = registered(source)
    for other in (rows(11), rows(10, first=1)):
        write(tmp_path / "a.parquet", other)
        with pytest.raises(ConfigError, match=r"a\.parquet is not the registered file any more"):
            next(iter(source.read(file, chunks_of(file, 5))))
    (tmp_path / "a.parquet").unlink()
    with pytest.raises(ConfigError, match=r"a\.parquet cannot be read"):
        next(iter(source.read(file, chunks_of(file, 5))))


def test_a_file_that_changes_while_it_is_read_stops_the_run_before_a_wrong_row(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    for change in (
        lambda: os.truncate(path, path.stat().st_size - 1),
        lambda: write(path, rows(4000, first=1), row_group_size=1000),
        lambda: damage(path, 3, at_header=False),
    ):
        source = ParquetSource(str(write(path, rows(4000), row_group_size=1000)))
        (file,) = registered(source)
        parts = source.read(file, chunks_of(file, 500))
        assert next(parts).table.equals(rows(500))
        change()
        with pytest.raises(RunFailed, match=r"a\.parquet has been written to while it was read"):
            next(parts)


def test_a_file_that_is_removed_while_it_is_read_is_read_to_its_end(tmp_path: Path) -> None:
    source = ParquetSource(str(write(tmp_path / "a.parquet", rows(4000), row_group_size=1000)))
    (file,) = registered(source)
    parts = source.read(file, chunks_of(file, 500))
    first = next(parts).table
    (tmp_path / "a.parquet").unlink()
    assert pa.concat_tables([first, *(part.table for part in parts)]).equals(rows(4000))
