"""`launcher=ray`: Ray Data over shard descriptors; an actor for each shard, whose worker is one of `local.py`'s kind.

No rows pass through Ray: the workers share the output folder by claims and commit their own Parts, as they do anywhere.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.command import until_loaded
from pipeline.console import Console, RowProgress
from pipeline.errors import ConfigError, Interrupted, RunFailed
from pipeline.launch.crew import Crew, run_crew
from pipeline.launch.shared_paths import refuse_unshared
from pipeline.process import Stopping
from pipeline.run import show_plan
from pipeline.settings import RaySettings, RunConfig
from pipeline.versions import with_job

EXTRA = "quantized-batch-pipeline[ray]"
PROBE_S = 5.0
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_BACKEND_LOG_LEVEL": "fatal", "RAY_ENABLE_AUTO_CONNECT": "0"}
"""For the process that speaks with Ray; the last one, since Ray Data's threads would start a new Ray after the end."""
LOOK_S = 0.1
CONNECT_S = 60.0
"""Longest wait for a cluster whose port answers."""
END_S = 30.0

Told = dict[str, Any]


def run_on_ray(config: RunConfig, arguments: Sequence[str], console: Console, stopping: Stopping) -> int:
    """Answer every row that has no answer yet on a Ray cluster, and say what came out.

    `arguments` are the command line that `config` was made of. Raises what `run` raises.
    """
    settings = config.launcher
    assert isinstance(settings, RaySettings)
    if importlib.util.find_spec("ray") is None:
        raise ConfigError(f"launcher=ray needs the ray package, which is not installed; pip install '{EXTRA}'")
    with until_loaded(console, stopping) as loading:
        if config.dry_run:
            code = with_job(config, lambda job: show_plan(job, console))
            loading.over()
            console.note(_preview(config, settings, stopping))
            return code
        return run_crew(
            config, lambda: RayCrew(config, settings, arguments, console, stopping), console, stopping, loading
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RayNode:
    """A machine of the cluster, and what Ray may give away of it."""

    host: str
    address: str
    cpus: float
    gpus: float

    def room(self, cpus: int, gpus: int) -> int:
        """How many workers that reserve so much fit on it."""
        fit = self.cpus // cpus
        return int(min(fit, self.gpus // gpus) if gpus else fit)


@dataclass(frozen=True, slots=True, kw_only=True)
class RayPlan:
    """So many workers, what each of them reserves, and how many fit: on the whole cluster, and on one node at most."""

    workers: int
    cpus: int
    gpus: int
    room: int
    beside: int

    def describe(self, nodes: Sequence[RayNode]) -> str:
        """A line for the log."""
        whose = f"{self.workers} workers with" if self.workers > 1 else "1 worker with"
        gpu = f"{self.gpus} GPU" if self.gpus else "no GPU"
        more = f"; {self.room} of them fit now, the others begin when there is room" if self.room < self.workers else ""
        where = f"{len(nodes)} node{'s' if len(nodes) > 1 else ''} ({', '.join(sorted({n.host for n in nodes}))})"
        return f"ray: {whose} {gpu} and {self.cpus} CPU on {where}{more}"


def plan_workers(nodes: Sequence[RayNode], settings: RaySettings, device: str) -> RayPlan:
    """One worker for each GPU, else one, and the cores shared evenly; all of it unless the settings say otherwise."""
    all_gpus = sum(int(node.gpus) for node in nodes)
    gpus = settings.gpus if settings.gpus is not None else int(all_gpus > 0 and device != "cpu")
    workers = settings.processes or (max(1, all_gpus) if gpus else 1)

    def room(cpus: int) -> int:
        return sum(node.room(cpus, gpus) for node in nodes)

    most = max((int(node.cpus) for node in nodes), default=1)
    shares = [cpus for cpus in range(1, most + 1) if room(cpus) >= workers]
    cpus = settings.cpus or max(shares, default=1)
    beside = max((node.room(cpus, gpus) for node in nodes), default=1)
    return RayPlan(workers=workers, cpus=cpus, gpus=gpus, room=room(cpus), beside=max(1, min(workers, beside)))


def refuse_elsewhere(config: RunConfig, nodes: Sequence[RayNode]) -> None:
    """Raise ConfigError for a path that other machines of the cluster do not see."""
    assert isinstance(config.launcher, RaySettings)
    elsewhere = sorted({node.host for node in nodes} - {socket.gethostname()})
    if elsewhere and not config.launcher.shared:
        folder = Path(config.model.path).expanduser()
        refuse_unshared(config, folder if folder.exists() else None, elsewhere, "Ray runs workers on")


def start_of(config: RunConfig, arguments: Sequence[str], plan: RayPlan) -> Mapping[str, Any]:
    """What a worker is started with, wherever it is: everything but its Python."""
    assert isinstance(config.launcher, RaySettings)
    shard, count = config.shard, plan.workers
    referred = [name for argument in arguments for name in re.findall(r"\$\{oc\.env:(\w+)", argument)]
    env = {name: os.environ[name] for name in (*config.launcher.env, *referred) if name in os.environ}
    return {
        "command": ["-m", "pipeline.launch.worker", *arguments],
        "shards": [
            [f"shard.index={shard.index * count + rank}", f"shard.count={shard.count * count}"] for rank in range(count)
        ],
        "env": env | {"LOCAL_WORLD_SIZE": str(plan.beside)},
        "cwd": str(Path.cwd()),
    }


class RayCrew(Crew[Told | None]):
    """Workers that Ray starts; heard of through a process that speaks with Ray (`ray_driver.py`), None at its end."""

    def __init__(
        self, config: RunConfig, settings: RaySettings, arguments: Sequence[str], console: Console, stopping: Stopping
    ) -> None:
        super().__init__(console)
        self._config = config
        self._arguments = arguments
        self._driver = RayDriver(settings, may_start=True)
        self._stopping = stopping
        self._ended: dict[int, int] = {}
        self._over = False

    def _begin(self) -> None:
        self._driver.start(self._said.put)
        nodes = self._driver.nodes(self._said.get, self._stopping)
        assert nodes is not None
        refuse_elsewhere(self._config, nodes)
        assert isinstance(self._config.launcher, RaySettings)
        plan = plan_workers(nodes, self._config.launcher, self._config.model.device)
        self._console.note(plan.describe(nodes))
        start = start_of(self._config, self._arguments, plan)
        self._driver.tell(json.dumps({"workers": plan.workers, "cpus": plan.cpus, "gpus": plan.gpus, "start": start}))

    def _is_over(self) -> bool:
        return self._over

    def _codes(self) -> list[int]:
        return list(self._ended.values())

    def _stop(self) -> None:
        self._driver.tell("stop")

    def _take_in(self, said: Told | None, progress: Callable[[], RowProgress]) -> None:
        if said is None:
            self._over = True
            if not self._stopped:
                raise RunFailed(f"Ray has ended before its workers ({self._driver.last_words()}); they save what they "
                                "have; run the same command again")  # fmt: skip
            return
        if "failed" in said:
            for line in self._driver.words:
                self._console.note(line)
            raise RunFailed(f"Ray has failed: {said['failed']}; run the same command again")
        if "over" in said:
            self._over = True
            self._ended = dict(said["codes"]) | self._ended
            return
        self._hear_worker(said["worker"], said, progress)

    def _hear_worker(self, worker: int, told: Told, progress: Callable[[], RowProgress]) -> None:
        if told.get("lost"):
            self._note(f"worker {worker} on {told['lost'][0]} is lost; Ray begins it again on {told['begun']}")
        if "log" in told and told["log"] not in self._noted:  # libraries warn in every process
            self._noted.add(told["log"])
            self._console.note(f"worker {worker}: {told['log']}")
        if "ended" in told:
            self._ended[worker] = told["ended"]
            self._note_failure(told["ended"], f"worker {worker}")
        self._show(told, progress)

    def _end(self) -> None:
        self._driver.end()


class RayDriver:
    """The process that speaks with Ray, in a session of its own: what a terminal signals is for its parent."""

    def __init__(self, settings: RaySettings, *, may_start: bool) -> None:
        """Nothing is started yet; `may_start`: a Ray of this machine's own where no other is asked for or found."""
        self._address = settings.address
        self._may_start = may_start
        self._process: subprocess.Popen[str] | None = None
        self.words: deque[str] = deque(maxlen=50)

    def start(self, hear: Callable[[Told | None], None]) -> None:
        """Start it; `hear` is called in a thread. Raises ConfigError where nobody listens."""
        refuse_unreachable(self._address)
        command = [sys.executable, "-m", "pipeline.launch.ray_driver", self._address or ""]
        self._process = process = subprocess.Popen(  # noqa: S603  # this Python and this package
            [*command, "start" if self._may_start else "look"],
            env=os.environ | QUIET,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )

        def listen() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                hear(json.loads(line))
            process.wait()
            hear(None)

        def keep() -> None:
            assert process.stderr is not None
            self.words.extend(line.strip() for line in process.stderr if line.strip())

        for body in (listen, keep):
            threading.Thread(target=body, daemon=True).start()

    def nodes(self, heard: Callable[..., Told | None], stopping: Stopping) -> list[RayNode] | None:
        """The nodes of the cluster, None where there is none; raises ConfigError if it does not take us."""
        from queue import Empty

        for _ in range(int(CONNECT_S / LOOK_S)):
            if stopping():
                raise Interrupted("stopped while connecting to Ray")
            with suppress(Empty):
                told = heard(timeout=LOOK_S)
                if told is None or "refused" in told:
                    why = self.last_words() if told is None else told["refused"]
                    raise ConfigError(f"{self._asked()}, but Ray does not take us: {why}")
                if told["nodes"] is None:
                    return None
                return [RayNode(**node) for node in told["nodes"]]
        raise ConfigError(f"{self._asked()}, but Ray has not answered within {CONNECT_S:.0f} s; look at `ray status`")

    def tell(self, line: str) -> None:
        """One line; it may be gone."""
        if self._process is not None and self._process.stdin is not None:
            with suppress(BrokenPipeError):
                self._process.stdin.write(f"{line}\n")
                self._process.stdin.flush()

    def last_words(self) -> str:
        """The last line that it or Ray has written."""
        return self.words[-1] if self.words else "nothing was said"

    def end(self) -> None:
        """Let it end, which ends the workers."""
        if self._process is None:
            return
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _asked(self) -> str:
        named = os.environ.get("RAY_ADDRESS")
        return f"RAY_ADDRESS={named}" if self._address is None and named else f"launcher.address={self._address}"


def refuse_unreachable(address: str | None) -> None:
    """Raise ConfigError if nobody listens at host:port, which Ray would take two minutes to find out, then abort."""
    asked = address if address is not None else os.environ.get("RAY_ADDRESS")
    if asked in (None, "", "auto", "local"):
        return
    key = "RAY_ADDRESS" if address is None else "launcher.address"
    host, _, port = asked.rpartition(":")
    if not host or not port.isdecimal() or "/" in asked:
        raise ConfigError(f"{key}={asked} is no host:port; start this on a machine of the cluster and name its head")
    try:
        socket.create_connection((host, int(port)), PROBE_S).close()
    except OSError as error:
        raise ConfigError(
            f"{key}={asked} does not answer ({error.strerror or error}); `ray status` on the cluster's head tells its "
            "address, and `ray start --head` starts one"
        ) from error


def _preview(config: RunConfig, settings: RaySettings, stopping: Stopping) -> str:
    """dry_run: which workers would be started where, by the cluster as it is; none is started for it."""
    from queue import SimpleQueue

    said: SimpleQueue[Told | None] = SimpleQueue()
    driver = RayDriver(settings, may_start=False)
    try:
        driver.start(said.put)
        nodes = driver.nodes(said.get, stopping)
    finally:
        driver.end()
    if nodes is None:
        return "ray: no cluster runs here; a Ray of this machine alone would be started"
    refuse_elsewhere(config, nodes)
    return f"{plan_workers(nodes, settings, config.model.device).describe(nodes)} would be started"
