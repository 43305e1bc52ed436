"""run.json: agreed on by processes that start at once, guarding resume, registering files once."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from stores import Place, store_environment, store_from_environment  # noqa: F401  # by RACER

from pipeline.data.source import Counted, FoundFile, SourceFile, chunks_of, chunks_within
from pipeline.errors import ConfigError, RunFailed
from pipeline.output import manifest as room
from pipeline.output import registration
from pipeline.output.local import LocalStore
from pipeline.output.manifest import RunManifest, check, create_or_load, diff, find, load, update

SCHEMA = pa.schema(
    [("id", pa.int64()), ("probs", pa.map_(pa.string(), pa.float64())), ("at", pa.timestamp("us", "UTC"))],
    metadata={"pipeline.run": "r1"},
)

# argv: folder to meet in, own number, number of processes, number of updates.
RACER = """
import sys, time
from dataclasses import replace
from pathlib import Path
import test_manifest as t
meeting, me, processes, count = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
store = t.store_from_environment()
(meeting / f"ready{me}").touch()
while len(list(meeting.glob("ready*"))) < processes:
    time.sleep(0.001)
mine, created = t.create_or_load(store, t.manifest(run_id=me))
with store.claims() as claims:
    for _ in range(count):
        t.update(store, claims, lambda m: replace(m, summary={"n": (m.summary or {"n": 0})["n"] + 1}))
print(mine.run_id, created)
"""


def manifest(**changes: object) -> RunManifest:
    values = {
        "run_id": "0a1b",
        "created": "2024-05-01T12:00:00+00:00",
        "pipeline_version": "0.1.0",
        "fingerprint": {"model.path": "llama", "sampling.top_p": 0.9, "task.labels": ["a", "b"], "quant.bits": None},
        "informational": {"versions.torch": "2.11"},
        "files": (registered(0, "a.parquet", 25), registered(1, "c.parquet", 5)),
        "chunk_rows": 10,
        "schema": SCHEMA,
        "input_schema": SCHEMA.remove(1),
        "engine": {"classes": [[64, 256]]},
        "config": {"data": {"path": "/d/ü"}},
    }
    return RunManifest(**(values | changes))


def found(name: str, rows: int = 10, digest: str = "d", folder: str = "/d") -> FoundFile:
    return FoundFile(name=name, path=f"{folder}/{name}", size=rows * 7, rows=rows, digest=digest)


def registered(ordinal: int, name: str, rows: int) -> SourceFile:
    return SourceFile(ordinal=ordinal, **asdict(found(name, rows)))


# The file


def test_run_json_gives_back_what_was_stored_and_is_readable(place: Place) -> None:
    store = place.store()
    assert find(store) is None
    made, created = create_or_load(store, manifest(summary={"rows": 3}))
    assert created
    assert find(store) == load(store) == made == manifest(summary={"rows": 3})
    assert load(store).schema.equals(SCHEMA, check_metadata=True)
    assert load(store).input_schema.equals(SCHEMA.remove(1), check_metadata=True)
    (text,) = (content.decode("utf-8") for content in place.files().values())
    values = json.loads(text)
    assert text == json.dumps(values, sort_keys=True, indent=2, ensure_ascii=False) + "\n"
    assert values["format"] == 1
    assert values["schema"]["fields"][0] == "id: int64"
    assert values["files"][0] == {
        "ordinal": 0, "name": "a.parquet", "path": "/d/a.parquet", "size": 175, "rows": 25, "digest": "d",
        "content": "", "ends": [], "unfinished": False, "redo": [],
    }  # fmt: skip
    assert list(place.files()) == ["run.json"]


def test_the_second_to_come_gets_what_the_first_made(place: Place) -> None:
    create_or_load(place.store(), manifest(run_id="first"))
    loaded, created = create_or_load(place.store(), manifest(run_id="second"))
    assert (loaded.run_id, created) == ("first", False)


def test_processes_that_start_at_once_agree_and_lose_no_update(place: Place, tmp_path: Path) -> None:
    if not place.is_shared:
        pytest.skip("other processes do not see it")
    count = 15 if place.is_local else 2
    meeting = tmp_path / "meeting"
    meeting.mkdir()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, str(meeting), str(me), "4", str(count)],
            env=store_environment(place, Path(__file__).parent),
            stdout=subprocess.PIPE,
            text=True,
        )
        for me in range(4)
    ]
    answers = [process.communicate(timeout=90)[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0] * 4
    assert len({run_id for run_id, _ in answers}) == 1
    assert Counter(created for _, created in answers) == {"True": 1, "False": 3}
    winner = next(run_id for run_id, created in answers if created == "True")
    assert load(place.store()) == manifest(run_id=winner, summary={"n": 4 * count})
    assert list(place.files()) == ["run.json"]


def broken_texts() -> dict[str, str]:
    whole = manifest().to_json()
    written = json.loads(whole)
    values = {key: value for key, value in written.items() if key != "sha256"}
    return {
        "a digit": json.dumps(written | {"chunk_rows": written["chunk_rows"] + 1}),
        "empty": "",
        "torn": whole[: len(whole) // 2],
        "no object": "[]",
        "newer": json.dumps(values | {"format": 99}),
        "field missing": json.dumps({key: value for key, value in values.items() if key != "chunk_rows"}),
        "field added": json.dumps(values | {"surprise": 1}),
        "bad file": json.dumps(values | {"files": [{"name": "x"}]}),
        "bad base64": json.dumps(values | {"schema": {"arrow_ipc_base64": "?"}}),
        "bad schema": json.dumps(values | {"schema": {"arrow_ipc_base64": "AAAA"}}),
        "no schema": json.dumps(values | {"schema": "id: int64"}),
    }


@pytest.mark.parametrize("kind", broken_texts())
def test_a_run_json_that_cannot_be_read_is_a_configuration_error(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "run.json"
    path.write_text(broken_texts()[kind])
    with pytest.raises(ConfigError, match=rf"output\.dir {tmp_path} has a run\.json that cannot be read") as error:
        create_or_load(LocalStore(tmp_path), manifest())
    assert "another output.dir" in str(error.value)
    assert path.read_text() == broken_texts()[kind]


def test_a_torn_run_json_is_a_configuration_error_anywhere(place: Place) -> None:
    place.put("run.json", broken_texts()["torn"].encode())
    with pytest.raises(ConfigError, match=r"has a run\.json that cannot be read"):
        find(place.store())


def test_a_format_of_the_future_is_named(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(broken_texts()["newer"])
    with pytest.raises(ConfigError, match="its format is 99, this version reads 1"):
        load(LocalStore(tmp_path))


# Updates


def test_an_update_that_fails_changes_nothing_and_unlocks(place: Place) -> None:
    def fail(_: RunManifest) -> RunManifest:
        raise ConfigError("no")

    store = place.store()
    create_or_load(store, manifest())
    with store.claims() as claims:
        with pytest.raises(ConfigError, match="no"):
            update(store, claims, fail)
        assert load(store) == manifest()
        assert claims.held() == set()
        assert update(store, claims, lambda m: replace(m, chunk_rows=3)) == load(store) == manifest(chunk_rows=3)
    assert list(place.files()) == ["run.json"]


def test_an_update_waits_for_others_and_then_gives_up(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    store = place.store()
    create_or_load(store, manifest())
    with store.claims() as mine, place.store().claims() as others:
        monkeypatch.setattr(type(mine), "patience_s", 0.2)
        others.try_claim("run")
        with pytest.raises(RunFailed, match=r"run\.json was kept locked by another process"):
            update(store, mine, lambda m: m)
        others.release("run")
        update(store, mine, lambda m: m)


def test_who_stood_still_during_an_update_does_not_undo_what_happened_meanwhile(place: Place) -> None:
    """A process that was taken for dead must not write back the run.json that it has read before."""
    store = place.store()
    create_or_load(store, manifest())

    def slow(found: RunManifest) -> RunManifest:
        place.remove("claims/run.json")
        with place.store().claims() as other:
            update(place.store(), other, lambda m: replace(m, chunk_rows=7))
        return replace(found, chunk_rows=3)

    with store.claims() as claims, pytest.raises(RunFailed, match="was taken over while this process stood still"):
        update(store, claims, slow)
    assert load(store).chunk_rows == 7


# What guards resume


def test_differences_name_key_and_both_values() -> None:
    then = {"model.path": "llama", "sampling.seed": 1, "old": True, "same": [1, (2,)], "kind": 1}
    now = {"model.path": "qwen", "sampling.seed": 1, "new": None, "same": (1, [2]), "kind": True}
    assert diff(then, now) == [
        "kind: 1 -> true",
        'model.path: "llama" -> "qwen"',
        "new: (absent) -> null",
        "old: true -> (absent)",
    ]
    assert diff(then, then) == []


@given(st.text(max_size=200), st.text(max_size=200))
def test_differences_are_short_and_show_where_long_values_part(then: str, now: str) -> None:
    lines = diff({"k": then}, {"k": now})
    assert len(lines) == (then != now)
    for line in lines:
        old, new = room._shortened(room._text(then), room._text(now))
        assert line == f"k: {old} -> {new}"
        assert max(len(old), len(new)) <= 80
        assert old != new


def test_a_long_common_beginning_is_cut() -> None:
    (line,) = diff({"task.prompt": "x" * 500 + "a"}, {"task.prompt": "x" * 500 + "b" * 500})
    assert line.startswith(f'task.prompt: ...{"x" * 20}a" -> ...{"x" * 20}bbb')
    assert line.endswith("bbb...")


def test_another_runs_fingerprint_is_refused_in_one_sentence() -> None:
    then = {f"k{n}": n for n in range(7)}
    check(then, dict(then), "/out")
    with pytest.raises(ConfigError) as error:
        check(then, then | {"k1": 5}, "/out")
    assert str(error.value) == (
        "output.dir /out holds results of another run: k1: 1 -> 5; "
        "use another output.dir or the settings it was made with, or output.on_change=new for a version beside it"
    )
    with pytest.raises(ConfigError, match=r"k4: 4 -> \(absent\); and 2 more; use another"):
        check(then, {}, "/out")


# Registration


def register(run: RunManifest, files: list[FoundFile], committed: set[str]) -> tuple[SourceFile, ...]:
    def count(file: FoundFile) -> Counted:
        pytest.fail(f"{file.name} is counted already")

    return registration.register(run, files, committed, count, lambda file, found: "it is another")


def test_known_files_keep_their_ordinals_and_new_ones_follow_by_name() -> None:
    files = register(
        manifest(), [found(n) for n in ("d", "b")] + [found("c.parquet", 5), found("a.parquet", 25)], set()
    )
    assert [(file.ordinal, file.name) for file in files] == [(0, "a.parquet"), (1, "c.parquet"), (2, "b"), (3, "d")]
    fresh = register(manifest(files=()), [found("b"), found("a")], set())
    assert [(file.ordinal, file.name) for file in fresh] == [(0, "a"), (1, "b")]
    assert register(manifest(files=fresh), [found("a"), found("b")], set()) == fresh


def test_a_dataset_that_moved_is_the_same_at_its_new_place() -> None:
    moved = [found("a.parquet", 25, folder="/new"), found("c.parquet", 5, folder="/new")]
    assert [file.path for file in register(manifest(), moved, set())] == ["/new/a.parquet", "/new/c.parquet"]


@pytest.mark.parametrize("change", [{"digest": "other"}, {"size": 1}])
def test_a_changed_file_is_named(change: dict[str, object]) -> None:
    now = [replace(found("a.parquet", 25), **change), found("c.parquet", 5)]
    with pytest.raises(ConfigError, match=r"data\.path /d/a\.parquet has changed since it was registered .*; restore"):
        register(manifest(), now, set())


def test_a_file_may_go_when_all_of_it_is_done() -> None:
    ids: Callable[[int], list[str]] = lambda n: [c.id for c in chunks_of(manifest().files[n], 10)]  # noqa: E731
    rest = [found("c.parquet", 5), found("e")]
    kept = register(manifest(), rest, {*ids(0)})
    assert [(file.ordinal, file.name) for file in kept] == [(0, "a.parquet"), (1, "c.parquet"), (2, "e")]
    with pytest.raises(ConfigError, match=r"data\.path has no a\.parquet any more .*; restore the file"):
        register(manifest(), rest, {*ids(0)[:-1], *ids(1)})


def test_rows_are_counted_only_when_a_file_is_registered() -> None:
    uncounted = [replace(file, rows=None) for file in (found("a.parquet", 25), found("c.parquet", 5), found("e", 7))]
    files = registration.register(manifest(), uncounted, set(), lambda file: Counted(rows={"e": 7}[file.name]), str)
    assert [(file.name, file.rows) for file in files] == [("a.parquet", 25), ("c.parquet", 5), ("e", 7)]


def grown(rows: int, reason: str = "") -> tuple[SourceFile, ...]:
    """a.parquet of 25 rows found again with so many; c.parquet as it was."""
    now = [replace(found("a.parquet", rows, digest="more"), rows=None), found("c.parquet", 5)]
    return registration.register(
        manifest(), now, set(), str, lambda file, found: reason or Counted(rows=rows, content="h")
    )


def test_rows_that_were_appended_are_registered_behind_the_old_ones() -> None:
    first, second = grown(31)
    assert first == replace(registered(0, "a.parquet", 31), digest="more", content="h", ends=(25,))
    assert second == registered(1, "c.parquet", 5)
    assert [(chunk.first_row, chunk.num_rows) for chunk in chunks_of(first, 10)] == [
        (0, 10),
        (10, 10),
        (20, 5),
        (25, 6),
    ]
    again = [found("a.parquet", 40, digest="still more"), found("c.parquet", 5)]
    run = manifest(files=(first, second))
    last, _ = registration.register(run, again, set(), str, lambda f, n: Counted(rows=40, content="i"))
    assert last.ends == (25, 31) and last.rows == 40
    blank, _ = registration.register(run, again, set(), str, lambda f, n: Counted(rows=31, content="i"))
    assert (blank.ends, blank.rows, blank.digest) == ((25,), 31, "still more"), "blank lines are no rows"


def test_what_else_was_done_to_a_file_is_told() -> None:
    with pytest.raises(ConfigError, match=r"a\.parquet has changed .*: its last line was continued; restore"):
        grown(31, "its last line was continued")


@pytest.mark.parametrize(("limit", "rows"), [(20, 25), (30, 25), (33, 28), (100, 45)])
def test_appended_rows_do_not_push_out_others_that_were_within_the_limit(limit: int, rows: int) -> None:
    run = manifest(fingerprint={"data.limit": limit})
    now = [found("a.parquet", 45, digest="more"), found("c.parquet", 5)]
    files = registration.register(run, now, set(), str, lambda file, found: Counted(rows=45))
    assert files[0].rows == rows
    before, after = (chunks_within(some, 10, limit) for some in (run.files, files))
    assert set(before) <= set(after), "a chunk that may have been committed is what it was"
    assert sum(chunk.num_rows for chunk in after) == min(limit, 50)


def test_a_file_without_rows_may_become_another() -> None:
    """Its place may hold the empty Part of a dataset without rows, so it gets a new one."""
    empty = (replace(registered(0, "a", 0), size=3), registered(1, "c", 5))
    files = register(manifest(files=empty), [found("a", 4), found("c", 5)], set())
    assert [(file.ordinal, file.name, file.rows) for file in files] == [(1, "c", 5), (2, "a", 4)]
    files = register(manifest(files=empty[:1]), [found("a", 4)], set())
    assert [(file.ordinal, file.name, file.rows) for file in files] == [(1, "a", 4)]
