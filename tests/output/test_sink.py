"""Commits: whole, once, in order, and nothing under a final name when writing fails."""

from __future__ import annotations

import errno
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import duckdb
import pandas as pd
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from stores import Place, local_place, store_environment, store_from_environment  # noqa: F401  # by COMMITTER

from pipeline.data.source import Chunk
from pipeline.errors import ConfigError, RunFailed
from pipeline.output import durable
from pipeline.output.local import LocalStore
from pipeline.output.sink import Sink, part_name, part_path

SCHEMA = pa.schema([("id", pa.int64()), ("row_id", pa.string()), ("completion", pa.string())])
ROWS = 20

# What the processes of these tests run; argv: folder to meet in, first chunk, number of chunks.
COMMITTER = """
import sys, time
from pathlib import Path
import test_sink as t
root, start, count = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
sink = t.Sink(t.store_from_environment(), t.SCHEMA, f"p{start}")
(root / f"ready{start}").touch()
while not (root / "go").exists():
    time.sleep(0.001)
for step in range(count):
    number = (start + step) % count
    print(number, int(sink.commit(t.chunk(number), t.answers(number), {"rows": t.ROWS})), flush=True)
"""


def chunk(number: int) -> Chunk:
    return Chunk(file_ordinal=number // 10, first_row=number % 10 * ROWS, num_rows=ROWS)


def answers(number: int) -> pa.Table:
    one = chunk(number)
    columns = [
        pa.array(range(number * ROWS, (number + 1) * ROWS), pa.int64()),
        pa.array([one.row_id(index) for index in range(ROWS)]),
        pa.array([f"answer {number} {index}" for index in range(ROWS)]),
    ]
    return pa.Table.from_arrays(columns, schema=SCHEMA)


def sink(root: Path, attempt: str = "a1") -> Sink:
    return Sink(LocalStore(root), SCHEMA, attempt)


def start_committers(place: Place, root: Path, starts: list[int], count: int) -> list[subprocess.Popen[str]]:
    """Processes that commit to a place, begun together; they meet in the folder `root`."""
    env = store_environment(place, Path(__file__).parent)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", COMMITTER, str(root), str(start), str(count)],
            stdout=subprocess.PIPE,
            text=True,
            env=env,
        )
        for start in starts
    ]
    while len(list(root.glob("ready*"))) < len(starts):
        assert all(process.poll() is None for process in processes)
        time.sleep(0.005)
    (root / "go").touch()
    return processes


def noise(count: int) -> pa.Table:
    """Answers that do not compress."""
    texts = [random.Random(index).randbytes(2048).hex() for index in range(count)]
    ids = range(count)
    return pa.Table.from_arrays([pa.array(ids, pa.int64()), pa.array(map(str, ids)), pa.array(texts)], schema=SCHEMA)


# The result


def parts_of(place: Place) -> dict[str, pa.Table]:
    """The Parts of a place, each read by pyarrow from its bytes; fails if one is not whole."""
    found = place.files()
    return {name: pq.read_table(pa.BufferReader(found[name])) for name in sorted(found) if name.endswith(".parquet")}


def test_parts_in_order_are_the_rows_for_every_reader(tmp_path: Path) -> None:
    out = sink(tmp_path)
    numbers = list(range(25))
    for number in random.Random(0).sample(numbers, len(numbers)):
        assert out.commit(chunk(number), answers(number), {"rows": ROWS})
    expected = pa.concat_tables([answers(number) for number in numbers])
    results = tmp_path / "results"
    assert ds.dataset(results).to_table().equals(expected)
    assert pd.read_parquet(results).equals(expected.to_pandas())
    query = f"select * from read_parquet('{results}/*.parquet') order by filename, file_row_number"
    assert duckdb.sql(query).fetchall() == [tuple(row.values()) for row in expected.to_pylist()]
    assert out.committed() == {chunk(number).id for number in numbers}
    assert list((tmp_path / "journal").iterdir()) == []


def test_part_names_sort_like_rows_and_give_the_ids_back(tmp_path: Path) -> None:
    ids = [Chunk(file_ordinal=f, first_row=r, num_rows=1).id for f in (0, 9, 10) for r in (0, 999, 1000)]
    assert sorted(map(part_name, ids)) == list(map(part_name, ids))
    out = sink(tmp_path)
    for name in [*map(part_name, ids), "part-x.parquet", "part-000000-000000000000.parquet.tmp", "other.parquet"]:
        (tmp_path / "results" / name).touch()
    assert out.committed() == set(ids)


def test_the_second_commit_is_discarded(place: Place) -> None:
    assert Sink(place.store(), SCHEMA, "a1").commit(chunk(3), answers(3), {"rows": 1})
    before = place.files()
    assert not Sink(place.store(), SCHEMA, "a2").commit(chunk(3), answers(3), {"rows": 2})
    assert place.files() == before
    assert list(before) == [part_path(chunk(3).id)]
    metadata = pq.read_metadata(pa.BufferReader(before[part_path(chunk(3).id)])).metadata
    assert (metadata[b"pipeline.counts"], metadata[b"pipeline.attempt"]) == (b'{"rows": 1}', b"a1")


def test_the_second_commit_leaves_the_first_ones_file_alone(tmp_path: Path) -> None:
    assert sink(tmp_path, "a1").commit(chunk(3), answers(3), {"rows": 1})
    before = (tmp_path / "results" / part_name(chunk(3).id)).stat()
    assert not sink(tmp_path, "a2").commit(chunk(3), answers(3), {"rows": 2})
    after = (tmp_path / "results" / part_name(chunk(3).id)).stat()
    assert (after.st_ino, after.st_mtime_ns, after.st_nlink) == (before.st_ino, before.st_mtime_ns, 1)
    assert list((tmp_path / "journal").iterdir()) == []


def test_the_schema_is_enforced(place: Place) -> None:
    out = Sink(place.store(), SCHEMA, "a1")
    table = answers(1)
    mixed = table.select(["completion", "id", "row_id"]).set_column(1, "id", table["id"].cast(pa.int32()))
    assert out.commit(chunk(1), mixed, {})
    assert parts_of(place)[part_path(chunk(1).id)].equals(table)
    with pytest.raises(pa.ArrowInvalid):
        out.commit(chunk(2), answers(2).set_column(0, "id", pa.array(["x"] * ROWS)), {})
    with pytest.raises(AssertionError, match="19 rows"):
        out.commit(chunk(2), answers(2).slice(1), {})
    assert out.committed() == {chunk(1).id}
    assert list(place.files()) == [part_path(chunk(1).id)]


def test_a_dataset_without_rows_gives_one_part_with_the_schema(place: Place) -> None:
    out = Sink(place.store(), SCHEMA, "a1")
    assert out.commit_empty()
    assert not Sink(place.store(), SCHEMA, "a2").commit_empty()
    ((name, table),) = parts_of(place).items()
    assert name == "results/part-000000-000000000000.parquet"
    assert table.equals(SCHEMA.empty_table())


def test_what_is_found_wrong_before_publishing_stops_it(place: Place) -> None:
    def refuse() -> None:
        raise RunFailed("not ours")

    out = Sink(place.store(), SCHEMA, "a1", before_publish=refuse)
    with pytest.raises(RunFailed, match="not ours"):
        out.commit(chunk(1), answers(1), {})
    assert place.files() == {}


def test_totals_are_the_sums_of_the_counts(place: Place) -> None:
    out = Sink(place.store(), SCHEMA, "a1")
    out.commit(chunk(1), answers(1), {"rows": 20, "error_rows": 1})
    out.commit(chunk(2), answers(2), {"rows": 20, "tokens": 7})
    out.commit(chunk(3), answers(3), {"rows": 20})
    assert out.totals([chunk(1).id, chunk(2).id]) == {"rows": 40, "error_rows": 1, "tokens": 7}
    assert out.totals([]) == {}
    footer = pq.read_metadata(pa.BufferReader(place.files()[part_path(chunk(1).id)])).metadata
    assert json.loads(footer[b"pipeline.counts"]) == {"rows": 20, "error_rows": 1}


def test_totals_name_a_part_that_is_not_ours(place: Place) -> None:
    out = Sink(place.store(), SCHEMA, "a1")
    buffer = pa.BufferOutputStream()
    pq.write_table(answers(1), buffer)
    place.put(part_path(chunk(1).id), buffer.getvalue().to_pybytes())
    place.put(part_path(chunk(2).id), b"PAR1")
    for number in (1, 2, 3):
        with pytest.raises(RunFailed, match=f"{part_name(chunk(number).id)} is not a Part .*; remove it"):
            out.totals([chunk(number).id])


def test_totals_name_a_part_of_another_run(place: Place) -> None:
    for run in ("one", "other"):
        out = Sink(place.store(), SCHEMA.with_metadata({"pipeline.run_id": run}), run)
        out.commit(chunk(run == "one"), answers(run == "one"), {"rows": 1})
    assert out.totals([chunk(0).id]) == {"rows": 1}
    with pytest.raises(RunFailed, match=f"{part_name(chunk(1).id)} was made by another run"):
        out.totals([chunk(0).id, chunk(1).id])


# Error rows done again

ROW_ERRORS = pa.schema([("id", pa.int64()), ("finish_reason", pa.string()), ("lists", pa.list_(pa.float64()))])


def rows_with_errors(*errors: int, ids: int = 0) -> pa.Table:
    """20 rows, some of them errors; the others have a list with values that are hard to keep."""
    reasons = ["error" if row in errors else "stop" for row in range(ROWS)]
    lists = [None if row in errors else [row, -0.0, float("inf"), None] for row in range(ROWS)]
    return pa.table({"id": [ids + row for row in range(ROWS)], "finish_reason": reasons, "lists": lists}, ROW_ERRORS)


@pytest.mark.parametrize("errors", [(0,), (19,), (3, 4, 5), (0, 7, 19), tuple(range(ROWS))], ids=str)
def test_error_rows_are_replaced_and_no_others(tmp_path: Path, errors: tuple[int, ...]) -> None:
    first = Sink(LocalStore(tmp_path), ROW_ERRORS, "a1")
    first.commit(chunk(0), rows_with_errors(*errors), {"rows": ROWS, "error_rows": len(errors)})
    again = Sink(LocalStore(tmp_path), ROW_ERRORS, "a2", compression="none", row_group_rows=3)
    part = again.read_failed(chunk(0).id, "a1")
    assert part is not None and list(part.failed) == list(errors)
    assert part.failed_rows.equals(rows_with_errors(*errors).take(errors))
    done = rows_with_errors(ids=100).take(errors)
    assert again.replace(chunk(0), part, done, {"rows": ROWS, "error_rows": 0}, lambda: True)
    found = pq.read_table(tmp_path / part_path(chunk(0).id))
    others = pa.array([row for row in range(ROWS) if row not in errors], pa.int64())
    assert found.take(errors).equals(done) and found.take(others).equals(rows_with_errors().take(others))
    assert again.footer(chunk(0).id).counts == {"rows": ROWS, "error_rows": 0}
    assert list((tmp_path / "journal").iterdir()) == []


def test_a_part_is_replaced_by_whoever_holds_its_claim_and_saw_it_last(place: Place) -> None:
    one, other = (Sink(place.store(), ROW_ERRORS, attempt) for attempt in ("a1", "a2"))
    one.commit(chunk(0), rows_with_errors(1), {"rows": ROWS, "error_rows": 1})
    assert other.read_failed(chunk(0).id, "a0") is None
    part = other.read_failed(chunk(0).id, "a1")
    assert part is not None
    before, done = place.files(), rows_with_errors().take([1])
    assert not other.replace(chunk(0), part, done, {}, lambda: False)
    assert place.files() == before
    assert other.replace(chunk(0), part, done, {}, lambda: True)
    (replaced,) = parts_of(place).values()
    assert replaced.equals(rows_with_errors())
    before = place.files()
    assert not one.replace(chunk(0), part, done, {}, lambda: True), "it is not the Part that was read"
    assert place.files() == before


# Several processes, killed ones too


def test_of_four_processes_that_commit_everything_each_chunk_has_one_winner(place: Place, tmp_path: Path) -> None:
    if not place.is_shared:
        pytest.skip("other processes do not see it")
    count = 60 if place.is_local else 15
    meeting = tmp_path / "meeting"
    meeting.mkdir()
    processes = start_committers(place, meeting, [0, 1, 2, count // 2], count)
    lines = [line.split() for process in processes for line in process.communicate()[0].splitlines()]
    assert [process.returncode for process in processes] == [0] * 4
    assert len(lines) == 4 * count
    assert Counter(number for number, won in lines if won == "1") == {str(number): 1 for number in range(count)}
    found = parts_of(place)
    assert pa.concat_tables(found.values()).equals(pa.concat_tables([answers(number) for number in range(count)]))
    assert set(place.files()) == set(found), "nothing else lies around"
    out = Sink(place.store(), SCHEMA, "last")
    assert out.totals(out.committed()) == {"rows": count * ROWS}


def test_a_killed_process_leaves_only_whole_parts(place: Place, tmp_path: Path) -> None:
    if not place.is_shared:
        pytest.skip("other processes do not see it")
    rng, store = random.Random(1), place.store()
    meeting = tmp_path / "meeting"
    meeting.mkdir()
    for attempt in range(4 if place.is_local else 2):
        for old in meeting.iterdir():
            old.unlink()
        before = len(store.names("results"))
        (process,) = start_committers(place, meeting, [attempt], 2000)
        while len(store.names("results")) == before:
            assert process.poll() is None
        time.sleep(rng.uniform(0.002, 0.15))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        for name, table in parts_of(place).items():
            number = table["id"][0].as_py() // ROWS
            assert (name, table) == (part_path(chunk(number).id), answers(number))
    assert Sink(place.store(), SCHEMA, "last").committed()


# Failing writes


def assert_nothing_published(out: Sink, root: Path) -> None:
    assert out.committed() == set()
    assert list((root / "results").iterdir()) == []
    assert list((root / "journal").iterdir()) == []


def test_a_full_disk_ends_the_run_and_a_freed_one_takes_the_chunk(small_disk: Path) -> None:
    out = sink(small_disk)
    big = Chunk(file_ordinal=0, first_row=0, num_rows=200)
    with pytest.raises(RunFailed, match=r"part-000000-000000000000\.parquet could not be written \(No space left"):
        out.commit(big, noise(200), {})
    assert_nothing_published(out, small_disk)
    assert out.commit(chunk(0), answers(0), {})


def test_a_read_only_disk_ends_the_run(small_disk: Path) -> None:
    out = sink(small_disk)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(RunFailed, match=r"could not be written \(Read-only file system\)"):
        out.commit(chunk(0), answers(0), {})
    assert_nothing_published(out, small_disk)
    with pytest.raises(ConfigError, match=r"output\.dir .*\(Read-only file system\)"):
        sink(small_disk / "deeper")


def test_a_file_size_limit_ends_the_run(tmp_path: Path) -> None:
    code = """
import resource, signal, sys
from pathlib import Path
import test_sink as t
out = t.sink(Path(sys.argv[1]))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    out.commit(t.Chunk(file_ordinal=0, first_row=0, num_rows=200), t.noise(200), {})
except t.RunFailed as error:
    print(error)
t.assert_nothing_published(out, Path(sys.argv[1]))
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    env = store_environment(local_place(tmp_path), Path(__file__).parent)
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert "could not be written (File too large)" in done.stdout
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("failing", ["fsync", "link"])
def test_an_io_error_of_any_step_leaves_no_final_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    def broken(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    out = sink(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, failing, broken)
        with pytest.raises(RunFailed, match=r"could not be written \(Input/output error\)"):
            out.commit(chunk(0), answers(0), {})
    assert_nothing_published(out, tmp_path)


def test_an_io_error_on_closing_leaves_no_final_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS tells of a write that failed only then."""

    class Failing(io.BufferedWriter):
        def close(self) -> None:
            was_open = not self.closed
            super().close()
            if was_open:
                raise OSError(errno.EIO, os.strerror(errno.EIO))

    out, store = sink(tmp_path), LocalStore(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda path, mode: Failing(io.FileIO(path, mode.replace("b", ""))))
        with pytest.raises(RunFailed, match=r"could not be written \(Input/output error\)"):
            out.commit(chunk(0), answers(0), {})
        for write in (store.create, store.replace):
            with pytest.raises(OSError, match="Input/output error"):
                write("journal/segment", b"rows")
    assert_nothing_published(out, tmp_path)
    assert out.commit(chunk(0), answers(0), {})


def test_a_folder_that_cannot_be_made_is_a_configuration_error(tmp_path: Path) -> None:
    (tmp_path / "results").write_text("a file")
    with pytest.raises(ConfigError, match=r"output\.dir cannot have the folder .*results \(File exists\)"):
        sink(tmp_path)


# File systems without hard links


@pytest.fixture
def no_hard_links(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)


@pytest.mark.usefixtures("no_hard_links")
def test_without_hard_links_a_rename_that_does_not_replace_publishes(tmp_path: Path) -> None:
    out = sink(tmp_path, "a1")
    assert out.commit(chunk(3), answers(3), {"rows": 1})
    assert not sink(tmp_path, "a2").commit(chunk(3), answers(3), {"rows": 2})
    assert out.totals([chunk(3).id]) == {"rows": 1}
    assert ds.dataset(tmp_path / "results").to_table().equals(answers(3))
    assert list((tmp_path / "journal").iterdir()) == []
    (tmp_path / "results").rename(tmp_path / "gone")
    with pytest.raises(RunFailed, match=r"could not be written \(No such file or directory\)"):
        out.commit(chunk(4), answers(4), {})
    assert list((tmp_path / "journal").iterdir()) == []


@pytest.mark.usefixtures("no_hard_links")
def test_a_file_system_without_any_exclusive_publish_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(durable, "_renameat2", lambda *_: errno.EINVAL)
    out = sink(tmp_path)
    with pytest.raises(RunFailed, match="can neither hard-link nor rename without replacing"):
        out.commit(chunk(3), answers(3), {})
    assert_nothing_published(out, tmp_path)


def test_a_link_that_the_network_repeated_counts_as_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link

    def repeated(source: Path, target: Path) -> None:
        link(source, target)
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))

    monkeypatch.setattr(os, "link", repeated)
    assert sink(tmp_path).commit(chunk(3), answers(3), {})
