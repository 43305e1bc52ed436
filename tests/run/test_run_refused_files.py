"""A file that cannot be taken appears in a folder that was labelled: the run is refused, what looks at it answers."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
from echo import run_echo
from growing import append, args, at_work, echoed, line, prompts, words
from harness import call, run_json, write

from pipeline import merge, status, verify
from pipeline.command import until_loaded
from pipeline.config import load_config
from pipeline.console import Console
from pipeline.job import Job
from pipeline.launch.crew import run_crew


def commands(inbox: Path, out: Path, *more: str) -> tuple[list[str], list[str]]:
    """The command line of a run over Parquet files, for `run_echo` and as `run_echo` completes it."""
    command = [argument for argument in args(inbox, out, *more) if argument != "data=jsonl"]
    return command, [*command, "sampling.logprobs=true"]


def odd_parquet(path: Path) -> Path:
    return write(path, {"text": words(0, 2)})


def other_type(path: Path) -> Path:
    return write(path, {"prompt": [1, 2]})


def no_parquet(path: Path) -> Path:
    path.write_bytes(b"no Parquet at all")
    return path


def key_folder(path: Path) -> Path:
    return write(path.parent / "lang=de" / path.name, {"prompt": words(0, 2)})


@pytest.mark.parametrize("odd", [odd_parquet, other_type, no_parquet, key_folder])
def test_a_file_that_cannot_be_taken_stops_the_next_run_and_nobody_who_looks(
    odd: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """status, verify and merge, and so the finish job and the nightly line, answer for what was registered."""
    inbox, out = tmp_path / "in", tmp_path / "out"
    write(inbox / "b.parquet", {"prompt": words(0, 6, "b")})
    command, asked = commands(inbox, out)
    run_echo(monkeypatch, *command).done()
    path = odd(inbox / "a.parquet")
    write(inbox / "c.parquet", {"prompt": words(0, 3, "c")})
    assert str(path) in run_echo(monkeypatch, *command).refusal()
    note = "a file that came since cannot be taken, and ends the next run: data.path"
    registered = call(status.main, *asked, "--registered").done().out
    assert f"{out}: 6 of 6 rows done, 0 errors, 3 rows in 1 new file came since; the next run takes them" in registered
    assert note in registered and str(path) in registered and registered.count("\n") == 1
    looked = call(status.main, *asked)
    assert looked.code == 2 and f"{out}: 6 of 9 rows done, 0 errors, 1 of 3 chunks left" in looked.out
    assert note in looked.out and str(path) in looked.out and not looked.err
    verified = call(verify.main, *asked).done().out
    assert f"note: {note}" in verified and str(path) in verified
    assert call(merge.main, *asked, "--rows=100").code == 2
    call(merge.main, *asked, "--rows=100", "--registered").done()
    path.unlink()
    run_echo(monkeypatch, *command).done()
    assert prompts(out, 1) == words(0, 3, "c")


@pytest.mark.parametrize("odd", [odd_parquet, other_type, no_parquet])
def test_a_registered_file_that_is_another_one_is_refused_by_all(
    odd: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inbox, out = tmp_path / "in", tmp_path / "out"
    write(inbox / "b.parquet", {"prompt": words(0, 6, "b")})
    command, asked = commands(inbox, out)
    run_echo(monkeypatch, *command).done()
    path = odd(inbox / "b.parquet")
    for refused in (
        run_echo(monkeypatch, *command),
        call(status.main, *asked),
        call(status.main, *asked, "--registered"),
    ):
        assert str(path) in refused.refusal()
    changed = call(verify.main, str(out))
    assert changed.code == 1 and f"wrong: {path} is not the file that was registered: data.path" in changed.out


def test_status_answers_for_the_version_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not fit the first version would go to another one, but the files do not fit each other."""
    inbox, out = tmp_path / "in", tmp_path / "out"
    write(inbox / "b.parquet", {"prompt": words(0, 6, "b")})
    command, asked = commands(inbox, out, "output.on_change=new")
    run_echo(monkeypatch, *command).done()
    path = odd_parquet(inbox / "a.parquet")
    assert str(path) in run_echo(monkeypatch, *command).refusal()
    assert f"{out}: 6 of 6 rows done" in call(status.main, *asked, "--registered").done().out
    assert "cannot be taken" in call(verify.main, *asked).done().out


def test_a_compressed_file_that_is_cut_stops_the_next_run_and_nobody_who_looks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inbox, out = tmp_path / "in", tmp_path / "out"
    append(inbox / "b.jsonl", *map(line, words(0, 6, "b")))
    run_echo(monkeypatch, *args(inbox, out)).done()
    append(inbox / "a.jsonl.gz", gzip.compress(b"".join(map(line, words(0, 3))))[:-9])
    assert str(inbox / "a.jsonl.gz") in run_echo(monkeypatch, *args(inbox, out)).refusal()
    registered = call(status.main, *echoed(inbox, out), "--registered").done().out
    assert "6 of 6 rows done, 0 errors, a file that came since cannot be taken" in registered
    assert str(inbox / "a.jsonl.gz") in registered
    assert call(status.main, *echoed(inbox, out)).code == 2
    assert "came since, and cannot be read yet" in call(verify.main, str(out)).done().out


def test_a_file_that_cannot_be_taken_and_comes_while_a_run_is_at_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside one that can, which another task has registered before."""
    inbox, out = tmp_path / "in", tmp_path / "out"
    write(inbox / "b.parquet", {"prompt": words(0, 6, "b")})
    command, asked = commands(inbox, out)

    def grow() -> None:
        write(inbox / "c.parquet", {"prompt": words(0, 3, "c")})
        job = Job(load_config(asked))
        resolved = {k: v for k, v in run_json(out)["fingerprint"].items() if k.startswith("resolved.")}
        with job.output.claims() as claims:
            job.start(claims, resolved, {}, {})
        odd_parquet(inbox / "a.parquet")

    with monkeypatch.context() as patch:
        at_work(patch, grow)
        run_echo(patch, *command).done()
    assert (prompts(out, 0), prompts(out, 1)) == (words(0, 6, "b"), words(0, 3, "c"))


def test_a_file_that_cannot_be_taken_and_comes_while_several_processes_are_at_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever has started them still says what came out."""
    inbox, out = tmp_path / "in", tmp_path / "out"
    write(inbox / "b.parquet", {"prompt": words(0, 6, "b")})
    command, asked = commands(inbox, out)

    class OneOfThem:
        def work(self, *_: object) -> list[int]:
            code = run_echo(monkeypatch, *command).done().code
            odd_parquet(inbox / "a.parquet")
            return [code]

    def together(_: Sequence[str]) -> int:
        console, never = Console(is_terminal=False), lambda: False
        with until_loaded(console, never) as loading:
            return run_crew(load_config(asked), cast(Any, OneOfThem), console, never, loading)

    assert "(6 rows, 0 of them errors" in call(together).done().out
