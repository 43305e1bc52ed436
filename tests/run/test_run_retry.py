"""retry=failed: error rows are answered again, and nothing else in the output changes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from harness import disk_state, ended, nothing_left_over, results, run_cli, run_here, run_json, start, stats, write
from stores import Place

from pipeline.core import FinishReason
from pipeline.engine.dedup import DedupEngine
from pipeline.errors import Interrupted, RunFailed
from pipeline.output.sink import Sink
from pipeline.shift import Shift

NUM_ROWS = 40
CHUNK_ROWS = 10
NO_TEXT = 13
"""A row that is an error whatever the device does."""
BROKEN = {2, 11, 12, 19, 38}
"""Rows whose logits a fault of the device spoils."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, tickets: list[str]) -> Path:
    prompts = [None if row == NO_TEXT else tickets[row] for row in range(NUM_ROWS)]
    columns = {"key": list(range(NUM_ROWS)), "prompt": prompts, "blob": [[row, None] for row in range(NUM_ROWS)]}
    return write(tmp_path_factory.mktemp("data") / "in" / "rows.parquet", columns)


def args(model: Path, data: Path, *more: str) -> list[str]:
    return [
        "model=path", f"model.path={model}", f"data.path={data.parent}", "quant=none", "task.chat=false",
        f"data.chunk_rows={CHUNK_ROWS}", "engine.slots=8", "sampling.max_new_tokens=6", "sampling.temperature=1.0",
        "sampling.n=2", "sampling.logprobs=1", *more,
    ]  # fmt: skip


@contextmanager
def faulty(rows: Set[int]) -> Iterator[None]:
    """A device that computes no finite logits for some rows."""
    poll = DedupEngine.poll

    def broken(output: Any) -> Any:
        if output.completion is None:
            return output
        chunk, index = output.request_id
        if int(chunk.split("-")[1]) + index not in rows:
            return output
        error = {"finish_reason": FinishReason.ERROR, "error": "the logits are not finite", "choices": ()}
        nothing = {"token_ids": (), "cumulative_logprob": None, "logprobs": (), "text_end": None}
        return replace(output, completion=replace(output.completion, **error, **nothing))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DedupEngine, "poll", lambda self: [broken(output) for output in poll(self)])
        yield


@pytest.fixture(scope="module")
def sound(small_model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run on a device without faults."""
    out = tmp_path_factory.mktemp("sound") / "out"
    run_here(*args(small_model, data), f"output.dir={out}").done()
    return out


@pytest.fixture
def failed(small_model: Path, data: Path, tmp_path: Path) -> tuple[Path, list[str]]:
    """A run with errors, and its command."""
    command = [*args(small_model, data), f"output.dir={tmp_path / 'out'}"]
    with faulty(BROKEN):
        run_here(*command).done()
    assert errors(results(tmp_path / "out")) == {*BROKEN, NO_TEXT}
    return tmp_path / "out", command


def errors(table: pa.Table) -> set[int]:
    rows = zip(table["key"].to_pylist(), table["finish_reason"].to_pylist(), strict=True)
    return {key for key, reason in rows if reason == "error"}


def parts_of(place: Place) -> dict[str, bytes]:
    return {name: content for name, content in sorted(place.files().items()) if name.startswith("results/")}


def table_of(parts: dict[str, bytes]) -> pa.Table:
    return pa.concat_tables([pq.read_table(pa.BufferReader(content)) for content in parts.values()])


def test_errors_are_answered_and_all_else_stays(place: Place, small_model: Path, data: Path, sound: Path) -> None:
    command = [*args(small_model, data), *place.args()]
    with faulty(BROKEN):
        run_here(*command).done()
    before = parts_of(place)
    again = run_here(*command, "retry=failed", "output.row_group_rows=4", "engine.dedup=false").done()
    after = parts_of(place)
    assert f"({NUM_ROWS} rows, 1 of them errors" in again.out
    assert table_of(after).equals(results(sound))
    changed = [name for name in before if before[name] != after[name]]
    assert [int(name.split("-")[2].split(".")[0]) for name in changed] == [0, 10, 30]
    for name in changed:
        first = int(name.split("-")[2].split(".")[0])
        kept = [row for row in range(CHUNK_ROWS) if first + row not in BROKEN]
        then, now = (pq.read_table(pa.BufferReader(parts[name])).take(kept) for parts in (before, after))
        assert then.equals(now)
    assert not [name for name in place.files() if name.startswith(("journal/", "claims/"))]
    if place.is_local:
        out = Path(place.url)
        assert run_json(out)["summary"] == run_json(sound)["summary"], "counts of tokens too"
        assert (stats(out)[-1]["rows"], stats(out)[-1]["error_rows"]) == (len(BROKEN) + 1, 1)


def test_errors_that_come_again_stay_and_end(failed: tuple[Path, list[str]], sound: Path) -> None:
    out, command = failed
    with faulty({11, 38}):
        again = run_here(*command, "retry=failed", "max_error_rate=0.01")
    assert again.code == 3
    assert errors(results(out)) == {11, 38, NO_TEXT}
    assert run_json(out)["summary"]["error_rows"] == 3
    run_here(*command, "retry=failed").done()
    assert results(out).equals(results(sound))
    assert nothing_left_over(out)


def test_without_errors_nothing_is_touched(small_model: Path, data: Path, tmp_path: Path) -> None:
    command = [*args(small_model, data), f"output.dir={tmp_path / 'out'}", "sampling.n=1", "data.limit=10"]
    run_here(*command, "retry=failed").done()
    before = disk_state(tmp_path / "out")
    again = run_here(*command, "retry=failed").done()
    assert "on cpu" not in again.err, "no model is loaded"
    assert disk_state(tmp_path / "out") == before


def test_other_settings_and_missing_files_are_refused(failed: tuple[Path, list[str]], tmp_path: Path) -> None:
    out, command = failed
    before = disk_state(out)
    assert "sampling.seed" in run_here(*command, "retry=failed", "sampling.seed=3").refusal()
    elsewhere = write(tmp_path / "other" / "new.parquet", {"key": [1], "prompt": ["a"], "blob": [[1]]})
    gone = run_here(*command, "retry=failed", f"data.path={elsewhere.parent}").refusal()
    assert "retry=failed needs" in gone and "rows.parquet" in gone
    assert disk_state(out) == before


@pytest.mark.parametrize("how", ["signal", "kill at a Part", "kill after one"])
def test_a_retry_that_is_stopped_goes_on(
    how: str, failed: tuple[Path, list[str]], sound: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, command = failed
    poll, publish, replaced = Shift._poll, Sink.replace, []

    def interrupted(self: Any, outlet: Any) -> int:
        poll(self, outlet)
        raise Interrupted("stopped by the test")

    def killed(self: Any, *given: Any) -> bool:
        if how == "kill after one" and not replaced:
            replaced.append(given)
            return publish(self, *given)
        raise RunFailed("killed by the test")

    with monkeypatch.context() as patch:
        if how == "signal":
            patch.setattr(Shift, "_poll", interrupted)
        else:
            patch.setattr(Sink, "replace", killed)
        stopped = run_here(*command, "retry=failed", "output.journal_s=0")
    assert stopped.code == (75 if how == "signal" else 1)
    assert run_json(out)["summary"] is None, "it may not be true any more"
    left = errors(results(out))
    assert {NO_TEXT} < left <= {*BROKEN, NO_TEXT}
    assert table_without(results(out), left).equals(table_without(results(sound), left)), "each row old or new"
    run_here(*command).done()
    assert run_json(out)["summary"]["error_rows"] == len(left)
    run_here(*command, "retry=failed").done()
    assert results(out).equals(results(sound))
    assert run_json(out)["summary"] == run_json(sound)["summary"]
    assert nothing_left_over(out)


def table_without(table: pa.Table, rows: Set[int]) -> pa.Table:
    return table.take([row for row in range(NUM_ROWS) if row not in rows])


def test_journaled_rows_of_a_retry_are_not_asked_again_and_are_not_another_retry_s(
    failed: tuple[Path, list[str]], sound: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, command = failed

    def killed(*_: Any) -> bool:
        time.sleep(0.5)
        raise RunFailed("killed by the test")

    with monkeypatch.context() as patch, faulty({2}):
        patch.setattr(Sink, "replace", killed)
        assert run_here(*command, "retry=failed", "output.journal_s=0").code == 1
    with faulty({2}):
        run_here(*command, "retry=failed").done()
    assert stats(out)[-1]["journaled_rows"] >= 1
    assert errors(results(out)) == {2, NO_TEXT}
    run_here(*command, "retry=failed").done()
    assert results(out).equals(results(sound))


def test_what_another_process_has_put_right_is_left_alone(
    failed: tuple[Path, list[str]], sound: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when this one stood still for longer than its claims last, and has nothing but errors again."""
    out, command = failed
    replace_part, others = Sink.replace, []

    def late(self: Any, *given: Any) -> bool:
        if not others:
            for claim in (out / "claims").glob("0*.json"):
                claim.unlink()
            others.append(run_cli(*command, "retry=failed").done())
        return replace_part(self, *given)

    monkeypatch.setattr(Sink, "replace", late)
    with faulty(BROKEN):
        run_here(*command, "retry=failed").done()
    assert others and results(out).equals(results(sound))
    assert run_json(out)["summary"] == run_json(sound)["summary"]


def beside(patch: pytest.MonkeyPatch, *events: Callable[[], object]) -> None:
    """Let things happen while a process is at work, each at one of its looks for answers."""
    poll, waiting = Shift._poll, list(events)

    def polled(self: Any, outlet: Any) -> int:
        if waiting:
            waiting.pop(0)()
        return poll(self, outlet)

    patch.setattr(Shift, "_poll", polled)


def test_two_tasks_retry_at_the_same_time(failed: tuple[Path, list[str]], sound: Path) -> None:
    """The second one does what the first has not begun; between them each error row is answered once."""
    out, command = failed
    before, codes = len(stats(out)), []
    array = [*command, "retry=failed", "shard.count=2"]
    with pytest.MonkeyPatch.context() as patch:
        beside(patch, lambda: codes.append(run_here(*array, "shard.index=1").code))
        run_here(*array, "shard.index=0").done()
    assert codes in ([0], [75]), "75 while the first has chunks in hand"
    done = stats(out)[before:]
    assert sum(one["rows"] for one in done) == len(BROKEN) + 1
    assert results(out).equals(results(sound))
    assert run_json(out)["summary"] == run_json(sound)["summary"]
    assert nothing_left_over(out)


@pytest.mark.parametrize("ends", ["well", "killed"])
def test_a_task_that_ends_before_another_leaves_no_summary_that_will_be_wrong(
    ends: str, failed: tuple[Path, list[str]], sound: Path
) -> None:
    """While it has errors in hand that an earlier task has got again, somebody else finds all rows done."""
    out, command = failed
    retry = [*command, "retry=failed", "output.journal_s=0"]

    def look() -> None:
        run_here(*command).done()  # counts everything
        assert run_json(out)["summary"] is None

    def killed(self: Sink, *given: Any) -> bool:
        replace_part(self, *given)
        raise RunFailed("killed by the test")

    replace_part = Sink.replace
    with faulty({2, 38}):
        run_here(*retry).done()
    with pytest.MonkeyPatch.context() as patch:
        beside(patch, look)
        if ends == "killed":
            patch.setattr(Sink, "replace", killed)
        assert run_here(*retry).code == (0 if ends == "well" else 1)
    run_here(*command).done()
    assert run_json(out)["summary"]["error_rows"] == len(errors(results(out)))
    run_here(*retry).done()
    assert results(out).equals(results(sound))
    assert run_json(out)["summary"] == run_json(sound)["summary"]


@pytest.mark.slow
def test_several_processes_retry_together(failed: tuple[Path, list[str]], sound: Path) -> None:
    out, command = failed
    run_cli(*command, "retry=failed", "launcher.processes=2").done()
    assert results(out).equals(results(sound))
    assert run_json(out)["summary"]["error_rows"] == 1, "the row that fails again ends it, too"
    assert nothing_left_over(out)


@pytest.mark.slow
def test_a_retry_killed_by_signal_nine(failed: tuple[Path, list[str]], sound: Path) -> None:
    out, command = failed
    inodes = {part: part.stat().st_ino for part in (out / "results").iterdir()}
    for delay in (0.0, 0.01):
        process = start(*command, "retry=failed")
        while process.poll() is None and all(p.stat().st_ino == inode for p, inode in inodes.items()):
            time.sleep(0.002)
        time.sleep(delay)
        process.kill()
        ended(process)
        inodes = {part: part.stat().st_ino for part in (out / "results").iterdir()}
        assert table_without(results(out), {*BROKEN}).equals(table_without(results(sound), {*BROKEN}))
    run_cli(*command, "retry=failed").done()
    assert results(out).equals(results(sound))
    assert nothing_left_over(out)
