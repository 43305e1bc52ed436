"""A dataset that grows, night after night: new files, and lines appended to known ones; each row is done once."""

from __future__ import annotations

import os
import resource
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from echo import run_echo
from growing import append, args, at_work, echoed, line, prompts, register, words
from harness import call, environment, nothing_left_over, parts, rows, run_cli, run_json, stats, write

from pipeline import merge, status, verify
from pipeline.config import load_config
from pipeline.errors import Overtaken, RunFailed
from pipeline.job import Job
from pipeline.output import manifest as manifests
from pipeline.output.local import LocalStore
from pipeline.output.sink import Sink
from pipeline.shift import Shift
from pipeline.versions import with_job


def test_every_night_only_what_is_new_is_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short last chunks stay, new ones begin behind them; what was committed is not written again."""
    inbox, out = tmp_path / "in", tmp_path / "out"
    nights = [
        ({"a": words(0, 6)}, 6),
        ({}, 0),
        ({"a": words(6, 9), "0": words(0, 2, "0")}, 5),
        ({"a": words(9, 10), "0": words(2, 9, "0"), "b": words(0, 1, "b")}, 9),
        ({"a": ["", *words(10, 11)]}, 1),
    ]
    told: dict[str, list[str]] = {}
    kept: dict[str, bytes] = {}
    for written, new in nights:
        for name, texts in written.items():
            append(inbox / f"{name}.jsonl", *(line(text) if text else b"  \n" for text in texts))
            told.setdefault(name, []).extend(filter(None, texts))
        before = len(stats(out)) if out.exists() else 0
        run_echo(monkeypatch, *args(inbox, out)).done()
        assert sum(one["rows"] for one in stats(out)[before:]) == new
        found = {part.name: part.read_bytes() for part in parts(out)}
        assert {name: found[name] for name in kept} == kept
        kept = found
        assert [prompts(out, ordinal) for ordinal in range(3)][: len(told)] == [
            told[name] for name in ("a", "0", "b") if name in told
        ]
        assert run_json(out)["summary"]["rows"] == sum(map(len, told.values()))
    assert [len(list(out.glob(f"results/part-00000{n}-*"))) for n in range(3)] == [5, 3, 1]
    assert [file["ends"] for file in run_json(out)["files"]] == [[6, 9, 10], [2], []]
    assert nothing_left_over(out)
    assert call(verify.main, str(out)).done().out.endswith("21 rows in 9 of 9 parts, nothing wrong\n")


def test_a_line_that_is_continued_and_one_that_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inbox, out = tmp_path / "in", tmp_path / "out"
    append(inbox / "a.jsonl", line("one"), line("two").strip())
    run_echo(monkeypatch, *args(inbox, out)).done()
    append(inbox / "a.jsonl", b"\n", line("three"), b'{"prompt": "fo')
    run_echo(monkeypatch, *args(inbox, out)).done()
    assert [row["prompt"] for row in rows(out)] == ["one", "two", "three", None]
    before = {part.name: part.read_bytes() for part in parts(out)}
    assert [name[-10:-8] for name in before] == ["00", "02", "03"], "the half-written row is a chunk of its own"
    append(inbox / "a.jsonl", b"u")
    run_echo(monkeypatch, *args(inbox, out)).done()
    assert '{"prompt": "fou' in rows(out)[3]["error"] and run_json(out)["summary"]["error_rows"] == 1
    append(inbox / "a.jsonl", b'r"}\n')
    assert (
        "1 file that grew came since; the next run" in call(status.main, *echoed(inbox, out), "--registered").done().out
    )
    assert call(verify.main, str(out)).done().out.endswith("4 rows in 3 of 3 parts, nothing wrong\n")
    run_echo(monkeypatch, *args(inbox, out)).done()
    assert [row["prompt"] for row in rows(out)] == ["one", "two", "three", "four"]
    assert run_json(out)["summary"]["error_rows"] == 0
    after = {part.name: part.read_bytes() for part in parts(out)}
    assert [name for name in after if after[name] != before[name]] == ["part-000000-000000000003.parquet"]
    assert nothing_left_over(out)
    assert call(verify.main, str(out)).done().out.endswith("4 rows in 3 of 3 parts, nothing wrong\n")


def test_a_whole_last_row_that_is_continued_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inbox, out = tmp_path / "in", tmp_path / "out"
    append(inbox / "a.jsonl", line("one").strip())
    run_echo(monkeypatch, *args(inbox, out)).done()
    append(inbox / "a.jsonl", b" and more\n")
    refusal = run_echo(monkeypatch, *args(inbox, out)).refusal()
    assert f"data.path {inbox / 'a.jsonl'} has changed since it was registered" in refusal
    assert "its last line had no end and has been continued; append whole lines" in refusal
    found = call(verify.main, str(out))
    assert found.code == 1 and "a.jsonl is not the file that was registered" in found.out


def half_written(inbox: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run whose last row is half a line, which is continued behind it."""
    append(inbox / "a.jsonl", *map(line, words(0, 3)), b'{"prompt": ')
    run_echo(monkeypatch, *args(inbox, out)).done()
    append(inbox / "a.jsonl", b'"a 3"}\n', *map(line, words(4, 6)))


def test_killed_before_the_row_that_is_continued_was_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whenever it is killed, the row is there: first as the error that it was."""
    inbox, out = tmp_path / "in", tmp_path / "out"
    half_written(inbox, out, monkeypatch)

    def killed(*_: Any) -> None:
        raise RunFailed("killed by the test")

    for owner, name in ((LocalStore, "replace"), (Shift, "work"), (Sink, "replace")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, killed)
            assert run_echo(patch, *args(inbox, out)).code == 1
        assert prompts(out, 0)[:4] == [*words(0, 3), None]
        assert call(status.main, *echoed(inbox, out), "--registered").code == (0 if owner is LocalStore else 75)
    assert len(run_json(out)["files"][0]["redo"]) == 1
    run_echo(monkeypatch, *args(inbox, out)).done()
    assert prompts(out, 0) == words(0, 6)
    assert nothing_left_over(out)
    append(inbox / "a.jsonl", line("a 6"))
    run_echo(monkeypatch, *args(inbox, out)).done()
    assert prompts(out, 0) == words(0, 7)
    assert run_json(out)["files"][0]["redo"] == []


def test_a_row_between_its_registration_and_its_answer_is_pending(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """verify says what status does, also in an output that is whole but for this row."""
    inbox, out = tmp_path / "in", tmp_path / "out"
    append(inbox / "a.jsonl", *map(line, words(0, 3)), b'{"prompt": ')
    run_echo(monkeypatch, *args(inbox, out)).done()
    append(inbox / "a.jsonl", b'"a 3"}\n')
    register(inbox, out)
    assert call(status.main, *echoed(inbox, out), "--registered").code == 75
    found = call(verify.main, str(out))
    assert found.code == 75, found.out
    assert found.out == (
        "pending: row 3 of a.jsonl was half-written when it was answered, and has been continued; the next run puts "
        f"its answer into {parts(out)[1]}\n{out}: 4 rows in 2 of 2 parts, nothing wrong, 1 pending\n"
    )
    append(inbox / "a.jsonl", line("a 4"))
    register(inbox, out)
    found = call(verify.main, str(out))
    assert found.code == 1 and found.out.count("pending: ") == 1
    assert f"{found.out.count('wrong: ')} wrong, 1 pending" in found.out and "is missing: rows 4 to 4" in found.out
    run_echo(monkeypatch, *args(inbox, out)).done()
    assert "pending" not in call(verify.main, str(out)).done().out


def test_a_row_that_another_process_has_in_hand_is_continued_by_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inbox, out = tmp_path / "in", tmp_path / "out"
    half_written(inbox, out, monkeypatch)
    with LocalStore(out).claims() as other:
        assert other.try_claim("000000-000000000003")
        run_echo(monkeypatch, *args(inbox, out)).done()
        assert prompts(out, 0) == [*words(0, 3), None]
    run_echo(monkeypatch, *args(inbox, out)).done()
    assert prompts(out, 0) == words(0, 6)


def test_what_comes_while_a_run_is_at_work_is_the_next_one_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the finish job, which looks at the folder again, finds nothing wrong and nothing missing."""
    inbox, out = tmp_path / "in", tmp_path / "out"
    append(inbox / "b.jsonl", *map(line, words(0, 6, "b")), b'{"prompt": "half')

    def grow() -> None:
        append(inbox / "b.jsonl", b' a line"}\n', line("more"))
        append(inbox / "a.jsonl", *map(line, words(0, 3)))

    with monkeypatch.context() as patch:
        at_work(patch, grow)
        run_echo(patch, *args(inbox, out)).done()
    assert prompts(out, 0) == [*words(0, 6, "b"), None] and not prompts(out, 1)
    assert "6 of 11 rows done, 0 errors, 3 of 5 chunks left" in call(status.main, *echoed(inbox, out)).out
    line_of_status = call(status.main, *echoed(inbox, out), "--registered").done().out
    assert (
        "7 of 7 rows done, 1 errors, 4 rows in 1 new file and 1 file that grew came since; the next" in line_of_status
    )
    verified = call(verify.main, str(out)).done().out
    assert f"note: {inbox / 'a.jsonl'} came since, with 3 rows; the next run takes them" in verified
    assert f"note: {inbox / 'b.jsonl'} has 1 more rows than are registered; the next run takes them" in verified
    assert call(merge.main, *echoed(inbox, out), "--rows=100").code == 75
    call(merge.main, *echoed(inbox, out), "--rows=100", "--registered").done()
    assert [len(pq.read_table(path)) for path in (out / "merged").iterdir()] == [7]
    run_echo(monkeypatch, *args(inbox, out)).done()
    assert sum(one["rows"] for one in stats(out)[1:]) == 5, "the new rows, and the one that was half-written"
    assert prompts(out, 0) == [*words(0, 6, "b"), "half a line", "more"] and prompts(out, 1) == words(0, 3)
    assert nothing_left_over(out)


def test_a_run_at_work_takes_what_a_later_task_has_registered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks of an array that start at different times end with the same done; here the later one dies at once."""
    inbox, out = tmp_path / "in", tmp_path / "out"
    append(inbox / "b.jsonl", *map(line, words(0, 6, "b")))

    def grow() -> None:
        append(inbox / "b.jsonl", *map(line, words(6, 8, "b")))
        append(inbox / "a.jsonl", *map(line, words(0, 3)))
        register(inbox, out)

    def grow_again() -> None:
        append(inbox / "c.jsonl", *map(line, words(0, 2, "c")))
        register(inbox, out)
        append(inbox / "d.jsonl", line("for the next run"))

    with monkeypatch.context() as patch:
        at_work(patch, grow, grow_again)
        run_echo(patch, *args(inbox, out)).done()
    assert [prompts(out, n) for n in range(4)] == [words(0, 8, "b"), words(0, 3), words(0, 2, "c"), []]
    assert run_json(out)["summary"]["rows"] == 13
    assert nothing_left_over(out)


def test_half_a_row_is_not_answered_by_who_saw_only_that(tmp_path: Path) -> None:
    """The row is nobody's yet when another task registers what it has become."""
    inbox, out = tmp_path / "in", tmp_path / "out"
    append(inbox / "a.jsonl", line("one"), b'{"prompt": ')
    resolved = {"resolved.device": "cpu"}
    early = Job(load_config(args(inbox, out)))
    with early.output.claims() as claims:
        early.start(claims, resolved, {}, {})
        _, half = early.chunks
        assert early.is_as_registered(half)
        append(inbox / "a.jsonl", b'"two"}\n', line("three"))
        late = Job(load_config(args(inbox, out)))
        with late.output.claims() as others:
            late.start(others, resolved, {}, {})
        assert not early.is_as_registered(half)
        assert early.take_over() and not early.take_over()
        assert early.is_as_registered(half)
        assert early.chunks == late.chunks == early.pending() and len(early.chunks) == 3
        assert not early.failed, "no Part was made of half of it"


def test_what_a_later_task_has_registered_and_this_one_cannot_read_is_not_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inbox, out = tmp_path / "in", tmp_path / "out"
    append(inbox / "b.jsonl", *map(line, words(0, 6, "b")))

    def come_and_go() -> None:
        append(inbox / "a.jsonl", line("gone"))
        register(inbox, out)
        (inbox / "a.jsonl").unlink()

    with monkeypatch.context() as patch:
        at_work(patch, come_and_go)
        ended = run_echo(patch, *args(inbox, out))
    assert ended.code == 75
    assert "registered more input, which this one cannot take: data.path has no a.jsonl any more" in ended.err
    assert prompts(out, 0) == words(0, 6, "b")


def test_tasks_that_first_saw_different_folders(tmp_path: Path) -> None:
    """One began with less than the other: with a file less, and with a key less in the schema made of it."""
    inbox, out = tmp_path / "in", tmp_path / "out"
    append(inbox / "a.jsonl", line("one"))
    early = Job(load_config(args(inbox, out)))
    append(inbox / "b.jsonl", b'{"prompt": "two", "more": 1}\n')
    late = Job(load_config(args(inbox, out)))
    with late.output.claims() as claims:
        late.start(claims, {}, {}, {})
    with early.output.claims() as claims, pytest.raises(Overtaken):
        early.start(claims, {}, {}, {})
    seen = []

    def body(job: Job) -> None:
        seen.append(job.manifest is not None)
        if len(seen) == 1:
            raise Overtaken

    with_job(load_config(args(inbox, out)), body)
    assert seen == [True, True]


def test_a_task_that_saw_a_file_less_than_is_registered_looks_again(tmp_path: Path) -> None:
    inbox, out = tmp_path / "in", tmp_path / "out"
    append(inbox / "a.jsonl", line("one"))
    early = Job(load_config(args(inbox, out)))
    append(inbox / "b.jsonl", line("two"))
    late = Job(load_config(args(inbox, out)))
    for job in (late, early):
        with job.output.claims() as claims:
            job.start(claims, {}, {}, {})
        assert [file.name for file in job.files] == ["a.jsonl", "b.jsonl"]


def test_a_parquet_file_that_is_being_written_is_left_for_the_next_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inbox, out = tmp_path / "in", tmp_path / "out"
    write(inbox / "b.parquet", {"prompt": words(0, 3, "b")})
    command = [argument for argument in args(inbox, out) if argument != "data=jsonl"]
    run_echo(monkeypatch, *command).done()
    whole = write(tmp_path / "a.parquet", {"prompt": words(0, 2)}).read_bytes()
    for size in (0, 2, len(whole) // 2, len(whole) - 1):
        (inbox / "a.parquet").write_bytes(whole[:size])
        sentence = f"{inbox / 'a.parquet'} has no Parquet footer yet, and is left for the next run"
        assert sentence in run_echo(monkeypatch, *command).done().err
        assert sentence in call(status.main, *command, "sampling.logprobs=true").done().out
        assert sentence in call(verify.main, str(out)).done().out
    os.utime(inbox / "a.parquet", (0, time.time() - 700))
    assert "is a truncated Parquet file" in run_echo(monkeypatch, *command).refusal()
    (inbox / "a.parquet").write_bytes(b"no Parquet at all")
    assert "is not a Parquet file" in run_echo(monkeypatch, *command).refusal()
    (inbox / "a.parquet").write_bytes(whole)
    run_echo(monkeypatch, *command).done()
    assert [one["rows"] for one in stats(out)] == [3, 2]
    assert prompts(out, 1) == words(0, 2)


def test_what_was_not_finished_before_a_file_grew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inbox, out = tmp_path / "in", tmp_path / "out"
    append(inbox / "a.jsonl", *map(line, words(0, 6)))
    run_echo(monkeypatch, *args(inbox, out)).done()
    parts(out)[1].unlink()
    append(inbox / "a.jsonl", *map(line, words(6, 12)))
    grown = call(verify.main, str(out))
    assert grown.code == 1 and "is missing: rows 4 to 5" in grown.out
    assert f"note: {inbox / 'a.jsonl'} has 6 more rows than are registered" in grown.out
    run_echo(monkeypatch, *args(inbox, out)).done()
    assert prompts(out, 0) == words(0, 12)
    assert [part.stem[-2:] for part in parts(out)] == ["00", "04", "06", "10"]


def test_a_process_that_saw_less_than_another_looks_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both start at the same time, with lines appended between their looks at the folder."""
    inbox, out = tmp_path / "in", tmp_path / "out"
    append(inbox / "a.jsonl", *map(line, words(0, 2)))
    run_echo(monkeypatch, *args(inbox, out)).done()
    jobs = []
    for count in (3, 5):
        append(inbox / "a.jsonl", *map(line, words(count - 1, count)))
        jobs.append(Job(load_config([*args(inbox, out), "sampling.logprobs=true"])))
        assert jobs[-1].num_rows == count - len(jobs) + 1
    resolved = {k: v for k, v in run_json(out)["fingerprint"].items() if k.startswith("resolved.")}
    for job in reversed(jobs):
        with job.output.claims() as claims:
            job.start(claims, resolved, {}, {})
        assert job.num_rows == 4
        assert [chunk.first_row for chunk in job.pending()] == [2]


@pytest.mark.parametrize("begin", [b"", b"\n\n"])
def test_a_dataset_that_begins_without_rows(begin: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inbox, out = tmp_path / "in", tmp_path / "out"
    append(inbox / "a.jsonl", begin)
    run_echo(monkeypatch, *args(inbox, out)).done()
    assert rows(out) == []
    append(inbox / "a.jsonl", *map(line, words(0, 3)))
    run_echo(monkeypatch, *args(inbox, out)).done()
    assert prompts(out, 1) == words(0, 3)
    assert call(verify.main, str(out)).done().out.endswith("3 rows in 1 of 1 parts, nothing wrong\n")


def test_a_limit_is_filled_up_in_the_order_of_registration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inbox, out = tmp_path / "in", tmp_path / "out"
    append(inbox / "a.jsonl", *map(line, words(0, 3)))
    append(inbox / "b.jsonl", *map(line, words(0, 3, "b")))
    for _ in range(3):
        run_echo(monkeypatch, *args(inbox, out, "data.limit=10")).done()
        append(inbox / "a.jsonl", *map(line, words(len(prompts(out, 0)), 20)))
    assert (prompts(out, 0), prompts(out, 1)) == (words(0, 7), words(0, 3, "b"))


def test_ten_million_rows_that_are_done_are_seen_to_be_in_two_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1,000 files and 10,000 Parts, of which all but one are links to that one; seconds of the processor."""
    inbox, out = tmp_path / "in", tmp_path / "out"
    append(inbox / "0000.jsonl", line("x") * 10_000)
    command = args(inbox, out, "data.chunk_rows=1000")
    run_echo(monkeypatch, *command).done()
    store = LocalStore(out)
    run = manifests.load(store)
    (file,) = run.files
    part = parts(out)[0]
    files = [replace(file, ordinal=n, name=f"{n:04d}.jsonl") for n in range(1000)]
    for one in files[1:]:
        os.link(inbox / "0000.jsonl", inbox / one.name)
        for first in range(0, 10_000, 1000):
            os.link(part, out / "results" / f"part-{one.ordinal:06d}-{first:012d}.parquet")
    summary = {**(run.summary or {}), "chunks": 10_000, "rows": 10_000_000}
    store.replace("run.json", replace(run, files=tuple(files), summary=summary).to_json().encode())
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run_cli(*command, "sampling.logprobs=true", env=environment(PYTHONPROFILEIMPORTTIME="1")).done()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert "(10,000,000 rows, 0 of them errors, in 10,000 parts)" in done.out
    assert " torch\n" not in done.err and " pyarrow\n" in done.err
    assert after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime < 2
