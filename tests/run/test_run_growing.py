"""A dataset that grows, night after night: new files, and lines appended to known ones; each row is done once."""

from __future__ import annotations

import json
import os
import resource
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from echo import run_echo
from harness import TINY, call, environment, nothing_left_over, parts, rows, run_cli, run_json, stats

from pipeline import verify
from pipeline.config import load_config
from pipeline.job import Job
from pipeline.output import manifest as manifests
from pipeline.output.local import LocalStore


def args(data: Path, out: Path, *more: str) -> list[str]:
    return [
        "model=path", f"model.path={TINY}", "data=jsonl", f"data.path={data}", f"output.dir={out}", "quant=none",
        "data.chunk_rows=4", "task.chat=false", *more,
    ]  # fmt: skip


def line(value: Any) -> bytes:
    return json.dumps({"prompt": value}).encode() + b"\n"


def append(path: Path, *content: bytes) -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("ab") as file:
        file.write(b"".join(content))


def words(first: int, end: int, of: str = "a") -> list[str]:
    return [f"{of} {n}" for n in range(first, end)]


def prompts(out: Path, ordinal: int) -> list[str]:
    return [row["prompt"] for row in rows(out) if row["row_id"].startswith(f"{ordinal:06d}-")]


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
    append(inbox / "a.jsonl", b'ur"}\n')
    refusal = run_echo(monkeypatch, *args(inbox, out)).refusal()
    assert f"data.path {inbox / 'a.jsonl'} has changed since it was registered" in refusal
    assert "its last line had no end and has been continued; append whole lines" in refusal
    assert {part.name: part.read_bytes() for part in parts(out)} == before
    found = call(verify.main, str(out))
    assert found.code == 1 and "a.jsonl is not the file that was registered" in found.out


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
