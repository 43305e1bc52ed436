"""Ray nodes on this machine's loopback, started as a user starts them, and no trace of them afterwards."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

STORE_BYTES = 80_000_000
READY_S = 90


@dataclass
class Node:
    """A `ray start --block` with everything below it."""

    process: subprocess.Popen[bytes]
    below: set[psutil.Process] = field(default_factory=set)

    def look(self) -> set[psutil.Process]:
        """All its processes, those included that have lost their parent since the last look."""
        with contextlib.suppress(psutil.NoSuchProcess):
            self.below |= set(psutil.Process(self.process.pid).children(recursive=True))
        for one in list(self.below):
            with contextlib.suppress(psutil.NoSuchProcess):
                self.below |= set(one.children(recursive=True))
        return {one for one in self.below if one.is_running()}

    def workers(self) -> list[psutil.Process]:
        """The pipeline's own processes on it."""
        return [one for one in self.look() if is_worker(one)]

    def kill(self) -> None:
        """As a machine that loses its power."""
        everybody = self.look()
        self.process.kill()
        for one in everybody:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        self.process.wait()
        psutil.wait_procs(everybody, timeout=30)


@dataclass
class Cluster:
    """A head, and nodes that can be added."""

    folder: Path
    port: int
    nodes: list[Node] = field(default_factory=list)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def head(self) -> Node:
        return self.nodes[0]

    def add(self) -> Node:
        """One more node with one CPU; the first one is the head."""
        where = ["--address", self.address]
        if not self.nodes:
            where = ["--head", f"--port={self.port}", "--include-dashboard=false", f"--temp-dir={self.folder}/r"]
        log = (self.folder / f"{len(self.nodes)}.log").open("wb")
        process = subprocess.Popen(
            [
                Path(sys.executable).parent / "ray", "start", *where, "--block", "--num-cpus=1", "--num-gpus=0",
                f"--object-store-memory={STORE_BYTES}", "--min-worker-port=0", "--max-worker-port=0",
                "--disable-usage-stats",
            ],
            env=environment(), cwd=self.folder, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
        log.close()
        node = Node(process)
        self.nodes.append(node)
        self._wait_until_ready(Path(log.name), process)
        return node

    def _wait_until_ready(self, log: Path, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + READY_S
        while "Ray runtime started" not in log.read_text():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)


def environment() -> dict[str, str]:
    """What the nodes are started with: the code to test is found by what the driver hands on, not by this."""
    values = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "RAY_ADDRESS")}
    return values | {
        "RAY_memory_monitor_refresh_ms": "0",  # it would end workers for what others on this machine take
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "disabled",  # whatever is in this user's home
    }


def is_worker(process: psutil.Process) -> bool:
    try:
        return "pipeline.launch.worker" in process.cmdline()
    except psutil.NoSuchProcess:
        return False


@contextlib.contextmanager
def short_folder() -> Iterator[Path]:
    """A folder for Ray's files under a short path, since sockets' names are short."""
    folder = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def cluster() -> Iterator[Cluster]:
    """A cluster of a head alone, whose nodes are all gone afterwards."""
    with short_folder() as folder:
        made = Cluster(folder, free_port())
        try:
            made.add()
            yield made
        finally:
            for node in reversed(made.nodes):
                node.kill()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port
