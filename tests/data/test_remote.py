"""Every source behind fsspec URLs: in memory, as file://, and on an S3 server on this machine."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from reading import registered, rows_of

from pipeline.data.files import Located
from pipeline.data.hub import HubSource
from pipeline.data.jsonl import JsonlSource
from pipeline.data.parquet import ParquetSource
from pipeline.data.source import Chunk, chunks_of
from pipeline.errors import ConfigError, RunFailed

S3_PACKAGES = [name for name in ("s3fs", "moto", "flask") if importlib.util.find_spec(name) is None]
TABLE = pa.table({"id": list(range(5000)), "text": [f"text {n} " * 20 for n in range(5000)]})
LINES = b"".join(b'{"id": %d}\n' % n for n in range(3000))


@pytest.fixture
def memory() -> Iterator[Any]:
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]
    yield fs
    fs.store.clear()


@pytest.fixture(scope="module")
def s3_options() -> Iterator[dict[str, Any]]:
    if S3_PACKAGES:
        pytest.skip(f"not installed: {', '.join(S3_PACKAGES)} (the extra s3)")
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield {"key": "k", "secret": "s", "client_kwargs": {"endpoint_url": f"http://{host}:{port}"}}
    server.stop()


@pytest.fixture(params=["memory", "s3"])
def place(request: pytest.FixtureRequest) -> tuple[Any, str, dict[str, Any]]:
    """A file system, the URL of a folder in it, and its storage options."""
    if request.param == "memory":
        return request.getfixturevalue("memory"), "memory://data", {}
    options = request.getfixturevalue("s3_options")
    fs = fsspec.filesystem("s3", **options)
    if fs.exists("bucket"):
        fs.rm("bucket", recursive=True)
    fs.mkdir("bucket")
    return fs, "s3://bucket/data", options


def put(place: tuple[Any, str, dict[str, Any]], name: str, content: bytes | pa.Table, **options: Any) -> str:
    fs, url, _ = place
    if isinstance(content, pa.Table):
        sink = pa.BufferOutputStream()
        pq.write_table(content, sink, **options)
        content = sink.getvalue().to_pybytes()
    fs.pipe_file(f"{url}/{name}", content)
    return f"{url}/{name}"


def test_parquet_folders_files_globs_and_lists(place: Any) -> None:
    _, url, options = place
    put(place, "b.parquet", TABLE.slice(3000), row_group_size=500)
    put(place, "y=1/a.parquet", TABLE.slice(0, 3000), row_group_size=500)
    for name in ("_tmp/x.parquet", ".h.parquet", "notes.txt"):
        put(place, name, b"x")
    source = ParquetSource(url, storage_options=options)
    found = source.find()
    assert [(file.name, file.path, file.rows) for file in found] == [
        ("b.parquet", f"{url}/b.parquet".replace("memory://", "memory:///"), 2000),
        ("y=1/a.parquet", f"{url}/y=1/a.parquet".replace("memory://", "memory:///"), 3000),
    ]
    rows = rows_of(source, 700)
    assert [row.pop("y") for row in rows] == [None] * 2000 + [1] * 3000
    assert rows == TABLE.slice(3000).to_pylist() + TABLE.slice(0, 3000).to_pylist()
    single = ParquetSource(f"{url}/b.parquet", columns=["id"], storage_options=options)
    assert [file.name for file in single.find()] == ["b.parquet"]
    assert [row["id"] for row in rows_of(single)] == list(range(3000, 5000))
    for pattern, names in {
        "*.parquet": ["b.parquet"],
        "y=*/*.parquet": ["y=1/a.parquet"],
        "y*": ["y=1/a.parquet"],
    }.items():
        assert [f.name for f in ParquetSource(f"{url}/{pattern}", storage_options=options).find()] == names


def test_a_list_mixes_local_and_remote(place: Any, tmp_path: Path) -> None:
    _, url, options = place
    remote = put(place, "b.parquet", TABLE.slice(3000))
    pq.write_table(TABLE.slice(0, 1000), tmp_path / "a.parquet")
    pq.write_table(TABLE.slice(1000, 2000), tmp_path / "c.parquet")
    paths = [remote, str(tmp_path / "a.parquet"), f"file://{tmp_path}/c.parquet", f"{url}/*.parquet", str(tmp_path)]
    source = ParquetSource(paths, storage_options=options)
    assert [Path(file.name).name for file in source.find()] == ["a.parquet", "c.parquet", "b.parquet"]
    assert rows_of(source) == TABLE.to_pylist()


def test_footers_are_read_by_range(place: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fs, url, options = place
    large = pa.table({"blob": [bytes([n]) * 300_000 for n in range(40)], "id": list(range(40))})
    put(place, "a.parquet", large, compression="none", use_dictionary=False, row_group_size=10)
    asked: list[int] = []
    original = type(fs).cat_ranges

    def spy(self: Any, paths: Any, starts: list[int], ends: list[int], **more: Any) -> Any:
        asked.extend(end - start for start, end in zip(starts, ends, strict=True))
        return original(self, paths, starts, ends, **more)

    monkeypatch.setattr(type(fs), "cat_ranges", spy)
    monkeypatch.setattr(Located, "open", lambda *_: pytest.fail("the file is opened"))
    assert ParquetSource(url, storage_options=options).find()[0].rows == 40
    assert sum(asked) <= 70_000


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz"])
def test_json_lines(place: Any, name: str) -> None:
    import gzip

    _, url, options = place
    put(place, name, gzip.compress(LINES) if name.endswith(".gz") else LINES)
    source = JsonlSource(url, storage_options=options)
    assert rows_of(source, 250) == [{"id": n} for n in range(3000)]
    (file,) = registered(source)
    picked = [chunks_of(file, 100)[n] for n in (20, 3, 4, 29)]
    starts = [rows.table["id"][0].as_py() for rows in source.read(file, picked)]
    assert starts == [2000, 300, 400, 2900]


def test_saved_datasets(place: Any, tmp_path: Path) -> None:
    fs, url, options = place
    saved = datasets.Dataset.from_dict({"id": range(2500)})
    datasets.DatasetDict({"train": saved}).save_to_disk(str(tmp_path / "d"))
    fs.put(str(tmp_path / "d") + "/", f"{url}/d/", recursive=True)
    source = HubSource(f"{url}/d", storage_options=options)
    assert rows_of(source, 300) == list(saved)


def test_a_remote_file_that_changes_is_refused_and_one_that_goes_stops_the_run(place: Any) -> None:
    fs, url, options = place
    put(place, "a.parquet", TABLE)
    put(place, "x.jsonl", LINES)
    whole = Chunk(file_ordinal=0, first_row=0, num_rows=10)
    for source, name in ((ParquetSource(f"{url}/a.parquet", storage_options=options), "a.parquet"),
                         (JsonlSource(f"{url}/x.jsonl", storage_options=options), "x.jsonl")):  # fmt: skip
        source.schema()
        (file,) = registered(source)
        assert next(iter(source.read(file, [whole]))).table.num_rows == 10
        put(place, name, TABLE.slice(1) if name == "a.parquet" else LINES[:-10] + b'"id": "x"}')
        with pytest.raises(ConfigError, match="is not the registered file any more"):
            next(iter(source.read(file, [whole])))
        fs.rm(f"{url}/{name}")
        with pytest.raises((ConfigError, RunFailed), match=r"cannot be read \(") as error:
            next(iter(source.read(file, [whole])))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("source", [ParquetSource, JsonlSource, HubSource])
@pytest.mark.parametrize("path", ["none", "none.parquet", "none/*.parquet"])
def test_a_url_that_leads_nowhere_is_one_sentence(place: Any, source: Any, path: str) -> None:
    _, url, options = place
    put(place, "other.txt", b"x")
    with pytest.raises(ConfigError, match=r"data\.path .*(is no file or folder there|matches no|holds no)") as error:
        source(f"{url}/{path}", storage_options=options).find()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nosuch://x/y.parquet", r"data\.path nosuch://x/y\.parquet cannot be read \(Protocol not known: nosuch\)"),
        ("http://127.0.0.1:1/y.parquet?sig=hidden", r"data\.path http://127.0.0.1:1/y.parquet\?sig=\(redacted\) "),
    ],
)
def test_a_file_system_that_cannot_be_had_is_one_sentence(url: str, message: str) -> None:
    pytest.importorskip("aiohttp")
    with pytest.raises(ConfigError, match=message) as error:
        ParquetSource(url).find()
    assert "hidden" not in str(error.value)
    assert "\n" not in str(error.value)


def test_wrong_credentials_and_hosts_are_one_sentence(s3_options: dict[str, Any]) -> None:
    fsspec.filesystem("s3", **s3_options).mkdir("bucket2")
    refused = {"endpoint_url": "http://127.0.0.1:1"}
    nobody = {"client_kwargs": refused, "config_kwargs": {"retries": {"max_attempts": 0}}}
    for options in ({**s3_options, **nobody}, {**s3_options, "nonsense": 3}):
        with pytest.raises(ConfigError, match=r"data\.path s3://bucket2/x\.parquet") as error:
            ParquetSource("s3://bucket2/x.parquet", storage_options=options).find()
        assert "\n" not in str(error.value)


def test_local_files_stay_plain_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(TABLE, tmp_path / "a.parquet")
    (tmp_path / "x.jsonl").write_bytes(LINES)
    monkeypatch.setattr(fsspec.core, "url_to_fs", lambda *_, **__: pytest.fail("fsspec is asked"))
    for prefix in ("", "file://"):
        assert rows_of(ParquetSource(f"{prefix}{tmp_path}/a.parquet")) == TABLE.to_pylist()
        assert rows_of(JsonlSource(f"{prefix}{tmp_path}/x.jsonl"))[-1] == {"id": 2999}
