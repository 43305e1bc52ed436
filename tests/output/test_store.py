"""What every store promises: whole files, made once, seen at once by all; and what goes wrong in one sentence."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from stores import Place

from pipeline.output.store import Store

NAME = "results/part.bin"


def at_once(calls: list[Callable[[], bool]]) -> list[bool]:
    """The calls, each in a thread of its own, begun together."""
    together = threading.Barrier(len(calls))

    def begin(call: Callable[[], bool]) -> bool:
        together.wait()
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(begin, calls))


def test_a_file_is_created_once_replaced_and_removed(place: Place) -> None:
    one, other = place.store(), place.store()
    assert not one.exists(NAME)
    assert one.create(NAME, b"first")
    assert not other.create(NAME, b"second")
    assert (other.read(NAME), other.exists(NAME)) == (b"first", True)
    assert place.files() == {NAME: b"first"}
    other.replace(NAME, b"third")
    assert one.read(NAME) == b"third"
    one.remove(NAME)
    one.remove(NAME)
    assert not other.exists(NAME)
    with pytest.raises(FileNotFoundError):
        other.read(NAME)
    with pytest.raises(FileNotFoundError), other.open(NAME):
        pass
    assert other.create(NAME, b"again")


@pytest.fixture
def impatient_threads() -> Iterator[None]:
    """Threads that are interrupted so often that every race is run."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("impatient_threads")
def test_of_many_that_create_at_once_exactly_one_does(place: Place) -> None:
    stores = [place.store() for _ in range(6)]
    for round_number in range(5 if place.is_shared else 300):
        name = f"results/part-{round_number}"
        calls = [
            lambda store=store, name=name, n=n: store.create(name, f"by {n}".encode() * 1000)
            for n, store in enumerate(stores)
        ]
        won = at_once(calls)
        assert won.count(True) == 1
        assert place.files()[name] == f"by {won.index(True)}".encode() * 1000


def test_a_draft_appears_whole_when_it_is_published(place: Place) -> None:
    one, other = place.store(), place.store()
    for store in (one, other):
        store.make_folder("results")
        store.make_folder("journal")
    with one.draft(NAME, "a1") as draft, other.draft(NAME, "a2") as late:
        draft.file.write(b"some ")
        draft.file.write(b"bytes")
        draft.finish()
        late.file.write(b"other")
        late.finish()
        assert not one.exists(NAME)
        assert draft.publish()
        assert other.read(NAME) == b"some bytes"
        assert not late.publish()
    with pytest.raises(KeyboardInterrupt), one.draft("results/never", "a1") as draft:
        draft.file.write(b"half")
        raise KeyboardInterrupt
    assert place.files() == {NAME: b"some bytes"}


def test_names_are_those_of_now_and_of_one_folder(place: Place) -> None:
    store, other = place.store(), place.store()
    assert list(store.names("results")) == []
    for name in ("results/a", "results/b", "resultsx/c", "stats/d", "run.json"):
        other.create(name, b"x")
    assert sorted(store.names("results")) == ["a", "b"]
    other.remove("results/a")
    other.create("results/e", b"x")
    assert (store.exists("results/a"), store.exists("results/e")) == (False, True), "a listing is not remembered"
    assert sorted(store.names("results")) == ["b", "e"]
    for name in ("results/b", "results/e"):
        other.remove(name)
    assert list(store.names("results")) == []


def test_more_names_than_a_page_of_a_listing(place: Place) -> None:
    names = {f"part-{n:05d}" for n in range(1100)}
    place.put_many({f"results/{name}": b"x" for name in names})
    assert set(place.store().names("results")) == names


def parquet_in(place: Place, count: int) -> pa.Table:
    """Rows in several files of several row groups; returns the table that they are."""
    table = pa.table({"n": range(900), "text": [f"text {n}" for n in range(900)]})
    size = len(table) // count
    for number in range(count):
        sink = pa.BufferOutputStream()
        pq.write_table(table.slice(number * size, size), sink, row_group_size=100)
        place.put(f"results/part-{number}.parquet", sink.getvalue().to_pybytes())
    return table


def test_parquet_is_read_here_and_there(place: Place) -> None:
    table = parquet_in(place, 3)
    store = place.store()
    with store.open("results/part-1.parquet") as file:
        assert pq.read_metadata(file).num_rows == 300
    with store.open("results/part-1.parquet") as file:
        assert pq.ParquetFile(file).read_row_group(1, columns=["n"])["n"].to_pylist() == list(range(400, 500))
    assert store.dataset("results").to_table().equals(table)
    filtered = store.dataset("results").to_table(columns=["text"], filter=pa.compute.field("n") == 777)
    assert filtered.to_pylist() == [{"text": "text 777"}]


def test_a_file_reads_like_any_other(place: Place) -> None:
    content = bytes(range(256)) * 10
    place.put(NAME, content)
    with place.store().open(NAME) as file:
        assert file.seek(-6, 2) == len(content) - 6
        assert file.read() == content[-6:]
        assert file.read(5) == b""
        assert file.seek(100) == 100
        assert file.read(50) == content[100:150]
        assert (file.seek(10, 1), file.tell(), file.read(1)) == (160, 160, content[160:161])


def test_where_it_is_shown(place: Place) -> None:
    store: Store = place.store()
    assert store.shown() == place.url
    assert store.shown("run.json") == f"{place.url}/run.json"
