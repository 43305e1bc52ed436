"""Interrupted runs go on from their journal: no answered row is sent to the engine again, and no bit changes."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from harness import (
    label_args,
    nothing_left_over,
    only_journal_left_over,
    parts,
    prompt,
    put_run_json,
    results,
    run_here,
    run_json,
    segments,
    stats,
    write,
)
from stores import Place

from pipeline.engine.dedup import DedupEngine
from pipeline.errors import Interrupted
from pipeline.shift import Shift

NUM_ROWS = 60
CHUNK_ROWS = 25
BAD_ROWS = {3, 30}
TASKS = {
    "several answers": ["sampling.temperature=1.0", "sampling.n=3", "sampling.logprobs=2", 'sampling.stop=["e"]'],
    "labels": label_args(),
    "labels of a row": ["task=label", "task.labels=own"],
    "scores": ["task=score", "task.target=target", "task.prompt_logprob=true", "sampling.logprobs=1"],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, tickets: list[str]) -> Path:
    """60 rows, of which every fifth asks what another one asks, and two are no texts."""
    prompts = [None if row in BAD_ROWS else tickets[row % 5 or row] for row in range(NUM_ROWS)]
    own = [["yes", f"no {row % 5}"] for row in range(NUM_ROWS)]
    columns = {"prompt": prompts, "own": own, "target": tickets[100 : 100 + NUM_ROWS]}
    return write(tmp_path_factory.mktemp("data") / "in.parquet", columns)


def args(model: Path, data: Path, out: Path, task: str = "several answers", *more: str) -> list[str]:
    return [
        "model=path", f"model.path={model}", f"data.path={data}", f"output.dir={out}", "quant=none",
        f"data.chunk_rows={CHUNK_ROWS}", "engine.slots=8", "engine.prefill_tokens=64", prompt("{{ prompt.strip() }}"),
        "sampling.max_new_tokens=20", *TASKS[task], *more,
    ]  # fmt: skip


@contextmanager
def watched(stop_after: int | None = None) -> Iterator[tuple[set[Hashable], set[Hashable]]]:
    """The rows that an engine is given and those that it answers; after so many answers a signal comes."""
    given: set[Hashable] = set()
    answered: set[Hashable] = set()
    submit, poll, shift_poll = DedupEngine.submit, DedupEngine.poll, Shift._poll

    def counted_submit(self: Any, request: Any) -> None:
        given.add(request.id)
        submit(self, request)

    def counted_poll(self: Any) -> Any:
        outputs = poll(self)
        answered.update(output.request_id for output in outputs if output.completion is not None)
        return outputs

    def stopping_poll(self: Any, outlet: Any) -> int:
        rows = shift_poll(self, outlet)
        if stop_after is not None and len(answered) >= stop_after:
            raise Interrupted("stopped by the test")
        return rows

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DedupEngine, "submit", counted_submit)
        patch.setattr(DedupEngine, "poll", counted_poll)
        patch.setattr(Shift, "_poll", stopping_poll)
        yield given, answered


@pytest.mark.parametrize("task", TASKS)
def test_answered_rows_are_not_asked_again(task: str, small_model: Path, data: Path, tmp_path: Path) -> None:
    run_here(*args(small_model, data, tmp_path / "whole", task)).done()
    out, known = tmp_path / "out", set()
    command = args(small_model, data, out, task)
    for stop_after in (10, 16):
        with watched(stop_after) as (given, answered):
            assert run_here(*command).code == 75
        assert not given & known, "rows of the journal were asked again"
        known |= answered
        assert only_journal_left_over(out) and segments(out)
    with watched() as (given, answered):
        run_here(*command).done()
    assert not given & known
    assert len(given | known) == NUM_ROWS - len(BAD_ROWS)
    assert results(out).equals(results(tmp_path / "whole"))
    assert nothing_left_over(out)
    totals, whole = ([run_json(o)["summary"][k] for k in ("rows", "error_rows", "prompt_tokens", "completion_tokens",
        "target_tokens")] for o in (out, tmp_path / "whole"))  # fmt: skip
    assert totals == whole
    assert_counted(stats(out), stats(tmp_path / "whole"), len(known))


def assert_counted(processes: list[dict[str, Any]], whole: list[dict[str, Any]], journaled: int) -> None:
    """Processes add up to the whole, and what came from a journal is told apart and not in the rates."""
    for key in ("rows", "error_rows", "prompt_tokens", "completion_tokens", "target_tokens"):
        assert sum(one[key] for one in processes) == whole[0][key]
    last = processes[-1]
    assert sum(one["journaled_rows"] for one in processes) <= journaled
    assert 0 < last["journaled_rows"] < last["rows"]
    tokens = sum(last[f"{kind}_tokens"] for kind in ("prompt", "completion", "target"))
    assert 0 < last["journaled_tokens"] < tokens
    assert last["rows_per_s"] == pytest.approx((last["rows"] - last["journaled_rows"]) / last["generate_s"])
    assert last["tokens_per_s"] == pytest.approx((tokens - last["journaled_tokens"]) / last["generate_s"])


def test_a_chunk_whose_rows_are_all_in_the_journal_is_committed_without_the_engine(
    small_model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a kill in the middle of writing a Part."""
    from pipeline.errors import RunFailed
    from pipeline.output.sink import Sink

    out = tmp_path / "out"
    command = args(small_model, data, out, "several answers", "output.journal_s=0", "data.chunk_rows=60")

    def broken(*_: Any) -> bool:
        raise RunFailed("the disk is gone")

    with monkeypatch.context() as patch:
        patch.setattr(Sink, "commit", broken)
        assert run_here(*command).code == 1
    assert not parts(out) and segments(out)
    with watched() as (given, _):
        run_here(*command).done()
    assert len(given) <= 8, "what was answered last, at most"
    run_here(*args(small_model, data, tmp_path / "whole", "several answers", "data.chunk_rows=60")).done()
    assert results(out).equals(results(tmp_path / "whole"))
    assert nothing_left_over(out)


Change = Callable[[Path], None]


def _other_run(out: Path) -> None:
    put_run_json(out, {**run_json(out), "run_id": "0" * 32})


def _damage(out: Path) -> None:
    for path in segments(out):
        path.write_bytes(path.read_bytes()[:-7])


@pytest.mark.parametrize("change", [_other_run, _damage], ids=["another run", "damaged"])
def test_a_journal_of_no_use_is_not_used(change: Change, small_model: Path, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = args(small_model, data, out, "labels", "data.chunk_rows=60")
    with watched(10):
        assert run_here(*command).code == 75
    change(out)
    with watched() as (given, _):
        run_here(*command).done()
    assert len(given) == NUM_ROWS - len(BAD_ROWS)
    assert stats(out)[-1]["journaled_rows"] == 0
    assert nothing_left_over(out)


def test_any_store_keeps_the_journal(place: Place, small_model: Path, data: Path, tmp_path: Path) -> None:
    command = [*args(small_model, data, tmp_path / "unused", "labels"), *place.args()]
    with watched(20) as (given, known):
        assert run_here(*command).code == 75
    assert [name for name in place.files() if name.startswith("journal/rows-")]
    with watched() as (given, _):
        run_here(*command).done()
    assert not given & known
    assert not [name for name in place.files() if name.startswith(("journal/", "claims/"))]
    run_here(*args(small_model, data, tmp_path / "whole", "labels")).done()
    found = [content for name, content in sorted(place.files().items()) if name.startswith("results/")]
    assert pa.concat_tables([pq.read_table(pa.BufferReader(part)) for part in found]).equals(
        results(tmp_path / "whole")
    )


def test_what_a_kill_after_the_last_commit_left_goes_with_the_next_run(
    small_model: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = args(small_model, data, out, "labels")
    with watched(20):
        assert run_here(*command).code == 75
    left = {path: path.read_bytes() for path in segments(out)}
    run_here(*command).done()
    for path, content in left.items():  # as if it had been killed before it could remove them
        path.write_bytes(content)
    (out / "journal" / ".rows-000000-000000000000.a.000001.segment.b.tmp").write_bytes(b"half")
    run_here(*command).done()
    assert nothing_left_over(out)
