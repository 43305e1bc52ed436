"""Kills, signals, several processes, moved folders, new files: no row lost, none twice, none changed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from harness import (
    disk_state,
    ended,
    environment,
    nothing_left_over,
    only_journal_left_over,
    parts,
    results,
    run_cli,
    run_here,
    run_json,
    segments,
    start,
    stats,
    wait_for,
    write,
)

NUM_ROWS = 240
CHUNK_ROWS = 20


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory, tickets: list[str]) -> Path:
    """Two files of 120 rows each: enough work to be interrupted."""
    folder = tmp_path_factory.mktemp("many") / "in"
    for name, first in (("a", 0), ("b", 120)):
        chosen = tickets[first : first + 120]
        write(folder / f"{name}.parquet", {"key": list(range(first, first + 120)), "prompt": chosen})
    return folder


def args(model: Path, data: Path, out: Path, *more: str) -> list[str]:
    return [
        "model=path", f"model.path={model}", f"data.path={data}", f"output.dir={out}", "quant=none",
        f"data.chunk_rows={CHUNK_ROWS}", "engine.slots=16", "sampling.max_new_tokens=60",
        "sampling.temperature=1.0", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(small_model: Path, many: Path, tmp_path_factory: pytest.TempPathFactory) -> pa.Table:
    """What all the others must come to."""
    out = tmp_path_factory.mktemp("uninterrupted") / "out"
    run_here(*args(small_model, many, out)).done()
    return results(out)


def assert_complete(out: Path, expected: pa.Table) -> None:
    """All rows, bit for bit and in order; nothing lies around but a file that a kill has met half-written."""
    found = results(out)
    assert found["row_id"].to_pylist() == expected["row_id"].to_pylist()
    assert found.equals(expected)
    assert len(parts(out)) == NUM_ROWS // CHUNK_ROWS
    assert nothing_left_over(out)
    assert not [path for path in out.rglob("*.tmp") if not path.name.startswith((".run.json.", ".plan.json."))]
    assert run_json(out)["summary"]["rows"] == NUM_ROWS


def inodes(out: Path) -> dict[str, tuple[int, int]]:
    return {part.name: (part.stat().st_ino, part.stat().st_mtime_ns) for part in parts(out)}


def test_killed_twice_and_run_again(small_model: Path, many: Path, uninterrupted: pa.Table, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = args(small_model, many, out)
    for reached in (1, 4):
        process = start(*command)
        wait_for(lambda reached=reached: len(parts(out)) >= reached, process)
        process.send_signal(signal.SIGKILL)
        assert ended(process).code == -signal.SIGKILL
    kept = inodes(out)
    assert 4 <= len(kept) < NUM_ROWS // CHUNK_ROWS, "it was killed on the way"
    run_here(*command).done()
    assert_complete(out, uninterrupted)
    assert {name: inode for name, inode in inodes(out).items() if name in kept} == kept, "a Part was written again"
    assert stats(out)[-1]["rows"] == NUM_ROWS - CHUNK_ROWS * len(kept)


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.3, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
def test_killed_at_any_moment(
    delay: float, small_model: Path, many: Path, uninterrupted: pa.Table, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = start(*args(small_model, many, out))
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    ended(process)
    kept = inodes(out) if (out / "results").is_dir() else {}
    run_here(*args(small_model, many, out)).done()
    assert_complete(out, uninterrupted)
    assert {name: inode for name, inode in inodes(out).items() if name in kept} == kept


@pytest.mark.slow
def test_killed_before_the_first_part(small_model: Path, many: Path, uninterrupted: pa.Table, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start(*args(small_model, many, out))
    wait_for(lambda: (out / "run.json").exists(), process)
    process.send_signal(signal.SIGKILL)
    ended(process)
    run_here(*args(small_model, many, out)).done()
    assert_complete(out, uninterrupted)


def test_sigterm_saves_what_is_done(small_model: Path, many: Path, uninterrupted: pa.Table, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = args(small_model, many, out)
    process = start(*command)
    wait_for(lambda: parts(out), process)
    process.send_signal(signal.SIGTERM)
    stopped = ended(process)
    assert stopped.code == 75, stopped.err
    assert stopped.seconds < 10, "5 s on an idle machine"
    assert "run the same command again" in stopped.err and "Traceback" not in stopped.err
    assert only_journal_left_over(out), "its claims are given back"
    assert segments(out), "of 16 rows side by side, some had ended"
    kept = inodes(out)
    assert stats(out)[0]["rows"] == CHUNK_ROWS * len(kept)
    run_here(*command).done()
    assert_complete(out, uninterrupted)
    assert sum(run["rows"] for run in stats(out)) == NUM_ROWS
    assert [bool(run["journaled_rows"]) for run in stats(out)] == [False, True]
    before = disk_state(out)
    run_here(*command).done()
    assert disk_state(out) == before


def test_sigterm_before_the_weights_are_there(
    small_model: Path, many: Path, uninterrupted: pa.Table, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = start(*args(small_model, many, out))
    wait_for(lambda: (out / "claims").exists(), process)
    process.send_signal(signal.SIGTERM)
    stopped = ended(process)
    assert stopped.code == 75, stopped.err
    assert "Traceback" not in stopped.err
    assert not parts(out)
    run_here(*args(small_model, many, out)).done()
    assert_complete(out, uninterrupted)


@pytest.mark.parametrize("shards", [None, pytest.param(3, marks=pytest.mark.slow)], ids=["two alike", "three shards"])
def test_processes_share_one_output(
    shards: int | None, small_model: Path, many: Path, uninterrupted: pa.Table, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shares = [[f"shard.index={index}", f"shard.count={shards}"] for index in range(shards)] if shards else [[], []]
    processes = [start(*args(small_model, many, out, *share)) for share in shares]
    all_ended = [ended(process) for process in processes]
    codes = [one.code for one in all_ended]
    assert set(codes) <= {0, 75}, [one.err for one in all_ended]
    assert not any("Traceback" in one.err for one in all_ended)
    assert 0 in codes, "the last to end finds everything done"
    last = run_cli(*args(small_model, many, out)).done()
    assert f"({NUM_ROWS} rows" in last.out
    assert_complete(out, uninterrupted)
    assert sum(run["rows"] for run in stats(out)) >= NUM_ROWS


def test_a_living_owner_keeps_its_chunks(
    small_model: Path, many: Path, uninterrupted: pa.Table, tmp_path: Path
) -> None:
    """A second process beside one that holds chunks and does not move answers the rest and ends with 75."""
    out = tmp_path / "out"
    command = args(small_model, many, out)
    process = start(*command)
    wait_for(lambda: parts(out), process)
    os.kill(process.pid, signal.SIGSTOP)
    try:
        committed = {part.stem.removeprefix("part-") for part in parts(out)}
        held = len({claim.stem for claim in (out / "claims").glob("0*.json")} - committed)
        assert held > 0
        second = run_here(*command)
        assert second.code == 75, second.err
        assert f"{held} of {NUM_ROWS // CHUNK_ROWS} chunks are not done" in second.err
        assert "in the hands of other processes" in second.err
        assert len(parts(out)) == NUM_ROWS // CHUNK_ROWS - held
    finally:
        os.kill(process.pid, signal.SIGCONT)
    assert ended(process).code == 0
    assert_complete(out, uninterrupted)


@pytest.mark.slow
def test_two_different_runs_at_once_on_one_output(small_model: Path, many: Path, tmp_path: Path) -> None:
    """One of them has the folder, the other is refused; nothing is mixed."""
    out = tmp_path / "out"
    processes = [start(*args(small_model, many, out, f"sampling.seed={seed}")) for seed in (1, 2)]
    codes = [one.code for one in map(ended, processes)]
    assert sorted(codes) == [0, 2]
    winner = 1 + codes.index(0)
    assert run_json(out)["fingerprint"]["sampling.seed"] == winner
    run_here(*args(small_model, many, tmp_path / "alone", f"sampling.seed={winner}")).done()
    assert results(out).equals(results(tmp_path / "alone"))


@pytest.mark.slow
def test_a_full_disk_stops_the_run_and_room_lets_it_go_on(small_model: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands for the full disk: run.json fits, a Part does not."""
    payload = [os.urandom(4096) for _ in range(40)]
    data = write(tmp_path / "in.parquet", {"prompt": [f"row {i}" for i in range(40)], "payload": payload})
    command = args(small_model, data, tmp_path / "out", "sampling.max_new_tokens=2")
    limited = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (40000, 40000)); "
    limited += "sys.argv = ['pipeline', *sys.argv[1:]]; runpy.run_module('pipeline', run_name='__main__')"
    stopped = subprocess.run(
        [sys.executable, "-c", limited, *command], env=environment(), capture_output=True, text=True, timeout=120
    )
    assert stopped.returncode == 1, stopped.stderr
    assert stopped.stderr.splitlines()[-1].startswith("error: ")
    assert "could not be written" in stopped.stderr and "Traceback" not in stopped.stderr
    assert not parts(tmp_path / "out")
    assert nothing_left_over(tmp_path / "out")
    run_here(*command).done()
    assert results(tmp_path / "out")["payload"].to_pylist() == payload


@pytest.fixture
def grown(small_model: Path, tmp_path: Path) -> tuple[Path, list[str]]:
    """A finished run over a folder of one file, and its command."""
    data = write(tmp_path / "in" / "m.parquet", {"prompt": [f"row {i}" for i in range(30)]})
    command = args(small_model, data.parent, tmp_path / "out", "sampling.max_new_tokens=4")
    run_here(*command).done()
    return tmp_path / "out", command


def test_a_new_file_is_answered_and_the_old_parts_stay(grown: tuple[Path, list[str]], tmp_path: Path) -> None:
    out, command = grown
    before, old = inodes(out), results(out)
    write(tmp_path / "in" / "a.parquet", {"prompt": [f"new {i}" for i in range(25)]})
    again = run_here(*command).done()
    assert "(55 rows" in again.out
    assert {name: inode for name, inode in inodes(out).items() if name in before} == before
    assert results(out).slice(0, 30).equals(old), "a file registered later comes after the others"
    assert results(out)["prompt"].to_pylist()[30:] == [f"new {i}" for i in range(25)]
    assert [file["name"] for file in run_json(out)["files"]] == ["m.parquet", "a.parquet"]
    assert stats(out)[-1]["rows"] == 25
    assert run_json(out)["summary"]["rows"] == 55


def test_moved_folders_resume(grown: tuple[Path, list[str]], small_model: Path, tmp_path: Path) -> None:
    """Output, dataset and model elsewhere: they are known by what they hold."""
    out, _ = grown
    before = results(out)
    parts(out)[1].unlink()  # as if it had been killed before this commit
    kept = inodes(out)
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    out.rename(moved / "out2")
    (tmp_path / "in").rename(moved / "data")
    shutil.copytree(small_model, moved / "model")
    more = ["sampling.max_new_tokens=4"]
    run_here(*args(moved / "model", moved / "data", moved / "out2", *more)).done()
    assert results(moved / "out2").equals(before)
    assert {name: inode for name, inode in inodes(moved / "out2").items() if name in kept} == kept
    assert not out.exists()


def test_one_process_of_a_sharded_run_does_it_all(small_model: Path, many: Path, tmp_path: Path) -> None:
    """`shard` says where a process starts, not where it ends."""
    more = ["shard.index=1", "shard.count=3", "sampling.max_new_tokens=1"]
    run_here(*args(small_model, many, tmp_path / "out", *more)).done()
    assert results(tmp_path / "out")["key"].to_pylist() == list(range(NUM_ROWS))


def test_a_changed_file_is_refused_by_name(grown: tuple[Path, list[str]], tmp_path: Path) -> None:
    out, command = grown
    before = disk_state(out)
    write(tmp_path / "in" / "m.parquet", {"prompt": [f"other {i}" for i in range(30)]})
    message = run_here(*command).refusal()
    assert str(tmp_path / "in" / "m.parquet") in message and "changed" in message
    assert disk_state(out) == before


def test_a_finished_file_may_go(grown: tuple[Path, list[str]], tmp_path: Path) -> None:
    out, command = grown
    write(tmp_path / "in" / "z.parquet", {"prompt": ["one more"]})
    (tmp_path / "in" / "m.parquet").unlink()
    run_here(*command).done()
    assert results(out).num_rows == 31
    assert pq.read_metadata(parts(out)[-1]).num_rows == 1
