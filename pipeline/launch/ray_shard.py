"""What runs on the nodes of a Ray cluster: an actor for each shard, and the desk through which it speaks.

An actor's worker is a process of its own, `pipeline.launch.worker`, started as `launcher=local` starts it: so signals,
exit codes, memory and module state are the ordinary ones, and a worker that crashes leaves the actor alive to say so.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

TALK_EVERY_S = 0.25
LIVING_S = 15.0
"""Who was silent for longer is not waited for."""
GHOST_S = 75.0
"""Who was silent for longer holds no chunks any more: longer than the lease of a claim (`output/claims.py`)."""
LAST_WORDS_S = 2.0
"""Longest wait for the end of standard error, which a process below the worker may hold open."""
KEPT_LINES = 5_000
BAD_CONFIG, NOT_DONE = 2, 75
"""As in `process.ExitCode`; Ray sends this module to its nodes as it is, so it imports nothing of ours."""

Told = dict[str, Any]


@dataclass(slots=True)
class _Attempt:
    """A worker's process, as far as the desk has heard of it."""

    worker: int
    node: str
    heard: float
    idle: bool = False
    ended: bool = False


@dataclass(slots=True)
class Desk:
    """Between the driver, which asks often, and the workers, which tell often; an actor beside the driver.

    `start` is what a worker is started with (`WorkerStart` as a map). `clock` gives seconds.
    """

    start: Mapping[str, Any]
    clock: Callable[[], float] = time.monotonic
    _stop: bool = False
    _attempts: dict[str, _Attempt] = field(default_factory=dict)
    _lines: deque[Told] = field(default_factory=lambda: deque(maxlen=KEPT_LINES))

    def work(self) -> Mapping[str, Any]:
        """What a worker is started with."""
        return self.start

    def exchange(self, attempt: str, worker: int, node: str, lines: list[Told]) -> list[str]:
        """Take what a worker's process says; returns the orders for it, as `pipeline.launch.worker` reads them."""
        one = self._attempts.get(attempt)
        if one is None:
            again = [a.node for a in self._attempts.values() if a.worker == worker]
            one = self._attempts[attempt] = _Attempt(worker, node, self.clock())
            self._lines.append({"worker": worker, "begun": node, "lost": again[-1:]})
        one.heard = self.clock()
        for told in lines:
            one.idle = told.get("idle", one.idle)
            one.ended = one.ended or "ended" in told
            self._lines.append({"worker": worker, **told})
        return ["stop"] if self._stop else [f"busy {self._busy()}"]

    def take(self, stop: bool) -> tuple[list[Told], int]:
        """What was said since the last time, and how many workers live; with `stop` all of them are told to end."""
        self._stop = self._stop or stop
        lines, self._lines = list(self._lines), deque(maxlen=KEPT_LINES)
        return lines, sum(not a.ended and self.clock() - a.heard < LIVING_S for a in self._attempts.values())

    def _busy(self) -> int:
        """How many may still give chunks up, those included that were lost with their node and their leases."""
        return sum(not a.ended and not a.idle and self.clock() - a.heard < GHOST_S for a in self._attempts.values())


class ShardActor:
    """Ray Data's callable: a row that names a shard becomes a row with the exit code of its worker."""

    def __init__(self, desk: Any) -> None:
        """`desk` is the handle of the actor."""
        self._desk = desk

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Work on one shard to the end of the worker."""
        import ray

        start = ray.get(self._desk.work.remote())
        attempt, node, shard = uuid.uuid4().hex, ray.util.get_node_ip_address(), int(row["shard"])

        def talk(lines: list[Told]) -> list[str]:
            orders: list[str] = ray.get(self._desk.exchange.remote(attempt, shard, node, lines))
            return orders

        return {"shard": shard, "code": run_worker(start, shard, node, talk, ray.exceptions.RayError)}


def run_worker(
    start: Mapping[str, Any],
    shard: int,
    node: str,
    talk: Callable[[list[Told]], list[str]],
    lost: type[Exception],
) -> int:
    """Run a shard's worker to its end and hand on what is said; returns its exit code.

    When `talk` raises `lost` there is nobody to speak with any more, and the worker saves and ends.
    """
    if "stop" in talk([]):
        talk([{"ended": NOT_DONE}])
        return NOT_DONE
    if not Path(start["cwd"]).is_dir():
        refused = f"error: the current folder {start['cwd']} is not on {node}; start this where every node has it"
        talk([{"note": refused}, {"ended": BAD_CONFIG}])
        return BAD_CONFIG
    process = subprocess.Popen(  # noqa: S603  # this Python and this package
        [sys.executable, *start["command"], *start["shards"][shard]],
        env=os.environ | dict(start["env"]) | {"LOCAL_RANK": str(shard % int(start["env"]["LOCAL_WORLD_SIZE"]))},
        cwd=start["cwd"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        errors="replace",
    )
    try:
        _relay(process, talk)
    except lost:
        assert process.stdin is not None
        with suppress(BrokenPipeError):
            process.stdin.close()  # which it takes for the end of its parent
    return process.wait()


def _relay(process: subprocess.Popen[str], talk: Callable[[list[Told]], list[str]]) -> None:
    """Both ways, until the process has ended."""
    said: queue.SimpleQueue[Told] = queue.SimpleQueue()
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    readers = [
        threading.Thread(target=_read, args=(process.stdout, json.loads, said), daemon=True),
        threading.Thread(target=_read, args=(process.stderr, lambda line: {"log": line.rstrip()}, said), daemon=True),
    ]
    for reader in readers:
        reader.start()
    orders: list[str] = []
    while readers[0].is_alive():
        fresh = talk(list(_drained(said)))
        if fresh != orders:
            orders = fresh
            _give(process.stdin, orders)
        readers[0].join(TALK_EVERY_S)
    code = process.wait()
    readers[1].join(LAST_WORDS_S)
    talk([*_drained(said), {"ended": code}])


def _give(stdin: IO[str], orders: list[str]) -> None:
    with suppress(BrokenPipeError):
        stdin.write("".join(f"{order}\n" for order in orders))
        stdin.flush()


def _read(stream: IO[str], made: Callable[[str], Told], said: queue.SimpleQueue[Told]) -> None:
    for line in stream:
        said.put(made(line))


def _drained(said: queue.SimpleQueue[Told]) -> Iterator[Told]:
    with suppress(queue.Empty):
        while True:
            yield said.get_nowait()
