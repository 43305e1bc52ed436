"""launcher=ray on two loopback nodes: nodes killed, signals, runs begun elsewhere; rows as one process makes them."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from functools import partial
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
    results,
    run_cli,
    run_here,
    run_json,
    start,
    stats,
    wait_for,
)

pytest.importorskip("ray")
from ray_lab import Cluster, Node, cluster, short_folder

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ray() -> Iterator[Cluster]:
    with cluster() as made:
        yield made


@pytest.fixture
def second(ray: Cluster) -> Iterator[Node]:
    """A node beside the head, for one test."""
    node = ray.add()
    yield node
    node.kill()


@pytest.fixture(autouse=True)
def no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the nodes are started: whatever is in this user's home."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")


def on(ray: Cluster, processes: int = 2) -> list[str]:
    return ["launcher=ray", f"launcher.address={ray.address}", f"launcher.processes={processes}"]


def begun(out: Path, process: subprocess.Popen[str], chunks: int = 2) -> None:
    wait_for(lambda: len(parts(out)) >= chunks, process)
    assert len(parts(out)) < NUM_ROWS // CHUNK_ROWS, "too late to disturb anybody"


def more_than(out: Path, chunks: int) -> bool:
    return len(parts(out)) > chunks


def test_a_killed_node_costs_no_row(
    ray: Cluster, second: Node, small_model: Path, many: Path, alone: pa.Table, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = start(*args(small_model, many, out, *on(ray)))
    begun(out, process)
    wait_for(lambda: second.workers() and ray.head.workers(), process)
    second.kill()
    whole = ended(process).done()
    assert_all_there(out, alone)
    assert "ray: 2 workers with no GPU and 1 CPU on 2 nodes" in whole.err
    assert [line.split()[0] for line in whole.out.splitlines()] == ["results", "speed", "stats"]
    assert whole.err.count("on cpu, kernel torch") == 1, "what both say is said once"
    assert "Traceback" not in whole.err
    again = run_cli(*args(small_model, many, out, "launcher=ray", "launcher.address=127.0.0.1:1")).done()
    assert "ray:" not in again.err, "nothing to do is answered without Ray"


def test_begun_by_a_slurm_task_and_by_hand_finished_by_ray(
    ray: Cluster, small_model: Path, many: Path, alone: pa.Table, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    task = environment(SLURM_JOB_ID="7", SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID="1", SLURM_ARRAY_TASK_COUNT="2")
    for number, env in ((signal.SIGUSR1, task), (signal.SIGTERM, environment())):
        process = start(*args(small_model, many, out), env=env)
        wait_for(partial(more_than, out, len(parts(out))), process)
        process.send_signal(number)
        assert ended(process).code == 75
    before = run_json(out)
    left = NUM_ROWS - results(out).num_rows
    assert left
    run_cli(*args(small_model, many, out, *on(ray, 1))).done()
    assert_all_there(out, alone)
    assert {one["job"] for one in stats(out)} == {"7_1", ""}
    after = run_json(out)
    assert (after["run_id"], after["fingerprint"]) == (before["run_id"], before["fingerprint"])


def test_a_signal_stops_the_workers_and_they_save(
    ray: Cluster, small_model: Path, many: Path, alone: pa.Table, tmp_path: Path
) -> None:
    """There is room for one of the two workers: the other one is not waited for."""
    out = tmp_path / "out"
    process = start(*args(small_model, many, out, *on(ray)))
    begun(out, process)
    process.terminate()
    stopped = ended(process)
    assert stopped.code == 75, stopped.err
    assert stopped.err.count("stopped by a signal; what is committed stays; run the same command again") == 1
    assert "1 of them fit now" in stopped.err and "Traceback" not in stopped.err
    assert only_journal_left_over(out), "their claims are given back"
    assert not ray.head.workers()
    run_here(*args(small_model, many, out)).done()
    assert_all_there(out, alone)


def test_the_workers_do_not_outlive_a_killed_driver(
    ray: Cluster, small_model: Path, many: Path, alone: pa.Table, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = start(*args(small_model, many, out, *on(ray, 1)))
    begun(out, process)
    workers = ray.head.workers()
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    ended(process)
    assert workers and not psutil.wait_procs([*workers, *children], timeout=30)[1]
    run_here(*args(small_model, many, out)).done()
    assert_all_there(out, alone)


def test_what_only_the_workers_find_out(ray: Cluster, small_model: Path, many: Path, tmp_path: Path) -> None:
    refused = run_cli(*args(small_model, many, tmp_path / "out", *on(ray, 1), "model.memory=0.0001"))
    assert refused.code == 2
    said = [line for line in refused.err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and "model.memory" in said[0], refused.err


def test_a_worker_that_crashes_fails_the_run(ray: Cluster, small_model: Path, many: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start(*args(small_model, many, out, *on(ray, 1)))
    begun(out, process)
    for worker in ray.head.workers():
        worker.kill()
    failed = ended(process)
    assert failed.code == 1
    assert "worker 0 was killed by SIGKILL; what it had begun is left to the others" in failed.err
    assert failed.err.splitlines()[-1].startswith("error: 1 of 1 processes failed")


def test_the_plan_names_the_workers_and_starts_none(
    ray: Cluster, small_model: Path, many: Path, tmp_path: Path
) -> None:
    plan = run_cli(*args(small_model, many, tmp_path / "out", *on(ray), "dry_run=true")).done()
    assert "ray: 2 workers with no GPU and 1 CPU on 1 node" in plan.err and plan.err.count("would be started") == 1
    assert plan.out.startswith("{")
    assert not ray.head.workers() and not parts(tmp_path / "out")


def test_a_ray_of_its_own_where_there_is_none(small_model: Path, many: Path, alone: pa.Table, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with short_folder() as folder:
        asked = args(small_model, many, out, "launcher=ray", "launcher.address=local")
        process = start(*asked, env=environment(RAY_TMPDIR=str(folder)))
        try:
            begun(out, process)
            below = psutil.Process(process.pid).children(recursive=True)
            ended(process).done()
        finally:
            process.kill()
        assert not psutil.wait_procs(below, timeout=30)[1]
        assert list(folder.iterdir()), "Ray's files were here"
    assert_all_there(out, alone)


def test_when_ray_dies_under_the_driver(
    small_model: Path, many: Path, alone: pa.Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "5")  # instead of a minute
    out = tmp_path / "out"
    with cluster() as made:
        process = start(*args(small_model, many, out, *on(made, 1)))
        begun(out, process)
        workers = made.head.workers()
        next(one for one in made.head.look() if one.name() == "raylet").kill()
        failed = ended(process)
        assert workers and not psutil.wait_procs(workers, timeout=30)[1]
    assert failed.code == 1, failed.err
    assert failed.err.splitlines()[-1].startswith("error: Ray has"), failed.err
    assert "Traceback" not in failed.err
    run_here(*args(small_model, many, out)).done()
    assert_all_there(out, alone)
