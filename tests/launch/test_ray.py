"""What launcher=ray decides without a cluster: the plan, refusals, the desk, a shard's process, exit codes as one."""

from __future__ import annotations

import importlib.util
import io
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from pipeline import config
from pipeline.__main__ import main
from pipeline.console import Console
from pipeline.errors import ConfigError, Interrupted, RunFailed
from pipeline.launch.crew import _conclude
from pipeline.launch.place import device_index, place_of
from pipeline.launch.ray import RayCrew
from pipeline.launch.ray_driver import _refusal
from pipeline.launch.ray_link import refuse_unreachable
from pipeline.launch.ray_plan import RayNode, plan_workers, refuse_elsewhere, start_of
from pipeline.launch.ray_shard import GHOST_S, LIVING_S, Desk, run_worker
from pipeline.settings import RaySettings

DEMO = ["experiment=demo", "launcher=ray"]


def node(cpus: float = 4, gpus: float = 0, host: str = "one") -> RayNode:
    return RayNode(host=host, address="10.0.0.1", cpus=cpus, gpus=gpus)


def refusal(*overrides: str, capsys: pytest.CaptureFixture[str]) -> str:
    code = main([*DEMO, *overrides])
    out, err = capsys.readouterr()
    assert code == 2 and not out, (out, err)
    assert len(err.splitlines()) == 1 and err.startswith("error: "), err
    return err


# --- the plan ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nodes", "asked", "device", "workers", "cpus", "gpus", "room", "beside"),
    [
        ([node(8)], {}, "auto", 1, 8, 0, 1, 1),
        ([node(8), node(8)], {"processes": 2}, "auto", 2, 8, 0, 2, 1),
        ([node(8), node(8)], {"processes": 3}, "auto", 3, 4, 0, 4, 2),
        ([node(8), node(2)], {"processes": 2}, "auto", 2, 4, 0, 2, 2),
        ([node(1)], {"processes": 2}, "auto", 2, 1, 0, 1, 1),
        ([node(8, gpus=2), node(8, gpus=2), node(64)], {}, "auto", 4, 4, 1, 4, 2),
        ([node(8, gpus=2)], {}, "cpu", 1, 8, 0, 1, 1),
        ([node(8, gpus=2)], {"gpus": 0, "processes": 4}, "auto", 4, 2, 0, 4, 4),
        ([node(8, gpus=2)], {"cpus": 1}, "auto", 2, 1, 1, 2, 2),
        ([node(8)], {"gpus": 1, "processes": 2}, "auto", 2, 1, 1, 0, 1),
        ([], {}, "auto", 1, 1, 0, 0, 1),
    ],
)
def test_workers_and_what_they_reserve(
    nodes: list[RayNode], asked: Mapping[str, Any], device: str, workers: int, cpus: int, gpus: int, room: int,
    beside: int,
) -> None:  # fmt: skip
    plan = plan_workers(nodes, RaySettings(**asked), device)
    assert (plan.workers, plan.cpus, plan.gpus, plan.room, plan.beside) == (workers, cpus, gpus, room, beside)
    assert ("begin when there is room" in plan.describe(nodes)) == (room < workers)


def test_a_shard_of_a_shard_and_the_environment_that_goes_along(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("NAMED", "by the command line")
    monkeypatch.setenv("OTHER", "not asked for")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("PYTHONPATH", "/code")
    arguments = [*DEMO, "shard.index=1", "shard.count=2", "task.system=${oc.env:NAMED}"]
    settings = config.load_config(arguments)
    start = start_of(settings, arguments, plan_workers([node(2), node(2)], RaySettings(processes=2), "cpu"))
    assert start["shards"] == [["shard.index=2", "shard.count=4"], ["shard.index=3", "shard.count=4"]]
    assert start["command"] == ["-m", "pipeline.launch.worker", *arguments]
    assert start["env"] == {
        "OMP_NUM_THREADS": "3", "PYTHONPATH": "/code", "NAMED": "by the command line", "LOCAL_WORLD_SIZE": "1",
    }  # fmt: skip
    assert start["cwd"] == os.getcwd()


def test_the_one_gpu_that_ray_shows_is_the_workers_own() -> None:
    """Ray sets CUDA_VISIBLE_DEVICES to one device, which is number 0 whatever the rank."""
    place = place_of({"LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "4", "CUDA_VISIBLE_DEVICES": "3"}, now=0.0)
    assert (place.local_count, device_index(place, devices=1)) == (4, 0)


def test_the_launcher_is_not_in_the_fingerprint(tmp_path: Path) -> None:
    from pipeline.job import Job

    common = ["experiment=demo", f"output.dir={tmp_path / 'out'}"]
    asked = [Job(config.load_config([*common, f"launcher={kind}"])).asked for kind in ("local", "ray")]
    assert asked[0] == asked[1]


# --- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("launcher.gpus=2", "launcher.gpus must be 0, 1 or null, got 2"),
        ("launcher.gpus=all", "launcher.gpus must be 0, 1 or null, got all"),
        ("launcher.processes=0", "launcher.processes must be at least 1, got 0"),
        ("launcher.cpus=0", "launcher.cpus must be at least 1, got 0"),
        ("launcher.margin_s=-1", "launcher.margin_s must be 0 or more, got -1"),
        ("launcher.address=ray://head:10001", "launcher.address must be host:port"),
        ("launcher.address=head", "launcher.address must be host:port"),
        ("launcher.tasks=2", "launcher.tasks is no key of the chosen launcher; it belongs to launcher=slurm"),
        ("data.storage_options={secret: abc}", "would be seen in a worker's command line on every node"),
    ],
)
def test_settings_that_cannot_be(override: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in refusal(override, capsys=capsys)


def test_without_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    message = refusal(f"output.dir={tmp_path}/out", capsys=capsys)
    assert "launcher=ray needs the ray package" in message
    assert "pip install 'quantized-batch-pipeline[ray]'" in message
    assert not (tmp_path / "out").exists()


def test_an_address_where_nobody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"launcher\.address=127\.0\.0\.1:1 does not answer .*ray start --head"):
        refuse_unreachable("127.0.0.1:1")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(ConfigError, match=r"RAY_ADDRESS=127\.0\.0\.1:1 does not answer"):
        refuse_unreachable(None)
    monkeypatch.setenv("RAY_ADDRESS", "ray://127.0.0.1:10001")
    with pytest.raises(ConfigError, match="start this on a machine of the cluster"):
        refuse_unreachable(None)
    refuse_unreachable("local")


def test_a_cluster_that_wants_a_token() -> None:
    error = ConnectionError("Failed to connect to Ray cluster")
    assert _refusal(error) == "Failed to connect to Ray cluster"
    error.__cause__ = RuntimeError("Unauthenticated: RPC error: InvalidAuthToken")
    assert "set RAY_AUTH_MODE=token" in _refusal(error)


def test_it_is_said_soon(tmp_path: Path) -> None:
    """Without torch, and without Ray's own two minutes."""
    started = time.monotonic()
    command = [sys.executable, "-m", "pipeline", *DEMO, "launcher.address=127.0.0.1:1", f"output.dir={tmp_path}/out"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "does not answer" in done.stderr, done.stderr
    assert time.monotonic() - started < 20


def test_paths_that_other_machines_do_not_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text("21 1 254:0 / / rw - ext4 /dev/vda rw\n41 21 0:44 / /shared rw - nfs4 server:/ rw\n")
    monkeypatch.setattr("pipeline.launch.shared_paths.MOUNTS", mounts)
    here, there = node(host=socket.gethostname()), node(host="other")
    settings = config.load_config([*DEMO, f"output.dir={tmp_path}/out"])
    refuse_elsewhere(settings, [here, here])
    with pytest.raises(ConfigError, match=r"output\.dir=.* and Ray runs workers on other; .*launcher\.shared=true"):
        refuse_elsewhere(settings, [here, there])
    refuse_elsewhere(config.load_config([*DEMO, "launcher.shared=true"]), [here, there])


# --- the desk ----------------------------------------------------------------------------------------------------


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_desk_says_who_may_still_give_chunks_up() -> None:
    clock = Clock()
    desk = Desk({}, clock)
    assert desk.exchange("a", 0, "one", []) == ["busy 1"]
    assert desk.exchange("b", 1, "two", [{"rows": 3, "tokens": 9}]) == ["busy 2"]
    assert desk.exchange("b", 1, "two", [{"idle": True}]) == ["busy 1"]
    assert desk.exchange("b", 1, "two", [{"idle": False}]) == ["busy 2"]
    lines, living = desk.take(False)
    assert {"worker": 1, "rows": 3, "tokens": 9} in lines and living == 2
    assert desk.take(False)[0] == []
    desk.exchange("a", 0, "one", [{"ended": 0}])
    assert desk.exchange("b", 1, "two", []) == ["busy 1"]
    assert desk.take(True)[1] == 1
    assert desk.exchange("b", 1, "two", []) == ["stop"]


def test_a_worker_lost_with_its_node_is_busy_until_its_leases_are_over() -> None:
    from pipeline.output.local_claims import LocalClaims

    clock = Clock()
    desk = Desk({}, clock)
    desk.exchange("a", 0, "one", [])
    clock.now = LIVING_S + 1
    assert desk.exchange("b", 0, "two", [{"idle": True}]) == ["busy 1"]
    lines, living = desk.take(False)
    assert {"worker": 0, "begun": "two", "lost": ["one"]} in lines
    assert living == 1, "the lost one is not waited for"
    assert LocalClaims(Path()).lease_s < GHOST_S
    clock.now = GHOST_S + 1
    assert desk.exchange("b", 0, "two", []) == ["busy 0"]


# --- a shard's process -------------------------------------------------------------------------------------------

CHILD = """
import os, sys
print('{"note": "begun in %s with %s"}' % (os.getcwd(), os.environ["GIVEN"]), flush=True)
print("a warning", file=sys.stderr, flush=True)
for line in sys.stdin:
    if line == "stop\\n": sys.exit(75)
sys.exit(int(sys.argv[1]))
"""


def started(folder: Path) -> dict[str, Any]:
    env = {"GIVEN": "7", "LOCAL_WORLD_SIZE": "1"}
    return {"command": ["-c", CHILD], "shards": [["4"]], "env": env, "cwd": str(folder)}


class Talk:
    """The desk's side of a worker: what it heard, and what it answers."""

    def __init__(self, stop_after: str = "log", lost: bool = False) -> None:
        self.heard: list[dict[str, Any]] = []
        self._stop_after = stop_after
        self._lost = lost

    def __call__(self, lines: list[dict[str, Any]]) -> list[str]:
        self.heard += lines
        if any(self._stop_after in told for told in self.heard):
            if self._lost:
                raise ConnectionError
            return ["stop"]
        return ["busy 1"]


def test_a_shards_process_is_heard_and_ordered(tmp_path: Path) -> None:
    talk = Talk()
    assert run_worker(started(tmp_path), 0, "node", talk, ConnectionError) == 75
    assert {"note": f"begun in {tmp_path} with 7"} in talk.heard
    assert {"log": "a warning"} in talk.heard
    assert talk.heard[-1] == {"ended": 75}


def test_a_shards_process_ends_when_nobody_hears_it(tmp_path: Path) -> None:
    """Its standard input ends, which a worker takes for the end of its parent."""
    assert run_worker(started(tmp_path), 0, "node", Talk(lost=True), ConnectionError) == 4


def test_a_killed_process_tells_by_what(tmp_path: Path) -> None:
    start = {**started(tmp_path), "command": ["-c", "import os; os.kill(os.getpid(), 9)"]}
    talk = Talk()
    assert run_worker(start, 0, "node", talk, ConnectionError) == -9
    assert talk.heard == [{"ended": -9}]


def test_nothing_is_begun_where_it_cannot_or_should_not(tmp_path: Path) -> None:
    talk = Talk()
    assert run_worker(started(tmp_path / "gone"), 0, "node", talk, ConnectionError) == 2
    assert f"the current folder {tmp_path}/gone is not on node" in talk.heard[0]["note"]
    assert run_worker(started(tmp_path / "gone"), 0, "node", lambda lines: ["stop"], ConnectionError) == 75


# --- what came out -----------------------------------------------------------------------------------------------


class Unfinished:
    """A job of which rows are left."""

    def is_answered(self) -> bool:
        return False


@pytest.mark.parametrize(
    ("codes", "stopped", "ends"),
    [([0, 2], False, 2), ([1, 75], False, RunFailed), ([-9, 0], True, RunFailed), ([75, 75], True, Interrupted)],
)
def test_exit_codes_become_one(codes: list[int], stopped: bool, ends: Any) -> None:
    since: Any = None

    def conclude() -> int:
        job: Any = Unfinished()
        return _conclude(job, since, codes, Console(), lambda: stopped, since)

    if isinstance(ends, int):
        assert conclude() == ends
    else:
        with pytest.raises(ends):
            conclude()


@pytest.fixture
def log() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def crew(log: io.StringIO) -> RayCrew:
    settings = config.load_config(DEMO)
    assert isinstance(settings.launcher, RaySettings)
    return RayCrew(settings, settings.launcher, DEMO, Console(log), lambda: False)


def test_what_the_driver_says(crew: RayCrew, log: io.StringIO) -> None:
    for told in (
        {"worker": 0, "log": "a warning"},
        {"worker": 1, "log": "a warning"},
        {"worker": 1, "begun": "two", "lost": ["one"]},
        {"worker": 1, "note": "on cpu"},
        {"worker": 0, "note": "on cpu"},
        {"worker": 0, "ended": -11},
        {"over": True, "codes": [[0, -11], [1, 0]]},
    ):
        assert not crew._is_over()
        crew._take_in(told, lambda: None)  # type: ignore[arg-type,return-value]
    assert crew._is_over() and sorted(crew._codes()) == [-11, 0]
    assert log.getvalue().splitlines() == [
        "worker 0: a warning",
        "worker 1 on one is lost; Ray begins it again on two",
        "on cpu",
        "worker 0 was killed by SIGSEGV; what it had begun is left to the others",
    ]


@pytest.mark.parametrize(
    ("told", "said"),
    [(None, "Ray has ended before its workers"), ({"failed": "no more"}, "Ray has failed: no more")],
)
def test_when_ray_fails(told: Any, said: str, crew: RayCrew) -> None:
    with pytest.raises(RunFailed, match=said):
        crew._take_in(told, lambda: None)  # type: ignore[arg-type,return-value]
