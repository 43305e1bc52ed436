"""Several processes started as one, schedules that would overlap, and jobs that have an end."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pyarrow as pa
import pytest
from crowd import CHUNK_ROWS, NUM_ROWS, args, assert_all_there
from harness import (
    ended,
    environment,
    only_journal_left_over,
    parts,
    run_cli,
    run_here,
    start,
    stats,
    wait_for,
)


def workers(process: subprocess.Popen[str]) -> list[psutil.Process]:
    found = psutil.Process(process.pid).children(recursive=True)
    return [child for child in found if "pipeline.launch.worker" in child.cmdline()]


def test_two_processes_make_one_run(small_model: Path, many: Path, alone: pa.Table, tmp_path: Path) -> None:
    out = tmp_path / "out"
    whole = run_cli(*args(small_model, many, out, "launcher.processes=2")).done()
    assert_all_there(out, alone)
    assert sum(one["rows"] for one in stats(out)) == NUM_ROWS
    assert len({one["pid"] for one in stats(out)}) == len(stats(out))
    assert [line.split()[0] for line in whole.out.splitlines()] == ["results", "speed", "stats"]
    assert whole.err.count("on cpu, kernel torch") == 1, "what both say is said once"
    assert f"{NUM_ROWS} of {NUM_ROWS} rows (100 %)" in whole.err
    assert "not done" not in whole.err
    again = run_cli(*args(small_model, many, out, "launcher.processes=2")).done()
    assert again.seconds < 30 and len(stats(out)) <= 2, "nothing was started"


@pytest.mark.slow
def test_a_killed_process_leaves_its_chunks_to_the_other(
    small_model: Path, many: Path, alone: pa.Table, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = start(*args(small_model, many, out, "launcher.processes=2"))
    wait_for(lambda: len(parts(out)) >= 2, process)
    first = workers(process)[0]
    first.kill()
    whole = ended(process).done()
    assert f"(pid {first.pid}) was killed by SIGKILL" in whole.err
    assert_all_there(out, alone)


@pytest.mark.slow
def test_a_process_killed_while_the_other_waits_for_it(
    small_model: Path, many: Path, alone: pa.Table, tmp_path: Path
) -> None:
    """One stands still with its chunks until the other has done the rest; then it dies."""
    out = tmp_path / "out"
    process = start(*args(small_model, many, out, "launcher.processes=2"))
    wait_for(lambda: parts(out), process)
    one, other = workers(process)
    owner = next(w for w in (one, other) if f'"pid": {w.pid}' in claims(out))
    owner.suspend()
    wait_for(lambda: len(parts(out)) + claims(out).count(f'"pid": {owner.pid}') >= NUM_ROWS // CHUNK_ROWS, process)
    time.sleep(1)
    assert process.poll() is None, "the other one waits"
    owner.kill()
    ended(process).done()
    assert_all_there(out, alone)


def claims(out: Path) -> str:
    texts = []
    for path in (out / "claims").glob("0*.json"):
        try:
            texts.append(path.read_text())
        except FileNotFoundError:
            continue
    return "\n".join(texts)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1], ids=lambda n: n.name)
def test_a_signal_stops_all_of_them(
    number: signal.Signals, small_model: Path, many: Path, alone: pa.Table, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = start(*args(small_model, many, out, "launcher.processes=2"))
    wait_for(lambda: parts(out), process)
    children = workers(process)
    process.send_signal(number)
    stopped = ended(process)
    assert stopped.code == 75, stopped.err
    assert stopped.err.count("stopped by a signal; what is committed stays; run the same command again") == 1
    assert "Traceback" not in stopped.err
    assert not any(child.is_running() for child in children)
    assert only_journal_left_over(out), "their claims are given back"
    run_here(*args(small_model, many, out)).done()
    assert_all_there(out, alone)


@pytest.mark.slow
def test_a_signal_to_everybody_at_once_is_one_signal(
    small_model: Path, many: Path, alone: pa.Table, tmp_path: Path
) -> None:
    """As Slurm signals a step."""
    out = tmp_path / "out"
    process = start(*args(small_model, many, out, "launcher.processes=2"))
    wait_for(lambda: parts(out), process)
    for each in (*workers(process), process):
        each.send_signal(signal.SIGUSR1)
    stopped = ended(process)
    assert stopped.code == 75, stopped.err
    assert only_journal_left_over(out)
    assert stats(out), "there was time to save"


@pytest.mark.slow
def test_the_workers_do_not_outlive_their_parent(
    small_model: Path, many: Path, alone: pa.Table, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = start(*args(small_model, many, out, "launcher.processes=2"))
    wait_for(lambda: parts(out), process)
    children = workers(process)
    process.kill()
    _, alive = psutil.wait_procs(children, timeout=30)
    assert not alive
    ended(process)
    assert not [path for path in (out / "claims").iterdir() if path.name.startswith("0")], "they saved"
    run_here(*args(small_model, many, out, "launcher.processes=2")).done()
    assert_all_there(out, alone)


@pytest.mark.slow
def test_when_all_are_killed_the_run_has_failed(small_model: Path, many: Path, alone: pa.Table, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start(*args(small_model, many, out, "launcher.processes=2"))
    wait_for(lambda: parts(out), process)
    for child in workers(process):
        child.kill()
    failed = ended(process)
    assert failed.code == 1
    assert failed.err.splitlines()[-1].startswith("error: 2 of 2 processes failed")
    run_here(*args(small_model, many, out)).done()
    assert_all_there(out, alone)


@pytest.mark.slow
def test_what_only_the_workers_find_out_is_refused_in_one_sentence(
    small_model: Path, many: Path, tmp_path: Path
) -> None:
    refused = run_cli(*args(small_model, many, tmp_path / "out", "launcher.processes=2", "model.memory=0.0001"))
    assert refused.code == 2
    said = [line for line in refused.err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and "model.memory" in said[0], refused.err


def test_more_gpus_than_there_are(small_model: Path, many: Path, tmp_path: Path) -> None:
    message = run_here(*args(small_model, many, tmp_path / "out", "launcher.gpus=99")).refusal()
    assert "launcher.gpus=99" in message and "launcher.processes" in message


# --- schedules ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_scheduled_runs_do_not_overlap(small_model: Path, many: Path, alone: pa.Table, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = args(small_model, many, out, "launcher.lock=true")
    process = start(*command)
    wait_for(lambda: parts(out), process)
    second = run_here(*command)
    assert second.code == 75
    assert "another run with launcher.lock is at work" in second.err
    assert run_here(*command, "launcher.processes=2").code == 75
    process.kill()
    ended(process)
    run_here(*command).done()
    assert_all_there(out, alone)
    run_here(*command).done()


# --- the chunks of others, and the end of a job ------------------------------------------------------------------


@pytest.mark.slow
def test_waiting_takes_over_what_a_killed_process_held(
    small_model: Path, many: Path, alone: pa.Table, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    owner = start(*args(small_model, many, out))
    wait_for(lambda: parts(out), owner)
    os.kill(owner.pid, signal.SIGSTOP)
    waiting = start(*args(small_model, many, out, "shard.wait_s=300"))
    held = claims(out).count(f'"pid": {owner.pid}')
    assert held
    wait_for(lambda: len(parts(out)) + held >= NUM_ROWS // CHUNK_ROWS, waiting)
    time.sleep(1)
    assert waiting.poll() is None
    owner.kill()
    ended(owner)
    ended(waiting).done()
    assert_all_there(out, alone)


@pytest.mark.slow
def test_with_everything_in_other_hands_no_weights_are_read(small_model: Path, many: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = args(small_model, many, out, "data.chunk_rows=100")
    owner = start(*command)
    wait_for(lambda: len(list((out / "claims").glob("0*.json"))) == 2 if out.exists() else False, owner)
    os.kill(owner.pid, signal.SIGSTOP)
    try:
        second = run_here(*command)
        assert second.code == 75
        assert "2 of 2 chunks are not done; 2 are in the hands" in second.err
        assert "on cpu" not in second.err, "the model is not even spoken of"
    finally:
        os.kill(owner.pid, signal.SIGCONT)
    ended(owner).done()


@pytest.mark.slow
def test_what_cannot_be_finished_before_the_end_of_the_job_is_not_begun(
    small_model: Path, many: Path, alone: pa.Table, tmp_path: Path
) -> None:
    """Chunks in flight are committed, claims given back, and the next job goes on."""
    out = tmp_path / "out"
    command = args(small_model, many, out, "launcher.margin_s=10")
    codes = []
    for job, seconds in enumerate((12, 25, 45, None)):
        ends_at = time.time() + (seconds or 3600)
        env = environment(SLURM_JOB_ID=str(job), SLURM_JOB_END_TIME=str(int(ends_at)))
        before = len(parts(out))
        one = run_cli(*command, env=env)
        assert time.time() < ends_at or len(parts(out)) == before, "it ended before Slurm would have ended it"
        assert only_journal_left_over(out)
        assert one.code == 0 or (one.code == 75 and re.search("Slurm job|while loading", one.err)), one.err
        codes.append(one.code)
    assert codes[0] == 75 and codes[-1] == 0
    assert_all_there(out, alone)
    assert {one["job"] for one in stats(out)} <= set("0123")
